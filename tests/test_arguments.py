"""Options of mappings inside mappings, which the parser would lose; assignments; flags."""

import pytest
import yaml

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.arguments import assigned, assigned_keys, flagged, together
from hopdeq_lwpf.cli import main
from hopdeq_lwpf.sweeps.sweep_spec import SweepSpec


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


# --- --set KEY=VALUE, flags


def mapping_of(words):
    """The one mapping behind --set, and the other words."""
    place = words.index("--set")
    return yaml.safe_load(words[place + 1]), words[:place] + words[place + 2 :]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--set", "epochs=1", "--set", "model.damping=0.1"], {"epochs": 1, "model.damping": 0.1}),
        (["--set=epochs=1", "--set.epochs", "2"], {"epochs": 2}),
        (["--set.data.folder=a=b"], {"data.folder": "a=b"}),
        (["--set", "model.layers=[64, 10]", "--set", "clip=null"], {"model.layers": [64, 10], "clip": None}),
        (["--set", "learning_rate=1e-3"], {"learning_rate": 0.001}),
        (["--set", "{epochs: 1}", "--set", "seed=3"], {"epochs": 1, "seed": 3}),
        (
            ["--set", "model.solver.solver=anderson", "--set", "model.solver.memory=4"],
            {"model.solver": {"solver": "anderson", "memory": 4}},
        ),
        (
            [
                "--config",
                "{set: {data: {data: digits}, epochs: 3}}",
                "--set",
                "data.batch_size=8",
                "--set",
                "epochs=4",
            ],
            {"data": {"data": "digits"}, "data.batch_size": 8, "epochs": 4},
        ),
        (
            ["--config", "{set: {model: {solver: {solver: anderson}}}}", "--set", "model.solver.memory=4"],
            {
                "model": {"solver": {"solver": "anderson"}},
                "model.solver": {"solver": "anderson", "memory": 4},
            },
        ),
    ],
)
def test_settings_of_every_trial_are_put_together(given, expected):
    found, _ = mapping_of(assigned(["sweep", *given, "--workers", "2"]))
    assert list(found.items()) == list(expected.items())


def test_what_is_set_last_stands_last_where_it_wins():
    words = assigned(["--config", "{set: {epochs: 1, model.damping: 0.1}}", "--set", "epochs=2"])
    found, rest = mapping_of(words)
    assert list(found) == ["model.damping", "epochs"]
    assert rest == ["--config", "{set: {epochs: 1, model.damping: 0.1}}"]


@pytest.mark.parametrize("given", [["--set"], ["--set", "epochs"], ["--set", "=3"], ["--set.epochs"]])
def test_an_assignment_without_a_value_is_refused(given):
    with pytest.raises(SpecError, match="needs KEY=VALUE"):
        assigned(["sweep", *given])


def test_words_without_assignments_stay_as_they_are():
    words = ["sweep", "--config", "a.yaml", "--settle", "1", "--seeds", "0"]
    assert assigned(words) == words


def test_flags_are_found_with_dashes_and_underscores():
    assert flagged(["a", "--dry_run", "--x"], ("dry-run", "live")) == (["a", "--x"], frozenset({"dry-run"}))
    assert flagged(["a", "--dry-run=1"], ("dry-run",)) == (["a", "--dry-run=1"], frozenset())


def test_assignments_reach_the_trials(capsys):
    arguments = [
        "sweep",
        "goemaere_table2_quick",
        "--set",
        "epochs=2",
        "--set",
        "data.batch_size=8",
        "--seeds",
        "4",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--print_config"])
    assert ended.value.code == 0
    spec = SweepSpec(**yaml.safe_load(capsys.readouterr().out))
    trial = spec.trials()[0]
    assert (trial.given.epochs, trial.given.data, trial.seed) == (2, {"data": "digits", "batch_size": 8}, 4)


def test_an_assignment_that_no_cell_takes_is_refused(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text("base: train_digits\ngrid: {f: {a: {epochs: 1}, b: {}}, learning_rate: [0.1]}\n")
    words = ["sweep", str(path), "--dry-run", "--out", str(tmp_path / "out")]
    assert main([*words, "--set", "learning_rate=0.2"]) == 2
    assert "every cell sets 'learning_rate' itself" in capsys.readouterr().err
    assert main([*words, "--set", "epochs=2"]) == 0  # which cell b takes
    assert main([*words, "--set", "{learning_rate: 1}", "--set.clip", "2"]) == 0
    path.write_text(
        "base: train_digits\nseeds: [0]\nsearch: {space: {learning_rate: {low: 0.1, high: 0.2}}}\n"
    )
    assert main([*words, "--set", "learning_rate=0.2"]) == 2
    assert "every cell sets 'learning_rate' itself" in capsys.readouterr().err
    assert assigned_keys(["sweep", "--set.a.b=1", "--set", "c=2", "--set=d=3", "--set", "{e: 1}"]) == [
        "a.b",
        "c",
        "d",
    ]


def test_a_misspelt_assignment_names_the_nearest(capsys):
    assert main(["sweep", "goemaere_table2_quick", "--set", "epoch=2"]) == 2
    assert "Did you mean 'epochs'?" in capsys.readouterr().err
