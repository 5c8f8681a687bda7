"""Classification of immune repertoires: sequences that Hopfield pooling attends to, as DeepRC does."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hopdeq_lwpf._types import Solution, unknown
from hopdeq_lwpf.models.layer_options import ELSEWHERE, PoolingOptions
from hopdeq_lwpf.models.learned_patterns import HopfieldPooling
from hopdeq_lwpf.models.sequence_bags import SequenceBags, top_rows, unpack
from hopdeq_lwpf.models.sequences import SequenceEmbedding
from hopdeq_lwpf.solvers.base import check_count

COUNTS = ("weight", "input")
# Of the first weights that make the logits: so small that training starts at the logit 0 of no evidence, not by
# unlearning the noise of a random read-out.
HEAD_STD = 1e-3


@dataclass(frozen=True)
class RepertoireClassifierOptions:
    """Options of `RepertoireClassifier` beside those of its pooling.

    kernels, kernel_size: of `SequenceEmbedding`, 32 and 9 as in DeepRC. attention_width, attention_layers: of
        `SequenceAttention`, 2 layers of 32 as in DeepRC.
    projected: False pools the keys and embeddings as they are, with learned queries, as DeepRC does with one;
        True sends them through the layer norms and projections of `HopfieldPooling`, which several heads need.
        None is True where num_heads is above 1.
    reduction: share of the sequences of a bag that pass the part with gradients: those with the highest scores
        of the first step, of several heads or queries the highest of each sequence. 0.1 in DeepRC; None, the
        default, is all of them.
    min_sequences: so many are left in any case, as far as the bag has them.
    counts: None leaves them out. "weight" adds log(count) to the score, so that a sequence counted c times equals
        c copies of it, and one counted 0 times none. "input" appends log(max(count, 1)), DeepRC's measure, to the
        embedding, so that attention and read-out both see it.
    outputs: logits of a repertoire.
    chunk: sequences that are embedded and scored at once without gradient. With 4,096, a bag of 20,000 of 20
        letters and reduction=0.1 takes 16 MB, forward and backward.
    """

    kernels: int = 32
    kernel_size: int = 9
    attention_width: int = 32
    attention_layers: int = 2
    projected: bool | None = None
    reduction: float | None = None
    min_sequences: int = 1
    counts: str | None = None
    outputs: int = 1
    chunk: int = 4096

    def __post_init__(self) -> None:
        for name in ("kernels", "kernel_size", "attention_width", "min_sequences", "outputs", "chunk"):
            check_count(name, getattr(self, name), 1)
        check_count("attention_layers", self.attention_layers, 0)
        if self.projected is not None and not isinstance(self.projected, bool):
            raise TypeError(f"projected must be True, False or None, got {self.projected!r}")
        share = self.reduction
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if share is not None and not (number and 0 < share <= 1):
            raise ValueError(f"reduction must be a share in (0, 1], or None for all, got {share!r}")
        if self.counts is not None and self.counts not in COUNTS:
            raise unknown("counts", self.counts, COUNTS)


# What the classifier decides for its pooling, and what has a meaning only where something is projected.
DECIDED = (
    "input_size", "stored_pattern_size", "pattern_projection_size", "stored_pattern_as_static",
    "state_pattern_as_static", "pattern_projection_as_static", "batch_first",
)  # fmt: skip
PROJECTIONS = (
    "hidden_size", "output_size", "pattern_size", "input_bias", "pattern_projection_as_connected",
    "disable_out_projection",
)  # fmt: skip
OWN = tuple(inspect.signature(RepertoireClassifierOptions).parameters.values())
POOLING = tuple(p for p in inspect.signature(PoolingOptions).parameters.values() if p.name not in DECIDED)


class SequenceAttention(nn.Module):
    """Embeddings (*batch, width) -> keys (*batch, out): layers of a linear map and SELU, the network f of DeepRC.

    layers: 2, hidden: 32, as in DeepRC; without layers the embeddings are the keys. Weights start by LeCun's
    rule, variance 1 / inputs, which SELU is made for (Klambauer et al. 2017).
    """

    def __init__(self, width: int, hidden: int = 32, layers: int = 2) -> None:
        super().__init__()
        for name, value, low in (("width", width, 1), ("hidden", hidden, 1), ("layers", layers, 0)):
            check_count(name, value, low)
        widths = [width, *[hidden] * layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.out_features = widths[-1]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights; biases 0."""
        for layer in self.layers:
            lecun_normal(layer)

    def forward(self, embeddings: Tensor) -> Tensor:
        for layer in self.layers:
            embeddings = functional.selu(layer(embeddings))
        return embeddings


