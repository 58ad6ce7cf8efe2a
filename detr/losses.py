"""Losses of matched pairs (Carion et al., 2020, sections 3.1 and A.2).

A loss is called with the outputs of one decoder layer, the targets, the match and what it is to be divided by, and
returns its named values. The criterion is handed a list of them.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import box_area, box_cxcywh_to_xyxy, paired_giou
from .structures import Divisors, Match, Outputs, Target
from .transfer import on_device

IGNORED = 0.5                   # least part of a box in an ignore region with which its query need not see "no object"
LEFT_OUT = -100                 # the class that cross-entropy leaves out, with its weight


def matched_queries(match: Match, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index of all matched queries in a ``[B, Q, ...]`` tensor: image and query, both ``[sum N]``."""
    image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(match)])
    return on_device(image, device), on_device(torch.cat([query for query, _ in match]), device)


def matched_targets(name: str, targets: Sequence[Target], match: Match) -> Tensor:
    """The field ``name`` of all matched objects, in the order of ``matched_queries``."""
    values, starts = torch.cat([target[name] for target in targets]), [0]
    for target in targets:
        starts.append(starts[-1] + len(target[name]))
    return values[on_device(torch.cat([obj + start for start, (_, obj) in zip(starts, match)]), values.device)]


@torch.no_grad()
def ignored_queries(outputs: Outputs, targets: Sequence[Target], match: Match) -> Tensor | None:
    """Which queries are not to learn that they see no object: bool ``[B, Q]``, or None where no target has ``ignore``.

    They are unmatched, and at least half (``IGNORED``) of the area of their box lies in one region of ``ignore [M, 4]``
    (cxcywh in 0..1). That is how COCO's evaluation excuses detections in a crowd, region by region; several regions that
    hold half of a box only together excuse nothing. A box without area lies in no region.
    """
    if not any(len(target.get("ignore", ())) for target in targets):
        return None
    boxes_xyxy = box_cxcywh_to_xyxy(outputs["pred_boxes"])[:, :, None]                          # [B, Q, 1, 4]
    ignored = torch.zeros(boxes_xyxy.shape[:2], dtype=torch.bool, device=boxes_xyxy.device)
    for i, target in enumerate(targets):
        if len(target.get("ignore", ())):
            boxes, regions = boxes_xyxy[i], box_cxcywh_to_xyxy(target["ignore"].to(boxes_xyxy))
            size = torch.minimum(boxes[..., 2:], regions[:, 2:]) - torch.maximum(boxes[..., :2], regions[:, :2])
            inside, area = size.clamp(min=0).prod(-1), box_area(boxes)                          # [Q, M], [Q, 1]
            ignored[i] = ((inside >= IGNORED * area) & (area > 0)).any(1)
    ignored[matched_queries(match, ignored.device)] = False
    return ignored


def balanced_weights(counts: Sequence[int] | Tensor) -> list[float]:
    """Weights of classes that have so many objects each: proportional to ``1 / sqrt(count)``, and 1 on average over the
    objects, so that the loss keeps its scale. A class without objects, which no object counts for, gets 1."""
    number = torch.as_tensor(counts, dtype=torch.float64)
    if number.dim() != 1 or (number < 0).any():
        raise ValueError(f"counts {list(number.shape)}: one number of objects for each class is needed, none below 0")
    weights = number.sum() / number.sqrt().sum() / number.sqrt()                # sum(count * weight) = sum(count)
    return torch.where(number > 0, weights, 1.0).tolist()


def checked_weights(class_weights: Sequence[float] | Tensor | None) -> Tensor | None:
    """Weights of classes as a tensor ``[C]``; ValueError where one is no weight."""
    if class_weights is None:
        return None
    weights = torch.as_tensor(class_weights, dtype=torch.float32)
    if weights.dim() != 1 or not (weights.isfinite() & (weights > 0)).all():
        raise ValueError(f"class_weights {weights.tolist()}: a finite number above 0 is needed for each class")
    return weights


