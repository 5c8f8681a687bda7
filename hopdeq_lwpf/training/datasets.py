"""Data to train on by name, as LightningDataModules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.data import modules
from hopdeq_lwpf.data.bags import PICTURES, ImageBagOptions, load_pictures
from hopdeq_lwpf.data.bit_pattern import BitPatternOptions
from hopdeq_lwpf.data.framing import frame_pictures
from hopdeq_lwpf.data.latch import LatchOptions
from hopdeq_lwpf.data.repertoires import RepertoireOptions

TEST = "test"  # the other images of the files


class Pictures(LightningDataModule):
    """Pictures by name as batches (pictures (B, height * width) in [0, 1], classes (B,)).

    pictures: "digits", the 1,797 that ship with the package; "mnist" or "fashion", from the IDX files of `folder` (see
    `load_pictures`). batch_size: samples a batch. validation: "test", the test images of the files, or the share of the
    training images that is held out, drawn with `seed`, the same for every run. frame: pixels that what is drawn is
    scaled to (`frame_pictures`); 24 makes MNIST what EMNIST has under that name. None: as they are.
    """

    def __init__(  # noqa: PLR0913 (settings of one data set)
        self,
        pictures: str = "digits",
        folder: str | None = None,
        *,
        batch_size: int = 32,
        validation: float | str = 0.2,
        seed: int = 0,
        frame: int | None = None,
    ) -> None:
        super().__init__()
        if pictures not in PICTURES:
            raise unknown("pictures", pictures, PICTURES)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if validation == TEST and pictures == "digits":
            raise ValueError(
                "validation 'test' needs pictures with test images; digits have none: give a share"
            )
        if validation != TEST and not (isinstance(validation, (int, float)) and 0 < validation < 1):
            raise ValueError(f"validation must be a share between 0 and 1 or {TEST!r}, got {validation!r}")
        self.pictures, self.folder = pictures, folder
        self.batch_size = batch_size
        self.validation = validation
        self.seed = seed
        self.frame = frame
        self.parts: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        images, classes = self._load("train")
        if isinstance(self.validation, str):
            held_out = self._load(TEST)
            self.parts = {"train": TensorDataset(images, classes), "val": TensorDataset(*held_out)}
            return
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(self.seed))
        held = round(self.validation * len(classes))
        for name, rows in (("val", order[:held]), ("train", order[held:])):
            self.parts[name] = TensorDataset(images[rows], classes[rows])

    def _load(self, split: str) -> tuple[Tensor, Tensor]:
        images, classes = load_pictures(self.pictures, self.folder, split)
        return images if self.frame is None else frame_pictures(images, self.frame), classes

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["val"], self.batch_size)


Options = dict[str, type]
# What a data module is made of: its options classes by argument, and the arguments of its own.
DATASETS: dict[str, tuple[Callable[..., LightningDataModule], Options, tuple[str, ...]]] = {
    "digits": (partial(Pictures, "digits"), {}, ("batch_size", "validation", "seed", "frame")),
    "pictures": (Pictures, {}, ("pictures", "folder", "batch_size", "validation", "seed", "frame")),
    "bit_pattern": (modules.BitPatternDataModule, {"task": BitPatternOptions}, ()),
    "latch": (modules.LatchDataModule, {"task": LatchOptions}, ()),
    "image_bags": (
        modules.ImageBagDataModule,
        {"task": ImageBagOptions},
        ("pictures", "folder", "num_test_bags"),
    ),
    "mil": (
        modules.MilDataModule,
        {"split": modules.FoldOptions},
        ("name", "folder", "standardize"),
    ),
    "repertoires": (
        modules.RepertoireDataModule,
        {"task": RepertoireOptions, "split": modules.FoldOptions},
        ("max_sequences", "folder", "target_column", "positive"),
    ),
}
LOADING = ("batch_size", "workers")
# Where the module has others than the classes.
DEFAULTS: dict[str, dict[str, Any]] = {"mil": {"folds": 10}, "repertoires": {"batch_size": 4}}
# What a field is called where another of the classes has one of the same name.
RENAMED = {("repertoires", "split", "seed"): "split_seed"}


def build_data(settings: Mapping[str, Any], seed: int = 0) -> LightningDataModule:
    """A data module from {"data": name, **options}.

    The options are those of the module and of the classes that it takes (task, folds, batch size, workers), in
    one mapping. seed: of the order of training, where the data has one of its own. Of "repertoires", the option
    `seed` is that of the sequences, `split_seed` that of the folds.
    An unknown name or option is a ValueError with the nearest.
    """
    name = settings.get("data")
    if name not in DATASETS:
        raise unknown("data", name, DATASETS)
    module, classes, own = DATASETS[name]
    fields = {argument: _called(name, argument, kind) for argument, kind in classes.items()}
    loading = () if name in ("digits", "pictures") else LOADING
    allowed = {*own, *loading, *(option for names in fields.values() for option in names)}
    options = {key: value for key, value in settings.items() if key != "data"}
    for key in options:
        if key not in allowed:
            raise unknown(f"option of data {name!r}:", key, allowed)
    built: dict[str, Any] = {key: options[key] for key in own if key in options}
    for argument, names in fields.items():
        given = {field: _tuple(options[option]) for option, field in names.items() if option in options}
        if given:
            built[argument] = classes[argument](**{**_defaults(name, names.values()), **given})
    if loading:
        given = {key: options[key] for key in loading if key in options}
        built["loading"] = modules.LoadingOptions(**{**_defaults(name, loading), **given}, seed=seed)
    return module(**built)


def _called(name: str, argument: str, kind: type) -> dict[str, str]:
    """The fields of an options class by the names that they have as options of this data."""
    fields = [field.name for field in dataclasses.fields(kind)]
    return {RENAMED.get((name, argument, field), field): field for field in fields}


def _defaults(name: str, fields: Iterable[str]) -> dict[str, Any]:
    return {field: value for field, value in DEFAULTS.get(name, {}).items() if field in fields}


def _tuple(value: Any) -> Any:
    """Lists, as YAML writes them, as the tuples of frozen settings."""
    return tuple(value) if isinstance(value, list) else value
