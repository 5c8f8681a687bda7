"""Plain iteration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hopdeq_lwpf.solvers.base import Iterate, Memory, check_number


@dataclass(frozen=True)
class Picard:
    """z <- f(z), or (1 - damping) f(z) + damping z: the dynamics themselves, and an explicit Euler step.

    damping: 0 (none) to below 1; it slows a map that contracts and tames one that oscillates.
    """

    damping: float = 0.0

    uses_energy = False
    uses_metric = False

    def __post_init__(self) -> None:
        check_number("damping", self.damping, 0.0, 1.0)
        if self.damping == 1:
            raise ValueError("damping must be below 1: at 1 the state never moves")

    def propose(self, memory: Memory, now: Iterate) -> tuple[Tensor, Memory]:
        return (now.fz if not self.damping else now.fz.lerp(now.z, self.damping)), memory
