"""The slow twin of the Hopfield layers: hflayers' maths in plain Python, one sample, head and state at a time.

It takes hflayers' options and weights by their names and shapes, so that it also checks their translation.
Where hflayers is wrong (docs/from-hflayers.md) the twin does what its documentation says.
"""

import math

import torch
from references import exactly, forget_row
from torch import Tensor
from torch.testing import assert_close

from hopdeq_lwpf.models import Hopfield

F64 = torch.float64
# Samples, state patterns and stored patterns of the input that `made` makes.
B, L, S = 3, 2, 4
Vector = list[float]
Matrix = list[Vector]
PLAIN = {
    "normalize_stored_pattern": False,
    "normalize_state_pattern": False,
    "normalize_pattern_projection": False,
}


# Beside each: what it is there for.
OPTIONS = {
    "one head": {},
    "heads": {"num_heads": 2},
    "widths": {"num_heads": 2, "hidden_size": 3, "output_size": 5, "pattern_size": 2},
    "input widths": {"num_heads": 2, "stored_pattern_size": 3, "pattern_projection_size": 5},
    "beta": {"num_heads": 2, "scaling": 0.7},
    "beta of each head": {"num_heads": 2, "hidden_size": 3, "scaling": torch.tensor([2.0, 0.1])},
    "no norms": {"num_heads": 2, **PLAIN},
    "norms without affine": {"normalize_state_pattern_affine": False, "normalize_stored_pattern_eps": 0.1},
    "norm of the space": {
        "num_heads": 2,
        "normalize_hopfield_space": True,
        "normalize_hopfield_space_eps": 0.01,
    },
    "affine norm of the space": {
        "num_heads": 2,
        "normalize_hopfield_space": True,
        "normalize_hopfield_space_affine": True,
    },
    "static stored patterns": {"num_heads": 2, "hidden_size": 3, "stored_pattern_as_static": True},
    "static states": {"num_heads": 2, "hidden_size": 3, "state_pattern_as_static": True},
    "static values": {"num_heads": 2, "hidden_size": 3, "pattern_projection_as_static": True},
    "two statics": {
        "num_heads": 2,
        "hidden_size": 3,
        "stored_pattern_as_static": True,
        "state_pattern_as_static": True,
    },
    "all static": {
        "input_size": 3,
        "hidden_size": 3,
        "num_heads": 2,
        "stored_pattern_as_static": True,
        "state_pattern_as_static": True,
        "pattern_projection_as_static": True,
        "disable_out_projection": True,
        "scaling": torch.tensor([2.0, 0.5]),
        **PLAIN,
    },
    "connected": {"num_heads": 2, "hidden_size": 3, "pattern_projection_as_connected": True},
    "connected, static values": {
        "num_heads": 2,
        "pattern_projection_as_connected": True,
        "pattern_projection_as_static": True,
    },
    "connected, static stored patterns": {
        "num_heads": 2,
        "hidden_size": 3,
        "pattern_projection_as_connected": True,
        "stored_pattern_as_static": True,
    },
    "no bias": {"num_heads": 2, "input_bias": False},
    "bias pattern": {"num_heads": 2, "hidden_size": 3, "pattern_size": 2, "concat_bias_pattern": True},
    "zero association": {"num_heads": 2, "add_zero_association": True},
    "both extras": {"num_heads": 2, "add_zero_association": True, "concat_bias_pattern": True},
    "no output projection": {"num_heads": 2, "pattern_size": 3, "disable_out_projection": True},
}


def widths(options: dict) -> dict:
    """Every width that the options leave to its default."""
    heads, size = options.get("num_heads", 1), options["input_size"]
    d = options.get("hidden_size") or size // heads
    dv = options.get("pattern_size") or d
    return {
        "heads": heads,
        "d": d,
        "dv": dv,
        "state": d if options.get("state_pattern_as_static") else size,
        "stored": d
        if options.get("stored_pattern_as_static")
        else options.get("stored_pattern_size") or size,
        "projection": dv
        if options.get("pattern_projection_as_static") and not options.get("pattern_projection_as_connected")
        else options.get("pattern_projection_size") or size,
        "out": options.get("output_size") or size,
    }


