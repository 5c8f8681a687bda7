"""Every solver on every problem with a known root: values, counts, residuals, batches, basins."""

import pytest
import torch
from problems import F64, PROBLEMS, SOLVERS, TIGHT, Map, flat, injected, jacobian, normal, solve
from references import exactly
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from hopdeq_lwpf import Result, Termination, fixed_point, solvers
from hopdeq_lwpf.forgetting import PFU, ReLU
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.solvers import (
    LBFGS,
    Anderson,
    Broyden,
    Implicit,
    OneStep,
    Picard,
    Unrolled,
    register_solver,
)

every_problem = pytest.mark.parametrize("name", PROBLEMS)
every_solver = pytest.mark.parametrize("solver", SOLVERS)
ADJOINTS = [
    *(Implicit(name) for name in ("auto", "gmres", "picard", "anderson")),
    Unrolled(),
    OneStep(),
]


@every_problem
def test_root_and_rate_of_the_table(name):
    problem = PROBLEMS[name]
    image = problem.f(problem.root, problem.prepare(*problem.arguments))
    assert_close(flat(image), flat(problem.root), rtol=0, atol=1e-14)
    radius = torch.linalg.eigvals(jacobian(problem)).abs().max()
    assert radius.item() == pytest.approx(problem.rate, rel=1e-9)


@every_problem
@every_solver
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_reaches_the_root(name, solver, adjoint):
    problem = PROBLEMS[name]
    arguments = tuple(a.clone().requires_grad_() for a in problem.arguments)
    solution = solve(problem, arguments, solver=solver, adjoint=adjoint).require()
    # |z - z*| <= |f(z) - z| / (1 - rate) for a normal map; ten times that for the others.
    bound = 10 * (TIGHT.atol + TIGHT.rtol * float(flat(problem.root).norm())) / (1 - problem.rate)
    assert float((flat(solution.value) - flat(problem.root)).detach().norm()) <= bound
    assert solution.result.shape == solution.residual.shape == solution.steps.shape
    assert flat(solution.value).requires_grad


@every_problem
def test_cg_where_a_metric_is_declared_and_a_refusal_elsewhere(name):
    problem = PROBLEMS[name]
    arguments = tuple(a.clone().requires_grad_() for a in problem.arguments)
    solution = solve(problem, arguments, adjoint=Implicit("cg"))
    if problem.symmetric:
        torch.autograd.grad(flat(solution.value).sum(), arguments)
        assert solution.adjoint.method == "cg"
        assert (solution.adjoint.result == Result.CONVERGED).all()
    else:
        with pytest.raises(ValueError, match=r"'cg' needs a metric.*gmres"):
            torch.autograd.grad(flat(solution.value).sum(), arguments)


# Where the root is zero, the residual relative to |f| tends to a constant and shows no rate.
@pytest.mark.parametrize("name", [name for name in PROBLEMS if flat(PROBLEMS[name].root).norm() > 0])
def test_picard_contracts_at_the_known_rate(name):
    problem = PROBLEMS[name]
    trace = solve(problem, solver="picard", trace=True).trace.residual.flatten(1).amax(1)
    late = trace[(trace < 1e-6) & (trace > 1e-11)]
    assert (late[-1] / late[0]) ** (1 / (len(late) - 1)) == pytest.approx(problem.rate, rel=0.05)


@every_problem
@every_solver
def test_residual_is_that_of_the_returned_state(name, solver):
    problem = PROBLEMS[name]
    for stop in (Termination(), Termination(rtol=1e-12, max_steps=3)):
        solution = solve(problem, solver=solver, stop=stop)
        image = problem.f(solution.state, problem.prepare(*problem.arguments))
        batch = solution.result.shape
        rows = [
            torch.cat([leaf.reshape(batch.numel(), -1) for leaf in pytree.tree_leaves(state)], 1)
            for state in (image, solution.state)
        ]
        distance, size = (rows[0] - rows[1]).norm(dim=1), rows[0].norm(dim=1)
        assert_close(solution.residual.flatten(), (distance / size).detach(), rtol=1e-6, atol=1e-16)
        done = distance <= stop.atol + stop.rtol * size
        assert torch.equal(solution.converged.flatten(), done)


