"""What the trials of a study come to: statistics, findings that say no more than the numbers, the written files."""

import json
import math
import re
from html import unescape

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopdeq_lwpf.sweeps.engine.records import curves, measures
from hopdeq_lwpf.sweeps.reports.statistics import t_interval, t_quantile
from hopdeq_lwpf.sweeps.reports.study_plots import curves_of, draw
from hopdeq_lwpf.sweeps.reports.study_report import markdown, write_results
from hopdeq_lwpf.sweeps.reports.study_results import Study, differences, epochs_name, findings, summaries
from hopdeq_lwpf.sweeps.study_spec import TASKS, SpecError, StudySpec, StudyTask, preset
from hopdeq_lwpf.sweeps.trials.train_trial import run_trial

# --- Student's t


def t_share(t, degrees):
    """P(T < t) by Simpson's rule on the density, in plain Python."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    density = lambda x: scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)  # noqa: E731
    count = 2000
    width = t / count
    total = density(0) + density(t)
    total += sum((4 if i % 2 else 2) * density(i * width) for i in range(1, count))
    return 0.5 + total * width / 3


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0.02, 0.98), degrees=st.integers(1, 60))
def test_the_quantile_is_where_the_density_has_its_share(share, degrees):
    # At a share of 0.98 and one degree the point is 16: Simpson's steps of 0.008 err by far less than 1e-8.
    assert t_share(t_quantile(share, degrees), degrees) == pytest.approx(share, abs=1e-8)


@pytest.mark.parametrize(
    ("share", "degrees", "value"),
    # The usual table of the t distribution.
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.995, 4, 4.604),
        (0.95, 9, 1.833),
        (0.975, 30, 2.042),
        (0.9995, 5, 6.869),
    ],
)
def test_the_quantile_is_that_of_the_table(share, degrees, value):
    assert t_quantile(share, degrees) == pytest.approx(value, abs=6e-4)
    assert t_quantile(1 - share, degrees) == pytest.approx(-value, abs=6e-4)


def test_the_quantile_of_many_degrees_is_that_of_the_normal_distribution():
    assert t_quantile(0.975, 100_000) == pytest.approx(1.959964, abs=1e-4)
    assert t_quantile(0.5, 3) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(("share", "degrees"), [(0.0, 3), (1.0, 3), (0.5, 0), (float("nan"), 3)])
def test_a_quantile_that_does_not_exist_is_refused(share, degrees):
    with pytest.raises(ValueError, match="needs 0 < share < 1"):
        t_quantile(share, degrees)


def test_the_interval_by_hand():
    found = t_interval([1.0, 2.0, float("nan"), 3.0, 6.0])
    # mean 3, variance 14 / 3 over 3 degrees of freedom, t = 3.1824
    half = 3.182446 * math.sqrt(14 / 3) / 2
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-6)
    alone = t_interval([4.0])
    assert alone.mean == 4.0
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert math.isnan(t_interval([]).mean)
    assert math.isnan(t_interval([float("nan")]).mean)
    with pytest.raises(ValueError, match="confidence"):
        t_interval([1.0], 1.0)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    found = [t_interval(generator.normal(size=4), 0.9) for _ in range(4000)]
    share = np.mean([each.low < 0 < each.high for each in found])
    # Four standard deviations of a share of 0.9 of 4,000.
    assert share == pytest.approx(0.9, abs=4 * math.sqrt(0.9 * 0.1 / 4000))


# --- a made-up study


def record(trial, score, **more):
    """The record of a trial whose score is the same in every epoch."""
    base = {
        "hash": trial.hash,
        "condition": {"task": trial.condition.task},
        "seed": trial.seed,
        "folder": f"trials/{trial.folder}",
        "curves": {"val/accuracy": [score] * 4, "train/accuracy": [1.0] * 4, "converged": [1.0] * 4},
        "costs": {"epoch_cpu_seconds": 0.5, "saved_bytes": 2e6},
        "warnings": [],
        "versions": {"torch": "2"},
        "failure": None,
    }
    return {**base, **more}


def study_of(scores, spec=None, **more):
    """A study whose scores are `scores(condition, seed)`; None: not run; a string: failed with it."""
    spec = spec or StudySpec(forgetting=("none", "relu"), seeds=(0, 1, 2), inject=("start",), **more)
    records = []
    for trial in spec.trials():
        score = scores(trial.condition, trial.seed)
        if score is None:
            records.append(None)
        elif isinstance(score, str):
            records.append(
                record(trial, 0.0, curves={}, costs={}, failure={"error": "Boom", "message": score})
            )
        else:
            records.append(record(trial, score))
    return Study(spec, spec.trials(), tuple(records))


NOISE = {0: 0.0, 1: 0.003, 2: -0.002}  # by seed: what seeds share cancels in pairs


def test_a_difference_that_all_seeds_show_is_said_and_none_is_not_made_up():
    def scores(condition, seed):
        wobble = 0.001 * ((seed * 7 + len(condition.dynamics)) % 3)
        gain = 0.1 if condition.forgetting == "relu" and condition.steps == 4 else 0.0
        return 0.7 + 10 * NOISE[seed] + wobble + gain

    study = study_of(scores)
    by_name = {(d.kind, d.condition.name, d.other.name): d for d in differences(study, "bit-pattern")}
    relu = by_name["forgetting", "bit-pattern relu 4 steps", "bit-pattern none 4 steps"]
    # The same wobble on both sides: the difference is 0.1 in every seed, which has no interval.
    assert relu.interval.mean == pytest.approx(0.1)
    assert not relu.known
    gain = by_name["steps", "bit-pattern relu 4 steps", "bit-pattern relu 1 step"]
    assert gain.sign == 1
    said = " ".join(findings(study))
    assert "4 steps against 1 step: Accuracy is higher with ReLU (+0.1" in said
    assert "no difference shown with no forgetting" in said.lower()
    assert "lower with" not in said
    assert re.search(
        r"The same difference in every seed, and so no interval, with .*; 4 steps \(\+0\.100\)", said
    )


def test_pairs_are_formed_by_seed():
    """Seeds that differ by far more than the conditions: only paired differences see the gain."""
    wobble = {0: 0.001, 1: -0.001, 2: 0.0}
    study = study_of(lambda c, seed: 0.5 + 0.1 * seed + (0.02 + wobble[seed] if c.steps == 4 else 0.0))
    (found,) = (
        d
        for d in differences(study, "bit-pattern")
        if d.condition.steps == 4 and d.condition.forgetting == "none"
    )
    half = 4.302653 * 0.001 / math.sqrt(3)
    assert (found.interval.low, found.interval.high) == pytest.approx((0.02 - half, 0.02 + half), rel=1e-5)
    unpaired = study.interval(found.condition, "score")
    assert unpaired.high - unpaired.low > 0.4


def test_what_a_difference_is_taken_against():
    spec = StudySpec(task="bit_pattern", seeds=(0,))
    study = study_of(lambda *_: 0.5, spec)
    pairs = {kind: [] for kind in ("steps", "forgetting", "adjoint", "inject")}
    for found in differences(study, "bit-pattern"):
        pairs[found.kind].append((found.condition, found.other))
    assert {kind: len(each) for kind, each in pairs.items()} == {
        "steps": 3 * 5,
        "forgetting": 2 * 6,
        "adjoint": 3 * 2,
        "inject": 3 * 2,
    }
    for kind, each in pairs.items():
        for here, there in each:
            changed = {
                name
                for name in ("forgetting", "steps", "adjoint", "inject")
                if getattr(here, name) != getattr(there, name)
            }
            assert changed == {kind} or (kind == "steps" and there.steps == 1)
    assert all(here.adjoint == "implicit" for here, _ in pairs["adjoint"])
    assert all((here.inject, there.inject) == ("input", "start") for here, there in pairs["inject"])
    assert all(there.forgetting == "none" for _, there in pairs["forgetting"])


def test_one_seed_has_no_interval_and_the_findings_say_so():
    study = study_of(lambda c, seed: 0.9 if c.forgetting == "relu" else 0.1, seeds_one())
    said = " ".join(findings(study)).lower()
    assert "too few seeds for an interval" in said
    assert "higher with" not in said
    assert "would be by chance" not in said


def seeds_one():
    return StudySpec(forgetting=("none", "relu"), seeds=(5,))


def test_failures_and_trials_that_were_not_run_count_nowhere():
    def scores(condition, seed):
        if condition.forgetting == "relu" and seed == 1:
            return "the <machine> & its fan"
        return None if seed == 2 else 0.5 + NOISE[seed] + 0.1 * (condition.forgetting == "relu")

    study = study_of(scores)
    conditions = len(study.spec.conditions())
    assert len(study.failures()) == conditions // 2
    assert study.missing() == conditions
    assert findings(study)[0] == (
        f"Trials: {conditions + conditions // 2} of {3 * conditions} finished, {conditions // 2} failed, "
        f"{conditions} not run; seeds 0, 1, 2."
    )
    for found in differences(study, "bit-pattern"):
        both = found.condition.forgetting == found.other.forgetting == "none"
        assert int((~np.isnan([found.interval.low])).sum()) == both
    assert summaries(study)[0].lines[0][2] == "2"


def test_nothing_run_yet_is_no_error(tmp_path):
    study = study_of(lambda *_: None, out=str(tmp_path / "out"))
    assert "No trial has a score yet." in findings(study)
    names = {path.name for path in write_results(study)}
    assert names == {"results.csv", "table.md", "table.tex", "report.html"}


def test_chance_is_counted():
    study = study_of(lambda c, seed: 0.5 + 0.01 * ((hash_of(c) + 3 * seed) % 7))
    tested = [d for d in differences(study, "bit-pattern") if d.known]
    apart = sum(d.sign != 0 for d in tested)
    (sentence,) = (each for each in findings(study) if "by chance" in each)
    assert sentence.startswith(f"{apart} of {len(tested)} intervals")
    assert f"about {0.05 * len(tested):.1f} would" in sentence


def hash_of(condition):
    return sum(map(ord, condition.name))


# --- numbers of one trial


def test_curves_take_training_before_validation_and_join_layers():
    lines = [
        {"metrics": {"val/loss": 1.0, "train/a/steps": 2.0, "train/b/steps": 4.0, "val/a/steps": 9.0,
                     "train/a/residual_max": 1e-3, "train/b/residual_max": 5e-3, "val/a/support": 7.0}},
        {"metrics": {"val/loss": None, "train/a/steps": 3.0, "train/b/steps": None, "val/a/support": 8.0}},
    ]  # fmt: skip
    assert curves(lines) == {
        "val/loss": [1.0, None],
        "steps": [3.0, 3.0],
        "residual_max": [5e-3, None],
        "support": [7.0, 8.0],
    }


def test_measures_are_means_over_the_last_epochs():
    (trial, *_) = StudySpec(seeds=(0,)).trials()
    made = record(
        trial,
        0.0,
        curves={"val/accuracy": [0.9, 0.2, None, 0.4], "steps_max": [9.0, 1.0, 5.0, 2.0], "steps": [1.0] * 4},
    )
    found = measures(made, 3, "val/accuracy")
    assert found["score"] == pytest.approx(0.3)
    assert found["score_best"] == 0.9
    assert found["score_end"] == 0.4
    low = record(trial, 0.0, curves={"val/loss": [0.9, 0.2, None, 0.4]})
    assert measures(low, 3, "val/loss")["score_best"] == 0.2, "of a loss the lowest"
    assert measures(made, 3, "saved_bytes")["score"] == 2e6, "a cost may be the score"
    own = {**made, "curves": {"seconds": [0.25]}, "costs": {"seconds": 7.0}}
    timed = measures(own, 1, "seconds")
    assert (timed["score"], timed["seconds"]) == (0.25, 0.25), "what the trial measured itself"
    assert found["train_score"] is None
    assert found["steps_max"] == 5.0
    assert found["saved_bytes"] == 2e6
    assert found["parameters"] is None


# --- pictures and files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Files of a study with a failure and a warning whose texts are HTML."""
    out = tmp_path_factory.mktemp("report") / "out"

    def scores(condition, seed):
        if condition.forgetting == "relu" and condition.steps == 1 and seed == 0:
            return "bad | <script>alert(1)</script>"
        return 0.6 + NOISE[seed] + 0.001 * hash_of(condition) % 0.1

    study = study_of(scores, out=str(out))
    first = {**study.records[0], "warnings": ["<b>mind</b> the gap"]}
    study = Study(study.spec, study.trials, (first, *study.records[1:]))
    return study, {path.name: path for path in write_results(study)}


