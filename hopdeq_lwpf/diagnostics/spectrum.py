"""How fast f contracts at a state: the spectral radius of its Jacobian, problem by problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hopdeq_lwpf._types import Context, Matvec, State, identity
from hopdeq_lwpf.solvers.base import check_count, check_number
from hopdeq_lwpf.solvers.view import FlatFunction, StateView

# The small eigenvalue problems cost more than a product of few problems: they are solved every so many products.
CHECK_EVERY = 4


@dataclass(frozen=True)
class Spectrum:
    """The largest |eigenvalue| of df/dz, one entry a problem; NaN where f or its Jacobian is not finite.

    radius: (*batch), the estimate. residual: (*batch), |J v - lambda v| of its unit eigenvector estimate v.
        With a metric |lambda - an eigenvalue| <= residual; without one it is a backward error.
    products: Jacobian products used. method: "lanczos" (f declares a metric) or "arnoldi".
    rtol: what a residual over the radius had to be below for `converged`.
    """

    radius: Tensor
    residual: Tensor
    products: int
    method: str
    rtol: float

    @property
    def converged(self) -> Tensor:
        """(*batch) bool: the residual is within the tolerance."""
        floor = torch.finfo(self.radius.dtype).eps * 100
        return self.residual <= self.rtol * self.radius + floor

    @property
    def stable(self) -> Tensor:
        """(*batch) bool: radius < 1, plain iteration returns after any small disturbance."""
        return self.radius < 1

    @property
    def steps_per_digit(self) -> Tensor:
        """(*batch): plain iterations that gain one decimal digit, ln 10 / -ln radius; inf where not stable."""
        return steps_per_digit(self.radius)

    def __str__(self) -> str:
        known = self.radius[~self.radius.isnan()].double()
        if not known.numel():
            return "no spectral radius is known"
        middle, high = (float(known.quantile(q)) for q in (0.5, 0.95))
        slow = steps_per_digit(torch.tensor([middle, high])).tolist()
        return (
            f"spectral radius median {middle:.3g}, 95 % {high:.3g}: {slow[0]:.3g} and {slow[1]:.3g} plain steps a "
            f"digit; {int((known >= 1).sum())} of {known.numel()} unstable"
        )


def steps_per_digit(radius: Tensor) -> Tensor:
    """Plain iterations that gain one decimal digit, ln 10 / -ln radius; inf from a radius of 1 on, NaN for NaN."""
    steps = math.log(10) / -radius.clamp(max=1.0).log()
    return torch.where(radius >= 1, math.inf, steps)


def spectral_radius(
    f: Callable[[State, Context], State],
    z: State,
    x: Context = None,
    *,
    subspace: int = 40,
    rtol: float = 1e-3,
    seed: int = 0,
) -> Spectrum:
    """The largest |eigenvalue| of df/dz at z for each problem: the asymptotic rate of plain iteration.

    f, z, x: as in `fixed_point`; z is the equilibrium (or any state), a tensor or a pytree of tensors.
    Where f declares a metric M, in which J is self-adjoint, the Lanczos method in that metric; else Arnoldi's
    on J^T, which has the eigenvalues of J. Both by products with vectors, so that no Jacobian is built.
    subspace: products at most; n of them find every eigenvalue of a state of n numbers. 40 basis vectors cost
        the memory of 40 states. rtol: stop when the residual of every problem is below rtol times its radius;
        1e-3 tells .99 from .999. seed: of the start vector, the same for every problem, so that a batch gives
        what its problems give one by one, to within rtol.
    Whether z is an equilibrium is not checked; some f have their metric only there. Raises TypeError or
    ValueError for input that cannot be used.
    """
    if not callable(f):
        raise TypeError(f"f must be a function of (z, x), got {f!r}")
    check_count("subspace", subspace, 1)
    check_number("rtol", rtol, 0.0, 1.0)
    check_count("seed", seed, 0)
    view = StateView.of(f, z)
    flat = view.flatten(z).detach()
    function = FlatFunction(f, x, view, flat.device.type)
    with torch.no_grad():
        metric = function.metric(flat) if len(flat) else None
    method = "arnoldi" if metric is None else "lanczos"
    width = flat.shape[1]
    if not len(flat) or not width:
        empty = flat.new_zeros(flat.shape[:1]).reshape(view.batch_shape)
        return Spectrum(empty, empty.clone(), 0, method, rtol)
    with torch.enable_grad():
        product = _Jacobian(function, flat, forward=metric not in (None, identity))
    start = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad(), function.full_precision():
        krylov = _Krylov(product, metric, start.to(flat).expand(flat.shape), min(subspace, width))
        radius, residual = krylov.run(rtol)
    shape = view.batch_shape
    return Spectrum(radius.reshape(shape), residual.reshape(shape), len(krylov.columns), method, rtol)


class _Jacobian:
    """v -> J^T v (B, n) by reverse mode at one recorded evaluation; v -> J v where `forward`.

    J v is the derivative of J^T u with respect to u, so that it needs no forward-mode rule of any operation.
    """

    def __init__(self, f: FlatFunction, z: Tensor, *, forward: bool) -> None:
        self.point = z.clone().requires_grad_()
        self.image = f(self.point)
        self.dummy: Tensor | None = None
        self.pulled: Tensor | None = None
        if forward and self.image.requires_grad:
            self.dummy = torch.zeros_like(self.image).requires_grad_()
            (self.pulled,) = torch.autograd.grad(
                self.image, self.point, self.dummy, create_graph=True, allow_unused=True
            )

    def __call__(self, v: Tensor) -> Tensor:
        if not self.image.requires_grad:
            return torch.zeros_like(v)
        source, target = (self.image, self.point) if self.dummy is None else (self.pulled, self.dummy)
        if source is None or not source.requires_grad:
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(source, target, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if product is None else product.detach()


class _Krylov:
    """Arnoldi's process in the inner product u.M v, with full re-orthogonalisation; Lanczos if J is symmetric.

    The basis is kept whole: at most some tens of vectors, and a lost orthogonality would give false copies of
    eigenvalues.
    """

    def __init__(self, product: Matvec, metric: Matvec | None, start: Tensor, length: int) -> None:
        self.product = product
        self.metric = metric or identity
        self.symmetric = metric is not None
        self.length = length
        self.whole = not self.symmetric and length == start.shape[1]
        size = self._norm(start)
        self.basis = [start / size[:, None]]
        self.columns: list[Tensor] = []  # of the Hessenberg matrix: (B, k + 2) each
        self.tiny = torch.finfo(start.dtype).eps * 10

    def _norm(self, v: Tensor) -> Tensor:
        return (v * self.metric(v)).sum(-1).clamp_min(0.0).sqrt()

    def run(self, rtol: float) -> tuple[Tensor, Tensor]:
        """Radius and residual, (B,) each."""
        for count in range(1, self.length + 1):
            self._grow()
            if count % CHECK_EVERY and count < self.length:
                continue
            radius, residual = self._ritz()
            # A small residual is a small change of J, which moves the eigenvalues of a J that is far from normal
            # by much: where all of them can be had, they are.
            if self.whole and count < self.length:
                continue
            # NaN is as good as it gets.
            if not bool((residual > rtol * radius).any()):
                break
        return radius, residual

    def _grow(self) -> None:
        v = self.product(self.basis[-1])
        reach = self._norm(v)
        stack = torch.stack(self.basis, 1)
        h = torch.zeros_like(stack[:, :, 0])
        # Classical Gram-Schmidt twice is as stable as modified, in two products instead of k.
        for _ in range(2):
            part = (stack @ self.metric(v)[:, :, None]).squeeze(-1)
            v = v - (part[:, None, :] @ stack).squeeze(1)
            h = h + part
        below = self._norm(v)
        # What rounding leaves of an invariant subspace is no new direction.
        ended = below <= self.tiny * reach
        below = below.masked_fill(ended, 0.0)
        self.columns.append(torch.cat([h, below[:, None]], 1))
        unit = v / below.masked_fill(ended, 1.0)[:, None]
        self.basis.append(unit.masked_fill(ended[:, None], 0.0))

    def _ritz(self) -> tuple[Tensor, Tensor]:
        """The largest |Ritz value| and the residual of its vector, (B,) each; NaN in rows that hold NaN."""
        size = len(self.columns)
        padded = [functional.pad(column, (0, size + 1 - column.shape[1])) for column in self.columns]
        small = torch.stack(padded, 2)[:, :size].double()
        below = self.columns[-1][:, -1].double()
        broken = ~(small.isfinite().all(-1).all(-1) & below.isfinite())
        small = small.masked_fill(broken[:, None, None], 0.0)
        if self.symmetric:
            values, vectors = torch.linalg.eigh((small + small.mT) / 2)
        else:
            values, vectors = torch.linalg.eig(small)
        sizes, which = values.abs().max(-1)
        last = vectors[:, -1, :].abs().gather(1, which[:, None]).squeeze(1)
        dtype = self.columns[0].dtype
        radius = sizes.masked_fill(broken, math.nan).to(dtype)
        return radius, (last * below).masked_fill(broken, math.nan).to(dtype)
