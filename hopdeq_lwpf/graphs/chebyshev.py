"""exp(-eta L) and (I + eta L)^-1 as Chebyshev series in a sparse L, with as many terms as the dtype can tell apart.

With the spectrum of L in [0, b] and t = 2 L / b - I, a function of L is sum_k c_k T_k(t). The c_k fall geometrically,
so that the error of a truncated series is known before anything is multiplied (Trefethen 2019, theorem 8.2).
Unlike conjugate gradients a series is one linear, symmetric map, the same for every right-hand side.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf.graphs.sparse import SparseMatrix, bag, dots, full_precision, product, widest


class Series(NamedTuple):
    """Either series, for all samples of a batch; "one or P" entries: one where all samples share them.

    matrix: of the recurrence. For the heat kernel 2 t, with gradient; coefficients (K + 1, one or P).
    For the resolvent L itself, with gradient, and eta (P,); `scaled` (E,) are the weights of -2 rho t, and
    `factors` (2, one or P) are -rho^2 and what the sum is multiplied by, 1 / sqrt(kappa).
    """

    matrix: SparseMatrix
    coefficients: Tensor | None
    eta: Tensor | None
    scaled: Tensor | None
    factors: Tensor | None
    terms: int

    def times(self, x: Tensor, nodes: int) -> Tensor:
        """The function of L times x (M, c)."""
        if self.coefficients is not None:
            return _sum(self, x, nodes)
        dtype = x.dtype
        weight, edge, offsets = self.matrix
        parts = [part.to(dtype) for part in (weight, self.eta, self.scaled, self.factors)]  # type: ignore[union-attr]
        weight, eta, scaled, factors = parts
        return _Resolvent.apply(x.contiguous(), weight, eta, scaled, factors, edge, offsets, self.terms)

    def pick(self, samples: Tensor, nodes: int) -> Series:
        """The series of these samples."""

        def of(part: Tensor | None) -> Tensor | None:
            return part if part is None or part.shape[-1] == 1 else part.index_select(-1, samples)

        scaled = (
            None
            if self.scaled is None
            else self.matrix._replace(weight=self.scaled).pick(samples, nodes).weight
        )
        return Series(
            self.matrix.pick(samples, nodes),
            of(self.coefficients),
            None if self.eta is None else self.eta.index_select(0, samples),
            scaled,
            of(self.factors),
            self.terms,
        )


def heat_series(matrix: SparseMatrix, eta: Tensor, bound: Tensor, nodes: int) -> Series:
    """exp(-eta L) from L, eta (P,) and the bounds (P,) of its spectra.

    Error: 2 e^{tau ((rho + 1/rho)/2 - 1)} rho^-K / (rho - 1) for every rho > 1, tau = eta bound / 2.
    """
    # One coefficient for all where eta and bound are the same: the products then need no column of them.
    bound = torch.where(bound > 0, bound, 1.0).to(widest(eta.device))
    tau = eta.to(widest(eta.device)) * bound / 2
    if len(tau) > 1 and _same(tau) and not tau.requires_grad:
        tau = tau[:1]
    terms = heat_terms(largest(tau), torch.finfo(matrix.weight.dtype).eps)
    coefficients = heat_coefficients(tau, terms).to(matrix.weight.dtype)
    doubled = _shifted(matrix, bound, nodes, 2.0)
    return Series(doubled, coefficients, None, None, None, terms)


def heat_terms(tau: float, eps: float) -> int:
    """The degree from which on the series of exp(-tau (1 + t)) errs by less than eps; at least 2.

    At 0 derivatives by tau need the first terms, and the second derivative two of them.
    """

    def error(degree: int) -> float:
        ratio = degree / tau
        rho = ratio + math.hypot(1, ratio)
        log = tau * ((rho + 1 / rho) / 2 - 1) - degree * math.log(rho)
        return 2 * math.exp(log) / (rho - 1)

    degree = 2
    while tau > 0 and error(degree) > eps:
        degree += 1 + degree // 16
    return degree


def heat_coefficients(tau: Tensor, terms: int) -> Tensor:
    """Of expm1(-tau (1 + t)), the part that vanishes exactly at tau = 0: (terms + 1, P), differentiable in tau.

    A discrete cosine transform of the function at the Chebyshev points, as a real Fourier transform of twice the
    length. What is folded back onto lower terms is below the truncation error.
    """
    if not tau.numel():
        return tau.expand(terms + 1, 0)
    points = 2 * terms
    angle = torch.arange(points + 1, dtype=tau.dtype, device=tau.device) * (math.pi / points)
    values = torch.expm1(-tau * 2 * (angle / 2).cos().square().unsqueeze(-1))
    around = torch.cat([values, values[1:-1].flip(0)])
    coefficients = torch.fft.rfft(around, dim=0).real[: terms + 1] / points
    first = torch.arange(terms + 1, device=tau.device) == 0
    return torch.where(first.unsqueeze(-1), coefficients / 2, coefficients)


def resolvent_series(matrix: SparseMatrix, eta: Tensor, bound: Tensor, nodes: int) -> Series:
    """(I + eta L)^-1 = (1 + 2 sum_k (-rho)^k T_k(t)) / sqrt(kappa), eta (P,), bound (P,).

    kappa = 1 + eta bound, rho = (sqrt(kappa) - 1) / (sqrt(kappa) + 1). Error: 2 rho^(K+1) / ((1 - rho) sqrt(kappa)).
    The powers of rho are drawn into the recurrence: U_k = (-rho)^k T_k x has U_{k+1} = -2 rho t U_k - rho^2 U_{k-1}.
    """
    with torch.no_grad():
        dtype = matrix.weight.dtype
        bound = torch.where(bound > 0, bound, 1.0).to(widest(eta.device))
        root = (1 + eta.detach().to(widest(eta.device)) * bound).sqrt()
        if len(root) > 1 and _same(root) and _same(bound):
            root, bound = root[:1], bound[:1]
        rho = (root - 1) / (root + 1)
        terms = resolvent_terms(largest(root), torch.finfo(dtype).eps)
        scaled = _shifted(matrix, bound, nodes, -2 * rho).weight
        factors = torch.stack([-rho.square(), root.reciprocal()]).to(dtype)
    return Series(matrix, None, eta, scaled, factors, terms)


def resolvent_terms(root: float, eps: float) -> int:
    """The degree from which on the series of the resolvent errs by less than eps; root = sqrt(kappa)."""
    rho = (root - 1) / (root + 1)
    if rho <= 0:
        return 0
    return max(0, math.ceil(math.log(eps * root * (1 - rho) / 2) / math.log(rho)) - 1)


def largest(values: Tensor) -> float:
    """The largest number; NaN belongs to one sample and says nothing of the others."""
    values = values.detach()
    return float(values.nan_to_num(nan=0.0, posinf=0.0).max()) if values.numel() else 0.0


def _same(values: Tensor) -> bool:
    values = values.detach()
    return bool((values == values[0]).all())


def over_nodes(values: Tensor, nodes: int) -> Tensor:
    """One or P values as a column: (1, 1), or one a node (M, 1)."""
    return (values if len(values) == 1 else values.repeat_interleave(nodes)).unsqueeze(-1)


def _shifted(matrix: SparseMatrix, bound: Tensor, nodes: int, factor: float | Tensor) -> SparseMatrix:
    """factor * (2 L / bound - I)."""
    weight, edge, offsets = matrix
    scale, shift = 2 / bound * factor, torch.ones_like(bound) * factor
    row = edge[0]
    if len(scale) > 1:
        sample = row // max(nodes, 1)
        scale, shift = scale[sample], shift[sample]
    on_diagonal = edge[0] == edge[1]
    shifted = weight * scale.to(weight.dtype) - shift.to(weight.dtype) * on_diagonal
    return SparseMatrix(shifted, edge, offsets)


def _sum(series: Series, x: Tensor, nodes: int) -> Tensor:
    """x + sum_k c_k T_k(t) x, by the recurrence T_{k+1} = 2 t T_k - T_{k-1}; autograd goes through it."""
    coefficients = series.coefficients
    assert coefficients is not None
    coefficients = coefficients.to(x.dtype)
    if coefficients.shape[-1] != 1:
        coefficients = coefficients.repeat_interleave(nodes, -1)
    c = coefficients.unsqueeze(-1)
    before, now = x, series.matrix.times(x) / 2
    y = x + c[0] * before + c[1] * now
    for k in range(2, series.terms + 1):
        before, now = now, series.matrix.times(now) - before
        y = torch.addcmul(y, c[k], now)
    return y


class _Resolvent(torch.autograd.Function):
    """y = R x, R = (I + eta L)^-1.

    With u = R g: dx = u, deta = -u . L y, dL[i, j] = -eta u[i] . y[j]. Only y is kept, so that memory does not
    depend on the number of terms, and the same R is applied in the backward pass.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        eta: Tensor,
        scaled: Tensor,
        factors: Tensor,
        edge: Tensor,
        offsets: Tensor,
        terms: int,
    ) -> Tensor:
        nodes = len(x) // max(1, len(eta))
        square, scale = (over_nodes(row, nodes) for row in factors)
        if terms == 0:
            return x * scale
        column = edge[1]
        before, now = x, bag(scaled, x, column, offsets).div_(2)
        total = now.clone()
        for _ in range(1, terms):
            before, now = now, bag(scaled, now, column, offsets).addcmul_(before, square)
            total.add_(now)
        return total.mul_(2).add_(x).mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *tensors, ctx.terms = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, eta, scaled, factors, edge, offsets = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with full_precision(grad):
            u = _Resolvent.apply(grad.contiguous(), weight, eta, scaled, factors, edge, offsets, ctx.terms)
            nodes = len(y) // max(1, len(eta))
            to_weight = to_eta = None
            if needs[1]:
                eta_of = eta.repeat_interleave(nodes)[edge[0]]
                to_weight = -eta_of * dots(u, y, edge, offsets)
            if needs[2]:
                spread = (u * product(weight, y, edge, offsets)).sum(-1)
                to_eta = -spread.view(len(eta), nodes).sum(-1)
        return u, to_weight, to_eta, *[None] * 5

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *fixed: Any) -> tuple[Tensor, int]:
        if in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
            x = x.movedim(in_dims[0], 0)
            y = _Resolvent.apply(x.transpose(0, 1).flatten(1).contiguous(), *fixed)
            return y.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1), 0
        calls = [
            [v if dim is None else v.select(dim, k) for v, dim in zip((x, *fixed), in_dims, strict=True)]
            for k in range(info.batch_size)
        ]
        return torch.stack([_Resolvent.apply(*call) for call in calls]), 0