class Counting(Map):
    """Counts its calls."""

    calls = 0

    def __call__(self, z, x):
        self.calls += 1
        return super().__call__(z, x)


@every_solver
def test_evaluations_count_every_call(solver):
    f = Counting(lambda z, b: torch.tanh(0.9 * z) + b)
    with torch.no_grad():
        solution = fixed_point(f, (torch.ones(1, 2),), torch.zeros(1, 2), solver=solver)
    assert f.calls == int(solution.evaluations) == int(solution.steps) + 1


def mixed_queries(count: int = 40):
    """Queries that need from two to a hundred steps: beta times the spread of the patterns varies."""
    patterns = normal(30, 8, seed=11)
    patterns = patterns / patterns.norm(dim=-1, keepdim=True)
    query = patterns[torch.arange(count) % 30] + 0.3 * normal(count, 8, seed=12)
    beta = torch.logspace(0, 1.3, count, dtype=F64)
    return query, patterns, beta


@every_solver
@pytest.mark.parametrize("unit", [None, ReLU(), PFU(), PFU(tracked=True)], ids=repr)
def test_batch_equals_single_with_problems_dropped_on_the_way(solver, unit):
    query, patterns, beta = mixed_queries()
    f = Retrieval(beta, forgetting=unit)
    x = f.prepare(query, patterns)
    sizes = []
    seen = f.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    f.evaluate = counted(f.evaluate, sizes)
    stop = Termination(rtol=1e-10, max_steps=500)
    together = fixed_point(f, x, f.init(x), solver=solver, stop=stop)
    assert min(sizes) < 40, "nothing was dropped, so this tests less than it says"
    seen.remove()
    compared = 0
    for i in range(0, 40, 3):
        g = Retrieval(beta[i : i + 1], forgetting=unit)
        alone_x = g.prepare(query[i : i + 1], patterns)
        alone = fixed_point(g, alone_x, g.init(alone_x), solver=solver, stop=stop)
        exactly(alone.result, together.result[i : i + 1])
        # Which attractor a row finds that crosses kinks for a hundred steps is up to rounding.
        if max(int(together.steps[i]), int(alone.steps)) > 100:
            continue
        compared += 1
        # Rounding, which depends on the shape of a product, grows in a long accelerated run: there both stop
        # within the tolerance of the root, yet not at the same step.
        long = int(together.steps[i]) > 20
        tolerance = 1e-6 if long else 1e-12
        assert_close(alone.value, together.value[i : i + 1], rtol=0, atol=tolerance)
        if not long:
            exactly(alone.steps, together.steps[i : i + 1])
    assert compared >= 10


def counted(function, sizes):
    def call(z, x):
        sizes.append(len(z))
        return function(z, x)

    return call


@every_solver
@pytest.mark.parametrize("name", ["tanh", "triangular", "metric", "state of two dims", "dict"])
def test_batch_equals_single_for_any_function(name, solver):
    problem = PROBLEMS[name]
    leaves = pytree.tree_leaves(problem.root)
    count = len(leaves[0])
    together = solve(problem, solver=solver)
    for i in range(count):
        cut = pytree.tree_map(lambda leaf, i=i: leaf[i : i + 1], problem.z0)
        # Arguments with one row a problem are cut too; matrices that all problems share are not.
        arguments = tuple(a[i : i + 1] if a.shape[0] == count else a for a in problem.arguments)
        alone = fixed_point(problem.f, problem.prepare(*arguments), cut, solver=solver, stop=TIGHT)
        whole = pytree.tree_map(lambda leaf, i=i: leaf[i : i + 1], together.value)
        assert_close(flat(alone.value), flat(whole), rtol=0, atol=1e-10)
        exactly(alone.result, together.result[i : i + 1])


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_of_the_state_is_kept_and_residuals_are_wide(solver, dtype):
    b = normal(3, 4).to(dtype)
    stop = Termination(rtol=torch.finfo(dtype).eps, atol=0.0)
    solution = fixed_point(Map(lambda z, b: 0.5 * z + b), (b,), torch.zeros_like(b), solver=solver, stop=stop)
    assert solution.value.dtype == dtype
    assert solution.residual.dtype == torch.float32
    assert solution.converged.all()
    eps = torch.finfo(dtype).eps
    assert_close(solution.value.detach().double(), 2 * b.double(), rtol=8 * eps, atol=8 * eps)


