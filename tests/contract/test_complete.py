"""Nothing public is without a case: a new class or preset fails here until it has one."""

import importlib
import inspect
from pathlib import Path

import pytest

from contract.base import Contract
from hopdeq_lwpf.models import sdm
from hopdeq_lwpf.settings import names
from hopdeq_lwpf.solvers import Adjoint, Iterate, Solver

PACKAGES = (
    "models", "models.sdm", "models.diffusion", "models.lagrangians", "solvers", "forgetting", "separation", "graphs",
)  # fmt: skip
# What a call returns: nobody makes it, so that there is nothing to be promised.
RETURNED = (
    sdm.BetaFit, sdm.BetaStatistics, sdm.ExponentialBounds, sdm.HeadBeta, sdm.OptimalBetas, sdm.OptimalRadius,
    sdm.ProjectedRecall, sdm.ProjectionCourse, sdm.QueriesKeys, sdm.ReadStatistics, sdm.RecallRow, sdm.SDMRecall,
)  # fmt: skip
EXCUSED = {
    Adjoint: "a protocol: what an adjoint must have",
    Solver: "a protocol: what a solver must have",
    Iterate: "what the loop shows to a solver",
    sdm.EmptyReadError: "an error",
    **{kind: "what a call returns; its numbers are tested where it is made" for kind in RETURNED},
}
BY_NAME = {
    "DiffusionContext": "what `prepare` makes of a call's arguments",
    "Neurons": "a layer of neurons inside of a network, made from a Lagrangian and a unit",
}


def cases():
    """Every case: the classes in the test modules of this folder that cover something."""
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"contract.{path.stem}")
        found += [
            case
            for case in vars(module).values()
            if inspect.isclass(case)
            and case.__module__ == module.__name__
            and case.__name__.startswith("Test")
        ]
    return found


def public_classes():
    """The classes that the packages name, or that a module without such a list defines."""
    found = set()
    for name in PACKAGES:
        module = importlib.import_module(f"hopdeq_lwpf.{name}")
        listed = getattr(module, "__all__", None) or [
            key
            for key, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__ and not key.startswith("_")
        ]
        found |= {getattr(module, key) for key in listed if inspect.isclass(getattr(module, key))}
    return found


def without_case():
    covered = {kind for case in cases() for kind in getattr(case, "covers", ())}
    return sorted(
        kind.__name__
        for kind in public_classes()
        if kind not in covered and kind not in EXCUSED and kind.__name__ not in BY_NAME
    )


def presets_without_case(kind):
    covered = {name for case in cases() for name in getattr(case, "presets", ())}
    return [name for name in names(kind) if name not in covered]


def test_every_public_class_has_a_case():
    assert not without_case(), "write a case in tests/contract/, or say in EXCUSED why there is none"


@pytest.mark.parametrize("kind", ["solvers", "models"])
def test_every_preset_has_a_case(kind):
    assert not presets_without_case(kind), "name it in `presets` of a case in tests/contract/"


def test_a_new_class_would_be_noticed(monkeypatch):
    from hopdeq_lwpf import models

    class Newcomer:
        pass

    monkeypatch.setattr(models, "Newcomer", Newcomer, raising=False)
    monkeypatch.setattr(models, "__all__", [*models.__all__, "Newcomer"])
    assert without_case() == ["Newcomer"]


def test_a_new_preset_would_be_noticed(monkeypatch):
    known = names("models")
    monkeypatch.setitem(globals(), "names", lambda kind: [*known, "newcomer"])
    assert presets_without_case("models") == ["newcomer"]


def test_no_case_covers_what_is_not_public():
    known = public_classes()
    for case in cases():
        for kind in getattr(case, "covers", ()):
            package = kind.__module__.split(".")[1]
            assert kind in known or package == "models", (
                f"{case.__name__} covers {kind.__name__}, which is not public"
            )
        if issubclass(case, Contract):
            assert case.variants, f"{case.__name__} has no variant"


def test_what_is_excused_is_public():
    known = public_classes()
    assert set(EXCUSED) <= known
    assert set(BY_NAME) <= {kind.__name__ for kind in known}
