"""What the trials of a sweep come to: means over seeds, comparisons in pairs, tables and findings in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hopdeq_lwpf.sweeps.engine.records import measures
from hopdeq_lwpf.sweeps.reports.statistics import Interval, holm, sign_flip_test, t_interval, t_test
from hopdeq_lwpf.sweeps.reports.study_results import limits, p_value
from hopdeq_lwpf.sweeps.reports.summary import Grid
from hopdeq_lwpf.sweeps.sweep_spec import Cell, SweepSpec, SweepTrial, level_name

Values = NDArray[np.float64]  # (seeds,), NaN for a trial that failed, was not run, or does not know
PERCENT = (
    "accuracy", "auc", "converged", "not_converged", "adjoint_converged", "nonfinite", "forgotten",
    "recalled", "cycling", "empty",
)  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """The trials of a spec and their records, in the same order; None for a trial that was not run yet.

    stopped: how many more a search stopped early; they count nowhere.
    """

    spec: SweepSpec
    trials: tuple[SweepTrial, ...]
    records: tuple[Mapping[str, Any] | None, ...]
    stopped: int = 0

    def __post_init__(self) -> None:
        numbers: dict[tuple[Cell, int], dict[str, float | None]] = {}
        for trial, record in zip(self.trials, self.records, strict=True):
            if record is not None and record["failure"] is None:
                found = measures(record, self.spec.last, self.spec.measures[0])
                numbers[trial.cell, trial.seed] = found
        object.__setattr__(self, "_numbers", numbers)

    def cells(self) -> tuple[Cell, ...]:
        """The cells of the trials, in the order of the grid."""
        return tuple(dict.fromkeys(trial.cell for trial in self.trials))

    def factors(self) -> tuple[str, ...]:
        """Every factor that a cell has a level of."""
        return tuple(dict.fromkeys(factor for cell in self.cells() for factor, _ in cell.levels))

    def numbers(self, trial: SweepTrial) -> Mapping[str, float | None]:
        """Everything that is known of one trial; empty where it failed or was not run."""
        known: dict[Any, dict[str, float | None]] = self._numbers  # type: ignore[attr-defined]
        return known.get((trial.cell, trial.seed), {})

    def values(self, cell: Cell, measure: str) -> Values:
        """A number of `engine.records.measures` for every seed, in the order of the spec; shares in per cent."""
        known: dict[Any, dict[str, float | None]] = self._numbers  # type: ignore[attr-defined]
        found = [known.get((cell, seed), {}).get(measure) for seed in self.spec.seeds]
        scale = 100.0 if is_share(measure) else 1.0
        return scale * np.array([math.nan if value is None else value for value in found])

    def interval(self, cell: Cell, measure: str) -> Interval:
        """Mean over the seeds with its interval."""
        return t_interval(self.values(cell, measure), self.spec.confidence)

    def failures(self) -> list[tuple[SweepTrial, Mapping[str, Any]]]:
        """The trials that failed, with their records."""
        pairs = zip(self.trials, self.records, strict=True)
        return [(trial, record) for trial, record in pairs if record and record["failure"] is not None]

    def missing(self) -> int:
        """How many trials were not run yet."""
        return sum(record is None for record in self.records)


def is_share(measure: str) -> bool:
    """Whether a measure is written in per cent."""
    return measure.rsplit("/", 1)[-1] in PERCENT


def measure_name(measure: str) -> str:
    """'val accuracy %': a measure as tables write it."""
    return measure.replace("/", " ").replace("_", " ") + " %" * is_share(measure)


@dataclass(frozen=True)
class Pair:
    """A cell beside the one that differs by having the baseline's level of one factor, by seed."""

    factor: str
    cell: Cell
    first: Cell
    difference: Interval  # of the score
    ratios: tuple[float, ...]  # of the other measures: mean here / mean there, over the seeds that both have
    seeds: int
    p: float  # of the paired t test
    flips: float  # of the permutation test of sign flips
    adjusted: float = math.nan  # p after Holm's correction for all pairs of the sweep

    @property
    def known(self) -> bool:
        """Whether the difference has an interval: two seeds at least."""
        return self.seeds > 1

    @property
    def certain(self) -> bool:
        """Whether all seeds differ by the same number, so that the interval has no width."""
        return self.known and math.isclose(self.difference.low, self.difference.high, rel_tol=1e-9)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval of the difference lies above or below 0; 0 where it does not, or is not known.

        An interval without width is none: a few seeds may agree by chance.
        """
        if not self.known or self.certain:
            return 0
        return int(self.difference.low > 0) - int(self.difference.high < 0)


def pairs(sweep: Sweep) -> list[Pair]:
    """Every cell against the same with the baseline's level of a factor, by factor.

    The baseline's level is the named one, whose absence from the grid leaves a cell alone, or the first there is.
    """
    cells = sweep.cells()
    known, found = set(cells), []
    for factor, levels in sweep.spec.factors().items():
        names = [level.name for level in levels]
        if factor in sweep.spec.baseline:
            names = [level_name(sweep.spec.baseline[factor])]
        for cell in cells:
            first = next((other for name in names if (other := _with(cell, factor, name)) in known), cell)
            if first != cell:
                found.append(_pair(sweep, factor, cell, first))
    adjusted = holm([pair.p for pair in found])
    return [replace(pair, adjusted=p) for pair, p in zip(found, adjusted, strict=True)]


def _with(cell: Cell, factor: str, level: str) -> Cell:
    return replace(cell, levels=tuple((f, level if f == factor else name) for f, name in cell.levels))


def _pair(sweep: Sweep, factor: str, cell: Cell, first: Cell) -> Pair:
    score, *others = sweep.spec.measures
    gap = sweep.values(cell, score) - sweep.values(first, score)
    ratios = []
    for measure in others:
        here, there = sweep.values(cell, measure), sweep.values(first, measure)
        both = ~np.isnan(here + there)
        known = both.any() and there[both].mean() != 0
        ratios.append(float(here[both].mean() / there[both].mean()) if known else math.nan)
    interval = t_interval(gap, sweep.spec.confidence)
    seeds = int((~np.isnan(gap)).sum())
    flips = sign_flip_test(gap) if seeds > 1 else math.nan
    return Pair(factor, cell, first, interval, tuple(ratios), seeds, t_test(gap), flips)


def summaries(sweep: Sweep, most: int | None = None) -> list[Grid]:
    """What every cell came to, and the comparisons in pairs; at most so many lines of each."""
    found = pairs(sweep)
    grids = [_cells(sweep), *([_pairs(sweep, found)] if found else [])]
    return [grid if most is None or len(grid.lines) <= most else _cut(grid, most) for grid in grids]


def _cut(grid: Grid, most: int) -> Grid:
    title = f"{grid.title} (the first {most} of {len(grid.lines)} lines; report.html has all)"
    return replace(grid, title=title, lines=grid.lines[:most])


def _digits(measure: str) -> int:
    return 2 if is_share(measure) or "iterations" in measure or measure == "steps" else 3


def _cells(sweep: Sweep) -> Grid:
    spec = sweep.spec
    lines = []
    for cell in sweep.cells():
        numbers = [
            limits(sweep.interval(cell, measure), digits=_digits(measure)) for measure in spec.measures
        ]
        seeds = int((~np.isnan(sweep.values(cell, spec.measures[0]))).sum())
        levels = dict(cell.levels)
        lines.append((*(levels.get(factor, "-") for factor in sweep.factors()), str(seeds), *numbers))
    header = (*sweep.factors(), "seeds", *(measure_name(measure) for measure in spec.measures))
    epochs = ", of the last epoch" if spec.last == 1 else f", of the last {spec.last} epochs"
    when = epochs if spec.task == "train" else ""
    title = f"Mean over the seeds [{100 * spec.confidence:g} % interval]{when}"
    return Grid(title, header, tuple(lines))


def _pairs(sweep: Sweep, found: list[Pair]) -> Grid:
    score, *others = sweep.spec.measures
    lines = []
    for pair in found:
        said = {1: "higher", -1: "lower", 0: "no"}[pair.sign] if pair.known else "-"
        said = "equal in all seeds" if pair.certain else said
        ratios = ["-" if math.isnan(ratio) else f"{ratio:.2f}x" for ratio in pair.ratios]
        difference = limits(pair.difference, "+", _digits(score))
        against = pair.first.level(pair.factor)
        tests = (p_value(pair.p), p_value(pair.adjusted), p_value(pair.flips))
        lines.append((pair.cell.name, against, str(pair.seeds), difference, said, *tests, *ratios))
    names = [f"{measure_name(measure)}, ratio" for measure in others]
    tests = ("p, paired t", "p, Holm", "p, sign flips")
    gap = f"{measure_name(score)}, difference"
    header = ("cell", "against", "seeds", gap, "interval without 0", *tests, *names)
    tested = sum(not math.isnan(pair.p) for pair in found)
    corrected = f"; Holm's correction is for {tested} paired t tests" if tested else ""
    return Grid(f"In pairs by seed: one level changed, all else equal{corrected}", header, tuple(lines))


def findings(sweep: Sweep) -> list[str]:
    """What the numbers support, in sentences made from them."""
    lost = len(sweep.failures()) + sweep.missing()
    stopped = f"{sweep.stopped} stopped early, " if sweep.stopped else ""
    count = len(sweep.trials) + sweep.stopped
    said = [
        f"Trials: {len(sweep.trials) - lost} of {count} finished, {len(sweep.failures())} failed, {stopped}"
        f"{sweep.missing()} not run; seeds {', '.join(map(str, sweep.spec.seeds))}."
    ]
    if len(sweep.spec.seeds) == 1:
        said.append("There is one seed, so that no number has an interval and no difference a test.")
    for measure in sweep.spec.measures:
        scored = [(sweep.interval(cell, measure), cell) for cell in sweep.cells()]
        scored = [(interval, cell) for interval, cell in scored if not math.isnan(interval.mean)]
        if len(scored) > 1:
            low, high = min(scored, key=lambda s: s[0].mean), max(scored, key=lambda s: s[0].mean)
            name, digits = measure_name(measure), _digits(measure)
            said.append(
                f"Mean {name} from {limits(low[0], digits=digits)} ({low[1].name}) to {limits(high[0], digits=digits)} "
                f"({high[1].name})."
            )
    found = pairs(sweep)
    for factor in sweep.spec.factors():
        own = [pair for pair in found if pair.factor == factor]
        if own:
            said.append(_of_factor(sweep, factor, own))
    return said


def _of_factor(sweep: Sweep, factor: str, own: list[Pair]) -> str:
    score, *others = sweep.spec.measures
    name = measure_name(score)
    tested = [pair for pair in own if pair.known and not pair.certain]
    equal = [pair.difference.mean for pair in own if pair.certain]
    gaps = [pair.difference.mean for pair in own if pair.seeds == 1]
    parts = []
    if tested:
        up, down = sum(pair.sign > 0 for pair in tested), sum(pair.sign < 0 for pair in tested)
        parts.append(
            f"is shown to be higher in {up} and lower in {down} of {len(tested)} pairs with an interval"
        )
    if equal:
        span = f"{min(equal):+.3g} to {max(equal):+.3g}"
        parts.append(
            f"differs by the same number in all seeds, and so has no interval, in {len(equal)} ({span})"
        )
    if gaps:
        parts.append(
            f"differs by {min(gaps):+.3g} to {max(gaps):+.3g} in {len(gaps)} with one seed, and so no interval"
        )
    alpha = 1 - sweep.spec.confidence
    if tested:
        kept = sum(pair.adjusted <= alpha for pair in tested)
        parts[0] += f" ({kept} after Holm's correction for all pairs, paired t test at {alpha:.2g})"
    named = sweep.spec.baseline.get(factor)
    against = "its first level" if named is None else repr(level_name(named))
    text = f"{factor}: against {against} the {name} {'; '.join(parts) or 'is not known'}"
    for number, measure in enumerate(others):
        ratios = [pair.ratios[number] for pair in own if not math.isnan(pair.ratios[number])]
        if ratios:
            text += f"; {measure_name(measure)} {min(ratios):.2f}x to {max(ratios):.2f}x"
    return text + "."
