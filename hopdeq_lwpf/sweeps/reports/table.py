"""The results table: its columns and what they mean, and the CSV that holds it."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hopdeq_lwpf.data import DataError, replacing

Row = Mapping[str, Any]

# Columns that have an interval: the bootstrap's limits stand in NAME_low and NAME_high.
COLUMNS = {
    "forgetting": "the forgetting unit",
    "steps": "softmaxes, or 'converged'",
    "beta": "inverse temperature",
    "corruption": "how the queries were made from stored patterns; 'given': they came from a file",
    "level": "strength of the corruption: share of the entries, or noise over the range of the data",
    "queries": "number of queries",
    "recall": "share recalled: the nearest stored pattern is the right one and is closer than max_error",
    "nearest": "share for which the nearest stored pattern is the right one, however far",
    "nearest_query": "the same for the query itself: what a nearest-neighbour search would reach",
    "error": "mean distance of what was recalled to the right pattern, over the length of that pattern",
    "gap": "mean distance to the nearest stored pattern, over its length: large in a metastable state",
    "gain_forgetting": "recall minus that without forgetting, same steps, beta and queries, in pairs",
    "gain_steps": "recall minus that of one step, same forgetting, beta and queries, in pairs",
    "agreement": "share with the same nearest pattern as the converged run",
    "steps_median": "median number of updates",
    "steps_p95": "their 95th percentile",
    "steps_max": "their maximum",
    "evaluations_mean": "mean number of evaluations of f a query took part in",
    "converged": "share within the tolerance; after k steps: the k-th step changed no more than it allows",
    "max_steps": "number of queries that ran out of steps",
    "diverged": "number of queries that diverged",
    "nonfinite": "number of queries that met NaN or inf",
    "residual_median": "median of |f(z) - z| / |f(z)|",
    "residual_max": "maximum of the same",
    "basin_changes": "share that ended more than 5 % (relative) from where plain float64 iteration ends",
    "basin_compared": "number of queries for which plain iteration converged, so that this is known",
    "forgotten": "share of total forgetting: no pattern was kept and nothing was recalled",
    "weight": "mean weight of the strongest pattern: near 1 sharp, far below metastable",
    "single": "share of converged queries at a single pattern: one weight holds 90 % of all weight",
    "metastable": "share at a metastable state: up to half of the patterns are needed for 90 % of the weight",
    "metastable_size": "median number of patterns needed there",
    "global": "share at a global average: more than half of the patterns are needed",
    "radius_median": "median spectral radius of df/dz at the equilibrium, of a sample of the queries (setting "
    "'spectrum'): what plain iteration multiplies a small error by; below 1 stable",
    "radius_p95": "its 95th percentile",
    "dead": "number of stored patterns that no query of the cell gives a weight, be it forgotten or rounded to 0",
    "stored": "number of patterns that certainly have a fixed point of their own, by the sufficient condition of "
    "Ramsauer et al. 2021, lemmas A5 to A7 (softmax without forgetting)",
    "ms_per_query": "time in ms: of the whole batch, divided by its queries",
}
WITH_INTERVAL = ("recall", "error", "gain_forgetting", "gain_steps", "agreement", "basin_changes")
TEXT = ("forgetting", "steps", "corruption")
WHOLE = ("queries", "steps_max", "max_steps", "diverged", "nonfinite", "basin_compared")


def columns() -> list[str]:
    """Every column in the order of the file."""
    names: list[str] = []
    for name in COLUMNS:
        names += [name, f"{name}_low", f"{name}_high"] if name in WITH_INTERVAL else [name]
    return names


def write_table(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write the rows as CSV; an empty cell is a question without an answer."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns())
        writer.writeheader()
        writer.writerows({name: _text(row[name]) for name in columns()} for row in rows)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def read_table(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file that `write_table` wrote; DataError for any other file."""
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            if reader.fieldnames != columns():
                raise DataError(f"{path}: is not a results table of a comparison")
            return [{name: _value(name, row[name]) for name in columns()} for row in reader]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or 'cannot be read'}") from error
    except (ValueError, TypeError, csv.Error) as error:
        raise error if isinstance(error, DataError) else DataError(f"{path}: is damaged ({error})") from error


def _value(name: str, text: str) -> Any:
    if name == "steps" and text.isdigit():
        return int(text)
    if name in TEXT:
        return text
    if name in WHOLE:
        return int(text)
    return float(text) if text else math.nan
