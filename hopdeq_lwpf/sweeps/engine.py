"""Runs trials, each once, and keeps a record of every one that has ended. Knows nothing of what they are.

A trial is settings and the task that takes them; whoever asks for trials says what to note of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.sweeps.progress import progress
from hopdeq_lwpf.sweeps.study_records import FORMAT, TRIALS, add_record, read_records
from hopdeq_lwpf.sweeps.study_trial import remove_checkpoints
from hopdeq_lwpf.sweeps.study_workers import Job, run_jobs

LOCK = ".lock"
FOLDERS = "trials"

Record = dict[str, Any]


class Trial(Protocol):
    """One cell of a study with one seed."""

    @property
    def name(self) -> str:
        """Of the cell, for people."""

    @property
    def seed(self) -> int: ...

    @property
    def hash(self) -> str:
        """Equal for trials that give the same numbers."""

    @property
    def folder(self) -> str:
        """Name of the folder of its files."""

    def settings(self) -> dict[str, Any]:
        """What the worker is told."""


def run_trials(
    trials: Sequence[Trial],
    out: str,
    *,
    workers: int,
    runner: str,
    note: Callable[[Any], Mapping[str, Any]],
    found: Callable[[Any, Record], Mapping[str, Any]],
    told: Callable[[Any, Record], str],
    console: Console | None = None,
) -> list[Record | None]:
    """Run the trials that the folder `out` does not hold yet; the records of all, None where there is none.

    runner: "module:function" that a worker calls with settings and folder; see `study_trial.run_trial`.
    note: what a record says of its trial beside seed and settings. found: what it says of a trial that succeeded.
    told: the end of the progress line of such a trial.
    A trial that was interrupted goes on from its last checkpoint, one that failed begins again. Every finished trial is
    on disk at once, so that this may be killed at any time. One driver at a time in a folder; call it from a script
    behind `if __name__ == "__main__":`, since the workers are spawned.
    Raises SpecError where the folder cannot be used, DataError for a trials.jsonl that cannot be read.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"out {out!r} is a file, needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        records = read_records(folder / TRIALS)
        todo = [trial for trial in trials if _unfinished(records.get(trial.hash))]
        if console is not None:
            console.print(_beginning(trials, todo, records), markup=False, highlight=False, soft_wrap=True)
        # Two names of one cell have one hash, and are one trial.
        different = {trial.hash: trial for trial in reversed(todo)}
        jobs = [
            Job(key, different[key].settings(), str(folder / FOLDERS / different[key].folder), runner)
            for key in dict.fromkeys(trial.hash for trial in todo)
        ]
        with (
            closing(run_jobs(jobs, workers)) as answers,
            progress(len(jobs), "trials", console, every_piece=True) as advance,
        ):
            for job, answer in answers:
                trial = different[job.key]
                record = _record(trial, note(trial), answer)
                if record["failure"] is None:
                    record.update(found(trial, record))
                add_record(folder / TRIALS, record)
                _tidy(Path(job.folder), record)
                advance(_line(trial, record, told))
    return load_records(trials, out)


def load_records(trials: Sequence[Trial], out: str) -> list[Record | None]:
    """The records that the folder holds of the trials; runs nothing."""
    records = read_records(Path(out) / TRIALS)
    return [records.get(trial.hash) for trial in trials]


def _unfinished(record: Mapping[str, Any] | None) -> bool:
    return record is None or record["failure"] is not None


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


def _record(trial: Trial, noted: Mapping[str, Any], answer: Mapping[str, Any]) -> Record:
    """The line of trials.jsonl; what a worker that died did not say is empty."""
    return {
        "format": FORMAT,
        "hash": trial.hash,
        **noted,
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


def _tidy(folder: Path, record: Mapping[str, Any]) -> None:
    """Without checkpoints, which a trial that ended no longer needs; a worker that died left one to go on from."""
    failure = record["failure"]
    if failure is None or failure["error"] != "WorkerDied":
        remove_checkpoints(folder)


def _line(trial: Trial, record: Record, told: Callable[[Any, Record], str]) -> str:
    name = f"{trial.name}, seed {trial.seed}"
    if record["failure"] is not None:
        return f"{name}: FAILED, {record['failure']['error']}: {record['failure']['message']}"
    return f"{name}: {told(trial, record)}, {record['run_seconds']:.0f} s"
