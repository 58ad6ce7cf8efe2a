"""Deformable DETR (Zhu et al., 2021): figure 1 from left to right is ``DeformableDETR.forward`` from top to bottom.

The two extensions of the paper are options: ``with_box_refine`` (iterative bounding box refinement) and ``two_stage``
(section 4.2).
"""
from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbone import build_backbone, channels
from ..boxes import box_prior
from ..config import MaskConfig, flag
from ..decoder import DeformableTransformerDecoderLayer
from ..deformable_attention import MSDeformAttn
from ..encoder import DeformableTransformerEncoder
from ..feature_levels import build_input_proj, flatten_levels, level_of, project
from ..losses import FocalLabelLoss, box_loss, cardinality_error, mask_loss
from ..mask_head import DETRsegm, Intermediates
from ..matcher import HungarianMatcher, focal_class_cost
from ..mlp import MLP
from ..nested_tensor import NestedTensor, as_nested_tensor
from ..panoptic import PostProcessPanoptic
from ..position_encoding import build_position_encoding
from ..postprocess import PostProcessSegm, PostProcessTopK
from ..reference_points import decoder_reference_points, refine, token_centres
from ..set_criterion import Loss, SetCriterion, every_row
from ..structures import FeatureLevels, Outputs
from ..two_stage import best, encode_proposals, proposing_tokens

FINEST_STRIDE = 8                   # of the backbone's maps that become levels: C3 to C5 of a ResNet


