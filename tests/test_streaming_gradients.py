"""Streamed retrieval: one step against a slow twin, gradients, energies, transforms and compilation."""

import math

import pytest
import torch
from problems import F64, normal
from references import exactly, forget_row, separate
from streamed import CLOSE, MAKE, TIGHT, B, D, N, masks
from torch.testing import assert_close

from hopdeq_lwpf import retrieve
from hopdeq_lwpf.forgetting import PFU, ReLU, TopK
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.streaming import TensorPatterns, attention
from hopdeq_lwpf.streaming.attention import Forgotten, Scores, Stored
from hopdeq_lwpf.streaming.gradient import attend

# --- against the definition


RULES = [
    (None, None),
    (ReLU(), {"threshold": 0.0}),
    (ReLU(min_keep=3), {"threshold": 0.0, "min_keep": 3}),
    (PFU(), {"threshold": "median", "bias": "threshold"}),
    (PFU(0.3, -1.0), {"threshold": 0.3, "bias": -1.0}),
    (TopK(3), {"k": 3}),
    (TopK(3, "threshold"), {"k": 3, "bias": "threshold"}),
]


@pytest.mark.parametrize(("unit", "rule"), RULES, ids=[repr(u) for u, _ in RULES])
@pytest.mark.parametrize("separation", ["softmax", "softmax1"])
@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_one_step_is_the_slow_twin(unit, rule, separation, similarity):
    n, beta = 11, 1.3
    f = Retrieval(beta, forgetting=unit, separation=separation, similarity=similarity)
    patterns, query, mask = normal(n, 4), normal(5, 4, seed=2), masks(n, 5)
    recall = retrieve(
        query, TensorPatterns(patterns, 3), beta=beta, forgetting=unit, separation=separation, mask=mask,
        similarity=similarity, steps=1,
    )  # fmt: skip
    for row in range(5):
        z = query[row].tolist()
        if similarity == "dot":
            scores = [beta * math.fsum(a * b for a, b in zip(z, p, strict=True)) for p in patterns.tolist()]
        else:
            scores = [
                -beta / 2 * math.fsum((a - b) ** 2 for a, b in zip(z, p, strict=True))
                for p in patterns.tolist()
            ]
        out = mask[row].tolist()
        value, kept = (scores, [1.0] * n) if rule is None else forget_row(scores, out, **rule)
        value = [0.0 if hidden else v for v, hidden in zip(value, out, strict=True)]
        p, lagrangian = separate(separation, torch.tensor([value], dtype=F64), mask[row : row + 1])
        w = [a * b for a, b in zip(p[0].tolist(), kept, strict=True)]
        total = math.fsum(w) if similarity == "euclidean" and math.fsum(w) else 1.0
        expected = [
            math.fsum(a * x for a, x in zip(w, column, strict=True)) / total for column in patterns.T.tolist()
        ]
        assert_close(recall.value[row], torch.tensor(expected, dtype=F64), rtol=0, atol=1e-12)
        assert recall.index[row] == (w.index(max(w)) if max(w) > 0 else -1)
        assert recall.weight[row] == pytest.approx(max(w) / total, abs=1e-12)
        assert recall.support[row] == sum(a > 0 for a in w)
        x = f.prepare(query, TensorPatterns(patterns, 3), mask)
        half = 0.5 * math.fsum(a * a for a in z) if similarity == "dot" else 0.0
        assert f.energy(query, x)[row].item() == pytest.approx(half - float(lagrangian) / beta, abs=1e-12)


# --- derivatives


@pytest.mark.parametrize("euclidean", [False, True])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("forgets", [None, "limit", "always"])
@pytest.mark.parametrize("beta_rows", [False, True])
def test_gradients_of_attention_over_blocks(euclidean, empty, forgets, beta_rows):
    z, patterns, values = normal(3, 2), normal(5, 2, seed=2), normal(5, 2, seed=3)
    beta = torch.tensor([[0.7], [1.1], [1.6]] if beta_rows else 1.2, dtype=F64)
    mask = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    fill = torch.tensor([[-0.4], [0.3], [0.2]], dtype=F64)

    def f(z, beta, patterns, values, fill):
        forgotten = None
        if forgets is not None:
            always = torch.tensor([[4, 2], [0, 3], [-1, -1]]) if forgets == "always" else None
            forgotten = Forgotten(torch.tensor(-0.5 if euclidean else 0.0, dtype=F64), fill, always)
        found = attend(
            Scores(z, beta, euclidean), Stored(patterns, values, mask, block=2), forgotten, empty=empty
        )
        return found.image, found.read, found.lse, found.mass

    leaves = tuple(t.clone().requires_grad_() for t in (z, beta, patterns, values, fill))
    assert torch.autograd.gradcheck(f, leaves, fast_mode=False)


def test_a_query_with_nothing_to_see_sends_no_gradient_to_a_threshold():
    # The Lagrangian of no pattern is 0 whatever the threshold of all rows is.
    patterns, query = normal(9, 3).requires_grad_(), normal(4, 3, seed=2)
    mask = masks(9, 4)
    gradients = []
    for given_ in (patterns, TensorPatterns(patterns, 2)):
        f = Retrieval(1.5, forgetting=PFU(scope="tensor"))
        energy = f.energy(query, f.prepare(query, given_, mask))
        gradients.append(torch.autograd.grad(energy.sum(), patterns)[0])
    assert_close(gradients[1], gradients[0], **CLOSE)


