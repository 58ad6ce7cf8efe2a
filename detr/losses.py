"""Losses of matched pairs (Carion et al., 2020, sections 3.1 and A.2).

A loss is called with the outputs of one decoder layer, the targets, the match and the number of boxes (over all
processes), and returns its named values. The criterion is handed a list of them.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import box_cxcywh_to_xyxy, paired_giou
from .structures import Match, Outputs, Target


def matched_queries(match: Match, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index of all matched queries in a ``[B, Q, ...]`` tensor: image and query, both ``[sum N]``."""
    image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(match)])
    return image.to(device), torch.cat([query for query, _ in match]).to(device)


def matched_targets(name: str, targets: Sequence[Target], match: Match) -> Tensor:
    """The field ``name`` of all matched objects, in the order of ``matched_queries``."""
    return torch.cat([target[name][obj.to(target[name].device)] for target, (_, obj) in zip(targets, match)])


class SoftmaxLabelLoss:
    """``loss_ce``: cross-entropy over ``num_classes`` classes and "no object", whose weight is ``eos_coef``; the mean
    is weighted by the same weights. ``class_error``: percentage of matched queries whose best class is wrong, 100 where
    nothing was matched, as published."""

    def __init__(self, num_classes: int, eos_coef: float) -> None:
        self.num_classes, self.eos_coef = num_classes, eos_coef

    def __call__(self, outputs: Outputs, targets: Sequence[Target], match: Match,
                 num_boxes: Tensor) -> dict[str, Tensor]:
        logits = outputs["pred_logits"]                                                         # [B, Q, C + 1]
        index, labels = matched_queries(match, logits.device), matched_targets("labels", targets, match)
        classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        classes[index] = labels
        weight = torch.ones(self.num_classes + 1, device=logits.device)
        weight[-1] = self.eos_coef
        return {"loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, weight),
                "class_error": class_error(logits[index].detach(), labels)}


class FocalLabelLoss:
    """``loss_ce``: focal loss of every query and class by the number of boxes (Lin et al., 2017); ``class_error`` as
    above."""

    def __init__(self, alpha: float = 0.25) -> None:
        self.alpha = alpha

    def __call__(self, outputs: Outputs, targets: Sequence[Target], match: Match,
                 num_boxes: Tensor) -> dict[str, Tensor]:
        logits = outputs["pred_logits"]                                                         # [B, Q, C]
        (image, query), labels = matched_queries(match, logits.device), matched_targets("labels", targets, match)
        classes = torch.zeros_like(logits)
        classes[image, query, labels] = 1
        return {"loss_ce": sigmoid_focal_loss(logits, classes, self.alpha).sum() / num_boxes,
                "class_error": class_error(logits[image, query].detach(), labels)}


def class_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Percentage of rows of ``logits [N, C]`` whose best class is not ``labels [N]``; 100 where there are none."""
    if len(labels) == 0:
        return torch.full((), 100.0, device=logits.device)
    return 100 - 100 * (logits.argmax(-1) == labels).float().mean()


@torch.no_grad()
def cardinality_error(outputs: Outputs, targets: Sequence[Target], match: Match,
                      num_boxes: Tensor) -> dict[str, Tensor]:
    """``cardinality_error``: how far the number of queries that see an object is from the number of objects,
    absolute, mean over images. For reading, without gradient."""
    logits = outputs["pred_logits"]
    seen = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
    true = torch.as_tensor([len(target["labels"]) for target in targets], device=logits.device)
    return {"cardinality_error": (seen - true).abs().float().mean()}


def box_loss(outputs: Outputs, targets: Sequence[Target], match: Match,
             num_boxes: Tensor) -> dict[str, Tensor]:
    """``loss_bbox``: L1 distance of the boxes, and ``loss_giou``: 1 - generalized IoU; sums over pairs by the number of
    boxes."""
    boxes, true = outputs["pred_boxes"], matched_targets("boxes", targets, match)
    boxes = boxes[matched_queries(match, boxes.device)]
    giou = paired_giou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(true))
    return {"loss_bbox": F.l1_loss(boxes, true, reduction="sum") / num_boxes, "loss_giou": (1 - giou).sum() / num_boxes}


def mask_loss(outputs: Outputs, targets: Sequence[Target], match: Match,
              num_boxes: Tensor) -> dict[str, Tensor]:
    """``loss_mask``: focal loss, mean over the pixels of the padded batch, and ``loss_dice``: dice loss (Milletari et
    al., 2016), of the predicted masks resized to the targets' size; sums over pairs by the number of boxes. Nothing for
    layers that predict no masks."""
    if "pred_masks" not in outputs:
        return {}
    true = pad_masks(targets, match).to(outputs["pred_masks"].device)
    masks = outputs["pred_masks"] if "match" in outputs else outputs["pred_masks"][matched_queries(match, true.device)]
    masks = F.interpolate(masks[:, None], size=true.shape[-2:], mode="bilinear", align_corners=False).flatten(1)
    true = true.flatten(1)
    prob = masks.sigmoid()
    dice = 1 - (2 * (prob * true).sum(1) + 1) / (prob.sum(1) + true.sum(1) + 1)
    return {"loss_mask": sigmoid_focal_loss(masks, true).mean(1).sum() / num_boxes, "loss_dice": dice.sum() / num_boxes}


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of each element (Lin et al., 2017, equation 5), not reduced; ``targets`` are 0 or 1, float."""
    prob = logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    loss = loss * (1 - (prob * targets + (1 - prob) * (1 - targets))) ** gamma
    return (alpha * targets + (1 - alpha) * (1 - targets)) * loss


def pad_masks(targets: Sequence[Target], match: Match) -> Tensor:
    """Masks of all matched objects, padded to the largest height and width among them: float ``[sum N, H, W]``."""
    height, width = (max(target["masks"].shape[d] for target in targets) for d in (1, 2))
    padded: list[Target] = [{"masks": F.pad(mask.float(), (0, width - mask.shape[2], 0, height - mask.shape[1]))}
              for mask in (target["masks"] for target in targets)]
    return matched_targets("masks", padded, match)
