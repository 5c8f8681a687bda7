"""Pictures of Sparse Distributed Memory: files, layout, and that they show the numbers they were given."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.image import imread

from hopdeq_lwpf import plots

N = 20
DISTANCE = np.arange(N + 1)


def shares(radius):
    """Something like ln of an intersection: falls, and ends at twice the radius."""
    return np.where(2 * radius >= DISTANCE, -30.0 + radius - DISTANCE, -np.inf)


def rows(algorithms=("Binary_SDM", "Cont_SDM_BFit_Attention"), radii=(5, 11), data_sets=(0.0, 0.05, -0.02)):
    return [
        {
            "algorithm": name,
            "radius": radius,
            "flips": flips,
            "cosine": 0.9 - flips / 100 - 0.1 * place + change,
        }
        for place, name in enumerate(algorithms)
        for radius in radii
        for flips in (0, 4, 8)
        for change in data_sets
    ]


def lognormal(middle, seed=0):
    return middle * np.exp(0.3 * np.random.default_rng(seed).standard_normal(400))


NAMES = ("Binary_SDM", "Binary_SDM_NeuronLimit", "Binary_SDM_BFit_Attention", "Cont_SDM", "Cont_SDM_NeuronLimit",
         "Cont_Binary_SDM", "Cont_SDM_BFit_Attention", "Cont_SDM_CFit_Attention", "Transformer_Attention")  # fmt: skip
FIGURES = {
    "intersections": lambda: plots.intersection_figure(
        {3: shares(3), 6: shares(6), 9: shares(9)},
        {3: (10.0, -37.0), 6: (10.0, -34.0)},
        {6: (np.where(DISTANCE, shares(6) - 1, np.inf), shares(6) + 1)},
    ),
    "one intersection": lambda: plots.intersection_figure({3: shares(3)}),
    "weights": lambda: plots.weights_figure(
        {f"$d$ = {d}": {"circles": np.exp(shares(d) + 30 - d), "line": np.exp(-DISTANCE / d)} for d in (3, 6)}
    ),
    "betas": lambda: plots.beta_radius_figure(
        DISTANCE[3:15],
        {"least squares": 100.0 / DISTANCE[3:15], "as published": 120.0 / DISTANCE[3:15]},
        10.0 ** (DISTANCE[3:15] - 15.0),
        {"memory": 5, "signal to noise": 11},
    ),
    "critical distances": lambda: plots.critical_distance_figure(
        {d: np.clip(1.5 * DISTANCE - d, 0, 10) for d in (3, 4, 5)}, {3: 6, 4: 8, 5: 0}
    ),
    "recall": lambda: plots.recall_noise_figure(rows()),
    "recall of all algorithms": lambda: plots.recall_noise_figure(rows(NAMES, (5, 9, 11, 27))),
    "effective betas": lambda: plots.effective_beta_figure(
        {"before": lognormal(1.0), "after": lognormal(9.0, 1)}, {"critical distance, 9.4": 9.4, "memory, 28.4": 28.4}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_files_and_the_same_each_time(tmp_path, name):
    first = plots.save_figure(FIGURES[name](), tmp_path, "first")
    again = plots.save_figure(FIGURES[name](), tmp_path, "again")
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert imread(first[0])[..., :3].std() > 0.02  # something is drawn


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_clipped_or_covered(name):
    figure = FIGURES[name]()
    FigureCanvasAgg(figure).draw()
    page, seen = figure.bbox, [axes for axes in figure.axes if axes.get_visible()]
    labels = [
        part for axes in seen for part in (axes.xaxis.label, axes.yaxis.label, axes.title) if part.get_text()
    ]
    inside = [part for axes in seen for part in axes.texts]
    legends = [legend.get_window_extent() for legend in figure.legends]
    for box in [part.get_window_extent() for part in labels + inside] + legends:
        assert box.x0 >= page.x0 - 1
        assert box.y0 >= page.y0 - 1
        assert box.x1 <= page.x1 + 1
        assert box.y1 <= page.y1 + 1
    for legend in legends:
        assert not any(legend.overlaps(part.get_window_extent()) for part in labels)
        assert not any(legend.overlaps(axes.bbox) for axes in seen)


def lines(axes):
    return [(np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)) for line in axes.lines]


def drawn(axes, x, y):
    """Whether some line goes through these points and no others."""
    return any(len(a) == len(x) and np.allclose(a, x) and np.allclose(b, y) for a, b in lines(axes))


def test_intersections_stand_in_powers_of_ten_and_fits_at_their_line():
    axes = FIGURES["intersections"]().axes[0]
    for radius in (3, 6, 9):
        reach = DISTANCE[: min(2 * radius, N) + 1]
        assert drawn(axes, reach, shares(radius)[: len(reach)] / np.log(10))
    within, beyond = (np.linspace(*ends, 50) for ends in ((0, 3), (3, 6)))
    for part in (within, beyond):
        assert drawn(axes, part, (10 * (1 - 2 * part / N) - 37) / np.log(10))
    low, high = axes.get_ylim()
    assert low < shares(3)[6] / np.log(10)
    assert high > shares(9)[0] / np.log(10)
    # A bound that is not finite has no band.
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 0].min() == 1
    assert band[:, 1].max() == pytest.approx((shares(6)[1] + 1) / np.log(10))


def test_weights_stand_on_both_axes():
    figure = FIGURES["weights"]()
    for row in range(2):
        for column, d in enumerate((3, 6)):
            axes = figure.axes[2 * row + column]
            assert drawn(axes, DISTANCE, np.exp(-DISTANCE / d))
            x, y = next((x, y) for x, y in lines(axes) if np.isnan(y).any())
            assert np.allclose(y[: 2 * d + 1], np.exp(-DISTANCE[: 2 * d + 1]))
            assert np.isnan(y[2 * d + 1 :]).all()
    assert [axes.get_yscale() for axes in figure.axes] == ["linear"] * 2 + ["log"] * 2


def test_betas_and_their_shares_stand_over_the_radius():
    axes = FIGURES["betas"]().axes[0]
    assert drawn(axes, DISTANCE[3:15], 100.0 / DISTANCE[3:15])
    assert drawn(axes, [5, 5], [0, 1])  # a mark, in parts of the height
    (above,) = axes.child_axes
    texts = dict(zip(above.get_xticks(), [tick.get_text() for tick in above.get_xticklabels()], strict=True))
    assert texts[4] == "$1\\cdot 10^{-11}$"
    assert texts[14] == "0.1"


def test_critical_distances_are_marked_where_there_is_one():
    axes = FIGURES["critical distances"]().axes[0]
    for d in (3, 4, 5):
        assert drawn(axes, DISTANCE, np.clip(1.5 * DISTANCE - d, 0, 10))
    marks = sorted((float(x[0]), float(y[0])) for x, y in lines(axes) if len(x) == 1)
    assert marks == [(6, 6.0), (8, 8.0)]
    assert any(np.allclose(x, y) for x, y in lines(axes))  # no change


def test_recall_is_the_mean_with_the_range_of_the_data_sets():
    axes = FIGURES["recall"]().axes[0]
    expected = 0.9 - np.array([0, 4, 8]) / 100 + 0.01
    assert any(len(y) == 3 and np.allclose(y, expected) for _, y in lines(axes))
    ends = axes.collections[0].get_segments()
    assert np.allclose([segment[:, 1] for segment in ends], np.stack([expected - 0.03, expected + 0.04], 1))
    assert axes.get_title() == "$d$ = 5"


def test_the_histogram_counts_every_beta_also_beyond_its_ends():
    values = np.concatenate([lognormal(5.0), [1e-7, 1e7]])
    axes = plots.effective_beta_figure({"all": values}, bins=7).axes[0]
    outline = axes.patches[0].get_xy()
    heights = outline[1:-1:2, 1]
    assert heights.sum() == pytest.approx(100)
    assert outline[:, 0].min() > 1
    assert outline[:, 0].max() < 20


def test_what_is_no_beta_is_left_out():
    axes = plots.effective_beta_figure({"all": [np.nan, -1.0, 0.0, np.inf, 5.0]}, {"here": 5.0}).axes[0]
    assert axes.patches[0].get_xy()[:, 1].max() == pytest.approx(100)
    assert drawn(axes, [5, 5], [0, 1])


def test_colours_are_those_that_the_colour_blind_tell_apart():
    palette = {
        "#0072b2",
        "#d55e00",
        "#009e73",
        "#cc79a7",
        "#e69f00",
        "#56b4e9",
        "#000000",
        plots.REFERENCE_GREY,
    }
    for name in ("intersections", "weights", "betas", "critical distances", "recall"):
        for axes in FIGURES[name]().axes:
            assert {to_hex(line.get_color()) for line in axes.lines} <= palette, name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.intersection_figure({}), "at least one entry"),
        (lambda: plots.intersection_figure({3: shares(3)}, {4: (1.0, 0.0)}), r"fits has radii \[4\]"),
        (lambda: plots.intersection_figure({3: [shares(3)]}), r"log_shares\[3\] must have shape \(K,\)"),
        (
            lambda: plots.intersection_figure({3: shares(3)}, bounds={3: (DISTANCE, [1.0])}),
            r"must have shape \(21,\)",
        ),
        (lambda: plots.weights_figure({"a": {}}), "at least one entry"),
        (
            lambda: plots.beta_radius_figure([1, 2], {"a": [1.0]}, [0.1, 0.2]),
            r"betas\['a'\] must have shape \(2,\)",
        ),
        (lambda: plots.critical_distance_figure({}, {}), "at least one entry"),
        (lambda: plots.recall_noise_figure([]), "at least one row"),
        (lambda: plots.recall_noise_figure(rows(), y="cosin"), "rows need a column 'cosin'"),
        (lambda: plots.effective_beta_figure({"a": [-1.0]}), "no finite number above 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
