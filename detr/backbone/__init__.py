"""Backbones: image -> feature maps.

The contract of a family: ``body(images [B, 3, H, W])`` returns a list of maps ``[B, channels[i], H / strides[i],
W / strides[i]]`` (rounded up, or down where patches do not overlap), finest first, and states ``channels`` and
``strides``. ``classifier``: what only classification files have. A family is one file here and one line of ``FAMILIES``.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..nested_tensor import NestedTensor, resize_mask
from . import pvt, resnet

FAMILIES: dict[str, Callable[..., nn.Module]] = {
    **{name: resnet.ResNet for name in resnet.SIZES},
    **{name: pvt.PyramidVisionTransformer for name in pvt.SIZES},
    **{name: pvt.PyramidVisionTransformerV2 for name in pvt.SIZES_V2},
}
# What torchvision trained on ImageNet for DETR's backbones (IMAGENET1K_V1), and the authors of PVT for theirs.
IMAGENET_URLS = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    **{name: f"https://github.com/whai362/PVT/releases/download/v2/{name}.pth" for name in (*pvt.SIZES, *pvt.SIZES_V2)},
}


class Backbone(nn.Module):
    """A body and the levels of it that are used: ``NestedTensor`` -> ``{"0": NestedTensor, …}``, in their order."""

    def __init__(self, body: Any, levels: Sequence[int]) -> None:
        super().__init__()
        self.body, self.levels = body, list(levels)
        self.channels: list[int] = [body.channels[i] for i in levels]
        self.strides: list[int] = [body.strides[i] for i in levels]

    def forward(self, images: NestedTensor) -> dict[str, NestedTensor]:
        maps = self.body(images.tensors)
        return {str(n): NestedTensor(maps[i], resize_mask(images, maps[i].shape[-2:]))
                for n, i in enumerate(self.levels)}


def build_body(name: str, norm: str, dilation: bool) -> Any:
    """The body of a backbone by name, with random weights.

    ``norm`` is ``frozen`` (fixed statistics, for ImageNet weights), ``batch`` or ``group``.
    """
    if name not in FAMILIES:
        raise ValueError(f"backbone {name!r} is not known; use one of {', '.join(FAMILIES)}")
    if norm not in resnet.NORMS:
        raise ValueError(f"backbone_norm {norm!r} is not known; use one of {', '.join(resnet.NORMS)}")
    return FAMILIES[name](name, norm, dilation)


def build_backbone(name: str, norm: str, dilation: bool, levels: Sequence[int] = (-1,)) -> Backbone:
    """A backbone by name (see ``build_body``), giving the ``levels`` of it, by default its last."""
    return Backbone(build_body(name, norm, dilation), list(levels))


def has_statistics(name: str) -> bool:
    """Whether a backbone's normalisation keeps statistics of batches, which must not be frozen while they are random."""
    return name in resnet.SIZES


def channels(backbone: nn.Module) -> list[int]:
    """Channels of the maps that a ``Backbone`` gives."""
    return backbone.channels                                                                # type: ignore[return-value]


def body_of(model: nn.Module) -> nn.Module:
    """The backbone's body inside a detector, a mask model or not."""
    return getattr(model, "detr", model).backbone[0].body


def freeze(backbone: Backbone, from_scratch: bool, lr_backbone: float) -> None:
    """Fix what DETR leaves fixed of a pretrained backbone: its stem and first stage, or all of it where its learning rate
    is 0. A backbone that is trained ``from_scratch`` trains whole."""
    for name, parameter in backbone.body.named_parameters():
        if lr_backbone <= 0 or not from_scratch and name.startswith(("conv1.", "bn1.", "layer1.")):
            parameter.requires_grad_(False)
