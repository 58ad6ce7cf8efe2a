"""A sheet of pictures of a training set: what is on its images, and what training makes of them."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from datasets.drawn import Draw, Drawn
from datasets.examination import counted
from datasets.images import Picture, height_width
from datasets.transforms import BOXES, Preprocessing, Unscaled, resize
from detr.boxes import box_cxcywh_to_xyxy
from detr.structures import Target

SHORT, LONG = 420, 640                                      # most pixels of a picture's sides


def sheet(dataset: Any, preprocessing: Preprocessing, names: Mapping[int, str], draw: Callable[..., Image.Image],
          arrange: Callable[..., Image.Image], count: int = 8, images: Sequence[int] | None = None,
          seed: int = 0) -> Image.Image:
    """Pairs of pictures: an image as it is in ``dataset``, with what is said of it, and as training gets it.

    ``dataset`` has ``image(i)`` and ``target(i)``, before transforms, and gives ``dataset[i]`` after them, normalised as
    ``preprocessing`` says or ``Unscaled``; ``names`` gives names for labels. ``draw`` and ``arrange`` are
    ``detr.visualize.draw_detections`` and ``side_by_side``. Shown are the ``images`` with these indices, or else
    ``count`` of them spread evenly over the data set, augmented with the randomness of ``seed``; nobody else's
    randomness changes. Ignore regions are hatched.
    """
    if images is None:
        images = [len(dataset) * k // min(count, len(dataset)) for k in range(min(count, len(dataset)))]
    if not images:
        raise ValueError(f"no picture for a sheet: count {count} of {len(dataset)} images; at least one is needed")
    seeds = torch.randint(2**32, (len(images),), generator=torch.Generator().manual_seed(seed)).tolist()
    rows, captions = [], []
    for i, drawn in zip(images, seeds):
        image, target = dataset.image(i), dataset.target(i)
        augmented = as_seen(*Drawn(dataset)[Draw(i, drawn)], preprocessing)
        rows.append((picture(image, target, names, draw), picture(*augmented, names, draw)))
        id = f"image id {int(target['image_id'])}" if "image_id" in target else f"image {i}"
        objects, regions = len(target.get("labels", ())), len(target.get("ignore", ()))
        captions.append(f"{id}: {counted(objects, 'object')}" + f", {counted(regions, 'ignore region')}" * (regions > 0))
    return arrange(rows, ("as in the data", "as in training"), captions)


def as_seen(image: Tensor | Unscaled, target: Target, preprocessing: Preprocessing) -> tuple[Tensor, Target]:
    """The inverse of the last transforms: float ``[C, H, W]`` -> uint8, boxes in fractions -> corners in pixels. An image
    that is still to be normalised, in its batch, has its 8 bits."""
    (height, width), target = image.shape[-2:], target.copy()
    for name in BOXES:
        if name in target:
            target[name] = box_cxcywh_to_xyxy(target[name]) * torch.tensor([width, height, width, height])
    if isinstance(image, Unscaled):
        return image.planes, target
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return ((image * std + mean) * 255).round().clamp(0, 255).byte(), target


def picture(image: Picture, target: Target, names: Mapping[int, str], draw: Callable[..., Image.Image]) -> Image.Image:
    """An image with all that its target says, at a size for people; boxes are corners in pixels."""
    height, width = height_width(image)
    scale = min(SHORT / min(height, width), LONG / max(height, width))
    image, target = resize(image, target, (max(1, round(height * scale)), max(1, round(width * scale))))
    if len(target.get("ignore", ())):
        image = hatched(image, target["ignore"])
    return draw(image, target.get("boxes", torch.zeros(0, 4)), target.get("labels", torch.zeros(0, dtype=torch.int64)),
                names, masks=target.get("masks"))


def hatched(image: Picture, regions_xyxy: Tensor) -> Tensor:
    """uint8 ``[C, H, W]`` with black and white diagonals on the regions ``[M, 4]``, corners in pixels, and outlines."""
    pixels = image.clone() if isinstance(image, Tensor) else F.pil_to_tensor(image)
    height, width = pixels.shape[-2:]
    line = max(1, round(min(height, width) / 200))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    stripe = (x + y) // line % 10                                       # of ten, one is black and one white
    for left, top, right, bottom in regions_xyxy.tolist():
        inside = (x >= left - 0.5) & (x < right - 0.5) & (y >= top - 0.5) & (y < bottom - 0.5)
        core = (x >= left + line) & (x < right - line) & (y >= top + line) & (y < bottom - line)
        pixels[:, inside & (~core | (stripe == 0))] = 255
        pixels[:, inside & core & (stripe == 1)] = 0
    return pixels
