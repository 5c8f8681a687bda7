"""timm for the tests: where it is installed, else a stand-in.

timm imports torchvision, and torchvision declares the fake versions of operators that its binaries define. Where
they do not load, as those for CUDA beside a torch for the CPU, the operators are declared here: a vision
transformer uses none of them.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional

_libraries = []


def timm_or_skip():
    """The module timm.models; skips the test where there is none."""
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip("timm is not installed")
    if not _libraries:
        _declare(Path(importlib.util.find_spec("torchvision").origin).parent)
    return pytest.importorskip("timm.models")


def _declare(folder: Path) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    try:
        torch.ops.load_library(str(next(folder.glob("_C*.so"))))
    except (OSError, StopIteration):
        text = (folder / "_meta_registrations.py").read_text(encoding="utf-8")
        names = re.findall(r'@register_meta\("(\w+)"\)|register_fake\("torchvision::(\w+)"\)', text)
        for name in {one or other for one, other in names}:
            library.define(f"{name}(Tensor x) -> Tensor")


def stand_in(monkeypatch):
    """A module timm.models with a stand-in for its VisionTransformer, in the place of any other."""
    package, models = ModuleType("timm"), ModuleType("timm.models")
    package.models, models.VisionTransformer = models, StandIn
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "timm.models", models)
    return models


class Attention(nn.Module):
    """The parts, names and signature of timm 1.0.31's Attention, written from its description."""

    def __init__(self, dim=8, heads=2, head_dim=None, norm=False, gated=False, fused=True, drop=0.0):
        super().__init__()
        self.num_heads, self.head_dim = heads, head_dim or dim // heads
        self.attn_dim = heads * self.head_dim
        self.scale, self.fused_attn = self.head_dim**-0.5, fused
        self.qkv = nn.Linear(dim, 3 * self.attn_dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if norm else nn.Identity()
        self.attn_drop = nn.Dropout(drop)
        self.norm = nn.LayerNorm(self.attn_dim) if norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x, attn_mask=None, is_causal=False):
        parts = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]
        dropout = self.attn_drop.p if self.training else 0.0
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
        out = self.norm(out.transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))
        out = out if self.gate is None else out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class StandIn(nn.Module):
    """What VisionTransformer asks of timm's: these arguments, and attention in blocks."""

    def __init__(  # noqa: PLR0913 (that of timm has more)
        self,
        *,
        img_size,
        patch_size,
        in_chans,
        num_classes,
        embed_dim,
        depth,
        num_heads,
        mlp_ratio,
        drop_rate,
        proj_drop_rate,
        attn_drop_rate,
    ):
        super().__init__()
        assert drop_rate == proj_drop_rate == attn_drop_rate
        self.patches = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.place = nn.Parameter(torch.randn(img_size[0] * img_size[1] // patch_size**2, embed_dim))
        hidden = int(mlp_ratio * embed_dim)
        parts = (nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim))
        blocks = [
            nn.ModuleDict({"attn": Attention(embed_dim, num_heads, drop=drop_rate)}) for _ in range(depth)
        ]
        self.blocks, self.mlp = nn.ModuleList(blocks), nn.Sequential(*parts)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = x + block["attn"](nn.functional.layer_norm(x, x.shape[-1:]))
        return self.head((x + self.mlp(x)).mean(1))
