"""What may be the matter with annotations in COCO's form: every fault, named by its rows, with what is done about it."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from reprlib import repr as brief
from typing import Any, NamedTuple

import numpy as np

STOP, SKIP, FIX, NOTE = "stop", "skip", "fix", "note"
EXAMPLES = 100                              # rows that a finding names at most


class Finding(NamedTuple):
    """Rows of the data that are not as they should be, all in the same way."""
    kind: str           # a few words, the same for every finding of the kind
    action: str         # "stop": nothing is trained; "skip": left out of training; "fix": mended in memory; "note": kept
    message: str        # what is wrong, with the first row it is wrong in, and the remedy
    count: int          # rows
    rows: list[str]     # the first of them by name, at most EXAMPLES
    note: str = ""      # what the line that sums up a data set says of it, if anything
    split: str = ""     # "train", "val", "test"; empty where it is of all

    def line(self) -> str:
        """The message, and the rows, as far as it does not name them."""
        if not self.rows or self.count > 1:
            return self.message + (f" ({self.count} in all: {few(self.rows)})" if self.rows else "")
        row, _, more = self.rows[0].partition(" (")
        if row in self.message:
            return self.message + (f" ({more}" if more and self.rows[0] not in self.message else "")
        return f"{self.message} ({self.rows[0]})"


class Objects(NamedTuple):
    """What annotations say that have an image and a category in the data, in flat arrays."""
    image: np.ndarray           # [N] int64, place among the images
    category: np.ndarray        # [N] int64, place among the categories
    kept: np.ndarray            # [N] bool, whether it is an object to learn: no region, and a box inside the image


class Examined(NamedTuple):
    """What ``examine`` found, and what ``checked`` is to mend: places in the list "annotations", ids of categories."""
    findings: list[Finding]
    objects: Objects
    images: Sequence[dict[str, Any]] = ()       # rows that have an id, which places count
    categories: Sequence[dict[str, Any]] = ()
    without_crowd: Sequence[int] = ()
    without_area: Sequence[int] = ()
    headings: Sequence[int] = ()            # categories that are none
    zero: Sequence[int] = ()                # the annotation with id 0
    new_id: int = 0                         # what its id becomes


def examine(data: Any, masks: bool = False) -> Examined:
    """All that is the matter with data in COCO's form, which stay as they are. ``masks``: whether segmentations are
    used, so that faults in them stop training."""
    if foreign := _other_kind(data):
        none = np.zeros(0, np.int64)
        return Examined([Finding("another kind of json", STOP, foreign, 1, [])], Objects(none, none, none.astype(bool)))
    return _Examination(data, masks).examined()


def _other_kind(data: Any) -> str:
    """What a json is that has not COCO's form, and what to do; empty where it has."""
    first = next(iter(data), None) if isinstance(data, list) else data
    keys = set(first) if isinstance(first, dict) else set()
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):
        rows = [row for row in data["annotations"][:10] if isinstance(row, dict)]
        if rows and all("segments_info" in row for row in rows):
            return ("its annotations are panoptic ones; give the folder with --dataset_file coco_panoptic and "
                    "--coco_panoptic_path, or the json of instances")
        if rows and all("caption" in row and "bbox" not in row for row in rows):
            return "its annotations are captions, without boxes; give the json of instances"
    missing = [part for part in ("images", "annotations", "categories")
               if not isinstance(data, dict) or not isinstance(data.get(part), list)]
    if not missing:
        return ""
    known = ""
    if isinstance(data, list):
        known = ("a list of detections (COCO's results), not ground truth; give the annotations that they are scored "
                 "against" if {"image_id", "score"} <= keys else
                 "an export of Label Studio; export the project again, as COCO or YOLO"
                 if "annotations" in keys and keys & {"data", "file_upload"} else
                 "CreateML's format; export the data again, as COCO" if {"image", "annotations"} <= keys else
                 "BDD100K's format; convert it to COCO's" if {"name", "labels"} <= keys else "")
    elif keys:
        known = ("a LabelMe file, of one image; convert the whole folder to one json in COCO's format"
                 if {"shapes", "imagePath"} <= keys else
                 "a VIA project; export its annotations as COCO" if "_via_img_metadata" in keys or all(
                     isinstance(row, dict) and "regions" in row for row in data.values()) else
                 "GeoJSON; convert it to boxes in pixels" if data.get("type") == "FeatureCollection" else
                 "a list of images to predict on; give the json of a split that has annotations"
                 if missing == ["annotations"] else "")
    return (f"has no list {', '.join(map(repr, missing))}; COCO's format has the lists 'images', 'annotations' and "
            f"'categories'" + (f". This looks like {known}" if known else ""))


