"""Bit-pattern bags: the multiple-instance task of the hflayers notebooks (Ramsauer et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from hopdeq_lwpf.data.draws import check_fraction, check_seed, check_whole, count_positives

MAX_BITS = 62  # patterns are compared as int64


@dataclass(frozen=True)
class BitPatternOptions:
    """The settings of a `BitPatternSet`; the defaults are those of the notebook.

    num_bags: bags; num_instances: in each; num_bits: of each. num_signals: different signals; at most
    2^num_bits - 2, since zero is none and one pattern has to be left for the others. num_signals_per_bag:
    instances of a positive bag that are signals; 0 leaves the label without any evidence, as a control.
    fraction_targets: share of positive bags, ceil(fraction_targets num_bags) of them. seed_signals, seed_data:
    of the signals, and of all else, so that sets with other bags share their signals. bipolar: bits are -1 and
    1 instead of 0 and 1.
    """

    num_bags: int = 2048
    num_instances: int = 16
    num_signals: int = 8
    num_signals_per_bag: int = 1
    fraction_targets: float = 0.5
    num_bits: int = 8
    seed_signals: int = 43
    seed_data: int = 44
    bipolar: bool = False

    def __post_init__(self) -> None:
        check_whole("num_bags", self.num_bags, 1)
        check_whole("num_instances", self.num_instances, 1)
        check_whole("num_signals_per_bag", self.num_signals_per_bag, 0, self.num_instances)
        check_whole("num_bits", self.num_bits, 2, MAX_BITS)
        check_whole("num_signals", self.num_signals, 1, 2**self.num_bits - 2)
        check_fraction("fraction_targets", self.fraction_targets)
        check_seed("seed_signals", self.seed_signals)
        check_seed("seed_data", self.seed_data)


class BitPatternSet(BitPatternOptions, Dataset):
    """Bags of random bit patterns; positive bags hold signals, negative ones none.

    An item is a dict: `data` (num_instances, num_bits) float32, `target` float32 0 or 1, `instance_target`
    (num_instances,) bool, True for a signal, and `index`. The positive bags come first, as in hflayers; shuffle,
    or split across the middle. No instance is zero, and outside of their places there are no signals. The
    positions in a bag differ; the same signal may stand at several of them.
    With the same seeds the bags, targets and signals are those of hflayers' class (checked by checksum), whose
    order of draws this one follows: torch's CPU generator, drawn one after the other whatever the threads.

    Attributes: `data` (num_bags, num_instances, num_bits) float32; `targets` (num_bags,) float32;
    `instance_targets` (num_bags, num_instances) bool; `signals` (num_signals, num_bits) float32, sorted.
    """

    data: Tensor
    targets: Tensor
    instance_targets: Tensor
    signals: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        signals = self._draw_signals()
        bags, places = self._draw_bags(signals)
        targets = torch.zeros(self.num_bags)
        targets[: count_positives(self.num_bags, self.fraction_targets)] = 1
        ready = {"data": self._levels(bags), "targets": targets, "signals": self._levels(signals)}
        for name, tensor in (ready | {"instance_targets": places}).items():
            object.__setattr__(self, name, tensor)

    def _levels(self, bits: Tensor) -> Tensor:
        return bits.float() * 2 - 1 if self.bipolar else bits.float()

    def _draw_signals(self) -> Tensor:
        """(num_signals, num_bits) int64: different, none zero, sorted; what is lost to either is drawn anew."""
        generator = Generator().manual_seed(self.seed_signals)
        signals = torch.empty((0, self.num_bits), dtype=torch.int64)
        while len(signals) < self.num_signals:
            drawn = torch.randint(2, (self.num_signals - len(signals), self.num_bits), generator=generator)
            signals = torch.cat((signals, drawn)).unique(dim=0)
            signals = signals[signals.any(-1)]
        return signals

    def _draw_bags(self, signals: Tensor) -> tuple[Tensor, Tensor]:
        """(num_bags, num_instances, num_bits) int64 with the signals written in, and where they stand."""
        generator = Generator().manual_seed(self.seed_data)
        bags = torch.randint(2, (self.num_bags, self.num_instances, self.num_bits), generator=generator)
        place_values = 2 ** torch.arange(self.num_bits)
        forbidden = torch.cat((torch.zeros(1, dtype=torch.int64), signals @ place_values))
        while bool((wrong := torch.isin(bags @ place_values, forbidden)).any()):
            bags[wrong] = torch.randint(2, (int(wrong.sum()), self.num_bits), generator=generator)
        places = torch.zeros(bags.shape[:2], dtype=torch.bool)
        for bag in range(count_positives(self.num_bags, self.fraction_targets)):
            for _ in range(self.num_signals_per_bag):
                place = _below(self.num_instances, generator)
                while places[bag, place]:
                    place = _below(self.num_instances, generator)
                places[bag, place] = True
                bags[bag, place] = signals[_below(self.num_signals, generator)]
        return bags, places

    def __len__(self) -> int:
        return self.num_bags

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        row = range(self.num_bags)[index]  # raises IndexError, counts from the end where negative
        return {
            "data": self.data[row],
            "target": self.targets[row],
            "instance_target": self.instance_targets[row],
            "index": row,
        }


def _below(limit: int, generator: Generator) -> int:
    return int(torch.randint(limit, (1,), generator=generator))
