"""Shared by the tests of streamed retrieval: sizes, units, masks, and how near two paths have to be."""

import torch

from hopdeq_lwpf import Termination
from hopdeq_lwpf.forgetting import PFU, Keep, ReLU, TopK

N, D, B = 97, 6, 7
TIGHT = Termination(rtol=1e-12, atol=1e-14, max_steps=3000)
# Both paths sum the same 97 terms of size 1 in another order: 1e-15 each; 1e-10 leaves room for 60 steps.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def noisy(**options):
    return PFU(noise=0.1, generator=torch.Generator().manual_seed(3), **options)


# A unit is made anew for each call, since one with a generator goes on from where it was.
MAKE = {
    "none": Keep,
    "relu": ReLU,
    "pfu": PFU,
    "topk": lambda: TopK(5),
    "topk threshold": lambda: TopK(5, "threshold"),
    "min_keep": lambda: PFU(0.3, min_keep=3),
    "bias": lambda: PFU(-3.0, bias=-2.0),
    "median min_keep": lambda: PFU(min_keep=3),
    "tracked": lambda: PFU(tracked=True),
    "tracked bias": lambda: PFU(tracked=True, bias=0.0),
    "relu min_keep": lambda: ReLU(min_keep=4),
    "tensor": lambda: PFU(scope="tensor"),
    "tensor tracked": lambda: PFU(scope="tensor", tracked=True, bias=-0.2),
    "noise": noisy,
    "noise tracked": lambda: noisy(tracked=True),
    "noise number": lambda: noisy(threshold=-3.0),
    "noise tensor": lambda: noisy(scope="tensor"),
}


def one_mask(n=N):
    return torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.3


def masks(n=N, rows=B):
    """One a query, that of query 3 hiding everything."""
    mask = torch.rand(rows, n, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[3] = True
    return mask
