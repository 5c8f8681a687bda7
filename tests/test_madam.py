"""Madam: multiplicative updates against a slow twin, limits, states that are saved, and a network that it trains."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf.models import HAM
from hopdeq_lwpf.solvers import Neumann
from hopdeq_lwpf.training import Learning, TrainSpec, train
from hopdeq_lwpf.training.madam import BLOCK, Madam

F64 = torch.float64


def twin(weights, gradients, *, lr=0.01, p_scale=1024.0, g_bound=3.0, beta=0.999, weight_decay=0.0):
    """One number after the other: the weights after a step for each row of gradients."""
    limit = p_scale * math.sqrt(math.fsum(w * w for w in weights) / len(weights))
    weights, squares = list(weights), [0.0] * len(weights)
    for t, row in enumerate(gradients, start=1):
        for i, g in enumerate(row):
            squares[i] = beta * squares[i] + (1 - beta) * g * g
            size = math.sqrt(squares[i] / (1 - beta**t))
            ratio = max(-g_bound, min(g_bound, g / size)) if size else 0.0
            w = weights[i] * (1 - lr * weight_decay)
            sign = (w > 0) - (w < 0)
            weights[i] = max(-limit, min(limit, w * math.exp(-lr * sign * ratio)))
    return weights


def run(weights, gradients, **options):
    weight = nn.Parameter(torch.tensor(weights, dtype=F64))
    optimizer = Madam([weight], **options)
    for row in gradients:
        weight.grad = torch.tensor(row, dtype=F64)
        optimizer.step()
    return weight.detach(), optimizer


WEIGHTS = [0.5, -1.5, 0.01, 0.0, -0.2]
GRADIENTS = torch.randn(12, 5, dtype=F64, generator=torch.Generator().manual_seed(1)).tolist()
GRADIENTS[10] = [g * 100 for g in GRADIENTS[10]]  # near sqrt(11) of its mean square, beyond the bound of 3
GRADIENTS[0][2] = 0.0  # 0 / 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.3, "p_scale": 1.2},
        {"lr": 0.1, "g_bound": 0.5},
        {"beta": 0.5, "weight_decay": 0.2},
        {"beta": 0.0},
    ],
    ids=str,
)
def test_several_steps_are_those_of_the_slow_twin(options):
    found, _ = run(WEIGHTS, GRADIENTS, **options)
    assert_close(found, torch.tensor(twin(WEIGHTS, GRADIENTS, **options), dtype=F64), rtol=1e-12, atol=1e-15)
    assert not torch.equal(found, torch.tensor(WEIGHTS, dtype=F64))


def test_the_cases_of_the_slow_twin_meet_bound_and_limit():
    bounded, free = twin(WEIGHTS, GRADIENTS, lr=0.3), twin(WEIGHTS, GRADIENTS, lr=0.3, g_bound=1e9)
    limited = twin(WEIGHTS, GRADIENTS, lr=0.3, p_scale=1.2)
    assert bounded != free
    assert limited != bounded


def test_no_weight_changes_its_sign_and_zero_stays():
    found, _ = run(WEIGHTS, GRADIENTS * 50, lr=0.5)
    assert found.sign().tolist() == [1, -1, 1, 0, -1]
    assert found[3] == 0


def test_a_saved_state_goes_on_to_the_same_numbers():
    expected, _ = run(WEIGHTS, GRADIENTS)
    half, optimizer = run(WEIGHTS, GRADIENTS[:3])
    weight = nn.Parameter(half.clone())
    other = Madam([weight], lr=0.7)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for row in GRADIENTS[3:]:
        weight.grad = torch.tensor(row, dtype=F64)
        other.step()
    assert_close(weight.detach(), expected, rtol=0, atol=0)


def test_groups_closures_and_parameters_without_gradient():
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = Madam([{"params": [a], "lr": 0.1}, {"params": [b, c]}], lr=0.2)

    def closure():
        optimizer.zero_grad()
        loss = (a + b).sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    # At the first step the gradient over its own size is 1.
    assert_close(a.detach(), torch.full((2,), math.exp(-0.1)))
    assert_close(b.detach(), torch.full((2,), math.exp(-0.2)))
    assert_close(c.detach(), torch.ones(2))


def test_schedulers_change_its_learning_rate():
    weight = nn.Parameter(torch.ones(1))
    optimizer = Madam([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=1)
    weight.grad = torch.ones(1)
    optimizer.step()
    schedule.step()
    before = weight.detach().clone()
    optimizer.step()
    assert_close(weight.detach() / before, torch.full((1,), math.exp(-0.01)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be a number > 0, got 0.0"),
        ({"p_scale": -1.0}, "p_scale must be a number > 0"),
        ({"g_bound": math.nan}, "g_bound must be a number > 0, got nan"),
        ({"beta": 1.0}, r"beta must be a number in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be a number >= 0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Madam([nn.Parameter(torch.ones(1))], **options)
    with pytest.raises(ValueError, match=message):
        Madam([{"params": [nn.Parameter(torch.ones(1))], **options}])


def test_sparse_gradients_are_refused():
    layer = nn.Embedding(3, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense, real gradients"):
        Madam(layer.parameters()).step()


def test_training_knows_it_by_name():
    assert Learning(optimizer="madam").optimizer == "madam"
    with pytest.raises(ValueError, match="Did you mean 'madam'"):
        Learning(optimizer="madan")


def test_it_trains_a_small_ham_on_the_digits(tmp_path):
    torch.manual_seed(0)
    model = HAM((64, 32, 10), even_odd=True, adjoint=Neumann(8), on_failure="ignore")
    spec = TrainSpec(
        optimizer="madam",
        learning_rate=0.02,
        weight_decay=0.0,
        epochs=4,
        diagnostics=False,
        out=str(tmp_path),
    )
    accuracy = train(spec, model=model).metrics.course("val/accuracy")
    assert accuracy[-1] > 0.8


def test_large_weights_are_updated_as_small_ones_also_where_they_do_not_lie_in_a_row():
    torch.manual_seed(0)
    start, gradients = (
        torch.randn(210, 200, dtype=torch.float64),
        torch.randn(3, 210, 200, dtype=torch.float64),
    )
    gradients[0, 7] = 0.0  # no gradient at first
    large = nn.Parameter(start.clone())
    turned = nn.Parameter(start.T.contiguous().T.clone(memory_format=torch.preserve_format))
    assert large.numel() > BLOCK
    assert not turned.is_contiguous()
    small = [nn.Parameter(row.clone()) for row in start]
    # One bound for all, since each tensor has its own.
    options = {"lr": 0.1, "p_scale": 1e6}
    optimizers = [Madam([large], **options), Madam([turned], **options), Madam(small, **options)]
    for gradient in gradients:
        large.grad, turned.grad = gradient.clone(), gradient.T.contiguous().T
        for row, own in zip(small, gradient, strict=True):
            row.grad = own.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_close(large.detach(), torch.stack([row.detach() for row in small]), rtol=1e-14, atol=0)
    assert_close(turned.detach(), large.detach(), rtol=1e-14, atol=0)
    assert not torch.equal(large.detach(), start)
