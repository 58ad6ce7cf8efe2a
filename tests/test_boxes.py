"""Boxes against the published functions, against plain definitions in float64, and where they have no area."""
import itertools

import pytest
import torch
from cases import check, load_case, unchecked

from detr.boxes import (
    box_area,
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    box_xyxy_to_xywh,
    generalized_box_iou,
    inverse_sigmoid,
    masks_to_boxes,
    paired_giou,
)


def random_boxes(n: int, seed: int) -> torch.Tensor:
    """Corners in 0..1, float64."""
    points = torch.rand(n, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sort(1).values
    return points.flatten(1)


def area(x0: float, y0: float, x1: float, y1: float) -> float:
    return max(0.0, x1 - x0) * max(0.0, y1 - y0)


def definition(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """IoU, union and generalized IoU of two corner boxes, as the paper has them."""
    inter = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - inter
    hull = area(min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    iou = inter / union if union > 0 else 0.0
    return iou, union, iou - ((hull - union) / hull if hull > 0 else 0.0)


def test_published_functions():
    case = load_case("detr_box_ops")
    a, b = box_cxcywh_to_xyxy(case.expected["in.a"]), box_cxcywh_to_xyxy(case.expected["in.b"])
    check(case, "xyxy.a", a)
    check(case, "cxcywh.a", box_xyxy_to_cxcywh(a))
    iou, union = box_iou(a, b)
    check(case, "iou", iou)
    check(case, "union", union)
    check(case, "giou", generalized_box_iou(a, b))
    masks = case.expected["in.masks"]
    check(case, "mask_boxes", masks_to_boxes(masks))
    check(case, "mask_boxes_none", masks_to_boxes(masks[:0]))
    assert unchecked(case) == []


def test_definition_in_float64():
    a, b = random_boxes(6, 0), random_boxes(5, 1)
    expected = torch.tensor([[definition(x, y) for y in b.tolist()] for x in a.tolist()], dtype=torch.float64)
    iou, union = box_iou(a, b)
    actual = torch.stack([iou, union, generalized_box_iou(a, b)], dim=-1)
    torch.testing.assert_close(actual, expected, atol=1e-14, rtol=0)
    torch.testing.assert_close(paired_giou(a[:5], b), expected[..., 2].diagonal(), atol=1e-14, rtol=0)
    assert -1 <= actual[..., 2].min() < 0 < actual[..., 2].max() <= 1


def test_gradient():
    a, b = random_boxes(4, 2).requires_grad_(), random_boxes(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(paired_giou, (a, b))
    assert torch.autograd.gradcheck(generalized_box_iou, (a, b))


DEGENERATE = [[0.5, 0.5, 0.5, 0.5], [0.5, 0.2, 0.5, 0.9], [0.1, 0.4, 0.7, 0.4], [0.0, 0.0, 0.0, 0.0],
              [0.2, 0.2, 0.8, 0.8], [0.5, 0.5, 0.5 + 1e-30, 0.5 + 1e-30]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_without_area(dtype):
    pairs = torch.tensor(list(itertools.product(DEGENERATE, DEGENERATE)), dtype=dtype)
    a, b = pairs[:, 0].clone().requires_grad_(), pairs[:, 1].clone().requires_grad_()
    giou = paired_giou(a, b)
    giou.sum().backward()
    assert giou.isfinite().all() and giou.abs().max() <= 1
    assert a.grad.isfinite().all() and b.grad.isfinite().all()
    iou = box_iou(pairs[:, 0], pairs[:, 1])[0].diagonal()
    without_area = (box_area(pairs) == 0).any(1)
    assert without_area.any() and not without_area.all()
    assert (iou[without_area] == 0).all()


def test_leading_dimensions_are_a_batch():
    a, b = random_boxes(6, 4).view(2, 3, 4), random_boxes(4, 5).view(2, 2, 4)
    together = generalized_box_iou(a, b)
    assert together.shape == (2, 3, 2)
    assert torch.equal(together, torch.stack([generalized_box_iou(x, y) for x, y in zip(a, b)]))


def test_formats_are_inverses():
    boxes = random_boxes(10, 6)
    torch.testing.assert_close(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(boxes)), boxes, atol=1e-15, rtol=0)
    assert box_xyxy_to_cxcywh(torch.tensor([2.0, 4.0, 8.0, 6.0])).tolist() == [5, 5, 6, 2]
    assert box_xyxy_to_xywh(torch.tensor([[2.0, 4.0, 8.0, 5.0]])).tolist() == [[2, 4, 6, 1]]
    assert box_area(torch.tensor([[2.0, 4.0, 8.0, 6.0]])).tolist() == [12]


def test_masks_to_boxes():
    masks = torch.zeros(3, 4, 6, dtype=torch.uint8)
    masks[0, 1:3, 2:5] = 1
    masks[1, 3, 0] = 1
    assert masks_to_boxes(masks).tolist() == [[2, 1, 4, 2], [0, 3, 0, 3], [1e8, 1e8, 0, 0]]
    assert masks_to_boxes(torch.zeros(0, 0, 0)).shape == (0, 4)


def test_inverse_sigmoid():
    x = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x), torch.logit(x))
    ends = inverse_sigmoid(torch.tensor([-0.5, 0.0, 1.0, 1.5], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([-1.0, -1, 1, 1], dtype=torch.float64) * 11.512925464970229)
