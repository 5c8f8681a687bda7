"""One retrieval step over patterns that are looked at in blocks: the same f, its weights never all in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hopdeq_lwpf._layout import lay
from hopdeq_lwpf._types import check_float_tensor, wide
from hopdeq_lwpf.forgetting import PFU, Forgetting, Keep, ReLU, TopK
from hopdeq_lwpf.retrieval.context import NEGLIGIBLE
from hopdeq_lwpf.retrieval.streamed_context import Look, StreamedContext
from hopdeq_lwpf.separation import Softmax, Softmax1
from hopdeq_lwpf.streaming import PatternSource, Ranks, ShardedPatterns, TensorPatterns
from hopdeq_lwpf.streaming.attention import (
    Attended,
    Forgotten,
    Scores,
    hide_,
    keep_,
    parts,
    widened,
)
from hopdeq_lwpf.streaming.gradient import attend, outside_of_compile, refuse_transforms
from hopdeq_lwpf.streaming.ranks import ALONE
from hopdeq_lwpf.streaming.selection import first_equal, largest, median

if TYPE_CHECKING:
    from hopdeq_lwpf.retrieval.function import Retrieval

UNITS = (Keep, ReLU, PFU, TopK)


@outside_of_compile
def prepare(f: Retrieval, query: Tensor, source: PatternSource, mask: Tensor | None) -> StreamedContext:
    """The context of `Retrieval.prepare` for a source; ValueError or TypeError for what cannot be streamed."""
    reason = why_not(f)
    if reason is not None:
        raise ValueError(f"{reason}. Otherwise give the patterns as a tensor that fits into memory")
    check_float_tensor("query", query)
    if query.ndim < 1 or query.shape[-1] != source.width:
        raise ValueError(
            f"query must be (*batch, {source.width}) for patterns of width {source.width}, got {tuple(query.shape)}"
        )
    refuse_transforms(query, f.beta, f.inject_weight, getattr(source, "tensor", None))
    ranks, offset, local = ALONE, 0, source
    if isinstance(source, ShardedPatterns):
        ranks, offset, local = source.ranks, source.start, source.local
        ranks.check_same(_told(f, query, local))
    mask = None if mask is None else _lay_mask(mask, query, local)
    injected = pull = None
    if f.inject == "input":
        pull = lay("inject_weight", f.inject_weight, query)
        injected = query.reshape(-1, query.shape[-1]) * pull
    start = query if f.normalization is None else f.normalization.apply(query)
    # A tensor is handed on as such: what requires grad must be seen by whoever differentiates f.
    patterns = local.tensor if type(local) is TensorPatterns else local
    beta = lay("beta", f.beta, query)
    mean_shift = f.similarity == "euclidean"
    context = StreamedContext(
        patterns, beta, mask, None, injected, start, pull if mean_shift else None, source.block, Look(),
        ranks=ranks, offset=offset, total=source.count,
    )  # fmt: skip
    return context._replace(threshold=_draw(f, start, context))


def _told(f: Retrieval, query: Tensor, local: PatternSource) -> dict[str, object]:
    """What every rank must give alike, since each takes part in the same sums in the same order."""
    # Stored objects may hold tensors, whose text is cut short: names of classes suffice for those.
    normalize = type(f.normalization).__name__
    given = (query, f.beta, f.inject_weight, getattr(local, "tensor", None))
    recorded = [isinstance(part, Tensor) and part.requires_grad for part in given]
    return {
        "queries": query,
        "beta": f.beta,
        "inject_weight": f.inject_weight,
        "settings": (f.forgetting, f.training, type(f.separation), f.inject, f.similarity, normalize),
        "requires_grad of queries, beta, inject_weight or patterns": (torch.is_grad_enabled(), recorded),
    }


def why_not(f: Retrieval) -> str | None:
    """Why this f cannot be computed block by block; None if it can."""
    if type(f.separation) not in (Softmax, Softmax1):
        return f"separation {f.separation!r} needs all scores; streamed patterns go with 'softmax' and 'softmax1'"
    if type(f.forgetting) not in UNITS:
        names = ", ".join(unit.__name__ for unit in UNITS)
        return f"forgetting {f.forgetting!r} is not known to work block by block; streamed patterns go with {names}"
    return (
        None
        if f.mask_in_loop
        else "mask_in_loop=False needs all weights; streamed patterns forget in every step"
    )


def streams(f: Retrieval) -> bool:
    """Whether f can be computed block by block."""
    return why_not(f) is None


def _lay_mask(mask: Tensor, query: Tensor, source: PatternSource) -> Tensor:
    """(N,), or one row a query (B, N), of this process's patterns."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True = ignore the pattern), got {kind}")
    if mask.device != query.device:
        raise ValueError(f"mask is on {mask.device} but query is on {query.device}; move one with .to()")
    batch = query.shape[:-1]
    fits = mask.shape == (source.count,)
    leading = mask.ndim == len(batch) + 1 and all(
        a in (1, b) for a, b in zip(mask.shape, batch, strict=False)
    )
    if not fits and (not leading or mask.shape[-1] != source.count):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; it must be ({source.count},), one entry a pattern, or "
            f"{(*batch, source.count)}, one entry a query and pattern"
        )
    return mask if fits else mask.expand(*batch, -1).reshape(-1, source.count)


