"""Hierarchical associative memories and continuous Hopfield networks as layers that return their equilibrium."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from hopdeq_lwpf._types import Solution, State, plain
from hopdeq_lwpf.forgetting import Forgetting
from hopdeq_lwpf.models.even_odd import ImplicitEvenOdd, ThroughEvenOdd, splits
from hopdeq_lwpf.models.hierarchical import CHNFunction, HAMFunction
from hopdeq_lwpf.models.lagrangians import Lagrangian
from hopdeq_lwpf.models.layer_graph import LayerGraph, make_neurons
from hopdeq_lwpf.models.layered import HierarchicalFunction
from hopdeq_lwpf.solvers import LBFGS, Adjoint, Equilibrium, Implicit, Solver, Termination
from hopdeq_lwpf.solvers.adjoints import make_adjoint
from hopdeq_lwpf.solvers.base import outside_of_compile

Network = TypeVar("Network", bound="HierarchicalNetwork")
Lagrangians = str | Lagrangian | Sequence[str | Lagrangian] | Mapping[int, str | Lagrangian]
Units = None | str | Forgetting | Mapping[int, None | str | Forgetting]
SIGMOID = "sigmoid"  # of Goemaere et al. 2024
# 256 inputs to networks 784-1280-510-200-10 at their first weights, rtol 1e-4: with the options of L-BFGS 4 end in
# another basin than plain steps and 11.9 steps a problem are taken back; with this cosine 1 and 2.8; with both none and
# .2, in 79 evaluations instead of 174.
KEEPS_BASINS = LBFGS(align=0.999, step_cap=10.0)


class HierarchicalNetwork(Equilibrium):
    """What `HAM` and `CHN` have in common: an `Equilibrium` of layers that reads out the last of them."""

    f: HierarchicalFunction

    def forward(  # type: ignore[override]
        self, x: Tensor, z0: State | None = None, *, return_solution: bool = False
    ) -> State | Solution:
        """x (*batch, n_0) -> the state of the output layer at the equilibrium, (*batch, n_last).

        z0: where to start, (*batch, n) as `f.order` lays the layers out; zeros by default, as in the paper. With
        return_solution the whole Solution: `value` is the output, `state` the equilibrium. `f.states(state,
        f.prepare(x))` has every layer by itself.
        """
        if self.steps is None and torch.compiler.is_compiling():
            return outside_of_compile(self.forward, x, z0, return_solution=return_solution)
        solution = cast(Solution, super().forward(x, z0, read_out=True, return_solution=True))
        last = cast(Solution, self.last_solution)
        self.last_solution = dataclasses.replace(last, value=plain(solution.value.detach()))
        return solution if return_solution else solution.value

    @property
    def solver(self) -> str | Solver:
        """The solver; "auto" depends on the form."""
        return self._automatic() if self._solver == "auto" else self._solver

    @solver.setter
    def solver(self, solver: str | Solver) -> None:
        self._solver = solver

    def _automatic(self) -> str | Solver:
        return KEEPS_BASINS if self.f.accelerates else "auto"

    @property
    def even_odd(self) -> bool:
        """Whether the states are those of the even-odd form."""
        return self.f.even_odd

    def to_even_odd(self: Network) -> Network:
        """The same network in the even-odd form; both share their parameters, and the keys of the state_dict."""
        return self._in_form(True)

    def to_one_matrix(self: Network) -> Network:
        """The same network in the one-matrix form; both share their parameters."""
        return self._in_form(False)

    def _in_form(self: Network, even_odd: bool) -> Network:
        f = self.f.in_form(even_odd)
        other = copy.copy(self)
        other._modules = {**self._modules, "f": f}
        other.last_solution = None
        return other

    @torch.no_grad()
    def energy_of(self, x: Tensor, solution: Solution) -> Tensor:
        """E of the equilibrium that the network found for x, (*batch)."""
        return self.f.energy(solution.state, self.f.prepare(x))

    def extra_repr(self) -> str:
        graph = self.f.graph
        skips = [pair for pair in graph.pairs if pair[1] - pair[0] > 1]
        parts = [f"layers={list(graph.widths)}", f"even_odd={self.even_odd}"]
        parts += [f"skips={skips}"] * bool(skips) + [f"damping={self.f.damping}"] * bool(self.f.damping)
        return ", ".join([*parts, super().extra_repr()])


class HAM(HierarchicalNetwork):
    """Hierarchical associative memory: layers of neurons that settle together, x (*batch, n_0) -> (*batch, n_last).

    Krotov 2021 in the form of Goemaere et al. 2024, eq. 6 and 10; `f` is the fixed-point function with its energy and
    metric (`models.hierarchical.HAMFunction`). The output is the state s of the last layer, not its activation, as the
    published loss |s - one-hot|^2 / 2 has it. `last_solution` holds the detached Solution of the last call.

    layers: widths (input, hidden ..., output). even_odd: the state holds the even layers alone (counted from the input,
        0); the same equilibria from less than half of the numbers, without the cycles of length 2 that updating all
        layers at once can end in. False by default: it takes any connections.
    lagrangian: "sigmoid", which is sigmoid(4 s - 2), "tanh", "relu", "identity", "softmax", "layernorm", "sphere", or
        an object of `models.lagrangians`; a sequence with one a layer, input included; or a mapping from layer numbers,
        the others being "sigmoid". The input layer uses its activation alone, on x.
    forgetting: None, a name ("relu", "pfu", "topk") or a unit, for all hidden layers; or a mapping from layer numbers.
    skips: pairs of layers that are connected beside neighbours; with even_odd one must be even and one odd.
    damping: the share of the old state that a step keeps, 0 as in the paper.
    steps, solver, stop, adjoint, on_failure: as in `Equilibrium`, but for two defaults. steps=k ends at the k-th
        iterate from zero; x moves one layer up in a step of the one-matrix form, two in one of the even-odd form.
    solver: "auto" is guarded L-BFGS in the even-odd form where there is a metric, else Picard. In the one-matrix form
        it solves the even-odd form, where the connections have one and there is no damping: the layers end where
        plain steps of either form end them, or in an equilibrium where those of the one-matrix form end in a cycle;
        `Solution.steps` are then those of the even-odd form. "picard" makes the steps of the one-matrix form.
    adjoint: "implicit" is `Implicit(solver="gmres")`, unless every layer of the state is linear: neurons that saturate
        have rho' near 0, and in the metric rho' CG then needs 82 to over 200 products where GMRES needs 12 to 32
        (layers 64-128-64-32-10 at their first weights, rtol 1e-6). Its rtol is that of `stop`, between 1e-6 and 1e-3;
        in the one-matrix form the odd layers are eliminated, under the conditions of "auto" above.

    No parameter knows the batch. Weights start by Xavier's rule, biases from N(0, 0.01^2). Raises ValueError or
    TypeError for settings that are not known or do not go together.
    """

    f: HAMFunction

    def __init__(  # noqa: PLR0913 (one model, many dials)
        self,
        layers: Sequence[int],
        *,
        lagrangian: Lagrangians = SIGMOID,
        forgetting: Units = None,
        even_odd: bool = False,
        skips: Iterable[Sequence[int]] = (),
        damping: float = 0.0,
        steps: int | None = None,
        solver: str | Solver = "auto",
        stop: Termination = Termination(),  # noqa: B008 (frozen)
        adjoint: str | Adjoint = "implicit",
        on_failure: str = "warn",
    ) -> None:
        graph = LayerGraph.of(layers, skips)
        neurons = make_neurons(graph, lagrangian, forgetting, SIGMOID)
        f = HAMFunction(graph, neurons, even_odd=even_odd, damping=damping)
        super().__init__(f, steps=steps, solver=solver, stop=stop, adjoint=adjoint, on_failure=on_failure)

    def _automatic(self) -> str | Solver:
        chosen = super()._automatic()
        # Odd layers that are set in the end leave no path through the steps from the start.
        if chosen != "auto" or not splits(self.f) or not make_adjoint(self.adjoint).drops_z0:
            return chosen
        through = ThroughEvenOdd(KEEPS_BASINS if self.f.in_form(True).accelerates else "auto")
        return cast(Solver, through)

    @property
    def adjoint(self) -> str | Adjoint:
        """The adjoint; "implicit" depends on form, neurons and tolerance."""
        if self._adjoint != "implicit":
            return self._adjoint
        through = splits(self.f)
        kind = ImplicitEvenOdd if through else Implicit
        f = self.f.in_form(True) if through else self.f
        # What is left of the adjoint residual costs the gradient as much as what is left of the forward one.
        return kind("auto" if f.linear else "gmres", rtol=min(max(self.stop.rtol, 1e-6), 1e-3))

    @adjoint.setter
    def adjoint(self, adjoint: str | Adjoint) -> None:
        self._adjoint = adjoint


class CHN(HierarchicalNetwork):
    """Continuous Hopfield network in layers, x (*batch, n_0) -> the state of the output layer (*batch, n_last).

    Hopfield 1984 in the form of Goemaere et al. 2024, eq. 5 and 7; `f` is `models.hierarchical.CHNFunction`. Arguments
    are those of `HAM`, but for

    even_odd: odd and even layers take turns; the state holds all layers in either form.
    damping: 0.7. With the paper's 0.5 none of five problems converged in the one-matrix form of 64-128-64-32-10 at its
        first weights; with 0.7 all did.
    solver: "auto" is guarded L-BFGS; with the networks of `HAM` it took 21 steps instead of Picard's 31 in the even-odd
        form and 69 instead of 168 in the one-matrix form, of which 0 and 4 of 2,048 ended elsewhere (Picard 0 and 2).
    local_steps: of each layer in a turn of the even-odd form; 10, as in the published code.
    """

    f: CHNFunction

    def __init__(  # noqa: PLR0913 (one model, many dials)
        self,
        layers: Sequence[int],
        *,
        lagrangian: Lagrangians = SIGMOID,
        forgetting: Units = None,
        even_odd: bool = False,
        skips: Iterable[Sequence[int]] = (),
        damping: float = 0.7,
        local_steps: int = 10,
        steps: int | None = None,
        solver: str | Solver = "auto",
        stop: Termination = Termination(),  # noqa: B008 (frozen)
        adjoint: str | Adjoint = "implicit",
        on_failure: str = "warn",
    ) -> None:
        graph = LayerGraph.of(layers, skips)
        neurons = make_neurons(graph, lagrangian, forgetting, SIGMOID)
        f = CHNFunction(graph, neurons, even_odd=even_odd, damping=damping, local_steps=local_steps)
        super().__init__(f, steps=steps, solver=solver, stop=stop, adjoint=adjoint, on_failure=on_failure)
