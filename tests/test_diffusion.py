"""Retrieval of states on a graph: the step, its energy, its metric, its equilibria and their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references_diffusion import F64, association, energy, heat, knn_weights, laplacian, resolvent, step
from torch.testing import assert_close

from hopdeq_lwpf import Termination, fixed_point, retrieve
from hopdeq_lwpf.forgetting import PFU, Keep, ReLU, TopK
from hopdeq_lwpf.graphs import KNN, Graph
from hopdeq_lwpf.models.association import Heads
from hopdeq_lwpf.models.diffusion import DiffusionRetrieval, Strength, function, retrieve_on_graph
from hopdeq_lwpf.solvers import LBFGS, Implicit, Picard

TIGHT = Termination(rtol=1e-12, atol=1e-14, max_steps=5000)
UNITS = {"none": None, "relu": ReLU(), "pfu": PFU(), "pfu constant": PFU(0.1), "topk": TopK(3)}
KINDS = ("normalized", "combinatorial")


def sample(states=6, patterns=9, width=5, batch=(), dtype=F64):
    query = torch.randn(*batch, states, width, dtype=dtype)
    stored = torch.randn(*batch, patterns, width, dtype=dtype)
    return query, stored


def heads_of(query, stored, kind="normalized", neighbors=2, sparse=False):
    graph = KNN(neighbors, sparse=sparse)(query).laplacian(kind)
    return Heads(query, stored, stored, graph=graph)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_step_and_its_energy_are_what_the_slow_twin_gives(name, kind, sparse):
    query, stored = sample(batch=(3,))
    f = DiffusionRetrieval(
        2.0, lam=0.7, logit_eta=0.4, forgetting=UNITS[name], inject="input", inject_weight=0.3
    )
    x = f.prepare(heads_of(query, stored, kind, sparse=sparse))
    z = torch.randn_like(query)
    image, energies, _ = f.evaluate(z, x)
    assert_close(image, f(z, x))
    assert_close(energies(), f.energy(z, x))
    for i in range(3):
        matrix = laplacian(knn_weights(query[i], 2), kind)
        threshold = x.association.threshold
        if threshold is not None and threshold.ndim:
            threshold = threshold.reshape(3, 6, 1)[i]
        given = {
            "beta": 2.0,
            "lam": 0.7,
            "logit_eta": 0.4,
            "unit": UNITS[name],
            "threshold": threshold,
            "injected": 0.3 * query[i],
        }
        assert_close(image[i], step(z[i], stored[i], matrix, **given), rtol=1e-10, atol=1e-12)
        assert_close(f.energy(z, x)[i], energy(z[i], stored[i], matrix, **given), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["none", "relu", "pfu", "pfu constant"])
def test_the_update_is_the_energys_gradient_in_the_metric(name):
    query, stored = sample()
    f = DiffusionRetrieval(2.0, lam=1.3, logit_eta=0.5, forgetting=UNITS[name])
    x = f.prepare(heads_of(query, stored))
    z = torch.randn_like(query, requires_grad=True)
    (slope,) = torch.autograd.grad(f.energy(z, x).sum(), z)
    assert_close(f.metric(z, x)(z - f(z, x)), slope, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", UNITS)
def test_the_jacobian_is_symmetric_in_the_metric(name):
    query, stored = sample(4, 6, 3)
    f = DiffusionRetrieval(1.5, lam=2.0, logit_eta=0.3, forgetting=UNITS[name])
    x = f.prepare(heads_of(query, stored))
    jacobian = torch.autograd.functional.jacobian(lambda z: f(z, x), query).reshape(12, 12)
    apply = f.metric(query, x)
    columns = torch.stack([apply(column.reshape(4, 3)).reshape(-1) for column in jacobian.T], 1)
    assert_close(columns, columns.T, rtol=1e-9, atol=1e-11)


def test_forgetting_only_at_the_readout_has_neither_energy_nor_metric():
    query, stored = sample()
    f = DiffusionRetrieval(2.0, forgetting="relu", mask_in_loop=False)
    assert not f.has_energy
    assert f.metric(query, f.prepare(heads_of(query, stored))) is None


# 10,000 steps of random problems; the slack is what rounding does to a sum of this size in float64.
def test_no_step_of_ten_thousand_raises_the_energy_and_every_problem_converges():
    steps = rises = 0
    ends = []
    generator = torch.Generator().manual_seed(3)
    lams = torch.tensor([0.0, 0.1, 1.0, 10.0, 100.0], dtype=F64)
    while steps < 10_000:
        number = len(ends)
        beta = float(torch.rand((), generator=generator) * 8 + 0.25)
        unit = list(UNITS.values())[number % 4]
        kind = KINDS[number % 2]
        query = torch.randn(5, 8, 4, dtype=F64, generator=generator)
        stored = torch.randn(5, 12, 4, dtype=F64, generator=generator)
        f = DiffusionRetrieval(beta, lam=lams, logit_eta=float(number % 3) / 2, forgetting=unit)
        assert f.has_energy
        x = f.prepare(heads_of(query, stored, kind, 3))
        stop = Termination(rtol=1e-9, atol=1e-12, max_steps=4000)
        found = fixed_point(f, x, query, solver="picard", stop=stop, trace=True)
        ends.append(found.converged)
        energies = found.trace.energy
        both = energies[1:].isfinite() & energies[:-1].isfinite()
        slack = 1e-13 * (1 + energies[:-1].abs())
        rises += int((both & (energies[1:] > energies[:-1] + slack)).sum())
        steps += int(both.sum())
    assert rises == 0
    assert bool(torch.stack(ends).all())


@pytest.mark.parametrize("name", UNITS)
def test_without_diffusion_it_is_plain_retrieval(name):
    query, stored = sample(batch=(3,))
    for steps in (1, 3, None):
        plain = retrieve(query, stored, beta=2.0, forgetting=UNITS[name], steps=steps, stop=TIGHT)
        found = retrieve_on_graph(
            query, stored, lam=0.0, eta=0.0, beta=2.0, forgetting=UNITS[name], steps=steps, stop=TIGHT
        )
        assert_close(found.value, plain.value, rtol=1e-6, atol=1e-9)
        assert_close(found.index, plain.index)
        assert_close(found.support, plain.support)
        assert_close(found.weight, plain.weight, rtol=1e-6, atol=1e-9)


def test_weak_diffusion_is_nearly_plain_retrieval():
    query, stored = sample(batch=(3,))
    plain = retrieve(query, stored, beta=2.0, stop=TIGHT).value
    found = retrieve_on_graph(query, stored, lam=1e-9, eta=1e-9, logit_eta=1e-9, beta=2.0, stop=TIGHT).value
    assert_close(found, plain, rtol=1e-6, atol=1e-7)


def test_strong_diffusion_makes_neighbours_agree():
    query, stored = sample(8, 5, 4)
    full = Graph.from_adjacency(torch.ones(8, 8, dtype=F64))
    found = retrieve_on_graph(query, stored, lam=1e6, query_graph=full, laplacian="combinatorial", beta=2.0)
    assert float((found.state - found.state.mean(0)).abs().max()) < 1e-4


@pytest.mark.parametrize("unit", ["none", "relu", "pfu"])
@pytest.mark.parametrize("sparse", [False, True])
def test_implicit_gradients_are_those_of_many_steps(unit, sparse):
    query, stored = sample(4, 6, 3, batch=(2,))
    stored.requires_grad_()
    lam, eta = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (0.8, 0.3))
    beta = torch.tensor(1.5, dtype=F64, requires_grad=True)

    def grads(**how):
        found = retrieve_on_graph(
            query,
            stored,
            lam=lam,
            eta=eta,
            logit_eta=0.2,
            beta=beta,
            graph=KNN(2, sparse=sparse),
            forgetting=UNITS[unit],
            **how,
        )
        loss = (found.value * torch.arange(24, dtype=F64).reshape(2, 4, 3).cos()).sum()
        return torch.autograd.grad(loss, (stored, lam, eta, beta))

    implicit = grads(stop=TIGHT, adjoint=Implicit(rtol=1e-12))
    assert_close(implicit, grads(steps=400), rtol=1e-7, atol=1e-10)


def test_gradients_reach_the_weights_of_edges_and_pass_gradcheck():
    query, stored = sample(4, 5, 3)
    weight = torch.rand(4, 4, dtype=F64) + 0.1
    weight = (weight + weight.T).requires_grad_()

    def solve(weight, stored, lam):
        graph = Graph((weight + weight.T) / 2 * (1 - torch.eye(4, dtype=F64)), None, 4, ())
        options = {"stop": TIGHT, "adjoint": Implicit(rtol=1e-13), "beta": 1.2}
        return retrieve_on_graph(query, stored, lam=lam, query_graph=graph, **options).value

    lam = torch.tensor(0.9, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(solve, (weight, stored.requires_grad_(), lam))
    assert torch.autograd.gradgradcheck(solve, (weight, stored, lam), atol=1e-4)


def test_conjugate_gradients_in_the_metric_and_gmres_agree():
    query, stored = sample(batch=(3,))
    stored.requires_grad_()
    found = []
    for solver in ("cg", "gmres"):
        adjoint = Implicit(solver=solver, rtol=1e-12)
        solution = retrieve_on_graph(query, stored, lam=5.0, beta=2.0, stop=TIGHT, adjoint=adjoint)
        found.append(torch.autograd.grad(solution.value.square().sum(), stored)[0])
        assert bool((solution.adjoint.result == 0).all())
    assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("unit", ["none", "pfu"])
def test_a_sample_alone_is_what_it_is_in_a_batch(unit, sparse):
    query, stored = sample(batch=(6,))
    options = {
        "beta": 3.0,
        "eta": 0.4,
        "graph": KNN(2, sparse=sparse),
        "forgetting": UNITS[unit],
        "stop": TIGHT,
    }
    together = retrieve_on_graph(query, stored, **options)
    for i in range(6):
        alone = retrieve_on_graph(query[i], stored[i], **options)
        assert_close(together.value[i], alone.value, rtol=1e-9, atol=1e-11)
        assert int(together.steps[i]) == int(alone.steps)
        assert_close(together.energy[i], alone.energy, rtol=1e-9, atol=1e-11)
    query[2] = torch.nan
    harmed = retrieve_on_graph(query, stored, **options)
    others = [0, 1, 3, 4, 5]
    assert_close(harmed.value[others], together.value[others], rtol=1e-9, atol=1e-11)
    assert not bool(harmed.converged[2])


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), sparse=st.booleans())
def test_order_and_padding_do_not_matter(seed, sparse):
    generator = torch.Generator().manual_seed(seed)
    # Bits, whose similarities are tied as a rule.
    query = torch.randint(0, 2, (5, 6), generator=generator).double() + 0.5
    stored = torch.randint(0, 2, (7, 6), generator=generator).double() * 2 - 1
    options = {"beta": 2.0, "eta": 0.5, "graph": KNN(2, sparse=sparse), "stop": TIGHT}
    plain = retrieve_on_graph(query, stored, **options)
    order, other = torch.randperm(5, generator=generator), torch.randperm(7, generator=generator)
    moved = retrieve_on_graph(query[order], stored[other], **options)
    assert_close(moved.value, plain.value[order], rtol=1e-7, atol=1e-9)
    nothing = torch.full((2, 6), torch.nan, dtype=F64)
    padded = retrieve_on_graph(
        torch.cat([query, nothing]),
        torch.cat([stored, nothing]),
        query_mask=torch.tensor([False] * 5 + [True] * 2),
        mask=torch.tensor([False] * 7 + [True] * 2),
        **options,
    )
    assert_close(padded.value[:5], plain.value, rtol=1e-7, atol=1e-9)
    assert bool(padded.value.isfinite().all())


def test_masks_of_a_batch_ignore_the_patterns_of_each_sample():
    query, stored = sample(batch=(2,))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 4:] = True
    found = retrieve_on_graph(query, stored, eta=0.5, mask=mask, beta=2.0, stop=TIGHT)
    alone = retrieve_on_graph(query[1], stored[1, :4], eta=0.5, beta=2.0, stop=TIGHT)
    assert_close(found.value[1], alone.value, rtol=1e-8, atol=1e-10)
    assert int(found.index[1].max()) < 4


@pytest.mark.parametrize("unit", ["none", "relu", "pfu"])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_states_change_nothing(monkeypatch, unit, masked):
    query, stored = sample(batch=(2,))
    stored.requires_grad_()
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3] = True
    options = {
        "beta": 2.0,
        "eta": 0.2,
        "forgetting": UNITS[unit],
        "stop": TIGHT,
        "mask": mask if masked else None,
    }

    def run():
        found = retrieve_on_graph(query, stored, adjoint=Implicit(rtol=1e-12), **options)
        (slope,) = torch.autograd.grad(found.value.square().sum(), stored)
        return found, slope

    whole, slope = run()
    monkeypatch.setattr(function, "BLOCK", 20)
    parts, same = run()
    for name in ("value", "weight", "energy"):
        assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-11)
    assert_close(parts.index, whole.index)
    assert_close(parts.support, whole.support)
    assert_close(same, slope, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_values_are_read_out_through_the_graph(steps):
    query, stored = sample()
    values = torch.randn(9, 2, dtype=F64)
    found = retrieve_on_graph(query, stored, values=values, lam=0.6, eta=0.3, beta=2.0, steps=steps)
    diffused = heat(laplacian(knn_weights(stored, 5)), 0.3) @ stored
    matrix, z = laplacian(knn_weights(query, 5)), query
    for _ in range(steps - 1):
        z = step(z, diffused, matrix, beta=2.0, lam=0.6)
    weights, _ = association(z, diffused, 2.0)
    assert_close(found.value, resolvent(matrix, 0.6) @ weights @ values, rtol=1e-9, atol=1e-11)
    assert_close(found.index, weights.argmax(1))


def test_the_readout_of_the_patterns_is_the_state():
    query, stored = sample()
    found = retrieve_on_graph(query, stored, lam=0.6, eta=0.3, logit_eta=0.2, beta=2.0, stop=TIGHT)
    assert_close(found.value, found.state, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["heat", "implicit", "explicit"])
def test_stored_patterns_diffuse_as_asked(kind):
    query, stored = sample()
    matrix = laplacian(knn_weights(stored, 5))
    matrices = {
        "heat": heat(matrix, 0.4),
        "implicit": resolvent(matrix, 0.4),
        "explicit": torch.eye(9, dtype=F64) - 0.4 * matrix,
    }
    found = retrieve_on_graph(query, stored, lam=0.0, eta=0.4, diffusion=kind, beta=2.0, steps=1)
    weights, _ = association(query, matrices[kind] @ stored, 2.0)
    assert_close(found.value, weights @ matrices[kind] @ stored, rtol=1e-9, atol=1e-11)


def test_diffusing_the_scores_over_the_stored_patterns_is_diffusing_the_patterns():
    query, stored = sample()
    spread = heat(laplacian(knn_weights(stored, 5)), 0.7)
    assert_close((query @ stored.T) @ spread, query @ (spread @ stored).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_gives_what_float64_gives(dtype):
    query, stored = sample(batch=(2,))
    exact = retrieve_on_graph(query.to(dtype).double(), stored.to(dtype).double(), eta=0.3, beta=1.0)
    loose = Termination(rtol=4 * torch.finfo(dtype).eps)
    found = retrieve_on_graph(query.to(dtype), stored.to(dtype), eta=0.3, beta=1.0, stop=loose)
    assert found.value.dtype == dtype
    # In half precision a few roundings, at which steps stop changing; in float32 what the tolerance leaves,
    # 4 roundings over 1 - contraction (measured: 3 and 59 roundings of a value of 3).
    bound = (60 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    assert_close(found.value.double(), exact.value, rtol=bound, atol=bound)


def test_accelerated_solvers_end_where_plain_steps_do():
    query, stored = sample(12, 10, 6, batch=(16,))
    plain = retrieve_on_graph(query, stored, lam=3.0, beta=2.0, solver=Picard(), stop=TIGHT)
    fast = retrieve_on_graph(query, stored, lam=3.0, beta=2.0, solver=LBFGS(), stop=TIGHT)
    assert bool(plain.converged.all())
    assert bool(fast.converged.all())
    assert_close(fast.value, plain.value, rtol=1e-6, atol=1e-8)


def test_empty_batches_and_single_states_pass():
    query, stored = sample()
    assert retrieve_on_graph(query[None][:0], stored).value.shape == (0, 6, 5)
    one = retrieve_on_graph(query[:1], stored, lam=50.0, beta=2.0, stop=TIGHT)
    assert_close(one.value, retrieve(query[:1], stored, beta=2.0, stop=TIGHT).value, rtol=1e-7, atol=1e-9)


def test_strengths_stay_above_zero_and_start_where_they_are_told():
    strength = Strength("lam", 0.7, learn=True, entries=3)
    assert_close(strength(), torch.full((3,), 0.7))
    with torch.no_grad():
        strength.raw -= 50
    assert bool((strength() >= 0).all())
    assert "learned" in repr(strength)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "lam must be >= 0, got -1.0"),
        ({"eta": float("nan")}, "eta must be finite"),
        ({"lam": torch.nn.Parameter(torch.ones(()))}, "learn=True"),
        ({"diffusion": "spectral"}, "is not one of"),
        ({"laplacian": "normalised"}, "Did you mean 'normalized'"),
        ({"separation": "lsr"}, "similarity='dot'"),
        ({"mask": torch.zeros(9)}, "bool"),
        ({"query_mask": torch.zeros(3, dtype=torch.bool)}, "one entry a row"),
        ({"diffusion": "explicit", "eta": 30.0}, "take steps=30"),
        ({"steps": 0}, "steps must be"),
        ({"values": torch.zeros(8, 2, dtype=F64)}, "one row a pattern"),
        ({"graph": 5}, "query_graph or"),
        ({"query_graph": torch.ones(6, 6)}, "from_adjacency"),
        ({"query_graph": KNN(2)(torch.randn(9, 5))}, "query_graph has 9 nodes"),
        ({"pattern_graph": KNN(2)(torch.randn(2, 9, 5)), "eta": 0.1}, r"batch shape \(2,\)"),
    ],
)
def test_settings_that_cannot_be_meant_are_errors_that_help(options, message):
    query, stored = sample()
    with pytest.raises((ValueError, TypeError), match=message):
        retrieve_on_graph(query, stored, **options)


def test_a_query_needs_the_states_of_a_sample():
    with pytest.raises(ValueError, match="the queries of each sample"):
        retrieve_on_graph(torch.randn(5), torch.randn(9, 5))
    with pytest.raises(ValueError, match="one set for all queries"):
        retrieve_on_graph(torch.randn(3, 5), torch.randn(3, 9, 5))
    assert isinstance(DiffusionRetrieval(1.0).forgetting, Keep)
