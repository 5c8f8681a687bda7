"""SDM as a fixed-point function: against a slow twin and the published values, empty reads, masks, dtypes, cycles."""

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hopdeq_lwpf import ConvergenceError, Termination, fixed_point
from hopdeq_lwpf._types import ConvergenceWarning
from hopdeq_lwpf.forgetting import PFU, ReLU, TopK
from hopdeq_lwpf.models.sdm.caps import log_cap_intersection
from hopdeq_lwpf.models.sdm.function import EmptyReadError, SDMFunction
from hopdeq_lwpf.models.sdm.hopfield import ClassicalHopfield
from hopdeq_lwpf.models.sdm.intersections import log_circle_intersection
from hopdeq_lwpf.models.sdm.memory import SDM
from hopdeq_lwpf.models.sdm.neuron_memory import NeuronMemory
from hopdeq_lwpf.models.sdm.neurons import Neurons
from hopdeq_lwpf.models.sdm.projections import ProjectedMemory
from hopdeq_lwpf.models.sdm.recalls import cycle_lengths
from hopdeq_lwpf.models.sdm.weights import Attention, Cap, Circle, ReadWeights, TransformerAttention
from hopdeq_lwpf.solvers import Anderson, Picard

F64 = torch.float64
REFERENCE = {
    row["id"]: row
    for row in json.loads((Path(__file__).parent / "data" / "sdm_reference.json").read_text())["values"]
}
TINY = REFERENCE["tiny_hamming"]["inputs"]
PATTERNS = torch.tensor(TINY["patterns"], dtype=F64)
QUERY = torch.tensor(TINY["query"], dtype=F64)
TIGHT = Termination(rtol=1e-13, atol=1e-15, max_steps=2000)
# (space, read weights): each kind, and both spaces where it fits both
KINDS = [
    ("binary", Circle(5)),
    ("binary", Circle(6, 2000.0)),
    ("binary", Attention(2.0)),
    ("binary", Neurons.random(300, 16, 5)),
    ("binary", Neurons.random(50, 16, activation="exponential")),
    ("continuous", Circle(5)),
    ("continuous", Cap(5.5)),
    ("continuous", Cap(6, 2000.0)),
    ("continuous", Attention(3.0)),
    ("continuous", TransformerAttention()),
    ("continuous", Neurons.random(300, 16, 6)),
    ("continuous", Neurons.random(50, 16, activation="linear")),
]
every_kind = pytest.mark.parametrize(
    ("space", "weights"), KINDS, ids=lambda v: v if isinstance(v, str) else repr(v)
)


