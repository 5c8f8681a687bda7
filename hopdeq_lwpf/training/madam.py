"""Madam: an optimiser whose updates multiply (Bernstein et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

BLOCK = 1 << 15  # weights


class Madam(torch.optim.Optimizer):
    """w <- w exp(-lr sign(w) g'), with g' the gradient over its root mean square, clipped (Bernstein et al. 2020,
    "Learning compositional functions via multiplicative weight updates", algorithm 1).

    The mean square is a moving average with weight `beta`, divided by 1 - beta^t, as Adam's is, so that the first
    steps are not larger than the later ones. No weight changes its sign, and one that is 0 stays so: start biases
    from random numbers.

    params: tensors, or groups as every torch optimiser takes them. The defaults of lr, p_scale and g_bound are those
    that Goemaere et al. 2024 train hierarchical memories with.
    lr: how far the logarithm of a weight moves for a gradient of its usual size, > 0.
    p_scale: weights stay within +-p_scale times the root mean square of their tensor at the first step, > 0.
    g_bound: |g'| is clipped to it, > 0, so that no weight grows or shrinks by more than exp(lr g_bound) a step.
    beta: 0.999, from 0 to below 1. weight_decay: w <- (1 - lr weight_decay) w before the step, as AdamW does.

    Raises ValueError for settings out of range, RuntimeError for sparse or complex gradients.
    """

    def __init__(  # noqa: PLR0913 (settings of one optimiser)
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        *,
        p_scale: float = 1024.0,
        g_bound: float = 3.0,
        beta: float = 0.999,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr, "p_scale": p_scale, "g_bound": g_bound, "beta": beta, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One more group of parameters, with options of its own."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; the loss, if a closure computes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse or weight.is_complex():
            raise RuntimeError(
                "Madam needs dense, real gradients; use torch.optim.SparseAdam or Adam for others"
            )
        state = self.state[weight]
        if not state:
            state["step"] = 0
            state["square"] = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            state["limit"] = group["p_scale"] * float(weight.square().mean().sqrt())
        state["step"] += 1
        square = state["square"]
        if weight.device.type != "cpu" or not weight.is_contiguous():
            _move(weight, gradient, square, state, group)
            return
        # Blocks that fit into a cache: an optimiser's time is its passes through memory.
        flat = (tensor.view(-1).split(BLOCK) for tensor in (weight, gradient.contiguous(), square))
        for some_weight, some_gradient, some_square in zip(*flat, strict=True):
            _move(some_weight, some_gradient, some_square, state, group)


def _move(
    weight: Tensor, gradient: Tensor, square: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """The update of some weights, in place, with their gradient and the moving average of its square."""
    beta = group["beta"]
    square.mul_(beta).addcmul_(gradient, gradient, value=1 - beta)
    ratio = square.sqrt()
    torch.div(gradient, ratio, out=ratio).mul_(math.sqrt(1 - beta ** state["step"]))
    ratio.masked_fill_(square == 0, 0.0)  # no gradient so far: 0 / 0, where the weight is to stay
    ratio.clamp_(-group["g_bound"], group["g_bound"]).mul_(weight.sign()).mul_(-group["lr"]).exp_()
    if group["weight_decay"]:
        weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.mul_(ratio).clamp_(-state["limit"], state["limit"])


def _check(options: dict[str, Any]) -> None:
    limits = {"lr": "> 0", "p_scale": "> 0", "g_bound": "> 0", "weight_decay": ">= 0", "beta": "in [0, 1)"}
    for name, allowed in limits.items():
        value = options[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        good = number and value >= 0 and (value > 0 or not allowed.startswith("> "))
        if not good or (name == "beta" and value >= 1):
            raise ValueError(f"{name} must be a number {allowed}, got {value!r}")
