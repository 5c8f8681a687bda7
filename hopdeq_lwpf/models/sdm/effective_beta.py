"""The inverse temperature that the attention of a trained model really has, head by head.

Softmax attention weighs the keys by exp(s q.k), s mostly 1/sqrt(d); Sparse Distributed Memory by nearly
exp(beta cos) (`fit_beta`). With q.k = |q| |k| cos the beta of a query is s |q| |k|, and it says at which Hamming
radius a memory would read as this head does (Bricken and Pehlevan 2021, who look at GPT-2).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.models.sdm.betas import fit_beta
from hopdeq_lwpf.models.sdm.counting import as_number, check_fraction, check_whole
from hopdeq_lwpf.models.sdm.listening import Reader, bind, find_readers

METHODS = ("fit", "norms", "published")
# Cosines that differ by no more than rounding have no slope.
ALIKE = 1e-12


class QueriesKeys(NamedTuple):
    """What one call of an attention layer compared. B: batch, H: heads, L: queries, S: keys."""

    queries: Tensor  # (B, H, L, d)
    keys: Tensor  # (B, H, S, d)
    scale: float | Tensor | None = None  # s of the logits s q.k, a number or (H,); None: 1/sqrt(d)
    mask: Tensor | None = None  # bool, broadcastable to (B, H, L, S); True = ignore


@dataclass(frozen=True, eq=False)
class HeadBeta:
    """The effective betas of one head.

    layer: name of the module, as in `named_modules()`. head: from 0. width: d of its queries and keys. n: bits of
    the memory that it is compared with. betas: (count,) float64, one a query, in order of the calls, without those
    that have none. r2: mean share of the variance of a query's logits that beta times the cosine explains; NaN but
    for method="fit".
    """

    layer: str
    head: int
    width: int
    n: int
    betas: Tensor = field(repr=False)
    r2: float

    def quantile(self, share: float) -> float:
        """The value below which this share of the betas lies; NaN without any."""
        share = check_fraction("share", share)
        # Unlike torch's, numpy's takes more than 2^24 numbers.
        return float(np.quantile(self.betas.numpy(), share)) if len(self.betas) else math.nan

    @property
    def median(self) -> float:
        """Of the betas."""
        return self.quantile(0.5)

    @property
    def mean(self) -> float:
        """Of the betas."""
        return float(self.betas.mean())

    @property
    def radius(self) -> int | None:
        """The Hamming radius of n bits whose fitted beta is nearest to the median; None where there is none."""
        return radius_for_beta(self.n, self.median) if self.median > 0 else None


def effective_betas(
    model: nn.Module,
    *inputs: Any,
    method: str = "fit",
    attention: Mapping[type[nn.Module], Reader] | None = None,
    n: int | None = None,
) -> tuple[HeadBeta, ...]:
    """Run model(*inputs) once without gradient and return the effective betas of each head of each attention layer.

    The model runs in the mode it is in; call model.eval() first, or dropout takes part. For several batches, or calls
    with keywords, use `watch_attention` and `head_betas`. Arguments and errors: see there.
    """
    with watch_attention(model, attention=attention) as seen, torch.no_grad():
        model(*inputs)
    return head_betas(seen, method=method, n=n)


@contextlib.contextmanager
def watch_attention(
    model: nn.Module, *, attention: Mapping[type[nn.Module], Reader] | None = None
) -> Iterator[dict[str, list[QueriesKeys]]]:
    """Within `with`, keep the queries and keys of every call of an attention layer, by the name of the layer.

    Known are nn.MultiheadAttention, alone or in nn.Transformer's layers, timm's Attention, `Hopfield`, alone or in
    the layers that hold one, and what `convert_attention` makes of the first two. Forward hooks do it, so that the
    model stays as it is; torch's fused paths, which pass the hooks by, are switched off meanwhile. Keys that a mask
    ignores are left out, and so are padded queries of self-attention.

    attention: for other layers, a function by class: (module, inputs) -> QueriesKeys, or (queries, keys) for
        s = 1/sqrt(d) and no mask. inputs: the arguments of the call by the names that forward gives them. It goes
        before what is known.

    Raises ValueError where the model has no attention that is known.
    """
    readers = find_readers(model, attention)
    seen: dict[str, list[QueriesKeys]] = {name: [] for name in readers}
    fused = torch.backends.mha.get_fastpath_enabled()
    handles = [
        module.register_forward_hook(functools.partial(_keep, name, read, seen[name]), with_kwargs=True)
        for name, (module, read) in readers.items()
    ]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield seen
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _keep(
    name: str,
    read: Reader,
    calls: list[QueriesKeys],
    module: nn.Module,
    args: tuple[Any, ...],
    named: dict[str, Any],
    output: Any,
) -> None:
    found = QueriesKeys(*read(module, bind(module, args, named)))
    _check(name, found)
    scale = found.scale.detach() if isinstance(found.scale, Tensor) else found.scale
    calls.append(QueriesKeys(found.queries.detach(), found.keys.detach(), scale, found.mask))


def _check(name: str, found: QueriesKeys) -> None:
    q, k = found.queries, found.keys
    shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in (q, k)]
    good = isinstance(q, Tensor) and isinstance(k, Tensor) and q.ndim == k.ndim == 4
    if not good or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise ValueError(
            f"queries and keys of {name!r} must be (B, H, L, d) and (B, H, S, d), got {shapes[0]} and {shapes[1]}"
        )
    if found.mask is not None and found.mask.dtype != torch.bool:
        raise TypeError(f"mask of {name!r} must be bool, True = ignore, got {found.mask.dtype}")


def head_betas(
    seen: Mapping[str, Sequence[QueriesKeys]], *, method: str = "fit", n: int | None = None
) -> tuple[HeadBeta, ...]:
    """The effective betas of each head from what `watch_attention` kept, layer by layer.

    method:

    - "fit": the slope of a query's logits over its cosines with the keys, by least squares.
    - "norms": the mean of s |q| |k| over the keys. The same where all keys are equally long.
    - "published": max_t s k_t.q of the last query of each sample alone, as the authors' code has it; padded queries
      do not count. It takes the largest cosine for 1, and so is too small by that factor.

    Queries that see fewer than two different keys have no slope and are left out with "fit"; keys of length 0, which
    have no cosine, are left out with "fit" and "norms".
    n: bits of the memory whose radius is given; None: the width of the head, as the authors have it.
    Raises ValueError for other methods and n, and where no attention was called.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if n is not None:
        check_whole("n", n, 2)
    if not any(seen.values()):
        raise ValueError("no attention layer was called: run the model inside `with watch_attention(model)`")
    found = []
    for layer, calls in seen.items():
        parts = [_ESTIMATES[method](*_scores(call)) for call in calls]
        for head in range(calls[0].queries.shape[1] if calls else 0):
            betas = torch.cat([beta[:, head].reshape(-1) for beta, _ in parts])
            r2 = torch.cat([share[:, head].reshape(-1) for _, share in parts])
            there = betas.isfinite()
            width = calls[0].queries.shape[-1]
            mean = float(r2[there].mean()) if bool(there.any()) else math.nan
            found.append(HeadBeta(layer, head, width, n or width, betas[there].cpu(), mean))
    return tuple(found)


