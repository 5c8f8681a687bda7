"""Where trials run: processes of this machine, or a cluster of machines, behind one small interface."""

from __future__ import annotations

from typing import Protocol

from hopdeq_lwpf._checks import SpecError, did_you_mean
from hopdeq_lwpf.sweeps.engine.jobs import Answer, Job

LOCAL, RAY = "local", "ray"
EXECUTORS = (LOCAL, RAY)


class Executor(Protocol):
    """Runs jobs, a few at a time."""

    @property
    def slots(self) -> int:
        """How many jobs may run at a time; a cluster may grow."""

    @property
    def retries(self) -> bool:
        """Whether it begins a job again by itself when a worker dies."""

    def start(self, count: int) -> None:
        """Get ready for as many jobs, where that takes time."""

    def submit(self, job: Job) -> None:
        """Begin a job; never more than `slots` at a time."""

    def wait(self, timeout: float | None = None) -> list[tuple[Job, Answer]]:
        """Wait until some jobs have ended, at most `timeout` seconds; those, with their answers."""

    def close(self) -> None:
        """End whatever still runs, and free what is held."""


def parse_executor(text: str) -> tuple[str, str | None]:
    """("local", None), or ("ray", address); SpecError for others.

    text: "local"; "ray", a new cluster on this machine; "ray:HOST:PORT", or "ray:auto" for the cluster that this
    machine belongs to.
    """
    name, colon, address = text.partition(":")
    if name not in EXECUTORS:
        raise SpecError(
            f"executor {text!r} is not one of local, ray, ray:ADDRESS{did_you_mean(name, EXECUTORS)}"
        )
    if name == LOCAL and colon:
        raise SpecError(f"executor {text!r}: local has no address; for other machines use ray:ADDRESS")
    if address.startswith("ray://"):
        raise SpecError(
            f"executor {text!r}: start the sweep on a machine of the cluster and write ray:HOST:PORT"
        )
    if colon and not address:
        raise SpecError(f"executor {text!r}: the address is missing; write ray:HOST:PORT or ray")
    return name, address or None


def build_executor(text: str, workers: int, *, retries: int = 3, preload: str | None = None) -> Executor:
    """The executor called `text`; see `parse_executor`.

    workers: processes of this machine, also of a Ray cluster that is made here. retries: of a job whose worker or
    machine dies, where the executor sees to it. preload: "module:function" that workers import at once.
    """
    name, address = parse_executor(text)
    if name == RAY:
        from hopdeq_lwpf.sweeps.engine.ray_executor import RayExecutor

        return RayExecutor(address, workers, retries)
    from hopdeq_lwpf.sweeps.engine.workers import LocalExecutor

    return LocalExecutor(workers, preload)
