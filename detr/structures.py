"""What travels between data, model, losses and evaluation.

Shape letters, everywhere in this project: ``B`` images, ``Q`` queries, ``S`` tokens of a feature map, ``L`` levels,
``D`` channels, ``C`` classes, ``N`` objects of an image, ``M`` attention heads, ``P`` points, ``K`` layers.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

Rle = dict[str, Any]
"""A mask as COCO's run-length code: ``{"size": [height, width], "counts": text}``, ready for json and pycocotools."""


class Target(TypedDict, total=False):
    """The ground truth of one image."""
    boxes: Tensor           # [N, 4] float32, cxcywh as fractions of the image
    labels: Tensor          # [N] int64 in 0..C-1
    masks: Tensor           # [N, H, W] bool, where asked for
    image_id: Tensor        # [1] int64
    area: Tensor            # [N] float32, pixels of the image as fed
    iscrowd: Tensor         # [N] int64
    ignore: Tensor          # [M, 4] crowds and regions to ignore, as boxes, where asked for
    classes: Tensor         # [N] int64, the labels, where ``labels`` are all 0: of class-agnostic proposals
    orig_size: Tensor       # [2] int64 (height, width) of the file
    size: Tensor            # [2] int64 (height, width) as fed, before padding


Match = list[tuple[Tensor, Tensor]]
"""For each image, the matched queries (ascending) and their objects: two int64 tensors of one length, on the CPU."""


class Divisors(NamedTuple):
    """What the losses of a batch are divided by. All but the first are there where softmax class losses are not divided
    by the weights of their own batch: means over the batches of all processes in an optimizer step."""
    boxes: Tensor                   # [] objects, at least 1
    images: Tensor | None = None    # []
    objects: Tensor | None = None   # []
    weight: Tensor | None = None    # [] the class weights of the objects, summed

    def of_copies(self, copies: int) -> Divisors:
        """The same where every object is to be found so many times."""
        if copies == 1:
            return self
        return Divisors(self.boxes * copies, self.images, None if self.objects is None else self.objects * copies,
                        None if self.weight is None else self.weight * copies)


class Outputs(TypedDict, total=False):
    """What a detector returns."""
    pred_logits: Tensor             # [B, Q, C] (sigmoid) or [B, Q, C + 1] (softmax; "no object" last)
    pred_boxes: Tensor              # [B, Q, 4] cxcywh as fractions of the image
    pred_masks: Tensor              # [B, Q, H, W] logits, mask models; or [sum N, H, W], of the matched queries of
    match: Match                    # what the model matched itself, or knows, in training
    copies: int                     # queries of each object in it, where that is not one
    mask_sizes: list[tuple[int, int]]   # (height, width) of each image in them, where padding is exact
    aux_outputs: list[Outputs]      # the same of the earlier decoder layers
    enc_outputs: Outputs            # the proposals of two-stage models, one a token
    interm_outputs: Outputs         # those that became queries, where only these are trained
    dn_outputs: Outputs             # of denoising queries, in training, with their ``match`` and ``copies``
    invalid_queries: Tensor         # [B, Q] bool, two-stage models: True where a query had no proposal to start from


def in_float32(outputs: Outputs) -> Outputs:
    """Logits, boxes and masks of one layer, in float32."""
    full: Outputs = {"pred_logits": outputs["pred_logits"].float(), "pred_boxes": outputs["pred_boxes"].float()}
    if "pred_masks" in outputs:
        full["pred_masks"] = outputs["pred_masks"].float()
    if "match" in outputs:
        full["match"] = outputs["match"]
    if "copies" in outputs:
        full["copies"] = outputs["copies"]
    return full


class Detections(TypedDict, total=False):
    """Post-processed predictions of one image."""
    scores: Tensor          # [n] in 0..1
    labels: Tensor          # [n] int64 in 0..C-1
    boxes: Tensor           # [n, 4] xyxy in pixels of the original image
    queries: Tensor         # [n] int64, the query each came from; without it there is one detection a query, in order
    masks: Tensor | list[Rle]   # uint8 [n, 1, H, W] at the original's size, or n codes of such masks


def selected(found: Detections, keep: Sequence[int]) -> Detections:
    """The detections at such places."""
    index = torch.tensor(list(keep), dtype=torch.int64, device=found["scores"].device)
    some: dict[str, Any] = {name: value[index] if isinstance(value, Tensor) else [value[i] for i in keep]
                            for name, value in found.items()}
    return some                                                                         # type: ignore[return-value]


class FeatureLevels(NamedTuple):
    """Feature maps of several resolutions as one sequence of tokens, level after level, each row by row."""
    tokens: Tensor                      # [B, S, D]
    mask: Tensor                        # [B, S] bool, True on padding
    position: Tensor                    # [B, S, D] where a token is, and in which level
    shapes: list[tuple[int, int]]       # height and width of each level
    sizes: Tensor                       # [L, 2] width and height of each level
    valid_sizes: Tensor                 # [B, L, 2] width and height of what is not padding, at least 1
    exact: bool = False                 # whether an image is to get the same in any batch
    padded: bool = True                 # False where nothing is known to be padding

    @property
    def valid_ratios(self) -> Tensor:
        """The part of each level that is not padding, of its width and of its height: ``[B, L, 2]``."""
        return self.valid_sizes / self.sizes


class Category(NamedTuple):
    """One row of a class table: the model's label, the data's own id, the name, and whether it is a thing, which can be
    counted, or stuff (panoptic data). A label that the data does not use has no row."""
    label: int
    id: int
    name: str
    isthing: bool = True


class NonFiniteError(ArithmeticError):
    """A value that should be a number is NaN or infinite; the message says which."""
