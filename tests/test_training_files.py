"""What a run leaves in its folder, what it refuses, and the command line."""

import dataclasses
import json
import math
import signal
import struct

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule
from test_training_run import BAGS, POOLING, command, settings
from timm_here import stand_in
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.cli import main
from hopdeq_lwpf.data import DataError
from hopdeq_lwpf.settings import find, names
from hopdeq_lwpf.training import (
    CheckpointError,
    Checkpoints,
    MetricsFile,
    TrainSpec,
    build_network,
    load_weights,
    read_checkpoint,
    read_metrics,
    train,
)
from hopdeq_lwpf.training.metrics import append, finite


def test_ctrl_c_on_the_command_line_is_quiet_and_can_be_resumed(tmp_path, monkeypatch, capsys):
    write = MetricsFile.on_train_epoch_end

    def interrupted(self, trainer, pl_module):
        write(self, trainer, pl_module)
        if trainer.current_epoch == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MetricsFile, "on_train_epoch_end", interrupted)
    assert main(command(tmp_path / "a")) == 130
    monkeypatch.undo()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert main([*command(tmp_path / "a"), "--resume", "true"]) == 0
    shown = capsys.readouterr()
    assert "epoch 15 of 15" in shown.err
    assert shown.out.splitlines()[0] == "written:"
    found = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert [record["epoch"] for record in found.records] == list(range(1, 16))
    assert found.superseded == 1


# --- the command line


