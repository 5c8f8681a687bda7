"""Stored patterns that need not be in memory, nor in one process: sources of blocks, and exact attention over them."""

from hopdeq_lwpf.streaming.ranks import Ranks as Ranks
from hopdeq_lwpf.streaming.ranks import ShardedPatterns as ShardedPatterns
from hopdeq_lwpf.streaming.ranks import ShardError as ShardError
from hopdeq_lwpf.streaming.ranks import split_patterns as split_patterns
from hopdeq_lwpf.streaming.sources import BlockPatterns as BlockPatterns
from hopdeq_lwpf.streaming.sources import PatternSource as PatternSource
from hopdeq_lwpf.streaming.sources import TensorPatterns as TensorPatterns
from hopdeq_lwpf.streaming.sources import as_source as as_source

__all__ = [
    "BlockPatterns",
    "PatternSource",
    "Ranks",
    "ShardError",
    "ShardedPatterns",
    "TensorPatterns",
    "as_source",
    "split_patterns",
]
