"""Settings files: what is no YAML, or more than plain values, is one line with the file and the line."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.cli import main
from hopdeq_lwpf.documents import parse_document, parse_value, read_document

WORDS = st.text("abcdefghij", min_size=1, max_size=5)
TREES = st.recursive(
    st.one_of(
        st.integers(), st.booleans(), st.none(), WORDS, st.floats(allow_nan=False, allow_infinity=False)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=8,
)


@given(st.dictionaries(WORDS, TREES, min_size=1, max_size=4))
def test_what_yaml_writes_is_read_back_with_every_key_on_its_line(values):
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=False)
    document = parse_document(text, "f.yaml")
    assert document.values == values
    lines = text.splitlines()
    for path, line in document.lines.items():
        if not path[-1].isdigit():
            assert path[-1] in lines[line - 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid:\n\tx: 1\n", "f.yaml:2: a tab"),
        ("a: 1\nb:\n  c: 1\n \td: 2\n", "f.yaml:4: a tab"),
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: the name 'a' stands twice in one mapping, before in line 1"),
        ("g: {a: 1,\n  b: {c: 1, c: 2}}\n", "f.yaml:2: the name 'c' stands twice"),
        (
            "a: 1\nx: !!python/object/apply:os.getpid []\n",
            "f.yaml:2: the tag !!python/object/apply:os.getpid",
        ),
        ("x: [1, !mine 2]\n", "f.yaml:1: the tag !mine is refused"),
        ("x: !!binary aGk=\n", "f.yaml:1: the tag !!binary is refused"),
        ("- a\n- b\n", "f.yaml:1: needs a mapping"),
        ("\n\njust words\n", "f.yaml:3: needs a mapping"),
        ("# nothing\n", "f.yaml:1: is empty"),
        ("beta: [1\n", "f.yaml:2: is no YAML"),
        ("a: b: c\n", "f.yaml:1: is no YAML"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("? [1]\n: 2\n", "f.yaml:1: a name is a list"),
        ("a: &a [*a]\n", "f.yaml:1: aliases"),
        ("a: \x00\n", "f.yaml: unacceptable character"),
    ],
)
def test_what_a_settings_file_may_not_hold(text, message):
    with pytest.raises(SpecError) as caught:
        parse_document(text, "f.yaml")
    assert message in str(caught.value)


def test_aliases_that_stand_for_billions_are_refused_at_once():
    text = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    with pytest.raises(SpecError, match="aliases"):
        parse_document(text, "f.yaml")


def test_numbers_dates_and_merged_mappings_are_what_the_parser_of_options_has():
    text = "a: 1e-4\nb: 2020-13-45\nbase: &b {x: 1}\nc: {<<: *b, y: 2}\nd: !!str 3\n"
    found = parse_document(text, "f").values
    assert found == {"a": 1e-4, "b": "2020-13-45", "base": {"x": 1}, "c": {"x": 1, "y": 2}, "d": "3"}
    assert parse_value("1e-4") == 1e-4
    assert parse_value("{a: [1, null]}") == {"a": [1, None]}
    assert parse_value("a: b: c") == "a: b: c"


def test_bytes_that_are_no_text_have_a_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(SpecError, match=r"a\.yaml:2: is not UTF-8"):
        read_document(path)


PLACES = """base: x
set:
  epochs: 1
  model.dampin: 0.1
grid:
  model.damping: [0.0]
  speed:
    slow: {epoch: 1}
    fast: {learning_rate: 1}
rules:
- where: {speed: slow}
  set: {}
"""


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("base 'x' is not one of ['y']", 1),
        ("grid.speed: 'epoch' is no setting of task 'train'", 8),
        ("grid.model.damping is empty: give at least one value", 6),
        ("grid.speed.fast must be a mapping", 9),
        ("rules[0].set must be a mapping", 12),
        ("model: option of model 'ham': 'dampin' is not one of ['a']. Did you mean 'damping'?", 4),
        ("cell 'slow 0.0': epochs must be a whole number", 3),
        ('"grid": Expected a dict. Got value: [1]', 5),
        ("unknown key 'speed' in the settings", 7),
        ("seeds is empty", None),
        ("something else altogether", None),
    ],
)
def test_a_complaint_is_placed(message, line):
    document = parse_document(PLACES, "f.yaml")
    assert document.lines.get(document.place_of(message)) == line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: train_digits\nsedes: [1]\n", ":2: unknown key 'sedes' in the settings; did you mean 'seeds'"),
        ("base: train_digits\ngird:\n  lr: [1]\n", ":2: unknown key 'gird' in the .*; did you mean 'grid'"),
        ("base: train_digits\nzzz:\n  lr: [1]\n", ":3: unknown key 'zzz.lr' in the settings"),
        ("base: train_digits\nset:\n  epoch: 1\n", ":3: set: 'epoch' is no setting .*Did you mean 'epochs'"),
        (
            "base: train_digits\ngrid:\n  f:\n    a: {epoch: 1}\n",
            ":4: grid.f: 'epoch' .*Did you mean 'epochs'",
        ),
        ("base: train_digits\ngrid: [1]\n", ':2: "grid": Expected a dict'),
        ("base: train_digits\ngrid: {epochs: []}\n", ":2: grid.epochs is empty"),
        (
            "base: train_digits\nset: {model.hiden: 3}\n",
            ":2: model: option .*'hiden' .*Did you mean 'hidden'",
        ),
        ("base: train_digits\nset: {model.solver: a.b:C}\n", ":2: model: solver 'a.b:C' .*--allow-import"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_its_line(text, message, tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert main(["sweep", str(path), "--dry-run", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(re.escape(str(path)) + message, said), said


def test_what_the_command_line_says_is_not_blamed_on_the_file(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text("base: train_digits\nworkers: 2\n")
    assert main(["sweep", str(path), "--workers", "0"]) == 2
    assert str(path) not in capsys.readouterr().err


def test_one_value_where_a_list_belongs_is_said(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text("base: train_digits\nseeds: 3\n")
    assert main(["sweep", str(path), "--dry-run", "--out", str(tmp_path / "out")]) == 2
    assert "takes several values got one in the settings file: write it as a list" in capsys.readouterr().err
