"""RepertoireClassifier: against a slow twin, padding, the reduction, counts, bad input, memory."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import exactly
from test_sequence_embedding import embed_slowly
from torch.testing import assert_close

from hopdeq_lwpf import Termination
from hopdeq_lwpf.data import collate_repertoires
from hopdeq_lwpf.forgetting import PFU, ReLU
from hopdeq_lwpf.models import RepertoireClassifier
from hopdeq_lwpf.models.sequence_bags import top_rows, unpack

F64 = torch.float64
TIGHT = Termination(rtol=1e-13, atol=1e-14, max_steps=3000)
UNITS = [None, ReLU(min_keep=1), PFU(), "topk"]
# Weights are sums of some hundred products in float64, which other shapes order otherwise.
ROUNDING = {"rtol": 1e-10, "atol": 1e-11}


def made(**options):
    """A small classifier in float64 with a tight solve, whose logits are of order one."""
    sizes = {"kernels": 5, "kernel_size": 3, "attention_width": 4, "stop": TIGHT}
    model = RepertoireClassifier(**{**sizes, **options}).double()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    return model


def bags(sizes=(4, 7, 1), seed=0, longest=8):
    """A batch as `collate_repertoires` makes it, with counts of 1 to 4."""
    draw = torch.Generator().manual_seed(seed)
    items = []
    for index, size in enumerate(sizes):
        lengths = torch.randint(2, longest + 1, (size,), generator=draw)
        data = torch.randint(0, 20, (size, longest), generator=draw).to(torch.int8)
        data[torch.arange(longest) >= lengths[:, None]] = -1
        counts = torch.randint(1, 5, (size,), generator=draw)
        items.append({"data": data, "lengths": lengths, "counts": counts, "target": 0.0, "index": index})
    batch = collate_repertoires(items)
    return {name: batch[name] for name in ("data", "mask", "lengths", "counts")}


def only(batch, bag):
    """One bag of a batch, without padding."""
    kept = ~batch["mask"][bag]
    parts = {name: batch[name][bag][kept][None] for name in ("data", "lengths", "counts")}
    longest = int(parts["lengths"].max()) if kept.any() else 0
    return {**parts, "data": parts["data"][:, :, :longest], "mask": ~kept[kept][None]}


def classify_slowly(model, batch, bag):
    """One softmax over one bag in plain Python: DeepRC's network f, attention, weighted sum, linear."""
    parts = only(batch, bag)
    rows = [[code for code in row if code >= 0] for row in parts["data"][0].tolist()]
    weight, bias = model.embedding.weight.tolist(), model.embedding.bias.tolist()
    embeddings = [embed_slowly(row, weight, bias) for row in rows]
    query = model.hopfield.pooling_weights[0].tolist()
    scores = []
    for embedding in embeddings:
        key = embedding
        for layer in model.attention.layers:
            sums = [
                shift + sum(w * x for w, x in zip(row, key, strict=True))
                for row, shift in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            ]
            key = [1.0507009873554805 * (s if s > 0 else 1.6732632423543772 * math.expm1(s)) for s in sums]
        scores.append(sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(len(query)))
    total = sum(math.exp(score) for score in scores)
    weights = [math.exp(score) / total for score in scores]
    pooled = [
        sum(w * e[column] for w, e in zip(weights, embeddings, strict=True))
        for column in range(len(embeddings[0]))
    ]
    row, shift = model.head.weight[0].tolist(), model.head.bias[0].item()
    return shift + sum(w * x for w, x in zip(row, pooled, strict=True)), weights


def test_one_step_is_deeprc_in_plain_python():
    model, batch = made(), bags()
    logits = model(**batch)
    assert logits.shape == (3,)
    for bag in range(3):
        want, weights = classify_slowly(model, batch, bag)
        assert_close(logits[bag].item(), want, **ROUNDING)
        got = model.association_matrix[bag, 0, 0][~batch["mask"][bag]]
        assert_close(got, torch.tensor(weights, dtype=F64), **ROUNDING)


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("options", [{}, {"reduction": 0.5}, {"num_heads": 2}], ids=str)
def test_a_batch_is_its_bags_one_by_one(unit, steps, options):
    model = made(steps=steps, forgetting=unit, counts="weight", **options)
    batch = bags((4, 7, 1, 12))
    logits = model(**batch)
    places = model.association_matrix
    assert places.shape == (4, options.get("num_heads", 1), 1, 12)
    assert not places.masked_select(batch["mask"][:, None, None]).any()
    for bag in range(4):
        parts = only(batch, bag)
        assert_close(model(**parts), logits[bag : bag + 1], **ROUNDING)
        size = parts["data"].shape[1]
        assert_close(model.association_matrix[0], places[bag, ..., :size], **ROUNDING)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 4), st.integers(0, 3))
