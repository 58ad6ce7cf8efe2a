"""End-to-end object detection with transformers.

    from detr import build_model, list_models, load
    model, criterion, postprocessors = build_model("detr_resnet50", num_classes=91)
    detector = load("checkpoint.pth")

Shape letters, everywhere: ``B`` images, ``Q`` queries, ``S`` tokens of a feature map, ``L`` levels, ``D`` channels,
``C`` classes, ``N`` objects of an image, ``M`` attention heads, ``P`` points, ``K`` layers.
"""
from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

    import torch
    from torch import nn

    from .loading import Detector
    from .set_criterion import SetCriterion

__all__ = ["build_model", "list_models", "load"]


def list_models() -> list[str]:
    """The names that ``build_model`` and ``--model`` know."""
    from .presets import PRESETS
    return list(PRESETS)


def build_model(
    model: str | Namespace = "detr_resnet50", *, num_classes: int | None = None, pretrained: bool = False,
    pretrained_backbone: bool = False, **flags: Any,
) -> tuple[nn.Module, SetCriterion, dict[str, nn.Module]]:
    """Model, criterion and post-processing.

    ``model`` is one of ``list_models()`` and ``flags`` change its configuration, keyword = flag name; or it is what
    ``main.get_args_parser()`` parsed. Flags of training, data and run may stand among them, but have no part in what
    is built here, and one of DETR's original flags that is left at its default asks other models for nothing.
    ``num_classes`` counts labels from 0, "no object" left out; without it, it is the published number (91; panoptic
    250).

    Weights are random. Nothing is downloaded unless asked for: ``pretrained=True`` fetches the published weights,
    ``pretrained_backbone=True`` the backbone's ImageNet weights. Raises ValueError for names and flags that do not
    exist, naming the nearest that does, and the models that have a flag which this one has not.
    """
    from . import checkpoint, config
    from .backbone import backbone_of, body_of, fitting_norm
    from .backbone import pretrained as pretrained_weights
    from .presets import ARCHITECTURES, PRESETS
    from .settings import models_with

    if not isinstance(model, str):
        flags = config.typed_flags(model, [*ARCHITECTURES, config.DataConfig]) | flags
        model = getattr(model, "model", None) or "detr_resnet50"
    if model not in PRESETS:
        raise ValueError(f"model {model!r} is not known{config.nearest(model, PRESETS)} "
                         f"Known are {', '.join(PRESETS)}")
    preset = PRESETS[model]
    if num_classes is None:
        num_classes = 250 if flags.get("dataset_file") == "coco_panoptic" else preset.num_classes
    defaults = {field.name: field.default for field in dataclasses.fields(ARCHITECTURES[0])}    # the original flags
    wanted = {name: value for name, value in flags.items()
              if hasattr(preset.model, name) or name not in defaults or value != defaults[name]}
    options = [field.name for field in dataclasses.fields(preset.model)]
    for name in wanted:
        if name not in options and (others := models_with(name)):
            raise ValueError(f"{model} has no option {name!r}{others}{config.nearest(name, options)}")
    own, _ = config.divide(wanted, preset.model)
    if own.get("frozen_stages") and {**dataclasses.asdict(preset.model), **own}["from_scratch"]:
        raise ValueError(f"frozen_stages={own['frozen_stages']} and from_scratch=True, which trains the whole backbone, "
                         f"contradict each other; choose one")
    settings = fitting_norm(config.replace(preset.model, own), own)
    built, criterion, postprocessors = settings.build(num_classes)
    if inexact := backbone_of(built).inexact:
        warnings.warn(f"padding='exact' is not possible with {settings.backbone}: {inexact}; padding takes part in its "
                      f"maps, so evaluate images of equal sizes together", stacklevel=2)
    if pretrained:
        if preset.page is not None:
            raise ValueError(f"the published weights of {model} are served to browsers alone: save {preset.page} as a "
                             f"file, and load its ['model'], or name it with --resume FILE")
        if preset.url is None:
            raise ValueError(f"{model} has no published weights; train it, or leave out pretrained=True")
        checkpoint.load_model(built, checkpoint.load(preset.url)["model"], preset.url)
    elif pretrained_backbone:
        checkpoint.load_backbone(body_of(built), *pretrained_weights(settings.backbone))
    return built, criterion, postprocessors


def load(path_or_url: str | Path, device: str | torch.device = "cpu", model: str | None = None) -> Detector:
    """The model in a checkpoint with all that belongs to it, ready to use on ``device``.

    The file is one that main.py wrote (``.pth`` or ``.safetensors``), which says all by itself; or it has weights alone,
    as published, and is taken as the preset ``model``, by default ``detr_resnet50`` where its shapes fit. Reading it runs
    no code. Raises FileNotFoundError, or ValueError for a file that is damaged, holds code or does not fit.

        detector = detr.load("outputs/tiny_deformable_detr/best.pth")
        for found in detector(["a.jpg", "b.jpg"], threshold=0.5):
            print(found["names"], found["scores"], found["boxes"])      # boxes: left, top, right, bottom in pixels

    Images are paths, PIL images, uint8 arrays ``[H, W, C]`` or tensors ``[C, H, W]``, one or a list; without a
    ``threshold`` every query's detection comes back. ``detector.card`` has the scores, ``detector.names`` the classes;
    more in ``detr.loading.Detector``.
    """
    from .loading import load
    return load(path_or_url, device, model)
