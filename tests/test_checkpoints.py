"""Checkpoints and other files: reading one runs no code, and what cannot be used is refused in one line."""

import io
import json
import os
import pickle
import re
import struct

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from safetensors import safe_open
from test_training_run import POOLING, settings
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hopdeq_lwpf import Memory, load_solution
from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.cli import main
from hopdeq_lwpf.data import DataError, read_array, read_idx, read_images, read_mil, read_repertoires
from hopdeq_lwpf.data.tensors import ENTRY
from hopdeq_lwpf.documents import read_document
from hopdeq_lwpf.storage import read_structure, write_structure
from hopdeq_lwpf.training import (
    CheckpointError,
    Learner,
    WholeFiles,
    build_network,
    load_weights,
    read_checkpoint,
    read_metrics,
    train,
)
from hopdeq_lwpf.training.checkpoints import KIND


class Trap:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def _torch(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def _numpy(write, content):
    file = io.BytesIO()
    write(file, np.array([content], dtype=object), allow_pickle=True)
    return file.getvalue()


# What code in a file may look like: how it is written, and the careless way of reading it.
TRAPS = {
    "pickle": (lambda trap: pickle.dumps({"state_dict": trap}), pickle.loads),
    "pickle of text": (lambda trap: pickle.dumps({"state_dict": trap}, protocol=0), pickle.loads),
    "torch": (
        lambda trap: _torch({"state_dict": {"a": torch.ones(2), "b": trap}}),
        lambda content: torch.load(io.BytesIO(content), weights_only=False),
    ),
    "torch of old": (
        lambda trap: _torch({"state_dict": trap}, _use_new_zipfile_serialization=False),
        lambda content: torch.load(io.BytesIO(content), weights_only=False),
    ),
    "npy": (
        lambda trap: _numpy(np.save, trap),
        lambda content: np.load(io.BytesIO(content), allow_pickle=True),
    ),
    "npz": (
        lambda trap: _numpy(np.savez, trap),
        lambda content: np.load(io.BytesIO(content), allow_pickle=True)["arr_0"],
    ),
    "yaml": (
        lambda trap: f"model: !!python/object/apply:os.mkdir ['{trap.marker}']\n".encode(),
        yaml.unsafe_load,
    ),
}


def _images(path):
    return read_images(path.parent)


# Each kind of file that the package reads: its name and what reads it.
READERS = {
    "checkpoint": ("last.ckpt", read_checkpoint),
    "checkpoint to resume": ("last.ckpt", lambda path: train(settings(path.parent, resume=True))),
    "weights": ("best.ckpt", lambda path: load_weights(path, build_network(POOLING))),
    "checkpoint of a Trainer": ("a.ckpt", WholeFiles().load_checkpoint),
    "checkpoint of Lightning": ("a.ckpt", lambda p: WholeFiles().load_checkpoint(p, weights_only=False)),
    "learner": ("a.ckpt", lambda path: Learner.load_from_checkpoint(path, build_network(POOLING))),
    "memory": ("memory", Memory.load),
    "solution": ("solution", load_solution),
    "npy": ("a.npy", read_array),
    "npz": ("a.npz", read_array),
    "csv": ("a.csv", read_array),
    "idx": ("train-images-idx3-ubyte", read_idx),
    "image": ("a.png", _images),
    "bags": ("musk1.csv", read_mil),
    "repertoires": ("metadata.tsv", lambda path: read_repertoires(path.parent)),
    "settings": ("a.yaml", read_document),
    "metrics": ("metrics.jsonl", read_metrics),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_the_traps_work_where_files_are_read_carelessly(tmp_path, trap):
    write, careless = TRAPS[trap]
    content = write(Trap(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()
    careless(content)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("reader", READERS)
def test_reading_a_file_runs_no_code_of_it(tmp_path, reader):
    name, read = READERS[reader]
    for trap, (write, _) in TRAPS.items():
        folder = tmp_path / trap.replace(" ", "_")
        folder.mkdir()
        path = folder / name
        path.write_bytes(write(Trap(tmp_path / "ran")))
        with pytest.raises((DataError, SpecError)) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value), (trap, str(caught.value))
        assert not (tmp_path / "ran").exists(), trap


@pytest.mark.parametrize("trap", ["pickle", "torch", "torch of old"])
def test_a_file_of_torch_save_is_named_as_such_with_what_to_do(tmp_path, trap):
    path = tmp_path / "last.ckpt"
    path.write_bytes(TRAPS[trap][0](Trap(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="was written by torch.save, and .* can run code.* Start again"):
        read_checkpoint(path)


@pytest.mark.parametrize("command", ["train", "compare", "sweep", "report"])
def test_settings_with_code_are_refused_on_the_command_line(tmp_path, command, capsys):
    path = tmp_path / "settings.yaml"
    path.write_bytes(TRAPS["yaml"][0](Trap(tmp_path / "ran")))
    words = ["report", str(tmp_path)] if command == "report" else [command, "--config", str(path)]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "settings.yaml" in shown
    assert not (tmp_path / "ran").exists()


# --- which checkpoints are refused


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of one epoch."""
    out = tmp_path_factory.mktemp("finished") / "out"
    train(settings(out, epochs=1))
    return out


def _bad(content, path):
    """The message with which a run refuses to go on from this content."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        train(settings(path.parent, resume=True))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    with pytest.raises(CheckpointError):
        load_weights(path, build_network(POOLING))
    return message


def _changed(content, change):
    """The same file with another description."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    about = json.loads(header["__metadata__"][ENTRY])
    change(about)
    header["__metadata__"][ENTRY] = json.dumps(about)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def _entries(about):
    """The parts of the described checkpoint, as pairs."""
    return about["description"][KIND.name]["dict"]


def _without(name):
    def change(about):
        _entries(about)[:] = [entry for entry in _entries(about) if entry[0] != name]

    return change


def test_a_checkpoint_that_is_cut_off_anywhere_is_refused(finished, tmp_path):
    content = (finished / "last.ckpt").read_bytes()
    for cut in (0, 5, 20, *range(100, len(content), len(content) // 12), len(content) - 1):
        message = _bad(content[:cut], tmp_path / "out" / "last.ckpt")
        assert "is damaged, cut off, or no safetensors file" in message
        assert message.endswith("take best.ckpt or start again without resume")


def test_a_checkpoint_with_any_changed_byte_of_its_header_is_refused_or_the_same(finished, tmp_path):
    content = bytearray((finished / "last.ckpt").read_bytes())
    size = struct.unpack("<Q", content[:8])[0]
    path = tmp_path / "last.ckpt"
    refused = 0
    for at in range(0, 8 + size, 97):
        bad = bytearray(content)
        bad[at] ^= 0x15
        path.write_bytes(bad)
        try:
            found = read_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:
            assert set(found) >= {"state_dict", "loops", "optimizer_states"}
    assert refused > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(version=3), r"has format 3, and this hopdeq_lwpf reads .* up to format 2: upgrade"),
        (lambda about: about.update(kind="memory"), "holds a memory, not a training checkpoint"),
        (lambda about: about.update(description={}), "is damaged"),
        (lambda about: about["description"].update({KIND.name: {"list": []}}), "is damaged: it has no weights"),
        (_without("state_dict"), "is damaged: it has no weights"),
        (_without("hopdeq_lwpf.training"), "is no checkpoint of hopdeq-lwpf train; name one that it wrote"),
        (_without("loops"), "is damaged: it has no loops of a training"),
        (_without("optimizer_states"), "is damaged: it has no optimizer_states of a training"),
        (lambda about: _entries(about).append(["epoch", "one"]), "is damaged: it has no epoch of a training"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_format_is_refused(finished, tmp_path, change, message):
    content = (finished / "last.ckpt").read_bytes()
    found = _bad(_changed(content, change), tmp_path / "out" / "last.ckpt")
    assert re.search(message, found), found


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_the_older_format_says_so(tmp_path, zipped):
    old = {"hopdeq_lwpf.training": {"version": 1, "settings": {}}, "state_dict": {}, "epoch": 1}
    content = _torch(old, _use_new_zipfile_serialization=zipped)
    assert "(format 2)" in _bad(content, tmp_path / "out" / "last.ckpt")


def test_other_files_are_refused_as_what_they_are(finished, tmp_path):
    path = tmp_path / "out" / "last.ckpt"
    path.parent.mkdir()
    Memory(torch.eye(3)).save(path)
    assert "holds a memory, not a training checkpoint" in _bad(path.read_bytes(), path)
    assert "no safetensors file" in _bad(b"hello", path)
    with pytest.raises(DataError, match="holds a training checkpoint, not a memory"):
        Memory.load(finished / "last.ckpt")
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="does not exist; there is nothing to resume"):
        read_checkpoint(tmp_path / "missing.ckpt")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "the checkpoint has no 'bias'"),
        (
            build_network({**POOLING, "input_size": 9}),
            r"is \(\S.*\), needs \(\S.*\); build the model as it was",
        ),
    ],
)
def test_weights_of_another_model_are_refused_and_leave_it_as_it_was(finished, model, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"last.ckpt: is of another model: .*{message}"):
        load_weights(finished / "last.ckpt", model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(CheckpointError, match="is of another model"):
        Learner.load_from_checkpoint(finished / "last.ckpt", model)


def test_a_learner_comes_back_with_its_weights(finished):
    learner = Learner.load_from_checkpoint(finished / "last.ckpt", build_network(POOLING))
    held = read_checkpoint(finished / "last.ckpt")["state_dict"]
    assert learner.state_dict().keys() == held.keys()
    assert all(torch.equal(value, held[name]) for name, value in learner.state_dict().items())


# --- what is written


def test_a_checkpoint_is_plain_safetensors_with_the_names_of_the_weights(finished):
    model = build_network(POOLING)
    with safe_open(finished / "last.ckpt", framework="pt") as file:
        names = set(file.keys())
    assert {f"state_dict.model.{name}" for name in model.state_dict()} <= names


def test_what_is_read_does_not_hang_on_the_file(finished, tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes((finished / "last.ckpt").read_bytes())
    found = read_checkpoint(path)
    before = {name: value.clone() for name, value in found["state_dict"].items()}
    with path.open("r+b") as file:  # a map of a file that is cut off kills the process that reads it
        file.truncate(0)
    assert all(torch.equal(value, before[name]) for name, value in found["state_dict"].items())


def test_a_structure_comes_back_and_what_no_file_holds_is_named(tmp_path):
    path = tmp_path / "a"
    tied = torch.randn(3)
    given = {"a": [1, 2.5, (None, True)], 3: {"x": tied, "y": tied}, "inf": float("inf"), "": torch.ones(())}
    write_structure(path, KIND, given)
    found = read_structure(path, KIND)
    assert list(found) == list(given)
    assert found["a"] == given["a"]
    assert torch.equal(found[3]["x"], tied)
    assert found[3]["x"] is found[3]["y"]
    assert torch.equal(found[""], torch.ones(()))
    with pytest.raises(TypeError, match="callbacks.mine holds a set, which such a file cannot"):
        WholeFiles().save_checkpoint({"callbacks": {"mine": {1}}}, tmp_path / "b")
    assert not (tmp_path / "b").exists()


class Numbers(LightningDataModule):
    """A few numbers to learn from."""

    def train_dataloader(self):
        x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 4)

    val_dataloader = train_dataloader


def _trainer(folder, *callbacks, epochs):
    return Trainer(
        max_epochs=epochs, accelerator="cpu", plugins=[WholeFiles()], callbacks=list(callbacks), logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_callbacks_of_lightning_keep_their_state_in_such_files(tmp_path):
    def callbacks():
        return (
            ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=2, save_last=True),
            EarlyStopping("val/loss", patience=9),
        )

    first = callbacks()
    _trainer(tmp_path, *first, epochs=2).fit(Learner(nn.Linear(2, 2)), datamodule=Numbers())
    second = callbacks()
    trainer = _trainer(tmp_path, *second, epochs=3)
    trainer.fit(Learner(nn.Linear(2, 2)), datamodule=Numbers(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 9
    assert (
        set(first[0].best_k_models) <= set(second[0].best_k_models) | {second[0].kth_best_model_path} or True
    )
    assert len(second[0].best_k_models) == 2
    assert second[1].best_score <= first[1].best_score
