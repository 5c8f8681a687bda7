"""Data: the tasks (bit patterns, latch, image bags, repertoires, multiple-instance sets), patterns on curves, the
handwritten digits, seeded corruption, and files of arrays and images. The data modules import lightning when first
used.
"""

import importlib
from typing import Any

from hopdeq_lwpf.data.bags import BagSet as BagSet
from hopdeq_lwpf.data.bags import ImageBagOptions as ImageBagOptions
from hopdeq_lwpf.data.bags import image_bags as image_bags
from hopdeq_lwpf.data.bags import load_pictures as load_pictures
from hopdeq_lwpf.data.batches import EpochSampler as EpochSampler
from hopdeq_lwpf.data.batches import ResumableLoader as ResumableLoader
from hopdeq_lwpf.data.batches import collate_bags as collate_bags
from hopdeq_lwpf.data.bit_pattern import BitPatternOptions as BitPatternOptions
from hopdeq_lwpf.data.bit_pattern import BitPatternSet as BitPatternSet
from hopdeq_lwpf.data.corruption import CORRUPTIONS as CORRUPTIONS
from hopdeq_lwpf.data.corruption import corrupt as corrupt
from hopdeq_lwpf.data.curves import CURVES as CURVES
from hopdeq_lwpf.data.curves import CurveSet as CurveSet
from hopdeq_lwpf.data.curves import make_curve as make_curve
from hopdeq_lwpf.data.digits import load_digits as load_digits
from hopdeq_lwpf.data.errors import DataError as DataError
from hopdeq_lwpf.data.files import read_array as read_array
from hopdeq_lwpf.data.files import read_indices as read_indices
from hopdeq_lwpf.data.files import replacing as replacing
from hopdeq_lwpf.data.files import staged_folder as staged_folder
from hopdeq_lwpf.data.files import write_arrays as write_arrays
from hopdeq_lwpf.data.framing import frame_pictures as frame_pictures
from hopdeq_lwpf.data.idx import read_idx as read_idx
from hopdeq_lwpf.data.images import read_images as read_images
from hopdeq_lwpf.data.latch import LatchOptions as LatchOptions
from hopdeq_lwpf.data.latch import LatchSequenceSet as LatchSequenceSet
from hopdeq_lwpf.data.mil import MIL_SETS as MIL_SETS
from hopdeq_lwpf.data.mil import load_mil as load_mil
from hopdeq_lwpf.data.mil import read_mil as read_mil
from hopdeq_lwpf.data.preprocessing import NORMALIZATIONS as NORMALIZATIONS
from hopdeq_lwpf.data.preprocessing import Preprocessing as Preprocessing
from hopdeq_lwpf.data.repertoire_files import read_repertoires as read_repertoires
from hopdeq_lwpf.data.repertoire_files import write_repertoires as write_repertoires
from hopdeq_lwpf.data.repertoires import AMINO_ACIDS as AMINO_ACIDS
from hopdeq_lwpf.data.repertoires import RepertoireOptions as RepertoireOptions
from hopdeq_lwpf.data.repertoires import Repertoires as Repertoires
from hopdeq_lwpf.data.repertoires import RepertoireSet as RepertoireSet
from hopdeq_lwpf.data.repertoires import collate_repertoires as collate_repertoires
from hopdeq_lwpf.data.repertoires import decode_sequences as decode_sequences
from hopdeq_lwpf.data.repertoires import encode_sequences as encode_sequences
from hopdeq_lwpf.data.repertoires import generate_repertoires as generate_repertoires

# Lightning takes seconds to import, so these load when first used.
MODULES = (
    "BitPatternDataModule",
    "FoldOptions",
    "ImageBagDataModule",
    "LatchDataModule",
    "LoadingOptions",
    "MilDataModule",
    "RepertoireDataModule",
    "TaskDataModule",
)


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(importlib.import_module("hopdeq_lwpf.data.modules"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])
