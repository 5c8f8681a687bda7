"""Euclidean similarity in use: gradients, queries that reach nothing, read-out, batches, solvers, dtypes."""

import math

import pytest
import torch
from problems import F64, SOLVERS, TIGHT, normal
from references import exactly
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf import Result, Termination, fixed_point, retrieve
from hopdeq_lwpf._types import identity
from hopdeq_lwpf.forgetting import PFU, ReLU, TopK
from hopdeq_lwpf.models import Retrieval

EUCLIDEAN = {"similarity": "euclidean"}
SEPARATIONS = ("softmax", "softmax1", "sparsemax", "entmax15", "hardmax", "lsr")
every_separation = pytest.mark.parametrize("separation", SEPARATIONS)


# --- metric and gradients


@every_separation
@pytest.mark.parametrize("unit", [None, PFU(), PFU(-2.5, -3.0), TopK(3, -2.0)], ids=repr)
@pytest.mark.parametrize("inject", ["start", "input"])
def test_jacobian_is_symmetric_at_an_equilibrium(separation, unit, inject):
    f = Retrieval(0.3, separation=separation, forgetting=unit, inject=inject, inject_weight=0.4, **EUCLIDEAN)
    x = f.prepare(normal(4, 3), normal(8, 3, seed=2))
    solution = fixed_point(f, x, f.init(x), solver="picard", stop=TIGHT)
    good = solution.converged.nonzero().squeeze(-1)
    assert len(good)
    assert f.metric(solution.state, x) is identity
    jacobian = torch.autograd.functional.jacobian(lambda z: f(z, x).sum(0), solution.state).transpose(0, 1)
    assert_close(jacobian[good], jacobian[good].transpose(1, 2), rtol=0, atol=1e-10)


def test_no_metric_where_the_dot_product_has_none():
    for unit, inside in ((PFU(tracked=True), True), (ReLU(), False)):
        f = Retrieval(0.3, forgetting=unit, mask_in_loop=inside, **EUCLIDEAN)
        x = f.prepare(normal(4, 3), normal(8, 3, seed=2))
        assert f.metric(f.init(x), x) is None


@pytest.mark.parametrize("unit", [None, PFU(), TopK(4, -2.0)], ids=repr)
@pytest.mark.parametrize("separation", ["softmax", "sparsemax", "softmax1"])
def test_gradients_through_an_equilibrium(unit, separation):
    query, patterns, values = normal(2, 3), normal(5, 3, seed=2), normal(5, 2, seed=3)

    def run(query, patterns, values, beta, weight):
        return retrieve(
            query,
            patterns,
            values=values,
            beta=beta,
            separation=separation,
            inject="input",
            inject_weight=weight,
            stop=TIGHT,
            forgetting=unit,
            **EUCLIDEAN,
        ).value

    numbers = torch.tensor([0.3, 0.4], dtype=F64), torch.tensor(0.6, dtype=F64)
    arguments = [part.requires_grad_() for part in (query, patterns, values, *numbers)]
    assert torch.autograd.gradcheck(run, arguments, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_through_counted_steps(steps):
    query, patterns, beta = normal(2, 3), normal(5, 3, seed=2), torch.tensor(0.4, dtype=F64)

    def run(query, patterns, beta):
        return retrieve(query, patterns, beta=beta, steps=steps, forgetting=PFU(), **EUCLIDEAN).value

    arguments = [part.requires_grad_() for part in (query, patterns, beta)]
    assert torch.autograd.gradcheck(run, arguments, rtol=1e-4, atol=1e-7)


def test_gradient_of_lsr_is_that_of_the_centroid():
    # f is constant around an equilibrium: the mean of the active patterns.
    patterns = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 9.0]], dtype=F64, requires_grad=True)
    query = torch.tensor([[0.4, 0.1]], dtype=F64)
    recall = retrieve(query, patterns, beta=1.0, separation="lsr", stop=TIGHT).require()
    assert_close(recall.value, patterns[:2].mean(0, keepdim=True))
    exactly(recall.support, torch.tensor([2]))
    (gradient,) = torch.autograd.grad(recall.value.sum(), patterns)
    assert_close(gradient, torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]], dtype=F64))


def test_a_prepared_context_serves_several_backward_passes():
    patterns = nn.Parameter(normal(5, 3, seed=2))
    f = Retrieval(0.4, inject="input", **EUCLIDEAN)
    x = f.prepare(normal(2, 3), patterns)
    gradients = []
    for _ in range(2):
        value = fixed_point(f, x, f.init(x), stop=TIGHT).value
        gradients.append(torch.autograd.grad(value.sum(), patterns)[0])
    exactly(*gradients)


