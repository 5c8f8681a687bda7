"""Learner, losses, scores and settings of a training, against plain Python."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm_here import stand_in
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.training import Learner, Learning, TrainSpec, build_data, build_network
from hopdeq_lwpf.training.learner import argument_names, rate_factor, split_batch
from hopdeq_lwpf.training.scores import area_under_curve, hits, loss_of, margins
from hopdeq_lwpf.training.spec import differences

# --- losses and scores


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_are_their_formulas(dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    logits, classes = torch.randn(6, 4).to(dtype), torch.randint(0, 4, (6,))
    slow = sum(
        math.log(sum(math.exp(v) for v in row)) - row[c]
        for row, c in zip(logits.double().tolist(), classes.tolist(), strict=True)
    )
    assert float(loss_of("cross_entropy", logits, classes)) == pytest.approx(slow / 6, rel=tolerance)
    one, target = logits[:, :1], torch.tensor([0.0, 1, 1, 0, 1, 0])
    slow = sum(
        math.log1p(math.exp(-v if t else v))
        for (v,), t in zip(one.double().tolist(), target.tolist(), strict=True)
    )
    assert float(loss_of("binary", one, target)) == pytest.approx(slow / 6, rel=tolerance)
    assert float(loss_of("binary", one[:, 0], target.long())) == pytest.approx(slow / 6, rel=tolerance)
    other = torch.randn(6, 4).to(dtype)
    slow = sum(
        (a - b) ** 2 for a, b in zip(*(t.double().flatten().tolist() for t in (logits, other)), strict=True)
    )
    assert float(loss_of("mse", logits, other)) == pytest.approx(slow / 24, rel=tolerance)
    slow = sum(
        (v - (c == k)) ** 2
        for row, c in zip(logits.double().tolist(), classes.tolist(), strict=True)
        for k, v in enumerate(row)
    )
    assert float(loss_of("squared_error", logits, classes)) == pytest.approx(slow / 12, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "output", "target", "message"),
    [
        ("cross_entropy", (5,), (5,), "take loss 'binary'"),
        ("cross_entropy", (5, 3), (4,), r"\(5, 3\) and \(4,\)"),
        ("binary", (5, 2), (5,), "take loss 'cross_entropy'"),
        ("mse", (5, 2), (5,), "one shape"),
        ("squared_error", (5, 2), (4,), "take loss 'mse'"),
        ("squared_error", (5, 2), (5, 2), "take loss 'mse'"),
    ],
)
def test_shapes_that_do_not_fit_say_so(name, output, target, message):
    with pytest.raises(ValueError, match=message):
        loss_of(name, torch.zeros(output), torch.zeros(target))


def test_an_unknown_loss_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'binary'"):
        loss_of("binry", torch.zeros(2), torch.zeros(2))


def test_hits_count_what_is_right_and_never_nan():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [math.nan, 0.0]])
    for loss in ("cross_entropy", "squared_error"):
        assert hits(loss, logits, torch.tensor([0, 0, 0])).tolist() == [True, False, False]
    assert hits("binary", torch.tensor([[1.0], [-1.0], [math.nan]]), torch.tensor([1, 1, 0])).tolist() == [
        True,
        False,
        False,
    ]
    assert hits("mse", logits, logits) is None
    assert margins("cross_entropy", logits[:2], torch.zeros(2)).tolist() == [-1.0, 1.0]
    assert margins("cross_entropy", torch.zeros(2, 3), torch.zeros(2)) is None


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_the_area_is_the_share_of_pairs_in_order(pairs):
    ones = [score for score, label in pairs if label]
    zeros = [score for score, label in pairs if not label]
    found = area_under_curve(
        torch.tensor([float(score) for score, _ in pairs]), torch.tensor([label for _, label in pairs])
    )
    if not ones or not zeros:
        assert math.isnan(found)
        return
    won = sum((one > zero) + 0.5 * (one == zero) for one in ones for zero in zeros)
    assert found == pytest.approx(won / (len(ones) * len(zeros)), abs=1e-12)


def test_the_area_of_scores_with_nan_is_nan():
    assert math.isnan(area_under_curve(torch.tensor([0.0, math.nan]), torch.tensor([True, False])))


# --- learner


def test_batches_are_split_by_what_they_are():
    x, mask, y = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool), torch.ones(2)
    arguments, keywords, target = split_batch((x, y))
    assert arguments[0] is x
    assert not keywords
    assert target is y
    names = frozenset({"data", "mask"})
    batch = {"data": x, "mask": mask, "target": y, "index": y}
    arguments, keywords, target = split_batch(batch, names=names)
    assert arguments == ()
    assert set(keywords) == {"data", "mask"}
    assert target is y
    arguments, keywords, _ = split_batch(batch, names=frozenset({"input"}))
    assert arguments[0] is x
    assert not keywords
    assert set(batch) == {"data", "mask", "target", "index"}, "the caller's dict was changed"
    assert set(split_batch({"a": x, "label": y})[1]) == {"a"}


def test_a_mask_is_never_lost():
    mask = torch.tensor([[True, False]])
    batch = {"data": torch.ones(1, 2), "mask": mask, "target": torch.ones(1)}
    with pytest.raises(ValueError, match="no argument 'mask'"):
        split_batch(batch, names=frozenset({"data"}))


@pytest.mark.parametrize("batch", [torch.ones(2), {"data": torch.ones(2)}, (torch.ones(2),), (1, "a")])
def test_other_batches_are_refused(batch):
    with pytest.raises(TypeError, match="batch"):
        split_batch(batch)


def test_argument_names_are_those_of_forward():
    class Named(nn.Module):
        def forward(self, data, mask=None):
            return data

    class Any(nn.Module):
        def forward(self, data, **rest):
            return data

    assert argument_names(Named()) == {"data", "mask"}
    assert argument_names(Any()) is None


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_rate_rises_then_falls_to_nothing(schedule):
    factors = [rate_factor(step, schedule=schedule, warmup=4, total=20) for step in range(21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    if schedule == "constant":
        assert factors[5:] == [1.0] * 16
    else:
        assert factors[4:] == sorted(factors[4:], reverse=True)
        assert factors[-1] == pytest.approx(0, abs=1e-15)
        assert factors[12] == pytest.approx(0.5)
    assert rate_factor(100, schedule=schedule, warmup=0, total=20) == (schedule == "constant")


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_rate_falls_to_the_share_that_was_asked_for(schedule):
    options = {"schedule": schedule, "warmup": 2, "total": 12}
    factors = [rate_factor(step, final=0.1, **options) for step in range(13)]
    plain = [rate_factor(step, **options) for step in range(13)]
    assert factors[:3] == plain[:3], "the warm-up is as it was"
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    if schedule == "linear":
        assert factors[7] == pytest.approx(0.55)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="final_rate must be"):
            Learning(final_rate=bad)
        with pytest.raises(ValueError, match="final_rate must be"):
            TrainSpec(final_rate=bad)


def test_the_optimiser_has_the_settings_and_leaves_frozen_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer = Learner(
        model, Learning(optimizer="sgd", learning_rate=0.1, weight_decay=0.3)
    ).configure_optimizers()
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.1, 0.3, 2)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        Learner(model).configure_optimizers()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mes"}, "Did you mean 'mse'"),
        ({"optimizer": "adamww"}, "Did you mean 'adamw'"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"warmup": 1.5}, "warmup must be a whole number"),
    ],
)
def test_bad_learning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Learning(**options)


def test_the_learner_wants_a_module_and_a_tensor():
    with pytest.raises(TypeError, match="nn.Module"):
        Learner(lambda x: x)

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match="must return a tensor"):
        Learner(Pair()).training_step((torch.ones(2), torch.ones(2)), 0)


# --- settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "binry"}, "Did you mean 'binary'"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"clip": -1.0}, "clip must be above 0"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"loggers": ("cvs",)}, "Did you mean 'csv'"),
        ({"loggers": ("csv", "csv")}, "twice"),
        ({"model": {"hidden": 3}}, "needs the key 'model'"),
        ({"model": 3}, "must be a name or a mapping"),
        ({"monitor": "loss"}, "'val/loss'"),
        ({"out": ""}, "out is empty"),
        ({"precision": "16"}, "16-mixed"),
    ],
)
def test_bad_settings_name_themselves(options, message):
    with pytest.raises(SpecError, match=message):
        TrainSpec(**options)


def test_settings_are_copies():
    model = {"model": "equilibrium", "hidden": 3}
    spec = TrainSpec(model=model)
    model["hidden"] = 4
    assert spec.model["hidden"] == 3
    assert TrainSpec().model is not TrainSpec().model
    assert TrainSpec(model="equilibrium").model == {"model": "equilibrium"}
    assert TrainSpec(**spec.as_dict()) == spec


def test_every_setting_that_enters_the_numbers_is_compared():
    spec = TrainSpec()
    other = {
        "model": {"model": "pooling"}, "data": {"data": "latch"}, "loss": "mse", "optimizer": "sgd",
        "learning_rate": 1.0, "weight_decay": 1.0, "clip": None, "schedule": "cosine", "warmup": 1,
        "final_rate": 0.5,
        "accumulate": 2, "limit_batches": 3, "precision": "64-true", "accelerator": "auto", "devices": 2, "seed": 1,
    }  # fmt: skip
    free = {
        "epochs": 3, "monitor": "val/auc", "loggers": ("csv",), "threads": 2, "resume": True, "out": "x",
        "diagnostics": False, "spectrum_every": 2, "iterations": {},
    }  # fmt: skip
    assert {*other, *free} == {field.name for field in dataclasses.fields(TrainSpec)}
    for name, value in other.items():
        (found,) = differences(spec.as_dict(), dataclasses.replace(spec, **{name: value}).as_dict())
        assert found.startswith(name), found
    for name, value in free.items():
        assert differences(spec.as_dict(), dataclasses.replace(spec, **{name: value}).as_dict()) == []


def test_epochs_count_where_the_rate_depends_on_them():
    spec = TrainSpec(schedule="cosine")
    (found,) = differences(spec.as_dict(), dataclasses.replace(spec, epochs=3).as_dict())
    assert found == "epochs is 10 in the checkpoint and 3 now"
    (found,) = differences(TrainSpec(model={"model": "a", "b": 1}).as_dict(), TrainSpec(model="a").as_dict())
    assert found == "model.b is 1 in the checkpoint and 'not set' now"


# --- networks and data by name


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("name", ["hopfield", "pooling", "lookup"])
def test_bag_networks_see_no_padding_and_no_other_bag(name, steps):
    options = {"inject": "input"} if name != "pooling" else {}
    network = build_network(
        {"model": name, "input_size": 6, "steps": steps, "rtol": 1e-9, **options}
    ).double()
    data = torch.randn(3, 5, 6, dtype=torch.float64)
    mask = torch.arange(5) >= torch.tensor([5, 3, 2])[:, None]
    found = network(data, mask)
    assert found.shape == (3,)
    noisy = data.masked_fill(mask[..., None], 7.0)
    assert torch.allclose(network(noisy, mask), found, atol=1e-7)
    for row, size in enumerate((5, 3, 2)):
        alone = network(data[row : row + 1, :size])
        assert torch.allclose(alone, found[row : row + 1], atol=1e-7)


def test_a_network_for_bags_of_one_size_refuses_others():
    network = build_network({"model": "hopfield", "input_size": 4, "instances": 5, "outputs": 3})
    assert network(torch.randn(2, 5, 4)).shape == (2, 3)
    with pytest.raises(ValueError, match="instances=5, got 4"):
        network(torch.randn(2, 4, 4))


def test_the_contraction_holds_whatever_is_learned():
    network = build_network({"model": "equilibrium", "hidden": 8, "contraction": 0.5})
    recur = network.layer.f.recur
    with torch.no_grad():
        recur.parametrizations.weight.original.mul_(random.random() * 100 + 10)
        for _ in range(50):
            network(torch.rand(2, 64))
    assert float(torch.linalg.matrix_norm(recur.weight.detach(), 2)) == pytest.approx(1.0, abs=1e-3)
    network(torch.rand(4, 8, 8))
    assert bool(network.layer.last_solution.converged.all())


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (build_network, {"model": "equlibrium"}, "Did you mean 'equilibrium'"),
        (build_network, {"model": "equilibrium", "hiden": 3}, "Did you mean 'hidden'"),
        (build_network, {"model": "equilibrium", "hidden": "x"}, "hidden"),
        (build_network, {"model": "pooling", "input_sice": 3}, "Did you mean 'input_size'"),
        (build_data, {"data": "digit"}, "Did you mean 'digits'"),
        (build_data, {"data": "digits", "batchsize": 3}, "Did you mean 'batch_size'"),
        (build_data, {"data": "latch", "num_sample": 3}, "Did you mean 'num_samples'"),
        (build_data, {"data": "digits", "validation": 1.0}, "between 0 and 1"),
    ],
)
def test_misspelt_names_are_errors(build, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(settings)


def test_options_of_data_reach_what_they_are_for():
    data = build_data({"data": "image_bags", "num_bags": 7, "batch_size": 3, "num_test_bags": 4}, seed=5)
    assert (data.task.num_bags, data.loading.batch_size, data.loading.seed, data.num_test_bags) == (
        7,
        3,
        5,
        4,
    )
    assert build_data({"data": "mil", "name": "musk1", "fold": 2}).split.folds == 10
    digits = build_data({"data": "digits", "validation": 0.5})
    digits.setup("fit")
    first, second = (set(map(tuple, digits.parts[p].tensors[0].tolist())) for p in ("train", "val"))
    assert len(digits.parts["train"]) + len(digits.parts["val"]) == 1797
    assert not first & second


def test_pictures_of_a_flat_data_set_reach_a_vision_transformer(monkeypatch):
    stand_in(monkeypatch)
    network = build_network({"model": "vision_transformer", "image_size": 8, "patch_size": 4, "width": 16})
    data = build_data({"data": "pictures", "pictures": "digits", "batch_size": 5})
    data.setup("fit")
    pictures, classes = next(iter(data.val_dataloader()))
    assert pictures.shape == (5, 64)
    assert_close(network.eval()(pictures), network(pictures.reshape(5, 1, 8, 8)))
    with pytest.raises(ValueError, match="Did you mean 'fashion'"):
        build_data({"data": "pictures", "pictures": "fasion"})
