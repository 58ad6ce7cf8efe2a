"""Numbers that the host knows, such as images' sizes, as tensors where a model computes."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

Kept = dict[tuple[Any, ...], Tensor]            # by their bytes, type and shape
_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)


def on_device(values: Tensor | Sequence[Any], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """``values``, numbers or a tensor on the CPU, on ``device``. With CUDA the program goes on meanwhile: a copy that
    waits until a GPU has done all it was given would leave it without work afterwards. (Ordinary memory is copied aside
    before such a call returns, so that ``values`` may go or change.)"""
    given = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype, device="cpu")
    ahead = given.device.type == "cpu" and torch.device(device).type == "cuda"          # no other copy is safe so
    kept = None if torch.compiler.is_compiling() or torch.jit.is_tracing() else _kept.get()
    if kept is None or given.device.type != "cpu" or torch.device(device).type == "cpu":
        return given.to(device, dtype, non_blocking=ahead)
    key = (given.numpy().tobytes(), given.dtype, given.shape, dtype, torch.device(device))
    if key not in kept:
        kept[key] = given.to(device, dtype, non_blocking=ahead)
    return kept[key]


@contextmanager
def keeping(kept: Kept) -> Iterator[None]:
    """Within, ``on_device`` copies what is not yet in ``kept`` to there, and takes all else from it: a recorded CUDA
    graph has no copies from the host, and what it reads has to stay where it is."""
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)
