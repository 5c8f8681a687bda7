"""Searches: points in the space, hopeless trials stopped by the rule, nothing lost when a search goes on."""

import inspect
import json
import math
import shlex
import threading
from dataclasses import replace

import optuna
import pytest
import sweep_tasks
from sweep_tasks import expected, score, toy
from test_sweep_engine import TRIALS, Threads, file_lines, told

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.sweeps import sweep as sweeps
from hopdeq_lwpf.sweeps.engine import runs
from hopdeq_lwpf.sweeps.engine.epoch_reports import REPORTS, VERDICTS, Listener, Reports, remove_reports
from hopdeq_lwpf.sweeps.engine.lines import add_line, read_lines
from hopdeq_lwpf.sweeps.engine.search import SearchSpec
from hopdeq_lwpf.sweeps.engine.state import State
from hopdeq_lwpf.sweeps.estimate import plan
from hopdeq_lwpf.sweeps.reports.folder import notes as report_notes
from hopdeq_lwpf.sweeps.reports.sweep_report import command, write_results
from hopdeq_lwpf.sweeps.reports.sweep_results import findings
from hopdeq_lwpf.sweeps.sweep import found_points, load, run_trials
from hopdeq_lwpf.sweeps.sweep_spec import SweepSpec

SPACE = {"x": {"low": -2.0, "high": 4.0}, "y": [0.0, 1.0]}


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setattr(runs, "build_executor", lambda text, workers, **_: Threads(workers))
    with sweep_tasks.registered():
        yield


def sought(out, **changed):
    search = {"space": SPACE, "trials": 12, **changed.pop("search", {})}
    return toy(out, search=search, workers=changed.pop("workers", 1), **changed)


# --- what is asked for


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"space": SPACE, "trial": 3}, "search: 'trial' is not one of .*Did you mean 'trials'"),
        ({"trials": 3}, "search.space is empty"),
        ({"space": [1]}, "search.space must be a mapping"),
        ({"space": {"x": 3}}, "search.space.x must be {low"),
        ({"space": {"x": {"low": 1}}}, "search.space.x: high is missing"),
        ({"space": {"x": {"low": 1, "hig": 2}}}, "'hig' is not one of .*Did you mean 'high'"),
        ({"space": {"x": {"low": "a", "high": 2}}}, "search.space.x.low must be a number, got 'a'"),
        ({"space": {"x": {"low": 2, "high": 1}}}, "low 2 is above high 1"),
        ({"space": {"x": {"low": 0.0, "high": 1.0, "log": True}}}, "with log, low must be above 0"),
        ({"space": {"x": {"low": 1.0, "high": 2.0, "log": 1}}}, "log must be true or false"),
        ({"space": {"x": {"low": 1.0, "high": 2.0, "log": True, "step": 0.1}}}, "log and step do not go"),
        ({"space": {"x": {"low": 1, "high": 5, "step": 0.5}}}, "step must be whole"),
        ({"space": {"x": {"low": 1, "high": math.inf}}}, "high must be a finite number"),
        ({"space": {"x": []}}, "search.space.x is empty"),
        ({"space": {"x": [1, 1]}}, "names a value twice"),
        ({"space": {"z": [1]}}, "search.space: 'z' is no setting of task 'toy'"),
        ({"space": {"seed": [1]}}, "'seed' is seen to by the sweep; use seeds"),
        ({"space": SPACE, "sampler": "tpee"}, "'tpee' is not one of .*Did you mean 'tpe'"),
        ({"space": SPACE, "pruner": "half"}, "search.pruner 'half' is not one of"),
        ({"space": SPACE, "direction": "up"}, "search.direction 'up' is not one of"),
        ({"space": SPACE, "trials": 0}, "search.trials must be a whole number of at least 1"),
        ({"space": SPACE, "seed": -1}, "search.seed must be"),
        ({"space": SPACE, "min_epochs": 0}, "search.min_epochs must be"),
        ({"space": SPACE, "reduction": 1}, "search.reduction must be a whole number of at least 2"),
    ],
)
def test_mistakes_in_a_search_are_said(search, said, tmp_path):
    with pytest.raises(SpecError, match=said):
        toy(tmp_path, search=search)


def test_a_search_takes_one_seed_and_a_pruner_a_score_of_epochs(tmp_path):
    with pytest.raises(SpecError, match="a search tries each point with one seed, got seeds \\[0, 1\\]"):
        sought(tmp_path, seeds=[0, 1])
    spec = sought(tmp_path / "out", measures=["epochs"], search={"pruner": "halving"})
    with pytest.raises(SpecError, match="needs a score that is known after each epoch"):
        run_trials(spec)
    assert not (tmp_path / "out").exists()


