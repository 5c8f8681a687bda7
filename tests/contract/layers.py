"""What every layer promises: tensors in, a tensor out, one sample never sees another."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from contract.base import (
    F64,
    ROUNDING,
    TIGHT,
    converted,
    copied,
    floats,
    gradcheck,
    near,
    same,
    threads,
    unconverged_allowed,
)
from contract.modules import ModuleContract
from hopdeq_lwpf import Result, Solution
from hopdeq_lwpf.solvers import Implicit

# To what the order of sums leaves of float32, in a solve that ends within 1e-5 of its equilibrium.
ALONE = 3e-5
EXACT = {"stop": TIGHT, "adjoint": Implicit(rtol=1e-12)}


class LayerContract(ModuleContract):
    """Of a module whose first dimension, in what it gets and returns, counts samples."""

    # Arguments that are the same for all samples.
    shared: Sequence[int] = ()
    # Arguments that only start a solve, where a solve is made: at an equilibrium they have no gradient.
    starts: Sequence[int] = ()
    # Options that solve to rounding, in variants that solve.
    exact: Mapping[str, Any] = EXACT
    # By the name of a dtype another share than ROUNDING has.
    rounding: Mapping[torch.dtype, float] = {}

    def solves(self) -> bool:
        """Whether this variant solves to equilibrium."""
        return self.options.get("steps", 1) is None

    def exactly(self, **options: Any) -> nn.Module:
        """In float64, solved to rounding, without what is random in training."""
        return self.made(**{**(self.exact if self.solves() else {}), **options}).double().eval()

    def rows(self, inputs: tuple[Any, ...], index: Sequence[int]) -> tuple[Any, ...]:
        """These samples of the input."""
        at = torch.tensor(index, dtype=torch.int64)
        return tuple(
            part if i in self.shared else pytree.tree_map(lambda t: t.index_select(0, at), part)
            for i, part in enumerate(inputs)
        )

    def permuted(self, inputs: tuple[Any, ...], order: Tensor) -> tuple[Any, ...]:
        """The same input with its stored patterns in another order; `stored` of them."""
        raise NotImplementedError(f"{type(self).__name__} must override permuted(inputs, order)")

    def padded(self, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same input with stored patterns that are padding, and what says so."""
        raise NotImplementedError(f"{type(self).__name__} must override padded(inputs)")

    stored = 5

    def solution(self, layer: Any) -> Solution:
        """What the layer keeps of its last call."""
        return layer.last_solution

    def test_a_sample_alone_gives_what_it_gives_in_a_batch(self) -> None:
        layer, inputs = self.made().eval(), self.inputs()
        together = self.call(layer, inputs)
        for i in range(len(together)):
            near(self.call(layer, self.rows(inputs, [i]))[0], together[i], ALONE)

    def test_the_order_of_samples_is_kept(self) -> None:
        layer, inputs = self.made().eval(), self.inputs()
        near(self.call(layer, self.rows(inputs, [2, 0, 1])), self.call(layer, inputs)[[2, 0, 1]], ALONE)

    def test_the_order_of_stored_patterns_does_not_matter(self) -> None:
        layer, inputs = self.made().eval(), self.inputs()
        order = torch.arange(self.stored).roll(2)
        near(self.call(layer, self.permuted(inputs, order)), self.call(layer, inputs), ALONE)

    def test_padding_is_as_if_it_were_not_there(self) -> None:
        layer, inputs = self.made().eval(), self.inputs()
        padded, mask = self.padded(inputs)
        near(self.call(layer, padded, **mask), self.call(layer, inputs), ALONE)

    def test_nan_in_one_sample_harms_no_other(self) -> None:
        layer, inputs = self.made().eval(), copied(self.inputs())
        expected = self.call(layer, inputs)
        spoilt = next(leaf for i, part in enumerate(inputs) if i not in self.shared for leaf in floats(part))
        spoilt[1] = torch.nan
        out = self.call(layer, inputs)
        # A solve returns its best iterate, which may be the start, and says what happened.
        assert out[1].isnan().any() or (self.solution(layer).result == Result.NONFINITE).any()
        near(out[[0, 2]], expected[[0, 2]], ALONE)

    def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(self) -> None:
        layer, inputs = self.made(), self.inputs()
        whole, out = self.call(layer, inputs), self.call(layer, self.rows(inputs, []))
        assert out.shape == (0, *whole.shape[1:])
        assert out.dtype == whole.dtype
        if whole.requires_grad:
            out.sum().backward()
            assert all(p.grad is None or not p.grad.any() for p in layer.parameters())

    @pytest.mark.parametrize("dtype", ROUNDING, ids=str)
    def test_every_dtype_gives_what_float64_gives(self, dtype: torch.dtype) -> None:
        layer = self.made().to(dtype).eval()
        inputs = converted(self.inputs(), dtype)
        out = self.call(layer, inputs)
        assert out.dtype == dtype
        assert out.isfinite().all()
        expected = self.call(copy.deepcopy(layer).double(), converted(inputs, F64))
        near(out.double(), expected, self.rounding.get(dtype, ROUNDING[dtype]))
        if out.requires_grad:
            with unconverged_allowed():
                out.float().sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())

    def test_autocast_changes_little(self) -> None:
        layer, inputs = self.made().eval(), self.inputs()
        expected = self.call(layer, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            out = self.call(layer, inputs)
        near(out.float(), expected, self.rounding.get(torch.bfloat16, ROUNDING[torch.bfloat16]))
        if out.requires_grad:
            with unconverged_allowed():
                out.float().sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())

    def test_gradients_of_input_and_parameters(self) -> None:
        layer = self.exactly()
        given = converted(self.inputs(2), F64)
        held = self.starts if self.solves() else ()
        leaves, tree = pytree.tree_flatten(tuple(part for i, part in enumerate(given) if i not in held))
        learned = {name: p for name, p in layer.named_parameters() if p.requires_grad}

        def function(*tensors: Tensor) -> Tensor:
            parameters = dict(zip(learned, tensors[len(leaves) :], strict=True))
            rest = iter(pytree.tree_unflatten(list(tensors[: len(leaves)]), tree))
            inputs = tuple(part if i in held else next(rest) for i, part in enumerate(given))
            return functional_call(layer, parameters, inputs)

        gradcheck(function, (*leaves, *learned.values()))

    def test_one_thread_and_two_give_the_same(self) -> None:
        layer, inputs = self.exactly(), converted(self.inputs(), F64)
        with threads(1):
            one = self.call(layer, inputs)
        with threads(2):
            two = self.call(layer, inputs)
        near(two, one, 1e-6)

    def test_the_mode_changes_nothing_where_nothing_is_random(self) -> None:
        layer, inputs = self.made(), self.inputs()
        out = self.call(layer.train(), inputs)
        other = self.call(layer.eval(), inputs)
        same(other.detach(), out.detach())
        assert other.requires_grad == out.requires_grad

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    def test_compiled_it_gives_the_same(self) -> None:
        torch._dynamo.reset()
        layer, inputs = self.exactly(), converted(self.inputs(), F64)
        expected = self.call(layer, inputs)
        out = self.call(torch.compile(layer, backend="eager"), inputs)
        assert_close(out, expected, rtol=1e-9, atol=1e-10)
        weights = [p for p in layer.parameters() if p.requires_grad]
        if expected.requires_grad and weights:
            some = torch.autograd.grad(out.sum(), weights, allow_unused=True)
            others = torch.autograd.grad(expected.sum(), weights, allow_unused=True)
            assert_close(some, others, rtol=1e-7, atol=1e-9)
        torch._dynamo.reset()

    def test_it_keeps_the_solution_of_its_last_call_without_a_graph(self) -> None:
        layer = self.made()
        self.call(layer, self.inputs())
        solution = self.solution(layer)
        assert isinstance(solution, Solution)
        assert not any(leaf.requires_grad for leaf in pytree.tree_leaves((solution.value, solution.state)))
        assert solution.result.shape == solution.residual.shape == solution.steps.shape
        assert solution.result.dtype == solution.steps.dtype == torch.int64
        if self.solves():
            solution.require()
