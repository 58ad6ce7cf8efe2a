"""Denoising: objects whose class and box got noise, as further queries that have to find them again (Li et al., 2022,
DN-DETR, section 4). They know their object, so that nothing is matched for them, and layers learn to correct a box while
what the matched queries are to find still changes from step to step. Contrastive denoising adds queries with more noise,
which have to say that they see no object (Zhang et al., 2023, DINO, section 3.3).

A group has each object of an image once, contrastive ones have it twice; images with fewer objects are filled up. Groups
come one after the other, and before the queries that are matched:

    | group 0: positives, negatives | group 1: positives, negatives | ... | matching queries |

All this is training's: the queries that are matched see nothing of it; they are seen. Denoising queries of one image do
depend on its batch, which says how many there are.

DN-DETR has a fixed number of groups, tells both kinds of queries apart by one more channel, and lets the matched ones
start with a class "unknown". Here, as in DINO, groups are as many as fit, and the matched queries start as they do
without denoising, so that detection uses the same weights with it and without.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, inverse_sigmoid
from .structures import Match, Outputs, Target
from .transfer import on_device

MANY = 50               # a number of denoising queries from here on is meant in all, below it for each object


class Noising(NamedTuple):
    """For how many queries, and how much noise."""
    number: int                     # see ``number_of_groups``
    box_scale: float                # of boxes, see ``noised_corners`` and ``noised_centres``
    label_ratio: float              # half of this is the share of labels that are drawn anew
    contrastive: bool               # DINO's: with negatives, and noise of corners


class Noise(NamedTuple):
    """Random numbers for ``n`` queries: all objects of the batch, image after image, and this as often as there are
    positives and negatives of groups."""
    chance: Tensor                  # [n] in 0..1
    new_label: Tensor               # [m] int64, of the m queries whose ``chance`` is less than half of ``label_ratio``
    sign: Tensor                    # [n, 4] 0 or 1
    box: Tensor                     # [n, 4] in 0..1


class Denoising(NamedTuple):
    """The denoising queries of a batch, ``P`` (here not points) an image, and what is known of them."""
    labels: Tensor                  # [B, P] int64 in 0..C-1
    boxes: Tensor                   # [B, P, 4] cxcywh in 0..1; 0.5 on padding, a logit of 0, as published
    mask: Tensor                    # [B, P] bool, True on padding
    attn_mask: Tensor               # [P + Q, P + Q] bool, True where a query (row) may not look at another (column)
    match: Match                    # the positives, and their objects
    groups: int


def number_of_groups(number: int, most: int) -> int:
    """How many groups there are where the fullest image has ``most`` objects: as many as ``number`` positives suffice
    for, at least one (with as many negatives beside them in contrastive denoising). As published, a ``number`` below 50
    is half of the number of groups, whatever the objects."""
    return max(1, number // most) if number >= MANY else 2 * number


def draw_noise(noising: Noising, n: int, num_classes: int, generator: torch.Generator | None = None) -> Noise:
    """On the CPU, in the published order, from ``generator`` or PyTorch's own. Of noise that is not wanted nothing is
    drawn."""
    chance, new_label = torch.ones(n), torch.zeros(0, dtype=torch.int64)
    sign, box = torch.zeros(n, 4), torch.zeros(n, 4)
    if noising.label_ratio > 0:
        chance = torch.rand(n, generator=generator)
        new_label = torch.randint(num_classes, (int((chance < noising.label_ratio / 2).sum()),), generator=generator)
    if noising.box_scale > 0:
        sign = torch.randint(2, (n, 4), generator=generator, dtype=torch.float32)
        box = torch.rand(n, 4, generator=generator)
    return Noise(chance, new_label, sign, box)


def denoise(targets: Sequence[Target], noising: Noising, num_classes: int, num_queries: int, noise: Noise | None = None,
            generator: torch.Generator | None = None) -> Denoising | None:
    """Denoising queries for ``targets``, to stand before ``num_queries`` others; None where no image has objects.
    ``noise`` is drawn (``draw_noise``) where it is not given."""
    counts = [len(target["labels"]) for target in targets]
    most, total, device = max(counts, default=0), sum(counts), targets[0]["boxes"].device
    if not most:
        return None
    groups, parts = number_of_groups(noising.number, most), 1 + noising.contrastive
    blocks = groups * parts                                 # each has every object of an image once
    noise = draw_noise(noising, blocks * total, num_classes, generator) if noise is None else noise
    if len(noise.chance) != blocks * total:
        raise ValueError(f"noise is for {len(noise.chance)} queries, and {groups} groups of {total} objects have "
                         f"{blocks * total}: draw it for that many")

    # A wrong label is the matcher's to complain about.
    labels = torch.cat([target["labels"] for target in targets]).clamp(0, num_classes - 1).repeat(blocks)
    drawn = on_device(drawn_labels(noise, noising.label_ratio), device)
    labels = torch.where(drawn < 0, labels, drawn)                                                      # [n]
    boxes = torch.cat([target["boxes"] for target in targets]).repeat(blocks, 1)                        # [n, 4]
    boxes = (noised_corners if noising.contrastive else noised_centres)(
        boxes, noising.box_scale * on_device(signed(noise, total, parts), device).to(boxes.dtype))

    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))                           # [total]
    place = torch.cat([torch.arange(count) for count in counts])                                        # [total]
    query = (most * torch.arange(blocks)[:, None] + place).flatten()                                    # [n]
    at, shape = (on_device(image.repeat(blocks), device), on_device(query, device)), (len(counts), blocks * most)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    mask[at] = False
    of_query, of_box = labels.new_zeros(shape), boxes.new_full((*shape, 4), 0.5)
    of_query[at], of_box[at] = labels, boxes
    attn_mask = attention_mask(groups, parts * most, num_queries, device)
    return Denoising(of_query, of_box, mask, attn_mask, known_match(counts, groups, parts * most), groups)


def drawn_labels(noise: Noise, label_ratio: float) -> Tensor:
    """The labels that take the place of others, -1 where these stay: ``[n]``."""
    drawn = torch.full(noise.chance.shape, -1, dtype=torch.int64)
    drawn[noise.chance < label_ratio / 2] = noise.new_label
    return drawn


def signed(noise: Noise, total: int, parts: int) -> Tensor:
    """The noise of boxes ``[n, 4]``, of either sign: less than 1 of positives, 1 to 2 of negatives."""
    negative = torch.arange(len(noise.box)) // total % parts                        # [n] 0 or 1
    return (noise.box + negative[:, None]) * (2 * noise.sign - 1)


def noised_corners(boxes: Tensor, noise: Tensor) -> Tensor:
    """DINO's: each side of ``boxes [n, 4]`` moves by ``noise [n, 4]`` times half the width or height, but not out of the
    image."""
    half = boxes[:, 2:].repeat(1, 2) / 2
    moved = (box_cxcywh_to_xyxy(boxes) + noise * half).clamp(0, 1)
    return box_xyxy_to_cxcywh(moved).clamp(0, 1)                    # sides that changed places leave no width


def noised_centres(boxes: Tensor, noise: Tensor) -> Tensor:
    """DN-DETR's: the centre of ``boxes [n, 4]`` moves by ``noise [n, 4]`` times half the width and height, and these
    change by it times themselves (section 4.3)."""
    return (boxes + noise * torch.cat([boxes[:, 2:] / 2, boxes[:, 2:]], dim=1)).clamp(0, 1)


def attention_mask(groups: int, size: int, num_queries: int, device: torch.device | None = None) -> Tensor:
    """True where a query may not look at another: denoising queries ``size`` a group see their own group and the
    matching queries, these only each other: bool ``[P + Q, P + Q]``."""
    group = torch.arange(groups * size + num_queries, device=device) // size
    group = group.where(group < groups, -1)
    return (group[:, None] != group) & (group >= 0)


def known_match(counts: Sequence[int], groups: int, size: int) -> Match:
    """The positives of images with so many objects, and these objects."""
    return [((size * torch.arange(groups)[:, None] + torch.arange(count)).flatten(), torch.arange(count).repeat(groups))
            for count in counts]


def join(noised: Denoising | None, label_enc: nn.Embedding, content: Tensor,
         reference: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor | None]:
    """Denoising queries, which start with the row of their label in ``label_enc`` and with their box, before the matching
    ones, of ``content [B, Q, D]`` and ``reference [B, Q, 4]``; and who of them may not look at whom. Their boxes come
    from logits, as published (``eps``: see ``inverse_sigmoid``). Where there are no such queries, the table takes part
    with nothing: processes that train together must not wait for its gradient."""
    if noised is None:
        return content + 0 * label_enc.weight[0], reference, None
    if len(noised.labels) != content.shape[0]:
        raise ValueError(f"{len(noised.labels)} targets for {content.shape[0]} images: give one for each")
    known = label_enc(noised.labels).masked_fill(noised.mask[..., None], 0.0)
    return (torch.cat([known.to(content.dtype), content], dim=1),
            torch.cat([inverse_sigmoid(noised.boxes, eps).sigmoid().to(reference.dtype), reference], dim=1),
            noised.attn_mask)


class DenoisingQueries(nn.Module):
    """Puts denoising queries before the matching ones in training, if there is a ``noising``. Without parameters: the
    table is its model's, by its published name. ``eps``: see ``inverse_sigmoid``."""

    def __init__(self, noising: Noising | None, num_classes: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.noising, self.num_classes, self.eps = noising, num_classes, eps

    def forward(self, targets: Sequence[Target] | None, label_enc: nn.Embedding | None, content: Tensor,
                reference: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Denoising | None]:
        """``targets`` of the batch, and the matching queries as ``join`` takes them -> all queries' contents and boxes,
        who of them may not look at whom, and what is known of the denoising ones; None twice where there are none."""
        if self.noising is None or label_enc is None or not self.training:
            return content, reference, None, None
        noised = None if targets is None else denoise(targets, self.noising, self.num_classes, content.shape[1])
        return *join(noised, label_enc, content, reference, self.eps), noised


def collect(layers: Sequence[Outputs], noised: Denoising | None, aux_loss: bool) -> Outputs:
    """What decoder layers say as what a model returns: of the matching queries the last layer's, with the others' in
    ``aux_outputs``; and, for the criterion, those of the denoising queries in ``dn_outputs``."""
    outputs: Outputs = {}
    if noised is not None:
        layers, outputs["dn_outputs"] = separate(layers, noised, aux_loss)
    outputs |= layers[-1]                                                                       # type: ignore[typeddict-item]
    if aux_loss:
        outputs["aux_outputs"] = list(layers[:-1])
    return outputs


def separate(layers: Sequence[Outputs], noised: Denoising, aux_loss: bool) -> tuple[list[Outputs], Outputs]:
    """What decoder layers say of the matching queries; and, for the criterion, what they say of the denoising ones, the
    last layer's with the others' in ``aux_outputs``."""
    size = noised.labels.shape[1]
    known: list[Outputs] = [{"pred_logits": layer["pred_logits"][:, :size], "pred_boxes": layer["pred_boxes"][:, :size],
                             "match": noised.match, "copies": noised.groups} for layer in layers]
    others: list[Outputs] = [{"pred_logits": layer["pred_logits"][:, size:], "pred_boxes": layer["pred_boxes"][:, size:]}
                             for layer in layers]
    return others, {**known[-1], "aux_outputs": known[:-1]} if aux_loss else known[-1]
