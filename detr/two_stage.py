"""Two-stage Deformable DETR (Zhu et al., 2021, section 4.2 and A.4): each token of the encoder proposes a box, and the
best proposals become the queries."""
from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .padding import at_least
from .position_encoding import sine_encoding
from .reference_points import token_centres, token_values
from .structures import FeatureLevels

SIDE = 0.05                     # of a proposal of the finest level before the head changes it: fraction of the image


def anchors(levels: FeatureLevels) -> tuple[Tensor, Tensor]:
    """The box around each token before the head changes it, as logits ``[B, S, 4]`` (cxcywh), twice as large from level
    to level; and which tokens propose none ``[B, S]``: padding, and those at the border of the image. As published, the
    logits of these are infinite."""
    centres = token_centres(levels)                                                             # [B, S, 2]
    sides = SIDE * 2.0 ** torch.arange(len(levels.shapes), device=centres.device)
    sides = token_values(levels, sides[:, None].expand(-1, 2)).expand_as(centres)
    boxes = torch.cat([centres, sides], dim=-1)
    invalid = levels.mask | ~((boxes > 0.01) & (boxes < 0.99)).all(-1)
    return (boxes / (1 - boxes)).log().masked_fill(invalid[..., None], math.inf), invalid


class Tokens(NamedTuple):
    """What proposals are made of, one a token."""
    memory: Tensor              # [B, S, D], zero where a token proposes nothing
    anchors: Tensor             # [B, S, 4] logits of boxes, infinite there
    invalid: Tensor             # [B, S] bool, True there
    mask: Tensor                # [B, S] bool, True on padding


def proposing_tokens(memory: Tensor, levels: FeatureLevels, num_queries: int) -> Tokens:
    """The encoder's ``memory [B, S, D]`` of ``levels``, at least ``num_queries`` tokens: images that are too small for so
    many are padded with tokens that propose nothing."""
    boxes, invalid = anchors(levels)
    short = at_least(0, num_queries - memory.shape[1])
    return Tokens(F.pad(memory.masked_fill(invalid[..., None], 0.0), (0, 0, 0, short)),
                  F.pad(boxes, (0, 0, 0, short), value=math.inf),
                  F.pad(invalid, (0, short), value=True), F.pad(levels.mask, (0, short), value=True))


def best(scores: Tensor, mask: Tensor, num_queries: int, exact: bool = False) -> Tensor:
    """The tokens with the highest ``scores [B, S]``, best first: ``[B, Q]``.

    As published, padding competes with all the others under its own score; ``exact`` takes padding last. An image that
    has fewer tokens than queries takes all of these before padding in any case, so that it gets the same alone and in a
    batch.
    """
    last = mask if exact else mask & ((~mask).sum(1, keepdim=True) < num_queries)
    return scores.masked_fill(last, -math.inf).topk(num_queries, dim=1).indices


def warn_of_few(tokens: int, num_queries: int, size: torch.Size) -> None:
    """Where images of ``size`` have fewer tokens than queries are to begin at."""
    if not torch.compiler.is_compiling() and tokens < num_queries:
        warnings.warn(f"images of {size[-2]}x{size[-1]} have {tokens} tokens for {num_queries} queries; the others start "
                      f"from nothing and are told by outputs['invalid_queries']. Feed larger images or lower "
                      f"--num_queries", stacklevel=3)


def encode_proposals(logits: Tensor, num_feats: int) -> Tensor:
    """Sine encoding of boxes before the sigmoid: ``[B, Q, 4]`` -> ``[B, Q, 4 * num_feats]``, in the order x, y, width,
    height."""
    coordinates = (logits.sigmoid() * 2 * math.pi).unbind(-1)
    return torch.cat([sine_encoding(x, num_feats) for x in coordinates], dim=-1)
