"""DETR whose queries begin at proposals of the encoder: our own, for training from random weights in minutes.

DETR's queries are learned once for all images, and its boxes are absolute; it takes hundreds of epochs until they find
objects. Here every token of the encoder proposes a box around itself, the best proposals become the queries, and each
decoder layer refines their boxes (two-stage Deformable DETR and its box refinement, Zhu et al., 2021, section 4.2, with
DETR's dense attention). Classes are scored one by one with the focal loss (Lin et al., 2017), without "no object".
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbone import build_backbone, channels, freeze
from ..boxes import inverse_sigmoid
from ..config import ModelConfig, flag
from ..decoder import TransformerDecoderLayer
from ..encoder import TransformerEncoder
from ..losses import FocalLabelLoss, box_loss
from ..matcher import HungarianMatcher
from ..mlp import MLP
from ..nested_tensor import NestedTensor, as_nested_tensor
from ..position_encoding import build_position_encoding, encode_boxes
from ..postprocess import PostProcessTopK
from ..set_criterion import SetCriterion
from ..structures import Outputs


@dataclass(frozen=True)
class ProposalDETRConfig(ModelConfig):
    """Flags of DETR with proposals."""
    set_cost_class: float = flag(2, "class weight in the matching cost")
    cls_loss_coef: float = flag(2, "weight of the focal class loss")
    focal_alpha: float = flag(0.25, "weight of objects against background in the focal loss")

    def build(self, num_classes: int) -> tuple[nn.Module, SetCriterion, dict[str, nn.Module]]:
        """Model with random weights, criterion and post-processing, for labels ``0..num_classes-1``."""
        backbone = build_backbone(self.backbone, self.backbone_norm, self.dilation)
        freeze(backbone, self.from_scratch, self.lr_backbone)
        position = build_position_encoding(self.position_embedding, self.hidden_dim)
        layer = (self.hidden_dim, self.nheads, self.dim_feedforward, self.dropout)
        transformer = ProposalTransformer(layer, self.enc_layers, self.dec_layers, num_classes, self.num_queries)
        model = ProposalDETR(nn.Sequential(backbone, position), transformer, self.aux_loss)
        matcher = HungarianMatcher(self.set_cost_class, self.set_cost_bbox, self.set_cost_giou, "focal")
        criterion = SetCriterion(matcher, [FocalLabelLoss(self.focal_alpha), box_loss], self.weights())
        return model, criterion, {"bbox": PostProcessTopK()}

    def weights(self) -> dict[str, float]:
        """The weight of each loss, of the last decoder layer, the earlier ones, and the proposals."""
        weights = {"loss_ce": self.cls_loss_coef, "loss_bbox": self.bbox_loss_coef, "loss_giou": self.giou_loss_coef}
        layers = [f"_{i}" for i in range(self.dec_layers - 1)] if self.aux_loss else []
        return {name + suffix: weight for suffix in ["", *layers, "_enc"] for name, weight in weights.items()}


class Heads(nn.Module):
    """Class logits ``[..., C]`` and a change of box ``[..., 4]`` (in logits) of tokens or queries ``[..., D]``.

    At first every class is as good as absent, with probability 0.01 (Lin et al., 2017, section 4.1), and boxes stay as
    they are.
    """

    def __init__(self, d_model: int, num_classes: int) -> None:
        super().__init__()
        self.class_embed = nn.Linear(d_model, num_classes)
        self.bbox_embed = MLP(d_model, d_model, 4, 3)
        nn.init.constant_(self.class_embed.bias, -math.log(99))
        nn.init.zeros_(self.bbox_embed.layers[-1].weight)                                      # type: ignore[arg-type]
        nn.init.zeros_(self.bbox_embed.layers[-1].bias)                                        # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.class_embed(x), self.bbox_embed(x).float()


class Proposals(nn.Module):
    """Every token proposes a box around its centre; the most promising ones become queries."""

    SIDE = 0.15                 # of a proposal before the head changes it: fraction of the image
    INVALID = -1e4              # class logits of padding, never chosen while there are other tokens

    def __init__(self, d_model: int, num_classes: int, num_queries: int) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.content = nn.Sequential(nn.Linear(d_model, d_model), nn.LayerNorm(d_model))
        self.heads = Heads(d_model, num_classes)

    def anchors(self, mask: Tensor) -> Tensor:
        """``mask [B, H, W]``, True on padding -> box logits ``[B, H * W, 4]``: tokens' centres as fractions of the valid
        part of the map."""
        valid = (~mask).float()
        y, x = ((valid.cumsum(d) - 0.5) / valid.sum(d, keepdim=True).clamp(min=1) for d in (1, 2))
        side = torch.full_like(x, self.SIDE)
        return inverse_sigmoid(torch.stack([x, y, side, side], dim=-1), eps=1e-3).flatten(1, 2)

    def forward(self, memory: Tensor, mask: Tensor) -> tuple[Outputs, Tensor, Tensor, Tensor]:
        """``memory [B, S, D]``, ``mask [B, H, W]`` -> all proposals; and of the best ``num_queries`` (all of them, where
        there are fewer tokens) content ``[B, Q, D]``, reference boxes (logits) ``[B, Q, 4]``, and which of them are
        padding ``[B, Q]``."""
        padding = mask.flatten(1)
        content = self.content(memory)
        logits, delta = self.heads(content)
        logits = logits.float().masked_fill(padding[..., None], self.INVALID)
        boxes = self.anchors(mask) + delta
        best = logits.amax(-1).topk(min(self.num_queries, logits.shape[1])).indices             # [B, Q]

        def chosen(x: Tensor) -> Tensor:
            return x.gather(1, best[..., None].expand(-1, -1, x.shape[-1]))

        proposals: Outputs = {"pred_logits": logits, "pred_boxes": boxes.sigmoid()}
        return proposals, chosen(content), chosen(boxes).detach(), padding.gather(1, best)


class ProposalDecoder(nn.Module):
    """Decoder layers, each of which refines the boxes that its queries refer to."""

    def __init__(self, layer: tuple[int, int, int, float], num_layers: int, num_classes: int) -> None:
        super().__init__()
        d_model = layer[0]
        self.layers = nn.ModuleList(TransformerDecoderLayer(*layer) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.position = MLP(2 * d_model, d_model, d_model, 2)
        self.heads = Heads(d_model, num_classes)

    def forward(self, content: Tensor, reference: Tensor, query_mask: Tensor, memory: Tensor, memory_key: Tensor,
                mask: Tensor) -> list[Outputs]:
        layers: list[Outputs] = []
        for layer in self.layers:
            position = self.position(encode_boxes(reference.sigmoid(), content.shape[-1] // 2).to(content.dtype))
            content = layer(content, position, memory, memory_key, mask, query_mask)
            logits, delta = self.heads(self.norm(content))
            boxes = reference + delta
            logits = logits.float().masked_fill(query_mask[..., None], Proposals.INVALID)
            layers.append({"pred_logits": logits, "pred_boxes": boxes.sigmoid()})
            reference = boxes.detach()
        return layers


class ProposalTransformer(nn.Module):
    """Encoder, proposals, decoder."""

    def __init__(self, layer: tuple[int, int, int, float], enc_layers: int, dec_layers: int, num_classes: int,
                 num_queries: int) -> None:
        super().__init__()
        self.d_model = layer[0]
        self.encoder = TransformerEncoder(enc_layers, *layer)
        self.decoder = ProposalDecoder(layer, dec_layers, num_classes)
        self.proposals = Proposals(self.d_model, num_classes, num_queries)
        for parameter in [*self.encoder.parameters(), *self.decoder.layers.parameters()]:
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, src: Tensor, mask: Tensor, pos_embed: Tensor) -> tuple[list[Outputs], Outputs]:
        """Feature map and its positions ``[B, D, H, W]``, ``mask [B, H, W]`` True on padding -> what each decoder layer
        says, and the proposals."""
        tokens, position, padding = src.flatten(2).mT, pos_embed.flatten(2).mT, mask.flatten(1)
        memory = self.encoder(tokens, padding, position)
        proposals, content, reference, query_mask = self.proposals(memory, mask)
        layers = self.decoder(content, reference, query_mask, memory, memory + position, padding)
        return layers, proposals


class ProposalDETR(nn.Module):
    """Backbone and transformer; its heads are with those who loop over layers."""

    def __init__(self, backbone: nn.Sequential, transformer: ProposalTransformer, aux_loss: bool) -> None:
        super().__init__()
        self.transformer = transformer
        self.input_proj = nn.Conv2d(channels(backbone)[-1], transformer.d_model, kernel_size=1)
        self.backbone = backbone                                    # [-2]: feature maps, [-1]: their positions
        self.aux_loss = aux_loss

    def forward(self, samples: NestedTensor | Tensor | list[Tensor]) -> Outputs:
        """Images -> ``pred_logits [B, Q, C]`` (sigmoid), ``pred_boxes [B, Q, 4]`` (cxcywh in 0..1), the same of the
        earlier decoder layers in ``aux_outputs`` and of all proposals in ``enc_outputs``."""
        features = list(self.backbone[-2](as_nested_tensor(samples)).values())[-1]
        src = self.input_proj(features.tensors)
        layers, proposals = self.transformer(src, features.mask, self.backbone[-1](features).to(src.dtype))
        outputs: Outputs = {**layers[-1], "enc_outputs": proposals}
        if self.aux_loss:
            outputs["aux_outputs"] = layers[:-1]
        return outputs
