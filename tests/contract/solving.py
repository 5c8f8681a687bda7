"""What every solver and adjoint promises: the equilibrium, its gradient, each problem by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import PROBLEMS, Problem, exact_gradients, flat, fresh, loss_of, relative_error
from torch import Tensor, nn

from contract.base import (
    F64,
    ROUNDING,
    TIGHT,
    copied,
    gradcheck,
    misspelt,
    near,
    same,
    threads,
    unconverged_allowed,
    untouched,
)
from contract.settings import SettingsContract
from hopdeq_lwpf import Equilibrium, Result, Solution, Termination, fixed_point
from hopdeq_lwpf.models import Retrieval

# A function without energy, one with, a state of several tensors.
SOLVED = ("tanh", "relu retrieval", "dict")


def cell(z: Tensor, x: Tensor) -> Tensor:
    """A contraction for each row by itself, with a rate of its own."""
    return torch.tanh(x[:, :1] * z.roll(1, -1) + x[:, 1:])


def rows(batch: int = 4, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """x and z0 of `cell`."""
    generator = torch.Generator().manual_seed(2)
    rates = torch.linspace(0.2, 0.9, 4, dtype=F64)[:, None]
    x = torch.cat([rates, torch.randn(4, 5, dtype=F64, generator=generator)], 1)[:batch].to(dtype)
    return x, torch.zeros(batch, 5, dtype=dtype)


class SolverContract(SettingsContract):
    """Of a solver: an object with options, or a name."""

    name: str | None = None  # by which it is asked for
    stop = TIGHT

    def solve(self, x: Tensor, z0: Tensor, **options: Any) -> Solution:
        """The solution of `cell`."""
        return fixed_point(cell, x, z0, **{"solver": self.make(), "stop": self.stop, **options})

    @pytest.mark.parametrize("problem", SOLVED)
    def test_it_reaches_the_root(self, problem: str) -> None:
        given = PROBLEMS[problem]
        x = given.prepare(*given.arguments)
        solution = fixed_point(given.f, x, given.z0, solver=self.make(), stop=self.stop).require()
        near(flat(solution.state), flat(given.root), 1e-9)

    def test_a_problem_alone_gives_what_it_gives_in_a_batch(self) -> None:
        x, z0 = rows()
        together = self.solve(x, z0)
        for i in range(len(x)):
            alone = self.solve(x[i : i + 1], z0[i : i + 1])
            near(alone.value[0], together.value[i], 1e-9)
            same(alone.result[0], together.result[i])

    def test_nan_in_one_problem_harms_no_other(self) -> None:
        x, z0 = rows()
        expected = self.solve(x, z0)
        x[1, 2] = torch.nan
        solution = self.solve(x, z0)
        assert solution.result.tolist() == [0, int(Result.NONFINITE), 0, 0]
        near(solution.value[[0, 2, 3]], expected.value[[0, 2, 3]], 1e-9)

    def test_a_problem_without_an_equilibrium_is_told_and_harms_no_other(self) -> None:
        x, z0 = rows()
        expected = self.solve(x, z0)

        def f(z: Tensor, x: Tensor) -> Tensor:
            grows = torch.arange(len(z))[:, None] == 2 if len(z) == 4 else x[:, :1] == x[2, 0]
            return torch.where(grows, 3 * z + 1, cell(z, x))

        stop = Termination(rtol=1e-10, atol=1e-12, max_steps=60)
        solution = fixed_point(f, x, z0, solver=self.make(), stop=stop)
        near(solution.value[[0, 1, 3]], expected.value[[0, 1, 3]], 1e-6)
        # Of 3 z + 1 there is one, which plain steps flee and others find.
        assert solution.converged[2] == bool((solution.value[2] + 0.5).abs().max() < 1e-6)

    def test_an_end_before_convergence_is_told(self) -> None:
        x, z0 = rows()
        solution = self.solve(x, z0, stop=Termination(rtol=1e-12, max_steps=2))
        assert set(solution.result.tolist()) == {int(Result.MAX_STEPS)}
        with pytest.raises(RuntimeError, match="4 of 4 problems did not converge"):
            solution.require()

    def test_an_empty_batch_passes(self) -> None:
        solution = self.solve(*rows(0))
        assert solution.value.shape == (0, 5)
        assert solution.result.shape == (0,)

    @pytest.mark.parametrize("dtype", ROUNDING, ids=str)
    def test_every_dtype_gives_what_float64_gives(self, dtype: torch.dtype) -> None:
        x, z0 = rows(dtype=dtype)
        solution = self.solve(x, z0, stop=Termination(rtol=4 * torch.finfo(dtype).eps, max_steps=300))
        assert solution.value.dtype == dtype
        # Rounding of f is magnified by 1 / (1 - rate), 10 at most here.
        near(solution.value.double(), self.solve(x.double(), z0.double()).value, 3 * ROUNDING[dtype])

    def test_autocast_changes_little(self) -> None:
        x, z0 = rows(dtype=torch.float32)
        layer = nn.Linear(5, 5)
        nn.init.orthogonal_(layer.weight, 0.5)

        def f(z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(layer(z) + x[:, 1:])

        stop = Termination(rtol=1e-2)
        with torch.no_grad():
            expected = fixed_point(f, x, z0, solver=self.make(), stop=stop).value
            with torch.autocast("cpu", torch.bfloat16):
                value = fixed_point(f, x, z0, solver=self.make(), stop=stop).value
        near(value.float(), expected, ROUNDING[torch.bfloat16])

    def test_twice_it_gives_the_same_to_the_last_bit(self) -> None:
        first, second = self.solve(*rows()), self.solve(*rows())
        same(second.value, first.value)
        same(second.steps, first.steps)

    def test_one_thread_and_two_give_the_same(self) -> None:
        with threads(1):
            one = self.solve(*rows())
        with threads(2):
            two = self.solve(*rows())
        near(two.value, one.value, 1e-6)

    def test_start_and_context_are_never_changed(self) -> None:
        x, z0 = rows()
        with untouched(x, z0):
            self.solve(x, z0)

    def test_the_trace_begins_at_the_start_and_ends_at_the_residual(self) -> None:
        solution = self.solve(*rows(), trace=True)
        assert solution.trace is not None
        x, z0 = rows()
        start = (cell(z0, x) - z0).norm(dim=-1) / cell(z0, x).norm(dim=-1)
        near(solution.trace.residual[0], start, 1e-12)
        least = solution.trace.residual.nan_to_num(nan=torch.inf).amin(0)
        near(solution.residual, least, 1e-9)

    def test_it_is_found_by_its_name_and_a_misspelt_one_names_the_nearest(self) -> None:
        assert self.name is not None
        x, z0 = rows()
        named = self.solve(x, z0, solver=self.name)
        same(named.value, self.solve(x, z0, solver=self.kind(**self.by_name())).value)
        with pytest.raises(ValueError, match=f"Did you mean '{self.name.removeprefix('torchdeq:')}'"):
            self.solve(x, z0, solver=misspelt(self.name))

    def by_name(self) -> dict[str, Any]:
        """The options that the name stands for: the defaults."""
        return {}

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
    def test_inside_a_compiled_layer_it_gives_the_same(self) -> None:
        torch._dynamo.reset()
        inner = nn.Linear(5, 5).double()
        nn.init.orthogonal_(inner.weight, 0.5)
        layer = Equilibrium(Tanh(inner), solver=self.make(), stop=self.stop)
        x = rows()[0][:, 1:]
        near(torch.compile(layer, backend="eager")(x), layer(x), 1e-9)
        torch._dynamo.reset()


class AdjointContract(SettingsContract):
    """Of an adjoint: `error` bounds |gradient - exact| / |exact| on the problems of `solved`."""

    name: str | None = None
    error = 1e-8
    solved = ("tanh", "pfu retrieval")

    def gradients(self, problem: Problem, scale: float = 1.0, **options: Any) -> tuple[Tensor, ...]:
        """d loss / d arguments, through the solve."""
        arguments = fresh(problem)
        settings = {"adjoint": self.make(), "stop": TIGHT, "solver": "picard", **options}
        solution = fixed_point(problem.f, problem.prepare(*arguments), problem.z0, **settings)
        return torch.autograd.grad(scale * loss_of(solution.value), arguments)

    def test_gradients_are_as_near_to_exact_ones_as_declared(self) -> None:
        for problem in self.solved:
            given = PROBLEMS[problem]
            assert relative_error(self.gradients(given), exact_gradients(given)) < self.error

    def function(self, x: Tensor) -> Tensor:
        """The equilibria of a memory with an injected query, as a function of the query."""
        f = Retrieval(0.8, inject="input")
        patterns = torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
        context = f.prepare(x, patterns)
        settings = {"adjoint": self.make(), "stop": TIGHT, "solver": "picard"}
        return fixed_point(f, context, f.init(context).detach(), **settings).value

    def query(self, batch: int = 3) -> Tensor:
        """What `function` gets."""
        return torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(2))[:batch]

    def gradient(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        x = x.detach().clone().requires_grad_()
        value = self.function(x)
        value.backward(torch.ones_like(value) if weights is None else weights)
        assert x.grad is not None
        return x.grad

    def test_finite_differences_agree(self) -> None:
        gradcheck(self.function, (self.query(),))

    def test_the_gradient_of_a_problem_alone_is_that_in_a_batch(self) -> None:
        weights = torch.ones(3, 4, dtype=F64)
        together = self.gradient(self.query(), weights)
        for i in range(3):
            near(self.gradient(self.query()[i : i + 1], weights[:1])[0], together[i], 1e-7)

    def test_nan_in_one_problem_harms_no_other(self) -> None:
        query, weights = self.query(), torch.ones(3, 4, dtype=F64)
        expected = self.gradient(query, weights)
        query[1, 0] = torch.nan
        with unconverged_allowed():
            near(self.gradient(query, weights)[[0, 2]], expected[[0, 2]], 1e-7)

    def test_the_scale_of_the_loss_is_the_scale_of_the_gradient(self) -> None:
        weights = torch.ones(3, 4, dtype=F64)
        expected = self.gradient(self.query(), weights)
        for scale in (1e-6, 1e6):
            near(self.gradient(self.query(), scale * weights) / scale, expected, 1e-7)

    def test_an_empty_batch_has_an_empty_gradient(self) -> None:
        assert self.gradient(self.query(0)).shape == (0, 4)

    def test_parameters_get_gradients_though_the_input_needs_none(self) -> None:
        torch.manual_seed(0)
        inner = nn.Linear(4, 4).double()
        nn.init.orthogonal_(inner.weight, 0.5)
        layer = Equilibrium(self.module(inner), adjoint=self.make(), stop=TIGHT, solver="picard")
        out = layer(self.query())
        out.sum().backward(retain_graph=True)
        first = copied([p.grad for p in layer.parameters()])
        assert first
        assert all(part is not None and part.abs().sum() > 0 for part in first)
        layer.zero_grad()
        out.sum().backward()
        same([p.grad for p in layer.parameters()], first)

    def module(self, inner: nn.Module) -> nn.Module:
        """A function with these parameters that this adjoint can differentiate."""
        return Tanh(inner)

    def test_without_gradients_there_is_no_graph(self) -> None:
        with torch.no_grad():
            assert not self.function(self.query().requires_grad_()).requires_grad
        assert not self.function(self.query()).requires_grad

    def test_what_the_caller_gives_is_never_changed(self) -> None:
        query = self.query().requires_grad_()
        with untouched(query):
            self.function(query).sum().backward()

    def test_one_thread_and_two_give_the_same(self) -> None:
        with threads(1):
            one = self.gradient(self.query())
        with threads(2):
            two = self.gradient(self.query())
        near(two, one, 1e-6)

    def test_a_second_derivative_is_right_or_refused(self) -> None:
        query = self.query(1).requires_grad_()
        (first,) = torch.autograd.grad(self.function(query).sum(), query, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), query)

        def slope(x: Tensor) -> Tensor:
            return self.gradient(x, torch.ones(1, 4, dtype=F64)).square().sum()

        step = 1e-5 * torch.eye(4, dtype=F64)
        numeric = [(slope(query + d) - slope(query - d)) / 2e-5 for d in step]
        near(second[0], torch.stack(numeric), 1e-5)

    def test_it_is_found_by_its_name_and_a_misspelt_one_names_the_nearest(self) -> None:
        assert self.name is not None
        problem = PROBLEMS[self.solved[0]]
        same(self.gradients(problem, adjoint=self.name), self.gradients(problem, adjoint=self.kind()))
        with pytest.raises(ValueError, match=f"Did you mean '{self.name}'"):
            self.gradients(problem, adjoint=misspelt(self.name))


class Tanh(nn.Module):
    """f(z, x) = tanh(W z + b + x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)
