"""VisionTransformer: on a stand-in for timm's, and on the real one where it is installed."""

import copy
import importlib
import sys

import pytest
import torch
from problems import normal
from timm_here import stand_in, timm_or_skip
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf import data
from hopdeq_lwpf.models.vision import VisionTransformer

SMALL = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}


@pytest.fixture(params=["stand-in", "timm"])
def timm_models(request, monkeypatch):
    return timm_or_skip() if request.param == "timm" else stand_in(monkeypatch)


@pytest.mark.usefixtures("timm_models")
def test_images_become_logits_and_every_block_is_converted():
    model = VisionTransformer(**SMALL, channels=3, classes=7)
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 7)
    report = model.conversion_report
    assert [part.name for part in report.converted] == ["blocks.0.attn", "blocks.1.attn"]
    assert (report.converted[0].heads, report.converted[0].width) == (2, 16)
    oblong = VisionTransformer(**{**SMALL, "image_size": (8, 16)})
    assert oblong(torch.rand(2, 1, 8, 16)).shape == (2, 10)
    assert oblong(torch.rand(0, 1, 8, 16)).shape == (0, 10)


def test_one_step_is_the_model_of_timm_with_its_weights(timm_models):
    torch.manual_seed(0)
    plain = timm_models.VisionTransformer(
        img_size=(8, 8),
        patch_size=4,
        in_chans=1,
        num_classes=10,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2.0,
        drop_rate=0.0,
        proj_drop_rate=0.0,
        attn_drop_rate=0.0,
    )
    model = VisionTransformer(**SMALL)
    model.vit.load_state_dict(plain.state_dict())
    images = torch.rand(3, 1, 8, 8)
    assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)
    forgetting = VisionTransformer(**SMALL, forgetting="pfu")
    forgetting.load_state_dict(model.state_dict())
    assert (forgetting(images) - plain(images)).abs().max() > 1e-3


@pytest.mark.usefixtures("timm_models")
@pytest.mark.parametrize(
    "dials", [{}, {"steps": 3, "forgetting": "pfu"}, {"steps": None, "inject": "input"}], ids=str
)
def test_a_step_of_training_lowers_the_loss_on_the_digits(dials):
    pictures, labels = data.load_digits()
    images, labels = pictures[:64].reshape(-1, 1, 8, 8), labels[:64]
    torch.manual_seed(0)
    model = VisionTransformer(**{**SMALL, "patch_size": 2}, **dials)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    layers = [block["attn"] if isinstance(block, nn.ModuleDict) else block.attn for block in model.vit.blocks]
    assert all(layer.last_solution.result.shape[:2] == (64, 2) for layer in layers)
    assert_close(copy.deepcopy(model)(images), model(images), rtol=0, atol=0)


@pytest.mark.usefixtures("timm_models")
def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 8, 8\), got \(2, 8, 8\)"):
        VisionTransformer(**SMALL)(normal(2, 8, 8))


BAD = [
    ({"image_size": 10}, r"image_size \(10, 10\) must be two multiples of patch_size 4"),
    ({"image_size": (8, 8, 8)}, "two multiples"),
    ({"width": 15}, "width must be a multiple of heads, got width=15 and heads=2"),
    ({"depth": 0}, "depth must be an integer >= 1, got 0"),
    ({"classes": 2.0}, "classes must be an integer"),
]


@pytest.mark.parametrize(("options", "text"), BAD, ids=str)
def test_sizes_that_do_not_fit_are_refused_before_timm_is_needed(options, text):
    with pytest.raises(ValueError, match=text):
        VisionTransformer(**{**SMALL, **options})


def test_where_timm_is_missing_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(ImportError, match=r"hopdeq-lwpf\[vision\]"):
        VisionTransformer(**SMALL)


def test_where_torchvision_is_for_another_torch_that_is_said(monkeypatch):
    def fail(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ImportError, match="torchvision of this torch's version"):
        VisionTransformer(**SMALL)
