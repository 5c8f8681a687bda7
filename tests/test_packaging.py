"""What is shipped, the two ways to start the program, what is said where an extra is missing, and types for users."""

import email.parser
import io
import os
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from hatchling import build

import hopdeq_lwpf
from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.cli import main
from hopdeq_lwpf.sweeps.engine.database import _with_driver
from hopdeq_lwpf.sweeps.reports.tables import parquet_note

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PRESETS = ("models", "solvers", "sweeps")
CONSUMERS = sorted((TESTS / "consumer").glob("*.py"))


# --- what is shipped


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in the wheel of this tree, and the folder where it is unpacked; built in this process, offline."""
    folder = tmp_path_factory.mktemp("wheel")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        name = build.build_wheel(str(folder))
    finally:
        os.chdir(before)
    with zipfile.ZipFile(folder / name) as archive:
        archive.extractall(folder / "unpacked")
        return archive.namelist(), folder / "unpacked"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The names in the source archive of this tree, below its one folder."""
    folder = tmp_path_factory.mktemp("source")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        name = build.build_sdist(str(folder))
    finally:
        os.chdir(before)
    content = io.BytesIO((folder / name).read_bytes())
    with tarfile.open(fileobj=content) as archive:
        return {entry.partition("/")[2] for entry in archive.getnames()}


def files_below(folder, *patterns):
    """The files of the tree, by their names from the root, without what Python leaves."""
    found = {path for pattern in patterns for path in (ROOT / folder).rglob(pattern) if path.is_file()}
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_its_data_and_the_presets(wheel):
    names, _ = wheel
    needed = files_below("hopdeq_lwpf", "*.py", "*.typed", "*.gz", "*.txt")
    needed |= {
        f"hopdeq_lwpf/presets/{name}" for kind in PRESETS for name in files_below(kind, "*.yaml", "*.md")
    }
    assert len(needed) > 200
    assert needed <= set(names)
    assert "hopdeq_lwpf/py.typed" in names
    assert {name.split("/")[0] for name in names} == {
        "hopdeq_lwpf",
        f"hopdeq_lwpf-{hopdeq_lwpf.__version__}.dist-info",
    }
    assert not [name for name in names if "__pycache__" in name or "test" in Path(name).name]


