"""LightningDataModules, one for each task. Importing this module imports lightning."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.data.bags import PICTURES, ImageBagOptions, image_bags, load_pictures
from hopdeq_lwpf.data.batches import ResumableLoader, collate_bags
from hopdeq_lwpf.data.bit_pattern import BitPatternOptions, BitPatternSet
from hopdeq_lwpf.data.draws import MAX_SEED, check_seed, check_whole, split_folds, stream
from hopdeq_lwpf.data.latch import LatchOptions, LatchSequenceSet
from hopdeq_lwpf.data.mil import MIL_SETS, load_mil
from hopdeq_lwpf.data.repertoire_files import read_repertoires
from hopdeq_lwpf.data.repertoires import RepertoireOptions, collate_repertoires, generate_repertoires

Sets = tuple[Dataset, Dataset, Dataset]


@dataclass(frozen=True)
class LoadingOptions:
    """How batches are made. batch_size: 32, as in the hflayers notebooks. workers: processes that load; 0 loads
    in the process of training. seed: of the order of training; each epoch has an order of its own.
    """

    batch_size: int = 32
    workers: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, 1)
        check_whole("workers", self.workers, 0)
        check_seed("seed", self.seed)


@dataclass(frozen=True)
class FoldOptions:
    """Cross-validation: the bags in `folds` parts, alike in size and classes, by `seed`. Part `fold` is the test
    set, the next one (of the last: the first) the validation set, all others are for training.
    """

    fold: int = 0
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("folds", self.folds, 3)
        check_whole("fold", self.fold, 0, self.folds - 1)
        check_seed("seed", self.seed)

    def split(self, labels: Tensor) -> tuple[list[int], list[int], list[int]]:
        """The rows for training, validation and test."""
        parts = split_folds(labels.numpy(), self.folds, self.seed)
        test, val = parts.pop(self.fold), parts.pop(self.fold % len(parts))
        return sorted(row for part in parts for row in part), val, test


class TaskDataModule(LightningDataModule):
    """What the data modules share: `train_set`, `val_set` and `test_set` after `setup`, and their loaders.

    Batches are dicts (`collate_bags`). The training loader is a `ResumableLoader`: its place stands in Lightning's
    checkpoints, so that training goes on with the batch that would have come next. Under several processes each
    takes its share. Validation and test keep the order of the bags.
    """

    collate: Callable[[Sequence[Any]], dict[str, Tensor]] = staticmethod(collate_bags)

    def __init__(self, loading: LoadingOptions | None = None) -> None:
        super().__init__()
        self.loading = loading if loading is not None else LoadingOptions()
        self._sets: Sets | None = None

    def build(self) -> Sets:
        """The three sets; made once, by the first `setup`."""
        raise NotImplementedError(f"{type(self).__name__} must override build()")

    def setup(self, stage: str | None = None) -> None:
        """Make the data sets, whatever the stage: they come from one draw or one file."""
        if self._sets is None:
            self._sets = self.build()

    def _ready(self) -> Sets:
        self.setup()
        assert self._sets is not None
        return self._sets

    @property
    def train_set(self) -> Dataset:
        """The bags for training."""
        return self._ready()[0]

    @property
    def val_set(self) -> Dataset:
        """The bags for validation."""
        return self._ready()[1]

    @property
    def test_set(self) -> Dataset:
        """The bags for the test."""
        return self._ready()[2]

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled by seed and epoch."""
        trainer = self.trainer
        return ResumableLoader.of(
            self.train_set,
            batch_size=self.loading.batch_size,
            seed=self.loading.seed,
            workers=self.loading.workers,
            collate=self.collate,
            replicas=trainer.world_size if trainer is not None else 1,
            rank=trainer.global_rank if trainer is not None else 0,
        )

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return self._in_order(self.val_set)

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return self._in_order(self.test_set)

    def _in_order(self, data: Dataset) -> DataLoader:
        return DataLoader(
            data,
            batch_size=self.loading.batch_size,
            num_workers=self.loading.workers,
            collate_fn=self.collate,
            # Its own, since a loader otherwise draws from the global one, and dropout would go on differently.
            generator=torch.Generator().manual_seed(self.loading.seed),
        )


def _middle(data: Dataset, size: int) -> tuple[Subset, Subset]:
    """The middle three quarters, and the outer eighths: 256 ... 1791 and the other 512 of 2048."""
    start, stop = size // 8, size - size // 8
    return Subset(data, range(start, stop)), Subset(data, [*range(start), *range(stop, size)])


def _next_seed(seed: int) -> int:
    return (seed + 1) % (MAX_SEED + 1)


class BitPatternDataModule(TaskDataModule):
    """Bit-pattern bags, split as in the hflayers notebook: the middle three quarters of the bags for training (256
    ... 1791 of 2048), the others for validation. The test set has as many new bags with the same signals (the
    next `seed_data`).
    """

    def __init__(self, task: BitPatternOptions | None = None, loading: LoadingOptions | None = None) -> None:
        super().__init__(loading)
        self.task = task if task is not None else BitPatternOptions()
        check_whole("num_bags", self.task.num_bags, 8)

    def build(self) -> Sets:
        """The notebook's split, and new bags."""
        settings = dataclasses.asdict(self.task)
        train, val = _middle(BitPatternSet(**settings), self.task.num_bags)
        return train, val, BitPatternSet(**settings | {"seed_data": _next_seed(self.task.seed_data)})


