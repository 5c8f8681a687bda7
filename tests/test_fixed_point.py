"""fixed_point() and the Solution: codes, counts, traces, steps, where gradients go."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from problems import F64, SOLVERS, TIGHT, Map, normal
from references import exactly
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf import ConvergenceError, Result, Termination, fixed_point, retrieve
from hopdeq_lwpf.forgetting import PFU, ReLU
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.solvers import LBFGS, Anderson, Broyden, Implicit, OneStep, Picard, Unrolled

RECORD = json.loads((Path(__file__).parent / "data" / "lwpf_reference.json").read_text())
every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_adjoint = pytest.mark.parametrize("adjoint", ["implicit", "unrolled", "onestep"])
halve = Map(lambda z, b: 0.5 * z + b)


# --- how a solve ends


@every_solver
def test_limit_cycle_ends_with_max_steps_and_advice(solver):
    text = RECORD["quirks"]["cycle: X, beta=1, D(x)=x if x>.5 else -5 (PFU bias=-5,mu=0.5), period 2"]
    cycle = json.loads(text.replace("'", '"'))
    patterns = torch.tensor(cycle["X"], dtype=F64)
    query = torch.tensor([[cycle["orbit"][0]]], dtype=F64)
    unit = PFU(0.5, -5.0)
    assert not Retrieval(forgetting=unit).has_energy
    solution = retrieve(query, patterns, forgetting=unit, solver=solver)
    assert solution.result.tolist() == [Result.MAX_STEPS]
    assert solution.steps.tolist() == [200]
    assert not solution.converged.any()
    with pytest.raises(ConvergenceError, match=r"1 of 1 problems.*MAX_STEPS.*raise max_steps.*damp"):
        solution.require()


def test_plain_iteration_follows_the_recorded_cycle():
    text = RECORD["quirks"]["cycle: X, beta=1, D(x)=x if x>.5 else -5 (PFU bias=-5,mu=0.5), period 2"]
    cycle = json.loads(text.replace("'", '"'))
    patterns = torch.tensor(cycle["X"], dtype=F64)
    query = torch.tensor([[cycle["orbit"][0]]], dtype=F64)
    ends = [
        retrieve(query, patterns, forgetting=PFU(0.5, -5.0), steps=steps).state.item() for steps in (40, 41)
    ]
    assert sorted(ends) == pytest.approx(sorted(cycle["orbit"]), abs=1e-10)


@every_solver
@every_adjoint
def test_divergence_is_a_code_and_returns_the_lowest_residual(solver, adjoint):
    # z -> 3 z + 1 from -1: |f - z| / |f| is 1/2 there and grows to 2/3.
    solution = fixed_point(
        Map(lambda z: 3 * z + 1), (), torch.full((2, 1), -1.0), solver=Picard(), adjoint=adjoint
    )
    assert solution.result.tolist() == [Result.DIVERGED] * 2
    assert solution.value.tolist() == [[-1.0]] * 2
    assert solution.residual.tolist() == [0.5] * 2
    with pytest.raises(ConvergenceError, match=r"2 of 2 .*DIVERGED.*expands"):
        solution.require()
    # An expanding linear map has a root, which accelerated solvers may find; none may claim a false one.
    found = fixed_point(
        Map(lambda z: 3 * z + 1), (), torch.full((2, 1), -1.0), solver=solver, adjoint=adjoint
    )
    assert_close(found.value[found.converged].detach(), torch.full((2, 1), -0.5)[found.converged])


def test_lowest_residual_of_all_iterates_that_were_tested():
    f = Map(lambda z: 3 * torch.sin(2 * z) + 0.5)  # chaotic
    z0, stop = normal(6, 1), Termination(max_steps=50, check_every=1)
    solution = fixed_point(f, (), z0, solver="picard", stop=stop, trace=True)
    unsolved = ~solution.converged
    assert unsolved.any()
    exactly(solution.residual[unsolved], solution.trace.residual.amin(0)[unsolved])


@every_solver
@every_adjoint
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_problem_that_is_not_finite_harms_no_other(solver, adjoint, bad):
    b = normal(12, 4)
    spoilt = b.clone()
    spoilt[5, 2] = bad
    rest = torch.arange(12) != 5
    f = Map(lambda z, b: torch.tanh(0.8 * z.flip(-1)) + b)

    def run(b):
        return fixed_point(f, (b,), torch.zeros_like(b), solver=solver, adjoint=adjoint, stop=TIGHT)

    leaf = spoilt.requires_grad_()
    mixed, alone = run(leaf), run(b[rest].requires_grad_())
    assert mixed.result[5] == Result.NONFINITE
    exactly(mixed.result[rest], alone.result)
    assert_close(mixed.value[rest].detach(), alone.value.detach(), rtol=0, atol=1e-12)
    with pytest.raises(ConvergenceError, match=r"1 of 12 .*NONFINITE.*NaN"):
        mixed.require()
    (gradient,) = torch.autograd.grad(mixed.value[rest].sum(), leaf)
    assert gradient[rest].isfinite().all()


@every_solver
def test_a_problem_that_turns_nan_on_the_way(solver):
    # The square root of 1 - z is NaN once z exceeds 1, which only the second problem does.
    b = torch.tensor([[0.1], [0.9], [0.2]], dtype=F64)
    f = Map(lambda z, b: b + 0.5 * (1 - torch.sqrt(1 - z)))
    solution = fixed_point(f, (b,), torch.zeros_like(b), solver=solver)
    alone = fixed_point(f, (b[[0, 2]],), torch.zeros(2, 1, dtype=F64), solver=solver)
    assert solution.result[1] in (Result.NONFINITE, Result.MAX_STEPS)
    assert solution.value[1].isfinite().all(), "the iterate before the NaN is of more use"
    assert_close(solution.value[[0, 2]], alone.value, rtol=0, atol=1e-12)


@every_solver
def test_infinity_at_the_first_evaluation_is_not_convergence(solver):
    solution = fixed_point(Map(lambda z: z + float("inf")), (), torch.zeros(2, 3), solver=solver)
    assert solution.result.tolist() == [Result.NONFINITE] * 2


@every_solver
def test_numbers_whose_norm_overflows_are_not_convergence(solver):
    solution = fixed_point(Map(lambda z: 0.5 * z + 1e25), (), torch.zeros(2, 3), solver=solver)
    right = ((solution.value - 2e25).abs() < 1e21).all(-1)
    assert (right | ~solution.converged).all()


@every_solver
@pytest.mark.parametrize("max_steps", [1, 2])
def test_very_few_steps_are_used(solver, max_steps):
    b = normal(3, 4)
    solution = fixed_point(
        halve, (b,), torch.zeros_like(b), solver=solver, stop=Termination(max_steps=max_steps)
    )
    assert (solution.steps == max_steps).all()
    assert (solution.evaluations == max_steps + 1).all()
    assert (solution.residual <= 0.5**max_steps / (2 - 0.5**max_steps) + 1e-12).all()


def test_converged_solution_passes_require():
    b = normal(3, 4)
    solution = fixed_point(halve, (b,), torch.zeros_like(b))
    assert solution.require() is solution
    assert solution.failure() is None


def test_start_at_the_root_takes_no_step():
    b = normal(3, 4)
    solution = fixed_point(halve, (b,), 2 * b)
    assert (solution.steps == 0).all()
    assert (solution.evaluations == 1).all()
    exactly(solution.value.detach(), 2 * b)


@every_solver
@every_adjoint
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 0, 3)], ids=str)
def test_empty_batch(solver, adjoint, shape):
    f = Map(lambda z, w: torch.tanh(0.5 * z @ w), state_ndim=1)
    w = torch.eye(3, requires_grad=True)
    solution = fixed_point(f, (w,), torch.zeros(shape), solver=solver, adjoint=adjoint, trace=True)
    assert solution.require().value.shape == shape
    for part in (solution.result, solution.residual, solution.steps, solution.evaluations):
        assert part.shape == shape[:-1]
    assert solution.trace.residual.shape[1:] == shape[:-1]
    solution.value.sum().backward()
    exactly(w.grad, torch.zeros(3, 3))


def test_empty_batch_of_counted_steps():
    w = torch.eye(3, requires_grad=True)
    solution = fixed_point(Map(lambda z, w: z @ w), (w,), torch.zeros(0, 3), steps=2)
    assert solution.result.shape == (0,)
    solution.value.sum().backward()
    exactly(w.grad, torch.zeros(3, 3))


# --- k steps


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_are_applications_with_ordinary_autograd(steps):
    w, z0 = (0.5 * normal(3, 3)).requires_grad_(), normal(2, 3, seed=4).requires_grad_()
    f = Map(lambda z, w: torch.tanh(z @ w))
    solution = fixed_point(f, (w,), z0, steps=steps, solver="lbfgs")
    z = z0
    for _ in range(steps):
        before, z = z, torch.tanh(z @ w)
    exactly(solution.value, z)
    exactly(solution.residual, ((z - before).norm(dim=-1) / z.norm(dim=-1)).detach())
    assert (solution.steps == steps).all()
    assert (solution.evaluations == steps).all()
    ours = torch.autograd.grad(solution.value.square().sum(), (w, z0))
    assert_close(ours, torch.autograd.grad(z.square().sum(), (w, z0)), rtol=0, atol=1e-14)


def test_steps_are_judged_by_the_tolerance():
    b = torch.ones(2, 1, dtype=F64)
    z0 = torch.tensor([[2.0], [0.0]], dtype=F64)  # the first one starts at its root
    few = fixed_point(halve, (b,), z0, steps=3)
    assert few.result.tolist() == [Result.CONVERGED, Result.MAX_STEPS]
    assert fixed_point(halve, (b,), z0, steps=60).result.tolist() == [Result.CONVERGED] * 2
    loose = fixed_point(halve, (b,), z0, steps=3, stop=Termination(rtol=0.5))
    assert loose.result.tolist() == [Result.CONVERGED] * 2


def test_many_steps_equal_the_equilibrium():
    b = normal(3, 4)
    assert_close(
        fixed_point(halve, (b,), b, steps=80).value, fixed_point(halve, (b,), b, stop=TIGHT).value.detach()
    )


# --- traces


@every_solver
@pytest.mark.parametrize("unit", [None, ReLU(), PFU()], ids=repr)
def test_trace(solver, unit):
    f = Retrieval(torch.logspace(-0.5, 1, 12, dtype=F64), forgetting=unit)
    x = f.prepare(normal(12, 5), normal(20, 5, seed=2))
    solution = fixed_point(f, x, f.init(x), solver=solver, trace=True)
    assert int(solution.converged.sum()) >= 11
    residual, energy = solution.trace.residual, solution.trace.energy
    assert residual.shape == energy.shape == (int(solution.evaluations.max()), 12)
    for i, count in enumerate(solution.evaluations.tolist()):
        assert residual[:count, i].isfinite().all()
        assert residual[count:, i].isnan().all()
        assert energy[count:, i].isnan().all()
        if not solution.converged[i]:
            continue
        assert residual[count - 1, i] == solution.residual[i]
        assert_close(energy[count - 1, i], f.energy(solution.state[i], row(f, x, i)), rtol=1e-9, atol=1e-12)
        assert_close(energy[0, i], f.energy(f.init(x)[i], row(f, x, i)), rtol=1e-9, atol=1e-12)
        if solver == "picard":
            assert (energy[:count, i].diff() <= 1e-12).all()


def row(f, x, i):
    return f.select(x, torch.arange(12) == i)[0]


def test_trace_costs_no_evaluation_and_changes_nothing():
    b = normal(3, 4)
    with_trace = fixed_point(halve, (b,), b, trace=True)
    without = fixed_point(halve, (b,), b)
    assert without.trace is None
    assert with_trace.trace.energy is None
    exactly(with_trace.value.detach(), without.value.detach())
    exactly(with_trace.evaluations, without.evaluations)


def test_trace_of_counted_steps():
    f = Retrieval(2.0)
    x = f.prepare(normal(3, 5), normal(7, 5, seed=2))
    trace = fixed_point(f, x, f.init(x), steps=4, trace=True).trace
    assert trace.residual.shape == trace.energy.shape == (4, 3)
    exactly(trace.energy[0], f.energy(f.init(x), x))
    exactly(trace.residual[3], fixed_point(f, x, f.init(x), steps=4).residual)


# --- what it leaves alone


def test_input_is_not_changed():
    z0 = {"u": normal(3, 2), "v": normal(3, 1)}
    x = {"a": normal(3, 2), "b": normal(3, 1)}
    before = copy.deepcopy((z0, x))
    f = lambda z, x: {"u": 0.5 * z["u"] + x["a"], "v": 0.5 * z["v"] + x["b"]}  # noqa: E731
    solution = fixed_point(f, x, z0)
    assert list(z0) == ["u", "v"]
    for was, now in zip(before, (z0, x), strict=True):
        for key in was:
            exactly(now[key], was[key])
    assert_close(solution.value["u"].detach(), 2 * x["a"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [None, 60])
def test_keys_of_a_dict_state_in_any_order(steps):
    f = lambda z, x: {"v": 0.5 * z["v"] + 1, "u": 0.5 * z["u"] + 2}  # noqa: E731
    z0 = {"u": torch.zeros(2, 3), "v": torch.zeros(2, 3)}
    value = fixed_point(f, None, z0, steps=steps).require().value
    assert_close(value["u"].detach(), torch.full((2, 3), 4.0), rtol=1e-4, atol=0)
    assert_close(value["v"].detach(), torch.full((2, 3), 2.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "settings",
    [Termination(), Picard(), Anderson(), Broyden(), LBFGS(), Implicit(), OneStep(), Unrolled()],
    ids=repr,
)
def test_settings_are_frozen_and_comparable(settings):
    assert settings == type(settings)()
    assert hash(settings) == hash(type(settings)())
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError, AttributeError)):
        settings.memory = 7


def test_nothing_requires_grad_where_nothing_is_trained():
    b = normal(3, 4)
    for adjoint in ("implicit", "unrolled", "onestep"):
        assert not fixed_point(halve, (b,), b, adjoint=adjoint).value.requires_grad
    fixed_point(halve, (b,), b).value.numpy()
    with torch.no_grad():
        assert not fixed_point(halve, (b.clone().requires_grad_(),), b).value.requires_grad


def test_any_module_is_a_function():
    cell = nn.Linear(3, 3).double()
    nn.init.orthogonal_(cell.weight, 0.5)
    solution = fixed_point(lambda z, x: torch.tanh(cell(z) + x), normal(2, 3), torch.zeros(2, 3, dtype=F64))
    assert solution.require().value.shape == (2, 3)
