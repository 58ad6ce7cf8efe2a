"""Transformers as their papers write them: one image at a time, token by token without padding, head by head, from the
tensors of a state dict. Nothing here knows the project's modules."""
import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    layers = sum(key.startswith(f"{name}.layers.") for key in weights) // 2
    for i in range(layers):
        x = linear(weights, f"{name}.layers.{i}", x if i == 0 else x.clamp(min=0))
    return x


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def feed_forward(weights: Weights, x: Tensor) -> Tensor:
    hidden = linear(weights, "linear1", x)
    slope = weights.get("activation.weight", torch.zeros(1, dtype=x.dtype))
    return linear(weights, "linear2", torch.where(hidden > 0, hidden, slope * hidden))


def attend(weights: Weights, name: str, scores: list[Tensor], value: Tensor, forbidden: Tensor | None = None) -> Tensor:
    """``scores``: one ``[Q, S]`` a head; ``value [S, D]``; ``forbidden [Q, S]``."""
    summed = []
    for head, v in zip(scores, value.chunk(len(scores), dim=-1)):
        if forbidden is not None:
            head = torch.where(forbidden, torch.tensor(-math.inf, dtype=head.dtype), head)
        summed.append(head.softmax(-1) @ v)
    return linear(weights, f"{name}.out_proj", torch.cat(summed, dim=-1))


def products(q: Tensor, k: Tensor, heads: int) -> list[Tensor]:
    return [a @ b.T for a, b in zip(q.chunk(heads, dim=-1), k.chunk(heads, dim=-1))]


def self_attention(weights: Weights, name: str, x: Tensor, position: Tensor, heads: int,
                   forbidden: Tensor | None = None) -> Tensor:
    """As DETR's and Deformable DETR's: positions are added to queries and keys."""
    (wq, wk, wv), (bq, bk, bv) = (weights[f"{name}.in_proj_{kind}"].chunk(3) for kind in ("weight", "bias"))
    q, k, v = (x + position) @ wq.T + bq, (x + position) @ wk.T + bk, x @ wv.T + bv
    return attend(weights, name, [s / math.sqrt(x.shape[-1] / heads) for s in products(q, k, heads)], v, forbidden)


def encoder(weights: Weights, tokens: Tensor, position: Tensor, heads: int) -> Tensor:
    """DETR's; with ``query_scale``, DAB-DETR's."""
    scaled = any(name.startswith("query_scale.") for name in weights)
    for i in range(sum(name.endswith("linear1.weight") for name in weights)):
        layer = part(weights, f"layers.{i}.")
        where = position * mlp(weights, "query_scale", tokens) if scaled else position
        tokens = norm(layer, "norm1", tokens + self_attention(layer, "self_attn", tokens, where, heads))
        tokens = norm(layer, "norm2", tokens + feed_forward(layer, tokens))
    return tokens


def conditional_layer(weights: Weights, content: Tensor, query_position: Tensor, place: Tensor, memory: Tensor,
                      position: Tensor, heads: int, forbidden: Tensor | None = None) -> Tensor:
    """Meng et al., 2021: contents are compared with contents, places with places, and the products are summed."""
    width = content.shape[-1] / heads
    q = linear(weights, "sa_qcontent_proj", content) + linear(weights, "sa_qpos_proj", query_position)
    k = linear(weights, "sa_kcontent_proj", content) + linear(weights, "sa_kpos_proj", query_position)
    scores = [s / math.sqrt(width) for s in products(q, k, heads)]
    seen = attend(weights, "self_attn", scores, linear(weights, "sa_v_proj", content), forbidden)
    content = norm(weights, "norm1", content + seen)
    q, k = linear(weights, "ca_qcontent_proj", content), linear(weights, "ca_kcontent_proj", memory)
    where_q, where_k = linear(weights, "ca_qpos_sine_proj", place), linear(weights, "ca_kpos_proj", position)
    if "ca_qpos_proj.weight" in weights:
        q, k = q + linear(weights, "ca_qpos_proj", query_position), k + where_k
    scores = [(what + where) / math.sqrt(2 * width)
              for what, where in zip(products(q, k, heads), products(where_q, where_k, heads))]
    seen = attend(weights, "cross_attn", scores, linear(weights, "ca_v_proj", memory))
    content = norm(weights, "norm2", content + seen)
    return norm(weights, "norm3", content + feed_forward(weights, content))


