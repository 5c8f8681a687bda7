"""Retrieval: against a slow twin, energy against update, masks, batches, beta, metric, copies, dtypes."""

import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import F64, SOLVERS, normal
from references import UNITS, exactly, forget_row, separate
from torch import Tensor, nn
from torch.testing import assert_close

from hopdeq_lwpf import Termination, fixed_point, retrieve
from hopdeq_lwpf._types import ConvergenceWarning
from hopdeq_lwpf.forgetting import PFU, Keep, ReLU, TopK
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.separation import SEPARATIONS

# (arguments of Retrieval's unit, the same rule for the slow twin)
RULES = [
    (None, None),
    (ReLU(), {"threshold": 0.0}),
    (PFU(0.3), {"threshold": 0.3, "bias": "threshold"}),
    (PFU(0.3, -1.0), {"threshold": 0.3, "bias": -1.0}),
    (PFU(tracked=True), {"threshold": "median", "bias": "threshold"}),
    (TopK(2), {"k": 2}),
]
# Those made for euclidean scores: test_similarity.py.
DOT = sorted(name for name, kind in SEPARATIONS.items() if getattr(kind, "similarity", "dot") == "dot")
every_separation = pytest.mark.parametrize("separation", DOT)
with_energy = pytest.mark.parametrize("unit", [u for u in UNITS if u.has_energy], ids=repr)


def slow_step(z: Tensor, patterns: Tensor, beta: float, separation: str, rule: dict | None, mask) -> Tensor:
    """X^T (D' p(D(beta X z))) of one query, one pattern at a time."""
    scores = [beta * math.fsum(a * b for a, b in zip(z.tolist(), p, strict=True)) for p in patterns.tolist()]
    ignored = [False] * len(scores) if mask is None else mask.tolist()
    value, kept = (scores, [1.0] * len(scores)) if rule is None else forget_row(scores, ignored, **rule)
    value = [0.0 if out else v for v, out in zip(value, ignored, strict=True)]
    weights, _ = separate(separation, torch.tensor([value], dtype=F64), torch.tensor([ignored]))
    out = torch.zeros_like(z)
    for w, k, p in zip(weights[0].tolist(), kept, patterns, strict=True):
        out = out + w * k * p
    return out


@every_separation
@pytest.mark.parametrize(("unit", "rule"), RULES, ids=[repr(u) for u, _ in RULES])
@pytest.mark.parametrize("masked", [False, True])
def test_fast_equals_slow(separation, unit, rule, masked):
    # Two sets of patterns, three queries each, three unequal betas, masks of unequal length.
    query, patterns = normal(2, 3, 4), normal(2, 6, 4, seed=2)
    beta = torch.tensor([0.5, 1.0, 3.0], dtype=F64)
    mask = torch.arange(6) >= torch.tensor([[4], [6]]) if masked else None
    f = Retrieval(beta, separation=separation, forgetting=unit)
    fast = f(query, f.prepare(query, patterns, mask))
    for i, j in itertools.product(range(2), range(3)):
        out = None if mask is None else mask[i]
        slow = slow_step(query[i, j], patterns[i], float(beta[j]), separation, rule, out)
        assert_close(fast[i, j], slow, rtol=0, atol=1e-12)


def test_heads_with_unequal_betas():
    query, patterns = normal(2, 3, 5, 4), normal(2, 3, 6, 4, seed=2)  # (B, H, L, d), a set a head
    beta = torch.tensor([[0.5], [2.0], [8.0]], dtype=F64)
    f = Retrieval(beta)
    together = f(query, f.prepare(query, patterns))
    for h in range(3):
        g = Retrieval(float(beta[h]))
        assert_close(together[:, h], g(query[:, h], g.prepare(query[:, h], patterns[:, h])))


# --- energy


def scene(draw, beta):
    batch, count, width = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 10_000))
    query, patterns = normal(batch, width, seed=seed), normal(count, width, seed=seed + 1)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, count, generator=torch.Generator().manual_seed(seed)) < 0.3
    return query, patterns, mask, beta


