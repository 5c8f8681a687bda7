"""Recall handwritten digits from noisy queries: one step against the converged dynamics."""

import torch
from rich.console import Console

from hopdeq_lwpf import retrieve
from hopdeq_lwpf.data import Preprocessing, load_digits

images, labels = load_digits()  # (1797, 64) in [0, 1]
prepare = Preprocessing.fit(images, "center-unit")
patterns = prepare(images)

generator = torch.Generator().manual_seed(0)
noisy = images[:200] + 0.3 * torch.randn(200, 64, generator=generator)
queries = prepare(noisy)

console = Console()
for forgetting in (None, "relu", "pfu"):
    for steps in (1, 3, None):
        recalled = retrieve(queries, patterns, beta=64.0, forgetting=forgetting, steps=steps)
        right = (recalled.index == torch.arange(200)).double().mean()
        console.print(
            f"forgetting {forgetting!s:5} steps {steps!s:5} right memory {right:.1%}, "
            f"converged {int(recalled.converged.sum())} of 200, steps at most {int(recalled.steps.max())}"
        )