@dataclass(frozen=True)
class DeformableDETRConfig(MaskConfig):
    """Deformable DETR's flags; the defaults are the paper's ResNet-50 model with four levels."""
    with_box_refine: bool = flag(False, "each decoder layer refines the boxes of the one before")
    two_stage: bool = flag(False, "queries begin at the encoder's best proposals")
    query_content: str = flag("position", "what two-stage queries start with: the encoded 'position' of their proposal, "
                              "as published, or the 'token' that proposed it", ("position", "token"))
    num_feature_levels: int = flag(4, "levels of multi-scale attention: maps of stride 8 and coarser", least=1)
    enc_n_points: int = flag(4, "points that an encoder head samples in each level", least=1)
    dec_n_points: int = flag(4, "points that a decoder head samples in each level", least=1)
    position_embedding_scale: float = flag(2 * math.pi, "what sine positions of 0 to 1 are multiplied with")
    cls_loss_coef: float = flag(2, "weight of the focal class loss")
    focal_alpha: float = flag(0.25, "weight of objects against background in the focal loss")
    lr_backbone_names: tuple[str, ...] = flag(("backbone.0",), "parts of the names of parameters that learn with "
                                              "--lr_backbone")
    lr_linear_proj_names: tuple[str, ...] = flag(("reference_points", "sampling_offsets"), "parts of the names of "
                                                 "parameters that learn with --lr times --lr_linear_proj_mult")
    lr_linear_proj_mult: float = flag(0.1, "factor on their learning rate", least=0)
    lr_backbone: float = flag(2e-5, "learning rate of the backbone; 0 freezes it", least=0)
    dim_feedforward: int = flag(1024, "width of the feed-forward blocks", least=1)
    num_queries: int = flag(300, "object queries: the most objects an image can have", least=1)
    set_cost_class: float = flag(2, "class weight in the matching cost")
    panoptic_threshold: float = flag(0.3, "least score of a query that becomes a segment of a panoptic map", least=0)

    def build(self, num_classes: int) -> tuple[nn.Module, SetCriterion, dict[str, nn.Module]]:
        """Model with random weights, criterion and post-processing, for labels ``0..num_classes-1``. ``frozen_weights``
        freezes all but the mask head; loading that file is left to the caller."""
        self.check_masks()
        if self.query_content == "token" and not self.two_stage:
            raise ValueError("--query_content token is about proposals: add --two_stage")
        if self.position_embedding == "learned" and not self.enc_layers:
            raise ValueError("--position_embedding learned: the encoder alone uses positions; give --enc_layers 1 or "
                             "more")
        backbone = build_backbone(self, self.maps, most=self.num_feature_levels)
        finer = len(backbone.strides) - len(self.coarse_maps(backbone.strides)) if self.masks else 0
        position = build_position_encoding(self.position_embedding, self.hidden_dim, self.position_embedding_scale,
                                           offset=-0.5)
        layer = (self.hidden_dim, self.nheads, self.dim_feedforward, self.dropout, self.num_feature_levels)
        transformer = DeformableTransformer(self.hidden_dim, self.num_feature_levels,
                                            DeformableTransformerEncoder(self.enc_layers, *layer, self.enc_n_points),
                                            DeformableTransformerDecoder(self.dec_layers, *layer, self.dec_n_points,
                                                                         with_box_refine=self.with_box_refine),
                                            self.two_stage, self.query_content == "token")
        detr = DeformableDETR(nn.Sequential(backbone, position), transformer, num_classes, self.num_queries,
                              self.num_feature_levels, self.aux_loss, self.with_box_refine, self.two_stage, finer)
        matcher = HungarianMatcher(self.set_cost_class, self.set_cost_bbox, self.set_cost_giou,
                                   partial(focal_class_cost, alpha=self.focal_alpha))
        losses: list[Loss] = [FocalLabelLoss(self.focal_alpha), box_loss, cardinality_error]
        frozen = self.frozen_weights is not None
        model = DETRsegm(detr, self.nheads, matcher, frozen, gain=100.0) if self.masks else detr
        criterion = SetCriterion(matcher, losses + [mask_loss] * self.masks, self.weights(),
                                 class_agnostic_proposals=True)
        postprocessors: dict[str, nn.Module] = {"bbox": PostProcessTopK()}
        if self.masks:
            postprocessors["segm"] = PostProcessSegm(crop=backbone.exact)
        return model, criterion, postprocessors

    def panoptic(self, is_thing_map: dict[int, bool], crop: bool) -> nn.Module:
        """Post-processing to panoptic maps; ``is_thing_map``: which labels are things; ``crop``: padding is exact."""
        return PostProcessPanoptic(is_thing_map, self.panoptic_threshold, sigmoid=True, crop=crop)

    def maps(self, strides: list[int]) -> Sequence[int]:
        """The maps that are used where ``--feature_strides`` does not say: the levels, and for masks the finer ones."""
        return range(len(strides))[-4:] if self.masks else self.coarse_maps(strides)

    def coarse_maps(self, strides: list[int]) -> list[int]:
        """The maps that become levels where ``--feature_strides`` does not say: the coarsest ones."""
        return [i for i, stride in enumerate(strides)
                if stride >= FINEST_STRIDE or i + 1 == len(strides)][-self.num_feature_levels:]

    def weights(self) -> dict[str, float]:
        """The weight of each loss, of every supervised decoder layer and of the proposals."""
        weights = {"loss_ce": self.cls_loss_coef, "loss_bbox": self.bbox_loss_coef, "loss_giou": self.giou_loss_coef}
        if self.masks:
            weights |= {"loss_mask": self.mask_loss_coef, "loss_dice": self.dice_loss_coef}
        return every_row(weights, self.dec_layers, self.aux_loss, self.two_stage)

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
        start = self.pos_trans_norm(self.pos_trans(encode_proposals(reference, self.d_model // 2).to(memory.dtype)))
        if self.token_content:
            position, content = start, output.gather(1, chosen[..., None].expand(-1, -1, self.d_model))
        else:
            position, content = start.chunk(2, dim=-1)
        return (Queries(content, position, reference.sigmoid()),
                {"pred_logits": logits, "pred_boxes": coordinates.sigmoid()}, tokens.invalid.gather(1, chosen))


class DeformableTransformerDecoder(nn.Module):
    """Decoder layers, and where each of them looks from."""

    def __init__(self, num_layers: int, *layer: Any, with_box_refine: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeformableTransformerDecoderLayer(*layer) for _ in range(num_layers))
        self.next_reference = refined if with_box_refine else unchanged

    def forward(self, queries: Queries, memory: Tensor, levels: FeatureLevels, class_embed: nn.ModuleList,
                bbox_embed: nn.ModuleList) -> tuple[list[Outputs], Tensor]:
        """Queries, the encoder's ``memory [B, S, D]`` of ``levels`` and each layer's heads -> what each layer says, and
        what has become of the queries ``[B, Q, D]``."""
        content, position, reference = queries
        outputs: list[Outputs] = []
        for layer, class_head, box_head in zip(self.layers, class_embed, bbox_embed):
            content = layer(content, position, decoder_reference_points(reference, levels), memory, levels)
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
                 num_levels: int, aux_loss: bool, with_box_refine: bool, two_stage: bool, finer: int = 0) -> None:
        """``finer``: how many of the backbone's maps are for a mask head alone."""
        super().__init__()
        d_model = transformer.d_model
        self.transformer = transformer
        class_head, box_head = nn.Linear(d_model, num_classes), MLP(d_model, d_model, 4, 3)
        nn.init.constant_(class_head.bias, -math.log(99))                   # at first every class has probability 0.01
        nn.init.zeros_(box_head.layers[-1].weight)                                              # type: ignore[arg-type]
        nn.init.zeros_(box_head.layers[-1].bias)                                                # type: ignore[arg-type]
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

    @property
    def class_agnostic_head(self) -> nn.Module | None:
        """The class head of proposals, whose row 0 stands for any object, whatever the classes are (section A.4)."""
        return self.class_embed[-1] if self.two_stage else None

    def forward(self, samples: NestedTensor | Tensor | list[Tensor]) -> Outputs:
        """Images -> ``pred_logits [B, Q, C]`` (sigmoid), ``pred_boxes [B, Q, 4]`` (cxcywh in 0..1), the same of the
        earlier decoder layers in ``aux_outputs``. Two-stage: of all tokens in ``enc_outputs``, and ``invalid_queries
        [B, Q]``, which started from no proposal."""
        return self.steps(samples)[0]

    def detect(self, samples: NestedTensor | Tensor | list[Tensor]) -> tuple[Outputs, Intermediates]:
        """``forward``, and what it went through, for a mask head.

        Queries know their objects relative to where they look, and memory may have seen no positions; so the boxes
        tell the mask head where to look.
        """
        outputs, features, src, content, memory, levels = self.steps(samples)
        last = len(features) - self.finer - 1                                           # the level of the last map
        prior = box_prior(outputs["pred_boxes"], level_of(token_centres(levels), levels, last))
        return outputs, Intermediates(features, src, content, level_of(memory, levels, last).reshape(src.shape),
                                      prior.unflatten(-1, src.shape[-2:]))

    def steps(self, samples: NestedTensor | Tensor | list[Tensor]) -> tuple[
            Outputs, list[NestedTensor], Tensor, Tensor, Tensor, FeatureLevels]:
        """Outputs, the backbone's maps, the last of them projected, queries, memory, levels."""
        images = as_nested_tensor(samples)
        features = list(self.backbone[-2](images).values())
        maps = project(self.input_proj, features[self.finer:], images)
        positions = [self.backbone[-1](x).to(x.tensors.dtype) for x in maps]
        levels = flatten_levels(maps, positions, self.transformer.level_embed)
        memory = self.transformer.encoder(levels)
        outputs: Outputs = {}
        if self.two_stage:
            queries, outputs["enc_outputs"], outputs["invalid_queries"] = self.transformer.propose(
                memory, levels, self.class_embed[-1], self.bbox_embed[-1], self.num_queries)
            if not torch.compiler.is_compiling() and memory.shape[1] < self.num_queries:
                height, width = images.tensors.shape[-2:]
                warnings.warn(f"images of {height}x{width} have {memory.shape[1]} tokens for {self.num_queries} queries; "
                              f"the others start from nothing and are told by outputs['invalid_queries']. Feed larger "
                              f"images or lower --num_queries", stacklevel=2)
        else:
            queries = self.transformer.learned_queries(self.query_embed.weight, memory.shape[0])
        layers, content = self.transformer.decoder(queries, memory, levels, self.class_embed, self.bbox_embed)
        outputs |= layers[-1]                                                                   # type: ignore[typeddict-item]
        if self.aux_loss:
            outputs["aux_outputs"] = layers[:-1]
        return outputs, features, maps[len(features) - self.finer - 1].tensors, content, memory, levels
