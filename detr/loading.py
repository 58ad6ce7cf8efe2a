"""A checkpoint -> a detector that is ready to use: nothing but the file is needed."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import checkpoint, config
from .backbone import backbone_of, statistics
from .coco_classes import COCO_PANOPTIC, published_classes
from .distributed import say
from .panoptic import PanopticPrediction
from .preprocessing import IMAGENET_MEAN, IMAGENET_STD, Picture, Preprocessing, as_picture, height_width, normalisation
from .settings import Settings, classes_that_fit, decide
from .structures import Category, Detections, Outputs

AnyImage = str | Path | Image.Image | np.ndarray | Tensor
"""What a detector takes for an image; see ``preprocessing.as_picture``."""


class NamedDetections(Detections):
    """Detections with the names of their classes."""
    names: list[str]                # [n]


class Seen(NamedTuple):
    """What a model says of a batch."""
    outputs: Outputs
    sizes: Tensor                   # [B, 2] (height, width) of the images
    fed: Tensor                     # [B, 2] the same as the model got them, without padding


class Detector(nn.Module):
    """A trained model with all that belongs to it.

    ``model``, and ``postprocessors``: ``bbox``, of mask models ``segm`` and of those for panoptic data ``panoptic``;
    ``categories``, the class table; ``preprocessing``; ``name``, the preset; ``config``, the settings as a checkpoint
    remembers them; ``card``, what the checkpoint tells of itself: scores, epoch, revision, data; ``source``, the file.
    """

    def __init__(self, model: nn.Module, postprocessors: dict[str, Any], categories: Sequence[Category], num_classes: int,
                 preprocessing: Preprocessing, name: str, config: dict[str, Any], card: dict[str, Any],
                 source: str) -> None:
        super().__init__()
        self.model, self.postprocessors, self.preprocessing = model, postprocessors, preprocessing
        self.categories, self.num_classes = list(categories), num_classes
        self.name, self.config, self.card, self.source = name, config, card, source

    @property
    def names(self) -> dict[int, str]:
        """The name of each label that the data uses."""
        return {category.label: category.name for category in self.categories}

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(self.preprocessing.mean)

    @property
    def exact(self) -> bool:
        """Whether an image gets the same in any batch; otherwise the padding of a batch changes boxes a little."""
        return backbone_of(self.model).exact

    @torch.no_grad()
    def forward(self, images: AnyImage | Sequence[AnyImage], threshold: float = 0.0,
                batch_size: int = 1) -> list[NamedDetections]:
        """What is on one image, or on each of several: paths, PIL images, uint8 arrays ``[H, W, C]`` or tensors
        ``[C, H, W]`` in RGB.

        Returns for each image a dict, on the CPU, of the detections with a score of at least ``threshold``: ``scores``
        [n], ``labels`` [n], ``names``, ``boxes`` [n, 4] as corners (left, top, right, bottom) in its pixels, not clipped;
        of mask models ``masks``, a COCO run-length code each, whose making takes most of the time where ``threshold`` is
        low. Detections of labels that the data does not use are left out, as in evaluation. ``batch_size`` images are
        padded to one size and go through the model together. Raises ValueError where the outputs are not finite.
        """
        several = [images] if isinstance(images, (str, Path, Image.Image, np.ndarray, Tensor)) else list(images)
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: at least 1 is needed")
        found: list[NamedDetections] = []
        for start in range(0, len(several), batch_size):
            batch = several[start:start + batch_size]
            seen = self.look([as_picture(image, self.channels) for image in batch])
            self.check_finite(seen, [str(image) if isinstance(image, (str, Path)) else f"image {place}"
                                     for place, image in enumerate(batch, start)])
            found += [self._named(one) for one in self.detections(seen, threshold)]
        return found

    @torch.no_grad()
    def look(self, images: Sequence[Picture]) -> Seen:
        """Images as ``as_picture`` gives them, padded to one batch."""
        device = next(self.model.parameters()).device
        fed = [self.preprocessing(image).to(device) for image in images]
        return Seen(self.model(fed), torch.tensor([height_width(image) for image in images], device=device),
                    torch.tensor([image.shape[-2:] for image in fed], device=device))

    def detections(self, seen: Seen, threshold: float = 0.0) -> list[Detections]:
        """The detections of each image whose score is at least ``threshold``, of any label, on the CPU."""
        found = [at_least(threshold, one) for one in self.postprocessors["bbox"](seen.outputs, seen.sizes)]
        if "segm" in self.postprocessors:
            found = self.postprocessors["segm"](found, seen.outputs, seen.sizes, seen.fed)
        on_cpu: list[Any] = [{name: value.cpu() if isinstance(value, Tensor) else value for name, value in one.items()
                              if name != "queries"} for one in found]
        return on_cpu

    def maps(self, seen: Seen, threshold: float) -> list[PanopticPrediction]:
        """The panoptic map of each image, of the image's size, made of queries whose score is above ``threshold``."""
        self.postprocessors["panoptic"].threshold = threshold
        return self.postprocessors["panoptic"](seen.outputs, seen.fed, seen.sizes)

    def check_finite(self, seen: Seen, images: Sequence[str]) -> None:
        """Raises ValueError for the first image of a batch whose outputs are not numbers, which thresholds would pass
        over. Logits may be -inf: what has no chance."""
        outputs = seen.outputs
        for i, image in enumerate(images):
            sound = (outputs["pred_logits"][i] < float("inf")).all() and outputs["pred_boxes"][i].isfinite().all()
            if not sound or "pred_masks" in outputs and not outputs["pred_masks"][i].isfinite().all():
                raise ValueError(f"{image}: the model's scores or boxes{' or masks' * ('pred_masks' in outputs)} are not "
                                 f"finite; look for the same in the weights of {self.source}")

    def _named(self, found: Detections) -> NamedDetections:
        names = self.names
        used = torch.tensor([label in names for label in found["labels"].tolist()], dtype=torch.bool)
        kept: NamedDetections = {"scores": found["scores"][used], "labels": found["labels"][used],
                                 "boxes": found["boxes"][used],
                                 "names": [names[label] for label in found["labels"][used].tolist()]}
        if "masks" in found:
            kept["masks"] = [found["masks"][i] for i in used.nonzero()[:, 0].tolist()]         # type: ignore[misc]
        return kept


