"""Effective betas of attention layers against loops over heads, queries and keys; radii; query-key-norm betas."""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm_here import Attention as TimmLike
from timm_here import StandIn, timm_or_skip
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf.models import Hopfield, HopfieldPooling, convert_attention
from hopdeq_lwpf.models.sdm.betas import fit_beta
from hopdeq_lwpf.models.sdm.effective_beta import (
    METHODS,
    QueriesKeys,
    effective_betas,
    head_betas,
    radius_for_beta,
    watch_attention,
)
from hopdeq_lwpf.models.sdm.query_key_norm import (
    QUERY_KEY_NORM,
    QUERY_KEY_NORM_BELOW_SNR,
    beta_statistics,
    optimal_betas,
)

RECORDED = json.loads((Path(__file__).parent / "data" / "sdm_reference.json").read_text(encoding="utf-8"))[
    "values"
]
B, L, E, H = 3, 5, 8, 2
# float64, a few dozen operations.
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def recorded(name):
    return next(case for case in RECORDED if case["id"] == name)


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def slope(q, keys, scale, seen):
    """Of the logits of one query over its cosines, in plain Python; None where there is none."""
    points = []
    for k, allowed in zip(keys, seen, strict=True):
        product = sum(a * b for a, b in zip(q, k, strict=True))
        length = math.hypot(*q) * math.hypot(*k)
        if allowed and length:
            points.append((product / length, scale * product))
    if len(points) < 2:
        return None
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((a - x) ** 2 for a, _ in points)
    return sum((a - x) * (b - y) for a, b in points) / spread


def slopes(q, k, scale, mask=None):
    """(B, H, L, d), (B, H, S, d) -> by head a list of slopes."""
    seen = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool)
    seen = seen if mask is None else seen & ~mask
    found = [[] for _ in range(q.shape[1])]
    for b, h, i in np.ndindex(*q.shape[:3]):
        one = slope(q[b, h, i].tolist(), k[b, h].tolist(), scale[h], seen[b, h, i].tolist())
        if one is not None:
            found[h].append(one)
    return found


def check(heads, expected):
    assert len(heads) == len(expected)
    for head, betas in zip(heads, expected, strict=True):
        assert_close(head.betas, torch.tensor(betas, dtype=torch.float64), **EXACT)


def projected(layer, x, y):
    """Queries and keys of nn.MultiheadAttention, batch first, from its weights."""
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    q, k = x @ weight[:E].T + bias[:E], y @ weight[E : 2 * E].T + bias[E : 2 * E]
    return (part.unflatten(-1, (H, -1)).transpose(1, 2).detach() for part in (q, k))


def multihead(**options):
    layer = nn.MultiheadAttention(E, H, batch_first=True, **options).double()
    nn.init.normal_(layer.in_proj_bias)
    return layer


# --- estimates


@pytest.mark.parametrize("masked", [False, True])
def test_the_fit_is_least_squares_over_the_keys_that_a_query_sees(masked):
    q, k = draw(B, H, L, 4), draw(B, H, 7, 4, seed=1)
    k[0, 1, 2] = 0.0  # has no cosine
    mask = draw(B, 1, L, 7, seed=2) > 0.3 if masked else None
    call = QueriesKeys(q, k, torch.tensor([0.5, 2.0]), mask)
    heads = head_betas({"layer": [call]})
    check(heads, slopes(q, k, (0.5, 2.0), mask))
    assert [(head.layer, head.head, head.width, head.n) for head in heads] == [
        ("layer", 0, 4, 4),
        ("layer", 1, 4, 4),
    ]
    assert all(0 <= head.r2 <= 1 for head in heads)


@given(st.integers(0, 2**31), st.floats(0.1, 10), st.integers(2, 6))
def test_with_equally_long_keys_the_fit_is_exact_and_the_lengths_say_the_same(seed, length, width):
    q = draw(2, H, L, width, seed=seed)
    k = length * nn.functional.normalize(draw(2, H, 6, width, seed=seed + 1), dim=-1)
    calls = {"layer": [QueriesKeys(q, k)]}
    expected = length * q.norm(dim=-1).transpose(0, 1).reshape(H, -1) / width**0.5
    for method in ("fit", "norms"):
        for head, betas in zip(head_betas(calls, method=method), expected, strict=True):
            assert_close(head.betas, betas, rtol=1e-7, atol=0)  # cosines may be nearly alike
    assert all(head.r2 == pytest.approx(1, abs=1e-9) for head in head_betas(calls))


