"""Attention as associative recall: heads of queries, keys and values over one retrieval, with its dials."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hopdeq_lwpf._types import ConvergenceWarning, Solution, check_float_tensor, plain, unknown, wide
from hopdeq_lwpf.forgetting import Forgetting, Keep, make_forgetting
from hopdeq_lwpf.models.association import Association, Heads
from hopdeq_lwpf.separation import Separation, make_separation
from hopdeq_lwpf.solvers.adjoints import Adjoint, make_adjoint
from hopdeq_lwpf.solvers.base import Solver, outside_of_compile
from hopdeq_lwpf.solvers.equilibrium import DETACHED, ON_FAILURE
from hopdeq_lwpf.solvers.registry import make_solver
from hopdeq_lwpf.solvers.solve import check_steps, check_stop, fixed_point, judge_step
from hopdeq_lwpf.solvers.termination import Termination


@dataclass(frozen=True)
class AttentionSettings:
    """The dials of attention layers, checked when made. See `convert_attention` for their meaning."""

    steps: int | None = 1  # attention as it was
    forgetting: None | str | Forgetting = None
    separation: str | Separation = "softmax"
    beta: None | float | Tensor = None  # the scale that the layer has
    inject: str = "start"
    inject_weight: float | Tensor = 1.0
    solver: str | Solver = "auto"
    stop: Termination = Termination()
    adjoint: str | Adjoint = "implicit"
    on_failure: str = "warn"

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_stop(self.stop)
        make_solver(self.solver)
        make_adjoint(self.adjoint)
        if self.on_failure not in ON_FAILURE:
            raise unknown("on_failure", self.on_failure, ON_FAILURE)
        self.retrieval(1.0, None)

    def retrieval(self, scale: float, heads: int | None) -> Association:
        """A retrieval of its own, with copies of what is learned; heads=None leaves their number open."""
        return Association(
            _for_heads("beta", scale if self.beta is None else self.beta, heads),
            separation=copy.deepcopy(make_separation(self.separation)),
            forgetting=_own_unit(self.forgetting),
            inject=self.inject,
            inject_weight=_for_heads("inject_weight", self.inject_weight, heads),
        )


@dataclass(frozen=True)
class AttentionSolution(Solution):
    """How the last call of an attention layer went: one problem a query and head, (B, H, L); no gradient.

    value: what each head read out, (B, H, L, dv). state: the query after the last update, (B, H, L, d).
    energy: of the state; None where the layer has none, and with steps=1, where it would cost as much again
        as the scores do.
    empty: True where the read-out is zero since every key was masked or forgotten; None where neither can be.
    """

    energy: Tensor | None = None
    empty: Tensor | None = None


class ConvertedAttention(nn.Module):
    """Base of the converted layers: queries, keys and values in, associations and read-out out.

    A step is q <- p(q) K within a head, with the keys on both sides and biases added to the scores; the values
    are read out after the last one (Ramsauer et al. 2021, with the keys as stored patterns). `steps`, `solver`,
    `stop`, `adjoint` and `on_failure` may be set at any time, the rest of the dials by `convert_attention` of
    the converted model.

    `last_solution`: the `AttentionSolution` of the last call, without gradient.
    """

    kind = ""
    num_heads: int
    scale: float
    retrieval: Association
    last_solution: AttentionSolution | None

    def dial(self, settings: AttentionSettings, scale: float, heads: int, label: str) -> None:
        """Take these settings. scale: beta where the settings give none. label: names the layer in warnings."""
        self.scale = scale
        self.label = label
        self.retrieval = settings.retrieval(scale, heads).train(self.training)
        self.steps = settings.steps
        self.solver = settings.solver
        self.stop = settings.stop
        self.adjoint = settings.adjoint
        self.on_failure = settings.on_failure
        self.last_solution = None
        self._told = False

    def associate(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read-out (B, H, L, dv) and associations after dropout (B, H, L, S).

        q (B, H, L, d), k (B, H, S, d), v (B, H, S, dv); mask: bool, True = ignore, bias: added to the scores,
        both broadcastable to (B, H, L, S) with the S spelled out.
        """
        if self.steps is None and torch.compiler.is_compiling():
            both: tuple[Tensor, Tensor] = outside_of_compile(self.associate, q, k, v, mask, bias)
            return both
        if not k.shape[2]:
            raise ValueError(
                f"key holds no entry, shape {tuple(k.shape)} for each head; at least one is needed"
            )
        if not q.numel():
            solution, weights, x = _nothing(q), q @ k.transpose(-2, -1), None
        else:
            x = self.retrieval.prepare(Heads(q, k, v, mask, bias))
            solution, weights = self._k_steps(x) if self.steps is not None else self._equilibrium(x)
        dropped = self.drop(weights)
        value = dropped.to(v.dtype) @ v
        self._record(solution, value, weights, x, mask)
        return value, dropped

    def drop(self, weights: Tensor) -> Tensor:
        """Dropout of the associations at the read-out."""
        raise NotImplementedError(f"{type(self).__name__} must override drop(weights)")

    def _k_steps(self, x: Any) -> tuple[Solution, Tensor]:
        """k - 1 updates, and the weights of the k-th application, which also read out."""
        steps = cast(int, self.steps)
        before = x.start
        for _ in range(steps - 1):
            before = self.retrieval(before, x)
        after, weights = self.retrieval.step(before, x)
        result, residual = judge_step(wide(before.detach()), wide(after.detach()), self.stop)
        count = torch.full_like(result, steps)
        return Solution(after, after, result, residual, count, count.clone()), weights

    def _equilibrium(self, x: Any) -> tuple[Solution, Tensor]:
        z0, note = x.start, ""
        if z0.requires_grad and torch.is_grad_enabled() and make_adjoint(self.adjoint).drops_z0:
            z0, note = z0.detach(), DETACHED
            if self.retrieval.inject != "input" and not self._told:
                self._told = True
                # Without the name of the layer, so that Python shows it once for a whole model.
                warnings.warn(
                    f"{DETACHED}, so the weights that make the query are not trained. Use inject='input', "
                    "steps=k or adjoint='unrolled' to train them.",
                    UserWarning,
                    stacklevel=4,
                )
        options = {"solver": self.solver, "stop": self.stop, "adjoint": self.adjoint}
        solution = fixed_point(self.retrieval, x, z0, read_out=True, **options)  # type: ignore[arg-type]
        return dataclasses.replace(solution, value=solution.state, note=note), solution.value

    def _record(
        self,
        solution: Solution,
        value: Tensor,
        weights: Tensor,
        x: Any,
        mask: Tensor | None,
    ) -> None:
        """Keep what happened, and say what failed."""
        f = self.retrieval
        energy = empty = None
        with torch.no_grad():
            if x is not None and self.steps != 1 and f.has_energy:
                energy = plain(f.energy(solution.state.detach(), x).detach())
            if mask is not None or not isinstance(f.forgetting, Keep):
                empty = plain(weights.detach() == 0).all(-1)
        self.last_solution = AttentionSolution(
            value=plain(value.detach()),
            state=plain(solution.state.detach()),
            result=plain(solution.result),
            residual=plain(solution.residual),
            steps=plain(solution.steps),
            evaluations=plain(solution.evaluations),
            adjoint=solution.adjoint,
            note=solution.note,
            energy=energy,
            empty=empty,
        )
        if self.steps is not None or self.on_failure == "ignore":
            return
        message = solution.failure()
        if message is None:
            return
        if self.on_failure == "raise":
            solution.require()
        warnings.warn(f"{self.label}: {message}", ConvergenceWarning, stacklevel=4)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_solution": None}

    def extra_repr(self) -> str:
        return f"steps={self.steps}, solver={self.solver!r}, adjoint={self.adjoint!r}, on_failure={self.on_failure!r}"


