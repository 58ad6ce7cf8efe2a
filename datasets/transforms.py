"""The published augmentations (Carion et al., 2020, appendix A.4), written as two lists: ``train_transforms`` and
``eval_transforms``.

Every step takes and returns ``(image, target)``, and changes neither of those it was given. Until ``ToTensor`` the image
is what ``read_image`` gives: a PIL image, or, where it is neither RGB nor grey, uint8 ``[C, H, W]``. The target's
boxes are **corners in pixels** (left, top, right, bottom) until ``BoxesToFractions`` makes them what models take. A step
changes those of ``boxes``, ``area``, ``masks``, ``labels``, ``iscrowd`` that the target has, so that an image without
ground truth is ``(image, {})``.

All randomness comes from torch's global generator. ``torch.manual_seed`` before the loop over a ``DataLoader`` fixes
it: each worker's generator is seeded from the main process's.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datasets.images import Picture, height_width
from detr.boxes import box_area, box_xyxy_to_cxcywh
from detr.structures import Target

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SCALES = tuple(range(480, 801, 32))         # lengths of the short side in training; 800 is the one in evaluation
CROP_RESIZES = (400, 500, 600)              # short side before a crop is taken
CROP_SIZES = (384, 600)                     # least and greatest side of a crop

Size = int | tuple[int, int]                # short side, its proportions kept; or exactly (height, width)


# The operations, with their numbers given.

def hflip(image: Picture, target: Target) -> tuple[Picture, Target]:
    """Left becomes right."""
    target = target.copy()
    if "boxes" in target:
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        width = height_width(image)[1]
        target["boxes"] = torch.stack([width - x1, y0, width - x0, y1], dim=1)
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return F.horizontal_flip(image), target


def crop(image: Picture, target: Target, region: tuple[int, int, int, int]) -> tuple[Picture, Target]:
    """Cut out ``region`` (top, left, height, width). Boxes are cut at its edges and objects that leave nothing in it
    dropped; as published, ``area`` becomes the area of the cut box, even where a mask was smaller."""
    top, left, height, width = region
    target = target.copy()
    target["size"] = torch.tensor([height, width])
    if "masks" in target:
        target["masks"] = target["masks"][:, top:top + height, left:left + width]
    if "boxes" in target:
        boxes_xyxy = target["boxes"] - torch.tensor([left, top, left, top])
        boxes_xyxy = torch.minimum(boxes_xyxy, torch.tensor([width, height, width, height])).clamp(min=0)
        target["boxes"] = boxes_xyxy
        target["area"] = box_area(boxes_xyxy)
        target = select(target, (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(1))
    return F.crop(image, top, left, height, width), target


def select(target: Target, keep: Tensor) -> Target:
    """The target with those objects alone that the bool tensor ``keep`` ``[N]`` names."""
    target = target.copy()
    for name in ("boxes", "labels", "area", "iscrowd", "masks"):
        if name in target:
            target[name] = target[name][keep]
    return target


def resized(height: int, width: int, size: Size, max_size: int | None = None) -> tuple[int, int]:
    """(height, width) of an image after ``resize``. The short side gets ``size`` pixels, or less where the long side
    would exceed ``max_size``; as published, that length is rounded and the long side's floored. An image so long that
    nothing would be left of its short side keeps one pixel of it, and its long side gets ``max_size``."""
    if not isinstance(size, int):
        return size
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
        if size < 1:
            return (max_size, 1) if width < height else (1, max_size)
    return (int(size * height / width), size) if width < height else (size, int(size * width / height))


def resize(image: Picture, target: Target, size: Size, max_size: int | None = None) -> tuple[Picture, Target]:
    """Bilinear, with antialiasing. ``size``: the short side, limited by ``max_size`` for the long one; or exactly
    (height, width). Masks: nearest pixel."""
    before = height_width(image)
    height, width = resized(*before, size, max_size)
    target = target.copy()
    target["size"] = torch.tensor([height, width])
    x, y = width / before[1], height / before[0]
    if "boxes" in target:
        target["boxes"] = target["boxes"] * torch.tensor([x, y, x, y])
    if "area" in target:
        target["area"] = target["area"] * (x * y)
    if "masks" in target:
        target["masks"] = interpolate(target["masks"][:, None].byte(), (height, width), mode="nearest")[:, 0].bool()
    return F.resize(image, [height, width], v2.InterpolationMode.BILINEAR), target


def pad(image: Picture, target: Target, padding: tuple[int, int]) -> tuple[Picture, Target]:
    """Add ``padding`` (right, bottom) pixels of black. Boxes stay where they are."""
    right, bottom = padding
    target = target.copy()
    height, width = height_width(image)
    target["size"] = torch.tensor([height + bottom, width + right])
    if "masks" in target:
        target["masks"] = F.pad(target["masks"], [0, 0, right, bottom])
    return F.pad(image, [0, 0, right, bottom]), target


# The same with numbers drawn at random, and the way from pictures to tensors: the steps of the lists below.

def draw(low: int, high: int) -> int:
    """A whole number, ``low`` and ``high`` included."""
    return int(torch.randint(low, high + 1, ()))


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """``hflip`` with probability ``p``."""
    p: float = 0.5

    def __call__(self, image: Picture, target: Target) -> tuple[Picture, Target]:
        return hflip(image, target) if torch.rand(()) < self.p else (image, target)


@dataclass(frozen=True)
class RandomResize:
    """Resize to one of ``sizes``, each as likely."""
    sizes: tuple[Size, ...]
    max_size: int | None = None

    def __call__(self, image: Picture, target: Target) -> tuple[Picture, Target]:
        return resize(image, target, self.sizes[draw(0, len(self.sizes) - 1)], self.max_size)


@dataclass(frozen=True)
class RandomSizeCrop:
    """Crop to a random place, its width and its height each drawn from ``least`` to ``greatest``, within the image."""
    least: int
    greatest: int

    def __call__(self, image: Picture, target: Target) -> tuple[Picture, Target]:
        whole = height_width(image)
        width, height = (draw(min(self.least, side), min(self.greatest, side)) for side in reversed(whole))
        top, left = draw(0, whole[0] - height), draw(0, whole[1] - width)
        return crop(image, target, (top, left, height, width))


@dataclass(frozen=True)
class ToTensor:
    """Numbers of 8 bits -> float32 ``[C, H, W]`` in 0..1."""

    def __call__(self, image: Picture, target: Target) -> tuple[Tensor, Target]:
        planes = image if isinstance(image, Tensor) else F.pil_to_tensor(image)
        return planes.contiguous().float().div_(255), target    # PIL's order is pixel by pixel, slower in what follows


@dataclass(frozen=True)
class Normalize:
    """``(image - mean) / std``, channel by channel."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if len(image) != len(self.mean):                        # one number would go for all channels
            raise ValueError(f"an image with {len(image)} channels, but mean and std for {len(self.mean)}; read images "
                             f"with the channels of --in_channels, and give mean and std that many numbers")
        return F.normalize(image, self.mean, self.std), target


