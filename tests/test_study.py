"""A study of trainings: the same numbers whoever runs it, nothing lost when it is killed, failures that are said."""

import csv
import json
import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from hopdeq_lwpf import find
from hopdeq_lwpf.cli import main
from hopdeq_lwpf.data import DataError
from hopdeq_lwpf.sweeps.engine.jobs import Job
from hopdeq_lwpf.sweeps.engine.records import TRIALS, add_record, measures, read_records, remove_checkpoints
from hopdeq_lwpf.sweeps.engine.workers import LocalExecutor
from hopdeq_lwpf.sweeps.reports.study_report import command
from hopdeq_lwpf.sweeps.study import load, run_trials
from hopdeq_lwpf.sweeps.study_spec import TASKS, SpecError, StudySpec
from hopdeq_lwpf.sweeps.trials.train_trial import EpochClock, run_trial, saved_bytes
from hopdeq_lwpf.training import Learner, Learning, build_data, build_network, read_metrics, train

TINY = {"num_bags": 64, "batch_size": 16}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of six trials, two processes; one failed at first, since a file stood where its folder goes."""
    out = tmp_path_factory.mktemp("study") / "out"
    spec = StudySpec(
        forgetting=("none", "relu"),
        steps=(1, "converged"),
        adjoint=("implicit",),
        inject=("start", "input"),
        seeds=(3,),
        epochs=2,
        data=TINY,
        last=1,
        out=str(out),
    )
    blocked = out / "trials" / spec.trials()[3].folder
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    before = run_trials(spec)
    blocked.unlink()
    return spec, before, run_trials(spec)


# --- trials


def test_a_failed_trial_is_recorded_and_run_again(finished):
    spec, before, after = finished
    ((trial, record),) = before.failures()
    assert trial == spec.trials()[3]
    assert record["failure"]["error"] == "SpecError"
    assert "is a file" in record["failure"]["message"]
    assert math.isnan(before.values(trial.condition, "score")[0])
    assert not after.failures()
    lines = (Path(spec.out) / TRIALS).read_text().splitlines()
    assert len(lines) == 7, "six trials and the failure; nothing was run twice"
    hashes = [json.loads(line)["hash"] for line in lines]
    assert sorted(hashes) == sorted([*(each.hash for each in spec.trials()), trial.hash])


def test_a_record_says_everything_about_its_trial(finished):
    spec, _, study = finished
    for trial, record in zip(study.trials, study.records, strict=True):
        assert record["settings"] == trial.settings()
        assert record["condition"]["steps"] == trial.condition.steps
        assert record["seed"] == 3
        assert set(record["versions"]) == {"hopdeq_lwpf", "torch", "numpy", "python", "machine"}
        assert len(record["curves"]["val/accuracy"]) == 2
        assert record["costs"]["saved_bytes"] > 0
        assert 0 < record["costs"]["epoch_seconds"] <= record["costs"]["seconds"]
        detached = any("z0 was detached" in text for text in record["warnings"])
        assert detached == (trial.condition.steps == "converged" and trial.condition.inject == "start")
        folder = Path(spec.out) / record["folder"]
        assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "config.yaml"}
        # Means over the last epoch, against the file that the training wrote.
        last = read_metrics(folder / "metrics.jsonl").records[-1]["metrics"]
        found = measures(record, spec.last, TASKS[record["condition"]["task"]].score)
        assert found["score"] == pytest.approx(last["val/accuracy"], rel=1e-5)
        assert found["train_score"] == pytest.approx(last["train/accuracy"], rel=1e-5)
        assert found["steps_max"] == last["train/layer/steps_max"]
        assert found["support"] == pytest.approx(last["val/layer/support"], rel=1e-5)
        solved = trial.condition.steps == "converged"
        lost = solved and trial.condition.inject == "start"
        assert (found["query_gradient"] == 0) == lost
        assert found["forgotten"] == last["val/layer/forgotten"]
        assert (found["adjoint_steps"] is not None) == solved
        assert record["measures"] == found


def test_the_numbers_are_those_of_hopdeq_lwpf_train(finished, tmp_path):
    _, _, study = finished
    for trial, record in [*zip(study.trials, study.records, strict=True)][1::2]:
        out = tmp_path / trial.folder
        here = run_trial(trial.settings(), out)
        assert here["failure"] is None
        assert here["curves"] == record["curves"], "another process, other trials before it"
        assert here["costs"]["saved_bytes"] == record["costs"]["saved_bytes"]
    trial, record = study.trials[5], study.records[5]
    trained = train(replace(trial.train, out=str(tmp_path / "plain")))
    assert [round(v, 5) for v in trained.metrics.course("val/loss")] == [
        round(v, 5) for v in record["curves"]["val/loss"]
    ]


def test_the_line_of_a_trial_runs_it_alone(finished, capsys):
    """Every condition of the defaults, through the parser of the command line."""
    study = finished[2]
    spec = StudySpec(epochs=7, data=TINY, train={"learning_rate": 0.01, "loggers": ["csv"]}, seeds=(2,))
    for trial in (*study.trials, *spec.trials()):
        arguments = shlex.split(command(trial))[1:]
        with pytest.raises(SystemExit, match="0"):
            main([*arguments, "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)
        assert {k: v for k, v in printed.items() if k not in ("out", "resume")} == trial.settings()


def test_what_is_finished_is_not_run_again_also_by_another_spec(finished, monkeypatch):
    spec, _, study = finished

    def never(self, job):
        raise AssertionError("something was to be run")

    monkeypatch.setattr("hopdeq_lwpf.sweeps.engine.workers.LocalExecutor.submit", never)
    part = replace(spec, forgetting=("relu",), last=2, confidence=0.9, workers=1)
    again = run_trials(part)
    assert again.missing() == 0
    assert [record["hash"] for record in again.records] == [trial.hash for trial in part.trials()]
    other = load(replace(spec, epochs=3))
    assert other.missing() == 6


def test_a_second_study_in_the_same_folder_waits_its_turn(finished):
    fcntl = pytest.importorskip("fcntl")
    spec = finished[0]
    with (Path(spec.out) / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SpecError, match="another study runs there"):
            run_trials(spec)


def test_a_mistake_that_all_trials_share_is_found_before_any_runs(tmp_path):
    spec = StudySpec(model={"num_head": 2}, seeds=(0,), out=str(tmp_path / "out"))
    with pytest.raises(SpecError, match="num_head.*Did you mean 'num_heads'"):
        run_trials(spec)
    with pytest.raises(SpecError, match="num_bag.*Did you mean 'num_bags'"):
        run_trials(replace(spec, model={}, data={"num_bag": 2}))
    assert not (tmp_path / "out").exists()


# --- processes


def children(pid):
    """The processes that a process has started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts processes in /proc")