def test_every_field_can_be_given_on_the_command_line(tmp_path, capsys):
    given = {
        "model": {**find("models", "train_bit_pattern")["model"], "beta": 2, "steps": None},
        "data": {**find("models", "train_bit_pattern")["data"], "num_signals": 4},
        "loss": "cross_entropy", "optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.25, "clip": None,
        "schedule": "linear", "final_rate": 0.125, "warmup": 3, "epochs": 7, "accumulate": 2, "limit_batches": 9,
        "monitor": "val/auc", "diagnostics": False, "spectrum_every": 4, "loggers": ["csv", "wandb"],
        "iterations": {"budget": 9},
        "precision": "64-true", "accelerator": "auto", "devices": 2, "threads": 3, "seed": 11, "resume": True,
        "out": str(tmp_path / "out"),
    }  # fmt: skip
    options = ["--model.beta", "2", "--model.steps", "null", "--data.num_signals", "4"]
    for name, value in given.items():
        if name not in ("model", "data"):
            words = value if isinstance(value, list) else [json.dumps(value).strip('"')]
            options += [f"--{name}", *words]
    assert set(given) == {field.name for field in dataclasses.fields(TrainSpec)}
    with pytest.raises(SystemExit, match="0"):
        main(["train", "bit_pattern", *options, "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == given
    (tmp_path / "mine.yaml").write_text(printed)
    with pytest.raises(SystemExit, match="0"):
        main(["train", str(tmp_path / "mine.yaml"), "--print_config"])
    assert capsys.readouterr().out == printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["bit_patern"],
            "did you mean 'bit_pattern'?",
        ),
        (["train_digitts"], "did you mean 'digits'?"),
        (["nowhere.yaml"], "does not exist"),
        (["digits", "--learning-rate", "1"], "did you mean '--learning_rate'"),
        (["digits", "--model.hiden", "3"], "Did you mean 'hidden'"),
        (["digits", "--data.batchsize", "3"], "Did you mean 'batch_size'"),
        (["digits", "--epochs", "x"], "Expected a int. Got value: x"),
        (["digits", "--loss", "mes"], "Did you mean 'mse'"),
        (["digits", "--resume", "true"], "there is nothing to resume"),
        (["digits", "--accelerator", "tpu"], "accelerator 'tpu'"),
    ],
)
def test_a_mistake_is_one_line(options, message, capsys, tmp_path):
    assert main(["train", *options, "--out", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert text.startswith("hopdeq-lwpf: error: ")
    assert text.count("\n") == 1
    assert message in text
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_of_a_settings_file_names_the_nearest(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("epoch: 3\n")
    assert main(["train", str(tmp_path / "a.yaml")]) == 2
    assert "unknown key 'epoch' in the settings; did you mean 'epochs'" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in names("models") if name.startswith("train_")])
def test_every_named_training_runs(name, tmp_path, monkeypatch):
    given = find("models", name)
    if given["model"]["model"] == "vision_transformer":
        stand_in(monkeypatch)
    if given["data"].get("pictures") == "mnist":
        given["data"]["folder"] = write_mnist(tmp_path / "mnist")
    spec = TrainSpec(**{**given, "epochs": 1, "limit_batches": 2, "out": str(tmp_path / "out")})
    assert given["out"] == f"results/{name}"
    run = train(spec)
    counted = {"residuals"} if given.get("iterations") else set()
    assert set(run.files) == {"metrics", "config", "last", "best"} | counted


def write_mnist(folder):
    """IDX files of the shape of MNIST's with a few made-up pictures."""
    folder.mkdir()
    for stem in ("train", "t10k"):
        for kind, shape in (("images-idx3", (70, 28, 28)), ("labels-idx1", (70,))):
            content = bytes(i % (251 if kind == "images-idx3" else 10) for i in range(math.prod(shape)))
            header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
            (folder / f"{stem}-{kind}-ubyte").write_bytes(header + content)
    return str(folder)


# --- what stands in the folder


def test_the_folder_holds_what_is_promised(tmp_path):
    run = train(settings(tmp_path / "out", loggers=("csv",), monitor="val/accuracy", epochs=3))
    assert set(run.files) == {"metrics", "config", "last", "best"}
    config = yaml.safe_load(run.files["config"].read_text())
    assert TrainSpec(**config) == settings(
        tmp_path / "out", loggers=("csv",), monitor="val/accuracy", epochs=3
    )
    records = run.metrics.records
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["step"] for record in records] == [6, 12, 18]
    assert records[0]["lr"] == 1e-3
    assert run.metrics.course("val/loss") == [record["metrics"]["val/loss"] for record in records]
    assert list((tmp_path / "out" / "csv").rglob("metrics.csv"))
    best = read_checkpoint(run.files["best"])
    shares = run.metrics.course("val/accuracy")
    assert best["epoch"] == shares.index(max(shares)), "best.ckpt is not of the best epoch"
    fresh = load_weights(run.files["last"], build_network(POOLING))
    for one, other in zip(fresh.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_best_is_never_nan_and_knows_what_is_better(tmp_path):
    lower, higher = Checkpoints(tmp_path, {}, "val/loss"), Checkpoints(tmp_path, {}, "val/auc")
    for callback in (lower, higher):
        assert not callback._better(float("nan"))
        assert callback._better(0.5)
        callback.best = 0.5
        assert not callback._better(float("nan"))
        assert not callback._better(0.5)
    assert lower._better(0.4)
    assert not lower._better(0.6)
    assert higher._better(0.6)
    assert not higher._better(0.4)


def test_scores_are_over_samples_not_batches(tmp_path):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, data):
            return data[:, 0] + 0 * self.weight

    class Uneven(LightningDataModule):
        def train_dataloader(self):
            x = torch.tensor([[2.0], [-1.0], [3.0], [0.5], [-4.0]])
            return DataLoader(TensorDataset(x, torch.tensor([1, 1, 0, 1, 0])), 3)

    run = train(settings(tmp_path / "out", epochs=1, diagnostics=False), model=Constant(), data=Uneven())
    (record,) = run.metrics.records
    assert record["metrics"]["train/accuracy"] == pytest.approx(3 / 5)
    assert record["metrics"]["train/auc"] == pytest.approx(3 / 6)  # 2, -1, .5 against 3, -4
    slow = [
        np.log1p(np.exp(-x if t else x)) for x, t in zip([2, -1, 3, 0.5, -4], [1, 1, 0, 1, 0], strict=True)
    ]
    assert record["metrics"]["train/loss"] == pytest.approx(float(np.mean(slow)), rel=1e-6)


