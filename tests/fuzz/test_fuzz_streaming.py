"""Retrieval from blocks of patterns beside retrieval from a tensor: the same to rounding, or refused by name."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzz.profiles import answer, examples, only_convergence_warnings, within
from fuzz.strategies import (
    DTYPES,
    forgetting_units,
    masks,
    moderate_positive,
    positive,
    separations,
    tensors,
    terminations,
)
from fuzz.test_fuzz_files import LARGE, archive, damaged, memory_file, npy, npy_claims, read
from hopdeq_lwpf import Result, open_patterns, retrieve
from hopdeq_lwpf.streaming import BlockPatterns, TensorPatterns

# What cannot be streamed says so by the name of what stands in the way.
ARGUMENTS = ("stream", "screen", "separation", "forgetting", "patterns", "normalize", "adjoint")
FORMS = ("tensor", "tensor source", "blocks", "function")


def as_form(form, patterns, size):
    """The patterns as something that is read in blocks."""
    if form == "tensor":
        return patterns
    if form == "tensor source":
        return TensorPatterns(patterns, block=size)
    parts = patterns.split(size)
    return BlockPatterns(list(parts) if form == "blocks" else lambda: iter(parts), block=size)


@st.composite
def calls(draw, kind="moderate", dtypes=(torch.float64,), floats=moderate_positive):
    """Query, patterns, and options that both ways take."""
    batch = tuple(draw(st.lists(st.integers(0, 3), max_size=2) | st.just((9,))))
    count, width = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(dtypes))
    query, patterns = draw(tensors((*batch, width), dtype, kind)), draw(tensors((count, width), dtype, kind))
    similarity = draw(st.sampled_from((None, "dot", "euclidean")))
    mask = draw(st.sampled_from((None, None, (count,), (*batch, count))))
    options = {
        "beta": draw(floats),
        "separation": draw(st.sampled_from(("softmax", "softmax", "softmax1")) | separations()),
        "forgetting": draw(forgetting_units(count)),
        "similarity": similarity,
        "normalize": draw(st.sampled_from((None, "sphere", "layernorm"))) if similarity == "dot" else None,
        "inject": draw(st.sampled_from(("start", "input"))),
        "mask": None if mask is None else draw(masks(mask)),
        "values": draw(st.none() | tensors((count, 2), dtype)),
        "steps": draw(st.sampled_from((None, 1, 2, 3))),
        "stop": draw(terminations(40)),
    }
    return query, patterns, options


def seeded(*arguments, **options):
    """`retrieve` with the same noise on thresholds each time."""
    torch.manual_seed(0)
    return retrieve(*arguments, **options)


@examples(60)
@given(calls(), st.sampled_from(FORMS), st.integers(1, 4), st.sampled_from((None, False, True)))
def test_blocks_recall_what_a_tensor_does(call, form, size, screen):
    query, patterns, options = call
    source = as_form(form, patterns, size)
    streamed = answer(lambda: seeded(query, source, **options, stream=True, screen=screen), *ARGUMENTS)
    if streamed is None:
        return
    with within(), only_convergence_warnings():
        whole = seeded(query, patterns, **options, stream=False)
    assert streamed.value.shape == whole.value.shape
    for name in ("result", "index", "support", "steps"):
        assert getattr(streamed, name).shape == getattr(whole, name).shape
    assert (streamed.result != Result.NONFINITE).all() == (whole.result != Result.NONFINITE).all()
    if options["steps"] is not None:
        assert torch.allclose(streamed.value, whole.value, rtol=1e-7, atol=1e-7)
        assert torch.allclose(streamed.weight, whole.weight, rtol=1e-7, atol=1e-7)
        assert torch.equal(streamed.index == -1, whole.index == -1)
    elif screen is False:
        # Unscreened the iterates are the same, but for rounding, which may choose between patterns that tie.
        with within(), only_convergence_warnings():
            moved = seeded(query * (1 + 1e-9), patterns * (1 - 1e-9), **options, stream=False)
        stable = torch.isclose(moved.value, whole.value, rtol=1e-6, atol=1e-6).all(-1)
        assert torch.allclose(streamed.value[stable], whole.value[stable], rtol=1e-5, atol=1e-5)


@examples(40)
@given(
    calls("extreme", DTYPES, positive),
    st.sampled_from(FORMS),
    st.integers(1, 4),
    st.sampled_from((None, False, True)),
)
def test_extreme_numbers_in_blocks_are_never_called_converged_without_being_it(call, form, size, screen):
    query, patterns, options = call
    source = as_form(form, patterns, size)
    recall = answer(lambda: seeded(query, source, **options, stream=True, screen=screen), *ARGUMENTS, "beta")
    if recall is not None:
        done = recall.converged
        assert recall.state[done].isfinite().all()
        assert recall.residual[done].isfinite().all()
        assert ((recall.index >= -1) & (recall.index < len(patterns))).all()


@examples(25)
@given(calls(), st.integers(1, 4))
def test_streamed_gradients_are_those_of_the_tensor(call, size):
    query, patterns, options = call
    options["stop"] = options["stop"].__class__(rtol=1e-10, atol=1e-12, max_steps=40)

    def gradient(**more):
        stored = patterns.clone().requires_grad_()
        recall = seeded(query, stored, **options, **more)
        if recall.value.requires_grad:
            recall.value.square().sum().backward()
        return recall, stored.grad

    streamed = answer(lambda: gradient(stream=True), *ARGUMENTS)
    if streamed is None:
        return
    with within(), only_convergence_warnings():
        whole = gradient(stream=False)
    assert (streamed[1] is None) == (whole[1] is None)
    if streamed[1] is not None and options["steps"] is not None and whole[1].isfinite().all():
        scale = 1 + whole[1].abs().max().item()
        assert torch.allclose(streamed[1], whole[1], rtol=1e-6, atol=1e-7 * scale)


MATRIX = np.arange(12.0).reshape(4, 3)
MAPPED = [
    npy(MATRIX),
    npy(MATRIX.astype(">f4")),
    npy(np.asfortranarray(MATRIX), version=(2, 0)),
    npy(MATRIX.astype(np.float16)),
    npy(np.array([{}], dtype=object), allow_pickle=True),
    npy(np.zeros((0, 3))),
]


@examples(40)
@given(st.data())
def test_mapped_files(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    suffix = data.draw(st.sampled_from((".npy", ".safetensors")))
    if suffix == ".npy":
        content = data.draw(damaged(MAPPED) | npy_claims() | st.just(archive({})))
    else:
        content = data.draw(damaged([memory_file(folder / "m.safetensors")]))
    path = folder / f"patterns{suffix}"
    path.unlink(missing_ok=True)  # not written over: a map of it may still be open
    path.write_bytes(content)
    found = read(open_patterns, path)
    if found is not None:
        assert 0 < found.count < LARGE
        assert sum(len(block) for block in found.blocks(2)) == found.count


@pytest.mark.parametrize("screen", [None, False, True])
def test_a_nan_query_harms_no_other_in_blocks(screen):
    query = torch.randn(9, 4, dtype=torch.float64)
    patterns = torch.randn(20, 4, dtype=torch.float64)
    clean = retrieve(query, patterns, beta=4.0, stream=True, screen=screen)
    query[3] = torch.nan
    recall = retrieve(query, patterns, beta=4.0, stream=True, screen=screen)
    others = torch.arange(9) != 3
    assert recall.result[3] == Result.NONFINITE
    assert torch.equal(recall.result[others], clean.result[others])
    assert torch.allclose(recall.value[others], clean.value[others], rtol=1e-6, atol=1e-6)
