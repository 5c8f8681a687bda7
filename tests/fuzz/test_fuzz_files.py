"""Files that are cut off, garbled, mislabelled or too large to be true: read, or refused by one line, never a crash."""

import gzip
import io
import json
import math
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fuzz.profiles import examples, little_memory, only_convergence_warnings, within
from hopdeq_lwpf import Memory, retrieve
from hopdeq_lwpf.data import (
    DataError,
    read_array,
    read_idx,
    read_images,
    read_indices,
    read_mil,
    read_repertoires,
)
from hopdeq_lwpf.storage import load_solution

LARGE = 2**40  # numbers: more than any machine has


def read(reader, path):
    """What the reader makes of the file; None where it says, in one line that names the file, why it cannot."""
    try:
        with within(), little_memory(), only_convergence_warnings():
            return reader(path)
    except DataError as error:
        said = str(error)
    assert str(path) in said
    assert "\n" not in said
    assert len(said) < 2000
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@st.composite
def damaged(draw, whole):
    """One of the files, as it is, cut off, with other bytes in some places, or with some more in one."""
    content = bytearray(draw(st.sampled_from(whole)))
    place = st.integers(0, max(len(content) - 1, 0))
    for at, byte in draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=4)):
        content[at] = byte
    if draw(st.booleans()):
        at = draw(place)
        content[at:at] = draw(st.binary(max_size=8))
    if draw(st.booleans()):
        del content[draw(place) :]
    return bytes(content)


# --- arrays


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), **options)
    return file.getvalue()


def npy_header(text, version=1, body=b""):
    """A .npy file with any text for a header."""
    content = text.encode("latin-1", "replace") + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(content))
    return b"\x93NUMPY" + bytes([version, 0]) + length + content + body


def npz(arrays, compress=True):
    file = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(file, **arrays)
    return file.getvalue()


def archive(entries, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        for name, content in entries.items():
            target.writestr(name, content)
    return file.getvalue()


MATRIX = np.arange(12.0).reshape(4, 3)
NPY = [
    npy(MATRIX),
    npy(MATRIX.astype(">f4")),
    npy(np.asfortranarray(MATRIX), version=(2, 0)),
    npy(np.array([["a", "b"]])),
    npy(MATRIX.astype(np.float16)),
    npy(np.array([{}], dtype=object), allow_pickle=True),
    npy(np.zeros((2, 2), dtype=[("a", "f4")])),
    npy(np.arange(3)),
    npy(np.zeros((0, 3))),
]
NPZ = [
    npz({"patterns": MATRIX}),
    npz({"patterns": MATRIX}, compress=False),
    npz({"a": MATRIX, "patterns": MATRIX}),
    npz({"a": MATRIX, "b": MATRIX}),
    archive({}),
    archive({"patterns.npy": b"nothing"}),
    archive({"patterns.txt": npy(MATRIX)}, zipfile.ZIP_BZIP2),
    archive({"patterns.npy": NPY[0]}, zipfile.ZIP_LZMA),
]
DESCRIPTIONS = st.sampled_from(
    ("<f8", "<f4", "|b1", "<i8", "<U5", "|O", "<c16", "<M8[s]", "|V0", "<f99", "", "\u00b5")
)
SIZES = st.integers(-2, 5) | st.sampled_from((2**31, 2**32, LARGE, 2**63, 2**64))


@st.composite
def npy_claims(draw):
    """A .npy file whose header says anything, with a few numbers behind it."""
    shape = tuple(draw(st.lists(SIZES, max_size=4)))
    fields = {"descr": draw(DESCRIPTIONS), "fortran_order": draw(st.booleans()), "shape": shape}
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=1)):
        fields[name] = draw(st.sampled_from((None, 3, "x", (1.5,), [2, 2], -1)))
    text = draw(st.sampled_from((repr(fields), repr(fields)[:-3], repr(fields).replace("'", '"'), "(" * 90)))
    text = draw(st.sampled_from((text, text, text, text + "L", " " * 200 + text)))
    return npy_header(text, draw(st.sampled_from((1, 2, 3, 4))), draw(st.binary(max_size=40)))


@examples(50)
@given(damaged(NPY) | npy_claims() | st.binary(max_size=40), st.booleans())
def test_npy(folder, content, finite):
    path = folder / "a.npy"
    path.write_bytes(content)
    found = read(lambda p: read_array(p, finite=finite), path)
    if found is not None:
        assert found.ndim == 2
        assert found.numel()
        assert found.dtype == torch.float32
        assert not finite or found.isfinite().all()


