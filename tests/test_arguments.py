"""Options of mappings inside mappings, which the parser would lose."""

import pytest
import yaml

from hopdeq_lwpf.arguments import together
from hopdeq_lwpf.cli import main


def said(words):
    """What is left for the parser: plain words, and the mappings by their option."""
    words, mappings = list(words), {}
    for place in range(len(words) - 2, -1, -1):
        if words[place].count(".") == 1 and words[place + 1].startswith("{"):
            mappings[words[place]] = yaml.safe_load(words[place + 1])
            del words[place : place + 2]
    return words, mappings


@pytest.mark.parametrize(
    ("given", "mappings"),
    [
        (
            ["--units.pfu.threshold", "0.5", "--units.pfu.noise=1e-4"],
            {"--units.pfu": {"threshold": 0.5, "noise": 1e-4}},
        ),
        (
            ["--units.pfu", "{unit: pfu, noise: 1}", "--units.pfu.noise", "2"],
            {"--units.pfu": {"unit": "pfu", "noise": 2}},
        ),
        (["--units.pfu.noise", "2", "--units.pfu", "{unit: pfu}"], {"--units.pfu": {"unit": "pfu"}}),
        (
            ["--a.b.c.d", "1", "--a.b.c.e", "null", "--a.x.y", "z"],
            {"--a.b": {"c": {"d": 1, "e": None}}, "--a.x": {"y": "z"}},
        ),
        (
            ["--config", "{units: {pfu: {unit: pfu}}}", "--units.pfu.noise", "1"],
            {"--units.pfu": {"unit": "pfu", "noise": 1}},
        ),
    ],
)
def test_mappings_are_put_together(given, mappings):
    assert said(together(given))[1] == mappings


def test_a_file_that_comes_later_wins():
    words = together(["--units.pfu.noise", "1", "--config", "{units: {pfu: {noise: 3}}}"])
    assert words.index("--units.pfu") < words.index("--config")


def test_all_else_stays_as_it_is():
    words = [
        "compare",
        "--task",
        "bit-pattern",
        "--model.steps",
        "null",
        "--model.forgetting=relu",
        "--seeds",
        "1",
        "2",
    ]
    assert together(words) == [
        "compare", "--task", "bit-pattern", "--model.steps", "null", "--model.forgetting", "relu", "--seeds", "1", "2",
    ]  # fmt: skip
    assert together(["--units.pfu.noise"]) == ["--units.pfu.noise"]


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "--task", "bit-pattern", "--units.pfu.threshold", "0.5", "--units.pfu.noise", "0.1"],
        ["train", "bit_pattern", "--model.forgetting.unit", "pfu", "--model.forgetting.threshold", "0.5",
         "--model.forgetting.noise", "0.1"],
    ],
)  # fmt: skip
def test_both_options_of_a_unit_arrive(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    assert ended.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    unit = shown["units"]["pfu"] if words[0] == "compare" else shown["model"]["forgetting"]
    assert (unit["threshold"], unit["noise"]) == (0.5, 0.1)
