"""Which layers convert_attention takes, what it says of the others, and what it refuses."""

import pytest
import torch
from problems import F64, normal
from test_conversion import E, H, L, N, S, attention, encoder, padding
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models.conversion import convert_attention


class Own(nn.MultiheadAttention):
    def forward(self, query, key, value, **options):
        return query, None


class Renamed(nn.MultiheadAttention):
    pass


class LinearAttention(nn.Module):
    def forward(self, x):
        return x


def names(parts):
    return [part.name for part in parts]


def test_the_report_names_what_was_converted_and_what_was_not_and_why():
    kinds = {"own": Own(E, H), "linear": LinearAttention(), "renamed": Renamed(E, H)}
    model = nn.ModuleDict({**kinds, "bound": orthogonal(nn.MultiheadAttention(E, H), "in_proj_weight")})
    report = convert_attention(model).conversion_report
    assert str(report) == (
        "converted: 1\n"
        "  renamed: nn.MultiheadAttention, 2 heads of width 4, model width 8\n"
        "not converted: 3\n"
        "  own: Own, a subclass of nn.MultiheadAttention with a forward of its own\n"
        "  linear: LinearAttention, not known; known are nn.MultiheadAttention and timm's Attention\n"
        "  bound: ParametrizedMultiheadAttention, its weights are parametrized; remove the parametrizations first"
    )


def test_patterns_choose_layers():
    model = nn.ModuleDict({"left": encoder(), "right": encoder()})
    everything = ["left.layers.0.self_attn", "left.layers.1.self_attn"]
    everything += [name.replace("left", "right") for name in everything]
    assert names(convert_attention(model).conversion_report.converted) == everything
    left = convert_attention(model, only="left.*").conversion_report
    assert names(left.converted) == everything[:2]
    assert left.skipped[0].reason == "not among only=['left.*']"
    rest = convert_attention(model, exclude=["*.0.*", "right.layers.1.self_attn"]).conversion_report
    assert names(rest.converted) == [everything[1]]
    assert names(convert_attention(attention(), only="").conversion_report.converted) == [""]


def test_layers_that_are_left_out_work_on():
    model = encoder().eval()
    copied = convert_attention(model, only="layers.1.*", forgetting="pfu")
    assert type(copied.layers[0].self_attn) is nn.MultiheadAttention
    with torch.no_grad():
        assert copied(normal(N, S, E), src_key_padding_mask=padding(N, S)).isfinite().all()


def test_dials_of_one_layer_can_be_set_without_the_others():
    copied = convert_attention(encoder(), steps=2)
    mixed = convert_attention(copied, steps=5, only="layers.1.*")
    assert [layer.self_attn.steps for layer in mixed.layers] == [2, 5]


