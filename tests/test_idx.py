"""IDX files: against files made byte by byte, and everything that can be wrong with them; as patterns."""

import gzip
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hopdeq_lwpf.data import DataError, read_array, read_idx, read_indices
from hopdeq_lwpf.data.idx import IDX_TYPES, is_idx_name, read_idx_rows

LEVELS = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)


# --- the format

PACKED = {0x08: "B", 0x09: "b", 0x0B: "h", 0x0C: "i", 0x0D: "f", 0x0E: "d"}
TORCH = {
    0x08: torch.uint8,
    0x09: torch.int8,
    0x0B: torch.int16,
    0x0C: torch.int32,
    0x0D: torch.float32,
    0x0E: torch.float64,
}


def idx(code, shape, numbers):
    """An IDX file, byte by byte."""
    head = bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    return head + struct.pack(f">{len(numbers)}{PACKED[code]}", *numbers)


def test_the_table_of_types_is_complete():
    assert set(PACKED) == set(TORCH) == set(IDX_TYPES)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("code", PACKED)
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 3, 2, 1), (0,), (2, 0, 3)])
def test_every_type_and_shape_is_read(tmp_path, code, shape, packed):
    count = int(np.prod(shape))
    numbers = [3, 1, 4, 1, 5, 100][:count] if code == 0x08 else [-3, 1, -4, 1, 5, 100][:count]
    content = idx(code, shape, numbers)
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(content) if packed else content)
    array = read_idx(path)
    assert array.shape == shape
    assert array.dtype == TORCH[code]
    assert array.reshape(-1).tolist() == numbers
    array.fill_(1)  # a tensor of its own, not a read-only view


@given(
    st.sampled_from(list(PACKED)).flatmap(
        lambda code: st.tuples(
            st.just(code),
            st.lists(
                {
                    "B": st.integers(0, 255),
                    "b": st.integers(-128, 127),
                    "h": st.integers(-(2**15), 2**15 - 1),
                    "i": st.integers(-(2**31), 2**31 - 1),
                    "f": st.floats(width=32, allow_nan=False),
                    "d": st.floats(allow_nan=False),
                }[PACKED[code]],
                max_size=20,
            ),
        )
    )
)
def test_numbers_come_back_exactly(tmp_path_factory, case):
    code, numbers = case
    path = tmp_path_factory.getbasetemp() / "numbers.idx"
    path.write_bytes(idx(code, (len(numbers),), numbers))
    assert read_idx(path).tolist() == numbers


