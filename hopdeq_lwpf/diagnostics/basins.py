"""Which attractor a query reaches: the one of plain iteration or another, and from how far away."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hopdeq_lwpf._types import Context, Solution, State, check_float_tensor, wide
from hopdeq_lwpf.forgetting import Forgetting
from hopdeq_lwpf.recall import Recall, retrieve
from hopdeq_lwpf.retrieval import RetrievalContext
from hopdeq_lwpf.separation import Separation
from hopdeq_lwpf.solvers.base import check_count, check_number
from hopdeq_lwpf.solvers.picard import Picard
from hopdeq_lwpf.solvers.solve import fixed_point
from hopdeq_lwpf.solvers.termination import Termination

# Another attractor, not the same one at another tolerance.
SAME = 0.05
# An equilibrium at zero has no relative distance. At the default tolerance of 1e-8 a solve stops within
# 1e-6 of it for contractions up to .99.
SAME_ABSOLUTE = 1e-6
# A residual of 1e-6 at a contraction of .999 leaves 1e-3, far below SAME.
REFERENCE = Termination(rtol=1e-6, atol=1e-8, max_steps=5000, check_every=1)
# 1.96 standard errors: intervals of 95 %.
Z95 = 1.959963984540054
# So many queries at a time: with 10,000 patterns their scores are 160 MB in float32.
BATCH = 4096


def picard_limit(
    f: Callable[[State, Context], State], x: Context, z0: State, *, stop: Termination = REFERENCE
) -> Solution:
    """Where plain iteration in float64 takes z0: what "the right attractor" means.

    f, x, z0: as in `fixed_point`. Tensors of x and z0 become float64, and so do a copy of f if it is a module.
    A threshold that forgetting drew in float32 stays the number it was; to draw it in float64 too, prepare x
    from float64 patterns and queries. stop: rtol 1e-6, since at a contraction of .999 that leaves an error of
    1e-3, and 5,000 steps, since an unconverged reference says nothing. Raises TypeError where f holds float32
    tensors of its own, out of reach.
    """
    exact = _Exact(f) if isinstance(f, nn.Module) else f
    if isinstance(x, RetrievalContext):
        x = x._replace(half_squares=None)  # what was summed in float32 is summed anew
    try:
        with torch.no_grad():
            return fixed_point(exact, _double(x), _double(z0), solver=Picard(), stop=stop)
    except RuntimeError as error:
        if "dtype" not in str(error) and "scalar type" not in str(error):
            raise
        raise TypeError(
            f"f does not run in float64 ({str(error).splitlines()[0]}): hand its tensors over in x, or make f a "
            "module that owns them"
        ) from error


class _Exact:
    """A module with float64 copies of its parameters and buffers; the module itself stays as it is."""

    def __init__(self, f: nn.Module) -> None:
        self.f = f
        self.tensors = {name: _double(value) for name, value in (*f.named_parameters(), *f.named_buffers())}
        for name in ("state_ndim", "select"):
            if hasattr(f, name):
                setattr(self, name, getattr(f, name))

    def __call__(self, z: State, x: Context) -> State:
        return torch.func.functional_call(self.f, self.tensors, (z, x))


def _double(tree: Any) -> Any:
    """A tree with its floating-point tensors in float64, detached."""
    return pytree.tree_map(
        lambda leaf: (
            leaf.detach().double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        ),
        tree,
    )


def basin_changed(state: State, limit: Solution, *, tolerance: float = SAME) -> Tensor:
    """Whether a solve ended elsewhere than plain iteration: (*batch) float64, 1 yes, 0 no, NaN unknown.

    state: what the solver returned, `Solution.state`. limit: what `picard_limit` returned for the same start;
    where it did not converge the answer is unknown. tolerance: distance over the length of the limit within
    which it is the same attractor. A state that holds NaN ended elsewhere.
    """
    check_number("tolerance", tolerance, 0.0)
    batch = limit.result.shape
    ends, spec = pytree.tree_flatten(limit.state)
    states = [state] if isinstance(state, Tensor) else spec.flatten_up_to(state)
    if [leaf.shape for leaf in states] != [leaf.shape for leaf in ends]:
        raise ValueError(
            f"state and limit.state must have the same shape, got {[tuple(leaf.shape) for leaf in states]} and "
            f"{[tuple(leaf.shape) for leaf in ends]}"
        )
    end = _rows(ends, batch)
    distance = torch.linalg.vector_norm(_rows(states, batch) - end, dim=-1)
    near = distance <= tolerance * torch.linalg.vector_norm(end, dim=-1) + SAME_ABSOLUTE
    return (~near).double().reshape(batch).masked_fill(~limit.converged, math.nan)


def _rows(leaves: list[Tensor], batch: torch.Size) -> Tensor:
    """One row a problem, float64."""
    flat = [leaf.reshape(batch.numel(), leaf.shape[len(batch) :].numel()) for leaf in leaves]
    return torch.cat([_double(part) for part in flat], 1)


def binomial_interval(successes: Tensor, trials: int) -> tuple[Tensor, Tensor]:
    """Wilson's 95 % interval of a share: two tensors of the shape of `successes` (E. B. Wilson 1927).

    Unlike the usual plus-minus it has the width it should at shares of 0 and 1.
    """
    check_count("trials", trials, 1)
    share = successes.double() / trials
    middle = share + Z95**2 / (2 * trials)
    half = Z95 * (share * (1 - share) / trials + Z95**2 / (4 * trials**2)).sqrt()
    scale = 1 + Z95**2 / trials
    # At shares of 0 and 1 the end is the share itself, up to rounding.
    low, high = ((middle - half) / scale).clamp_min(0.0), ((middle + half) / scale).clamp_max(1.0)
    return torch.minimum(low, share), torch.maximum(high, share)


@dataclass(frozen=True)
class BasinRadius:
    """How far a query may be moved away from each of P patterns and still be recalled.

    radius: (P,), the largest radius of the grid up to which at least `level` of the directions are recalled at
        every radius; 0 where the smallest fails, or where the pattern itself is not recalled.
    radii: (R, P), the grid. share: (R, P), directions recalled; low, high: its 95 % binomial interval.
    recalled: (P,) bool, a query equal to the pattern recalls it. directions, level: as asked for.
    """

    radius: Tensor
    radii: Tensor
    share: Tensor
    low: Tensor
    high: Tensor
    recalled: Tensor
    directions: int
    level: float

    def __str__(self) -> str:
        if not self.radius.numel():
            return "no pattern was asked for"
        held = self.radius[self.recalled]
        middle = float(held.quantile(0.5)) if held.numel() else math.nan
        return (
            f"{int(self.recalled.sum())} of {self.radius.numel()} patterns are recalled from themselves; median "
            f"radius {middle:.3g} ({100 * self.level:g} % of {self.directions} directions)"
        )


def basin_radius(  # noqa: PLR0913 (the options of retrieve and of the grid)
    patterns: Tensor,
    *,
    beta: float,
    index: Tensor | None = None,
    radii: Tensor | None = None,
    directions: int = 64,
    level: float = 0.5,
    forgetting: None | str | Forgetting = None,
    separation: str | Separation = "softmax",
    stop: Termination = REFERENCE,
    seed: int = 0,
) -> BasinRadius:
    """Move queries away from stored patterns in random directions until they are no longer recalled.

    patterns: (N, d). index: (P,) int64, the patterns asked for; None: all. beta, forgetting, separation: as in
    `retrieve`. radii: (R,) or (R, P), distances > 0 that rise; None: ten, up to twice the distance from each
    pattern to its nearest neighbour. directions: random unit vectors, the same for every pattern and radius, so
    that radii are compared in pairs; 64 give an interval of at most +- 12 points. level: share of the
    directions that the radius must recall; .5 is the median direction. stop: of the solves, which are plain
    iteration, since other solvers may leave the basin that is measured. seed: of the directions.

    A query counts as recalled if its pattern has the largest weight and the state is within 5 % of where the
    pattern itself ends. This solves P R directions problems, 4,096 at a time.
    """
    index, radii = _check_grid(patterns, index, radii)
    check_count("directions", directions, 1)
    check_count("seed", seed, 0)
    check_number("level", level, 0.0, 1.0, open_low=True)
    draw = torch.randn(
        directions, patterns.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    rays = (draw / torch.linalg.vector_norm(draw, dim=-1, keepdim=True)).to(patterns)

    options: dict[str, Any] = {"beta": beta, "forgetting": forgetting, "separation": separation}
    solve = partial(retrieve, patterns=patterns, solver=Picard(), stop=stop, **options)
    hits, recalled = _hits(solve, patterns[index], index, radii, rays)
    low, high = binomial_interval(hits, directions)
    share = hits.double() / directions
    # Unbroken from the centre on: a far radius that recalls by chance does not count.
    unbroken = (share >= level).long().cumprod(0).sum(0)
    stops = torch.cat([torch.zeros_like(radii[:1]), radii])
    radius = stops.gather(0, unbroken[None]).squeeze(0).masked_fill(~recalled, 0.0)
    return BasinRadius(radius, radii, share, low, high, recalled, directions, level)


@torch.no_grad()
def _hits(
    solve: Callable[[Tensor], Recall], centres: Tensor, index: Tensor, radii: Tensor, rays: Tensor
) -> tuple[Tensor, Tensor]:
    """How many of the rays are recalled at each radius (R, P), and whether the centres are (P,)."""
    hits = torch.zeros_like(radii, dtype=torch.int64)
    recalled = torch.zeros_like(index, dtype=torch.bool)
    for rows in torch.arange(len(index), device=index.device).split(max(BATCH // len(rays), 1)):
        centre, wanted = centres[rows], index[rows]
        home = solve(centre)
        recalled[rows] = home.index == wanted
        for step, radius in enumerate(radii[:, rows]):
            moved = solve(centre[:, None] + radius[:, None, None] * rays)
            same = _near(moved.state, home.state[:, None]) & (moved.index == wanted[:, None])
            hits[step, rows] = same.sum(-1)
    return hits, recalled


def _near(state: Tensor, home: Tensor) -> Tensor:
    """Whether states (P, D, d) are the attractors (P, 1, d): (P, D)."""
    reach = SAME * torch.linalg.vector_norm(wide(home), dim=-1) + SAME_ABSOLUTE
    return torch.linalg.vector_norm(wide(state) - wide(home), dim=-1) <= reach


def _check_grid(patterns: Tensor, index: Tensor | None, radii: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows asked for (P,) and distances (R, P)."""
    check_float_tensor("patterns", patterns)
    if patterns.ndim != 2 or not patterns.numel():
        raise ValueError(f"patterns must be (N, d), neither of them 0; got {tuple(patterns.shape)}")
    if not bool(patterns.isfinite().all()):
        raise ValueError("patterns hold NaN or inf; remove those rows")
    count = len(patterns)
    if index is None:
        index = torch.arange(count, device=patterns.device)
    if index.dtype != torch.int64 or index.ndim != 1 or bool(((index < 0) | (index >= count)).any()):
        raise ValueError(f"index must be (P,) int64 rows of the {count} patterns, got {index!r}")
    if radii is None:
        steps = torch.arange(1, 11, dtype=torch.float64, device=patterns.device) / 5
        radii = steps[:, None] * _nearest(patterns, index).double()
    check_float_tensor("radii", radii)
    rising = (
        radii.ndim in (1, 2)
        and len(radii) > 0
        and bool((radii[0] >= 0).all() & (radii.diff(dim=0) >= 0).all())
    )
    if not rising or (radii.ndim == 2 and radii.shape[1] not in (1, len(index))):
        raise ValueError(
            f"radii must be (R,) or (R, P) with R >= 1 distances >= 0 that rise, got the shape {tuple(radii.shape)}"
        )
    radii = radii[:, None] if radii.ndim == 1 else radii
    return index, radii.expand(-1, len(index)).to(patterns)


def _nearest(patterns: Tensor, index: Tensor) -> Tensor:
    """Distance from each pattern asked for to the nearest other one, (P,); its own norm where there is none."""
    if len(patterns) == 1:
        return torch.linalg.vector_norm(wide(patterns[index]), dim=-1)
    found = []
    for rows in index.split(1024):
        away = torch.cdist(wide(patterns[rows]), wide(patterns))
        away = away.scatter(1, rows[:, None], math.inf)
        found.append(away.amin(-1))
    return torch.cat(found) if found else wide(patterns[:, 0])[:0]
