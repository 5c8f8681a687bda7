"""Run a study: every trial that is not there yet, one record each, then the tables, pictures and report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.sweeps.progress import progress
from hopdeq_lwpf.sweeps.study_records import FORMAT, TRIALS, add_record, measures, read_records
from hopdeq_lwpf.sweeps.study_report import write_results
from hopdeq_lwpf.sweeps.study_results import Study
from hopdeq_lwpf.sweeps.study_spec import TASKS, StudySpec, Trial
from hopdeq_lwpf.sweeps.study_trial import remove_checkpoints
from hopdeq_lwpf.sweeps.study_workers import Job, run_jobs
from hopdeq_lwpf.training.datasets import build_data
from hopdeq_lwpf.training.networks import build_network
from hopdeq_lwpf.training.spec import TrainSpec

LOCK = ".lock"
FOLDERS = "trials"


def run_trials(spec: StudySpec, console: Console | None = None) -> Study:
    """Train what the spec asks for and `spec.out` does not hold yet; progress goes to `console`.

    Trials are known by their settings: what another spec has left in the folder serves too. A trial that was
    interrupted goes on from its last checkpoint, one that failed begins again. Every finished trial is on disk at once,
    so that this may be killed at any time. One study at a time in a folder; run it from a script behind
    `if __name__ == "__main__":`, since the workers are spawned.
    Raises SpecError for settings that make no sense, DataError for a trials.jsonl that cannot be read.
    """
    trials = spec.trials()
    _check_settings(trials)
    out = Path(spec.out)
    if out.exists() and not out.is_dir():
        raise SpecError(f"out {spec.out!r} is a file, needs a folder")
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        records = read_records(out / TRIALS)
        todo = [trial for trial in trials if _unfinished(records.get(trial.hash))]
        if console is not None:
            console.print(_beginning(trials, todo, records), markup=False, highlight=False, soft_wrap=True)
        # Two names of one condition have one hash, and are one training.
        different = {trial.hash: trial for trial in reversed(todo)}
        jobs = [
            Job(key, different[key].settings(), str(out / FOLDERS / different[key].folder))
            for key in dict.fromkeys(trial.hash for trial in todo)
        ]
        with (
            closing(run_jobs(jobs, spec.workers)) as answers,
            progress(len(jobs), "trials", console, every_piece=True) as advance,
        ):
            for job, answer in answers:
                trial = different[job.key]
                last = spec.last_of(trial.condition.task)
                record = _record(trial, answer, last)
                add_record(out / TRIALS, record)
                _tidy(Path(job.folder), record)
                advance(_line(trial, record, last))
        return load(spec)


def run(spec: StudySpec, console: Console | None = None) -> tuple[Study, list[Path]]:
    """`run_trials`, then the report of all trials; returns the study and the paths that were written."""
    study = run_trials(spec, console)
    return study, write_results(study)


def load(spec: StudySpec) -> Study:
    """The trials of a spec with the records that `spec.out` holds; runs nothing."""
    trials = spec.trials()
    records = read_records(Path(spec.out) / TRIALS)
    return Study(spec, trials, tuple(records.get(trial.hash) for trial in trials))


def _unfinished(record: Mapping[str, Any] | None) -> bool:
    return record is None or record["failure"] is not None


def _check_settings(trials: Sequence[Trial]) -> None:
    """Build each network and each data module once: a misspelt option is an error now, not in every trial."""
    seen: set[str] = set()
    for trial in trials:
        for kind in ("model", "data"):
            settings = str(getattr(trial.train, kind))
            if settings not in seen:
                seen.add(settings)
                _build(kind, trial.train)


def _build(kind: str, spec: TrainSpec) -> None:
    try:
        if kind == "model":
            build_network(spec.model)
        else:
            build_data(spec.data, spec.seed)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{kind}: {error}") from error


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds the folder; SpecError where another study holds it. The system lets go when the process ends."""
    try:
        import fcntl
    except ImportError:  # where there is no such lock, nobody is kept out
        yield
        return
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SpecError(
                f"out {str(out)!r}: another study runs there; wait for it or name another folder"
            ) from error
        yield


def _beginning(trials: Sequence[Trial], todo: Sequence[Trial], records: Mapping[str, Any]) -> str:
    failed = sum(trial.hash in records for trial in todo)
    again = f", {failed} of them failed before" if failed else ""
    return f"{len(trials)} trials: {len(trials) - len(todo)} finished before, {len(todo)} to run{again}"


def _record(trial: Trial, answer: Mapping[str, Any], last: int) -> dict[str, Any]:
    """The line of trials.jsonl; what a worker that died did not say is empty."""
    condition = trial.condition
    record = {
        "format": FORMAT,
        "hash": trial.hash,
        "condition": {
            "task": condition.task,
            "forgetting": condition.forgetting,
            "steps": condition.steps,
            "adjoint": condition.adjoint,
            "inject": condition.inject,
        },
        "seed": trial.seed,
        "folder": f"{FOLDERS}/{trial.folder}",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "curves": {},
        "costs": {},
        "warnings": [],
        "versions": {},
        **answer,
        "settings": trial.settings(),
    }
    found = measures(record, last) if record["failure"] is None else {}
    return {**record, "last": last, "measures": found}


def _tidy(folder: Path, record: Mapping[str, Any]) -> None:
    """Without checkpoints, which a trial that ended no longer needs; a worker that died left one to go on from."""
    failure = record["failure"]
    if failure is None or failure["error"] != "WorkerDied":
        remove_checkpoints(folder)


def _line(trial: Trial, record: Mapping[str, Any], last: int) -> str:
    name = f"{trial.condition.name}, seed {trial.seed}"
    if record["failure"] is not None:
        return f"{name}: FAILED, {record['failure']['error']}: {record['failure']['message']}"
    found = measures(record, last)
    metric, score = TASKS[trial.condition.task].score, found["score"]
    said = "unknown" if score is None else f"{score:.4f}"
    return f"{name}: {metric} {said}, {record['run_seconds']:.0f} s"
