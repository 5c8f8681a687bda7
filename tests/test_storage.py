"""Solutions and tensors on disk: bit for bit back, whole or not at all, and what a reader must refuse."""

import dataclasses
import json
import os
import struct
from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import normal
from safetensors.torch import load_file, save_file

from hopdeq_lwpf import Memory, Solution, fixed_point, load_solution, retrieve
from hopdeq_lwpf._types import AdjointReport, Trace
from hopdeq_lwpf.data import DataError
from hopdeq_lwpf.data import tensors as module
from hopdeq_lwpf.data.tensors import ENTRY, Kind, read_tensors, write_tensors
from hopdeq_lwpf.memory import MemoryRecall
from hopdeq_lwpf.recall import Recall
from hopdeq_lwpf.storage import SOLUTION, save_solution

KIND = Kind("test", 2, "read_tensors")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def bits(tensor):
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).tolist()


def same(one, other):
    """Equal in structure, class, type, shape and every bit."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and bits(one) == bits(other)
        )
    if type(one) is not type(other):
        return False
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def solution(state, **fields):
    empty = torch.zeros(2, dtype=torch.int64)
    return Solution(state, state, empty, torch.tensor([0.1, float("nan")]), empty, empty, **fields)


def there_and_back(given, path):
    given.save(path)
    return load_solution(path)


# --- solutions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(5,), (), (0,), (2, 3)])
@pytest.mark.parametrize("steps", [None, 2])
def test_a_recall_comes_back_bit_for_bit(tmp_path, dtype, batch, steps):
    query, patterns = normal(*batch, 4).to(dtype), normal(9, 4, seed=2).to(dtype)
    recall = retrieve(query, patterns, beta=1.7, steps=steps, trace=True)
    again = there_and_back(recall, tmp_path / "a")
    assert type(again) is Recall
    assert same(recall, again)
    assert again.value.dtype == dtype
    assert torch.equal(again.converged, recall.converged)


def test_the_adjoint_report_is_saved_and_the_graph_is_not(tmp_path):
    recall = retrieve(normal(3, 4), normal(9, 4, seed=2).requires_grad_(), beta=1.7)
    recall.value.sum().backward()
    again = there_and_back(recall, tmp_path / "a")
    assert same(recall, again)
    assert recall.value.requires_grad
    assert not again.value.requires_grad
    assert again.adjoint.method == recall.adjoint.method != ""
    assert again.adjoint.result.shape == (3,)


def test_a_failed_problem_is_saved_as_such(tmp_path):
    query = normal(3, 4)
    query[1, 2] = float("nan")
    recall = retrieve(query, normal(9, 4, seed=2), beta=1.7)
    again = there_and_back(recall, tmp_path / "a")
    assert same(recall, again)
    assert again.failure() == recall.failure()
    assert "1 of 3 problems did not converge (NONFINITE)" in again.failure()


def test_a_memory_recall_keeps_ids_and_labels(tmp_path):
    memory = Memory(normal(4, 3), labels=["a", "b", "ü", 7])
    recall = memory.recall(normal(2, 2, 3, seed=3), beta=9.0)
    again = there_and_back(recall, tmp_path / "a")
    assert type(again) is MemoryRecall
    assert same(recall, again)


def test_states_of_every_structure_come_back(tmp_path):
    pair = namedtuple("pair", "x y")
    a, b = normal(2, 3), normal(2, 2, 2, seed=1).to(torch.bfloat16)
    state = {
        "a.b": a,
        "a": {"b": b, 3: [a, (b, None)]},
        "mask": torch.tensor([[True], [False]]),
        "complex": torch.complex(a, a).conj(),
        "single": torch.complex(a, 2 * a).to(torch.complex64),
        "imaginary": [torch.complex(a, a).imag, torch.complex(a, a).conj().imag],
        "none": (),
        "numbers": [1, 2.5, True, "text", float("inf")],
    }
    given = solution(state, note="query detached", trace=Trace(a, None), adjoint=AdjointReport(method="cg"))
    again = there_and_back(given, tmp_path / "a")
    assert same(again, given)
    other = there_and_back(solution(OrderedDict(first=pair(a, b))), tmp_path / "b")
    assert same(other.state, {"first": (a, b)})  # an OrderedDict becomes a dict, a named tuple a tuple


def test_the_state_of_a_solver_run_with_a_dict_comes_back(tmp_path):
    def f(z, x):
        return {"u": 0.5 * z["v"] + x, "v": 0.3 * z["u"]}

    x = normal(4, 3)
    run = fixed_point(f, x, {"u": torch.zeros_like(x), "v": torch.zeros_like(x)}, trace=True)
    assert same(run, there_and_back(run, tmp_path / "a"))


def test_what_was_one_tensor_stays_one_and_is_written_once(tmp_path):
    state = normal(2, 1000)
    again = there_and_back(solution(state), tmp_path / "a")
    assert again.value is again.state
    assert (tmp_path / "a").stat().st_size < 1.5 * state.numel() * state.element_size()


def test_overlapping_and_strided_tensors_are_saved_with_their_own_content(tmp_path):
    base = normal(6, 4)
    state = [base[:4], base[2:], base.T, base[:, 1], base[:1].expand(3, 4)]
    assert same(there_and_back(solution(state), tmp_path / "a").state, state)


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.lists(st.integers(0, 3), max_size=3).map(
        lambda shape: torch.arange(int(torch.Size(shape).numel())).view(shape)
    ),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=40)
@given(trees)
def test_every_structure_that_is_taken_comes_back(tmp_path_factory, state):
    again = there_and_back(solution(state), tmp_path_factory.getbasetemp() / "tree")
    assert same(again.state, state)


def test_what_a_file_cannot_hold_is_named_and_nothing_is_written(tmp_path):
    class Mine(Solution):
        pass

    a = normal(2, 3)
    for state, message in (
        ({"x": [a, {1, 2}]}, r"state\.x\.1 holds a set|value\.x\.1 holds a set"),
        ({"x": {(1, 2): a}}, r"x has the key \(1, 2\)"),
        ({"x": {2.5: a}}, r"x has the key 2\.5"),
        (a.to_sparse(), "value must be a dense tensor"),
        (a.to("meta"), "value must be a dense tensor with data"),
    ):
        with pytest.raises(TypeError, match=message):
            save_solution(solution(state), tmp_path / "a")
    with pytest.raises(TypeError, match="solution must be one of Solution, Recall, .* got Mine"):
        save_solution(Mine(*[a] * 6), tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_later_fields_have_their_defaults_in_older_files(tmp_path):
    path = tmp_path / "a"
    recall = retrieve(normal(2, 3), normal(4, 3, seed=1))
    recall.save(path)
    _rewrite(path, lambda about: about["description"]["solution"]["fields"].pop("energy"))
    assert load_solution(path).energy is None


# --- files


def _rewrite(path, change, **metadata):
    """The same file with another description."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    about = json.loads(header["__metadata__"][ENTRY])
    change(about)
    header["__metadata__"] = {ENTRY: json.dumps(about), **metadata}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def _set(**entries):
    return lambda about: about.update(entries)


