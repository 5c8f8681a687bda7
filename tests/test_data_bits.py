"""Bit-pattern bags and latch sequences: against their definitions, and against hflayers by checksum."""

import dataclasses
import pickle
import subprocess
import sys
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from hopdeq_lwpf.data import BitPatternOptions, BitPatternSet, LatchOptions, LatchSequenceSet, collate_bags


def checksum(tensor):
    return zlib.crc32(tensor.to(torch.uint8).contiguous().numpy().tobytes())


# From hflayers' own generators, run with the same settings under torch 2.13 on the CPU.
HFLAYERS_BITS = {
    (2048, 16, 8): (2945738634, 945621217, 1876107658),
    (50, 7, 20, 3, 0.3, 5, 1, 2): (3801061685, 3249103818, 852420625),
}
HFLAYERS_LATCH = {
    (4096, 32, 20): (1774593414, 1405718187),
    (40, 5, 6, 7): (3902248492, 1689621408),
}


@pytest.mark.parametrize("settings", HFLAYERS_BITS)
def test_the_bags_are_those_of_hflayers_for_the_same_seeds(settings):
    bags = BitPatternSet(*settings)
    assert (checksum(bags.data), checksum(bags.targets), checksum(bags.signals)) == HFLAYERS_BITS[settings]


@pytest.mark.parametrize("settings", HFLAYERS_LATCH)
def test_the_sequences_are_those_of_hflayers_for_the_same_seed(settings):
    sequences = LatchSequenceSet(*settings)
    assert (checksum(sequences.characters), checksum(sequences.targets)) == HFLAYERS_LATCH[settings]


def test_the_defaults_are_those_of_the_notebooks():
    assert dataclasses.astuple(BitPatternOptions())[:6] == (2048, 16, 8, 1, 0.5, 8)
    assert dataclasses.astuple(LatchOptions())[:3] == (4096, 32, 20)


