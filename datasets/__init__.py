"""Data sets by name, and what turns their items into batches and their predictions into scores."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets.annotations import LAYOUT
from datasets.coco import CocoDetection, Transforms
from datasets.coco_eval import CocoEvaluator
from datasets.coco_panoptic import CocoPanoptic, build_coco_panoptic
from datasets.formats import recognise
from datasets.from_python import from_dataset
from datasets.panoptic_eval import PanopticEvaluator
from datasets.split import SPLITS
from datasets.transforms import Unscaled, into_batch
from detr.coco_classes import published_classes
from detr.nested_tensor import NestedTensor
from detr.structures import Category, Target

__all__ = ["DATASETS", "build_coco", "build_dataset", "build_evaluators", "collate", "from_dataset",
           "published_classes"]


def build_coco(split: str, coco_path: str | Path, transforms: Transforms | None = None, return_masks: bool = False,
               categories: Sequence[Category] | None = None, cache_mode: bool = False, channels: int = 3,
               ignore_regions: bool = False, remove_difficult: bool = False) -> CocoDetection:
    """COCO 2017 or data in its layout; arguments as for ``build_dataset``."""
    root = Path(coco_path)
    if not root.is_dir():
        raise FileNotFoundError(f"--coco_path {root}: there is no such folder. {LAYOUT}")
    return CocoDetection(root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json", transforms,
                         return_masks, categories, cache_mode, channels, ignore_regions=ignore_regions,
                         remove_difficult=remove_difficult)


DATASETS: dict[str, Callable[..., CocoDetection]] = {"coco": build_coco, "coco_panoptic": build_coco_panoptic}


def build_dataset(split: str, coco_path: str | Path | None = None, dataset_file: str = "coco", *,
                  data: str | Path | None = None, coco_panoptic_path: str | Path | None = None,
                  transforms: Transforms | None = None, return_masks: bool = False,
                  categories: Sequence[Category] | None = None, cache_mode: bool = False, channels: int = 3,
                  ignore_regions: bool = False, remove_difficult: bool = False) -> CocoDetection:
    """The ``split`` ("train" or "val") of a data set: of any format at ``data``, see ``datasets.formats.recognise``; or
    of one in COCO's layout below ``coco_path``.

    ``dataset_file`` names one of ``DATASETS``, which says how to read ``coco_path``; ``coco_panoptic`` has its segments
    below ``coco_panoptic_path``. ``categories`` is the class table to use (that of the training data for the validation
    data, that of a checkpoint), by default the data's own. ``cache_mode`` reads all image files at once and keeps them in
    memory. ``channels`` is what images have, see ``read_image``; ``ignore_regions`` and ``remove_difficult`` are as for
    ``CocoDetection``. A data set from Python is made by ``from_dataset``.
    """
    if split not in (SPLITS if data is not None else SPLITS[:2]):
        raise ValueError(f"split {split!r}: there are 'train' and 'val'" + ", and 'test'" * (data is not None))
    options: dict[str, Any] = {"transforms": transforms, "return_masks": return_masks, "categories": categories,
                               "cache_mode": cache_mode, "channels": channels}
    regions = {"ignore_regions": ignore_regions, "remove_difficult": remove_difficult}
    if data is not None:
        if coco_path is not None or dataset_file != "coco" or coco_panoptic_path is not None:
            raise ValueError(f"--data {data} says all of where and what the data is; leave --coco_path, --dataset_file "
                             f"and --coco_panoptic_path out, or --data")
        return _build_any(split, data, **options, **regions)
    if coco_path is None:
        raise ValueError("no data: give --data PATH, a data set of any format, or --coco_path PATH, one in COCO's layout")
    if dataset_file not in DATASETS:
        raise ValueError(f"--dataset_file {dataset_file}: there is no such kind of data; there are "
                         f"{', '.join(sorted(DATASETS))}")
    if dataset_file == "coco_panoptic":
        for flag, given in regions.items():
            if given:
                raise ValueError(f"--{flag} is about boxes; in panoptic data every segment is an object, crowds too; "
                                 f"leave it out, or use --dataset_file coco")
        return build_coco_panoptic(split, coco_path, coco_panoptic_path, **options)
    return DATASETS[dataset_file](split, coco_path, **options, **regions)


def _build_any(split: str, data: str | Path, **options: Any) -> CocoDetection:
    """One part of the data set that is found at ``data``."""
    found = recognise(data)
    if split not in found.splits:
        there = ", ".join(f"'{name}' ({part.source})" for name, part in found.splits.items())
        what = {"train": "training", "val": "validation", "test": "test"}[split]
        raise ValueError(f"--data {data} ({found.name}) has no part '{split}' for {what}, but {there}; add it: "
                         f"{MISSING_PART[found.name].format(split=split, valid='valid' if split == 'val' else split)}")
    if options["remove_difficult"] and found.name in ("YOLO", "CSV"):
        raise ValueError(f"--remove_difficult: {found.name}, which --data {data} is, cannot mark an object as difficult; "
                         f"leave it out")
    part = found.splits[split]
    return CocoDetection(part.images, part.source, read=part.read, **options)


MISSING_PART = {
    "COCO": "annotations/instances_{split}2017.json with the images in {split}2017/",
    "COCO in train/ valid/ test/": "{valid}/_annotations.coco.json, beside its images",
    "YOLO": "'{split}: <folder of images>' in the yaml",
    "Pascal VOC": "ImageSets/Main/{split}.txt, the names of its XML files, one a line",
    "CSV": "{split}.csv, with the same columns",
}
"""What to add where a part is wanted that a data set of this format has not."""


def build_evaluators(dataset: CocoDetection, masks: bool = False, folder: str | Path | None = None,
                     judge: str = "fast") -> list[CocoEvaluator | PanopticEvaluator]:
    """What scores predictions for ``dataset``: each has ``update(predictions)``, of its ``kind``, and ``summarize()``.
    The first scores boxes, with ``masks`` these, too; for panoptic data those of things, and a second one scores the
    maps, which it writes to ``folder`` where there is one. ``judge``, --coco_eval, is as for ``CocoEvaluator``."""
    boxes = CocoEvaluator(dataset.coco, dataset.categories, dataset.num_classes, masks, judge)
    if masks and isinstance(dataset, CocoPanoptic):
        return [boxes, PanopticEvaluator(dataset.annotations, folder)]
    return [boxes]


def collate(batch: Sequence[tuple[Tensor | Unscaled, Target]]) -> tuple[NestedTensor, list[Target]]:
    """Items of a data set -> images padded to one size with the mask of the padding, and the targets as they are. Images
    that are ``Unscaled`` are normalised here."""
    images: list[Any]
    images, targets = map(list, zip(*batch))
    return into_batch(images), targets
