"""What a sweep writes: results.csv, table.md, table.tex, the pictures, and report.html, one self-contained page."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml

from hopdeq_lwpf import plots, settings
from hopdeq_lwpf.data import replacing, staged_folder
from hopdeq_lwpf.sweeps.page import figures, settings_element, write_page
from hopdeq_lwpf.sweeps.sections import (
    failures,
    grid_element,
    markdown_table,
    train_command,
    versions,
    warnings,
)
from hopdeq_lwpf.sweeps.summary import Grid
from hopdeq_lwpf.sweeps.sweep_plots import draw
from hopdeq_lwpf.sweeps.sweep_results import Sweep, findings, summaries
from hopdeq_lwpf.sweeps.sweep_spec import SweepTrial

METHOD = """Every trial has the settings of the base and of its cell. The seed sets all that is drawn (initial weights,
order of the data, dropout; patterns and noise), so that trials of one seed differ in the cell alone, and cells are
compared in pairs by seed. Intervals are Student's over seeds; that of a paired difference is without 0 where the paired
t test rejects equality. They say how another seed would change the result, not how data that no seed draws
would, and are not corrected for their number. A ratio is that of the means over the seeds that both cells have."""


def write_results(sweep: Sweep) -> list[Path]:
    """Write everything about the trials that are there into the folder of the sweep; returns the paths.

    Either all files appear or none.
    """
    out = Path(sweep.spec.out)
    with staged_folder(out) as folder:
        _write_csv(sweep, folder / "results.csv")
        (folder / "table.md").write_text(markdown(sweep), encoding="utf-8")
        (folder / "table.tex").write_text(latex(summaries(sweep)[0]), encoding="utf-8")
        drawn = draw(sweep)
        for name, (_, figure) in drawn.items():
            plots.save_figure(figure, folder, name)
        _write_page(sweep, {name: caption for name, (caption, _) in drawn.items()}, folder)
        names = sorted(path.name for path in folder.iterdir())
    return [out / name for name in names]


def title(sweep: Sweep) -> str:
    """Of the report."""
    return sweep.spec.title or f"A sweep of {sweep.spec.base or sweep.spec.task}"


def _write_csv(sweep: Sweep, path: Path) -> None:
    """One row a trial; an empty cell is a number that is not known."""
    measured = list(dict.fromkeys(name for trial in sweep.trials for name in sweep.numbers(trial)))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*sweep.spec.factors(), "seed", "hash", "folder", *measured, "failure"])
        for trial, record in zip(sweep.trials, sweep.records, strict=True):
            if record is not None:
                failure = record["failure"]
                said = "" if failure is None else f"{failure['error']}: {failure['message']}"
                own = [level for _, level in trial.cell.levels]
                numbers = sweep.numbers(trial)
                found = [numbers.get(name) for name in measured]
                writer.writerow([*own, trial.seed, trial.hash, record["folder"], *found, said])


def markdown(sweep: Sweep) -> str:
    """The tables and findings for a page of documentation."""
    parts = [f"# {title(sweep)}", "\n".join(f"- {sentence}" for sentence in findings(sweep))]
    parts += [f"**{grid.title}**\n\n{markdown_table(grid)}" for grid in summaries(sweep)]
    return "\n\n".join([*parts, f"Versions: {versions(sweep.records)}."]) + "\n"


def latex(grid: Grid) -> str:
    """A table as a LaTeX tabular, with the rules of booktabs."""
    words = {"\\": "textbackslash", "<": "textless", ">": "textgreater", "|": "textbar"}
    escapes = {c: rf"\{name}{{}}" for c, name in words.items()}
    escapes |= {**{c: f"\\{c}" for c in "&%$#_{}"}, "~": r"\~{}", "^": r"\^{}"}

    def plain(line: tuple[str, ...]) -> str:
        cells = ["".join(escapes.get(c, c) for c in cell) for cell in line]
        # A bracket after the end of a row would be taken for its option.
        return "{}" * cells[0].startswith("[") + " & ".join(cells) + r" \\"

    body = [plain(grid.header), r"\midrule", *(plain(line) for line in grid.lines)]
    columns = "l" + "r" * (len(grid.header) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def command(sweep: Sweep, trial: SweepTrial) -> str:
    """The line that runs a trial alone, into a folder of its own."""
    base = sweep.spec.base
    if base is None:
        only = yaml.safe_dump([dict(trial.cell.levels)], default_flow_style=True, width=1e9).strip()
        words = ["hopdeq-lwpf", "sweep", "settings.yaml", "--seeds", str(trial.seed), "--only", only]
        return shlex.join([*words, "--out", f"results/{trial.folder}"])
    return train_command(base, settings.find("models", base), trial.settings(), f"results/{trial.folder}")


def _write_page(sweep: Sweep, captions: Mapping[str, str], folder: Path) -> Path:
    """Write report.html into `folder`, with NAME.svg from there for each NAME of `captions` drawn in."""
    spec = sweep.spec
    what = spec.base or spec.task
    asked = f"{len(spec.cells())} cells, {len(spec.seeds)} seeds, {len(sweep.trials)} trials of {what}."
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
        *figures(captions, folder),
        *(grid_element(grid) for grid in summaries(sweep)),
        *failures(failed, sweep.missing(), len(sweep.trials)),
        *warnings(sweep.records),
        *_settings(sweep),
    ]
    return write_page(folder / "report.html", title(sweep), body)


def _settings(sweep: Sweep) -> list[str]:
    text = yaml.safe_dump(sweep.spec.as_dict(), sort_keys=False, default_flow_style=None)
    return [
        "<h2>Settings, and how to run this again</h2>",
        "<p>Save these lines as <code>settings.yaml</code>, then <code>hopdeq-lwpf sweep settings.yaml</code>. Trials "
        "that the folder holds are not run again.</p>",
        f"<pre>{escape(text)}</pre>",
        "<p>One trial alone, here the first:</p>",
        f"<pre>{escape(command(sweep, sweep.trials[0]))}</pre>",
        settings_element(sweep.spec.as_dict()),
    ]