@pytest.mark.parametrize(
    "signs",
    [
        pytest.param([signal.SIGKILL], id="kill"),
        pytest.param([signal.SIGINT, signal.SIGTERM, signal.SIGKILL], id="all", marks=pytest.mark.long),
    ],
)
def test_a_killed_study_goes_on_and_leaves_no_process_behind(signs, tmp_path):
    out = tmp_path / "out"
    units = ["none", "relu", "pfu", "topk"][: len(signs) + 1]
    options = {"steps": [1], "forgetting": units, "seeds": [0], "epochs": 40, "data": TINY}
    spec = StudySpec(**{**options, "out": str(out), "workers": 1})
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"task": "bit-pattern", **options}))
    words = [sys.executable, "-m", "hopdeq_lwpf.cli", "compare", str(tmp_path / "a.yaml"), "--workers", "1"]
    for finished, sign in enumerate(signs):
        with (tmp_path / "log").open("w") as log:
            driver = subprocess.Popen(
                [*words, "--out", str(out)], stdout=log, stderr=log, start_new_session=True
            )
        folder = out / "trials" / spec.trials()[finished].folder
        until(
            lambda folder=folder: (
                (folder / "metrics.jsonl").exists()
                and len((folder / "metrics.jsonl").read_text().splitlines()) > 5
            ),
            "the next trial does not begin",
        )
        workers = children(driver.pid)
        driver.send_signal(sign)
        assert driver.wait(30) == (130 if sign == signal.SIGINT else -sign), (tmp_path / "log").read_text()
        until(lambda workers=workers: not any(map(alive, workers)), "a worker outlives its driver", 10)
        assert "Traceback" not in (tmp_path / "log").read_text()
        assert len(read_records(out / TRIALS)) == finished
        assert (folder / "last.ckpt").exists()
        read = read_metrics(folder / "metrics.jsonl")
        assert len(read.records) < 40, "the worker went on to the end of its trial"
    with (out / TRIALS).open("a") as file:
        file.write('{"format": 1, "hash": "12')  # a line that was cut off
    study = run_trials(spec)
    assert study.missing() == 0
    assert not study.failures()
    lines = [line for line in (out / TRIALS).read_text().splitlines() if line.endswith("}")]
    assert sorted(json.loads(line)["hash"] for line in lines) == sorted(t.hash for t in spec.trials())
    resumed = [(out / r["folder"] / "metrics.jsonl").read_text().count("resumed_at") for r in study.records]
    assert resumed == [*(1 for _ in signs), 0]
    whole = run_trial(spec.trials()[0].settings(), tmp_path / "whole")
    assert whole["curves"] == study.records[0]["curves"], "a resumed trial has the numbers of a whole one"


