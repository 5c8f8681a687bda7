"""convert_attention(): the attention of any model as associative recall, with its trained weights."""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from hopdeq_lwpf.forgetting import Forgetting
from hopdeq_lwpf.models.attention import AttentionSettings, ConvertedAttention
from hopdeq_lwpf.models.converted import (
    ConvertedMultiheadAttention,
    ConvertedTimmAttention,
    computes_the_same,
    has_computed_weights,
    is_multihead,
    is_timm,
    is_timms_own,
)
from hopdeq_lwpf.separation import Separation
from hopdeq_lwpf.solvers.adjoints import Adjoint
from hopdeq_lwpf.solvers.base import Solver
from hopdeq_lwpf.solvers.termination import Termination

ROOT = "(the model itself)"
KNOWN = "known are nn.MultiheadAttention and timm's Attention"


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer that was converted. kind: what it was; width: of the model, head_width: of queries and keys."""

    name: str
    kind: str
    heads: int
    width: int
    head_width: int


@dataclass(frozen=True)
class SkippedLayer:
    """One layer that looks like attention and was left as it was, with the reason."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_attention` did; `str` gives it as lines of text.

    A layer that the model holds under several names stands here under each. Attention that is not a module, such
    as a call of scaled_dot_product_attention, is not seen.
    """

    converted: tuple[ConvertedLayer, ...]
    skipped: tuple[SkippedLayer, ...]

    def __str__(self) -> str:
        lines = [f"converted: {len(self.converted)}"]
        lines += [
            f"  {part.name or ROOT}: {part.kind}, {part.heads} heads of width {part.head_width}, "
            f"model width {part.width}"
            for part in self.converted
        ]
        lines.append(f"not converted: {len(self.skipped)}")
        lines += [f"  {part.name or ROOT}: {part.kind}, {part.reason}" for part in self.skipped]
        return "\n".join(lines)


def convert_attention(  # noqa: PLR0913 (one call with keywords is the point)
    model: nn.Module,
    *,
    steps: int | None = 1,
    forgetting: None | str | Forgetting = None,
    separation: str | Separation = "softmax",
    beta: None | float | Tensor = None,
    inject: str = "start",
    inject_weight: float | Tensor = 1.0,
    solver: str | Solver = "auto",
    stop: Termination = Termination(),  # noqa: B008 (frozen)
    adjoint: str | Adjoint = "implicit",
    on_failure: str = "warn",
    only: None | str | Sequence[str] = None,
    exclude: None | str | Sequence[str] = None,
) -> nn.Module:
    """A deep copy of `model` whose attention is associative recall; the original stays as it was.

    Converted are nn.MultiheadAttention, alone or in nn.Transformer's layers, and timm's Attention, with their
    parameters under their names, so that each loads the other's state_dict. In each head the keys are the
    stored patterns: q <- p(q) K, and the values are read out at the end (Ramsauer et al. 2021, eq. 10). A model
    that was converted before gets the new dials, without those that it had.

    steps: how many softmaxes. 1, the default, is the attention that it was: with the other defaults outputs and
        gradients are the same to rounding; k makes k - 1 updates first; None solves to equilibrium.
    forgetting, separation, inject, inject_weight: see `hopdeq_lwpf.models.Retrieval`. Every layer gets its own
        copy of what is learned.
    beta: None keeps the scale of each layer, mostly 1/sqrt(d); a number, or a tensor (H,) with one entry a head;
        a Parameter is learned, one for each layer.
    solver, stop, adjoint: see `fixed_point`; for steps=None, stop also says whether the k-th step has converged.
    on_failure: "warn", "raise" or "ignore" where queries do not converge (steps=k never fails).
    only, exclude: names of layers as in `named_modules()`, or patterns with * and ?, "" for the model itself;
        default: every layer.

    With steps=None and inject="start" what makes the queries gets no gradient: at an equilibrium it is zero.

    Returns the copy. Its `conversion_report` says what was converted and what was not, and why; each converted
    layer keeps the `last_solution` of its last call. nn.TransformerEncoder's use of nested tensors is switched
    off in the copy, for they go with a fused path that passes the converted layers by.
    Raises TypeError or ValueError for settings that are not known, for patterns that match no attention, and for
    a model in which nothing is converted.
    """
    if not isinstance(model, nn.Module):
        hint = f"; give an instance, {model.__name__}(...)" if isinstance(model, type) else ""
        raise TypeError(f"model must be an nn.Module, got {model!r}{hint}")
    settings = AttentionSettings(
        steps=steps,
        forgetting=forgetting,
        separation=separation,
        beta=beta,
        inject=inject,
        inject_weight=inject_weight,
        solver=solver,
        stop=stop,
        adjoint=adjoint,
        on_failure=on_failure,
    )
    conversion = _Conversion(settings, _patterns("only", only), _patterns("exclude", exclude))
    converted = conversion.visit("", copy.deepcopy(model))
    conversion.check()
    for part in converted.modules():
        if isinstance(part, nn.TransformerEncoder) and any(
            isinstance(inner, ConvertedAttention) for inner in part.modules()
        ):
            part.use_nested_tensor = False
    converted.conversion_report = ConversionReport(  # type: ignore[assignment]
        tuple(conversion.converted), tuple(conversion.skipped)
    )
    return converted


class _Conversion:
    """One walk over a model that replaces what it knows."""

    def __init__(
        self, settings: AttentionSettings, only: tuple[str, ...] | None, exclude: tuple[str, ...] | None
    ) -> None:
        self.settings = settings
        self.only = only
        self.exclude = exclude
        self.converted: list[ConvertedLayer] = []
        self.skipped: list[SkippedLayer] = []
        self.names: list[str] = []
        self.done: dict[int, tuple[nn.Module, nn.Module]] = {}

    def visit(self, name: str, module: nn.Module) -> nn.Module:
        """What stands in the place of this module."""
        if not _is_known(module):
            return self._descend(name, module)
        self.names.append(name)
        reason = self._reason(name)
        if reason:
            self.skipped.append(SkippedLayer(name, type(module).__name__, reason))
            return module
        # The old one is kept beside the new, so that no other object can get its id.
        if id(module) not in self.done:
            self.done[id(module)] = (module, self._convert(name, module))
        new = self.done[id(module)][1]
        if isinstance(new, ConvertedAttention):
            self.converted.append(_described(name, new))
        else:
            reason = f"computes something else than plain attention with its parts; {KNOWN}"
            self.skipped.append(SkippedLayer(name, type(module).__name__, reason))
        return new

    def _descend(self, name: str, module: nn.Module) -> nn.Module:
        found = len(self.converted) + len(self.skipped)
        if id(module) in self.done:
            return module
        self.done[id(module)] = (module, module)
        for child_name, child in list(module._modules.items()):
            if child is not None:
                module._modules[child_name] = self.visit(_join(name, child_name), child)
        if found == len(self.converted) + len(self.skipped) and _looks_like_attention(module):
            self.skipped.append(SkippedLayer(name, type(module).__name__, _why_unknown(module)))
        return module

    def _reason(self, name: str) -> str:
        """Why the patterns leave this layer out, or nothing."""
        if self.only is not None and not _matches(name, self.only):
            return f"not among only={list(self.only)}"
        if self.exclude is not None and _matches(name, self.exclude):
            return f"among exclude={list(self.exclude)}"
        return ""

    def _convert(self, name: str, module: nn.Module) -> nn.Module:
        label = name or ROOT
        if isinstance(module, ConvertedAttention):
            module.dial(self.settings, module.scale, module.num_heads, label)
            return module
        if isinstance(module, nn.MultiheadAttention):
            return ConvertedMultiheadAttention.adopt(module, self.settings, label)
        new = ConvertedTimmAttention.adopt(module, self.settings, label)
        # A class of somebody else with the same parts may do other things with them.
        same = is_timms_own(module) or computes_the_same(module, new, self.settings)
        return new if same else module

    def check(self) -> None:
        """Raise where a pattern matched nothing, or nothing was converted."""
        for argument, patterns in (("only", self.only), ("exclude", self.exclude)):
            for pattern in patterns or ():
                if not any(_matches(name, (pattern,)) for name in self.names):
                    near = difflib.get_close_matches(pattern, self.names, n=1)
                    hint = f" Did you mean {near[0]!r}?" if near else ""
                    raise ValueError(
                        f"{argument}={pattern!r} matches no attention; there is {self.names}.{hint}"
                    )
        if self.converted:
            return
        left = "; ".join(f"{part.name or ROOT}: {part.kind}, {part.reason}" for part in self.skipped)
        raise ValueError(
            f"nothing in the model can be converted; {KNOWN}. "
            + (f"What looks like attention: {left}." if left else "Nothing in it looks like attention.")
        )


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, ConvertedAttention):
        return True
    return (is_multihead(module) or is_timm(module)) and not has_computed_weights(module)


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return isinstance(module, nn.MultiheadAttention) or "attention" in name or "attn" in name


def _why_unknown(module: nn.Module) -> str:
    if has_computed_weights(module):
        return "its weights are parametrized; remove the parametrizations first"
    if isinstance(module, nn.MultiheadAttention):
        return "a subclass of nn.MultiheadAttention with a forward of its own"
    return f"not known; {KNOWN}"


def _described(name: str, layer: ConvertedAttention) -> ConvertedLayer:
    heads = layer.num_heads
    if isinstance(layer, ConvertedMultiheadAttention):
        return ConvertedLayer(name, layer.kind, heads, layer.embed_dim, layer.head_dim)
    qkv = cast(ConvertedTimmAttention, layer).qkv
    return ConvertedLayer(name, layer.kind, heads, qkv.in_features, qkv.out_features // (3 * heads))


def _patterns(argument: str, given: None | str | Sequence[str]) -> tuple[str, ...] | None:
    if given is None:
        return None
    patterns = (given,) if isinstance(given, str) else tuple(given)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument} must be a name, a pattern, or several of them, got {given!r}")
    return patterns


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