@pytest.mark.parametrize("unit", ["none", "relu", "pfu", "bias", "topk", "tracked bias"])
@pytest.mark.parametrize("inject", ["start", "input"])
def test_the_update_is_minus_the_gradient_of_the_energy(unit, inject):
    patterns, query = normal(N, D), normal(B, D, seed=2)
    f = Retrieval(1.5, forgetting=MAKE[unit](), inject=inject)
    x = f.prepare(query, TensorPatterns(patterns, 10))
    z = normal(B, D, seed=7).requires_grad_()
    (slope,) = torch.autograd.grad(f.energy(z, x).sum(), z)
    assert_close(z - f(z, x), slope, **CLOSE)


def test_plain_steps_lower_the_energy():
    patterns, query = normal(400, D), normal(B, D, seed=2)
    for unit in ("none", "relu", "pfu", "topk"):
        recall = retrieve(
            query,
            TensorPatterns(patterns, 64),
            beta=1.0,
            forgetting=MAKE[unit](),
            solver="picard",
            trace=True,
        )
        energy = recall.trace.energy
        assert energy.shape[1] == B
        assert bool((energy.diff(dim=0).nan_to_num(0.0) < 1e-12).all())
        assert float((energy[0] - recall.energy).max()) > 1e-3


def test_second_derivatives_are_refused_not_wrong():
    query = normal(B, D, seed=2).requires_grad_()
    for options in ({"steps": 2}, {"steps": None}, {"steps": None, "adjoint": "unrolled"}):
        recall = retrieve(query, TensorPatterns(normal(N, D), 13), inject="input", **options)
        (slope,) = torch.autograd.grad(recall.value.square().sum(), query, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative through streamed patterns"):
            torch.autograd.grad(slope.square().sum(), query)


def test_several_backward_passes_add_up():
    query = normal(B, D, seed=2).requires_grad_()
    recall = retrieve(query, TensorPatterns(normal(N, D), 13), inject="input", stop=TIGHT)
    first, second = (torch.autograd.grad(recall.value.sum(), query, retain_graph=True)[0] for _ in range(2))
    exactly(first, second)


TRANSFORMS = {
    "grad": lambda f, q: torch.func.grad(lambda q: f(q).sum())(q),
    "jvp": lambda f, q: torch.func.jvp(f, (q,), (q,)),
    "vmap": lambda f, q: torch.func.vmap(f)(q),
    "jacrev": lambda f, q: torch.func.jacrev(f)(q),
}


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:DeprecationWarning"
)  # of torch's own, with its first jvp
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("steps", [1, None])
def test_transforms_of_functions_are_refused_in_our_words(name, steps):
    patterns = TensorPatterns(normal(N, D), 13)

    def f(q):
        return retrieve(q, patterns, forgetting="pfu", inject="input", steps=steps).value

    with pytest.raises(TypeError, match="neither torch.func nor forward-mode"):
        TRANSFORMS[name](f, normal(B, D, seed=2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_is_refused_whatever_has_the_tangent():
    forward = torch.autograd.forward_ad
    query, patterns, beta = normal(B, D), normal(N, D), torch.tensor(2.0, dtype=F64)
    with forward.dual_level():
        for name in ("query", "patterns", "beta"):
            given_ = {"query": query, "patterns": patterns, "beta": beta}
            given_[name] = forward.make_dual(given_[name], torch.ones_like(given_[name]))
            with pytest.raises(TypeError, match="forward-mode"):
                retrieve(given_["query"], TensorPatterns(given_["patterns"]), beta=given_["beta"], steps=1)
        retrieve(query, TensorPatterns(patterns), beta=beta, steps=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_counted_steps_compile():
    torch.compiler.reset()
    patterns, query = TensorPatterns(normal(N, D), 13), normal(B, D, seed=2).requires_grad_()

    def f(q):
        return retrieve(q, patterns, steps=2, forgetting="pfu").value

    compiled, plain = torch.compile(f, backend="eager")(query), f(query)
    assert_close(compiled, plain, **CLOSE)
    slopes = [torch.autograd.grad(out.square().sum(), query)[0] for out in (compiled, plain)]
    assert_close(slopes[0], slopes[1], **CLOSE)


def test_no_score_that_is_kept_is_below_the_bound():
    z, patterns = normal(3, 2), normal(8, 2, seed=2)
    for limit in (-0.3, 0.0, 50.0):
        forgotten = Forgotten(torch.tensor(limit, dtype=F64), torch.tensor(0.0, dtype=F64))
        found = attention.sweep(Scores(z, 1.0), Stored(patterns, None, None, block=3), forgotten, False, True)
        for row, scores in enumerate((z @ patterns.T).tolist()):
            kept = [s for s in scores if s > limit]
            assert found.kept[row] == len(kept)
            assert found.low[row] <= min(kept, default=math.inf)
            assert found.visible[row] == 8
            assert found.top[row] == pytest.approx(max(kept, default=-math.inf))
