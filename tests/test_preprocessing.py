"""detr/preprocessing.py: pictures become the numbers that the definition says, whatever their order in memory."""
import numpy as np
import pytest
import torch
from PIL import Image

from detr.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, as_planes, normalised

EVERY_VALUE = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(3, 8, 32)


def definition(planes, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    return (planes.double() / 255 - mean) / std


@pytest.mark.parametrize("mean, std", [(IMAGENET_MEAN, IMAGENET_STD), ((0.0,) * 3, (1.0,) * 3), ((0.9,) * 3, (0.3,) * 3)])
def test_every_value_is_normalised_as_defined(mean, std):
    found = normalised(EVERY_VALUE, mean, std)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), definition(EVERY_VALUE, mean, std), atol=1e-6, rtol=0)


@pytest.mark.parametrize("height, width", [(8, 32), (67, 83), (1, 1), (300, 500)])
def test_neither_order_in_memory_nor_place_nor_threads_change_a_bit(height, width):
    torch.manual_seed(0)
    planes = torch.randint(256, (3, height, width), dtype=torch.uint8)
    want = normalised(planes, IMAGENET_MEAN, IMAGENET_STD)
    by_pixel = planes.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(normalised(by_pixel, IMAGENET_MEAN, IMAGENET_STD), want)
    wide = torch.full((3, height + 3, width + 5), 7.0)
    normalised(by_pixel, IMAGENET_MEAN, IMAGENET_STD, out=wide[:, :height, :width])
    assert torch.equal(wide[:, :height, :width], want)
    assert (wide[:, height:] == 7).all() and (wide[:, :, width:] == 7).all()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(normalised(by_pixel, IMAGENET_MEAN, IMAGENET_STD), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_planes_of_a_picture(mode):
    picture = Image.effect_noise((20, 12), 80).convert(mode)
    pixels = np.asarray(picture).reshape(12, 20, -1)
    planes = as_planes(picture)
    assert planes.dtype == torch.uint8 and np.array_equal(planes.permute(1, 2, 0).numpy(), pixels)
    planes.zero_()                                                              # its own memory
    assert np.asarray(picture).any()
    assert as_planes(planes) is planes


def test_a_picture_is_resized_by_pillow_then_normalised():
    picture = Image.effect_noise((100, 80), 80).convert("RGB")
    want = torch.from_numpy(np.array(picture.resize((50, 40), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    torch.testing.assert_close(Preprocessing(40, None)(picture).double(), definition(want), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="a picture with 1 channels, and the model takes 3; open it with as_picture"):
        Preprocessing(40)(picture.convert("L"))
