"""The dials of converted attention: iterated in key space, with forgetting, biases, energy and equilibria."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import F64, TIGHT, normal
from references import forget_row, softmax_row
from test_conversion import EXACT, E, H, L, N, S, attention, causal, encoder, inputs, padding, per_head, run
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf import ConvergenceError, Result, Termination, retrieve
from hopdeq_lwpf._types import ConvergenceWarning
from hopdeq_lwpf.forgetting import PFU, ReLU, TopK
from hopdeq_lwpf.models.association import Heads
from hopdeq_lwpf.models.conversion import convert_attention
from hopdeq_lwpf.separation import Entmax
from hopdeq_lwpf.solvers import Implicit, OneStep

UNITS = {
    "none": (None, None),
    "relu": ("relu", {"threshold": 0.0}),
    "pfu": (PFU(tracked=True), {"threshold": "median", "bias": "threshold"}),
    "topk": (TopK(2), {"k": 2}),
}
BIAS = normal(L, S, seed=8)


def projected(layer, tensors):
    """q, k, v of each head, (N, H, rows, d), as nested lists of rows."""
    weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    return [
        (x @ w.T + b).unflatten(-1, (H, E // H)).transpose(1, 2).tolist()
        for x, w, b in zip(tensors, weights, biases, strict=True)
    ]


def slow_row(q, keys, values, ignored, bias, steps, beta, rule):
    """Read-out and weights of one query in one head: plain Python, hflayers' iteration with forgetting."""
    weights = [0.0] * len(keys)
    for step in range(steps):
        scores = [beta * math.fsum(a * b for a, b in zip(q, key, strict=True)) for key in keys]
        scores = [s + b for s, b in zip(scores, bias, strict=True)]
        kept = [0.0 if out else 1.0 for out in ignored]
        if rule is not None:
            scores, kept = forget_row(scores, ignored, **rule)
        visible = [s for s, out in zip(scores, ignored, strict=True) if not out]
        shares = iter(softmax_row(visible)[0])
        weights = [0.0 if out else next(shares) * keep for out, keep in zip(ignored, kept, strict=True)]
        if step < steps - 1:
            q = [math.fsum(w * key[i] for w, key in zip(weights, keys, strict=True)) for i in range(len(q))]
    width = len(values[0])
    return [math.fsum(w * v[i] for w, v in zip(weights, values, strict=True)) for i in range(width)], weights


