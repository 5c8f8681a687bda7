"""Run a sweep: every cell with every seed that is not there yet, one record each, then table, pictures, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from hopdeq_lwpf._checks import SpecError, did_you_mean
from hopdeq_lwpf.sweeps.engine import runs
from hopdeq_lwpf.sweeps.engine.records import (
    COSTS,
    MONITORS,
    SCORES,
    TRIALS,
    measures,
    point_of,
    read_records,
)
from hopdeq_lwpf.sweeps.engine.search import SearchSpec, direction_of
from hopdeq_lwpf.sweeps.engine.state import Plan
from hopdeq_lwpf.sweeps.reports.settings_file import leave_settings
from hopdeq_lwpf.sweeps.reports.sweep_results import Sweep
from hopdeq_lwpf.sweeps.study_spec import settings_hash
from hopdeq_lwpf.sweeps.sweep_spec import POINT, TASKS, Cell, SweepSpec, SweepTrial
from hopdeq_lwpf.sweeps.trials import graph_spec, sdm_spec

TRAINED = tuple(f"{stage}/{name}" for stage in ("val", "train") for name in SCORES)
MEASURES = {"train": (*TRAINED, *MONITORS, *COSTS), "sdm": sdm_spec.MEASURES, "graph": graph_spec.MEASURES}
HOUR = 3600


def run_trials(spec: SweepSpec, console: Console | None = None) -> Sweep:
    """Run what the sweep asks for and `spec.out` does not hold yet; progress goes to `console`.

    Trials are known by their settings; may be killed at any time and started again: see `runs.run_trials`, also for
    what is raised beside SpecError for settings that make no sense.
    """
    search, trials = spec.sought(), () if spec.search else spec.trials()
    known = MEASURES[spec.task]
    for name in spec.measures:
        if name not in known:
            raise SpecError(f"measures: {name!r} is not one of {list(known)}{did_you_mean(name, known)}")
    if search is not None and search.pruner != "none" and spec.measures[0] not in TRAINED:
        raise SpecError(
            f"search.pruner {search.pruner!r} needs a score that is known after each epoch, one of {list(TRAINED)} as "
            f"the first of measures, got {spec.measures[0]!r}"
        )
    resources = runs.Resources(
        spec.workers,
        spec.executor,
        spec.storage,
        spec.retries,
        None if spec.budget is None else spec.budget * HOUR,
    )
    kind = _kind(spec)
    if search is None:
        plan = _plan(spec)
        runs.run_trials(
            trials,
            spec.out,
            kind,
            plan,
            resources=resources,
            check=lambda: _check(spec, trials),
            console=console,
        )
    else:
        searches = [_search(spec, search, cell) for cell in spec.cells()]
        seed = spec.seeds[0]
        ends = [spec.trial(cell, seed, corner) for cell in spec.cells() for corner in search.corners()]
        runs.run_searches(
            searches, spec.out, kind, resources=resources, check=lambda: _check(spec, ends), console=console
        )
    return load(spec)


def run(spec: SweepSpec, console: Console | None = None) -> tuple[Sweep, list[Path]]:
    """`run_trials`, then the report of all trials; returns the sweep and the paths that were written."""
    from hopdeq_lwpf.sweeps.reports.sweep_report import write_results

    sweep = run_trials(spec, console)
    return sweep, write_results(sweep)


def load(spec: SweepSpec) -> Sweep:
    """The trials of a sweep with the records that `spec.out` holds; runs nothing.

    Of a search: its trials but those that it stopped early, as a grid with the factor "point", the best first.
    """
    if spec.sought() is None:
        trials = spec.trials()
        return Sweep(spec, trials, tuple(runs.load_records(trials, spec.out)))
    found, stopped = found_points(spec), sum(_stopped(record) for _, _, record in search_records(spec))
    trials = found.trials()
    return Sweep(found, trials, tuple(runs.load_records(trials, spec.out)), stopped)


def search_records(spec: SweepSpec) -> list[tuple[Cell, Mapping[str, Any], runs.Record]]:
    """The records of all points of a search, also of those that failed or were stopped: (cell, params, record)."""
    search = spec.sought()
    assert search is not None
    names = [(_plan(spec, search, cell).name(), cell) for cell in spec.cells()]
    return [
        (cell, params, record)
        for record in read_records(Path(spec.out) / TRIALS).values()
        for name, cell in names
        if (params := point_of(record, name)) is not None
    ]


def _stopped(record: runs.Record) -> bool:
    return record["failure"] is None and record.get("pruned") is not None


def found_points(spec: SweepSpec) -> SweepSpec:
    """The grid of the points that a search has not stopped early, the best first, at the end those that failed.

    Without any, the cells alone.
    """
    search = spec.sought()
    assert search is not None
    better = -1 if _direction(spec, search) == "maximize" else 1
    tried: list[tuple[float, str, Cell, dict[str, Any]]] = []
    for cell, params, record in search_records(spec):
        if not _stopped(record):
            score = measures(record, spec.last, spec.measures[0])["score"]
            place = float("inf") if score is None or record["failure"] is not None else better * score
            tried.append((place, record["hash"], cell, search.settings(params)))
    plain = replace(spec, search={})
    if not tried:
        return plain
    levels: dict[str, dict[str, Any]] = {}
    only = []
    for _, key, cell, point in sorted(tried, key=lambda entry: entry[:2]):
        name = spec.trial(cell, spec.seeds[0], point).cell.level(POINT)
        if levels.get(name, point) != point:  # another that is the same to four digits
            name = f"{name} ({key[:4]})"
        levels[name] = point
        only.append({**dict(cell.levels), POINT: name})
    return replace(plain, grid={**spec.grid, POINT: levels}, only=only)


def _kind(spec: SweepSpec) -> runs.Kind:
    score = spec.measures[0]

    def found(trial: SweepTrial, record: runs.Record) -> dict[str, Any]:
        return {"last": spec.last, "measures": measures(record, spec.last, score)}

    def told(trial: SweepTrial, record: runs.Record) -> str:
        value = measures(record, spec.last, score).get(score)
        return f"{score} " + ("unknown" if value is None else f"{value:.4f}")

    def number(trial: SweepTrial, record: runs.Record) -> float | None:
        return measures(record, spec.last, score)["score"]

    def note(trial: SweepTrial) -> dict[str, Any]:
        return {"cell": dict(trial.cell.levels)}

    def levels(trial: SweepTrial) -> Mapping[str, Any]:
        return dict(trial.cell.levels)

    def begin() -> object:
        return leave_settings(spec)

    return runs.Kind(TASKS[spec.task].runner, note, found, told, number, levels, begin)


def _plan(spec: SweepSpec, search: SearchSpec | None = None, cell: Cell | None = None) -> Plan:
    """Of the Optuna study of the grid, or of the search of one cell."""
    score, direction = spec.measures[0], _direction(spec, search)
    if search is None or cell is None:
        factors = {name: tuple(level.name for level in levels) for name, levels in spec.factors().items()}
        return Plan(score, direction, factors)
    # The settings that all points share: of another base, the scores are not comparable.
    shared = spec.trial(cell, spec.seeds[0], search.corners()[0])
    about = {"cell": dict(cell.levels), "settings": settings_hash(shared.settings()), "last": spec.last}
    return Plan(score, direction, search=search, about=about)


def _search(spec: SweepSpec, search: SearchSpec, cell: Cell) -> runs.Search:
    return runs.Search(_plan(spec, search, cell), lambda point: spec.trial(cell, spec.seeds[0], point))


def _direction(spec: SweepSpec, search: SearchSpec | None) -> str:
    if search is not None and search.direction is not None:
        return search.direction
    return direction_of(spec.measures[0])


def _check(spec: SweepSpec, trials: tuple[SweepTrial, ...] | list[SweepTrial]) -> None:
    """SpecError for settings that a trial would trip over."""
    if spec.task == "train":
        from hopdeq_lwpf.sweeps.study import check_settings

        check_settings([trial.given for trial in trials])
    elif spec.task == "sdm":
        _check_measured(spec, trials)


def _check_measured(spec: SweepSpec, trials: tuple[SweepTrial, ...] | list[SweepTrial]) -> None:
    """SpecError for a measure that no trial makes."""
    experiments = {trial.given.experiment for trial in trials}
    made = {"seconds", *(name for each in experiments for name in sdm_spec.EXPERIMENTS[each])}
    for name in spec.measures:
        if name not in made:
            raise SpecError(f"measures: {name!r} is not made by experiment {', '.join(sorted(experiments))}")
