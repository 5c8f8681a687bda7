"""Masks where theory and graphs look at patterns: what is masked might as well not be there."""

import pytest
import torch
from problems import F64, normal
from torch.testing import assert_close

from hopdeq_lwpf.data import corruption
from hopdeq_lwpf.diagnostics import theory
from hopdeq_lwpf.models import DiffusionHopfield, HopfieldLayer, HopfieldPooling


def test_one_fixed_point_is_judged_from_the_patterns_that_are_there():
    patterns = 0.3 * normal(5, 4)
    mask = torch.tensor([False, False, False, True, True])
    spoilt = patterns.clone()
    spoilt[3:] = torch.nan
    for beta in (0.5, 1.0, 2.0, 20.0):
        expected = theory.single_fixed_point(patterns[:3], beta=beta)
        assert torch.equal(theory.single_fixed_point(spoilt, beta=beta, mask=mask), expected)
    assert theory.single_fixed_point(patterns, beta=0.01)
    assert not theory.single_fixed_point(patterns, beta=1e4)


def test_a_state_is_anchored_at_a_pattern_that_is_there():
    torch.manual_seed(0)
    layer = DiffusionHopfield(6, num_heads=2, neighbors=2, attention="graph").double()
    stored, state = normal(2, 5, 6), normal(2, 3, 6, seed=2)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[:, 5:] = True
    # Padding that each state would be most similar to.
    padded = torch.cat([stored, 50 * state[:, :2]], 1)
    expected = layer((stored, state, stored))
    assert_close(layer((padded, state, padded), mask), expected, rtol=1e-9, atol=1e-10)
    weights = layer.association_matrix
    assert not weights[..., 5:].any()
    assert ((weights > 0).sum(-1) <= 5).all()


@pytest.mark.parametrize(
    ("kind", "missing"), [(HopfieldPooling, "learned states"), (HopfieldLayer, "stored patterns")]
)
def test_learned_patterns_need_a_width(kind, missing):
    plain = {f"{name}_as_static": True for name in ("stored_pattern", "state_pattern", "pattern_projection")}
    norms = {f"normalize_{name}": False for name in ("stored_pattern", "state_pattern", "pattern_projection")}
    with pytest.raises(
        ValueError, match=f"width of the {missing} is not known: give input_size or hidden_size"
    ):
        kind(**plain, **norms, disable_out_projection=True)
    assert kind(hidden_size=4, **plain, **norms, disable_out_projection=True).steps == 1


def test_only_rows_of_patterns_are_corrupted():
    with pytest.raises(ValueError, match=r"patterns must have shape \(B, d\), got \(2, 3, 4\)"):
        corruption.corrupt(torch.rand(2, 3, 4, dtype=F64), "noise", 0.1, generator=torch.Generator())
