"""YOLO's text files <-> COCO's form.

``data.yaml`` names the classes and the parts. Each image has a text file of its own name, in the folder that results
when the last ``images`` of its path becomes ``labels``, or else beside it, with one row an object: ``class cx cy w h``,
fractions of the image's width and height, or ``class x1 y1 x2 y2 x3 y3 ...``, the corners of a polygon, whose box is the
object's. No file, or an empty one, is an image without objects; how many have none is said.
"""
from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from datasets.examination import counted, few
from datasets.images import image_sizes
from datasets.split import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    SPLITS,
    Note,
    Part,
    Put,
    Split,
    by_image,
    find_images,
    inner_path,
    is_region,
    need_stems,
    problems_found,
    what_is_lost,
)

FAR = 1.5           # beyond this a number can be no fraction of an image that an annotator was a little careless with


def find(path: Path) -> dict[str, Split]:
    """The parts of the YOLO data set whose yaml is ``path``, or lies in this folder; none where there is no such yaml.

    Raises ValueError where the folder has several, or the yaml is not right: that which is named, or called data.yaml, or
    names what is there. Any other that has no classes and parts is about something else.
    """
    if path.is_file():
        return _splits(path, _read_yaml(path, True)) if path.suffix.lower() in (".yaml", ".yml") else {}
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".yaml", ".yml") and file.is_file())
    found = {}
    for file in files:
        if content := _read_yaml(file, file.stem == "data"):
            found[file] = content
    if not found and any((path / place).is_dir() for place in ("labels", "train/labels")):
        for file in files:
            _load(file)                                                 # one that is no valid yaml may be what is meant
    if len(found) > 1:
        raise ValueError(f"{path} has several yaml files with classes and parts: "
                         f"{few([file.name for file in found], 8)}; name the one that is meant, e.g. {next(iter(found))}")
    return next((_splits(file, content) for file, content in found.items()), {})


def _read_yaml(file: Path, meant: bool) -> dict[str, Any]:
    """The yaml's content; nothing where it is about something else, which one that is ``meant`` is not."""
    try:
        content = _load(file)
    except ValueError:
        if meant:
            raise
        return {}
    if not isinstance(content, dict):
        return {}
    values = [value for key in SPLIT_NAMES if SPLIT_NAMES[key] != "test" for value in _places(content.get(key))]
    if not values:
        return {}
    if not meant and not isinstance(content.get("names"), (list, dict)):
        home = content["path"] if isinstance(content.get("path"), str) else ""
        if not any(_resolve(value, [file.parent / home, file.parent]) for value in values):
            return {}
    if "names" not in content:
        raise ValueError(f"{file}: has no 'names'; add the list of class names, in the order of the numbers that the "
                         f"text files use")
    return content


def _load(file: Path) -> Any:
    """The yaml's content, all of it text: a class may be called "no" or "1"."""
    try:
        return yaml.load(file.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)          # makes text alone: safe
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: no valid yaml: {' '.join(str(error).split())}; correct it there") from None


def _places(value: Any) -> list[str]:
    """The folders, lists and images that the yaml names for a part."""
    return [place for place in (value if isinstance(value, list) else [value]) if place and isinstance(place, str)]


def _names(file: Path, content: dict[str, Any]) -> dict[int, str]:
    names = content["names"]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{file}: 'names' is {content['names']!r}; a list of class names is needed, or number: name for "
                         f"each")
    try:
        table = {int(key): name for key, name in names.items()}
    except ValueError:
        raise ValueError(f"{file}: 'names' has the keys {few(list(names), 8)}; whole numbers are needed, those that the "
                         f"text files use") from None
    count = content.get("nc", "")
    if count != "" and count != str(len(table)):
        raise ValueError(f"{file}: 'nc' is {count}, but 'names' has {counted(len(table), 'class', 'classes')}; correct "
                         f"one of them")
    return table


class _Listing(NamedTuple):
    """Where the images of a part are."""
    folders: list[Path]
    files: list[Path]           # from lists of images
    missing: list[str]          # what the yaml names and is not there


