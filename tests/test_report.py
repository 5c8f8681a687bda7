"""The report of a comparison: complete, self-contained, and safe to open."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from hopdeq_lwpf.data import load_digits
from hopdeq_lwpf.sweeps.compare import run
from hopdeq_lwpf.sweeps.reports.compare_report import write_report
from hopdeq_lwpf.sweeps.reports.summary import best_beta, findings, summaries
from hopdeq_lwpf.sweeps.reports.table import COLUMNS
from hopdeq_lwpf.sweeps.spec import CONVERGED, CompareSpec

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects attributes, text and tables, and checks that elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.text, self.ids = [], [], [], []
        self.rows = 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        self.rows += tag == "tr"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    spec = CompareSpec(
        stored=60,
        samples=12,
        forgetting=("none", "relu"),
        beta=(6.0, 40.0),
        mask=(0.2,),
        noise=(0.3,),
        flip=(),
        max_steps=4,  # too few at the soft beta, so that there is something to confess
        solver="picard",
        resamples=50,
        trajectories=3,
        out=str(tmp_path_factory.mktemp("study") / "out"),
    )
    comparison, paths = run(spec)
    return comparison, next(path for path in paths if path.name == "report.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere(study):
    page = Page(study[1])
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"link", "iframe", "object", "embed", "base"}
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
        assert not name.startswith("on"), (tag, name)
        if name == "style":
            assert "url(" not in value.replace("url(#", "")
    assert not re.search(r"@import|url\((?!#|\"#)", study[1])
    assert [tag for tag, name, _ in page.attributes if tag == "script"] == [
        "script",
        "script",
    ]  # data, no code


def test_names_in_the_page_are_unique_and_known(study):
    page = Page(study[1])
    assert len(page.ids) == len(set(page.ids))
    used = re.findall(r'(?:href="|url\()#([^")]+)', study[1])
    assert used
    assert set(used) <= set(page.ids)


def test_every_cell_and_column_is_listed(study):
    comparison, text = study
    body = text[text.index("Every cell") :]
    table = body[: body.index("</table>")]
    assert table.count("<tr>") == len(comparison.rows) + 1
    for name in COLUMNS:
        assert f"<th>{name}</th>" in table
        assert f"<td>{name}</td>" in body
    for row in comparison.rows:
        assert f"<td>{row['recall']:.3f} [{row['recall_low']:.3f}, {row['recall_high']:.3f}]</td>" in table


def test_what_did_not_converge_is_listed(study):
    comparison, text = study
    failed = [row for row in comparison.rows if row["steps"] == CONVERGED and row["max_steps"]]
    assert failed
    part = text[text.index("What did not converge") : text.index("Every cell")]
    assert part.count("<tr>") == len(failed) + 1
    count = sum(row["max_steps"] for row in failed)
    assert any(f"{count} of " in sentence for sentence in findings(comparison))
    grid = next(grid for grid in summaries(comparison) if grid.title.startswith("Converged runs"))
    assert sum(int(line[grid.header.index("not")]) for line in grid.lines) == count


def test_fixed_points_have_a_table_and_sentences(study):
    comparison, text = study
    grid = next(grid for grid in summaries(comparison) if grid.title.startswith("Fixed points"))
    assert f"<h3>{grid.title}</h3>" in text
    for line in grid.lines:
        entry = dict(zip(grid.header, line, strict=True))
        rows = [
            row
            for row in comparison.rows
            if row["steps"] == CONVERGED
            and (row["forgetting"] == "none") == (entry["forgetting"] == "no forgetting")
            and f"{row['beta']:g}" == entry["beta"]
        ]
        for name, column in (("single %", "single"), ("metastable %", "metastable"), ("global %", "global")):
            assert entry[name] == f"{100 * np.mean([row[column] for row in rows]):.1f}"
        # What no set uses is unused by each of them.
        assert int(entry["dead patterns"]) <= min(row["dead"] for row in rows)
        stored = rows[0]["stored"]
        assert entry["stored by condition"] == ("-" if np.isnan(stored) else f"{stored:g} of 60")
    said = " ".join(findings(comparison))
    assert "Contraction: spectral radius" in said
    assert "of 60 patterns" in said


def test_the_settings_run_again(study):
    comparison, text = study
    data = re.search(r'<script type="application/json" id="settings">(.*?)</script>', text)[1]
    assert CompareSpec(**json.loads(data)) == comparison.spec
    written = text[text.index("<pre>") + 5 : text.index("</pre>")]
    assert CompareSpec(**yaml.safe_load(written)) == comparison.spec
    for name, value in comparison.environment.items():
        assert f"<td>{name}</td><td>{value}</td>" in text


def test_names_of_files_are_escaped(tmp_path):
    name = "<script>alert(1)</script>&.npy"
    folder = tmp_path / "a"
    folder.mkdir()
    # A name may not hold a slash; the rest of the mischief is legal in a file name.
    path = folder / name.replace("/", "_")
    np.save(path, load_digits()[0][:10].numpy())
    out = tmp_path / "out"
    spec = CompareSpec(
        patterns=str(path),
        samples=3,
        beta=(40.0,),
        forgetting=("none",),
        steps=(1,),
        mask=(0.1,),
        noise=(),
        flip=(),
        resamples=10,
        out=str(out),
    )
    comparison, _ = run(spec)
    # Inside the page a name could even close an element.
    hostile = replace(comparison, spec=replace(spec, patterns="</script><script>alert(1)</script>"))
    for text in ((out / "report.html").read_text(), write_report(hostile, {}, tmp_path).read_text()):
        assert "<script>" not in text
        assert text.count("</script>") == 1
        Page(text)


def test_summaries_are_means_of_the_table(study):
    comparison, _ = study
    grid = summaries(comparison)[0]
    for line in grid.lines:
        unit, steps = line[0], line[1]
        for beta, cell in zip(comparison.spec.beta, line[2:], strict=True):
            shares = [
                row["recall"]
                for row in comparison.rows
                if (row["beta"], str(row["steps"])) == (beta, steps)
                and (row["forgetting"] == "none") == (unit == "no forgetting")
            ]
            assert cell.startswith(f"{100 * np.mean(shares):.1f} [")
    assert best_beta(comparison) == 40
    assert Path(comparison.spec.out).is_dir()