@every_solver
def test_stopping_test_every_few_steps_changes_only_the_counts(solver):
    problem = PROBLEMS["tanh"]
    often = solve(problem, solver=solver, stop=Termination(rtol=1e-10, check_every=1))
    seldom = solve(problem, solver=solver, stop=Termination(rtol=1e-10, check_every=7))
    assert_close(often.value, seldom.value, rtol=0, atol=1e-7)
    assert (seldom.steps >= often.steps).all()
    assert (seldom.steps < often.steps + 7).all()


@pytest.mark.parametrize("solver", [Picard(damping=0.5), Anderson(damping=0.5)], ids=repr)
def test_damping_tames_a_map_that_oscillates(solver):
    # z -> b - 1.5 z has an eigenvalue of -1.5; half of it and half of the state make -.25.
    f, b = Map(lambda z, b: b - 1.5 * z), normal(2, 3)
    assert_close(fixed_point(f, (b,), b, solver=solver, stop=TIGHT).require().value, b / 2.5)
    plain = fixed_point(f, (b,), b, solver="picard")
    assert (plain.result == Result.DIVERGED).all()


@pytest.mark.parametrize(
    "solver",
    [Anderson(memory=1), Anderson(memory=9), Broyden(memory=2), LBFGS(memory=1), LBFGS(guard=False)],
    ids=repr,
)
def test_options_of_the_solvers_change_the_way_not_the_end(solver):
    for name in ("metric", "softmax retrieval", "tanh"):
        problem = PROBLEMS[name]
        solution = solve(problem, solver=solver).require()
        assert_close(flat(solution.value), flat(problem.root), rtol=0, atol=1e-9)


def test_accelerated_solvers_need_fewer_evaluations_where_picard_is_slow():
    problem = PROBLEMS["triangular"]
    plain = int(solve(problem, solver="picard").evaluations.max())
    for solver in ("anderson", "broyden", "auto"):
        assert 2 * int(solve(problem, solver=solver).evaluations.max()) < plain
    memory = PROBLEMS["softmax retrieval"]
    assert 2 * int(solve(memory).evaluations.max()) < int(solve(memory, solver="picard").evaluations.max())