def slow(layer, tensors, mask, bias, steps, betas, rule):
    """Output and associations per head of the whole layer."""
    queries, keys, values = projected(layer, tensors)
    read, weights = torch.zeros(N, L, E, dtype=F64), torch.zeros(N, H, L, S, dtype=F64)
    for n in range(N):
        for h in range(H):
            for i in range(L):
                row = slow_row(
                    queries[n][h][i],
                    keys[n][h],
                    values[n][h],
                    mask[n, h, i].tolist(),
                    bias[n, h, i].tolist(),
                    steps,
                    betas[h],
                    rule,
                )
                read[n, i, h * (E // H) : (h + 1) * (E // H)] = torch.tensor(row[0], dtype=F64)
                weights[n, h, i] = torch.tensor(row[1], dtype=F64)
    return read @ layer.out_proj.weight.T + layer.out_proj.bias, weights


@pytest.mark.parametrize(("unit", "rule"), UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_k_steps_are_the_loop_in_plain_python(unit, rule, steps, biased):
    layer, betas = attention(), [0.4, 1.3]
    tensors = [t.detach() for t in inputs(layer)]
    copied = convert_attention(layer, steps=steps, forgetting=unit, beta=torch.tensor(betas, dtype=F64))
    forbidden = per_head(0.8)
    given_mask = torch.cat([BIAS] * N * H).reshape(-1, L, S).masked_fill(forbidden, -torch.inf)
    output, weights = copied(
        *tensors,
        attn_mask=given_mask if biased else forbidden,
        key_padding_mask=padding(N, S),
        average_attn_weights=False,
    )
    mask = forbidden.reshape(N, H, L, S) | padding(N, S)[:, None, None]
    bias = BIAS.expand(N, H, L, S) * biased
    expected = slow(layer, tensors, mask, bias, steps, betas, rule)
    assert_close((output, weights), expected, **EXACT)
    assert copied.last_solution.steps.unique().tolist() == [steps]


@pytest.mark.parametrize("unit", [None, "relu", "pfu"])
def test_the_equilibrium_is_where_many_steps_lead(unit):
    layer = attention()
    tensors = inputs(layer)
    options = {"forgetting": unit, "beta": 1.0, "stop": TIGHT}
    many = convert_attention(layer, steps=400, **options)(*tensors, key_padding_mask=padding(N, S))
    copied = convert_attention(layer, steps=None, inject="start", **options).requires_grad_(False)
    solved = copied(*(t.detach() for t in tensors), key_padding_mask=padding(N, S))
    assert_close(solved, many, rtol=1e-8, atol=1e-8)
    assert copied.last_solution.converged.all()


def test_each_head_is_a_retrieval_of_its_own():
    layer = attention()
    tensors = [t.detach() for t in inputs(layer)]
    copied = convert_attention(layer, steps=3, forgetting="pfu", inject="input", inject_weight=0.3)
    copied(*tensors)
    queries, keys, values = (torch.tensor(x, dtype=F64) for x in projected(layer, tensors))
    for n in range(N):
        for h in range(H):
            recall = retrieve(
                queries[n, h],
                keys[n, h],
                values=values[n, h],
                beta=(E // H) ** -0.5,
                forgetting="pfu",
                steps=3,
                inject="input",
                inject_weight=0.3,
            )
            kept = copied.last_solution
            assert_close(kept.value[n, h], recall.value, **EXACT)
            assert_close(kept.state[n, h], recall.state, **EXACT)
            assert_close(kept.energy[n, h], recall.energy, **EXACT)
            assert_close(kept.residual[n, h], recall.residual, **EXACT)


@pytest.mark.parametrize("unit", [None, "relu", "pfu", TopK(3)], ids=str)
def test_the_energy_of_a_biased_retrieval_is_the_potential_of_its_update(unit):
    f = convert_attention(attention(), forgetting=unit).retrieval
    q, k = normal(2, 1, 3, 4).requires_grad_(), normal(2, 1, 5, 4, seed=2)
    bias, mask = normal(2, 1, 3, 5, seed=3), torch.zeros(2, 1, 1, 5, dtype=torch.bool)
    mask[1, 0, 0, 4] = True
    x = f.prepare(Heads(q.detach(), k, k, mask, bias))
    (gradient,) = torch.autograd.grad(f.energy(q, x).sum(), q)
    assert_close(f(q, x) - q, -gradient, **EXACT)
    value, energy, _ = f.evaluate(q, x)
    assert_close((value, energy()), (f(q, x), f.energy(q, x)), **EXACT)


@given(st.integers(0, 10**6), st.sampled_from([None, "relu", "pfu"]), st.floats(0.1, 8.0))
def test_plain_iteration_never_raises_the_energy(seed, unit, beta):
    f = convert_attention(attention(), forgetting=unit, beta=beta).retrieval
    assert f.has_energy
    q, k = normal(1, 1, 4, 3, seed=seed), normal(1, 1, 6, 3, seed=seed + 1)
    x = f.prepare(Heads(q, k, k, None, normal(4, 6, seed=seed + 2)))
    z = f.init(x)
    before = f.energy(z, x)
    for _ in range(5):
        z = f(z, x)
        after = f.energy(z, x)
        assert (after <= before + 1e-12 * before.abs() + 1e-12).all()  # rounding of a sum of a few numbers
        before = after


@pytest.mark.parametrize("unit", [None, "relu", "pfu"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_through_equilibria_are_those_of_differences(unit, bias):
    layer = nn.MultiheadAttention(4, 2, batch_first=True, dtype=F64)
    options = {"stop": TIGHT, "adjoint": Implicit(rtol=1e-12), "inject": "input", "inject_weight": 0.5}
    copied = convert_attention(layer, steps=None, forgetting=unit, **options)
    score_bias = normal(2, 3, seed=4) if bias else torch.zeros(2, 3, dtype=F64)

    def function(query, key, weight, added):
        parameters = {"in_proj_weight": weight}
        arguments, masks = (query, key, key), {"attn_mask": added if bias else None}
        return torch.func.functional_call(copied, parameters, arguments, masks)[0]

    query, key = normal(1, 2, 4, seed=2), normal(1, 3, 4, seed=3)
    arguments = [query, key, layer.in_proj_weight.detach().clone(), score_bias]
    assert torch.autograd.gradcheck(function, [a.requires_grad_() for a in arguments])
    assert copied.last_solution.converged.all()


def test_a_query_in_every_step_trains_what_makes_it_and_at_the_start_says_that_it_does_not():
    layer = attention(kdim=5, vdim=7)
    tensors = inputs(layer)
    start = convert_attention(layer, steps=None)
    with pytest.warns(UserWarning, match="inject='input'"):
        run_sum(start, tensors)
    assert start.q_proj_weight.grad is None
    assert "detached" in start.last_solution.note
    run_sum(start, tensors)  # said once; a second warning would be an error here
    every = convert_attention(layer, steps=None, inject="input")
    run_sum(every, tensors)
    assert every.q_proj_weight.grad.norm() > 1e-3
    unrolled = convert_attention(layer, steps=None, adjoint="unrolled")
    run_sum(unrolled, tensors)
    assert unrolled.q_proj_weight.grad is not None
    assert unrolled.last_solution.note == ""


def run_sum(layer, tensors):
    layer(*tensors)[0].sum().backward()


def test_the_backward_solve_is_reported():
    copied = convert_attention(attention(), steps=None, inject="input")
    run_sum(copied, inputs(copied))
    assert copied.last_solution.adjoint.result.tolist() == [[[Result.CONVERGED] * L] * H] * N


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("unit", [None, "relu", "pfu", "topk"])
def test_a_batch_is_its_samples_one_by_one(steps, unit):
    copied = convert_attention(attention(), steps=steps, forgetting=unit, beta=2.0, stop=TIGHT)
    copied.requires_grad_(False)
    tensors, mask = [t.detach() for t in inputs(copied)], padding(N, S)
    output, weights = copied(*tensors, key_padding_mask=mask)
    for i in range(N):
        one = [t[i : i + 1] for t in tensors]
        assert_close(
            copied(*one, key_padding_mask=mask[i : i + 1]), (output[i : i + 1], weights[i : i + 1]), **EXACT
        )


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("unit", [None, "pfu"])
def test_what_stands_in_padding_does_not_matter(steps, unit):
    copied = convert_attention(attention(), steps=steps, forgetting=unit, stop=TIGHT).requires_grad_(False)
    query, key, value = (t.detach() for t in inputs(copied))
    mask = padding(N, S)
    expected = copied(query, key, value, key_padding_mask=mask)[0]
    other = torch.where(mask[..., None], 100 * normal(N, S, E, seed=9), key)
    assert_close(copied(query, other, value, key_padding_mask=mask)[0], expected, **EXACT)
    other[0, -1] = math.nan
    other[0, -2] = math.inf
    values = value.clone()
    values[0, -2:] = math.nan
    assert_close(copied(query, other, values, key_padding_mask=mask)[0], expected, **EXACT)
    # And the first sample without its padding.
    short = copied(query[:1], key[:1, : S - 2], value[:1, : S - 2])[0]
    assert_close(short, expected[:1], **EXACT)


@pytest.mark.parametrize("steps", [1, 3, None])
def test_causal_queries_do_not_see_later_keys(steps):
    copied = convert_attention(attention(), steps=steps, forgetting="pfu", stop=TIGHT).requires_grad_(False)
    x = normal(N, S, E)
    changed = x.clone()
    changed[:, -1] += 5
    outputs = [copied(x, x, x, attn_mask=causal(S, S))[0] for x in (x, changed)]
    assert_close(outputs[0][:, :-1], outputs[1][:, :-1], **EXACT)
    assert not torch.allclose(outputs[0][:, -1], outputs[1][:, -1])
    assert_close(copied(x, x, x, is_causal=True)[0], outputs[0], rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 3, None])
def test_nan_in_one_sample_harms_no_other(steps):
    copied = convert_attention(attention(), steps=steps, on_failure="ignore", stop=TIGHT).requires_grad_(
        False
    )
    tensors = [t.detach() for t in inputs(copied)]
    expected = copied(*tensors)[0]
    tensors[0] = tensors[0].clone()
    tensors[0][1, 2] = math.nan
    output = copied(*tensors)[0]
    kept = torch.ones(N, L, dtype=torch.bool)
    kept[1, 2] = False
    assert_close(output[kept], expected[kept], **EXACT)
    assert (copied.last_solution.result[1, :, 2] == Result.NONFINITE).all()


def test_failures_are_warned_of_raised_or_ignored():
    layer = attention()
    tensors = [t.detach() for t in inputs(layer)]
    options = {"steps": None, "beta": 2.0, "stop": Termination(rtol=1e-12, max_steps=1)}
    model = nn.ModuleDict({"block": layer}).requires_grad_(False)
    with pytest.warns(ConvergenceWarning, match="block: .* did not converge"):
        convert_attention(model, **options)["block"](*tensors)
    with pytest.raises(ConvergenceError, match="did not converge"):
        convert_attention(model, **options, on_failure="raise")["block"](*tensors)
    convert_attention(model, **options, on_failure="ignore")["block"](*tensors)


def test_a_converted_model_takes_new_dials_and_goes_back():
    model = encoder()
    x = normal(N, S, E)
    dialled = convert_attention(model, steps=3, forgetting="relu", beta=4.0)
    again = convert_attention(dialled, steps=1)
    assert_close(again(x), model(x), **EXACT)
    assert again.conversion_report == convert_attention(model).conversion_report
    assert not torch.allclose(dialled(x), model(x))
    again.layers[0].self_attn.steps = 3
    assert not torch.allclose(again(x), model(x))


def test_learned_dials_are_parameters_of_each_layer_and_train():
    beta, alpha = (nn.Parameter(torch.tensor(numbers, dtype=F64)) for numbers in ([0.5, 1.0], 1.5))
    copied = convert_attention(encoder(), steps=2, beta=beta, separation=Entmax(alpha))
    names = {name for name, _ in copied.named_parameters() if "retrieval" in name}
    assert len(names) == 4
    copied(normal(N, S, E)).pow(2).sum().backward()
    own = [layer.self_attn.retrieval.beta for layer in copied.layers]
    assert all(b.grad.abs().min() > 0 for b in own)
    assert own[0] is not own[1]
    assert beta.grad is None


def test_units_with_a_generator_draw_anew_in_each_layer():
    unit = PFU(noise=0.5, generator=torch.Generator().manual_seed(0))
    copied = convert_attention(encoder(), forgetting=unit)
    units = [layer.self_attn.retrieval.forgetting for layer in copied.layers]
    assert units[0] is not units[1]
    scores = normal(5, 6)
    draws = [u.train().draw(scores) for u in units]
    assert not torch.allclose(draws[0], draws[1])


def test_everything_forgotten_reads_out_zero_and_is_reported():
    copied = convert_attention(attention(), forgetting=PFU(1e6, 0.0))
    output, weights, _ = run(copied, inputs(copied))
    assert weights.abs().max() == 0
    assert copied.last_solution.empty.all()
    assert_close(output, copied.out_proj.bias.expand_as(output), rtol=0, atol=0)
    plain = convert_attention(attention(), forgetting=ReLU(min_keep=1))
    run(plain, inputs(plain))
    assert not plain.last_solution.empty.any()


def test_the_last_solution_carries_no_gradient():
    copied = convert_attention(attention(), steps=2, adjoint=OneStep())
    copied(*inputs(copied))
    kept = copied.last_solution
    tensors = (kept.value, kept.state, kept.residual, kept.energy)
    assert [t.requires_grad for t in tensors] == [False] * 4
    assert kept.residual.shape == kept.energy.shape == (N, H, L)
