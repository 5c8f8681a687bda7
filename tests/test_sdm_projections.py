"""Reads with projected keys: against plain Python, masks, dtypes, empty reads, gradients."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references_projections import F64, make, normal, read
from references_sdm import shared
from torch import nn
from torch.autograd import gradcheck
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from hopdeq_lwpf import Equilibrium, Termination, fixed_point
from hopdeq_lwpf.forgetting import PFU, TopK
from hopdeq_lwpf.models.sdm import Attention, Cap, Circle, EmptyReadError, Neurons, ProjectedMemory

TIGHT = Termination(rtol=1e-12, atol=1e-14, max_steps=3000)
# float64, a few hundred operations.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
KINDS = {
    "attention": (Attention(3.0), lambda c: math.exp(3 * c)),
    "circle": (Circle(3), lambda c: shared(4, 3, math.floor(4 * (1 - c) / 2))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_reads_equal_those_of_plain_python(kind, steps):
    weights, weigh = KINDS[kind]
    memory = make(weights, steps=steps)
    patterns, queries = normal(5, 6), normal(3, 6, seed=1)
    expected = queries.tolist()
    for _ in range(steps):
        expected = [read(memory.f.projection.tolist(), patterns.tolist(), z, weigh) for z in expected]
    assert_close(memory(queries, patterns), torch.tensor(expected, dtype=F64), **EXACT)


def test_solve_ends_at_a_fixed_point_of_the_plain_read():
    memory = make(Attention(4.0), stop=TIGHT)
    patterns, queries = normal(5, 6), normal(3, 6, seed=1)
    found = memory(queries, patterns, return_solution=True)
    assert found.converged.all()
    for z in found.state.tolist():
        again = read(memory.f.projection.tolist(), patterns.tolist(), z, KINDS["attention"][1])
        assert again != pytest.approx(z, rel=1e-3)  # another beta has other fixed points
        again = read(memory.f.projection.tolist(), patterns.tolist(), z, lambda cosine: math.exp(4 * cosine))
        assert again == pytest.approx(z, rel=1e-9)


def test_one_step_k_steps_and_equilibrium_are_one_function_to_any_solver():
    memory = make(Attention(4.0), stop=TIGHT)
    x = memory.f.prepare(normal(3, 6, seed=1), normal(5, 6))
    one = memory.f(x.start, x)
    assert_close(fixed_point(memory.f, x, x.start, steps=2).value, memory.f(one, x))
    solved = Equilibrium(memory.f, stop=TIGHT)(x)
    assert_close(memory(x), solved)
    # Anderson stops on the same residual of 1e-12; the map contracts, so that the error is some times larger.
    assert_close(Equilibrium(memory.f, stop=TIGHT, solver="anderson")(x), solved, rtol=1e-8, atol=1e-8)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.floats(0.01, 100), st.integers(0, 99))
@settings(max_examples=40)
@torch.no_grad()
def test_a_read_is_a_mean_of_the_patterns_and_knows_neither_length_nor_order(keys, count, width, scale, seed):
    memory = make(Attention(3.0), width, keys, steps=1)
    patterns, queries = normal(count, width, seed=seed), normal(2, width, seed=seed + 1)
    found = memory(queries, patterns)
    assert (found <= patterns.amax(0) + 1e-9).all()
    assert (found >= patterns.amin(0) - 1e-9).all()
    assert_close(memory(scale * queries, patterns), found, **EXACT)
    assert_close(memory(queries, patterns.flip(0)), found, **EXACT)
    assert_close(memory.project(queries).norm(dim=-1), torch.ones(2, dtype=F64))


def test_each_query_is_solved_alone_and_nan_harms_no_other():
    memory = make(Attention(6.0))
    patterns, queries = normal(7, 6), normal(5, 6, seed=1)
    together = memory(queries, patterns)
    for row, query in zip(together, queries, strict=True):
        assert_close(row, memory(query, patterns))
    queries[2] = math.nan
    with pytest.warns(UserWarning, match="NONFINITE"):
        bad = memory(queries, patterns)
    keep = [0, 1, 3, 4]
    assert_close(bad[keep], together[keep])
    assert memory.last_solution.index[2] == -1


def test_masks_and_sets_of_patterns():
    memory = make(Attention(3.0), steps=2)
    patterns, queries = normal(5, 6), normal(2, 3, 6, seed=1)
    gone = torch.tensor([False, True, False, False, True])
    padded = patterns.clone()
    padded[gone] = math.nan
    left = memory(queries, patterns[~gone])
    assert_close(memory(queries, padded, gone), left)
    assert_close(memory(queries, patterns, gone.expand(2, 3, 5)), left)
    sets = torch.stack([patterns, normal(5, 6, seed=2)])
    grouped = memory(queries, sets)
    for i in range(2):
        assert_close(grouped[i], memory(queries[i], sets[i]))
    own = memory(queries[:, 0], sets)
    assert_close(own, torch.stack([memory(queries[i, 0], sets[i]) for i in range(2)]))


def test_index_is_that_of_the_nearest_picture_not_of_the_nearest_key():
    memory = make(Attention(50.0), 2, 1, steps=1)
    with torch.no_grad():
        memory.f.projection.copy_(torch.tensor([[1.0, 0.0]]))
    patterns = torch.tensor([[0.1, 1.0], [1.0, 0.0]], dtype=F64)  # both have the key 1
    found = memory(torch.tensor([[1.0, 5.0]], dtype=F64), patterns, return_solution=True)
    assert_close(found.state, patterns.mean(0, keepdim=True))
    cosine = cosine_similarity(found.state, patterns)
    assert found.index.tolist() == [int(cosine.argmax())]
    assert_close(found.cosine, cosine.max()[None])


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_empty_batches(dtype):
    memory = ProjectedMemory(6, 4, Attention(3.0), steps=2, generator=torch.Generator().manual_seed(0))
    patterns, queries = normal(5, 6).to(dtype), normal(3, 6, seed=1).to(dtype)
    found = memory(queries, patterns)
    assert found.dtype == dtype
    exact = memory(queries.double(), patterns.double())
    eps = torch.finfo(dtype).eps
    # The state is rounded after each read; the weights are float32 or wider.
    assert_close(found.double(), exact, rtol=20 * eps, atol=20 * max(eps, 1e-7))
    assert memory(queries[:0], patterns).shape == (0, 6)


def test_autocast_does_not_touch_the_reads():
    memory = ProjectedMemory(6, 4, Attention(3.0), steps=2)
    patterns, queries = normal(5, 6).float(), normal(3, 6, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = memory(queries, patterns)
    assert_close(rounded, memory(queries, patterns))


def test_forgetting_acts_on_the_logits_and_what_is_forgotten_stays_in_the_denominator():
    memory = make(Attention(3.0), forgetting=TopK(2, bias=0.0), steps=1)
    patterns, queries = normal(5, 6), normal(3, 6, seed=1)
    logits = 3 * memory.project(queries) @ memory.project(patterns).T
    kept = torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 1.0)
    expected = (torch.softmax(logits * kept, 1) * kept) @ patterns
    assert_close(memory(queries, patterns), expected)


@pytest.mark.parametrize("weights", [Circle(1), Neurons.random(40, 16, 1)], ids=repr)
@torch.no_grad()
def test_an_empty_read_keeps_the_picture_or_reads_the_mean_or_raises(weights):
    def memory(empty):
        made = make(weights, 16, 16, empty=empty, steps=1)
        made.f.projection.copy_(torch.eye(16))
        return made

    patterns = torch.eye(16, dtype=F64)[:3]
    query = -2 * patterns[:1]
    assert_close(memory("keep")(query, patterns), query)
    assert_close(memory("mean")(query, patterns), patterns.mean(0, keepdim=True))
    assert_close(
        memory("mean")(query, patterns, torch.tensor([False, False, True])),
        patterns[:2].mean(0, keepdim=True),
    )
    with pytest.raises(EmptyReadError, match=r"1 of 1 queries reach no stored pattern"):
        memory("error")(query, patterns)


@torch.no_grad()
def test_explicit_neurons_hold_the_pictures_at_their_keys():
    memory = make(Neurons.random(200, 12, 5), 6, 12, steps=2)
    patterns, queries = normal(5, 6), normal(3, 6, seed=1)
    x = memory.f.prepare(queries, patterns)
    assert x.content is not None
    # A mask of one entry a query and pattern asks for the weight of each pattern instead.
    weighed = memory.f.prepare(queries, patterns, torch.zeros(3, 5, dtype=torch.bool))
    assert weighed.content is None
    assert_close(memory(x), memory(weighed))


def test_copies_pickles_and_state_dicts_read_alike():
    memory = make(Attention(nn.Parameter(torch.tensor(3.0))), steps=1)
    patterns, queries = normal(5, 6), normal(3, 6, seed=1)
    found = memory(queries, patterns)
    other = make(Attention(nn.Parameter(torch.tensor(1.0))), steps=1)
    other.load_state_dict(memory.state_dict())
    assert sorted(memory.state_dict()) == ["f.projection", "f.weights.beta"]
    for again in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory)), other):
        assert_close(again(queries, patterns), found)


def test_other_weights_take_the_same_projection():
    memory = make(Attention(3.0), steps=1)
    cap = memory.with_weights(Cap(1.5))
    assert torch.equal(cap.f.projection, memory.f.projection)
    assert isinstance(memory.f.weights, Attention)
    with torch.no_grad():
        cap.f.projection.zero_()
    assert memory.f.projection.abs().sum() > 0
    with pytest.raises(ValueError, match=r"d must be at most the width n = 4"):
        memory.with_weights(Circle(5))
    with pytest.raises(ValueError, match=r"piecewise constant; use solver='picard'"):
        make(Attention(3.0), solver="anderson").with_weights(Circle(2))


def test_there_is_no_energy():
    memory = make(Attention(3.0))
    x = memory.f.prepare(normal(1, 6), normal(2, 6))
    assert not memory.f.has_energy
    with pytest.raises(ValueError, match="energy is not known for projected patterns"):
        memory.f.energy(x.start, x)


# --- gradients

SMOOTH = [Attention(nn.Parameter(torch.tensor(4.0, dtype=F64))), Cap(2.5)]
every_smooth = pytest.mark.parametrize("weights", SMOOTH, ids=["attention", "cap"])


def with_parameters(memory, parameters, *inputs):
    """memory(*inputs) with these values of its parameters."""
    names = [name for name, _ in memory.named_parameters()]
    return torch.func.functional_call(memory, dict(zip(names, parameters, strict=True)), inputs)


@every_smooth
@pytest.mark.parametrize("unit", [None, PFU(-1.0)], ids=repr)
def test_gradient_of_reads(weights, unit):
    memory = make(weights, steps=2, forgetting=unit)
    inputs = (normal(3, 6).requires_grad_(), normal(5, 6, seed=1).requires_grad_())
    parameters = tuple(p.detach().clone().requires_grad_() for p in memory.parameters())
    assert gradcheck(lambda q, p, *w: with_parameters(memory, w, q, p), (*inputs, *parameters))


@every_smooth
def test_implicit_gradient_equals_the_unrolled_one(weights):
    patterns, seen = normal(5, 6, seed=1).requires_grad_(), normal(3, 6, seed=3)

    def gradients(adjoint):
        memory = make(weights, adjoint=adjoint, stop=TIGHT)
        out = memory(normal(3, 6), patterns, return_solution=True).require()
        return torch.autograd.grad((out.value * seen).sum(), (patterns, *memory.parameters()))

    for implicit, unrolled in zip(gradients("implicit"), gradients("unrolled"), strict=True):
        # 1e-5: the adjoint solves to 1e-6.
        assert_close(implicit, unrolled, rtol=1e-5, atol=1e-5)
        assert unrolled.abs().sum() > 1e-3


def test_piecewise_constant_weights_refuse_gradients_and_recall_without():
    memory = make(Circle(2))
    with pytest.raises(
        ValueError, match=r"projection requires grad, but Circle\(d=2\) is piecewise"
    ) as caught:
        memory(normal(3, 6), normal(5, 6))
    assert "\n" not in str(caught.value)
    with torch.no_grad():
        memory(normal(3, 6), normal(5, 6))
    memory.requires_grad_(False)(normal(3, 6), normal(5, 6))


# --- bad input

SOME = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
MADE = ProjectedMemory(64, 8, Attention(3.0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ProjectedMemory(0), ValueError, r"width must be a whole number of at least 1, got 0"),
        (lambda: ProjectedMemory(9, 2.5), TypeError, r"keys must be a whole number"),
        (lambda: ProjectedMemory(9, 8), ValueError, r"weights have a default for keys=64 only, got keys=8"),
        (lambda: ProjectedMemory(9, 8, 3.0), TypeError, r"weights must be read weights"),
        (lambda: ProjectedMemory(9, 8, Circle(9)), ValueError, r"d must be at most the width n = 8"),
        (lambda: ProjectedMemory(9, 8, Circle(3), solver="lbfgs"), ValueError, r"piecewise constant"),
        (lambda: MADE(SOME[:, :9], SOME[:, :9]), ValueError, r"have the width 64 of the projection, got 9"),
        (lambda: MADE(SOME), TypeError, r"patterns must be a torch.Tensor, got NoneType"),
        (lambda: MADE(SOME.long(), SOME), TypeError, r"query must have a floating-point dtype"),
        (lambda: MADE(SOME, SOME.double()), TypeError, r"patterns has dtype torch.float64 but query"),
    ],
)
def test_bad_input_is_one_clear_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
