"""Pictures brought to one size inside their frame."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from hopdeq_lwpf.data import frame_pictures, load_digits
from hopdeq_lwpf.training import build_data


def block(top, left, tall, wide, side=28, value=1.0):
    picture = torch.zeros(side, side, dtype=torch.float64)
    picture[top : top + tall, left : left + wide] = value
    return picture


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from([12, 16, 24]),
)
def test_what_is_drawn_fills_the_size_in_the_middle_wherever_it_was(top, left, tall, wide, size):
    (framed,) = frame_pictures(block(top, left, tall, wide).reshape(1, -1), size)
    framed = framed.reshape(28, 28)
    scale = size / max(tall, wide)
    # Interpolation blurs an edge by less than a source pixel.
    for axis, extent in ((0, tall), (1, wide)):
        across = framed.sum(1 - axis)
        middle = float((across * (torch.arange(28.0) + 0.5)).sum() / across.sum())
        assert middle == pytest.approx(14, abs=1e-6), "not centred"
        # A bar of that many pixels under bicubic interpolation keeps its mass.
        height = float(framed.amax(1 - axis).max())
        assert height > 0.6
        used = (framed.amax(1 - axis) > 0.5 * height).sum()
        assert abs(float(used) - extent * scale) <= max(2.0, scale)


def test_whole_factors_are_the_interpolation_of_torch():
    generator = torch.Generator().manual_seed(0)
    inner = torch.rand(5, 1, 12, 12, generator=generator, dtype=torch.float64) + 0.01
    picture = torch.zeros(5, 1, 28, 28, dtype=torch.float64)
    picture[:, :, 3:15, 9:21] = inner
    padded = torch.zeros(5, 1, 14, 14, dtype=torch.float64)
    padded[:, :, 1:13, 1:13] = inner  # 24 pixels of 28 after doubling
    expected = interpolate(padded, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)
    found = frame_pictures(picture.flatten(1), 24).reshape(5, 1, 28, 28)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_one_picture_never_sees_another_and_an_empty_one_stays():
    pictures = load_digits()[0][:7].clone()
    pictures[3] = 0
    whole = frame_pictures(pictures, 6)
    for number in range(7):
        assert torch.equal(frame_pictures(pictures[number : number + 1], 6)[0], whole[number])
    assert not whole[3].any()
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1


def test_any_shape_of_picture_and_an_option_of_the_data():
    wide = torch.zeros(1, 2, 6)
    wide[0, 0, 1] = 1.0
    assert frame_pictures(wide.flatten(1), 2, (2, 6)).reshape(2, 6)[:, 2:4].min() > 0.5
    data = build_data({"data": "digits", "frame": 6})
    data.setup("fit")
    plain = build_data({"data": "digits"})
    plain.setup("fit")
    (framed,), (raw,) = (part.parts["val"].tensors[:1] for part in (data, plain))
    assert torch.equal(framed, frame_pictures(raw, 6))


@pytest.mark.parametrize(
    ("pictures", "size", "said"),
    [
        (torch.zeros(2, 10), 2, "not 3 x 3; give shape="),
        (torch.zeros(9), 2, "must have shape"),
        (torch.zeros(2, 9), 4, "from 1 to 3"),
        (torch.zeros(2, 9), 0, "from 1 to 3"),
        (torch.zeros(2, 9), 2.0, "from 1 to 3"),
        (torch.zeros(2, 9, dtype=torch.int64), 2, "floating-point"),
    ],
)
def test_mistakes_are_said(pictures, size, said):
    with pytest.raises((TypeError, ValueError), match=said):
        frame_pictures(pictures, size)
