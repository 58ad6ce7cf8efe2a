"""A checkpoint -> a detector that is ready to use: nothing but the file is needed."""
from __future__ import annotations

import dataclasses
import difflib
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import checkpoint, config
from .attention_maps import Explanation, explain
from .backbone import backbone_of, statistics
from .coco_classes import COCO_PANOPTIC, published_classes
from .cuda_graphs import CudaGraphs, use_cuda_graphs, without_cuda_graphs
from .distributed import say
from .inference import for_prediction
from .panoptic import PanopticPrediction
from .precision import autocast
from .preprocessing import IMAGENET_MEAN, IMAGENET_STD, Picture, Preprocessing, as_picture, height_width, normalisation
from .settings import Settings, classes_that_fit, decide
from .structures import Category, Detections, Outputs, selected
from .tiles import OVERLAP, in_tiles, places
from .transfer import on_device

AnyImage = str | Path | Image.Image | np.ndarray | Tensor
"""What a detector takes for an image; see ``preprocessing.as_picture``."""


class NamedDetections(Detections):
    """Detections with what the data calls their classes; ``labels`` are the model's, counted from 0."""
    names: list[str]                # [n]
    ids: list[int]                  # [n] the data's own, as in its files and in what predict.py writes


class Answers(NamedTuple):
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
        self.amp = "off"                                        # what the model computes in, see ``fast``
        self.graphs: CudaGraphs | None = None

    def fast(self, amp: str = "off", graphs: bool = False) -> Detector:
        """A detector that predicts the same in less time, with a copy of the model; see ``inference.for_prediction``.
        With ``amp`` "off" it differs by rounding alone; with "bf16", for processors and GPUs that have it, and "fp16",
        for GPUs, scores and boxes differ in their third digit or so. Raises ValueError for another one. ``graphs``, on
        a GPU: batches of a shape that comes again are CUDA graphs, see ``cuda_graphs``; ``graphs`` of the result counts
        them."""
        other = Detector(for_prediction(self.model, amp), self.postprocessors, self.categories, self.num_classes,
                         self.preprocessing, self.name, self.config, self.card, self.source).eval()
        other.amp = amp
        without_cuda_graphs(other.model)                        # of this one, if it has them
        return other.with_graphs() if graphs else other

    def with_graphs(self) -> Detector:
        """This detector, from now on with CUDA graphs; see ``fast``."""
        self.graphs = use_cuda_graphs(self.model)
        return self

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
    def predict(self, images: AnyImage | Sequence[AnyImage], threshold: float = 0.0, batch_size: int = 1,
                classes: str | int | Sequence[str | int] | None = None, nms: float | None = None,
                one_label_per_query: bool = False, tile: int | None = None, overlap: float | None = None,
                whole: bool = False, names: Sequence[str] | None = None,
                without_class: Counter[int] | None = None) -> list[NamedDetections]:
        """What is on one image, or on each of several: paths, PIL images, uint8 arrays ``[H, W, C]`` or tensors
        ``[C, H, W]`` in RGB. Calling the detector does the same.

        Returns for each image a dict, on the CPU, of the detections with a score of at least ``threshold``: ``scores``
        [n], ``labels`` [n], ``names`` and the data's ``ids`` of these, ``queries`` [n], the query that each came from (of
        ``tile`` not), ``boxes`` [n, 4] as corners (left, top, right, bottom) in its pixels, not clipped;
        of mask models ``masks``, a COCO run-length code each, whose making takes most of the time where ``threshold`` is
        low. Detections of labels that the data does not use are left out, as in evaluation. ``batch_size`` images are
        padded to one size and go through the model together. With nothing else chosen, detections are evaluation's.

        ``classes``: names or labels of those to keep. ``nms``: of boxes of one class that overlap with more than this IoU
        the best is kept; DETR needs none by design. ``one_label_per_query``: of each query its best class alone; models
        that score each class by itself may name several.

        ``tile``: the image goes through the model in squares of so many pixels, ``batch_size`` at a time, which overlap
        by ``overlap`` of their side (0.2), and what several of them see of one object is one detection; see
        ``detr.tiles``. It is for images much larger than what the model was trained on, with objects small against a
        tile; a tile is resized as an image is. ``whole`` adds the whole image as one more tile, for objects that are not
        small. Of panoptic models ``nms`` and ``tile`` are refused: ground and sky are no objects to join or to count.

        ``names``: what messages call the images, instead of their paths or places. ``without_class`` counts, by label,
        the detections that are left out because the data does not use their label, those of each tile.

        Raises ValueError for arguments that cannot be, naming them, and where the outputs are not finite.
        """
        several = [images] if isinstance(images, (str, Path, Image.Image, np.ndarray, Tensor)) else list(images)
        self._check(threshold, batch_size, nms, tile, overlap, whole)
        share = OVERLAP if overlap is None else overlap
        used, kept = set(self.names), self._labels(classes)
        if names is None:
            names = [str(image) if isinstance(image, (str, Path)) else f"image {k}" for k, image in enumerate(several)]
        elif len(names) != len(several):
            raise ValueError(f"{len(names)} names for {len(several)} images; give one for each, or none")
        found: list[Detections] = []

        def choose(one: Detections) -> Detections:
            if without_class is not None:
                without_class.update(label for label in one["labels"].tolist() if label not in used)
            one = of_labels(one, used)
            one = best_of_queries(one) if one_label_per_query else one
            return finish(one) if tile is None else one

        def finish(one: Detections) -> Detections:
            one = of_labels(one, kept)
            return one if nms is None else suppressed(one, nms)

        def detect(names: Sequence[str], batch: Sequence[Picture]) -> list[Detections]:
            seen = self.look(batch)
            self.check_finite(seen, names if tile is None else [names[0]] * len(batch))        # tiles are of one image
            return self.detections(seen, threshold, choose)

        together = batch_size if tile is None else 1
        for start in range(0, len(several), together):
            batch = several[start:start + together]
            called = names[start:start + together]
            pictures = [as_picture(image, self.channels) for image in batch]
            if tile is None:
                found += detect(called, pictures)
            else:
                of_tiles = functools.partial(detect, called)
                found.append(finish(in_tiles(pictures[0], of_tiles, tile, share, batch_size, whole)))
        return [self._named(one) for one in found]

    forward = predict

    def explain(self, image: AnyImage, encoder: bool = True) -> Explanation:
        """Where the model looks in one image, of any kind that ``predict`` takes: its attention, layer by layer, and how
        its boxes move; see ``detr.attention_maps``. Pixels are those of the image, a file's turned upright. Without
        ``encoder`` its attention is left out, which takes most of the memory.

        ``queries`` of what ``predict`` finds are those that the explanation is asked about.
        """
        picture = as_picture(image, self.channels)
        with autocast(next(self.model.parameters()).device, self.amp):
            return explain(self.model, self.preprocessing(picture), height_width(picture), encoder=encoder)

    @torch.no_grad()
    def look(self, images: Sequence[Picture]) -> Answers:
        """Images as ``as_picture`` gives them, padded to one batch."""
        device = next(self.model.parameters()).device
        fed = [self.preprocessing(image).to(device) for image in images]
        with autocast(device, self.amp):
            outputs = self.model(fed)
        return Answers(outputs, on_device([height_width(image) for image in images], device),
                       on_device([image.shape[-2:] for image in fed], device))

    def detections(self, seen: Answers, threshold: float = 0.0,
                   choose: Callable[[Detections], Detections] | None = None) -> list[Detections]:
        """The detections of each image whose score is at least ``threshold``, of any label, on the CPU. ``choose`` may
        leave some out, before masks are made of the others."""
        found = [at_least(threshold, one) for one in self.postprocessors["bbox"](seen.outputs, seen.sizes)]
        if choose is not None:
            found = [choose(one) for one in found]
        if "segm" in self.postprocessors:
            found = self.postprocessors["segm"](found, seen.outputs, seen.sizes, seen.fed)
        on_cpu: list[Any] = [{name: value.cpu() if isinstance(value, Tensor) else value for name, value in one.items()}
                             for one in found]
        return on_cpu

    def maps(self, seen: Answers, threshold: float) -> list[PanopticPrediction]:
        """The panoptic map of each image, of the image's size, made of queries whose score is above ``threshold``."""
        self.postprocessors["panoptic"].threshold = threshold
        return self.postprocessors["panoptic"](seen.outputs, seen.fed, seen.sizes)

    def check_finite(self, seen: Answers, images: Sequence[str]) -> None:
        """Raises ValueError for the first image of a batch whose outputs are not numbers, which thresholds would pass
        over. Logits may be -inf: what has no chance."""
        outputs = seen.outputs
        for i, image in enumerate(images):
            sound = (outputs["pred_logits"][i] < float("inf")).all() and outputs["pred_boxes"][i].isfinite().all()
            if not sound or "pred_masks" in outputs and not outputs["pred_masks"][i].isfinite().all():
                raise ValueError(f"{image}: the model's scores or boxes{' or masks' * ('pred_masks' in outputs)} are not "
                                 f"finite; look for the same in the weights of {self.source}")

    def _named(self, found: Detections) -> NamedDetections:
        known = {category.label: category for category in self.categories}
        classes = [known[label] for label in found["labels"].tolist()]
        named: NamedDetections = {**found, "names": [one.name for one in classes], "ids": [one.id for one in classes]}
        return named

    def _labels(self, classes: str | int | Sequence[str | int] | None) -> set[int] | None:
        """The labels of ``classes``; None for all."""
        if classes is None:
            return None
        wanted = [classes] if isinstance(classes, (str, int)) else list(classes)
        if not wanted:
            raise ValueError("classes is empty, which would keep nothing; name some, or leave it out for all")
        labels: set[int] = set()
        for one in wanted:
            those = {label for label, name in self.names.items() if one in (name, label)}
            if not those and isinstance(one, str):
                near = difflib.get_close_matches(one, list(self.names.values()), n=3, cutoff=0.0)
                raise ValueError(f"class {one!r} is not among the model's {len(self.names)}; the nearest are "
                                 f"{', '.join(map(repr, near))}")
            if not those:
                raise ValueError(f"class {one!r} is no label that the data uses; these are "
                                 f"{', '.join(f'{label} ({name})' for label, name in self.names.items())}")
            labels |= those
        return labels

    def _check(self, threshold: float, batch_size: int, nms: float | None, tile: int | None, overlap: float | None,
               whole: bool) -> None:
        """Raises ValueError for what ``predict`` cannot do."""
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold {threshold}: scores are between 0 and 1")
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: at least 1 is needed")
        if nms is not None and not 0 <= nms <= 1:
            raise ValueError(f"nms {nms}: an IoU, 0 to 1, is needed, or None to keep all")
        if tile is None and (overlap is not None or whole):
            raise ValueError(f"{'whole' if whole else f'overlap {overlap}'} is about tiles, and there are none; give "
                             f"tile=PIXELS, too")
        if tile is not None:
            places(1, 1, tile, OVERLAP if overlap is None else overlap)                         # checks them
        if "panoptic" in self.postprocessors and (nms is not None or tile is not None):
            raise ValueError(f"{'nms' if tile is None else 'tile'} is for models of things that can be counted, and this "
                             f"one is panoptic: its ground and sky are not; leave it out")


