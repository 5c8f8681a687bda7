"""The engine of sweeps: every trial once, the records first, a study that agrees with them after whatever happened."""

import errno
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sweep_tasks
from optuna.trial import TrialState
from sweep_tasks import expected, score, toy

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.sweeps.engine import database, lines, runs
from hopdeq_lwpf.sweeps.engine.executors import build_executor, parse_executor
from hopdeq_lwpf.sweeps.engine.jobs import Job, perform
from hopdeq_lwpf.sweeps.engine.records import CHECKPOINTS, TRIALS, StorageError, add_record, read_records
from hopdeq_lwpf.sweeps.engine.search import direction_of
from hopdeq_lwpf.sweeps.engine.state import State
from hopdeq_lwpf.sweeps.engine.storage_url import check_storage, hidden, sqlite_file
from hopdeq_lwpf.sweeps.sweep import load, run_trials

GRID = {"x": [0.0, 1.0, 2.0], "y": [0.0, 0.5]}
TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _toy():
    with sweep_tasks.registered():
        yield


class Threads:
    """An executor of threads, for what does not ask for processes."""

    retries = False

    def __init__(self, slots):
        self.slots, self._pool, self._jobs = slots, ThreadPoolExecutor(slots), {}

    def start(self, count):
        pass

    def submit(self, job):
        assert len(self._jobs) < self.slots
        self._jobs[self._pool.submit(perform, job)] = job

    def wait(self, timeout=None):
        done, _ = wait(self._jobs, timeout, return_when=FIRST_COMPLETED)
        return [(self._jobs.pop(future), future.result()) for future in done]

    def close(self):
        self._pool.shutdown()


@pytest.fixture
def threads(monkeypatch):
    """Sweeps run in threads of this process."""
    monkeypatch.setattr(runs, "build_executor", lambda text, workers, **_: Threads(workers))


