"""YAML text, settings classes and the command line's arguments: settings, or one line that says what is wrong."""

import contextlib
import dataclasses
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz.profiles import examples, within
from hopdeq_lwpf import cli, settings, solvers
from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.arguments import assigned, assigned_keys, together
from hopdeq_lwpf.documents import parse_document, parse_value, read_document
from hopdeq_lwpf.models import build
from hopdeq_lwpf.sweeps.listing import ListSpec
from hopdeq_lwpf.sweeps.reports.spec import ReportSpec
from hopdeq_lwpf.sweeps.spec import CompareSpec, RetrieveSpec
from hopdeq_lwpf.sweeps.study_spec import StudySpec
from hopdeq_lwpf.sweeps.sweep_spec import SweepSpec
from hopdeq_lwpf.sweeps.trials.graph_spec import GraphSpec
from hopdeq_lwpf.sweeps.trials.sdm_spec import SdmSpec
from hopdeq_lwpf.training.spec import TrainSpec

PRESETS = [settings.path_of(kind, name) for kind in settings.KINDS for name in settings.names(kind)]
TEXTS = [path.read_text(encoding="utf-8") for path in PRESETS]
PIECES = (
    (
        "a",
        "b",
        ":",
        ": ",
        "- ",
        "\n",
        "  ",
        "\t",
        "{",
        "}",
        "[",
        "]",
        ",",
        "&x ",
        "*x",
        "<<: ",
        "!!python/object:os.x ",
    )
    + (
        "!a ",
        "? ",
        "|",
        ">",
        "%",
        "@",
        "`",
        '"',
        "'",
        "#",
        "1e-4",
        "0x1",
        "1_0",
        "0o7",
        ".nan",
        ".inf",
        "~",
        "null",
    )
    + (
        "true",
        "2020-01-31",
        "2020-13-45",
        "1:30",
        "---\n",
        "...\n",
        "\0",
        "\x07",
        "\ufeff",
        "\u2028",
        "\u00e9",
        "\ud800",
    )
)


@st.composite
def yaml_texts(draw):
    """A text of pieces that mean something to YAML, or a settings file with some of its characters changed."""
    if draw(st.booleans()):
        return "".join(draw(st.lists(st.sampled_from(PIECES), max_size=12)))
    text = draw(st.sampled_from(TEXTS))
    lines = text.splitlines(keepends=True)
    start = draw(st.integers(0, len(lines) - 1))
    text = "".join(lines[start:]) if draw(st.booleans()) else text
    for at, piece in draw(
        st.lists(st.tuples(st.integers(0, len(text)), st.sampled_from(PIECES)), max_size=3)
    ):
        text = text[:at] + piece + text[at + draw(st.integers(0, 2)) :]
    return text


def one_line(error, *starts):
    said = str(error)
    assert said
    assert "\n" not in said
    assert len(said) < 1500
    assert not starts or said.startswith(starts)


@examples(60)
@given(yaml_texts())
@example("a: " + "1" * 5000)  # more digits than Python reads
@example("a: &x [*x]")
@example("{[a]: 1}")
def test_a_text_is_a_mapping_or_an_error_with_its_line(text):
    with within():
        try:
            document = parse_document(text, "file")
        except SpecError as error:
            document, said = None, error
        parse_value(text)
    if document is None:
        one_line(said, "file:")
    else:
        assert all(isinstance(key, str) for key in document.values)
        assert all(line >= 1 for line in document.lines.values())
        for key in document.values:
            assert document.place_of(f"{key}: 'x' is wrong") is not None


