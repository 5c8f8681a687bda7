"""Association of heads: `Retrieval` with one beta a head and a number added to every score."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hopdeq_lwpf._layout import lay
from hopdeq_lwpf._types import Solution, check_float_tensor, wide
from hopdeq_lwpf.forgetting import Forgetting
from hopdeq_lwpf.retrieval import Retrieval, RetrievalContext
from hopdeq_lwpf.solvers.solve import judge_step
from hopdeq_lwpf.solvers.termination import Termination

if TYPE_CHECKING:
    from hopdeq_lwpf.graphs import Laplacian


class Heads(NamedTuple):
    """What is associated. B: batch, H: heads, L: state patterns, S: stored patterns."""

    q: Tensor  # (B, H, L, d): state patterns
    k: Tensor  # (B, H, S, d): stored patterns
    v: Tensor  # (B, H, S, dv): what is read out
    mask: Tensor | None = None  # bool, broadcastable to (B, H, L, S); True = ignore
    bias: Tensor | None = None  # added to the scores, broadcastable likewise
    graph: Laplacian | None = None  # of the states, (B, H) or broadcastable; of models that diffuse them


class Association(Retrieval):
    """`Retrieval` for states (B, H, L, d) among the stored patterns (B, H, S, d) of their head.

    The scores are s = beta_h k.z + bias; energy, symmetry and convergence are those of `Retrieval`, since the
    bias does not depend on the state. beta: a number, a scalar tensor, or (H,).
    """

    def prepare(self, heads: Heads | RetrievalContext) -> RetrievalContext:  # type: ignore[override]
        """The context of these heads; one that was made already passes as it is.

        So a solve and its read-out share the threshold and noise of the forgetting unit. Nothing is checked:
        the layers have done it.
        """
        if isinstance(heads, RetrievalContext):
            return heads
        x = self.lay_out(heads)
        if type(self.forgetting).draw is Forgetting.draw:
            return x
        return x._replace(threshold=self.forgetting.draw(self._scores(x.start, x), x.mask))

    def lay_out(self, heads: Heads, threshold: Tensor | None = None) -> RetrievalContext:
        """The context of these heads with a threshold that was drawn before, or none yet."""
        if not heads.k.shape[-2]:
            heads = _nothing(heads)
        q, k = heads.q, heads.k
        shape = (*q.shape[:-1], k.shape[-2])
        injected = pull = None
        if self.inject == "input":
            pull = lay("inject_weight", _by_head(self.inject_weight), q)
            injected = q.reshape(-1, q.shape[-1]) * pull
        return RetrievalContext(
            patterns=k.reshape(-1, *k.shape[-2:]),
            beta=lay("beta", _by_head(self.beta), q),
            mask=_flatten(heads.mask, shape),
            threshold=threshold,
            injected=injected,
            start=q,
            pull=pull,
            bias=_flatten(heads.bias, shape),
        )


@dataclass(frozen=True)
class Associated:
    """What one call associated; nothing here carries a gradient.

    Weights, energy and solution are computed when they are asked for, so that a call does not pay for them, and
    from what is held here and the settings of f as they then are.
    """

    f: Association
    heads: Heads
    threshold: Tensor | None  # what the forgetting unit drew
    state: Tensor  # (B, H, L, d): what the last separation function was applied to
    steps: int | None
    stop: Termination
    solved: Solution | None  # of the solve, with steps=None

    @property
    def x(self) -> RetrievalContext:
        """The context, laid out anew: spread masks are too large to keep until the next call."""
        return self.f.lay_out(self.heads, self.threshold)

    @torch.no_grad()
    def weights(self) -> Tensor:
        """The association matrix before dropout, (B, H, L, S)."""
        if not self.state.numel():
            return self.state @ self.heads.k.mT
        return self.f.weights(self.state, self.x)[..., : self.heads.k.shape[2]]

    @torch.no_grad()
    def energy(self) -> Tensor | None:
        """Of the state that the solution holds, one a problem of f; None where the function has none."""
        if not self.f.has_energy:
            return None
        if not self.state.numel():
            return self.state.flatten(-self.f.state_ndim).sum(-1)
        return self.f.energy(self._after(), self.x)

    @torch.no_grad()
    def solution(self) -> Solution:
        """One entry a problem of f, a head and state pattern as a rule; `value` is the read-out, (B, H, L, dv)."""
        value = self.weights() @ self.heads.v.to(self.state.dtype)
        note = _note(self.unanswered())
        if self.solved is not None:
            note = "; ".join(part for part in (self.solved.note, note) if part)
            return dataclasses.replace(self.solved, value=value, note=note)
        after = self._after()
        ends = [wide(part).flatten(-self.f.state_ndim) for part in (self.state, after)]
        result, residual = judge_step(ends[0], ends[1], self.stop)
        count = torch.full_like(result, 1 if self.steps is None else self.steps)
        return Solution(value, after, result, residual, count, count.clone(), note=note)

    def unanswered(self) -> Tensor:
        """(B, H, L) bool: every stored pattern is masked, so that nothing is recalled."""
        return unanswered(self.heads)

    def _after(self) -> Tensor:
        still = self.solved is not None or not self.state.numel()
        return self.state if still else self.f(self.state, self.x)


def unanswered(heads: Heads) -> Tensor:
    """(B, H, L) bool: whether a state pattern has no stored pattern left."""
    shape = heads.q.shape[:-1]
    if heads.mask is None:
        none = heads.k.shape[2] == 0
        return torch.full(shape, none, dtype=torch.bool, device=heads.q.device)
    return heads.mask.all(-1).expand(shape)


def _nothing(heads: Heads) -> Heads:
    """Where nothing is stored: one pattern of zeros, masked, since no product can be laid out without one."""
    k, v = (functional.pad(part, (0, 0, 0, 1)) for part in (heads.k, heads.v))
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=k.device)
    return heads._replace(k=k, v=v, mask=mask, bias=None)


def _note(rows: Tensor) -> str:
    count = int(rows.sum())
    return f"{count} of {rows.numel()} states had every stored pattern masked and recall 0" if count else ""


def lay_masks(
    padding: Tensor | None, association: Tensor | None, shape: tuple[int, int, int, int], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """What is ignored (bool) and what is added to the scores (float), both broadcastable to `shape`.

    padding: (B, S). association: (L, S), (B H, L, S), (B, L, S) or broadcastable (B, H, L, S). Each bool (or
    uint8, as bool; True = ignore) or float, added to the scores; -inf in it ignores. shape: (B, H, L, S).
    """
    batch, heads, states, stored = shape
    masks: list[Tensor] = []
    biases: list[Tensor] = []
    if padding is not None:
        given = as_mask("stored_pattern_padding_mask", padding, device)
        if tuple(given.shape) != (batch, stored):
            raise ValueError(
                f"stored_pattern_padding_mask must have shape (B, S) = {(batch, stored)}, one entry a stored "
                f"pattern; got {tuple(given.shape)}"
            )
        _sort(given[:, None, None, :], masks, biases)
    if association is not None:
        given = as_mask("association_mask", association, device)
        _sort(_place(given, batch, heads, states, stored), masks, biases)
    mask = None if not masks else masks[0] if len(masks) == 1 else masks[0] | masks[1]
    bias = None if not biases else biases[0] if len(biases) == 1 else biases[0] + biases[1]
    return mask, bias


def as_mask(name: str, given: Any, device: torch.device) -> Tensor:
    """A bool mask (True = ignore), or floats that are added to the scores; uint8 is read as bool."""
    mask = given if isinstance(given, Tensor) else torch.as_tensor(given, device=device)
    if mask.dtype == torch.uint8:
        mask = mask.bool()
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{name} must be bool (True = ignore), uint8 or a float that is added to the scores, got "
            f"{mask.dtype}; use {name}.bool()"
        )
    if mask.device != device:
        raise ValueError(f"{name} is on {mask.device} but the input is on {device}; move one with .to()")
    return mask


def _place(mask: Tensor, batch: int, heads: int, states: int, stored: int) -> Tensor:
    """The association mask with four dimensions."""
    full = (batch, heads, states, stored)
    got = tuple(mask.shape)
    if got == (states, stored):
        return mask[None, None]
    if got == (batch * heads, states, stored):
        return mask.reshape(full)
    if got == (batch, states, stored):
        return mask[:, None]
    if mask.ndim == 4 and all(here in (1, there) for here, there in zip(got, full, strict=True)):
        return mask.expand(-1, -1, -1, stored)
    raise ValueError(
        f"association_mask must have shape (L, S) = {(states, stored)}, (B H, L, S) = "
        f"{(batch * heads, states, stored)}, (B, L, S) or (B, H, L, S) = {full}; got {got}"
    )


def _sort(given: Tensor, masks: list[Tensor], biases: list[Tensor]) -> None:
    """A bool mask as it is; a float one as what is finite, and where it is -inf."""
    if given.dtype == torch.bool:
        masks.append(given)
        return
    # -inf in the scores would be a very low score, which forgetting units and 0 * inf know nothing of.
    ignored = given == -torch.inf
    masks.append(ignored)
    biases.append(given.masked_fill(ignored, 0.0))


def check_patterns(name: str, tensor: object, width: int | None) -> Tensor:
    """A floating-point tensor (B, N, width), or an error that says why not."""
    given = check_float_tensor(name, tensor)
    if given.ndim != 3:
        raise ValueError(
            f"{name} must have three dimensions, batch, patterns and width, got shape {tuple(given.shape)}; "
            "for one bag use unsqueeze(0)"
        )
    if width is not None and given.shape[-1] != width:
        raise ValueError(
            f"{name} has width {given.shape[-1]} (shape {tuple(given.shape)}), the layer was built for {width}"
        )
    return given


def _by_head(value: float | Tensor) -> float | Tensor:
    """(H,) as (H, 1), which broadcasts against (B, H, L)."""
    return value[:, None] if isinstance(value, Tensor) and value.ndim == 1 else value


def _flatten(part: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    return None if part is None else part.expand(shape).reshape(-1, shape[-1])
