"""Networks to train by name: an equilibrium layer with what goes before and after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.imports import class_at
from hopdeq_lwpf.models import HopfieldLayer, HopfieldPooling, VisionTransformer, build
from hopdeq_lwpf.options import construct
from hopdeq_lwpf.solvers import Equilibrium, Termination
from hopdeq_lwpf.solvers.base import check_count, check_number


class TanhCell(nn.Module):
    """f(z, x) = tanh(c W z + U x + b), |W| = 1: a contraction of at most c for c < 1, whatever is learned.

    x (B, inputs) -> z (B, hidden). contraction: c; 0.9 needs at most ln 10 / -ln 0.9 = 22 plain steps a digit.
    The norm of W is kept by torch's spectral normalisation, by power iteration: approximately.
    """

    def __init__(self, inputs: int, hidden: int, contraction: float = 0.9) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, hidden)
        recur = nn.Linear(hidden, hidden, bias=False)
        self.recur = nn.utils.parametrizations.spectral_norm(recur)
        self.contraction = contraction

    def prepare(self, x: Tensor) -> Tensor:
        """U x + b, once a solve."""
        return self.enter(x)

    def init(self, x: Tensor) -> Tensor:
        """Zeros (B, hidden)."""
        return torch.zeros_like(x)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.contraction * self.recur(z) + x)


class EquilibriumClassifier(nn.Module):
    """Inputs (B, ...) -> equilibrium of a `TanhCell` -> dropout -> logits (B, classes).

    inputs: numbers of a sample, 64 as the digits have. hidden: width of the state. classes: logits.
    contraction: of the cell. steps, solver, adjoint: as in `Equilibrium`; rtol, max_steps: of its solve.
    """

    def __init__(  # noqa: PLR0913 (one network, many dials)
        self,
        inputs: int = 64,
        hidden: int = 64,
        classes: int = 10,
        *,
        contraction: float = 0.9,
        dropout: float = 0.0,
        steps: int | None = None,
        solver: str = "auto",
        adjoint: str = "implicit",
        rtol: float = 1e-5,
        max_steps: int = 200,
    ) -> None:
        super().__init__()
        for name, value in (("inputs", inputs), ("hidden", hidden), ("classes", classes)):
            check_count(name, value, 1)
        for name, share in (("contraction", contraction), ("dropout", dropout)):
            check_number(name, share, 0.0, math.inf if name == "contraction" else 1.0)
        cell = TanhCell(inputs, hidden, contraction)
        stop = Termination(rtol=rtol, max_steps=max_steps)
        self.layer = Equilibrium(cell, steps=steps, solver=solver, stop=stop, adjoint=adjoint)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, classes)

    def forward(self, data: Tensor) -> Tensor:
        return self.head(self.dropout(self.layer(data.flatten(1))))


class BagClassifier(nn.Module):
    """Bags (B, N, ...) -> Hopfield layer -> one vector a bag -> logits (B, outputs), or (B,) for one.

    layer: `HopfieldPooling`, whose states pool the bag; or `Hopfield` or `HopfieldLayer`, whose outputs for the
    instances are laid side by side where `instances`, their number, is given, as the hflayers notebooks do, and
    averaged over those that are not padding where it is None.
    """

    def __init__(self, layer: nn.Module, *, outputs: int = 1, instances: int | None = None) -> None:
        super().__init__()
        check_count("outputs", outputs, 1)
        if instances is not None:
            check_count("instances", instances, 1)
        self.layer = layer
        self.pools = isinstance(layer, HopfieldPooling)
        self.instances = instances
        core: Any = getattr(layer, "hopfield", layer)
        options = core.options
        width = options.input_size if options.output_size is None else options.output_size
        if options.disable_out_projection:
            width = options.num_heads * options.value_width
        count = layer.pooling_weights.shape[0] if isinstance(layer, HopfieldPooling) else instances or 1
        self.head = nn.Linear(count * width, outputs)

    def forward(self, data: Tensor, mask: Tensor | None = None) -> Tensor:
        """data (B, N, ...); mask (B, N) bool, True where there is no instance."""
        data = data.flatten(2)
        out = self.layer(data) if isinstance(self.layer, HopfieldLayer) else self.layer(data, mask)
        if not self.pools and self.instances is not None:
            if data.shape[1] != self.instances:
                raise ValueError(
                    f"the network was built for bags of instances={self.instances}, got {data.shape[1]}; use "
                    "instances=None for bags of any size"
                )
            out = out.flatten(1)
        elif not self.pools:
            kept = out.new_ones(data.shape[:2]) if mask is None else (~mask).to(out.dtype)
            out = (out * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp_min(1)
        logits = self.head(out)
        return logits.squeeze(-1) if logits.shape[-1] == 1 else logits


class PictureClassifier(nn.Module):
    """Pictures (B, height * width), row by row as the data sets have them, or (B, channels, height, width) -> logits
    of a `VisionTransformer`.
    """

    def __init__(self, vision: VisionTransformer) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, data: Tensor) -> Tensor:
        return self.vision(data.unflatten(1, self.vision.image_shape) if data.ndim == 2 else data)


LAYERS = ("hopfield", "pooling", "lookup", "diffusion", "diffusion_pooling", "diffusion_lookup")
MODELS = ("repertoire", "vision_transformer", "ham", "chn")  # of `models.build`, logits and all
NETWORKS: dict[str, Callable[..., nn.Module]] = {"equilibrium": EquilibriumClassifier}


def build_network(settings: Mapping[str, Any]) -> nn.Module:
    """A network from {"model": name, **options}.

    "equilibrium": the options of `EquilibriumClassifier`. "hopfield", "pooling", "lookup" and the same three with
    diffusion, "diffusion", "diffusion_pooling", "diffusion_lookup": those of `BagClassifier` and of its layer
    (`hopdeq_lwpf.models.build`), with rtol and max_steps for its `stop`.
    "repertoire", "vision_transformer", "ham", "chn": those of `RepertoireClassifier`, `VisionTransformer`, `HAM` and
    `CHN`, likewise; the states of the output layer of the last two are the logits.
    An unknown name or option is a ValueError with the nearest.
    """
    name = settings.get("model")
    if name not in (*LAYERS, *MODELS):
        if name not in NETWORKS and class_at("model", name) is None:
            raise unknown("model", name, (*NETWORKS, *LAYERS, *MODELS))
        network: nn.Module = construct("model", settings, NETWORKS)
        return network
    options = dict(settings)
    stop = {key: options.pop(key) for key in ("rtol", "max_steps") if key in options}
    if stop:
        options["stop"] = Termination(**stop)
    if name in MODELS:
        model: nn.Module = build(options)
        return PictureClassifier(model) if isinstance(model, VisionTransformer) else model
    own = {key: options.pop(key) for key in ("outputs", "instances") if key in options}
    return BagClassifier(build(options), **own)
