"""One matrix for any state: a pytree of tensors with a batch shape becomes (problems, numbers a problem)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hopdeq_lwpf._types import WIDE, Context, Matvec, State, check_float_tensor, identity
from hopdeq_lwpf.solvers.base import Deferred


@dataclass(frozen=True)
class StateView:
    """How a state is laid out, so that solvers see (B, n) in float32 or wider and f sees what it expects."""

    batch_shape: torch.Size
    shapes: tuple[torch.Size, ...]  # the state part of each leaf
    dtypes: tuple[torch.dtype, ...]
    spec: Any
    work: torch.dtype

    @classmethod
    def of(cls, f: Callable[..., State], z: State) -> StateView:
        """The layout of `z` under the `state_ndim` that f declares (default: all but dim 0)."""
        leaves, spec = pytree.tree_flatten(z)
        if not leaves:
            raise TypeError("the state z0 holds no tensor")
        declared = getattr(f, "state_ndim", None)
        batches, shapes = [], []
        for leaf in leaves:
            check_float_tensor("z0", leaf)
            ndim = leaf.ndim - 1 if declared is None else declared
            if not 0 <= ndim <= leaf.ndim or (declared is None and leaf.ndim == 0):
                raise ValueError(
                    f"the state z0 has shape {tuple(leaf.shape)}; it needs at least "
                    f"{1 if declared is None else declared} dimensions (f.state_ndim={declared})"
                )
            batches.append(leaf.shape[: leaf.ndim - ndim])
            shapes.append(leaf.shape[leaf.ndim - ndim :])
        if any(batch != batches[0] for batch in batches):
            raise ValueError(
                f"the tensors of the state have different batch shapes: {[tuple(b) for b in batches]}"
            )
        dtypes = tuple(leaf.dtype for leaf in leaves)
        work = torch.float32
        for dtype in dtypes:
            work = torch.promote_types(work, WIDE.get(dtype, dtype))
        return cls(batches[0], tuple(shapes), dtypes, spec, work)

    @property
    def plain(self) -> bool:
        """Whether the state is (B, n) in the working dtype already, as in most retrieval."""
        return len(self.batch_shape) == len(self.shapes[0]) == len(self.shapes) == 1 and (
            self.spec.is_leaf() and self.dtypes[0] == self.work
        )

    @property
    def problems(self) -> int:
        return self.batch_shape.numel()

    def flatten(self, z: State) -> Tensor:
        """State -> (B, n) in the working dtype; dicts may come in any order of their keys."""
        leaves = [z] if isinstance(z, Tensor) else self.spec.flatten_up_to(z)
        flat = [
            leaf.reshape(self._rows(leaf, shape), shape.numel()).to(self.work)
            for leaf, shape in zip(leaves, self.shapes, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat, 1)

    @staticmethod
    def _rows(leaf: Tensor, shape: torch.Size) -> int:
        return leaf.shape[: leaf.ndim - len(shape)].numel()

    def unflatten(self, flat: Tensor) -> State:
        """(B, n) -> state; fewer rows than problems get the batch shape (rows,)."""
        batch = self.batch_shape if flat.shape[0] == self.problems else flat.shape[:1]
        if len(self.shapes) == 1:
            leaves = [flat.reshape(batch + self.shapes[0]).to(self.dtypes[0])]
        else:
            parts = flat.split([shape.numel() for shape in self.shapes], 1)
            leaves = [
                part.reshape(batch + shape).to(dtype)
                for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
            ]
        return pytree.tree_unflatten(leaves, self.spec)

    def check(self, fz: State) -> None:
        """Raise unless f returned what it was given: same structure, same shapes."""
        expected = [tuple(self.batch_shape + shape) for shape in self.shapes]
        leaves, same = pytree.tree_leaves(fz), pytree.tree_structure(fz).num_leaves == len(self.shapes)
        if self.spec.is_leaf():
            same = isinstance(fz, Tensor)
        elif same:
            try:
                leaves = self.spec.flatten_up_to(fz)
            except ValueError:
                same = False
        got = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
        if not same or got != expected:
            how = "" if same else f", structured as {pytree.tree_structure(fz)} instead of {self.spec}"
            raise ValueError(f"f(z, x) must return the shape of z, {expected}; it returned {got}{how}")


class FlatFunction:
    """f over flat states: (B, n) -> (B, n), with energy and metric where f has them."""

    _trusted: Callable[..., Tensor] | None = None

    def __init__(
        self,
        f: Callable[..., State],
        x: Context,
        view: StateView,
        device: str = "cpu",
        *,
        reads: bool = False,
    ) -> None:
        if reads and not callable(getattr(f, "step", None)):
            raise TypeError(f"read_out needs f.step(z, x) -> (f(z, x), read-out), and {f!r} has none")
        self.reads = reads  # whether the caller wants the read-out of f at the equilibrium
        self.f = f
        self.x = x
        self.view = view
        self.device = device
        self.has_energy = bool(getattr(f, "has_energy", False))
        self._evaluate = getattr(f, "evaluate", None)
        self._select = getattr(f, "select", None)
        self._trusted = getattr(f, "trusted", None)
        self._plain = view.plain
        self._checked = False
        # What one rounding of f costs, relative; guards must allow for it.
        dtypes = set(view.dtypes)
        self.autocast = torch.is_autocast_enabled(device)
        self.autocast_dtype = torch.get_autocast_dtype(device)
        if self.autocast:
            dtypes.add(self.autocast_dtype)
        self.eps = max(torch.finfo(dtype).eps for dtype in dtypes)

    def __call__(self, flat: Tensor) -> Tensor:
        if self._plain and self._checked:
            return self.f(flat, self.x)
        return self._flatten(self.f(self.view.unflatten(flat), self.x))

    def step(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """f, (B, n) -> (B, n), and what it reads out at this state, as f returns it."""
        f: Any = self.f
        direct = self._plain and self._checked
        fz, read = f.step(flat if direct else self.view.unflatten(flat), self.x)
        if not isinstance(read, Tensor):
            raise TypeError(f"f.step(z, x) must read out one tensor, got {type(read).__name__}")
        return fz if direct else self._flatten(fz), read

    def evaluate(self, flat: Tensor) -> tuple[Tensor, Deferred, Tensor | None]:
        """f, its energy when it is asked for, and the piece of f that the state lies in: (B, n), (B,), (B,) or
        None.
        """
        f: Any = self.f
        if self._evaluate is None:
            z = self.view.unflatten(flat)
            return self(flat), self._deferred(lambda: f.energy(z, self.x)), None
        direct = self._plain and self._checked
        fz, energy, piece = self._evaluate(flat if direct else self.view.unflatten(flat), self.x)
        compute = energy if callable(energy) else lambda: energy
        image = fz if direct else self._flatten(fz)
        return image, self._deferred(compute), None if piece is None else piece.reshape(-1)

    def _deferred(self, energy: Callable[[], Tensor]) -> Deferred:
        """The energy when a solver asks for it, under the autocast that f runs under."""

        def compute() -> Tensor:
            with self.recorded_precision() if self.autocast else nullcontext():
                return energy().reshape(-1)

        return Deferred(compute)

    def _flatten(self, fz: State) -> Tensor:
        """What f returned as (B, n); checked once."""
        if not self._checked:
            self.view.check(fz)
            # Under autocast f may return another dtype than it was given.
            self._plain = self._plain and fz.dtype == self.view.work
            self._checked = True
        return self.view.flatten(fz)

    def trusted(self, flat: Tensor) -> Tensor | None:
        """(B,) bool: where f is what it stands for; None: everywhere, as of nearly every f."""
        if self._trusted is None:
            return None
        rows: Tensor = self._trusted(self.view.unflatten(flat), self.x).reshape(-1)
        return rows

    def metric(self, flat: Tensor) -> Matvec | None:
        """M(z) over flat vectors, or None where f declares none."""
        declared = getattr(self.f, "metric", None)
        apply = None if declared is None else declared(self.view.unflatten(flat), self.x)
        if apply is None or apply is identity:
            return apply
        return lambda v: self.view.flatten(apply(self.view.unflatten(v)))

    def with_context(self, x: Context) -> FlatFunction:
        """The same function of another x, laid out alike."""
        other = copy.copy(self)
        other.x = x
        return other

    def of_function(self, f: Any) -> FlatFunction:
        """The same layout for another f; not narrowed, since the rows of x are only known to the first."""
        other = copy.copy(self)
        other.f, other._evaluate, other._select, other._trusted = f, getattr(f, "evaluate", None), None, None
        return other

    def full_precision(self) -> AbstractContextManager[object]:
        """Where solvers do their own algebra: autocast is for f only."""
        return torch.autocast(self.device, enabled=False) if self.autocast else nullcontext()

    def recorded_precision(self) -> AbstractContextManager[object]:
        """The autocast state that f was first called under."""
        return torch.autocast(self.device, dtype=self.autocast_dtype, enabled=self.autocast)

    def narrow(self, live: Tensor) -> tuple[FlatFunction, Tensor] | None:
        """The function over a subset of rows that holds all live ones, and those rows; None if f cannot."""
        if self._select is None:
            return None
        x, rows = self._select(self.x, live)
        narrowed = FlatFunction(self.f, x, self.view, self.device)
        narrowed._checked, narrowed._plain = True, self._plain
        return narrowed, rows
