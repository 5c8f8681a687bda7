"""Memory: adding and removing against a dict of rows, copies, and every way to give it wrong content."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memories import DTYPES, NAMES, READ, ROW, content, trees
from problems import normal

from hopdeq_lwpf import Memory
from hopdeq_lwpf.memory.rows import Rows

# --- adding and removing


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.lists(st.integers(0, 5), max_size=4)),
            st.tuples(st.just("remove"), st.sets(st.integers(0, 30), max_size=3)),
            st.tuples(st.just("forget"), st.sets(st.integers(0, 5), min_size=1, max_size=2)),
        ),
        max_size=12,
    ),
    st.sampled_from(["allow", "skip", "error"]),
)
def test_a_memory_is_a_dict_of_rows(steps, duplicates):
    memory = Memory(torch.empty(0, 2), torch.empty(0, 1), [], duplicates=duplicates)
    twin: dict[int, int] = {}  # id -> the number that the pattern, its value and its label are made of
    upcoming = 0
    for action, argument in steps:
        if action == "add":
            patterns = torch.tensor([[n, -n] for n in argument], dtype=torch.float32).reshape(-1, 2)
            arguments = (patterns, patterns[:, :1] * 2, [f"label {n}" for n in argument])
            after, ids = dict(twin), []
            for n in argument:
                known = [key for key, other in after.items() if other == n and duplicates != "allow"]
                ids.append(known[0] if known else upcoming + len(after) - len(twin))
                after.setdefault(ids[-1], n)
            if duplicates == "error" and len(after) != len(twin) + len(argument):
                with pytest.raises(ValueError, match="patterns holds a duplicate in row"):
                    memory.add(*arguments)
            else:
                assert memory.add(*arguments).tolist() == ids
                upcoming += len(after) - len(twin)
                twin = after
        elif action == "remove":
            if argument <= set(twin):
                assert memory.remove(sorted(argument)).tolist() == sorted(argument)
                twin = {key: n for key, n in twin.items() if key not in argument}
            else:
                with pytest.raises(KeyError, match="no pattern has id"):
                    memory.remove(list(argument))
        elif argument <= set(twin.values()):
            gone = [key for key, n in twin.items() if n in argument]
            assert memory.remove(labels=[f"label {n}" for n in argument]).tolist() == gone
            twin = {key: n for key, n in twin.items() if n not in argument}
        rows = [(key, [n, -n], [2 * n], f"label {n}") for key, n in twin.items()]
        assert content(memory) == (rows, torch.float32, [row[3] for row in rows])
        assert memory.ids.tolist() == [row[0] for row in rows]
        assert len(memory) == len(twin)


def test_ids_stay_with_their_patterns_and_are_never_given_again():
    memory = trees()
    pattern = memory[2].pattern.clone()
    memory.remove([0, 3])
    assert memory.ids.tolist() == [1, 2]
    assert memory.add(normal(2, 3, seed=5), normal(2, 2), ["fir", "oak"]).tolist() == [4, 5]
    assert torch.equal(memory[2].pattern, pattern)
    assert memory[5].label == "oak"
    assert 3 not in memory
    assert 4 in memory
    assert torch.tensor(5) in memory
    assert "elm" not in memory
    assert memory[np.int64(4)].label == "fir"


def test_one_pattern_may_be_a_vector_and_lists_and_arrays_are_taken():
    memory = Memory([[0.0, 1.0], [2.0, 3.0]], [[5.0], [6.0]], np.array(["a", "b"]))
    assert memory.dtype == torch.float32
    assert memory.add([4.0, 5.0], [7.0], "c").tolist() == [2]
    assert memory.add([], [], []).tolist() == []
    assert memory.patterns.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert memory.labels == ["a", "b", "c"]
    wide = Memory(np.eye(3), labels=torch.tensor([7, 8, 9]))
    assert wide.dtype == torch.float64
    wide.add([[0.1, 0.2, 0.3]], labels=np.int32(4))
    assert wide.patterns[3].tolist() == [0.1, 0.2, 0.3]  # not rounded to float32 on the way
    assert wide.labels == [7, 8, 9, 4]
    assert {type(label) for label in wide.labels} == {int}
    with_values = Memory(np.eye(2), [[0.1], [0.2]])
    assert with_values.values.dtype == torch.float64


def test_a_memory_owns_its_data():
    patterns = normal(4, 3)
    memory = Memory(patterns)
    before = memory.patterns.clone()
    patterns.zero_()
    assert torch.equal(memory.patterns, before)


def test_patterns_that_require_grad_are_detached():
    memory = Memory(normal(4, 3).requires_grad_(), torch.nn.Parameter(normal(4, 2)))
    memory.add(normal(1, 3).requires_grad_(), normal(1, 2))
    assert not memory.patterns.requires_grad
    assert not memory.values.requires_grad


def test_a_graph_made_before_an_addition_or_removal_still_has_its_gradient():
    memory = Memory(normal(4, 3))
    memory.add(normal(1, 3, seed=1))  # makes room, so that the next additions write behind these rows
    query = normal(2, 3, seed=2).requires_grad_()
    (expected,) = torch.autograd.grad(memory.recall(query, steps=2).value.sum(), query)
    recall = memory.recall(query, steps=2)
    memory.add(normal(1, 3, seed=3))
    memory.remove(0)
    memory.add(normal(1, 3, seed=4))
    (gradient,) = torch.autograd.grad(recall.value.sum(), query)
    assert torch.equal(gradient, expected)
    assert bool(expected.abs().max() > 1e-3)


def test_a_memory_made_in_inference_mode_is_an_ordinary_one():
    with torch.inference_mode():
        memory = Memory(normal(4, 3))
        memory.add(normal(1, 3))  # leaves room, so that the next addition writes to this tensor
    query = normal(2, 3).requires_grad_()
    memory.recall(query, steps=1).value.sum().backward()
    assert query.grad is not None
    memory.add(normal(1, 3))
    with torch.inference_mode():
        memory.add(normal(1, 3))
        memory.remove(0)
    memory.recall(query, steps=1).value.sum().backward()
    assert len(memory) == 6


def test_the_capacity_doubles():
    rows = Rows(torch.zeros(0, 2))
    addresses = []
    for number in range(1000):
        rows.reserve(1)
        rows.append(torch.full((1, 2), float(number)))
        addresses.append(rows.view.data_ptr())
    assert rows.view[:, 0].tolist() == list(range(1000))
    # room for 1, 2, 4, ..., 1024: eleven times, where an addition that copied everything would move each time
    moves = sum(a != b for a, b in zip(addresses, addresses[1:], strict=False))
    assert moves <= 10


# --- duplicates


@pytest.mark.parametrize("dtype", DTYPES)
def test_duplicates_are_told_by_every_bit_but_the_sign_of_zero(dtype):
    step = torch.finfo(dtype).eps
    memory = Memory(torch.tensor([[1.0, 0.0]], dtype=dtype), labels=["a"], duplicates="skip")
    ids = memory.add(
        torch.tensor([[1.0, -0.0], [1.0 + step, 0.0], [1.0, 0.0]], dtype=dtype), labels=["b", "c", "d"]
    )
    assert ids.tolist() == [0, 1, 0]
    assert memory.labels == ["a", "c"]


def test_a_removed_pattern_is_no_duplicate():
    memory = trees(duplicates="error")
    pattern = memory[1].pattern
    with pytest.raises(
        ValueError, match=r"duplicate in row 1 \(counted from 0\): it equals the pattern of id 1"
    ):
        memory.add(torch.stack([normal(3, seed=9), pattern]), normal(2, 2), ["x", "y"])
    memory.remove(1)
    assert memory.add(pattern, normal(2), "birch").tolist() == [4]
    with pytest.raises(ValueError, match="in row 2 .*: it equals row 1"):
        memory.add(normal(3, 3, seed=8)[[0, 1, 1]], normal(3, 2), ["x", "y", "z"])
    with pytest.raises(ValueError, match="in row 1 .*: it equals row 0"):
        Memory(torch.ones(2, 3), duplicates="error")
    assert len(Memory(torch.ones(2, 3), duplicates="skip")) == 1
    assert len(Memory(torch.ones(2, 3))) == 2


# --- what is refused, and leaves no trace

WRONG = [
    (
        (torch.zeros(1, 4).double(), READ, ["x"]),
        ValueError,
        "patterns has width 4, but the memory has width 3",
    ),
    ((torch.zeros(1, 1, 3).double(), READ, ["x"]), ValueError, r"patterns must be \(n, width\) or"),
    (
        (ROW.float(), READ, ["x"]),
        TypeError,
        "patterns is torch.float32 on cpu, but the memory is torch.float64",
    ),
    (
        (ROW.long(), READ, ["x"]),
        TypeError,
        r"patterns must be .* got torch.int64; use torch.as_tensor\(patterns",
    ),
    (([[1, 2, 3]], READ, ["x"]), TypeError, "patterns must be .* got torch.int64"),
    ((ROW.to(torch.complex64), READ, ["x"]), TypeError, "patterns must be .* got torch.complex64"),
    ((ROW.to_sparse(), READ, ["x"]), TypeError, "patterns must be dense"),
    ((ROW / 0, READ, ["x"]), ValueError, "patterns holds NaN or inf in row 0"),
    ((torch.cat([ROW, ROW + float("inf")]), READ, ["x"]), ValueError, "patterns holds NaN or inf in row 1"),
    (("abc", READ, ["x"]), TypeError, "patterns must be a tensor, an array or lists"),
    (([torch.zeros(3), torch.zeros(3)], READ, ["x"]), TypeError, "torch.stack"),
    (([[1.0, 2.0], [3.0]], READ, ["x"]), TypeError, "patterns must be a tensor, an array or lists"),
    ((ROW, None, ["x"]), ValueError, "values is missing: this memory has values of width 2"),
    ((ROW, READ[:, :1], ["x"]), ValueError, "values has width 1, but the memory has width 2"),
    ((ROW, READ.expand(2, 2), ["x"]), ValueError, "values has 2 rows, but patterns has 1"),
    ((ROW, READ / 0, ["x"]), ValueError, "values holds NaN or inf in row 0"),
    ((ROW, READ.float(), ["x"]), TypeError, "values is torch.float32"),
    ((ROW, READ, None), ValueError, "labels is missing"),
    ((ROW, READ, ["x", "y"]), ValueError, "labels has 2 entries, but patterns has 1"),
    ((ROW.expand(2, 3), READ.expand(2, 2), "xy"), ValueError, "labels has 1 entries, but patterns has 2"),
    ((ROW, READ, [1.5]), TypeError, "labels must be strings or whole numbers, got 1.5 in row 0"),
    ((ROW, READ, [True]), TypeError, "labels must be strings or whole numbers, got True"),
    ((ROW, READ, torch.tensor([1.0])), TypeError, "labels must be strings or whole numbers, got 1.0"),
    ((ROW, READ, 2.5), TypeError, "labels must be a sequence"),
    ((ROW, READ, {"x"}), TypeError, "labels must be a sequence"),
    ((ROW, READ, {"x": 1}), TypeError, "labels must be a sequence"),
    ((ROW, READ, b"x"), TypeError, "labels must be a sequence"),
    ((ROW, READ, [b"x"]), TypeError, "labels must be strings or whole numbers, got b'x'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
@pytest.mark.parametrize("duplicates", ["allow", "skip"])
def test_a_failed_addition_leaves_the_memory_as_it_was(arguments, error, message, duplicates):
    memory = trees(duplicates=duplicates)
    before = content(memory)
    with pytest.raises(error, match=message) as caught:
        memory.add(*arguments)
    assert "\n" not in str(caught.value)
    assert content(memory) == before
    assert memory.add(ROW, READ, "x").tolist() == [4]


def test_an_addition_for_which_there_is_no_memory_leaves_it_as_it_was(monkeypatch):
    memory = trees()
    before = content(memory)
    reserve, calls = Rows.reserve, []

    def fail(self, more):
        calls.append(more)
        if len(calls) == 3:  # the last of patterns, ids and values
            raise MemoryError
        reserve(self, more)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "reserve", fail)
        with pytest.raises(MemoryError):
            memory.add(ROW, READ, "x")
    assert content(memory) == before
    assert memory.add(ROW, READ, "x").tolist() == [4]


def test_wrong_memories_are_refused():
    for arguments, error, message in (
        ((normal(3),), ValueError, r"patterns must be \(N, width\) with width at least 1, got shape \(3,\)"),
        ((torch.zeros(2, 0),), ValueError, "width at least 1"),
        (([[1, 0], [0, 1]],), TypeError, "got torch.int64; use torch.as_tensor"),
        ((normal(2, 3), normal(3, 1)), ValueError, "values has 3 rows, but patterns has 2"),
        (
            (normal(2, 3), normal(2, 1).float()),
            TypeError,
            "values is torch.float32 on cpu, but the memory is",
        ),
        ((normal(2, 3), None, ["a"]), ValueError, "labels has 1 entries, but patterns has 2"),
    ):
        with pytest.raises(error, match=message):
            Memory(*arguments)
    with pytest.raises(ValueError, match="duplicates 'skipp' is not one of .* Did you mean 'skip'"):
        Memory(normal(2, 3), duplicates="skipp")
    bare = Memory(normal(2, 3))
    with pytest.raises(ValueError, match="values was given, but this memory has none"):
        bare.add(normal(3), normal(1))
    with pytest.raises(ValueError, match="labels was given, but this memory has none"):
        bare.add(normal(3), labels="a")
    for call in (lambda: bare.labels_of(bare.recall(normal(3))), lambda: bare.remove(labels="a")):
        with pytest.raises(ValueError, match="this memory has no labels"):
            call()


def test_wrong_removals_remove_nothing():
    memory = trees()
    before = content(memory)
    memory.add(normal(3), normal(2), "oak")
    memory.remove(4)
    for arguments, error, message in (
        ({"ids": [0, 4]}, KeyError, "no pattern has id 4: it was removed"),
        ({"ids": [0, 5]}, KeyError, "no pattern has id 5: it was never given"),
        ({"ids": -1}, KeyError, "no pattern has id -1: it was never given"),
        ({"ids": [0.0]}, TypeError, "ids must be whole numbers, got torch.float32"),
        ({"ids": True}, TypeError, "ids must be whole numbers, got torch.bool"),
        ({"ids": "ash"}, TypeError, "ids must be whole numbers, got 'ash'"),
        ({"labels": ["ash", "birhc"]}, KeyError, "no pattern has label 'birhc'; did you mean 'birch'"),
        ({"labels": 3}, KeyError, "no pattern has label 3"),
        ({}, TypeError, "ids or labels"),
        ({"ids": 0, "labels": "ash"}, TypeError, "ids or labels"),
    ):
        with pytest.raises(error, match=message):
            memory.remove(**arguments)
        assert content(memory) == before
    assert memory.remove([]).tolist() == []
    assert memory.remove(labels=[]).tolist() == []
    with pytest.raises(KeyError, match="no pattern has id 9"):
        memory[9]
    with pytest.raises(TypeError, match="indexed by one id"):
        memory[[0, 1]]


# --- copies


def test_a_copy_has_its_own_rows():
    memory = trees()
    memory.add(ROW, READ, "x")  # leaves spare room, which two memories must not share
    before = content(memory)
    for other in (
        memory.clone(),
        copy.copy(memory),
        copy.deepcopy(memory),
        pickle.loads(pickle.dumps(memory)),
    ):
        assert other == memory
        assert other.add(ROW + 1, READ, "y").tolist() == [5]
        assert memory.add(ROW + 2, READ, "z").tolist() == [5]
        assert other[5].pattern.tolist() == [1.0] * 3
        assert other != memory
        memory = memory.clone()
        memory.remove(5)
        assert content(memory) == before
        memory._next = 5


def test_equality_looks_at_everything_that_is_stored():
    memory = trees()
    assert memory == trees()
    assert memory != "a memory"
    assert memory != memory.to(torch.float32)
    assert memory != Memory(normal(4, 3), labels=NAMES)
    assert memory != Memory(normal(4, 3), normal(4, 2, seed=1))
    assert memory != Memory(normal(4, 3), normal(4, 2, seed=1), [*NAMES[:3], "oak"])
    assert memory != Memory(normal(4, 3), normal(4, 2, seed=2), NAMES)
    assert memory != Memory(normal(4, 3, seed=3), normal(4, 2, seed=1), NAMES)
    shifted = trees()
    shifted.remove(0)
    other = Memory(normal(4, 3)[1:], normal(4, 2, seed=1)[1:], NAMES[1:])
    assert torch.equal(shifted.patterns, other.patterns)
    assert shifted != other  # other ids
    with pytest.raises(TypeError, match="unhashable"):
        hash(memory)


def test_moving_keeps_ids_and_labels():
    memory = trees(duplicates="skip")
    memory.remove(1)
    half = memory.to(torch.float16)
    assert half.dtype == half.values.dtype == torch.float16
    assert half.labels == memory.labels
    assert half.ids.tolist() == [0, 2, 3]
    assert half.add(half[2].pattern, half[2].value, "again").tolist() == [2]
    assert memory.to("cpu", torch.float32) == memory.to(dtype=torch.float32, device=torch.device("cpu"))
    assert memory.to("cpu") == memory
    with pytest.raises(TypeError, match="dtype must be float64, .* got torch.int32"):
        memory.to(torch.int32)
    with pytest.raises(ValueError, match="patterns holds numbers too large for torch.float16"):
        Memory([[1e6, 0.0]]).to(torch.float16)


def test_the_repr_tells_size_and_labels():
    assert repr(trees()) == "Memory(N=4, d=3, dv=2, float64, labels=['ash', 'birch', 'cedar', ...])"
    assert repr(Memory([[0.5]], labels=[7], duplicates="skip")) == (
        "Memory(N=1, d=1, float32, labels=[7], duplicates='skip')"
    )
    assert repr(Memory(torch.empty(0, 2))) == "Memory(N=0, d=2, float32)"
