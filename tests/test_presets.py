"""Every YAML file of the folders solvers/, models/ and sweeps/ builds and runs one step."""

import copy
from pathlib import Path

import pytest
import torch
from problems import PROBLEMS, solve

from hopdeq_lwpf import Termination, find, fixed_point, models, retrieve, solvers
from hopdeq_lwpf.forgetting import PFU, TopK
from hopdeq_lwpf.settings import KINDS, names
from hopdeq_lwpf.sweeps.compare import run
from hopdeq_lwpf.sweeps.spec import CompareSpec
from hopdeq_lwpf.sweeps.study_spec import RETRIEVAL, StudySpec
from hopdeq_lwpf.sweeps.trials.train_trial import run_trial

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_found(kind):
    assert names(kind) == sorted(path.stem for path in (ROOT / kind).glob("*.yaml"))
    assert names(kind)
    for name in names(kind):
        assert find(kind, name)


@pytest.mark.parametrize("name", names("solvers"))
def test_solver_settings(name):
    built = solvers.build(name)
    settings = find("solvers", name)
    (key,) = (
        key
        for key in ("adjoint", "solver", "stop")
        if key in settings and (key == "adjoint" or "adjoint" not in settings)
    )
    given = {option: value for option, value in settings.items() if option != key}
    for option, value in given.items():
        assert getattr(built, option) == value, "an option was lost on the way"
    problem = PROBLEMS["softmax retrieval"]
    options = {} if key == "stop" else {"stop": Termination()}
    leaf = [a.clone().requires_grad_() for a in problem.arguments]
    solution = solve(problem, leaf, **{**options, key: built}).require()
    assert torch.autograd.grad(solution.value.sum(), leaf)[0].isfinite().all()


def test_tight_settings_are_tight():
    assert solvers.build("tight") == Termination(rtol=1e-12, atol=1e-14, max_steps=2000)
    assert isinstance(solvers.build("picard_damped"), solvers.Picard)
    assert solvers.build("picard_damped").damping == 0.5


@pytest.mark.parametrize(
    "name", [n for n in names("models") if find("models", n).get("model") == "retrieval"]
)
def test_model_settings(name):
    f = models.build(name)
    settings = find("models", name)
    assert f.beta == settings["beta"]
    assert type(f.separation).__name__.lower() == settings["separation"]
    query, patterns = torch.randn(3, 8), torch.randn(10, 8)
    x = f.prepare(query, patterns)
    for steps in (1, None):
        value = fixed_point(f, x, f.init(x), steps=steps).value
        assert value.shape == query.shape
        assert value.isfinite().all()
    unit = settings.get("forgetting")
    kind = unit["unit"] if isinstance(unit, dict) else unit or "keep"
    assert type(f.forgetting).__name__.lower() == kind


COMPARISONS = [name for name in names("sweeps") if "grid" not in find("sweeps", name)]  # others: test_sweep
STUDIES = [name for name in COMPARISONS if find("sweeps", name).get("task", RETRIEVAL) != RETRIEVAL]


@pytest.mark.parametrize("name", [name for name in COMPARISONS if name not in STUDIES])
def test_sweep_settings(name, tmp_path):
    settings = find("sweeps", name)
    spec = CompareSpec(**settings)
    assert spec.as_dict() == settings
    small = {
        "stored": 20, "samples": 2, "beta": [8.0], "forgetting": ["pfu"], "steps": [1], "trajectories": 0,
        "mask": [0.1], "noise": [], "flip": [], "resamples": 10, "reference": False,
        "out": str(tmp_path / "out"),
    }  # fmt: skip
    run(CompareSpec(**{**settings, **small}))
    assert any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", STUDIES)
def test_study_settings(name, tmp_path):
    settings = find("sweeps", name)
    spec = StudySpec(**settings)
    assert spec.as_dict() == settings
    small = {
        "epochs": 1, "seeds": [0], "forgetting": ["pfu"], "steps": [1, "converged"], "adjoint": ["implicit"],
        "inject": ["input"], "train": {"limit_batches": 2},
    }  # fmt: skip
    trials = StudySpec(**{**settings, **small}).trials()
    assert len(trials) == 2 * len(settings["task"])
    for number, trial in enumerate(trials):
        found = run_trial(trial.settings(), tmp_path / str(number))
        assert found["failure"] is None
        assert found["curves"]["val/loss"][0] > 0


def test_a_mapping_is_built_and_left_as_it_was():
    for build, settings in (
        (solvers.build, {"solver": "anderson", "memory": 3}),
        (solvers.build, {"adjoint": "implicit", "solver": "gmres"}),
        (models.build, {"model": "retrieval", "beta": 2.0, "forgetting": {"unit": "topk", "k": 3}}),
        (models.build, {"model": "ham", "layers": [4, 3, 2], "solver": {"solver": "picard", "damping": 0.1}}),
    ):
        before = copy.deepcopy(settings)
        build(settings)
        assert settings == before
    assert solvers.build({"adjoint": "implicit", "solver": "gmres"}) == solvers.Implicit("gmres")
    assert models.build({"model": "retrieval", "forgetting": {"unit": "topk", "k": 3}}).forgetting.k == 3
    adjoint, stop = {"adjoint": "neumann", "terms": 8}, {"stop": "termination", "rtol": 0.1}
    ham = models.build({"model": "ham", "layers": [4, 3, 2], "adjoint": adjoint, "stop": stop})
    assert (ham.adjoint, ham.stop) == (solvers.Neumann(8), Termination(rtol=0.1))


def test_every_unit_by_its_settings():
    f = models.build({"model": "retrieval", "forgetting": {"unit": "pfu", "threshold": 0.5, "bias": -1.0}})
    assert isinstance(f.forgetting, PFU)
    assert (f.forgetting.threshold, f.forgetting.bias) == (0.5, -1.0)
    assert isinstance(
        models.build({"model": "retrieval", "forgetting": {"unit": "topk", "k": 2}}).forgetting, TopK
    )
    with pytest.raises(ValueError, match=r"unit 'pfuu' .*Did you mean 'pfu'"):
        models.build({"model": "retrieval", "forgetting": {"unit": "pfuu"}})
    with pytest.raises(ValueError, match=r"'biass' .*Did you mean 'bias'"):
        models.build({"model": "retrieval", "forgetting": {"unit": "pfu", "biass": 0.0}})


def test_a_changed_setting_does_not_come_back():
    first = find("models", "hopfield")
    first["beta"] = -1.0
    assert find("models", "hopfield")["beta"] > 0


def test_built_objects_are_accepted_where_names_are():
    query, patterns = torch.randn(3, 8), torch.randn(10, 8)
    recall = retrieve(
        query,
        patterns,
        solver=solvers.build("lbfgs"),
        adjoint=solvers.build("onestep"),
        stop=solvers.build("tight"),
    )
    assert recall.value.shape == (3, 8)
