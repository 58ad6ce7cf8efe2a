"""Deformable sampling on CPUs: equation 3 of Zhu et al. (2021) as a sparse matrix times a table.

A bilinear sample is a weighted sum of four pixels, so one head of one query is a weighted sum of ``4 * L * P`` rows of
the value: of a table with a row of ``D / M`` channels for every pixel. ``embedding_bag`` computes just that in one pass,
without ever writing a sample to memory; ``definition`` writes all of them, ``L * P`` times the size of its output.

The gradients are passes of the same kind. With ``d`` the four products of the incoming gradient with the rows of the
corners (``sampled_addmm``: a sparse matrix of dot products), and a point at the fractions (x, y) between its corners,

    d output / d weight = (1 - y) * top + y * bottom        top    = (1 - x) * d00 + x * d01
    d output / d x      = weight * width  * ((1 - y) * (d01 - d00) + y * (d11 - d10))
    d output / d y      = weight * height * (bottom - top)  bottom = (1 - x) * d10 + x * d11

and the gradient of the value is the transposed sparse matrix times the incoming gradient: points sorted by their cell are
bags again, one for each pixel, so nothing is scattered and sums are always taken in the order of the queries.

Three habits keep the rest small. Every level stands in the table with a margin of zeros, which makes "zero outside" a
matter of clamping coordinates. Heads are worked on one by one, or several small ones together, so that their table stays
in cache; and their queries in chunks, so that everything computed for a point does too. Backward saves the inputs alone
and computes corners anew. Where points are fewer than pixels, as in a decoder, a table would cost more than it saves:
the value itself is the table then, corners outside get the weight zero, and only rows that were looked at get a gradient.
"""
from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Shapes = Sequence[tuple[int, int]]

MARGIN = 2                  # pixels of zeros around a level: a cell wholly outside, then one with a corner inside
BLOCK = 2 ** 18             # points, or rows of the table, of the heads that are worked on together
CHUNK = 2 ** 16             # points of the queries that are worked on together


