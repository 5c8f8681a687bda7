"""Options of the diffusion layers, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.graphs import KNN, LAPLACIANS, OPERATORS
from hopdeq_lwpf.models import layer_options
from hopdeq_lwpf.models.diffusion.strength import Strength
from hopdeq_lwpf.models.layer_options import HopfieldOptions, LookupOptions, PoolingOptions
from hopdeq_lwpf.solvers.base import check_count

ATTENTION = ("dense", "graph")

# What difflayers calls what is here.
ELSEWHERE = {
    "k_neighbors": "neighbors",
    "use_normalized_laplacian": "laplacian='normalized' or 'combinatorial'",
    "diffusion_mode": (
        "diffusion: 'spectral' is 'heat', 'iterative' is 'explicit' with eta = theirs times diffusion_steps"
    ),
    "diffuse_query": "lam, > 0",
    "diffuse_key": "eta, > 0",
    "attention_mode": "attention",
    "use_sparse": "sparse",
    "use_logit_diffusion": "logit_eta, > 0",
    "cache_graph": "stored_graph and state_graph of the call: a graph that is passed is not made again",
    "energy_stop_tol": "stop=Termination(rtol=0, atol=sqrt(2 * tol))",
}


@dataclass(frozen=True)
class DiffusionOptions(HopfieldOptions):
    """Options of `DiffusionHopfield`: those of `HopfieldOptions`, and

    lam: strength with which states are drawn to those of their neighbours, >= 0; a number or one a head. 1 weighs the
        difference of neighbours as much as the size of a state.
    eta: time for which the projected stored patterns diffuse over their graph before the first step, >= 0, likewise.
    logit_eta: time for which the scores diffuse over the graph of the states, >= 0, likewise. (Over the graph of the
        stored patterns that is eta: exp(-t L) on the patterns or on their scores is the same.)
    learn_lam, learn_eta, learn_logit_eta: learn them, one a head, through a softplus; they must begin above 0.
    neighbors: of each node in the graphs; None: every pair with a similarity above 0.
    similarity, bandwidth, symmetrize, sparse: see `hopdeq_lwpf.graphs.KNN`. Graphs are made from the stored
        patterns and the state patterns as they come in, through their layer norms, one a sample, for all heads.
    detach_graph: no gradient through the weights of edges.
    laplacian: "normalized" (eigenvalues in [0, 2], so that strengths mean the same in every graph) or "combinatorial".
    diffusion: of the stored patterns: "heat", exp(-eta L); "implicit", (I + eta L)^-1; "explicit", (I - eta L /
        k)^k with k = diffusion_steps, refused where it is unstable.
    adaptive_eta: multiply eta by sigmoid(adaptive_temperature * (h - adaptive_threshold)), one a sample and head,
        where h in [0, 1] is the mean entropy of the first association, before forgetting, over its largest possible
        value: what is recalled clearly is diffused little. Fixed for a solve.
    attention: "graph" lets a state associate only with its anchor among the stored patterns, itself where they are the
        same input, else the most similar one in the association space of each head, and with the anchor's neighbours.
    """

    elsewhere: ClassVar[Mapping[str, str]] = {**layer_options.ELSEWHERE, **ELSEWHERE}

    lam: float | Tensor = 0.1
    eta: float | Tensor = 0.1
    logit_eta: float | Tensor = 0.0
    learn_lam: bool = False
    learn_eta: bool = False
    learn_logit_eta: bool = False
    neighbors: int | None = 5
    similarity: str = "cosine"
    bandwidth: float | None = None
    symmetrize: str = "max"
    sparse: bool | str = "auto"
    detach_graph: bool = False
    laplacian: str = "normalized"
    diffusion: str = "heat"
    diffusion_steps: int = 1
    adaptive_eta: bool = False
    adaptive_temperature: float = 10.0
    adaptive_threshold: float = 0.5
    attention: str = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("diffusion", OPERATORS), ("laplacian", LAPLACIANS), ("attention", ATTENTION)):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        check_count("diffusion_steps", self.diffusion_steps, 1)
        if self.diffusion_steps > 1 and self.diffusion != "explicit":
            raise ValueError(
                f"diffusion_steps={self.diffusion_steps} needs diffusion='explicit'; {self.diffusion!r} makes one step"
            )
        for name in ("adaptive_temperature", "adaptive_threshold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        self.graph()  # raises for what a graph does not know
        for name in ("lam", "eta", "logit_eta"):
            self.strength(name)

    def graph(self) -> KNN:
        """How graphs are made."""
        return KNN(
            neighbors=self.neighbors,
            similarity=self.similarity,  # type: ignore[arg-type]
            bandwidth=self.bandwidth,
            symmetrize=self.symmetrize,  # type: ignore[arg-type]
            sparse=self.sparse,  # type: ignore[arg-type]
            detach=self.detach_graph,
        )

    def strength(self, name: str) -> Strength:
        """lam, eta or logit_eta: fixed, or learned, one a head."""
        value, learn = getattr(self, name), getattr(self, f"learn_{name}")
        if isinstance(value, Tensor) and tuple(value.shape) not in ((), (1,), (self.num_heads,)):
            raise ValueError(
                f"{name} must be a number or have one entry a head, ({self.num_heads},), got {tuple(value.shape)}"
            )
        return Strength(name, value, learn=learn, entries=self.num_heads if learn else None)

    def dials(self) -> dict[str, Any]:
        """What the fixed-point function of the states is made with, beside beta."""
        return {**super().dials(), "lam": self.strength("lam"), "logit_eta": self.strength("logit_eta")}


@dataclass(frozen=True)
class DiffusionPoolingOptions(DiffusionOptions, PoolingOptions):
    """Options of `DiffusionPooling`: those of `DiffusionOptions` and of `PoolingOptions`."""


@dataclass(frozen=True)
class DiffusionLookupOptions(DiffusionOptions, LookupOptions):
    """Options of `DiffusionLayer`: those of `DiffusionOptions` and of `LookupOptions`."""
