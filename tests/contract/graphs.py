"""What everything that is made from the nodes of a graph promises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.base import (
    F64,
    ROUNDING,
    Contract,
    copied,
    gradcheck,
    near,
    normal,
    pickled,
    same,
    threads,
    untouched,
)

SAMPLES, NODES, WIDTH = 3, 7, 4


class GraphContract(Contract):
    """Of something that features (*batch, N, d) make, seen as a matrix (*batch, N, N)."""

    def build(self, features: Tensor, mask: Tensor | None = None) -> Any:
        """The object."""
        raise NotImplementedError(f"{type(self).__name__} must override build(features, mask)")

    def matrix(self, built: Any) -> Tensor:
        """The object as a dense matrix a sample."""
        raise NotImplementedError(f"{type(self).__name__} must override matrix(built)")

    def features(self, dtype: torch.dtype = F64) -> Tensor:
        """Points whose distances are all different."""
        return normal(SAMPLES, NODES, WIDTH, seed=5).to(dtype)

    def test_it_is_a_symmetric_matrix_a_sample(self) -> None:
        found = self.matrix(self.build(self.features()))
        assert found.shape == (SAMPLES, NODES, NODES)
        near(found.mT, found, 1e-12)
        assert found.abs().sum() > 0

    def test_a_sample_alone_gives_what_it_gives_in_a_batch(self) -> None:
        features = self.features()
        together = self.matrix(self.build(features))
        for i in range(SAMPLES):
            near(self.matrix(self.build(features[i])), together[i], 1e-12)

    def test_any_batch_shape_is_samples(self) -> None:
        features = self.features()
        found = self.matrix(self.build(features.view(1, SAMPLES, NODES, WIDTH)))
        near(found[0], self.matrix(self.build(features)), 1e-12)

    def test_the_order_of_nodes_is_that_of_the_features(self) -> None:
        features, order = self.features(), torch.arange(NODES).roll(3)
        moved = self.matrix(self.build(features[:, order]))
        near(moved, self.matrix(self.build(features))[:, order][:, :, order], 1e-12)

    def test_padding_is_as_if_it_were_not_there(self) -> None:
        features = self.features()
        longer = torch.cat([features, torch.full((SAMPLES, 2, WIDTH), torch.nan, dtype=F64)], 1)
        mask = torch.zeros(SAMPLES, NODES + 2, dtype=torch.bool)
        mask[:, NODES:] = True
        found = self.matrix(self.build(longer, mask))
        near(found[:, :NODES, :NODES], self.matrix(self.build(features)), 1e-12)

    def test_nan_in_one_sample_harms_no_other(self) -> None:
        features = self.features()
        expected = self.matrix(self.build(features))
        features[1, 2] = torch.nan
        found = self.matrix(self.build(features))
        near(found[[0, 2]], expected[[0, 2]], 1e-12)
        assert found[1].isnan().any()

    @pytest.mark.parametrize("shape", [(0, NODES, WIDTH), (SAMPLES, 0, WIDTH), (SAMPLES, 1, WIDTH)], ids=str)
    def test_no_sample_no_node_and_one_node_pass(self, shape: tuple[int, ...]) -> None:
        found = self.matrix(self.build(torch.ones(shape)))
        assert found.shape == (*shape[:2], shape[1])
        assert found.isfinite().all()

    @pytest.mark.parametrize("dtype", ROUNDING, ids=str)
    def test_every_dtype_gives_what_float64_gives(self, dtype: torch.dtype) -> None:
        features = self.features(dtype)
        found = self.matrix(self.build(features))
        # Graphs are computed in float32 or wider.
        near(found.double(), self.matrix(self.build(features.double())), ROUNDING[torch.float32])

    def test_autocast_changes_nothing(self) -> None:
        features = self.features(torch.float32)
        expected = self.matrix(self.build(features))
        with torch.autocast("cpu", torch.bfloat16):
            built = self.build(features)
        near(self.matrix(built), expected, ROUNDING[torch.float32])

    def test_gradients_of_the_features(self) -> None:
        gradcheck(lambda features: self.matrix(self.build(features)), (self.features()[:2],))

    def test_features_are_never_changed(self) -> None:
        features, mask = self.features().requires_grad_(), torch.zeros(SAMPLES, NODES, dtype=torch.bool)
        with untouched(features, mask):
            self.matrix(self.build(features, mask)).sum().backward()

    def test_twice_it_gives_the_same_to_the_last_bit(self) -> None:
        same(self.matrix(self.build(self.features())), self.matrix(self.build(self.features())))

    def test_one_thread_and_two_give_the_same(self) -> None:
        with threads(1):
            one = self.matrix(self.build(self.features()))
        with threads(2):
            two = self.matrix(self.build(self.features()))
        near(two, one, 1e-6)

    def test_copies_and_pickles_are_the_same(self) -> None:
        built = self.build(self.features())
        for other in (copy.deepcopy(built), pickled(built)):
            assert type(other) is type(built)
            same(self.matrix(other), self.matrix(built))


class BatchedContract(GraphContract):
    """Of what `build` makes where that is a batch of samples with a product: `select`, `reshape`, `expand`."""

    def product(self, built: Any, x: Tensor) -> Tensor:
        """The matrix times x (*batch, N, c)."""
        raise NotImplementedError(f"{type(self).__name__} must override product(built, x)")

    def test_a_product_is_that_of_the_matrix(self) -> None:
        built, x = self.build(self.features()), normal(SAMPLES, NODES, 2, seed=6).double()
        near(self.product(built, x), self.matrix(built) @ x, 1e-12)
        half = x.to(torch.bfloat16)
        assert self.product(built, half).dtype == torch.bfloat16
        near(self.product(built, half).double(), self.matrix(built) @ half.double(), ROUNDING[torch.bfloat16])

    def test_samples_are_picked_reshaped_and_expanded(self) -> None:
        built = self.build(self.features())
        whole = self.matrix(built)
        rows = torch.tensor([2, 0])
        same(copied(self.matrix(built.select(rows))), copied(whole[rows]))
        same(copied(self.matrix(built.reshape((1, -1)))), copied(whole[None]))
        same(
            copied(self.matrix(built.reshape((1, -1)).expand((2, SAMPLES)))),
            copied(whole.expand(2, -1, -1, -1)),
        )

    def test_its_repr_names_it(self) -> None:
        assert repr(self.build(self.features())).startswith(type(self.build(self.features())).__name__)