def test_the_wheel_says_what_it_needs_and_starts(wheel):
    _, folder = wheel
    about = folder / f"hopdeq_lwpf-{hopdeq_lwpf.__version__}.dist-info"
    assert (about / "licenses" / "LICENSE").is_file()
    assert "hopdeq-lwpf = hopdeq_lwpf.cli:main" in (about / "entry_points.txt").read_text()
    metadata = email.parser.HeaderParser().parsestr((about / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Version"] == hopdeq_lwpf.__version__
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    plain = [entry for entry in metadata.get_all("Requires-Dist") if "extra ==" not in entry]
    assert {re.split(r"[<>=!~ ]", entry)[0].lower() for entry in plain} == {
        re.split(r"[<>=!~ ]", entry)[0].lower() for entry in PROJECT["dependencies"]
    }


def test_the_unpacked_wheel_finds_its_own_presets(wheel, tmp_path):
    _, folder = wheel
    code = (
        "import hopdeq_lwpf, hopdeq_lwpf.settings as s; "
        "print(hopdeq_lwpf.__file__); print(hopdeq_lwpf.find('solvers', 'lbfgs')['solver']); "
        f"print(*[len(s.names(kind)) for kind in {PRESETS!r}])"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    where, solver, counts = ran.stdout.splitlines()
    assert where.startswith(str(folder)), "another copy was imported"
    assert solver == "lbfgs"
    assert counts.split() == [str(len(files_below(kind, "*.yaml"))) for kind in PRESETS]


def test_the_source_archive_has_what_its_tests_and_make_need(source):
    needed = {
        *(
            "README.md",
            "LICENSE",
            "CHANGELOG.md",
            "CONTRIBUTING.md",
            "CITATION.cff",
            "Makefile",
            "pyproject.toml",
        ),
        "constraints.txt",
        *files_below("tests", "*.py", "*.json"),
        *files_below("examples", "*.py"),
        *files_below("benchmarks", "*.py"),
        *files_below("docs", "*.md", "*.py"),
        *files_below("hopdeq_lwpf", "*.py", "*.typed", "*.gz", "*.txt"),
        *(name for kind in PRESETS for name in files_below(kind, "*.yaml", "*.md")),
    }
    needed = {name for name in needed if not name.startswith("docs/_build/")}
    assert needed <= source
    kept = (".venv/", "results/", "dist/", "docs/_build/", ".mypy_cache/")
    assert not [name for name in source if name.startswith(kept) or "__pycache__" in name]


def test_the_public_tests_cover_the_versions_that_are_promised():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    matrix = jobs["tests"]["strategy"]["matrix"]
    (lowest,) = (
        re.search(r">=([\d.]+)", entry)[1] for entry in PROJECT["dependencies"] if entry.startswith("torch>")
    )
    assert matrix["torch"] == [f"{lowest}.0", "newest"]
    assert matrix["python"][0] == PROJECT["requires-python"].removeprefix(">=")
    used = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert len(used) > 5
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", name) for name in used)
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    made = {name for line in lines for name in re.findall(r"^make ([a-z-]+)$", line, re.MULTILINE)}
    assert made == {"check", "docs", "test-long"}
    assert made <= rules


# --- python -m hopdeq_lwpf


def test_the_package_runs_as_the_command_does(capsys, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["hopdeq_lwpf", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("hopdeq_lwpf", run_name="__main__", alter_sys=False)
        return ended.value.code, capsys.readouterr()

    for words in (["list", "solvers"], ["list", "nothing"]):
        code = main(words)
        shown = capsys.readouterr()
        assert run(*words) == (code, shown)
    assert run("list", "solvers")[0] == 0
    assert run("list", "nothing")[0] == 2


def test_the_package_runs_in_a_process_of_its_own(tmp_path):
    words = [sys.executable, "-W", "error", "-m", "hopdeq_lwpf", "--version"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, f"hopdeq-lwpf {hopdeq_lwpf.__version__}")


# --- extras that are missing


def _command(*words):
    """A call of the command line, which gives the line of complaint."""

    def call(out, capsys):
        assert main([*words, "--out", str(out)]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("hopdeq-lwpf: error: ")
        assert shown.count("\n") == 1
        assert not (out / "trials.jsonl").exists()
        return shown

    return call


def _vision(out, capsys):
    with pytest.raises(ImportError) as caught:
        hopdeq_lwpf.models.VisionTransformer()
    return str(caught.value)


def _live(out, capsys):
    assert main(["report", str(out), "--live"]) == 2
    return capsys.readouterr().err


def _postgresql(out, capsys):
    sqlalchemy = pytest.importorskip("sqlalchemy")
    with pytest.raises(SpecError) as caught:
        _with_driver(sqlalchemy.make_url("postgresql://me@host/db"))
    return str(caught.value)


# By extra: the packages that are blocked, and what then needs them.
MISSING = {
    "vision": [(("timm",), _vision), (("timm",), _command("train", "vision_transformer"))],
    "sweeps": [
        (("optuna",), _command("sweep", "goemaere_table2_quick")),
        (("optuna",), _command("compare", "--task", "bit-pattern")),
    ],
    "ray": [(("ray",), _command("sweep", "goemaere_table2_quick", "--executor", "ray"))],
    "parquet": [(("pyarrow",), lambda out, capsys: parquet_note())],
    "dashboard": [(("optuna_dashboard",), _live)],
    "postgresql": [(("psycopg2", "psycopg"), _postgresql)],
}
FOR_DEVELOPERS = {"test", "docs"}


@pytest.mark.parametrize(
    ("extra", "blocked", "call"),
    [(extra, *case) for extra, cases in MISSING.items() for case in cases],
    ids=[f"{extra}{number}" for extra, cases in MISSING.items() for number in range(len(cases))],
)
def test_a_missing_extra_is_named_with_its_command(extra, blocked, call, tmp_path, capsys, monkeypatch):
    if extra == "ray":
        pytest.importorskip("optuna")
    for name in [name for name in sys.modules if name.split(".")[0] in blocked]:
        monkeypatch.delitem(sys.modules, name)
    for name in blocked:
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an ImportError now
    assert f"pip install 'hopdeq-lwpf[{extra}]'" in call(tmp_path / "out", capsys)


def test_every_extra_for_users_is_among_those_tried():
    extras = PROJECT["optional-dependencies"]
    assert set(extras) - FOR_DEVELOPERS == set(MISSING)
    for extra, cases in MISSING.items():
        provided = {re.split(r"[<>=!~-]", entry)[0] for entry in extras[extra]}
        for blocked, _ in cases:
            assert blocked[0].split("_")[0] in provided


# --- users with type checkers


@pytest.mark.parametrize("script", CONSUMERS, ids=lambda path: path.stem)
def test_the_code_of_a_user_runs(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))["main"]()


def _checked(folder, *files):
    """mypy --strict as a user's project runs it, without the settings of this one."""
    cache = ROOT / ".mypy_cache" / "consumer"  # torch's own files take ten seconds where nothing is cached
    words = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--cache-dir",
        str(cache),
        *map(str, files),
    ]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=folder, check=False)


def test_the_public_names_have_types_for_users(tmp_path):
    copies = [tmp_path / script.name for script in CONSUMERS]
    for script, copy in zip(CONSUMERS, copies, strict=True):
        copy.write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
    ran = _checked(tmp_path, *copies)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_check_above_finds_wrong_types_and_untyped_names(tmp_path):
    names = [name for name in hopdeq_lwpf.__all__ if not name.startswith("_")]
    lines = ["import hopdeq_lwpf", "hopdeq_lwpf.retrieve(3, 4)"]
    lines += [f"reveal_type(hopdeq_lwpf.{name})" for name in names]
    (tmp_path / "wrong.py").write_text("\n".join(lines))
    ran = _checked(tmp_path, tmp_path / "wrong.py")
    assert 'wrong.py:2: error: Argument 1 to "retrieve"' in ran.stdout
    revealed = re.findall(r"note: Revealed type is [\"'](.*)[\"']", ran.stdout)
    assert len(revealed) == len(names), ran.stdout
    assert not [kind for kind in revealed if kind == "Any"]
