"""Decoder layers: object queries look at each other, then at the image, densely (Carion et al., 2020, figure 10), densely
with places apart from contents (Meng et al., 2021, section 3.3), or at a few points around their reference (Zhu et al.,
2021, section 4.1)."""
from typing import Any

import torch
from torch import Tensor, nn

from .attention import MultiheadAttention, ProjectedAttention
from .deformable_attention import MSDeformAttn
from .dropout import Dropout
from .mlp import feed_forward
from .residual import post_norm, pre_norm
from .structures import FeatureLevels


class TransformerDecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the encoder's memory, feed-forward; positions are added to
    queries and keys."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 normalize_before: bool = False) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(d_model, nhead, dropout)
        self.multihead_attn = MultiheadAttention(d_model, nhead, dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d_model), nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)
        self.residual = pre_norm if normalize_before else post_norm

    def forward(self, content: Tensor, query_position: Tensor, memory: Tensor, memory_key: Tensor, mask: Tensor | None,
                query_mask: Tensor | None = None, prior: Tensor | None = None) -> Tensor:
        """``content`` and ``query_position [B, Q, D]``; ``memory [B, S, D]``, and ``memory_key``, the same with its
        positions added; ``mask [B, S]`` True on padding; ``query_mask [B, Q]`` True on queries that are none
        and that the others must not see; ``prior [B, Q, S]``, added to the scores of the image. Returns the new content
        ``[B, Q, D]``."""
        def look_at_each_other(x: Tensor) -> Tensor:
            q = x + query_position
            return self.dropout(self.self_attn(q, q, x, key_padding_mask=query_mask)[0])

        def look_at_the_image(x: Tensor) -> Tensor:
            q = x + query_position
            more = {} if prior is None else {"prior": prior}        # which PyTorch's attention would not know
            return self.dropout(self.multihead_attn(q, memory_key, memory, key_padding_mask=mask, **more)[0])

        content = self.residual(content, look_at_each_other, self.norm1)
        content = self.residual(content, look_at_the_image, self.norm2)
        return self.residual(content, self.feed_forward, self.norm3)

    def feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.linear2, self.dropout)


