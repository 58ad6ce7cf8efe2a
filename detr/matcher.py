"""Bipartite matching of queries to ground truth (Carion et al., 2020, section 3.1)."""
from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .boxes import box_cxcywh_to_xyxy, generalized_box_iou
from .structures import Match, NonFiniteError, Outputs, Target


def softmax_class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """``1 - p(class)`` without the constant: logits ``[B, Q, C + 1]``, labels ``[B, N]`` -> ``[B, Q, N]``."""
    prob = logits.softmax(-1)
    return -prob.gather(2, labels[:, None].expand(-1, prob.shape[1], -1))


def focal_class_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """What the focal loss of an object's class would change if a query took it (Zhu et al., 2021, section A.3):
    logits ``[B, Q, C]``, labels ``[B, N]`` -> ``[B, Q, N]``."""
    prob = logits.sigmoid()
    positive = alpha * (1 - prob) ** gamma * -(prob + 1e-8).log()
    negative = (1 - alpha) * prob ** gamma * -(1 - prob + 1e-8).log()
    return (positive - negative).gather(2, labels[:, None].expand(-1, prob.shape[1], -1))


class HungarianMatcher(nn.Module):
    """The one-to-one assignment of queries to objects with the least total cost, image by image.

    The cost of a pair weighs the class (``cost_class``), the L1 distance of the boxes (``cost_bbox``) and their
    generalized IoU (``cost_giou``). No gradient flows through it. The result does not depend on the other images of the
    batch.
    """

    def __init__(self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1,
                 class_cost: Callable[[Tensor, Tensor], Tensor] = softmax_class_cost) -> None:
        super().__init__()
        if cost_class == 0 and cost_bbox == 0 and cost_giou == 0:
            raise ValueError("all matching costs are 0; give --set_cost_class, --set_cost_bbox or --set_cost_giou a "
                             "weight")
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.class_cost = class_cost

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: Sequence[Target]) -> Match:
        """``pred_logits [B, Q, C(+1)]``, ``pred_boxes [B, Q, 4]``, B targets -> for each image the matched queries
        (ascending) and their objects, two int64 tensors of ``min(Q, N)``, on the CPU.

        An image without objects matches nothing. Where an image has more objects than queries, the cheapest are
        matched and a warning counts the rest. Raises ``NonFiniteError`` where predictions or boxes are not numbers, those
        of images without objects and of classes that no object has, too.
        """
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        counts = [len(target["labels"]) for target in targets]
        finite = logits.isfinite().all() & boxes.isfinite().all()           # a cost sees the classes of objects alone
        if max(counts, default=0) == 0:
            if not finite:
                blame_non_finite(outputs, targets)
            return [(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)) for _ in targets]
        check_labels(targets, logits.shape[-1] - (self.class_cost is softmax_class_cost))
        labels = pad_sequence([target["labels"] for target in targets], batch_first=True)           # [B, N]
        true_boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True)        # [B, N, 4]
        cost = (self.cost_class * self.class_cost(logits, labels)
                + self.cost_bbox * (boxes[:, :, None] - true_boxes[:, None]).abs().sum(-1)
                - self.cost_giou * generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(true_boxes)))
        cost = torch.where(finite, cost, torch.nan).cpu()                                           # [B, Q, N]
        if not cost.isfinite().all():
            blame_non_finite(outputs, targets)
        surplus = sum(max(0, n - logits.shape[1]) for n in counts)
        if surplus:
            warnings.warn(f"{surplus} objects of this batch have no query to match: images have up to {max(counts)} "
                          f"objects and the model {logits.shape[1]} queries; raise --num_queries", stacklevel=2)
        pairs = [linear_sum_assignment(c[:, :n].numpy()) for c, n in zip(cost, counts)]
        return [(torch.as_tensor(query), torch.as_tensor(obj)) for query, obj in pairs]


def check_labels(targets: Sequence[Target], num_classes: int) -> None:
    """Labels index logits: one out of range is "no object", or an unreadable fault on a GPU, so it is named here."""
    low, high = torch.cat([target["labels"] for target in targets]).aminmax()
    if low >= 0 and high < num_classes:
        return
    for i, target in enumerate(targets):
        wrong = [label for label in target["labels"].unique().tolist() if not 0 <= label < num_classes]
        if wrong:
            where = f"image_id {int(target['image_id'])}" if "image_id" in target else f"image {i} of the batch"
            raise ValueError(f"{where} has the labels {wrong}, and the model's classes are 0 to {num_classes - 1}; "
                             f"build it with num_classes above the largest label, and count labels from 0")


def blame_non_finite(outputs: Outputs, targets: Sequence[Target]) -> None:
    """Raise a ``NonFiniteError`` that names the tensors and images whose values are not numbers."""
    tensors: dict[str, Any] = {"pred_logits": outputs["pred_logits"], "pred_boxes": outputs["pred_boxes"],
                               "target boxes": [target["boxes"] for target in targets]}
    found = []
    for name, of_images in tensors.items():
        bad = [i for i, x in enumerate(of_images) if not x.isfinite().all()]
        if bad:
            alone = f"image {bad[0]}" if len(bad) == 1 else f"images {', '.join(map(str, bad))}"
            found.append(f"{name} of {alone if len(bad) < len(of_images) or len(bad) < 3 else f'all {len(bad)} images'}")
    raise NonFiniteError("not finite: " + (", ".join(found) or "the matching cost"))
