"""Predictions -> detections of each image, and their masks."""
from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import box_cxcywh_to_xyxy
from .structures import Detections, Outputs, Rle


def check_sizes(name: str, sizes: Tensor, images: int) -> Tensor:
    """``sizes``; ValueError unless they are ``[B, 2]`` for that many images."""
    if sizes.shape != (images, 2):
        raise ValueError(f"{name} is {list(sizes.shape)}; it needs one (height, width) for each of the {images} images")
    return sizes


def absolute_boxes(outputs: Outputs, target_sizes: Tensor) -> Tensor:
    """``pred_boxes`` -> xyxy in pixels of images of ``target_sizes [B, 2]`` (height, width): ``[B, Q, 4]``."""
    boxes = outputs["pred_boxes"].float()
    height, width = check_sizes("target_sizes", target_sizes, boxes.shape[0]).to(boxes).unbind(1)
    return box_cxcywh_to_xyxy(boxes) * torch.stack([width, height, width, height], dim=1)[:, None]


class PostProcess(nn.Module):
    """DETR's output for the COCO API: each query is one detection, its best class that is not "no object"
    (Carion et al., 2020, section A.4, inference)."""

    @torch.no_grad()
    def forward(self, outputs: Outputs, target_sizes: Tensor) -> list[Detections]:
        """``target_sizes`` ``[B, 2]``: height and width of each image that boxes shall refer to (the original's for
        evaluation). Returns for each image ``scores [Q]``, ``labels [Q]``, ``boxes [Q, 4]`` in xyxy pixels, not
        clipped."""
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(*self.of_batch(outputs, target_sizes)[:3])]

    def of_batch(self, outputs: Outputs, target_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Scores and labels ``[B, Q]``, boxes ``[B, Q, 4]`` of all images; and None: each query has one."""
        scores, labels = outputs["pred_logits"].float().softmax(-1)[..., :-1].max(-1)
        return scores, labels, absolute_boxes(outputs, target_sizes), None


class PostProcessTopK(nn.Module):
    """For models that score each class by itself: the ``k`` best pairs of query and class (Zhu et al., 2021)."""

    def __init__(self, k: int = 100) -> None:
        super().__init__()
        self.k = k

    @torch.no_grad()
    def forward(self, outputs: Outputs, target_sizes: Tensor) -> list[Detections]:
        """As ``PostProcess``, with ``k`` detections an image, or as many as there are pairs; ``queries`` says which
        query each is of, for its mask."""
        return [{"scores": s, "labels": c, "boxes": b, "queries": q}
                for s, c, b, q in zip(*self.of_batch(outputs, target_sizes))]

    def of_batch(self, outputs: Outputs, target_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores and labels ``[B, n]``, boxes ``[B, n, 4]`` of all images, and the query each is of ``[B, n]``."""
        logits, boxes = outputs["pred_logits"].float(), absolute_boxes(outputs, target_sizes)
        prob = logits.sigmoid().flatten(1)
        scores, pair = prob.topk(min(self.k, prob.shape[1]))
        query, labels = pair // logits.shape[-1], pair % logits.shape[-1]
        return scores, labels, boxes.gather(1, query[..., None].expand(-1, -1, 4)), query


@functools.lru_cache
def logit_threshold(threshold: float, device: torch.device) -> float:
    """The largest logit whose sigmoid, in float32 and as ``device`` rounds it, is not above ``threshold``.

    Comparing logits with it selects what comparing probabilities would. It is not the logit of ``threshold``: sigmoids
    of all logits from 0 to 8.9e-8 round to 0.5, and of 100 masks of a large image a pixel or two lie there.
    """
    low, high = -200.0, 200.0
    while (middle := float(np.float32((low + high) / 2))) not in (low, high):
        above = torch.full((64,), middle, device=device).sigmoid()[0] > threshold          # a vector, as masks are
        low, high = (low, middle) if above else (middle, high)
    return low


class PostProcessSegm(nn.Module):
    """Masks of detections at the size of the original images (Carion et al., 2020, section 4.4).

    As published: mask logits are resized to the batch's largest image (bilinear), a pixel with a probability above
    ``threshold`` belongs to the mask, padding is cut off and the rest resized to the original (nearest). At most
    ``chunk`` masks are logits of full size at a time, on the device they came on, and the result is the same for any
    ``chunk``. It is also, bit for bit, that of resizing all masks of a batch at once, but where PyTorch would do that by
    another kernel, on CPUs: for three queries, or up to 128 pixels (height + width). There, logits differ in rounding.

    ``rle`` gives each mask as a run-length code instead, made chunk by chunk, so that no image's masks are ever whole in
    memory: what evaluation and json files want. ``crop`` is for models with exact padding: padding is cut off before the
    logits are resized, by ``outputs["mask_sizes"]``, (height, width) of each image in ``pred_masks``, so that a mask does
    not depend on the batch.
    """

    def __init__(self, threshold: float = 0.5, *, rle: bool = False, crop: bool = False, chunk: int = 4) -> None:
        super().__init__()
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is {threshold}; a mask's threshold is a probability, at least 0 and below 1")
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; at least one mask is made at a time")
        self.threshold, self.rle, self.crop, self.chunk = threshold, rle, crop, chunk

    @torch.no_grad()
    def forward(self, results: Sequence[Detections], outputs: Outputs, orig_target_sizes: Tensor,
                max_target_sizes: Tensor) -> list[Detections]:
        """``results`` of ``PostProcess`` or ``PostProcessTopK``, ``outputs`` with ``pred_masks [B, Q, H, W]``, (height,
        width) ``[B, 2]`` of the original images, and of the images as fed, without padding. Returns the results with
        ``masks``: uint8 ``[n, 1, H, W]``, on the device of ``pred_masks``, or n codes.

        Results that have ``queries [n]`` get the masks of these queries and no others are computed: whoever wants some
        detections alone selects them first. Without, there has to be one result a query.
        """
        if "pred_masks" not in outputs:
            raise ValueError("outputs have no pred_masks; build the model with --masks")
        logits = outputs["pred_masks"]
        originals = check_sizes("orig_target_sizes", orig_target_sizes, len(logits)).tolist()
        sizes = check_sizes("max_target_sizes", max_target_sizes, len(logits)).tolist()
        if len(results) != len(logits):
            raise ValueError(f"results are of {len(results)} images, pred_masks of {len(logits)}; give both of one batch")
        if self.crop and "mask_sizes" not in outputs:
            raise ValueError("outputs have no mask_sizes, which crop=True needs; use a model with --padding exact, or "
                             "crop=False")
        largest = [max(side) for side in zip(*sizes)]
        found: list[Detections] = []
        for i, (result, maps, size, original) in enumerate(zip(results, logits, sizes, originals)):
            queries = self.queries(i, result, maps)
            covered = largest
            if self.crop:
                height, width = outputs["mask_sizes"][i]
                maps, covered = maps[:, :height, :width], size
            masks: Tensor | list[Rle]
            if self.rle:
                masks = [code for some in self.chunks(maps, queries, covered, size, original) for code in encode(some)]
            else:
                masks = torch.empty((len(queries), 1, *original), dtype=torch.uint8, device=maps.device)
                for place, some in zip(masks.split(self.chunk), self.chunks(maps, queries, covered, size, original)):
                    place.copy_(some)
            found.append({**result, "masks": masks})
        return found

    def queries(self, i: int, result: Detections, maps: Tensor) -> Tensor:
        """The query of each detection of image ``i``: ``[n]``."""
        if "queries" in result:
            return result["queries"].to(maps.device)    
        if len(result["scores"]) != len(maps):
            raise ValueError(f"results[{i}] has {len(result['scores'])} detections and pred_masks {len(maps)} queries; "
                             f"say in results[{i}]['queries'] which query each is of")
        return torch.arange(len(maps), device=maps.device)

    def chunks(self, maps: Tensor, queries: Tensor, covered: list[int], size: list[int],
               original: list[int]) -> Iterator[Tensor]:
        """Masks uint8 ``[c, 1, *original]`` of some ``queries`` at a time. ``maps [Q, H, W]`` cover ``covered`` pixels,
        of which ``size``, at the upper left, are the image."""
        threshold = logit_threshold(self.threshold, maps.device)
        for some in queries.split(self.chunk):
            logits = F.interpolate(maps[some][:, None].float(), covered, mode="bilinear", align_corners=False)
            inside = (logits > threshold).view(torch.uint8)[..., :size[0], :size[1]]
            yield F.interpolate(inside, original, mode="nearest")


def encode(masks: Tensor) -> list[Rle]:
    """Masks uint8 ``[n, 1, H, W]`` as run-length codes."""
    from pycocotools import mask
    if len(masks) == 0:
        return []
    columns = masks[:, 0].mT.contiguous().cpu().numpy()                         # [n, W, H]: COCO counts down the columns
    return [{**code, "counts": code["counts"].decode("ascii")} for code in mask.encode(columns.transpose(2, 1, 0))]
