"""What a solver is: it proposes the next iterate. The loop stops, records, drops and traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from hopdeq_lwpf._types import Matvec

# Nested tuples of tensors whose first dimension is the batch (None where there is nothing yet), so that the
# loop can drop finished problems from any solver's memory.
Memory: TypeAlias = Any


class Deferred:
    """One number a row, computed when it is first asked for: of most iterates nobody wants the energy."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._value: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._value is None:
            self._value = self._compute()
        return self._value

    def take(self, rows: Tensor) -> Deferred:
        """The same of these rows."""
        return Deferred(lambda: self().index_select(0, rows))


@dataclass(frozen=True)
class Iterate:
    """What a solver sees: everything is one row a problem."""

    step: int
    z: Tensor  # (B, n)
    fz: Tensor  # (B, n)
    energy: Deferred | None  # () -> (B,), only where the solver uses it and f has it
    piece: Tensor | None  # (B,), beside the energy; changes where f has a kink
    metric: Matvec | None
    eps: float  # relative rounding of f
    rtol: float  # of the stopping test


class Solver(Protocol):
    """A frozen dataclass whose fields are its options."""

    @property
    def uses_energy(self) -> bool: ...

    @property
    def uses_metric(self) -> bool: ...

    def propose(self, memory: Memory, now: Iterate) -> tuple[Tensor, Memory]:
        """Next iterate (B, n) and new memory; `memory` is None at the first step. Never works in place."""
        ...


def take(memory: Memory, rows: Tensor) -> Memory:
    """`memory` with only these rows in every tensor."""
    if memory is None:
        return None
    if isinstance(memory, Tensor):
        return memory.index_select(0, rows)
    return (
        type(memory)(*(take(part, rows) for part in memory))
        if hasattr(memory, "_fields")
        else tuple(take(part, rows) for part in memory)
    )


def pick(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`yes` where `rows` (B,) holds, else `no`: a selection, never a product, so that NaN stays in its row."""
    return torch.where(rows[:, None], yes, no)


def transformed() -> bool:
    """Whether the call runs inside a torch.func transform, where no tensor may be asked for its numbers."""
    # There is no public question to ask.
    return bool(torch._C._are_functorch_transforms_active())


def outside_of_compile(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The call, as it is, where torch.compile traces the caller: one graph break instead of dozens.

    How often f is called depends on data, so a solve cannot be one graph. An f that was compiled by itself stays
    compiled.
    """
    import torch._dynamo  # only where somebody compiles: it takes a second to import

    return torch._dynamo.disable(function)(*arguments, **options)


# What torch.compiler.disable sets; setting it here spares the import.
outside_of_compile._torchdynamo_disable = True  # type: ignore[attr-defined]


def check_number(
    name: str, value: object, low: float, high: float = float("inf"), *, open_low: bool = False
) -> None:
    """Raise unless `value` is a number in [low, high] (or (low, high])."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not good or (open_low and value == low):
        bound = f"{'(' if open_low else '['}{low}, {high}]"
        raise ValueError(f"{name} must be a number in {bound}, got {value!r}")


def check_count(name: str, value: object, low: int) -> None:
    """Raise unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
