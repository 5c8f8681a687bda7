"""Pictures of states on a curve: what is drawn, and what is refused."""

import numpy as np
import pytest

from hopdeq_lwpf import plots


def circle(count):
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([np.cos(angle), 2 * np.sin(angle), np.zeros(count), np.ones(count)], 1)


def test_points_and_edges_are_drawn_in_the_plane_of_the_curve():
    points = circle(12)
    edges = np.array([[0, 1, 2], [1, 2, 3]])
    figure = plots.curve_figure({"first": (points, edges), "second": (points[:5] * 0.5, None)}, circle(90))
    first, second = [axes for axes in figure.axes if axes.get_title()]
    drawn = first.collections[-1].get_offsets()
    # The plane keeps the curve's lengths: 12 points at distances between 1 and 2 of the centre.
    assert np.allclose(np.sort(np.linalg.norm(drawn, axis=1)), np.sort(np.linalg.norm(points[:, :2], axis=1)))
    assert len(first.collections[0].get_segments()) == 3
    assert len(second.collections) == 1
    assert first.get_xlim() == second.get_xlim()


def test_errors_are_means_over_seeds_with_their_range():
    figure = plots.error_figure({"panel": {"none": {2.0: [1.0, 3.0], 4.0: [2.0, 2.0]}}}, label="error")
    (axes,) = figure.axes
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [2.0, 4.0]
    assert list(line.get_ydata()) == [2.0, 2.0]
    vertices = axes.collections[0].get_paths()[0].vertices
    assert vertices[:, 1].min() == 1.0
    assert vertices[:, 1].max() == 3.0
    assert figure.legends[0].get_texts()[0].get_text() == "none"


def test_nothing_to_draw_and_other_widths_are_errors():
    with pytest.raises(ValueError, match="panels is empty"):
        plots.curve_figure({}, circle(5))
    with pytest.raises(ValueError, match="as the curve is"):
        plots.curve_figure({"first": (np.zeros((3, 2)), None)}, circle(5))
    with pytest.raises(ValueError, match="errors is empty"):
        plots.error_figure({"panel": {}}, label="error")
