"""What the trials of a study come to: means over seeds, paired differences, tables and findings in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hopdeq_lwpf.sweeps.engine.records import measures
from hopdeq_lwpf.sweeps.reports.statistics import Interval, holm, t_interval, t_test
from hopdeq_lwpf.sweeps.reports.summary import Grid, unit_name
from hopdeq_lwpf.sweeps.spec import CONVERGED
from hopdeq_lwpf.sweeps.study_spec import TASKS, Condition, StudySpec, Trial

Values = NDArray[np.float64]  # (seeds,), NaN for a trial that failed, was not run, or does not know


@dataclass(frozen=True)
class Study:
    """The trials of a spec and their records, in the same order; None for a trial that was not run yet."""

    spec: StudySpec
    trials: tuple[Trial, ...]
    records: tuple[Mapping[str, Any] | None, ...]

    def __post_init__(self) -> None:
        numbers: dict[tuple[Condition, int], dict[str, float | None]] = {}
        for trial, record in zip(self.trials, self.records, strict=True):
            if record is not None and record["failure"] is None:
                task = trial.condition.task
                found = measures(record, self.spec.last_of(task), TASKS[task].score)
                numbers[trial.condition, trial.seed] = found
        object.__setattr__(self, "_numbers", numbers)

    def values(self, condition: Condition, name: str) -> Values:
        """A number of `engine.records.measures` for every seed, in the order of the spec."""
        numbers: dict[Any, dict[str, float | None]] = self._numbers  # type: ignore[attr-defined]
        found = [numbers.get((condition, seed), {}).get(name) for seed in self.spec.seeds]
        return np.array([math.nan if value is None else value for value in found])

    def interval(self, condition: Condition, name: str) -> Interval:
        """Mean over the seeds with its interval."""
        return t_interval(self.values(condition, name), self.spec.confidence)

    def conditions(self, task: str) -> list[Condition]:
        """Those of one task."""
        return [condition for condition in self.spec.conditions() if condition.task == task]

    def failures(self) -> list[tuple[Trial, Mapping[str, Any]]]:
        """The trials that failed, with their records."""
        pairs = zip(self.trials, self.records, strict=True)
        return [(trial, record) for trial, record in pairs if record and record["failure"] is not None]

    def missing(self) -> int:
        """How many trials were not run yet."""
        return sum(record is None for record in self.records)


def dynamics_name(condition: Condition) -> str:
    """'1 step', 'converged, implicit, input': a condition without its unit."""
    if condition.steps != CONVERGED:
        return condition.dynamics
    return f"{CONVERGED}, {condition.adjoint}, {condition.inject}"


@dataclass(frozen=True)
class Difference:
    """The score of a condition minus that of another one, in pairs by seed."""

    kind: str
    condition: Condition
    other: Condition
    interval: Interval
    seeds: int  # pairs
    p: float = math.nan  # of the paired t test
    adjusted: float = math.nan  # after Holm's correction for all differences of the task

    @property
    def known(self) -> bool:
        """Whether there is an interval: two pairs at least, whose differences are not all the same number.

        Scores are shares of a few hundred bags, so that a few seeds may agree by chance; an interval of no width
        would take that for certainty.
        """
        return self.interval.high - self.interval.low > 1e-9

    @property
    def sign(self) -> int:
        """1 or -1 where there is an interval and it lies above or below 0, else 0."""
        return (int(self.interval.low > 0) - int(self.interval.high < 0)) if self.known else 0


KINDS = {
    "steps": "against one step, same unit",
    "forgetting": "against no forgetting, same dynamics",
    "adjoint": "gradient of the equilibrium, same unit and injection",
    "inject": "query in every step against query at the start, same unit and gradient",
}


def differences(study: Study, task: str) -> list[Difference]:
    """Every paired difference that the grid has both sides of."""
    conditions = study.conditions(task)
    found = []
    for kind, condition, other in _pairs(conditions, study.spec):
        gap = study.values(condition, "score") - study.values(other, "score")
        interval = t_interval(gap, study.spec.confidence)
        entry = Difference(kind, condition, other, interval, int((~np.isnan(gap)).sum()))
        found.append(replace(entry, p=t_test(gap) if entry.known else math.nan))
    adjusted = holm([entry.p for entry in found])
    return [replace(entry, adjusted=p) for entry, p in zip(found, adjusted, strict=True)]


def _pairs(conditions: Sequence[Condition], spec: StudySpec) -> Iterator[tuple[str, Condition, Condition]]:
    known = {(c.forgetting, c.steps, c.adjoint, c.inject): c for c in conditions}
    first = spec.adjoint[0]
    for kind in KINDS:
        for c in conditions:
            others = {
                "steps": (c.forgetting, 1, None, "start"),
                "forgetting": ("none", c.steps, c.adjoint, c.inject),
                # Of the gradients the first one of the spec is compared with each other one.
                "adjoint": (c.forgetting, c.steps, first, c.inject) if c.adjoint else None,
                "inject": (c.forgetting, c.steps, c.adjoint, "start") if c.adjoint else None,
            }
            other = known.get(others[kind])  # type: ignore[arg-type]
            if other is not None and other != c:
                yield (kind, other, c) if kind == "adjoint" else (kind, c, other)


def number(value: float, digits: int = 3) -> str:
    """The number, or '-' where there is none."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def p_value(p: float) -> str:
    """Two digits of a probability; '-' where there was no test."""
    return "-" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def limits(interval: Interval, sign: str = "", digits: int = 3) -> str:
    """'0.953 [0.940, 0.966]'; without limits for a single value; sign '+' writes that of the mean."""
    if math.isnan(interval.mean):
        return "-"
    mean = f"{interval.mean:{sign}.{digits}f}"
    if math.isnan(interval.low):
        return mean
    return f"{mean} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def summaries(study: Study) -> list[Grid]:
    """For each task what every condition came to, what its layers did, and the paired differences."""
    grids = []
    for task in study.spec.task:
        grids += [_scores_grid(study, task), _solves_grid(study, task), _differences_grid(study, task)]
    return grids