def sine(coordinate: Tensor, features: int, temperature: float = 10000) -> Tensor:
    """``[...]`` in 0..1 -> ``[..., features]``."""
    waves = [coordinate * 2 * math.pi / temperature ** (2 * (i // 2) / features) for i in range(features)]
    return torch.stack([wave.cos() if i % 2 else wave.sin() for i, wave in enumerate(waves)], dim=-1)


def encoded(reference: Tensor, features: int) -> Tensor:
    """(x, y[, w, h]) -> y, x[, w, h], each ``features``."""
    x, y, *sides = reference.unbind(-1)
    return torch.cat([sine(c, features) for c in (y, x, *sides)], dim=-1)


def map_positions(height: int, width: int, features: int, temperature: float = 10000, offset: float = 0.0) -> Tensor:
    """``[height * width, 2 * features]`` of a map without padding, y first."""
    y, x = (((torch.arange(n, dtype=torch.float64) + 1 + offset) / (n + 1e-6)) for n in (height, width))
    y, x = y[:, None].expand(height, width), x[None].expand(height, width)
    return torch.cat([sine(y, features, temperature), sine(x, features, temperature)], dim=-1).flatten(0, 1)


def logit(x: Tensor, eps: float) -> Tensor:
    return x.clamp(min=eps).log() - (1 - x).clamp(min=eps).log()


def conditional_detr(weights: Weights, src: Tensor, heads: int) -> list[tuple[Tensor, Tensor]]:
    """``src [D, H, W]``, an image's projected map -> logits and boxes of each layer."""
    d, height, width = src.shape
    position = map_positions(height, width, d // 2)
    memory = encoder(part(weights, "transformer.encoder."), src.flatten(1).T, position, heads)
    decoder, query = part(weights, "transformer.decoder."), weights["query_embed.weight"]
    reference = mlp(decoder, "ref_point_head", query).sigmoid()
    place, content, layers = encoded(reference, d // 2), torch.zeros_like(query), []
    for i in range(len([name for name in decoder if name.endswith("linear1.weight")])):
        scale = mlp(decoder, "query_scale", content) if i else 1
        content = conditional_layer(part(decoder, f"layers.{i}."), content, query, place * scale, memory, position, heads)
        hidden = norm(decoder, "norm", content)
        delta = mlp(weights, "bbox_embed", hidden)
        boxes = torch.cat([delta[:, :2] + logit(reference, 1e-5), delta[:, 2:]], dim=-1).sigmoid()
        layers.append((linear(weights, "class_embed", hidden), boxes))
    return layers


def dab_detr(weights: Weights, src: Tensor, heads: int) -> list[tuple[Tensor, Tensor]]:
    """As above; the anchors of all patterns, one pattern after the other. Gradients flow from a layer's boxes to those of
    the layer before, and not from where a layer looks."""
    d, height, width = src.shape
    position = map_positions(height, width, d // 2, temperature=20)
    memory = encoder(part(weights, "transformer.encoder."), src.flatten(1).T, position, heads)
    decoder, anchors = part(weights, "transformer.decoder."), weights["refpoint_embed.weight"]
    patterns = weights.get("transformer.patterns.weight", torch.zeros(1, d, dtype=src.dtype))
    queries = [(pattern, anchor) for pattern in patterns for anchor in anchors]
    content, reference = (torch.stack(x) for x in zip(*queries))
    reference, layers = reference.sigmoid(), []
    for i in range(len([name for name in decoder if name.endswith("linear1.weight")])):
        start, reference = reference, reference.detach() if i else reference
        place = encoded(reference, d // 2)
        query = mlp(decoder, "ref_point_head", place)
        scale = mlp(decoder, "query_scale", content) if i else torch.ones_like(content)
        wanted = mlp(decoder, "ref_anchor_head", content).sigmoid()
        y, x = place[:, :d // 2] * scale[:, :d // 2], place[:, d // 2:d] * scale[:, d // 2:]
        asked = torch.cat([y * wanted[:, 1:] / reference[:, 3:], x * wanted[:, :1] / reference[:, 2:3]], dim=-1)
        content = conditional_layer(part(decoder, f"layers.{i}."), content, query, asked, memory, position, heads)
        hidden = norm(decoder, "norm", content)
        layers.append((linear(weights, "class_embed", hidden),
                       (mlp(weights, "bbox_embed", hidden) + logit(start, 1e-3)).sigmoid()))
        reference = (mlp(weights, "bbox_embed", content) + logit(reference, 1e-3)).sigmoid()
    return layers
