"""COCO annotations -> image and target (Lin et al., 2014)."""
from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from datasets.file_cache import FileCache
from datasets.images import Picture, height_width, read_image
from detr.distributed import is_main
from detr.structures import Category, Target

Transforms = Callable[[Any, Target], tuple[Any, Target]]

LAYOUT = """COCO's layout is expected:
    train2017/  val2017/                                    the images
    annotations/instances_train2017.json                    what is on them
    annotations/instances_val2017.json"""

COCO_CATEGORIES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}


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


# Categories and labels.

def class_table(names: dict[int, str]) -> list[Category]:
    """Category ids and names -> the class table.

    Exactly COCO's 80 categories keep their ids as labels (91 slots, 11 of them unused), so that heads fit published
    weights. Any others get labels 0, 1, 2, ... in the order of their ids.
    """
    raw = names == COCO_CATEGORIES
    return [Category(id if raw else label, id, names[id]) for label, id in enumerate(sorted(names))]


def num_classes(categories: Iterable[Category]) -> int:
    """How many slots for classes a head needs: the greatest label + 1. 91 for COCO."""
    return max(category.label for category in categories) + 1


# Reading the json.

def read_annotations(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The json at ``path``, checked and completed, and what there is to say about it.

    A missing ``iscrowd`` becomes 0 and a missing ``area`` that of the box, and an annotation id of 0 a new one (under
    COCO's scoring, an object with id 0 counts as never found). Raises FileNotFoundError, or ValueError with the file,
    the row and a remedy.
    """
    if not path.is_file():
        raise FileNotFoundError(f"annotations {path} are not there. {LAYOUT}")
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no valid json at line {error.lineno}, column {error.colno} (character {error.pos} "
                         f"of {len(error.doc)}): {error.msg}; if cut short, download or export it again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no valid json ({error}); download or export it again") from None
    for part in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(part), list):
            raise ValueError(f"{path}: has no list '{part}'; COCO's format has the lists 'images', 'annotations' and "
                             f"'categories'")
        for i, row in enumerate(data[part]):
            check_id(path, part, i, row)
        ids = Counter(row["id"] for row in data[part])
        if len(ids) < len(data[part]):
            twice = [i for i, n in ids.items() if n > 1]
            raise ValueError(f"{path}: '{part}' has several rows with the same id: {few(twice)}; give each its own")
    for part in ("images", "categories"):
        if not data[part]:
            raise ValueError(f"{path}: the list '{part}' is empty; nothing can be learnt or scored without {part}")
    for image in data["images"]:
        check_image(path, image)
    for category in data["categories"]:
        if not isinstance(category.get("name"), str):
            raise ValueError(f"{path}: category id {category['id']} has no 'name'; add it")
    image_ids = {image["id"] for image in data["images"]}
    category_ids = {category["id"] for category in data["categories"]}
    for row in data["annotations"]:
        _check_annotation(path, row, image_ids, category_ids)
    return data, _complete(data["annotations"])


def is_whole(value: Any) -> bool:
    """Whether a value of a json is a whole number, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_id(path: Path, part: str, i: int, row: Any) -> None:
    """ValueError, naming file and row, unless ``row`` of the list ``part`` has an id that is a whole number."""
    if not isinstance(row, dict) or not is_whole(row.get("id")):
        raise ValueError(f"{path}: row {i} (counted from 0) of '{part}' has no 'id' that is a whole number; give each "
                         f"row its own")


def check_image(path: Path, image: dict[str, Any]) -> None:
    """ValueError, naming file and image, unless it has a file name, a width and a height."""
    if not isinstance(image.get("file_name"), str):
        raise ValueError(f"{path}: image id {image['id']} has no 'file_name'; add it")
    for side in ("width", "height"):
        if not is_whole(image.get(side)) or image[side] < 1:
            raise ValueError(f"{path}: image id {image['id']} ({image['file_name']}) has {side} {image.get(side)!r}; a "
                             f"whole number of pixels, at least 1, is needed")


def _check_annotation(path: Path, row: dict[str, Any], image_ids: set[int], category_ids: set[int]) -> None:
    where = f"{path}: annotation id {row['id']}"
    for key in ("image_id", "category_id", "bbox"):
        if key not in row:
            raise ValueError(f"{where} has no '{key}'; add it, or take the annotation out")
    if not is_whole(row["image_id"]) or row["image_id"] not in image_ids:
        raise ValueError(f"{where} is of image id {row['image_id']!r}, which 'images' does not list; add the image, or "
                         f"take the annotation out")
    if not is_whole(row["category_id"]) or row["category_id"] not in category_ids:
        raise ValueError(f"{where} has category_id {row['category_id']!r}, which 'categories' does not list; its ids "
                         f"are {few(sorted(category_ids), 100)}; correct it, or add the category")
    bbox = row["bbox"]
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(x, (int, float)) and math.isfinite(x)
                                                               for x in bbox):
        raise ValueError(f"{where} has bbox {bbox!r}; four finite numbers are needed, [left, top, width, height] in "
                         f"pixels")
    if row.get("iscrowd", 0) not in (0, 1):
        raise ValueError(f"{where} has iscrowd {row['iscrowd']!r}; it is 0 or 1")
    area = row.get("area", 0)
    if not isinstance(area, (int, float)) or not math.isfinite(area):
        raise ValueError(f"{where} has area {area!r}; a finite number of pixels is needed, or no 'area' at all: then "
                         f"it is the box's")


def _complete(annotations: list[dict[str, Any]]) -> list[str]:
    without_area = [row["id"] for row in annotations if "area" not in row]
    for row in annotations:
        row.setdefault("iscrowd", 0)
        row.setdefault("area", row["bbox"][2] * row["bbox"][3])
    notes = []
    if without_area:
        notes.append(f"{counted(len(without_area), 'annotation')} without 'area', which became the box's (annotation "
                     f"{few(without_area)})")
    crowds = [row["id"] for row in annotations if row["iscrowd"]]
    if crowds:
        notes.append(f"left out of the targets: {counted(len(crowds), 'crowd annotation')} (annotation {few(crowds)})")
    for row in annotations:
        if row["id"] == 0:
            row["id"] = max(other["id"] for other in annotations) + 1
            notes.append(f"annotation id 0 became {row['id']}, because pycocotools counts an object with id 0 as never "
                         f"found")
    return notes


def few(items: Sequence[Any], most: int = 3) -> str:
    """The first ``most`` items in words, and dots where there are more."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


def counted(n: int, one: str, many: str | None = None) -> str:
    """A number with its noun: "1 box", "2 boxes"."""
    return f"{n} {one if n == 1 else many or one + 's'}"


# What pycocotools is used for.

def index(data: dict[str, Any]) -> COCO:
    """A COCO json's content -> pycocotools' index of it, without its chatter."""
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def masks(segmentations: Sequence[Any], height: int, width: int) -> Tensor:
    """Polygons, or run lengths compressed or not, of N objects -> bool ``[N, height, width]``."""
    out = np.zeros((len(segmentations), height, width), dtype=bool)
    for mask, segmentation in zip(out, segmentations):
        if isinstance(segmentation, list):                              # polygons, the object's parts
            mask[:] = rle.decode(rle.merge(rle.frPyObjects(segmentation, height, width)))
        elif isinstance(segmentation["counts"], list):
            mask[:] = rle.decode(rle.frPyObjects(segmentation, height, width))
        else:
            mask[:] = rle.decode(segmentation)
    return torch.from_numpy(out)
