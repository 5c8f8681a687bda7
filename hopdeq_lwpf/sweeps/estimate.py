"""What a sweep would run and how long that may take, by the records that its folder holds. Writes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from hopdeq_lwpf._checks import choice
from hopdeq_lwpf.sweeps.reports.summary import Grid
from hopdeq_lwpf.sweeps.reports.sweep_results import Sweep
from hopdeq_lwpf.sweeps.study import check_settings
from hopdeq_lwpf.sweeps.sweep import MEASURES, load, search_records
from hopdeq_lwpf.sweeps.sweep_spec import Cell, SweepSpec

NOTHING = "Nothing is left to run; the report would be written anew."
BASIS = (
    "No basis for an estimate of the time: no trial has finished in this folder. One cell with one seed gives it "
    "(--only, --seeds)."
)


def plan(spec: SweepSpec, most: int | None = None) -> tuple[list[Grid], list[str]]:
    """The cells with their trials, at most so many lines; and in words what is finished, what is left, how long.

    Raises SpecError for settings that make no sense, DataError for a folder whose trials cannot be read.
    """
    known = MEASURES[spec.task]
    for name in spec.measures:
        choice("measures:", name, known)
    sweep = load(spec)
    if spec.task == "train":
        check_settings([trial.given for trial in sweep.trials])
    if spec.search:
        return [], _searched(sweep, spec)
    return [_grid(sweep, most)], [*_counts(sweep), _time(sweep)]


def _searched(sweep: Sweep, spec: SweepSpec) -> list[str]:
    """In words, of a search: what it would try."""
    search = spec.sought()
    assert search is not None
    asked = search.trials * len(spec.cells())
    corners = [
        spec.trial(cell, spec.seeds[0], corner) for cell in spec.cells() for corner in search.corners()
    ]
    if spec.task == "train":
        check_settings([trial.given for trial in corners])
    ended = sum(record["failure"] is None for _, _, record in search_records(spec))
    return [
        f"A search ({search.sampler}, pruner {search.pruner}) of {', '.join(search.space)}: {search.trials} trials in "
        f"each of {len(spec.cells())} cells, {asked} trials of {spec.base or spec.task}, seed {spec.seeds[0]}.",
        f"Folder {spec.out}: {ended} trials ended, run to their end or stopped early.",
        _seconds(sweep, asked - ended) if ended < asked else NOTHING,
    ]


def _seconds(sweep: Sweep, left: int) -> str:
    found = [
        record["run_seconds"] for record in sweep.records if record is not None and record.get("run_seconds")
    ]
    if not found:
        return BASIS
    time = duration(left * float(np.mean(found)) / sweep.spec.workers)
    return f"At most about {time} on {sweep.spec.workers} workers for {left} more, by the mean of those."


def _grid(sweep: Sweep, most: int | None) -> Grid:
    lines = []
    for cell in sweep.cells():
        done, failed, missing = (_of(sweep, cell, which) for which in ("finished", "failed", "not run"))
        seconds = _mean(sweep, cell)
        levels = dict(cell.levels)
        lines.append(
            (
                *(levels.get(factor, "-") for factor in sweep.factors()),
                *(str(len(each)) for each in (done, failed, missing)),
                "-" if math.isnan(seconds) else duration(seconds),
            )
        )
    cut = most is not None and len(lines) > most
    title = "What would be run" + (f" (the first {most} of {len(lines)} cells)" if cut else "")
    header = (*sweep.factors(), "finished", "failed", "never run", "time of a trial")
    return Grid(title, header, tuple(lines[:most] if cut else lines))


def _of(sweep: Sweep, cell: Cell, which: str) -> list[Any]:
    """The records, or None for each trial without, of one cell: "finished", "failed" or "not run"."""
    found = [record for trial, record in zip(sweep.trials, sweep.records, strict=True) if trial.cell == cell]
    if which == "not run":
        return [record for record in found if record is None]
    return [r for r in found if r is not None and (r["failure"] is not None) == (which == "failed")]


def _mean(sweep: Sweep, cell: Cell) -> float:
    """Mean seconds of the finished trials of a cell; NaN where there is none."""
    seconds = [record["run_seconds"] for record in _of(sweep, cell, "finished") if record.get("run_seconds")]
    return float(np.mean(seconds)) if seconds else math.nan


def _counts(sweep: Sweep) -> list[str]:
    spec = sweep.spec
    done = sum(len(_of(sweep, cell, "finished")) for cell in sweep.cells())
    todo = sum(_todo(sweep).values())
    holds = f"{done} finished, {len(sweep.failures())} failed, {sweep.missing()} never run"
    if not Path(spec.out).is_dir():
        holds = "is not there yet"
    return [
        f"{len(sweep.cells())} cells, {len(spec.seeds)} seeds ({', '.join(map(str, spec.seeds))}), {len(sweep.trials)} "
        f"trials of {spec.base or spec.task}.",
        f"Folder {spec.out}: {holds}; {todo} to run.",
    ]


def _todo(sweep: Sweep) -> dict[Cell, int]:
    """How many trials of each cell are to be run; one that two cells have counts in the first."""
    todo = dict.fromkeys(sweep.cells(), 0)
    seen: set[str] = set()
    for trial, record in zip(sweep.trials, sweep.records, strict=True):
        if (record is None or record["failure"] is not None) and trial.hash not in seen:
            seen.add(trial.hash)
            todo[trial.cell] += 1
    return todo


def _time(sweep: Sweep) -> str:
    """An estimate in words, with what it rests on."""
    means = {cell: _mean(sweep, cell) for cell in sweep.cells()}
    todo = _todo(sweep)
    if not sum(todo.values()):
        return NOTHING
    known = [seconds for seconds in means.values() if not math.isnan(seconds)]
    workers = sweep.spec.workers
    if not known:
        return BASIS
    typical, fastest = float(np.mean(known)), min(known)
    each = {cell: typical if math.isnan(mean) else mean for cell, mean in means.items()}
    total = sum(count * each[cell] for cell, count in todo.items())
    # Workers do not share a trial.
    time = max(total / workers, max(each[cell] for cell, count in todo.items() if count))
    unknown = {cell: count for cell, count in todo.items() if math.isnan(means[cell]) and count}
    text = f"About {duration(time)} on {workers} workers, by the finished trials of {len(known)} cells"
    if not unknown:
        return text + "."
    least = total - sum(unknown.values()) * (typical - fastest)
    return (
        f"{text}; the {len(unknown)} cells without one are taken to cost as much as these on average (were all of them "
        f"as quick as the quickest, {duration(least / workers)})."
    )


def duration(seconds: float) -> str:
    """'3.2 s', '4 min', '2.5 h', '3 days'."""
    for least, size, unit, digits in ((172800, 86400, "days", 0), (5400, 3600, "h", 1), (90, 60, "min", 0)):
        if seconds >= least:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
