"""What one trial of retrieval on graphs is asked to do. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hopdeq_lwpf._checks import choice, forms, number, option, whole

# Those of data.curves, which needs torch; a test compares the two.
CURVES = ("rotated_digit", "fourier")
FORGETTING = ("none", "relu", "pfu", "topk")
MEASURES = ("error", "query_error", "angle_error", "steps", "converged", "energy_rises", "seconds")


@dataclass(frozen=True)
class GraphSpec:
    """Settings of one trial with `task: graph`; every field may be changed by the grid of a sweep.

    Noisy queries near a curve recall from noisy patterns of the same curve, all queries as one problem. Measures:
    `error`, the mean square distance of what is recalled from the curve's own point, over the mean square length
    of the curve's points; `query_error`, that of the queries themselves; `angle_error`, the mean distance along
    the curve, in radians, of the pattern with the largest weight. Raises SpecError for a value that makes no sense.
    """

    curve: str = option("rotated_digit", f"one of {', '.join(CURVES)}")
    stored: int = option(128, "stored patterns")
    queries: int = option(128, "queries")
    stored_noise: float = option(0.5, "length of the noise on stored patterns over that of the signal")
    query_noise: float = option(0.5, "likewise of the noise on queries")
    beta: float = option(8.0, "inverse temperature")
    lam: float = option(0.0, "strength of the diffusion of states")
    eta: float = option(0.0, "time of diffusion of the stored patterns")
    logit_eta: float = option(0.0, "time of diffusion of the scores")
    neighbors: int = option(5, "of each node of the graphs")
    laplacian: str = option("normalized", "normalized or combinatorial")
    forgetting: str = option("none", f"one of {', '.join(FORGETTING)}")
    inject: str = option("start", "where the query enters: start or input")
    steps: int | None = option(None, "softmaxes; null: the equilibrium")
    seed: int = option(0, "of curve, angles and noise")

    def __post_init__(self) -> None:
        forms(self)
        for name, allowed in (
            ("curve", CURVES),
            ("forgetting", FORGETTING),
            ("laplacian", ("normalized", "combinatorial")),
            ("inject", ("start", "input")),
        ):
            choice(name, getattr(self, name), allowed)
        for name in ("stored", "queries", "neighbors"):
            whole(name, getattr(self, name), least=1)
        whole("seed", self.seed, least=0)
        if self.steps is not None:
            whole("steps", self.steps, least=1)
        for name in ("stored_noise", "query_noise", "beta", "lam", "eta", "logit_eta"):
            number(name, getattr(self, name), least=0)

    def as_dict(self) -> dict[str, Any]:
        """Every setting by name."""
        return dataclasses.asdict(self)
