"""PyTorch Hub: ``torch.hub.load(repository, "detr_resnet50", pretrained=True)``, under the published names."""
from collections.abc import Callable
from typing import Any

dependencies = ["torch", "torchvision", "scipy"]


def _entry(name: str) -> Callable[..., Any]:
    def model(pretrained: bool = False, num_classes: int | None = None, *, return_postprocessor: bool = False) -> Any:
        from detr import build_model
        if return_postprocessor and "panoptic" in name:
            raise NotImplementedError(f"{name}: post-processing of masks is not there yet; "
                                      f"leave out return_postprocessor")
        built, _, postprocessors = build_model(name, num_classes=num_classes, pretrained=pretrained, aux_loss=False)
        return (built, postprocessors["bbox"]) if return_postprocessor else built

    model.__name__ = name
    model.__doc__ = f"""``{name}`` without its criterion and auxiliary outputs. ``pretrained`` fetches the published
    weights (they fix ``num_classes``); ``return_postprocessor`` adds what turns its outputs into boxes in pixels."""
    return model


detr_resnet50 = _entry("detr_resnet50")
detr_resnet50_dc5 = _entry("detr_resnet50_dc5")
detr_resnet101 = _entry("detr_resnet101")
detr_resnet101_dc5 = _entry("detr_resnet101_dc5")
detr_resnet50_panoptic = _entry("detr_resnet50_panoptic")
detr_resnet50_dc5_panoptic = _entry("detr_resnet50_dc5_panoptic")
detr_resnet101_panoptic = _entry("detr_resnet101_panoptic")
