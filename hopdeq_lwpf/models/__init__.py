"""Models: fixed-point functions with everything around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hopdeq_lwpf import solvers
from hopdeq_lwpf.forgetting import UNITS, Forgetting
from hopdeq_lwpf.models.conversion import convert_attention
from hopdeq_lwpf.models.diffusion import DiffusionHopfield, DiffusionLayer, DiffusionPooling
from hopdeq_lwpf.models.ham import CHN, HAM
from hopdeq_lwpf.models.hopfield import Hopfield
from hopdeq_lwpf.models.learned_patterns import HopfieldLayer, HopfieldPooling
from hopdeq_lwpf.models.repertoire import RepertoireClassifier, SequenceAttention
from hopdeq_lwpf.models.sdm import SDM
from hopdeq_lwpf.models.sequences import SequenceEmbedding
from hopdeq_lwpf.models.transformer import HopfieldDecoderLayer, HopfieldEncoderLayer
from hopdeq_lwpf.models.vision import VisionTransformer
from hopdeq_lwpf.options import construct
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.settings import find

__all__ = [
    "CHN",
    "HAM",
    "SDM",
    "DiffusionHopfield",
    "DiffusionLayer",
    "DiffusionPooling",
    "Hopfield",
    "HopfieldDecoderLayer",
    "HopfieldEncoderLayer",
    "HopfieldLayer",
    "HopfieldPooling",
    "RepertoireClassifier",
    "Retrieval",
    "SequenceAttention",
    "SequenceEmbedding",
    "VisionTransformer",
    "build",
    "convert_attention",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "retrieval": Retrieval,
    "hopfield": Hopfield,
    "pooling": HopfieldPooling,
    "lookup": HopfieldLayer,
    "vision_transformer": VisionTransformer,
    "repertoire": RepertoireClassifier,
    "ham": HAM,
    "chn": CHN,
    "diffusion": DiffusionHopfield,
    "diffusion_pooling": DiffusionPooling,
    "diffusion_lookup": DiffusionLayer,
}


def build(settings: str | Mapping[str, Any]) -> Any:
    """A model from the settings of this name in models/, or from a mapping with a key `model`.

    `forgetting` may be a name, or a mapping {unit: name, ...options}; `solver`, `adjoint` and `stop` likewise, as in
    solvers/: {solver: anderson, memory: 4}. Unknown names and options are errors.
    """
    options = dict(find("models", settings) if isinstance(settings, str) else settings)
    unit = options.get("forgetting")
    if isinstance(unit, Mapping):
        built: Forgetting = construct("unit", unit, UNITS)
        options["forgetting"] = built
    for key in ("solver", "adjoint", "stop"):
        if isinstance(options.get(key), Mapping):
            options[key] = solvers.build(options[key])
    return construct("model", options, MODELS)