class _Examination:
    """Looks through data in COCO's form. Rows with a fault are left out of the later looks, so that one fault is one
    finding. Whole columns are looked at first, and single values only where a column is not as it should be."""

    def __init__(self, data: dict[str, Any], masks: bool) -> None:
        self.findings: list[Finding] = []
        self.masks = masks
        self.images = self._identified("images", data["images"])
        self.categories = self._identified("categories", data["categories"])
        self.rows = self._identified("annotations", data["annotations"])
        self.image_place = {row["id"]: i for i, row in enumerate(self.images)}
        self.category_place = {row["id"]: i for i, row in enumerate(self.categories)}
        self.sizes = np.full((len(self.images), 2), np.nan)                                 # width, height where sound
        self.mend: dict[str, Any] = {}

    def examined(self) -> Examined:
        """All looks, in an order in which each knows what the earlier ones found."""
        self._images()
        names = self._category_names()
        image = self._references("image_id", self.image_place, "images", self._no_such_image)
        category = self._references("category_id", self.category_place, "categories", self._no_such_category)
        region = self._flags()
        self._areas()
        boxes = self._boxes()
        self._ids_of_zero()
        inside = self._geometry(image, boxes, region)
        self._doubled(image, category, boxes)
        self._segmentations(image, inside & ~region)
        self._same_names(names, category)
        self._listed_twice(image, category, boxes)
        sound = (image >= 0) & (category >= 0)
        return Examined(self.findings, Objects(image[sound], category[sound], (inside & ~region)[sound]),
                        self.images, self.categories, **self.mend)

    def add(self, kind: str, action: str, places: Sequence[int] | np.ndarray, name: Callable[[int], str],
            message: str | Callable[[int], str], note: str = "") -> None:
        """A finding, where there are ``places``: the name of each, and the message, which may be that of the first."""
        if len(places):
            text = message if isinstance(message, str) else message(int(places[0]))
            rows = [name(int(i)) for i in places[:EXAMPLES]]
            self.findings.append(Finding(kind, action, text, len(places), rows, note))

    # How rows are called: by where they come from, where that is no json, else by their ids.

    def _annotation(self, i: int) -> str:
        return _called("annotation", self.rows[i])

    def _annotation_and_file(self, i: int) -> str:
        of = self.rows[i].get("image_id")
        place = self.image_place.get(of) if is_whole(of) else None
        file = None if place is None else self.images[place].get("file_name")
        return self._annotation(i) + (f" ({printable(file)})" if isinstance(file, str) else "")

    def _short(self, places: Sequence[int] | np.ndarray) -> str:
        """The first few annotations in brackets: "(annotation 3, 4, ...)"."""
        rows = [self.rows[int(i)] for i in places[:4]]
        if any("source" in row for row in rows):
            return f"({few([_called('annotation', row) for row in rows])})"
        return f"(annotation {few([row['id'] for row in rows])})"

    def _image(self, i: int) -> str:
        return _called("image", self.images[i])

    def _image_and_file(self, i: int) -> str:
        file = self.images[i].get("file_name")
        named = isinstance(file, str) and "source" not in self.images[i]
        return self._image(i) + (f" ({printable(file)})" if named else "")

    def _category(self, i: int) -> str:
        return f"category id {self.categories[i]['id']}"

    # Ids.

    def _identified(self, part: str, rows: list[Any]) -> list[dict[str, Any]]:
        """Those rows of a list that have an id; of several with the same, the first."""
        if not rows and part != "annotations":
            self.add("empty lists", STOP, [0], lambda i: f"'{part}'",
                     f"the list '{part}' is empty; nothing can be learnt or scored without {part}")
        ids = [row.get("id") if isinstance(row, dict) else None for row in rows]
        self.add("rows without an id", STOP, bad := _unlike(ids, {int}, is_whole),
                 lambda i: f"row {i} of '{part}'" + (f" ({rows[i]['source']})" if isinstance(rows[i], dict)
                                                    and isinstance(rows[i].get("source"), str) else ""),
                 lambda i: f"row {i} (counted from 0) of '{part}' has no 'id' that is a whole number; give each row its "
                           f"own")
        if bad:
            wrong = set(bad)
            rows = [row for i, row in enumerate(rows) if i not in wrong]
            ids = [row["id"] for row in rows]
        if len(set(ids)) < len(ids):
            first = {id: i for i, id in reversed(list(enumerate(ids)))}
            again = [i for i, id in enumerate(ids) if first[id] != i]
            one = {"images": "image", "annotations": "annotation", "categories": "category"}[part]
            twice = list(dict.fromkeys(ids[i] for i in again))
            self.add("ids given twice", STOP, again, lambda i: f"{_called(one, rows[i])} in row {i}",
                     lambda i: f"'{part}' has several rows with the same id: {few(twice)}; give each its own")
            rows = [rows[i] for i in first.values()][::-1]
        return rows

    def _images(self) -> None:
        names = [row.get("file_name") for row in self.images]
        self.add("images without a file name", STOP, _not_names(names), self._image_and_file,
                 lambda i: f"{self._image(i)} has no 'file_name'" + (
                     f" that a file can have, but {brief(names[i])}" if names[i] is not None else "") + "; add it")
        for column, side in enumerate(("width", "height")):
            sides = [row.get(side) for row in self.images]
            bad = _unlike(sides, {int}, is_whole)
            if not bad:
                bad = np.flatnonzero(np.array(sides, np.int64) < 1).tolist()
            else:
                bad = [i for i, value in enumerate(sides) if not is_whole(value) or value < 1]
            self.add(f"images without a {side}", STOP, bad, self._image_and_file,
                     lambda i, side=side, sides=sides:
                     f"{self._image(i)} ({printable(str(names[i]))}) has {side} {brief(sides[i])}; a whole number of "
                     f"pixels, at least 1, is needed")
            wrong = set(bad)
            self.sizes[:, column] = [np.nan if wrong and i in wrong else value for i, value in enumerate(sides)]

    def _category_names(self) -> list[str]:
        names = [row.get("name") for row in self.categories]
        bad = _not_names(names)
        self.add("categories without a name", STOP, bad, self._category,
                 lambda i: f"{self._category(i)} has no 'name'"
                           + (f" in words, but {brief(names[i])}" if names[i] is not None else "") + "; add it")
        return ["" if i in set(bad) else str(name).strip() for i, name in enumerate(names)]

    def _same_names(self, names: list[str], category: np.ndarray) -> None:
        """Exporters such as Roboflow's head the classes by a category of their group's name, which no object has."""
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            groups.setdefault(name, []).append(i)
        used = set(category[category >= 0].tolist())
        for name, places in groups.items():
            if len(places) == 1 or not name:
                continue
            others = [row.get("supercategory") for row in self.categories]
            heads = [i for i in places if others[i] == "none" and i not in used
                     and all(of == name for k, of in enumerate(others) if k != i)]
            if len(heads) == 1 and len(places) == 2:
                id = self.categories[heads[0]]["id"]
                self.mend["headings"] = [id]
                self.add("heading among the categories", FIX, heads, self._category,
                         f"category {id} {brief(name)} heads a group and no object has it; it is left out, since another "
                         f"one has its name",
                         note=f"category {id} {brief(name)}, the heading of another one of this name, left out")
                continue
            self.add("categories of the same name", STOP, places, self._category,
                     f"categories {few([self.categories[k]['id'] for k in places], 4)} are all called {brief(name)}; "
                     f"give each its own name, or make them one")

    # What annotations refer to.

    def _references(self, key: str, place: dict[int, int], part: str, message: Callable[[int], str]) -> np.ndarray:
        """``[rows]``: the place in the list ``part`` of what each annotation names, -1 where it names none."""
        values = self._column(key)
        self._say_missing(key, values)
        if set(map(type, values)) <= {int}:
            found = np.fromiter(map(place.get, values, repeat(-1)), np.int64, len(values))
        else:
            found = np.array([place.get(value, -1) if is_whole(value) else -1 for value in values], np.int64)
        if place:                                       # without any, it is said already that there are none
            there = [i for i in np.flatnonzero(found < 0).tolist() if values[i] is not _MISSING]
            self.add(f"annotations of {'images' if part == 'images' else 'categories'} that are not listed", STOP, there,
                     self._annotation_and_file, message)
        return found

    def _no_such_image(self, i: int) -> str:
        return (f"{self._annotation(i)} is of image id {brief(self.rows[i]['image_id'])}, which 'images' does not list; "
                f"add the image, or take the annotation out")

    def _no_such_category(self, i: int) -> str:
        return (f"{self._annotation(i)} has category_id {brief(self.rows[i]['category_id'])}, which 'categories' does "
                f"not list; its ids are {few(sorted(self.category_place), 100)}; correct it, or add the category")

    def _column(self, key: str) -> list[Any]:
        return [row.get(key, _MISSING) for row in self.rows]

    def _say_missing(self, key: str, values: list[Any]) -> None:
        if object in set(map(type, values)):
            self.add(f"annotations without '{key}'", STOP, [i for i, value in enumerate(values) if value is _MISSING],
                     self._annotation_and_file,
                     lambda i: f"{self._annotation(i)} has no '{key}'; add it, or take the annotation out")

    def _flags(self) -> np.ndarray:
        """``[rows]`` bool, which are no objects, but regions: crowds and what is to be ignored."""
        crowd, ignored = np.zeros((2, len(self.rows)), bool)
        for key in ("iscrowd", "ignore"):
            values = self._column(key)
            bad = _unlike(values, set(), lambda value: value is _MISSING or (isinstance(value, (int, float))
                                                                            and value in (0, 1))) \
                if not _all_in(values, (0, 1, _MISSING)) else []
            self.add(f"annotations with another '{key}' than 0 or 1", STOP, bad, self._annotation_and_file,
                     lambda i, key=key: f"{self._annotation(i)} has {key} {brief(self.rows[i][key])}; it is 0 or 1")
            if key == "iscrowd":
                self.mend["without_crowd"] = [i for i, value in enumerate(values) if value is _MISSING]
            (crowd if key == "iscrowd" else ignored)[[i for i, value in enumerate(values) if value == 1]] = True
        if crowds := np.flatnonzero(crowd).tolist():
            self.add("crowds", NOTE, crowds, self._annotation_and_file,
                     f"{counted(len(crowds), 'annotation')} of crowds (iscrowd 1): regions that are left out of the "
                     f"targets, and ignored by the evaluation",
                     note=f"left out of the targets: {counted(len(crowds), 'crowd annotation')} {self._short(crowds)}")
        return crowd | ignored

    def _areas(self) -> None:
        values = self._column("area")
        areas = np.full(len(values), np.nan)
        missing = [i for i, value in enumerate(values) if value is _MISSING]
        bad = []
        if set(map(type, values)) <= {int, float}:
            areas[:] = _floats(values)
        else:
            areas[:] = [_floats([value])[0] if _is_number(value) else np.nan for value in values]
        bad = np.flatnonzero(~(np.abs(areas) < _TOO_GREAT ** 2)).tolist()               # NaN, too
        if missing:
            bad = sorted(set(bad) - set(missing))
            self.add("annotations without an area", FIX, missing, self._annotation_and_file,
                     f"{counted(len(missing), 'annotation')} without 'area', which becomes the box's",
                     note=f"{counted(len(missing), 'annotation')} without 'area', which became the box's "
                          f"{self._short(missing)}")
        self.add("annotations with an area that is no number", STOP, bad, self._annotation_and_file,
                 lambda i: f"{self._annotation(i)} has area {brief(values[i])}; a finite number of pixels is needed, or "
                           f"no 'area' at all: then it is the box's")
        negative = np.flatnonzero((areas < 0) & (areas > -_TOO_GREAT ** 2)).tolist()
        self.add("annotations with a negative area", FIX, negative, self._annotation_and_file,
                 lambda i: f"{self._annotation(i)} has area {values[i]:g}, for which evaluation would ignore it; it "
                           f"becomes the box's",
                 note=f"{counted(len(negative), 'negative area')}, which became the box's {self._short(negative)}")
        self.mend["without_area"] = sorted(missing + negative)

    def _ids_of_zero(self) -> None:
        zero = [i for i, row in enumerate(self.rows) if row["id"] == 0]
        if zero:
            new = max(row["id"] for row in self.rows) + 1
            self.mend.update(zero=zero, new_id=new)
            self.add("annotation with id 0", FIX, zero, self._annotation_and_file,
                     f"annotation id 0 becomes {new}: pycocotools counts an object with id 0 as never found",
                     note=f"annotation id 0 became {new}, because pycocotools counts an object with id 0 as never found")

    # Boxes.

    def _boxes(self) -> np.ndarray:
        """``[rows, 4]`` as they stand, left, top, width, height; NaN where there are none."""
        values = self._column("bbox")
        self._say_missing("bbox", values)
        boxes = np.full((len(values), 4), np.nan)
        if set(map(type, values)) <= {list} and set(map(len, values)) <= {4} and values \
                and set(map(type, flat := list(chain.from_iterable(values)))) <= {int, float}:
            boxes[:] = _floats(flat).reshape(-1, 4)
        else:
            for i, value in enumerate(values):
                if isinstance(value, (list, tuple)) and len(value) == 4 and all(map(_is_number, value)):
                    boxes[i] = _floats(list(value))
        bad = np.flatnonzero(~(np.abs(boxes) < _TOO_GREAT).all(1)).tolist()                     # NaN, too
        self.add("boxes that are not four finite numbers", STOP, [i for i in bad if values[i] is not _MISSING],
                 self._annotation_and_file,
                 lambda i: f"{self._annotation(i)} has bbox {brief(values[i])}; four finite numbers are needed, [left, "
                           f"top, width, height] in pixels")
        boxes[bad] = np.nan
        return boxes

    def _geometry(self, image: np.ndarray, boxes: np.ndarray, region: np.ndarray) -> np.ndarray:
        """``[rows]`` bool: whose box has width and height inside its image, in the numbers that training has."""
        size = np.where((image >= 0)[:, None], self.sizes[image] if len(self.sizes) else np.nan, np.nan)    # [rows, 2]
        known = np.isfinite(size).all(1) & np.isfinite(boxes).all(1)
        inside = np.zeros(len(boxes), bool)
        low, extent = boxes[known, :2].astype(np.float32), boxes[known, 2:].astype(np.float32)
        limit = size[known].astype(np.float32)
        inside[known] = (np.minimum(low + extent, limit).clip(min=0) > np.minimum(low.clip(min=0), limit)).all(1)
        objects = known & ~region
        where = np.flatnonzero(objects)
        if len(where) and (self._as_corners(where, boxes[where], size[where])
                           or self._as_fractions(where, boxes[where], size[where])):
            return inside
        thin = objects & (boxes[:, 2:] <= 0).any(1)
        outside = objects & ~inside & ~thin
        if len(lost := np.flatnonzero(outside)) >= 10 and len(lost) > len(where) / 5:
            self.add("boxes of another size of image", STOP, lost, self._annotation_and_file,
                     lambda i: f"{len(lost)} of {len(where)} boxes lie outside their images, so that the others are "
                               f"likely to be misplaced; e.g. {self._as_it_stands(i)}. Correct width and height "
                               f"of the images or, where the images were resized, the boxes")
            return inside
        left_out = ("is left out of training (evaluation, as COCO's, counts it as an object not found); correct it, or "
                    "take it out")
        self.add("boxes without width or height", SKIP, np.flatnonzero(thin), self._annotation_and_file,
                 lambda i: f"{self._as_it_stands(i)} and {left_out}")
        self.add("boxes outside the image", SKIP, lost, self._annotation_and_file,
                 lambda i: f"{self._as_it_stands(i)} and {left_out}")
        beyond = np.maximum(-boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - size).max(1)
        cut = np.flatnonzero(objects & inside & (beyond > 0.01))                        # less is a matter of rounding
        if len(cut):
            most = f"by up to {beyond[cut].max():.3g} pixels"
            self.add("boxes partly outside the image", FIX, cut, self._annotation_and_file,
                     lambda i: f"{self._as_it_stands(i)}; boxes that reach beyond their image, {most}, are clipped to it",
                     note=f"{counted(len(cut), 'box reaches', 'boxes reach')} beyond the image, {most}, and "
                          f"{'is' if len(cut) == 1 else 'are'} clipped {self._short(cut)}")
        return inside

    def _as_it_stands(self, i: int) -> str:
        image = self.images[self.image_place[self.rows[i]["image_id"]]]
        return (f"{self._annotation(i)} has bbox {brief(self.rows[i]['bbox'])} (left, top, width, height) in an image of "
                f"{image['width']} x {image['height']}")

    def _as_corners(self, where: np.ndarray, boxes: np.ndarray, size: np.ndarray) -> bool:
        """Whether boxes look like [left, top, right, bottom]. Those of honest data leave their images by little and
        seldom, and among many that do there is always one whose width is less than its left side. Corners taken for
        width and height leave the image wherever an object's centre is in its right or its lower half."""
        far = (boxes[:, :2] + boxes[:, 2:] > size + np.maximum(2, 0.02 * size)).any(1)
        corners = ((boxes[:, :2] >= -1) & (boxes[:, 2:] >= boxes[:, :2]) & (boxes[:, 2:] <= size + 1)).all(1)
        if far.sum() < 5 or far.mean() < 0.25 or corners.mean() < 0.99:
            return False
        self.add("boxes as corners", STOP, where[far], self._annotation_and_file,
                 lambda i: f"boxes look like corners: of {len(far)}, {far.sum()} leave their images when read as COCO's "
                           f"[left, top, width, height], and {(~corners).sum()} when read as [left, top, right, bottom]; "
                           f"the first is {self._as_it_stands(i)}. Subtract left and top from right and bottom")
        return True

    def _as_fractions(self, where: np.ndarray, boxes: np.ndarray, size: np.ndarray) -> bool:
        """Whether boxes look like fractions of the image. In pixels, such a box would lie in the corner of the image and
        be smaller than a pixel, which where it is not marked by whole numbers in a tiny image nobody draws."""
        unit = (boxes >= 0).all(1) & (boxes <= 1.001).all(1) & (boxes[:, 2:] > 0).all(1) & (size.min(1) >= 8)
        if unit.any() and len(unit) < 10:                           # a point in the corner may be marked so
            unit &= (boxes % 1 != 0).any(1)
        found = where[unit]
        if not len(found):
            return False
        if many := len(found) >= 0.1 * len(where):
            self.add("boxes as fractions", STOP, found, self._annotation_and_file,
                     lambda i: f"boxes look like fractions of the image: {len(found)} of {len(where)} lie between 0 and "
                               f"1; e.g. {self._as_it_stands(i)}. Pixels are needed: multiply by the image's "
                               f"width and height (YOLO's boxes begin at the centre, COCO's at the left upper corner)")
        else:
            self.add("boxes in the first pixel", NOTE, found, self._annotation_and_file,
                     lambda i: f"{self._as_it_stands(i)}, within its first pixel; if it is a fraction of the image, "
                               f"multiply it by width and height")
        return bool(many)

    def _doubled(self, image: np.ndarray, category: np.ndarray, boxes: np.ndarray) -> None:
        sound = np.flatnonzero((image >= 0) & (category >= 0) & np.isfinite(boxes).all(1))
        keys = np.column_stack([image[sound], category[sound], boxes[sound].view(np.int64)])
        code = np.zeros(len(keys), np.uint64)                       # of equal rows equal; others are compared below
        for column in keys.T:
            code = (code ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            code ^= code >> np.uint64(29)
        order = np.argsort(code, kind="stable")
        alike = np.flatnonzero(code[order][1:] == code[order][:-1])
        again = [order[k + 1] for k in alike if (keys[order[k]] == keys[order[k + 1]]).all()]
        doubled = np.sort(sound[again]) if again else np.zeros(0, np.int64)
        self.add("objects annotated twice", NOTE, doubled, self._annotation_and_file,
                 lambda i: f"{self._annotation(i)} has image, category and box of an earlier one; kept, but a detector "
                           f"finds one of them: take the others out")

    def _listed_twice(self, image: np.ndarray, category: np.ndarray, boxes: np.ndarray) -> None:
        """Two rows of one file. With the same objects it counts twice; otherwise either teaches that the other's are
        background."""
        names: list[Any] = [row.get("file_name") for row in self.images]
        if set(map(type, names)) <= {str} and len(set(names)) == len(names):
            return
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            if isinstance(name, str):
                groups.setdefault(name, []).append(i)
        order = np.argsort(image, kind="stable")
        starts = np.searchsorted(image[order], np.arange(len(names) + 1))
        alike: list[int] = []
        different: list[int] = []
        for places in groups.values():
            if len(places) > 1:
                objects = [sorted(zip(category[rows].tolist(), boxes[rows].tolist()))
                           for rows in (order[starts[i]:starts[i + 1]] for i in places)]
                (alike if all(some == objects[0] for some in objects) else different).extend(places[1:])

        def listed(i: int) -> str:
            ids = few([self.images[k]["id"] for k in groups[names[i]]], 4)
            return f"{printable(names[i])} is listed as image ids {ids}"

        self.add("files listed twice with other objects", STOP, different, self._image_and_file,
                 lambda i: f"{listed(i)}, each with other objects, and each would teach that the others' are background; "
                           f"make them one")
        self.add("files listed twice", NOTE, alike, self._image_and_file,
                 lambda i: f"{listed(i)}, with the same objects: it counts as often; take all but one out")

    # Segmentations.

    def _segmentations(self, image: np.ndarray, learnt: np.ndarray) -> None:
        values: list[Any] = [row.get("segmentation") for row in self.rows]
        action, unused = (STOP, "") if self.masks else (NOTE, " (not used without --masks)")
        if self.masks:
            without = [i for i in np.flatnonzero(learnt).tolist() if not values[i]]
            self.add("objects without a segmentation", STOP, without, self._annotation_and_file,
                     f"{len(without)} of {learnt.sum()} objects have no segmentation, which masks need "
                     f"{self._short(without)}; add them, or go without --masks (--no_masks)")
        lists = [i for i, value in enumerate(values) if type(value) is list and value]
        codes = [i for i, value in enumerate(values) if type(value) is dict and value]
        polygons = [values[i] for i in lists]
        bad = set() if self._plain_polygons(polygons) else {i for i in lists if not _is_polygons(values[i], self.masks)}
        bad |= {i for i, value in enumerate(values) if value and not isinstance(value, (list, dict))}
        self.add("polygons that are none", action, sorted(bad), self._annotation_and_file,
                 lambda i: f"{self._annotation(i)} has segmentation {brief(values[i])}; a list of polygons is needed, "
                           f"each [x, y, x, y, ...] of at least 3 points{unused}")
        wrong = []
        for i in codes:
            size = self.sizes[image[i], ::-1].tolist() if image[i] >= 0 else [np.nan, np.nan]
            if np.isfinite(size).all() and not _is_run_lengths(values[i], size, self.masks):
                wrong.append(i)
        self.add("run lengths of another size", action, wrong, self._annotation_and_file,
                 lambda i: f"{self._annotation(i)} has run lengths of size {brief(values[i].get('size'))}, in an image "
                           f"of height {self.sizes[image[i], 1]:.0f} and width {self.sizes[image[i], 0]:.0f}; 'size' "
                           f"must be [height, width] of the image, and 'counts' fill it{unused}")

    def _plain_polygons(self, values: list[list[Any]]) -> bool:
        """Whether all are lists of polygons, looked at as a whole."""
        parts = list(chain.from_iterable(values))
        if not set(map(type, parts)) <= {list}:
            return False
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        if ((lengths < 6) | (lengths % 2 == 1)).any():
            return False
        if not self.masks:
            return True
        if not set(map(type, chain.from_iterable(parts))) <= {int, float}:
            return False
        try:
            numbers = np.fromiter(chain.from_iterable(parts), np.float64, int(lengths.sum()))
        except OverflowError:
            return False
        return bool((np.abs(numbers) < _FAR).all())


_MISSING = object()
_TOO_GREAT = 1e9                            # pixels, beyond any image
_FAR = 1e6                                  # pixels; pycocotools walks along the sides of polygons


def _called(part: str, row: dict[str, Any]) -> str:
    """A row by where it comes from, where that is no json, else by its id."""
    source = row.get("source")
    return source if isinstance(source, str) and part != "category" else f"{part} id {row['id']}"


def printable(text: str) -> str:
    """Text that any terminal takes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\n", "\\n").replace("\0", "\\0")


def _unlike(values: list[Any], plain: set[type], good: Callable[[Any], bool]) -> list[int]:
    """Places of values that are not good; a column of plain whole numbers of 64 bits is."""
    if plain and set(map(type, values)) <= plain:
        try:
            np.array(values, np.int64)
            return []
        except OverflowError:
            pass
    return [i for i, value in enumerate(values) if not good(value)]


def _all_in(values: list[Any], allowed: tuple[Any, ...]) -> bool:
    try:
        return set(values) <= set(allowed)
    except TypeError:
        return False


def _not_names(values: list[Any]) -> list[int]:
    """Places of values that are no names: not text, empty, or not of characters that can be written."""
    def good(value: Any) -> bool:
        return isinstance(value, str) and bool(value.strip()) and "\0" not in value and not any(
            "\ud800" <= letter <= "\udfff" for letter in value)
    if set(map(type, values)) <= {str} and all(map(str.strip, values)):
        whole = "".join(values)
        if "\0" not in whole and whole.isascii():
            return []
    return [i for i, value in enumerate(values) if not good(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _floats(values: list[Any]) -> np.ndarray:
    """Numbers as float64; whole ones that do not fit are infinite."""
    try:
        return np.array(values, np.float64)
    except OverflowError:
        return np.array([value if abs(value) < 1e300 else np.inf for value in values], np.float64)


def _is_polygons(value: list[Any], numbers: bool) -> bool:
    return all(isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0
               and (not numbers or all(_is_number(x) and abs(x) < _FAR for x in part)) for part in value)


def _is_run_lengths(value: dict[str, Any], size: list[float], fully: bool) -> bool:
    """Whether a code has this size, height and width, and, looked at fully, says of every pixel what it is."""
    counts = value.get("counts")
    if value.get("size") != size or not fully:
        return value.get("size") == size
    if isinstance(counts, list):
        return all(is_whole(n) and n >= 0 for n in counts) and sum(counts) == size[0] * size[1]
    if isinstance(counts, str):
        counts = counts.encode("utf-8", "replace")
    return isinstance(counts, bytes) and _pixels(counts) == size[0] * size[1]


def _pixels(counts: bytes) -> int:
    """How many pixels compressed run lengths are of, -1 where they are none. A run is written in digits of 5 bits, the
    lowest first, each in a character with a sixth bit where more follow; from the fourth run on, it is the difference to
    the last but one."""
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((digits & 32) == 0)
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or not len(ends) or ends[-1] != len(digits) - 1:
        return -1
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if lengths.max() > 7:
        return -1
    power = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((digits & 31) << power, starts)
    runs -= np.where(digits[ends] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return int(runs.sum()) if runs.min() >= 0 else -1


def is_whole(value: Any) -> bool:
    """Whether a value of a json is a whole number of 64 bits, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool) and -2 ** 63 <= value < 2 ** 63 - 1


def few(items: Sequence[Any], most: int = 3) -> str:
    """The first ``most`` items in words, and dots where there are more."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


def counted(n: int, one: str, many: str | None = None) -> str:
    """A number with its noun: "1 box", "2 boxes"."""
    return f"{n} {one if n == 1 else many or one + 's'}"
