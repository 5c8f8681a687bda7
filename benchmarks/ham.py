"""Hierarchical memories: time to equilibrium beside torchdeq's solvers, and a step of training.

784-1280-510-200-10 at first weights, inputs like pixels of MNIST, batches of 64. Equilibria of the one-matrix form and
of the even-odd form are the same, so that all states are judged by their even layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torchdeq.solver import get_solver

from benchmarks.peers import PEERS, residual
from benchmarks.timing import interleaved
from hopdeq_lwpf import Solution
from hopdeq_lwpf.data import load_digits, read_idx
from hopdeq_lwpf.diagnostics import basin_changed, picard_limit
from hopdeq_lwpf.models import HAM
from hopdeq_lwpf.models.even_odd import ThroughEvenOdd
from hopdeq_lwpf.models.hierarchical import HAMFunction
from hopdeq_lwpf.models.layered import HierarchicalContext
from hopdeq_lwpf.solvers import LBFGS, Implicit, Neumann, Picard, Solver, Termination, TorchDEQ, fixed_point

DEEP = (784, 1280, 510, 200, 10)
SHALLOW = (784, 1990, 10)
BATCH = 64
BATCHES = 4  # networks and batches whose basins are counted; the first TIMED of them are timed
TIMED = 2
COMPARED = 1e-4  # the tolerance at which torchdeq's solvers run too; below it they need minutes
CASES = ((torch.float32, COMPARED), (torch.float32, 1e-6), (torch.float64, 1e-6))
# Iterations of torchdeq's solvers; plain ones of the even-odd form get there late, those of the other form cycle.
LIMITS = {"torchdeq fixed point": 2000}
LIMIT = 600
EXACT = Termination(rtol=1e-8, max_steps=10_000)
FASTEST = LBFGS(guard=False, step_cap=10.0)


@dataclass(frozen=True)
class Problem:
    """A form of a network with one batch: f, its context, where it starts, and where plain iteration ends."""

    f: HAMFunction
    x: HierarchicalContext
    z0: Tensor
    end: Solution  # of the even layers, in float64
    pixels: Tensor

    def even(self, state: Tensor) -> Tensor:
        """The even layers of a state."""
        return state if self.f.even_odd else self.f.even_layers(state)

    def changed(self, state: Tensor) -> tuple[int, int]:
        """How many states are more than 5 % from where they belong; how many would not get there any more.

        Where the contraction is .995, a residual of 1e-4 may leave 2 % and more: the second number plainly iterates on.
        """
        even = self.even(state)
        rows = basin_changed(even, self.end).nonzero().squeeze(1)
        if not len(rows):
            return 0, 0
        f = copy.deepcopy(self.f).in_form(True).double()  # the forms share their parameters
        x = f.prepare(self.pixels[rows].double())
        later = fixed_point(f, x, even[rows].double(), solver=Picard(), stop=EXACT).state
        limit = self.end.state[rows]
        return len(rows), int(((later - limit).norm(dim=-1) > 0.05 * limit.norm(dim=-1)).sum())


def pixels(mnist: Path | None) -> tuple[Tensor, Tensor]:
    """Pictures (N, 784) in [0, 1] and labels: of MNIST from its IDX files, else 8 x 8 digits made larger."""
    if mnist is not None:
        images = read_idx(mnist / "train-images-idx3-ubyte").flatten(1).float() / 255
        return images, read_idx(mnist / "train-labels-idx1-ubyte").long()
    small, labels = load_digits()
    large = functional.interpolate(small.reshape(-1, 1, 8, 8), size=(28, 28), mode="bilinear")
    return large.flatten(1), labels


def _network(layers: tuple[int, ...], seed: int, **options: object) -> HAM:
    torch.manual_seed(seed)
    return HAM(layers, **options)  # type: ignore[arg-type]


def _rows(images: Tensor, seed: int) -> Tensor:
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:BATCH]


def problem(images: Tensor, seed: int, even_odd: bool, dtype: torch.dtype, end: Solution) -> Problem:
    """The network of this seed with the batch of this seed."""
    f = _network(DEEP, seed, even_odd=even_odd).f.to(dtype)
    batch = images[_rows(images, seed)].to(dtype)
    x = f.prepare(batch)
    return Problem(f, x, f.init(x), end, batch)


def _end(images: Tensor, seed: int) -> Solution:
    f = _network(DEEP, seed, even_odd=True).f
    x = f.double().prepare(images[_rows(images, seed)].double())
    end = picard_limit(f, x, f.init(x), stop=EXACT)
    end.require()
    return end


def _ours(problem: Problem, solver: str | Solver, stop: Termination) -> Solution:
    return fixed_point(problem.f, problem.x, problem.z0, solver=solver, stop=stop)


def _theirs(problem: Problem, name: str, iterations: int) -> Tensor:
    """torchdeq's solver as torchdeq runs it, for so many iterations."""
    solver, options = PEERS[name]
    g = partial(problem.f.forward, x=problem.x)
    end = {"max_iter": iterations, "tol": 0.0, "stop_mode": "rel"}
    state: Tensor = get_solver(solver)(g, problem.z0, **end, **options)[0]
    return state


