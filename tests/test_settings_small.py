"""Settings that are nested deeply, listed, or make no sense: what is meant, or an error that says so."""

import importlib.metadata

import pytest
import torch
import torch.distributed as dist

from hopdeq_lwpf import arguments, cli, imports, training
from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.sweeps.spec import CompareSpec
from hopdeq_lwpf.training.datasets import Pictures
from hopdeq_lwpf.training.scores import gather
from hopdeq_lwpf.training.seeding import SeededEpochs


def test_a_deep_key_enters_a_mapping_of_its_own():
    given = {"model": {"solver": {"name": "a", "inner": {"x": 1}}}}
    mapping = dict(given)
    arguments._assign(mapping, "model.solver.inner.y.z", 3)
    assert mapping["model.solver"] == {"name": "a", "inner": {"x": 1, "y": {"z": 3}}}
    assert given == {"model": {"solver": {"name": "a", "inner": {"x": 1}}}}, "the caller's mapping stays"
    arguments._assign(mapping, "model.solver.name.deeper.still", 4)
    assert mapping["model.solver"]["name"] == {"deeper": {"still": 4}}


def test_classes_are_found_in_lists_of_settings():
    settings = [{"model": "a:B"}, ({"solver": ["c:D", "picard"]},), "e:F", {"adjoint": {"solver": "g:H"}}]
    assert imports.paths(settings) == ["a:B", "c:D", "g:H"]
    assert imports.paths(("a:B", 3, None)) == [], "only keys that name a class import one"


def test_the_version_of_a_checkout_that_is_not_installed_is_unknown(monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert "unknown" in capsys.readouterr().out


def test_a_misspelt_name_of_training_is_no_name():
    assert "train" in dir(training)
    with pytest.raises(AttributeError, match="has no attribute 'trane'"):
        _ = training.trane


@pytest.mark.parametrize("seed", [-1, 1.0, True, "0"])
def test_seeds_are_whole_numbers(seed):
    with pytest.raises(ValueError, match="seed must be a whole number of at least 0"):
        SeededEpochs(seed)


@pytest.mark.parametrize("size", [0, True, 2.5])
def test_batches_have_a_whole_size(size):
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
        Pictures("digits", batch_size=size)


def test_targets_belong_to_queries():
    with pytest.raises(SpecError, match="targets belong to queries"):
        CompareSpec(patterns="a.npy", targets="b.npy")


def test_scores_of_every_process_are_one_vector(tmp_path):
    parts = [torch.tensor([[1.0, 2.0]]), torch.tensor(3.0, dtype=torch.float16)]
    expected = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert torch.equal(gather(parts), expected)
    assert gather([]).shape == (0,)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert torch.equal(gather(parts), expected)
    finally:
        dist.destroy_process_group()
