"""Every kind of model under DistributedDataParallel: two gloo processes give the gradients of one."""

import contextlib
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from hopdeq_lwpf import Termination, convert_attention, models
from hopdeq_lwpf.solvers import Implicit

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)

RANKS, SHARE = 2, 2  # processes, and samples of each
WAIT = 90  # seconds after which a run that hangs is ended
# Tighter than the 1e-6 asked of the gradients by far, since implicit ones are as exact as the two solves.
SOLVED = {
    "stop": Termination(rtol=1e-12, atol=1e-14, max_steps=2000),
    "adjoint": Implicit(rtol=1e-12, max_steps=500),
}


class Scored(nn.Module):
    """A model whose output is made a number a sample; `spare` is a parameter that no loss depends on."""

    def __init__(self, model: nn.Module, spare: bool) -> None:
        super().__init__()
        self.model = model
        if spare:
            self.spare = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return self.model(x).flatten(1).pow(2).sum(1)


class Bags(nn.Module):
    """A classifier of repertoires whose logits are of order one, with a dimension for `Scored` to sum."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"kernels": 4, "kernel_size": 3, "attention_width": 4, "attention_layers": 1}
        self.classifier = models.RepertoireClassifier(steps=None, **sizes, **SOLVED)
        nn.init.normal_(self.classifier.head.weight)

    def forward(self, codes):
        return self.classifier(codes).unsqueeze(1)


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def codes(*shape):
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(1))


SAMPLES = (2, RANKS * SHARE)  # batches, and samples of one
MODELS = {
    "hopfield, 1 step": (lambda: models.Hopfield(6, num_heads=2, steps=1), lambda: normal(*SAMPLES, 5, 6)),
    "hopfield, 3 steps": (
        lambda: models.Hopfield(6, num_heads=2, steps=3, forgetting="relu"),
        lambda: normal(*SAMPLES, 5, 6),
    ),
    "hopfield, equilibrium": (
        lambda: models.Hopfield(6, num_heads=2, steps=None, inject="input", **SOLVED),
        lambda: normal(*SAMPLES, 5, 6),
    ),
    "pooling": (
        lambda: models.HopfieldPooling(6, quantity=2, steps=None, **SOLVED),
        lambda: normal(*SAMPLES, 5, 6),
    ),
    "lookup": (
        lambda: models.HopfieldLayer(6, quantity=7, steps=None, inject="input", **SOLVED),
        lambda: normal(*SAMPLES, 5, 6),
    ),
    "ham": (lambda: models.HAM((5, 6, 4), **SOLVED), lambda: normal(*SAMPLES, 5)),
    "chn": (lambda: models.CHN((5, 6, 4, 3), even_odd=True, **SOLVED), lambda: normal(*SAMPLES, 5)),
    "converted": (lambda: convert_attention(encoder()), lambda: normal(*SAMPLES, 5, 8)),
    "converted, equilibrium": (
        lambda: convert_attention(encoder(), steps=None, inject="input", **SOLVED),
        lambda: normal(*SAMPLES, 5, 8),
    ),
    "repertoires": (Bags, lambda: codes(*SAMPLES, 6, 9)),
}
# How DDP is told about the graph, whether a parameter stays unused, and whether gradients accumulate.
WAYS = {
    "plain": ({}, False, False),
    "find unused": ({"find_unused_parameters": True}, True, False),
    "static graph": ({"static_graph": True}, False, False),
    "accumulation": ({}, False, True),
}


def made(name, spare):
    torch.manual_seed(0)
    return Scored(MODELS[name][0](), spare).double().train()


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def train(wrapped, batches, accumulate):
    """Backward of each batch; without accumulation only the gradients of the last stay."""
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        waits = accumulate and not last and isinstance(wrapped, DistributedDataParallel)
        with wrapped.no_sync() if waits else contextlib.nullcontext():
            wrapped(batch).mean().backward()
        if not accumulate and not last:
            wrapped.zero_grad()


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        timeout=datetime.timedelta(seconds=WAIT),
        rank=rank,
        world_size=RANKS,
    )
    try:
        for name in MODELS:
            for way, (options, spare, accumulate) in WAYS.items():
                wrapped = DistributedDataParallel(made(name, spare), **options)
                share = [batch[rank * SHARE : (rank + 1) * SHARE] for batch in MODELS[name][1]()]
                train(wrapped, share, accumulate)
                torch.save(gradients(wrapped.module), Path(folder) / f"{name}-{way}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where each process left its gradients; processes that hang are ended."""
    made_in = tmp_path_factory.mktemp("ranks")
    running = mp.spawn(work, (str(made_in),), nprocs=RANKS, join=False)
    until = time.monotonic() + WAIT
    try:
        while not running.join(max(until - time.monotonic(), 0.1)):
            assert time.monotonic() < until, f"two processes took more than {WAIT} s"
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()
    return made_in


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_have_the_gradients_of_one(folder, name, way):
    _, spare, accumulate = WAYS[way]
    single = made(name, spare)
    train(single, MODELS[name][1](), accumulate)
    expected = gradients(single)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for rank in range(RANKS):
        found = torch.load(folder / f"{name}-{way}-{rank}.pt", weights_only=True)
        unused = {key for key in found if key not in expected}
        assert unused <= {"spare"}
        assert all(not found[key].any() for key in unused)
        assert_close({key: found[key] for key in expected}, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_the_shares_differ_so_that_the_test_above_can_fail(name):
    found = []
    for rank in range(RANKS):
        module = made(name, False)
        train(module, [batch[rank * SHARE : (rank + 1) * SHARE] for batch in MODELS[name][1]()], False)
        found.append(gradients(module))
    with pytest.raises(AssertionError):
        assert_close(*found, rtol=1e-3, atol=1e-6)


# --- the command line


def command(out, *more):
    """`hopdeq-lwpf train` with two processes; Lightning starts the second with the same words."""
    words = [sys.executable, "-W", "error", "-m", "hopdeq_lwpf", "train", "bit_pattern", "--out", str(out)]
    words += ["--devices", "2", "--data.num_bags", "64", "--data.batch_size", "8", *more]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        try:
            shown, err = running.communicate(timeout=WAIT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, 9)
    assert running.returncode == 0, err[-3000:]
    return shown, err


def records(out):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "seconds")} for line in found]


def test_the_command_line_trains_with_two_processes(tmp_path):
    out = tmp_path / "out"
    shown, err = command(out, "--epochs", "2")
    assert shown.count("written:") == 1, "the second process speaks, too"
    assert err.count("epoch 2 of 2") == 1
    # 48 of the 64 bags are trained with: 3 steps of 8 for each process, not 6.
    assert [line["step"] for line in records(out)] == [3, 6]
    assert (out / "last.ckpt").exists()


@pytest.mark.long
def test_a_run_of_two_processes_goes_on_exactly(tmp_path):
    command(tmp_path / "whole", "--epochs", "3")
    command(tmp_path / "short", "--epochs", "2")
    command(tmp_path / "short", "--epochs", "3", "--resume", "true")
    whole = records(tmp_path / "whole")
    found = [line for line in records(tmp_path / "short") if "resumed_at" not in line]
    assert [line["step"] for line in whole] == [3, 6, 9]
    assert found == whole
