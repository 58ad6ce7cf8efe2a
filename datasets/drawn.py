"""What chance will do to a training image, known before the image is read."""
from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.random import fork_rng
from torch.utils.data import Dataset
from torchvision.transforms import v2

from datasets.images import SizeOnly as SizeOnly
from datasets.images import height_width
from datasets.transforms import ToTensor
from detr.structures import Target

Size = tuple[int, int]                      # (height, width)


class Draw(NamedTuple):
    """An image, by its index in the data set, and the seed of everything that its transforms draw."""
    image: int
    seed: int                               # 0..2**32 - 1, which is all that torch's generator for CPUs takes


class Drawn(Dataset):
    """``dataset`` by ``Draw`` in place of an index: what transforms draw, from PyTorch's, NumPy's or Python's global
    generator, follows from the draw's seed alone, in whichever process they run. Nobody else's randomness changes: these
    generators are left as they were."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Any:
        with _left_alone():
            _seed(draw.seed)
            return self.dataset[draw.image]


def drawn_sizes(transforms: v2.Compose, sizes: Sequence[Size], seeds: Sequence[int]) -> list[Size]:
    """(height, width) that ``transforms`` make of images of these ``sizes``, each with the seed of its ``Draw``.

    The steps before ``ToTensor`` are run on pictures without pixels; those behind it must keep the size, as all in
    ``datasets.transforms`` do. Raises ValueError where there is no ``ToTensor``, and TypeError where a step before it
    reads pixels.
    """
    steps: list[Any] = list(takewhile(lambda step: not isinstance(step, ToTensor), transforms.transforms))
    if len(steps) == len(transforms.transforms):
        raise ValueError(f"the training transforms {transforms} have no ToTensor, up to which --bucket_train runs them "
                         f"to know the sizes of images; make them with datasets.transforms, or leave --bucket_train out")
    drawn = []
    with _left_alone():
        for (height, width), seed in zip(sizes, seeds):
            _seed(seed)
            image: Any = SizeOnly(height, width)
            target: Target = {}
            for step in steps:
                image, target = step(image, target)
            drawn.append(height_width(image))
    return drawn


@contextmanager
def _left_alone() -> Iterator[None]:
    """The global generators are afterwards as before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)           # torch.manual_seed would seed those of GPUs, too
    random.seed(seed)
    np.random.seed(seed)
