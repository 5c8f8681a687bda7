"""Learnt projections of digits: Adam's step, noise, recall with the keys of training and test apart, seeds."""

import copy
import math
from functools import cache

import pytest
import torch
from references_projections import F64, make, normal, read
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from hopdeq_lwpf import ConvergenceError, Termination
from hopdeq_lwpf.data import load_digits
from hopdeq_lwpf.forgetting import TopK
from hopdeq_lwpf.models.sdm import (
    Attention,
    Cap,
    Circle,
    ProjectedMemory,
    ProjectionSettings,
    recall_projected,
    train_projection,
)
from hopdeq_lwpf.models.sdm.projection_training import _turned

# 10 to 100 of 784 bits, for digits of 64; beta is learnt so that recall is sharp.
DIGITS = ProjectionSettings(keys=32, radius=5, learn_beta=True, noise=(1, 8))


@cache
def digits():
    """Training and test pictures."""
    pictures, _ = load_digits()
    return pictures[:400], pictures[1400:1600]


@cache
def trained():
    return train_projection(digits()[0], DIGITS)


def test_published_settings_are_the_defaults():
    fixed = ProjectionSettings()
    assert fixed.schedule() == (0.005, 10)
    assert (fixed.keys, fixed.batch_size, fixed.noise, fixed.steps) == (64, 128, (10, 100), 1)
    assert fixed.attention().beta == pytest.approx(15.85277, abs=1e-5)
    # The starts of the published learnt betas, printed with one decimal.
    for radius, start in ((5, 106.5), (9, 60.1), (11, 47.6), (15, 30.3)):
        learnt = ProjectionSettings(radius=radius, learn_beta=True)
        assert learnt.schedule() == (0.01, 20)
        assert float(learnt.attention().beta.detach()) == pytest.approx(start, abs=0.051)


@pytest.mark.parametrize("learn_beta", [False, True])
def test_the_first_step_is_that_of_adam_on_the_squared_error_of_one_read(learn_beta):
    patterns = normal(9, 6)
    options = ProjectionSettings(
        keys=4, radius=2, learn_beta=learn_beta, noise=(0, 0), epochs=1, batch_size=20, seed=3
    )
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()
    beta = float(torch.as_tensor(options.attention().beta).detach())
    images = [
        read(start.tolist(), patterns.tolist(), z, lambda cosine: math.exp(beta * cosine))
        for z in patterns.tolist()
    ]
    errors = (torch.tensor(images, dtype=F64) - patterns).square().sum(-1).tolist()
    memory, course = train_projection(patterns, options)
    assert float(course.loss) == pytest.approx(sum(errors) / 9, rel=1e-6)  # beta starts in float32

    fresh = make(options.attention(), steps=1)
    with torch.no_grad():
        fresh.f.projection.copy_(start)
    loss = (fresh(patterns, patterns) - patterns).square().sum(-1).mean()
    slopes = torch.autograd.grad(loss, tuple(fresh.parameters()))
    for after, before, slope in zip(memory.parameters(), fresh.parameters(), slopes, strict=True):
        # Adam's first step is lr g / (|g| + 1e-8).
        step = options.schedule()[0] * slope / (slope.abs() + 1e-8)
        assert_close(after, before - step, rtol=1e-6, atol=1e-8)


def test_every_pattern_is_stored_in_each_step():
    patterns = normal(9, 6)
    options = ProjectionSettings(keys=4, radius=2, noise=(0, 0), epochs=1, batch_size=1)
    beta, start = options.attention().beta, torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    images = [
        read(start.double().tolist(), patterns.tolist(), z, lambda cosine: math.exp(beta * cosine))
        for z in patterns.tolist()
    ]
    errors = (torch.tensor(images, dtype=F64) - patterns).square().sum(-1)
    first = train_projection(patterns, options)[1].loss[0, 0]
    # Of one of the patterns, read from all nine; alone it would be 0.
    assert (errors - first).abs().min() < 1e-9
    assert errors.min() > 1e-3


