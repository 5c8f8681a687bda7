"""retrieve() over shapes, dtypes, magnitudes and options: every query ends with a code that says what it is worth."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzz.profiles import answer, examples
from fuzz.strategies import (
    DTYPES,
    adjoints,
    chosen_solvers,
    forgetting_units,
    masks,
    moderate_positive,
    positive,
    separations,
    tensors,
    terminations,
)
from hopdeq_lwpf import Result, retrieve
from hopdeq_lwpf._types import WIDE
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.separation import LSR, Polynomial, make_separation

# What a refusal may be about, by the options that a valid call can still have: an adjoint that needs what f has not.
ARGUMENTS = ("adjoint", "normalize", "inject_weight", "query")


@st.composite
def shapes(draw):
    """Batch shape of the queries, shapes of the patterns and of a mask."""
    # From 8 queries on those that have stopped are dropped.
    batch = tuple(draw(st.lists(st.integers(0, 3), max_size=2) | st.sampled_from(((9,), (2, 6), (12, 1)))))
    count, width = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    leading = [(), batch] + ([batch[:-1]] if batch else [])
    patterns = (*draw(st.sampled_from(leading)), count, width)
    mask = draw(st.sampled_from((None, None, patterns[:-1], (*batch, count))))
    return batch, patterns, mask


@st.composite
def calls(draw, kind, dtypes=DTYPES, floats=positive):
    """Query, patterns and the options of a call that is right in form."""
    batch, shape, mask = draw(shapes())
    dtype = draw(st.sampled_from(dtypes))
    query, patterns = (
        draw(tensors((*batch, shape[-1]), dtype, kind)),
        draw(tensors(shape, dtype, "moderate" if kind == "any" else kind)),
    )
    number = floats.filter(lambda value: torch.tensor(value).to(torch.float64).item() > 0)
    numbers = st.one_of(
        floats,
        floats.map(lambda value: torch.tensor(value, dtype=torch.float64)),
        st.lists(
            number, min_size=max(1, len(batch) and batch[-1]), max_size=max(1, len(batch) and batch[-1])
        ).map(lambda values: torch.tensor(values, dtype=torch.float64)),
    )
    similarity = draw(st.sampled_from((None, "dot", "euclidean")))
    options = {
        "beta": draw(numbers),
        "separation": draw(separations()),
        "forgetting": draw(forgetting_units(shape[-2])),
        "similarity": similarity,
        "normalize": draw(st.sampled_from((None, None, "sphere", "layernorm")))
        if similarity == "dot"
        else None,
        "inject": draw(st.sampled_from(("start", "input"))),
        "inject_weight": draw(st.sampled_from((1.0, 0.1, 0.0, torch.tensor(2.0)))),
        "mask": None if mask is None else draw(masks(mask)),
        "values": draw(
            st.none() | st.integers(1, 3).flatmap(lambda dv: tensors((*shape[:-1], dv), dtype, "moderate"))
        ),
        "steps": draw(st.sampled_from((None, None, 1, 2, 3))),
        "solver": draw(chosen_solvers()),
        "stop": draw(terminations()),
        "trace": draw(st.booleans()),
    }
    return query, patterns, options


def check_codes(recall, query, patterns, options):
    """Shapes, and what each code promises."""
    batch, count = query.shape[:-1], patterns.shape[-2]
    stop = options["stop"]
    for name in ("result", "residual", "steps", "evaluations", "index", "weight", "support"):
        assert getattr(recall, name).shape == batch, name
    assert recall.state.shape == query.shape
    assert recall.state.dtype == query.dtype
    read = patterns if options["values"] is None else options["values"]
    assert recall.value.shape == (*batch, read.shape[-1])
    assert ((recall.index >= -1) & (recall.index < count)).all()
    assert ((recall.support >= 0) & (recall.support <= count)).all()
    assert set(recall.result.flatten().tolist()) <= {int(code) for code in Result}
    done = recall.converged
    assert recall.state[done].isfinite().all()
    assert recall.residual[done].isfinite().all()
    lost = ~query.isfinite().all(-1)
    assert (recall.result[lost] != Result.CONVERGED).all()
    most = stop.max_steps if options["steps"] is None else options["steps"]
    assert (recall.steps <= most).all()


def check_residual(recall, query, patterns, options):
    """The residual anew, of moderate numbers in float64: what is called converged is."""
    stop, unit = options["stop"], options["forgetting"]
    noisy, coupled = getattr(unit, "noise", 0.0) > 0, getattr(unit, "scope", "row") == "tensor"
    if query.dtype != torch.float64 or noisy or coupled:
        return
    state = recall.state.detach()
    if options["steps"] is None:
        names = ("beta", "separation", "forgetting", "similarity", "normalize", "inject", "inject_weight")
        f = Retrieval(**{name: options[name] for name in names})
        with torch.no_grad():
            image = f(state, f.prepare(query.detach(), patterns.detach(), options["mask"]))
        distance, size = (torch.linalg.vector_norm(part, dim=-1) for part in (image - state, image))
        residual = distance / size.clamp_min(torch.finfo(size.dtype).tiny)
        # Other sums are taken where other queries have been dropped.
        assert torch.allclose(residual, recall.residual, rtol=1e-6, atol=1e-9)
    else:
        size = torch.linalg.vector_norm(state, dim=-1)
        distance = torch.where(size > 0, recall.residual * size, recall.residual)
    bound = stop.rtol * size + stop.atol
    assert (distance <= bound * (1 + 1e-6) + 1e-12)[recall.converged].all()
    assert (distance >= bound * (1 - 1e-6) - 1e-12)[recall.result == Result.MAX_STEPS].all()


def unbounded(options):
    """Whether the iteration may grow without bound: weights that do not sum to 1."""
    separation = make_separation(options["separation"])
    return isinstance(separation, (Polynomial, LSR)) and options["similarity"] != "euclidean"


@examples(50)
@given(calls("moderate", floats=moderate_positive))
def test_moderate_input_gives_numbers(call):
    query, patterns, options = call
    recall = answer(lambda: retrieve(query, patterns, **options), *ARGUMENTS)
    if recall is None:
        return
    check_codes(recall, query, patterns, options)
    if not unbounded(options):
        check_residual(recall, query, patterns, options)
        assert (recall.result != Result.NONFINITE).all()
        assert recall.state.isfinite().all()
        assert recall.value.isfinite().all()
        assert recall.weight.isfinite().all()
        assert recall.energy is None or not recall.energy.isnan().any()


@examples(50)
@given(calls("extreme"))
def test_extreme_input_is_never_called_converged_without_being_it(call):
    query, patterns, options = call
    recall = answer(lambda: retrieve(query, patterns, **options), *ARGUMENTS, "beta")
    if recall is not None:
        check_codes(recall, query, patterns, options)


@examples(25)
@given(calls("any", dtypes=(torch.float64,), floats=moderate_positive))
def test_a_query_that_is_no_number_harms_no_other(call):
    query, patterns, options = call
    if getattr(options["forgetting"], "scope", "row") == "tensor":
        options["forgetting"] = None  # this one couples the queries
    lost = ~query.isfinite().all(-1)

    def recall_of(asked):
        torch.manual_seed(0)  # of the noise on thresholds
        return retrieve(asked, patterns, **options)

    recall = answer(lambda: recall_of(query), *ARGUMENTS)
    if recall is None:
        return
    check_codes(recall, query, patterns, options)
    assert (recall.result[lost] == Result.NONFINITE).all()
    clean = recall_of(query.masked_fill(lost.unsqueeze(-1), 0.0))
    kept = ~lost
    assert torch.equal(recall.result[kept], clean.result[kept])
    assert torch.equal(recall.index[kept], clean.index[kept])
    assert torch.allclose(recall.value[kept], clean.value[kept], rtol=1e-6, atol=1e-6, equal_nan=True)


@examples(30)
@given(calls("moderate", floats=moderate_positive), adjoints(), st.booleans())
def test_gradients_of_moderate_input_are_numbers(call, adjoint, learned):
    query, patterns, options = call
    query.requires_grad_(options["steps"] is not None or options["inject"] == "input")
    patterns.requires_grad_()
    if learned and not isinstance(options["beta"], torch.Tensor):
        options["beta"] = torch.nn.Parameter(torch.tensor(options["beta"], dtype=query.dtype))

    def both():
        recall = retrieve(query, patterns, adjoint=adjoint, **options)
        if recall.value.requires_grad:
            recall.value.double().square().sum().backward()
        return recall

    recall = answer(both, *ARGUMENTS)
    # Above 2 the slope of entmax at a weight of 0 is vertical; a series that is cut off may leave half precision.
    steep = getattr(options["separation"], "alpha", 1.0) > 2
    if recall is None or unbounded(options) or steep or query.dtype in WIDE:
        return
    for tensor in (query, patterns, options["beta"]):
        if isinstance(tensor, torch.Tensor) and tensor.grad is not None:
            assert tensor.grad.isfinite().all()


@examples(15)
@given(calls("moderate", floats=moderate_positive), st.data())
def test_a_wrong_argument_is_named(call, data):
    query, patterns, options = call
    wrong = {
        "beta": (0.0, -1.0, float("nan"), "x", None, torch.zeros(2), torch.ones(9), torch.tensor([])),
        "separation": ("sofmax", 3, None, torch.softmax),
        "forgetting": ("rleu", 3, torch.relu),
        "similarity": ("dott", 3),
        "normalize": ("sphare", 3),
        "inject": ("stat", 3, None),
        "inject_weight": (float("inf"), "x", None, torch.ones(9)),
        "mask": (torch.zeros(1, 1, 1, 1, 9, dtype=torch.bool), torch.zeros(3), [True]),
        "values": (torch.zeros(9, 1, 1, 1, 1, 2), [1.0], torch.zeros(3, dtype=torch.int64)),
        "steps": (0, -1, 1.5, "2", True),
        "solver": ("pickard", 3, None, "torchdeq:x"),
        "adjoint": ("implict", 3, None),
        "stop": (None, 1e-3),
    }
    name = data.draw(st.sampled_from(sorted(wrong)))
    options[name] = data.draw(st.sampled_from(wrong[name]))
    if name == "inject_weight":
        options["inject"] = "input"
    # What is looked at first may be wrong in another way only by what a valid call is refused for.
    assert answer(lambda: retrieve(query, patterns, **options), name, *ARGUMENTS[:2]) is None
