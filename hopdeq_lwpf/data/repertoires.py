"""Immune repertoires: ragged bags of amino-acid sequences, generated with implanted motifs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hopdeq_lwpf.data.batches import pad, padding_mask
from hopdeq_lwpf.data.draws import check_fraction, check_number, check_seed, check_whole, draw_targets, stream

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
PADDING = -1
WILDCARD = "Z"
_POSITION = re.compile(r"([A-Z])(\^d)?")
_CODES = np.full(256, PADDING, dtype=np.int8)
_CODES[np.frombuffer(AMINO_ACIDS.encode(), dtype=np.uint8)] = np.arange(len(AMINO_ACIDS))
_LETTERS = np.frombuffer(AMINO_ACIDS.encode(), dtype=np.uint8)


def parse_motif(motif: str) -> tuple[tuple[str, bool], ...]:
    """The positions of a motif: (letter, whether it may be missing).

    A motif is written as in the DeepRC poster: letters of amino acids, Z for any of them, ^d after a position
    that is left out with probability one half: "SFEN", "SF^dEN", "SZ^dZN".
    Raises ValueError for another letter, or a motif that may be left out altogether.
    """
    positions = tuple((letter, bool(deleted)) for letter, deleted in _POSITION.findall(motif))
    if _POSITION.sub("", motif) or any(letter not in AMINO_ACIDS + WILDCARD for letter, _ in positions):
        raise ValueError(
            f"motif {motif!r} must be letters of {AMINO_ACIDS} or {WILDCARD} (any), each alone or followed by ^d "
            "(left out half of the time), as in 'SF^dEN'"
        )
    if all(deleted for _, deleted in positions):
        raise ValueError(f"motif {motif!r} needs a position without ^d, or it may be left out altogether")
    return positions


@dataclass(frozen=True)
class RepertoireOptions:
    """The settings of `generate_repertoires`; the defaults are small, with many witnesses for a motif.

    num_repertoires: bags; fraction_targets: share of positive ones. num_sequences: mean of the number of
    sequences in a repertoire, normal with a standard deviation of `sequences_std` times that, at least 1.
    length_mean, length_std: of the lengths, normal, rounded and clipped to min_length ... max_length; the
    defaults are those of the example data of DeepRC (Widrich et al. 2020). frequencies: of the 20 amino acids
    in the order of `AMINO_ACIDS`, made to sum to 1; None: all alike. motifs: each implanted sequence of a
    positive repertoire gets one of these (`parse_motif`). witness_rate: share of such sequences, binomial, at
    least one of them. distractors: motifs of both classes, in a share `distractor_rate` of the sequences of every
    repertoire. count_probability: counts are geometric with it, 1 and above, mean 1 / count_probability. seed: of
    all draws.
    """

    num_repertoires: int = 1000
    num_sequences: float = 100.0
    sequences_std: float = 0.3
    length_mean: float = 14.5
    length_std: float = 1.8
    min_length: int = 10
    max_length: int = 20
    frequencies: tuple[float, ...] | None = None
    motifs: tuple[str, ...] = ("SFEN",)
    witness_rate: float = 0.05
    distractors: tuple[str, ...] = ()
    distractor_rate: float = 0.05
    fraction_targets: float = 0.5
    count_probability: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("num_repertoires", self.num_repertoires, 1)
        check_number("num_sequences", self.num_sequences, 1.0)
        check_number("sequences_std", self.sequences_std, 0.0)
        check_number("length_mean", self.length_mean, 1.0)
        check_number("length_std", self.length_std, 0.0)
        check_whole("min_length", self.min_length, 1)
        check_whole("max_length", self.max_length, self.min_length)
        check_number("witness_rate", self.witness_rate, 0.0, 1.0)
        check_number("distractor_rate", self.distractor_rate, 0.0, 1.0)
        check_fraction("fraction_targets", self.fraction_targets)
        if not check_number("count_probability", self.count_probability, 0.0, 1.0):
            raise ValueError("count_probability must be above 0, got 0")
        check_seed("seed", self.seed)
        self._check_frequencies()
        self._check_motifs()

    def _check_frequencies(self) -> None:
        if self.frequencies is None:
            return
        wrong = len(self.frequencies) != len(AMINO_ACIDS) or any(
            not (math.isfinite(number) and number >= 0) for number in self.frequencies
        )
        if wrong or not sum(self.frequencies):
            raise ValueError(
                f"frequencies must be {len(AMINO_ACIDS)} numbers of at least 0, not all 0, one for each of "
                f"{AMINO_ACIDS}; got {self.frequencies}"
            )

    def _check_motifs(self) -> None:
        if not self.motifs:
            raise ValueError("motifs must name at least one motif, got none")
        for motif in (*self.motifs, *self.distractors):
            size = len(parse_motif(motif))
            if size > self.min_length:
                raise ValueError(
                    f"motif {motif!r} has {size} positions, more than the shortest sequence, min_length "
                    f"{self.min_length}"
                )


def encode_sequences(sequences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(n, L) int8 places in `AMINO_ACIDS`, -1 where padded, L the longest; and the lengths, (n,) int64.

    Raises ValueError that names the first letter that is none of them, and where it stands.
    """
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    text = "".join(sequences)
    letters = np.frombuffer(text.encode("latin-1", "replace"), dtype=np.uint8)
    codes = _CODES[letters]
    if bool((codes == PADDING).any()):
        at = int(np.argmax(codes == PADDING))
        row = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        raise ValueError(f"sequence {row} holds {text[at]!r}, which is none of {AMINO_ACIDS}")
    table = np.full((len(sequences), int(lengths.max(initial=0))), PADDING, dtype=np.int8)
    table[np.arange(table.shape[1]) < lengths[:, None]] = codes
    return torch.from_numpy(table), torch.from_numpy(lengths)