def test_training_noise_spans_its_range_and_keeps_the_norm():
    patterns = 3 * normal(2000, 40)
    noisy = _turned(patterns, (4, 12), torch.Generator().manual_seed(0))
    bits = (1 - cosine_similarity(noisy, patterns)) * 20
    # 2000 uniform draws miss a hundredth of the range with a probability of 2e-9.
    assert 4 - 1e-9 <= bits.min() < 4.08
    assert 11.92 < bits.max() <= 12 + 1e-9
    assert bits.mean() == pytest.approx(8, abs=5 * 8 / math.sqrt(12 * 2000))
    assert_close(noisy.norm(dim=-1), patterns.norm(dim=-1))


def test_loss_falls_and_recall_of_digits_beats_the_noisy_query_and_the_mean_digit():
    memory, course = trained()
    train, test = digits()
    assert course.loss.shape == (20, 4)
    assert course.loss[-1].mean() < 0.7 * course.loss[0].mean()
    for pictures in (train, test):
        mean = float(cosine_similarity(pictures, pictures.mean(0, keepdim=True)).mean())
        found = recall_projected(memory, pictures, 8)
        assert found.mean_cosine > max(1 - 2 * 8 / 64, mean) + 0.05
        start = ProjectedMemory(64, 32, memory.f.weights, generator=torch.Generator().manual_seed(0))
        assert found.mean_cosine > recall_projected(start, pictures, 8).mean_cosine + 0.02


def test_a_learnt_beta_moves_and_a_fixed_one_stays():
    memory, course = trained()
    fit = DIGITS.attention().beta.detach()
    assert course.beta.shape == (21,)
    assert float(course.beta[0]) == pytest.approx(float(fit))
    assert float(course.beta[-1]) == pytest.approx(float(memory.f.weights.beta.detach()))
    assert abs(float(course.beta[-1] - course.beta[0])) > 0.1
    few = ProjectionSettings(keys=8, radius=3, noise=(1, 8), epochs=2)
    assert len(train_projection(digits()[0][:50], few)[1].beta.unique()) == 1


def test_other_pictures_are_recalled_at_keys_of_their_own():
    memory, _ = trained()
    train, test = digits()
    own = recall_projected(memory, test, 0)
    with torch.no_grad():
        against_training = copy.deepcopy(memory)
        against_training.stop, against_training.on_failure = Termination(max_steps=10), "ignore"
        mistaken = cosine_similarity(against_training(test, train), test).mean()
    # A mean of training pictures is no test picture.
    assert mistaken < 0.96
    assert own.mean_cosine > 0.98

    # A memory that never saw the training pictures and has the same projection recalls just so.
    stranger = ProjectedMemory(64, 32, DIGITS.attention())
    stranger.load_state_dict(memory.state_dict())
    assert torch.equal(recall_projected(stranger, test, 8).cosine, recall_projected(memory, test, 8).cosine)
    assert all(tensor.shape in ((32, 64), ()) for tensor in memory.state_dict().values())


def test_recall_equals_reads_of_plain_python_until_the_limit():
    memory, _ = trained()
    beta, pictures = float(memory.f.weights.beta.detach()), digits()[1][:30]
    found = recall_projected(memory, pictures, 0, rows=torch.tensor([4, 7]), max_steps=2)
    for place, row in enumerate((4, 7)):
        z = pictures[row].tolist()
        for _ in range(int(found.steps[place])):
            z = read(memory.f.projection.tolist(), pictures.tolist(), z, lambda c: math.exp(beta * c))
        # float32 against float64, with logits of some 30.
        assert float(found.cosine[place]) == pytest.approx(
            float(cosine_similarity(torch.tensor(z), pictures[row].double(), dim=0)), abs=1e-4
        )
    assert (found.steps <= 2).all()


