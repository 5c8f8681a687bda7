"""Retrieval problems that separate solvers: known difficulty, many basins, hard masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hopdeq_lwpf.forgetting import PFU, Forgetting
from hopdeq_lwpf.retrieval import Retrieval, RetrievalContext

CLUSTERS, MEMBERS, WIDTH, QUERIES, BETA = 32, 32, 64, 256, 8.0
CENTRE = 1.5  # norm of a cluster's centre
NEAR, FAR = 0.1, 0.3  # query noise per coordinate


@dataclass(frozen=True)
class RetrievalProblem:
    """Stored patterns (N, d), queries (B, d) and the function that recalls."""

    name: str
    patterns: Tensor
    query: Tensor
    beta: float
    forgetting: None | str | Forgetting = None

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[Retrieval, RetrievalContext, Tensor]:
        """f, its context and z0."""
        f = Retrieval(self.beta, forgetting=self.forgetting)
        x = f.prepare(self.query.to(dtype), self.patterns.to(dtype))
        return f, x, f.init(x)


def _contraction(clusters: Tensor, centres: Tensor) -> Tensor:
    """Largest eigenvalue of each cluster's Jacobian where plain iteration from its centre ends.

    (K, n, d), (K, d) -> (K,); 1 where that point holds fewer than four patterns: the cluster has split. Each
    cluster by itself: the others carry a weight of some e^-16 there.
    """
    z = centres
    for _ in range(5000):
        p = torch.softmax(BETA * (clusters @ z[:, :, None]).squeeze(-1), -1)
        before, z = z, (p[:, None, :] @ clusters).squeeze(1)
        if float((z - before).norm(dim=-1).max()) < 1e-12:
            break
    p = torch.softmax(BETA * (clusters @ z[:, :, None]).squeeze(-1), -1)
    spread = clusters - (p[:, None, :] @ clusters)
    top = BETA * torch.linalg.eigvalsh(spread.transpose(1, 2) @ (p[:, :, None] * spread))[:, -1]
    return torch.where(1 / p.square().sum(-1) < 4.0, 1.0, top)


def _calibrate(directions: Tensor, centres: Tensor, targets: Tensor) -> Tensor:
    """The spread of each cluster at which its fixed point contracts by its target: (K,).

    The contraction rises with the spread up to 1, where the cluster splits; a scan brackets the first crossing.
    """

    def reaches(spread: Tensor) -> Tensor:
        return _contraction(centres[:, None] + spread[:, None, None] * directions, centres) >= targets

    high = torch.full_like(targets, 0.02)
    found = reaches(high)
    while not bool(found.all()):
        high = torch.where(found, high, high * 1.03)
        found = found | reaches(high)
    low = high / 1.03
    for _ in range(25):
        middle = (low + high) / 2
        above = reaches(middle)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices of 32 x 64: a second thread makes none of them faster, and several times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
@_one_thread()
def clustered(
    low: float, high: float, noise: float = NEAR, seed: int = 0, queries: int = QUERIES
) -> tuple[Tensor, Tensor]:
    """32 clusters of 32 patterns whose fixed points contract by `low` to `high`; queries at centres + noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centres = torch.nn.functional.normalize(normal(CLUSTERS, WIDTH), dim=-1) * CENTRE
    targets = torch.linspace(low, high, CLUSTERS, dtype=torch.float64)
    patterns = torch.empty(CLUSTERS, MEMBERS, WIDTH, dtype=torch.float64)
    todo = torch.arange(CLUSTERS)
    while len(todo):
        directions = normal(len(todo), MEMBERS, WIDTH)
        directions -= directions.mean(1, keepdim=True)
        spread = _calibrate(directions, centres[todo], targets[todo])
        patterns[todo] = centres[todo, None] + spread[:, None, None] * directions
        # Some draws dissolve into single patterns before they contract as slowly as asked: draw those again.
        missed = (_contraction(patterns[todo], centres[todo]) - targets[todo]).abs() > 1e-3
        todo = todo[missed]
    which = torch.randint(0, CLUSTERS, (queries,), generator=generator)
    return patterns.reshape(-1, WIDTH), centres[which] + noise * normal(queries, WIDTH)


