"""Contracts of what is neither layer nor solver: Lagrangians, warm starts, the bridge to torchdeq, further settings."""

import copy

import pytest
import torch
from torch import nn

from contract.base import (
    F64,
    Contract,
    check_repr,
    gradcheck,
    misspelt,
    near,
    normal,
    pickled,
    same,
    untouched,
)
from contract.settings import SettingsContract
from hopdeq_lwpf import fixed_point
from hopdeq_lwpf.models import lagrangians
from hopdeq_lwpf.models.diffusion import DiffusionLookupOptions, DiffusionOptions, DiffusionPoolingOptions
from hopdeq_lwpf.models.lagrangians import LAGRANGIANS, Lagrangian, make_lagrangian
from hopdeq_lwpf.models.sdm import GridSettings, ProjectionSettings, ReadWeights
from hopdeq_lwpf.solvers import Bound, WarmStart, register_with_torchdeq


class TestLagrangians(Contract):
    covers = (
        lagrangians.Identity, lagrangians.LayerNorm, lagrangians.Rectifier, lagrangians.Sigmoid, lagrangians.Softmax,
        lagrangians.Sphere, lagrangians.Tanh,
    )  # fmt: skip
    variants = {**{name: {} for name in LAGRANGIANS}, "tanh, learned": {}}
    exempt = {
        "test_the_inverse_undoes_the_activation: relu": "every state below 0 has the activation 0",
        "test_the_inverse_undoes_the_activation: sphere": "states of one direction have one activation",
        "test_the_inverse_undoes_the_activation: layernorm": "states that differ by a number have one activation",
        "test_the_inverse_undoes_the_activation: softmax": "states that differ by a number have one activation",
    }

    def make(self):
        if self.variant == "tanh, learned":
            return lagrangians.Tanh(nn.Parameter(torch.tensor(1.5)))
        return make_lagrangian(self.variant)

    def states(self, dtype=F64):
        return normal(3, 4, seed=3).to(dtype)

    def test_the_activation_is_the_gradient_and_the_slope_the_hessian(self):
        made, s, v = self.make().double(), self.states().requires_grad_(), normal(3, 4, seed=5).double()
        (rho,) = torch.autograd.grad(made.value(s).sum(), s)
        near(made.activate(s), rho, 1e-10)
        (pulled,) = torch.autograd.grad(made.activate(s), s, v)
        near(made.slope(s.detach())(v), pulled, 1e-10)

    def test_gradients(self):
        made = self.make().double()
        gradcheck(made.activate, (self.states(),))
        gradcheck(made.value, (self.states(),))

    def test_what_it_says_of_itself_holds(self):
        made, a, b = self.make().double(), self.states(), normal(3, 4, seed=6).double()
        if made.convex:
            assert (made.value((a + b) / 2) <= (made.value(a) + made.value(b)) / 2 + 1e-12).all()
        if made.increasing:
            assert (made.activate(a) >= 0).all()
        if made.definite:
            assert ((b * made.slope(a)(b)).sum(-1) > 0).all()
        assert made.convex

    def test_the_inverse_undoes_the_activation(self):
        made, s = self.make().double(), self.states()
        near(made.inverse(made.activate(s)), s, 1e-9)

    def test_rows_halves_and_empty_batches(self):
        made, s = self.make(), self.states(torch.float32)
        near(made.activate(s[:1]), made.activate(s)[:1], 1e-6)
        assert made.activate(s[:0]).shape == (0, 4)
        half = made.activate(s.to(torch.bfloat16))
        assert half.dtype == torch.bfloat16
        near(half.float(), made.activate(s.to(torch.bfloat16).float()), 2e-2)

    def test_copies_pickles_moves_and_repr(self):
        made, s = self.make(), self.states(torch.float32)
        for other in (copy.deepcopy(made), pickled(made)):
            same(other.activate(s).detach(), made.activate(s).detach())
        check_repr(made)
        check_repr(copy.deepcopy(made).to("meta"))
        with untouched(s):
            made.value(s)

    def test_a_misspelt_name_names_the_nearest(self):
        name = self.variant.split(",")[0]
        with pytest.raises(ValueError, match=f"Did you mean '{name}'"):
            make_lagrangian(misspelt(name))


