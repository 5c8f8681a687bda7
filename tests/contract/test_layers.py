"""The contract of the layers of `hopdeq_lwpf.models` that associate patterns."""

import torch
from torch import nn

from contract.base import Deviation, normal
from contract.layers import LayerContract
from hopdeq_lwpf.models import (
    DiffusionHopfield,
    DiffusionLayer,
    DiffusionPooling,
    Hopfield,
    HopfieldDecoderLayer,
    HopfieldEncoderLayer,
    HopfieldLayer,
    HopfieldPooling,
)

WIDTH, STORED, STATES = 6, 5, 4
# Where f contracts: by default weights are so small that all scores are about 0, and here they are not.
DIALS = {
    "attention": {},
    "three steps with PFU": {"steps": 3, "forgetting": "pfu"},
    "equilibrium": {"steps": None, "inject": "input"},
    "equilibrium with ReLU": {"steps": None, "inject": "input", "forgetting": "relu"},
}


def sharpened(layer: nn.Module) -> nn.Module:
    """The layer with weights that make scores of size 1, where the published ones make them of 1e-3."""
    for part in layer.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
        for name in ("pooling_weights", "lookup_weights", "target_weights"):
            if getattr(part, name, None) is not None:
                nn.init.normal_(getattr(part, name))
    return layer


class AssociationContract(LayerContract):
    """Of the layers that take a `Hopfield`'s options."""

    settings = {"input_size": WIDTH, "num_heads": 2}
    variants = DIALS
    dial = "forgetting"
    helps = True
    stored = STORED

    def make(self, **options):
        return sharpened(super().make(**options))


class TestHopfield(AssociationContract):
    covers = (Hopfield,)
    kind = Hopfield
    narrowed = {"test_compiled_it_gives_the_same": ("attention", "equilibrium")}

    def inputs(self, batch=3):
        stored, state = normal(3, STORED, WIDTH), normal(3, STATES, WIDTH, seed=2)
        return self.rows(((stored, state, normal(3, STORED, WIDTH, seed=3)),), [i % 3 for i in range(batch)])

    def permuted(self, inputs, order):
        ((stored, state, projection),) = inputs
        return ((stored[:, order], state, projection[:, order]),)

    def padded(self, inputs):
        ((stored, state, projection),) = inputs
        rubbish = 9 * normal(len(stored), 2, WIDTH, seed=4)
        mask = torch.zeros(len(stored), STORED + 2, dtype=torch.bool)
        mask[:, STORED:] = True
        longer = (torch.cat([stored, rubbish], 1), state, torch.cat([projection, rubbish], 1))
        return (longer,), {"stored_pattern_padding_mask": mask}


class TestDiffusionHopfield(TestHopfield):
    covers = (DiffusionHopfield,)
    kind = DiffusionHopfield
    settings = {**TestHopfield.settings, "neighbors": 2}
    variants = {
        **{name: {**DIALS[name], "lam": 0.3} for name in ("attention", "equilibrium")},
        "learned strengths, three steps": {
            "steps": 3, "learn_lam": True, "learn_eta": True, "logit_eta": 0.1, "learn_logit_eta": True,
        },
    }  # fmt: skip


class PooledContract(AssociationContract):
    """Of layers that pool a bag."""

    settings = {"input_size": WIDTH, "num_heads": 2, "quantity": 2}

    def inputs(self, batch=3):
        return self.rows((normal(3, STORED, WIDTH),), [i % 3 for i in range(batch)])

    def permuted(self, inputs, order):
        return (inputs[0][:, order],)

    def padded(self, inputs):
        (bag,) = inputs
        mask = torch.zeros(len(bag), STORED + 2, dtype=torch.bool)
        mask[:, STORED:] = True
        longer = torch.cat([bag, 9 * normal(len(bag), 2, WIDTH, seed=4)], 1)
        return (longer,), {"stored_pattern_padding_mask": mask}


class TestHopfieldPooling(PooledContract):
    covers = (HopfieldPooling,)
    kind = HopfieldPooling


class TestDiffusionPooling(PooledContract):
    covers = (DiffusionPooling,)
    kind = DiffusionPooling
    settings = {**PooledContract.settings, "neighbors": 2}
    variants = {name: DIALS[name] for name in ("attention", "equilibrium")}


