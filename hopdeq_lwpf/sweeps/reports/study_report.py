"""What a study writes: its trials and results as tables, the pictures, and report.html, one self-contained page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml

from hopdeq_lwpf import plots
from hopdeq_lwpf.data import staged_folder
from hopdeq_lwpf.sweeps.engine.records import COSTS, MONITORS, SCORES, measures
from hopdeq_lwpf.sweeps.reports.page import figures, settings_element, table, write_page
from hopdeq_lwpf.sweeps.reports.sections import (
    Lost,
    failures,
    grid_element,
    train_command,
    versions,
    warnings,
)
from hopdeq_lwpf.sweeps.reports.settings_file import NAME, settings_text
from hopdeq_lwpf.sweeps.reports.study_plots import draw
from hopdeq_lwpf.sweeps.reports.study_results import KINDS, Study, findings, summaries
from hopdeq_lwpf.sweeps.reports.tables import latex, markdown_table, write_rows
from hopdeq_lwpf.sweeps.study_spec import TASKS, Trial, preset

TITLE = "One step against equilibrium in training, with and without forgetting"
NUMBERS = (
    "score", "score_best", "score_end", "train_score",
    *(f"{stage}/{name}" for stage in ("val", "train") for name in SCORES), *MONITORS, *COSTS,
)  # fmt: skip
WHAT = ("task", "forgetting", "steps", "adjoint", "inject", "seed", "hash", "folder")
GLOSSARY = {
    "val, train": "score on the bags held out, and on those of training (in training mode, with dropout)",
    "CPU s/epoch": "median CPU seconds of the training batches of an epoch, without validation; unlike the seconds "
    "by the clock (results.csv) they do not grow when the machine has other work",
    "MB saved": "10^6 bytes that autograd holds for the backward pass of the first batch, with the trained weights: "
    "each storage once, without the parameters; what a solver needed on the way is not in it",
    "steps mean, max": "of the training batches: mean over problems, largest of all",
    "converged %": "share of the problems whose last step changed no more than the tolerance allows",
    "adjoint steps": "mean steps of the solve for the gradient; '-' where nothing is solved",
    "support": "mean number of instances with a weight above 0, in validation",
    "forgot all %": "share of states that keep no instance and recall 0, in validation",
    "gradient": "mean norm of the gradient of all parameters, before clipping",
    "query gradient": "mean norm of the loss's gradient to the query: the learned states of a pooling layer, else the "
    "input of the layer; '-' where that is the data and has none",
}
METHOD = """Every trial is one run of <code>hopdeq-lwpf train</code> with the settings of the task and the unit, steps,
gradient, injection and seed of its condition. The seed sets initial weights, order of the data and dropout, so
that trials of one seed differ in the condition alone, and conditions are compared in pairs by seed. k steps
are k softmaxes, differentiated by ordinary autograd; converged solves for the equilibrium. Injection
<em>start</em>: the query is where the dynamics begin; <em>input</em>: it acts in every step. Intervals are
Student's over seeds; that of a paired difference is without 0 where the paired t test rejects equality. They
say how another seed would change the result, not how other data would, and are not corrected for their number, as
<em>p, Holm</em> is: the p of the paired t test after Holm's correction for all differences of the task.
Where a seed fails now and then, scores are far from normal: the interval then is wide, and may pass 0 or 1."""


def write_results(study: Study, folder: str | None = None) -> list[Path]:
    """Write everything about the trials that are there; returns the paths. A run ends with this, a report is this.

    folder: where to, that of the study by default. Either all files appear or none.
    """
    out = Path(folder or study.spec.out)
    with staged_folder(out) as staged:
        columns: dict[str, type] = {**dict.fromkeys(WHAT, str), "seed": int, **dict.fromkeys(NUMBERS, float)}
        rows = [
            _row(trial, record, study.spec.last_of(trial.condition.task))
            for trial, record in zip(study.trials, study.records, strict=True)
            if record is not None
        ]
        write_rows(rows, {**columns, "failure": str}, staged)
        (staged / "table.md").write_text(markdown(study), encoding="utf-8")
        (staged / "table.tex").write_text(
            "\n".join(latex(grid) for grid in summaries(study)), encoding="utf-8"
        )
        drawn = draw(study)
        for name, (_, figure) in drawn.items():
            plots.save_figure(figure, staged, name)
        write_report(study, {name: caption for name, (caption, _) in drawn.items()}, staged)
        names = sorted(path.name for path in staged.iterdir())
    return [out / name for name in names]


def _row(trial: Trial, record: Mapping[str, Any], last: int) -> dict[str, Any]:
    condition, failure = trial.condition, record["failure"]
    row: dict[str, Any] = {
        **{name: getattr(condition, name) for name in ("task", "forgetting", "adjoint", "inject")},
        "steps": str(condition.steps),
        **{"seed": trial.seed, "hash": trial.hash, "folder": record["folder"]},
    }
    if failure is not None:
        return {**row, "failure": f"{failure['error']}: {failure['message']}"}
    return {**row, **measures(record, last, TASKS[condition.task].score)}


def markdown(study: Study) -> str:
    """The tables and findings for a page of documentation."""
    parts = [f"# {TITLE}", "\n".join(f"- {sentence}" for sentence in findings(study))]
    parts += [f"**{grid.title}**\n\n{markdown_table(grid)}" for grid in summaries(study)]
    parts.append("\n".join(f"- *{name}*: {text}." for name, text in GLOSSARY.items()))
    parts.append(f"Versions: {versions(study.records)}.")
    return "\n\n".join(parts) + "\n"


def write_report(study: Study, captions: Mapping[str, str], folder: Path) -> Path:
    """Write report.html into `folder`, with NAME.svg from there for each NAME of `captions` drawn in."""
    grids = summaries(study)
    body = [
        f"<h1>{escape(TITLE)}</h1>",
        f'<p class="soft">{escape(_asked(study))}<br>{escape(versions(study.records))}</p>',
        "<h2>What the numbers say</h2>",
        "<ul>",
        *(f"<li>{escape(sentence)}</li>" for sentence in findings(study)),
        "</ul>",
        f"<details><summary>How it was measured</summary><p>{METHOD}</p></details>",
    ]
    for task in study.spec.task:
        own = {name: text for name, text in captions.items() if name.split("-", 1)[1] == task}
        body += [f"<h2>{escape(task)}</h2>", *figures(own, folder)]
        body += [grid_element(grid) for grid in grids if grid.title.startswith(f"{task}:")]
    body += [
        "<details><summary>What the columns mean</summary>",
        table(("column", "meaning"), GLOSSARY.items(), "glossary"),
        "<p>What is compared in pairs: " + "; ".join(escape(text) for text in KINDS.values()) + ".</p>",
        "</details>",
        *failures(Lost(len(study.trials), _failed(study), study.missing(), again(study), _unknown(study))),
        *warnings(study.records),
        *_settings(study),
    ]
    return write_page(folder / "report.html", TITLE, body)


def _asked(study: Study) -> str:
    spec = study.spec
    return (
        f"{len(spec.conditions())} conditions, {len(spec.seeds)} seeds, {len(study.trials)} trials; tasks "
        f"{', '.join(spec.task)}."
    )


def command(trial: Trial) -> str:
    """The line that runs a trial alone, into a folder of its own."""
    task = trial.condition.task
    return train_command(TASKS[task].preset, preset(task), trial.settings(), f"results/{trial.folder}")


def again(study: Study) -> str:
    """The line that runs what is missing or failed, in the same folder."""
    return shlex.join(["hopdeq-lwpf", "compare", "--config", str(Path(study.spec.out) / NAME)])


def _unknown(study: Study) -> list[str]:
    """The trials that finished without a finite score."""
    found = []
    for condition in study.spec.conditions():
        scores = dict(zip(study.spec.seeds, study.values(condition, "score"), strict=True))
        found += [
            f"{trial.name}, seed {trial.seed}"
            for trial, record in zip(study.trials, study.records, strict=True)
            if trial.condition == condition
            and record
            and record["failure"] is None
            and scores[trial.seed] != scores[trial.seed]
        ]
    return found


def _failed(study: Study) -> list[tuple[str, Mapping[str, Any], str]]:
    return [
        (f"{trial.name}, seed {trial.seed}", record, command(trial)) for trial, record in study.failures()
    ]


def _settings(study: Study) -> list[str]:
    settings = study.spec.as_dict()
    trial = study.trials[0]
    return [
        "<h2>Settings, and how to run this again</h2>",
        f"<p>These are the settings, which <code>{escape(str(Path(study.spec.out) / NAME))}</code> holds, too. "
        f"With them</p><pre>{escape(again(study))}</pre><p>runs what the folder does not hold yet, and</p>"
        f"<pre>{escape(shlex.join(['hopdeq-lwpf', 'report', study.spec.out]))}</pre><p>makes this page anew.</p>",
        f"<pre>{escape(settings_text(study.spec))}</pre>",
        "<p>One trial alone, here the first; the settings of each stand in <code>config.yaml</code> of its folder, "
        "for <code>hopdeq-lwpf train --config</code>:</p>",
        f"<pre>{escape(command(trial))}</pre>",
        *(
            f"<details><summary>Settings of the first trial of {escape(first.condition.task)}</summary><pre>"
            f"{escape(yaml.safe_dump(first.settings(), sort_keys=False, default_flow_style=None))}</pre></details>"
            for first in (
                next(t for t in study.trials if t.condition.task == task) for task in study.spec.task
            )
        ),
        settings_element(settings),
    ]
