"""COCO panoptic annotations -> image and target (Kirillov et al., 2019).

A json has one row an image, with the name of a PNG and a list of segments. Each pixel of the PNG names its segment by its
colour: the id is R + 256 G + 256² B, and 0 is void, which belongs to none.
"""
from __future__ import annotations

import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor

from datasets.annotations import index, num_classes, read_json
from datasets.coco import CocoDetection, Transforms
from datasets.examination import counted, few, is_whole
from datasets.file_cache import FileCache
from datasets.flat import Numbers, Strings
from datasets.images import DAMAGED
from detr.boxes import masks_to_boxes
from detr.coco_classes import COCO_PANOPTIC, COCO_SLOTS
from detr.distributed import is_main
from detr.structures import Category, Target

LAYOUT = """COCO's panoptic layout is expected:
    <coco_path>/train2017/  val2017/                                    the images
    <coco_panoptic_path>/panoptic_train2017/  panoptic_val2017/         PNGs, which segment a pixel belongs to
    <coco_panoptic_path>/annotations/panoptic_train2017.json            what the segments are
    <coco_panoptic_path>/annotations/panoptic_val2017.json"""

IDS = 1 << 24                               # that a pixel of three bytes can name

_KINDS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}       # a PNG's colour types


class Segments(NamedTuple):
    """The segments of an image as the json lists them, in its order."""
    ids: Tensor             # [N] int64, colours of the PNG
    labels: Tensor          # [N] int64
    area: Tensor            # [N] float32 pixels, NaN where the json has none
    iscrowd: Tensor         # [N] int64


