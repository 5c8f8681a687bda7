"""What the callbacks record, against the layers' own Solutions and autograd."""

import io
import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hopdeq_lwpf import Equilibrium, Termination, retrieve
from hopdeq_lwpf._types import AdjointReport, Result, Solution
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models import Hopfield, HopfieldPooling, RepertoireClassifier
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.training import (
    GradientMonitor,
    SolutionMonitor,
    SpectrumMonitor,
    TrainSpec,
    read_checkpoint,
    train,
)
from hopdeq_lwpf.training.monitors import _Course, equilibrium_layers, same_randomness
from hopdeq_lwpf.training.networks import TanhCell
from hopdeq_lwpf.training.progress import EpochLines, summary

WIDTH = 6


class Two(nn.Module):
    """Two equilibrium layers, one on the data and one on learned features; the second is idle every other time."""

    def __init__(self, idle=False):
        super().__init__()
        stop = Termination(rtol=1e-6)
        self.first = Equilibrium(TanhCell(4, WIDTH), stop=stop)
        self.second = Equilibrium(TanhCell(WIDTH, WIDTH, 0.5), stop=stop)
        self.head = nn.Linear(WIDTH, 1)
        self.idle, self.calls = idle, 0

    def forward(self, data):
        self.calls += 1
        h = self.first(data)
        return self.head(h if self.idle and self.calls % 2 else self.second(h))


class Points(LightningDataModule):
    """Ten points with a target, in order: two batches of training, one of validation."""

    def __init__(self, poison=None):
        super().__init__()
        self.x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
        self.y = self.x[:, :1].sign().clamp_min(0)
        if poison == "train":
            self.x[9, 2] = math.nan
        self.held = self.x[:3].clone()
        if poison == "val":
            self.held[1, 2] = math.nan

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x, self.y), 5)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.held, self.y[:3]), 3)


