"""kill -9 at any point of a training, also in the middle of a write: the resumed run has the same numbers."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_training_run import BAGS, DRAWS, assert_same, settings

from hopdeq_lwpf.training import train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
# Dropout, noise, a schedule and gradients that accumulate over batches; 6 batches and 3 steps an epoch.
OPTIONS = {"model": DRAWS, "data": BAGS, "schedule": "cosine", "warmup": 2, "accumulate": 2, "epochs": 3}
POINTS = [
    ("batch", 0),
    ("step", 8),  # between two batches of one step
    ("validation", 1),
    ("end", 1),
    ("written", 1),  # the first checkpoint is complete, but has not its name
    ("renamed", 3),  # of the first epoch there is a line, and one of the two checkpoints
    ("half checkpoint", 3),
    ("half line", 1),
]


def fields(out):
    given = dataclasses.asdict(settings(out, **OPTIONS))
    del given["resume"]
    return given


def kill(pairs, seconds=240):
    """Train with each of the settings until the point beside them; the signals that ended the trainings."""
    words = [sys.executable, str(Path(__file__).with_name("killed_training.py")), json.dumps(pairs)]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


def go_on(out):
    """Resume, or begin again where the process was killed before there was anything to resume."""
    begun = (out / "last.ckpt").exists()
    trained = train(settings(out, **OPTIONS, resume=begun))
    assert not list(out.glob(".*")), "a half-written file was left"
    return trained


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts."""
    return train(settings(tmp_path_factory.mktemp("whole") / "out", **OPTIONS))


def test_a_run_killed_at_any_kind_of_point_goes_on_exactly(whole, tmp_path):
    points = [*POINTS, ("batch", 1000)]  # the last is never reached
    outs = [tmp_path / str(number) for number in range(len(points))]
    signals = kill([[fields(out), point] for out, point in zip(outs, points, strict=True)])
    assert signals == [*[signal.SIGKILL] * len(POINTS), 0]
    for out in outs:
        assert_same(whole, go_on(out))


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "count"),
    [
        *(("batch", 18), ("step", 18), ("validation", 3), ("end", 3), ("half checkpoint", 4)),
        *(("written", 5), ("renamed", 5), ("half line", 3)),
    ],
)
def test_a_run_killed_at_every_point_goes_on_exactly(whole, tmp_path, what, count):
    outs = [tmp_path / str(number) for number in range(count)]
    signals = kill([[fields(out), (what, number)] for number, out in enumerate(outs)])
    assert signals == [signal.SIGKILL] * count
    for out in outs:
        assert_same(whole, go_on(out))


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_goes_on_exactly(whole, tmp_path):
    """Each resumed run is killed, too; two of them get an epoch further before."""
    out, early = tmp_path / "out", [("batch", 2), ("written", 1), ("half checkpoint", 0), ("half line", 0)]
    points = [*early, ("step", 7), *early, ("step", 7), *early, ("validation", 0)]
    signals = kill([[fields(out), point] for point in points])
    assert signals.count(signal.SIGKILL) >= 10
    assert_same(whole, go_on(out))
