"""From hflayers (ml-jku/hopfield-layers 1.0.2): its options by our names, its weights in our layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hopdeq_lwpf._types import unknown

if TYPE_CHECKING:
    from hopdeq_lwpf.models.hopfield import Hopfield

CORE = "association_core."
# A weight of ours, the one of theirs, and the name of theirs.
Pair = tuple[Tensor, Tensor | None, str]


def translate_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Our options for those that a layer of hflayers was built with; options of ours pass as they are.

    scaling is beta. update_steps_max=n is steps=n+1, since steps counts softmaxes; None or a negative number
    is steps=None. update_steps_eps has no counterpart: theirs stops a head for the whole batch once its
    association moves less; here `stop` judges each state. The query enters as theirs does, inject="start".
    """
    translated = {"inject": "start", **options}
    eps = translated.pop("update_steps_eps", None)
    if eps is not None and not bool(torch.as_tensor(eps).gt(0).all()):
        raise ValueError(f"update_steps_eps must be > 0, got {eps!r}")
    if "scaling" in translated:
        if "beta" in translated:
            raise ValueError("scaling (hflayers) and beta are one thing: give one of them")
        translated["beta"] = translated.pop("scaling")
    if "update_steps_max" in translated:
        if "steps" in translated:
            raise ValueError("update_steps_max (hflayers) and steps are one thing: give one of them")
        translated["steps"] = _steps(translated.pop("update_steps_max"))
    return translated


def _steps(updates: object) -> int | None:
    if updates is None:
        return None
    if isinstance(updates, Tensor):
        if updates.numel() != 1 and len(set(updates.tolist())) > 1:
            raise ValueError(
                f"update_steps_max={updates.tolist()}: another number of steps for each head is not offered; use "
                "steps=None, where every state stops when it has converged"
            )
        updates = int(updates.flatten()[0])
    if isinstance(updates, bool) or not isinstance(updates, int):
        raise TypeError(f"update_steps_max must be an integer or None, got {updates!r}")
    return None if updates < 0 else updates + 1


def load(layer: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the weights of hflayers' layer of the same kind and options; all of them, or none with an error."""
    from hopdeq_lwpf.models.hopfield import Hopfield  # which imports this module

    rest = dict(state_dict)
    pairs: list[Pair] = []
    inner = {name: part for name, part in layer.named_modules() if isinstance(part, Hopfield)}
    for name, part in inner.items():
        pairs += _of_hopfield(part, f"{name}." if name else "", rest)
    within = tuple(f"{name}." for name in inner if name)
    if "" not in inner:
        for name, own in layer.named_parameters():
            if not name.startswith(within):
                pairs.append((own, rest.pop(name, None), name))
    _check(pairs, rest)
    with torch.no_grad():
        for mine, theirs, _ in pairs:
            if theirs is not None:
                mine.copy_(theirs.reshape(mine.shape))


def _check(pairs: list[Pair], rest: Mapping[str, Tensor]) -> None:
    missing = [name for _, theirs, name in pairs if theirs is None]
    if missing:
        raise ValueError(
            f"the state_dict has no {missing}: was the layer built with the options that theirs was built with?"
        )
    if rest:
        known = [name for _, _, name in pairs]
        raise unknown("the layer has no place for", next(iter(rest)), known)
    for own, theirs, name in pairs:
        # Learned patterns have a batch dimension of one there.
        if theirs is not None and _plain(theirs) != _plain(own):
            raise ValueError(
                f"{name} has shape {tuple(theirs.shape)}, the layer needs {tuple(own.shape)}: was it built with "
                "the options that theirs was built with?"
            )


def _plain(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def _of_hopfield(layer: Hopfield, prefix: str, rest: dict[str, Tensor]) -> Iterator[Pair]:
    """Each parameter of a Hopfield with theirs; what was taken is removed from `rest`."""
    yield from _projections(layer, prefix + CORE, rest)
    out = layer.output_projection
    if out is not None:
        yield from _both(out, prefix + CORE + "out_proj.", rest)
    for name in ("norm_stored_pattern", "norm_state_pattern", "norm_pattern_projection"):
        norm = getattr(layer, name)
        if norm is not None:
            yield from _both(norm, f"{prefix}{name}.", rest)
    if layer.norm_hopfield_space is not None:
        yield from _both(layer.norm_hopfield_space, f"{prefix}{CORE}p_norm_", rest)
    # Theirs exist and take no part, so that a layer without them gives their outputs.
    for name, extra in (("bias_k", layer.bias_stored), ("bias_v", layer.bias_value)):
        theirs = rest.pop(f"{prefix}{CORE}{name}", None)
        # Theirs for the values has the width of the stored patterns, whatever that of the values is.
        if extra is not None and theirs is not None and theirs.numel() == extra.numel():
            yield extra, theirs.reshape(extra.shape), prefix + CORE + name


def _both(module: nn.Module, prefix: str, rest: dict[str, Tensor]) -> Iterator[Pair]:
    for name, own in module.named_parameters():
        yield own, rest.pop(prefix + name, None), prefix + name


def _projections(layer: Hopfield, prefix: str, rest: dict[str, Tensor]) -> Iterator[Pair]:
    """q, k and v: one stacked matrix there, or three; always one stacked bias."""
    parts = {"q": layer.state_projection, "k": layer.stored_projection, "v": layer.value_projection}
    ours = {name: part for name, part in parts.items() if part is not None}
    together = rest.pop(f"{prefix}in_proj_weight", None)
    bias = rest.pop(f"{prefix}in_proj_bias", None)
    start = 0
    for name, part in ours.items():
        end = start + part.out_features
        if together is None:
            theirs, label = rest.pop(f"{prefix}{name}_proj_weight", None), f"{prefix}{name}_proj_weight"
        else:
            theirs, label = together[start:end], f"{prefix}in_proj_weight[{start}:{end}]"
        yield part.weight, theirs, label
        if part.bias is not None:
            label = f"{prefix}in_proj_bias[{start}:{end}]"
            yield part.bias, None if bias is None else bias[start:end], label
        start = end
