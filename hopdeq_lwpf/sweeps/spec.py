"""What the commands are asked to do. Imports no torch, so that the command line answers at once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from hopdeq_lwpf._checks import SpecError as SpecError
from hopdeq_lwpf._checks import choice, forms, number, option, tolerances, whole

CONVERGED = "converged"
KINDS = ("mask", "occlude", "noise", "flip")
FORGETTING = ("none", "relu", "pfu", "topk")
NORMALIZE = ("none", "unit", "center", "center-unit")

Steps = int | str  # a number of softmaxes, or "converged"


@dataclass(frozen=True)
class CompareSpec:
    """Settings of `hopdeq-lwpf compare`; every field is an option and a key of the YAML file.

    The reasons for the defaults stand beside them in `sweeps/compare.yaml`. Raises SpecError for a value that
    makes no sense.
    """

    patterns: str | None = option(
        None, "stored patterns: .npy, .npz, .csv (one a row), IDX file or folder of images; null: digits"
    )
    queries: str | None = option(
        None, "file of queries, used as they are; null: corrupted stored patterns (needs --patterns)"
    )
    targets: str | None = option(None, "file with the row of the right pattern for each query of --queries")
    stored: int | None = option(None, "store a random subset of this many patterns; null: all")
    samples: int = option(256, "how many stored patterns are corrupted and asked for")
    normalize: str = option("center-unit", f"before storing: one of {', '.join(NORMALIZE)}")
    forgetting: tuple[str, ...] = option(("none", "relu", "pfu"), f"any of {', '.join(FORGETTING)}")
    steps: tuple[Steps, ...] = option((1, 3, CONVERGED), "numbers of softmaxes, or 'converged'")
    beta: tuple[float, ...] = option((8.0, 16.0, 32.0, 64.0), "inverse temperatures")
    mask: tuple[float, ...] = option((0.1, 0.2, 0.3), "shares of the entries set to the lowest value")
    occlude: tuple[float, ...] = option((), "shares of the entries hidden from the end (lowest rows)")
    noise: tuple[float, ...] = option((0.2, 0.3, 0.4), "standard deviations, as shares of the data's range")
    flip: tuple[float, ...] = option((0.05, 0.1, 0.15), "shares of the entries mirrored, x to 1 - x")
    separation: str = option("softmax", "softmax, sparsemax, ...")
    max_error: float = option(0.2, "recalled: at most this far from the right pattern, over its length")
    solver: str = option("auto", "solver of the converged runs")
    rtol: float = option(1e-5, "relative tolerance of the converged runs")
    atol: float = option(1e-8, "absolute tolerance of the converged runs")
    max_steps: int = option(1000, "step limit of the converged runs")
    reference: bool = option(True, "count basin changes against plain Picard iteration in float64")
    reference_rtol: float = option(1e-6, "relative tolerance of that iteration")
    reference_max_steps: int = option(5000, "step limit of that iteration")
    spectrum: int = option(64, "queries of each converged cell whose spectral radius is measured; 0: none")
    resamples: int = option(1000, "bootstrap resamples of the queries")
    confidence: float = option(0.95, "coverage of the intervals")
    trajectories: int = option(16, "queries whose energy is drawn; 0: none")
    shape: tuple[int, int] | None = option(None, "height and width of a pattern drawn as a picture")
    threads: int = option(1, "threads of torch during the run")
    seed: int = option(0, "seed of the choice of queries, the corruption and the bootstrap")
    out: str = option("results/compare", "folder of the results")

    def __post_init__(self) -> None:
        forms(self)
        for entry in fields(self):  # lists from YAML and the command line become hashable
            value = getattr(self, entry.name)
            if isinstance(value, list):
                object.__setattr__(self, entry.name, tuple(value))
        self._check_lists()
        self._check_numbers()
        self._check_files()

    def _check_lists(self) -> None:
        choice("normalize", self.normalize, NORMALIZE)
        for unit in self.forgetting:
            choice("forgetting", unit, FORGETTING)
        for step in self.steps:
            _steps(step)
        for name in ("forgetting", "steps", "beta"):
            if not getattr(self, name):
                raise SpecError(f"{name} is empty: give at least one")
        for name in ("forgetting", "steps", "beta", *KINDS):
            value = getattr(self, name)
            if len(set(value)) != len(value):
                raise SpecError(f"{name} names a value twice: {list(value)}")
        for beta in self.beta:
            number("beta", beta, above=0)
        for kind in KINDS:
            for level in getattr(self, kind):
                number(kind, level, least=0, most=math.inf if kind == "noise" else 1)
        if not self.levels and self.queries is None:
            raise SpecError(f"nothing to ask: give levels for at least one of {', '.join(KINDS)}, or queries")

    def _check_numbers(self) -> None:
        for name in ("samples", "max_steps", "reference_max_steps", "resamples", "threads"):
            whole(name, getattr(self, name), least=1)
        for name in ("trajectories", "spectrum", "seed"):
            whole(name, getattr(self, name), least=0)
        if self.stored is not None:
            whole("stored", self.stored, least=1)
        for name in ("max_error", "reference_rtol"):
            number(name, getattr(self, name), above=0)
        tolerances(self.rtol, self.atol)
        number("confidence", self.confidence)
        if not 0 < self.confidence < 1:
            raise SpecError(f"confidence must be between 0 and 1, got {self.confidence}")
        if self.shape is not None:
            if len(self.shape) != 2:
                raise SpecError(f"shape must be height and width, got {list(self.shape)}")
            for side in self.shape:
                whole("shape", side, least=1)

    def _check_files(self) -> None:
        if self.queries is not None and self.patterns is None:
            raise SpecError("queries need patterns: give the file of the stored patterns, too")
        if self.queries is not None and self.stored is not None:
            raise SpecError(
                "stored draws a random subset, and queries need all patterns; drop one of the two"
            )
        if self.targets is not None and self.queries is None:
            raise SpecError("targets belong to queries: give the file of the queries, too")
        if not self.out:
            raise SpecError("out is empty: name a folder for the results")

    @property
    def levels(self) -> tuple[tuple[str, float], ...]:
        """(kind, level) of every corruption that is asked for."""
        return tuple((kind, level) for kind in KINDS for level in getattr(self, kind))

    def as_dict(self) -> dict[str, Any]:
        """Every setting by name, lists instead of tuples: what YAML and JSON write."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class RetrieveSpec:
    """Settings of `hopdeq-lwpf retrieve`; those of `hopdeq_lwpf.retrieve` have its defaults.

    Raises SpecError for a value that makes no sense.
    """

    patterns: str = option(
        "", "stored patterns: .npy, .safetensors, .npz, .csv (one a row), IDX file or folder of images"
    )
    queries: str = option("", "queries, in a file or folder of one of these kinds, but .safetensors")
    out: str = option("", "file of the recall: .npz everything, .npy or .csv only what was recalled")
    values: str | None = option(None, "file of what is read out instead of the patterns, one row a pattern")
    normalize: str = option("none", f"patterns and queries before storing: one of {', '.join(NORMALIZE)}")
    beta: float = option(1.0, "inverse temperature")
    forgetting: str = option("none", f"one of {', '.join(FORGETTING)}")
    separation: str = option("softmax", "softmax, sparsemax, ...")
    steps: Steps = option(CONVERGED, "number of softmaxes (1 is attention), or 'converged'")
    inject: str = option("start", "where the query enters: start or input")
    inject_weight: float = option(1.0, "weight of the query with inject 'input'")
    solver: str = option("auto", "solver of a converged run")
    rtol: float = option(1e-5, "relative tolerance")
    atol: float = option(1e-8, "absolute tolerance")
    max_steps: int = option(200, "step limit of a converged run")
    dtype: str = option("float32", "precision of the run: float32 or float64")
    batch: int = option(1024, "queries at a time: bounds the memory to batch x patterns numbers")
    stream: bool | None = option(
        None,
        "look at the patterns in blocks, with normalize 'none' without reading a .npy or .safetensors file into "
        "memory; null: where they are many",
    )

    def __post_init__(self) -> None:
        forms(self)
        for name in ("patterns", "queries", "out"):
            if not getattr(self, name):
                raise SpecError(f"{name} is missing: give a file")
        choices = (("forgetting", FORGETTING), ("normalize", NORMALIZE), ("inject", ("start", "input")))
        for name, allowed in (*choices, ("dtype", ("float32", "float64"))):
            choice(name, getattr(self, name), allowed)
        _steps(self.steps)
        number("beta", self.beta, above=0)
        number("inject_weight", self.inject_weight)
        tolerances(self.rtol, self.atol)
        for name in ("max_steps", "batch"):
            whole(name, getattr(self, name), least=1)
        if self.stream is not None and not isinstance(self.stream, bool):
            raise SpecError(f"stream must be true, false or null, got {self.stream!r}")


def _steps(value: object) -> None:
    if value != CONVERGED and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise SpecError(f"steps must be whole numbers of at least 1 or {CONVERGED!r}, got {value!r}")