@examples(15)
@given(st.binary(max_size=30) | yaml_texts().map(lambda text: text.encode("utf-8", "replace")))
def test_a_file_is_a_mapping_or_an_error_with_its_name(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    with within():
        try:
            assert isinstance(read_document(path).values, dict)
            return
        except SpecError as error:
            said = error
    one_line(said, f"{path}:")


# --- settings classes and presets

SCALARS = st.one_of(
    st.sampled_from(
        (None, True, False, 0, 1, -1, 3, 10**30, 0.5, -0.5, 1e-300, float("nan"), float("inf"), "")
    ),
    st.sampled_from(
        ("converged", "relu", "pfu", "softmax", "implicit", "auto", "none", "1", "1e-4", "a.b", "x" * 200)
    ),
)
KEYS = ("", "a", "unit", "model", "low", "high", "where", "set", "relu")
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("", "a", "unit", "model", "low", "high", "where", "set", "relu")) | SCALARS,
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
CLASSES = (
    CompareSpec,
    RetrieveSpec,
    StudySpec,
    SweepSpec,
    TrainSpec,
    ReportSpec,
    ListSpec,
    SdmSpec,
    GraphSpec,
)
NEEDED = {
    RetrieveSpec: {"patterns": "a.npy", "queries": "b.npy", "out": "c.npz"},
    ReportSpec: {"study": "results"},
}


@examples(60)
@given(st.sampled_from(CLASSES), st.data())
def test_a_settings_class_takes_a_value_or_names_the_setting(kind, data):
    names = [entry.name for entry in dataclasses.fields(kind)]
    name = data.draw(st.sampled_from(names))
    value = data.draw(VALUES)
    given = {**NEEDED.get(kind, {}), name: value}
    if kind is SweepSpec:
        given.setdefault("grid", {"learning_rate": [0.1, 0.2]})
        given.setdefault("base", "train_digits")
    try:
        with within():
            spec = kind(**given)
            if kind in (SweepSpec, StudySpec):
                spec.trials()
    except SpecError as error:
        one_line(error)
        return
    if hasattr(spec, "as_dict"):
        assert spec.as_dict().keys() == set(names)


def changed(values, draw):
    """The mapping with one value, at some depth, replaced, or with one more."""
    values = dict(values)
    key = draw(st.sampled_from([*map(str, values), "unknown_option"]))
    inner = values.get(key)
    if isinstance(inner, dict) and inner and draw(st.booleans()):
        values[key] = changed(inner, draw)
    else:
        values[key] = draw(VALUES)
    return values


@examples(25)
@given(st.sampled_from(settings.names("solvers")), st.data())
def test_a_changed_preset_of_a_solver_is_built_or_refused(name, data):
    values = changed(settings.find("solvers", name), data.draw)
    try:
        with within():
            solvers.build(values)
    except (ValueError, TypeError) as error:
        one_line(error)


@examples(25)
@given(
    st.sampled_from(
        [name for name in settings.names("models") if name.startswith(("hopfield", "layer_", "ham"))]
    ),
    st.data(),
)
def test_a_changed_preset_of_a_model_is_built_or_refused(name, data):
    values = changed(settings.find("models", name), data.draw)
    try:
        with within():
            build(values)
    except (ValueError, TypeError) as error:
        one_line(error)


@examples(25)
@given(st.sampled_from([name for name in settings.names("sweeps")]), st.data())
def test_a_changed_preset_of_a_sweep_is_taken_or_refused(name, data):
    values = changed(settings.find("sweeps", name), data.draw)
    kind = SweepSpec if "grid" in values else StudySpec if "task" in values else CompareSpec
    known = {entry.name for entry in dataclasses.fields(kind)}
    try:
        with within(4.0):
            spec = kind(**{key: value for key, value in values.items() if key in known})
            if hasattr(spec, "trials"):
                spec.trials()
    except SpecError as error:
        one_line(error)


# --- the command line

