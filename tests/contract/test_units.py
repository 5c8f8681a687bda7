"""The contract of the forgetting units."""

import pytest
import torch

from contract.base import Deviation, pickled, same
from contract.scores import ROWS, UnitContract
from hopdeq_lwpf.forgetting import PFU, Forgetting, Keep, ReLU, TopK


class TestKeep(UnitContract):
    covers = (Keep,)
    kind = Keep
    name = "keep"


class TestReLU(UnitContract):
    covers = (ReLU,)
    kind = ReLU
    name = "relu"
    variants = {"default": {}, "one always kept": {"min_keep": 1}}


class TestPFU(UnitContract):
    covers = (PFU,)
    kind = PFU
    name = "pfu"
    variants = {
        "median": {},
        "constant": {"threshold": 0.2, "bias": -1.0},
        "tracked": {"tracked": True, "bias": 0.0},
        "two always kept": {"threshold": 9.0, "min_keep": 2},
        "of the whole tensor": {"scope": "tensor"},
    }
    coupled = Deviation("one median for the whole tensor, as the official code has it")
    deviates = {
        "test_a_row_alone_gives_what_it_gives_in_a_batch: of the whole tensor": coupled,
        "test_nan_in_one_row_harms_no_other: of the whole tensor": coupled,
    }

    def test_noise_belongs_to_training_and_to_its_generator(self):
        def made(seed):
            source = torch.Generator().manual_seed(seed)
            return self.make(noise=0.5, generator=source)

        scores = self.scores()
        same(made(0).eval()(scores), self.make()(scores))
        first = made(0).train()
        drawn = first.draw(scores)
        same(made(0).train().draw(scores), drawn)
        assert (made(1).train().draw(scores) != drawn).all()
        # A copy goes on where the first one is.
        other = pickled(first)
        same(other.draw(scores), first.draw(scores))


class TestTopK(UnitContract):
    covers = (TopK,)
    kind = TopK
    name = "topk"
    variants = {"three": {"k": 3}, "largest forgotten as bias": {"k": 3, "bias": "threshold"}}

    def test_exactly_k_are_kept(self):
        _, kept = self.make()(self.scores())
        assert kept.sum(-1).tolist() == [3.0] * ROWS


class TestForgetting:
    covers = (Forgetting,)

    def test_the_base_says_what_to_override(self):
        with pytest.raises(NotImplementedError, match=r"project\(scores, threshold, mask\)"):
            Forgetting()(torch.randn(2, 3))
        assert Forgetting().draw(torch.randn(2, 3)) is None
        assert not Forgetting().has_energy
        assert not Forgetting().self_adjoint