def test_the_report_loads_nothing_and_escapes_everything(written):
    study, paths = written
    page = paths["report.html"].read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>mind" not in page
    assert "&lt;b&gt;mind&lt;/b&gt; the gap" in page
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r'https?://[^\s"<]+', page)) <= namespaces
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    identities = re.findall(r'\bid="([^"]+)"', page)
    assert len(identities) == len(set(identities))
    (stored,) = re.findall(r'<script type="application/json" id="settings">(.*?)</script>', page)
    assert StudySpec(**json.loads(stored)) == study.spec
    assert page.count("<figure") == 3


def test_the_report_says_how_to_run_what_failed_again(written):
    page = unescape(written[1]["report.html"].read_text())
    assert "failed: 1; not run: 0" in page
    assert "hopdeq-lwpf train bit_pattern --model.forgetting" in page
    assert f"hopdeq-lwpf compare --config {written[0].spec.out}/settings.yaml" in page
    assert f"hopdeq-lwpf report {written[0].spec.out}" in page
    assert "torch 2" in page


def test_the_table_for_the_documentation_is_whole(written):
    study, paths = written
    text = paths["table.md"].read_text()
    assert text == markdown(study)
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1, "every row has as many cells as the header"
    assert len(tables[0].splitlines()) == 2 + len(study.spec.conditions())


