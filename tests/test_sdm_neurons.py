"""Explicit neurons: activities, online writes and removal, and agreement with the memory of stored patterns."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

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
