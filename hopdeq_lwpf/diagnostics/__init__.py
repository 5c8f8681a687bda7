"""Honest diagnostics: what theory promises, what kind of fixed point was reached, how fast, and from where."""

from hopdeq_lwpf.diagnostics.basins import (
    REFERENCE,
    BasinRadius,
    basin_changed,
    basin_radius,
    binomial_interval,
    picard_limit,
)
from hopdeq_lwpf.diagnostics.diagnosis import Diagnosis, diagnose
from hopdeq_lwpf.diagnostics.fixed_points import (
    AveragingClass,
    Classification,
    FixedPoint,
    Usage,
    classify,
    usage,
)
from hopdeq_lwpf.diagnostics.iterations import iterations_to
from hopdeq_lwpf.diagnostics.spectrum import Spectrum, spectral_radius, steps_per_digit
from hopdeq_lwpf.diagnostics.theory import (
    Capacity,
    Storage,
    capacity,
    jacobian_bound,
    log_lambert_w,
    one_step_error_bound,
    retrieval_error_bound,
    separation_of,
    single_fixed_point,
    storage_condition,
)

__all__ = [
    "REFERENCE",
    "AveragingClass",
    "BasinRadius",
    "Capacity",
    "Classification",
    "Diagnosis",
    "FixedPoint",
    "Spectrum",
    "Storage",
    "Usage",
    "basin_changed",
    "basin_radius",
    "binomial_interval",
    "capacity",
    "classify",
    "diagnose",
    "iterations_to",
    "jacobian_bound",
    "log_lambert_w",
    "one_step_error_bound",
    "picard_limit",
    "retrieval_error_bound",
    "separation_of",
    "single_fixed_point",
    "spectral_radius",
    "steps_per_digit",
    "storage_condition",
    "usage",
]
