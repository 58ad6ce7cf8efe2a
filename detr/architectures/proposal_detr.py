"""DETR whose queries begin at proposals of the encoder: our own, for training from random weights in minutes.

DETR's queries are learned once for all images, and its boxes are absolute; its authors train it for 300 to 500 epochs
(section 4). Here every place of a map proposes a box around itself, the best proposals become the queries, and each
decoder layer refines their boxes: two-stage Deformable DETR with box refinement (Zhu et al., 2021, section 4.2), but
with DETR's dense attention. Proposals are made on the backbone's next finer map, joined by the encoder's memory from
above (Lin et al., 2017, feature pyramids), since small objects need its resolution and attention could not afford it.
Boxes change relative to their own size (Girshick et al., 2014, appendix C), and classes are scored one by one with the
focal loss (Lin et al., 2017), without "no object".
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import build_backbone, channels
from ..boxes import box_prior, refine_relative
from ..config import ModelConfig, flag, shown
from ..decoder import TransformerDecoderLayer
from ..encoder import TransformerEncoder
from ..losses import FocalLabelLoss, box_loss
from ..matcher import HungarianMatcher, focal_class_cost
from ..mlp import MLP
from ..nested_tensor import NestedTensor, as_nested_tensor
from ..padding import at_least, exact_upsample
from ..position_encoding import build_position_encoding, encode_boxes
from ..postprocess import PostProcessTopK
from ..prediction_heads import focal_heads
from ..reference_points import map_centres
from ..set_criterion import SetCriterion, every_row
from ..structures import Outputs


@dataclass(frozen=True)
class ProposalDETRConfig(ModelConfig):
    """Flags of DETR with proposals."""
    set_cost_class: float = flag(2, "class weight in the matching cost")
    cls_loss_coef: float = flag(2, "weight of the focal class loss")
    focal_alpha: float = flag(0.25, "weight of objects against background in the focal loss")
    box_prior: bool = flag(False, "queries look around their boxes: the decoder's attention to the image is weighted "
                                  "by a Gaussian of each query's box (Gao et al., 2021)")

    def build(self, num_classes: int) -> tuple[nn.Module, SetCriterion, dict[str, nn.Module]]:
        """Model with random weights, criterion and post-processing, for labels ``0..num_classes-1``."""
        if self.feature_strides is not None and len(self.feature_strides) != 2:
            raise ValueError(f"--feature_strides {shown(self.feature_strides)}: this model takes two, that of the "
                             f"proposals and that of the encoder, such as 8 16")
        backbone = build_backbone(self, lambda strides: (-2, -1), most=2)
        position = build_position_encoding(self.position_embedding, self.hidden_dim)
        layer = (self.hidden_dim, self.nheads, self.dim_feedforward, self.dropout)
        transformer = ProposalTransformer(layer, self.enc_layers, self.dec_layers, num_classes, self.num_queries,
                                          fine_channels=channels(backbone)[0], prior=self.box_prior)
        model = ProposalDETR(nn.Sequential(backbone, position), transformer, self.aux_loss)
        matcher = HungarianMatcher(self.set_cost_class, self.set_cost_bbox, self.set_cost_giou,
                                   partial(focal_class_cost, alpha=self.focal_alpha))
        criterion = SetCriterion(matcher, [FocalLabelLoss(self.focal_alpha), box_loss], self.weights())
        return model, criterion, {"bbox": PostProcessTopK()}

    def weights(self) -> dict[str, float]:
        """The weight of each loss, of the last decoder layer, the earlier ones, and the proposals."""
        weights = {"loss_ce": self.cls_loss_coef, "loss_bbox": self.bbox_loss_coef, "loss_giou": self.giou_loss_coef}
        return every_row(weights, self.dec_layers, self.aux_loss, proposals=True)


class Heads(nn.Module):
    """Class logits ``[..., C]`` and changes of boxes ``[..., 4]`` of proposals or queries ``[..., D]``."""

    def __init__(self, d_model: int, num_classes: int) -> None:
        super().__init__()
        self.class_embed, self.bbox_embed = focal_heads(d_model, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.class_embed(x).float(), self.bbox_embed(x).float()


class Proposals(nn.Module):
    """Every place of the fine map proposes a box around its centre; the most promising ones become queries."""

    SIDE = 0.15                 # of a proposal before the head changes it: fraction of the image
    INVALID = -20.0             # class logits of padding: chosen only where there is nothing else, and then scored 2e-9

    def __init__(self, d_model: int, fine_channels: int, num_classes: int, num_queries: int) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.lateral = nn.Conv2d(fine_channels, d_model, kernel_size=1)
        self.norm = nn.LayerNorm(d_model)
        self.content = nn.Sequential(nn.Linear(d_model, d_model), nn.LayerNorm(d_model))
        self.heads = Heads(d_model, num_classes)

    def anchors(self, mask: Tensor) -> Tensor:
        """``mask [B, H, W]``, True on padding -> boxes ``[B, H * W, 4]``: centres as fractions of the valid part."""
        return F.pad(map_centres(mask), (0, 2), value=self.SIDE)

    @staticmethod
    def above(memory: NestedTensor, fine: NestedTensor) -> Tensor:
        """The memory at the resolution of the finer map, by nearest neighbour; where sizes are known, in each image by
        itself."""
        height, width = fine.tensors.shape[-2:]
        if memory.sizes is None or fine.sizes is None:
            return F.interpolate(memory.tensors, size=(height, width), mode="nearest")
        return exact_upsample(memory.tensors, memory.sizes, fine.sizes, (height, width))

    def forward(self, memory: NestedTensor, fine: NestedTensor) -> tuple[Outputs, Tensor, Tensor, Tensor]:
        """The encoder's memory ``[B, D, H, W]`` and the finer map -> all proposals; and of the best ``num_queries``
        content ``[B, Q, D]``, boxes ``[B, Q, 4]``, and which of them are none ``[B, Q]``: padding, or made up where
        there are fewer places than queries."""
        joined = self.above(memory, fine) + self.lateral(fine.tensors)
        content = self.content(self.norm(joined.flatten(2).mT))                                 # [B, S, D]
        padding, anchors = fine.mask.flatten(1), self.anchors(fine.mask)
        short = at_least(0, self.num_queries - content.shape[1])
        padding = F.pad(padding, (0, short), value=True)
        content = F.pad(content, (0, 0, 0, short)).masked_fill(padding[..., None], 0.0)
        anchors = F.pad(anchors, (0, 0, 0, short)).masked_fill(padding[..., None], 0.5)
        logits, delta = self.heads(content)
        logits = logits.masked_fill(padding[..., None], self.INVALID)
        boxes = refine_relative(anchors, delta)
        best = logits.amax(-1).masked_fill(padding, -math.inf).topk(self.num_queries).indices   # [B, Q]

        def chosen(x: Tensor) -> Tensor:
            return x.gather(1, best[..., None].expand(-1, -1, x.shape[-1]))

        proposals: Outputs = {"pred_logits": logits, "pred_boxes": boxes}
        return proposals, chosen(content), chosen(boxes).detach(), padding.gather(1, best)


def no_prior(boxes: Tensor, places: Tensor) -> None:
    """Queries look where they like; see ``box_prior``."""


class ProposalDecoder(nn.Module):
    """Decoder layers, each of which refines the boxes that its queries refer to.

    With ``prior``, queries look around their boxes (Gao et al., 2021, section 3.2). Without, nothing makes them: their
    content is a proposal of the place that they are about, and small models learn to look elsewhere, at the rest.
    """

    def __init__(self, layer: tuple[int, int, int, float], num_layers: int, num_classes: int, prior: bool) -> None:
        super().__init__()
        self.prior: Callable[[Tensor, Tensor], Tensor | None] = box_prior if prior else no_prior
        d_model = layer[0]
        self.layers = nn.ModuleList(TransformerDecoderLayer(*layer) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.position = MLP(2 * d_model, d_model, d_model, 2)
        self.heads = Heads(d_model, num_classes)

    def forward(self, content: Tensor, reference: Tensor, query_mask: Tensor, memory: Tensor, memory_key: Tensor,
                mask: Tensor | None, centres: Tensor) -> list[Outputs]:
        """Queries' content ``[B, Q, D]``, boxes ``[B, Q, 4]`` and which of them are none ``[B, Q]``; tokens
        ``[B, S, D]``, with positions added as keys, their padding, and their centres ``[B, S, 2]`` as fractions of the
        image -> what each layer says."""
        layers: list[Outputs] = []
        for layer in self.layers:
            position = self.position(encode_boxes(reference, content.shape[-1] // 2).to(content.dtype))
            content = layer(content, position, memory, memory_key, mask, query_mask, self.prior(reference, centres.mT))
            logits, delta = self.heads(self.norm(content))
            boxes = refine_relative(reference, delta)
            layers.append({"pred_logits": logits.masked_fill(query_mask[..., None], Proposals.INVALID),
                           "pred_boxes": boxes})
            reference = boxes.detach()
        return layers


class ProposalTransformer(nn.Module):
    """Encoder, proposals, decoder."""

    def __init__(self, layer: tuple[int, int, int, float], enc_layers: int, dec_layers: int, num_classes: int,
                 num_queries: int, fine_channels: int, prior: bool) -> None:
        super().__init__()
        self.d_model = layer[0]
        self.encoder = TransformerEncoder(enc_layers, *layer)
        self.proposals = Proposals(self.d_model, fine_channels, num_classes, num_queries)
        self.decoder = ProposalDecoder(layer, dec_layers, num_classes, prior)
        for parameter in [*self.encoder.parameters(), *self.decoder.layers.parameters()]:
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, src: NestedTensor, pos_embed: Tensor, fine: NestedTensor) -> tuple[list[Outputs], Outputs]:
        """Feature map and its positions ``[B, D, H, W]``, and the finer map -> what each decoder layer says, and the
        proposals."""
        tokens, position, mask = src.tensors.flatten(2).mT, pos_embed.flatten(2).mT, src.key_padding_mask()
        memory = self.encoder(tokens, mask, position)
        above = NestedTensor(memory.mT.reshape(src.tensors.shape), src.mask, src.sizes, src.whole)
        proposals, content, boxes, query_mask = self.proposals(above, fine)
        layers = self.decoder(content, boxes, query_mask, memory, memory + position, mask, map_centres(src.mask))
        return layers, proposals


class ProposalDETR(nn.Module):
    """Backbone and transformer; the heads are with those who loop over layers."""

    def __init__(self, backbone: nn.Sequential, transformer: ProposalTransformer, aux_loss: bool) -> None:
        super().__init__()
        self.transformer = transformer
        self.input_proj = nn.Conv2d(channels(backbone[0])[1], transformer.d_model, kernel_size=1)
        self.backbone = backbone                                    # [-2]: feature maps, [-1]: their positions
        self.aux_loss = aux_loss

    def forward(self, samples: NestedTensor | Tensor | list[Tensor]) -> Outputs:
        """Images -> ``pred_logits [B, Q, C]`` (sigmoid), ``pred_boxes [B, Q, 4]`` (cxcywh in 0..1), the same of the
        earlier decoder layers in ``aux_outputs`` and of all proposals in ``enc_outputs``."""
        fine, last = self.backbone[-2](as_nested_tensor(samples)).values()
        src = self.input_proj(last.tensors)
        src = NestedTensor(src, last.mask, last.sizes, last.whole)
        layers, proposals = self.transformer(src, self.backbone[-1](last).to(src.tensors.dtype), fine)
        outputs: Outputs = {**layers[-1], "enc_outputs": proposals}
        if self.aux_loss:
            outputs["aux_outputs"] = layers[:-1]
        return outputs