@pytest.mark.parametrize("solver", ["lbfgs", "auto"])
def test_a_saddle_is_left_as_plain_iteration_leaves_it(solver):
    problem = injected(ReLU(), 0.0, 2.0)
    assert problem.rate > 1
    plain = solve(problem, solver="picard").require()
    assert (plain.value - problem.root).norm(dim=-1).max() > 0.5
    assert_close(solve(problem, solver=solver).require().value, plain.value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("unit", [None, ReLU(), PFU()], ids=repr)
def test_default_recalls_what_plain_iteration_recalls(unit):
    patterns = normal(96, 16, seed=21)
    patterns = patterns / patterns.norm(dim=-1, keepdim=True)
    query = 0.25 * normal(200, 16, seed=22)
    f = Retrieval(12.0, forgetting=unit)
    x = f.prepare(query, patterns)
    stop = Termination(rtol=1e-9, max_steps=5000)
    plain = fixed_point(f, x, query, solver="picard", stop=stop).require()
    default = fixed_point(f, x, query, stop=stop).require()
    moved = (plain.value - default.value).norm(dim=-1) > 0.05 * plain.value.norm(dim=-1)
    assert int(moved.sum()) <= 3  # 98.5 %


def test_registered_solver_is_known_by_its_name():
    register_solver("half picard", lambda: Picard(damping=0.5))
    try:
        problem = PROBLEMS["tanh"]
        by_name = solve(problem, solver="half picard")
        exactly(by_name.value, solve(problem, solver=Picard(damping=0.5)).value)
        assert int(by_name.steps.max()) > int(solve(problem, solver="picard").steps.max())
        with pytest.raises(ValueError, match="'half picard' is already registered"):
            register_solver("half picard", Picard)
    finally:
        del solvers.SOLVERS["half picard"]


def energies_asked_for(beta):
    """How many energies the default solver asked for, and how many evaluations it made."""
    asked, evaluated = [], []

    class Counting(Retrieval):
        def evaluate(self, z, x):
            image, energy, piece = super().evaluate(z, x)
            evaluated.append(1)
            return image, lambda: (asked.append(1), energy())[1], piece

    f = Counting(beta)
    patterns = normal(40, 16) / 4
    query = normal(8, 16, seed=2) / 4
    assert fixed_point(f, f.prepare(query, patterns), query).converged.all()
    return len(asked), len(evaluated)


def test_energies_are_computed_only_where_a_query_is_accelerated():
    easy, _ = energies_asked_for(0.5)
    hard, evaluated = energies_asked_for(4.0)
    assert easy == 0
    assert 0 < hard < evaluated


def test_a_row_is_left_to_plain_steps_that_will_do():
    now = solvers.base.Iterate(2, torch.ones(2, 3), torch.ones(2, 3), None, None, None, 1e-7, 1e-5)
    size, before = torch.tensor([1e-3, 0.9]), torch.ones(2)
    assert solvers.LBFGS()._slow(size, before, now).tolist() == [False, True]
    assert solvers.LBFGS(patience=0)._slow(size, before, now).tolist() == [True, True]


def test_a_saddle_is_left_in_few_steps_for_the_same_end():
    # Two patterns, and a start next to the middle between them, which plain iteration leaves slowly.
    patterns = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=F64)
    query = torch.tensor([[1e-4, 0.0], [-1e-4, 0.3]], dtype=F64)
    f = Retrieval(1.05)
    x = f.prepare(query, patterns)
    plain = fixed_point(f, x, query, solver="picard", stop=TIGHT)
    slow, quick = (fixed_point(f, x, query, solver=solvers.LBFGS(escape=e), stop=TIGHT) for e in (0.0, 0.5))
    assert_close(quick.value, plain.value, rtol=1e-9, atol=1e-12)
    assert (quick.evaluations < 0.6 * slow.evaluations).all()
    assert (slow.evaluations < plain.evaluations).all()


def test_an_energy_that_is_asked_for_late_runs_under_the_autocast_of_f():
    class Bowl:
        """f = -dE/dz + z for E = |W z|^2 / 2 - x.z, whose energy is a product that autocast makes bfloat16."""

        state_ndim, has_energy = 1, True
        weight = torch.tensor([[0.5, 0.1], [0.0, 0.3]], dtype=torch.bfloat16)

        def __call__(self, z, x):
            return z - ((z @ self.weight) @ self.weight.T).float() + x

        def energy(self, z, x):
            return 0.5 * (z @ self.weight).float().square().sum(-1) - (x * z).sum(-1)

    x = torch.tensor([[0.1, 0.2], [0.3, -0.1]])
    with torch.autocast("cpu", torch.bfloat16):
        solution = fixed_point(Bowl(), x, torch.zeros_like(x), solver="lbfgs", stop=Termination(rtol=1e-2))
    assert solution.converged.all()
