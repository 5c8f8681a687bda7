"""Data of the studies: the handwritten digits, seeded corruption, and files of arrays and images."""

from hopdeq_lwpf.data.corruption import CORRUPTIONS as CORRUPTIONS
from hopdeq_lwpf.data.corruption import corrupt as corrupt
from hopdeq_lwpf.data.digits import load_digits as load_digits
from hopdeq_lwpf.data.files import DataError as DataError
from hopdeq_lwpf.data.files import read_array as read_array
from hopdeq_lwpf.data.files import read_indices as read_indices
from hopdeq_lwpf.data.files import replacing as replacing
from hopdeq_lwpf.data.files import staged_folder as staged_folder
from hopdeq_lwpf.data.files import write_arrays as write_arrays
from hopdeq_lwpf.data.idx import read_idx as read_idx
from hopdeq_lwpf.data.images import read_images as read_images
from hopdeq_lwpf.data.preprocessing import NORMALIZATIONS as NORMALIZATIONS
from hopdeq_lwpf.data.preprocessing import Preprocessing as Preprocessing
