"""Train a classifier whose hidden layer is an equilibrium, break off, go on, and look at what was recorded."""

import tempfile
from pathlib import Path

from rich.console import Console

from hopdeq_lwpf.training import TrainSpec, build_network, load_weights, train

console = Console()
with tempfile.TemporaryDirectory() as folder:
    settings = {
        "model": {"model": "equilibrium", "hidden": 32},
        "data": {"data": "digits", "batch_size": 64},
        "spectrum_every": 1,
        "out": str(Path(folder) / "run"),
    }
    train(TrainSpec(**settings, epochs=2))
    # The same as 4 epochs at once, to the last bit; it would also be after kill -9.
    run = train(TrainSpec(**settings, epochs=4, resume=True))
    for record in run.metrics.records:
        metrics = record["metrics"]
        console.print(
            f"epoch {record['epoch']}: accuracy {metrics['val/accuracy']:.3f}, "
            f"steps {metrics['train/layer/steps']:.1f}, "
            f"worst residual {metrics['train/layer/residual_max']:.1e}, "
            f"adjoint products {metrics['train/layer/adjoint_steps']:.1f}, "
            f"spectral radius {metrics['val/layer/spectral_radius']:.2f}"
        )
    model = load_weights(run.files["best"], build_network(settings["model"]))
    console.print(f"best.ckpt: {sum(parameter.numel() for parameter in model.parameters())} parameters")
