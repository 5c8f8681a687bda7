"""What every fixed-point function promises: one problem by itself, one energy, one metric."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from contract.base import (
    F64,
    ROUNDING,
    TIGHT,
    converted,
    copied,
    gradcheck,
    near,
    pickled,
    same,
    threads,
    untouched,
)
from contract.modules import ModuleContract
from hopdeq_lwpf import Result, fixed_point


class FunctionContract(ModuleContract):
    """Of a function f(z, x): `arguments(batch)` are those of `prepare`, and z is near `init`.

    An energy must have a gradient that is M (z - f(z)), M being the metric, times `factor`.
    """

    solver = "auto"

    def arguments(self, batch: int = 3) -> tuple[Any, ...]:
        """What `prepare` gets: float32, always the same numbers."""
        raise NotImplementedError(f"{type(self).__name__} must override arguments(batch)")

    def prepare(self, f: Any, arguments: tuple[Any, ...]) -> Any:
        """The context of these arguments."""
        return f.prepare(*arguments)

    def permuted(self, arguments: tuple[Any, ...], order: Tensor) -> tuple[Any, ...]:
        """The arguments with their stored patterns in another order."""
        raise NotImplementedError(f"{type(self).__name__} must override permuted(arguments, order)")

    stored = 5

    def state(self, f: Any, x: Any) -> Tensor:
        """A state that is no equilibrium."""
        z = f.init(x)
        return z + 0.2 * torch.randn(z.shape, generator=torch.Generator().manual_seed(9)).to(z)

    def factor(self, f: Any, z: Tensor, x: Any) -> Tensor | float:
        """What M (z - f(z)) is multiplied by to give the gradient of the energy."""
        return 1.0

    def problem(self, dtype: torch.dtype = F64, batch: int = 3) -> tuple[Any, Tensor, Any]:
        """f, z and x."""
        f = self.made().to(dtype)
        x = self.prepare(f, converted(self.arguments(batch), dtype))
        return f, self.state(f, x), x

    def inputs(self, batch: int = 3) -> tuple[Any, ...]:
        f = self.made()
        x = self.prepare(f, self.arguments(batch))
        return copied((self.state(f, x).detach(), x))

    def rows(self, f: Any, z: Tensor, x: Any, live: Tensor) -> tuple[Tensor, Any]:
        """The state and context of these problems alone."""
        narrowed, kept = f.select(x, live)
        assert kept.tolist() == live.nonzero().squeeze(1).tolist()
        return z.flatten(0, -1 - f.state_ndim)[kept], narrowed

    def test_a_step_has_the_shape_of_the_state(self) -> None:
        f, z, x = self.problem()
        out = f(z, x)
        assert out.shape == z.shape
        assert out.dtype == z.dtype
        assert f.state_ndim in (1, 2)
        assert isinstance(f.has_energy, bool)

    def test_problems_selected_get_the_step_that_they_get_among_all(self) -> None:
        f, z, x = self.problem()
        problems = z.shape[: -f.state_ndim].numel()
        whole = f(z, x).flatten(0, -1 - f.state_ndim)
        for number in range(problems):
            live = torch.zeros(problems, dtype=torch.bool)
            live[number] = True
            narrowed, kept = f.select(x, live)
            some = f(z.flatten(0, -1 - f.state_ndim)[kept], narrowed)
            near(some, whole[kept], 1e-12)

    def test_nan_in_one_problem_harms_no_other(self) -> None:
        f, z, x = self.problem()
        z = z.detach().clone()
        expected = f(z, x)
        z[1] = torch.nan
        out = f(z, x)
        assert out[1].isnan().any()
        near(out[[0, 2]], expected[[0, 2]], 1e-12)

    def test_the_order_of_stored_patterns_does_not_matter(self) -> None:
        f, z, x = self.problem()
        arguments = converted(self.arguments(), F64)
        order = torch.arange(self.stored).roll(2)
        near(f(z, self.prepare(f, self.permuted(arguments, order))), f(z, x), 1e-12)

    def test_step_and_evaluate_give_what_f_gives(self) -> None:
        f, z, x = self.problem()
        expected = f(z, x)
        if hasattr(f, "step"):
            near(f.step(z, x)[0], expected, 1e-12)
        if hasattr(f, "evaluate"):
            image, energy, _ = f.evaluate(z, x)
            near(image, expected, 1e-12)
            assert_close(energy(), f.energy(z, x), rtol=1e-10, atol=1e-10)

    def test_the_energy_has_the_update_as_its_gradient(self) -> None:
        f, z, x = self.problem()
        assert f.has_energy
        z = z.detach().requires_grad_()
        energy = f.energy(z, x)
        assert energy.shape == z.shape[: -f.state_ndim]
        (slope,) = torch.autograd.grad(energy.sum(), z)
        with torch.no_grad():
            metric = (f.metric(z, x) if hasattr(f, "metric") else None) or (lambda v: v)
            near(slope, self.factor(f, z, x) * metric(z - f(z, x)), 1e-9)

    def test_plain_iteration_never_raises_the_energy(self) -> None:
        f, z, x = self.problem()
        assert f.has_energy
        with torch.no_grad():
            before = f.energy(z, x)
            for _ in range(12):
                z = f(z, x)
                after = f.energy(z, x)
                # What a sum of some terms of size 1 loses to rounding.
                assert (after <= before + 1e-12).all()
                before = after

    def test_the_jacobian_is_self_adjoint_in_the_metric(self) -> None:
        f, z, x = self.problem(batch=1)
        solution = fixed_point(f, x, f.init(x).detach(), solver=self.solver, stop=TIGHT)
        z = solution.require().state.detach()
        metric = f.metric(z, x)
        assert metric is not None, "no metric is declared"
        n = z.numel()
        jacobian = torch.autograd.functional.jacobian(lambda s: f(s, x), z).reshape(n, n)
        with torch.no_grad():
            columns = [metric(row.reshape(z.shape)).reshape(n) for row in torch.eye(n, dtype=F64)]
        m = torch.stack(columns, 1)
        near(m.T, m, 1e-12)
        assert (torch.linalg.eigvalsh(m) > 0).all()
        near((m @ jacobian).T, m @ jacobian, 1e-8)

    @pytest.mark.parametrize("dtype", ROUNDING, ids=str)
    def test_every_dtype_gives_what_float64_gives(self, dtype: torch.dtype) -> None:
        f, z, x = self.problem(dtype)
        out = f(z, x)
        assert out.dtype == dtype
        wider = self.made().to(dtype).to(F64)
        exact = self.prepare(wider, converted(converted(self.arguments(), dtype), F64))
        near(out.double(), wider(z.double(), exact), ROUNDING[dtype])

    def test_gradients_of_the_state_the_arguments_and_the_parameters(self) -> None:
        f, z, _ = self.problem(batch=2)
        leaves, tree = pytree.tree_flatten(converted(self.arguments(2), F64))
        learned = {name: p for name, p in f.named_parameters() if p.requires_grad}

        def function(state: Tensor, *tensors: Tensor) -> Tensor:
            parameters = dict(zip(learned, tensors[len(leaves) :], strict=True))
            arguments = pytree.tree_unflatten(list(tensors[: len(leaves)]), tree)
            with torch.nn.utils.stateless._reparametrize_module(f, parameters):
                return f(state, self.prepare(f, arguments))

        gradcheck(function, (z, *leaves, *learned.values()))

    def test_its_equilibrium_is_found_and_an_empty_batch_passes(self) -> None:
        f, _, x = self.problem()
        solution = fixed_point(f, x, f.init(x).detach(), solver=self.solver, stop=TIGHT)
        state = solution.require().state.detach()
        near(f(state, x), state, 1e-11)
        none = self.prepare(f, tuple(self.emptied(converted(self.arguments(), F64))))
        empty = fixed_point(f, none, f.init(none).detach(), solver=self.solver)
        assert empty.value.shape == (0, *state.shape[1:])
        assert empty.result.shape[0] == 0

    def emptied(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments for no problem at all: the first of them has the problems in its first dimension."""
        return (arguments[0][:0], *arguments[1:])

    def test_fixed_steps_are_applications_of_f(self) -> None:
        f, _, x = self.problem()
        z = f.init(x)
        solution = fixed_point(f, x, z, steps=2)
        near(solution.state, f(f(z, x), x), 1e-12)
        assert solution.result.unique().tolist() in ([int(Result.CONVERGED)], [int(Result.MAX_STEPS)], [0, 1])

    def test_one_thread_and_two_give_the_same(self) -> None:
        f, z, x = self.problem()
        with threads(1):
            one = f(z, x)
        with threads(2):
            two = f(z, x)
        near(two, one, 1e-6)

    def test_prepare_leaves_the_arguments_as_they_were(self) -> None:
        arguments = self.arguments()
        with untouched(arguments):
            f = self.made()
            f(f.init(self.prepare(f, arguments)), self.prepare(f, arguments))

    def test_a_context_survives_a_pickle(self) -> None:
        f, z, x = self.problem()
        same(f(z, pickled(copied(x))).detach(), f(z, x).detach())

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    def test_compiled_it_gives_the_same(self) -> None:
        torch._dynamo.reset()
        f, z, x = self.problem()
        assert_close(torch.compile(f, backend="eager", fullgraph=True)(z, x), f(z, x), rtol=1e-12, atol=1e-12)
        torch._dynamo.reset()
