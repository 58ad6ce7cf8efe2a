"""DETR (Carion et al., 2020): figure 2 from left to right is ``DETR.forward`` from top to bottom."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbone import build_backbone, channels
from ..config import MaskConfig, flag
from ..decoder import TransformerDecoderLayer
from ..encoder import TransformerEncoder
from ..losses import SoftmaxLabelLoss, box_loss, cardinality_error, mask_loss
from ..mask_head import DETRsegm, Intermediates
from ..matcher import HungarianMatcher
from ..mlp import MLP
from ..nested_tensor import NestedTensor, as_nested_tensor
from ..panoptic import PostProcessPanoptic
from ..position_encoding import build_position_encoding
from ..postprocess import PostProcess, PostProcessSegm
from ..set_criterion import Loss, SetCriterion, every_row
from ..structures import Outputs


@dataclass(frozen=True)
class DETRConfig(MaskConfig):
    """DETR's flags; the defaults are the paper's ResNet-50 model."""
    pre_norm: bool = flag(False, "normalise before each transformer block instead of after it")
    eos_coef: float = flag(0.1, "weight of the 'no object' class in the class loss")

    def build(self, num_classes: int) -> tuple[nn.Module, SetCriterion, dict[str, nn.Module]]:
        """Model with random weights, criterion and post-processing, for labels ``0..num_classes-1``.

        ``frozen_weights`` freezes all but the mask head; loading that file is left to the caller.
        """
        self.check_masks()
        backbone = build_backbone(self, lambda strides: range(len(strides))[-4:] if self.masks else (-1,), most=1)
        position = build_position_encoding(self.position_embedding, self.hidden_dim)
        transformer = Transformer(self.hidden_dim, self.nheads, self.enc_layers, self.dec_layers, self.dim_feedforward,
                                  self.dropout, self.pre_norm)
        detr = DETR(nn.Sequential(backbone, position), transformer, num_classes, self.num_queries, self.aux_loss)
        matcher = HungarianMatcher(self.set_cost_class, self.set_cost_bbox, self.set_cost_giou)
        losses: list[Loss] = [SoftmaxLabelLoss(num_classes, self.eos_coef), box_loss, cardinality_error]
        model = DETRsegm(detr, self.nheads, matcher, self.frozen_weights is not None) if self.masks else detr
        criterion = SetCriterion(matcher, losses + [mask_loss] * self.masks, self.weights())
        postprocessors: dict[str, nn.Module] = {"bbox": PostProcess()}
        if self.masks:
            postprocessors["segm"] = PostProcessSegm(crop=backbone.exact)
        return model, criterion, postprocessors

    def panoptic(self, is_thing_map: dict[int, bool], crop: bool) -> nn.Module:
        """Post-processing to panoptic maps; ``is_thing_map``: which labels are things; ``crop``: padding is exact."""
        return PostProcessPanoptic(is_thing_map, self.panoptic_threshold, crop=crop)

    def weights(self) -> dict[str, float]:
        """The weight of each loss, of every supervised decoder layer."""
        weights = {"loss_ce": 1.0, "loss_bbox": self.bbox_loss_coef, "loss_giou": self.giou_loss_coef}
        if self.masks:
            weights |= {"loss_mask": self.mask_loss_coef, "loss_dice": self.dice_loss_coef}
        return every_row(weights, self.dec_layers, self.aux_loss)


class Transformer(nn.Module):
    """Encoder and decoder (section 3.2; figure 10)."""

    def __init__(self, d_model: int = 256, nhead: int = 8, num_encoder_layers: int = 6, num_decoder_layers: int = 6,
                 dim_feedforward: int = 2048, dropout: float = 0.1, normalize_before: bool = False) -> None:
        super().__init__()
        self.d_model, self.nhead = d_model, nhead
        layer = (d_model, nhead, dim_feedforward, dropout, normalize_before)
        self.encoder = TransformerEncoder(num_encoder_layers, *layer)
        self.decoder = TransformerDecoder(num_decoder_layers, *layer)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, src: Tensor, mask: Tensor | None, query_embed: Tensor, pos_embed: Tensor) -> tuple[Tensor, Tensor]:
        """Feature map and its positions ``[B, D, H, W]``, ``mask [B, H * W]`` True on padding, ``query_embed [Q, D]``
        -> what each decoder layer says of the queries ``[K, B, Q, D]``, and the encoder's memory ``[B, D, H, W]``."""
        tokens, position = src.flatten(2).mT, pos_embed.flatten(2).mT
        memory = self.encoder(tokens, mask, position)
        hs = self.decoder(query_embed.expand(src.shape[0], -1, -1), memory, memory + position, mask)
        return hs, memory.mT.reshape(src.shape)


class TransformerDecoder(nn.Module):
    """Decoder layers; queries start without content. The same normalisation closes each layer's output."""

    def __init__(self, num_layers: int, d_model: int, nhead: int, dim_feedforward: int, dropout: float,
                 normalize_before: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerDecoderLayer(d_model, nhead, dim_feedforward, dropout, normalize_before)
                                    for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, query_position: Tensor, memory: Tensor, memory_key: Tensor, mask: Tensor | None) -> Tensor:
        content = torch.zeros_like(query_position)
        outputs = []
        for layer in self.layers:
            content = layer(content, query_position, memory, memory_key, mask)
            outputs.append(self.norm(content))
        return torch.stack(outputs)


class DETR(nn.Module):
    """Backbone, transformer, and on the queries of every decoder layer one class head and one box head."""

    def __init__(self, backbone: nn.Sequential, transformer: Transformer, num_classes: int, num_queries: int,
                 aux_loss: bool = False) -> None:
        super().__init__()
        d_model = transformer.d_model
        self.transformer = transformer
        self.class_embed = nn.Linear(d_model, num_classes + 1)
        self.bbox_embed = MLP(d_model, d_model, 4, 3)
        self.query_embed = nn.Embedding(num_queries, d_model)
        self.input_proj = nn.Conv2d(channels(backbone[0])[-1], d_model, kernel_size=1)
        self.backbone = backbone                                    # [-2]: feature maps, [-1]: their positions
        self.aux_loss = aux_loss

    def forward(self, samples: NestedTensor | Tensor | list[Tensor]) -> Outputs:
        """Images -> ``pred_logits [B, Q, C + 1]`` ("no object" last), ``pred_boxes [B, Q, 4]`` (cxcywh in 0..1), and
        the same of the earlier decoder layers in ``aux_outputs``."""
        return self.detect(samples)[0]

    def detect(self, samples: NestedTensor | Tensor | list[Tensor]) -> tuple[Outputs, Intermediates]:
        """``forward``, and what it went through."""
        features = list(self.backbone[-2](as_nested_tensor(samples)).values())
        src, mask = self.input_proj(features[-1].tensors), features[-1].key_padding_mask()
        hs, memory = self.transformer(src, mask, self.query_embed.weight, self.backbone[-1](features[-1]).to(src.dtype))
        logits, boxes = self.class_embed(hs), self.bbox_embed(hs).float().sigmoid()         # [K, B, Q, C + 1 or 4]
        outputs: Outputs = {"pred_logits": logits[-1], "pred_boxes": boxes[-1]}
        if self.aux_loss:
            outputs["aux_outputs"] = [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits[:-1], boxes[:-1])]
        return outputs, Intermediates(features, src, hs[-1], memory)