def test_the_lengths_are_averaged_over_the_keys():
    q, k = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[1.0, 0.0], [0.0, 3.0], [0.0, 0.0], [9.0, 9.0]]]])
    mask = torch.tensor([False, False, False, True])
    (head,) = head_betas({"": [QueriesKeys(q, k, 1.0, mask)]}, method="norms")
    assert head.betas.tolist() == [10.0]


def test_the_published_rule_as_recorded():
    case = recorded("gpt2_effective_beta_rule")
    rng = np.random.default_rng(0)
    k, q = (torch.from_numpy(rng.standard_normal((2, 5, 64)))[None] for _ in range(2))
    heads = head_betas({"": [QueriesKeys(q, k)]}, method="published")
    assert [float(head.betas) for head in heads] == pytest.approx(case["value"], rel=case["rtol"])


def test_the_published_rule_takes_the_last_query_of_each_sample_that_is_not_padding():
    q, k = draw(3, 2, 4, 5), draw(3, 2, 6, 5, seed=1)
    queries, keys = (4, 2, 0), (6, 3, 6)  # of each sample, the rest is padding
    mask = torch.ones(3, 1, 4, 6, dtype=torch.bool)
    for sample in range(3):
        mask[sample, :, : queries[sample], : keys[sample]] = False
    found = head_betas({"": [QueriesKeys(q, k, 0.5, mask)]}, method="published")
    for head in range(2):
        slow = [
            max(
                0.5 * sum(a * b for a, b in zip(q[s, head, queries[s] - 1].tolist(), key, strict=True))
                for key in k[s, head, : keys[s]].tolist()
            )
            for s in (0, 1)
        ]
        assert found[head].betas.tolist() == pytest.approx(slow, rel=1e-6)  # draws in float32


def test_queries_without_two_different_keys_have_no_slope():
    q, k = draw(1, 1, 3, 4), draw(1, 1, 1, 4).expand(1, 1, 5, 4)
    (head,) = head_betas({"": [QueriesKeys(q, k)]})
    assert len(head.betas) == 0
    assert math.isnan(head.median)
    assert head.radius is None
    everything = torch.ones(3, 5, dtype=torch.bool)
    for method in METHODS:
        (head,) = head_betas({"": [QueriesKeys(q, draw(1, 1, 5, 4, seed=1), mask=everything)]}, method=method)
        assert len(head.betas) == 0


@pytest.mark.parametrize("method", METHODS)
def test_calls_add_up_and_an_empty_batch_adds_nothing(method):
    calls = [
        QueriesKeys(draw(count, H, L, 4, seed=count), draw(count, H, 6, 4, seed=9)) for count in (2, 0, 3)
    ]
    heads = head_betas({"layer": calls}, method=method)
    for head in heads:
        single = [head_betas({"layer": [call]}, method=method)[head.head].betas for call in calls]
        assert_close(head.betas, torch.cat(single), **EXACT)
        assert len(single[1]) == 0


