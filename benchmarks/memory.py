"""Memory of this process, and its peak while a block runs."""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path


def resident() -> float:
    """MB of this process in memory that are its own: files that it has mapped do not count."""
    _, pages, of_files, *_ = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return (int(pages) - int(of_files)) * 4096 / 1e6


def give_back() -> None:
    """Hand freed memory back to the system, so that what a block takes again is seen; only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Peak:
    """The highest of `resident` while the block runs, above that at its start, MB; sampled each 2 ms.

    Sampled, since the peak that the system keeps for a process begins with that of the one that started it.
    """

    def __enter__(self) -> Peak:
        give_back()
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
