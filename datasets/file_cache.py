"""Files that are read once and kept in memory (``--cache_mode``)."""
from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from detr import distributed
from detr.distributed import say

GB = 1e9
SHARED_MEMORY = Path("/dev/shm")        # where Linux keeps it; containers often have little


class FileCache:
    """The bytes of files, one after the other in one tensor of shared memory: the worker processes of a DataLoader,
    forked or spawned, share it instead of copying it.

    ``title`` begins the printed lines, one at least every ten seconds. ``unreadable`` is called with the number of a file
    that cannot be read, to raise what reading it without the cache raises. Raises ValueError, before anything is read,
    where the files of all processes of this machine do not fit into its memory.
    """
    THREADS, STEP = 16, 64              # reading waits for the disk; files that a thread reads at a time

    def __init__(self, paths: Sequence[Path], title: str, unreadable: Callable[[int], object]) -> None:
        self.paths, self.unreadable = paths, unreadable
        steps = [range(first, min(first + self.STEP, len(paths))) for first in range(0, len(paths), self.STEP)]
        with ThreadPoolExecutor(self.THREADS) as pool:
            sizes = [size for some in pool.map(self._sizes, steps) for size in some]
            self.starts = torch.tensor([0, *sizes]).cumsum(0)                                   # [files + 1]
            total = sum(sizes)
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            # All processes look before one of them takes memory, and where one refuses, all do.
            complaints = distributed.gather_objects(does_not_fit(total, processes, f"{len(paths)} files of {title}"))
            for complaint in filter(None, complaints):
                raise ValueError(complaint)
            say(f"{title}: reading {len(paths)} files, {total / GB:.3g} GB, into memory (--cache_mode)"
                + (f", in each of {processes} processes" if processes > 1 else ""))
            start = last = time.perf_counter()
            self.content = torch.empty(max(total, 1), dtype=torch.uint8).share_memory_()        # [bytes]
            for step, _ in zip(steps, pool.map(self._read, steps)):
                now = time.perf_counter()
                if now - last >= 10 or step.stop == len(paths):
                    last = now
                    say(f"{title}: {step.stop}/{len(paths)} files, {int(self.starts[step.stop]) / GB:.3g} GB, "
                        f"{now - start:.0f} s")
        del self.paths, self.unreadable                                 # which no worker needs

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> bytes:
        """The content of file ``i``."""
        return self.content[self.starts[i]:self.starts[i + 1]].numpy().tobytes()

    def _sizes(self, step: range) -> list[int]:
        sizes = []
        for i in step:
            try:
                sizes.append(os.stat(self.paths[i]).st_size)
            except OSError:
                self.unreadable(i)
                raise
        return sizes

    def _read(self, step: range) -> None:
        for i in step:
            place = self.content[self.starts[i]:self.starts[i + 1]].numpy()
            try:
                with open(self.paths[i], "rb") as file:
                    whole = file.readinto(place) == len(place) and not file.read(1)
            except OSError:
                self.unreadable(i)
                raise
            if not whole:
                raise OSError(f"{self.paths[i]} changed while it was read; start again once it is complete")


def does_not_fit(size: int, processes: int, what: str) -> str | None:
    """Why ``size`` bytes in each of several processes are too much for this machine; None where they are not."""
    needed, free = size * processes, free_memory()
    each = f" in each of {processes} processes" if processes > 1 else ""
    have = f"--cache_mode: the {what} have {size / GB:.3g} GB{each}"
    without = "or leave --cache_mode out" if processes == 1 else "start fewer processes, or leave --cache_mode out"
    if needed > 0.9 * free:                                             # the rest is for the program itself
        return f"{have}, too much for the {free / GB:.3g} GB of memory that are free, of which a tenth is left to the " \
               f"program; free some, {without}"
    shared = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else math.inf
    if needed > shared:
        return f"{have}, but only {shared / GB:.3g} GB of shared memory are free in {SHARED_MEMORY}; give it more " \
               f"(docker run --shm-size={math.ceil(needed / GB) + 1}g, or mount -o remount,size=...), {without}"
    return None


def free_memory() -> float:
    """Bytes of physical memory that are there to be used, at most those a container may have; infinite where the system
    does not say."""
    found = [math.inf]
    for path, pattern, unit in (("/proc/meminfo", r"MemAvailable:\s*(\d+) kB", 1024),
                                ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),
                                ("/sys/fs/cgroup/memory/memory.limit_in_bytes", r"(\d+)", 1)):
        try:
            match = re.search(pattern, Path(path).read_text())
        except OSError:
            continue
        if match:
            found.append(int(match[1]) * unit)
    if len(found) == 1 and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):     # not Linux: what there is at all
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found)
