"""Embedding of amino-acid sequences: against a convolution in plain Python, padding, gradients, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import exactly
from torch.testing import assert_close

from hopdeq_lwpf.data import encode_sequences
from hopdeq_lwpf.models import SequenceEmbedding, sequences
from hopdeq_lwpf.models.sequences import best_rows, position_features

F64 = torch.float64
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def ramps(place, count):
    """Start, end and centre of one letter."""
    p = 2 * place / (count - 1) - 1 if count > 1 else 0.0
    return [max(-p, 0.0), max(p, 0.0), 1 - abs(p)]


def embed_slowly(codes, weight, bias):
    """One sequence of codes without padding: the largest activation of each kernel over all letters."""
    count, size = len(codes), len(weight[0][0])
    columns = [
        [1.0 if code == letter else 0.0 for letter in range(20)] + ramps(place, count)
        for place, code in enumerate(codes)
    ]
    out = []
    for kernel, shift in zip(weight, bias, strict=True):
        largest = -math.inf
        for centre in range(count):
            total = shift
            for tap in range(size):
                at = centre + tap - size // 2
                if 0 <= at < count:
                    total += sum(kernel[c][tap] * columns[at][c] for c in range(23))
            largest = max(largest, total)
        out.append(SELU_SCALE * (largest if largest > 0 else SELU_ALPHA * (math.exp(largest) - 1)))
    return out


def made(kernels=3, size=9, dtype=F64):
    embedding = SequenceEmbedding(kernels, size).to(dtype)
    with torch.no_grad():
        embedding.bias.copy_(torch.randn(kernels))
    return embedding


def padded(rows, longest=None):
    longest = max(map(len, rows)) if longest is None else longest
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows], dtype=torch.int8)


SEQUENCES = st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=14), min_size=1, max_size=5)


@given(SEQUENCES, st.integers(1, 10))
def test_the_embedding_is_the_convolution_in_plain_python(rows, size):
    embedding = made(size=size)
    weight, bias = embedding.weight.tolist(), embedding.bias.tolist()
    want = torch.tensor([embed_slowly(row, weight, bias) for row in rows], dtype=F64)
    # Sums of at most 10 * 4 numbers of order one.
    assert_close(embedding(padded(rows)), want, rtol=1e-12, atol=1e-12)


@given(SEQUENCES, st.integers(0, 30))
def test_padding_and_the_other_sequences_change_nothing(rows, more):
    embedding = made()
    together = embedding(padded(rows, max(map(len, rows)) + more))
    alone = torch.cat([embedding(padded([row])) for row in rows])
    # The table of positions is a product of another shape, which rounds otherwise.
    assert_close(together, alone, rtol=1e-13, atol=1e-13)


def test_gradients_are_those_of_finite_differences():
    codes, _ = encode_sequences(["SFENACDEFG", "AC", "W", "CASSLGQYEQYF"])
    embedding = made(kernels=4, size=5)

    def call(weight, bias):
        return torch.func.functional_call(embedding, {"weight": weight, "bias": bias}, (codes,))

    inputs = [part.detach().clone().requires_grad_() for part in (embedding.weight, embedding.bias)]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_gradients_under_torch_func_are_those_of_autograd():
    codes, _ = encode_sequences(["SFENACDEFG", "AC"])
    embedding = made()
    parameters = dict(embedding.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(embedding, parameters, (codes,)).square().sum()

    got = torch.func.grad(loss)(parameters)
    want = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for name, gradient in zip(parameters, want, strict=True):
        assert_close(got[name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("longest", [1, 5, 300])
def test_the_best_rows_are_a_sum_and_a_maximum(longest, monkeypatch):
    monkeypatch.setattr(sequences, "BLOCK", 10)
    table = torch.randn(700, 3, dtype=F64, requires_grad=True)
    rows = torch.randint(0, 700, (7, longest, 2), dtype=torch.int32)
    got = best_rows(table, rows)
    want = table[rows.long()].sum(2).amax(1)
    exactly(got, want)
    weights = torch.randn_like(want)
    (ours,) = torch.autograd.grad(got, table, weights)
    (theirs,) = torch.autograd.grad(want, table, weights)
    assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_position_features_are_ramps_that_sum_to_one(count):
    got = position_features(torch.tensor([count]), 12)[0]
    assert_close(got[:count].double(), torch.tensor([ramps(i, count) for i in range(count)], dtype=F64))
    assert_close(got[:count].sum(-1), torch.ones(count))
    assert not got[count:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_agree_to_their_rounding(dtype):
    codes, _ = encode_sequences(["SFENACDEFG", "AC", "W"])
    embedding = made().to(dtype)
    want = made()
    want.load_state_dict(embedding.state_dict())
    got = embedding(codes)
    assert got.dtype == dtype
    # Sums of up to 15 numbers of order one.
    assert_close(got.double(), want(codes), rtol=0, atol=16 * torch.finfo(dtype).eps)
    got.sum().backward()
    assert embedding.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int16, torch.int64])
def test_any_integer_dtype_will_do(kind):
    codes = torch.randint(0, 20, (2, 3, 7))
    embedding = made()
    exactly(embedding(codes.to(kind)), embedding(codes))
    assert embedding(codes).shape == (2, 3, 3)


def test_no_sequences_give_no_embeddings_and_a_gradient_of_zero():
    embedding = made()
    for shape in ((0, 7), (2, 0, 7), (0, 0)):
        out = embedding(torch.zeros(shape, dtype=torch.int8))
        assert out.shape == (*shape[:-1], 3)
    out.sum().backward()
    assert not embedding.bias.grad.any()


def test_activations_start_at_unit_variance_around_the_first_bias():
    embedding = SequenceEmbedding(2000, 9)
    codes = torch.randint(0, 20, (1, 9))
    with torch.no_grad():
        embedding.bias.add_(20)  # far above 0, where SELU is linear
        out = embedding(codes) / SELU_SCALE - 20 + 1.7
    # The largest of nine activations, of which those at the ends see half of the letters: about 1.3.
    assert 1.0 < float(out.mean()) < 1.6
    assert 0.4 < float(out.std()) < 0.8


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, "integers"),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, "integers"),
        ([[1, 2]], TypeError, "torch.Tensor"),
        (torch.tensor(3), ValueError, "scalar"),
        (torch.tensor([[1, 2], [3, 20]]), ValueError, r"at \(1, 1\) is 20"),
        (torch.tensor([[1, -2], [3, 4]]), ValueError, r"at \(0, 1\) is -2"),
        (torch.tensor([[1, 2], [-1, -1]]), ValueError, r"\(1,\) has no letters"),
        (torch.tensor([[1, -1, 4]]), ValueError, r"at \(0, 2\) is 4, after padding"),
    ],
)
def test_codes_that_cannot_be_are_named(codes, error, message):
    with pytest.raises(error, match=message):
        SequenceEmbedding()(codes)


def test_sizes_must_be_counts():
    with pytest.raises(ValueError, match="kernel_size"):
        SequenceEmbedding(kernel_size=0)
    with pytest.raises(ValueError, match="kernels"):
        SequenceEmbedding(kernels=1.5)
