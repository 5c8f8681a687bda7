"""The command line: quick help, mistakes in one line, nothing half-written."""

import io
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from hopdeq_lwpf import Termination, retrieve
from hopdeq_lwpf.cli import COMMANDS, main
from hopdeq_lwpf.data import Preprocessing, load_digits
from hopdeq_lwpf.settings import find
from hopdeq_lwpf.sweeps.engine.progress import progress
from hopdeq_lwpf.sweeps.spec import CompareSpec
from hopdeq_lwpf.sweeps.study_spec import TASKS, StudySpec

QUICK = ["--samples", "6", "--stored", "40", "--beta", "40", "--mask", "0.1", "--noise", "--flip"]
QUICK += ["--resamples", "20", "--trajectories", "2"]


@pytest.fixture
def files(tmp_path):
    """Ten patterns and four queries near the first ones; the paths as options."""
    patterns = load_digits()[0][:10]
    np.save(tmp_path / "patterns.npy", patterns.numpy())
    np.save(tmp_path / "queries.npy", (patterns[:4] + 0.05).numpy())
    return ["--patterns", str(tmp_path / "patterns.npy"), "--queries", str(tmp_path / "queries.npy")]


def complaint(capsys):
    """The one line on stderr, after the name of the program."""
    text = capsys.readouterr().err
    assert text.startswith("hopdeq-lwpf: error: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text.removeprefix("hopdeq-lwpf: error: ").rstrip("\n")


# --- help


STUDY_HELP = ["compare", "--task", "bit-pattern", "--help"]


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in COMMANDS), STUDY_HELP], ids=" ".join
)
def test_help_is_quick_and_imports_nothing_heavy(arguments):
    script = (
        "import sys\nfrom hopdeq_lwpf.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'lightning', 'rich', 'torchdeq'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "usage: hopdeq-lwpf" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_is_an_option_with_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in COMMANDS[name].settings.__dataclass_fields__.values():
        assert f"--{option.name} " in text
        assert option.metadata["help"].split()[0] in text


def test_the_options_of_a_study_are_in_the_help_of_its_task(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(STUDY_HELP)
    text = " ".join(capsys.readouterr().out.split())
    for option in StudySpec.__dataclass_fields__.values():
        assert f"--{option.name} " in text
        assert option.metadata["help"].split()[0] in text
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--task TASK" in text
    for name in ("retrieval", *TASKS, "hopdeq-lwpf compare --task bit-pattern --help"):
        assert name in text


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a command is missing"),
        (["compar"], "did you mean 'compare'"),
        (["xyz"], "must be one of compare"),
        (["compare", "--btea", "3"], "unknown option '--btea'; did you mean '--beta'"),
        (["compare", "--max-steps", "3"], "did you mean '--max_steps'"),
        (["compare", "--max_step=3"], "did you mean '--max_steps'"),  # and is not taken as an abbreviation
        (["retrieve", "--querie", "a.npy"], "did you mean '--queries'"),
        (["compare", "--beta", "x"], "Expected a float. Got value: x"),
        (["compare", "--max_steps", "1.5"], "Expected a int"),
        (["compare", "--beta", "-1"], "beta must be above 0, got -1"),
        (["compare", "--forgetting", "rleu"], "Did you mean 'relu'"),
        (["compare", "--solver", "andersen", *QUICK], "anderson"),
        (["compare", "--config", "nowhere.yaml"], "does not exist"),
        (["compare", "--patterns", "nowhere.npy"], "No such file"),
        (["retrieve", "--queries", "a.npy"], "patterns is missing"),
        (["compare", "--task", "bit-patern"], "Did you mean 'bit-pattern'"),
        (
            ["compare", "--task", "xyz"],
            "task 'xyz' is not one of ['bit-pattern',",
        ),
        (["compare", "--task", "bit_pattern", "retrieval"], "stands alone"),
        (["compare", "--task"], "task is empty"),
        (["compare", "--seeds", "1"], "'--seeds' needs a task that is trained"),
        (["compare", "--task", "retrieval", "--epochs", "1"], "'--epochs' needs a task that is trained"),
        (["compare", "--task", "bit-pattern", "--beta", "3"], "'--beta' is an option of --task retrieval"),
        (["compare", "--task", "bit-pattern", "--seed", "3"], "did you mean '--seeds'"),
        (["compare", "--task", "bit-pattern", "--steps", "0"], "steps must be whole numbers of at least 1"),
        (["compare", "--task", "bit-pattern", "--seeds", "1", "1"], "seeds names a value twice"),
        (["compare", "--task", "bit-pattern", "--model.beta", "x"], "model: beta"),
        (["compare", "--config", "{task: bit-pattern, forgetting: relu}"], "write it as a list"),
        (["compare", "--config", "{task: bit-pattern, bta: 1}"], "unknown key 'bta'"),
        (
            ["compare", "--config", "{task: bit-pattern, mask: [1]}"],
            "'mask' is an option of --task retrieval",
        ),
        (["compare", "one_step_vs_convergd"], "did you mean 'one_step_vs_converged'"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in complaint(capsys)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"bta: [1]\n", "unknown key 'bta' in the settings; did you mean 'beta'"),
        (b"beta: [x]\n", "Expected a float. Got value: x"),
        (b"beta: [1\n", "parsing"),
        (b"\xff\xfe", "not UTF-8"),
        (
            b"max_steps: !!python/object/apply:os.getpid []\n",
            "a.yaml:1: the tag !!python/object/apply:os.getpid",
        ),
        (b"beta: [0]\n", "beta must be above 0"),
    ],
)
def test_a_settings_file_with_a_mistake(text, message, capsys, tmp_path):
    (tmp_path / "a.yaml").write_bytes(text)
    assert main(["compare", "--config", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert message in complaint(capsys)
    assert os.listdir(tmp_path) == ["a.yaml"]


def test_a_defect_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr("hopdeq_lwpf.sweeps.compare.build_task", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["compare", "--out", str(tmp_path / "out")])
    assert os.listdir(tmp_path) == []


# --- settings


def test_printed_settings_read_back(capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                "compare",
                "--beta",
                "3",
                "5",
                "--steps",
                "2",
                "converged",
                "--mask",
                "--shape",
                "[4,16]",
                "--print_config",
            ]
        )
    printed = capsys.readouterr().out
    expected = {
        **CompareSpec().as_dict(),
        "beta": [3.0, 5.0],
        "steps": [2, "converged"],
        "mask": [],
        "shape": [4, 16],
    }
    assert yaml.safe_load(printed) == expected
    path = tmp_path / "a.yaml"
    path.write_text(printed)
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--config", str(path), "--print_config"])
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--config", str(path), "--beta", "7", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == {**expected, "beta": [7.0]}


@pytest.mark.parametrize(
    "arguments",
    [
        ["one_step_vs_converged", "--task", "bit-pattern"],
        ["--task", "bit-pattern"],
        ["--task=bit_pattern"],
        ["--config", "{task: bit-pattern}"],
        ["--config={task: [bit_pattern]}"],
        ["--config", "{task: retrieval}", "--task", "bit-pattern"],
    ],
    ids=" ".join,
)
def test_ways_to_name_a_study(arguments, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["compare", *arguments, "--seeds", "7", "8", "--units.relu.min_keep", "2", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    spec = StudySpec(seeds=(7, 8), units={"relu": {"unit": "relu", "min_keep": 2}})
    assert StudySpec(**printed) == spec


def test_the_named_study_has_its_own_tasks(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "one_step_vs_converged", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == find("sweeps", "one_step_vs_converged")


@pytest.mark.parametrize(
    "arguments", [[], ["--task", "retrieval"], ["--config", "{task: retrieval}"], ["compare"]]
)
def test_ways_to_name_a_comparison_of_retrieval(arguments, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["compare", *arguments, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == CompareSpec().as_dict()


# --- compare


def test_compare_writes_everything_and_says_so(capsys, tmp_path):
    out = tmp_path / "deep" / "out"
    assert main(["compare", *QUICK, "--out", str(out)]) == 0
    found = capsys.readouterr()
    names = {path.name for path in out.iterdir()}
    pictures = {
        f"{name}.{kind}" for name in ("recall", "steps", "energy", "pictures") for kind in ("png", "svg")
    }
    assert names == pictures | {"results.csv", "queries.npz", "report.html"}
    for name in names:
        assert str(out / name) in found.out
    assert "no forgetting" in found.out
    assert "converged" in found.out
    assert "9 of 9 cells" in found.err
    assert "\x1b" not in found.out + found.err  # no terminal, no escape codes
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_a_failed_comparison_leaves_the_old_results(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.csv").write_text("old")

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hopdeq_lwpf.sweeps.compare.write_report", broken)
    assert main(["compare", *QUICK, "--out", str(out)]) == 2
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert (out / "results.csv").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_ctrl_c_is_quiet_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "hopdeq_lwpf.cli", "compare", "--out", str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    until = time.monotonic() + 60
    with subprocess.Popen(command, **pipes) as running:
        while not list(tmp_path.iterdir()):  # the staging folder: the work has begun
            assert running.poll() is None, running.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        # An interrupt while an extension module loads surfaces as an error of that import: be past it.
        time.sleep(2)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


# --- retrieve


def test_retrieve_is_retrieve(files, tmp_path, capsys):
    out = tmp_path / "out.npz"
    assert (
        main(["retrieve", *files, "--out", str(out), "--beta", "3", "--forgetting", "relu", "--batch", "3"])
        == 0
    )
    patterns = load_digits()[0][:10]
    recall = retrieve(patterns[:4] + 0.05, patterns, beta=3.0, forgetting="relu", stop=Termination())
    with np.load(out) as arrays:
        for name in ("value", "state", "weight", "energy"):
            assert np.allclose(arrays[name], getattr(recall, name).detach(), atol=1e-5), name
        for name in ("index", "support", "result", "steps", "converged"):
            assert (arrays[name] == getattr(recall, name).numpy()).all(), name
        assert arrays["residual"].shape == arrays["evaluations"].shape == (4,)
    text = capsys.readouterr().out
    assert "100.0 % (4 CONVERGED)" in text
    assert str(out) in text


@pytest.mark.parametrize("suffix", ["npy", "csv"])
def test_only_the_recall_itself_where_that_is_asked_for(files, tmp_path, suffix):
    out = tmp_path / f"out.{suffix}"
    assert main(["retrieve", *files, "--out", str(out), "--steps", "1", "--dtype", "float64"]) == 0
    value = np.load(out) if suffix == "npy" else np.loadtxt(out, delimiter=",")
    patterns = load_digits()[0][:10].double()
    queries = torch.from_numpy(np.load(tmp_path / "queries.npy")).double()
    assert np.allclose(value, torch.softmax(queries @ patterns.T, -1) @ patterns, atol=1e-8)


def test_values_are_read_out_and_normalising_keeps_the_units_of_the_file(files, tmp_path):
    np.save(tmp_path / "values.npy", np.arange(20.0).reshape(10, 2))
    out = tmp_path / "out.npz"
    sharp = ["--out", str(out), "--beta", "500", "--normalize", "center-unit"]
    assert main(["retrieve", *files, *sharp, "--values", str(tmp_path / "values.npy")]) == 0
    with np.load(out) as arrays:
        assert np.allclose(arrays["value"], np.arange(8.0).reshape(4, 2), atol=1e-3)
    assert main(["retrieve", *files, *sharp]) == 0
    patterns = load_digits()[0][:10]
    with np.load(out) as arrays:
        assert np.allclose(arrays["value"], patterns[:4], atol=1e-3)
        assert np.allclose(
            arrays["state"], Preprocessing.fit(patterns, "center-unit")(patterns[:4]), atol=1e-3
        )
    np.save(tmp_path / "values.npy", np.ones((9, 2)))
    assert main(["retrieve", *files, *sharp, "--values", str(tmp_path / "values.npy")]) == 2


def test_what_did_not_converge_is_said(files, tmp_path, capsys):
    queries = np.load(tmp_path / "queries.npy")
    queries[1, 5] = np.nan
    np.save(tmp_path / "queries.npy", queries)
    out = tmp_path / "out.npz"
    limits = ["--max_steps", "2", "--rtol", "1e-12", "--atol", "0", "--solver", "picard"]
    assert main(["retrieve", *files, "--out", str(out), *limits]) == 0
    text = capsys.readouterr().out
    assert "0.0 % (3 MAX_STEPS, 1 NONFINITE)" in text
    assert "warning: 4 of 4 problems did not converge (MAX_STEPS, NONFINITE)" in text
    with np.load(out) as arrays:
        assert not arrays["converged"].any()
        assert np.isfinite(arrays["value"][[0, 2, 3]]).all()  # a bad query harms no other


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--queries", None, "No such file"),
        ("--queries", "", "is empty"),
        ("--queries", "1,2,3\n", "rows of 3 numbers, but the patterns have 64"),
        ("--patterns", "1,2\n1\n", "line 2 has 1 numbers"),
        ("--patterns", "1,nan\n", "NaN"),
    ],
)
def test_bad_files(files, tmp_path, capsys, option, text, message):
    path = tmp_path / "bad.csv"
    if text is not None:
        path.write_text(text)
    out = tmp_path / "out.npz"
    assert main(["retrieve", *files, option, str(path), "--out", str(out)]) == 2
    said = complaint(capsys)
    assert message in said
    assert "bad.csv" in said
    assert not out.exists()


@pytest.mark.parametrize(("name", "message"), [("a.txt", "must end in"), ("no/a.npz", "does not exist")])
def test_bad_outputs(files, tmp_path, capsys, name, message):
    assert main(["retrieve", *files, "--out", str(tmp_path / name)]) == 2
    assert message in complaint(capsys)


def test_output_into_a_closed_pipe_is_no_defect(files, tmp_path):
    command = f"{sys.executable} -m hopdeq_lwpf.cli compare --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("usage: ")


# --- progress


def test_progress_is_a_bar_on_a_terminal_and_lines_in_a_log(monkeypatch):
    bar = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress(3, "cells", bar) as advance:
        for _ in range(3):
            advance("relu")
    assert "3/3" in bar.file.getvalue()
    assert "\x1b" in bar.file.getvalue()
    log = Console(file=io.StringIO(), force_terminal=False, width=100)
    clock = iter(range(0, 100, 2))  # two seconds a call, and a line at most every five
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with progress(7, "cells", log) as advance:
        for _ in range(7):
            advance("pfu [x]")
    lines = log.file.getvalue().splitlines()
    assert lines == [f"{n} of 7 cells, {2 * n} s, pfu [x]" for n in (3, 6, 7)]


@pytest.mark.parametrize("terminal", [False, True])
def test_long_pieces_get_a_line_each_with_the_time_left(monkeypatch, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with progress(3, "trials", console, every_piece=True) as advance:
        if not terminal:
            clock = iter((10.0, 20.0, 30.0))
            start = time.monotonic()
            monkeypatch.setattr("time.monotonic", lambda: start + next(clock))
        for number in range(3):
            advance(f"trial [{number}]")
    text = console.file.getvalue()
    if terminal:
        assert "1 of 3 trials" in text
        assert "trial [2]" in text
        return
    assert text.splitlines() == [
        "1 of 3 trials, 10 s (about 20 s left), trial [0]",
        "2 of 3 trials, 20 s (about 10 s left), trial [1]",
        "3 of 3 trials, 30 s, trial [2]",
    ]
