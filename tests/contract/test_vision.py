"""The contract of converted attention: torch's, and the vision transformer's on a stand-in for timm's."""

import pytest
import torch
from timm_here import stand_in
from torch import nn

from contract.base import normal
from contract.layers import LayerContract
from hopdeq_lwpf.models import VisionTransformer, convert_attention
from hopdeq_lwpf.models.converted import ConvertedMultiheadAttention


class TestVisionTransformer(LayerContract):
    covers = (VisionTransformer,)
    kind = VisionTransformer
    settings = {"image_size": 4, "patch_size": 2, "width": 4, "depth": 1, "heads": 2, "classes": 3}
    dial = "forgetting"
    variants = {
        "attention": {},
        "two steps with PFU": {"steps": 2, "forgetting": "pfu"},
        "equilibrium": {"steps": None, "inject": "input"},
    }
    exempt = {
        "test_the_order_of_stored_patterns_does_not_matter": "patches have places, which are added to them",
        "test_padding_is_as_if_it_were_not_there": "pictures have no padding",
    }

    @pytest.fixture(autouse=True)
    def _timm(self, monkeypatch):
        stand_in(monkeypatch)

    def inputs(self, batch=3):
        return (normal(3, 1, 4, 4)[[i % 3 for i in range(batch)]],)

    def solution(self, layer):
        return layer.vit.blocks[0]["attn"].last_solution


class TestConvertedMultiheadAttention(LayerContract):
    covers = (ConvertedMultiheadAttention,)
    variants = {
        "attention": {},
        "two steps with PFU": {"steps": 2, "forgetting": "pfu"},
        "equilibrium": {"steps": None, "inject": "input"},
    }
    exempt = {
        "test_the_signature_shows_each_option": "it is made by convert_attention, whose options these are"
    }
    kind = staticmethod(convert_attention)
    dial = "forgetting"
    stored = 5

    def make(self, **options):
        return convert_attention(nn.MultiheadAttention(6, 2, batch_first=True), **{**self.options, **options})

    def inputs(self, batch=3):
        # No score so near to the median of its row that rounding would forget another pattern.
        parts = (normal(3, 4, 6, seed=11), normal(3, 5, 6, seed=2), normal(3, 5, 6, seed=3))
        return self.rows(parts, [i % 3 for i in range(batch)])

    def call(self, module, inputs, **options):
        return super().call(module, inputs, need_weights=False, **options)[0]

    def permuted(self, inputs, order):
        return inputs[0], inputs[1][:, order], inputs[2][:, order]

    def padded(self, inputs):
        query, key, value = inputs
        rubbish = 9 * normal(len(query), 2, 6, seed=4)
        mask = torch.zeros(len(query), 7, dtype=torch.bool)
        mask[:, 5:] = True
        longer = (query, torch.cat([key, rubbish], 1), torch.cat([value, rubbish], 1))
        return longer, {"key_padding_mask": mask}