def test_corners_of_the_space_are_built_before_anything_runs():
    space = {"optimizer": ["adamw", "adamm"], "learning_rate": {"low": 1e-4, "high": 0.1, "log": True}}
    with pytest.raises(SpecError, match="optimizer 'adamm' is not one of .*Did you mean 'adam'"):
        SweepSpec(base="train_ham_mnist", seeds=[0], search={"space": space})


def test_text_that_is_a_number_in_yaml_is_one():
    space = SearchSpec.parse({"space": {"learning_rate": {"low": "1e-4", "high": 0.1, "log": True}}}).space
    assert space["learning_rate"].low == 1e-4


# --- points


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_tries_as_many_points_as_it_is_told_and_all_lie_in_its_space(sampler, tmp_path):
    space = {
        "x": {"low": 0.01, "high": 1.0, "log": True},
        "y": {"low": 0.0, "high": 1.0, "step": 0.25},
        "epochs": {"low": 2, "high": 4},
        "options": [{"a": 1}, {"a": 2}],
    }
    spec = sought(tmp_path, search={"space": space, "sampler": sampler, "seed": 3})
    run_trials(spec)
    records = file_lines(tmp_path)
    assert len({record["hash"] for record in records}) == 12
    for record in records:
        settings = record["settings"]
        assert 0.01 <= settings["x"] <= 1
        assert settings["y"] in (0, 0.25, 0.5, 0.75, 1)
        assert settings["epochs"] in (2, 3, 4)
        assert type(settings["epochs"]) is int
        assert settings["options"] in ({"a": 1}, {"a": 2})
        assert record["curves"]["val/loss"] == expected(settings)
        assert record["pruned"] is None
        assert set(record["search"]["params"]) == set(space)
    assert len({record["settings"]["x"] for record in records}) == 12
    assert {record["settings"]["options"]["a"] for record in records} == {1, 2}
    other = sought(tmp_path / "other", search={"space": space, "sampler": sampler, "seed": 3})
    run_trials(other)
    points = [[line["settings"] for line in file_lines(out)] for out in (tmp_path, tmp_path / "other")]
    assert points[0] == points[1], "the same seed, the same points"


def test_the_sampler_learns_where_the_score_is_low_and_does_not_where_it_is_random(tmp_path):
    """The best x is 1; after its first ten points TPE looks near it."""
    found = {}
    for sampler in ("tpe", "random"):
        spec = sought(tmp_path / sampler, search={"trials": 40, "sampler": sampler})
        run_trials(spec)
        late = file_lines(spec.out)[-15:]
        found[sampler] = sum(abs(line["settings"]["x"] - 1) for line in late) / 15
    # Of the uniform distribution on [-2, 4] the mean distance is 1.5; its deviation over 15 points is .22.
    assert found["tpe"] < 0.9 < found["random"]


def test_the_best_points_come_first_as_a_grid_that_runs_nothing_again(tmp_path):
    spec = sought(tmp_path)
    sweep = run_trials(spec)
    scores = [record["measures"]["score"] for record in sweep.records]
    assert len(scores) == 12
    assert scores == sorted(scores)
    assert sweep.missing() == 0
    cell = sweep.trials[0].cell
    best = min(file_lines(tmp_path), key=lambda line: line["curves"]["val/loss"][-1])
    assert cell.level("point") == f"x={best['settings']['x']:.4g}, y={best['settings']['y']:.4g}"
    before = (tmp_path / TRIALS).read_bytes()
    run_trials(sweep.spec)
    assert (tmp_path / TRIALS).read_bytes() == before
    again = replace(sweep.spec, seeds=(0, 1), only=sweep.spec.only[:2])
    assert len(run_trials(again).trials) == 4
    assert len(file_lines(tmp_path)) == 14, "the two best with one more seed"
    assert load(replace(spec, out=str(tmp_path / "empty"))).missing() == 1
    assert found_points(replace(spec, out=str(tmp_path / "empty"))).search == {}


def test_every_cell_of_a_grid_has_a_search_of_its_own(tmp_path):
    spec = sought(tmp_path, grid={"epochs": [1, 3]}, search={"trials": 5})
    sweep = run_trials(spec)
    records = file_lines(tmp_path)
    assert [record["settings"]["epochs"] for record in records] == [1, 3] * 5, "in turns"
    assert len({record["search"]["study"] for record in records}) == 2
    assert len(sweep.trials) == 10
    assert {trial.cell.level("epochs") for trial in sweep.trials} == {"1", "3"}


