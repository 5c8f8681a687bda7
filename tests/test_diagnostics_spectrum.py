"""The spectral radius against the eigenvalues of the dense Jacobian, and against the rate of plain iteration."""

import math

import pytest
import torch
from problems import PROBLEMS, Scaled, normal
from torch.testing import assert_close

from hopdeq_lwpf import Termination, fixed_point
from hopdeq_lwpf.diagnostics import spectral_radius
from hopdeq_lwpf.models import Retrieval

F64 = torch.float64


def dense_radius(f, z, x, row):
    """max |eigenvalue| of df/dz of one problem (dim 0) by automatic differentiation and a dense solver."""

    def one(part):
        return f(torch.cat([z[:row], part[None], z[row + 1 :]]), x)[row].reshape(-1)

    jacobian = torch.autograd.functional.jacobian(one, z[row])
    size = z[row].numel()
    return float(torch.linalg.eigvals(jacobian.reshape(size, size)).abs().max())


@pytest.mark.parametrize("unit", [None, "relu", "pfu"])
@pytest.mark.parametrize("separation", ["softmax", "softmax1", "sparsemax"])
def test_retrieval_has_the_radius_of_its_dense_jacobian(unit, separation):
    patterns = torch.nn.functional.normalize(normal(40, 12), dim=-1)
    query = 0.4 * normal(5, 12, seed=3)
    f = Retrieval(6.0, forgetting=unit, separation=separation)
    x = f.prepare(query, patterns)
    z = fixed_point(f, x, query).state
    found = spectral_radius(f, z, x, rtol=1e-8)
    assert found.method == "lanczos"
    # A bound of the residual on the error, and rounding.
    for row in range(5):
        assert float(found.radius[row]) == pytest.approx(dense_radius(f, z, x, row), abs=1e-7)
    assert bool(found.converged.all())


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"similarity": "euclidean"}, "lanczos"),
        ({"normalize": "sphere"}, "arnoldi"),
        ({"normalize": "layernorm", "inject": "input"}, "arnoldi"),
        ({"mask_in_loop": False, "forgetting": "relu"}, "arnoldi"),
    ],
    ids=str,
)
def test_other_retrievals_have_the_radius_of_their_dense_jacobian(options, method):
    patterns = torch.nn.functional.normalize(normal(40, 12), dim=-1)
    query = 0.4 * normal(5, 12, seed=3)
    f = Retrieval(**{"beta": 6.0, **options})
    x = f.prepare(query, patterns)
    stop = Termination(rtol=1e-12, atol=0.0, max_steps=3000)
    z = fixed_point(f, x, f.init(x), solver="picard", stop=stop).require().state
    found = spectral_radius(f, z, x, rtol=1e-8)
    assert found.method == method
    for row in range(5):
        assert float(found.radius[row]) == pytest.approx(dense_radius(f, z, x, row), abs=1e-6)


def test_problems_with_a_known_rate_have_it():
    checked = 0
    for name, problem in PROBLEMS.items():
        x = problem.prepare(*problem.arguments)
        root = problem.root
        found = spectral_radius(problem.f, root, x, rtol=1e-9)
        # Some problems state a bound for all rows; the largest row has the rate.
        assert float(found.radius.max()) == pytest.approx(problem.rate, abs=1e-6), name
        assert found.method == ("lanczos" if problem.symmetric else "arnoldi"), name
        checked += 1
    assert checked >= 8


def test_arnoldi_without_a_metric_finds_complex_eigenvalues():
    a = normal(2, 20, 20) / 20**0.5
    z = normal(2, 20, seed=4)

    def f(z, x):
        return torch.tanh((x @ z[:, :, None]).squeeze(-1))

    found = spectral_radius(f, z, a, rtol=1e-10)
    assert found.method == "arnoldi"
    assert found.products <= 20
    for row in range(2):
        assert float(found.radius[row]) == pytest.approx(dense_radius(f, z, a, row), rel=1e-6)


def test_rotation_without_growth_has_radius_one():
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    found = spectral_radius(lambda z, x: z @ x.T, normal(3, 2), turn)
    assert found.radius.tolist() == pytest.approx([1.0] * 3)


def test_lanczos_works_in_the_metric_that_f_declares():
    m = torch.rand(30, dtype=F64) * 20 + 0.1
    s = normal(30, 30)
    s = 0.05 * (s + s.T)
    f, z = Scaled(m), normal(3, 30, seed=5)
    exact = float(torch.linalg.eigvals(s / m[:, None]).abs().max())
    found = spectral_radius(f, z, (s, torch.zeros(30, dtype=F64)), rtol=1e-8)
    assert found.method == "lanczos"
    assert found.radius.tolist() == pytest.approx([exact] * 3, rel=1e-7)


def test_the_residual_bounds_the_error_of_an_unfinished_estimate():
    patterns = torch.nn.functional.normalize(normal(200, 60), dim=-1)
    query = 0.3 * normal(6, 60, seed=3)
    f = Retrieval(9.0)
    x = f.prepare(query, patterns)
    for products in (2, 4, 8):
        found = spectral_radius(f, query, x, subspace=products, rtol=0.0)
        assert found.products == products
        for row in range(6):
            jacobian = torch.autograd.functional.jacobian(
                lambda part, row=row: f(torch.cat([query[:row], part[None], query[row + 1 :]]), x)[row],
                query[row],
            )
            nearest = (torch.linalg.eigvalsh(jacobian).abs() - found.radius[row]).abs().min()
            assert float(nearest) <= float(found.residual[row]) + 1e-12


