"""Which layers of a hierarchical memory are connected, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hopdeq_lwpf.forgetting import Forgetting, make_forgetting
from hopdeq_lwpf.models.lagrangians import Lagrangian, Neurons, make_lagrangian
from hopdeq_lwpf.solvers.base import check_count


@dataclass(frozen=True)
class LayerGraph:
    """Widths of the layers, input first, and the pairs (i, j), i < j, between which there are weights."""

    widths: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, layers: Sequence[int], skips: Iterable[Sequence[int]] = ()) -> LayerGraph:
        """Neighbours are connected, and the layers of each pair in `skips`, in either order.

        Raises TypeError or ValueError for less than three layers, a width below 1, a pair that is no skip.
        """
        if isinstance(layers, (str, int)) or not isinstance(layers, Iterable) or len(tuple(layers)) < 3:
            raise ValueError(
                f"layers must be a list of at least three widths (input, hidden ..., output), got {layers!r}"
            )
        widths = tuple(layers)
        for number, width in enumerate(widths):
            check_count(f"layers[{number}]", width, 1)
        pairs = [(i, i + 1) for i in range(len(widths) - 1)]
        for skip in skips:
            pair = _pair(skip, len(widths))
            if pair in pairs:
                raise ValueError(f"skips names the layers {pair}, which are connected already")
            pairs.append(pair)
        return cls(widths, tuple(sorted(pairs)))

    @property
    def last(self) -> int:
        """The number of the output layer."""
        return len(self.widths) - 1

    @property
    def free(self) -> tuple[int, ...]:
        """The layers that have a state: all but the input, which is clamped."""
        return tuple(range(1, len(self.widths)))

    @property
    def even(self) -> tuple[int, ...]:
        return self.free[1::2]

    @property
    def odd(self) -> tuple[int, ...]:
        return self.free[::2]

    @property
    def same_parity(self) -> tuple[tuple[int, int], ...]:
        """The pairs that join two even layers or two odd ones."""
        return tuple((i, j) for i, j in self.pairs if (j - i) % 2 == 0)

    def check_even_odd(self) -> None:
        """Raise where two layers of one parity are connected: they cannot be updated at once."""
        for i, j in self.same_parity:
            parity = "even" if i % 2 == 0 else "odd"
            raise ValueError(
                f"even_odd=True needs every connection to join an even and an odd layer, but skips has "
                f"{(i, j)}, both {parity}; leave it out or use even_odd=False"
            )


def _pair(skip: object, count: int) -> tuple[int, int]:
    numbers = tuple(skip) if isinstance(skip, Iterable) else ()
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    if len(numbers) != 2 or not whole or not all(0 <= number < count for number in numbers):
        raise ValueError(f"skips must hold pairs of layer numbers from 0 to {count - 1}, got {skip!r}")
    i, j = sorted(numbers)
    if i == j:
        raise ValueError(f"skips has {skip!r}: the neurons of one layer are not connected with each other")
    return i, j


def make_neurons(
    graph: LayerGraph,
    lagrangian: str | Lagrangian | Sequence[str | Lagrangian] | Mapping[int, str | Lagrangian],
    forgetting: None | str | Forgetting | Mapping[int, None | str | Forgetting],
    default: str,
) -> list[Neurons]:
    """The neurons of each layer, input first.

    lagrangian: one for all layers, a sequence with one a layer, or a mapping from layer numbers; `default` for layers
    that it does not name. forgetting: one for all hidden layers, or a mapping from layer numbers, output included.
    """
    count = len(graph.widths)
    if isinstance(lagrangian, Mapping):
        _check_numbers("lagrangian", lagrangian, range(count))
        chosen: Sequence[Any] = [lagrangian.get(i, default) for i in range(count)]
    elif isinstance(lagrangian, (list, tuple)):
        if len(lagrangian) != count:
            raise ValueError(
                f"lagrangian has {len(lagrangian)} entries for {count} layers; give one a layer, input included"
            )
        chosen = lagrangian
    else:
        chosen = [lagrangian] * count
    if isinstance(forgetting, Mapping):
        _check_numbers("forgetting", forgetting, graph.free)
        units = [forgetting.get(i) for i in range(count)]
    else:
        hidden = graph.free[:-1]
        units = [forgetting if i in hidden else None for i in range(count)]
        make_forgetting(forgetting)  # an error here names the argument as it was given
    return [Neurons(make_lagrangian(a), make_forgetting(b)) for a, b in zip(chosen, units, strict=True)]


def _check_numbers(name: str, given: Mapping[Any, Any], allowed: Iterable[int]) -> None:
    numbers = list(allowed)
    for number in given:
        if isinstance(number, bool) or number not in numbers:
            raise ValueError(
                f"{name} names the layer {number!r}; it may name the layers {numbers[0]} to {numbers[-1]}"
            )