def test_the_file_is_plain_safetensors_with_a_description(tmp_path):
    path = tmp_path / "a"
    write_tensors(path, KIND, {"x": torch.arange(3)}, {"ü": [1, None]})
    assert load_file(path)["x"].tolist() == [0, 1, 2]
    tensors, description = read_tensors(path, KIND)
    assert tensors["x"].tolist() == [0, 1, 2]
    assert description == {"ü": [1, None]}
    before = path.read_bytes()
    write_tensors(path, KIND, {"x": torch.arange(3)}, {"ü": [1, None]})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_writing_to_what_was_read_changes_no_file(tmp_path):
    path = tmp_path / "a"
    write_tensors(path, KIND, {"x": torch.arange(3)}, {})
    read_tensors(path, KIND)[0]["x"].fill_(9)
    assert read_tensors(path, KIND)[0]["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(version=3), "has format 3, and this hopdeq_lwpf reads a test up to format 2: upgrade"),
        (_set(version="x"), "damaged header"),
        (_set(description=[]), "damaged header"),
        (_set(kind="memory"), r"holds a memory, not a test; read_tensors reads a test"),
        (lambda about: about.pop("kind"), "not of hopdeq_lwpf .its header has no 'kind'"),
    ],
)
def test_headers_that_are_refused(tmp_path, change, message):
    path = tmp_path / "a"
    write_tensors(path, KIND, {"x": torch.arange(3)}, {})
    _rewrite(path, _set(version=1))
    read_tensors(path, KIND)  # an older format is read
    _rewrite(path, change)
    with pytest.raises(DataError, match=message):
        read_tensors(path, KIND)