class RepertoireClassifier(nn.Module):
    """Repertoires, bags of amino-acid sequences, -> logits: DeepRC with every dial of `HopfieldPooling`.

    `SequenceEmbedding` -> keys by `SequenceAttention` -> `HopfieldPooling` over (keys, embeddings) -> linear
    (Widrich et al. 2020, NeurIPS; Ramsauer et al. 2021; forgetting: Ota et al. 2023). No output depends on
    padding, nor on the other bags. With steps=1, no forgetting and reduction=0.1 it is DeepRC, but for the first
    weights, which are so small there that it hardly begins to learn; here they follow LeCun's rule.

    options: those of `RepertoireClassifierOptions`, and by name those of `HopfieldPooling` (steps, forgetting,
    separation, beta, solver, stop, adjoint, inject, num_heads, quantity, dropout, ...) but the widths of its
    inputs, what is static, and batch_first. An unknown one is a ValueError with the nearest name. Where nothing
    is projected, beta=None is 1 / sqrt(width of the keys) and normalize_* are False by default.

    `hopfield` is the pooling. With the ReLU unit all scores can be at 0 or below: such a head passes no gradient
    and never learns. That is so at the start for 7 of 200 seeds (4 repertoires of 100 sequences), of which the
    first step of training warns, and may come later, when the first noisy updates drive scores down. With
    ReLU(min_keep=1) one sequence always passes a gradient, 0 of 200 are dead, though learning can take long to come
    back from there; PFU does not know the height of the scores.
    """

    passes_on_solution = True  # for the monitors of training, which name the layer that it comes from

    def __init__(self, **options: Any) -> None:
        super().__init__()
        own, pooling = _sort(options)
        self.options = given = RepertoireClassifierOptions(**own)
        self.embedding = SequenceEmbedding(given.kernels, given.kernel_size)
        width = given.kernels + (given.counts == "input")
        self.attention = SequenceAttention(width, given.attention_width, given.attention_layers)
        self.hopfield = HopfieldPooling(
            **_pooling_options(self.attention.out_features, width, given.projected, pooling)
        )
        core = self.hopfield.hopfield.options
        read = core.input_size if core.output_size is None else core.output_size
        if core.disable_out_projection:
            read = core.num_heads * (core.value_width or 0)
        self.head = nn.Linear(self.hopfield.pooling_weights.shape[0] * (read or 0), given.outputs)
        self._columns: Tensor | None = None
        self._width = 0
        self._reset_pooling()

    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*OWN, *POOLING)),
        ]
    )

    def reset_parameters(self) -> None:
        """New weights everywhere."""
        for part in (self.embedding, self.attention, self.hopfield):
            part.reset_parameters()
        self._reset_pooling()

    def _reset_pooling(self) -> None:
        nn.init.normal_(self.head.weight, 0.0, HEAD_STD)
        nn.init.zeros_(self.head.bias)
        # The layers' own first weights make all scores about 0, from where attention takes long to learn.
        nn.init.normal_(self.hopfield.pooling_weights)
        for module in self.hopfield.modules():
            if isinstance(module, nn.Linear):
                lecun_normal(module)

    @property
    def steps(self) -> int | None:
        """Softmaxes, or None for the equilibrium; may be set."""
        return self.hopfield.steps

    @steps.setter
    def steps(self, steps: int | None) -> None:
        self.hopfield.steps = steps

    def forward(
        self,
        data: Tensor,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Logits (B,), or (B, outputs) for several; the arguments are keys of `data.collate_repertoires`.

        data: (B, N, L), any integer dtype: codes 0 ... 19, then -1 as padding. mask: (B, N) bool, True = no
            sequence, whatever data holds there. lengths: (B, N), compared with data where given. counts: (B, N),
            needed where the option `counts` is set, else not looked at.
        A bag without sequences reads out 0, which the pooling reports.
        Raises TypeError or ValueError naming the first entry that cannot be.
        """
        how = self.options.counts
        if how is not None and counts is None:
            raise ValueError(
                f"counts are needed: the classifier was built with counts={how!r}; give forward(..., counts=...), "
                "or build it with counts=None"
            )
        counts = None if how is None else counts
        bags = unpack(data, mask, lengths, counts, drop_uncounted=how == "weight")
        reduction = 1.0 if self.options.reduction is None else self.options.reduction
        graph = torch.is_grad_enabled()
        embeddings = None
        if reduction < 1 or not graph:
            embeddings, scores = self._survey(bags, reduction < 1)
            if scores is not None:
                rows = top_rows(bags, scores, reduction, self.options.min_sequences)
                bags, embeddings = bags.take(rows), embeddings[rows]
        if embeddings is None or graph:
            embeddings = self._embed(bags)
        parts = bags.padded(self.attention(embeddings)), bags.padded(embeddings)
        self._columns, self._width = bags.columns(), bags.width
        logits: Tensor = self.head(self.hopfield(parts, self._padding(bags)))
        return logits.squeeze(-1) if self.options.outputs == 1 else logits

    @property
    def association_matrix(self) -> Tensor | None:
        """Weights of the last read-out before dropout, (B, H, quantity, N), where the sequences stand in `data`.

        0 where there is none or the reduction left it out; to compare with `instance_target`. Without gradient;
        None before a call.
        """
        weights = self.hopfield.association_matrix
        if weights is None or self._columns is None:
            return None
        weights = weights[..., : self._columns.shape[1]]  # without bias pattern and zero association
        columns = self._columns[:, None, None].expand(weights.shape)
        # One column more takes what was padded.
        full = weights.new_zeros((*weights.shape[:-1], self._width + 1))
        return full.scatter(-1, columns, weights)[..., : self._width]

    @property
    def last_solution(self) -> Solution | None:
        """See `HopfieldPooling.last_solution`; one entry a bag, head and query, (B, H, quantity)."""
        return self.hopfield.last_solution

    def _embed(self, bags: SequenceBags) -> Tensor:
        """(M, width): embeddings, with the counts where they are an input."""
        embeddings = self.embedding.embed(bags.codes, bags.lengths)
        if self.options.counts != "input" or bags.counts is None:
            return embeddings
        measure = bags.counts.clamp_min(1).double().log().to(embeddings.dtype)  # a count may exceed float16
        return torch.cat([embeddings, measure[:, None]], 1)

    def _padding(self, bags: SequenceBags) -> Tensor | None:
        """What is no sequence, (B, K): bool, or log(count) with -inf there, which the layer adds to the scores."""
        if self.options.counts != "weight" or bags.counts is None:
            return bags.absent()
        return bags.padded(bags.counts.double().log().to(self.head.weight.dtype), -math.inf)

    @torch.no_grad()
    def _survey(self, bags: SequenceBags, scored: bool) -> tuple[Tensor, Tensor | None]:
        """Embeddings (M, width) and, where asked for, scores (M,) of the first step; a chunk at a time."""
        count, chunk = len(bags.codes), self.options.chunk
        runs = [bags.rows(start, start + chunk) for start in range(0, max(count, 1), chunk)]
        embeddings, scores = [], []
        for run in runs:
            embeddings.append(self._embed(run))
            if scored:
                scores.append(self._scores(run, embeddings[-1]))
        return torch.cat(embeddings), torch.cat(scores) if scored else None

    def _scores(self, bag: SequenceBags, embeddings: Tensor) -> Tensor:
        """(M,) scores of one bag's sequences before forgetting, the highest over heads and queries."""
        core = self.hopfield.hopfield
        if not len(embeddings):
            return embeddings.sum(1)
        parts = self.hopfield._parts((self.attention(embeddings)[None], embeddings[None]))
        heads = core._project(core._unpack(parts), self._padding(bag), None)
        x = core.f.lay_out(heads)
        return core.f._scores(x.start, x)[:, : len(embeddings)].amax(0)


def lecun_normal(layer: nn.Module) -> None:
    """Weights N(0, 1 / inputs), biases 0 (LeCun et al. 1998), for a linear layer."""
    if isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, 0.0, 1 / math.sqrt(layer.in_features))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _sort(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The classifier's own options and those of its pooling; a name that is neither is an error that helps."""
    own = {p.name for p in OWN}
    pooling = {p.name for p in POOLING}
    for name in options:
        if name in DECIDED:
            raise ValueError(f"option {name!r} is decided by kernels, attention_width and projected here")
        if name in ELSEWHERE and ELSEWHERE[name] not in DECIDED:
            raise ValueError(f"option {name!r} is called {ELSEWHERE[name]} here")
        if name not in own | pooling:
            raise unknown("option", name, own | pooling)
    return (
        {name: value for name, value in options.items() if name in own},
        {name: value for name, value in options.items() if name in pooling},
    )


def _pooling_options(
    keys: int, values: int, projected: bool | None, pooling: dict[str, Any]
) -> dict[str, Any]:
    """All options of the pooling over keys and values of these widths."""
    heads = pooling.get("num_heads", 1)
    if projected or (projected is None and heads != 1):
        return {**pooling, "input_size": keys, "stored_pattern_size": keys, "pattern_projection_size": values}
    if heads != 1:
        raise ValueError(
            f"num_heads={heads} with projected=False: all heads would see the same; give projected=True, or "
            f"quantity={heads} for several queries"
        )
    for name in PROJECTIONS:
        if name in pooling:
            raise ValueError(f"{name} is an option of projections: give projected=True with it")
    flat: dict[str, Any] = {f.name: False for f in dataclasses.fields(PoolingOptions) if _is_norm(f.name)}
    flat |= {name: True for name in ("disable_out_projection", *DECIDED[3:6])}
    flat |= pooling
    if flat.get("beta") is None:
        flat["beta"] = 1 / math.sqrt(keys)
    return {**flat, "input_size": keys, "hidden_size": keys, "pattern_size": values}


def _is_norm(name: str) -> bool:
    return name.startswith("normalize_") and not name.endswith(("_affine", "_eps"))
