"""Memories on disk, of images and of IDX files, in Python and on the command line."""

import gzip
import json
import os
import struct

import numpy as np
import pytest
import torch
from memories import DTYPES, READ, trees
from PIL import Image
from problems import normal

from hopdeq_lwpf import Memory
from hopdeq_lwpf.cli import main
from hopdeq_lwpf.data import DataError
from hopdeq_lwpf.data.tensors import ENTRY, write_tensors
from hopdeq_lwpf.memory.memory import MEMORY

# --- files


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("labels", [["ash", "", "ü\n", 4], [2**70, -1, 0, 0], None])
def test_what_is_saved_is_loaded(tmp_path, dtype, values, labels):
    memory = Memory(
        normal(4, 3).to(dtype), normal(4, 2).to(dtype) if values else None, labels, duplicates="skip"
    )
    memory.remove([1, 3])
    path = tmp_path / "memory.safetensors"
    memory.save(path)
    again = Memory.load(path)
    assert again == memory
    assert repr(again) == repr(memory)
    first = again.add(normal(1, 3, seed=9).to(dtype), READ.to(dtype) if values else None, labels and [5])
    assert first.tolist() == [4]  # removed ids are not given again after loading either
    assert Memory.load(path) == memory  # the file is as it was
    again.save(path)
    assert Memory.load(path) == again


def test_an_empty_memory_comes_back(tmp_path):
    memory = Memory(torch.empty(0, 3), labels=[])
    memory.save(tmp_path / "a")
    again = Memory.load(tmp_path / "a")
    assert again == memory
    assert again.add(normal(3).float(), labels="x").tolist() == [0]


def test_a_save_that_is_cut_short_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "memory.safetensors"
    memory = trees()
    memory.save(path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Memory(normal(2, 2)).save(path)
    assert Memory.load(path) == memory
    assert os.listdir(tmp_path) == [path.name]


GOOD = {"patterns": torch.zeros(2, 3), "ids": torch.tensor([0, 4])}
ABOUT = {"labels": ["a", "b"], "next_id": 5, "duplicates": "allow"}


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        ({"ids": None}, {}, "it has patterns, and needs patterns and ids"),
        ({"patterns": None}, {}, "it has ids, and needs"),
        ({"patterns": torch.zeros(2, 3).long()}, {}, "patterns has dtype torch.int64"),
        ({"patterns": torch.zeros(2)}, {}, r"patterns has shape \(2,\)"),
        ({"patterns": torch.zeros(2, 0)}, {}, r"patterns has shape \(2, 0\)"),
        ({"patterns": torch.full((2, 3), float("nan"))}, {}, "patterns holds NaN"),
        ({"values": torch.zeros(3, 1)}, {}, r"values has shape \(3, 1\)"),
        ({"values": torch.zeros(2, 1).double()}, {}, "values has dtype torch.float64"),
        ({"ids": torch.tensor([4, 0])}, {}, "its ids are not"),
        ({"ids": torch.tensor([4, 4])}, {}, "its ids are not"),
        ({"ids": torch.tensor([4])}, {}, "its ids are not"),
        ({"ids": torch.tensor([0.0, 4.0])}, {}, "its ids are not"),
        ({"ids": torch.tensor([-1, 4])}, {}, "its next id"),
        ({}, {"next_id": 4}, "its next id is 4, and must be at least 5"),
        ({}, {"next_id": "5"}, "its next id is '5'"),
        ({}, {"duplicates": "x"}, "duplicates is 'x'"),
        ({}, {"labels": ["a"]}, "its labels are not one a pattern"),
        ({}, {"labels": "ab"}, "its labels are not one a pattern"),
        ({}, {"labels": ["a", 1.5]}, "its labels are not strings"),
        ({}, {"labels": ["a", True]}, "its labels are not strings"),
    ],
)
def test_files_whose_content_is_no_memory_are_refused(tmp_path, tensors, about, message):
    path = tmp_path / "a"
    write_tensors(path, MEMORY, GOOD, ABOUT)
    assert Memory.load(path).labels == ["a", "b"]
    changed = {name: tensor for name, tensor in {**GOOD, **tensors}.items() if tensor is not None}
    write_tensors(path, MEMORY, changed, {**ABOUT, **about})
    with pytest.raises(DataError, match=f"a: is damaged: {message}"):
        Memory.load(path)


