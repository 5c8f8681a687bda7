"""Retrieval and diffusion over graphs as one fixed point with one energy; see docs/graph-diffusion.md."""

from hopdeq_lwpf.models.diffusion.function import DiffusionContext, DiffusionRetrieval
from hopdeq_lwpf.models.diffusion.layers import DiffusionHopfield, DiffusionLayer, DiffusionPooling
from hopdeq_lwpf.models.diffusion.options import (
    DiffusionLookupOptions,
    DiffusionOptions,
    DiffusionPoolingOptions,
)
from hopdeq_lwpf.models.diffusion.recall import retrieve_on_graph
from hopdeq_lwpf.models.diffusion.strength import Strength

__all__ = [
    "DiffusionContext",
    "DiffusionHopfield",
    "DiffusionLayer",
    "DiffusionLookupOptions",
    "DiffusionOptions",
    "DiffusionPooling",
    "DiffusionPoolingOptions",
    "DiffusionRetrieval",
    "Strength",
    "retrieve_on_graph",
]
