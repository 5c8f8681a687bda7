"""retrieve(): against attention, hand loops, recorded retrievals; what it reports; where the query enters."""

import json
from pathlib import Path

import pytest
import torch
from problems import F64, SOLVERS, TIGHT, normal
from references import UNITS, exactly
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from hopdeq_lwpf import ConvergenceError, Result, fixed_point, retrieve
from hopdeq_lwpf.forgetting import PFU, Forgetting, ReLU, TopK
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.separation import SEPARATIONS, Separation

RECORD = json.loads((Path(__file__).parent / "data" / "lwpf_reference.json").read_text())
RECORDED = [case for case in RECORD["cases"] if case["kind"] == "retrieval"]
BETA = 1.7
# Those made for euclidean scores: test_similarity.py.
DOT = sorted(name for name, kind in SEPARATIONS.items() if getattr(kind, "similarity", "dot") == "dot")


def memory(batch: int = 5, count: int = 9, width: int = 4) -> tuple[Tensor, Tensor]:
    return normal(batch, width), normal(count, width, seed=2)


# --- one step is attention


def test_one_step_is_attention():
    query, patterns = memory()
    values = normal(9, 3, seed=3)
    recall = retrieve(query, patterns, beta=BETA, values=values, steps=1)
    assert_close(recall.value, torch.softmax(BETA * query @ patterns.T, -1) @ values, rtol=0, atol=1e-14)
    peer = functional.scaled_dot_product_attention(query[None], patterns[None], values[None], scale=BETA)[0]
    assert_close(recall.value, peer, rtol=0, atol=1e-14)


