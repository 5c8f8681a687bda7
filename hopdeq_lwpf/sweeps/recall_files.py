"""Plain recall from files to a file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from hopdeq_lwpf import Result, Solution, Termination, retrieve
from hopdeq_lwpf.data import DataError, Preprocessing, read_array, write_arrays
from hopdeq_lwpf.data.files import check_output
from hopdeq_lwpf.sweeps.engine.progress import progress
from hopdeq_lwpf.sweeps.reports.summary import Grid
from hopdeq_lwpf.sweeps.spec import CONVERGED, RetrieveSpec, SpecError

SOLUTION_FIELDS = ("value", "state", "result", "residual", "steps", "evaluations")
FIELDS = (*SOLUTION_FIELDS, "index", "weight", "support")


@dataclass(frozen=True)
class Recalled:
    """The recall of every query, one entry a query in every array."""

    arrays: dict[str, Tensor]  # FIELDS, converged, and energy where there is one
    failure: str | None  # what did not converge and what to try, in one sentence

    def grid(self) -> Grid:
        """The short table that is shown: what converged, and at what price."""
        arrays = self.arrays
        size, steps = len(arrays["index"]), arrays["steps"].numpy()
        codes = arrays["result"]
        counts = ", ".join(
            f"{int((codes == code).sum())} {code.name}" for code in Result if bool((codes == code).any())
        )
        residual = arrays["residual"].numpy()
        finite = residual[np.isfinite(residual)]
        spread = f"{np.median(finite):.1e}, {finite.max():.1e}" if finite.size else "-"
        weight = arrays["weight"][arrays["index"] >= 0]
        lines = [
            ("queries", str(size)),
            ("converged", f"{100 * float(arrays['converged'].double().mean()):.1f} % ({counts})"),
            ("steps: median, 95 %", f"{np.median(steps):g}, {np.quantile(steps, 0.95):.0f}"),
            ("residual: median, maximum", spread),
            ("weight of the strongest pattern, mean", f"{float(weight.mean()):.3f}" if len(weight) else "-"),
            ("everything forgotten", str(int((arrays["index"] < 0).sum()))),
        ]
        return Grid("Recall", ("", ""), tuple(lines))


def recall_files(spec: RetrieveSpec, console: Console | None = None) -> Recalled:
    """Recall the queries of a file and write the result; nothing is written unless all of it is there.

    With `normalize`, the search runs in the stored space and reads out the patterns as they are in the file.
    A query that holds NaN ends as NONFINITE and harms no other. Raises SpecError or DataError.
    """
    check_output(spec.out)
    dtype = {"float32": torch.float32, "float64": torch.float64}[spec.dtype]
    raw = read_array(spec.patterns, names=("patterns",), dtype=dtype)
    names = ("queries", "query")
    queries = read_array(spec.queries, names=names, width=raw.shape[1], finite=False, dtype=dtype)
    values = None if spec.normalize == "none" else raw
    if spec.values is not None:
        values = read_array(spec.values, names=("values",), dtype=dtype)
        if len(values) != len(raw):
            raise DataError(f"{spec.values}: has {len(values)} rows, but there are {len(raw)} patterns")
    prepare = Preprocessing.fit(raw, spec.normalize)
    patterns, queries = prepare(raw), prepare(queries)
    parts = []
    pieces = queries.split(spec.batch)
    with progress(len(pieces), "batches", console) as advance:
        for piece in pieces:
            parts.append(_recall(piece, patterns, values, spec))
            advance(f"{len(piece)} queries")
    arrays = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    write_arrays(spec.out, arrays, main="value")
    value, state, result, residual, steps, evaluations = (arrays[name] for name in SOLUTION_FIELDS)
    solved = Solution(value, state, result, residual, steps, evaluations)
    return Recalled(arrays, solved.failure() if spec.steps == CONVERGED else None)


def _recall(
    queries: Tensor, patterns: Tensor, values: Tensor | None, spec: RetrieveSpec
) -> dict[str, Tensor]:
    try:
        with torch.no_grad():
            recall = retrieve(
                queries,
                patterns,
                beta=spec.beta,
                values=values,
                forgetting=None if spec.forgetting == "none" else spec.forgetting,
                separation=spec.separation,
                steps=None if isinstance(spec.steps, str) else spec.steps,
                inject=spec.inject,
                inject_weight=spec.inject_weight,
                solver=spec.solver,
                stop=Termination(rtol=spec.rtol, atol=spec.atol, max_steps=spec.max_steps),
            )
    except (ValueError, TypeError) as error:
        raise SpecError(" ".join(str(error).split())) from error
    arrays = {name: getattr(recall, name) for name in FIELDS} | {"converged": recall.converged}
    return arrays if recall.energy is None else arrays | {"energy": recall.energy}
