"""How the queries and keys of attention layers are read off a call: one reader a kind of layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from hopdeq_lwpf.models.attention import AttentionSettings, ConvertedAttention, either, split_mask
from hopdeq_lwpf.models.converted import (
    ConvertedMultiheadAttention,
    ConvertedTimmAttention,
    computes_the_same,
    is_multihead,
    is_timm,
    is_timms_own,
)
from hopdeq_lwpf.models.hopfield import Hopfield

# (module, arguments of its call by name) -> queries, keys and, where there are, scale and mask.
Reader: TypeAlias = Callable[[nn.Module, Mapping[str, Any]], tuple[Any, ...]]
KNOWN = "nn.MultiheadAttention, timm's Attention, Hopfield and converted attention"


def find_readers(
    model: nn.Module, given: Mapping[type[nn.Module], Reader] | None
) -> dict[str, tuple[nn.Module, Reader]]:
    """The attention layers of a model by name, with how to read them; raises ValueError where there are none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}")
    for kind, read in (given or {}).items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module) and callable(read)):
            raise TypeError(
                f"attention must map classes of modules to functions (module, inputs), got {kind!r}: {read!r}"
            )
    found = {name: (module, _reader(module, given or {})) for name, module in model.named_modules()}
    readers = {name: (module, read) for name, (module, read) in found.items() if read is not None}
    if not readers:
        alike = sorted(
            {type(part).__name__ for part in model.modules() if "att" in type(part).__name__.lower()}
        )
        hint = f"; it has {', '.join(alike)}: give attention={{{alike[0]}: function}}" if alike else ""
        raise ValueError(f"the model has no attention that is known ({KNOWN}){hint}")
    return readers


def bind(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call by the names that forward gives them, defaults included."""
    bound = inspect.signature(module.forward).bind(*args, **named)
    bound.apply_defaults()
    return bound.arguments


def _reader(module: nn.Module, given: Mapping[type[nn.Module], Reader]) -> Reader | None:
    for kind in type(module).__mro__:
        if kind in given:
            return given[kind]
    if isinstance(module, Hopfield):
        return _read_hopfield
    if isinstance(module, ConvertedMultiheadAttention) or is_multihead(module):
        return _read_multihead
    if isinstance(module, ConvertedTimmAttention):
        return _read_timm
    # A class of somebody else with timm's parts may do other things with them.
    if is_timm(module) and (is_timms_own(module) or _is_plain(module)):
        return _read_timm
    return None


def _is_plain(module: nn.Module) -> bool:
    settings = AttentionSettings()
    return computes_the_same(module, ConvertedTimmAttention.adopt(module, settings, ""), settings)


def _read_hopfield(module: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    assert isinstance(module, Hopfield)  # by `_reader`
    last = module.last_association
    if last is None:
        raise RuntimeError("a compiled Hopfield layer keeps no queries and keys; call the layer uncompiled")
    return last.heads.q, last.heads.k, module.beta, last.heads.mask


def _read_multihead(module: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    q, k, scale, mask = _listen(_MultiheadListener, module, inputs)
    padding, _ = split_mask("key_padding_mask", inputs["key_padding_mask"])
    if padding is not None and inputs["query"] is inputs["key"]:
        mask = either(mask, padding.reshape(-1, 1, padding.shape[-1], 1))  # what is padded asks nothing
    return q, k, scale, mask


def _read_timm(module: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    return _listen(_TimmListener, module, inputs)


class _HeardError(Exception):
    """Ends a forward pass where queries and keys are there; carries them."""


class _Listener(ConvertedAttention):
    """A converted layer that stops before it associates, so that nothing random is drawn after it."""

    def associate(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        raise _HeardError(q, k, mask)


class _MultiheadListener(_Listener, ConvertedMultiheadAttention):
    pass


class _TimmListener(_Listener, ConvertedTimmAttention):
    pass


def _listen(
    kind: type[_MultiheadListener] | type[_TimmListener], module: Any, inputs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Queries, keys, scale and mask of a layer that was, or could be, converted."""
    twin = kind.adopt(module, AttentionSettings(), "")
    scale = module.retrieval.beta if isinstance(module, ConvertedAttention) else twin.scale
    try:
        twin.forward(*inputs.values())
    except _HeardError as heard:
        q, k, mask = heard.args
    return q, k, scale, mask
