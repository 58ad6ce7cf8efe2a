"""Dropout (Srivastava et al., 2014) whose random numbers are cheap on CPUs.

PyTorch draws a double from a sequential generator for every element there, which is a sixth of a training step of
Deformable DETR. Sixteen bits an element say the same: a 64-bit number decides about four.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = 2 ** 16


class Dropout(nn.Dropout):
    """``nn.Dropout``; on CPUs ``p`` is rounded to a multiple of 2 ** -16, and what is kept scaled by just that."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training, self.inplace)


def dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """``x`` with elements set to zero by chance ``p``, the others divided by ``1 - p``; in training alone."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or inplace or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.dropout(x, p, training, inplace)
    return Drop.apply(x, round(p * BITS))                                                       # type: ignore[no-any-return]


class Drop(torch.autograd.Function):
    """Sets elements to zero by the chance of ``share`` in ``BITS``; backward, the same ones of the gradient. What is kept
    for that is a byte an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: int) -> Tensor:                                     # type: ignore[override]
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)      # type: ignore[call-overload]
        dropped = drawn.view(torch.int16)[:x.numel()].view(x.shape) < share - BITS // 2
        ctx.save_for_backward(dropped)
        ctx.scale = BITS / (BITS - share) if share < BITS else 0.0
        return x.masked_fill(dropped, 0.0).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:                            # type: ignore[override]
        return gradient.masked_fill(ctx.saved_tensors[0], 0.0).mul_(ctx.scale), None
