"""A memory that is written to online: it holds what its neurons were told, not the patterns."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from hopdeq_lwpf._types import wide
from hopdeq_lwpf.data.draws import check_number
from hopdeq_lwpf.models.sdm.function import (
    SDMContext,
    SDMFunction,
    as_float,
    check_bits,
    without_autocast,
)
from hopdeq_lwpf.models.sdm.neurons import Content, Neurons
from hopdeq_lwpf.models.sdm.recalls import AssociativeMemory, SDMRecall
from hopdeq_lwpf.models.sdm.weights import check_weights
from hopdeq_lwpf.normalization import Sphere
from hopdeq_lwpf.solvers.adjoints import Adjoint
from hopdeq_lwpf.solvers.base import Solver, check_count
from hopdeq_lwpf.solvers.termination import Termination

SPHERE = Sphere()
# Roundings of an activity and of a product with it.
ROUNDINGS = 8


class HeldFunction(SDMFunction):
    """`SDMFunction` of explicit neurons that keeps in buffers what was written, of addresses and of pointers.

    A context holds what the neurons held when it was made, in every dtype: a later write goes to a copy. Only the means
    that empty="mean" reads are those of the moment.

    `noise` says how much rounding may have left in each neuron and, last, in the totals. A removal that leaves no more
    than that empties the neuron; else its next reads would divide noise by noise.
    """

    weights: Neurons
    sums: Tensor
    load: Tensor
    total: Tensor
    pointed: Tensor | None
    pointed_total: Tensor | None
    noise: Tensor

    def __init__(
        self, neurons: Neurons, width: int | None, space: str, empty: str, read_out: str | None
    ) -> None:
        super().__init__(neurons, space=space, empty=empty, read_out=read_out)
        n = neurons.addresses.shape[1]
        self.register_buffer("sums", torch.zeros(len(neurons), n))
        self.register_buffer("load", torch.zeros(len(neurons)))
        self.register_buffer("total", torch.zeros(n + 1))  # of the keys, and how many there are
        self.register_buffer("pointed", None if width is None else torch.zeros(len(neurons), width))
        self.register_buffer("pointed_total", None if width is None else torch.zeros(width))
        self.register_buffer("noise", torch.zeros(len(neurons) + 1))
        self._lent = False  # whether a context holds the buffers

    def prepare(  # type: ignore[override]
        self, query: Tensor | SDMContext
    ) -> SDMContext:
        """The context of queries (*batch, n)."""
        if isinstance(query, SDMContext):
            return query
        query = as_float("query", query, self.binary)
        n = self.sums.shape[1]
        if query.ndim < 1 or query.shape[-1] != n:
            raise ValueError(
                f"query must be (*batch, {n}), as wide as the addresses, got {tuple(query.shape)}"
            )
        if query.device != self.sums.device:
            raise ValueError(
                f"query is on {query.device} but the memory is on {self.sums.device}; move one with .to()"
            )
        if self.binary:
            check_bits("query", query, nan=True)
        self._refuse_gradients(query, self.sums)
        dtype = wide(query).dtype
        content = Content(self.sums.to(dtype), self.load.to(dtype))
        pointed = None if self.pointed is None else content._replace(sums=self.pointed.to(dtype))
        start = query if self.binary else SPHERE.apply(query)
        self._lent = True
        return SDMContext(content.sums[:0], self.pointed, None, None, None, content, pointed, start)

    def nearest(self, z: Tensor, x: SDMContext) -> tuple[Tensor, Tensor]:
        """NaN and -1: the neurons hold no single patterns."""
        cosine = torch.full_like(wide(z[..., 0]), torch.nan)
        return cosine, torch.full_like(cosine, -1, dtype=torch.int64)

    def _means(self, x: SDMContext) -> tuple[Tensor, Tensor]:
        count = self.total[-1].clamp_min(1.0)
        mean = (self.total[:-1] / count).to(x.content.load)  # type: ignore[union-attr]
        return mean, mean if self.pointed_total is None else self.pointed_total / count

    @torch.no_grad()
    def write(self, address: Tensor, pointer: Tensor | None, times: float) -> None:
        """Add so many copies of address (*batch, n) and pointer (*batch, w) to the neurons."""
        keys = self._rows("address", address, self.sums.shape[1], self.binary)
        amount = keys.new_full(keys.shape[:1], times)
        unit = self._unit(keys)
        width = None if self.pointed is None else self.pointed.shape[1]
        if (pointer is None) != (width is None):
            allowed = "no pointer (build it with width=w)" if width is None else f"a pointer of width {width}"
            raise ValueError(f"this memory takes {allowed} beside each address")
        rows = None
        if pointer is not None and width is not None:
            how = self.read_out or ("threshold" if self.binary else "identity")
            rows = self._rows("pointer", pointer, width, how == "threshold", unit_length=False)
            if rows.shape[0] != keys.shape[0]:
                raise ValueError(
                    f"there must be one pointer an address, got {rows.shape[0]} for {keys.shape[0]}"
                )
        self._own()
        before = torch.cat([self.load, self.total[-1:]])
        with without_autocast(keys):
            self.weights.add(Content(self.sums, self.load), keys, keys, unit, amount)
            self.total += torch.cat([amount @ keys, amount.sum()[None]])
            if rows is not None and self.pointed is not None and self.pointed_total is not None:
                # The load counts once.
                spare = Content(self.pointed, torch.zeros_like(self.load))
                self.weights.add(spare, keys, rows, unit, amount)
                self.pointed_total += amount @ rows
        self._settle(before, len(keys), times)

    def clear(self) -> None:
        """Forget everything."""
        self._own()
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def _own(self) -> None:
        """Leave the contents to the contexts that hold them, and go on with a copy."""
        if not self._lent:
            return
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, buffer.clone())
        self._lent = False

    def _settle(self, before: Tensor, count: int, times: float) -> None:
        """Count the rounding of a write of so many rows, and empty what holds no more than that."""
        after = torch.cat([self.load, self.total[-1:]])
        self.noise = torch.hypot(self.noise, self._rounding(before, after, count, times))
        if times > 0 or not bool((self.noise > 0).any()):
            return
        gone = after.abs() <= self.noise
        rows = (gone & (self.noise > 0))[:-1].nonzero().squeeze(1)
        # What was never written may cancel in the load alone.
        rows = rows[self.sums[rows].abs().amax(1) <= self.noise[rows]]
        # Their noise stays: what is removed next may have been rounded away before.
        for held in (self.sums, self.load, self.pointed):
            if held is not None:
                held[rows] = 0.0
        if bool(gone[-1]) and float(self.total.abs().max()) <= float(self.noise[-1]):
            self.total.zero_()
            if self.pointed_total is not None:
                self.pointed_total.zero_()
            if not bool(self.load.any()) and not bool(self.sums.any()):
                self.noise.zero_()

    def _rounding(self, before: Tensor, after: Tensor, count: int, times: float) -> Tensor:
        """The size of the rounding errors of one write, (r + 1,); 0 where all numbers are whole."""
        eps = torch.finfo(after.dtype).eps
        largest, moved = torch.maximum(before.abs(), after.abs()), (after - before).abs()
        neurons = self.weights
        if neurons.activation == "exponential":
            moved = moved * (1 + neurons.rate * self.sums.shape[1])
        elif neurons.activation != "circle":
            moved = moved + abs(times) * count  # a difference: small activities have the error of large ones
        # Errors of many terms, and of many writes, are of either sign and add up as squares do.
        found = 2 * eps * (largest + (ROUNDINGS + math.log2(max(count, 1))) * moved)
        if not (self.binary and float(times).is_integer()):
            return found
        whole = largest < 1 / eps
        if neurons.activation != "circle":
            whole[:-1] = False
        return found.masked_fill(whole, 0.0)

    def _rows(self, name: str, value: Tensor, width: int, bits: bool, *, unit_length: bool = True) -> Tensor:
        """(B, width) as keys or pointers are."""
        value = as_float(name, value, bits)
        if value.ndim < 1 or value.shape[-1] != width:
            raise ValueError(f"{name} must be (*batch, {width}), got {tuple(value.shape)}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite: what is written stays in the neurons")
        rows = value.detach().reshape(-1, width).to(self.sums)
        if bits:
            check_bits(name, rows, hint="or another space or read_out")
            return 2 * rows - 1
        return SPHERE.apply(rows) if unit_length else rows


class NeuronMemory(AssociativeMemory):
    """Explicit neurons that are written to online and read by queries: Kanerva's memory as he describes it.

    Each write adds the pattern, as signs, to all neurons that are active at its address; a read sums what the active
    neurons hold, divides by their load and thresholds (or normalises). The patterns themselves are not kept, so that
    memory and time depend on the number of neurons alone. Recalls what `SDM(neurons)` does for the same patterns.

    neurons: `Neurons`. width: of the pointers (hetero-association); None: each address points to itself.
    empty, read_out, space, steps and the rest: as in `SDM`. The contents are buffers, in float32. With the activation
    "circle", space="binary", whole `times` and pointers that are bits they are whole numbers, exact up to 2^23 writes a
    neuron, so that removing undoes writing to the last bit. Else removing leaves rounding errors; a neuron that holds
    no more than errors of random sign add up to is emptied, so that a read of what was removed is an empty one. Errors
    of thousands of single writes with the same fraction may all have one sign, and then stay until `clear()`.
    """

    f: HeldFunction

    def __init__(  # noqa: PLR0913 (one model, many dials)
        self,
        neurons: Neurons,
        *,
        width: int | None = None,
        space: str = "binary",
        empty: str = "keep",
        read_out: str | None = None,
        steps: int | None = None,
        solver: str | Solver = "auto",
        stop: Termination = Termination(),  # noqa: B008 (frozen)
        adjoint: str | Adjoint = "implicit",
        on_failure: str = "warn",
    ) -> None:
        if not isinstance(check_weights(neurons), Neurons):
            raise TypeError(f"neurons must be Neurons, got {neurons!r}; for other read weights use SDM")
        if width is not None:
            check_count("width", width, 1)
        f = HeldFunction(neurons, width, space, empty, read_out)
        super().__init__(f, steps=steps, solver=solver, stop=stop, adjoint=adjoint, on_failure=on_failure)

    def write(self, address: Tensor, pointer: Tensor | None = None, *, times: float = 1.0) -> None:
        """Store addresses (*batch, n) and what they point to, (*batch, w); times: with what weight, above 0."""
        if not check_number("times", times, 0.0) > 0:
            raise ValueError(f"times must be above 0, got {times!r}; use remove() to take away")
        self.f.write(address, pointer, times)

    def remove(self, address: Tensor, pointer: Tensor | None = None, *, times: float = 1.0) -> None:
        """Take away what `write` with the same arguments stored; what was never written leaves a negative trace."""
        if not check_number("times", times, 0.0) > 0:
            raise ValueError(f"times must be above 0, got {times!r}; use write() to store")
        self.f.write(address, pointer, -times)

    def clear(self) -> None:
        """Forget everything."""
        self.f.clear()

    @property
    def stored(self) -> float:
        """How many patterns are held, with their weights."""
        return float(self.f.total[-1])

    def problem(
        self, query: Tensor | SDMContext, z0: Tensor | None = None, *, return_solution: bool = False
    ) -> tuple[SDMContext, Tensor]:
        """What `forward` with these arguments solves: context and start; see `Equilibrium.problem`."""
        x = self.f.prepare(query)
        return x, self.f.init(x) if z0 is None else z0

    def forward(self, query: Tensor, *, return_solution: bool = False) -> Tensor | SDMRecall:  # type: ignore[override]
        """query (*batch, n) -> what is recalled, (*batch, n), or (*batch, w) where there are pointers."""
        x = self.f.prepare(query)
        recall = self._recall(x, self.f.pointed is not None, True)
        return cast(SDMRecall, recall) if return_solution else cast(SDMRecall, recall).value