@examples(50)
@given(damaged(NPZ) | npy_claims().map(lambda content: archive({"patterns.npy": content})))
def test_npz(folder, content):
    path = folder / "a.npz"
    path.write_bytes(content)
    found = read(lambda p: read_array(p, names=("patterns",)), path)
    assert found is None or (found.ndim == 2 and bool(found.isfinite().all()))


CELLS = st.sampled_from(
    ("1", "-2.5", "1e400", "nan", "inf", "", " ", "x", "1_0", "\u0665", '"1"', "0x1", "1;2", "\t3 ")
)
ENDS = st.sampled_from(("\n", "\r\n", "\r", "\n\n", "\u2028", "\x0c"))


@st.composite
def tables(draw, cells=CELLS, separator=","):
    """Lines of cells, more or less of one length, in some encoding."""
    width = draw(st.integers(1, 4))
    rows = draw(
        st.lists(st.lists(cells, min_size=width, max_size=width + draw(st.integers(0, 1))), max_size=4)
    )
    end = draw(ENDS)
    text = end.join(separator.join(row) for row in rows) + draw(st.sampled_from(("", end)))
    return text.encode(draw(st.sampled_from(("utf-8", "utf-8", "utf-8-sig", "utf-16"))))


@examples(25)
@given(tables() | tables(st.text(max_size=4)) | st.binary(max_size=30))
def test_csv(folder, content):
    path = folder / "a.csv"
    path.write_bytes(content)
    found = read(lambda p: read_array(p, dtype=torch.float64), path)
    assert found is None or (found.ndim == 2 and bool(found.isfinite().all()))


@examples(25)
@given(
    tables(st.sampled_from(("0", "1", "2", "1.0", "-1", "0.5", "nan", "1e30", "x"))).map(
        lambda b: (".csv", b)
    )
    | damaged(NPY + [npy(np.arange(3)), npy(np.array([2**62, 0, 1]))]).map(lambda b: (".npy", b)),
    st.integers(1, 4),
)
def test_indices(folder, file, count):
    suffix, content = file
    path = folder / f"indices{suffix}"
    path.write_bytes(content)
    found = read(lambda p: read_indices(p, count=count, limit=3), path)
    if found is not None:
        assert found.shape == (count,)
        assert found.dtype == torch.int64
        assert ((found >= 0) & (found < 3)).all()


@st.composite
def idx_files(draw):
    """An IDX file whose header fits its body, or does not; packed or not."""
    kind = draw(st.sampled_from((0x08, 0x09, 0x0B, 0x0C, 0x0D, 0x0E, 0x07)))
    shape = draw(st.lists(st.integers(0, 3) | st.sampled_from((2**16, 2**31, 2**32 - 1)), max_size=4))
    count = draw(st.sampled_from((len(shape), len(shape), len(shape) + 1, 255)))
    needed = math.prod(shape) * {0x0B: 2, 0x0C: 4, 0x0D: 4, 0x0E: 8}.get(kind, 1)
    body = bytes(min(needed, 200) + draw(st.sampled_from((0, 0, 0, 1, -1)))) if needed else b""
    content = bytes([0, 0, kind, count]) + struct.pack(f">{len(shape)}I", *shape) + body
    return gzip.compress(content, mtime=0) if draw(st.booleans()) else content


@examples(30)
@given(idx_files() | idx_files().flatmap(lambda content: damaged([content])))
def test_idx(folder, content):
    path = folder / "items-idx3-ubyte"
    path.write_bytes(content)
    found = read(read_idx, path)
    assert found is None or found.ndim <= 64
    rows = read(read_array, path)
    assert rows is None or (rows.ndim == 2 and rows.numel() and found is not None)


# --- tensors with a description


def memory_file(path):
    memory = Memory(torch.eye(3), values=torch.ones(3, 2), labels=["a", 1, "c"], duplicates="skip")
    memory.remove(1)
    memory.save(path)
    return path.read_bytes()


def solution_file(path):
    retrieve(torch.randn(2, 3), torch.randn(4, 3), trace=True).save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def saved(folder):
    return [memory_file(folder / "m.safetensors"), solution_file(folder / "s.safetensors")]


