"""A memory that users keep: stored patterns with their values and labels, and recall from them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hopdeq_lwpf.data.errors import DataError
from hopdeq_lwpf.data.tensors import Kind, read_tensors, write_tensors
from hopdeq_lwpf.forgetting import Forgetting
from hopdeq_lwpf.memory.rows import DTYPES, Label, as_ids, is_finite
from hopdeq_lwpf.memory.store import DUPLICATES, Store
from hopdeq_lwpf.normalization import Normalization
from hopdeq_lwpf.recall import Recall, retrieve
from hopdeq_lwpf.separation import Separation
from hopdeq_lwpf.solvers.adjoints import Adjoint
from hopdeq_lwpf.solvers.base import Solver
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.streaming import PatternSource

LAST = 2**62  # id that a file may say is the next, far from where int64 ends
MEMORY = Kind("memory", 1, "Memory.load(path)")


@dataclass(frozen=True)
class MemoryRecall(Recall):
    """A Recall that also says which stored pattern it was, whatever is added or removed later.

    ids: of the pattern of largest weight, int64, shape of `index`; -1 where everything was forgotten.
    labels: its label, in lists nested as `ids` is, None where everything was forgotten; a single label for a
        single query; None where the memory has no labels.
    """

    ids: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    labels: Any = None


class Memory(Store):
    """Stored patterns, each with an id and, if wanted, a value and a label.

        memory = Memory(images, labels=names)
        memory.add(more, labels=more_names)
        memory.recall(queries, beta=16.0).labels

    patterns: (N, d), a tensor or what `torch.as_tensor` makes one of, float64, float32, bfloat16 or float16;
        copied. N may be 0. Whole numbers are refused, since the dtype of the memory is that of its queries.
    values: (N, dv) of the same dtype, read out instead of the patterns; None: none. Either every pattern
        has a value or none has; the same holds for labels.
    labels: N strings or whole numbers; several patterns may have the same.
    duplicates: what `add` does with a pattern that is stored already, entry by entry: "allow" stores it again
        (default: asks nothing of the patterns); "skip" leaves the stored one, value and label included, as it
        is and returns its id; "error" raises.

    The ids are 0, 1, 2, ... in the order of adding; an id stays with its pattern and is never given again. A
    call that raises leaves the memory as it was. Adding takes amortised time in proportion to what is added
    (the capacity doubles); removing takes time in proportion to what stays.

    A memory holds data: patterns and values that require grad are detached. Queries, beta and what else
    `recall` takes have their gradients. To train patterns use `retrieve` or a layer. It is no nn.Module:
    its tensors change shape, which load_state_dict and optimisers do not allow, and ids and labels are no
    tensors; so `to` and `save` are methods here.
    """

    # --- recall

    def recall(  # noqa: PLR0913 (the keywords of retrieve)
        self,
        query: Tensor,
        *,
        beta: float | Tensor = 1.0,
        values: Tensor | PatternSource | None = None,
        forgetting: None | str | Forgetting = None,
        separation: str | Separation = "softmax",
        mask: Tensor | None = None,
        steps: int | None = None,
        inject: str = "start",
        inject_weight: float | Tensor = 1.0,
        similarity: str | None = None,
        normalize: None | str | Normalization = None,
        solver: str | Solver = "auto",
        stop: Termination = Termination(),  # noqa: B008 (frozen)
        adjoint: str | Adjoint = "implicit",
        trace: bool = False,
        stream: bool | None = None,
        screen: bool | None = None,
    ) -> MemoryRecall:
        """`retrieve(query, memory.patterns, ...)` with ids and labels; query (*batch, d) of the memory's dtype.

        values: (N, dv), a tensor or a mapped file, read out instead of the memory's values; None: those, or the
        patterns where there are none. mask: (N,) or (*batch, N) bool in the order of `memory.ids`, True = ignore.
        All else: see `retrieve`.
        """
        if not len(self):
            raise ValueError("this memory is empty: add patterns before recalling")
        recall = retrieve(
            query,
            self.patterns,
            beta=beta,
            values=self.values if values is None else values,
            forgetting=forgetting,
            separation=separation,
            mask=mask,
            steps=steps,
            inject=inject,
            inject_weight=inject_weight,
            similarity=similarity,
            normalize=normalize,
            solver=solver,
            stop=stop,
            adjoint=adjoint,
            trace=trace,
            stream=stream,
            screen=screen,
        )
        fields = {field.name: getattr(recall, field.name) for field in dataclasses.fields(recall)}
        ids = self.ids[recall.index.clamp(min=0)].masked_fill(recall.index < 0, -1)
        labels = None if self._labels is None else _tree(recall.index.tolist(), self._labels)
        return MemoryRecall(**fields, ids=ids, labels=labels)

    def labels_of(self, recall: Recall | Tensor) -> Any:
        """The labels of what was recalled, in lists nested as the batch is; None where everything was forgotten.

        recall: a MemoryRecall, or an int64 tensor of ids (None, too, where an id is no longer stored); or what
        `retrieve` made of `memory.patterns`, provided that nothing has been removed since.
        """
        if self._labels is None:
            raise ValueError("this memory has no labels; make one with Memory(..., labels=...)")
        if isinstance(recall, Recall) and not isinstance(recall, MemoryRecall):
            index = recall.index
            if index.numel() and int(index.max()) >= len(self):
                raise ValueError(
                    f"recall points to pattern {int(index.max())}, but this memory has {len(self)}: it is another's"
                )
        elif isinstance(recall, (MemoryRecall, Tensor)):
            ids = recall.ids if isinstance(recall, MemoryRecall) else recall
            places, found = self._find(as_ids(ids, self.ids))
            index = places.masked_fill(~found, -1).reshape(ids.shape)
        else:
            raise TypeError(f"recall must be a Recall or a tensor of ids, got {type(recall).__name__}")
        return _tree(index.tolist(), self._labels)

    # --- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory to a safetensors file; what stood at `path` stays whole until the new file is.

        Raises DataError where `path` cannot be written.
        """
        tensors = {"patterns": self.patterns, "ids": self.ids}
        if self.values is not None:
            tensors["values"] = self.values
        about = {"labels": self._labels, "next_id": self._next, "duplicates": self._duplicates}
        write_tensors(path, MEMORY, tensors, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Self:
        """The memory that `save` wrote, equal to it, ids and the next id included. Runs no code of the file.

        On the CPU the patterns stay in the file until they are read (a private map), without a second copy.
        Raises DataError, one line, for a file that is missing, damaged, of another kind or of a newer version.
        """
        tensors, about = read_tensors(path, MEMORY, device)
        reason = _flaw(tensors, about)
        if reason is not None:
            raise DataError(f"{path}: is damaged: {reason}")
        memory = cls.__new__(cls)
        parts = (tensors["patterns"], tensors.get("values"), tensors["ids"])
        memory._fill(*parts, about["labels"], about["next_id"], about["duplicates"])
        return memory

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike[str],
        size: int | Sequence[int] | None = None,
        *,
        mode: str = "L",
        dtype: torch.dtype = torch.float32,
        duplicates: str = "allow",
    ) -> Self:
        """The images of a folder as patterns in [0, 1], row by row, their file names as labels.

        size, mode: see `hopdeq_lwpf.data.read_images`. Raises DataError as that does.
        """
        from hopdeq_lwpf.data.images import read_images

        images, names = read_images(path, size=size, mode=mode)
        return cls(images.flatten(1).to(dtype), labels=names, duplicates=duplicates)

    @classmethod
    def from_idx(
        cls,
        images: str | os.PathLike[str],
        labels: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        duplicates: str = "allow",
    ) -> Self:
        """The items of an IDX file (MNIST), packed or not, as patterns; bytes scaled to [0, 1].

        labels: the IDX file of one whole number an item. Raises DataError where the two do not fit.
        """
        from hopdeq_lwpf.data.idx import read_idx, read_idx_rows

        rows = read_idx_rows(images, dtype)
        names = None if labels is None else read_idx(labels)
        if names is not None and (names.shape != rows.shape[:1] or names.is_floating_point()):
            raise DataError(
                f"{labels}: needs one whole number for each of the {len(rows)} items of {Path(images).name}, got "
                f"{names.dtype} of shape {tuple(names.shape)}"
            )
        return cls(rows, labels=names, duplicates=duplicates)


