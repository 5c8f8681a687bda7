"""Processes that run trials: started once, one trial after the other, gone when the driver is gone."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from hopdeq_lwpf.sweeps.engine.jobs import Answer, Job, died, perform, runner

DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, preload: str | None) -> None:
        # spawn: a forked copy of a process that has run torch may hang.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, os.getpid(), preload), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def begin(self, job: Job) -> None:
        self.job = job
        with suppress(OSError):  # it has died since: `answer` says so
            self.pipe.send(job)

    def answer(self) -> Answer:
        """What became of the job; a process that died has failed it."""
        try:
            found: Answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            return died(f"signal {-code}" if code is not None and code < 0 else f"exit code {code}")
        return found

    def end(self) -> None:
        """Killed, not asked: every file that a training writes appears whole or not at all."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


class LocalExecutor:
    """Runs jobs in `workers` processes of this machine, one thread each.

    preload: "module:function" that the processes import while they wait for their first job.
    A worker that dies answers its job with the failure "WorkerDied"; the next job gets a new process.
    """

    retries = False  # whoever submits begins a job again

    def __init__(self, workers: int, preload: str | None = None) -> None:
        self.slots = workers
        self._preload = preload
        self._workers: list[_Worker] = []

    def start(self, count: int) -> None:
        """Start as many processes, at most `slots`, so that they import while the driver gets ready."""
        while len(self._workers) < min(count, self.slots):
            self._workers.append(_Worker(self._preload))

    def submit(self, job: Job) -> None:
        """Hand the job to a process that has none; there must be one of the `slots` left."""
        for worker in [entry for entry in self._workers if entry.job is None]:
            if worker.process.is_alive():
                break
            self._workers.remove(worker)
            worker.end()
        else:
            if len(self._workers) >= self.slots:
                raise RuntimeError(f"all {self.slots} workers are busy")
            worker = _Worker(self._preload)
            self._workers.append(worker)
        worker.begin(job)

    def wait(self, timeout: float | None = None) -> list[tuple[Job, Answer]]:
        """The jobs that have ended, each with its answer; after `timeout` seconds none."""
        busy = [worker for worker in self._workers if worker.job is not None]
        ready = wait([worker.pipe for worker in busy], timeout)
        found = []
        for worker in [entry for entry in busy if entry.pipe in ready]:
            job, answer = worker.job, worker.answer()
            assert job is not None
            worker.job = None
            found.append((job, answer))
        return found

    def close(self) -> None:
        """End every process, also one that works."""
        while self._workers:
            self._workers.pop().end()


def _work(pipe: Connection, driver: int, preload: str | None) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the driver decides
    _die_with(driver)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, since OpenMP reads it once
    if preload is not None:
        _get_ready(preload)
    while True:
        try:
            job: Job = pipe.recv()
        except (EOFError, OSError):
            return
        _get_ready(job.runner)
        answer = perform(job)
        try:
            pipe.send(answer)
        except OSError:
            return


def _get_ready(name: str) -> None:
    """Import a runner, and have torch work on one thread if that has brought it."""
    with suppress(Exception):  # the job says what is wrong with its runner
        runner(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _die_with(driver: int) -> None:
    """Have the system kill this process when its driver dies; where it cannot, a thread sees to it."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
    if os.name == "posix" and os.getppid() != driver:  # it died before
        os._exit(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
