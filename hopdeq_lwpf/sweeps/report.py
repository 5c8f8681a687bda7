"""One self-contained HTML page of a comparison: opens offline, loads nothing, readable in light and dark."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from hopdeq_lwpf.data import replacing
from hopdeq_lwpf.sweeps.spec import CONVERGED
from hopdeq_lwpf.sweeps.summary import Comparison, Grid, findings, summaries
from hopdeq_lwpf.sweeps.table import COLUMNS, WITH_INTERVAL, Row

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --soft: #666; --line: #d8d8d8;
  --band: #f5f5f3; --warn: #a33c00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #17181a; --soft: #a5a5a5; --line: #3b3d41; --band: #202226;
    --warn: #ff9d5c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
li { max-width: 46rem; }
.soft { color: var(--soft); }
.warn { color: var(--warn); font-weight: 600; }
figure { margin: 1rem 0 1.6rem; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; }
.sheet { background: #fff; border: 1px solid var(--line); border-radius: 4px; padding: .5rem;
  overflow-x: auto; }
figure svg { display: block; width: 100%; max-width: 48rem; height: auto; margin: 0 auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; background: var(--band); }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: var(--band); }
.glossary td { white-space: normal; text-align: left; }
pre, code { font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; background: var(--band); }
pre { padding: .7rem; overflow-x: auto; border: 1px solid var(--line); }
details { margin: .6rem 0; }
summary { cursor: pointer; }
"""

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
    figures = [
        f'<figure id="{escape(name)}"><div class="sheet">{_inline(folder / f"{name}.svg")}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for name, caption in captions.items()
    ]
    body = [
        *_head(comparison),
        "<h2>Pictures</h2>",
        *figures,
        "<h2>Tables</h2>",
        *(_grid(grid) for grid in summaries(comparison)),
        *_unconverged(comparison.rows),
        *_all_cells(comparison.rows),
        *_settings(comparison),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>One-step against converged retrieval</title><style>{STYLE}</style></head>\n<body>\n"
    )
    target = folder / "report.html"
    with replacing(target) as temporary:
        temporary.write_text(page + "\n".join(body) + "\n</body></html>\n", encoding="utf-8")
    return target


def _inline(path: Path) -> str:
    """The picture as an element; its declaration and document type belong to a file of its own."""
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    # The names in one document must differ, or the second picture would use the first one's shapes.
    prefix = path.stem
    text = re.sub(
        r'(<image [^>]*?) id="[^"]*"', r"\1", text
    )  # equal pictures have equal names; nothing uses them
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


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


def _table(header: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _grid(grid: Grid) -> str:
    return f"<h3>{escape(grid.title)}</h3>{_table(grid.header, grid.lines)}"


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
        _table(names, lines),
    ]


def _all_cells(rows: Sequence[Row]) -> list[str]:
    lines = [[_cell(row, name) for name in COLUMNS] for row in rows]
    return [
        "<h2>Every cell</h2>",
        f"<details><summary>{len(rows)} cells (also in results.csv)</summary>",
        _table(tuple(COLUMNS), lines),
        "</details>",
        "<details><summary>What the columns mean</summary>",
        _table(("column", "meaning"), COLUMNS.items(), "glossary"),
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
        _table(("version of", ""), comparison.environment.items()),
        *(data if comparison.spec.patterns is None else []),
        f'<script type="application/json" id="settings">{_json(settings)}</script>',
    ]


def _json(value: Any) -> str:
    # "<" would allow a file name to end the element.
    return json.dumps(value).replace("<", "\\u003c")
