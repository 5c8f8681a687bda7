"""What is done to patterns before they are stored, and to queries before they are asked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.linalg import vector_norm

from hopdeq_lwpf._types import unknown

NORMALIZATIONS = ("none", "unit", "center", "center-unit")


@dataclass(frozen=True)
class Preprocessing:
    """Moves data into the space in which it is stored; fitted to the patterns, applied to queries alike.

    "unit" divides each row by its norm: the score of a pattern is then its cosine with the query, and a long
    pattern cannot win everywhere. "center" first subtracts the mean of the stored patterns: the scores of raw
    pictures share a large common part that says nothing about which one is meant.
    """

    mode: str
    mean: Tensor  # (d,): zeros where nothing is centred
    scale: float  # the median norm of the patterns after centring: 1 stored unit in the units of the data

    @classmethod
    def fit(cls, patterns: Tensor, mode: str) -> Preprocessing:  # (N, d)
        """Take mean and scale from the patterns to be stored; ValueError for an unknown mode."""
        if mode not in NORMALIZATIONS:
            raise unknown("normalize", mode, NORMALIZATIONS)
        mean = patterns.mean(0) if "center" in mode else patterns.new_zeros(patterns.shape[-1])
        scale = float(vector_norm(patterns - mean, dim=-1).median()) if "unit" in mode else 1.0
        return cls(mode, mean, scale)

    def __call__(self, data: Tensor) -> Tensor:  # (B, d) -> (B, d)
        """Into the stored space; a row without length (all zero after centring) stays zero."""
        data = data - self.mean
        if "unit" not in self.mode:
            return data
        norm = vector_norm(data, dim=-1, keepdim=True)
        return data / norm.masked_fill(norm == 0, 1)

    def inverse(self, states: Tensor) -> Tensor:  # (B, d) -> (B, d)
        """Back to the units of the data, for pictures; the median length stands for that of each row."""
        return states * self.scale + self.mean
