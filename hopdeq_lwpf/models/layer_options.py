"""The options of the Hopfield layers, checked once, and the widths that follow from them."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.forgetting import Forgetting
from hopdeq_lwpf.retrieval import INJECT
from hopdeq_lwpf.separation import Separation
from hopdeq_lwpf.solvers.adjoints import Adjoint
from hopdeq_lwpf.solvers.base import Solver, check_count
from hopdeq_lwpf.solvers.solve import check_steps
from hopdeq_lwpf.solvers.termination import Termination

# What other libraries call what is here.
ELSEWHERE = {
    "scaling": "beta",
    "update_steps_max": "steps, which counts softmaxes: update_steps_max + 1",
    "update_steps_eps": "stop=Termination(rtol=...)",
    "embed_dim": "input_size",
    "kdim": "stored_pattern_size",
    "vdim": "pattern_projection_size",
}


@dataclass(frozen=True)
class HopfieldOptions:
    """Options of `Hopfield`; those of the other layers add to them.

    Widths (None: what stands behind it): input_size, of the state patterns and of all else that is not given;
    hidden_size, of the association space for each head (input_size / num_heads); output_size (input_size);
    pattern_size, of the projected values for each head (hidden_size); stored_pattern_size and
    pattern_projection_size, of those inputs (input_size).
    num_heads: heads in parallel, each with its own projections.

    beta: None is 1/sqrt(hidden_size), 1 where nothing is projected; a number, a scalar tensor, or one entry a
        head; a Parameter is learned. learn_beta: make it one, an entry a head.
    steps: softmaxes; 1 is attention, k makes k - 1 state updates among the projected stored patterns before
        the read-out, None solves to equilibrium with `solver`, `stop`, `adjoint` and `on_failure` of
        `Equilibrium`.
    forgetting, separation, mask_in_loop, inject_weight: see `Retrieval`. inject: None is "input" with steps=None
        for states that are learned (pooling) or static, "start" otherwise.

    normalize_stored_pattern, normalize_state_pattern, normalize_pattern_projection: layer norm of each input,
        with scale and shift where `_affine`, which has no effect without it; `_eps` as `nn.LayerNorm` has it.
    normalize_hopfield_space: layer norm of the projected state and stored patterns over each head's width,
        before the first step.
    stored_pattern_as_static, state_pattern_as_static, pattern_projection_as_static: no projection; the input
        must have width hidden_size (pattern_size for the last), and every head gets it whole.
    pattern_projection_as_connected: the values pass the projection of the stored patterns before their own
        (Ramsauer et al. 2021, eq. 10); without effect where the stored patterns are static.
    batch_first: (B, N, width), else (N, B, width).
    association_activation: applied to the output: a function, or its name in torch or torch.nn.functional.
    dropout: on the association of the read-out only, so that the dynamics stay a fixed map.
    input_bias: bias of the projections. concat_bias_pattern: one more stored pattern and value, learned, in
        each head. add_zero_association: one more of zeros. disable_out_projection: return the heads side by
        side, num_heads * pattern_size wide.
    """

    elsewhere: ClassVar[Mapping[str, str]] = ELSEWHERE

    input_size: int | None = None
    hidden_size: int | None = None
    output_size: int | None = None
    pattern_size: int | None = None
    num_heads: int = 1
    beta: float | Tensor | Sequence[float] | None = None
    learn_beta: bool = False
    steps: int | None = 1
    forgetting: None | str | Forgetting = None
    separation: str | Separation = "softmax"
    mask_in_loop: bool = True
    inject: str | None = None
    inject_weight: float | Tensor = 1.0
    solver: str | Solver = "auto"
    stop: Termination = Termination()  # noqa: RUF009 (frozen)
    adjoint: str | Adjoint = "implicit"
    on_failure: str = "warn"
    normalize_stored_pattern: bool = True
    normalize_stored_pattern_affine: bool = True
    normalize_stored_pattern_eps: float = 1e-5
    normalize_state_pattern: bool = True
    normalize_state_pattern_affine: bool = True
    normalize_state_pattern_eps: float = 1e-5
    normalize_pattern_projection: bool = True
    normalize_pattern_projection_affine: bool = True
    normalize_pattern_projection_eps: float = 1e-5
    normalize_hopfield_space: bool = False
    normalize_hopfield_space_affine: bool = False
    normalize_hopfield_space_eps: float = 1e-5
    stored_pattern_as_static: bool = False
    state_pattern_as_static: bool = False
    pattern_projection_as_static: bool = False
    pattern_projection_as_connected: bool = False
    stored_pattern_size: int | None = None
    pattern_projection_size: int | None = None
    batch_first: bool = True
    association_activation: None | str | Callable[[Tensor], Tensor] = None
    dropout: float = 0.0
    input_bias: bool = True
    concat_bias_pattern: bool = False
    add_zero_association: bool = False
    disable_out_projection: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"{field.name} must be True or False, got {value!r}")
            if field.name.endswith(("_size", "num_heads", "quantity")) and value is not None:
                check_count(field.name, value, 1)
            if field.name.endswith("_eps") and not (isinstance(value, (int, float)) and value > 0):
                raise ValueError(f"{field.name} must be a number > 0, got {value!r}")
        check_steps(self.steps)
        number = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        if not number or not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout must be a number in [0, 1], got {self.dropout!r}")
        if self.inject is not None and self.inject not in INJECT:
            raise unknown("inject", self.inject, INJECT)
        if self.input_size is None and not self.unprojected:
            raise ValueError(
                "input_size is needed unless nothing is projected (stored_pattern_as_static, "
                "state_pattern_as_static, pattern_projection_as_static and disable_out_projection)"
            )
        split = self.input_size is not None and self.hidden_size is None and not self.unprojected
        if split and self.input_size % self.num_heads:  # type: ignore[operator]
            raise ValueError(
                f"input_size {self.input_size} is not a multiple of num_heads {self.num_heads}: give hidden_size, "
                "the width of each head"
            )
        self._check_extras()

    def _check_extras(self) -> None:
        connected = self.pattern_projection_as_connected and not self.stored_pattern_as_static
        if connected and self.stored_width != self.projection_width:
            raise ValueError(
                "pattern_projection_as_connected sends the values through the projection of the stored patterns: "
                f"stored_pattern_size {self.stored_width} and pattern_projection_size {self.projection_width} "
                "must be equal"
            )
        if connected and self.pattern_projection_as_static and self.value_width != self.width:
            raise ValueError(
                f"connected values without a projection of their own have hidden_size {self.width}; got "
                f"pattern_size {self.value_width}"
            )
        widths = {
            "normalize_stored_pattern": self.stored_width,
            "normalize_state_pattern": self.state_width,
            "normalize_pattern_projection": self.projection_width,
            "normalize_hopfield_space": self.width,
            "concat_bias_pattern": None if self.value_width is None else self.width,
        }
        for name, width in widths.items():
            if getattr(self, name) and width is None:
                raise ValueError(
                    f"{name} needs to know a width: give input_size or hidden_size, or {name}=False"
                )

    @property
    def unprojected(self) -> bool:
        """Whether nothing is projected, so that widths need not be known."""
        return (
            self.stored_pattern_as_static
            and self.state_pattern_as_static
            and self.pattern_projection_as_static
            and self.disable_out_projection
        )

    @property
    def width(self) -> int | None:
        """d: of the association space of a head; None where any will do."""
        if self.hidden_size is not None or self.input_size is None:
            return self.hidden_size
        return self.input_size if self.unprojected else self.input_size // self.num_heads

    @property
    def value_width(self) -> int | None:
        """dv: of the values of a head."""
        return self.width if self.pattern_size is None else self.pattern_size

    @property
    def state_width(self) -> int | None:
        """Of the state patterns as they come in."""
        return self.width if self.state_pattern_as_static else self.input_size

    @property
    def stored_width(self) -> int | None:
        """Of the stored patterns as they come in."""
        if self.stored_pattern_as_static:
            return self.width
        return self.input_size if self.stored_pattern_size is None else self.stored_pattern_size

    @property
    def projection_width(self) -> int | None:
        """Of the pattern projections as they come in."""
        connected = self.pattern_projection_as_connected and not self.stored_pattern_as_static
        if self.pattern_projection_as_static and not connected:
            return self.value_width
        return self.input_size if self.pattern_projection_size is None else self.pattern_projection_size

    def inverse_temperature(self) -> float | Tensor:
        """beta as a number, a scalar tensor, (H,) or a Parameter."""
        beta = self.beta
        if beta is None:
            beta = 1.0 if self.unprojected or self.width is None else 1 / math.sqrt(self.width)
        elif isinstance(beta, (list, tuple)):
            beta = torch.tensor([float(entry) for entry in beta])
        if isinstance(beta, Tensor) and tuple(beta.shape) not in ((), (1,), (self.num_heads,)):
            raise ValueError(
                f"beta must be a number or have one entry a head, ({self.num_heads},), got {tuple(beta.shape)}"
            )
        if not self.learn_beta or isinstance(beta, nn.Parameter):
            return beta  # type: ignore[return-value]
        start = beta.detach() if isinstance(beta, Tensor) else torch.tensor(float(beta))  # type: ignore[arg-type]
        return nn.Parameter(start.expand(self.num_heads).clone())

    def dials(self) -> dict[str, Any]:
        """What the fixed-point function of the states is made with, beside beta."""
        return {
            "separation": self.separation,
            "forgetting": self.forgetting,
            "mask_in_loop": self.mask_in_loop,
            "inject": self.injection(learned_state=False),
            "inject_weight": self.inject_weight,
        }

    def injection(self, learned_state: bool) -> str:
        """Where the query enters."""
        if self.inject is not None:
            return self.inject
        return "input" if self.steps is None and (learned_state or self.state_pattern_as_static) else "start"


@dataclass(frozen=True)
class PoolingOptions(HopfieldOptions):
    """Options of `HopfieldPooling`: those of `HopfieldOptions`, and

    quantity: how many state patterns are learned. trainable: False keeps them at their random start.
    """

    quantity: int = 1
    trainable: bool = True


@dataclass(frozen=True)
class LookupOptions(PoolingOptions):
    """Options of `HopfieldLayer`: those of `HopfieldOptions`, and

    quantity: how many stored patterns are learned. trainable: False keeps them at their random start.
    lookup_weights_as_separated: learn the values apart from the stored patterns.
    lookup_targets_as_trainable: False keeps those at their random start.
    """

    lookup_weights_as_separated: bool = False
    lookup_targets_as_trainable: bool = True


Options = TypeVar("Options", bound=HopfieldOptions)


def make_options(kind: type[Options], arguments: tuple[Any, ...], options: dict[str, Any]) -> Options:
    """The options object for what a layer was called with; a name that is not known is an error that helps."""
    names = [field.name for field in dataclasses.fields(kind)]
    for name in options:
        if name in kind.elsewhere:
            raise ValueError(
                f"option {name!r} is called {kind.elsewhere[name]} here; from_hflayers(...) translates hflayers' names"
            )
        if name not in names:
            raise unknown("option", name, names)
    return kind(*arguments, **options)


Init = TypeVar("Init", bound=Callable[..., None])


def takes(kind: type[HopfieldOptions]) -> Callable[[Init], Init]:
    """Gives an __init__(self, *arguments, **options) the signature of the options, for help() and editors."""

    def decorate(init: Init) -> Init:
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [itself, *inspect.signature(kind).parameters.values()]
        init.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return init

    return decorate
