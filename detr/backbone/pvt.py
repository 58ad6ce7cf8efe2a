"""Pyramid vision transformers (Wang et al., 2021: "Pyramid Vision Transformer"; 2022: "PVT v2"), with the parameter names
of the published detection models.

Four stages: each embeds patches of the map before it, then attends within its own resolution. Keys and values are taken
from a map reduced by ``reductions`` (a strided convolution), in ``pvt_v2_b2_li`` from an average over 7 x 7 cells. v1 has
position embeddings and no last norm; v2 overlapping patches, a depthwise convolution in each MLP and a norm a stage.
Dropout is 0 in all published models, and there is none here; stochastic depth is active in training.

Both are exact in padded batches when they are told the images' sizes (see ``detr.padding``). v1 needs little for it: its
patches and reductions do not overlap, so that none inside an image reads past the image.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..padding import Size as Extent
from ..padding import Window, adaptive_average, check_sizes, unpadded, valid_mask, where, zeroed
from ..transfer import on_device

CELLS = 7                       # of the linear attention's average pooling, a side
PRETRAINED = (56, 28, 14, 7)    # sides of v1's position embeddings: images of 224 x 224


@dataclass(frozen=True)
class Size:
    """Of each stage: blocks, channels, heads, hidden channels of the MLP by channels. ``linear`` is PVT v2's attention
    to an average of 7 x 7 cells; ``drop_path`` the published rate of stochastic depth in detection."""
    depths: tuple[int, ...]
    channels: tuple[int, ...] = (64, 128, 320, 512)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    ratios: tuple[int, ...] = (8, 8, 4, 4)
    linear: bool = False
    drop_path: float = 0.1
    reductions: tuple[int, ...] = (8, 4, 2, 1)


SIZES = {
    "pvt_tiny": Size((2, 2, 2, 2)),
    "pvt_small": Size((3, 4, 6, 3)),
    "pvt_medium": Size((3, 4, 18, 3), drop_path=0.0),
    "pvt_large": Size((3, 8, 27, 3), drop_path=0.0),
}
SIZES_V2 = {
    "pvt_v2_b0": Size((2, 2, 2, 2), channels=(32, 64, 160, 256)),
    "pvt_v2_b1": Size((2, 2, 2, 2)),
    "pvt_v2_b2": Size((3, 4, 6, 3)),
    "pvt_v2_b2_li": Size((3, 4, 6, 3), linear=True),
    "pvt_v2_b3": Size((3, 4, 18, 3)),
    "pvt_v2_b4": Size((3, 8, 27, 3)),
    "pvt_v2_b5": Size((3, 6, 40, 3), ratios=(4, 4, 4, 4)),
}


class Grid(NamedTuple):
    """How the tokens ``[B, S, D]`` of a stage lie in the plane, S = ``height`` x ``width``, and which are padding. What
    is None is not needed: the batch has no padding, or the stage's attention is of another kind."""
    height: int
    width: int
    outside: Tensor | None = None                               # int64: padded tokens, counted over the batch's B * S
    keys: Tensor | None = None                                  # bool [B, 1, 1, reduced S]: the keys to attend to
    cells: tuple[Tensor, Tensor] | None = None                  # [B, 7, height], [B, 7, width]: average of the cells


def make_grid(x: Tensor, height: int, width: int, sizes: Sequence[Extent] | None, reduction: int, linear: bool) -> Grid:
    """The grid of tokens ``x [B, height * width, D]`` with the extents ``sizes`` (None: no padding)."""
    if sizes is None or unpadded(sizes, height, width):
        return Grid(height, width)
    outside = on_device((~valid_mask(sizes, height, width)).flatten().nonzero()[:, 0], x.device)
    if linear:
        rows, columns = zip(*sizes)
        return Grid(height, width, outside, cells=(adaptive_average(rows, height, CELLS, x),
                                                   adaptive_average(columns, width, CELLS, x)))
    window = Window((reduction, reduction), (reduction, reduction))
    keys = valid_mask(window.sizes(sizes), *window.sizes([(height, width)])[0], x.device)
    return Grid(height, width, outside, keys.flatten(1)[:, None, None])


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """``[B, S, D]`` -> ``[B, D, H, W]``, the same memory: channels last."""
    return tokens.transpose(1, 2).unflatten(2, (grid.height, grid.width))