def _splits(file: Path, content: dict[str, Any]) -> dict[str, Split]:
    if not content:
        return {}
    names, notes, splits = _names(file, content), [], {}
    home = file.parent
    if not isinstance(content.get("path", ""), str):
        raise ValueError(f"{file}: 'path' is {content['path']!r}; one folder is needed, which train and val are within")
    bases = [home / content["path"], home] if content.get("path") else [home]
    for split in SPLITS:
        keys = [key for key, part in SPLIT_NAMES.items() if part == split and content.get(key)]
        if not keys:
            continue
        values = _places(content[keys[0]])
        if any(content[key] != content[keys[0]] for key in keys):
            raise ValueError(f"{file}: has {' and '.join(keys)}, which are the same part; keep one of them")
        if not values or isinstance(content[keys[0]], list) and len(values) < len(content[keys[0]]):
            raise ValueError(f"{file}: {keys[0]!r} is {content[keys[0]]!r}; a folder of images, a list of images, or "
                             f"several of them are needed")
        listing = _Listing([], [], [])
        for value in values:
            place = _resolve(value, bases)
            if place is None:
                listing.missing.append(value)
            elif place.is_dir():
                listing.folders.append(place)
            elif place.suffix.lower() in IMAGE_SUFFIXES:
                listing.files.append(place)
            else:
                listing.files.extend(_listed(place, bases))
            if place is not None and place != bases[0] / value:
                notes.append(f"{file}: {split} {value!r} is not at {bases[0] / value}; taken was {place}")
        around = [*listing.folders, *{image.parent for image in listing.files}]
        images = Path(os.path.commonpath([os.path.abspath(folder) for folder in around])) if len(around) > 1 else \
            (around[0] if around else home)
        splits[split] = Split(file, images, partial(_read, file, split, names, listing, images, "kpt_shape" in content,
                                                    list(notes)))
    return splits


def _resolve(value: str, bases: list[Path]) -> Path | None:
    """Where a folder or list is that the yaml names. Exporters write ``../train/images`` for a folder beside it."""
    inner = value
    while inner.startswith("../"):
        inner = inner[3:]
    return next((base / name for name in dict.fromkeys((value, inner)) for base in bases if (base / name).exists()), None)


def _listed(file: Path, bases: list[Path]) -> list[Path]:
    found = []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is no list of images ({error}); save it as UTF-8, one path a line") from None
    for line in lines:
        if name := line.strip().removeprefix("./"):
            places = [base / name for base in (file.parent, *bases)]
            found.append(next((place for place in places if place.exists()), places[0]))
    return found


def label_file(image: Path) -> Path:
    """The text file that goes with an image."""
    parts = list(image.parts)
    folders = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read(file: Path, split: str, names: dict[int, str], listing: _Listing, root: Path, keypoints: bool,
          notes: list[str]) -> dict[str, Any]:
    if listing.missing:
        raise FileNotFoundError(f"{file}: '{split}' names {few(listing.missing)}, which is not there, neither from "
                                f"'path' nor from {file.parent}; correct it in the yaml, or take it out")
    found = [image for folder in listing.folders for image in find_images(folder)] + listing.files
    paths = {Path(os.path.relpath(image, root)).as_posix(): image for image in found}
    if not paths:
        raise ValueError(f"{file}: '{split}' has no images in {few(listing.folders or [root])}; correct the folder in "
                         f"the yaml, or copy the images there")
    if len(paths) < len(found):
        notes = [*notes, f"{file}: '{split}' names {counted(len(found) - len(paths), 'image')} twice, taken once"]
    labels = {name: label_file(path) for name, path in paths.items()}
    if not any(label.is_file() for label in labels.values()):
        beside = {name: path.with_suffix(".txt") for name, path in paths.items()}
        if not any(label.is_file() for label in beside.values()):
            raise ValueError(f"{file}: '{split}' has {counted(len(paths), 'image')} and not one text file with objects; "
                             f"looked for {next(iter(labels.values()))} and its like; copy them there, or where no image "
                             f"has objects indeed, write one empty file")
        labels = beside
    notes = [*notes, *_unpaired(file, split, paths, labels)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    problems: list[str] = []
    order = sorted(paths)
    for image_id, (name, size) in enumerate(zip(order, image_sizes([paths[name] for name in order])), 1):
        label = labels[name]
        try:
            text = label.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{label}: {error}")
            continue
        if isinstance(size, str):
            problems.append(size)
            continue
        height, width = size
        images.append({"id": image_id, "file_name": name, "width": width, "height": height,
                       "source": f"{file.name}, {split}"})
        where = os.path.relpath(label, file.parent) if text else ""
        for i, line in enumerate(text.splitlines(), 1):
            values = line.split()
            if not values:
                continue
            try:
                row = _row(values[:5] if keypoints else values, width, height)
            except ValueError as error:
                problems.append(f"{where}, line {i}: {error}")
                continue
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **row, "iscrowd": 0,
                                "source": f"{where}, line {i}"})
    problems_found(file, problems, "correct them, or take them out")
    if keypoints:
        notes = [*notes, f"{file}: 'kpt_shape' says that rows have keypoints; boxes alone are taken"]
    return {"images": images, "annotations": annotations, "notes": notes,
            "categories": [{"id": i, "name": name} for i, name in sorted(names.items())]}


