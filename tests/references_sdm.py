"""Slow twins of the analysis of Sparse Distributed Memory: plain Python, whole numbers, one point at a time.

Written from the definitions: points are counted or summed as integers, spheres are integrated slice by slice.
"""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import torch
from hypothesis import strategies as st

RECORD = json.loads((Path(__file__).parent / "data" / "sdm_reference.json").read_text())["values"]

# ln of a share is a difference of factorials' logarithms: their size times the rounding of float64.
ROUNDING = 1e-11


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def bits_and_radius(draw, most=200):
    n = draw(st.integers(1, most))
    return n, draw(st.integers(0, n))


def recorded(*starts: str) -> list[dict]:
    """The recorded values whose function or id starts so."""
    return [case for case in RECORD if case["function"].startswith(starts) or case["id"].startswith(starts)]


def number(value: object) -> float:
    """'2**64' and '-inf' as they are written in the record."""
    base, power, exponent = str(value).partition("**")
    return float(base) ** float(exponent) if power else float(base)


def counted(n: int) -> list[list[int]]:
    """[d][dv]: how many of the 2^n points lie within d of both 0 and a point with dv ones; by enumeration."""
    table = [[0] * (n + 1) for _ in range(n + 1)]
    for dv in range(n + 1):
        other = (1 << dv) - 1
        for point in range(1 << n):
            table[max(point.bit_count(), (point ^ other).bit_count())][dv] += 1
    for d in range(1, n + 1):
        for dv in range(n + 1):
            table[d][dv] += table[d - 1][dv]
    return table


def shared(n: int, d: int, dv: int) -> int:
    """The same by sums: i of the dv bits that differ and j of the others are flipped."""
    within, total = [], 0
    for count in row(n - dv):
        total += count
        within.append(total)

    def ball(radius: int) -> int:
        return within[min(radius, n - dv)] if radius >= 0 else 0

    return sum(count * ball(d - max(i, dv - i)) for i, count in enumerate(row(dv)))


def row(n: int) -> list[int]:
    """C(n, 0), ..., C(n, n), each from the one before."""
    counts = [1]
    for k in range(n):
        counts.append(counts[-1] * (n - k) // (k + 1))
    return counts


def log_share(count: int, n: int) -> float:
    return math.log(count) - n * math.log(2) if count else -math.inf


def ball(n: int, d: int) -> int:
    return sum(row(n)[: d + 1])


def selected(n: int, k: int, dv: int) -> Fraction:
    """Share of neurons with k selected coordinates that two points dv apart both activate; by enumeration."""
    hits = neurons = 0
    for chosen in itertools.combinations(range(n), k):
        for wanted in itertools.product((0, 1), repeat=k):
            neurons += 1
            first = not any(wanted)  # agrees with 0...0
            second = all(bit == (place < dv) for place, bit in zip(chosen, wanted, strict=True))
            hits += first and second
    return Fraction(hits, neurons)


def line(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Least squares: slope, intercept, R^2."""
    k = len(x)
    mx, my = math.fsum(x) / k, math.fsum(y) / k
    slope = math.fsum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / math.fsum(
        (a - mx) ** 2 for a in x
    )
    bias = my - slope * mx
    left = math.fsum((b - slope * a - bias) ** 2 for a, b in zip(x, y, strict=True))
    return slope, bias, 1 - left / math.fsum((b - my) ** 2 for b in y)


def softmax_error(beta: float, n: int, counts: list[int]) -> float:
    """Mean squared difference of softmax(beta cosine) and the normalised counts over dv = 0..n."""
    logits = [beta * (1 - 2 * dv / n) for dv in range(n + 1)]
    raised = [math.exp(one - max(logits)) for one in logits]
    total, mass = math.fsum(raised), sum(counts)
    return math.fsum((a / total - count / mass) ** 2 for a, count in zip(raised, counts, strict=True)) / (
        n + 1
    )


def cap_share(n: int, theta: float, psi: float, slices: int = 2000) -> float:
    """Share of S^(n-1) within theta of two points psi apart, slice by slice around the first.

    On the slice at angle phi the points are a sphere of one dimension less, of which the second cap takes
    those within alpha of the direction to its centre. The middle of each slice stands for it.
    """
    step = theta / slices
    around = cap_table(n - 1, slices)
    scale = (
        math.fsum(math.sin((k + 0.5) * math.pi / 20000) ** (n - 2) for k in range(20000)) * math.pi / 20000
    )
    total = 0.0
    for k in range(slices):
        phi = (k + 0.5) * step
        level = (math.cos(theta) - math.cos(phi) * math.cos(psi)) / (math.sin(phi) * math.sin(psi))
        alpha = math.acos(min(max(level, -1.0), 1.0))
        total += math.sin(phi) ** (n - 2) * around[round(alpha / math.pi * slices)]
    return total * step / scale


def cap_table(n: int, slices: int) -> list[float]:
    """Share of S^(n-1) within the angles 0, pi / slices, ..., pi of a point."""
    table = [0.0]
    for k in range(slices):
        table.append(table[-1] + math.sin((k + 0.5) * math.pi / slices) ** (n - 2))
    return [one / table[-1] for one in table]


def normal_tail(x: float) -> float:
    """1 - Phi(x)."""
    return math.erfc(x / math.sqrt(2)) / 2


def read(n: int, d: int, neurons: int, patterns: int, variance: str) -> list[float]:
    """SNR at dv = 0..n with exact counts."""
    share = [Fraction(shared(n, d, dv), 2**n) for dv in range(n + 1)]
    if variance == "midpoint":
        met = neurons * share[n // 2]
        noise = met + met**2
    else:
        odds = [Fraction(math.comb(n, dv), 2**n) for dv in range(n + 1)]
        first = sum(a * b for a, b in zip(odds, share, strict=True))
        second = sum(a * b * b for a, b in zip(odds, share, strict=True))
        noise = neurons * first + neurons**2 * second
    ratios = []
    for one in share:
        signal = neurons * one
        spread = signal + (patterns - 1) * noise
        ratios.append(float(signal) / math.sqrt(spread) if signal else 0.0)
    return ratios


def critical(n: int, ratios: list[float], first: int = 5) -> int:
    last = 0
    for dv in range(first, n // 2 + 1):
        if not n * normal_tail(ratios[dv]) < dv:
            break
        last = dv
    return last
