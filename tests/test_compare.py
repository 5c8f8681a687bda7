"""The comparison: settings, statistics, and a small study against direct calls of retrieve."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hopdeq_lwpf import Termination, retrieve
from hopdeq_lwpf.data import DataError, Preprocessing, load_digits
from hopdeq_lwpf.sweeps.cells import nearest_pattern
from hopdeq_lwpf.sweeps.compare import compare, run
from hopdeq_lwpf.sweeps.reports.statistics import Bootstrap
from hopdeq_lwpf.sweeps.reports.table import columns, read_table
from hopdeq_lwpf.sweeps.spec import CONVERGED, CompareSpec, RetrieveSpec, SpecError
from hopdeq_lwpf.sweeps.task import build_task

SMALL = CompareSpec(
    stored=120,
    samples=24,
    forgetting=("none", "pfu"),
    beta=(8.0, 40.0),
    mask=(0.3,),
    noise=(0.1, 0.3),
    flip=(),
    resamples=200,
    max_steps=500,
    trajectories=4,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    spec = replace(SMALL, out=str(tmp_path_factory.mktemp("study") / "out"))
    return run(spec)


# --- settings


def test_the_yaml_file_holds_the_defaults():
    text = (Path(__file__).parents[1] / "sweeps" / "compare.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == CompareSpec().as_dict()
    for entry in fields(CompareSpec):  # each with its reason, beside or above it
        at = text.index(f"\n{entry.name}:")
        line, above = text[at + 1 :].split("\n")[0], text[:at].split("\n")[-1]
        assert "#" in line or above.startswith("#") or entry.name in ("noise", "flip"), entry.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forgetting": ("rleu",)}, "Did you mean 'relu'"),
        ({"normalize": "centre"}, "Did you mean 'center'"),
        ({"forgetting": ()}, "forgetting is empty"),
        ({"beta": (0.0,)}, "beta must be above 0"),
        ({"beta": (float("inf"),)}, "finite"),
        ({"beta": (8.0, 8.0)}, "names a value twice"),
        ({"steps": (0,)}, "steps must be"),
        ({"steps": ("convergd",)}, "'converged'"),
        ({"steps": (True,)}, "steps must be"),
        ({"mask": (1.1,)}, "mask must be at least 0 and at most 1"),
        ({"noise": (-0.1,)}, "noise must be at least 0, got"),
        ({"mask": (), "noise": (), "flip": ()}, "nothing to ask"),
        ({"samples": 0}, "samples must be a whole number"),
        ({"spectrum": -1}, "spectrum must be a whole number"),
        ({"samples": 1.5}, "samples must be a whole number"),
        ({"rtol": 0.0, "atol": 0.0}, "no solve would ever"),
        ({"confidence": 1.0}, "confidence"),
        ({"shape": (8, 8, 1)}, "height and width"),
        ({"shape": (0, 8)}, "shape must be"),
        ({"queries": "q.npy"}, "queries need patterns"),
        ({"patterns": "p.npy", "targets": "t.npy"}, "targets belong to queries"),
        ({"patterns": "p.npy", "queries": "q.npy", "stored": 3}, "drop one of the two"),
        ({"stored": 10**6}, "only 1797 patterns"),
        ({"shape": (9, 9), "patterns": "P"}, "does not fit"),
        ({"solver": "picrad"}, "picard"),
        ({"separation": "softmx"}, "softmax"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, change, message):
    if change.get("patterns") == "P":
        np.save(tmp_path / "p.npy", load_digits()[0][:5].numpy())
        change = {**change, "patterns": str(tmp_path / "p.npy")}
    with pytest.raises(SpecError, match=message) as caught:
        compare(CompareSpec(**{**SMALL.as_dict(), "stored": None, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": ""}, "queries is missing"),
        ({"beta": -1.0}, "beta must be above 0"),
        ({"forgetting": "pfuu"}, "Did you mean 'pfu'"),
        ({"inject": "strat"}, "Did you mean 'start'"),
        ({"dtype": "float16"}, "dtype"),
        ({"steps": 0}, "steps must be"),
    ],
)
def test_settings_of_a_recall(change, message):
    with pytest.raises(SpecError, match=message):
        RetrieveSpec(**{"patterns": "p.npy", "queries": "q.npy", "out": "o.npz", **change})


# --- statistics


def test_bootstrap_is_the_slow_twin():
    values = np.random.default_rng(3).normal(size=17)
    values[4] = np.nan
    bootstrap = Bootstrap.draw(17, resamples=60, confidence=0.8, seed=5)
    means = []
    for counts in bootstrap.counts:
        drawn = [v for v, count in zip(values, counts, strict=True) for _ in range(int(count)) if v == v]
        means.append(sum(drawn) / len(drawn))
    found = bootstrap.mean(values)
    assert found.mean == pytest.approx(np.nanmean(values))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.1, 0.9])))
    assert (bootstrap.counts.sum(1) == 17).all()


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    bootstrap = Bootstrap.draw(80, resamples=400, confidence=0.9, seed=1)
    samples = generator.random((400, 80)) < 0.3
    intervals = [bootstrap.mean(sample.astype(float)) for sample in samples]
    covered = np.mean([found.low <= 0.3 <= found.high for found in intervals])
    assert (
        0.85 < covered < 0.94
    )  # 0.9 with a standard error of 0.015; the percentile interval is a bit narrow


def test_a_paired_difference_is_narrower_than_two_intervals():
    generator = np.random.default_rng(0)
    first = (generator.random(200) < 0.5).astype(float)
    second = first.copy()
    second[:4] = 1 - second[:4]
    bootstrap = Bootstrap.draw(200, seed=2)
    paired, alone = bootstrap.difference(second, first), bootstrap.mean(first)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)
    assert paired.mean == pytest.approx(second.mean() - first.mean())


def test_nothing_to_average_is_nan_and_not_zero():
    assert np.isnan(Bootstrap.draw(3).mean(np.full(3, np.nan)).low)


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"size": 3, "resamples": 0}, {"size": 3, "confidence": 1.0}], ids=str
)
def test_bootstrap_refuses(wrong):
    with pytest.raises(ValueError, match="needs size"):
        Bootstrap.draw(**wrong)


# --- judging


def test_nearest_pattern_is_the_slow_twin():
    states, patterns = torch.randn(9, 5), torch.randn(12, 5)
    slow = [min(range(12), key=lambda j: float((state - patterns[j]).norm())) for state in states]
    assert nearest_pattern(states, patterns).tolist() == slow
    states[2, 1] = torch.nan
    assert int(nearest_pattern(states, patterns)[2]) == -1


def test_a_pattern_stored_twice_is_right_under_both_numbers(tmp_path):
    data = load_digits()[0][:6]
    np.save(tmp_path / "p.npy", torch.cat([data, data]).numpy())
    np.save(tmp_path / "q.npy", data.numpy())
    np.save(tmp_path / "t.npy", np.arange(6, 12))
    files = {"patterns": "p.npy", "queries": "q.npy", "targets": "t.npy"}
    spec = replace(SMALL, stored=None, beta=(200.0,), **{k: str(tmp_path / v) for k, v in files.items()})
    assert all(row["nearest"] == 1 for row in compare(spec).rows)


# --- the study


def test_rows_are_what_retrieve_says(small):
    comparison, _ = small
    spec, task = comparison.spec, comparison.task
    seen = {(r["forgetting"], r["steps"], r["beta"], r["corruption"], r["level"]) for r in comparison.rows}
    assert len(seen) == len(comparison.rows) == 2 * 3 * 2 * 3
    stop = Termination(rtol=spec.rtol, atol=spec.atol, max_steps=spec.max_steps, check_every=1)
    for row in comparison.rows:
        queries = next(s for s in task.sets if (s.kind, s.level) == (row["corruption"], row["level"]))
        recall = retrieve(
            queries.queries,
            task.patterns,
            beta=row["beta"],
            forgetting=None if row["forgetting"] == "none" else row["forgetting"],
            steps=None if row["steps"] == CONVERGED else row["steps"],
            stop=stop,
        )
        distance = torch.cdist(recall.value.double(), task.patterns.double())
        right = distance.argmin(-1) == task.targets
        error = distance[torch.arange(24), task.targets]  # the patterns have unit length
        good = right & (error <= spec.max_error)
        assert row["queries"] == 24
        assert row["nearest"] == pytest.approx(right.double().mean().item())
        assert row["recall"] == pytest.approx(good.double().mean().item())
        assert row["error"] == pytest.approx(error.mean().item(), abs=1e-4)
        assert row["steps_median"] == pytest.approx(np.median(recall.steps.numpy()))
        assert row["converged"] == pytest.approx(recall.converged.double().mean().item())
        assert row["residual_max"] == pytest.approx(recall.residual.max().item(), rel=0.02)
        assert row["recall_low"] <= row["recall"] <= row["recall_high"]


def test_differences_are_those_of_the_rows(small):
    rows = small[0].rows
    recall = {
        (r["forgetting"], r["steps"], r["beta"], r["corruption"], r["level"]): r["recall"] for r in rows
    }
    for row in rows:
        place = (row["beta"], row["corruption"], row["level"])
        none = row["recall"] - recall[("none", row["steps"], *place)]
        one = row["recall"] - recall[(row["forgetting"], 1, *place)]
        assert row["gain_forgetting"] == pytest.approx(none)
        assert row["gain_steps"] == pytest.approx(one)
        assert (row["agreement"] == 1) or row["steps"] != CONVERGED


def test_a_weak_corruption_is_recalled_at_a_sharp_beta_and_not_at_a_soft_one(small):
    chosen = [r for r in small[0].rows if r["steps"] == CONVERGED and r["level"] == 0.1]
    for row in chosen:
        assert row["recall"] >= 0.9 if row["beta"] == 40 else row["recall"] <= 0.2
        assert (row["weight"] > 0.8) == (row["beta"] == 40)


def test_the_table_reads_back(small, tmp_path):
    comparison, paths = small
    csv = next(path for path in paths if path.name == "results.csv")
    back = read_table(csv)
    assert len(back) == len(comparison.rows)
    for found, row in zip(back, comparison.rows, strict=True):
        for name in columns():
            wanted = (
                row[name] if isinstance(row[name], str) else pytest.approx(row[name], rel=1e-5, nan_ok=True)
            )
            assert found[name] == wanted, name
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="not a results table"):
        read_table(tmp_path / "a.csv")
    text = csv.read_text()
    (tmp_path / "a.csv").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match="is damaged"):
        read_table(tmp_path / "a.csv")


def test_every_query_is_kept(small):
    comparison, paths = small
    with np.load(next(path for path in paths if path.name == "queries.npz")) as arrays:
        assert arrays["recalled"].shape == (len(comparison.rows), 24)
        assert arrays["recalled"].mean(1) == pytest.approx([row["recall"] for row in comparison.rows])
        assert (arrays["target"] == comparison.task.targets.numpy()).all()


def test_the_same_seed_asks_the_same(small):
    comparison, _ = small
    again = build_task(comparison.spec)
    assert torch.equal(again.targets, comparison.task.targets)
    assert all(torch.equal(a.raw, b.raw) for a, b in zip(again.sets, comparison.task.sets, strict=True))
    fewer = build_task(replace(comparison.spec, mask=()))  # the others stay as they were
    assert torch.equal(fewer.sets[0].raw, comparison.task.sets[1].raw)
    other = build_task(replace(comparison.spec, seed=1))
    assert not torch.equal(other.targets, comparison.task.targets)


def test_unconverged_queries_are_counted():
    rows = compare(replace(SMALL, beta=(8.0,), max_steps=3, mask=(), noise=(0.3,), solver="picard")).rows
    for row in rows:
        missed = row["max_steps"] + row["diverged"] + row["nonfinite"]
        assert missed == round((1 - row["converged"]) * row["queries"])
        assert missed > 0


def test_total_forgetting_is_not_a_recall(tmp_path):
    # Opposite to every pattern: all scores are negative, and ReLU keeps none.
    patterns = torch.tensor([[1.0, 0.1], [1.0, -0.1]])
    for name, data in (("p", patterns), ("q", -patterns), ("t", np.arange(2))):
        np.save(tmp_path / f"{name}.npy", np.asarray(data))
    names = {"patterns": "p", "queries": "q", "targets": "t"}
    spec = CompareSpec(
        forgetting=("relu",),
        beta=(2.0,),
        normalize="none",
        **{k: str(tmp_path / f"{v}.npy") for k, v in names.items()},
    )
    for row in compare(spec).rows:
        assert row["forgotten"] == 1
        assert row["nearest"] == row["recall"] == 0


def test_the_number_of_threads_is_the_stated_one_and_is_put_back(monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(
        "hopdeq_lwpf.sweeps.compare.run_cell", lambda *_: seen.append(torch.get_num_threads()) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        compare(replace(SMALL, threads=before + 1))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


# --- own data


def _own(tmp_path, *, targets):
    digits = load_digits()[0]
    np.save(tmp_path / "patterns.npy", digits[:50].numpy())
    np.savetxt(tmp_path / "queries.csv", (digits[:7] + 0.05).numpy(), delimiter=",")
    np.save(tmp_path / "targets.npy", np.arange(7))
    return replace(
        SMALL,
        stored=None,
        patterns=str(tmp_path / "patterns.npy"),
        queries=str(tmp_path / "queries.csv"),
        targets=str(tmp_path / "targets.npy") if targets else None,
        shape=(8, 8),
        out=str(tmp_path / "out"),
    )


@pytest.mark.parametrize("targets", [True, False])
def test_own_queries_are_used_as_they_are(tmp_path, targets):
    spec = _own(tmp_path, targets=targets)
    comparison, paths = run(spec)
    names = {path.name for path in paths}
    assert {"results.csv", "report.html", "steps.png"} <= names
    assert ("recall.svg" in names) == targets
    assert ("agreement.svg" in names) != targets
    stored = Preprocessing.fit(load_digits()[0][:50], "center-unit")
    assert torch.allclose(comparison.task.sets[0].queries, stored(load_digits()[0][:7] + 0.05), atol=1e-6)
    sharp = [row for row in comparison.rows if row["beta"] == 40]
    for row in sharp:
        assert row["corruption"] == "given"
        assert np.isnan(row["level"])
        assert row["recall"] == 1 if targets else np.isnan(row["recall"])
        assert row["agreement"] == 1
        assert row["gap"] < 0.1


def test_own_patterns_are_corrupted(tmp_path):
    spec = replace(_own(tmp_path, targets=False), queries=None, mask=(), noise=(0.05,), samples=100)
    comparison = compare(spec)
    assert comparison.task.size == 50  # as many as there are
    assert all(row["recall"] == 1 for row in comparison.rows if row["beta"] == 40)


def test_files_that_do_not_fit(tmp_path):
    spec = _own(tmp_path, targets=True)
    np.save(tmp_path / "targets.npy", np.arange(6))
    with pytest.raises(DataError, match="for each of the 7 queries"):
        run(spec)
    np.savetxt(tmp_path / "queries.csv", np.ones((3, 63)), delimiter=",")
    with pytest.raises(DataError, match="rows of 63 numbers, but the patterns have 64"):
        run(spec)
    np.save(tmp_path / "patterns.npy", np.ones((3, 64)))
    with pytest.raises(SpecError, match="all patterns are equal"):
        run(replace(spec, queries=None, targets=None))
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
