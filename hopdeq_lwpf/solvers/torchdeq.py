"""torchdeq's solvers in our solves: `solver="torchdeq:broyden"` or `TorchDEQ("anderson", lam=1e-8)`.

torchdeq is imported when one of them is made, never before.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.solvers.base import check_count, check_number, pick
from hopdeq_lwpf.solvers.loop import Course, Outcome
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.solvers.view import FlatFunction

PREFIX = "torchdeq:"
# What torchdeq 0.1.0 brings; said where a name is misspelt, without importing it.
THEIRS = ("anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter")


def import_torchdeq() -> Any:
    """The package `torchdeq` with its solvers, or an ImportError that says how to get it."""
    try:
        import torchdeq.solver
    except ImportError as error:
        raise ImportError(
            "torchdeq's solvers were asked for and torchdeq cannot be imported; install it with "
            "`pip install torchdeq`, or use a solver of ours such as 'broyden'"
        ) from error
    return torchdeq


@dataclass(frozen=True)
class TorchDEQ:
    """A solver of torchdeq (Geng & Kolter 2023), by the name it has in torchdeq's registry.

    name: "anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter", or what the user registered.
    m, lam, tau, LBFGS_thres: that solver's options, in its own words; None leaves its default (anderson: m=6,
    lam=1e-4, tau=1; broyden: LBFGS_thres = `max_steps`). An option that it does not take is an error, while
    torchdeq itself ignores it. `return_final` and `ls` are not offered: the first contradicts the promise of
    the best iterate, the second searches one step length for the whole batch.

    Their solver only chooses the iterates. Every evaluation that it asks for is tested for each problem by our
    `Termination`; a problem that meets it is recorded there and then, so `result`, `residual`, `steps` and
    `evaluations` mean what they mean for our solvers, and a solve ends once all problems have stopped. Stopped
    problems stay in their batch until then, fed with zeros: torchdeq has no way to drop them, and a NaN there
    must not reach what they compute over the batch. When their linear algebra raises for the batch (Anderson
    with a small `lam` meets singular systems), every problem that has not stopped starts again from its best
    iterate.

    Raises ImportError without torchdeq; ValueError for an unknown name; TypeError for an option that this
    solver does not take.
    """

    name: str
    m: int | None = None
    lam: float | None = None
    tau: float | None = None
    LBFGS_thres: int | None = None

    uses_energy = False
    uses_metric = False

    def __post_init__(self) -> None:
        taken = inspect.signature(self._function()).parameters
        options = self._options()
        for option in options:
            if option not in taken:
                has = sorted(field.name for field in dataclasses.fields(self)[1:] if field.name in taken)
                raise TypeError(
                    f"torchdeq's solver {self.name!r} takes no {option!r}; of these it takes {has}"
                )
        if "m" in options:
            check_count("m", self.m, 2)  # their Anderson fills two columns before it mixes
        if "LBFGS_thres" in options:
            check_count("LBFGS_thres", self.LBFGS_thres, 1)
        if "lam" in options:
            check_number("lam", self.lam, 0.0)
        if "tau" in options:
            check_number("tau", self.tau, 0.0, open_low=True)

    def _function(self) -> Callable[..., Any]:
        solvers = import_torchdeq().solver
        registered = solvers._solvers
        if self.name not in registered:
            raise unknown("torchdeq's solver", self.name, registered)
        return solvers.get_solver(self.name)

    def _options(self) -> dict[str, Any]:
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        return {name: value for name, value in options.items() if value is not None}

    def run(self, f: FlatFunction, z0: Tensor, stop: Termination, trace: bool) -> Outcome:
        """Solve z = f(z) from z0 (B, n); see `hopdeq_lwpf.solvers.loop.run`."""
        asked = _Asked(Course(f, z0, stop, trace=trace))
        course, solve, options = asked.course, self._function(), self._options()
        # No tolerance and no end of their own: the course decides.
        options |= {"max_iter": stop.max_steps + 2, "tol": 0.0, "stop_mode": "rel"}
        start = z0
        while not course.ended:
            before = course.step
            try:
                with f.full_precision():
                    solve(asked, start, **options)
            except _Ended:
                break
            except torch.linalg.LinAlgError:
                if asked.inside:
                    raise
            if course.step == before:
                raise RuntimeError(f"torchdeq's solver {self.name!r} ended without evaluating f")
            start = course.work.best_z
        return course.finish()


class _Ended(Exception):
    """Leaves their loop once every problem has stopped."""


class _Asked:
    """f as their solver calls it: each call is one evaluation of the course."""

    def __init__(self, course: Course) -> None:
        self.course = course
        self.autocast = course.work.f.autocast
        self.inside = False  # whether an error comes from f

    def __call__(self, z: Tensor, tau: float = 1.0) -> Tensor:
        course, work = self.course, self.course.work
        # A copy: they overwrite their buffers, and the best iterate is kept.
        work.z = z.reshape(work.z.shape).clone()
        self.inside = True
        with torch.autocast(work.f.device) if self.autocast else nullcontext():
            fz, _, _ = course.evaluate()
        self.inside = False
        if fz.requires_grad:
            raise ValueError(
                "torchdeq's solvers write in place and cannot be differentiated step by step; use "
                "adjoint='implicit' with them, or a solver of ours with adjoint='unrolled'"
            )
        if course.ended:
            raise _Ended
        fz = pick(work.live, fz, torch.zeros_like(fz)).reshape(z.shape)
        # Their simplest solver leaves its damping to f.
        return fz if tau == 1.0 else tau * fz + (1 - tau) * z
