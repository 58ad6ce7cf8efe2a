"""Other implementations of the same work: those of the installed package ``transformers`` with a model's own weights, and
torchvision's detectors, which are other architectures, for orientation. Nothing is downloaded."""
from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from detr.architectures.deformable_detr import DeformableDETRConfig
from detr.architectures.detr import DETRConfig
from detr.backbone import resnet
from detr.boxes import box_cxcywh_to_xyxy
from detr.config import ModelConfig
from detr.nested_tensor import NestedTensor
from detr.structures import Outputs, Target

TORCHVISION = ("fasterrcnn", "retinanet")                    # both with ResNet-50 and a feature pyramid

# Ours -> theirs, in the order of application.
ENCODER = [(r"(encoder.*)\.norm1\.", r"\1.self_attn_layer_norm."), (r"\.linear([12])\.", r".mlp.fc\1."),
           (r"out_proj", "o_proj"), (r"^backbone\.0\.body\.", "model.backbone.model."),
           (r"^backbone\.1\.row_embed", "model.position_embedding.row_embeddings"),
           (r"^backbone\.1\.col_embed", "model.position_embedding.column_embeddings")]
DETR_NAMES = [(r"^transformer\.", "model."), (r"^input_proj\.", "model.input_projection."),
              (r"^query_embed\.", "model.query_position_embeddings."), (r"^class_embed\.", "class_labels_classifier."),
              (r"^bbox_embed\.", "bbox_predictor."), (r"(decoder.*)\.norm1\.", r"\1.self_attn_layer_norm."),
              (r"(decoder.*)\.norm2\.", r"\1.encoder_attn_layer_norm."), (r"(decoder)\.norm\.", r"\1.layernorm."),
              *ENCODER, (r"\.norm[23]\.", ".final_layer_norm."), (r"multihead_attn", "encoder_attn")]
DEFORMABLE_NAMES = [(r"^transformer\.|^(?=input_proj)", "model."),
                    (r"^query_embed\.", "model.query_position_embeddings."),
                    (r"(decoder.*)\.norm1\.", r"\1.encoder_attn_layer_norm."),
                    (r"(decoder.*)\.norm2\.", r"\1.self_attn_layer_norm."),
                    *ENCODER, (r"\.norm[23]\.", ".final_layer_norm."), (r"cross_attn", "encoder_attn")]


class Peer(NamedTuple):
    """Somebody else's detector, made to be called as ours is: one call for predictions, one for a training loss."""
    name: str
    model: nn.Module
    predict: Callable[[NestedTensor], Any]
    loss: Callable[[NestedTensor, Sequence[Target]], Tensor]
    note: str = ""                              # what is not the same


def package_of(name: str) -> str:
    """The package that a peer comes from."""
    return "transformers" if name == "transformers" else "torchvision"


def missing(package: str) -> str | None:
    """Why a package cannot be compared with, if so."""
    needed = {"transformers": ("transformers", "timm", "scipy"), "torchvision": ("torchvision",)}[package]
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{absent[0]} is not installed (pip install {absent[0]})" if absent else None


