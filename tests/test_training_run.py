"""A run can be killed at any time and goes on as if nothing had happened."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hopdeq_lwpf import Equilibrium
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.training import (
    TrainSpec,
    read_checkpoint,
    train,
)

BAGS = {"data": "bit_pattern", "num_bags": 64, "batch_size": 8}
POOLING = {"model": "pooling", "input_size": 8, "hidden_size": 4, "dropout": 0.5}
# Dropout, noise of a forgetting unit and an order of training: everything that draws.
DRAWS = {**POOLING, "steps": None, "forgetting": {"unit": "pfu", "noise": 0.1}}


def settings(out, **options):
    return TrainSpec(
        **{"model": POOLING, "data": BAGS, "loss": "binary", "epochs": 4, **options, "out": str(out)}
    )


class KilledError(Exception):
    """Stands for the end of a process."""


class Kill(Callback):
    """Ends a run in the middle of an epoch, or right before its end."""

    def __init__(self, epoch, batch):
        self.epoch, self.batch = epoch, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            raise KilledError

    def on_train_epoch_end(self, trainer, pl_module):
        if (trainer.current_epoch, "end") == (self.epoch, self.batch):
            raise KilledError


def assert_same(first, second):
    """The same metrics, weights and optimiser to the last bit."""
    assert len(first.metrics.records) == len(second.metrics.records)
    for one, other in zip(first.metrics.records, second.metrics.records, strict=True):
        timeless = [{k: v for k, v in r.items() if k not in ("time", "seconds")} for r in (one, other)]
        assert timeless[0] == timeless[1]
    ours, theirs = (read_checkpoint(run.files["last"]) for run in (first, second))
    assert ours["global_step"] == theirs["global_step"]
    for name, value in ours["state_dict"].items():
        assert torch.equal(value, theirs["state_dict"][name]), name
    states = [run["optimizer_states"][0]["state"] for run in (ours, theirs)]
    for number, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][number][name]), (number, name)


# --- exact resume


@pytest.mark.parametrize("at", [(0, 1), (2, 3), (2, "end")], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"model": DRAWS},
        {"schedule": "cosine", "warmup": 3, "limit_batches": 4, "accumulate": 2, "spectrum_every": 2},
        {"data": {"data": "digits"}, "model": "equilibrium", "loss": "cross_entropy", "limit_batches": 5},
    ],
    ids=["noise", "schedule", "digits"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, options, at):
    whole = train(settings(tmp_path / "whole", **options))
    with pytest.raises(KilledError):
        train(settings(tmp_path / "killed", **options), callbacks=(Kill(*at),))
    random.seed(7), np.random.seed(7), torch.manual_seed(7)  # the state of another process
    resumed = train(settings(tmp_path / "killed", **options, resume=True))
    assert_same(whole, resumed)


class LearnedMemory(nn.Module):
    """f(z, x): recall among learned patterns, with noise from a generator of its own."""

    state_ndim = 1

    def __init__(self):
        super().__init__()
        self.patterns = nn.Parameter(torch.randn(12, 64, generator=torch.Generator().manual_seed(1)) / 8)
        unit = PFU(threshold=-0.1, noise=0.05, generator=torch.Generator().manual_seed(2))
        self.recall = Retrieval(4.0, forgetting=unit, inject="input")

    def prepare(self, x):
        return self.recall.prepare(x, self.patterns)

    def init(self, x):
        return self.recall.init(x).detach()

    def forward(self, z, x):
        return self.recall(z, x)


class ThreeSources(nn.Module):
    """Draws from torch, numpy, random and a torch.Generator of a module."""

    def __init__(self):
        super().__init__()
        self.memory = Equilibrium(LearnedMemory(), solver="picard")
        self.head = nn.Linear(64, 10)
        nn.init.zeros_(self.head.weight)
        self.dropout = nn.Dropout(0.2)

    def forward(self, data):
        shift = 0.01 * (random.random() + float(np.random.rand())) if self.training else 0.0
        return self.head(self.dropout(self.memory(data)) + shift)


class OwnGenerator(LightningDataModule):
    """A loader whose order comes from a generator of its own."""

    def train_dataloader(self):
        data = TensorDataset(
            torch.rand(48, 64, generator=torch.Generator().manual_seed(3)), torch.arange(48) % 10
        )
        return DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(4))


def test_every_source_of_randomness_goes_on(tmp_path):
    def run(name, callbacks=(), **options):
        spec = settings(tmp_path / name, loss="cross_entropy", epochs=3, **options)
        torch.manual_seed(5)  # of the weights, which are made before the run
        return train(spec, model=ThreeSources(), data=OwnGenerator(), callbacks=callbacks)

    whole = run("whole")
    assert "best" not in whole.files, "without a validation set there is no best"
    for at in ((0, 2), (1, 4), (2, 1)):
        with pytest.raises(KilledError):
            run("killed", (Kill(*at),), resume=at[0] > 0)
    assert_same(whole, run("killed", resume=True))
    orders = {record["metrics"]["train/loss"] for record in whole.metrics.records}
    assert len(orders) == 3, "the losses do not move: nothing was trained"


def test_the_noise_matters_so_that_the_tests_above_can_fail(tmp_path):
    first = train(settings(tmp_path / "a", model=DRAWS, epochs=1))
    second = train(settings(tmp_path / "b", model=DRAWS, epochs=1, seed=1))
    with pytest.raises(AssertionError):
        assert_same(first, second)
    assert_same(first, train(settings(tmp_path / "c", model=DRAWS, epochs=1)))


def test_diagnostics_leave_the_numbers_as_they_are(tmp_path):
    model = {**DRAWS, "dropout": 0.1}
    plain = train(settings(tmp_path / "a", model=model, epochs=2, diagnostics=False))
    full = train(settings(tmp_path / "b", model=model, epochs=2, spectrum_every=1))
    for one, other in zip(plain.metrics.records, full.metrics.records, strict=True):
        assert len(other["metrics"]) > len(one["metrics"]) + 10
        assert {name: other["metrics"][name] for name in one["metrics"]} == one["metrics"]
    for one, other in zip(plain.model.parameters(), full.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_longer_run_goes_on_where_a_short_one_ended(tmp_path):
    whole = train(settings(tmp_path / "whole", epochs=3))
    train(settings(tmp_path / "short", epochs=2))
    assert_same(whole, train(settings(tmp_path / "short", epochs=3, resume=True)))
    again = train(settings(tmp_path / "short", epochs=3, resume=True))  # nothing is left to do
    assert_same(whole, again)


# --- the command line, killed


def command(out):
    given = ["train", "bit_pattern", "--out", str(out), "--model.steps", "null", "--data.num_bags", "64"]
    return [*given, "--data.batch_size", "8", "--epochs", "15"]


def resume(out):
    """Go on with what the command line began, by the settings that it left."""
    text = (out / "config.yaml").read_text()
    return train(TrainSpec(**{**yaml.safe_load(text), "resume": True}))


def test_kill_9_leaves_a_run_that_goes_on_exactly(tmp_path):
    begun = [sys.executable, "-W", "error", "-m", "hopdeq_lwpf.cli", *command(tmp_path / "a")]
    path = tmp_path / "a" / "metrics.jsonl"
    until = time.monotonic() + 90
    with subprocess.Popen(begun, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not path.exists() or path.read_text().count("\n") < 2:
            assert running.poll() is None, running.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.002)
        running.kill()
        out, err = running.communicate(timeout=60)
    assert running.returncode == -signal.SIGKILL, err
    assert out == ""
    assert err.startswith("epoch 1 of 15, step 6, ")
    assert "\x1b" not in err, "control characters in a log file"
    assert all(json.loads(line) for line in path.read_text().splitlines()), "a line was cut off"
    resumed = resume(tmp_path / "a")
    assert resumed.metrics.records[-1]["epoch"] == 15
    config = yaml.safe_load(resumed.files["config"].read_text())
    assert_same(train(TrainSpec(**{**config, "out": str(tmp_path / "b")})), resumed)
