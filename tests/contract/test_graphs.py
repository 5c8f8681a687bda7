"""The contract of graphs from features, of their Laplacians, and of diffusion along them."""

import torch

from contract.base import Deviation
from contract.graphs import BatchedContract, GraphContract
from contract.settings import SettingsContract
from hopdeq_lwpf.graphs import KNN, OPERATORS, Graph, Laplacian, Operator, diffusion_operator

FORMS = {"dense": {"sparse": False}, "sparse": {"sparse": True}}


class TestKNNSettings(SettingsContract):
    covers = (KNN,)
    kind = KNN
    variants = {"default": {}, "all": {"neighbors": 3, "similarity": "rbf", "bandwidth": 0.5, "detach": True}}
    wrong = ("similarity", "cosinee")


class TestKNN(GraphContract):
    covers = (KNN,)
    variants = {
        **FORMS,
        "distances": {"similarity": "rbf", "neighbors": 3},
        "distances in a given unit": {"similarity": "rbf", "neighbors": 3, "bandwidth": 2.0},
        "every pair": {"neighbors": None},
        "half of an edge that one node chose": {"symmetrize": "mean", "neighbors": 2},
    }

    deviates = {
        "test_gradients_of_the_features: distances": Deviation(
            "the unit of distances, a median, is taken without its gradient",
            RuntimeError,
            "Jacobian mismatch",
        )
    }

    def build(self, features, mask=None):
        return KNN(**{"neighbors": 2, **self.options})(features, mask)

    def matrix(self, built):
        return built.to_dense().weight


class TestGraph(BatchedContract):
    covers = (Graph,)
    variants = FORMS

    def build(self, features, mask=None):
        return KNN(neighbors=2, **self.options)(features, mask)

    def matrix(self, built):
        return built.to_dense().weight

    def product(self, built, x):
        return built.times(x)

    def test_isolated_nodes_have_no_edge_in_either_form(self):
        mask = torch.zeros(3, 7, dtype=torch.bool)
        mask[0, 2] = True
        graph = self.build(self.features())
        assert graph.is_sparse == (self.variant == "sparse")
        alone = self.matrix(graph.isolate(mask))
        assert not alone[0, 2].any()
        assert not alone[0, :, 2].any()
        assert torch.equal(alone[1:], self.matrix(graph)[1:])
        assert torch.equal(graph.degree, self.matrix(graph).sum(-1)) or self.variant == "sparse"


class TestLaplacian(BatchedContract):
    covers = (Laplacian,)
    variants = {
        f"{kind}, {form}": (kind, sparse["sparse"])
        for kind in ("normalized", "combinatorial")
        for form, sparse in FORMS.items()
    }

    def build(self, features, mask=None):
        kind, sparse = self.options
        return KNN(neighbors=2, sparse=sparse)(features, mask).laplacian(kind)

    def matrix(self, built):
        return built.to_dense()

    def product(self, built, x):
        return built.times(x)

    def test_its_eigenvalues_lie_between_zero_and_the_bound(self):
        built = self.build(self.features())
        values = torch.linalg.eigvalsh(self.matrix(built))
        assert (values > -1e-12).all()
        assert (values.amax(-1) <= built.bound + 1e-12).all()


class TestOperator(BatchedContract):
    covers = (Operator,)
    variants = {
        f"{kind}, {form}": (kind, sparse["sparse"]) for kind in OPERATORS for form, sparse in FORMS.items()
    }

    def build(self, features, mask=None):
        kind, sparse = self.options
        laplacian = KNN(neighbors=2, sparse=sparse)(features, mask).laplacian()
        return diffusion_operator(kind, laplacian, 0.7)

    def matrix(self, built):
        return built.to_dense()

    def product(self, built, x):
        return built(x)

    def test_its_eigenvalues_are_at_most_one(self):
        values = torch.linalg.eigvalsh(self.matrix(self.build(self.features())))
        assert (values.abs() <= 1 + 1e-12).all()
