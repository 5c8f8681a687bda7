"""What the Hopfield layers have in common: hflayers' weights, and a look at the last call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from hopdeq_lwpf._types import Solution
from hopdeq_lwpf.models import hflayers
from hopdeq_lwpf.models.association import Associated

if TYPE_CHECKING:
    from hopdeq_lwpf.models.hopfield import Hopfield

Layer = TypeVar("Layer", bound="HopfieldModule")


class HopfieldModule(nn.Module):
    """What the three layers have in common."""

    @classmethod
    def from_hflayers(cls: type[Layer], state_dict: Mapping[str, Tensor], **options: Any) -> Layer:
        """A layer with the weights of hflayers' layer of this name, built with the same options.

        options: those that theirs was built with, by their names (scaling, update_steps_max, ...); also ours
        where theirs has none. The query enters where theirs does, inject="start", unless `inject` is given.
        See docs/from-hflayers.md for what differs. Raises ValueError for weights that do not fit the options.
        """
        layer = cls(**hflayers.translate_options(options))
        layer.load_hflayers_state_dict(state_dict)
        return layer

    def load_hflayers_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy the weights of hflayers' layer of this name; it must have been built with the same options."""
        hflayers.load(self, state_dict)

    def _core(self) -> Hopfield:
        raise NotImplementedError(f"{type(self).__name__} must override _core()")

    def _last(self) -> Associated | None:
        return self._core().last_association

    @property
    def batch_first(self) -> bool:
        """Whether the input is (B, N, width)."""
        return self._core().options.batch_first

    @property
    def q(self) -> Tensor | None:
        """State patterns of the last call as they were associated, (B, H, L, d), detached; None before one."""
        last = self._last()
        return None if last is None else last.heads.q

    @property
    def k(self) -> Tensor | None:
        """Stored patterns of the last call, (B, H, S, d), detached."""
        last = self._last()
        return None if last is None else last.heads.k

    @property
    def v(self) -> Tensor | None:
        """Values of the last call, (B, H, S, dv), detached."""
        last = self._last()
        return None if last is None else last.heads.v

    @property
    def association_matrix(self) -> Tensor | None:
        """Weights of the last read-out before dropout, (B, H, L, S), computed now, without gradient."""
        last = self._last()
        return None if last is None else last.weights()

    @property
    def energy(self) -> Tensor | None:
        """Of the states of the last call, (B, H, L); (B, H) where states diffuse; None where there is none (see
        `Retrieval.has_energy`).
        """
        last = self._last()
        return None if last is None else last.energy()

    @property
    def last_solution(self) -> Solution | None:
        """The Solution of the last call, one entry a head and state pattern, (B, H, L), without gradient; where states
        diffuse, all states of a head are one problem, (B, H).

        `value` is the read-out of the heads, `note` says how many states had every stored pattern masked.
        Not recorded in a call that torch.compile or torch.func traces.
        """
        last = self._last()
        return None if last is None else last.solution()
