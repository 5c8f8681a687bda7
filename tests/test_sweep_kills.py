"""Sweeps under kill -9: of the driver, of workers, of machines. Nothing is lost, nothing done twice, nobody left."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sweep_tasks
from sweep_tasks import LOG, toy
from test_study import alive, children, until
from test_sweep_engine import check_exact, file_lines, told

from hopdeq_lwpf.sweeps.engine.lines import read_lines
from hopdeq_lwpf.sweeps.engine.records import TRIALS
from hopdeq_lwpf.sweeps.sweep import run_trials

TESTS = Path(__file__).parent
GRID = {"x": [0.0, 1.0, 2.0], "y": [0.0, 0.5]}  # with four seeds 24 cells
LONG = {"epochs": 8, "pause": 0.1}

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts processes in /proc")


@pytest.fixture(autouse=True)
def _toy():
    with sweep_tasks.registered():
        yield


class Driver:
    """A sweep of the toy task in a process of its own."""

    def __init__(self, out, settings, python=sys.executable, **environment):
        self.out, self.log = Path(out), Path(out).parent / "log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [python, str(TESTS / "sweep_tasks.py"), str(out), json.dumps(settings)],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(TESTS), **environment},
            )

    def finished(self):
        """How many records there are."""
        path = self.out / TRIALS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def until_finished(self, count, seconds=120):
        until(
            lambda: self.finished() >= count or self.process.poll() is not None,
            f"no {count} records: {self.log.read_text()[-2000:]}",
            seconds,
        )
        assert self.process.poll() is None, self.log.read_text()[-2000:]

    def processes(self):
        """Its children, by process id."""
        return children(self.process.pid)

    def workers(self):
        """Those that run trials."""
        return [pid for pid in self.processes() if "spawn_main" in _command(pid)]

    def busy_worker(self):
        """One in the middle of a trial, by process id."""
        found = []

        def look():
            for log in self.out.glob(f"trials/*/{LOG}"):
                entries = read_lines(log)
                if 1 < len(entries) < 6 and alive(entries[-1]["pid"]):
                    found.append(entries[-1]["pid"])
            return found

        until(look, "no worker is in the middle of a trial")
        return found[0]

    def kill(self):
        """kill -9, and nobody may be left after it."""
        left = self.processes()
        self.process.kill()
        self.process.wait(30)
        until(lambda: not any(map(alive, left)), "a process outlives its driver", 10)

    def end(self, seconds=120):
        assert self.process.wait(seconds) == 0, self.log.read_text()[-2000:]


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def check_resumed(out, kills):
    """Every process that took up a trial began where the one before had stopped; and how many did."""
    resumed = 0
    for log in Path(out).glob(f"trials/*/{LOG}"):
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        for before, after in zip(entries, entries[1:], strict=False):
            if before["pid"] == after["pid"]:
                assert after["epoch"] == before["epoch"] + 1
            else:  # killed after the line and before the checkpoint, an epoch is repeated
                assert after["epoch"] in (before["epoch"], before["epoch"] + 1)
                resumed += after["epoch"] > 1
    assert resumed <= 2 * kills
    return resumed


def test_one_kill_of_the_driver_and_one_of_a_worker(tmp_path):
    settings = {"grid": GRID, "seeds": [0, 1], "set": LONG}
    out = tmp_path / "out"
    driver = Driver(out, settings)
    driver.until_finished(2)
    time.sleep(0.4)  # into the middle of a trial
    driver.kill()
    before = driver.finished()
    assert 2 <= before < 12
    driver = Driver(out, settings)
    driver.until_finished(before + 1)
    os.kill(driver.busy_worker(), signal.SIGKILL)
    driver.end()
    spec = toy(out, grid=GRID, seeds=[0, 1], set=LONG)
    check_exact(spec)
    assert check_resumed(out, 2) >= 1
    states = [state for _, state, _, _ in told(out)]
    assert states.count("COMPLETE") == 12
    assert states.count("FAIL") in (2, 3), "one or two that ran when the driver died, one when a worker did"
    numbers = {number for number, entry in enumerate(told(out)) if entry[1] == "FAIL"}
    assert {entry[3] for entry in told(out) if entry[3] is not None} == numbers, "each was taken up again"
    attempts = [line["attempts"] for line in file_lines(out)]
    assert sorted(attempts) == [1] * 11 + [2]
    assert "the worker process died (signal 9); retry 1 of 3" in driver.log.read_text()


@pytest.mark.long
def test_five_kills_of_the_driver_and_three_of_workers_at_random_moments(tmp_path):
    settings = {"grid": GRID, "seeds": [0, 1, 2, 3], "set": LONG}
    out, moments = tmp_path / "out", random.Random(0)
    kinds = ["driver"] * 5 + ["worker"] * 3
    moments.shuffle(kinds)
    driver = Driver(out, settings)
    for number, kind in enumerate(kinds):
        if driver.process.poll() is not None:
            driver = Driver(out, settings)
        driver.until_finished(number + 1)
        time.sleep(moments.uniform(0, 1.5))
        if number == 1:
            second = subprocess.run(
                [sys.executable, str(TESTS / "sweep_tasks.py"), str(out), json.dumps(settings)],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": str(TESTS)},
            )
            assert second.returncode != 0
            assert "another study runs there" in second.stderr.splitlines()[-1]
        assert driver.process.poll() is None, "the sweep ended before the last kill"
        if kind == "driver":
            driver.kill()
            driver = Driver(out, settings)
        else:
            until(driver.workers, "no worker", 30)
            os.kill(moments.choice(driver.workers()), signal.SIGKILL)
    left = driver.processes()
    driver.end()
    until(lambda: not any(map(alive, left)), "a process outlives its driver", 10)
    spec = toy(out, grid=GRID, seeds=[0, 1, 2, 3], set=LONG)
    check_exact(spec)
    assert check_resumed(out, 8) >= 3
    before = (out / TRIALS).read_bytes()
    run_trials(spec)
    assert (out / TRIALS).read_bytes() == before


@pytest.mark.long
def test_a_driver_that_is_killed_wherever_it_may_be_loses_nothing(tmp_path):
    """Trials of a moment, so that kills fall into the writes."""
    grid = {"x": [float(x) for x in range(12)], "y": [float(y) for y in range(10)]}
    settings = {"grid": grid, "seeds": [0, 1]}
    out, moments = tmp_path / "out", random.Random(1)
    driver, kills = Driver(out, settings), 0
    while True:
        before = driver.finished()
        until(lambda d=driver, n=before: d.finished() > n or d.process.poll() is not None, "no progress", 60)
        time.sleep(moments.uniform(0, 0.5))
        if driver.process.poll() is not None:
            break
        driver.kill()
        kills += 1
        driver = Driver(out, settings)
    driver.end()
    assert kills >= 5
    check_exact(toy(out, grid=grid, seeds=[0, 1]))


@pytest.mark.long
def test_a_thousand_trials_of_a_moment_take_less_than_a_minute(tmp_path):
    grid = {"x": [float(x) for x in range(25)], "y": [float(y) for y in range(10)]}
    settings = {"grid": grid, "seeds": [0, 1, 2, 3], "workers": 2}
    began = time.monotonic()
    driver = Driver(tmp_path / "out", settings)
    driver.until_finished(1)
    first = time.monotonic() - began
    driver.end()
    whole = time.monotonic() - began
    assert first < 8, "start-up"
    assert whole < 60
    assert (whole - first) / 1000 < 0.05, "seconds of every trial beside its own work"
    check_exact(toy(tmp_path / "out", grid=grid, seeds=[0, 1, 2, 3]))


@pytest.mark.long
def test_a_search_that_is_killed_has_its_trials_once(tmp_path):
    search = {"space": {"x": {"low": -2.0, "high": 4.0}}, "trials": 30, "pruner": "halving", "reduction": 2}
    settings = {"search": search, "set": LONG}
    out, moments = tmp_path / "out", random.Random(2)
    driver = Driver(out, settings)
    for count in (3, 8, 14):
        driver.until_finished(count)
        time.sleep(moments.uniform(0, 0.8))
        driver.kill()
        driver = Driver(out, settings)
    driver.end()
    records, entries = file_lines(out), told(out)
    assert len({record["hash"] for record in records}) == len(records) == 30
    states = {key: state for key, state, _, _ in entries if state != "FAIL"}
    assert states == {r["hash"]: "COMPLETE" if r["pruned"] is None else "PRUNED" for r in records}
    assert len(states) == sum(state != "FAIL" for _, state, _, _ in entries) == 30
    assert 0 < sum(record["pruned"] is not None for record in records) < 30
    for record in records:
        whole = sweep_tasks.expected(record["settings"])
        assert record["curves"]["val/loss"] == whole[: record["pruned"]]


# --- PostgreSQL


@pytest.fixture
def postgresql(tmp_path):
    """The URL of a database of its own; skips where Debian's package or the driver is missing."""
    pytest.importorskip("psycopg2")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("PostgreSQL is not installed")
    folder, data = found[-1].parent, tmp_path / "postgresql"
    # It refuses to run as root.
    become = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    if become and shutil.which("runuser") is None:
        pytest.skip("no way to become another user")
    data.mkdir()
    if become:
        for parent in (tmp_path, *tmp_path.parents[:3]):
            parent.chmod(parent.stat().st_mode | 0o011)
        shutil.chown(data, "postgres", "postgres")
    socket = data / "socket"

    def run(*words):
        return subprocess.run(
            [*become, *map(str, words)], check=True, capture_output=True, text=True, cwd="/"
        )

    run(folder / "initdb", "-D", data / "db", "-A", "trust", "-U", "sweeps")
    run("mkdir", socket)
    options = f"-k {socket} -c listen_addresses='' -p 5999"
    # Not captured: the server would hold the pipe.
    words = [folder / "pg_ctl", "-D", data / "db", "-w", "-l", data / "log", "-o", options, "start"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*become, *map(str, words)], check=True, cwd="/", **quiet)
    try:
        run(folder / "createdb", "-h", socket, "-p", "5999", "-U", "sweeps", "sweeps")
        yield f"postgresql://sweeps@/sweeps?host={socket}&port=5999"
    finally:
        run(folder / "pg_ctl", "-D", data / "db", "-m", "immediate", "stop")


