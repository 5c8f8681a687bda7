"""RepertoireClassifier: input and options that cannot be, and what options do."""

import math

import pytest
import torch
from references import exactly
from test_repertoire_classifier import TIGHT, bags, made

from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models import RepertoireClassifier, SequenceAttention, build

# --- what cannot be


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": torch.zeros(3, 7, 8)}, TypeError, "data must hold the codes of letters as integers"),
        ({"data": torch.zeros(3, 8, dtype=torch.int8)}, ValueError, r"data must be a tensor \(B, N, L\)"),
        ({"data": [[[1]]]}, TypeError, "data must be a tensor"),
        ({"mask": torch.zeros(3, 7)}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.zeros(3, 6, dtype=torch.bool)}, ValueError, r"mask must have shape .* \(3, 7\)"),
        ({"lengths": torch.ones(3, 7)}, ValueError, r"lengths at \(0, 0\) is 1.0, but the sequence has \d"),
        ({"counts": torch.ones(3, 6)}, ValueError, r"counts must have shape"),
        ({"counts": -torch.ones(3, 7)}, ValueError, r"counts at \(0, 0\) is -1.0: a count is at least 0"),
        ({"counts": torch.full((3, 7), math.nan)}, ValueError, r"counts at \(0, 0\) is nan"),
        ({"counts": None}, ValueError, "counts are needed"),
    ],
)
def test_input_that_cannot_be_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        made(counts="weight")(**{**bags(), **changes})


@pytest.mark.parametrize("code", [20, -2, 100])
def test_a_code_out_of_range_is_named_with_its_place(code):
    batch = bags()
    batch["data"][1, 2, 0] = code
    with pytest.raises(ValueError, match=rf"data at \(1, 2, 0\) is {code}"):
        made()(**batch)


def test_a_sequence_without_letters_must_be_masked():
    batch = bags()
    batch["data"][1, 2] = -1
    with pytest.raises(ValueError, match=r"the sequence at \(1, 2\) has no letters"):
        made()(**batch)
    batch["mask"][1, 2] = True
    assert made()(**batch).isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"forgeting": "relu"}, ValueError, "Did you mean 'forgetting'"),
        ({"kernel": 3}, ValueError, "Did you mean 'kernels'"),
        ({"input_size": 3}, ValueError, "'input_size' is decided by"),
        ({"scaling": 0.5}, ValueError, "'scaling' is called beta here"),
        ({"reduction": 0.0}, ValueError, "reduction must be a share"),
        ({"reduction": 10}, ValueError, "reduction must be a share"),
        ({"counts": "weights"}, ValueError, "Did you mean 'weight'"),
        ({"min_sequences": 0}, ValueError, "min_sequences"),
        ({"attention_layers": -1}, ValueError, "attention_layers"),
        ({"projected": 1}, TypeError, "projected"),
        ({"projected": False, "num_heads": 2}, ValueError, "give projected=True, or quantity=2"),
        ({"hidden_size": 8}, ValueError, "hidden_size is an option of projections"),
        ({"steps": 0}, ValueError, "steps"),
        ({"forgetting": "rely"}, ValueError, "relu"),
    ],
)
def test_options_that_cannot_be_are_named(options, error, message):
    with pytest.raises(error, match=message):
        RepertoireClassifier(**options)


# --- options


def test_the_options_of_the_pooling_pass_through():
    model = RepertoireClassifier(
        steps=None, forgetting=PFU(), beta=0.3, solver="picard", stop=TIGHT, adjoint="onestep", quantity=2,
        separation="entmax15", dropout=0.1, outputs=3, reduction=0.1, inject_weight=0.5,
    )  # fmt: skip
    core = model.hopfield.hopfield
    assert core.f.inject == "input"
    assert (core.beta, core.equilibrium.solver, core.equilibrium.adjoint) == (0.3, "picard", "onestep")
    assert core.equilibrium.stop == TIGHT
    assert core.options.inject_weight == 0.5
    assert model(**bags()).shape == (3, 3)
    assert model.last_solution.result.shape == (3, 1, 2)
    model.steps = 4
    model(**bags())
    assert model.last_solution.steps.eq(4).all()
    assert RepertoireClassifier().hopfield.hopfield.beta == 1 / math.sqrt(32)


def test_models_build_makes_it_by_name():
    model = build({"model": "repertoire", "forgetting": {"unit": "relu", "min_keep": 1}, "num_heads": 4})
    assert model.hopfield.hopfield.f.forgetting.min_keep == 1
    assert model.hopfield.hopfield.options.width == 8
    with pytest.raises(ValueError, match="option of model 'repertoire': 'redution'.*'reduction'"):
        build({"model": "repertoire", "redution": 0.1})


def test_without_attention_layers_the_embeddings_are_the_keys():
    attention = SequenceAttention(5, layers=0)
    embeddings = torch.randn(3, 5)
    exactly(attention(embeddings), embeddings)
    assert made(attention_layers=0)(**bags()).isfinite().all()


def test_weights_are_drawn_anew():
    torch.manual_seed(3)
    model = RepertoireClassifier(num_heads=2)
    first = {name: part.clone() for name, part in model.state_dict().items()}
    torch.manual_seed(4)
    model.reset_parameters()
    for name, part in model.state_dict().items():
        fixed = "norm" in name or name.endswith("bias")
        assert torch.equal(part, first[name]) == fixed, name


@pytest.mark.parametrize("counts", ["weight", "input"])
def test_a_count_beyond_the_range_of_float16_is_a_number(counts):
    torch.manual_seed(0)
    model = RepertoireClassifier(counts=counts).half().eval()
    codes = torch.randint(0, 20, (1, 4, 12), dtype=torch.int8)
    logits = model(codes, counts=torch.tensor([[100_000, 1, 1, 1]]))
    assert logits.isfinite().all()
