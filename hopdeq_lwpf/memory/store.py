"""Patterns with values and labels, by id: what a Memory keeps, without recall and files."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.memory.rows import DTYPES, Label, Rows, as_ids, as_labels, as_rows, digests, is_finite, own

DUPLICATES = ("allow", "skip", "error")
SHOWN = 3  # labels in the repr


class Stored(NamedTuple):
    """One stored pattern."""

    id: int
    pattern: Tensor  # (d,)
    value: Tensor | None  # (dv,)
    label: Label | None


class Store:
    """The content of a `Memory`, which documents it."""

    def __init__(
        self,
        patterns: Any,
        values: Any = None,
        labels: Sequence[Label] | Tensor | None = None,
        *,
        duplicates: str = "allow",
    ) -> None:
        if duplicates not in DUPLICATES:
            raise unknown("duplicates", duplicates, DUPLICATES)
        rows = as_rows("patterns", patterns)
        read = None if values is None else as_rows("values", values, like=rows)
        ids = torch.empty(0, dtype=torch.int64, device=rows.device)
        start = None if read is None else own(read[:0])
        self._fill(own(rows[:0]), start, ids, None if labels is None else [], 0, duplicates)
        self.add(rows, read, labels)

    def _fill(
        self,
        patterns: Tensor,
        values: Tensor | None,
        ids: Tensor,
        labels: list[Label] | None,
        next_id: int,
        duplicates: str,
    ) -> None:
        """Make these the content; the tensors are kept, not copied."""
        self._patterns, self._ids = Rows(patterns), Rows(ids)
        self._values = None if values is None else Rows(values)
        self._labels = labels
        self._next = next_id
        self._duplicates = duplicates
        self._known: dict[bytes, int] | None = None  # digest of a pattern -> id, made when first needed

    # --- what is stored

    @property
    def patterns(self) -> Tensor:
        """(N, d), in the order of adding. A view: do not write to it."""
        return self._patterns.view

    @property
    def values(self) -> Tensor | None:
        """(N, dv) or None. A view: do not write to it."""
        return None if self._values is None else self._values.view

    @property
    def ids(self) -> Tensor:
        """(N,) int64, ascending. A view: do not write to it."""
        return self._ids.view

    @property
    def labels(self) -> list[Label] | None:
        """N labels or None; a copy."""
        return None if self._labels is None else list(self._labels)

    @property
    def dtype(self) -> torch.dtype:
        return self.patterns.dtype

    @property
    def device(self) -> torch.device:
        return self.patterns.device

    @property
    def width(self) -> int:
        """d, the number of entries of a pattern."""
        return self.patterns.shape[1]

    def __len__(self) -> int:
        return self._patterns.count

    def __contains__(self, id: object) -> bool:
        """Whether there is a pattern of this id."""
        try:
            wanted = as_ids(id, self.ids)
        except TypeError:
            return False
        return wanted.numel() == 1 and bool(self._find(wanted)[1])

    def __getitem__(self, id: int) -> Stored:
        """The pattern of an id, not of a position; KeyError where there is none."""
        wanted = as_ids(id, self.ids)
        if wanted.numel() != 1:
            raise TypeError(f"a memory is indexed by one id, got {id!r}")
        return self._stored(int(self._positions(wanted)))

    def __iter__(self) -> Iterator[Stored]:
        """Every stored pattern, in the order of adding."""
        snapshot = self.clone()
        return (snapshot._stored(position) for position in range(len(snapshot)))

    def _stored(self, position: int) -> Stored:
        value = None if self.values is None else self.values[position]
        label = None if self._labels is None else self._labels[position]
        return Stored(int(self.ids[position]), self.patterns[position], value, label)

    def _positions(self, ids: Tensor) -> Tensor:
        """Where these ids are stored; KeyError that names the first that is not."""
        places, found = self._find(ids)
        if not bool(found.all()):
            wrong = int(ids[~found][0])
            was = "was removed" if 0 <= wrong < self._next else "was never given"
            raise KeyError(f"no pattern has id {wrong}: it {was}")
        return places

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where each id is stored, 0 where it is not, and whether it is."""
        if not len(self):
            return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        places = torch.searchsorted(self.ids, ids).clamp(max=len(self) - 1)
        found = self.ids[places] == ids
        return places.masked_fill(~found, 0), found

    def __repr__(self) -> str:
        parts = [f"N={len(self)}", f"d={self.width}"]
        if self.values is not None:
            parts.append(f"dv={self.values.shape[1]}")
        parts.append(str(self.dtype).removeprefix("torch."))
        if self.device.type != "cpu":
            parts.append(str(self.device))
        if self._labels is not None:
            shown = [repr(label) for label in self._labels[:SHOWN]]
            parts.append(f"labels=[{', '.join([*shown, '...'] if len(self) > SHOWN else shown)}]")
        if self._duplicates != "allow":
            parts.append(f"duplicates={self._duplicates!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        """Whether ids, patterns, values, labels and dtype are equal; the devices may differ."""
        if not isinstance(other, Store):
            return NotImplemented
        if self.dtype != other.dtype or self._labels != other._labels:
            return False
        pairs = ((self.ids, other.ids), (self.patterns, other.patterns), (self.values, other.values))
        return all(a is b if a is None or b is None else torch.equal(a.cpu(), b.cpu()) for a, b in pairs)

    # --- changing it

    def add(self, patterns: Any, values: Any = None, labels: Any = None) -> Tensor:
        """Store n more patterns and return their ids, (n,) int64.

        patterns: (n, d), or (d,) for one; values: (n, dv), or (dv,); labels: n of them, or one. Values and
        labels are needed where the memory has them and refused where it has none.
        Raises TypeError or ValueError, naming the argument, for another width, dtype or number of rows, for
        NaN or inf, and for a duplicate where the memory was made with duplicates="error".
        """
        rows = as_rows("patterns", patterns, like=self.patterns, width=self.width, single=True)
        read = self._new_values(values, len(rows))
        names = self._new_labels(labels, len(rows))
        keys: dict[bytes, int] = {}
        ids = torch.arange(self._next, self._next + len(rows), device=self.device)
        if self._duplicates != "allow":
            ids, fresh, keys = self._sift(rows)
            rows, read = rows[fresh], None if read is None else read[fresh]
            names = None if names is None else [names[row] for row in fresh]
        new = torch.arange(self._next, self._next + len(rows), device=self.device)
        columns = [(self._patterns, rows), (self._ids, new)]
        if self._values is not None and read is not None:
            columns.append((self._values, read))
        for column, _ in columns:
            column.reserve(len(rows))
        for column, content in columns:  # from here on nothing can fail
            column.append(content)
        self._next += len(rows)
        if self._labels is not None and names is not None:
            self._labels.extend(names)
        if self._known is not None:
            self._known.update(keys)
        return ids

    def _new_values(self, values: Any, count: int) -> Tensor | None:
        if values is None and self.values is None:
            return None
        if self.values is None:
            raise ValueError(
                "values was given, but this memory has none; make one with Memory(patterns, values)"
            )
        if values is None:
            raise ValueError(
                f"values is missing: this memory has values of width {self.values.shape[1]}, one row a pattern"
            )
        read = as_rows("values", values, like=self.values, width=self.values.shape[1], single=True)
        if len(read) != count:
            raise ValueError(f"values has {len(read)} rows, but patterns has {count}; give one row a pattern")
        return read

    def _new_labels(self, labels: Any, count: int) -> list[Label] | None:
        if labels is None and self._labels is None:
            return None
        if self._labels is None:
            raise ValueError(
                "labels was given, but this memory has none; make one with Memory(..., labels=...)"
            )
        if labels is None:
            raise ValueError("labels is missing: this memory has labels, one a pattern")
        names = as_labels(labels)
        if len(names) != count:
            raise ValueError(f"labels has {len(names)} entries, but patterns has {count}; give one a pattern")
        return names

    def _sift(self, rows: Tensor) -> tuple[Tensor, list[int], dict[bytes, int]]:
        """The id of every row, the rows that are new, and their digests."""
        if self._known is None:
            pairs = zip(digests(self.patterns), self.ids.tolist(), strict=True)
            self._known = {}
            for key, id in pairs:
                self._known.setdefault(key, id)
        new: dict[bytes, int] = {}
        ids: list[int] = []
        fresh: list[int] = []
        for row, key in enumerate(digests(rows)):
            found = self._known.get(key, new.get(key))
            if found is None:
                found = new[key] = self._next + len(fresh)
                fresh.append(row)
            elif self._duplicates == "error":
                raise ValueError(
                    f"patterns holds a duplicate in row {row} (counted from 0): it equals "
                    + (
                        f"row {fresh[found - self._next]}"
                        if found >= self._next
                        else f"the pattern of id {found}"
                    )
                )
            ids.append(found)
        return torch.tensor(ids, dtype=torch.int64, device=self.device), fresh, new

    def remove(self, ids: Any = None, *, labels: Any = None) -> Tensor:
        """Remove the patterns of these ids, or all that have one of these labels; returns their ids, ascending.

        Raises KeyError, naming it, for an id or label that is not there, and then removes nothing.
        """
        if (ids is None) == (labels is None):
            raise TypeError("remove needs ids or labels, one of the two")
        keep = torch.ones(len(self), dtype=torch.bool, device=self.device)
        if labels is None:
            keep[self._positions(as_ids(ids, self.ids))] = False
        else:
            keep &= ~self._labelled(as_labels(labels))
        removed = self.ids[~keep]
        # New tensors, so that views and graphs of the old ones stay valid.
        values = None if self.values is None else own(self.values[keep])
        kept = keep.tolist()
        names = self._labels and [name for name, stays in zip(self._labels, kept, strict=True) if stays]
        self._fill(own(self.patterns[keep]), values, own(self.ids[keep]), names, self._next, self._duplicates)
        return removed

    def _labelled(self, wanted: list[Label]) -> Tensor:
        """(N,) bool: which patterns have one of these labels."""
        if self._labels is None:
            raise ValueError("this memory has no labels: remove by ids, or make it with labels")
        there = set(self._labels)
        for label in wanted:
            if label not in there:
                names = [name for name in there if isinstance(name, str)]
                near = difflib.get_close_matches(str(label), sorted(names), n=1)
                raise KeyError(
                    f"no pattern has label {label!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                )
        chosen = set(wanted)
        return torch.tensor([label in chosen for label in self._labels], dtype=torch.bool, device=self.device)

    def clone(self) -> Self:
        """A memory of its own with the same content."""
        return self.to()

    def __copy__(self) -> Self:
        return self.clone()  # two memories that append to one tensor would overwrite each other

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Self:
        """A copy on another device or of another dtype, ids and labels included; `to(torch.float64)` works too.

        Raises ValueError where an entry is too large for the dtype.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
        patterns, values = (
            None if part is None else own(part.to(device=device, dtype=dtype))
            for part in (self.patterns, self.values)
        )
        assert patterns is not None
        for name, part in (("patterns", patterns), ("values", values)):
            if part is not None and not is_finite(part):
                raise ValueError(f"{name} holds numbers too large for {dtype}")
        copy = type(self).__new__(type(self))
        ids = own(self.ids.to(patterns.device))
        copy._fill(patterns, values, ids, self.labels, self._next, self._duplicates)
        return copy