def test_nan_in_one_sample_harms_no_other():
    q, k = draw(2, 1, L, 4), draw(2, 1, L, 4, seed=1)
    q[0] = math.nan
    for method in METHODS:
        good = head_betas({"": [QueriesKeys(q[1:], k[1:])]}, method=method)[0].betas
        assert_close(head_betas({"": [QueriesKeys(q, k)]}, method=method)[0].betas, good, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_estimates_are_made_in_double(dtype):
    q, k = draw(2, H, L, 4).to(dtype), draw(2, H, L, 4, seed=1).to(dtype)
    single, double = (
        head_betas({"": [QueriesKeys(a, b)]})[0].betas for a, b in ((q, k), (q.double(), k.double()))
    )
    assert single.dtype == torch.float64
    assert torch.equal(single, double)


def test_quantiles_are_those_of_the_betas():
    (head, _) = head_betas({"": [QueriesKeys(draw(4, H, 9, 4), draw(4, H, 9, 4, seed=1))]}, n=64)
    betas = sorted(head.betas.tolist())
    assert len(betas) == 36
    assert head.quantile(0.2) == betas[7]  # the 8th of 36: 7/35 of the way
    assert head.median == pytest.approx((betas[17] + betas[18]) / 2)
    assert head.mean == pytest.approx(sum(betas) / 36)
    assert head.n == 64
    assert head.radius == radius_for_beta(64, head.median)


# --- layers


@pytest.mark.parametrize("first", [True, False])
def test_multihead_attention_gives_the_queries_and_keys_of_its_weights(first):
    layer = multihead()
    x, y = draw(B, L, E), draw(B, 7, E, seed=1)
    q, k = projected(layer, x, y)
    if not first:
        layer.batch_first, x, y = False, x.transpose(0, 1), y.transpose(0, 1)
    check(effective_betas(layer, x, y, y), slopes(q, k, [0.5] * H))


def test_masks_leave_keys_out_and_padding_queries_too():
    layer, x = multihead(), draw(B, L, E)
    q, k = projected(layer, x, x)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    padded = torch.zeros(B, L, dtype=torch.bool)
    padded[1, 3:] = True
    with watch_attention(layer) as seen:
        layer(x, x, x, attn_mask=causal, key_padding_mask=padded)
    mask = causal | padded[:, None, None] | padded[:, None, :, None]
    check(head_betas(seen), slopes(q, k, [0.5] * H, mask))


@pytest.mark.parametrize("grad", [True, False])
def test_every_layer_of_an_encoder_is_seen_also_where_a_fused_path_would_pass_it_by(grad):
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).double().eval()
    x, padded = draw(B, L, E), torch.zeros(B, L, dtype=torch.bool)
    padded[0, 4:] = True
    with torch.set_grad_enabled(grad), watch_attention(encoder) as seen:
        encoder(x, src_key_padding_mask=padded)
    assert list(seen) == ["layers.0.self_attn", "layers.1.self_attn"]
    mask = padded[:, None, None] | padded[:, None, :, None]
    q, k = projected(encoder.layers[0].self_attn, x, x)
    heads = head_betas(seen)
    check(heads[:H], slopes(q, k, [0.5] * H, mask))
    middle = encoder.layers[0](x, src_key_padding_mask=padded)
    q, k = projected(encoder.layers[1].self_attn, middle, middle)
    check(heads[H:], slopes(q, k, [0.5] * H, mask))
    assert torch.backends.mha.get_fastpath_enabled()


def test_watching_changes_neither_outputs_nor_random_numbers_nor_the_model():
    model = nn.Sequential(TimmLike(E, H, drop=0.5), nn.Dropout(0.5)).double()
    x = draw(B, L, E)
    torch.manual_seed(3)
    expected = model(x)
    names = {name: set(vars(part)) for name, part in model.named_modules()}
    torch.manual_seed(3)
    with watch_attention(model) as seen:
        assert torch.equal(model(x), expected)
    model(x)
    assert len(seen["0"]) == 1
    assert {name: set(vars(part)) for name, part in model.named_modules()} == names
    assert not any(part._forward_hooks for part in model.modules())


def test_hooks_and_the_fused_path_come_back_after_an_error():
    layer = multihead()
    with pytest.raises(AssertionError, match="embedding dimension"), watch_attention(layer):
        layer(draw(B, L, E + 1), draw(B, L, E + 1), draw(B, L, E + 1))
    assert not layer._forward_hooks
    assert torch.backends.mha.get_fastpath_enabled()


class Unit(nn.Module):
    """Vectors of this length."""

    def __init__(self, length=1.0):
        super().__init__()
        self.length = length

    def forward(self, x):
        return self.length * nn.functional.normalize(x, dim=-1)


def test_query_key_normalisation_makes_the_scale_the_beta():
    layer = TimmLike(E, H).double()
    layer.q_norm, layer.k_norm = Unit(15.6 * 2.0), Unit()  # 1/sqrt(d) is 1/2
    for head in effective_betas(layer, draw(B, L, E)):
        assert_close(head.betas, torch.full_like(head.betas, 15.6), rtol=1e-7, atol=0)
        assert head.r2 == pytest.approx(1)


def timm_heads(layer, x):
    parts = layer.qkv(x).reshape(*x.shape[:2], 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    return layer.q_norm(parts[0]).detach(), layer.k_norm(parts[1]).detach()


def test_a_vision_transformer_of_timms_kind():
    options = {"mlp_ratio": 2.0, "drop_rate": 0.0, "proj_drop_rate": 0.0, "attn_drop_rate": 0.0}
    sizes = {"img_size": (8, 8), "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": E}
    model = StandIn(**sizes, depth=2, num_heads=H, **options).double().eval()
    images = draw(B, 1, 8, 8)
    heads = effective_betas(model, images)
    assert [head.layer for head in heads] == ["blocks.0.attn"] * H + ["blocks.1.attn"] * H
    x = model.patches(images).flatten(2).transpose(1, 2) + model.place
    q, k = timm_heads(model.blocks[0]["attn"], nn.functional.layer_norm(x, x.shape[-1:]))
    check(heads[:H], slopes(q, k, [0.5] * H))


def test_timms_own_vision_transformer():
    timm_or_skip()
    from timm.models import VisionTransformer

    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=E, depth=2, num_heads=H
    )
    heads = effective_betas(model.double().eval(), draw(B, 1, 8, 8))
    assert [head.layer for head in heads] == ["blocks.0.attn"] * H + ["blocks.1.attn"] * H
    assert all(len(head.betas) == 5 * B for head in heads)  # four patches and the class token