def test_one_step_is_attention_with_heads_and_padding():
    q, k, v = normal(2, 3, 5, 4), normal(2, 3, 7, 4, seed=2), normal(2, 3, 7, 6, seed=3)
    mask = torch.arange(7) >= torch.tensor([4, 7])[:, None, None, None]
    attend = mask.logical_not().expand(2, 3, 5, 7)
    peer = functional.scaled_dot_product_attention(q, k, v, attn_mask=attend, scale=0.5)
    by_scores = retrieve(q, k, values=v, beta=0.5, mask=~attend, steps=1).value
    assert_close(by_scores, peer, rtol=0, atol=1e-14)
    by_pattern = retrieve(q, k, values=v, beta=0.5, mask=mask[:, :, 0].expand(2, 3, 7), steps=1).value
    assert_close(by_pattern, peer, rtol=0, atol=1e-14)


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_one_step_equals_the_two_line_drop_in_with_its_gradient(unit):
    query, patterns = (part.requires_grad_() for part in memory())
    value, kept = unit(BETA * query @ patterns.T)
    by_hand = (kept * torch.softmax(value, -1)) @ patterns
    ours = retrieve(query, patterns, beta=BETA, forgetting=unit, steps=1).value
    assert_close(ours, by_hand, rtol=0, atol=1e-14)
    upstream = normal(5, 4, seed=8)
    pairs = (torch.autograd.grad(part, (query, patterns), upstream) for part in (ours, by_hand))
    assert_close(*pairs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("separation", DOT)
@pytest.mark.parametrize("inject", ["start", "input"])
def test_k_steps_are_k_softmaxes_with_values_at_the_last(steps, separation, inject):
    query, patterns = memory()
    values = normal(9, 3, seed=3)
    recall = retrieve(
        query, patterns, beta=BETA, values=values, steps=steps, separation=separation, inject=inject
    )
    z = query
    for _ in range(steps):
        weights = SEPARATIONS[separation].weights(BETA * z @ patterns.T)
        z = weights @ patterns + (query if inject == "input" else 0)
    assert_close(recall.value, weights @ values, rtol=0, atol=1e-13)
    assert_close(recall.state, z, rtol=0, atol=1e-13)
    assert (recall.steps == steps).all()
    assert (recall.evaluations == steps).all()


def test_counted_steps_are_judged_never_refused():
    query, patterns = memory()
    few, many = (retrieve(query, patterns, beta=BETA, steps=steps) for steps in (2, 500))
    assert (few.result == Result.MAX_STEPS).all()
    assert many.require().converged.all()
    exactly(few.residual, fixed(query, patterns, 2).residual)


def fixed(query, patterns, steps):
    f = Retrieval(BETA)
    return fixed_point(f, f.prepare(query, patterns), query, steps=steps)


@pytest.mark.parametrize("solver", SOLVERS)
def test_equilibrium_reads_out_at_the_root(solver):
    query, patterns = memory()
    values = normal(9, 3, seed=3)
    recall = retrieve(query, patterns, beta=0.3, values=values, solver=solver, stop=TIGHT).require()
    weights = torch.softmax(0.3 * recall.state @ patterns.T, -1)
    assert_close(recall.state, weights @ patterns, rtol=0, atol=1e-11)
    assert_close(recall.value, weights @ values, rtol=0, atol=1e-11)
    long = retrieve(query, patterns, beta=0.3, values=values, steps=3000)
    assert_close(recall.value, long.value, rtol=0, atol=1e-9)


def test_values_of_sets():
    query, patterns, values = normal(2, 3, 4), normal(2, 6, 4, seed=2), normal(2, 6, 5, seed=3)
    whole = retrieve(query, patterns, values=values, steps=2)
    for i in range(2):
        assert_close(whole.value[i], retrieve(query[i], patterns[i], values=values[i], steps=2).value)


# --- what it reports


@pytest.mark.parametrize("steps", [1, 3, None])
def test_index_weight_support_energy(steps):
    query, patterns = memory()
    recall = retrieve(query, patterns, beta=BETA, forgetting=PFU(), separation="sparsemax", steps=steps)
    f = Retrieval(BETA, forgetting=PFU(), separation="sparsemax")
    x = f.prepare(query, patterns)
    before = recall.state if steps is None else fixed_unit(f, x, steps - 1)
    weights = f.weights(before, x)
    exactly(recall.index, weights.argmax(-1))
    exactly(recall.weight, weights.amax(-1))
    exactly(recall.support, (weights > 0).sum(-1))
    exactly(recall.energy, f.energy(recall.state, x))
    assert not recall.weight.requires_grad


def fixed_unit(f, x, steps):
    return fixed_point(f, x, f.init(x), steps=steps).value if steps else f.init(x)


def test_energy_is_absent_where_there_is_none():
    query, patterns = memory()
    assert retrieve(query, patterns, forgetting=PFU(0.1, -1.0)).energy is None
    assert retrieve(query, patterns).energy.shape == (5,)


@pytest.mark.parametrize("steps", [1, 2, 4, None])
def test_everything_forgotten_is_zero_and_counted(steps):
    patterns = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    query = torch.tensor([[-1.0, -2.0], [3.0, 1.0], [-2.0, -1.0]], requires_grad=steps is not None)
    recall = retrieve(query, patterns, forgetting="relu", steps=steps)
    exactly(recall.value[[0, 2]].detach(), torch.zeros(2, 2))
    assert recall.index.tolist() == [-1, 0, -1]
    assert recall.support.tolist()[::2] == [0, 0]
    assert recall.weight.tolist()[::2] == [0, 0]
    assert recall.value[1].norm() > 0
    if steps is None:
        assert recall.converged.all()  # zero is an equilibrium: nothing is left to remember
    else:
        recall.value.sum().backward()
        assert query.grad.isfinite().all()


@pytest.mark.parametrize("separation", sorted(SEPARATIONS))
@pytest.mark.parametrize("unit", [None, ReLU(), PFU(), PFU(tracked=True), TopK(2)], ids=repr)
@pytest.mark.parametrize("steps", [1, 3, None])
def test_all_patterns_masked(separation, unit, steps):
    query, patterns = memory()
    patterns.requires_grad_()
    mask = torch.zeros(5, 9, dtype=torch.bool)
    mask[2] = True
    rest = torch.arange(5) != 2
    options = {"separation": separation, "forgetting": unit, "steps": steps}
    recall = retrieve(query, patterns, mask=mask, **options)
    exactly(recall.value[2].detach(), torch.zeros(4, dtype=F64))
    assert recall.index[2] == -1
    assert recall.support[2] == recall.weight[2] == 0
    # The entmax family makes as many passes as the slowest row needs, which shows in the last digits.
    alone = retrieve(query, patterns, **options).value[rest].detach()
    assert_close(recall.value[rest].detach(), alone, rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(recall.value.sum(), patterns)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("unit", [None, ReLU(min_keep=1), PFU(min_keep=1), TopK(1)], ids=repr)
@pytest.mark.parametrize("steps", [1, None])
def test_one_pattern_is_recalled_by_every_query(unit, steps):
    query, patterns = memory(count=1)
    recall = retrieve(query, patterns, forgetting=unit, steps=steps)
    assert_close(recall.value, patterns.expand(5, 4))
    assert recall.index.tolist() == [0] * 5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("unit", [None, ReLU(), PFU(), PFU(tracked=True), TopK(2)], ids=repr)
@pytest.mark.parametrize("steps", [1, 3, None])
def test_empty_batch(solver, unit, steps):
    patterns = normal(7, 4).requires_grad_()
    recall = retrieve(
        torch.zeros(0, 4, dtype=F64), patterns, forgetting=unit, steps=steps, solver=solver, trace=True
    )
    assert recall.value.shape == recall.state.shape == (0, 4)
    for part in (recall.index, recall.weight, recall.support, recall.result, recall.residual):
        assert part.shape == (0,)
    recall.value.sum().backward()
    exactly(patterns.grad, torch.zeros(7, 4, dtype=F64))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 3, None])