def _tree(index: Any, labels: list[Label]) -> Any:
    """The labels of nested lists of positions; None for -1."""
    if isinstance(index, list):
        return [_tree(part, labels) for part in index]
    return None if index < 0 else labels[index]


def _flaw(tensors: dict[str, Tensor], about: dict[str, Any]) -> str | None:
    """What is wrong with the content of a file; None if nothing is."""
    patterns, values, ids = (tensors.get(name) for name in ("patterns", "values", "ids"))
    labels, next_id = about.get("labels"), about.get("next_id")
    if patterns is None or ids is None:
        return f"it has {', '.join(sorted(tensors)) or 'no tensors'}, and needs patterns and ids"
    for name, part in (("patterns", patterns), ("values", values)):
        if part is None:
            continue
        if part.dtype != patterns.dtype or part.dtype not in DTYPES:
            return f"{name} has dtype {part.dtype}"
        if part.ndim != 2 or part.shape[1] == 0 or len(part) != len(patterns):
            return f"{name} has shape {tuple(part.shape)}"
        if not is_finite(part):
            return f"{name} holds NaN or inf"
    if ids.dtype != torch.int64 or ids.shape != patterns.shape[:1] or bool((ids.diff() <= 0).any()):
        return "its ids are not one ascending number a pattern"
    lowest, least = (int(ids[0]), int(ids[-1]) + 1) if len(ids) else (0, 0)
    if (
        not isinstance(next_id, int)
        or isinstance(next_id, bool)
        or not least <= next_id <= LAST
        or lowest < 0
    ):
        return f"its next id is {next_id!r}, and must be at least {least}"
    if about.get("duplicates") not in DUPLICATES:
        return f"duplicates is {about.get('duplicates')!r}"
    if "labels" not in about:
        return "it says nothing of labels"
    if labels is None:
        return None
    if not isinstance(labels, list) or len(labels) != len(patterns):
        return "its labels are not one a pattern"
    if any(isinstance(name, bool) or not isinstance(name, (str, int)) for name in labels):
        return "its labels are not strings and whole numbers"
    return None