class PanopticAnnotations:
    """Which pixels of an image are which segment: a json and the PNGs in ``folder``.

    Images are in the order of their ids: ``ids``, ``files`` (of the images), ``sizes``, ``pngs`` (None where the json
    lists an image, but has no row for it). ``categories`` is the class table to use; the json's categories must be among
    it. Without it the table is the json's own, see ``panoptic_class_table``. ``cache_mode`` keeps the PNG files in
    memory, see ``FileCache``.

    The json is checked here and the PNGs are looked for; a PNG is read and checked against the json when its image is
    asked for. Raises FileNotFoundError and ValueError that name file, row and remedy.
    """

    def __init__(self, folder: str | Path, annotation_file: str | Path, categories: Sequence[Category] | None = None,
                 cache_mode: bool = False) -> None:
        self.folder, self.annotation_file = Path(folder), Path(annotation_file)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"folder of panoptic PNGs {self.folder} is not there. {LAYOUT}")
        data = read_panoptic(self.annotation_file)
        images = sorted(data["images"], key=lambda image: image["id"])
        rows = {row["image_id"]: row for row in data["annotations"]}
        self.ids = Numbers(image["id"] for image in images)
        self.files = Strings(image["file_name"] for image in images)
        self.sizes = torch.tensor([[image["height"], image["width"]] for image in images])          # [images, 2]
        self.pngs: list[str | None] = [rows[i]["file_name"] if i in rows else None for i in self.ids]
        self._check_files()
        self.categories = self._class_table(data["categories"], categories)
        self.num_classes = panoptic_num_classes(self.categories)
        self._pack([rows[i]["segments_info"] if i in rows else [] for i in self.ids])
        self._cache: FileCache | None = None
        if cache_mode:
            there = [i for i, name in enumerate(self.pngs) if name]
            self._place = {i: k for k, i in enumerate(there)}
            self._cache = FileCache([self.folder / name for name in self.pngs if name], str(self.folder),
                                    unreadable=lambda k: self.numbers(there[k]))

    def __len__(self) -> int:
        return len(self.ids)

    def segments(self, i: int) -> Segments:
        """What the json says of the segments of image ``i``."""
        some = slice(int(self._starts[i]), int(self._starts[i + 1]))
        return Segments(*(column[some].clone() for column in self._columns))

    def numbers(self, i: int) -> np.ndarray:
        """Whole numbers ``[H, W]``: 0 where a pixel is void, else which of ``segments(i)`` it is, counted from 1.

        Raises OSError where the PNG cannot be read, and ValueError where it is not RGB, has another size than the json
        says, or where one of the two has a segment that the other has not.
        """
        size = tuple(self.sizes[i].tolist())
        name = self.pngs[i]
        if name is None:
            return np.zeros(size, np.uint8)
        where = f"panoptic PNG {self.folder / name} (image id {self.ids[i]} of {self.annotation_file})"
        content = None if self._cache is None else self._cache[self._place[i]]
        ids = read_ids(self.folder / name, where, content)
        if ids.shape != size:
            raise ValueError(f"{where} has {ids.shape[1]} x {ids.shape[0]} pixels, but the json says {size[1]} x "
                             f"{size[0]}; resize it to the image's size without mixing colours (nearest pixel), or "
                             f"correct width and height")
        return number_segments(ids, self.segments(i).ids.numpy(), where)

    def describe(self) -> str:
        """How many of what there are, in one line."""
        labels, crowds = self._columns.labels, int(self._columns.iscrowd.sum())
        empty = int((self._starts.diff() == 0).sum())
        unused = len(self.categories) - len(labels.unique())
        things = sum(category.isthing for category in self.categories)
        notes = [f"{self.annotation_file}: {len(self)} images ({empty} without segments, kept), {len(labels)} segments "
                 f"({counted(crowds, 'crowd')}) of {len(self.categories)} classes ({counted(things, 'thing')}; {unused} "
                 f"without segments, kept)"]
        if rowless := [i for i, name in zip(self.ids, self.pngs) if name is None]:
            notes.append(f"{counted(len(rowless), 'image')} without a row in 'annotations', taken as without segments "
                         f"(image id {few(rowless)})")
        if without_area := int(self._columns.area.isnan().sum()):
            notes.append(f"{counted(without_area, 'segment')} without 'area', which becomes the number of pixels")
        return "; ".join(notes)

    def _check_files(self) -> None:
        there = set(os.listdir(self.folder))                            # one call, where asking file by file takes long
        missing = [f"{name} (image id {i})" for name, i in zip(self.pngs, self.ids)
                   if name and name not in there and not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} of the PNGs that {self.annotation_file} lists are not in "
                                    f"{self.folder}: {few(missing)}; copy them there (upper and lower case differ), or "
                                    f"take their rows out of 'annotations', and the images out of 'images'")

    def _class_table(self, rows: list[dict], categories: Sequence[Category] | None) -> list[Category]:
        table = panoptic_class_table(Category(row["id"], row["id"], row["name"], bool(row["isthing"])) for row in rows)
        if categories is None:
            return table
        known = {category[1:] for category in categories}
        foreign = [_described(category) for category in table if category[1:] not in known]
        if foreign:
            raise ValueError(f"{self.annotation_file}: categories {few(foreign)} are not in the class table to be "
                             f"used, which has {few([_described(category) for category in categories], 8)}; training "
                             f"data, validation data and checkpoint must have the same ids and names of the same kind")
        return list(categories)

    def _pack(self, images: list[list[dict]]) -> None:
        """Rows -> tensors over all images: compact, and not copied into each worker."""
        label = {category.id: category.label for category in self.categories}
        rows = [row for segments in images for row in segments]
        self._columns = Segments(torch.tensor([row["id"] for row in rows], dtype=torch.int64),
                                 torch.tensor([label[row["category_id"]] for row in rows], dtype=torch.int64),
                                 torch.tensor([row.get("area", math.nan) for row in rows], dtype=torch.float32),
                                 torch.tensor([row.get("iscrowd", 0) for row in rows], dtype=torch.int64))
        self._starts = torch.tensor([0, *map(len, images)]).cumsum(0)                       # [images + 1]