def test_pictures_show_the_numbers():
    study = study_of(lambda c, seed: 0.6 + NOISE[seed] + 0.001 * (hash_of(c) % 50))
    figures = {name: figure for name, (_, figure) in draw(study).items()}
    assert set(figures) == {"score-bit-pattern", "cost-bit-pattern", "curves-bit-pattern"}
    conditions = study.conditions("bit-pattern")
    (axes,) = figures["score-bit-pattern"].axes
    drawn = {round(float(x), 6) for line in axes.lines for x in line.get_xdata()}
    for condition in conditions:
        expected = study.values(condition, "score")
        assert {round(float(v), 6) for v in (*expected, expected.mean())} <= drawn
    panels = figures["curves-bit-pattern"].axes
    assert [panel.get_title() for panel in panels] == ["no forgetting", "ReLU"]
    assert [len(panel.lines) for panel in panels] == [len(conditions) // 2] * 2
    assert curves_of(study, conditions[0]).shape == (3, 4)


# --- settings


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"task": ("bit-patern",)}, "task 'bit-patern' is not one of.*Did you mean 'bit-pattern'"),
        ({"task": ()}, "task is empty"),
        ({"task": ("bit-pattern", "bit_pattern")}, "task names a value twice"),
        ({"forgetting": ("rleu",)}, "forgetting 'rleu' is not one of.*Did you mean 'relu'"),
        ({"forgetting": ()}, "forgetting is empty"),
        ({"forgetting": ("relu", "relu")}, "forgetting names a value twice"),
        ({"units": {"mine": {"unit": "pfuu"}}}, "unit of 'mine' 'pfuu' is not one of.*Did you mean 'pfu'"),
        ({"units": {"mine": 3}}, "units.mine must be a mapping"),
        ({"units": 3}, "units must be a mapping"),
        ({"steps": (0,)}, "steps must be whole numbers of at least 1 or 'converged', got 0"),
        ({"steps": (True,)}, "steps must be"),
        ({"steps": ("converge",)}, "steps must be"),
        ({"adjoint": ("implict",)}, "adjoint 'implict' is not one of.*Did you mean 'implicit'"),
        ({"inject": ("begin",)}, "inject 'begin' is not one of"),
        ({"inject": ()}, "inject is empty"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (1, 1)}, "seeds names a value twice"),
        ({"seeds": (-1,)}, "seeds must be a whole number of at least 0, got -1"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"data": {"workers": 2}}, "data.workers must be 0 in a study"),
        ({"units": {"none": {"unit": "pfu"}}}, "give the unit another name"),
        ({"last": 0}, "last must be"),
        ({"workers": 0}, "workers must be"),
        ({"workers": 1.5}, "workers must be"),
        ({"confidence": 1.0}, "confidence must be between 0 and 1"),
        ({"out": ""}, "out is empty"),
        ({"model": {"steps": 2}}, "model.steps is set by the conditions"),
        ({"model": "pooling"}, "model must be a mapping"),
        ({"train": {"seed": 2}}, "train.seed is a setting of the study: use seeds"),
        ({"train": {"learning_rat": 2}}, "train.learning_rat is not one of.*Did you mean 'learning_rate'"),
        ({"train": {"resume": True}}, "train.resume is not one of"),
    ],
)
def test_settings_that_make_no_sense(given_settings, message):
    with pytest.raises(SpecError, match=message):
        StudySpec(**given_settings)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_trained_and_has_its_score(task, tmp_path):
    spec = StudySpec(
        task=task, epochs=1, train={"limit_batches": 1}, seeds=(0,), steps=(1,), forgetting=("relu",)
    )
    (trial,) = spec.trials()
    found = run_trial(trial.settings(), tmp_path / "a")
    assert found["failure"] is None
    assert len(found["curves"][TASKS[task].score]) == 1
    made = measures(record(trial, 0.0, **found), spec.last_of(task), TASKS[task].score)
    assert made["train_score"] is not None


