"""Explicit neurons: activities, online writes and removal, and agreement with the memory of stored patterns."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hopdeq_lwpf.data.draws import stream
from hopdeq_lwpf.forgetting import TopK
from hopdeq_lwpf.models.sdm import neurons as module
from hopdeq_lwpf.models.sdm.memory import SDM
from hopdeq_lwpf.models.sdm.neuron_memory import NeuronMemory
from hopdeq_lwpf.models.sdm.neurons import ACTIVATIONS, Neurons
from hopdeq_lwpf.models.sdm.weights import Circle

F64 = torch.float64


def bits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(F64)


def slow_activity(distance: float, n: int, d: int | None, activation: str, rate: float) -> float:
    if d is not None and distance > d:
        return 0.0
    return {
        "circle": 1.0,
        "linear": 1 - distance / n,
        "exponential": math.exp(-rate * distance),
        "cosine": max(1 - 2 * distance / n, 0.0),
    }[activation]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("d", [4, None])
@pytest.mark.parametrize("space", ["binary", "continuous"])
def test_activities_follow_the_formulas(activation, d, space):
    if d is None and activation == "circle":
        return
    addresses, points = bits(20, 9), bits(5, 9, seed=1)
    neurons = Neurons(addresses, d, activation=activation, rate=0.2)
    signs = 2 * points - 1
    states, unit = (signs, 9.0) if space == "binary" else (signs / 3, 1.0)
    slow = [[slow_activity(float((p != a).sum()), 9, d, activation, 0.2) for a in addresses] for p in points]
    assert_close(neurons.activities(states, unit, 0, 20), torch.tensor(slow, dtype=F64))


def test_random_addresses_are_fair_and_the_same_again():
    neurons = Neurons.random(2001, 33, 9)
    assert neurons.addresses.shape == (2001, 33)
    # 66,033 signs: the mean has a standard error of .0039.
    assert abs(neurons.addresses.double().mean()) < 0.02
    assert torch.equal(neurons.addresses, Neurons.random(2001, 33, 9).addresses)
    assert not torch.equal(neurons.addresses, Neurons.random(2001, 33, 9, seed=1).addresses)


def test_blocks_change_nothing(monkeypatch):
    neurons, points, keys = Neurons.random(50, 12, 4), 2 * bits(3, 12) - 1, 2 * bits(6, 12, seed=1) - 1
    whole = neurons.logits(points, keys, 12.0), neurons.store(keys, keys, 12.0)
    monkeypatch.setattr(module, "BLOCK", 40)
    assert len(neurons._blocks(6)) > 5
    assert_close(neurons.logits(points, keys, 12.0), whole[0])
    assert_close(neurons.store(keys, keys, 12.0).sums, whole[1].sums)
    assert_close(
        neurons.read(points, whole[1], 12.0)[0], neurons.activities(points, 12.0, 0, 50) @ whole[1].sums
    )


def test_many_neurons_share_what_the_intersection_says():
    # 200,000 neurons of 16 bits: counts of 7,000 to 21,000 have standard errors of 1.2 % or less.
    neurons = Neurons.random(200_000, 16, 5)
    query = torch.zeros(1, 16, dtype=F64)
    near = torch.tensor([[0.0] * 16, [1.0] + [0.0] * 15, [1.0] * 4 + [0.0] * 12], dtype=F64)
    shared = neurons.logits(2 * query - 1, 2 * near - 1, 16.0).exp()
    expected = Circle(5, 2e5).logits(2 * query - 1, 2 * near - 1, 16.0, torch.zeros(3, dtype=F64)).exp()
    assert_close(shared, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "options", [{"d": 5}, {"d": 6, "activation": "linear"}, {"activation": "exponential"}]
)
@pytest.mark.parametrize("space", ["binary", "continuous"])
@pytest.mark.parametrize("steps", [1, 2])
def test_written_memory_reads_as_the_stored_patterns(options, space, steps):
    neurons = Neurons.random(300, 16, **options)
    query, patterns, pointers = bits(4, 16), bits(7, 16, seed=1), bits(7, 3, seed=2)
    if space == "continuous":
        query, patterns = 2 * query - 1, 2 * patterns - 1
    for pointed in (None, pointers):
        memory = NeuronMemory(
            neurons, width=None if pointed is None else 3, space=space, steps=steps
        ).double()
        memory.write(patterns[:3], None if pointed is None else pointed[:3])
        for row in range(3, 7):
            memory.write(patterns[row], None if pointed is None else pointed[row])
        stored = SDM(neurons, space=space, steps=steps)
        assert_close(memory(query), stored(query, patterns, pointed))
        # Of a pattern each, the path that forgetting takes.
        by_weights = SDM(neurons, space=space, steps=steps, forgetting=TopK(7))
        assert_close(memory(query), by_weights(query, patterns, pointed))
        assert memory.stored == 7


@given(st.integers(0, 1000), st.integers(1, 5))
@settings(max_examples=25)
def test_removing_undoes_writing_to_the_last_bit(seed, count):
    memory = NeuronMemory(Neurons.random(200, 12, 4))
    memory.write(bits(6, 12, seed=seed))
    before = [buffer.clone() for buffer in memory.f.buffers(recurse=False)]
    extra = bits(count, 12, seed=seed + 1)
    memory.write(extra, times=3)
    assert not torch.equal(memory.f.total, before[2])
    memory.remove(extra, times=3)
    for buffer, old in zip(memory.f.buffers(recurse=False), before, strict=True):
        assert torch.equal(buffer, old)


def test_a_pattern_that_was_written_is_recalled_and_one_that_was_removed_is_not():
    memory = NeuronMemory(Neurons.random(20_000, 64, 24))
    patterns = bits(3, 64)
    memory.write(patterns)
    noisy = patterns.clone()
    noisy[:, :6] = 1 - noisy[:, :6]
    assert torch.equal(memory(noisy), patterns)
    memory.remove(patterns[0])
    assert torch.equal(memory(noisy[1:]), patterns[1:])
    assert not torch.equal(memory(noisy[0]), patterns[0])
    memory.clear()
    found = memory(noisy, return_solution=True)
    assert found.empty.all()
    assert memory.stored == 0


def test_weight_of_a_write_counts():
    memory, twice = (NeuronMemory(Neurons.random(100, 12, 5), steps=1) for _ in range(2))
    patterns = bits(2, 12)
    memory.write(patterns[0], times=2)
    twice.write(patterns[0])
    twice.write(patterns[0])
    assert torch.equal(memory.f.sums, twice.f.sums)


def test_mean_of_what_was_written_fills_an_empty_read():
    memory = NeuronMemory(Neurons.random(100, 12, 0), empty="mean", steps=1, width=2)
    memory.write(bits(3, 12), torch.tensor([[1.0, 0], [1, 1], [0, 0]]))
    assert memory(torch.ones(12)).tolist() == [1.0, 0.0]


def test_nan_query_harms_no_other_and_state_dict_carries_the_contents():
    memory = NeuronMemory(Neurons.random(500, 12, 4), on_failure="ignore")
    memory.write(bits(4, 12))
    query = bits(2, 12, seed=3)
    expected = memory(query)
    other = NeuronMemory(Neurons.random(500, 12, 4, seed=9), on_failure="ignore")
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other(query), expected)
    bad = torch.cat([query, torch.full((1, 12), math.nan, dtype=F64)])
    found = memory(bad, return_solution=True)
    assert torch.equal(found.value[:2], expected)
    assert found.result.tolist()[2] == 3
    assert found.index.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    "options",
    [
        {"d": 6},
        {"d": 6, "activation": "linear"},
        {"activation": "cosine"},
        {"activation": "exponential"},
        {"activation": "exponential", "rate": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("space", ["binary", "continuous"])
@pytest.mark.parametrize("width", [None, 3])
def test_a_memory_that_is_emptied_again_is_empty(options, space, width):
    patterns = bits(25, 16) if space == "binary" else 2 * bits(25, 16) - 1 + 0.1
    pointers = (None,) * 25 if width is None else bits(25, width, seed=1)
    memory = NeuronMemory(Neurons.random(300, 16, **options), space=space, width=width)
    times = (0.1, 0.2, 0.3, 1.0, 2.7)
    memory.write(patterns[:5], pointers[:5] if width else None, times=0.7)
    for row in range(5, 25):
        memory.write(patterns[row], pointers[row], times=times[row % 5])
    for row in (*range(15, 25), 3, 0, 4, 1, 2, *range(5, 15)):
        memory.remove(patterns[row], pointers[row], times=0.7 if row < 5 else times[row % 5])
    assert not any(bool(buffer.any()) for buffer in memory.f.buffers(recurse=False))
    assert memory(patterns, return_solution=True).empty.all()
    assert memory.stored == 0


@pytest.mark.parametrize("activation", ["linear", "exponential"])
@pytest.mark.parametrize("space", ["binary", "continuous"])
def test_one_pattern_of_ten_thousand_is_no_rounding_error(activation, space):
    patterns = torch.randn(10_000, 16, generator=torch.Generator().manual_seed(0))
    patterns = (patterns > 0).float() if space == "binary" else patterns
    neurons = Neurons.random(40, 16, activation=activation)
    memory, alone = NeuronMemory(neurons, space=space), NeuronMemory(neurons, space=space)
    for rows in patterns.split(10):
        memory.write(rows)
    memory.remove(patterns[1:])
    alone.write(patterns[0])
    # 1000 additions to loads of up to 10,000, which float32 rounds by up to 5e-4 each.
    assert_close(memory.f.load, alone.f.load, rtol=0, atol=0.05)
    assert memory.stored == 1
    memory.remove(patterns[0])
    assert not memory.f.load.any()


def test_a_removal_before_the_write_is_undone_by_it_where_loads_cancel():
    for options in ({"d": 5}, {"activation": "exponential"}):
        memory, alone = (NeuronMemory(Neurons.random(200, 12, **options)) for _ in range(2))
        one, other = bits(2, 12)
        memory.write(other)
        memory.remove(one)
        memory.write(one)
        alone.write(other)
        assert_close(memory.f.sums, alone.f.sums, rtol=0, atol=1e-6)  # a few roundings of numbers up to 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_context_holds_what_was_written_before_it_was_made(dtype):
    memory = NeuronMemory(Neurons.random(400, 16, 6), width=3)
    patterns, pointers = bits(4, 16), bits(4, 3, seed=1)
    memory.write(patterns, pointers)
    context = memory.f.prepare(patterns.to(dtype))
    before = memory.f.step(patterns.to(dtype), context)
    assert before[1].any()
    memory.remove(patterns, pointers)
    memory.write(1 - patterns, 1 - pointers)
    assert_close(memory.f.step(patterns.to(dtype), context), before, rtol=0, atol=0)
    memory.f.prepare(patterns)
    memory.clear()
    assert_close(memory.f.step(patterns.to(dtype), context), before, rtol=0, atol=0)
    assert not memory.f.sums.any()


def test_addresses_and_patterns_of_a_seed_are_draws_of_their_own():
    addresses = Neurons.random(64, 16, 3, seed=5).addresses
    drawn = np.unpackbits(np.frombuffer(stream(5).bytes(128), dtype=np.uint8), bitorder="little")
    same = (torch.from_numpy(drawn.reshape(64, 16)).bool() == (addresses > 0)).double().mean()
    # Of 1024 fair bits half agree, with a standard error of .016.
    assert abs(float(same) - 0.5) < 0.08


MEMORY = NeuronMemory(Neurons.random(10, 6, 2))
WIDE = NeuronMemory(Neurons.random(10, 6, 2), width=3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Neurons(torch.ones(3)), ValueError, r"addresses must be a tensor \(r, n\).*\(3,\)"),
        (lambda: Neurons(torch.ones(3, 2) * 2, 1), ValueError, r"addresses must hold 0 and 1 only"),
        (lambda: Neurons(torch.ones(3, 2), 3), ValueError, r"d must be .*at most 2, got 3"),
        (lambda: Neurons(torch.ones(3, 2)), ValueError, r"activation='circle' needs a radius d"),
        (lambda: Neurons(torch.ones(3, 2), 1, activation="lin"), ValueError, r"'lin'.*Did you mean 'linear'"),
        (lambda: Neurons(torch.ones(3, 2), 1, rate=-1), ValueError, r"rate must be finite and at least 0"),
        (lambda: Neurons.random(0, 6, 2), ValueError, r"neurons must be a whole number.*got 0"),
        (lambda: NeuronMemory(Circle(3)), TypeError, r"neurons must be Neurons.*use SDM"),
        (lambda: MEMORY.write(torch.ones(5)), ValueError, r"address must be \(\*batch, 6\), got \(5,\)"),
        (lambda: MEMORY.write(torch.ones(6) * 2), ValueError, r"address must hold 0 and 1 only, got 2"),
        (lambda: MEMORY.write(torch.full((6,), math.nan)), ValueError, r"address must be finite"),
        (lambda: MEMORY.write(torch.ones(6), torch.ones(3)), ValueError, r"takes no pointer.*width=w"),
        (lambda: WIDE.write(torch.ones(6)), ValueError, r"takes a pointer of width 3"),
        (
            lambda: WIDE.write(torch.ones(2, 6), torch.ones(3)),
            ValueError,
            r"one pointer an address, got 1 for 2",
        ),
        (lambda: MEMORY.write(torch.ones(6), times=0), ValueError, r"times must be above 0.*remove"),
        (lambda: MEMORY(torch.ones(5)), ValueError, r"query must be \(\*batch, 6\)"),
        (lambda: SDM(Neurons.random(4, 6, 2))(torch.ones(5), torch.ones(2, 5)), ValueError, r"width 6.*5"),
    ],
)
def test_bad_input_is_one_clear_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
