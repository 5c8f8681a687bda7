"""Pictures from tables and arrays."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from hopdeq_lwpf import plots


def rows(levels=(0.1, 0.2), kinds=("mask", "noise"), units=("none", "pfu"), betas=(8.0, 64.0)):
    """A results table as it is read from a file, with what the pictures need."""
    table = []
    for unit in units:
        for steps in (1, 3, "converged"):
            for beta in betas:
                for kind in kinds:
                    for level in levels:
                        share = 0.9 - level
                        table.append(
                            {
                                "forgetting": unit,
                                "steps": steps,
                                "beta": beta,
                                "corruption": kind,
                                "level": level,
                                "nearest_query": 0.95,
                                "recall": share,
                                "recall_low": share - 0.1,
                                "recall_high": share + 0.05,
                            }
                        )
    return table


def pictures():
    return [("stored", np.zeros((3, 8, 8))), ("converged", np.ones((3, 8, 8)))]


FIGURES = {
    "recall": lambda: plots.recall_figure(rows()),
    "recall of one level": lambda: plots.recall_figure(rows(levels=(0.3,), units=("none", "my unit"))),
    "beta": lambda: plots.beta_figure(rows(levels=(float("nan"),), kinds=("given",))),
    "steps": lambda: plots.steps_figure(
        {(unit, beta): np.arange(1, 90) for unit in ("none", "relu") for beta in (1.0, 2.0, 4.0, 8.0, 16.0)},
        89,
    ),
    "steps of one query": lambda: plots.steps_figure({("none", 1.0): np.array([1])}, 10),
    "energy": lambda: plots.energy_figure(
        {"none": np.linspace(1, 0, 20)[:, None] * [1, 2], "relu": np.full((3, 2), -1.0)}
    ),
    "pictures": lambda: plots.picture_grid(pictures(), ("mask 0.1", "mask 0.1", "flip 0.2")),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_files_and_the_same_each_time(tmp_path, name):
    first = plots.save_figure(FIGURES[name](), tmp_path, "first")
    again = plots.save_figure(FIGURES[name](), tmp_path, "again")
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    picture = imread(first[0])
    assert min(picture.shape[:2]) > 200
    assert picture[..., :3].std() > 0.02  # something is drawn
    root = ElementTree.parse(first[1]).getroot()
    assert root.tag.endswith("svg")
    assert "<dc:date>" not in first[1].read_text()


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_clipped_or_covered(name):
    figure = FIGURES[name]()
    FigureCanvasAgg(figure).draw()
    page = figure.bbox
    boxes = []
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
            if label.get_text():
                boxes.append(label.get_window_extent())
    legends = [legend.get_window_extent() for legend in figure.legends]
    for box in boxes + legends:
        assert box.x0 >= page.x0 - 1
        assert box.y0 >= page.y0 - 1
        assert box.x1 <= page.x1 + 1
        assert box.y1 <= page.y1 + 1
    for legend in legends:
        assert not any(legend.overlaps(box) for box in boxes)
        assert not any(legend.overlaps(axes.bbox) for axes in figure.axes if axes.get_visible())


def test_recall_is_drawn_where_the_table_says():
    figure = plots.recall_figure(rows())
    assert len(figure.axes) == 4  # two kinds at two betas
    drawn = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == 2]
    assert sum(np.allclose(line, [80, 70]) for line in drawn) == 6  # two units, three numbers of steps
    assert any(np.allclose(line, [95, 95]) for line in drawn)  # the nearest neighbour of the query
    ends = np.concatenate([np.array(c.get_segments())[:, :, 1] for c in figure.axes[0].collections])
    assert np.allclose(np.sort(np.unique(ends.round(6))), [60, 70, 75, 85])


def test_the_histogram_counts_every_query():
    values = np.array([1, 1, 1, 7, 200])
    figure = plots.steps_figure({("none", 1.0): values}, 200)
    outline = figure.axes[0].patches[0].get_xy()
    assert outline[:, 1].max() == pytest.approx(60)
    assert outline[:, 0].min() <= 1 <= 200 <= outline[:, 0].max()


def test_energies_end_where_an_iteration_stopped():
    course = np.array([[3.0, 3.0], [2.0, 1.0], [1.5, np.nan]])
    figure = plots.energy_figure({"none": course})
    lines = [(line.get_xdata(), line.get_ydata()) for line in figure.axes[0].lines]
    ends = [(float(x[0]), float(y[0])) for x, y in lines if len(x) == 1]
    assert ends == [(2, 1.5), (1, 1.0)]
