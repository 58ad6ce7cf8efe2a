"""The sampling of multi-scale deformable attention on CUDA, as two Triton kernels (Zhu et al., 2021, equation 3).

A row is one query of one head of one image. Around each of its ``L * P`` points it reads four pixels, each ``D / M``
channels that lie next to each other in memory, and sums them, weighted by attention weight times bilinear share. A
program takes ``BLOCK_Q`` neighbouring queries of one head: their points tend to meet in the same pixels, which then come
from the cache. A tile ``[BLOCK_Q, P, D / M]`` is one corner of all these points on one level, so each corner is one wide
load, and nothing is written but the sum over levels and points.

The backward kernel walks the same tiles. With ``dot`` the product of a corner's pixel and the incoming gradient over the
channels, ``share = along * across`` the corner's share and ``w`` the attention weight, it forms

    d weight      the sum over the corners of share * dot
    d location    x: w * width * the sum of along * dot, the right corners minus the left ones;
                  y: w * height * the sum of across * dot, the lower corners minus the upper ones
    d pixel       w * share * gradient, added atomically, since points of many queries meet in one pixel

Sums are taken in float32, and in float64 where value or locations are float64. Only the inputs are kept for backward, and
no memory is taken beside outputs and gradients, with three exceptions: the gradient of a bfloat16 or float16 value is
first summed in a float32 buffer (16 bits would lose small terms to large sums), inputs that are not contiguous are
copied, and while it tunes a kernel for a new size Triton takes a cache-clearing buffer for a moment. Atomic additions
come in any order, so the gradient of value differs in its last bits from run to run; and the tuner chooses by time, so
that sums may be taken in another order in another process.
"""
from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .transfer import on_device

Shapes = tuple[tuple[int, int], ...]
RUNTIME = ["tokens", "queries", "heads", "scale"]       # they change from batch to batch, and the kernels stay the same


