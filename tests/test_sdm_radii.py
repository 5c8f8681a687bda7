"""Signal, noise, fidelity, critical distances and optimal radii against exact fractions and recorded values."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hopdeq_lwpf.models.sdm.addresses import space_fraction
from hopdeq_lwpf.models.sdm.intersections import expected_shared_neurons, log_selected_intersection
from hopdeq_lwpf.models.sdm.radii import critical_distance, optimal_radius
from hopdeq_lwpf.models.sdm.signals import read_statistics
from tests.references_sdm import critical, normal_tail, number, read, recorded, row, shared

LARGE = {"neurons": 2**64, "patterns": 1024}
KANERVA = {"neurons": 1e6, "patterns": 10_000}


def name(case: dict) -> str:
    return case["id"]


@st.composite
def reads(draw):
    n = draw(st.integers(2, 40))
    counts = st.sampled_from([1, 2, 10, 1000, 10**6, 2**64])
    return n, draw(st.integers(0, n)), draw(counts), draw(counts)


@settings(max_examples=60)
@given(reads(), st.sampled_from(["midpoint", "moments"]))
def test_snr_fidelity_and_distance_follow_from_exact_counts(problem, variance):
    n, d, neurons, patterns = problem
    read_out = read_statistics(n, d, neurons=neurons, patterns=patterns, variance=variance)
    ratios = read(n, d, neurons, patterns, variance)
    assert read_out.snr.tolist() == pytest.approx(ratios, rel=1e-9)
    # A tail of the normal distribution is as many times less exact as its exponent is large.
    assert read_out.distance.tolist() == pytest.approx([n * normal_tail(one) for one in ratios], rel=1e-6)
    assert_close(read_out.fidelity, 1 - read_out.distance / n, rtol=0, atol=1e-12)


def test_the_signal_is_the_expected_number_of_shared_neurons():
    read_out = read_statistics(1000, [447, 451], **KANERVA)
    assert read_out.signal.shape == (2, 1001)
    assert_close(read_out.signal, expected_shared_neurons(1000, [447, 451], 1e6), rtol=1e-12, atol=0)
    assert_close(read_out.snr, read_out.signal / read_out.variance.sqrt(), rtol=1e-9, atol=0)
    alone = read_statistics(1000, 451, **KANERVA)
    assert_close(alone.variance, read_out.variance[1], rtol=0, atol=0)


def test_a_single_pattern_has_only_its_own_noise():
    read_out = read_statistics(30, 9, neurons=100, patterns=1)
    assert_close(read_out.variance, read_out.signal)


def test_variances_by_their_formulas():
    n, d, r, m = 1000, 451, 1e6, 10_000
    p = space_fraction(n, d).item()
    slope = math.exp(-((2 * d - n) ** 2) / n) / math.pi
    older = read_statistics(n, d, **KANERVA, variance="kanerva")
    expected = (1 + slope**2 * r / (4 * p**2 * n)) * p**2 * r * m
    assert_close(older.variance, torch.full((n + 1,), expected, dtype=torch.float64), rtol=1e-10, atol=0)
    midpoint = read_statistics(n, d, **KANERVA)
    met = midpoint.signal[500]
    assert_close(midpoint.variance, midpoint.signal + (m - 1) * (met + met**2), rtol=1e-10, atol=0)


def simulated_variance(n: int, d: int, neurons: int, patterns: int, trials: int) -> float:
    """Of the copies of m - 1 other patterns, each with a random sign, that a read at its own pattern meets."""
    address = torch.randint(0, 2, (trials, neurons, n), dtype=torch.int8)
    stored = torch.randint(0, 2, (trials, patterns, n), dtype=torch.int8)
    near = torch.cdist(address.float(), stored.float(), p=1) <= d
    copies = (near[:, :, :1] & near).sum(1).double()
    signs = torch.randint(0, 2, copies.shape).double() * 2 - 1
    signs[:, 0] = 1
    return (copies * signs).sum(1).var().item()


@pytest.mark.parametrize(("n", "d", "neurons"), [(12, 4, 60), (16, 5, 200)])
def test_the_exact_moments_are_those_of_sampled_neurons(n, d, neurons):
    sampled = simulated_variance(n, d, neurons, 6, trials=4000)
    exact = read_statistics(n, d, neurons=neurons, patterns=6, variance="moments").variance[0].item()
    # 4,000 draws of a heavy-tailed variance scatter by some 4 %; the number of neurons is fixed, not Poisson.
    assert exact == pytest.approx(sampled, rel=0.15)


def test_jaeckels_design_follows_from_its_intersection():
    n, k = 256, 10
    read_out = read_statistics(n, k, neurons=1e5, patterns=500, variance="moments", design="jaeckel")
    odds = [Fraction(count, 2**n) for count in row(n)]
    share = [Fraction(math.comb(n - dv, k), math.comb(n, k) * 2**k) for dv in range(n + 1)]
    first = sum(a * b for a, b in zip(odds, share, strict=True))
    second = sum(a * b * b for a, b in zip(odds, share, strict=True))
    assert first == Fraction(1, 4**k)
    for dv in (0, 10, 100):
        expected = 10**5 * share[dv] + 499 * (10**5 * first + 10**10 * second)
        assert read_out.variance[dv].item() == pytest.approx(float(expected), rel=1e-10)
    assert_close(read_out.signal, 1e5 * log_selected_intersection(n, k).exp(), rtol=1e-12, atol=0)


def test_jaeckels_design_tells_a_near_query_better_at_the_same_activation():
    # 10 coordinates activate 2^-10 of the neurons, between what the radii 102 and 103 do.
    options = {"neurons": 1e6, "patterns": 1000, "variance": "moments"}
    chosen = read_statistics(256, 10, **options, design="jaeckel")
    circles = read_statistics(256, [102, 103], **options)
    assert circles.signal[0, 0] < chosen.signal[0] < circles.signal[1, 0]
    assert bool((chosen.snr[32] > circles.snr[:, 32]).all())


@pytest.mark.parametrize("case", recorded("critical distance: largest"), ids=name)
def test_critical_distances_equal_the_recorded_ones(case):
    where = case["inputs"]
    options = {"neurons": number(where["r"]), "patterns": where["m"]}
    assert critical_distance(where["n"], where["d"], **options).item() == case["value"]
    read_out = read_statistics(where["n"], where["d"], **options)
    assert read_out.snr[0].item() == pytest.approx(case["snr_at_0"], rel=1e-9)
    for dv, expected in case["new_distance_at"].items():
        actual = read_out.distance[int(dv)].item()
        # Recorded as n (1 - Phi) of ratios that agree to 1e-13: far tails magnify that.
        assert actual == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("variance", ["midpoint", "moments"])
def test_critical_distances_of_all_radii_follow_from_exact_counts(variance):
    actual = critical_distance(64, range(65), **LARGE, variance=variance)
    expected = [critical(64, read(64, d, 2**64, 1024, variance)) for d in range(65)]
    assert actual.tolist() == expected


def test_the_distance_from_which_reads_must_end_closer_can_be_set():
    # Without that limit the wrong bits of any read fail at dv = 1.
    options = {"neurons": 1e6, "patterns": 45_000}
    assert critical_distance(1000, 451, **options, first=1).item() == 0
    assert critical_distance(1000, 451, **options).item() == 24
    assert critical_distance(3, 1, neurons=10, patterns=2).item() == 0
    # Of few patterns every query ends closer; a random one is n / 2 away.
    assert critical_distance(64, [15, 16], neurons=2.0**64, patterns=100).tolist() == [30, 32]
    assert critical_distance(64, torch.tensor([[9], [15]]), **LARGE).tolist() == [[18], [30]]


def test_the_older_variance_moves_the_critical_distance():
    radii = torch.arange(400, 496)
    older = critical_distance(1000, radii, **KANERVA, variance="kanerva")
    assert older[451 - 400] == 212
    assert (radii[older == older.max()]).tolist() == [457, 458]


@pytest.mark.parametrize("case", recorded("SNR-optimal"), ids=name)
def test_the_radius_of_the_largest_snr(case):
    where = case["inputs"]
    best = optimal_radius(where["n"], neurons=number(where["r"]), patterns=where["m"])
    assert best.radius == case["value"]["d"]
    assert best.ties == (best.radius,)
    assert best.fraction == pytest.approx(case["value"]["p"], rel=case["rtol"])


def test_no_other_share_has_a_larger_snr_or_capacity():
    p, r, m = optimal_radius(64, neurons=1e8, patterns=50).fraction, 1e8, 50

    def snr(p: float) -> float:
        return p * r / (1 + p * m + p**3 * m * r)

    best = optimal_radius(64, neurons=1e8, patterns=50)
    assert best.value == pytest.approx(math.sqrt(snr(p)), rel=1e-12)
    memory = optimal_radius(64, neurons=1e8, objective="memory")
    z = 2.298313131383402

    def fit(p: float) -> float:
        return ((p * r / z) ** 2 - p * r) / (p**2 * r + (p**2 * r) ** 2) + 1

    assert memory.capacity == memory.value == pytest.approx(fit(memory.fraction), rel=1e-12)
    for k in range(-50, 51):
        assert snr(p * 1.05**k) <= snr(p) * (1 + 1e-12)
        assert fit(memory.fraction * 1.05**k) <= memory.value * (1 + 1e-12)


@pytest.mark.parametrize("case", recorded("memory-capacity"), ids=name)
def test_the_radius_of_the_largest_memory(case):
    where, value = case["inputs"], case["value"]
    best = optimal_radius(
        where["n"],
        neurons=number(where["r"]),
        objective="memory",
        retrieval_probability=where["P_whole_pattern"],
    )
    assert best.radius == value["d"]
    assert best.fraction == pytest.approx(value["p"], rel=case["rtol"])
    assert best.capacity == pytest.approx(value["capacity_m"], rel=case["rtol"])


def test_the_memory_of_astronomically_many_neurons_does_not_overflow():
    # The authors' closed form overflows at 2**128.
    best = optimal_radius(256, neurons=2**256, objective="memory")
    assert 0 < best.fraction < 1
    assert best.capacity > 1


@pytest.mark.parametrize(
    ("n", "options", "cases"), [(64, LARGE, "dstar_cd_n64"), (1000, KANERVA, "dstar_cd_n1000")]
)
def test_the_radius_of_the_largest_critical_distance_with_its_ties(n, options, cases):
    (case,) = recorded(cases)
    best = optimal_radius(n, **options, objective="critical_distance")
    assert best.radius == case["value"]
    assert (best.ties, best.value) == {64: ((15, 16, 17), 30.0), 1000: ((448, 449), 176.0)}[n]
    assert best.fraction == pytest.approx(space_fraction(n, best.radius).item())


@pytest.mark.parametrize(("n", "options", "radius"), [(64, LARGE, 8), (1000, KANERVA, 446)])
def test_exact_moments_move_the_radius_of_the_largest_snr(n, options, radius):
    best = optimal_radius(n, **options, exact_moments=True)
    assert best.radius == radius
    assert best.value == pytest.approx(
        read_statistics(n, radius, **options, variance="moments").snr[0].item()
    )


def test_exact_moments_of_the_memory_are_those_at_every_radius():
    best = optimal_radius(30, neurons=10**6, objective="memory", exact_moments=True)
    wrong = 1 - 0.5 ** (1 / 30)
    z = -float(torch.special.ndtri(torch.tensor(wrong, dtype=torch.float64)))
    fits = []
    for d in range(31):
        share = [Fraction(shared(30, d, dv), 2**30) for dv in range(31)]
        odds = [Fraction(count, 2**30) for count in row(30)]
        noise = sum(a * (10**6 * b + 10**12 * b * b) for a, b in zip(odds, share, strict=True))
        signal = float(10**6 * share[0])
        fits.append((signal**2 / z**2 - signal) / float(noise) + 1 if signal >= z * z else 0.0)
    assert best.capacity == pytest.approx(max(fits), rel=1e-9)
    assert best.radius == fits.index(max(fits))


def test_the_tail_of_random_overlaps_is_heavy_at_64_bits():
    odds = [Fraction(count, 2**64) for count in row(64)]
    share = [Fraction(shared(64, 8, dv), 2**64) for dv in range(65)]
    first = sum(a * b for a, b in zip(odds, share, strict=True))
    second = sum(a * b * b for a, b in zip(odds, share, strict=True))
    assert float(second / first**2) == pytest.approx(6.7e5, rel=0.01)


def test_results_are_frozen():
    for thing, field in (
        (optimal_radius(64, **LARGE), "radius"),
        (read_statistics(8, 2, **LARGE), "log_signal"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, 1)


BAD = [
    (lambda: read_statistics(64, 65, **LARGE), "d must be a whole number"),
    (
        lambda: read_statistics(64, 11, neurons=0, patterns=3),
        "neurons must be a finite number above 0, got 0",
    ),
    (
        lambda: read_statistics(64, 11, neurons=9, patterns=0.5),
        "patterns must be a finite number of at least 1",
    ),
    (lambda: read_statistics(64, 11, neurons=9, patterns="x"), "patterns must be a finite number"),
    (lambda: read_statistics(64, 11, **LARGE, variance="moment"), "Did you mean 'moments'"),
    (lambda: read_statistics(64, 11, **LARGE, design="jaekel"), "Did you mean 'jaeckel'"),
    (lambda: read_statistics(64, 11, **LARGE, design="jaeckel", variance="kanerva"), "use 'moments'"),
    (lambda: critical_distance(64, -1, **LARGE), "d must be a whole number"),
    (
        lambda: critical_distance(64, 11, **LARGE, first=0),
        "first must be a whole number of at least 1, got 0",
    ),
    (lambda: optimal_radius(0, **LARGE), "n must be a whole number"),
    (lambda: optimal_radius(64, neurons=9), 'patterns is needed for objective="snr"'),
    (lambda: optimal_radius(64, neurons=9, objective="critical_distance"), "patterns is needed"),
    (lambda: optimal_radius(64, **LARGE, objective="memory"), "patterns must be left out"),
    (lambda: optimal_radius(64, **LARGE, objective="snrr"), "Did you mean 'snr'"),
    (lambda: optimal_radius(64, **LARGE, exact_moments=1), "exact_moments must be True or False, got 1"),
    (lambda: optimal_radius(64, neurons=0.1, patterns=1), "2 neurons patterns must exceed 1"),
    (lambda: optimal_radius(64, neurons=1, objective="memory"), "neurons must be more than"),
    (
        lambda: optimal_radius(64, neurons=1, objective="memory", exact_moments=True),
        "neurons must be more than",
    ),
    (
        lambda: optimal_radius(64, neurons=1e9, objective="memory", retrieval_probability=1.0),
        "between 0 and 1",
    ),
    (lambda: optimal_radius(2, neurons=1e9, objective="memory", retrieval_probability=0.2), "must exceed 2"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_one_line_that_says_what_is_allowed(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
