"""Backbones: image -> feature maps.

The contract of a family: ``body(images [B, C, H, W], sizes=None)`` returns a list of maps ``[B, channels[i],
H / strides[i], W / strides[i]]`` (rounded up, or down where patches do not overlap), finest first. It states
``channels`` and ``strides``, ``stages`` (how the names of each map's parameters begin), ``classifier`` (what only
classification files have), ``first_layer`` (the weight that sees the image) and ``only`` (the one size that it takes, or
None). It can ``keep`` its first maps only, names the parameters that are ``unused`` where some maps are, and has files
``renamed`` to its own names. Where ``exact`` is True, ``sizes`` are the images' extents in the batch, and what lies
outside of them changes nothing inside ``extents(size)``; outside, maps are arbitrary, but finite. ``inexact`` says why
it is not. A family is one file here and one line of ``FAMILIES``.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint, distributed
from ..config import ModelConfig, shown
from ..nested_tensor import NestedTensor, resize_mask
from ..padding import at_least, valid_mask
from . import pvt, resnet, timm_model

TIMM = "timm/"
LEAST = 32                      # pixels a side that exact padding gives every image: the coarsest stride
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
    """A body and the levels of it that are used: ``NestedTensor`` -> ``{"0": NestedTensor, …}``, in their order.

    ``exact`` makes the maps of an image the same in every batch: the body is told the images' sizes, masks are at the
    true extents, and images with a side below 32 pixels are padded to 32, alone, too. The maps then have ``sizes``,
    which tells those that come after. A body that cannot do so is run as published, and ``inexact`` says why.
    """

    def __init__(self, body: Any, levels: Sequence[int], exact: bool = False) -> None:
        super().__init__()
        levels = [i if i >= 0 else i + len(body.strides) for i in levels]
        body.keep(max(levels) + 1)
        for name in body.unused(levels):            # where maps are made side by side (HRNet), some go into others alone
            body.get_parameter(name).requires_grad_(False)
        self.body, self.levels = body, levels
        self.exact = exact and body.exact
        self.inexact: str = body.inexact if exact and not body.exact else ""
        self.frozen_stages = 0                          # what ``freeze`` has fixed, the stem with the first
        self.channels: list[int] = [body.channels[i] for i in levels]
        self.strides: list[int] = [body.strides[i] for i in levels]

    def forward(self, images: NestedTensor) -> dict[str, NestedTensor]:
        if self.exact:
            return self.exact_maps(images)
        maps, whole = self.body(images.tensors), not images.padded
        return {str(n): NestedTensor(maps[i], resize_mask(images, maps[i].shape[-2:]), whole=whole)
                for n, i in enumerate(self.levels)}

    def exact_maps(self, images: NestedTensor) -> dict[str, NestedTensor]:
        """The maps at the images' true extents, and zero outside of them."""
        sizes = images.extents()
        height, width = images.tensors.shape[-2:]
        if isinstance(sizes, Tensor):                           # in an export, whose batches have at least 32 x 32 pixels
            maps = self.body(images.tensors, at_least(LEAST, sizes))
            of_levels = [torch.stack(extent, dim=1) for extent in self.body.extents(tuple(sizes.unbind(1)))]
        else:
            enough = F.pad(images.tensors, (0, max(LEAST - width, 0), 0, max(LEAST - height, 0)))
            maps = self.body(enough, [(max(h, LEAST), max(w, LEAST)) for h, w in sizes])
            extents = {size: self.body.extents(size) for size in set(sizes)}
            of_levels = [list(of_level) for of_level in zip(*(extents[size] for size in sizes))]
        features = {}
        for n, i in enumerate(self.levels):
            of_level = of_levels[i]
            mask = ~valid_mask(of_level, maps[i].shape[-2], maps[i].shape[-1], maps[i].device)
            features[str(n)] = NestedTensor(maps[i].masked_fill(mask[:, None], 0.0), mask, of_level)
        return features


def build_body(name: str, norm: str, dilation: bool, in_channels: int = 3) -> Any:
    """The body of a backbone by name, with random weights: one of ``FAMILIES``, or ``timm/`` and a name of timm's.

    ``norm`` is ``frozen`` (fixed statistics, for ImageNet weights), ``batch`` or ``group``.
    """
    if norm not in resnet.NORMS:
        raise ValueError(f"backbone_norm {norm!r} is not known; use one of {', '.join(resnet.NORMS)}")
    if name.startswith(TIMM):
        return timm_model.TimmBody(name, norm, dilation, in_channels)
    if name not in FAMILIES:
        theirs = TIMM + name if name.partition(".")[0] in timm_model.timm_names() else None
        hint = f"did you mean {theirs}? There" if theirs else "there"
        raise ValueError(f"--backbone {name} is not known; {hint} are {', '.join(FAMILIES)}, and timm/NAME for "
                         f"timm's")
    return FAMILIES[name](name, norm, dilation, in_channels)