def test_a_point_that_is_proposed_again_is_told_and_not_run_again(tmp_path):
    spec = sought(tmp_path, search={"space": {"y": [0.0, 1.0]}, "trials": 8}, workers=2)
    run_trials(spec)
    assert len(file_lines(tmp_path)) == 2
    entries = told(tmp_path)
    assert len(entries) == 8
    assert {state for _, state, _, _ in entries} == {"COMPLETE"}
    values = {line["hash"]: score(line["curves"]["val/loss"]) for line in file_lines(tmp_path)}
    assert {(key, value) for key, _, value, _ in entries} == set(values.items())


def test_points_that_another_search_has_run_are_points_of_this_one_too(tmp_path):
    """The samplers have one seed, so that all random points are proposed again, and none is run again."""
    first = sought(tmp_path, search={"sampler": "random", "space": {"x": SPACE["x"]}, "trials": 5})
    hashes = {trial.hash for trial in run_trials(first).trials}
    second = replace(first, last=2)
    for _ in range(2):
        assert {trial.hash for trial in run_trials(second).trials} == hashes
        assert len(file_lines(tmp_path)) == 10, "each point once more, with a note of the second search"
    assert {trial.hash for trial in load(first).trials} == hashes, "the first search keeps them"
    assert len({line["search"]["study"] for line in file_lines(tmp_path)}) == 1, "it ran them"


def test_points_of_another_search_are_known_where_the_study_is_lost(tmp_path):
    first = sought(tmp_path, search={"sampler": "random", "space": {"x": SPACE["x"]}, "trials": 5})
    run_trials(first)
    second = replace(first, last=2)
    run_trials(second)
    for file in tmp_path.glob("study.db*"):
        file.unlink()
    run_trials(second)
    assert len(file_lines(tmp_path)) == 10
    assert [state for _, state, _, _ in told(tmp_path)] == ["COMPLETE"] * 5


def test_a_search_may_look_for_a_low_cost(tmp_path):
    settings = {"set": {"experiment": "fit", "n": 16, "patterns": 8}, "measures": ["seconds"], "seeds": [0]}
    search = {"space": {"radius": {"low": 2, "high": 12}}, "trials": 4}
    spec = SweepSpec(task="sdm", search=search, out=str(tmp_path), workers=1, **settings)
    seconds = [record["costs"]["seconds"] for record in run_trials(spec).records]
    assert seconds == sorted(seconds)
    assert all(math.isfinite(value) for _, _, value, _ in told(tmp_path))
    assert {value for _, _, value, _ in told(tmp_path)} == set(seconds)


def test_more_senseless_points_than_calls_may_nest_end_no_search(tmp_path, monkeypatch):
    spec = sought(tmp_path, search={"trials": 5})
    depths = []

    def refuse(self, cell, seed, point=None):
        depths.append(len(inspect.stack(0)))
        raise SpecError("no sense")

    plans = sweeps._search(spec, spec.sought(), spec.cells()[0])
    monkeypatch.setattr(SweepSpec, "trial", refuse)
    runs.run_searches([plans], str(tmp_path), sweeps._kind(spec))
    assert len(depths) == 5
    assert len(set(depths)) == 1, "one after the other, none inside of the one before"


# --- kills


def test_a_search_that_was_stopped_goes_on_with_what_ran_and_new_points(tmp_path, monkeypatch):
    spec = sought(tmp_path, search={"sampler": "random"})
    whole = replace(spec, out=str(tmp_path / "whole"))
    run_trials(whole)
    original, calls = State.end, []

    def killed(self, trial, ended):
        calls.append(trial.number)
        if len(calls) == 5:
            raise KeyboardInterrupt
        original(self, trial, ended)

    def deadly(self, asked, attrs):
        if asked.number == 8:
            raise KeyboardInterrupt  # between the point and its hash
        described(self, asked, attrs)

    described = State.describe
    monkeypatch.setattr(State, "end", killed)
    with pytest.raises(KeyboardInterrupt):
        run_trials(spec)
    monkeypatch.setattr(State, "end", original)
    assert len(file_lines(tmp_path)) == 5, "written, and not told"
    monkeypatch.setattr(State, "describe", deadly)
    with pytest.raises(KeyboardInterrupt):
        run_trials(spec)
    monkeypatch.setattr(State, "describe", described)
    run_trials(spec)
    entries = told(tmp_path)
    assert [state for _, state, _, _ in entries].count("COMPLETE") == 12
    assert [state for _, state, _, _ in entries].count("FAIL") == 1
    hashes = [line["hash"] for line in file_lines(tmp_path)]
    assert len(set(hashes)) == len(hashes) == 12
    # The first eight points and the ninth, taken up again, are those of a search that was not stopped.
    assert hashes[:9] == [line["hash"] for line in file_lines(whole.out)][:9]


