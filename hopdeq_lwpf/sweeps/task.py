"""What a comparison asks: the stored patterns, and queries with their right answers."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from hopdeq_lwpf.data import Preprocessing, corrupt, load_digits, read_array, read_indices
from hopdeq_lwpf.data.digits import PICTURE_SHAPE
from hopdeq_lwpf.sweeps.spec import CompareSpec, SpecError


@dataclass(frozen=True)
class QuerySet:
    """Queries of one kind and strength of corruption; given queries have the kind "given" and no level."""

    kind: str
    level: float | None
    raw: Tensor  # (B, d), in the units of the data
    queries: Tensor  # (B, d), in the space of the stored patterns


@dataclass(frozen=True)
class Task:
    """Stored patterns and the query sets asked of them; every set has B queries, in the same order."""

    source: str
    raw: Tensor  # (N, d), in the units of the data
    patterns: Tensor  # (N, d), as stored
    preprocessing: Preprocessing
    sets: tuple[QuerySet, ...]
    targets: Tensor | None  # (B,) int64, the row of the right pattern
    shape: tuple[int, int] | None  # height and width, where a pattern is a picture

    @property
    def size(self) -> int:
        """B, the number of queries in each set."""
        return len(self.sets[0].queries)


def build_task(spec: CompareSpec) -> Task:
    """Read or draw what the spec asks for; DataError or SpecError, one line, where that is impossible."""
    shape: tuple[int, int] | None
    if spec.patterns is None:
        raw, shape, source = load_digits()[0], PICTURE_SHAPE, "handwritten digits"
    else:
        raw, shape, source = read_array(spec.patterns, names=("patterns",)), spec.shape, str(spec.patterns)
    raw = _subset(raw, spec)
    if shape is not None and shape[0] * shape[1] != raw.shape[1]:
        raise SpecError(f"shape {list(shape)} does not fit patterns of {raw.shape[1]} numbers")
    if not bool((raw != raw[0]).any()) and "center" in spec.normalize:
        raise SpecError("all patterns are equal: centring leaves nothing; use normalize 'none' or 'unit'")
    preprocessing = Preprocessing.fit(raw, spec.normalize)
    sets, targets = _given(spec, raw) if spec.queries is not None else _corrupted(spec, raw)
    ready = tuple(QuerySet(kind, level, queries, preprocessing(queries)) for kind, level, queries in sets)
    return Task(source, raw, preprocessing(raw), preprocessing, ready, targets, shape)


def _generator(spec: CompareSpec, purpose: str) -> torch.Generator:
    # One stream for each purpose: dropping a kind leaves the queries of the others as they were.
    return torch.Generator().manual_seed(zlib.crc32(f"{spec.seed}/{purpose}".encode()))


def _subset(raw: Tensor, spec: CompareSpec) -> Tensor:
    if spec.stored is None:
        return raw
    if spec.stored > len(raw):
        raise SpecError(f"stored is {spec.stored}, but there are only {len(raw)} patterns")
    return raw[torch.randperm(len(raw), generator=_generator(spec, "stored"))[: spec.stored]]


Sets = list[tuple[str, float | None, Tensor]]


def _corrupted(spec: CompareSpec, raw: Tensor) -> tuple[Sets, Tensor]:
    targets = torch.randperm(len(raw), generator=_generator(spec, "samples"))[: spec.samples]
    limits = (float(raw.min()), float(raw.max()))
    # The stream does not depend on the level: a stronger corruption continues the weaker one of the same
    # query, so that levels, too, are compared in pairs.
    return [
        (kind, level, corrupt(raw[targets], kind, level, generator=_generator(spec, kind), limits=limits))
        for kind, level in spec.levels
    ], targets


def _given(spec: CompareSpec, raw: Tensor) -> tuple[Sets, Tensor | None]:
    assert spec.queries is not None
    queries = read_array(spec.queries, names=("queries", "query"), width=raw.shape[1])
    targets = None
    if spec.targets is not None:
        targets = read_indices(spec.targets, count=len(queries), limit=len(raw))
    return [("given", None, queries)], targets
