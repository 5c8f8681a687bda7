"""Sweeps of Sparse Distributed Memory: what a trial measures, and the named ones."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch

from hopdeq_lwpf import find
from hopdeq_lwpf.cli import main
from hopdeq_lwpf.models.sdm import critical_distance, fit_beta, log_circle_intersection
from hopdeq_lwpf.models.sdm.experiments import ALGORITHMS, GridSettings, run_grid
from hopdeq_lwpf.settings import names
from hopdeq_lwpf.sweeps.engine.records import TRIALS
from hopdeq_lwpf.sweeps.sweep import run_trials
from hopdeq_lwpf.sweeps.sweep_spec import SweepSpec
from hopdeq_lwpf.sweeps.trials import sdm_spec
from hopdeq_lwpf.sweeps.trials.sdm_spec import SdmSpec, SpecError
from hopdeq_lwpf.sweeps.trials.sdm_trial import run_trial

SDM = [name for name in names("sweeps") if find("sweeps", name).get("task") == "sdm"]
SMALL = {"n": 32, "radius": 8, "patterns": 20, "repeats": 2, "flips": 3}


def test_the_light_settings_know_the_algorithms_and_defaults_of_the_memory():
    assert tuple(ALGORITHMS) == sdm_spec.ALGORITHMS
    heavy = GridSettings()
    shared = {field.name for field in fields(SdmSpec)} & {field.name for field in fields(GridSettings)}
    assert shared == {
        "n", "patterns", "flips", "repeats", "neurons", "explicit_neurons", "max_steps", "seed", "estimator",
    }  # fmt: skip
    for name in shared - {"flips", "estimator"}:
        assert getattr(SdmSpec(), name) == getattr(heavy, name)


@pytest.mark.parametrize("algorithm", ["Binary_SDM", "Cont_SDM_NeuronLimit", "Hopfield"])
def test_a_recall_trial_gives_the_means_of_its_queries(algorithm, tmp_path):
    found = run_trial(SdmSpec(**SMALL, algorithm=algorithm, seed=3).as_dict(), tmp_path / "never")
    assert found["failure"] is None
    settings = GridSettings(
        n=32, patterns=20, repeats=2, radii=(8,), flips=(3,), algorithms=(algorithm,), seed=3
    )
    (row,) = run_grid(settings)
    assert len(row.cosine) == 40
    expected = {
        "cosine": row.mean_cosine,
        "recalled": row.recalled,
        "steps": float(row.steps.double().mean()),
        "converged": float(row.converged.double().mean()),
        "cycling": float((row.cycle > 1).double().mean()),
        "empty": float(row.empty.double().mean()),
    }
    assert {name: values[0] for name, values in found["curves"].items()} == pytest.approx(expected)
    assert not (tmp_path / "never").exists()


def test_a_fit_trial_gives_the_fit_and_how_far_its_softmax_is_off():
    found = run_trial(SdmSpec(experiment="fit", radius=9, estimator="published").as_dict(), "never")
    fit = fit_beta(64, 9, estimator="published")
    cosine = 1 - torch.arange(65, dtype=torch.float64) / 32
    weights = log_circle_intersection(64, 9).exp()
    softmax = (fit.beta * cosine).exp()
    error = (weights / weights.sum() - softmax / softmax.sum()).abs().max()
    got = {name: values[0] for name, values in found["curves"].items()}
    assert got == pytest.approx(
        {"beta": fit.beta, "bias": fit.bias, "r2": fit.r2, "weight_error": float(error)}
    )


def test_a_distance_trial_gives_the_critical_distance():
    found = run_trial(SdmSpec(experiment="critical_distance", radius=11).as_dict(), "never")
    assert found["curves"]["critical_distance"] == [
        float(critical_distance(64, 11, neurons=2**64, patterns=1024))
    ]
    assert found["curves"]["critical_distance"] == [22]  # published


def test_what_a_trial_cannot_do_is_its_failure():
    found = run_trial({"experiment": "recall", "n": 8, "radius": 9}, "never")
    assert found["failure"]["error"] == "SpecError"
    assert "radius must be at most n = 8" in found["failure"]["message"]
    found = run_trial(SdmSpec(experiment="fit", n=8, radius=0, fit="softmax").as_dict(), "never")
    assert found["failure"]["error"] == "ValueError"
    assert found["curves"] == {}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"algorithm": "Binary_SMD"}, "Did you mean 'Binary_SDM'"),
        ({"experiment": "recal"}, "Did you mean 'recall'"),
        ({"flips": 65}, "flips must be at most n = 64"),
        ({"patterns": 0}, "patterns must be"),
        ({"neurons": 0.5}, "neurons must be"),
    ],
)
def test_mistakes_are_said(changed, said):
    with pytest.raises(SpecError, match=said):
        SdmSpec(**changed)


@pytest.mark.parametrize("name", SDM)
def test_every_named_sweep_has_cells_of_their_own_and_runs_the_ends_of_its_grid(name):
    spec = SweepSpec(**find("sweeps", name))
    trials = replace(spec, seeds=(0,)).trials()
    assert len({trial.hash for trial in trials}) == len(trials)
    for trial in (trials[0], trials[-1]):
        small = {**trial.settings(), "repeats": 1, "patterns": min(trial.given.patterns, 64)}
        found = run_trial(small, "never")
        assert found["failure"] is None
        assert set(spec.measures) <= {*found["curves"], *found["costs"]}


def test_the_figures_of_the_paper_have_their_sweeps():
    assert SDM == ["sdm_beta", "sdm_critical_distance", "sdm_intersection", "sdm_neurons", "sdm_recall"]
    recall = SweepSpec(**find("sweeps", "sdm_recall"))
    assert recall.set["estimator"] == "published"
    assert len(recall.cells()) == 6 * 9 * 7


def test_measures_that_no_trial_makes_are_refused_and_those_that_some_make_are_not(tmp_path):
    base = {"task": "sdm", "seeds": (0,), "workers": 1, "out": str(tmp_path / "out")}
    with pytest.raises(SpecError, match="'beta' is not made by experiment recall"):
        run_trials(SweepSpec(**base, set={"patterns": 4}, grid={"flips": [0]}, measures=("beta",)))
    assert not (tmp_path / "out").exists()
    grid = {"experiment": ["recall", "fit"]}
    sweep = run_trials(
        SweepSpec(**base, set={"patterns": 4, "n": 16, "radius": 4}, grid=grid, measures=("cosine", "beta"))
    )
    assert not sweep.failures()
    both = [[sweep.values(cell, measure)[0] for measure in ("cosine", "beta")] for cell in sweep.spec.cells()]
    assert [[math.isnan(value) for value in row] for row in both] == [[False, True], [True, False]]


def test_one_command_from_settings_to_report(tmp_path, capsys):
    only = "[{patterns: 100, radius: [9, 11]}]"
    assert (
        main(["sweep", "sdm_critical_distance", "--only", only, "--workers", "1", "--out", str(tmp_path)])
        == 0
    )
    assert "Trials: 2 of 2 finished" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / TRIALS).read_text().splitlines()]
    assert {line["cell"]["radius"]: line["measures"]["score"] for line in lines} == {
        str(d): float(critical_distance(64, d, neurons=2.0**64, patterns=100)) for d in (9, 11)
    }
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "course.png", "results.csv"}
    assert "--only" in (tmp_path / "report.html").read_text()