def _scores(call: QueriesKeys) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, lengths s |q| |k| and which keys a query sees: (B, H, L, S) each, float64 and bool."""
    q, k = call.queries.double(), call.keys.double()
    scale = call.queries.shape[-1] ** -0.5 if call.scale is None else call.scale
    if isinstance(scale, Tensor):
        scale = scale.detach().to(q).reshape(-1, 1, 1)
    logits = scale * (q @ k.mT)
    lengths = scale * torch.linalg.vector_norm(q, dim=-1)[..., None]
    lengths = lengths * torch.linalg.vector_norm(k, dim=-1)[..., None, :]
    seen = torch.ones_like(logits, dtype=torch.bool)
    return logits, lengths, seen if call.mask is None else seen & ~call.mask


def _slopes(logits: Tensor, lengths: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares over the keys: slope and R^2, (B, H, L) each, NaN where there is none."""
    seen = seen & (lengths != 0)
    count = seen.sum(-1, keepdim=True)

    def centred(values: Tensor) -> Tensor:
        values = values.masked_fill(~seen, 0.0)
        return (values - values.sum(-1, keepdim=True) / count).masked_fill(~seen, 0.0)

    x, y = centred(logits / lengths.masked_fill(~seen, 1.0)), centred(logits)
    spread = x.square().sum(-1)
    slope = (x * y).sum(-1) / spread
    total = y.square().sum(-1)
    left = (y - slope[..., None] * x).square().sum(-1)
    slope = slope.masked_fill(~(spread > ALIKE * count[..., 0]), math.nan)
    return slope, torch.where(total > 0, 1 - left / total, 1.0)


def _lengths(logits: Tensor, lengths: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the keys, (B, H, L)."""
    seen = seen & (lengths != 0)
    mean = lengths.masked_fill(~seen, 0.0).sum(-1) / seen.sum(-1)
    return mean, torch.full_like(mean, math.nan)


def _largest(logits: Tensor, lengths: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of the last query that sees a key, (B, H, 1), or (B, H, 0) without queries or keys."""
    if not logits.numel():
        return logits.new_zeros(*logits.shape[:2], 0), logits.new_zeros(*logits.shape[:2], 0)
    place = torch.arange(logits.shape[-2], device=logits.device) * seen.any(-1)
    last = place.amax(-1)[..., None, None].expand(*logits.shape[:2], 1, logits.shape[-1])
    largest = logits.gather(2, last).masked_fill(~seen.gather(2, last), -math.inf).amax(-1)
    return largest, torch.full_like(largest, math.nan)


_ESTIMATES: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "fit": _slopes,
    "norms": _lengths,
    "published": _largest,
}


def radius_for_beta(n: int, beta: float, *, space: str = "binary", estimator: str = "ols") -> int | None:
    """The Hamming radius d whose fitted beta is nearest to this one, in ratio: `fit_beta` undone.

    n: bits, at least 2. beta: above 0. space, estimator: as in `fit_beta`. All radii are tried, since beta does not
    always fall with d: at n = 64 it is 38.1 at d = 3 and 39.2 at d = 4. None where beta is above that of every radius;
    the smallest that can be fitted is 2. Raises ValueError for other arguments.
    """
    n = check_whole("n", n, 2)
    value = as_number(beta)
    if not 0 < value < math.inf:
        raise ValueError(f"beta must be a finite number above 0, got {beta!r}")
    betas = _betas(n, space, estimator)
    if value > float(betas.max()):
        return None
    return 2 + int((betas.log() - math.log(value)).abs().argmin())


@functools.lru_cache(maxsize=32)
def _betas(n: int, space: str, estimator: str) -> Tensor:
    """Of the radii 2..n: (n-1,)."""
    betas = [fit_beta(n, d, space=space, estimator=estimator).beta for d in range(2, n + 1)]
    # Of a radius that holds the whole space it is 0, but for rounding.
    return torch.tensor(betas, dtype=torch.float64).clamp_min(0.0)
