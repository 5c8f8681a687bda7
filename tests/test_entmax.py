"""The entmax family: alpha from 1 on, its limits, its gradient by alpha, learning it; exactness at any size."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import entmax_row, exactly, rowwise
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.separation import Entmax, Entmax15, Softmax, Sparsemax, make_separation

F64 = torch.float64
BETWEEN = (1.001, 1.05, 1.2, 1.5, 1.8, 2.0)


def learned(alpha, dtype=F64):
    return nn.Parameter(torch.as_tensor(alpha, dtype=dtype))


def slow(scores, alpha):
    pairs = rowwise(lambda row, _: entmax_row(row, alpha), scores, None)
    weights = torch.tensor([pair[0] for pair in pairs], dtype=F64).reshape(scores.shape)
    return weights, torch.tensor([pair[1] for pair in pairs], dtype=F64).reshape(scores.shape[:-1])


@given(
    alpha=st.floats(1.02, 4.0),
    halves=st.lists(st.integers(-8, 8), min_size=1, max_size=12),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_every_alpha_equals_the_slow_twin(alpha, halves, scale):
    scores = torch.tensor([halves, halves[::-1]], dtype=F64) * scale
    for made in (alpha, torch.tensor(alpha, dtype=F64)):
        weights, lagrangian = Entmax(made).weights_and_lagrangian(scores)
        expected = slow(scores, alpha)
        # Above 2 a weight near 0 is the root of a rounding error: of 1e-16 with alpha = 4 the third root.
        tolerance = 1e-11 if alpha <= 2 else 1e-5
        assert_close(weights, expected[0], rtol=tolerance, atol=tolerance)
        assert_close(lagrangian, expected[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("alpha", [1.1, 1.3, 1.5, 1.75, 2.0, 3.0])
@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 8.0])
@pytest.mark.parametrize("count", [255, 1000])
def test_many_scores(alpha, spread, count):
    # Enough for the start from maxima of groups, with scores left over, from near-uniform to one winner.
    scores = spread * torch.randn(3, count, dtype=F64, generator=torch.Generator().manual_seed(count))
    weights, lagrangian = Entmax(alpha).weights_and_lagrangian(scores)
    expected = slow(scores, alpha)
    tolerance = 1e-11 if alpha <= 2 else 1e-7
    assert_close(weights, expected[0], rtol=tolerance, atol=tolerance)
    assert_close(lagrangian, expected[1], rtol=1e-11, atol=1e-11)
    single = Entmax(alpha).weights(scores.float())
    # A root is right to some 6e-8; its power follows, above alpha = 2 with a vertical slope at 0.
    atol = 3e-6 if alpha <= 2 else 3e-5
    assert_close(single.double(), Entmax(alpha).weights(scores.float().double()), rtol=1e-3, atol=atol)
    for row in range(3):
        assert_close(Entmax(alpha).weights(scores[row]), weights[row], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("alpha", "limit"), [(1.0, Softmax()), (2.0, Sparsemax()), (1.5, Entmax15())])
@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-6, 1e-3])
def test_limits(alpha, limit, distance):
    scores = (0.4 * torch.randn(4, 7, dtype=F64)).requires_grad_()
    direction = torch.randn(4, 7, dtype=F64)
    expected = limit.weights_and_lagrangian(scores)
    for parameter in (alpha + distance, learned(alpha + distance)):
        found = Entmax(parameter).weights_and_lagrangian(scores)
        for fast, known in zip(found, expected, strict=True):
            # The derivatives by alpha of these scores are below 10.
            assert_close(fast, known, rtol=0, atol=10 * distance + 1e-13)
        grad = torch.autograd.grad((found[0] * direction).sum(), scores)[0]
        known = torch.autograd.grad((expected[0] * direction).sum(), scores, retain_graph=True)[0]
        assert_close(grad, known, rtol=0, atol=30 * distance + 1e-12)


@pytest.mark.parametrize("alpha", [1.0, 1 + 1e-9, 1 + 1e-6, 1 + 1e-3, *BETWEEN, 2.5])
def test_gradient_by_alpha_equals_a_difference_also_at_one(alpha):
    scores = torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(4))
    direction = torch.randn(3, 6, dtype=F64)
    parameter = learned(alpha)
    weights, lagrangian = Entmax(parameter).weights_and_lagrangian(scores)
    by_weights = torch.autograd.grad((weights * direction).sum(), parameter, retain_graph=True)[0]
    by_lagrangian = torch.autograd.grad(lagrangian.sum(), parameter)[0]
    # A difference of second order forwards, since nothing lies below 1.
    h = 1e-4
    ahead = [Entmax(alpha + k * h).weights_and_lagrangian(scores) for k in range(3)]
    values = [((w * direction).sum(), lag.sum()) for w, lag in ahead]
    for found, (a, b, c) in zip((by_weights, by_lagrangian), zip(*values, strict=True), strict=True):
        assert_close(found, (4 * b - c - 3 * a) / (2 * h), rtol=2e-6, atol=2e-6)


def test_softmax_limit_of_the_gradient_by_alpha_is_exact():
    # dL/dalpha -> -dOmega/dalpha = sum p log p - sum p log(p)^2 / 2 at alpha = 1.
    scores, one = torch.randn(5, 9, dtype=F64), learned(1.0)
    p = torch.softmax(scores, -1)
    expected = (p * p.log() - 0.5 * p * p.log().square()).sum()
    assert_close(torch.autograd.grad(Entmax(one).lagrangian(scores).sum(), one)[0], expected)


@pytest.mark.parametrize("alpha", BETWEEN)
@pytest.mark.parametrize("per_row", [False, True])
def test_gradcheck_of_scores_and_alpha(alpha, per_row):
    scores = (0.5 * torch.randn(3, 5, dtype=F64)).requires_grad_()
    start = torch.full((3,) if per_row else (), alpha, dtype=F64, requires_grad=True)

    def both(s, a):
        module = Entmax()
        module.alpha = a
        return module.weights_and_lagrangian(s)

    assert gradcheck(both, (scores, start), eps=1e-7, atol=1e-5)
    assert gradgradcheck(both, (scores, start), eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_lagrangian_is_the_conjugate(alpha):
    # No point of the simplex gives p.s - Omega(p) more, and p(s) gives exactly L.
    scores = torch.randn(6, dtype=F64)
    points = torch.distributions.Dirichlet(torch.full((6,), 0.3, dtype=F64)).sample((2000,)).clamp_min(1e-300)
    tsallis = (points.pow(alpha).sum(-1) - 1) / (alpha * (alpha - 1) or 1)
    omega = tsallis if alpha > 1 else (points * points.log()).sum(-1)
    lagrangian = Entmax(alpha).lagrangian(scores)
    gains = points @ scores - omega
    assert float(gains.max()) <= float(lagrangian) + 1e-12
    assert float(gains.max()) > float(lagrangian) - 0.5, "the points are too far away to test anything"


@pytest.mark.parametrize("separation", [Entmax15(), Entmax(1.25), Entmax(1.75)], ids=repr)
def test_a_clear_winner_takes_all_exactly(separation):
    scores = torch.tensor([[9.0, 2.0, -5.0], [300.0, 290.0, -1e30]])
    weights, lagrangian = separation.weights_and_lagrangian(scores)
    exactly(weights, torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    exactly(lagrangian, torch.tensor([9.0, 300.0]))


def test_alpha_a_row_and_broadcasting():
    scores = torch.randn(2, 3, 5, dtype=F64)
    alpha = torch.tensor([1.0, 1.4, 2.0], dtype=F64)
    weights, lagrangian = Entmax(alpha).weights_and_lagrangian(scores)
    for j, one in enumerate(alpha.tolist()):
        expected = Entmax(one).weights_and_lagrangian(scores[:, j])
        assert_close(weights[:, j], expected[0], rtol=0, atol=1e-14)
        assert_close(lagrangian[:, j], expected[1], rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match=r"alpha of shape \(3,\) does not broadcast .* \(2,\)"):
        Entmax(alpha).weights(scores[:, 0])


def test_vmap_over_scores_and_over_alpha():
    scores = torch.randn(4, 3, 5, dtype=F64)
    alphas = torch.tensor([1.0, 1.3, 1.5, 2.2], dtype=F64)

    def run(s, a):
        return torch.func.functional_call(Entmax(torch.tensor(1.2, dtype=F64)), {"alpha": a}, (s,))

    for s_dim, a_dim in ((0, None), (None, 0), (0, 0)):
        s, a = (scores if s_dim == 0 else scores[0]), (alphas if a_dim == 0 else alphas[1])
        found = torch.func.vmap(run, in_dims=(s_dim, a_dim))(s, a)
        grads = torch.func.vmap(
            torch.func.grad(lambda s, a: run(s, a).square().sum(), argnums=(0, 1)), in_dims=(s_dim, a_dim)
        )(s, a)
        for i in range(4):
            one = (scores[i] if s_dim == 0 else s, alphas[i] if a_dim == 0 else a)
            assert_close(found[i], run(*one), rtol=0, atol=1e-13)
            alone = torch.func.grad(lambda s, a: run(s, a).square().sum(), argnums=(0, 1))(*one)
            for got, want in zip(grads, alone, strict=True):
                assert_close(got[i], want, rtol=0, atol=1e-11)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_forward_mode_agrees_with_reverse_mode():
    scores, alpha = torch.randn(4, dtype=F64), torch.tensor(1.3, dtype=F64)

    def run(s, a):
        module = Entmax()
        module.alpha = a
        return torch.cat([module.weights(s), module.lagrangian(s)[None]])

    for argument in (0, 1):
        forward = torch.func.jacfwd(run, argnums=argument)(scores, alpha)
        assert_close(forward, torch.func.jacrev(run, argnums=argument)(scores, alpha), rtol=0, atol=1e-13)


def test_a_learned_alpha_belongs_to_the_model():
    f = Retrieval(2.0, separation=Entmax(nn.Parameter(torch.tensor(1.3))))
    assert [name for name, _ in f.named_parameters()] == ["separation.alpha"]
    twin = Retrieval(2.0, separation=Entmax(nn.Parameter(torch.tensor(1.9))))
    twin.load_state_dict(f.state_dict())
    assert twin.separation.alpha.item() == pytest.approx(1.3)
    for copied in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert copied.separation is not f.separation
        assert isinstance(copied.separation.alpha, nn.Parameter)
    query, patterns = torch.randn(3, 4), torch.randn(6, 4)
    f(query, f.prepare(query, patterns)).square().sum().backward()
    assert f.separation.alpha.grad.isfinite()
    assert f.separation.alpha.grad != 0
    assert "separation.alpha" in Retrieval(separation=Entmax(torch.tensor(1.3))).state_dict()
    assert not Retrieval(separation="entmax").state_dict()
    assert make_separation("entmax") is make_separation("entmax")
    assert repr(make_separation("entmax")) == "Entmax(alpha=1.5)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_scores_and_alpha_are_computed_wide(dtype):
    scores = torch.randn(3, 8).to(dtype)
    weights, lagrangian = Entmax(torch.tensor(1.5, dtype=dtype)).weights_and_lagrangian(scores)
    assert weights.dtype == dtype
    assert lagrangian.dtype == torch.float32
    exactly(weights, Entmax15().weights(scores.float()).to(dtype))


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (0.9, ValueError, r"alpha must be finite and >= 1 .* got \[0.9"),
        (math.nan, ValueError, "alpha must be finite"),
        (math.inf, ValueError, "alpha must be finite"),
        (torch.tensor([1.5, 0.5]), ValueError, r"got \[1.5, 0.5\]"),
        (torch.tensor([1, 2]), TypeError, "alpha must have a floating-point dtype"),
        ("1.5", TypeError, "alpha must be a number or a tensor, got '1.5'"),
        (True, TypeError, "alpha must be a number or a tensor, got True"),
    ],
)
def test_wrong_alpha_is_named(alpha, error, message):
    with pytest.raises(error, match=message):
        Entmax(alpha)


def test_an_alpha_that_learning_took_below_one_is_refused():
    module = Entmax(learned(1.5))
    with torch.no_grad():
        module.alpha.sub_(1.0)
    with pytest.raises(ValueError, match=r"alpha must be finite and >= 1 .*softplus"):
        module.weights(torch.randn(3, dtype=F64))


# torch.compile itself makes an instance of every Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", ["sparsemax", "entmax15", "learned"])
def test_compiled_in_one_graph_with_the_same_gradients(name):
    torch._dynamo.reset()
    separation = Entmax(learned(1.3)) if name == "learned" else make_separation(name)
    leaves = [torch.randn(3, 7, dtype=F64).requires_grad_()]
    leaves += [separation.alpha] if name == "learned" else []
    assert torch._dynamo.explain(separation.weights_and_lagrangian)(leaves[0]).graph_break_count == 0
    compiled = torch.compile(separation.weights_and_lagrangian, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, separation.weights_and_lagrangian):
        weights, lagrangian = function(leaves[0])
        grads = torch.autograd.grad(weights.square().sum() + lagrangian.sum(), leaves)
        results.append((weights.detach(), lagrangian.detach(), *grads))
    torch._dynamo.reset()
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, rtol=0, atol=1e-13)
