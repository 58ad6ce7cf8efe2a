"""DINO (Zhang et al., 2023): figure 2 from left to right is ``DINO.steps`` from top to bottom.

Deformable DETR with boxes as queries (DAB-DETR) that learn by denoising (DN-DETR), and three ideas: contrastive denoising
(section 3.3; ``denoising.py``), mixed query selection (section 3.4; ``DINOTransformer.propose``), look forward twice
(section 3.5; ``DINODecoder.forward``).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from ..losses import box_loss, box_parts, cardinality_error
from ..mask_head import Intermediates
from ..mlp import MLP
from ..nested_tensor import NestedTensor, as_nested_tensor
from ..position_encoding import build_position_encoding, encode_boxes
from ..prediction_heads import focal_heads
from ..reference_points import decoder_reference_points, refine
from ..set_criterion import every_row
from ..structures import FeatureLevels, Outputs, Target
from ..two_stage import best, proposing_tokens, warn_of_few

EPS = 1e-3                          # boxes are refined as if at least that far from 0 and 1, as published


@dataclass(frozen=True)
class DINOConfig(DenoisingConfig, MultiScaleConfig):
    """DINO's flags; the defaults are the published ResNet-50 model with four scales."""
    pe_temperature: float = flag(20, "temperature of the sine positions of feature maps: less is finer", least=1)
    num_select: int = flag(300, "detections of an image", least=1)
    cls_loss_coef: float = flag(1, "weight of the focal class loss")
    interm_loss_coef: float = flag(1, "factor on the weights of the losses of the chosen proposals")
    denoising: bool = flag(True, "contrastive denoising in training")
    dropout: float = flag(0.0, "dropout in the transformer, a probability", least=0)
    num_queries: int = flag(900, "object queries: the most objects an image can have", least=1)

    def build(self, num_classes: int) -> Built:
        """Model with random weights, criterion and post-processing, for labels ``0..num_classes-1``. ``frozen_weights``
        freezes all but the mask head; loading that file is left to the caller."""
        backbone, finer = self.build_maps()
        position = build_position_encoding(self.position_embedding, self.hidden_dim, temperature=self.pe_temperature)
        layer = (self.hidden_dim, self.nheads, self.dim_feedforward, self.dropout, self.num_feature_levels)
        transformer = DINOTransformer(self.hidden_dim, self.num_feature_levels, num_classes, self.num_queries,
                                      DeformableTransformerEncoder(self.enc_layers, *layer, self.enc_n_points),
                                      DINODecoder(self.dec_layers, num_classes, *layer, self.dec_n_points))
        noising = Noising(self.dn_number, self.dn_box_noise_scale, self.dn_label_noise_ratio, contrastive=True)
        detr = DINO(nn.Sequential(backbone, position), transformer, num_classes, self.num_feature_levels, self.aux_loss,
                    noising if self.denoising else None, finer)
        return self.complete(detr, backbone.exact, [box_loss, box_parts, cardinality_error], self.num_select)

    def check_training(self) -> None:
        if self.denoising and not self.dn_box_noise_scale:
            raise ValueError("--dn_box_noise_scale 0: the same box would have to be found and to be refused; give more "
                             "than 0, or --no_denoising")

    @property
    def finest_stride(self) -> int:
        """Of the maps that become levels where ``--feature_strides`` does not say."""
        return 8 if self.num_feature_levels <= 4 else 4

    def weights(self) -> dict[str, float]:
        """The weight of each loss, of every decoder layer, its denoising queries, and the proposals."""
        weights = every_row(self.layer_weights(), self.dec_layers, self.aux_loss, denoising=self.denoising)
        return weights | {f"{name}_interm": weights[name] * self.interm_loss_coef
                          for name in ("loss_ce", "loss_bbox", "loss_giou")}


class Queries(NamedTuple):
    """What the decoder starts with."""
    content: Tensor                 # [B, Q, D]
    reference: Tensor               # [B, Q, 4] boxes, cxcywh as fractions of the image


class DINOTransformer(nn.Module):
    """Encoder, query selection, decoder (figure 2), which the model calls one by one."""

    def __init__(self, d_model: int, num_levels: int, num_classes: int, num_queries: int,
                 encoder: DeformableTransformerEncoder, decoder: DINODecoder) -> None:
        super().__init__()
        self.d_model, self.num_queries = d_model, num_queries
        self.encoder, self.decoder = encoder, decoder
        # Positions are for the encoder's queries: without layers there, nothing could train this part of them.
        self.level_embed = nn.Parameter(torch.empty(num_levels, d_model), requires_grad=len(encoder.layers) > 0)
        self.tgt_embed = nn.Embedding(num_queries, d_model)
        self.enc_output = nn.Linear(d_model, d_model)
        self.enc_output_norm = nn.LayerNorm(d_model)
        # Learned contents stay as embeddings begin.
        for part in (encoder, decoder.layers, decoder.ref_point_head, self.enc_output):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)
        self.enc_out_class_embed, self.enc_out_bbox_embed = focal_heads(d_model, num_classes)

    def propose(self, memory: Tensor, levels: FeatureLevels) -> tuple[Queries, Outputs, Tensor]:
        """Mixed query selection: the best proposals of the encoder are where queries begin, but what these know at first
        is learned, one row for each rank, since a token may be of several objects or of a part of one (section 3.4). A
        proposal's score is its best class logit. Also the chosen proposals, and which queries had none to start from
        ``[B, Q]``."""
        tokens = proposing_tokens(memory, levels, self.num_queries)
        output = self.enc_output_norm(self.enc_output(tokens.memory))
        logits = self.enc_out_class_embed(output)                                               # [B, S, C]
        chosen = best(logits.amax(-1), tokens.mask, self.num_queries, levels.exact)

        def of_chosen(x: Tensor) -> Tensor:
            return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))

        boxes = (self.enc_out_bbox_embed(of_chosen(output)) + of_chosen(tokens.anchors)).sigmoid()
        content = self.tgt_embed.weight.to(memory.dtype).expand(memory.shape[0], -1, -1)
        return (Queries(content, boxes.detach()), {"pred_logits": of_chosen(logits), "pred_boxes": boxes},
                tokens.invalid.gather(1, chosen))


