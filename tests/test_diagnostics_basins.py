"""Basins: the limit of plain iteration, whether a solve kept it, and how wide basins are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf import Termination, fixed_point, retrieve
from hopdeq_lwpf.diagnostics import basin_changed, basin_radius, binomial_interval, picard_limit
from hopdeq_lwpf.models import Retrieval

F64 = torch.float64


def test_the_limit_is_plain_iteration_in_float64():
    patterns, query = torch.nn.functional.normalize(torch.randn(12, 6), dim=-1), 0.4 * torch.randn(5, 6)
    f = Retrieval(4.0)
    x = f.prepare(query, patterns)
    found = picard_limit(f, x, query, stop=Termination(rtol=1e-12, atol=0.0, max_steps=2000))
    z = query.double()
    for _ in range(500):
        z = torch.softmax(4.0 * z @ patterns.double().T, -1) @ patterns.double()
    assert found.state.dtype == F64
    assert_close(found.state, z, rtol=0, atol=1e-10)
    assert query.dtype == x.patterns.dtype == torch.float32  # nothing of the caller's is changed


def test_the_limit_of_a_module_leaves_the_module_as_it_was():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            nn.init.orthogonal_(self.linear.weight, gain=0.5)

        def forward(self, z, x):
            return torch.tanh(self.linear(z)) + x

    f = Layer()
    found = picard_limit(f, torch.ones(2, 3), torch.zeros(2, 3))
    assert found.state.dtype == F64
    assert f.linear.weight.dtype == torch.float32
    assert not found.state.requires_grad
    assert all(p.requires_grad for p in f.parameters())
    assert_close(
        found.state.float(),
        fixed_point(f, torch.ones(2, 3), torch.zeros(2, 3)).state.detach(),
        rtol=1e-4,
        atol=0,
    )


def test_a_change_of_basin_is_seen_and_an_unconverged_reference_says_nothing():
    patterns = torch.eye(4)
    query = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0]])
    limit = retrieve(query.double(), patterns.double(), beta=20.0, solver="picard")
    assert basin_changed(limit.state.float(), limit).tolist() == [0, 0]
    assert basin_changed(limit.state.flip(0).float(), limit).tolist() == [1, 1]
    assert basin_changed(1.04 * limit.state, limit).tolist() == [0, 0]
    assert basin_changed(1.06 * limit.state, limit).tolist() == [1, 1]
    assert basin_changed(1.06 * limit.state, limit, tolerance=0.1).tolist() == [0, 0]
    assert basin_changed(
        limit.state.masked_fill(torch.tensor([[True], [False]]), torch.nan), limit
    ).tolist() == [1, 0]
    stop = Termination(rtol=1e-14, atol=0, max_steps=2)
    short = retrieve(query.double(), patterns.double(), beta=2.0, solver="picard", stop=stop)
    assert basin_changed(short.state, short).isnan().all()


def test_an_equilibrium_at_zero_is_the_same_one_at_another_tolerance():
    # Total forgetting: plain iteration ends at 0, where nothing is relatively near.
    patterns = torch.tensor([[1.0, 0.1], [1.0, -0.1]])
    limit = picard_limit(f := Retrieval(2.0, forgetting="relu"), f.prepare(-patterns, patterns), -patterns)
    assert float(limit.state.abs().max()) == 0
    assert basin_changed(torch.full((2, 2), 1e-8), limit).tolist() == [0, 0]
    assert basin_changed(torch.full((2, 2), 1e-3), limit).tolist() == [1, 1]


def test_states_may_have_any_layout():
    state = {"a": torch.ones(3, 2), "b": torch.ones(3, 4)}

    def f(z, x):
        return {"a": torch.ones_like(z["a"]), "b": torch.ones_like(z["b"])}

    limit = picard_limit(f, None, {"a": torch.zeros(3, 2), "b": torch.zeros(3, 4)})
    assert basin_changed(state, limit).tolist() == [0, 0, 0]
    state["b"][1] = 2.0
    assert basin_changed(state, limit).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="must have the same shape"):
        basin_changed({"a": torch.ones(2, 2), "b": torch.ones(2, 4)}, limit)


def test_no_queries_change_no_basin():
    f = Retrieval(2.0)
    query = torch.zeros(0, 3)
    limit = picard_limit(f, f.prepare(query, torch.eye(3)), query)
    assert basin_changed(query, limit).shape == (0,)


def test_leaves_of_a_state_may_differ_in_their_dimensions():
    state = {"a": torch.ones(2, 3), "b": torch.ones(2, 2, 2)}
    limit = picard_limit(lambda z, x: z, None, state)
    assert basin_changed({"b": state["b"], "a": state["a"]}, limit).tolist() == [0, 0]


def test_tensors_out_of_reach_are_an_error_that_says_what_to_do():
    weight = torch.eye(3)
    with pytest.raises(TypeError, match="does not run in float64 .* hand its tensors over in x"):
        picard_limit(lambda z, x: 0.5 * z @ weight, None, torch.ones(2, 3))

    def broken(z, x):
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        picard_limit(broken, None, torch.ones(2, 3))


# --- binomial intervals


@given(st.integers(1, 200), st.data())
def test_wilsons_interval_solves_its_equation(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = (float(end) for end in binomial_interval(torch.tensor(successes), trials))
    share = successes / trials
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for end in (low, high):  # |share - p| = z sqrt(p (1 - p) / n), squared
        if 0 < end < 1:
            assert (share - end) ** 2 == pytest.approx(
                1.959963984540054**2 * end * (1 - end) / trials, abs=1e-12
            )


# --- basin radius


def test_the_radius_of_two_opposite_patterns_is_where_the_sign_turns():
    # From (1, 0) a push of length r along u ends at the other pattern once 1 + r u_1 < 0.
    patterns = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=F64)
    radii = torch.tensor([0.5, 0.9, 1.1, 2.0, 4.0], dtype=F64)
    found = basin_radius(patterns, beta=8.0, radii=radii, directions=400, level=1.0)
    assert found.radius.tolist() == [0.9, 0.9]
    assert found.recalled.tolist() == [True, True]
    for row, radius in enumerate(radii.tolist()):
        # The share of the circle with cos(angle) > -1/r.
        angle = torch.acos(torch.tensor(-1 / radius, dtype=F64)) if radius > 1 else torch.tensor(torch.pi)
        expected = float(angle / torch.pi)
        # Four standard errors of 400 directions.
        assert found.share[row].tolist() == pytest.approx([expected] * 2, abs=0.1)
        assert bool((found.low[row] <= found.share[row]).all() & (found.share[row] <= found.high[row]).all())


# Stores in which a query keeps the pattern of largest weight and changes its attractor (25), and in which more
# directions are recalled from farther away (33).
@pytest.mark.parametrize(("store", "asked"), [(25, (2, 1)), (33, (3,))])
def test_radius_is_the_slow_twin(store, asked):
    generator = torch.Generator().manual_seed(store)
    patterns = torch.nn.functional.normalize(torch.randn(6, 3, generator=generator, dtype=F64), dim=-1)
    found = basin_radius(patterns, beta=8.0, index=torch.tensor(asked), directions=12)
    draw = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    rays = torch.nn.functional.normalize(draw, dim=-1)
    options = {"beta": 8.0, "solver": "picard", "stop": Termination(rtol=1e-6, atol=1e-8, max_steps=5000)}
    for place, i in enumerate(asked):
        home = retrieve(patterns[i], patterns, **options)
        nearest = min(float((patterns[i] - patterns[j]).norm()) for j in range(6) if j != i)
        reached, unbroken = 0.0, int(home.index) == i
        assert bool(found.recalled[place]) == unbroken
        for step in range(10):
            radius = nearest * (step + 1) / 5
            assert float(found.radii[step, place]) == pytest.approx(radius)
            hits = 0
            for ray in rays:
                end = retrieve(patterns[i] + radius * ray, patterns, **options)
                same = float((end.state - home.state).norm()) <= 0.05 * float(home.state.norm())
                hits += int(end.index) == i and same
            assert float(found.share[step, place]) == hits / 12
            unbroken = unbroken and hits / 12 >= 0.5
            reached = radius if unbroken else reached
        assert float(found.radius[place]) == pytest.approx(reached)


def test_a_pattern_that_is_not_recalled_from_itself_has_no_basin():
    patterns = torch.tensor([[1.0, 0.0], [0.98, 0.02], [-3.0, 0.0]])
    found = basin_radius(patterns, beta=0.5, directions=4)
    assert not bool(found.recalled[:2].all())
    assert found.radius[~found.recalled].tolist() == [0.0] * int((~found.recalled).sum())
    assert "of 3 patterns are recalled from themselves" in str(found)


def test_radii_work_with_forgetting_and_for_no_pattern_at_all():
    patterns = torch.nn.functional.normalize(torch.randn(8, 5), dim=-1)
    plain = basin_radius(patterns, beta=20.0, directions=6, forgetting="relu")
    assert plain.radius.shape == (8,)
    assert plain.share.shape == plain.radii.shape == (10, 8)
    none = basin_radius(patterns, beta=20.0, index=torch.empty(0, dtype=torch.int64))
    assert none.radius.shape == (0,)
    assert str(none) == "no pattern was asked for"
    assert basin_radius(patterns[:1], beta=20.0, directions=3).radius.shape == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patterns": torch.ones(3)}, "patterns must be"),
        ({"patterns": torch.tensor([[torch.nan]])}, "patterns hold NaN"),
        ({"index": torch.tensor([7])}, "index must be"),
        ({"radii": torch.tensor([0.2, 0.1])}, "radii must be"),
        ({"radii": torch.empty(0)}, "radii must be"),
        ({"radii": torch.ones(2, 5)}, "radii must be"),
        ({"directions": 0}, "directions must be an integer >= 1"),
        ({"level": 0.0}, "level must be a number in"),
        ({"seed": -1}, "seed must be"),
        ({"beta": -1.0}, "beta must be > 0"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"patterns": torch.eye(3), "beta": 4.0, "directions": 2, **change}
    with pytest.raises(ValueError, match=message):
        basin_radius(arguments.pop("patterns"), **arguments)


def test_intervals_need_trials():
    with pytest.raises(ValueError, match="trials must be an integer >= 1"):
        binomial_interval(torch.tensor(0), 0)


def test_the_reference_sums_squares_in_float64_too():
    # Far from the origin the squares of float32 patterns have lost the distances between them.
    patterns = torch.randn(20, 3) + torch.tensor([300.0, 0.0, 0.0])
    query = patterns[:10] + 0.3 * torch.randn(10, 3)
    f = Retrieval(2.0, similarity="euclidean")
    stop = Termination(rtol=1e-10, max_steps=5000)
    x, wide = f.prepare(query, patterns), f.prepare(query.double(), patterns.double())
    expected = fixed_point(f, wide, f.init(wide), solver="picard", stop=stop).state
    assert_close(picard_limit(f, x, f.init(x), stop=stop).state, expected, rtol=0, atol=1e-8)