def their_names(values: Mapping[str, Any], names: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Our parameters, or what belongs to them, by the names of ``transformers``, which has three projections apart: of
    tensors a third each, of anything else the same."""
    renamed = {}
    for name, value in values.items():
        for ours, theirs in names:
            name = re.sub(ours, theirs, name)
        if "in_proj_" in name:
            thirds = value.chunk(3) if isinstance(value, Tensor) else [value] * 3
            renamed |= {name.replace("in_proj_", f"{part}_proj."): third for part, third in zip("qkv", thirds)}
        else:
            renamed[name] = value
    return renamed


def transformers_peer(ours: nn.Module, config: ModelConfig, num_classes: int, dropout: float | None = None) -> Peer:
    """The model of ``transformers`` with the settings and the weights of ``ours``, which ``config`` describes; what is
    frozen there is frozen here. ``dropout`` is that of all places (of ``ours``, too, says who built it); without it, the
    peer's own: the configuration's after each block, none of attention weights and inside feed-forward blocks.

    ValueError for a model that the package does not have, saying why.
    """
    import transformers  # here alone: it takes seconds

    kind = type(config)
    if kind not in (DETRConfig, DeformableDETRConfig):
        raise ValueError(f"no peer of {kind.__name__.removesuffix('Config')} is known here, only those of DETR and "
                         f"Deformable DETR")
    if config.backbone not in ("resnet18", "resnet34", "resnet50", "resnet101") or config.backbone_norm != "frozen":
        raise ValueError(f"transformers' {kind.__name__.removesuffix('Config')} with the backbone {config.backbone}, "
                         f"--backbone_norm {config.backbone_norm}, has other weights")
    extras = [flag for flag in ("masks", "pre_norm") if getattr(config, flag, False)]
    extras += ["query_content"] * (getattr(config, "query_content", "position") != "position")
    extras += ["feature_strides"] * (config.feature_strides is not None) + ["in_channels"] * (config.in_channels != 3)
    if extras:
        raise ValueError(f"transformers has no --{extras[0]} {getattr(config, extras[0])}")
    everywhere = {} if dropout is None else {"attention_dropout": dropout, "activation_dropout": dropout}
    shared = {"backbone": config.backbone, "dilation": config.dilation, "num_labels": num_classes,
              "position_embedding_type": config.position_embedding, "d_model": config.hidden_dim,
              "dropout": config.dropout if dropout is None else dropout, **everywhere, "num_queries": config.num_queries,
              "encoder_attention_heads": config.nheads, "decoder_attention_heads": config.nheads,
              "encoder_layers": config.enc_layers, "decoder_layers": config.dec_layers,
              "encoder_ffn_dim": config.dim_feedforward, "decoder_ffn_dim": config.dim_feedforward,
              "class_cost": int(config.set_cost_class), "bbox_cost": int(config.set_cost_bbox),
              "giou_cost": int(config.set_cost_giou), "bbox_loss_coefficient": int(config.bbox_loss_coef),
              "giou_loss_coefficient": int(config.giou_loss_coef)}
    if isinstance(config, DETRConfig):
        names = DETR_NAMES
        model = transformers.DetrForObjectDetection(transformers.DetrConfig(eos_coefficient=config.eos_coef, **shared))
    elif isinstance(config, DeformableDETRConfig):
        names = DEFORMABLE_NAMES
        model = transformers.DeformableDetrForObjectDetection(transformers.DeformableDetrConfig(
            num_feature_levels=config.num_feature_levels, two_stage=config.two_stage,
            two_stage_num_proposals=config.num_queries, with_box_refine=config.with_box_refine,
            encoder_n_points=config.enc_n_points, decoder_n_points=config.dec_n_points, focal_alpha=config.focal_alpha,
            **shared))
        if config.with_box_refine and not config.two_stage:     # they tie the class heads, which as published are apart
            model.class_embed = nn.ModuleList(nn.Linear(config.hidden_dim, num_classes) for _ in model.class_embed)
    model.load_state_dict(their_names(ours.state_dict(), names), strict=True)
    trained = their_names({name: p.requires_grad for name, p in ours.named_parameters(remove_duplicate=False)}, names)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained[name])

    def predict(samples: NestedTensor) -> Outputs:
        model.config.auxiliary_loss = False
        found = model(samples.tensors, pixel_mask=(~samples.mask).long())
        return {"pred_logits": found.logits, "pred_boxes": found.pred_boxes}

    def loss(samples: NestedTensor, targets: Sequence[Target]) -> Tensor:
        model.config.auxiliary_loss = config.aux_loss
        labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
        return model(samples.tensors, pixel_mask=(~samples.mask).long(), labels=labels).loss

    note = "" if config.dropout == 0 or dropout is not None else \
        "in training it drops no attention weights and nothing inside feed-forward blocks, as its defaults say"
    return Peer("transformers", model, predict, loss, note)


def differences(ours: Outputs, theirs: Outputs) -> dict[str, float]:
    """How far two predictions of the same images lie apart at most: logits relative to the largest of ours, boxes as
    fractions of the image. NaN where either has one.

    The queries of two-stage models (ours have ``enc_outputs``) come in the order of their proposals' scores, which
    rounding may exchange where they are nearly equal; so each is compared with the one that it is nearest to, one to one.
    """
    logits, boxes = ours["pred_logits"].float(), ours["pred_boxes"].float()
    scale = logits.abs().max().clamp(min=1)
    mine, other = torch.cat([logits / scale, boxes], -1), torch.cat([theirs["pred_logits"].float() / scale,
                                                                     theirs["pred_boxes"].float()], -1)
    if "enc_outputs" in ours and bool(mine.isfinite().all() & other.isfinite().all()):
        pairs = [linear_sum_assignment(torch.cdist(a, b, p=math.inf).cpu().numpy())[1] for a, b in zip(mine, other)]
        other = torch.stack([x[torch.as_tensor(pair, device=x.device)] for x, pair in zip(other, pairs)])
    apart = (mine - other).abs()
    return {"logits": float(apart[..., :-4].max()), "boxes": float(apart[..., -4:].max())}


def torchvision_peer(name: str, size: tuple[int, int], num_classes: int) -> Peer:
    """One of ``TORCHVISION`` with random weights, for images of ``size`` as they are; stem and first stage frozen, as in
    DETR. Pre- and post-processing are part of it."""
    from torchvision.models.detection import FasterRCNN, RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    sides = {"min_size": min(size), "max_size": max(size)}
    body: dict[str, Any] = {"backbone_name": "resnet50", "weights": None, "trainable_layers": 3,
                            "norm_layer": resnet.FrozenBatchNorm2d}
    if name == TORCHVISION[0]:
        model: nn.Module = FasterRCNN(resnet_fpn_backbone(**body), num_classes, **sides)
    elif name == TORCHVISION[1]:
        model = RetinaNet(resnet_fpn_backbone(**body, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)),
                          num_classes, **sides)
    else:
        raise ValueError(f"torchvision's {name} is not known here; there are {', '.join(TORCHVISION)}")

    def predict(samples: NestedTensor) -> Any:
        return model(list(samples.tensors))

    def loss(samples: NestedTensor, targets: Sequence[Target]) -> Tensor:
        scale = samples.tensors.new_tensor([size[1], size[0], size[1], size[0]])
        given = [{"boxes": box_cxcywh_to_xyxy(t["boxes"]) * scale, "labels": t["labels"].clamp(min=1)} for t in targets]
        return torch.stack(list(model(list(samples.tensors), given).values())).sum()

    return Peer(name, model, predict, loss, "another architecture")