def test_recall_does_not_depend_on_the_block_and_counts_each_query():
    memory, _ = trained()
    pictures = digits()[1][:12]
    whole, single = (recall_projected(memory, pictures, 8, block=block, max_steps=40) for block in (256, 1))
    assert_close(whole.cosine, single.cosine, rtol=0, atol=1e-4)  # float32, iterated
    assert whole.converged.shape == whole.steps.shape == (12,)
    assert (whole.steps[~whole.converged] == 40).all()
    some = torch.zeros(12, dtype=torch.bool)
    some[[2, 5]] = True
    part = recall_projected(memory, pictures, 0, rows=some)
    assert_close(part.cosine, recall_projected(memory, pictures, 0).cosine[some], rtol=0, atol=1e-5)
    assert part.recalled == float((part.cosine > 0.99).double().mean())


def test_recall_tells_converged_queries_from_others():
    memory = make(Attention(200.0), 16, 16)
    with torch.no_grad():
        memory.f.projection.copy_(torch.eye(16))
    found = recall_projected(memory, torch.eye(16, dtype=F64)[:5], 1)
    assert found.converged.all()
    assert (found.steps <= 3).all()
    assert found.recalled == 1
    memory = memory.with_weights(Attention(3.0))
    assert not recall_projected(memory, torch.eye(16, dtype=F64)[:5], 1, max_steps=1).converged.any()


def test_the_same_seed_trains_and_recalls_the_same_and_leaves_the_global_generator():
    few = ProjectionSettings(keys=8, radius=3, noise=(1, 8), epochs=2, seed=11)
    pictures, state = digits()[0][:60], torch.get_rng_state()
    (one, first), (two, second) = (train_projection(pictures, few) for _ in range(2))
    assert torch.equal(one.f.projection, two.f.projection)
    assert torch.equal(first.loss, second.loss)
    other, _ = train_projection(pictures, ProjectionSettings(keys=8, radius=3, noise=(1, 8), epochs=2))
    assert not torch.equal(one.f.projection, other.f.projection)
    recalls = [recall_projected(one, pictures, 8, seed=seed).cosine for seed in (3, 3, 4)]
    assert torch.equal(recalls[0], recalls[1])
    assert not torch.equal(recalls[0], recalls[2])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("steps", [2, None])
def test_training_through_several_reads_or_the_equilibrium_lowers_the_loss(steps):
    few = ProjectionSettings(keys=16, radius=4, noise=(1, 8), epochs=6, batch_size=40, steps=steps, lr=0.02)
    memory, course = train_projection(digits()[0][:120], few)
    assert memory.steps == steps
    assert course.loss[-1].mean() < course.loss[0].mean()


def test_a_given_memory_is_trained_in_place_with_its_own_weights():
    made = ProjectedMemory(64, 16, Cap(4), forgetting=TopK(20, bias=-50.0), steps=1)
    before = made.f.projection.detach().clone()
    with torch.no_grad():  # of the caller; training records gradients all the same
        memory, course = train_projection(
            digits()[0][:120], ProjectionSettings(noise=(1, 8), epochs=3), memory=made
        )
    assert memory is made
    assert not torch.equal(before, made.f.projection)
    assert course.beta.isnan().all()
    assert made.f.projection.grad is None


def test_training_leaves_no_last_solution_and_the_next_call_a_recall():
    made = ProjectedMemory(64, 8, Attention(3.0), steps=1)
    pictures = digits()[0][:40]
    memory, _ = train_projection(pictures, ProjectionSettings(noise=(1, 8), epochs=1), memory=made)
    assert memory.last_solution is None
    memory(pictures[:3], pictures)
    assert memory.last_solution.index.shape == (3,)
    made.steps, made.stop, made.on_failure = None, Termination(max_steps=1), "raise"
    with pytest.raises(ConvergenceError):
        train_projection(pictures, ProjectionSettings(noise=(1, 8), epochs=1), memory=made)
    assert memory.last_solution is None


# --- bad input

SOME = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
SMALL = ProjectionSettings(keys=8, radius=3, noise=(1, 8))
MADE = ProjectedMemory(64, 8, Attention(3.0))


