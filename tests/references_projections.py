"""Slow twin of a read with projected keys, in plain Python, and what its tests share."""

import math

import torch

from hopdeq_lwpf.models.sdm import ProjectedMemory

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def make(weights, width=6, keys=4, **options):
    generator = torch.Generator().manual_seed(5)
    return ProjectedMemory(width, keys, weights, generator=generator, **options).double()


def read(projection, patterns, z, weigh):
    """One read in plain Python; weigh: cosine -> weight up to a factor."""

    def key(picture):
        short = [sum(w * p for w, p in zip(row, picture, strict=True)) for row in projection]
        length = math.hypot(*short)
        return [s / length for s in short]

    asked = key(z)
    weights = [weigh(sum(a * b for a, b in zip(asked, key(p), strict=True))) for p in patterns]
    total = sum(weights)
    return [sum(w * p[i] for w, p in zip(weights, patterns, strict=True)) / total for i in range(len(z))]