class CocoPanoptic(CocoDetection):
    """The images that ``annotation_file`` lists, with their segments: ``(image, target)``. Everything is as for
    ``CocoDetection``, but for where the objects come from.

    As published, every segment of the json is an object, stuff and crowds included (``iscrowd`` says which are), in the
    json's order, with the json's ``area`` (of the image as stored); the box is that of its pixels, ``masks_to_boxes``,
    so a segment one pixel wide has a box without width. ``return_masks`` adds ``masks``. Images without segments stay.

    ``annotations`` has the segments alone, which is what predictions are scored against. Raises what
    ``PanopticAnnotations`` raises, and when an image is asked for, what its ``numbers`` raises.
    """

    def __init__(self, image_folder: str | Path, panoptic_folder: str | Path, annotation_file: str | Path,
                 transforms: Transforms | None = None, return_masks: bool = True,
                 categories: Sequence[Category] | None = None, cache_mode: bool = False, channels: int = 3) -> None:
        # Not the parent's, which reads instances: the fields that its methods need are set here.
        self.image_folder, self.annotation_file = Path(image_folder), Path(annotation_file)
        self.transforms, self.return_masks, self.channels = transforms, return_masks, channels
        self.fast_images = "off"                                        # as published alone
        if not self.image_folder.is_dir():
            raise FileNotFoundError(f"image folder {self.image_folder} is not there. {LAYOUT}")
        self.annotations = PanopticAnnotations(panoptic_folder, annotation_file, categories, cache_mode)
        self.ids, self.files, self.sizes = self.annotations.ids, self.annotations.files, self.annotations.sizes
        self.categories, self.num_classes = self.annotations.categories, self.annotations.num_classes
        self._check_files()
        if is_main():
            print(self.annotations.describe(), flush=True)
        self._cache = None
        if cache_mode:
            paths = [self.image_folder / name for name in self.files]
            self._cache = FileCache(paths, str(self.image_folder), unreadable=self.image)

    def target(self, i: int) -> Target:
        """The target of image ``i`` before ``transforms``; boxes are corners in pixels."""
        numbers, segments = self.annotations.numbers(i), self.annotations.segments(i)
        count = len(segments.ids)
        masks = torch.from_numpy(numbers == np.arange(1, count + 1, dtype=numbers.dtype)[:, None, None])
        pixels = torch.from_numpy(np.bincount(numbers.ravel(), minlength=count + 1)[1:])
        target: Target = {
            "image_id": torch.tensor([self.ids[i]]),
            "boxes": masks_to_boxes(masks),
            "labels": segments.labels,
            "area": torch.where(segments.area.isnan(), pixels.float(), segments.area),
            "iscrowd": segments.iscrowd,
            "orig_size": self.sizes[i].clone(),
            "size": self.sizes[i].clone(),
        }
        if self.return_masks:
            target["masks"] = masks
        return target

    def labels_of_images(self) -> tuple[Tensor, ...]:
        """The labels of each image's segments, without reading anything."""
        return tuple(self.annotations.segments(i).labels for i in range(len(self)))

    @cached_property
    def coco(self) -> COCO:
        """The things as instances with box and mask, for pycocotools: AP where there is no json of instances. Made on
        first use, from all PNGs, which takes some 10 ms an image."""
        categories = {category.label: category for category in self.categories if category.isthing}
        rows: list[dict[str, Any]] = []
        for i, image_id in enumerate(self.ids):
            numbers, segments = self.annotations.numbers(i), self.annotations.segments(i)
            for number, (label, crowd) in enumerate(zip(segments.labels.tolist(), segments.iscrowd.tolist()), 1):
                if label in categories:
                    mask = rle.encode(np.asfortranarray(numbers == number, dtype=np.uint8))
                    rows.append({"id": len(rows) + 1, "image_id": image_id, "category_id": categories[label].id,
                                 "iscrowd": crowd, "segmentation": mask, "area": int(rle.area(mask)),
                                 "bbox": rle.toBbox(mask).tolist()})
        sizes = self.sizes.tolist()
        return index({"annotations": rows,
                      "images": [{"id": id, "file_name": name, "height": height, "width": width}
                                 for id, name, (height, width) in zip(self.ids, self.files, sizes)],
                      "categories": [{"id": category.id, "name": category.name} for category in categories.values()]})


def build_coco_panoptic(split: str, coco_path: str | Path, coco_panoptic_path: str | Path | None,
                        transforms: Transforms | None = None, return_masks: bool = True,
                        categories: Sequence[Category] | None = None, cache_mode: bool = False,
                        channels: int = 3) -> CocoPanoptic:
    """COCO panoptic 2017 or data in its layout: the images below ``coco_path``, PNGs and json below
    ``coco_panoptic_path``; further arguments as for ``build_dataset``."""
    if coco_panoptic_path is None:
        raise ValueError(f"--dataset_file coco_panoptic needs --coco_panoptic_path, the folder of PNGs and json. "
                         f"{LAYOUT}")
    images, panoptic = Path(coco_path), Path(coco_panoptic_path)
    for flag, root in (("--coco_path", images), ("--coco_panoptic_path", panoptic)):
        if not root.is_dir():
            raise FileNotFoundError(f"{flag} {root}: there is no such folder. {LAYOUT}")
    return CocoPanoptic(images / f"{split}2017", panoptic / f"panoptic_{split}2017",
                        panoptic / "annotations" / f"panoptic_{split}2017.json", transforms, return_masks, categories,
                        cache_mode, channels)


# Categories and labels.

def panoptic_class_table(categories: Iterable[Category]) -> list[Category]:
    """Categories as the data has them, their labels of no account -> the class table.

    Exactly COCO's 133 categories keep their ids as labels (250 slots, most above 200 unused), so that heads fit
    published weights. Any others get labels 0, 1, 2, ... in the order of their ids.
    """
    rows = sorted((category._replace(label=category.id) for category in categories), key=lambda category: category.id)
    return rows if rows == COCO_PANOPTIC else [row._replace(label=label) for label, row in enumerate(rows)]


