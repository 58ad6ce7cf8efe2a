"""From attention to masks (Carion et al., 2020, section 4.4; figure 8)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nested_tensor import NestedTensor
from .padding import Size, Where, exact_upsample, normalised, where, zeroed
from .structures import Outputs

LAYERS = 5                      # convolutions before the last one


class Intermediates(NamedTuple):
    """What a detector's forward pass went through, for its mask head."""
    features: list[NestedTensor]        # the backbone's maps, finest first
    src: Tensor                         # [B, D, H, W] the last of them, projected
    hs: Tensor                          # [B, Q, D] the last decoder layer's queries
    memory: Tensor                      # [B, D, H, W] the encoder's output at the last map


class DETRsegm(nn.Module):
    """A detector with a mask head (section 4.4; figure 8): for each query its attention over the memory, sharpened by a
    small convolutional network that adds the backbone's finer maps.

    ``detr.detect`` gives its outputs and ``Intermediates``. The head's attention has the detector's number of heads,
    rounded up to a multiple of 8, which its normalisation asks for.
    """

    def __init__(self, detr: Any, nheads: int, freeze_detr: bool = False) -> None:
        super().__init__()
        self.detr = detr
        if freeze_detr:
            detr.requires_grad_(False)
        d_model, nheads = detr.transformer.d_model, -(-nheads // 8) * 8
        self.bbox_attention = MHAttentionMap(d_model, nheads)
        self.mask_head = MaskHeadSmallConv(d_model + nheads, d_model, detr.backbone[0].channels[-2::-1])

    def forward(self, samples: NestedTensor | Tensor | list[Tensor]) -> Outputs:
        """The detector's outputs, and ``pred_masks [B, Q, H / 4, W / 4]``: logits, at the stride of the finest map."""
        outputs, (features, src, hs, memory) = self.detr.detect(samples)
        attention = self.bbox_attention(hs, memory, features[-1].mask)                      # [B, Q, M, H, W]
        sizes = None if features[-1].sizes is None else [f.sizes for f in features[::-1]]
        outputs["pred_masks"] = self.mask_head(src, attention, [f.tensors for f in features[-2::-1]], sizes)
        return outputs


class MHAttentionMap(nn.Module):
    """Where each query looks, head by head: attention weights without values.

    As published, the softmax runs over heads and positions together.
    """

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear, self.k_linear = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """``queries [B, Q, D]``, ``memory [B, D, H, W]``, ``mask [B, H, W]`` True on padding -> ``[B, Q, M, H, W]``."""
        q = self.q_linear(queries).unflatten(-1, (self.num_heads, -1))                      # [B, Q, M, D/M]
        k = F.conv2d(memory, self.k_linear.weight[..., None, None], self.k_linear.bias)
        k = k.unflatten(1, (self.num_heads, -1))                                            # [B, M, D/M, H, W]
        scores = torch.einsum("bqmd,bmdhw->bqmhw", q / q.shape[-1] ** 0.5, k)
        scores = scores.masked_fill(mask[:, None, None], float("-inf"))
        return scores.flatten(2).softmax(-1).view_as(scores)


class MaskHeadSmallConv(nn.Module):
    """Convolutions with group normalisation that take a query's attention, and the image, to a quarter of the image's
    resolution; a feature pyramid over ``fpn_dims`` channels, coarsest first, three at most."""

    def __init__(self, dim: int, context_dim: int, fpn_dims: list[int]) -> None:
        super().__init__()
        if len(fpn_dims) > LAYERS - 2:
            raise ValueError(f"a mask head adds {LAYERS - 2} finer maps at most, and there are {len(fpn_dims)}")
        widths = [dim, context_dim // 2, context_dim // 4, context_dim // 8, context_dim // 16]
        if any(width % 8 for width in widths):
            raise ValueError(f"masks need hidden_dim ({context_dim}) to divide by 128 and hidden_dim + nheads ({dim}) "
                             f"by 8, for group normalisation")
        for i, (a, b) in enumerate(zip([dim, *widths], widths), start=1):
            setattr(self, f"lay{i}", nn.Conv2d(a, b, 3, padding=1))
            setattr(self, f"gn{i}", nn.GroupNorm(8, b))
        for i, (channels, width) in enumerate(zip(fpn_dims, widths[1:]), start=1):
            setattr(self, f"adapter{i}", nn.Conv2d(channels, width, 1))
        self.out_lay = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, src: Tensor, attention: Tensor, fpns: list[Tensor],
                sizes: Sequence[Sequence[Size]] | None = None) -> Tensor:
        """``src [B, D, H, W]``, ``attention [B, Q, M, H, W]``, ``fpns`` the backbone's other maps, coarsest first ->
        mask logits ``[B, Q, H', W']`` at the size of the finest. ``sizes``: the images' extents in ``src`` and in each
        of ``fpns``, for logits that do not depend on padding."""
        queries = attention.shape[1]

        def inside(x: Tensor, level: int) -> Where | None:
            return where(x, None if sizes is None else [size for size in sizes[level] for _ in range(queries)])

        x = torch.cat([src.repeat_interleave(queries, 0), attention.flatten(0, 1)], dim=1)
        at = inside(x, 0)
        x = self.block(1, x, at)
        x = self.block(2, x, at)
        for i, fpn in enumerate(fpns, start=1):
            fpn = getattr(self, f"adapter{i}")(fpn).repeat_interleave(queries, 0)
            size, at = (fpn.shape[-2], fpn.shape[-1]), inside(fpn, i)
            x = fpn + (F.interpolate(x, size, mode="nearest") if sizes is None else
                       exact_upsample(x, sizes[i - 1], sizes[i], size))
            x = self.block(i + 2, x, at)
        for i in range(len(fpns) + 3, LAYERS + 1):                          # small backbones have fewer maps
            x = self.block(i, x, at)
        return self.out_lay(zeroed(x, at)).view(len(attention), queries, *x.shape[-2:])

    def block(self, i: int, x: Tensor, at: Where | None) -> Tensor:
        return F.relu(normalised(getattr(self, f"gn{i}"), getattr(self, f"lay{i}")(zeroed(x, at)), at))
