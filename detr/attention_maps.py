"""Where a detector looks, for drawing: run a model once and keep its attention.

    seen = explain(detector.model, detector.preprocessing(picture), height_width(picture))
    seen.heat(query)                        # [H, W]: where the query looked in the last decoder layer, heads averaged
    seen.heat(query, layer=0, head=3)
    seen.encoder_heat(x=120, y=80)          # where the encoder looks from a pixel of the picture
    seen.path(query)                        # its box after each decoder layer

Dense attention (Carion et al., 2020) has a weight for every cell of one map; deformable attention (Zhu et al., 2021,
section 4.1) has points with weights on several levels, ``seen.decoder[layer].points``. Both are recorded by hooks on the
attention's inputs and projections, which no path of computing it leaves out; they change nothing that the model
computes, and are gone afterwards, whatever happens.

A map of H x W cells stands for the image in H x W equal parts. So do the models take it: their position encodings and
references are fractions of the part of a map that is not padding (section A.4). Where an image's sides are no multiple
of the map's stride, convolutions see its right and lower edge up to a cell further in.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architectures.proposal_detr import ProposalDETR
from .attention import ProjectedAttention
from .boxes import box_cxcywh_to_xyxy
from .decoder import ConditionalDecoderLayer, DeformableTransformerDecoderLayer, TransformerDecoderLayer
from .deformable_attention import MSDeformAttn
from .mask_head import DETRsegm
from .nested_tensor import NestedTensor, as_nested_tensor
from .structures import FeatureLevels, Outputs

Size = tuple[int, int]                  # height, width
DENSE = (TransformerDecoderLayer, ConditionalDecoderLayer)


@dataclass(frozen=True)
class DenseAttention:
    """One layer's attention of Q queries, or as many tokens, to the cells of one map, on the CPU."""
    query: Tensor           # [M, Q, E / M] projected
    key: Tensor             # [M, S, E / M] projected
    mask: Tensor            # [S] bool, True on padding
    prior: Tensor | None    # [Q, S] added to the scores, where boxes tell queries where to look
    grid: Size              # of the map with its padding: S cells, row by row
    shape: Size             # of what is not padding

    @property
    def weights(self) -> Tensor:
        """``[M, Q, H, W]``, without padding, whose weights are zero: each head's sum to one (Vaswani et al., 2017,
        equation 1)."""
        return self._weights(slice(None))

    def heat(self, query: int, head: int | None = None, level: int | None = None) -> Tensor:
        """The weights of one query ``[H, W]``, of one head or averaged over heads. There is one ``level``, 0."""
        check("query", query, self.query.shape[1])
        check("level", level, 1)
        return of_head(self._weights([query])[:, 0], head)

    def _weights(self, queries: slice | list[int]) -> Tensor:
        scores = (self.query[:, queries] / self.query.shape[-1] ** 0.5) @ self.key.mT
        if self.prior is not None:
            scores = scores + self.prior[queries]
        weights = scores.masked_fill(self.mask, float("-inf")).softmax(-1)
        return weights.unflatten(-1, self.grid)[..., :self.shape[0], :self.shape[1]]


@dataclass(frozen=True)
class DeformableAttention:
    """One layer's attention of Q queries, or as many tokens, to sampling points on L levels, on the CPU."""
    points: Tensor          # [Q, M, L, P, 2] (x, y) in pixels of the image; they may lie outside of it
    weights: Tensor         # [Q, M, L, P]: of each query and head they sum to one
    shapes: list[Size]      # of each level, without padding
    size: Size              # of the image

    def heat(self, query: int, head: int | None = None, level: int | None = None,
             grid: Size | None = None) -> Tensor:
        """The weights of one query as a map ``[H, W]``, of one head or averaged over heads: each goes to the four cells
        around its point, bilinearly, as values are sampled (equation 3).

        ``level``: the points of this level alone, on its own cells; these are the weights with which values of the
        level's cells are summed. Otherwise the points of all levels, on the cells of the finest. ``grid`` (height,
        width) gives the map another resolution. What lies outside the image is left out, so that less than one can
        remain.
        """
        check("query", query, len(self.points))
        check("level", level, len(self.shapes))
        levels = slice(None) if level is None else [level]
        points, weights = self.points[query][:, levels], self.weights[query][:, levels]
        height, width = self.size
        return of_head(splat(points / points.new_tensor([width, height]), weights,
                             grid or self.shapes[level or 0]), head)


