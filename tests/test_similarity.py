"""Euclidean similarity: the mean shift against a slow twin, its energy, its pieces, relations, settings."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import F64, TIGHT, normal
from references import UNITS, exactly, forget_row, separate
from torch import Tensor
from torch.testing import assert_close

from hopdeq_lwpf import retrieve
from hopdeq_lwpf.forgetting import PFU, ReLU, TopK
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.separation import LSR

EUCLIDEAN = {"similarity": "euclidean"}
CONVEX = ("softmax", "softmax1", "sparsemax", "entmax15", "hardmax")
SEPARATIONS = (*CONVEX, "lsr")
# (unit, the same rule for the slow twin); thresholds below 0, since no euclidean score is above.
RULES = [
    (None, None),
    (ReLU(min_keep=2), {"threshold": 0.0, "min_keep": 2}),
    (PFU(-1.5), {"threshold": -1.5, "bias": "threshold"}),
    (PFU(-1.5, -3.0), {"threshold": -1.5, "bias": -3.0}),
    (PFU(tracked=True), {"threshold": "median", "bias": "threshold"}),
    (TopK(2, -2.0), {"k": 2, "bias": -2.0}),
]
GENTLE = [unit for unit in UNITS if unit.has_energy]
every_separation = pytest.mark.parametrize("separation", SEPARATIONS)


def slow_step(z, query, patterns, beta, separation, rule, ignored, a) -> Tensor:
    """(X^T w + a q) / (sum w + a) of one query, one pattern and one number at a time."""
    rows, start = patterns.tolist(), query.tolist()
    scores = [
        -0.5 * beta * math.fsum((u - v) ** 2 for u, v in zip(z.tolist(), row, strict=True)) for row in rows
    ]
    value, kept = (scores, [1.0] * len(rows)) if rule is None else forget_row(scores, ignored, **rule)
    value = [0.0 if out else v for v, out in zip(value, ignored, strict=True)]
    p = separate(separation, torch.tensor([value], dtype=F64), torch.tensor([ignored]))[0][0].tolist()
    w = [0.0 if out else u * k for u, k, out in zip(p, kept, ignored, strict=True)]
    total = math.fsum(w) + a
    if total == 0:
        return query
    columns = range(len(start))
    sums = [math.fsum(w[m] * rows[m][i] for m in range(len(rows))) + a * start[i] for i in columns]
    return torch.tensor([s / total for s in sums], dtype=F64)


@every_separation
@pytest.mark.parametrize(("unit", "rule"), RULES, ids=[repr(u) for u, _ in RULES])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inject", ["start", "input"])
def test_fast_equals_slow(separation, unit, rule, masked, inject):
    # Two sets of patterns, three queries each, three unequal betas and pulls, masks of unequal length.
    query, patterns = normal(2, 3, 4), normal(2, 6, 4, seed=2)
    beta, a = torch.tensor([0.3, 0.6, 1.5], dtype=F64), torch.tensor([0.2, 0.0, 3.0], dtype=F64)
    mask = torch.arange(6) >= torch.tensor([[4], [6]]) if masked else None
    options = {"inject": inject, "inject_weight": a} if inject == "input" else {}
    f = Retrieval(beta, separation=separation, forgetting=unit, **EUCLIDEAN, **options)
    z = query + 0.3 * normal(2, 3, 4, seed=4)
    # The median is drawn at z0.
    fast = f(z, f.prepare(query, patterns, mask))
    for i, j in itertools.product(range(2), range(3)):
        ignored = [False] * 6 if mask is None else mask[i].tolist()
        pull = float(a[j]) if inject == "input" else 0.0
        slow = slow_step(z[i, j], query[i, j], patterns[i], float(beta[j]), separation, rule, ignored, pull)
        assert_close(fast[i, j], slow, rtol=0, atol=1e-12)


def total_weight(f: Retrieval, z: Tensor, x) -> Tensor:
    """sum w [+ a], by the definitions."""
    sets = x.patterns if x.patterns.ndim == 2 else x.patterns.repeat_interleave(len(z) // len(x.patterns), 0)
    scores = -0.5 * x.beta * (z[:, None] - sets).square().sum(-1)
    value, kept = f.forgetting.project(scores, x.threshold, x.mask)
    weights = f.separation.weights(value, x.mask)
    weights = weights if kept is None else weights * kept
    return weights.sum(-1, keepdim=True) + (0 if f.inject == "start" else x.pull)


@every_separation
@pytest.mark.parametrize("unit", [*GENTLE, PFU(-2.0), TopK(3, -2.0)], ids=repr)
@pytest.mark.parametrize("inject", ["start", "input"])
def test_step_is_minus_the_gradient_of_the_energy_over_the_weights(separation, unit, inject):
    f = Retrieval(0.6, separation=separation, forgetting=unit, inject=inject, inject_weight=0.7, **EUCLIDEAN)
    query, patterns = normal(5, 4), normal(7, 4, seed=2)
    for mask in (None, torch.arange(7) >= torch.tensor([[7], [5], [3], [1], [0]])):
        x = f.prepare(query, patterns, mask)
        z = normal(5, 4, seed=3).requires_grad_()
        energy = f.energy(z, x)
        (gradient,) = torch.autograd.grad(energy.sum(), z)
        assert energy.shape == (5,)
        scaled = (f(z, x) - z) * total_weight(f, z, x)
        # LSR's weights are as large as 1/(sum of what is left above its reach), the twin's roundings with them.
        assert_close(scaled.detach(), -gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", ["shared", "grouped", "one a query"])
@every_separation
def test_step_and_gradient_agree_in_every_layout(layout, separation):
    shape = {"shared": (7,), "grouped": (2, 7), "one a query": (2, 3, 7)}[layout]
    query, patterns = normal(2, 3, 4), normal(*shape, 4, seed=2)
    beta = torch.tensor([0.3, 0.6, 1.5], dtype=F64)
    f = Retrieval(beta, separation=separation, forgetting=PFU(), **EUCLIDEAN)
    x = f.prepare(query, patterns)
    z = (query + 0.1 * normal(*query.shape, seed=3)).requires_grad_()
    (gradient,) = torch.autograd.grad(f.energy(z, x).sum(), z)
    scaled = (f(z, x) - z).reshape(6, 4) * total_weight(f, z.reshape(6, 4), x)
    assert_close(scaled.detach(), -gradient.reshape(6, 4), rtol=1e-9, atol=1e-12)


@st.composite
def scenes(draw):
    batch, count, width = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 10_000))
    query, patterns = normal(batch, width, seed=seed), normal(count, width, seed=seed + 1)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, count, generator=torch.Generator().manual_seed(seed)) < 0.3
    return query, patterns, mask, draw(st.sampled_from([0.1, 0.5, 2.0, 20.0]))


@every_separation
@given(
    data=scenes(),
    unit=st.sampled_from([*GENTLE, PFU(-2.0), TopK(2, -2.0)]),
    weight=st.sampled_from([0, 0.5]),
)
@settings(max_examples=50)
def test_energy_never_rises_under_plain_iteration(separation, data, unit, weight):
    query, patterns, mask, beta = data
    inject = {"inject": "input", "inject_weight": weight} if weight and separation in CONVEX else {}
    f = Retrieval(beta, separation=separation, forgetting=unit, **EUCLIDEAN, **inject)
    assert f.has_energy
    x = f.prepare(query, patterns, mask)
    z, energies = f.init(x), []
    for _ in range(12):
        energies.append(f.energy(z, x))
        z = f(z, x)
    energy = torch.stack(energies)
    size = 1 + energy[energy.isfinite()].abs().amax() if energy.isfinite().any() else 1.0
    # inf where no pattern of LSR is active, and where 1 + s is near 0 its logarithm magnifies roundings.
    rise = (energy[1:] - energy[:-1])[energy[:-1].isfinite()]
    assert not (rise > (1e-12 if separation in CONVEX else 1e-7) * size).any()
    assert separation not in CONVEX or energy.isfinite().all()


def test_energy_of_lsr_may_rise_where_the_query_enters_every_step():
    # One pattern at 0 with reach 1: E = -log(1 - z^2)/2 + (z - 2)^2/2 rises from 1.27 to 1.32 on .5 -> .857.
    f = Retrieval(2.0, separation=LSR(), inject="input")
    x = f.prepare(torch.tensor([2.0], dtype=F64), torch.zeros(1, 1, dtype=F64))
    z = torch.tensor([0.5], dtype=F64)
    assert_close(f(z, x), torch.tensor([6 / 7], dtype=F64), rtol=1e-6, atol=0)
    assert float(f.energy(f(z, x), x)) > float(f.energy(z, x)) + 0.04
    assert not f.has_energy
    assert Retrieval(2.0, separation=LSR()).has_energy
    assert not Retrieval(2.0, separation=LSR(), similarity="dot").has_energy


@every_separation
@pytest.mark.parametrize("unit", [None, PFU(), PFU(-1.5, -3.0), TopK(3, -2.0), ReLU()], ids=repr)
def test_evaluate_and_step_are_the_parts(separation, unit):
    f = Retrieval(0.6, separation=separation, forgetting=unit, **EUCLIDEAN)
    x = f.prepare(normal(5, 4), normal(7, 4, seed=2))
    z = normal(5, 4, seed=3)
    image, energy, _ = f.evaluate(z, x)
    exactly(image, f(z, x))
    assert_close(energy(), f.energy(z, x), rtol=1e-13, atol=1e-13)
    exactly(f.step(z, x), (f(z, x), f.weights(z, x)))


def test_piece_changes_with_the_active_set_of_lsr_only():
    patterns = torch.tensor([[0.0], [1.0], [2.0]], dtype=F64)
    f = Retrieval(2 / 0.75**2, separation=LSR())  # reach .75
    z = torch.tensor([[0.0], [0.1], [0.5], [0.6], [1.5], [1.0], [2.0]], dtype=F64)
    x = f.prepare(z, patterns)
    piece = f.evaluate(z, x)[2]
    active = [(row > 0).nonzero().squeeze(-1).tolist() for row in f.weights(z, x)]
    assert active == [[0], [0], [0, 1], [0, 1], [1, 2], [1], [2]]
    for i, j in itertools.product(range(7), range(7)):
        assert (piece[i] == piece[j]) == (active[i] == active[j])
    smooth = Retrieval(1.0, **EUCLIDEAN)
    assert smooth.evaluate(z, smooth.prepare(z, patterns))[2] is None


# --- relations to the dot product


@pytest.mark.parametrize("separation", ["softmax", "sparsemax", "hardmax"])
@pytest.mark.parametrize("steps", [1, 4, None])
def test_patterns_of_one_length_are_recalled_as_by_the_dot_product(separation, steps):
    # Their scores differ by a constant of the row, which these separations do not see.
    query, patterns = normal(6, 4), normal(9, 4, seed=2)
    patterns = patterns / patterns.norm(dim=-1, keepdim=True)
    options = {"beta": 4.0, "separation": separation, "steps": steps, "stop": TIGHT}
    dot = retrieve(query, patterns, **options)
    euclidean = retrieve(query, patterns, **EUCLIDEAN, **options)
    assert_close(euclidean.value, dot.value, rtol=0, atol=1e-11)
    exactly(euclidean.support, dot.support)


@pytest.mark.parametrize("unit", [PFU(), TopK(3, "threshold")], ids=repr)
def test_units_that_follow_the_scores_keep_the_same_patterns_of_one_length(unit):
    query, patterns = normal(6, 4), normal(9, 4, seed=2)
    patterns = patterns / patterns.norm(dim=-1, keepdim=True)
    f = [Retrieval(4.0, forgetting=unit, similarity=s) for s in ("dot", "euclidean")]
    dot, euclidean = (g.weights(query, g.prepare(query, patterns)) for g in f)
    assert (dot == 0).any()
    assert_close(euclidean, dot / dot.sum(-1, keepdim=True), rtol=0, atol=1e-12)


@every_separation
def test_a_shift_of_everything_shifts_what_is_recalled(separation):
    query, patterns = normal(5, 4), normal(7, 4, seed=2)
    shift = torch.tensor([3.0, -2.0, 0.5, 1.0], dtype=F64)
    options = {"beta": 0.6, "separation": separation, "steps": 3, **EUCLIDEAN}
    moved = retrieve(query + shift, patterns + shift, **options)
    still = retrieve(query, patterns, **options)
    reached = still.support > 0
    assert reached.any()
    assert_close(moved.value[reached], still.value[reached] + shift, rtol=0, atol=1e-11)
    assert_close(moved.state, still.state + shift, rtol=0, atol=1e-11)


def test_no_score_is_above_zero():
    patterns = 30 * normal(40, 50, seed=2).float()
    f = Retrieval(3.0, forgetting=ReLU(), **EUCLIDEAN)
    recall = retrieve(patterns, patterns, beta=3.0, forgetting="relu", **EUCLIDEAN, steps=1)
    assert (recall.index == -1).all()
    assert not f.weights(patterns, f.prepare(patterns, patterns)).any()


# --- what the separation asks for, and what does not go together


def test_the_separation_chooses_unless_told_otherwise():
    assert Retrieval().similarity == "dot"
    assert Retrieval(separation=LSR()).similarity == "euclidean"
    assert Retrieval(separation=LSR(), similarity="dot").similarity == "dot"
    query, patterns = normal(3, 4), normal(6, 4, seed=2)
    asked, told = (retrieve(query, patterns, beta=0.5, separation=LSR(), similarity=s, steps=2)
                   for s in (None, "euclidean"))  # fmt: skip
    exactly(asked.value, told.value)
    dot = retrieve(query, patterns, beta=0.5, separation=LSR(), similarity="dot", steps=1)
    weights = LSR().weights(0.5 * query @ patterns.T)
    assert_close(dot.value, weights @ patterns, rtol=1e-12, atol=1e-12)


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"similarity 'euclidian' .* Did you mean 'euclidean'"):
        Retrieval(similarity="euclidian")
    with pytest.raises(ValueError, match=r"normalize=Sphere\(\) needs similarity='dot'"):
        Retrieval(similarity="euclidean", normalize="sphere")
    with pytest.raises(ValueError, match=r"needs similarity='dot'.*LSR"):
        retrieve(normal(2, 3), normal(4, 3), separation=LSR(), normalize="layernorm")
    for weight in (-0.1, torch.tensor([0.5, -1.0])):
        with pytest.raises(ValueError, match="inject_weight must be >= 0 with euclidean"):
            Retrieval(inject="input", inject_weight=weight, similarity="euclidean")
        Retrieval(inject="input", inject_weight=weight)
