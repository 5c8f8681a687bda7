"""Pooling, lookup and the transformer blocks: against the twin, and as torch uses such blocks."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from references import exactly
from references_hopfield import PLAIN, Twin, their_weights
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf import Termination, find, models
from hopdeq_lwpf.models import (
    Hopfield,
    HopfieldDecoderLayer,
    HopfieldEncoderLayer,
    HopfieldLayer,
    HopfieldPooling,
)
from hopdeq_lwpf.settings import names

F64 = torch.float64
B, S, W = 3, 5, 4
POOLING = {
    "plain": {},
    "heads": {"num_heads": 2, "hidden_size": 3, "output_size": 2},
    "static states": {"num_heads": 2, "hidden_size": 3, "state_pattern_as_static": True},
    "static stored patterns": {"num_heads": 2, "hidden_size": 4, "stored_pattern_as_static": True},
}


def pooled(options: dict, quantity: int, **ours) -> tuple[HopfieldPooling, Twin, torch.Tensor]:
    """A pooling layer with hflayers' weights, its twin, and the learned states as a batch."""
    options = {"input_size": W, **options}
    width = options.get("hidden_size", W) if options.get("state_pattern_as_static") else W
    states = torch.randn(1, quantity, width, dtype=F64)
    inner = their_weights(options)
    weights = {f"hopfield.{name}": tensor for name, tensor in inner.items()} | {"pooling_weights": states}
    layer = HopfieldPooling.from_hflayers(weights, **options, quantity=quantity, **ours).double()
    layer.load_hflayers_state_dict(weights)
    return layer, Twin(inner, options, ours.get("forgetting")), states.expand(B, -1, -1)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("unit", [None, "relu", "pfu"])
@pytest.mark.parametrize("name", POOLING)
def test_pooling_gives_what_the_twin_gives(name, unit, steps):
    layer, twin, states = pooled({**POOLING[name], "update_steps_max": steps - 1}, 2, forgetting=unit)
    bags = torch.randn(B, S, W, dtype=F64)
    ignored = torch.zeros(B, S, dtype=torch.bool)
    ignored[0, 3:] = ignored[2, 1:] = True  # one bag of one instance
    heads = twin.w["heads"]
    spread = ignored[:, None, None].expand(B, heads, 2, S)
    layer.eval()
    out, association = twin(bags.tolist(), states.tolist(), bags.tolist(), ignored=spread, steps=steps)
    assert_close(layer(bags, ignored), out.flatten(1), rtol=1e-9, atol=1e-9)
    assert_close(layer.get_association_matrix(bags, ignored), association, rtol=1e-9, atol=1e-9)
    assert layer.get_projected_pattern_matrix(bags).shape == (B, heads, S, twin.w["dv"])
    exactly(layer((bags, bags), ignored), layer(bags, ignored))


@pytest.mark.parametrize("steps", [1, 3, None])
def test_pooling_ignores_order_and_padding(steps):
    layer, _, _ = pooled({"num_heads": 2}, 2)
    layer = HopfieldPooling(W, num_heads=2, quantity=2, steps=steps, stop=Termination(rtol=1e-10)).double()
    bags = torch.randn(B, S, W, dtype=F64)
    want = layer(bags)
    assert_close(layer(bags[:, torch.randperm(S)]), want, rtol=1e-8, atol=1e-10)
    padded = torch.cat([bags, 9 * torch.randn(B, 4, W, dtype=F64)], 1)
    mask = torch.arange(S + 4).expand(B, -1) >= S
    assert_close(layer(padded, mask), want, rtol=1e-8, atol=1e-10)
    for i in range(B):
        assert_close(layer(bags[i : i + 1])[0], want[i], rtol=1e-8, atol=1e-10)


def test_pooling_returns_one_row_a_bag_whatever_comes_first():
    first = HopfieldPooling(W, quantity=2, output_size=3)
    second = HopfieldPooling(W, quantity=2, output_size=3, batch_first=False)
    second.load_state_dict(first.state_dict())
    bags = torch.randn(B, S, W)
    assert first(bags).shape == (B, 6)
    exactly(second(bags.transpose(0, 1)), first(bags))


def test_learned_states_enter_every_step_of_a_solve_and_get_their_gradient():
    tight = Termination(rtol=1e-13, atol=1e-14, max_steps=1000)
    layer = HopfieldPooling(W, num_heads=2, steps=None, quantity=2, stop=tight, beta=3.0).double()
    with torch.no_grad():
        for part in layer.parameters():
            part.copy_(0.7 * torch.randn_like(part))
    assert layer.hopfield.f.inject == "input"
    assert HopfieldPooling(W, steps=1).hopfield.f.inject == "start"
    assert HopfieldPooling(W, steps=None, inject="start").hopfield.f.inject == "start"
    assert Hopfield(W, steps=None, state_pattern_as_static=True).f.inject == "input"
    bags = torch.randn(B, S, W, dtype=F64)
    solved = torch.autograd.grad(layer(bags).square().sum(), list(layer.parameters()))
    layer.steps = 300
    unrolled = torch.autograd.grad(layer(bags).square().sum(), list(layer.parameters()))
    for ours, want in zip(solved, unrolled, strict=True):
        assert_close(ours, want, rtol=1e-6, atol=1e-8)
    assert solved[0].abs().max() > 1e-6  # the pooling weights, not lost