class ConditionalDecoderLayer(nn.Module):
    """Self-attention among queries, conditional cross-attention to the encoder's memory, feed-forward.

    In cross-attention contents are compared with contents and places with places: in each head, what a query or a key is
    stands beside where it is, so that a score is the sum of both products (Meng et al., 2021, section 3.3). In
    self-attention contents and positions are added, as in DETR, but projected each by itself.
    """

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int, dropout: float,
                 activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.sa_qcontent_proj = nn.Linear(d_model, d_model)
        self.sa_qpos_proj = nn.Linear(d_model, d_model)
        self.sa_kcontent_proj = nn.Linear(d_model, d_model)
        self.sa_kpos_proj = nn.Linear(d_model, d_model)
        self.sa_v_proj = nn.Linear(d_model, d_model)
        self.ca_qcontent_proj = nn.Linear(d_model, d_model)
        self.ca_kcontent_proj = nn.Linear(d_model, d_model)
        self.ca_kpos_proj = nn.Linear(d_model, d_model)
        self.ca_v_proj = nn.Linear(d_model, d_model)
        self.ca_qpos_sine_proj = nn.Linear(d_model, d_model)
        self.self_attn = ProjectedAttention(d_model, nhead, dropout)
        self.cross_attn = ProjectedAttention(d_model, nhead, dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d_model), nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout, self.activation = Dropout(dropout), activation()

    @property
    def multihead_attn(self) -> nn.Module:
        """The cross-attention by DETR's name, for hooks."""
        return self.cross_attn

    def forward(self, content: Tensor, query_position: Tensor, query_place: Tensor, memory: Tensor,
                memory_position: Tensor, mask: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
        """``content`` and ``query_position [B, Q, D]``, and ``query_place [B, Q, D]``, which is compared with the places
        ``memory_position [B, S, D]`` of ``memory [B, S, D]``; ``mask [B, S]`` True on padding; ``attn_mask
        [Q, Q]`` True where a query may not look at another. Returns the new content ``[B, Q, D]``."""
        def look_at_each_other(x: Tensor) -> Tensor:
            q = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_position)
            k = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_position)
            return self.dropout(self.self_attn(q, k, self.sa_v_proj(x), attn_mask=attn_mask)[0])

        def look_at_the_image(x: Tensor) -> Tensor:
            where_q, where_k = self.ca_qpos_sine_proj(query_place), self.ca_kpos_proj(memory_position)
            what_q, what_k = self.contents(x, query_position, memory, where_k)
            q, k = self.beside(what_q, where_q), self.beside(what_k, where_k)
            return self.dropout(self.cross_attn(q, k, self.ca_v_proj(memory), key_padding_mask=mask)[0])

        content = post_norm(content, look_at_each_other, self.norm1)
        content = post_norm(content, look_at_the_image, self.norm2)
        return post_norm(content, self.feed_forward, self.norm3)

    def contents(self, x: Tensor, query_position: Tensor, memory: Tensor, where_k: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared as content: of the queries ``[B, Q, D]``, of the memory ``[B, S, D]``."""
        return self.ca_qcontent_proj(x), self.ca_kcontent_proj(memory)

    def beside(self, what: Tensor, where: Tensor) -> Tensor:
        """``[B, Q or S, D]`` twice -> ``[B, Q or S, 2 * D]``, one beside the other in each head."""
        heads = (x.unflatten(-1, (self.cross_attn.num_heads, -1)) for x in (what, where))
        return torch.cat([*heads], dim=-1).flatten(-2)

    def feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.linear2, self.dropout, self.activation)


class FirstConditionalDecoderLayer(ConditionalDecoderLayer):
    """The first layer, where contents know little yet: positions are added to them too, as in DETR."""

    def __init__(self, d_model: int, *layer: Any) -> None:
        super().__init__(d_model, *layer)
        self.ca_qpos_proj = nn.Linear(d_model, d_model)

    def contents(self, x: Tensor, query_position: Tensor, memory: Tensor, where_k: Tensor) -> tuple[Tensor, Tensor]:
        what_q, what_k = super().contents(x, query_position, memory, where_k)
        return what_q + self.ca_qpos_proj(query_position), what_k + where_k


def conditional_layers(num_layers: int, *layer: Any) -> nn.ModuleList:
    """The layers of a decoder: a first one, and the others."""
    return nn.ModuleList((ConditionalDecoderLayer if i else FirstConditionalDecoderLayer)(*layer)
                         for i in range(num_layers))


class DeformableTransformerDecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention to the encoder's memory, feed-forward. The published
    names count the normalisations in another order than they come in: norm2, norm1, norm3."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int, dropout: float, n_levels: int,
                 n_points: int) -> None:
        super().__init__()
        self.cross_attn = MSDeformAttn(d_model, n_levels, nhead, n_points)
        self.self_attn = MultiheadAttention(d_model, nhead, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d_model), nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, content: Tensor, query_position: Tensor, reference: Tensor, memory: Tensor,
                levels: FeatureLevels, attn_mask: Tensor | None = None) -> Tensor:
        """``content`` and ``query_position [B, Q, D]``; ``reference [B, Q, L, 2 or 4]``: points or boxes as fractions of
        each level; ``memory [B, S, D]`` of ``levels``; ``attn_mask [Q, Q]`` True where a query may not look at another.
        Returns the new content ``[B, Q, D]``."""
        def look_at_each_other(x: Tensor) -> Tensor:
            q = x + query_position
            return self.dropout(self.self_attn(q, q, x, attn_mask=attn_mask)[0])

        def look_at_the_image(x: Tensor) -> Tensor:
            return self.dropout(self.cross_attn(x + query_position, reference, memory, levels))

        content = post_norm(content, look_at_each_other, self.norm2)
        content = post_norm(content, look_at_the_image, self.norm1)
        return post_norm(content, self.feed_forward, self.norm3)

    def feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.linear2, self.dropout)
