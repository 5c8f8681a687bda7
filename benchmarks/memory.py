"""Resident memory of this process, and its peak while a block runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path


def resident() -> float:
    """MB of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / 1e6


class Peak:
    """The highest resident memory while the block runs, above that at its start, MB; sampled each 2 ms.

    Sampled, since the peak that the system keeps for a process begins with that of the one that started it.
    """

    def __enter__(self) -> Peak:
        self.base = self.highest = resident()
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.highest = max(self.highest, resident())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()

    @property
    def above(self) -> float:
        return self.highest - self.base
