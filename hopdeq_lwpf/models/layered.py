"""What hierarchical networks have in common: their layers, weights and drives, and how a state is laid out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hopdeq_lwpf._types import check_float_tensor, check_same_kind, wide
from hopdeq_lwpf.forgetting import Forgetting
from hopdeq_lwpf.models.lagrangians import Neurons
from hopdeq_lwpf.models.layer_graph import LayerGraph
from hopdeq_lwpf.solvers.picard import Picard

# Standard deviation of the first biases, as Goemaere et al. 2024 have it.
BIAS_STD = 0.01

Layers = dict[int, Tensor]  # something of each layer, by its number
Same = TypeVar("Same", bound="HierarchicalFunction")


class HierarchicalContext(NamedTuple):
    """What stays fixed during a solve; built by `prepare`. B = number of problems."""

    drives: tuple[
        Tensor, ...
    ]  # of layers 1, 2, ...: b + U rho(x), (B, n_i), or b, (n_i,), where x does not reach
    thresholds: tuple[Tensor | None, ...]  # of their forgetting units: (B, 1) or a scalar
    start: Tensor  # (*batch, n): the state to start at


class HierarchicalFunction(nn.Module):
    """What the two kinds of network have in common: layers, weights, layout of the state.

    The state holds the layers of `order` side by side, (*batch, sum of their widths). `even_odd`: the form, which
    `in_form` changes without touching the parameters. damping: the share of the old state that a step keeps; a step is
    then one of explicit Euler of length 1 - damping (appendix A), and fixed points stay what they are.
    """

    state_ndim = 1
    inject = "input"  # x drives every step, so that a detached start loses no gradient

    def __init__(
        self, graph: LayerGraph, neurons: Sequence[Neurons], *, even_odd: bool = False, damping: float = 0.0
    ) -> None:
        super().__init__()
        Picard(damping)  # checks it
        if not isinstance(even_odd, bool):
            raise TypeError(f"even_odd must be True or False, got {even_odd!r}")
        if even_odd:
            graph.check_even_odd()
        self.graph = graph
        self.even_odd = even_odd
        self.damping = float(damping)
        self.neurons = nn.ModuleList(neurons)
        widths = graph.widths
        self.weights = nn.ParameterDict(
            {f"{i}_{j}": nn.Parameter(torch.empty(widths[j], widths[i])) for i, j in graph.pairs}
        )
        self.biases = nn.ParameterDict({str(i): nn.Parameter(torch.empty(widths[i])) for i in graph.free})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights by Xavier's uniform rule for each pair of layers, new biases from N(0, 0.01^2)."""
        for weight in self.weights.values():
            nn.init.xavier_uniform_(weight)
        for bias in self.biases.values():
            nn.init.normal_(bias, std=BIAS_STD)

    @property
    def order(self) -> tuple[int, ...]:
        """The layers that the state holds, in their order."""
        return self.graph.free

    @property
    def accelerates(self) -> bool:
        """Whether guarded L-BFGS has been shown to keep the basins of plain steps, in about half as many of them."""
        return False

    @property
    def forgets(self) -> bool:
        """Whether a layer has a forgetting unit."""
        return any(self._neurons(i).forgets for i in self.graph.free)

    def in_form(self: Same, even_odd: bool) -> Same:
        """The same network, sharing every parameter, with its states in the other form."""
        if even_odd:
            self.graph.check_even_odd()
        other = copy.copy(self)
        other.even_odd = even_odd
        return other

    def prepare(self, x: Tensor) -> HierarchicalContext:
        """The drive b + U rho(x) of each layer, once a solve, and what the forgetting units draw: x (*batch, n_0).

        Thresholds are drawn on the way up from the input: of each layer from the state that its drive, the layers below
        as they were just found, and the layers above at their start make. So they are the same in both forms.
        """
        self._check(x)
        flat = x.reshape(-1, x.shape[-1])
        entered = self._neurons(0).activate(flat)
        drives = []
        for i in self.graph.free:
            bias = self.biases[str(i)]
            reached = (0, i) in self.graph.pairs
            drives.append(bias + functional.linear(entered, self._weight(0, i)) if reached else bias)
        start = x.new_zeros((*x.shape[:-1], sum(self.graph.widths[i] for i in self.order)))
        context = HierarchicalContext(tuple(drives), (None,) * len(drives), start)
        return context if not self._draws else context._replace(thresholds=self._drawn(context))

    def init(self, x: HierarchicalContext) -> Tensor:
        """Zeros, (*batch, n), as in the paper."""
        return x.start

    def forward(self, z: Tensor, x: HierarchicalContext) -> Tensor:
        """One step: (*batch, n) -> (*batch, n)."""
        return self._joined(self._image(self._split(z), x), z)

    def step(self, z: Tensor, x: HierarchicalContext) -> tuple[Tensor, Tensor]:
        """f(z, x), and the state of the output layer after that step, (*batch, n_last)."""
        image = self._image(self._split(z), x)
        last = image[self.graph.last]
        return self._joined(image, z), last.to(z.dtype).reshape(*z.shape[:-1], last.shape[-1])

    def states(self, z: Tensor, x: HierarchicalContext) -> tuple[Tensor, ...]:
        """The states of the layers 1, 2, ..., (*batch, n_i) each; odd ones that z does not hold are computed."""
        found = self._every(self._split(z), x)
        return tuple(found[i].reshape(*z.shape[:-1], self.graph.widths[i]) for i in self.graph.free)

    def evaluate(
        self, z: Tensor, x: HierarchicalContext
    ) -> tuple[Tensor, Callable[[], Tensor], Tensor | None]:
        """f(z, x), a function that makes E(z, x), and how many neurons are kept, None where none forgets."""
        kept = self._kept(self._every(self._split(z), x), x) if self.forgets else None
        return self(z, x), lambda: self.energy(z, x), None if kept is None else kept.reshape(z.shape[:-1])

    def energy(self, z: Tensor, x: HierarchicalContext) -> Tensor:
        """E(z): (*batch, n) -> (*batch), in float32 or wider."""
        raise NotImplementedError(f"{type(self).__name__} must override energy(z, x)")

    def _image(self, states: Layers, x: HierarchicalContext) -> Layers:
        """f by layers, damped; those of `order` and the output layer at least."""
        raise NotImplementedError(f"{type(self).__name__} must override _image(states, x)")

    def select(self, x: HierarchicalContext, live: Tensor) -> tuple[HierarchicalContext, Tensor]:
        """The context of the live problems, and their rows."""
        rows = live.nonzero().squeeze(1)

        def kept(part: Tensor | None) -> Tensor | None:
            return part.index_select(0, rows) if part is not None and part.ndim > 1 else part

        start = x.start.reshape(-1, x.start.shape[-1]).index_select(0, rows)
        drives = tuple(part for drive in x.drives if (part := kept(drive)) is not None)
        return HierarchicalContext(drives, tuple(map(kept, x.thresholds)), start), rows

    def _neurons(self, i: int) -> Neurons:
        return self.neurons[i]  # type: ignore[return-value]

    def _weight(self, i: int, j: int) -> Tensor:
        """From layer i to layer j, (n_j, n_i)."""
        return self.weights[f"{i}_{j}"] if i < j else self.weights[f"{j}_{i}"].T

    def _check(self, x: Tensor) -> None:
        check_float_tensor("x", x)
        width = self.graph.widths[0]
        if x.ndim < 1 or x.shape[-1] != width:
            raise ValueError(
                f"x must have shape (*batch, {width}), the width of the input layer, got {tuple(x.shape)}"
            )
        if not torch.is_autocast_enabled(x.device.type):
            check_same_kind("x", x, "the network", self.biases["1"])

    def _split(self, z: Tensor) -> Layers:
        widths = [self.graph.widths[i] for i in self.order]
        if z.shape[-1] != sum(widths):
            raise ValueError(
                f"the state must have width {sum(widths)}, the layers {self.order}, got {tuple(z.shape)}"
            )
        return dict(zip(self.order, z.reshape(-1, sum(widths)).split(widths, -1), strict=True))

    def _joined(self, layers: Layers, z: Tensor) -> Tensor:
        return torch.cat([layers[i] for i in self.order], -1).to(z.dtype).reshape(z.shape)

    def _damped(self, new: Tensor, old: Tensor) -> Tensor:
        return new.to(old.dtype).lerp(old, self.damping) if self.damping else new

    def _kept(self, states: Mapping[int, Tensor], x: HierarchicalContext) -> Tensor | None:
        """How many neurons of all these layers are kept, (B,)."""
        counts = [self._neurons(i).kept(s, x.thresholds[i - 1]) for i, s in states.items()]
        total = sum(count for count in counts if count is not None)
        return total if isinstance(total, Tensor) else None

    def _activated(self, states: Mapping[int, Tensor], x: HierarchicalContext) -> Layers:
        return {i: self._neurons(i).activate(s, x.thresholds[i - 1]) for i, s in states.items()}

    def _field(self, i: int, rho: Mapping[int, Tensor], x: HierarchicalContext) -> Tensor:
        """What layer i receives: b + U rho(x) + the sum of W rho over those of its neighbours that `rho` has."""
        total = x.drives[i - 1]
        # Under autocast the products alone are rounded, not the sum.
        fused = not torch.is_autocast_enabled(total.device.type)
        for j, activation in rho.items():
            if (min(i, j), max(i, j)) in self.graph.pairs:
                weight = self._weight(j, i)
                total = (
                    torch.addmm(total, activation, weight.T)
                    if fused
                    else total + functional.linear(activation, weight)
                )
        return total

    def _fields(self, layers: Sequence[int], rho: Mapping[int, Tensor], x: HierarchicalContext) -> Layers:
        return {i: self._field(i, rho, x) for i in layers}

    def _every(self, states: Layers, x: HierarchicalContext) -> Layers:
        """The states of all free layers, in order; odd ones that are not given are what the even ones make."""
        if len(states) == len(self.graph.free):
            return states
        found = {**states, **self._fields(self.graph.odd, self._activated(states, x), x)}
        return {i: found[i] for i in self.graph.free}

    def _coupling(self, rho: Mapping[int, Tensor]) -> Tensor:
        """rho W rho / 2, each pair of layers once: (B,)."""
        pairs = [(i, j) for i, j in self.graph.pairs if i]
        terms = [wide(functional.linear(rho[i], self._weight(i, j))) * wide(rho[j]) for i, j in pairs]
        return torch.stack([term.sum(-1) for term in terms]).sum(0)

    def _driven(self, rho: Mapping[int, Tensor], x: HierarchicalContext) -> Tensor:
        """(b + U rho(x)) rho: (B,)."""
        return torch.stack([(wide(x.drives[i - 1]) * wide(r)).sum(-1) for i, r in rho.items()]).sum(0)

    @property
    def _draws(self) -> bool:
        units = [self._neurons(i).forgetting for i in self.graph.free]
        return any(type(unit).draw is not Forgetting.draw for unit in units)

    def _drawn(self, x: HierarchicalContext) -> tuple[Tensor | None, ...]:
        # All layers at zero, where no unit has drawn yet: what is sent down from there is not forgotten.
        rows = x.start.reshape(-1, x.start.shape[-1]).shape[0]
        zeros = {i: x.start.new_zeros((rows, self.graph.widths[i])) for i in self.graph.free}
        rho = {i: self._neurons(i).lagrangian.activate(zero) for i, zero in zeros.items()}
        drawn: list[Tensor | None] = []
        for i in self.graph.free:
            s = self._field(i, rho, x).expand(zeros[i].shape)
            drawn.append(self._neurons(i).forgetting.draw(s))
            rho[i] = self._neurons(i).activate(s, drawn[-1])
        return tuple(drawn)