@dataclass(frozen=True)
class Explanation:
    """What a model saw in one image. Boxes are cxcywh as fractions of it, as everywhere; pixels are those of ``size``."""
    outputs: Outputs                                                        # the model's, of the whole batch
    size: Size                                                              # of the image
    shapes: list[Size]                                                      # of each level's map, without padding
    grids: list[Size]                                                       # with padding
    encoder: Sequence[DenseAttention] | Sequence[DeformableAttention]       # one a layer: tokens look at tokens
    decoder: Sequence[DenseAttention] | Sequence[DeformableAttention]       # one a layer: queries look at tokens
    boxes: Tensor                                                           # [K, Q, 4] after each decoder layer
    references: list[Tensor]            # [Q, 2] points or [Q, 4] boxes that each layer looked from; of DETR none

    def __repr__(self) -> str:
        height, width = self.size
        return (f"Explanation({len(self.boxes[-1])} queries, {len(self.decoder)} decoder and {len(self.encoder)} encoder "
                f"layers, {type(self.decoder[0]).__name__}, maps {self.shapes}, image {width} x {height})")

    def heat(self, query: int, layer: int = -1, head: int | None = None, level: int | None = None) -> Tensor:
        """Where a query looked in one decoder layer, ``[H, W]``; see ``heat`` of ``decoder[layer]``."""
        check("layer", layer, len(self.decoder), "of the decoder")
        return self.decoder[layer].heat(query, head, level)

    def encoder_heat(self, x: float, y: float, layer: int = -1, head: int | None = None, level: int | None = None,
                     from_level: int = 0) -> Tensor:
        """Where the encoder looked from pixel (x, y), ``[H, W]``: the token of ``from_level`` there; see ``heat`` of
        ``encoder[layer]``."""
        if not self.encoder:
            raise IndexError("this model has no encoder layers, or explain(encoder=False) left them out: it looked "
                             "nowhere")
        check("layer", layer, len(self.encoder), "of the encoder")
        return self.encoder[layer].heat(self.token(*self.cell(x, y, from_level), from_level), head, level)

    def cell(self, x: float, y: float, level: int = 0) -> Size:
        """(row, column) of a level's cell at pixel (x, y)."""
        check("level", level, len(self.shapes))
        height, width = self.size
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"pixel ({x}, {y}) is not in the image, which is {width} wide and {height} high")
        rows, columns = self.shapes[level]
        return int(y / height * rows), int(x / width * columns)

    def token(self, row: int, column: int, level: int = 0) -> int:
        """The number of the token at a level's cell, among those of all levels with their padding."""
        check("level", level, len(self.shapes))
        check("row", row, self.shapes[level][0])
        check("column", column, self.shapes[level][1])
        level, (rows, columns) = level % len(self.shapes), self.shapes[level]
        return sum(h * w for h, w in self.grids[:level]) + row % rows * self.grids[level][1] + column % columns

    def path(self, query: int) -> Tensor:
        """A query's box after each decoder layer, before them the one it started from, where it started from a box:
        ``[K or K + 1, 4]`` corners (left, top, right, bottom) in pixels."""
        check("query", query, self.boxes.shape[1])
        path = self.boxes[:, query]
        if self.references and self.references[0].shape[-1] == 4:
            path = torch.cat([self.references[0][None, query], path])
        height, width = self.size
        return box_cxcywh_to_xyxy(path) * path.new_tensor([width, height, width, height])


