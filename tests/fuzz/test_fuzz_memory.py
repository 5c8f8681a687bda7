"""Memories under any sequence of calls, beside a plain list that says what they must hold."""

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fuzz.profiles import answer, examples, helps, within
from fuzz.strategies import DTYPES, tensors
from hopdeq_lwpf import Memory, Result
from hopdeq_lwpf.memory.store import DUPLICATES

# Few values, so that duplicates are common; all are exact in every dtype.
ROWS = st.lists(st.tuples(*(st.sampled_from((0.0, -0.0, 1.0, -2.0)),) * 2), max_size=3)
LABELS = st.sampled_from(("a", "b", "ab", "", "\u00e9\n", 0, 1, -1, 2**70))
WRONG = (
    [[1.0]],
    [[1.0, float("nan")]],
    [[float("inf"), 0.0]],
    torch.zeros(2, 2, dtype=torch.int64),
    torch.zeros(1, 1, 2),
    "ab",
    [["a", "b"]],
    None,
    [[1.0, 2.0], [3.0]],
    torch.zeros(1, 2, dtype=torch.complex64),
)


class Memories(RuleBasedStateMachine):
    """A Memory, and (id, pattern, value, label) of each of its patterns."""

    folder = None

    @initialize(
        dtype=st.sampled_from(DTYPES),
        duplicates=st.sampled_from(DUPLICATES),
        valued=st.booleans(),
        labelled=st.booleans(),
    )
    def begin(self, dtype, duplicates, valued, labelled):
        none = torch.zeros(0, 2, dtype=dtype)
        self.memory = Memory(
            none, none[:, :1] if valued else None, [] if labelled else None, duplicates=duplicates
        )
        self.duplicates, self.valued, self.labelled = duplicates, valued, labelled
        self.stored, self.next = [], 0

    def tensor(self, rows):
        return torch.tensor(rows, dtype=self.memory.dtype).reshape(-1, 2)

    @rule(rows=ROWS, names=st.lists(LABELS, min_size=3, max_size=3), listed=st.booleans())
    def add(self, rows, names, listed):
        values = [[float(len(self.stored) + n)] for n in range(len(rows))] if self.valued else None
        labels = names[: len(rows)] if self.labelled else None
        expected, new = [], []
        for n, row in enumerate(rows):
            same = [id for id, other, *_ in self.stored + new if other == row]
            if same and self.duplicates == "error":
                expected = None
                break
            if same and self.duplicates == "skip":
                expected.append(same[0])
                continue
            new.append((self.next + len(new), row, values and values[n][0], labels and labels[n]))
            expected.append(new[-1][0])
        patterns = [list(row) for row in rows] if listed and rows else self.tensor(rows)
        given = None if values is None else torch.tensor(values, dtype=self.memory.dtype).reshape(-1, 1)
        if expected is None:
            with pytest.raises(ValueError, match="patterns holds a duplicate in row"):
                self.memory.add(patterns, given, labels)
            return
        assert self.memory.add(patterns, given, labels).tolist() == expected
        self.stored += new
        self.next += len(new)

    @rule(wrong=st.sampled_from(WRONG), where=st.sampled_from(("patterns", "values", "labels")))
    def add_what_does_not_fit(self, wrong, where):
        count = 1
        arguments = {
            "patterns": self.tensor([(0.5, 0.5)] * count),
            "values": torch.ones(count, 1, dtype=self.memory.dtype) if self.valued else None,
            "labels": ["new"] if self.labelled else None,
        }
        if where == "values" and isinstance(wrong, list) and wrong == [[1.0]] and self.valued:
            wrong = [[1.0, 2.0]]  # this one would fit
        if wrong is None and where != "patterns":
            wrong = 3.5 if arguments[where] is None else None
        if where == "labels" and isinstance(wrong, str):
            wrong = {"a": 1}
        arguments[where] = wrong
        assert answer(lambda: self.memory.add(**arguments), where, "patterns") is None

    @precondition(lambda self: self.stored)
    @rule(places=st.lists(st.integers(0, 30), min_size=1, max_size=3), label=st.booleans())
    def remove(self, places, label):
        chosen = [self.stored[place % len(self.stored)] for place in places]
        if label and self.labelled:
            names = {entry[3] for entry in chosen}
            gone = [entry for entry in self.stored if entry[3] in names]
            removed = self.memory.remove(labels=list(names))
        else:
            gone = chosen
            removed = self.memory.remove([entry[0] for entry in chosen])
        ids = {entry[0] for entry in gone}
        assert removed.tolist() == sorted(ids)
        self.stored = [entry for entry in self.stored if entry[0] not in ids]

    @rule(
        wrong=st.sampled_from((-1, 10**6, 2**62, 2**63, -(2**63), 1.5, "a", None, True, [[0, 10**6]], [-1]))
    )
    def remove_what_is_not_there(self, wrong):
        try:
            assert self.memory.remove(wrong) is None
        except (KeyError, TypeError) as error:
            helps(error, "id", "ids", "labels")
        assert wrong not in self.memory or isinstance(wrong, bool)

    @rule()
    def save_and_load(self):
        path = self.folder / "memory.safetensors"
        self.memory.save(path)
        loaded = Memory.load(path)
        assert loaded == self.memory
        self.memory = loaded

    @rule(dtype=st.sampled_from(DTYPES))
    def convert(self, dtype):
        self.memory = self.memory.to(dtype)

    @rule(query=st.data(), steps=st.sampled_from((None, 1, 2)))
    def recall(self, query, steps):
        asked = query.draw(tensors((2, 2), self.memory.dtype, "any"))
        if not self.stored:
            assert answer(lambda: self.memory.recall(asked), "memory") is None
            return
        with within():
            recall = self.memory.recall(asked, steps=steps, beta=4.0)
        lost = ~asked.isfinite().all(-1)
        assert (recall.result[lost] == Result.NONFINITE).all()
        assert (recall.ids[lost] == -1).all()
        by_id = {id: label for id, _, _, label in self.stored}
        for id, label in zip(recall.ids.tolist(), recall.labels or [None, None], strict=True):
            assert id == -1 or by_id[id] == label
        assert self.memory.labels_of(recall) == recall.labels if self.labelled else recall.labels is None

    @invariant()
    def holds_what_the_list_holds(self):
        if not hasattr(self, "memory"):
            return
        ids, rows, values, labels = zip(*self.stored, strict=True) if self.stored else ((),) * 4
        assert len(self.memory) == len(ids)
        assert self.memory.ids.tolist() == list(ids)
        assert torch.equal(self.memory.patterns, self.tensor(rows))
        assert self.memory.labels == (list(labels) if self.labelled else None)
        if self.valued:
            assert self.memory.values.flatten().tolist() == list(values)
        else:
            assert self.memory.values is None
        assert [entry.id for entry in self.memory] == list(ids)
        repr(self.memory)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Memories, "folder", tmp_path)


class TestMemories(Memories.TestCase):
    """The machine as a test case."""

    settings = examples(30, stateful_step_count=20)