def test_a_batch_has_the_radii_of_its_problems_and_nan_stays_in_its_row():
    patterns = torch.nn.functional.normalize(normal(25, 10), dim=-1)
    f, query = Retrieval(8.0), 0.4 * normal(2, 3, 10, seed=2)
    alone = [
        float(spectral_radius(f, query[i, j], f.prepare(query[i, j], patterns)).radius)
        for i in range(2)
        for j in range(3)
    ]
    query[1, 1] = torch.nan
    found = spectral_radius(f, query, f.prepare(query, patterns))
    assert found.radius.shape == (2, 3)
    assert found.radius.isnan().nonzero().tolist() == [[1, 1]]
    del alone[4]
    assert found.radius[~found.radius.isnan()].tolist() == pytest.approx(alone, rel=1e-3)


def test_the_same_seed_gives_the_same_numbers():
    f, z = Retrieval(4.0), normal(4, 16)
    x = f.prepare(z, normal(50, 16, seed=7))
    first = spectral_radius(f, z, x, subspace=3)
    assert torch.equal(first.radius, spectral_radius(f, z, x, subspace=3).radius)
    assert not torch.equal(first.radius, spectral_radius(f, z, x, subspace=3, seed=1).radius)


def test_a_state_may_be_a_tree_of_tensors():
    def f(z, x):
        return {"a": 0.5 * z["b"], "b": 0.8 * z["a"].tanh() + x}

    z = {"a": torch.zeros(3, 2, dtype=F64), "b": torch.zeros(3, 2, dtype=F64)}
    found = spectral_radius(f, z, torch.zeros(3, 2, dtype=F64))
    # At 0 the Jacobian is [[0, .5], [.8, 0]]: eigenvalues +- sqrt(.4).
    assert found.radius.tolist() == pytest.approx([0.4**0.5] * 3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_agree_within_their_rounding(dtype):
    patterns = torch.nn.functional.normalize(normal(30, 10), dim=-1)
    query = 0.4 * normal(4, 10, seed=3)
    f = Retrieval(5.0)
    exact = spectral_radius(f, query, f.prepare(query, patterns), rtol=1e-9).radius
    low, stored = query.to(dtype), patterns.to(dtype)
    found = spectral_radius(f, low, f.prepare(low, stored))
    assert found.radius.dtype == torch.float32
    # Weights carry the rounding of scores of size 5.
    assert_close(found.radius.double(), exact, rtol=1e-3 + 20 * torch.finfo(dtype).eps, atol=0)


def test_the_radius_is_the_rate_of_plain_iteration():
    patterns = torch.nn.functional.normalize(normal(60, 20), dim=-1)
    f = Retrieval(5.0)
    query = 0.3 * normal(1, 20, seed=3)
    x = f.prepare(query, patterns)
    root = fixed_point(f, x, query, stop=Termination(rtol=1e-14, atol=0.0, max_steps=500)).require().state
    found = spectral_radius(f, root, x, rtol=1e-9)
    # A push along the slowest direction dies out by the radius a step; 1e-5 leaves the curvature of f out.
    slowest = torch.linalg.eigh(torch.autograd.functional.jacobian(lambda z: f(z, x)[0], root)[:, 0])[1][
        :, -1
    ]
    z = root + 1e-5 * slowest
    for _ in range(10):
        z = f(z, x)
    left = float((z - root).norm()) / 1e-5
    assert float(found.radius) == pytest.approx(left**0.1, rel=1e-3)
    assert float(found.steps_per_digit) == pytest.approx(10 / -math.log10(left), rel=1e-2)


def test_what_the_radius_means_is_said():
    rates = torch.tensor([0.0, 0.1, 0.9, 1.0, 1.5, torch.nan], dtype=F64)
    z = torch.ones(6, 1, dtype=F64)
    found = spectral_radius(lambda z, x: z * x, z, rates[:, None])
    assert_close(found.radius, rates, equal_nan=True)
    assert found.stable.tolist() == [True, True, True, False, False, False]
    slow = found.steps_per_digit.tolist()
    assert slow[:5] == pytest.approx([0.0, 1.0, math.log(10) / -math.log(0.9), math.inf, math.inf])
    assert math.isnan(slow[5])
    assert "2 of 5 unstable" in str(found)


def test_a_function_that_ignores_its_state_contracts_at_once():
    assert spectral_radius(lambda z, x: x, torch.ones(2, 3), torch.ones(2, 3)).radius.tolist() == [0, 0]
    assert spectral_radius(lambda z, x: 0 * z + x, torch.ones(2, 3), torch.ones(2, 3)).radius.tolist() == [
        0,
        0,
    ]


def test_an_empty_batch_has_no_radii_and_gradients_are_left_alone():
    found = spectral_radius(lambda z, x: z, torch.zeros(0, 3))
    assert found.radius.shape == (0,)
    assert str(found) == "no spectral radius is known"
    z = torch.ones(2, 3, requires_grad=True)
    with torch.no_grad():
        assert spectral_radius(lambda z, x: 0.5 * z, z).radius.tolist() == pytest.approx([0.5] * 2)
    assert z.grad is None
    assert z.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subspace": 0}, "subspace must be an integer >= 1"),
        ({"rtol": -1.0}, "rtol must be a number in"),
        ({"seed": -1}, "seed must be an integer >= 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        spectral_radius(lambda z, x: z, torch.ones(1, 2), **options)


def test_bad_functions_and_states_are_named():
    with pytest.raises(TypeError, match="f must be a function"):
        spectral_radius(None, torch.ones(1, 2))
    with pytest.raises(TypeError, match="z0"):
        spectral_radius(lambda z, x: z, torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="must return the shape of z"):
        spectral_radius(lambda z, x: z[:, :1], torch.ones(1, 2))
