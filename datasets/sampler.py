"""Which images a process sees, in which order, and which of them share a batch."""
from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from torchvision.transforms import v2

from datasets.drawn import Draw, Size, drawn_sizes

WINDOW = 64                                 # steps of a training among which images are exchanged
FEW = 12                                    # batches for which two ways to cut are tried


class OfEpoch:
    """A process's part of an order of ``length`` images that follows from ``seed`` and the epoch.

    With ``repeats``, a factor of at least 1 for each image (``repeat_factors``), every epoch has ``int(sum(repeats))``
    images in place of ``length``. One with the factor 2.3 comes twice or, in 30% of the epochs, three times; it is drawn
    anew in each epoch, and alike in all processes.
    """

    def __init__(self, length: int, rank: int, world_size: int, seed: int,
                 repeats: Sequence[float] | Tensor | None = None) -> None:
        _check_rank(rank, world_size)
        self.rank, self.world_size, self.seed, self.epoch = rank, world_size, seed, 0
        self.repeats = None if repeats is None else torch.as_tensor(repeats, dtype=torch.float64)
        if self.repeats is not None and (self.repeats.shape != (length,) or not (self.repeats >= 1).all()):
            raise ValueError(f"repeats {list(self.repeats.shape)} for {length} images: a factor of at least 1 is needed "
                             f"for each")
        self.images_of_epoch = length if self.repeats is None else int(self.repeats.sum())

    def order(self, generator: torch.Generator) -> Tensor:
        """The images of this epoch in random order: ``[images_of_epoch]`` int64.

        Factors are rounded by systematic sampling: laid end to end in random order on a line with marks one unit apart,
        beginning at a random place, each image comes as often as it holds marks: its factor on average.
        """
        if self.repeats is None:
            return torch.randperm(self.images_of_epoch, generator=generator)
        order = torch.randperm(len(self.repeats), generator=generator)
        start = torch.rand((), dtype=torch.float64, generator=generator)
        ends = self.repeats[order].cumsum(0)
        ends[-1] = self.repeats.sum()                                               # in any order, to the last digit
        marks = (ends + start).floor().long()
        images = order.repeat_interleave(marks.diff(prepend=marks.new_zeros(1)))    # one too many, where start is late
        return images[torch.randperm(len(images), generator=generator)[:self.images_of_epoch]]

    def set_epoch(self, epoch: int) -> None:
        """To be called before each epoch; without it every epoch has the order and the batches of epoch 0."""
        self.epoch = epoch


