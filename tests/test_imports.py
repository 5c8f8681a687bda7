"""Classes of the user's own in settings: refused, unless importing was allowed."""

import sys

import pytest
import torch
from torch import nn

from hopdeq_lwpf import models, solvers
from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.cli import main
from hopdeq_lwpf.imports import VARIABLE, class_at, paths
from hopdeq_lwpf.solvers import Picard
from hopdeq_lwpf.training import build_network

MODULE = """
from torch import nn
from hopdeq_lwpf.solvers import OneStep, Picard
class Net(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.layer = nn.Linear(64, width)
class Mine(Picard):
    pass
class Gradient(OneStep):
    pass
number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of one's own, and where it would be seen that it was run."""
    ran = tmp_path / "ran"
    (tmp_path / "own_module.py").write_text(f"open({str(ran)!r}, 'w').close()\n{MODULE}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    sys.modules.pop("own_module", None)
    yield ran
    sys.modules.pop("own_module", None)


CALLS = {
    "model": lambda name: build_network({"model": name}),
    "model by itself": lambda name: models.build({"model": name}),
    "solver": lambda name: solvers.Equilibrium(nn.Identity(), solver=name),
    "solver with options": lambda name: solvers.build({"solver": name, "damping": 0.1}),
    "adjoint": lambda name: solvers.Equilibrium(nn.Identity(), adjoint=name),
}


@pytest.mark.parametrize("call", CALLS)
def test_code_is_refused_before_it_is_imported(call, module):
    for name in ("own_module:Net", "own_module:Mine", "os:system"):
        with pytest.raises(SpecError, match="--allow-import.*hopdeq-lwpf list"):
            CALLS[call](name)
    assert not module.exists()


def test_a_dotted_name_is_told_how_to_be_written():
    with pytest.raises(
        SpecError, match="'a.b.Net' is no name; a class of your own is a.b:Net, with --allow-import"
    ):
        build_network({"model": "a.b.Net"})


def test_what_is_allowed_is_built_with_its_options(module, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    assert build_network({"model": "own_module:Net", "width": 5}).layer.weight.shape == (5, 64)
    with pytest.raises(ValueError, match="Did you mean 'width'"):
        build_network({"model": "own_module:Net", "widht": 5})
    built = solvers.build({"solver": "own_module:Mine", "damping": 0.25})
    assert isinstance(built, Picard)
    assert built.damping == 0.25
    layer = solvers.Equilibrium(
        lambda z, x: 0.5 * z + x, solver="own_module:Mine", adjoint="own_module:Gradient"
    )
    x = torch.ones(2, 3, requires_grad=True)
    assert torch.allclose(layer(x), 2 * torch.ones(2, 3), atol=1e-4)


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        ("model", "own_module:Nte", "cannot be imported"),
        ("model", "no_such_module_here:Net", "cannot be imported"),
        ("model", "own_module:number", "is not a torch.nn.Module"),
        ("model", "own_module:Mine", "is not a torch.nn.Module"),
        ("solver", "own_module:Net", "is not a class with propose or run"),
        ("adjoint", "own_module:Mine", "is not a class with solve"),
    ],
)
def test_what_is_allowed_must_fit(key, name, message, module, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.raises(SpecError, match=message):
        class_at(key, name)


def test_plain_names_are_no_paths():
    for name in ("picard", "torchdeq:anderson", None, 3, "a b", "x:", ":y"):
        assert class_at("solver", name) is None
    assert class_at("unit", "a:B") is None


def test_paths_are_found_at_any_depth():
    settings = {"model": {"model": "a:B", "layers": [1], "solver": {"solver": "c.d:E"}}, "title": "x:Y"}
    assert paths(settings) == ["a:B", "c.d:E"]
    assert paths({"grid": {"f": {"g": {"model.adjoint": "e:F"}}, "model.solver": ["h:I", "picard"]}}) == [
        "e:F",
        "h:I",
    ]


def test_training_a_network_of_ones_own_needs_the_flag(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "")  # restored afterwards, whatever the command does
    (tmp_path / "own_module.py").write_text(
        MODULE
        + "    \n"
        + "class Flat(Net):\n    def forward(self, data):\n        return self.layer(data.flatten(1))\n"
    )
    out = tmp_path / "out"
    words = ["train", "digits", "--model", '{"model": "own_module:Flat", "width": 10}', "--epochs", "1"]
    words += ["--limit_batches", "2", "--out", str(out)]
    assert main(words) == 2
    assert "--allow-import" in capsys.readouterr().err
    assert main([*words, "--allow-import"]) == 0
    assert (out / "metrics.jsonl").exists()
