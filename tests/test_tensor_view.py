"""Any array as a picture: what it shows is what the array holds."""
import numpy as np
import pytest
import torch
from matplotlib import colormaps

from detr import tensor_view
from detr.tensor_view import arranged, limits, statistics, view


def colours(picture) -> set[tuple[int, int, int]]:
    return {colour for _, colour in picture.getcolors(1 << 24)}


def near(picture, colour) -> int:
    """Pixels of about a colour, 0..255."""
    return int((np.abs(np.asarray(picture).astype(int) - np.array(colour)).max(-1) <= 3).sum())


@pytest.mark.parametrize("array", [
    torch.randn(5, 7), torch.rand(3, 8, 9), torch.rand(2, 3, 6, 6), torch.rand(2, 3, 4).half(),
    torch.rand(4, 4).bfloat16(), torch.arange(6).view(2, 3), torch.tensor([[True, False]]), np.random.rand(9, 2),
    np.zeros((1, 1, 1, 1), np.uint8), torch.randn(4, 4, requires_grad=True), torch.full((2, 2), float("nan")),
    torch.zeros(300, 1), torch.rand(20, 5, 8)])
def test_any_array(array):
    picture = view(array, "something")
    assert picture.mode == "RGB" and min(picture.size) > 60 and len(colours(picture)) > 5


@pytest.mark.parametrize("array", [torch.zeros(3), torch.tensor(1.0), torch.zeros(1, 1, 1, 2, 2), torch.zeros(2, 0),
                                   torch.zeros(2, 2, dtype=torch.complex64), np.array([["a", "b"]])])
def test_what_is_no_map(array):
    with pytest.raises(ValueError, match="view: an array .*are needed: index or reshape it"):
        view(array)


def test_largest_and_smallest_have_the_ends_of_the_colours():
    value = torch.linspace(2, 5, 256).view(16, 16)
    picture = view(value)
    for end in (0.0, 1.0):
        assert near(picture, np.array(colormaps["viridis"](end)[:3]) * 255) > 50


def test_zero_is_white_between_blue_and_red():
    assert limits(np.array([-1.0, 4.0])) == ((-4.0, 4.0), "RdBu_r")
    assert limits(np.array([1.0, 4.0])) == ((1.0, 4.0), "viridis") and limits(np.array([2.0, 2.0]))[0] == (2.0, 3.0)
    red, blue = view(torch.eye(20) - 1e-6), view(1e-6 - torch.eye(20))
    assert near(red, (103, 0, 31)) > 100 and near(blue, (5, 48, 97)) > 100


def test_what_is_not_finite_shows():
    value = torch.rand(20, 20)
    before = near(view(value), (213, 94, 0))
    value[3:6] = float("inf")
    assert near(view(value), (213, 94, 0)) > before + 500
    assert statistics(value.numpy(), value[value.isfinite()].numpy()).endswith("; 60 of 400 not finite")


def test_maps_stand_where_the_array_has_them():
    assert arranged((2, 3, 5, 5), None).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arranged((6, 5, 5), (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arranged((5, 5), None).tolist() == [[0]] and arranged((4, 5, 5), None).tolist() == [[0, 1, 2, 3]]
    many = arranged((20, 8, 8), None)
    assert sorted(many[many >= 0].tolist()) == list(range(20)) and many.shape[0] > 1 and (many.flat[20:] == -1).all()
    with pytest.raises(ValueError, match=r"view: rows=\(2, 2\) for 6 maps"):
        view(torch.zeros(6, 5, 5), rows=(2, 2))


def test_too_many_maps_are_not_drawn(monkeypatch):
    drawn = []
    real = tensor_view.draw_map
    monkeypatch.setattr(tensor_view, "draw_map", lambda axes, values, *rest, **more: drawn.append(values) or
                        real(axes, values, *rest, **more))
    view(torch.arange(200.0).view(2, 100, 1, 1), most=6)
    assert [value.item() for value in drawn] == [0, 1, 2, 3, 4, 5]
    drawn.clear()
    view(torch.arange(24.0).view(6, 4, 1, 1), most=9)
    assert [value.item() for value in drawn] == list(range(8))                  # whole rows


def test_each_map_with_its_own_scale():
    value = torch.stack([torch.rand(16, 16), 100 * torch.rand(16, 16)])
    bright = np.array(colormaps["viridis"](1.0)[:3]) * 255
    first = [np.asarray(view(value, shared=shared)).astype(int) for shared in (True, False)]
    left = [(np.abs(x[:, :x.shape[1] // 3] - bright).max(-1) < 60).sum() for x in first]
    assert left[0] == 0 < left[1]