# --- nothing active, everything forgotten


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("adjoint", ["implicit", "unrolled"])
@pytest.mark.parametrize(("separation", "unit"), [("lsr", None), ("softmax", PFU(-50.0))], ids=str)
def test_where_nothing_is_active_the_state_stays(steps, adjoint, separation, unit):
    patterns = normal(7, 4, seed=2).requires_grad_()
    query = normal(3, 4)
    query[1] = 100.0
    options = {"beta": 0.5, "separation": separation, "forgetting": unit, "steps": steps, **EUCLIDEAN}
    options["stop"] = Termination(rtol=1e-9)
    recall = retrieve(query, patterns, adjoint=adjoint, **options)
    exactly(recall.state[1].detach(), query[1])
    exactly(recall.value[1].detach(), torch.zeros(4, dtype=F64))
    assert recall.index[1] == -1
    assert recall.support[1] == recall.weight[1] == recall.residual[1] == 0
    assert recall.converged[1]
    alone = retrieve(query[[0, 2]], patterns, **options)
    assert (alone.support > 0).all()
    exactly(recall.value[[0, 2]].detach(), alone.value.detach())
    for part, other in ((recall.value, alone.value), (recall.state, alone.state)):
        (gradient,) = torch.autograd.grad(part.sum(), patterns, retain_graph=True)
        (expected,) = torch.autograd.grad(other.sum(), patterns, retain_graph=True)
        # The adjoint is solved to 1e-6.
        assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_a_state_outside_of_every_reach_goes_back_to_the_query():
    # So that an accelerated step that oversteps is no equilibrium.
    patterns, query = normal(7, 4, seed=2), normal(3, 4)
    f = Retrieval(0.5, separation="lsr")
    x = f.prepare(query, patterns)
    far = query.clone()
    far[1] = 100.0
    image = f(far, x)
    exactly(image[1], query[1])
    exactly(image[[0, 2]], f(query, x)[[0, 2]])
    assert (f.energy(far, x)[1] >= f.energy(query, x)).all()


def test_the_state_of_a_query_that_reaches_nothing_is_the_query_with_its_gradient():
    query = torch.full((2, 4), 100.0, dtype=F64, requires_grad=True)
    recall = retrieve(query, normal(7, 4, seed=2), beta=0.5, separation="lsr", steps=3)
    (gradient,) = torch.autograd.grad(recall.state.sum(), query)
    exactly(gradient, torch.ones(2, 4, dtype=F64))


def test_a_query_that_enters_every_step_is_the_answer_where_nothing_is_active():
    query, patterns = torch.full((1, 4), 100.0, dtype=F64), normal(7, 4, seed=2)
    recall = retrieve(query, patterns, beta=0.5, separation="lsr", inject="input", inject_weight=0.3)
    assert_close(recall.state, query)
    exactly(recall.value, torch.zeros(1, 4, dtype=F64))


def test_nan_in_one_query_harms_no_other():
    query, patterns = normal(4, 4), normal(7, 4, seed=2)
    clean = retrieve(query, patterns, beta=0.5, **EUCLIDEAN)
    query[2] = math.nan
    recall = retrieve(query, patterns, beta=0.5, **EUCLIDEAN)
    assert recall.result[2] == Result.NONFINITE
    assert recall.index[2] == -1
    rest = [0, 1, 3]
    exactly(recall.value[rest], clean.value[rest])


@pytest.mark.parametrize("steps", [1, 3, None])
@every_separation
def test_all_patterns_masked(separation, steps):
    query, patterns = normal(3, 4), normal(7, 4, seed=2)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1] = True
    recall = retrieve(query, patterns, mask=mask, beta=0.3, separation=separation, steps=steps, **EUCLIDEAN)
    exactly(recall.value[1], torch.zeros(4, dtype=F64))
    exactly(recall.state[1], query[1])
    assert recall.index.tolist()[1] == -1


# --- read-out, batches, solvers, dtypes


@every_separation
@pytest.mark.parametrize("steps", [1, 3, None])
def test_read_out_of_values_goes_with_the_state(separation, steps):
    query, patterns, values = normal(5, 4), normal(7, 4, seed=2), normal(7, 2, seed=3)
    options = {"beta": 0.1, "separation": separation, "steps": steps, "stop": TIGHT, **EUCLIDEAN}
    recall = retrieve(query, patterns, **options)
    assert (recall.support > 0).all()
    assert_close(recall.value, recall.state, rtol=0, atol=1e-12)
    f = Retrieval(0.1, separation=separation, **EUCLIDEAN)
    x = f.prepare(query, patterns)
    before = recall.state
    if steps is not None:
        before = fixed_point(f, x, query, steps=steps - 1).value if steps > 1 else query
    weights = f.weights(before, x)
    assert_close(weights.sum(-1), torch.ones(5, dtype=F64))
    assert_close(retrieve(query, patterns, values=values, **options).value, weights @ values)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("unit", [None, PFU(), TopK(3, -2.0)], ids=repr)
