"""A memory that users keep."""

from hopdeq_lwpf.memory.memory import Memory, MemoryRecall
from hopdeq_lwpf.memory.store import Stored

__all__ = ["Memory", "MemoryRecall", "Stored"]