def test_files_that_are_refused(tmp_path):
    good = tmp_path / "good"
    write_tensors(good, KIND, {"x": torch.arange(1000)}, {})
    content = good.read_bytes()
    for name, bad in {
        "empty": b"",
        "head": content[:5],
        "header": content[:40],
        "cut": content[:-1],
        "long": content + b"0",
        "huge": struct.pack("<Q", 2**60) + content[8:],
        "pickle": b"\x80\x04K\x01.",
    }.items():
        path = tmp_path / name
        path.write_bytes(bad)
        with pytest.raises(DataError, match="damaged, cut off, or no safetensors file") as caught:
            read_tensors(path, KIND)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
    save_file({"x": torch.arange(3)}, tmp_path / "foreign")
    with pytest.raises(DataError, match="is a safetensors file, but not of hopdeq_lwpf"):
        read_tensors(tmp_path / "foreign", KIND)
    save_file({"x": torch.arange(3)}, tmp_path / "words", metadata={ENTRY: "{"})
    with pytest.raises(DataError, match="damaged header"):
        read_tensors(tmp_path / "words", KIND)
    with pytest.raises(DataError, match="No such file"):
        read_tensors(tmp_path / "missing", KIND)
    with pytest.raises(DataError, match="is a folder"):
        read_tensors(tmp_path, KIND)


@pytest.mark.parametrize(
    "described",
    [
        None,
        7,
        [],
        {"tensor": "value"},
        {"tensor": "missing"},
        {"class": "Path", "fields": {}},
        {"class": "Solution", "fields": {"value": 1}},
        {"class": "Solution", "fields": {"unknown": 1}},
        {"class": "Trace", "fields": {"residual": None, "energy": None}},
        {"set": []},
        {"dict": [1]},
        {"complex": "value"},
        {"tuple": [], "list": []},
    ],
)
def test_descriptions_of_no_solution_are_refused(tmp_path, described):
    path = tmp_path / "a"
    write_tensors(path, SOLUTION, {"value": torch.zeros(1)}, {"solution": described})
    with pytest.raises(DataError, match="a: is damaged"):
        load_solution(path)


def test_a_bottomless_description_is_refused(tmp_path):
    path = tmp_path / "a"
    write_tensors(path, SOLUTION, {}, {"solution": 0})
    deep = '{"list": [' * 100_000 + "0" + "]}" * 100_000
    text = json.dumps({"kind": "solution", "version": 1, "description": {"solution": "DEEP"}}).replace(
        '"DEEP"', deep
    )
    save_file({}, path, metadata={ENTRY: text})
    with pytest.raises(DataError, match="damaged"):
        load_solution(path)


def test_a_save_that_is_cut_short_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "a"
    first = solution(normal(2, 3))
    first.save(path)
    before = path.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            solution(normal(2, 3, seed=1)).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"the folder .*no does not exist"):
        solution(normal(2, 3)).save(tmp_path / "no" / "a")
    with pytest.raises(DataError, match="is a folder"):
        solution(normal(2, 3)).save(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match="No space left"):
        solution(normal(2, 3)).save(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_description_that_could_not_be_read_back_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_DESCRIPTION", 1000)
    write_tensors(tmp_path / "a", KIND, {}, {"labels": ["x"] * 50})
    with pytest.raises(ValueError, match="at most 1000; use shorter labels"):
        write_tensors(tmp_path / "b", KIND, {}, {"labels": ["x"] * 200})
    assert os.listdir(tmp_path) == ["a"]