@st.composite
def scenes(draw):
    return scene(draw, draw(st.sampled_from([0.3, 1.0, 4.0, 20.0])))


@every_separation
@with_energy
@pytest.mark.parametrize("inject", ["start", "input"])
def test_update_is_minus_the_gradient_of_the_energy(separation, unit, inject):
    f = Retrieval(2.0, separation=separation, forgetting=unit, inject=inject, inject_weight=0.7)
    assert f.has_energy
    query, patterns = normal(5, 4), normal(7, 4, seed=2)
    for mask in (None, torch.arange(7) >= torch.tensor([[7], [5], [3], [1], [0]])):
        x = f.prepare(query, patterns, mask)
        z = normal(5, 4, seed=3).requires_grad_()
        energy = f.energy(z, x)
        (gradient,) = torch.autograd.grad(energy.sum(), z)
        assert energy.shape == (5,)
        assert_close((f(z, x) - z).detach(), -gradient, rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", ["shared", "grouped", "one a query", "heads"])
def test_update_is_minus_the_gradient_in_every_layout(layout):
    beta = torch.tensor([0.5, 2.0, 6.0], dtype=F64)
    query = normal(2, 3, 4)
    shape = {"shared": (7,), "grouped": (2, 7), "one a query": (2, 3, 7)}
    if layout == "heads":
        query, shape["heads"], beta = normal(2, 3, 5, 4), (2, 3, 7), beta[:, None]
    patterns = normal(*shape[layout], 4, seed=2)
    f = Retrieval(beta, forgetting=PFU())
    x = f.prepare(query, patterns)
    z = (query + 0.1 * normal(*query.shape, seed=3)).requires_grad_()
    (gradient,) = torch.autograd.grad(f.energy(z, x).sum(), z)
    assert_close((f(z, x) - z).detach(), -gradient, rtol=0, atol=1e-13)


@every_separation
@given(
    data=scenes(), unit=st.sampled_from([u for u in UNITS if u.has_energy]), weight=st.sampled_from([0, 0.5])
)
@settings(max_examples=60)
def test_energy_never_rises_under_plain_iteration(separation, data, unit, weight):
    query, patterns, mask, beta = data
    inject = {"inject": "input", "inject_weight": weight} if weight else {}
    f = Retrieval(beta, separation=separation, forgetting=unit, **inject)
    x = f.prepare(query, patterns, mask)
    z = f.init(x)
    energies = []
    for _ in range(12):
        energies.append(f.energy(z, x))
        z = f(z, x)
    size = 1 + torch.stack(energies).abs().amax()
    assert float(torch.stack(energies).diff(dim=0).max()) <= 1e-12 * float(size)


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_evaluate_is_the_step_and_the_energy(unit):
    f = Retrieval(2.0, forgetting=unit)
    x = f.prepare(normal(5, 4), normal(7, 4, seed=2))
    z = normal(5, 4, seed=3)
    image, energy, _ = f.evaluate(z, x)
    exactly(image, f(z, x))
    assert_close(energy(), f.energy(z, x), rtol=1e-13, atol=1e-13)


def test_a_narrowed_context_holds_the_live_queries_and_gives_them_the_same_step():
    groups, length = 3, 5
    f = Retrieval(torch.rand(groups, length) + 1, forgetting=PFU(), inject="input")
    query = normal(groups, length, 4)
    x = f.prepare(query, normal(groups, 7, 4, seed=2), torch.rand(groups, length, 7) < 0.2)
    live = torch.zeros(groups * length, dtype=torch.bool)
    live[[0, 3, 11]] = True
    some, rows = f.select(x, live)
    assert set(rows.tolist()) >= {0, 3, 11}
    assert len(rows) == 4, "two of each of the two groups that have a live query"
    z = normal(groups, length, 4, seed=3)
    narrow = f(z.reshape(-1, 4)[rows], some)
    assert_close(narrow, f(z, x).reshape(-1, 4)[rows], rtol=1e-13, atol=1e-14)


def test_no_energy_and_no_metric_where_forgetting_acts_at_the_read_out_only():
    f = Retrieval(2.0, forgetting=ReLU(), mask_in_loop=False)
    x = f.prepare(normal(3, 4), normal(7, 4, seed=2))
    assert not f.has_energy
    assert f.metric(f.init(x), x) is None
    weights = torch.softmax((2.0 * x.start @ x.patterns.T).relu(), -1)
    assert_close(f(x.start, x), weights @ x.patterns)
    assert (f.weights(x.start, x) == 0).any()


# --- metric


@every_separation
@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_metric_where_the_jacobian_is_symmetric(separation, unit):
    f = Retrieval(torch.tensor([0.7, 3.0], dtype=F64), separation=separation, forgetting=unit)
    x = f.prepare(normal(2, 4), normal(7, 4, seed=2))
    z = normal(2, 4, seed=3)
    j = torch.autograd.functional.jacobian(lambda z: f(z, x).sum(0), z).transpose(0, 1)
    symmetric = bool((j - j.transpose(1, 2)).abs().max() < 1e-12)
    if f.metric(z, x) is None:
        # Hardmax has a Jacobian of zero; in a polynomial a forgotten score acts on no other weight.
        assert not symmetric or separation in ("hardmax", "polynomial")
    else:
        assert symmetric
        exactly(f.metric(z, x)(z), z)


# --- batches, sets, masks


@pytest.mark.parametrize("unit", [None, ReLU(), PFU(), PFU(tracked=True), TopK(3)], ids=repr)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_batch_shape(unit, shape):
    query, patterns = normal(*shape, 4), normal(7, 4, seed=2)
    f = Retrieval(2.0, forgetting=unit)
    x = f.prepare(query, patterns)
    image = f(query, x)
    assert image.shape == query.shape
    assert f.energy(query, x).shape == shape
    assert f.weights(query, x).shape == (*shape, 7)
    rows = [f(q, f.prepare(q, patterns)) for q in query.reshape(-1, 4)]
    if rows:
        assert_close(image.reshape(-1, 4), torch.stack(rows), rtol=0, atol=1e-14)


@pytest.mark.parametrize("solver", ["picard", "auto", "anderson"])
@pytest.mark.parametrize("unit", [None, PFU()], ids=repr)
def test_shared_and_per_sample_patterns_agree(solver, unit):
    query, patterns = normal(4, 3, 5), normal(7, 5, seed=2)
    options = {"beta": 3.0, "forgetting": unit, "solver": solver, "stop": Termination(rtol=1e-11)}
    shared = retrieve(query, patterns, **options)
    for sets in (patterns.expand(4, 7, 5), patterns.expand(1, 7, 5), patterns.expand(4, 3, 7, 5)):
        other = retrieve(query, sets, **options)
        assert_close(other.value, shared.value, rtol=0, atol=1e-9)
        exactly(other.index, shared.index)


@pytest.mark.parametrize("solver", ["picard", "auto"])
@pytest.mark.parametrize("layout", ["grouped", "one a query"])
def test_dropping_finished_problems_keeps_each_with_its_patterns(solver, layout):
    # 6 sets of 4 queries; beta grows from set to set, so that sets finish at different times.
    query = normal(6, 4, 5)
    patterns = normal(6, 9, 5, seed=2) if layout == "grouped" else normal(6, 4, 9, 5, seed=2)
    patterns = patterns / patterns.norm(dim=-1, keepdim=True)
    beta = torch.logspace(0, 1.5, 6, dtype=F64)[:, None]
    mask = torch.zeros(patterns.shape[:-1], dtype=torch.bool)
    mask[::2, ..., 6:] = True
    stop = Termination(rtol=1e-11, max_steps=1000)
    options = {"forgetting": PFU(), "solver": solver, "stop": stop, "inject": "input", "inject_weight": 0.2}
    together = retrieve(query, patterns, beta=beta, mask=mask, **options)
    for i in range(6):
        alone = retrieve(query[i], patterns[i], beta=float(beta[i]), mask=mask[i], **options)
        assert_close(alone.value, together.value[i], rtol=0, atol=1e-8)


@pytest.mark.parametrize("unit", [u for u in UNITS if getattr(u, "scope", "") != "tensor"], ids=repr)
def test_masked_patterns_are_as_good_as_absent(unit):
    query, patterns = normal(2, 3, 4), normal(2, 8, 4, seed=2)
    lengths = (5, 8)
    mask = torch.arange(8) >= torch.tensor(lengths)[:, None]
    patterns[mask] = 1e3  # what stands there is of no account
    whole = retrieve(query, patterns, beta=2.0, forgetting=unit, mask=mask, steps=4)
    for i, n in enumerate(lengths):
        short = retrieve(query[i], patterns[i, :n], beta=2.0, forgetting=unit, steps=4)
        assert_close(whole.value[i], short.value, rtol=0, atol=1e-10)
        exactly(whole.index[i], short.index)
        exactly(whole.support[i], short.support)


def test_mask_of_patterns_equals_mask_of_scores():
    query, patterns = normal(3, 4), normal(6, 4, seed=2)
    mask = torch.tensor([True, False, False, True, False, False])
    by_pattern = retrieve(query, patterns, mask=mask)
    exactly(by_pattern.value, retrieve(query, patterns, mask=mask.expand(3, 6)).value)
    assert_close(by_pattern.value, retrieve(query, patterns[~mask]).value)
    sets = patterns.expand(3, 6, 4)
    assert_close(retrieve(query, sets, mask=mask.expand(3, 6)).value, by_pattern.value)


# --- beta


@pytest.mark.parametrize("steps", [1, 3, None])
def test_gradient_of_beta(steps):
    query, patterns = normal(2, 3, 4), 0.5 * normal(7, 4, seed=2)

    def run(beta):
        stop = Termination(rtol=1e-13, atol=1e-15, max_steps=2000)
        return retrieve(query, patterns, beta=beta, steps=steps, stop=stop, inject="input").value

    for shape in ((), (1,), (3,), (2, 1), (2, 3)):
        beta = torch.full(shape, 1.3, dtype=F64) + 0.2 * torch.rand(shape, dtype=F64)
        assert torch.autograd.gradcheck(run, (beta.requires_grad_(),), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda b: nn.Parameter(torch.tensor(b))])
