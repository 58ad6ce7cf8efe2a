"""Position encodings of feature maps (Carion et al., 2020, section A.4 "Spatial positional encoding")."""
import math

import torch
from torch import Tensor, nn

from .nested_tensor import NestedTensor


def sine_encoding(position: Tensor, num_feats: int, temperature: float = 10000.0) -> Tensor:
    """Sines and cosines of a coordinate: ``[...]`` -> ``[..., num_feats]``, sine and cosine alternating, with wave
    lengths from 2 pi to ``temperature`` * 2 pi (Vaswani et al., 2017, section 3.5)."""
    feature = torch.arange(num_feats, dtype=torch.float32, device=position.device)
    angle = position[..., None] / temperature ** (2 * (feature // 2) / num_feats)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


def encode_boxes(boxes: Tensor, num_feats: int) -> Tensor:
    """Sine encoding of boxes (Liu et al., 2022, DAB-DETR, section 4.2): cxcywh in 0..1 ``[..., 4]`` -> ``[...,
    4 * num_feats]``, in the order y, x, width, height; y and x as ``PositionEmbeddingSine`` encodes normalised ones.
    Points ``[..., 2]`` (x, y) likewise -> ``[..., 2 * num_feats]``."""
    x, y, *sides = (boxes * 2 * math.pi).unbind(-1)
    return torch.cat([sine_encoding(c, num_feats) for c in (y, x, *sides)], dim=-1)


class PositionEmbeddingSine(nn.Module):
    """Fixed encoding of row and column, counted over the pixels that are not padding; for maps of any size.

    With ``normalize``, positions are fractions of the image times ``scale`` (2 pi), counted from pixels' far edges (DETR)
    or, with an ``offset`` of -0.5, from their centres (Deformable DETR). The first half of the channels encodes y, the
    second x.
    """

    def __init__(self, num_pos_feats: int = 64, temperature: float = 10000, normalize: bool = False,
                 scale: float | None = None, offset: float = 0.0) -> None:
        super().__init__()
        if (scale is not None or offset) and not normalize:
            raise ValueError("scale and offset are for normalised positions: pass normalize=True with them")
        self.num_pos_feats, self.temperature, self.normalize = num_pos_feats, temperature, normalize
        self.scale, self.offset = 2 * math.pi if scale is None else scale, offset

    def forward(self, features: NestedTensor) -> Tensor:
        """Feature map with its padding mask ``[B, H, W]`` -> float32 ``[B, 2 * num_pos_feats, H, W]``."""
        if not features.padded:
            batch, height, width = features.mask.shape
            return self.of_grid(batch, height, width, features.mask.device)
        valid = ~features.mask
        y = valid.cumsum(1, dtype=torch.float32)
        x = valid.cumsum(2, dtype=torch.float32)
        if self.normalize:
            y = self.normalised(y, y[:, -1:, :])
            x = self.normalised(x, x[:, :, -1:])
        encoded = [sine_encoding(c, self.num_pos_feats, self.temperature) for c in (y, x)]
        return torch.cat(encoded, dim=-1).permute(0, 3, 1, 2)

    def of_grid(self, batch: int, height: int, width: int, device: torch.device) -> Tensor:
        """The same for images without padding, whose rows and columns are the same everywhere."""
        encoded = []
        for length, shape in ((height, (-1, height, 1)), (width, (-1, 1, width))):
            position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
            position = self.normalised(position, position[-1:]) if self.normalize else position
            encoding = sine_encoding(position, self.num_pos_feats, self.temperature)            # [length, F]
            encoded.append(encoding.mT.reshape(shape).expand(-1, height, width))
        return torch.cat(encoded).expand(batch, -1, -1, -1)

    def normalised(self, position: Tensor, last: Tensor) -> Tensor:
        """Positions counted from 1 as fractions of the ``last``, times the scale."""
        return (position + self.offset) / (last + 1e-6) * self.scale


class PositionEmbeddingLearned(nn.Module):
    """Learned encoding of row and column, the published one: 50 of each, blind to the padding mask. The first half of
    the channels encodes x, the second y."""

    SIZE = 50

    def __init__(self, num_pos_feats: int = 256) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(self.SIZE, num_pos_feats)
        self.col_embed = nn.Embedding(self.SIZE, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, features: NestedTensor) -> Tensor:
        """Feature map with its padding mask ``[B, H, W]`` -> ``[B, 2 * num_pos_feats, H, W]``."""
        b, h, w = features.mask.shape
        if max(h, w) > self.SIZE:
            raise ValueError(f"learned positions end at {self.SIZE} rows or columns and this feature map has {h}x{w}: "
                             f"feed smaller images, or use --position_embedding sine, which has no limit")
        x = self.col_embed.weight[:w].expand(h, w, -1)
        y = self.row_embed.weight[:h, None].expand(h, w, -1)
        return torch.cat([x, y], dim=-1).permute(2, 0, 1).expand(b, -1, -1, -1)


def build_position_encoding(name: str, hidden_dim: int, scale: float | None = None, offset: float = 0.0,
                            temperature: float = 10000.0) -> nn.Module:
    """``sine`` (normalised, with ``scale``, ``offset`` and ``temperature``) or ``learned``, for tokens of ``hidden_dim``
    channels."""
    if hidden_dim % 4:
        raise ValueError(f"--hidden_dim {hidden_dim}: positions share it between x and y, sine and cosine, so it must "
                         f"divide by 4")
    if name == "sine":
        return PositionEmbeddingSine(hidden_dim // 2, temperature, normalize=True, scale=scale, offset=offset)
    if name == "learned":
        return PositionEmbeddingLearned(hidden_dim // 2)
    raise ValueError(f"position_embedding {name!r} is not known; use 'sine' or 'learned'")
