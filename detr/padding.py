"""Exact padding: layers whose result for an image in a padded batch is their result for the image alone.

A batch holds images of several sizes at the top left of one tensor. Alone, an image ends at its border, and a layer that
reads past the border reads zeros, which is how PyTorch pads. So a layer is exact when what lies outside an image's
extent is zero before the layer reads it, and when the extent of its output follows from the layer's own formula: the
positions inside then see the same numbers in both cases. A layer makes the zeros its neighbours left into something else
(its bias, at least), so they are set anew before each layer that looks past the border.

An extent is ``(height, width)`` of one image in the tensor at hand; ``sizes`` has one for each image of the batch.
Only position-wise layers (1x1 convolutions, linear layers, layer norm, batch norm with fixed statistics, activations)
need none of this.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]
Windowed = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d


def conv_size(length: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Positions that a convolution or a pooling gives for ``length`` positions: floor((n + 2p - d(k - 1) - 1) / s) + 1.

    At least 1: an image that is smaller than the kernel, which the layer refuses when the image is alone, keeps one
    position in a batch. Images are padded to 32 pixels a side before they come here, so that this does not occur in
    backbones of stride 32.
    """
    return max((length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1, 1)


def layer_sizes(layer: Windowed, sizes: Sequence[Size]) -> list[Size]:
    """The extents after ``layer``, a ``Conv2d``, ``MaxPool2d`` or ``AvgPool2d``, for the extents before it."""
    if isinstance(layer.padding, str):
        raise ValueError(f"{layer} has padding {layer.padding!r}; exact padding needs it in numbers")
    if getattr(layer, "ceil_mode", False) or getattr(layer, "padding_mode", "zeros") != "zeros":
        raise ValueError(f"{layer} cannot be padded exactly: use ceil_mode=False and padding_mode='zeros', "
                         f"or --padding legacy")
    (kh, kw), (sh, sw), (ph, pw) = (_pair(x) for x in (layer.kernel_size, layer.stride, layer.padding))
    dh, dw = _pair(getattr(layer, "dilation", 1))               # average pooling has none
    return [(conv_size(h, kh, sh, ph, dh), conv_size(w, kw, sw, pw, dw)) for h, w in sizes]


def _pair(value: int | tuple[int, ...]) -> Size:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def check_sizes(x: Tensor, sizes: Sequence[Size]) -> list[Size]:
    """``sizes`` as a list of pairs; ValueError unless there is one for each image of ``x [B, C, H, W]``, inside it."""
    if len(sizes) != len(x):
        raise ValueError(f"{len(sizes)} sizes for a batch of {len(x)} images {list(x.shape)}; give one (height, width) "
                         f"for each image")
    for i, (h, w) in enumerate(sizes):
        if not (1 <= h <= x.shape[-2] and 1 <= w <= x.shape[-1]):
            raise ValueError(f"size {i} is ({h}, {w}), outside 1..{x.shape[-2]}, 1..{x.shape[-1]} of the batch "
                             f"{list(x.shape)}; sizes are (height, width) of the images without padding")
    return [(int(h), int(w)) for h, w in sizes]


def unpadded(sizes: Sequence[Size], height: int, width: int) -> bool:
    """Whether every image fills a tensor of ``height`` and ``width``, so that there is nothing to do."""
    return all(size == (height, width) for size in sizes)


def valid_mask(sizes: Sequence[Size], height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """bool ``[B, height, width]``, True inside each image's extent: the opposite of a padding mask."""
    hw = torch.tensor(sizes, device=device)
    rows = torch.arange(height, device=device) < hw[:, :1]
    columns = torch.arange(width, device=device) < hw[:, 1:]
    return rows[:, :, None] & columns[:, None]


def _inside(x: Tensor, sizes: Sequence[Size]) -> Tensor:
    """The valid mask of ``x [B, C, H, W]``, as ``[B, 1, H, W]``."""
    return valid_mask(sizes, x.shape[-2], x.shape[-1], x.device)[:, None]


def fill_outside(x: Tensor, sizes: Sequence[Size], value: float) -> Tensor:
    """``x [B, C, H, W]`` with ``value`` outside the extents, whatever was there (NaN too); ``x`` itself is left as it
    is, and comes back where nothing is outside."""
    if unpadded(sizes, x.shape[-2], x.shape[-1]):
        return x
    return torch.where(_inside(x, sizes), x, x.new_full((), value))


def zero_outside(x: Tensor, sizes: Sequence[Size]) -> Tensor:
    """``x [B, C, H, W]`` with zeros outside the extents: what a layer reads past the border of an image alone."""
    return fill_outside(x, sizes, 0.0)


class Where(NamedTuple):
    """Where the images are in maps of one resolution, worked out once for all layers there."""
    sizes: list[Size]
    shape: Size                         # height and width of the maps
    device: torch.device
    outside: Tensor | None              # bool [B, 1, H, W], True outside the extents; None where nothing is outside

    @classmethod
    def of(cls, sizes: Sequence[Size], shape: Size, device: torch.device) -> Where:
        nothing = unpadded(sizes, *shape)
        return cls(list(sizes), shape, device, None if nothing else ~valid_mask(sizes, *shape, device)[:, None])


def where(x: Tensor, sizes: Sequence[Size] | None) -> Where | None:
    """Where the images are in ``x [B, C, H, W]``; None where padding is to be taken for a part of them (no ``sizes``)."""
    return None if sizes is None else Where.of(sizes, (x.shape[-2], x.shape[-1]), x.device)


def through(layer: Windowed, at: Where | None) -> Where | None:
    """Where the images are after ``layer``."""
    if at is None:
        return None
    sizes, shape = layer_sizes(layer, at.sizes), layer_sizes(layer, [at.shape])[0]
    return at if (sizes, shape) == (at.sizes, at.shape) else Where.of(sizes, shape, at.device)


def zeroed(x: Tensor, at: Where | None) -> Tensor:
    """``zero_outside`` with what is known of the resolution of ``x [B, C, H, W]``."""
    return x if at is None or at.outside is None else x.masked_fill(at.outside, 0.0)


def normalised(norm: nn.Module, x: Tensor, at: Where | None) -> Tensor:
    """``norm`` of ``x [B, C, H, W]``: group normalisation, and batch normalisation in training, by the statistics inside
    the extents; any other as it is."""
    if at is None or at.outside is None:
        return norm(x)
    if isinstance(norm, nn.GroupNorm):
        return masked_group_norm(x, norm, at.sizes)
    if isinstance(norm, nn.BatchNorm2d) and norm.training:
        return masked_batch_norm(x, norm, at)
    return norm(x)


def exact_conv(conv: nn.Conv2d, x: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, list[Size]]:
    """``conv`` of ``x [B, C, H, W]`` and the extents of its output, which is arbitrary outside of them.

    The input is set to zero outside the extents only where the convolution is padded: without padding, no output
    inside the extent reads past the border.
    """
    out = layer_sizes(conv, sizes)
    return conv(x if conv.padding == (0, 0) else zero_outside(x, sizes)), out


def exact_max_pool(pool: nn.MaxPool2d, x: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, list[Size]]:
    """``pool`` of ``x [B, C, H, W]`` and the extents of its output. Maximum pooling pads with -inf, not with zero."""
    out = layer_sizes(pool, sizes)
    return pool(fill_outside(x, sizes, float("-inf")) if max(_pair(pool.padding)) > 0 else x), out


def exact_avg_pool(pool: nn.AvgPool2d, x: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, list[Size]]:
    """``pool`` of ``x [B, C, H, W]`` and the extents of its output, which counts the zeros past the border, or does
    not (``count_include_pad=False``), there as here."""
    out = layer_sizes(pool, sizes)
    if max(_pair(pool.padding)) == 0:
        return pool(x), out
    x = zero_outside(x, sizes)
    if pool.count_include_pad or pool.divisor_override:
        return pool(x), out
    window = (pool.kernel_size, pool.stride, pool.padding)
    share = F.avg_pool2d(_inside(x, sizes).to(x.dtype), *window)            # of each window, how much lies inside
    return F.avg_pool2d(x, *window) / share.masked_fill(share == 0, 1), out


def masked_group_norm(x: Tensor, norm: nn.GroupNorm, sizes: Sequence[Size]) -> Tensor:
    """``norm`` of ``x [B, C, H, W]`` with the statistics of the positions inside each image's extent; outside, the
    result is arbitrary but finite."""
    if unpadded(sizes, x.shape[-2], x.shape[-1]):
        return norm(x)
    valid = _inside(x, sizes)[:, None]                                                      # [B, 1, 1, H, W]
    values = zero_outside(x, sizes).unflatten(1, (norm.num_groups, -1))                     # [B, G, C/G, H, W]
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    count = valid.sum((1, 2, 3, 4), keepdim=True) * values.shape[2]
    centred = (values - values.sum((2, 3, 4), keepdim=True) / count) * valid
    variance = centred.square().sum((2, 3, 4), keepdim=True) / count
    out = (centred * (variance + norm.eps).rsqrt()).flatten(1, 2).to(x.dtype)
    return out if norm.weight is None else out * norm.weight[:, None, None] + norm.bias[:, None, None]


def masked_batch_norm(x: Tensor, norm: nn.BatchNorm2d, at: Where) -> Tensor:
    """``norm`` of ``x [B, C, H, W]`` in training, with the statistics of the positions inside the extents of all images,
    which its running statistics follow; outside, the result is arbitrary but finite."""
    exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    count = sum(h * w for h, w in at.sizes)
    mean = zeroed(exact, at).sum((0, 2, 3)) / count
    centred = exact - mean[:, None, None]
    variance = zeroed(centred, at).square().sum((0, 2, 3)) / count
    if norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            batches = norm.num_batches_tracked.add_(1)                                          # type: ignore[union-attr]
            weight = 1 / float(batches) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
            norm.running_var.lerp_((variance * count / max(count - 1, 1)).to(norm.running_var.dtype), weight)
    scale = (variance + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    out = centred * scale[:, None, None]
    return (out if norm.bias is None else out + norm.bias[:, None, None]).to(x.dtype)


def adaptive_average(lengths: Sequence[int], length: int, bins: int, like: Tensor) -> Tensor:
    """Adaptive average pooling of one axis as matrices ``[B, bins, length]``, one for each image: row i averages the
    positions from floor(i n / bins) to ceil((i + 1) n / bins) of its own n ``lengths``. On the device of ``like``, in
    its dtype."""
    n = torch.tensor(lengths)[:, None]
    i = torch.arange(bins)
    start, end = (i * n) // bins, -(-(i + 1) * n // bins)                                   # [B, bins]
    at = torch.arange(length)
    inside = (at >= start[..., None]) & (at < end[..., None])
    return (inside.double() / (end - start)[..., None]).to(like.device, like.dtype)


def exact_adaptive_avg_pool(x: Tensor, sizes: Sequence[Size], bins: Size) -> Tensor:
    """Adaptive average pooling of ``x [B, C, H, W]`` over each image's own extent to ``[B, C, *bins]``."""
    if unpadded(sizes, x.shape[-2], x.shape[-1]):
        return F.adaptive_avg_pool2d(x, bins)
    rows = adaptive_average([h for h, _ in sizes], x.shape[-2], bins[0], x)
    columns = adaptive_average([w for _, w in sizes], x.shape[-1], bins[1], x)
    return rows[:, None] @ zero_outside(x, sizes) @ columns[:, None].mT


def exact_upsample(x: Tensor, sizes: Sequence[Size], finer: Sequence[Size], size: Size) -> Tensor:
    """Each image of ``x [B, C, H, W]``, of extent ``sizes[i]``, by nearest neighbour to ``finer[i]``: ``[B, C, *size]``,
    zero outside. PyTorch's own would follow the ratio of the padded sizes, which is another for each batch. B may be a
    multiple of the number of images: as many maps of each, one image after the other."""
    maps = x.unflatten(0, (len(sizes), -1))
    return torch.cat([F.pad(F.interpolate(one[..., :h, :w], to, mode="nearest"),
                            (0, size[1] - to[1], 0, size[0] - to[0]))
                      for one, (h, w), to in zip(maps, sizes, finer)])
