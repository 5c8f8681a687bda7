"""The contract of the public fixed-point functions."""

import torch
from torch import nn

from contract.base import F64, Deviation, near, normal
from contract.functions import FunctionContract
from hopdeq_lwpf.graphs import KNN
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.models.association import Heads
from hopdeq_lwpf.models.diffusion import DiffusionRetrieval, Strength
from hopdeq_lwpf.models.hierarchical import CHNFunction, HAMFunction
from hopdeq_lwpf.models.layer_graph import LayerGraph, make_neurons
from hopdeq_lwpf.models.sdm import Attention, Cap, ProjectedFunction, SDMFunction
from hopdeq_lwpf.separation import Entmax

WIDTH, STORED = 4, 5
JUMPS = Deviation("activations jump where a neuron is forgotten", match="has_energy")
PIECEWISE = "states of 0 and 1 make f piecewise constant, which no gradient passes"


class TestRetrieval(FunctionContract):
    covers = (Retrieval,)
    kind = Retrieval
    dial = "forgetting"
    variants = {
        "softmax": {"beta": 1.5},
        "learned beta, injected": {"inject": "input"},
        "PFU": {"beta": 1.2, "forgetting": "pfu"},
        "ReLU, sparsemax": {"beta": 1.2, "forgetting": "relu", "separation": "sparsemax"},
        "learned alpha": {"beta": 1.2},
        "mean shift": {"beta": 0.6, "similarity": "euclidean"},
        "on a sphere": {"beta": 1.5, "normalize": "sphere"},
        "forgetting at the read-out alone": {"beta": 1.5, "forgetting": "relu", "mask_in_loop": False},
    }
    no_energy = Deviation("f differs from the update that lowers the energy", match="has_energy")
    deviates = {
        "test_the_energy_has_the_update_as_its_gradient: forgetting at the read-out alone": no_energy,
        "test_plain_iteration_never_raises_the_energy: forgetting at the read-out alone": no_energy,
        "test_the_jacobian_is_self_adjoint_in_the_metric: forgetting at the read-out alone": Deviation(
            "the energy that would give the metric does not belong to f", match="no metric is declared"
        ),
        "test_the_jacobian_is_self_adjoint_in_the_metric: on a sphere": Deviation(
            "the Jacobian is a product of two symmetric matrices", match="no metric is declared"
        ),
    }
    exempt = {
        "test_the_energy_has_the_update_as_its_gradient: on a sphere": (
            "the conjugate of the normalisation is infinite off the sphere and has no gradient on it"
        ),
    }
    narrowed = {"test_compiled_it_gives_the_same": ("PFU", "mean shift", "on a sphere")}

    def make(self, **options):
        chosen = {**self.options, **options}
        if self.variant == "learned beta, injected":
            chosen["beta"] = nn.Parameter(torch.tensor(1.2))
        if self.variant == "learned alpha":
            chosen["separation"] = Entmax(nn.Parameter(torch.tensor(1.4)))
        return Retrieval(**chosen)

    def arguments(self, batch=3):
        return normal(3, WIDTH, seed=2)[[i % 3 for i in range(batch)]], normal(STORED, WIDTH)

    def state(self, f, x):
        z = super().state(f, x)
        return z if f.normalization is None else f.normalization.apply(z)

    def permuted(self, arguments, order):
        return arguments[0], arguments[1][order]

    def factor(self, f, z, x):
        if self.variant != "mean shift":
            return 1.0
        value, kept = f.forgetting.project(f._scores(z, x), x.threshold, x.mask)
        return f.separation.weights(value).sum(-1, keepdim=True)


class TestSDMFunction(FunctionContract):
    covers = (SDMFunction,)
    kind = SDMFunction
    dial = "empty"
    variants = {
        "continuous": {"space": "continuous"},
        "continuous cap": {"space": "continuous"},
        "binary": {"space": "binary"},
    }
    no_energy = Deviation("only attention has a known energy", raises=AssertionError, match="has_energy")
    deviates = {
        "test_the_energy_has_the_update_as_its_gradient: continuous": Deviation(
            "a state lies on the sphere, so that a step follows the gradient along the sphere alone"
        ),
        "test_the_energy_has_the_update_as_its_gradient: continuous cap": no_energy,
        "test_plain_iteration_never_raises_the_energy: continuous cap": no_energy,
    }
    exempt = {
        "test_gradients_of_the_state_the_arguments_and_the_parameters: binary": PIECEWISE,
        "test_the_energy_has_the_update_as_its_gradient: binary": PIECEWISE,
        "test_the_jacobian_is_self_adjoint_in_the_metric": "no metric: states on a sphere or of 0 and 1",
        "test_step_and_evaluate_give_what_f_gives: continuous cap": "there is no energy to be given",
    }
    narrowed = {"test_compiled_it_gives_the_same": ("continuous",)}
    solver = "picard"
    n = 16

    def make(self, **options):
        weights = Cap(6) if self.variant == "continuous cap" else Attention(6.0)
        return SDMFunction(weights, **{**self.options, **options})

    def arguments(self, batch=3):
        patterns = (normal(STORED, self.n) > 0).float()
        query = (patterns[[i % 3 for i in range(batch)]] - (normal(1, self.n, seed=3) > 1).float()).abs()
        if self.variant == "binary":
            return query, patterns
        return query - 0.4, patterns - 0.4 + 0.1 * normal(STORED, self.n, seed=4)

    def state(self, f, x):
        z = f.init(x)
        if self.variant == "binary":
            return z
        z = super().state(f, x)
        return z / z.norm(dim=-1, keepdim=True)

    def permuted(self, arguments, order):
        return arguments[0], arguments[1][order]


