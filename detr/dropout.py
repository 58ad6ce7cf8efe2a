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
    """``nn.Dropout`` for what nobody else uses, such as the output of a linear layer. On CPUs it works in place, so that
    in training a hook that keeps that output finds it dropped; ``p`` is rounded to a multiple of 2 ** -16 there, and what
    is kept scaled by just that."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training, inplace=not given(x))


def dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """``x`` with elements set to zero by chance ``p``, the others divided by ``1 - p``; in training alone. ``inplace``:
    ``x`` itself may be changed, where that saves something."""
    if not training or p == 0:
        return x
    return Drop.apply(x, round(p * BITS), inplace) if ours(x) else F.dropout(x, p, training)


def relu_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """``dropout`` of what is above zero, which nobody else uses: ``x`` may be changed."""
    if training and p > 0 and ours(x) and not given(x):
        return ReluDrop.apply(x, round(p * BITS))                                               # type: ignore[no-any-return]
    return dropout(F.relu(x, inplace=not given(x)), p, training)


def given(x: Tensor) -> bool:
    """Whether ``x`` is what gradients are asked for, which PyTorch lets nobody change."""
    return x.is_leaf and x.requires_grad


def ours(x: Tensor) -> bool:
    """Whether PyTorch's own dropout is left alone: it is fast on GPUs, and known to compilers."""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def chosen(x: Tensor, share: int) -> Tensor:
    """Elements of ``x``, each by the chance of ``share`` in ``BITS``: bool, of its shape."""
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)          # type: ignore[call-overload]
    return drawn.view(torch.int16)[:x.numel()].view(x.shape) < share - BITS // 2


def scale_of(share: int) -> float:
    """By which what is kept grows."""
    return BITS / (BITS - share) if share < BITS else 0.0


class Drop(torch.autograd.Function):
    """Sets elements to zero; backward, the same ones of the gradient. What is kept for that is a byte an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: int, inplace: bool) -> Tensor:                      # type: ignore[override]
        dropped = chosen(x, share)
        ctx.save_for_backward(dropped)
        ctx.scale = scale_of(share)
        if inplace:
            ctx.mark_dirty(x)
            return x.masked_fill_(dropped, 0.0).mul_(ctx.scale)
        return x.masked_fill(dropped, 0.0).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:                      # type: ignore[override]
        return gradient.masked_fill(ctx.saved_tensors[0], 0.0).mul_(ctx.scale), None, None


class ReluDrop(torch.autograd.Function):
    """Both in place. The result tells what was neither below zero nor dropped, so nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: int) -> Tensor:                                     # type: ignore[override]
        ctx.scale = scale_of(share)
        ctx.mark_dirty(x)
        x.relu_().masked_fill_(chosen(x, share), 0.0).mul_(ctx.scale)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:                            # type: ignore[override]
        return torch.ops.aten.threshold_backward(gradient, ctx.saved_tensors[0], 0).mul_(ctx.scale), None