def at_least(threshold: float, found: Detections) -> Detections:
    """Detections with such a score, which know their queries."""
    keep = found["scores"] >= threshold
    queries = found.get("queries", torch.arange(len(keep), device=keep.device))
    return {"scores": found["scores"][keep], "labels": found["labels"][keep], "boxes": found["boxes"][keep],
            "queries": queries[keep]}


def of_labels(found: Detections, labels: set[int] | None) -> Detections:
    """Detections of such labels; None keeps all."""
    if labels is None:
        return found
    return selected(found, [i for i, label in enumerate(found["labels"].tolist()) if label in labels])


def best_of_queries(found: Detections) -> Detections:
    """The best detection of each query, the first of equals, in the order they are in."""
    best: dict[int, int] = {}
    scores = found["scores"].tolist()
    for i, query in enumerate(found["queries"].tolist()):
        if query not in best or scores[i] > scores[best[query]]:
            best[query] = i
    return selected(found, sorted(best.values()))


def suppressed(found: Detections, iou: float) -> Detections:
    """Detections without those that overlap a better one of their class with more than ``iou``, in the order they are in
    (non-maximum suppression)."""
    from torchvision.ops import batched_nms  # here alone: slow to import
    boxes = found["boxes"].double()                         # classes are moved apart by the image's size, to be compared
    return selected(found, sorted(batched_nms(boxes, found["scores"].double(), found["labels"], iou).tolist()))


def to_supervision(found: NamedDetections) -> Any:
    """Detections as ``supervision.Detections``: ``xyxy``, ``confidence``, ``class_id``, the labels, and names as
    ``data["class_name"]``; of mask models ``mask``, bool ``[n, H, W]``, a byte a pixel of the image for each. Raises
    ImportError where that library is not installed."""
    try:
        import supervision
    except ImportError as error:
        raise ImportError("to_supervision needs the library supervision; install it with: pip install supervision"
                          ) from error
    masks: Any = None
    if codes := list(found.get("masks", ())):
        from pycocotools import mask as coco_mask
        masks = np.stack([coco_mask.decode(code) for code in codes]).astype(bool)                   # [n, H, W]
    return supervision.Detections(
        xyxy=found["boxes"].numpy().reshape(-1, 4).astype(np.float32), confidence=found["scores"].numpy(),
        class_id=found["labels"].numpy(), mask=masks, data={"class_name": np.array(found["names"], dtype=str)})


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
