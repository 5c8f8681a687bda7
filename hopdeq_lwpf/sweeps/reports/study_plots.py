"""Pictures of a study, from its numbers alone; each returns a `matplotlib.figure.Figure`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from hopdeq_lwpf.plots import REFERENCE_GREY, UNIT_NAMES, WIDTH, style, unit_colour
from hopdeq_lwpf.sweeps.reports.statistics import t_interval
from hopdeq_lwpf.sweeps.reports.study_results import Study, dynamics_name, epochs_name, score_name
from hopdeq_lwpf.sweeps.study_spec import TASKS, Condition

Curves = NDArray[np.float64]  # (seeds, epochs)

# Of the dynamics, in order: shape in the scatter, colour and dashes of the curves. Okabe and Ito's palette.
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "*")
LINES: tuple[tuple[str, Any], ...] = (
    ("#000000", "-"),
    ("#E69F00", "-"),
    ("#0072B2", "-"),
    ("#56B4E9", "--"),
    ("#D55E00", "-"),
    ("#CC79A7", "--"),
    ("#009E73", "-"),
    ("#F0E442", "--"),
)
COLUMNS = 3  # panels side by side that are still readable at the width of a page


def draw(study: Study) -> dict[str, tuple[str, Figure]]:
    """Every picture that there are numbers for: (caption, figure) by name."""
    figures: dict[str, tuple[str, Figure]] = {}
    share = (
        f"{100 * study.spec.confidence:g} % interval of the mean over seeds (cut where it leaves the picture)"
    )
    for task in study.spec.task:
        scored = [c for c in study.conditions(task) if not np.isnan(study.values(c, "score")).all()]
        if not scored:
            continue
        metric = score_name(task)
        figures[f"score-{task}"] = (
            f"{task}: validation {metric}, mean over {epochs_name(study.spec, task)}. Small dots: seeds; large "
            f"ones: their mean, with the {share}.",
            score_figure(study, task, scored),
        )
        if any(not np.isnan(study.values(c, "epoch_cpu_seconds")).all() for c in scored):
            figures[f"cost-{task}"] = (
                f"{task}: validation {metric} against CPU seconds of training an epoch (median over epochs, mean over "
                "seeds).",
                cost_figure(study, task, scored),
            )
        figures[f"curves-{task}"] = (
            f"{task}: validation {metric} while training: mean over seeds, and their range.",
            curves_figure(study, task, scored),
        )
    return figures


def _dynamics(conditions: Sequence[Condition]) -> list[str]:
    return list(dict.fromkeys(dynamics_name(condition) for condition in conditions))


def _units(conditions: Sequence[Condition]) -> list[str]:
    return list(dict.fromkeys(condition.forgetting for condition in conditions))


def _unit_handles(units: Sequence[str]) -> list[Line2D]:
    return [
        Line2D([], [], color=unit_colour(u, units), marker="o", ms=5, lw=1.6, label=UNIT_NAMES.get(u, u))
        for u in units
    ]


def _score_limits(study: Study, conditions: Sequence[Condition]) -> tuple[float, float]:
    """Of an axis of scores: holds every seed, and intervals as far as they are not several times as wide.

    The interval of two seeds is 13 times as wide as what they differ by; it would make all else a dot.
    """
    values = np.concatenate([study.values(condition, "score") for condition in conditions])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room = max(high - low, 0.01)
    found = [study.interval(condition, "score") for condition in conditions]
    ends = [end for each in found if not math.isnan(each.low) for end in (each.low, each.high)]
    low, high = max(min([low, *ends]), low - room / 2), min(max([high, *ends]), high + room / 2)
    return low - 0.06 * room, high + 0.06 * room


def score_figure(study: Study, task: str, conditions: Sequence[Condition]) -> Figure:
    """Score by condition: one line a dynamics, units beside each other by colour."""
    units, dynamics = _units(conditions), _dynamics(conditions)
    with style():
        height = 1.0 + len(dynamics) * (0.16 + 0.15 * len(units))
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        for condition in conditions:
            place = dynamics.index(dynamics_name(condition))
            shift = 0.72 * ((units.index(condition.forgetting) + 0.5) / len(units) - 0.5) - 0.06
            colour = unit_colour(condition.forgetting, units)
            values = study.values(condition, "score")
            values = values[~np.isnan(values)]
            # Below the interval, which would hide them.
            below = place + shift + 0.25 / len(units)
            axes.plot(values, np.full(len(values), below), "o", color=colour, alpha=0.55, ms=3, mew=0)
            found = t_interval(values, study.spec.confidence)
            if not math.isnan(found.low):
                axes.plot([found.low, found.high], [place + shift] * 2, color=colour, lw=1.4)
            axes.plot(found.mean, place + shift, "o", color=colour, ms=5, mec="white", mew=0.6)
        axes.set_xlim(*_score_limits(study, conditions))
        for edge in np.arange(len(dynamics) - 1) + 0.5:
            axes.axhline(edge, color="#cccccc", lw=0.6)
        axes.set_yticks(range(len(dynamics)), dynamics)
        axes.set_ylim(len(dynamics) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"validation {score_name(task)}")
        figure.legend(handles=_unit_handles(units), loc="outside lower center", ncols=len(units))
        return figure


def cost_figure(study: Study, task: str, conditions: Sequence[Condition]) -> Figure:
    """Score against the CPU seconds of an epoch: colour a unit, shape a dynamics."""
    units, dynamics = _units(conditions), _dynamics(conditions)
    with style():
        figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
        axes = figure.subplots()
        spots = []
        for condition in conditions:
            colour = unit_colour(condition.forgetting, units)
            score = study.interval(condition, "score").mean
            seconds = study.interval(condition, "epoch_cpu_seconds").mean
            spots.append(seconds)
            marker = MARKERS[dynamics.index(dynamics_name(condition)) % len(MARKERS)]
            axes.plot(seconds, score, marker, color=colour, ms=6, mec="white", mew=0.6)
        _seconds_axis(axes, [spot for spot in spots if spot > 0])
        axes.set_xlabel("CPU seconds of training an epoch")
        axes.set_ylabel(f"validation {score_name(task)}")
        shapes = [
            Line2D([], [], ls="", marker=MARKERS[i % len(MARKERS)], color=REFERENCE_GREY, ms=6, label=name)
            for i, name in enumerate(dynamics)
        ]
        # A legend fills column by column: the units make the first one, the shapes the others.
        rows = max(len(units), -(-len(shapes) // (COLUMNS - 1)))
        blank = [Line2D([], [], ls="", label=" ")] * (rows - len(units))
        columns = 1 + -(-len(shapes) // rows)
        figure.legend(
            handles=[*_unit_handles(units), *blank, *shapes], loc="outside lower center", ncols=columns
        )
        return figure


def _seconds_axis(axes: Any, seconds: Sequence[float]) -> None:
    """From 0 where all costs are alike; logarithmic, with numbers that are read as they stand, where not."""
    if not seconds:
        return
    if max(seconds) < 8 * min(seconds):
        axes.set_xlim(0, 1.08 * max(seconds))
        return
    axes.set_xscale("log")
    axes.set_xlim(min(seconds) / 1.3, max(seconds) * 1.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def curves_figure(study: Study, task: str, conditions: Sequence[Condition]) -> Figure:
    """Validation score by epoch: one panel a unit, one line a dynamics, with the range of the seeds."""
    units, dynamics = _units(conditions), _dynamics(conditions)
    with style():
        columns = min(len(units), COLUMNS)
        rows = -(-len(units) // columns)
        figure = Figure(figsize=(WIDTH, 1.0 + 2.3 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, unit in zip(panels.flat, units, strict=False):
            axes.set_title(UNIT_NAMES.get(unit, unit))
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            for condition in conditions:
                if condition.forgetting == unit:
                    _draw_curve(axes, study, condition, dynamics.index(dynamics_name(condition)))
        for axes in panels.flat[len(units) :]:
            axes.set_visible(False)
        for axes in panels[:, 0]:
            axes.set_ylabel(f"validation {score_name(task)}")
        handles = [
            Line2D([], [], color=LINES[i % len(LINES)][0], ls=LINES[i % len(LINES)][1], label=name)
            for i, name in enumerate(dynamics)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=COLUMNS)
        return figure


def _draw_curve(axes: Any, study: Study, condition: Condition, which: int) -> None:
    colour, dashes = LINES[which % len(LINES)]
    curves = curves_of(study, condition)
    known = ~np.isnan(curves).all(0)
    epochs, curves = np.arange(1, curves.shape[1] + 1)[known], curves[:, known]
    axes.plot(
        epochs,
        np.nanmean(curves, 0),
        color=colour,
        ls=dashes,
        lw=1.1,
        marker="." if len(epochs) == 1 else None,
    )
    axes.fill_between(epochs, np.nanmin(curves, 0), np.nanmax(curves, 0), color=colour, alpha=0.13, lw=0)


def curves_of(study: Study, condition: Condition) -> Curves:
    """(seeds, epochs) validation scores of the trials that finished; NaN where one is not known."""
    metric = TASKS[condition.task].score
    courses = [
        record["curves"].get(metric, [])
        for trial, record in zip(study.trials, study.records, strict=True)
        if trial.condition == condition and record is not None and record["failure"] is None
    ]
    found = np.full((len(courses), max(map(len, courses), default=0)), np.nan)
    for line, course in zip(found, courses, strict=True):
        line[: len(course)] = [math.nan if value is None else value for value in course]
    return found
