"""Deformable DETR (Zhu et al., 2021): figure 1 from left to right is ``DeformableDETR.forward`` from top to bottom.

The two extensions of the paper are options: ``with_box_refine`` (iterative bounding box refinement) and ``two_stage``
(section 4.2).
"""
from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbone import channels
from ..boxes import inverse_sigmoid
from ..config import DenoisingConfig, flag
from ..decoder import DeformableTransformerDecoderLayer
from ..deformable_attention import MSDeformAttn
from ..denoising import Denoising, DenoisingQueries, Noising, collect
from ..encoder import DeformableTransformerEncoder
from ..feature_levels import build_input_proj
from ..focal_detectors import Built, LevelSteps, MultiScaleConfig, for_mask_head, multi_scale_maps
from ..losses import box_loss, cardinality_error
from ..mask_head import Intermediates
from ..nested_tensor import NestedTensor, as_nested_tensor
from ..position_encoding import build_position_encoding
from ..prediction_heads import focal_heads
from ..reference_points import decoder_reference_points, refine
from ..set_criterion import every_row
from ..structures import FeatureLevels, Outputs, Target
from ..two_stage import best, encode_proposals, proposing_tokens, warn_of_few


@dataclass(frozen=True)
class DeformableDETRConfig(DenoisingConfig, MultiScaleConfig):
    """Deformable DETR's flags; the defaults are the paper's ResNet-50 model with four levels."""
    with_box_refine: bool = flag(False, "each decoder layer refines the boxes of the one before")
    two_stage: bool = flag(False, "queries begin at the encoder's best proposals")
    query_content: str = flag("position", "what two-stage queries start with: the encoded 'position' of their proposal, "
                              "as published, or the 'token' that proposed it", ("position", "token"))
    position_embedding_scale: float = flag(2 * math.pi, "what sine positions of 0 to 1 are multiplied with")
    lr_backbone_names: tuple[str, ...] = flag(("backbone.0",), "parts of the names of parameters that learn with "
                                              "--lr_backbone")
    lr_linear_proj_names: tuple[str, ...] = flag(("reference_points", "sampling_offsets"), "parts of the names of "
                                                 "parameters that learn with --lr times --lr_linear_proj_mult")
    lr_linear_proj_mult: float = flag(0.1, "factor on their learning rate", least=0)
    lr_backbone: float = flag(2e-5, "learning rate of the backbone; 0 freezes it", least=0)
    dim_feedforward: int = flag(1024, "width of the feed-forward blocks", least=1)

    @property
    def heads_of_layers(self) -> bool:
        return self.with_box_refine

    def build(self, num_classes: int) -> Built:
        """Model with random weights, criterion and post-processing, for labels ``0..num_classes-1``. ``frozen_weights``
        freezes all but the mask head; loading that file is left to the caller."""
        if self.query_content == "token" and not self.two_stage:
            raise ValueError("--query_content token is about proposals: add --two_stage")
        if self.denoising and not self.two_stage:
            raise ValueError("--denoising gives queries boxes to begin at, and those of this model begin at points: add "
                             "--two_stage")
        backbone, finer = self.build_maps()
        position = build_position_encoding(self.position_embedding, self.hidden_dim, self.position_embedding_scale,
                                           offset=-0.5)
        layer = (self.hidden_dim, self.nheads, self.dim_feedforward, self.dropout, self.num_feature_levels)
        transformer = DeformableTransformer(self.hidden_dim, self.num_feature_levels,
                                            DeformableTransformerEncoder(self.enc_layers, *layer, self.enc_n_points),
                                            DeformableTransformerDecoder(self.dec_layers, *layer, self.dec_n_points,
                                                                         with_box_refine=self.with_box_refine),
                                            self.two_stage, self.query_content == "token")
        noising = Noising(self.dn_number, self.dn_box_noise_scale, self.dn_label_noise_ratio, contrastive=False)
        detr = DeformableDETR(nn.Sequential(backbone, position), transformer, num_classes, self.num_queries,
                              self.num_feature_levels, self.aux_loss, self.with_box_refine, self.two_stage, finer,
                              noising if self.denoising else None)
        return self.complete(detr, backbone.exact, [box_loss, cardinality_error], class_agnostic_proposals=True)

    def weights(self) -> dict[str, float]:
        """The weight of each loss, of every supervised decoder layer and of the proposals."""
        return every_row(self.layer_weights(), self.dec_layers, self.aux_loss, self.two_stage, self.denoising)

    def parameter_groups(self, model: Any, lr: float) -> list[dict[str, Any]]:
        """A model's trainable parameters in the published groups: the others, the backbone's, and those that say where
        to look, which learn slower (section 5)."""
        def named(part: tuple[str, ...], name: str) -> bool:
            return any(keyword in name for keyword in part)

        names = [name for name, _ in model.named_parameters()]
        for option in ("lr_backbone_names", "lr_linear_proj_names"):
            for keyword in getattr(self, option):               # the default's may have nothing to name in some variants
                if keyword not in getattr(DeformableDETRConfig, option) and not any(keyword in name for name in names):
                    raise ValueError(f"--{option} {keyword}: no parameter's name has it in it; names are such as "
                                     f"{names[-1]} and {names[0]}")
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        backbone, slow = self.lr_backbone_names, self.lr_linear_proj_names
        if both := [name for name, _ in trained if named(backbone, name) and named(slow, name)]:
            raise ValueError(f"{both[0]} is meant by --lr_backbone_names and by --lr_linear_proj_names: which is its "
                             f"learning rate?")
        return [{"params": [p for n, p in trained if not named(backbone + slow, n)], "lr": lr},
                {"params": [p for n, p in trained if named(backbone, n)], "lr": self.lr_backbone},
                {"params": [p for n, p in trained if named(slow, n)], "lr": lr * self.lr_linear_proj_mult}]


