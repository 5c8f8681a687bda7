"""The Hopfield layer (Ramsauer et al. 2021): projections, heads, association, read-out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from hopdeq_lwpf._layout import shown
from hopdeq_lwpf._types import Solution, check_same_kind, unknown
from hopdeq_lwpf.forgetting import Keep
from hopdeq_lwpf.models.association import (
    Associated,
    Association,
    Heads,
    check_patterns,
    lay_masks,
    unanswered,
)
from hopdeq_lwpf.models.hopfield_module import HopfieldModule
from hopdeq_lwpf.models.layer_options import HopfieldOptions, make_options, takes
from hopdeq_lwpf.solvers.base import transformed
from hopdeq_lwpf.solvers.equilibrium import Equilibrium
from hopdeq_lwpf.solvers.solve import check_steps

# As the published layers are initialised: scores near 0, so that every pattern takes part at first.
INITIAL_STD = 0.02
# Stored patterns, state patterns and pattern projections, batch first, (B, N, width) each.
Parts: TypeAlias = tuple[Tensor, Tensor, Tensor]
ACTIVATIONS = ("relu", "gelu", "tanh", "sigmoid", "silu", "selu", "elu", "leaky_relu", "softplus")


class Hopfield(HopfieldModule):
    """Association of state patterns with stored patterns (Ramsauer et al. 2021), solved as the options say.

    With R the state patterns, Y the stored ones and P the pattern projections, each through its layer norm,
    q = R W_Q, k = Y W_K and v = P W_V for every head; the states move among the k by `Retrieval`'s
    f(z) = k^T (D' * p(D(beta k z + bias))) and are read out with v, then pass the output projection.

    Options: see `HopfieldOptions`. `steps` may be changed at any time.
    """

    options: HopfieldOptions
    takes_options: type[HopfieldOptions] = HopfieldOptions

    @takes(HopfieldOptions)
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()
        self.options = given = make_options(self.takes_options, arguments, options)
        self.steps = given.steps
        self.equilibrium = Equilibrium(
            self._function(given),
            solver=given.solver,
            stop=given.stop,
            adjoint=given.adjoint,
            on_failure=given.on_failure,
        )
        self.activation = make_activation("association_activation", given.association_activation)
        self._build_norms(given)
        self._build_projections(given)
        self.last_association: Associated | None = None
        self.reset_parameters()

    def _function(self, given: HopfieldOptions) -> Association:
        return Association(given.inverse_temperature(), **given.dials())

    def _build_norms(self, given: HopfieldOptions) -> None:
        def norm(name: str, width: int | None) -> nn.LayerNorm | None:
            if not getattr(given, f"normalize_{name}"):
                return None
            affine, eps = getattr(given, f"normalize_{name}_affine"), getattr(given, f"normalize_{name}_eps")
            return nn.LayerNorm(width or 0, eps=eps, elementwise_affine=affine)

        self.norm_stored_pattern = norm("stored_pattern", given.stored_width)
        self.norm_state_pattern = norm("state_pattern", given.state_width)
        self.norm_pattern_projection = norm("pattern_projection", given.projection_width)
        self.norm_hopfield_space = norm("hopfield_space", given.width)

    def _build_projections(self, given: HopfieldOptions) -> None:
        heads, width, values, bias = given.num_heads, given.width, given.value_width, given.input_bias
        connected = given.pattern_projection_as_connected and not given.stored_pattern_as_static

        def linear(static: bool, wide: int | None, out: int | None) -> nn.Linear | None:
            return None if static else nn.Linear(wide or 0, out or 0, bias=bias)

        space, read = heads * (width or 0), heads * (values or 0)
        before = space if connected else given.projection_width
        self.state_projection = linear(given.state_pattern_as_static, given.state_width, space)
        self.stored_projection = linear(given.stored_pattern_as_static, given.stored_width, space)
        self.value_projection = linear(given.pattern_projection_as_static, before, read)
        out = given.input_size if given.output_size is None else given.output_size
        self.output_projection = linear(given.disable_out_projection, read, out)
        self.bias_stored = self.bias_value = None
        if given.concat_bias_pattern:
            self.bias_stored = nn.Parameter(torch.empty(heads, 1, width or 0))
            self.bias_value = nn.Parameter(torch.empty(heads, 1, values or 0))

    def reset_parameters(self) -> None:
        """Weights N(0, 0.02), biases 0, scales 1, as hflayers has them; beta and the like stay."""
        for module in self.children():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for extra in (self.bias_stored, self.bias_value):
            if extra is not None:
                nn.init.normal_(extra, 0.0, INITIAL_STD)
        # What was said once: that states had nothing to recall; whether a head was dead when training began.
        self._told_masked = self._looked_for_dead = False

    @property
    def f(self) -> Association:
        """The fixed-point function of the states."""
        f: Association = self.equilibrium.f  # type: ignore[assignment]
        return f

    @property
    def beta(self) -> float | Tensor:
        """A number, a scalar tensor, or one entry a head."""
        return self.f.beta

    def forward(
        self,
        input: Tensor | Sequence[Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """Associate: -> (B, L, output_size), or (L, B, output_size) without batch_first.

        input: one tensor (B, N, input_size) for all three, or three: stored patterns (B, S, .), state patterns
            (B, L, .), pattern projections (B, S, .); a batch of 1 serves all.
        stored_pattern_padding_mask: (B, S); association_mask: (L, S), (B H, L, S), (B, L, S) or (B, H, L, S).
            bool or uint8, True = ignore; float is added to the scores. A state whose stored patterns are all
            masked, or none, recalls 0: said once in a warning, and in the note of `last_solution`.
        """
        parts = self._unpack(input)
        return self._respond(self._project(parts, stored_pattern_padding_mask, association_mask))

    def _respond(self, heads: Heads) -> Tensor:
        """The output for these heads."""
        weights = self._associate(heads)
        if self.options.dropout:
            weights = functional.dropout(weights, self.options.dropout, self.training)
        out = (weights @ heads.v).transpose(1, 2).flatten(2)
        if self.output_projection is not None:
            out = self.output_projection(out)
        if self.activation is not None:
            out = self.activation(out)
        return out if self.options.batch_first else out.transpose(0, 1)

    @torch.no_grad()
    def get_association_matrix(
        self,
        input: Tensor | Sequence[Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """The weights of the read-out for this input before dropout, (B, H, L, S), without gradient.

        S counts the bias pattern and the zero association too. Arguments as in `forward`.
        """
        return self._associate(
            self._project(self._unpack(input), stored_pattern_padding_mask, association_mask)
        )

    @torch.no_grad()
    def get_projected_pattern_matrix(
        self,
        input: Tensor | Sequence[Tensor],
        stored_pattern_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        """The values for this input, (B, H, S, dv), without gradient. Arguments as in `forward`."""
        return self._project(self._unpack(input), stored_pattern_padding_mask, association_mask).v

    def _project(self, parts: Parts, padding: Tensor | None, association: Tensor | None) -> Heads:
        """The heads of what `_unpack` returned, with the masks laid out and the extra patterns appended."""
        given = self.options
        stored, state, projection = parts
        counts = {tensor.shape[0] for tensor in (stored, state, projection)} - {1}
        if len(counts) > 1 or stored.shape[1] != projection.shape[1]:
            raise ValueError(
                "stored patterns, state patterns and pattern projections must have one batch size (or 1), and a "
                f"projection for each stored pattern; got {tuple(stored.shape)}, {tuple(state.shape)} and "
                f"{tuple(projection.shape)}{'' if given.batch_first else ' (batch first)'}"
            )
        batch = counts.pop() if counts else 1
        shape = (batch, given.num_heads, state.shape[1], stored.shape[1])
        mask, bias = lay_masks(padding, association, shape, state.device)
        q, k, v = self._heads(stored, state, projection)
        # Under autocast a static input keeps its dtype while what is projected does not.
        q, v = q.to(k.dtype), v.to(k.dtype)
        q, k, v = (part.expand(batch, *part.shape[1:]) for part in (q, k, v))
        extra = given.concat_bias_pattern + given.add_zero_association
        if extra:
            k = torch.cat([k, *self._extras(self.bias_stored, k)], 2)
            v = torch.cat([v, *self._extras(self.bias_value, v)], 2)
            mask = None if mask is None else functional.pad(mask, (0, extra))
            bias = None if bias is None else functional.pad(bias, (0, extra))
        return Heads(q, k, v, mask, bias)

    def _unpack(self, input: Tensor | Sequence[Tensor]) -> Parts:
        """Stored patterns, state patterns, pattern projections, (B, N, width) each, through their norms."""
        given = self.options
        if isinstance(input, Tensor):
            input = (input, input, input)
        if not isinstance(input, (tuple, list)) or len(input) != 3:
            raise TypeError(
                "input must be a tensor, or three: stored patterns, state patterns, pattern projections; got "
                + (f"{len(input)} of them" if isinstance(input, (tuple, list)) else type(input).__name__)
            )
        parts = (
            ("stored patterns", given.stored_width, self.norm_stored_pattern),
            ("state patterns", given.state_width, self.norm_state_pattern),
            ("pattern projections", given.projection_width, self.norm_pattern_projection),
        )
        laid = []
        for tensor, (name, width, norm) in zip(input, parts, strict=True):
            tensor = check_patterns(name, tensor, width)
            if not torch.is_autocast_enabled(tensor.device.type):
                check_same_kind(name, tensor, "stored patterns", input[0])
            tensor = tensor if given.batch_first else tensor.transpose(0, 1)
            laid.append(tensor if norm is None else norm(tensor))
        stored, state, projection = laid
        static = given.stored_pattern_as_static and given.state_pattern_as_static
        if static and stored.shape[-1] != state.shape[-1]:
            raise ValueError(
                "static stored and state patterns must have one width, got "
                f"{stored.shape[-1]} and {state.shape[-1]}"
            )
        return stored, state, projection

    def _heads(self, stored: Tensor, state: Tensor, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (batch, H, N, width)."""
        given = self.options
        connected = given.pattern_projection_as_connected and self.stored_projection is not None
        q = self._split(_through(self.state_projection, state), given.state_pattern_as_static)
        k = self._split(_through(self.stored_projection, stored), given.stored_pattern_as_static)
        if connected:
            projection = _through(self.stored_projection, projection)
        alike = given.pattern_projection_as_static and not connected
        v = self._split(_through(self.value_projection, projection), alike)
        if self.norm_hopfield_space is not None:
            q, k = self.norm_hopfield_space(q), self.norm_hopfield_space(k)
        return q, k, v

    def _split(self, patterns: Tensor, alike: bool) -> Tensor:
        """(batch, N, H width) -> (batch, H, N, width); the same for every head where they are alike."""
        heads = self.options.num_heads
        if alike:
            return patterns[:, None].expand(-1, heads, -1, -1)
        return patterns.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _extras(self, learned: Tensor | None, like: Tensor) -> list[Tensor]:
        """The learned pattern and the zeros, (B, H, 1, width) each, as the options ask for them."""
        shape = (*like.shape[:2], 1, like.shape[3])
        extras = [] if learned is None else [learned.to(like.dtype).expand(shape)]
        return [*extras, like.new_zeros(shape)] if self.options.add_zero_association else extras

    def _associate(self, heads: Heads) -> Tensor:
        """The weights of the read-out, (B, H, L, S)."""
        check_steps(self.steps)
        if not heads.q.numel():
            self._record(heads, None, heads.q, None)
            return heads.q @ heads.k.mT
        x = self.f.prepare(heads)
        solved = None
        if self.steps is None:
            solution = self.equilibrium(x, read_out=True, return_solution=True)
            z, weights = solution.state, solution.value
            solved = self.equilibrium.last_solution
        else:
            z = self.f.init(x)
            for _ in range(self.steps - 1):
                z = self.f(z, x)
            weights = self.f.weights(z, x)
        weights = weights[..., : heads.k.shape[2]]
        self._record(heads, x.threshold, z, solved)
        if not torch.compiler.is_compiling() and not transformed():
            self._report(heads, weights)
        return weights

    def _record(self, heads: Heads, threshold: Tensor | None, z: Tensor, solved: Solution | None) -> None:
        if torch.compiler.is_compiling() or transformed():
            return
        held, drawn = Heads(*map(_detached, heads)), _detached(threshold)
        stop = self.equilibrium.stop
        self.last_association = Associated(self.f, held, drawn, z.detach(), self.steps, stop, solved)

    def _report(self, heads: Heads, weights: Tensor) -> None:
        """Say once what would otherwise pass unseen: states with nothing to recall, heads that cannot learn."""
        if not self._told_masked and (heads.mask is not None or not heads.k.shape[2]):
            rows = unanswered(heads)
            if bool(rows.any()):
                self._told_masked = True
                warnings.warn(
                    f"{int(rows.sum())} of {rows.numel()} states have every stored pattern masked, or none, and "
                    "recall 0. This is said once; layer.last_solution.note has the count of each call.",
                    UserWarning,
                    stacklevel=4,
                )
        if self.training and not self._looked_for_dead and weights.numel():
            self._looked_for_dead = True
            self._report_dead(heads, weights)

    def _report_dead(self, heads: Heads, weights: Tensor) -> None:
        if isinstance(self.f.forgetting, Keep):
            return
        counts = ~unanswered(heads)
        dead = ((weights.detach().sum(-1) == 0) | ~counts).all(2).all(0) & counts.any(2).any(0)
        if bool(dead.any()):
            warnings.warn(
                f"{int(dead.sum())} of {dead.numel()} heads forget every stored pattern of every state in this "
                "batch: they recall 0 and get no gradient, and may never learn. Keep the largest score in any "
                "case, forgetting=ReLU(min_keep=1), or forget relative to the others, forgetting='pfu'.",
                UserWarning,
                stacklevel=5,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_association": None}

    def _core(self) -> Hopfield:
        return self

    def extra_repr(self) -> str:
        given = self.options
        return f"heads={given.num_heads}, width={given.width}, beta={shown(self.beta)}, steps={self.steps}"


def make_activation(
    name: str, spec: None | str | Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor] | None:
    """The function that is meant: itself, or of this name in torch or torch.nn.functional."""
    if spec is None or not isinstance(spec, str):
        if spec is not None and not callable(spec):
            raise TypeError(f"{name} must be a function or its name, got {spec!r}")
        return spec
    found = getattr(torch, spec, None) or getattr(functional, spec, None)
    if not callable(found):
        raise unknown(name, spec, ACTIVATIONS)
    return found


def _through(projection: nn.Linear | None, patterns: Tensor) -> Tensor:
    return patterns if projection is None else projection(patterns)


def _detached(part: Any) -> Any:
    if part is None or isinstance(part, Tensor):
        return part if part is None else part.detach()
    return pytree.tree_map_only(Tensor, Tensor.detach, part)  # of a graph