READER = """
import sys, time, optuna
optuna.logging.set_verbosity(optuna.logging.ERROR)
url, prefix = sys.argv[1:]
reads = seen = 0
end = time.monotonic() + 240
storage = optuna.storages.RDBStorage(url)
while seen < 24 and time.monotonic() < end:
    for name in optuna.get_all_study_names(storage):
        if name.startswith(prefix):
            trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
            complete = [t for t in trials if t.state.name == "COMPLETE"]
            assert len({t.user_attrs["hash"] for t in complete}) == len(complete) >= seen
            seen, reads = len(complete), reads + 1
    storage.remove_session()
    time.sleep(0.05)
print(reads, seen)
"""


@pytest.mark.long
def test_postgresql_holds_the_study_while_eight_read_it_and_the_driver_is_killed(postgresql, tmp_path):
    import optuna

    settings = {"grid": GRID, "seeds": [0, 1, 2, 3], "set": LONG, "storage": postgresql}
    out = tmp_path / "out"
    driver = Driver(out, settings)
    driver.until_finished(1)
    url = postgresql.replace("postgresql:", "postgresql+psycopg2:")  # other programs must name the driver
    words = [sys.executable, "-c", READER, url, "out-"]
    readers = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    driver.until_finished(6)
    driver.kill()
    driver = Driver(out, settings)
    driver.until_finished(14)
    os.kill(driver.busy_worker(), signal.SIGKILL)
    driver.end()
    for reader in readers:  # each has an end of its own
        reads, seen = reader.communicate(timeout=300)[0].split()
        assert (reader.returncode, seen) == (0, "24")
        assert int(reads) >= 2
    (name,) = optuna.get_all_study_names(url)
    study = optuna.load_study(study_name=name, storage=url)
    states = [trial.state.name for trial in study.trials]
    assert (states.count("COMPLETE"), states.count("RUNNING"), states.count("WAITING")) == (24, 0, 0)
    assert states.count("FAIL") in (2, 3)
    spec = toy(out, grid=GRID, seeds=[0, 1, 2, 3], set=LONG)
    hashes = sorted(trial.hash for trial in spec.trials())
    assert sorted(line["hash"] for line in file_lines(out)) == hashes
    assert sorted(t.user_attrs["hash"] for t in study.trials if t.state.name == "COMPLETE") == hashes
    assert not (out / "study.db").exists()
    run_trials(replace(spec, storage=None))
    check_exact(spec)  # the study moves to another database by its records


