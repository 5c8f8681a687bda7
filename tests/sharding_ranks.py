"""What each process of the tests of sharded patterns does; the same code alone is what it is held against."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from problems import F64, normal
from streamed import MAKE, TIGHT, B, D, N, masks, one_mask

from hopdeq_lwpf import Termination, open_patterns, retrieve
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.solvers import Implicit
from hopdeq_lwpf.streaming import (
    BlockPatterns,
    PatternSource,
    ShardedPatterns,
    ShardError,
    TensorPatterns,
    split_patterns,
)

# How the patterns are spread: shares of unequal length.
SHARES = {1: [N], 2: [29, 68], 4: [1, 40, 17, 39]}
LOST = "another rank was lost or did not answer in time"


class Seat:
    """The place of a process: its share of what belongs to the patterns."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        before = sum(SHARES[size][:rank])
        self.part = slice(before, before + SHARES[size][rank])

    def spread(self, local: torch.Tensor | PatternSource, timeout: float = 60.0) -> PatternSource:
        """Patterns of which this process holds `local`."""
        if self.size == 1:
            return TensorPatterns(local, 13) if isinstance(local, torch.Tensor) else local
        local = TensorPatterns(local, 13) if isinstance(local, torch.Tensor) else local
        return ShardedPatterns(local, timeout=timeout)


def fields(recall) -> dict[str, torch.Tensor]:
    names = ("value", "state", "residual", "steps", "result", "index", "weight", "support", "energy")
    found = {name: getattr(recall, name) for name in names}
    return {name: part.detach() for name, part in found.items() if part is not None}


def solve(seat: Seat, unit, dtype=F64, with_mask=None, **options) -> dict[str, torch.Tensor]:
    """A recall with gradients to queries, beta, and this process's patterns and values."""
    query = normal(B, D, seed=2).to(dtype).requires_grad_()
    beta = torch.tensor(1.7, dtype=dtype, requires_grad=True)
    patterns = normal(N, D)[seat.part].to(dtype).requires_grad_()
    values = normal(N, 3, seed=3)[seat.part].to(dtype).requires_grad_()
    mask = None if with_mask is None else with_mask()[..., seat.part]
    settings = {
        "inject": "input",
        "solver": "picard",
        "stop": TIGHT,
        "adjoint": Implicit(rtol=1e-12),
    } | options
    recall = retrieve(
        query, seat.spread(patterns), beta=beta, values=values, forgetting=unit, mask=mask, **settings
    )
    loss = (recall.value * normal(B, 3, seed=4).to(dtype)).sum() + recall.state.square().sum()
    slopes = torch.autograd.grad(loss, (query, beta, patterns, values))
    return fields(recall) | dict(
        zip(("to query", "to beta", "to patterns", "to values"), slopes, strict=True)
    )


def noise(seat: Seat) -> dict[str, torch.Tensor]:
    """Each process would draw another noise."""
    return solve(seat, PFU(noise=0.5, generator=torch.Generator().manual_seed(3 + seat.rank)), steps=2)


def noise_at_a_number(seat: Seat) -> dict[str, torch.Tensor]:
    unit = PFU(0.1, noise=0.5, generator=torch.Generator().manual_seed(3 + seat.rank))
    return solve(seat, unit, steps=2)


def per_query(seat: Seat) -> dict[str, torch.Tensor]:
    """Masks and betas of each query, euclidean scores, no gradients."""
    mask = masks()[:, seat.part]
    patterns = seat.spread(normal(N, D)[seat.part])
    beta = torch.linspace(0.5, 2.0, B, dtype=F64)
    return fields(
        retrieve(
            normal(B, D, seed=2), patterns, beta=beta, mask=mask, similarity="euclidean", forgetting="pfu",
            separation="softmax1", steps=3,
        )
    )  # fmt: skip


