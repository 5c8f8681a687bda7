"""The one process that hands out trials and writes down what became of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.sweeps.engine.epoch_reports import PAUSE, Listener, remove_reports
from hopdeq_lwpf.sweeps.engine.executors import Executor
from hopdeq_lwpf.sweeps.engine.jobs import DIED, Answer, Job
from hopdeq_lwpf.sweeps.engine.progress import Advance, progress
from hopdeq_lwpf.sweeps.engine.records import (
    FORMAT,
    TRIALS,
    StorageError,
    add_record,
    is_complete,
    remove_checkpoints,
)
from hopdeq_lwpf.sweeps.engine.sources import Claim, Record, SearchSource, Source, Trial

if TYPE_CHECKING:
    from hopdeq_lwpf.sweeps.engine.runs import Kind

FOLDERS = "trials"


class Driver:
    """Runs the trials of the sources until there are no more, or the time is up.

    records: what the folder holds, by hash. retries: of a trial whose worker died. seconds: no trial begins later.
    """

    def __init__(
        self,
        *,
        folder: Path,
        kind: Kind,
        sources: Sequence[Source],
        executor: Executor,
        records: dict[str, Record],
        retries: int,
        seconds: float | None,
    ) -> None:
        self._folder, self._kind, self._executor = folder, kind, executor
        self._sources, self._records, self._retries = list(sources), records, retries
        self._end = None if seconds is None else time.monotonic() + seconds
        self._busy: dict[str, Claim] = {}
        self._again: list[Claim] = []
        self._same: dict[str, list[Claim]] = {}  # points of a search that are being run already
        self._listeners: dict[str, Listener] = {}
        self._advance: Advance = lambda _: None
        self._console: Console | None = None

    def run(self, console: Console | None = None) -> None:
        """Run them; progress goes to `console`."""
        self._console = console
        total = sum(source.left for source in self._sources)
        (self._folder / FOLDERS).mkdir(exist_ok=True)
        with progress(total, "trials", console, every_piece=True) as self._advance:
            while True:
                self._fill()
                if not self._busy:
                    break
                for job, answer in self._executor.wait(PAUSE if self._listeners else None):
                    self._ended(job.key, answer)
                for listener in self._listeners.values():
                    listener.listen()
        left = sum(source.left for source in self._sources)
        if left:
            self._say(f"the time is up, {left} trials are left; the same command goes on with them")

    def _fill(self) -> None:
        """Give every free slot a trial."""
        while len(self._busy) < self._executor.slots:
            claim = self._again.pop(0) if self._again else self._next()
            if claim is None:
                return
            key = claim.trial.hash
            if key in self._busy:
                self._same.setdefault(key, []).append(claim)
            elif claim.source.knows(self._records.get(key)):  # of a search that proposes a point again
                self._repeat(claim)
            else:
                self._submit(claim)

    def _next(self) -> Claim | None:
        if self._end is not None and time.monotonic() > self._end:
            return None
        for source in list(self._sources):
            self._sources.append(self._sources.pop(0))  # in turns
            while source.left:
                try:
                    claim = source.next()
                except SpecError as error:
                    self._advance(f"FAILED, a point of the search makes no sense: {error}")
                    continue
                if claim is not None:
                    return claim
        return None

    def _submit(self, claim: Claim) -> None:
        key, folder = claim.trial.hash, self._folder / FOLDERS / claim.trial.folder
        metric = claim.source.metric
        self._busy[key] = claim
        if metric is not None:
            state = claim.source.state
            self._listeners[key] = Listener(
                folder, lambda epoch, value: state.report(claim.asked, epoch, value)
            )
        where = str(folder.resolve())
        self._executor.submit(Job(key, claim.trial.settings(), where, self._kind.runner, metric))

    def _ended(self, key: str, answer: Answer) -> None:
        claim = self._busy.pop(key)
        self._listeners.pop(key, None)
        failure = answer["failure"]
        if failure is not None and failure.get("storage"):
            raise StorageError(self._full(failure["message"]))
        if failure is not None and failure["error"] == DIED and claim.attempt < self._retries:
            claim.source.state.end(claim.asked, None)
            self._again.append(claim.again())
            name = f"{claim.trial.name}, seed {claim.trial.seed}"
            self._say(f"{name}: {failure['message']}; retry {claim.attempt + 1} of {self._retries}")
            return
        record = self._record(claim, answer)
        self._keep(record)
        self._tell(claim, record)
        self._tidy(claim, record)
        self._advance(self._line(claim.trial, record))
        for same in self._same.pop(key, []):
            self._repeat(same)

    def _keep(self, record: Record) -> None:
        try:
            add_record(self._folder / TRIALS, record)
        except OSError as error:
            raise StorageError(self._full(str(error))) from error
        self._records[record["hash"]] = record

    def _repeat(self, claim: Claim) -> None:
        """Tell of a trial that has ended before; the record says of every search that it is one of its points."""
        record = self._records[claim.trial.hash]
        if isinstance(claim.source, SearchSource):
            found = claim.source.adopted(claim.params, record)
            if found is not record:
                self._keep(found)
        self._tell(claim, record)
        self._advance(self._line(claim.trial, record))

    def _tell(self, claim: Claim, record: Record) -> None:
        ended = None if record["failure"] is not None else claim.source.ended(claim.params, record)
        claim.source.state.end(claim.asked, ended)

    def _record(self, claim: Claim, answer: Answer) -> Record:
        """The line of trials.jsonl; what a worker that died did not say is empty."""
        trial = claim.trial
        record: Record = {
            "format": FORMAT,
            "hash": trial.hash,
            **self._kind.note(trial),
            "seed": trial.seed,
            "folder": f"{FOLDERS}/{trial.folder}",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "attempts": claim.attempt + 1,
            "curves": {},
            "costs": {},
            "warnings": [],
            "versions": {},
            **answer,
            "settings": trial.settings(),
        }
        if isinstance(claim.source, SearchSource):
            record["search"] = claim.source.note(claim.params)
        if record["failure"] is None:
            record.update(self._kind.found(trial, record))
            record["residual"] = _last(record["curves"].get("residual_max"))
        return record

    def _tidy(self, claim: Claim, record: Record) -> None:
        """Without checkpoints, which a trial that ended no longer needs; a worker that died left one to go on from."""
        failure = record["failure"]
        if failure is None or failure["error"] != DIED:
            folder = self._folder / FOLDERS / claim.trial.folder
            remove_checkpoints(folder)
            with suppress(OSError):  # a file that cannot be deleted must not end the study
                remove_reports(folder)

    def _line(self, trial: Trial, record: Record) -> str:
        name = f"{trial.name}, seed {trial.seed}"
        if record["failure"] is not None:
            return f"{name}: FAILED, {record['failure']['error']}: {record['failure']['message']}"
        stopped = f"pruned after epoch {record['pruned']}, " if record.get("pruned") is not None else ""
        seconds = record.get("run_seconds")
        took = "" if seconds is None else f", {seconds:.0f} s"
        return f"{name}: {stopped}{self._kind.told(trial, record)}{took}"

    def _full(self, reason: str) -> str:
        done = sum(map(is_complete, self._records.values()))
        return (
            f"{self._folder}: {reason}; {done} finished trials are kept there, and those that ran "
            "have their checkpoints. Set it right and start the same command again"
        )

    def _say(self, line: str) -> None:
        if self._console is not None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _last(values: Any) -> float | None:
    """The last of a curve; None where there is none."""
    return values[-1] if isinstance(values, Sequence) and values else None
