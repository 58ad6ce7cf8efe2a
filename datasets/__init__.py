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
from datasets.panoptic_eval import PanopticEvaluator
from detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from detr.structures import Category, Target


def build_coco(split: str, coco_path: str | Path, transforms: Transforms | None = None, return_masks: bool = False,
               categories: Sequence[Category] | None = None, cache_mode: bool = False,
               channels: int = 3) -> CocoDetection:
    """COCO 2017 or data in its layout; arguments as for ``build_dataset``."""
    root = Path(coco_path)
    if not root.is_dir():
        raise FileNotFoundError(f"--coco_path {root}: there is no such folder. {LAYOUT}")
    return CocoDetection(root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json", transforms,
                         return_masks, categories, cache_mode, channels)


DATASETS: dict[str, Callable[..., CocoDetection]] = {"coco": build_coco, "coco_panoptic": build_coco_panoptic}


def build_dataset(split: str, coco_path: str | Path, dataset_file: str = "coco", *,
                  coco_panoptic_path: str | Path | None = None, transforms: Transforms | None = None,
                  return_masks: bool = False, categories: Sequence[Category] | None = None, cache_mode: bool = False,
                  channels: int = 3) -> CocoDetection:
    """The ``split`` ("train" or "val") of the data below ``coco_path``.

    ``dataset_file`` names one of ``DATASETS``, which says how to read it; ``coco_panoptic`` has its segments below
    ``coco_panoptic_path``. ``categories`` is the class table to use (that of the training data for the validation data,
    that of a checkpoint), by default the data's own. ``cache_mode`` reads all image files at once and keeps them in
    memory. ``channels`` is what images have, see ``read_image``.
    """
    if dataset_file not in DATASETS:
        raise ValueError(f"--dataset_file {dataset_file}: there is no such kind of data; there are "
                         f"{', '.join(sorted(DATASETS))}")
    if split not in ("train", "val"):
        raise ValueError(f"split {split!r}: there are 'train' and 'val'")
    places = {"coco_panoptic_path": coco_panoptic_path} if dataset_file == "coco_panoptic" else {}
    return DATASETS[dataset_file](split, coco_path, **places, transforms=transforms, return_masks=return_masks,
                                  categories=categories, cache_mode=cache_mode, channels=channels)


def build_evaluators(dataset: CocoDetection, masks: bool = False,
                     folder: str | Path | None = None) -> list[CocoEvaluator | PanopticEvaluator]:
    """What scores predictions for ``dataset``: each has ``update(predictions)``, of its ``kind``, and ``summarize()``.
    The first scores boxes, with ``masks`` these, too; for panoptic data those of things, and a second one scores the
    maps, which it writes to ``folder`` where there is one."""
    boxes = CocoEvaluator(dataset.coco, dataset.categories, dataset.num_classes, masks)
    if masks and isinstance(dataset, CocoPanoptic):
        return [boxes, PanopticEvaluator(dataset.annotations, folder)]
    return [boxes]


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[NestedTensor, list[Target]]:
    """Items of a data set -> images padded to one size with the mask of the padding, and the targets as they are."""
    images: list[Any]
    images, targets = map(list, zip(*batch))
    return nested_tensor_from_tensor_list(images), targets
