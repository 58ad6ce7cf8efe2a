"""Exact padding: layers whose result for an image in a padded batch is their result for the image alone.

A batch holds images of several sizes at the top left of one tensor. Alone, an image ends at its border, and a layer that
reads past the border reads zeros, which is how PyTorch pads. So a layer is exact when what lies outside an image's
extent is zero before the layer reads it, and when the extent of its output follows from the layer's own formula: the
positions inside then see the same numbers in both cases. A layer makes the zeros its neighbours left into something else
(its bias, at least), so they are set anew before each layer that looks past the border.

An extent is ``(height, width)`` of one image in the tensor at hand; ``sizes`` has one for each image of the batch. In a
model that is exported they are inputs, an int64 tensor ``[B, 2]``: the formulas are the same, and no question about them
has an answer, so that nothing is left out where nothing is padded.
Only position-wise layers (1x1 convolutions, linear layers, layer norm, batch norm with fixed statistics, activations)
need none of this.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transfer import on_device

Size = tuple[int, int]
Sizes = Sequence[Size] | Tensor         # pairs; or [B, 2], see above


def at_least(least: int, number: Any) -> Any:
    """The greater of both, where ``number`` may be a tensor, too, or unknown while a model is exported."""
    if isinstance(number, int):
        return max(number, least)
    return number.clamp(min=least) if isinstance(number, Tensor) else torch.sym_max(number, least)


def pair(value: int | Sequence[int]) -> Size:
    """(rows, columns) of a layer's option, which PyTorch takes as one number for both, too."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


