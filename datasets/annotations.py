"""Annotations in COCO's form (Lin et al., 2014): reading, checking and completing the json; its class table."""
from __future__ import annotations

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor

from detr.structures import Category

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
