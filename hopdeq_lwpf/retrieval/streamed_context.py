"""What stays fixed during a retrieval over streamed patterns, and what its passes saw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf.streaming import PatternSource, Ranks, TensorPatterns
from hopdeq_lwpf.streaming.attention import Attended, Stored, check_values
from hopdeq_lwpf.streaming.ranks import ALONE


@dataclass
class Look:
    """What passes over the patterns saw, a row a query."""

    attended: Attended | None = None  # at the read-out
    support: Tensor | None = None  # (B,): how many weights are above 0 there
    passes: int = 0  # over all patterns, made by screening
    z: Tensor | None = None  # (B, d): states of passes that need not be made again, NaN where there is none
    known: Attended | None = None  # what they gave

    def forget(self, z: Tensor) -> None:
        """Begin to remember passes at states like z (B, d)."""
        self.z, self.known = torch.full_like(z, math.nan), None

    def remember(self, rows: Tensor, z: Tensor, found: Attended) -> None:
        """That the pass at the states z of these rows gave `found`."""
        assert self.z is not None
        if self.known is None:  # the first pass is one over all rows
            self.z, self.known = z, found
            return
        self.z = self.z.index_copy(0, rows, z)
        pairs = zip(self.known, found, strict=True)
        self.known = Attended(*(None if old is None else old.index_copy(0, rows, new) for old, new in pairs))  # type: ignore[arg-type]

    def note(self) -> str:
        """What a Solution says of it."""
        return f"screened: {self.passes} passes over all patterns, else on candidates" if self.passes else ""


class StreamedContext(NamedTuple):
    """What stays fixed during a solve over streamed patterns; built by `Retrieval.prepare`. B = number of queries."""

    patterns: Tensor | PatternSource  # (N, d), those of this process
    beta: Tensor | float  # a number, a scalar tensor or (B, 1)
    mask: Tensor | None  # bool (N,) or (B, N)
    threshold: Tensor | None  # of the forgetting unit: (B, 1) or a scalar
    injected: Tensor | None  # (B, d): inject_weight * query
    start: Tensor  # (*batch, d): the state that the query makes
    pull: Tensor | float | None  # inject_weight as beta is laid out, where f divides by it
    block: int | None
    look: Look
    values: Tensor | PatternSource | None = None  # (N, dv): what is read out in place of the patterns
    ranks: Ranks = ALONE
    offset: int = 0  # number of the first pattern among those of all ranks
    total: int = 0  # patterns of all ranks

    def select(self, live: Tensor) -> tuple[StreamedContext, Tensor]:
        """The context of the live queries, and their rows."""
        rows = live.nonzero().squeeze(1)

        def kept(part: Any) -> Any:
            return part.index_select(0, rows) if isinstance(part, Tensor) and part.ndim > 1 else part

        names = ("beta", "mask", "threshold", "injected", "pull")
        narrowed = {name: kept(getattr(self, name)) for name in names}
        start = kept(self.start.reshape(-1, self.start.shape[-1]))
        return self._replace(start=start, **narrowed), rows

    def stored(self, *, values: bool = False) -> Stored:
        """The patterns, with their values if those are read out."""
        read = self.values if values else None
        return Stored(self.patterns, read, self.mask, self.offset, self.ranks, self.block)

    def with_values(self, values: Any) -> StreamedContext:
        """The same with values (N, dv) to be read out."""
        check_values(values, self.patterns)
        # As with patterns, a tensor is handed on as such.
        values = values.tensor if type(values) is TensorPatterns else values
        self.ranks.check_same(
            {"widths of values": (values.shape[1], getattr(values, "requires_grad", False))}
        )
        return self._replace(values=values)
