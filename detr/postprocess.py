"""Predictions -> detections of each image."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .boxes import box_cxcywh_to_xyxy
from .structures import Detections, Outputs


def absolute_boxes(outputs: Outputs, target_sizes: Tensor) -> Tensor:
    """``pred_boxes`` -> xyxy in pixels of images of ``target_sizes [B, 2]`` (height, width): ``[B, Q, 4]``."""
    boxes = outputs["pred_boxes"].float()
    if target_sizes.shape != (len(boxes), 2):
        raise ValueError(f"target_sizes is {list(target_sizes.shape)}; it needs one (height, width) for each of "
                         f"the {len(boxes)} images")
    height, width = target_sizes.to(boxes).unbind(1)
    return box_cxcywh_to_xyxy(boxes) * torch.stack([width, height, width, height], dim=1)[:, None]


class PostProcess(nn.Module):
    """DETR's output for the COCO API: each query is one detection, its best class that is not "no object"
    (Carion et al., 2020, section A.4, inference)."""

    @torch.no_grad()
    def forward(self, outputs: Outputs, target_sizes: Tensor) -> list[Detections]:
        """``target_sizes`` ``[B, 2]``: height and width of each image that boxes shall refer to (the original's for
        evaluation). Returns for each image ``scores [Q]``, ``labels [Q]``, ``boxes [Q, 4]`` in xyxy pixels, not
        clipped."""
        scores, labels = outputs["pred_logits"].float().softmax(-1)[..., :-1].max(-1)
        boxes = absolute_boxes(outputs, target_sizes)
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes)]


class PostProcessTopK(nn.Module):
    """For models that score each class by itself: the ``k`` best pairs of query and class (Zhu et al., 2021)."""

    def __init__(self, k: int = 100) -> None:
        super().__init__()
        self.k = k

    @torch.no_grad()
    def forward(self, outputs: Outputs, target_sizes: Tensor) -> list[Detections]:
        """As ``PostProcess``, with ``k`` detections an image, or as many as there are pairs."""
        logits, boxes = outputs["pred_logits"].float(), absolute_boxes(outputs, target_sizes)
        prob = logits.sigmoid().flatten(1)
        scores, pair = prob.topk(min(self.k, prob.shape[1]))
        query, labels = pair // logits.shape[-1], pair % logits.shape[-1]
        return [{"scores": s, "labels": c, "boxes": b[q]} for s, c, q, b in zip(scores, labels, query, boxes)]
