"""Transformer blocks whose attention is a Hopfield association."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hopdeq_lwpf.models import hflayers
from hopdeq_lwpf.models.hopfield import Hopfield, make_activation
from hopdeq_lwpf.solvers.base import check_count, check_number


class _Block(nn.Module):
    """The feed-forward half, and what both blocks have in common."""

    def _build(
        self, width: int, dim_feedforward: int, dropout: float, activation: str | Callable[[Tensor], Tensor]
    ) -> None:
        check_count("dim_feedforward", dim_feedforward, 1)
        check_number("dropout", dropout, 0.0, 1.0)
        chosen = make_activation("activation", activation)
        if chosen is None:
            raise TypeError("activation must be a function or its name, got None")
        self.activation = chosen
        self.linear_residual = nn.Linear(width, dim_feedforward)
        self.linear_output = nn.Linear(dim_feedforward, width)
        self.norm_output = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def _feed_forward(self, x: Tensor) -> Tensor:
        inner = self.dropout(self.activation(self.linear_residual(x)))
        return self.norm_output(x + self.dropout(self.linear_output(inner)))

    def load_hflayers_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy the weights of hflayers' block of this name; it must have been built with the same options."""
        hflayers.load(self, state_dict)


class HopfieldEncoderLayer(_Block):
    """`nn.TransformerEncoderLayer` with a Hopfield association; the norms follow the sums (post-norm).

    hopfield_association: is copied with its weights; its output must be as wide as its input.
    dim_feedforward: 2048, dropout: 0.1, activation: "relu", as torch's; a function or its name.
    """

    def __init__(
        self,
        hopfield_association: Hopfield,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
    ) -> None:
        super().__init__()
        width = _width("hopfield_association", hopfield_association)
        self.hopfield_association = copy.deepcopy(hopfield_association)
        self.norm_residual = nn.LayerNorm(width)
        self._build(width, dim_feedforward, dropout, activation)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(B, L, width) -> the same. Masks as in `Hopfield.forward`; is_causal without a mask makes one."""
        mask = _causal(self.hopfield_association, src, src_mask, is_causal)
        associated = self.hopfield_association(src, src_key_padding_mask, mask)
        return self._feed_forward(self.norm_residual(src + self.dropout(associated)))

    def get_association_matrix(
        self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """See `Hopfield.get_association_matrix`."""
        return self.hopfield_association.get_association_matrix(src, src_key_padding_mask, src_mask)

    @property
    def self_attn(self) -> Hopfield:
        """The association, under the name that `nn.TransformerEncoder` asks for."""
        return self.hopfield_association


class HopfieldDecoderLayer(_Block):
    """`nn.TransformerDecoderLayer` with Hopfield associations; the norms follow the sums (post-norm).

    hopfield_association_self, hopfield_association_cross: are copied with their weights; in the second the
    memory is the stored patterns. Both must be as wide in their output as in their state patterns.
    dim_feedforward: 2048, dropout: 0.1, activation: "relu", as torch's; a function or its name.
    """

    def __init__(
        self,
        hopfield_association_self: Hopfield,
        hopfield_association_cross: Hopfield,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
    ) -> None:
        super().__init__()
        width = _width("hopfield_association_self", hopfield_association_self)
        cross = _width("hopfield_association_cross", hopfield_association_cross)
        if cross != width:
            raise ValueError(f"both associations must have one input_size, got {width} and {cross}")
        self.hopfield_association_self = copy.deepcopy(hopfield_association_self)
        self.hopfield_association_cross = copy.deepcopy(hopfield_association_cross)
        self.norm_residual_self = nn.LayerNorm(width)
        self.norm_residual_cross = nn.LayerNorm(width)
        self._build(width, dim_feedforward, dropout, activation)

    def forward(  # noqa: PLR0913 (torch's signature)
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """(B, L, width), (B, S, stored_pattern_size) -> (B, L, width). Masks as in `Hopfield.forward`.

        tgt_is_causal and memory_is_causal make a mask where none is given.
        """
        mask = _causal(self.hopfield_association_self, tgt, tgt_mask, tgt_is_causal)
        associated = self.hopfield_association_self(tgt, tgt_key_padding_mask, mask)
        tgt = self.norm_residual_self(tgt + self.dropout(associated))
        mask = _causal(self.hopfield_association_cross, tgt, memory_mask, memory_is_causal, memory)
        associated = self.hopfield_association_cross((memory, tgt, memory), memory_key_padding_mask, mask)
        return self._feed_forward(self.norm_residual_cross(tgt + self.dropout(associated)))

    @property
    def self_attn(self) -> Hopfield:
        """The association of the states among themselves, by the name `nn.TransformerDecoder` asks for."""
        return self.hopfield_association_self


def _width(name: str, association: object) -> int:
    """The width of the block, or an error if the association does not fit into one."""
    if not isinstance(association, Hopfield):
        raise TypeError(f"{name} must be a Hopfield, got {type(association).__name__}")
    options = association.options
    out = association.output_projection
    heads = None if options.value_width is None else options.num_heads * options.value_width
    produced = heads if out is None else out.out_features
    if options.state_width is None or produced != options.state_width:
        raise ValueError(
            f"{name} must return what it is given, since both are added: its state patterns have width "
            f"{options.state_width}, its output has {produced}"
        )
    return options.state_width


def _causal(
    association: Hopfield, state: Tensor, mask: Tensor | None, is_causal: bool, stored: Tensor | None = None
) -> Tensor | None:
    """The mask; with is_causal and without one, True above the diagonal, (L, S)."""
    if mask is not None or not is_causal:
        return mask
    dim = 1 if association.options.batch_first else 0
    shape = state.shape[dim], (state if stored is None else stored).shape[dim]
    return torch.ones(shape, dtype=torch.bool, device=state.device).triu(1)
