"""Iterations to a tolerance: exact, as published, and as the callback logs them while a network trains."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from hopdeq_lwpf import Termination, fixed_point
from hopdeq_lwpf.diagnostics import iterations_to
from hopdeq_lwpf.models import HAM, sdm
from hopdeq_lwpf.training import ConvergenceMonitor, Learner, Learning, TrainSpec, train

LAYERS = [64, 12, 10]


def published(states, tolerance):
    """The count of the published code for one problem: states f(z_0), f(z_1), ... as plain lists."""
    for index in range(len(states) - 1):
        change = math.dist(states[index + 1], states[index]) / math.hypot(*states[index + 1])
        if change < tolerance:
            return index if index else len(states) - 1
    return len(states) - 1


def test_counts_are_those_of_a_slow_twin_on_a_real_solve():
    torch.manual_seed(0)
    f = HAM(LAYERS, even_odd=True).f.double()
    x = f.prepare(torch.rand(16, 64, dtype=torch.float64))
    budget, tolerance = 12, 1e-4
    stop = Termination(rtol=0.0, atol=0.0, max_steps=budget - 1)
    trace = fixed_point(f, x, f.init(x), solver="picard", stop=stop, trace=True).trace.residual
    exact, theirs = iterations_to(trace, tolerance), iterations_to(trace, tolerance, as_published=True)
    states, z = [], f.init(x)
    with torch.no_grad():
        for _ in range(budget):
            z = f(z, x)
            states.append(z)
    for row in range(16):
        own = [state[row].tolist() for state in states]
        assert theirs[row] == published(own, tolerance)
        before = [[0.0] * len(own[0]), *own]
        changes = [math.dist(b, a) / math.hypot(*b) for a, b in zip(before, own, strict=False)]
        first = next((t for t, change in enumerate(changes) if change < tolerance), math.nan)
        assert exact[row] == first or (math.isnan(first) and exact[row].isnan())
    passed = ~exact.isnan()
    assert 0 < int(passed.sum()) < 16, "some problems must pass and some not, or half of this is untested"
    assert (theirs[passed] == exact[passed] - 1).all()
    assert len(exact.unique()) > 1


def test_what_the_published_count_gets_wrong():
    residual = torch.tensor([[0.5, 5e-5, 1e-6], [1e-5, 1e-6, 1e-6], [0.5, 0.4, 0.3], [0.5, 0.2, 5e-5]]).T
    assert iterations_to(residual).nan_to_num(-1).tolist() == [1, 0, -1, 2]
    # A problem that is there after one update counts as one that never is, and both as T - 1.
    assert iterations_to(residual, as_published=True).tolist() == [2, 2, 2, 1]


@given(
    st.lists(st.lists(st.floats(1e-9, 1.0), min_size=6, max_size=6), min_size=1, max_size=4),
    st.floats(1e-8, 0.9),
)
def test_a_tighter_tolerance_never_takes_fewer_iterations(rows, tolerance):
    residual = torch.tensor(rows, dtype=torch.float64).T
    loose, tight = iterations_to(residual, tolerance), iterations_to(residual, tolerance / 3)
    assert (tight.isnan() | (tight >= loose)).all()
    for row, count in zip(rows, loose.tolist(), strict=True):
        expected = next((t for t, value in enumerate(row) if value < tolerance), math.nan)
        assert count == expected or (math.isnan(count) and math.isnan(expected))


def test_any_batch_shape_and_problems_that_stopped():
    residual = torch.full((4, 2, 3), 0.5)
    residual[2:] = math.nan
    residual[1, 0, 0] = 1e-5
    found = iterations_to(residual)
    assert found.shape == (2, 3)
    assert found[0, 0] == 1
    assert int(found.isnan().sum()) == 5


@pytest.mark.parametrize(
    ("residual", "options", "said"),
    [
        ([1.0], {}, "residual must be a torch.Tensor"),
        (torch.tensor(1.0), {}, "T >= 1"),
        (torch.ones(0, 2), {}, "T >= 1"),
        (torch.ones(3, 2), {"tolerance": 0.0}, "tolerance must be > 0"),
        (torch.ones(1, 2), {"as_published": True}, "at least two entries"),
    ],
)
def test_mistakes_are_said(residual, options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        iterations_to(residual, **options)


class Digits(LightningDataModule):
    """Sixty made-up pictures, forty for training."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.rand(60, 64, generator=generator), torch.arange(60) % 10

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x[:40], self.y[:40]), 20)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.x[40:], self.y[40:]), 8)  # batches of unequal size

    test_dataloader = val_dataloader


SETTINGS = {
    "model": {"model": "ham", "layers": LAYERS, "even_odd": True, "solver": "picard", "rtol": 1e-4},
    "loss": "squared_error",
    "optimizer": "madam",
    "weight_decay": 0.0,
    "epochs": 2,
}


