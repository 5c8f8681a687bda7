"""fixed_point() on maps that contract, expand, jump or return NaN; on pytrees, with all solvers and adjoints."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from fuzz.profiles import answer, examples
from fuzz.strategies import DTYPES, adjoints, chosen_solvers, tensors, terminations
from hopdeq_lwpf import ConvergenceError, Equilibrium, Result, fixed_point, solvers
from hopdeq_lwpf._types import wide

# What a valid call may be refused for: an adjoint that needs a metric or an energy of f.
ARGUMENTS = ("adjoint", "z0")


class Rows:
    """A map of rows (..., n), and what it is called."""

    state_ndim = 1

    def __init__(self, name, function):
        self.name, self.function = name, function

    def __call__(self, z, x):
        return self.function(z, x)

    def __repr__(self):
        return f"Rows({self.name!r})"


MAPS = [
    Rows("contracting", lambda z, x: 0.5 * z + x),
    Rows("tanh", lambda z, x: torch.tanh(2.0 * z.flip(-1) + x)),
    Rows("expanding", lambda z, x: 3.0 * z + x),
    Rows("rotating", lambda z, x: -z.flip(-1) + x),
    Rows("identity", lambda z, x: z + 0 * x),
    Rows("constant", lambda z, x: x.expand_as(z)),
    Rows("square", lambda z, x: z.square() + x),
    Rows("root", lambda z, x: (z + x).sqrt()),
    Rows("inverse", lambda z, x: 1.0 / z + 0 * x),
    Rows("jump", lambda z, x: torch.where(z > x, z - 1, z + 1)),
    Rows("nothing", lambda z, x: z * math.nan + x),
    Rows("NaN above 1", lambda z, x: torch.where(z.abs() > 1, math.nan, 0.9 * z + 0.3) + 0 * x),
]
MILD = [f for f in MAPS if f.name in ("contracting", "tanh", "constant", "identity")]


@st.composite
def problems(draw, maps=MAPS, kind="moderate", dtypes=DTYPES):
    """f, x, z0 of any batch shape."""
    shape = (*draw(st.lists(st.integers(0, 4), max_size=2)), draw(st.integers(1, 4)))
    dtype = draw(st.sampled_from(dtypes))
    return (
        draw(st.sampled_from(maps)),
        draw(tensors(shape, dtype, "moderate")),
        draw(tensors(shape, dtype, kind)),
    )


def check(solution, z0, stop, steps):
    """Codes, counts and residuals that fit together."""
    batch = z0.shape[:-1]
    for name in ("result", "residual", "steps", "evaluations"):
        assert getattr(solution, name).shape == batch, name
    assert set(solution.result.flatten().tolist()) <= {int(code) for code in Result}
    assert (solution.steps <= (stop.max_steps if steps is None else steps)).all()
    assert (solution.evaluations >= solution.steps).all()
    done = solution.converged
    assert solution.state[done].isfinite().all()
    assert solution.residual[done].isfinite().all()
    assert (solution.residual[~done] >= 0).sum() + solution.residual[~done].isnan().sum() == (~done).sum()
    (solution.result == Result.NONFINITE).any() and solution.failure()


@examples(60)
@given(
    problems(kind="any"), chosen_solvers(), terminations(), st.sampled_from((None, None, 1, 3)), st.booleans()
)
def test_every_problem_ends_with_a_code_that_is_true(problem, solver, stop, steps, trace):
    f, x, z0 = problem
    solution = answer(
        lambda: fixed_point(f, x, z0, steps=steps, solver=solver, stop=stop, trace=trace), *ARGUMENTS
    )
    check(solution, z0, stop, steps)
    lost = ~z0.isfinite().all(-1)
    if f.name == "nothing":
        assert not solution.converged.any()
    if f.name in ("contracting", "tanh", "expanding"):
        assert (solution.result[lost] == Result.NONFINITE).all() or f.name == "tanh"
    if z0.dtype == torch.float64 and steps is None:
        done = solution.converged
        image = f(solution.state, x)
        distance, size = (torch.linalg.vector_norm(part, dim=-1) for part in (image - solution.state, image))
        assert (distance <= (stop.rtol * size + stop.atol) * (1 + 1e-9))[done].all()
    if trace and steps is None:
        assert solution.trace.residual.shape[1:] == z0.shape[:-1]


@examples(25)
@given(problems(kind="any", dtypes=(torch.float64,)), chosen_solvers(), terminations())
def test_a_problem_never_sees_another(problem, solver, stop):
    f, x, z0 = problem
    if not stop.rtol + stop.atol:
        stop = solvers.Termination(max_steps=stop.max_steps)  # without tolerance the last rounding decides
    whole = answer(lambda: fixed_point(f, x, z0, solver=solver, stop=stop))
    for place in range(z0[..., 0].numel()):
        row = z0.reshape(-1, z0.shape[-1])[place : place + 1]
        single = fixed_point(f, x.reshape(-1, x.shape[-1])[place : place + 1], row, solver=solver, stop=stop)
        assert single.result.item() == whole.result.flatten()[place].item()
        # Maps that expand or turn at once amplify the rounding of sums taken in another order.
        if f.name in ("contracting", "tanh", "constant", "identity", "NaN above 1"):
            state = whole.state.reshape(row.shape[-1:] if not row.shape[0] else (-1, row.shape[-1]))[place]
            assert torch.allclose(single.state[0], state, rtol=1e-6, atol=1e-6, equal_nan=True)


@examples(30)
@given(problems(MILD), chosen_solvers(), adjoints(), terminations())
def test_gradients_of_mild_maps_are_numbers(problem, solver, adjoint, stop):
    f, x, z0 = problem
    x.requires_grad_()

    def both():
        solution = fixed_point(f, x, z0, solver=solver, adjoint=adjoint, stop=stop)
        if solution.value.requires_grad:
            wide(solution.value).square().sum().backward()
        return solution

    solution = answer(both, *ARGUMENTS)
    if solution is None:
        return
    check(solution, z0, stop, None)
    # Of the identity every state is an equilibrium, and I - J is 0.
    if x.grad is not None and f.name != "identity":
        assert x.grad.isfinite().all()


TREES = st.sampled_from(("dict", "tuple", "nested"))


def tree(kind, a, b):
    return {"dict": {"b": a, "a": b}, "tuple": (a, b), "nested": [a, {"x": (b,)}]}[kind]


@examples(25)
@given(
    TREES,
    st.integers(0, 3),
    st.tuples(*(st.sampled_from(DTYPES),) * 2),
    chosen_solvers(),
    adjoints(),
    st.data(),
)
def test_pytrees_keep_structure_and_dtypes(kind, batch, dtypes, solver, adjoint, data):
    shapes = ((batch, data.draw(st.integers(0, 2))), (batch, 2, 1))
    leaves = [data.draw(tensors(shape, dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]
    z0 = tree(kind, *leaves)
    x = torch.tensor(0.5, requires_grad=True)

    def f(z, x):
        return pytree.tree_map(lambda leaf: torch.tanh(leaf * x.to(leaf.dtype) + 0.1), z)

    def both():
        solution = fixed_point(f, x, z0, solver=solver, adjoint=adjoint)
        found = pytree.tree_leaves(solution.value)
        if any(leaf.requires_grad for leaf in found):
            sum(wide(leaf).double().sum() for leaf in found).backward()
        return solution

    solution = answer(both, *ARGUMENTS)
    if solution is None:
        return
    assert pytree.tree_structure(solution.state) == pytree.tree_structure(z0)
    for before, after in zip(leaves, [leaf for leaf in pytree.tree_leaves(solution.state)], strict=True):
        assert after.isfinite().all()
        assert before.shape in {leaf.shape for leaf in leaves}
    assert solution.result.shape == (batch,)
    assert x.grad is None or bool(x.grad.isfinite())


@examples(15)
@given(
    st.sampled_from(
        (
            lambda z, x: z[..., :1],
            lambda z, x: (z, z),
            lambda z, x: None,
            lambda z, x: z.sum(),
            lambda z, x: {"a": z, "b": z},
            lambda z, x: {"a": z},
            lambda z, x: z.unsqueeze(0),
            lambda z, x: 1.0,
        )
    ),
    st.integers(0, 3),
    st.sampled_from((None, 1, 2)),
    chosen_solvers(),
)
def test_a_map_of_another_shape_is_refused(f, batch, steps, solver):
    z0 = torch.zeros(batch, 2)
    assert answer(lambda: fixed_point(f, (), z0, steps=steps, solver=solver), "f(z, x)") is None


@examples(15)
@given(
    st.sampled_from(
        (
            None,
            1.0,
            "z",
            [],
            {},
            torch.tensor(1.0),
            torch.zeros(2, 2, dtype=torch.int64),
            [torch.zeros(2, 1), 3.0],
        )
        + ((torch.zeros(2, 1), torch.zeros(3, 1)), torch.zeros(2, 2, dtype=torch.complex64))
    ),
    st.sampled_from((None, 1)),
)
def test_a_start_that_is_no_state_is_refused(z0, steps):
    assert answer(lambda: fixed_point(lambda z, x: z, (), z0, steps=steps), "z0", "state") is None


@examples(15)
@given(
    problems(kind="any"),
    chosen_solvers(),
    st.sampled_from(("warn", "raise", "ignore")),
    st.sampled_from((None, 2)),
)
def test_an_equilibrium_module_answers_or_raises_what_it_says(problem, solver, on_failure, steps):
    f, x, z0 = problem
    layer = Equilibrium(f, solver=solver, steps=steps, on_failure=on_failure)
    try:
        value = answer(lambda: layer(x, z0), *ARGUMENTS)
    except ConvergenceError:
        value = None
    if value is None:
        assert on_failure == "raise"
    else:
        assert value.shape == z0.shape
