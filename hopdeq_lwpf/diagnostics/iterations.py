"""How many iterations a solve took to a tolerance, counted exactly and as it was published."""

from __future__ import annotations

import torch
from torch import Tensor

from hopdeq_lwpf._types import check_float_tensor

TOLERANCE = 1e-4  # of Goemaere et al. 2024, table 2


def iterations_to(residual: Tensor, tolerance: float = TOLERANCE, *, as_published: bool = False) -> Tensor:
    """Updates until the relative residual of a problem is first below the tolerance: (T, *batch) -> (*batch) float64.

    residual: `Solution.trace.residual`; entry t is |f(z_t) - z_t| / |f(z_t)| after t updates, NaN once a problem has
        stopped. Trace with a `Termination` whose rtol is not above the tolerance, or problems stop before they pass.
    NaN where a problem never passes. tolerance: 1e-4, as in table 2 of Goemaere et al. 2024.
    as_published: the count of their code instead. It looks at f(z_1) - f(z_0) first, so that it is one less; a problem
        that passes there already is taken for one that never does; and those count T - 1, so that the mean depends on
        how long was iterated. With solvers other than Picard their code compares successive values of f, which are no
        residuals; here it is the residual in each case.

    Raises TypeError or ValueError for anything but a trace with one entry a step, and a tolerance that is not > 0.
    """
    check_float_tensor("residual", residual)
    if residual.ndim < 1 or residual.shape[0] < 1:
        raise ValueError(f"residual must have shape (T, *batch) with T >= 1, got {tuple(residual.shape)}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance!r}")
    passed = residual < tolerance
    if as_published:
        if residual.shape[0] < 2:
            raise ValueError("residual must have at least two entries for the published count")
        first = passed[1:].to(torch.int64).argmax(0)
        return torch.where(first == 0, residual.shape[0] - 1, first).to(torch.float64)
    first = passed.to(torch.int64).argmax(0).to(torch.float64)
    return torch.where(passed.any(0), first, float("nan"))