def test_the_callback_logs_the_counts_of_all_validation_problems(tmp_path):
    spec = TrainSpec(**SETTINGS, iterations={"budget": 30, "every": 2, "tolerance": 1e-3}, out=str(tmp_path))
    trained = train(spec, data=Digits())
    first, last = (record["metrics"] for record in trained.metrics.records)
    assert "val/model/iterations" not in first, "only every second epoch"
    f, data = trained.model.f, Digits()
    x = f.prepare(data.x[40:])
    stop = Termination(rtol=0.0, atol=0.0, max_steps=29)
    with torch.no_grad():
        trace = fixed_point(f, x, f.init(x), solver="picard", stop=stop, trace=True).trace.residual
    exact = iterations_to(trace, 1e-3)
    assert not exact.isnan().any()
    assert last["val/model/iterations"] == pytest.approx(float(exact.mean()))
    published_mean = float(iterations_to(trace, 1e-3, as_published=True).mean())
    assert last["val/model/iterations_published"] == pytest.approx(published_mean)
    assert last["val/model/not_converged"] == 0
    with np.load(trained.files["residuals"]) as saved:
        assert saved["model"].shape == (30, 20)
        np.testing.assert_allclose(saved["model"], trace.numpy(), rtol=1e-4, atol=1e-6)


def test_counting_leaves_the_training_as_it_was(tmp_path):
    plain = train(TrainSpec(**SETTINGS, out=str(tmp_path / "a")), data=Digits())
    spec = TrainSpec(**SETTINGS, iterations={}, out=str(tmp_path / "b"))
    assert spec.iterations == {"budget": 40, "every": 1, "tolerance": 1e-4}
    counted = train(spec, data=Digits())
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, counted.model.state_dict()[name])


@pytest.mark.filterwarnings(
    "ignore:.*isinstance.*treespec, LeafSpec.*:FutureWarning", "ignore:.*many workers.*"
)
def test_a_budget_that_is_too_small_is_reported_and_a_test_counts_too():
    torch.manual_seed(0)
    monitor = ConvergenceMonitor(budget=3)
    learner = Learner(HAM(LAYERS, even_odd=True), Learning("squared_error"))
    options = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    }
    (found,) = Trainer(callbacks=[monitor], **options).test(learner, datamodule=Digits(), verbose=False)
    assert found["test/model/not_converged"] == 1
    assert math.isnan(found["test/model/iterations"])
    assert found["test/model/iterations_published"] == 2
    assert monitor.residuals["model"].shape == (3, 20)
    assert not any(module._forward_pre_hooks for module in learner.modules()), "a hook was left"


class Twice(torch.nn.Module):
    """Calls its layer twice in a batch, by keyword and from a start of its own."""

    def __init__(self):
        super().__init__()
        self.layer = HAM(LAYERS, even_odd=True, solver="picard")

    def forward(self, x):
        return self.layer(x=x) + self.layer(x.flip(0), z0=torch.ones(len(x), 10), return_solution=True).value


def test_every_call_of_a_layer_counts_from_its_own_start_and_the_last_epoch_always(tmp_path):
    torch.manual_seed(0)
    spec = TrainSpec(
        loss="squared_error", epochs=2, iterations={"budget": 30, "every": 5}, out=str(tmp_path), model="ham"
    )
    model, data = Twice(), Digits()
    trained = train(spec, model=model, data=data)
    first, last = (record["metrics"] for record in trained.metrics.records)
    assert "val/layer/iterations" not in first
    with np.load(trained.files["residuals"]) as saved:
        found = saved["layer"]
    assert found.shape == (30, 40), "two calls of twenty pictures"
    f, stop = model.layer.f, Termination(rtol=0.0, atol=0.0, max_steps=29)
    x = f.prepare(data.x[40:48].flip(0))
    with torch.no_grad():
        trace = fixed_point(f, x, torch.ones(8, 10), solver="picard", stop=stop, trace=True).trace.residual
    np.testing.assert_allclose(found[:, 8:16], trace.numpy(), rtol=1e-3, atol=1e-6)


def test_a_model_with_a_memory_of_two_arguments_is_counted(tmp_path):
    class Recalls(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = sdm.SDM(sdm.Attention(2.0), space="continuous")
            self.head = torch.nn.Linear(64, 10)

        def forward(self, x):
            return self.head(self.memory(x, x[:4]))

    trained = train(TrainSpec(epochs=1, iterations={}, out=str(tmp_path)), model=Recalls(), data=Digits())
    assert trained.metrics.records[-1]["metrics"]["val/memory/not_converged"] >= 0


@pytest.mark.parametrize("options", [{"budget": 1}, {"every": 0}, {"tolerance": 0.0}])
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ConvergenceMonitor(**options)
    with pytest.raises(ValueError, match=next(iter(options))):
        TrainSpec(iterations=options)
