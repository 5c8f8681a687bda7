"""HAM and CHN: default solvers and adjoints, names, and what is said of bad input."""

import pytest
import torch
from hierarchical_networks import inputs, network
from torch.testing import assert_close

from hopdeq_lwpf import Equilibrium, Termination, fixed_point, models
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models.even_odd import ThroughEvenOdd
from hopdeq_lwpf.models.ham import CHN, HAM
from hopdeq_lwpf.settings import names
from hopdeq_lwpf.solvers import LBFGS, Implicit, Picard

KINDS = [HAM, CHN]
LAYERS = (5, 6, 4, 3)


def test_the_default_adjoint_is_gmres_unless_the_state_is_linear():
    report = network(HAM)(inputs(), return_solution=True)
    report.value.sum().backward()
    assert report.adjoint.method == "gmres"
    linear = network(HAM, (5, 6, 3), lagrangian={1: "softmax", 2: "identity"}, even_odd=True)
    report = linear(inputs(), return_solution=True)
    report.value.sum().backward()
    assert report.adjoint.method == "cg"
    assert isinstance(network(HAM, adjoint=Implicit("cg")).adjoint, Implicit)


def test_it_is_an_equilibrium_layer_by_name_and_by_class():
    assert issubclass(HAM, Equilibrium)
    for name, kind in (("ham", HAM), ("chn", CHN)):
        built = models.build({"model": name, "layers": [5, 6, 3], "forgetting": {"unit": "topk", "k": 2}})
        assert type(built) is kind
        assert built.f.neurons[1].forgetting.k == 2
    assert "layers=[5, 6, 4, 3], even_odd=False, skips=[(0, 3)]" in repr(HAM(LAYERS, skips=[(3, 0)]))


@pytest.mark.parametrize("name", [name for name in names("models") if name.startswith("ham")])
def test_named_settings_build_and_run_one_step(name):
    built = models.build(name)
    for steps in (1, None):
        built.steps = steps
        assert built(torch.rand(2, built.f.graph.widths[0])).shape == (2, built.f.graph.widths[-1])