def split_mask(name: str, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(ignored, bias) of a mask as torch takes it: bool, True = ignore; or float, added to the scores.

    Entries of -inf are ignored. A float mask without other entries than 0 and -inf is no bias.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor (True = ignore) or a floating-point one, got {kind}")
    if mask.dtype == torch.bool:
        return mask, None
    ignored = mask.detach() == -torch.inf
    # Whether a bias is left depends on the numbers, which a compiler must not ask for, and meta tensors lack.
    if mask.requires_grad or torch.compiler.is_compiling() or mask.is_meta:
        return ignored, mask.masked_fill(ignored, 0.0)
    bias = mask.masked_fill(ignored, 0.0)
    return ignored, bias if bool(bias.any()) else None


def either(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """What any of the two masks ignores."""
    if first is None or second is None:
        return second if first is None else first
    return first | second


def total(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum of what is there."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(L, S) bool, True above the diagonal, as torch's scaled_dot_product_attention aligns it."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)


def _nothing(q: Tensor) -> Solution:
    """The solution of no problem: an empty batch, or no queries."""
    state = q.detach()
    codes = torch.zeros(q.shape[:-1], dtype=torch.int64, device=q.device)
    return Solution(state, state, codes, wide(state).sum(-1), codes, codes.clone())


def _for_heads(name: str, value: float | Tensor, heads: int | None) -> float | Tensor:
    """A number, or a copy of the tensor."""
    if not isinstance(value, Tensor):
        return value
    check_float_tensor(name, value)
    if value.numel() != 1 and (value.ndim != 1 or heads not in (None, value.numel())):
        expected = "(H,)" if heads is None else f"({heads},)"
        raise ValueError(
            f"{name} must be a number or have one entry a head, {expected}, got {tuple(value.shape)}; "
            "convert layers of different numbers of heads one by one with only="
        )
    own = value.detach().clone()
    return nn.Parameter(own, value.requires_grad) if isinstance(value, nn.Parameter) else own


def _own_unit(forgetting: None | str | Forgetting) -> Forgetting:
    """A unit for one layer; a generator of noise stays the same for all, or they would draw alike."""
    given = make_forgetting(forgetting)
    unit = copy.deepcopy(given)
    if getattr(given, "generator", None) is not None:
        unit.generator = given.generator
    return unit
