"""Wrong input raises at once: argument, value, what is allowed, the nearest name."""

import pytest
import torch
from problems import Map

from hopdeq_lwpf import Equilibrium, Termination, find, fixed_point, models, retrieve, solvers
from hopdeq_lwpf.forgetting import ReLU
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.solvers import LBFGS, Anderson, Broyden, Implicit, Picard, register_solver

Q, P = torch.randn(4, 3), torch.randn(5, 3)
Z = torch.zeros(2, 3)
halve = Map(lambda z: 0.5 * z)
META = torch.device("meta")


def wrong(*cases):
    """Cases of (settings, error, message), each with a name."""
    return pytest.mark.parametrize(
        ("options", "error", "message"), [pytest.param(*case, id=str(case[0])[:60]) for case in cases]
    )


@wrong(
    ({"solver": "lbgfs"}, ValueError, r"solver 'lbgfs' .*Did you mean 'lbfgs'\?"),
    ({"solver": "andersen"}, ValueError, r"solver 'andersen' .*Did you mean 'anderson'\?"),
    ({"solver": Anderson}, TypeError, r"solver must be a name or an object.*Anderson"),
    ({"solver": 3}, TypeError, r"solver .*got 3"),
    ({"adjoint": "implict"}, ValueError, r"adjoint 'implict' .*Did you mean 'implicit'\?"),
    ({"adjoint": Implicit}, TypeError, r"adjoint must be a name or an object.*Implicit"),
    ({"stop": 1e-3}, TypeError, r"stop must be a Termination, got 0.001"),
    ({"steps": 0}, ValueError, r"steps must be .*>= 1, got 0"),
    ({"steps": -2}, ValueError, r"steps .*got -2"),
    ({"steps": True}, ValueError, r"steps .*got True"),
    ({"steps": 2.0}, ValueError, r"steps .*got 2.0"),
    ({"steps": "2"}, ValueError, r"steps .*got '2'"),
)
@pytest.mark.parametrize("call", ["fixed_point", "retrieve", "retrieve in steps", "Equilibrium"])
def test_options_of_a_solve(call, options, error, message):
    calls = {
        "fixed_point": lambda: fixed_point(halve, (), Z, **options),
        "retrieve": lambda: retrieve(Q, P, **options),
        "retrieve in steps": lambda: retrieve(Q, P, **{"steps": 2, **options}),
        "Equilibrium": lambda: Equilibrium(halve, **options),
    }
    with pytest.raises(error, match=message):
        calls[call]()