def bits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(F64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def drawn(space: str, *shape: int, seed: int = 0) -> torch.Tensor:
    return bits(*shape, seed=seed) if space == "binary" else normal(*shape, seed=seed)


def reference(name: str, part: str | None = None) -> torch.Tensor:
    value = REFERENCE[name]["value"]
    return torch.tensor(value if part is None else value[part], dtype=F64)


# --- the published tiny case


def test_weights_and_read_of_binary_sdm_are_the_published_ones():
    f = SDMFunction(Circle(5))
    x = f.prepare(QUERY, PATTERNS)
    assert_close(f.association(QUERY, x), reference("tiny_binary_sdm_weights"), rtol=1e-9, atol=0)
    assert_close(f(QUERY, x), reference("tiny_binary_sdm_step", "next"), rtol=0, atol=0)


def test_read_of_binary_attention_is_the_published_one():
    beta = REFERENCE["tiny_binary_attention_step"]["inputs"]["beta"]
    f = SDMFunction(Attention(beta))
    x = f.prepare(QUERY, PATTERNS)
    assert_close(
        f.association(QUERY, x), reference("tiny_binary_attention_step", "weights"), rtol=1e-9, atol=0
    )
    assert_close(f(QUERY, x), reference("tiny_binary_attention_step", "next"), rtol=0, atol=0)
    assert Attention.fitted(16, 5).beta == pytest.approx(beta, rel=1e-9)


@pytest.mark.parametrize("name", ["tiny_cont_attention_ols", "tiny_cont_attention_transformer"])
def test_fixed_point_of_continuous_attention_is_the_published_one(name):
    beta = REFERENCE[name]["inputs"]["beta"]
    weights = TransformerAttention() if beta == 0.25 else Attention(beta)
    memory = SDM(weights, space="continuous", stop=TIGHT)
    query, patterns = (2 * QUERY - 1) / 4, (2 * PATTERNS - 1) / 4
    found = memory(query, patterns, return_solution=True)
    # The reference is stored with 1e-7.
    assert_close(found.value, reference(name, "fixed_point_renorm"), rtol=1e-7, atol=0)
    one = SDM(weights, space="continuous", steps=1)(query, patterns)
    step = reference(name, "step")
    assert_close(one, step / step.norm(), rtol=1e-7, atol=0)


def test_read_of_explicit_neurons_is_the_published_one():
    import numpy as np

    addresses = torch.from_numpy(np.random.default_rng(7).integers(0, 2, (16, 200))).T
    weights = Neurons(addresses, 5)
    expected = REFERENCE["tiny_neuron_sdm"]["value"]
    f = SDMFunction(weights)
    x = f.prepare(QUERY, PATTERNS)
    shared = weights.logits(2 * QUERY[None] - 1, x.keys, 16.0).exp()[0]
    assert_close(shared, torch.tensor(expected["shared_neurons_per_pattern"], dtype=F64))
    assert weights.activities(2 * QUERY[None] - 1, 16.0, 0, 200).sum() == expected["n_active_for_query"]
    assert f(QUERY, x).tolist() == expected["next"]


def test_classical_hopfield_takes_the_published_path():
    path = REFERENCE["tiny_hopfield"]["value"]["trajectory"]
    state = QUERY
    for expected in path[1:]:
        state = ClassicalHopfield(steps=1)(state, PATTERNS)
        assert (2 * state - 1).tolist() == expected
    found = ClassicalHopfield()(QUERY, PATTERNS, return_solution=True)
    assert (2 * found.value - 1).tolist() == path[-1]
    assert found.cycle == 1


# --- against a slow twin


def slow_weight(weights: ReadWeights, cosine: float, n: int) -> float:
    """The weight of a pattern at this cosine, one formula a kind."""
    if isinstance(weights, Attention):
        return math.exp(weights.at(n) * cosine)
    if isinstance(weights, Circle):
        distance = math.floor(n * (1 - cosine) / 2 + 1e-9)
        return math.exp(float(log_circle_intersection(n, weights.d)[distance]))
    return math.exp(float(log_cap_intersection(n, weights.d, torch.tensor(cosine, dtype=F64))))


def slow_read(z: list, patterns: list, weights: ReadWeights, binary: bool, d=None) -> list:
    n = len(z)
    sign = (lambda v: [2 * a - 1 for a in v]) if binary else (lambda v: [a / math.hypot(*v) for a in v])
    z, patterns = sign(z), [sign(p) for p in patterns]
    unit = n if binary else 1
    cosines = [math.fsum(a * b for a, b in zip(z, p, strict=True)) / unit for p in patterns]
    w = [slow_weight(weights, c, n) for c in cosines]
    mean = [math.fsum(a * p[i] for a, p in zip(w, patterns, strict=True)) / math.fsum(w) for i in range(n)]
    return [float(a > 0) for a in mean] if binary else [a / math.hypot(*mean) for a in mean]


@pytest.mark.parametrize(
    ("space", "weights"),
    [(s, w) for s, w in KINDS if not isinstance(w, Neurons) and getattr(w, "neurons", None) is None],
)
def test_fast_equals_slow(space, weights):
    query, patterns = drawn(space, 6, 16), drawn(space, 7, 16, seed=1)
    # Near enough that no read is empty.
    query = (
        torch.where(torch.arange(16) < 4, query, patterns[:6])
        if space == "binary"
        else patterns[:6] + 0.3 * query
    )
    f = SDMFunction(weights, space=space)
    fast = f(f.init(x), x) if (x := f.prepare(query, patterns)) else None
    slow = [slow_read(q, patterns.tolist(), weights, space == "binary") for q in query.tolist()]
    # 1e-8: the table of cap intersections.
    assert_close(fast, torch.tensor(slow, dtype=F64), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("n", "d"), [(2, 0.5), (3, 1), (10, 3), (64, 11), (64, 30), (64, 40), (1000, 447), (1001, 500)]
)
def test_table_of_caps_follows_the_quadrature(n, d):
    edge = min(2 * math.acos(1 - 2 * d / n), math.pi)
    cosine = torch.linspace(0, 0.97 * edge, 200, dtype=F64).cos()[None]
    exact = log_cap_intersection(n, d, cosine)
    table = Cap(d).of_products(cosine, n, 1.0, None)
    weighs = exact > exact.max() - 100
    assert_close(table[weighs], exact[weighs], rtol=0, atol=2e-6)
    assert (table[~weighs] < exact.max() - 99).all()


def test_an_antiparallel_pattern_weighs_nothing_in_a_cap():
    # The published table put it at its last entry, the largest weight.
    x = normal(1, 16)
    out = SDM(Cap(5), space="continuous", steps=1)(x, torch.cat([-x, x]))
    assert_close(out, x / x.norm())


def test_distances_of_continuous_signs_are_not_floored_by_rounding():
    # The published code took 6787 of 65536 such distances one too small.
    signs = 2 * torch.randint(0, 2, (64, 1000), generator=torch.Generator().manual_seed(0)).float() - 1
    binary = Circle(451).logits(signs, signs, 1000.0)
    unit = signs / 1000**0.5
    assert torch.equal(Circle(451).logits(unit, unit, 1.0), binary)


def test_float32_does_not_underflow():
    patterns = bits(20, 784).float()
    query = patterns.clone()
    query[:, :40] = 1 - query[:, :40]
    assert torch.equal(SDM(Circle(290))(query, patterns), patterns)  # shares near exp(-28)


# --- finite neurons


def test_finite_counts_are_floor_or_one_more_and_unbiased():
    # 40,000 draws: the mean of a Bernoulli has a standard error of at most .0025.
    weights = Circle(5, 3000.0)
    dot = torch.full((1, 40_000), 10.0, dtype=F64)  # distance 3
    counts = weights.of_products(dot, 16, 16.0, weights.draw(40_000)).exp()
    expected = 3000 * float(log_circle_intersection(16, 5)[3].exp())
    assert set(counts.round().unique().tolist()) == {math.floor(expected), math.floor(expected) + 1}
    assert counts.mean() == pytest.approx(expected, abs=0.0125)


def test_finite_neurons_are_drawn_once():
    memory = SDM(Circle(5, 500.0))
    query, patterns = bits(8, 16), bits(6, 16, seed=1)
    assert torch.equal(memory(query, patterns), memory(query, patterns))
    assert torch.equal(memory(query, patterns), SDM(Circle(5, 500.0))(query, patterns))
    assert not torch.equal(Circle(5, 500.0, seed=1).draw(6), Circle(5, 500.0).draw(6))


def test_counts_beyond_any_float_stay_finite():
    logits = Circle(451, 2.0**1000).logits(torch.ones(1, 1000), torch.ones(2, 1000), 1000.0, torch.zeros(2))
    exact = log_circle_intersection(1000, 451)[0] + 1000 * math.log(2)
    assert_close(logits, exact.float().expand(1, 2))


# --- ties, empty reads


def test_ties_become_zero():
    patterns = torch.tensor(
        [[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0]]
    )
    query = torch.tensor([0.0, 0, 1, 0])
    assert SDM(Circle(2), steps=1)(query, patterns).tolist() == [0, 0, 1, 0]


FAR = torch.tensor([[0.0] * 16, [1.0] * 15 + [0.0]])  # the first reaches nothing, the second one pattern
STORED = torch.tensor([[1.0] * 16, [1.0] * 14 + [0.0, 0.0]])


@pytest.mark.parametrize("weights", [Circle(3), Neurons.random(20_000, 16, 3), Circle(3, 500.0)], ids=repr)
@pytest.mark.parametrize("unit", [None, TopK(1)])
def test_empty_read_keeps_the_state_and_is_reported(weights, unit):
    found = SDM(weights, forgetting=unit)(FAR, STORED, return_solution=True)
    assert found.empty.tolist() == [True, False]
    assert torch.equal(found.value[0], FAR[0])
    assert "1 of 2 queries met an empty read" in found.note


@pytest.mark.parametrize("weights", [Circle(3), Neurons.random(20_000, 16, 3)], ids=repr)
def test_empty_read_takes_the_mean(weights):
    memory = SDM(weights, empty="mean", steps=1)
    assert memory(FAR, STORED)[0].tolist() == [1.0] * 14 + [0.0, 0.0]
    mask = torch.tensor([False, True])
    assert memory(FAR, STORED, mask=mask)[0].tolist() == [1.0] * 16
    pointers = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    assert memory(FAR, STORED, pointers)[0].tolist() == [1, 0, 1]


def test_empty_read_of_pointers_is_zero_when_kept():
    found = SDM(Circle(3))(FAR, STORED, torch.ones(2, 5), return_solution=True)
    assert found.value.tolist() == [[0.0] * 5, [1.0] * 5]


@pytest.mark.parametrize("weights", [Circle(3), Neurons.random(2000, 16, 3)], ids=repr)
def test_empty_read_raises_when_told_to(weights):
    with pytest.raises(EmptyReadError, match=r"1 of 2 queries reach no stored pattern; raise the radius"):
        SDM(weights, empty="error", steps=1)(FAR, STORED)


def test_continuous_empty_read_keeps_the_state():
    query, patterns = torch.eye(8)[:1], torch.eye(8)[1:]
    found = SDM(Cap(1), space="continuous")(query, patterns, return_solution=True)
    assert_close(found.value, query)
    assert found.empty.all()


# --- batch, masks, dtypes, NaN


@every_kind
@pytest.mark.parametrize("unit", [None, PFU(), TopK(3)], ids=repr)
def test_batch_equals_single(space, weights, unit):
    query, patterns = drawn(space, 2, 3, 16), drawn(space, 5, 16, seed=1)
    memory = SDM(weights, space=space, forgetting=unit, on_failure="ignore")
    together = memory(query, patterns)
    for i in range(2):
        for j in range(3):
            # 1e-4: a map that contracts slowly stops at a residual of 1e-5.
            assert_close(memory(query[i, j], patterns), together[i, j], rtol=0, atol=1e-4)


@every_kind
def test_masked_patterns_do_not_exist(space, weights):
    if getattr(weights, "neurons", None) is not None:
        pytest.skip("counts are drawn by place")
    query, patterns = drawn(space, 4, 16), drawn(space, 6, 16, seed=1)
    mask = torch.arange(6) >= 4
    memory = SDM(weights, space=space, steps=2)
    padded = patterns.clone()
    padded[4:] = math.nan
    assert_close(memory(query, padded, mask=mask), memory(query, patterns[:4]), rtol=0, atol=1e-12)
    a_query = mask.expand(4, 6)
    assert_close(memory(query, patterns, mask=a_query), memory(query, patterns[:4]), rtol=0, atol=1e-12)


@every_kind
def test_sets_of_patterns_are_read_by_their_own_queries(space, weights):
    query, patterns = drawn(space, 2, 3, 16), drawn(space, 2, 5, 16, seed=1)
    pointers = drawn(space, 2, 5, 4, seed=2)
    memory = SDM(weights, space=space, steps=2)
    together = memory(query, patterns, pointers)
    for i in range(2):
        assert_close(memory(query[i], patterns[i], pointers[i]), together[i], rtol=0, atol=1e-12)


@every_kind
def test_nan_in_one_row_harms_no_other(space, weights):
    query, patterns = drawn(space, 3, 16), drawn(space, 5, 16, seed=1)
    memory = SDM(weights, space=space, on_failure="ignore")
    clean = memory(query, patterns)
    query = query.clone()
    query[1, 2] = math.nan
    found = memory(query, patterns, return_solution=True)
    assert found.value[1].isnan().any()
    assert_close(found.value[[0, 2]], clean[[0, 2]], rtol=0, atol=1e-4)
    assert found.result[1] == 3
    assert found.index[1] == -1


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(space, weights, dtype):
    query, patterns = drawn(space, 3, 16).to(dtype), drawn(space, 5, 16, seed=1).to(dtype)
    memory = SDM(weights, space=space, steps=1)
    out = memory(query, patterns)
    assert out.dtype == dtype
    if space == "continuous" and isinstance(weights, Circle | Neurons) or getattr(weights, "neurons", None):
        return  # a distance at a radius falls on either side of it
    exact = memory(query.double(), patterns.double())
    assert_close(out.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_whole_numbers_are_taken_as_bits(dtype):
    expected = SDM(Circle(5))(QUERY, PATTERNS).float()
    assert torch.equal(SDM(Circle(5))(QUERY.to(dtype), PATTERNS.to(dtype)), expected)


def test_autocast_does_not_round_distances():
    patterns = bits(30, 1000).float()
    query = patterns.clone()
    query[:, :250] = 1 - query[:, :250]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(SDM(Circle(447))(query, patterns), patterns)


@every_kind
def test_empty_batch(space, weights):
    out = SDM(weights, space=space)(drawn(space, 0, 16), drawn(space, 5, 16))
    assert out.shape == (0, 16)


# --- hetero-association


def test_pointers_are_read_at_the_last_of_the_reads():
    pointers = bits(5, 7, seed=3)
    f = SDM(Circle(5)).f
    x = f.prepare(QUERY, PATTERNS, pointers)
    state = QUERY
    for steps in (1, 2, 3):
        weights = f.association(state, x)
        expected = (weights @ pointers > 0.5).to(F64)
        assert torch.equal(SDM(Circle(5), steps=steps)(QUERY, PATTERNS, pointers), expected)
        state = f(state, x)
    assert torch.equal(SDM(Circle(5))(QUERY, PATTERNS, pointers), pointers[0])


def test_pointers_of_a_continuous_memory_are_not_normalised():
    query, patterns, pointers = normal(3, 16), normal(5, 16, seed=1), normal(5, 2, seed=2)
    memory = SDM(Attention(8.0), space="continuous", steps=1)
    unit = torch.nn.functional.normalize
    expected = torch.softmax(8 * unit(query, dim=-1) @ unit(patterns, dim=-1).T, -1) @ pointers
    assert_close(memory(query, patterns, pointers), expected)
    assert_close(
        SDM(Attention(8.0), space="continuous", steps=1, read_out="sphere")(query, patterns, pointers),
        unit(expected, dim=-1),
    )


def test_a_sequence_is_followed_from_a_noisy_start():
    patterns = bits(6, 64)
    start = patterns[0].clone()
    start[:8] = 1 - start[:8]
    for steps in (1, None):
        found = SDM(Circle(15), steps=steps).sequence(start, patterns, patterns.roll(-1, 0), 7)
        assert torch.equal(found, patterns[[1, 2, 3, 4, 5, 0, 1]])


# --- forgetting, energy


def test_forgetting_leaves_the_vote_to_those_kept():
    # The nearest pattern has less than half of the weight; alone, it decides.
    memory = SDM(Attention(1.0), forgetting=TopK(1), steps=1)
    assert torch.equal(memory(QUERY, PATTERNS), PATTERNS[0])
    assert not torch.equal(SDM(Attention(0.1), steps=1)(QUERY, PATTERNS), PATTERNS[0])


def test_all_forgotten_is_an_empty_read():
    found = SDM(Circle(5), forgetting=ReLU())(QUERY, PATTERNS, return_solution=True)
    assert found.empty
    assert torch.equal(found.value, QUERY)


@given(st.integers(0, 10_000), st.sampled_from(["binary", "continuous"]), st.sampled_from([0.5, 4.0, 30.0]))
@settings(max_examples=60)
def test_reads_of_attention_never_raise_the_energy(seed, space, beta):
    for unit in (None, ReLU(), PFU(0.3), TopK(3)):
        f = SDMFunction(Attention(beta), space=space, forgetting=unit)
        assert f.has_energy
        x = f.prepare(drawn(space, 4, 12, seed=seed), drawn(space, 6, 12, seed=seed + 1))
        z = f.init(x)
        for _ in range(4):
            after = f(z, x)
            assert (f.energy(after, x) <= f.energy(z, x) + 1e-12).all()
            z = after


def test_what_has_no_energy_says_so():
    f = SDMFunction(Circle(5))
    assert not f.has_energy
    assert not SDMFunction(Attention(1.0), forgetting=PFU(0.3, -1.0)).has_energy
    with pytest.raises(ValueError, match=r"energy is known for weights=Attention"):
        f.energy(QUERY, f.prepare(QUERY, PATTERNS))


def test_energy_has_the_read_as_its_direction():
    f = SDMFunction(Attention(3.0), space="continuous")
    x = f.prepare(normal(4, 6), normal(5, 6, seed=1))
    z = f.init(x).requires_grad_()
    (slope,) = torch.autograd.grad(f.energy(z, x).sum(), z)
    assert_close(f(z, x), torch.nn.functional.normalize(-slope, dim=-1))


# --- cycles


def test_a_cycle_of_two_is_reported_and_not_hidden():
    # W = [[0, -1/2], [-1/2, 0]]: equal bits flip together, different ones stay.
    query = torch.tensor([[1.0, 1], [0, 1]])
    found = ClassicalHopfield(on_failure="ignore")(query, torch.tensor([[0.0, 1]]), return_solution=True)
    assert found.cycle.tolist() == [2, 1]
    assert found.converged.tolist() == [False, True]
    assert "1 of 2 queries ended in a cycle of up to 2 states" in found.note
    with pytest.warns(UserWarning, match="1 of 2 problems did not converge"):
        ClassicalHopfield()(query, torch.tensor([[0.0, 1]]))


def test_cycle_lengths_are_found_whatever_leads_into_them():
    def turn(z, x):
        step = z[:, 0]
        return torch.where(step < 3, step + 1, 3 + (step - 2) % 5)[:, None]

    lengths = cycle_lengths(turn, None, torch.tensor([[0.0], [4.0]]), Termination())
    assert lengths.tolist() == [5, 5]
    assert cycle_lengths(lambda z, x: z + 1, None, torch.zeros(2, 1), Termination()).tolist() == [0, 0]


# --- the module


def test_module_and_function_agree():
    memory = SDM(Circle(5))
    x = memory.f.prepare(QUERY, PATTERNS)
    found = fixed_point(memory.f, x, memory.f.init(x), solver="picard")
    assert torch.equal(found.value, memory(QUERY, PATTERNS))
    assert memory.last_solution.index == 0
    assert memory.last_solution.cosine == 1


@pytest.mark.filterwarnings("error")
def test_the_last_solution_is_a_recall_also_where_a_failure_raises():
    query, patterns = torch.tensor([[1.0, 1], [0, 1]]), torch.tensor([[0.0, 1]])
    memory = ClassicalHopfield(on_failure="raise")
    with pytest.raises(ConvergenceError):
        memory(query, patterns)
    assert memory.last_solution.cycle.tolist() == [2, 1]
    memory = ClassicalHopfield(on_failure="warn")
    with pytest.raises(ConvergenceWarning):  # warnings are errors here
        memory(query, patterns)
    assert memory.last_solution.cycle.tolist() == [2, 1]
    memory = SDM(Attention(3.0), space="continuous", stop=Termination(max_steps=1), on_failure="raise")
    with pytest.raises(ConvergenceError):
        memory(normal(3, 16), normal(5, 16, seed=1), normal(5, 2, seed=2))
    assert memory.last_solution.index.shape == memory.last_solution.empty.shape == (3,)
    assert memory.last_solution.value.shape == (3, 16)


def test_cosines_of_classical_hopfield_are_not_rounded_under_autocast():
    patterns = bits(30, 999).float()
    query = patterns.clone()
    query[:, :3] = 1 - query[:, :3]
    memory = ClassicalHopfield(steps=1, on_failure="ignore")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = memory(query, patterns, return_solution=True).cosine
    assert rounded.dtype == torch.float32
    assert_close(rounded, memory(query, patterns, return_solution=True).cosine, rtol=0, atol=0)


def written() -> NeuronMemory:
    memory = NeuronMemory(Neurons.random(300, 16, 5))
    memory.write(PATTERNS)
    return memory


@pytest.mark.parametrize(
    ("memory", "args", "named"),
    [
        (SDM(Circle(5)), (QUERY,), {"patterns": PATTERNS}),
        (SDM(Circle(5)), (QUERY, PATTERNS, bits(len(PATTERNS), 3)), {}),
        (
            SDM(Attention(3.0), space="continuous"),
            (normal(4, 16), normal(5, 16, seed=1)),
            {"mask": torch.arange(5) > 3, "return_solution": True},
        ),
        (
            ProjectedMemory(16, 8, Attention(3.0)),
            (normal(4, 16).float(),),
            {"patterns": normal(5, 16).float()},
        ),
        (ClassicalHopfield(), (QUERY, PATTERNS), {"return_solution": True}),
        (written(), (QUERY,), {"return_solution": True}),
    ],
    ids=lambda v: type(v).__name__,
)
def test_problem_takes_the_arguments_of_a_call_and_is_what_the_call_solves(memory, args, named):
    with torch.no_grad():
        memory(*args, **named)
        found = fixed_point(memory.f, *memory.problem(*args, **named), solver=memory.solver)
    assert_close(found.state, memory.last_solution.state)
    assert found.steps.tolist() == memory.last_solution.steps.tolist()


def test_copies_and_pickles_recall_alike():
    for weights in (Circle(5), Cap(5), Neurons.random(100, 16, 5)):
        memory = SDM(weights, space="continuous")
        query, patterns = normal(3, 16), normal(5, 16, seed=1)
        expected = memory(query, patterns)
        assert torch.equal(copy.deepcopy(memory)(query, patterns), expected)
        assert torch.equal(pickle.loads(pickle.dumps(memory))(query, patterns), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SDM("circle"), TypeError, r"weights must be read weights such as Circle\(d\).*got 'circle'"),
        (lambda: SDM(Circle(5), space="bin"), ValueError, r"space 'bin'.*Did you mean 'binary'"),
        (lambda: SDM(Circle(5), empty="keeps"), ValueError, r"empty 'keeps'.*Did you mean 'keep'"),
        (lambda: SDM(Circle(5), read_out="sign"), ValueError, r"read_out 'sign'"),
        (
            lambda: SDM(Circle(5), solver="anderson"),
            ValueError,
            r"'anderson' needs a smooth.*solver='picard'",
        ),
        (lambda: SDM(Circle(5), solver=Picard(0.5)), ValueError, r"leave the binary states"),
        (lambda: SDM(Cap(5, 10.0), space="continuous", solver=Anderson()), ValueError, r"piecewise constant"),
        (lambda: Circle(-1), ValueError, r"d must be a whole number.*-1"),
        (lambda: Circle(2.5), TypeError, r"d must be a whole number.*2.5"),
        (lambda: Circle(5, 0), ValueError, r"neurons must be .*got 0"),
        (lambda: Circle(5, 10, seed=-1), ValueError, r"seed must be"),
        (lambda: Cap(math.nan), ValueError, r"d must be a number.*nan"),
        (lambda: Attention(0.0), ValueError, r"beta must be > 0"),
        (lambda: Attention(torch.ones(2)), ValueError, r"beta must be one number.*\(2,\)"),
        (
            lambda: TransformerAttention.fitted(64, 11),
            TypeError,
            r"TransformerAttention has .* no fit; use Attention.fitted\(64, 11\)",
        ),
        (lambda: SDM(Circle(17))(QUERY, PATTERNS), ValueError, r"d must be at most the width n = 16.*got 17"),
        (
            lambda: SDM(Circle(5))(QUERY, 2 * PATTERNS - 1),
            ValueError,
            r"patterns must hold 0 and 1 only, got -1",
        ),
        (lambda: SDM(Circle(5))(QUERY / 2, PATTERNS), ValueError, r"query must hold 0 and 1 only, got 0.5"),
        (
            lambda: SDM(Circle(5))(QUERY[:8], PATTERNS),
            ValueError,
            r"query has width 8 but patterns have width 16",
        ),
        (
            lambda: SDM(Circle(5))(QUERY, PATTERNS, PATTERNS[:3]),
            ValueError,
            r"pointers must have one row a pattern",
        ),
        (
            lambda: SDM(Circle(5))(QUERY, PATTERNS, PATTERNS / 2),
            ValueError,
            r"pointers must hold 0 and 1 only",
        ),
        (lambda: SDM(Cap(1), space="continuous")(normal(2, 1), normal(3, 1)), ValueError, r"width 2 or more"),
        (lambda: SDM(Cap(1), space="continuous")(QUERY.long(), PATTERNS), TypeError, r"floating-point"),
        (
            lambda: ClassicalHopfield()(QUERY, 2 * PATTERNS - 1),
            ValueError,
            r"patterns must hold 0 and 1 only",
        ),
        (
            lambda: SDM(Circle(5)).sequence(QUERY, PATTERNS, PATTERNS[:, :3], 2),
            ValueError,
            r"pointers as wide as the patterns, 16, got 3",
        ),
    ],
)
def test_bad_input_is_one_clear_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
