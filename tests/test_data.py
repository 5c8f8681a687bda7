"""The digits, seeded corruption, files of arrays, and the preparation of patterns."""

import os
import zipfile

import numpy as np
import pytest
import torch

from hopdeq_lwpf.data import (
    CORRUPTIONS,
    NORMALIZATIONS,
    DataError,
    Preprocessing,
    corrupt,
    load_digits,
    read_array,
    read_indices,
    replacing,
    staged_folder,
    write_arrays,
)
from hopdeq_lwpf.sweeps import spec


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_digits_are_those_of_the_repository():
    pictures, labels = load_digits()
    assert pictures.shape == (1797, 64)
    assert pictures.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert float(pictures.min()) == 0
    assert float(pictures.max()) == 1
    assert int((pictures.double() * 16).sum()) == 561718
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # The first line of the published file.
    assert (pictures[0] * 16)[:16].tolist() == [0, 0, 5, 13, 9, 1, 0, 0, 0, 0, 13, 15, 10, 15, 5, 0]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_same_seed_gives_the_same_queries(kind):
    pictures = load_digits()[0][:20]
    before = pictures.clone()
    first, again = (corrupt(pictures, kind, 0.3, generator=generator(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(pictures, before)
    other = corrupt(pictures, kind, 0.3, generator=generator(8))
    assert torch.equal(first, other) == (kind == "occlude")  # the only one without chance


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_level_zero_changes_nothing(kind):
    pictures = load_digits()[0][:5]
    assert torch.equal(corrupt(pictures, kind, 0.0, generator=generator()), pictures)


def test_masking_clears_the_stated_share_of_every_row():
    ones = torch.ones(50, 64)
    masked = corrupt(ones, "mask", 0.25, generator=generator())
    assert ((masked == 0).sum(-1) == 16).all()
    assert (masked == 0).any(0).all()  # at places that vary
    weaker = corrupt(ones, "mask", 0.1, generator=generator())
    assert (masked <= weaker).all()  # the same draws: a stronger mask covers a weaker one


def test_occlusion_hides_the_lower_half():
    hidden = corrupt(torch.ones(3, 64), "occlude", 0.5, generator=generator()).reshape(3, 8, 8)
    assert (hidden[:, :4] == 1).all()
    assert (hidden[:, 4:] == 0).all()


def test_noise_has_the_stated_deviation_of_the_range():
    data = torch.zeros(400, 64)
    noise = corrupt(data, "noise", 0.3, generator=generator(), limits=(-1.0, 1.0))
    assert abs(float(noise.std()) - 0.6) < 0.01
    assert abs(float(noise.mean())) < 0.01
    double = corrupt(data.double(), "noise", 0.3, generator=generator(), limits=(-1.0, 1.0))
    assert torch.allclose(double.float(), noise)


def test_flips_mirror_the_stated_share():
    data = torch.full((30, 64), 0.2)
    flipped = corrupt(data, "flip", 0.5, generator=generator())
    assert torch.allclose(flipped[flipped != 0.2], torch.tensor(0.8))
    assert ((flipped != 0.2).sum(-1) == 32).all()
    signs = torch.tensor([[1.0, -1.0]])
    assert torch.equal(corrupt(signs, "flip", 1.0, generator=generator(), limits=(-1, 1)), -signs)


@pytest.mark.parametrize(
    ("kind", "level", "message"),
    [
        ("nois", 0.1, "Did you mean 'noise'"),
        ("mask", 1.5, "from 0 to 1"),
        ("flip", -0.1, "from 0 to 1"),
        ("noise", -1.0, "at least 0"),
        ("noise", float("nan"), "at least 0"),
    ],
)
def test_corruption_refuses(kind, level, message):
    with pytest.raises(ValueError, match=message):
        corrupt(torch.zeros(2, 4), kind, level, generator=generator())


def test_names_known_without_torch_are_those_of_the_code():
    assert set(spec.KINDS) == set(CORRUPTIONS)
    assert spec.NORMALIZE == NORMALIZATIONS


def test_normalisation_centres_and_scales():
    pictures = load_digits()[0]
    stored = Preprocessing.fit(pictures, "center-unit")
    assert torch.allclose(stored(pictures).norm(dim=-1), torch.ones(1797), atol=1e-5)
    centred = Preprocessing.fit(pictures, "center")
    assert float(centred(pictures).mean(0).abs().max()) < 1e-5
    assert torch.allclose(centred.inverse(centred(pictures)), pictures, atol=1e-6)
    assert torch.equal(Preprocessing.fit(pictures, "none")(pictures), pictures)
    # The mean itself has no direction, and stays finite.
    assert torch.equal(stored(stored.mean[None]), torch.zeros(1, 64))
    # A row of median length comes back as it was.
    row = (pictures - stored.mean).norm(dim=-1).sub(stored.scale).abs().argmin()
    assert torch.allclose(stored.inverse(stored(pictures[row : row + 1])), pictures[row : row + 1], atol=1e-5)
    with pytest.raises(ValueError, match="Did you mean 'center'"):
        Preprocessing.fit(pictures, "centre")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_what_is_written_is_read(tmp_path, suffix):
    data = torch.randn(5, 3, generator=generator())
    path = tmp_path / f"a{suffix}"
    write_arrays(path, {"value": data, "steps": torch.arange(5)}, main="value")
    assert torch.equal(read_array(path, names=("value",), width=3), data)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_header_and_whole_numbers_are_fine(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x, y\n1,2\n\n3,4e-1\n")
    assert torch.equal(read_array(path), torch.tensor([[1, 2], [3, 0.4]]))
    np.save(tmp_path / "a.npy", np.array([[1, 2]], dtype=np.uint8))
    assert read_array(tmp_path / "a.npy").dtype == torch.float32


def test_an_archive_is_searched_by_name(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, patterns=np.ones((2, 3)), other=np.zeros((4, 3)))
    assert read_array(path, names=("patterns",)).shape == (2, 3)
    with pytest.raises(
        DataError, match=r"holds 2 arrays \['other', 'patterns'\]; name one of them 'queries'"
    ):
        read_array(path, names=("queries",))


def _cut(path, source):
    whole = source.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def _bad_files(folder):
    """Every way in which a file can be wrong: (path, what the message says)."""
    good = np.arange(600.0).reshape(100, 6)
    np.save(folder / "good.npy", good)
    np.savez(folder / "good.npz", good)
    (folder / "empty.npy").touch()
    (folder / "empty.csv").touch()
    (folder / "header.csv").write_text("a,b,c\n")
    _cut(folder / "cut.npy", folder / "good.npy")
    _cut(folder / "cut.npz", folder / "good.npz")
    damaged = bytearray((folder / "good.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (folder / "damaged.npz").write_bytes(damaged)
    (folder / "cut.csv").write_text("1,2,3,4,5,6\n1,2,3\n")
    (folder / "words.csv").write_text("1,2,3\n4,five,6\n")
    (folder / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    (folder / "text.npy").write_text("this is no array")
    np.save(folder / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(folder / "strings.npy", np.array([["a", "b"]]))
    np.save(folder / "complex.npy", np.ones((2, 2), dtype=complex))
    np.save(folder / "vector.npy", np.ones(4))
    np.save(folder / "cube.npy", np.ones((2, 3, 4)))
    np.save(folder / "none.npy", np.ones((0, 6)))
    np.save(folder / "nan.npy", np.where(good == 7, np.nan, good))
    np.save(folder / "wide.npy", np.ones((2, 7)))
    with zipfile.ZipFile(folder / "other.npz", "w") as archive:
        archive.writestr("a.txt", "no array")
    (folder / "folder.npy").mkdir()
    return {
        "missing.npy": "No such file",
        "a.txt": "must end in",
        "empty.npy": "is empty",
        "empty.csv": "is empty",
        "header.csv": "holds no numbers",
        "cut.npy": "cut off",
        "cut.npz": "cut off",
        "damaged.npz": "damaged",
        "cut.csv": "line 2 has 3 numbers",
        "words.csv": "line 2 holds 'five'",
        "binary.csv": "not a text file",
        "text.npy": "no .npy file",
        "object.npy": "no .npy file .Object arrays",
        "strings.npy": "real numbers",
        "complex.npy": "real numbers",
        "vector.npy": "needs a matrix",
        "cube.npy": "reshape it to .2, 12.",
        "none.npy": "is empty",
        "nan.npy": "row 1 ",
        "wide.npy": "rows of 7 numbers, but the patterns have 6",
        "other.npz": "holds 'a.txt', which is no array",
        "folder.npy": "directory",
    }


def test_every_bad_file_is_one_line(tmp_path):
    for name, message in _bad_files(tmp_path).items():
        with pytest.raises(DataError, match=message) as caught:
            read_array(tmp_path / name, width=6)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_queries_may_hold_nan_where_that_is_allowed(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[np.nan, 1.0]]))
    assert read_array(tmp_path / "a.npy", finite=False).isnan().tolist() == [[True, False]]


def test_indices(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("3\n0\n2\n")
    assert read_indices(path, count=3, limit=4).tolist() == [3, 0, 2]
    for text, message in (
        ("3\n0\n", "for each of the 3"),
        ("0\n1\n4\n", "from 0 to 3"),
        ("0\n1\n.5\n", "whole"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_indices(path, count=3, limit=4)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_study_leaves_no_folder(tmp_path):
    def study():
        with staged_folder(tmp_path / "deep" / "out") as folder:
            (folder / "a").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study()
    assert os.listdir(tmp_path / "deep") == []
    with staged_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
        assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path / "out") == ["a"]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="needs a folder"), staged_folder(tmp_path / "file"):
        pass


@pytest.mark.parametrize(
    ("name", "message"), [("a.pt", "must end in"), ("nowhere/a.npy", "does not exist"), ("f.npy", "folder")]
)
def test_writing_refuses(tmp_path, name, message):
    (tmp_path / "f.npy").mkdir()
    with pytest.raises(DataError, match=message):
        write_arrays(tmp_path / name, {"value": torch.zeros(1, 1)}, main="value")
