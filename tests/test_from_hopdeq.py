"""What users of hopdeq rely on: the logger of a layer, layers in nn.Sequential, functions and gradients of theirs."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from hierarchical_networks import TIGHT, network
from problems import F64, normal
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from hopdeq_lwpf import ConvergenceError, Equilibrium, Termination, fixed_point
from hopdeq_lwpf._types import ConvergenceWarning
from hopdeq_lwpf.diagnostics import iterations_to
from hopdeq_lwpf.models import CHN, HAM
from hopdeq_lwpf.solvers import Implicit, Neumann, Phantom

NAMES = ("residual", "steps", "converged")
FORWARD = [f"{name}_forward" for name in NAMES]
BACKWARD = [f"{name}_backward" for name in NAMES]


class Cell(nn.Module):
    """tanh(W z + x), contracting."""

    def __init__(self, width=4, scale=0.8):
        super().__init__()
        self.w = nn.Linear(width, width)
        nn.init.orthogonal_(self.w.weight, scale)

    def forward(self, z, x):
        return torch.tanh(self.w(z) + x)


class ReadOut:
    """The state comes with another tensor that is made from it."""

    def __call__(self, z, x):
        return self.step(z, x)[0]

    def step(self, z, x):
        image = 0.5 * z.sin() + x
        return image, image.exp().sum(-1)


class Log:
    """Keeps what it is called with."""

    def __init__(self):
        self.entries = []

    def __call__(self, name, value):
        self.entries.append((name, value))

    def take(self):
        """(names, values by name), and forget them."""
        entries, self.entries = self.entries, []
        return [name for name, _ in entries], {name: float(value) for name, value in entries}


def logged(layer):
    log = Log()
    layer.logger = log
    return layer, log


def slow_means(result, residual, steps):
    finite = [value for value in residual.flatten().tolist() if math.isfinite(value)]
    codes = result.flatten().tolist()
    return [
        sum(finite) / len(finite) if finite else math.nan,
        sum(steps.flatten().tolist()) / len(codes),
        sum(code == 0 for code in codes) / len(codes),
    ]


LAYERS = {
    "cell": lambda **options: Equilibrium(Cell().double(), stop=TIGHT, **options),
    "HAM": lambda **options: network(HAM, (4, 6, 5, 3), scale=0.5, **options),
    "HAM, even-odd": lambda **options: network(HAM, (4, 6, 5, 3), even_odd=True, **options),
    "CHN": lambda **options: network(CHN, (4, 6, 5, 3), scale=0.5, **options),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_logger_gets_the_means_of_forward_and_backward_solves(name):
    layer, log = logged(LAYERS[name]())
    x = normal(5, 4)
    value = layer(x)
    solution = layer.last_solution
    names, found = log.take()
    assert names == FORWARD
    expected = slow_means(solution.result, solution.residual, solution.steps)
    assert list(found.values()) == pytest.approx(expected)
    assert len(set(solution.steps.tolist())) > 1  # a mean, not a number of all
    value.square().sum().backward()
    names, found = log.take()
    assert names == BACKWARD
    report = solution.adjoint
    assert list(found.values()) == pytest.approx(slow_means(report.result, report.residual, report.steps))
    assert found["converged_backward"] == 1
    assert found["steps_backward"] > 1


@pytest.mark.parametrize(
    ("adjoint", "solves"),
    [("implicit", True), ("neumann", True), (Implicit(solver="gmres"), True),
     ("onestep", False), ("phantom", False), ("unrolled", False)],
    ids=str,
)  # fmt: skip
def test_a_backward_pass_logs_where_it_solves(adjoint, solves):
    layer, log = logged(LAYERS["cell"](adjoint=adjoint))
    z = layer(normal(3, 4))
    assert log.take()[0] == FORWARD
    z.sum().backward()
    assert log.take()[0] == (BACKWARD if solves else [])


def test_equilibrium_propagation_logs_its_backward_solve():
    layer, log = logged(network(CHN, (4, 6, 3), scale=0.5, adjoint="eqprop"))
    z = layer(normal(3, 4))
    log.take()
    z.sum().backward()
    names, found = log.take()
    assert names == BACKWARD
    assert found["steps_backward"] == float(layer.last_solution.adjoint.steps.double().mean())


def test_a_read_out_and_a_state_of_several_tensors_are_logged():
    x = normal(3, 4).requires_grad_()
    layer, log = logged(Equilibrium(ReadOut()))
    layer(x, read_out=True).sum().backward()
    assert log.take()[0] == FORWARD + BACKWARD
    state = layer(x, read_out=True, return_solution=True).state
    state.sum().backward()
    assert log.take()[0] == FORWARD + BACKWARD

    def pair(z, x):
        return {"a": torch.tanh(0.5 * z["b"] + x), "b": 0.3 * z["a"]}

    layer, log = logged(Equilibrium(pair))
    start = torch.zeros(3, 4, dtype=F64)
    layer(x, {"a": start, "b": start})["b"].sum().backward()
    assert log.take()[0] == FORWARD + BACKWARD


def test_each_backward_pass_through_each_solve_is_logged():
    layer, log = logged(LAYERS["cell"]())
    first, second = layer(normal(3, 4)), layer(0.1 * normal(3, 4, seed=2))
    expected = layer.last_solution
    log.take()
    (first.sum() + second.sum()).backward(retain_graph=True)
    assert log.take()[0] == BACKWARD * 2
    torch.autograd.grad(second.sum(), layer.f.w.weight)
    names, found = log.take()
    assert names == BACKWARD
    assert found["residual_backward"] == float(expected.adjoint.residual.mean())


def test_second_derivatives_are_those_without_a_logger():
    x = normal(2, 4).requires_grad_()
    layer, log = logged(LAYERS["cell"](adjoint=Implicit(rtol=1e-12)))
    assert torch.autograd.gradgradcheck(lambda x: layer(x), x)
    assert log.take()[0][:3] == FORWARD


def test_a_logger_changes_no_number_and_adds_no_wait_for_the_device():
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += "_local_scalar_dense" in str(function)
            return function(*args, **(kwargs or {}))

    layer, x = LAYERS["HAM"](), normal(5, 4)
    found = []
    for logger in (None, lambda name, value: None):
        layer.logger = logger
        layer.zero_grad()
        with Waits() as waits:
            value = layer(x)
            value.sum().backward()
        found.append((value.detach(), [p.grad.clone() for p in layer.parameters()], waits.count))
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert found[0][2] > 0  # the solve itself asks whether it is done


def test_values_are_numbers_without_history():
    layer, log = logged(LAYERS["cell"]())
    layer(normal(3, 4)).sum().backward()
    assert all(value.shape == () and not value.requires_grad for _, value in log.entries)
    with torch.no_grad():
        layer(normal(3, 4))
    assert log.take()[0] == FORWARD + BACKWARD + FORWARD


def test_means_of_residuals_are_over_finite_ones():
    x = normal(4, 4)
    x[1] = float("nan")
    layer, log = logged(LAYERS["cell"](on_failure="ignore"))
    layer(x)
    _, found = log.take()
    assert math.isfinite(found["residual_forward"])
    assert found["converged_forward"] == 0.75
    layer(torch.full_like(x, float("nan")))
    _, found = log.take()
    assert math.isnan(found["residual_forward"])
    assert found["converged_forward"] == 0


@pytest.mark.parametrize("steps", [None, 2])
def test_an_empty_batch_logs_nothing(steps):
    layer, log = logged(LAYERS["cell"](steps=steps))
    layer(normal(0, 4)).sum().backward()
    assert log.take()[0] == []


def test_a_fixed_number_of_steps_logs_its_last_residual():
    layer, log = logged(LAYERS["cell"](steps=3))
    x = normal(4, 4)
    z = layer(x).detach()
    before = Equilibrium(layer.f, steps=2)(x).detach()
    _, found = log.take()
    residual = (z - before).norm(dim=-1) / z.norm(dim=-1)
    assert found == {
        "residual_forward": pytest.approx(float(residual.mean())),
        "steps_forward": 3,
        "converged_forward": 0,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_means_are_made_in_float32_or_wider(dtype):
    layer, log = logged(Equilibrium(lambda z, x: 0.5 * z + x, stop=Termination(rtol=1e-2)))
    layer(torch.ones(3, 4, dtype=dtype))
    assert {value.dtype for _, value in log.entries} == {torch.float32}


def test_what_failed_is_logged_before_it_is_raised():
    layer, log = logged(Equilibrium(Cell(), stop=Termination(max_steps=2), on_failure="raise"))
    with pytest.raises(ConvergenceError):
        layer(torch.randn(3, 4))
    assert log.take()[1]["converged_forward"] == 0


def test_under_transforms_the_logger_gets_plain_numbers():
    layer, log = logged(LAYERS["cell"]())
    x = normal(3, 4)
    expected = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)[0]
    log.take()
    assert_close(torch.func.grad(lambda x: layer(x).square().sum())(x.detach()), expected)
    assert_close(torch.func.vmap(layer)(x.detach()[:, None])[:, 0], layer(x.detach()))
    assert all(type(value) is torch.Tensor and math.isfinite(float(value)) for _, value in log.entries)


# Of torch's compiler, which is not to be tested here.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("steps", [None, 3])
def test_a_compiled_layer_logs(steps):
    torch._dynamo.reset()
    layer, log = logged(LAYERS["cell"](steps=steps))
    x = normal(3, 4)
    expected = layer(x)
    _, numbers = log.take()
    compiled = torch.compile(layer, backend="aot_eager")
    for _ in range(2):
        assert_close(compiled(x), expected)
        names, found = log.take()
        assert names == FORWARD
        assert found == pytest.approx(numbers)
    torch._dynamo.reset()


def test_a_logger_is_given_or_set_and_taken_away():
    log = Log()
    layer = Equilibrium(Cell(), logger=log)
    x = torch.randn(3, 4)
    layer(x)
    assert log.take()[0] == FORWARD
    layer.logger = None
    layer(x)
    assert log.take()[0] == []
    assert Equilibrium(Cell()).logger is None


@pytest.mark.parametrize("bad", ["self.log", 1, nn.Linear(1, 1), {"logger": print}], ids=str)
def test_what_is_no_logger_is_refused(bad):
    with pytest.raises(TypeError, match=f"logger must be None or a function.*got a {type(bad).__name__}"):
        Equilibrium(Cell(), logger=bad)
    layer = HAM([3, 4, 2])
    with pytest.raises(TypeError, match="logger must be None or a function"):
        layer.logger = bad
    assert layer.logger is None
    assert [name for name, _ in layer.named_children()] == ["f"]


def test_copies_and_files_have_no_logger_and_take_nothing_along():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = HAM([3, 4, 2], steps=2)
            self.layer.logger = self.log
            self.count = 0

        def log(self, name, value):
            self.count += 1

        def __deepcopy__(self, memo):
            raise AssertionError("the layer's copy took its owner along")

        __getstate__ = __reduce_ex__ = __deepcopy__

    owner, x = Owner(), torch.rand(2, 3)
    layer = owner.layer
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = [
        copy.deepcopy(layer),
        copy.copy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
        layer.to_even_odd(),
        layer.to_one_matrix(),
    ]
    for twin in twins:
        assert twin.logger is None
        twin(x)
    assert owner.count == 0
    layer(x)
    assert owner.count == 3
    twins[0].logger = layer.logger  # by hand it is taken along
    twins[0](x)
    assert owner.count == 6


def test_a_lightning_module_that_logs_is_copied_and_logs_in_training_but_not_in_prediction(tmp_path):
    from lightning import LightningModule, Trainer
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    class Lit(LightningModule):
        def __init__(self, always=False):
            super().__init__()
            self.ham = HAM([4, 6, 3])
            self.always = always
            self.seen = {}

        def setup(self, stage):
            self.ham.logger = None if stage == "predict" and not self.always else self.log

        def forward(self, x):
            return self.ham(x)

        def training_step(self, batch, index):
            return (self(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch, index):
            self(batch[0])

        def predict_step(self, batch, index):
            return self(batch[0])

        def on_train_batch_end(self, *_):
            self.seen |= self.trainer.callback_metrics

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    data = DataLoader(TensorDataset(torch.rand(8, 4), torch.rand(8, 3)), batch_size=4)
    lit = Lit()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"accelerator": "cpu", "devices": 1, "enable_model_summary": False, "max_epochs": 1}
    with warnings.catch_warnings():
        for module in ("lightning", "torch", "pytorch_lightning"):
            warnings.filterwarnings("ignore", module=module)
        trainer = Trainer(default_root_dir=tmp_path, **options)
        trainer.fit(lit, data, data)
        metrics = {name: float(value) for name, value in {**lit.seen, **trainer.callback_metrics}.items()}
        assert {*FORWARD, *BACKWARD} <= set(metrics)
        assert metrics["converged_forward"] == metrics["converged_backward"] == 1
        assert metrics["residual_forward"] < 1e-5
        twin = copy.deepcopy(lit)
        assert twin.ham.logger is None
        assert lit.ham.logger == lit.log
        with pytest.raises(MisconfigurationException, match="self.log"):
            lit(torch.rand(2, 4))  # outside of any step
        assert len(Trainer(**options).predict(lit, data)) == 2
        assert lit.ham.logger is None
        with pytest.raises(MisconfigurationException, match="predict"):
            Trainer(**options).predict(Lit(always=True), data)


@pytest.mark.parametrize("even_odd", [False, True])
@pytest.mark.parametrize("kind", [HAM, CHN])
def test_a_network_followed_by_a_linear_layer_in_a_sequential(kind, even_odd):
    torch.manual_seed(0)
    ham = network(kind, (5, 6, 4, 3), scale=0.35, even_odd=even_odd, adjoint=Implicit("gmres", rtol=1e-12))
    model = nn.Sequential(nn.Linear(2, 5), ham, nn.Linear(3, 2)).double()
    x = normal(7, 2)
    y = model(x)
    assert y.shape == (7, 2)
    gradients = torch.autograd.grad(y.square().sum(), tuple(model.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)
    # By hand: every layer of neurons settles by itself, and autograd goes through all of it.
    state = slow_network(ham, model[0](x))
    by_hand = model[2](state)
    assert_close(y, by_hand, rtol=1e-9, atol=1e-10)
    expected = torch.autograd.grad(by_hand.square().sum(), tuple(model.parameters()))
    assert_close(gradients, expected, rtol=1e-6, atol=1e-9)
    for batch in (1, 0, 3):
        assert_close(model(x[:batch]), y[:batch], rtol=1e-9, atol=1e-10)


def slow_network(layer, x, steps=300):
    """The last layer of a HAM or CHN after many damped steps of its equation (6) or (5), all layers at once."""
    weights, biases = layer.f.weights, layer.f.biases
    last = len(biases)

    def rho(s):
        return 1 / (1 + torch.exp(2 - 4 * s))

    states = [x, *(x.new_zeros(len(x), len(biases[str(i)])) for i in range(1, last + 1))]
    for _ in range(steps):
        new = [x]
        for i in range(1, last + 1):
            field = biases[str(i)] + rho(states[i - 1]) @ weights[f"{i - 1}_{i}"].T
            if i < last:
                field = field + rho(states[i + 1]) @ weights[f"{i}_{i + 1}"]
            slope = 4 * rho(states[i]) * (1 - rho(states[i])) if isinstance(layer, CHN) else 1.0
            new.append(states[i] + 0.3 * (slope * field - states[i]))
        states = new
    return states[last]


class Theirs(nn.Module):
    """A function as hopdeq wants it: preprocess_inputs(x) once, then f(Ux, z); the output is changed in place."""

    def __init__(self, inputs=3, width=5):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.U = nn.Parameter(torch.randn(inputs, 2, generator=generator, dtype=F64))
        self.W = nn.Parameter(0.25 * torch.randn(width, width, generator=generator, dtype=F64))
        self.calls = 0

    def preprocess_inputs(self, x):
        self.calls += 1
        return x @ self.U

    def forward(self, Ux, z):
        new = torch.tanh(z) @ self.W
        new[:, :2] += Ux
        return new


class Adapted(nn.Module):
    """The same function for Equilibrium."""

    def __init__(self, f_module, width):
        super().__init__()
        self.f_module, self.width = f_module, width

    def prepare(self, x):
        return self.f_module.preprocess_inputs(x)

    def init(self, Ux):
        return Ux.new_zeros(len(Ux), self.width)

    def forward(self, z, Ux):
        return self.f_module(Ux, z)


def test_a_function_of_theirs_unchanged():
    theirs = Theirs()
    layer = Equilibrium(Adapted(theirs, 5), stop=TIGHT)
    x = normal(4, 3)
    z = layer(x)
    assert theirs.calls == 1
    slow = torch.zeros(4, 5, dtype=F64)
    for _ in range(300):
        slow = theirs(theirs.preprocess_inputs(x), slow)
    assert_close(z, slow.detach(), check_dtype=True)
    ours = torch.autograd.grad(z.square().sum(), (theirs.U, theirs.W))  # x needs no gradient for that
    assert_close(ours, torch.autograd.grad(slow.square().sum(), (theirs.U, theirs.W)), rtol=1e-6, atol=1e-9)
    assert layer(x[:1]).shape == (1, 5)
    assert_close(copy.deepcopy(layer)(x), z)


def solved(theirs, x, damping=0.0):
    z = torch.zeros(len(x), 5, dtype=F64)
    with torch.no_grad():
        for _ in range(400):
            z = damping * z + (1 - damping) * theirs(theirs.preprocess_inputs(x), z)
    return z


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("iterations", [1, 3, 8])
def test_backprop_of_theirs_is_phantom_and_without_damping_neumann(iterations, damping):
    theirs, x = Theirs(), normal(4, 3)
    z = solved(theirs, x, damping)
    for _ in range(iterations):  # recurrent backpropagation: autograd through some more steps
        z = damping * z + (1 - damping) * theirs(theirs.preprocess_inputs(x), z)
    expected = torch.autograd.grad(z.square().sum(), (theirs.U, theirs.W))
    adjoints = [Phantom(iterations, damping=damping), *([] if damping else [Neumann(iterations)])]
    for adjoint in adjoints:
        layer = Equilibrium(Adapted(theirs, 5), stop=TIGHT, adjoint=adjoint)
        ours = torch.autograd.grad(layer(x).square().sum(), (theirs.U, theirs.W))
        assert_close(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_full_adjoint_of_theirs_with_picard_is_the_same_sum_and_ours_its_limit(damping):
    theirs, x = Theirs(), normal(4, 3)
    point = solved(theirs, x, damping).requires_grad_()

    def gradients(iterations):
        image = damping * point + (1 - damping) * theirs(theirs.preprocess_inputs(x), point)
        g = 2 * point.detach()
        u = torch.zeros_like(g)
        for _ in range(iterations):
            u = g + torch.autograd.grad(image, point, u, retain_graph=True)[0]
        return torch.autograd.grad(image, (theirs.U, theirs.W), u)

    layer = Equilibrium(Adapted(theirs, 5), stop=TIGHT, adjoint=Implicit(rtol=1e-13))
    ours = torch.autograd.grad(layer(x).square().sum(), (theirs.U, theirs.W))
    assert_close(ours, gradients(300), rtol=1e-9, atol=1e-10)
    layer.adjoint = Phantom(8, damping=damping)
    ours = torch.autograd.grad(layer(x).square().sum(), (theirs.U, theirs.W))
    assert_close(ours, gradients(8), rtol=1e-9, atol=1e-10)
    if not damping:
        layer.adjoint = Neumann(8)
        ours = torch.autograd.grad(layer(x).square().sum(), (theirs.U, theirs.W))
        assert_close(ours, gradients(8), rtol=1e-9, atol=1e-10)


def test_the_published_count_is_that_of_a_loop_over_tracked_states():
    layer, x = network(HAM, (5, 6, 4, 3), scale=0.4, solver="picard"), normal(6, 5)
    budget, context = 25, None
    with torch.no_grad():
        context, z = layer.problem(x)
        states = []
        for _ in range(budget):
            z = layer.f(z, context)
            states.append(z)
    counts = []
    for row in range(len(x)):
        count = 0
        for n in range(budget - 1):
            new, old = states[n + 1][row], states[n][row]
            if float((new - old).norm() / new.norm()) < 1e-4:
                count = n
                break
        counts.append(count or budget - 1)  # a first index of 0 counts as not converged
    stop = Termination(rtol=0.0, atol=0.0, max_steps=budget - 1)
    with torch.no_grad():
        traced = fixed_point(layer.f, *layer.problem(x), solver="picard", stop=stop, trace=True)
    residual = traced.trace.residual
    assert residual.shape == (budget, 6)
    assert iterations_to(residual, as_published=True).tolist() == counts
    assert len(set(counts)) > 1


def test_batches_of_any_size_after_one_another_and_no_batch_size_in_the_state_dict():
    layer = HAM([5, 6, 3], steps=2)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    for batch in (4, 1, 7):
        layer(torch.rand(batch, 5))
    assert shapes == {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "f.weights.0_1": (6, 5), "f.weights.1_2": (3, 6), "f.biases.1": (6,), "f.biases.2": (3,)
    }  # fmt: skip


def test_a_solve_that_fails_says_so_while_the_budget_of_theirs_does_not():
    layer = Equilibrium(Adapted(Theirs(), 5), stop=Termination(max_steps=3))
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        layer(normal(4, 3))
