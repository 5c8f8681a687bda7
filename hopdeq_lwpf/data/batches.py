"""Bags of unequal size as batches, and an order of training that can be taken up again exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from hopdeq_lwpf.data.draws import check_seed, check_whole, stream


def pad(parts: Sequence[Tensor], value: float = 0) -> Tensor:
    """(B, N, ...) from B tensors (n_i, ...): N is the largest n_i, the rest is filled with `value`."""
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"the instances of one batch must have one shape, got {sorted(shapes)}")
    size = max(len(part) for part in parts)
    padded = parts[0].new_full((len(parts), size, *parts[0].shape[1:]), value)
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    return padded


def padding_mask(sizes: Sequence[int]) -> Tensor:
    """(B, N) bool, N the largest size: True where there is no instance."""
    return torch.arange(max(sizes)) >= torch.tensor(sizes)[:, None]


def collate_bags(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of bags: `data` (B, N, ...) padded with zeros, `mask` (B, N) bool, True where padded, `target`
    (B,), `index` (B,), and `instance_target` (B, N) bool where all items have it.

    The mask is what the layers take as `stored_pattern_padding_mask`. Bags may be empty.
    Raises ValueError for no items, or instances of different shapes.
    """
    if not items:
        raise ValueError("a batch needs at least one bag, got none")
    bags = [item["data"] for item in items]
    batch = {
        "data": pad(bags),
        "mask": padding_mask([len(bag) for bag in bags]),
        "target": torch.stack([torch.as_tensor(item["target"]) for item in items]),
        "index": torch.tensor([int(item["index"]) for item in items]),
    }
    if all("instance_target" in item for item in items):
        batch["instance_target"] = pad([item["instance_target"] for item in items])
    return batch


class EpochSampler(DistributedSampler):
    """The rows in an order that only the seed and the epoch decide.

    `set_epoch(epoch)` chooses the epoch; Lightning calls it. It is a DistributedSampler, so that Lightning
    leaves it as it is: each of `replicas` processes draws the same order and takes every `replicas`-th row from
    its `rank` on; the order is continued from its start where it does not divide evenly. `skip`: how many rows
    the next pass leaves out, for taking up an epoch that was broken off. `shift`: what is added to the epoch
    that was set, where the one who sets it counts otherwise.
    """

    def __init__(self, data: Dataset, *, seed: int = 0, replicas: int = 1, rank: int = 0) -> None:
        check_seed("seed", seed)
        check_whole("replicas", replicas, 1)
        super().__init__(data, num_replicas=replicas, rank=rank, shuffle=True, seed=seed)
        self.skip = self.shift = 0

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        size = len(self.dataset)  # type: ignore[arg-type]
        if not size:
            return iter(())
        order = np.resize(stream(self.seed, self.epoch + self.shift).permutation(size), self.total_size)
        return islice(iter(order[self.rank :: self.num_replicas].tolist()), skip, None)


class ResumableLoader(DataLoader):
    """Training batches whose place can be saved and taken up again to the batch.

    `state_dict()` and `load_state_dict(state)` are what Lightning asks for in its checkpoints. A complete pass
    moves on to the next epoch; one that was broken off starts again, unless a state was loaded. Nothing is
    drawn from torch's global generator, so that dropout goes on as it would have. A data set with `set_epoch`
    is told the epoch before each pass. Make one by `ResumableLoader.of`; the constructor is DataLoader's, since
    Lightning may build a loader anew.
    """

    _place: tuple[int, int] | None = None  # epoch, and batches of it handed out
    _loaded: tuple[int, int] | None = None  # the place of a loaded state, until the next pass

    @classmethod
    def of(
        cls,
        data: Dataset,
        *,
        batch_size: int = 32,
        seed: int = 0,
        workers: int = 0,
        collate: Any = collate_bags,
        replicas: int = 1,
        rank: int = 0,
    ) -> ResumableLoader:
        """A loader over `data`, a map-style data set, in the order of an `EpochSampler`.

        batch_size: 32 by default, as in the hflayers notebooks. seed: of the order. workers: processes that
        load; 0 loads in this one. collate: makes a batch of a list of items. replicas, rank: of the sampler.
        """
        check_whole("batch_size", batch_size, 1)
        check_whole("workers", workers, 0)
        sampler = EpochSampler(data, seed=seed, replicas=replicas, rank=rank)
        return cls(
            data,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            generator=Generator().manual_seed(seed),
        )

    @property
    def order(self) -> EpochSampler:
        """The sampler."""
        if not isinstance(self.sampler, EpochSampler):
            raise TypeError(
                f"a ResumableLoader needs an EpochSampler, got {type(self.sampler).__name__}; use ResumableLoader.of"
            )
        return self.sampler

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass, which then starts at its first batch."""
        self.order.set_epoch(check_whole("epoch", epoch, 0))
        self.order.shift, self._place, self._loaded = 0, None, None

    def _begin(self) -> tuple[int, int]:
        """The epoch of this pass, and how many of its batches were handed out before."""
        order = self.order
        if self._loaded is None:
            return order.epoch + order.shift, 0
        (epoch, done), self._loaded = self._loaded, None
        if done and order.epoch != epoch:  # who sets the epoch takes the one of the state for over
            epoch, done = epoch + 1, 0
        # After a checkpoint at the end of an epoch Lightning passes over one, and counts on from there.
        order.shift = epoch - order.epoch
        return epoch, done

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        order, total = self.order, len(self)
        epoch, done = self._place = self._begin()
        order.skip = done * (self.batch_size or 1)
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        for batch in super().__iter__():
            done += 1
            self._place = (epoch, done)
            if done == total:  # before it is handed out: a sized loop never asks what comes after the last
                order.set_epoch(order.epoch + 1)
                self._place = (epoch + 1, 0)
            yield batch

    def _setting(self) -> dict[str, int]:
        return {
            "seed": self.order.seed,
            "samples": len(self.dataset),  # type: ignore[arg-type]
            "batch_size": int(self.batch_size or 1),
            "replicas": self.order.num_replicas,
        }

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands: `epoch`, `batch`, and the settings that the order depends on."""
        epoch, batch = self._place or (self.order.epoch, 0)
        return {"epoch": epoch, "batch": batch, **self._setting()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state`; ValueError where it comes from other settings, whose order was another."""
        for name, value in self._setting().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the state was saved with {name} {state.get(name)}, but the loader has {value}: its order was "
                    f"another; use the same {name}, or start anew"
                )
        place = check_whole("epoch", state["epoch"], 0), check_whole("batch", state["batch"], 0)
        self.set_epoch(place[0])
        self._place = self._loaded = place