@every_separation
def test_any_batch_shape(shape, unit, separation):
    query, patterns = normal(*shape, 4), normal(7, 4, seed=2)
    options = {"inject": "input", "inject_weight": 0.3} if unit is None else {}
    f = Retrieval(0.5, separation=separation, forgetting=unit, **EUCLIDEAN, **options)
    x = f.prepare(query, patterns)
    image = f(query, x)
    assert image.shape == query.shape
    assert f.energy(query, x).shape == shape
    assert f.weights(query, x).shape == (*shape, 7)
    rows = [f(q, f.prepare(q, patterns)) for q in query.reshape(-1, 4)]
    if rows:
        assert_close(image.reshape(-1, 4), torch.stack(rows), rtol=0, atol=1e-13)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("layout", ["shared", "grouped", "one a query"])
def test_dropping_finished_problems_keeps_each_with_its_patterns(solver, layout):
    # 6 sets of 4 queries; beta grows from set to set, so that sets finish at different times.
    query = normal(6, 4, 5)
    shape = {"shared": (9, 5), "grouped": (6, 9, 5), "one a query": (6, 4, 9, 5)}[layout]
    patterns = normal(*shape, seed=2)
    beta = torch.logspace(-1, 0.5, 6, dtype=F64)[:, None]
    stop = Termination(rtol=1e-11, max_steps=1000)
    options = {"forgetting": PFU(), "solver": solver, "stop": stop, **EUCLIDEAN}
    options |= {"inject": "input", "inject_weight": 0.2}
    together = retrieve(query, patterns, beta=beta, **options)
    for i in range(6):
        sets = patterns if layout == "shared" else patterns[i]
        alone = retrieve(query[i], sets, beta=float(beta[i]), **options)
        both = alone.converged & together.converged[i]
        assert both.any()
        assert_close(alone.value[both], together.value[i][both], rtol=0, atol=1e-8)


@every_separation
@pytest.mark.parametrize("unit", [None, PFU()], ids=repr)
def test_the_default_solver_ends_where_plain_iteration_ends(separation, unit):
    query, patterns = normal(40, 16), normal(60, 16, seed=2)
    options = {"beta": 0.2, "separation": separation, "forgetting": unit, **EUCLIDEAN}
    fast = retrieve(query, patterns, stop=Termination(rtol=1e-9, max_steps=2000), **options)
    slow = retrieve(
        query, patterns, stop=Termination(rtol=1e-11, max_steps=20_000), solver="picard", **options
    )
    assert slow.converged.all()
    assert fast.converged.all()
    assert_close(fast.state, slow.state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_separation
@pytest.mark.parametrize("steps", [1, None])
def test_narrow_dtypes_keep_the_differences_of_large_numbers(dtype, separation, steps):
    # Patterns far from 0, exact in every dtype: products of size 2,000 whose differences are of size 1.
    generator = torch.Generator().manual_seed(5)
    patterns = torch.randint(-8, 9, (20, 8), generator=generator, dtype=torch.int64).double() / 8 + 16
    query = patterns[:12] + 0.125
    stop = Termination(rtol=4 * torch.finfo(dtype).eps)
    options = {"beta": 2.0, "separation": separation, "steps": steps, "stop": stop, **EUCLIDEAN}
    full = retrieve(query, patterns, **options)
    half = retrieve(query.to(dtype), patterns.to(dtype), **options)
    assert half.value.dtype == half.state.dtype == dtype
    assert half.energy.dtype == torch.float32
    error = (half.value.double() - full.value).norm(dim=-1)
    # Half dtypes round the answer, of size 45. Scores in float32 are off by 5e-4 = 2 * 2^11 * 2^-23, which
    # iterating multiplies.
    assert float(error.max()) < {torch.float32: 5e-3, torch.float16: 0.1, torch.bfloat16: 0.4}[dtype]


@pytest.mark.parametrize("separation", ["softmax", "lsr"])
def test_autocast(separation):
    query, patterns = normal(12, 8).float(), normal(20, 8, seed=2).float().requires_grad_()
    options = {"beta": 0.2, "separation": separation, "stop": Termination(rtol=2e-2), **EUCLIDEAN}
    full = retrieve(query, patterns, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recall = retrieve(query, patterns, **options)
    assert recall.state.dtype == torch.float32
    assert recall.converged.all()
    assert_close(recall.state, full.state, rtol=0, atol=0.1)
    (gradient,) = torch.autograd.grad(recall.value.float().sum(), patterns)
    assert gradient.isfinite().all()


def test_meta_device_and_functional_gradients():
    f = Retrieval(0.5, **EUCLIDEAN)
    query, patterns = normal(3, 4), normal(5, 4, seed=2)
    ghost = f.prepare(query.to("meta"), patterns.to("meta"))
    assert f(ghost.start, ghost).shape == (3, 4)

    def loss(patterns):
        return f(query, f.prepare(query, patterns)).square().sum()

    (gradient,) = torch.autograd.grad(loss(patterns.requires_grad_()), patterns)
    exactly(torch.func.grad(loss)(patterns.detach()), gradient)