class LatchDataModule(TaskDataModule):
    """Latch sequences, split as in the hflayers notebook: the middle three quarters for training (512 ... 3583 of
    4096), the others for validation. The test set has as many new sequences (the next `seed`).
    """

    def __init__(self, task: LatchOptions | None = None, loading: LoadingOptions | None = None) -> None:
        super().__init__(loading)
        self.task = task if task is not None else LatchOptions()
        check_whole("num_samples", self.task.num_samples, 8)

    def build(self) -> Sets:
        """The notebook's split, and new sequences."""
        settings = dataclasses.asdict(self.task)
        train, val = _middle(LatchSequenceSet(**settings), self.task.num_samples)
        return train, val, LatchSequenceSet(**settings | {"seed": _next_seed(self.task.seed)})


class ImageBagDataModule(TaskDataModule):
    """Image bags of `task.num_bags` for training, and `num_test_bags` each for validation and test.

    No image is in two of the sets. pictures: "digits" (three fifths of the images for training, a fifth each for
    validation and test, by the seed of `task`), "mnist" or "fashion" (five sixths of their training images, the
    rest for validation, their test images for the test). folder: as in `load_pictures`. num_test_bags: 200.
    """

    def __init__(
        self,
        task: ImageBagOptions | None = None,
        loading: LoadingOptions | None = None,
        *,
        pictures: str = "digits",
        folder: str | os.PathLike[str] | None = None,
        num_test_bags: int = 200,
    ) -> None:
        super().__init__(loading)
        if pictures not in PICTURES:
            raise unknown("pictures", pictures, PICTURES)
        self.task = task if task is not None else ImageBagOptions()
        self.pictures, self.folder = pictures, folder
        self.num_test_bags = check_whole("num_test_bags", num_test_bags, 1)

    def build(self) -> Sets:
        """Split the images, then draw bags from each part with a seed of its own."""
        images, labels = load_pictures(self.pictures, self.folder, "train")
        order = torch.from_numpy(stream(self.task.seed, 2).permutation(len(images)))
        if self.pictures == "digits":
            train, val, test = order.tensor_split([len(order) * 3 // 5, len(order) * 4 // 5])
            held_out = (images[test], labels[test])
        else:
            train, val = order.tensor_split([len(order) * 5 // 6])
            held_out = load_pictures(self.pictures, self.folder, "test")
        first = image_bags(images[train], labels[train], self.task)
        second, third = self._held_out_task(1), self._held_out_task(2)
        return first, image_bags(images[val], labels[val], second), image_bags(*held_out, third)

    def _held_out_task(self, step: int) -> ImageBagOptions:
        seed = (self.task.seed + step) % (MAX_SEED + 1)
        return dataclasses.replace(self.task, num_bags=self.num_test_bags, seed=seed)


class RepertoireDataModule(TaskDataModule):
    """Immune repertoires, generated by `task`, or read from `folder` (`read_repertoires`, with `target_column`
    and `positive`), in folds.

    loading: 4 repertoires a batch by default, as DeepRC. max_sequences: training takes new random samples of this
    size in each epoch; None takes all. Validation and test take all sequences. Batches: `collate_repertoires`.
    """

    collate = staticmethod(collate_repertoires)

    def __init__(
        self,
        task: RepertoireOptions | None = None,
        loading: LoadingOptions | None = None,
        *,
        split: FoldOptions | None = None,
        max_sequences: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        target_column: str | None = None,
        positive: str = "+",
    ) -> None:
        super().__init__(loading if loading is not None else LoadingOptions(batch_size=4))
        if task is not None and folder is not None:
            raise ValueError("give task (generate) or folder (read), not both")
        if max_sequences is not None:
            check_whole("max_sequences", max_sequences, 1)
        self.task = task if task is not None else RepertoireOptions()
        self.split = split if split is not None else FoldOptions()
        self.max_sequences = max_sequences
        self.folder, self.target_column, self.positive = folder, target_column, positive

    def build(self) -> Sets:
        """Generate or read, then take the folds."""
        if self.folder is None:
            whole = generate_repertoires(self.task)
        else:
            whole = read_repertoires(self.folder, target_column=self.target_column, positive=self.positive)
        train, val, test = self.split.split(whole.labels)
        sampled = whole.select(train, max_sequences=self.max_sequences, resample=True, seed=self.loading.seed)
        return sampled, whole.select(val), whole.select(test)


class MilDataModule(TaskDataModule):
    """A multiple-instance set by name (`load_mil`), in folds; 10 by default, as in Ramsauer et al. 2021.

    standardize: features are shifted and scaled to mean 0 and standard deviation 1 over the instances of the
    training bags; features that do not vary there are only shifted. Nothing of validation and test enters.
    """

    def __init__(
        self,
        name: str = "elephant",
        loading: LoadingOptions | None = None,
        *,
        split: FoldOptions | None = None,
        folder: str | os.PathLike[str] | None = None,
        standardize: bool = True,
    ) -> None:
        super().__init__(loading)
        if name not in MIL_SETS:
            raise unknown("name", name, MIL_SETS)
        self.split = split if split is not None else FoldOptions(folds=10)
        self.name_of_set, self.folder, self.standardize = name, folder, standardize

    def build(self) -> Sets:
        """Read, take the folds, scale."""
        whole = load_mil(self.name_of_set, self.folder)
        train, val, test = self.split.split(whole.labels)
        instances = whole.instances
        if self.standardize:
            seen = torch.cat([whole[row]["data"] for row in train]).double()
            mean, spread = seen.mean(0), seen.std(0, correction=0)
            # Rounding of a constant feature leaves a spread of some 1e-16 of its size.
            spread = torch.where(spread > 1e-12 * mean.abs(), spread, 1.0)
            instances = ((instances.double() - mean) / spread).float()
        return whole.select(train, instances), whole.select(val, instances), whole.select(test, instances)
