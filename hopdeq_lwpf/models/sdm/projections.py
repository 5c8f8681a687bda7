"""Sparse Distributed Memory behind a learnt projection: pictures are compared by short keys, and read out whole.

Bricken and Pehlevan 2021: real patterns are too much alike for a memory of random addresses; a
projection that is trained to undo noise spreads them over the sphere of the keys.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Generator, Tensor, nn

from hopdeq_lwpf._layout import check_input, group, lay_mask, without_padding
from hopdeq_lwpf._types import check_float_tensor, wide
from hopdeq_lwpf.forgetting import Forgetting
from hopdeq_lwpf.models.sdm.counting import check_whole
from hopdeq_lwpf.models.sdm.function import SPHERE, SDMContext, SDMFunction, without_autocast
from hopdeq_lwpf.models.sdm.recalls import AssociativeMemory, SDMRecall
from hopdeq_lwpf.models.sdm.weights import Attention, ReadWeights, check_weights, products
from hopdeq_lwpf.retrieval import combine
from hopdeq_lwpf.solvers.adjoints import Adjoint
from hopdeq_lwpf.solvers.base import Solver
from hopdeq_lwpf.solvers.termination import Termination

# The published setting: keys of 64 bits, and the radius with the best ratio of signal to noise for them.
KEYS, RADIUS = 64, 11


class ProjectedFunction(SDMFunction):
    """f(z, x) = P^T w(W z): one read of patterns P (N, n), whose keys are W P, normalised; z is a picture, (*batch, n).

    projection: W, (keys, n). Keys and the projected state have length 1, so that f does not depend on the length of
    z; what is read is not normalised. weights, forgetting, empty: see `ProjectedMemory`. There is no known energy.
    """

    has_energy = False

    def __init__(
        self,
        projection: Tensor,
        weights: ReadWeights,
        *,
        forgetting: None | str | Forgetting = None,
        empty: str = "keep",
    ) -> None:
        super().__init__(weights, space="continuous", forgetting=forgetting, empty=empty)
        weights.check(projection.shape[0])
        self.projection = nn.Parameter(projection)

    def project(self, pictures: Tensor) -> Tensor:
        """W p / |W p|, (*batch, n) -> (*batch, keys), in float32 or wider; 0 for a picture of zeros."""
        pictures = wide(pictures)
        with without_autocast(pictures):
            return SPHERE.apply(pictures @ self.projection.to(pictures.dtype).T)

    def prepare(  # type: ignore[override]
        self, query: Tensor | SDMContext, patterns: Tensor | None = None, mask: Tensor | None = None
    ) -> SDMContext:
        """Check the input, and make the keys of these patterns; arguments as in `ProjectedMemory.forward`."""
        if isinstance(query, SDMContext):
            return query
        query, patterns = check_float_tensor("query", query), check_float_tensor("patterns", patterns)
        batch = check_input(query, patterns, mask)
        self._check_fit(query)
        self._refuse_gradients(query, patterns)
        if mask is not None:
            patterns = without_padding(patterns, mask)
            mask = lay_mask(mask, batch, patterns)
        keys, values = self.project(patterns), wide(patterns)
        if patterns.ndim > 2:
            keys, values = group(batch, keys), group(batch, values)
        draws = self.weights.draw(keys.shape[-2])
        draws = None if draws is None else draws.to(keys)
        x = self._store(SDMContext(keys, values, mask, None, draws, None, None, query))
        if type(self.forgetting).draw is Forgetting.draw:
            return x
        logits, gone = self._logits(self._coordinates(query), x)
        return x._replace(threshold=self.forgetting.draw(logits, gone))

    def nearest(self, z: Tensor, x: SDMContext) -> tuple[Tensor, Tensor]:
        """Cosine with the nearest picture that is not masked, and its index, -1 for NaN: (*batch) each."""
        flat = SPHERE.apply(wide(z.reshape(-1, z.shape[-1])))
        with without_autocast(flat):
            cosine = products(flat, SPHERE.apply(_values(x)).to(flat))
        cosine, index = (cosine if x.mask is None else cosine.masked_fill(x.mask, -math.inf)).max(-1)
        index = index.masked_fill(~cosine.isfinite(), -1)
        return cosine.reshape(z.shape[:-1]), index.reshape(z.shape[:-1])

    def energy(self, z: Tensor, x: SDMContext) -> Tensor:
        """Raises ValueError: none is known, since keys and values differ."""
        raise ValueError(
            "energy is not known for projected patterns; SDM(Attention(beta), space='continuous') has one"
        )

    def _read(self, z: Tensor, x: SDMContext) -> tuple[Tensor, None]:
        """f(z), in the batch shape of z."""
        flat, values = self._coordinates(z), _values(x)
        with without_autocast(flat):
            if x.content is not None:
                image, empty, _ = self._through_neurons(flat, x)
            else:
                held, empty, _ = self._weigh(flat, x)
                image = combine(held.to(values.dtype), values)
        self._report(empty)
        if self.empty == "keep":
            image = torch.where(empty, z.reshape(image.shape).to(image.dtype), image)
        return image.to(z.dtype).reshape(z.shape), None

    def _coordinates(self, z: Tensor) -> Tensor:
        return self.project(z.reshape(-1, z.shape[-1]))

    def _store(self, x: SDMContext) -> SDMContext:
        """Explicit neurons hold the patterns, at their keys."""
        x = super()._store(x)
        return x._replace(content=x.pointed, pointed=None)

    def _means(self, x: SDMContext) -> tuple[Tensor, Tensor]:
        values = _values(x)
        among = values.new_ones(len(values)) if x.mask is None else (~x.mask).to(values)
        mean = (among / among.sum().clamp_min(1.0)) @ values
        return mean, mean

    def _check_fit(self, query: Tensor) -> None:
        if query.shape[-1] != self.projection.shape[1]:
            raise ValueError(
                f"query and patterns must have the width {self.projection.shape[1]} of the projection, got "
                f"{query.shape[-1]}"
            )
        if query.device != self.projection.device:
            raise ValueError(
                f"query is on {query.device} but the projection is on {self.projection.device}; move one with .to()"
            )

    def _refuse_gradients(self, query: Tensor, patterns: Tensor) -> None:
        if self.smooth or not torch.is_grad_enabled():
            return
        asked = {"query": query, "patterns": patterns, "projection": self.projection}
        asked |= dict(self.weights.named_parameters())
        names = [name for name, tensor in asked.items() if tensor.requires_grad]
        if names:
            raise ValueError(
                f"{', '.join(names)} requires grad, but {self.weights!r} is piecewise constant, so that no gradient "
                "passes; train with Attention(beta) or Cap(d), or call it under torch.no_grad()"
            )


class ProjectedMemory(AssociativeMemory):
    """A memory of pictures that are compared by learnt keys: query (*batch, width) -> recalled picture (*batch, width).

    A read is P^T w(cos(W z, W P)): keys and query are W times patterns and state, normalised; the patterns
    themselves are read out and not normalised. `f` is the fixed-point function (`ProjectedFunction`), whose state is
    the picture. The memory keeps no patterns and no keys: each call makes keys of the patterns that it gets.

    width: n of the pictures. keys: width of the keys; 64 as published.
    weights: any read weights for keys of that width, as in `SDM`. None: `Attention.fitted(64, 11)`, whose radius is
        the one with the best ratio of signal to noise at 64 keys; other widths need weights of their own.
    forgetting, empty, steps, solver, stop, adjoint, on_failure: as in `SDM`. steps=k reads k times. `Circle` and finite
        neurons pass no gradient: such a memory is called under torch.no_grad().
    generator: a CPU generator, of the start of W, which is N(0, 1) as published; None: torch's own.
    """

    f: ProjectedFunction

    def __init__(  # noqa: PLR0913 (one model, many dials)
        self,
        width: int,
        keys: int = KEYS,
        weights: ReadWeights | None = None,
        *,
        forgetting: None | str | Forgetting = None,
        empty: str = "keep",
        steps: int | None = None,
        solver: str | Solver = "auto",
        stop: Termination = Termination(),  # noqa: B008 (frozen)
        adjoint: str | Adjoint = "implicit",
        on_failure: str = "warn",
        generator: Generator | None = None,
    ) -> None:
        width, keys = check_whole("width", width), check_whole("keys", keys)
        if weights is None and keys != KEYS:
            raise ValueError(
                f"weights have a default for keys={KEYS} only, got keys={keys}; give weights, such as "
                f"Attention.fitted({keys}, d) with a radius d"
            )
        weights = Attention.fitted(KEYS, RADIUS) if weights is None else check_weights(weights)
        start = torch.randn(keys, width, generator=generator)
        f = ProjectedFunction(start, weights, forgetting=forgetting, empty=empty)
        super().__init__(f, steps=steps, solver=solver, stop=stop, adjoint=adjoint, on_failure=on_failure)

    def problem(
        self,
        query: Tensor | SDMContext,
        patterns: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        return_solution: bool = False,
    ) -> tuple[SDMContext, Tensor]:
        """What `forward` with these arguments solves: context and start; see `Equilibrium.problem`."""
        x = self.f.prepare(query, patterns, mask)
        return x, self.f.init(x)

    def forward(  # type: ignore[override]
        self,
        query: Tensor | SDMContext,
        patterns: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        return_solution: bool = False,
    ) -> Tensor | SDMRecall:
        """query (*batch, n), patterns (N, n) or sets of them, mask: as in `SDM.forward` -> (*batch, n).

        index and cosine of the `SDMRecall` are of the nearest picture, not of the nearest key.
        Raises ValueError or TypeError for input that does not fit, or that requires grad where there is none;
        EmptyReadError with empty="error".
        """
        return self._recall(self.f.prepare(query, patterns, mask), False, return_solution)

    def project(self, pictures: Tensor) -> Tensor:
        """The keys of pictures: (*batch, n) -> (*batch, keys), of length 1."""
        return self.f.project(pictures)

    def with_weights(self, weights: ReadWeights) -> ProjectedMemory:
        """A copy with the same projection and other read weights: one projection serves all algorithms."""
        check_weights(weights).check(self.f.projection.shape[0])
        other = copy.deepcopy(self)
        other.f.weights = weights
        other.solver = self._solver  # which is checked against the new weights
        return other


def _values(x: SDMContext) -> Tensor:
    assert x.pointers is not None  # `prepare` sets them
    return x.pointers
