"""Plain recall from files to a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from hopdeq_lwpf import Result, Solution, Termination, open_patterns, retrieve
from hopdeq_lwpf.data import DataError, Preprocessing, read_array, write_arrays
from hopdeq_lwpf.data.files import check_output
from hopdeq_lwpf.retrieval import Retrieval, streams
from hopdeq_lwpf.streaming import PatternSource
from hopdeq_lwpf.streaming.files import SUFFIXES, FilePatterns
from hopdeq_lwpf.sweeps.engine.progress import progress
from hopdeq_lwpf.sweeps.reports.summary import Grid
from hopdeq_lwpf.sweeps.spec import CONVERGED, RetrieveSpec, SpecError

SOLUTION_FIELDS = ("value", "state", "result", "residual", "steps", "evaluations")
FIELDS = (*SOLUTION_FIELDS, "index", "weight", "support")
# A file of so many bytes is mapped and not read: reading takes several times its size, and mapping it costs little.
MAP_FROM = 2**28


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
    A query that holds NaN ends as NONFINITE and harms no other; so does every query if patterns of a mapped file do,
    which nobody has looked at before. Raises SpecError or DataError.
    """
    check_output(spec.out)
    dtype = {"float32": torch.float32, "float64": torch.float64}[spec.dtype]
    mapped = _maps(spec)
    raw = _stored(spec.patterns, "patterns", dtype, mapped, must=spec.stream is True)
    names = ("queries", "query")
    queries = read_array(spec.queries, names=names, width=raw.shape[1], finite=False, dtype=dtype)
    values = None if spec.normalize == "none" else raw
    if spec.values is not None:
        values = _stored(spec.values, "values", dtype, mapped)
        if len(values) != len(raw):
            raise DataError(f"{spec.values}: has {len(values)} rows, but there are {len(raw)} patterns")
    patterns: Tensor | PatternSource = raw
    if isinstance(raw, Tensor):
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


def _maps(spec: RetrieveSpec) -> bool:
    """Whether files are mapped where they can be: what is normalised is another array, in memory."""
    path = Path(spec.patterns)
    if spec.normalize != "none" or spec.stream is False or path.suffix not in SUFFIXES:
        return False
    if spec.stream:
        return True
    if not path.is_file() or path.stat().st_size < MAP_FROM:
        return False
    forgetting = None if spec.forgetting == "none" else spec.forgetting
    with _as_settings():
        return streams(Retrieval(spec.beta, separation=spec.separation, forgetting=forgetting))


def _stored(
    path: str, name: str, dtype: torch.dtype, mapped: bool, must: bool = False
) -> Tensor | FilePatterns:
    """The rows of a file, mapped if `mapped` says so and its kind allows it, or in memory. must: never the latter."""
    packed = Path(path).suffix == ".safetensors"
    if mapped and Path(path).suffix in SUFFIXES:
        try:
            return open_patterns(path)
        except DataError:
            if must or packed:
                raise  # else it may hold integers, say, which can be read
    if not packed:
        return read_array(path, names=(name,), dtype=dtype)
    rows = open_patterns(path).tensor.to(dtype)
    if not bool(rows.isfinite().all()):
        raise DataError(f"{path}: holds NaN or a value too large for {dtype}")
    return rows


@contextmanager
def _as_settings() -> Iterator[None]:
    """What is wrong with settings as a SpecError, in one line."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise SpecError(" ".join(str(error).split())) from error


def _recall(
    queries: Tensor,
    patterns: Tensor | PatternSource,
    values: Tensor | PatternSource | None,
    spec: RetrieveSpec,
) -> dict[str, Tensor]:
    with _as_settings(), torch.no_grad():
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
            stream=spec.stream,
        )
    arrays = {name: getattr(recall, name) for name in FIELDS} | {"converged": recall.converged}
    return arrays if recall.energy is None else arrays | {"energy": recall.energy}
