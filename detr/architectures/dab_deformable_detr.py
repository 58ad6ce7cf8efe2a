"""DAB-Deformable-DETR (Liu et al., 2022): Deformable DETR with box refinement whose queries are boxes and contents.

Deformable DETR learns a query's position and reads a reference point off it. Here a query is an anchor, and its position
is what each decoder layer reads off the box that the query has become (section 4.2), scaled by its content. Its width and
height need no modulation: sampling offsets are parts of the box already. Each box learns from its own layer's loss alone,
unlike DAB-DETR's.
"""
from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import channels
from ..config import DenoisingConfig, flag
from ..decoder import DeformableTransformerDecoderLayer
from ..deformable_attention import MSDeformAttn
from ..denoising import DenoisingQueries, Noising, collect
from ..encoder import DeformableTransformerEncoder
from ..feature_levels import build_input_proj
from ..focal_detectors import Built, LevelSteps, MultiScaleConfig, for_mask_head, multi_scale_maps
from ..losses import box_loss, cardinality_error
from ..mask_head import Intermediates
from ..mlp import MLP
from ..nested_tensor import NestedTensor, as_nested_tensor
from ..position_encoding import build_position_encoding, encode_boxes
from ..prediction_heads import focal_heads
from ..reference_points import decoder_reference_points, refine
from ..set_criterion import every_row
from ..structures import FeatureLevels, Outputs, Target

EPS = 1e-3                          # boxes are refined as if at least that far from 0 and 1, as published


@dataclass(frozen=True)
class DABDeformableDETRConfig(DenoisingConfig, MultiScaleConfig):
    """DAB-Deformable-DETR's flags; the defaults are the published ResNet-50 model with four levels."""
    num_patterns: int = flag(0, "queries with contents of their own that share each anchor; 0: the anchor's "
                             "own alone", least=0)
    cls_loss_coef: float = flag(1, "weight of the focal class loss")
    dropout: float = flag(0.0, "dropout in the transformer, a probability", least=0)
    num_queries: int = flag(300, "anchors: each is a query, or one for each pattern", least=1)

    @property
    def queries(self) -> int:
        return self.num_queries * max(1, self.num_patterns)

    @property
    def heads_of_layers(self) -> bool:
        return True

    def build(self, num_classes: int) -> Built:
        """Model with random weights, criterion and post-processing, for labels ``0..num_classes-1``. ``frozen_weights``
        freezes all but the mask head; loading that file is left to the caller."""
        backbone, finer = self.build_maps()
        # Unlike DAB-DETR's, positions are Deformable DETR's: counted from the centres of pixels, temperature 10000.
        position = build_position_encoding(self.position_embedding, self.hidden_dim, offset=-0.5)
        layer = (self.hidden_dim, self.nheads, self.dim_feedforward, self.dropout, self.num_feature_levels)
        transformer = DeformableTransformer(self.hidden_dim, self.num_feature_levels,
                                            DeformableTransformerEncoder(self.enc_layers, *layer, self.enc_n_points),
                                            DeformableTransformerDecoder(self.dec_layers, *layer, self.dec_n_points))
        noising = Noising(self.dn_number, self.dn_box_noise_scale, self.dn_label_noise_ratio, contrastive=False)
        detr = DABDeformableDETR(nn.Sequential(backbone, position), transformer, num_classes, self.num_queries,
                                 self.num_patterns, self.num_feature_levels, self.aux_loss, finer,
                                 noising if self.denoising else None)
        return self.complete(detr, backbone.exact, [box_loss, cardinality_error])

    def weights(self) -> dict[str, float]:
        """The weight of each loss, of every supervised decoder layer."""
        return every_row(self.layer_weights(), self.dec_layers, self.aux_loss, denoising=self.denoising)


class DeformableTransformer(nn.Module):
    """Encoder and decoder, which the model calls one by one, and what tells the levels apart."""

    def __init__(self, d_model: int, num_levels: int, encoder: DeformableTransformerEncoder,
                 decoder: DeformableTransformerDecoder) -> None:
        super().__init__()
        self.d_model, self.encoder, self.decoder = d_model, encoder, decoder
        # Positions are for the encoder's queries: without layers there, nothing could train this part of them.
        self.level_embed = nn.Parameter(torch.empty(num_levels, d_model), requires_grad=len(encoder.layers) > 0)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)


