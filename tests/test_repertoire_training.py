"""RepertoireClassifier in training: gradients, dead heads, dtypes, the command's network and data, resuming."""

import copy
import io
import warnings

import pytest
import torch
import yaml
from references import exactly
from rich.console import Console
from test_repertoire_classifier import UNITS, bags, made
from torch.nn import functional
from torch.testing import assert_close

from hopdeq_lwpf import Termination, find
from hopdeq_lwpf.data import RepertoireOptions, collate_repertoires, generate_repertoires, write_repertoires
from hopdeq_lwpf.forgetting import ReLU
from hopdeq_lwpf.models import RepertoireClassifier
from hopdeq_lwpf.training import Learner, Learning, TrainSpec, build_data, build_network, train

EASY = {"data": "repertoires", "num_repertoires": 20, "num_sequences": 8.0}


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("options", [{"counts": "input"}, {"reduction": 0.5, "counts": "weight"}], ids=str)
def test_gradients_are_those_of_finite_differences(unit, steps, options):
    torch.manual_seed(5)  # far from where another sequence is forgotten or kept
    model, batch = made(steps=steps, forgetting=unit, inject="input", **options), bags((4, 3))
    names = [name for name, _ in model.named_parameters()]

    def call(*parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (), batch)

    torch.autograd.gradcheck(
        call, [part.detach().clone().requires_grad_() for part in model.parameters()], fast_mode=True
    )


@pytest.mark.parametrize("steps", [1, 2, None])
def test_every_weight_gets_a_gradient_from_the_first_step(steps):
    model = RepertoireClassifier(steps=steps, inject="input")
    model(**bags()).sum().backward()
    for name, part in model.named_parameters():
        assert part.grad.any(), name


# --- dead heads


def with_low_scores(unit, batch):
    """A classifier all of whose scores for this batch are below 0."""
    torch.manual_seed(2)
    model = RepertoireClassifier(forgetting=unit)
    with torch.no_grad():
        here = ~batch["mask"]
        keys = model.attention(model.embedding(batch["data"][here]))
        # A query among the solutions of K q = -1, by least squares.
        query = torch.linalg.lstsq(keys, -torch.ones(len(keys), 1), driver="gelsd").solution
        model.hopfield.pooling_weights.copy_(query.T * 32**0.5)
        assert (keys @ query < 0).all()
    return model


def test_a_dead_head_is_reported_once_and_has_no_gradient():
    batch = bags((5, 4, 6))
    model = with_low_scores("relu", batch)
    with pytest.warns(UserWarning, match=r"1 of 1 heads forget every stored pattern.*min_keep=1"):
        model(**batch).square().sum().backward()
    assert not model.association_matrix.any()
    for part in (
        *model.attention.parameters(),
        *model.embedding.parameters(),
        model.hopfield.pooling_weights,
    ):
        assert not part.grad.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)