OPTIONS = sorted(
    {f"--{f.name}" for command in cli.COMMANDS.values() for f in dataclasses.fields(command.settings)}
)
WORDS = st.one_of(
    st.sampled_from(OPTIONS),
    st.sampled_from(
        (
            "--help",
            "--print_config",
            "--config",
            "--config=",
            "--set",
            "--set=",
            "--set.a",
            "--only",
            "--dry-run",
        )
        + (
            "--allow-import",
            "--task",
            "--task=bit-pattern",
            "--units.pfu.noise",
            "--units.relu",
            "--model.steps",
            "-h",
        )
        + (
            "--",
            "-",
            "--=",
            "--beta=",
            "--beta=1",
            "--grid.a=[1]",
            "--set={",
            "--unknown",
            "--beta.x",
            "--live",
        )
    ),
    st.sampled_from(
        (
            "1",
            "8.0",
            "nan",
            "-1",
            "1e-4",
            "[1, 2]",
            "{a: 1}",
            "{",
            "[",
            "null",
            "true",
            "a=b",
            "learning_rate=0.1",
            "a.b.c=1",
        )
        + (
            "digits",
            "compare",
            "one_step_small",
            "none",
            "converged",
            "relu",
            "",
            " ",
            "\u00e9",
            "a\nb: 1",
            "{task: 3}",
        )
        + (
            "nowhere.yaml",
            "./",
            "/",
            "model.layers=[1",
            "val/accuracy",
            "bit-pattern",
            "retrieval",
            "all",
            "models",
        )
    ),
    st.text(max_size=5),
)
LINES = st.builds(
    lambda command, words: [*command, *words],
    st.sampled_from([[name] for name in cli.COMMANDS] * 4 + [[], ["sweeep"], ["--version"], [""]]),
    st.lists(WORDS, max_size=5),
)


@pytest.fixture
def _no_work(monkeypatch):
    """Commands read their settings and do nothing."""
    idle = {
        name: dataclasses.replace(command, work=lambda spec, flags: None)
        for name, command in cli.COMMANDS.items()
    }
    monkeypatch.setattr(cli, "COMMANDS", idle)
    monkeypatch.setattr(cli, "STUDY", dataclasses.replace(cli.STUDY, work=lambda spec, flags: None))
    monkeypatch.setattr(cli, "allow", lambda: None)


def run(words):
    """The exit code of the command line, what it wrote on stdout and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), within(4.0):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def check(words):
    code, out, err = run(words)
    assert code in (0, 2)
    if code == 2:
        assert err.startswith("hopdeq-lwpf: error: ")
        assert err.count("\n") == 1
        assert len(err) > len("hopdeq-lwpf: error: \n")
        assert "Traceback" not in err
    else:
        assert not err
    return code


@pytest.mark.usefixtures("_no_work")
@examples(40)
@given(LINES)
def test_the_command_line_runs_or_says_one_line(words):
    check(words)


@pytest.mark.usefixtures("_no_work")
@examples(15)
@given(st.sampled_from(("compare", "sweep", "train", "retrieve", "list", "report")), yaml_texts())
def test_a_settings_file_runs_or_is_refused_in_one_line(tmp_path_factory, command, text):
    path = tmp_path_factory.getbasetemp() / "given.yaml"
    path.write_bytes(text.encode("utf-8", "replace"))
    check([command, "--config", str(path)])


@examples(25)
@given(st.lists(WORDS, max_size=6))
def test_arguments_are_put_together_without_losing_a_word(words):
    with within():
        try:
            joined = together(assigned(words))
        except SpecError as error:
            joined, said = None, error
        assigned_keys(words)
    if joined is None:
        one_line(said, "--set")
    elif not any(word.startswith(("--set", "--config")) or "." in word for word in words):
        assert joined == words


# --- found before


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("words", [["retrieve", ""], ["sweep"], ["train", " "], ["list", "\t"]])
def test_an_empty_word_is_said_to_be_wrong(words):
    assert check(words) == 2 or words == ["sweep"]


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (StudySpec, {"task": None}, "task None is not one of"),
        (StudySpec, {"confidence": None}, "confidence must be a finite number, got None"),
        (CompareSpec, {"beta": 3.0}, "beta must be a list, each entry one value, got 3.0"),
        (CompareSpec, {"steps": [[1]]}, "steps must be a list"),
        (SweepSpec, {"x": []}, r"x must be text or null, got \[\]"),
        (SweepSpec, {"executor": {}}, r"executor must be text, got \{\}"),
        (TrainSpec, {"loggers": 3}, "loggers must be a list, each entry text, got 3"),
        (ReportSpec, {"study": "results", "port": None}, "port must be a whole number"),
        (ListSpec, {"kind": []}, r"kind must be text, got \[\]"),
        (SdmSpec, {"algorithm": {}}, r"algorithm must be text, got \{\}"),
        (GraphSpec, {"curve": None}, "curve must be text, got None"),
    ],
)
def test_a_setting_of_another_form_is_named(kind, given, message):
    with pytest.raises(SpecError, match=message):
        kind(**given)