def test_a_worker_that_dies_fails_its_trial_alone(tmp_path):
    trials = StudySpec(forgetting=("none",), steps=(1, 2), seeds=(0,), epochs=1, data=TINY).trials()
    long = replace(trials[0].train, epochs=5000).as_dict()
    jobs = [Job("a", long, str(tmp_path / "a")), Job("b", trials[1].settings(), str(tmp_path / "b"))]

    def kill():
        until((tmp_path / "a" / "metrics.jsonl").exists, "the first trial does not begin")
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    executor, answers = LocalExecutor(1), {}
    for job in jobs:
        executor.submit(job)
        answers |= {job.key: answer for job, answer in executor.wait()}
    executor.close()
    killer.join()
    assert answers["a"]["failure"]["error"] == "WorkerDied"
    assert "signal 9" in answers["a"]["failure"]["message"]
    assert answers["b"]["failure"] is None
    assert not multiprocessing.active_children()


def test_a_damaged_checkpoint_is_a_new_beginning(finished, tmp_path):
    _, _, study = finished
    trial, folder = study.trials[0], tmp_path / "a"
    folder.mkdir()
    (folder / "last.ckpt").write_bytes(b"PK\x03\x04 cut off")
    (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "metrics": {}}\n')
    found = run_trial(trial.settings(), folder)
    assert found["failure"] is None
    assert found["curves"] == study.records[0]["curves"]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    remove_checkpoints(folder)
    assert not list(folder.glob("*.ckpt"))


def test_what_goes_wrong_in_training_is_the_failure_of_the_trial(tmp_path):
    settings = StudySpec(seeds=(0,), data=TINY).trials()[0].settings()
    found = run_trial({**settings, "model": {"model": "pooling", "input_size": 5}}, tmp_path / "a")
    assert found["failure"]["error"] in ("RuntimeError", "ValueError")
    assert "Traceback" in found["failure"]["traceback"]
    assert found["curves"] == {}


# --- what is measured


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(5))

        def forward(self, x):
            hidden = x * self.weight  # keeps x (20 numbers; the weight is a parameter)
            return (torch.exp(hidden) * hidden.view(4, 5)).sum(-1)  # exp and hidden, each once

    learner = Learner(Net(), Learning(loss="mse"))
    x, target = torch.rand(4, 5), torch.rand(4)
    count = saved_bytes(learner, (x, target))
    # x, exp(hidden), hidden: 20 float32 each; the loss keeps prediction and target: 4 each.
    assert count == 4 * (3 * 20 + 2 * 4)
    assert learner.model.weight.grad is None


