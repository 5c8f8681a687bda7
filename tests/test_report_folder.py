"""`hopdeq-lwpf report` and `sweep --dry-run`: whatever a folder holds, finished or not; nothing is run."""

import csv
import importlib.util
import json
import math
import re
import shlex
import sys
import types
from dataclasses import replace
from html import unescape
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import yaml

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.cli import main
from hopdeq_lwpf.sweeps.engine.records import TRIALS, add_record
from hopdeq_lwpf.sweeps.estimate import duration, plan
from hopdeq_lwpf.sweeps.reports import tables
from hopdeq_lwpf.sweeps.reports.settings_file import leave_settings, read_settings, settings_text
from hopdeq_lwpf.sweeps.reports.spec import ReportSpec
from hopdeq_lwpf.sweeps.reports.sweep_plots import LINES, cost_measure, distributions, draw, shown
from hopdeq_lwpf.sweeps.reports.sweep_report import again, command, write_results
from hopdeq_lwpf.sweeps.reports.sweep_results import pairs, summaries
from hopdeq_lwpf.sweeps.study_spec import StudySpec
from hopdeq_lwpf.sweeps.sweep import load
from hopdeq_lwpf.sweeps.sweep_spec import SweepSpec

VERSIONS = {"torch": "2.13.0"}
FAILURE = {"error": "RuntimeError", "message": "no <room> left", "traceback": "Traceback:\n  <here>\n"}
SMALL = {
    "base": "train_digits",
    "grid": {"steps": {"one": {"model.steps": 1}, "two": {"model.steps": 2}}, "learning_rate": [0.01, 0.02]},
    "seeds": [0, 1, 2],
    "measures": ["val/accuracy", "epoch_cpu_seconds", "steps"],
}


def score_of(trial):
    """A made-up accuracy: seeds differ by more than levels do."""
    steps, rate = (level for _, level in trial.cell.levels)
    wobble = 0.001 * ((7 * trial.seed + sum(map(ord, trial.cell.name))) % 5)
    return 0.5 + 0.1 * trial.seed + 0.02 * (steps == "two") + 0.01 * (rate == "0.02") + wobble


def record_of(trial, **more):
    course = [score_of(trial) - 0.1, score_of(trial)]
    return {
        "format": 1,
        "hash": trial.hash,
        "cell": dict(trial.cell.levels),
        "seed": trial.seed,
        "folder": f"trials/{trial.folder}",
        "curves": {"val/accuracy": course, "steps": [3.0, 5.0], "residual_max": [1e-3, 1e-5]},
        "costs": {"epoch_cpu_seconds": 1.0 + trial.seed, "seconds": 2.0},
        "warnings": [],
        "versions": VERSIONS,
        "failure": None,
        "run_seconds": 10.0 if "one" in trial.cell.name else 30.0,
        "settings": trial.settings(),
        **more,
    }


def folder_of(path, what=record_of, **changed):
    """A folder with the records `what` makes of its trials; None is a trial that was not run."""
    spec = SweepSpec(**{**SMALL, **changed}, out=str(path))
    path.mkdir(parents=True, exist_ok=True)
    leave_settings(spec)
    for trial in spec.trials():
        record = what(trial)
        if record is not None:
            add_record(path / TRIALS, record)
    return spec


def files(path):
    """Every file that a report writes, as bytes; without those of the run itself."""
    own = ("settings.yaml", TRIALS)
    return {
        each.name: each.read_bytes() for each in path.iterdir() if each.is_file() and each.name not in own
    }


# --- one code path


def test_the_report_of_a_folder_is_what_the_run_wrote(tmp_path, capsys):
    spec = folder_of(tmp_path / "a")
    written = {path.name for path in write_results(load(spec))}
    before = files(tmp_path / "a")
    assert main(["report", spec.out, "--out", str(tmp_path / "b")]) == 0
    assert files(tmp_path / "b") == before
    assert set(before) == written
    assert main(["report", "--study", spec.out]) == 0
    assert files(tmp_path / "a") == before
    shown = capsys.readouterr().out
    assert "Trials: 12 of 12 finished" in shown
    for name in written:
        assert str(tmp_path / "b" / name) in shown