@triton.jit
def rows_of_program(tokens, queries, heads, BLOCK_Q: tl.constexpr):
    """The rows of this program ``[BLOCK_Q]``, which of them exist, and the value's first row for their image and head."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    program = tl.program_id(0)
    query = program % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = program // blocks % heads
    image = (program // blocks // heads).to(tl.int64)                               # large batches need 64 bits
    return (image * queries + query) * heads + head, query < queries, image * tokens * heads + head


@triton.jit
def locate(levels, level, location, active, EXACT: tl.constexpr):
    """A tile of points on a level: height, width and first token of the level; row and column of the pixel to the upper
    left of each point; how far below and to the right of its centre the point lies, in pixels."""
    height, width, start = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1), tl.load(levels + 3 * level + 2)
    x = tl.load(location, mask=active, other=0).to(EXACT) * width - 0.5
    y = tl.load(location + 1, mask=active, other=0).to(EXACT) * height - 0.5
    left, top = tl.floor(x), tl.floor(y)
    # Whole numbers hold no 1e30 and no NaN: what is off the level stays so at -2 or beyond the end, NaN becomes -2.
    column = tl.where(left >= -1, tl.where(left < width, left, width), -2).to(tl.int32)
    row = tl.where(top >= -1, tl.where(top < height, top, height), -2).to(tl.int32)
    return height, width, start, row, column, y - top, x - left


@triton.jit
def corner(k: tl.constexpr, height, width, start, row, column, below, right, active):
    """Corner ``k`` of the four: its token, whether it is on the level, its bilinear share along y and across x."""
    row, column = row + k // 2, column + k % 2
    inside = active & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    along = below if k // 2 else 1 - below
    across = right if k % 2 else 1 - right
    return (start + row * width + column).to(tl.int64), inside, along, across


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(value, levels, locations, weights, out, tokens, queries, heads, scale, WIDTH: tl.constexpr,
                   LEVELS: tl.constexpr, POINTS: tl.constexpr, EXACT: tl.constexpr, BLOCK_P: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr):
    """``levels`` is a ``level_table``; ``scale`` is there for the tuner alone."""
    row, exists, first = rows_of_program(tokens, queries, heads, BLOCK_Q)
    point, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    active = exists[:, None] & (point < POINTS)[None, :]                            # [BLOCK_Q, BLOCK_P]
    pixels = value + first * WIDTH + channel[None, None, :]
    total = tl.zeros([BLOCK_Q, BLOCK_P, BLOCK_D], EXACT)
    for level in tl.static_range(LEVELS):
        at = (row[:, None] * LEVELS + level) * POINTS + point[None, :]
        weight = tl.load(weights + at, mask=active, other=0).to(EXACT)
        height, width, start, y, x, below, right = locate(levels, level, locations + 2 * at, active, EXACT)
        for k in tl.static_range(4):
            token, inside, along, across = corner(k, height, width, start, y, x, below, right, active)
            pixel = tl.load(pixels + token[:, :, None] * (heads * WIDTH),
                            mask=inside[:, :, None] & (channel < WIDTH)[None, None, :], other=0).to(EXACT)
            total += (weight * along * across)[:, :, None] * pixel
    tl.store(out + row[:, None] * WIDTH + channel[None, :], tl.sum(total, 1).to(out.dtype.element_ty),
             mask=exists[:, None] & (channel < WIDTH)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def backward_kernel(value, levels, locations, weights, grad_out, grad_value, grad_locations, grad_weights, tokens,
                    queries, heads, scale, WIDTH: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
                    EXACT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Gradients that nobody asked for are None, and their part is left out when the kernel is compiled."""
    row, exists, first = rows_of_program(tokens, queries, heads, BLOCK_Q)
    point, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    active = exists[:, None] & (point < POINTS)[None, :]                            # [BLOCK_Q, BLOCK_P]
    pixels = first * WIDTH + channel[None, None, :]
    gradient = tl.load(grad_out + row[:, None] * WIDTH + channel[None, :],
                       mask=exists[:, None] & (channel < WIDTH)[None, :], other=0).to(EXACT)[:, None, :]
    for level in tl.static_range(LEVELS):
        at = (row[:, None] * LEVELS + level) * POINTS + point[None, :]
        weight = tl.load(weights + at, mask=active, other=0).to(EXACT)
        height, width, start, y, x, below, right = locate(levels, level, locations + 2 * at, active, EXACT)
        if grad_locations is not None or grad_weights is not None:
            sampled = tl.zeros([BLOCK_Q, BLOCK_P], EXACT)                           # and what one pixel further changes
            slope_x = tl.zeros([BLOCK_Q, BLOCK_P], EXACT)
            slope_y = tl.zeros([BLOCK_Q, BLOCK_P], EXACT)
            for k in tl.static_range(4):
                token, inside, along, across = corner(k, height, width, start, y, x, below, right, active)
                pixel = tl.load(value + pixels + token[:, :, None] * (heads * WIDTH),
                                mask=inside[:, :, None] & (channel < WIDTH)[None, None, :], other=0).to(EXACT)
                dot = tl.sum(pixel * gradient, 2)
                sampled += along * across * dot
                slope_x += (2 * (k % 2) - 1) * along * dot
                slope_y += (2 * (k // 2) - 1) * across * dot
            if grad_weights is not None:
                tl.store(grad_weights + at, sampled.to(grad_weights.dtype.element_ty), mask=active)
            if grad_locations is not None:
                kind = grad_locations.dtype.element_ty
                tl.store(grad_locations + 2 * at, (weight * width * slope_x).to(kind), mask=active)
                tl.store(grad_locations + 2 * at + 1, (weight * height * slope_y).to(kind), mask=active)
        if grad_value is not None:
            for k in tl.static_range(4):
                token, inside, along, across = corner(k, height, width, start, y, x, below, right, active)
                tl.atomic_add(grad_value + pixels + token[:, :, None] * (heads * WIDTH),
                              (weight * along * across)[:, :, None] * gradient,
                              mask=inside[:, :, None] & (channel < WIDTH)[None, None, :], sem="relaxed")


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)                    # TRITON_INTERPRET=1 at the import
CONFIGS = [(2, 1), (4, 1), (4, 4), (8, 4), (16, 8), (32, 16)]                       # BLOCK_Q, warps


def clear(arguments: dict[str, Any], reset_only: bool = False) -> None:
    """Tuning runs the backward kernel many times over; each run, above all the one after it, should add to zeros."""
    if arguments.get("grad_value") is not None:
        arguments["grad_value"].zero_()


@functools.cache
def tuned(kernel: Any) -> Any:
    """``kernel`` with the fastest of ``CONFIGS``, searched anew for each head width, number of levels and points, types
    and factor of eight in the number of rows. Made at the first launch: some versions of Triton want a GPU for it."""
    configs = [triton.Config({"BLOCK_Q": block}, num_warps=warps) for block, warps in CONFIGS]
    return triton.autotune(configs, key=["WIDTH", "LEVELS", "POINTS", "scale"], pre_hook=clear)(kernel)


def level_table(shapes: Shapes, device: torch.device) -> Tensor:
    """Height, width and first token of each level, int32 ``[L, 3]``."""
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    return on_device([(h, w, start) for (h, w), start in zip(shapes, starts)], device, torch.int32)


def launch(kernel: Any, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, *rest: Tensor | None) -> None:
    """Run a kernel on these inputs; ``rest`` are the arguments between the inputs and the sizes."""
    batch, tokens, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    exact = tl.float64 if summed_in(value, locations) == torch.float64 else tl.float32
    scale = (batch * queries * heads).bit_length() // 3
    arguments = (value.contiguous(), level_table(shapes, value.device), locations.contiguous(), weights.contiguous(),
                 *rest, tokens, queries, heads, scale, width, len(shapes), points, exact,
                 triton.next_power_of_2(points), triton.next_power_of_2(width))

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (batch * heads * triton.cdiv(queries, meta["BLOCK_Q"]),)

    if INTERPRETED:
        kernel[grid](*arguments, BLOCK_Q=8)
        return
    with torch.cuda.device(value.device):
        tuned(kernel)[grid](*arguments, enable_fp_fusion=True)                     # off by default in newer versions


def summed_in(value: Tensor, locations: Tensor) -> torch.dtype:
    """The type in which sums are taken: the wider one, float32 at least."""
    return torch.promote_types(torch.promote_types(value.dtype, locations.dtype), torch.float32)


class DeformableSampling(torch.autograd.Function):
    """``sample`` and its gradients, a kernel each."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes = shapes
        size = value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]
        if not value.numel() or not locations.numel():
            return value.new_zeros(size)
        out = value.new_empty(size)
        launch(forward_kernel, value, shapes, locations, weights, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights = ctx.saved_tensors
        if not value.numel() or not locations.numel():
            return torch.zeros_like(value), torch.zeros_like(locations), torch.zeros_like(weights), None
        grad_value = grad_locations = grad_weights = None
        if ctx.needs_input_grad[0]:
            refuse_to_be_deterministic()
            grad_value = value.new_zeros(value.shape, dtype=summed_in(value, locations))
        if ctx.needs_input_grad[1]:
            grad_locations = locations.new_empty(locations.shape)
        if ctx.needs_input_grad[2]:
            grad_weights = weights.new_empty(weights.shape)
        launch(backward_kernel, value, ctx.shapes, locations, weights, grad_out.contiguous(), grad_value, grad_locations,
               grad_weights)
        return None if grad_value is None else grad_value.to(value.dtype), grad_locations, grad_weights, None


def refuse_to_be_deterministic() -> None:
    """As PyTorch's own operators do that add atomically, those of the plain definition among them."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = ("the gradient of deformable attention's value is summed atomically, in no fixed order, under "
               "torch.use_deterministic_algorithms(True); add warn_only=True to accept that")
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def sample(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of bilinear samples, ``[B, Q, D]`` in the type of ``value``; differentiable once.

    ``value [B, S, M, D / M]``, ``locations [B, Q, M, L, P, 2]`` and ``weights [B, Q, M, L, P]``, each of any floating
    type, on one CUDA device (on a CPU under Triton's interpreter alone); ``shapes``: height and width of each level.
    ValueError for other devices and for shapes that do not belong together.
    """
    if not (value.is_cuda or INTERPRETED) or not value.device == locations.device == weights.device:
        raise ValueError(f"value is on {value.device}, locations on {locations.device} and weights on {weights.device}; "
                         f"the Triton kernels want all on one CUDA device. On CPUs use path cpu or definition")
    batch, tokens, heads, _ = value.shape
    if (sum(h * w for h, w in shapes) != tokens or locations.shape[:-1] != weights.shape
            or locations.shape != (batch, locations.shape[1], heads, len(shapes), locations.shape[4], 2)):
        raise ValueError(f"value {list(value.shape)}, locations {list(locations.shape)}, weights {list(weights.shape)} "
                         f"and levels of {list(shapes)}: they should be [B, S, M, D / M], [B, Q, M, L, P, 2], "
                         f"[B, Q, M, L, P] and S pixels in L levels")
    return DeformableSampling.apply(value, locations, weights, tuple((int(h), int(w)) for h, w in shapes))
