"""Boxes: formats, conversions, IoU and generalized IoU (Rezatofighi et al., 2019).

Two formats, and names say which: ``boxes`` are ``cxcywh`` (centre, width, height), usually as fractions of
the image in 0..1; ``boxes_xyxy`` are corners (left, top, right, bottom).
"""
import math

import torch
from torch import Tensor

NO_AREA = 1e-14                 # the least area, as a fraction of the image, is above this: sides of float32's resolution


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """``[..., 4]`` centre, width, height -> ``[..., 4]`` corners."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], dim=-1)


def box_xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """``[..., 4]`` corners -> ``[..., 4]`` centre, width, height."""
    x0, y0, x1, y1 = boxes_xyxy.unbind(-1)
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)


def box_xyxy_to_xywh(boxes_xyxy: Tensor) -> Tensor:
    """``[..., 4]`` corners -> ``[..., 4]`` left, top, width, height, as COCO writes boxes."""
    return torch.cat([boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]], dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """Areas ``[...]`` of corner boxes ``[..., 4]``."""
    return (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]) * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1])


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union of corner boxes whose leading dimensions broadcast."""
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    inter = size[..., 0] * size[..., 1]
    return inter, box_area(a) + box_area(b) - inter


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, and 0 where ``whole`` is (nearly) 0: boxes without area. The gradient is finite there and at
    boxes that are hardly more, of which a lower bound keeps it from overflowing."""
    empty = whole <= NO_AREA
    return torch.where(empty, 0.0, part / torch.where(empty, 1.0, whole))


def box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union of every pair: ``[N, 4]``, ``[M, 4]`` corners -> two tensors ``[N, M]``.

    Two boxes without area have IoU 0.
    """
    inter, union = _overlap(a_xyxy[..., :, None, :], b_xyxy[..., None, :, :])
    return _ratio(inter, union), union


def _giou(a: Tensor, b: Tensor) -> Tensor:
    inter, union = _overlap(a, b)
    size = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)
    hull = size[..., 0] * size[..., 1]
    return _ratio(inter, union) - _ratio(hull - union, hull)


def generalized_box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalized IoU of every pair, in -1..1: ``[N, 4]``, ``[M, 4]`` corners -> ``[N, M]``.

    Boxes without area are ordinary input: the result is finite for all finite boxes with ``x0 <= x1, y0 <= y1``.
    """
    return _giou(a_xyxy[..., :, None, :], b_xyxy[..., None, :, :])


def paired_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalized IoU of corresponding boxes: ``[N, 4]``, ``[N, 4]`` corners -> ``[N]``."""
    return _giou(a_xyxy, b_xyxy)


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Extreme pixel indices of masks ``[N, H, W]`` as corners ``[N, 4]``, float32.

    As published, indices are inclusive, and an empty mask gives ``[1e8, 1e8, 0, 0]``.
    """
    if masks.numel() == 0:
        return torch.zeros((len(masks), 4), device=masks.device)
    masks = masks.bool()
    sides = []
    for size, dim in ((masks.shape[2], 1), (masks.shape[1], 2)):           # columns (x), then rows (y)
        index = torch.arange(size, dtype=torch.float32, device=masks.device)
        hit = masks.any(dim)
        sides.append((torch.where(hit, index, 1e8).amin(1), torch.where(hit, index, 0.0).amax(1)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], dim=1)


def refine_relative(reference: Tensor, delta: Tensor) -> Tensor:
    """Boxes ``[..., 4]`` (cxcywh) that differ from ``reference`` by ``delta``, relative to its size: the centre moves by
    so many widths and heights, and these grow by the exponential (Girshick et al., 2014, appendix C). At most 50-fold."""
    centre, size = reference[..., :2], reference[..., 2:]
    return torch.cat([centre + delta[..., :2] * size, size * delta[..., 2:].clamp(max=math.log(50)).exp()], dim=-1)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of ``x``, with ``x`` and ``1 - x`` each held above ``eps``."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def box_prior(boxes: Tensor, places: Tensor) -> Tensor:
    """Where an object is, as far as its box tells: the logarithm of a Gaussian around the centre of each box with half of
    the box's sides as deviations (after Gao et al., 2021, "Fast convergence of DETR with spatially modulated
    co-attention", section 3.2). ``boxes [B, Q, 4]`` and ``places [B, 2, S]``, both in fractions of the image, places as x
    and y -> ``[B, Q, S]``, without gradient."""
    centre, sides = boxes.detach().float()[..., None].split(2, dim=-2)                          # [B, Q, 2, 1]
    away = (places[:, None] - centre) / (sides / 2).clamp(min=1e-3)
    return away.square().sum(-2) * -0.5
