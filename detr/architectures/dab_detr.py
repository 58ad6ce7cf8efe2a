"""DAB-DETR (Liu et al., 2022): Conditional DETR whose queries are boxes, which each decoder layer moves and resizes.

A query is an anchor, learned and the same for all images at first (section 4.2). What it asks of places is its encoded
centre, wider or narrower as its width and height tell (section 4.4), and after each layer it has become another box
(section 4.3). With patterns (Wang et al., 2022, Anchor DETR) several queries that differ in content share each anchor.
A low temperature makes the map's positions finer (section 4.5); as in the published code, boxes are encoded with DETR's.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbone import build_backbone, channels
from ..config import DenoisingConfig, flag
from ..decoder import conditional_layers
from ..denoising import DenoisingQueries, Noising, collect
from ..encoder import TransformerEncoderLayer
from ..focal_detectors import Built, FocalConfig, Steps, for_mask_head
from ..losses import box_loss, box_parts, cardinality_error
from ..mask_head import Intermediates
from ..mlp import MLP
from ..nested_tensor import NestedTensor, as_nested_tensor
from ..position_encoding import build_position_encoding, encode_boxes
from ..prediction_heads import focal_heads
from ..reference_points import refine
from ..set_criterion import every_row
from ..structures import Outputs, Target

EPS = 1e-3                          # boxes are refined as if at least that far from 0 and 1, as published


@dataclass(frozen=True)
class DABDETRConfig(DenoisingConfig, FocalConfig):
    """DAB-DETR's flags; the defaults are the paper's ResNet-50 model."""
    num_patterns: int = flag(0, "queries with contents of their own that share each anchor; 0: one without content",
                             least=0)
    pe_temperature: float = flag(20, "temperature of the sine positions of feature maps: less is finer", least=1)
    num_select: int = flag(300, "detections of an image", least=1)
    cls_loss_coef: float = flag(1, "weight of the focal class loss")
    dropout: float = flag(0.0, "dropout in the transformer, a probability", least=0)
    num_queries: int = flag(300, "anchors: each is a query, or one for each pattern", least=1)

    @property
    def queries(self) -> int:
        return self.num_queries * max(1, self.num_patterns)

    def build(self, num_classes: int) -> Built:
        """Model with random weights, criterion and post-processing, for labels ``0..num_classes-1``. ``frozen_weights``
        freezes all but the mask head; loading that file is left to the caller."""
        self.check_masks()
        backbone = build_backbone(self, lambda strides: range(len(strides))[-4:] if self.masks else (-1,), most=1)
        position = build_position_encoding(self.position_embedding, self.hidden_dim, temperature=self.pe_temperature)
        layer = (self.hidden_dim, self.nheads, self.dim_feedforward, self.dropout)
        transformer = Transformer(self.hidden_dim, TransformerEncoder(self.enc_layers, *layer),
                                  TransformerDecoder(self.dec_layers, *layer), self.num_patterns)
        noising = Noising(self.dn_number, self.dn_box_noise_scale, self.dn_label_noise_ratio, contrastive=False)
        detr = DABDETR(nn.Sequential(backbone, position), transformer, num_classes, self.num_queries, self.aux_loss,
                       noising if self.denoising else None)
        return self.complete(detr, backbone.exact, [box_loss, box_parts, cardinality_error], self.num_select)

    def weights(self) -> dict[str, float]:
        """The weight of each loss, of every supervised decoder layer."""
        return every_row(self.layer_weights(), self.dec_layers, self.aux_loss, denoising=self.denoising)


class Transformer(nn.Module):
    """Encoder, patterns, decoder (figure 5)."""

    def __init__(self, d_model: int, encoder: TransformerEncoder, decoder: TransformerDecoder, num_patterns: int) -> None:
        super().__init__()
        self.d_model, self.encoder, self.decoder = d_model, encoder, decoder
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.patterns = nn.Embedding(num_patterns, d_model) if num_patterns else None

    def queries(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """``anchors [A, 4]`` -> contents ``[Q, D]`` and anchors ``[Q, 4]`` of the queries: all anchors with the first
        pattern, then all with the second; without patterns, all anchors with nothing."""
        if self.patterns is None:
            return anchors.new_zeros(len(anchors), self.d_model), anchors
        content = self.patterns.weight
        return content.repeat_interleave(len(anchors), 0), anchors.repeat(len(content), 1)

    def forward(self, src: Tensor, mask: Tensor | None, content: Tensor, reference: Tensor, pos_embed: Tensor,
                attn_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Feature map and its positions ``[B, D, H, W]``, ``mask [B, H * W]`` True on padding; queries: contents
        ``[B, Q, D]``, boxes ``[B, Q, 4]``, and who may not look at whom ``[Q, Q]`` -> what each decoder layer says of
        them ``[K, B, Q, D]``, the boxes that it looked from ``[K, B, Q, 4]``, and the encoder's memory
        ``[B, D, H, W]``."""
        tokens, position = src.flatten(2).mT, pos_embed.flatten(2).mT
        memory = self.encoder(tokens, mask, position)
        hs, references = self.decoder(content, reference, memory, position, mask, attn_mask)
        return hs, references, memory.mT.reshape(src.shape)