def rotated(copies: int, queries: int = QUERIES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Copies of `clustered(.9, .995)`, each rotated at random, in random order; queries near their centres.

    (1,024 copies, 64), (queries, 64): 98 copies are 100,352 patterns whose fixed points contract as slowly as those of
    1,024.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first = clustered(0.9, 0.995)[0]
    turns = (torch.linalg.qr(normal(WIDTH, WIDTH))[0] for _ in range(copies))
    patterns = torch.cat([first @ turn for turn in turns])
    centres = patterns.reshape(-1, MEMBERS, WIDTH).mean(1)
    which = torch.randint(0, len(centres), (queries,), generator=generator)
    order = torch.randperm(len(patterns), generator=generator)
    return patterns[order], centres[which] + NEAR * normal(queries, WIDTH)


@dataclass(frozen=True)
class Stretched:
    """Any number of patterns in clusters, made block by block: float32, pattern i in cluster i modulo `clusters`.

    A cluster is stretched along one direction across its centre, of norm 1.5, so that plain iteration contracts there
    by .5 in the first cluster to .9 in the last: some dozens of steps from a query near the centre.
    """

    count: int
    width: int
    clusters: int
    seed: int = 0

    def centres(self) -> tuple[Tensor, Tensor]:
        """Centres and stretches, (clusters, width) each."""
        generator = torch.Generator().manual_seed(self.seed)
        unit = torch.nn.functional.normalize
        centres = unit(torch.randn(self.clusters, self.width, generator=generator), dim=-1)
        way = torch.randn(self.clusters, self.width, generator=generator)
        way = unit(way - (way * centres).sum(-1, keepdim=True) * centres, dim=-1)
        # The contraction is beta times the variance along the stretch, of a uniform distribution.
        half = (3 * torch.linspace(0.5, 0.9, self.clusters) / BETA).sqrt()
        return CENTRE * centres, half[:, None] * way

    def blocks(self) -> Iterator[Tensor]:
        """The patterns in order, (n, width) each, n at most 65,536."""
        size = 2**16
        centres, stretch = self.centres()
        for start in range(0, self.count, size):
            generator = torch.Generator().manual_seed(self.seed + 1 + start)
            cluster = torch.arange(start, min(start + size, self.count)) % self.clusters
            along = 2 * torch.rand(len(cluster), 1, generator=generator) - 1
            noise = torch.randn(len(cluster), self.width, generator=generator)
            yield centres[cluster].addcmul_(along, stretch[cluster]).add_(noise, alpha=0.02)

    def queries(self, count: int = QUERIES) -> tuple[Tensor, Tensor]:
        """Queries near centres, (count, width), and the cluster of each."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        which = torch.randint(0, self.clusters, (count,), generator=generator)
        noise = torch.randn(count, self.width, generator=generator)
        return self.centres()[0][which] + NEAR * noise, which


def random_unit(count: int = 512, seed: int = 0, queries: int = QUERIES) -> tuple[Tensor, Tensor]:
    """Random unit patterns and starts of .125 per coordinate: many attractors and saddles in reach."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    starts = torch.randn(queries, WIDTH, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(patterns, dim=-1), 0.125 * starts


def separated(seed: int = 0, queries: int = QUERIES) -> tuple[Tensor, Tensor]:
    """1,024 well separated patterns of norm 1.5 and queries near them: two or three steps."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(1024, WIDTH, generator=generator, dtype=torch.float64)
    patterns = torch.nn.functional.normalize(patterns, dim=-1) * CENTRE
    which = torch.randint(0, 1024, (queries,), generator=generator)
    noise = torch.randn(queries, WIDTH, generator=generator, dtype=torch.float64)
    return patterns, patterns[which] + NEAR * noise


def _make(name: str, data: Callable[[], tuple[Tensor, Tensor]], beta: float, unit: None | str | Forgetting = None,
          ) -> Callable[[], RetrievalProblem]:  # fmt: skip
    return lambda: RetrievalProblem(name, *data(), beta, unit)


# PFU's constant threshold lies near the scores of a query's own cluster (beta |c|^2 = 18): the mask flips
# early, and what it leaves contracts slowly.
THRESHOLD = 12.0
PROBLEMS: dict[str, Callable[[], RetrievalProblem]] = {
    "easy": _make("easy", separated, BETA),
    "het": _make("het", lambda: clustered(0.3, 0.99), BETA),
    "r97": _make("r97", lambda: clustered(0.97, 0.97), BETA),
    "span": _make("span", lambda: clustered(0.9, 0.995), BETA),
    "pfu": _make("pfu", lambda: clustered(0.9, 0.995), BETA, PFU(THRESHOLD)),
    "random": _make("random", random_unit, 20.0),
}


def regimes(queries: int = QUERIES, seed: int = 1) -> dict[str, RetrievalProblem]:
    """Near, far and random starts, each without forgetting, with ReLU and with PFU."""
    near = clustered(0.9, 0.995, NEAR, seed, queries)
    far = clustered(0.9, 0.995, FAR, seed, queries)
    loose = random_unit(512, seed, queries)
    made = {}
    for name, data, beta, threshold in (("near", near, BETA, THRESHOLD), ("far", far, BETA, THRESHOLD),
                                        ("random", loose, 12.0, 2.0)):  # fmt: skip
        for unit_name, unit in (("softmax", None), ("ReLU", "relu"), ("PFU", PFU(threshold))):
            key = f"{name}, {unit_name}"
            made[key] = RetrievalProblem(key, *data, beta, unit)
    return made
