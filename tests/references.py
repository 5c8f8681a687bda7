"""Shared by the tests: units, random scores, and slow twins.

A slow twin is the same maths in plain Python, one row and one number at a time, written from the definitions
and not from the package, so that the two can disagree.
"""

import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from hopdeq_lwpf.forgetting import PFU, Keep, ReLU, TopK

Row = list[float]
Flags = list[bool]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# One of each kind of unit.
UNITS = [
    Keep(),
    ReLU(),
    ReLU(min_keep=1),
    PFU(),
    PFU(bias=0.0),
    PFU(tracked=True),
    PFU(tracked=True, bias=0.0),
    PFU(tracked=True, bias=-1.0, min_keep=2),
    PFU(min_keep=2),
    PFU(scope="tensor"),
    PFU(scope="tensor", tracked=True, bias=0.0),
    PFU(0.2),
    PFU(0.2, 0.2),
    PFU(0.2, -1.0),
    TopK(2),
    TopK(2, "threshold"),
]


@st.composite
def scores_and_mask(draw, least=1, most=24):
    """(2, rows, N) of few distinct values, so that ties are common, exact in every dtype; a mask or None."""
    shape = (2, draw(st.integers(1, 3)), draw(st.integers(least, most)))
    count = shape[0] * shape[1] * shape[2]
    halves = draw(st.lists(st.integers(-6, 6), min_size=count, max_size=count))
    scores = torch.tensor(halves, dtype=draw(st.sampled_from(DTYPES))).reshape(shape) / 2
    if not draw(st.booleans()):
        return scores, None
    flags = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return scores, torch.tensor(flags).reshape(shape)


def exactly(actual: object, expected: object) -> None:
    """Equal, dtype and shape included."""
    assert_close(actual, expected, rtol=0, atol=0)


