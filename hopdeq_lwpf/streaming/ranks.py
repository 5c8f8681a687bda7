"""Stored patterns that are spread over the processes of torch.distributed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hopdeq_lwpf._types import check_float_tensor
from hopdeq_lwpf.streaming.sources import PatternSource, TensorPatterns


class ShardError(RuntimeError):
    """A process that holds a shard did not answer, or the shards do not fit together."""


class Ranks:
    """The processes of a group, and the few things that they tell each other. Also what one process alone needs.

    group: a process group, or None for a single process.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each; in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM) if self.size > 1 else tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest over all ranks; in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX) if self.size > 1 else tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in order; one shape on all."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._call("all_gather", parts, tensor.contiguous())
        return parts

    def recorded_sum(self, tensor: Tensor) -> Tensor:
        """`sum` of a copy, with its gradient."""
        summed: Tensor = _Sum.apply(tensor, self)
        return summed

    def check_same(self, told: Mapping[str, object]) -> None:
        """Raise ShardError, naming what differs, unless every rank gave the same; one small message.

        told: by name, tensors, or what says all of itself by str().
        """
        if self.size == 1:
            return
        marks = torch.tensor([_mark(part) for part in told.values()], device=self.device())
        gathered = torch.stack(self.gather(marks))
        same = (gathered == gathered[0]).all(0).tolist()
        other = [name for name, fits in zip(told, same, strict=True) if not fits]
        if other:
            raise ShardError(f"the ranks were given different {', '.join(other)}; each needs the same")

    def device(self) -> torch.device:
        """Where what the ranks tell each other must lie."""
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def _reduce(self, tensor: Tensor, op: Any) -> Tensor:
        tensor = tensor.contiguous()
        self._call("all_reduce", tensor, op)
        return tensor

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            getattr(dist, name)(*arguments, group=self.group)
        except RuntimeError as error:
            detail = (str(error).splitlines() or [""])[0]
            raise ShardError(
                f"rank {self.rank} of {self.size}: another rank was lost or did not answer in time during {name} "
                f"({detail}). The shards of the lost process are needed: start all of them again"
            ) from error

    def __reduce__(self) -> Any:
        raise TypeError(
            "patterns that are spread over processes cannot be copied or pickled: make them in each one"
        )


class _Sum(torch.autograd.Function):
    """The sum over ranks. Every rank computes the same from it, so each one's gradient is the whole one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


ALONE = Ranks()


class ShardedPatterns(PatternSource):
    """This process's share of stored patterns; together the ranks of a group hold all of them.

        patterns = ShardedPatterns(open_patterns(f"patterns-{rank}.npy"))
        retrieve(queries, patterns, beta=8.0)

    local: tensor (N_r, d) or another source: the patterns of this rank; in the order of the ranks they are the whole.
        N_r may differ, width and dtype may not. A tensor may require grad, on all ranks or on none: its gradient is
        that of this rank's patterns. Masks and values are those of this rank's patterns, too.
    group: a process group; None makes one of all processes, whose calls end after `timeout` seconds.
    timeout: how long this rank waits for another one (default 60: a pass over a shard takes seconds), after which a
        ShardError is raised instead of waiting for ever. A group that is given has its own.

    Every rank gives the same queries and the same settings, and gets the same result; that they are the same is
    checked. Noise is that of the first rank. A loss that is computed alike on every rank gives each the whole gradient
    of queries and beta. Making one is a collective call. Raises ShardError where shards do not fit together,
    ValueError without torch.distributed.
    """

    def __init__(self, local: Tensor | PatternSource, group: Any = None, timeout: float = 60.0) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "patterns are spread over processes, but torch.distributed is not initialised; call "
                "torch.distributed.init_process_group first, or give the patterns themselves to one process"
            )
        if not timeout > 0:
            raise ValueError(f"timeout must be > 0 seconds, got {timeout!r}")
        if isinstance(local, ShardedPatterns) or not isinstance(local, (Tensor, PatternSource)):
            raise TypeError(
                f"local must be a tensor or a source such as open_patterns(file), got {type(local).__name__}"
            )
        if isinstance(local, Tensor):
            check_float_tensor("local", local)
        self.local = TensorPatterns(local) if isinstance(local, Tensor) else local
        self.ranks = Ranks(_all(timeout) if group is None else group)
        self.block = self.local.block
        self.width, self.dtype = self.local.width, self.local.dtype
        shapes = self._shapes()
        self.count = sum(shape[0] for shape in shapes)
        self.start = sum(shape[0] for shape in shapes[: self.ranks.rank])

    def _shapes(self) -> list[tuple[int, int, int, int]]:
        """Count, width, bytes a number and a mark of the dtype, of every shard."""
        numbers = [self.local.count, self.width, self.dtype.itemsize, _mark(str(self.dtype))]
        about = torch.tensor(numbers, device=self.ranks.device())
        shapes = [tuple(int(n) for n in part) for part in self.ranks.gather(about)]
        if len({shape[1:] for shape in shapes}) > 1:
            told = "; ".join(
                f"rank {rank}: {n} x {d}, {size} bytes a number"
                for rank, (n, d, size, _) in enumerate(shapes)
            )
            raise ShardError(f"the shards have different widths or dtypes ({told}); all need the same")
        return shapes  # type: ignore[return-value]

    def blocks(self, size: int) -> Iterator[Tensor]:
        """Those of this rank."""
        return self.local.blocks(size)

    def rows(self, index: Tensor) -> Tensor:
        """The patterns of these numbers among all ranks, without gradient; a collective call."""
        mine = (index >= self.start) & (index < self.start + self.local.count)
        found = self.local.rows((index - self.start).clamp(0, self.local.count - 1)).detach()
        found = found.masked_fill(~mine[:, None].to(found.device), 0.0)
        return self.ranks.sum(found if self.ranks.size == 1 else found.to(self.ranks.device()))

    def __repr__(self) -> str:
        return f"ShardedPatterns(rank {self.ranks.rank} of {self.ranks.size}: {self.local!r}, {self.count} in all)"


def _all(timeout: float) -> Any:
    """A new group of all processes."""
    try:
        return dist.new_group(timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        detail = (str(error).splitlines() or [""])[0]
        raise ShardError(
            f"rank {dist.get_rank()} of {dist.get_world_size()}: no group of all processes within {timeout:g} seconds "
            f"({detail}). Start all of them, and let each make its patterns"
        ) from error


def _mark(part: object) -> int:
    """63 bits that tell one thing from another, the same in every process."""
    if isinstance(part, Tensor):
        flat = part.detach().contiguous().reshape(-1).cpu()
        content = f"{tuple(part.shape)} {part.dtype}".encode() + flat.view(torch.uint8).numpy().tobytes()
    else:
        content = str(part).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def split_patterns(
    patterns: Tensor | TensorPatterns, group: Any = None, timeout: float = 60.0
) -> ShardedPatterns:
    """This rank's equal share of patterns that every process can see: a tensor, or a file that all of them map.

    group, timeout: see `ShardedPatterns`. The first ranks have one pattern more where they do not divide evenly.
    """
    whole = (
        patterns.tensor if isinstance(patterns, TensorPatterns) else check_float_tensor("patterns", patterns)
    )
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("split_patterns needs torch.distributed; call init_process_group first")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if len(whole) < size:
        raise ValueError(f"{len(whole)} patterns cannot be spread over {size} processes; use fewer processes")
    share = whole.tensor_split(size)[rank]
    return ShardedPatterns(TensorPatterns(share, getattr(patterns, "block", None)), group, timeout)
