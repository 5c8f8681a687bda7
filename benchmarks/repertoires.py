"""Repertoires with an implanted motif (DeepRC's task, small): test AUC, time and what an update costs."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.timing import interleaved
from hopdeq_lwpf.data import RepertoireOptions, collate_repertoires, generate_repertoires
from hopdeq_lwpf.data.batches import EpochSampler
from hopdeq_lwpf.data.modules import FoldOptions
from hopdeq_lwpf.forgetting import PFU, Forgetting, ReLU
from hopdeq_lwpf.models import RepertoireClassifier
from hopdeq_lwpf.training.learner import rate_factor
from hopdeq_lwpf.training.scores import area_under_curve

# As models/train_repertoires.yaml.
RATE, BATCH, EPOCHS, CLIP, SEEDS, INITS = 3e-3, 4, 8, 1.0, (0, 1, 2), 200
UNITS: dict[str, Forgetting | None] = {
    "none": None, "pfu": PFU(), "relu": ReLU(), "relu, min_keep=1": ReLU(min_keep=1)
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training; the seed is that of sequences, folds, weights and order."""

    unit: str
    steps: int | None
    seed: int


RUNS = [Run(unit, steps, seed) for unit in UNITS for steps in (1, None) for seed in SEEDS]


def _batch(items: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    batch = collate_repertoires(items)
    return {name: batch[name] for name in ("data", "mask", "lengths")}, batch["target"]


@torch.no_grad()
def _auc(network: nn.Module, bags: list[dict[str, Tensor]]) -> float:
    network.eval()
    batches = [_batch(bags[start : start + 32]) for start in range(0, len(bags), 32)]
    scores = torch.cat([network(**inputs) for inputs, _ in batches])
    return area_under_curve(scores, torch.cat([target for _, target in batches]) > 0)


def update(network: nn.Module, optimizer: torch.optim.Optimizer, items: list[dict[str, Tensor]]) -> None:
    """One step of training."""
    inputs, target = _batch(items)
    loss = functional.binary_cross_entropy_with_logits(network(**inputs), target)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), CLIP)
    optimizer.step()


def train(run: Run) -> dict[str, object]:
    """AUC on validation and test set after the last epoch, and the seconds that the updates took."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # dead heads are counted below
    data = generate_repertoires(RepertoireOptions(seed=run.seed))
    bags = [data[row] for row in range(len(data))]
    train_rows, val_rows, test_rows = FoldOptions(seed=run.seed).split(data.labels)
    torch.manual_seed(run.seed)
    network = RepertoireClassifier(steps=run.steps, forgetting=UNITS[run.unit])
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    total = EPOCHS * math.ceil(len(train_rows) / BATCH)
    factor = partial(rate_factor, schedule="cosine", warmup=0, total=total)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    order = EpochSampler(train_rows, seed=run.seed)  # type: ignore[arg-type]
    start = time.perf_counter()
    for epoch in range(EPOCHS):
        order.set_epoch(epoch)
        rows = list(order)
        for first in range(0, len(rows), BATCH):
            update(network, optimizer, [bags[train_rows[row]] for row in rows[first : first + BATCH]])
            schedule.step()
    seconds = time.perf_counter() - start
    val, test = (_auc(network, [bags[row] for row in part]) for part in (val_rows, test_rows))
    return {
        "unit": run.unit, "steps": run.steps, "seed": run.seed, "validation AUC": round(val, 4),
        "test AUC": round(test, 4), "seconds": round(seconds, 1),
    }  # fmt: skip


def costs() -> list[dict[str, object]]:
    """Milliseconds of an update at the first weights, 4 repertoires of 100 sequences, one thread."""
    torch.set_num_threads(1)
    data = generate_repertoires(RepertoireOptions(num_repertoires=4, sequences_std=0.0))
    items = [data[row] for row in range(4)]
    calls = {}
    for steps in (1, 4, None):
        for unit in ("none", "pfu"):
            torch.manual_seed(0)
            network = RepertoireClassifier(steps=steps, forgetting=UNITS[unit])
            optimizer = torch.optim.Adam(network.parameters(), lr=0.0)
            calls[f"{unit} {steps}"] = lambda n=network, o=optimizer: update(n, o, items)
    return [
        {"unit": name.split()[0], "steps": name.split()[1], "ms an update": round(median, 2)}
        for name, median in interleaved(calls, rounds=41).items()
    ]


@torch.no_grad()
def dead() -> list[dict[str, object]]:
    """In how many of 200 first weights the ReLU unit forgets every sequence of a batch of 4 repertoires."""
    data = generate_repertoires(RepertoireOptions(num_repertoires=4))
    inputs, _ = _batch([data[row] for row in range(4)])
    rows: list[dict[str, object]] = []
    for unit in ("relu", "relu, min_keep=1"):
        count = 0
        for seed in range(INITS):
            torch.manual_seed(seed)
            network = RepertoireClassifier(forgetting=UNITS[unit]).eval()
            network(**inputs)
            count += int(not bool(network.association_matrix.any()))  # type: ignore[union-attr]
        rows.append({"unit": unit, "first weights": INITS, "dead": count})
    return rows


def run() -> list[dict[str, object]]:
    """Costs, dead heads, then all trainings, two at a time, one thread each; a line for each as it ends."""
    rows = [*costs(), *dead()]
    print(*rows, sep="\n", flush=True)  # noqa: T201 (minutes pass between two)
    with get_context("spawn").Pool(2) as pool:
        for row in pool.imap(train, RUNS):
            print(row, flush=True)  # noqa: T201
            rows.append(row)
    return rows
