"""Trainings that end themselves by kill -9 at a chosen point; run as a program by test_checkpoints_kills.py.

Each runs in a fork of one process that has imported everything, so that a kill costs a training and no imports.
A point is [what, number]: the number-th time, counted from 0, that
    "batch" a batch begins, "step" one has ended, "validation" a validation begins, "end" an epoch has ended but
        nothing of it is written,
    "renamed" a file has just taken its name, "written" it is complete beside the old one,
    "half checkpoint" half of a checkpoint is written, "half line" half of a line of metrics.jsonl.
"""

import json
import os
import signal
import sys
from pathlib import Path

import safetensors.torch
from lightning.pytorch import Callback

from hopdeq_lwpf.training import TrainSpec, train
from hopdeq_lwpf.training.checkpoints import LAST


class Countdown:
    """Ends the process at the chosen point."""

    def __init__(self, what, number):
        self.what, self.left = what, number

    def due(self, what):
        """Whether now is the chosen point, counting the times that it was asked."""
        if what != self.what:
            return False
        self.left -= 1
        return self.left < 0

    def at(self, what):
        if self.due(what):
            os.kill(os.getpid(), signal.SIGKILL)


class Hooks(Callback):
    """The points of a training that Lightning calls."""

    def __init__(self, countdown):
        self.countdown = countdown

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.countdown.at("batch")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.countdown.at("step")

    def on_validation_start(self, trainer, pl_module):
        self.countdown.at("validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self.countdown.at("end")


def watch_writes(countdown):
    """Makes the points of writing files in this process."""
    replace, write, save = os.replace, os.write, safetensors.torch.save_file

    def replacing(source, target):
        countdown.at("written")
        replace(source, target)
        countdown.at("renamed")

    def writing(handle, content):
        if countdown.due("half line"):
            write(handle, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(handle, content)

    def saving(tensors, path, metadata):
        save(tensors, path, metadata=metadata)
        if countdown.due("half checkpoint"):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace, os.write, safetensors.torch.save_file = replacing, writing, saving


def killed(settings, point):
    """The signal that ended a training with these settings, 0 where it came to its end."""
    child = os.fork()
    if not child:
        try:
            countdown = Countdown(*point)
            watch_writes(countdown)
            resume = (Path(settings["out"]) / LAST).exists()
            train(TrainSpec(**settings, resume=resume), callbacks=(Hooks(countdown),))
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the training to be killed at {point} failed by itself")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


if __name__ == "__main__":
    sys.stdout.write(json.dumps([killed(*pair) for pair in json.loads(sys.argv[1])]))