BAD = {
    "no module": (lambda: convert_attention(3), TypeError, "model must be an nn.Module, got 3"),
    "a class": (lambda: convert_attention(nn.Linear), TypeError, r"give an instance, Linear\("),
    "nothing": (lambda: convert_attention(nn.Linear(2, 2)), ValueError, "Nothing in it looks like attention"),
    "unknown": (lambda: convert_attention(LinearAttention()), ValueError, "LinearAttention, not known"),
    "all excluded": (lambda: convert_attention(encoder(), exclude="*"), ValueError, "nothing in the model"),
    "no match": (
        lambda: convert_attention(encoder(), only="layers.1.self_atn"),
        ValueError,
        "Did you mean 'layers.1.self_attn'",
    ),
    "no match of one": (lambda: convert_attention(encoder(), exclude=["*", "x"]), ValueError, "exclude='x'"),
    "no pattern": (lambda: convert_attention(encoder(), only=[]), TypeError, "only must be a name"),
    "pattern": (lambda: convert_attention(encoder(), only=[1]), TypeError, "only must be a name"),
    "steps": (lambda: convert_attention(encoder(), steps=0), ValueError, "steps must be None"),
    "unit": (lambda: convert_attention(encoder(), forgetting="pfo"), ValueError, "'pfu'"),
    "class": (lambda: convert_attention(encoder(), forgetting=PFU), TypeError, r"PFU\("),
    "separation": (lambda: convert_attention(encoder(), separation="softmx"), ValueError, "'softmax'"),
    "inject": (lambda: convert_attention(encoder(), inject="inputs"), ValueError, "'input'"),
    "solver": (lambda: convert_attention(encoder(), solver="picar"), ValueError, "'picard'"),
    "adjoint": (lambda: convert_attention(encoder(), adjoint="implict"), ValueError, "'implicit'"),
    "stop": (lambda: convert_attention(encoder(), stop=1e-3), TypeError, "stop must be a Termination"),
    "on_failure": (lambda: convert_attention(encoder(), on_failure="warm"), ValueError, "'warn'"),
    "beta": (lambda: convert_attention(encoder(), beta=-1.0), ValueError, "beta must be > 0"),
    "betas": (
        lambda: convert_attention(encoder(), beta=torch.ones(3)),
        ValueError,
        r"one entry a head, \(2,\)",
    ),
    "beta of two dimensions": (
        lambda: convert_attention(encoder(), beta=torch.ones(2, 2)),
        ValueError,
        r"\(H,\), got \(2, 2\)",
    ),
    "weight": (lambda: convert_attention(encoder(), inject_weight="a"), TypeError, "inject_weight must be"),
}


@pytest.mark.parametrize(("call", "kind", "text"), BAD.values(), ids=BAD)
def test_bad_settings_are_refused_with_advice(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_a_model_of_layers_with_other_numbers_of_heads_takes_betas_one_by_one():
    model = nn.ModuleDict({"two": attention(), "one": attention(num_heads=1)})
    with pytest.raises(ValueError, match="only="):
        convert_attention(model, beta=torch.ones(2))
    copied = convert_attention(model, beta=torch.ones(2), only="two")
    copied = convert_attention(copied, beta=3.0, only="one")
    assert (copied["two"].retrieval.beta.shape, copied["one"].retrieval.beta) == ((2,), 3.0)


QUERY, KEY = torch.zeros(N, L, E, dtype=F64), torch.zeros(N, S, E, dtype=F64)
CALLS = {
    "width": ((QUERY[..., :3], KEY, KEY), {}, ValueError, "query must be .* with E = 8"),
    "dimensions": ((QUERY, KEY[0], KEY), {}, ValueError, "key must be"),
    "integers": ((QUERY, KEY.long(), KEY), {}, TypeError, "key must have a floating-point dtype"),
    "lengths": ((QUERY, KEY, KEY[:, :2]), {}, ValueError, "key and value the length"),
    "batches": ((QUERY[:1], KEY, KEY), {}, ValueError, "must share the batch"),
    "padding": (
        (QUERY, KEY, KEY),
        {"key_padding_mask": padding(N, 4)},
        ValueError,
        "key_padding_mask must have",
    ),
    "mask": ((QUERY, KEY, KEY), {"attn_mask": padding(L, 4)}, ValueError, r"\(4, 6\) or \(6, 4, 6\)"),
    "mask of bytes": (
        (QUERY, KEY, KEY),
        {"attn_mask": torch.zeros(L, S, dtype=torch.uint8)},
        TypeError,
        "attn_mask must be a bool tensor",
    ),
    "no key": ((QUERY, KEY[:, :0], KEY[:, :0]), {}, ValueError, "key holds no entry"),
}


@pytest.mark.parametrize(("arguments", "options", "kind", "text"), CALLS.values(), ids=CALLS)
def test_bad_input_is_refused_with_advice(arguments, options, kind, text):
    with pytest.raises(kind, match=text):
        convert_attention(attention())(*arguments, **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_with_advice():
    nested = torch.nested.nested_tensor([torch.zeros(2, E), torch.zeros(3, E)], dtype=F64)
    with pytest.raises(TypeError, match="give key_padding_mask"):
        convert_attention(attention())(nested, nested, nested)
