"""Immune repertoires: the generator against its recipe, bags and samples of sequences."""

import dataclasses
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopdeq_lwpf.data import (
    AMINO_ACIDS,
    RepertoireOptions,
    Repertoires,
    RepertoireSet,
    collate_repertoires,
    decode_sequences,
    encode_sequences,
    generate_repertoires,
)
from hopdeq_lwpf.data.repertoires import letter_bounds, parse_motif

SMALL = RepertoireOptions(num_repertoires=6, num_sequences=12.0)


# --- motifs and letters


def test_the_amino_acids_are_the_twenty():
    assert len(set(AMINO_ACIDS)) == len(AMINO_ACIDS) == 20
    assert not set(AMINO_ACIDS) & set("BJOUXZ")


def test_motifs_are_read_as_the_poster_writes_them():
    assert parse_motif("SFEN") == (("S", False), ("F", False), ("E", False), ("N", False))
    assert parse_motif("SZ^dZN") == (("S", False), ("Z", True), ("Z", False), ("N", False))


@pytest.mark.parametrize("motif", ["", "SFB", "sfen", "S^FEN", "SF^^d", "^dS", "S F", "SFdEN"])
def test_motifs_with_other_signs_are_refused(motif):
    with pytest.raises(ValueError, match="motif"):
        parse_motif(motif)


def test_a_motif_that_may_vanish_is_refused():
    with pytest.raises(ValueError, match="needs a position without"):
        parse_motif("S^dF^d")


@given(st.lists(st.text(AMINO_ACIDS, max_size=8), max_size=6))
def test_letters_come_back(sequences):
    codes, lengths = encode_sequences(sequences)
    assert codes.dtype == torch.int8
    assert lengths.tolist() == [len(sequence) for sequence in sequences]
    assert codes.shape == (len(sequences), max(map(len, sequences), default=0))
    by_hand = [
        [AMINO_ACIDS.index(letter) for letter in sequence] + [-1] * (codes.shape[1] - len(sequence))
        for sequence in sequences
    ]
    assert codes.tolist() == by_hand
    assert decode_sequences(codes) == sequences


@pytest.mark.parametrize("letter", ["B", "a", "*", "-", " ", "é", "氨", "\x00"])
def test_the_first_strange_letter_is_named(letter):
    with pytest.raises(
        ValueError, match=re.escape(f"sequence 2 holds {letter!r}, which is none of {AMINO_ACIDS}")
    ):
        encode_sequences(["AC", "", f"DE{letter}", "X"])


# --- the generator


def matches(motif):
    """A regular expression of the motif, as a twin of the implanting."""
    pattern = motif.replace("Z", f"[{AMINO_ACIDS}]").replace("^d", "?")
    return re.compile(pattern)


@given(
    st.sampled_from(["SFEN", "SF^dEN", "SZZN", "SZ^dZN", "W"]),
    st.floats(0, 1),
    st.floats(0.1, 0.9),
    st.integers(1, 8),
    st.integers(0, 2**32 - 1),
)
def test_positive_repertoires_carry_the_motif_and_negative_ones_do_not(motif, witness, share, size, seed):
    # Background without S and W: a motif found there cannot have come by chance.
    frequencies = tuple(float(letter not in "SW") for letter in AMINO_ACIDS)
    options = RepertoireOptions(
        num_repertoires=5,
        num_sequences=float(size),
        motifs=(motif,),
        witness_rate=witness,
        fraction_targets=share,
        frequencies=frequencies,
        seed=seed,
    )
    made = generate_repertoires(options)
    assert made.labels.sum() == sum(1 for place in range(5) if place < share * 5)
    for item in made:
        texts = decode_sequences(item["data"])
        found = [bool(matches(motif).search(text)) for text in texts]
        assert found == item["instance_target"].tolist()
        assert any(found) == bool(item["target"])
        assert [len(text) for text in texts] == item["lengths"].tolist()
        assert all(10 <= len(text) <= 20 for text in texts)
        assert len(texts) >= 1
        assert item["counts"].min() >= 1


