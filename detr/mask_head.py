"""From attention to masks (Carion et al., 2020, section 4.4; figure 8)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    resolution; a feature pyramid over ``fpn_dims`` channels, coarsest first."""

    def __init__(self, dim: int, context_dim: int, fpn_dims: list[int]) -> None:
        super().__init__()
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

    def forward(self, src: Tensor, attention: Tensor, fpns: list[Tensor]) -> Tensor:
        """``src [B, D, H, W]``, ``attention [B, Q, M, H, W]``, ``fpns`` the backbone's other maps, coarsest first ->
        mask logits ``[B, Q, H', W']`` at the size of the finest."""
        queries = attention.shape[1]
        x = torch.cat([src.repeat_interleave(queries, 0), attention.flatten(0, 1)], dim=1)
        x = self.block(1, x)
        x = self.block(2, x)
        for i, fpn in enumerate(fpns, start=1):
            fpn = getattr(self, f"adapter{i}")(fpn).repeat_interleave(queries, 0)
            x = self.block(i + 2, fpn + F.interpolate(x, size=fpn.shape[-2:], mode="nearest"))
        return self.out_lay(x).view(len(attention), queries, *x.shape[-2:])

    def block(self, i: int, x: Tensor) -> Tensor:
        return F.relu(getattr(self, f"gn{i}")(getattr(self, f"lay{i}")(x)))
