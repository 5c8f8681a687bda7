"""Speed beside residual, accuracy and basins, ours and torchdeq's in one run: `python -m benchmarks`."""
