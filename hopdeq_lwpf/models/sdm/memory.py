"""Sparse Distributed Memory as a layer: recall of stored patterns from noisy queries."""

from __future__ import annotations

import torch
from torch import Tensor

from hopdeq_lwpf.forgetting import Forgetting
from hopdeq_lwpf.models.sdm.function import SDMContext, SDMFunction
from hopdeq_lwpf.models.sdm.recalls import AssociativeMemory, SDMRecall
from hopdeq_lwpf.models.sdm.weights import ReadWeights
from hopdeq_lwpf.solvers.adjoints import Adjoint
from hopdeq_lwpf.solvers.base import Solver, check_count
from hopdeq_lwpf.solvers.termination import Termination


class SDM(AssociativeMemory):
    """Sparse Distributed Memory (Kanerva 1988) in the form of Bricken and Pehlevan 2021: query -> recalled pattern.

    A read is post(P^T w), w the normalised read weights of the patterns P; it is iterated to a fixed point, or
    `steps` times. `f` is the fixed-point function (`SDMFunction`); `last_solution` the detached `SDMRecall` of the last
    call, which also says how many reads were empty and how many queries ended in a cycle.

    weights: what a pattern weighs: `Circle(d)` exact binary SDM; `Cap(d)` exact continuous SDM; both with neurons=r
        for finitely many, drawn once; `Neurons.random(r, n, d)` explicit ones; `Attention(beta)`, learned where beta is
        a Parameter, `Attention.fitted(n, d)`, `TransformerAttention()`.
    space: "binary": patterns and queries of 0 and 1, any dtype; post is a threshold, ties become 0. "continuous":
        patterns and queries are normalised to length 1, and so is each state.
    forgetting: None, a name ("relu", "pfu", "topk") or a unit, acting on the logarithms of the weights; those of
        Circle and Cap are below 0 for infinitely many neurons, so that "relu" forgets everything.
    empty: what a read does that reaches no pattern (all weights 0): "keep" the state, as was meant by the published
        code, where binary states became 0; "mean" of all patterns; or "error", an EmptyReadError. With pointers "keep"
        reads out 0.
    read_out: of pointers: "threshold", "sphere" or "identity"; None: "threshold" in the binary space, else "identity",
        as the published projections have it.
    steps, solver, stop, adjoint, on_failure: as in `Equilibrium`; solver "auto" is Picard. Thresholded states, `Circle`
        and finite neurons make f piecewise constant: no solver but Picard, and an error where a gradient is asked for.
    """

    f: SDMFunction

    def __init__(  # noqa: PLR0913 (one model, many dials)
        self,
        weights: ReadWeights,
        *,
        space: str = "binary",
        forgetting: None | str | Forgetting = None,
        empty: str = "keep",
        read_out: str | None = None,
        steps: int | None = None,
        solver: str | Solver = "auto",
        stop: Termination = Termination(),  # noqa: B008 (frozen)
        adjoint: str | Adjoint = "implicit",
        on_failure: str = "warn",
    ) -> None:
        f = SDMFunction(weights, space=space, forgetting=forgetting, empty=empty, read_out=read_out)
        super().__init__(f, steps=steps, solver=solver, stop=stop, adjoint=adjoint, on_failure=on_failure)

    def problem(
        self,
        query: Tensor | SDMContext,
        patterns: Tensor | None = None,
        pointers: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        return_solution: bool = False,
    ) -> tuple[SDMContext, Tensor]:
        """What `forward` with these arguments solves: context and start; see `Equilibrium.problem`."""
        x = self.f.prepare(query, patterns, pointers, mask)
        return x, self.f.init(x)

    def forward(  # type: ignore[override]
        self,
        query: Tensor | SDMContext,
        patterns: Tensor | None = None,
        pointers: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        return_solution: bool = False,
    ) -> Tensor | SDMRecall:
        """query (*batch, n), patterns (N, n) or sets of them -> (*batch, n), or (*batch, w) with pointers.

        patterns: (N, n) shared; with as many dimensions as the query one set for the queries of its second last
            dimension; with one more one set a query. The addresses of what is stored.
        pointers: what each address points to, patterns' shape with another width w (hetero-association): the state
            moves among the addresses, and the last read is of the pointers. None: the patterns themselves.
        mask: bool, True = ignore; one entry a pattern, or (*batch, N).
        steps counts reads: k - 1 state updates and one read of the pointers; None reads at the fixed point.

        Raises ValueError or TypeError for input that does not fit, of other numbers than 0 and 1 in the binary space,
        or that requires grad where there is none; EmptyReadError with empty="error".
        """
        x = self.f.prepare(query, patterns, pointers, mask)
        return self._recall(x, x.pointers is not None, return_solution)

    def sequence(
        self, query: Tensor, patterns: Tensor, pointers: Tensor, length: int, *, mask: Tensor | None = None
    ) -> Tensor:
        """Follow the pointers: each read-out is the next query. -> (length, *batch, n).

        pointers: as wide as the patterns; patterns.roll(-1, 0) makes a ring of them. steps=1 is Kanerva's chain of
        single reads; with more, or None, each address is cleaned up before its pointer is read.
        """
        check_count("length", length, 1)
        x = self.f.prepare(query, patterns, pointers, mask)
        if x.pointers is None or x.pointers.shape[-1] != x.keys.shape[-1]:
            raise ValueError(
                f"a sequence needs pointers as wide as the patterns, {x.keys.shape[-1]}, got "
                f"{None if x.pointers is None else x.pointers.shape[-1]}"
            )
        found = []
        for _ in range(length):
            found.append(self.forward(query, patterns, pointers, mask))
            query = found[-1]  # type: ignore[assignment]
        return torch.stack(found)  # type: ignore[arg-type]