def test_the_draws_have_the_distributions_asked_for():
    options = RepertoireOptions(num_repertoires=400, num_sequences=50.0, witness_rate=0.1, seed=2)
    made = generate_repertoires(options)
    sizes = torch.tensor(made.store.ends).diff().double()
    # 5 standard deviations of each mean; rounding and the bound at 1 move them by far less.
    assert abs(sizes.mean() - 50) < 5 * 15 / 20
    assert abs(sizes.std() - 15) < 5 * 15 / 800**0.5
    lengths, counts = made.store.lengths.double(), made.store.counts.double()
    total = len(lengths)
    assert abs(lengths.mean() - 14.5) < 0.01 + 5 * 1.8 * total**-0.5  # clipping at 10 moves it by some .005
    assert abs(counts.mean() - 2) < 5 * (2 / total) ** 0.5  # geometric: mean 1/p, variance (1 - p)/p^2
    assert abs((counts == 1).double().mean() - 0.5) < 5 * (0.25 / total) ** 0.5
    marked = made.store.instance_targets
    in_positive = sizes[made.labels.bool()].sum()
    assert abs(marked.sum() - 0.1 * in_positive) < 5 * (0.09 * float(in_positive)) ** 0.5 + 5
    letters = made.store.sequences[~marked]
    letters = letters[letters >= 0]
    shares = torch.bincount(letters.long(), minlength=20) / len(letters)
    assert abs(shares - 0.05).max() < 5 * (0.05 * 0.95 / len(letters)) ** 0.5
    # Chance: each of the length - 3 places holds SFEN with probability 20^-4; Poisson.
    expected = float((lengths[~marked] - 3).sum()) / 20**4
    chance = sum("SFEN" in text for text in decode_sequences(made.store.sequences[~marked]))
    assert abs(chance - expected) < 5 * expected**0.5 + 1


def test_wildcards_deletions_places_and_choice_of_motifs_are_even():
    frequencies = tuple(float(letter == "A") for letter in AMINO_ACIDS)
    options = RepertoireOptions(
        num_repertoires=2,
        num_sequences=3000.0,
        sequences_std=0.0,
        length_std=0.0,
        length_mean=10.0,
        motifs=("SZ^dN", "W"),
        witness_rate=1.0,
        frequencies=frequencies,
    )
    made = generate_repertoires(options)
    (positive,) = (item for item in made if item["target"])
    texts = decode_sequences(positive["data"])
    first = [text for text in texts if "S" in text and "N" in text]
    second = [text for text in texts if "W" in text and "S" not in text]
    # 3000 fair choices: 5 standard deviations (a wildcard that draws W, S or N blurs no more than 1 in 100).
    tolerance = 5 * (0.25 / 3000) ** 0.5 + 0.01
    assert abs(len(first) / 3000 - 0.5) < tolerance
    assert len(second) == 3000 - len(first)
    long = [text for text in first if re.search("S.N", text)]
    assert abs(len(long) / len(first) - 0.5) < 5 * (0.25 / len(first)) ** 0.5 + 0.01
    wild = Counter(re.search("S(.)N", text).group(1) for text in long)
    assert set(wild) == set(AMINO_ACIDS)
    places = Counter(text.index("W") for text in second)
    assert set(places) == set(range(10))
    assert max(abs(count - len(second) / 10) for count in places.values()) < 5 * (len(second) * 0.09) ** 0.5


def test_frequencies_are_kept_and_zero_means_never():
    frequencies = [0.0] * 20
    frequencies[0], frequencies[4] = 3.0, 1.0  # A and F, not made to sum to 1
    options = dataclasses.replace(
        SMALL, num_sequences=300.0, frequencies=tuple(frequencies), witness_rate=0.0
    )
    made = generate_repertoires(options)
    letters = made.store.sequences[~made.store.instance_targets]
    letters = letters[letters >= 0].long()
    assert set(letters.tolist()) == {0, 4}
    assert abs((letters == 0).double().mean() - 0.75) < 5 * (0.1875 / len(letters)) ** 0.5


