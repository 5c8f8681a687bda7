"""Equilibrium propagation: its limit is the implicit gradient, with an error of second order in the nudge."""

import math
import warnings

import pytest
import torch
from hierarchical_networks import F64, TIGHT
from problems import PROBLEMS
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf import Termination, fixed_point
from hopdeq_lwpf._types import ConvergenceWarning
from hopdeq_lwpf.models import CHN, HAM, Retrieval
from hopdeq_lwpf.solvers import EqProp, Equilibrium, Implicit, Picard

EXACT = Implicit("gmres", rtol=1e-13)


def chn(**options):
    """In float64, with weights small enough for equilibria far from where they appear and vanish."""
    torch.manual_seed(1)
    layer = CHN((5, 6, 4, 3), **{"stop": TIGHT, **options}).double()
    with torch.no_grad():
        for weight in layer.f.weights.values():
            weight.mul_(0.8)
    return layer


def inputs(batch=3, width=5):
    return torch.rand(batch, width, dtype=F64, generator=torch.Generator().manual_seed(2))


def loss_of(out):
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)).sum() + out.pow(
        2
    ).sum()


def of_chn(adjoint, **options):
    layer = chn(**options)
    layer.adjoint = adjoint
    return torch.autograd.grad(loss_of(layer(inputs())), list(layer.parameters()))


def of_retrieval(adjoint, **options):
    """Gradients to a query and patterns that were themselves computed, to beta, and to what made them."""
    generator = torch.Generator().manual_seed(3)
    query, patterns, w = (
        torch.randn(n, m, dtype=F64, generator=generator) for n, m in ((4, 5), (7, 5), (5, 5))
    )
    leaves = [part.requires_grad_() for part in (query, patterns, w)]
    beta = nn.Parameter(torch.tensor(1.3, dtype=F64))
    f = Retrieval(beta, inject="input", **options)
    x = f.prepare(query @ w, torch.tanh(patterns))
    z0 = f.init(x).detach()
    solution = fixed_point(f, x, z0, adjoint=adjoint, stop=TIGHT)
    return torch.autograd.grad(loss_of(solution.value), [*leaves, beta])


CASES = {
    "chn": of_chn,
    "chn with another step length": lambda adjoint: of_chn(adjoint, damping=0.85),
    "chn of tanh": lambda adjoint: of_chn(adjoint, lagrangian="tanh"),
    "retrieval": of_retrieval,
    "retrieval that forgets": lambda adjoint: of_retrieval(adjoint, forgetting="relu"),
    "mean shift": lambda adjoint: of_retrieval(adjoint, similarity="euclidean"),
}


def error(found, expected):
    a, b = (torch.cat([part.reshape(-1) for part in parts]) for parts in (found, expected))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", CASES)
def test_the_error_against_the_implicit_gradient_falls_with_the_square_of_the_nudge(name):
    expected = CASES[name](EXACT)
    errors = [error(CASES[name](EqProp(nudge=nudge, rtol=1e-10)), expected) for nudge in (4e-3, 2e-3, 1e-3)]
    assert errors[-1] < 1e-3
    for larger, smaller in zip(errors, errors[1:], strict=False):
        assert 3.5 < larger / smaller < 4.5, errors


def test_a_slow_twin_in_one_dimension():
    # E = z^2 / 2 - L(b + z) for L' = tanh / 2, by formulas alone.
    class Scalar(nn.Module):
        has_energy, state_ndim = True, 1

        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.tensor(0.4, dtype=F64))

        def forward(self, z, x):
            return 0.5 * torch.tanh(z + self.b)

        def energy(self, z, x):
            return (0.5 * z * z - 0.5 * torch.log(torch.cosh(z + self.b))).sum(-1)

        def metric(self, z, x):
            return PROBLEMS["softmax retrieval"].f.metric(z, x)

    def settle(push):
        z = 0.0
        for _ in range(500):
            z = 0.5 * math.tanh(z + 0.4) - push
        return z

    nudge = 0.05
    size = nudge * settle(0.0)
    plus, minus = (-0.5 * math.tanh(settle(push) + 0.4) for push in (size, -size))
    f = Scalar()
    solution = fixed_point(
        f, torch.zeros(1, 1), torch.zeros(1, 1, dtype=F64), adjoint=EqProp(nudge, 1e-10), stop=TIGHT
    )
    (3.0 * solution.value).sum().backward()
    assert_close(f.b.grad.item(), 3.0 * (plus - minus) / (2 * size), rtol=1e-9, atol=0.0)


