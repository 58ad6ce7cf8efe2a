"""The published augmentations (Carion et al., 2020, appendix A.4), written as two lists: ``train_transforms`` and
``eval_transforms``; stronger ones that can be chosen, and ``describe``, which says in words what a list does.

Every step takes and returns ``(image, target)``, and changes neither of those it was given. Until ``ToTensor`` the image
is what ``read_image`` gives: a PIL image, or, where it is neither RGB nor grey, uint8 ``[C, H, W]``; or a ``Deferred``
image, whose pixels are read when ``ToTensor`` asks for them. The target's
boxes are **corners in pixels** (left, top, right, bottom) until ``BoxesToFractions`` makes them what models take, and so
are the regions ``ignore [M, 4]``, in which not all objects are marked. A step changes those of ``boxes``, ``area``,
``masks``, ``labels``, ``iscrowd``, ``ignore`` that the target has, so that an image without ground truth is
``(image, {})``.

**What a crop leaves of an object counts**, be it a sliver: as published, its box is cut at the edges, and it is dropped
only where nothing of the box is left. The same holds for every step here that cuts, and for ``ignore``.

All randomness comes from torch's global generator. ``torch.manual_seed`` before the loop over a ``DataLoader`` fixes
it: each worker's generator is seeded from the main process's.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datasets.images import Deferred, Picture, height_width
from detr.boxes import box_area, box_xyxy_to_cxcywh
from detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from detr.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, Size, as_planes, normalised, resized
from detr.preprocessing import normalisation as normalisation
from detr.structures import Target

PUBLISHED = Preprocessing()
SCALES = tuple(range(480, 801, 32))         # lengths of the short side in training; 800 is the one in evaluation
CROP_RESIZES = (400, 500, 600)              # short side before a crop is taken
CROP_SIZES = (384, 600)                     # least and greatest side of a crop

BOXES = ("boxes", "ignore")                 # fields of a target that hold boxes
AUGMENTATIONS = ("published", "none")


# The operations, with their numbers given.

def hflip(image: Picture, target: Target) -> tuple[Picture, Target]:
    """Left becomes right."""
    target, width = target.copy(), height_width(image)[1]
    for name in BOXES:
        if name in target:
            x0, y0, x1, y1 = target[name].unbind(1)
            target[name] = torch.stack([width - x1, y0, width - x0, y1], dim=1)
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
    left_over = {}
    for name in BOXES:
        if name in target:
            boxes_xyxy = target[name] - torch.tensor([left, top, left, top])
            target[name] = torch.minimum(boxes_xyxy, torch.tensor([width, height, width, height])).clamp(min=0)
            left_over[name] = (target[name][:, 2:] > target[name][:, :2]).all(1)
    if "ignore" in target:
        target["ignore"] = target["ignore"][left_over["ignore"]]
    if "boxes" in target:
        target["area"] = box_area(target["boxes"])
        target = select(target, left_over["boxes"])
    return F.crop(image, top, left, height, width), target


def select(target: Target, keep: Tensor) -> Target:
    """The target with those objects alone that the bool tensor ``keep`` ``[N]`` names."""
    target = target.copy()
    for name in ("boxes", "labels", "area", "iscrowd", "masks"):
        if name in target:
            target[name] = target[name][keep]
    return target


def resize(image: Picture, target: Target, size: Size, max_size: int | None = None) -> tuple[Picture, Target]:
    """Bilinear, with antialiasing. ``size``: the short side, limited by ``max_size`` for the long one; or exactly
    (height, width). Masks: nearest pixel."""
    before = height_width(image)
    height, width = resized(*before, size, max_size)
    target = target.copy()
    target["size"] = torch.tensor([height, width])
    x, y = width / before[1], height / before[0]
    for name in BOXES:
        if name in target:
            target[name] = target[name] * torch.tensor([x, y, x, y])
    if "area" in target:
        target["area"] = target["area"] * (x * y)
    if "masks" in target:
        target["masks"] = interpolate(target["masks"][:, None].byte(), (height, width), mode="nearest")[:, 0].bool()
    return F.resize(image, [height, width], v2.InterpolationMode.BILINEAR), target


def pad(image: Picture, target: Target, padding: tuple[int, int]) -> tuple[Picture, Target]:
    """Add ``padding`` (right, bottom) pixels of black. Boxes stay where they are."""
    # as a crop that is larger than the image, which costs nothing where there are no pixels yet (SizeOnly)
    right, bottom = padding
    target = target.copy()
    height, width = height_width(image)
    target["size"] = torch.tensor([height + bottom, width + right])
    if "masks" in target:
        target["masks"] = F.pad(target["masks"], [0, 0, right, bottom])
    return F.crop(image, 0, 0, height + bottom, width + right), target


# The same with numbers drawn at random, and the way from pictures to tensors: the steps of the lists below.

def draw(low: int, high: int) -> int:
    """A whole number, ``low`` and ``high`` included."""
    return int(torch.randint(low, high + 1, ()))


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """``hflip`` with probability ``p``; images with an object of the labels ``no_flip`` stay as they are. Whether to flip
    is drawn for them too, so that what is drawn afterwards does not depend on what is on an image."""
    p: float = 0.5
    no_flip: tuple[int, ...] = ()

    def __call__(self, image: Picture, target: Target) -> tuple[Picture, Target]:
        flip = bool(torch.rand(()) < self.p)
        if flip and self.no_flip and "labels" in target:
            flip = not torch.isin(target["labels"], torch.tensor(self.no_flip)).any()
        return hflip(image, target) if flip else (image, target)

    def in_words(self, names: Mapping[int, str]) -> str:
        """What ``describe`` says of it; ``names`` are those of the labels."""
        never = f", never with {_listed([names.get(i, f'label {i}') for i in self.no_flip])}" if self.no_flip else ""
        return f"left-right flip of {self.p:.0%} of the images{never}"


@dataclass(frozen=True)
class RandomResize:
    """Resize to one of ``sizes``, each as likely."""
    sizes: tuple[Size, ...]
    max_size: int | None = None

    def __call__(self, image: Picture, target: Target) -> tuple[Picture, Target]:
        return resize(image, target, self.sizes[draw(0, len(self.sizes) - 1)], self.max_size)

    def in_words(self, names: Mapping[int, str]) -> str:
        """What ``describe`` says of it; ``names`` are those of the labels."""
        sides, exact = ([size for size in self.sizes if isinstance(size, int) is kind] for kind in (True, False))
        limit = "" if self.max_size is None else f", long side {self.max_size} at most"
        ways = ([f"short side {_listed(sides)}{limit}"] if sides else []) + [f"height {h}, width {w}" for h, w in exact]
        return f"resize, {_listed(ways)}"


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

    def in_words(self, names: Mapping[int, str]) -> str:
        """What ``describe`` says of it; ``names`` are those of the labels."""
        return f"crop to sides of {self.least} to {self.greatest} pixels, at any place; objects are cut at the edges"


@dataclass(frozen=True)
class ScaleJitter:
    """Large scale jittering (Ghiasi et al., 2021, figure 3). The frame of an image is the size that ``resized`` gives for
    ``size`` and ``max_size``: the image is resized to it times a factor drawn from ``least`` to ``greatest``; what is
    larger than the frame is cropped to it at a random place, and what is smaller is padded on the right and below, with
    black where the paper has grey."""
    size: Size
    max_size: int | None
    least: float
    greatest: float

    def __call__(self, image: Picture, target: Target) -> tuple[Picture, Target]:
        frame = resized(*height_width(image), self.size, self.max_size)
        factor = self.least + (self.greatest - self.least) * float(torch.rand(()))
        height, width = (max(1, round(side * factor)) for side in frame)
        image, target = resize(image, target, (height, width))
        top, left = draw(0, max(0, height - frame[0])), draw(0, max(0, width - frame[1]))
        image, target = crop(image, target, (top, left, min(height, frame[0]), min(width, frame[1])))
        return pad(image, target, (max(0, frame[1] - width), max(0, frame[0] - height)))

    def in_words(self, names: Mapping[int, str]) -> str:
        """What ``describe`` says of it; ``names`` are those of the labels."""
        frame = RandomResize((self.size,), self.max_size).in_words(names)
        return f"{frame}, times {self.least:g} to {self.greatest:g}; then crop or pad to the size without that factor"


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation times a factor from ``1 - strength`` to ``1 + strength``, each its own, and hue
    turned by up to ``strength / 4`` of the colour wheel, in random order (torchvision's ``v2.ColorJitter``). For tensors
    with values in 0..1, of RGB images or of grey ones, which have only brightness and contrast to change."""
    strength: float

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if len(image) not in (1, 3):
            raise ValueError(f"an image with {len(image)} channels: colours can be changed where there are 3, red, green "
                             f"and blue, or 1, grey; leave --color_jitter out")
        s = self.strength
        return v2.ColorJitter(s, s, s, s / 4)(image), target

    def in_words(self, names: Mapping[int, str]) -> str:
        """What ``describe`` says of it; ``names`` are those of the labels."""
        s = self.strength
        return f"colours: brightness, contrast and saturation by up to {s:.0%}, hue by up to {90 * s:.0f} degrees"


