"""COCO annotations -> image and target (Lin et al., 2014)."""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from torch.utils.data import Dataset

from datasets.annotations import LAYOUT, class_table, counted, few, index, masks, num_classes, read_annotations
from datasets.file_cache import FileCache
from datasets.images import Picture, height_width, read_image
from detr.distributed import is_main
from detr.structures import Category, Target

Transforms = Callable[[Any, Target], tuple[Any, Target]]


class CocoDetection(Dataset):
    """The images that ``annotation_file`` lists, with their objects: ``(image, target)``.

    Without ``transforms`` the image is what ``read_image`` gives for ``channels``, and the target's boxes are corners in
    its pixels; the lists of ``datasets.transforms`` turn them into what models take. Boxes are clipped to the image.
    Crowd annotations and boxes that have no width or height are no objects, and are counted in a printed line; images
    without objects stay. ``return_masks`` adds ``masks``. ``cache_mode`` keeps the image files in memory, see
    ``FileCache``.

    ``categories`` is the class table to use; the file's categories must be among it. Without it the table is the
    file's own, see ``class_table``. Raises FileNotFoundError where a folder, file or image is missing and ValueError
    where the annotations are not right.
    """

    def __init__(self, image_folder: str | Path, annotation_file: str | Path, transforms: Transforms | None = None,
                 return_masks: bool = False, categories: Sequence[Category] | None = None,
                 cache_mode: bool = False, channels: int = 3) -> None:
        self.image_folder = Path(image_folder)
        self.annotation_file = Path(annotation_file)
        self.transforms = transforms
        self.channels = channels
        if not self.image_folder.is_dir():
            raise FileNotFoundError(f"image folder {self.image_folder} is not there. {LAYOUT}")
        data, notes = read_annotations(self.annotation_file)
        images = sorted(data["images"], key=lambda image: image["id"])
        self.ids: list[int] = [image["id"] for image in images]
        self.files: list[str] = [image["file_name"] for image in images]
        self.sizes = torch.tensor([[image["height"], image["width"]] for image in images])          # [images, 2]
        self._check_files()
        self.categories = self._class_table(data["categories"], categories)
        self.num_classes = num_classes(self.categories)
        notes += self._pack_objects([row for row in data["annotations"] if not row["iscrowd"]], return_masks)
        if is_main():
            empty = int((self._starts.diff() == 0).sum())
            print(f"{self.annotation_file}: {len(self)} images ({empty} without objects, kept), {len(self._labels)} "
                  f"objects of {len(self.categories)} classes" + "".join(f"; {note}" for note in notes), flush=True)
        self._cache: FileCache | None = None
        if cache_mode:
            paths = [self.image_folder / name for name in self.files]
            self._cache = FileCache(paths, str(self.image_folder), unreadable=self.image)

    @cached_property
    def coco(self) -> COCO:
        """The ground truth for pycocotools, every annotation of the file included. Made on first use, from the file:
        training never needs it, and each worker would copy its many Python objects."""
        return index(read_annotations(self.annotation_file)[0])

    def __getstate__(self) -> dict[str, Any]:
        """What a worker that is started anew is sent: all but ``coco``."""
        return {name: value for name, value in self.__dict__.items() if name != "coco"}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Any, Target]:
        image, target = self.image(i), self.target(i)
        height, width = target["size"].tolist()
        there = height_width(image)
        if there != (height, width):
            raise ValueError(f"image {self.image_folder / self.files[i]} has {there[1]} x {there[0]} pixels "
                             f"once its EXIF orientation is applied, but {self.annotation_file} says {width} x "
                             f"{height} for image id {self.ids[i]}, so its boxes would be misplaced; correct width, "
                             f"height and boxes there, or copy the file that was annotated here")
        return self.transforms(image, target) if self.transforms else (image, target)

    def image(self, i: int) -> Picture:
        """Image ``i`` before ``transforms``, upright: PIL, RGB or grey, or uint8 ``[C, H, W]`` for another number of
        ``channels``. Raises OSError with its name and id."""
        content = None if self._cache is None else self._cache[i]
        try:
            return read_image(self.image_folder / self.files[i], content, self.channels)
        except OSError as error:
            raise type(error)(f"{error} (image id {self.ids[i]} of {self.annotation_file})") from error

    def target(self, i: int) -> Target:
        """The target of image ``i`` before ``transforms``; boxes are corners in pixels."""
        objects = slice(int(self._starts[i]), int(self._starts[i + 1]))
        target: Target = {                              # clones: a view would send the whole tensor to another process
            "image_id": torch.tensor([self.ids[i]]),
            "boxes": self._boxes_xyxy[objects].clone(),
            "labels": self._labels[objects].clone(),
            "area": self._area[objects].clone(),
            "iscrowd": torch.zeros(objects.stop - objects.start, dtype=torch.int64),
            "orig_size": self.sizes[i].clone(),
            "size": self.sizes[i].clone(),
        }
        if self._segmentations is not None:
            height, width = self.sizes[i].tolist()
            target["masks"] = masks(self._segmentations[objects], height, width)
        return target

    def _check_files(self) -> None:
        there = set(os.listdir(self.image_folder))                      # one call, where asking file by file takes long
        missing = [f"{name} (image id {i})" for name, i in zip(self.files, self.ids)
                   if name not in there and not (self.image_folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} of the {len(self)} images that {self.annotation_file} lists are "
                                    f"not in {self.image_folder}: {few(missing)}; copy them there (upper and lower "
                                    f"case differ), or take them out of the json")

    def _class_table(self, rows: list[dict], categories: Sequence[Category] | None) -> list[Category]:
        table = class_table({row["id"]: row["name"] for row in rows})
        if categories is None:
            return table
        known = {(category.id, category.name) for category in categories}
        foreign = [f"{row.id} {row.name!r}" for row in table if (row.id, row.name) not in known]
        if foreign:
            raise ValueError(f"{self.annotation_file}: categories {few(foreign)} are not in the class table to be "
                             f"used, which has {few([f'{row.id} {row.name!r}' for row in categories], 8)}; training "
                             f"data, validation data and checkpoint must have the same ids and names")
        return list(categories)

    def _pack_objects(self, rows: list[dict], return_masks: bool) -> list[str]:
        """Annotations -> tensors over all images, in order of images: compact, and not copied into each worker."""
        place = {id: i for i, id in enumerate(self.ids)}
        image = torch.tensor([place[row["image_id"]] for row in rows], dtype=torch.int64)
        image, order = image.sort(stable=True)
        rows = [rows[i] for i in order.tolist()]
        boxes_xyxy = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
        boxes_xyxy[:, 2:] += boxes_xyxy[:, :2]
        width_height = self.sizes.flip(1)[image]
        boxes_xyxy = torch.minimum(boxes_xyxy.clamp(min=0), width_height.repeat(1, 2))
        keep = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(1)
        dropped = [row["id"] for row, kept in zip(rows, keep.tolist()) if not kept]
        rows = [row for row, kept in zip(rows, keep.tolist()) if kept]
        label = {category.id: category.label for category in self.categories}
        self._boxes_xyxy = boxes_xyxy[keep]
        self._labels = torch.tensor([label[row["category_id"]] for row in rows], dtype=torch.int64)
        self._area = torch.tensor([row["area"] for row in rows], dtype=torch.float32)
        counts = torch.bincount(image[keep], minlength=len(self))
        self._starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])     # [images + 1]
        self._segmentations = self._checked_segmentations(rows) if return_masks else None
        return [f"left out of the targets: {counted(len(dropped), 'box', 'boxes')} without width or height inside the "
                f"image (annotation {few(dropped)})"] if dropped else []

    def _checked_segmentations(self, rows: list[dict]) -> list[Any]:
        without = [row["id"] for row in rows if not row.get("segmentation")]
        if without:
            raise ValueError(f"{self.annotation_file}: {len(without)} of {len(rows)} objects have no segmentation, "
                             f"which masks need (annotation {few(without)}); add them, or go without --masks")
        return [row["segmentation"] for row in rows]
