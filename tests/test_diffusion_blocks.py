"""States on a graph taken in blocks: what a solver sees is what it would see of all states at once."""

import pytest
import torch
from problems import F64, normal
from torch.testing import assert_close

from hopdeq_lwpf import Termination, fixed_point
from hopdeq_lwpf.graphs import KNN
from hopdeq_lwpf.models.association import Heads
from hopdeq_lwpf.models.diffusion import DiffusionRetrieval, function

B, L, S, D = 2, 7, 5, 4


def problem(unit):
    """f, a state and its context: B graphs of L states."""
    q, k = normal(B, 1, L, D), normal(B, 1, S, D, seed=2)
    f = DiffusionRetrieval(1.3, lam=0.4, logit_eta=0.2, forgetting=unit)
    x = f.prepare(Heads(q, k, k, graph=KNN(neighbors=2)(q).laplacian()))
    return f, q + 0.1 * normal(B, 1, L, D, seed=3), x


@pytest.mark.parametrize("unit", [None, "relu", "pfu"])
@pytest.mark.parametrize("block", [1, 2 * B * S, 3 * B * S], ids=["a state each", "twos", "threes"])
def test_step_energy_and_pieces_in_blocks_are_those_of_all_states_at_once(unit, block, monkeypatch):
    f, z, x = problem(unit)
    image, energy, piece = f.evaluate(z, x)
    monkeypatch.setattr(function, "BLOCK", block)
    assert f._blocks(z, x.association) > 1
    in_blocks, later, parts = f.evaluate(z, x)
    assert_close(in_blocks, image, rtol=1e-12, atol=1e-13)
    assert_close(later(), energy(), rtol=1e-12, atol=1e-13)
    assert_close(f.energy(z, x), energy(), rtol=1e-12, atol=1e-13)
    assert (parts is None) == (piece is None) == (unit is None)
    if unit is not None:
        assert_close(parts, piece, rtol=1e-12, atol=0)


@pytest.mark.parametrize("unit", [None, "relu"])
def test_a_piece_in_blocks_changes_where_what_is_kept_changes(unit, monkeypatch):
    f, z, x = problem(unit)
    monkeypatch.setattr(function, "BLOCK", 10)
    (_, _, before), (_, _, after) = f.evaluate(z, x), f.evaluate(-z, x)
    if unit is None:
        assert before is None
    else:
        assert before.shape == (B, 1)
        assert (before != after).all()


@pytest.mark.parametrize("solver", ["picard", "lbfgs"])
def test_a_solve_in_blocks_ends_where_it_does_at_once(solver, monkeypatch):
    f, _, x = problem("relu")
    stop = Termination(rtol=1e-11)
    whole = fixed_point(f, x, f.init(x), solver=solver, stop=stop, trace=True).require()
    monkeypatch.setattr(function, "BLOCK", 10)
    blocks = fixed_point(f, x, f.init(x), solver=solver, stop=stop, trace=True).require()
    assert blocks.value.dtype == F64
    assert_close(blocks.value, whole.value, rtol=1e-9, atol=1e-10)
    assert torch.equal(blocks.steps, whole.steps)
    assert_close(blocks.trace.energy, whole.trace.energy, rtol=1e-10, atol=1e-11, equal_nan=True)
