"""A published table, run again: how many digits of MNIST a query ends up among (Santos et al. 2024).

Stored are the training images of MNIST, pixels in [-1, 1], each followed by its label one-hot; 128 updates; then
the share of queries whose last weights have k entries above 0 (above .01 for softmax). What the queries are and
how many patterns are stored is not said where the table stands, so several readings are run. Test images with
all 60,000 stored reproduce it: no share of 300 queries is more than 1.4 points off. Labels change nothing that
shows; stored images as queries or fewer patterns do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from hopdeq_lwpf.data import read_idx
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.solvers import Termination, fixed_point

UPDATES = 128
SETTLED = 1e-6  # relative change of a state from which on it is not updated any more
ABOVE = {"softmax": 1e-2}  # what counts as a weight; the others are exactly 0 outside of their support
SEPARATIONS = ("softmax", "entmax15", "sparsemax")
SIZES = range(4)
BLOCK = 100  # queries at a time: their weights on 60,000 patterns are 24 MB
# % of queries with k = 0, 1, 2, 3; above beta .1 the table of which we know gives k = 1 only.
PUBLISHED: dict[tuple[str, float], tuple[float, ...]] = {
    ("softmax", 0.1): (88.8, 1.3, 0.4, 0.1),
    ("entmax15", 0.1): (0.0, 78.9, 5.5, 2.1),
    ("sparsemax", 0.1): (0.0, 92.6, 4.4, 1.6),
    ("softmax", 1.0): (math.nan, 98.6),
    ("entmax15", 1.0): (math.nan, 100.0),
    ("sparsemax", 1.0): (math.nan, 100.0),
    ("softmax", 10.0): (math.nan, 100.0),
    ("entmax15", 10.0): (math.nan, 100.0),
    ("sparsemax", 10.0): (math.nan, 100.0),
}


@dataclass(frozen=True)
class Reading:
    """What the table may mean: stored patterns and queries, (N, d) and (B, d), at these beta."""

    name: str
    patterns: Tensor
    queries: Tensor
    betas: tuple[float, ...]
    solved: bool = False  # to equilibrium by the default solver, instead of 128 updates


@dataclass(frozen=True)
class Digits:
    """Images (N, 784) in [-1, 1] and labels (N, 10) one-hot."""

    images: Tensor
    labels: Tensor

    @classmethod
    def load(cls, folder: Path, part: str) -> Digits:
        """`part`: "train" or "t10k", as the four files of MNIST begin, packed or not."""
        images, labels = (
            read_idx(_file(folder, f"{part}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1")
        )
        return cls(images.flatten(1).float() / 127.5 - 1, functional.one_hot(labels.long(), 10).float())

    def both(self) -> Tensor:
        """(N, 794)."""
        return torch.cat([self.images, self.labels], 1)

    def pick(self, rows: Tensor) -> Digits:
        """Some of them."""
        return Digits(self.images[rows], self.labels[rows])


def _file(folder: Path, name: str) -> Path:
    packed = folder / f"{name}.gz"
    return packed if packed.exists() else folder / name


def readings(folder: Path, many: int, few: int) -> Iterator[Reading]:
    """The reading that holds, with `many` queries at every beta, then others with `few` at the beta that tells."""
    train, test = Digits.load(folder, "train"), Digits.load(folder, "t10k")
    order = torch.randperm(len(test.images), generator=torch.Generator().manual_seed(0))
    asked, some = test.pick(order[:many]), test.pick(order[:few])
    yield Reading("test images with labels", train.both(), asked.both(), (0.1, 1.0, 10.0))
    yield Reading("test images with labels, solved", train.both(), some.both(), (0.1,), solved=True)
    yield Reading("test images without labels", train.images, some.images, (0.1,))
    grey = some.images.clone()
    grey[:, 392:] = 0.0
    yield Reading(
        "test images, lower half grey, no label", train.both(), functional.pad(grey, (0, 10)), (0.1,)
    )
    own = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(0))[:few]
    yield Reading("stored images with labels", train.both(), train.pick(own).both(), (0.1,))
    for count in (1_000, 10_000):
        yield Reading(f"test images, first {count:,} stored", train.both()[:count], some.both(), (0.1,))


@torch.no_grad()
def last_weights(
    f: Retrieval, patterns: Tensor, queries: Tensor, updates: int = UPDATES
) -> tuple[Tensor, Tensor]:
    """The weights (B, N) of the last of so many updates by plain iteration, and after how many each settled (B,).

    A query that has settled is not updated any more: its weights stay what they are.
    """
    x = f.prepare(queries, patterns)
    z, live = f.init(x).clone(), torch.arange(len(queries))
    count = torch.zeros(len(queries), dtype=torch.int64)
    for _ in range(updates - 1):
        now = z[live]
        new = f(now, x)  # shared patterns, one beta, nothing drawn: x serves any number of rows
        z[live] = new
        count[live] += 1
        live = live[(new - now).norm(dim=-1) > SETTLED * new.norm(dim=-1)]
        if not len(live):
            break
    count[live] += 1
    return f.weights(z, x), count


@torch.no_grad()
def solved_weights(f: Retrieval, patterns: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """The weights at the equilibrium that the default solver finds, and its evaluations, as `last_weights`."""
    x = f.prepare(queries, patterns)
    solution = fixed_point(f, x, f.init(x), stop=Termination(rtol=SETTLED, max_steps=2000))
    solution.require()
    return f.weights(solution.state, x), solution.evaluations


def support_sizes(
    separation: str, beta: float, patterns: Tensor, queries: Tensor, *, solved: bool = False
) -> tuple[Tensor, Tensor]:
    """How many patterns have a weight at the end, and how many updates that took, (B,) each."""
    f = Retrieval(beta, separation=separation)
    sizes, counts = [], []
    for block in queries.split(BLOCK):
        weights, count = (solved_weights if solved else last_weights)(f, patterns, block)
        sizes.append((weights > ABOVE.get(separation, 0.0)).sum(-1))
        counts.append(count)
    return torch.cat(sizes), torch.cat(counts)


def _row(reading: Reading, separation: str, beta: float) -> dict[str, object]:
    sizes, counts = support_sizes(separation, beta, reading.patterns, reading.queries, solved=reading.solved)
    row: dict[str, object] = {
        "reading": reading.name,
        "separation": separation,
        "beta": beta,
        "stored": len(reading.patterns),
        "queries": len(sizes),
    }
    target = PUBLISHED[separation, beta]
    for size in SIZES:
        share = float((sizes == size).double().mean())
        row[f"k={size}"] = round(100 * share, 1)
        row[f"+-{size}"] = round(100 * math.sqrt(share * (1 - share) / len(sizes)), 1)
        known = size < len(target) and not math.isnan(target[size])
        row[f"published {size}"] = target[size] if known else "-"
    return {
        **row,
        "mean k": round(float(sizes.double().mean()), 1),
        "updates": round(float(counts.double().mean()), 1),
    }


def run(folder: Path | None, many: int = 300, few: int = 50) -> list[dict[str, object]]:
    """One row a reading, beta and separation; +- is one standard error of the share in %.

    folder: with the four IDX files of MNIST, packed or not; SystemExit without one. many, few: what two cores
    get through in ten minutes.
    """
    if folder is None:
        raise SystemExit("published needs --mnist FOLDER, with the four IDX files of MNIST")
    rows = []
    for reading in readings(folder, many, few):
        rows += [_row(reading, name, beta) for beta in reading.betas for name in SEPARATIONS]
    return rows