class Window(NamedTuple):
    """What a convolution or a pooling reads for each of its outputs: numbers of positions, (rows, columns) each."""
    kernel: Size
    stride: Size = (1, 1)
    padding: Size = (0, 0)
    dilation: Size = (1, 1)
    ceil: bool = False          # a last window that is not whole counts, too

    @classmethod
    def of(cls, layer: nn.Conv2d | nn.MaxPool2d) -> Window:
        """The window of ``layer``. ValueError where it is padded by something else than a number of zeros (of -inf, in
        pooling)."""
        if isinstance(layer.padding, str):
            raise ValueError(f"{layer} has padding {layer.padding!r}; exact padding needs it in numbers")
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            raise ValueError(f"{layer} cannot be padded exactly: use padding_mode='zeros', or --padding legacy")
        return cls(pair(layer.kernel_size), pair(layer.stride), pair(layer.padding), pair(layer.dilation),
                   getattr(layer, "ceil_mode", False))                                      # a convolution has none

    @overload
    def sizes(self, sizes: Tensor) -> Tensor: ...

    @overload
    def sizes(self, sizes: Sequence[Size]) -> list[Size]: ...

    def sizes(self, sizes: Sizes) -> Tensor | list[Size]:
        """The extents of the outputs, for those of the inputs."""
        if isinstance(sizes, Tensor):
            return torch.stack([self.length(sizes[:, axis], axis) for axis in (0, 1)], dim=1)
        return [(self.length(h, 0), self.length(w, 1)) for h, w in sizes]

    def length(self, n: Any, axis: int) -> Any:
        """Outputs for ``n`` positions along the rows (``axis`` 0) or columns (1), by PyTorch's formula:
        floor((n + 2p - d(k - 1) - 1) / s) + 1, or with ceil.

        At least 1: an image that is smaller than the kernel, which the layer refuses when the image is alone, keeps one
        position in a batch. Images are padded to 32 pixels a side before they come here, so that this does not occur in
        backbones of stride 32.
        """
        kernel, stride, pad, dilation = (side[axis] for side in self[:4])
        room = n + 2 * pad - dilation * (kernel - 1) - 1
        out = (-(-room // stride) if self.ceil else room // stride) + 1
        if self.ceil:
            out = out - ((out - 1) * stride >= n + pad) * 1     # the last window has to begin inside
        return at_least(1, out)


def check_sizes(x: Tensor, sizes: Sizes) -> Any:
    """``sizes`` as a list of pairs; ValueError unless there is one for each image of ``x [B, C, H, W]``, inside it."""
    if isinstance(sizes, Tensor):
        return sizes
    if len(sizes) != len(x):
        raise ValueError(f"{len(sizes)} sizes for a batch of {len(x)} images {list(x.shape)}; give one (height, width) "
                         f"for each image")
    for i, (h, w) in enumerate(sizes):
        if not (1 <= h <= x.shape[-2] and 1 <= w <= x.shape[-1]):
            raise ValueError(f"size {i} is ({h}, {w}), outside 1..{x.shape[-2]}, 1..{x.shape[-1]} of the batch "
                             f"{list(x.shape)}; sizes are (height, width) of the images without padding")
    return [(int(h), int(w)) for h, w in sizes]


def unpadded(sizes: Sizes, height: int, width: int) -> bool:
    """Whether every image is known to fill a tensor of ``height`` and ``width``, so that there is nothing to do."""
    return not isinstance(sizes, Tensor) and all(size == (height, width) for size in sizes)


def valid_mask(sizes: Sizes, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """bool ``[B, height, width]``, True inside each image's extent: the opposite of a padding mask."""
    hw = on_device(sizes, device)
    rows = torch.arange(height, device=device) < hw[:, :1]
    columns = torch.arange(width, device=device) < hw[:, 1:]
    return rows[:, :, None] & columns[:, None]


class Where(NamedTuple):
    """Where the images are in maps of one resolution, worked out once for all layers there."""
    sizes: Any                          # list[Size]; or [B, 2], see above
    shape: Size                         # height and width of the maps
    device: torch.device
    outside: Tensor | None              # bool [B, 1, H, W], True outside the extents; None where nothing is outside

    @classmethod
    def of(cls, sizes: Sizes, shape: Size, device: torch.device) -> Where:
        outside = None if unpadded(sizes, *shape) else ~valid_mask(sizes, *shape, device)[:, None]
        return cls(sizes if isinstance(sizes, Tensor) else list(sizes), shape, device, outside)


def where(x: Tensor, sizes: Sizes | None) -> Where | None:
    """Where the images are in ``x [B, C, H, W]``; None where padding is to be taken for a part of them (no ``sizes``)."""
    return None if sizes is None else Where.of(sizes, (x.shape[-2], x.shape[-1]), x.device)


def through(layer: nn.Conv2d | nn.MaxPool2d, at: Where | None) -> Where | None:
    """Where the images are after ``layer``."""
    if at is None:
        return None
    window = Window.of(layer)
    sizes, shape = window.sizes(at.sizes), window.sizes([at.shape])[0]
    same = not isinstance(sizes, Tensor) and (sizes, shape) == (at.sizes, at.shape)
    return at if same else Where.of(sizes, shape, at.device)


def zeroed(x: Tensor, at: Where | None) -> Tensor:
    """``x [B, C, H, W]`` with zeros outside the extents, whatever was there (NaN too): what a layer reads past the border
    of an image alone. ``x`` itself is left as it is, and comes back where nothing is outside."""
    return x if at is None or at.outside is None else x.masked_fill(at.outside, 0.0)


def exact_conv(conv: nn.Conv2d, x: Tensor, sizes: Sizes) -> tuple[Tensor, Any]:
    """``conv`` of ``x [B, C, H, W]`` and the extents of its output, which is arbitrary outside of them.

    The input is set to zero outside the extents only where the convolution is padded: without padding, no output
    inside the extent reads past the border.
    """
    window = Window.of(conv)
    return conv(zeroed(x, where(x, sizes)) if max(window.padding) > 0 else x), window.sizes(sizes)


def normalised(norm: nn.Module, x: Tensor, at: Where | None) -> Tensor:
    """``norm`` of ``x [B, C, H, W]``: group normalisation, and batch normalisation in training, by the statistics inside
    the extents; any other as it is. Outside, the result is arbitrary, but finite where ``x`` is."""
    if at is None or at.outside is None:
        return norm(x)
    if isinstance(norm, nn.GroupNorm):
        return group_norm_inside(x, at, norm.num_groups, norm.weight, norm.bias, norm.eps)
    if isinstance(norm, nn.BatchNorm2d) and norm.training:
        momentum = norm.momentum
        if norm.num_batches_tracked is not None:
            batches = norm.num_batches_tracked.add_(1)
            momentum = 1 / float(batches) if momentum is None else momentum
        return batch_norm_inside(x, at, norm.running_mean, norm.running_var, norm.weight, norm.bias, momentum or 0.0,
                                 norm.eps)
    return norm(x)


def group_norm_inside(x: Tensor, at: Where, groups: int, weight: Tensor | None, bias: Tensor | None,
                      eps: float) -> Tensor:
    """``F.group_norm`` of ``x [B, C, H, W]``, some of it outside, by the positions inside each image's extent."""
    valid = ~at.outside[:, None]                                                            # [B, 1, 1, H, W]
    values = zeroed(x, at).unflatten(1, (groups, -1))                                       # [B, G, C/G, H, W]
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    count = valid.sum((1, 2, 3, 4), keepdim=True) * values.shape[2]
    centred = (values - values.sum((2, 3, 4), keepdim=True) / count) * valid
    variance = centred.square().sum((2, 3, 4), keepdim=True) / count
    out = (centred * (variance + eps).rsqrt()).flatten(1, 2).to(x.dtype)
    out = out if weight is None else out * weight[:, None, None]
    return out if bias is None else out + bias[:, None, None]


def batch_norm_inside(x: Tensor, at: Where, running_mean: Tensor | None, running_var: Tensor | None,
                      weight: Tensor | None, bias: Tensor | None, momentum: float, eps: float) -> Tensor:
    """``F.batch_norm`` in training of ``x [B, C, H, W]``, by the positions inside the extents of all images, which the
    running statistics follow."""
    exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    count = sum(h * w for h, w in at.sizes)
    mean = zeroed(exact, at).sum((0, 2, 3)) / count
    centred = exact - mean[:, None, None]
    variance = zeroed(centred, at).square().sum((0, 2, 3)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * count / max(count - 1, 1)).to(running_var.dtype), momentum)
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
    out = centred * scale[:, None, None]
    return (out if bias is None else out + bias[:, None, None]).to(x.dtype)


def adaptive_average(lengths: Sequence[int], length: int, bins: int, like: Tensor) -> Tensor:
    """Adaptive average pooling of one axis as matrices ``[B, bins, length]``, one for each image: row i averages the
    positions from floor(i n / bins) to ceil((i + 1) n / bins) of its own n ``lengths``. On the device of ``like``, in
    its dtype."""
    n = torch.tensor(lengths)[:, None]
    i = torch.arange(bins)
    start, end = (i * n) // bins, -(-(i + 1) * n // bins)                                   # [B, bins]
    at = torch.arange(length)
    inside = (at >= start[..., None]) & (at < end[..., None])
    return on_device(inside.double() / (end - start)[..., None], like.device, like.dtype)


def exact_upsample(x: Tensor, sizes: Any, finer: Any, size: Size) -> Tensor:
    """Each image of ``x [B, C, H, W]``, of extent ``sizes[i]``, by nearest neighbour to ``finer[i]``: ``[B, C, *size]``,
    zero outside. PyTorch's own would follow the ratio of the padded sizes, which is another for each batch."""
    if isinstance(sizes, Tensor):
        for axis in (0, 1):
            n, to = sizes[:, axis, None], torch.as_tensor(finer)[:, axis, None]
            nearest = (torch.arange(size[axis], device=x.device) * (n / to)).long()             # [B, H] or [B, W]
            nearest = torch.minimum(nearest, n - 1)[:, None, :, None].transpose(2, 2 + axis)
            x = x.gather(2 + axis, nearest.expand(*x.shape[:2 + axis], -1, *x.shape[3 + axis:]))
        return zeroed(x, Where.of(finer, size, x.device))
    resized, start = [], 0
    while start < len(sizes):                               # neighbours of one size (masks of an image) go together
        end = start
        while end < len(sizes) and (sizes[end], finer[end]) == (sizes[start], finer[start]):
            end += 1
        (h, w), to = sizes[start], finer[start]
        one = F.interpolate(x[start:end, :, :h, :w], to, mode="nearest")
        resized.append(F.pad(one, (0, size[1] - to[1], 0, size[0] - to[0])))
        start = end
    return torch.cat(resized)
