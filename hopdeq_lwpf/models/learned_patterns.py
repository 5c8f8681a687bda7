"""Hopfield layers with learned patterns: states that pool a bag, stored patterns to look up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hopdeq_lwpf.models.hopfield import INITIAL_STD, Hopfield
from hopdeq_lwpf.models.hopfield_module import HopfieldModule
from hopdeq_lwpf.models.layer_options import (
    LookupOptions,
    PoolingOptions,
    make_options,
    takes,
)
from hopdeq_lwpf.solvers.solve import check_steps


class _Wrapper(HopfieldModule):
    """A layer that brings learned patterns to a `Hopfield`."""

    core: type[Hopfield] = Hopfield  # of which layer
    takes_options: type[PoolingOptions] = PoolingOptions
    hopfield: Hopfield

    def _core(self) -> Hopfield:
        return self.hopfield

    def _inner(self, options: PoolingOptions, **changes: Any) -> Hopfield:
        fields = dataclasses.fields(self.core.takes_options)
        return self.core(**{**{field.name: getattr(options, field.name) for field in fields}, **changes})

    def _parts(self, input: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must override _parts(input)")

    def _laid(self, learned: Tensor) -> Tensor:
        """(quantity, width) as a batch of one."""
        return learned.unsqueeze(0 if self.hopfield.options.batch_first else 1)

    @property
    def steps(self) -> int | None:
        """Softmaxes, or None for the equilibrium; may be set."""
        return self.hopfield.steps

    @steps.setter
    def steps(self, steps: int | None) -> None:
        check_steps(steps)
        self.hopfield.steps = steps

    def get_association_matrix(
        self,
        input: Tensor | Sequence[Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """See `Hopfield.get_association_matrix`; input as in `forward`."""
        parts = self._parts(input)
        return self.hopfield.get_association_matrix(parts, stored_pattern_padding_mask, association_mask)

    def get_projected_pattern_matrix(
        self,
        input: Tensor | Sequence[Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """See `Hopfield.get_projected_pattern_matrix`; input as in `forward`."""
        parts = self._parts(input)
        return self.hopfield.get_projected_pattern_matrix(
            parts, stored_pattern_padding_mask, association_mask
        )


class HopfieldPooling(_Wrapper):
    """Pools a bag: learned state patterns associate with its instances (Ramsauer et al. 2021).

    Options: see `PoolingOptions`. `pooling_weights` (quantity, width) are the states, N(0, 0.02) at first. With
    steps=None they enter every step (inject="input"), since a start has no gradient at an equilibrium.
    """

    @takes(PoolingOptions)
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()
        given = make_options(self.takes_options, arguments, options)
        self.hopfield = self._inner(given, inject=given.injection(learned_state=True))
        if given.state_width is None:
            raise ValueError("the width of the learned states is not known: give input_size or hidden_size")
        weights = torch.empty(given.quantity, given.state_width)
        self.pooling_weights = nn.Parameter(weights, requires_grad=given.trainable)
        nn.init.normal_(self.pooling_weights, 0.0, INITIAL_STD)

    @property
    def learned_query(self) -> nn.Parameter:
        """The query of every bag: `pooling_weights`."""
        return self.pooling_weights

    def reset_parameters(self) -> None:
        """New learned states and weights."""
        self.hopfield.reset_parameters()
        nn.init.normal_(self.pooling_weights, 0.0, INITIAL_STD)

    def forward(
        self,
        input: Tensor | Sequence[Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """Pool: -> (B, quantity * output_size), whatever batch_first.

        input: the bags (B, S, input_size), or two tensors: stored patterns and pattern projections. Masks as in
        `Hopfield.forward`, with L = quantity.
        """
        out = self.hopfield(self._parts(input), stored_pattern_padding_mask, association_mask)
        return (out if self.hopfield.options.batch_first else out.transpose(0, 1)).flatten(1)

    def _parts(self, input: Any) -> tuple[Tensor, Tensor, Tensor]:
        pair = (input, input) if isinstance(input, Tensor) else input
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError("input must be a tensor, or two: stored patterns and pattern projections")
        return pair[0], self._laid(self.pooling_weights), pair[1]


class HopfieldLayer(_Wrapper):
    """Looks up in learned stored patterns: the input is the state patterns (Ramsauer et al. 2021).

    Options: see `LookupOptions`. `lookup_weights` (quantity, width) are the stored patterns and, unless
    lookup_weights_as_separated, also what is projected to values; else that is `target_weights`. Both are
    N(0, 0.02) at first; copy training data into them for lookup by example.
    """

    takes_options: type[PoolingOptions] = LookupOptions

    @takes(LookupOptions)
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()
        given = make_options(self.takes_options, arguments, options)
        assert isinstance(given, LookupOptions)
        changes = {}
        if not given.lookup_weights_as_separated and given.pattern_projection_size is None:
            changes["pattern_projection_size"] = given.stored_width
        self.hopfield = self._inner(given, **changes)
        widths = self.hopfield.options
        if widths.stored_width is None or widths.projection_width is None:
            raise ValueError("the width of the stored patterns is not known: give input_size or hidden_size")
        lookup = torch.empty(given.quantity, widths.stored_width)
        self.lookup_weights = nn.Parameter(lookup, requires_grad=given.trainable)
        self.target_weights = None
        if given.lookup_weights_as_separated:
            targets = torch.empty(given.quantity, widths.projection_width)
            self.target_weights = nn.Parameter(targets, requires_grad=given.lookup_targets_as_trainable)
        self._reset_patterns()

    def reset_parameters(self) -> None:
        """New learned patterns and weights."""
        self.hopfield.reset_parameters()
        self._reset_patterns()

    def _reset_patterns(self) -> None:
        for patterns in (self.lookup_weights, self.target_weights):
            if patterns is not None:
                nn.init.normal_(patterns, 0.0, INITIAL_STD)

    def forward(
        self,
        input: Tensor,
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """Look up: input (B, L, input_size) -> (B, L, output_size). Masks as in `Hopfield.forward`, S = quantity."""
        return self.hopfield(self._parts(input), stored_pattern_padding_mask, association_mask)

    def _parts(self, input: Any) -> tuple[Tensor, Tensor, Tensor]:
        stored = self._laid(self.lookup_weights)
        return stored, input, stored if self.target_weights is None else self._laid(self.target_weights)
