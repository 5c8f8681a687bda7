"""Hierarchical and continuous Hopfield networks as fixed-point functions, with energy and metric.

Formulas are those of Goemaere et al. 2024 ("Accelerating Hopfield Network Dynamics", numbered as there), with the input
clamped. W is symmetric and made of one block for each connected pair of layers, stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hopdeq_lwpf._types import Matvec, identity, wide
from hopdeq_lwpf.models.lagrangians import Identity, Neurons
from hopdeq_lwpf.models.layer_graph import LayerGraph
from hopdeq_lwpf.models.layered import HierarchicalContext, HierarchicalFunction, Layers
from hopdeq_lwpf.solvers.base import check_count


class HAMFunction(HierarchicalFunction):
    """Hierarchical associative memory (Krotov 2021): s = W rho(s) + b + U rho(x), eq. 6.

    even_odd: the state holds the even layers alone, and a step updates the odd ones and then them, eq. 10:
    s_even = W_P^T rho(W_P rho(s_even) + b_odd + U_odd rho(x)) + b_even.

    E(s) = s.rho - L(s) - rho W rho / 2 - (b + U rho(x)).rho, eq. 3; in the even-odd form with the odd layers where they
    have their minimum: E(s_even) = s.rho - L(s) - b.rho - L(W_P rho(s_even) + b_odd + U_odd rho(x)). In both forms
    dE/ds = rho'(s) (s - f(s)).
    """

    @property
    def order(self) -> tuple[int, ...]:
        return self.graph.even if self.even_odd else self.graph.free

    @property
    def has_energy(self) -> bool:
        """Whether E falls along ds/dt = f(s) - s: so it does where every Lagrangian is convex, forgetting included.

        In the even-odd form no plain step raises it then, damped or not (the concave-convex procedure). In the
        one-matrix form a step must be short: damping >= 1 - 1 / (1 + c |W| / 2) will do where no rho' exceeds c,
        with |W| the spectral norm; undamped steps may end in cycles of length 2 (appendix E).
        """
        return all(self._neurons(i).convex for i in self.graph.free)

    def even_layers(self, z: Tensor) -> Tensor:
        """Of a state in the one-matrix form the even layers: (*batch, n) -> (*batch, sum of their widths)."""
        states = self._split(z)
        even = torch.cat([states[i] for i in self.graph.even], -1)
        return even.reshape(*z.shape[:-1], even.shape[-1])

    @property
    def linear(self) -> bool:
        """Whether every layer of the state is linear, so that rho' is the identity."""
        layers = [self._neurons(i) for i in self.order]
        return all(type(layer.lagrangian) is Identity and not layer.forgets for layer in layers)

    def _image(self, states: Layers, x: HierarchicalContext) -> Layers:
        return self._from(states, self._received(self._activated(states, x), x), x)

    def _received(self, rho: Mapping[int, Tensor], x: HierarchicalContext) -> Layers:
        """What the activations rho of the state's layers make: the odd layers, or in the one-matrix form all."""
        return self._fields(self.graph.odd if self.even_odd else self.order, rho, x)

    def _from(self, states: Layers, received: Layers, x: HierarchicalContext) -> Layers:
        """f by layers, from what was received."""
        if not self.even_odd:
            return {i: self._damped(new, states[i]) for i, new in received.items()}
        even = self._fields(self.graph.even, self._activated(received, x), x)
        return {**received, **{i: self._damped(new, states[i]) for i, new in even.items()}}

    def evaluate(
        self, z: Tensor, x: HierarchicalContext
    ) -> tuple[Tensor, Callable[[], Tensor], Tensor | None]:
        states = self._split(z)
        rho = self._activated(states, x)
        received = self._received(rho, x)
        kept = self._kept({**states, **received} if self.even_odd else states, x) if self.forgets else None
        return (
            self._joined(self._from(states, received, x), z),
            lambda: self._energy(states, rho, received, x).reshape(z.shape[:-1]),
            None if kept is None else kept.reshape(z.shape[:-1]),
        )

    @property
    def has_metric(self) -> bool:
        """Whether rho' is known to be symmetric, and in the layers of the state positive definite."""
        definite = all(self._neurons(i).definite for i in self.order)
        return definite and all(self._neurons(i).symmetric for i in self.graph.free)

    @property
    def accelerates(self) -> bool:
        return self.even_odd and self.has_energy and self.has_metric

    def energy(self, z: Tensor, x: HierarchicalContext) -> Tensor:
        states = self._split(z)
        rho = self._activated(states, x)
        return self._energy(states, rho, self._received(rho, x), x).reshape(z.shape[:-1])

    def _energy(self, states: Layers, rho: Layers, received: Layers, x: HierarchicalContext) -> Tensor:
        """E, (B,), from products that f has made already."""
        total = torch.zeros((), device=x.start.device)
        for i, s in states.items():
            # b rho + rho W rho / 2, of which rho has received b + W rho.
            drive = x.drives[i - 1] if self.even_odd else 0.5 * (wide(x.drives[i - 1]) + wide(received[i]))
            pull = ((wide(s) - wide(drive)) * wide(rho[i])).sum(-1)
            total = total + pull - self._neurons(i).value(s, x.thresholds[i - 1])
        if self.even_odd:
            for i, s in received.items():
                total = total - self._neurons(i).value(s, x.thresholds[i - 1])
        return total

    def metric(self, z: Tensor, x: HierarchicalContext) -> Matvec | None:
        """v -> rho'(s) v: rho'(s) df/ds = rho' W rho', and with the odd layers' D rho' W_P^T D W_P rho', are symmetric.

        None where rho' of a layer of the state can be singular (ReLU, softmax, normalisations, forgetting), or that of
        any layer is not symmetric.
        """
        if not self.has_metric:
            return None
        if self.linear:
            return identity
        slopes = {i: self._neurons(i).slope(s, x.thresholds[i - 1]) for i, s in self._split(z).items()}
        return lambda v: self._joined({i: slopes[i](part) for i, part in self._split(v).items()}, v)


