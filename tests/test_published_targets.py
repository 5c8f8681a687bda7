"""What papers promise: exact recall in one step by LSR and under a margin, and how many patterns a query keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import F64, normal
from references import exactly
from torch import Tensor
from torch.testing import assert_close

from hopdeq_lwpf import retrieve
from hopdeq_lwpf.data import load_digits
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.separation import LSR

ENTMAX = {"entmax15": 1.5, "sparsemax": 2.0}  # name and alpha


def distances(patterns: Tensor) -> Tensor:
    """(..., N, N), exact also where they are small, 1e9 on the diagonal."""
    far = torch.cdist(patterns, patterns, compute_mode="donot_use_mm_for_euclid_dist")
    return far + torch.eye(patterns.shape[-2], dtype=F64) * 1e9


def stores(count: int, patterns: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(count, patterns, width) at random, the least distance r of each store (count,), its pair (count, 2)."""
    made = normal(count, patterns, width, seed=seed)
    least, place = distances(made).flatten(1).min(-1)
    return made, least, torch.stack([place // patterns, place % patterns], -1)


def within(patterns: Tensor, reach: Tensor, seed: int) -> Tensor:
    """One query a pattern at a random distance below `reach` in a random direction."""
    direction = normal(*patterns.shape, seed=seed)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    share = torch.rand(*patterns.shape[:-1], 1, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return patterns + share * reach[:, None, None] * direction


# --- LSR: exact recall in one step (Hoover et al. 2025, theorem 1)
# r is the least distance of two patterns and beta = 2 / (r - Delta)^2, so that the reach of a pattern is r - Delta.
# A query within Delta of its pattern is out of reach of all others; it is within reach of its own if Delta < r/2.


@pytest.mark.parametrize("share", [0.02, 0.25, 0.49])
def test_lsr_recalls_exactly_in_one_step_in_a_thousand_stores(share):
    patterns, least, _ = stores(1000, 8, 5)
    delta = share * least
    query = within(patterns, delta, seed=3)
    beta = (2 / (least - delta) ** 2)[:, None]
    recall = retrieve(query, patterns, beta=beta, separation=LSR(), steps=1)
    exactly(recall.value, patterns)
    exactly(recall.index, torch.arange(8).expand(1000, 8))
    exactly(recall.support, torch.ones(1000, 8, dtype=torch.int64))
    # Softmax at the same beta does so only where all other weights are below the rounding of float64.
    assert (retrieve(query, patterns, beta=beta, steps=1).value == patterns).all(-1).double().mean() < 0.2


@given(
    count=st.integers(2, 40),
    width=st.integers(1, 20),
    share=st.floats(0.001, 0.499),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60)
def test_lsr_recalls_exactly_in_one_step(count, width, share, scale, seed):
    patterns, least, pair = stores(1, count, width, seed)
    patterns, least = scale * patterns, scale * least
    query = within(patterns, share * least, seed + 1)[0]
    # The hardest query: as near to the nearest other pattern as it may be, up to rounding.
    a, b = patterns[0, pair[0, 0]], patterns[0, pair[0, 1]]
    query[pair[0, 0]] = a + (1 - 1e-6) * share * (b - a)
    beta = float(2 / (least * (1 - share)) ** 2)
    exactly(retrieve(query, patterns[0], beta=beta, separation=LSR(), steps=1).value, patterns[0])


def test_a_smaller_beta_does_not_recall_exactly():
    patterns, least, pair = stores(1000, 8, 5)
    delta = 0.4 * least
    a, b = (patterns[torch.arange(1000), pair[:, i]] for i in range(2))
    query = (a + 0.4 * (1 - 1e-6) * (b - a))[:, None]
    for factor, exact in ((1.0, True), (0.99, False)):
        beta = (factor * 2 / (least - delta) ** 2)[:, None]
        recall = retrieve(query, patterns, beta=beta, separation=LSR(), steps=1)
        hits = (recall.value == a[:, None]).all(-1)
        assert bool(hits.all()) if exact else not bool(hits.any())
        assert ((recall.support == 1) == exact).all()


def test_beyond_half_the_distance_a_query_is_out_of_every_reach():
    # Delta = .7 r: beta = 2 / (.3 r)^2, and a query at .5 r is further than .3 r from all. It stays.
    patterns = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=F64)
    query = torch.tensor([[0.5, 0.0], [0.29, 0.0]], dtype=F64)
    recall = retrieve(query, patterns, beta=2 / 0.3**2, separation=LSR(), steps=1)
    assert recall.index.tolist() == [-1, 0]
    exactly(recall.state, torch.stack([query[0], patterns[0]]))


# --- entmax: exact recall under a margin
# p = entmax_alpha(s) is one-hot at i if and only if s_i - s_j >= 1/(alpha - 1) for all j: on its support p is
# ((alpha - 1) s - tau)^(1/(alpha - 1)), hence tau = (alpha - 1) s_i - 1 for p_i = 1, and p_j = 0 needs
# (alpha - 1) s_j <= tau. With s = beta X z that is a margin of 1/((alpha - 1) beta) of the products.


def margins(query: Tensor, patterns: Tensor) -> Tensor:
    """By how much the product of query i with pattern i leads: (N,)."""
    products = query @ patterns.T
    own = products.diagonal()
    return own - (products - torch.eye(len(products), dtype=F64) * 1e9).amax(-1)


@pytest.mark.parametrize("separation", ENTMAX)
@given(seed=st.integers(0, 10_000), beta=st.sampled_from([0.1, 0.5, 2.0]), noise=st.sampled_from([0.0, 0.3]))
@settings(max_examples=40)
def test_a_pattern_is_recalled_exactly_if_and_only_if_its_margin_is_large_enough(
    separation, seed, beta, noise
):
    patterns = normal(12, 10, seed=seed)
    query = patterns + noise * normal(12, 10, seed=seed + 1)
    needed = 1 / ((ENTMAX[separation] - 1) * beta)
    margin = margins(query, patterns)
    clear = (margin - needed).abs() > 1e-6
    recall = retrieve(query, patterns, beta=beta, separation=separation, steps=1)
    exact = (recall.index == torch.arange(12)) & (recall.support == 1)
    exactly(exact[clear], margin[clear] > needed)
    assert_close(recall.value[exact], patterns[exact], rtol=0, atol=1e-14)


@pytest.mark.parametrize("separation", ENTMAX)
def test_patterns_with_a_margin_are_recalled_from_all_around(separation):
    # |q - xi| <= e changes a difference of two products by at most e |xi_i - xi_j|.
    patterns, beta = normal(30, 20, seed=5), 2.0
    needed = 1 / ((ENTMAX[separation] - 1) * beta)
    products = patterns @ patterns.T
    lead = products.diagonal()[:, None] - products
    lead = lead.fill_diagonal_(1e18)
    reach = ((lead - needed) / distances(patterns)).amin(-1)
    assert (reach > 0).sum() > 20
    held = reach > 0
    direction = normal(30, 20, seed=6)
    query = patterns + 0.999 * reach[:, None] * direction / direction.norm(dim=-1, keepdim=True)
    recall = retrieve(query[held], patterns, beta=beta, separation=separation).require()
    assert_close(recall.value, patterns[held], rtol=0, atol=1e-14)
    assert (recall.steps <= 1).all()


# --- how many patterns a query ends up among (Santos et al. 2024, MNIST; here the digits)


def sizes(separation: str, beta: float) -> Tensor:
    """Patterns with a weight above 1e-2 at the last of 128 updates, of digits that are not stored."""
    images, _ = load_digits()
    images = images / images.max() * 2 - 1
    patterns, query = images[:500], images[1500:1560]
    state = retrieve(query, patterns, beta=beta, separation=separation, steps=127).state
    f = Retrieval(beta, separation=separation)
    return (f.weights(state, f.prepare(query, patterns)) > 1e-2).sum(-1).double()


def test_sparser_separations_end_among_fewer_patterns():
    softmax, entmax, sparsemax = (sizes(name, 0.5) for name in ("softmax", "entmax15", "sparsemax"))
    # Means of 20, 2.3 and 1.2 patterns; none, .40 and .83 of the queries end at a single one.
    assert float(softmax.mean()) > 10 > 4 > float(entmax.mean()) > 1.5 > float(sparsemax.mean()) >= 1
    alone = [float((count == 1).double().mean()) for count in (softmax, entmax, sparsemax)]
    assert alone[0] < 0.1
    assert alone[0] + 0.2 < alone[1] < alone[2] - 0.2
    for name in ("softmax", "entmax15", "sparsemax"):
        exactly(sizes(name, 30.0), torch.ones(60, dtype=F64))


def test_the_study_counts_what_retrieve_counts():
    published = pytest.importorskip("benchmarks.published")
    images, _ = load_digits()
    images = images.double() / images.max() * 2 - 1
    patterns, query = images[:300], images[300:320]
    f = Retrieval(0.5, separation="sparsemax")
    weights, updates = published.last_weights(f, patterns, query, updates=20)
    recall = retrieve(query, patterns, beta=0.5, separation="sparsemax", steps=20)
    exactly((weights > 0).sum(-1), recall.support)
    assert_close(weights @ patterns, recall.value, rtol=0, atol=1e-6)
    # Settled within 20 updates, and one more that shows it.
    assert ((updates >= 1) & (updates <= 20)).all()
    exactly(published.last_weights(f, patterns, query, updates=1)[1], torch.ones(20, dtype=torch.int64))
    counts, _ = published.support_sizes("sparsemax", 0.5, patterns, query)
    exactly(counts, retrieve(query, patterns, beta=0.5, separation="sparsemax", steps=128).support)
    solved, evaluations = published.support_sizes("sparsemax", 0.5, patterns, query, solved=True)
    exactly(solved, counts)
    assert (evaluations >= 1).all()


def test_the_study_reads_images_and_labels(tmp_path):
    published = pytest.importorskip("benchmarks.published")
    for part, count in (("train", 3), ("t10k", 2)):
        pixels = bytes([0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes([255, 0] * 392) * count
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(pixels)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1, 0, 0, 0, count, *range(count)])
        )
    both = published.Digits.load(tmp_path, "t10k").both()
    assert both.shape == (2, 794)
    exactly(both[1, :2], torch.tensor([1.0, -1.0]))
    exactly(both[:, 784:], torch.eye(10)[:2])
    names = [reading.name for reading in published.readings(tmp_path, 2, 1)]
    assert len(set(names)) == len(names) == 7
    with pytest.raises(SystemExit, match="--mnist FOLDER"):
        published.run(None)