@wrong(
    ({"forgetting": "rleu"}, ValueError, r"forgetting 'rleu' .*Did you mean 'relu'\?"),
    ({"forgetting": ReLU}, TypeError, r"forgetting must be .*did you mean ReLU"),
    ({"separation": "sofmax"}, ValueError, r"separation 'sofmax' .*Did you mean 'softmax'\?"),
    ({"separation": torch.softmax}, TypeError, r"separation must be"),
    ({"inject": "stat"}, ValueError, r"inject 'stat' .*Did you mean 'start'\?"),
    ({"beta": 0.0}, ValueError, r"beta.* > 0, got 0.0"),
    ({"beta": -1}, ValueError, r"beta.* > 0, got -1"),
    ({"beta": float("nan")}, ValueError, r"beta.*got nan"),
    ({"beta": float("inf")}, ValueError, r"beta.*got inf"),
    ({"beta": True}, (TypeError, ValueError), r"beta.*got True"),
    ({"beta": "1"}, (TypeError, ValueError), r"beta.*got '1'"),
    ({"beta": None}, (TypeError, ValueError), r"beta.*got None"),
    ({"beta": torch.tensor([1.0, 0.0, 1.0, 1.0])}, ValueError, r"beta.* > 0"),
    ({"beta": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, ValueError, r"beta"),
    ({"beta": torch.ones(3)}, ValueError, r"beta of shape \(3,\).*\(4,\)"),
    ({"beta": torch.ones(0)}, ValueError, r"beta"),
    ({"beta": torch.ones(4, device=META)}, ValueError, r"beta is on meta"),
    ({"inject": "input", "inject_weight": "a"}, (TypeError, ValueError), r"inject_weight.*'a'"),
    ({"inject": "input", "inject_weight": None}, (TypeError, ValueError), r"inject_weight.*None"),
    ({"inject": "input", "inject_weight": float("nan")}, ValueError, r"inject_weight.*nan"),
    ({"inject": "input", "inject_weight": torch.ones(7)}, ValueError, r"inject_weight.*\(7,\)"),
    ({"mask": torch.zeros(5)}, TypeError, r"mask must be a bool tensor.*torch.float32"),
    ({"mask": [False] * 5}, TypeError, r"mask must be a bool tensor.*list"),
    ({"mask": torch.zeros(4, dtype=torch.bool)}, ValueError, r"mask has shape \(4,\).*\(5,\).*\(4, 5\)"),
    ({"mask": torch.zeros(3, 5, dtype=torch.bool)}, ValueError, r"mask has shape \(3, 5\)"),
    ({"mask": torch.zeros(5, dtype=torch.bool, device=META)}, ValueError, r"mask is on meta"),
    ({"values": torch.zeros(4, 3)}, ValueError, r"values must have one row a pattern.*\(4, 3\)"),
    ({"values": torch.zeros(5)}, ValueError, r"values must have one row a pattern.*\(5,\)"),
    ({"values": torch.zeros(5, 2).double()}, TypeError, r"values has dtype torch.float64"),
    ({"values": torch.zeros(5, 2).long()}, TypeError, r"values must have a floating-point dtype.*int64"),
    ({"values": torch.zeros(5, 2, device=META)}, ValueError, r"values is on meta"),
)
@pytest.mark.parametrize("steps", [1, None])
def test_options_of_retrieval(options, error, message, steps):
    with pytest.raises(error, match=message):
        retrieve(Q, P, steps=steps, **options)


@pytest.mark.parametrize(
    ("query", "patterns", "error", "message"),
    [
        (Q.long(), P, TypeError, r"query must have a floating-point dtype, got torch.int64"),
        (Q, P.long(), TypeError, r"patterns must have a floating-point dtype, got torch.int64"),
        (Q.tolist(), P, TypeError, r"query must be a torch.Tensor, got list"),
        (Q, P.numpy(), TypeError, r"patterns must be a torch.Tensor, got ndarray"),
        (Q, P.double(), TypeError, r"patterns has dtype torch.float64 but query has torch.float32"),
        (Q, P.to(META), ValueError, r"patterns is on meta but query is on cpu"),
        (Q, P[:, :2], ValueError, r"query has width 3 but patterns have width 2.*\(4, 3\).*\(5, 2\)"),
        (Q, P[:0], ValueError, r"patterns of shape \(0, 3\) hold no pattern"),
        (Q[0, 0], P, ValueError, r"query must be .*got \(\)"),
        (Q, P[0], ValueError, r"patterns .*\(3,\)"),
        (Q, P.expand(3, 5, 3), ValueError, r"patterns \(3, 5, 3\) do not fit queries \(4, 3\)"),
        (Q, P.expand(2, 4, 5, 3), ValueError, r"patterns \(2, 4, 5, 3\) do not fit"),
    ],
)
def test_query_and_patterns(query, patterns, error, message):
    with pytest.raises(error, match=message):
        retrieve(query, patterns)


@pytest.mark.parametrize(
    ("z0", "error", "message"),
    [
        (None, TypeError, r"z0 must be a torch.Tensor, got NoneType"),
        ((), TypeError, r"state z0 holds no tensor"),
        (torch.zeros(2, dtype=torch.int64), TypeError, r"z0 must have a floating-point dtype.*int64"),
        (torch.tensor(1.0), ValueError, r"state z0 has shape \(\)"),
        ((torch.zeros(2, 1), torch.zeros(3, 1)), ValueError, r"different batch shapes.*\(2,\).*\(3,\)"),
    ],
)
@pytest.mark.parametrize("steps", [None, 2])
def test_state(z0, error, message, steps):
    with pytest.raises(error, match=message):
        fixed_point(lambda z, x: z, None, z0, steps=steps)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda z: z[:, :1], r"return the shape of z, \[\(2, 3\)\]; it returned \[\(2, 1\)\]"),
        (lambda z: z.sum(), r"it returned \[\(\)\]"),
        (lambda z: (z, z), r"it returned \[\(2, 3\), \(2, 3\)\]"),
        (lambda z: None, r"it returned"),
        (lambda z: z.tolist(), r"it returned"),
    ],
)
@pytest.mark.parametrize("steps", [None, 2])
def test_function_that_returns_something_else(f, message, steps):
    with pytest.raises(ValueError, match=message):
        fixed_point(Map(f), (), Z, steps=steps)