def stream_scores(f: Retrieval, z: Tensor, x: StreamedContext) -> Scores:
    """What makes the scores of z with a block, in float32 or wider."""
    return widened(Scores(z.reshape(-1, z.shape[-1]), x.beta, f.similarity == "euclidean"))


def _draw(f: Retrieval, start: Tensor, x: StreamedContext) -> Tensor | None:
    """What `Forgetting.draw` gives for the scores at the start."""
    unit = f.forgetting
    scores = stream_scores(f, start, x)
    if not isinstance(unit, PFU) or unit.threshold != "median" or unit.tracked:
        return _of_first(unit.draw(scores.z[:, :0]), x.ranks)
    middle = _median(unit, scores, x)
    noise = _of_first(unit.draw_noise(scores.z[:, :0]), x.ranks)
    return middle if noise is None else middle + noise


def _of_first(drawn: Tensor | None, ranks: Ranks) -> Tensor | None:
    """What the first rank drew: a threshold differs by its noise only, and all ranks need the same one."""
    if drawn is None or ranks.size == 1:
        return drawn
    return ranks.sum(drawn if ranks.rank == 0 else torch.zeros_like(drawn))


def _median(unit: PFU, scores: Scores, x: StreamedContext) -> Tensor:
    """The lower median with its graph: it is the score of one pattern."""
    whole = unit.scope == "tensor"
    with torch.no_grad():
        value = median(scores, x.stored(), whole=whole)
    if not len(scores.z) or not _records(scores, x):
        return value
    with torch.no_grad():
        index = first_equal(scores, x.stored(), value.reshape(-1, 1).expand(len(scores.z), 1))
    if whole:  # one score of one query
        first = (index >= 0).to(torch.uint8).argmax()
        only = (
            scores.beta
            if not isinstance(scores.beta, Tensor) or scores.beta.ndim < 2
            else scores.beta[first, None]
        )
        scores, index = Scores(scores.z[first, None], only, scores.euclidean), index[first, None]
    graph = _score_of(scores, x, index)
    return value + (graph - graph.detach()).reshape(value.shape)


def _records(scores: Scores, x: StreamedContext) -> bool:
    parts = (scores.z, scores.beta, x.patterns)
    return torch.is_grad_enabled() and any(isinstance(p, Tensor) and p.requires_grad for p in parts)


def _score_of(scores: Scores, x: StreamedContext, index: Tensor) -> Tensor:
    """The score of one pattern a query, (B, 1), with its graph; 0 where the number is -1."""
    rows = gather(x, index).to(scores.z)
    if scores.euclidean:
        score = -0.5 * scores.beta * (scores.z - rows).square().sum(-1, keepdim=True)
    else:
        score = ((scores.z * scores.beta) * rows).sum(-1, keepdim=True)
    return score.masked_fill(index[:, None] < 0, 0.0)


