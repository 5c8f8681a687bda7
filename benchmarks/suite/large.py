"""Solves of streamed patterns, and where plain iteration in float64 takes some of their queries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import residual
from benchmarks.problems import BETA, Stretched
from benchmarks.suite.measure import Call, Calls, Measure
from benchmarks.suite.row import Case, Found, Target
from benchmarks.suite.settings import MAX_STEPS, counts
from benchmarks.suite.sizes import SIZES
from hopdeq_lwpf import Termination, retrieve
from hopdeq_lwpf.recall import Recall
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.streaming import PatternSource, TensorPatterns

TOLERANCE = 1e-5
SAME = 0.05  # distance over length within which it is the same attractor
# Plain iteration goes on to this residual: at a contraction of .995 within 2e-4 of where it ends.
EXACT, MOST = 1e-6, 5000


def plain_limit(patterns: Tensor, query: Tensor) -> Tensor:
    """Where plain iteration in float64 takes each query: (N, d) or, a set a query, (B, n, d); (B, d) -> (B, d)."""
    patterns, z = patterns.double(), query.double()
    end, rows = z.clone(), torch.arange(len(z))
    for _ in range(MOST):
        if patterns.ndim == 2:
            image = torch.softmax(BETA * z @ patterns.T, -1) @ patterns
        else:
            weights = torch.softmax(BETA * (patterns @ z[:, :, None])[:, :, 0], -1)
            image = (weights[:, None] @ patterns)[:, 0]
        moving = (image - z).norm(dim=-1) > EXACT * image.norm(dim=-1)
        end[rows] = z = image
        z, rows = z[moving], rows[moving]
        patterns = patterns if patterns.ndim == 2 else patterns[moving]
        if not len(rows):
            break
    return end


@dataclass(frozen=True)
class Large:
    """Queries, patterns, and the ends of the first queries."""

    what: str
    query: Tensor
    source: PatternSource
    ends: Tensor  # none where no query is followed

    def recall(self, **given: Any) -> Recall:
        """`retrieve` with these options."""
        stop = Termination(rtol=TOLERANCE, max_steps=MAX_STEPS)
        with torch.no_grad():
            return retrieve(self.query, self.source, beta=BETA, stream=True, stop=stop, **given)

    def streamed_pass(self) -> Call:
        """One evaluation of f for all queries."""
        f = Retrieval(BETA)
        x = f.prepare(self.query, self.source)
        return torch.no_grad()(partial(f, self.query, x))

    def judge(self, recall: Recall) -> Found:
        f = Retrieval(BETA)
        x = f.prepare(self.query, self.source)
        with torch.no_grad():
            worst = float(residual(partial(f, x=x), recall.state).max())
        seen = recall.state[: len(self.ends)].double().cpu()
        far = (seen - self.ends).norm(dim=-1) > SAME * self.ends.norm(dim=-1)
        steps, evaluations = counts(recall)
        judged = len(far) or None
        return Found(steps, evaluations, worst, 0.0, int(far.sum()) if judged else None, judged)

    def case(self, group: str, method: str) -> Case:
        n, d = self.source.count, self.source.width
        return Case(group, self.what, method, n, len(self.query), d, "float32", TOLERANCE)

    def row(
        self,
        measure: Measure,
        case: Case,
        given: dict[str, object],
        *,
        beside: dict[str, object] | None = None,
        device: str = "cpu",
        targets: tuple[Target, ...] = (),
    ) -> None:
        """One row for a solve with these options of `retrieve`."""
        other = None if beside is None else partial(self.recall, **beside)
        calls = Calls(partial(self.recall, **given), self.streamed_pass(), beside=other, device=device)
        measure(case, calls, self.judge, targets)


def stretched(size: tuple[int, int, int], source: PatternSource, device: str = "cpu") -> Large:
    """A `Stretched` problem over its patterns in memory or in a file.

    The ends are those among the patterns of a query's own cluster, a thousand: all others together carry less than
    1e-4 of the weight there.
    """
    count, width, clusters = size
    made = Stretched(count, width, clusters)
    query, which = made.queries(SIZES.queries)
    tensor = source.tensor if isinstance(source, TensorPatterns) else None
    assert tensor is not None
    own = torch.stack(
        [tensor[int(cluster) :: clusters][: count // clusters] for cluster in which[: SIZES.judged]]
    )
    ends = plain_limit(own.cpu(), query[: SIZES.judged])
    return Large("stretched", query.to(device), source, ends)