class Queries(NamedTuple):
    """What the decoder starts with."""
    content: Tensor                 # [B, Q, D]
    position: Tensor                # [B, Q, D]
    reference: Tensor               # [B, Q, 2] points or [B, Q, 4] boxes, as fractions of the image


class DeformableTransformer(nn.Module):
    """Encoder, start of the queries, decoder (figure 1). Heads are handed in, since the model shares them."""

    def __init__(self, d_model: int, num_levels: int, encoder: DeformableTransformerEncoder,
                 decoder: DeformableTransformerDecoder, two_stage: bool, token_content: bool = False) -> None:
        super().__init__()
        self.d_model, self.token_content = d_model, token_content
        self.encoder, self.decoder = encoder, decoder
        # Positions are for the encoder's queries: without layers there, nothing could train this part of them.
        self.level_embed = nn.Parameter(torch.empty(num_levels, d_model), requires_grad=len(encoder.layers) > 0)
        if two_stage:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = nn.LayerNorm(d_model)
            parts = 1 if token_content else 2                                       # the position, and the content
            self.pos_trans = nn.Linear(2 * d_model, parts * d_model)
            self.pos_trans_norm = nn.LayerNorm(parts * d_model)
        else:
            self.reference_points = nn.Linear(d_model, 2)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if not two_stage:
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def learned_queries(self, query_embed: Tensor, batch: int) -> Queries:
        """``query_embed [Q, 2 * D]``, positions and contents, the same for every image; a query's reference point is read
        off its position."""
        position, content = query_embed.expand(batch, -1, -1).chunk(2, dim=-1)
        with torch.autocast(position.device.type, enabled=False):
            reference = self.reference_points(position).sigmoid()
        return Queries(content, position, reference)

    def propose(self, memory: Tensor, levels: FeatureLevels, class_embed: nn.Module, bbox_embed: nn.Module,
                num_queries: int) -> tuple[Queries, Outputs, Tensor]:
        """The best proposals as queries; all proposals; and which queries had none to start from ``[B, Q]``. A proposal's
        score is the first class logit: its loss takes all objects for that class (section A.4). What a query knows at
        first is its proposal's position or, with ``token_content``, the token that proposed it (as in Efficient DETR, Yao
        et al., 2021), so that fewer decoder layers suffice."""
        tokens = proposing_tokens(memory, levels, num_queries)
        output = self.enc_output_norm(self.enc_output(tokens.memory))
        logits = class_embed(output)                                                            # [B, S, C]
        coordinates = bbox_embed(output) + tokens.anchors                                       # [B, S, 4]
        chosen = best(logits[..., 0], tokens.mask, num_queries, levels.exact)
        reference = coordinates.gather(1, chosen[..., None].expand(-1, -1, 4)).detach()
        start = self.started(reference, memory.dtype)
        if self.token_content:
            position, content = start, output.gather(1, chosen[..., None].expand(-1, -1, self.d_model))
        else:
            position, content = start.chunk(2, dim=-1)
        return (Queries(content, position, reference.sigmoid()),
                {"pred_logits": logits, "pred_boxes": coordinates.sigmoid()}, tokens.invalid.gather(1, chosen))

    def started(self, reference: Tensor, dtype: torch.dtype) -> Tensor:
        """What is made of boxes before the sigmoid ``[B, Q, 4]``: positions ``[B, Q, D]``, and contents beside them where
        these are not the tokens."""
        return self.pos_trans_norm(self.pos_trans(encode_proposals(reference, self.d_model // 2).to(dtype)))

    def positions(self, position: Tensor, noised: Denoising | None) -> Tensor:
        """Of all queries: the matching ones' ``position [B, Q, D]``, and before it that of denoising ones, which is that
        of proposals with their boxes."""
        if noised is None:
            return position
        first = self.started(inverse_sigmoid(noised.boxes), position.dtype)[..., :self.d_model]
        return torch.cat([first, position], dim=1)


class DeformableTransformerDecoder(nn.Module):
    """Decoder layers, and where each of them looks from."""

    def __init__(self, num_layers: int, *layer: Any, with_box_refine: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeformableTransformerDecoderLayer(*layer) for _ in range(num_layers))
        self.next_reference = refined if with_box_refine else unchanged

    def forward(self, queries: Queries, memory: Tensor, levels: FeatureLevels, class_embed: nn.ModuleList,
                bbox_embed: nn.ModuleList, attn_mask: Tensor | None = None) -> tuple[list[Outputs], Tensor]:
        """Queries, the encoder's ``memory [B, S, D]`` of ``levels``, each layer's heads, and who may not look at whom
        ``[Q, Q]`` -> what each layer says, and what has become of the queries ``[B, Q, D]``."""
        content, position, reference = queries
        outputs: list[Outputs] = []
        for layer, class_head, box_head in zip(self.layers, class_embed, bbox_embed):
            content = layer(content, position, decoder_reference_points(reference, levels), memory, levels, attn_mask)
            boxes = refine(reference, box_head(content))
            outputs.append({"pred_logits": class_head(content), "pred_boxes": boxes})
            reference = self.next_reference(reference, boxes)
        return outputs, content


def refined(reference: Tensor, boxes: Tensor) -> Tensor:
    """With box refinement, a layer looks around the boxes of the one before; these learn from their own loss alone."""
    return boxes.detach()


def unchanged(reference: Tensor, boxes: Tensor) -> Tensor:
    """Without, all layers look from where the queries began."""
    return reference


class DeformableDETR(nn.Module):
    """Backbone, levels, transformer; class and box heads for each decoder layer and for the proposals, which without
    refinement are one."""

    def __init__(self, backbone: nn.Sequential, transformer: DeformableTransformer, num_classes: int, num_queries: int,
                 num_levels: int, aux_loss: bool, with_box_refine: bool, two_stage: bool, finer: int = 0,
                 noising: Noising | None = None) -> None:
        """``finer``: how many of the backbone's maps are for a mask head alone; ``noising``: of the denoising queries in
        training, if there are any."""
        super().__init__()
        d_model = transformer.d_model
        self.transformer = transformer
        class_head, box_head = focal_heads(d_model, num_classes)
        heads = len(transformer.decoder.layers) + two_stage
        self.class_embed, self.bbox_embed = (
            nn.ModuleList(copy.deepcopy(head) if with_box_refine else head for _ in range(heads))
            for head in (class_head, box_head))
        if not two_stage:                           # first boxes of about 0.12 of the image; proposals have a size
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)                     # type: ignore[arg-type]
        # Published files have the heads a second time, under the part that first used them.
        if with_box_refine:
            transformer.decoder.bbox_embed = self.bbox_embed
        if two_stage:
            transformer.decoder.class_embed = self.class_embed
        else:
            self.query_embed = nn.Embedding(num_queries, 2 * d_model)
        self.input_proj = build_input_proj(channels(backbone[0])[finer:], num_levels, d_model)
        self.backbone = backbone                                    # [-2]: feature maps, [-1]: their positions
        self.num_queries, self.aux_loss, self.two_stage, self.finer = num_queries, aux_loss, two_stage, finer
        self.denoising, self.takes_targets = DenoisingQueries(noising, num_classes), noising is not None
        self.label_enc = None if noising is None else \
            nn.Embedding(num_classes + 1, d_model)                          # its last row, "unknown", is never used

    @property
    def class_agnostic_head(self) -> nn.Module | None:
        """The class head of proposals, whose row 0 stands for any object, whatever the classes are (section A.4)."""
        return self.class_embed[-1] if self.two_stage else None

    def forward(self, samples: NestedTensor | Tensor | list[Tensor], targets: Sequence[Target] | None = None) -> Outputs:
        """Images -> ``pred_logits [B, Q, C]`` (sigmoid), ``pred_boxes [B, Q, 4]`` (cxcywh in 0..1), the same of the
        earlier decoder layers in ``aux_outputs``. Two-stage: of all tokens in ``enc_outputs``, and ``invalid_queries
        [B, Q]``, which started from no proposal. In training with ``denoising`` and ``targets``, also ``dn_outputs``, of
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
        outputs: Outputs = {}
        if self.two_stage:
            queries, outputs["enc_outputs"], outputs["invalid_queries"] = self.transformer.propose(
                memory, levels, self.class_embed[-1], self.bbox_embed[-1], self.num_queries)
            warn_of_few(memory.shape[1], self.num_queries, images.tensors.shape)
        else:
            queries = self.transformer.learned_queries(self.query_embed.weight, memory.shape[0])
        content, position, reference = queries
        content, reference, attn_mask, noised = self.denoising(targets, self.label_enc, content, reference)
        queries = Queries(content, self.transformer.positions(position, noised), reference)
        layers, content = self.transformer.decoder(queries, memory, levels, self.class_embed, self.bbox_embed, attn_mask)
        outputs |= collect(layers, noised, self.aux_loss)
        return LevelSteps(outputs, maps, content[:, -self.num_queries:], memory)
