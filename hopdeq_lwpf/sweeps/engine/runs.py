"""Runs trials, each once, and keeps a record of every one that has ended. Knows nothing of what they are.

A trial is settings and the task that takes them; whoever asks for trials says what to note of each. There is one
driver: it alone writes trials.jsonl and the Optuna study, in this order, so that a kill between the two is seen and set
right.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.sweeps.engine.database import import_optuna
from hopdeq_lwpf.sweeps.engine.driver import Driver
from hopdeq_lwpf.sweeps.engine.executors import build_executor
from hopdeq_lwpf.sweeps.engine.jobs import DISK
from hopdeq_lwpf.sweeps.engine.lines import repair
from hopdeq_lwpf.sweeps.engine.records import TRIALS, StorageError, is_complete, read_records
from hopdeq_lwpf.sweeps.engine.sources import GridSource, Record, SearchSource, Source, Trial
from hopdeq_lwpf.sweeps.engine.state import Plan, Storage, open_storage
from hopdeq_lwpf.sweeps.engine.storage_url import sqlite_file

LOCK = ".lock"
REFUSED = (*DISK, errno.EACCES, errno.EPERM, errno.EIO)


@dataclass(frozen=True)
class Resources:
    """Where and how trials are run.

    workers: processes of this machine. executor: see `executors.parse_executor`. storage: URL of the database of
    the study, None for study.db in the folder. retries: how often a trial whose worker died is begun again. seconds: no
    trial begins after so many; None: no limit.
    """

    workers: int = 2
    executor: str = "local"
    storage: str | None = None
    retries: int = 3
    seconds: float | None = None


@dataclass(frozen=True)
class Kind:
    """What the engine is told of the trials.

    runner: "module:function" that a worker calls with settings and folder; see `trials.train_trial.run_trial`.
    note: what a record says of its trial beside seed and settings. found: what it says of a trial that succeeded.
    told: the end of the progress line of such a trial. score: the number that the study is told, of trial and record.
    levels: what the study calls the params of a trial of a grid, beside its seed. begin: called when the folder is
    held, before any trial runs.
    """

    runner: str
    note: Callable[[Any], Mapping[str, Any]]
    found: Callable[[Any, Record], Mapping[str, Any]]
    told: Callable[[Any, Record], str]
    score: Callable[[Any, Record], float | None]
    levels: Callable[[Any], Mapping[str, Any]]
    begin: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Search:
    """One search: its plan, and the trial with the settings of a point."""

    plan: Plan
    make: Callable[[Mapping[str, Any]], Trial]


def run_trials(
    trials: Sequence[Trial],
    out: str,
    kind: Kind,
    plan: Plan,
    *,
    resources: Resources = Resources(),  # noqa: B008, it is frozen
    check: Callable[[], None] = lambda: None,
    console: Console | None = None,
) -> list[Record | None]:
    """Run the trials that the folder `out` does not hold yet; the records of all, None where there is none.

    plan: of the study. check: called before anything is written, while the workers get ready; may raise.
    A trial that was interrupted goes on from its last checkpoint, one that failed begins again. Every finished trial is
    on disk at once, so that this may be killed at any time. One driver at a time in a folder; call it from a script
    behind `if __name__ == "__main__":`, since the workers are spawned.
    Raises SpecError where the folder cannot be used, StorageError for a disk or a database that takes no more,
    DataError for a trials.jsonl that cannot be read.
    """

    def sources(storage: Storage, records: Mapping[str, Record]) -> list[Source]:
        return [GridSource(trials, records, storage.study(plan), kind.levels, kind.score)]

    records = _records(out)
    missing = {trial.hash for trial in trials if not is_complete(records.get(trial.hash))}
    _drive(out, kind, sources, len(missing), resources, check, console, _beginning(trials))
    return load_records(trials, out)


def run_searches(
    searches: Sequence[Search],
    out: str,
    kind: Kind,
    *,
    resources: Resources = Resources(),  # noqa: B008, it is frozen
    check: Callable[[], None] = lambda: None,
    console: Console | None = None,
) -> None:
    """Run every search until it has as many trials as its plan says; in turns, where there are several.

    Arguments, what a kill does and what is raised: as in `run_trials`.
    """

    def sources(storage: Storage, records: Mapping[str, Record]) -> list[Source]:
        return [SearchSource(search.plan, storage, records, search.make, kind.score) for search in searches]

    def beginning(records: Mapping[str, Record], left: int) -> str:
        asked = sum(search.plan.search.trials for search in searches if search.plan.search is not None)
        return f"{asked} trials of {len(searches)} searches: {asked - left} finished before, {left} to run"

    most = resources.workers
    _drive(out, kind, sources, most, resources, check, console, beginning)


def load_records(trials: Sequence[Trial], out: str) -> list[Record | None]:
    """The records that the folder holds of the trials, which a search has not pruned; runs nothing."""
    records = read_records(Path(out) / TRIALS)
    found = [records.get(trial.hash) for trial in trials]
    return [None if record is not None and record.get("pruned") is not None else record for record in found]


def _records(out: str) -> dict[str, Record]:
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"out {out!r} is a file, needs a folder")
    return read_records(folder / TRIALS)


def _beginning(trials: Sequence[Trial]) -> Callable[[Mapping[str, Record], int], str]:
    def beginning(records: Mapping[str, Record], left: int) -> str:
        todo = [trial for trial in trials if not is_complete(records.get(trial.hash))]
        failed = sum(records[t.hash]["failure"] is not None for t in todo if t.hash in records)
        again = f", {failed} of them failed before" if failed else ""
        return f"{len(trials)} trials: {len(trials) - len(todo)} finished before, {len(todo)} to run{again}"

    return beginning


def _drive(
    out: str,
    kind: Kind,
    sources: Callable[[Storage, Mapping[str, Record]], list[Source]],
    most: int,
    resources: Resources,
    check: Callable[[], None],
    console: Console | None,
    beginning: Callable[[Mapping[str, Record], int], str],
) -> None:
    import_optuna()
    folder = Path(out)
    _records(out)  # what cannot be read is said before anything is started
    executor = build_executor(
        resources.executor, resources.workers, retries=resources.retries, preload=kind.runner
    )
    try:
        executor.start(most)
        check()
        with (
            _said(folder),
            _alone(folder, resources.storage),
            open_storage(folder, resources.storage) as storage,
        ):
            records = _records(out)
            repair(folder / TRIALS)
            kind.begin()
            found = sources(storage, records)
            if console is not None:
                line = beginning(records, sum(source.left for source in found))
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            driver = Driver(
                folder=folder,
                kind=kind,
                sources=found,
                executor=executor,
                records=records,
                retries=0 if executor.retries else resources.retries,
                seconds=resources.seconds,
            )
            driver.run(console)
    finally:
        executor.close()


@contextmanager
def _said(folder: Path) -> Iterator[None]:
    """What the disk refuses in the block, as a StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise StorageError(
            f"{folder}: {error}; all that has ended is kept there. Set it right and start the same command again"
        ) from error


@contextmanager
def _alone(out: Path, storage: str | None) -> Iterator[None]:
    """Holds the folder, which is made, and an SQLite file that is elsewhere; SpecError where another study does."""
    with _held(out / LOCK, f"out {str(out)!r}: another study runs there; wait for it or name another folder"):
        file = sqlite_file(storage)
        if file is None:
            yield
            return
        said = f"storage {str(file)!r}: another study writes it; wait for it, or use PostgreSQL, which takes several"
        with _held(file.with_name(file.name + LOCK), said):
            yield


@contextmanager
def _held(path: Path, said: str) -> Iterator[None]:
    """Holds a lock on a file, which the system lets go when the process ends; SpecError `said` where it is held."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise StorageError(
            f"{path.parent}: cannot be written ({error.strerror}); name another folder, nothing was changed"
        ) from error
    with file:
        try:
            import fcntl
        except ImportError:  # where there is no such lock, nobody is kept out
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise SpecError(said) from error
            raise StorageError(f"{path}: cannot be locked ({error.strerror}); name another folder") from error
        yield