def test_a_search_whose_study_is_lost_is_told_of_what_was_tried(tmp_path):
    spec = sought(tmp_path, set={"epochs": 9}, search={"pruner": "halving", "reduction": 2})
    run_trials(spec)
    before, entries = (tmp_path / TRIALS).read_bytes(), told(tmp_path)
    for file in tmp_path.glob("study.db*"):
        file.unlink()
    run_trials(spec)
    assert (tmp_path / TRIALS).read_bytes() == before
    # A pruned trial's last value is not in its record.
    assert {e[:2] for e in told(tmp_path)} == {e[:2] for e in entries}
    longer = sought(tmp_path, set={"epochs": 9}, search={"pruner": "halving", "reduction": 2, "trials": 14})
    run_trials(longer)
    assert len(told(tmp_path)) == 14, "in the same study"


def test_points_that_fail_count_and_are_tried_again_by_the_next_start(tmp_path):
    spec = sought(tmp_path, search={"space": {"mood": ["raises"]}, "trials": 3})
    run_trials(spec)
    assert [line["failure"]["error"] for line in file_lines(tmp_path)] == ["ValueError"] * 3
    run_trials(spec)
    assert len(file_lines(tmp_path)) == 4, "they are one point"
    assert {state for _, state, _, _ in told(tmp_path)} == {"FAIL"}
    found = load(spec)
    assert [trial.cell.level("point") for trial, _ in found.failures()] == ["mood=raises"]
    assert "0 of 1 finished, 1 failed" in findings(found)[0]
    line = shlex.split(command(found, found.trials[0]))
    assert line[line.index("--search") :][:4] == ["--search", "{}", "--set", 'mood="raises"']


def test_the_report_counts_what_failed_and_what_was_stopped(tmp_path):
    space = {"x": SPACE["x"], "mood": ["good", "raises"]}
    spec = sought(tmp_path, set={"epochs": 9}, search={"space": space, "pruner": "halving", "reduction": 2})
    found = run_trials(spec)
    counts = [0, 0, 0]
    for line in {line["hash"]: line for line in file_lines(tmp_path)}.values():
        counts[2 if line["failure"] is not None else line["pruned"] is not None] += 1
    assert min(counts) > 0, "this seed has some of each"
    assert len(found.failures()) == counts[2]
    said = f"{counts[0]} of {sum(counts)} finished, {counts[2]} failed, {counts[1]} stopped early, 0 not run"
    assert said in findings(found)[0]
    assert [record["failure"] is None for record in found.records] == [True] * counts[0] + [False] * counts[2]
    write_results(found)
    page = (tmp_path / "report.html").read_text()
    assert f"failed: {counts[2]}; not run: 0" in page
    assert f"{counts[1]} stopped early" in page
    lines = report_notes(found.records, str(tmp_path), found.stopped)
    assert not [line for line in lines if "nowhere" in line], "every trial of the folder is accounted for"


def test_a_dry_run_counts_the_points_of_its_own_search(tmp_path):
    spec = sought(tmp_path, search={"trials": 4})
    run_trials(spec)
    assert "Nothing is left to run" in plan(spec)[1][2]
    other = replace(spec, search={"space": {"x": SPACE["x"]}, "trials": 4})
    assert "0 trials ended" in plan(other)[1][1]


# --- pruning