@dataclass(frozen=True)
class BoxesToFractions:
    """Corners in pixels -> centre, width, height as fractions of the image."""

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if "boxes" not in target:
            return image, target
        height, width = image.shape[-2:]
        boxes = box_xyxy_to_cxcywh(target["boxes"]) / torch.tensor([width, height, width, height])
        return image, {**target, "boxes": boxes}


# The two lists.

def normalisation(mean: Sequence[float], std: Sequence[float],
                  channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB -> those for images with ``channels`` channels.

    One channel has the average of the three; other numbers take turns: R, G, B, R, ... Numbers that are already one a
    channel stay.
    """
    def spread(values: Sequence[float]) -> tuple[float, ...]:
        if len(values) == channels:
            return tuple(values)
        return (sum(values) / 3,) if channels == 1 else tuple(values[c % 3] for c in range(channels))

    if len(mean) != len(std) or len(mean) not in (3, channels):
        raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} for --in_channels {channels}: three numbers each are "
                         f"needed, for red, green and blue, or {channels} each")
    return spread(mean), spread(std)


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the model's input when nothing is left to chance: what a checkpoint must remember.

    ``size`` is the short side in pixels, with ``max_size`` the limit of the long one (None: no limit), or exactly
    (height, width). ``mean`` and ``std`` have a number for each channel, in 0..1; see ``normalisation``.
    """
    size: Size = 800
    max_size: int | None = 1333
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        sides = (self.size, self.size) if isinstance(self.size, int) else self.size
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"preprocessing size {self.size!r}: the short side in pixels or (height, width) is needed")
        if self.max_size is not None and self.max_size < 1:
            raise ValueError(f"preprocessing max_size {self.max_size!r}: pixels, at least 1, or None are needed")
        if not len(self.mean) == len(self.std) >= 1 or min(self.std) <= 0:
            raise ValueError(f"preprocessing mean {self.mean!r}, std {self.std!r}: a number for each channel of the "
                             f"images is needed in both, three for RGB, and std above 0")

    def as_dict(self) -> dict[str, Any]:
        """Numbers, tuples and None, under the names of the fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of ``as_dict``; lists do for tuples. All fields must be there and no others."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"preprocessing needs exactly {sorted(names)}, but has {sorted(values)}")
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**plain)


def eval_transforms(preprocessing: Preprocessing = Preprocessing()) -> v2.Compose:
    """The list for evaluation and prediction; as it stands, the published one."""
    return v2.Compose([
        RandomResize((preprocessing.size,), preprocessing.max_size),            # of one size: always that
        ToTensor(),
        Normalize(preprocessing.mean, preprocessing.std),
        BoxesToFractions(),
    ])


def train_transforms(preprocessing: Preprocessing = Preprocessing(), *, scales: Sequence[Size] = SCALES,
                     crop_resizes: Sequence[int] = CROP_RESIZES, crop_sizes: tuple[int, int] = CROP_SIZES,
                     flip: bool = True, crop: bool = True) -> v2.Compose:
    """The list for training; as it stands, the published one.

    An image is resized to one of ``scales``, or, half of the time, first to one of ``crop_resizes``, cropped to sides
    within ``crop_sizes``, and then resized to one of ``scales``. ``flip`` and ``crop`` switch these steps off. Of
    ``preprocessing``, ``max_size`` limits the last resize, and ``mean`` and ``std`` are used.
    """
    to_scale = RandomResize(tuple(scales), preprocessing.max_size)
    crop_and_resize = v2.Compose([RandomResize(tuple(crop_resizes)), RandomSizeCrop(*crop_sizes), to_scale])
    return v2.Compose([
        *([RandomHorizontalFlip()] if flip else []),
        v2.RandomChoice([to_scale, crop_and_resize]) if crop else to_scale,
        ToTensor(),
        Normalize(preprocessing.mean, preprocessing.std),
        BoxesToFractions(),
    ])


def make_transforms(split: str, preprocessing: Preprocessing = Preprocessing(), *, scales: Sequence[Size] | None = None,
                    least_scale: float = 0.6, flip: bool = True, crop: bool = True) -> v2.Compose:
    """The list for ``split`` ("train" or "val") of a model that is evaluated with ``preprocessing``.

    800 pixels for the short side give the published lists. Another ``size`` scales all lengths of the training list in
    proportion: at 160, short sides of 96 to 160 and crops of 77 to 120 pixels. Where ``size`` is (height, width), every
    training image ends at exactly that size, and its crops are in proportion to the shorter of the two. ``scales``
    replaces the list of sizes that training draws from, which else begins at ``least_scale`` of the size.
    """
    if split == "val":
        return eval_transforms(preprocessing)
    if split != "train":
        raise ValueError(f"no transforms for split {split!r}; there are 'train' and 'val'")
    size = preprocessing.size
    ratio = (size if isinstance(size, int) else min(size)) / 800

    def in_proportion(lengths: Sequence[int]) -> tuple[int, ...]:
        return tuple(max(1, round(length * ratio)) for length in lengths)

    if not 0 < least_scale <= 1:
        raise ValueError(f"--least_scale {least_scale}: a part of --image_size is needed, above 0 and at most 1")
    if scales is None:
        lengths = [length for length in range(SCALES[-1], 0, SCALES[0] - SCALES[1]) if length >= 800 * least_scale]
        scales = in_proportion(lengths[::-1]) if isinstance(size, int) else (size,)
    least, greatest = in_proportion(CROP_SIZES)
    return train_transforms(preprocessing, scales=scales, crop_resizes=in_proportion(CROP_RESIZES),
                            crop_sizes=(least, greatest), flip=flip, crop=crop)