def test_forgetting_acts_where_it_was_asked_for():
    everywhere = HAM(LAYERS, forgetting="relu").f.neurons
    assert [layer.forgets for layer in everywhere] == [False, True, True, False]
    one = HAM(LAYERS, forgetting={3: "relu"}).f.neurons
    assert [layer.forgets for layer in one] == [False, False, False, True]
    strong = network(HAM, forgetting=PFU(5.0))
    context = strong.f.prepare(inputs())
    hidden = strong.f._activated(strong.f._split(strong(inputs(), return_solution=True).state), context)
    assert not hidden[1].any(), "no state of this network reaches 5, so that everything is forgotten"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HAM((3, 2)), ValueError, "layers must be a list of at least three widths"),
        (lambda: HAM(7), ValueError, r"layers must be .*got 7"),
        (lambda: HAM((3, 0, 2)), ValueError, r"layers\[1\] must be an integer >= 1, got 0"),
        (lambda: HAM((3, 2.5, 2)), ValueError, r"layers\[1\] must be an integer"),
        (lambda: HAM(LAYERS, lagrangian="tanhh"), ValueError, "Did you mean 'tanh'"),
        (lambda: HAM(LAYERS, lagrangian=["tanh"] * 3), ValueError, "3 entries for 4 layers"),
        (lambda: HAM(LAYERS, lagrangian={4: "tanh"}), ValueError, "lagrangian names the layer 4; .* 0 to 3"),
        (lambda: HAM(LAYERS, forgetting="relo"), ValueError, "forgetting 'relo' .*Did you mean 'relu'"),
        (lambda: HAM(LAYERS, forgetting={0: "relu"}), ValueError, "forgetting names the layer 0; .* 1 to 3"),
        (
            lambda: HAM(LAYERS, skips=[(0, 4)]),
            ValueError,
            r"pairs of layer numbers from 0 to 3, got \(0, 4\)",
        ),
        (lambda: HAM(LAYERS, skips=[3]), ValueError, "skips must hold pairs"),
        (lambda: HAM(LAYERS, skips=[(1, 2)]), ValueError, r"names the layers \(1, 2\), which are connected"),
        (lambda: HAM(LAYERS, skips=[(2, 2)]), ValueError, "neurons of one layer are not connected"),
        (lambda: HAM(LAYERS, skips=[(3, 1)], even_odd=True), ValueError, r"skips has \(1, 3\), both odd"),
        (lambda: HAM(LAYERS, skips=[(0, 2)], even_odd=True), ValueError, r"\(0, 2\), both even"),
        (lambda: HAM(LAYERS, skips=[(3, 1)]).to_even_odd(), ValueError, "use even_odd=False"),
        (lambda: HAM(LAYERS, even_odd=1), TypeError, "even_odd must be True or False, got 1"),
        (lambda: HAM(LAYERS, damping=1.0), ValueError, "damping must be below 1"),
        (lambda: CHN(LAYERS, local_steps=0), ValueError, "local_steps must be an integer >= 1, got 0"),
        (lambda: HAM(LAYERS, solver="picrad"), ValueError, "Did you mean 'picard'"),
        (lambda: HAM(LAYERS, adjoint="implict"), ValueError, "Did you mean 'implicit'"),
        (lambda: HAM(LAYERS)(torch.zeros(2, 4)), ValueError, r"\(\*batch, 5\), .*got \(2, 4\)"),
        (lambda: HAM(LAYERS)(torch.zeros(())), ValueError, r"x must have shape"),
        (
            lambda: HAM(LAYERS)(torch.zeros(2, 5, dtype=torch.int64)),
            TypeError,
            "x must have a floating-point",
        ),
        (lambda: HAM(LAYERS)(inputs()), TypeError, "x has dtype torch.float64 but the network has"),
        (lambda: HAM(LAYERS)(torch.zeros(2, 5), torch.zeros(2, 4)), ValueError, "must have width 13"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_solver_ends_where_plain_steps_end(kind):
    x = inputs(64, 20, seed=4)
    layer = network(kind, (20, 30, 15, 8), even_odd=True)
    assert isinstance(layer.solver, LBFGS)
    expected = ThroughEvenOdd(layer.solver) if kind is HAM else layer.solver
    assert layer.to_one_matrix().solver == expected
    assert network(kind, forgetting="relu", even_odd=True).solver == "auto"
    plain = network(kind, (20, 30, 15, 8), even_odd=True, solver="picard")(x, return_solution=True)
    found = layer(x, return_solution=True)
    assert found.steps.double().mean() < 0.7 * plain.steps.double().mean()
    elsewhere = (found.value - plain.value).norm(dim=-1) > 1e-8
    assert elsewhere.sum() <= 1, (
        "only a start that plain steps lead past a saddle, of which there is one here"
    )


def test_the_default_solver_keeps_the_basins_of_layers_that_forget():
    x = inputs(64, 20, seed=4)
    options = {"lagrangian": {1: "softmax"}, "forgetting": {1: "relu"}, "even_odd": True}
    layer = network(HAM, (20, 30, 8), scale=3.0, **options)
    assert isinstance(layer.solver, LBFGS)
    plain = network(HAM, (20, 30, 8), scale=3.0, solver="picard", **options)
    assert_close(layer(x), plain(x), rtol=0, atol=1e-8)


def test_one_failing_problem_is_reported():
    layer = network(HAM, stop=Termination(max_steps=2))
    with pytest.warns(UserWarning, match="3 of 3 problems did not converge"):
        layer(inputs())
    raw = fixed_point(layer.f, layer.f.prepare(inputs()), layer.f.prepare(inputs()).start, solver=Picard())
    assert raw.converged.all()