def gather(x: StreamedContext, index: Tensor) -> Tensor:
    """Patterns by their numbers, (B,) -> (B, d), with their graph where they are a tensor."""
    local = index - x.offset
    mine = (local >= 0) & (local < len(x.patterns))
    local = local.clamp(0, len(x.patterns) - 1)
    if isinstance(x.patterns, Tensor):
        rows = x.patterns.index_select(0, local.to(x.patterns.device))
    else:
        rows = x.patterns.rows(local)
    rows = rows.to(index.device)  # that of the queries, where the ranks talk
    if x.ranks.size == 1:
        return rows
    return x.ranks.recorded_sum(rows.masked_fill(~mine[:, None], 0.0))


def _forgotten(unit: Forgetting, scores: Scores, x: StreamedContext) -> Forgotten | None:
    """Which scores the unit keeps at this state, and what it makes of the others."""
    if isinstance(unit, Keep):
        return None
    zero = scores.z.new_zeros(())
    if isinstance(unit, TopK):
        return _topk(unit, scores, x)
    with torch.no_grad():
        least: int = unit.min_keep  # type: ignore[assignment]
        always = largest(scores, x.stored(), least)[1] if least else None
    if isinstance(unit, ReLU):
        return Forgotten(zero, zero, always)
    assert isinstance(unit, PFU)
    given = zero if x.threshold is None else wide(x.threshold)
    if unit.threshold == "median":
        limit = _median(unit, scores, x) + given if unit.tracked else given
    else:
        limit = zero + float(unit.threshold) if x.threshold is None else given
    fill = limit if unit.bias == "threshold" else zero + float(unit.bias)
    return Forgotten(limit.detach(), fill, always)


def _topk(unit: TopK, scores: Scores, x: StreamedContext) -> Forgotten:
    more = unit.bias == "threshold"
    with torch.no_grad():
        top, index = largest(scores, x.stored(), unit.k + more)
    if more:
        fill = _score_of(scores, x, index[:, -1])
        fill = top[:, -1:].clamp_min(torch.finfo(top.dtype).min / 2) + (fill - fill.detach())
    else:
        fill = (scores.z.new_zeros(()) + float(unit.bias)).expand(len(top), 1)
        # A NaN score is passed on.
        fill = torch.where(top[:, :1].isnan(), math.nan, fill)
    return Forgotten(None, fill, index[:, : unit.k])


def attended(f: Retrieval, z: Tensor, x: StreamedContext, **options: Any) -> Attended:
    """One pass over the patterns at the state z; options: those of `attend`, and `values`, whether they are read."""
    scores = stream_scores(f, z, x)
    values = options.pop("values", False)
    empty = isinstance(f.separation, Softmax1)
    if options.get("look") and not values and "watch" not in options:
        options["known"] = _known(f, scores.z.detach(), x)
    return attend(
        scores, x.stored(values=values), _forgotten(f.forgetting, scores, x), empty=empty, **options
    )


@torch.no_grad()
def _known(f: Retrieval, z: Tensor, x: StreamedContext) -> Attended | None:
    """What a pass at z gives, made only for the rows in which it was not made before; None if nothing is remembered."""
    look = x.look
    if look.known is None or look.z is None or look.z.shape != z.shape:
        return None
    other = (look.z != z).any(-1)
    if bool(other.all()):
        return None
    if bool(other.any()):
        rest, rows = x.select(other)
        look.remember(rows, z[rows], attended(f, z[rows], rest, look=True, watch=_nothing))
    return look.known


def _nothing(start: int, scores: Tensor) -> None:
    """Watches nothing."""


def finish(f: Retrieval, z: Tensor, found: Attended, x: StreamedContext) -> Tensor:
    """f(z) from what the patterns sum up to, in the shape and dtype of z."""
    recalled = found.image
    if f.similarity == "euclidean":
        total = found.mass[:, None] if x.pull is None else found.mass[:, None] + x.pull
        nothing = total == 0
        recalled = (recalled if x.injected is None else recalled + x.injected) / total.masked_fill(
            nothing, 1.0
        )
        recalled = torch.where(nothing, x.start.reshape(recalled.shape), recalled)
    else:
        recalled = recalled if x.injected is None else recalled + x.injected
        recalled = recalled if f.normalization is None else f.normalization.apply(recalled)
    return recalled.to(z.dtype).reshape(z.shape)