class TestBases:
    covers = (Lagrangian, ReadWeights)

    def test_the_bases_say_what_to_override(self):
        s = torch.zeros(2, 3)
        for call, missing in ((Lagrangian().value, "value"), (Lagrangian().activate, "activate")):
            with pytest.raises(NotImplementedError, match=missing):
                call(s)
        with pytest.raises(TypeError, match="has no inverse"):
            Lagrangian().inverse(s)
        with pytest.raises(NotImplementedError, match="of_products"):
            ReadWeights().of_products(s, 3, 1.0, None)
        assert ReadWeights().draw(4) is None


def cell(z, x):
    """A contraction."""
    return torch.tanh(0.5 * z.roll(1, -1) + x)


class TestWarmStart(Contract):
    covers = (WarmStart,)

    def known(self):
        """A store that knows the samples 7 and 3."""
        store, x = WarmStart(), normal(2, 4)
        solution = fixed_point(cell, x, torch.zeros_like(x))
        store.keep(torch.tensor([7, 3]), solution)
        return store, solution.value

    def test_known_samples_start_where_they_ended_and_others_where_they_would(self):
        store, ends = self.known()
        z0 = normal(3, 4, seed=2)
        with untouched(z0):
            started = store.start(torch.tensor([3, 5, 7]), z0)
        same(started, torch.stack([ends[1], z0[1], ends[0]]))
        assert len(store) == 2

    def test_copies_and_pickles_know_the_same_and_forget_by_themselves(self):
        store, _ = self.known()
        index, z0 = torch.tensor([3, 7]), torch.zeros(2, 4)
        for other in (copy.deepcopy(store), pickled(store)):
            same(other.start(index, z0), store.start(index, z0))
            other.clear()
            assert len(store) == 2

    def test_failed_and_empty_solves_are_not_kept(self):
        store, x = WarmStart(), normal(2, 4)
        x[1] = torch.nan
        store.keep(torch.tensor([0, 1]), fixed_point(cell, x, torch.zeros_like(x)))
        assert len(store) == 1
        none = torch.zeros(0, 4)
        store.keep(torch.zeros(0, dtype=torch.int64), fixed_point(cell, none, none))
        assert len(store) == 1
        check_repr(store)

    @pytest.mark.parametrize("index", [torch.tensor([0.5, 1.0]), torch.tensor([0, 0]), torch.tensor([0])])
    def test_an_index_that_cannot_be_is_refused(self, index):
        with pytest.raises((TypeError, ValueError), match="index"):
            self.known()[0].start(index, torch.zeros(2, 4))


class TestBound(Contract):
    covers = (Bound,)

    def test_it_is_f_with_its_context_filled_in(self):
        x, z = normal(3, 4), normal(3, 4, seed=2)
        bound = Bound(cell, x)
        with untouched(x, z):
            same(bound(z), cell(z, x))
        same(pickled(bound)(z), bound(z))
        same(copy.deepcopy(bound)(z), bound(z))

    def test_torchdeq_solves_it_by_each_of_our_names(self):
        from torchdeq import get_deq

        x = normal(3, 4).double()
        expected = fixed_point(cell, x, torch.zeros_like(x)).value
        for name in register_with_torchdeq():
            (found,), _ = get_deq(f_solver=name, f_tol=1e-7)(Bound(cell, x), torch.zeros_like(x))
            near(found[-1] if found.ndim > 2 else found, expected, 1e-4)


class OptionsContract(SettingsContract):
    """Of options of layers, which hold what need not be hashable."""

    wrong = ("neighbors", 0)
    variants = {
        "default": {"input_size": 4},
        "all": {"input_size": 4, "lam": 0.5, "steps": None, "forgetting": "pfu"},
    }


class TestDiffusionOptions(OptionsContract):
    covers = (DiffusionOptions,)
    kind = DiffusionOptions


class TestDiffusionPoolingOptions(OptionsContract):
    covers = (DiffusionPoolingOptions,)
    kind = DiffusionPoolingOptions


class TestDiffusionLookupOptions(OptionsContract):
    covers = (DiffusionLookupOptions,)
    kind = DiffusionLookupOptions


class TestGridSettings(SettingsContract):
    covers = (GridSettings,)
    kind = GridSettings
    variants = {"default": {}, "small": {"n": 16, "radii": (3, 5), "flips": (1,), "patterns": 4}}
    wrong = ("radii", (99,))


class TestProjectionSettings(SettingsContract):
    covers = (ProjectionSettings,)
    kind = ProjectionSettings
    variants = {"default": {}, "small": {"keys": 8, "radius": 3, "learn_beta": True}}
    wrong = ("noise", (5, 2))
