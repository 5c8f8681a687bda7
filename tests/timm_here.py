"""timm for the tests, where it is installed.

timm imports torchvision, and torchvision declares the fake versions of operators that its binaries define. Where
they do not load, as those for CUDA beside a torch for the CPU, the operators are declared here: a vision
transformer uses none of them.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

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