NO_LABELS = frozenset(("classes", "notes", *SPLIT_NAMES))       # beside the images' text files: names, lists of images


def _unpaired(file: Path, split: str, paths: dict[str, Path], labels: dict[str, Path]) -> list[Note]:
    """What there is to say of images without a text file, and of text files without an image."""
    notes = []
    without = sorted(name for name, label in labels.items() if not label.is_file())
    if without:
        notes.append(Note(f"{file}: '{split}': {len(without)} of {counted(len(paths), 'image')} have no text file, taken "
                          f"as without objects ({few(without)})", "images without a text file", without))
    around: dict[Path, set[Path]] = {}                                      # folder of text files -> those of the images
    for name, label in labels.items():
        around.setdefault(label.parent, set()).add(paths[name].parent)
    unused = []
    for folder, places in around.items():
        if folder.is_dir():
            images = [os.path.splitext(name) for place in places if place.is_dir() for name in os.listdir(place)]
            stems = NO_LABELS.union(stem for stem, ending in images if ending.lower() in IMAGE_SUFFIXES)
            unused += [os.path.relpath(folder / name, file.parent) for name in os.listdir(folder)
                       if name.endswith(".txt") and name[:-4] not in stems]
    if unused:
        unused.sort()
        notes.append(Note(f"{file}: '{split}': {counted(len(unused), 'text file has', 'text files have')} no image, not "
                          f"used ({few(unused)})", "text files without an image", unused))
    return notes


