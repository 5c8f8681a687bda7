"""diagnose(): everything that can be said about a solve, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hopdeq_lwpf._types import Context, Result, Solution, State
from hopdeq_lwpf.diagnostics.basins import basin_changed, picard_limit
from hopdeq_lwpf.diagnostics.fixed_points import Classification, Usage, classify, usage
from hopdeq_lwpf.diagnostics.spectrum import Spectrum, spectral_radius
from hopdeq_lwpf.diagnostics.theory import Storage, storage_condition
from hopdeq_lwpf.forgetting import Keep
from hopdeq_lwpf.recall import Recall
from hopdeq_lwpf.retrieval import Retrieval, RetrievalContext
from hopdeq_lwpf.separation import Softmax
from hopdeq_lwpf.solvers.base import check_count
from hopdeq_lwpf.solvers.view import StateView


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `print` it. None where a question does not apply.

    solution: what was diagnosed. kinds, usage: types of fixed points, and which patterns are used.
    spectrum: of the problems in `rows`. basins: (len(rows),) float64, 1 where plain iteration ends elsewhere,
    NaN where that is unknown. rows: int64, the problems (in the flattened batch) of spectrum and basins.
    storage: of the patterns, where theory covers this retrieval; `theory` says why it does not.
    """

    solution: Solution
    kinds: Classification | None
    usage: Usage | None
    spectrum: Spectrum
    basins: Tensor | None
    rows: Tensor
    storage: Storage | None
    theory: str

    def lines(self) -> list[tuple[str, str]]:
        """The table: (question, answer)."""
        table = [("problems", _convergence(self.solution))]
        if self.kinds is not None:
            table.append(("fixed points", str(self.kinds)))
        if self.usage is not None:
            table.append(("patterns", str(self.usage)))
        total = self.solution.result.numel()
        some = "" if len(self.rows) == total else f" (of {len(self.rows)} problems)"
        table.append((f"contraction{some}", str(self.spectrum)))
        if self.basins is not None:
            known = self.basins[~self.basins.isnan()]
            table.append(
                (f"basins{some}", f"{int(known.sum())} of {len(known)} ended elsewhere than plain iteration")
            )
        table.append(("storage", self.theory if self.storage is None else str(self.storage)))
        return table

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.lines())
        return "\n".join(f"{name:<{width}}  {answer}" for name, answer in self.lines())


def _convergence(solution: Solution) -> str:
    if not solution.result.numel():
        return "none"
    codes = [(code.name, int((solution.result == code).sum())) for code in Result]
    said = ", ".join(f"{count} {name}" for name, count in codes if count)
    steps = solution.steps.double()
    return f"{said}; steps median {float(steps.quantile(0.5)):g}, most {int(solution.steps.max())}"


def diagnose(
    solution: Solution,
    f: Callable[[State, Context], State],
    x: Context,
    z0: State | None = None,
    *,
    reference: bool = True,
    sample: int = 256,
    seed: int = 0,
) -> Diagnosis:
    """Ask everything of a solve: convergence, types of fixed points, dead patterns, contraction, basins, storage.

        f = Retrieval(64.0, forgetting="relu")
        x = f.prepare(queries, patterns)
        print(diagnose(fixed_point(f, x, f.init(x)), f, x))

    solution: a Solution, or a Recall of `retrieve` with an f and x of the same settings. f, x: what was
    solved. z0: where the solve started, None: `f.init(x)` where f has it.
    reference: compare basins with plain iteration in float64, where f has an energy and the start is known;
        see `picard_limit`.
    sample: problems at most whose contraction and basin are measured, drawn by `seed`; all where there are no
    more, and where f declares no `select`. 256 give a share an interval of at most +- 6 points.
    Questions about patterns are asked of a `Retrieval` only. Raises ValueError where a Recall was not made by
    f and x, as its energies then show.
    """
    if not isinstance(solution, Solution):
        raise TypeError(f"solution must be a Solution or a Recall, got {type(solution).__name__}")
    check_count("sample", sample, 1)
    check_count("seed", seed, 0)
    kinds = used = storage = None
    theory = "not asked: f is no Retrieval"
    with torch.no_grad():
        if isinstance(f, Retrieval):
            _check_made_by(solution, f, x)
            weights = f.weights(solution.state, x)
            mask = x.mask if x.mask is None or x.mask.ndim < 2 else x.mask.reshape(weights.shape)
            kinds = classify(weights, mask=mask)
            used = usage(weights, mask=mask, sets=len(x.patterns) if x.patterns.ndim > 2 else 1)
            storage, theory = _storage(f, x)
        state, start, some, rows = _sample(solution.state, z0, f, x, sample, seed)
    spectrum = spectral_radius(f, state, some)
    basins = None
    if reference and getattr(f, "has_energy", False) and start is not None:
        basins = basin_changed(state, picard_limit(f, some, start)).reshape(-1)
    return Diagnosis(solution, kinds, used, spectrum, basins, rows, storage, theory)