class SoftmaxLabelLoss:
    """``loss_ce``: cross-entropy over ``num_classes`` classes and "no object", whose weight is ``eos_coef``; the mean
    is weighted by the same weights. ``class_error``: percentage of matched queries whose best class is wrong, 100 where
    nothing was matched, as published.

    ``class_weights`` are those of the classes, which without them weigh 1, as published. Queries in ignore regions have
    no part in the mean (``ignored_queries``); where none is left, it is 0.

    Where ``divisors`` know the images and objects of the whole optimizer step, the sum is divided by the weights that
    these have, each object matched and each other query seeing none, in place of the batch's own. Ignored queries count
    there, since nobody knows them beforehand.
    """

    def __init__(self, num_classes: int, eos_coef: float, class_weights: Sequence[float] | Tensor | None = None) -> None:
        self.num_classes, self.eos_coef = num_classes, eos_coef
        self.weigh_classes(class_weights)

    def weigh_classes(self, class_weights: Sequence[float] | Tensor | None) -> None:
        """``class_weights`` from now on."""
        self.class_weights = checked_weights(class_weights)
        if self.class_weights is not None:
            check_number(self.class_weights, self.num_classes)

    def weight_of_objects(self, labels: Tensor) -> Tensor:
        """The sum of the weights of these objects' classes."""
        if self.class_weights is None:
            return torch.tensor(float(len(labels)))
        known = (labels >= 0) & (labels < self.num_classes)                     # of others the matcher complains
        return (on_device(self.class_weights, labels.device)[labels.where(known, 0)] * known).sum()

    def __call__(self, outputs: Outputs, targets: Sequence[Target], match: Match,
                 divisors: Divisors) -> dict[str, Tensor]:
        logits = outputs["pred_logits"]                                                         # [B, Q, C + 1]
        index, labels = matched_queries(match, logits.device), matched_targets("labels", targets, match)
        ignored = ignored_queries(outputs, targets, match)
        classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        classes[index] = labels
        weight = torch.ones(self.num_classes + 1, device=logits.device)
        if self.class_weights is not None:
            weight[:-1] = on_device(self.class_weights, logits.device)
        weight[-1] = self.eos_coef
        if divisors.images is not None:
            total = divisors.weight + self.eos_coef * (divisors.images * logits.shape[1] - divisors.objects)
        elif ignored is not None:
            total = weight[classes].masked_fill(ignored, 0.0).sum()
            total = torch.where(total > 0, total, 1.0)
        else:
            total = None
        if total is None:
            loss = F.cross_entropy(logits.transpose(1, 2), classes, weight)
        else:
            classes = classes if ignored is None else classes.masked_fill(ignored, LEFT_OUT)
            loss = F.cross_entropy(logits.transpose(1, 2), classes, weight, ignore_index=LEFT_OUT,
                                   reduction="sum") / total
        return {"loss_ce": loss, "class_error": class_error(logits[index].detach(), labels)}


class FocalLabelLoss:
    """``loss_ce``: focal loss of every query and class by the number of boxes (Lin et al., 2017); ``class_error`` as
    above.

    With ``class_weights`` [C], all that a matched query contributes is times the weight of its object's class; other
    queries weigh 1, and without them all do, as published. Targets of class-agnostic proposals, whose label is always
    0, have the class in ``classes``. Queries in ignore regions contribute nothing, for no class (``ignored_queries``).
    """

    def __init__(self, alpha: float = 0.25, class_weights: Sequence[float] | Tensor | None = None) -> None:
        self.alpha = alpha
        self.weigh_classes(class_weights)

    def weigh_classes(self, class_weights: Sequence[float] | Tensor | None) -> None:
        """``class_weights`` from now on."""
        self.class_weights = checked_weights(class_weights)

    def __call__(self, outputs: Outputs, targets: Sequence[Target], match: Match,
                 divisors: Divisors) -> dict[str, Tensor]:
        logits = outputs["pred_logits"]                                                         # [B, Q, C]
        (image, query), labels = matched_queries(match, logits.device), matched_targets("labels", targets, match)
        ignored = ignored_queries(outputs, targets, match)
        classes = torch.zeros_like(logits)
        classes[image, query, labels] = 1
        loss = sigmoid_focal_loss(logits, classes, self.alpha)
        if self.class_weights is not None:
            check_number(self.class_weights, logits.shape[-1])
            of_objects = matched_targets("classes", targets, match) if "classes" in targets[0] else labels
            weight = torch.ones(logits.shape[:2], device=logits.device)
            weight[image, query] = on_device(self.class_weights, logits.device)[of_objects]
            loss = loss * weight[..., None]
        if ignored is not None:
            loss = loss.masked_fill(ignored[..., None], 0.0)
        return {"loss_ce": loss.sum() / divisors.boxes, "class_error": class_error(logits[image, query].detach(), labels)}


