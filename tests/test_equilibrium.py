"""Equilibrium as a layer: in models, copies, files, training; what it says when something is amiss."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from problems import F64, TIGHT, normal
from references import exactly
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from hopdeq_lwpf import ConvergenceError, Equilibrium, Result, Solution, Termination, fixed_point
from hopdeq_lwpf._types import ConvergenceWarning
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.solvers import LBFGS, Anderson, Implicit


class Cell(nn.Module):
    """tanh(W z + U x), contracting."""

    def __init__(self, width: int = 4, scale: float = 0.8) -> None:
        super().__init__()
        self.w = nn.Linear(width, width)
        self.u = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.w.weight, scale)

    def forward(self, z, x):
        return torch.tanh(self.w(z) + self.u(x))


class Prepared(Cell):
    """The part that does not depend on z is computed once; starts at ones."""

    calls = 0

    def prepare(self, x):
        self.calls += 1
        return self.u(x)

    def init(self, context):
        return torch.ones_like(context)

    def forward(self, z, context):
        return torch.tanh(self.w(z) + context)


class Starting(Cell):
    """Learns where to start."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.ones(4))

    def init(self, x):
        return self.start.expand_as(x)


def test_layer_in_a_sequential():
    model = nn.Sequential(nn.Linear(3, 4), Equilibrium(Cell()), nn.Linear(4, 2))
    model(torch.randn(5, 3)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_value_and_gradient_are_those_of_fixed_point():
    cell, x = Cell().double(), normal(3, 4)
    layer = Equilibrium(cell, stop=TIGHT, solver=Anderson(memory=3), adjoint=Implicit(rtol=1e-12))
    ours = torch.autograd.grad(layer(x).square().sum(), tuple(cell.parameters()))
    value = fixed_point(cell, x, torch.zeros_like(x), stop=TIGHT, solver="picard", adjoint="unrolled").value
    assert_close(ours, torch.autograd.grad(value.square().sum(), tuple(cell.parameters())))
    exactly(layer(x, torch.zeros_like(x)), layer(x))


def test_prepare_is_called_once_and_init_gives_the_start():
    cell = Prepared()
    layer, x = Equilibrium(cell, steps=1), torch.randn(3, 4)
    exactly(layer(x), torch.tanh(cell.w(torch.ones(3, 4)) + cell.u(x)))
    assert cell.calls == 1
    Equilibrium(cell)(x).sum().backward()
    assert cell.calls == 2
    assert cell.u.weight.grad.abs().sum() > 0


def test_retrieval_as_a_layer():
    patterns = nn.Parameter(normal(6, 4))

    class Memory(Retrieval):
        def prepare(self, query, patterns=patterns, mask=None):
            return super().prepare(query, patterns, mask)

    layer = Equilibrium(Memory(2.0, inject="input"))
    query = normal(3, 4).requires_grad_()
    layer(query).sum().backward()
    assert query.grad.abs().sum() > 0
    assert patterns.grad.abs().sum() > 0


def test_solution_on_request_and_kept():
    layer, x = Equilibrium(Cell()), torch.randn(3, 4)
    assert layer.last_solution is None
    solution = layer(x, return_solution=True)
    assert isinstance(solution, Solution)
    assert solution.value.requires_grad
    kept = layer.last_solution
    assert not kept.value.requires_grad
    exactly(kept.value, solution.value.detach())
    exactly(kept.steps, solution.steps)
    solution.value.sum().backward()
    assert kept.adjoint.result.tolist() == [Result.CONVERGED] * 3


@pytest.mark.parametrize("steps", [1, 3])
def test_counted_steps_train_the_start_and_never_complain(steps):
    layer = Equilibrium(Starting(), steps=steps, on_failure="raise")
    layer(torch.randn(3, 4)).sum().backward()
    assert layer.f.start.grad.abs().sum() > 0


def test_start_that_requires_grad_is_detached_once_said_and_always_noted():
    layer, x = Equilibrium(Starting()), torch.randn(3, 4)
    with pytest.warns(UserWarning, match=r"z0 was detached.*inject='input', steps=k"):
        solution = layer(x, return_solution=True)
    assert "z0 was detached" in solution.note
    again = layer(x, return_solution=True)  # a second warning would be an error here
    assert "z0 was detached" in again.note
    assert "z0 was detached" in layer.last_solution.note
    again.value.sum().backward()
    assert layer.f.start.grad is None
    assert layer.f.w.weight.grad.abs().sum() > 0
    unrolled = Equilibrium(Starting(), adjoint="unrolled")
    assert unrolled(x, return_solution=True).note == ""
    with torch.no_grad():
        assert layer(x, return_solution=True).note == ""


def test_failure_warns_raises_or_is_ignored():
    x, stop = torch.randn(3, 4), Termination(max_steps=2)
    with pytest.warns(ConvergenceWarning, match=r"3 of 3 problems did not converge \(MAX_STEPS\).*max_steps"):
        Equilibrium(Cell(), stop=stop)(x)
    with pytest.raises(ConvergenceError, match=r"3 of 3"):
        Equilibrium(Cell(), stop=stop, on_failure="raise")(x)
    quiet = Equilibrium(Cell(), stop=stop, on_failure="ignore")
    quiet(x)
    assert (quiet.last_solution.result == Result.MAX_STEPS).all()


def twins(layer):
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


@pytest.mark.parametrize("adjoint", ["implicit", "unrolled", "onestep"])
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_uses_its_own_weights(adjoint, used):
    layer, x = Equilibrium(Cell(), adjoint=adjoint, solver=LBFGS(memory=2)), torch.randn(3, 4)
    if used:
        layer(x).sum().backward()
        layer.zero_grad()
    before = layer(x).detach()
    for twin in twins(layer):
        exactly(twin(x).detach(), before)
        with torch.no_grad():
            twin.f.w.weight.zero_()
        exactly(twin(x), torch.tanh(twin.f.w.bias + twin.f.u(x)))
        twin(x).sum().backward()
        exactly(layer(x).detach(), before)
        assert layer.f.w.weight.grad is None


def test_a_copy_of_a_normalised_layer():
    layer, x = Equilibrium(Cell()), torch.randn(3, 4)
    nn.utils.parametrizations.weight_norm(layer.f.w)
    layer(x).sum().backward()
    twin = copy.deepcopy(layer)
    exactly(twin(x), layer(x))
    with torch.no_grad():
        twin.f.w.parametrizations.weight.original0.mul_(0.1)
    assert not torch.equal(twin(x), layer(x))
    for _ in range(2):  # nothing has to be reset between iterations
        layer(x).sum().backward()


def test_state_dict_holds_the_weights_of_f_and_no_batch_size():
    layer, other, x = Equilibrium(Cell()), Equilibrium(Cell()), torch.randn(3, 4)
    layer(x)
    assert sorted(layer.state_dict()) == ["f.u.weight", "f.w.bias", "f.w.weight"]
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    exactly(other(x), layer(x))
    for count in (1, 7, 0):
        assert layer(torch.randn(count, 4)).shape == (count, 4)


def test_double_and_eval():
    layer, x = Equilibrium(Cell()).to(F64).eval(), normal(3, 4)
    value = layer(x)
    assert value.dtype == F64
    assert value.requires_grad
    value.sum().backward()
    assert layer.f.w.weight.grad.dtype == F64


def test_description():
    text = repr(Equilibrium(Cell(), solver=LBFGS(), steps=3))
    assert "steps=3" in text
    assert "LBFGS(memory=" in text
    assert "(f): Cell" in text


def test_training_with_lightning():
    from lightning import LightningModule, Trainer

    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(3, 8), Equilibrium(Cell(8)), nn.Linear(8, 1))
            self.losses: list[float] = []
            self.sizes: set[int] = set()

        def training_step(self, batch, index):
            x, y = batch
            loss = (self.model(x) - y).square().mean()
            self.losses.append(loss.item())
            self.sizes.add(len(x))
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.02)

    x = torch.randn(70, 3)
    data = TensorDataset(x, (x[:, :1] * x[:, 1:2]).tanh())
    lit = Lit()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with warnings.catch_warnings():
        # Lightning's own: few workers, few batches, deprecated calls in its dependencies.
        for module in ("lightning", "torch", "pytorch_lightning"):
            warnings.filterwarnings("ignore", module=module)
        warnings.filterwarnings("error", category=ConvergenceWarning)
        Trainer(max_epochs=12, accelerator="cpu", devices=1, enable_model_summary=False, **options).fit(
            lit, DataLoader(data, batch_size=32)
        )
    assert lit.sizes == {32, 6}
    assert len(lit.losses) == 36
    assert sum(lit.losses[-6:]) < 0.5 * sum(lit.losses[:6])