class CHNFunction(HierarchicalFunction):
    """Continuous Hopfield network (Hopfield 1984): s = rho'(s) (W rho(s) + b + U rho(x)), eq. 5.

    even_odd: a step updates the odd layers from the even ones and then these from the new odd ones, eq. 7, each by
    `local_steps` damped iterations of its own equation, in which the other parity stays.

    E(s) = |s|^2 / 2 - rho W rho / 2 - (b + U rho(x)).rho, eq. 1, and f(s) - s = -dE/ds without damping.
    """

    def __init__(
        self,
        graph: LayerGraph,
        neurons: Sequence[Neurons],
        *,
        even_odd: bool = False,
        damping: float = 0.7,
        local_steps: int = 10,
    ) -> None:
        check_count("local_steps", local_steps, 1)
        super().__init__(graph, neurons, even_odd=even_odd, damping=damping)
        self.local_steps = local_steps

    @property
    def has_energy(self) -> bool:
        """Whether E falls along ds/dt = f(s) - s: it does, unless a forgetting unit lets rho jump.

        A step must be short for that; how short depends on weights and state.
        """
        return not any(self._neurons(i).forgets for i in self.graph.free)

    @property
    def accelerates(self) -> bool:
        return self.has_energy

    def _image(self, states: Layers, x: HierarchicalContext) -> Layers:
        if not self.even_odd:
            fields = self._fields(self.order, self._activated(states, x), x)
            return {i: self._iterated(i, states[i], fields[i], x, 1) for i in self.order}
        states = dict(states)
        for here, there in ((self.graph.odd, self.graph.even), (self.graph.even, self.graph.odd)):
            rho = self._activated({i: states[i] for i in there}, x)
            for i, received in self._fields(here, rho, x).items():
                states[i] = self._iterated(i, states[i], received, x, self.local_steps)
        return states

    def _iterated(self, i: int, s: Tensor, received: Tensor, x: HierarchicalContext, steps: int) -> Tensor:
        for _ in range(steps):
            s = self._damped(self._neurons(i).slope(s, x.thresholds[i - 1])(received.expand(s.shape)), s)
        return s

    def energy(self, z: Tensor, x: HierarchicalContext) -> Tensor:
        states = self._split(z)
        rho = self._activated(states, x)
        square = 0.5 * wide(z).square().sum(-1).reshape(-1)
        return (square - self._driven(rho, x) - self._coupling(rho)).reshape(z.shape[:-1])

    def metric(self, z: Tensor, x: HierarchicalContext) -> Matvec | None:
        """The identity in the one-matrix form, where df/ds is 1 minus a Hessian; None in the even-odd form."""
        symmetric = all(self._neurons(i).symmetric for i in self.graph.free)
        return identity if symmetric and not self.even_odd else None

    def extra_repr(self) -> str:
        return f"local_steps={self.local_steps}"
