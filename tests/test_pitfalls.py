"""What other libraries get wrong, one test each."""

import copy
import gc
import weakref

import pytest
import torch
from problems import (
    F64,
    PROBLEMS,
    SOLVERS,
    TIGHT,
    Map,
    exact_gradients,
    fresh,
    loss_of,
    normal,
    relative_error,
    solve,
)
from references import exactly
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from hopdeq_lwpf import Equilibrium, Result, Termination, fixed_point, retrieve
from hopdeq_lwpf.solvers import Anderson, Implicit, Picard, build

every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_adjoint = pytest.mark.parametrize("adjoint", ["implicit", "unrolled", "onestep"])


def layer(seed: int = 0) -> nn.Linear:
    linear = nn.Linear(4, 4).double()
    nn.init.orthogonal_(linear.weight, 0.7, generator=torch.Generator().manual_seed(seed))
    return linear


def cell_of(linear: nn.Linear):
    return lambda z, x: torch.tanh(linear(z) + x)


# --- gradients


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-6, 1e-12])
def test_loss_scale_does_not_change_the_gradient(scale):
    problem = PROBLEMS["tanh"]
    arguments = fresh(problem)
    value = solve(problem, arguments).value
    small = torch.autograd.grad(scale * loss_of(value), arguments)
    assert relative_error(tuple(g / scale for g in small), exact_gradients(problem)) < 1e-5


def test_default_gradient_is_not_that_of_one_step():
    problem = PROBLEMS["softmax retrieval"]
    arguments = fresh(problem)
    value = solve(problem, arguments, stop=Termination()).value
    assert relative_error(torch.autograd.grad(loss_of(value), arguments), exact_gradients(problem)) < 1e-3


def test_quick_convergence_does_not_change_the_kind_of_gradient():
    # From the root itself no step is made; the gradient is the implicit one all the same.
    problem = PROBLEMS["tanh"]
    arguments = fresh(problem)
    solution = solve(problem, arguments)
    again = fixed_point(problem.f, arguments, problem.root, stop=Termination())
    assert (again.steps == 0).all()
    pair = [torch.autograd.grad(loss_of(s.value), arguments) for s in (solution, again)]
    assert relative_error(*pair) < 1e-6


@every_adjoint
def test_eval_mode_keeps_the_gradient(adjoint):
    linear, x = layer(), normal(3, 4)
    model = Equilibrium(lambda z, x: torch.tanh(linear(z) + x), adjoint=adjoint, stop=TIGHT)
    grads = []
    for mode in (True, False):
        value = model.train(mode)(x)
        grads.append(torch.autograd.grad(value.sum(), linear.weight)[0])
    exactly(*grads)


@every_adjoint
def test_parameters_get_gradients_though_the_input_needs_none(adjoint):
    linear, x = layer(), normal(3, 4)
    value = fixed_point(cell_of(linear), x, torch.zeros_like(x), adjoint=adjoint).value
    grads = torch.autograd.grad(value.sum(), tuple(linear.parameters()))
    assert all(g.abs().sum() > 0 for g in grads)
    assert linear.weight.grad is None, "autograd.grad must not fill .grad"


@every_adjoint
def test_backward_to_the_input_alone_leaves_the_parameters_alone(adjoint):
    linear, x = layer(), normal(3, 4).requires_grad_()
    value = fixed_point(cell_of(linear), x, torch.zeros(3, 4, dtype=F64), adjoint=adjoint).value
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.abs().sum() > 0
    assert linear.weight.grad is None


def test_tensors_that_f_closes_over_get_gradients():
    # A leaf, a non-leaf and one inside a container, none of them an argument of f.
    leaf = normal(4, seed=3).requires_grad_()
    weight = (0.5 * normal(4, 4)).requires_grad_()
    scaled = 0.3 * weight
    bag = {"shift": leaf.sin()}

    def f(z, x):
        return torch.tanh(z @ scaled + bag["shift"] + leaf)

    z0 = torch.zeros(3, 4, dtype=F64)
    ours, truth = (
        fixed_point(f, None, z0, stop=TIGHT, adjoint=adjoint, solver="picard").value
        for adjoint in (Implicit(rtol=1e-12), "unrolled")
    )
    pair = [torch.autograd.grad(loss_of(v), (leaf, weight), retain_graph=True) for v in (ours, truth)]
    assert relative_error(*pair) < 1e-9


