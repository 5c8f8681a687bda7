"""Pictures of convergence: heat map of residuals, share not converged."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from hopdeq_lwpf import Termination, fixed_point, plots
from hopdeq_lwpf.diagnostics import iterations_to
from hopdeq_lwpf.models import HAM

TOLERANCE = 1e-4


def course(iterations=30, problems=50, seed=0):
    """Residuals that fall geometrically, each at its own rate."""
    rates = np.random.default_rng(seed).uniform(0.3, 0.8, problems)
    return rates ** np.arange(iterations)[:, None]


def stopped():
    """Three problems: one stops below the tolerance, one exactly, one is never below it."""
    nan = float("nan")
    return np.array([[1.0, 1.0, 1.0], [1e-2, 1e-3, 0.5], [1e-5, 0.0, 0.3], [nan, nan, 0.2], [nan, nan, 0.1]])


NAMES = ("one matrix, Picard", "one matrix, Anderson", "even-odd, Picard", "even-odd, L-BFGS", "a fifth")
INPUTS = {
    "one array": lambda: course(),
    "one name": lambda: {"HAM": course()},
    "two of different size": lambda: {"HAM": course(30, 50), "CHN": course(12, 7)},
    "five": lambda: {name: course(seed=number) for number, name in enumerate(NAMES)},
    "some stopped": lambda: {"stopped": stopped(), "never": np.full((4, 2), 0.5)},
    "one problem at one iteration": lambda: np.array([[0.5]]),
    "exact and infinite": lambda: np.array([[1.0, np.inf, np.nan], [0.0, np.inf, np.nan]]),
    "tensors": lambda: {"HAM": torch.tensor(course(), dtype=torch.float32)},
}
FIGURES = {
    f"{function.__name__} of {name}": lambda function=function, make=make: function(make())
    for function in (plots.residual_heatmap, plots.not_converged_figure)
    for name, make in INPUTS.items()
}
FIGURES["heat map with a title"] = lambda: plots.residual_heatmap(course(), title="HAM 784-1280-510-200-10")
FIGURES["lines with a title"] = lambda: plots.not_converged_figure(course(), title="HAM", tolerance=3e-3)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_files_the_same_each_time_and_nothing_is_clipped_or_covered(tmp_path, name):
    figure = FIGURES[name]()
    first = plots.save_figure(figure, tmp_path, "first")
    again = plots.save_figure(FIGURES[name](), tmp_path, "again")
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    picture = imread(first[0])
    assert min(picture.shape[:2]) > 400
    assert picture[..., :3].std() > 0.02  # something is drawn
    assert ElementTree.parse(first[1]).getroot().tag.endswith("svg")

    FigureCanvasAgg(figure).draw()
    page, panels = figure.bbox, [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes.title.get_window_extent() for axes in panels if axes.title.get_text()]
    labels = [label.get_window_extent() for axes in panels for label in (axes.xaxis.label, axes.yaxis.label)
              if label.get_text()]  # fmt: skip
    legends = [legend.get_window_extent() for legend in figure.legends]
    for box in [*titles, *labels, *legends]:
        assert box.x0 >= page.x0 - 1
        assert box.y0 >= page.y0 - 1
        assert box.x1 <= page.x1 + 1
        assert box.y1 <= page.y1 + 1
    for number, title in enumerate(titles):
        assert not any(title.overlaps(other) for other in titles[number + 1 :])
        assert not any(title.overlaps(axes.bbox) for axes in panels)
    for legend in legends:
        assert not any(legend.overlaps(box) for box in [*labels, *(axes.bbox for axes in panels)])


def mesh(axes):
    """The share of problems in each bin after each iteration, 0 where nothing is drawn: (bins, T)."""
    return axes.collections[0].get_array().filled(0.0)


def slow_shares(residuals, edges):
    """What `mesh` must be, problem by problem."""
    shares = np.zeros((len(edges) - 1, len(residuals)))
    for t, row in enumerate(residuals):
        for value in row:
            if value != value:
                continue
            log = -np.inf if value == 0 else np.log10(value)
            inside = [i for i in range(len(edges) - 1) if edges[i] <= log < edges[i + 1]]
            at = inside[0] if inside else 0 if log < edges[0] else len(edges) - 2
            shares[at, t] += 100 / len(row)
    return shares


@pytest.mark.parametrize("name", ["one array", "some stopped", "exact and infinite", "two of different size"])
def test_colours_are_the_shares_of_all_problems_that_have_a_residual(name):
    given = INPUTS[name]()
    named = given if isinstance(given, dict) else {"": given}
    figure = plots.residual_heatmap(given)
    for axes, residuals in zip(figure.axes, named.values(), strict=False):
        # The corners of the cells: iterations around whole numbers, and even bins.
        corners = axes.collections[0].get_coordinates()
        np.testing.assert_allclose(corners[0, :, 0], np.arange(len(residuals) + 1) - 0.5)
        edges = corners[:, 0, 1]
        np.testing.assert_allclose(mesh(axes), slow_shares(residuals, edges))
        assert edges[0] <= np.log10(TOLERANCE) < edges[-1]


def test_columns_add_up_to_the_problems_that_are_still_running():
    axes = plots.residual_heatmap(stopped()).axes[0]
    np.testing.assert_allclose(mesh(axes).sum(0), [100, 100, 100, 100 / 3, 100 / 3])


def marker(axes):
    (point,) = [line for line in axes.lines if line.get_marker() == "D"]
    return point.get_xdata()[0], 10 ** point.get_ydata()[0]


def test_the_marker_stands_at_the_mean_count_of_those_that_get_there():
    axes = plots.residual_heatmap(stopped()).axes[0]
    assert marker(axes) == pytest.approx((2.0, TOLERANCE))
    assert axes.get_title() == "2.0 (33 % never)"
    axes = plots.residual_heatmap(stopped(), tolerance=5e-3).axes[0]
    assert marker(axes) == pytest.approx((1.5, 5e-3))


def test_the_marker_agrees_with_iterations_to():
    residuals = course()
    counts = iterations_to(torch.tensor(residuals), TOLERANCE)
    there = counts[~counts.isnan()]
    axes = plots.residual_heatmap(residuals).axes[0]
    assert 0 < len(there) < len(counts)
    assert marker(axes)[0] == pytest.approx(float(there.mean()))
    left = plots.not_converged_figure(residuals).axes[0].lines[0].get_ydata()
    for t in range(len(residuals)):
        share = float(((counts > t) | counts.isnan()).double().mean())
        assert left[t] == pytest.approx(100 * share)


def test_no_marker_where_no_problem_gets_there():
    axes = plots.residual_heatmap(np.full((4, 2), 0.5)).axes[0]
    assert axes.get_title() == "never below"
    assert not [line for line in axes.lines if line.get_marker() == "D"]


def test_panels_share_axes_and_one_colour_bar():
    figure = plots.residual_heatmap(INPUTS["five"]())
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 6  # five panels and the bar
    assert [axes.get_title().splitlines()[0] for axes in shown[:5]] == [
        "one matrix, Picard", "one matrix,", "even-odd, Picard", "even-odd, L-BFGS", "a fifth",
    ]  # fmt: skip
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in shown[:5]}) == 1
    norms = {(axes.collections[0].norm.vmin, axes.collections[0].norm.vmax) for axes in shown[:5]}
    assert norms == {(2.0, 100)}  # one of fifty problems to all


def test_the_scale_of_the_shares_tells_the_last_problems_apart():
    assert plots.not_converged_figure(course(60, problems=500)).axes[0].get_yscale() == "log"
    assert plots.not_converged_figure(course(problems=4)).axes[0].get_yscale() == "linear"


def test_a_share_that_reaches_zero_leaves_at_the_lower_edge():
    residuals = np.where(np.arange(6)[:, None] > np.minimum(np.arange(100), 3), 1e-6, 1.0)
    axes = plots.not_converged_figure(residuals).axes[0]
    left = axes.lines[0].get_ydata()
    np.testing.assert_allclose(left[:4], [100, 99, 98, 97])
    assert axes.get_yscale() == "linear"
    slow = np.where(np.arange(6)[:, None] > np.arange(100) % 100 / 24, 1e-6, 1.0)
    axes = plots.not_converged_figure(slow).axes[0]
    assert axes.get_yscale() == "log"
    assert 0 < axes.lines[0].get_ydata()[-1] < axes.get_ylim()[0]


def test_lines_differ_in_colour_and_dash():
    axes = plots.not_converged_figure({str(number): course(seed=number) for number in range(7)}).axes[0]
    assert len({line.get_color() for line in axes.lines}) == 7
    assert len({(line.get_color(), str(line.get_linestyle())) for line in axes.lines}) == 7


def test_the_trace_of_a_solve_is_drawn_as_it_comes():
    torch.manual_seed(0)
    layer = HAM([6, 8, 5, 3])
    x = torch.rand(9, 6)
    stop = Termination(rtol=1e-6)
    with torch.no_grad():
        courses = {
            name: fixed_point(form.f, *form.problem(x), solver="picard", stop=stop, trace=True).trace.residual
            for name, form in (("one matrix", layer), ("even-odd", layer.to_even_odd()))
        }
    figure = plots.residual_heatmap(courses)
    assert marker(figure.axes[0])[0] > marker(figure.axes[1])[0] > 0  # the even-odd form needs fewer


BAD = {
    "no mapping entry": ({}, ValueError, "residuals is an empty mapping"),
    "one problem's course": (np.ones(4), ValueError, r"residuals must have shape \(T, B\).*got \(4,\)"),
    "no problem": (np.ones((4, 0)), ValueError, r"residuals must have shape"),
    "named": ({"HAM": np.ones((2, 2, 2))}, ValueError, r"residuals\['HAM'\] must have shape"),
    "logarithms": (np.full((3, 2), -4.0), ValueError, "negative entries.*not their logarithm"),
    "nothing finite": (np.full((3, 2), np.nan), ValueError, "no finite entry"),
    "words": ("residual", TypeError, "must be an array of numbers or a tensor on the CPU, got a str"),
    "differentiable": (torch.ones(2, 2, requires_grad=True), TypeError, "got a Tensor"),
}


@pytest.mark.parametrize("function", [plots.residual_heatmap, plots.not_converged_figure])
@pytest.mark.parametrize("name", BAD)
def test_bad_residuals_are_named(function, name):
    residuals, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        function(residuals)


@pytest.mark.parametrize("function", [plots.residual_heatmap, plots.not_converged_figure])
@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_tolerances_are_named(function, tolerance):
    with pytest.raises(ValueError, match="tolerance must be a finite number > 0"):
        function(np.ones((2, 2)), tolerance=tolerance)
