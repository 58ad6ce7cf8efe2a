"""Backbone maps -> the levels of multi-scale attention (Zhu et al., 2021, section A.2 and figure 4)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .nested_tensor import NestedTensor, resize_mask
from .padding import exact_conv, normalised, valid_mask, where
from .structures import FeatureLevels
from .transfer import on_device

GROUPS = 32                     # of the normalisation that closes each projection
FINEST_STRIDE = 8               # of the backbone's maps that become levels: C3 to C5 of a ResNet


def coarse_maps(strides: Sequence[int], num_levels: int, finest: int = FINEST_STRIDE) -> list[int]:
    """The backbone's maps that become levels where ``--feature_strides`` does not say: the coarsest ones, and none finer
    than ``finest``."""
    return [i for i, stride in enumerate(strides) if stride >= finest or i + 1 == len(strides)][-num_levels:]


def build_input_proj(channels: Sequence[int], num_levels: int, d_model: int) -> nn.ModuleList:
    """One projection to ``d_model`` channels a level, each closed by group normalisation: 1x1 convolutions of the
    backbone's maps, and for further levels 3x3 convolutions of stride 2."""
    if d_model % GROUPS:
        raise ValueError(f"--hidden_dim {d_model}: the levels' group normalisation has {GROUPS} groups, so it must "
                         f"divide by {GROUPS}")
    inputs = [*channels, channels[-1], *[d_model] * num_levels]         # the first further level sees the raw last map
    projections = []
    for i in range(num_levels):
        convolution = nn.Conv2d(inputs[i], d_model, kernel_size=1) if i < len(channels) else \
            nn.Conv2d(inputs[i], d_model, kernel_size=3, stride=2, padding=1)
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(convolution.bias)                                                        # type: ignore[arg-type]
        projections.append(nn.Sequential(convolution, nn.GroupNorm(GROUPS, d_model)))
    return nn.ModuleList(projections)


def project(input_proj: nn.ModuleList, features: Sequence[NestedTensor], images: NestedTensor) -> list[NestedTensor]:
    """The backbone's maps, finest first, through ``build_input_proj``'s projections: maps ``[B, D, H, W]``. Maps that
    know their images' sizes stay exact: padding takes no part in the normalisation or the further levels."""
    maps = [level(layer, x, x, images) for layer, x in zip(input_proj, features)]
    source = features[-1]
    for layer in list(input_proj)[len(features):]:
        source = level(layer, source, None, images)
        maps.append(source)
    return maps


def level(layer: Any, source: NestedTensor, like: NestedTensor | None, images: NestedTensor) -> NestedTensor:
    """One projection, convolution and normalisation, of ``source``; its mask is that of ``like``, or follows from the
    convolution's formula, or, where sizes are not known, from the mask of the ``images`` as published."""
    convolution, norm = layer
    if source.sizes is None:
        x = layer(source.tensors)
        mask = resize_mask(images, x.shape[-2:]) if like is None else like.mask
        return NestedTensor(x, mask, whole=source.whole)
    x, sizes = exact_conv(convolution, source.tensors, source.sizes)
    mask = ~valid_mask(sizes, x.shape[-2], x.shape[-1], x.device) if like is None else like.mask
    return NestedTensor(normalised(norm, x, where(x, sizes)), mask, sizes)


def flatten_levels(maps: Sequence[NestedTensor], positions: Sequence[Tensor], level_embed: Tensor) -> FeatureLevels:
    """Maps ``[B, D, H, W]`` and the encodings of their positions, and ``level_embed [L, D]``, which tells the levels
    apart -> one sequence of tokens."""
    position = [p.flatten(2).mT + level for p, level in zip(positions, level_embed)]
    # As published, the first row and column tell how much of a map is not padding.
    valid = torch.stack([torch.stack([(~x.mask[:, 0]).sum(1), (~x.mask[:, :, 0]).sum(1)], dim=-1) for x in maps], dim=1)
    shapes = [(x.mask.shape[1], x.mask.shape[2]) for x in maps]
    sizes = on_device([(w, h) for h, w in shapes], valid.device, torch.float32)
    return FeatureLevels(torch.cat([x.tensors.flatten(2).mT for x in maps], dim=1),
                         torch.cat([x.mask.flatten(1) for x in maps], dim=1), torch.cat(position, dim=1),
                         shapes, sizes, valid.clamp(min=1).float(), exact=maps[0].sizes is not None,
                         padded=any(x.padded for x in maps))


def level_of(tokens: Tensor, levels: FeatureLevels, index: int) -> Tensor:
    """The part of ``tokens [B, S, D]`` that is one level's, channels first: ``[B, D, H * W]``."""
    return tokens.split([h * w for h, w in levels.shapes], dim=1)[index].mT