def check_number(class_weights: Tensor, num_classes: int) -> None:
    """ValueError unless there is a weight for each class."""
    if len(class_weights) != num_classes:
        raise ValueError(f"class_weights has {len(class_weights)} numbers for {num_classes} classes; give one for each "
                         f"label from 0 to {num_classes - 1}, or 'auto'")


def class_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Percentage of rows of ``logits [N, C]`` whose best class is not ``labels [N]``; 100 where there are none."""
    if len(labels) == 0:
        return torch.full((), 100.0, device=logits.device)
    return 100 - 100 * (logits.argmax(-1) == labels).float().mean()


@torch.no_grad()
def cardinality_error(outputs: Outputs, targets: Sequence[Target], match: Match,
                      divisors: Divisors) -> dict[str, Tensor]:
    """``cardinality_error``: how far the number of queries that see an object is from the number of objects,
    absolute, mean over images. For reading, without gradient."""
    logits = outputs["pred_logits"]
    seen = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
    true = on_device([len(target["labels"]) for target in targets], logits.device)
    return {"cardinality_error": (seen - true).abs().float().mean()}


def box_loss(outputs: Outputs, targets: Sequence[Target], match: Match,
             divisors: Divisors) -> dict[str, Tensor]:
    """``loss_bbox``: L1 distance of the boxes, and ``loss_giou``: 1 - generalized IoU; sums over pairs by the number of
    boxes."""
    boxes, true = outputs["pred_boxes"], matched_targets("boxes", targets, match)
    boxes = boxes[matched_queries(match, boxes.device)]
    giou = paired_giou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(true))
    return {"loss_bbox": F.l1_loss(boxes, true, reduction="sum") / divisors.boxes,
            "loss_giou": (1 - giou).sum() / divisors.boxes}


@torch.no_grad()
def box_parts(outputs: Outputs, targets: Sequence[Target], match: Match,
              divisors: Divisors) -> dict[str, Tensor]:
    """``loss_xy`` and ``loss_hw``: what of ``loss_bbox`` comes from centres and from sides. For reading, without
    gradient."""
    boxes, true = outputs["pred_boxes"], matched_targets("boxes", targets, match)
    distance = (boxes[matched_queries(match, boxes.device)] - true).abs().sum(0)                # [4]
    return {"loss_xy": distance[:2].sum() / divisors.boxes, "loss_hw": distance[2:].sum() / divisors.boxes}


def mask_loss(outputs: Outputs, targets: Sequence[Target], match: Match,
              divisors: Divisors) -> dict[str, Tensor]:
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
    return {"loss_mask": sigmoid_focal_loss(masks, true).mean(1).sum() / divisors.boxes,
            "loss_dice": dice.sum() / divisors.boxes}


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of each element (Lin et al., 2017, equation 5), not reduced; ``targets`` are 0 or 1, float."""
    prob = logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    loss = loss * (1 - (prob * targets + (1 - prob) * (1 - targets))) ** gamma
    return (alpha * targets + (1 - alpha) * (1 - targets)) * loss


def pad_masks(targets: Sequence[Target], match: Match) -> Tensor:
    """Masks of all matched objects, in the order of ``matched_queries``, padded with zeros to the largest height and
    width of the targets: float ``[sum N, H, W]``. Those of unmatched objects, which may be many, are never copied."""
    height, width = (max(target["masks"].shape[d] for target in targets) for d in (1, 2))
    counts, device = [len(obj) for _, obj in match], targets[0]["masks"].device
    objects = on_device(torch.cat([obj for _, obj in match]), device).split(counts)             # one copy
    padded = torch.zeros(sum(counts), height, width, device=device)
    for place, target, obj in zip(padded.split(counts), targets, objects):
        masks = target["masks"]
        place[:, :masks.shape[1], :masks.shape[2]] = masks[obj]
    return padded