@dataclass(frozen=True)
class ToTensor:
    """Numbers of 8 bits -> float32 ``[C, H, W]`` in 0..1. Without ``scale`` they stay uint8, for ``Normalize``, which
    then does both in one pass. The pixels of a ``Deferred`` image are read here."""
    scale: bool = True

    def __call__(self, image: Picture, target: Target) -> tuple[Tensor, Target]:
        planes = image.planes() if isinstance(image, Deferred) else as_planes(image)
        if not self.scale:
            return planes, target
        return torch.empty(planes.shape, dtype=torch.float32).copy_(planes).div_(255), target

    def in_words(self, names: Mapping[int, str]) -> str:
        """What ``describe`` says of it; ``names`` are those of the labels."""
        return "numbers from 0 to 1"


class Unscaled(NamedTuple):
    """An image in 8 bits, and the numbers that ``into_batch`` normalises it with, where it stands in the batch."""
    planes: Tensor                          # uint8 [C, H, W]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> torch.Size:
        return self.planes.shape


def into_batch(images: Sequence[Tensor | Unscaled]) -> NestedTensor:
    """Images -> one padded batch, float32, as ``nested_tensor_from_tensor_list`` makes it. Those that are ``Unscaled``
    are normalised on the way, which saves a pass and a copy of each, and changes no bit."""
    if not all(isinstance(image, Unscaled) for image in images) or len({len(image[0]) for image in images}) != 1:
        return nested_tensor_from_tensor_list([normalised(*image) if isinstance(image, Unscaled) else image
                                               for image in images])
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    shape = (len(images), *(max(sides) for sides in zip(*sizes)))
    tensors = _empty(shape[0], images[0].shape[0], *shape[1:])
    mask = torch.ones(shape, dtype=torch.bool)
    for image, tensor, padding, (height, width) in zip(images, tensors, mask, sizes):
        normalised(*image, out=tensor[:, :height, :width])
        tensor[:, height:] = 0
        tensor[:, :height, width:] = 0
        padding[:height, :width] = False
    return NestedTensor(tensors, mask, sizes)


