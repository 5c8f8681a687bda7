"""Axes of the pictures of sweeps and studies, and tables beside them."""

import sys
import types

import numpy as np
import pytest
from matplotlib.figure import Figure

from hopdeq_lwpf.data import DataError
from hopdeq_lwpf.sweeps.reports import study_plots, table, tables
from hopdeq_lwpf.sweeps.reports.statistics import Bootstrap, Interval
from hopdeq_lwpf.sweeps.reports.summary import percent


@pytest.fixture
def axes():
    return Figure().subplots()


def test_costs_that_are_alike_start_at_zero_and_others_are_logarithmic(axes):
    study_plots._seconds_axis(axes, [])
    assert axes.get_xlim() == (0.0, 1.0), "nothing to be seen changes nothing"
    study_plots._seconds_axis(axes, [1.0, 4.0])
    assert (axes.get_xscale(), axes.get_xlim()) == ("linear", (0.0, 1.08 * 4.0))
    study_plots._seconds_axis(axes, [0.5, 4.0, 40.0])
    assert axes.get_xscale() == "log"
    assert axes.get_xlim() == pytest.approx((0.5 / 1.3, 40 * 1.3))
    assert axes.xaxis.get_major_formatter()(20.0, 0) == "20"


def test_a_share_of_nothing_is_a_dash():
    assert percent(Interval(np.nan, np.nan, np.nan)) == "-"
    assert percent(Interval(0.594, 0.541, 0.642)) == "59.4 [54.1, 64.2]"


def test_a_mean_of_another_number_of_values_is_refused():
    with pytest.raises(ValueError, match=r"values must have shape \(5,\), got \(4,\)"):
        Bootstrap.draw(5, resamples=10).mean(np.zeros(4))


def test_a_table_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        table.read_table(tmp_path / "missing.csv")
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="is not a results table"):
        table.read_table(other)


def test_the_same_rows_as_parquet_where_pyarrow_is(tmp_path, monkeypatch):
    written = {}
    arrow, parquet = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    for kind in ("string", "int64", "float64"):
        setattr(arrow, kind, lambda kind=kind: kind)
    arrow.array = lambda values, kind: (kind, values)
    arrow.table = dict

    def write_table(found, path):
        written.update(found)
        path.write_text("parquet")

    parquet.write_table, arrow.parquet = write_table, parquet
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    monkeypatch.setattr(tables, "parquet_note", lambda: "")
    rows = [{"name": "a", "seed": 1, "score": 0.5}, {"name": "b", "seed": 2}]
    tables.write_rows(rows, {"name": str, "seed": int, "score": float}, tmp_path)
    assert (tmp_path / "results.csv").read_text().splitlines() == ["name,seed,score", "a,1,0.5", "b,2,"]
    assert (tmp_path / tables.PARQUET).read_text() == "parquet"
    assert written == {
        "name": ("string", ["a", "b"]), "seed": ("int64", [1, 2]), "score": ("float64", [0.5, None]),
    }  # fmt: skip


def test_without_pyarrow_the_note_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'hopdeq-lwpf[parquet]'" in tables.parquet_note()
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: object())
    assert not tables.parquet_note()
