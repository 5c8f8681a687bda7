"""Losses by name, and how well predictions meet their targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.training.spec import LOSSES


def loss_of(name: str, output: Tensor, target: Tensor) -> Tensor:
    """The mean loss of a batch, a scalar.

    name: "cross_entropy", logits (B, C, ...) and classes (B, ...) from 0; "squared_error", half the squared distance of
    outputs (B, C) from the one-hot vectors of classes (B,), as Goemaere et al. 2024 train hierarchical memories;
    "binary", logits (B,) or (B, 1) and targets of 0 and 1; "mse", output and target of one shape.
    Raises ValueError for shapes that do not fit.
    """
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES)
    if name == "cross_entropy":
        if output.ndim < 2 or output.shape[:1] + output.shape[2:] != target.shape:
            raise ValueError(
                f"loss 'cross_entropy' needs logits (B, C, ...) and classes (B, ...), got {tuple(output.shape)} and "
                f"{tuple(target.shape)}; for one logit a sample take loss 'binary'"
            )
        return functional.cross_entropy(output, target.long())
    if name == "squared_error":
        if output.ndim != 2 or output.shape[:1] != target.shape:
            raise ValueError(
                f"loss 'squared_error' needs outputs (B, C) and classes (B,), got {tuple(output.shape)} and "
                f"{tuple(target.shape)}; for targets of the shape of the output take loss 'mse'"
            )
        classes = functional.one_hot(target.long(), output.shape[1])
        return (output - classes.to(output.dtype)).square().sum(1).mean() / 2
    if name == "binary":
        output = _column(output, target)
        return functional.binary_cross_entropy_with_logits(output, target.to(output.dtype))
    if output.shape != target.shape:
        raise ValueError(
            f"loss 'mse' needs output and target of one shape, got {tuple(output.shape)} and {tuple(target.shape)}"
        )
    return functional.mse_loss(output, target.to(output.dtype))


def _column(output: Tensor, target: Tensor) -> Tensor:
    """(B, 1) logits as (B,) where the targets are (B,)."""
    if output.ndim == target.ndim + 1 and output.shape[-1] == 1:
        output = output.squeeze(-1)
    if output.shape != target.shape:
        raise ValueError(
            f"loss 'binary' needs one logit a target, got {tuple(output.shape)} and {tuple(target.shape)}; for "
            "several classes take loss 'cross_entropy'"
        )
    return output


def hits(name: str, output: Tensor, target: Tensor) -> Tensor | None:
    """(B, ...) bool: which predictions are right; None where the loss has no classes. NaN is never right."""
    if name in ("cross_entropy", "squared_error"):
        return (output.argmax(1) == target) & ~output.isnan().any(1)
    if name == "binary":
        output = _column(output, target)
        return ((output > 0) == (target > 0.5)) & ~output.isnan()
    return None


def margins(name: str, output: Tensor, target: Tensor) -> Tensor | None:
    """(B,) evidence for class 1 against class 0, what the AUC ranks; None where there are not two classes."""
    if name == "binary":
        return _column(output, target)
    if name == "cross_entropy" and output.ndim == 2 and output.shape[1] == 2:
        return output[:, 1] - output[:, 0]
    return None


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs that the scores order rightly.

    scores: (B,); positive: (B,) bool. Ties count half (the Mann-Whitney statistic). NaN where one of the two
    classes is absent, or a score is NaN.
    """
    scores, positive = scores.double(), positive.bool()
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros or bool(scores.isnan().any()):
        return float("nan")
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1) / 2)[place]
    total = float(ranks[positive].sum())
    return (total - ones * (ones + 1) / 2) / (ones * zeros)


def gather(parts: list[Tensor]) -> Tensor:
    """All parts in one float64 vector on the CPU, from every process of a distributed run."""
    flat = [part.detach().reshape(-1).cpu().double() for part in parts]
    joined = torch.cat(flat) if flat else torch.empty(0, dtype=torch.float64)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return joined
    everywhere: list[Tensor] = [joined] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, joined)
    return torch.cat(everywhere)