@given(st.lists(st.floats(0, 1e3), min_size=20, max_size=20).filter(any))
def test_shares_of_letters_fill_the_unit_interval(frequencies):
    bounds = letter_bounds(tuple(frequencies))
    ends = [0.0, *bounds.tolist()]
    assert ends[-1] == 1.0  # also where the sum of the shares is rounded
    for place, frequency in enumerate(frequencies):
        share = ends[place + 1] - ends[place]
        assert abs(share - frequency / sum(frequencies)) < 1e-14  # some roundings of numbers up to 1
        assert frequency > 0 or share == 0


def test_distractors_are_in_both_classes_and_mark_nothing():
    frequencies = tuple(float(letter not in "SW") for letter in AMINO_ACIDS)
    options = RepertoireOptions(
        num_repertoires=40,
        num_sequences=50.0,
        distractors=("WW",),
        distractor_rate=0.2,
        frequencies=frequencies,
    )
    made = generate_repertoires(options)
    shares = {0.0: [], 1.0: []}
    for item in made:
        found = torch.tensor(["WW" in text for text in decode_sequences(item["data"])])
        shares[float(item["target"])].append(found.double().mean())
        assert not bool((found & item["instance_target"]).any())
    for rates in shares.values():  # 20 repertoires of some 50 sequences
        assert abs(torch.stack(rates).mean() - 0.2) < 5 * (0.16 / 1000) ** 0.5


def test_another_motif_changes_nothing_else():
    with_motif = generate_repertoires(SMALL)
    other = generate_repertoires(dataclasses.replace(SMALL, motifs=("WWWW",)))
    untouched = ~with_motif.store.instance_targets
    assert torch.equal(with_motif.store.counts, other.store.counts)
    assert torch.equal(with_motif.store.sequences[untouched], other.store.sequences[untouched])


def test_the_seed_alone_decides_the_repertoires():
    first, again = generate_repertoires(SMALL), generate_repertoires(SMALL)
    assert torch.equal(first.store.sequences, again.store.sequences)
    # Pinned, so that a change of the draws is seen: the data of a published seed must not change.
    assert decode_sequences(first.store.sequences[:3]) == PINNED
    assert first.store.counts[:6].tolist() == PINNED_COUNTS
    assert first.names[0] == "repertoire_0"
    other = generate_repertoires(dataclasses.replace(SMALL, seed=1))
    assert decode_sequences(other.store.sequences[:3]) != PINNED


PINNED = ["EADCWEPVGDVLPCRQY", "DMMVKWCMINGKRKKFRL", "GAHGPNLLEHADCEW"]
PINNED_COUNTS = [2, 1, 3, 2, 1, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_repertoires": 0}, "num_repertoires must be at least 1"),
        ({"num_sequences": 0.5}, "num_sequences must be finite and at least 1"),
        ({"sequences_std": -0.1}, "sequences_std must be finite and at least 0"),
        ({"length_mean": 0.0}, "length_mean must be finite and at least 1"),
        ({"length_std": float("nan")}, "length_std must be finite"),
        ({"min_length": 0}, "min_length must be at least 1"),
        ({"max_length": 9}, "max_length must be at least 10, got 9"),
        ({"witness_rate": 2}, "witness_rate must be finite and from 0.0 to 1.0"),
        ({"distractor_rate": -1}, "distractor_rate must be finite and from 0.0 to 1.0"),
        ({"fraction_targets": 1}, "fraction_targets must be above 0 and below 1"),
        ({"count_probability": 0}, "count_probability must be above 0"),
        ({"seed": -1}, "seed must be from 0"),
        ({"frequencies": (1.0,)}, "frequencies must be 20 numbers"),
        ({"frequencies": (-1.0,) + (1.0,) * 19}, "frequencies must be 20 numbers of at least 0"),
        ({"frequencies": (0.0,) * 20}, "frequencies must be .* not all 0"),
        ({"motifs": ()}, "motifs must name at least one motif"),
        ({"motifs": ("SFEN", "SX")}, "motif 'SX' must be letters"),
        ({"distractors": ("Z" * 11,)}, "has 11 positions, more than the shortest sequence, min_length 10"),
    ],
)
def test_every_bad_setting_of_repertoires_is_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        RepertoireOptions(**options)


