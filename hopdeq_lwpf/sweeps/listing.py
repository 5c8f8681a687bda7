"""The names that settings may use, each with one line. Imports no torch: tests compare the lists to the registries."""

from __future__ import annotations

import itertools
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from hopdeq_lwpf import settings
from hopdeq_lwpf._checks import choice, forms, option
from hopdeq_lwpf.sweeps import study_spec, sweep_spec

WIDTH = 100  # of a line that comes from a file

MODELS = {
    "equilibrium": "tanh(c W z + U x + b) at its equilibrium, then a linear layer; to train",
    "retrieval": "z -> the patterns averaged by their separation weights: retrieve() as a module",
    "hopfield": "the Hopfield layer: attention, or its equilibrium, between two sets of vectors",
    "pooling": "pools a bag by learned states",
    "lookup": "looks inputs up among learned stored patterns",
    "diffusion": "hopfield, with diffusion over graphs of states and of stored patterns",
    "diffusion_pooling": "pooling, likewise",
    "diffusion_lookup": "lookup, likewise",
    "vision_transformer": "timm's vision transformer with Hopfield layers (extra vision)",
    "repertoire": "classifies bags of sequences, like DeepRC",
    "ham": "hierarchical associative memory: layers with Lagrangians and symmetric weights",
    "chn": "continuous Hopfield network: states clipped to [0, 1]",
}
SOLVERS = {
    "auto": "the library's choice: L-BFGS with energy guard where f has an energy, else Picard or Anderson",
    "picard": "plain iteration, damped or not",
    "anderson": "Anderson mixing of the last iterates",
    "broyden": "Broyden's quasi-Newton method with limited memory",
    "lbfgs": "L-BFGS that keeps the basin of plain iteration by its energy",
    "torchdeq:NAME": "torchdeq's solver NAME",
}
ADJOINTS = {
    "implicit": "the exact gradient of the equilibrium, by a linear solve",
    "neumann": "the Neumann series of that solve, cut off",
    "phantom": "autograd through a few damped steps from the equilibrium",
    "onestep": "autograd through one step from the equilibrium",
    "unrolled": "autograd through every step of the solve",
    "eqprop": "equilibrium propagation: the difference of a free and a nudged equilibrium",
}
DATASETS = {
    "digits": "1,797 handwritten digits of 8 x 8, which ship with the package",
    "pictures": "digits, or MNIST and Fashion-MNIST from IDX files of a folder",
    "bit_pattern": "bags of bits, positive where one of them is a signal",
    "latch": "sequences whose first entry is asked for at the end",
    "image_bags": "bags of pictures, positive where one of them is the target",
    "mil": "published multiple-instance sets by name, from a folder",
    "repertoires": "immune repertoires: bags of sequences with a motif, or DeepRC's files",
}
UNITS = {
    "none": "no forgetting",
    "keep": "no forgetting, as a unit",
    "relu": "scores <= 0 are forgotten",
    "pfu": "scores <= a threshold, the median or a number, are forgotten",
    "topk": "all but the k largest scores are forgotten",
}
SEPARATIONS = {
    "softmax": "the modern Hopfield network",
    "softmax1": "softmax with a place for 'none of them'",
    "sparsemax": "exact zeros, piecewise linear",
    "entmax15": "exact zeros, smooth",
    "entmax": "the family of both, alpha learnable",
    "polynomial": "dense associative memory, a power of the score",
    "lsr": "log-sum-ReLU: exact zeros out of reach",
    "hardmax": "the strongest pattern alone",
}
TRIALS = {  # tasks of a sweep
    "train": "one training; base names its settings",
    "sdm": "a recall from, or a fit of, a Sparse Distributed Memory",
    "graph": "a recall with diffusion over graphs of stored patterns and of queries",
}
STUDIES = {  # tasks of compare
    study_spec.RETRIEVAL: "recall of corrupted patterns; trains nothing",
    "bit-pattern": "hflayers' task: small bags with one signal",
    "image-bags": "bags of handwritten digits",
    "repertoires": "DeepRC's task: long bags with few signals",
}
KINDS = ("models", "solvers", "sweeps", "tasks", "datasets", "units", "separations")

Entries = list[tuple[str, str]]


@dataclass(frozen=True)
class ListSpec:
    """Settings of `hopdeq-lwpf list`."""

    kind: str = option("all", f"all, or one of {', '.join(KINDS)}")

    def __post_init__(self) -> None:
        forms(self)
        choice("kind", self.kind, ("all", *KINDS))


def listing(kind: str) -> dict[str, Entries]:
    """(name, line) by title, of one kind of KINDS or of "all"."""
    found: dict[str, dict[str, Entries]] = {
        "models": {
            "models, for model: or --model.model": list(MODELS.items()),
            "settings in models/, for base: or hopdeq-lwpf train NAME": _files("models"),
        },
        "solvers": {
            "solvers, for solver:": list(SOLVERS.items()),
            "adjoints, for adjoint:": list(ADJOINTS.items()),
            "settings in solvers/, for hopdeq_lwpf.solvers.build(NAME)": _files("solvers"),
        },
        "sweeps": {"settings in sweeps/, for hopdeq-lwpf sweep NAME or compare NAME": _files("sweeps")},
        "tasks": {
            "tasks of a sweep, for task:": [(name, TRIALS.get(name, "")) for name in sweep_spec.TASKS],
            "tasks of hopdeq-lwpf compare, for --task": [
                (name, STUDIES.get(name, "")) for name in (study_spec.RETRIEVAL, *study_spec.TASKS)
            ],
        },
        "datasets": {"data, for data: or --data.data": list(DATASETS.items())},
        "units": {"forgetting units, for forgetting:": list(UNITS.items())},
        "separations": {"separation functions, for separation:": list(SEPARATIONS.items())},
    }
    return {
        title: entries
        for name, parts in found.items()
        if kind in ("all", name)
        for title, entries in parts.items()
    }


def _files(kind: str) -> Entries:
    return [(name, _summary(kind, name)) for name in settings.names(kind)]


def _summary(kind: str, name: str) -> str:
    """The first sentence of the comment at the top of the file; its values where there is none."""
    lines = settings.path_of(kind, name).read_text(encoding="utf-8").splitlines()
    above = [line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    sentence = re.split(r"(?<!et al)\. |:? `hopdeq-lwpf", " ".join(above))[0].rstrip(".")
    text = sentence or ", ".join(f"{key} {_plain(value)}" for key, value in settings.find(kind, name).items())
    return textwrap.shorten(text, WIDTH, placeholder=" ...")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items()) + "}"
    return "null" if value is None else str(value)
