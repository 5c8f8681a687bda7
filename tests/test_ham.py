"""Hierarchical and continuous Hopfield networks against their equations and the theorems of their paper."""

import math

import pytest
import torch
from hierarchical_networks import F64, GRAPHS, SAME_PARITY, TIGHT, function, problem
from test_lagrangians import CASES, EVERY
from torch.testing import assert_close

from hopdeq_lwpf import fixed_point
from hopdeq_lwpf.forgetting import PFU, ReLU, TopK
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.models.hierarchical import CHNFunction, HAMFunction
from hopdeq_lwpf.models.lagrangians import Lagrangian, Softmax, Tanh
from hopdeq_lwpf.models.layer_graph import LayerGraph, make_neurons
from hopdeq_lwpf.solvers import Picard


class Twin:
    """A network as one symmetric matrix and one neuron after the other, with numbers in plain lists."""

    def __init__(self, f, x, name="sigmoid"):
        self.act, self.f = CASES[name][1], f
        widths = f.graph.widths
        self.layer = [i for i in range(len(widths)) for _ in range(widths[i])]
        first = [sum(widths[:i]) for i in range(len(widths))]
        n = len(self.layer)
        self.w = [[0.0] * n for _ in range(n)]
        for i, j in f.graph.pairs:
            block = f.weights[f"{i}_{j}"].tolist()
            for a in range(widths[j]):
                for b in range(widths[i]):
                    self.w[first[j] + a][first[i] + b] = self.w[first[i] + b][first[j] + a] = block[a][b]
        self.b = [0.0] * widths[0] + [v for i in f.graph.free for v in f.biases[str(i)].tolist()]
        self.x = x

    def rho(self, states):
        """Of all neurons, the clamped input first; s of the free ones. And the sum of L over them."""
        total, rho = 0.0, list(self.act(self.x)[1])
        for s in states:
            value, activation = self.act(s)
            total, rho = total + value, rho + activation
        return rho, total

    def received(self, rho):
        return [
            self.b[a] + math.fsum(self.w[a][c] * rho[c] for c in range(len(rho)))
            for a in range(len(self.b))
            if self.layer[a]
        ]

    def slope(self, s):
        """rho'(s) of one sigmoid neuron."""
        rho = 1 / (1 + math.exp(-(4 * s - 2)))
        return 4 * rho * (1 - rho)

    def energy(self, states, ham):
        rho, lagrangian = self.rho(states)
        flat, mine = [s for layer in states for s in layer], rho[len(self.x) :]
        start = len(self.x)
        inner = math.fsum(
            mine[a] * self.w[start + a][start + c] * mine[c]
            for a in range(len(mine))
            for c in range(len(mine))
        )
        drive = math.fsum(
            r * (self.b[start + a] + math.fsum(self.w[start + a][c] * rho[c] for c in range(start)))
            for a, r in enumerate(mine)
        )
        own = math.fsum(s * r for s, r in zip(flat, mine, strict=True)) - lagrangian
        if not ham:
            own = 0.5 * math.fsum(s * s for s in flat)
        return own - 0.5 * inner - drive


def rows(f, z):
    """The state of one problem as a list of layers."""
    return [part.tolist() for part in z.split([f.graph.widths[i] for i in f.graph.free])]


def layered(f, flat):
    return rows(f, torch.tensor(flat, dtype=F64))