def test_lookup_gives_what_the_twin_gives():
    for separated in (False, True):
        options = {"input_size": W, "num_heads": 2, "stored_pattern_size": 3}
        if separated:
            options["pattern_projection_size"] = 6
        theirs = {**options, "pattern_projection_size": options.get("pattern_projection_size", 3)}
        inner = their_weights(theirs)
        lookup, targets = torch.randn(1, 7, 3, dtype=F64), torch.randn(1, 7, 6, dtype=F64)
        weights = {f"hopfield.{name}": tensor for name, tensor in inner.items()} | {"lookup_weights": lookup}
        if separated:
            weights["target_weights"] = targets
        layer = HopfieldLayer.from_hflayers(
            weights, **options, quantity=7, lookup_weights_as_separated=separated
        ).double()
        layer.load_hflayers_state_dict(weights)
        x = torch.randn(B, S, W, dtype=F64)
        stored = lookup.expand(B, -1, -1).tolist()
        out, association = Twin(inner, theirs)(
            stored, x.tolist(), targets.expand(B, -1, -1).tolist() if separated else stored
        )
        assert_close(layer(x), out, rtol=1e-9, atol=1e-9)
        assert_close(layer.get_association_matrix(x), association, rtol=1e-9, atol=1e-9)
        assert layer.get_projected_pattern_matrix(x).shape == (B, 2, 7, 2)


def test_what_is_not_trainable_gets_no_gradient():
    options = {"quantity": 3, "lookup_weights_as_separated": True}
    layer = HopfieldLayer(W, trainable=False, lookup_targets_as_trainable=False, **options)
    assert not layer.lookup_weights.requires_grad
    assert not layer.target_weights.requires_grad
    layer = HopfieldLayer(W, **options)
    layer(torch.randn(B, S, W)).square().sum().backward()
    assert layer.lookup_weights.grad.abs().max() > 0
    assert layer.target_weights.grad.abs().max() > 0
    assert not HopfieldPooling(W, trainable=False).pooling_weights.requires_grad


def test_lookup_by_example_finds_the_example():
    layer = HopfieldLayer(
        8, quantity=20, stored_pattern_as_static=True, state_pattern_as_static=True, hidden_size=8, beta=20.0,
        pattern_projection_as_static=True, disable_out_projection=True, lookup_weights_as_separated=True,
        pattern_size=3, steps=None, inject="start", batch_first=False, **PLAIN,
    )  # fmt: skip
    examples = nn.functional.normalize(torch.randn(20, 8), dim=-1)
    targets = torch.randn(20, 3)
    with torch.no_grad():
        layer.lookup_weights.copy_(examples)
        layer.target_weights.copy_(targets)
        out = layer(examples[:, None] + 0.02 * torch.randn(20, 1, 8))
    assert_close(out[:, 0], targets, rtol=0.05, atol=0.05)


def test_a_new_start_of_the_parameters():
    for layer in (Hopfield(W), HopfieldPooling(W), HopfieldLayer(W, lookup_weights_as_separated=True)):
        before = {name: part.clone() for name, part in layer.named_parameters()}
        layer.reset_parameters()
        for name, part in layer.named_parameters():
            moved = not name.endswith("bias") and "norm" not in name
            assert bool((part != before[name]).any()) == moved, name


def test_layers_with_learned_patterns_survive_copies_and_pickles():
    x = torch.randn(B, S, W)
    for layer in (HopfieldPooling(W, quantity=2, steps=None), HopfieldLayer(W, quantity=3, steps=2)):
        out = layer(x)
        exactly(copy.deepcopy(layer)(x), out)
        exactly(pickle.loads(pickle.dumps(layer))(x), out)
        assert layer.last_solution is not None
        assert layer.energy is not None
    with pytest.raises(ValueError, match="steps must be None"):
        layer.steps = 0
    with pytest.raises(TypeError, match="two: stored patterns and pattern projections"):
        HopfieldPooling(W)((x, x, x))
    with pytest.raises(ValueError, match="Did you mean 'quantity'"):
        HopfieldPooling(W, quantitiy=2)