def test_more_padding_changes_nothing(sizes, columns, letters):
    model, batch = made(reduction=0.4, counts="weight"), bags(sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # empty bags are reported
        want = model(**batch)
        more = {
            "data": torch.nn.functional.pad(batch["data"], (0, letters, 0, columns), value=-1),
            "mask": torch.nn.functional.pad(batch["mask"], (0, columns), value=True),
            "counts": torch.nn.functional.pad(batch["counts"], (0, columns)),
        }
        assert_close(model(**more), want, **ROUNDING)


def test_what_is_masked_may_be_anything():
    model, batch = made(counts="weight"), bags()
    want = model(**batch)
    spoilt = {name: part.clone() for name, part in batch.items()}
    spoilt["data"][batch["mask"]] = 99
    spoilt["lengths"][batch["mask"]] = -3
    spoilt["counts"][batch["mask"]] = -7
    exactly(model(**spoilt), want)


def test_nan_in_one_bag_harms_no_other():
    model, batch = made(counts="input", reduction=0.5), bags()
    want = model(**batch)
    counts = batch["counts"].double()
    counts[1, 2] = math.inf
    got = model(**{**batch, "counts": counts})
    assert not got[1].isfinite()
    assert_close(got[[0, 2]], want[[0, 2]], **ROUNDING)


# --- the reduction


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 1.0]),
    st.integers(1, 3),
    st.data(),
)
def test_the_highest_scores_of_each_bag_are_kept(sizes, fraction, least, data):
    batch = bags(sizes)
    parts = unpack(batch["data"], batch["mask"])
    few = data.draw(st.lists(st.integers(-2, 2), min_size=sum(sizes), max_size=sum(sizes)))
    want, start = [], 0
    for size in sizes:
        wanted = min(size, max(least, math.ceil(round(fraction * 100) * size / 100)))
        rows = sorted(range(start, start + size), key=lambda row: (-few[row], row))
        want += sorted(rows[:wanted])
        start += size
    rows = top_rows(parts, torch.tensor(few, dtype=F64), fraction, least)
    assert rows.tolist() == want
    kept = parts.take(rows)
    assert kept.places.tolist() == parts.places[rows].tolist()
    assert int(kept.sizes.sum()) == len(want)


def test_a_tenth_of_thirty_is_three():
    parts = unpack(bags((30, 10, 9, 1))["data"], bags((30, 10, 9, 1))["mask"])
    kept = parts.take(top_rows(parts, torch.zeros(50), 0.1))
    assert kept.sizes.tolist() == [3, 1, 1, 1]


@pytest.mark.parametrize("unit", [None, "relu", "pfu"])
@pytest.mark.parametrize("options", [{}, {"num_heads": 2, "quantity": 3}], ids=str)
def test_the_reduced_bag_is_the_bag_of_the_highest_scores(unit, options):
    torch.manual_seed(1)  # no head is dead at the start
    model = made(forgetting=unit, dropout=0.5, **options).train()
    batch = bags((9,))
    model(**batch)
    core = model.hopfield.hopfield
    last = core.last_association
    scores = core.f._scores(last.heads.q, core.f.lay_out(last.heads)).amax(0)
    rows = scores.topk(5).indices.sort().values
    reduced = made(forgetting=unit, dropout=0.5, reduction=0.5, **options)
    reduced.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    got = reduced(**batch)
    torch.manual_seed(1)
    exactly(got, model(batch["data"][:, rows], batch["mask"][:, rows]))
    places = reduced.association_matrix
    exactly(places[..., rows], model.association_matrix)
    assert not places.index_fill(-1, rows, 0.0).any()


def test_only_the_kept_sequences_get_a_gradient():
    model, batch = made(reduction=0.3), bags((10,))
    whole = made(reduction=None)
    whole.load_state_dict(model.state_dict())
    model(**batch).sum().backward()
    kept = model.association_matrix[0, 0, 0] > 0
    assert int(kept.sum()) == 3
    whole(batch["data"][:, kept]).sum().backward()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, **ROUNDING)