def decode_sequences(sequences: Tensor) -> list[str]:
    """The strings of padded sequences, (n, L) int8."""
    table = sequences.numpy()
    return [_LETTERS[row[row != PADDING]].tobytes().decode() for row in table]


@dataclass(frozen=True)
class Repertoires:
    """The store of a `RepertoireSet`: all sequences of all repertoires, one after the other.

    sequences: (K, L) int8, -1 where padded. lengths, counts: (K,) int64. ends: (R + 1,), repertoire r holds the
    rows ends[r] to ends[r + 1] - 1. targets: (R,) float32. names: of the repertoires. instance_targets: (K,)
    bool, which sequences carry an implanted motif; None: not known.
    """

    sequences: Tensor
    lengths: Tensor
    counts: Tensor
    ends: tuple[int, ...]
    targets: Tensor
    names: tuple[str, ...]
    instance_targets: Tensor | None = field(default=None)


class RepertoireSet(Dataset):
    """Repertoires as bags.

    An item is a dict: `data` (n, L) int8, -1 where padded, `lengths` (n,), `counts` (n,), `target` float32,
    `index` (its place in this set), and `instance_target` (n,) bool where it is known. `collate_repertoires`
    makes batches.
    max_sequences: more than these are cut down to a random sample without replacement, in their order; None
    keeps all. The sample depends on `seed` and the repertoire; with `resample=True` also on the epoch, which
    `set_epoch` tells: for training.
    """

    def __init__(
        self,
        store: Repertoires,
        *,
        rows: Sequence[int] | None = None,
        max_sequences: int | None = None,
        resample: bool = False,
        seed: int = 0,
    ) -> None:
        if max_sequences is not None:
            check_whole("max_sequences", max_sequences, 1)
        self.store = store
        self.rows = list(range(len(store.targets))) if rows is None else [int(row) for row in rows]
        self.max_sequences, self.resample = max_sequences, resample
        self.seed = check_seed("seed", seed)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose samples are drawn where `resample` is set."""
        self.epoch = check_whole("epoch", epoch, 0)

    def select(
        self,
        rows: Sequence[int],
        *,
        max_sequences: int | None = None,
        resample: bool = False,
        seed: int = 0,
    ) -> RepertoireSet:
        """These repertoires as a set of their own, sharing the store, with samples of its own."""
        chosen = [self.rows[int(row)] for row in rows]
        return RepertoireSet(
            self.store, rows=chosen, max_sequences=max_sequences, resample=resample, seed=seed
        )

    @property
    def labels(self) -> Tensor:
        """(len(self),) float32: the targets in the order of this set."""
        return self.store.targets[self.rows]

    @property
    def names(self) -> list[str]:
        """The names of the repertoires in the order of this set."""
        return [self.store.names[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = range(len(self.rows))[index]  # raises IndexError, counts from the end where negative
        row = self.rows[place]
        start, end = self.store.ends[row], self.store.ends[row + 1]
        chosen = self._sample(row, end - start) + start
        item = {
            "data": self.store.sequences[chosen],
            "lengths": self.store.lengths[chosen],
            "counts": self.store.counts[chosen],
            "target": self.store.targets[row],
            "index": place,
        }
        if self.store.instance_targets is not None:
            item["instance_target"] = self.store.instance_targets[chosen]
        return item

    def _sample(self, row: int, size: int) -> Tensor:
        if self.max_sequences is None or size <= self.max_sequences:
            return torch.arange(size)
        # By the row in the store, so that a repertoire's sample does not depend on the set that it is in.
        draws = stream(self.seed, row, self.epoch if self.resample else 0)
        return torch.from_numpy(np.sort(draws.permutation(size)[: self.max_sequences]))


def collate_repertoires(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of repertoires: `data` (B, N, L) int8, -1 where padded, L the longest sequence of the batch,
    `lengths` and `counts` (B, N) int64, 0 where padded, `mask` (B, N) bool, True where padded, `target` (B,),
    `index` (B,), and `instance_target` (B, N) bool where all items have it.

    Raises ValueError for no items.
    """
    if not items:
        raise ValueError("a batch needs at least one repertoire, got none")
    longest = max(int(item["lengths"].max()) if len(item["lengths"]) else 0 for item in items)
    batch = {
        "data": pad([item["data"][:, :longest] for item in items], PADDING),
        "lengths": pad([item["lengths"] for item in items]),
        "counts": pad([item["counts"] for item in items]),
        "mask": padding_mask([len(item["data"]) for item in items]),
        "target": torch.stack([torch.as_tensor(item["target"]) for item in items]),
        "index": torch.tensor([int(item["index"]) for item in items]),
    }
    if all("instance_target" in item for item in items):
        batch["instance_target"] = pad([item["instance_target"] for item in items])
    return batch


