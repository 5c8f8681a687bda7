"""What a worker is asked to do and how it does it: the same in a process here and on a machine of a cluster."""

from __future__ import annotations

import errno
import importlib
import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopdeq_lwpf.sweeps.engine.epoch_reports import Reports

Answer = dict[str, Any]

DIED = "WorkerDied"
# Of a disk that takes no more: what a trial could not write is not the trial's fault.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@dataclass(frozen=True)
class Job:
    """What a worker is asked to do, and where."""

    key: str
    settings: Mapping[str, Any]
    folder: str
    runner: str = "hopdeq_lwpf.sweeps.trials.train_trial:run_trial"  # (settings, folder) -> the answer
    metric: str | None = (
        None  # told to the driver after each epoch: (settings, folder, Reports) -> the answer
    )


def perform(job: Job) -> Answer:
    """Run the job here; whatever goes wrong is the answer's "failure"."""
    try:
        run = runner(job.runner)
        if job.metric is None:
            answer = run(job.settings, Path(job.folder))
        else:
            answer = run(job.settings, Path(job.folder), Reports(Path(job.folder), job.metric))
        if not isinstance(answer, dict) or "failure" not in answer:
            raise TypeError(f"{job.runner} must return a dict with 'failure', got {type(answer).__name__}")
        return _plain(answer)
    except (Exception, SystemExit) as error:  # one trial must not end the study
        return {"failure": failure(error)}


def _plain(answer: Answer) -> Answer:
    """As JSON holds it, with None for NaN and infinity; TypeError for what it cannot hold."""
    try:
        json.dumps(answer, allow_nan=False)
    except ValueError:
        found: Answer = json.loads(json.dumps(answer), parse_constant=lambda name: None)
        return found
    return answer


def runner(name: str) -> Callable[..., Answer]:
    """The function called "module:function"; imports its module."""
    module, _, function = name.partition(":")
    found: Callable[..., Answer] = getattr(importlib.import_module(module), function)
    return found


def failure(error: BaseException) -> dict[str, Any]:
    """What a record says of an exception; "storage": whether a disk that takes no more was the cause."""
    found = {
        "error": type(error).__name__,
        "message": " ".join(str(error).split()),
        "traceback": "".join(traceback.format_exception(error)),
    }
    return {**found, "storage": True} if _of_disk(error) else found


def died(how: str) -> Answer:
    """The answer of a worker that cannot give one."""
    return {"failure": {"error": DIED, "message": f"the worker process died ({how})"}}


def _of_disk(error: BaseException | None) -> bool:
    """Whether the exception, or one that it came from, is of a disk that takes no more."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in DISK:
            return True
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
