"""Transformer encoders: self-attention among the tokens of the feature maps, dense (Carion et al., 2020, figure 10) or
deformable (Zhu et al., 2021, section 4.1)."""
from typing import Any

from torch import Tensor, nn

from .attention import MultiheadAttention
from .deformable_attention import MSDeformAttn
from .dropout import Dropout
from .mlp import feed_forward
from .reference_points import encoder_reference_points
from .residual import post_norm, pre_norm
from .structures import FeatureLevels


class TransformerEncoderLayer(nn.Module):
    """Self-attention, then feed-forward; positions are added to queries and keys."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 normalize_before: bool = False, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(d_model, nhead, dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout, self.activation = Dropout(dropout), activation()
        self.residual = pre_norm if normalize_before else post_norm

    def forward(self, tokens: Tensor, mask: Tensor | None, position: Tensor) -> Tensor:
        """``tokens [B, S, D]``, ``mask [B, S]`` True on padding, None where there is none, ``position [B, S, D]`` ->
        ``[B, S, D]``."""
        def attend(x: Tensor) -> Tensor:
            q = x + position
            return self.dropout(self.self_attn(q, q, x, key_padding_mask=mask)[0])

        tokens = self.residual(tokens, attend, self.norm1)
        return self.residual(tokens, self.feed_forward, self.norm2)

    def feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.linear2, self.dropout, self.activation)


class TransformerEncoder(nn.Module):
    """A stack of encoder layers; with pre-norm, a last normalisation closes it."""

    def __init__(self, num_layers: int, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 normalize_before: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerEncoderLayer(d_model, nhead, dim_feedforward, dropout, normalize_before)
                                    for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model) if normalize_before else nn.Identity()

    def forward(self, tokens: Tensor, mask: Tensor | None, position: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens, mask, position)
        return self.norm(tokens)


class DeformableTransformerEncoderLayer(nn.Module):
    """Deformable self-attention, each token around its own place in every level; then feed-forward."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int, dropout: float, n_levels: int,
                 n_points: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, nhead, n_points)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor, levels: FeatureLevels, reference: Tensor) -> Tensor:
        """``tokens [B, S, D]`` of ``levels``, ``reference [B, S, L, 2]`` -> ``[B, S, D]``."""
        def attend(x: Tensor) -> Tensor:
            return self.dropout(self.self_attn(x + levels.position, reference, x, levels))

        return post_norm(post_norm(tokens, attend, self.norm1), self.feed_forward, self.norm2)

    def feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.linear2, self.dropout)


class DeformableTransformerEncoder(nn.Module):
    """A stack of deformable encoder layers."""

    def __init__(self, num_layers: int, *layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeformableTransformerEncoderLayer(*layer) for _ in range(num_layers))

    def forward(self, levels: FeatureLevels) -> Tensor:
        """The tokens of ``levels`` -> what they have become, ``[B, S, D]``."""
        reference, tokens = encoder_reference_points(levels), levels.tokens
        for layer in self.layers:
            tokens = layer(tokens, levels, reference)
        return tokens
