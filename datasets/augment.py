"""Augmentation that takes several images (the others are steps of ``datasets.transforms``), and classes by name."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datasets.images import Picture, height_width
from datasets.transforms import BOXES, crop, describe, resize
from detr.structures import Category, Target

OF_OBJECTS = ("boxes", "labels", "area", "iscrowd", "masks")            # fields with a row for each object
LEAST, GREATEST = 0.3, 0.7                                              # where the four images of a mosaic meet


class Mosaic(Dataset):
    """``dataset`` with mosaics (Bochkovskiy et al., 2020, figure 3): with ``probability`` an image shares its place with
    three others, drawn at random; ``transforms`` follow.

    ``dataset`` gives images before transforms: its own are None. A mosaic has the size, ``image_id`` and ``orig_size`` of
    the image it stands for. The four meet at a point between ``LEAST`` and ``GREATEST`` of its width and height; of each,
    as much as has the proportions of its quarter is cropped at a random place (``crop`` says what becomes of objects at
    the edges) and resized to it. So no size depends on what is drawn here, as ``Drawn`` and ``TrainingBatches`` need.

    All follows from torch's global generator, which is left as it was: ``transforms`` draw what they would draw without
    this class. Attributes that are not here are those of ``dataset``.
    """

    def __init__(self, dataset: Any, transforms: Callable[[Any, Target], tuple[Any, Target]] | None,
                 probability: float = 1.0) -> None:
        if not 0 < probability <= 1:
            raise ValueError(f"--mosaic {probability}: a probability above 0 and at most 1 is needed")
        if getattr(dataset, "transforms", None) is not None:
            raise ValueError("the data set of a Mosaic has transforms of its own, which would come before four images "
                             "are put together; build it with transforms=None and give them to the Mosaic")
        self.dataset, self.transforms, self.probability = dataset, transforms, probability

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in self.__dict__:                     # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, i: int) -> tuple[Any, Target]:
        chance = apart(i)
        image, target = self.dataset[i]
        if torch.rand((), generator=chance) < self.probability:
            image, target = mosaic([(image, target), *(self.dataset[k] for k in self.others(i, chance))], chance)
        return self.transforms(image, target) if self.transforms else (image, target)

    def others(self, i: int, chance: torch.Generator) -> list[int]:
        """Three images at random, none twice and none ``i``; of less than four images any three."""
        if len(self) < 4:
            return torch.randint(len(self), (3,), generator=chance).tolist()
        return ((torch.randperm(len(self) - 1, generator=chance)[:3] + i + 1) % len(self)).tolist()

    def describe(self, names: Mapping[int, str] = MappingProxyType({})) -> list[str]:
        """What is done to an image, a line a step, as ``datasets.transforms.describe``."""
        return [f"mosaic of an image and three others, for {self.probability:.0%} of the images; objects are cut at the "
                f"edges", *describe(self.transforms, names)]


def apart(i: int) -> torch.Generator:
    """A generator for image ``i`` whose numbers follow from the global generator's state, without moving it."""
    here = torch.Generator()
    here.set_state(torch.get_rng_state())
    chance = torch.Generator()
    chance.manual_seed((int(torch.randint(2**32, (), generator=here)) + i) % 2**32)
    return chance


def mosaic(items: Sequence[tuple[Picture, Target]], chance: torch.Generator) -> tuple[Picture, Target]:
    """Four images and targets (corners in pixels) -> one of the first one's size: upper left, upper right, lower left,
    lower right, in random order. All must have the same channels. See ``Mosaic``."""
    first, target = items[0][0], items[0][1].copy()
    height, width = height_width(first)

    def drawn(low: float, high: float) -> int:
        """A whole number from ``low`` to ``high``, rounded."""
        return round(low + (high - low) * float(torch.rand((), generator=chance)))

    y, x = (min(max(1, drawn(LEAST * side, GREATEST * side)), max(1, side - 1)) for side in (height, width))
    quarters = [(0, 0, y, x), (0, x, y, width - x), (y, 0, height - y, x), (y, x, height - y, width - x)]
    canvas = torch.zeros_like(first) if isinstance(first, Tensor) else Image.new(first.mode, first.size)
    parts: list[Target] = []
    for place, (image, part) in zip(torch.randperm(4, generator=chance).tolist(), items):
        top, left, h, w = quarters[place]
        if not h or not w:                                              # one pixel wide or high: there are no four parts
            continue
        if kind(image) != kind(first):
            raise ValueError(f"--mosaic puts images together, and one has {kind(image)}, another {kind(first)}: convert "
                             f"them to the same channels, or leave --mosaic out")
        whole = height_width(image)
        scale = max(h / whole[0], w / whole[1])
        size = [min(side, max(1, round(part_of / scale))) for side, part_of in zip(whole, (h, w))]
        corner = [drawn(0, side - part_of) for side, part_of in zip(whole, size)]
        image, part = resize(*crop(image, part, (corner[0], corner[1], size[0], size[1])), (h, w))
        if isinstance(canvas, Tensor):
            canvas[:, top:top + h, left:left + w] = image
        else:
            canvas.paste(image, (left, top))
        for name in BOXES:
            if name in part:
                part[name] = part[name] + torch.tensor([left, top, left, top])
        if "masks" in part:
            masks = torch.zeros(len(part["masks"]), height, width, dtype=torch.bool)
            masks[:, top:top + h, left:left + w] = part["masks"]
            part["masks"] = masks
        parts.append(part)
    for name in OF_OBJECTS:
        if name in target:
            target[name] = torch.cat([part[name] for part in parts])
    if ignore := [part["ignore"] for part in parts if "ignore" in part]:
        target["ignore"] = torch.cat(ignore)
    target["size"] = torch.tensor([height, width])
    return canvas, target


def kind(image: Picture) -> str:
    """The channels of an image, in words."""
    return f"{len(image)} channels" if isinstance(image, Tensor) else f"mode {image.mode}"


def labels_of(names: Iterable[str], categories: Sequence[Category], flag: str = "--no_flip_classes") -> tuple[int, ...]:
    """Names of classes -> their labels; ValueError for a name that is not in the class table."""
    label = {category.name: category.label for category in categories}
    for name in names:
        if name not in label:
            alike = {known.casefold(): known for known in label}
            near = get_close_matches(name.casefold(), alike, n=1, cutoff=0.0)
            hint = f" of that name; did you mean {alike[near[0]]!r}?" if near else ""
            raise ValueError(f"{flag} {name}: the data has no class{hint or 'es'}")
    return tuple(label[name] for name in names)
