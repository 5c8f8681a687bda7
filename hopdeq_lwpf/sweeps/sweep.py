"""Run a sweep: every cell with every seed that is not there yet, one record each, then table, pictures, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from hopdeq_lwpf._checks import SpecError, did_you_mean
from hopdeq_lwpf.sweeps import engine, sdm_spec
from hopdeq_lwpf.sweeps.study import check_settings
from hopdeq_lwpf.sweeps.study_records import COSTS, MONITORS, SCORES, measures
from hopdeq_lwpf.sweeps.sweep_report import write_results
from hopdeq_lwpf.sweeps.sweep_results import Sweep
from hopdeq_lwpf.sweeps.sweep_spec import TASKS, SweepSpec, SweepTrial

TRAINED = tuple(f"{stage}/{name}" for stage in ("val", "train") for name in SCORES)
MEASURES = {"train": (*TRAINED, *MONITORS, *COSTS), "sdm": sdm_spec.MEASURES}


def run_trials(spec: SweepSpec, console: Console | None = None) -> Sweep:
    """Run what the sweep asks for and `spec.out` does not hold yet; progress goes to `console`.

    Trials are known by their settings; may be killed at any time and started again: see `engine.run_trials`, also for
    what is raised beside SpecError for settings that make no sense.
    """
    trials = spec.trials()
    known = MEASURES[spec.task]
    for name in spec.measures:
        if name not in known:
            raise SpecError(f"measures: {name!r} is not one of {list(known)}{did_you_mean(name, known)}")
    if spec.task == "train":
        check_settings([trial.given for trial in trials])
    else:
        _check_measured(spec)
    score = spec.measures[0]

    def found(trial: SweepTrial, record: engine.Record) -> dict[str, Any]:
        return {"last": spec.last, "measures": measures(record, spec.last, score)}

    def told(trial: SweepTrial, record: engine.Record) -> str:
        value = record["measures"].get(score)
        return f"{score} " + ("unknown" if value is None else f"{value:.4f}")

    engine.run_trials(
        trials,
        spec.out,
        workers=spec.workers,
        runner=TASKS[spec.task].runner,
        note=_note,
        found=found,
        told=told,
        console=console,
    )
    return load(spec)


def run(spec: SweepSpec, console: Console | None = None) -> tuple[Sweep, list[Path]]:
    """`run_trials`, then the report of all trials; returns the sweep and the paths that were written."""
    sweep = run_trials(spec, console)
    return sweep, write_results(sweep)


def load(spec: SweepSpec) -> Sweep:
    """The trials of a sweep with the records that `spec.out` holds; runs nothing."""
    trials = spec.trials()
    return Sweep(spec, trials, tuple(engine.load_records(trials, spec.out)))


def _note(trial: SweepTrial) -> dict[str, Any]:
    return {"cell": dict(trial.cell.levels)}


def _check_measured(spec: SweepSpec) -> None:
    """SpecError for a measure that no trial makes."""
    experiments = {trial.given.experiment for trial in spec.trials()}
    made = {"seconds", *(name for each in experiments for name in sdm_spec.EXPERIMENTS[each])}
    for name in spec.measures:
        if name not in made:
            raise SpecError(f"measures: {name!r} is not made by experiment {', '.join(sorted(experiments))}")
