"""Retrieval of states that lie on a graph: one diffusion step beside one retrieval step, with one energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hopdeq_lwpf._layout import set_number
from hopdeq_lwpf._types import Matvec, wide
from hopdeq_lwpf.forgetting import Forgetting, Keep
from hopdeq_lwpf.graphs import Laplacian, Operator, heat_kernel, implicit_euler
from hopdeq_lwpf.models.association import Association, Heads
from hopdeq_lwpf.models.diffusion.strength import Strength, make_strength
from hopdeq_lwpf.retrieval import Retrieval, RetrievalContext, combine, times

# Scores that are held at once, 16 MiB of float32: above, states are taken in blocks, and computed again for gradients.
BLOCK = 2**22


class DiffusionContext(NamedTuple):
    """What stays fixed during a solve; built by `DiffusionRetrieval.prepare`. P: number of problems."""

    association: RetrievalContext  # of all states as rows; the injected query is not in it
    start: Tensor  # (*batch, L, d): the states at first
    injected: Tensor | None  # (P, L, d): inject_weight * query
    laplacian: Laplacian | None  # of the states' graphs, (P,); None where nothing diffuses them
    lam: Tensor | float  # (P, 1, 1), or one for all
    smooth: Operator | None  # (I + lam L)^-1
    spread: Operator | None  # exp(-logit_eta L)
    values: Tensor | None  # (P, S, dv): what `step` reads out; None: the weights

    @property
    def threshold(self) -> Tensor | None:
        """What the forgetting unit drew, (B, 1) or a scalar."""
        return self.association.threshold


class DiffusionRetrieval(Association):
    """f(Q) = (I + lam L)^-1 H (D' * p(D(beta H Q K^T))) K [+ (I + lam L)^-1 a q],  H = exp(-logit_eta L).

    The states Q (L, d) of one problem lie on a graph with Laplacian L; K (S, d) are its stored patterns. One step
    of the concave-convex procedure on

        E(Q) = tr(Q^T (I + lam L) Q) / 2 - sum_i Lagrangian(D(beta K (H Q)_i)) / beta [- a tr(q^T Q)],

    whose first part is quadratic with the matrix I + lam L and whose second part is concave, so that E falls by at
    least tr(d^T (I + lam L) d) / 2 at each step d, whatever lam, logit_eta and beta are. (I + lam L) df/dQ is
    symmetric, hence the metric I + lam L. lam = logit_eta = 0 is `Association`.

    lam: strength of the diffusion of states, >= 0: a number, a tensor that broadcasts to the problems, (H,) for
        heads in their last dimension, or a `Strength`, which may be learned.
    logit_eta: time for which the scores diffuse over the graph of the states, likewise.
    Other arguments: see `Retrieval`; scores are dot products, and states are not normalised.

    One problem is all states of a graph, state_ndim = 2. Where there are more than `BLOCK` scores, states are taken in
    blocks, so that memory is linear in states, patterns and edges; gradients then compute each block again.
    """

    state_ndim = 2

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        *,
        lam: float | Tensor | Strength = 1.0,
        logit_eta: float | Tensor | Strength = 0.0,
        **dials: Any,
    ) -> None:
        super().__init__(beta, **dials)
        if self.similarity != "dot" or self.normalization is not None:
            raise ValueError(
                "diffusion needs similarity='dot' and normalize=None: the energy of states on a graph is quadratic "
                f"with I + lam L; got similarity={self.similarity!r}, normalize={self.normalization!r}"
            )
        self.lam = make_strength("lam", lam)
        self.logit_eta = make_strength("logit_eta", logit_eta)

    def prepare(  # type: ignore[override]
        self, heads: Heads | DiffusionContext, *, read_values: bool = False
    ) -> DiffusionContext:
        """The context of these heads, whose `graph` is that of the states; one that was made already passes.

        read_values: `step` reads out the heads' values instead of the weights.
        """
        if isinstance(heads, DiffusionContext):
            return heads
        x = self.lay_out(heads)
        if read_values:
            x = x._replace(values=_problems(heads.v))
        if type(self.forgetting).draw is Forgetting.draw:
            return x
        c = x.association
        threshold = self.forgetting.draw(self._scores(self._mixed(x.start, x), c), c.mask)
        return x._replace(association=c._replace(threshold=threshold))

    def lay_out(self, heads: Heads, threshold: Tensor | None = None) -> DiffusionContext:  # type: ignore[override]
        """The context of these heads with a threshold that was drawn before, or none yet."""
        c = super().lay_out(heads, threshold)
        q = heads.q
        batch = tuple(q.shape[:-2])
        injected = None if c.injected is None else _problems(c.injected.reshape(q.shape))
        context = DiffusionContext(c._replace(injected=None), q, injected, None, 0.0, None, None, None)
        if heads.graph is None:
            return context
        problems = (q.shape[:-2].numel(),)
        graph = heads.graph

        def spread_over(strength: Strength, kind: Callable[[Laplacian, Any], Operator]) -> Operator | None:
            if strength.off:
                return None
            value = strength.over(batch, q)
            shared = not isinstance(value, Tensor) or value.ndim == 0
            # One matrix a graph, not one a head, where heads differ in nothing that it is made from.
            operator = kind(graph if shared else graph.expand(batch), value)
            return operator.expand(batch).reshape(problems)

        lam = self.lam.over(batch, q)
        return context._replace(
            laplacian=graph.expand(batch).reshape(problems),
            lam=lam.expand(batch).reshape(-1, 1, 1) if isinstance(lam, Tensor) and lam.ndim else lam,
            smooth=spread_over(self.lam, implicit_euler),
            spread=spread_over(self.logit_eta, heat_kernel),
        )

    def init(self, x: DiffusionContext) -> Tensor:  # type: ignore[override]
        """z0: the states as they came."""
        return x.start

    def forward(self, z: Tensor, x: DiffusionContext) -> Tensor:  # type: ignore[override]
        """One step: (*batch, L, d) -> (*batch, L, d)."""
        recalled = self._blockwise(self._recall, self._mixed(z, x), x.association)
        return self._smoothed(self._mixed(recalled, x), x)

    def step(self, z: Tensor, x: DiffusionContext) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """f(z, x), and the read-out: `weights(z, x)`, or that of the values that the context holds."""
        return self(z, x), self.weights(z, x) if x.values is None else self.read(z, x, x.values)

    def evaluate(  # type: ignore[override]
        self, z: Tensor, x: DiffusionContext
    ) -> tuple[Tensor, Callable[[], Tensor], Tensor | None]:
        """f(z, x), a function that makes E(z, x), and the piece of f that z lies in; see `Retrieval.evaluate`."""
        mixed = self._mixed(z, x)
        if self._blocks(z, x.association) > 1:  # what an energy is made from would be all scores at once
            image, piece = self._recall_and_pieces(mixed, x)
            return self._smoothed(self._mixed(image, x), x), lambda: self.energy(z, x), piece
        recalled, energy, piece = super().evaluate(mixed, x.association)
        image = self._smoothed(self._mixed(recalled, x), x)
        own = wide(mixed).square().sum(-1) / 2

        def total() -> Tensor:
            return self._quadratic(z, x) + (energy() - own).sum(-1)

        return image, total, None if piece is None else _joined(piece)

    def energy(self, z: Tensor, x: DiffusionContext) -> Tensor:  # type: ignore[override]
        """E(z): (*batch, L, d) -> (*batch), in float32 or wider."""

        def concave(part: Tensor, c: RetrievalContext) -> Tensor:
            value, _ = self.forgetting.project(self._scores(part, c), c.threshold, c.mask)
            beta = c.beta.reshape(-1) if isinstance(c.beta, Tensor) and c.beta.ndim else c.beta
            return (-self.separation.lagrangian(value, c.mask) / beta).reshape(*part.shape[:-1], 1)

        below = self._blockwise(concave, self._mixed(z, x), x.association)
        return self._quadratic(z, x) + below.squeeze(-1).sum(-1)

    def metric(self, z: Tensor, x: DiffusionContext) -> Matvec | None:  # type: ignore[override]
        """I + lam L where (I + lam L) df/dQ is symmetric, else None; the identity where nothing diffuses states."""
        plain = super().metric(z, x.association)
        if plain is None or x.smooth is None:
            return plain
        return lambda v: v + self._pulled(v, x)

    def weights(self, z: Tensor, x: DiffusionContext) -> Tensor:  # type: ignore[override]
        """The association of each state with each pattern, with which values are read out, (*batch, L, S).

        (I + lam L)^-1 H w: what the neighbours of a state recall is in it, as it is in f.
        """
        own = super().weights(self._mixed(z, x), x.association)
        return self._smoothed(self._mixed(own, x), x, inject=False)

    def nearest(self, z: Tensor, x: DiffusionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Of each state by itself, without what its neighbours recall: the largest weight, the index of its pattern, -1
        where everything is forgotten or masked, and how many patterns have a weight above 0; (*batch, L) each.
        """

        def of(part: Tensor, c: RetrievalContext) -> Tensor:
            weights = times(*self._weigh(part, c))
            (weight, index), support = weights.max(-1), (weights > 0).sum(-1)
            found = [weight.double(), index.masked_fill(~(weight > 0), -1), support]
            return torch.stack([f.reshape(part.shape[:-1]) for f in found], -1)

        found = self._blockwise(of, self._mixed(z, x), x.association)
        weight, index, support = found.unbind(-1)
        return weight.to(z.dtype), index.long(), support.long()

    def read(self, z: Tensor, x: DiffusionContext, values: Tensor) -> Tensor:
        """weights(z, x) @ values, (P, S, dv) -> (*batch, L, dv), without all weights at once."""

        def of(part: Tensor, c: RetrievalContext) -> Tensor:
            held = times(*self._weigh(part, c))
            return combine(held.to(values.dtype), values).reshape(*part.shape[:-1], values.shape[-1])

        read = self._blockwise(of, self._mixed(z, x), x.association)
        return self._smoothed(self._mixed(read, x), x, inject=False)

    def select(self, x: DiffusionContext, live: Tensor) -> tuple[DiffusionContext, Tensor]:  # type: ignore[override]
        """The context of the live problems, and their rows."""
        rows = live.nonzero().squeeze(1)
        states = x.start.shape[-2]

        def own(part: Any) -> Any:
            """The rows of what belongs to one problem."""
            return part.index_select(0, rows) if isinstance(part, Tensor) and part.ndim > 1 else part

        def each(part: Any) -> Any:
            """The same of what belongs to one state; numbers, scalars and masks (S,) are shared by all."""
            if not isinstance(part, Tensor) or part.ndim < 2:
                return part
            return own(part.reshape(-1, states, part.shape[-1])).reshape(-1, part.shape[-1])

        def graph(part: Any) -> Any:
            return None if part is None else part.select(rows)

        c = x.association
        start = own(_problems(x.start))
        patterns = c.patterns if c.patterns.ndim == 2 else own(c.patterns)
        narrowed = RetrievalContext(*map(each, c._replace(patterns=None, start=None)))  # type: ignore[arg-type]
        return DiffusionContext(
            association=narrowed._replace(patterns=patterns, start=start),
            start=start,
            injected=own(x.injected),
            laplacian=graph(x.laplacian),
            lam=own(x.lam),
            smooth=graph(x.smooth),
            spread=graph(x.spread),
            values=own(x.values),
        ), rows

    def _mixed(self, z: Tensor, x: DiffusionContext) -> Tensor:
        """H z: states, or what they recall, spread over the graph."""
        return z if x.spread is None else _over(x.spread, z)

    def _smoothed(self, image: Tensor, x: DiffusionContext, *, inject: bool = True) -> Tensor:
        """(I + lam L)^-1 of an image, with the injected query."""
        if inject and x.injected is not None:
            image = image + x.injected.reshape(image.shape)
        return image if x.smooth is None else _over(x.smooth, image)

    def _pulled(self, z: Tensor, x: DiffusionContext) -> Tensor:
        """lam L z."""
        assert x.laplacian is not None
        flat = _problems(z)
        return (x.lam * x.laplacian.times(flat)).reshape(z.shape)

    def _quadratic(self, z: Tensor, x: DiffusionContext) -> Tensor:
        """tr(z^T (I + lam L) z) / 2 - tr(injected^T z): (*batch)."""
        flat = wide(_problems(z))
        energy = flat.square().sum((-2, -1)) / 2
        if x.smooth is not None:
            assert x.laplacian is not None
            lam = x.lam.reshape(-1) if isinstance(x.lam, Tensor) and x.lam.ndim else x.lam
            energy = energy + lam * x.laplacian.quadratic(flat) / 2
        if x.injected is not None:
            energy = energy - (wide(x.injected) * flat).sum((-2, -1))
        return energy.reshape(z.shape[:-2])

    def _recall(self, part: Tensor, c: RetrievalContext) -> Tensor:
        weights, kept = self._weigh(part, c)
        return self._image(part, times(weights, kept) if self.mask_in_loop else weights, c)

    def _recall_and_pieces(self, mixed: Tensor, x: DiffusionContext) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.forgetting, Keep) and not self._compact:
            return self._blockwise(self._recall, mixed, x.association), None

        def of(part: Tensor, c: RetrievalContext) -> Tensor:
            image, _, piece = Retrieval.evaluate(self, part, c)
            assert piece is not None
            return torch.cat([image, piece.unsqueeze(-1).to(image.dtype)], -1)

        both = self._blockwise(of, mixed, x.association)
        return both[..., :-1], _joined(both[..., -1])

    def _blocks(self, z: Tensor, c: RetrievalContext) -> int:
        """In how many blocks the states of each problem are taken."""
        scores = z.shape[:-1].numel() * c.patterns.shape[-2]
        return min(-(-scores // BLOCK), max(z.shape[-2], 1))

    def _blockwise(
        self, of: Callable[[Tensor, RetrievalContext], Tensor], z: Tensor, c: RetrievalContext
    ) -> Tensor:
        """`of(z, c)`, which has the leading dimensions of z, made from blocks of states where there are many scores."""
        blocks = self._blocks(z, c)
        if blocks <= 1:
            return of(z, c)
        size = -(-z.shape[-2] // blocks)
        whole: Tensor | None = None
        parts = []
        for first in range(0, z.shape[-2], size):
            part, narrowed = z[..., first : first + size, :], _states(c, z.shape[-2], first, size)
            if torch.is_grad_enabled():
                parts.append(checkpoint(of, part, narrowed, use_reentrant=False, preserve_rng_state=False))
                continue
            made = of(part, narrowed)
            # One tensor for all: small results that stay between the large ones that go would fragment the memory.
            if whole is None:
                whole = made.new_empty((*z.shape[:-1], made.shape[-1]))
            whole[..., first : first + size, :] = made
        return torch.cat(parts, -2) if whole is None else whole


def _states(c: RetrievalContext, states: int, first: int, size: int) -> RetrievalContext:
    """The context of some states of each problem; numbers, scalars, masks (S,) and patterns are shared by all."""

    def some(name: str, part: Any) -> Any:
        if name in ("patterns", "start") or not isinstance(part, Tensor) or part.ndim < 2:
            return part
        rows = part.reshape(-1, states, part.shape[-1])[:, first : first + size]
        return rows.reshape(-1, part.shape[-1])

    return RetrievalContext(**{name: some(name, part) for name, part in c._asdict().items()})


def _over(operator: Operator, z: Tensor) -> Tensor:
    """The operator (P,) on states (*batch, L, d)."""
    return operator(_problems(z)).reshape(z.shape)


def _problems(z: Tensor) -> Tensor:
    """(*batch, L, d) -> (P, L, d), also where there is no state."""
    return z.reshape(z.shape[:-2].numel(), *z.shape[-2:])


def _joined(pieces: Tensor) -> Tensor:
    """One number for the pieces of all states of a problem: (*batch, L) -> (*batch)."""
    return set_number(pieces.double())