@pytest.mark.parametrize("graph", [*GRAPHS.values(), SAME_PARITY], ids=str)
def test_one_matrix_steps_and_energies_are_equations_6_5_3_and_1(graph):
    given = torch.randn(2, 4, dtype=F64)
    for kind in (HAMFunction, CHNFunction):
        f = function(kind, graph, damping=0.0)
        x = f.prepare(given)
        z = torch.randn(x.start.shape, dtype=F64)
        image, energy = f(z, x), f.energy(z, x)
        for row in range(2):
            twin = Twin(f, given[row].tolist())
            states = rows(f, z[row])
            expected = twin.received(twin.rho(states)[0])
            if kind is CHNFunction:
                expected = [twin.slope(s) * h for s, h in zip(z[row].tolist(), expected, strict=True)]
            assert_close(image[row], torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-12)
            assert_close(energy[row].item(), twin.energy(states, kind is HAMFunction), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_ham_equations_hold_for_every_lagrangian(name):
    given = torch.randn(2, 4, dtype=F64)
    f = function(HAMFunction, GRAPHS["4 layers"], lagrangian=CASES[name][0])
    x = f.prepare(given)
    z = torch.randn(x.start.shape, dtype=F64)
    for row in range(2):
        twin = Twin(f, given[row].tolist(), name)
        states = rows(f, z[row])
        expected = torch.tensor(twin.received(twin.rho(states)[0]), dtype=F64)
        assert_close(f(z, x)[row], expected, rtol=1e-12, atol=1e-12)
        assert_close(f.energy(z, x)[row].item(), twin.energy(states, True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=str)
def test_even_odd_steps_are_equation_10_and_read_the_last_layer_out(graph):
    given = torch.randn(2, 4, dtype=F64)
    f = function(HAMFunction, graph, even_odd=True)
    x = f.prepare(given)
    z = torch.randn(x.start.shape, dtype=F64)
    for row in range(2):
        twin = Twin(f, given[row].tolist())
        even = iter(z[row].split([f.graph.widths[i] for i in f.graph.even]))
        states = [
            next(even).tolist() if i in f.graph.even else [0.0] * f.graph.widths[i] for i in f.graph.free
        ]
        first = layered(f, twin.received(twin.rho(states)[0]))
        middle = [first[i - 1] if i in f.graph.odd else states[i - 1] for i in f.graph.free]
        second = layered(f, twin.received(twin.rho(middle)[0]))
        expected = [s for i in f.graph.even for s in second[i - 1]]
        assert_close(f(z, x)[row], torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-12)
        last = f.graph.last
        image, output = f.step(z, x)
        assert_close(image, f(z, x))
        expected = (second if last in f.graph.even else middle)[last - 1]
        assert_close(output[row], torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-12)
        # Eq. 3 with the odd layers where dE/ds_odd = 0.
        energy = twin.energy(middle, True)
        assert_close(f.energy(z, x)[row].item(), energy, rtol=1e-12, atol=1e-12)
        assert [s[row].tolist() for s in f.states(z, x)] == [pytest.approx(layer) for layer in middle]


@pytest.mark.parametrize("local", [1, 3])
def test_even_odd_steps_of_a_chn_are_equation_7_odd_layers_first(local):
    given, damping = torch.randn(2, 4, dtype=F64), 0.25
    f = function(CHNFunction, GRAPHS["5 layers, skips"], even_odd=True, damping=damping, local_steps=local)
    x = f.prepare(given)
    z = torch.randn(x.start.shape, dtype=F64)
    for row in range(2):
        twin, states = Twin(f, given[row].tolist()), rows(f, z[row])
        for here in (f.graph.odd, f.graph.even):
            received = layered(f, twin.received(twin.rho(states)[0]))
            for i in here:
                for _ in range(local):
                    states[i - 1] = [
                        damping * s + (1 - damping) * twin.slope(s) * h
                        for s, h in zip(states[i - 1], received[i - 1], strict=True)
                    ]
        expected = torch.tensor([s for layer in states for s in layer], dtype=F64)
        assert_close(f(z, x)[row], expected, rtol=1e-12, atol=1e-12)
        assert_close(f.step(z, x)[1], f(z, x)[:, -2:])


def test_damping_is_a_euler_step():
    for kind in (HAMFunction, CHNFunction):
        f = function(kind, GRAPHS["4 layers"], damping=0.0)
        x, z = problem(f)
        slow = function(kind, GRAPHS["4 layers"], damping=0.75)
        assert_close(slow(z, x), z + 0.25 * (f(z, x) - z), rtol=1e-12, atol=1e-12)


# --- theorems of the paper


def solved(f, x, z0=None):
    return fixed_point(f, x, f.init(x) if z0 is None else z0, solver=Picard(), stop=TIGHT).require()


@pytest.mark.parametrize(
    ("kind", "unit"), [(HAMFunction, None), (HAMFunction, "relu"), (HAMFunction, "pfu"), (CHNFunction, None)]
)
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=str)
def test_both_forms_have_the_same_equilibrium(kind, graph, unit):
    f = function(kind, graph, forgetting=unit, damping=0.6, scale=0.8)
    x = f.prepare(torch.randn(4, 4, dtype=F64))
    z = solved(f, x)
    other = f.in_form(True)
    y = other.prepare(torch.zeros(4, 4, dtype=F64))
    y = y._replace(drives=x.drives, thresholds=x.thresholds)
    w = solved(other, y)
    for a, b in zip(f.states(z.state, x), other.states(w.state, y), strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_synchronous_updates_hold_the_even_odd_process():
    # Appendix E: from s_even = W_P^T rho(s_odd) + b_even every second iterate is one of the even-odd process.
    f = function(HAMFunction, GRAPHS["5 layers, skips"])
    given = torch.randn(3, 4, dtype=F64)
    x = f.prepare(given)
    other = f.in_form(True)
    y = other.prepare(given)
    odd = {i: torch.randn(3, f.graph.widths[i], dtype=F64) for i in f.graph.odd}
    even = f._fields(f.graph.even, f._activated(odd, x), x)
    z = torch.cat([({**odd, **even})[i] for i in f.graph.free], -1)
    s = torch.cat([even[i] for i in f.graph.even], -1)
    for _ in range(5):
        z, s = f(f(z, x), x), other(s, y)
        split = f._split(z)
        assert_close(torch.cat([split[i] for i in f.graph.even], -1), s, rtol=1e-12, atol=1e-12)


def test_undamped_one_matrix_updates_can_end_in_cycles_of_two_that_the_even_odd_form_has_not():
    f = function(HAMFunction, ([8, 12, 10, 9, 6, 5], ()), scale=2.0)
    given = torch.rand(20, 8, dtype=F64)
    x, y = f.prepare(given), f.in_form(True).prepare(given)
    assert solved(f.in_form(True), y).converged.all()
    z = fixed_point(f, x, f.init(x), solver=Picard(), stop=TIGHT).state
    cycling = (f(z, x) - z).norm(dim=-1) > 0.1
    assert cycling.any()
    for _ in range(1000):
        z = f(z, x)
    assert_close(f(f(z, x), x)[cycling], z[cycling], rtol=0, atol=1e-9)


class Mapped(Lagrangian):
    """The activation rho(sigma^-1(u)) of eq. 16, sigma(s) = s / rho'(s), of an elementwise rho, by bisection."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def sigma(self, s):
        return s / self.inner.slope(s)(torch.ones_like(s))

    def activate(self, u):
        low, high = torch.full_like(u, -6.0), torch.full_like(u, 6.0)
        for _ in range(80):
            middle = 0.5 * (low + high)
            above = self.sigma(middle) > u
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return self.inner.activate(0.5 * (low + high))


@pytest.mark.parametrize("inner", [EVERY["sigmoid"], Tanh(1.3)], ids=repr)
def test_a_chn_is_the_ham_of_theorem_3(inner):
    chn = function(CHNFunction, GRAPHS["5 layers, skips"], lagrangian=inner, damping=0.6)
    mapped = Mapped(inner)
    ham = HAMFunction(chn.graph, make_neurons(chn.graph, mapped, None, "sigmoid")).double()
    ham.load_state_dict(chn.state_dict())
    given = 0.5 * torch.randn(4, 4, dtype=F64)
    x, y = chn.prepare(given), ham.prepare(mapped.sigma(given))
    s = solved(chn, x).state
    u = mapped.sigma(s)
    assert_close(ham(u, y), u, rtol=1e-8, atol=1e-8)
    assert (ham(u + 0.1, y) - u - 0.1).abs().max() > 1e-3, "everything would be a fixed point"


@pytest.mark.parametrize("unit", [None, ReLU(), PFU(), PFU(tracked=True, bias=0.0), TopK(2)], ids=repr)
def test_a_softmax_layer_under_linear_neurons_is_retrieval_with_forgetting(unit):
    patterns, beta = torch.randn(7, 5, dtype=F64), 2.0
    query = torch.randn(4, 5, dtype=F64)
    graph = LayerGraph.of([2, 7, 5])
    neurons = make_neurons(graph, {1: Softmax(beta), 2: "identity"}, unit, "sigmoid")
    f = HAMFunction(graph, neurons, even_odd=True).double()
    with torch.no_grad():
        f.weights["1_2"].copy_(patterns.T)
        for parameter in (f.weights["0_1"], *f.biases.values()):
            parameter.zero_()
    retrieval = Retrieval(beta, forgetting=unit)
    x = f.prepare(torch.zeros(4, 2, dtype=F64))
    y = retrieval.prepare(query, patterns)
    threshold = None if y.threshold is None else y.threshold / beta  # the unit sees s here, beta s there
    x = x._replace(thresholds=(threshold, None))
    assert f.has_energy == retrieval.has_energy
    a = b = query
    for _ in range(4):
        assert_close(f.energy(a, x), retrieval.energy(b, y), rtol=1e-12, atol=1e-12)
        a, b = f(a, x), retrieval(b, y)
        assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_thresholds_are_drawn_on_the_way_up_and_alike_in_both_forms():
    f = function(HAMFunction, GRAPHS["4 layers"], forgetting=PFU())
    given = torch.randn(3, 4, dtype=F64)
    x, y = f.prepare(given), f.in_form(True).prepare(given)
    assert all(torch.equal(a, b) for a, b in zip(x.thresholds[:2], y.thresholds[:2], strict=True))
    assert x.thresholds[2] is None, "the output layer forgets nothing by default"
    at_zero = torch.sigmoid(torch.tensor(-2.0, dtype=F64))
    s = x.drives[0] + at_zero * f.weights["1_2"].sum(0)
    threshold = s.median(-1, keepdim=True).values
    assert_close(x.thresholds[0], threshold)
    rho = torch.sigmoid(4 * s.clamp_min(threshold) - 2) * (s > threshold)
    s = f.biases["2"] + rho @ f.weights["1_2"].T + at_zero * f.weights["2_3"].sum(0)
    assert_close(x.thresholds[1], s.median(-1, keepdim=True).values)
