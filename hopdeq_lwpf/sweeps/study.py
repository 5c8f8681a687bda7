"""Run a study: every trial that is not there yet, one record each, then the tables, pictures and report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.sweeps.engine import runs
from hopdeq_lwpf.sweeps.engine.records import measures
from hopdeq_lwpf.sweeps.engine.search import MAXIMIZE
from hopdeq_lwpf.sweeps.engine.state import Plan
from hopdeq_lwpf.sweeps.reports.settings_file import leave_settings
from hopdeq_lwpf.sweeps.reports.study_report import write_results
from hopdeq_lwpf.sweeps.reports.study_results import Study
from hopdeq_lwpf.sweeps.study_spec import TASKS, StudySpec, Trial
from hopdeq_lwpf.training.datasets import build_data
from hopdeq_lwpf.training.networks import build_network
from hopdeq_lwpf.training.spec import TrainSpec

RUNNER = "hopdeq_lwpf.sweeps.trials.train_trial:run_trial"


def run_trials(spec: StudySpec, console: Console | None = None) -> Study:
    """Train what the spec asks for and `spec.out` does not hold yet; progress goes to `console`.

    Trials are known by their settings: what another spec has left in the folder serves too. May be killed at any time
    and started again: see `runs.run_trials`, also for what is raised beside
    SpecError for settings that make no sense.
    """
    trials = spec.trials()

    def found(trial: Trial, record: runs.Record) -> dict[str, Any]:
        last = spec.last_of(trial.condition.task)
        return {"last": last, "measures": measures(record, last, TASKS[trial.condition.task].score)}

    def score(trial: Trial, record: runs.Record) -> float | None:
        task = trial.condition.task
        return measures(record, spec.last_of(task), TASKS[task].score)["score"]

    runs.run_trials(
        trials,
        spec.out,
        runs.Kind(RUNNER, _note, found, _told, score, _levels, lambda: leave_settings(spec)),
        _plan(spec),
        resources=runs.Resources(spec.workers),
        check=lambda: check_settings([trial.train for trial in trials]),
        console=console,
    )
    return load(spec)


def run(spec: StudySpec, console: Console | None = None) -> tuple[Study, list[Path]]:
    """`run_trials`, then the report of all trials; returns the study and the paths that were written."""
    study = run_trials(spec, console)
    return study, write_results(study)


def load(spec: StudySpec) -> Study:
    """The trials of a spec with the records that `spec.out` holds; runs nothing."""
    trials = spec.trials()
    return Study(spec, trials, tuple(runs.load_records(trials, spec.out)))


def check_settings(trainings: Sequence[TrainSpec]) -> None:
    """Build each network and each data module once: a misspelt option is an error now, not in every trial."""
    seen: set[str] = set()
    for training in trainings:
        for kind in ("model", "data"):
            settings = str(getattr(training, kind))
            if settings not in seen:
                seen.add(settings)
                _build(kind, training)


def _build(kind: str, spec: TrainSpec) -> None:
    try:
        if kind == "model":
            build_network(spec.model)
        else:
            build_data(spec.data, spec.seed)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{kind}: {error}") from error


def _note(trial: Trial) -> dict[str, Any]:
    return {"condition": dataclasses.asdict(trial.condition)}


def _levels(trial: Trial) -> dict[str, str]:
    return {name: str(level) for name, level in dataclasses.asdict(trial.condition).items()}


def _plan(spec: StudySpec) -> Plan:
    """Of the Optuna study: every level of every part of a condition; all tasks have scores of which more is better."""
    conditions = [dataclasses.asdict(condition) for condition in spec.conditions()]
    factors = {name: tuple(dict.fromkeys(str(c[name]) for c in conditions)) for name in conditions[0]}
    return Plan("score", MAXIMIZE, factors)


def _told(trial: Trial, record: runs.Record) -> str:
    score = record["measures"]["score"]
    said = "unknown" if score is None else f"{score:.4f}"
    return f"{TASKS[trial.condition.task].score} {said}"
