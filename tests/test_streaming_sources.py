"""Stored patterns in a mapped file: what is refused, and what stays out of memory."""

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import F64, normal
from references import exactly
from safetensors.torch import save_file
from torch.testing import assert_close

from hopdeq_lwpf import open_patterns, retrieve
from hopdeq_lwpf.data import DataError
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.streaming.files import FilePatterns
from hopdeq_lwpf.streaming.sources import LARGEST_BLOCK

N, D = 23, 4


@pytest.fixture
def saved(tmp_path):
    """A .npy file of float64 patterns."""
    np.save(tmp_path / "patterns.npy", normal(N, D).numpy())
    return tmp_path / "patterns.npy"


def recalled(patterns, dtype=F64):
    # A tracked median asks for single rows, too.
    return retrieve(normal(5, D, seed=2).to(dtype), patterns, forgetting=PFU(tracked=True), steps=2).value


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_mapped_file_is_the_array_in_it(tmp_path, dtype, kind):
    array = normal(N, D).numpy().astype(dtype)
    np.save(tmp_path / "a.npy", array)
    source = open_patterns(kind(tmp_path / "a.npy"), block=7)
    assert source.shape == (N, D)
    assert source.ndim == 2
    assert len(source) == N
    exactly(torch.cat(list(source.blocks(7))), torch.from_numpy(array))
    exactly(source.rows(torch.tensor([3, 0, 22, 3])), torch.from_numpy(array[[3, 0, 22, 3]]))
    # The patterns are widened exactly, so that only the order of the sums differs.
    assert_close(recalled(source), recalled(torch.from_numpy(array).double()), rtol=0, atol=1e-13)
    assert (
        repr(source) == f"open_patterns({str(tmp_path / 'a.npy')!r}): 23 patterns of width 4, {source.dtype}"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_safetensors_file_with_one_matrix_or_one_called_patterns(tmp_path, dtype):
    patterns = normal(N, D).to(dtype)
    save_file({"anything": patterns}, tmp_path / "one.safetensors")
    save_file(
        {"a": torch.zeros(3), "patterns": patterns, "z": patterns.long()}, tmp_path / "more.safetensors"
    )
    for name in ("one", "more"):
        source = open_patterns(tmp_path / f"{name}.safetensors", block=7)
        exactly(torch.cat(list(source.blocks(7))), patterns)
        assert_close(recalled(source), recalled(patterns.double()), rtol=0, atol=1e-13)


def test_the_file_is_not_written(saved):
    before = saved.read_bytes()
    source = open_patterns(saved)
    source.tensor.zero_()
    assert saved.read_bytes() == before
    exactly(open_patterns(saved).tensor, normal(N, D))


def header(text, numbers=64):
    """A .npy file with this header."""
    line = text.encode("latin1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + bytes(8 * numbers)


def dictionary(shape, descr="'<f8'", order=False):
    return header(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}")


DAMAGED = {
    "nothing": b"",
    "text": b"1,2,3\n4,5,6\n",
    "pickle": pickle.dumps({"a": 1}),
    "zip": b"PK\x03\x04" + bytes(90),
    "version": b"\x93NUMPY\x09\x00" + bytes(100),
    "no dictionary": header("()"),
    "open bracket": header("(" * 90),
    "zero byte": header("\x00"),
    "negative": dictionary((-2, 4)),
    "too large": dictionary((2**61, 4)),
    "far too large": dictionary((10**30, 4)),
    "fraction": dictionary((2.5, 4)),
    "truth": dictionary((True, 4)),
    "dtype": dictionary((2, 4), "'nothing'"),
    "cut off": dictionary((17, 4)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_npy_file_is_one_line_that_names_it(tmp_path, name):
    path = tmp_path / "bad.npy"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(DataError) as told:
        open_patterns(path)
    assert str(told.value).startswith(f"{path}: is damaged, cut off, or no .npy file (")
    assert "\n" not in str(told.value)


def test_every_cut_of_a_file_is_noticed(saved, tmp_path):
    whole = saved.read_bytes()
    save_file({"a": normal(3, 2)}, tmp_path / "a.safetensors")
    packed = (tmp_path / "a.safetensors").read_bytes()
    for content, suffix in ((whole, "npy"), (packed, "safetensors")):
        path = tmp_path / f"cut.{suffix}"
        for length in {*range(0, len(content), 7), len(content) - 1}:
            path.write_bytes(content[:length])
            with pytest.raises(DataError, match="damaged, cut off, or no"):
                open_patterns(path)
        path.write_bytes(content)
        assert open_patterns(path).width in (D, 2)


class Trap:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_objects_in_a_file_are_refused_and_run_no_code(tmp_path):
    trace = tmp_path / "trace"
    np.save(tmp_path / "a.npy", np.array([[Trap(trace)]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="objects"):
        open_patterns(tmp_path / "a.npy")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.asfortranarray(np.ones((3, 4))), "column by column or with bytes swapped"),
        (np.ones((3, 4), dtype=">f8"), "column by column or with bytes swapped"),
        (np.ones((3, 4), dtype=np.int64), "needs float64, float32 or float16, got int64"),
        (np.ones((3, 4), dtype=bool), "got bool"),
        (np.ones((3, 4), dtype=complex), "got complex128"),
        (np.ones((3, 4), dtype=np.longdouble), "needs float64"),
        (np.ones((3, 4), dtype="f8,f8"), "needs float64"),
        (np.ones(4), r"needs a matrix of real numbers, one pattern a row; it holds \(4,\)"),
        (np.ones(()), r"it holds \(\)"),
        (np.ones((2, 3, 4)), r"it holds \(2, 3, 4\)"),
        (np.ones((0, 4)), r"it holds \(0, 4\)"),
        (np.ones((4, 0)), r"it holds \(4, 0\)"),
    ],
)
def test_an_array_that_cannot_be_patterns_is_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=message):
        open_patterns(tmp_path / "a.npy")


def test_one_row_or_one_column_has_no_order(tmp_path):
    for shape in ((1, 4), (4, 1)):
        np.save(tmp_path / "a.npy", np.asfortranarray(normal(*shape).numpy()))
        exactly(open_patterns(tmp_path / "a.npy").tensor, normal(*shape))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, r"holds 2 tensors \['a', 'b'\]; name one of them"),
        ({}, "holds 0 tensors"),
        ({"patterns": torch.ones(2, 2, dtype=torch.int64)}, "needs a matrix of real numbers"),
        ({"patterns": torch.ones(4)}, "needs a matrix"),
        ({"patterns": torch.ones(0, 4)}, "needs a matrix"),
    ],
)
def test_a_safetensors_file_that_cannot_be_patterns_is_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=message):
        open_patterns(tmp_path / "a.safetensors")


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_a_file_that_is_not_there_or_is_a_folder(tmp_path, suffix):
    with pytest.raises(DataError, match="No such file"):
        open_patterns(tmp_path / f"none.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        open_patterns(tmp_path / f"folder.{suffix}")


def test_other_suffixes_and_blocks_are_refused(saved):
    with pytest.raises(DataError, match="must end in one of .npy, .safetensors"):
        open_patterns("patterns.csv")
    for block in (0, -1, 2.0, True, "7"):
        with pytest.raises(ValueError, match="block must be None or an integer >= 1"):
            open_patterns(saved, block=block)


def test_a_copy_maps_the_file_again(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    source = open_patterns(saved.name, block=5)
    packed = pickle.dumps(source)
    assert len(packed) < 200 + len(str(saved))  # the name, not the numbers
    monkeypatch.chdir("/")
    for again in (pickle.loads(packed), copy.deepcopy(source), copy.copy(source)):
        assert isinstance(again, FilePatterns)
        assert again.block == 5
        exactly(again.tensor, source.tensor)
        exactly(recalled(again), recalled(source))
    saved.unlink()
    with pytest.raises(DataError, match="No such file"):
        pickle.loads(packed)


def own_memory():
    """MB of this process that lie in no file."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1e3
    raise AssertionError("the system does not say")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_a_large_file_stays_out_of_memory(tmp_path, suffix):
    count, width = 2**18, 64  # 64 MiB in float32, whose scores with 64 queries are another 64 MiB
    patterns = torch.zeros(count, width).index_put_(
        (torch.arange(count), torch.arange(count) % width), torch.ones(())
    )
    path = tmp_path / f"large.{suffix}"
    if suffix == "npy":
        np.save(path, patterns.numpy())
    else:
        save_file({"a": patterns}, path)
    del patterns
    watched = []

    class Watched(FilePatterns):
        def blocks(self, size):
            for part in super().blocks(size):
                yield part
                watched.append(own_memory())

    query = torch.eye(width)[:, torch.randperm(width)].requires_grad_()
    opened = open_patterns(path)

    def recall(source):
        recall = retrieve(query, source, beta=20.0, forgetting="pfu", steps=2)
        recall.value.sum().backward()
        return recall.value

    recall(Watched(path, opened.tensor[: 2**15]))  # what torch keeps for its products and threads
    before = own_memory()
    watched.clear()
    value = recall(Watched(path, opened.tensor))
    assert (
        len(watched) >= 5 * count / LARGEST_BLOCK
    )  # three passes of the median, two of the softmax, and more
    # A block of scores is 2 MiB, of which a pass needs a few; half of the file would be 32.
    assert max(watched) - before < 30
    assert_close(value, query.detach(), rtol=0, atol=1e-4)


def test_values_may_lie_in_a_file_too(saved, tmp_path):
    np.save(tmp_path / "values.npy", normal(N, 2, seed=5).float().numpy())
    values = open_patterns(tmp_path / "values.npy")
    query = normal(3, D, seed=2)
    expected = retrieve(query, normal(N, D), values=values.tensor.double(), steps=2).value
    got = retrieve(query, open_patterns(saved, block=5), values=values, steps=2).value
    assert_close(got, expected, rtol=0, atol=1e-13)
