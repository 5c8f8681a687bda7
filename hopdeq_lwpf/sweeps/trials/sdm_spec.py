"""What one trial of Sparse Distributed Memory is asked to do. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hopdeq_lwpf._checks import SpecError, choice, forms, number, option, whole

# What each experiment measures.
EXPERIMENTS = {
    "recall": ("cosine", "recalled", "steps", "converged", "cycling", "empty"),
    "fit": ("beta", "bias", "r2", "weight_error"),
    "critical_distance": ("critical_distance", "log10_fraction"),
}
MEASURES = (*(name for names in EXPERIMENTS.values() for name in names), "seconds")
# Those of models.sdm.experiments, which needs torch; a test compares the two.
ALGORITHMS = (
    "Binary_SDM", "Binary_SDM_NeuronLimit", "Binary_SDM_BFit_Attention", "Cont_SDM", "Cont_SDM_NeuronLimit",
    "Cont_Binary_SDM", "Cont_SDM_BFit_Attention", "Cont_SDM_CFit_Attention", "Transformer_Attention",
    "Cont_Binary_SDM_NeuronLimit", "Binary_Neuron_SDM", "Hopfield",
)  # fmt: skip


@dataclass(frozen=True)
class SdmSpec:
    """Settings of one trial with `task: sdm`; every field may be changed by the grid of a sweep.

    The defaults are the transformer setting of Bricken and Pehlevan 2021. Raises SpecError for a value that makes no
    sense.
    """

    experiment: str = option("recall", f"one of {', '.join(EXPERIMENTS)}")
    n: int = option(64, "bits of an address")
    radius: int = option(11, "Hamming radius of reading and writing")
    patterns: int = option(1024, "stored patterns")
    algorithm: str = option("Binary_SDM", f"of experiment recall, one of {', '.join(ALGORITHMS)}")
    flips: int = option(0, "of experiment recall: bits flipped in each query")
    repeats: int = option(1, "of experiment recall: perturbations of each pattern")
    neurons: float = option(2.0**64, "neurons, of algorithms with a limit and of critical distances")
    explicit_neurons: int = option(100_000, "neurons of Binary_Neuron_SDM, each with an address of its own")
    max_steps: int = option(100, "of experiment recall: reads at most")
    space: str = option("binary", "of experiment fit: binary or continuous")
    estimator: str = option("ols", "of fitted betas: ols or published")
    fit: str = option("log", "of experiment fit: log or softmax")
    seed: int = option(0, "of patterns, perturbations and neurons")

    def __post_init__(self) -> None:
        forms(self)
        for name, allowed in (
            ("experiment", tuple(EXPERIMENTS)),
            ("algorithm", ALGORITHMS),
            ("space", ("binary", "continuous")),
            ("estimator", ("ols", "published")),
            ("fit", ("log", "softmax")),
        ):
            choice(name, getattr(self, name), allowed)
        for name in ("n", "patterns", "repeats", "explicit_neurons", "max_steps"):
            whole(name, getattr(self, name), least=1)
        for name in ("radius", "flips", "seed"):
            whole(name, getattr(self, name), least=0)
        number("neurons", self.neurons, least=1)
        for name in ("radius", "flips"):
            if getattr(self, name) > self.n:
                raise SpecError(f"{name} must be at most n = {self.n}, got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        """Every setting by name."""
        return dataclasses.asdict(self)
