"""Run a study: every trial that is not there yet, one record each, then the tables, pictures and report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.sweeps import engine
from hopdeq_lwpf.sweeps.study_records import measures
from hopdeq_lwpf.sweeps.study_report import write_results
from hopdeq_lwpf.sweeps.study_results import Study
from hopdeq_lwpf.sweeps.study_spec import TASKS, StudySpec, Trial
from hopdeq_lwpf.training.datasets import build_data
from hopdeq_lwpf.training.networks import build_network
from hopdeq_lwpf.training.spec import TrainSpec

RUNNER = "hopdeq_lwpf.sweeps.study_trial:run_trial"


def run_trials(spec: StudySpec, console: Console | None = None) -> Study:
    """Train what the spec asks for and `spec.out` does not hold yet; progress goes to `console`.

    Trials are known by their settings: what another spec has left in the folder serves too. May be killed at any time
    and started again: see `engine.run_trials`, also for what is raised beside
    SpecError for settings that make no sense.
    """
    trials = spec.trials()
    check_settings([trial.train for trial in trials])

    def found(trial: Trial, record: engine.Record) -> dict[str, Any]:
        last = spec.last_of(trial.condition.task)
        return {"last": last, "measures": measures(record, last, TASKS[trial.condition.task].score)}

    engine.run_trials(
        trials,
        spec.out,
        workers=spec.workers,
        runner=RUNNER,
        note=_note,
        found=found,
        told=_score,
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
    return Study(spec, trials, tuple(engine.load_records(trials, spec.out)))


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
    condition = trial.condition
    return {
        "condition": {
            "task": condition.task,
            "forgetting": condition.forgetting,
            "steps": condition.steps,
            "adjoint": condition.adjoint,
            "inject": condition.inject,
        }
    }


def _score(trial: Trial, record: engine.Record) -> str:
    score = record["measures"]["score"]
    said = "unknown" if score is None else f"{score:.4f}"
    return f"{TASKS[trial.condition.task].score} {said}"