def test_settings_of_a_task_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setitem(TASKS, "nothing", StudyTask("train_nothing", "val/accuracy"))
    with pytest.raises(SpecError, match="task 'nothing' needs the settings models/train_nothing.yaml"):
        StudySpec(task="nothing").trials()
    with pytest.raises(SpecError, match="learning_rate must be above 0"):
        StudySpec(train={"learning_rate": -1.0}).trials()


def test_each_task_averages_its_own_last_epochs():
    spec = StudySpec(task=("bit-pattern", "repertoires"))
    assert [spec.last_of(task) for task in spec.task] == [10, 1]
    assert StudySpec(task="repertoires", last=3).last_of("repertoires") == 3


def test_a_short_study_does_not_speak_of_more_epochs_than_it_has():
    assert epochs_name(StudySpec(epochs=3), "bit-pattern") == "the last 3 epochs"
    assert epochs_name(StudySpec(epochs=1), "bit-pattern") == "the last epoch"
    assert epochs_name(StudySpec(), "bit-pattern") == "the last 10 epochs"
    assert epochs_name(StudySpec(), "repertoires") == "the last epoch"


def test_shares_are_not_rounded_up_and_nan_at_any_time_counts():
    spec = StudySpec(forgetting=("none",), steps=("converged",), adjoint=("implicit",), seeds=(0, 1))
    trials = spec.trials()
    records = [record(trial, 0.5) for trial in trials]
    records[0]["curves"] |= {"converged": [0.2, *[0.99997] * 10], "nonfinite": [0.1, *[0.0] * 10]}
    for each in records[1:]:
        each["curves"] |= {"converged": [1.0] * 11, "nonfinite": [None] * 11}
    said = next(line for line in findings(Study(spec, trials, tuple(records))) if "tolerance" in line)
    assert "at least 99.99 % in every trial" in said
    assert said.endswith("NaN or inf in a state at any time: 1.")