@outside_of_compile
def image(f: Retrieval, z: Tensor, x: StreamedContext) -> Tensor:
    """f(z, x)."""
    return finish(f, z, attended(f, z, x), x)


@outside_of_compile
def step(f: Retrieval, z: Tensor, x: StreamedContext) -> tuple[Tensor, Tensor]:
    """f(z, x), and the weighted sum of the values, or of the patterns: (*batch, d), (*batch, dv). Fills `x.look`."""
    found = attended(f, z, x, values=x.values is not None, look=True)
    x.look.attended = Attended(*(None if part is None else part.detach() for part in found))  # type: ignore[arg-type]
    x.look.support = _support(f, z.detach(), x, x.look.attended)
    read = found.image if found.read is None else found.read
    if f.similarity == "euclidean":
        read = read / found.mass.masked_fill(found.mass == 0, 1.0)[:, None]
    return finish(f, z, found, x), read.to(z.dtype).reshape(*z.shape[:-1], read.shape[-1])


@torch.no_grad()
def _support(f: Retrieval, z: Tensor, x: StreamedContext, found: Attended) -> Tensor:
    """How many weights are above 0: all that are kept, unless rounding makes some of them 0, which are counted."""
    assert found.low is not None
    least = math.log(torch.finfo(found.lse.dtype).tiny)
    if bool((found.low - found.lse > least).all()):
        return found.kept.to(torch.int64)
    count = torch.zeros_like(found.lse, dtype=torch.int64)
    scores = stream_scores(f, z, x)
    forgotten = _forgotten(f.forgetting, scores, x)
    for part in parts(x.stored(), scores.z):
        count += (_weights(scores, x, forgotten, part, found.lse) > 0).sum(-1)
    return x.ranks.sum(count)


def _weights(
    scores: Scores, x: StreamedContext, forgotten: Forgotten | None, part: Any, lse: Tensor
) -> Tensor:
    """w of one block, (B, n)."""
    block = hide_(scores(part.patterns), part)
    kept, _ = keep_(forgotten, block, part, x.offset + part.start)
    share = block.sub_(lse[:, None]).clamp_max_(0.0).exp_()
    return share if kept is None else share * kept


def weights(f: Retrieval, z: Tensor, x: StreamedContext) -> Tensor:
    """The association with each pattern of this process, (*batch, N): as large as the scores, and without gradient."""
    with torch.no_grad():
        found = attended(f, z, x, sums=False)
        scores = stream_scores(f, z, x)
        forgotten = _forgotten(f.forgetting, scores, x)
        blocks = [_weights(scores, x, forgotten, part, found.lse) for part in parts(x.stored(), scores.z)]
        whole = torch.cat(blocks, -1)
        if f.similarity == "euclidean":
            whole = whole / found.mass.masked_fill(found.mass == 0, 1.0)[:, None]
        return whole.to(z.dtype).reshape(*z.shape[:-1], whole.shape[-1])


def lagrangian(f: Retrieval, z: Tensor, x: StreamedContext) -> Tensor:
    """log of the sum of exp(D(s)), (B,)."""
    return attended(f, z, x, sums=False).lse


def evaluate(
    f: Retrieval, z: Tensor, x: StreamedContext
) -> tuple[Tensor, Callable[[], Tensor], Tensor | None]:
    """f(z, x), its energy, which costs nothing here, and the piece of f that z lies in, as `Retrieval.evaluate`."""
    found = attended(f, z, x)
    piece = None
    if not isinstance(f.forgetting, Keep):
        total = 1.0 - (-found.lse).exp() if isinstance(f.separation, Softmax1) else 1.0
        assert found.which is not None
        piece = torch.where(found.mass > (1 - NEGLIGIBLE) * total, -1.0, found.which).reshape(z.shape[:-1])
    return finish(f, z, found, x), lambda: f.energy_from(z, found.lse, x), piece
