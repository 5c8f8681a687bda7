"""Recall from a Memory: against retrieve; ids and labels, now and after changes."""

import inspect

import numpy as np
import pytest
import torch
from memories import DTYPES, NAMES, trees
from problems import normal
from torch.testing import assert_close

from hopdeq_lwpf import Memory, retrieve
from hopdeq_lwpf.memory import MemoryRecall
from hopdeq_lwpf.recall import Recall


def test_recall_has_the_keywords_of_retrieve():
    ours, theirs = (inspect.signature(call).parameters for call in (Memory.recall, retrieve))
    expected = {name: p for name, p in theirs.items() if name != "patterns"}
    assert {name: p for name, p in ours.items() if name != "self"} == expected
    assert list(ours)[1:] == list(expected)


@pytest.mark.parametrize("batch", [(6,), (), (0,), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_recall_is_retrieve_with_ids_and_labels(batch, dtype):
    memory = trees().to(dtype)
    memory.remove(0)
    query = normal(*batch, 3, seed=4).to(dtype)
    options = {"beta": 3.0, "forgetting": "relu", "steps": 2, "trace": True}
    recall = memory.recall(query, **options)
    peer = retrieve(query, memory.patterns, values=memory.values, **options)
    assert isinstance(recall, MemoryRecall)
    for name in ("value", "state", "result", "residual", "steps", "index", "weight", "support"):
        assert_close(getattr(recall, name), getattr(peer, name), rtol=0, atol=0, equal_nan=True)
    assert recall.trace.residual.shape == peer.trace.residual.shape
    assert recall.ids.shape == batch
    position = {id: row for row, id in enumerate(memory.ids.tolist())}
    flat = recall.ids.reshape(-1).tolist()
    assert [position.get(id, -1) for id in flat] == peer.index.reshape(-1).tolist()
    by_hand = [None if id < 0 else NAMES[id] for id in flat]
    assert np.array(recall.labels, dtype=object).reshape(-1).tolist() == by_hand
    assert np.shape(np.array(recall.labels, dtype=object)) == batch
    assert memory.labels_of(recall) == memory.labels_of(peer) == memory.labels_of(recall.ids) == recall.labels


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 7.0},
        {"separation": "sparsemax"},
        {"mask": torch.tensor([True, False, False, False])},
        {"inject": "input", "inject_weight": 0.3},
        {"similarity": "dot", "normalize": "l2"},
        {"solver": "picard"},
        {"stop": None},
        {"adjoint": "unrolled", "steps": 1},
    ],
    ids=str,
)
def test_every_keyword_reaches_retrieve(options, monkeypatch):
    """What retrieve is called with is what was given; the numbers are compared above."""
    seen = {}

    def record(query, patterns, **keywords):
        seen.update(keywords)
        empty = torch.zeros(2, dtype=torch.int64)
        return Recall(query, query, empty, query[:, 0], empty, empty, index=empty)

    monkeypatch.setattr("hopdeq_lwpf.memory.memory.retrieve", record)
    defaults = {
        n: p.default for n, p in inspect.signature(retrieve).parameters.items() if p.kind == p.KEYWORD_ONLY
    }
    memory = Memory(normal(4, 3))
    memory.recall(normal(2, 3), **options)
    assert seen == {**defaults, **options}


def test_other_values_may_be_read_out():
    memory = trees()
    query, other = normal(2, 3, seed=4), normal(4, 5, seed=5)
    assert memory.recall(query).value.shape == (2, 2)
    assert torch.equal(
        memory.recall(query, values=other).value, retrieve(query, memory.patterns, values=other).value
    )
    assert memory.recall(query, values=memory.patterns).value.shape == (2, 3)
    bare = Memory(normal(4, 3))
    assert torch.equal(bare.recall(query).value, retrieve(query, bare.patterns).value)
    assert bare.recall(query).labels is None


def test_what_is_forgotten_or_nan_has_no_label_and_harms_no_other():
    memory = Memory(torch.eye(3), labels=["x", "y", "z"])
    query = torch.tensor([[0.0, 1.0, 0.0], [-1.0, -1.0, -1.0], [float("nan"), 0.0, 0.0]])
    recall = memory.recall(query, beta=5.0, forgetting="relu", steps=1)
    assert recall.ids.tolist() == [1, -1, -1]
    assert recall.labels == ["y", None, None]
    alone = memory.recall(query[:1], beta=5.0, forgetting="relu", steps=1)
    assert_close(
        recall.value[0], alone.value[0], rtol=1e-6, atol=0
    )  # a product of other size may round otherwise


def test_ids_and_labels_of_a_recall_outlast_changes():
    memory = Memory(torch.eye(3), labels=["x", "y", "z"])
    recall = memory.recall(torch.eye(3), beta=20.0)
    plain = retrieve(torch.eye(3), memory.patterns, beta=20.0)
    memory.remove(0)
    assert recall.labels == ["x", "y", "z"]
    assert memory.labels_of(recall) == [None, "y", "z"]
    assert memory.labels_of(torch.tensor([[2], [99]])) == [["z"], [None]]
    with pytest.raises(ValueError, match="recall points to pattern 2, but this memory has 2"):
        memory.labels_of(plain)
    with pytest.raises(TypeError, match="recall must be a Recall or a tensor of ids, got list"):
        memory.labels_of([1])
    memory.remove([1, 2])
    assert memory.labels_of(recall) == [None] * 3
    with pytest.raises(ValueError, match="this memory is empty"):
        memory.recall(torch.eye(3))


def test_gradients_reach_query_and_beta():
    memory = trees()
    query, beta = normal(2, 3, seed=4).requires_grad_(), torch.tensor(1.5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, b: memory.recall(q, beta=b, steps=2).value, (query, beta))
