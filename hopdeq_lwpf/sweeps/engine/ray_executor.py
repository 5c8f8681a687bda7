"""Trials on the machines of a Ray cluster: core tasks, one CPU each, retried by Ray where a machine is lost."""

from __future__ import annotations

import importlib
import os
import socket
from pathlib import Path
from typing import Any

from hopdeq_lwpf import imports
from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.sweeps.engine.jobs import Answer, Job, died, failure, perform

INSTALL = "pip install 'hopdeq-lwpf[ray]'"
PATIENCE = 10  # seconds for a cluster to answer
# A worker must not take every core for each of its trials; read once, before it imports torch.
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class RayExecutor:
    """Runs jobs as tasks of a Ray cluster, as many at a time as it has CPUs.

    address: of the cluster, such as 10.0.0.1:6379, or auto, the one that this machine belongs to; None: a new one on
    this machine with `workers` CPUs. retries: how often Ray begins a task again whose worker or machine was lost.
    The folder of the results must be one that all machines see under the same path: checkpoints, by which such a trial
    goes on, are there. The package must be installed on every machine, in the same version.
    Raises SpecError where Ray is missing or the cluster does not answer.
    """

    retries = True

    def __init__(self, address: str | None, workers: int, retries: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # calls nobody
        try:
            ray: Any = importlib.import_module("ray")  # which has no types
        except ImportError as error:
            raise SpecError(f"executor ray needs Ray, which is not installed: {INSTALL}") from error
        _reach(address)
        own = {"address": "local", "num_cpus": workers, "include_dashboard": False}
        options: dict[str, Any] = {"address": address} if address else own
        self._ray, self._own = ray, not ray.is_initialized()
        if self._own:
            try:
                ray.init(
                    **options,
                    configure_logging=True,
                    logging_level="ERROR",
                    log_to_driver=False,
                    runtime_env={"env_vars": {**THREADS, **_allowed()}},
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                text = " ".join(str(error).split())
                raise SpecError(f"executor ray:{address}: the cluster does not answer: {text}") from error
        self._task = ray.remote(num_cpus=1, max_retries=retries)(_perform)
        self._running: dict[Any, Job] = {}

    @property
    def slots(self) -> int:
        """The CPUs of the cluster as it is now."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 0)))

    def start(self, count: int) -> None:
        """Nothing to do: the cluster is there."""

    def submit(self, job: Job) -> None:
        """Begin a task."""
        self._running[self._task.remote(job)] = job

    def wait(self, timeout: float | None = None) -> list[tuple[Job, Answer]]:
        """The jobs that have ended, each with its answer; after `timeout` seconds none."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
        return [(self._running.pop(task), self._answer(task)) for task in ready]

    def _answer(self, task: Any) -> Answer:
        try:
            found: Answer = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:  # what `perform` does not catch, as a lost module
            return {"failure": failure(error.cause or error)}
        except self._ray.exceptions.RayError as error:
            return died(" ".join(str(error).split())[:300])
        return found

    def close(self) -> None:
        """Cancel what runs; leave the cluster, and end it if it was made here."""
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._running.clear()
        if self._own:
            self._ray.shutdown()


def _reach(address: str | None) -> None:
    """SpecError where nobody listens at HOST:PORT; Ray itself would end the process, after a minute or more."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdecimal():
        return  # none, auto, or the name of something that Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise SpecError(
            f"executor ray:{address}: no cluster answers there ({error}); start one with ray start --head --port={port}"
        ) from error


def _allowed() -> dict[str, str]:
    """Whether settings may import, which the machines do not know from this one's environment."""
    return {name: os.environ[name] for name in (imports.VARIABLE,) if name in os.environ}


def _perform(job: Job) -> Answer:
    """The task, on whatever machine."""
    trials = Path(job.folder).parent
    if not trials.is_dir():
        said = f"machine {socket.gethostname()} does not see {trials}, which all machines of the cluster must share"
        return {"failure": {"error": "StorageError", "message": said, "traceback": "", "storage": True}}
    import torch

    torch.set_num_threads(1)
    return perform(job)
