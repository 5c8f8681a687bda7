"""Diffusion along a graph for a time eta: the heat kernel exp(-eta L) and two approximations of it.

All are symmetric matrices with eigenvalues in [0, 1] (explicit Euler: [-1, 1]) that leave constants on a component as
they are, where L is combinatorial, and D^1/2 times constants where it is normalized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hopdeq_lwpf._layout import check_number, lowest
from hopdeq_lwpf._types import check_float_tensor, plain, unknown, wide
from hopdeq_lwpf.graphs.chebyshev import Series, heat_series, largest, resolvent_series
from hopdeq_lwpf.graphs.laplacian import Laplacian
from hopdeq_lwpf.graphs.layout import broadcast_samples, check_flat, check_input, reshaped
from hopdeq_lwpf.graphs.sparse import SparseMatrix, full_precision, widest

# Units of rounding by which a step may pass the limit of stability: it may have been computed from the bound.
ROUNDINGS = 8


class Operator(NamedTuple):
    """A symmetric matrix g(L) a sample; `operator(x)` applies it.

    matrix: g(L) itself (*batch, N, N); or what a sparse product applies `power` times; or a series.
    """

    matrix: Tensor | SparseMatrix | Series
    nodes: int
    batch: tuple[int, ...]
    power: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """g(L) x for x (*batch, N, c), in the dtype of x, computed in float32 or wider."""
        check_input(x, self.batch, self.nodes)
        with full_precision(x):
            wider = x.to(torch.promote_types(self.dtype, wide(x).dtype))
            if isinstance(self.matrix, Tensor):
                return (self.matrix.to(wider.dtype) @ wider).to(x.dtype)
            y = wider.flatten(0, -2)
            if isinstance(self.matrix, Series):
                y = self.matrix.times(y, self.nodes)
            else:
                for _ in range(self.power):
                    y = self.matrix.times(y)
            return y.view(x.shape).to(x.dtype)

    @property
    def is_sparse(self) -> bool:
        """Whether it is applied by sparse products."""
        return not isinstance(self.matrix, Tensor)

    @property
    def dtype(self) -> torch.dtype:
        """What the operator was made in."""
        matrix = self.matrix.matrix if isinstance(self.matrix, Series) else self.matrix
        return matrix.dtype if isinstance(matrix, Tensor) else matrix.weight.dtype

    def to_dense(self) -> Tensor:
        """g(L): (*batch, N, N)."""
        if isinstance(self.matrix, Tensor):
            return self.matrix
        device = (self.matrix.matrix if isinstance(self.matrix, Series) else self.matrix).edge.device
        identity = torch.eye(self.nodes, dtype=self.dtype, device=device)
        return self(identity.expand(*self.batch, -1, -1))

    def expand(self, batch: Sequence[int]) -> Operator:
        """The operator with exactly this batch shape, to which its own broadcasts."""
        batch = tuple(batch)
        if isinstance(self.matrix, Tensor):
            return self._replace(matrix=self.matrix.expand(*batch, self.nodes, self.nodes), batch=batch)
        if batch == self.batch:
            return self
        edge = (self.matrix.matrix if isinstance(self.matrix, Series) else self.matrix).edge
        samples = broadcast_samples(self.batch, batch, edge.device)
        return self._replace(matrix=self.matrix.pick(samples, self.nodes), batch=batch)

    def reshape(self, batch: Sequence[int]) -> Operator:
        """The same operators in another batch shape; one dimension may be -1."""
        batch = reshaped(self.batch, tuple(batch))
        if isinstance(self.matrix, Tensor):
            return self._replace(matrix=self.matrix.reshape(*batch, self.nodes, self.nodes), batch=batch)
        return self._replace(batch=batch)

    def select(self, rows: Tensor) -> Operator:
        """Those at `rows` (R,) int64 of a batch of one dimension: (P,) to (R,)."""
        check_flat(self.batch)
        if isinstance(self.matrix, Tensor):
            return self._replace(matrix=self.matrix.index_select(0, rows), batch=(len(rows),))
        return self._replace(matrix=self.matrix.pick(rows, self.nodes), batch=(len(rows),))


def heat_kernel(laplacian: Laplacian, eta: float | Tensor) -> Operator:
    """exp(-eta L), to the rounding of the dtype.

    eta: time >= 0, one for all or one a graph (*batch,). Dense: `torch.linalg.matrix_exp` in float64, since the
    squarings in it double an error each (float32 erred by 1.7e-6 at eta = 1 and 1.4e-5 at 100 on 256 nodes), with a
    gradient that is right at repeated eigenvalues, which graphs have as a rule. Sparse: a Chebyshev
    series, whose number of products grows as sqrt(eta bound), and as eta bound where that is small; gradients keep the
    input of each product.
    """
    eta = _times(laplacian, eta)
    if isinstance(laplacian.matrix, SparseMatrix):
        series = heat_series(laplacian.matrix, eta.reshape(-1), laplacian.bound.reshape(-1), laplacian.nodes)
        return Operator(series, laplacian.nodes, laplacian.batch)
    with full_precision(eta):
        dtype = widest(eta.device)
        power = -eta.to(dtype)[..., None, None] * laplacian.matrix.to(dtype)
        heat = _Exponential.apply(power).to(laplacian.dtype) if power.numel() else power
    return Operator(heat, laplacian.nodes, laplacian.batch)


def implicit_euler(laplacian: Laplacian, eta: float | Tensor) -> Operator:
    """(I + eta L)^-1, to the rounding of the dtype.

    eta: time >= 0, one for all or one a graph (*batch,). Dense: the inverse from a Cholesky factor, which is
    exactly symmetric and took 2.8 ms for 512 nodes (a general inverse 4.7). Sparse: a Chebyshev series, whose number
    of products grows as sqrt(1 + eta bound); its gradient keeps the result only, whatever that number is.
    """
    eta = _times(laplacian, eta)
    if isinstance(laplacian.matrix, SparseMatrix):
        series = resolvent_series(
            laplacian.matrix, eta.reshape(-1), laplacian.bound.reshape(-1), laplacian.nodes
        )
        return Operator(series, laplacian.nodes, laplacian.batch)
    with full_precision(eta):
        identity = torch.eye(laplacian.nodes, dtype=laplacian.dtype, device=eta.device)
        inverse = _Inverse.apply(identity + eta[..., None, None] * laplacian.matrix)
    return Operator(inverse, laplacian.nodes, laplacian.batch)


def explicit_euler(laplacian: Laplacian, eta: float | Tensor, steps: int = 1) -> Operator:
    """(I - (eta / steps) L)^steps: the time eta in equal steps, which tends to the heat kernel as they grow.

    eta: time >= 0, one for all or one a graph (*batch,). Raises ValueError where eta / steps is above 2 / bound, since
    steps beyond 2 / (largest eigenvalue) amplify what they should smooth.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    eta = _times(laplacian, eta)
    _check_stable(laplacian, eta, steps)
    step = eta / steps
    if isinstance(laplacian.matrix, SparseMatrix):
        weight, edge, offsets = laplacian.matrix
        of_edge = step.reshape(-1)[edge[0] // max(laplacian.nodes, 1)]
        sparse = SparseMatrix((edge[0] == edge[1]).to(weight.dtype) - of_edge * weight, edge, offsets)
        return Operator(sparse, laplacian.nodes, laplacian.batch, steps)
    with full_precision(eta):
        identity = torch.eye(laplacian.nodes, dtype=laplacian.dtype, device=eta.device)
        once = identity - step[..., None, None] * laplacian.matrix
        return Operator(torch.linalg.matrix_power(once, steps), laplacian.nodes, laplacian.batch)


OPERATORS = ("heat", "implicit", "explicit")


def diffusion_operator(kind: str, laplacian: Laplacian, eta: float | Tensor, steps: int = 1) -> Operator:
    """`heat_kernel`, `implicit_euler` or `explicit_euler` by the names "heat", "implicit" and "explicit".

    steps: of "explicit"; the others make one and raise ValueError for more.
    """
    if kind not in OPERATORS:
        raise unknown("diffusion operator", kind, OPERATORS)
    if kind == "explicit":
        return explicit_euler(laplacian, eta, steps)
    if isinstance(steps, bool) or steps != 1:
        raise ValueError(
            f"steps={steps!r} needs the operator 'explicit'; {kind!r} has no steps: leave steps at 1"
        )
    return heat_kernel(laplacian, eta) if kind == "heat" else implicit_euler(laplacian, eta)


def _times(laplacian: Laplacian, eta: float | Tensor) -> Tensor:
    """eta as one time a graph (*batch,), in the dtype of the Laplacian."""
    if isinstance(eta, Tensor):
        check_float_tensor("eta", eta)
        if eta.device != laplacian.bound.device:
            raise ValueError(
                f"eta is on {eta.device} but the graph on {laplacian.bound.device}; move one with .to()"
            )
        if eta.shape not in ((), laplacian.batch):
            raise ValueError(
                f"eta must be a number, a scalar tensor or have one entry a graph, {laplacian.batch}, got shape "
                f"{tuple(eta.shape)}"
            )
    if not isinstance(eta, Tensor) or eta.numel():
        check_number("eta", eta)
        if lowest(eta) < 0:
            raise ValueError(f"eta must be >= 0, got {eta!r}; diffusion cannot run backwards")
    if not isinstance(eta, Tensor):
        return laplacian.bound.new_full(laplacian.batch, float(eta))
    return eta.to(laplacian.dtype).expand(laplacian.batch)


def _check_stable(laplacian: Laplacian, eta: Tensor, steps: int) -> None:
    step = plain(eta.detach()).to(widest(eta.device)) / steps
    bound = plain(laplacian.bound).to(widest(eta.device))
    slack = 1 + ROUNDINGS * torch.finfo(laplacian.dtype).eps
    over = step * bound > 2 * slack
    if not bool(over.any()):
        return
    worst = int((step * bound).nan_to_num(0.0).argmax())
    size, limit = (
        float(step.expand_as(over).flatten()[worst]),
        2 / float(bound.expand_as(over).flatten()[worst]),
    )
    enough = math.ceil(largest(eta.to(widest(eta.device)) * bound) / (2 * slack))
    raise ValueError(
        f"the step eta / steps = {size:.4g} is above 2 / bound = {limit:.4g} of this graph, where explicit Euler grows "
        f"instead of smoothing; take steps={enough} or more, a smaller eta, or the operator 'implicit' or 'heat'"
    )


class _Inverse(torch.autograd.Function):
    """The inverse R of symmetric positive definite matrices, NaN for a sample that has none; dA = -R G R."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        failed = failed.ne(0)[..., None, None]
        # cholesky_inverse raises for the whole batch where one factor has a zero on its diagonal.
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return torch.cholesky_inverse(torch.where(failed, identity, factor)).masked_fill(failed, math.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        with full_precision(grad):
            return -inverse @ grad @ inverse


class _Exponential(torch.autograd.Function):
    """exp(A) of symmetric A (*batch, N, N), exactly 0 between nodes that no path joins.

    With A = V diag(a) V^T the gradient is V (Gamma * (V^T G V)) V^T with Gamma_ij = (e^a_i - e^a_j) / (a_i - a_j), and
    e^a_i where both are the same (Daleckii & Krein 1965): unlike that of torch.linalg.eigh it divides by no difference
    of eigenvalues. torch's gradient of the exponential is the exponential of a matrix twice the size: with it forward
    and backward took 158 ms for 256 nodes instead of 24 (one thread). Here only second derivatives pay for that.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        # In float64 torch.linalg.matrix_exp errs by up to 1e-10 where the norm lies between .01 and .1 and by 2e-15 at
        # 1, to which a node of its own with the exponent -1 raises it.
        nodes = matrix.shape[-1]
        apart = torch.arange(nodes + 1, device=matrix.device) == nodes
        raised = functional.pad(matrix, (0, 1, 0, 1)) - torch.diag(apart.to(matrix.dtype))
        exponential = torch.linalg.matrix_exp(raised)[..., :nodes, :nodes]
        return (exponential + exponential.mT) / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        grad = (grad + grad.mT) / 2
        with full_precision(grad):
            if not torch.is_grad_enabled():
                return _derivative(matrix, grad)
            # The derivative is linear in its direction, whose norm of 1 serves as the node above.
            norm = grad.detach().abs().sum(-1).amax(-1)[..., None, None]
            norm = norm.masked_fill(norm == 0, 1.0)
            corner = torch.cat([torch.zeros_like(matrix), matrix], -1)
            block = torch.cat([torch.cat([matrix, grad / norm], -1), corner], -2)
            nodes = matrix.shape[-1]
            return torch.linalg.matrix_exp(block)[..., :nodes, nodes:] * norm


def _derivative(matrix: Tensor, direction: Tensor) -> Tensor:
    """The derivative of exp at a symmetric matrix in a symmetric direction; NaN for a sample that is not finite."""
    broken = ~matrix.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    a, vectors = torch.linalg.eigh(matrix.masked_fill(broken, 0.0))
    gap = (a.unsqueeze(-1) - a.unsqueeze(-2)).abs()
    ratio = torch.where(gap > 0, -torch.expm1(-gap) / gap.masked_fill(gap == 0, 1.0), 1.0)
    gamma = torch.maximum(a.unsqueeze(-1), a.unsqueeze(-2)).exp() * ratio
    derivative = vectors @ (gamma * (vectors.mT @ direction @ vectors)) @ vectors.mT
    return derivative.masked_fill(broken, math.nan)