def test_small_chunks_and_no_gradient_change_nothing():
    batch = bags((9, 4, 11))
    want = made(reduction=0.4, counts="input")
    value = want(**batch)
    for chunk in (1, 5, 24):
        small = made(reduction=0.4, counts="input", chunk=chunk)
        small.load_state_dict(want.state_dict())
        assert_close(small(**batch), value, **ROUNDING)
        with torch.no_grad():
            assert_close(small(**batch), value.detach(), **ROUNDING)


def test_a_long_bag_runs_in_bounded_memory(monkeypatch):
    model = RepertoireClassifier(reduction=0.01, chunk=500)
    sizes = []
    embed = model.embedding.embed

    def watched(codes, lengths):
        sizes.append(len(codes))
        return embed(codes, lengths)

    monkeypatch.setattr(model.embedding, "embed", watched)
    model(torch.randint(0, 20, (1, 20_000, 12), dtype=torch.int8)).sum().backward()
    assert sizes == [500] * 40 + [200]
    sizes.clear()
    plain = RepertoireClassifier(chunk=500)
    monkeypatch.setattr(plain.embedding, "embed", watched)
    with torch.no_grad():
        plain(torch.randint(0, 20, (1, 1_200, 12), dtype=torch.int8))
    assert sizes == [500, 500, 200]


# --- counts


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("options", [{}, {"num_heads": 2}, {"quantity": 2, "separation": "softmax"}], ids=str)
def test_a_count_equals_so_many_copies(steps, options):
    model, batch = made(counts="weight", steps=steps, **options), bags((6, 3))
    batch["counts"][0, 4] = 0
    want = []
    for bag in range(2):
        parts = only(batch, bag)
        copies = parts["data"][0].repeat_interleave(parts["counts"][0], 0)[None]
        want.append(model(copies, counts=torch.ones(copies.shape[:2])))
    assert_close(model(**batch), torch.cat(want), **ROUNDING)
    assert not model.association_matrix[0, ..., 4].any()


def test_counts_as_an_input_are_one_more_feature():
    model, batch = made(counts="input"), bags()
    seen = []
    model.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    counts = batch["counts"].clone()
    counts[0, 0] = 0
    model(**{**batch, "counts": counts})
    here = ~batch["mask"]
    want = [math.log(max(count, 1)) for count in counts[here].tolist()]
    assert_close(seen[0][:, -1], torch.tensor(want, dtype=F64), rtol=1e-14, atol=0)
    assert model.head.in_features == 6
    model(**batch).sum().backward()
    assert model.attention.layers[0].weight.grad[:, -1].any()


def test_counts_that_were_not_asked_for_are_not_looked_at():
    model, batch = made(), bags()
    exactly(model(**{**batch, "counts": -batch["counts"]}), model(**{**batch, "counts": None}))


# --- what is empty


def test_empty_bags_read_out_zero_and_are_reported():
    for options in ({}, {"reduction": 0.1}, {"counts": "weight"}):
        model, batch = made(**options), bags((3, 0, 2))
        with pytest.warns(UserWarning, match="1 of 3 states have every stored pattern masked"):
            logits = model(**batch)
        exactly(logits[1], model.head.bias[0])
        assert "1 of 3" in model.last_solution.note
        logits.sum().backward()
        assert all(part.grad.isfinite().all() for part in model.parameters())


@pytest.mark.parametrize("steps", [1, 2, None])
@pytest.mark.parametrize("options", [{}, {"reduction": 0.1}, {"counts": "weight"}], ids=str)
def test_bags_without_places_and_batches_without_bags(steps, options):
    model = made(steps=steps, **options)
    empty = torch.zeros(2, 0, 0, dtype=torch.int8)
    with pytest.warns(UserWarning, match="2 of 2 states"):
        exactly(model(empty, counts=torch.zeros(2, 0)), model.head.bias.expand(2))
    assert model.association_matrix.shape == (2, 1, 1, 0)
    for width in (0, 3):
        none = torch.zeros(0, width, 5, dtype=torch.int8)
        assert model(none, counts=torch.zeros(0, width)).shape == (0,)
        assert model.association_matrix.shape == (0, 1, 1, width)