def test_draws_do_not_depend_on_threads_or_on_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = BitPatternSet(num_bags=64), LatchSequenceSet(num_samples=64)
    assert torch.equal(torch.get_rng_state(), before)  # nothing drawn from it
    code = (
        "import torch, zlib; torch.set_num_threads(2); torch.manual_seed(99);"
        "from hopdeq_lwpf.data import BitPatternSet, LatchSequenceSet;"
        "print(zlib.crc32(BitPatternSet(num_bags=64).data.numpy().tobytes()),"
        "zlib.crc32(LatchSequenceSet(num_samples=64).characters.numpy().tobytes()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    expected = (first[0].data, first[1].characters)
    assert done.stdout.split() == [str(zlib.crc32(part.numpy().tobytes())) for part in expected], done.stderr


def recount(bags):
    """For each bag, in plain Python: where its signals stand."""
    signals = {tuple(signal) for signal in bags.signals.tolist()}
    return signals, [[tuple(row) in signals for row in bag] for bag in bags.data.tolist()]


@given(
    st.integers(1, 30),
    st.integers(1, 6),
    st.integers(2, 6),
    st.floats(0.01, 0.99),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.data(),
)
def test_a_bag_is_positive_exactly_where_it_holds_signals(bags, instances, bits, share, seed, bipolar, draw):
    signals = draw.draw(st.integers(1, 2**bits - 2))
    per_bag = draw.draw(st.integers(1, instances))
    made = BitPatternSet(bags, instances, signals, per_bag, share, bits, seed, seed, bipolar)
    low = -1 if bipolar else 0
    found, places = recount(made)
    assert len(found) == signals
    assert (low,) * bits not in found
    assert set(made.data.flatten().tolist()) <= {low, 1}
    assert made.instance_targets.tolist() == places
    assert [sum(row) for row in places] == [per_bag * int(target) for target in made.targets.tolist()]
    assert not bool((made.data == low).all(-1).any())
    # ceil(share bags), at least one, first in order
    positives = sum(1 for place in range(bags) if place < share * bags)
    assert made.targets.tolist() == [1.0] * positives + [0.0] * (bags - positives)


def test_signals_and_other_instances_are_uniform():
    made = BitPatternSet(num_bags=4096)
    values = 2 ** torch.arange(8.0)
    signals = (made.signals @ values).long()
    codes = (made.data @ values).long()
    noise = torch.bincount(codes[~made.instance_targets], minlength=256)
    allowed = torch.ones(256, dtype=torch.bool)
    allowed[signals] = allowed[0] = False
    assert not bool(noise[~allowed].any())

    def chi_square(counts):
        expected = counts.sum() / len(counts)
        return float(((counts - expected) ** 2 / expected).sum())

    # Mean k - 1 and standard deviation sqrt(2 (k - 1)) for k equally likely values; 5 of these is one in 10^6.
    for counts in (noise[allowed], torch.bincount(codes[made.instance_targets], minlength=256)[signals]):
        freedom = len(counts) - 1
        assert chi_square(counts.double()) < freedom + 5 * (2 * freedom) ** 0.5
    places = made.instance_targets.sum(0).double()
    assert chi_square(places) < 15 + 5 * 30**0.5


def test_without_signals_the_label_has_no_evidence():
    control = BitPatternSet(num_bags=40, num_signals_per_bag=0)
    assert not bool(control.instance_targets.any())
    assert not any(any(row) for row in recount(control)[1])
    assert control.targets.sum() == 20


def test_other_data_seeds_keep_the_signals_and_other_signal_seeds_change_them():
    first, second = BitPatternSet(64, seed_data=1), BitPatternSet(64, seed_data=2)
    assert torch.equal(first.signals, second.signals)
    assert not torch.equal(first.data, second.data)
    assert not torch.equal(first.signals, BitPatternSet(64, seed_signals=1).signals)


def test_sets_with_equal_settings_are_equal_and_survive_pickling():
    made = BitPatternSet(num_bags=20)
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert torch.equal(again.data, made.data)
    assert made != BitPatternSet(num_bags=21)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.num_bags = 3


@pytest.mark.parametrize("data", [BitPatternSet(num_bags=20), LatchSequenceSet(num_samples=20)])
def test_items_are_dicts_that_both_collates_take(data):
    assert len(data) == 20
    items = [data[row] for row in (3, -1)]
    assert items[1]["index"] == 19
    ours, torchs = collate_bags(items), default_collate(items)
    assert not bool(ours.pop("mask").any())
    assert ours.keys() == torchs.keys()
    assert all(torch.equal(ours[name], torchs[name]) for name in ours)
    assert ours["data"].dtype == ours["target"].dtype == torch.float32
    assert [len(list(data))] == [20]  # iteration ends: an index beyond the end is an IndexError
    with pytest.raises(IndexError):
        data[20]


def test_the_first_character_decides_and_the_others_are_noise():
    made = LatchSequenceSet(num_samples=3000, num_instances=5, num_characters=7)
    for row in (0, 17, 2999):
        item = made[row]
        assert item["data"].sum(-1).tolist() == [1.0] * 5
        assert item["data"].argmax(-1).tolist() == made.characters[row].tolist()
        assert item["instance_target"].tolist() == [True] + [False] * 4
        assert item["target"] == item["data"][0, 1]  # character 1 is the positive signal
    assert made.characters[:, 1:].min() == 2
    assert made.characters[:, 1:].max() == 6
    assert set(made.characters[:, 0].tolist()) == {0, 1}
    # Binomial shares: 5 standard deviations.
    assert abs(made.targets.mean() - 0.5) < 5 * (0.25 / 3000) ** 0.5
    counts = torch.bincount(made.characters[:, 1:].flatten(), minlength=7)[2:]
    assert (counts - 2400).abs().max() < 5 * (12000 * 0.2 * 0.8) ** 0.5
    # No noise tells the label: the correlation of n independent pairs has a standard deviation of n^-1/2.
    together = torch.stack([made.targets, *made.characters[:, 1:].float().T])
    assert torch.corrcoef(together)[0, 1:].abs().max() < 5 * 3000**-0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_bags": 0}, "num_bags must be at least 1, got 0"),
        ({"num_bags": 2.0}, "num_bags must be a whole number, got 2.0"),
        ({"num_bags": True}, "num_bags must be a whole number, got True"),
        ({"num_instances": -1}, "num_instances must be at least 1"),
        ({"num_signals_per_bag": 17}, "num_signals_per_bag must be from 0 to 16, got 17"),
        ({"num_bits": 1}, "num_bits must be from 2 to 62"),
        ({"num_bits": 3, "num_signals": 7}, "num_signals must be from 1 to 6, got 7"),
        ({"fraction_targets": 1.0}, "fraction_targets must be above 0 and below 1"),
        ({"fraction_targets": float("nan")}, "fraction_targets must be finite and from"),
        ({"fraction_targets": "half"}, "fraction_targets must be a number, got 'half'"),
        ({"seed_data": -1}, "seed_data must be from 0 to 4294967295"),
    ],
)
def test_every_bad_setting_of_bit_patterns_is_named(settings, message):
    for make in (BitPatternOptions, BitPatternSet):
        with pytest.raises((ValueError, TypeError), match=message):
            make(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"num_instances": 0}, "num_instances must be at least 1"),
        ({"num_characters": 2}, "num_characters must be at least 3, got 2"),
        ({"seed": 2**32}, "seed must be from 0 to 4294967295"),
    ],
)
def test_every_bad_setting_of_latch_is_named(settings, message):
    for make in (LatchOptions, LatchSequenceSet):
        with pytest.raises(ValueError, match=message):
            make(**settings)