def _oracle(problem: Problem, name: str, tolerance: float) -> Solution:
    """The iterates of torchdeq's solver, each problem recorded at its first within the tolerance."""
    solver, options = PEERS[name]
    limit = LIMITS.get(name, LIMIT) if problem.f.even_odd else LIMIT
    stop = Termination(rtol=tolerance, atol=0.0, max_steps=limit, check_every=1)
    return _ours(problem, TorchDEQ(solver, **options), stop)  # type: ignore[arg-type]


def _same(problems: list[Problem], name: str, counts: list[int], tolerance: float) -> bool:
    """Whether torchdeq by itself, for these numbers of iterations, meets the tolerance too."""
    for problem, count in zip(problems[:TIMED], counts, strict=False):
        try:
            state = _theirs(problem, name, count)
        except torch.linalg.LinAlgError:
            return False
        if bool((residual(partial(problem.f.forward, x=problem.x), state) > 1.01 * tolerance).any()):
            return False
    return True


def solvers(even_odd: bool) -> dict[str, str | Solver]:
    """Ours, of this form."""
    default = HAM((2, 2, 2), even_odd=even_odd).solver
    fastest = FASTEST if even_odd else ThroughEvenOdd(FASTEST)
    return {"default": default, "fastest": fastest, "picard": "picard", "broyden": "broyden"}  # type: ignore[dict-item]


@dataclass
class _Row:
    """Sums over the batches."""

    worst: float = 0.0
    unconverged: int = 0
    changed: int = 0
    other_basin: int = 0
    evaluations: float = 0.0

    def add(self, problem: Problem, state: Tensor, tolerance: float, evaluations: float) -> None:
        found = residual(partial(problem.f.forward, x=problem.x), state).nan_to_num(1e9)
        changed, other = problem.changed(state)
        self.worst = max(self.worst, float(found.max()))
        # The test allows 1e-8 beside the relative tolerance.
        self.unconverged += int((found > 1.01 * tolerance).sum())
        self.changed += changed
        self.other_basin += other
        self.evaluations += evaluations / BATCHES


@torch.no_grad()
def equilibria(
    mnist: Path | None, even_odd: bool, dtype: torch.dtype, tolerance: float, ends: list[Solution]
) -> list[dict[str, object]]:
    """One row a solver of this form; milliseconds a batch, medians of interleaved runs, where all converged."""
    images, _ = pixels(mnist)
    problems = [problem(images, seed, even_odd, dtype, end) for seed, end in enumerate(ends)]
    rows: dict[str, _Row] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name in PEERS if tolerance == COMPARED else ():
        row, counts = rows.setdefault(name, _Row()), []
        for each in problems:
            found = _oracle(each, name, tolerance)
            counts.append(int(found.evaluations.max()))
            row.add(each, found.state, tolerance, counts[-1])
        if not row.unconverged and _same(problems, name, counts, tolerance):
            timed = list(zip(problems[:TIMED], counts, strict=False))
            calls[name] = lambda name=name, timed=timed: [_theirs(each, name, n) for each, n in timed]  # type: ignore[misc]
    stop = Termination(rtol=tolerance, max_steps=2000)
    for name, solver in solvers(even_odd).items():
        row = rows[name] = _Row()
        for each in problems:
            found = _ours(each, solver, stop)
            row.add(each, found.state, tolerance, float(found.evaluations.double().mean()))
        if not row.unconverged:
            calls[name] = lambda solver=solver: [_ours(each, solver, stop) for each in problems[:TIMED]]  # type: ignore[misc]
    times = interleaved(calls, rounds=5, warmup=1)
    head = {
        "data": "digits" if mnist is None else "mnist", "form": "even-odd" if even_odd else "one matrix",
        "dtype": str(dtype).removeprefix("torch."), "tolerance": tolerance,
    }  # fmt: skip
    return [
        {
            **head, "solver": name, "ms": round(times[name] / TIMED, 1) if name in times else None,
            "residual": row.worst, "unconverged": row.unconverged, "changed": row.changed,
            "other basin": row.other_basin,
            "problems": BATCH * BATCHES, "evaluations": round(row.evaluations, 1),
        }
        for name, row in rows.items()
    ]  # fmt: skip