def lower_median(values: Row) -> float:
    """The middle of the sorted values, the lower one of two."""
    return sorted(values)[(len(values) - 1) // 2]


def best(row: Row, ignored: Flags, k: int) -> set[int]:
    """Places of the k largest entries that count, ties by lowest place."""
    places = [i for i in range(len(row)) if not ignored[i]]
    return set(sorted(places, key=lambda i: (-row[i], i))[:k])


def forget_row(
    row: Row,
    ignored: Flags,
    *,
    threshold: str | float | None = None,
    k: int | None = None,
    bias: str | float = 0.0,
    min_keep: int = 0,
) -> tuple[Row, Row]:
    """D and D' of one row, by threshold ("median" or a number) or by count k; ignored entries -inf and 0."""
    visible = [s for s, out in zip(row, ignored, strict=True) if not out]
    if not visible:
        return [0.0] * len(row), [0.0] * len(row)
    if k is not None:
        keep = best(row, ignored, k)
        forgotten = [s for i, s in enumerate(row) if i not in keep and not ignored[i]]
        fill = max(forgotten, default=0.0) if bias == "threshold" else float(bias)
    else:
        limit = lower_median(visible) if threshold == "median" else float(threshold)
        keep = {i for i, s in enumerate(row) if s > limit and not ignored[i]}
        fill = limit if bias == "threshold" else float(bias)
    keep |= best(row, ignored, min_keep)
    value = [-math.inf if out else row[i] if i in keep else fill for i, out in enumerate(ignored)]
    return value, [float(i in keep) for i in range(len(row))]


def rowwise(function: Callable[[Row, Flags], object], scores: Tensor, mask: Tensor | None) -> list[object]:
    """function(row, ignored) of every row of (*batch, N), in order."""
    width = scores.shape[-1]
    mask = torch.zeros_like(scores, dtype=torch.bool) if mask is None else mask.expand(scores.shape)
    rows = zip(scores.detach().reshape(-1, width).tolist(), mask.reshape(-1, width).tolist(), strict=True)
    return [function(row, ignored) for row, ignored in rows]


def forget(scores: Tensor, mask: Tensor | None, **rule: object) -> tuple[Tensor, Tensor]:
    """`forget_row` for (*batch, N)."""
    pairs = rowwise(lambda row, ignored: forget_row(row, ignored, **rule), scores, mask)
    value = torch.tensor([pair[0] for pair in pairs], dtype=scores.dtype).reshape(scores.shape)
    return value, torch.tensor([pair[1] for pair in pairs], dtype=scores.dtype).reshape(scores.shape)


def softmax_row(row: Row) -> tuple[Row, float]:
    """exp(s) / sum exp(s), log sum exp(s)."""
    top = max(row)
    total = math.fsum(math.exp(s - top) for s in row)
    return [math.exp(s - top) / total for s in row], top + math.log(total)


def softmax1_row(row: Row) -> tuple[Row, float]:
    """exp(s) / (1 + sum exp(s)), log(1 + sum exp(s)); for scores that exp() can take."""
    total = 1.0 + math.fsum(math.exp(s) for s in row)
    return [math.exp(s) / total for s in row], math.log(total)


def sparsemax_row(row: Row) -> tuple[Row, float]:
    """The point of the simplex nearest to s, its threshold found by bisection; p.s - |p|^2/2 + 1/2."""
    low, high = max(row) - 1.0, max(row)
    for _ in range(200):
        middle = 0.5 * (low + high)
        if math.fsum(max(s - middle, 0.0) for s in row) > 1.0:
            low = middle
        else:
            high = middle
    p = [max(s - high, 0.0) for s in row]
    return p, math.fsum(a * s - 0.5 * a * a for a, s in zip(p, row, strict=True)) + 0.5


def hardmax_row(row: Row) -> tuple[Row, float]:
    """One at the first maximum, and the maximum."""
    first = row.index(max(row))
    return [float(i == first) for i in range(len(row))], row[first]


def entmax_row(row: Row, alpha: float = 1.5) -> tuple[Row, float]:
    """p = max((alpha - 1) s - tau, 0)^(1/(alpha - 1)), tau by bisection; p.s - (sum p^alpha - 1)/(alpha (alpha-1)).

    For alpha > 1 that is not near 1.
    """
    gamma, top = alpha - 1.0, max(row)

    def weights(tau: float) -> Row:
        return [max(gamma * (s - top) - tau, 0.0) ** (1.0 / gamma) for s in row]

    low, high = -1.0, 0.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if math.fsum(weights(middle)) > 1.0:
            low = middle
        else:
            high = middle
    p = weights(high)
    gain = math.fsum(a * s for a, s in zip(p, row, strict=True))
    return p, gain - (math.fsum(a**alpha for a in p) - 1.0) / (alpha * gamma)


def polynomial_row(row: Row, degree: float = 2) -> tuple[Row, float]:
    """max(s, 0)^(n-1), the sum of max(s, 0)^n / n."""
    p = [max(s, 0.0) ** (degree - 1) for s in row]
    return p, math.fsum(max(s, 0.0) ** degree for s in row) / degree


def lsr_row(row: Row, eps: float = 0.0) -> tuple[Row, float]:
    """Equal weights 1 / (eps + sum max(1 + s, 0)) for every s > -1; the logarithm of that sum."""
    total = eps + math.fsum(max(1.0 + s, 0.0) for s in row)
    return [1.0 / total if s > -1.0 else 0.0 for s in row], math.log(total) if total else -math.inf


SEPARATION_ROWS: dict[str, Callable[[Row], tuple[Row, float]]] = {
    "softmax": softmax_row,
    "softmax1": softmax1_row,
    "sparsemax": sparsemax_row,
    "entmax15": entmax_row,
    "entmax": entmax_row,
    "polynomial": polynomial_row,
    "lsr": lsr_row,
    "hardmax": hardmax_row,
}


def separate(name: str, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights (*batch, N), Lagrangian (*batch), in float64: ignored entries left out, then put back as 0."""

    def one(row: Row, ignored: Flags) -> tuple[Row, float]:
        visible = [s for s, out in zip(row, ignored, strict=True) if not out]
        if not visible:
            return [0.0] * len(row), 0.0
        weights, lagrangian = SEPARATION_ROWS[name](visible)
        left = iter(weights)
        return [0.0 if out else next(left) for out in ignored], lagrangian

    pairs = rowwise(one, scores, mask)
    weights = torch.tensor([pair[0] for pair in pairs], dtype=torch.float64).reshape(scores.shape)
    return weights, torch.tensor([pair[1] for pair in pairs], dtype=torch.float64).reshape(scores.shape[:-1])