def test_the_scale_of_the_loss_does_not_matter():
    layer = chn(adjoint=EqProp())
    one, tiny, large = (
        torch.autograd.grad(scale * loss_of(layer(inputs())), list(layer.parameters()))
        for scale in (1.0, 1e-12, 1e12)
    )
    for a, b, c in zip(one, tiny, large, strict=True):
        # The nudged solves are the same but for rounding, which the division by the nudge makes 1e3 times larger.
        assert_close(b * 1e12, a, rtol=1e-8, atol=1e-10)
        assert_close(c * 1e-12, a, rtol=1e-8, atol=1e-10)


def test_rows_do_not_see_each_other():
    layer, x = chn(adjoint=EqProp()), inputs(4)

    def gradient(x, rows):
        x = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(layer(x)[rows].pow(2).sum(), x)
        return found

    together = gradient(x, slice(None))
    for row in range(4):
        assert_close(gradient(x[row : row + 1], slice(None))[0], together[row], rtol=1e-6, atol=1e-9)
    alone = gradient(x, slice(0, 1))
    assert_close(alone[0], together[0], rtol=1e-6, atol=1e-9)
    assert not alone[1:].any(), "a row without a gradient is not nudged"


def test_nothing_and_an_empty_batch_have_no_gradient():
    layer = chn(adjoint="eqprop")
    layer(torch.zeros(0, 5, dtype=F64)).sum().backward()
    (0 * layer(inputs())).sum().backward()
    assert all(not p.grad.any() for p in layer.parameters())
    with torch.no_grad():
        assert not layer(inputs()).requires_grad
    query, patterns = inputs(), inputs(7)
    f = Retrieval(1.0)
    x = f.prepare(query, patterns)
    assert not fixed_point(f, x, query, adjoint="eqprop").value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_near_the_implicit_gradient(dtype):
    expected = of_chn(EXACT)
    layer = chn(stop=Termination(rtol=4 * torch.finfo(dtype).eps), adjoint=EqProp(nudge=1e-2)).to(dtype)
    # In bfloat16 a nudge of 1e-2 is a few roundings, and the solves cannot reach rtol.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = torch.autograd.grad(loss_of(layer(inputs().to(dtype))), list(layer.parameters()))
    assert all(part.isfinite().all() for part in found)
    if dtype == torch.float32:
        assert error([part.double() for part in found], expected) < 5e-3


def test_the_report_says_how_the_nudged_solves_went():
    layer = chn(adjoint=EqProp(max_steps=400))
    solution = layer(inputs(), return_solution=True)
    solution.value.sum().backward()
    report = solution.adjoint
    assert report.method == "eqprop"
    assert report.result.tolist() == [0, 0, 0]
    assert (report.steps > 2).all()
    assert (report.residual <= 1e-6).all()
    layer.adjoint = EqProp(max_steps=1)
    out = layer(inputs())
    with pytest.warns(ConvergenceWarning, match=r"\(eqprop\) left 3 of 3 problems unconverged"):
        out.sum().backward()


def test_it_works_by_name_in_any_layer():
    layer = Equilibrium(Retrieval(1.0), adjoint="eqprop")
    assert layer.adjoint == "eqprop"
    assert chn(adjoint="eqprop", solver=Picard()).adjoint == "eqprop"


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["linear", "quadratic"])
def test_a_second_derivative_is_refused(loss):
    layer = chn(adjoint=EqProp())
    x = inputs().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(layer(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EqProp(nudge=0.0), ValueError, r"nudge must be a number in \(0.0, 1.0\], got 0.0"),
        (lambda: EqProp(rtol=2.0), ValueError, "rtol must be a number"),
        (lambda: EqProp(max_steps=0), ValueError, "max_steps must be an integer >= 1"),
        (lambda: HAM((5, 4, 3), adjoint="eqprop")(inputs().float()), ValueError, "HAMFunction has none; use"),
        (lambda: chn(adjoint="eqprop", even_odd=True)(inputs()), ValueError, "CHNFunction has none"),
        (
            lambda: fixed_point(torch.sin, None, torch.zeros(1, 1), adjoint="eqprop"),
            ValueError,
            "needs an f with an energy",
        ),
        (lambda: torch.func.vmap(chn(adjoint="eqprop"))(inputs()), TypeError, "torch.func"),
    ],
)
def test_what_it_cannot_do_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
