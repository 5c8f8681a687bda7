"""torch's and timm's attention with a retrieval inside; made by `convert_attention`."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from hopdeq_lwpf._types import check_float_tensor
from hopdeq_lwpf.models.attention import (
    AttentionSettings,
    ConvertedAttention,
    causal_mask,
    either,
    split_mask,
    total,
)


class ConvertedMultiheadAttention(ConvertedAttention):
    """nn.MultiheadAttention with the dials of a retrieval; arguments and parameters are those of torch.

    Unlike torch's, a query all of whose keys are masked reads out zeros (the bias of out_proj is left), not
    NaN, and `is_causal=True` without attn_mask makes the causal mask.
    """

    kind = "nn.MultiheadAttention"
    embed_dim: int
    kdim: int
    vdim: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_weight: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: nn.Linear

    @classmethod
    def adopt(
        cls, old: nn.MultiheadAttention, settings: AttentionSettings, label: str
    ) -> ConvertedMultiheadAttention:
        """The layer with the parameters, hooks and mode of `old`."""
        new = _adopted(cls, old)
        # nn.TransformerEncoderLayer takes its fused path, past this module, only where this is True.
        new._qkv_same_embed_dim = False
        new.dial(settings, old.head_dim**-0.5, old.num_heads, label)
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's: (N, L, E), or (L, N, E) without batch_first, or (L, E); and the associations or None.

        Masks: bool, True = ignore, or float, added to the scores; attn_mask (L, S) or (N H, L, S).
        """
        batched = self._check(query, key, value)
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q[None], k[None], v[None]
            key_padding_mask = _first(key_padding_mask)
        elif not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        if k.shape[:2] != v.shape[:2] or k.shape[0] != q.shape[0]:
            raise ValueError(
                f"query, key and value must share the batch, and key and value the length; got shapes "
                f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)} (batch_first={self.batch_first})"
            )
        sizes = (q.shape[0], q.shape[1], k.shape[1])
        if key_padding_mask is not None:
            _check_shape("key_padding_mask", key_padding_mask, [(sizes[0], sizes[2])])
        padded, added = split_mask("key_padding_mask", key_padding_mask)
        if padded is not None:
            # The weight 0 of a key that holds inf or NaN would not remove it.
            k, v = (t.masked_fill(padded[..., None], 0.0) for t in (k, v))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(sizes[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(sizes[0], 1, -1)], 1)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = (functional.pad(t, (0, 0, 0, 1)) for t in (k, v))
        mask, bias = self._masks(attn_mask, is_causal, sizes, padded, added)
        read, weights = self.associate(q, k, v, mask, bias)
        output = functional.linear(read.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            output = output[0]
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights if batched else weights[0]

    def drop(self, weights: Tensor) -> Tensor:
        return functional.dropout(weights, self.dropout, self.training) if self.dropout else weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether there is a batch; raises for input of the wrong kind."""
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, width), tensor in zip(widths.items(), (query, key, value), strict=True):
            check_float_tensor(name, tensor)
            if tensor.is_nested:
                raise TypeError(
                    f"{name} is a nested tensor, which only torch's fused path takes; pad it and give key_padding_mask"
                )
            if tensor.ndim not in (2, 3) or tensor.ndim != query.ndim or tensor.shape[-1] != width:
                shape = "(N, L, E)" if self.batch_first else "(L, N, E)"
                raise ValueError(
                    f"{name} must be {shape}, or (L, E) unbatched, as the query, with E = {width}; "
                    f"got {tuple(tensor.shape)}"
                )
        return query.ndim == 3

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        packed, bias = self.in_proj_weight, self.in_proj_bias
        if packed is not None and query is key and key is value:
            return functional.linear(query, packed, bias).chunk(3, -1)
        weights = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if packed is None
            else packed.chunk(3)
        )
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        return tuple(
            functional.linear(x, cast(Tensor, w), b) for x, w, b in zip(inputs, weights, biases, strict=True)
        )

    def _masks(
        self,
        attn_mask: Tensor | None,
        is_causal: bool,
        sizes: tuple[int, int, int],
        padded: Tensor | None,
        added: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """What is ignored and what is added, broadcastable to (N, H, L, S), over the appended keys too.

        padded, added: what the padding mask ignores and adds, (N, S).
        """
        batch, queries, keys = sizes
        if attn_mask is not None:
            _check_shape("attn_mask", attn_mask, [(queries, keys), (batch * self.num_heads, queries, keys)])
            attn_mask = attn_mask.reshape(-1, self.num_heads if attn_mask.ndim == 3 else 1, queries, keys)
        elif is_causal:
            device = self.out_proj.weight.device
            attn_mask = causal_mask(queries, keys, device)[None, None]
        mask, bias = split_mask("attn_mask", attn_mask)
        mask = either(mask, None if padded is None else padded[:, None, None])
        bias = total(bias, None if added is None else added[:, None, None])
        extra = int(self.bias_k is not None) + int(self.add_zero_attn)
        if extra:
            mask = None if mask is None else functional.pad(mask, (0, extra))
            bias = None if bias is None else functional.pad(bias, (0, extra))
        return mask, bias


class ConvertedTimmAttention(ConvertedAttention):
    """timm's Attention (of its vision transformers) with the dials of a retrieval; parameters are timm's.

    Unlike timm's, a query all of whose keys are masked reads out zeros, not NaN.
    """

    kind = "timm Attention"
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None
    attn_drop: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    @classmethod
    def adopt(cls, old: nn.Module, settings: AttentionSettings, label: str) -> ConvertedTimmAttention:
        """The layer with the parameters, hooks and mode of `old`."""
        new = _adopted(cls, old)
        new.dial(settings, float(old.scale), int(old.num_heads), label)  # type: ignore[arg-type]
        return new

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C). attn_mask broadcasts to (B, H, N, N): bool, True = attend; or float, added."""
        batch, count, _ = x.shape
        gate = getattr(self, "gate", None)
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if is_causal and attn_mask is not None:
            raise ValueError(
                "give is_causal=True or attn_mask, not both, as for scaled_dot_product_attention"
            )
        mask, bias = self._masks(attn_mask, is_causal, (batch, self.num_heads, count, count), x)
        read, _ = self.associate(q, k, v, mask, bias)
        out = read.transpose(1, 2).flatten(2)
        if hasattr(self, "norm"):
            out = self.norm(out)
        return self.proj_drop(self.proj(out if gate is None else out * gate(x).sigmoid()))

    def drop(self, weights: Tensor) -> Tensor:
        return self.attn_drop(weights)

    def _masks(
        self, attn_mask: Tensor | None, is_causal: bool, scores: tuple[int, ...], x: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        if is_causal:
            return causal_mask(scores[-2], scores[-1], x.device)[None, None], None
        if attn_mask is None:
            return None, None
        try:
            attn_mask = attn_mask.expand(
                scores[-2:] if attn_mask.ndim < 2 else (*attn_mask.shape[:-1], scores[-1])
            )
            attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
            attn_mask.expand(scores)
        except RuntimeError:
            shape = tuple(attn_mask.shape)
            raise ValueError(
                f"attn_mask of shape {shape} does not broadcast to the scores {scores}"
            ) from None
        if attn_mask.dtype == torch.bool:
            return ~attn_mask, None
        return split_mask("attn_mask", attn_mask)


REQUIRED = ("qkv", "proj", "q_norm", "k_norm", "attn_drop", "proj_drop")
OPTIONAL = ("norm", "gate")


def is_multihead(module: nn.Module) -> bool:
    """Whether this is torch's multi-head attention, or a subclass that computes the same."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def is_timm(module: nn.Module) -> bool:
    """Whether this has the parts and the signature of timm's Attention and nothing else; imports no timm."""
    source = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    names = {name for name, part in module._modules.items() if part is not None}
    options = list(inspect.signature(type(module).forward).parameters)[2:]
    return (
        source.__name__ == "Attention"
        and names.issuperset(REQUIRED)
        and names.issubset((*REQUIRED, *OPTIONAL))
        and not module._parameters.keys() - {"gate"}
        and not module._buffers
        and set(options) <= {"attn_mask", "is_causal"}
        and hasattr(module.qkv, "in_features")
        and hasattr(module.qkv, "out_features")
        and hasattr(module, "num_heads")
        and hasattr(module, "scale")
    )


def is_timms_own(module: nn.Module) -> bool:
    """Whether the class that computes comes from timm itself."""
    source = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return source.__module__.partition(".")[0] == "timm"


def computes_the_same(old: nn.Module, new: ConvertedTimmAttention, settings: AttentionSettings) -> bool:
    """Whether plain attention with the parts of `old` is what `old` computes, on one random input."""
    weight = next(old.parameters(), None)
    width = cast(nn.Linear, old.qkv).in_features
    if weight is None or weight.is_meta or not weight.is_floating_point():
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, width, generator=generator).to(weight)
    modes = [(part, part.training) for part in old.modules()]
    old.eval(), new.eval()
    new.dial(AttentionSettings(), new.scale, int(old.num_heads), new.label)  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            expected, actual = old(x), new(x)
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        for part, mode in modes:
            part.training = mode
        new.training = old.training
        new.dial(settings, new.scale, int(old.num_heads), new.label)  # type: ignore[arg-type]
    # A hundred roundings: sums are taken in another order.
    near = 100 * torch.finfo(weight.dtype).eps * float(expected.abs().amax())
    return expected.shape == actual.shape and bool(((expected - actual).abs() <= near).all())


def has_computed_weights(module: nn.Module) -> bool:
    """Whether weights of the module itself are parametrized."""
    return parametrize.is_parametrized(module)


def _adopted(cls: type[Any], old: nn.Module) -> Any:
    """A module of another class with everything that `old` has."""
    new: Any = object.__new__(cls)
    nn.Module.__init__(new)
    new.__dict__.update(old.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = old.__dict__[name].copy()
    return new


def _first(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[None]


def _check_shape(name: str, mask: Tensor, allowed: list[tuple[int, ...]]) -> None:
    if not isinstance(mask, Tensor) or tuple(mask.shape) not in allowed:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} must have shape {' or '.join(map(str, allowed))}, got {got}")