@torch.no_grad()
def explain(model: nn.Module, image: Tensor | NestedTensor | Sequence[Tensor], size: Size | None = None,
            index: int = 0, encoder: bool = True) -> Explanation:
    """Run ``model`` on an image ``[C, H, W]`` as it is fed, and keep its attention.

    ``size`` (height, width): of the picture whose pixels the answers refer to; by default of the image as fed. Of a
    batch, as models take it, the image ``index`` is kept. ``encoder=False`` leaves the encoder out: of a deformable one,
    points and weights of all tokens are kept, 1.5 kB a token and layer (8 heads, 4 levels, 4 points).

    The model must be in evaluation mode, and explain one image at a time. Raises TypeError for models whose attention is
    not known here, ValueError for a model that trains and an image that is all padding, IndexError for an ``index`` that
    the batch does not have.
    """
    detr: Any = model.detr if isinstance(model, DETRsegm) else model
    layers = getattr(getattr(getattr(detr, "transformer", None), "decoder", None), "layers", [None])
    if not isinstance(layers[0], (*DENSE, DeformableTransformerDecoderLayer)):
        raise TypeError(f"explain: the attention of a {type(model).__name__} is not known; give a model as build_model "
                        f"makes it, with decoder layers of detr/decoder.py (of a Detector its .model, of a model "
                        f"wrapped for several processes its .module)")
    if model.training:
        raise ValueError("explain: the model is in training mode, where dropout hides a part of what it does; call "
                         "model.eval() first")
    samples = as_nested_tensor([image] if isinstance(image, Tensor) and image.ndim == 3 else image)
    check("index", index, len(samples), "of the batch")
    samples = samples.to(next(model.parameters()).device)
    fed = extent(samples.mask[index], f"image {index} of the batch")
    with watching(detr, encoder) as seen:
        outputs: Outputs = model(samples)
    of_layers = [*outputs["aux_outputs"], outputs]
    if not detr.aux_loss:
        del outputs["aux_outputs"]
    boxes = full(torch.stack([layer["pred_boxes"][index] for layer in of_layers]))
    size = size or fed
    if isinstance(layers[0], DENSE):
        of_encoder, of_decoder = ([dense_attention(*one, index, seen.grid) for one in stack]
                                  for stack in (seen.encoder, seen.decoder))
        references = [] if seen.start is None else [full(seen.start[index]), *boxes[:-1]]
        if seen.references is not None:
            references = [*full(seen.references[..., index, :, :]).expand(len(layers), -1, -1)]
        return Explanation(outputs, size, [of_decoder[0].shape], [seen.grid], of_encoder, of_decoder, boxes, references)
    encoder_points, decoder_points = ([deformable_attention(call, index, size) for _, call in stack]
                                      for stack in (seen.encoder, seen.decoder))
    references = [first_reference(call, index) for _, call in seen.decoder]
    grids = seen.decoder[0][1]["levels"].shapes
    return Explanation(outputs, size, decoder_points[0].shapes, grids, encoder_points, decoder_points, boxes, references)


@dataclass
class Seen:
    """What hooks saw of one forward pass: the attention modules in order, and what they were called with."""
    encoder: list[tuple[Any, dict[str, Any]]]
    decoder: list[tuple[Any, dict[str, Any]]]
    grid: Size = (0, 0)                         # of the map that dense attention looks at
    start: Tensor | None = None                 # [B, Q, 4] the boxes that queries of ProposalDETR start from
    references: Tensor | None = None            # [B, Q, 2] what all layers of Conditional DETR look from; or [K, B, Q, 4]


@contextmanager
def watching(detr: Any, encoder: bool) -> Iterator[Seen]:
    """Hooks on all attention to the image, and boxes of all decoder layers in the outputs, until the block is left."""
    transformer, aux_loss = detr.transformer, detr.aux_loss
    cross = "cross_attn" if hasattr(transformer.decoder.layers[0], "cross_attn") else "multihead_attn"
    seen = Seen([(layer.self_attn, {}) for layer in transformer.encoder.layers] if encoder else [],
                [(getattr(layer, cross), {}) for layer in transformer.decoder.layers])
    hooks: list[Any] = []

    def projected(module: nn.Module, args: Any, out: Tensor) -> None:
        seen.grid = (out.shape[-2], out.shape[-1])

    def started(module: nn.Module, args: Any) -> None:
        seen.start = args[1]

    def looked(module: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> None:
        seen.references = out[1]

    try:
        for attention, call in (*seen.encoder, *seen.decoder):
            hooks += watch_points(attention, call) if isinstance(attention, MSDeformAttn) else \
                watch_weights(attention, call)
        if isinstance(detr.input_proj, nn.Conv2d):
            hooks.append(detr.input_proj.register_forward_hook(projected))
        if isinstance(detr, ProposalDETR):
            hooks.append(transformer.decoder.register_forward_pre_hook(started))
        if isinstance(transformer.decoder.layers[0], ConditionalDecoderLayer):
            hooks.append(transformer.decoder.register_forward_hook(looked))
        detr.aux_loss = True
        yield seen
    finally:
        detr.aux_loss = aux_loss
        for hook in hooks:
            hook.remove()


def watch_weights(attention: ProjectedAttention, call: dict[str, Any]) -> list[Any]:
    """Keep what dense attention is called with. A hook that ran after it would make it compute weights."""
    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        call.update(query=args[0], key=args[1], mask=kwargs["key_padding_mask"], prior=kwargs.get("prior"))

    return [attention.register_forward_pre_hook(before, with_kwargs=True)]


def watch_points(attention: MSDeformAttn, call: dict[str, Any]) -> list[Any]:
    """Keep where deformable attention looks from, and its own offsets and weights, from which points follow."""
    def before(module: nn.Module, args: Any) -> None:
        call.update(reference=args[1], levels=args[3])

    def offsets(module: nn.Module, args: Any, out: Tensor) -> None:
        call["offsets"] = out

    def logits(module: nn.Module, args: Any, out: Tensor) -> None:
        call["logits"] = out.unflatten(-1, (attention.n_heads, -1))

    return [attention.register_forward_pre_hook(before), attention.sampling_offsets.register_forward_hook(offsets),
            attention.attention_weights.register_forward_hook(logits)]


def dense_attention(attention: ProjectedAttention, call: dict[str, Any], index: int, grid: Size) -> DenseAttention:
    """What one image's queries and tokens were compared as."""
    query, key = (full(x.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1))
                  for x in attention.project(call["query"][index], call["key"][index]))
    mask = torch.zeros(key.shape[1], dtype=torch.bool) if call["mask"] is None else call["mask"][index].cpu()
    prior = None if call["prior"] is None else full(call["prior"][index])
    return DenseAttention(query, key, mask, prior, grid, extent(mask.unflatten(0, grid), f"the map of image {index}"))