# --- metrics.jsonl


def test_metrics_survive_nan_and_cut_off_lines(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    append(path, {"step": 1, **finite({"a": 1.0, "b": float("nan"), "c": float("-inf")})})
    with path.open("a") as file:
        file.write('{"step": 2, "metr')
    append(path, {"step": 2, **finite({"a": 2.0, "b": 3.0})})
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {
        "step": 1,
        "metrics": {"a": 1.0, "b": None, "c": None},
        "nonfinite": {"b": "nan", "c": "-inf"},
    }
    found = read_metrics(path)
    assert (len(found.records), found.broken, found.superseded) == (2, 1, 0)
    assert found.course("a") == [1.0, 2.0]
    assert np.isnan(found.course("b")[0])
    assert found.course("c")[0] == -np.inf
    assert np.isnan(found.course("c")[1])


def test_a_lost_course_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for record in ({"step": 5}, {"step": 10}, {"step": 15}, {"resumed_at": 10}, {"step": 15}, {"step": 20}):
        append(path, record)
    found = read_metrics(path)
    assert [record["step"] for record in found.records] == [5, 10, 15, 20]
    assert found.superseded == 1


def test_a_file_without_metrics_is_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_metrics(tmp_path / "a")
    (tmp_path / "a").write_text("no json\n[1]\n")
    with pytest.raises(DataError, match="holds no metrics"):
        read_metrics(tmp_path / "a")


# --- what is refused


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    train(settings(out, epochs=1))
    return out


def test_a_folder_with_a_run_is_not_overwritten(finished, tmp_path):
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(SpecError, match="holds a run already"):
        train(settings(finished))
    assert (finished / "metrics.jsonl").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="is a file"):
        train(settings(tmp_path / "file"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.5}, "learning_rate is 0.001 in the checkpoint and 0.5 now"),
        ({"model": {**POOLING, "dropout": 0.1}}, "model.dropout is 0.5 in the checkpoint and 0.1 now"),
        ({"data": {**BAGS, "num_bags": 8}}, "data.num_bags is 64 in the checkpoint and 8 now"),
        ({"seed": 3, "clip": None}, "clip is 1.0 in the checkpoint and None now; seed is 0"),
    ],
)
def test_other_settings_cannot_resume(finished, options, message):
    with pytest.raises(CheckpointError, match=message):
        train(settings(finished, resume=True, **options))


def test_another_model_cannot_resume(finished):
    with pytest.raises(CheckpointError, match="is of another model: the checkpoint has no 'model.bias'"):
        train(settings(finished, resume=True, epochs=2), model=nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"is \(8,\), needs \(9,\)"):
        load_weights(finished / "last.ckpt", build_network({**POOLING, "input_size": 9, "output_size": 8}))


def test_a_missing_logger_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("hopdeq_lwpf.training.run.find_spec", lambda name: None)
    for logger, package in (("wandb", "wandb"), ("tensorboard", "tensorboard")):
        with pytest.raises(SpecError, match=f"pip install {package}"):
            train(settings(tmp_path / "out", loggers=(logger,)))
    assert not (tmp_path / "out").exists()


def test_mistakes_leave_no_folder_and_the_threads_as_they_were(tmp_path):
    before = torch.get_num_threads()
    with pytest.raises(SpecError, match="Did you mean 'input_size'"):
        train(settings(tmp_path / "out", model={"model": "pooling", "input_sise": 3}, threads=before + 1))
    assert torch.get_num_threads() == before
    assert not (tmp_path / "out").exists()


def test_ctrl_c_comes_out_as_itself_and_still_works_afterwards(tmp_path):
    class Interrupt(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(settings(tmp_path / "out"), callbacks=(Interrupt(),))
    assert signal.getsignal(signal.SIGINT) is handler
    assert read_checkpoint(tmp_path / "out" / "last.ckpt")["epoch"] == 0