def their_weights(options: dict, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random weights under hflayers' names, in its shapes: one stacked matrix where all inputs are alike."""
    w = widths(options)
    space, read = w["heads"] * w["d"], w["heads"] * w["dv"]
    connected = options.get("pattern_projection_as_connected", False)
    rows = {}
    if not options.get("state_pattern_as_static"):
        rows["q"] = (space, w["state"])
    if not options.get("stored_pattern_as_static"):
        rows["k"] = (space, w["stored"])
    if not options.get("pattern_projection_as_static"):
        through = connected and "k" in rows
        rows["v"] = (read, space if through else w["projection"])
    core, weights = "association_core.", {}
    alike = "pattern_size" not in options and not connected
    sizes = (options.get("stored_pattern_size"), options.get("pattern_projection_size"))
    if alike and all(size in (None, options["input_size"]) for size in sizes):
        if rows:
            weights[core + "in_proj_weight"] = torch.cat([torch.randn(*shape) for shape in rows.values()])
    else:
        weights |= {f"{core}{name}_proj_weight": torch.randn(*shape) for name, shape in rows.items()}
    bias = options.get("input_bias", True)
    if bias and rows:
        # There is always room for the bias of the values, used or not.
        count = sum(rows[name][0] for name in ("q", "k") if name in rows) + read
        weights[core + "in_proj_bias"] = torch.randn(count)
    if not options.get("disable_out_projection"):
        weights[core + "out_proj.weight"] = torch.randn(w["out"], read)
        if bias:
            weights[core + "out_proj.bias"] = torch.randn(w["out"])
    for name, width in (
        ("stored_pattern", "stored"),
        ("state_pattern", "state"),
        ("pattern_projection", "projection"),
    ):
        if options.get(f"normalize_{name}", True) and options.get(f"normalize_{name}_affine", True):
            weights[f"norm_{name}.weight"] = torch.randn(w[width])
            weights[f"norm_{name}.bias"] = torch.randn(w[width])
    if options.get("normalize_hopfield_space_affine"):
        weights[core + "p_norm_weight"], weights[core + "p_norm_bias"] = (
            torch.randn(w["d"]),
            torch.randn(w["d"]),
        )
    if options.get("concat_bias_pattern"):
        weights[core + "bias_k"], weights[core + "bias_v"] = torch.randn(1, 1, space), torch.randn(1, 1, read)
    return {name: 0.5 * tensor.to(dtype) for name, tensor in weights.items()}


def times(matrix: Matrix, vector: Vector, bias: Vector | None = None) -> Vector:
    """W x + b."""
    out = [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]
    return out if bias is None else [a + b for a, b in zip(out, bias, strict=True)]


def layer_norm(x: Vector, scale: Vector | None, shift: Vector | None, eps: float) -> Vector:
    mean = sum(x) / len(x)
    variance = sum((a - mean) ** 2 for a in x) / len(x)
    out = [(a - mean) / math.sqrt(variance + eps) for a in x]
    if scale is None:
        return out
    return [a * s + b for a, s, b in zip(out, scale, shift, strict=True)]


class Twin:
    """A layer with hflayers' weights and options; `forgetting` None, "relu" or "pfu" (frozen median)."""

    def __init__(self, weights: dict[str, Tensor], options: dict, forgetting: str | None = None) -> None:
        self.weights = {name: tensor.tolist() for name, tensor in weights.items()}
        self.options = options
        self.w = widths(options)
        self.forgetting = forgetting

    def get(self, name: str) -> list | None:
        return self.weights.get("association_core." + name)

    def projection(self, letter: str) -> tuple[Matrix, Vector | None]:
        """The rows of the stacked weights, and of the stacked bias, that belong to q, k or v."""
        space, read = self.w["heads"] * self.w["d"], self.w["heads"] * self.w["dv"]
        start = 0
        if letter != "q" and not self.options.get("state_pattern_as_static"):
            start += space
        if letter == "v" and not self.options.get("stored_pattern_as_static"):
            start += space
        end = start + (read if letter == "v" else space)
        stacked, bias = self.get("in_proj_weight"), self.get("in_proj_bias")
        matrix = stacked[start:end] if stacked is not None else self.get(f"{letter}_proj_weight")
        return matrix, None if bias is None else bias[start:end]

    def normed(self, name: str, x: Vector) -> Vector:
        if not self.options.get(f"normalize_{name}", True):
            return x
        scale, shift = self.weights.get(f"norm_{name}.weight"), self.weights.get(f"norm_{name}.bias")
        return layer_norm(x, scale, shift, self.options.get(f"normalize_{name}_eps", 1e-5))

    def in_space(self, x: Vector) -> Vector:
        if not self.options.get("normalize_hopfield_space"):
            return x
        eps = self.options.get("normalize_hopfield_space_eps", 1e-5)
        return layer_norm(x, self.get("p_norm_weight"), self.get("p_norm_bias"), eps)

    def cut(self, x: Vector, head: int, width: int) -> Vector:
        return x[head * width : (head + 1) * width]

    def q(self, x: Vector, head: int) -> Vector:
        x = self.normed("state_pattern", x)
        if not self.options.get("state_pattern_as_static"):
            x = self.cut(times(*self._with(x, "q")), head, self.w["d"])
        return self.in_space(x)

    def k(self, x: Vector, head: int) -> Vector:
        x = self.normed("stored_pattern", x)
        if not self.options.get("stored_pattern_as_static"):
            x = self.cut(times(*self._with(x, "k")), head, self.w["d"])
        return self.in_space(x)

    def v(self, x: Vector, head: int) -> Vector:
        x = self.normed("pattern_projection", x)
        through = self.options.get("pattern_projection_as_connected")
        through = through and not self.options.get("stored_pattern_as_static")
        if through:
            x = times(*self._with(x, "k"))
        if not self.options.get("pattern_projection_as_static"):
            x = times(*self._with(x, "v"))
        elif not through:
            return x
        return self.cut(x, head, self.w["dv"])

    def _with(self, x: Vector, letter: str) -> tuple[Matrix, Vector, Vector | None]:
        matrix, bias = self.projection(letter)
        return matrix, x, bias

    def beta(self, head: int) -> float:
        beta = self.options.get("scaling")
        if beta is None:
            return 1 / math.sqrt(self.w["d"])
        return float(beta) if not isinstance(beta, Tensor) or not beta.ndim else float(beta[head])

    def stored(self, sample: Matrix, head: int) -> Matrix:
        rows = [self.k(x, head) for x in sample]
        return rows + self.extras("bias_k", head, self.w["d"])

    def values(self, sample: Matrix, head: int) -> Matrix:
        rows = [self.v(x, head) for x in sample]
        return rows + self.extras("bias_v", head, self.w["dv"])

    def extras(self, name: str, head: int, width: int) -> Matrix:
        extra = []
        if self.options.get("concat_bias_pattern"):
            extra.append(self.cut(self.get(name)[0][0], head, width))
        if self.options.get("add_zero_association"):
            extra.append([0.0] * width)
        return extra

    def weigh(
        self, z: Vector, keys: Matrix, head: int, ignored: list[bool], added: Vector, limit: float | None
    ):
        """D' * softmax(D(beta K z + added)) over what is not ignored."""
        scores = self.scores(z, keys, head, added)
        kept = [1.0] * len(scores)
        if self.forgetting is not None:
            scores, kept = forget_row(scores, ignored, threshold=limit, bias="threshold")
        alive = [i for i in range(len(scores)) if not ignored[i]]
        if not alive:
            return [0.0] * len(scores)
        top = max(scores[i] for i in alive)
        total = sum(math.exp(scores[i] - top) for i in alive)
        return [
            kept[i] * math.exp(scores[i] - top) / total if i in alive else 0.0 for i in range(len(scores))
        ]

    def scores(self, z: Vector, keys: Matrix, head: int, added: Vector) -> Vector:
        return [
            self.beta(head) * sum(a * b for a, b in zip(key, z, strict=True)) + c
            for key, c in zip(keys, added, strict=True)
        ]

    def threshold(self, scores: Vector, ignored: list[bool]) -> float | None:
        if self.forgetting == "relu":
            return 0.0
        seen = sorted(s for s, out in zip(scores, ignored, strict=True) if not out)
        return seen[(len(seen) - 1) // 2] if seen else 0.0

    def state(
        self, q: Vector, keys: Matrix, head: int, ignored: list[bool], added: Vector, steps: int, pull: float
    ):
        """Weights of the last of so many softmaxes; pull: how much of the query enters every update."""
        limit = (
            None if self.forgetting is None else self.threshold(self.scores(q, keys, head, added), ignored)
        )
        z = q
        for _ in range(steps - 1):
            weights = self.weigh(z, keys, head, ignored, added, limit)
            z = [
                sum(w * key[i] for w, key in zip(weights, keys, strict=True)) + pull * q[i]
                for i in range(len(q))
            ]
        return self.weigh(z, keys, head, ignored, added, limit)

    def __call__(self, stored, state, projection, *, ignored=None, added=None, steps=1, pull=0.0):
        """Output (B, L, out) and association (B, H, L, S). ignored, added: (B, H, L, S) tensors or None."""
        heads = self.w["heads"]
        outputs, associations = [], []
        for b in range(len(state)):
            read = [[] for _ in state[b]]
            sample = []
            for h in range(heads):
                keys, values = self.stored(stored[b], h), self.values(projection[b], h)
                rows = []
                for row, x in enumerate(state[b]):
                    more = len(keys) - len(stored[b])
                    out = [False] * len(stored[b]) if ignored is None else ignored[b][h][row].tolist()
                    plus = [0.0] * len(stored[b]) if added is None else added[b][h][row].tolist()
                    out, plus = out + [False] * more, plus + [0.0] * more
                    weights = self.state(self.q(x, h), keys, h, out, plus, steps, pull)
                    rows.append(weights)
                    read[row] += [
                        sum(w * value[i] for w, value in zip(weights, values, strict=True))
                        for i in range(self.w["dv"])
                    ]
                sample.append(rows)
            if not self.options.get("disable_out_projection"):
                matrix, bias = self.get("out_proj.weight"), self.get("out_proj.bias")
                read = [times(matrix, x, bias) for x in read]
            outputs.append(read)
            associations.append(sample)
        return torch.tensor(outputs, dtype=torch.float64), torch.tensor(associations, dtype=torch.float64)


def made(options: dict, **ours) -> tuple[Hopfield, Twin, tuple]:
    """A layer, its twin of the same weights, and input; sizes differ wherever they may."""
    options = {"input_size": 4, **options}
    weights = their_weights(options)
    layer = Hopfield.from_hflayers(weights, **options, **ours).double()
    layer.load_hflayers_state_dict(weights)  # again, without rounding to float32
    unit = ours.get("forgetting")
    w = widths(options)
    parts = tuple(
        torch.randn(B, n, w[name], dtype=F64) for name, n in (("stored", S), ("state", L), ("projection", S))
    )
    return layer, Twin(weights, options, unit), parts


def agrees(layer: Hopfield, twin: Twin, parts: tuple, masks: dict, **call) -> None:
    """Output and association are those of the twin, to rounding of float64."""
    out, association = twin(*(part.tolist() for part in parts), **call)
    assert_close(layer(parts, **masks), out, rtol=1e-9, atol=1e-9)
    assert_close(layer.association_matrix, association, rtol=1e-9, atol=1e-9)
    exactly(layer.get_association_matrix(parts, **masks), layer.association_matrix)