def told(out):
    """(hash, state name, value, retry of) of every trial of the one study in the folder, by its database alone."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{out}/study.db")
    (name,) = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    found = [
        (t.user_attrs.get("hash"), t.state.name, t.value, t.user_attrs.get("retry_of")) for t in study.trials
    ]
    storage.remove_session()
    storage.engine.dispose()
    return found


def file_lines(out):
    return [json.loads(line) for line in (Path(out) / TRIALS).read_text().splitlines()]


def check_exact(spec):
    """Every trial of the spec has one complete record with the right numbers, and one COMPLETE trial that says so."""
    trials = {trial.hash: trial for trial in spec.trials()}
    complete = [line for line in file_lines(spec.out) if line["failure"] is None]
    assert sorted(line["hash"] for line in complete) == sorted(trials), "none lost, none twice"
    for line in complete:
        assert line["curves"]["val/loss"] == expected(trials[line["hash"]].settings())
    values = {key: value for key, state, value, _ in told(spec.out) if state == "COMPLETE"}
    assert sum(state == "COMPLETE" for _, state, _, _ in told(spec.out)) == len(trials)
    assert values == {key: score(expected(trial.settings())) for key, trial in trials.items()}
    assert not {"RUNNING", "WAITING"} & {state for _, state, _, _ in told(spec.out)}


# --- a grid


def test_every_trial_is_recorded_once_and_told_to_the_study(tmp_path, threads):
    spec = toy(tmp_path / "out", grid=GRID, seeds=[0, 1], set={"epochs": 3})
    found = run_trials(spec)
    assert found.missing() == 0
    check_exact(spec)
    record = file_lines(spec.out)[0]
    assert record["attempts"] == 1
    assert record["cell"] == {"x": "0.0", "y": "0.0"}
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{spec.out}/study.db")
    assert study.direction.name == "MINIMIZE"
    assert study.user_attrs["score"] == "val/loss"
    assert {(t.params["x"], t.params["y"], t.params["seed"]) for t in study.trials} == {
        (str(x), str(y), seed) for x in GRID["x"] for y in GRID["y"] for seed in (0, 1)
    }
    before = (Path(spec.out) / TRIALS).read_bytes()
    run_trials(spec)
    assert (Path(spec.out) / TRIALS).read_bytes() == before, "nothing was run again"


def test_the_numbers_do_not_depend_on_the_number_of_processes(tmp_path):
    found = {}
    for workers in (1, 3):
        spec = toy(tmp_path / str(workers), grid=GRID, seeds=[5], set={"epochs": 4}, workers=workers)
        run_trials(spec)
        check_exact(spec)
        found[workers] = {line["hash"]: line["curves"] for line in file_lines(spec.out)}
    assert found[1] == found[3]


def test_more_seeds_and_part_of_a_grid_stay_in_one_study_and_other_levels_begin_one(tmp_path, threads):
    spec = toy(tmp_path, grid=GRID, only=[{"x": 1.0}])
    run_trials(spec)
    run_trials(replace(spec, only=[]))
    run_trials(replace(spec, only=[], seeds=(0, 3)))
    check_exact(replace(spec, only=[], seeds=(0, 3)))
    assert len(told(tmp_path)) == 12
    wider = toy(tmp_path, grid={**GRID, "y": [0.0, 0.5, 1.0]})
    run_trials(wider)
    names = optuna.get_all_study_names(f"sqlite:///{tmp_path}/study.db")
    assert len(names) == 2
    sizes = [
        len(optuna.load_study(study_name=n, storage=f"sqlite:///{tmp_path}/study.db").trials) for n in names
    ]
    assert sorted(sizes) == [9, 12], "what was there is told to the new study"
    assert len(file_lines(tmp_path)) == 12 + 3


def test_a_folder_without_a_study_goes_on_and_a_lost_study_is_made_anew(tmp_path, threads):
    spec = toy(tmp_path, grid=GRID)
    run_trials(spec)
    kept = (tmp_path / TRIALS).read_text().splitlines(keepends=True)
    for file in tmp_path.glob("study.db*"):
        file.unlink()
    (tmp_path / TRIALS).write_text("".join(kept[:4]))
    run_trials(spec)
    check_exact(spec)
    assert (tmp_path / TRIALS).read_text().startswith("".join(kept[:4]))


def test_a_record_from_before_the_study_was_told_is_told_and_not_run_again(tmp_path, threads, monkeypatch):
    """The kill between the two writes."""
    spec = toy(tmp_path, grid=GRID, workers=1)
    calls = []

    def killed(self, trial, ended):
        calls.append(trial.user_attrs["hash"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(self, trial, ended)

    original = State.end
    monkeypatch.setattr(State, "end", killed)
    with pytest.raises(KeyboardInterrupt):
        run_trials(spec)
    monkeypatch.setattr(State, "end", original)
    assert [state for _, state, _, _ in told(tmp_path)] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert len(file_lines(tmp_path)) == 3
    run_trials(spec)
    check_exact(spec)
    assert len(told(tmp_path)) == 6, "no trial was made twice"


@pytest.mark.parametrize("moment", ["enqueued", "begun", "failed"])
def test_a_trial_that_a_dead_driver_left_behind_is_failed_and_run_once(moment, tmp_path, threads):
    """After the three writes between which a driver may die when it takes up a trial again."""
    spec = toy(tmp_path, grid=GRID)
    run_trials(replace(spec, only=[{"x": 0.0}]))
    left = spec.trials()[3]
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/study.db")
    params = {**dict(left.cell.levels), "seed": 0}
    study.enqueue_trial(params, user_attrs={"hash": left.hash})
    if moment != "enqueued":
        asked = study.ask()
    if moment == "failed":
        study.tell(asked, state=TrialState.FAIL)
    number = study.trials[-1].number
    run_trials(spec)
    check_exact(spec)
    assert [entry[1] for entry in told(tmp_path)].count("FAIL") == 1
    assert [entry[3] for entry in told(tmp_path) if entry[3] is not None] == [number]
    assert file_lines(tmp_path)[2]["hash"] == left.hash, "what was interrupted comes first"


def test_a_line_that_was_cut_off_is_removed_and_no_other(tmp_path, threads):
    spec = toy(tmp_path, grid=GRID)
    run_trials(spec)
    whole = (tmp_path / TRIALS).read_bytes()
    for cut in (1, 20, 200):
        (tmp_path / TRIALS).write_bytes(whole[:-cut])
        run_trials(spec)
        assert (tmp_path / TRIALS).read_bytes().startswith(whole.rpartition(b'{"format"')[0])
        assert len(file_lines(tmp_path)) == 6
        check_exact(spec)
    (tmp_path / TRIALS).write_bytes(whole[:-1])
    assert not lines.repair(tmp_path / TRIALS), "a whole line without its end is kept"
    assert (tmp_path / TRIALS).read_bytes() == whole


def test_a_second_driver_is_refused_in_the_folder_and_at_the_file(tmp_path, threads):
    fcntl = pytest.importorskip("fcntl")
    spec = toy(tmp_path / "out", grid=GRID, storage=f"sqlite:///{tmp_path}/shared.db")
    run_trials(spec)
    for lock, said in (
        ("out/.lock", "another study runs there"),
        ("shared.db.lock", "another study writes it"),
    ):
        with (tmp_path / lock).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(SpecError, match=said):
                run_trials(spec)
    assert not (tmp_path / "out" / "study.db").exists()
    check_name = optuna.get_all_study_names(f"sqlite:///{tmp_path}/shared.db")[0]
    assert check_name.startswith("out-"), "in a database of several folders each has its own name"


def test_no_trial_begins_after_the_budget(tmp_path, threads, capsys):
    from rich.console import Console

    spec = toy(tmp_path, grid=GRID, set={"pause": 0.2}, workers=1, budget=0.25 / 3600)
    found = run_trials(spec, Console(stderr=True, width=300))
    assert 0 < found.missing() < 6
    assert f"{found.missing()} trials are left" in capsys.readouterr().err
    run_trials(replace(spec, budget=None))
    check_exact(spec)


def test_two_cells_with_the_same_settings_are_one_trial(tmp_path, threads):
    spec = toy(tmp_path, grid={"which": {"a": {"x": 1.0}, "b": {"x": 1.0}, "c": {"x": 2.0}}})
    found = run_trials(spec)
    assert found.missing() == 0
    assert len(file_lines(tmp_path)) == 2


# --- what goes wrong in a trial


def test_every_way_to_fail_is_recorded_and_the_others_go_on(tmp_path):
    grid = {"mood": ["good", "raises", "nan", "dies", "exits", "unsendable"]}
    spec = toy(tmp_path, grid=grid, retries=1)
    found = run_trials(spec)
    records = {record["cell"]["mood"]: record for record in found.records}
    failures = {mood: record["failure"] for mood, record in records.items()}
    assert failures["good"] is None
    assert failures["nan"] is None
    assert failures["raises"]["error"] == "ValueError"
    assert failures["raises"]["message"] == "this cell raises"
    assert 'raise ValueError("this cell' in failures["raises"]["traceback"]
    assert failures["exits"]["error"] == "SystemExit"
    assert failures["unsendable"]["message"] == "Object of type function is not JSON serializable"
    assert failures["dies"] == {"error": "WorkerDied", "message": "the worker process died (signal 9)"}
    assert records["dies"]["attempts"] == 2
    states = {key: state for key, state, _, _ in told(tmp_path)}
    assert states == {r["hash"]: "COMPLETE" if r["failure"] is None else "FAIL" for r in records.values()}
    values = {key: value for key, _, value, _ in told(tmp_path)}
    assert values[records["nan"]["hash"]] == math.inf, "the worst there is, since Optuna takes no NaN"
    assert records["nan"]["measures"]["score"] is None
    assert records["nan"]["curves"]["val/loss"] == [None]
    lines_before = len(file_lines(tmp_path))
    again = run_trials(replace(spec, only=[{"mood": ["good", "raises"]}]))
    assert len(file_lines(tmp_path)) == lines_before + 1, "what failed is run again, what did not is not"
    assert again.failures()[0][1]["failure"]["error"] == "ValueError"


@pytest.mark.parametrize(
    ("runner", "said"),
    [
        ("no_such_module:run", "No module named 'no_such_module'"),
        ("sweep_tasks:no_such", "no_such"),
        ("math:hypot", "must be real number"),
        ("builtins:print", "must return a dict with 'failure', got NoneType"),
    ],
)
def test_a_runner_that_is_none_is_a_failure_that_says_so(runner, said):
    assert said in perform(Job("a", {}, "b", runner))["failure"]["message"]


# --- a disk that takes no more


def test_a_full_disk_under_a_trial_ends_the_sweep_and_is_no_failure_of_the_trial(tmp_path, threads):
    spec = toy(tmp_path, grid={"mood": ["good", "full"]}, workers=1)
    with pytest.raises(StorageError, match="No space left on device.*; 1 finished trials are kept"):
        run_trials(spec)
    assert [line["cell"]["mood"] for line in file_lines(tmp_path)] == ["good"]


def test_a_full_disk_under_the_records_loses_nothing(tmp_path, threads, monkeypatch):
    spec = toy(tmp_path, grid=GRID, workers=1)
    written = []

    def write(handle, data):
        """Takes half of the fourth line."""
        written.append(data)
        if len(written) == 4:
            return original(handle, data[: len(data) // 2])
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(handle, data)

    original = os.write
    monkeypatch.setattr(lines.os, "write", write)
    with pytest.raises(StorageError, match="No space left on device; 3 finished trials are kept"):
        run_trials(spec)
    monkeypatch.setattr(lines.os, "write", original)
    assert (tmp_path / TRIALS).read_text().endswith("}\n"), "the half line is gone"
    assert len(file_lines(tmp_path)) == 3
    run_trials(spec)
    check_exact(spec)


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="the system limits no files")
def test_a_limit_on_the_size_of_files_is_one_line_and_loses_nothing(tmp_path):
    spec = toy(tmp_path, grid=GRID)
    program = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000));"
        f"sys.argv = ['x', {str(tmp_path)!r}, {json.dumps(json.dumps({'grid': GRID}))}, '-q'];"
        f"sys.path.insert(0, {str(TESTS)!r}); runpy.run_path({str(TESTS / 'sweep_tasks.py')!r}, run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "StorageError" in ended.stderr.splitlines()[-1]
    run_trials(spec)
    check_exact(spec)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes; skips where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_real_full_disk_is_one_line_and_loses_nothing(small_disk, threads):
    out = small_disk / "out"
    spec = toy(out, grid=GRID)
    run_trials(replace(spec, only=[{"x": 0.0}]))
    before = (out / TRIALS).read_bytes()
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 512)
    with pytest.raises(StorageError) as said:
        run_trials(spec)
    assert "\n" not in str(said.value)
    assert "full" in str(said.value) or "No space" in str(said.value) or "disk I/O" in str(said.value)
    assert (out / TRIALS).read_bytes().startswith(before)
    filler.unlink()
    run_trials(spec)
    check_exact(spec)


def test_a_read_only_folder_is_one_line_and_loses_nothing(small_disk, threads):
    out = small_disk / "out"
    spec = toy(out, grid=GRID)
    run_trials(replace(spec, only=[{"x": 0.0}]))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match="cannot be written \\(Read-only file system\\)"):
        run_trials(spec)
    with pytest.raises(StorageError, match="cannot be written \\(Read-only file system\\)"):
        run_trials(replace(spec, out=str(small_disk / "other")))
    assert load(spec).missing() == 4, "it can still be read"
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    run_trials(spec)
    check_exact(spec)


# --- the database


def test_a_study_file_that_is_none_is_one_line(tmp_path, threads):
    spec = toy(tmp_path, grid=GRID)
    run_trials(spec)
    (tmp_path / "study.db").write_bytes(b"hello" * 1000)
    with pytest.raises(StorageError, match="not a database; move the file away and start again"):
        run_trials(spec)
    (tmp_path / "study.db").unlink()
    run_trials(spec)
    check_exact(spec)


def test_without_optuna_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        SpecError, match=r"Optuna, which is not installed: pip install 'hopdeq-lwpf\[sweeps\]'"
    ):
        run_trials(toy(tmp_path / "out", grid=GRID))
    assert not (tmp_path / "out").exists()
    assert load(toy(tmp_path / "out", grid=GRID)).missing() == 6, "reading needs no Optuna"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("study.db", "is not the URL of a database"),
        ("postgres://me@host/db", "Did you mean 'postgresql'"),
        ("journal:///file.log", "is not the URL of a database"),
        ("postgresql://me:geheim@/", None),
    ],
)
def test_urls_of_databases_are_checked_and_hide_the_password(url, said, tmp_path):
    if said is None:
        assert hidden(url) == "postgresql://me:***@/"
        check_storage(url)
        return
    with pytest.raises(SpecError, match=said):
        toy(tmp_path, grid=GRID, storage=url)
    assert "geheim" not in hidden(url)


def test_a_database_that_does_not_answer_is_one_line_without_the_password(tmp_path, threads):
    pytest.importorskip("psycopg2")
    spec = toy(tmp_path, grid=GRID, storage="postgresql://me:geheim@127.0.0.1:9/db")
    with pytest.raises(StorageError) as said:
        run_trials(spec)
    assert "\n" not in str(said.value)
    assert "geheim" not in str(said.value)
    assert "postgresql://me:***@127.0.0.1:9/db" in str(said.value)


def test_a_missing_driver_of_a_database_is_named(tmp_path, threads, monkeypatch):
    monkeypatch.setattr(database.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SpecError,
        match=r"postgresql needs a package that is missing: pip install 'hopdeq-lwpf\[postgresql\]'",
    ):
        run_trials(toy(tmp_path, grid=GRID, storage="postgresql://me@host/db"))


def test_files_of_sqlite_urls():
    assert sqlite_file("sqlite:////a/b.db") == Path("/a/b.db")
    assert sqlite_file("sqlite:///b.db?timeout=3") == Path("b.db")
    assert sqlite_file("postgresql://h/b") is None
    assert sqlite_file(None) is None


# --- executors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("locale", "'locale' is not one of local, ray, ray:ADDRESS. Did you mean 'local'"),
        ("local:3", "local has no address"),
        ("ray:", "the address is missing"),
        ("ray:ray://10.0.0.1:10001", "start the sweep on a machine of the cluster"),
        ("dask:1", "is not one of"),
    ],
)
def test_executors_that_there_are_not(text, said, tmp_path):
    with pytest.raises(SpecError, match=said):
        toy(tmp_path, executor=text, grid=GRID)


def test_executors_are_parsed():
    assert parse_executor("local") == ("local", None)
    assert parse_executor("ray") == ("ray", None)
    assert parse_executor("ray:10.0.0.1:6379") == ("ray", "10.0.0.1:6379")


def test_without_ray_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SpecError, match=r"pip install 'hopdeq-lwpf\[ray\]'"):
        build_executor("ray", 2)


def test_a_cluster_that_does_not_answer_is_one_line():
    from hopdeq_lwpf.sweeps.engine.ray_executor import _reach

    with pytest.raises(SpecError, match="executor ray:127.0.0.1:9: no cluster answers there"):
        _reach("127.0.0.1:9")
    for address in (None, "auto"):
        _reach(address)


# --- the task


def test_the_registry_is_closed_to_settings(tmp_path):
    with pytest.raises(SpecError, match="task 'sweep_tasks:run_trial' is not one of"):
        toy(tmp_path, task="sweep_tasks:run_trial")
    with pytest.raises(SpecError, match="'runner' is no setting of task"):
        toy(tmp_path, set={"runner": "os:system"})


def test_factors_that_a_sweep_has_itself_are_refused(tmp_path):
    with pytest.raises(SpecError, match="grid.seed: the sweep has a factor of this name itself; use seeds"):
        toy(tmp_path, grid={"seed": {"a": {"x": 1.0}}})
    levels = {"point": {"a": {"x": 1.0}}}
    toy(tmp_path, grid=levels)
    with pytest.raises(SpecError, match="grid.point: the sweep has a factor of this name"):
        toy(tmp_path, grid=levels, search={"space": {"y": [1.0]}})


def test_the_names_of_checkpoints_are_those_of_training():
    from hopdeq_lwpf.training.checkpoints import BEST, LAST

    assert set(CHECKPOINTS) == {LAST, BEST}


@pytest.mark.parametrize(
    ("measure", "direction"),
    [("val/accuracy", "maximize"), ("val/auc", "maximize"), ("val/loss", "minimize"), ("seconds", "minimize"),
     ("recalled", "maximize"), ("not_converged", "minimize"), ("weight_error", "minimize"), ("r2", "maximize")],
)  # fmt: skip
def test_the_direction_follows_from_the_name_of_the_score(measure, direction):
    assert direction_of(measure) == direction


def test_a_pruned_record_never_hides_a_complete_one(tmp_path):
    path = tmp_path / TRIALS
    for hash_, failed, pruned, mark in (
        ("a", 0, None, 1),
        ("a", 0, 3, 2),
        ("a", 1, None, 3),
        ("b", 1, None, 4),
        ("b", 0, 2, 5),
    ):
        failure = {"error": "E", "message": "m"} if failed else None
        add_record(path, {"format": 1, "hash": hash_, "failure": failure, "pruned": pruned, "mark": mark})
    assert {key: record["mark"] for key, record in read_records(path).items()} == {"a": 1, "b": 5}


def test_lines_of_several_writers_stay_whole(tmp_path):
    path = tmp_path / "lines.jsonl"
    writers = [
        threading.Thread(
            target=lambda n=n: [lines.add_line(path, {"n": n, "i": i}, sync=False) for i in range(50)]
        )
        for n in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(lines.read_lines(path)) == 200