def with_header(content, change):
    """The safetensors file with `change` applied to its header, as JSON."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


@st.composite
def changes(draw):
    """A function that changes one entry of a header somewhere."""
    steps = draw(st.lists(st.integers(0, 6), min_size=1, max_size=7))
    new = draw(
        st.sampled_from(
            (None, 0, -1, 2**70, 1.5, "", "x", [], {}, [[]], True, "F64", [1, 2**40], {"list": 3})
        )
    )

    def change(header):
        about = json.loads(header["__metadata__"]["hopdeq_lwpf"])
        inside = steps[0] > 1  # the description, or the tensors
        place = about if inside else header
        for step in steps[1:]:
            keys = list(place if isinstance(place, dict) else range(len(place)))
            key = keys[step % len(keys)]
            if not isinstance(place[key], (dict, list)) or not place[key]:
                break
            place = place[key]
        keys = list(place if isinstance(place, dict) else range(len(place)))
        place[keys[steps[-1] % len(keys)]] = new
        if inside:
            header["__metadata__"]["hopdeq_lwpf"] = json.dumps(about)

    return change


@examples(60)
@given(data=st.data())
def test_saved_memories_and_solutions(folder, saved, data):
    if data.draw(st.booleans(), label="damaged"):
        content = data.draw(damaged(saved))
    else:
        content = with_header(data.draw(st.sampled_from(saved)), data.draw(changes()))
    path = folder / "saved.safetensors"
    path.write_bytes(content)
    memory = read(Memory.load, path)
    if memory is not None:
        assert len(memory.ids) == len(memory.patterns) == len(list(memory))
        memory.add(torch.zeros(1, memory.width, dtype=memory.dtype), *_more(memory))
        repr(memory)
    solution = read(load_solution, path)
    if solution is not None:
        assert repr(solution)
        assert solution.converged.dtype == torch.bool
        solution.failure()


def _more(memory):
    values = None if memory.values is None else torch.zeros(1, memory.values.shape[1], dtype=memory.dtype)
    return values, None if memory.labels is None else ["new"]


# --- repertoires and bags

WORDS = st.sampled_from(
    (
        "ID",
        "label",
        "amino_acid",
        "templates",
        "signal",
        "a",
        "b",
        "a.tsv",
        "+",
        "-",
        "",
        "ACD",
        "aCD",
        "Z",
        "1",
        "0",
    )
    + ("2", "-1", "1.5", "9" * 30, "\u00e9", "../a", "a\0b", "x" * 300)
)


@st.composite
def repertoires(draw):
    """metadata.tsv and repertoires/a.tsv: right, or any words in their cells."""
    metadata = draw(
        tables(WORDS, "\t") | st.just(b"ID\tlabel\na\t+\n") | damaged([b"ID\tlabel\na\t+\nb\t-\n"])
    )
    table = draw(
        tables(WORDS, "\t")
        | damaged(
            [b"amino_acid\ttemplates\tsignal\nACD\t2\t1\nEF\t1\t0\n", b"amino_acid\ttemplates\nACD\t2\n"]
        )
    )
    return metadata, table


@examples(30)
@given(repertoires(), st.sampled_from((None, "label", "a")), st.sampled_from((None, "templates")))
def test_repertoires(folder, files, target, count):
    root = folder / "bags"
    (root / "repertoires").mkdir(parents=True, exist_ok=True)
    (root / "metadata.tsv").write_bytes(files[0])
    for name in "ab":
        (root / "repertoires" / f"{name}.tsv").write_bytes(files[1])
    found = read(lambda p: read_repertoires(p, target_column=target, count_column=count), root)
    if found is not None:
        assert all(len(found[row]["data"]) for row in range(len(found)))


@examples(15)
@given(
    tables(st.sampled_from(("0", "1", "2", "bag", "1.5", "nan", "1e39", "", "x", "1e400")))
    | damaged([b"1,a,0.5,2\n0,b,1,2\n1,a,3,4\n"])
)
def test_multiple_instance_sets(folder, content):
    path = folder / "bags.csv"
    path.write_bytes(content)
    found = read(read_mil, path)
    assert found is None or len(found)


# --- pictures


def picture(mode, form, size=(3, 2)):
    file = io.BytesIO()
    Image.new(mode, size, 1).save(file, form)
    return file.getvalue()


PICTURES = [
    ("png", picture("L", "PNG")),
    ("png", picture("I;16", "PNG")),
    ("png", picture("P", "PNG")),
    ("png", picture("RGBA", "PNG")),
    ("jpg", picture("RGB", "JPEG")),
    ("bmp", picture("RGB", "BMP")),
    ("gif", picture("P", "GIF")),
    ("tif", picture("F", "TIFF")),
    ("pgm", b"P5 3 2 255\n123456"),
    ("pgm", b"P5 300000 300000 255\n123456"),
    ("ppm", b"P3 1 1 255\n1 2 3"),
]


@examples(25)
@given(st.sampled_from(PICTURES).flatmap(lambda p: st.tuples(st.just(p[0]), damaged([p[1]]))), st.booleans())
def test_pictures(folder, file, resize):
    suffix, content = file
    root = folder / "pictures"
    root.mkdir(exist_ok=True)
    for old in root.iterdir():
        old.unlink()
    (root / f"a.{suffix}").write_bytes(content)
    found = read(lambda p: read_images(p, size=4 if resize else None), root)
    if found is not None:
        images, names = found
        assert names == [f"a.{suffix}"]
        assert ((images >= 0) & (images <= 1)).all()


# --- found before


def test_a_header_that_is_cut_off_is_damage(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': "))
    with pytest.raises(DataError, match="is damaged, cut off, or no .npy file"):
        read_array(path)


@pytest.mark.parametrize("shape", [(2**31, 1), (0, 2**64), (-1, 3), (2**40, 2**40)])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_more_numbers_than_there_are_bytes_are_refused_before_they_are_allocated(tmp_path, suffix, shape):
    path = tmp_path / f"a{suffix}"
    content = npy_header(repr({"descr": "<f8", "fortran_order": False, "shape": shape}))
    path.write_bytes(content if suffix == ".npy" else archive({"a.npy": content}))
    with little_memory(), pytest.raises(DataError, match="its header says shape"):
        read_array(path)


def test_a_header_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{}")
    with little_memory(), pytest.raises(DataError, match="damaged"):
        read_array(path)


def test_a_damaged_packed_stream_is_damage(tmp_path):
    path = tmp_path / "a.npz"
    content = bytearray(npz({"a": np.arange(600.0).reshape(200, 3)}))
    content[100:130] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged, cut off, or no .npz file"):
        read_array(path)


def test_an_archive_with_a_password_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    content = bytearray(npz({"a": MATRIX}))
    for sign, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(sign) + place] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        read_array(path)


def test_a_header_of_python_2_is_read_without_a_warning(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(
        npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1L, 2L), }", body=bytes(16))
    )
    assert read_array(path).tolist() == [[0.0, 0.0]]


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    # As a gigabyte would be, which takes seconds to pack.
    monkeypatch.setattr("hopdeq_lwpf.data.errors.MOST_UNPACKED", 1 << 20)
    zeros = np.zeros((1024, 1024), dtype=np.float32)
    (tmp_path / "a.npz").write_bytes(npz({"a": zeros}))
    header = bytes([0, 0, 0x0D, 2]) + struct.pack(">2I", 1024, 1024)
    (tmp_path / "a.gz").write_bytes(gzip.compress(header + zeros.tobytes()))
    for name in ("a.npz", "a.gz"):
        with pytest.raises(DataError, match="may be a decompression bomb; unpack it first"):
            read_array(tmp_path / name)
    np.savez(tmp_path / "plain.npz", a=zeros)
    assert read_array(tmp_path / "plain.npz").shape == zeros.shape


def test_a_solution_without_its_numbers_is_damage(folder, saved, tmp_path):
    path = tmp_path / "s.safetensors"

    def without_result(header):
        about = json.loads(header["__metadata__"]["hopdeq_lwpf"])
        about["description"]["solution"]["fields"]["result"] = None
        header["__metadata__"]["hopdeq_lwpf"] = json.dumps(about)

    path.write_bytes(with_header(saved[1], without_result))
    with pytest.raises(DataError, match="its result is a NoneType"):
        load_solution(path)


def test_a_next_id_beyond_all_numbers_is_damage(saved, tmp_path):
    path = tmp_path / "m.safetensors"

    def large(header):
        about = json.loads(header["__metadata__"]["hopdeq_lwpf"])
        about["description"]["next_id"] = 2**63
        header["__metadata__"]["hopdeq_lwpf"] = json.dumps(about)

    path.write_bytes(with_header(saved[0], large))
    with pytest.raises(DataError, match="its next id is 9223372036854775808"):
        Memory.load(path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_repertoire_of_a_name_that_no_file_can_have_is_missing(tmp_path, name):
    (tmp_path / "metadata.tsv").write_text(f"ID\tlabel\n{name}\t+\n")
    with pytest.raises(DataError, match="but there is no file"):
        read_repertoires(tmp_path)


def test_a_picture_that_claims_gigabytes_takes_none(tmp_path):
    content = bytearray(picture("L", "PNG"))
    place = content.index(b"IDAT")
    content[place - 4 : place] = struct.pack(">I", 2**32 - 1)
    (tmp_path / "a.png").write_bytes(content)
    with little_memory():
        assert read_images(tmp_path)[0].shape == (1, 2, 3)  # all that is there
