"""What a running trial tells its driver after each epoch, and the driver's word whether it goes on.

Two files in the folder of the trial, both only appended to: the trial writes reports.jsonl and waits for the line of
the same epoch in verdicts.jsonl. Files, since they reach from machine to machine where the folder does, and outlive
both sides: a trial that goes on after a kill finds the verdicts of the epochs that it repeats.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from hopdeq_lwpf.sweeps.engine.lines import add_line, read_lines

REPORTS, VERDICTS = "reports.jsonl", "verdicts.jsonl"
PAUSE = 0.01  # seconds between two looks at the other's file


class Reports:
    """The trial's side. Calling it with the epoch (from 1) and the value says whether to stop there.

    metric: what the value is, such as val/accuracy. A value that is not finite is told as NaN.
    """

    def __init__(self, folder: Path, metric: str) -> None:
        self.folder, self.metric = folder, metric

    def __call__(self, epoch: int, value: float) -> bool:
        known = value if math.isfinite(value) else None
        add_line(self.folder / REPORTS, {"epoch": epoch, "value": known}, sync=False)
        while True:
            for verdict in read_lines(self.folder / VERDICTS):
                if verdict["epoch"] == epoch:
                    return bool(verdict["stop"])
            time.sleep(PAUSE)


class Listener:
    """The driver's side, for one trial. decide: (epoch, value) -> whether the trial is to stop there."""

    def __init__(self, folder: Path, decide: Callable[[int, float], bool]) -> None:
        self._folder, self._decide = folder, decide
        self._seen: tuple[int, ...] = ()
        self._decided: dict[int, bool] = {}

    def listen(self) -> None:
        """Answer what has no answer yet. A verdict stands, also when the trial was killed before it could obey."""
        try:
            now = (self._folder / REPORTS).stat()
        except FileNotFoundError:
            return
        state = (now.st_ino, now.st_size, now.st_mtime_ns)
        if state == self._seen:
            return
        verdicts = {line["epoch"] for line in read_lines(self._folder / VERDICTS)}
        for report in read_lines(self._folder / REPORTS):
            epoch, value = report["epoch"], report["value"]
            if epoch not in self._decided:
                self._decided[epoch] = self._decide(epoch, math.nan if value is None else float(value))
            if epoch not in verdicts:
                verdicts.add(epoch)
                add_line(self._folder / VERDICTS, {"epoch": epoch, "stop": self._decided[epoch]}, sync=False)
        self._seen = state


def remove_reports(folder: Path) -> None:
    """Delete both files; metrics.jsonl has the numbers."""
    for name in (REPORTS, VERDICTS):
        (folder / name).unlink(missing_ok=True)