# --- bags of sequences


def by_hand():
    sequences, lengths = encode_sequences(["ACD", "CDEFG", "D", "EF", "W"])
    return RepertoireSet(
        Repertoires(
            sequences, lengths, torch.tensor([1, 2, 3, 4, 5]), (0, 2, 2, 5), torch.tensor([1.0, 0.0, 1.0]),
            ("a", "b", "c"), torch.tensor([True, False, False, True, False]),
        )
    )  # fmt: skip


def test_a_batch_is_trimmed_padded_and_masked():
    batch = collate_repertoires(list(by_hand().select([2, 1])))
    assert batch["data"].dtype == torch.int8
    assert batch["data"].tolist() == [[[2, -1], [3, 4], [18, -1]], [[-1, -1]] * 3]
    assert batch["lengths"].tolist() == [[1, 2, 1], [0, 0, 0]]
    assert batch["counts"].tolist() == [[3, 4, 5], [0, 0, 0]]
    assert batch["mask"].tolist() == [[False] * 3, [True] * 3]
    assert batch["instance_target"].tolist() == [[False, True, False], [False] * 3]
    assert batch["target"].tolist() == [1.0, 0.0]
    assert batch["index"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="at least one repertoire, got none"):
        collate_repertoires([])
    bare = dataclasses.replace(by_hand().store, instance_targets=None)
    assert "instance_target" not in collate_repertoires(list(RepertoireSet(bare)))


@given(st.integers(1, 30), st.integers(0, 99), st.integers(0, 5))
def test_samples_are_parts_of_the_repertoire_in_its_order(most, seed, epoch):
    whole = generate_repertoires(SMALL)
    made = whole.select([3, 1], max_sequences=most, resample=True, seed=seed)
    made.set_epoch(epoch)
    for place, row in enumerate([3, 1]):
        full, part = whole[row], made[place]
        assert len(part["data"]) == min(most, len(full["data"]))
        # In order and without replacement: each sequence is found behind the one before it.
        rest = iter(zip(full["data"].tolist(), full["counts"].tolist(), full["instance_target"], strict=True))
        for one in zip(part["data"].tolist(), part["counts"].tolist(), part["instance_target"], strict=True):
            assert one in rest
        assert part["target"] == full["target"]
        assert torch.equal(part["data"], made[place]["data"])


def test_samples_change_with_the_epoch_only_where_asked():
    whole = generate_repertoires(dataclasses.replace(SMALL, num_sequences=100.0))
    chosen = {"fixed": [], "new": [], "other": []}
    for epoch in (0, 1):
        for name, options in {"fixed": {}, "new": {"resample": True}, "other": {"seed": 5}}.items():
            part = whole.select([0], max_sequences=10, **options)
            part.set_epoch(epoch)
            chosen[name].append(part[0]["data"].tolist())
    assert chosen["fixed"][0] == chosen["fixed"][1] == chosen["new"][0]
    assert chosen["new"][0] != chosen["new"][1]
    assert chosen["other"][0] != chosen["fixed"][0]


def test_every_sequence_is_sampled_equally_often():
    whole = generate_repertoires(dataclasses.replace(SMALL, sequences_std=0.0))
    part = whole.select([0], max_sequences=4, resample=True)
    counts = torch.zeros(12)
    for epoch in range(900):
        part.set_epoch(epoch)
        counts[part._sample(0, 12)] += 1
    # 900 draws with probability 1/3 each: 5 standard deviations.
    assert (counts - 300).abs().max() < 5 * (900 * 2 / 9) ** 0.5


def test_a_sample_does_not_depend_on_the_set_that_it_is_in():
    whole = generate_repertoires(SMALL)
    alone = whole.select([4], max_sequences=3)
    among = whole.select([0, 2, 4], max_sequences=3).select([2], max_sequences=3)
    assert torch.equal(alone[0]["data"], among[0]["data"])
    with pytest.raises(ValueError, match="max_sequences must be at least 1, got 0"):
        whole.select([0], max_sequences=0)
