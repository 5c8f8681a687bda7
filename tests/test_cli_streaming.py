"""`hopdeq-lwpf retrieve` over patterns in a file that is mapped, not read."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hopdeq_lwpf.cli import main
from hopdeq_lwpf.data import load_digits
from hopdeq_lwpf.sweeps import recall_files


@pytest.fixture
def files(tmp_path):
    """Ten patterns and four queries near the first ones; the paths as options."""
    patterns = load_digits()[0][:10]
    np.save(tmp_path / "patterns.npy", patterns.numpy())
    np.save(tmp_path / "queries.npy", (patterns[:4] + 0.05).numpy())
    return ["--patterns", str(tmp_path / "patterns.npy"), "--queries", str(tmp_path / "queries.npy")]


def complaint(capsys):
    return capsys.readouterr().err


def recalled(files, out, *more):
    assert main(["retrieve", *files, "--out", str(out), "--beta", "3", "--forgetting", "pfu", *more]) == 0
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("stream", ["null", "true", "false"])
def test_patterns_of_a_large_file_are_mapped_where_that_is_asked_for(files, tmp_path, monkeypatch, stream):
    np.save(tmp_path / "values.npy", np.arange(20.0).reshape(10, 2))
    values = ["--values", str(tmp_path / "values.npy")]
    expected, read = (recalled(files, tmp_path / "out.npz", *more) for more in ([], values))
    mapped, size = [], (tmp_path / "patterns.npy").stat().st_size
    monkeypatch.setattr(recall_files, "MAP_FROM", size)
    open_patterns = recall_files.open_patterns
    monkeypatch.setattr(
        recall_files, "open_patterns", lambda path: mapped.append(path) or open_patterns(path)
    )
    got = recalled(files, tmp_path / "out.npz", "--stream", stream)
    assert len(mapped) == (stream != "false")
    assert got.keys() == expected.keys()
    for name in ("value", "state", "weight", "energy"):
        assert np.allclose(got[name], expected[name], atol=1e-5), name
    for name in ("index", "support", "converged"):
        assert (got[name] == expected[name]).all(), name
    got = recalled(files, tmp_path / "out.npz", "--stream", stream, *values)
    assert len(mapped) == 3 * (stream != "false")
    assert np.allclose(got["value"], read["value"], atol=1e-5)
    assert read["value"].shape == (4, 2)
    # What is normalised is another array than that of the file, and lies in memory.
    recalled(files, tmp_path / "out.npz", "--stream", stream, "--normalize", "unit")
    assert len(mapped) == 3 * (stream != "false")


@pytest.mark.parametrize("more", [[], ["--stream", "true"], ["--stream", "false"], ["--normalize", "unit"]])
def test_patterns_may_lie_in_a_safetensors_file(files, tmp_path, more):
    expected = recalled(files, tmp_path / "out.npz", *more)
    save_file({"patterns": torch.from_numpy(np.load(tmp_path / "patterns.npy"))}, tmp_path / "p.safetensors")
    got = recalled([*files, "--patterns", str(tmp_path / "p.safetensors")], tmp_path / "out.npz", *more)
    assert np.allclose(got["value"], expected["value"], atol=1e-5)
    bad = torch.from_numpy(np.load(tmp_path / "patterns.npy")).index_fill(0, torch.tensor(3), torch.nan)
    save_file({"patterns": bad}, tmp_path / "p.safetensors")
    arguments = ["retrieve", *files, "--patterns", str(tmp_path / "p.safetensors")]
    assert main([*arguments, "--out", str(tmp_path / "out.npz"), *more]) == (0 if "true" in more else 2)


def test_what_cannot_be_mapped_is_read_unless_it_must_not_be(files, tmp_path, monkeypatch, capsys):
    whole = (np.load(tmp_path / "patterns.npy") * 16).astype(np.int64)
    np.save(tmp_path / "whole.npy", whole)
    monkeypatch.setattr(recall_files, "MAP_FROM", 1)
    arguments = [*files, "--patterns", str(tmp_path / "whole.npy")]
    assert recalled(arguments, tmp_path / "out.npz")["index"].shape == (4,)
    out = ["--out", str(tmp_path / "out.npz")]
    assert main(["retrieve", *arguments, *out, "--stream", "true"]) == 2
    assert "needs float64, float32 or float16, got int64" in complaint(capsys)
    assert main(["retrieve", *files, *out, "--stream", "true", "--separation", "sparsemax"]) == 2
    assert "streamed patterns go with 'softmax' and 'softmax1'" in complaint(capsys)
    assert main(["retrieve", *files, *out, "--separation", "sparsemax"]) == 0
    capsys.readouterr()
    assert main(["retrieve", *files, *out, "--separation", "sparsemix"]) == 2
    assert "Did you mean 'sparsemax'" in complaint(capsys)
    assert main(["retrieve", *files, *out, "--stream", "maybe"]) == 2
    assert "stream" in complaint(capsys)
