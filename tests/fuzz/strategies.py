"""Strategies for tensors, masks, numbers and options; every one of them is small and shrinks to something readable."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from hopdeq_lwpf import solvers
from hopdeq_lwpf.forgetting import PFU, Forgetting, Keep, ReLU, TopK
from hopdeq_lwpf.separation import LSR, SEPARATIONS, Entmax, Polynomial

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INF = float("inf")

# Scales of random entries, and values that some entries get: what a user has, all that is finite, and anything.
KINDS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "moderate": ((1.0, 0.0, 0.1, 10.0), (0.0, -0.0, 1.0, -1.0, 0.5)),
    "extreme": (
        (1.0, 1e-30, 1e30, 1e4, 1e-4),
        (0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 5e-324, 1e-40, 6e-8, 1e308, -1e308, 65504.0, 1e-300),
    ),
    "any": ((1.0, 0.0, 1e30, 1e-30), (float("nan"), INF, -INF, 0.0, 1e30, 1e-40)),
}


@st.composite
def tensors(
    draw: DrawFn, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, kind: str = "moderate"
) -> Tensor:
    """Random entries of one scale, some of them replaced; whole numbers at times, which makes ties.

    "moderate" and "extreme" are finite in the dtype.
    """
    scales, specials = KINDS[kind]
    source = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    values = draw(st.sampled_from(scales)) * torch.randn(shape, generator=source, dtype=torch.float64)
    if draw(st.booleans()):
        values = values.round()
    if values.numel():
        place = st.integers(0, values.numel() - 1)
        for at, special in draw(st.lists(st.tuples(place, st.sampled_from(specials)), max_size=4)):
            values.view(-1)[at] = special
    if kind != "any":
        values = values.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return values.to(dtype)


def masks(shape: tuple[int, ...]) -> SearchStrategy[Tensor]:
    """Bool tensors: a few entries True, or nearly all."""
    count = int(torch.Size(shape).numel())
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    return flags.map(lambda bits: torch.tensor(bits, dtype=torch.bool).reshape(shape))


positive = st.one_of(
    st.sampled_from((1.0, 8.0, 1e-3, 1e3)),
    st.sampled_from((1e-30, 1e30, 5e-324, 1e308, 1)),
    st.floats(1e-6, 1e6),
)
moderate_positive = st.sampled_from((1.0, 0.1, 4.0, 30.0))

# --- options by what they are made of


def units_by_name(count: int = 6) -> dict[str, SearchStrategy[Forgetting]]:
    """Every unit with options that fit about `count` scores."""
    number = st.sampled_from((0.0, 0.5, -1.0, 1e4, -1e4))
    keep = st.integers(0, count + 1)
    pfu = st.builds(
        PFU,
        threshold=st.one_of(st.just("median"), number),
        bias=st.one_of(st.just("threshold"), number),
        noise=st.sampled_from((0.0, 0.0, 0.3)),
        scope=st.sampled_from(("row", "tensor")),
        tracked=st.booleans(),
        min_keep=keep,
    )
    topk = st.builds(
        TopK, k=st.integers(1, count + 1), bias=st.one_of(st.just("threshold"), st.sampled_from((0.0, -3.0)))
    )
    return {"keep": st.builds(Keep), "relu": st.builds(ReLU, min_keep=keep), "pfu": pfu, "topk": topk}


def forgetting_units(count: int = 6) -> SearchStrategy[None | str | Forgetting]:
    """Every unit, by name and with options."""
    return st.one_of(st.sampled_from((None, "relu", "pfu", "topk", "keep")), *units_by_name(count).values())


def separations_by_name() -> dict[str, SearchStrategy[Any]]:
    """Every separation function; those with options with some of them."""
    alphas = st.sampled_from((1.0, 1.0 + 1e-12, 1.01, 1.3, 1.7, 2.0, 2.5, 5.0, 50.0))
    made = {
        "entmax": st.builds(Entmax, alphas),
        "polynomial": st.builds(Polynomial, st.sampled_from((2, 2.5, 3, 10))),
        "lsr": st.builds(LSR, st.sampled_from((0.0, 1e-30, 0.1))),
    }
    return {name: made.get(name, st.just(name)) for name in SEPARATIONS}


def separations() -> SearchStrategy[Any]:
    """Every separation function, by name and with options."""
    return st.one_of(st.sampled_from(sorted(SEPARATIONS)), *separations_by_name().values())


def chosen_solvers() -> SearchStrategy[Any]:
    """Every solver, by name and with options."""
    damping = st.sampled_from((0.0, 0.3, 0.9))
    memory = st.integers(1, 4)
    return st.one_of(
        st.sampled_from(("auto", *solvers.SOLVERS)),
        st.builds(solvers.Picard, damping=damping),
        st.builds(
            solvers.Anderson,
            memory=memory,
            damping=damping,
            ridge=st.sampled_from((0.0, 1e-7)),
            patience=st.sampled_from((0, 3)),
        ),
        st.builds(solvers.Broyden, memory=memory, warmup=st.integers(1, 3)),
        st.builds(
            solvers.LBFGS,
            memory=memory,
            warmup=st.integers(1, 3),
            align=st.sampled_from((-1.0, 0.99)),
            escape=st.sampled_from((0.0, 0.5)),
            guard=st.booleans(),
        ),
        st.sampled_from(
            tuple(
                f"torchdeq:{n}"
                for n in ("anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter")
            )
        ),
    )


def adjoints() -> SearchStrategy[Any]:
    """Every adjoint, by name and with options."""
    return st.one_of(
        st.sampled_from(("implicit", "onestep", "neumann", "phantom", "unrolled", "eqprop")),
        st.builds(
            solvers.Implicit,
            solver=st.sampled_from(("auto", "cg", "minres", "gmres", "picard", "anderson")),
            max_steps=st.integers(1, 30),
        ),
        st.builds(solvers.Neumann, terms=st.integers(1, 5)),
        st.builds(solvers.Phantom, k=st.integers(1, 4), damping=st.sampled_from((0.0, 0.5))),
    )


def terminations(most: int = 12) -> SearchStrategy[solvers.Termination]:
    """Few steps, so that examples are quick and many problems do not converge."""
    return st.builds(
        solvers.Termination,
        rtol=st.sampled_from((1e-5, 1e-2, 0.0)),
        atol=st.sampled_from((1e-8, 0.0)),
        max_steps=st.integers(1, most),
        check_every=st.integers(1, 5),
    )
