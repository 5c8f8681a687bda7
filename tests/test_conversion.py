"""convert_attention with steps=1: outputs, gradients and interfaces are those of torch's own attention."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import F64, normal
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf.models.attention import ConvertedAttention
from hopdeq_lwpf.models.conversion import convert_attention

# torch says so where its fused path, which the original takes, makes nested tensors.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
N, L, S, E, H = 3, 4, 6, 8, 2
LAYERS = {
    "plain": {},
    "without bias": {"bias": False},
    "sequence first": {"batch_first": False},
    "own widths": {"kdim": 5, "vdim": 7},
    "one own width, without bias": {"kdim": 5, "bias": False},
    "learned key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "both keys, own widths": {"add_bias_kv": True, "add_zero_attn": True, "vdim": 3},
    "one head": {"num_heads": 1},
}


def causal(queries, keys):
    return torch.ones(queries, keys).triu(1).bool()


def padding(batch, keys):
    mask = torch.zeros(batch, keys, dtype=torch.bool)
    mask[0, keys - 2 :] = True
    return mask


def floats(mask):
    return torch.zeros(mask.shape, dtype=F64).masked_fill(mask, -torch.inf)


def per_head(low):
    """(N H, L, S), another mask for each head; the first key is always seen."""
    return torch.cat([torch.zeros(N * H, L, 1), (normal(N * H, L, S - 1, seed=9) > low)], 2).bool()


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": padding(N, S)},
    "causal": {"attn_mask": causal(L, S)},
    "hint": {"attn_mask": causal(L, S), "is_causal": True},
    "padding and causal": {"attn_mask": causal(L, S), "key_padding_mask": padding(N, S)},
    "float": {"attn_mask": floats(causal(L, S)), "key_padding_mask": floats(padding(N, S))},
    "bias": {"attn_mask": normal(L, S, seed=8), "key_padding_mask": floats(padding(N, S))},
    "two biases": {"attn_mask": normal(L, S, seed=8), "key_padding_mask": normal(N, S, seed=7)},
}
HEAD_MASKS = {
    "bool": {"attn_mask": per_head(0.5)},
    "float": {"attn_mask": floats(per_head(0.5)), "key_padding_mask": floats(padding(N, S))},
    "bias": {"attn_mask": normal(N * H, L, S, seed=6)},
}


def attention(**options):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(
        **{"embed_dim": E, "num_heads": H, "batch_first": True, **options}, dtype=F64
    )
    for parameter in layer.parameters():  # biases start at zero, which would hide a wrong one
        nn.init.normal_(parameter, std=0.5)
    return layer


def inputs(layer, batched=True):
    shapes = ((N, L, layer.embed_dim), (N, S, layer.kdim), (N, S, layer.vdim))
    tensors = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes, 3)]
    if not batched:
        tensors = [tensor[0] for tensor in tensors]
    elif not layer.batch_first:
        tensors = [tensor.transpose(0, 1) for tensor in tensors]
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def run(layer, tensors, **options):
    """Output, associations, and the gradients to inputs and parameters."""
    output, weights = layer(*tensors, **options)
    loss = output.pow(2).sum() + (0 if weights is None else weights.pow(3).sum())
    leaves = [*dict.fromkeys(tensors), *layer.parameters()]
    return output, weights, torch.autograd.grad(loss, leaves)


def assert_same(layer, tensors, **options):
    copied = convert_attention(layer)
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in layer.named_parameters()]
    assert_close(run(copied, tensors, **options), run(layer, tensors, **options), **EXACT)


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_outputs_associations_and_gradients_are_torchs(options, masks):
    layer = attention(**options)
    assert_same(layer, inputs(layer), **masks)


@pytest.mark.parametrize("masks", HEAD_MASKS.values(), ids=HEAD_MASKS)
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "batch_first": False}], ids=["plain", "key"])
def test_masks_for_each_head_are_torchs(options, masks):
    layer = attention(**options)
    assert_same(layer, inputs(layer), **masks)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("need", [True, False])
def test_what_is_returned_is_torchs(average, batched, need):
    layer = attention()
    options = {"need_weights": need, "average_attn_weights": average}
    assert_same(layer, inputs(layer, batched), **options)
    mask = padding(N, S)[0] if not batched else padding(N, S)
    assert_same(layer, inputs(layer, batched), key_padding_mask=mask, **options)


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_takes_one_projection_and_gives_the_same(batch_first):
    layer = attention(batch_first=batch_first)
    x = normal(N, L, E).requires_grad_()
    assert_same(layer, [x, x, x])


def test_dropout_in_training_drops_the_same_with_the_same_seed():
    layer = attention(dropout=0.4)
    copied, tensors = convert_attention(layer), inputs(layer)
    torch.manual_seed(3)
    expected = layer(*tensors)
    torch.manual_seed(3)
    assert_close(copied(*tensors), expected, **EXACT)
    assert not torch.allclose(copied(*tensors)[0], copied(*tensors)[0])
    assert_close(copied.eval()(*tensors), layer.eval()(*tensors), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_keep_their_dtype_and_precision(dtype):
    layer = attention(add_bias_kv=True).to(dtype)
    tensors = [tensor.detach().to(dtype) for tensor in inputs(layer)]
    output, weights = convert_attention(layer)(*tensors)
    expected = layer.double()(*(tensor.double() for tensor in tensors))
    assert (output.dtype, weights.dtype) == (dtype, dtype)
    # A few roundings of numbers of up to 10.
    assert_close((output.double(), weights.double()), expected, rtol=0, atol=50 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("steps", [1, 2, None])
def test_autocast_computes_in_bfloat16(steps):
    layer = attention(add_bias_kv=True).float()
    tensors = [tensor.detach().float() for tensor in inputs(layer)]
    copied = convert_attention(layer, steps=steps, on_failure="ignore").requires_grad_(False)
    exact = copied(*tensors)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = copied(*tensors, key_padding_mask=padding(N, S) & False)[0]
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    if steps is not None:  # an equilibrium in bf16 may lie in another basin
        # Outputs are of the order of 10, and bf16 has 8 bits.
        assert_close(output.float(), exact, rtol=0, atol=0.1)


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        E, H, 12, **{"batch_first": True, "dropout": 0.0, **options}, dtype=F64
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masks", [{}, {"src_key_padding_mask": padding(N, S)}, {"mask": causal(S, S)}])
def test_an_encoder_is_the_same_in_every_mode_and_is_not_passed_by(training, masks):
    model = encoder().train(training)
    copied = convert_attention(model)
    x, seen = normal(N, S, E), ~masks.get("src_key_padding_mask", torch.zeros(N, S, dtype=torch.bool))
    with torch.no_grad():  # in eval mode this is where torch takes its fused path
        expected, actual = model(x, **masks), copied(x, **masks)
    # At padded places torch's nested tensors leave zeros.
    assert_close(actual[seen], expected[seen], **EXACT)
    assert all(layer.self_attn.last_solution is not None for layer in copied.layers)
    with torch.no_grad():
        dialled = convert_attention(model, forgetting="pfu", beta=5.0)(x, **masks)
    assert not torch.allclose(dialled[seen], expected[seen], atol=1e-3)


def test_a_lone_encoder_layer_is_not_passed_by_either():
    layer = encoder().layers[0].eval()
    copied, x = convert_attention(layer), normal(N, S, E)
    with torch.no_grad():
        assert_close(copied(x), layer(x), **EXACT)
    assert copied.self_attn.last_solution.value.shape == (N, H, S, E // H)


def test_a_whole_transformer_trains_as_the_original():
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 1, 2, 12, 0.0, batch_first=True, dtype=F64)
    source, target = normal(N, S, E), normal(N, L, E, seed=2)
    options = {"tgt_mask": causal(L, L), "tgt_is_causal": True, "memory_key_padding_mask": padding(N, S)}

    def gradients(module):
        return torch.autograd.grad(module(source, target, **options).pow(2).sum(), module.parameters())

    copied = convert_attention(model)
    assert_close(gradients(copied), gradients(model), **EXACT)
    assert len(copied.conversion_report.converted) == 5
    assert copied.decoder.layers[0].multihead_attn.last_solution.result.shape == (N, H, L)


def test_the_original_stays_as_it_was():
    model = encoder()
    before = copy.deepcopy(model)
    copied = convert_attention(model, steps=None, forgetting="relu")
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert str(model) == str(before)
    assert model.use_nested_tensor
    assert not copied.use_nested_tensor
    assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)


def test_state_dicts_fit_both_ways():
    model = encoder()
    copied = convert_attention(model)
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    copied.load_state_dict(model.state_dict())
    x = normal(N, S, E)
    assert_close(copied(x), model(x), **EXACT)
    encoder().load_state_dict(copied.state_dict())


def test_parameters_that_were_tied_and_layers_that_were_shared_stay_so():
    shared = attention()
    other = attention()
    other.out_proj.weight = shared.out_proj.weight
    model = nn.ModuleDict({"a": shared, "b": shared, "c": other})
    copied = convert_attention(model)
    assert copied["a"] is copied["b"]
    assert copied["a"].out_proj.weight is copied["c"].out_proj.weight
    assert [part.name for part in copied.conversion_report.converted] == ["a", "b", "c"]


def test_hooks_and_the_mode_come_along():
    layer = attention().eval()
    layer.register_forward_hook(lambda module, arguments, output: (output[0] + 1, output[1]))
    copied = convert_attention(layer)
    assert not any(part.training for part in copied.modules())
    tensors = inputs(layer)
    assert_close(copied(*tensors), layer(*tensors), **EXACT)


def test_copies_and_pickles_keep_the_dials_and_leave_the_last_solution():
    copied = convert_attention(encoder(), steps=3, forgetting="pfu", beta=torch.tensor([1.0, 2.0], dtype=F64))
    x = normal(N, S, E)
    expected = copied(x)
    for other in (copy.deepcopy(copied), pickle.loads(pickle.dumps(copied))):
        assert other.layers[0].self_attn.last_solution is None
        assert str(other.conversion_report) == str(copied.conversion_report)
        assert_close(other(x), expected, rtol=0, atol=0)


def test_double_and_meta_reach_everything():
    copied = convert_attention(attention().float(), beta=torch.ones(H)).double()
    assert copied.retrieval.beta.dtype == F64
    assert copied(*inputs(copied))[0].dtype == F64
    distant = convert_attention(attention().to("meta"))
    shape = distant(*(torch.empty(N, S, E, dtype=F64, device="meta") for _ in "qkv"))[0].shape
    assert shape == (N, S, E)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.parametrize("steps", [1, 3, None])
def test_compiled_models_compute_the_same(steps):
    torch._dynamo.reset()
    copied = convert_attention(encoder().eval(), steps=steps, forgetting="pfu", inject="input")
    compiled = torch.compile(copied, backend="aot_eager")
    x, mask = normal(N, S, E), padding(N, S)
    with torch.no_grad():
        assert_close(compiled(x, src_key_padding_mask=mask), copied(x, src_key_padding_mask=mask), **EXACT)
    torch._dynamo.reset()


@pytest.mark.parametrize("steps", [1, 2, None])
@pytest.mark.parametrize("shape", [(0, L), (2, 0)])
def test_no_batch_and_no_query_give_nothing(steps, shape):
    copied = convert_attention(attention(), steps=steps, forgetting="pfu")
    query, key = torch.zeros(*shape, E, dtype=F64), torch.zeros(shape[0], S, E, dtype=F64)
    output, weights = copied(query, key, key, key_padding_mask=torch.zeros(shape[0], S, dtype=torch.bool))
    assert (output.shape, weights.shape) == ((*shape, E), (*shape, S))
    assert copied.last_solution.result.shape == (shape[0], H, shape[1])
    output.sum().backward()
    assert copied.in_proj_weight.grad.abs().max() == 0


def test_rows_without_any_key_read_out_zero_and_are_reported():
    layer = attention()
    with torch.no_grad():
        layer.out_proj.bias.zero_()
    tensors, mask = inputs(layer), padding(N, S)
    mask[1] = True
    assert layer(*tensors, key_padding_mask=mask)[0][1].isnan().all()
    for steps in (1, 2, None):
        copied = convert_attention(layer, steps=steps, inject="input")
        output, weights, gradients = run(copied, tensors, key_padding_mask=mask)
        assert output[1].abs().max() == weights[1].abs().max() == 0
        assert copied.last_solution.empty.any(-1).any(-1).tolist() == [False, True, False]
        assert all(g.isfinite().all() for g in gradients)
        others = copied(*(t[::2] for t in tensors), key_padding_mask=mask[::2])[0]
        # Solves of other batches stop at other checks of the same tolerance, 1e-5.
        assert_close(output[::2], others, rtol=1e-4, atol=1e-4)


def test_every_converted_layer_is_of_one_kind():
    copied = convert_attention(nn.Sequential(encoder(), nn.Linear(E, 2)))
    layers = [part for part in copied.modules() if isinstance(part, ConvertedAttention)]
    assert len(layers) == 2
    assert not any(isinstance(part, nn.MultiheadAttention) for part in copied.modules())


@st.composite
def problems(draw):
    """A layer of any size, its input, and masks under which every query sees a key."""
    heads, width, batch = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    layer = attention(
        embed_dim=heads * width,
        num_heads=heads,
        bias=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        batch_first=draw(st.booleans()),
    )
    shapes = [(batch, queries, heads * width)] + 2 * [(batch, keys, heads * width)]
    tensors = [normal(*shape, seed=draw(st.integers(0, 99))) for shape in shapes]
    if not layer.batch_first:
        tensors = [tensor.transpose(0, 1) for tensor in tensors]
    masks = {}
    if draw(st.booleans()):
        masks["attn_mask"] = normal(queries, keys, seed=draw(st.integers(0, 99))) > 0
    if draw(st.booleans()):
        masks["key_padding_mask"] = normal(batch, keys, seed=draw(st.integers(0, 99))) > 0
    for mask in masks.values():
        mask[:, 0] = False
    return layer, tensors, {name: floats(m) if draw(st.booleans()) else m for name, m in masks.items()}


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@given(problems())
def test_any_layer_and_any_masks_give_torchs_numbers(problem):
    layer, tensors, masks = problem
    with torch.no_grad():
        assert_close(convert_attention(layer)(*tensors, **masks), layer(*tensors, **masks), **EXACT)


def test_gradients_of_each_sample_by_vmap():
    copied = convert_attention(attention(), steps=2, forgetting="pfu")
    tensors = [t.detach() for t in inputs(copied)]
    parameters = dict(copied.named_parameters())

    def loss(parameters, *sample):
        return torch.func.functional_call(copied, parameters, sample)[0].pow(2).sum()

    every = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, *tensors)
    for i in range(N):
        one = torch.func.grad(loss)(parameters, *(t[i] for t in tensors))
        assert_close({name: g[i] for name, g in every.items()}, one, **EXACT)
