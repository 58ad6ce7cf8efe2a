"""Lists as flat tensors: worker processes share them, however they are started.

A forked process shares its parent's memory until one of them writes to it, and Python writes to every object that it
looks at (its reference count), so lists of Python objects are copied page by page as the epochs go by. A process that
is started anew is sent a copy of all but tensors, which it gets through shared memory.
"""
from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pycocotools import mask as rle
from torch import Tensor


class Numbers(Sequence):
    """Whole numbers in one tensor; gives int."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = torch.tensor(list(numbers), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: Any) -> Any:
        return self._numbers[i].tolist()

    def __iter__(self) -> Any:
        return iter(self._numbers.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))


class Strings(Sequence):
    """Texts, or with ``binary`` bytes, one after the other in one tensor; gives str, or bytes."""

    def __init__(self, strings: Iterable[str | bytes], binary: bool = False) -> None:
        parts = [text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass") for text in strings]
        self.binary = binary
        self._bytes = _tensor(bytearray(b"".join(parts)), torch.uint8)
        self._starts = torch.tensor([0, *map(len, parts)], dtype=torch.int64).cumsum(0)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} of {len(self)}")
        first, last = self._starts[i % len(self)], self._starts[i % len(self) + 1]
        content = self._bytes[first:last].numpy().tobytes()
        return content if self.binary else content.decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))


class Segmentations(Sequence):
    """Segmentations of objects, as COCO's json has them: a list of polygons, or a dict of run lengths, which become
    compressed ones. Polygons keep every bit."""

    def __init__(self, segmentations: Iterable[Any]) -> None:
        coordinates, ends, objects, codes, sizes = array("d"), [0], [0], [], []
        for segmentation in segmentations:
            code, size = b"", (0, 0)
            if isinstance(segmentation, list):
                for polygon in segmentation:
                    coordinates.extend(polygon)
                    ends.append(len(coordinates))
            else:
                size = segmentation["size"]
                counts = segmentation["counts"]
                counts = rle.frPyObjects(segmentation, *size)["counts"] if isinstance(counts, list) else counts
                code = counts.encode("ascii") if isinstance(counts, str) else counts
            objects.append(len(ends) - 1)
            codes.append(code)
            sizes.append(size)
        self._coordinates = _tensor(coordinates, torch.float64)
        self._ends = torch.tensor(ends, dtype=torch.int64)              # [polygons + 1]
        self._polygons = torch.tensor(objects, dtype=torch.int64)       # [objects + 1]
        self._codes = Strings(codes, binary=True)
        self._sizes = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._polygons) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(f"{i} of {len(self)}")
        first, last = self._polygons[i:i + 2].tolist()
        if first == last:
            return {"size": self._sizes[i].tolist(), "counts": self._codes[i]}
        ends = self._ends[first:last + 1].tolist()
        return [self._coordinates[start:end].tolist() for start, end in zip(ends, ends[1:])]


def _tensor(buffer: Any, dtype: torch.dtype) -> Tensor:
    """The numbers of an ``array`` or ``bytearray``."""
    return torch.frombuffer(buffer, dtype=dtype).clone() if len(buffer) else torch.empty(0, dtype=dtype)