class Other(TimmLike):
    """The same parts, put together otherwise."""

    def forward(self, x, attn_mask=None):
        return super().forward(2 * x)


Other.__name__ = "Attention"


def test_a_class_that_does_otherwise_with_timms_parts_is_not_read_as_timms():
    with pytest.raises(ValueError, match=r"it has Attention: give attention="):
        effective_betas(Other(E, H), draw(B, L, E).float())


@pytest.mark.parametrize("steps", [1, 2])
def test_converted_attention_has_the_beta_that_it_was_given(steps):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True), 1)
    encoder, x = encoder.double().eval(), draw(B, L, E)
    beta = torch.tensor([0.25, 3.0], dtype=torch.float64)
    q, k = projected(encoder.layers[0].self_attn, x, x)
    check(effective_betas(convert_attention(encoder, steps=steps, beta=beta), x), slopes(q, k, beta.tolist()))
    timm = TimmLike(E, H).double()
    check(effective_betas(convert_attention(timm, beta=2.0), x), slopes(*timm_heads(timm, x), [2.0] * H))


@pytest.mark.parametrize("steps", [1, None])
def test_hopfield_layers_give_what_they_associate(steps):
    layer = Hopfield(E, num_heads=H, beta=0.7, steps=steps, add_zero_association=True).double().eval()
    nn.init.normal_(layer.state_projection.weight)
    nn.init.normal_(layer.stored_projection.weight)
    padded = torch.zeros(B, L, dtype=torch.bool)
    padded[2, 1:3] = True
    with watch_attention(nn.ModuleDict({"a": layer})) as seen, torch.no_grad():
        layer(draw(B, L, E), stored_pattern_padding_mask=padded)
    mask = padded[:, None, None].expand(B, 1, L, L)
    q, k = layer.q, layer.k[:, :, :L]  # the zero association has no cosine
    check(head_betas(seen), slopes(q, k, [0.7] * H, mask))
    pooling = HopfieldPooling(E, num_heads=H, steps=steps).double().eval()
    assert [head.layer for head in effective_betas(pooling, draw(B, L, E))] == ["hopfield"] * H


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, states, *, stored, flag=True):
        return torch.softmax(self.q(states) @ self.k(stored).mT, -1) @ stored


def read(module, inputs):
    assert inputs["flag"] is True  # defaults are there
    return QueriesKeys(module.q(inputs["states"])[:, None], module.k(inputs["stored"])[:, None], scale=1.0)


def test_any_layer_is_read_through_a_function_of_the_users():
    layer, x, y = Mine().double(), draw(B, L, E), draw(B, 6, E, seed=1)
    with watch_attention(nn.Sequential(layer), attention={Mine: read}) as seen:
        layer(x, stored=y)
    check(head_betas(seen), slopes(layer.q(x).detach()[:, None], layer.k(y).detach()[:, None], [1.0]))
    assert not seen["0"][0].queries.requires_grad


def test_a_users_function_goes_before_what_is_known_and_may_return_a_pair():
    layer, x = multihead(), draw(B, L, E)
    pair = {nn.MultiheadAttention: lambda module, inputs: (inputs["query"][:, None], inputs["key"][:, None])}
    check(effective_betas(layer, x, x, x, attention=pair), slopes(x[:, None], x[:, None], [E**-0.5]))


