"""The contract of the separation functions."""

import pytest
import torch
from torch import nn

from contract.base import F64, normal
from contract.scores import ROWS, SCORES, SeparationContract
from hopdeq_lwpf.separation import (
    LSR,
    SEPARATIONS,
    Entmax,
    Entmax15,
    HardMax,
    Polynomial,
    Separation,
    Softmax,
    Softmax1,
    Sparsemax,
)


class TestSoftmax(SeparationContract):
    covers = (Softmax,)
    kind = Softmax
    name = "softmax"


class TestSoftmax1(SeparationContract):
    covers = (Softmax1,)
    kind = Softmax1
    name = "softmax1"


class TestSparsemax(SeparationContract):
    covers = (Sparsemax,)
    kind = Sparsemax
    name = "sparsemax"


class TestEntmax15(SeparationContract):
    covers = (Entmax15,)
    kind = Entmax15
    name = "entmax15"


class TestEntmax(SeparationContract):
    covers = (Entmax,)
    kind = Entmax
    name = "entmax"
    variants = {"number": {"alpha": 1.3}, "learned": {}}

    def make(self, **options):
        if self.variant == "learned":
            options = {"alpha": nn.Parameter(torch.tensor(1.7, dtype=F64)), **options}
        return super().make(**options)


class TestHardMax(SeparationContract):
    covers = (HardMax,)
    kind = HardMax
    name = "hardmax"
    exempt = {
        "test_gradients": "the weights are one-hot: their gradient is 0, and that of L is checked below"
    }

    def test_the_gradient_of_the_lagrangian_is_one_hot(self):
        scores = self.scores().requires_grad_()
        self.make().lagrangian(scores).sum().backward()
        assert scores.grad.sum(-1).tolist() == [1.0] * ROWS
        assert scores.grad.argmax(-1).tolist() == scores.argmax(-1).tolist()


class TestPolynomial(SeparationContract):
    covers = (Polynomial,)
    kind = Polynomial
    name = "polynomial"
    variants = {"square": {}, "cube and a bit": {"degree": 3.5}}


class TestLSR(SeparationContract):
    covers = (LSR,)
    kind = LSR
    name = "lsr"
    variants = {"compact": {}, "with a floor": {"eps": 0.1}}

    def scores(self, dtype=F64):
        # Half of the patterns are active, those with a score above -1.
        return (-2 * normal(ROWS, SCORES, seed=4).abs().clamp_min(0.01)).to(dtype)


class TestSeparation:
    covers = (Separation,)

    def test_the_base_says_what_to_override(self):
        with pytest.raises(NotImplementedError, match="weights_of"):
            Separation().weights(torch.zeros(2, 3))
        with pytest.raises(NotImplementedError, match="lagrangian_of"):
            Separation().lagrangian(torch.zeros(2, 3))


def test_every_name_has_a_case():
    cases = [
        case for case in globals().values() if isinstance(case, type) and issubclass(case, SeparationContract)
    ]
    assert {case.name for case in cases if case is not SeparationContract} == set(SEPARATIONS)
