"""Slow twins of diffusion retrieval: dense matrices, one sample at a time, written from the definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from hopdeq_lwpf.forgetting import Forgetting, Keep

F64 = torch.float64


def knn_weights(features: Tensor, neighbors: int, ignored: list[bool] | None = None) -> Tensor:
    """Cosine neighbours of one sample (N, d), symmetrised by the maximum, ties all kept; plain loops."""
    count = len(features)
    alive = [i for i in range(count) if not (ignored and ignored[i])]
    weight = torch.zeros(count, count, dtype=F64)
    for i in alive:
        found = {}
        for j in alive:
            if i != j:
                product = float(features[i].double() @ features[j].double())
                length = float(features[i].double().norm() * features[j].double().norm())
                found[j] = max(product / length if length else 0.0, 0.0)
        if not found:
            continue
        least = sorted(found.values(), reverse=True)[min(neighbors, len(found)) - 1]
        for j, value in found.items():
            if value > 0 and value >= least - 1e-9:
                weight[i, j] = weight[j, i] = value
    return weight


def laplacian(weight: Tensor, kind: str = "normalized") -> Tensor:
    """Of one graph (N, N); a node without edges has a row of zeros."""
    degree = weight.sum(1)
    plain = torch.diag(degree) - weight
    if kind == "combinatorial":
        return plain
    scale = torch.where(degree > 0, degree, torch.ones_like(degree)).rsqrt()
    return scale[:, None] * plain * scale


def function_of(matrix: Tensor, function) -> Tensor:
    """g(L) by eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(function(values)) @ vectors.T


def heat(matrix: Tensor, eta: float) -> Tensor:
    return function_of(matrix, lambda v: torch.exp(-eta * v))


def resolvent(matrix: Tensor, lam: float) -> Tensor:
    return torch.linalg.inv(torch.eye(len(matrix), dtype=matrix.dtype) + lam * matrix)


def association(
    states: Tensor,
    patterns: Tensor,
    beta: float,
    unit: Forgetting | None = None,
    ignored: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """D' * softmax(D(s)) and logsumexp(D(s)) of states (L, d) among patterns (S, d), row by row."""
    unit = Keep() if unit is None else unit
    scores = beta * states @ patterns.T
    if ignored is None:
        ignored = torch.zeros(scores.shape, dtype=torch.bool)
    value, kept = unit.project(scores, threshold, ignored)
    value = value.masked_fill(ignored, -torch.inf)
    weights = torch.softmax(value, -1)
    kept = torch.ones_like(weights) if kept is None else kept
    return (weights * kept).masked_fill(ignored, 0.0), torch.logsumexp(value, -1)


def step(  # noqa: PLR0913 (the twin takes what the function takes)
    states: Tensor,
    patterns: Tensor,
    matrix: Tensor,
    *,
    beta: float,
    lam: float,
    logit_eta: float = 0.0,
    unit: Forgetting | None = None,
    threshold: Tensor | None = None,
    injected: Tensor | None = None,
) -> Tensor:
    """f(Q) of one sample."""
    spread = heat(matrix, logit_eta)
    weights, _ = association(spread @ states, patterns, beta, unit, threshold=threshold)
    image = spread @ (weights @ patterns)
    return resolvent(matrix, lam) @ (image if injected is None else image + injected)


def energy(  # noqa: PLR0913 (likewise)
    states: Tensor,
    patterns: Tensor,
    matrix: Tensor,
    *,
    beta: float,
    lam: float,
    logit_eta: float = 0.0,
    unit: Forgetting | None = None,
    threshold: Tensor | None = None,
    injected: Tensor | None = None,
) -> Tensor:
    """E(Q) of one sample."""
    _, lagrangian = association(heat(matrix, logit_eta) @ states, patterns, beta, unit, threshold=threshold)
    metric = torch.eye(len(matrix), dtype=matrix.dtype) + lam * matrix
    found = torch.trace(states.T @ metric @ states) / 2 - lagrangian.sum() / beta
    return found if injected is None else found - (injected * states).sum()
