"""A penalty that keeps the Jacobian of f small at the equilibrium, so that solves stay short while training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hopdeq_lwpf._types import Context, State
from hopdeq_lwpf.solvers.base import check_count
from hopdeq_lwpf.solvers.view import FlatFunction, StateView


def jacobian_penalty(
    f: Callable[[State, Context], State],
    z: State,
    x: Context,
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hutchinson's estimate of |J|_F^2 / n for each problem, J = df/dz at (z, x), n numbers a problem.

    Jacobian regularisation of Bai et al. 2021 (arXiv 2106.14342): the mean over `samples` of |e^T J|^2 / n
    with e ~ N(0, I), unbiased since E[e e^T] = I. Add `gamma * jacobian_penalty(f, z, x).mean()` to the loss.

    z: a state as `fixed_point` takes it, (*batch, *state) or a pytree; returns (*batch), in float32 or wider.
    x: what f gets as its second argument (for a layer whose f has `prepare`: the prepared context).
    samples: vector-Jacobian products; 1 is what the paper trains with, more lower the variance of a figure
        that is to be read. generator: for the noise, on the device of z.

    Differentiable in whatever f uses, and in z where z requires grad: with an Equilibrium's output the gradient
    also runs through the equilibrium, as the total derivative of the penalty should. The published code leaves
    that part out; `z.detach()` gives its gradient and saves the second adjoint solve. With gradients disabled
    the value alone is computed, without a graph.

    Raises ValueError for samples < 1; TypeError or ValueError for a state that is none.
    """
    check_count("samples", samples, 1)
    view = StateView.of(f, z)
    flat = view.flatten(z)
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        point = flat if keep_graph and flat.requires_grad else flat.detach().requires_grad_()
        image = FlatFunction(f, x, view, flat.device.type)(point)
        total = torch.zeros_like(flat.detach()[:, :1].sum(1))
        for _ in range(samples if image.requires_grad else 0):
            noise = torch.randn(flat.shape, dtype=flat.dtype, device=flat.device, generator=generator)
            (product,) = torch.autograd.grad(
                image, point, noise, retain_graph=True, create_graph=keep_graph, allow_unused=True
            )
            if product is not None:
                total = total + product.square().sum(-1)
    return (total / (samples * max(flat.shape[1], 1))).reshape(view.batch_shape)
