"""Where deformable attention looks from (Zhu et al., 2021, sections 4.1, A.3 and A.4)."""
import torch
from torch import Tensor

from .boxes import inverse_sigmoid
from .structures import FeatureLevels


def encoder_reference_points(levels: FeatureLevels) -> Tensor:
    """The centre of each token's pixel, in every level: ``[B, S, L, 2]`` (x, y) as fractions of a level with its padding,
    though tokens and levels correspond by the part that is not padding."""
    return token_centres(levels)[:, :, None] * levels.valid_ratios[:, None]


def decoder_reference_points(reference: Tensor, levels: FeatureLevels) -> Tensor:
    """References of queries as fractions of the image ``[B, Q, 2 or 4]`` -> of each level with its padding
    ``[B, Q, L, 2 or 4]``."""
    ratios = levels.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
    return reference[:, :, None] * ratios[:, None]


def token_centres(levels: FeatureLevels) -> Tensor:
    """The centre of each token's pixel as a fraction of the valid part of its own level: ``[B, S, 2]`` (x, y)."""
    device = levels.tokens.device
    grids = []
    for h, w in levels.shapes:
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        grids.append(torch.stack([x.flatten(), y.flatten()], dim=-1))
    return (torch.cat(grids) + 0.5) / token_values(levels, levels.valid_sizes)


def token_values(levels: FeatureLevels, values: Tensor) -> Tensor:
    """What belongs to a level, for each of its tokens: ``[..., L, n]`` -> ``[..., S, n]``."""
    return torch.cat([values[..., i:i + 1, :].expand(*values.shape[:-2], h * w, -1)
                      for i, (h, w) in enumerate(levels.shapes)], dim=-2)


def map_centres(mask: Tensor) -> Tensor:
    """``mask [B, H, W]``, True on padding -> the centres of its cells ``[B, H * W, 2]`` (x, y) as fractions of the valid
    part."""
    valid = (~mask).float()
    y, x = ((valid.cumsum(d) - 0.5) / valid.sum(d, keepdim=True).clamp(min=1) for d in (1, 2))
    return torch.stack([x, y], dim=-1).flatten(1, 2)


def refine(reference: Tensor, delta: Tensor, eps: float = 1e-5) -> Tensor:
    """Boxes ``[..., 4]`` in 0..1 that differ from ``reference`` by ``delta``, before the sigmoid (section A.4, iterative
    bounding box refinement; Liu et al., 2022, DAB-DETR, section 4.3); where the reference is a point ``[..., 2]``, the
    size is all ``delta``'s (section A.3). References are taken for ``eps`` to ``1 - eps``."""
    known = inverse_sigmoid(reference, eps)
    if reference.shape[-1] == 2:
        known = torch.cat([known, torch.zeros_like(known)], dim=-1)
    return (known + delta).sigmoid()
