"""Trials of retrieval on graphs: what they measure, and their settings."""

import math

import pytest
import torch

from hopdeq_lwpf import settings
from hopdeq_lwpf.data import CURVES, make_curve
from hopdeq_lwpf.sweeps.sweep_spec import SweepSpec
from hopdeq_lwpf.sweeps.trials import graph_spec
from hopdeq_lwpf.sweeps.trials.graph_spec import GraphSpec
from hopdeq_lwpf.sweeps.trials.graph_trial import measure, run_trial

SMALL = {"stored": 24, "queries": 16}


def test_a_trial_measures_what_it_says():
    found = measure(GraphSpec(**SMALL, lam=1.0, eta=0.3))
    assert sorted(found) == sorted(graph_spec.MEASURES)
    assert found["converged"] == 1.0
    assert found["energy_rises"] == 0.0
    assert 0 < found["error"] < 2
    assert found["query_error"] == pytest.approx(0.25, rel=0.2)
    assert 0 <= found["angle_error"] <= math.pi


def test_errors_are_those_of_the_pattern_that_a_sharp_recall_finds():
    found = measure(GraphSpec(stored=400, queries=50, beta=1e6, steps=1, seed=4))
    points = make_curve(stored=400, queries=50, seed=4)
    near = (points.query @ points.stored.T).argmax(1)
    apart = (points.stored[near] - points.target).square().sum(1).mean() / points.target.square().sum(
        1
    ).mean()
    assert found["error"] == pytest.approx(float(apart), rel=1e-4)
    angle = (points.stored_angle[near] - points.query_angle).abs()
    around = torch.minimum(angle, 2 * math.pi - angle).mean()
    assert found["angle_error"] == pytest.approx(float(around), rel=1e-5)


def test_a_trial_that_goes_wrong_says_so_in_its_record(tmp_path):
    record = run_trial({**GraphSpec(**SMALL).as_dict(), "beta": 0.0}, tmp_path)
    assert record["failure"]["error"] == "ValueError"
    assert "beta must be > 0" in record["failure"]["message"]
    fine = run_trial(GraphSpec(**SMALL).as_dict(), tmp_path)
    assert fine["failure"] is None
    assert fine["curves"]["converged"] == [1.0]


def test_the_settings_know_the_curves_that_there_are():
    assert graph_spec.CURVES == CURVES


def test_the_named_sweep_compares_diffusion_with_none_in_pairs():
    spec = SweepSpec(**settings.find("sweeps", "diffusion_manifold"))
    trials = spec.trials()
    assert len(trials) == 2 * 2 * 5 * 4 * 3 * 5
    assert all(isinstance(trial.given, GraphSpec) for trial in trials)
    assert {trial.given.laplacian for trial in trials} == {"combinatorial"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curve": "rotated_digits"}, "rotated_digit"),
        ({"neighbors": 0}, "neighbors must be"),
        ({"steps": 0}, "steps must be"),
        ({"lam": -1.0}, "lam must be"),
    ],
)
def test_settings_that_make_no_sense_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        GraphSpec(**options)


@pytest.mark.parametrize(
    ("task", "measures"),
    [
        ("train", ("val/accuracy", "epoch_cpu_seconds")),
        ("sdm", ("cosine", "steps")),
        ("graph", ("error", "steps")),
    ],
)
def test_a_sweep_that_asks_for_nothing_shows_what_its_task_usually_does(task, measures):
    base = {"base": "train_digits"} if task == "train" else {}
    assert SweepSpec(task=task, **base).measures == measures
