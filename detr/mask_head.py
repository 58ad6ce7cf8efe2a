"""From attention to masks (Carion et al., 2020, section 4.4; figure 8)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nested_tensor import NestedTensor
from .padding import Size, Where, exact_upsample, normalised, where, zeroed
from .structures import Outputs, Target, in_float32
from .transfer import on_device

LAYERS = 5                      # convolutions before the last one


class Intermediates(NamedTuple):
    """What a detector's forward pass went through, for its mask head."""
    features: list[NestedTensor]        # the backbone's maps, finest first
    src: Tensor                         # [B, D, H, W] the last of them, projected
    hs: Tensor                          # [B, Q, D] the last decoder layer's queries
    memory: Tensor                      # [B, D, H, W] the encoder's output at the last map
    prior: Tensor | None = None         # [B, Q, H, W] what is added to the scores of the mask head's attention


class DETRsegm(nn.Module):
    """A detector with a mask head (section 4.4; figure 8): for each query its attention over the memory, sharpened by a
    small convolutional network that adds the backbone's finer maps.

    ``detr.detect`` gives its outputs and ``Intermediates``. The head's attention has the detector's number of heads,
    rounded up to a multiple of 8, which its normalisation asks for. ``matcher``, the criterion's, is for training.
    ``gain``: see ``MHAttentionMap``.
    """
    takes_targets = True                # in training

    def __init__(self, detr: Any, nheads: int, matcher: nn.Module, freeze_detr: bool = False, gain: float = 1.0) -> None:
        super().__init__()
        self.detr, self.matcher, self.frozen = detr, matcher, freeze_detr
        if freeze_detr:
            detr.requires_grad_(False)
        d_model, nheads = detr.transformer.d_model, -(-nheads // 8) * 8
        self.bbox_attention = MHAttentionMap(d_model, nheads, gain)
        self.mask_head = MaskHeadSmallConv(d_model + nheads, d_model, detr.backbone[0].channels[-2::-1])

    def train(self, mode: bool = True) -> DETRsegm:
        """A frozen detector keeps its batch statistics, too."""
        super().train(mode)
        if self.frozen:
            for module in self.detr.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, samples: NestedTensor | Tensor | list[Tensor],
                targets: Sequence[Target] | None = None) -> Outputs:
        """The detector's outputs, and ``pred_masks [B, Q, H / 4, W / 4]``: logits, at the stride of the backbone's finest
        map, which is 4 for most.

        Only masks of matched queries are ever trained. With ``targets`` the queries are matched here, once for all
        (``outputs["match"]``), and ``pred_masks [sum N, H / 4, W / 4]`` are those of the matched queries alone, image
        after image: the same losses and gradients, for a fraction of time and memory.
        """
        # A fixed detector does not learn, so that nothing is denoised.
        known = (targets,) if getattr(self.detr, "takes_targets", False) and not self.frozen else ()
        outputs, (features, src, hs, memory, prior) = self.detr.detect(samples, *known)
        mask, finer = features[-1].mask, [f.tensors for f in features[-2::-1]]
        sizes = None if features[-1].sizes is None else [f.sizes for f in features[::-1]]
        if sizes is not None:
            outputs["mask_sizes"] = sizes[-1]
        if targets is None:
            attention = self.bbox_attention(hs, memory, mask, prior)                        # [B, Q, M, H, W]
            masks = self.mask_head(src, attention.flatten(0, 1), finer, [hs.shape[1]] * len(hs), sizes)
            outputs["pred_masks"] = masks.unflatten(0, hs.shape[:2])
            return outputs
        with torch.autocast(src.device.type, enabled=False):
            outputs["match"] = self.matcher(in_float32(outputs), targets)
        matched = [query.to(hs.device) for query, _ in outputs["match"]]
        nothing = sum(map(len, matched)) == 0
        if nothing:                                                         # one query, so that all parameters take part
            matched[0] = matched[0].new_zeros(1)
        attention = torch.cat([
            self.bbox_attention(hs[i:i + 1, query], memory[i:i + 1], mask[i:i + 1],
                                None if prior is None else prior[i:i + 1, query])[0]
            for i, query in enumerate(matched)])                                            # [sum N, M, H, W]
        masks = self.mask_head(src, attention, finer, [len(query) for query in matched], sizes)
        outputs["pred_masks"] = masks[:0] if nothing else masks
        return outputs


