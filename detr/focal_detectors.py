"""What the detectors that score classes one by one have in common around their models, from Deformable DETR to DINO:
flags, matcher, criterion, mask head, post-processing; and those of them that look at several scales, their levels."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from .backbone import Backbone, build_backbone
from .boxes import box_prior
from .config import MaskConfig, flag
from .feature_levels import coarse_maps, flatten_levels, level_of, project
from .losses import FocalLabelLoss, mask_loss
from .mask_head import DETRsegm, Intermediates
from .matcher import HungarianMatcher, focal_class_cost
from .nested_tensor import NestedTensor
from .panoptic import PostProcessPanoptic
from .postprocess import PostProcessSegm, PostProcessTopK
from .reference_points import map_centres, token_centres
from .set_criterion import Loss, SetCriterion, every_row
from .structures import FeatureLevels, Outputs

Built = tuple[nn.Module, SetCriterion, dict[str, nn.Module]]


@dataclass(frozen=True)
class FocalConfig(MaskConfig):
    """Flags of all detectors with the focal loss."""
    cls_loss_coef: float = flag(2, "weight of the focal class loss")
    focal_alpha: float = flag(0.25, "weight of objects against background in the focal loss")
    num_queries: int = flag(300, "object queries: the most objects an image can have", least=1)
    set_cost_class: float = flag(2, "class weight in the matching cost")
    panoptic_threshold: float = flag(0.3, "least score of a query that becomes a segment of a panoptic map", least=0)

    def complete(self, detr: nn.Module, exact: bool, losses: Sequence[Loss], num_select: int = 100,
                 class_agnostic_proposals: bool = False) -> Built:
        """A detector -> model, with a mask head where ``masks``; criterion, of the focal class loss, ``losses`` and those
        of masks; post-processing, to ``num_select`` detections. ``exact``: whether its padding is;
        ``class_agnostic_proposals``: see ``SetCriterion``."""
        matcher = HungarianMatcher(self.set_cost_class, self.set_cost_bbox, self.set_cost_giou,
                                   partial(focal_class_cost, alpha=self.focal_alpha))
        model, frozen = detr, self.frozen_weights is not None
        all_losses: list[Loss] = [FocalLabelLoss(self.focal_alpha), *losses]
        postprocessors: dict[str, nn.Module] = {"bbox": PostProcessTopK(num_select)}
        if self.masks:
            model = DETRsegm(detr, self.nheads, matcher, frozen, gain=100.0)
            all_losses.append(mask_loss)
            postprocessors["segm"] = PostProcessSegm(crop=exact)
        criterion = SetCriterion(matcher, all_losses, self.weights(), class_agnostic_proposals=class_agnostic_proposals)
        return model, criterion, postprocessors

    def panoptic(self, is_thing_map: dict[int, bool], crop: bool) -> nn.Module:
        """Post-processing to panoptic maps; ``is_thing_map``: which labels are things; ``crop``: padding is exact."""
        return PostProcessPanoptic(is_thing_map, self.panoptic_threshold, sigmoid=True, crop=crop)

    def weights(self) -> dict[str, float]:
        """The weight of each loss, of every supervised decoder layer."""
        return every_row(self.layer_weights(), self.dec_layers, self.aux_loss)

    def layer_weights(self) -> dict[str, float]:
        """The weight of each loss of a decoder layer."""
        weights = {"loss_ce": self.cls_loss_coef, "loss_bbox": self.bbox_loss_coef, "loss_giou": self.giou_loss_coef}
        if self.masks:
            weights |= {"loss_mask": self.mask_loss_coef, "loss_dice": self.dice_loss_coef}
        return weights


@dataclass(frozen=True)
class MultiScaleConfig(FocalConfig):
    """Flags of those with several levels."""
    num_feature_levels: int = flag(4, "levels of multi-scale attention: maps of stride 8 and coarser, of DINO with five "
                                   "or more of stride 4", least=1)
    enc_n_points: int = flag(4, "points that an encoder head samples in each level", least=1)
    dec_n_points: int = flag(4, "points that a decoder head samples in each level", least=1)

    @property
    def finest_stride(self) -> int:
        """Of the maps that become levels where ``--feature_strides`` does not say."""
        return 8

    def build_maps(self) -> tuple[Backbone, int]:
        """The backbone, and how many of its maps, the finest, are for a mask head alone."""
        self.check_masks()
        if self.position_embedding == "learned" and not self.enc_layers:
            raise ValueError("--position_embedding learned: the encoder alone uses positions; give --enc_layers 1 or "
                             "more")
        backbone = build_backbone(self, self.maps, most=self.num_feature_levels)
        return backbone, len(backbone.strides) - len(self.coarse_maps(backbone.strides)) if self.masks else 0

    def maps(self, strides: list[int]) -> Sequence[int]:
        """The maps that are used where ``--feature_strides`` does not say: the levels, and for masks the finer ones."""
        return range(len(strides))[-4:] if self.masks else self.coarse_maps(strides)

    def coarse_maps(self, strides: list[int]) -> list[int]:
        """The maps that become levels where ``--feature_strides`` does not say: the coarsest ones."""
        return coarse_maps(strides, self.num_feature_levels, self.finest_stride)


class Steps(NamedTuple):
    """What a detector with one map went through."""
    outputs: Outputs
    features: list[NestedTensor]        # the backbone's maps, finest first
    src: Tensor                         # [B, D, H, W] the last of them, projected
    content: Tensor                     # [B, Q, D] the last decoder layer's queries
    memory: Tensor                      # [B, D, H, W] the encoder's output


class Maps(NamedTuple):
    """What a detector with levels looks at."""
    features: list[NestedTensor]        # the backbone's maps, finest first
    src: Tensor                         # [B, D, H, W] the last of them, projected
    last: int                           # its level
    levels: FeatureLevels


def multi_scale_maps(detr: Any, images: NestedTensor) -> Maps:
    """Through ``detr``'s backbone; its coarser maps, and further ones made of the last, become levels of tokens, each
    with its position and with what tells its level apart."""
    features = list(detr.backbone[-2](images).values())
    maps = project(detr.input_proj, features[detr.finer:], images)
    positions = [detr.backbone[-1](x).to(x.tensors.dtype) for x in maps]
    last = len(features) - detr.finer - 1
    return Maps(features, maps[last].tensors, last, flatten_levels(maps, positions, detr.transformer.level_embed))


class LevelSteps(NamedTuple):
    """What a detector with levels went through."""
    outputs: Outputs
    maps: Maps
    content: Tensor                     # [B, Q, D] the last decoder layer's queries
    memory: Tensor                      # [B, S, D] the encoder's output


def for_mask_head(steps: Steps | LevelSteps) -> tuple[Outputs, Intermediates]:
    """What a mask head needs; its dense attention is to the backbone's last map. Queries of these models know their
    objects relative to where they look, and memory may have seen no positions; so the boxes tell where to look."""
    if isinstance(steps, LevelSteps):
        outputs, (features, src, last, levels), content, tokens = steps
        memory = level_of(tokens, levels, last).reshape(src.shape)
        places = level_of(token_centres(levels), levels, last)
    else:
        outputs, features, src, content, memory = steps
        places = map_centres(features[-1].mask).mT
    prior = box_prior(outputs["pred_boxes"], places).unflatten(-1, src.shape[-2:])
    return outputs, Intermediates(features, src, content, memory, prior)
