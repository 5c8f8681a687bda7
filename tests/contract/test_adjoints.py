"""The contract of the adjoints and of their named settings."""

import pytest
from torch import Tensor, nn

from contract.base import Deviation
from contract.solving import AdjointContract
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.solvers import EqProp, Implicit, Neumann, OneStep, Phantom, Unrolled, build

REFUSED = Deviation(
    "the derivative of an approximation is not a second derivative, and is refused",
    (RuntimeError, NotImplementedError),
    "second|differentiable|once",
)
INEXACT = Deviation("an approximation, whose error is declared", RuntimeError, "Jacobian mismatch")


class TestImplicit(AdjointContract):
    covers = (Implicit,)
    kind = Implicit
    name = "implicit"
    variants = {
        **{name: {"solver": name, "rtol": 1e-11} for name in ("auto", "gmres", "picard", "anderson")},
        **{name: {"solver": name, "rtol": 1e-11} for name in ("cg", "minres")},
    }
    wrong = ("rtol", 0.0)
    deviates = {
        f"{test}: {solver}": Deviation(
            "needs a metric, which tanh does not declare", ValueError, "needs a metric"
        )
        for solver in ("cg", "minres")
        for test in (
            "test_gradients_are_as_near_to_exact_ones_as_declared",
            "test_parameters_get_gradients_though_the_input_needs_none",
        )
    }


class TestUnrolled(AdjointContract):
    covers = (Unrolled,)
    kind = Unrolled
    name = "unrolled"
    exempt = {"test_a_value_that_cannot_be_is_an_error_that_names_the_option": "it has no options"}


class TestNeumann(AdjointContract):
    covers = (Neumann,)
    kind = Neumann
    name = "neumann"
    variants = {"long enough for rounding": {"terms": 120}}
    wrong = ("terms", 0)
    deviates = {"test_a_second_derivative_is_right_or_refused": REFUSED}


class TestPhantom(AdjointContract):
    covers = (Phantom,)
    kind = Phantom
    name = "phantom"
    variants = {"long enough for rounding": {"k": 160, "damping": 0.2}}
    wrong = ("k", 0)
    deviates = {"test_a_second_derivative_is_right_or_refused": REFUSED}


class TestOneStep(AdjointContract):
    covers = (OneStep,)
    kind = OneStep
    name = "onestep"
    error = 1.0  # 95 % at contractions up to .99
    exempt = {"test_a_value_that_cannot_be_is_an_error_that_names_the_option": "it has no options"}
    deviates = {
        "test_finite_differences_agree": INEXACT,
        "test_a_second_derivative_is_right_or_refused": REFUSED,
    }


class TestEqProp(AdjointContract):
    covers = (EqProp,)
    kind = EqProp
    name = "eqprop"
    error = 1e-4  # of a symmetric difference
    solved = ("pfu retrieval",)
    wrong = ("nudge", 0.0)
    deviates = {
        "test_a_second_derivative_is_right_or_refused": Deviation(
            "a difference of two solves has no derivative",
            RuntimeError,
            "second derivative|does not require grad",
        )
    }

    def module(self, inner):
        return Learned(inner)


class Learned(nn.Module):
    """A memory of learned patterns, in whose energy they are."""

    has_energy = True
    state_ndim = 1

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.patterns = inner.weight
        self.recall = Retrieval(0.8, inject="input")

    def prepare(self, x: Tensor):
        return self.recall.prepare(x, self.patterns)

    def init(self, x) -> Tensor:
        return self.recall.init(x).detach()

    def forward(self, z: Tensor, x) -> Tensor:
        return self.recall(z, x)

    def energy(self, z: Tensor, x) -> Tensor:
        return self.recall.energy(z, x)

    def metric(self, z: Tensor, x):
        return self.recall.metric(z, x)


class TestPresets(AdjointContract):
    presets = ("implicit", "neumann", "onestep", "phantom", "unrolled")
    variants = {name: name for name in presets}
    error = 1.0
    exempt = {
        name: "the class of this preset has a case of its own"
        for name in (
            "test_it_is_found_by_its_name_and_a_misspelt_one_names_the_nearest",
            "test_an_unknown_option_is_an_error_that_names_it",
            "test_a_value_that_cannot_be_is_an_error_that_names_the_option",
        )
    }
    deviates = {
        **{f"test_finite_differences_agree: {name}": INEXACT for name in ("onestep", "phantom")},
        **{
            f"test_a_second_derivative_is_right_or_refused: {name}": REFUSED
            for name in ("neumann", "onestep", "phantom")
        },
    }

    def make(self, **options):
        return build(self.options)

    @property
    def kind(self):
        return type(self.make())


def test_the_bound_of_a_case_can_be_missed():
    case = TestOneStep()
    case.variant, case.options, case.error = "default", {}, 1e-3
    with pytest.raises(AssertionError):
        case.test_gradients_are_as_near_to_exact_ones_as_declared()