def test_units_keep_what_is_not_named_and_take_text_as_values():
    assert StudySpec().unit("relu") == {"unit": "relu", "min_keep": 1}
    assert StudySpec().unit("none") is None
    assert StudySpec().unit("pfu") == "pfu"
    spec = StudySpec(units={"relu": {"min_keep": "2"}, "low": {"unit": "pfu", "threshold": "-0.5"}})
    assert spec.unit("relu") == {"unit": "relu", "min_keep": 2}
    assert spec.unit("low") == {"unit": "pfu", "threshold": -0.5}
    assert StudySpec(units={"relu": "relu"}).unit("relu") == {"unit": "relu"}
    assert StudySpec(forgetting=("low",), units=spec.units).conditions()[0].forgetting == "low"


def test_a_trial_changes_what_its_condition_names_and_nothing_else():
    base = preset("bit-pattern")
    for trial in StudySpec(seeds=(4,)).trials():
        now, condition = trial.settings(), trial.condition
        changed = {key for key in now["model"] if now["model"][key] != base["model"].get(key, "absent")}
        assert changed <= {"steps", "forgetting", "adjoint", "inject"}
        assert now["model"]["steps"] == (None if condition.steps == "converged" else condition.steps)
        assert now["model"]["inject"] == condition.inject
        assert now["model"].get("adjoint") == condition.adjoint
        assert now["data"] == base["data"]
        # The published number of epochs is for one training, not for ninety.
        assert now["epochs"] == 100
        rest = [key for key in base if key not in ("model", "out", "epochs")]
        assert {key for key in rest if now[key] != base[key]} == set()
        assert now["seed"] == 4
    trials = StudySpec().trials()
    assert [trial.seed for trial in trials[:18]] == [0] * 18, "whole grids first"
    assert len({trial.hash for trial in trials}) == len({trial.folder for trial in trials}) == 90


def test_the_hash_is_of_every_setting_but_out_and_resume():
    (trial, *_) = StudySpec(seeds=(0,)).trials()
    assert StudySpec(seeds=(0,), out="elsewhere", workers=1, last=3).trials()[0].hash == trial.hash
    different = [
        StudySpec(seeds=(1,)),
        StudySpec(seeds=(0,), epochs=3),
        StudySpec(seeds=(0,), data={"num_bags": 9}),
        StudySpec(seeds=(0,), model={"num_heads": 2}),
        StudySpec(seeds=(0,), train={"clip": None}),
    ]
    assert len({trial.hash, *(spec.trials()[0].hash for spec in different)}) == 6