def panoptic_num_classes(categories: Sequence[Category]) -> int:
    """How many slots for classes a head needs: the greatest label + 1, but 250 for COCO, as published."""
    return COCO_SLOTS if list(categories) == COCO_PANOPTIC else num_classes(categories)


def _described(category: Category) -> str:
    return f"{category.id} {category.name!r} ({'thing' if category.isthing else 'stuff'})"


# Segments of a PNG.

def read_ids(path: str | Path, where: str | None = None, content: bytes | None = None) -> np.ndarray:
    """The ids that the PNG at ``path`` has for its pixels, uint32 ``[H, W]``; where the file's ``content`` is given, no
    file is opened. ``where`` is what errors call it.

    Raises FileNotFoundError where there is no file, OSError where it is no PNG, is damaged or cut short, and ValueError
    where its pixels are not three bytes (RGB, or RGBA, of which alpha is ignored): other kinds are no ids, or would lose
    some of them.
    """
    where = where or f"panoptic PNG {path}"
    try:
        content = Path(path).read_bytes() if content is None else content
    except FileNotFoundError:
        raise FileNotFoundError(f"{where} is not there; correct the name in the json, or copy the file there") from None
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 26:
        raise OSError(f"{where} ({len(content)} bytes) is no PNG; copy it again, or write it anew as PNG: other formats "
                      f"do not keep every colour as it is")
    depth, kind = content[24], content[25]                              # of the first chunk, the header
    if depth != 8 or kind not in (2, 6):
        raise ValueError(f"{where} is a {_KINDS.get(kind, 'unknown')} PNG with {depth} bits a channel, but RGB with 8 is "
                         f"needed, where R + 256 G + 256² B is the id of the pixel's segment; write the ids that way")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
            packed = (image if image.mode == "RGB" else image.convert("RGB")).tobytes("raw", "RGBX")
    except DAMAGED as error:
        raise OSError(f"{where} ({len(content)} bytes) cannot be read: {error}; if it is damaged or cut short, copy it "
                      f"again, or take its row out of the json") from error
    return np.frombuffer(packed, "<u4").reshape(height, width) & (IDS - 1)      # X, the fourth byte, is no part of it


def encode_ids(ids: np.ndarray) -> bytes:
    """The inverse of ``read_ids``: ids ``[H, W]``, 0 .. 2^24 - 1 -> a PNG file's content."""
    packed = np.ascontiguousarray(ids, dtype="<u4")
    file = io.BytesIO()
    Image.fromarray(packed.view(np.uint8).reshape(*packed.shape, 4)[..., :3].copy()).save(file, format="PNG")
    return file.getvalue()


def number_segments(ids: np.ndarray, listed: Sequence[int] | np.ndarray, where: str) -> np.ndarray:
    """Ids ``[H, W]`` of pixels -> which of the N segments ``listed`` they are, counted from 1; 0 is void.

    Raises ValueError where the pixels have an id that is not listed, unless it is 0, and where one that is listed has no
    pixels; ``where`` is what the error calls the PNG.
    """
    count = len(listed)
    # One look-up a pixel, whatever N is. Pages of the table that no id falls into are never touched: it costs no memory.
    table = np.zeros(IDS, np.min_scalar_type(count))
    table[np.asarray(listed, dtype=np.int64)] = np.arange(1, count + 1)
    numbers = table.take(ids)
    unlisted = ids[(numbers == 0) & (ids != 0)]
    if len(unlisted):
        values, pixels = np.unique(unlisted, return_counts=True)
        some = [f"{value} ({counted(int(n), 'pixel')})" for value, n in zip(values.tolist(), pixels)]
        raise ValueError(f"{where} has {counted(len(values), 'segment id')} that 'segments_info' does not list: "
                         f"{few(some)}; list them, or make these pixels void (black, id 0)")
    pixels = np.bincount(numbers.ravel(), minlength=count + 1)[1:]
    if not pixels.all():
        absent = np.asarray(listed)[pixels == 0].tolist()
        raise ValueError(f"{where} has no pixel of {counted(len(absent), 'segment')} that 'segments_info' lists: id "
                         f"{few(absent)}; take them out of the json, or write the PNG anew")
    return numbers


# Reading the json.

