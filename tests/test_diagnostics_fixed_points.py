"""Types of fixed points and counts against slow twins; diagnose() as a whole."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopdeq_lwpf import Solution, Termination, fixed_point, retrieve
from hopdeq_lwpf.diagnostics import AveragingClass, FixedPoint, classify, diagnose, usage
from hopdeq_lwpf.models import Retrieval


def slow_kind(row, ignored, mass, shares):
    """Kind, size and class of one row of weights, by counting."""
    visible = sorted((w for w, out in zip(row, ignored, strict=True) if not out), reverse=True)
    total = math.fsum(visible)
    if math.isnan(total):
        return FixedPoint.UNDEFINED, 0, AveragingClass.NONE
    if total == 0:
        return FixedPoint.FORGOTTEN, 0, AveragingClass.NONE
    size = next(k for k in range(1, len(visible) + 1) if math.fsum(visible[:k]) >= mass * total)
    n = len(visible)
    kind = FixedPoint.GLOBAL if size > shares[0] * n else FixedPoint.METASTABLE
    kind = FixedPoint.SINGLE if size == 1 else kind
    passed = [size > share * n for share in shares]
    averaging = AveragingClass(passed.index(True) + 1) if any(passed) else AveragingClass.IV
    return kind, size, averaging


@given(st.data())
def test_classification_is_the_slow_twin(data):
    rows, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    # Eighths and a mass of 3/4 are exact, so that both sides of every threshold are decided alike.
    numbers = data.draw(
        st.lists(st.sampled_from((0, 0, 1, 2, 16)), min_size=rows * count, max_size=rows * count)
    )
    dtype = data.draw(st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)))
    weights = torch.tensor(numbers, dtype=dtype).reshape(rows, count) / 8
    if data.draw(st.booleans()):
        weights[0, 0] = torch.nan
    flags = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    mask = torch.tensor(flags) if data.draw(st.booleans()) else None
    # Just below 3/4, where nothing lies: rounding of the goal cannot decide.
    found = classify(weights, mask=mask, mass=0.745)
    ignored = flags if mask is not None else [False] * count
    for i, row in enumerate(weights.tolist()):
        expected = slow_kind(row, ignored, 0.745, (1 / 2, 1 / 8, 1 / 32))
        assert (found.kind[i], found.size[i], found.averaging[i]) == expected


def test_the_types_of_the_paper():
    n = 64
    weights = torch.zeros(5, n, dtype=torch.float64)
    weights[0, 3] = 1.0  # one pattern
    weights[1, :8] = 1 / 8  # a metastable state of eight, all of which are needed for .90
    weights[2] = 1 / n  # the global average: 57.6, so 58 of 64 for .90
    weights[3, 5], weights[3, 6] = 0.25, 0.01  # most is forgotten; what is left points to one pattern
    found = classify(weights)
    assert found.kind.tolist() == [
        FixedPoint.SINGLE,
        FixedPoint.METASTABLE,
        FixedPoint.GLOBAL,
        FixedPoint.SINGLE,
        FixedPoint.FORGOTTEN,
    ]
    assert found.size.tolist() == [1, 8, 58, 1, 0]
    assert found.averaging.tolist() == [
        AveragingClass.IV,
        AveragingClass.III,
        AveragingClass.I,
        AveragingClass.IV,
        AveragingClass.NONE,
    ]
    assert found.share(FixedPoint.SINGLE) == 0.4
    assert found.median_size() == 8
    assert str(found) == "20.0 % forgotten, 40.0 % single, 20.0 % metastable (median size 8), 20.0 % global"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nine_of_ten_equal_weights_hold_ninety_per_cent(dtype):
    assert classify(torch.full((10,), 0.1, dtype=dtype)).size.item() == 9


def test_half_precision_does_not_round_the_number_of_patterns():
    # bfloat16 would make 1,032 of 1,029: 515 is more than half of the one and not of the other.
    weights = torch.zeros(1029, dtype=torch.bfloat16)
    weights[:576] = 1.0
    found = classify(weights)
    assert found.size.item() == 515
    assert found.kind.item() == FixedPoint.GLOBAL
    assert found.averaging.item() == AveragingClass.I


def test_the_only_pattern_is_single_and_not_global():
    assert classify(torch.ones(1, 1)).kind.item() == FixedPoint.SINGLE


def test_a_batch_is_classified_as_its_rows_and_nan_stays_in_its_row():
    weights = torch.softmax(6 * torch.randn(3, 4, 20), -1)
    alone = classify(weights[1, 2])
    weights[0, 0, 0] = torch.nan
    together = classify(weights)
    assert (together.kind[1, 2], together.size[1, 2]) == (alone.kind, alone.size)
    assert together.kind[0, 0] == FixedPoint.UNDEFINED
    assert int((together.kind == FixedPoint.UNDEFINED).sum()) == 1


def test_no_queries_are_no_error():
    found = classify(torch.zeros(0, 5))
    assert found.kind.shape == (0,)
    assert math.isnan(found.share(FixedPoint.SINGLE))
    assert str(found) == "no queries"
    assert usage(torch.zeros(0, 5)).queries == 0


def test_usage_counts_by_hand():
    weights = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [0.9, 0.0, 0.0, 0.1]])
    found = usage(weights)
    assert (found.queries, found.patterns, found.total_forgetting) == (3, 4, 1)
    assert found.dead.tolist() == [1]
    assert (found.support_least, found.support_median, found.support_most) == (0, 2, 2)
    assert str(found) == (
        "1 of 3 queries forget every pattern; 1 of 4 patterns are dead; support 0 to 2, median 2"
    )
    ignored = usage(weights, mask=torch.tensor([False, True, False, True]))
    assert (ignored.patterns, ignored.dead.tolist()) == (2, [])


def test_forgetting_makes_dead_patterns():
    patterns = torch.eye(4)
    query = torch.tensor([[0.9, 0.1, 0.0, -0.2], [0.2, 0.8, 0.0, -0.2]])
    kept, all_of_them = Retrieval(4.0, forgetting="relu"), Retrieval(4.0)
    # A score of 0 is forgotten by ReLU, too.
    assert usage(kept.weights(query, kept.prepare(query, patterns))).dead.tolist() == [2, 3]
    assert usage(all_of_them.weights(query, all_of_them.prepare(query, patterns))).dead.tolist() == []


# --- diagnose


def prepared(query, patterns, beta=12.0, **options):
    f = Retrieval(beta, **options)
    return f, f.prepare(query, patterns)


def test_diagnose_answers_every_question_of_a_recall():
    patterns = torch.nn.functional.normalize(torch.randn(30, 16), dim=-1)
    query = patterns[:9] + 0.1 * torch.randn(9, 16)
    recall = retrieve(query, patterns, beta=12.0)
    f, x = prepared(query, patterns)
    found = diagnose(recall, f, x)
    names = [name for name, _ in found.lines()]
    assert names == ["problems", "fixed points", "patterns", "contraction", "basins", "storage"]
    text = str(found)
    assert text.splitlines()[0].startswith("problems      9 CONVERGED; steps median")
    assert "of 30 patterns are stored" in text
    assert "of 9 ended elsewhere than plain iteration" in text
    assert found.kinds.size.shape == recall.index.shape
    assert found.usage.support_most == int(recall.support.max())
    assert found.basins.tolist() == [0.0] * 9
    assert bool(found.spectrum.stable.all())


def test_diagnose_sees_a_solve_that_ended_elsewhere():
    patterns = torch.eye(3, dtype=torch.float64)
    query = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]], dtype=torch.float64)
    f, x = prepared(query, patterns, 20.0)
    solution = fixed_point(f, x, query)
    assert diagnose(solution, f, x).basins.tolist() == [0, 0]
    assert diagnose(solution, f, x, z0=query.flip(0)).basins.tolist() == [1, 1]
    assert diagnose(solution, f, x, reference=False).basins is None


@pytest.mark.parametrize("grouped", [False, True])
def test_diagnose_measures_a_sample_of_many(grouped):
    patterns = torch.nn.functional.normalize(torch.randn(4, 12, 8) if grouped else torch.randn(12, 8), dim=-1)
    query = 0.5 * torch.randn(4, 5, 8)
    f, x = prepared(query, patterns)
    solution = fixed_point(f, x, query)
    some, full = diagnose(solution, f, x, sample=2, seed=3), diagnose(solution, f, x)
    assert len(some.rows) == 2
    assert "(of " in str(some)
    assert torch.allclose(
        some.spectrum.radius.reshape(-1), full.spectrum.radius.reshape(-1)[some.rows], rtol=1e-3
    )
    assert torch.equal(some.basins, full.basins[some.rows])


def test_diagnose_says_where_theory_is_silent():
    patterns, query = torch.eye(4), 0.9 * torch.eye(4)[:2]
    for options, reason in (
        ({"forgetting": "relu"}, "forgetting"),
        ({"separation": "sparsemax"}, "a separation other than softmax"),
        ({"inject": "input"}, "an injected query"),
        ({"similarity": "euclidean"}, "euclidean scores"),
        ({"normalize": "sphere"}, "a normalised state"),
        ({"forgetting": "relu", "inject": "input"}, "forgetting, an injected query"),
    ):
        f, x = prepared(query, patterns, **options)
        found = diagnose(fixed_point(f, x, query), f, x)
        assert found.storage is None
        assert reason in found.theory
        assert found.theory in str(found)
    f, x = prepared(query, patterns, torch.tensor([1.0, 2.0]))
    assert "one beta or mask a query" in diagnose(fixed_point(f, x, query), f, x).theory


def test_diagnose_of_any_function_leaves_out_what_it_cannot_ask():
    def f(z, x):
        return 0.5 * z + x

    found = diagnose(fixed_point(f, torch.ones(3, 2), torch.zeros(3, 2)), f, torch.ones(3, 2))
    assert found.kinds is None
    assert found.spectrum.radius.tolist() == pytest.approx([0.5] * 3)
    assert [name for name, _ in found.lines()] == ["problems", "contraction", "storage"]


def test_diagnose_ignores_masked_patterns():
    patterns, mask = torch.eye(4), torch.tensor([False, False, False, True])
    query = 0.9 * patterns[:2]
    recall = retrieve(query, patterns, beta=20.0, mask=mask)
    f = Retrieval(20.0)
    found = diagnose(recall, f, f.prepare(query, patterns, mask))
    assert found.usage.patterns == 3
    assert int(found.storage.stored.sum()) == 3


def test_diagnose_of_an_empty_batch_and_of_nan():
    patterns = torch.eye(3)
    f, x = prepared(torch.zeros(0, 3), patterns)
    found = diagnose(fixed_point(f, x, torch.zeros(0, 3)), f, x)
    assert "none" in str(found)
    query = torch.tensor([[0.9, 0.0, 0.0], [torch.nan, 0.0, 0.0]])
    f, x = prepared(query, patterns)
    found = diagnose(fixed_point(f, x, query), f, x)
    assert found.kinds.kind.tolist()[1] == FixedPoint.UNDEFINED
    assert found.basins.isnan().tolist() == [False, True]
    assert found.spectrum.radius.isnan().tolist() == [False, True]


def test_diagnose_of_k_steps():
    patterns = torch.eye(3)
    query = 0.9 * patterns
    f, x = prepared(query, patterns)
    recall = retrieve(query, patterns, beta=12.0, steps=1, stop=Termination(rtol=1e-12))
    assert "3 MAX_STEPS" in str(diagnose(recall, f, x))


@pytest.mark.parametrize("change", ["beta", "patterns", "queries", "forgetting"])
def test_diagnose_refuses_what_the_recall_was_not_made_by(change):
    patterns = torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
    query = patterns[:3] + 0.1
    recall = retrieve(query, patterns, beta=3.0)
    f, x = {
        "beta": lambda: prepared(query, patterns, 4.0),
        "patterns": lambda: prepared(query, patterns.roll(1, 1), 3.0),
        "queries": lambda: prepared(query[:2], patterns, 3.0),
        "forgetting": lambda: prepared(query, patterns, 3.0, forgetting="relu"),
    }[change]()
    with pytest.raises(ValueError, match="prepare"):
        diagnose(recall, f, x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: classify("weights"), TypeError, "For a Recall there is diagnose"),
        (lambda: classify(torch.ones(3, dtype=torch.int64)), TypeError, "floating-point"),
        (lambda: classify(torch.zeros(3, 0)), ValueError, "N >= 1"),
        (lambda: classify(torch.tensor([0.5, -0.5])), ValueError, "weights must be >= 0, got -0.5"),
        (lambda: classify(torch.ones(3), mass=0.0), ValueError, "mass must be a number in"),
        (lambda: classify(torch.ones(3), shares=(0.1, 0.2, 0.3)), ValueError, "shares must be three numbers"),
        (lambda: classify(torch.ones(2, 3), mask=torch.ones(3)), TypeError, "mask must be a bool tensor"),
        (lambda: usage(torch.ones(2, 3), mask=torch.ones(2, dtype=torch.bool)), ValueError, "must broadcast"),
        (lambda: diagnose(torch.ones(3), None, None), TypeError, "solution must be a Solution"),
    ],
)
def test_bad_input_is_one_line_that_names_it(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_sample_must_be_a_count():
    f, x = prepared(torch.eye(2), torch.eye(2))
    solution = fixed_point(f, x, torch.eye(2))
    assert isinstance(solution, Solution)
    with pytest.raises(ValueError, match="sample must be an integer >= 1"):
        diagnose(solution, f, x, sample=0)


def test_dead_patterns_of_several_sets_are_counted_set_by_set():
    # Queries 0 and 1 use the first two patterns of the first set, 2 and 3 the last two of the second.
    weights = torch.eye(4)
    counted = usage(weights, sets=2)
    assert counted.patterns == 8
    assert counted.dead.tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="sets must divide the 4 queries, got 3"):
        usage(weights, sets=3)


def test_without_queries_no_pattern_is_dead():
    assert usage(torch.zeros(0, 4)).dead.numel() == 0