def to_tokens(x: Tensor) -> Tensor:
    """``[B, D, H, W]`` -> ``[B, S, D]``."""
    return x.flatten(2).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
    """PyTorch's fused attention of ``q [B, M, S, D/M]`` to the keys that ``keys`` admits."""
    if q.device.type != "cpu" or q.dtype == torch.float64:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
    # PyTorch's fused attention on CPUs is up to five times as fast in float32 as in bfloat16.
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=keys).to(q.dtype)


class Attention(nn.Module):
    """Multi-head attention of a stage's tokens to all of them; the kinds below attend to fewer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        """``[B, S, D]`` -> the tokens ``[B, reduced S, D]`` that keys and values come from."""
        return x

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)                       # [B, M, S, D/M]
        k, v = self.kv(self.reduce(x, grid)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, grid.keys).transpose(1, 2).flatten(2))


class SpatialReductionAttention(Attention):
    """Keys and values from a map reduced by a convolution with kernel and stride ``reduction`` (PVT, section 3.3).

    A reduced token inside the reduced extent, floor(n / reduction), is made of tokens inside alone; the others are
    masked as keys. So nothing has to be set to zero.
    """

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__(dim, heads)
        self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction)
        self.norm = nn.LayerNorm(dim)

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        return self.norm(to_tokens(self.sr(to_map(x, grid))))


class LinearAttention(Attention):
    """Keys and values from averages over 7 x 7 cells of the image, whatever its size (PVT v2, section 3.2)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        if grid.cells is None:
            x = F.adaptive_avg_pool2d(to_map(x, grid), CELLS)
        else:                                                   # rows, then columns, with the channels last
            rows, columns = grid.cells
            x = (rows.to(x.dtype) @ x.unflatten(1, (grid.height, grid.width)).flatten(2)).unflatten(2, (grid.width, -1))
            x = (columns[:, None].to(x.dtype) @ x).permute(0, 3, 1, 2)
        return F.gelu(self.norm(to_tokens(self.sr(x))))