def read_panoptic(path: Path) -> dict[str, Any]:
    """The panoptic json at ``path``, checked. Raises FileNotFoundError, or ValueError with the file, the row and a
    remedy."""
    data = read_json(path, LAYOUT)
    for part in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(part), list):
            raise ValueError(f"{path}: has no list '{part}'; COCO's panoptic format has the lists 'images', "
                             f"'annotations' and 'categories'")
    for part in ("images", "categories"):
        if not data[part]:
            raise ValueError(f"{path}: the list '{part}' is empty; nothing can be learnt or scored without {part}")
        for i, row in enumerate(data[part]):
            _check_id(path, part, i, row)
        if twice := _twice(row["id"] for row in data[part]):
            raise ValueError(f"{path}: '{part}' has several rows with the same id: {few(twice)}; give each its own")
    for image in data["images"]:
        _check_image(path, image)
    for category in data["categories"]:
        where = f"{path}: category id {category['id']}"
        if not isinstance(category.get("name"), str):
            raise ValueError(f"{where} has no 'name'; add it")
        if category.get("isthing") not in (0, 1):
            raise ValueError(f"{where} ({category['name']}) has isthing {category.get('isthing')!r}; 1 is needed for "
                             f"things, which can be counted, or 0 for stuff")
    image_ids = {image["id"] for image in data["images"]}
    category_ids = {category["id"] for category in data["categories"]}
    for i, row in enumerate(data["annotations"]):
        _check_row(path, i, row, image_ids, category_ids)
    if twice := _twice(row["image_id"] for row in data["annotations"]):
        raise ValueError(f"{path}: 'annotations' has several rows of the same image id: {few(twice)}; each image has "
                         f"one, with all of its segments")
    return data


def _check_id(path: Path, part: str, i: int, row: Any) -> None:
    """ValueError, naming file and row, unless ``row`` of the list ``part`` has an id that is a whole number."""
    if not isinstance(row, dict) or not is_whole(row.get("id")):
        raise ValueError(f"{path}: row {i} (counted from 0) of '{part}' has no 'id' that is a whole number; give each "
                         f"row its own")


def _check_image(path: Path, image: dict[str, Any]) -> None:
    """ValueError, naming file and image, unless it has a file name, a width and a height."""
    if not isinstance(image.get("file_name"), str):
        raise ValueError(f"{path}: image id {image['id']} has no 'file_name'; add it")
    for side in ("width", "height"):
        if not is_whole(image.get(side)) or image[side] < 1:
            raise ValueError(f"{path}: image id {image['id']} ({image['file_name']}) has {side} {image.get(side)!r}; a "
                             f"whole number of pixels, at least 1, is needed")


def _twice(ids: Iterable[int]) -> list[int]:
    return [i for i, n in Counter(ids).items() if n > 1]


def _check_row(path: Path, i: int, row: Any, image_ids: set[int], category_ids: set[int]) -> None:
    where = f"{path}: row {i} (counted from 0) of 'annotations'"
    if not isinstance(row, dict) or not isinstance(row.get("segments_info"), list):
        raise ValueError(f"{where} has no list 'segments_info'; panoptic annotations have one row an image, with its "
                         f"image_id, the file_name of its PNG and segments_info; boxes or polygons without PNGs are for "
                         f"--dataset_file coco")
    if not is_whole(row.get("image_id")) or row["image_id"] not in image_ids:
        raise ValueError(f"{where} is of image id {row.get('image_id')!r}, which 'images' does not list; add the image, "
                         f"or take the row out")
    where = f"{path}: the annotation of image id {row['image_id']}"
    if not isinstance(row.get("file_name"), str):
        raise ValueError(f"{where} has no 'file_name'; add it, the name of its PNG")
    for segment in row["segments_info"]:
        if not isinstance(segment, dict) or not is_whole(segment.get("id")) or not 0 < segment["id"] < IDS:
            raise ValueError(f"{where} has a segment whose id is not a whole number from 1 to {IDS - 1}: {segment!r}; "
                             f"the id is R + 256 G + 256² B of its pixels, 0 is void")
        _check_segment(f"{where}, segment id {segment['id']},", segment, category_ids)
    if twice := _twice(segment["id"] for segment in row["segments_info"]):
        raise ValueError(f"{where} has several segments with the same id: {few(twice)}; give each its own, in the PNG "
                         f"too")


def _check_segment(where: str, segment: dict[str, Any], category_ids: set[int]) -> None:
    if not is_whole(segment.get("category_id")) or segment["category_id"] not in category_ids:
        raise ValueError(f"{where} has category_id {segment.get('category_id')!r}, which 'categories' does not list; its "
                         f"ids are {few(sorted(category_ids), 100)}; correct it, or add the category")
    if segment.get("iscrowd", 0) not in (0, 1):
        raise ValueError(f"{where} has iscrowd {segment['iscrowd']!r}; it is 0 or 1")
    area = segment.get("area", 0)
    if not isinstance(area, (int, float)) or not math.isfinite(area):
        raise ValueError(f"{where} has area {area!r}; a finite number of pixels is needed, or no 'area' at all: then "
                         f"the pixels are counted")
