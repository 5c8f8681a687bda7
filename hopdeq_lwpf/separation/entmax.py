"""The entmax family: softmax at alpha = 1, sparsemax at alpha = 2, learnable in between (Peters et al. 2019)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hopdeq_lwpf._types import check_float_tensor, refuse_nested_forward_mode
from hopdeq_lwpf.separation import simplex
from hopdeq_lwpf.separation.base import Separation

# Up to here the power series of `_second` is more exact than the closed form; so many terms reach float64.
SERIES, TERMS = 0.5, 16


class _Family(Separation):
    """p = argmax over the simplex of p.s - Omega(p), L = the maximum; Omega = (sum p^a - 1) / (a (a - 1)).

    Omega is Tsallis's negative entropy, 0 for a one-hot p, so that L = max s there: the constant.
    """

    has_energy = True

    def _alpha(self, logits: Tensor) -> Tensor:
        """(1, ..., 1) or (*batch, 1), in the dtype of the logits."""
        raise NotImplementedError

    def weights_of(self, logits: Tensor) -> Tensor:
        """p(s)."""
        refuse_nested_forward_mode()
        return _weights(logits, self._alpha(logits))

    def lagrangian_of(self, logits: Tensor) -> Tensor:
        """L(s)."""
        return self.both_of(logits)[1]

    def both_of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from one threshold."""
        refuse_nested_forward_mode()
        alpha = self._alpha(logits)
        weights = _weights(logits, alpha)
        conjugate = _TracedConjugate if torch.compiler.is_compiling() else _Conjugate
        return weights, conjugate.apply(logits, alpha, weights)


class _Fixed(_Family):
    """A member of the family with a name of its own."""

    alpha: float

    def _alpha(self, logits: Tensor) -> Tensor:
        return _number(self.alpha, logits)


class Sparsemax(_Fixed):
    """p = projection of s on the simplex, exactly 0 for low scores: Martins & Astudillo 2016.

    L = max over p of p.s - |p|^2/2 + 1/2, the constant chosen so that L = max s where the largest score leads
    by 1 or more and p is one-hot. Twice differentiable away from changes of the support.
    """

    alpha = 2.0


class Entmax15(_Fixed):
    """p = max(s/2 - tau, 0)^2, the 1.5-entmax of Peters et al. 2019: zeros, but a smooth way to them.

    L = max over p of p.s - (4/3) (sum p^1.5 - 1), the constant chosen so that L = max s where the largest
    score leads by 2 or more and p is one-hot. Exact: the passes end where rounding does.
    """

    alpha = 1.5


class Entmax(nn.Module, _Family):
    """The alpha-entmax, p = max((alpha - 1) s - tau, 0)^(1 / (alpha - 1)): Peters et al. 2019.

    L = max over p of p.s - (sum p^alpha - 1) / (alpha (alpha - 1)), the constant chosen so that L = max s where p
    is one-hot. alpha = 1 is softmax with L = logsumexp and 2 is sparsemax; weights, L and their gradients, that
    by alpha included (Correia et al. 2019, formed so that nothing cancels), are continuous there.

    alpha: >= 1; 1.5, half way between the two, is the authors' choice. A number, or a tensor that broadcasts
        against the scores' batch shape (inside `Retrieval`, where the batch is one dimension: of one element).
        A Parameter is learned and shows in the parameters of the model that holds this; a tensor is a buffer.

    Raises ValueError where alpha is below 1, also when learning has taken it there.
    """

    alpha: float | Tensor

    def __init__(self, alpha: float | Tensor = 1.5) -> None:
        super().__init__()
        if not isinstance(alpha, Tensor):
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
                raise TypeError(f"alpha must be a number or a tensor, got {alpha!r}")
            self.alpha = float(alpha)
            _check_alpha(torch.tensor(self.alpha, dtype=torch.float64))
            return
        check_float_tensor("alpha", alpha)
        if not alpha.is_meta:
            _check_alpha(alpha)
        if isinstance(alpha, nn.Parameter):
            self.alpha = alpha
        else:
            self.register_buffer("alpha", alpha)

    def _alpha(self, logits: Tensor) -> Tensor:
        alpha = self.alpha
        if not isinstance(alpha, Tensor):
            return _number(alpha, logits)
        if alpha.device != logits.device:
            raise ValueError(
                f"alpha is on {alpha.device} but the scores are on {logits.device}; move one with .to()"
            )
        alpha = alpha.to(logits.dtype)
        if alpha.numel() == 1:
            return alpha.reshape((1,) * logits.ndim)
        try:
            return alpha.expand(logits.shape[:-1]).unsqueeze(-1)
        except RuntimeError:
            raise ValueError(
                f"alpha of shape {tuple(alpha.shape)} does not broadcast against the batch shape "
                f"{tuple(logits.shape[:-1])} of the scores; give one element, or one a row"
            ) from None

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """`weights`, so that the module can stand where a softmax module stood."""
        return self.weights(scores, mask)

    def extra_repr(self) -> str:
        """alpha."""
        if isinstance(self.alpha, Tensor) and self.alpha.is_meta:
            return "alpha=..."
        return f"alpha={self.alpha.tolist() if isinstance(self.alpha, Tensor) else self.alpha}"


