"""Masks, empty bags, independence of samples, and input that a Hopfield layer cannot take."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import exactly
from references_hopfield import F64, OPTIONS, PLAIN, B, L, S, agrees, made
from torch.testing import assert_close

from hopdeq_lwpf import Termination
from hopdeq_lwpf.models import Hopfield


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_sample_alone_gives_what_it_gives_in_a_batch(name, steps):
    layer, _, parts = made(OPTIONS[name], inject="input")
    layer.steps = steps
    layer.equilibrium.stop = Termination(rtol=1e-10, atol=1e-12)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, 2:] = padding[2, 3:] = True
    whole = layer(parts, padding)
    for i in range(B):
        alone = layer(tuple(part[i : i + 1] for part in parts), padding[i : i + 1])
        # A solve stops within its tolerance of the equilibrium, other products round otherwise.
        assert_close(alone[0], whole[i], rtol=1e-8, atol=1e-8)


def test_changing_one_sample_changes_no_other_also_with_static_patterns_and_heads():
    for name in ("static stored patterns", "all static", "beta of each head"):
        layer, _, parts = made(OPTIONS[name])
        before = layer(parts)
        parts[0][1] += torch.randn(S, parts[0].shape[-1])
        after = layer(parts)
        exactly(after[[0, 2]], before[[0, 2]])
        assert (after[1] - before[1]).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 3, None])
def test_the_order_of_the_stored_patterns_does_not_matter(steps):
    layer, _, (stored, state, projection) = made({"num_heads": 2}, inject="input")
    layer.steps = steps
    order = torch.randperm(S)
    shuffled = layer((stored[:, order], state, projection[:, order]))
    assert_close(shuffled, layer((stored, state, projection)), rtol=1e-6, atol=1e-6)
    exactly(layer((stored, state.flip(1), projection)), layer((stored, state, projection)).flip(1))


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("unit", [None, "relu", "pfu", "topk"])
def test_padding_is_as_if_it_were_not_there(unit, steps):
    layer, _, (stored, state, projection) = made({"num_heads": 2}, forgetting=unit, inject="input")
    layer.steps = steps
    layer.equilibrium.stop = Termination(rtol=1e-10, atol=1e-12, max_steps=1000)
    more = [torch.cat([part, 9 * torch.randn(B, 3, 4, dtype=F64)], 1) for part in (stored, projection)]
    padding = torch.zeros(B, S + 3, dtype=torch.bool)
    padding[:, S:] = True
    padded = layer((more[0], state, more[1]), padding)
    assert_close(padded, layer((stored, state, projection)), rtol=1e-7, atol=1e-7)


@given(
    heads=st.integers(1, 3),
    steps=st.integers(1, 3),
    unit=st.sampled_from([None, "relu", "pfu"]),
    seed=st.integers(0, 2**31),
    extra=st.booleans(),
)
@settings(max_examples=30)
def test_any_masks_at_once_give_what_the_twin_gives(heads, steps, unit, seed, extra):
    torch.manual_seed(seed)
    options = {"input_size": 4, "hidden_size": 3, "num_heads": heads, "add_zero_association": extra}
    layer, twin, parts = made({**options, "update_steps_max": steps - 1}, forgetting=unit)
    layer.eval()
    layer._told_masked = True
    padding, ignored = torch.rand(B, S) < 0.4, torch.rand(B, heads, L, S) < 0.3
    added = torch.randn(B, heads, L, S, dtype=F64)
    full = {"ignored": ignored | padding[:, None, None], "added": added}
    both = added.masked_fill(ignored, -math.inf)
    masks = {"stored_pattern_padding_mask": padding, "association_mask": both}
    agrees(layer, twin, parts, masks, steps=steps, **full)
    exactly(
        layer.association_matrix[..., :S][full["ignored"]], torch.zeros(int(full["ignored"].sum()), dtype=F64)
    )


def test_masks_in_every_shape_and_kind_mean_the_same():
    layer, twin, parts = made({"num_heads": 2})
    ignored = torch.rand(B, 2, L, S) < 0.4
    ignored[..., 1] = False
    agrees(layer, twin, parts, {"association_mask": ignored}, ignored=ignored)
    want = layer(parts, association_mask=ignored)
    infinite = torch.zeros(B, 2, L, S, dtype=F64).masked_fill(ignored, -math.inf)
    for mask in (
        ignored.flatten(0, 1),
        ignored.to(torch.uint8),
        infinite,
        infinite.flatten(0, 1),
        ignored.tolist(),
    ):
        exactly(layer(parts, association_mask=mask), want)
    shared = ignored[0, 0]
    want = layer(parts, association_mask=shared)
    for mask in (
        shared[None, None],
        shared.expand(B, L, S),
        shared.expand(B * 2, L, S),
        shared.to(torch.uint8),
    ):
        exactly(layer(parts, association_mask=mask), want)
    rows = shared[:1].expand(B, S)
    want = layer(parts, rows)
    exactly(layer(parts, torch.zeros(B, S, dtype=F64).masked_fill(rows, -math.inf)), want)
    exactly(layer(parts, rows.to(torch.uint8)), want)
    exactly(layer(parts, association_mask=shared[:1].expand(L, S)), want)
    # The same number for every stored pattern of a sample changes nothing.
    assert_close(layer(parts, association_mask=torch.randn(B, 1, 1, 1, dtype=F64)), layer(parts))


def test_a_float_mask_is_added_to_the_scores_and_gets_its_gradient():
    layer, twin, parts = made({"num_heads": 2})
    added = torch.randn(L, S, dtype=F64, requires_grad=True)
    agrees(layer, twin, parts, {"association_mask": added}, added=added.detach().expand(B, 2, L, S))
    layer.steps = 2
    torch.autograd.gradcheck(lambda bias: layer(parts, association_mask=bias), added)
    layer.steps = None
    layer.equilibrium.f.inject = "input"
    layer.equilibrium.stop = Termination(rtol=1e-13, atol=1e-13, max_steps=1000)
    torch.autograd.gradcheck(lambda bias: layer(parts, association_mask=bias), added)


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("unit", [None, "relu", "pfu", "topk"])
def test_a_state_whose_stored_patterns_are_all_masked_recalls_zero_and_is_reported_once(unit, steps):
    layer, _, parts = made({"num_heads": 2, "disable_out_projection": True}, forgetting=unit, inject="input")
    layer.steps = steps
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1] = True
    layer.eval()  # a head that forgets everything is reported in training alone
    for part in parts:
        part.requires_grad_()
    with pytest.warns(UserWarning, match=rf"{2 * L} of {B * 2 * L} states have every stored pattern masked"):
        out = layer([part.detach() for part in parts], padding)
    exactly(out[1], torch.zeros_like(out[1]))
    assert out[[0, 2]].abs().sum() > 0
    assert f"{2 * L} of {B * 2 * L} states" in layer.last_solution.note
    layer(parts, padding).sum().backward()  # no second warning, and a gradient without NaN
    for part in parts:
        assert part.grad.isfinite().all()


@pytest.mark.parametrize("steps", [1, 3, None])
def test_an_empty_bag_recalls_zero_and_empty_batches_pass(steps):
    layer, _, (stored, state, projection) = made({"num_heads": 2}, inject="input")
    layer.steps = steps
    with pytest.warns(UserWarning, match="every stored pattern masked, or none"):
        out = layer((stored[:, :0], state, projection[:, :0]))
    exactly(out, layer.output_projection.bias.expand(B, L, -1))
    assert layer.association_matrix.shape == (B, 2, L, 0)
    assert layer((stored, state[:, :0], projection)).shape == (B, 0, 4)
    out = layer((stored[:0], state[:0], projection[:0]))
    assert out.shape == (0, L, 4)
    assert layer.last_solution.result.shape == (0, 2, L)
    assert layer.energy.shape == (0, 2, L)
    out.sum().backward()
    one = layer((stored[:, :1], state, projection[:, :1]))
    assert_close(layer.association_matrix, torch.ones(B, 2, L, 1, dtype=F64))
    assert_close(one[:, 0], one[:, 1])


@pytest.mark.parametrize("steps", [1, 3, None])
def test_nan_in_one_sample_harms_no_other(steps):
    layer, _, parts = made({"num_heads": 2}, on_failure="ignore", inject="input")
    layer.steps = steps
    clean = layer(parts)
    for part in parts:
        part[1, 0] = math.nan
    out = layer(parts)
    assert out[1].isnan().any()
    # The solve goes on with other rows beside it, so that products round otherwise.
    assert_close(out[[0, 2]], clean[[0, 2]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_head": 2}, "Did you mean 'num_heads'"),
        ({"scaling": 1.0}, "'scaling' is called beta here"),
        ({"update_steps_max": 3}, "update_steps_max . 1"),
        ({"num_heads": 3}, "not a multiple of num_heads 3: give hidden_size"),
        ({"num_heads": 0}, "num_heads must be an integer >= 1"),
        ({"dropout": 1.5}, r"dropout must be a number in \[0, 1\]"),
        ({"steps": 0}, "steps must be None"),
        ({"inject": "strat"}, "Did you mean 'start'"),
        ({"forgetting": "reluu"}, "Did you mean 'relu'"),
        ({"separation": "softmaxx"}, "Did you mean 'softmax'"),
        ({"solver": "andersen"}, "Did you mean 'anderson'"),
        ({"beta": [1.0, 2.0, 3.0], "num_heads": 2}, r"one entry a head, \(2,\), got \(3,\)"),
        ({"beta": 0.0}, "beta must be > 0"),
        ({"association_activation": "tahn"}, "Did you mean 'tanh'"),
        ({"normalize_state_pattern": 1}, "normalize_state_pattern must be True or False, got 1"),
        ({"input_size": None}, "input_size is needed"),
        ({"normalize_stored_pattern_eps": 0}, "must be a number > 0"),
        ({"pattern_projection_as_connected": True, "stored_pattern_size": 3}, "must be equal"),
    ],
)
def test_options_that_cannot_be_meant_are_errors_that_help(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Hopfield(**{"input_size": 4, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: f(x[0]), "three dimensions"),
        (lambda f, x: f(x[..., :3]), "stored patterns has width 3 .* built for 4"),
        (lambda f, x: f((x, x)), "got 2 of them"),
        (lambda f, x: f("x"), "three: stored patterns"),
        (lambda f, x: f(x.long()), "floating-point"),
        (lambda f, x: f((x, x.double(), x)), "state patterns has dtype"),
        (lambda f, x: f((x, x[:2], x)), "one batch size"),
        (lambda f, x: f((x, x, x[:, :2])), "a projection for each stored pattern"),
        (lambda f, x: f(x, torch.zeros(B, S + 1, dtype=torch.bool)), r"must have shape \(B, S\) = \(3, 4\)"),
        (lambda f, x: f(x, torch.zeros(B, S, dtype=torch.long)), "must be bool"),
        (
            lambda f, x: f(x, None, torch.zeros(2, 2, dtype=torch.bool)),
            r"association_mask must have shape \(L, S\)",
        ),
    ],
)
def test_input_that_does_not_fit_is_an_error_that_says_why(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(Hopfield(4, num_heads=2), torch.randn(B, S, 4))


def test_static_patterns_of_two_widths_are_an_error():
    options = {name: False for name in PLAIN} | {
        "stored_pattern_as_static": True, "state_pattern_as_static": True,
        "pattern_projection_as_static": True, "disable_out_projection": True,
    }  # fmt: skip
    layer = Hopfield(**options)
    with pytest.raises(ValueError, match="one width, got 4 and 3"):
        layer((torch.randn(1, 2, 4), torch.randn(1, 2, 3), torch.randn(1, 2, 5)))


@pytest.mark.parametrize("unit", [None, "pfu", "topk"])
def test_a_context_narrowed_to_the_states_that_go_on_gives_them_the_same_step(unit):
    beta = torch.tensor([0.5, 2.0])
    layer, _, parts = made({"num_heads": 2, "scaling": beta}, forgetting=unit, inject="input")
    padding = torch.rand(B, S) < 0.3
    padding[:, 0] = False
    f = layer.f
    x = f.prepare(layer._project(parts, padding, torch.randn(L, S, dtype=F64)))
    z = torch.randn(B, 2, L, 2, dtype=F64)
    rows_of_all = f(z, x).reshape(-1, 2)
    energy = f.energy(z, x).reshape(-1)
    # One state of one head, both of another, none of the rest.
    live = torch.zeros(B * 2 * L, dtype=torch.bool)
    live[[1, 6, 7]] = True
    narrowed, rows = f.select(x, live)
    assert sorted(rows.tolist()) == [0, 1, 6, 7]
    picked = z.reshape(-1, 2)[rows]
    assert_close(f(picked, narrowed), rows_of_all[rows])
    assert_close(f.energy(picked, narrowed), energy[rows])
    # Again, from a context that was narrowed before.
    live = torch.tensor([row in (1, 6) for row in rows.tolist()])
    again, inner = f.select(narrowed, live)
    assert sorted(rows[inner].tolist()) == [1, 6]
    assert_close(f(picked[inner], again), rows_of_all[rows[inner]])