def test_a_study_is_reported_likewise(tmp_path):
    spec = StudySpec(forgetting=("none",), steps=(1,), seeds=(0, 1), epochs=1, out=str(tmp_path / "a"))
    leave_settings(spec)
    found = read_settings(spec.out)
    assert found == spec
    assert main(["report", spec.out, "--out", str(tmp_path / "b")]) == 0
    page = (tmp_path / "b" / "report.html").read_text()
    assert "failed: 0; not run: 2" in page
    assert main(["report", spec.out, "--baseline", "steps=1"]) == 2


# --- what is not whole


@pytest.fixture
def partial(tmp_path):
    """Twelve trials: one failed, one without a score, two not run."""

    def what(trial):
        place = [t.hash for t in SweepSpec(**SMALL, out=str(tmp_path)).trials()].index(trial.hash)
        if place in (5, 6):
            return None
        if place == 1:
            return record_of(trial, curves={}, costs={}, failure=FAILURE)
        if place == 2:
            return record_of(trial, curves={"val/accuracy": [0.5, None]})
        return record_of(trial)

    return folder_of(tmp_path / "a", what)


def test_what_failed_is_listed_with_the_lines_that_run_it(partial, capsys):
    assert main(["report", partial.out]) == 0
    assert "Trials: 9 of 12 finished, 1 failed, 2 not run" in capsys.readouterr().out
    page = unescape((Path(partial.out) / "report.html").read_text())
    sweep = load(partial)
    ((failed, _),) = sweep.failures()
    assert "failed: 1; not run: 2" in page
    assert "RuntimeError: no <room> left" in page
    assert "Traceback:\n  <here>" in page
    assert command(sweep, failed) in page
    assert again(sweep) in page
    unknown = [t for t in sweep.trials if t.hash == partial.trials()[2].hash]
    assert (
        f"NaN, or none), and counted nowhere: 1.</p><p>{unknown[0].name}, seed {unknown[0].seed}</p>" in page
    )
    assert "torch 2.13.0" in page
    # The line runs what is missing, and nothing else.
    assert main([*shlex.split(again(sweep))[1:], "--dry-run"]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "9 finished, 1 failed, 2 never run; 3 to run" in said


def test_a_trial_without_a_score_counts_nowhere(partial):
    sweep = load(partial)
    cell, seed = sweep.trials[2].cell, sweep.trials[2].seed
    assert math.isnan(sweep.values(cell, "val/accuracy")[partial.seeds.index(seed)])
    for pair in pairs(sweep):
        assert pair.seeds == 3 - len({1, 2, 5, 6} & _places(sweep, pair))


def _places(sweep, pair):
    """Places of the trials of both cells."""
    return {place for place, trial in enumerate(sweep.trials) if trial.cell in (pair.cell, pair.first)}


def test_an_empty_folder_has_a_report_without_numbers(tmp_path):
    spec = folder_of(tmp_path / "a", lambda trial: None)
    assert main(["report", spec.out]) == 0
    page = (tmp_path / "a" / "report.html").read_text()
    assert "failed: 0; not run: 12" in page
    assert "<svg" not in page


def test_one_seed_has_no_interval_and_says_so(tmp_path, capsys):
    spec = folder_of(tmp_path / "a", seeds=[4])
    assert main(["report", spec.out]) == 0
    assert "There is one seed, so that no number has an interval" in capsys.readouterr().out
    grid, gaps = summaries(load(spec))
    assert not any("[" in cell for line in grid.lines for cell in line)
    header = gaps.header
    for line in gaps.lines:
        assert {line[header.index(name)] for name in ("p, paired t", "p, Holm", "p, sign flips")} == {"-"}


def test_two_hundred_cells_are_all_in_the_table_and_the_ends_in_the_picture(tmp_path):
    grid = {"learning_rate": [n / 1000 for n in range(1, 101)], "steps": SMALL["grid"]["steps"]}

    def what(trial):
        return record_of(trial, curves={"val/accuracy": [float(trial.cell.level("learning_rate"))]})

    spec = SweepSpec(
        **{**SMALL, "grid": grid, "seeds": [0], "measures": ["val/accuracy"]}, out=str(tmp_path / "a")
    )
    leave_settings(spec)
    (tmp_path / "a" / TRIALS).write_text("".join(json.dumps(what(t)) + "\n" for t in spec.trials()))
    sweep = load(spec)
    cells, said = shown(sweep, "val/accuracy")
    assert len(cells) <= LINES
    assert "15 with the highest" in said
    assert {cell.level("learning_rate") for cell in cells} == {
        f"{n / 1000:g}" if n != 100 else "0.1" for n in (*range(1, 9), *range(93, 101))
    }
    assert main(["report", spec.out]) == 0
    page = (tmp_path / "a" / "report.html").read_text()
    table = page[
        page.index("Mean over the seeds") : page.index("</table>", page.index("Mean over the seeds"))
    ]
    assert table.count("<tr>") == 201
    assert 'class="tall"' in page


# --- tests in pairs


def test_pairs_are_taken_against_the_named_level(tmp_path, capsys):
    spec = folder_of(tmp_path / "a", baseline={"steps": "two"})
    found = [(pair.cell.name, pair.first.name) for pair in pairs(load(spec)) if pair.factor == "steps"]
    assert found == [("one 0.01", "two 0.01"), ("one 0.02", "two 0.02")]
    assert main(["report", spec.out, "--baseline", "learning_rate=0.02", "steps=one"]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "learning_rate: against '0.02' the val accuracy" in said
    assert "steps: against 'one'" in said
    assert main(["report", spec.out, "--baseline", "steps=three"]) == 2
    assert "'steps' has no level 'three'" in capsys.readouterr().err
    with pytest.raises(SpecError, match="needs one level"):
        SweepSpec(**SMALL, baseline={"steps": ["one", "two"]})


def test_the_correction_is_for_all_pairs_of_the_sweep(tmp_path):
    found = pairs(load(folder_of(tmp_path / "a")))
    assert len(found) == 4
    ps = sorted(pair.p for pair in found if not math.isnan(pair.p))
    assert ps
    smallest = min(found, key=lambda pair: pair.p if not math.isnan(pair.p) else 2)
    assert smallest.adjusted == pytest.approx(min(1, len(ps) * ps[0]))
    assert all(pair.flips >= 0.25 for pair in found)  # 2 / 2^3


# --- pictures


def test_costs_and_distributions_are_those_of_the_records(tmp_path):
    sweep = load(folder_of(tmp_path / "a"))
    assert cost_measure(sweep) == "epoch_cpu_seconds"
    spread = distributions(sweep)
    assert {
        name: {cell: sorted(values) for cell, values in each.items()} for name, each in spread.items()
    } == {
        "steps": {name: [3.0] * 3 + [5.0] * 3 for name in ("one 0.01", "one 0.02", "two 0.01", "two 0.02")},
        "residual_max": {
            name: [1e-5] * 3 + [1e-3] * 3 for name in ("one 0.01", "one 0.02", "two 0.01", "two 0.02")
        },
    }
    drawn = draw(sweep)
    assert set(drawn) == {"measures", "cost", "distributions"}
    axes = drawn["cost"][1].axes[0]
    points = {
        (line.get_xdata()[0], round(line.get_ydata()[0], 6))
        for line in axes.lines
        if len(line.get_xdata()) == 1
    }
    expected = {(2.0, round(float(sweep.interval(cell, "val/accuracy").mean), 6)) for cell in sweep.cells()}
    assert points == expected


# --- tables


def test_a_factor_may_have_the_name_of_a_measure(tmp_path):
    spec = folder_of(tmp_path / "a")
    assert main(["report", spec.out]) == 0
    with (tmp_path / "a" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["steps"] for row in rows} == {"one", "two"}
    assert {row["steps (measured)"] for row in rows} == {"5.0"}
    assert [float(row["val/accuracy"]) for row in rows] == pytest.approx(
        [score_of(t) for t in spec.trials()], rel=1e-5
    )


def test_latex_has_a_table_of_cells_and_one_of_pairs(tmp_path):
    spec = folder_of(tmp_path / "a")
    main(["report", spec.out])
    for name, grid in zip(("table.tex", "pairs.tex"), summaries(load(spec)), strict=True):
        text = (tmp_path / "a" / name).read_text()
        assert text.startswith(r"\begin{tabular}{l")
        assert text.count("&") == (len(grid.lines) + 1) * (len(grid.header) - 1)
        assert r"\toprule" in text


def test_without_pyarrow_one_line_says_so(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "pyarrow" else real(name, *more)
    )
    spec = folder_of(tmp_path / "a")
    assert main(["report", spec.out]) == 0
    assert "pip install 'hopdeq-lwpf[parquet]'" in capsys.readouterr().out
    assert not (tmp_path / "a" / tables.PARQUET).exists()


def test_parquet_holds_what_the_csv_holds(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    spec = folder_of(tmp_path / "a")
    assert main(["report", spec.out]) == 0
    found = parquet.read_table(tmp_path / "a" / tables.PARQUET).to_pydict()
    with (tmp_path / "a" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(found) == list(rows[0])
    assert found["seed"] == [int(row["seed"]) for row in rows]
    assert found["val/accuracy"] == [float(row["val/accuracy"]) for row in rows]


# --- settings of a folder


def test_a_folder_without_settings_is_read_by_its_report_or_by_a_file(tmp_path, capsys):
    spec = folder_of(tmp_path / "a")
    (tmp_path / "a" / "settings.yaml").rename(tmp_path / "mine.yaml")
    assert main(["report", spec.out]) == 2
    assert "--settings FILE" in capsys.readouterr().err
    assert main(["report", spec.out, "--settings", str(tmp_path / "mine.yaml")]) == 0
    (tmp_path / "mine.yaml").unlink()
    assert main(["report", spec.out]) == 0  # the page of the last line holds the settings
    assert read_settings(spec.out) == spec


def test_a_folder_that_was_moved_is_reported_where_it_is(tmp_path):
    spec = folder_of(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    found = read_settings(str(tmp_path / "b"))
    assert found == replace(spec, out=str(tmp_path / "b"))
    assert load(found).missing() == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: train_digits\ngrid: {}\nsedes: [1]\n", ":3: unknown key 'sedes'. Did you mean 'seeds'?"),
        ("beta: [1.0]\n", "holds no settings of a sweep"),
        ("grid:\n\tx: 1\n", ":2: a tab"),
    ],
)
def test_settings_of_something_else_are_refused(text, message, tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "study is missing"),
        (["nowhere"], "is no folder"),
        ([".", "--baseline", "x"], "needs FACTOR=LEVEL"),
        ([".", "--port", "0"], "port must be"),
        ([".", "--lvie"], "did you mean '--live'"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["report", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_trials_of_other_settings_are_counted_and_not_shown(tmp_path, capsys):
    spec = folder_of(tmp_path / "a")
    leave_settings(replace(spec, seeds=(0,)))
    assert main(["report", spec.out]) == 0
    assert "The folder holds 8 trials of other settings" in capsys.readouterr().out


def test_settings_read_back_without_the_password(tmp_path):
    spec = SweepSpec(**SMALL, out=str(tmp_path), storage="postgresql://me:se:cret@host:5432/studies")
    text = settings_text(spec)
    assert "cret" not in text
    assert yaml.safe_load(text)["storage"] == "postgresql://me@host:5432/studies"
    odd = replace(spec, storage="postgresql://me:se@cr/et@host/studies")
    assert yaml.safe_load(settings_text(odd))["storage"] == "postgresql://me@host/studies"
    plain = replace(spec, storage="postgresql://me@host/studies")
    assert SweepSpec(**yaml.safe_load(settings_text(plain))) == plain


# --- the dashboard


def test_the_dashboard_is_an_extra(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "optuna_dashboard" else real(name, *more),
    )
    assert main(["report", folder_of(tmp_path / "a").out, "--live"]) == 2
    assert "pip install 'hopdeq-lwpf[dashboard]'" in capsys.readouterr().err


def test_the_dashboard_is_served_to_this_machine_alone(tmp_path, monkeypatch, capsys):
    calls = []
    module = types.ModuleType("optuna_dashboard")
    module.__spec__ = ModuleSpec("optuna_dashboard", None)
    module.run_server = lambda storage, **more: calls.append((storage, more))
    monkeypatch.setitem(sys.modules, "optuna_dashboard", module)
    spec = folder_of(tmp_path / "a")
    assert main(["report", spec.out, "--live"]) == 2
    assert "study.db is not there" in capsys.readouterr().err
    (tmp_path / "a" / "study.db").write_bytes(b"")
    assert main(["report", spec.out, "--live", "--port", "9000"]) == 0
    assert calls == [(f"sqlite:///{tmp_path / 'a' / 'study.db'}", {"host": "127.0.0.1", "port": 9000})]
    assert ReportSpec(study="x").port == 8080


# --- dry run


def test_a_dry_run_runs_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["sweep", "goemaere_table2_quick", "--dry-run", "--out", str(out), "--seeds", "0", "1"]
    assert main(words) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "10 cells, 2 seeds (0, 1), 20 trials of train_ham_mnist." in said
    assert "is not there yet; 20 to run." in said
    assert "No basis for an estimate" in said
    assert not out.exists()


def test_the_estimate_is_that_of_the_finished_trials(tmp_path):
    """Cells of step one took 10 s, those of two 30 s; of two 0.02 nothing is known."""

    def what(trial):
        return record_of(trial) if trial.seed == 0 and trial.cell.name != "two 0.02" else None

    spec = folder_of(tmp_path / "a", what, workers=2)
    grids, said = plan(spec)
    # Left: 2 x 10 + 2 x 10 + 2 x 30 s, and 3 of their mean, 50 / 3 s; or of the least, 10 s.
    assert "9 to run" in said[1]
    assert f"About {duration((100 + 50) / 2)} on 2 workers, by the finished trials of 3 cells" in said[2]
    assert re.search(rf"quickest, {duration((100 + 30) / 2)}\)", said[2])
    assert [line[-1] for line in grids[0].lines] == ["10 s", "10 s", "30 s", "-"]
    assert "Nothing is left to run" in plan(folder_of(tmp_path / "b"))[1][2]


def test_many_workers_do_not_share_a_trial(tmp_path):
    spec = folder_of(tmp_path / "a", lambda t: record_of(t) if t.seed else None, workers=50)
    assert "About 30 s on 50 workers" in plan(spec)[1][2]


def test_a_dry_run_finds_mistakes(tmp_path, capsys):
    spec = SweepSpec(**{**SMALL, "set": {"model.hiden": 3}}, out=str(tmp_path / "a"))
    with pytest.raises(SpecError, match="'hidden'"):
        plan(spec)
    with pytest.raises(SpecError, match="measures.*Did you mean 'val/accuracy'"):
        plan(SweepSpec(**{**SMALL, "measures": ["val/acuracy"]}, out=str(tmp_path / "a")))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3.21, "3.2 s"), (42.0, "42 s"), (300.0, "5 min"), (9000.0, "2.5 h"), (259200.0, "3 days")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said
