"""Importing costs nothing that is not used."""

import subprocess
import sys

import pytest

import hopdeq_lwpf

HEAVY = ("lightning", "pytorch_lightning", "matplotlib", "torchdeq", "scipy", "rich", "jsonargparse")
STATEMENTS = [
    "import hopdeq_lwpf",
    "from hopdeq_lwpf import retrieve",
    "from hopdeq_lwpf import Equilibrium, Solution, Termination, fixed_point, forgetting, models, solvers",
    "import torch, hopdeq_lwpf; hopdeq_lwpf.retrieve(torch.ones(2, 3), torch.eye(3))",
]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("statement", STATEMENTS)
def test_import_leaves_heavy_packages_alone(statement):
    found = f"import sys; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    assert run(f"{statement}\n{found}").strip() == "[]"


def test_the_check_above_can_fail():
    # torch itself may import some of these one day; then the test above has to say so.
    assert run("import rich, sys; print('rich' in sys.modules)").strip() == "True"


def test_import_works_where_heavy_packages_are_missing():
    block = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n"
    shape = (
        "import torch, hopdeq_lwpf as h; print(tuple(h.retrieve(torch.ones(2, 3), torch.eye(3)).value.shape))"
    )
    assert run(block + shape).strip() == "(2, 3)"


def test_the_package_alone_does_not_even_import_torch():
    assert (
        run("import sys, hopdeq_lwpf; print(hopdeq_lwpf.__version__, 'torch' in sys.modules)").split()[1]
        == "False"
    )


def test_importing_prints_nothing():
    assert run(STATEMENTS[2]) == ""


@pytest.mark.parametrize("name", hopdeq_lwpf.__all__)
def test_public_names_resolve(name):
    assert getattr(hopdeq_lwpf, name) is not None
    assert name in dir(hopdeq_lwpf)


def test_public_names_are_those_promised():
    promised = {
        *("retrieve", "fixed_point", "Equilibrium", "Termination", "Solution", "Result", "ConvergenceError"),
        *("find", "forgetting", "solvers", "models", "__version__"),
    }
    assert promised <= set(hopdeq_lwpf.__all__)
    solver_names = {"Picard", "Anderson", "Broyden", "LBFGS", "Implicit", "Unrolled", "OneStep"}
    assert solver_names | {"Termination", "register_solver", "build"} <= set(hopdeq_lwpf.solvers.__all__)
    for name in hopdeq_lwpf.solvers.__all__:
        assert getattr(hopdeq_lwpf.solvers, name) is not None


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="'retreive'"):
        hopdeq_lwpf.retreive  # noqa: B018