def test_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "a"
    trees().recall(normal(2, 3)).save(path)
    with pytest.raises(
        DataError, match=r"holds a solution, not a memory; Memory\.load\(path\) reads a memory"
    ):
        Memory.load(path)
    trees().save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="cut off"):
        Memory.load(path)
    content = bytearray()
    text = json.dumps(
        {"__metadata__": {ENTRY: json.dumps({"kind": "memory", "version": 99, "description": {}})}}
    )
    content += struct.pack("<Q", len(text)) + text.encode()
    path.write_bytes(content)
    with pytest.raises(DataError, match="has format 99, and this hopdeq_lwpf reads a memory up to format 1"):
        Memory.load(path)


def test_a_loaded_memory_is_used_without_a_copy_of_its_patterns(tmp_path):
    path = tmp_path / "a"
    Memory(normal(500, 64)).save(path)
    resident = f" {path}\n"
    memory = Memory.load(path)
    with open("/proc/self/maps") if os.path.exists("/proc/self/maps") else open(os.devnull) as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.endswith(resident)]
    if not ranges:
        pytest.skip("this system does not list the maps of a process")
    address = memory.patterns.data_ptr()
    assert any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


# --- images and IDX files


@pytest.fixture
def pictures(tmp_path):
    """A folder of ten 4 x 4 images, and the same as IDX files; returns the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 4), dtype=np.uint8)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    head = bytes([0, 0, 8, 3]) + struct.pack(">3I", 10, 4, 4)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels.tobytes()))
    (tmp_path / "labels").write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", 10) + bytes(range(10, 20)))
    return torch.from_numpy(pixels)


def test_a_memory_of_images(tmp_path, pictures):
    memory = Memory.from_folder(tmp_path / "pictures")
    assert torch.equal(memory.patterns, pictures.reshape(10, 16) / 255)
    assert memory.labels == [f"{number}.png" for number in range(10)]
    recall = memory.recall(memory.patterns[[7]] + 0.01, beta=100.0)
    assert recall.labels == ["7.png"]
    small = Memory.from_folder(tmp_path / "pictures", (2, 3), mode="RGB", dtype=torch.float64)
    assert small.patterns.shape == (10, 18)
    assert small.dtype == torch.float64
    Image.fromarray(pictures[0].numpy()).save(tmp_path / "pictures" / "copy.png")
    assert len(Memory.from_folder(tmp_path / "pictures", duplicates="skip")) == 10


def test_a_memory_of_an_idx_file(tmp_path, pictures):
    memory = Memory.from_idx(tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "labels")
    assert torch.equal(memory.patterns, pictures.reshape(10, 16) / 255)
    assert memory.labels == list(range(10, 20))
    assert Memory.from_idx(tmp_path / "train-images-idx3-ubyte").labels is None
    (tmp_path / "labels").write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", 9) + bytes(9))
    with pytest.raises(
        DataError, match="needs one whole number for each of the 10 items of train-images-idx3-ubyte"
    ):
        Memory.from_idx(tmp_path / "train-images-idx3-ubyte", tmp_path / "labels")


@pytest.mark.parametrize("source", ["pictures", "train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
def test_the_command_line_takes_folders_and_idx_files(tmp_path, pictures, source, capsys):
    given = ["--patterns", str(tmp_path / source)]
    out = tmp_path / "out.npz"
    asked = [
        "--queries",
        str(tmp_path / source),
        "--out",
        str(out),
        "--beta",
        "500",
        "--normalize",
        "center-unit",
    ]
    assert main(["retrieve", *given, *asked]) == 0
    with np.load(out) as arrays:
        assert arrays["index"].tolist() == list(range(10))
        assert np.allclose(arrays["value"], pictures.reshape(10, 16) / 255, atol=1e-3)
    capsys.readouterr()


def test_a_comparison_takes_a_folder_of_images(tmp_path, pictures, capsys):
    given = ["--patterns", str(tmp_path / "pictures"), "--shape", "[4, 4]", "--samples", "5"]
    quick = ["--forgetting", "none", "--steps", "1", "--beta", "8", "--noise", "0.1", "--mask", "--flip"]
    small = ["--resamples", "20", "--trajectories", "0", "--out", str(tmp_path / "out")]
    assert main(["compare", *given, *quick, *small]) == 0
    assert (tmp_path / "out" / "report.html").exists()
    capsys.readouterr()


@pytest.mark.parametrize("command", ["retrieve", "compare"])
def test_a_bad_folder_is_one_line_on_the_command_line(tmp_path, capsys, command):
    (tmp_path / "empty").mkdir()
    given = ["--patterns", str(tmp_path / "empty"), "--queries", str(tmp_path / "empty")]
    assert main([command, *given, "--out", str(tmp_path / "out.npz")]) == 2
    said = capsys.readouterr().err.strip()
    assert "empty: holds no image" in said
    assert "\n" not in said
