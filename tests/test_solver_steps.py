"""Steps of the accelerated solvers beside dense twins; which rows are evaluated; what never waits for a device."""

import dataclasses

import pytest
import torch
from problems import F64, Map, normal
from references import exactly
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from hopdeq_lwpf import Termination, fixed_point
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.solvers import LBFGS, Anderson, Broyden, Iterate, lbfgs

N = 7
NEVER = {"rtol": 0.0, "atol": 0.0}


def smooth():
    """A symmetric contraction with a bend, of an energy; three problems that need different steps."""
    basis = torch.linalg.qr(normal(N, N, seed=3))[0]
    matrix = (basis * torch.linspace(0.1, 0.95, N, dtype=F64)) @ basis.T
    return Map(lambda z, b: torch.tanh(z @ matrix.T) + b), (0.3 * normal(3, N, seed=4),), normal(3, N, seed=5)


def iterates(solver, steps, f, x, z0):
    """The points at which f was evaluated: (steps + 1, B, n)."""
    seen = []

    def watched(z, x):
        seen.append(z.clone())
        return f(z, x)

    with torch.no_grad():
        fixed_point(watched, x, z0, solver=solver, stop=Termination(**NEVER, max_steps=steps))
    return torch.stack(seen)


def anderson_twin(steps, f, x, z, memory, damping):
    """z + b r - (dZ + b dR) g of one problem, |r - dR g| least (Walker & Ni 2011), b = 1 - damping."""
    share, points, residuals = 1 - damping, [z], [f(z[None], x)[0] - z]
    for _ in range(steps):
        z, r = points[-1], residuals[-1]
        step = share * r
        if len(points) > 1:
            dz = torch.stack([b - a for a, b in zip(points, points[1:], strict=False)], 1)[:, -memory:]
            dr = torch.stack([b - a for a, b in zip(residuals, residuals[1:], strict=False)], 1)[:, -memory:]
            step = step - (dz + share * dr) @ torch.linalg.lstsq(dr, r[:, None]).solution[:, 0]
        points.append(z + step)
        residuals.append(f(points[-1][None], x)[0] - points[-1])
    return torch.stack(points)


def broyden_twin(steps, f, x, z):
    """Good Broyden of one problem with its inverse Jacobian H as a matrix, from H = -I (Broyden 1965)."""
    inverse, points, r = -torch.eye(N, dtype=F64), [z], f(z[None], x)[0] - z
    for _ in range(steps):
        points.append(points[-1] - inverse @ r)
        s, after = points[-1] - points[-2], f(points[-1][None], x)[0] - points[-1]
        hy = inverse @ (after - r)
        inverse, r = inverse + torch.outer(s - hy, s @ inverse) / (s @ hy), after
    return torch.stack(points)


def bfgs_twin(steps, f, x, z, memory):
    """L-BFGS of one problem, H a matrix made from I and the last pairs (Nocedal & Wright 2006, eq. 7.16)."""
    eye = torch.eye(N, dtype=F64)
    points, residuals, pairs = [z], [f(z[None], x)[0] - z], []
    for _ in range(steps):
        inverse = eye
        for s, y in pairs[-memory:]:
            left = eye - torch.outer(s, y) / (s @ y)
            inverse = left @ inverse @ left.T + torch.outer(s, s) / (s @ y)
        points.append(points[-1] + inverse @ residuals[-1])
        residuals.append(f(points[-1][None], x)[0] - points[-1])
        pairs.append((points[-1] - points[-2], residuals[-2] - residuals[-1]))
    return torch.stack(points)


def row(x, i):
    return tuple(part[i : i + 1] for part in x)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("memory", [1, 2, 4])
def test_anderson_makes_the_steps_of_least_squares(memory, damping):
    f, x, z0 = smooth()
    # No ridge but that of 8 ulp; restarts off, since the twin has none.
    solver = Anderson(memory=memory, damping=damping, ridge=0.0, restart=1e9)
    found = iterates(solver, 6, f, x, z0)
    for i in range(len(z0)):
        # The condition of the columns, up to 1e4 here, times an ulp and the ridge.
        assert_close(found[:, i], anderson_twin(6, f, row(x, i), z0[i], memory, damping), rtol=0, atol=1e-8)