# --- Ray


@pytest.mark.long
def test_a_cluster_that_loses_a_machine_and_then_its_driver(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))  # of the workers
    from ray.cluster_utils import Cluster

    before = set(_named("ray::"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2)]
        settings = {
            "grid": GRID,
            "seeds": [0, 1, 2, 3],
            "set": {"epochs": 12, "pause": 0.25},
            "executor": f"ray:{cluster.address}",
        }
        out = tmp_path / "out"
        driver = Driver(out, settings)
        driver.until_finished(3, 120)
        cluster.remove_node(nodes[0], allow_graceful=False)
        driver.until_finished(8, 120)
        cluster.add_node(num_cpus=2)
        driver.kill()
        until(lambda: not set(_named("ray::_perform")) - before, "a trial outlives its driver", 30)
        driver = Driver(out, settings)
        driver.end(240)
    finally:
        cluster.shutdown()
    spec = toy(out, grid=GRID, seeds=[0, 1, 2, 3], set=settings["set"])
    check_exact(spec)
    resumed = check_resumed(out, 8)
    assert resumed >= 2
    until(lambda: not set(_named("ray::")) - before, "a worker is left", 30)


def _named(name):
    """The processes whose title begins with a name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_text().startswith(name) and alive(int(path.parent.name)):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found