class DINODecoder(nn.Module):
    """Decoder layers, each of which refines the boxes that its queries refer to. All share one class head and one box
    head, which published files name once for each layer."""

    def __init__(self, num_layers: int, num_classes: int, d_model: int, *layer: Any) -> None:
        """``layer``: what ``DeformableTransformerDecoderLayer`` takes after ``d_model``."""
        super().__init__()
        self.layers = nn.ModuleList(DeformableTransformerDecoderLayer(d_model, *layer) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.ref_point_head = MLP(2 * d_model, d_model, d_model, 2)
        class_head, box_head = focal_heads(d_model, num_classes)
        self.class_embed, self.bbox_embed = (nn.ModuleList([head] * num_layers) for head in (class_head, box_head))

    def forward(self, queries: Queries, memory: Tensor, levels: FeatureLevels,
                attn_mask: Tensor | None) -> tuple[list[Outputs], Tensor]:
        """Queries, who of them may not look at whom ``[Q, Q]``, and the encoder's ``memory [B, S, D]`` of ``levels`` ->
        what each layer says, and what has become of the queries ``[B, Q, D]``.

        Look forward twice: the boxes that a layer looks from have no gradient, but the boxes that it predicts are its
        change of the boxes of the layer before with theirs, so that each layer's change learns from its own loss and
        from the next one's (section 3.5, figure 6). As published, a box is passed on by what the content says before the
        normalisation, and predicted by what it says after it, so that the two differ.
        """
        content, reference = queries
        outputs: list[Outputs] = []
        seen, undetached = content, reference
        for i, (layer, class_head, box_head) in enumerate(zip(self.layers, self.class_embed, self.bbox_embed)):
            if i:
                undetached = refine(reference, self.bbox_embed[i - 1](content), EPS)
                reference = undetached.detach()
            of_levels = decoder_reference_points(reference, levels)                             # [B, Q, L, 4]
            # As published, boxes are encoded as fractions of the first level with its padding.
            encoded = encode_boxes(reference if levels.exact else of_levels[:, :, 0], content.shape[-1] // 2)
            position = self.ref_point_head(encoded.to(content.dtype))
            content = layer(content, position, of_levels, memory, levels, attn_mask)
            seen = self.norm(content)
            outputs.append({"pred_logits": class_head(seen), "pred_boxes": refine(undetached, box_head(seen), EPS)})
        return outputs, seen


class DINO(nn.Module):
    """Backbone, levels, transformer, and the table of what a denoising query knows of its class."""

    def __init__(self, backbone: nn.Sequential, transformer: DINOTransformer, num_classes: int, num_levels: int,
                 aux_loss: bool, noising: Noising | None, finer: int = 0) -> None:
        """``noising``: of the denoising queries in training, if there are any; ``finer``: how many of the backbone's maps
        are for a mask head alone."""
        super().__init__()
        d_model = transformer.d_model
        # Published files have the heads under both names; lists of parameters say the first.
        self.bbox_embed, self.class_embed = transformer.decoder.bbox_embed, transformer.decoder.class_embed
        self.transformer = transformer
        self.label_enc = nn.Embedding(num_classes + 1, d_model)             # the last row, "unknown", is never used
        self.label_enc.requires_grad_(noising is not None)
        self.input_proj = build_input_proj(channels(backbone[0])[finer:], num_levels, d_model)
        self.backbone = backbone                                    # [-2]: feature maps, [-1]: their positions
        self.denoising = DenoisingQueries(noising, num_classes, EPS)
        self.num_queries, self.aux_loss = transformer.num_queries, aux_loss
        self.takes_targets, self.finer = noising is not None, finer

    def forward(self, samples: NestedTensor | Tensor | list[Tensor], targets: Sequence[Target] | None = None) -> Outputs:
        """Images -> ``pred_logits [B, Q, C]`` (sigmoid), ``pred_boxes [B, Q, 4]`` (cxcywh in 0..1), the same of the
        earlier decoder layers in ``aux_outputs`` and of the chosen proposals in ``interm_outputs``, and ``invalid_queries
        [B, Q]``, which started from no proposal. In training with ``targets``, also ``dn_outputs``, of
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
        warn_of_few(memory.shape[1], self.num_queries, images.tensors.shape)
        queries, proposals, invalid = self.transformer.propose(memory, levels)
        content, reference, attn_mask, noised = self.denoising(targets, self.label_enc, *queries)
        layers, content = self.transformer.decoder(Queries(content, reference), memory, levels, attn_mask)
        outputs: Outputs = {**collect(layers, noised, self.aux_loss), "interm_outputs": proposals,
                            "invalid_queries": invalid}
        return LevelSteps(outputs, maps, content[:, -self.num_queries:], memory)
