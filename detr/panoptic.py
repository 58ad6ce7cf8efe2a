"""Predictions -> panoptic maps and their segments (Carion et al., 2020, section 4.4; Kirillov et al., 2019)."""
from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .padding import Size
from .structures import Outputs
from .transfer import on_device

SMALLEST = 5                    # pixels of the smallest segment that stays
CHUNK = 4                       # masks at full size at a time


class Segment(TypedDict):
    """One segment of a panoptic map."""
    id: int                     # in the map
    isthing: bool
    category_id: int            # the model's label
    area: int                   # pixels of the map


class PanopticPrediction(TypedDict):
    """One image as COCO's panoptic format has it."""
    png_string: bytes           # a PNG whose colours are ids: R + 256 G + 256^2 B
    segments_info: list[Segment]


class PostProcessPanoptic(nn.Module):
    """Panoptic maps: every pixel goes to the query whose mask is most probable there, among those that name a class with
    a score above ``threshold``; segments of 4 pixels or less are dropped and their pixels given to others.

    ``is_thing_map`` says of each label whether it is a thing. As published:

    - Queries of one stuff class first share one segment, that of the first of them; the others are thereby empty and
      dropped, and all pixels are given anew to the queries left, so that what the others covered may go elsewhere.
    - Ids count from 0, in the order of the queries. A map without segments is 0 everywhere.
    - Padding is not cut off: a mask, padding included, is resized to the image. ``crop`` cuts it off first, by
      ``outputs["mask_sizes"]``, (height, width) of each image in ``pred_masks``: for models with exact padding, whose
      maps then do not depend on the batch.

    ``sigmoid`` is for models that score each class by itself and have no "no object" (Deformable DETR): a query's score
    is its largest sigmoid. Such scores are lower, and want a lower ``threshold``. There, a pixel that no mask claims (all
    logits are below 0) is void, which the published way does not know; ids count from 1, and 0 is void.

    Pixels are given by logits, which order queries as their softmax does, and at most four masks are at full size at a
    time, on the device of the logits. Where float32 rounds two probabilities to one, the published code takes the first.
    """

    def __init__(self, is_thing_map: Mapping[int, bool], threshold: float = 0.85, *, sigmoid: bool = False,
                 crop: bool = False) -> None:
        super().__init__()
        self.is_thing_map, self.threshold, self.sigmoid, self.crop = is_thing_map, threshold, sigmoid, crop

    @torch.no_grad()
    def forward(self, outputs: Outputs, processed_sizes: Tensor | Sequence[Tensor | Size],
                target_sizes: Tensor | Sequence[Tensor | Size] | None = None) -> list[PanopticPrediction]:
        """``outputs`` with ``pred_logits [B, Q, C(+1)]`` and ``pred_masks [B, Q, H, W]``; for each image its (height,
        width) as fed, without padding, and that of the map, which is the first by default."""
        if "pred_masks" not in outputs:
            raise ValueError("outputs have no pred_masks; build the model with --masks")
        if self.crop and "mask_sizes" not in outputs:
            raise ValueError("outputs have no mask_sizes, which crop=True needs; use a model with --padding exact, or "
                             "crop=False")
        logits, masks = outputs["pred_logits"].float(), outputs["pred_masks"]
        sizes = pairs("processed_sizes", processed_sizes, len(masks))
        target = sizes if target_sizes is None else pairs("target_sizes", target_sizes, len(masks))
        scores, labels = (logits.sigmoid() if self.sigmoid else logits.softmax(-1)).max(-1)             # [B, Q]
        keep = scores > self.threshold
        if not self.sigmoid:
            keep &= labels != logits.shape[-1] - 1
        found = []
        for i, (size, to) in enumerate(zip(sizes, target)):
            maps = masks[i, keep[i]].float()
            if self.crop:
                height, width = outputs["mask_sizes"][i]
                maps = maps[:, :height, :width]
            found.append(self.panoptic(maps, labels[i, keep[i]].tolist(), size, to))
        return found

    def panoptic(self, maps: Tensor, labels: list[int], size: Size, target: Size) -> PanopticPrediction:
        """One image: ``maps [n, H, W]`` of queries that are kept, and the label of each; pixels are given at ``size`` and
        the map resized to ``target`` (nearest)."""
        rows, columns = (on_device(nearest(a, b), maps.device) for a, b in zip(size, target))
        while True:
            things = [self.is_thing(label) for label in labels]
            owner = [i if thing else labels.index(label) for i, (label, thing) in enumerate(zip(labels, things))]
            ids = most_probable(maps, size, 0.0 if self.sigmoid else -math.inf)[rows][:, columns]       # [*target]
            ids = on_device([*owner, -1], maps.device)[ids] if owner else ids     # -1, void, is the last entry
            areas = ids[ids >= 0].bincount(minlength=len(labels)).tolist() if owner else []
            stay = [i for i, area in enumerate(areas) if area >= SMALLEST]
            if len(stay) == len(labels):
                break
            maps, labels = maps[stay], [labels[i] for i in stay]
        first = int(self.sigmoid)
        segments: list[Segment] = [{"id": i, "isthing": thing, "category_id": label, "area": area}
                                   for i, (label, thing, area) in enumerate(zip(labels, things, areas), first)]
        return {"png_string": to_png((ids + first).cpu().numpy()), "segments_info": segments}

    def is_thing(self, label: int) -> bool:
        if label not in self.is_thing_map:
            raise ValueError(f"label {label} was predicted and is not among the {len(self.is_thing_map)} labels of "
                             f"is_thing_map; give it an entry for each class of the model")
        return bool(self.is_thing_map[label])


def pairs(name: str, sizes: Tensor | Sequence[Tensor | Size], images: int) -> list[Size]:
    """``sizes`` in numbers; ValueError unless there is a (height, width) for each image."""
    found = [tuple(size.tolist() if isinstance(size, Tensor) else size) for size in sizes]
    if len(found) != images or any(len(size) != 2 for size in found):
        raise ValueError(f"{name} has the entries {found}; it needs one (height, width) for each of the {images} images")
    return [(int(height), int(width)) for height, width in found]


def most_probable(maps: Tensor, size: Size, least: float = -math.inf) -> Tensor:
    """For each pixel the map with the largest logit, the first of equals: ``maps [n, H, W]``, resized to ``size``
    (bilinear) -> int64 ``[*size]``; -1 where none is above ``least``, or 0 where any logit would do."""
    ids = torch.full(size, 0 if least == -math.inf else -1, dtype=torch.int64, device=maps.device)
    best = torch.full(size, least, device=maps.device)
    for start in range(0, len(maps), CHUNK):
        some = F.interpolate(maps[start:start + CHUNK, None], size, mode="bilinear", align_corners=False)
        for i, logits in enumerate(some[:, 0], start):
            ids.masked_fill_(logits > best, i)
            torch.maximum(best, logits, out=best)
    return ids


@functools.lru_cache(maxsize=1024)
def nearest(length: int, to: int) -> Tensor:
    """Which of ``length`` pixels each of ``to`` pixels shows when Pillow resizes by nearest neighbour, as published; it
    takes a pixel's centre, PyTorch its corner."""
    line = Image.fromarray(np.arange(length, dtype=np.int32)[None])
    return torch.from_numpy(np.asarray(line.resize((to, 1), Image.Resampling.NEAREST))[0].astype(np.int64))


def to_png(ids: np.ndarray) -> bytes:
    """Ids ``[H, W]`` as COCO's colours, R + 256 G + 256^2 B, in a PNG."""
    colours = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).save(file, format="PNG")
    return file.getvalue()
