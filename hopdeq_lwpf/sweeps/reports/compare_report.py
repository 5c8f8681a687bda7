"""One self-contained HTML page of a comparison: opens offline, loads nothing, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from hopdeq_lwpf.sweeps.reports.page import figures, settings_element, table, write_page
from hopdeq_lwpf.sweeps.reports.summary import Comparison, Grid, findings, summaries
from hopdeq_lwpf.sweeps.reports.table import COLUMNS, WITH_INTERVAL, Row
from hopdeq_lwpf.sweeps.spec import CONVERGED

METHOD = """Every stored pattern and every query is first moved into the stored space (setting
<code>normalize</code>). One step is one softmax, that is attention; k steps are k of them; converged solves
the fixed-point equation from the same query. A query counts as recalled when the stored pattern nearest to
what was recalled is the right one and is closer than <code>max_error</code>. Intervals resample the queries
(percentile bootstrap); the queries are the same in all settings of a kind and level, so differences are taken
in pairs. An interval of no width at 0 or 100 % says only that all queries agreed. A basin change is a
converged run that ends more than 5 % (relative) from where plain iteration in float64 ends; queries for which
that iteration does not converge are left out of this share and counted. The size of a fixed point is the number
of largest weights that hold 90 % of the weight: one is a single pattern, more than half of all a global average,
else it is metastable. The spectral radius of df/dz at the equilibrium is what plain iteration multiplies a small
error by at each step; it is measured for a sample of the queries (setting <code>spectrum</code>). A dead pattern
gets no weight from any query. Stored patterns are those that meet the condition of Ramsauer et al. 2021 (lemmas
A5 to A7), which is sufficient and not necessary: recall works far beyond it. Times are of whole batches on this
machine and include everything that the call does."""


def write_report(comparison: Comparison, captions: Mapping[str, str], folder: Path) -> Path:
    """Write report.html into `folder`, with NAME.svg from there for each NAME of `captions` drawn in."""
    body = [
        *_head(comparison),
        "<h2>Pictures</h2>",
        *figures(captions, folder),
        "<h2>Tables</h2>",
        *(_grid(grid) for grid in summaries(comparison)),
        *_unconverged(comparison.rows),
        *_all_cells(comparison.rows),
        *_settings(comparison),
    ]
    return write_page(folder / "report.html", "One-step against converged retrieval", body)


def _head(comparison: Comparison) -> list[str]:
    spec, task = comparison.spec, comparison.task
    asked = (
        f"{len(task.patterns)} stored patterns of {task.patterns.shape[1]} numbers ({task.source}), "
        f"{task.size} queries in each of {len(task.sets)} query sets, {len(comparison.rows)} cells; "
        f"normalize {spec.normalize}, seed {spec.seed}."
    )
    return [
        "<h1>One-step against converged retrieval, with and without forgetting</h1>",
        f'<p class="soft">{escape(asked)}<br>{escape(_versions(comparison))}</p>',
        "<h2>What the table says</h2>",
        "<ul>",
        *(f"<li>{escape(sentence)}</li>" for sentence in findings(comparison)),
        "</ul>",
        f"<details><summary>How it was measured</summary><p>{METHOD}</p></details>",
    ]


def _versions(comparison: Comparison) -> str:
    return ", ".join(f"{name} {value}" for name, value in comparison.environment.items())


def _grid(grid: Grid) -> str:
    return f"<h3>{escape(grid.title)}</h3>{table(grid.header, grid.lines)}"


def _unconverged(rows: Sequence[Row]) -> list[str]:
    """Every cell of a converged run in which a query did not get there."""
    failed = [
        row
        for row in rows
        if row["steps"] == CONVERGED and row["max_steps"] + row["diverged"] + row["nonfinite"]
    ]
    title = "<h2>What did not converge</h2>"
    if not any(row["steps"] == CONVERGED for row in rows):
        return [title, "<p>Nothing was run to convergence.</p>"]
    if not failed:
        return [title, "<p>Every query of every converged run reached the tolerance.</p>"]
    names = (
        "forgetting",
        "beta",
        "corruption",
        "level",
        "queries",
        "max_steps",
        "diverged",
        "nonfinite",
        "residual_max",
    )
    lines = [[_text(row[name]) for name in names] for row in failed]
    return [
        title,
        f'<p class="warn">{len(failed)} cells hold queries that did not reach the tolerance; they count in '
        "every number above with the state of lowest residual.</p>",
        table(names, lines),
    ]


def _all_cells(rows: Sequence[Row]) -> list[str]:
    lines = [[_cell(row, name) for name in COLUMNS] for row in rows]
    return [
        "<h2>Every cell</h2>",
        f"<details><summary>{len(rows)} cells (also in results.csv)</summary>",
        table(tuple(COLUMNS), lines),
        "</details>",
        "<details><summary>What the columns mean</summary>",
        table(("column", "meaning"), COLUMNS.items(), "glossary"),
        "</details>",
    ]


def _cell(row: Row, name: str) -> str:
    if name in WITH_INTERVAL and not math.isnan(row[name]):
        return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"
    return _text(row[name])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _settings(comparison: Comparison) -> list[str]:
    settings = comparison.spec.as_dict()
    text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)
    data = [
        "<p>Digits: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak (1998), UCI Machine "
        "Learning Repository, doi:10.24432/C50P49, CC BY 4.0.</p>"
    ]
    return [
        "<h2>Settings, and how to run this again</h2>",
        "<p>Save these lines as <code>settings.yaml</code>, then "
        "<code>hopdeq-lwpf compare --config settings.yaml</code>; the same seed draws the same queries.</p>",
        f"<pre>{escape(text)}</pre>",
        table(("version of", ""), comparison.environment.items()),
        *(data if comparison.spec.patterns is None else []),
        settings_element(settings),
    ]
