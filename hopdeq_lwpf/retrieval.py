"""One retrieval step as a fixed-point function, with its energy. Knows no solver."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hopdeq_lwpf._layout import (
    attach,
    check_input,
    check_number,
    check_positive,
    group,
    lay,
    lay_mask,
    lowest,
    without_padding,
)
from hopdeq_lwpf._types import Matvec, identity, unknown, wide
from hopdeq_lwpf.forgetting import Forgetting, make_forgetting
from hopdeq_lwpf.normalization import Normalization, make_normalization
from hopdeq_lwpf.separation import Separation, make_separation

INJECT = ("start", "input")
SIMILARITIES = ("dot", "euclidean")
# Share of the weights below which the patterns at the threshold cannot put a kink into f that a solver feels.
NEGLIGIBLE = 1e-3


class RetrievalContext(NamedTuple):
    """What stays fixed during a solve; built by `Retrieval.prepare`. B = number of queries."""

    patterns: Tensor  # (N, d) shared by all queries, or (G, N, d): one set a group of L queries, B = G L
    beta: Tensor | float  # a number, a scalar tensor or (B, 1)
    mask: Tensor | None  # bool (N,) or (B, N); True = ignore
    threshold: Tensor | None  # of the forgetting unit: (B, 1) or a scalar
    injected: Tensor | None  # (B, d): inject_weight * query
    start: Tensor  # (*batch, d): the state that the query makes
    pull: Tensor | float | None = None  # inject_weight as beta is laid out, where f divides by it
    half_squares: Tensor | None = None  # (N,) or (G, N): |xi|^2 / 2; None where scores need none, or make it
    bias: Tensor | None = None  # (B, N): added to the scores, of models that have such a thing (dot only)


class Retrieval(nn.Module):
    """f(z, X) = X^T (D' * p(D(s))) [+ a q]: one step of associative recall with partial forgetting.

    p is the separation function, s the scores, D the forgetting projection and D' its indicator (Ota et al.
    2023, eq. 24-31; without forgetting Ramsauer et al. 2021, eq. 3). L is the memory Lagrangian with gradient
    p and w = D' * p(D(s)). Where `has_energy`, plain iteration never raises E.

    similarity "dot": s = beta X z and

        E(z) = |z|^2 / 2 - L(D(s)) / beta [- a q.z],        f(z) - z = -dE/dz.

    similarity "euclidean": s = -(beta/2) |z - xi|^2 for each pattern xi, and f is a mean shift:

        f(z) = (X^T w [+ a q]) / (sum w [+ a]),        E(z) = -L(D(s)) / beta [+ (a/2) |z - q|^2],

    f(z) - z = -dE/dz / (sum w [+ a]) (Hoover et al. 2025 for LSR). Where that sum is 0, nothing being active
    or all forgotten, so is the gradient, and f(z) = q: a query that reaches nothing stays. No score is above
    0, hence the ReLU unit forgets everything; give PFU a threshold below 0 or its median, or take TopK.

    normalize (with "dot"): the state lives after a normalisation g = dL_v/da, f(z) = g(X^T w [+ a q]), it
    starts at g(query), and E has the conjugate L_v*(z) for |z|^2/2 (Krotov & Hopfield 2021).

    beta: inverse temperature, > 0: a number, or a tensor that broadcasts against the batch shape of the
        query, (H,) for heads in the last batch dimension, (H, 1) for (B, H, L, d). A Parameter is learned.
    separation: a name ("softmax", "sparsemax", ...) or an object of `separation`; a module is learned.
    forgetting: None, a name ("relu", "pfu") or a unit of `forgetting`.
    mask_in_loop: False applies D' only at the read-out, as the published patch of hflayers does; there is
        then no energy and no metric.
    inject: "start", z0 = query; "input", the query is added in every step too.
    inject_weight: the a above, a number or a tensor as beta may be; >= 0 with euclidean scores.
    similarity: "dot", "euclidean", or None: what the separation is made for, the dot product for most.
    normalize: None, "sphere" (g = a/|a|), "layernorm", or an object of `normalization`.

    Raises ValueError or TypeError for settings that are not known or do not go together.
    """

    state_ndim = 1
    beta: float | Tensor
    inject_weight: float | Tensor

    def __init__(  # noqa: PLR0913 (one model, many dials)
        self,
        beta: float | Tensor = 1.0,
        *,
        separation: str | Separation = "softmax",
        forgetting: None | str | Forgetting = None,
        mask_in_loop: bool = True,
        inject: str = "start",
        inject_weight: float | Tensor = 1.0,
        similarity: str | None = None,
        normalize: None | str | Normalization = None,
    ) -> None:
        super().__init__()
        if inject not in INJECT:
            raise unknown("inject", inject, INJECT)
        check_positive("beta", beta)
        check_number("inject_weight", inject_weight)
        self.separation = make_separation(separation)
        self.forgetting = make_forgetting(forgetting)
        self.normalization = make_normalization(normalize)
        self.mask_in_loop = mask_in_loop
        self.inject = inject
        self.similarity = _asked(self.separation) if similarity is None else similarity
        attach(self, "beta", beta)
        attach(self, "inject_weight", inject_weight)
        self._check_similarity()

    def _check_similarity(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise unknown("similarity", self.similarity, SIMILARITIES)
        if not self._euclidean:
            return
        if self.normalization is not None:
            raise ValueError(
                f"normalize={self.normalization!r} needs similarity='dot', got 'euclidean' (from the separation "
                f"{self.separation!r} if it was not given): a mean shift does not stay normalised. For patterns "
                "of one length both similarities rank alike; pass similarity='dot' or normalize=None"
            )
        if lowest(self.inject_weight) < 0:
            raise ValueError(
                f"inject_weight must be >= 0 with euclidean scores, got {self.inject_weight!r}: the energy has "
                "no minimum otherwise"
            )

    @property
    def _euclidean(self) -> bool:
        return self.similarity == "euclidean"

    @property
    def _compact(self) -> bool:
        """Whether the separation is one of bounded reach (LSR): L is not convex, and f jumps."""
        return _asked(self.separation) == "euclidean"

    @property
    def has_energy(self) -> bool:
        """Whether plain iteration is guaranteed to lower `energy`.

        For LSR, of which only exp L is convex, that holds with its own similarity and inject="start".
        """
        fits = not self._compact or (self._euclidean and self.inject == "start")
        return bool(self.mask_in_loop and self.forgetting.has_energy and self.separation.has_energy and fits)

    def prepare(self, query: Tensor, patterns: Tensor, mask: Tensor | None = None) -> RetrievalContext:
        """Check the input, lay it out and draw the forgetting threshold from the scores at z0.

        query (*batch, d). patterns: (N, d) shared; with as many dimensions as the query, one set for the
        queries of its second last dimension, (B, N, d) for (B, L, d); with one more, one set a query.
        mask: bool, True = ignore: one entry a pattern (patterns' shape without d), whose patterns may then hold
            anything, NaN too; or the scores' (*batch, N), for finite patterns.
        """
        batch = check_input(query, patterns, mask)
        if mask is not None:
            patterns = without_padding(patterns, mask)
            mask = lay_mask(mask, batch, patterns)
        if patterns.ndim > 2:
            patterns = group(batch, patterns)
        injected = pull = None
        if self.inject == "input":
            pull = lay("inject_weight", self.inject_weight, query)
            injected = query.reshape(-1, query.shape[-1]) * pull
        start = query if self.normalization is None else self.normalization.apply(query)
        beta = lay("beta", self.beta, query)
        context = RetrievalContext(patterns, beta, mask, None, injected, start)
        if self._euclidean:
            # Patterns that are learned get theirs in every step: a graph made here could be used only once.
            squares = None if patterns.requires_grad else _half_squares(patterns)
            context = context._replace(pull=pull, half_squares=squares)
        if type(self.forgetting).draw is Forgetting.draw:
            return context
        return context._replace(threshold=self.forgetting.draw(self._scores(start, context), mask))

    def init(self, x: RetrievalContext) -> Tensor:
        """z0: the query, normalised where states are."""
        return x.start

    def forward(self, z: Tensor, x: RetrievalContext) -> Tensor:
        """One step: (*batch, d) -> (*batch, d)."""
        weights, kept = self._weigh(z, x)
        return self._image(z, times(weights, kept) if self.mask_in_loop else weights, x)

    def step(self, z: Tensor, x: RetrievalContext) -> tuple[Tensor, Tensor]:
        """f(z, x) and `weights(z, x)`, (*batch, d) and (*batch, N), in one pass."""
        weights, kept = self._weigh(z, x)
        held = times(weights, kept)
        return self._image(z, held if self.mask_in_loop else weights, x), self._association(z, held)

    def evaluate(self, z: Tensor, x: RetrievalContext) -> tuple[Tensor, Callable[[], Tensor], Tensor | None]:
        """f(z, x), a function that makes E(z, x) from what that took, and the piece of f that z lies in; (*batch, d),
        (*batch), (*batch).

        The piece: how many patterns are kept, for LSR which ones are active; None where f is smooth.
        """
        value, kept = self.forgetting.project(self._scores(z, x), x.threshold, x.mask)
        weights, lagrangian = self.separation.weights_then_lagrangian(value, x.mask)
        held = times(weights, kept)
        piece = None
        if self._compact:
            piece = _active(held).reshape(z.shape[:-1])
        elif kept is not None:
            piece = _piece(weights, held, kept).reshape(z.shape[:-1])
        image = self._image(z, held if self.mask_in_loop else weights, x)
        return image, lambda: self._energy(z, lagrangian(), x), piece

    def energy(self, z: Tensor, x: RetrievalContext) -> Tensor:
        """E(z): (*batch, d) -> (*batch). Ota et al. 2023, eq. 28, with beta and the injected query.

        With a normalisation inf where no normalised state can be.
        """
        value, _ = self.forgetting.project(self._scores(z, x), x.threshold, x.mask)
        return self._energy(z, self.separation.lagrangian(value, x.mask), x)

    def metric(self, z: Tensor, x: RetrievalContext) -> Matvec | None:
        """The identity where the Jacobian J of f is symmetric at an equilibrium, else None.

        Dot: J = beta X^T diag(D') p' diag(D') X everywhere. Euclidean: J = 1 - E''/sum w at an equilibrium.
        None with a normalisation: J is then the product of two symmetric matrices.
        """
        symmetric = self.mask_in_loop and self.forgetting.self_adjoint and self.normalization is None
        return identity if symmetric else None

    def weights(self, z: Tensor, x: RetrievalContext) -> Tensor:
        """The association of each query with each pattern, with which values are read out.

        (*batch, d) -> (*batch, N): w = D' * p(D(s)); with euclidean scores w / sum w, 0 where that sum is, so
        that the read-out of the patterns is f(z) without the injected query.
        """
        return self._association(z, times(*self._weigh(z, x)))

    def select(self, x: RetrievalContext, live: Tensor) -> tuple[RetrievalContext, Tensor]:
        """The context of the live queries, and their rows.

        Where queries share patterns in groups, it is filled up so that each group that has some keeps equally many:
        narrowed to whole groups, a solve would go on with nearly all queries for a few stragglers.
        """
        groups, rows = None, live.nonzero().squeeze(1)
        if x.patterns.ndim == 3:
            among = live.reshape(x.patterns.shape[0], -1)
            counts = among.sum(1)
            groups = counts.nonzero().squeeze(1)
            first = among.index_select(0, groups).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
            rows = (groups[:, None] * among.shape[1] + first[:, : int(counts.max())]).reshape(-1)

        def kept(part: Any) -> Any:
            """The rows of what belongs to one query; numbers, scalars and masks (N,) are shared by all."""
            return part.index_select(0, rows) if isinstance(part, Tensor) and part.ndim > 1 else part

        start = kept(x.start.reshape(-1, x.start.shape[-1]))
        narrowed = RetrievalContext(*map(kept, x._replace(start=None, patterns=None, half_squares=None)))  # type: ignore[arg-type]
        shared = {"patterns": x.patterns, "half_squares": x.half_squares}
        if groups is not None:
            shared = {name: None if p is None else p.index_select(0, groups) for name, p in shared.items()}
        return narrowed._replace(start=start, **shared), rows  # type: ignore[arg-type]

    def _scores(self, z: Tensor, x: RetrievalContext) -> Tensor:
        """s: (*batch, d) -> (B, N)."""
        flat = z.reshape(-1, z.shape[-1])
        if not self._euclidean:
            scores = _products(flat * x.beta, x.patterns)
            return scores if x.bias is None else scores + x.bias
        # A small difference of large numbers: half precision, also that of autocast, would leave nothing of it.
        with _without_autocast(flat.device.type):
            flat, patterns = wide(flat), wide(x.patterns)
            squares = _half_squares(patterns) if x.half_squares is None else x.half_squares
            own = 0.5 * flat.square().sum(-1, keepdim=True)
            # Rounding must not put a score above 0, where only a state on a pattern is.
            return (_less_products(squares, flat, patterns) + own).clamp_min(0.0) * -x.beta

    def _weigh(self, z: Tensor, x: RetrievalContext) -> tuple[Tensor, Tensor | None]:
        """p(D(s)) and D', (B, N) each."""
        value, kept = self.forgetting.project(self._scores(z, x), x.threshold, x.mask)
        return self.separation.weights(value, x.mask), kept

    def _image(self, z: Tensor, held: Tensor, x: RetrievalContext) -> Tensor:
        """f from the weights that act, (B, N) -> the shape of z."""
        flat = z.reshape(-1, z.shape[-1])
        image = self._mean_shift(flat, held, x) if self._euclidean else self._sum(held, x)
        return image.reshape(z.shape)

    def _sum(self, held: Tensor, x: RetrievalContext) -> Tensor:
        """X^T w [+ a q], normalised where states are."""
        recalled = combine(held, x.patterns)
        if x.injected is not None:
            recalled = recalled + x.injected
        return recalled if self.normalization is None else self.normalization.apply(recalled)

    def _mean_shift(self, flat: Tensor, held: Tensor, x: RetrievalContext) -> Tensor:
        """(X^T w [+ a q]) / (sum w [+ a]), the query where that is 0 / 0."""
        total = held.sum(-1, keepdim=True)
        if x.pull is not None:
            total = total + x.pull
        nothing = total == 0
        total = total.masked_fill(nothing, 1.0)
        image = combine((held / total).to(x.patterns.dtype), x.patterns)
        if x.injected is not None:
            image = image + x.injected / total
        # Not the state: every point where nothing is active would be an equilibrium, at which an accelerated
        # solver that oversteps gets stuck, with a singular adjoint system.
        return torch.where(nothing, x.start.reshape(flat.shape), image.to(flat.dtype))

    def _association(self, z: Tensor, held: Tensor) -> Tensor:
        if self._euclidean:
            total = held.sum(-1, keepdim=True)
            held = (held / total.masked_fill(total == 0, 1.0)).to(z.dtype)
        return held.reshape(*z.shape[:-1], held.shape[-1])

    def _energy(self, z: Tensor, lagrangian: Tensor, x: RetrievalContext) -> Tensor:
        beta = x.beta.reshape(-1) if isinstance(x.beta, Tensor) and x.beta.ndim else x.beta
        flat = z.reshape(-1, z.shape[-1])
        wider, energy = wide(flat), -lagrangian / beta
        if self._euclidean:
            if x.pull is not None:
                pull = x.pull.reshape(-1) if isinstance(x.pull, Tensor) and x.pull.ndim else x.pull
                energy = energy + 0.5 * pull * (wider - x.start.reshape(flat.shape)).square().sum(-1)
        else:
            norm = self.normalization
            energy = energy + (0.5 * wider.square().sum(-1) if norm is None else norm.conjugate(flat))
            energy = energy if x.injected is None else energy - (x.injected * wider).sum(-1)
        return energy.reshape(z.shape[:-1])


def combine(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sum of stored rows: (B, N) with (N, dv) or (G, N, dv) -> (B, dv)."""
    if values.ndim == 2:
        return weights @ values
    groups, count, width = values.shape
    return (_by_group(weights, groups) @ values).reshape(-1, width)


def _products(flat: Tensor, patterns: Tensor) -> Tensor:
    """(B, d) with (N, d) or (G, N, d) -> (B, N)."""
    if patterns.ndim == 2:
        return flat @ patterns.T
    groups, count, width = patterns.shape
    return (_by_group(flat, groups) @ patterns.transpose(1, 2)).reshape(-1, count)


def _less_products(constants: Tensor, flat: Tensor, patterns: Tensor) -> Tensor:
    """(N,) or (G, N) minus the products of (B, d) with (N, d) or (G, N, d) -> (B, N)."""
    if patterns.ndim == 2:
        return torch.addmm(constants, flat, patterns.T, alpha=-1)
    groups, count, width = patterns.shape
    rows = _by_group(flat, groups)
    return torch.baddbmm(constants[:, None], rows, patterns.transpose(1, 2), alpha=-1).reshape(-1, count)


def _by_group(flat: Tensor, groups: int) -> Tensor:
    """(G L, n) -> (G, L, n), also where there is no group."""
    return flat.reshape(groups, len(flat) // max(groups, 1), flat.shape[-1])


def _half_squares(patterns: Tensor) -> Tensor:
    """|xi|^2 / 2 of each pattern, in float32 or wider."""
    return 0.5 * wide(patterns).square().sum(-1)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    active = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if active else nullcontext()


def _asked(separation: Separation) -> str:
    """The similarity that a separation is made for."""
    asked: str = getattr(separation, "similarity", "dot")
    return asked


def _active(held: Tensor) -> Tensor:
    """A number for the set of patterns of weight > 0: (B, N) -> (B,)."""
    return (held > 0).to(held.dtype) @ irregular(held)


def irregular(like: Tensor) -> Tensor:
    """Fixed numbers without simple relations, (N,) for (..., N), so that different sets of them have different sums."""
    places = torch.arange(1, like.shape[-1] + 1, dtype=torch.float64, device=like.device)
    return (1e4 * places.sin()).frac().abs().to(like.dtype)


def _piece(weights: Tensor, held: Tensor, kept: Tensor) -> Tensor:
    """How many patterns are kept, -1 where the forgotten ones carry no weight that matters: (B,)."""
    return torch.where(held.sum(-1) > (1 - NEGLIGIBLE) * weights.sum(-1), -1.0, kept.sum(-1))


def times(weights: Tensor, kept: Tensor | None) -> Tensor:
    """The weights of what is kept; None: everything."""
    return weights if kept is None else weights * kept
