"""One read of a Sparse Distributed Memory as a fixed-point function. Knows no solver."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hopdeq_lwpf._layout import check_input, group, lay_mask, without_padding
from hopdeq_lwpf._types import check_float_tensor, unknown, wide
from hopdeq_lwpf.forgetting import Forgetting, Keep, make_forgetting
from hopdeq_lwpf.models.sdm.neurons import Content, Neurons
from hopdeq_lwpf.models.sdm.weights import Attention, ReadWeights, check_space, check_weights, products
from hopdeq_lwpf.normalization import Sphere
from hopdeq_lwpf.retrieval import combine
from hopdeq_lwpf.separation import Softmax

EMPTY = ("keep", "mean", "error")
READ_OUTS = ("threshold", "sphere", "identity")
SPHERE = Sphere()
SOFTMAX = Softmax()
# A sum of weights with signs within so many roundings of 0 is a tie; ties become 0, as published.
TIE = 8


class EmptyReadError(RuntimeError):
    """A query reached no stored pattern, and the memory was told to raise then."""


class SDMContext(NamedTuple):
    """What stays fixed during a solve; built by `SDMFunction.prepare`. B = number of queries."""

    keys: Tensor  # (N, n) or (G, N, n), float32 or wider: bipolar, or of length 1
    pointers: (
        Tensor | None
    )  # (N, w) or (G, N, w): what is read out in place of the keys; bipolar if thresholded
    mask: Tensor | None  # bool (N,) or (B, N); True = ignore
    threshold: Tensor | None  # of the forgetting unit
    draws: Tensor | None  # (N,): of finite neurons
    content: Content | None  # of explicit neurons, where no weight a pattern is needed
    pointed: Content | None  # the same of the pointers
    start: Tensor  # (*batch, n)


class SDMFunction(nn.Module):
    """f(z, x) = post(P^T w(z)): one read of a memory of patterns P, w the normalised read weights.

    space: "binary": patterns and states of 0 and 1; post puts a bit to 1 where the patterns that have it weigh more
        than those that do not; ties become 0. "continuous": patterns and states of length 1; post normalises, so that
        the residual is that of the very map that is iterated.
    weights, forgetting, empty, read_out: see `SDM`.

    With forgetting w = D' * softmax(D(logits)); a binary bit is decided among the patterns that are kept.

    Where the weights are `Attention`, E(z) = -L(D(beta cos)) / beta with L the logarithm of the sum of exponentials; a
    read maximises a linear function that lies below -E, over the sphere or the hypercube, so that plain iteration never
    raises E. Other weights have no energy.
    """

    state_ndim = 1

    def __init__(
        self,
        weights: ReadWeights,
        *,
        space: str = "binary",
        forgetting: None | str | Forgetting = None,
        empty: str = "keep",
        read_out: str | None = None,
    ) -> None:
        super().__init__()
        self.weights = check_weights(weights)
        self.space = check_space(space)
        self.forgetting = make_forgetting(forgetting)
        if empty not in EMPTY:
            raise unknown("empty", empty, EMPTY)
        if read_out is not None and read_out not in READ_OUTS:
            raise unknown("read_out", read_out, READ_OUTS)
        self.empty = empty
        self.read_out = read_out

    @property
    def binary(self) -> bool:
        """Whether states are of 0 and 1."""
        return self.space == "binary"

    @property
    def smooth(self) -> bool:
        """Whether f is differentiable in the state; else it is piecewise constant and only plain iteration fits."""
        return not self.binary and self.weights.smooth

    @property
    def has_energy(self) -> bool:
        """Whether plain iteration is guaranteed never to raise `energy`."""
        return isinstance(self.weights, Attention) and bool(self.forgetting.has_energy)

    def prepare(
        self,
        query: Tensor | SDMContext,
        patterns: Tensor | None = None,
        pointers: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> SDMContext:
        """Check the input and lay it out; arguments as in `SDM.forward`. A context that was made passes as it is."""
        if isinstance(query, SDMContext):
            return query
        query, patterns = as_float("query", query, self.binary), as_float("patterns", patterns, self.binary)
        batch = check_input(query, patterns, mask)
        self.weights.check(query.shape[-1])
        if self.binary:
            check_bits("query", query, nan=True)
            check_bits("patterns", patterns if mask is None else without_padding(patterns, mask))
        if pointers is not None:
            pointers = self._lay_pointers(pointers, patterns, batch, mask)
        self._refuse_gradients(query, patterns)
        if mask is not None:
            patterns = without_padding(patterns, mask)
            mask = lay_mask(mask, batch, patterns)
        keys = self._normalised(patterns)
        keys = group(batch, keys) if keys.ndim > 2 else keys
        start = query if self.binary else SPHERE.apply(query)
        draws = self.weights.draw(keys.shape[-2])
        draws = None if draws is None else draws.to(keys)
        x = SDMContext(keys, pointers, mask, None, draws, None, None, start)
        x = self._store(x)
        if type(self.forgetting).draw is Forgetting.draw:
            return x
        logits, gone = self._logits(self._coordinates(start), x)
        return x._replace(threshold=self.forgetting.draw(logits, gone))

    def init(self, x: SDMContext) -> Tensor:
        """z0: the query, of length 1 in the continuous space."""
        return x.start

    def forward(self, z: Tensor, x: SDMContext) -> Tensor:
        """One read: (*batch, n) -> (*batch, n)."""
        return self._read(z, x)[0]

    def step(self, z: Tensor, x: SDMContext) -> tuple[Tensor, Tensor]:
        """f(z, x), and what is read out at z: the pointers (*batch, w), or f(z, x) where there are none."""
        image, read = self._read(z, x)
        return image, image if read is None else read

    def empty_reads(self, z: Tensor, x: SDMContext) -> Tensor:
        """Whether the read at z reaches nothing: bool (*batch)."""
        if self.weights.reaches_all and isinstance(self.forgetting, Keep) and x.mask is None:
            return torch.zeros(z.shape[:-1], dtype=torch.bool, device=z.device)
        flat = self._coordinates(z)
        if x.content is not None:
            load_only = x.content._replace(sums=x.content.sums[:, :0])
            empty = self._neurons().read(flat, load_only, self._unit(z))[1] <= 0
        else:
            empty = self._weigh(flat, x)[1]
        return empty.reshape(z.shape[:-1])

    def nearest(self, z: Tensor, x: SDMContext) -> tuple[Tensor, Tensor]:
        """Cosine with the nearest pattern that is not masked, and its index, -1 for NaN: (*batch) each."""
        flat = self._coordinates(z)
        with without_autocast(flat):
            cosine = products(flat, x.keys) / self._unit(flat)
        cosine, index = (cosine if x.mask is None else cosine.masked_fill(x.mask, -math.inf)).max(-1)
        index = index.masked_fill(~cosine.isfinite(), -1)
        return cosine.reshape(z.shape[:-1]), index.reshape(z.shape[:-1])

    def association(self, z: Tensor, x: SDMContext) -> Tensor:
        """The weight of each pattern in the read at z, (*batch, N); 0 in an empty read, unless it is their mean."""
        held, _, _ = self._weigh(self._coordinates(z), x)
        return held.reshape(*z.shape[:-1], held.shape[-1])

    def energy(self, z: Tensor, x: SDMContext) -> Tensor:
        """E(z), (*batch); inf for a continuous state longer than 1. Raises ValueError where there is none."""
        if not isinstance(self.weights, Attention):
            raise ValueError(f"energy is known for weights=Attention(beta) only, got {self.weights!r}")
        logits, gone = self._logits(self._coordinates(z), x)
        value, _ = self.forgetting.project(logits, x.threshold, gone)
        energy = -SOFTMAX.lagrangian(value, gone) / self.weights.at(z.shape[-1])
        energy = energy.reshape(z.shape[:-1])
        return energy if self.binary else energy + SPHERE.conjugate(z)

    def metric(self, z: Tensor, x: SDMContext) -> None:
        """None: the Jacobian is not known to be self-adjoint in any metric."""

    def select(self, x: SDMContext, live: Tensor) -> tuple[SDMContext, Tensor]:
        """The context of the live queries and their rows; of all where each group has patterns of its own."""
        if x.keys.ndim == 3:
            return x, torch.arange(len(live), device=live.device)
        rows = live.nonzero().squeeze(1)
        mask = x.mask if x.mask is None or x.mask.ndim < 2 else x.mask.index_select(0, rows)
        limit = x.threshold
        limit = limit if limit is None or limit.ndim < 2 else limit.index_select(0, rows)
        start = x.start.reshape(-1, x.start.shape[-1]).index_select(0, rows)
        return x._replace(mask=mask, threshold=limit, start=start), rows

    def _read(self, z: Tensor, x: SDMContext) -> tuple[Tensor, Tensor | None]:
        """f(z), and the read-out of the pointers where there are any; both in the batch shape of z."""
        with without_autocast(z):
            image, read = self._combined(self._coordinates(z), z, x)
        image = image.to(z.dtype).reshape(z.shape)
        if read is not None:
            read = self._posted(read, x).to(x.start.dtype).reshape(*z.shape[:-1], read.shape[-1])
        return image, read

    def _combined(self, flat: Tensor, z: Tensor, x: SDMContext) -> tuple[Tensor, Tensor | None]:
        """f, (B, n), and what the pointers sum to, (B, w)."""
        if x.content is not None:
            image, empty, read = self._through_neurons(flat, x)
        else:
            held, empty, total = self._weigh(flat, x)
            image = combine(held, x.keys)
            read = None if x.pointers is None else combine(held.to(x.pointers.dtype), x.pointers)
            if total is not None and self.binary:
                image = image / total
            if total is not None and read is not None and self._read_out(x) == "threshold":
                read = read / total.to(read.dtype)
        self._report(empty)
        image = decide(image) if self.binary else SPHERE.apply(image)
        if self.empty == "keep":
            image = torch.where(empty, z.reshape(image.shape).to(image.dtype), image)
        return image, read

    def _weigh(self, flat: Tensor, x: SDMContext) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weights (B, N), whether the read is empty (B, 1), and the weight that is kept (B, 1), None where it is 1."""
        if isinstance(self.forgetting, Keep) and not self.weights.reaches_all:
            return self._weigh_all(flat, x)
        logits, gone = self._logits(flat, x)
        value, kept = self.forgetting.project(logits, x.threshold, gone)
        held = SOFTMAX.weights(value, gone)
        held = held if kept is None else held * kept
        if kept is None and gone is None:
            return held, held.new_zeros(held.shape[0], 1, dtype=torch.bool), None
        total = held.detach().sum(-1, keepdim=True)
        empty = total == 0
        return self._filled(held, empty, x), empty, None if kept is None else total.masked_fill(empty, 1.0)

    def _weigh_all(self, flat: Tensor, x: SDMContext) -> tuple[Tensor, Tensor, None]:
        """The same without forgetting, in fewer passes."""
        with without_autocast(flat):
            logits = self.weights.logits(flat, x.keys, self._unit(flat), x.draws)
        logits = logits if x.mask is None else logits.masked_fill(x.mask, -math.inf)
        empty = logits.detach().amax(-1, keepdim=True) == -math.inf
        held = torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
        return self._filled(held, empty, x), empty, None

    def _filled(self, held: Tensor, empty: Tensor, x: SDMContext) -> Tensor:
        """The weights of empty reads, as `empty` says."""
        if self.empty != "mean":
            return held
        among = torch.ones_like(held) if x.mask is None else (~x.mask).to(held).expand_as(held)
        return torch.where(empty, among / among.sum(-1, keepdim=True).clamp_min(1.0), held)

    def _logits(self, flat: Tensor, x: SDMContext) -> tuple[Tensor, Tensor | None]:
        """(B, N), and which of them are out: masked, or out of reach."""
        with without_autocast(flat):
            logits = self.weights.logits(flat, x.keys, self._unit(flat), x.draws)
        if self.weights.reaches_all:
            return logits, x.mask
        far = logits == -math.inf
        return logits, far if x.mask is None else far | x.mask

    def _through_neurons(self, flat: Tensor, x: SDMContext) -> tuple[Tensor, Tensor, Tensor | None]:
        assert x.content is not None
        neurons, unit = self._neurons(), self._unit(flat)
        sums, load = neurons.read(flat, x.content, unit)
        empty = load <= 0
        divisor = load.masked_fill(empty, 1.0)
        read = None if x.pointed is None else neurons.read(flat, x.pointed, unit)[0] / divisor
        image = sums / divisor
        if self.empty == "mean":
            means = self._means(x)
            image = torch.where(empty, means[0], image)
            read = None if read is None else torch.where(empty, means[1].to(read.dtype), read)
        return image, empty, read

    def _means(self, x: SDMContext) -> tuple[Tensor, Tensor]:
        """The means of keys (n,) and of pointers (w,), or of the keys again where there are none."""
        among = x.keys.new_ones(x.keys.shape[0]) if x.mask is None else (~x.mask).to(x.keys)
        among = among / among.sum().clamp_min(1.0)
        mean = among @ x.keys
        return mean, mean if x.pointers is None else among @ x.pointers.to(among.dtype)

    def _store(self, x: SDMContext) -> SDMContext:
        """With what explicit neurons hold, where no weight of a single pattern is asked for."""
        shared = x.keys.ndim == 2 and (x.mask is None or x.mask.ndim < 2)
        if not (isinstance(self.weights, Neurons) and isinstance(self.forgetting, Keep) and shared):
            return x
        unit, amount = self._unit(x.keys), None if x.mask is None else (~x.mask).to(x.keys)
        with without_autocast(x.keys):
            content = self.weights.store(x.keys, x.keys, unit, amount)
            if x.pointers is None:
                return x._replace(content=content)
            return x._replace(
                content=content, pointed=self.weights.store(x.keys, x.pointers.to(x.keys), unit, amount)
            )

    def _neurons(self) -> Neurons:
        assert isinstance(self.weights, Neurons)  # who else has a content
        return self.weights

    def _coordinates(self, z: Tensor) -> Tensor:
        """States as keys are: (B, n), bipolar if binary."""
        flat = wide(z.reshape(-1, z.shape[-1]))
        return 2 * flat - 1 if self.binary else flat

    def _normalised(self, patterns: Tensor) -> Tensor:
        return 2 * wide(patterns) - 1 if self.binary else SPHERE.apply(wide(patterns))

    def _unit(self, z: Tensor) -> float:
        """What products of keys are at cosine 1."""
        return float(z.shape[-1]) if self.binary else 1.0

    def _report(self, empty: Tensor) -> None:
        if self.empty == "error" and bool(empty.any()):
            raise EmptyReadError(
                f"{int(empty.sum())} of {empty.numel()} queries reach no stored pattern; raise the radius d or "
                "the number of neurons, or build the memory with empty='keep' or 'mean'"
            )

    def _read_out(self, x: SDMContext) -> str:
        """How pointers are read out."""
        if self.read_out is not None:
            return self.read_out
        return "threshold" if self.binary else "identity"

    def _posted(self, read: Tensor, x: SDMContext) -> Tensor:
        how = self._read_out(x)
        if how == "identity":
            return read
        return decide(read) if how == "threshold" else SPHERE.apply(read)

    def _lay_pointers(
        self, pointers: Tensor, patterns: Tensor, batch: torch.Size, mask: Tensor | None
    ) -> Tensor:
        thresholded = self.read_out == "threshold" or (self.read_out is None and self.binary)
        pointers = as_float("pointers", pointers, thresholded)
        if pointers.shape[:-1] != patterns.shape[:-1]:
            raise ValueError(
                f"pointers must have one row a pattern, {tuple(patterns.shape[:-1])} + (w,); "
                f"got {tuple(pointers.shape)}"
            )
        pointers = pointers if mask is None else without_padding(pointers, mask)
        if thresholded:
            check_bits("pointers", pointers, hint="or read_out='identity'")
            if pointers.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    "pointers require grad, but a thresholded read-out has no gradient; build the memory with "
                    "read_out='identity', or call it under torch.no_grad()"
                )
            pointers = 2 * wide(pointers) - 1
        pointers = wide(pointers)
        return group(batch, pointers) if pointers.ndim > 2 else pointers

    def _refuse_gradients(self, query: Tensor, patterns: Tensor) -> None:
        if self.smooth or not torch.is_grad_enabled():
            return
        asked = {"query": query, "patterns": patterns, **dict(self.weights.named_parameters())}
        names = [name for name, tensor in asked.items() if tensor.requires_grad]
        if names:
            why = (
                "thresholds its states" if self.binary else f"has piecewise constant weights {self.weights!r}"
            )
            raise ValueError(
                f"{', '.join(names)} requires grad, but this memory {why}, so that no gradient passes; train with "
                "space='continuous' and Attention(beta) or Cap(d), or call it under torch.no_grad()"
            )


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Full precision: bfloat16 does not hold the whole numbers up to n that Hamming distances are made from."""
    device = tensor.device.type
    active = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if active else nullcontext()


def decide(signed: Tensor) -> Tensor:
    """1 where a mean of signs is above 0, else 0, ties too; NaN stays NaN."""
    ones = (signed > TIE * torch.finfo(signed.dtype).eps).to(signed.dtype)
    return torch.where(signed.isnan(), signed, ones)


def as_float(name: str, value: object, bits: bool) -> Tensor:
    """`value` as a floating-point tensor; whole numbers and booleans are taken where bits are meant."""
    if bits and isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
        return value.to(torch.get_default_dtype())
    return check_float_tensor(name, value)


def check_bits(name: str, value: Tensor, *, nan: bool = False, hint: str = "or space='continuous'") -> None:
    """Raise ValueError unless all entries are 0 or 1; nan: NaN passes, so that one bad row harms no other."""
    good = (value == 0) | (value == 1)
    good = good | value.isnan() if nan else good
    if not value.is_meta and not bool(good.all()):
        raise ValueError(
            f"{name} must hold 0 and 1 only, got {value[~good][0].item():g}; use ({name} > 0).to({name}.dtype), {hint}"
        )