def test_gpt2_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    def heads(module, inputs):
        qkv = module.c_attn(inputs["hidden_states"]).unflatten(-1, (3, module.num_heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        return QueriesKeys(q, k, mask=torch.ones(q.shape[2], k.shape[2]).triu(1).bool())

    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_layer=2, n_head=H, n_embd=E, vocab_size=50, **tokens)
    model = transformers.GPT2Model(config).eval()
    found = effective_betas(model, torch.arange(6)[None], attention={GPT2Attention: heads})
    assert [head.layer for head in found] == ["h.0.attn"] * H + ["h.1.attn"] * H
    assert all(len(head.betas) == 5 for head in found)  # the first token sees itself alone


# --- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: effective_betas(nn.Linear(2, 2), torch.zeros(1, 2)),
            ValueError,
            "no attention that is known",
        ),
        (lambda: effective_betas("model"), TypeError, "model must be an nn.Module, got 'model'"),
        (
            lambda: effective_betas(multihead(), attention={"Mine": read}),
            TypeError,
            "must map classes of modules",
        ),
        (lambda: head_betas({"": []}), ValueError, "no attention layer was called"),
        (
            lambda: head_betas({"": [QueriesKeys(draw(1, 1, 2, 2), draw(1, 1, 2, 2))]}, method="fits"),
            ValueError,
            "Did you mean 'fit'",
        ),
        (
            lambda: head_betas({"": [QueriesKeys(draw(1, 1, 2, 2), draw(1, 1, 2, 2))]}, n=1),
            ValueError,
            "n must be a whole number of at least 2",
        ),
        (lambda: radius_for_beta(64, 0.0), ValueError, "beta must be a finite number above 0, got 0.0"),
        (lambda: radius_for_beta(1, 2.0), ValueError, "n must be a whole number of at least 2"),
        (lambda: radius_for_beta(64, 2.0, estimator="olz"), ValueError, "Did you mean 'ols'"),
        (lambda: beta_statistics([]), ValueError, "betas must be finite numbers, at least one"),
        (lambda: beta_statistics([1.0, math.nan]), ValueError, "betas must be finite numbers"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ((torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)), ValueError),
        ((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)), ValueError),
        ((torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)), ValueError),
        ((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), None, torch.zeros(3, 3)), TypeError),
    ],
)
def test_what_a_users_function_returns_is_checked(found, error):
    with pytest.raises(error, match="of '' must be"):
        effective_betas(Unit(), torch.zeros(1, 2), attention={Unit: lambda module, inputs: found})


# --- radii and learnt betas


@pytest.mark.parametrize("n", [8, 64, 100])
def test_the_radius_of_a_fitted_beta_is_the_one_it_was_fitted_to(n):
    for estimator in ("ols", "published"):
        for d in range(2, n - 1):
            beta = fit_beta(n, d, estimator=estimator).beta
            assert radius_for_beta(n, beta, estimator=estimator) == d
    assert radius_for_beta(n, 1.01 * fit_beta(n, 2).beta) is None


@cache
def betas_of_64():
    return {d: fit_beta(64, d).beta for d in range(2, 60)}


@given(st.floats(0.01, 80))
def test_no_other_radius_has_a_nearer_beta(beta):
    betas = betas_of_64()
    nearest = min(betas, key=lambda d: abs(math.log(betas[d] / beta)))
    assert radius_for_beta(64, beta) == nearest


def test_betas_of_the_optimal_radii_as_published_and_by_least_squares():
    published, ols = optimal_betas(estimator="published"), optimal_betas()
    assert published.radii == ols.radii == {"memory": 5, "snr": 11, "critical_distance": 15}
    order = ("memory", "snr", "critical_distance")
    assert [published.betas[name] for name in order] == pytest.approx(
        [35.48476, 15.85277, 10.11042], abs=5e-6
    )
    assert [ols.betas[name] for name in order] == pytest.approx([28.38781, 14.41160, 9.43639], abs=5e-6)


def test_query_key_norm_betas_are_those_recorded_and_lie_between_the_optima():
    case = recorded("kqnorm_all")["value"]
    ours = (
        QUERY_KEY_NORM.count,
        QUERY_KEY_NORM.mean,
        QUERY_KEY_NORM.deviation,
        QUERY_KEY_NORM.median,
        QUERY_KEY_NORM.least,
        QUERY_KEY_NORM.largest,
    )
    assert ours == pytest.approx(
        tuple(case[k] for k in ("count", "mean", "std_ddof0", "median", "min", "max"))
    )
    below = {"published": case["count_below_15_9"], "ols": case["count_below_corrected_snr_14_412"]}
    assert below == QUERY_KEY_NORM_BELOW_SNR
    for estimator in ("published", "ols"):
        assert optimal_betas(estimator=estimator).contain(QUERY_KEY_NORM)


def test_containment_and_counts_of_given_betas():
    optima = optimal_betas()
    assert optima.contain([9.5, 28.3])
    assert not optima.contain([9.4, 20.0])
    assert not optima.contain(torch.tensor([10.0, 28.4]))
    below = {"memory": 3, "snr": 2, "critical_distance": 1}
    assert optima.count_below([1.0, 10.0, 20.0, 30.0]) == below
    stats = beta_statistics([1.0, 2.0, 6.0, 3.0])
    assert (stats.count, stats.mean, stats.median, stats.least, stats.largest) == (4, 3.0, 2.5, 1.0, 6.0)
    assert stats.deviation == pytest.approx(np.std([1, 2, 6, 3]))
