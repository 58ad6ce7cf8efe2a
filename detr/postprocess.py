"""Predictions -> detections of each image."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .boxes import box_cxcywh_to_xyxy
from .structures import Detections, Outputs


class PostProcess(nn.Module):
    """DETR's output for the COCO API: each query is one detection, its best class that is not "no object"
    (Carion et al., 2020, section A.4, inference)."""

    @torch.no_grad()
    def forward(self, outputs: Outputs, target_sizes: Tensor) -> list[Detections]:
        """``target_sizes`` ``[B, 2]``: height and width of each image that boxes shall refer to (the original's for
        evaluation). Returns for each image ``scores [Q]``, ``labels [Q]``, ``boxes [Q, 4]`` in xyxy pixels, not
        clipped."""
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        if target_sizes.shape != (len(logits), 2):
            raise ValueError(f"target_sizes is {list(target_sizes.shape)}; it needs one (height, width) for each of "
                             f"the {len(logits)} images")
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        height, width = target_sizes.to(boxes).unbind(1)
        boxes = box_cxcywh_to_xyxy(boxes) * torch.stack([width, height, width, height], dim=1)[:, None]
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes)]
