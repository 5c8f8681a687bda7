"""timm's Attention: a stand-in with its parts and arithmetic, and the real one where it is installed."""

import copy
import pickle

import pytest
import torch
from problems import TIGHT, normal
from timm_here import Attention, timm_or_skip
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from hopdeq_lwpf.models.conversion import convert_attention
from hopdeq_lwpf.models.converted import ConvertedTimmAttention

EXACT = {"rtol": 1e-10, "atol": 1e-10}
B, N, C, H = 2, 5, 8, 2


class Older(nn.Module):
    """timm's Attention before it took masks, had a gate and a norm, or a width of its own."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = H, (C // H) ** -0.5
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(x.shape))


Older.__name__ = "Attention"


class Cosine(Attention):
    """The same parts, put together otherwise."""

    def forward(self, x, attn_mask=None):
        return super().forward(functional.normalize(x, dim=-1))


def real(**options):
    timm_or_skip()
    from timm.layers.attention import Attention as Timms

    return Timms(C, H, qkv_bias=True, **options).double()


LAYERS = {
    "plain": lambda: Attention(),
    "older": Older,
    "norms, gate and width": lambda: Attention(norm=True, gated=True, head_dim=6),
    "timm": real,
    "timm with all": lambda: real(
        attn_head_dim=6, qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm
    ),
}


def run(layer, x, **options):
    output = layer(x, **options)
    return output, torch.autograd.grad(output.pow(2).sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_timms(name):
    layer = LAYERS[name]().double()
    x = normal(B, N, C).requires_grad_()
    copied = convert_attention(layer)
    assert isinstance(copied, ConvertedTimmAttention)
    assert_close(run(copied, x), run(layer, x), **EXACT)
    assert (
        str(copied.conversion_report)
        .splitlines()[1]
        .startswith("  (the model itself): timm Attention, 2 heads")
    )
    copied.load_state_dict(layer.state_dict())
    layer.load_state_dict(copied.state_dict())


def seen(*shape):
    """Which keys may be attended, timm's way round; every query sees one."""
    allowed = normal(*shape, seed=5) > 0
    allowed[..., 0] = True
    return allowed


@pytest.mark.parametrize("name", ["plain", "timm"])
@pytest.mark.parametrize("shape", [(N, N), (1, N, N), (B, 1, N, N), (1, H, N, N), (B, 1, 1, N), (B, H, N, N)])
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_masks_are_timms(name, shape, kind):
    layer, x = LAYERS[name]().double(), normal(B, N, C).requires_grad_()
    mask = seen(*shape) if kind == "bool" else normal(*shape, seed=6)
    copied = convert_attention(layer)
    assert_close(run(copied, x, attn_mask=mask), run(layer, x, attn_mask=mask), **EXACT)


@pytest.mark.parametrize("name", ["plain", "timm"])
def test_the_causal_flag_is_timms(name):
    layer, x = LAYERS[name]().double(), normal(B, N, C).requires_grad_()
    copied = convert_attention(layer)
    assert_close(run(copied, x, is_causal=True), run(layer, x, is_causal=True), **EXACT)
    with pytest.raises(ValueError, match="not both"):
        copied(x, attn_mask=seen(N, N), is_causal=True)
    with pytest.raises(ValueError, match="attn_mask of shape"):
        copied(x, attn_mask=seen(3, N))


def test_dropout_in_training_drops_the_same_with_the_same_seed():
    layer = Attention(drop=0.3).double()
    copied, x = convert_attention(layer), normal(B, N, C)
    torch.manual_seed(5)
    expected = layer(x)
    torch.manual_seed(5)
    assert_close(copied(x), expected, **EXACT)


def test_k_steps_are_attention_with_the_keys_as_values_before_the_read_out():
    layer, x = Attention().double(), normal(B, N, C)
    q, k, v = layer.qkv(x).reshape(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)
    for _ in range(2):
        q = functional.scaled_dot_product_attention(q, k, k)
    out = functional.scaled_dot_product_attention(q, k, v)
    expected = layer.proj(out.transpose(1, 2).reshape(B, N, C))
    assert_close(convert_attention(layer, steps=3)(x), expected, **EXACT)


@pytest.mark.parametrize("steps", [1, 2, None])
@pytest.mark.parametrize("unit", [None, "pfu", "relu"])
def test_a_batch_is_its_samples_one_by_one_and_an_empty_one_nothing(steps, unit):
    copied = convert_attention(Attention().double(), steps=steps, forgetting=unit, stop=TIGHT)
    copied.requires_grad_(False)
    x = normal(B, N, C)
    output = copied(x)
    assert_close(torch.cat([copied(x[:1]), copied(x[1:])]), output, **EXACT)
    assert copied(x[:0]).shape == (0, N, C)
    assert copied.last_solution.result.shape == (0, H, N)


def test_copies_pickles_autocast_and_the_compiler():
    copied = convert_attention(nn.Sequential(Attention()), steps=2, forgetting="pfu")
    x = normal(B, N, C).float()
    expected = copied(x)
    for other in (copy.deepcopy(copied), pickle.loads(pickle.dumps(copied))):
        assert_close(other(x), expected, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert copied(x).dtype == torch.bfloat16
    torch._dynamo.reset()
    compiled = torch.compile(copied, backend="aot_eager")
    assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_a_query_that_sees_no_key_reads_out_zero():
    layer = Attention(gated=True).double()
    copied, x, mask = convert_attention(layer, steps=2), normal(B, N, C), seen(N, N)
    mask[2] = False
    output = copied(x, attn_mask=mask)
    assert_close(output[:, 2], layer.proj.bias.expand(B, C), **EXACT)
    assert copied.last_solution.empty.all(0).all(0).tolist() == [False, False, True, False, False]


def test_classes_that_compute_something_else_are_left_alone():
    torch.manual_seed(0)
    own = type("Attention", (Cosine,), {"forward": Cosine.forward})()
    extra = Attention()
    extra.position = nn.Parameter(torch.zeros(3))
    lookalikes = nn.ModuleDict({"own": own, "sub": Cosine(), "extra": extra, "good": Attention()})
    copied = convert_attention(lookalikes)
    report = copied.conversion_report
    assert [part.name for part in report.converted] == ["good"]
    assert {part.name: part.reason.split(";")[0] for part in report.skipped} == {
        "own": "computes something else than plain attention with its parts",
        "extra": "not known",
    }
    assert type(copied["sub"]) is Cosine
    assert all(part.training for part in copied.modules())


def test_the_trial_leaves_no_trace():
    layer = Attention(drop=0.5)
    state = torch.random.get_rng_state()
    copied = convert_attention(layer, forgetting="pfu", steps=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (copied.steps, copied.last_solution, copied.training) == (4, None, True)
    assert copied.attn_drop.training
