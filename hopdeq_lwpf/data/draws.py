"""Seeded draws that do not depend on the platform or the number of threads, and the checks of their settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MAX_SEED = 2**32 - 1


def stream(seed: int, *purpose: int) -> np.random.RandomState:
    """A generator of its own for each purpose: the same numbers (`seed`, `purpose`), the same draws.

    numpy's RandomState, because numpy promises never to change its streams; those of `default_rng` and of
    torch's generators may change with a release.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, *purpose))))


def check_whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """`value` if it is a whole number from `least` to `most`; otherwise an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r} ({type(value).__name__})")
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return value


def check_seed(name: str, value: object) -> int:
    """A whole number from 0 to 2^32 - 1, which every generator takes."""
    return check_whole(name, value, 0, MAX_SEED)


def check_number(name: str, value: object, least: float, most: float = math.inf) -> float:
    """`value` as a finite float from `least` to `most`; otherwise an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not (math.isfinite(value) and least <= value <= most):
        allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} must be finite and {allowed}, got {value}")
    return float(value)


def check_fraction(name: str, value: object) -> float:
    """A share of positive bags: strictly between 0 and 1, since both classes are needed."""
    number = check_number(name, value, 0.0, 1.0)
    if number in (0.0, 1.0):
        raise ValueError(f"{name} must be above 0 and below 1, so that there are both classes; got {value}")
    return number


def count_positives(num_bags: int, fraction: float) -> int:
    """How many of the bags are positive: ceil(fraction num_bags), at least 1."""
    return min(num_bags, max(1, math.ceil(num_bags * fraction)))


def draw_targets(num_bags: int, fraction: float, seed: int, *purpose: int) -> np.ndarray:
    """(num_bags,) bool: exactly `count_positives` of them true, at random places."""
    return stream(seed, *purpose).permutation(num_bags) < count_positives(num_bags, fraction)


def split_folds(targets: Sequence[float] | np.ndarray, folds: int, seed: int) -> list[list[int]]:
    """The rows in `folds` parts for cross-validation, each sorted; sizes differ by at most 1, as do the
    numbers of each class in a part.

    targets: the class of each row. Raises ValueError for fewer rows than parts.
    """
    classes = np.asarray(targets)
    check_whole("folds", folds, 2)
    if len(classes) < folds:
        raise ValueError(f"folds is {folds}, but there are only {len(classes)} bags")
    shuffled = stream(seed).permutation(len(classes))
    # Dealing the rows out like cards, one class after the other, is what keeps sizes and classes even.
    dealt = shuffled[np.argsort(classes[shuffled], kind="stable")]
    return [sorted(dealt[start::folds].tolist()) for start in range(folds)]
