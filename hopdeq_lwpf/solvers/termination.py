"""When a solve stops."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Termination:
    """Stopping rule of a solve, applied to each problem by itself.

    A problem has converged once |f(z) - z| <= atol + rtol |f(z)|, norms over one problem in float32 or wider.
    """

    # The forward error dominates the error of an implicit gradient: in float32, at contractions of .3 to .99,
    # 1e-4 costs 7 % of the gradient, 1e-5 one or two, and 1e-6 hardly less, being near rounding.
    rtol: float = 1e-5
    # Retrieval with forgetting has z = 0 as an equilibrium, where a relative test alone never passes.
    atol: float = 1e-8
    max_steps: int = 200
    # A test costs a dozen small operations and, on a GPU, a synchronisation. The first four steps are tested
    # one by one, since an easy retrieval needs two or three, and the sixth, since a trained layer needs four or five.
    check_every: int = 4
    # DIVERGED once the absolute residual exceeds this many times its own and f's first norm.
    divergence: float = 1e6

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        for name in ("max_steps", "check_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not self.divergence > 1:
            raise ValueError(f"divergence must be > 1, got {self.divergence!r}")

    def checks(self, step: int) -> bool:
        """Whether the iterate after `step` updates is tested."""
        return step < 4 or step == 5 or (step + 1) % self.check_every == 0 or step >= self.max_steps
