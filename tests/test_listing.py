"""`hopdeq-lwpf list`: every name that the registries have, each with a line, at once."""

import subprocess
import sys

import pytest

from hopdeq_lwpf import models, solvers
from hopdeq_lwpf.cli import main
from hopdeq_lwpf.forgetting import UNITS
from hopdeq_lwpf.separation import SEPARATIONS
from hopdeq_lwpf.settings import KINDS, names
from hopdeq_lwpf.solvers.adjoints import ADJOINTS
from hopdeq_lwpf.sweeps import listing, study_spec, sweep_spec
from hopdeq_lwpf.training.datasets import DATASETS
from hopdeq_lwpf.training.networks import LAYERS, MODELS, NETWORKS


@pytest.mark.parametrize(
    ("listed", "known"),
    [
        (listing.MODELS, {*models.MODELS, *NETWORKS, *LAYERS, *MODELS}),
        (listing.SOLVERS, {*solvers.SOLVERS, "auto", "torchdeq:NAME"}),
        (listing.ADJOINTS, ADJOINTS),
        (listing.DATASETS, DATASETS),
        (listing.UNITS, {"none", *UNITS}),
        (listing.SEPARATIONS, SEPARATIONS),
        (listing.TRIALS, sweep_spec.TASKS),
        (listing.STUDIES, {study_spec.RETRIEVAL, *study_spec.TASKS}),
    ],
)
def test_every_name_of_a_registry_has_its_line_in_listing_py(listed, known):
    assert set(listed) == set(known)
    assert all(line and "\n" not in line for line in listed.values())


def test_everything_is_listed_once_with_a_line(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    found = [name for entries in listing.listing("all").values() for name, _ in entries]
    for kind in KINDS:
        assert set(names(kind)) <= set(found)
    for entries in listing.listing("all").values():
        for name, line in entries:
            assert line
            assert f"  {name} " in text
            assert line in text
            assert len(line) <= 110


@pytest.mark.parametrize("kind", listing.KINDS)
def test_one_kind_is_a_part_of_all(kind, capsys):
    assert main(["list", kind]) == 0
    part = capsys.readouterr().out
    main(["list"])
    assert part in capsys.readouterr().out
    assert part.strip()


def test_a_misspelt_kind_names_the_nearest(capsys):
    assert main(["list", "modles"]) == 2
    assert "Did you mean 'models'?" in capsys.readouterr().err


def test_listing_needs_no_torch():
    script = "import sys\nfrom hopdeq_lwpf.cli import main\nassert main(['list']) == 0\n"
    script += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
