"""Attention drawn: what is bright is where the heat is, marks are where the points are."""
import numpy as np
import pytest
import torch
from PIL import Image
from test_attention_maps import images, small

from detr.attention_maps import DeformableAttention, explain
from detr.attention_pictures import LEVELS, attention_sheet, draw_path, draw_points, heat_over
from detr.visualize import enlarged

GREY = Image.new("RGB", (80, 40), (90, 90, 90))


def array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_heat_is_bright_where_it_is_and_the_rest_is_the_picture():
    heat = torch.zeros(4, 8)
    heat[1, 6] = 0.3
    drawn = array(heat_over(GREY, heat, min_side=0))
    assert drawn.shape == (40, 80, 3)
    y, x = np.unravel_index(drawn.sum(2).argmax(), (40, 80))
    assert 10 <= y < 20 and 60 <= x < 70
    assert (drawn[:, :45] == 90).all()                                          # without heat, nothing is changed
    halved = array(heat_over(GREY, heat, most=0.6, min_side=0))                 # a scale that several pictures share
    assert 90 * 3 != halved[15, 65].sum() < drawn[15, 65].sum()
    assert (array(heat_over(GREY, torch.zeros(2, 2), min_side=0)) == 90).all()


def test_more_heat_is_lighter():
    """Step by step, as eyes without colours need it."""
    heat = torch.linspace(0, 1, 64).expand(2, -1)
    drawn = array(heat_over(Image.new("RGB", (640, 20)), heat, opacity=1.0, min_side=0).convert("L"))[10]
    assert (np.diff(drawn) >= -1).all() and drawn[-1] > 220 > 10 > drawn[0]


@pytest.mark.parametrize("heat", [torch.zeros(3), torch.zeros(2, 0), torch.tensor([[float("nan"), 1.0]])])
def test_heat_that_is_none(heat):
    with pytest.raises(ValueError, match=r"heat \[.*\]: a map \[H, W\] of finite numbers is needed"):
        heat_over(GREY, heat)


def test_a_name_is_no_picture():
    with pytest.raises(TypeError, match="heat_over: the picture is a str; give a PIL image, such as Image.open"):
        heat_over("photo.jpg", torch.zeros(2, 2))


def test_box_is_outlined_at_the_size_of_the_picture():
    drawn, factor = heat_over(GREY, torch.zeros(2, 2), torch.tensor([20.0, 10, 60, 30])), 7
    assert drawn.size == enlarged(GREY, 256)[0].size == (80 * factor, 40 * factor)
    assert drawn.getpixel((20 * factor, 20 * factor)) == (255, 255, 255) == drawn.getpixel((60 * factor, 20 * factor))


def points(*places: tuple[float, float], levels: int = 2) -> DeformableAttention:
    at = torch.tensor(places).view(1, 1, levels, -1, 2)
    return DeformableAttention(at, torch.full(at.shape[:-1], 1 / len(places)), [(4, 8), (2, 4)][:levels], (40, 80))


def test_points_are_where_they_are_in_the_colour_of_their_level():
    drawn = draw_points(GREY, points((20.0, 20.0), (60.0, 20.0)), 0)
    factor = drawn.width // 80
    for x, (colour, _, _) in ((20, LEVELS[0]), (60, LEVELS[1])):
        seen = np.array(drawn.getpixel((x * factor, 20 * factor)))
        assert np.abs(seen - colour).max() < 110 and np.corrcoef(seen, colour)[0, 1] > 0.95
    assert drawn.height > 40 * factor                                           # and the strip that names the levels
    with pytest.raises(IndexError):
        draw_points(GREY, points((20.0, 20.0), (60.0, 20.0)), 1)


def test_points_outside_are_counted():
    strips = [array(draw_points(GREY, points((20.0, 20.0), (x, 20.0)), 0))[-24:] for x in (60.0, 160.0)]
    assert strips[0].shape != strips[1].shape or (strips[0] != strips[1]).any()


def test_marks_can_be_told_apart_without_colours():
    """Levels differ in shape, and their colours in lightness from the dark ground."""
    assert len({(corners, turn) for _, corners, turn in LEVELS}) == len(LEVELS)
    assert all(0.2126 * r + 0.7152 * g + 0.0722 * b > 100 for (r, g, b), _, _ in LEVELS)


def test_path_ends_in_the_brightest_box():
    path = torch.tensor([[5.0, 5, 20, 20], [30, 10, 50, 30], [55, 10, 75, 35]])
    drawn = draw_path(GREY, path)
    factor = drawn.width // 80
    ends = [max(sum(drawn.getpixel((int(box[2]) * factor, y))) for y in range(int(box[1] + 5) * factor,
                                                                             int(box[3] - 3) * factor))
            for box in path]
    assert ends[0] < ends[1] < ends[2]
    assert draw_path(GREY, path[:1]).size == drawn.size


@pytest.mark.parametrize("name", ["tiny_detr", "detr_resnet50", "deformable_detr_resnet50_two_stage"])
def test_sheet_of_all_heads_and_layers(name):
    model = small(name)
    image = images((64, 96))[0]
    seen = explain(model, [image])
    sheet = attention_sheet(GREY, seen, 0, min_side=40)
    heads = model.transformer.decoder.layers[0].self_attn.num_heads
    assert sheet.width == 8 + (heads + 1) * 88 and sheet.height == len(seen.decoder) * 88
    with pytest.raises(IndexError):
        attention_sheet(GREY, seen, 1000)
