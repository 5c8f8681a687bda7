"""Partial forgetting: the projection D of the scores and its indicator D' (Ota et al. 2023, eq. 24-28).

D(s) = s outside the forgetting region F and a bias b inside; D'(s) = 1 outside, 0 inside. With the memory
Lagrangian L of a separation function p, the retrieval update is z = X^T (D' * p(D(beta X z))). In anybody's
attention a unit is two lines:

    value, kept = unit(scores)
    weights = kept * torch.softmax(value, -1)
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hopdeq_lwpf._types import WIDE, check_float_tensor, resolve, unknown

Threshold: TypeAlias = Tensor | float | None
Mask: TypeAlias = Tensor | None
Projected: TypeAlias = tuple[Tensor, Tensor | None]
SCOPES = ("row", "tensor")


class Forgetting(nn.Module):
    """Base of the units; a new one overrides `project`, and `draw` where it has something to draw.

    scores: (*batch, N), any floating-point dtype, which value and kept share. mask: bool, broadcastable to
    the scores, True = ignore.
    """

    _settings: tuple[str, ...] = ()

    @property
    def has_energy(self) -> bool:
        """Whether the update lowers the energy z^2/2 - L(D(beta X z))/beta at every step.

        So it is where L(D(.)) is convex in the scores and D' * p(D) is a subgradient of it: the update is
        then a step of the concave-convex procedure on the energy of Ota et al. 2023, eq. 28. It holds for
        every L that is convex, symmetric and non-decreasing, with D convex and non-decreasing, or with D
        keeping the same number of largest scores at every state and a constant for the rest (L(D) is then
        a maximum of convex functions over the sets that could be kept).
        """
        return False

    @property
    def self_adjoint(self) -> bool:
        """Whether diag(D') p' diag(D') is the whole derivative of D' * p(D), hence symmetric."""
        return False

    def draw(self, scores: Tensor, mask: Mask = None) -> Tensor | None:
        """Threshold and noise, once a solve, from the scores at its start; the graph is kept.

        Returns (*batch, 1), a scalar where the unit acts on the whole tensor, or None where nothing is drawn.
        """
        return None

    def project(self, scores: Tensor, threshold: Threshold = None, mask: Mask = None) -> Projected:
        """(D, D') given what `draw` returned: deterministic, for the inside of a solve.

        D' is detached, 0 at masked entries, and None where the unit keeps everything. Masked entries of D
        are arbitrary: whoever takes the softmax removes them. Scores of -inf count as very low ones here.
        """
        raise NotImplementedError(f"{type(self).__name__} must override project(scores, threshold, mask)")

    def forward(
        self, scores: Tensor, threshold: Threshold = None, mask: Mask = None
    ) -> tuple[Tensor, Tensor]:
        """(D, D') of shape (*batch, N); without a threshold the unit draws its own.

        Masked entries get D' = 0 and D = -inf, so that a softmax gives them no weight, and enter neither
        median nor count; without a mask it is the entries equal to -inf, as attention code marks padding.
        A row that is masked entirely gets D = 0: with D' = 0 the product with its softmax is 0, not NaN.
        Raises TypeError for integer scores or a mask that is not bool, ValueError for one that does not fit.
        """
        _check_scores(scores)
        mask = scores == -math.inf if mask is None else _fit(mask, scores)
        if threshold is None:
            threshold = self.draw(scores, mask)
        value, kept = self.project(scores, threshold, mask)
        nothing_left = mask.all(-1, keepdim=True)
        value = value.masked_fill(mask & ~nothing_left, -math.inf).masked_fill(nothing_left, 0.0)
        kept = torch.ones_like(scores) if kept is None else kept
        return value, kept.masked_fill(mask, 0.0)

    def extra_repr(self) -> str:
        """The settings."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._settings)


class Keep(Forgetting):
    """No forgetting: D = s, D' = 1."""

    has_energy = True  # L itself is convex
    self_adjoint = True

    def project(self, scores: Tensor, threshold: Threshold = None, mask: Mask = None) -> Projected:
        """(scores, None)."""
        return scores, None


class ReLU(Forgetting):
    """F = {s <= 0}, b = 0: D = max(s, 0). Ota et al. 2023.

    min_keep: the so many largest unmasked scores of a row are kept even inside F, ties by lowest index;
        0 allows total forgetting, which recalls the zero vector and passes no gradient.
    """

    _settings = ("min_keep",)
    has_energy = True  # D is convex and non-decreasing; with min_keep L(D) is a maximum of such terms
    self_adjoint = True  # the threshold does not depend on the state

    def __init__(self, min_keep: int = 0) -> None:
        super().__init__()
        self.min_keep = _count("min_keep", min_keep, 0)

    def project(self, scores: Tensor, threshold: Threshold = None, mask: Mask = None) -> Projected:
        """(D, D'), each (*batch, N)."""
        if self.min_keep:
            zero = scores.new_zeros(())
            kept = torch.maximum(_above(scores, zero), _largest(scores, self.min_keep, mask))
            value = _blend(scores, zero, kept)
        else:
            value = scores.relu()
            kept = value.detach().sign()
        return value, kept if mask is None else kept.masked_fill(mask, 0.0)


class PFU(Forgetting):
    """Partial forgetting unit: kept where s > threshold, strictly; b elsewhere. Ota et al. 2023.

    threshold: "median", the lower median of the unmasked scores (shift-invariant, so it cannot forget
        everything for ever as a constant can), or a finite number.
    bias: "threshold", D = max(s, threshold) with the gradient that the threshold carries, or a finite number.
    noise: standard deviation of Gaussian noise on the threshold, in training mode only, frozen for a solve.
        The official code squares its sigma: noise = sigma**2.
    scope: "row", one threshold and one noise value a row, or "tensor", one for the whole tensor as the
        official code has it, which couples the problems of a batch.
    tracked: False freezes the median drawn at the start of a solve; True takes it anew from the scores of
        every step, and `draw` returns the noise alone. A constant threshold is the same either way.
    min_keep: the so many largest unmasked scores of a row are kept in any case, ties by lowest index.
    generator: source of the noise; None is torch's global one. A copy or a pickle continues from its state.
    """

    _settings = ("threshold", "bias", "noise", "scope", "tracked", "min_keep")

    def __init__(
        self,
        threshold: str | float = "median",
        bias: str | float = "threshold",
        noise: float = 0.0,
        scope: str = "row",
        tracked: bool = False,
        min_keep: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.threshold = _number_or("threshold", threshold, "median")
        self.bias = _number_or("bias", bias, "threshold")
        self.noise = _number("noise", noise)
        if self.noise < 0:
            raise ValueError(f"noise is a standard deviation and must be >= 0, got {noise!r}")
        if scope not in SCOPES:
            raise unknown("scope", scope, SCOPES)
        if not isinstance(tracked, bool):
            raise TypeError(f"tracked must be True or False, got {tracked!r}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        self.scope = scope
        self.tracked = tracked
        self.min_keep = _count("min_keep", min_keep, 0)
        self.generator = generator

    @property
    def has_energy(self) -> bool:
        """See `Forgetting.has_energy`; with the median tracked it holds for distinct scores.

        True with bias="threshold" and a threshold that stays, since D = max(s, threshold) is convex and
        non-decreasing; with a tracked row median, a constant bias and no noise, since always half the scores
        are kept. False with a threshold that stays and another bias, where limit cycles exist; with a tracked
        median and bias="threshold", where the update is no gradient field, or of the whole tensor.
        """
        noisy = self.training and self.noise > 0
        if self.threshold == "median" and self.tracked:
            return self.scope == "row" and self.bias != "threshold" and not noisy
        return self.bias == "threshold" or (self.bias == self.threshold and not noisy)

    @property
    def self_adjoint(self) -> bool:
        """False where D moves with a median that follows the state."""
        return not (self.threshold == "median" and self.tracked and self.bias == "threshold")

    def draw(self, scores: Tensor, mask: Mask = None) -> Tensor | None:
        """Threshold with noise, or the noise alone if tracked: (*batch, 1), a scalar with scope="tensor"."""
        _check_scores(scores)
        noise = self.draw_noise(scores)
        if self.threshold != "median":
            return None if noise is None else noise + float(self.threshold)
        if self.tracked:
            return noise
        median = self._median(scores, None if mask is None else _fit(mask, scores))
        return median if noise is None else median + noise

    def project(self, scores: Tensor, threshold: Threshold = None, mask: Mask = None) -> Projected:
        """(D, D'), each (*batch, N). threshold: what `draw` returned.

        Raises ValueError without a threshold where the unit has a median to freeze.
        """
        limit = self._limit(scores, threshold, mask)
        kept = _above(scores, limit)
        if self.min_keep:
            kept = torch.maximum(kept, _largest(scores, self.min_keep, mask))
        fill = limit if self.bias == "threshold" else scores.new_full((), float(self.bias))
        # The quicker maximum() would give a score at the threshold, the median itself, half of the gradient.
        quick = self.bias == "threshold" and not self.min_keep and not torch.is_grad_enabled()
        value = torch.maximum(scores, limit) if quick else _blend(scores, fill, kept)
        return value, kept if mask is None else kept.masked_fill(mask, 0.0)

    def _limit(self, scores: Tensor, threshold: Threshold, mask: Mask) -> Tensor:
        if threshold is None and self.threshold == "median" and not self.tracked:
            raise ValueError("this PFU freezes its median: pass threshold=unit.draw(scores) or tracked=True")
        given = scores.new_zeros(()) if threshold is None else torch.as_tensor(threshold).to(scores)
        if self.threshold == "median":
            return self._median(scores, mask) + given if self.tracked else given
        return scores.new_full((), float(self.threshold)) if threshold is None else given

    def _median(self, scores: Tensor, mask: Mask) -> Tensor:
        whole = self.scope == "tensor"
        if not scores.numel():
            return scores.new_zeros(() if whole else (*scores.shape[:-1], 1))
        if mask is None:
            return scores.median() if whole else scores.median(-1, keepdim=True).values
        visible = scores.masked_fill(mask, math.nan)
        median = visible.nanmedian() if whole else visible.nanmedian(-1, keepdim=True).values
        return median.masked_fill(mask.all() if whole else mask.all(-1, keepdim=True), 0.0)

    def draw_noise(self, scores: Tensor) -> Tensor | None:
        """Noise of the threshold for scores (*batch, N) of any N: (*batch, 1), or a scalar; None without noise."""
        if not self.training or self.noise == 0:
            return None
        # Drawn in float32 for half dtypes, so that one seed means the same noise in each.
        source = self.generator
        shape = () if self.scope == "tensor" else (*scores.shape[:-1], 1)
        device = scores.device if source is None else source.device
        dtype = WIDE.get(scores.dtype, scores.dtype)
        return (self.noise * torch.randn(shape, generator=source, dtype=dtype, device=device)).to(scores)

    def __getstate__(self) -> dict[str, Any]:
        """The attributes, with the generator as (device, state), since it cannot be pickled itself."""
        state = self.__dict__.copy()
        if self.generator is not None:
            state["generator"] = (str(self.generator.device), self.generator.get_state())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.generator is not None:
            self.generator = torch.Generator(state["generator"][0]).set_state(state["generator"][1])


class TopK(Forgetting):
    """Keeps exactly k unmasked scores of each row, all if there are fewer; ties by lowest index.

    k: at least 1; 8 leaves room for a metastable state of a few patterns.
    bias: what the others become, a finite number (0.0, as the forgotten scores of the ReLU
    unit) or "threshold", the largest of the forgotten scores, with its gradient.
    """

    _settings = ("k", "bias")

    def __init__(self, k: int = 8, bias: str | float = 0.0) -> None:
        super().__init__()
        self.k = _count("k", k, 1)
        self.bias = _number_or("bias", bias, "threshold")

    @property
    def has_energy(self) -> bool:
        """True with a constant bias, see `Forgetting.has_energy`; else the update is no gradient field."""
        return self.bias != "threshold"

    @property
    def self_adjoint(self) -> bool:
        """False where the bias moves with the state."""
        return self.has_energy

    def project(self, scores: Tensor, threshold: Threshold = None, mask: Mask = None) -> Projected:
        """(D, D'), each (*batch, N)."""
        kept = _largest(scores, self.k, mask)
        if not scores.shape[-1]:
            return scores, kept
        if self.bias == "threshold":
            out = kept.bool() if mask is None else kept.bool() | mask
            fill = scores.masked_fill(out, -math.inf).amax(-1, keepdim=True)
        else:
            fill = scores.new_full((), float(self.bias))
        return _blend(scores, fill, kept), kept


UNITS: dict[str, type[Forgetting]] = {"keep": Keep, "pfu": PFU, "relu": ReLU, "topk": TopK}


def make_forgetting(spec: None | str | Forgetting) -> Forgetting:
    """The unit that is meant: None is `Keep`, a name a unit with its defaults, a unit itself.

    Raises ValueError for an unknown name, TypeError for other things.
    """
    if spec is None:
        return Keep()
    made = resolve("forgetting", spec, UNITS, Forgetting, none=True)
    return made() if isinstance(made, type) else made  # a name stands for a class


def _lowest(tensor: Tensor) -> float:
    # Half of the lowest number, so that a difference to a bias cannot overflow.
    return torch.finfo(tensor.dtype).min / 2


def _above(scores: Tensor, limit: Tensor) -> Tensor:
    """1 where scores > limit, else 0, in the dtype of the scores."""
    # The sign of the difference: several times faster on a CPU than a comparison and its conversion. Where
    # both are -inf it is that of NaN, which torch has as 0.
    return (scores.detach() - limit.detach()).sign_().relu_()


def _blend(scores: Tensor, fill: Tensor, kept: Tensor) -> Tensor:
    """Scores where kept, fill elsewhere: exactly, and so are the gradients of both."""
    # Unlike where(), lerp has no data-dependent branch, and it passes a NaN score on instead of hiding it.
    fill, value = fill.clamp_min(_lowest(scores)), scores.clamp_min(_lowest(scores))
    if scores.dtype is torch.float16:  # the difference of two of its numbers may be too large for it
        return torch.lerp(fill.float(), value.float(), kept.float()).to(scores.dtype)
    return torch.lerp(fill, value, kept)


def _largest(scores: Tensor, k: int, mask: Mask) -> Tensor:
    """1 at the k largest unmasked scores of each row, ties by lowest index, else 0."""
    scores = scores.detach()
    visible = scores if mask is None else scores.masked_fill(mask, -math.inf)
    count = scores.shape[-1]
    if k >= count:
        return torch.ones_like(scores) if mask is None else torch.ones_like(scores).masked_fill(mask, 0.0)
    if k == 1:
        first = visible.argmax(-1, keepdim=True)
        one = torch.zeros_like(scores).scatter(-1, first, torch.ones_like(first, dtype=scores.dtype))
        return one if mask is None else one.masked_fill(mask, 0.0)
    # A sorted selection pays for few, a single order statistic for many.
    few = 8 * k <= count
    kth = visible.topk(k, -1).values[..., -1:] if few else visible.kthvalue(count - k + 1, -1, True).values
    above, tied = visible > kth, visible == kth
    if mask is not None:
        tied = tied & ~mask
    room = k - above.sum(-1, keepdim=True)
    return (above | (tied & (tied.cumsum(-1) <= room))).to(scores.dtype)


def _check_scores(scores: Tensor) -> None:
    if check_float_tensor("scores", scores).ndim == 0:
        raise ValueError("scores must have shape (*batch, N), got a scalar")


def _fit(mask: Tensor, scores: Tensor) -> Tensor:
    """The mask in the shape of the scores."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True = ignore), got {kind}")
    try:
        return mask.expand(scores.shape)
    except RuntimeError:
        shapes = f"shape {tuple(mask.shape)} does not broadcast to scores of shape {tuple(scores.shape)}"
        raise ValueError(f"mask of {shapes}") from None


def _number(name: str, value: object, also: str = "") -> float:
    allowed = also + "a finite number"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return float(value)


def _number_or(name: str, value: object, word: str) -> str | float:
    if not isinstance(value, str):
        return _number(name, value, f"{word!r} or ")
    if value != word:
        raise ValueError(f"{unknown(name, value, [word])} A finite number is allowed too.")
    return value


def _count(name: str, value: object, least: int) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least:  # type: ignore[operator]
        raise (ValueError if whole else TypeError)(f"{name} must be an integer >= {least}, got {value!r}")
    return value  # type: ignore[return-value]