def test_input_may_be_a_tuple_or_a_dict():
    x = {"a": normal(3, 4).requires_grad_(), "b": (normal(3, 4, seed=2).requires_grad_(),)}
    value = fixed_point(
        lambda z, x: 0.5 * torch.tanh(z) + x["a"] * x["b"][0], x, torch.zeros(3, 4, dtype=F64)
    ).value
    grads = torch.autograd.grad(value.sum(), (x["a"], x["b"][0]))
    assert all(g.abs().sum() > 0 for g in grads)


@every_adjoint
def test_two_forwards_then_two_backwards(adjoint):
    linear = layer()

    def run(seed):
        x = normal(3, 4, seed=seed)
        return fixed_point(cell_of(linear), x, torch.zeros_like(x), adjoint=adjoint).value.sum()

    first, second = run(1), run(2)
    together = [torch.autograd.grad(loss, linear.weight)[0] for loss in (first, second)]
    exactly(together, [torch.autograd.grad(run(seed), linear.weight)[0] for seed in (1, 2)])


@every_adjoint
def test_second_backward_equals_the_first(adjoint):
    linear, x = layer(), normal(3, 4)
    loss = fixed_point(cell_of(linear), x, torch.zeros_like(x), adjoint=adjoint).value.square().sum()
    first = torch.autograd.grad(loss, linear.weight, retain_graph=True)
    exactly(torch.autograd.grad(loss, linear.weight), first)


