"""Solutions, and structures of tensors such as checkpoints, to and from disk."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor

from hopdeq_lwpf._types import AdjointReport, Solution, Trace
from hopdeq_lwpf.data.errors import DataError
from hopdeq_lwpf.data.tensors import Kind, read_tensors, write_tensors
from hopdeq_lwpf.memory import MemoryRecall
from hopdeq_lwpf.recall import Recall

SOLUTION = Kind("solution", 1, "load_solution(path)")
# The only classes that a file can name: reading one builds nothing else.
CLASSES: dict[str, Any] = {
    kind.__name__: kind for kind in (Solution, Recall, MemoryRecall, Trace, AdjointReport)
}
# What a field of a Solution must be wherever it is there; value, state and labels have many forms.
FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("result", "residual", "steps", "evaluations"), (Tensor,)),
    **dict.fromkeys(("index", "weight", "support", "ids"), (Tensor,)),
    "energy": (Tensor, type(None)),
    "trace": (Trace, type(None)),
    "adjoint": (AdjointReport, type(None)),
    "note": (str,),
}


def save_solution(solution: Solution, path: str | os.PathLike[str]) -> None:
    """Write a Solution, Recall or MemoryRecall to a safetensors file, all fields, without gradient.

    States that are dicts, lists and tuples of tensors keep their structure; a named tuple becomes a tuple.
    What the backward pass reported so far is saved, too. What stood at `path` stays whole until the new file
    is. Raises TypeError for what such a file cannot hold, DataError where `path` cannot be written.
    """
    if type(solution) not in CLASSES.values():
        raise TypeError(
            f"solution must be one of {', '.join(CLASSES)}, got {type(solution).__name__}; convert it with "
            "Solution(...) first"
        )
    write_structure(path, SOLUTION, solution)


def load_solution(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Solution:
    """What `save_solution` wrote, of the class that was saved, bit for bit; no tensor requires grad.

    Raises DataError, one line, for a file that is missing, damaged, of another kind or of a newer version.
    """
    solution = read_structure(path, SOLUTION, device)
    if not isinstance(solution, Solution):
        raise DataError(f"{path}: is damaged: it describes a {type(solution).__name__}, not a Solution")
    for name, kinds in FIELDS.items():
        if hasattr(solution, name) and not isinstance(getattr(solution, name), kinds):
            raise DataError(f"{path}: is damaged: its {name} is a {type(getattr(solution, name)).__name__}")
    return solution


def write_structure(path: str | os.PathLike[str], kind: Kind, value: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings, booleans and None to a safetensors file.

    Keys of dicts are strings or whole numbers. A subclass of dict, list or tuple comes back as dict, list or tuple.
    Raises TypeError that names the entry for anything else, DataError where `path` cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    described = _describe(value, "", tensors, {})
    write_tensors(path, kind, tensors, {kind.name: described})


def read_structure(
    path: str | os.PathLike[str], kind: Kind, device: str | torch.device = "cpu", *, own: bool = False
) -> Any:
    """What `write_structure` wrote, bit for bit. Builds nothing but that: no code of the file runs.

    own: whether the tensors are copies; else, on the CPU, they are private maps of the file until they are read.
    Raises DataError, one line, for a file that is missing, damaged, of another kind or of a newer version.
    """
    tensors, description = read_tensors(path, kind, device)
    if own:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        return _build(description[kind.name], tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        detail = (str(error).splitlines() or [""])[0][:200]
        raise DataError(f"{path}: is damaged ({type(error).__name__}: {detail})") from error


# A key of `where`: tensors that are one and the same are written once and stay one when they are read.
_Place = tuple[Any, ...]


def _describe(value: Any, name: str, tensors: dict[str, Tensor], where: dict[_Place, str]) -> Any:
    """`value` as JSON, its tensors by name; they are entered in `tensors`."""

    def inner(part: Any, key: object) -> Any:
        return _describe(part, f"{name}.{key}" if name else str(key), tensors, where)

    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Tensor):
        # safetensors has no complex128: complex numbers are written as pairs.
        form = "complex" if value.is_complex() else "tensor"
        return {form: _enter(value, name, tensors, where)}
    if isinstance(value, list):
        return {"list": [inner(part, key) for key, part in enumerate(value)]}
    if isinstance(value, tuple):
        return {"tuple": [inner(part, key) for key, part in enumerate(value)]}
    if isinstance(value, dict):
        wrong = next((key for key in value if not isinstance(key, (str, int))), None)
        if wrong is not None:
            raise TypeError(
                f"{name} has the key {wrong!r}; a saved dict needs strings or whole numbers as keys"
            )
        return {"dict": [[key, inner(part, key)] for key, part in value.items()]}
    if type(value) in CLASSES.values():
        entries = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {
            "class": type(value).__name__,
            "fields": {key: inner(part, key) for key, part in entries.items()},
        }
    raise TypeError(
        f"{name} holds a {type(value).__name__}, which such a file cannot; use tensors, numbers, strings, lists, "
        "tuples or dicts"
    )


def _enter(tensor: Tensor, name: str, tensors: dict[str, Tensor], where: dict[_Place, str]) -> str:
    if tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(f"{name} must be a dense tensor with data, got {tensor.layout} on {tensor.device}")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
    if tensor.numel() and place in where:
        return where[place]
    unique, count = name, 1
    while unique in tensors:  # keys that hold dots, as in {"a.b": ..., "a": {"b": ...}}
        count += 1
        unique = f"{name}#{count}"
    tensors[unique] = tensor
    where[place] = unique
    return unique


def _build(described: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_describe`."""
    if not isinstance(described, dict):
        if isinstance(described, list):
            raise TypeError("a list without its kind")
        return described
    if "class" in described:
        kind, entries = CLASSES[described["class"]], described["fields"]
        return kind(**{key: _build(part, tensors) for key, part in entries.items()})
    ((form, content),) = described.items()
    if form == "tensor":
        return tensors[content]
    if form == "complex":
        return torch.view_as_complex(tensors[content])
    if form == "dict":
        return {key: _build(part, tensors) for key, part in content}
    if form in ("list", "tuple"):
        parts = [_build(part, tensors) for part in content]
        return parts if form == "list" else tuple(parts)
    raise ValueError(f"unknown form {form!r}")
