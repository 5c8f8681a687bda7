"""Explicit neurons: frozen random addresses that hold what is written to them (Kanerva 1988, ch. 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.data.draws import check_number, check_seed, stream
from hopdeq_lwpf.models.sdm.counting import ADDRESS_DRAWS, check_whole
from hopdeq_lwpf.models.sdm.weights import ReadWeights

ACTIVATIONS = ("circle", "linear", "exponential", "cosine")
# Numbers of one block of activations: 4 MB in float32, which stays in the cache of a processor.
BLOCK = 2**20


class Content(NamedTuple):
    """What neurons hold."""

    sums: Tensor  # (r, w): of the pointers, each times how active its address makes the neuron
    load: Tensor  # (r,): of these activities


class Neurons(ReadWeights):
    """Read weights of explicit neurons: how much activity query and pattern share, summed over all neurons.

    A neuron at Hamming distance h of a point has the activity a(h); the weight of a pattern is the sum of
    a(h(query)) a(h(pattern)).

    addresses: (r, n) of 0 and 1, in any dtype; they stay. `random` draws them.
    d: radius beyond which a neuron is silent, 0..n; None: no such limit.
    activation: within it, "circle" 1; "linear" 1 - h/n; "exponential" exp(-rate h); "cosine" max(1 - 2h/n, 0).
    rate: of "exponential"; .01 as the published code has it.
    With continuous states h = n (1 - cos)/2. f is smooth without d, but for "cosine", and for "circle" constant.

    Time and memory: blocks of neurons, so that no (patterns, r) tensor is made.
    """

    addresses: Tensor

    def __init__(
        self, addresses: Tensor, d: int | None = None, *, activation: str = "circle", rate: float = 0.01
    ) -> None:
        super().__init__()
        if not isinstance(addresses, Tensor) or addresses.ndim != 2 or not addresses.numel():
            shape = tuple(addresses.shape) if isinstance(addresses, Tensor) else type(addresses).__name__
            raise ValueError(f"addresses must be a tensor (r, n) of 0 and 1 with r, n >= 1, got {shape}")
        if not bool(((addresses == 0) | (addresses == 1)).all()):
            raise ValueError("addresses must hold 0 and 1 only; use (addresses > 0)")
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        if d is None and activation == "circle":
            raise ValueError(
                "activation='circle' needs a radius d: without one all neurons are always active"
            )
        self.d = None if d is None else check_whole("d", d, 0, addresses.shape[1])
        self.activation = activation
        self.rate = check_number("rate", rate, 0.0)
        self.register_buffer("addresses", 2 * addresses.to(torch.int8) - 1)

    @classmethod
    def random(
        cls,
        neurons: int,
        n: int,
        d: int | None = None,
        *,
        seed: int = 0,
        activation: str = "circle",
        rate: float = 0.01,
    ) -> Neurons:
        """With so many addresses of n bits drawn uniformly; the same seed draws the same ones on every platform."""
        check_whole("neurons", neurons)
        check_whole("n", n)
        # Bits in bulk: a byte a bit at most is ever held.
        drawn = stream(check_seed("seed", seed), ADDRESS_DRAWS).bytes((neurons * n + 7) // 8)
        bits = torch.frombuffer(bytearray(drawn), dtype=torch.uint8)
        bits = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return cls(bits.reshape(-1)[: neurons * n].reshape(neurons, n), d, activation=activation, rate=rate)

    @property
    def smooth(self) -> bool:  # type: ignore[override]
        """Whether activities are differentiable in a continuous state: no radius, and no rectification."""
        return self.d is None and self.activation in ("linear", "exponential")

    def __len__(self) -> int:
        return self.addresses.shape[0]

    def check(self, n: int) -> None:
        if self.addresses.shape[1] != n:
            raise ValueError(
                f"the addresses of the neurons have width {self.addresses.shape[1]}, the patterns {n}"
            )

    def activities(self, points: Tensor, unit: float, start: int, stop: int) -> Tensor:
        """Of the neurons from start to stop: points (B, n) -> (B, stop - start); unit as in `ReadWeights.logits`."""
        n = points.shape[-1]
        dot = points @ self.addresses[start:stop].to(points).T
        scale = math.sqrt(n / unit) / 2  # the distance is n/2 - scale dot
        slack = 0.25 if unit == n else min(0.25, 4 * n * torch.finfo(points.dtype).eps)
        limit = -math.inf if self.d is None else (n / 2 - self.d - slack) / scale
        if self.activation == "circle":
            return (dot >= limit).to(dot)
        if self.activation == "exponential":
            activity = ((dot * scale - n / 2) * self.rate).exp()
        elif self.activation == "linear":
            activity = dot * (scale / n) + 0.5
        else:
            activity = (dot * (2 * scale / n)).clamp_min(0.0)
        return activity if self.d is None else activity.masked_fill(dot < limit, 0.0)

    def logits(self, z: Tensor, keys: Tensor, unit: float, draws: Tensor | None = None) -> Tensor:
        """ln of the shared activity, (B, N)."""
        shared = z.new_zeros(z.shape[0], keys.shape[-2])
        for start, stop in self._blocks(z.shape[0] + keys.shape[:-1].numel()):
            held = self.activities(keys.reshape(-1, keys.shape[-1]), unit, start, stop)
            asked = self.activities(z, unit, start, stop)
            held = held.reshape(*keys.shape[:-1], -1)
            if keys.ndim == 2:
                shared = shared + asked @ held.T
            else:
                groups = asked.reshape(keys.shape[0], -1, stop - start)
                shared = shared + (groups @ held.transpose(1, 2)).reshape(z.shape[0], -1)
        shared = shared + _nan_rows(z)
        # Where nothing is shared the logarithm would pass on 0 times infinity in a backward pass.
        nothing = shared <= 0
        return shared.masked_fill(nothing, 1.0).log().masked_fill(nothing, -math.inf)

    def store(self, keys: Tensor, pointers: Tensor, unit: float, amount: Tensor | None = None) -> Content:
        """What the neurons hold after keys (N, n) with pointers (N, w) were written; amount: how often each, (N,)."""
        if not (torch.is_grad_enabled() and (keys.requires_grad or pointers.requires_grad)):
            content = Content(keys.new_zeros(len(self), pointers.shape[1]), keys.new_zeros(len(self)))
            self.add(content, keys, pointers, unit, keys.new_ones(len(keys)) if amount is None else amount)
            return content
        parts = [(held.T @ pointers, held.sum(0)) for *_, held in self._held(keys, unit, amount)]
        return Content(torch.cat([sums for sums, _ in parts]), torch.cat([load for _, load in parts]))

    @torch.no_grad()
    def add(self, content: Content, keys: Tensor, pointers: Tensor, unit: float, amount: Tensor) -> None:
        """The same in place, on top of what is held already."""
        for start, stop, held in self._held(keys, unit, None):
            content.sums[start:stop].addmm_(held.T, pointers * amount[:, None])
            # torch adds up a column in stages; a product with `amount` would round after every row.
            content.load[start:stop] += (held * amount[:, None]).sum(0)

    def _held(self, keys: Tensor, unit: float, amount: Tensor | None) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop in self._blocks(keys.shape[0]):
            held = self.activities(keys, unit, start, stop)
            yield start, stop, held if amount is None else held * amount[:, None]

    def read(self, z: Tensor, content: Content, unit: float) -> tuple[Tensor, Tensor]:
        """The sums that the neurons active at z (B, n) hold, (B, w), and their load, (B, 1)."""
        total = z.new_zeros(z.shape[0], content.sums.shape[1])
        load = z.new_zeros(z.shape[0])
        for start, stop in self._blocks(z.shape[0]):
            asked = self.activities(z, unit, start, stop)
            total = total + asked @ content.sums[start:stop]
            load = load + asked @ content.load[start:stop]
        return total, load[:, None] + _nan_rows(z)

    def _blocks(self, rows: int) -> list[tuple[int, int]]:
        size = max(1, BLOCK // max(rows, 1))
        return [(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def extra_repr(self) -> str:
        return f"neurons={len(self)}, n={self.addresses.shape[1]}, d={self.d}, activation={self.activation!r}"


def _nan_rows(z: Tensor) -> Tensor:
    """NaN for the rows that hold one, else 0, (B, 1): a comparison with a radius does not pass it on."""
    return z.detach().sum(-1, keepdim=True) * 0.0
