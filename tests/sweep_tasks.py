"""A task for tests of sweeps: a sum of random numbers, with a checkpoint after every epoch. And a driver of its own.

`python tests/sweep_tasks.py OUT '{"grid": ...}'` runs a sweep of it, as the command line would.
"""

import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import dataclass

MOODS = ("good", "raises", "nan", "dies", "exits", "full", "unsendable")
STATE, LOG = "state.json", "log.jsonl"


@dataclass(frozen=True)
class ToySpec:
    """x, y: two factors; the score is the mean of (x - 1)**2 + y + a random number, over the epochs."""

    x: float = 0.0
    y: float = 0.0
    epochs: int = 1
    pause: float = 0.0  # seconds an epoch
    mood: str = "good"
    options: dict = dataclasses.field(default_factory=dict)
    seed: int = 0

    def as_dict(self):
        return dataclasses.asdict(self)


MEASURES = ("val/loss", "epochs", "seconds")


@contextlib.contextmanager
def registered():
    """The task "toy" is known inside of the block, in this process only."""
    # Imported here: a worker needs none of it.
    from hopdeq_lwpf.sweeps import sweep, sweep_spec

    sweep_spec.TASKS["toy"] = sweep_spec.Task(ToySpec, "sweep_tasks:run_trial")
    sweep.MEASURES["toy"] = MEASURES
    try:
        yield
    finally:
        del sweep_spec.TASKS["toy"], sweep.MEASURES["toy"]


def expected(settings):
    """The losses of every epoch, computed at one go."""
    draws = random.Random(settings["seed"])
    base = (settings["x"] - 1) ** 2 + settings["y"]
    return [base + draws.random() for _ in range(settings["epochs"])]


def run_trial(settings, folder, reports=None):
    """Goes on from state.json; log.jsonl says which process did which epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    draws, losses = random.Random(settings["seed"]), []
    if (folder / STATE).exists():
        losses, (version, state, gauss) = json.loads((folder / STATE).read_text())
        draws.setstate((version, tuple(state), gauss))
    base = (settings["x"] - 1) ** 2 + settings["y"]
    stopped = None
    for epoch in range(len(losses) + 1, settings["epochs"] + 1):
        _act(settings["mood"])
        time.sleep(settings["pause"])
        losses.append(base + draws.random())
        if reports is not None and reports(epoch, losses[-1]) and epoch < settings["epochs"]:
            stopped = epoch
        with (folder / LOG).open("a") as file:
            file.write(json.dumps({"epoch": epoch, "pid": os.getpid()}) + "\n")
        temporary = folder / f".{STATE}"
        temporary.write_text(json.dumps([losses, draws.getstate()]))
        os.replace(temporary, folder / STATE)
        if stopped:
            break
    known = [math.nan if settings["mood"] == "nan" else loss for loss in losses]
    return {
        "failure": None,
        "curves": {"val/loss": known, "epochs": [len(losses)]},
        "run_seconds": 0.0,
        "pruned": stopped,
        **({"sent": lambda: None} if settings["mood"] == "unsendable" else {}),
    }


def _act(mood):
    if mood == "raises":
        raise ValueError("this cell\nraises")
    if mood == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if mood == "exits":
        sys.exit(3)
    if mood == "full":
        raise OSError(28, "No space left on device", "state.json")


def toy(out, **changed):
    """A sweep of the task; call it where it is registered."""
    from hopdeq_lwpf.sweeps.sweep_spec import SweepSpec

    settings = {"task": "toy", "measures": ["val/loss", "epochs"], "seeds": [0], "out": str(out)}
    return SweepSpec(**{**settings, **changed})


def score(losses):
    """What a record with these losses says: the last one, to six digits."""
    return math.nan if losses[-1] is None else float(f"{losses[-1]:.6g}")


if __name__ == "__main__":
    # Under its importable name, as the workers know it.
    import sweep_tasks
    from rich.console import Console

    from hopdeq_lwpf.sweeps import sweep

    with sweep_tasks.registered():
        spec = sweep_tasks.toy(sys.argv[1], **json.loads(sys.argv[2]))
        began = time.perf_counter()
        sweep.run_trials(spec, Console(stderr=True, width=200) if "-q" not in sys.argv else None)
        sys.stdout.write(f"{time.perf_counter() - began:.2f}\n")