def test_a_query_that_is_not_a_number_harms_no_other(solver, steps):
    query, patterns = memory(12)
    query[3, 1] = float("nan")
    rest = torch.arange(12) != 3
    mixed = retrieve(query, patterns, beta=BETA, forgetting=PFU(), solver=solver, steps=steps)
    alone = retrieve(query[rest], patterns, beta=BETA, forgetting=PFU(), solver=solver, steps=steps)
    assert mixed.result[3] == Result.NONFINITE
    exactly(mixed.result[rest], alone.result)
    assert_close(mixed.value[rest], alone.value, rtol=0, atol=1e-9)
    exactly(mixed.index[rest], alone.index)
    with pytest.raises(ConvergenceError, match="NONFINITE"):
        mixed.require()


def test_default_settings_recall_a_stored_pattern():
    patterns = functional.normalize(torch.randn(100, 64), dim=-1)
    query = patterns[:20] + 0.05 * torch.randn(20, 64)
    recall = retrieve(query, patterns, beta=30.0).require()
    assert recall.index.tolist() == list(range(20))
    assert (recall.value - patterns[:20]).norm(dim=-1).max() < 0.01
    assert not recall.value.requires_grad
    assert (recall.weight > 0.99).all()


# --- where the query enters


@pytest.mark.parametrize("adjoint", ["implicit", "onestep"])
def test_query_that_requires_grad_is_refused_where_its_gradient_would_be_lost(adjoint):
    query, patterns = memory()
    query.requires_grad_()
    with pytest.raises(ValueError, match=r"requires grad.*detach.*inject='input'.*steps=k"):
        retrieve(query, patterns, adjoint=adjoint)
    with torch.no_grad():
        retrieve(query, patterns, adjoint=adjoint)
    for options in ({"steps": 2}, {"inject": "input"}, {"adjoint": "unrolled"}):
        value = retrieve(query, patterns, **{"adjoint": adjoint, **options}).value
        (gradient,) = torch.autograd.grad(value.sum(), query)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_injected_query_keeps_every_path_of_its_gradient_in_counted_steps(steps):
    query, patterns = (part.requires_grad_() for part in memory())
    ours = retrieve(query, patterns, beta=BETA, inject="input", steps=steps).value
    z = query
    for _ in range(steps):
        recalled = torch.softmax(BETA * z @ patterns.T, -1) @ patterns
        z = recalled + query
    upstream = normal(5, 4, seed=8)
    pairs = (torch.autograd.grad(part, (query, patterns), upstream) for part in (ours, recalled))
    assert_close(*pairs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("unit", [None, ReLU(), PFU(), PFU(tracked=True), PFU(0.1)], ids=repr)
def test_injected_query_gets_the_right_gradient(unit):
    # A median that is drawn from the query's scores is a path of its gradient too.
    query, patterns = memory(2, 5, 3)
    values = normal(5, 2, seed=3)

    def run(query, patterns, values, weight):
        return retrieve(
            query,
            0.5 * patterns,
            values=values,
            inject="input",
            inject_weight=weight,
            stop=TIGHT,
            forgetting=unit,
        ).value

    arguments = (query, patterns, values, torch.tensor(0.6, dtype=F64))
    assert torch.autograd.gradcheck(run, [a.requires_grad_() for a in arguments], rtol=1e-4, atol=1e-7)


def test_read_out_has_no_injection_term_and_the_energy_has_one():
    query, patterns = memory()
    recall = retrieve(query, patterns, beta=0.2, inject="input", inject_weight=2.0, stop=TIGHT).require()
    assert_close(recall.state, recall.value + 2.0 * query, rtol=0, atol=1e-11)
    plain = Retrieval(0.2)
    without = plain.energy(recall.state, plain.prepare(query, patterns))
    assert_close(recall.energy, without - 2.0 * (query * recall.state).sum(-1))


# --- recorded retrievals


def unit_of(case: dict) -> Forgetting:
    spec = case["spec"]
    if spec["unit"] == "relu":
        return ReLU()
    bias = "threshold" if spec["bias"] == "mu" else spec["bias"]
    if spec["mu"] == "dmedian":
        return PFU(bias=bias, scope="tensor", tracked=True)
    return PFU(float(spec["mu"]), bias)


@pytest.mark.parametrize("case", RECORDED, ids=[case["id"] for case in RECORDED])
def test_recorded_retrieval(case):
    unit = unit_of(case)
    patterns, query = torch.tensor(case["X"], dtype=F64), torch.tensor(case["z0"], dtype=F64)
    options = {"beta": case["beta"], "forgetting": unit}
    for k, recorded in enumerate(case["iterates_1_to_6"], start=1):
        one = retrieve(query, patterns, steps=k, **options)
        assert_close(one.value, torch.tensor(recorded, dtype=F64), rtol=0, atol=1e-10)
    end = torch.tensor(case["fixed_point"], dtype=F64)
    for solver in ("auto", "picard"):
        recall = retrieve(query, patterns, solver=solver, stop=TIGHT, **options).require()
        assert_close(recall.value, end, rtol=0, atol=1e-10)
        exactly(recall.support, torch.tensor(int(sum(case["mask"]))))
    recorded = torch.tensor(case["energies_first_8"], dtype=F64)
    f = Retrieval(case["beta"], forgetting=unit)
    x, z, energies = f.prepare(query, patterns), query, []
    for _ in recorded:
        energies.append(f.energy(z, x))
        z = f(z, x)
    assert_close(torch.stack(energies), recorded, rtol=0, atol=1e-10)
    weights = f.weights(end, x)
    assert_close(weights.sum(), torch.tensor(case["activation_sum"], dtype=F64), rtol=0, atol=1e-10)
    if f.has_energy:
        trace = retrieve(query, patterns, steps=len(recorded), trace=True, **options).trace
        assert_close(trace.energy, recorded, rtol=0, atol=1e-10)
        assert case["energy_monotone"]


def test_all_recorded_retrievals_are_run():
    assert len(RECORDED) == 11
    assert {case["spec"].get("mu", "relu") for case in RECORDED} == {"relu", "0", "0.5", "dmedian"}


def test_trace_of_a_recall():
    query, patterns = memory()
    for steps in (3, None):
        trace = retrieve(query, patterns, beta=BETA, steps=steps, trace=True).trace
        assert trace.residual.shape == trace.energy.shape
        assert trace.residual.shape[1:] == (5,)
        assert steps in (None, len(trace.residual))


# --- learned separations


def test_learned_parts_of_a_separation_are_parameters_and_get_gradients():
    class Warm(Separation, nn.Module):
        """softmax(t s) with a learned t, the gradient of logsumexp(t s)/t."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.t = nn.Parameter(torch.tensor(1.5, dtype=F64))

        def weights_of(self, logits):
            return torch.softmax(self.t * logits, -1)

        def lagrangian_of(self, logits):
            return torch.logsumexp(self.t * logits, -1) / self.t

    separation = Warm()
    query, patterns = normal(3, 4), normal(6, 4, seed=2)
    assert [name for name, _ in Retrieval(separation=separation).named_parameters()] == ["separation.t"]
    for steps in (1, 3, None):
        value = retrieve(query, patterns, beta=0.5, separation=separation, steps=steps).value
        (gradient,) = torch.autograd.grad(value.square().sum(), separation.t)
        assert gradient.isfinite()
        assert gradient != 0


def test_masked_padding_may_hold_anything():
    query, patterns, values = normal(3, 4), normal(6, 4, seed=2), normal(6, 2, seed=3)
    padded, read = (torch.cat([rows, rows[:2] * torch.nan]) for rows in (patterns, values))
    mask = torch.arange(8) >= 6
    for steps in (1, None):
        options = {"steps": steps, "beta": 0.7}
        clean = retrieve(query, patterns, values=values, **options)
        assert_close(retrieve(query, padded, values=read, mask=mask, **options).value, clean.value)
    groups = torch.stack([padded, padded])
    masks = torch.stack([mask, mask])
    recall = retrieve(normal(2, 3, 4), groups, mask=masks)
    assert recall.value.isfinite().all()
