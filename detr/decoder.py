"""Decoder layers: object queries look at each other, then at the image, densely (Carion et al., 2020, figure 10) or at a
few points around their reference (Zhu et al., 2021, section 4.1)."""
from torch import Tensor, nn

from .attention import MultiheadAttention
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

    def forward(self, content: Tensor, query_position: Tensor, memory: Tensor, memory_key: Tensor, mask: Tensor,
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
                levels: FeatureLevels) -> Tensor:
        """``content`` and ``query_position [B, Q, D]``; ``reference [B, Q, L, 2 or 4]``: points or boxes as fractions of
        each level; ``memory [B, S, D]`` of ``levels``. Returns the new content ``[B, Q, D]``."""
        def look_at_each_other(x: Tensor) -> Tensor:
            q = x + query_position
            return self.dropout(self.self_attn(q, q, x)[0])

        def look_at_the_image(x: Tensor) -> Tensor:
            return self.dropout(self.cross_attn(x + query_position, reference, memory, levels))

        content = post_norm(content, look_at_each_other, self.norm2)
        content = post_norm(content, look_at_the_image, self.norm1)
        return post_norm(content, self.feed_forward, self.norm3)

    def feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.linear2, self.dropout)