GOOD = idx(0x08, (2, 3), [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (GOOD[:3], "no IDX file: it has 3 bytes"),
        (b"\x89PNG....", "no IDX file: it begins with 89 50 4e 47"),
        (b"\0\0\x0a\x01\0\0\0\0", "no IDX file: it begins with 00 00 0a 01"),
        (b"\0\1\x08\x01\0\0\0\0", "no IDX file"),
        (b"\0\0\x08\x41" + bytes(4 * 65), "has 65 dimensions"),
        (GOOD[:9], "cut off within its header of 2 dimensions"),
        (GOOD[:-1], "cut off: its header says 2x3 numbers of 1 bytes"),
        (GOOD + b"\0", "goes on after its last number"),
        (idx(0x0E, (2,), [1.0, 2.0])[:-8], "cut off: its header says 2 numbers of 8 bytes"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_bad_idx_file_says_what_was_found(tmp_path, content, message, packed):
    path = tmp_path / "a-idx"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_damaged_packing_is_one_line(tmp_path):
    content = bytearray(gzip.compress(idx(0x08, (4000,), list(range(250)) * 16)))
    for name, changed in {
        "cut": content[: len(content) // 2],
        "sum": content[:-8] + bytes(8),
        "bits": content[:12] + b"\xff\xff\xff\xff" + content[16:],
    }.items():
        path = tmp_path / f"{name}.gz"
        path.write_bytes(changed)
        with pytest.raises(DataError, match="damaged or cut off"):
            read_idx(path)
    with pytest.raises(DataError, match="No such file"):
        read_idx(tmp_path / "missing")
    with pytest.raises(DataError, match="directory"):
        read_idx(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (2**31,), (3_000_000,)])
def test_a_claim_that_the_file_does_not_hold_costs_no_memory(tmp_path, shape, packed):
    content = idx(0x08, shape, [1] * 5000)
    path = tmp_path / "a"
    # packed without compression, so that the claim of 3 million bytes is possible and the reading is tried
    path.write_bytes(gzip.compress(content, 0) if packed else content)
    tracemalloc.start()
    try:
        possible = not packed or shape == (3_000_000,)  # 5000 packed bytes cannot stand for the others
        with pytest.raises(
            DataError, match="cut off" if possible else "cut off: .* and the file has at most"
        ):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 2.5e6
    finally:
        tracemalloc.stop()


def test_reading_a_packed_file_of_several_pieces(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 256, 2_500_000, dtype=np.uint8)
    head = idx(0x08, (2500, 1000), [])
    path = tmp_path / "big.gz"
    path.write_bytes(gzip.compress(head + numbers.tobytes(), 1))
    assert zlib.crc32(read_idx(path).numpy().tobytes()) == zlib.crc32(numbers.tobytes())


@pytest.mark.parametrize(
    ("name", "yes"),
    [
        ("train-images-idx3-ubyte", True),
        ("train-images.idx3-ubyte", True),
        ("t10k-images-idx3-ubyte.gz", True),
        ("a.idx", True),
        ("A-IDX1-UBYTE", True),
        ("emnist.gz", True),
        ("midx.bin", False),
        ("a.txt", False),
        ("idxs", False),
    ],
)
def test_idx_files_are_known_by_name(name, yes):
    assert is_idx_name(f"idx/{name}") is yes


# --- as patterns


def test_a_folder_and_an_idx_file_are_matrices(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    save(folder / "a.png", LEVELS)
    save(folder / "b.png", 255 - LEVELS)
    by_hand = torch.tensor([[0, 0.2, 0.4, 0.6, 0.8, 1.0], [1.0, 0.8, 0.6, 0.4, 0.2, 0]])
    # 51 k / 255 and k / 5 are the same number, rounded once more in float32
    assert torch.allclose(read_array(folder), by_hand, rtol=0, atol=1e-7)
    path = tmp_path / "t-images-idx3-ubyte.gz"
    pixels = [*LEVELS.reshape(-1).tolist(), *(255 - LEVELS).reshape(-1).tolist()]
    path.write_bytes(gzip.compress(idx(0x08, (2, 2, 3), pixels)))
    assert torch.equal(read_array(path), read_array(folder))
    assert torch.equal(
        read_array(path, dtype=torch.float64), torch.tensor(pixels).reshape(2, 6).double() / 255
    )
    with pytest.raises(DataError, match="rows of 6 numbers, but the patterns have 7"):
        read_array(path, width=7)


def test_numbers_that_are_no_bytes_stay_as_they_are(tmp_path):
    path = tmp_path / "a.idx"
    path.write_bytes(idx(0x0D, (2, 2), [0.5, -3.0, float("nan"), 300.0]))
    assert read_array(path, finite=False).nan_to_num(7.0).tolist() == [[0.5, -3.0], [7.0, 300.0]]
    with pytest.raises(DataError, match="row 1 .*NaN"):
        read_array(path)
    assert read_idx_rows(path).dtype == torch.float32


def test_labels_are_no_patterns_but_may_be_indices(tmp_path):
    path = tmp_path / "labels-idx1-ubyte"
    path.write_bytes(idx(0x08, (3,), [2, 0, 1]))
    with pytest.raises(DataError, match="these may be labels"):
        read_array(path)
    assert read_indices(path, count=3, limit=3).tolist() == [2, 0, 1]
    path.write_bytes(idx(0x08, (0, 3), []))
    with pytest.raises(DataError, match="is empty"):
        read_array(path)


def test_a_name_of_no_known_kind_lists_the_kinds(tmp_path):
    with pytest.raises(
        DataError, match=r"must end in one of \.npy, \.npz, \.csv, or be that of an IDX file or of"
    ):
        read_array(tmp_path / "a.txt")


def test_huge_sizes_beside_an_empty_one_are_refused(tmp_path):
    path = tmp_path / "huge-idx3"
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 0, 2**32 - 1, 2**32 - 1))
    with pytest.raises(DataError, match="more than an array can have"):
        read_idx(path)
