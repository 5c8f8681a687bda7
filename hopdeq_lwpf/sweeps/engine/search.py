"""What a search is asked to do: a space of settings, who proposes points in it, who stops hopeless trials. No Optuna.

A grid says which trials there are; a search finds out, trial by trial, from the scores so far.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hopdeq_lwpf._checks import SpecError, choice, did_you_mean, number, whole

SAMPLERS = ("tpe", "random")
PRUNERS = ("halving", "none")
MAXIMIZE, MINIMIZE = "maximize", "minimize"
# Of measures that end in one of these more is better, of all others (losses, errors, steps, times) less.
HIGHER = (
    "accuracy", "auc", "recalled", "cosine", "converged", "adjoint_converged", "r2", "score",
    "critical_distance",
)  # fmt: skip


def direction_of(measure: str) -> str:
    """Whether a search for the best value of a measure maximizes or minimizes it; 'val/accuracy' ends in accuracy."""
    return MAXIMIZE if measure.rsplit("/", 1)[-1] in HIGHER else MINIMIZE


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; whole ones where both are. log: as many in each decade."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether the numbers are whole."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def value(self, found: Any) -> Any:
        """The setting for what the sampler found."""
        return int(found) if self.whole else float(found)


@dataclass(frozen=True)
class Choices:
    """Values of any kind, by the names that the sampler knows them by."""

    values: tuple[tuple[str, Any], ...]

    def value(self, found: Any) -> Any:
        """The setting for what the sampler found."""
        return dict(self.values)[found]


@dataclass(frozen=True)
class SearchSpec:
    """The key `search` of a sweep.

    space: {SETTING: {low, high, log, step} or [VALUE, ...]}. trials: points that are tried, for every cell of a grid.
    sampler: tpe (tree-structured Parzen estimator, Bergstra et al. 2011) or random. pruner: none, or halving:
    asynchronous successive halving (Li et al. 2020), which looks after min_epochs, min_epochs * reduction, ... epochs
    and lets the best 1 / reduction of the trials that came there go on. seed: of the sampler. direction: maximize or
    minimize, None: by the name of the score.
    Raises SpecError for a value that makes no sense.
    """

    space: Mapping[str, Range | Choices]
    trials: int = 20
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int = 0
    min_epochs: int = 1
    reduction: int = 4
    direction: str | None = None

    def __post_init__(self) -> None:
        choice("search.sampler", self.sampler, SAMPLERS)
        choice("search.pruner", self.pruner, PRUNERS)
        if self.direction is not None:
            choice("search.direction", self.direction, (MAXIMIZE, MINIMIZE))
        whole("search.trials", self.trials, least=1)
        whole("search.seed", self.seed, least=0)
        whole("search.min_epochs", self.min_epochs, least=1)
        whole("search.reduction", self.reduction, least=2)
        if not self.space:
            raise SpecError(
                "search.space is empty: name a setting and its range, {low: ..., high: ...} or [VALUES]"
            )

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> SearchSpec:
        """From the mapping that a YAML file holds."""
        known = [entry.name for entry in fields(cls)]
        for name in given:
            if name not in known:
                raise SpecError(f"search: {name!r} is not one of {known}{did_you_mean(name, known)}")
        space = given.get("space", {})
        if not isinstance(space, Mapping):
            raise SpecError(f"search.space must be a mapping of settings to ranges, got {space!r}")
        found = {str(name): _dimension(str(name), value) for name, value in space.items()}
        return cls(**{**given, "space": found})

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a point, by dotted name, for what the sampler calls its params."""
        return {name: dimension.value(params[name]) for name, dimension in self.space.items()}

    def corners(self) -> list[dict[str, Any]]:
        """Some points of the space: all lowest, all highest, and every choice beside the lowest of the others."""
        ends = [{}, {}]  # type: list[dict[str, Any]]
        for name, dimension in self.space.items():
            low, high = (
                (dimension.low, dimension.high)
                if isinstance(dimension, Range)
                else (dimension.values[0][1], dimension.values[-1][1])
            )
            ends[0][name], ends[1][name] = low, high
        more = [
            {**ends[0], name: value}
            for name, dimension in self.space.items()
            if isinstance(dimension, Choices)
            for _, value in dimension.values[1:]
        ]
        return [*ends, *more]


def value_name(value: object) -> str:
    """What a value is called in names of points and tables; floats with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _dimension(name: str, value: object) -> Range | Choices:
    place = f"search.space.{name}"
    if isinstance(value, Mapping):
        return _range(place, value)
    if not isinstance(value, (list, tuple)):
        raise SpecError(f"{place} must be {{low: ..., high: ...}} or a list of values, got {value!r}")
    names = [entry if isinstance(entry, str) else json.dumps(entry) for entry in value]
    if not names:
        raise SpecError(f"{place} is empty: give at least one value")
    if len(set(names)) != len(names):
        raise SpecError(f"{place} names a value twice: {list(value)}")
    return Choices(tuple(zip(names, value, strict=True)))


def _range(place: str, given: Mapping[str, Any]) -> Range:
    known = [entry.name for entry in fields(Range)]
    for name in given:
        if name not in known:
            raise SpecError(f"{place}: {name!r} is not one of {known}{did_you_mean(name, known)}")
    for name in ("low", "high"):
        if name not in given:
            raise SpecError(f"{place}: {name} is missing")
    low, high, step = (_plain(f"{place}.{name}", given.get(name)) for name in ("low", "high", "step"))
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise SpecError(f"{place}.log must be true or false, got {log!r}")
    number(f"{place}.low", low)
    number(f"{place}.high", high)
    if low > high:
        raise SpecError(f"{place}: low {low!r} is above high {high!r}")
    if log and low <= 0:
        raise SpecError(f"{place}: with log, low must be above 0, got {low!r}")
    if step is not None:
        number(f"{place}.step", step, above=0)
        if log:
            raise SpecError(f"{place}: log and step do not go together; leave one out")
        if isinstance(low, int) and isinstance(high, int) and not isinstance(step, int):
            raise SpecError(
                f"{place}.step must be whole, as low and high are, got {step!r}; or write low as {low}.0"
            )
        # The sampler would quietly lower the end, with a warning.
        count = math.floor((high - low) / step + 1e-9)
        high = low + count * step
    return Range(low, high, log, step)


def _plain(name: str, value: Any) -> Any:
    """YAML reads 1e-4 as text; it is a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError as error:
            raise SpecError(f"{name} must be a number, got {value!r}") from error
    return value