class LookupContract(AssociationContract):
    """Of layers whose stored patterns are learned."""

    settings = {"input_size": WIDTH, "num_heads": 2, "quantity": STORED}
    exempt = {
        "test_the_order_of_stored_patterns_does_not_matter": "stored patterns are parameters of the layer",
        "test_padding_is_as_if_it_were_not_there": "stored patterns are parameters of the layer",
    }

    def inputs(self, batch=3):
        # No score so near to 0 that rounding would forget or recall a pattern.
        return self.rows((normal(3, STATES, WIDTH, seed=8),), [i % 3 for i in range(batch)])


class TestHopfieldLayer(LookupContract):
    covers = (HopfieldLayer,)
    kind = HopfieldLayer


class TestDiffusionLayer(LookupContract):
    covers = (DiffusionLayer,)
    kind = DiffusionLayer
    settings = {**LookupContract.settings, "neighbors": 2}
    variants = {name: DIALS[name] for name in ("attention", "equilibrium")}


class BlockContract(AssociationContract):
    """Of transformer blocks, whose options are those of the associations that they are made from."""

    settings = {"dim_feedforward": 8, "dropout": 0.0}
    dial = "dropout"
    helps = False
    variants = {name: DIALS[name] for name in ("attention", "equilibrium")}

    def association(self, **options):
        exact = {name: options.pop(name) for name in self.exact if name in options}
        return options, sharpened(Hopfield(WIDTH, num_heads=2, **{**self.options, **exact}))


class TestHopfieldEncoderLayer(BlockContract):
    covers = (HopfieldEncoderLayer,)
    kind = HopfieldEncoderLayer

    def make(self, **options):
        options, association = self.association(**options)
        return HopfieldEncoderLayer(association, **{**self.settings, **options})

    def inputs(self, batch=3):
        return self.rows((normal(3, STORED, WIDTH),), [i % 3 for i in range(batch)])

    def permuted(self, inputs, order):
        return (inputs[0][:, order],)

    def call(self, module, inputs, **options):
        out = super().call(module, inputs, **options)
        # States are what is stored: both change their places, and padding has no output of its own.
        return out if "src_key_padding_mask" not in options else out[:, :STORED]

    def padded(self, inputs):
        mask = torch.zeros(len(inputs[0]), STORED + 2, dtype=torch.bool)
        mask[:, STORED:] = True
        longer = torch.cat([inputs[0], 9 * normal(len(mask), 2, WIDTH, seed=4)], 1)
        return (longer,), {"src_key_padding_mask": mask}

    def solution(self, layer):
        return layer.hopfield_association.last_solution

    deviates = {
        "test_the_order_of_stored_patterns_does_not_matter": Deviation(
            "the states are the stored patterns: the output changes its order with them"
        )
    }


class TestHopfieldDecoderLayer(BlockContract):
    covers = (HopfieldDecoderLayer,)
    kind = HopfieldDecoderLayer

    def make(self, **options):
        options, cross = self.association(**options)
        return HopfieldDecoderLayer(self.association()[1], cross, **{**self.settings, **options})

    def exactly(self, **options):
        layer = super().exactly(**options)
        if self.solves():
            layer.hopfield_association_self.equilibrium.stop = self.exact["stop"]
            layer.hopfield_association_self.equilibrium.adjoint = self.exact["adjoint"]
        return layer

    def inputs(self, batch=3):
        parts = (normal(3, STATES, WIDTH), normal(3, STORED, WIDTH, seed=2))
        return self.rows(parts, [i % 3 for i in range(batch)])

    def permuted(self, inputs, order):
        return inputs[0], inputs[1][:, order]

    def padded(self, inputs):
        mask = torch.zeros(len(inputs[0]), STORED + 2, dtype=torch.bool)
        mask[:, STORED:] = True
        longer = torch.cat([inputs[1], 9 * normal(len(mask), 2, WIDTH, seed=4)], 1)
        return (inputs[0], longer), {"memory_key_padding_mask": mask}

    def solution(self, layer):
        return layer.hopfield_association_cross.last_solution
