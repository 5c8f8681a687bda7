"""Parts that the reports of trainings share: versions, failures, warnings, tables as Markdown."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hopdeq_lwpf.sweeps.page import table
from hopdeq_lwpf.sweeps.summary import Grid
from hopdeq_lwpf.training.spec import TrainSpec

Records = Sequence[Mapping[str, Any] | None]


def grid_element(grid: Grid) -> str:
    """A table under its title, as HTML."""
    return f"<h3>{escape(grid.title)}</h3>{table(grid.header, grid.lines)}"


def markdown_table(grid: Grid) -> str:
    """A table for a page of documentation."""
    lines = [grid.header, tuple("---" for _ in grid.header), *grid.lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def versions(records: Records) -> str:
    """Every set of versions that trials ran with; more than one where a study was continued with others."""
    found = [
        ", ".join(f"{name} {value}" for name, value in record["versions"].items())
        for record in records
        if record is not None and record["versions"]
    ]
    return "; and ".join(dict.fromkeys(found)) or "none"


def failures(failed: Sequence[tuple[str, Mapping[str, Any], str]], missing: int, trials: int) -> list[str]:
    """The section on trials that failed, (name, record, the line that runs it alone), and on those not run."""
    body = ["<h2>What failed</h2>"]
    if not failed and not missing:
        return [*body, "<p>Every trial finished.</p>"]
    if missing:
        body.append(
            f'<p class="warn">{missing} of {trials} trials were not run; start the study '
            "again with the settings below.</p>"
        )
    if failed:
        body.append(
            f'<p class="warn">{len(failed)} trials failed and count nowhere; starting the study again runs them '
            "again.</p>"
        )
        lines = [
            (name, f"{record['failure']['error']}: {record['failure']['message']}", alone)
            for name, record, alone in failed
        ]
        body.append(table(("trial", "failure", "alone"), lines))
    return body


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
    return shlex.join([*words, "--out", out])


def _words(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [entry if isinstance(entry, str) else json.dumps(entry) for entry in values]