def whole_file(seat: Seat) -> dict[str, torch.Tensor]:
    """A file that all processes map; each takes its equal share."""
    patterns = open_patterns(seat.folder / "whole.npy", block=13)
    patterns = patterns if seat.size == 1 else split_patterns(patterns)
    assert len(patterns) == N
    return fields(retrieve(normal(B, D, seed=2), patterns, beta=2.0, forgetting="topk", stop=TIGHT))


def default_solver(seat: Seat) -> dict[str, torch.Tensor]:
    return fields(retrieve(normal(B, D, seed=2), seat.spread(normal(N, D)[seat.part]), beta=3.0))


def blocks(seat: Seat) -> dict[str, torch.Tensor]:
    """This process's patterns come in blocks, and a tracked median asks for rows of them."""
    local = BlockPatterns(list(normal(N, D)[seat.part].split(7)))
    query = normal(B, D, seed=2).requires_grad_()
    recall = retrieve(query, seat.spread(local), forgetting=PFU(tracked=True), steps=3)
    (slope,) = torch.autograd.grad(recall.value.square().sum(), query)
    return fields(recall) | {"to query": slope}


def half(seat: Seat) -> dict[str, torch.Tensor]:
    """Patterns in bfloat16, queries in float32."""
    query = normal(B, D, seed=2).float().requires_grad_()
    recall = retrieve(
        query, seat.spread(normal(N, D)[seat.part].bfloat16()), forgetting=MAKE["topk threshold"](), steps=2
    )
    (slope,) = torch.autograd.grad(recall.value.square().sum(), query)
    return fields(recall) | {"to query": slope}


def empty_batch(seat: Seat) -> dict[str, torch.Tensor]:
    patterns = seat.spread(normal(N, D)[seat.part])
    return fields(retrieve(normal(0, D), patterns, forgetting=PFU(scope="tensor")))


def bad_query(seat: Seat) -> dict[str, torch.Tensor]:
    """A query that is no number and one that has no end."""
    query = normal(B, D, seed=2)
    query[2, 1], query[4, 0] = torch.nan, torch.inf
    found = retrieve(query, seat.spread(normal(N, D)[seat.part]), forgetting="pfu", steps=2)
    return {name: torch.nan_to_num(part.double(), 7.0) for name, part in fields(found).items()}


def bad_pattern(seat: Seat) -> dict[str, torch.Tensor]:
    """One pattern, on the last process, is no number."""
    patterns = normal(N, D)
    patterns[-1, 0] = torch.nan
    codes = []
    for unit in ("none", "relu", "pfu", "topk", "min_keep", "tracked"):
        codes.append(retrieve(normal(B, D), seat.spread(patterns[seat.part]), forgetting=MAKE[unit]()).result)
    return {"codes": torch.stack(codes)}


CASES: dict[str, Callable[[Seat], dict[str, torch.Tensor]]] = {
    "none": lambda seat: solve(seat, None),
    "relu": lambda seat: solve(seat, "relu", steps=3, with_mask=one_mask),
    "pfu": lambda seat: solve(seat, "pfu", with_mask=one_mask),
    "topk": lambda seat: solve(seat, MAKE["topk"](), steps=1, separation="softmax1"),
    "topk threshold": lambda seat: solve(seat, MAKE["topk threshold"](), steps=3),
    "min_keep": lambda seat: solve(seat, MAKE["relu min_keep"](), steps=2),
    "tracked": lambda seat: solve(seat, MAKE["tracked"]()),
    "tensor": lambda seat: solve(seat, MAKE["tensor"](), steps=2),
    "float32": lambda seat: solve(seat, "pfu", torch.float32, steps=2),
    "unrolled": lambda seat: solve(seat, None, adjoint="unrolled"),
    "noise": noise,
    "noise at a number": noise_at_a_number,
    "per query": per_query,
    "whole file": whole_file,
    "default solver": default_solver,
    "blocks": blocks,
    "half": half,
    "empty batch": empty_batch,
    "bad query": bad_query,
    "bad pattern": bad_pattern,
}


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except ShardError as error:
        return str(error)
    return "nothing was raised"