class Watch(Callback):
    """Keeps what the layers and the parameters show at each step."""

    def __init__(self):
        self.seen, self.norms, self.queries = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        model = pl_module.model
        self.handle = model.second.register_forward_pre_hook(lambda _, given: given[0].retain_grad())
        self.second = model.first.register_forward_hook(lambda *given: setattr(self, "h", given[2]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        squares = sum(float(p.grad.double().square().sum()) for p in pl_module.parameters())
        self.norms.append(math.sqrt(squares))
        self.queries.append(float(self.h.grad.double().norm()))
        self.handle.remove(), self.second.remove()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(pl_module.model.second.last_solution)


def run(tmp_path, model, data=None, callbacks=(), **options):
    spec = TrainSpec(loss="binary", epochs=1, clip=1e-3, out=str(tmp_path / "out"), **options)
    (record,) = train(spec, model=model, data=data or Points(), callbacks=callbacks).metrics.records
    return record


def test_the_record_is_what_the_solutions_say(tmp_path):
    watch = Watch()
    metrics = run(tmp_path, Two(), callbacks=(watch,))["metrics"]

    def every(read):
        return torch.cat([read(solution).double() for solution in watch.seen])

    expected = {
        "residual": every(lambda s: s.residual).mean(), "residual_max": every(lambda s: s.residual).max(),
        "steps": every(lambda s: s.steps).mean(), "steps_max": every(lambda s: s.steps).max(),
        "evaluations": every(lambda s: s.evaluations).mean(),
        "converged": every(lambda s: s.converged).mean(), "nonfinite": torch.tensor(0.0),
        "adjoint_residual_max": every(lambda s: s.adjoint.residual).max(),
        "adjoint_steps": every(lambda s: s.adjoint.steps).mean(), "adjoint_converged": torch.tensor(1.0),
    }  # fmt: skip
    found = {n.rsplit("/", 1)[1]: v for n, v in metrics.items() if n.startswith("train/second/")}
    assert set(found) == {*expected, "query_gradient"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-6), name
    assert found["adjoint_steps"] > 1
    # Norms are those before clipping, which is to 1e-3 here.
    assert metrics["train/gradient_norm"] == pytest.approx(sum(watch.norms) / 2, rel=1e-5)
    assert metrics["train/gradient_norm_max"] == pytest.approx(max(watch.norms), rel=1e-5)
    assert metrics["train/gradient_norm"] > 1e-3
    assert found["query_gradient"] == pytest.approx(sum(watch.queries) / 2, rel=1e-5)
    assert "train/first/query_gradient" not in metrics, "the data require no gradient"
    assert metrics["train/nonfinite_gradients"] == 0
    assert metrics["val/second/converged"] == 1
    assert not [name for name in metrics if name.startswith("val/") and "adjoint" in name]


def test_a_layer_that_was_not_called_is_not_counted_again(tmp_path):
    metrics = run(tmp_path, Two(idle=True))["metrics"]
    model = Two(idle=True)
    course = _Course("train")
    assert course.means() == {}
    assert "train/second/steps" in metrics
    assert "val/second/steps" not in metrics, "the third call passes the second layer by"
    assert "val/first/steps" in metrics
    assert list(equilibrium_layers(model)) == ["first", "second"]


def test_every_counts_batches(tmp_path):
    class Looks(SolutionMonitor):
        count = 0

        def _look(self, stage, batch_idx):
            before = len(self._courses)
            super()._look(stage, batch_idx)
            Looks.count += len(self._courses) > before or batch_idx % self.every == 0

    run(tmp_path, Two(), callbacks=(Looks(every=2),), diagnostics=False)
    assert Looks.count == 2  # the first of two batches, and that of the validation
    for monitor in (SolutionMonitor, SpectrumMonitor):
        with pytest.raises(ValueError, match="every"):
            monitor(every=0)


def test_nan_in_one_sample_is_counted_and_harms_no_other_number(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layers say that a problem did not converge
        record = run(tmp_path, Two(), Points(poison="val"))
    metrics = record["metrics"]
    assert metrics["val/first/nonfinite"] == pytest.approx(1 / 3)
    assert metrics["val/first/converged"] == pytest.approx(2 / 3)
    assert 0 < metrics["val/first/residual"] < 1e-6
    assert "nonfinite" not in record
    assert math.isfinite(metrics["val/loss"])
    assert metrics["train/nonfinite_gradients"] == 0


def test_gradients_with_nan_are_counted(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = run(tmp_path, Two(), Points(poison="train"))["metrics"]
    assert metrics["train/nonfinite_gradients"] == 0.5  # the second of two batches
    assert metrics["train/gradient_norm"] == metrics["train/gradient_norm_max"] > 0


def test_a_course_knows_recalls_and_empty_batches():
    recall = retrieve(torch.randn(4, 8), torch.randn(9, 8), beta=3.0)
    course = _Course("val")
    course.add(recall)
    means = course.means()
    assert means["energy"] == pytest.approx(float(recall.energy.mean()), rel=1e-6)
    assert means["support"] == float(recall.support.double().mean())
    empty = torch.empty(0)
    none = Solution(empty, empty, empty.long(), empty, empty.long(), empty.long(), adjoint=AdjointReport())
    course.add(none)
    assert course.means() == means
    alone = _Course("val")
    alone.add(none)
    assert all(math.isnan(value) for value in alone.means().values())
    failed = torch.full((2,), int(Result.NONFINITE))
    course = _Course("val")
    course.add(Solution(empty, empty, failed, torch.full((2,), math.nan), failed, failed))
    assert math.isnan(course.means()["residual_max"])
    assert course.means()["nonfinite"] == 1


def test_of_nested_layers_only_the_outermost_is_named():
    pooling = HopfieldPooling(4, steps=None)
    assert list(equilibrium_layers(nn.Sequential(pooling, Equilibrium(TanhCell(4, 4))))) == ["0", "1"]
    assert list(equilibrium_layers(pooling)) == ["model"]
    assert list(equilibrium_layers(nn.ModuleDict({"a": Hopfield(4), "ab": Hopfield(4)}))) == ["a", "ab"]


def test_a_model_that_passes_on_a_solution_is_not_a_layer():
    assert list(equilibrium_layers(RepertoireClassifier())) == ["hopfield"]


@pytest.mark.parametrize(("inject", "arrives"), [("start", False), ("input", True)])
def test_the_gradient_of_a_learned_query_is_recorded_also_where_it_is_lost(tmp_path, inject, arrives):
    model = Pooled("softmax", inject)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "z0 was detached")
        metrics = run(tmp_path, model, Bags())["metrics"]
    assert (metrics["train/layer/query_gradient"] > 0) == arrives


def test_the_share_that_forgets_everything_is_recorded():
    course, pooling = _Course("val"), HopfieldPooling(4, num_heads=2, forgetting=PFU(1e6)).eval()
    pooling(torch.randn(3, 5, 4))
    course.add(pooling.last_solution, pooling)
    assert course.means()["forgotten"] == 1
    pooling.hopfield.f.forgetting = PFU(-1e6)
    pooling(torch.randn(3, 5, 4))
    course.add(pooling.last_solution, pooling)
    assert course.means()["forgotten"] == 0.5


def test_what_met_nan_has_not_forgotten():
    course, pooling = _Course("val"), HopfieldPooling(4).eval()
    bags = torch.randn(4, 5, 4)
    bags[1] = math.nan
    pooling(bags)
    course.add(pooling.last_solution, pooling)
    assert (course.means()["forgotten"], course.means()["nonfinite"]) == (0, 0.25)


def test_energy_and_support_of_a_layer_that_computes_them(tmp_path):
    metrics = run(tmp_path, Pooled(), Bags(), spectrum_every=1)["metrics"]
    model = Pooled()
    model.load_state_dict(metrics_model(tmp_path))
    model.eval()(Bags().x[:3])
    layer = model.layer
    assert metrics["val/layer/energy"] == pytest.approx(float(layer.energy.mean()), rel=1e-5)
    support = (layer.association_matrix > 0).sum(-1).double().mean()
    assert metrics["val/layer/support"] == pytest.approx(float(support), rel=1e-6)
    inner = layer.hopfield.equilibrium
    x = layer.hopfield.last_association.x
    z = inner.last_solution.state.reshape(-1, 4)
    radii = [
        float(torch.linalg.eigvals(jacobian).abs().max())
        for jacobian in diagonal(torch.autograd.functional.jacobian(lambda state: inner.f(state, x), z))
    ]
    assert metrics["val/layer.hopfield.equilibrium/spectral_radius_max"] == pytest.approx(
        max(radii), rel=1e-2
    )
    assert metrics["val/layer.hopfield.equilibrium/unstable"] == sum(r >= 1 for r in radii) / len(radii)


class Pooled(nn.Module):
    """A pooled bag as one logit; the softmax is sharp enough to move the state."""

    def __init__(self, separation="sparsemax", inject=None):
        super().__init__()
        torch.manual_seed(1)
        self.layer = HopfieldPooling(4, steps=None, beta=4.0, separation=separation, inject=inject)
        self.head = nn.Linear(4, 1)
        nn.init.normal_(self.layer.hopfield.stored_projection.weight)

    def forward(self, data):
        return self.head(self.layer(data))


class Bags(Points):
    def __init__(self):
        super().__init__()
        self.x = torch.randn(10, 7, 4, generator=torch.Generator().manual_seed(0))
        self.held = self.x[:3]


def metrics_model(tmp_path):
    """The weights that the validation of the only epoch saw."""
    content = read_checkpoint(tmp_path / "out" / "last.ckpt")["state_dict"]
    return {name.removeprefix("model."): value for name, value in content.items()}


def diagonal(jacobian):
    """The blocks (n, n) of a Jacobian (B, n, B, n) that belong to one problem."""
    return [jacobian[row, :, row] for row in range(len(jacobian))]


def test_randomness_inside_is_put_back():
    unit = nn.Module()
    unit.generator = torch.Generator().manual_seed(0)
    before = torch.get_rng_state().clone(), unit.generator.get_state().clone()
    with same_randomness(unit):
        torch.randn(3)
        torch.randn(3, generator=unit.generator)
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], unit.generator.get_state())


def test_hooks_go_with_the_run(tmp_path):
    model = Two()
    run(tmp_path, model, spectrum_every=1)
    for module in model.modules():
        if isinstance(module, Equilibrium):
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_a_lost_query_gradient_shows_as_zero(tmp_path):
    class Lost(nn.Module):
        """Where the query only starts the solve, its gradient at the equilibrium is zero."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(4, 4)
            self.memory = Equilibrium(Memory(), adjoint="onestep")
            self.head = nn.Linear(4, 1)

        def forward(self, data):
            return self.head(self.memory(self.embed(data)))

    class Memory(nn.Module):
        state_ndim = 1

        def __init__(self):
            super().__init__()
            self.recall = Retrieval(1.0)
            self.patterns = nn.Parameter(torch.randn(5, 4))

        def prepare(self, x):
            return self.recall.prepare(x, self.patterns)

        def init(self, x):
            return x.start.detach()

        def forward(self, z, x):
            return self.recall(z, x)

    metrics = run(tmp_path, Lost())["metrics"]
    assert metrics.get("train/memory/query_gradient", 0.0) == 0.0
    assert metrics["train/gradient_norm"] > 0


def test_progress_is_a_line_an_epoch_and_a_bar_on_a_terminal(tmp_path):
    log = Console(file=io.StringIO(), force_terminal=False, width=200)
    screen = Console(file=io.StringIO(), force_terminal=True, width=200)
    run(tmp_path, Two(), callbacks=(EpochLines(log), EpochLines(screen)))
    (line,) = log.file.getvalue().splitlines()
    assert line.startswith("epoch 1 of 1, step 2, 0 s; train: loss ")
    assert "converged 100.0 %" in line
    assert "\x1b" in screen.file.getvalue()
    assert "batches" in screen.file.getvalue()
    assert summary({"lr": 1.0}) == ""
    assert summary({"train/loss": 0.5, "train/a/converged": 1.0, "train/b/converged": 0.5}) == (
        "; train: loss 0.5, converged 50.0 %"
    )


def test_gradients_that_need_no_layer_are_recorded(tmp_path):
    metrics = run(tmp_path, nn.Linear(4, 1), callbacks=(GradientMonitor(),), diagnostics=False)["metrics"]
    assert metrics["train/gradient_norm"] > 0
    assert not [name for name in metrics if name.count("/") > 1]