class TrainingSampler(OfEpoch, Sampler[int]):
    """A random order of all images, dealt out to the processes: each gets ``length // world_size`` of them.

    The order follows from ``seed`` and the epoch alone, so a resumed run continues as the unbroken one would have, and
    the batches of all processes together are those of one process with a batch that many times larger. Within an epoch
    no image comes twice; the ``length % world_size`` last ones of the order are left out, other ones in each epoch.
    ``DataLoader(drop_last=True)`` leaves out the last incomplete batch likewise, as published. With ``repeats`` images
    come several times, and ``int(sum(repeats))`` takes the place of ``length`` (``OfEpoch``).
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1, seed: int = 0,
                 repeats: Sequence[float] | Tensor | None = None) -> None:
        super().__init__(length, rank, world_size, seed, repeats)
        if length < world_size:
            raise ValueError(f"{length} training images cannot be shared by {world_size} processes; add images or "
                             f"start fewer processes")

    def __len__(self) -> int:
        return self.images_of_epoch // self.world_size

    def __iter__(self) -> Iterator[int]:
        order = self.order(_generator(self.seed, self.epoch)).tolist()
        return iter(order[self.rank:len(self) * self.world_size:self.world_size])


class TrainingBatches(OfEpoch, Sampler[list[Draw]]):
    """Random batches of ``batch_size`` images that training will bring to like sizes: a ``batch_sampler`` that leaves
    little padding, for the data set ``Drawn(dataset)``.

    ``sizes`` has the (height, width) of each image before ``transforms``, which draw flip, crop and scale of each image
    at random. Here the draws come first: each image of an epoch gets a seed of its own, the transforms are run with it
    for the size that they will give, and again, with the same seed, when the image is read. So images are augmented as
    without this class, each independently of all others; but those meet in a batch that come out alike.

    The random order of an epoch is taken in windows of about ``WINDOW`` steps. A window is cut into steps of
    ``world_size * batch_size`` images alike (see ``_alike``), and each step likewise into the batches of the processes,
    so that none waits long for another. The steps of a window come in random order. Who meets whom is new in each
    epoch, and any two images may meet whose sizes can come out alike. The images left out, fewer than a step's, are the
    last of the random order: all are as likely to be among them.

    Everything follows from ``seed`` and the epoch alone, so a resumed run continues as the unbroken one would have.
    Every process has ``len(sizes) // (world_size * batch_size)`` batches, and no image comes twice in an epoch. With
    ``repeats`` images come several times, each time with draws of its own, and ``int(sum(repeats))`` takes the place of
    ``len(sizes)`` (``OfEpoch``).
    """

    def __init__(self, sizes: Sequence[Size] | Tensor, transforms: v2.Compose, batch_size: int, rank: int = 0,
                 world_size: int = 1, seed: int = 0, repeats: Sequence[float] | Tensor | None = None) -> None:
        super().__init__(len(sizes), rank, world_size, seed, repeats)
        _check_batch_size(batch_size)
        self.sizes = _checked(sizes)
        if self.images_of_epoch < world_size * batch_size:
            raise ValueError(f"--batch_size {batch_size} on {world_size} processes needs {world_size * batch_size} "
                             f"training images, and there are {len(self.sizes)}; lower it")
        self.transforms, self.batch_size = transforms, batch_size

    def __len__(self) -> int:
        return self.images_of_epoch // (self.world_size * self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = _generator(self.seed, self.epoch)
        step = self.world_size * self.batch_size
        order = self.order(generator)[:len(self) * step]
        seeds = torch.randint(2**32, (len(order),), generator=generator)
        drawn = torch.stack([order, seeds], dim=1).view(-1, step, 2)                                # [steps, step, 2]
        for window in drawn.tensor_split(max(1, round(len(drawn) / WINDOW))):
            draws = [Draw(i, seed) for i, seed in window.flatten(0, 1).tolist()]
            sizes = np.array(drawn_sizes(self.transforms, [self.sizes[draw.image] for draw in draws],
                                         [draw.seed for draw in draws]))
            steps = _alike(sizes, np.arange(len(draws)), step)[1]
            for k in torch.randperm(len(steps), generator=generator).tolist():
                batches = _alike(sizes, steps[k], self.batch_size)[1]
                yield [draws[i] for i in batches[(self.rank + k) % self.world_size]]        # in turns: they are sorted


def repeat_factors(labels_of_images: Iterable[Sequence[int] | Tensor], threshold: float) -> Tensor:
    """How often each image is to come in an epoch, so that rare classes are seen more often: float64 ``[images]``, at
    least 1 (Gupta et al., 2019, appendix B.2).

    ``f(c)`` is the part of the images that have an object of class c; the factor of an image is the greatest
    ``sqrt(threshold / f(c))`` among its classes that is above 1. A class in ``threshold`` of the images or more changes
    nothing (LVIS: 0.001), and an image without objects comes once.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"--repeat_threshold {threshold}: the part of the images below which a class is rare is needed, "
                         f"above 0 and at most 1")
    labels = [torch.as_tensor(some, dtype=torch.int64) for some in labels_of_images]
    factors = torch.ones(len(labels), dtype=torch.float64)
    if any(map(len, labels)):
        image = torch.arange(len(labels)).repeat_interleave(torch.tensor([len(some) for some in labels]))
        image, label = torch.stack([image, torch.cat(labels)]).unique(dim=1)                # each class of an image once
        of_class = (threshold * len(labels) / label.bincount().double()).sqrt()
        factors.scatter_reduce_(0, image, of_class[label], "amax")
    return factors


