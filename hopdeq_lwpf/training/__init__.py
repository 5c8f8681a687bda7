"""Training of models with equilibrium layers: learner, monitors, metrics, checkpoints that resume exactly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hopdeq_lwpf.training.checkpoints import CheckpointError as CheckpointError
    from hopdeq_lwpf.training.checkpoints import Checkpoints as Checkpoints
    from hopdeq_lwpf.training.checkpoints import WholeFiles as WholeFiles
    from hopdeq_lwpf.training.checkpoints import load_weights as load_weights
    from hopdeq_lwpf.training.checkpoints import read_checkpoint as read_checkpoint
    from hopdeq_lwpf.training.convergence import ConvergenceMonitor as ConvergenceMonitor
    from hopdeq_lwpf.training.datasets import build_data as build_data
    from hopdeq_lwpf.training.learner import Learner as Learner
    from hopdeq_lwpf.training.learner import Learning as Learning
    from hopdeq_lwpf.training.madam import Madam as Madam
    from hopdeq_lwpf.training.metrics import Metrics as Metrics
    from hopdeq_lwpf.training.metrics import MetricsFile as MetricsFile
    from hopdeq_lwpf.training.metrics import read_metrics as read_metrics
    from hopdeq_lwpf.training.monitors import GradientMonitor as GradientMonitor
    from hopdeq_lwpf.training.monitors import SolutionMonitor as SolutionMonitor
    from hopdeq_lwpf.training.monitors import SpectrumMonitor as SpectrumMonitor
    from hopdeq_lwpf.training.networks import build_network as build_network
    from hopdeq_lwpf.training.run import Trained as Trained
    from hopdeq_lwpf.training.run import train as train
    from hopdeq_lwpf.training.seeding import SeededEpochs as SeededEpochs
    from hopdeq_lwpf.training.spec import TrainSpec as TrainSpec

# Names load when first used: the command line needs the settings class alone, without torch or Lightning.
_HOME = {
    "CheckpointError": "checkpoints",
    "Checkpoints": "checkpoints",
    "ConvergenceMonitor": "convergence",
    "GradientMonitor": "monitors",
    "Learner": "learner",
    "Learning": "learner",
    "Madam": "madam",
    "Metrics": "metrics",
    "MetricsFile": "metrics",
    "SeededEpochs": "seeding",
    "SolutionMonitor": "monitors",
    "SpectrumMonitor": "monitors",
    "TrainSpec": "spec",
    "Trained": "run",
    "WholeFiles": "checkpoints",
    "build_data": "datasets",
    "build_network": "networks",
    "load_weights": "checkpoints",
    "read_checkpoint": "checkpoints",
    "read_metrics": "metrics",
    "train": "run",
}

__all__ = list(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
