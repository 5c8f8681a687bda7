"""What a recall from a binary or continuous memory returns, and the module that runs it: cycles are found and told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hopdeq_lwpf._types import ConvergenceError, ConvergenceWarning, Result, Solution, plain
from hopdeq_lwpf.solvers.adjoints import Adjoint
from hopdeq_lwpf.solvers.base import Solver, outside_of_compile
from hopdeq_lwpf.solvers.equilibrium import Equilibrium
from hopdeq_lwpf.solvers.picard import Picard
from hopdeq_lwpf.solvers.registry import make_solver
from hopdeq_lwpf.solvers.termination import Termination

# Synchronous updates of symmetric weights have cycles of length 2 only (Goles and Olivos 1981); this leaves room for
# longer ones of other maps.
CYCLE_SEARCH = 64


@dataclass(frozen=True)
class SDMRecall(Solution):
    """What was recalled, one entry a query in every field; these four carry no gradient.

    index: the stored pattern nearest to the state, int64, ties by lowest index; -1 for NaN, and where the memory
        holds no single patterns. cosine: its cosine with the state, of bipolar vectors in the binary space.
    empty: whether a read at the state, with empty="mean" also at the start, reaches no stored pattern.
    cycle: length of the cycle that the state lies on: 1 for a fixed point, 2 or more for a cycle; 0 where none was
        looked for (steps=k) or found.
    """

    index: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    cosine: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    empty: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    cycle: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class AssociativeMemory(Equilibrium):
    """An `Equilibrium` whose function knows empty reads, and may be piecewise constant.

    f beside what `Equilibrium` asks for: `smooth`, `binary`, `empty`,
    `empty_reads(z, x)`, `nearest(z, x)`.
    """

    last_solution: SDMRecall | None

    def __init__(
        self,
        f: Callable[..., Any],
        *,
        steps: int | None,
        solver: str | Solver,
        stop: Termination,
        adjoint: str | Adjoint,
        on_failure: str,
    ) -> None:
        super().__init__(f, steps=steps, solver=solver, stop=stop, adjoint=adjoint, on_failure=on_failure)

    @property
    def solver(self) -> str | Solver:
        """The solver; "auto" is Picard, the dynamics themselves."""
        return "picard" if self._solver == "auto" else self._solver

    @solver.setter
    def solver(self, solver: str | Solver) -> None:
        made = make_solver(solver)
        f: Any = self.f
        if made is not None and not f.smooth:
            if not isinstance(made, Picard):
                raise ValueError(
                    f"solver {solver!r} needs a smooth function, and this memory is piecewise constant; use "
                    "solver='picard', which is what 'auto' means here"
                )
            if f.binary and made.damping:
                raise ValueError(
                    f"solver {solver!r} would leave the binary states; use Picard() without damping"
                )
        self._solver = solver

    def _recall(self, x: Any, hetero: bool, return_solution: bool) -> Tensor | SDMRecall:
        """The read-out for a context that f made, or the whole SDMRecall.

        Where that raises because of a failure, `last_solution` tells what was found, its value being the state.
        """
        if torch.compiler.is_compiling():
            return cast(Tensor | SDMRecall, outside_of_compile(self._recall, x, hetero, return_solution))
        try:
            solution = cast(Solution, super().forward(x, read_out=hetero, return_solution=True))
        except (ConvergenceError, ConvergenceWarning):  # the latter where warnings are errors
            self.last_solution = self._report_on(x, cast(Solution, self.last_solution))
            raise
        recall = self._report_on(x, solution)
        self.last_solution = dataclasses.replace(
            recall, value=plain(recall.value.detach()), state=plain(recall.state.detach())
        )
        return recall if return_solution else recall.value

    @torch.no_grad()
    def _report_on(self, x: Any, solution: Solution) -> SDMRecall:
        f: Any = self.f
        state = solution.state.detach()
        cycle = self._cycles(x, state, solution)
        empty = f.empty_reads(state, x)
        # A state that is kept stays empty; where the mean takes its place, only the start tells.
        empty = empty | f.empty_reads(f.init(x), x) if f.empty == "mean" else empty
        cosine, index = f.nearest(state, x)
        notes = [solution.note] * bool(solution.note)
        cycling = int((cycle > 1).sum())
        if cycling:
            notes.append(
                f"{cycling} of {cycle.numel()} queries ended in a cycle of up to {int(cycle.max())} states"
            )
        if bool(empty.any()):
            notes.append(f"{int(empty.sum())} of {empty.numel()} queries met an empty read")
        fields = {field.name: getattr(solution, field.name) for field in dataclasses.fields(Solution)}
        return SDMRecall(
            **{**fields, "note": "; ".join(notes)}, index=index, cosine=cosine, empty=empty, cycle=cycle
        )

    def _cycles(self, x: Any, state: Tensor, solution: Solution) -> Tensor:
        if self.steps is not None:
            return torch.zeros_like(solution.result)
        cycle = (solution.result == int(Result.CONVERGED)).to(torch.int64)
        if bool((solution.result == int(Result.MAX_STEPS)).any()):
            found = cycle_lengths(self.f, x, state, self.stop)
            cycle = torch.where(solution.result == int(Result.MAX_STEPS), found, cycle)
        return cycle


@torch.no_grad()
def cycle_lengths(
    f: Callable[[Tensor, Any], Tensor], x: Any, z: Tensor, stop: Termination, *, limit: int = CYCLE_SEARCH
) -> Tensor:
    """Length of the cycle that plain iteration from z (*batch, n) falls into: int64 (*batch), 0 where none was found.

    States within the tolerance of `stop` count as the same; limit: iterations. Brent's algorithm (1980), which needs
    two states a query.
    """
    found = torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device)
    waiting, moving, power, length = z, z, 1, 0
    for _ in range(limit):
        if length == power:
            waiting, power, length = moving, 2 * power, 0
        moving, length = f(moving, x), length + 1
        distance = torch.linalg.vector_norm((moving - waiting).double(), dim=-1)
        size = torch.linalg.vector_norm(moving.double(), dim=-1)
        same = distance <= stop.atol + stop.rtol * size
        found = torch.where((found == 0) & same, length, found)
        if bool((found > 0).all()):
            break
    return found
