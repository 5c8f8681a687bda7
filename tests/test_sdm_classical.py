"""The classical network's energy, and read weights from products, against plain Python."""

import pytest
import torch
from torch.testing import assert_close

from hopdeq_lwpf.models.sdm import Attention, ClassicalHopfield, NeuronMemory, Neurons, ProjectedMemory
from hopdeq_lwpf.models.sdm.neurons import Neurons as NeuronWeights

N, STORED = 10, 3


def bits(*shape, seed=1):
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)).double()


def slow_energy(state, patterns):
    """-s.W s / 2 with W = (1/n) sum p p^T without its diagonal, term by term."""
    signs = [2 * v - 1 for v in state]
    total = 0.0
    for i in range(len(signs)):
        for j in range(len(signs)):
            if i != j:
                weight = sum((2 * p[i] - 1) * (2 * p[j] - 1) for p in patterns) / len(signs)
                total -= 0.5 * signs[i] * weight * signs[j]
    return total


def test_the_energy_is_that_of_the_definition():
    memory, query, patterns = ClassicalHopfield(), bits(4, N, seed=2), bits(STORED, N)
    x = memory.f.prepare(query, patterns)
    expected = [slow_energy(q, patterns.tolist()) for q in query.tolist()]
    assert_close(memory.f.energy(query, x), torch.tensor(expected, dtype=torch.float64))


def test_one_unit_at_a_time_never_raises_the_energy():
    # What Hopfield 1982 proves; all units at once may raise it, hence no `has_energy`.
    memory, state, patterns = ClassicalHopfield(), bits(6, N, seed=3), bits(STORED, N)
    x = memory.f.prepare(state, patterns)
    energy = memory.f.energy(state, x)
    assert not memory.f.has_energy
    for unit in list(range(N)) * 2:
        state = state.clone()
        state[:, unit] = memory.f(state, x)[:, unit]
        after = memory.f.energy(state, x)
        assert (after <= energy + 1e-12).all()
        energy = after


def test_patterns_are_one_set_for_all_queries():
    with pytest.raises(ValueError, match=r"patterns must be \(N, n\), one set for all queries"):
        ClassicalHopfield()(bits(2, 3, N), bits(2, STORED, N))


@pytest.mark.parametrize("beta", [4.0, torch.nn.Parameter(torch.tensor(4.0))], ids=["number", "learned"])
def test_attention_from_products_is_attention_from_vectors(beta):
    z, keys = 2 * bits(4, N) - 1, 2 * bits(STORED, N, seed=5) - 1
    weights = Attention(beta)
    expected = [
        [4.0 * sum(a * b for a, b in zip(q, k, strict=True)) / N for k in keys.tolist()] for q in z.tolist()
    ]
    for found in (weights.of_products(z @ keys.T, N, N, None), weights.logits(z, keys, N)):
        assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_what_cannot_be_written_or_asked_is_said():
    memory = NeuronMemory(Neurons(bits(20, N, seed=7), 4))
    assert isinstance(memory.f.weights, NeuronWeights)
    for call in (memory.write, memory.remove):
        with pytest.raises(ValueError, match="times must be above 0"):
            call(bits(1, N), times=0.0)
    with pytest.raises(ValueError, match=r"query must be \(\*batch, 10\)"):
        memory(bits(2, N + 1))
    projected = ProjectedMemory(N, 4, Attention(2.0))
    with pytest.raises(ValueError, match="must have the width 10 of the projection"):
        projected(torch.randn(2, N + 1), torch.randn(STORED, N + 1))
