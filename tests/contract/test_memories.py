"""The contract of the Sparse Distributed Memories."""

import copy

import pytest
import torch

from contract.base import near, normal
from contract.layers import LayerContract
from hopdeq_lwpf.models import SDM
from hopdeq_lwpf.models.sdm import (
    Attention,
    Cap,
    Circle,
    ClassicalHopfield,
    NeuronMemory,
    Neurons,
    ProjectedMemory,
    TransformerAttention,
)

N, STORED = 16, 5
PIECEWISE = "f is piecewise constant: no gradient passes, and one that is asked for is refused"


def bits(*shape, seed=1):
    """0 and 1, always the same ones."""
    return (normal(*shape, seed=seed) > 0).float()


def noisy(batch):
    """Stored bits of which two are turned."""
    stored = bits(STORED, N)[[i % STORED for i in range(batch)]].clone()
    for row in range(batch):
        stored[row, [row % 3, 7]] = 1 - stored[row, [row % 3, 7]]
    return stored


class MemoryContract(LayerContract):
    """Of memories that are called with queries and with the patterns that they are to know."""

    shared = (1,)
    starts = (0,)
    stored = STORED

    def solves(self):
        return self.options.get("steps") is None

    def inputs(self, batch=3):
        return noisy(batch), bits(STORED, N)

    def permuted(self, inputs, order):
        return inputs[0], inputs[1][order]

    def padded(self, inputs):
        query, patterns = inputs
        mask = torch.arange(STORED + 2) >= STORED
        longer = torch.cat([patterns, torch.full((2, N), torch.nan)])
        return (query, longer), {"mask": mask}


class TestSDM(MemoryContract):
    covers = (SDM, Attention, Cap, Circle, TransformerAttention, Neurons)
    kind = SDM
    dial = "empty"
    variants = {
        "circle": {"weights": Circle(6)},
        "attention, two reads": {"weights": Attention(5.0), "steps": 2},
        "continuous attention": {"weights": Attention(2.0), "space": "continuous"},
        "continuous cap with PFU": {"weights": Cap(6), "space": "continuous", "forgetting": "pfu"},
        "transformer attention": {"weights": TransformerAttention(), "space": "continuous", "steps": 3},
        "neurons": {"weights": Neurons(bits(40, N, seed=5), 7)},
    }
    narrowed = {"test_compiled_it_gives_the_same": ("continuous attention",)}
    exempt = {
        f"test_gradients_of_input_and_parameters: {name}": PIECEWISE
        for name in ("circle", "attention, two reads", "neurons")
    }

    def make(self, **options):
        chosen = copy.deepcopy(self.options)
        return SDM(**{**chosen, **options})

    def inputs(self, batch=3):
        if self.options.get("space") != "continuous":
            return super().inputs(batch)
        patterns = normal(STORED, N)
        return patterns[[i % STORED for i in range(batch)]] + 0.4 * normal(1, N, seed=3), patterns


class TestClassicalHopfield(MemoryContract):
    covers = (ClassicalHopfield,)
    kind = ClassicalHopfield
    dial = "solver"
    variants = {"settled": {}, "one update": {"steps": 1}}
    exempt = {
        "test_gradients_of_input_and_parameters": PIECEWISE,
        "test_padding_is_as_if_it_were_not_there": "every pattern takes part: there is no mask",
    }
    stored = 2

    def inputs(self, batch=3):
        # As few as this network can tell apart: with more it may end in a cycle.
        patterns = bits(2, 4 * N)
        query = patterns[[i % 2 for i in range(batch)]].clone()
        query[:, :3] = 1 - query[:, :3]
        return query, patterns


class TestProjectedMemory(MemoryContract):
    covers = (ProjectedMemory,)
    kind = ProjectedMemory
    settings = {"width": N, "keys": 4, "weights": Attention(2.0)}
    dial = "empty"
    variants = {"settled": {}, "two reads, ReLU": {"steps": 2, "forgetting": "relu"}}

    def inputs(self, batch=3):
        patterns = normal(STORED, N)
        return patterns[[i % STORED for i in range(batch)]] + 0.3 * normal(1, N, seed=3), patterns


class TestNeuronMemory(MemoryContract):
    covers = (NeuronMemory,)
    kind = NeuronMemory
    shared = ()
    dial = "empty"
    variants = {"settled": {}, "continuous, two reads": {"space": "continuous", "steps": 2}}
    exempt = {
        "test_gradients_of_input_and_parameters": "what is written carries no gradient",
        "test_padding_is_as_if_it_were_not_there": "patterns are written beforehand, one by one",
    }
    order = torch.arange(STORED)

    def make(self, **options):
        settings = {**self.options, **options}
        memory = NeuronMemory(Neurons(bits(40, N, seed=5), 7), **settings)
        memory.write(bits(STORED, N)[self.order])
        return memory

    def inputs(self, batch=3):
        return (noisy(batch),)

    def test_the_order_of_stored_patterns_does_not_matter(self):
        expected = self.made()(self.inputs()[0])
        self.order = torch.arange(STORED).roll(2)
        near(self.made()(self.inputs()[0]), expected, 1e-6)


@pytest.mark.parametrize(
    "make", [lambda: SDM(Circle(6)), ClassicalHopfield], ids=["SDM", "ClassicalHopfield"]
)
def test_a_gradient_that_cannot_be_is_refused(make):
    query = noisy(2).requires_grad_()
    with pytest.raises(ValueError, match="require"):
        make()(query, bits(STORED, N))
