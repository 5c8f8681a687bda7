"""torch.compile of f: solvers call it with whatever number of problems is left."""

import pytest
import torch
from problems import F64, TIGHT, normal, relative_error
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from hopdeq_lwpf import Equilibrium, Termination, fixed_point
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.solvers import Implicit

# Deprecations inside torch's compiler, and its note that a backend is not the fast one.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]


@pytest.fixture
def kept_buffers():
    """The adjoint walks the graph of f many times; torch gives its buffers away after once unless told not to."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


def recall(f, query, patterns):
    """Value, gradient and codes; queries far and near, so that finished ones are dropped on the way."""
    patterns = patterns.clone().requires_grad_()
    x = f.prepare(query, patterns)
    solution = fixed_point(f, x, f.init(x), stop=TIGHT, adjoint=Implicit(rtol=1e-12))
    (g,) = torch.autograd.grad(solution.value.pow(2).sum(), patterns)
    return solution, g


@pytest.mark.usefixtures("kept_buffers")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("forgetting", [None, PFU()], ids=["none", "pfu"])
def test_a_compiled_retrieval_with_any_number_of_queries(backend, forgetting):
    patterns = normal(40, 8)
    plain = Retrieval(4.0, forgetting=forgetting)
    quick = torch.compile(Retrieval(4.0, forgetting=forgetting), backend=backend, dynamic=True)
    for batch in (32, 17, 1):
        query = patterns[:batch] + 0.3 * normal(batch, 8, seed=2)
        expected, gradient = recall(plain, query, patterns)
        solution, actual = recall(quick, query, patterns)
        assert_close(solution.value, expected.value, rtol=1e-9, atol=1e-10)
        assert_close(actual, gradient, rtol=1e-7, atol=1e-9)
        assert solution.converged.all()
    assert expected.steps.numel() == 1


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6).double()
        nn.init.orthogonal_(self.inner.weight, 0.7)

    def forward(self, z, x):
        return torch.tanh(self.inner(z) + x)


@pytest.mark.usefixtures("kept_buffers")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_module_trains_as_the_plain_one(backend):
    def gradients(wrap):
        cell = Cell()
        layer = Equilibrium(wrap(cell), stop=TIGHT, adjoint=Implicit(rtol=1e-12))
        for batch in (5, 3):
            layer(normal(batch, 6)).pow(2).sum().backward()
        return tuple(p.grad for p in cell.parameters())

    compiled = gradients(lambda f: torch.compile(f, backend=backend, dynamic=True))
    assert relative_error(compiled, gradients(lambda f: f)) < 1e-9


class Model(nn.Module):
    # Not a Sequential, whose loop torch.compile leaves alone altogether once it has to break in it.
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(6, 6).double(), layer, nn.Linear(6, 2).double()

    def forward(self, x):
        return self.after(self.layer(self.before(x)))


@pytest.mark.usefixtures("kept_buffers")
@pytest.mark.parametrize("inner", [False, True], ids=["f as it is", "f compiled too"])
def test_a_compiled_model_breaks_its_graph_once_a_layer(inner):
    torch.manual_seed(0)
    cell = torch.compile(Cell(), backend="aot_eager", dynamic=True) if inner else Cell()
    layer = Equilibrium(cell, stop=TIGHT)
    model = Model(layer)
    x = normal(4, 6)
    seen = torch._dynamo.explain(model)(x)
    assert (seen.graph_break_count, seen.graph_count) == (1, 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(compiled(x), model(x))
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert_close(torch.autograd.grad(compiled(x).sum(), list(model.parameters())), expected)


@pytest.mark.parametrize("unit", [None, "relu", "pfu", "topk"])
@pytest.mark.parametrize("separation", ["softmax", "sparsemax"])
def test_f_is_one_graph(unit, separation):
    torch._dynamo.reset()
    f = Retrieval(2.0, forgetting=unit, separation=separation)
    query = normal(4, 8)
    x = f.prepare(query, normal(10, 8, seed=2))
    assert torch._dynamo.explain(f)(query, x).graph_break_count == 0


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 breaks this graph once")
@pytest.mark.usefixtures("kept_buffers")
def test_counted_steps_are_one_graph():
    layer = Equilibrium(Cell(), steps=3)
    x = normal(4, 6)
    assert torch._dynamo.explain(layer)(x).graph_break_count == 0
    compiled = torch.compile(layer, backend="aot_eager")
    assert_close(compiled(x), layer(x))


def test_without_kept_buffers_torch_says_what_to_set():
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="donated_buffer=False"):
        recall(torch.compile(Retrieval(4.0), backend="aot_eager", dynamic=True), normal(4, 8), normal(9, 8))
    torch._dynamo.reset()


@pytest.mark.parametrize("adjoint", ["implicit", "onestep", "neumann", "phantom", "unrolled"])
def test_checkpointing_inside_f(adjoint):
    def gradients(inside):
        cell = Cell()
        f = (lambda z, x: checkpoint(cell, z, x, use_reentrant=False)) if inside else cell
        x = normal(4, 6).requires_grad_()
        stop = Termination(rtol=1e-10)
        z = fixed_point(f, x, torch.zeros(4, 6, dtype=F64), adjoint=adjoint, stop=stop, solver="picard").value
        z.pow(2).sum().backward()
        return (x.grad, *(p.grad for p in cell.parameters()))

    assert relative_error(gradients(True), gradients(False)) < 1e-12


def test_reentrant_checkpointing_inside_f_is_an_error_and_not_a_wrong_gradient():
    # It can only run a whole backward pass, and the adjoint asks for products with the Jacobian alone.
    f = lambda z, x: checkpoint(Cell(), z, x, use_reentrant=True)  # noqa: E731
    x = normal(4, 6).requires_grad_()
    value = fixed_point(f, x, torch.zeros(4, 6, dtype=F64)).value
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        value.sum().backward()