def sample(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """What ``deformable_attention.definition`` computes; differentiable once. ``value [B, S, M, D / M]``, ``locations
    [B, Q, M, L, P, 2]``, ``weights [B, Q, M, L, P]`` -> ``[B, Q, D]``.

    Computes in the wider type of value and locations, in float32 at least, and answers in the type of ``value``. A
    location that is NaN gives NaN. An image's result does not depend on the other images of the batch.
    """
    return Sampling.apply(value, tuple(shapes), locations, weights)


class Layout(NamedTuple):
    """Where the pixels of each level stand among the rows of a table, and what the ``n = L * P`` points need to know.

    With a margin, a table holds one head, and a level is H + 4 rows of W + 2 pixels: two rows of zeros above and below,
    two zeros before each row, which also end the row before it. Without, the value ``[S, M, D / M]`` is the table.
    """
    margin: int
    levels: list[tuple[int, int, int]]          # first pixel in the table, height, width
    pixels: int                                 # in the table
    size: Tensor                                # [n, 2]: width, height of the level of each point
    pitch: Tensor                               # [n] int32: from a pixel to the one below
    start: Tensor                               # [n] int32: pixel (0, 0)

    def window(self, table: Tensor, level: int, dy: int = 0, dx: int = 0) -> Tensor:
        """A level of ``table [B, M, pixels, D / M]``, the window on it moved by (-dy, -dx): ``[B, M, H, W, D / M]``."""
        first, h, w = self.levels[level]
        padded = table[:, :, first:first + (h + 2 * MARGIN) * (w + MARGIN)].unflatten(2, (h + 2 * MARGIN, w + MARGIN))
        return padded[:, :, MARGIN - dy:MARGIN - dy + h, MARGIN - dx:MARGIN - dx + w]


def layout_of(shapes: Shapes, points: int, queries: int, dtype: torch.dtype) -> Layout:
    """The layout for levels of ``shapes``, ``points`` on each and ``queries``. A margin of zeros pays where most pixels
    are sampled, as in an encoder; few queries, as in a decoder, read the value where it is."""
    margin = MARGIN if queries * points * len(shapes) >= sum(h * w for h, w in shapes) else 0
    levels, facts, first = [], [], 0
    for h, w in shapes:
        pitch = w + margin
        levels.append((first, h, w))
        facts += [(w, h, pitch, first + margin * pitch + margin)] * points
        first += (h + 2 * margin) * pitch
    columns = torch.tensor(facts, dtype=torch.int32, device="cpu").T.contiguous()
    size = columns[:2].T.to(dtype).contiguous()
    return Layout(margin, levels, first + margin, size, columns[2], columns[3])     # the last row ends in zeros, too


def table_of(layout: Layout, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of ``value [B, S, M, D / M]`` in its layout: ``[rows, D / M]``."""
    batch, _, heads, width = value.shape
    if not layout.margin:
        return value.to(dtype).reshape(-1, width)
    table = value.new_zeros(batch, heads, layout.pixels, width, dtype=dtype)
    for i, level in enumerate(value.split([h * w for _, h, w in layout.levels], dim=1)):
        pixels = layout.window(table, i)
        pixels.copy_(level.unflatten(1, pixels.shape[2:4]).permute(0, 3, 1, 2, 4))
    return table.view(-1, width)


class Corners(NamedTuple):
    """The four corners of each point, in the order (0, 0), (0, 1), (1, 0), (1, 1) of (y, x)."""
    cell: Tensor                                # [B, Q, M, n] int32: row of the corner (0, 0); with a margin alone
    rows: Tensor                                # [B * Q * M, 4 * n] int32
    inside: Tensor | None                       # [4, B, Q, M, n], 1 or 0; where there is no margin
    fraction: Tensor                            # [2, B, Q, M, n]: (x, y) from the corner (0, 0)

    def spread(self, weights: Tensor, out: Tensor) -> Tensor:
        """Divide ``weights [B, Q, M, n]`` among the corners: ``out [4, B, Q, M, n]``."""
        x, y = self.fraction
        bottom = weights * y
        for edge, left, right in ((weights - bottom, out[0], out[1]), (bottom, out[2], out[3])):
            torch.mul(edge, x, out=right)
            torch.sub(edge, right, out=left)
        return out if self.inside is None else out.mul_(self.inside)


def corners_of(layout: Layout, locations: Tensor) -> Corners:
    """The corners of ``locations [B, Q, M, n, 2]`` in the table of these images and heads."""
    batch, _, heads, n, _ = locations.shape
    size, pitch, start = layout.size, layout.pitch, layout.start
    fraction = torch.addcmul(size.new_tensor(-0.5), locations.to(size.dtype), size).movedim(-1, 0).contiguous()
    torch.clamp(fraction, size.new_tensor(-MARGIN), size.T[:, None, None, None], out=fraction)
    corner = fraction.floor()
    fraction -= corner
    x, y = corner.nan_to_num_(nan=-MARGIN).int()            # no index comes from a NaN; it stays in the fraction
    if layout.margin:
        tables = torch.arange(0, batch * heads * layout.pixels, layout.pixels, dtype=torch.int32, device=x.device)
        x += tables.view(batch, 1, heads, 1) + start
        x.addcmul_(y, pitch)
        offsets = torch.cat([torch.zeros_like(pitch), torch.ones_like(pitch), pitch, pitch + 1])
        return Corners(x, torch.cat([x] * 4, dim=-1).add_(offsets).view(-1, 4 * n), None, fraction)
    images = torch.arange(0, batch * layout.pixels, layout.pixels, dtype=torch.int32, device=x.device)
    first = images.view(batch, 1, 1, 1) + start
    width, height = size.int().T
    rows, inside = [], []
    for v in (y, y + 1):
        for u in (x, x + 1):
            seen = (u >= 0) & (u < width) & (v >= 0) & (v < height)
            rows.append((v * pitch + u).mul_(seen).add_(first))
            inside.append(seen)
    head = torch.arange(heads, dtype=torch.int32, device=x.device)[:, None]
    return Corners(x, torch.cat(rows, dim=-1).mul_(heads).add_(head).view(-1, 4 * n),
                   torch.stack(inside).to(size.dtype), fraction)


def blocks(layout: Layout, batch: int, heads: int, points: int) -> Iterator[tuple[slice, slice]]:
    """Images and heads to work on together: some heads of one image, or all heads of some images."""
    some = max(1, BLOCK // max(points, layout.pixels)) if layout.margin else heads * max(1, BLOCK // (heads * points))
    for b in range(0, batch, max(1, some // heads)):
        for m in range(0, heads, some):
            yield slice(b, b + max(1, some // heads)), slice(m, m + some)


def chunks(queries: int, points: int) -> Iterator[slice]:
    """Queries to work on together, where each has so many points."""
    step = max(1, CHUNK // points)
    for q in range(0, queries, step):
        yield slice(q, q + step)


class Sampling(torch.autograd.Function):
    """``sample`` and its gradients; keeps the inputs alone."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        batch, _, heads, width = value.shape
        queries, points = locations.shape[1], locations.shape[4]
        if not locations.numel() or not width:
            return value.new_zeros(batch, queries, heads * width)
        out = value.new_empty(batch, queries, heads * width)
        by_head = out.unflatten(2, (heads, width))
        exact = torch.promote_types(torch.promote_types(value.dtype, locations.dtype), torch.float32)
        ctx.layout = layout = layout_of(shapes, points, queries, exact)
        locations, weights = locations.flatten(3, 4), weights.flatten(3)
        n = weights.shape[-1]
        for b, m in blocks(layout, batch, heads, queries * n):
            part = by_head[b, :, m]
            table = table_of(layout, value[b, :, m], exact)
            for q in chunks(queries, part.shape[0] * part.shape[2] * n):
                corners = corners_of(layout, locations[b, q, m])
                shares = corners.spread(weights[b, q, m].to(exact), table.new_empty(4, *corners.cell.shape))
                summed = F.embedding_bag(corners.rows, table, mode="sum",
                                         per_sample_weights=torch.cat(shares.unbind(), dim=-1).view(-1, 4 * n))
                part[:, q] = summed.view(*corners.cell.shape[:-1], width)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights = ctx.saved_tensors
        grad_value, grad_locations, grad_weights = (x.new_zeros(x.shape) for x in (value, locations, weights))
        if locations.numel() and value.shape[3]:
            batch, queries, heads = weights.shape[:3]
            locations, weights = locations.flatten(3, 4), weights.flatten(3)
            grad = grad.unflatten(2, (heads, -1))
            for b, m in blocks(ctx.layout, batch, heads, queries * weights.shape[-1]):
                backward_of_block(ctx.layout, grad[b, :, m], value[b, :, m], locations[b, :, m], weights[b, :, m],
                                  grad_value[b, :, m], grad_locations.flatten(3, 4)[b, :, m],
                                  grad_weights.flatten(3)[b, :, m])
        return grad_value, None, grad_locations, grad_weights


def backward_of_block(layout: Layout, grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor,
                      grad_value: Tensor, grad_locations: Tensor, grad_weights: Tensor) -> None:
    """Fill the last three, the gradients of the three before them, from ``grad [B, Q, M, D / M]``."""
    batch, queries, heads, n = weights.shape
    table = table_of(layout, value, layout.size.dtype)
    exact, width = table.dtype, table.shape[1]
    grad = grad.to(exact).contiguous()
    shape = weights.shape if layout.margin else (*weights.shape[:3], 4 * n)
    keys = torch.empty(shape, dtype=torch.int32, device=grad.device)
    shares = table.new_empty(4, *weights.shape)
    for q in chunks(queries, batch * heads * n):
        corners = corners_of(layout, locations[:, q])
        weight = weights[:, q].to(exact)
        incoming = grad[:, q].reshape(-1, width)
        keys[:, q] = corners.cell if layout.margin else corners.rows.view(*weight.shape[:3], 4 * n)
        corners.spread(weight, shares[:, :, q])
        dots = dot_products(corners.rows, incoming, table).view(*weight.shape[:3], 4, n).movedim(-2, 0).contiguous()
        d00, d01, d10, d11 = dots if corners.inside is None else dots.mul_(corners.inside)
        x, y = corners.fraction
        d01 -= d00
        d11 -= d10
        top = d00.addcmul_(x, d01)
        dy = d10.addcmul_(x, d11).sub_(top)
        grad_weights[:, q] = top.addcmul_(y, dy)
        dx = d01.lerp_(d11, y)
        grad_locations[:, q] = torch.stack([dx.mul_(weight), dy.mul_(weight)], dim=-1).mul_(layout.size)
    if layout.margin:
        add_cells(layout, keys, shares, grad, grad_value)
    else:
        found, order = keys.view(-1).sort(stable=True)
        touched, counts = found.unique_consecutive(return_counts=True)
        [sums] = bags(order, counts, [torch.cat(shares.unbind(), dim=-1).view(-1)], grad.view(-1, width))
        grad_value.view(-1, width).index_copy_(0, touched.long(), sums.to(grad_value.dtype))


def add_cells(layout: Layout, cells: Tensor, shares: Tensor, grad: Tensor, grad_value: Tensor) -> None:
    """Sum ``grad [B, Q, M, D / M]`` over the points of each of ``cells [B, Q, M, n]``, once for each corner's ``shares
    [4, B, Q, M, n]``, and add the four neighbours that meet in a pixel."""
    batch, _, heads, width = grad.shape
    cells = cells.view(-1)
    counts = cells.bincount(minlength=batch * heads * layout.pixels)
    corners = bags(cells.sort(stable=True).indices, counts, list(shares.view(4, -1)), grad.view(-1, width))
    c00, c01, c10, c11 = (corner.view(batch, heads, layout.pixels, width) for corner in corners)
    for i, level in enumerate(grad_value.split([h * w for _, h, w in layout.levels], dim=1)):
        summed = layout.window(c00, i) + layout.window(c01, i, 0, 1)
        summed.add_(layout.window(c10, i, 1, 0)).add_(layout.window(c11, i, 1, 1))
        level.unflatten(1, summed.shape[2:4]).copy_(summed.permute(0, 2, 3, 1, 4))


def bags(order: Tensor, counts: Tensor, shares: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Weighted sums of rows of ``grad [N, D / M]``: entry i belongs to row ``i * N // len(order)``, entries are taken in
    this order, and each bag has so many of them. Weights are the ``shares [len(order)]``."""
    sources = torch.arange(len(grad), dtype=torch.int32, device=grad.device).repeat_interleave(len(order) // len(grad))
    sources = sources.index_select(0, order)                # much faster than indexing
    begins = (counts.cumsum(0) - counts).int()
    return [F.embedding_bag(sources, grad, begins, mode="sum", per_sample_weights=share.index_select(0, order))
            for share in shares]


def dot_products(rows: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    """Row i of ``grad [N, D / M]`` times the rows of ``table`` that ``rows [N, k]`` lists for it: ``[N * k]``."""
    hush()
    ends = torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=torch.int32, device=rows.device)
    pattern = torch.sparse_csr_tensor(ends, rows.view(-1), table.new_zeros(rows.numel()), (len(rows), len(table)),
                                      check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, grad, table.T, beta=0.0).values()


@cache
def hush() -> None:
    """PyTorch says once a process that sparse CSR is in beta; what is used here is compared with the definition."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))
