"""One retrieval step as a fixed-point function, with its energy. Knows no solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, overload

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
from hopdeq_lwpf.retrieval import streamed
from hopdeq_lwpf.retrieval.context import (
    RetrievalContext,
    active_set,
    asked_similarity,
    combine,
    less_products,
    make_half_squares,
    piece_of,
    products,
    times,
    without_autocast,
)
from hopdeq_lwpf.retrieval.streamed_context import StreamedContext
from hopdeq_lwpf.separation import Separation, make_separation
from hopdeq_lwpf.streaming import PatternSource

INJECT = ("start", "input")
SIMILARITIES = ("dot", "euclidean")
AnyContext: TypeAlias = RetrievalContext | StreamedContext


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
        self.similarity = asked_similarity(self.separation) if similarity is None else similarity
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
        return asked_similarity(self.separation) == "euclidean"

    @property
    def has_energy(self) -> bool:
        """Whether plain iteration is guaranteed to lower `energy`.

        For LSR, of which only exp L is convex, that holds with its own similarity and inject="start".
        """
        fits = not self._compact or (self._euclidean and self.inject == "start")
        return bool(self.mask_in_loop and self.forgetting.has_energy and self.separation.has_energy and fits)

    @overload
    def prepare(self, query: Tensor, patterns: Tensor, mask: Tensor | None = None) -> RetrievalContext: ...

    @overload
    def prepare(
        self, query: Tensor, patterns: PatternSource, mask: Tensor | None = None
    ) -> StreamedContext: ...

    def prepare(
        self, query: Tensor, patterns: Tensor | PatternSource, mask: Tensor | None = None
    ) -> AnyContext:
        """Check the input, lay it out and draw the forgetting threshold from the scores at z0.

        query (*batch, d). patterns: (N, d) shared; with as many dimensions as the query, one set for the
        queries of its second last dimension, (B, N, d) for (B, L, d); with one more, one set a query.
        mask: bool, True = ignore: one entry a pattern (patterns' shape without d), whose patterns may then hold
            anything, NaN too; or the scores' (*batch, N), for finite patterns.
        Patterns that are a source, such as `open_patterns(file)`, are looked at in blocks in every step. They go with
        softmax, softmax1 and the units of `forgetting`, and have no second derivatives.
        """
        if isinstance(patterns, PatternSource):
            return streamed.prepare(self, query, patterns, mask)
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
            squares = None if patterns.requires_grad else make_half_squares(patterns)
            context = context._replace(pull=pull, half_squares=squares)
        if type(self.forgetting).draw is Forgetting.draw:
            return context
        return context._replace(threshold=self.forgetting.draw(self._scores(start, context), mask))

    def init(self, x: AnyContext) -> Tensor:
        """z0: the query, normalised where states are."""
        return x.start

    def forward(self, z: Tensor, x: AnyContext) -> Tensor:
        """One step: (*batch, d) -> (*batch, d)."""
        if isinstance(x, StreamedContext):
            return streamed.image(self, z, x)
        weights, kept = self._weigh(z, x)
        return self._image(z, times(weights, kept) if self.mask_in_loop else weights, x)

    def step(self, z: Tensor, x: AnyContext) -> tuple[Tensor, Tensor]:
        """f(z, x) and what is read out, in one pass: `weights(z, x)`, (*batch, N); of streamed patterns their weighted
        values, (*batch, dv)."""
        if isinstance(x, StreamedContext):
            return streamed.step(self, z, x)
        weights, kept = self._weigh(z, x)
        held = times(weights, kept)
        return self._image(z, held if self.mask_in_loop else weights, x), self._association(z, held)

    def evaluate(self, z: Tensor, x: AnyContext) -> tuple[Tensor, Callable[[], Tensor], Tensor | None]:
        """f(z, x), a function that makes E(z, x) from what that took, and the piece of f that z lies in; (*batch, d),
        (*batch), (*batch).

        The piece: which patterns are kept, for LSR which ones are active; None where f is smooth.
        """
        if isinstance(x, StreamedContext):
            return streamed.evaluate(self, z, x)
        value, kept = self.forgetting.project(self._scores(z, x), x.threshold, x.mask)
        weights, lagrangian = self.separation.weights_then_lagrangian(value, x.mask)
        held = times(weights, kept)
        piece = None
        if self._compact:
            piece = active_set(held).reshape(z.shape[:-1])
        elif kept is not None:
            piece = piece_of(weights, held, kept).reshape(z.shape[:-1])
        image = self._image(z, held if self.mask_in_loop else weights, x)
        return image, lambda: self.energy_from(z, lagrangian(), x), piece

    def energy(self, z: Tensor, x: AnyContext) -> Tensor:
        """E(z): (*batch, d) -> (*batch). Ota et al. 2023, eq. 28, with beta and the injected query.

        With a normalisation inf where no normalised state can be.
        """
        if isinstance(x, StreamedContext):
            return self.energy_from(z, streamed.lagrangian(self, z, x), x)
        value, _ = self.forgetting.project(self._scores(z, x), x.threshold, x.mask)
        return self.energy_from(z, self.separation.lagrangian(value, x.mask), x)

    def metric(self, z: Tensor, x: AnyContext) -> Matvec | None:
        """The identity where the Jacobian J of f is symmetric at an equilibrium, else None.

        Dot: J = beta X^T diag(D') p' diag(D') X everywhere. Euclidean: J = 1 - E''/sum w at an equilibrium.
        None with a normalisation: J is then the product of two symmetric matrices.
        """
        symmetric = self.mask_in_loop and self.forgetting.self_adjoint and self.normalization is None
        return identity if symmetric else None

    def weights(self, z: Tensor, x: AnyContext) -> Tensor:
        """The association of each query with each pattern, with which values are read out.

        (*batch, d) -> (*batch, N): w = D' * p(D(s)); with euclidean scores w / sum w, 0 where that sum is, so
        that the read-out of the patterns is f(z) without the injected query.
        """
        if isinstance(x, StreamedContext):
            return streamed.weights(self, z, x)
        return self._association(z, times(*self._weigh(z, x)))

    def select(self, x: AnyContext, live: Tensor) -> tuple[AnyContext, Tensor]:
        """The context of the live queries, and their rows; see `RetrievalContext.select`."""
        return x.select(live)

    def _scores(self, z: Tensor, x: RetrievalContext) -> Tensor:
        """s: (*batch, d) -> (B, N)."""
        flat = z.reshape(-1, z.shape[-1])
        if not self._euclidean:
            scores = products(flat * x.beta, x.patterns)
            return scores if x.bias is None else scores + x.bias
        # A small difference of large numbers: half precision, also that of autocast, would leave nothing of it.
        with without_autocast(flat.device.type):
            flat, patterns = wide(flat), wide(x.patterns)
            squares = make_half_squares(patterns) if x.half_squares is None else x.half_squares
            own = 0.5 * flat.square().sum(-1, keepdim=True)
            # Rounding must not put a score above 0, where only a state on a pattern is.
            return (less_products(squares, flat, patterns) + own).clamp_min(0.0) * -x.beta

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

    def energy_from(self, z: Tensor, lagrangian: Tensor, x: AnyContext) -> Tensor:
        """E(z) from the memory Lagrangian L(D(s)) at z, (B,): -> (*batch)."""
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
