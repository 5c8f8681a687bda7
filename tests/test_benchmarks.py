"""The suite of benchmarks: it runs, its table is whole, and its problems are what they say."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hopdeq_lwpf import retrieve
from hopdeq_lwpf.solvers import Termination

pytest.importorskip("benchmarks", reason="the wheel has no benchmarks")
pytest.importorskip("pytest_benchmark")

from benchmarks import peers  # noqa: E402
from benchmarks.problems import BETA, Stretched  # noqa: E402
from benchmarks.suite.large import plain_limit  # noqa: E402
from benchmarks.suite.measure import Counted  # noqa: E402
from benchmarks.suite.report import HEADINGS, markdown, shown  # noqa: E402
from benchmarks.suite.row import Case, Found, Row, Target, Timed  # noqa: E402

ROOT = Path(__file__).parents[1]
GROUPS = [
    "forward", "forward and backward", "one step", "overhead", "streaming", "streaming, mapped file", "screening",
    "scaling",
]  # fmt: skip
CASE = Case("forward", "easy", "default", 16, 4, 8, "float32", 1e-5)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """The folder that a run with tiny problems wrote."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--threads", "1", "--out", str(out)]
    # What a worker of xdist hands on would switch the measuring off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def told(ran) -> dict:
    return json.loads((ran / "bench.json").read_text(encoding="utf-8"))