def generate_repertoires(options: RepertoireOptions | None = None) -> RepertoireSet:
    """Repertoires of independent random amino acids, the positive ones with implanted motifs.

    The recipe of DeepRC's simulated sets (Widrich et al. 2020, NeurIPS; Ramsauer et al. 2021): a motif is
    written over a sequence at a random place, wildcards drawn anew each time. `instance_target` tells where
    that was done; other sequences may hold the motif by chance (SFEN: in (length - 3) / 20^4 of them at most).
    Each repertoire has a stream of draws of its own.
    """
    settings = options if options is not None else RepertoireOptions()
    positive = draw_targets(settings.num_repertoires, settings.fraction_targets, settings.seed, 0)
    parts = [
        _repertoire(settings, bool(target), stream(settings.seed, 1, row))
        for row, target in enumerate(positive)
    ]
    sequences, lengths, counts, marked = (
        torch.from_numpy(np.concatenate(columns)) for columns in zip(*parts, strict=True)
    )
    digits = len(str(len(parts) - 1))
    return RepertoireSet(
        Repertoires(
            sequences,
            lengths,
            counts,
            tuple(np.cumsum([0, *(len(part[0]) for part in parts)]).tolist()),
            torch.from_numpy(positive).float(),
            tuple(f"repertoire_{row:0{digits}d}" for row in range(len(parts))),
            marked,
        )
    )


Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def letter_bounds(frequencies: tuple[float, ...] | None) -> np.ndarray:
    """(20,) the upper ends of the letters' shares of [0, 1); None: all alike."""
    weights = np.ones(len(AMINO_ACIDS)) if frequencies is None else np.array(frequencies)
    bounds = np.cumsum(weights / weights.sum())
    # The last share may end below 1 by rounding; what lies above it must not fall to a letter of frequency 0.
    bounds[np.flatnonzero(weights)[-1] :] = 1.0
    return bounds


def _repertoire(settings: RepertoireOptions, positive: bool, draws: np.random.RandomState) -> Columns:
    """Sequences, lengths, counts and which carry a motif; the numbers of witnesses and of distractors are drawn
    for both classes, so that these differ in nothing but the motifs.
    """
    spread = settings.sequences_std * settings.num_sequences
    size = max(1, round(draws.normal(settings.num_sequences, spread)))
    lengths = np.rint(draws.normal(settings.length_mean, settings.length_std, size)).astype(np.int64)
    lengths = lengths.clip(settings.min_length, settings.max_length)
    bounds = letter_bounds(settings.frequencies)
    letters = np.searchsorted(bounds, draws.random_sample((size, settings.max_length)), side="right")
    letters = letters.astype(np.int8)
    letters[np.arange(settings.max_length) >= lengths[:, None]] = PADDING
    counts = draws.geometric(settings.count_probability, size).astype(np.int64)
    order = draws.permutation(size)
    witnesses = max(1, draws.binomial(size, settings.witness_rate))
    distracted = draws.binomial(size, settings.distractor_rate) if settings.distractors else 0
    marked = np.zeros(size, dtype=bool)
    if positive:
        marked[order[:witnesses]] = True
        _implant(letters, lengths, order[:witnesses], settings.motifs, draws)
    _implant(letters, lengths, order[witnesses : witnesses + distracted], settings.distractors, draws)
    return letters, lengths, counts, marked


def _implant(
    letters: np.ndarray,
    lengths: np.ndarray,
    rows: np.ndarray,
    motifs: tuple[str, ...],
    draws: np.random.RandomState,
) -> None:
    def below(limit: int) -> int:
        # With a type, since the default one, and the stream with it, differs between platforms.
        return int(draws.randint(limit, dtype=np.int64))

    parsed = [parse_motif(motif) for motif in motifs]
    for row in rows:
        positions = parsed[below(len(parsed))]
        kept = [letter for letter, deleted in positions if not (deleted and below(2))]
        codes = [
            below(len(AMINO_ACIDS)) if letter == WILDCARD else AMINO_ACIDS.index(letter) for letter in kept
        ]
        start = below(lengths[row] - len(codes) + 1)
        letters[row, start : start + len(codes)] = codes
