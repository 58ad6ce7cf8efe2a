"""Exact padding (see ``detr.padding``) of networks that were not written for it: each function of PyTorch that they call
is made exact, or refused, while they run."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .padding import Size, Where, Window, batch_norm_inside, group_norm_inside, pair, zeroed
from .transfer import on_device


class Inexact(Exception):
    """What a model does that is not known to be exact."""


class Exact(TorchFunctionMode):
    """Runs a network of convolutions so that each image of a padded batch has the result of the image alone.

    While it is active, every function of PyTorch that the network calls comes here first. Where one looks beyond a
    position, what it reads outside the images' extents is made what it would read past the border of an image alone; a
    function of single positions is called as it is; for any other ``Inexact`` is raised. So that no network passes whose
    functions are not all known. A map is known by its height and width: ``at`` has the extents of all resolutions so far,
    and ``windows`` how each came from the images.

    ``images`` are ``[B, C, H, W]``, finite outside their ``sizes``, and so are all maps: a gradient of zero there would
    turn what is not into NaN.
    """

    def __init__(self, images: Tensor, sizes: Sequence[Size]) -> None:
        super().__init__()
        shape = (images.shape[-2], images.shape[-1])
        self.at: dict[Size, Where] = {shape: Where.of(sizes, shape, images.device)}
        self.windows: dict[Size, list[Window]] = {shape: []}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        if name in SPATIAL:
            return SPATIAL[name](self, func, *args, **kwargs)
        if name in POSITIONS or name in VIEWS and not self.is_map(args[0]):
            return func(*args, **kwargs)
        raise Inexact(name)

    def find(self, x: Tensor) -> Where:
        """Where the images are in ``x [B, C, H, W]``. ``Inexact`` where it is of no resolution that is known."""
        at = self.at.get((x.shape[-2], x.shape[-1])) if x.ndim == 4 else None
        if at is None:
            raise Inexact(f"a tensor {list(x.shape)} that did not come from the images by windows")
        return at

    def is_map(self, x: Any) -> bool:
        """Whether ``x`` may have positions: not a parameter, nor one value an image and channel, ``[B, C, 1, 1]``."""
        return isinstance(x, Tensor) and not isinstance(x, nn.Parameter) and x.ndim > 2 and x.shape[-2:] != (1, 1)

    def read(self, x: Tensor, window: Window, outside: float) -> Tensor:
        """``x`` with the value ``outside`` the extents that ``window`` reads past the border of an image alone."""
        at = self.find(x)
        past_the_border = max(window.padding) > 0 or window.ceil
        return x.masked_fill(at.outside, outside) if past_the_border and at.outside is not None else x

    def write(self, x: Tensor, window: Window, out: Tensor) -> Tensor:
        """Note where the images are in ``out``, which ``window`` made of ``x``. ``Inexact`` where two resolutions could
        not be told apart."""
        shape, at = (out.shape[-2], out.shape[-1]), self.find(x)
        sizes = window.sizes(at.sizes)
        if window.sizes([at.shape]) != [shape] or self.at.get(shape, at).sizes != sizes and shape in self.at:
            raise Inexact(f"maps of {shape[0]} x {shape[1]} that came about in two ways")
        if shape not in self.at:
            self.at[shape] = Where.of(sizes, shape, at.device)
            self.windows[shape] = [*self.windows[at.shape], window]
        return out

    def conv2d(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
               dilation: Any = 1, groups: int = 1) -> Tensor:
        if isinstance(padding, str):
            raise Inexact(f"padding {padding!r}")
        window = Window((weight.shape[-2], weight.shape[-1]), pair(stride), pair(padding), pair(dilation))
        if window[:3] == ((1, 1), (1, 1), (0, 0)):
            return func(x, weight, bias, stride, padding, dilation, groups)
        return self.write(x, window, func(self.read(x, window, 0.0), weight, bias, stride, padding, dilation, groups))

    def max_pool2d(self, func: Any, x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
                   ceil_mode: bool = False, return_indices: bool = False) -> Tensor:
        window = Window(pair(kernel_size), pair(stride or kernel_size), pair(padding), pair(dilation), ceil_mode)
        values = self.read(x, window, float("-inf"))
        out = self.write(x, window, func(values, kernel_size, stride, padding, dilation, ceil_mode))
        return out if values is x else zeroed(out, self.find(out))              # windows wholly outside have -inf

    def avg_pool2d(self, func: Any, x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
                   ceil_mode: bool = False, count_include_pad: bool = True,
                   divisor_override: int | None = None) -> Tensor:
        window = Window(pair(kernel_size), pair(stride or kernel_size), pair(padding), ceil=ceil_mode)
        options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        values, outside = self.read(x, window, 0.0), self.find(x).outside
        out = func(values, *options)
        if values is not x and (ceil_mode or not count_include_pad):
            if ceil_mode and count_include_pad and max(window.padding) > 0 or divisor_override:
                raise Inexact("avg_pool2d with ceil_mode that counts padding")
            share = func((~outside).to(x.dtype), *options)      # of each window, how much counts
            out = out / share.masked_fill(share == 0, 1)
        return self.write(x, window, out)

    def mean(self, func: Any, x: Tensor, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
        axes = {axis % x.ndim for axis in ((dim,) if isinstance(dim, int) else dim or range(x.ndim))}
        if x.ndim != 4 or axes not in ({2, 3}, {1}):
            raise Inexact(f"mean of a tensor {list(x.shape)} over {dim}")
        at = self.find(x)
        if axes == {1} or at.outside is None:
            return func(x, dim, keepdim, **options)
        area = on_device([h * w for h, w in at.sizes], x.device)[:, None, None, None]
        out = (zeroed(x, at).sum((2, 3), keepdim=True) / area).to(x.dtype)
        return out if keepdim else out[:, :, 0, 0]

    def adaptive_avg_pool2d(self, func: Any, x: Tensor, output_size: Any) -> Tensor:
        if pair(output_size) != (1, 1):
            raise Inexact("adaptive_avg_pool2d to more than one cell")
        return self.mean(torch.mean, x, (2, 3), True)

    def group_norm(self, func: Any, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
                   eps: float = 1e-5) -> Tensor:
        at = self.find(x)
        if at.outside is None:
            return func(x, num_groups, weight, bias, eps)
        return group_norm_inside(x, at, num_groups, weight, bias, eps)

    def batch_norm(self, func: Any, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
                   weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
                   momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
        at = self.find(x) if training and self.is_map(x) else None
        if at is None or at.outside is None:
            return func(x, running_mean, running_var, weight, bias, training, momentum, eps)
        return batch_norm_inside(x, at, running_mean, running_var, weight, bias, momentum, eps)

    def last_axis(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Linear layers and layer norm: of the channels of maps with the channels last, or of one vector an image."""
        if x.ndim != 2 and not (x.ndim == 4 and (x.shape[1], x.shape[2]) in self.at):
            raise Inexact(f"{func.__name__} of a tensor {list(x.shape)}")
        return func(x, *args, **kwargs)

    def of_channels(self, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """``cat``, ``split`` and ``chunk`` along the channels."""
        dim = kwargs.get("dim", args[-1] if len(args) == 1 + (func.__name__ != "cat") else 0)
        if dim not in (1, -3) or (x if isinstance(x, Tensor) else x[0]).ndim != 4:
            raise Inexact(f"{func.__name__} along axis {dim}")
        return func(x, *args, **kwargs)

    def getitem(self, func: Any, x: Tensor, index: Any) -> Tensor:
        rest = (index[0], *index[2:]) if isinstance(index, tuple) else (index,)
        if self.is_map(x) and any(part != slice(None) for part in rest):
            raise Inexact("a part of a map")
        return func(x, index)


SPATIAL: dict[str, Callable[..., Any]] = {
    **{name: getattr(Exact, name) for name in ("conv2d", "max_pool2d", "avg_pool2d", "mean", "adaptive_avg_pool2d",
                                               "group_norm", "batch_norm")},
    "linear": Exact.last_axis, "layer_norm": Exact.last_axis, "__getitem__": Exact.getitem,
    "cat": Exact.of_channels, "split": Exact.of_channels, "chunk": Exact.of_channels,
}
# Functions of single positions, and those that only move whole axes or ask what a tensor is.
POSITIONS = frozenset("""
    add add_ sub sub_ mul mul_ div div_ neg rsqrt sqrt exp square pow clamp clamp_ relu relu_ relu6 leaky_relu leaky_relu_
    elu silu silu_ gelu mish hardswish hardsigmoid hardtanh hardtanh_ sigmoid sigmoid_ tanh softplus prelu
    dropout __add__ __radd__ __iadd__ __sub__ __rsub__ __mul__ __rmul__ __imul__ __truediv__ __neg__
    new_empty bernoulli_ to float type_as contiguous detach permute size dim __get__ __len__ _assert""".split())
VIEWS = frozenset("view reshape unsqueeze squeeze flatten expand expand_as".split())        # not of maps