class TransformerEncoder(nn.Module):
    """DETR's encoder layers with PReLU; each token scales its position by what it has become (so the published code; the
    paper does not say it)."""

    def __init__(self, num_layers: int, d_model: int, nhead: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerEncoderLayer(d_model, nhead, dim_feedforward, dropout, activation=nn.PReLU)
                                    for _ in range(num_layers))
        self.query_scale = MLP(d_model, d_model, d_model, 2).requires_grad_(num_layers > 0)

    def forward(self, tokens: Tensor, mask: Tensor | None, position: Tensor) -> Tensor:
        """``tokens`` and their positions ``[B, S, D]``, ``mask [B, S]`` True on padding -> ``[B, S, D]``."""
        for layer in self.layers:
            tokens = layer(tokens, mask, position * self.query_scale(tokens))
        return tokens


class TransformerDecoder(nn.Module):
    """Decoder layers, each of which looks from the boxes of the one before.

    The box head is applied twice to a layer's output: before the normalisation that closes it, which says where the next
    layer looks from, and after it, which is the layer's prediction. The latter is a change of the boxes that the layer
    before passed on with their gradient, while what a layer looks from has none but the learned anchors'.
    """
    bbox_embed: nn.Module               # the model's box head

    def __init__(self, num_layers: int, d_model: int, nhead: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.layers = conditional_layers(num_layers, d_model, nhead, dim_feedforward, dropout, nn.PReLU)
        self.norm = nn.LayerNorm(d_model)
        self.ref_point_head = MLP(2 * d_model, d_model, d_model, 2)
        self.ref_anchor_head = MLP(d_model, d_model, 2, 2)
        self.query_scale = MLP(d_model, d_model, d_model, 2).requires_grad_(num_layers > 1)     # from the second layer on

    def forward(self, content: Tensor, reference: Tensor, memory: Tensor, memory_position: Tensor, mask: Tensor | None,
                attn_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries: contents ``[B, Q, D]`` and boxes ``[B, Q, 4]`` as fractions of the image; tokens and their positions
        ``[B, S, D]``, ``mask [B, S]`` True on padding; ``attn_mask [Q, Q]`` True where a query may not look at another
        -> what each layer says ``[K, B, Q, D]``, and the boxes that each looks from ``[K, B, Q, 4]``, with the gradient
        of the layer that they come from."""
        outputs, references = [], []
        for i, layer in enumerate(self.layers):
            if i:
                reference = refine(reference, self.bbox_embed(content).float(), EPS)
            references.append(reference)
            reference = reference.detach() if i else reference
            encoded = encode_boxes(reference, content.shape[-1] // 2).to(memory.dtype)          # [B, Q, 2 * D]
            asked = self.modulated(encoded, reference, content)
            asked = asked * self.query_scale(content) if i else asked
            content = layer(content, self.ref_point_head(encoded), asked, memory, memory_position, mask, attn_mask)
            outputs.append(self.norm(content))
        return torch.stack(outputs), torch.stack(references)

    def modulated(self, encoded: Tensor, reference: Tensor, content: Tensor) -> Tensor:
        """The ``encoded`` centres ``[B, Q, D]`` of the boxes ``reference``: the half of y times what the query wants of
        height over what its box has, that of x likewise with the width (equations 6 and 7): a wider box is less sure of
        its centre along x (section 4.4)."""
        width, height = (self.ref_anchor_head(content).sigmoid() / reference[..., 2:]).chunk(2, dim=-1)
        y, x = encoded[..., :content.shape[-1]].chunk(2, dim=-1)
        return torch.cat([y * height, x * width], dim=-1).to(encoded.dtype)


class DABDETR(nn.Module):
    """Backbone, anchors, transformer, and on the queries of every decoder layer one class head and one box head, which
    moves the boxes between layers, too."""

    def __init__(self, backbone: nn.Sequential, transformer: Transformer, num_classes: int, num_queries: int,
                 aux_loss: bool = False, noising: Noising | None = None) -> None:
        """``noising``: of the denoising queries in training, if there are any."""
        super().__init__()
        d_model = transformer.d_model
        self.transformer = transformer
        self.class_embed, self.bbox_embed = focal_heads(d_model, num_classes)
        transformer.decoder.bbox_embed = self.bbox_embed            # published files have it under both names
        self.refpoint_embed = nn.Embedding(num_queries, 4)
        self.input_proj = nn.Conv2d(channels(backbone[0])[-1], d_model, kernel_size=1)
        self.backbone = backbone                                    # [-2]: feature maps, [-1]: their positions
        self.denoising = DenoisingQueries(noising, num_classes, EPS)
        self.aux_loss, self.takes_targets = aux_loss, noising is not None
        self.label_enc = None if noising is None else \
            nn.Embedding(num_classes + 1, d_model)                          # its last row, "unknown", is never used

    def forward(self, samples: NestedTensor | Tensor | list[Tensor], targets: Sequence[Target] | None = None) -> Outputs:
        """Images -> ``pred_logits [B, Q, C]`` (sigmoid), ``pred_boxes [B, Q, 4]`` (cxcywh in 0..1), and the same of the
        earlier decoder layers in ``aux_outputs``. In training with ``denoising`` and ``targets``, also ``dn_outputs``, of
        denoising queries, for the criterion."""
        return self.steps(samples, targets).outputs

    def detect(self, samples: NestedTensor | Tensor | list[Tensor],
               targets: Sequence[Target] | None = None) -> tuple[Outputs, Intermediates]:
        """``forward``, and what it went through, for a mask head."""
        return for_mask_head(self.steps(samples, targets))

    def steps(self, samples: NestedTensor | Tensor | list[Tensor], targets: Sequence[Target] | None) -> Steps:
        """Backbone, encoder, queries, decoder, heads."""
        features = list(self.backbone[-2](as_nested_tensor(samples)).values())
        src, mask = self.input_proj(features[-1].tensors), features[-1].key_padding_mask()
        content, anchors = (x.expand(src.shape[0], -1, -1) for x in self.transformer.queries(self.refpoint_embed.weight))
        content, reference, attn_mask, noised = self.denoising(targets, self.label_enc, content, anchors.sigmoid())
        hs, references, memory = self.transformer(src, mask, content, reference,
                                                  self.backbone[-1](features[-1]).to(src.dtype), attn_mask)
        logits, boxes = self.class_embed(hs), refine(references, self.bbox_embed(hs).float(), EPS)     # [K, B, Q, C or 4]
        layers: list[Outputs] = [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits, boxes)]
        outputs = collect(layers, noised, self.aux_loss)
        return Steps(outputs, features, src, hs[-1, :, -anchors.shape[1]:], memory)