def _loss(network: HAM, x: Tensor, labels: Tensor) -> Tensor:
    """|s - one-hot|^2 / 2, the mean over the batch."""
    return 0.5 * (network(x) - functional.one_hot(labels, 10)).square().sum(-1).mean()


def _gradient(network: HAM, x: Tensor, labels: Tensor) -> Tensor:
    """That of the loss to all parameters."""
    parts = torch.autograd.grad(_loss(network, x, labels), list(network.parameters()))
    return torch.cat([part.flatten() for part in parts])


def _trained(images: Tensor, labels: Tensor, layers: tuple[int, ...], updates: int) -> dict[str, Tensor]:
    """The weights of the network after so many batches with Adam at 1e-3."""
    network = _network(layers, 0, even_odd=True, stop=Termination(rtol=1e-4), on_failure="ignore")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        rows = torch.randint(0, len(images), (BATCH,), generator=generator)
        optimizer.zero_grad()
        _loss(network, images[rows], labels[rows]).backward()
        optimizer.step()
    return network.state_dict()


def training(
    mnist: Path | None, layers: tuple[int, ...], budget: tuple[int, int], updates: int
) -> list[dict[str, object]]:
    """A step of training: the published budget of iterations, forward and backward, beside our defaults at 1e-4.

    At weights that were trained for so many updates. Milliseconds of forward and backward pass together, and the
    error of the gradient relative to float64 solved to 1e-11. The budget is tested only at its end, so that it pays
    for nothing but its iterations.
    """
    images, labels = pixels(mnist)
    rows = _rows(images, 0)
    x, y = images[rows], labels[rows]
    weights = _trained(images, labels, layers, updates)
    end = Termination(rtol=0.0, atol=0.0, max_steps=budget[0], check_every=budget[0])
    methods: dict[str, dict[str, object]] = {
        f"budget {budget[0]} + {budget[1]}": {"solver": Picard(), "stop": end, "adjoint": Neumann(budget[1])},
        "default 1e-4": {"stop": Termination(rtol=1e-4)},
    }
    tight = {"stop": Termination(1e-11, 0.0, 20_000), "adjoint": Implicit("gmres", 1e-11)}
    exact = _network(layers, 0, even_odd=True, solver="picard", **tight)
    exact.load_state_dict(weights)
    true = _gradient(exact.double(), x.double(), y)
    networks: dict[str, HAM] = {}
    for even_odd in (False, True):
        for method, options in methods.items():
            network = _network(layers, 0, even_odd=even_odd, on_failure="ignore", **options)
            network.load_state_dict(weights)
            networks[f"{'even-odd' if even_odd else 'one matrix'}, {method}"] = network
    found = {name: _gradient(network, x, y).double() for name, network in networks.items()}
    calls = {name: partial(_gradient, network, x, y) for name, network in networks.items()}
    times = interleaved(dict(calls), rounds=15)
    return [
        {
            "data": "digits" if mnist is None else "mnist", "layers": "-".join(map(str, layers)), "updates": updates,
            "method": name, "ms": round(times[name], 1),
            "gradient error": float((found[name] - true).norm() / true.norm()),
            "residual": float(network.last_solution.residual.max()),  # type: ignore[union-attr]
            "evaluations": round(float(network.last_solution.evaluations.double().mean()), 1),  # type: ignore[union-attr]
        }
        for name, network in networks.items()
    ]  # fmt: skip


def run(mnist: Path | None = None) -> list[dict[str, object]]:
    """Training rows first; one row a form, precision, tolerance and solver then."""
    rows: list[dict[str, object]] = []
    for layers, budget, updates in ((SHALLOW, (40, 8), 200), (DEEP, (80, 16), 60)):
        rows += [*training(mnist, layers, budget, 0), *training(mnist, layers, budget, updates)]
    images, _ = pixels(mnist)
    with torch.no_grad():
        ends = [_end(images, seed) for seed in range(BATCHES)]
    for dtype, tolerance in CASES:
        for even_odd in (True, False):
            rows += equilibria(mnist, even_odd, dtype, tolerance, ends)
    return rows