def halving(curves, least, reduction):
    """Asynchronous successive halving, minimizing, one trial after the other: the epochs that each is run for.

    Written from the rule: a trial that reaches rung r, after least * reduction**r epochs, goes on if it is among the
    best 1 / reduction of those that have reached it, of fewer than `reduction` if it is the best.
    """
    rungs, epochs = {}, []
    for curve in curves:
        ran = len(curve)
        for rung in range(30):
            at = least * reduction**rung
            if at > len(curve):
                break
            reached = rungs.setdefault(rung, [])
            reached.append(curve[at - 1])
            keep = max(1, len(reached) // reduction)
            if curve[at - 1] > sorted(reached)[keep - 1]:
                ran = at
                break
        epochs.append(ran)
    return epochs


@pytest.mark.parametrize(("least", "reduction"), [(1, 2), (2, 3), (1, 4)])
def test_hopeless_trials_are_stopped_by_the_rule(least, reduction, tmp_path):
    search = {
        "pruner": "halving",
        "min_epochs": least,
        "reduction": reduction,
        "sampler": "random",
        "trials": 25,
    }
    spec = sought(tmp_path, set={"epochs": 9}, search=search)
    sweep = run_trials(spec)
    records = file_lines(tmp_path)
    assert len(records) == 25
    ran = halving([expected(record["settings"]) for record in records], least, reduction)
    assert [len(record["curves"]["val/loss"]) for record in records] == ran
    assert [record["pruned"] for record in records] == [None if n == 9 else n for n in ran]
    assert 3 < sum(n < 9 for n in ran) < 25
    states = {
        record["hash"]: "COMPLETE" if n == 9 else "PRUNED" for record, n in zip(records, ran, strict=True)
    }
    assert {key: state for key, state, _, _ in told(tmp_path)} == states
    assert len(sweep.trials) == sum(n == 9 for n in ran), "only whole trials are compared"
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/study.db")
    for trial, record in zip(study.trials, records, strict=True):
        assert list(trial.intermediate_values.values()) == record["curves"]["val/loss"]
    assert not list(tmp_path.glob(f"trials/*/{REPORTS}"))


def test_a_grid_runs_what_a_search_has_pruned_to_its_end(tmp_path):
    spec = sought(tmp_path, set={"epochs": 9}, search={"pruner": "halving", "reduction": 2})
    run_trials(spec)
    pruned = next(line for line in file_lines(tmp_path) if line["pruned"] is not None)
    grid = {name: [pruned["settings"][name]] for name in ("x", "y")}
    plain = toy(tmp_path, set={"epochs": 9}, grid=grid)
    assert load(plain).missing() == 1
    (record,) = run_trials(plain).records
    assert record["hash"] == pruned["hash"]
    assert record["curves"]["val/loss"] == expected(pruned["settings"])


def test_a_verdict_stands_when_the_trial_is_killed_before_it_obeys(tmp_path):
    asked = []

    def decide(epoch, value):
        asked.append((epoch, value))
        return epoch == 2

    add_line(tmp_path / REPORTS, {"epoch": 1, "value": 0.5})
    add_line(tmp_path / REPORTS, {"epoch": 2, "value": None})
    first = Listener(tmp_path, decide)
    first.listen()
    assert asked[0] == (1, 0.5)
    assert math.isnan(asked[1][1])
    again = Listener(tmp_path, lambda epoch, value: asked.append(epoch) or False)
    again.listen()
    assert asked[2:] == [1, 2], "a new study hears of all epochs"
    assert read_lines(tmp_path / VERDICTS) == [{"epoch": 1, "stop": False}, {"epoch": 2, "stop": True}]
    assert Reports(tmp_path, "val/loss")(2, 0.1) is True
    remove_reports(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_trial_that_begins_anew_in_an_empty_folder_is_answered(tmp_path):
    """As after a damaged checkpoint: the same first report, of the same length, in a new file."""
    listener, end = Listener(tmp_path, lambda epoch, value: epoch == 3), threading.Event()

    def listen():
        while not end.is_set():
            listener.listen()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    for _ in range(3):
        assert [Reports(tmp_path, "val/loss")(epoch, 1.0) for epoch in (1, 2, 3)] == [False, False, True]
        remove_reports(tmp_path)
    end.set()
    thread.join()


def test_a_training_tells_its_epochs_and_is_stopped(tmp_path, monkeypatch):
    monkeypatch.undo()  # real processes
    spec = SweepSpec(
        base="train_ham_mnist",
        set={"data": {"data": "digits", "batch_size": 64}, "model.layers": [64, 12, 10], "epochs": 4,
             "limit_batches": 4},
        search={"space": {"learning_rate": [1e-6, 0.02]}, "trials": 4, "sampler": "random", "pruner": "halving",
                "reduction": 2},
        seeds=[0],
        measures=["val/accuracy"],
        out=str(tmp_path),
        workers=1,
    )  # fmt: skip
    run_trials(spec)
    records = {record["settings"]["learning_rate"]: record for record in file_lines(tmp_path)}
    good = records[0.02]
    assert good["pruned"] is None
    assert len(good["curves"]["val/accuracy"]) == 4
    for record in records.values():
        if record["pruned"] is not None:
            assert len(record["curves"]["val/accuracy"]) == record["pruned"] < 4
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/study.db")
    assert study.direction.name == "MAXIMIZE"
    courses = [list(trial.intermediate_values.values()) for trial in study.trials]
    assert pytest.approx(good["curves"]["val/accuracy"], rel=1e-5) in courses
    assert json.dumps(good["search"]["params"]) == '{"learning_rate": "0.02"}'