def _number(alpha: float, logits: Tensor) -> Tensor:
    # Not new_full, which would give every row of a vmap an alpha of its own.
    return torch.full((1,) * logits.ndim, alpha, dtype=logits.dtype, device=logits.device)


def _check_alpha(alpha: Tensor) -> None:
    # Written so that NaN is refused too; for one number, the common case, in plain Python, which is quicker.
    values = [alpha.item()] if alpha.numel() == 1 else [*alpha.aminmax()] if alpha.numel() else []
    if not all(1 <= value < math.inf for value in values):
        raise ValueError(
            f"alpha must be finite and >= 1 (1 is softmax, 2 is sparsemax), got {alpha.detach().flatten().tolist()}; "
            "to learn it freely use 1 + softplus of a parameter"
        )


def _project(logits: Tensor, alpha: Tensor) -> Tensor:
    _check_alpha(alpha)
    return simplex.entmax(logits, alpha - 1)


# torch.compile takes this as one node; traced, every pass of the search would break the graph.
_opaque = torch.library.custom_op("hopdeq_lwpf::entmax", _project, mutates_args=())


@_opaque.register_fake
def _(logits: Tensor, alpha: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _weights(logits: Tensor, alpha: Tensor) -> Tensor:
    """p(s, alpha)."""
    return (_TracedWeights if torch.compiler.is_compiling() else _Weights).apply(logits, alpha)


class _TracedWeights(torch.autograd.Function):
    """p(s, alpha) with its derivatives: of first order here, of any order through the formulas in p.

    torch.compile traces a function only where it has no rules for forward mode and vmap; those follow below.
    """

    @staticmethod
    def forward(logits: Tensor, alpha: Tensor) -> Tensor:
        return _opaque(logits, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        alpha, p = ctx.saved_tensors
        (gradient,) = gradients
        share = _share(p, alpha)
        centred = gradient - (share * gradient).sum(-1, keepdim=True) / share.sum(-1, keepdim=True)
        by_alpha = None
        if ctx.needs_input_grad[1]:
            by_alpha = (_bend(p, alpha) * centred).sum(-1, keepdim=True).sum_to_size(alpha.shape)
        return share * centred, by_alpha


class _Weights(_TracedWeights):
    """The same with rules for forward mode and vmap."""

    @staticmethod
    def forward(logits: Tensor, alpha: Tensor) -> Tensor:
        return _project(logits, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)
        ctx.save_for_forward(inputs[1], output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        alpha, p = ctx.saved_tensors
        share = _share(p, alpha)
        moved = torch.zeros_like(p)
        if tangents[0] is not None:
            moved = moved + share * tangents[0]
        if tangents[1] is not None:
            moved = moved + _bend(p, alpha) * tangents[1]
        return moved - share * (moved.sum(-1, keepdim=True) / share.sum(-1, keepdim=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], logits: Tensor, alpha: Tensor) -> tuple[Tensor, int]:
        logits, alpha = _to_front(info, in_dims, (logits, alpha))
        return _Weights.apply(logits, alpha), 0


class _TracedConjugate(torch.autograd.Function):
    """L(s, alpha), given p; its gradient is p, and -dOmega/dalpha at p (both by the envelope theorem)."""

    @staticmethod
    def forward(logits: Tensor, alpha: Tensor, p: Tensor) -> Tensor:
        gamma = alpha - 1
        # L = mu + (sum p^alpha - 1)/alpha, where the largest weight tells mu: p = (1 + gamma (s - mu))^(1/gamma).
        small = gamma.clamp_min(simplex.SMALLEST)
        lead = torch.expm1(small * p.amax(-1, keepdim=True).log()) / small
        total = _power_sum(p, alpha)
        return (logits.amax(-1, keepdim=True) - lead + (total - 1) / alpha).squeeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        alpha, p = ctx.saved_tensors
        gradient = gradients[0].unsqueeze(-1)
        by_alpha = None
        if ctx.needs_input_grad[1]:
            by_alpha = (-gradient * _entropy_slope(p, alpha)).sum_to_size(alpha.shape)
        return gradient * p, by_alpha, None


class _Conjugate(_TracedConjugate):
    """The same with rules for forward mode and vmap."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        alpha, p = ctx.saved_tensors
        moved = torch.zeros_like(p[..., 0])
        if tangents[0] is not None:
            moved = moved + torch.where(p > 0, p * tangents[0], 0.0).sum(-1)
        if tangents[1] is not None:
            moved = moved - (_entropy_slope(p, alpha) * tangents[1]).squeeze(-1)
        return moved

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        return _Conjugate.apply(*_to_front(info, in_dims, inputs)), 0


def _to_front(info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The inputs with the dimension that vmap maps in front, all of the same number of dimensions."""
    moved = [x.unsqueeze(0) if d is None else x.movedim(d, 0) for x, d in zip(inputs, in_dims, strict=True)]
    rows = moved[0].shape[1:]
    return [x.expand(info.batch_size, *rows) if x.shape[1:] == rows else x for x in moved]


def _positive(p: Tensor) -> tuple[Tensor, Tensor]:
    """p with 1 in place of 0, whose logarithm and powers are finite; 1 where p > 0 and 0 elsewhere."""
    inside = p.detach().sign()
    return p + (1 - inside), inside


def _share(p: Tensor, alpha: Tensor) -> Tensor:
    """p^(2 - alpha) on the support: what a score's rise gives its weight before the threshold moves."""
    safe, inside = _positive(p)
    return ((2 - alpha) * safe.log()).exp() * inside


def _bend(p: Tensor, alpha: Tensor) -> Tensor:
    """dp/dalpha before the threshold moves: -p log(p)^2 (e^v - 1 - v) / v^2, v = -(alpha - 1) log p."""
    log = _positive(p)[0].log()
    return -p * log.square() * _second((1 - alpha) * log)


def _entropy_slope(p: Tensor, alpha: Tensor) -> Tensor:
    """dOmega/dalpha at fixed p, (*batch, 1); at alpha = 1 its limit."""
    safe, inside = _positive(p)
    log = safe.log()
    heat, square = (alpha - 1) * log, log.square()
    entropy = p * log + (alpha - 1) * p * square * _second(heat)
    rise = heat.exp() * p * square * _second(-heat)
    return ((rise - entropy / alpha) / alpha * inside).sum(-1, keepdim=True)


def _second(v: Tensor) -> Tensor:
    """(e^v - 1 - v) / v^2, 1/2 at 0, with derivatives of every order."""
    near = v.detach().abs() <= SERIES
    small = torch.where(near, v, 0.0)
    series = torch.full_like(small, 1 / math.factorial(TERMS + 1))
    for k in range(TERMS, 1, -1):
        series = series * small + 1 / math.factorial(k)
    large = torch.where(near, 1.0, v)
    return torch.where(near, series, (torch.expm1(large) - large) / large.square())


def _power_sum(p: Tensor, alpha: Tensor) -> Tensor:
    """The sum of p^alpha, (*batch, 1)."""
    if alpha.numel() == 1 and not torch.compiler.is_compiling():
        return torch.pow(p, alpha.item()).sum(-1, keepdim=True)
    return torch.pow(p, alpha).sum(-1, keepdim=True)
