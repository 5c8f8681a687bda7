"""Weights that are computed (torch's parametrizations), computed once for a whole solve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.utils import parametrize


@contextmanager
def frozen_weights(module: nn.Module) -> Iterator[None]:
    """Within this block every parametrized weight of `module` is one tensor, computed on entry.

    A solve needs a fixed map, and `torch.nn.utils.parametrizations.spectral_norm` is none: in training mode each
    access to the weight makes a power iteration and changes it. On a tanh layer of width 256 whose weights had
    moved by a tenth, a solve to 1e-6 took 163 steps instead of 19, and the residual of what it returned was 4e-4
    at the next evaluation. Weights that do stay the same, such as weight_norm's, are computed once instead of
    at every evaluation.

    `torch.nn.utils.parametrize.cached()` alone loses the gradient of the weights without a word: the solve
    runs without gradients, so what it caches has none. Here they are computed first, with the gradients of the
    surrounding code. Second derivatives through an implicit adjoint are refused within the block, since f then
    closes over a tensor that was computed before; use spectral_norm in evaluation mode for those.

    Nothing happens to a module without parametrizations. The cache is torch's: one for the process, so two
    threads must not enter blocks at the same time.
    """
    with parametrize.cached():
        for part in module.modules():
            if parametrize.is_parametrized(part):
                for name in part.parametrizations:  # type: ignore[union-attr]
                    getattr(part, name)
        yield


def has_moving_weights(module: nn.Module) -> bool:
    """Whether a weight may change with each access: a parametrization that keeps buffers, in training mode."""
    return any(
        parametrization.training and next(parametrization.buffers(), None) is not None
        for part in module.modules()
        if parametrize.is_parametrized(part)
        for parametrization in part.parametrizations.children()  # type: ignore[union-attr]
    )
