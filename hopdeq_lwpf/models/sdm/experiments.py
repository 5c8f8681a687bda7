"""Perturb and recall: how much noise each memory corrects, per query (Bricken and Pehlevan 2021, fig. 3 and app. B)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from hopdeq_lwpf._types import check_float_tensor, unknown
from hopdeq_lwpf.data.corruption import corrupt
from hopdeq_lwpf.data.draws import check_seed, stream
from hopdeq_lwpf.models.sdm.counting import DATA_SET_DRAWS, check_whole
from hopdeq_lwpf.models.sdm.function import check_bits
from hopdeq_lwpf.models.sdm.hopfield import ClassicalHopfield
from hopdeq_lwpf.models.sdm.memory import SDM
from hopdeq_lwpf.models.sdm.neurons import Neurons
from hopdeq_lwpf.models.sdm.recalls import SDMRecall
from hopdeq_lwpf.models.sdm.weights import (
    Attention,
    Cap,
    Circle,
    ReadWeights,
    TransformerAttention,
    check_space,
)
from hopdeq_lwpf.normalization import Sphere
from hopdeq_lwpf.solvers.termination import Termination

# A query counts as recalled above this cosine with its target.
RECALLED = 0.99
# Hamming radii and flips of the published figures for n = 64.
RADII = (5, 9, 11, 15, 19, 27)
FLIPS = (0, 4, 8, 12)


@dataclass(frozen=True)
class Algorithm:
    """One line of the recall table."""

    space: str
    weights: (
        Callable[[GridSettings, int], ReadWeights] | None
    )  # of (settings, radius); None: classical Hopfield


def _fit(space: str) -> Callable[[GridSettings, int], ReadWeights]:
    return lambda s, d: Attention.fitted(s.n, d, space=space, estimator=s.estimator)


# The names of the published code.
ALGORITHMS: dict[str, Algorithm] = {
    "Binary_SDM": Algorithm("binary", lambda s, d: Circle(d)),
    "Binary_SDM_NeuronLimit": Algorithm("binary", lambda s, d: Circle(d, s.neurons, seed=s.seed)),
    "Binary_SDM_BFit_Attention": Algorithm("binary", _fit("binary")),
    "Cont_SDM": Algorithm("continuous", lambda s, d: Cap(d)),
    "Cont_SDM_NeuronLimit": Algorithm("continuous", lambda s, d: Cap(d, s.neurons, seed=s.seed)),
    "Cont_Binary_SDM": Algorithm("continuous", lambda s, d: Circle(d)),
    "Cont_SDM_BFit_Attention": Algorithm("continuous", _fit("binary")),
    "Cont_SDM_CFit_Attention": Algorithm("continuous", _fit("continuous")),
    "Transformer_Attention": Algorithm("continuous", lambda s, d: TransformerAttention()),
    "Cont_Binary_SDM_NeuronLimit": Algorithm("continuous", lambda s, d: Circle(d, s.neurons, seed=s.seed)),
    "Binary_Neuron_SDM": Algorithm(
        "binary", lambda s, d: Neurons.random(s.explicit_neurons, s.n, d, seed=s.seed)
    ),
    "Hopfield": Algorithm("binary", None),
}
# Those of the published recall table; the others are asked for by name.
TABLE = tuple(ALGORITHMS)[:9]


@dataclass(frozen=True)
class GridSettings:
    """Settings of a recall table; one memory a radius and algorithm, one batch a noise level and repeat.

    n: bits; 64 is the published transformer setting, 1000 Kanerva's. patterns: stored, 1024 as published.
    radii: Hamming radii d, 0..n; those of the published figures for n = 64. flips: bits flipped in a query, 0..n, or
        cosine noise of the same size, 1 - 2 flips / n. Left out, both are the published ones that are at most n; a
        memory of less than 5 bits has the radius n // 2.
    algorithms: names of `ALGORITHMS`. neurons: of "..._NeuronLimit"; explicit_neurons: of "Binary_Neuron_SDM".
    estimator: of the fitted betas, "published" or "ols" (see `fit_beta`); the default is that of the paper's tables.
    data_sets, repeats: sets of patterns, and perturbations of each; the published figures have 3 and 5.
    reject_nearer: draw a query again that lies nearer to another pattern.
    max_steps: reads at most, 100 as published.
    seed: of all draws. The first data set is `random_patterns(seed=seed)`; the others have seeds drawn from it, so that
        neighbouring seeds share none.
    """

    n: int = 64
    patterns: int = 1024
    radii: tuple[int, ...] = RADII
    flips: tuple[int, ...] = FLIPS
    algorithms: tuple[str, ...] = TABLE
    neurons: float = 2.0**64
    explicit_neurons: int = 100_000
    estimator: str = "published"
    data_sets: int = 1
    repeats: int = 1
    reject_nearer: bool = False
    max_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n", "patterns", "explicit_neurons", "data_sets", "repeats", "max_steps"):
            check_whole(name, getattr(self, name))
        # The very tuples of the defaults, so that a radius that was asked for is never dropped.
        if self.radii is RADII and max(RADII) > self.n:
            object.__setattr__(self, "radii", tuple(d for d in RADII if d <= self.n) or (self.n // 2,))
        if self.flips is FLIPS and max(FLIPS) > self.n:
            object.__setattr__(self, "flips", tuple(k for k in FLIPS if k <= self.n))
        for name in ("radii", "flips"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"{name} must be a tuple of whole numbers, got {values!r}")
            for value in values:
                check_whole(name, value, 0, self.n)
        for name in self.algorithms:
            if name not in ALGORITHMS:
                raise unknown("algorithm", name, ALGORITHMS)
        check_seed("seed", self.seed)


@dataclass(frozen=True)
class RecallRow:
    """What became of the queries at one noise level; one entry a query in each tensor, (Q,)."""

    algorithm: str
    n: int
    radius: int
    flips: int
    data_set: int
    cosine: Tensor  # of the final state with its target, of signs in the binary space
    steps: Tensor  # reads until nothing changed
    converged: Tensor  # bool
    cycle: Tensor  # length of the cycle that the state lies on, 1 for a fixed point, 0 where none was found
    empty: Tensor  # bool: met an empty read

    @property
    def mean_cosine(self) -> float:
        """Of all queries."""
        return float(self.cosine.double().mean())

    @property
    def recalled(self) -> float:
        """Share of the queries with a cosine above .99 that met no empty read: a state that is kept is not recalled."""
        return float(((self.cosine > RECALLED) & ~self.empty).double().mean())


def random_patterns(count: int, n: int, *, seed: int = 0) -> Tensor:
    """Uniform in [-1, 1], float32 (count, n); > 0 gives the bits of the binary space, as in the published data."""
    check_whole("count", count)
    check_whole("n", n)
    drawn = stream(check_seed("seed", seed)).random_sample((count, n))
    return torch.from_numpy(2 * drawn - 1).float()


def perturb(
    patterns: Tensor,
    flips: int,
    *,
    generator: Generator,
    space: str = "binary",
    reject_nearer: bool = False,
    retries: int = 10,
) -> Tensor:
    """Noisy queries, one a pattern: (N, n) -> (N, n).

    space: "binary": exactly so many distinct bits of each pattern of 0 and 1 are flipped. "continuous": each pattern is
        turned by noise orthogonal to it until its cosine is 1 - 2 flips / n, and keeps its norm.
    reject_nearer: draw a query again, up to `retries` times (10 as published), that lies nearer to another of the
        patterns, or as near; the last draw stays.
    generator: a CPU generator.
    """
    check_float_tensor("patterns", patterns)
    if patterns.ndim != 2:
        raise ValueError(f"patterns must have shape (N, n), got {tuple(patterns.shape)}")
    check_whole("flips", flips, 0, patterns.shape[1])
    check_space(space)
    if space == "binary":
        check_bits("patterns", patterns)
    queries = _drawn(patterns, flips, space, generator)
    if not reject_nearer:
        return queries
    keys = 2 * patterns - 1 if space == "binary" else Sphere().apply(patterns)
    for _ in range(check_whole("retries", retries, 0)):
        lost = _nearer_to_another(queries, keys, space)
        if not bool(lost.any()):
            break
        queries = torch.where(lost[:, None], _drawn(patterns, flips, space, generator), queries)
    return queries


def _drawn(patterns: Tensor, flips: int, space: str, generator: Generator) -> Tensor:
    n = patterns.shape[1]
    if space == "binary":
        return corrupt(patterns, "flip", flips / n, generator=generator)
    cosine = 1 - 2 * flips / n
    norm = torch.linalg.vector_norm(patterns, dim=-1, keepdim=True)
    along = Sphere().apply(patterns)
    noise = torch.randn(patterns.shape, generator=generator, dtype=torch.float64).to(patterns)
    noise = noise - (noise * along).sum(-1, keepdim=True) * along
    noise = Sphere().apply(noise - (noise * along).sum(-1, keepdim=True) * along)
    return norm * (cosine * along + (1 - cosine**2) ** 0.5 * noise)


def _nearer_to_another(queries: Tensor, keys: Tensor, space: str) -> Tensor:
    signed = 2 * queries - 1 if space == "binary" else queries
    products = signed @ keys.T
    own = products.diagonal().clone()
    return products.fill_diagonal_(-torch.inf).amax(-1) >= own


def make_memory(algorithm: str, radius: int, settings: GridSettings) -> SDM | ClassicalHopfield:
    """The memory of this name and radius; empty reads keep the state."""
    if algorithm not in ALGORITHMS:
        raise unknown("algorithm", algorithm, ALGORITHMS)
    made = ALGORITHMS[algorithm]
    stop = Termination(max_steps=settings.max_steps, check_every=1)
    if made.weights is None:
        return ClassicalHopfield(stop=stop, on_failure="ignore")
    return SDM(made.weights(settings, radius), space=made.space, stop=stop, on_failure="ignore")


@torch.no_grad()
def recall(memory: SDM | ClassicalHopfield, queries: Tensor, patterns: Tensor) -> tuple[SDMRecall, Tensor]:
    """The recall of queries (*batch, N, n), one a pattern (N, n), and the cosine of each with its pattern, (*batch, N).

    Of signs in the binary space.
    """
    found = memory(queries, patterns, return_solution=True)
    assert isinstance(found, SDMRecall)  # asked for
    state, target = found.state, patterns.to(found.state)
    if memory.f.binary:
        state, target = 2 * state - 1, 2 * target - 1
    return found, torch.nn.functional.cosine_similarity(state.double(), target.double(), dim=-1)


def run_grid(settings: GridSettings, *, patterns: Tensor | None = None) -> list[RecallRow]:
    """All algorithms at all radii and noise levels.

    patterns: (N, n) real numbers in place of random ones, with data_sets=1; their signs are the bits of the binary
    space.
    """
    if patterns is not None and (settings.data_sets != 1 or patterns.shape[-1] != settings.n):
        raise ValueError(
            f"patterns of shape {tuple(patterns.shape)} need GridSettings(n={patterns.shape[-1]}, data_sets=1), got "
            f"n={settings.n}, data_sets={settings.data_sets}"
        )
    rows = []
    for data_set in range(settings.data_sets):
        seed = _data_seed(settings.seed, data_set)
        drawn = random_patterns(settings.patterns, settings.n, seed=seed) if patterns is None else patterns
        stored = {"binary": (drawn > 0).to(drawn.dtype), "continuous": Sphere().apply(drawn)}
        spaces = dict.fromkeys(ALGORITHMS[name].space for name in settings.algorithms)
        queries = {space: _all_queries(stored[space], space, settings, seed) for space in spaces}
        for radius in settings.radii:
            for name in settings.algorithms:
                space = ALGORITHMS[name].space
                memory = make_memory(name, radius, settings)
                for level, flips in enumerate(settings.flips):
                    # One set of queries at a time: larger batches leave the cache of a processor.
                    found = [recall(memory, query, stored[space]) for query in queries[space][level]]
                    rows.append(_row(name, radius, flips, data_set, settings.n, found))
    return rows


def recall_curve(
    algorithm: str, radius: int, settings: GridSettings, *, patterns: Tensor | None = None
) -> list[RecallRow]:
    """One algorithm at one radius, a row a noise level of `settings.flips` and data set; patterns as in `run_grid`."""
    values = {field: getattr(settings, field) for field in settings.__dataclass_fields__}
    return run_grid(
        GridSettings(**{**values, "algorithms": (algorithm,), "radii": (radius,)}), patterns=patterns
    )


def _data_seed(seed: int, data_set: int) -> int:
    if data_set == 0:
        return seed
    return int(stream(seed, DATA_SET_DRAWS, data_set).randint(2**32, dtype=np.uint32))


def _all_queries(patterns: Tensor, space: str, settings: GridSettings, seed: int) -> Tensor:
    """(flips, repeats, N, n)."""
    generator = Generator().manual_seed(seed)
    options = {"space": space, "reject_nearer": settings.reject_nearer}
    return torch.stack(
        [
            torch.stack(
                [perturb(patterns, k, generator=generator, **options) for _ in range(settings.repeats)]  # type: ignore[arg-type]
            )
            for k in settings.flips
        ]
    )


def _row(
    name: str, radius: int, flips: int, data_set: int, n: int, found: list[tuple[SDMRecall, Tensor]]
) -> RecallRow:
    recalls = [one for one, _ in found]
    return RecallRow(
        algorithm=name,
        n=n,
        radius=radius,
        flips=flips,
        data_set=data_set,
        cosine=torch.cat([cosine for _, cosine in found]),
        steps=torch.cat([one.steps for one in recalls]),
        converged=torch.cat([one.converged for one in recalls]),
        cycle=torch.cat([one.cycle for one in recalls]),
        empty=torch.cat([one.empty for one in recalls]),
    )
