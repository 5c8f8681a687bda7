"""How strongly something diffuses: a number >= 0, or one that is learned and stays so."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hopdeq_lwpf._layout import check_number, lay, lowest


class Strength(nn.Module):
    """A number >= 0, or one a head, (H,).

    value: a number, or a tensor that broadcasts to the batch shape of what diffuses.
    entries: how many of them there are, all alike at first, (entries,).
    learn: make it a Parameter: `raw`, whose softplus is the strength, so that no step of an optimiser makes it
        negative, which would sharpen what it should smooth without bound. It must begin above 0, where softplus
        has a slope.
    Raises ValueError for a value below 0, or 0 with learn; TypeError for a Parameter without learn: what an optimiser
    moves freely may become negative.
    """

    def __init__(
        self, name: str, value: float | Tensor, *, learn: bool = False, entries: int | None = None
    ) -> None:
        super().__init__()
        if isinstance(value, nn.Parameter) and not learn:
            raise TypeError(
                f"{name} must stay >= 0 while it is learned, which a Parameter does not: give its value as a tensor "
                f"and learn_{name}=True (layers), or Strength({name!r}, value, learn=True)"
            )
        check_number(name, value)
        if lowest(value) < 0 or (learn and lowest(value) <= 0):
            least = "> 0, to be learned" if learn else ">= 0"
            raise ValueError(f"{name} must be {least}, got {value!r}")
        self.name = name
        self.learned = learn
        if learn:
            start = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
            start = start if entries is None else start.expand(entries).clone()
            self.raw = nn.Parameter(start + torch.log(-torch.expm1(-start)))  # the inverse of softplus
        elif isinstance(value, Tensor):
            self.register_buffer("fixed", value)
        else:
            self.fixed = float(value)

    @property
    def off(self) -> bool:
        """Whether it is 0 and stays so."""
        return not self.learned and isinstance(self.fixed, float) and self.fixed == 0.0

    def forward(self) -> float | Tensor:
        """The number, or the tensor."""
        return functional.softplus(self.raw) if self.learned else self.fixed

    def over(self, batch: tuple[int, ...], like: Tensor) -> float | Tensor:
        """A number, a scalar tensor, or one entry a problem, of shape `batch`, in the dtype of `like`."""
        value = self()
        if not isinstance(value, Tensor) or value.numel() == 1:
            return value if not isinstance(value, Tensor) else value.reshape(()).to(like.dtype)
        query = like.new_empty((*batch, 0))
        laid = lay(self.name, value, query)
        assert isinstance(laid, Tensor)
        return laid.reshape(batch)

    def extra_repr(self) -> str:
        """Name and value."""
        value = self()
        if isinstance(value, Tensor) and value.is_meta:
            return f"{self.name}=..." + (", learned" if self.learned else "")
        numbers = [value] if isinstance(value, float) else value.detach().reshape(-1).tolist()
        shown = ", ".join(f"{number:.4g}" for number in numbers)
        return f"{self.name}={shown}" + (", learned" if self.learned else "")


def make_strength(name: str, value: float | Tensor | Strength) -> Strength:
    """The strength that is meant."""
    return value if isinstance(value, Strength) else Strength(name, value)
