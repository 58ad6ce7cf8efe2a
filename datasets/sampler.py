"""Which images a process sees, in which order."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class TrainingSampler(Sampler[int]):
    """A random order of all images, dealt out to the processes: each gets ``length // world_size`` of them.

    The order follows from ``seed`` and the epoch alone, so a resumed run continues as the unbroken one would have, and
    the batches of all processes together are those of one process with a batch that many times larger. Within an epoch
    no image comes twice; the ``length % world_size`` last ones of the order are left out, other ones in each epoch.
    ``DataLoader(drop_last=True)`` leaves out the last incomplete batch likewise, as published.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        _check_rank(rank, world_size)
        if length < world_size:
            raise ValueError(f"{length} training images cannot be shared by {world_size} processes; add images or "
                             f"start fewer processes")
        self.length = length
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """To be called before each epoch; without it every epoch has the order of epoch 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)    # seeds do not share their epochs
        order = torch.randperm(self.length, generator=generator).tolist()
        return iter(order[self.rank:len(self) * self.world_size:self.world_size])


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


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} processes; ranks are 0 to {world_size - 1}")
