"""PyTorch Hub: ``torch.hub.load(repository, "detr_resnet50", pretrained=True)``, under the published names."""
from collections.abc import Callable
from typing import Any

dependencies = ["torch", "torchvision", "scipy"]


def _entry(name: str) -> Callable[..., Any]:
    def model(pretrained: bool = False, num_classes: int | None = None, *, return_postprocessor: bool = False) -> Any:
        from detr import build_model
        from detr.panoptic import PostProcessPanoptic
        built, _, postprocessors = build_model(name, num_classes=num_classes, pretrained=pretrained, aux_loss=False)
        if not return_postprocessor:
            return built
        things = {label: label <= 90 for label in range(num_classes or 250)}                    # COCO's, as published
        return built, PostProcessPanoptic(things) if "panoptic" in name else postprocessors["bbox"]

    model.__name__ = name
    model.__doc__ = f"""``{name}`` without its criterion and auxiliary outputs. ``pretrained`` fetches the published
    weights (they fix ``num_classes``); ``return_postprocessor`` adds what turns its outputs into boxes in pixels, or into
    panoptic maps."""
    return model


detr_resnet50 = _entry("detr_resnet50")
detr_resnet50_dc5 = _entry("detr_resnet50_dc5")
detr_resnet101 = _entry("detr_resnet101")
detr_resnet101_dc5 = _entry("detr_resnet101_dc5")
detr_resnet50_panoptic = _entry("detr_resnet50_panoptic")
detr_resnet50_dc5_panoptic = _entry("detr_resnet50_dc5_panoptic")
detr_resnet101_panoptic = _entry("detr_resnet101_panoptic")