class EvaluationShard(Sampler[int]):
    """This process's part of ``length`` images in their own order: no image in two parts, none in no part.

    The parts are consecutive, and their lengths differ by at most one. So processes may have different numbers of
    batches: nothing inside an evaluation loop may wait for the other processes.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        _check_rank(rank, world_size)
        self.indices = range(length * rank // world_size, length * (rank + 1) // world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class EvaluationBatches(Sampler[list[int]]):
    """This process's batches of images alike in shape: a ``batch_sampler`` that leaves little padding. Each image is in
    one batch of one process.

    ``sizes`` has the (height, width) of each image as the model will get it (``datasets.transforms.resized``). The
    images are sorted by height / width, then by height, and cut into batches of like numbers, ``batch_size`` at most;
    into a multiple of ``world_size`` of them, where there are as many images. With ``equal`` a batch has images of
    exactly one size, so that there is no padding at all, and batches may be small.

    The batches are dealt out largest first, each to the process that has the fewest pixels to compute so far, padding
    included. So processes differ by one batch's pixels at most, and each begins with its largest batch: where memory
    does not suffice, that shows at once. They may have different numbers of batches, or none: nothing inside an
    evaluation loop may wait for the other processes.
    """

    def __init__(self, sizes: Sequence[Size] | Tensor, batch_size: int, rank: int = 0, world_size: int = 1,
                 equal: bool = False) -> None:
        _check_rank(rank, world_size)
        _check_batch_size(batch_size)
        sizes = _checked(sizes)
        if equal:
            groups: dict[Size, list[int]] = defaultdict(list)
            for i, size in enumerate(sizes):
                groups[size].append(i)
            batches = [batch for size in sorted(groups)
                       for batch in _cut(groups[size], -(-len(groups[size]) // batch_size))]
        else:
            order = sorted(range(len(sizes)), key=lambda i: (sizes[i][0] / sizes[i][1], sizes[i]))
            batches = _cut(order, -(-len(order) // (batch_size * world_size)) * world_size)
        self.batches = _deal(batches, [_pixels(batch, sizes) for batch in batches], world_size)[rank]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def padded_share(batches: Iterable[Sequence[int]], sizes: Sequence[Size] | Mapping[int, Size]) -> float:
    """Padded pixels / all pixels of the tensors that hold ``batches`` of images of these ``sizes`` (height, width), each
    tensor as high and as wide as its batch needs: 0 where nothing is padded."""
    computed = images = 0
    for batch in batches:
        computed += _pixels(batch, sizes)
        images += sum(sizes[i][0] * sizes[i][1] for i in batch)
    return (computed - images) / max(computed, 1)


def _pixels(batch: Sequence[int], sizes: Sequence[Size] | Mapping[int, Size]) -> int:
    """Pixels of the tensor of a batch, padding included."""
    return len(batch) * max(sizes[i][0] for i in batch) * max(sizes[i][1] for i in batch)


def _alike(sizes: np.ndarray, images: np.ndarray, batch_size: int) -> tuple[int, list[np.ndarray]]:
    """``images``, indices into ``sizes`` [..., 2], in batches of ``batch_size`` that leave little padding; and before
    them the pixels of these, padding included.

    As a pane of glass is cut: sorted by height, width, area or ratio, the images fall into two parts, so that these would
    have the fewest pixels if each were padded to one size; then each part likewise. Between few batches, the best two of
    the four cuts are followed to the end, which takes away a few hundredths of the padding. Images of one size stay in
    the order given.
    """
    height, width = sizes[images].T
    count = len(images) // batch_size
    pixels = len(images) * int(height.max() * width.max())
    if count == 1 or pixels == (height * width).sum():
        return pixels, np.split(images, count)
    first = np.arange(1, count)                                             # batches in the first part
    cuts = []
    for key in (height, width, height * width, height / width):
        order = key.argsort(kind="stable")
        h, w = height[order], width[order]
        up_to = (np.maximum.accumulate(h) * np.maximum.accumulate(w))[batch_size - 1:-1:batch_size]
        beyond = (np.maximum.accumulate(h[::-1]) * np.maximum.accumulate(w[::-1]))[::-1][batch_size::batch_size]
        both = first * up_to + (count - first) * beyond
        best = int(both.argmin())
        cuts.append((int(both[best]), (best + 1) * batch_size, images[order]))
    cuts.sort(key=lambda cut: cut[0])
    found = []
    for _, end, order in cuts[:2 if 2 < count <= FEW else 1]:
        (before, some), (after, others) = _alike(sizes, order[:end], batch_size), _alike(sizes, order[end:], batch_size)
        found.append((before + after, some + others))
    return min(found, key=lambda it: it[0])


def _cut(order: list[int], count: int) -> list[list[int]]:
    """``order`` in ``count`` consecutive batches whose lengths differ by at most one, without the empty ones."""
    bounds = [len(order) * k // max(count, 1) for k in range(count + 1)]
    return [order[start:end] for start, end in zip(bounds, bounds[1:]) if end > start]


def _deal(batches: list[list[int]], pixels: list[int], world_size: int) -> list[list[list[int]]]:
    """The batches of each process: from the largest on, each goes to the process with the fewest pixels so far."""
    dealt: list[list[list[int]]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for k in sorted(range(len(batches)), key=lambda k: -pixels[k]):
        load, rank = loads[0]
        dealt[rank].append(batches[k])
        heapq.heapreplace(loads, (load + pixels[k], rank))
    return dealt


def _generator(seed: int, epoch: int) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed((seed * 1_000_003 + epoch) % 2**63)              # seeds do not share their epochs
    return generator


def _checked(sizes: Sequence[Size] | Tensor) -> list[Size]:
    """Sizes, in a list or a tensor ``[images, 2]``, as pairs of Python ints."""
    pairs = [(int(height), int(width)) for height, width in (sizes.tolist() if isinstance(sizes, Tensor) else sizes)]
    for i, (height, width) in enumerate(pairs):
        if min(height, width) < 1:
            raise ValueError(f"image {i} has size ({height}, {width}); height and width must be at least 1 pixel: "
                             f"correct the annotations, or raise --max_size where the image is very long")
    return pairs


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size}: at least 1 is needed")


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} processes; ranks are 0 to {world_size - 1}")
