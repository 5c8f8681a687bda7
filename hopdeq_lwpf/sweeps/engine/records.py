"""trials.jsonl: one JSON object a finished trial, only ever appended to; and what its curves come to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hopdeq_lwpf.data import DataError
from hopdeq_lwpf.sweeps.engine.lines import add_line
from hopdeq_lwpf.sweeps.engine.search import MAXIMIZE, direction_of

Record = Mapping[str, Any]

TRIALS = "trials.jsonl"
FORMAT = 1
CHECKPOINTS = ("last.ckpt", "best.ckpt")  # of training.checkpoints, which takes seconds to import
BEGIN = '{"format"'  # of every line, also of one that was cut off
SCORES = ("loss", "accuracy", "auc")
# What is kept of the monitors (`training.monitors`) beside the scores; the maxima of several layers or epochs
# are maximised, all else is averaged.
MONITORS = (
    "steps",
    "steps_max",
    "evaluations",
    "converged",
    "residual_max",
    "nonfinite",
    "adjoint_steps",
    "adjoint_converged",
    "support",
    "forgotten",
    "energy",
    "gradient_norm",
    "query_gradient",
    "iterations",
    "iterations_published",
    "not_converged",
)
MAXIMA = ("steps_max", "residual_max")


class StorageError(DataError):
    """The folder or the database of a study takes no more; one line that says what is kept and what to do."""


def add_record(path: Path, record: Record) -> None:
    """Append one record and wait until the disk has it; OSError where it takes no more, the file as it was."""
    add_line(path, record)


def is_complete(record: Record | None) -> bool:
    """Whether a trial has run to its end, neither failed nor pruned."""
    return record is not None and _rank(record) == 2


def point_of(record: Record, study: str) -> Mapping[str, Any] | None:
    """The params by which the search called `study` knows a trial; None where it is none of its points.

    "search" is the one that ran it, "also" has those that proposed the same settings later.
    """
    own: Mapping[str, Any] = record.get("search", {})
    found: Mapping[str, Any] | None = own["params"] if own.get("study") == study else None
    return found if found is not None else record.get("also", {}).get(study)


def _rank(record: Record) -> int:
    """2: complete, 1: pruned by a search, 0: failed."""
    if record["failure"] is not None:
        return 0
    return 2 if record.get("pruned") is None else 1


def remove_checkpoints(folder: Path) -> None:
    """Delete what a finished trial no longer needs; metrics.jsonl and config.yaml stay."""
    for name in CHECKPOINTS:
        with suppress(OSError):  # a file that cannot be deleted must not end the study
            (folder / name).unlink(missing_ok=True)


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """The record that counts for each hash: the last complete one, else the last pruned one, else the last one.

    An absent file holds none; a line that was cut off is passed over. Raises DataError where all lines are of
    something else, or where the format is of another version.
    """
    if not path.exists():
        return {}
    found: dict[str, dict[str, Any]] = {}
    broken = 0
    for line in filter(str.strip, path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("hash"), str):
            broken += not (line.startswith(BEGIN) or BEGIN.startswith(line))
            continue
        if record.get("format") != FORMAT:
            raise DataError(
                f"{path}: has format {record.get('format')!r}, this version reads {FORMAT}; name another out"
            )
        before = found.get(record["hash"])
        if before is None or _rank(record) >= _rank(before):
            found[record["hash"]] = record
    if broken and not found:
        raise DataError(f"{path}: holds no trials, but {broken} lines of something else; name another out")
    return found


def curves(records: Sequence[Record]) -> dict[str, list[float | None]]:
    """The course of every score and monitor over the epochs of a metrics.jsonl; None where it is not finite.

    records: of `training.read_metrics`. A monitor has its bare name ("steps"): of training where it is known
    there, else of validation, over all layers.
    """
    found: dict[str, list[float | None]] = {}
    known = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    for stage in ("train", "val"):
        for name in SCORES:
            if f"{stage}/{name}" in known:
                found[f"{stage}/{name}"] = [_finite(r["metrics"].get(f"{stage}/{name}")) for r in records]
    for name in MONITORS:
        sources = [key for key in known if key.rsplit("/", 1)[-1] == name]
        sources = [key for key in sources if key.startswith("train/")] or sources
        if sources:
            found[name] = [_over([r["metrics"].get(key) for key in sources], name) for r in records]
    return found


def measures(record: Record, last: int, metric: str) -> dict[str, float | None]:
    """Numbers of one trial, None where unknown: scores and monitors over the last epochs, costs.

    metric: what the score is, such as val/accuracy.
    score, train_score: means over the last `last` epochs, or the cost of that name; score_best, score_end: the best of
    all, by `search.direction_of`, and that of the last.
    val/accuracy and others by their names, then the monitors, then the costs.
    """
    course: Mapping[str, list[float | None]] = record["curves"]
    best = max if direction_of(metric) == MAXIMIZE else min
    numbers: dict[str, float | None] = {
        "score": _over(course.get(metric, [])[-last:], metric),
        "score_best": best((v for v in course.get(metric, []) if v is not None), default=None),
        "score_end": (course.get(metric) or [None])[-1],
        "train_score": _over(course.get(f"train/{metric.rsplit('/', 1)[-1]}", [])[-last:], metric),
    }
    for stage in ("val", "train"):
        for name in SCORES:
            numbers[f"{stage}/{name}"] = _over(course.get(f"{stage}/{name}", [])[-last:], name)
    for name in MONITORS:
        numbers[name] = _over(course.get(name, [])[-last:], name)
    for name, values in course.items():
        if name not in numbers:
            numbers[name] = _over(values[-last:], name)
    # A trial that measures "seconds" itself means other ones than those of the whole trial.
    costs = {name: _finite(record["costs"].get(name)) for name in COSTS if name not in course}
    if metric in costs:
        numbers["score"] = costs[metric]
    return {**numbers, **costs}


COSTS = ("seconds", "epoch_seconds", "epoch_cpu_seconds", "saved_bytes", "parameters")


def _finite(value: Any) -> float | None:
    # Six digits: more than anything here is known to, and the file stays small.
    known = isinstance(value, (int, float)) and math.isfinite(value)
    return float(f"{value:.6g}") if known else None


def _over(values: Iterable[Any], name: str) -> float | None:
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    return _finite(max(known) if name in MAXIMA else float(np.mean(known)))