def broken():
    memory = ProjectedMemory(64, 8, Attention(3.0), steps=1)
    nn.init.constant_(memory.f.projection, math.inf)
    return memory


def frozen():
    return ProjectedMemory(64, 8, Attention(3.0), steps=1).requires_grad_(False)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ProjectionSettings(radius=65), ValueError, r"radius must be .* at most 64, got 65"),
        (lambda: ProjectionSettings(radius=1), ValueError, r"radius must be .* at least 2"),
        (lambda: ProjectionSettings(estimator="publishd"), ValueError, r"Did you mean 'published'"),
        (lambda: ProjectionSettings(learn_beta=1), TypeError, r"learn_beta must be True or False, got 1"),
        (lambda: ProjectionSettings(lr=0), ValueError, r"lr must be a finite number above 0, got 0"),
        (lambda: ProjectionSettings(epochs=0), ValueError, r"epochs must be .* at least 1, got 0"),
        (lambda: ProjectionSettings(batch_size=-1), ValueError, r"batch_size must be .*got -1"),
        (lambda: ProjectionSettings(noise=(8, 1)), ValueError, r"0 <= least <= most, got \(8, 1\)"),
        (lambda: ProjectionSettings(noise=5), ValueError, r"noise must be two numbers of bits.*got 5"),
        (lambda: ProjectionSettings(steps=0), ValueError, r"steps must be None"),
        (lambda: ProjectionSettings(seed=-1), ValueError, r"seed must be from 0"),
        (lambda: train_projection(SOME), ValueError, r"at most the width n = 64.*noise=\(0.82, 8.2\)"),
        (lambda: train_projection(SOME[0], SMALL), ValueError, r"patterns must be \(N, n\).*got \(64,\)"),
        (lambda: train_projection(SOME[:0], SMALL), ValueError, r"with at least one pattern"),
        (lambda: train_projection(SOME / 0, SMALL), ValueError, r"patterns must be finite"),
        (lambda: train_projection(SOME.long(), SMALL), TypeError, r"use patterns.float\(\)"),
        (lambda: train_projection(SOME, SMALL, memory=nn.Linear(2, 2)), TypeError, r"memory must be a Proj"),
        (
            lambda: train_projection(SOME, ProjectionSettings(learn_beta=True, noise=(0, 1)), memory=MADE),
            ValueError,
            r"learn_beta is for a new memory",
        ),
        (
            lambda: train_projection(SOME, SMALL, memory=ProjectedMemory(64, 8, Circle(3))),
            ValueError,
            r"projection requires grad, but Circle",
        ),
        (
            lambda: train_projection(SOME, SMALL, memory=broken()),
            RuntimeError,
            r"loss is no longer finite in epoch 1; lower lr = 0.005",
        ),
        (
            lambda: train_projection(SOME, SMALL, memory=frozen()),
            ValueError,
            r"memory has nothing to train: .*call memory.requires_grad_\(\)",
        ),
        (lambda: recall_projected(nn.Linear(2, 2), SOME, 0), TypeError, r"memory must be a ProjectedMemory"),
        (lambda: recall_projected(MADE, SOME, 65), ValueError, r"flips must be .* at most 64, got 65"),
        (lambda: recall_projected(MADE, SOME, 0, max_steps=0), ValueError, r"max_steps must be"),
        (lambda: recall_projected(MADE, SOME, 0, block=0), ValueError, r"block must be"),
        (lambda: recall_projected(MADE, SOME, 0, rows=[1]), TypeError, r"rows must be a 1-d tensor"),
        (lambda: recall_projected(MADE, SOME, 0, rows=torch.tensor([5])), ValueError, r"one of 0 to 4, got"),
        (
            lambda: recall_projected(MADE, SOME, 0, rows=torch.ones(4, dtype=torch.bool)),
            ValueError,
            r"rows of bool must have one entry a pattern, 5, got 4",
        ),
    ],
)
def test_bad_input_is_one_clear_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