class DeformableTransformerDecoder(nn.Module):
    """Decoder layers, each of which looks around the boxes of the one before."""

    def __init__(self, num_layers: int, d_model: int, *layer: Any) -> None:
        """``layer``: what ``DeformableTransformerDecoderLayer`` takes after ``d_model``."""
        super().__init__()
        self.layers = nn.ModuleList(DeformableTransformerDecoderLayer(d_model, *layer) for _ in range(num_layers))
        self.ref_point_head = MLP(2 * d_model, d_model, d_model, 2)
        self.query_scale = MLP(d_model, d_model, d_model, 2).requires_grad_(num_layers > 1)     # from the second layer on

    def forward(self, content: Tensor, reference: Tensor, memory: Tensor, levels: FeatureLevels,
                class_embed: nn.ModuleList, bbox_embed: nn.ModuleList,
                attn_mask: Tensor | None = None) -> tuple[list[Outputs], Tensor]:
        """Queries: contents ``[B, Q, D]`` and boxes ``[B, Q, 4]`` as fractions of the image; the encoder's ``memory
        [B, S, D]`` of ``levels``; each layer's heads; ``attn_mask [Q, Q]`` True where a query may not look at another
        -> what each layer says, and what has become of the contents ``[B, Q, D]``."""
        outputs: list[Outputs] = []
        for i, (layer, class_head, box_head) in enumerate(zip(self.layers, class_embed, bbox_embed)):
            of_levels = decoder_reference_points(reference, levels)                             # [B, Q, L, 4]
            # As published, boxes are encoded as fractions of the finest level with its padding.
            encoded = encode_boxes(reference if levels.exact else of_levels[:, :, 0], content.shape[-1] // 2)
            position = self.ref_point_head(encoded.to(memory.dtype))
            position = position * self.query_scale(content) if i else position
            content = layer(content, position, of_levels, memory, levels, attn_mask)
            boxes = refine(reference, box_head(content), EPS)
            outputs.append({"pred_logits": class_head(content), "pred_boxes": boxes})
            reference = boxes.detach()
        return outputs, content


class DABDeformableDETR(nn.Module):
    """Backbone, levels, anchors with contents, transformer; class and box heads for each decoder layer."""

    def __init__(self, backbone: nn.Sequential, transformer: DeformableTransformer, num_classes: int, num_queries: int,
                 num_patterns: int, num_levels: int, aux_loss: bool, finer: int = 0,
                 noising: Noising | None = None) -> None:
        """``finer``: how many of the backbone's maps are for a mask head alone; ``noising``: of the denoising queries in
        training, if there are any."""
        super().__init__()
        d_model, layers = transformer.d_model, len(transformer.decoder.layers)
        self.transformer = transformer
        class_head, box_head = focal_heads(d_model, num_classes)
        self.class_embed, self.bbox_embed = (nn.ModuleList(copy.deepcopy(head) for _ in range(layers))
                                             for head in (class_head, box_head))
        # As published, from Deformable DETR, though anchors have a size: first boxes are an eighth of the image wide.
        nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)                         # type: ignore[arg-type]
        transformer.decoder.bbox_embed = self.bbox_embed            # published files have it under both names
        self.tgt_embed, self.refpoint_embed = nn.Embedding(num_queries, d_model), nn.Embedding(num_queries, 4)
        self.patterns_embed = nn.Embedding(num_patterns, d_model) if num_patterns else None
        self.input_proj = build_input_proj(channels(backbone[0])[finer:], num_levels, d_model)
        self.backbone = backbone                                    # [-2]: feature maps, [-1]: their positions
        self.denoising = DenoisingQueries(noising, num_classes, EPS)
        self.aux_loss, self.finer, self.takes_targets = aux_loss, finer, noising is not None
        self.label_enc = None if noising is None else \
            nn.Embedding(num_classes + 1, d_model)                          # its last row, "unknown", is never used

    def queries(self) -> tuple[Tensor, Tensor]:
        """Contents ``[Q, D]`` and anchors ``[Q, 4]`` before the sigmoid: all anchors, or all with the first pattern added
        to their contents, then all with the second."""
        content, anchors = self.tgt_embed.weight, self.refpoint_embed.weight
        if self.patterns_embed is None:
            return content, anchors
        patterns = self.patterns_embed.weight
        return (content + patterns[:, None]).flatten(0, 1), anchors.repeat(len(patterns), 1)

    def forward(self, samples: NestedTensor | Tensor | list[Tensor], targets: Sequence[Target] | None = None) -> Outputs:
        """Images -> ``pred_logits [B, Q, C]`` (sigmoid), ``pred_boxes [B, Q, 4]`` (cxcywh in 0..1), and the same of the
        earlier decoder layers in ``aux_outputs``. In training with ``denoising`` and ``targets``, also ``dn_outputs``, of
        denoising queries, for the criterion."""
        return self.steps(samples, targets).outputs

    def detect(self, samples: NestedTensor | Tensor | list[Tensor],
               targets: Sequence[Target] | None = None) -> tuple[Outputs, Intermediates]:
        """``forward``, and what it went through, for a mask head."""
        return for_mask_head(self.steps(samples, targets))

    def steps(self, samples: NestedTensor | Tensor | list[Tensor], targets: Sequence[Target] | None) -> LevelSteps:
        """Backbone, levels, encoder, queries, decoder with its heads."""
        images = as_nested_tensor(samples)
        maps = multi_scale_maps(self, images)
        levels, memory = maps.levels, self.transformer.encoder(maps.levels)
        content, anchors = (x.expand(memory.shape[0], -1, -1) for x in self.queries())
        content, reference, attn_mask, noised = self.denoising(targets, self.label_enc, content, anchors.sigmoid())
        layers, content = self.transformer.decoder(content, reference, memory, levels, self.class_embed, self.bbox_embed,
                                                   attn_mask)
        outputs = collect(layers, noised, self.aux_loss)
        return LevelSteps(outputs, maps, content[:, -anchors.shape[1]:], memory)
