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


class RandomBatches(Sampler[list[Draw]]):
    """A process's batches of a random order of all images: a ``batch_sampler`` for the data set ``Drawn(dataset)``.

    The order follows from ``seed`` and the epoch alone, and what an image's transforms draw from ``seed``, the epoch and
    the image: neither depends on the number of processes or workers. An optimizer step takes ``accumulate`` batches of
    ``batch_size`` images from each process, the next ``world_size * accumulate * batch_size`` images of the order, so a
    step has the same images however they are shared out. Within an epoch no image comes twice; those that do not fill
    a step are left out, the last of the order, which are other ones in each epoch.

    With ``repeats``, a factor of at least 1 for each image (``repeat_factors``), every epoch has ``int(sum(repeats))``
    images in place of ``length``. One with the factor 2.3 comes twice or, in 30% of the epochs, three times, each time
    with draws of its own.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0,
                 repeats: Sequence[float] | Tensor | None = None, accumulate: int = 1) -> None:
        _check_rank(rank, world_size)
        _check_batch_size(batch_size)
        self.batch_size, self.rank, self.world_size, self.accumulate = batch_size, rank, world_size, accumulate
        self.seed, self.epoch, self.first_step = seed, 0, 0
        self.repeats = None if repeats is None else torch.as_tensor(repeats, dtype=torch.float64)
        if self.repeats is not None and (self.repeats.shape != (length,) or not (self.repeats >= 1).all()):
            raise ValueError(f"repeats {list(self.repeats.shape)} for {length} images: a factor of at least 1 is needed "
                             f"for each")
        self.images_of_epoch = length if self.repeats is None else int(self.repeats.sum())
        self.images_of_step = world_size * batch_size * accumulate
        if self.steps == 0:
            flags = f"--global_batch_size {self.images_of_step}" if accumulate > 1 else f"--batch_size {batch_size}"
            raise ValueError(f"{flags} on {world_size} processes needs {self.images_of_step} training images, and there "
                             f"are {length}; lower it")

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self.images_of_epoch // self.images_of_step

    def __len__(self) -> int:
        """Batches of this process in a whole epoch."""
        return self.steps * self.accumulate

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """To be called before each epoch; without it every epoch is epoch 0. The batches before optimizer step
        ``first_step`` are left out: a training that was broken off goes on with those that it had not seen."""
        self.epoch, self.first_step = epoch, first_step

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

    def draws(self, generator: torch.Generator) -> list[list[Draw]]:
        """The images of each optimizer step of this epoch, of all processes, with the seeds of their transforms."""
        order = self.order(generator).numpy()
        seeds = _seeds(self.seed, self.epoch, order)
        drawn = [Draw(*draw) for draw in zip(order.tolist(), seeds.tolist())]
        return [drawn[step * self.images_of_step:(step + 1) * self.images_of_step] for step in range(self.steps)]

    def __iter__(self) -> Iterator[list[Draw]]:
        size = self.world_size * self.batch_size
        for draws in self.draws(_generator(self.seed, self.epoch))[self.first_step:]:
            for k in range(self.accumulate):
                yield draws[k * size:(k + 1) * size][self.rank::self.world_size]


class TrainingBatches(RandomBatches):
    """The same with images in a batch that training will bring to like sizes, which leaves little padding.

    ``sizes`` has the (height, width) of each image before ``transforms``, which draw flip, crop and scale of each image
    at random. Here the draws come first: the transforms are run with each image's seed for the size that they will
    give, and again, with the same seed, when the image is read. So images are augmented as without this class, each
    independently of all others; but those meet in a batch that come out alike.

    The random order of an epoch is taken in windows of about ``WINDOW`` steps. A window is cut into steps of images
    alike (see ``_alike``), and each step likewise into the batches of the processes, so that none waits long for
    another. The steps of a window come in random order. Who meets whom is new in each epoch, and any two images may meet
    whose sizes can come out alike. The images left out, fewer than a step's, are the last of the random order: all are
    as likely to be among them.
    """

    def __init__(self, sizes: Sequence[Size] | Tensor, transforms: v2.Compose, batch_size: int, rank: int = 0,
                 world_size: int = 1, seed: int = 0, repeats: Sequence[float] | Tensor | None = None,
                 accumulate: int = 1) -> None:
        super().__init__(len(sizes), batch_size, rank, world_size, seed, repeats, accumulate)
        self.sizes, self.transforms = _checked(sizes), transforms

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = _generator(self.seed, self.epoch)
        steps_of_epoch, begin = self.draws(generator), 0
        for window in np.array_split(np.arange(self.steps), max(1, round(self.steps / WINDOW))):
            order = torch.randperm(len(window), generator=generator).tolist()[max(0, self.first_step - begin):]
            begin += len(window)
            if not order:
                continue
            draws = [draw for step in window for draw in steps_of_epoch[step]]
            sizes = np.array(drawn_sizes(self.transforms, [self.sizes[draw.image] for draw in draws],
                                         [draw.seed for draw in draws]))
            steps = _alike(sizes, np.arange(len(draws)), self.images_of_step)[1]
            for k in order:
                batches = _alike(sizes, steps[k], self.batch_size)[1]
                for place in range(0, len(batches), self.world_size):
                    mine = batches[place + (self.rank + k) % self.world_size]           # in turns: they are sorted
                    yield [draws[i] for i in mine]


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


def _seeds(seed: int, epoch: int, images: np.ndarray) -> np.ndarray:
    """A number below 2**32 for each of ``images`` [n], which follows from seed, epoch, image and how often the image has
    come before: all four mixed by the finalizer of SplitMix64 (Steele et al., 2014, figure 16)."""
    by_image = images.argsort(kind="stable")
    first = np.searchsorted(images[by_image], images[by_image])
    again = np.empty_like(images)
    again[by_image] = np.arange(len(images)) - first
    mixed = np.zeros(len(images), np.uint64)
    for number in (np.full(len(images), seed), np.full(len(images), epoch), images, again):
        mixed = (mixed ^ number.astype(np.int64).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(32)).astype(np.int64)


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