def test_more_unrolled_steps_save_more_and_an_equilibrium_does_not(finished):
    study = finished[2]
    settings = StudySpec(forgetting=("none",), seeds=(0,), data=TINY, epochs=1)
    saved = {}
    for steps in (1, 2, 3, 8):
        spec = replace(settings, steps=(steps,)).trials()[0].train
        batch = next(iter(build_data(spec.data, 0).train_dataloader()))
        saved[steps] = saved_bytes(Learner(build_network(spec.model), Learning(loss="binary")), batch)
    each = saved[3] - saved[2]
    assert each > 0
    assert saved[8] - saved[3] == 5 * each, "every step saves the same"
    by_condition = {
        (t.condition.forgetting, t.condition.dynamics): r
        for t, r in zip(study.trials, study.records, strict=True)
    }
    solved = by_condition["none", "converged implicit start"]["costs"]["saved_bytes"]
    assert solved < saved[3]


def test_the_clock_stops_for_validation_and_goes_on_after_a_restart(monkeypatch):
    now = iter([10.0, 12.0, 20.0, 25.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = EpochClock()
    clock.on_train_epoch_start(None, None)
    clock.on_validation_start(None, None)
    clock.on_train_epoch_end(None, None)  # the end of validation, which counts nothing
    assert clock.seconds == [2.0]
    other = EpochClock()
    other.load_state_dict(clock.state_dict())
    other.on_train_epoch_start(None, None)
    other.on_train_epoch_end(None, None)  # without validation
    assert other.seconds == [2.0, 5.0]
    assert clock.seconds == [2.0], "the restored clock has a list of its own"


# --- the file of trials


def test_of_several_records_of_a_trial_the_last_success_counts(tmp_path):
    path = tmp_path / TRIALS
    failure = {"error": "E", "message": "m"}
    for hash_, failed, mark in (
        ("a", True, 0),
        ("a", False, 1),
        ("a", True, 2),
        ("b", True, 3),
        ("b", True, 4),
    ):
        add_record(path, {"format": 1, "hash": hash_, "failure": failure if failed else None, "mark": mark})
    path.write_text(path.read_text() + '{"format": 1, "ha')
    assert {key: record["mark"] for key, record in read_records(path).items()} == {"a": 1, "b": 4}
    add_record(path, {"format": 1, "hash": "c", "failure": None, "mark": 5})
    assert set(read_records(path)) == {"a", "b", "c"}, "the cut line was ended first"
    assert read_records(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [("hello\n", "holds no trials, but 1 lines"), ('{"hash": "a", "format": 99}\n', "has format 99")],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, message):
    (tmp_path / TRIALS).write_text(text)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / TRIALS)


# --- command line


def test_the_study_is_written_and_shown(finished, capsys):
    spec = finished[0]
    out = Path(spec.out)
    settings = out.parent / "settings.yaml"
    settings.write_text(yaml.safe_dump(spec.as_dict()))
    assert main(["compare", "--config", str(settings)]) == 0
    shown = capsys.readouterr()
    assert "6 trials: 6 finished before, 0 to run" in shown.err
    assert "converged, implicit, input" in shown.out
    names = {"results.csv", "table.md", "table.tex", "report.html"}
    names |= {f"{name}-bit-pattern.{kind}" for name in ("score", "cost", "curves") for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == names | {
        TRIALS,
        "trials",
        ".lock",
        "study.db",
        "settings.yaml",
    }
    for name in names:
        assert str(out / name) in shown.out
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["hash"] for row in rows] == [trial.hash for trial in spec.trials()]
    assert {row["failure"] for row in rows} == {""}
    assert float(rows[0]["val/accuracy"]) == pytest.approx(
        measures(finished[2].records[0], 1, "val/accuracy")["val/accuracy"]
    )


def test_the_defaults_are_the_named_settings():
    named = find("sweeps", "one_step_vs_converged")
    assert named.pop("task") == ["bit-pattern", "repertoires"]
    assert StudySpec().task == ("bit-pattern",)
    assert {name: value for name, value in StudySpec().as_dict().items() if name != "task"} == named
    assert len(StudySpec().conditions()) == 18
    assert len(StudySpec().trials()) == 90