def epochs_name(spec: StudySpec, task: str) -> str:
    """'the last 10 epochs': what scores are averaged over."""
    last = min(spec.last_of(task), spec.epochs_of(task))
    return "the last epoch" if last == 1 else f"the last {last} epochs"


def score_name(task: str) -> str:
    """'accuracy' or 'AUC'."""
    return TASKS[task].score.rsplit("/", 1)[-1].replace("auc", "AUC")


def _scores_grid(study: Study, task: str) -> Grid:
    lines = []
    for condition in study.conditions(task):
        mean = _means(study, condition, ("train_score", "epoch_cpu_seconds", "saved_bytes"))
        lines.append(
            (
                unit_name(condition.forgetting),
                dynamics_name(condition),
                str(int((~np.isnan(study.values(condition, "score"))).sum())),
                limits(study.interval(condition, "score")),
                number(mean["train_score"]),
                number(mean["epoch_cpu_seconds"]),
                number(mean["saved_bytes"] / 1e6, 2),
            )
        )
    spec = study.spec
    title = (
        f"{task}: score, mean over {epochs_name(spec, task)} and the seeds "
        f"[{100 * spec.confidence:g} % interval over seeds], and cost"
    )
    header = ("forgetting", "steps", "seeds", f"val {score_name(task)}", "train", "CPU s/epoch", "MB saved")
    return Grid(title, header, tuple(lines))


def _solves_grid(study: Study, task: str) -> Grid:
    lines = []
    for condition in study.conditions(task):
        names = (
            "steps",
            "converged",
            "adjoint_steps",
            "support",
            "forgotten",
            "gradient_norm",
            "query_gradient",
        )
        mean, tops = _means(study, condition, names), study.values(condition, "steps_max")
        lines.append(
            (
                unit_name(condition.forgetting),
                dynamics_name(condition),
                number(mean["steps"], 1),
                "-" if np.isnan(tops).all() else f"{np.nanmax(tops):.0f}",
                number(100 * mean["converged"], 1),
                number(mean["adjoint_steps"], 1),
                number(mean["support"], 1),
                number(100 * mean["forgotten"], 1),
                *("-" if math.isnan(mean[name]) else f"{mean[name]:.2g}" for name in names[-2:]),
            )
        )
    header = (
        "forgetting",
        "steps",
        "steps mean",
        "max",
        "converged %",
        "adjoint steps",
        "support",
        "forgot all %",
    )
    title = f"{task}: what the layers did, mean over {epochs_name(study.spec, task)} and the seeds"
    return Grid(title, (*header, "gradient", "query gradient"), tuple(lines))


def _means(study: Study, condition: Condition, names: Sequence[str]) -> dict[str, float]:
    return {name: study.interval(condition, name).mean for name in names}


def _differences_grid(study: Study, task: str) -> Grid:
    lines = []
    for entry in differences(study, task):
        said = {1: "higher", -1: "lower", 0: "no"}[entry.sign] if entry.known else "-"
        tests = p_value(entry.p), p_value(entry.adjusted)
        lines.append((*_sides(entry), limits(entry.interval, "+"), str(entry.seeds), said, *tests))
    title = f"{task}: paired differences of the validation {score_name(task)}, by seed"
    header = ("condition", "against", "difference", "seeds", "interval without 0", "p, paired t", "p, Holm")
    return Grid(title, header, tuple(lines))


def _sides(entry: Difference) -> tuple[str, str]:
    full = f"{unit_name(entry.condition.forgetting)}: {dynamics_name(entry.condition)}"
    other = entry.other
    if entry.kind == "forgetting":
        return full, unit_name(other.forgetting)
    return full, dynamics_name(other)


def findings(study: Study) -> list[str]:
    """What the intervals support, in sentences made from the numbers."""
    said = [_course(study)]
    for task in study.spec.task:
        prefix = f"{task}: " if len(study.spec.task) > 1 else ""
        said += [prefix + sentence for sentence in _task_findings(study, task)]
    return said