def test_number_tensor_and_parameter_are_the_same_beta(kind):
    query, patterns = normal(3, 4), normal(7, 4, seed=2)
    f = Retrieval(kind(2.5))
    exactly(f(query, f.prepare(query, patterns)).detach(), retrieve(query, patterns, beta=2.5, steps=1).value)
    learned = [name for name, _ in f.named_parameters()]
    assert learned == (["beta"] if isinstance(f.beta, nn.Parameter) else [])


def test_beta_and_injection_weight_learn():
    f = Retrieval(
        nn.Parameter(torch.tensor(1.5)), inject="input", inject_weight=nn.Parameter(torch.tensor(0.5))
    )
    query, patterns = normal(3, 4).float(), normal(7, 4, seed=2).float()
    x = f.prepare(query, patterns)
    fixed_point(f, x, f.init(x)).value.square().sum().backward()
    assert f.beta.grad.abs() > 0
    assert f.inject_weight.grad.abs() > 0


# --- a module like any other


def learned() -> Retrieval:
    beta = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))
    return Retrieval(beta, forgetting=PFU(bias=0.0, noise=0.1), separation="sparsemax").eval()


def test_pickle_copy_and_state_dict():
    query, patterns = normal(3, 4).float(), normal(7, 4, seed=2).float()
    f = learned()

    def run(g):
        return g(query, g.prepare(query, patterns))

    for duplicate in (lambda g: pickle.loads(pickle.dumps(g)), copy.deepcopy):
        twin = duplicate(f)
        exactly(run(twin), run(f))
        before = run(f).detach()
        with torch.no_grad():
            twin.beta.mul_(3)
        exactly(run(f), before)
        assert not torch.equal(run(twin), before)
        f.load_state_dict(twin.state_dict())
        exactly(run(f), run(twin))
    x = f.prepare(query, patterns)
    exactly(f(query, pickle.loads(pickle.dumps(x))), f(query, x))