def test_a_kept_sequence_brings_a_dead_head_to_life():
    batch = bags((5, 4, 6))
    model = with_low_scores(ReLU(min_keep=1), batch)
    assert (model(**batch) != model.head.bias).all()
    assert model.association_matrix.gt(0).sum(-1).eq(1).all()
    target = torch.tensor([1.0, 0.0, 1.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(120):
        loss = functional.binary_cross_entropy_with_logits(model(**batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 < 0.6 < losses[0]
    assert model.association_matrix.gt(0).sum(-1).gt(1).any()


def test_few_first_weights_are_dead():
    data = generate_repertoires(RepertoireOptions(num_repertoires=4))
    batch = collate_repertoires([data[row] for row in range(4)])
    dead = 0
    with torch.no_grad():
        for seed in range(25):
            torch.manual_seed(seed)
            model = RepertoireClassifier(forgetting="relu").eval()
            model(batch["data"], batch["mask"])
            dead += not model.association_matrix.any()
    # With first biases of 0 a quarter are.
    assert dead <= 1


# --- dtypes, copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [1, 3])
def test_other_dtypes_agree_to_their_rounding(dtype, steps):
    model, batch = made(steps=steps, counts="weight").to(dtype), bags()
    want = copy.deepcopy(model).double()
    got = model(**batch)
    assert got.dtype == dtype
    # Some ten roundings follow each other, of numbers below ten.
    assert_close(got.double(), want(**batch), rtol=0, atol=60 * torch.finfo(dtype).eps)
    got.float().sum().backward()
    assert all(part.grad.isfinite().all() for part in model.parameters())


def test_autocast_runs_and_is_near():
    model, batch = RepertoireClassifier(reduction=0.5, counts="input"), bags()
    torch.nn.init.normal_(model.head.weight)
    want = model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(**batch)
        got.sum().backward()
    # bfloat16 has 8 bits, and keys pass four products.
    assert_close(got.float(), want, rtol=0.1, atol=0.1)


def test_a_copy_and_a_state_dict_give_the_same_logits():
    model, batch = made(reduction=0.5), bags()
    want = model(**batch)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    exactly(torch.load(buffer, weights_only=False)(**batch), want)
    other = made(reduction=0.5)
    other.load_state_dict(model.state_dict())
    exactly(other(**batch), want)


# --- training by name


def test_the_network_is_built_by_name_with_tolerances():
    settings = {"model": "repertoire", "steps": None, "rtol": 1e-3, "max_steps": 7, "outputs": 2}
    model = build_network(settings)
    assert model.hopfield.hopfield.equilibrium.stop == Termination(rtol=1e-3, max_steps=7)
    assert (model.options.outputs, settings["rtol"]) == (2, 1e-3)
    with pytest.raises(ValueError, match="Did you mean 'reduction'"):
        build_network({"model": "repertoire", "reductoin": 0.1})
    with pytest.raises(ValueError, match="Did you mean 'repertoire'"):
        build_network({"model": "repertoir"})


def test_the_data_is_built_by_name_with_two_seeds():
    given = {**EASY, "seed": 3, "split_seed": 4, "fold": 1, "max_sequences": 5, "motifs": ["SF^dEN", "AA"]}
    data = build_data(given, seed=7)
    assert (data.task.seed, data.split.seed, data.loading.seed) == (3, 4, 7)
    assert (data.task.motifs, data.split.fold, data.split.folds) == (("SF^dEN", "AA"), 1, 5)
    assert (data.loading.batch_size, data.max_sequences) == (4, 5)
    assert build_data({**EASY, "batch_size": 2}).loading.batch_size == 2
    plain = build_data({"data": "repertoires"})
    assert (plain.task, plain.split.seed) == (RepertoireOptions(), 0)
    with pytest.raises(ValueError, match="Did you mean 'split_seed'"):
        build_data({**EASY, "spilt_seed": 1})
    with pytest.raises(ValueError, match="not both"):
        build_data({**EASY, "folder": "x"})


def test_a_folder_of_repertoires_is_read(tmp_path):
    made_up = generate_repertoires(RepertoireOptions(num_repertoires=10, num_sequences=5.0))
    write_repertoires(made_up, tmp_path, target_column="sick")
    data = build_data({"data": "repertoires", "folder": str(tmp_path), "target_column": "sick", "folds": 5})
    assert len(data.train_set) == 6
    learner = Learner(RepertoireClassifier(counts="weight"), Learning(loss="binary"))
    assert learner.training_step(next(iter(data.train_dataloader())), 0).isfinite()


def spec(out, **changes):
    given = {"model": {"model": "repertoire", "reduction": 0.5}, "data": EASY, "loss": "binary", "epochs": 2}
    return TrainSpec(**{**given, "monitor": "val/auc", "out": str(out), **changes})


def test_a_run_logs_the_auc_and_resumes_to_the_last_bit(tmp_path):
    whole = train(spec(tmp_path / "whole"), console=Console(file=io.StringIO()))
    train(spec(tmp_path / "parts", epochs=1))
    parts = train(spec(tmp_path / "parts", resume=True))
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert 0 <= yaml.safe_load(lines[-1])["metrics"]["val/auc"] <= 1
    for name, part in whole.model.state_dict().items():
        exactly(parts.model.state_dict()[name], part)


def test_the_settings_of_the_folder_learn_the_motif(tmp_path):
    settings = find("models", "train_repertoires")
    # The full size takes seconds more; here a third of the sequences, with as many witnesses.
    small = {**settings["data"], "num_repertoires": 300, "num_sequences": 30.0, "witness_rate": 0.2}
    given = {**settings, "data": small, "epochs": 8, "diagnostics": False, "out": str(tmp_path)}
    run = train(TrainSpec(**given))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    best = max(yaml.safe_load(line)["metrics"]["val/auc"] for line in lines)
    assert best > 0.95
    data = build_data(small)
    items = [data.val_set[row] for row in range(30)]
    batch = collate_repertoires([item for item in items if item["target"] > 0])
    run.model.eval()(batch["data"], batch["mask"])
    weights = run.model.association_matrix[:, 0, 0]
    # Implanted sequences get more attention than the others of their repertoires.
    mean = [weights[batch["instance_target"]].mean(), weights[~batch["instance_target"]].mean()]
    assert mean[0] > 2 * mean[1]
