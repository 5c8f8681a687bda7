"""Folders of images as one tensor."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.data.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# Suffix and Pillow's name. Only these decoders are asked: others start programs (EPS) or are seldom tested.
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
    ".pbm": "PPM",
    ".pgm": "PPM",
    ".ppm": "PPM",
    ".pnm": "PPM",
}
CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
SIXTEEN = 65535.0


def read_images(
    folder: str | os.PathLike[str], *, size: int | Sequence[int] | None = None, mode: str = "L"
) -> tuple[Tensor, list[str]]:
    """The images of a folder in the order of their names: (N, h, w), or (N, h, w, c), float32 in [0, 1].

    Also returns the N file names. Files without a suffix of `FORMATS`, hidden files and folders are passed
    over; the names say what was read.
    size: (height, width), or one number for both; every image is resampled to it, without regard to its
        proportions (bilinear, antialiased, so that nothing leaves [0, 1]). None: all must have one size.
    mode: "L", grey (ITU-R 601 luma), no channel dimension; "RGB" (c = 3); "RGBA" (c = 4). Transparent pixels
        lie on white where the mode has no alpha.
    Cameras' orientation (EXIF) is applied. 16-bit grey keeps its 16 bits.
    Raises DataError, one line that names the file, for an image that is broken, of another size, of more than
    one frame, without a defined range (32-bit), or larger than Pillow's limit against decompression bombs
    (`PIL.Image.MAX_IMAGE_PIXELS`); and for a folder that is missing or holds no image.
    """
    if mode not in CHANNELS:
        raise unknown("mode", mode, CHANNELS)
    shape = _size(size)
    root = Path(folder)
    names = _names(root)
    first = _image(root / names[0], shape, mode)
    images = torch.empty((len(names), *first.shape), dtype=torch.float32)
    for row, name in enumerate(names):
        image = first if row == 0 else _image(root / name, shape, mode)
        if image.shape != first.shape:
            one, other = (f"{part.shape[0]} x {part.shape[1]}" for part in (first, image))
            raise DataError(
                f"{root / name}: is {other} (height x width), but {names[0]} is {one}; give size=(height, width) "
                "or make them equal"
            )
        images[row] = torch.from_numpy(image)
    return images, names


def _size(size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, (list, tuple, torch.Size)) else (size, size)
    if len(sides) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sides):
        raise ValueError(f"size must be (height, width) or one whole number of at least 1, got {size!r}")
    return sides[0], sides[1]


def _names(root: Path) -> list[str]:
    try:
        found = sorted(entry.name for entry in root.iterdir() if entry.is_file())
    except OSError as error:
        raise DataError(f"{root}: {error.strerror or 'cannot be read'}") from error
    names = [name for name in found if not name.startswith(".") and Path(name).suffix.lower() in FORMATS]
    if not names:
        others = f"; it holds {', '.join(found[:3])}{', ...' * (len(found) > 3)}" if found else ""
        raise DataError(f"{root}: holds no image ({', '.join(FORMATS)}){others}")
    return names


def _image(path: Path, size: tuple[int, int] | None, mode: str) -> np.ndarray:
    """One image, (h, w) or (h, w, c) float32 in [0, 1]."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Pillow warns from its limit on and raises from twice as much; here the limit holds.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # From memory, where a decoder cannot ask for more bytes than there are: a PNG may claim 4 GB for a chunk.
            opened = Image.open(io.BytesIO(path.read_bytes()), formats=sorted(set(FORMATS.values())))
        with opened as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a photo whose second frame is its preview
                raise DataError(f"{path}: holds {frames} frames; write each to a file of its own")
            return _array(path, image, size, mode)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{path}: has more than {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS), which may be a "
            "decompression bomb"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders meet broken data with errors of many kinds
        said = (str(error).splitlines() or [""])[0].partition("<_io.BytesIO")[0].strip()
        detail = said.replace(str(path), path.name) or type(error).__name__
        raise DataError(f"{path}: is broken, cut off, or no image ({detail})") from error


def _array(path: Path, image: Image.Image, size: tuple[int, int] | None, mode: str) -> np.ndarray:
    from PIL import Image, ImageOps

    # Pillow reads 16-bit grey as "I;16", or as "I" from formats that have no more than 16 bits.
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") and not sixteen:
        raise DataError(
            f"{path}: holds 32-bit numbers, whose range is not defined; write it with 8 or 16 bits a channel"
        )
    if sixteen:
        image = Image.fromarray(np.asarray(image).astype(np.float32) / SIXTEEN)
    else:
        image = _opaque(image, mode).convert(mode)
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    array = np.asarray(image)
    if not sixteen:
        return array.astype(np.float32) / 255
    array = array.clip(0, 1)  # rounding in the resampling of floats
    if mode == "L":
        return array
    channels = [array] * 3 + [np.ones_like(array)] * (mode == "RGBA")
    return np.stack(channels, -1)


def _opaque(image: Image.Image, mode: str) -> Image.Image:
    """The image on white, where it has transparent pixels and `mode` has no alpha."""
    from PIL import Image

    if mode == "RGBA" or not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