def deformable_attention(call: dict[str, Any], index: int, size: Size) -> DeformableAttention:
    """Points and weights of one image, as ``MSDeformAttn`` has them."""
    levels: FeatureLevels = call["levels"]
    reference = call["reference"][index, :, None, :, None]                                  # [Q, 1, L, 1, 2 or 4]
    heads, count = call["logits"].shape[-2], len(levels.shapes)
    weights = call["logits"][index].softmax(-1).unflatten(-1, (count, -1))                  # [Q, M, L, P]
    offsets = call["offsets"][index].unflatten(-1, (heads, count, -1, 2))                   # [Q, M, L, P, 2]
    if reference.shape[-1] == 2:
        locations = reference + offsets / levels.sizes[:, None]
    else:
        locations = reference[..., :2] + offsets / offsets.shape[-2] * reference[..., 2:] * 0.5
    height, width = size
    points = locations / levels.valid_ratios[index, :, None] * locations.new_tensor([width, height])
    return DeformableAttention(full(points), full(weights), valid_shapes(levels, index), size)


def valid_shapes(levels: FeatureLevels, index: int) -> list[Size]:
    """Height and width of what is not padding in each level of one image."""
    return [(int(height), int(width)) for width, height in levels.valid_sizes[index].tolist()]


def first_reference(call: dict[str, Any], index: int) -> Tensor:
    """Where the queries of one image looked from, ``[Q, 2 or 4]`` as fractions of it: references of the first level,
    which are fractions of a level with its padding."""
    reference = call["reference"][index, :, 0]
    return full(reference / call["levels"].valid_ratios[index, 0].repeat(reference.shape[-1] // 2))


def splat(points: Tensor, weights: Tensor, shape: Size) -> Tensor:
    """``points [M, ..., 2]`` (x, y) as fractions of the image and their ``weights [M, ...]`` -> maps ``[M, H, W]``. Each
    weight goes to the four cells whose centres are around its point, bilinearly; what goes to cells outside is lost."""
    height, width = shape
    at = points.flatten(1, -2) * points.new_tensor([width, height]) - 0.5                   # [M, n, 2]
    corner = at.floor()
    maps = weights.new_zeros(len(weights), height * width)
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        cell = corner + corner.new_tensor([right, down])
        share = (1 - (at - cell).abs()).prod(-1) * weights.flatten(1)
        x, y = cell.unbind(-1)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        place = torch.where(inside, y * width + x, 0).long()
        maps.scatter_add_(1, place, share.masked_fill(~inside, 0.0))
    return maps.unflatten(1, shape)


def extent(mask: Tensor, what: str) -> Size:
    """Height and width of what is not padding, at the top left of ``mask [H, W]``. ValueError where all is padding."""
    height, width = int((~mask).any(1).sum()), int((~mask).any(0).sum())
    if not height:
        raise ValueError(f"{what} is all padding; give its mask False where the image is")
    return height, width


def full(x: Tensor) -> Tensor:
    """In float32 at least, on the CPU, and nothing of the batch that ``x`` is a part of."""
    return x.to("cpu", torch.promote_types(x.dtype, torch.float32), copy=True)


def check(what: str, index: int | None, count: int, where: str = "") -> None:
    """IndexError unless ``index`` is None or one of ``count``, from 0 or, negative, from the end."""
    if index is not None and not -count <= index < count:
        there = f"0 to {count - 1} are there" if count else "there is none"
        raise IndexError(f"{what} {index}{' ' * bool(where)}{where}: {there}")


def of_head(weights: Tensor, head: int | None) -> Tensor:
    """``[M, ...]`` -> one head's, or the average."""
    check("head", head, len(weights))
    return weights.mean(0) if head is None else weights[head]
