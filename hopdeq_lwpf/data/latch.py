"""Latch sequences: the first element decides, all others are noise (the task of the hflayers notebook)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot
from torch.utils.data import Dataset

from hopdeq_lwpf.data.draws import check_seed, check_whole


@dataclass(frozen=True)
class LatchOptions:
    """The settings of a `LatchSequenceSet`; the defaults are those of the hflayers notebook.

    num_samples: sequences; num_instances: elements of each; num_characters: the first two are the signals,
    the others noise, so at least 3. seed: of all draws.
    """

    num_samples: int = 4096
    num_instances: int = 32
    num_characters: int = 20
    seed: int = 43

    def __post_init__(self) -> None:
        check_whole("num_samples", self.num_samples, 1)
        check_whole("num_instances", self.num_instances, 1)
        check_whole("num_characters", self.num_characters, 3)
        check_seed("seed", self.seed)


class LatchSequenceSet(LatchOptions, Dataset):
    """Sequences of one-hot characters; the target is which of two signals comes first.

    An item is a dict: `data` (num_instances, num_characters) float32 one-hot, `target` float32 0 or 1,
    `instance_target` (num_instances,) bool, True for the first element, and `index`. With the same seed the
    sequences are those of hflayers' class (checked by checksum).

    Attributes: `characters` (num_samples, num_instances) int64, the first 0 or 1, the others 2 and above;
    `targets` (num_samples,) float32; `instance_targets` (num_samples, num_instances) bool.
    """

    characters: Tensor
    targets: Tensor
    instance_targets: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        generator = Generator().manual_seed(self.seed)
        shape = (self.num_samples, self.num_instances)
        characters = torch.randint(2, self.num_characters, shape, generator=generator)
        characters[:, 0] = torch.randint(2, shape[:1], generator=generator)
        first = (torch.arange(self.num_instances) == 0).repeat(self.num_samples, 1)
        ready = {"characters": characters, "targets": characters[:, 0].float(), "instance_targets": first}
        for name, tensor in ready.items():
            object.__setattr__(self, name, tensor)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        row = range(self.num_samples)[index]  # raises IndexError, counts from the end where negative
        return {
            "data": one_hot(self.characters[row], self.num_characters).float(),
            "target": self.targets[row],
            "instance_target": self.instance_targets[row],
            "index": row,
        }
