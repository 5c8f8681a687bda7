"""Processes that run trials: started once, one trial after the other, gone when the driver is gone."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What a worker is asked to do, and where."""

    key: str
    settings: Mapping[str, Any]
    folder: str
    runner: str = "hopdeq_lwpf.sweeps.study_trial:run_trial"  # (settings, folder) -> the answer


class _Worker:
    """One process and the pipe to it."""

    def __init__(self) -> None:
        # spawn: a forked copy of a process that has run torch may hang.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def begin(self, job: Job) -> None:
        self.job = job
        with suppress(OSError):  # it has died since: `answer` says so
            self.pipe.send(job)

    def answer(self) -> dict[str, Any]:
        """What became of the job; a process that died has failed it."""
        try:
            found: dict[str, Any] = self.pipe.recv()
            return found
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            return {"failure": {"error": "WorkerDied", "message": f"the worker process died ({how})"}}

    def end(self) -> None:
        """Killed, not asked: every file that a training writes appears whole or not at all."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run_jobs(jobs: Iterable[Job], workers: int) -> Generator[tuple[Job, dict[str, Any]], None, None]:
    """Run the jobs on as many processes; yields each with its answer as it ends, in the order of ending.

    A worker that dies fails its job ("WorkerDied") and is replaced. Closing the iterator kills the workers.
    """
    waiting = list(jobs)[::-1]
    busy: list[_Worker] = []
    try:
        for _ in range(min(workers, len(waiting))):
            busy.append(_Worker())
            busy[-1].begin(waiting.pop())
        while busy:
            ready = wait([worker.pipe for worker in busy])
            for worker in [entry for entry in busy if entry.pipe in ready]:
                job, answer = worker.job, worker.answer()
                assert job is not None
                if not worker.process.is_alive() or not waiting:
                    busy.remove(worker)
                    worker.end()
                    if waiting:
                        worker = _Worker()
                        busy.append(worker)
                if waiting:
                    worker.begin(waiting.pop())
                yield job, answer
    finally:
        for worker in busy:
            worker.end()


def _work(pipe: Connection) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the driver decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()

    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job: Job = pipe.recv()
        except (EOFError, OSError):
            return
        module, _, function = job.runner.partition(":")
        run = getattr(importlib.import_module(module), function)
        pipe.send(run(job.settings, Path(job.folder)))


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
