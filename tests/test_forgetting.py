"""The forgetting units: against slow twins, masks, gradients, noise, energies, and wrong input."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import UNITS, exactly, forget, scores_and_mask

from hopdeq_lwpf.forgetting import PFU, Forgetting, Keep, ReLU, TopK, make_forgetting

INF = float("inf")
# Each unit with the rule that the slow twin takes.
RULES = {
    "relu": (ReLU(), {"threshold": 0.0, "bias": 0.0}),
    "relu, 2 kept": (ReLU(min_keep=2), {"threshold": 0.0, "bias": 0.0, "min_keep": 2}),
    "relu, 1 kept": (ReLU(min_keep=1), {"threshold": 0.0, "bias": 0.0, "min_keep": 1}),
    "median": (PFU(), {"threshold": "median", "bias": "threshold"}),
    "median, tracked": (PFU(tracked=True), {"threshold": "median", "bias": "threshold"}),
    "median, bias": (PFU(bias=-1.5), {"threshold": "median", "bias": -1.5}),
    "median, 3 kept": (PFU(min_keep=3), {"threshold": "median", "bias": "threshold", "min_keep": 3}),
    "number": (PFU(0.5), {"threshold": 0.5, "bias": "threshold"}),
    "number, bias": (PFU(-0.5, 2.0), {"threshold": -0.5, "bias": 2.0}),
    "number, 1 kept": (PFU(1.0, -2.0, min_keep=1), {"threshold": 1.0, "bias": -2.0, "min_keep": 1}),
    "top 1": (TopK(1), {"k": 1, "bias": 0.0}),
    "top 3": (TopK(3, 0.5), {"k": 3, "bias": 0.5}),
    "top 3, threshold": (TopK(3, "threshold"), {"k": 3, "bias": "threshold"}),
}


@pytest.mark.parametrize("name", RULES)
@given(data=scores_and_mask())
def test_fast_equals_slow(name, data):
    scores, mask = data
    unit, rule = RULES[name]
    before = scores.clone()
    value, kept = unit(scores, mask=mask)
    slow_value, slow_kept = forget(scores, mask, **rule)
    exactly(value, slow_value)
    exactly(kept, slow_kept)
    exactly(scores, before)


@given(data=scores_and_mask(60, 80), k=st.integers(1, 90))
def test_top_k_by_either_selection_equals_slow(data, k):
    scores, mask = data
    value, kept = TopK(k, "threshold")(scores, mask=mask)
    slow_value, slow_kept = forget(scores, mask, k=k, bias="threshold")
    exactly(value, slow_value)
    exactly(kept, slow_kept)


@pytest.mark.parametrize("bias", ["threshold", 0.5])
@given(data=scores_and_mask())
def test_scope_tensor_is_one_row(bias, data):
    scores, mask = data
    value, kept = PFU(bias=bias, scope="tensor")(scores, mask=mask)
    slow_value, slow_kept = forget(
        scores.reshape(1, -1), None if mask is None else mask.reshape(1, -1), threshold="median", bias=bias
    )
    # A row masked entirely is 0; in the one long row of the twin it is -inf like any other.
    emptied = torch.zeros_like(scores, dtype=torch.bool) if mask is None else mask.all(-1, keepdim=True)
    exactly(value, slow_value.reshape(scores.shape).masked_fill(emptied, 0.0))
    exactly(kept, slow_kept.reshape(scores.shape))


@pytest.mark.parametrize("unit", UNITS, ids=repr)
@given(data=scores_and_mask())
def test_draw_then_project_equals_call(unit, data):
    scores, mask = data
    value, kept = unit(scores, mask=mask)
    if mask is None:
        mask = torch.zeros_like(scores, dtype=torch.bool)
    threshold = unit.draw(scores, mask)
    inner_value, inner_kept = unit.project(scores, threshold, mask)
    exactly(inner_value[~mask], value[~mask])
    if inner_kept is None:
        assert isinstance(unit, Keep)
        inner_kept = (~mask).to(kept)
    exactly(inner_kept, kept)
    exactly(unit(scores, threshold, mask)[0], value)


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_minus_infinity_is_a_mask_and_padding_changes_nothing(unit):
    scores = torch.randn(3, 7)
    value, kept = unit(scores)
    for rubbish in (-INF, INF, float("nan"), 99.0):
        padded = torch.cat([scores, torch.full((3, 4), rubbish)], -1)
        mask = torch.arange(11) >= 7
        padded_value, padded_kept = unit(padded, mask=None if rubbish == -INF else mask)
        exactly(padded_value[:, :7], value)
        exactly(padded_kept[:, :7], kept)
        assert (padded_value[:, 7:] == -INF).all()
        assert (padded_kept[:, 7:] == 0).all()
        inner, _ = unit.project(padded, unit.draw(padded, mask), mask)
        exactly(inner[:, :7], value)


@pytest.mark.parametrize("unit", UNITS, ids=repr)
@pytest.mark.parametrize("by", ["mask", "-inf"])
def test_row_masked_entirely_is_zero_not_nan(unit, by):
    scores = torch.randn(3, 5, dtype=torch.float64)
    mask = torch.tensor([[False], [True], [False]]).expand(3, 5)
    if by == "-inf":
        scores, mask = scores.masked_fill(mask, -INF), None
    scores.requires_grad_()
    value, kept = unit(scores, mask=mask)
    weights = kept * torch.softmax(value, -1)
    assert (weights[1] == 0).all()
    assert not value.isnan().any()
    weights.square().sum().backward()
    assert (scores.grad[1] == 0).all()
    assert scores.grad.isfinite().all()
    others = unit(scores.detach()[[0, 2]])
    exactly(value[[0, 2]].detach(), others[0])


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_threshold_of_nothing_is_zero(scope):
    mask = torch.tensor([[True], [scope == "tensor"]])
    threshold = PFU(scope=scope).draw(torch.full((2, 3), 4.0), mask)
    exactly(threshold, torch.tensor([[0.0], [4.0]]) if scope == "row" else torch.tensor(0.0))


@pytest.mark.parametrize("unit", [PFU(), PFU(min_keep=2), PFU(bias=0.5), TopK(2), ReLU()], ids=repr)
def test_minus_infinity_inside_a_solve_is_a_very_low_score(unit):
    scores = torch.full((1, 37), -INF)
    scores[0, 1] = 1.0
    value, kept = unit.project(scores, unit.draw(scores))
    assert (kept * torch.softmax(value, -1)).argmax().item() == 1
    assert not value.isnan().any()
    assert kept[0, 1] == 1
    assert kept.sum() == max(getattr(unit, "min_keep", 0), getattr(unit, "k", 1), 1)


def test_all_forgotten_is_zero_and_min_keep_avoids_it():
    scores = -torch.rand(4, 6) - 0.1
    for unit, expected in (
        (ReLU(), 0),
        (PFU(0.0), 0),
        (ReLU(min_keep=2), 2),
        (PFU(0.0, -9.0, min_keep=2), 2),
    ):
        x = scores.clone().requires_grad_()
        value, kept = unit(x)
        assert (kept.sum(-1) == expected).all()
        (kept * torch.softmax(value, -1)).square().sum().backward()
        assert bool((x.grad != 0).any()) is (expected > 0)


def test_ties_go_to_the_lowest_index():
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0, 1.0]])
    assert TopK(1)(scores)[1].tolist() == [[0, 1, 0, 0, 0, 0]]
    assert TopK(3)(scores)[1].tolist() == [[1, 1, 0, 0, 1, 0]]
    assert TopK(4)(scores, mask=torch.tensor([True] + 5 * [False]))[1].tolist() == [[0, 1, 1, 1, 1, 0]]
    assert PFU(3.0, min_keep=1)(scores)[1].tolist() == [[0, 1, 0, 0, 0, 0]]


def test_one_entry():
    one = torch.tensor([1.5])
    assert (PFU()(one)[1].item(), PFU(min_keep=1)(one)[1].item()) == (0, 1)
    assert ReLU()(one)[0].item() == TopK(3)(one)[0].item() == 1.5


@pytest.mark.parametrize("unit", UNITS, ids=repr)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (5,)])
def test_empty_and_unbatched(unit, shape):
    value, kept = unit(torch.randn(shape))
    assert value.shape == kept.shape == shape
    threshold = unit.draw(torch.randn(shape))
    assert threshold is None or threshold.shape in ((), (*shape[:-1], 1))


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_nan_stays_in_its_row_and_is_not_hidden(unit):
    scores = torch.randn(4, 6)
    spoilt = scores.clone()
    spoilt[2, 3] = float("nan")
    (value, kept), (clean, clean_kept) = unit(spoilt), unit(scores)
    assert (kept * torch.softmax(value, -1))[2].isnan().any()
    if getattr(unit, "scope", "row") == "row":
        exactly(value[[0, 1, 3]], clean[[0, 1, 3]])
        exactly(kept[[0, 1, 3]], clean_kept[[0, 1, 3]])


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_autocast_keeps_the_dtype(unit):
    with torch.autocast("cpu", torch.bfloat16):
        scores = torch.randn(3, 4) @ torch.randn(4, 6)
        value, kept = unit(scores)
    assert scores.dtype == value.dtype == kept.dtype == torch.bfloat16


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_gradient_away_from_kinks(unit):
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert not unit(scores)[1].requires_grad
    assert torch.autograd.gradcheck(lambda s: unit(s)[0], (scores,))
    assert torch.autograd.gradgradcheck(lambda s: unit(s)[0].exp(), (scores,))


@pytest.mark.parametrize("min_keep", [0, 1])
def test_gradient_at_the_threshold_belongs_to_the_bias(min_keep):
    scores = torch.tensor([[1.0, 2.0, 2.0, 5.0]], requires_grad=True)
    limit = torch.tensor([[2.0]], requires_grad=True)
    value, _ = PFU(min_keep=min_keep).project(scores, limit)
    (value * torch.tensor([10.0, 20.0, 30.0, 40.0])).sum().backward()
    assert scores.grad.tolist() == [[0.0, 0.0, 0.0, 40.0]]
    assert limit.grad.item() == 60.0
    zero = torch.zeros(1, 3, requires_grad=True)
    ReLU()(zero)[0].sum().backward()
    assert (zero.grad == 0).all()


def test_gradient_reaches_the_median_element():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, -1.0], requires_grad=True)
    (PFU()(scores)[0] * torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])).sum().backward()
    assert scores.grad.tolist() == [0.0, 80.0, 30.0, 40.0, 0.0]
    scores.grad = None
    threshold = PFU().draw(scores)
    assert threshold.requires_grad
    PFU().project(scores, threshold.detach())[0].sum().backward()
    assert scores.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]


def test_noise_is_drawn_once_a_row_in_training_mode_only():
    scores = torch.zeros(40000, 3)
    unit = PFU(1.0, noise=0.2)
    noise = unit.draw(scores) - 1.0
    assert noise.shape == (40000, 1)
    assert noise.std().item() == pytest.approx(0.2, rel=0.02)
    assert abs(noise.mean().item()) < 0.004
    assert unit.eval().draw(scores) is None
    assert PFU(noise=0.2, scope="tensor").draw(scores).shape == ()
    tracked = PFU(noise=0.2, tracked=True)
    assert tracked.draw(scores + 7).abs().max() < 2
    assert tracked.eval().draw(scores) is None
    exactly(PFU(noise=0.2).eval().draw(scores + 7), torch.full((40000, 1), 7.0))


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("tracked", [False, True])
def test_noise_frozen_in_the_threshold_makes_a_function(scope, tracked):
    unit = PFU(noise=1.0, scope=scope, tracked=tracked)
    scores = torch.randn(50, 9)
    threshold = unit.draw(scores)
    for other in (scores, torch.randn(50, 9)):
        with torch.no_grad():
            quick = unit.project(other, threshold)
        exactly(quick, unit.project(other, threshold))
        exactly(unit(other, threshold), quick)
    assert not torch.equal(unit(scores)[0], unit(scores)[0])


def test_tracked_median_follows_and_the_other_does_not():
    scores = torch.randn(4, 7)
    frozen, tracked = PFU(), PFU(tracked=True)
    exactly(tracked.project(scores + 5)[1], tracked.project(scores)[1])
    assert tracked.draw(scores) is None
    assert frozen.project(scores + 5, frozen.draw(scores))[1].sum() > frozen(scores)[1].sum()
    with pytest.raises(ValueError, match=r"freezes its median.*unit\.draw"):
        frozen.project(scores)


def test_generator_reproduces_the_noise_through_copies_and_dtypes():
    scores = torch.zeros(50, 5)
    unit = PFU(noise=1.0, generator=torch.Generator().manual_seed(3))
    unit.draw(scores)
    twins = [
        copy.deepcopy(unit),
        pickle.loads(pickle.dumps(unit)),
        copy.deepcopy(pickle.loads(pickle.dumps(unit))),
    ]
    expected = unit.draw(scores)
    for twin in twins:
        exactly(twin.draw(scores), expected)
    again = PFU(noise=1.0, generator=torch.Generator().manual_seed(3))
    again.draw(scores)
    exactly(again.draw(scores.half()), expected.half())
    torch.manual_seed(1)
    first = PFU(noise=1.0).draw(scores)
    torch.manual_seed(1)
    exactly(PFU(noise=1.0).draw(scores), first)


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_module_contract(unit):
    scores = torch.randn(2, 6)
    for twin in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        assert repr(twin) == repr(unit)
        exactly(twin(scores), unit(scores))
        twin.load_state_dict(unit.state_dict(), strict=True)
        twin.eval()
        assert unit.training


def test_what_has_an_energy():
    expected = {
        Keep(): True,
        ReLU(): True,
        ReLU(min_keep=2): True,
        PFU(): True,
        PFU(scope="tensor"): True,
        PFU(0.5): True,
        PFU(0.5, tracked=True): True,
        PFU(0.5, 0.5): True,
        PFU(noise=0.1): True,
        PFU(tracked=True, bias=0.0): True,
        TopK(3): True,
        TopK(3, -1.0): True,
        PFU(0.5, 0.5, noise=0.1): False,
        PFU(0.5, 0.5, noise=0.1).eval(): True,
        PFU(tracked=True, bias=0.0, noise=0.1): False,
        PFU(tracked=True, bias=0.0, noise=0.1).eval(): True,
        PFU(tracked=True): False,
        PFU(tracked=True, scope="tensor", bias=0.0): False,
        PFU(bias=0.0): False,
        PFU(0.5, 0.0): False,
        TopK(3, "threshold"): False,
        Forgetting(): False,
    }
    wrong = {
        repr(unit): unit.has_energy for unit, answer in expected.items() if unit.has_energy is not answer
    }
    assert not wrong


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_self_adjoint_means_a_symmetric_jacobian(unit):
    scores = torch.randn(7, dtype=torch.float64)
    threshold = unit.draw(scores)

    def update(s):
        value, kept = unit.project(s, threshold)
        weights = torch.softmax(value, -1)
        return weights if kept is None else kept * weights

    jacobian = torch.autograd.functional.jacobian(update, scores)
    assert torch.allclose(jacobian, jacobian.T, atol=1e-14) is unit.self_adjoint


def test_make_forgetting():
    unit = TopK(4)
    assert make_forgetting(unit) is unit
    kinds = {None: Keep, "keep": Keep, "relu": ReLU, "pfu": PFU}
    assert {spec: type(make_forgetting(spec)) for spec in kinds} == kinds
    assert make_forgetting("topk").k == 8
    with pytest.raises(
        ValueError, match=r"forgetting 'rleu' is not one of \['keep', 'pfu'.*Did you mean 'relu'"
    ):
        make_forgetting("rleu")
    for wrong, text in ((3, "got 3"), (ReLU, r"did you mean ReLU\(\.\.\.\)")):
        with pytest.raises(
            TypeError, match=f"forgetting must be None, a name or a Forgetting object.*{text}"
        ):
            make_forgetting(wrong)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: PFU("mean"), ValueError, r"threshold 'mean' is not one of \['median'\].*finite number"),
        (lambda: PFU("0.5"), ValueError, "threshold '0.5'"),
        (lambda: PFU(None), TypeError, "threshold must be 'median' or a finite number, got None"),
        (lambda: PFU(INF), ValueError, "threshold must be 'median' or a finite number, got inf"),
        (lambda: PFU(True), TypeError, "threshold must be .* got True"),
        (lambda: PFU(bias="mu"), ValueError, r"bias 'mu' is not one of \['threshold'\]"),
        (lambda: PFU(bias=-INF), ValueError, "bias must be 'threshold' or a finite number, got -inf"),
        (lambda: PFU(noise=-0.1), ValueError, "noise is a standard deviation and must be >= 0, got -0.1"),
        (lambda: PFU(noise="0.1"), TypeError, "noise must be a finite number, got '0.1'"),
        (lambda: PFU(scope="rows"), ValueError, "scope 'rows' is not one of .*Did you mean 'row'"),
        (lambda: PFU(tracked="false"), TypeError, "tracked must be True or False, got 'false'"),
        (lambda: PFU(min_keep=-1), ValueError, "min_keep must be an integer >= 0, got -1"),
        (lambda: PFU(generator=3), TypeError, "generator must be a torch.Generator or None, got int"),
        (lambda: ReLU(min_keep=1.0), TypeError, "min_keep must be an integer >= 0, got 1.0"),
        (lambda: TopK(0), ValueError, "k must be an integer >= 1, got 0"),
        (lambda: TopK(2.0), TypeError, "k must be an integer >= 1, got 2.0"),
        (lambda: TopK(2, "max"), ValueError, "bias 'max'"),
        (lambda: ReLU()([1.0]), TypeError, "scores must be a torch.Tensor, got list"),
        (lambda: PFU().draw(torch.ones(3).int()), TypeError, "scores must have a floating-point dtype"),
        (
            lambda: ReLU()(torch.tensor(1.0)),
            ValueError,
            r"scores must have shape \(\*batch, N\), got a scalar",
        ),
        (lambda: ReLU()(torch.ones(2, 3), mask=torch.ones(2, 3)), TypeError, "mask must be a bool tensor"),
        (
            lambda: PFU()(torch.ones(2, 3), mask=torch.ones(4).bool()),
            ValueError,
            r"mask of shape \(4,\) does not broadcast to scores of shape \(2, 3\)",
        ),
        (lambda: Forgetting()(torch.ones(3)), NotImplementedError, "Forgetting must override project"),
    ],
)
def test_wrong_input_is_named(build, error, text):
    with pytest.raises(error, match=text):
        build()