def test_double():
    f = learned().to(F64)
    query, patterns = normal(3, 4), normal(7, 4, seed=2)
    assert f.beta.dtype == F64
    assert f(query, f.prepare(query, patterns)).dtype == F64
    with torch.no_grad():
        buffer = Retrieval(torch.tensor([2.0])).to(F64)
    assert buffer.beta.dtype == F64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit", [None, ReLU(), PFU(), TopK(3)], ids=repr)
@pytest.mark.parametrize("steps", [1, None])
def test_half_precision(dtype, unit, steps):
    query, patterns = normal(12, 8), normal(20, 8, seed=2)
    patterns = patterns / patterns.norm(dim=-1, keepdim=True)
    stop = Termination(rtol=4 * torch.finfo(dtype).eps)
    half = retrieve(query.to(dtype), patterns.to(dtype), forgetting=unit, steps=steps, stop=stop)
    full = retrieve(query, patterns, forgetting=unit, steps=steps, stop=stop)
    assert half.value.dtype == half.state.dtype == dtype
    assert half.residual.dtype == torch.float32
    if steps is None:
        assert half.converged.all()
    close = (half.value.double() - full.value).norm(dim=-1) < 32 * torch.finfo(dtype).eps
    assert close.float().mean() > 0.8  # a score at the threshold may fall on the other side


