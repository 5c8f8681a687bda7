"""Rows that grow at the end, and what a Memory takes as rows, labels and ids."""

from __future__ import annotations

import operator
from hashlib import blake2b
from typing import Any, TypeAlias

import torch
from torch import Tensor

Label: TypeAlias = str | int
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Rows:
    """A tensor (N, ...) to which rows are appended in amortised time O(rows appended).

    The capacity doubles. Rows are written once, behind those that `view` has handed out, so that a view, and a
    graph that holds one, stays valid whatever is appended later.
    """

    def __init__(self, rows: Tensor) -> None:
        """`rows` is kept, not copied."""
        self._buffer, self.count = rows, len(rows)

    @property
    def view(self) -> Tensor:
        return self._buffer[: self.count]

    def reserve(self, more: int) -> None:
        """Make room for `more` rows; nothing else changes, so that running out of memory does no harm."""
        needed, capacity = self.count + more, len(self._buffer)
        if needed > capacity:
            self._buffer = own(self.view, max(needed, 2 * capacity))

    def append(self, rows: Tensor) -> None:
        """Write rows for which there is room."""
        end = self.count + len(rows)
        # Through `.data`, which has a version counter of its own: autograd would otherwise take every graph
        # that holds a view of earlier rows for spoilt.
        self._buffer.data[self.count : end] = rows
        self.count = end


def own(rows: Tensor, capacity: int | None = None) -> Tensor:
    """A copy with room for `capacity` rows, no inference tensor, so that it can be written to later."""
    with torch.inference_mode(False), torch.no_grad():
        shape = (len(rows) if capacity is None else capacity, *rows.shape[1:])
        copy = torch.empty(shape, dtype=rows.dtype, device=rows.device)
        copy[: len(rows)] = rows
    return copy


def is_finite(rows: Tensor) -> bool:
    """Whether no entry is NaN or infinite; without a temporary tensor of the size of `rows`."""
    if not rows.numel():
        return True
    low, high = torch.aminmax(rows)
    return bool(low.isfinite() & high.isfinite())


def as_rows(
    name: str, given: Any, *, like: Tensor | None = None, width: int | None = None, single: bool = False
) -> Tensor:
    """(n, width) without gradient, of the dtype and device of `like`; an error that says what is wrong.

    `width`: None for any. `single`: whether (width,) stands for one row. Lists take the dtype of `like`;
    tensors and arrays must have it.
    """
    rows = _as_tensor(name, given, like)
    if single and width is not None and rows.shape == (0,):
        rows = rows.reshape(0, width)
    if rows.dtype not in DTYPES or rows.layout != torch.strided:
        help_ = f"; use torch.as_tensor({name}, dtype=torch.float32)" if not rows.is_floating_point() else ""
        raise TypeError(
            f"{name} must be dense, of dtype float64, float32, bfloat16 or float16, got {rows.dtype}{help_}"
        )
    if single and rows.ndim == 1:
        rows = rows[None]
    if rows.ndim != 2 or rows.shape[1] == 0:
        form = "(n, width) or (width,)" if single else "(N, width)"
        raise ValueError(f"{name} must be {form} with width at least 1, got shape {tuple(rows.shape)}")
    if width is not None and rows.shape[1] != width:
        raise ValueError(f"{name} has width {rows.shape[1]}, but the memory has width {width}")
    if like is not None and (rows.dtype != like.dtype or rows.device != like.device):
        raise TypeError(
            f"{name} is {rows.dtype} on {rows.device}, but the memory is {like.dtype} on {like.device}; convert "
            "one of them with .to()"
        )
    if not is_finite(rows):
        row = int((~rows.isfinite().all(-1)).nonzero()[0])
        raise ValueError(f"{name} holds NaN or inf in row {row} (counted from 0)")
    return rows


def _as_tensor(name: str, given: Any, like: Tensor | None) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach()
    try:
        tensor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        detail = (str(error).splitlines() or [""])[0]
        raise TypeError(
            f"{name} must be a tensor, an array or lists of numbers, got {type(given).__name__} ({detail}); tensors "
            "in a list become one by torch.stack"
        ) from error
    if like is None or not isinstance(given, (list, tuple)):
        return tensor
    if tensor.is_floating_point() or not tensor.numel():
        # Once more from the numbers: they would be rounded to float32 on the way to float64.
        tensor = torch.as_tensor(given, dtype=like.dtype, device=like.device)
    return tensor


def as_labels(labels: Any) -> list[Label]:
    """A list of strings and whole numbers; one label stands for itself."""
    if isinstance(labels, (str, int)):
        labels = [labels]
    if isinstance(labels, Tensor) or hasattr(labels, "tolist"):
        labels = labels.tolist()
        labels = labels if isinstance(labels, list) else [labels]
    # Sets and dicts have no order to go by, and bytes would become numbers.
    if isinstance(labels, (set, frozenset, dict, bytes)) or not hasattr(labels, "__iter__"):
        raise TypeError(f"labels must be a sequence of strings or whole numbers, got {labels!r}")
    items = list(labels)
    return [_as_label(row, label) for row, label in enumerate(items)]


def _as_label(row: int, label: Any) -> Label:
    if isinstance(label, str):
        return str(label)
    if not isinstance(label, bool):
        try:
            return operator.index(label)
        except TypeError:
            pass
    raise TypeError(f"labels must be strings or whole numbers, got {label!r} in row {row} (counted from 0)")


def as_ids(ids: Any, like: Tensor) -> Tensor:
    """(n,) int64 on the device of `like`; one id stands for itself."""
    try:
        given = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"ids must be whole numbers, got {ids!r}") from None
    if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
        raise TypeError(f"ids must be whole numbers, got {given.dtype}")
    return given.reshape(-1).to(device=like.device, dtype=torch.int64)


def digests(rows: Tensor) -> list[bytes]:
    """16 bytes a row that are equal where the rows are; 0.0 and -0.0 count as equal."""
    content = torch.zeros(rows.shape, dtype=rows.dtype)
    content += rows.cpu()  # 0.0 + -0.0 is 0.0
    return [blake2b(row.tobytes(), digest_size=16).digest() for row in content.view(torch.uint8).numpy()]