def _empty(*shape: int) -> Tensor:
    """float32 without values; in a worker of a ``DataLoader`` in shared memory, where it is sent from without a copy."""
    if get_worker_info() is None:
        return torch.empty(shape)
    return torch.empty(0).set_(torch.UntypedStorage._new_shared(4 * math.prod(shape))).resize_(shape)


@dataclass(frozen=True)
class Normalize:
    """``(image - mean) / std``, channel by channel, of an image with values in 0..1; or of a uint8 image, whose values
    are brought to 0..1 first. With ``in_batch`` a uint8 image becomes ``Unscaled``, for ``into_batch``."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    in_batch: bool = False

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor | Unscaled, Target]:
        if len(image) != len(self.mean):                        # one number would go for all channels
            raise ValueError(f"an image with {len(image)} channels, but mean and std for {len(self.mean)}; read images "
                             f"with the channels of --in_channels, and give mean and std that many numbers")
        if image.dtype == torch.uint8:
            if self.in_batch:
                return Unscaled(image, self.mean, self.std), target
            return normalised(image, self.mean, self.std), target
        return F.normalize(image, self.mean, self.std), target

    def in_words(self, names: Mapping[int, str]) -> str:
        """What ``describe`` says of it; ``names`` are those of the labels."""
        return f"minus the mean {_numbers(self.mean)}, by the standard deviation {_numbers(self.std)}"


@dataclass(frozen=True)
class BoxesToFractions:
    """Corners in pixels -> centre, width, height as fractions of the image."""

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        (height, width), target = image.shape[-2:], target.copy()
        for name in BOXES:
            if name in target:
                target[name] = box_xyxy_to_cxcywh(target[name]) / torch.tensor([width, height, width, height])
        return image, target

    def in_words(self, names: Mapping[int, str]) -> str:
        """What ``describe`` says of it; ``names`` are those of the labels."""
        return "boxes as fractions of the image"


# The two lists.

def eval_transforms(preprocessing: Preprocessing = PUBLISHED, in_batch: bool = False) -> v2.Compose:
    """The list for evaluation and prediction; as it stands, the published one. ``in_batch``: see ``Normalize``."""
    return v2.Compose([
        RandomResize((preprocessing.size,), preprocessing.max_size),            # of one size: always that
        ToTensor(scale=False),
        Normalize(preprocessing.mean, preprocessing.std, in_batch),
        BoxesToFractions(),
    ])


def train_transforms(preprocessing: Preprocessing = PUBLISHED, *, scales: Sequence[Size] = SCALES,
                     crop_resizes: Sequence[int] = CROP_RESIZES, crop_sizes: tuple[int, int] = CROP_SIZES,
                     flip: bool = True, crop: bool = True, no_flip: Sequence[int] = (), color_jitter: float = 0.0,
                     scale_jitter: tuple[float, float] | None = None, in_batch: bool = False) -> v2.Compose:
    """The list for training; as it stands, the published one.

    An image is resized to one of ``scales``, or, half of the time, first to one of ``crop_resizes``, cropped to sides
    within ``crop_sizes``, and then resized to one of ``scales``. ``flip`` and ``crop`` switch these steps off, and images
    with objects of the labels ``no_flip`` are never flipped. Of ``preprocessing``, ``max_size`` limits the last resize,
    and ``mean`` and ``std`` are used. ``in_batch``: see ``Normalize``.

    Not published: ``color_jitter``, the strength of ``ColorJitter`` above 0 and up to 1; and ``scale_jitter``, the range
    of the factor of ``ScaleJitter``, which takes the place of all resizes and crops (Ghiasi et al.: 0.1 to 2).
    """
    if not 0 <= color_jitter <= 1:
        raise ValueError(f"--color_jitter {color_jitter}: a strength from 0, for none, to 1 is needed")
    if color_jitter and len(preprocessing.mean) not in (1, 3):
        raise ValueError(f"--color_jitter {color_jitter} is for RGB and grey images, and these have "
                         f"{len(preprocessing.mean)} channels; leave it out")
    if scale_jitter is not None and not (len(scale_jitter) == 2 and 0 < scale_jitter[0] <= scale_jitter[1]):
        raise ValueError(f"--scale_jitter {' '.join(map(str, scale_jitter))}: the least and the greatest factor are "
                         f"needed, above 0, such as 0.1 2")
    to_scale = RandomResize(tuple(scales), preprocessing.max_size)
    crop_and_resize = v2.Compose([RandomResize(tuple(crop_resizes)), RandomSizeCrop(*crop_sizes), to_scale])
    size: Any = v2.RandomChoice([to_scale, crop_and_resize]) if crop else to_scale
    if scale_jitter is not None:
        size = ScaleJitter(preprocessing.size, preprocessing.max_size, *scale_jitter)
    return v2.Compose([
        *([RandomHorizontalFlip(no_flip=tuple(no_flip))] if flip else []),
        size,
        ToTensor(scale=bool(color_jitter)),
        *([ColorJitter(color_jitter)] if color_jitter else []),             # behind ToTensor: sizes are known without it
        Normalize(preprocessing.mean, preprocessing.std, in_batch),
        BoxesToFractions(),
    ])


def make_transforms(split: str, preprocessing: Preprocessing = PUBLISHED, *, scales: Sequence[Size] | None = None,
                    least_scale: float = 0.6, flip: bool = True, crop: bool = True, aug: str = "published",
                    no_flip: Sequence[int] = (), color_jitter: float = 0.0,
                    scale_jitter: tuple[float, float] | None = None, in_batch: bool = False) -> v2.Compose:
    """The list for ``split`` ("train" or "val") of a model that is evaluated with ``preprocessing``.

    800 pixels for the short side give the published lists. Another ``size`` scales all lengths of the training list in
    proportion: at 160, short sides of 96 to 160 and crops of 77 to 120 pixels. Where ``size`` is (height, width), every
    training image ends at exactly that size, and its crops are in proportion to the shorter of the two. ``scales``
    replaces the list of sizes that training draws from, which else begins at ``least_scale`` of the size.

    ``aug="none"`` trains on what evaluation gets: the same list. ``no_flip``, ``color_jitter`` and ``scale_jitter``: see
    ``train_transforms``. With ``in_batch`` images are normalised by ``into_batch``, see ``Normalize``.
    """
    if aug not in AUGMENTATIONS:
        raise ValueError(f"--aug {aug!r} is not one of {', '.join(AUGMENTATIONS)}")
    if split == "val":
        return eval_transforms(preprocessing, in_batch)
    if split != "train":
        raise ValueError(f"no transforms for split {split!r}; there are 'train' and 'val'")
    if aug == "none":
        for name, value in (("color_jitter", color_jitter), ("scale_jitter", scale_jitter)):
            if value:
                raise ValueError(f"--aug none and --{name}: images are changed or they are not; leave one of them out")
        return eval_transforms(preprocessing, in_batch)
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
                            crop_sizes=(least, greatest), flip=flip, crop=crop, no_flip=no_flip,
                            color_jitter=color_jitter, scale_jitter=scale_jitter, in_batch=in_batch)


# In words.

def describe(transforms: Any, names: Mapping[int, str] = MappingProxyType({})) -> list[str]:
    """What ``transforms``, or those of a data set, do to an image, a line a step; steps that are none of this file's as
    they call themselves. ``names`` of labels."""
    if transforms is None:
        return []
    if hasattr(transforms, "describe"):                                         # a data set that does more
        return transforms.describe(names)
    if isinstance(transforms, Dataset):
        return describe(getattr(transforms, "transforms", None), names)
    if isinstance(transforms, v2.Compose):
        return [line for step in transforms.transforms for line in describe(step, names)]
    if isinstance(transforms, v2.RandomChoice):
        ways = [f"{chance:.0%} {', then '.join(describe(step, names))}"
                for chance, step in zip(transforms.p, transforms.transforms)]
        return ["; or ".join(ways)]
    return [transforms.in_words(names) if hasattr(transforms, "in_words") else str(transforms)]


def _listed(values: Sequence[Any]) -> str:
    """ "1", "1 or 2", "1, 2 or 3"; long lists of numbers by their ends."""
    if len(values) > 5:
        return f"{values[0]} to {values[-1]} ({len(values)} of them)"
    words = [str(value) for value in values]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)
