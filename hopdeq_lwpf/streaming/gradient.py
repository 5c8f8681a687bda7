"""Exact attention over blocks with its gradient, for which the scores of each block are computed anew."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf.streaming.attention import (
    Attended,
    Forgotten,
    Part,
    Scores,
    Stored,
    Watcher,
    exp_,
    hide_,
    keep_,
    parts,
    sweep,
)


def attend(
    scores: Scores,
    stored: Stored,
    forgotten: Forgotten | None = None,
    *,
    empty: bool = False,
    look: bool = False,
    sums: bool = True,
    watch: Watcher | None = None,
    known: Attended | None = None,
) -> Attended:
    """`sweep` with gradients to all that requires grad: queries, beta, fill, patterns and values that are tensors.

    sums: its `weighted`. known: what it gives, where that is known already.
    """
    with torch.autocast(scores.z.device.type, enabled=False):
        if torch.is_grad_enabled() and _differentiable(scores, stored, forgotten):
            fill = None if forgotten is None else forgotten.fill
            patterns = stored.patterns if isinstance(stored.patterns, Tensor) else None
            values = stored.values if isinstance(stored.values, Tensor) else None
            plan = (scores, stored, forgotten, empty, look, sums, known)
            beta = scores.beta if isinstance(scores.beta, Tensor) else None
            return Attended(*_Attend.apply(plan, scores.z, beta, fill, patterns, values))
        return known or sweep(scores, stored, forgotten, empty, look, sums, watch)


def outside_of_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called as it is where torch.compile traces the caller: loops over blocks are no graph."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return _as_it_is(function, *arguments) if torch.compiler.is_compiling() else function(*arguments)

    return call


def _as_it_is(function: Callable[..., Any], *arguments: Any) -> Any:
    import torch._dynamo  # only where somebody compiles: it takes a second to import

    return torch._dynamo.disable(function)(*arguments)


# What torch.compiler.disable sets; setting it here spares the import.
_as_it_is._torchdynamo_disable = True  # type: ignore[attr-defined]


def refuse_transforms(*given: Any) -> None:
    """TypeError inside torch.func, and for tensors with a tangent of forward mode: neither sees what is in blocks."""
    if torch.compiler.is_compiling():
        return
    tangents = (
        torch.autograd.forward_ad.unpack_dual(part).tangent for part in given if isinstance(part, Tensor)
    )
    # There is no public question to ask.
    if torch._C._are_functorch_transforms_active() or any(tangent is not None for tangent in tangents):
        raise TypeError(
            "streamed patterns go with neither torch.func nor forward-mode derivatives: give the patterns as a tensor "
            "with stream=False, or take torch.autograd.grad; vmap is not needed, since queries may have any batch shape"
        )


def _differentiable(scores: Scores, stored: Stored, forgotten: Forgotten | None) -> bool:
    given = (
        scores.z,
        scores.beta,
        stored.patterns,
        stored.values,
        None if forgotten is None else forgotten.fill,
    )
    return any(isinstance(part, Tensor) and part.requires_grad for part in given)


class _Attend(torch.autograd.Function):
    """`sweep` with its gradient."""

    @staticmethod
    def forward(ctx: Any, plan: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Any, ...]:
        scores, stored, forgotten, empty, look, sums, known = plan
        found = known or sweep(scores, stored, forgotten, empty, look, sums)
        # Not what is known already: the outputs are made of it, and would keep this node, and all it holds, for ever.
        ctx.plan = scores, stored, forgotten
        ctx.set_materialize_grads(False)
        missing = None
        if forgotten is not None:
            # How many of the visible patterns are forgotten, as a share of the denominator each.
            missing = _forgotten_mass(found, empty)
        ctx.save_for_backward(found.image, found.read, found.lse, found.mass, missing, *tensors)
        constant = [part for part in found[4:] if part is not None]
        ctx.mark_non_differentiable(*constant)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        image, read, lse, mass, missing, *_ = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            slopes = _Slopes.of(gradients[:4], Attended(image, read, lse, mass, lse))
            found = _pull(ctx.plan, ctx.needs_input_grad[1:], slopes, lse, missing)
        if torch.is_grad_enabled():
            found = tuple(None if part is None else _Refuse.apply(part, image) for part in found)
        return None, *found


def _forgotten_mass(found: Attended, empty: bool) -> Tensor:
    """Sum of the weights of what is forgotten, (B,); 0 where every pattern is masked."""
    rest = 1.0 - found.mass
    assert found.visible is not None
    rest = rest.masked_fill(found.visible == 0, 0.0)
    return rest - (-found.lse).exp().masked_fill(found.visible == 0, 0.0) if empty else rest


class _Slopes(NamedTuple):
    """Gradients to image and read-out, and what comes from the others to each weight: kept ones, and all."""

    image: Tensor | None  # (B, d)
    read: Tensor | None  # (B, dv)
    kept: Tensor  # (B, 1)
    all: Tensor  # (B, 1)

    @classmethod
    def of(cls, gradients: tuple[Tensor | None, ...], found: Attended) -> _Slopes:
        # dD_i = w_i (g_image.x_i + g_read.v_i + g_mass - c + g_lse), of forgotten ones w_i (g_lse - c), with
        # c = g_image.image + g_read.read + g_mass mass.
        image, read, lse, mass = gradients
        rest = torch.zeros_like(found.lse)
        for gradient, value in ((image, found.image), (read, found.read)):
            if gradient is not None and value is not None:
                rest = rest - (gradient * value).sum(-1)
        rest = rest if mass is None else rest - mass * found.mass
        rest = rest if lse is None else rest + lse
        kept = rest if mass is None else rest + mass
        return cls(image, read, kept[:, None], rest[:, None])


def _pull(
    plan: tuple[Any, ...], wanted: tuple[bool, ...], slopes: _Slopes, lse: Tensor, missing: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of z, beta, fill, patterns and values."""
    scores, stored, forgotten = plan
    z, beta = scores.z, scores.beta
    dz, dbeta = torch.zeros_like(z), torch.zeros_like(z[:, :1])
    dpatterns = torch.zeros_like(stored.patterns) if wanted[3] else None
    dvalues = torch.zeros_like(stored.values) if wanted[4] else None
    for part in parts(stored, z):
        block = hide_(scores(part.patterns), part)
        raw = block.clone() if wanted[1] else None
        kept, _ = keep_(forgotten, block, part, stored.start + part.start)
        weights = exp_(block, lse, kept)
        slope = slopes.kept.expand_as(weights).clone()
        if slopes.image is not None:
            slope.addmm_(slopes.image, part.patterns.T)
        if slopes.read is not None and part.values is not None:
            slope.addmm_(slopes.read, part.values.T)
        slope.mul_(weights)
        here = slice(part.start, part.start + len(part.patterns))
        _to_states(scores, part, slope, raw, dz, dbeta)
        if dpatterns is not None:
            rows = torch.zeros_like(part.patterns) if slopes.image is None else weights.T @ slopes.image
            dpatterns[here] = (rows + _to_patterns(scores, part, slope)).to(dpatterns)
        if dvalues is not None and slopes.read is not None:
            dvalues[here] = (weights.T @ slopes.read).to(dvalues)
    both = stored.ranks.sum(torch.cat([dz, dbeta], 1))
    dz, dbeta = both[:, :-1], both[:, -1:]
    dfill = None
    if wanted[2]:
        assert missing is not None
        dfill = (missing[:, None] * slopes.all).sum_to_size(forgotten.fill.shape)
    return (
        dz if wanted[0] else None,
        dbeta.sum_to_size(beta.shape) if wanted[1] else None,
        dfill,
        dpatterns,
        dvalues,
    )


def _to_states(
    scores: Scores, part: Part, slope: Tensor, raw: Tensor | None, dz: Tensor, dbeta: Tensor
) -> None:
    """Add what a block's scores send to z and beta. slope: gradient of the scores, 0 where one is not kept."""
    if raw is not None:
        dbeta += (slope * raw.masked_fill_(raw == -math.inf, 0.0)).sum(-1, keepdim=True) / scores.beta
    if scores.euclidean:
        dz += (slope @ part.patterns - slope.sum(-1, keepdim=True) * scores.z) * scores.beta
    else:
        dz += (slope @ part.patterns) * scores.beta


def _to_patterns(scores: Scores, part: Part, slope: Tensor) -> Tensor:
    """What a block's scores send to its patterns, (n, d)."""
    towards = slope.T @ (scores.z * scores.beta)
    if not scores.euclidean:
        return towards
    return towards - (slope * scores.beta).sum(0)[:, None] * part.patterns


class _Refuse(torch.autograd.Function):
    """Marks the end of what can be differentiated, so that a second derivative is refused, never wrong."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, output: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "no second derivative through streamed patterns, whose scores are not kept; give the patterns as a tensor "
            "with stream=False"
        )
