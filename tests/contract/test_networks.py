"""The contract of the layers that are equilibria themselves, of hierarchical memories, and of what sees sequences."""

import torch
from torch import nn

from contract.base import TIGHT, Deviation, normal
from contract.layers import LayerContract
from contract.modules import ModuleContract
from hopdeq_lwpf.data.repertoires import PADDING
from hopdeq_lwpf.models import CHN, HAM, RepertoireClassifier, SequenceAttention, SequenceEmbedding
from hopdeq_lwpf.solvers import Equilibrium, Implicit

NO_PATTERNS = {
    "test_the_order_of_stored_patterns_does_not_matter": "there are no stored patterns",
    "test_padding_is_as_if_it_were_not_there": "there are no stored patterns to be padded",
}


class Cell(nn.Module):
    """f(z, x) = tanh(W z + b + x), a contraction."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        nn.init.orthogonal_(self.inner.weight, 0.6)

    def forward(self, z, x):
        return torch.tanh(self.inner(z) + x)


class TestEquilibrium(LayerContract):
    covers = (Equilibrium,)
    kind = Equilibrium
    dial = "solver"
    variants = {
        "solved": {"steps": None},
        "three steps": {"steps": 3},
        "unrolled": {"steps": None, "adjoint": "unrolled", "solver": "picard"},
        "Broyden, phantom": {"steps": None, "adjoint": "phantom", "solver": "broyden"},
    }
    narrowed = {"test_compiled_it_gives_the_same": ("solved", "three steps")}
    exempt = NO_PATTERNS
    deviates = {
        "test_gradients_of_input_and_parameters: Broyden, phantom": Deviation(
            "an approximation of the gradient was asked for", RuntimeError, "Jacobian mismatch"
        )
    }

    @property
    def exact(self):
        return {"stop": TIGHT, **({} if "adjoint" in self.options else {"adjoint": Implicit(rtol=1e-12)})}

    def make(self, **options):
        return Equilibrium(Cell(), **{**self.options, **options})

    def inputs(self, batch=3):
        return (normal(3, 5)[[i % 3 for i in range(batch)]],)


class NetworkContract(LayerContract):
    """Of layers of neurons that settle together."""

    settings = {"layers": [5, 4, 3, 2]}
    dial = "forgetting"
    exempt = NO_PATTERNS
    variants = {
        "one matrix": {"steps": None},
        "even and odd layers": {"steps": None, "even_odd": True},
        "four steps, PFU": {"steps": 4, "forgetting": "pfu"},
        "tanh, skips": {"steps": None, "lagrangian": "tanh", "skips": [(0, 2)], "damping": 0.5},
    }

    def inputs(self, batch=3):
        return (normal(3, 5)[[i % 3 for i in range(batch)]],)


class TestHAM(NetworkContract):
    covers = (HAM,)
    kind = HAM


class TestCHN(NetworkContract):
    covers = (CHN,)
    kind = CHN


def codes(batch=3):
    """(B, 5, 6) codes of amino acids, then padding."""
    found = torch.randint(20, (3, 5, 6), generator=torch.Generator().manual_seed(1))
    found[0, :, 4:] = PADDING
    found[1, 2, 1:] = PADDING
    return found[[i % 3 for i in range(batch)]]


WHOLE = {
    "test_nan_in_one_sample_harms_no_other": "codes are whole numbers, and what is no code is refused",
}


class TestSequenceEmbedding(LayerContract):
    covers = (SequenceEmbedding,)
    kind = SequenceEmbedding
    settings = {"kernels": 3, "kernel_size": 3}
    dial = "kernel_size"
    exempt = {
        **WHOLE,
        **NO_PATTERNS,
        "test_it_keeps_the_solution_of_its_last_call_without_a_graph": "nothing is solved",
    }

    def inputs(self, batch=3):
        return (codes(batch),)


class TestSequenceAttention(LayerContract):
    covers = (SequenceAttention,)
    kind = SequenceAttention
    settings = {"width": 4, "hidden": 3}
    dial = "hidden"
    variants = {"two layers": {}, "none": {"layers": 0}}
    exempt = {
        **NO_PATTERNS,
        "test_it_keeps_the_solution_of_its_last_call_without_a_graph": "nothing is solved",
    }

    def inputs(self, batch=3):
        return (normal(3, 5, 4)[[i % 3 for i in range(batch)]],)


class TestRepertoireClassifier(LayerContract):
    covers = (RepertoireClassifier,)
    kind = RepertoireClassifier
    settings = {"kernels": 4, "kernel_size": 3, "attention_width": 4, "outputs": 2}
    dial = "forgetting"
    helps = True
    variants = {
        "attention": {},
        "equilibrium": {"steps": None, "normalize_hopfield_space": True},
        "heads, reduced": {"steps": 2, "num_heads": 2, "hidden_size": 3, "reduction": 0.8, "projected": True},
    }
    exempt = WHOLE

    def inputs(self, batch=3):
        return (codes(batch),)

    def permuted(self, inputs, order):
        return (inputs[0][:, order],)

    def padded(self, inputs):
        (data,) = inputs
        longer = torch.cat([data, torch.full((len(data), 2, 6), 7)], 1)
        mask = torch.zeros(len(data), 7, dtype=torch.bool)
        mask[:, 5:] = True
        return (longer,), {"mask": mask}


class TestModulesInSequential(ModuleContract):
    variants = {"in a Sequential": {}}
    kind = Equilibrium
    dial = "solver"

    def make(self, **options):
        if options:
            return Equilibrium(Cell(), **options)
        return nn.Sequential(nn.Linear(4, 5), Equilibrium(Cell()), nn.Linear(5, 2))

    def inputs(self, batch=3):
        return (normal(batch, 4),)