def _course(study: Study) -> str:
    done = sum(record is not None and record["failure"] is None for record in study.records)
    failed = len(study.failures())
    return (
        f"Trials: {done} of {len(study.trials)} finished, {failed} failed, {study.missing()} not run; seeds "
        f"{', '.join(map(str, study.spec.seeds))}."
    )


def _task_findings(study: Study, task: str) -> list[str]:
    metric, found = score_name(task), differences(study, task)
    said = _best(study, task)
    groups: dict[tuple[str, str], list[Difference]] = {}
    for entry in found:
        groups.setdefault((entry.kind, _claim(entry)), []).append(entry)
    for (kind, claim), entries in groups.items():
        said.append(_sentence(kind, claim, entries, metric))
    tested = [entry for entry in found if entry.known]
    if tested:
        apart, chance = sum(entry.sign != 0 for entry in tested), 1 - study.spec.confidence
        said.append(
            f"{apart} of {len(tested)} intervals of paired differences are without 0; if no condition differed, "
            f"about {chance * len(tested):.1f} would be by chance (they are not corrected for their number); after "
            f"Holm's correction of the paired t tests {sum(entry.adjusted <= chance for entry in tested)} remain."
        )
    return said + _solves(study, task)


def _best(study: Study, task: str) -> list[str]:
    scored = [(study.interval(c, "score"), c) for c in study.conditions(task)]
    scored = [(interval, c) for interval, c in scored if not math.isnan(interval.mean)]
    if not scored:
        return ["No trial has a score yet."]
    top, best = max(scored, key=lambda pair: pair[0].mean)
    low, worst = min(scored, key=lambda pair: pair[0].mean)
    return [
        f"Mean validation {score_name(task)} from {limits(low)} ({_full(worst)}) to {limits(top)} ({_full(best)})."
    ]


def _full(condition: Condition) -> str:
    return f"{unit_name(condition.forgetting)}, {dynamics_name(condition)}"


def _claim(entry: Difference) -> str:
    """What is compared with what, without what stays the same on both sides."""
    here, there = entry.condition, entry.other
    return {
        "steps": f"{dynamics_name(here)} against {dynamics_name(there)}",
        "forgetting": f"{unit_name(here.forgetting)} against {unit_name(there.forgetting)}",
        "adjoint": f"converged, {here.adjoint} gradient against {there.adjoint}",
        "inject": f"converged, inject {here.inject} against {there.inject}",
    }[entry.kind]


def _place(kind: str, condition: Condition) -> str:
    """What stays the same on both sides."""
    unit = unit_name(condition.forgetting)
    return {
        "steps": unit,
        "forgetting": dynamics_name(condition),
        "adjoint": f"{unit}, {condition.inject}",
        "inject": f"{unit}, {condition.adjoint}",
    }[kind]


def _sentence(kind: str, claim: str, entries: Sequence[Difference], metric: str) -> str:
    parts = []
    for sign, word in ((1, "higher"), (-1, "lower")):
        here = [
            f"{_place(kind, e.condition)} ({limits(e.interval, '+')}, {e.seeds} seeds)"
            for e in entries
            if e.sign == sign
        ]
        if here:
            parts.append(f"{metric} is {word} with {'; '.join(here)}")
    level = [_place(kind, e.condition) for e in entries if e.known and not e.sign]
    equal = [e for e in entries if not e.known and not math.isnan(e.interval.low)]
    same = [f"{_place(kind, e.condition)} ({e.interval.mean:+.3f})" for e in equal]
    unknown = [_place(kind, e.condition) for e in entries if math.isnan(e.interval.low)]
    if level:
        parts.append(f"no difference shown with {'; '.join(level)}")
    if same:
        parts.append(f"the same difference in every seed, and so no interval, with {'; '.join(same)}")
    if unknown:
        parts.append(f"too few seeds for an interval with {'; '.join(unknown)}")
    return f"{claim[0].upper()}{claim[1:]}: {'. '.join(part[0].upper() + part[1:] for part in parts)}."


def _solves(study: Study, task: str) -> list[str]:
    solved = [c for c in study.conditions(task) if c.steps == CONVERGED]
    shares = [
        (float(np.nanmin(v)), c) for c in solved if not np.isnan(v := study.values(c, "converged")).all()
    ]
    if not shares:
        return []
    share, worst = min(shares, key=lambda pair: pair[0])
    bad = sum(
        any(value for value in record["curves"].get("nonfinite", ()))
        for trial, record in zip(study.trials, study.records, strict=True)
        if record is not None and trial.condition.task == task
    )
    # A share is never rounded up.
    least = math.floor(1e4 * share) / 100
    reached = "all" if share == 1 else f"at least {least:.2f} % in every trial (lowest: {_full(worst)})"
    return [
        f"Solves of converged trainings that reached the tolerance, over {epochs_name(study.spec, task)}: {reached}. "
        f"Trials with NaN or inf in a state at any time: {bad}."
    ]