def _check_made_by(solution: Solution, f: Retrieval, x: RetrievalContext) -> None:
    """Energies tell another beta, forgetting or set of patterns."""
    if not isinstance(x, RetrievalContext):
        raise TypeError(f"x must be what f.prepare(queries, patterns) returned, got {type(x).__name__}")
    if solution.state.shape != x.start.shape:
        raise ValueError(
            f"the solution's state has shape {tuple(solution.state.shape)} but x was prepared for queries of "
            f"shape {tuple(x.start.shape)}; prepare it with the queries that were solved"
        )
    if not isinstance(solution, Recall) or solution.energy is None or not f.has_energy:
        return
    energy = f.energy(solution.state, x)
    # Scores in half precision are rounded relative to their own size.
    slack = 1e3 * torch.finfo(solution.state.dtype).eps * (1 + energy.abs())
    if bool(((energy - solution.energy).abs() > slack).any()):
        raise ValueError(
            "the recall was not made by this f and x: its energies differ. Give f the beta, forgetting and "
            "separation of the recall and prepare x with its queries, patterns and mask; a unit with noise draws "
            "anew in prepare, so solve with fixed_point(f, x, f.init(x)) there"
        )


def _storage(f: Retrieval, x: RetrievalContext) -> tuple[Storage | None, str]:
    """The storage condition of the patterns, or why theory says nothing."""
    reasons = [
        ("a separation other than softmax", type(f.separation) is not Softmax),
        ("forgetting", type(f.forgetting) is not Keep),
        ("an injected query", f.inject != "start"),
        ("euclidean scores", f.similarity != "dot"),
        ("a normalised state", f.normalization is not None),
        ("a bias of the scores", x.bias is not None),
    ]
    found = [name for name, present in reasons if present]
    if found:
        return None, f"the theorems do not cover {', '.join(found)}"
    beta = x.beta
    several = (isinstance(beta, Tensor) and beta.ndim > 0) or (x.mask is not None and x.mask.ndim > 1)
    if several:
        return None, "one beta or mask a query: ask storage_condition() for each"
    # Patterns as they lie in x: padding that is masked may hold anything.
    return storage_condition(x.patterns, beta, mask=None if x.mask is None else x.mask), ""


def _sample(
    state: State, z0: State | None, f: Callable[..., State], x: Context, sample: int, seed: int
) -> tuple[State, State | None, Context, Tensor]:
    """State, start and x of a seeded sample of the problems, and their rows."""
    view = StateView.of(f, state)
    if z0 is None and hasattr(f, "init"):
        z0 = f.init(x)
    rows = torch.arange(view.problems)
    select = getattr(f, "select", None)
    if select is None or view.problems <= sample:
        return state, z0, x, rows
    flat = view.flatten(state)
    chosen = torch.randperm(view.problems, generator=torch.Generator().manual_seed(seed))[:sample]
    live = torch.zeros(view.problems, dtype=torch.bool)
    live[chosen] = True
    # Others may come along, so that all groups keep equally many; they are as good a sample.
    some, kept = select(x, live.to(flat.device))
    start = None if z0 is None else view.unflatten(view.flatten(z0).index_select(0, kept))
    return view.unflatten(flat.index_select(0, kept)), start, some, kept