@wrong(
    ({"rtol": -1.0}, ValueError, r"rtol must be a finite number >= 0, got -1.0"),
    ({"rtol": float("nan")}, ValueError, r"rtol .*nan"),
    ({"atol": float("inf")}, ValueError, r"atol .*inf"),
    ({"rtol": "1e-3"}, ValueError, r"rtol .*'1e-3'"),
    ({"max_steps": 0}, ValueError, r"max_steps must be an integer >= 1, got 0"),
    ({"max_steps": 10.0}, ValueError, r"max_steps .*10.0"),
    ({"max_steps": True}, ValueError, r"max_steps .*True"),
    ({"check_every": 0}, ValueError, r"check_every .*0"),
    ({"divergence": 1.0}, ValueError, r"divergence must be > 1, got 1.0"),
    ({"divergence": float("nan")}, ValueError, r"divergence .*nan"),
)
def test_termination(options, error, message):
    with pytest.raises(error, match=message):
        Termination(**options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Picard, {"damping": 1.0}, r"damping must be below 1"),
        (Picard, {"damping": -0.1}, r"damping must be a number in \[0.0, 1.0\], got -0.1"),
        (Anderson, {"memory": 0}, r"memory must be an integer >= 1, got 0"),
        (Anderson, {"damping": 1.0}, r"damping must be below 1"),
        (Anderson, {"ridge": -1.0}, r"ridge .*-1.0"),
        (Broyden, {"memory": 1.5}, r"memory .*1.5"),
        (LBFGS, {"memory": True}, r"memory .*True"),
        (LBFGS, {"step_cap": 0.5}, r"step_cap .*0.5"),
        (LBFGS, {"warmup": -1}, r"warmup .*-1"),
        (Implicit, {"solver": "cgg"}, r"adjoint solver 'cgg' .*Did you mean 'cg'\?"),
        (Implicit, {"rtol": 0.0}, r"rtol must be a number in \(0.0, 1.0\], got 0.0"),
        (Implicit, {"max_steps": 0}, r"max_steps .*0"),
    ],
)
def test_options_of_solvers_and_adjoints(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize("kind", [Picard, Anderson, Broyden, LBFGS, Implicit, Termination])
def test_no_object_takes_an_option_that_it_does_not_have(kind):
    with pytest.raises(TypeError, match="max_iter"):
        kind(max_iter=3)


def test_named_settings():
    given = {"solver": "anderson", "memry": 3}
    with pytest.raises(ValueError, match=r"'memry' .*Did you mean 'memory'\?"):
        solvers.build(given)
    assert given == {"solver": "anderson", "memry": 3}
    with pytest.raises(ValueError, match=r"solver 'andersn' .*Did you mean 'anderson'\?"):
        solvers.build({"solver": "andersn"})
    with pytest.raises(ValueError, match=r"'beat' .*Did you mean 'beta'\?"):
        models.build({"model": "retrieval", "beat": 3})
    with pytest.raises(ValueError, match=r"need 'model'.*'modl'"):
        models.build({"modl": "retrieval"})
    with pytest.raises(ValueError, match=r"'hopfeild' .*Did you mean 'hopfield'\?"):
        find("models", "hopfeild")
    with pytest.raises(ValueError, match=r"kind 'solver' is not one of"):
        find("solver", "picard")


def test_function_that_cannot_be_called():
    with pytest.raises(TypeError, match=r"\bf\b.*3"):
        fixed_point(3, None, Z)
    with pytest.raises(TypeError, match=r"\bf\b.*3"):
        Equilibrium(3)


def test_module_settings():
    with pytest.raises(ValueError, match=r"on_failure 'rais' .*Did you mean 'raise'\?"):
        Equilibrium(halve, on_failure="rais")
    with pytest.raises(TypeError, match=r"z0 is needed.*dict"):
        Equilibrium(halve)({"a": Z})


def test_registering_something_else():
    with pytest.raises(TypeError, match=r"3"):
        register_solver("three", 3)
    assert "three" not in solvers.SOLVERS


def test_beta_is_checked_by_the_model_too():
    with pytest.raises(ValueError, match=r"beta.* > 0, got 0"):
        Retrieval(0)
