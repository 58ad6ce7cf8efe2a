"""Conditional DETR (Meng et al., 2021): DETR whose decoder asks where apart from what, and so learns in 50 epochs.

Each query has a reference point; what it asks of places is the encoded point, scaled by what the query has found so far
(section 3.3), and its boxes lie around the point (section 3.1). Classes are scored one by one with the focal loss.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbone import build_backbone, channels
from ..decoder import conditional_layers
from ..encoder import TransformerEncoder
from ..focal_detectors import Built, FocalConfig, Steps, for_mask_head
from ..losses import box_loss, cardinality_error
from ..mask_head import Intermediates
from ..mlp import MLP
from ..nested_tensor import NestedTensor, as_nested_tensor
from ..position_encoding import build_position_encoding, encode_boxes
from ..prediction_heads import focal_heads
from ..reference_points import refine
from ..structures import Outputs


@dataclass(frozen=True)
class ConditionalDETRConfig(FocalConfig):
    """Conditional DETR's flags; the defaults are the paper's ResNet-50 model."""

    def build(self, num_classes: int) -> Built:
        """Model with random weights, criterion and post-processing, for labels ``0..num_classes-1``. ``frozen_weights``
        freezes all but the mask head; loading that file is left to the caller."""
        self.check_masks()
        backbone = build_backbone(self, lambda strides: range(len(strides))[-4:] if self.masks else (-1,), most=1)
        position = build_position_encoding(self.position_embedding, self.hidden_dim)
        layer = (self.hidden_dim, self.nheads, self.dim_feedforward, self.dropout)
        transformer = Transformer(self.hidden_dim, TransformerEncoder(self.enc_layers, *layer),
                                  TransformerDecoder(self.dec_layers, *layer))
        detr = ConditionalDETR(nn.Sequential(backbone, position), transformer, num_classes, self.num_queries,
                               self.aux_loss)
        return self.complete(detr, backbone.exact, [box_loss, cardinality_error])


class Transformer(nn.Module):
    """Encoder, which is DETR's, and decoder (section 3.1)."""

    def __init__(self, d_model: int, encoder: TransformerEncoder, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.d_model, self.encoder, self.decoder = d_model, encoder, decoder
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, src: Tensor, mask: Tensor | None, query_embed: Tensor,
                pos_embed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Feature map and its positions ``[B, D, H, W]``, ``mask [B, H * W]`` True on padding, ``query_embed [Q, D]``
        -> what each decoder layer says of the queries ``[K, B, Q, D]``, their reference points ``[B, Q, 2]``, and the
        encoder's memory ``[B, D, H, W]``."""
        tokens, position = src.flatten(2).mT, pos_embed.flatten(2).mT
        memory = self.encoder(tokens, mask, position)
        hs, reference = self.decoder(query_embed.expand(src.shape[0], -1, -1), memory, position, mask)
        return hs, reference, memory.mT.reshape(src.shape)


class TransformerDecoder(nn.Module):
    """Decoder layers; queries start without content. The same normalisation closes each layer's output."""

    def __init__(self, num_layers: int, d_model: int, nhead: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.layers = conditional_layers(num_layers, d_model, nhead, dim_feedforward, dropout)
        self.norm = nn.LayerNorm(d_model)
        self.ref_point_head = MLP(d_model, d_model, 2, 2)
        # Lambda: 1 in the first layer, whose content is 0. One that no layer uses must not wait for a gradient.
        self.query_scale = MLP(d_model, d_model, d_model, 2).requires_grad_(num_layers > 1)

    def forward(self, query_position: Tensor, memory: Tensor, memory_position: Tensor,
                mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """``query_position [B, Q, D]``, tokens and their positions ``[B, S, D]``, ``mask [B, S]`` True on padding ->
        what each layer says ``[K, B, Q, D]``, and where all of them look from: points (x, y) as fractions of the image
        ``[B, Q, 2]``. The conditional spatial query is p_q = lambda * p_s (section 3.3), here ``asked`` and ``place``."""
        with torch.autocast(query_position.device.type, enabled=False):         # bfloat16 would round points to 1/256
            reference = self.ref_point_head(query_position).sigmoid()
        place = encode_boxes(reference, query_position.shape[-1] // 2).to(memory.dtype)
        content = torch.zeros_like(query_position)
        outputs = []
        for i, layer in enumerate(self.layers):
            asked = place * self.query_scale(content) if i else place
            content = layer(content, query_position, asked, memory, memory_position, mask)
            outputs.append(self.norm(content))
        return torch.stack(outputs), reference


class ConditionalDETR(nn.Module):
    """Backbone, transformer, and on the queries of every decoder layer one class head and one box head."""

    def __init__(self, backbone: nn.Sequential, transformer: Transformer, num_classes: int, num_queries: int,
                 aux_loss: bool = False) -> None:
        super().__init__()
        d_model = transformer.d_model
        self.transformer = transformer
        self.class_embed, self.bbox_embed = focal_heads(d_model, num_classes)
        self.query_embed = nn.Embedding(num_queries, d_model)
        self.input_proj = nn.Conv2d(channels(backbone[0])[-1], d_model, kernel_size=1)
        self.backbone = backbone                                    # [-2]: feature maps, [-1]: their positions
        self.aux_loss = aux_loss

    def forward(self, samples: NestedTensor | Tensor | list[Tensor]) -> Outputs:
        """Images -> ``pred_logits [B, Q, C]`` (sigmoid), ``pred_boxes [B, Q, 4]`` (cxcywh in 0..1), and the same of the
        earlier decoder layers in ``aux_outputs``."""
        return self.steps(samples).outputs

    def detect(self, samples: NestedTensor | Tensor | list[Tensor]) -> tuple[Outputs, Intermediates]:
        """``forward``, and what it went through, for a mask head."""
        return for_mask_head(self.steps(samples))

    def steps(self, samples: NestedTensor | Tensor | list[Tensor]) -> Steps:
        """Backbone, encoder, queries, decoder, heads."""
        features = list(self.backbone[-2](as_nested_tensor(samples)).values())
        src, mask = self.input_proj(features[-1].tensors), features[-1].key_padding_mask()
        hs, reference, memory = self.transformer(src, mask, self.query_embed.weight,
                                                 self.backbone[-1](features[-1]).to(src.dtype))
        # All layers' boxes refer to the same points, which learn from all: [K, B, Q, C or 4].
        logits, boxes = self.class_embed(hs), refine(reference, self.bbox_embed(hs).float())
        outputs: Outputs = {"pred_logits": logits[-1], "pred_boxes": boxes[-1]}
        if self.aux_loss:
            outputs["aux_outputs"] = [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits[:-1], boxes[:-1])]
        return Steps(outputs, features, src, hs[-1], memory)
