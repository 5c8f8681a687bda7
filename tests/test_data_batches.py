"""Padding, the order of training, and taking it up again; seeded draws and folds."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, DistributedSampler

from hopdeq_lwpf.data import BagSet, EpochSampler, ResumableLoader, collate_bags
from hopdeq_lwpf.data.draws import draw_targets, split_folds, stream


def item(size, index=0, width=2, known=True):
    data = torch.arange(1.0, size * width + 1).reshape(size, width) + 100 * index
    made = {"data": data, "target": float(index % 2), "index": index}
    return made | {"instance_target": torch.arange(size) % 2 == 0} if known else made


# --- padding


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_padding_brings_back_each_bag_and_nothing_else(sizes):
    items = [item(size, index) for index, size in enumerate(sizes)]
    batch = collate_bags(items)
    assert batch["data"].shape == (len(sizes), max(sizes), 2)
    for row, one in enumerate(items):
        there = ~batch["mask"][row]
        assert there.tolist() == [place < sizes[row] for place in range(max(sizes))]
        assert torch.equal(batch["data"][row][there], one["data"])
        assert torch.equal(batch["instance_target"][row][there], one["instance_target"])
        assert not bool(batch["data"][row][~there].any())
        assert not bool(batch["instance_target"][row][~there].any())
    assert batch["target"].tolist() == [one["target"] for one in items]
    assert batch["index"].tolist() == list(range(len(sizes)))


def test_instance_targets_are_left_out_unless_all_bags_have_them():
    assert "instance_target" not in collate_bags([item(2), item(3, 1, known=False)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8])
def test_padding_keeps_the_dtype(dtype):
    bags = [{"data": torch.ones(n, 3, dtype=dtype), "target": 1.0, "index": 0} for n in (1, 2)]
    assert collate_bags(bags)["data"].dtype == dtype


def test_a_nan_stays_in_its_bag():
    bags = [item(2), item(3, 1)]
    bags[1]["data"][0, 0] = float("nan")
    assert collate_bags(bags)["data"].isnan().any(-1).any(-1).tolist() == [False, True]


def test_batches_that_cannot_be_made_are_named():
    with pytest.raises(ValueError, match="at least one bag, got none"):
        collate_bags([])
    with pytest.raises(ValueError, match=r"one shape, got \[\(2,\), \(3,\)\]"):
        collate_bags([item(2), item(2, width=3)])


# --- the order


class Numbers(Dataset):
    """Numbers that remember the epoch they were told."""

    def __init__(self, size):
        self.size, self.epochs, self.epoch = size, [], None

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index, self.epoch

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.epochs.append(epoch)


def take(rows):
    return [row for row, _ in rows]


def make(size=23, batch=4, **options):
    return ResumableLoader.of(Numbers(size), batch_size=batch, collate=take, **options)


def test_an_epoch_holds_every_row_once_in_an_order_of_its_own():
    loader = make(seed=7)
    passes = [[row for batch in loader for row in batch] for _ in range(3)]
    assert all(sorted(rows) == list(range(23)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) == 3
    assert loader.dataset.epochs == [0, 1, 2]
    assert len(loader) == 6
    loader.set_epoch(1)
    assert [row for batch in loader for row in batch] == passes[1]
    assert passes[0] == stream(7, 0).permutation(23).tolist()


def test_seed_and_epoch_do_not_stand_in_for_each_other():
    # A sum of both, as torch's own sampler has it, would give seed 1, epoch 0 the order of seed 0, epoch 1.
    first, second = make(seed=1), make(seed=0)
    second.set_epoch(1)
    assert list(first) != list(second)


def test_nothing_is_drawn_from_the_global_generator():
    before = torch.get_rng_state()
    assert len(list(make())) == 6
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(1, 30), st.integers(1, 7), st.data())
def test_an_interrupted_training_goes_on_with_the_next_batch(size, batch, draw):
    whole = make(size, batch, seed=3)
    expected = [rows for _ in range(3) for rows in whole]
    handed_out = draw.draw(st.integers(0, len(expected)))
    first, seen = make(size, batch, seed=3), []
    while len(seen) < handed_out:
        for rows in first:
            seen.append(rows)
            if len(seen) == handed_out:
                break
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = make(size, batch, seed=3)
    second.load_state_dict(state)
    assert second.state_dict() == state
    while len(seen) < len(expected):
        seen.extend(second)
    assert seen == expected


def test_a_broken_off_pass_starts_again_unless_a_state_was_loaded():
    loader = make()
    first = next(iter(loader))
    assert next(iter(loader)) == first
    state = loader.state_dict()
    assert (state["epoch"], state["batch"]) == (0, 1)
    loader.load_state_dict(state)
    rest = list(loader)
    assert len(rest) == 5
    assert first not in rest
    loader.load_state_dict(state)
    loader.set_epoch(4)  # another epoch: from its start
    assert len(list(loader)) == 6


def test_states_of_other_settings_are_refused():
    state = make(seed=1).state_dict()
    with pytest.raises(ValueError, match="saved with seed 1, but the loader has 2.*use the same seed"):
        make(seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with samples 23, but the loader has 22"):
        make(22, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with batch_size 4, but the loader has 5"):
        make(batch=5, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with seed None"):
        make().load_state_dict({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch_size must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_every_bad_setting_of_the_loader_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_loader_without_an_epoch_sampler_says_what_to_do():
    with pytest.raises(TypeError, match=r"got SequentialSampler; use ResumableLoader\.of"):
        list(ResumableLoader(Numbers(3)))


def test_workers_see_the_epoch_and_keep_the_order():
    alone, shared = make(seed=5), make(seed=5, workers=2)
    shared.set_epoch(2)
    alone.set_epoch(2)
    shared.collate_fn = alone.collate_fn = list
    batches = list(shared)
    assert batches == list(alone)
    assert {epoch for batch in batches for _, epoch in batch} == {2}


@pytest.mark.parametrize(("size", "replicas"), [(12, 3), (13, 3), (2, 5), (0, 2)])
def test_processes_share_the_rows(size, replicas):
    samplers = [EpochSampler(Numbers(size), seed=1, replicas=replicas, rank=rank) for rank in range(replicas)]
    assert isinstance(samplers[0], DistributedSampler)  # so that Lightning does not wrap it
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])} == {-(-size // replicas)}
    counts = Counter(row for share in shares for row in share)
    assert set(counts) == set(range(size))
    assert not counts or max(counts.values()) - min(counts.values()) <= 1
    order = stream(1, 0).permutation(size).tolist()
    assert [share[0] for share in shares if share][: min(size, replicas)] == order[:replicas]


def test_bags_go_through_the_loader():
    bags = BagSet(torch.eye(4), torch.arange(4), [1, 3], torch.tensor([0, 1]))
    (batch,) = ResumableLoader.of(bags)
    assert batch["data"].shape == (2, 3, 4)
    assert sorted((~batch["mask"]).sum(-1).tolist()) == [1, 3]


# --- draws


def test_streams_are_those_of_the_first_release():
    # Numpy promises these for ever; data sets of published seeds rest on it.
    assert stream(0).randint(1000, size=4).tolist() == PINNED[0]
    assert stream(1, 2, 3).permutation(6).tolist() == PINNED[1]
    assert stream(0).random_sample() != stream(0, 0, 1).random_sample()


PINNED = ([660, 281, 46, 450], [0, 3, 1, 5, 2, 4])


@given(st.integers(1, 50), st.floats(0.001, 0.999), st.integers(0, 2**32 - 1))
def test_the_share_of_positive_bags_is_exact(bags, share, seed):
    targets = draw_targets(bags, share, seed)
    assert targets.dtype == bool
    assert targets.sum() == sum(1 for place in range(bags) if place < share * bags)


def test_positive_bags_are_anywhere():
    drawn = np.stack([draw_targets(10, 0.3, seed) for seed in range(1000)])
    # 1000 draws with probability .3 each: 5 standard deviations.
    assert abs(drawn.sum(0) - 300).max() < 5 * (1000 * 0.3 * 0.7) ** 0.5


@given(st.lists(st.integers(0, 2), min_size=2, max_size=60), st.integers(2, 8), st.integers(0, 99))
def test_folds_are_even_in_size_and_classes(classes, folds, seed):
    if len(classes) < folds:
        with pytest.raises(ValueError, match=f"folds is {folds}, but there are only {len(classes)} bags"):
            split_folds(classes, folds, seed)
        return
    parts = split_folds(classes, folds, seed)
    assert len(parts) == folds
    assert sorted(row for part in parts for row in part) == list(range(len(classes)))
    for kind in (None, 0, 1, 2):
        counts = [sum(kind is None or classes[row] == kind for row in part) for part in parts]
        assert max(counts) - min(counts) <= 1
    assert parts == split_folds(classes, folds, seed)


def test_folds_depend_on_the_seed():
    assert split_folds([0, 1] * 20, 4, 0) != split_folds([0, 1] * 20, 4, 1)