def disagreements(seat: Seat) -> dict[str, str]:
    """What the processes are told where they do not fit together; all of them, and none waits for ever."""
    first = seat.rank == 0
    query, patterns = normal(B, D), normal(9, D).requires_grad_()
    shards = ShardedPatterns(patterns.detach(), timeout=20)

    def recall(given=shards, q=query, steps=1, **options):
        retrieve(q, given, steps=steps, **options)

    def by_grad():
        recall(ShardedPatterns(patterns if first else patterns.detach(), timeout=20))

    f = Retrieval(forgetting=PFU(noise=0.1)).train(first)
    width = 2 if first else 3
    return {
        "widths": _message(lambda: ShardedPatterns(normal(9, D if first else D + 1), timeout=20)),
        "dtypes": _message(
            lambda: ShardedPatterns(normal(9, D).to(torch.half if first else torch.bfloat16), timeout=20)
        ),
        "queries": _message(lambda: recall(q=query + 1e-12 * first)),
        "queries' dtype": _message(lambda: recall(q=query.float() if first else query.float().double())),
        "beta": _message(lambda: recall(beta=1.0 + first)),
        "unit": _message(lambda: recall(forgetting="pfu" if first else "relu")),
        "k": _message(lambda: recall(forgetting=MAKE["topk" if first else "topk threshold"]())),
        "steps": _message(lambda: recall(steps=2 if first else 3)),
        "solver": _message(lambda: recall(solver="picard" if first else "lbfgs")),
        "stop": _message(lambda: recall(stop=Termination(rtol=1e-3 if first else 1e-4))),
        "training": _message(lambda: f.prepare(query, shards)),
        "gradients": _message(by_grad),
        "values": _message(lambda: recall(values=normal(9, width))),
        "after all": _message(recall),
    }


def sleeper(seat: Seat) -> dict[str, object]:
    """What the others are told of a process that sleeps longer than they may wait."""
    dist.barrier()
    shards = ShardedPatterns(normal(9, D), timeout=3)
    start = time.monotonic()
    if seat.rank == seat.size - 1:
        time.sleep(6)
    told = _message(lambda: retrieve(normal(B, D), shards))
    return {"told": told, "took": time.monotonic() - start}


def ender(seat: Seat) -> dict[str, object]:
    """What the others are told of a process that ends in the middle of a solve."""
    last, passes = seat.rank == seat.size - 1, 0

    def given():
        nonlocal passes
        passes += 1
        if passes == 6:  # the first one counts the patterns
            os._exit(0)
        return [normal(9, D)]

    local = BlockPatterns(given) if last else TensorPatterns(normal(9, D))
    shards = ShardedPatterns(local, timeout=20)
    start = time.monotonic()
    told = _message(lambda: retrieve(normal(B, D), shards, solver="picard", stop=TIGHT))
    return {"told": told, "took": time.monotonic() - start}


def absent(seat: Seat) -> dict[str, object]:
    """What the others are told of a process that has gone before there are patterns."""
    start = time.monotonic()
    told = _message(lambda: ShardedPatterns(normal(9, D), timeout=3))
    return {"told": told, "took": time.monotonic() - start}


def work(rank: int, size: int, folder: str) -> None:
    """One process: every case, then the disagreements, then the losses."""
    torch.set_num_threads(1)
    place = Path(folder)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", f"file://{place / 'meeting'}-{size}", timeout=wait, rank=rank, world_size=size
    )
    seat = Seat(rank, size, place)
    found = {name: case(seat) for name, case in CASES.items()}
    torch.save({"cases": found, "disagreements": disagreements(seat)}, place / f"{size}-{rank}.pt")
    losses = {"ended": ender} if size > 2 else {"asleep": sleeper, "ended": ender, "absent": absent}
    torch.save({name: case(seat) for name, case in losses.items()}, place / f"{size}-{rank}-losses.pt")
    # Without a farewell, which would wait for the process that is gone.
    os._exit(0)
