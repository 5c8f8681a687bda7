"""fixed_point under torch.func: what is promised is right, what is not is refused."""

import pytest
import torch
from problems import F64, PROBLEMS, TIGHT, Map, exact_gradients, loss_of, normal, relative_error
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.testing import assert_close

from hopdeq_lwpf import Equilibrium, Termination, fixed_point, retrieve
from hopdeq_lwpf._types import ConvergenceWarning
from hopdeq_lwpf.separation import Entmax15
from hopdeq_lwpf.solvers import Implicit, Neumann, OneStep, Phantom

EXACT = Implicit(rtol=1e-13)
# torch compiles its own forward-mode formulas with its deprecated compiler.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


class Cell(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(3, 3).double()
        nn.init.orthogonal_(self.inner.weight, 0.7)

    def forward(self, z, x):
        return torch.tanh(self.inner(z) + x)


def layer(**options):
    return Equilibrium(Cell(), **{"stop": TIGHT, "adjoint": EXACT, "solver": "picard", **options})


def loss(parameters, x, module):
    return functional_call(module, parameters, (x,)).pow(2).sum()


def test_grad_to_the_parameters_is_that_of_autograd():
    module, x = layer(), normal(4, 3)
    parameters = dict(module.named_parameters())
    actual = grad(loss)(parameters, x, module)
    loss(parameters, x, module).backward()
    assert_close(actual, {name: parameter.grad for name, parameter in parameters.items()})


def test_gradients_of_each_sample_by_vmap():
    module, x = layer(), normal(4, 3)
    parameters = dict(module.named_parameters())
    actual = vmap(grad(loss), in_dims=(None, 0, None))(parameters, x[:, None], module)
    for i in range(4):
        assert_close({k: v[i] for k, v in actual.items()}, grad(loss)(parameters, x[i : i + 1], module))


def test_vjp_pulls_back_as_autograd_does():
    module, x, g = layer(), normal(4, 3).requires_grad_(), normal(4, 3, seed=2)
    assert_close(vjp(module, x.detach())[1](g)[0], torch.autograd.grad(module(x), x, g)[0])


@forward_mode
@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobian_by_either_mode(transform):
    module, x = layer(), normal(2, 3)
    assert_close(transform(module)(x), torch.autograd.functional.jacobian(module, x))


@forward_mode
def test_jvp_is_a_directional_derivative():
    module, x, v = layer(), normal(2, 3), normal(2, 3, seed=2)
    step = 1e-5 * v
    expected = (module(x + step) - module(x - step)) / 2e-5
    assert_close(jvp(module, (x,), (v,))[1], expected, rtol=1e-7, atol=1e-7)


@forward_mode
@pytest.mark.parametrize("compose", [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(grad(f))])
def test_hessian(compose):
    module, x = layer(), normal(1, 3)
    function = lambda x: module(x).pow(3).sum()  # noqa: E731
    assert_close(compose(function)(x), torch.autograd.functional.hessian(function, x))


@pytest.mark.parametrize("name", ["tanh", "triangular", "metric", "softmax retrieval", "dict", "tuple"])
def test_grad_of_a_function_that_is_no_module_or_has_any_state(name):
    problem = PROBLEMS[name]

    def total(*arguments):
        x = problem.prepare(*arguments)
        return loss_of(fixed_point(problem.f, x, problem.z0, stop=TIGHT, adjoint=EXACT).value)

    places = tuple(range(len(problem.arguments)))
    actual = grad(total, argnums=places)(*problem.arguments)
    assert relative_error(actual, exact_gradients(problem)) < 1e-9


def test_vmap_over_problems_is_a_loop_over_problems():
    w, b = 0.8 * normal(5, 3, 3).tanh() / 3, normal(5, 2, 3, seed=2)
    f = Map(lambda z, w, b: torch.tanh(z @ w.T + b))

    def run(w, b):
        s = fixed_point(f, (w, b), torch.zeros(2, 3, dtype=F64), solver="anderson")
        return s.value, s.result, s.residual, s.steps, s.evaluations

    together = vmap(run)(w, b)
    apart = [torch.stack(parts) for parts in zip(*map(run, w, b), strict=True)]
    assert_close(together, tuple(apart), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("forgetting", [None, "relu", "pfu", "topk"])
def test_vmap_over_memories_with_the_default_solver(forgetting):
    patterns, query = normal(4, 10, 6), 0.5 * normal(4, 3, 6, seed=2)
    mask = normal(4, 10, seed=3) > 1.2

    def recall(query, patterns, mask):
        r = retrieve(query, patterns, beta=2.0, forgetting=forgetting, mask=mask, stop=Termination(1e-10))
        return r.value, r.index, r.result, r.steps, r.energy

    together = vmap(recall)(query, patterns, mask)
    apart = [torch.stack(parts) for parts in zip(*map(recall, query, patterns, mask), strict=True)]
    assert_close(together, tuple(apart), rtol=1e-8, atol=1e-9)


def test_nested_vmap_and_a_start_that_is_shared():
    b = normal(2, 3, 4, 5)

    def run(b):
        return fixed_point(lambda z, b: 0.5 * z.sin() + b, b, torch.zeros(4, 5, dtype=F64), stop=TIGHT).value

    expected = run(b.reshape(-1, 4, 5)[0])
    actual = vmap(vmap(run), in_dims=1)(b)
    assert actual.shape == (3, 2, 4, 5)
    assert_close(actual[0, 0], expected)
    assert_close(actual[2, 1], run(b[1, 2]))


def test_vmap_over_an_ensemble_of_models():
    models = [Cell(seed) for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    x = normal(4, 3)

    def run(parameters, buffers):
        module = Equilibrium(models[0], stop=TIGHT, solver="picard")
        named = {f"f.{name}": tensor for name, tensor in (parameters | buffers).items()}
        return functional_call(module, named, (x,))

    expected = torch.stack([Equilibrium(m, stop=TIGHT, solver="picard")(x) for m in models])
    assert_close(vmap(run)(parameters, buffers), expected)


@pytest.mark.parametrize("options", [{"steps": 3}, {"adjoint": "unrolled", "solver": "picard"}], ids=str)
def test_autograd_through_the_iteration(options):
    module, x = layer(**options), normal(4, 3)
    parameters = dict(module.named_parameters())
    actual = grad(loss)(parameters, x, module)
    loss(parameters, x, module).backward()
    assert_close(actual, {name: parameter.grad for name, parameter in parameters.items()})


def test_counted_steps_under_vmap():
    module, x = layer(steps=3), normal(4, 3)
    assert_close(vmap(module)(x[:, None])[:, 0], module(x))


def test_failure_is_reported_under_vmap_and_the_kept_solution_is_plain():
    module = layer(stop=Termination(rtol=1e-12, max_steps=2))
    with pytest.warns(ConvergenceWarning, match="4 of 4 problems did not converge"):
        vmap(module)(normal(4, 1, 3))
    solution = module.last_solution
    assert solution.value.shape == (4, 1, 3)
    assert solution.residual.max().item() > 1e-12


def test_adjoint_that_fails_warns_under_grad():
    module, x = layer(adjoint=Implicit("gmres", rtol=1e-14, max_steps=1)), normal(4, 3)
    with pytest.warns(ConvergenceWarning, match="adjoint solve"):
        grad(loss)(dict(module.named_parameters()), x, module)


def test_backward_keeps_the_autocast_state_of_the_forward():
    seen = []

    class Watching(Cell):
        def forward(self, z, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return torch.tanh(self.inner(z) + x)

    module = Equilibrium(Watching().float(), solver="picard", stop=Termination(rtol=1e-2))

    def total(parameters, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = functional_call(module, parameters, (x,))
        return z.float().pow(2).sum()

    grad(total)(dict(module.named_parameters()), normal(2, 3).float())
    assert len(seen) > 3
    assert all(seen)


# --- refused


@pytest.mark.parametrize("transform", [lambda f: grad(lambda b: f(b).sum()), vmap, jacrev])
def test_a_closure_over_a_transformed_tensor_is_refused(transform):
    def run(b):
        return fixed_point(lambda z, x: 0.5 * torch.tanh(z) + b, None, torch.zeros(2, 3, dtype=F64)).value

    with pytest.raises(TypeError, match="handed to f through x"):
        transform(run)(normal(2, 2, 3)[0] if transform is not vmap else normal(2, 2, 3))


def test_a_closure_over_a_parameter_of_plain_autograd_is_refused_too():
    w = normal(3).requires_grad_()
    f = lambda z, x: 0.5 * torch.tanh(z) * w + x  # noqa: E731
    with pytest.raises(TypeError, match="closes over one"):
        vmap(lambda x: fixed_point(f, x, torch.zeros(2, 3, dtype=F64)).value)(normal(4, 2, 3))


@pytest.mark.parametrize("adjoint", [OneStep(), Neumann(3), Phantom(2)], ids=repr)
def test_approximate_adjoints_are_refused(adjoint):
    with pytest.raises(TypeError, match=r"does not work under torch.func; use Implicit\(\)"):
        jacrev(layer(adjoint=adjoint))(normal(2, 3))


def test_a_trace_is_refused():
    f = Map(lambda z, b: 0.5 * z + b)
    with pytest.raises(ValueError, match="trace=True is not possible under torch.func"):
        vmap(lambda b: fixed_point(f, (b,), torch.zeros(1, 3, dtype=F64), trace=True).value)(normal(2, 1, 3))


@forward_mode
@pytest.mark.parametrize("name", ["equilibrium", "weights", "lagrangian"])
def test_forward_mode_within_forward_mode_is_refused(name):
    # torch evaluates the inner derivative at a detached point, and the outer one would silently be 0.
    module, separation = layer(), Entmax15()
    functions = {"equilibrium": module, "weights": separation.weights, "lagrangian": separation.lagrangian}
    with pytest.raises(TypeError, match="use torch.func.hessian"):
        jacfwd(jacfwd(functions[name]))(normal(1, 3))


def test_vmap_over_beta_and_a_bad_beta_among_them():
    query, patterns = normal(3, 4), normal(6, 4, seed=2)
    betas = torch.tensor([0.5, 2.0], dtype=F64)
    together = vmap(lambda beta: retrieve(query, patterns, beta=beta).value)(betas)
    apart = torch.stack([retrieve(query, patterns, beta=beta).value for beta in betas])
    assert_close(together, apart)
    with pytest.raises(ValueError, match="beta must be > 0"):
        vmap(lambda beta: retrieve(query, patterns, beta=beta).value)(-betas)
