"""One row of the table."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Target:
    """What a figure of a row should not exceed, such as overhead <= .3."""

    column: str
    most: float

    def verdict(self, figure: object) -> str:
        """Whether it is."""
        assert isinstance(figure, float)
        return f"{self.column} <= {self.most:g}: {'met' if figure <= self.most else 'missed'}"


@dataclass(frozen=True)
class Case:
    """What a row is about: N patterns, B queries, d dimensions."""

    group: str
    what: str
    method: str
    n: int
    b: int
    d: int
    dtype: str
    tolerance: float | None = None


@dataclass(frozen=True)
class Found:
    """What one call gave. Counts are means a query, so that dropped queries cost nothing; None: not part of the row.

    evaluations: of f; products: with its transposed Jacobian. residual: |f(z) - z| / |f(z)| of the worst query.
    elsewhere, judged: how many of how many queries ended in another basin than plain iteration in float64.
    """

    steps: float
    evaluations: float
    residual: float
    products: float = 0.0
    elsewhere: int | None = None
    judged: int | None = None
    gradient_error: float | None = None


@dataclass(frozen=True)
class Timed:
    """Milliseconds: median and interquartile range of the call (None: called once); medians of what ran in turn."""

    ms: float
    iqr: float | None
    f_ms: float
    product_ms: float = 0.0
    beside_ms: float | None = None


@dataclass(frozen=True)
class Row:
    """A case, what it gave and what that took. peak_mb: memory during the call above that before it."""

    case: Case
    found: Found
    timed: Timed
    peak_mb: float
    targets: tuple[Target, ...] = ()
    note: str = ""

    def record(self) -> dict[str, object]:
        """Every column of the table; None where a figure is not part of the row."""
        case, found, timed = self.case, self.found, self.timed
        floor = found.evaluations * timed.f_ms + found.products * timed.product_ms
        given = {field.name: getattr(case, field.name) for field in fields(case)}
        figures: dict[str, object] = {
            "ms": timed.ms,
            "iqr": timed.iqr,
            "steps": found.steps,
            "evaluations": found.evaluations,
            "products": found.products,
            "floor_ms": floor,
            "overhead": timed.ms / floor - 1,
            "step_us": 1e3 * (timed.ms - floor) / max(found.steps, 1),
            "relative": None if timed.beside_ms is None else timed.ms / timed.beside_ms,
            "residual": found.residual,
            "elsewhere": None if found.elsewhere is None else f"{found.elsewhere} of {found.judged}",
            "gradient_error": found.gradient_error,
            "peak_mb": self.peak_mb,
        }
        targets = "; ".join(target.verdict(figures[target.column]) for target in self.targets)
        return {**given, **figures, "target": targets or None, "note": self.note or None}
