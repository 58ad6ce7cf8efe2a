"""A trained model -> a copy that predicts the same, faster.

What it does without changing a number beyond rounding: normalisations with fixed statistics go into the convolutions
before them; convolutions, with their ReLU and the sum of a residual block, run as one operation in the channels-last
order where PyTorch has one, and linear layers of the transformer with their bias, all but the joint projection to
queries, keys and values of dense attention, which is a parameter of its own; auxiliary outputs are left out. With
``bf16`` the backbone computes in bfloat16, and the transformer's linear layers multiply in it; offsets and weights of
deformable attention, and the sums that make boxes of them, stay in float32.
"""
from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .backbone import backbone_of
from .backbone.resnet import BasicBlock, Bottleneck, FrozenBatchNorm2d, ResNet, extents_behind
from .padding import Size, Where, check_sizes, through, where, zeroed
from .precision import TYPES, fast_in_bf16

NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d)                     # whose statistics are fixed in evaluation
# Linear layers whose numbers are worth float32, or that a model asks for their type.
IN_FLOAT32 = {"sampling_offsets", "attention_weights", "reference_points", "ref_point_head", "ref_anchor_head",
              "bbox_embed", "class_embed"}


class FoldedConvolution(nn.Module):
    """A convolution with its normalisation inside and, with ``relu``, what is below zero set to zero; with ``add``, after
    that tensor was added."""

    def __init__(self, conv: Any, norm: Any, relu: bool) -> None:
        super().__init__()
        weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
                                            norm.weight, norm.bias)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.kernel_size, self.relu = conv.kernel_size, relu

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        window = (list(self.padding), list(self.stride), list(self.dilation), self.groups)
        if fused_on_cpu(x, self.weight):
            if add is not None:
                return torch.ops.mkldnn._convolution_pointwise(x, add, self.weight, self.bias, *window, "add", 1.0,
                                                               "relu" if self.relu else None, [], "")
            return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *window,
                                                           "relu" if self.relu else "none", [], "")
        out = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        out = out if add is None else out.add_(add)
        return out.relu_() if self.relu else out


class FusedLinear(nn.Linear):
    """A linear layer that, on CPUs, adds its bias while it multiplies."""

    def forward(self, input: Tensor) -> Tensor:
        if fused_on_cpu(input, self.weight):
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
            if dtype == self.weight.dtype:
                return torch.ops.mkldnn._linear_pointwise(input.to(dtype), self.weight, self.bias, "none", [], "")
        return super().forward(input)


def fused_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch has operations that convolve or multiply ``x`` with ``weight``, and add and cut in the same pass.
    They have no gradients, and no form that could be exported."""
    followed = (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
                or torch.compiler.is_compiling() or torch.jit.is_tracing())
    return x.device.type == "cpu" and not followed and bool(torch.backends.mkldnn.enabled) and fused_in(weight.dtype)


@functools.cache
def fused_in(dtype: torch.dtype) -> bool:
    """Whether this processor has them for such numbers."""
    known = torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_convolution_pointwise", "_linear_pointwise"))
    return known and (dtype == torch.float32 or dtype == torch.bfloat16 and fast_in_bf16(torch.device("cpu")))


class Block(nn.Module):
    """A residual block, basic or bottleneck: convolutions, the last of which adds the shortcut."""

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        count = 2 if isinstance(block, BasicBlock) else 3
        self.convs = nn.ModuleList(FoldedConvolution(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), relu=True)
                                   for i in range(1, count + 1))
        shortcut: Any = block.downsample
        self.shortcut = FoldedConvolution(shortcut[0], shortcut[1], relu=False) if len(shortcut) else None
        self.strided = count - 2                                # the number of the convolution that may have a stride

    def forward(self, x: Tensor, before: Where | None, after: Where | None) -> Tensor:
        """``x``, with the images ``before`` the stride and ``after`` it."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for i, conv in enumerate(self.convs):
            if conv.kernel_size != (1, 1):
                x = zeroed(x, before if i <= self.strided else after)
            x = conv(x, shortcut if i == len(self.convs) - 1 else None)
        return x


class FoldedResNet(nn.Module):
    """``ResNet`` with its normalisations inside its convolutions, for evaluation alone; same maps, same contract."""
    exact, inexact, only = True, "", None

    def __init__(self, body: ResNet) -> None:
        super().__init__()
        self.channels, self.strides, self.stages = body.channels, body.strides, body.stages
        self.conv1, self.maxpool = FoldedConvolution(body.conv1, body.bn1, relu=True), body.maxpool
        self.layers = nn.ModuleList(nn.ModuleList(Block(block) for block in getattr(body, f"layer{i + 1}"))
                                    for i in range(len(body.stages)))

    def extents(self, size: Size) -> list[Size]:
        """See ``ResNet.extents``."""
        first: list[Any] = [blocks[0] for blocks in self.layers]                                # type: ignore[index]
        strided = [block.convs[block.strided] for block in first]
        return extents_behind([self.conv1, self.maxpool, *strided], size)[2:]

    def forward(self, images: Tensor, sizes: Sequence[Size] | None = None) -> list[Tensor]:
        """See ``ResNet.forward``; maps are of the type of the weights."""
        x = images.to(self.conv1.weight.dtype, memory_format=torch.channels_last)
        at = where(x, None if sizes is None else check_sizes(x, sizes))
        x, at = self.conv1(zeroed(x, at)), through(self.conv1, at)                               # type: ignore[arg-type]
        x, at = self.maxpool(zeroed(x, at)), through(self.maxpool, at)
        maps = []
        blocks: Any
        for blocks in self.layers:
            after = through(blocks[0].convs[blocks[0].strided], at)
            before = at
            for block in blocks:
                x, before = block(x, before, after), after
            at = after
            maps.append(x)
        return maps


def for_prediction(model: nn.Module, precision: str = "off") -> nn.Module:
    """A copy of a detector that predicts the same, to rounding, in less time: in evaluation mode, without gradients and
    auxiliary outputs. ``precision``: "off" computes in float32 as before; "bf16" and "fp16" are to be run within
    ``precision.autocast`` of the same name, as ``Detector`` does. ResNets are folded; other backbones stay as they are.

    State dicts of the copy have other names: keep the model for saving. Raises ValueError for an unknown precision, and
    for another one than that of a copy made before.
    """
    if precision not in TYPES:
        raise ValueError(f"precision {precision!r} is not known; use one of {', '.join(TYPES)}")
    if getattr(model, "prepared_for", precision) != precision:
        raise ValueError(f"precision {precision!r}: this model is a copy prepared for {model.prepared_for!r}; prepare "
                         f"the one it was made from")
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    fast.prepared_for = precision                                                               # type: ignore[assignment]
    detr: Any = getattr(fast, "detr", fast)
    detr.aux_loss = False
    backbone, half = backbone_of(fast), None if precision == "off" else TYPES[precision]
    if isinstance(backbone.body, ResNet) and isinstance(backbone.body.bn1, NORMS):
        backbone.body = FoldedResNet(backbone.body).to(half)
    for name, module in detr.transformer.named_modules():
        if isinstance(module, nn.Linear) and half and not set(name.split(".")) & IN_FLOAT32:
            module.to(half)                                     # what autocast would do anew each time
        if type(module) is nn.Linear:
            module.__class__ = FusedLinear                      # in place: some are shared with the heads
    return fast
