"""Parts that the reports of trainings share: versions, failures, warnings, the line of a trial."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from hopdeq_lwpf.imports import FLAG, paths
from hopdeq_lwpf.sweeps.reports.page import html_table, table
from hopdeq_lwpf.sweeps.reports.summary import Grid
from hopdeq_lwpf.training.spec import TrainSpec

SHOWN = 20  # names in a row

Records = Sequence[Mapping[str, Any] | None]


def grid_element(grid: Grid) -> str:
    """A table under its title, as HTML."""
    return f"<h3>{escape(grid.title)}</h3>{table(grid.header, grid.lines)}"


def versions(records: Records) -> str:
    """Every set of versions that trials ran with; more than one where a study was continued with others."""
    found = [
        ", ".join(f"{name} {value}" for name, value in record["versions"].items())
        for record in records
        if record is not None and record["versions"]
    ]
    return "; and ".join(dict.fromkeys(found)) or "none"


@dataclass(frozen=True)
class Lost:
    """Trials that count nowhere, and how to run them."""

    trials: int  # of the whole
    failed: Sequence[tuple[str, Mapping[str, Any], str]]  # (name, record, the line that runs it alone)
    missing: int  # were not run
    again: str  # the line that runs all of both
    unknown: Sequence[str] = ()  # names of those that finished without a finite score


def failures(lost: Lost) -> list[str]:
    """The section on trials that count nowhere."""
    body = ["<h2>What failed</h2>"]
    if lost.failed or lost.missing:
        body.append(
            f'<p class="warn">Of {lost.trials} trials, failed: {len(lost.failed)}; not run: {lost.missing}. They count '
            f"nowhere.</p><p>This line runs them and no others:</p><pre>{escape(lost.again)}</pre>"
        )
    if lost.unknown:
        some = "; ".join(lost.unknown[:SHOWN]) + " ..." * (len(lost.unknown) > SHOWN)
        body.append(
            f'<p class="warn">Finished without a finite score (NaN, or none), and counted nowhere: '
            f"{len(lost.unknown)}.</p><p>{escape(some)}</p>"
        )
    if lost.failed:
        rows = [
            (escape(name), _failure(record["failure"]), f"<code>{escape(alone)}</code>")
            for name, record, alone in lost.failed
        ]
        body.append(
            html_table(("trial", "failure", "alone, into a folder of its own"), rows, "failures", tall=8)
        )
    return body if len(body) > 1 else [*body, "<p>Every trial finished.</p>"]


def _failure(failure: Mapping[str, Any]) -> str:
    said, trace = escape(f"{failure['error']}: {failure['message']}"), failure.get("traceback")
    more = f"<details><summary>traceback</summary><pre>{escape(trace)}</pre></details>" if trace else ""
    return said + more


def warnings(records: Records) -> list[str]:
    """Each warning with the number of trials that gave it."""
    counts: dict[str, int] = {}
    for record in records:
        for text in record["warnings"] if record is not None else ():
            counts[text] = counts.get(text, 0) + 1
    if not counts:
        return []
    return [
        "<h2>Warnings</h2>",
        table(("trials", "warning"), [(str(count), text) for text, count in counts.items()], "glossary"),
    ]


def train_command(base: str, before: Mapping[str, Any], after: Mapping[str, Any], out: str) -> str:
    """The line that trains with the settings `after`; `base` is the file in models/ whose settings are `before`."""
    known = TrainSpec(**before).as_dict()
    words = ["hopdeq-lwpf", "train", base.removeprefix("train_")]
    for key, value in after.items():
        if key in ("model", "data") and known[key].keys() - value.keys():
            words += [f"--{key}", json.dumps(value)]  # as a whole, or what is no longer there would stay
        elif key in ("model", "data"):
            for option, entry in value.items():
                if option not in known[key] or known[key][option] != entry:
                    words += [f"--{key}.{option}", json.dumps(entry) if not isinstance(entry, str) else entry]
        elif value != known[key]:
            words += [f"--{key}", *_words(value)]
    return shlex.join([*words, "--out", out, *import_flag(after)])


def import_flag(settings: Any) -> list[str]:
    """What a command line needs beside settings that name classes of the user's own."""
    return [f"--{FLAG}"] if paths(settings) else []


def _words(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [entry if isinstance(entry, str) else json.dumps(entry) for entry in values]
