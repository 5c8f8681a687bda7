"""Folders of images: against levels by hand, and everything that can be wrong with them."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from hopdeq_lwpf.data import DataError, read_images

LEVELS = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)


def only(folder, **options):
    images, names = read_images(folder, **options)
    assert len(names) == 1
    return images[0]


# --- images


def test_images_come_in_the_order_of_their_names_between_0_and_1(tmp_path):
    for number, name in enumerate(("b.png", "a.bmp", "c.PGM")):
        save(tmp_path / name, np.full((2, 3), 51 * number, dtype=np.uint8))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    images, names = read_images(tmp_path)
    assert names == ["a.bmp", "b.png", "c.PGM"]
    assert images.shape == (3, 2, 3)
    assert images.dtype == torch.float32
    assert images[:, 0, 0].tolist() == [np.float32(51 / 255), 0.0, np.float32(102 / 255)]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "pgm", "gif", "webp"])
def test_every_lossless_format_gives_the_levels_back(tmp_path, suffix):
    save(tmp_path / f"a.{suffix}", LEVELS, **({"lossless": True} if suffix == "webp" else {}))
    assert torch.equal(only(tmp_path), torch.from_numpy(LEVELS) / 255)


def test_a_photo_keeps_its_levels_up_to_the_loss_of_jpeg(tmp_path):
    save(tmp_path / "a.jpg", np.full((16, 16), 200, dtype=np.uint8), quality=95)
    # one level of rounding in the quantised mean of a constant block
    assert (only(tmp_path) - 200 / 255).abs().max() <= 1.01 / 255


def test_colours_become_grey_by_the_weights_of_itu_r_601(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save(tmp_path / "a.png", colours)
    by_hand = torch.tensor(
        [
            [sum(w * int(c) for w, c in zip((0.299, 0.587, 0.114), px, strict=True)) for px in row]
            for row in colours
        ]
    )
    # grey is rounded to a level; weights in 16 bits move it by less than 1/100 of one
    assert (only(tmp_path) * 255 - by_hand).abs().max() <= 0.51
    assert torch.equal(only(tmp_path, mode="RGB"), torch.from_numpy(colours) / 255)
    rgba = only(tmp_path, mode="RGBA")
    assert torch.equal(rgba[..., :3], torch.from_numpy(colours) / 255)
    assert bool((rgba[..., 3] == 1).all())


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    deep = np.array([[0, 1, 256], [32768, 65534, 65535]], dtype=np.uint16)
    by_hand = torch.tensor([[v / 65535 for v in row] for row in deep.tolist()])
    for number, suffix in enumerate(("png", "tif", "pgm")):
        folder = tmp_path / str(number)
        folder.mkdir()
        save(folder / f"a.{suffix}", deep)
        assert torch.equal(only(folder), by_hand), suffix
        assert torch.equal(only(folder, mode="RGB"), by_hand[..., None].expand(2, 3, 3)), suffix
        assert bool((only(folder, mode="RGBA")[..., 3] == 1).all())


def test_a_palette_is_looked_up(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode=None)
    image = image.convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "a.png")
    red, green, blue = (1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)
    assert torch.equal(only(tmp_path, mode="RGB"), torch.tensor([[red, green], [blue, green]]))


def test_bits_are_black_and_white(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert only(tmp_path).tolist() == [[1.0, 0.0]]


def test_transparent_pixels_lie_on_white(tmp_path):
    pixels = np.array([[[0, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 102]]], dtype=np.uint8)
    save(tmp_path / "a.png", pixels)
    assert only(tmp_path).tolist() == [[0.0, 1.0, np.float32(153 / 255)]]
    assert torch.equal(only(tmp_path, mode="RGBA"), torch.from_numpy(pixels) / 255)


def test_a_transparent_colour_of_a_palette_lies_on_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 51, 51, 51])
    image.save(tmp_path / "a.png", transparency=0)
    assert only(tmp_path).tolist() == [[1.0, np.float32(0.2)]]


@pytest.mark.parametrize("deep", [False, True])
def test_the_orientation_of_the_camera_is_applied(tmp_path, deep):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is shown as the last column
    array = LEVELS.astype(np.uint16) * 257 if deep else LEVELS
    save(tmp_path / "a.png", array, exif=exif)
    assert torch.equal(only(tmp_path), torch.from_numpy(np.rot90(LEVELS, -1).copy()) / 255)


def triangle(row, count):
    """Antialiased linear resampling of one row, in plain Python."""
    scale = len(row) / count
    reach = max(scale, 1.0)
    result = []
    for target in range(count):
        centre = (target + 0.5) * scale
        weights = [max(0.0, 1 - abs(source + 0.5 - centre) / reach) for source in range(len(row))]
        result.append(sum(w * v for w, v in zip(weights, row, strict=True)) / sum(weights))
    return result


@pytest.mark.parametrize("size", [(3, 4), (9, 2), (6, 8), 5, [12, 16]])
def test_resizing_is_linear_and_antialiased(tmp_path, size):
    array = np.random.default_rng(1).integers(0, 65536, (6, 8), dtype=np.uint16)
    save(tmp_path / "a.png", array)
    height, width = (size, size) if isinstance(size, int) else size
    rows = [triangle([v / 65535 for v in row], width) for row in array.tolist()]
    by_hand = torch.tensor([triangle(column, height) for column in zip(*rows, strict=True)]).T
    resized = only(tmp_path, size=size)
    assert resized.shape == (height, width)
    assert (resized - by_hand).abs().max() < 1e-6  # float32
    save(tmp_path / "a.png", (array >> 8).astype(np.uint8))
    rows = [triangle([(v >> 8) / 255 for v in row], width) for row in array.tolist()]
    by_hand = torch.tensor([triangle(column, height) for column in zip(*rows, strict=True)]).T
    # each of the two passes rounds to a level
    assert (only(tmp_path, size=size) - by_hand).abs().max() < 1.1 / 255


def test_images_of_two_sizes_are_refused_by_name_unless_resized(tmp_path):
    save(tmp_path / "a.png", np.zeros((2, 3), dtype=np.uint8))
    save(tmp_path / "b.png", np.zeros((3, 2), dtype=np.uint8))
    with pytest.raises(DataError, match=r"b\.png: is 3 x 2 .*, but a\.png is 2 x 3; give size="):
        read_images(tmp_path)
    assert read_images(tmp_path, size=(4, 5))[0].shape == (2, 4, 5)
    assert read_images(tmp_path, size=4, mode="RGB")[0].shape == (2, 4, 4, 3)


def _png(folder):
    save(folder / "good.png", np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8))
    content = (folder / "good.png").read_bytes()
    (folder / "good.png").unlink()
    return content


def _claiming(png, side):
    """The same file, whose header claims another size."""
    header = png[12:16] + struct.pack(">II", side, side) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda png: png[: len(png) // 2], "broken, cut off, or no image"),
        (lambda png: b"", "broken, cut off, or no image"),
        (lambda png: b"GIF89a and no more", "broken, cut off, or no image"),
        (lambda png: b"%!PS-Adobe-3.0 EPSF-3.0\n", "broken, cut off, or no image"),
        (lambda png: _claiming(png, 60000), "may be a decompression bomb"),
    ],
)
def test_a_broken_image_is_one_line_with_its_name(tmp_path, change, message):
    content = change(_png(tmp_path))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_images(tmp_path)
    assert "a.png" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [50, 99])
def test_a_decompression_bomb_is_refused_from_pillows_limit_on(tmp_path, monkeypatch, limit):
    # 100 pixels: Pillow itself only warns at 99, and raises from twice the limit on.
    save(tmp_path / "a.png", np.zeros((10, 10), dtype=np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit - (limit == 50))
    with pytest.raises(DataError, match=r"a\.png: has more than \d+ pixels .*bomb"):
        read_images(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_images(tmp_path)[0].shape == (1, 10, 10)


def test_what_cannot_be_one_image_between_0_and_1_is_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: holds 32-bit numbers"):
        read_images(tmp_path)
    Image.fromarray(np.zeros((2, 2), dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: holds 32-bit numbers"):
        read_images(tmp_path)
    frames = [Image.fromarray(np.full((2, 2), level, dtype=np.uint8)) for level in (0, 100, 200)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"a\.tif: holds 3 frames"):
        read_images(tmp_path)


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    with pytest.raises(DataError, match=r"holds no image \(\.png, .*\)$"):
        read_images(tmp_path)
    for name in "abcd":
        (tmp_path / f"{name}.txt").touch()
    with pytest.raises(DataError, match=r"it holds a\.txt, b\.txt, c\.txt, \.\.\."):
        read_images(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        read_images(tmp_path / "missing")
    with pytest.raises(DataError, match="Not a directory"):
        read_images(tmp_path / "a.txt")


def test_wrong_settings_are_named(tmp_path):
    for size in (0, -1, (1, 2, 3), (2.0, 3), "8", (True, 2)):
        with pytest.raises(ValueError, match="size must be"):
            read_images(tmp_path, size=size)
    with pytest.raises(ValueError, match="mode 'RGBAA' is not one of .* Did you mean 'RGBA'"):
        read_images(tmp_path, mode="RGBAA")
