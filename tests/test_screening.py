"""Screened retrieval: the small problem against the whole one, its bound, and the equilibria that come of it."""

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hopdeq_lwpf import Result, Termination, retrieve
from hopdeq_lwpf.forgetting import PFU, ReLU, TopK
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.retrieval.streamed import attended, finish
from hopdeq_lwpf.screening import SCREEN_FROM, Screened, screens
from hopdeq_lwpf.screening.candidates import Nearby, collect, longest
from hopdeq_lwpf.screening.narrow import Narrow
from hopdeq_lwpf.solvers import Picard
from hopdeq_lwpf.streaming import TensorPatterns

BETA, WIDTH = 8.0, 16
UNITS = {
    "none": None,
    "relu": ReLU(),
    "median": PFU(),
    "constant": PFU(4.0),
    "constant, other bias": PFU(2.0, bias=0.0),
}


def clusters(groups=60, members=8, queries=12, noise=0.2, spread=0.12, seed=0):
    """Patterns (groups * members, d) around centres of norm 1.5, queries near centres; float64."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, WIDTH, generator=generator, dtype=torch.float64)
    centres = 1.5 * torch.nn.functional.normalize(centres, dim=-1)
    away = torch.randn(groups, members, WIDTH, generator=generator, dtype=torch.float64)
    patterns = (centres[:, None] + spread * away).reshape(-1, WIDTH)
    which = torch.randint(0, groups, (queries,), generator=generator)
    near = torch.randn(queries, WIDTH, generator=generator, dtype=torch.float64)
    return patterns[torch.randperm(len(patterns), generator=generator)], centres[which] + noise * near


def small_problem(unit, separation="softmax", *, most=16, margin=6.0, mask=None, inject="start", seed=0):
    """The whole function with its context, the reference, and the small problem there."""
    patterns, query = clusters(seed=seed)
    f = Retrieval(BETA, forgetting=unit, separation=separation, inject=inject, inject_weight=0.2)
    x = f.prepare(query, TensorPatterns(patterns, block=37), mask)
    z = f(query, x)
    near = Nearby(torch.full_like(z[:, :1], -math.inf), most)
    found = attended(f, z, x, look=True, watch=near)
    near.least = torch.maximum(near.least, found.top[:, None] - margin)
    small, mass = collect(f, z, x, found, near, longest(x, z), 0.1)
    return f, x, z, finish(f, z, found, x), Narrow(f), small, mass


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("separation", ["softmax", "softmax1"])
@pytest.mark.parametrize("inject", ["start", "input"])
def test_the_small_problem_is_the_whole_one_at_the_reference(unit, separation, inject):
    mask = torch.arange(480) % 7 == 0
    f, x, z, image, narrow, small, mass = small_problem(unit, separation, mask=mask, inject=inject)
    assert small.patterns.shape[1] <= 16
    assert float(mass.max()) > 1e-6  # something is left out
    torch.testing.assert_close(narrow(z, small), image, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(narrow.energy(z, small), f.energy(z, x), rtol=1e-12, atol=1e-12)
    assert bool(narrow.trusted(z, small).all()) or unit is UNITS["constant, other bias"]


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_the_small_energy_has_the_gradient_of_its_update(unit):
    _, _, z, _, narrow, small, _ = small_problem(unit)
    z = (z + 0.01).requires_grad_()
    (slope,) = torch.autograd.grad(narrow.energy(z, small).sum(), z)
    if narrow.has_energy:
        torch.testing.assert_close(slope, (z - narrow(z, small)).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(0.0, 0.6))
def test_what_is_trusted_is_within_the_bound(unit, seed, size):
    f, x, z, _, narrow, small, _ = small_problem(unit, seed=seed % 5)
    way = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype)
    here = z + size * torch.nn.functional.normalize(way, dim=-1)
    image = narrow(here, small)
    error = torch.linalg.vector_norm(f(here, x) - image, dim=-1)
    allowed = small.trust * torch.linalg.vector_norm(image, dim=-1)
    trusted = narrow.trusted(here, small)
    assert bool((error <= allowed + 1e-12)[trusted].all())


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("solver", ["auto", "picard"])
def test_screened_equilibria_are_those_of_the_whole(unit, solver):
    patterns, query = clusters()
    stop = Termination(rtol=1e-9, atol=0.0, max_steps=2000)
    whole = retrieve(query, patterns, beta=BETA, forgetting=unit, solver=solver, stop=stop, stream=False)
    screened = retrieve(
        query, patterns, beta=BETA, forgetting=unit, solver=solver, stop=stop, stream=True, screen=True
    )
    good = whole.converged
    assert int(good.sum()) >= 8
    assert bool(screened.converged[good].all())
    torch.testing.assert_close(screened.state[good], whole.state[good], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(screened.value[good], whole.value[good], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(screened.weight[good], whole.weight[good], rtol=1e-5, atol=1e-6)
    assert bool((screened.index == whole.index)[good].all())
    assert bool((screened.residual[good] <= 1e-9).all())
    assert "passes over all patterns" in screened.note
    if whole.energy is not None:
        torch.testing.assert_close(screened.energy[good], whole.energy[good], rtol=1e-8, atol=1e-8)


def test_screened_gradients_are_those_of_the_whole():
    patterns, query = clusters()
    stop = Termination(rtol=1e-11, max_steps=2000)
    slopes = []
    for options in ({"stream": False}, {"stream": True, "screen": True}):
        x, beta = (
            patterns.clone().requires_grad_(),
            torch.tensor(BETA, dtype=torch.float64, requires_grad=True),
        )
        q = query.clone().requires_grad_()
        value = retrieve(q, x, beta=beta, inject="input", inject_weight=0.3, stop=stop, **options).value
        slopes.append(torch.autograd.grad(value.sin().sum(), (x, beta, q)))
    for whole, screened in zip(*slopes, strict=True):
        torch.testing.assert_close(screened, whole, rtol=1e-6, atol=1e-8)


def test_one_query_does_not_see_the_others():
    patterns, query = clusters()
    query[3] = float("nan")
    together = retrieve(query, patterns, beta=BETA, stream=True, screen=True)
    assert together.result[3] == Result.NONFINITE
    for row in (0, 5):
        alone = retrieve(query[row], patterns, beta=BETA, stream=True, screen=True)
        assert alone.result == together.result[row] == Result.CONVERGED
        torch.testing.assert_close(alone.state, together.state[row], rtol=1e-4, atol=1e-4)


def test_weight_that_is_spread_over_all_patterns_is_solved_on_the_whole():
    patterns, query = clusters()
    screened = retrieve(query, patterns, beta=0.2, stream=True, screen=True)
    whole = retrieve(query, patterns, beta=0.2, stream=False)
    assert bool(screened.converged.all())
    torch.testing.assert_close(screened.state, whole.state, rtol=1e-4, atol=1e-4)


def test_too_few_steps_are_reported():
    patterns, query = clusters(spread=0.2)
    screened = retrieve(
        query, patterns, beta=BETA, stream=True, screen=True, stop=Termination(rtol=1e-12, max_steps=3)
    )
    assert bool((screened.result == Result.MAX_STEPS).any())
    assert int(screened.steps.max()) <= 3
    assert bool((screened.residual > 0).all())


def test_the_order_of_the_patterns_and_room_for_few_candidates_do_not_matter():
    patterns, query = clusters()
    options = {"beta": BETA, "stream": True, "stop": Termination(rtol=1e-9, max_steps=2000)}
    few = retrieve(query, patterns.flip(0), solver=Screened(Picard(), candidates=4, margin=3.0), **options)
    whole = retrieve(query, patterns, solver="picard", screen=False, **options)
    assert bool(few.converged.all())
    torch.testing.assert_close(few.state, whole.state, rtol=1e-6, atol=1e-6)


def test_it_is_used_from_a_size_on_where_it_can_be_and_is_off_by_a_switch():
    patterns, query = clusters(groups=SCREEN_FROM // 8, queries=2)
    patterns, query = patterns.float(), query.float()
    assert "passes" in retrieve(query, patterns, beta=BETA, stream=True).note
    assert retrieve(query, patterns, beta=BETA, stream=True, screen=False).note == ""
    assert retrieve(query, patterns[:-8], beta=BETA, stream=True).note == ""
    assert retrieve(query, patterns, beta=BETA, stream=True, trace=True).note == ""


def test_what_cannot_be_screened_says_so():
    patterns, query = clusters(queries=2)
    source = TensorPatterns(patterns)
    for f in (
        Retrieval(BETA, forgetting=TopK(4)),
        Retrieval(BETA, forgetting=PFU(tracked=True)),
        Retrieval(BETA, similarity="euclidean"),
        Retrieval(BETA, normalize="sphere"),
    ):
        assert not screens(f, f.prepare(query, source))
    with pytest.raises(ValueError, match="candidates"):
        Screened(candidates=0)
    with pytest.raises(ValueError, match="trust"):
        Screened(trust=0.0)


def test_each_query_has_its_own_steps_and_reports_no_more():
    patterns, query = clusters(groups=40, members=30, queries=64, noise=0.3, spread=0.3)
    for steps in (8, 16, 30):
        stop = Termination(rtol=1e-6, max_steps=steps)
        screened = retrieve(query, patterns, beta=BETA, stream=True, screen=True, stop=stop)
        assert int(screened.steps.max()) <= steps
        within = screened.residual <= 1e-6 * (1 + 1e-6)
        assert bool(within[screened.converged].all())


def test_a_graph_is_freed_with_what_was_made_of_it():
    patterns, query = clusters()
    alive = []
    for _ in range(3):
        x = patterns.clone().requires_grad_()
        alive.append(weakref.ref(x))
        retrieve(query, x, beta=BETA, stream=True, screen=True).value.sum().backward()
        del x
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


def test_unrolled_steps_are_those_of_the_whole():
    patterns, query = clusters()
    found = []
    for screen in (False, True):
        z = query.clone().requires_grad_()
        recalled = retrieve(z, patterns, beta=BETA, stream=True, screen=screen, adjoint="unrolled")
        found.append((recalled.steps, torch.autograd.grad(recalled.value.sum(), z)[0]))
    assert bool((found[0][0] == found[1][0]).all())
    torch.testing.assert_close(found[1][1], found[0][1])


def test_the_switch_is_none_true_or_false():
    patterns, query = clusters()
    with pytest.raises(TypeError, match="screen must be None, True or False, got 'no'"):
        retrieve(query, patterns, beta=BETA, stream=True, screen="no")