class TestProjectedFunction(FunctionContract):
    covers = (ProjectedFunction,)
    kind = ProjectedFunction
    dial = "empty"
    solver = "picard"
    unknown = Deviation(
        "keys and values differ, and no energy is known", raises=(AssertionError, ValueError), match="energy"
    )
    deviates = {
        "test_the_energy_has_the_update_as_its_gradient": unknown,
        "test_plain_iteration_never_raises_the_energy": unknown,
    }
    exempt = {
        "test_the_jacobian_is_self_adjoint_in_the_metric": "keys and values differ, so that there is no metric",
        "test_step_and_evaluate_give_what_f_gives": "there is no energy to be given",
    }

    def make(self, **options):
        projection = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(8))
        return ProjectedFunction(projection, Attention(3.0), **options)

    def arguments(self, batch=3):
        return normal(3, WIDTH, seed=2)[[i % 3 for i in range(batch)]], normal(STORED, WIDTH)

    def permuted(self, arguments, order):
        return arguments[0], arguments[1][order]


class LayersContract(FunctionContract):
    """Of functions of layers of neurons, x (B, 5)."""

    exempt = {"test_the_order_of_stored_patterns_does_not_matter": "there are no stored patterns"}
    narrowed = {"test_compiled_it_gives_the_same": ("even and odd layers", "forgetting")}
    solver = "picard"

    def make(self, **options):
        graph = LayerGraph.of([5, 4, 3, 2])
        unit = "relu" if self.variant == "forgetting" else None
        neurons = make_neurons(graph, "sigmoid", unit, "sigmoid")
        return self.kind(graph, neurons, **{**self.options, **options})

    def arguments(self, batch=3):
        return (normal(3, 5)[[i % 3 for i in range(batch)]],)


class TestHAMFunction(LayersContract):
    covers = (HAMFunction,)
    kind = HAMFunction
    dial = "even_odd"
    variants = {"even and odd layers": {"even_odd": True}, "one matrix": {"damping": 0.5}, "forgetting": {}}
    deviates = {
        "test_the_jacobian_is_self_adjoint_in_the_metric: forgetting": Deviation(
            "a neuron that is forgotten has no slope, and the metric must be positive definite",
            match="no metric",
        ),
    }
    exempt = {
        **LayersContract.exempt,
        "test_the_energy_has_the_update_as_its_gradient": "checked below, with the slopes that are the metric",
        "test_plain_iteration_never_raises_the_energy: forgetting": (
            "undamped steps of all layers at once may end in a cycle of two states"
        ),
    }

    def test_the_energy_has_the_update_as_its_gradient_times_the_slopes(self):
        f, z, x = self.problem()
        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(f.energy(z, x).sum(), z)
        states = f._split(z.detach())
        step = f._split((z - f(z, x)).detach())
        moved = [f._neurons(i).slope(states[i], x.thresholds[i - 1])(step[i]) for i in f.order]
        near(slope, torch.cat(moved, -1) / (1 - f.damping), 1e-9)


class TestCHNFunction(LayersContract):
    covers = (CHNFunction,)
    kind = CHNFunction
    dial = "even_odd"
    variants = {
        "even and odd layers": {"even_odd": True, "damping": 0.7},
        "one matrix": {"damping": 0.7},
        "forgetting": {"damping": 0.7},
    }
    deviates = {
        "test_the_energy_has_the_update_as_its_gradient: even and odd layers": Deviation(
            "layers take turns, and a turn is of several steps"
        ),
        "test_the_energy_has_the_update_as_its_gradient: forgetting": JUMPS,
        "test_plain_iteration_never_raises_the_energy: forgetting": JUMPS,
        "test_the_jacobian_is_self_adjoint_in_the_metric: even and odd layers": Deviation(
            "layers take turns", match="no metric"
        ),
    }

    def factor(self, f, z, x):
        return 1 / (1 - f.damping)


class TestDiffusionRetrieval(FunctionContract):
    covers = (DiffusionRetrieval, Strength)
    kind = DiffusionRetrieval
    dial = "lam"
    variants = {
        "states": {"lam": 0.5},
        "states and scores": {"lam": 0.5, "logit_eta": 0.4, "forgetting": "pfu"},
        "injected, learned": {"inject": "input"},
    }
    narrowed = {"test_compiled_it_gives_the_same": ("states",)}
    deviates = {
        "test_the_signature_shows_each_option": Deviation(
            "further dials are those of Retrieval, which refuses others"
        )
    }
    solver = "picard"

    def make(self, **options):
        chosen = {**self.options, **options}
        if self.variant == "injected, learned":
            chosen.setdefault("lam", Strength("lam", 0.5, learn=True))
        return DiffusionRetrieval(1.2, **chosen)

    def arguments(self, batch=3):
        rows = [i % 3 for i in range(batch)]
        return normal(3, 1, 4, WIDTH)[rows], normal(3, 1, STORED, WIDTH, seed=2)[rows]

    def prepare(self, f, arguments):
        q, k = arguments
        return f.prepare(Heads(q, k, k, graph=KNN(neighbors=2)(q).laplacian()))

    def permuted(self, arguments, order):
        return arguments[0], arguments[1][:, :, order]

    def emptied(self, arguments):
        return tuple(part[:0] for part in arguments)


def test_the_state_of_a_case_is_no_equilibrium():
    case = TestRetrieval()
    case.variant, case.options = "softmax", TestRetrieval.variants["softmax"]
    f, z, x = case.problem()
    assert z.dtype == F64
    assert ((f(z, x) - z).norm(dim=-1) > 0.1).all()
