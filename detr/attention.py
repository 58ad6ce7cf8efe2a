"""Multi-head attention (Vaswani et al., 2017, section 3.2), batch first."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import dropout


class ProjectedAttention(nn.Module):
    """Attention between queries, keys and values that somebody else has projected; only the projection of what comes out
    is its own.

    Two paths, one result: the output always comes from PyTorch's fused attention. The weights, which that path never
    forms, are computed beside it only when a caller asks (``need_weights=True``) or a forward hook is registered on
    this module; so a model computes the same bits whether or not somebody watches.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"hidden_dim {embed_dim} does not divide into nheads {num_heads}; "
                             f"choose --nheads among the divisors of --hidden_dim")
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, or the first of them, as they are compared and summed."""
        return inputs

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                attn_mask: Tensor | None = None, need_weights: bool = False,
                prior: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``query [B, Q, E]`` and ``key [B, S, E]``, head after head, and ``value [B, S, D]`` (``E`` is D, or 2 D where
        places stand beside contents); ``key_padding_mask`` bool ``[B, S]``, True on padding; ``attn_mask`` bool
        ``[Q, S]``, True where a query may not look; ``prior [B, Q, S]``, added to the scores of all heads before the
        softmax. Returns the output ``[B, Q, D]`` and the weights ``[B, Q, S]``, averaged over heads and before dropout,
        or None where nobody asked for them.

        A query that may look nowhere (a row that is all padding) gets zeros, not NaN.
        """
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)                      # [B, M, Q or S, E/M or D/M]
                   for x in self.project(query, key, value))
        allowed = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        if attn_mask is not None:
            allowed = ~attn_mask if allowed is None else allowed & ~attn_mask
        added = None if prior is None else prior[:, None]
        out = self.out_proj(self._attend(q, k, v, allowed, added).transpose(1, 2).flatten(2))
        return out, _weights(q, k, allowed, added) if need_weights or self._forward_hooks else None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, added: Tensor | None) -> Tensor:
        p = self.dropout if self.training else 0.0
        if q.device.type != "cpu" or q.dtype == torch.float64:
            mask = _of_type(_one_mask(allowed, added), q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        # PyTorch's fused attention on CPUs is up to five times as fast in float32 as in bfloat16. It knows no dropout,
        # and is slow where values are narrower than keys.
        width = v.shape[-1]
        if q.shape[-1] > width and not p:
            v = F.pad(v, (0, q.shape[-1] - width))
        with torch.autocast("cpu", enabled=False):
            if p:
                out = dropout(_weights_of_heads(q.float(), k.float(), allowed, added), p, True) @ v.float()
            else:
                out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=_one_mask(allowed, added))
        return out[..., :width].to(q.dtype)


def _weights(q: Tensor, k: Tensor, allowed: Tensor | None, added: Tensor | None) -> Tensor:
    """``[B, Q, S]``, averaged over heads."""
    return _weights_of_heads(q, k, allowed, added).mean(1)


def _weights_of_heads(q: Tensor, k: Tensor, allowed: Tensor | None, added: Tensor | None) -> Tensor:
    """``[B, M, Q, S]``; zeros where a query may look nowhere."""
    scores = (q / q.shape[-1] ** 0.5) @ k.transpose(-2, -1)
    if added is not None:
        scores = scores + added
    if allowed is None:
        return scores.softmax(-1)
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1).masked_fill(~allowed.any(-1, keepdim=True), 0.0)


class MultiheadAttention(ProjectedAttention):
    """Attention with the parameter names and the initialisation of ``torch.nn.MultiheadAttention``: query, key and value,
    ``[B, Q or S, D]``, are projected here."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, num_heads, dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        nn.init.xavier_uniform_(self.in_proj_weight)

    def project(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, weight, bias) for x, weight, bias in zip(inputs, weights, biases))


def _one_mask(allowed: Tensor | None, added: Tensor | None) -> Tensor | None:
    """What fused attention takes: where a query may look, what is added to its scores, or both in one."""
    if allowed is None or added is None:
        return allowed if added is None else added
    return added.masked_fill(~allowed, float("-inf"))           # PyTorch gives zeros where all of a row is


def _of_type(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
