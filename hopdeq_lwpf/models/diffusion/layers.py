"""Hopfield layers whose stored patterns and states diffuse over graphs, one a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hopdeq_lwpf.graphs import Graph, Laplacian, diffusion_operator
from hopdeq_lwpf.models.association import Association, Heads, as_mask
from hopdeq_lwpf.models.diffusion.function import DiffusionRetrieval
from hopdeq_lwpf.models.diffusion.options import (
    DiffusionLookupOptions,
    DiffusionOptions,
    DiffusionPoolingOptions,
)
from hopdeq_lwpf.models.hopfield import Hopfield
from hopdeq_lwpf.models.layer_options import HopfieldOptions, PoolingOptions, takes
from hopdeq_lwpf.models.learned_patterns import HopfieldLayer, HopfieldPooling

# A graph of one's own: a Graph, or its adjacency, (B, N, N) or (N, N) for all samples.
GivenGraph: TypeAlias = Graph | Tensor | None


class DiffusionHopfield(Hopfield):
    """`Hopfield` whose stored patterns diffuse over their graph, and whose states are drawn to their neighbours.

    With K the projected stored patterns of a head, L_K and L_Q the Laplacians of the graphs of stored patterns and
    states, and K~ = exp(-eta L_K) K, the states move by

        Q <- (I + lam L_Q)^-1 (D' * p(D(beta Q K~^T))) K~

    (`DiffusionRetrieval`, with its energy), and the read-out is (I + lam L_Q)^-1 w V. The graphs are made anew for each
    sample from its own patterns, after their layer norms and before the projections, and padding is in neither.
    lam = eta = 0 is `Hopfield`.

    Options: see `DiffusionOptions`. One problem is all states of a head, so that `last_solution` has shape (B, H).
    """

    options: DiffusionOptions
    takes_options: type[HopfieldOptions] = DiffusionOptions

    @takes(DiffusionOptions)
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.eta = self.options.strength("eta")

    def _function(self, given: HopfieldOptions) -> DiffusionRetrieval:
        return DiffusionRetrieval(given.inverse_temperature(), **given.dials())

    def forward(
        self,
        input: Tensor | Sequence[Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
        state_pattern_padding_mask: Tensor | None = None,
        stored_graph: GivenGraph = None,
        state_graph: GivenGraph = None,
    ) -> Tensor:
        """Associate: -> (B, L, output_size), or (L, B, output_size) without batch_first.

        input, stored_pattern_padding_mask, association_mask: as in `Hopfield.forward`.
        state_pattern_padding_mask: bool (B, L), True = ignore: states that are padding belong to no graph. None: where
            stored and state patterns are the same input, the padding of the stored ones; else no padding.
        stored_graph, state_graph: used instead of those that are made: a `Graph`, or an adjacency (B, N, N) or (N, N),
            bool or weights >= 0, symmetric. Padding has no edge in these either. One graph serves as both where the
            input is one and only one is given.
        """
        given = (state_pattern_padding_mask, stored_graph, state_graph)
        return self._respond(self._graphed(input, stored_pattern_padding_mask, association_mask, *given))

    @torch.no_grad()
    def get_association_matrix(
        self,
        input: Tensor | Sequence[Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
        state_pattern_padding_mask: Tensor | None = None,
        stored_graph: GivenGraph = None,
        state_graph: GivenGraph = None,
    ) -> Tensor:
        """The weights of the read-out before dropout, (B, H, L, S), without gradient: (I + lam L)^-1 w.

        Arguments as in `forward`.
        """
        given = (state_pattern_padding_mask, stored_graph, state_graph)
        return self._associate(self._graphed(input, stored_pattern_padding_mask, association_mask, *given))

    def _graphed(
        self,
        input: Tensor | Sequence[Tensor],
        padding: Tensor | None,
        association: Tensor | None,
        state_padding: Tensor | None,
        stored_graph: GivenGraph,
        state_graph: GivenGraph,
    ) -> Heads:
        """The heads of this input with diffused stored patterns, the mask of the graph, and the graph of the states."""
        parts = self._unpack(input)
        alone = isinstance(input, Tensor) or input[0] is input[1]
        ignored = _ignored("stored_pattern_padding_mask", padding, parts[0])
        without = _ignored("state_pattern_padding_mask", state_padding, parts[1])
        without = ignored if alone and state_padding is None else without
        # Padding may hold anything; what is mixed over a graph must not hold NaN.
        stored, state, projection = parts
        parts = (_cleared(stored, ignored), _cleared(state, without), _cleared(projection, ignored))
        if alone and (stored_graph is None) != (state_graph is None):
            stored_graph = state_graph = stored_graph if state_graph is None else state_graph
        heads = self._project(parts, padding, association)
        needs_stored = not self.eta.off or self.options.attention == "graph"
        stored_graph = self._graph("stored_graph", stored_graph, parts[0], ignored) if needs_stored else None
        if stored_graph is not None:
            heads = self._diffused(heads, stored_graph, alone, without)
        f = self.f
        assert isinstance(f, DiffusionRetrieval)
        if f.lam.off and f.logit_eta.off:
            return heads
        found = self._graph("state_graph", state_graph, parts[1], without)
        return heads._replace(graph=self._laplacian(found))

    def _graph(self, name: str, graph: GivenGraph, features: Tensor, ignored: Tensor | None) -> Graph:
        """The graph that was given, checked and without padding, or one that is made from these patterns."""
        if graph is None:
            return self.options.graph()(features, ignored)
        if not isinstance(graph, (Graph, Tensor)):
            raise TypeError(f"{name} must be a Graph or an adjacency tensor, got {type(graph).__name__}")
        samples, count = features.shape[:2]
        if isinstance(graph, Tensor):
            nodes, batch = graph.shape[-1], tuple(graph.shape[:-2])
        else:
            nodes, batch = graph.nodes, graph.batch
        if nodes != count or batch not in ((), (1,), (samples,)):
            raise ValueError(
                f"{name} has {nodes} nodes and batch shape {batch}, needs {count} nodes and batch shape "
                f"({samples},), (1,) or ()"
            )
        if isinstance(graph, Tensor):
            graph = graph if ignored is None else graph.expand(samples, *graph.shape[-2:])
            return Graph.from_adjacency(graph, ignored, dtype=features.dtype)
        return graph if ignored is None else graph.expand((samples,)).isolate(ignored)

    def _laplacian(self, graph: Graph) -> Laplacian:
        """Of a graph a sample, for all heads: (batch, 1)."""
        return graph.reshape((*graph.batch, 1) if graph.batch else (1, 1)).laplacian(self.options.laplacian)

    def _diffused(self, heads: Heads, graph: Graph, alone: bool, ignored_states: Tensor | None) -> Heads:
        """The heads with stored patterns diffused over their graph, and the mask of the graph."""
        given, count = self.options, graph.nodes
        own, extra = heads.k[:, :, :count], heads.k[:, :, count:]
        if not self.eta.off:
            laplacian = self._laplacian(graph)
            eta = self.eta.over(tuple(own.shape[:2]), own)
            if given.adaptive_eta:
                clarity = self._clarity(heads, ignored_states)
                broken = clarity.isnan()  # which is no reason to refuse the eta of the other samples
                eta = eta * clarity.masked_fill(broken, 0.0)
                own = own.masked_fill(broken[..., None, None], math.nan)
            if isinstance(eta, Tensor) and eta.ndim:
                laplacian = laplacian.expand(tuple(own.shape[:2]))
            operator = diffusion_operator(given.diffusion, laplacian, eta, given.diffusion_steps)
            own = operator.expand(tuple(own.shape[:2]))(own)
            heads = heads._replace(k=torch.cat([own, extra], 2) if extra.shape[2] else own)
        if given.attention == "dense":
            return heads
        away = ~self._reachable(heads, graph, alone)
        if ignored_states is not None:  # what is recalled there means nothing, and is not to be reported
            away = away & ~ignored_states[:, None, :, None]
        if extra.shape[2]:  # what belongs to no graph is open to every state
            away = torch.nn.functional.pad(away, (0, extra.shape[2]))
        return heads._replace(mask=away if heads.mask is None else heads.mask | away)

    def _clarity(self, heads: Heads, ignored_states: Tensor | None) -> Tensor:
        """sigmoid(temperature * (h - threshold)) of the first association, h its mean entropy in [0, 1]: (B, H)."""
        f, given = self.f, self.options
        x = Association.lay_out(f, heads)
        flat = f.separation.weights(f._scores(heads.q, x), x.mask)
        weights = flat.reshape(*heads.q.shape[:-1], flat.shape[-1])
        open_patterns = weights.shape[-1] if heads.mask is None else (~heads.mask).sum(-1)
        most = torch.as_tensor(open_patterns, dtype=weights.dtype, device=weights.device).clamp_min(2).log()
        # torch.special.entr has an infinite slope at 0, where masked and forgotten patterns are: 0 * inf is NaN.
        logs = weights.masked_fill(weights == 0, 1.0).log()
        entropy = -(weights * logs).sum(-1) / most
        if ignored_states is None:
            mean = entropy.mean(-1) if entropy.shape[-1] else entropy.new_zeros(entropy.shape[:-1])
        else:
            counted = (~ignored_states)[:, None].to(entropy.dtype).expand_as(entropy)
            mean = (entropy * counted).sum(-1) / counted.sum(-1).clamp_min(1)
        return torch.sigmoid(given.adaptive_temperature * (mean - given.adaptive_threshold))

    def _reachable(self, heads: Heads, graph: Graph, alone: bool) -> Tensor:
        """Which stored patterns each state may associate with: its anchor and the anchor's neighbours, (B, H, L, S)."""
        count = graph.nodes
        near = graph.expand(heads.k.shape[:1]).connected()
        near = near | torch.eye(count, dtype=torch.bool, device=near.device)
        if alone:
            return near[:, None]
        if not count:  # nothing to be an anchor
            return near.new_zeros((*heads.q.shape[:-1], 0))
        with torch.no_grad():
            scores = heads.q @ heads.k[:, :, :count].mT
            if heads.mask is not None:
                scores = scores.masked_fill(heads.mask[..., :count], -torch.inf)
            anchor = scores.argmax(-1)  # (B, H, L)
            rows = near[:, None].expand(-1, anchor.shape[1], -1, -1)
            return rows.gather(2, anchor[..., None].expand(-1, -1, -1, count))


class DiffusionPooling(HopfieldPooling):
    """`HopfieldPooling` whose bags diffuse over their graphs, and whose learned states over theirs.

    Options: see `DiffusionPoolingOptions`. With one learned state, quantity=1, there is nothing for lam to draw it to.
    """

    core = DiffusionHopfield
    hopfield: DiffusionHopfield
    takes_options: type[PoolingOptions] = DiffusionPoolingOptions

    @takes(DiffusionPoolingOptions)
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)

    def forward(
        self,
        input: Tensor | Sequence[Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
        stored_graph: GivenGraph = None,
        state_graph: GivenGraph = None,
    ) -> Tensor:
        """Pool: -> (B, quantity * output_size). As `HopfieldPooling.forward`, with the graphs of
        `DiffusionHopfield.forward`: of the bags, and of the learned states.
        """
        masks = (stored_pattern_padding_mask, association_mask)
        out = self.hopfield(self._parts(input), *masks, None, stored_graph, state_graph)
        return (out if self.hopfield.options.batch_first else out.transpose(0, 1)).flatten(1)

    def get_association_matrix(
        self,
        input: Tensor | Sequence[Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
        stored_graph: GivenGraph = None,
        state_graph: GivenGraph = None,
    ) -> Tensor:
        """See `DiffusionHopfield.get_association_matrix`; arguments as in `forward`."""
        masks = (stored_pattern_padding_mask, association_mask)
        parts = self._parts(input)
        return self.hopfield.get_association_matrix(parts, *masks, None, stored_graph, state_graph)


class DiffusionLayer(HopfieldLayer):
    """`HopfieldLayer` whose learned patterns diffuse over their graph, and whose states over theirs.

    Options: see `DiffusionLookupOptions`.
    """

    core = DiffusionHopfield
    hopfield: DiffusionHopfield
    takes_options: type[PoolingOptions] = DiffusionLookupOptions

    @takes(DiffusionLookupOptions)
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)

    def forward(
        self,
        input: Tensor,
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
        state_pattern_padding_mask: Tensor | None = None,
        stored_graph: GivenGraph = None,
        state_graph: GivenGraph = None,
    ) -> Tensor:
        """Look up: input (B, L, input_size) -> (B, L, output_size). As `DiffusionHopfield.forward`, S = quantity."""
        masks = (stored_pattern_padding_mask, association_mask, state_pattern_padding_mask)
        return self.hopfield(self._parts(input), *masks, stored_graph, state_graph)

    def get_association_matrix(
        self,
        input: Tensor | Sequence[Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
        state_pattern_padding_mask: Tensor | None = None,
        stored_graph: GivenGraph = None,
        state_graph: GivenGraph = None,
    ) -> Tensor:
        """See `DiffusionHopfield.get_association_matrix`; arguments as in `forward`."""
        masks = (stored_pattern_padding_mask, association_mask, state_pattern_padding_mask)
        return self.hopfield.get_association_matrix(self._parts(input), *masks, stored_graph, state_graph)


def _ignored(name: str, mask: Tensor | None, patterns: Tensor) -> Tensor | None:
    """Which patterns are padding, bool (B, N)."""
    if mask is None:
        return None
    given = as_mask(name, mask, patterns.device)
    ignored = given if given.dtype == torch.bool else given == -torch.inf
    count = patterns.shape[1]
    if ignored.ndim != 2 or ignored.shape[1] != count or patterns.shape[0] not in (1, ignored.shape[0]):
        raise ValueError(
            f"{name} must have shape (B, N) = {tuple(patterns.shape[:2])}, got {tuple(mask.shape)}"
        )
    return ignored


def _cleared(patterns: Tensor, ignored: Tensor | None) -> Tensor:
    return patterns if ignored is None else patterns.masked_fill(ignored[..., None], 0.0)