def torch_encoder(block: HopfieldEncoderLayer) -> nn.TransformerEncoderLayer:
    """torch's block with the weights of ours."""
    ours = block.hopfield_association
    theirs = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with torch.no_grad():
        parts = (ours.state_projection, ours.stored_projection, ours.value_projection)
        theirs.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        theirs.self_attn.out_proj.load_state_dict(ours.output_projection.state_dict())
        theirs.linear1.load_state_dict(block.linear_residual.state_dict())
        theirs.linear2.load_state_dict(block.linear_output.state_dict())
        theirs.norm1.load_state_dict(block.norm_residual.state_dict())
        theirs.norm2.load_state_dict(block.norm_output.state_dict())
    return theirs


def association(**options) -> Hopfield:
    layer = Hopfield(8, num_heads=2, **PLAIN, **options)
    for part in layer.parameters():
        nn.init.normal_(part, 0.0, 0.5)
    return layer


def test_the_encoder_is_torchs_where_one_step_is_attention():
    block = HopfieldEncoderLayer(association(), 16, dropout=0.0)
    theirs = torch_encoder(block)
    x = torch.randn(B, S, 8)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, 3:] = True
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    assert_close(block(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert_close(block(x, causal, padding), theirs(x, causal, padding), rtol=1e-5, atol=1e-6)
    assert_close(block(x, is_causal=True), theirs(x, causal), rtol=1e-5, atol=1e-6)
    assert_close(block.get_association_matrix(x, causal).triu(1), torch.zeros(B, 2, S, S))


def test_the_decoder_is_torchs_where_one_step_is_attention():
    block = HopfieldDecoderLayer(association(), association(), 16, dropout=0.0)
    theirs = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with torch.no_grad():
        for attention, ours in (
            (theirs.self_attn, block.hopfield_association_self),
            (theirs.multihead_attn, block.hopfield_association_cross),
        ):
            parts = (ours.state_projection, ours.stored_projection, ours.value_projection)
            attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            attention.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
            attention.out_proj.load_state_dict(ours.output_projection.state_dict())
        theirs.linear1.load_state_dict(block.linear_residual.state_dict())
        theirs.linear2.load_state_dict(block.linear_output.state_dict())
    x, memory = torch.randn(B, S, 8), torch.randn(B, 6, 8)
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    padding = torch.zeros(B, 6, dtype=torch.bool)
    padding[1, 2:] = True
    masks = {"tgt_mask": causal, "memory_key_padding_mask": padding}
    assert_close(block(x, memory, **masks), theirs(x, memory, **masks), rtol=1e-5, atol=1e-6)
    del masks["tgt_mask"]
    want = theirs(x, memory, tgt_mask=causal, **masks)
    assert_close(block(x, memory, tgt_is_causal=True, **masks), want, rtol=1e-5, atol=1e-6)
    wide = torch.ones(S, 6, dtype=torch.bool).triu(1)
    want = theirs(x, memory, memory_mask=wide)
    assert_close(block(x, memory, memory_is_causal=True), want, rtol=1e-5, atol=1e-6)


def test_blocks_stack_in_torchs_encoder_and_decoder():
    x, memory = torch.randn(B, S, 8), torch.randn(B, 6, 8)
    for steps in (1, 2, None):
        inner = association(steps=steps, inject="input", on_failure="raise", beta=0.1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="enable_nested_tensor")
            stack = nn.TransformerEncoder(HopfieldEncoderLayer(inner, 16), 2, enable_nested_tensor=False)
        stack(x, src_key_padding_mask=torch.zeros(B, S, dtype=torch.bool)).sum().backward()
        assert stack.eval()(x).shape == x.shape
        decoder = nn.TransformerDecoder(HopfieldDecoderLayer(inner, inner, 16), 2)
        assert decoder(x, memory).shape == x.shape


def test_a_block_keeps_the_weights_of_the_association_that_it_copies():
    inner = association()
    block = HopfieldEncoderLayer(inner)
    assert block.hopfield_association is not inner
    x = torch.randn(B, S, 8)
    exactly(block.hopfield_association(x), inner(x))


def test_blocks_take_hflayers_weights():
    options = {"input_size": W, "num_heads": 2}
    inner = {name: tensor.float() for name, tensor in their_weights(options).items()}
    block = HopfieldEncoderLayer(Hopfield(W, num_heads=2), 8)
    outer = {
        name: torch.randn_like(part) for name, part in block.state_dict().items() if "association" not in name
    }
    block.load_hflayers_state_dict(
        outer | {f"hopfield_association.{name}": part for name, part in inner.items()}
    )
    x = torch.randn(B, S, W)
    exactly(block.hopfield_association(x), Hopfield.from_hflayers(inner, **options)(x))
    exactly(block.linear_residual.weight, outer["linear_residual.weight"])
    decoder = HopfieldDecoderLayer(Hopfield(W, num_heads=2), Hopfield(W, num_heads=2), 8)
    outer = {
        name: torch.randn_like(part)
        for name, part in decoder.state_dict().items()
        if "association" not in name
    }
    names = ("hopfield_association_self", "hopfield_association_cross")
    decoder.load_hflayers_state_dict(
        outer | {f"{at}.{name}": part for at in names for name, part in inner.items()}
    )
    exactly(decoder.hopfield_association_cross(x), block.hopfield_association(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": 1.0, "beta": 1.0}, "one thing"),
        ({"update_steps_max": 1, "steps": 1}, "one thing"),
        ({"update_steps_max": torch.tensor([1, 2])}, "another number of steps for each head"),
        ({"update_steps_max": 1.5}, "integer or None"),
        ({"update_steps_eps": 0.0}, "must be > 0"),
        ({"num_heads": 1, "input_size": 8}, r"in_proj_weight\[0:8\] has shape"),
        ({"disable_out_projection": True}, "no place for 'association_core.out_proj.weight'"),
        (
            {"normalize_hopfield_space": True, "normalize_hopfield_space_affine": True},
            "has no .*p_norm_weight.*built with the options",
        ),
    ],
)
def test_weights_and_options_that_do_not_fit_are_errors(options, message):
    weights = their_weights({"input_size": W, "num_heads": 2})
    with pytest.raises((ValueError, TypeError), match=message):
        Hopfield.from_hflayers(weights, **{"input_size": W, "num_heads": 2, **options})


def test_steps_of_hflayers_are_counted_from_one():
    weights = their_weights({"input_size": W}, torch.float32)
    for updates, steps in ((0, 1), (3, 4), (None, None), (-1, None), (torch.tensor([2]), 3)):
        layer = Hopfield.from_hflayers(weights, input_size=W, update_steps_max=updates, update_steps_eps=1e-3)
        assert layer.steps == steps
        assert layer.f.inject == "start"


def test_a_bias_pattern_of_another_width_stays_as_it_was():
    options = {"input_size": W, "hidden_size": 3, "pattern_size": 2, "concat_bias_pattern": True}
    weights = their_weights(options, torch.float32)
    weights["association_core.bias_v"] = torch.randn(1, 1, 3)  # as hflayers has it
    layer = Hopfield.from_hflayers(weights, **options)
    exactly(layer.bias_stored.flatten(), weights["association_core.bias_k"].flatten())
    assert layer.bias_value.abs().max() < 0.2
    plain = Hopfield.from_hflayers(weights, **{**options, "concat_bias_pattern": False})
    assert plain.bias_stored is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HopfieldEncoderLayer(nn.Linear(2, 2)), "must be a Hopfield, got Linear"),
        (lambda: HopfieldEncoderLayer(Hopfield(W, output_size=3)), "must return what it is given"),
        (lambda: HopfieldEncoderLayer(Hopfield(W), activation="rellu"), "Did you mean 'relu'"),
        (lambda: HopfieldEncoderLayer(Hopfield(W), dropout=2), "dropout"),
        (lambda: HopfieldDecoderLayer(Hopfield(W), Hopfield(W + 1)), "one input_size, got 4 and 5"),
    ],
)
def test_blocks_that_cannot_work_are_errors(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_layers_are_built_from_settings():
    pooling = models.build(
        {"model": "pooling", "input_size": W, "quantity": 2, "forgetting": {"unit": "relu", "min_keep": 1}}
    )
    assert isinstance(pooling, HopfieldPooling)
    assert pooling.hopfield.f.forgetting.min_keep == 1
    assert isinstance(models.build({"model": "lookup", "input_size": W}), HopfieldLayer)
    assert isinstance(models.build({"model": "hopfield", "input_size": W, "steps": None}), Hopfield)
    with pytest.raises(ValueError, match="Did you mean 'num_heads'"):
        models.build({"model": "hopfield", "input_size": W, "num_head": 2})
    assert math.isclose(models.build({"model": "hopfield", "input_size": W}).beta, 0.5)
    assert find("models", "hopfield")["model"] == "retrieval"


@pytest.mark.parametrize("name", [name for name in names("models") if name.startswith("layer_")])
def test_the_settings_of_layers_build_and_train_one_step(name):
    layer = models.build(name)
    settings = find("models", name)
    core = layer if isinstance(layer, Hopfield) else layer.hopfield
    for option, value in settings.items():
        if option not in ("model", "forgetting", "quantity", "lookup_weights_as_separated"):
            assert getattr(core.options, option) == value, "an option was lost on the way"
    x = torch.randn(2, 5, settings["input_size"])
    out = layer(x)
    assert out.shape == ((2, 64) if settings["model"] == "pooling" else x.shape)
    out.square().sum().backward()
    for part, value in layer.named_parameters():
        assert value.grad is not None, part
        assert value.grad.isfinite().all(), part