def build_backbone(config: ModelConfig, default: Callable[[list[int]], Sequence[int]], most: int) -> Backbone:
    """The backbone that ``config`` asks for. ``default`` chooses the maps that are used where the user does not, from
    the strides of all; an architecture has room for ``most``."""
    body = build_body(config.backbone, config.backbone_norm, config.dilation, config.in_channels)
    levels = default(body.strides) if config.feature_strides is None else \
        maps_of(config.feature_strides, body.strides, config.backbone, most)
    if -min(levels) > len(body.strides):
        raise ValueError(f"--backbone {config.backbone} has {len(body.strides)} map, and this model needs "
                         f"{-min(levels)}; use another backbone")
    backbone = Backbone(body, levels, config.padding == "exact")
    stages = config.frozen_stages
    if stages is None:
        stages = min(1, len(body.stages) - 1)
    freeze(backbone, 0 if config.from_scratch else stages, config.lr_backbone)
    return backbone


def maps_of(wanted: Sequence[int], strides: Sequence[int], name: str, most: int) -> list[int]:
    """Which maps have the ``wanted`` strides; of two with the same stride (DC5), the deeper one."""
    flag = f"--feature_strides {shown(tuple(wanted))}"
    if not wanted:
        raise ValueError("--feature_strides: at least one stride is needed, such as 32")
    if missing := [stride for stride in wanted if stride not in strides]:
        raise ValueError(f"{flag}: {name} has no map of stride {missing[0]}; it has {shown(tuple(strides))}")
    if any(b <= a for a, b in zip(wanted, wanted[1:])):
        raise ValueError(f"{flag}: from fine to coarse, each once: {shown(tuple(sorted(set(wanted))))}")
    if len(wanted) > most:
        raise ValueError(f"{flag}: {len(wanted)} strides, and this model has room for {most}; for several, use a "
                         f"Deformable DETR with --num_feature_levels {len(wanted)} or more")
    return [max(i for i, stride in enumerate(strides) if stride == one) for one in wanted]


def scratch_norm(name: str) -> str:
    """The flag, if one is needed, that lets a backbone's normalisation train from random weights."""
    if not has_statistics(name):
        return ""
    return "--backbone_norm batch" if name.startswith(TIMM) else "--backbone_norm group"


def fitting_norm(config: ModelConfig, asked: Collection[str]) -> ModelConfig:
    """``config`` with a normalisation that its backbone has: a preset's trainable batch norm means nothing to a backbone
    that the user named and that has none. Said; one that was ``asked`` for is never replaced."""
    if "backbone" not in asked or "backbone_norm" in asked or config.backbone_norm == "frozen" or \
            has_statistics(config.backbone):
        return config
    distributed.say(f"{config.backbone} has no batch norms: the preset's --backbone_norm {config.backbone_norm} is left "
                    f"out")
    return dataclasses.replace(config, backbone_norm="frozen")


def has_statistics(name: str) -> bool:
    """Whether a backbone's normalisation keeps statistics of batches, which must not be frozen while they are random."""
    return timm_model.has_batch_norm(name) if name.startswith(TIMM) else name in resnet.SIZES


def statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of RGB in 0..1 that a backbone's published weights were trained with, where these are
    others than ImageNet's."""
    return timm_model.statistics(name) if name.startswith(TIMM) else None


def has_pretrained(name: str) -> bool:
    """Whether somebody's weights of a backbone are known and may be fetched without being asked for: as published,
    training a ResNet, or a PVT, begins with them."""
    return name in IMAGENET_URLS


def pretrained(name: str) -> tuple[dict[str, Any], str]:
    """The published weights of a backbone, fetched where they are not in the cache, and where they come from."""
    if name.startswith(TIMM):
        return timm_model.pretrained(name)
    if name not in IMAGENET_URLS:
        raise ValueError(f"no ImageNet weights are known for backbone {name}; there are some for "
                         f"{', '.join(IMAGENET_URLS)}, and for most of timm's")
    return checkpoint.load(IMAGENET_URLS[name])["model"], IMAGENET_URLS[name]


def channels(backbone: nn.Module) -> list[int]:
    """Channels of the maps that a ``Backbone`` gives."""
    return backbone.channels                                                                # type: ignore[return-value]


def backbone_of(model: nn.Module) -> Backbone:
    """The backbone inside a detector, a mask model or not."""
    return getattr(model, "detr", model).backbone[0]                                        # type: ignore[return-value]


def body_of(model: nn.Module) -> nn.Module:
    """The backbone's body inside a detector."""
    return backbone_of(model).body


def freeze(backbone: Backbone, stages: int, lr_backbone: float) -> None:
    """Fix the first ``stages`` of a backbone, the stem with the first; or all of it where its learning rate is 0."""
    if stages >= len(backbone.body.stages) and lr_backbone > 0:
        raise ValueError(f"--frozen_stages {stages} would freeze all of the backbone, of which "
                         f"{len(backbone.body.stages)} stages are used: give fewer, or say so with --lr_backbone 0")
    backbone.frozen_stages = stages
    fixed = tuple(prefix for stage in backbone.body.stages[:stages] for prefix in stage)
    for name, parameter in backbone.body.named_parameters():
        if lr_backbone <= 0 or name.startswith(fixed):
            parameter.requires_grad_(False)