class MHAttentionMap(nn.Module):
    """Where each query looks, head by head: attention weights without values.

    As published, the softmax runs over heads and positions together. So weights begin as thousandths beside features of
    about 1, and the convolutions hear them only once they are sharp, which takes long where queries and memory were not
    made alike by training before. A ``gain`` above 1 multiplies them, and begins with the same projection of both, for a
    query to find what is like itself (ours).
    """

    def __init__(self, d_model: int, num_heads: int, gain: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.gain = num_heads, gain
        self.q_linear, self.k_linear = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if gain != 1:
            self.k_linear.load_state_dict(self.q_linear.state_dict())

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor, prior: Tensor | None = None) -> Tensor:
        """``queries [B, Q, D]``, ``memory [B, D, H, W]``, ``mask [B, H, W]`` True on padding, and what is added to the
        scores of all heads, ``prior [B, Q, H, W]`` -> ``[B, Q, M, H, W]``."""
        q = self.q_linear(queries).unflatten(-1, (self.num_heads, -1))                      # [B, Q, M, D/M]
        k = F.conv2d(memory, self.k_linear.weight[..., None, None], self.k_linear.bias)
        k = k.unflatten(1, (self.num_heads, -1))                                            # [B, M, D/M, H, W]
        scores = torch.einsum("bqmd,bmdhw->bqmhw", q / q.shape[-1] ** 0.5, k)
        if prior is not None:
            scores = scores + prior[:, :, None]
        scores = scores.masked_fill(mask[:, None, None], float("-inf"))
        return scores.flatten(2).softmax(-1).view_as(scores) * self.gain


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

    def forward(self, src: Tensor, attention: Tensor, fpns: list[Tensor], counts: Sequence[int],
                sizes: Sequence[Sequence[Size]] | None = None) -> Tensor:
        """``src [B, D, H, W]``, ``attention [N, M, H, W]`` of so many queries of each image as ``counts`` says, ``fpns``
        the backbone's other maps, coarsest first -> mask logits ``[N, H', W']`` at the size of the finest. ``sizes``:
        the images' extents in ``src`` and in each of ``fpns``, for logits that do not depend on padding."""
        times = on_device(counts, src.device)

        def of_queries(x: Tensor) -> Tensor:
            return x.repeat_interleave(times, 0, output_size=len(attention))

        def inside(x: Tensor, level: int) -> Where | None:
            return where(x, None if sizes is None else [s for s, n in zip(sizes[level], counts) for _ in range(n)])

        x = torch.cat([of_queries(src), attention], dim=1)
        at = inside(x, 0)
        x = self.block(1, x, at)
        x = self.block(2, x, at)
        for i, fpn in enumerate(fpns, start=1):
            fpn, before = of_queries(getattr(self, f"adapter{i}")(fpn)), at
            size, at = (fpn.shape[-2], fpn.shape[-1]), inside(fpn, i)
            x = fpn + (F.interpolate(x, size, mode="nearest") if before is None or at is None else
                       exact_upsample(x, before.sizes, at.sizes, size))
            x = self.block(i + 2, x, at)
        for i in range(len(fpns) + 3, LAYERS + 1):                          # small backbones have fewer maps
            x = self.block(i, x, at)
        return self.out_lay(zeroed(x, at))[:, 0]

    def block(self, i: int, x: Tensor, at: Where | None) -> Tensor:
        """Layer ``i`` of the head, from 1: convolution, normalisation, ReLU. ``x [N, D, H, W]`` -> ``[N, D', H, W]``;
        ``at`` says what of it is image, so that padding does not count."""
        return F.relu(normalised(getattr(self, f"gn{i}"), getattr(self, f"lay{i}")(zeroed(x, at)), at))