def test_broyden_makes_the_steps_of_the_dense_inverse():
    f, x, z0 = smooth()
    found = iterates(Broyden(memory=20, step_cap=1e9, restart=1e9), 8, f, x, z0)
    for i in range(len(z0)):
        assert_close(found[:, i], broyden_twin(8, f, row(x, i), z0[i]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("memory", [1, 3, 10])
def test_lbfgs_makes_the_steps_of_the_dense_inverse(memory):
    f, x, z0 = smooth()
    # Accelerated from the first pair on, and nothing that would hold a step back.
    solver = LBFGS(memory=memory, warmup=1, align=-1.0, patience=0, step_cap=1e9, escape=0.0, guard=False)
    found = iterates(solver, 6, f, x, z0)
    for i in range(len(z0)):
        assert_close(found[:, i], bfgs_twin(6, f, row(x, i), z0[i], memory), rtol=0, atol=1e-9)


def proposals(solver, points, images):
    """What the solver proposes of given points (T, B, n) and their images, whatever it proposed before."""
    memory, found = None, []
    for step, (z, fz) in enumerate(zip(points, images, strict=True)):
        proposed, memory = solver.propose(memory, Iterate(step, z, fz, None, None, None, 1e-16, 0.0))
        found.append(proposed)
    return torch.stack(found)


@pytest.mark.parametrize("solver", [Anderson(memory=3), Broyden(memory=20)], ids=repr)
def test_a_row_whose_residual_grows_starts_anew_and_no_other_does(solver):
    points, residuals = normal(9, 2, N, seed=6), normal(9, 2, N, seed=7)
    residuals = residuals / residuals.norm(dim=-1, keepdim=True)
    residuals[4:, 1] *= 100
    both = proposals(solver, points, points + residuals)
    alone = proposals(solver, points[:, :1], (points + residuals)[:, :1])
    anew = proposals(solver, points[4:, 1:], (points + residuals)[4:, 1:])
    # Rounding, times the largest of the proposals of unrelated points.
    bound = 1e-12 * float(both.abs().max())
    assert_close(both[:, :1], alone, rtol=0, atol=bound)
    assert_close(both[4:, 1:], anew, rtol=0, atol=bound)
    kept = proposals(dataclasses.replace(solver, restart=1e9), points, points + residuals)
    assert (kept[4:, 1] - both[4:, 1]).norm() > 1


def test_few_problems_are_dropped_by_halves():
    patterns = normal(32, 6) / 4
    f = Retrieval(torch.tensor([0.1, 0.1, 0.1, 0.1, 2.6, 2.7, 2.8], dtype=F64))
    x = f.prepare(patterns[:7] + 0.2, patterns)
    sizes = []
    f.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    solution = fixed_point(f, x, x.start, solver="picard", stop=Termination(rtol=1e-9, max_steps=1000))
    assert solution.converged.all()
    counts = list(dict.fromkeys(sizes))
    assert counts[0] == 7
    assert len(counts) > 1
    assert all(after <= before / 2 for before, after in zip(counts, counts[1:], strict=False))


OPTIONS = [
    {},
    {"forgetting": PFU()},
    {"forgetting": "topk"},
    {"similarity": "euclidean"},
    {"inject": "input"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize("trace", [False, True])
def test_a_fixed_number_of_steps_never_waits_for_the_device(options, trace):
    """Tensors without numbers: whoever asks for one, which on a GPU is a synchronisation, raises."""
    f = Retrieval(2.0, **options)
    x = f.prepare(normal(5, 8), normal(12, 8, seed=2), torch.arange(12) == 3)
    with FakeTensorMode() as mode:
        fake = pytree.tree_map_only(torch.Tensor, mode.from_tensor, x)
        solution = fixed_point(f, fake, fake.start, steps=3, trace=trace)
        assert solution.value.shape == (5, 8)
        assert solution.result.shape == (5,)
        with pytest.raises(DataDependentOutputException):
            fixed_point(f, fake, fake.start)


def test_what_is_reported_of_rows_that_were_taken_back_is_of_the_state_returned(monkeypatch):
    taken = []
    original = lbfgs._take_back

    def counted(old, new, worse):
        taken.append(int(worse.sum()))
        back = original(old, new, worse)
        exactly(back.z, torch.where(worse[:, None], old.z, new.z))
        exactly(back.r, torch.where(worse[:, None], old.r, new.r))
        assert_close(back.size, back.r.norm(dim=-1))
        assert not back.accelerated[worse].any()
        return back

    monkeypatch.setattr(lbfgs, "_take_back", counted)
    patterns = normal(40, 6, seed=8)
    f = Retrieval(3.0, forgetting=PFU(1.0))
    x = f.prepare(patterns[:20] + 0.4 * normal(20, 6, seed=9), patterns)
    # Accelerated at once, so that kinks are crossed and energies raised.
    solver = LBFGS(align=-1.0, patience=0)
    for steps in (3, 6, 9, 14):
        solution = fixed_point(f, x, x.start, solver=solver, stop=Termination(**NEVER, max_steps=steps))
        image = f(solution.state, x)
        residual = (image - solution.state).norm(dim=-1) / image.norm(dim=-1)
        assert_close(solution.residual, residual.detach(), rtol=1e-6, atol=1e-15, equal_nan=True)
    assert 0 < max(taken) < 20
