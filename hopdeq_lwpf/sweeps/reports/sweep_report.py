"""What a sweep writes: its trials and results as tables, the pictures, and report.html, one self-contained page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml

from hopdeq_lwpf import plots, settings
from hopdeq_lwpf.data import staged_folder
from hopdeq_lwpf.sweeps.reports.page import figures, settings_element, write_page
from hopdeq_lwpf.sweeps.reports.sections import (
    Lost,
    failures,
    grid_element,
    import_flag,
    train_command,
    versions,
    warnings,
)
from hopdeq_lwpf.sweeps.reports.settings_file import NAME, public, settings_text
from hopdeq_lwpf.sweeps.reports.sweep_plots import draw
from hopdeq_lwpf.sweeps.reports.sweep_results import Sweep, findings, summaries
from hopdeq_lwpf.sweeps.reports.tables import latex, markdown_table, write_rows
from hopdeq_lwpf.sweeps.sweep_spec import POINT, SweepTrial

METHOD = """Every trial has the settings of the base and of its cell. The seed sets all that is drawn (initial weights,
order of the data, dropout; patterns and noise), so that trials of one seed differ in the cell alone, and cells are
compared in pairs by seed: with the cell that has the baseline's level of one factor, and all else equal. Intervals are
Student's over seeds; that of a paired difference is without 0 where the paired t test rejects equality. <em>p, paired
t</em> is that test's, two-sided; it supposes differences that scatter normally. <em>p, Holm</em> is the same after
Holm's correction for all pairs of the table: where equality is rejected for a p of at most 0.05, a table of true
equalities has such a pair with a probability of at most 0.05. <em>p, sign flips</em> is that of the permutation test
that flips the signs of the differences, exact up to 12 seeds and not corrected; it supposes nothing normal, but n seeds
allow no p below 2 / 2<sup>n</sup>, 0.0625 for five. All this says how another seed would change the result, not how
data that no seed draws would; intervals are not corrected for their number. A ratio is that of the means over the seeds
that both cells have."""


def write_results(sweep: Sweep, folder: str | None = None) -> list[Path]:
    """Write everything about the trials that are there; returns the paths. A run ends with this, a report is this.

    folder: where to, that of the sweep by default. Either all files appear or none.
    """
    out = Path(folder or sweep.spec.out)
    with staged_folder(out) as staged:
        write_rows(*_rows(sweep), staged)
        (staged / "table.md").write_text(markdown(sweep), encoding="utf-8")
        for name, grid in zip(("table.tex", "pairs.tex"), summaries(sweep), strict=False):
            (staged / name).write_text(latex(grid), encoding="utf-8")
        drawn = draw(sweep)
        for name, (_, figure) in drawn.items():
            plots.save_figure(figure, staged, name)
        _write_page(sweep, {name: caption for name, (caption, _) in drawn.items()}, staged)
        names = sorted(path.name for path in staged.iterdir())
    return [out / name for name in names]


def title(sweep: Sweep) -> str:
    """Of the report."""
    return sweep.spec.title or f"A sweep of {sweep.spec.base or sweep.spec.task}"


def _rows(sweep: Sweep) -> tuple[list[dict[str, Any]], dict[str, type]]:
    """One row a trial, and the columns with their types."""
    columns: dict[str, type] = {factor: str for factor in sweep.factors()}
    known = dict.fromkeys(name for trial in sweep.trials for name in sweep.numbers(trial))
    # A factor may be called "steps", too.
    measured = {name: f"{name} (measured)" if name in columns else name for name in known}
    columns |= {
        "seed": int,
        "hash": str,
        "folder": str,
        **dict.fromkeys(measured.values(), float),
        "failure": str,
    }
    rows = []
    for trial, record in zip(sweep.trials, sweep.records, strict=True):
        if record is not None:
            failure = record["failure"]
            said = "" if failure is None else f"{failure['error']}: {failure['message']}"
            own = {"seed": trial.seed, "hash": trial.hash, "folder": record["folder"], "failure": said}
            numbers = {measured[name]: value for name, value in sweep.numbers(trial).items()}
            rows.append({**numbers, **dict(trial.cell.levels), **own})
    return rows, columns


def markdown(sweep: Sweep) -> str:
    """The tables and findings for a page of documentation."""
    parts = [f"# {title(sweep)}", "\n".join(f"- {sentence}" for sentence in findings(sweep))]
    parts += [f"**{grid.title}**\n\n{markdown_table(grid)}" for grid in summaries(sweep)]
    return "\n\n".join([*parts, f"Versions: {versions(sweep.records)}."]) + "\n"


def command(sweep: Sweep, trial: SweepTrial) -> str:
    """The line that runs a trial alone, into a folder of its own."""
    base = sweep.spec.base
    if base is None:
        levels = dict(trial.cell.levels)
        found = _point(sweep, levels.pop(POINT, None))
        only = yaml.safe_dump([levels], default_flow_style=True, width=1e9).strip()
        words = [
            "hopdeq-lwpf",
            "sweep",
            str(Path(sweep.spec.out) / NAME),
            "--seeds",
            str(trial.seed),
            *(["--only", only] if levels else []),
            *found,
        ]
        return shlex.join([*words, "--out", f"results/{trial.folder}"])
    return train_command(base, settings.find("models", base), trial.settings(), f"results/{trial.folder}")


def _point(sweep: Sweep, name: str | None) -> list[str]:
    """What makes one point of the search in settings.yaml of it, where the trial is one."""
    if name is None or name not in sweep.spec.grid.get(POINT, {}):
        return []
    words = ["--search", "{}"]
    for key, value in sweep.spec.grid[POINT][name].items():
        words += ["--set", f"{key}={json.dumps(value)}"]
    return words


def _write_page(sweep: Sweep, captions: Mapping[str, str], folder: Path) -> Path:
    """Write report.html into `folder`, with NAME.svg from there for each NAME of `captions` drawn in."""
    spec = sweep.spec
    what = spec.base or spec.task
    asked = f"{len(sweep.cells())} cells, {len(spec.seeds)} seeds, {len(sweep.trials)} trials of {what}."
    failed: list[tuple[str, Mapping[str, Any], str]] = [
        (f"{trial.name}, seed {trial.seed}", record, command(sweep, trial))
        for trial, record in sweep.failures()
    ]
    body = [
        f"<h1>{escape(title(sweep))}</h1>",
        f'<p class="soft">{escape(asked)}<br>{escape(versions(sweep.records))}</p>',
        "<h2>What the numbers say</h2>",
        "<ul>",
        *(f"<li>{escape(sentence)}</li>" for sentence in findings(sweep)),
        "</ul>",
        f"<details><summary>How it was measured</summary><p>{METHOD}</p></details>",
        *(["<h2>Pictures</h2>"] if captions else []),
        *figures(captions, folder),
        "<h2>Tables</h2>",
        *(grid_element(grid) for grid in summaries(sweep)),
        *failures(Lost(len(sweep.trials), failed, sweep.missing(), again(sweep), _unknown(sweep))),
        *warnings(sweep.records),
        *_settings(sweep),
    ]
    return write_page(folder / "report.html", title(sweep), body)


def again(sweep: Sweep) -> str:
    """The line that runs what is missing or failed, in the same folder."""
    return shlex.join(
        ["hopdeq-lwpf", "sweep", str(Path(sweep.spec.out) / NAME), *import_flag(sweep.spec.as_dict())]
    )


def _unknown(sweep: Sweep) -> list[str]:
    """The trials that finished without a finite score."""
    score = sweep.spec.measures[0]
    known = [(trial, sweep.numbers(trial)) for trial in sweep.trials]
    return [
        f"{trial.name}, seed {trial.seed}" for trial, found in known if found and found.get(score) is None
    ]


def _settings(sweep: Sweep) -> list[str]:
    out, own = sweep.spec.out, settings_text(sweep.spec)
    file = Path(out) / NAME
    left = file.read_text(encoding="utf-8") if file.exists() else own
    found = (
        f"<details><summary>The trials above as a grid</summary><pre>{escape(own)}</pre></details>"
        if left != own
        else ""
    )
    return [
        "<h2>Settings, and how to run this again</h2>",
        f"<p>These are the settings, which <code>{escape(str(file))}</code> holds, too. With them</p>"
        f"<pre>{escape(again(sweep))}</pre><p>runs what the folder does not hold yet, and</p>"
        f"<pre>{escape(shlex.join(['hopdeq-lwpf', 'report', out]))}</pre><p>makes this page anew.</p>",
        f"<pre>{escape(left)}</pre>{found}",
        "<p>One trial alone, here the first:</p>",
        f"<pre>{escape(command(sweep, sweep.trials[0]))}</pre>",
        settings_element(public(sweep.spec)),
    ]
