"""Residual networks (He et al., 2016), with the parameter names of torchvision's.

Sizes: 18 and 34 from basic blocks, 50 and 101 from bottlenecks whose stride sits in the 3x3 convolution, and small ones
(``resnet_tiny``) that learn from random weights on a CPU.

Exact in padded batches when it is told the images' sizes (see ``detr.padding``): what a 3x3 convolution or the pooling
reads is set to zero outside the images first; 1x1 convolutions look at nothing else.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..padding import Size as Extent
from ..padding import Where, Window, check_sizes, normalised, through, where, zeroed


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and fixed affine parameters, all of them buffers."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Files saved from a trainable batch norm count their batches; frozen statistics have no use for it.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    folds = False               # also where training should round as published does: see ``as_published``

    def affine(self) -> tuple[Tensor, Tensor]:
        """What each channel is multiplied by, and what is added then."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine()
        return (x * scale[:, None, None].to(x.dtype)).add_(shift[:, None, None].to(x.dtype))


def as_published(x: Tensor) -> bool:
    """Whether float32 is rounded as in the published runs: in training on CPUs, where theirs are recorded. Differences of
    rounding grow there from step to step, once they decide on which side of zero an activation falls."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def fold_norms(model: nn.Module) -> int:
    """From now on normalisations with frozen statistics are folded into their convolutions wherever ``model`` computes,
    at the price of other rounding than the published runs have in training; returns how many there are."""
    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    for norm in norms:
        norm.folds = True
    return len(norms)


class Convolution(nn.Conv2d):
    """A convolution that can take the fixed normalisation behind it into its weights: a factor and a summand for each
    channel cost nothing there, and two passes over the map behind it. Trainable normalisations come as ever."""

    def forward(self, x: Tensor, norm: FrozenBatchNorm2d | None = None) -> Tensor:             # type: ignore[override]
        if norm is None:
            return super().forward(x)
        scale, shift = norm.affine()
        return self._conv_forward(x, self.weight * scale[:, None, None, None], shift)


def convolved(conv: nn.Module, norm: nn.Module, x: Tensor, at: Where | None) -> Tensor:
    """``norm`` of ``conv`` of ``x``; ``at``: where the images are then."""
    if isinstance(norm, FrozenBatchNorm2d) and (norm.folds or not as_published(x)):
        return conv(x, norm)
    return normalised(norm, conv(x), at)


Norm = Callable[[int], nn.Module]


def group_norm(num_features: int) -> nn.GroupNorm:
    """Group normalisation (Wu and He, 2018) in 32 groups, or groups of 8 channels where that makes fewer."""
    return nn.GroupNorm(min(32, num_features // 8), num_features)


NORMS: dict[str, Norm] = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d, "group": group_norm}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = Convolution(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = Convolution(planes, planes, 3, padding=1, bias=False)
        self.bn2 = norm(planes)
        self.downsample = shortcut(inplanes, planes, stride, norm)

    def forward(self, x: Tensor, before: Where | None, after: Where | None) -> Tensor:
        """``x``, with the images ``before`` the stride and ``after`` it."""
        out = convolved(self.conv1, self.bn1, zeroed(x, before), after).relu_()
        out = convolved(self.conv2, self.bn2, zeroed(out, after), after)
        return out.add_(self.downsample(x, after)).relu_()


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the width, around a shortcut. Sums and ReLUs work in place: a hook
    that keeps the output of a convolution or a normalisation finds it changed, unless it copies it."""
    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = Convolution(inplanes, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = Convolution(planes, planes, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = norm(planes)
        self.conv3 = Convolution(planes, 4 * planes, 1, bias=False)
        self.bn3 = norm(4 * planes)
        self.downsample = shortcut(inplanes, 4 * planes, stride, norm)

    def forward(self, x: Tensor, before: Where | None, after: Where | None) -> Tensor:
        """``x``, with the images ``before`` the stride and ``after`` it."""
        out = convolved(self.conv1, self.bn1, x, before).relu_()
        out = convolved(self.conv2, self.bn2, zeroed(out, before), after).relu_()
        return convolved(self.conv3, self.bn3, out, after).add_(self.downsample(x, after)).relu_()


class Shortcut(nn.Sequential):
    """A 1x1 convolution and its normalisation, or nothing: the identity."""

    def forward(self, x: Tensor, after: Where | None) -> Tensor:                            # type: ignore[override]
        return convolved(self[0], self[1], x, after) if len(self) else x


def shortcut(inplanes: int, planes: int, stride: int, norm: Norm) -> Shortcut:
    """What stands beside a block: a convolution where size or width changes."""
    if stride == 1 and inplanes == planes:
        return Shortcut()
    return Shortcut(Convolution(inplanes, planes, 1, stride, bias=False), norm(planes))


def extents_behind(layers: Sequence[Any], size: Extent) -> list[Extent]:
    """(height, width) of an image of ``size`` behind each of ``layers``, one after the other."""
    sizes = [size]
    for layer in layers:
        sizes += Window.of(layer).sizes(sizes[-1:])
    return sizes[1:]


class Stage(nn.Sequential):
    """Blocks; the first one has the stride."""

    def forward(self, x: Tensor, before: Where | None = None, after: Where | None = None) -> Tensor:  # type: ignore[override]
        for block in self:
            x = block(x, before, after)
            before = after
        return x


@dataclass(frozen=True)
class Size:
    """Block, blocks a stage, and channels of the first stage (doubled from stage to stage)."""
    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, ...]
    width: int = 64


SIZES = {
    "resnet18": Size(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Size(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Size(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Size(Bottleneck, (3, 4, 23, 3)),
    "resnet_tiny": Size(BasicBlock, (1, 1, 2), width=32),
}


class ResNet(nn.Module):
    """Convolutional stages; returns the map of each: a list of ``[B, channels[i], H / strides[i], W / strides[i]]``
    (rounded up).

    ``dilation`` gives the last stage the resolution of the one before (DC5; Carion et al., 2020, section 4): stride 1,
    its first block undilated and the others dilated by 2.
    """
    exact, inexact, only = True, "", None
    first_layer = "conv1.weight"
    classifier: tuple[str, ...] = ("fc.weight", "fc.bias")

    def __init__(self, name: str, norm: str = "frozen", dilation: bool = False, in_channels: int = 3) -> None:
        super().__init__()
        size = SIZES[name]
        if dilation and size.block is BasicBlock:
            raise ValueError(f"--dilation needs bottleneck blocks, which {name} does not have: "
                             f"use --backbone resnet50 or resnet101")
        make_norm = NORMS[norm]
        self.conv1 = Convolution(in_channels, size.width, 7, stride=2, padding=3, bias=False)
        self.bn1 = make_norm(size.width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.channels, self.strides, self.stages = [], [], []
        inplanes, stride_so_far = size.width, 4
        for i, depth in enumerate(size.depths):
            planes = size.width * 2 ** i
            dilated = dilation and i == len(size.depths) - 1
            stride = 1 if i == 0 or dilated else 2
            blocks = []
            for j in range(depth):
                blocks.append(size.block(inplanes, planes, 1 if j else stride, 2 if dilated and j else 1, make_norm))
                inplanes = planes * size.block.expansion
            setattr(self, f"layer{i + 1}", Stage(*blocks))
            stride_so_far *= stride
            self.channels.append(inplanes)
            self.strides.append(stride_so_far)
            self.stages.append((f"layer{i + 1}.",) if i else ("conv1.", "bn1.", "layer1."))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def keep(self, maps: int) -> None:
        """Drop the stages after the first ``maps``; files have them all the same."""
        self.classifier = (*self.classifier, *(prefix for stage in self.stages[maps:] for prefix in stage))
        for i in range(maps, len(self.stages)):
            delattr(self, f"layer{i + 1}")
        del self.channels[maps:], self.strides[maps:], self.stages[maps:]

    def unused(self, maps: Sequence[int]) -> list[str]:
        """Parameters that none of these maps depends on, once ``keep`` has dropped the stages behind them: none."""
        return []

    def renamed(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A classification file's tensors, whose names are ours, and what it has under others: nothing."""
        return state_dict, []

    def strided(self, i: int) -> nn.Conv2d:
        """The convolution that decides the size of stage ``i``'s map; the 1x1 convolution beside it comes to the same."""
        block = getattr(self, f"layer{i + 1}")[0]
        return block.conv1 if isinstance(block, BasicBlock) else block.conv2

    def extents(self, size: Extent) -> list[Extent]:
        """(height, width) of each map of an image of ``size``."""
        layers: list[Any] = [self.conv1, self.maxpool, *map(self.strided, range(len(self.stages)))]
        return extents_behind(layers, size)[2:]

    def forward(self, images: Tensor, sizes: Sequence[Extent] | None = None) -> list[Tensor]:
        """``images [B, C, H, W]`` -> the map of each stage. Without ``sizes`` the published computation, which takes
        padding for a part of the image.

        ``sizes`` are (height, width) of the images in the batch: each image's maps are then those of the image alone
        inside ``extents(size)``, and arbitrary, but finite, outside.
        """
        if getattr(self.bn1, "folds", False) or not as_published(images):
            images = images.contiguous(memory_format=torch.channels_last)       # what convolutions are fastest with
        at = where(images, None if sizes is None else check_sizes(images, sizes))
        after = through(self.conv1, at)
        x, at = convolved(self.conv1, self.bn1, zeroed(images, at), after).relu_(), after
        x, at = self.maxpool(zeroed(x, at)), through(self.maxpool, at)          # after a ReLU, zero is as good as -inf
        maps = []
        for i in range(len(self.stages)):
            after = through(self.strided(i), at)
            x, at = getattr(self, f"layer{i + 1}")(x, at, after), after
            maps.append(x)
        return maps
