"""A sweep: the grid that was asked for, each trial once, tables that are right, and mistakes that are said."""

import csv
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from hopdeq_lwpf import find, solvers
from hopdeq_lwpf.cli import main
from hopdeq_lwpf.plots import save_figure
from hopdeq_lwpf.settings import names
from hopdeq_lwpf.sweeps.engine.records import TRIALS, add_record
from hopdeq_lwpf.sweeps.reports.statistics import t_interval
from hopdeq_lwpf.sweeps.reports.summary import Grid
from hopdeq_lwpf.sweeps.reports.sweep_plots import draw
from hopdeq_lwpf.sweeps.reports.sweep_report import command, markdown
from hopdeq_lwpf.sweeps.reports.sweep_results import findings, pairs, summaries
from hopdeq_lwpf.sweeps.reports.tables import latex
from hopdeq_lwpf.sweeps.study_spec import numbers_of
from hopdeq_lwpf.sweeps.sweep import load, run, run_trials
from hopdeq_lwpf.sweeps.sweep_spec import SpecError, SweepSpec
from hopdeq_lwpf.training import TrainSpec

PICTURES = ("measures", "cost", "distributions", "residuals", "not_converged")
GRID = {
    "form": {"one matrix": {"model.even_odd": False}, "even-odd": {"model.even_odd": True}},
    "model.damping": [0.0, 0.2],
}
SMALL = {
    "base": "train_ham_mnist",
    "set": {
        "data": {"data": "digits", "batch_size": 64},
        "model.layers": [64, 12, 10],
        "epochs": 1,
        "limit_batches": 4,
        "iterations": {"budget": 10, "every": 1},
    },
    "grid": GRID,
    "seeds": [0, 1],
    "measures": ["val/accuracy", "iterations_published", "not_converged"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Eight trainings of a moment each, by two processes."""
    spec = SweepSpec(**SMALL, out=str(tmp_path_factory.mktemp("sweep") / "out"))
    return spec, *run(spec)


# --- what is asked for


def test_settings_are_changed_in_the_order_base_set_grid_rules():
    spec = SweepSpec(
        base="train_ham_mnist",
        set={"learning_rate": 0.5, "model.rtol": 1e-3, "data.batch_size": 7},
        grid={"speed": {"slow": {"learning_rate": 0.1}, "fast": {}}, "model.damping": [0.0, 0.2]},
        rules=[{"where": {"speed": "slow", "model.damping": [0.2]}, "set": {"learning_rate": 0.05}}],
        seeds=[4],
    )
    found = {trial.cell.levels: trial.given for trial in spec.trials()}
    rates = {tuple(level for _, level in levels): train.learning_rate for levels, train in found.items()}
    assert rates == {("slow", "0.0"): 0.1, ("slow", "0.2"): 0.05, ("fast", "0.0"): 0.5, ("fast", "0.2"): 0.5}
    base = find("models", "train_ham_mnist")
    for levels, train in found.items():
        assert train.model == {**base["model"], "rtol": 1e-3, "damping": float(dict(levels)["model.damping"])}
        assert train.data == {**base["data"], "batch_size": 7}
        assert (train.seed, train.epochs, train.iterations["budget"]) == (4, 10, 40)


def test_a_mapping_with_its_name_replaces_and_one_without_adds():
    base = {"base": "train_ham_mnist", "seeds": [0]}
    (trial,) = SweepSpec(**base, set={"data": {"data": "digits", "batch_size": 8}}).trials()
    assert trial.given.data == {"data": "digits", "batch_size": 8}
    (trial,) = SweepSpec(**base, set={"data": {"batch_size": 8}}).trials()
    assert trial.given.data == {**find("models", "train_ham_mnist")["data"], "batch_size": 8}


def test_exclude_and_only_choose_cells():
    grid = {"model.damping": [0.0, 0.1, 0.2], "learning_rate": [0.1, 0.2]}
    spec = SweepSpec(
        base="train_digits_ham", grid=grid, exclude=[{"model.damping": 0.1, "learning_rate": 0.2}]
    )
    assert [cell.name for cell in spec.cells()] == ["0.0 0.1", "0.0 0.2", "0.1 0.1", "0.2 0.1", "0.2 0.2"]
    some = replace(spec, only=[{"learning_rate": 0.2}, {"model.damping": [0.1]}])
    assert [cell.name for cell in some.cells()] == ["0.0 0.2", "0.1 0.1", "0.2 0.2"]
    assert {trial.hash for trial in some.trials()} < {trial.hash for trial in spec.trials()}


def test_trials_are_known_by_their_settings_and_seeds_are_outermost():
    spec = SweepSpec(**SMALL)
    trials = spec.trials()
    assert [trial.seed for trial in trials] == [0] * 4 + [1] * 4
    assert len({trial.hash for trial in trials}) == 8
    again = SweepSpec(**{**SMALL, "title": "another", "workers": 1, "measures": ["val/loss"], "out": "x"})
    assert [trial.hash for trial in again.trials()] == [trial.hash for trial in trials]
    # The same number under another factor is the same training.
    other = SweepSpec(**{**SMALL, "grid": {"f": {"a": {"model.even_odd": True, "model.damping": 0.2}}}})
    assert other.trials()[0].hash in {trial.hash for trial in trials}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"base": "train_ham_mnits"},
            "base 'train_ham_mnits' is not one of .*Did you mean 'train_ham_mnist'",
        ),
        ({"base": None}, "base is missing: .*'train_ham_mnist'"),
        ({"task": "trian"}, "task 'trian' is not one of .*Did you mean 'train'"),
        ({"task": "sdm"}, "base is for task 'train'"),
        ({"x": "forms"}, "'forms' is no factor of the grid. Did you mean 'form'"),
        ({"x": "form"}, "level 'one matrix' of 'form' is no number"),
        ({"grid": {"learning_rat": [1]}}, "'learning_rat' is no setting of task .train.. Did you mean"),
        ({"grid": {"a": {"b": {"model.x": 1, "epoch": 2}}}}, "grid.a: 'epoch' is no setting"),
        ({"grid": {"epochs": []}}, "grid.epochs is empty"),
        ({"grid": {"epochs": 3}}, "must be a list of values or a mapping"),
        ({"grid": {"epochs": [3, 3]}}, "grid.epochs names a value twice"),
        ({"grid": {"a": {"b": 3}}}, "grid.a.b must be a mapping"),
        ({"set": {"seed": 3}}, "'seed' is seen to by the sweep; use seeds"),
        ({"set": {"epochs.x": 3}}, "'epochs' is one value and has no 'x'"),
        ({"rules": [{"where": {}}]}, "rules\\[0\\] needs the keys"),
        ({"rules": [{"where": {"forms": "a"}, "set": {}}]}, "'forms' is no factor .*Did you mean 'form'"),
        ({"exclude": [{"form": "evenodd"}]}, "no level 'evenodd', but .*Did you mean 'even-odd'"),
        ({"exclude": [{}]}, "leave no cell"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1, 1]}, "seeds names a value twice"),
        ({"seeds": [-1]}, "at least 0"),
        ({"workers": 0}, "workers must be"),
        ({"confidence": 1.0}, "confidence must be"),
        ({"out": ""}, "out is empty"),
    ],
)
def test_mistakes_are_said_before_anything_runs(changed, said):
    with pytest.raises(SpecError, match=said):
        SweepSpec(**{**SMALL, **changed})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"set": {**SMALL["set"], "model.dampin": 0.1}}, "'dampin' .*Did you mean 'damping'"),
        ({"set": {**SMALL["set"], "epochs": 0}}, "cell 'one matrix 0.0': epochs must be"),
        ({"measures": ["val/acuracy"]}, "'val/acuracy' is not one of .*Did you mean 'val/accuracy'"),
    ],
)
def test_mistakes_in_what_is_trained_leave_no_folder(changed, said, tmp_path):
    spec = SweepSpec(**{**SMALL, **changed}, out=str(tmp_path / "out"))
    with pytest.raises(SpecError, match=said):
        run_trials(spec)
    assert not (tmp_path / "out").exists()


# --- what comes of it


def test_every_trial_is_recorded_once_and_nothing_is_run_again(finished, monkeypatch):
    spec, sweep, _ = finished
    lines = [json.loads(line) for line in (Path(spec.out) / TRIALS).read_text().splitlines()]
    assert sorted(line["hash"] for line in lines) == sorted(trial.hash for trial in spec.trials())
    for trial, record in zip(sweep.trials, sweep.records, strict=True):
        assert record["failure"] is None
        assert record["cell"] == dict(trial.cell.levels)
        assert record["settings"] == trial.settings()
        assert record["measures"]["score"] == record["curves"]["val/accuracy"][0]
        assert record["measures"]["iterations_published"] > 0

    def never(self, job):
        raise AssertionError("something was to be run")

    monkeypatch.setattr("hopdeq_lwpf.sweeps.engine.workers.LocalExecutor.submit", never)
    again = run_trials(replace(spec, only=[{"form": "even-odd"}], seeds=(1,)))
    assert [record["hash"] for record in again.records] == [t.hash for t in again.trials]


def test_means_pairs_and_files_are_those_of_the_records(finished):
    spec, sweep, paths = finished
    records = {(tuple(r["cell"].items()), r["seed"]): r["measures"] for r in sweep.records}
    for cell in spec.cells():
        own = [100 * records[cell.levels, seed]["val/accuracy"] for seed in spec.seeds]
        assert sweep.values(cell, "val/accuracy").tolist() == pytest.approx(own)
        assert sweep.interval(cell, "val/accuracy").mean == pytest.approx(float(np.mean(own)))
    found = pairs(sweep)
    assert [(pair.factor, pair.cell.name, pair.first.name) for pair in found] == [
        ("form", "even-odd 0.0", "one matrix 0.0"),
        ("form", "even-odd 0.2", "one matrix 0.2"),
        ("model.damping", "one matrix 0.2", "one matrix 0.0"),
        ("model.damping", "even-odd 0.2", "even-odd 0.0"),
    ]
    for pair in found:
        here, there = ([records[c.levels, s] for s in spec.seeds] for c in (pair.cell, pair.first))
        gaps = [100 * (a["val/accuracy"] - b["val/accuracy"]) for a, b in zip(here, there, strict=True)]
        expected = t_interval(np.array(gaps), 0.95)
        assert (pair.difference.low, pair.difference.high) == pytest.approx((expected.low, expected.high))
        counts = [np.mean([m["iterations_published"] for m in side]) for side in (here, there)]
        assert pair.ratios[0] == pytest.approx(counts[0] / counts[1])
    written = {path.name for path in paths}
    assert written == {
        "results.csv", "table.md", "table.tex", "pairs.tex", "report.html",
        *(f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")),
    }  # fmt: skip
    with (Path(spec.out) / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["hash"] for row in rows] == [trial.hash for trial in spec.trials()]
    assert [row["form"] for row in rows[:3]] == ["one matrix", "one matrix", "even-odd"]
    for row, record in zip(rows, sweep.records, strict=True):
        assert float(row["val/accuracy"]) == pytest.approx(record["measures"]["val/accuracy"])


def test_the_report_says_it_all_and_loads_nothing(finished):
    spec, sweep, _ = finished
    page = (Path(spec.out) / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("<svg") == len(PICTURES)
    for sentence in findings(sweep):
        assert sentence.split(":")[0] in page
    assert "Every trial finished." in page
    settings = page.split('id="settings">')[1].split("</script>")[0]
    assert SweepSpec(**json.loads(settings)) == spec
    text = markdown(sweep)
    for grid in summaries(sweep):
        assert grid.title in text
        assert f"| {' | '.join(grid.lines[0])} |" in text


def test_the_line_of_a_trial_runs_it_alone(finished, capsys):
    _, sweep, _ = finished
    table2 = SweepSpec(**find("sweeps", "goemaere_table2"))
    made = load(replace(table2, seeds=(2,)))
    for trial in (*sweep.trials, *made.trials):
        whole = sweep if trial in sweep.trials else made
        with pytest.raises(SystemExit, match="0"):
            main([*shlex.split(command(whole, trial))[1:], "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)
        assert numbers_of(TrainSpec(**printed)) == trial.settings()


def test_a_trial_that_failed_is_listed_with_its_line_and_counts_nowhere(finished, tmp_path):
    spec, _, _ = finished
    out = replace(spec, out=str(tmp_path))
    trials = out.trials()
    good = json.loads((Path(spec.out) / TRIALS).read_text().splitlines()[0])
    by_hash = {trial.hash: trial for trial in trials}
    add_record(tmp_path / TRIALS, good)
    failed = next(trial for trial in trials if trial.hash != good["hash"])
    failure = {"error": "ValueError", "message": "too <b>small</b>", "traceback": ""}
    line = {**good, "hash": failed.hash, "failure": failure, "settings": failed.settings()}
    add_record(tmp_path / TRIALS, line)
    sweep = load(out)
    assert sweep.missing() == 6
    assert [(trial.hash, record["failure"]["message"]) for trial, record in sweep.failures()] == [
        (failed.hash, "too <b>small</b>")
    ]
    assert math.isnan(sweep.values(failed.cell, "val/accuracy")[out.seeds.index(failed.seed)])
    whole = by_hash[good["hash"]]
    assert not math.isnan(sweep.values(whole.cell, "val/accuracy")[out.seeds.index(whole.seed)])
    assert findings(sweep)[0].startswith("Trials: 1 of 8 finished, 1 failed, 6 not run")
    assert set(draw(sweep)) >= {"measures"}


def invented(tmp_path, scores, **changed):
    """A sweep whose records are made up: a factor with two levels, a score a level and seed."""
    grid = {"model.damping": [0.0, 0.2]}
    spec = SweepSpec(
        **{**SMALL, "grid": grid, "seeds": list(range(len(scores[0]))), **changed}, out=str(tmp_path)
    )
    template = {
        "format": 1, "costs": {}, "warnings": [], "failure": None, "versions": {}, "run_seconds": 1.0,
    }  # fmt: skip
    for trial in spec.trials():
        which = list(spec.factors().values())[0]
        level = [entry.name for entry in which].index(trial.cell.levels[0][1])
        score = scores[level][trial.seed]
        record = {**template, "hash": trial.hash, "curves": {"val/accuracy": [score]}, "folder": "x"}
        add_record(tmp_path / TRIALS, record)
    return load(spec)


def test_differences_that_are_the_same_in_all_seeds_are_not_called_certain(tmp_path):
    sweep = invented(tmp_path, ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4]))
    (pair,) = pairs(sweep)
    assert (pair.seeds, pair.known, pair.certain, pair.sign) == (3, True, True, 0)
    assert pair.difference.mean == pytest.approx(10)
    assert (
        "differs by the same number in all seeds, and so has no interval, in 1 (+10 to +10)"
        in findings(sweep)[-1]
    )
    assert summaries(sweep)[1].lines[0][4] == "equal in all seeds"


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    sweep = invented(tmp_path, ([0.1], [0.4]))
    (pair,) = pairs(sweep)
    assert (pair.known, pair.sign) == (False, 0)
    assert "differs by +30 to +30 in 1 with one seed" in findings(sweep)[-1]
    assert summaries(sweep)[1].lines[0][4] == "-"


def test_clear_differences_are_counted(tmp_path):
    sweep = invented(tmp_path, ([0.1, 0.2, 0.3], [0.1102, 0.2103, 0.3102]))
    (pair,) = pairs(sweep)
    assert (pair.certain, pair.sign) == (False, 1)
    assert "shown to be higher in 1 and lower in 0 of 1 pairs" in findings(sweep)[-1]


def test_names_with_dollars_and_brackets_spoil_no_picture_and_no_table(tmp_path):
    levels = {"$a_$ {": {"model.damping": 0.0}, "$\\beta_": {"model.damping": 0.2}}
    sweep = invented(tmp_path, ([0.1, 0.3], [0.2, 0.3]), grid={"$f_": levels})
    (tmp_path / "p").mkdir()
    for name, (_, figure) in draw(sweep).items():
        save_figure(figure, tmp_path / "p", name)
    text = latex(Grid("t", ("a", "b"), (("[1, 2]", "<|>"), ("x", "y"))))
    assert r"{}[1, 2] & \textless{}\textbar{}\textgreater{} \\" in text


def test_latex_escapes_what_it_must(finished):
    text = latex(summaries(finished[1])[0])
    assert r"val accuracy \%" in text
    assert text.count(r"\\") == 1 + len(finished[0].cells())


# --- the named sweeps


SWEEPS = [name for name in names("sweeps") if find("sweeps", name).get("base")]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_cell_of_a_named_sweep_builds_and_has_its_own_settings(name):
    from hopdeq_lwpf.training import build_data, build_network

    spec = SweepSpec(**find("sweeps", name))
    defaults = SweepSpec(base="train_digits_ham").as_dict()
    assert spec.as_dict() == {**defaults, **find("sweeps", name)}
    trials = replace(spec, seeds=(0,)).trials()
    assert len({trial.hash for trial in trials}) == len(trials)
    for trial in trials:
        network = build_network(trial.given.model)
        build_data(trial.given.data)
        if spec.base != "train_ham_mnist":
            continue
        assert network.f.graph.widths == tuple(trial.given.model["layers"])
        assert network.even_odd == ("even-odd" in trial.name)
        assert network.on_failure == "ignore"


def test_the_table_has_the_rows_and_budgets_of_the_paper():
    spec = SweepSpec(**find("sweeps", "goemaere_table2"))
    found = {trial.cell.name: trial.given for trial in replace(spec, seeds=(0,)).trials()}
    assert len(found) == 3 * 6 + 6 - 3
    for layers, forward, backward in (("3", 40, 8), ("5", 80, 16), ("7", 120, 24)):
        for form in ("one matrix", "even-odd"):
            train = found[f"{layers} HAM {form} picard"]
            assert train.model["max_steps"] == train.iterations["budget"] == forward
            assert solvers.build(train.model["adjoint"]) == solvers.Neumann(backward)
            assert train.learning_rate == (0.01 if layers == "3" else 0.005)
    damped = found["3 CHN one matrix picard"]
    assert (damped.model["damping"], damped.model["max_steps"]) == (0.5, 80)
    assert (damped.iterations["budget"], damped.model["adjoint"]["terms"]) == (80, 16)
    assert found["3 CHN even-odd picard"].model["damping"] == 0
    theirs = found["3 HAM even-odd anderson"].model
    assert solvers.build(theirs["solver"]) == solvers.Anderson(memory=4)
    assert "adjoint" not in found["5 HAM even-odd default"].model


def test_the_quick_table_from_the_command_line(tmp_path, capsys):
    """One command from YAML to report; three of its cells, one seed and one epoch, so that it takes seconds."""
    only = '[{layers: "3", solver: default, network: HAM}, {network: CHN, form: even-odd}]'
    arguments = [
        "sweep",
        "goemaere_table2_quick",
        "--seeds",
        "0",
        "--only",
        only,
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--set.epochs", "1", "--set.iterations.every", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Trials: 3 of 3 finished, 0 failed, 0 not run" in printed
    lines = [json.loads(line) for line in (tmp_path / "out" / TRIALS).read_text().splitlines()]
    assert [line["measures"]["iterations_published"] is not None for line in lines] == [True] * 3
    assert (tmp_path / "out" / "report.html").stat().st_size > 1e5
    assert main(arguments[:1] + ["goemaere_table"]) == 2
    assert "did you mean 'goemaere_table2'" in capsys.readouterr().err
