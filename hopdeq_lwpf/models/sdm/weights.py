"""Read weights: how much a stored pattern counts in a read, from how near the query is to it.

Kanerva's neurons, their infinite limit on the hypercube and on the sphere, and attention differ in this alone
(Bricken and Pehlevan 2021, eq. 4-6). A read weight gives a logit a pattern; a read normalises them by softmax.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hopdeq_lwpf._layout import attach, check_positive, shown
from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.data.draws import check_seed, stream
from hopdeq_lwpf.models.sdm.caps import log_cap_intersection
from hopdeq_lwpf.models.sdm.counting import COUNT_DRAWS, check_whole
from hopdeq_lwpf.models.sdm.counting import check_positive as check_count
from hopdeq_lwpf.models.sdm.intersections import log_circle_intersection

SPACES = ("binary", "continuous")
# exp of more leaves the range of float32; such a count has no fraction left to draw.
LARGEST = 80.0
# Cells of the table of a cap intersection: for n of 3 to 10,000 and d at least 2 away from n/2 the error of ln was
# below 2e-5 in float64, shares below exp(-100) of the largest left aside. For d nearer to n/2, and n of 10 to 1,000, it
# was up to 5e-3, but only at angles within a thousandth of the antipode.
CELLS = 4096
# A power of what is left of the angle, from which on nothing near the edge weighs anything.
LOW_POWER = 16.0
# Straight pieces a cell, where float32 rounds more coarsely than they err.
FINER = 16


class ReadWeights(nn.Module):
    """Base of the read weights; a new one overrides `of_products`, and `draw` where it has something to draw.

    `smooth`: whether logits are differentiable in the state. `reaches_all`: whether every logit is finite, so that
    no read is empty.
    """

    smooth: bool = False
    reaches_all: bool = False

    def check(self, n: int) -> None:
        """Raise ValueError unless these weights fit patterns of width n."""

    def draw(self, patterns: int) -> Tensor | None:
        """What is random and stays the same for these patterns, (N,), the same in every call; None: nothing."""
        return None

    def logits(self, z: Tensor, keys: Tensor, unit: float, draws: Tensor | None = None) -> Tensor:
        """(B, n) states and (N, n) or (G, N, n) keys -> (B, N), -inf where a pattern is out of reach.

        z and keys: bipolar with unit = n, or of length 1 with unit = 1, in float32 or wider; their product at
        cosine 1 is `unit`. draws: what `draw` returned.
        """
        return self.of_products(products(z, keys), z.shape[-1], unit, draws)

    def of_products(self, dot: Tensor, n: int, unit: float, draws: Tensor | None) -> Tensor:
        """The same from the products (B, N)."""
        raise NotImplementedError(f"{type(self).__name__} must override of_products(dot, n, unit, draws)")


def products(z: Tensor, keys: Tensor) -> Tensor:
    """(B, n) with (N, n) or (G, N, n), B = G L -> (B, N)."""
    if keys.ndim == 2:
        return z @ keys.T
    groups, count, width = keys.shape
    return (z.reshape(groups, -1, width) @ keys.transpose(1, 2)).reshape(-1, count)


class Attention(ReadWeights):
    """Softmax attention: the logit is beta times the cosine. Bricken and Pehlevan 2021, eq. 6.

    beta: inverse temperature, > 0; a number, or a Parameter of one element, which is learned.
    """

    smooth = True
    reaches_all = True
    beta: float | Tensor

    def __init__(self, beta: float | Tensor) -> None:
        super().__init__()
        check_positive("beta", beta)
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"beta must be one number, got a tensor of shape {tuple(beta.shape)}")
        attach(self, "beta", beta)

    @classmethod
    def fitted(
        cls,
        n: int,
        d: int,
        *,
        space: str = "binary",
        estimator: str = "ols",
        learned: bool = False,
        **options: Any,
    ) -> Attention:
        """With the beta whose exponential fits the intersection of radius d best; see `fit_beta`, also for options.

        space: "binary" fits the circle intersection, "continuous" that of caps. learned: the fit is where a
        Parameter starts.
        """
        from hopdeq_lwpf.models.sdm.betas import fit_beta

        beta = fit_beta(n, d, space=space, estimator=estimator, **options).beta
        return cls(nn.Parameter(torch.tensor(beta)) if learned else beta)

    def at(self, n: int) -> float | Tensor:
        """beta for patterns of width n."""
        return self.beta

    def logits(self, z: Tensor, keys: Tensor, unit: float, draws: Tensor | None = None) -> Tensor:
        """beta cos."""
        beta = self.at(z.shape[-1])
        beta = beta.to(z) if isinstance(beta, Tensor) else beta
        return products(z * (beta / unit), keys)

    def of_products(self, dot: Tensor, n: int, unit: float, draws: Tensor | None) -> Tensor:
        """beta cos."""
        beta = self.at(n)
        return dot * ((beta.to(dot) if isinstance(beta, Tensor) else beta) / unit)

    def extra_repr(self) -> str:
        return f"beta={shown(self.beta)}"


class TransformerAttention(Attention):
    """Attention as transformers start: beta = 1/sqrt(n), on vectors of length 1.

    So low a beta that it recalls the mean of all patterns; there for comparison.
    """

    def __init__(self) -> None:
        super().__init__(1.0)

    @classmethod
    def fitted(
        cls,
        n: int,
        d: int,
        *,
        space: str = "binary",
        estimator: str = "ols",
        learned: bool = False,
        **options: Any,
    ) -> Attention:
        """Raises TypeError: there is nothing to fit."""
        raise TypeError(
            f"TransformerAttention has beta = 1/sqrt(n) and no fit; use Attention.fitted({n!r}, {d!r}) for that of a "
            "radius"
        )

    def at(self, n: int) -> float:
        """1/sqrt(n)."""
        return 1 / math.sqrt(n)

    def extra_repr(self) -> str:
        return ""


class _Counted(ReadWeights):
    """Weights that count the neurons within the radius d of query and pattern, or their share if there are infinitely
    many.

    A finite number is drawn once: r I neurons are shared on average; a pattern gets the whole part, and one more
    with the rest as probability, from a number that belongs to the pattern's place and stays (the published code
    draws anew in every step, so that it has no fixed point).
    """

    def __init__(self, d: float, neurons: float | None, seed: int) -> None:
        super().__init__()
        self.d = d
        self.neurons = neurons
        self.log_neurons = None if neurons is None else check_count("neurons", neurons)
        self.seed = check_seed("seed", seed)

    def draw(self, patterns: int) -> Tensor | None:
        if self.neurons is None:
            return None
        return torch.from_numpy(stream(self.seed, COUNT_DRAWS).random_sample(patterns))

    def _counts(self, log_share: Tensor, draws: Tensor) -> Tensor:
        """ln of the number of neurons, drawn; -inf where it is 0."""
        assert self.log_neurons is not None  # else there are no draws
        expected = log_share + self.log_neurons
        drawn = (expected.clamp(max=LARGEST).exp() + draws.to(expected)).floor().log()
        return torch.where(expected > LARGEST, expected, drawn)

    def extra_repr(self) -> str:
        drawn = "" if self.neurons is None else f", neurons={self.neurons!r}, seed={self.seed}"
        return f"d={self.d!r}{drawn}"


class Circle(_Counted):
    """Exact binary SDM: the number of addresses within the Hamming distance d of both query and pattern (Kanerva 1988).

    d: radius in bits, 0..n. neurons: how many there are at random addresses; None: infinitely many, a neuron at every
    address. seed: of the draw of a finite number.
    With continuous states the distance is floor(n (1 - cos)/2), rounding errors allowed for.
    """

    def __init__(self, d: int, neurons: float | None = None, *, seed: int = 0) -> None:
        super().__init__(check_whole("d", d, 0), neurons, seed)
        self._tables: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def check(self, n: int) -> None:
        _check_radius(self.d, n)

    def of_products(self, dot: Tensor, n: int, unit: float, draws: Tensor | None) -> Tensor:
        distance = (unit - dot) * (n / (2 * unit))
        # Products of bipolar vectors are whole; of others, rounding must not take a distance below a whole number.
        slack = 0.25 if unit == n else min(0.25, 4 * n * torch.finfo(dot.dtype).eps)
        place = (distance + slack).to(torch.int64).clamp_(0, n)
        found = _look_up(self._table(n, dot), place)
        found = found if draws is None else self._counts(found, draws)
        # A NaN has no place in the table; it is put back.
        return found + dot[:, :1] * 0.0

    def _table(self, n: int, like: Tensor) -> Tensor:
        key = (n, like.dtype, like.device)
        if key not in self._tables:
            self._tables[key] = log_circle_intersection(n, int(self.d)).to(like)
        return self._tables[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}


class Cap(_Counted):
    """Continuous SDM: the share of the unit sphere within the angle arccos(1 - 2d/n) of both query and pattern.

    d: radius in bits, 0..n, not necessarily whole. neurons, seed: as in `Circle`; a finite number makes f piecewise
    constant. The logarithm has a cusp at cosine 1, so that it is computed from the angle, in which it has none;
    cosines are cut a rounding before 1, where their gradient is 0. It is read from a table of cubic pieces.
    """

    def __init__(self, d: float, neurons: float | None = None, *, seed: int = 0) -> None:
        if isinstance(d, bool) or not isinstance(d, (int, float)) or not 0 <= d < math.inf:
            raise ValueError(f"d must be a number of at least 0, got {d!r}")
        super().__init__(d, neurons, seed)
        self._tables: dict[tuple[int, torch.dtype, torch.device], _CapTable] = {}

    @property
    def smooth(self) -> bool:  # type: ignore[override]
        """Whether the neurons are infinitely many."""
        return self.neurons is None

    def check(self, n: int) -> None:
        _check_radius(self.d, n)
        if n < 2:
            raise ValueError(f"Cap needs patterns of width 2 or more, got width {n}; use Circle")

    def of_products(self, dot: Tensor, n: int, unit: float, draws: Tensor | None) -> Tensor:
        cosine = dot if unit == 1 else dot / unit
        found = self._table(n, dot)(cosine)
        return found if draws is None else self._counts(found, draws)

    def _table(self, n: int, like: Tensor) -> _CapTable:
        key = (n, like.dtype, like.device)
        if key not in self._tables:
            self._tables[key] = _CapTable(n, self.d, like)
        return self._tables[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}


class _CapTable:
    """ln of a cap intersection as a function of the angle: cubic pieces, after what makes it -inf at the edge.

    Near the angle 2 theta where the caps part, the share falls as a power of what is left of the angle; the table
    holds the rest, which is smooth, in cells that get smaller towards the edge: u = 1 - sqrt(1 - angle/edge).
    """

    def __init__(self, n: int, d: float, like: Tensor) -> None:
        self.parts = 2 * d <= n  # else the caps meet at any angle
        self.end = 2 * math.acos(1 - 2 * d / n) if self.parts else math.pi
        if self.end == 0:
            return
        angle = self.end * torch.linspace(0, 1, CELLS + 1, dtype=torch.float64)
        if self.parts:
            angle = self.end - (self.end - angle).square() / self.end
        values = log_cap_intersection(n, d, angle.cos())
        self.power = 0.0
        if self.parts:
            left = (self.end - angle[:-1]).log()
            power = float((values[-4] - values[-5]) / (left[-3] - left[-4]))
            # A high power times a logarithm is rounded coarsely, and what is near the edge then weighs nothing.
            self.power = power if power <= LOW_POWER else 0.0
            values[:-1] -= self.power * left
            # The last three points are lost to rounding of the angle.
            values[-3:] = values[-4]
        self.coefficients = _cubics(values).to(like)
        self.lines = self._lines(values).to(like) if self.parts and not self.power else None

    def _lines(self, values: Tensor) -> Tensor:
        """Straight pieces of a finer table, values and slopes, (2, K); the last, beyond the edge, is -inf."""
        a, b, c, e = _cubics(values)[:, :, None]
        along = torch.linspace(0, 1, FINER + 1, dtype=torch.float64)[:-1]
        fine = torch.cat([(((e * along + c) * along + b) * along + a).reshape(-1), values[-1:]])
        edge = torch.tensor([[-math.inf], [0.0]], dtype=torch.float64)
        return torch.cat([torch.stack([fine[:-1], fine.diff()]), edge], 1)

    def _quick(self, cosine: Tensor, lines: Tensor) -> Tensor:
        """The same without gradient, in place and in fewer passes."""
        one = 1 - torch.finfo(cosine.dtype).eps
        place = cosine.clamp(-one, one).acos_().div_(-self.end).add_(1.0).clamp_(min=0.0)
        place = place.sqrt_().neg_().add_(1.0).mul_(CELLS * FINER)
        row = place.to(torch.int64).clamp_(0, CELLS * FINER)
        place.sub_(row)
        return _look_up(lines[1], row).mul_(place).add_(_look_up(lines[0], row))

    def __call__(self, cosine: Tensor) -> Tensor:
        if self.end == 0:
            return torch.full_like(cosine, -math.inf)
        recorded = cosine.requires_grad and torch.is_grad_enabled()
        if self.lines is not None and cosine.dtype == torch.float32 and not recorded:
            return self._quick(cosine, self.lines)
        one = 1 - torch.finfo(cosine.dtype).eps
        angle = cosine.clamp(-one, one).acos()
        if not self.parts:
            return self._piece(angle / self.end)
        left = 1 - angle / self.end
        beyond = left <= 0  # False for NaN, which is passed on
        left = left.masked_fill(beyond, 1.0)
        value = self._piece(1 - left.sqrt())
        value = value + self.power * (left * self.end).log() if self.power else value
        return value.masked_fill(beyond, -math.inf)

    def _piece(self, share: Tensor) -> Tensor:
        place = share * CELLS
        row = place.detach().to(torch.int64).clamp_(0, CELLS - 1)
        along = place - row
        a, b, c, e = (_look_up(column, row) for column in self.coefficients)
        return ((e * along + c) * along + b) * along + a


def _cubics(values: Tensor) -> Tensor:
    """Cubic pieces through values at 0, 1, ... with matching slopes: (K+1,) -> (4, K), lowest power first."""
    slopes = torch.gradient(values, edge_order=2)[0]
    low, high, start, stop = values[:-1], values[1:], slopes[:-1], slopes[1:]
    rise = high - low
    return torch.stack([low, start, 3 * rise - 2 * start - stop, start + stop - 2 * rise])


def _look_up(table: Tensor, place: Tensor) -> Tensor:
    """table[place]: (K,) and (B, N) -> (B, N)."""
    # gather on an expanded table is several times faster on a CPU than indexing.
    return table.expand(place.shape[0], -1).gather(1, place)


def _check_radius(d: float, n: int) -> None:
    if d > n:
        raise ValueError(f"d must be at most the width n = {n} of the patterns, got {d!r}")


def check_space(space: str) -> str:
    """`space` if it is "binary" or "continuous"; otherwise an error that says so."""
    if space not in SPACES:
        raise unknown("space", space, SPACES)
    return space


def check_weights(weights: object) -> ReadWeights:
    """`weights` if they are read weights; otherwise an error that says what is."""
    if not isinstance(weights, ReadWeights):
        raise TypeError(
            f"weights must be read weights such as Circle(d), Cap(d), Attention(beta) or Neurons(...), got {weights!r}"
        )
    return weights
