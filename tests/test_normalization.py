"""Normalised states: Lagrangian, activation and conjugate; the energy; gradients; what retrieve returns."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import F64, SOLVERS, TIGHT, normal
from references import DTYPES, UNITS, exactly
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from hopdeq_lwpf import Result, Termination, fixed_point, retrieve
from hopdeq_lwpf.forgetting import PFU, ReLU, TopK
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.normalization import NORMALIZATIONS, LayerNorm, Normalization, Sphere, make_normalization
from hopdeq_lwpf.separation import SEPARATIONS, Polynomial

NORMS = (Sphere(), LayerNorm(), LayerNorm(0.3))
every_norm = pytest.mark.parametrize("norm", NORMS, ids=repr)
DOT = sorted(name for name, kind in SEPARATIONS.items() if getattr(kind, "similarity", "dot") == "dot")


def slow(norm: Normalization, row: list[float]) -> tuple[list[float], float]:
    """g(a) and L(a), one number at a time."""
    if isinstance(norm, Sphere):
        length = math.sqrt(math.fsum(a * a for a in row))
        return [a / length if length else 0.0 for a in row], length
    mean = math.fsum(row) / len(row)
    spread = math.sqrt(math.fsum((a - mean) ** 2 for a in row) / len(row) + norm.eps)
    return [(a - mean) / spread for a in row], len(row) * spread


# --- the three functions


@every_norm
def test_activation_and_lagrangian_by_hand(norm):
    a = torch.cat([normal(6, 5), torch.zeros(1, 5, dtype=F64), torch.full((1, 5), 3.0, dtype=F64)])
    rows = [slow(norm, row) for row in a.tolist()]
    assert_close(norm.apply(a), torch.tensor([g for g, _ in rows], dtype=F64), rtol=0, atol=1e-13)
    assert_close(norm.lagrangian(a), torch.tensor([lagrangian for _, lagrangian in rows], dtype=F64))


@every_norm
def test_activation_is_the_gradient_of_the_lagrangian(norm):
    a = normal(6, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(norm.lagrangian(a).sum(), a)
    assert_close(norm.apply(a), gradient, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(norm.apply, (a,))


def test_layernorm_is_that_of_torch():
    a = normal(6, 5)
    assert_close(LayerNorm().apply(a), nn.LayerNorm(5, elementwise_affine=False, dtype=F64)(a))
    assert_close(LayerNorm(0.3).apply(a), functional.layer_norm(a, (5,), eps=0.3))


@every_norm
def test_conjugate_meets_the_lagrangian_where_the_activation_is(norm):
    # Fenchel and Young: L(a) + L*(g) >= a.g for all, with equality for g = g(a).
    a, b = normal(50, 5), 3 * normal(50, 5, seed=2)
    g = norm.apply(a)
    assert_close(norm.lagrangian(a) + norm.conjugate(g), (a * g).sum(-1), rtol=0, atol=1e-11)
    gap = norm.lagrangian(b) + norm.conjugate(g) - (b * g).sum(-1)
    assert float(gap.min()) > 0


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_gradient_of_the_conjugate_of_layernorm_is_the_inverse_of_its_activation(eps):
    norm, a = LayerNorm(eps), normal(6, 5)
    g = norm.apply(a).requires_grad_()
    (back,) = torch.autograd.grad(norm.conjugate(g).sum(), g)
    # The part of a that has a mean is lost; 1/eps magnifies roundings.
    assert_close(back, a - a.mean(-1, keepdim=True), rtol=0, atol=1e-14 / eps)


def test_conjugate_of_the_sphere_is_zero_in_the_ball():
    g = Sphere().apply(normal(6, 5))
    exactly(Sphere().conjugate(g * torch.linspace(0, 1, 6, dtype=F64)[:, None]), torch.zeros(6, dtype=F64))


@every_norm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conjugate_is_infinite_outside_and_finite_on_every_state(norm, dtype):
    g = norm.apply(10 * normal(200, 7).to(dtype))
    assert g.dtype == dtype
    assert norm.conjugate(g).isfinite().all()
    assert (norm.conjugate(1.2 * g) == math.inf).all()
    if isinstance(norm, LayerNorm):
        assert (norm.conjugate(0.5 * g + 0.2) == math.inf).all()


def test_nothing_is_normalised_to_nothing():
    a = torch.zeros(2, 4, dtype=F64, requires_grad=True)
    g = Sphere().apply(a)
    exactly(g.detach(), torch.zeros(2, 4, dtype=F64))
    (gradient,) = torch.autograd.grad(g.sum(), a)
    exactly(gradient, torch.zeros(2, 4, dtype=F64))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_sphere_of_any_length(scale):
    a = normal(6, 5)
    assert_close(Sphere().apply(scale * a), Sphere().apply(a), rtol=0, atol=1e-15)


def test_nan_stays_nan():
    a = normal(3, 4)
    a[1, 2] = math.nan
    for norm in NORMS:
        g = norm.apply(a)
        assert g[1].isnan().all()
        assert norm.conjugate(g).isnan().tolist() == [False, True, False]


def test_names_and_errors():
    assert make_normalization(None) is None
    assert make_normalization("sphere") == Sphere()
    assert make_normalization("layernorm") == LayerNorm(1e-5)
    assert sorted(NORMALIZATIONS) == ["layernorm", "sphere"]
    with pytest.raises(ValueError, match="normalize 'layer_norm' .* Did you mean 'layernorm'"):
        Retrieval(normalize="layer_norm")
    with pytest.raises(TypeError, match=r"did you mean Sphere\("):
        retrieve(normal(2, 3), normal(4, 3), normalize=Sphere)
    for eps in (0.0, -1.0, math.inf, True, "small"):
        with pytest.raises(ValueError, match="eps must be a finite number > 0"):
            LayerNorm(eps)
    for method in ("apply", "lagrangian", "conjugate"):
        with pytest.raises(NotImplementedError, match=f"Normalization must override {method}"):
            getattr(Normalization(), method)(normal(2, 3))


# --- retrieval


@every_norm
@pytest.mark.parametrize("inject", ["start", "input"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_k_steps_by_hand(norm, inject, steps):
    query, patterns, values = normal(5, 4), normal(9, 4, seed=2), normal(9, 3, seed=3)
    options = {"beta": 1.7, "steps": steps, "inject": inject, "inject_weight": 0.6, "normalize": norm}
    z = norm.apply(query)
    for _ in range(steps):
        weights = torch.softmax(1.7 * z @ patterns.T, -1)
        recalled = weights @ patterns
        z = norm.apply(recalled + (0.6 * query if inject == "input" else 0))
    recall = retrieve(query, patterns, **options)
    assert_close(recall.state, z, rtol=0, atol=1e-13)
    assert_close(recall.value, norm.apply(recalled), rtol=0, atol=1e-13)
    if inject == "start":
        assert_close(recall.value, recall.state, rtol=0, atol=1e-13)
    assert_close(retrieve(query, patterns, values=values, **options).value, weights @ values)


@every_norm
def test_equilibrium_reads_out_at_the_root(norm):
    query, patterns, values = normal(5, 4), normal(9, 4, seed=2), normal(9, 3, seed=3)
    options = {"beta": 0.4, "normalize": norm, "stop": TIGHT}
    recall = retrieve(query, patterns, **options).require()
    weights = torch.softmax(0.4 * recall.state @ patterns.T, -1)
    assert_close(recall.state, norm.apply(weights @ patterns), rtol=0, atol=1e-11)
    assert_close(recall.value, recall.state, rtol=0, atol=1e-11)
    assert_close(
        retrieve(query, patterns, values=values, **options).value, weights @ values, atol=1e-10, rtol=0
    )


@st.composite
def scenes(draw):
    batch, count, width = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 10_000))
    query, patterns = normal(batch, width, seed=seed), normal(count, width, seed=seed + 1)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, count, generator=torch.Generator().manual_seed(seed)) < 0.3
    return query, patterns, mask, draw(st.sampled_from([0.1, 1.0, 4.0]))


@every_norm
@pytest.mark.parametrize("separation", DOT)
@given(
    data=scenes(), unit=st.sampled_from([u for u in UNITS if u.has_energy]), weight=st.sampled_from([0, 0.5])
)
@settings(max_examples=25)
def test_energy_never_rises_under_plain_iteration(norm, separation, data, unit, weight):
    query, patterns, mask, beta = data
    inject = {"inject": "input", "inject_weight": weight} if weight else {}
    f = Retrieval(beta, separation=separation, forgetting=unit, normalize=norm, **inject)
    assert f.has_energy == SEPARATIONS[separation].has_energy
    x = f.prepare(query, patterns, mask)
    z, energies = f.init(x), []
    for _ in range(12):
        energies.append(f.energy(z, x))
        z = f(z, x)
    energy = torch.stack(energies)
    assert energy.isfinite().all()
    assert float(energy.diff(dim=0).max()) <= 1e-12 * (1 + float(energy.abs().amax()))


@pytest.mark.parametrize("unit", [None, PFU(), ReLU()], ids=repr)
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_energy_is_stationary_at_an_equilibrium(unit, eps):
    query, patterns = normal(5, 4), normal(9, 4, seed=2)
    for norm in (Sphere(), LayerNorm(eps)):
        f = Retrieval(0.5, forgetting=unit, normalize=norm, inject="input", inject_weight=0.4)
        x = f.prepare(query, patterns)
        z = fixed_point(f, x, f.init(x), stop=TIGHT).require().state.requires_grad_()
        (gradient,) = torch.autograd.grad(f.energy(z, x).sum(), z)
        if isinstance(norm, Sphere):
            along = gradient - (gradient * z).sum(-1, keepdim=True) * z
        else:
            along = gradient - gradient.mean(-1, keepdim=True)
        # 1/eps magnifies how far z is from the root.
        assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-11 / eps)


@every_norm
def test_states_stay_normalised_for_every_solver(norm):
    query, patterns = normal(5, 4), normal(9, 4, seed=2)
    ends = []
    for solver in SOLVERS:
        recall = retrieve(query, patterns, beta=0.4, normalize=norm, solver=solver, stop=TIGHT).require()
        ends.append(recall.state)
        assert recall.energy.isfinite().all()
    for end in ends[1:]:
        assert_close(end, ends[0], rtol=0, atol=1e-9)


@every_norm
def test_no_metric_and_the_adjoint_that_needs_none(norm):
    patterns = normal(9, 4, seed=2).requires_grad_()
    f = Retrieval(0.4, normalize=norm)
    x = f.prepare(normal(5, 4), patterns)
    assert f.metric(f.init(x), x) is None
    solution = fixed_point(f, x, f.init(x), stop=TIGHT)
    solution.value.sum().backward()
    assert solution.adjoint.method == "gmres"


@every_norm
@pytest.mark.parametrize("unit", [None, PFU()], ids=repr)
def test_gradients(norm, unit):
    query, patterns, values = normal(2, 4), normal(5, 4, seed=2), normal(5, 2, seed=3)

    def run(query, patterns, values, beta, weight, steps=None, adjoint="implicit"):
        return retrieve(
            query,
            patterns,
            values=values,
            beta=beta,
            inject="input",
            inject_weight=weight,
            forgetting=unit,
            normalize=norm,
            steps=steps,
            adjoint=adjoint,
            stop=Termination(rtol=1e-13, atol=1e-15, max_steps=500),
        ).value

    numbers = torch.tensor(0.4, dtype=F64), torch.tensor(0.8, dtype=F64)
    arguments = [part.requires_grad_() for part in (query, patterns, values, *numbers)]
    assert torch.autograd.gradcheck(run, arguments, rtol=1e-4, atol=1e-6)
    assert torch.autograd.gradcheck(lambda *given: run(*given, steps=2), arguments)
    implicit, unrolled = (
        torch.autograd.grad(run(*arguments, adjoint=adjoint).square().sum(), arguments)
        for adjoint in ("implicit", "unrolled")
    )
    assert_close(implicit, unrolled, rtol=1e-5, atol=1e-5)  # the adjoint is solved to 1e-6


@every_norm
@pytest.mark.parametrize("steps", [1, 3, None])
def test_everything_forgotten_is_zero_without_nan(norm, steps):
    patterns = torch.tensor([[1.0, 0.2], [0.2, 1.0]], dtype=F64)
    query = torch.tensor([[-1.0, -1.1], [3.0, 1.0]], dtype=F64)
    patterns.requires_grad_()
    # Layer normalisation of two numbers is (-1, 1) or (1, -1); -5 forgets nothing there, 5 everything.
    unit = ReLU() if isinstance(norm, Sphere) else PFU(5.0)
    recall = retrieve(query, patterns, forgetting=unit, normalize=norm, steps=steps)
    assert recall.index[0] == -1
    exactly(recall.value[0].detach(), torch.zeros(2, dtype=F64))
    (gradient,) = torch.autograd.grad(recall.value.sum(), patterns)
    assert gradient.isfinite().all()


@every_norm
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("unit", [None, PFU(), TopK(3)], ids=repr)
def test_any_batch_shape(norm, shape, unit):
    query, patterns = normal(*shape, 4), normal(7, 4, seed=2)
    f = Retrieval(2.0, forgetting=unit, normalize=norm)
    x = f.prepare(query, patterns)
    z = f.init(x)
    assert f(z, x).shape == query.shape
    assert f.energy(z, x).shape == shape
    rows = [f(f.init(one), one) for one in (f.prepare(q, patterns) for q in query.reshape(-1, 4))]
    if rows:
        assert_close(f(z, x).reshape(-1, 4), torch.stack(rows), rtol=0, atol=1e-14)


def test_sets_of_patterns_and_dropped_queries():
    query, patterns = normal(6, 4, 5), normal(6, 9, 5, seed=2)
    beta = torch.logspace(-1, 0.5, 6, dtype=F64)[:, None]
    options = {"forgetting": PFU(), "normalize": "layernorm", "inject": "input", "inject_weight": 0.2}
    options["stop"] = Termination(rtol=1e-11, max_steps=1000)
    together = retrieve(query, patterns, beta=beta, **options).require()
    for i in range(6):
        alone = retrieve(query[i], patterns[i], beta=float(beta[i]), **options)
        assert_close(alone.value, together.value[i], rtol=0, atol=1e-8)


def test_nan_in_one_query_harms_no_other():
    query, patterns = normal(4, 4), normal(7, 4, seed=2)
    clean = retrieve(query, patterns, normalize="sphere")
    query[2] = math.nan
    recall = retrieve(query, patterns, normalize="sphere")
    assert recall.result[2] == Result.NONFINITE
    exactly(recall.value[[0, 1, 3]], clean.value[[0, 1, 3]])


@every_norm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(norm, dtype):
    query, patterns = normal(12, 8), normal(20, 8, seed=2)
    patterns = patterns / patterns.norm(dim=-1, keepdim=True)
    stop = Termination(rtol=4 * torch.finfo(dtype).eps)
    options = {"normalize": norm, "stop": stop, "steps": 3}
    full = retrieve(query, patterns, **options)
    half = retrieve(query.to(dtype), patterns.to(dtype), **options)
    assert half.value.dtype == half.state.dtype == dtype
    assert half.energy.dtype == torch.float32
    assert half.energy.isfinite().all()
    # Without forgetting at beta 1 the weighted mean is short, so that normalising magnifies its roundings.
    error = (half.state.double() - full.state).norm(dim=-1) / full.state.norm(dim=-1)
    assert float(error.max()) < 16 * torch.finfo(dtype).eps


@every_norm
def test_autocast(norm):
    query, patterns = normal(12, 8).float(), normal(20, 8, seed=2).float().requires_grad_()
    options = {"normalize": norm, "beta": 0.5, "stop": Termination(rtol=2e-2)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recall = retrieve(query, patterns, **options)
    assert recall.state.dtype == torch.float32
    assert recall.converged.all()
    (gradient,) = torch.autograd.grad(recall.value.float().sum(), patterns)
    assert gradient.isfinite().all()


def test_polynomials_recall_on_the_sphere_and_diverge_without():
    patterns = normal(30, 20, seed=2)
    patterns = patterns / patterns.norm(dim=-1, keepdim=True)
    query = patterns + 0.1 * normal(30, 20)
    recall = retrieve(query, patterns, separation=Polynomial(8), normalize="sphere").require()
    exactly(recall.index, torch.arange(30))
    assert float((recall.value * patterns).sum(-1).min()) > 0.999
    # More patterns than dimensions: the classical degree 2 does not hold them (Krotov & Hopfield 2016).
    classical = retrieve(query, patterns, separation=Polynomial(2), normalize="sphere")
    assert float((classical.index == torch.arange(30)).double().mean()) < 0.2
    free = retrieve(query, patterns, beta=3.0, separation=Polynomial(8))
    assert (free.result == Result.DIVERGED).all()


def test_weights_that_do_not_sum_to_one_read_values_out_as_they_are():
    query, patterns, values = normal(4, 5), normal(6, 5, seed=2), normal(6, 3, seed=3)
    options = {"separation": Polynomial(3), "normalize": "sphere", "steps": 2}
    f = Retrieval(separation=Polynomial(3), normalize="sphere")
    x = f.prepare(query, patterns)
    weights = f.weights(f(f.init(x), x), x)
    assert (weights.sum(-1) - 1).abs().min() > 0.1
    assert_close(retrieve(query, patterns, values=values, **options).value, weights @ values)
    assert_close(retrieve(query, patterns, **options).value, Sphere().apply(weights @ patterns))
