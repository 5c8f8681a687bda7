"""The one-matrix form solved, and differentiated, through the even-odd form."""

import pytest
import torch
from hierarchical_networks import F64, GRAPHS, SAME_PARITY, TIGHT, function, inputs, network, problem
from torch.testing import assert_close

from hopdeq_lwpf import Result, Termination
from hopdeq_lwpf.models import HAM
from hopdeq_lwpf.models.even_odd import ImplicitEvenOdd, ThroughEvenOdd, splits
from hopdeq_lwpf.models.hierarchical import CHNFunction, HAMFunction
from hopdeq_lwpf.solvers import Implicit, Picard, Unrolled, fixed_point

# Two solves to 1e-13, of maps that contract by .9 at most, differ by less.
CLOSE = {"rtol": 0, "atol": 1e-10}


def solve(f, x, z0, solver, **options):
    return fixed_point(f, x, z0, solver=solver, stop=TIGHT, **options)


@pytest.mark.parametrize("forgetting", [None, "relu", {2: "pfu"}], ids=str)
@pytest.mark.parametrize("graph", GRAPHS)
def test_layers_end_where_plain_steps_of_the_one_matrix_form_end(graph, forgetting):
    f = function(HAMFunction, GRAPHS[graph], forgetting=forgetting, scale=0.5)
    x, z0 = problem(f, batch=6)
    plain = solve(f, x, z0, Picard()).require()
    found = solve(f, x, z0, ThroughEvenOdd()).require()
    assert_close(found.state, plain.state, **CLOSE)
    image = f(found.state, x)
    assert_close(found.residual, (image - found.state).norm(dim=-1) / image.norm(dim=-1))


def test_an_equilibrium_is_found_where_plain_steps_cycle():
    layer = network(HAM, (20, 30, 15, 8), scale=1.5, on_failure="ignore")
    x = inputs(64, 20, seed=4)
    plain = layer.f.prepare(x)
    cycled = solve(layer.f, plain, layer.f.init(plain), Picard())
    found = layer(x, return_solution=True).require()
    assert not cycled.converged.all()
    both = cycled.converged
    assert both.any()
    assert_close(found.state[both], cycled.state[both], rtol=0, atol=1e-8)
    assert_close(layer.f(found.state, plain), found.state, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layers", [(5, 6, 4), (5, 6, 4, 3)])
@pytest.mark.parametrize("solver", ["auto", "picard"])
def test_gradients_are_those_of_the_steps(layers, solver):
    def gradients(**options):
        layer, x = network(HAM, layers, scale=0.5, **options), inputs().requires_grad_()
        solution = layer(x, return_solution=True)
        loss = solution.value.square().sum() + solution.state.sin().sum()
        return solution, torch.autograd.grad(loss, [x, *layer.parameters()])

    truth, expected = gradients(solver="picard", adjoint=Unrolled())
    found, gradient = gradients(solver=solver)
    assert_close(found.value, truth.value, **CLOSE)
    assert found.adjoint.method == "gmres"
    for a, b in zip(gradient, expected, strict=True):
        # Ten times the tolerance of the adjoint solve, 1e-6 of the incoming gradient.
        assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [(3, 4, 2), (3, 4, 2, 2)])
def test_second_derivatives_are_right(layers):
    layer = network(HAM, layers, scale=0.5)
    layer.adjoint = ImplicitEvenOdd("gmres", rtol=1e-12)
    x = inputs(2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(layer, x)


def test_the_state_that_a_solver_found_is_returned_to_the_last_bit():
    layer = network(HAM, scale=0.5, solver="picard", stop=Termination(rtol=1e-3))
    x = inputs()
    with torch.no_grad():
        plain = layer(x, return_solution=True)
    assert torch.equal(layer(x, return_solution=True).state, plain.state)


def test_the_adjoint_system_holds_the_even_layers_alone():
    whole = network(HAM, (5, 30, 4), scale=0.5, adjoint=Implicit("gmres"))
    half = network(HAM, (5, 30, 4), scale=0.5)
    counts = []
    for layer in (whole, half):
        solution = layer(inputs().requires_grad_(), return_solution=True)
        solution.state.square().sum().backward()
        counts.append(int(solution.adjoint.steps.max()))
    assert counts[1] <= 4 < counts[0], "no more products than there are even neurons"


def test_a_batch_is_its_problems_one_by_one_and_a_failing_one_harms_no_other():
    layer = network(HAM, scale=0.5, on_failure="ignore")
    x = inputs(4)
    alone = torch.cat([layer(row[None]) for row in x])
    x[2] = torch.nan
    found = layer(x, return_solution=True)
    rows = [0, 1, 3]
    assert_close(found.value[rows], alone[rows], **CLOSE)
    assert found.result.tolist() == [Result.CONVERGED, Result.CONVERGED, Result.NONFINITE, Result.CONVERGED]


@pytest.mark.parametrize("shape", [(0, 5), (5,), (2, 3, 5), (2, 0, 5)], ids=str)
def test_any_batch_shape_goes_through(shape):
    layer = network(HAM, scale=0.5)
    x = torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    solution = layer(x, return_solution=True)
    assert solution.state.shape == (*shape[:-1], 13)
    assert solution.result.shape == solution.residual.shape == shape[:-1]
    assert torch.autograd.grad(solution.state.sum(), x)[0].shape == shape
    states = layer.f.states(solution.state, layer.f.prepare(x))
    assert [tuple(state.shape) for state in states] == [(*shape[:-1], width) for width in (6, 4, 3)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 5e-3)]
)
def test_narrow_dtypes_come_as_near_as_they_round(dtype, tolerance):
    exact = network(HAM, scale=0.5)
    layer = network(HAM, scale=0.5, stop=Termination(rtol=tolerance)).to(dtype)
    found = layer(inputs().to(dtype), return_solution=True)
    assert found.state.dtype == dtype
    assert_close(found.value.double(), exact(inputs()), rtol=tolerance, atol=tolerance)