@pytest.mark.parametrize("unit", [None, ReLU(), PFU()], ids=repr)
@pytest.mark.parametrize("adjoint", ["implicit", "onestep", "unrolled"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_autocast(unit, adjoint, solver):
    query, patterns = normal(12, 8).float(), normal(20, 8, seed=2).float()
    patterns = patterns.requires_grad_()
    stop = Termination(rtol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recall = retrieve(query, patterns, forgetting=unit, adjoint=adjoint, solver=solver, stop=stop)
    assert recall.state.dtype == torch.float32
    # Anderson may cross a kink for ever, and root finders stop at saddles: both are reported, nothing else is excused.
    wandering = solver == "anderson" and unit is not None
    excused = wandering or solver == "broyden"
    assert int((~recall.converged).sum()) <= wandering
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (gradient,) = torch.autograd.grad(recall.value.float().sum(), patterns)
    assert all(excused and one.category is ConvergenceWarning for one in caught)
    assert gradient.isfinite().all()
    assert (gradient != 0).any()


def test_noise_is_drawn_once_in_prepare():
    f = Retrieval(2.0, forgetting=PFU(noise=0.5)).train()
    query, patterns = normal(6, 4), normal(9, 4, seed=2)
    x, again = f.prepare(query, patterns), f.prepare(query, patterns)
    exactly(f(query, x), f(query, x))
    assert not torch.equal(x.threshold, again.threshold)


def test_function_protocol():
    f = Retrieval(forgetting=Keep())
    assert f.state_ndim == 1
    assert isinstance(f.has_energy, bool)
    assert f.training
    assert "Keep" in repr(f)


def test_the_piece_sees_one_pattern_under_autocast_too():
    f = Retrieval(1.0, forgetting=PFU(0.0))
    patterns = torch.eye(300)
    for row in range(0, 300, 37):
        z = torch.full((2, 300), 0.1)
        z[1, row] = -0.1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            piece = f.evaluate(z, f.prepare(z, patterns))[2]
        assert piece[0] != piece[1]