def _row(values: list[str], width: int, height: int) -> dict[str, Any]:
    """The numbers of a line -> class, box, area and where it is a polygon, segments."""
    if odd := [value for value in values if not _is_number(value)]:
        raise ValueError(f"{odd[0]!r} is no number")
    numbers = [float(value) for value in values]
    if not numbers[0].is_integer():
        raise ValueError(f"the class is {values[0]}, a whole number is needed")
    fractions = numbers[1:]
    if len(fractions) != 4 and (len(fractions) < 6 or len(fractions) % 2):
        raise ValueError(f"{counted(len(values), 'column')} where a box has 5 (class cx cy w h), a polygon 7, 9, 11, ..."
                         + ("; a score behind the box is what predictions have" if len(fractions) == 5 else ""))
    if any(not 1 - FAR <= value <= FAR for value in fractions):
        worst = max(fractions, key=lambda value: abs(value - 0.5))
        raise ValueError(f"{worst:g} is no fraction of the image's width or height; divide pixels by {width} and "
                         f"{height}")
    if len(fractions) == 4:
        cx, cy, w, h = fractions
        bbox = _rounded([(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height])
        return {"category_id": int(numbers[0]), "bbox": bbox, "area": bbox[2] * bbox[3]}
    xs, ys = _rounded([x * width for x in fractions[::2]]), _rounded([y * height for y in fractions[1::2]])
    bbox = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    polygon = [value for point in zip(xs, ys) for value in point]
    return {"category_id": int(numbers[0]), "bbox": bbox, "area": abs(_area(polygon)), "segmentation": [polygon]}


def _rounded(pixels: list[float]) -> list[float]:
    """To 1e-6 of a pixel, so that decimals of pixels that were written as fractions come back as they were."""
    return [round(value, 6) for value in pixels]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _area(polygon: list[float]) -> float:
    """By the shoelace formula, which is how COCO's areas were made; negative for one orientation."""
    xs, ys = polygon[::2], polygon[1::2]
    return sum(x * (below - above) for x, above, below in zip(xs, [ys[-1], *ys[:-1]], [*ys[1:], ys[0]])) / 2


# Writing.

def write(folder: Path, parts: dict[str, Part], put: Put) -> list[str]:
    """Write ``data.yaml``, ``images/<part>/`` and ``labels/<part>/`` below ``folder``; returns what there is to say.

    An object with polygons is written as one polygon where that keeps its box to 1e-3 px, several parts joined by seams
    without width; where it does not, and for masks as run lengths, the box is written.
    """
    need_stems(parts, "their text files")
    rows = sorted({row["id"]: row["name"] for part in parts.values() for row in part.data["categories"]}.items())
    index = {id: i for i, (id, _) in enumerate(rows)}
    notes = what_is_lost(parts, "YOLO", ["segmentation"])
    joined, boxed, outside, areas = [], [], 0, 0
    for split, part in parts.items():
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for image, objects in by_image(part.data):
            place = folder / "images" / split / inner_path(image["file_name"])
            put(part.images / image["file_name"], place)
            lines = []
            for row in objects:
                if is_region(row):
                    continue
                polygon = _one_polygon(row)
                if row.get("segmentation") and polygon is None:
                    boxed.append(row["id"])
                elif polygon is not None and len(row["segmentation"]) > 1:
                    joined.append(row["id"])
                x, y, w, h = row["bbox"]
                area = abs(_area(polygon)) if polygon else w * h
                areas += abs(row.get("area", area) - area) > 1e-3 * max(1, area)
                values = polygon or [x + w / 2, y + h / 2, w, h]
                sides = (image["width"], image["height"])
                outside += x < -1e-6 or y < -1e-6 or x + w > sides[0] + 1e-6 or y + h > sides[1] + 1e-6
                fractions = [f"{value / sides[i % 2]:.12f}".rstrip("0").rstrip(".") for i, value in enumerate(values)]
                lines.append(" ".join([str(index[row["category_id"]]), *fractions]) + "\n")
            label = label_file(Path(place.relative_to(folder)))
            (folder / label).parent.mkdir(parents=True, exist_ok=True)
            (folder / label).write_text("".join(lines), encoding="utf-8")
    content: dict[str, Any] = {split: f"images/{split}" for split in parts}     # without "path": from the yaml
    content["names"] = {i: name for i, (_, name) in enumerate(rows)}
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=10 ** 6)
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    if boxed:
        notes.append(f"lost: the segments of {counted(len(boxed), 'object')} (annotation {few(boxed)}), run lengths or "
                     f"polygons whose box is another than the object's; the boxes stay")
    if joined:
        notes.append(f"{counted(len(joined), 'object')} of several polygons became one, joined by seams without width "
                     f"(annotation {few(joined)})")
    if areas:
        notes.append(f"lost: the area of {counted(areas, 'object')}, which becomes that of the polygon or box")
    if outside:
        notes.append(f"{counted(outside, 'box leaves', 'boxes leave')} the image and {'is' if outside == 1 else 'are'} "
                     f"written so, with fractions below 0 or above 1, which other readers may refuse")
    if any(id != i for id, i in index.items()):
        notes.append("class ids became 0, 1, 2, ... in the same order")
    notes.append("ids of images and annotations are numbered anew in the order of the files' names")
    return notes


def _one_polygon(row: dict[str, Any]) -> list[float] | None:
    """The parts of an object as one polygon; None where there are none, or its box would be another than the row's."""
    parts = row.get("segmentation")
    if not isinstance(parts, list) or not parts or any(len(part) < 6 or len(part) % 2 for part in parts):
        return None
    xs, ys = [x for part in parts for x in part[::2]], [y for part in parts for y in part[1::2]]
    x, y, w, h = row["bbox"]
    if max(abs(min(xs) - x), abs(min(ys) - y), abs(max(xs) - x - w), abs(max(ys) - y - h)) > 1e-3:
        return None
    if len(parts) == 1:
        return list(parts[0])
    whole: list[float] = []
    returns: list[list[float]] = []
    for part in parts:                                                  # out along the seams, and back along the same
        points = [list(part[i:i + 2]) for i in range(0, len(part), 2)]
        points = points if _area(part) >= 0 else points[::-1]           # areas of all parts are to add up
        whole += [value for point in [*points, points[0]] for value in point]
        returns.append(points[0])
    return whole + [value for point in returns[-2::-1] for value in point]