def cells(text: str) -> list[list[str]]:
    """The table of a Markdown document, its headings first, read by hand."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [table[0], *table[2:]]


def test_every_group_has_its_rows_and_none_failed(told):
    assert list(dict.fromkeys(row["group"] for row in told["rows"])) == GROUPS
    assert told["failed"] == {}
    methods = {(row["group"], row["method"]) for row in told["rows"]}
    for name in ("default", "Picard", "Anderson", "plain loop", "torchdeq defaults", *peers.PEERS):
        assert ("forward", name) in methods or any(name in skipped for skipped in told["skipped"])
    assert all(reason for reason in told["skipped"].values())


def test_every_row_has_every_column_and_its_floor_and_residual(told):
    for row in told["rows"]:
        assert set(row) == set(HEADINGS)
        for name in ("ms", "floor_ms", "residual", "evaluations", "steps", "peak_mb"):
            assert isinstance(row[name], (int, float)), (name, row)
            assert math.isfinite(row[name])
        assert row["ms"] > 0
        assert row["floor_ms"] > 0
        if row["group"] == "forward and backward":
            assert row["gradient_error"] < 1e-2
        if row["group"] in ("forward", "screening", "streaming"):
            assert row["residual"] <= 1.5 * row["tolerance"], row  # one evaluation more, in another rounding
            assert row["elsewhere"].startswith("0 of ")


def test_the_table_says_where_and_with_what_it_was_measured(told):
    names = (
        "date",
        "machine",
        "processor",
        "python",
        "torch",
        "torchdeq",
        "numpy",
        "threads",
        "load average at start",
    )
    assert all(told["about"][name] for name in names)
    assert told["about"]["threads"] == 1
    assert (
        told["about"]["torch"] == torch.__version__.partition("+")[0]
        or told["about"]["torch"] == torch.__version__
    )


def test_markdown_and_json_agree(ran, told):
    heading, *lines = cells((ran / "bench.md").read_text(encoding="utf-8"))
    assert heading == list(HEADINGS.values())
    assert len(lines) == len(told["rows"])
    for line, row in zip(lines, told["rows"], strict=True):
        for cell, name in zip(line, HEADINGS, strict=True):
            if row[name] is None:
                assert cell == "-"
            elif isinstance(row[name], float):
                # Three digits.
                assert float(cell) == pytest.approx(row[name], rel=5.1e-3)
            else:
                assert cell == str(row[name])


def test_a_study_that_does_not_exist_is_named(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "nonsense", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no study 'nonsense'" in done.stderr
    assert "basins" in done.stderr


def test_a_part_of_the_table_is_written_only_where_one_asks(tmp_path, monkeypatch):
    from benchmarks import __main__ as command
    from benchmarks.suite import run

    asked = []
    monkeypatch.setattr(run, "run_suite", lambda *given: asked.append(given) or 0)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    # The command sets it for the suite that it loads.
    monkeypatch.setenv("HOPDEQ_LWPF_QUICK", "0")
    for options in (
        ["--rows", "one_step"],
        ["--quick"],
        ["--rows", "x", "--out", str(tmp_path / "mine")],
        [],
    ):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *options])
        assert command.main() == 0
    assert asked == [
        (None, 2, "one_step"),
        (None, 2, ""),
        (tmp_path / "mine", 2, "x"),
        (tmp_path / "results", 2, ""),
    ]


def test_a_row_computes_floor_overhead_and_verdicts():
    found = Found(steps=4.0, evaluations=5.0, residual=1e-6, products=2.0, elsewhere=1, judged=4)
    timed = Timed(ms=13.0, iqr=0.5, f_ms=1.0, product_ms=2.5, beside_ms=26.0)
    targets = (Target("overhead", 0.31), Target("relative", 0.4))
    record = Row(CASE, found, timed, 3.0, targets).record()
    assert record["floor_ms"] == 10.0
    assert record["overhead"] == pytest.approx(0.3)
    assert record["step_us"] == pytest.approx(750.0)
    assert record["relative"] == 0.5
    assert record["elsewhere"] == "1 of 4"
    assert record["target"] == "overhead <= 0.31: met; relative <= 0.4: missed"


def test_what_failed_stands_in_the_document():
    told = {
        "about": {},
        "rows": [],
        "skipped": {"gpu": "no device"},
        "failed": {"forward": "first\nlast line"},
    }
    text = markdown(told)
    assert "- gpu: no device" in text
    assert "- forward: last line" in text
    assert shown(None) == "-"
    assert shown(0.123456) == "0.123"


def test_the_oracle_finds_the_first_iteration_that_suffices():
    def f(z):
        return 0.5 * z + 1.0

    z0 = torch.zeros(3, 2, dtype=torch.float64)
    # The k-th iterate is 2 - 2^(1 - k); f moves it by 2^-k, so that the first of a residual below 1e-3 is the ninth.
    ran = peers.measure("torchdeq fixed point", f, z0, 1e-3)
    assert ran is not None
    assert ran.unconverged == 0
    assert torch.equal(ran.state, torch.full_like(z0, 2 - 2.0**-8))
    assert ran.worst == pytest.approx(2.0**-9 / (2 - 2.0**-9))
    before = peers.measure("torchdeq fixed point", f, z0, 2.1 * ran.worst)
    assert before is not None
    assert before.iterations == ran.iterations - 1
    never = peers.measure("torchdeq fixed point", lambda z: z + 1.0, z0, 1e-9)
    assert never is not None
    assert never.unconverged == 3
    assert never.iterations == peers.LIMIT


def test_evaluations_and_products_are_counted_by_queries():
    counted = Counted(lambda z: 2 * z, 4)
    z = torch.ones(4, 3, requires_grad=True)
    image = counted(z) + counted(z[:2]).sum()
    assert counted.evaluations == 1.5
    (gradient,) = torch.autograd.grad(image.sum(), z)
    assert counted.products == 1.5
    assert torch.equal(
        gradient, torch.where(torch.arange(4)[:, None] < 2, 2.0 + 4 * 3 * 2.0, 2.0).expand(4, 3)
    )


def test_stretched_clusters_contract_as_they_say():
    made = Stretched(8_000, 32, 4)
    patterns = torch.cat(list(made.blocks())).double()
    centres, stretch = (part.double() for part in made.centres())
    assert patterns.shape == (8_000, 32)
    assert torch.allclose(centres.norm(dim=-1), torch.full((4,), 1.5, dtype=torch.float64))
    assert (centres * stretch).sum(-1).abs().max() < 1e-6
    for number, rate in enumerate((0.5, 0.5 + 0.4 / 3, 0.5 + 0.8 / 3, 0.9)):
        own = patterns[number::4]
        spread = own - own.mean(0)
        # 2,000 draws of a uniform distribution: its variance is off by some two per cent.
        top = BETA * float(torch.linalg.eigvalsh(spread.T @ spread / len(own))[-1])
        assert top == pytest.approx(rate, rel=0.06)
    query, which = made.queries(16)
    nearest = torch.cdist(query.double(), centres).argmin(-1)
    assert torch.equal(nearest, which)


def test_the_end_of_plain_iteration_is_that_of_our_picard():
    made = Stretched(600, 16, 3)
    patterns, (query, which) = torch.cat(list(made.blocks())).double(), made.queries(6)
    stop = Termination(rtol=1e-9, max_steps=5000)
    found = retrieve(query.double(), patterns, beta=BETA, solver="picard", stop=stop).require()
    end = plain_limit(patterns, query)
    # Residual 1e-6 at a contraction of .9.
    assert torch.allclose(end, found.state, atol=3e-5)
    own = torch.stack([patterns[int(cluster) :: 3] for cluster in which])
    alone = retrieve(query.double(), own, beta=BETA, solver="picard", stop=stop).require()
    assert torch.allclose(plain_limit(own, query), alone.state, atol=3e-5)
