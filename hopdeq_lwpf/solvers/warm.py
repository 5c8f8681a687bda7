"""Warm starts: the next solve of a sample begins where its last one ended."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hopdeq_lwpf._types import Solution, State
from hopdeq_lwpf.solvers.base import transformed


class WarmStart:
    """Equilibria by sample index, kept on the CPU in the dtype that the state had at first.

    Only converged problems are kept: an iterate of a failed solve would make the next one start from it. A
    sample that is not known starts where it would without this. While parameters change between two epochs,
    the equilibrium of a sample moves little, so that a solve from there takes fewer steps; where f has several
    equilibria it stays with the one that it has, though the query may by now lie in the basin of another
    (docs/benchmarks.md has figures).
    """

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._stored: list[Tensor] = []  # one tensor a leaf of the state, (capacity, *shape of one problem)

    def __len__(self) -> int:
        """How many samples are known."""
        return len(self._places)

    def clear(self) -> None:
        """Forget all samples, as after a change of data or model."""
        self._places.clear()
        self._stored.clear()

    def start(self, index: Tensor, z0: State) -> State:
        """z0 with the rows of known samples replaced by their last equilibria, without gradient.

        index: (B,) integers, the samples of the batch. z0: a tensor or pytree, (B, *state); a sample may be several
        problems.
        """
        names = _check(index, z0)
        rows = [row for row, name in enumerate(names) if name in self._places]
        if not rows:
            return z0
        places = torch.tensor([self._places[names[row]] for row in rows])
        leaves, spec = pytree.tree_flatten(z0)
        self._check_alike(leaves)
        filled = []
        for leaf, stored in zip(leaves, self._stored, strict=True):
            known = stored.index_select(0, places).to(leaf)
            filled.append(leaf.detach().index_copy(0, torch.tensor(rows, device=leaf.device), known))
        return pytree.tree_unflatten(filled, spec)

    def keep(self, index: Tensor, solution: Solution) -> None:
        """Store the states of the converged problems of a solve under their samples."""
        names = _check(index, solution.state)
        # Where a sample is several problems, such as tokens, all of them must have converged.
        done = solution.converged
        done = done.flatten(1).all(1) if done.ndim > 1 else done
        rows = done.nonzero().squeeze(1).tolist()
        leaves = [leaf.detach() for leaf in pytree.tree_leaves(solution.state)]
        self._check_alike(leaves)
        places = []
        for row in rows:
            places.append(self._places.setdefault(names[row], len(self._places)))
        self._reserve(leaves)
        where = torch.tensor(places, dtype=torch.int64)
        for i, leaf in enumerate(leaves):
            self._stored[i].index_copy_(0, where, leaf[rows].to(self._stored[i]))

    def _reserve(self, leaves: list[Tensor]) -> None:
        """Room for every known sample; the capacity doubles, so that a sample costs its own size."""
        needed = len(self._places)
        held = len(self._stored[0]) if self._stored else 0
        if needed <= held and self._stored:
            return
        capacity = max(needed, 2 * held)
        kinds = self._stored or leaves  # the dtype of the first call stays, whatever the layer becomes
        grown = [
            torch.empty((capacity, *leaf.shape[1:]), dtype=kind.dtype)
            for leaf, kind in zip(leaves, kinds, strict=True)
        ]
        for new, old in zip(grown, self._stored, strict=False):
            new[:held] = old
        self._stored = grown

    def _check_alike(self, leaves: list[Tensor]) -> None:
        old = [tuple(stored.shape[1:]) for stored in self._stored]
        new = [tuple(leaf.shape[1:]) for leaf in leaves]
        if old and old != new:
            raise ValueError(
                f"the states have shapes {new} a sample, but those kept so far have {old}; use clear() or another layer"
            )

    def __repr__(self) -> str:
        return f"WarmStart({len(self)} samples)"


def _check(index: Tensor, state: State) -> list[int]:
    """The samples as a list, one a problem."""
    if transformed():
        raise TypeError("warm starts remember samples, which torch.func cannot follow; call without index")
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be an integer tensor with one sample number a problem, got {kind}")
    batch = {leaf.shape[:1] for leaf in pytree.tree_leaves(state)}
    if index.ndim != 1 or batch != {index.shape}:
        raise ValueError(
            f"index must have shape (B,) as the batch {sorted(map(tuple, batch))}, got {tuple(index.shape)}"
        )
    names: list[int] = index.tolist()
    if len(set(names)) < len(names):
        raise ValueError("index holds a sample twice; each problem of a batch needs a number of its own")
    return names
