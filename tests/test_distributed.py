"""Equilibria under DistributedDataParallel: two gloo processes give the gradient of one."""

import contextlib
import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from hopdeq_lwpf import Equilibrium, Termination
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.solvers import Implicit

RANKS = 2
TIGHT = Termination(rtol=1e-12, atol=1e-14, max_steps=500)
EXACT = Implicit(rtol=1e-12)


class Recalling(nn.Module):
    """Retrieval from learned patterns with a learned beta; the query is projected and enters every step."""

    state_ndim = 1
    inject = "input"

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(5, 4).double()
        self.patterns = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.f = Retrieval(nn.Parameter(torch.tensor(1.5, dtype=torch.float64)), inject="input")
        self.has_energy = self.f.has_energy

    def prepare(self, x):
        return self.f.prepare(self.project(x), self.patterns)

    def init(self, x):
        return self.f.init(x)

    def forward(self, z, x):
        return self.f(z, x)

    def energy(self, z, x):
        return self.f.energy(z, x)

    def metric(self, z, x):
        return self.f.metric(z, x)


def model(use_all: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = Equilibrium(Recalling(), stop=TIGHT, adjoint=EXACT)
    if use_all:
        del layer.f.unused
    return nn.Sequential(layer, nn.Linear(4, 2).double())


def data() -> torch.Tensor:
    return torch.randn(2, 2 * RANKS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss(module, x):
    return module(x).pow(2).mean()


# How DDP is told about the graph, whether a parameter stays unused, and whether gradients accumulate.
WAYS = {
    "plain": ({}, True, False),
    "static graph": ({"static_graph": True}, True, False),
    "find unused": ({"find_unused_parameters": True}, False, False),
    "accumulation": ({}, True, True),
    "bucket views": ({"gradient_as_bucket_view": True}, True, False),
}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=wait, rank=rank, world_size=RANKS)
    try:
        found = {}
        for way, (options, use_all, accumulate) in WAYS.items():
            wrapped = DistributedDataParallel(model(use_all), **options)
            for step, batch in enumerate(data()):
                share = batch[rank * 2 : rank * 2 + 2]
                last = step == 1
                with wrapped.no_sync() if accumulate and not last else contextlib.nullcontext():
                    loss(wrapped, share).backward()
                if not accumulate and not last:
                    wrapped.zero_grad()
            found[way] = {n: p.grad for n, p in wrapped.module.named_parameters() if p.grad is not None}
        torch.save(found, f"{folder}/{rank}.pt")
        dist.barrier()  # nobody leaves while another still talks
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found, one dict of gradients a way."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_one_process(found, way):
    _, use_all, accumulate = WAYS[way]
    single = model(use_all)
    batches = data() if accumulate else data()[1:]
    for batch in batches:
        loss(single, batch).backward()
    expected = {n: p.grad for n, p in single.named_parameters() if p.grad is not None}
    for rank in range(RANKS):
        assert found[rank][way].keys() == expected.keys()
        assert_close(found[rank][way], expected, rtol=1e-9, atol=1e-12)
    assert max(g.abs().max() for g in expected.values()) > 1e-3
