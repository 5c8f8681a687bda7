"""What a worker is asked, answers and writes, in this process."""

import json
import math
import os
import types

import pytest

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.sweeps.engine import epoch_reports, jobs, lines, runs
from hopdeq_lwpf.sweeps.engine.state import StorageError
from hopdeq_lwpf.sweeps.trials.train_trial import EpochReports


def answers_with_nan(settings, folder):
    """A runner whose numbers JSON does not have."""
    return {"failure": None, "costs": {"loss": math.nan, "best": [1.0, -math.inf, 2]}}


def answers_with_an_object(settings, folder):
    return {"failure": None, "costs": object()}


def job(name, folder):
    return jobs.Job("k", {}, str(folder), runner=f"{__name__}:{name}")


def test_numbers_that_json_has_not_are_null_in_an_answer(tmp_path):
    answer = jobs.perform(job("answers_with_nan", tmp_path))
    assert answer == {"failure": None, "costs": {"loss": None, "best": [1.0, None, 2]}}
    json.dumps(answer, allow_nan=False)


def test_an_answer_that_no_file_can_hold_is_a_failure(tmp_path):
    found = jobs.perform(job("answers_with_an_object", tmp_path))["failure"]
    assert found["error"] == "TypeError"
    assert "not JSON serializable" in found["message"]
    assert "storage" not in found


def test_lines_that_are_none_are_passed_over_and_one_that_was_cut_off_is_ended(tmp_path):
    path = tmp_path / "records" / "lines.jsonl"
    assert lines.read_lines(path) == []
    lines.add_line(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b"[1, 2]\nnot json\n" + b'{"a": 2')
    lines.add_line(path, {"a": 3}, sync=False)
    assert lines.read_lines(path) == [{"a": 1}, {"a": 3}]
    assert path.read_bytes().endswith(b'\n{"a": 2\n{"a": 3}\n')


def test_an_unfinished_last_line_is_removed_and_a_whole_one_ended(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert not lines.repair(path)
    for text, removed, left in (
        (b'{"a": 1}\n', False, b'{"a": 1}\n'),
        (b'{"a": 1}\n{"a": 2}', False, b'{"a": 1}\n{"a": 2}\n'),
        (b'{"a": 1}\n{"a": 2', True, b'{"a": 1}\n'),
    ):
        path.write_bytes(text)
        assert lines.repair(path) is removed
        assert path.read_bytes() == left


def test_an_epoch_is_told_once_and_the_verdict_ends_the_training(tmp_path):
    told = []

    def reports(epoch, value):
        told.append((epoch, value))
        return epoch >= 2

    reports.metric = "val/accuracy"
    callback = EpochReports(reports)
    trainer = types.SimpleNamespace(
        current_epoch=0, callback_metrics={"val/accuracy": 0.5}, max_epochs=3, should_stop=False
    )
    callback.on_train_epoch_end(trainer, None)
    assert (callback.stopped, trainer.should_stop) == (None, False)
    trainer.current_epoch, trainer.callback_metrics = 1, {}
    callback.on_train_epoch_end(trainer, None)
    assert (callback.stopped, trainer.should_stop) == (2, True)
    assert told[0] == (1, 0.5)
    assert told[1][0] == 2
    assert math.isnan(told[1][1]), "a metric that is missing is told as NaN"


def test_a_verdict_after_the_last_epoch_stops_nothing():
    def reports(epoch, value):
        return True

    reports.metric = "val/loss"
    callback = EpochReports(reports)
    trainer = types.SimpleNamespace(current_epoch=2, callback_metrics={}, max_epochs=3, should_stop=False)
    callback.on_train_epoch_end(trainer, None)
    assert (callback.stopped, trainer.should_stop) == (None, False)


def test_reports_and_verdicts_meet_in_the_folder(tmp_path):
    asked = []

    def decide(epoch, value):
        asked.append((epoch, value))
        return epoch == 2

    listener = epoch_reports.Listener(tmp_path, decide)
    listener.listen()
    assert not asked, "there is nothing to answer yet"
    lines.add_line(tmp_path / epoch_reports.REPORTS, {"epoch": 1, "value": None})
    lines.add_line(tmp_path / epoch_reports.REPORTS, {"epoch": 2, "value": 0.25})
    listener.listen()
    listener.listen()
    assert [epoch for epoch, _ in asked] == [1, 2]
    assert math.isnan(asked[0][1])
    reports = epoch_reports.Reports(tmp_path, "val/loss")
    assert reports(1, math.inf) is False
    assert reports(2, 0.25) is True
    epoch_reports.remove_reports(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "out"
    file.write_text("")
    with pytest.raises(SpecError, match="is a file, needs a folder"):
        runs._records(str(file))


def test_only_what_the_disk_refuses_is_said_as_such(tmp_path):
    with pytest.raises(StorageError, match="all that has ended is kept there"), runs._said(tmp_path):
        raise OSError(28, os.strerror(28))
    with pytest.raises(InterruptedError), runs._said(tmp_path):
        raise OSError(4, os.strerror(4))


def test_a_folder_that_cannot_be_made_changes_nothing(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(StorageError, match="cannot be written"), runs._held(file / "lock", "held"):
        raise AssertionError("it was held")
    assert file.read_text() == "kept"


def test_a_lock_is_held_by_one_and_let_go_at_the_end(tmp_path):
    path, said = tmp_path / "lock", "held elsewhere"
    with runs._held(path, said), pytest.raises(SpecError, match=said), runs._held(path, said):
        raise AssertionError("two held it")
    with runs._held(path, said):
        assert path.exists()
