"""The contract of the named settings in models/: built from YAML, each is the layer or function that it says."""

import copy

import pytest
import torch
from timm_here import stand_in

from contract.base import Deviation, misspelt, normal
from contract.functions import FunctionContract
from contract.layers import LayerContract
from hopdeq_lwpf import find, models
from hopdeq_lwpf.data.repertoires import PADDING
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.training.networks import build_network

WIDTH, STORED = 6, 5


class PresetContract:
    """Of what is built from settings: `settings()` are those of the variant."""

    exempt_all = {
        "test_the_signature_shows_each_option": "the signature is that of the class, which has a case of its own",
    }

    def settings_of(self):
        return find("models", self.variant)

    def build(self, settings):
        return models.build(settings)

    def make(self, **options):
        settings = {**self.settings_of(), **options}
        before = copy.deepcopy(settings)
        try:
            return self.build(settings)
        finally:
            assert settings == before, "settings of the caller were changed"

    def test_an_unknown_option_is_an_error_that_names_it(self):
        known = [name for name in self.settings_of() if name != "model"][0]
        with pytest.raises(ValueError, match=f"{misspelt(known)}.*Did you mean '{known}'"):
            self.make(**{misspelt(known): 1})


class TestRetrievalPresets(PresetContract, FunctionContract):
    presets = (
        "hopfield", "hopfield_entmax", "hopfield_entmax15", "hopfield_lsr", "hopfield_pfu", "hopfield_polynomial",
        "hopfield_relu", "hopfield_sparse",
    )  # fmt: skip
    kind = Retrieval
    variants = {name: {} for name in presets}
    exempt = {
        **PresetContract.exempt_all,
        "test_compiled_it_gives_the_same": "the functions and separations have cases of their own",
        "test_the_energy_has_the_update_as_its_gradient: hopfield_polynomial": (
            "the conjugate of the normalisation is infinite off the sphere and has no gradient on it"
        ),
        "test_gradients_of_the_state_the_arguments_and_the_parameters: hopfield_lsr": (
            "the mean of the active patterns does not depend on the state, nor on how far they are"
        ),
    }
    deviates = {
        "test_the_jacobian_is_self_adjoint_in_the_metric: hopfield_polynomial": Deviation(
            "with normalised states the Jacobian is a product of two symmetric matrices", match="no metric"
        ),
    }

    def arguments(self, batch=3):
        patterns = torch.nn.functional.normalize(normal(STORED, WIDTH), dim=-1)
        return (patterns + 0.3 * normal(STORED, WIDTH, seed=2))[[i % 3 for i in range(batch)]], patterns

    def permuted(self, arguments, order):
        return arguments[0], arguments[1][order]

    def state(self, f, x):
        z = super().state(f, x)
        return z if f.normalization is None else f.normalization.apply(z)

    def factor(self, f, z, x):
        if f.similarity == "dot":
            return 1.0
        return f.separation.weights(f._scores(z, x)).sum(-1, keepdim=True)


class TestLayerPresets(PresetContract, LayerContract):
    presets = (
        "layer_hopfield",
        "layer_hopfield_equilibrium",
        "layer_lookup",
        "layer_pooling_relu",
        "ham_mnist",
    )
    variants = {name: {"steps": None if "equil" in name or name == "ham_mnist" else 1} for name in presets}
    narrowed = {"test_compiled_it_gives_the_same": ("layer_pooling_relu",)}
    exempt = {
        **PresetContract.exempt_all,
        "test_the_order_of_stored_patterns_does_not_matter": "the class of each preset has a case of its own",
        "test_padding_is_as_if_it_were_not_there": "the class of each preset has a case of its own",
        **{
            f"{test}: {name}": reason
            for test in ("test_every_dtype_gives_what_float64_gives", "test_autocast_changes_little")
            for name, reason in {
                "layer_pooling_relu": "first weights make all scores about 0, where rounding decides what is forgotten",
                "layer_hopfield_equilibrium": "rounding decides the basin of a state between two patterns",
            }.items()
        },
        "test_gradients_of_input_and_parameters: ham_mnist": "1,600,000 weights; the class has a case of its own",
    }

    def inputs(self, batch=3):
        width = 784 if self.variant == "ham_mnist" else 64
        shape = (3, width) if self.variant == "ham_mnist" else (3, STORED, width)
        return (normal(*shape, seed=7)[[i % 3 for i in range(batch)]],)


class TestTrainingPresets(PresetContract, LayerContract):
    """The networks of the settings of trainings, whose key `model` says what to build."""

    presets = (
        "train_bit_pattern", "train_digits", "train_digits_ham", "train_ham_mnist", "train_image_bags",
        "train_repertoires", "train_vision_transformer",
    )  # fmt: skip
    variants = {
        name: {"steps": None if name in ("train_digits",) or "ham" in name else 1} for name in presets
    }
    exact = {}
    narrowed = {"test_compiled_it_gives_the_same": ("train_digits",)}
    large = "hundreds of thousands of weights; the layers have cases of their own"
    exempt = {
        **PresetContract.exempt_all,
        "test_the_order_of_stored_patterns_does_not_matter": "the class of each preset has a case of its own",
        "test_padding_is_as_if_it_were_not_there": "the class of each preset has a case of its own",
        "test_gradients_of_input_and_parameters": large,
        "test_it_keeps_the_solution_of_its_last_call_without_a_graph": "the layers in the network keep it",
        "test_nan_in_one_sample_harms_no_other: train_repertoires": "what is no code of a letter is refused",
        "test_autocast_changes_little: train_repertoires": (
            "first weights make all scores about 0, where rounding decides what is forgotten"
        ),
        "test_the_mode_changes_nothing_where_nothing_is_random: train_digits": (
            "torch's spectral norm makes a step of its power iteration at each use in training mode"
        ),
    }
    deviates = {
        "test_a_pickle_computes_the_same: train_digits": Deviation(
            "torch pickles no parametrized module, as its spectral norm is",
            RuntimeError,
            "parametrized modules",
        )
    }

    @pytest.fixture(autouse=True)
    def _timm(self, monkeypatch):
        stand_in(monkeypatch)

    def settings_of(self):
        return find("models", self.variant)["model"]

    def build(self, settings):
        return build_network(settings)

    def make(self, **options):
        # Dropout has no part in what is promised here.
        plain = {"dropout": 0.0} if "dropout" in self.settings_of() else {}
        return super().make(**{**plain, **options})

    def made(self, *, seed=3, **options):
        # In training mode torch's spectral norm changes the weight at each use.
        network = super().made(seed=seed, **options)
        return network.eval() if self.variant == "train_digits" else network

    def solution(self, layer):
        return layer.layer.last_solution if self.variant == "train_digits" else layer.last_solution

    def inputs(self, batch=3):
        rows = [i % 3 for i in range(batch)]
        if self.variant == "train_repertoires":
            data = torch.randint(20, (3, 5, 12), generator=torch.Generator().manual_seed(1))
            data[0, :, 9:] = PADDING
            return (data[rows],)
        shapes = {
            "train_bit_pattern": (3, 20, 8),
            "train_image_bags": (3, 4, 64),
            "train_ham_mnist": (3, 784),
        }
        return (normal(*shapes.get(self.variant, (3, 64)), seed=7)[rows],)