class Mlp(nn.Module):
    """v1's feed-forward block."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ConvolutionalMlp(nn.Module):
    """v2's feed-forward block, with a depthwise 3x3 convolution, which looks past the border (PVT v2, section 3.3); in
    the linear models a ReLU stands before it."""

    def __init__(self, dim: int, hidden: int, linear: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.relu = nn.ReLU() if linear else nn.Identity()
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)})
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        batch = len(x)
        x = self.fc1(x.flatten(0, 1))
        if grid.outside is not None:            # in place and by index: the widest tensor of all is not passed over
            x = x.index_fill_(0, grid.outside, 0.0)
        x = self.dwconv["dwconv"](to_map(self.relu(x).unflatten(0, (batch, -1)), grid))
        return self.fc2(F.gelu(to_tokens(x)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training, drops the whole branch of an image with probability ``rate``
    and scales what stays."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * (x.new_empty(len(x), *(1,) * (x.ndim - 1)).bernoulli_(keep) / keep)


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and beside a shortcut."""

    def __init__(self, dim: int, attention: Attention, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class PatchEmbedding(nn.Module):
    """A convolution and a norm: v1's patches are cut side by side, v2's overlap (``pad`` > 0)."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int, pad: int = 0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride, pad)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, sizes: Sequence[Extent] | None) -> tuple[Tensor, int, int, list[Extent] | None]:
        """``x [B, C, H, W]`` with extents ``sizes``, zero outside where patches overlap -> tokens, height, width, and
        extents there."""
        x = self.proj(x)
        return self.norm(to_tokens(x)), *x.shape[-2:], None if sizes is None else Window.of(self.proj).sizes(sizes)


def attention_of(size: Size, stage: int) -> Attention:
    """The attention of a stage, counted from 0."""
    dim, heads, reduction = size.channels[stage], size.heads[stage], size.reductions[stage]
    if size.linear:
        return LinearAttention(dim, heads)
    return SpatialReductionAttention(dim, heads, reduction) if reduction > 1 else Attention(dim, heads)


def decay(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth of each block of each stage: from 0 in the first to ``rate`` in the last, linearly."""
    total = sum(depths)
    return [[rate * (sum(depths[:i]) + j) / max(total - 1, 1) for j in range(depth)] for i, depth in enumerate(depths)]


def refuse(name: str, norm: str, dilation: bool) -> None:
    """ValueError for options of convolutional backbones, which would otherwise be ignored."""
    if norm != "frozen":
        raise ValueError(f"--backbone_norm {norm} has no meaning for {name}, which has layer norms alone: leave it out, "
                         f"or use --backbone resnet50")
    if dilation:
        raise ValueError(f"--dilation needs convolutional stages, which {name} does not have: leave it out, or use "
                         f"--backbone resnet50 or resnet101")


def begin(images: Tensor, sizes: Sequence[Extent] | None, smallest: int) -> tuple[Tensor, list[Extent] | None]:
    """The images with zeros outside their ``sizes``, and these, checked."""
    checked = None if sizes is None else check_sizes(images, sizes)
    for i, (h, w) in enumerate([tuple(images.shape[-2:])] if checked is None else checked):
        if min(h, w) < smallest:
            raise ValueError(f"image {i} is {h} x {w}, and a spatial reduction of this backbone would have no token of "
                             f"it: pad images to at least 32 pixels a side first, alone and in batches")
    return zeroed(images, where(images, checked)), checked


def end(x: Tensor, grid: Grid) -> Tensor:
    """A stage's tokens ``[B, S, D]`` as its map, with zeros where there is no image: v2's overlapping patches of the next
    stage read them."""
    if grid.outside is not None:
        x = x.flatten(0, 1).index_fill(0, grid.outside, 0.0).view_as(x)
    return to_map(x, grid)


class Pyramid(nn.Module):
    """What v1 and v2 share: four stages and the way through them."""
    exact, inexact, only = True, "", None
    first_layer = "patch_embed1.proj.weight"
    size: Size
    channels: list[int]
    strides: list[int]
    stages: list[tuple[str, ...]]           # names of each stage's parts, as they begin in a file
    classifier: tuple[str, ...]             # in classification files only
    smallest: int                           # pixels a side; the reductions need a token

    def enter(self, stage: int, x: Tensor, grid: Grid, sizes: Sequence[Extent] | None) -> Tensor:
        """Patches ``[B, S, D]`` on their way into the blocks."""
        return x

    def leave(self, stage: int, x: Tensor) -> Tensor:
        """Tokens ``[B, S, D]`` on their way out of the blocks."""
        return x

    def unused(self, maps: Sequence[int]) -> list[str]:
        """Parameters that none of these maps depends on, once ``keep`` has dropped the stages behind them: none."""
        return []

    def renamed(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A classification file's tensors, whose names are ours, and what it has under others: nothing."""
        return state_dict, []

    def keep(self, maps: int) -> None:
        """Drop the stages after the first ``maps``; files have them all the same."""
        dropped = [prefix for stage in self.stages[maps:] for prefix in stage]
        self.classifier = (*self.classifier, *dropped)
        for prefix in dropped:
            delattr(self, prefix.removesuffix("."))
        del self.channels[maps:], self.strides[maps:], self.stages[maps:]

    def extents(self, size: Extent) -> list[Extent]:
        """(height, width) of each map of an image of ``size``, by the formula of each patch embedding."""
        extents = [size]
        for i in range(len(self.stages)):
            extents += Window.of(getattr(self, f"patch_embed{i + 1}").proj).sizes(extents[-1:])
        return extents[1:]

    def forward(self, images: Tensor, sizes: Sequence[Extent] | None = None) -> list[Tensor]:
        """``images [B, C, H, W]`` -> the map of each stage. Without ``sizes`` the published computation, which takes
        padding for a part of the image.

        ``sizes`` are (height, width) of the images in the batch, whatever lies outside: each image's maps are then those
        of the image alone inside ``extents(size)``, and arbitrary, but finite, outside. ValueError for sides below
        ``smallest``.
        """
        x, sizes = begin(images, sizes, self.smallest)
        maps = []
        for i in range(len(self.stages)):
            x, height, width, sizes = getattr(self, f"patch_embed{i + 1}")(x, sizes)
            grid = make_grid(x, height, width, sizes, self.size.reductions[i], self.size.linear)
            x = self.enter(i, x, grid, sizes)
            for block in getattr(self, f"block{i + 1}"):
                x = block(x, grid)
            x = end(self.leave(i, x), grid)
            maps.append(x)
        return maps


class PyramidVisionTransformer(Pyramid):
    """PVT v1; returns the map of each stage: a list of ``[B, channels[i], H / strides[i], W / strides[i]]``, rounded
    down at each stage.

    The last position embedding begins with the class token's, as published, which detection does not use. ``norm``
    and ``dilation`` are what every family is asked for, and have to stay as they are.
    """
    classifier = ("cls_token", "norm.weight", "norm.bias", "head.weight", "head.bias")
    smallest = 32

    def __init__(self, name: str, norm: str = "frozen", dilation: bool = False, in_channels: int = 3,
                 drop_path_rate: float | None = None) -> None:
        super().__init__()
        refuse(name, norm, dilation)
        self.size = size = SIZES[name]
        self.channels, self.strides = list(size.channels), [4, 8, 16, 32]
        self.stages = [(f"patch_embed{i}.", f"pos_embed{i}", f"block{i}.") for i in (1, 2, 3, 4)]
        rates = decay(size.drop_path if drop_path_rate is None else drop_path_rate, size.depths)
        for i, (dim, ratio, side) in enumerate(zip(size.channels, size.ratios, PRETRAINED)):
            patch = 2 if i else 4
            embedding = torch.empty(1, side * side + (i == 3), dim)
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(nn.init.trunc_normal_(embedding, std=0.02)))
            setattr(self, f"patch_embed{i + 1}",
                    PatchEmbedding(size.channels[i - 1] if i else in_channels, dim, patch, patch))
            setattr(self, f"block{i + 1}", nn.ModuleList(
                Block(dim, attention_of(size, i), Mlp(dim, ratio * dim), rate) for rate in rates[i]))
        for module in self.modules():                           # convolutions keep PyTorch's, as published
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def enter(self, stage: int, x: Tensor, grid: Grid, sizes: Sequence[Extent] | None) -> Tensor:
        return x + self.positions(stage, grid, sizes)

    def positions(self, stage: int, grid: Grid, sizes: Sequence[Extent] | None) -> Tensor:
        """The position embedding ``[1 or B, S, D]`` of a stage, interpolated to the map or, exactly, to each image's
        own extent.

        As published, a map of 56 * 56 tokens of whatever shape (28 x 112, 49 x 64) has the first stage's embedding as it
        is, row after row; so it has without ``sizes``. The published later stages fail at that number of tokens; here
        they interpolate.
        """
        side, embedding = PRETRAINED[stage], getattr(self, f"pos_embed{stage + 1}")
        embedding = embedding[:, -side * side:]                 # all but the class token's
        if sizes is None and stage == 0 and grid.height * grid.width == side * side:
            return embedding
        embedding = embedding.transpose(1, 2).unflatten(2, (side, side))
        extents = [(grid.height, grid.width)] if grid.outside is None or sizes is None else sizes
        resized = {extent: F.interpolate(embedding, extent, mode="bilinear") for extent in set(extents)}
        return to_tokens(torch.cat([F.pad(resized[h, w], (0, grid.width - w, 0, grid.height - h)) for h, w in extents]))


class PyramidVisionTransformerV2(Pyramid):
    """PVT v2; returns the map of each stage: a list of ``[B, channels[i], H / strides[i], W / strides[i]]``, rounded up.

    ``norm`` and ``dilation`` are what every family is asked for, and have to stay as they are.
    """
    classifier = ("head.weight", "head.bias")

    def __init__(self, name: str, norm: str = "frozen", dilation: bool = False, in_channels: int = 3,
                 drop_path_rate: float | None = None) -> None:
        super().__init__()
        refuse(name, norm, dilation)
        self.size = size = SIZES_V2[name]
        self.smallest = 1 if size.linear else 29
        self.channels, self.strides = list(size.channels), [4, 8, 16, 32]
        self.stages = [(f"patch_embed{i}.", f"block{i}.", f"norm{i}.") for i in (1, 2, 3, 4)]
        rates = decay(size.drop_path if drop_path_rate is None else drop_path_rate, size.depths)
        for i, (dim, ratio) in enumerate(zip(size.channels, size.ratios)):
            setattr(self, f"patch_embed{i + 1}", PatchEmbedding(size.channels[i - 1], dim, 3, 2, pad=1) if i else
                    PatchEmbedding(in_channels, dim, 7, 4, pad=3))
            setattr(self, f"block{i + 1}", nn.ModuleList(
                Block(dim, attention_of(size, i), ConvolutionalMlp(dim, ratio * dim, size.linear), rate)
                for rate in rates[i]))
            setattr(self, f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(module.bias)                                                 # type: ignore[arg-type]

    def leave(self, stage: int, x: Tensor) -> Tensor:
        return getattr(self, f"norm{stage + 1}")(x)