def test_a_trace_holds_the_steps_of_the_even_odd_form():
    f = function(HAMFunction, GRAPHS["4 layers"], scale=0.5)
    x, z0 = problem(f)
    found = solve(f, x, z0, ThroughEvenOdd("picard"), trace=True)
    half = f.in_form(True)
    even = f.even_layers(z0)
    expected = solve(half, x._replace(start=even), even, Picard(), trace=True)
    assert_close(found.trace.residual, expected.trace.residual, equal_nan=True)
    assert found.steps.tolist() == expected.steps.tolist()
    assert (found.evaluations - expected.evaluations).tolist() == [1, 1, 1]


def test_functions_that_have_no_even_odd_form_are_solved_as_they_are():
    functions = [
        function(HAMFunction, SAME_PARITY, scale=0.3),
        function(HAMFunction, GRAPHS["4 layers"], scale=0.3, damping=0.2),
        function(HAMFunction, GRAPHS["4 layers"], scale=0.3, even_odd=True),
        function(CHNFunction, GRAPHS["4 layers"], scale=0.3),
    ]
    for f in functions:
        x, z0 = problem(f)
        plain = solve(f, x, z0, Picard())
        found = solve(f, x, z0, ThroughEvenOdd(), adjoint=ImplicitEvenOdd("gmres"))
        assert torch.equal(found.state, plain.state)
        assert found.evaluations.tolist() == plain.evaluations.tolist()


def test_what_the_default_chooses_depends_on_the_connections():
    assert splits(network(HAM).f)
    assert isinstance(network(HAM).solver, ThroughEvenOdd)
    assert isinstance(network(HAM).adjoint, ImplicitEvenOdd)
    graph, skips = SAME_PARITY
    for options in ({"layers": graph, "skips": skips}, {"damping": 0.5}, {"adjoint": "unrolled"}):
        assert network(HAM, **options).solver == "auto"
    assert type(network(HAM, damping=0.5).adjoint) is Implicit
    assert type(network(HAM, even_odd=True).adjoint) is Implicit


@pytest.mark.parametrize(("rtol", "expected"), [(0.0, 1e-6), (1e-5, 1e-5), (1e-4, 1e-4), (0.1, 1e-3)])
def test_the_tolerance_of_the_default_adjoint_follows_that_of_the_solve(rtol, expected):
    for even_odd in (False, True):
        assert network(HAM, even_odd=even_odd, stop=Termination(rtol=rtol)).adjoint.rtol == expected


def test_function_transforms_work_on_the_one_matrix_form():
    layer = network(HAM, scale=0.4)
    x = inputs().requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    found = torch.func.grad(lambda v: layer(v).square().sum())(x.detach())
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damping", [0.0, 0.4])
@pytest.mark.parametrize("forgetting", [None, "relu", "topk"])
@pytest.mark.parametrize("even_odd", [False, True])
def test_the_energy_that_comes_with_an_evaluation_is_the_energy(even_odd, forgetting, damping):
    f = function(
        HAMFunction, GRAPHS["5 layers, skips"], forgetting=forgetting, even_odd=even_odd, damping=damping
    )
    x, z = problem(f)
    image, energy, kept = f.evaluate(z, x)
    assert_close(image, f(z, x), rtol=0, atol=0)
    states = {i: s for i, s in enumerate(f.states(z, x), 1)}
    # E = sum s.rho - L - b.rho - rho W rho / 2 over all layers; in the even-odd form odd layers are at their minimum.
    rho = {i: f.neurons[i].activate(s, x.thresholds[i - 1]) for i, s in states.items()}
    expected = 0
    for i, s in states.items():
        value = f.neurons[i].value(s, x.thresholds[i - 1])
        expected = expected + ((s - x.drives[i - 1]) * rho[i]).sum(-1) - value
    for i, j in f.graph.pairs:
        if i:
            expected = expected - (rho[i] @ f.weights[f"{i}_{j}"].T * rho[j]).sum(-1)
    assert_close(energy(), expected, rtol=1e-12, atol=1e-12)
    assert (kept is None) == (forgetting is None)
    if kept is not None:
        counts = [f.neurons[i].kept(s, x.thresholds[i - 1]) for i, s in states.items()]
        assert torch.equal(kept, sum(count for count in counts if count is not None))