def at_least(threshold: float, found: Detections) -> Detections:
    """Detections with such a score, which know their queries."""
    keep = found["scores"] >= threshold
    queries = found.get("queries", torch.arange(len(keep), device=keep.device))
    return {"scores": found["scores"][keep], "labels": found["labels"][keep], "boxes": found["boxes"][keep],
            "queries": queries[keep]}


def load(path_or_url: str | Path, device: str | torch.device = "cpu", model: str | None = None) -> Detector:
    """The model in a checkpoint, ready to use on ``device``: with the weights that were scored, in evaluation mode,
    without auxiliary outputs.

    A checkpoint of this project has everything inside. One that holds weights alone, as published, is built as the
    preset ``model``, by default ``detr_resnet50`` where its shapes fit; its classes are COCO's where it has 91 labels,
    COCO's panoptic ones where it has 250, and otherwise have no names, and images are prepared as for that preset. What
    was taken is said. Raises ValueError where file and model do not fit, and what ``checkpoint.load`` raises.
    """
    source = str(path_or_url)
    settings = decide({"resume": source, "eval": True}, model, given=True)
    content = settings.resumed
    assert content is not None
    remembered = content.get("config", {})
    if not isinstance(remembered, dict) or "name" not in remembered:                    # of another program, or none
        remembered = {}
    model_config = config.replace(settings.model, {"aux_loss": False})
    num_classes = content.get("num_classes") or classes_that_fit(model_config, content["model"])
    if num_classes is None:
        raise ValueError(f"{source} says nothing of its number of classes, and with none would it fit {settings.name}; "
                         f"give the model that it was trained as, or use a checkpoint that main.py wrote")
    built, _, postprocessors = model_config.build(num_classes)
    checkpoint.load_model(built, content["model"], source)
    known = published_classes(num_classes)
    categories = settings.categories or known or [Category(label, label, f"label {label}")
                                                  for label in range(num_classes)]
    preprocessing = Preprocessing.from_dict(content["preprocessing"]) if remembered and "preprocessing" in content else \
        preprocessing_of(settings)
    if not remembered:
        classes = (f"{num_classes} without names" if not known else
                   "COCO's panoptic ones" if known == COCO_PANOPTIC else "COCO's")
        say(f"{source} holds weights alone: taken as {settings.name}, classes {classes}, short side {preprocessing.size}")
    if "segm" in postprocessors:
        postprocessors["segm"].rle = True
        if remembered.get("data", {}).get("dataset_file") == "coco_panoptic" or \
                not remembered and known == COCO_PANOPTIC:
            things = {category.label for category in categories if category.isthing}
            postprocessors["panoptic"] = model_config.panoptic(                                     # type: ignore[attr-defined]
                {label: label in things for label in range(num_classes)}, crop=backbone_of(built).exact)
    card = content.get("card") or {} if remembered else {}
    remembered = remembered or {"name": settings.name, "model": dataclasses.asdict(model_config)}
    detector = Detector(built, postprocessors, categories, num_classes, preprocessing, settings.name, remembered,
                        card, source).eval()
    try:
        return detector.to(device)
    except (RuntimeError, AssertionError) as error:                                     # PyTorch without that device
        raise ValueError(f"device {device}: {error}; use device='cpu'") from error


def preprocessing_of(settings: Settings) -> Preprocessing:
    """How images become the model's input in evaluation."""
    mean_std = statistics(settings.model.backbone) or (IMAGENET_MEAN, IMAGENET_STD)
    return Preprocessing(config.parse_size(settings.data.image_size), settings.data.max_size,
                         *normalisation(*mean_std, settings.model.in_channels))