def test_solves_that_share_parameters_add_up():
    linear = layer()
    x = normal(3, 4)

    def chain(adjoint):
        options = {"stop": TIGHT, "adjoint": adjoint, "solver": "picard"}
        one = fixed_point(cell_of(linear), x, torch.zeros_like(x), **options).value
        two = fixed_point(cell_of(linear), one, torch.zeros_like(x), **options).value
        return torch.autograd.grad((one * two).sum(), tuple(linear.parameters()))

    assert relative_error(chain(Implicit(rtol=1e-12)), chain("unrolled")) < 1e-9


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_a_solve(reentrant):
    linear, x = layer(), normal(3, 4).requires_grad_()

    def run(x):
        return fixed_point(cell_of(linear), x, torch.zeros(3, 4, dtype=F64)).value

    inputs = (x, linear.weight)
    expected = torch.autograd.grad(run(x).sum(), inputs)
    x.grad = linear.weight.grad = None
    checkpoint(run, x, use_reentrant=reentrant).sum().backward()
    assert_close((x.grad, linear.weight.grad), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
def test_solution_is_freed_without_the_garbage_collector(create_graph):
    linear, x = layer(), normal(3, 4)
    gc.disable()
    try:
        solution = fixed_point(cell_of(linear), x, torch.zeros_like(x))
        torch.autograd.grad(solution.value.sum(), linear.weight, create_graph=create_graph)
        alive = [weakref.ref(solution.value), weakref.ref(solution.adjoint)]
        del solution
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


@every_solver
def test_solvers_work_under_autocast_in_full_precision(solver):
    linear = layer().float()
    x = normal(12, 4).float()

    def f(z, x):
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(linear(z) + x)

    # f is exact here, so the solver's own products are what autocast could spoil.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fixed_point(f, x, torch.zeros_like(x), solver=solver)
    (gradient,) = torch.autograd.grad(inside.value.sum(), linear.weight)
    outside = fixed_point(f, x, torch.zeros_like(x), solver=solver)
    (expected,) = torch.autograd.grad(outside.value.sum(), linear.weight)
    assert inside.converged.all()
    assert_close(inside.value, outside.value, rtol=0, atol=1e-4)
    assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


def test_backward_runs_under_the_autocast_state_of_the_forward():
    linear = layer().float()
    x = normal(3, 4).float()
    seen = []

    def f(z, x):
        seen.append(torch.is_autocast_enabled("cpu"))
        return torch.tanh(linear(z) + x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = fixed_point(f, x, torch.zeros_like(x), stop=Termination(rtol=1e-2)).value
    (gradient,) = torch.autograd.grad(value.sum(), linear.weight)
    assert all(seen)
    exact = fixed_point(cell_of(linear), x, torch.zeros_like(x)).value
    (truth,) = torch.autograd.grad(exact.sum(), linear.weight)
    assert (gradient - truth).norm() < 0.05 * truth.norm()


# --- solvers


@every_solver
def test_two_evaluations_move_the_state(solver):
    b = normal(3, 4)
    one = fixed_point(Map(lambda z, b: 0.5 * z + b), (b,), torch.zeros_like(b), solver=solver,
                      stop=Termination(max_steps=1))  # fmt: skip
    assert_close(one.value.detach(), b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("damping", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", [Picard, Anderson])
def test_damping_does_not_hide_the_residual(kind, damping):
    b = normal(3, 4)
    stop = Termination(rtol=1e-6, max_steps=5000)
    solution = fixed_point(
        Map(lambda z, b: 0.5 * z + b), (b,), torch.zeros_like(b), solver=kind(damping=damping), stop=stop
    ).require()
    # |z - z*| <= |f(z) - z| / (1 - rate).
    assert ((solution.value.detach() - 2 * b).norm(dim=1) <= 2.1e-6 * (2 * b).norm(dim=1)).all()
    assert (0.5 * solution.value + b - solution.value).norm() <= 1.1e-6 * (2 * b).norm()


@every_solver
def test_a_bad_problem_does_not_keep_the_others_iterating(solver):
    b = normal(16, 4)
    good = fixed_point(Map(lambda z, b: 0.5 * torch.tanh(z) + b), (b,), torch.zeros_like(b), solver=solver)
    b[3] = float("nan")
    calls = []

    def f(z, x):
        calls.append(1)
        return 0.5 * torch.tanh(z) + b

    with torch.no_grad():
        mixed = fixed_point(f, None, torch.zeros_like(b), solver=solver)
    assert mixed.result[3] == Result.NONFINITE
    assert len(calls) == int(good.evaluations.max())


@every_solver
def test_iteration_stops_when_it_is_done(solver):
    b = normal(3, 4)
    solution = fixed_point(Map(lambda z, b: 0.5 * z + b), (b,), torch.zeros_like(b), solver=solver)
    assert (solution.evaluations < 30).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_small_systems_are_solved_in_any_dtype(solver, dtype):
    b = normal(3, 4).to(dtype)
    stop = Termination(rtol=2 * torch.finfo(dtype).eps)
    f = Map(lambda z, b: torch.tanh(0.7 * z.flip(-1)) + b)
    solution = fixed_point(f, (b,), torch.zeros_like(b), solver=solver, stop=stop)
    assert solution.require().value.dtype == dtype


def test_anderson_does_not_stall_on_small_residuals():
    patterns = nn.functional.normalize(normal(64, 16), dim=-1)
    query = patterns[:8] + 0.2 * normal(8, 16, seed=2)
    stop = Termination(rtol=2e-6, max_steps=100)
    for dtype in (torch.float32, F64):
        parts = query.to(dtype), patterns.to(dtype)
        retrieve(*parts, beta=6.0, solver="anderson", stop=stop).require()


def test_singular_history_of_one_problem_spares_the_batch():
    # The first problem is at its root from the start, the second moves along one line only.
    f = Map(lambda z, b: 0.5 * z + b)
    b = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.3, -2.0, 5.0]], dtype=F64)
    for solver in ("anderson", "broyden", "lbfgs"):
        solution = fixed_point(f, (b,), torch.zeros_like(b), solver=solver, stop=TIGHT).require()
        assert_close(solution.value.detach(), 2 * b, rtol=0, atol=1e-11)


def test_trace_begins_with_the_residual_of_the_start():
    b = normal(3, 4)
    f = Map(lambda z, b: 0.5 * z + b)
    trace = fixed_point(f, (b,), b, trace=True).trace
    assert_close(trace.residual[0], torch.full((3,), 1 / 3, dtype=F64))


def test_failure_is_never_silent():
    with pytest.warns(UserWarning, match="did not converge"):
        Equilibrium(Map(lambda z, x: 3 * z + x), solver="picard")((normal(2, 3),), normal(2, 3))


def test_nested_states_and_mixed_dtypes_come_back_as_they_went_in():
    z0 = {"a": torch.zeros(2, 3), "b": (torch.zeros(2, dtype=F64), torch.zeros(2, 1, dtype=torch.bfloat16))}

    def f(z, x):
        return {"a": 0.5 * z["a"] + 1, "b": (0.5 * z["b"][0] + 1, 0.5 * z["b"][1] + 1)}

    value = fixed_point(f, None, z0, stop=Termination(rtol=1e-2)).require().value
    for now, was in ((value["a"], z0["a"]), *zip(value["b"], z0["b"], strict=True)):
        assert now.dtype == was.dtype
        assert now.shape == was.shape
        assert_close(now.detach(), torch.full_like(was, 2.0), rtol=0.03, atol=0)


def test_settings_of_the_caller_are_not_rewritten():
    settings = {"solver": "anderson", "memory": 3}
    kept = copy.deepcopy(settings)
    build(settings)
    assert settings == kept
    stop = Termination(max_steps=3)
    fixed_point(Map(lambda z: 0.5 * z), (), normal(2, 3), stop=stop, solver="anderson")
    assert stop == Termination(max_steps=3)


# --- retrieval


def test_beta_belongs_to_a_head_and_not_to_a_dimension():
    query, patterns = normal(2, 2, 3, 4), normal(2, 2, 5, 4, seed=2)
    beta = torch.tensor([[1.0], [8.0]], dtype=F64)
    together = retrieve(query, patterns, beta=beta, steps=1).value
    for head, b in enumerate((1.0, 8.0)):
        assert_close(together[:, head], retrieve(query[:, head], patterns[:, head], beta=b, steps=1).value)


@pytest.mark.parametrize("beta", [1, 1.0, torch.tensor(1.0), nn.Parameter(torch.tensor(1.0))])
def test_integers_and_parameters_are_welcome(beta):
    query, patterns = nn.Parameter(normal(3, 4).float()), nn.Parameter(normal(5, 4).float())
    exactly(
        retrieve(query, patterns, beta=beta, steps=1).value,
        retrieve(query, patterns, beta=1.0, steps=1).value,
    )


def test_median_of_a_query_does_not_depend_on_its_batch_mates():
    query, patterns = normal(4, 4), normal(9, 4, seed=2)
    together = retrieve(query, patterns, forgetting="pfu", steps=1).value
    query[1:] *= 100
    exactly(retrieve(query, patterns, forgetting="pfu", steps=1).value[0], together[0])


def test_tolerance_is_met_by_every_query_by_itself():
    query, patterns = normal(20, 6), normal(30, 6, seed=2)
    beta = torch.logspace(-1, 1, 20, dtype=F64)
    stop = Termination(rtol=1e-6)
    for solver in ("picard", "auto"):
        together = retrieve(query, patterns, beta=beta, solver=solver, stop=stop)
        for i in range(20):
            one = retrieve(query[i], patterns, beta=float(beta[i]), solver=solver, stop=stop)
            assert_close(one.value, together.value[i], rtol=0, atol=1e-9)
            assert one.steps == together.steps[i]


@pytest.mark.parametrize("steps", [1, 3])
def test_count_of_updates_means_what_it_says(steps):
    calls = []

    def f(z, x):
        calls.append(1)
        return 0.5 * z

    fixed_point(f, None, torch.ones(2, 3), steps=steps)
    assert len(calls) == steps
