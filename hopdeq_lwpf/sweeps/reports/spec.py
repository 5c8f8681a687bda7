"""What `hopdeq-lwpf report` is asked to do. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from hopdeq_lwpf._checks import SpecError, forms, option

PORT = 8080  # optuna-dashboard's own


@dataclass(frozen=True)
class ReportSpec:
    """Settings of `hopdeq-lwpf report`. Raises SpecError for a value that makes no sense."""

    study: str | None = option(None, "folder of a sweep or of a study (out of its settings)")
    out: str | None = option(None, "folder that the report is written to; null: that of the study")
    settings: str | None = option(
        None, "YAML file of the sweep or study; null: the settings that the run left in its folder"
    )
    baseline: tuple[str, ...] = option(
        (), "FACTOR=LEVEL: what the other levels of a factor are compared with; else its first level"
    )
    port: int = option(PORT, "of the dashboard of --live")

    def __post_init__(self) -> None:
        forms(self)
        object.__setattr__(self, "baseline", tuple(self.baseline))
        if not self.study:
            raise SpecError(
                "study is missing: name the folder of a sweep, as in hopdeq-lwpf report results/sweep"
            )
        whole = isinstance(self.port, int) and not isinstance(self.port, bool)
        if not whole or not 1 <= self.port <= 65535:
            raise SpecError(f"port must be a whole number from 1 to 65535, got {self.port!r}")
        for entry in self.baseline:
            if not all(entry.partition("=")):
                raise SpecError(f"baseline needs FACTOR=LEVEL, got {entry!r}")

    def levels(self) -> dict[str, str]:
        """The baseline of each factor that has one."""
        return {factor: level for factor, _, level in (entry.partition("=") for entry in self.baseline)}
