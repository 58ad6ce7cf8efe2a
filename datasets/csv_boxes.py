"""Tables of boxes <-> COCO's form: ``train.csv``, ``val.csv``, ``test.csv`` with a header and a row for each box.

Columns are known by their names, in any order and case. The file: ``filename``, ``file``, ``image``, ``image_path``,
``path``. The class: ``class``, ``label``, ``name``, ``category``. The box in pixels: ``xmin, ymin, xmax, ymax`` or
``x1, y1, x2, y2`` (corners), or ``x, y, width, height``. The image's size, where there is one: ``image_width,
image_height``, or beside corners ``width, height``; else it is read from the image. A row with a file and neither class
nor box is an image without objects.
"""
from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from datasets.examination import counted, few
from datasets.images import image_sizes
from datasets.split import (
    SPLIT_NAMES,
    SPLITS,
    Part,
    Put,
    Split,
    by_image,
    inner_path,
    is_region,
    need_plain_names,
    number,
    one_each,
    packed,
    problems_found,
    stamp,
    unpacked,
    what_is_lost,
)

FILE = ("filename", "file", "file_name", "image", "image_path", "path", "image_name")
CLASS = ("class", "label", "name", "category", "class_name")
CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("x_min", "y_min", "x_max", "y_max"))
LEFT_TOP = (("x", "y", "w", "h"), ("x", "y", "width", "height"))       # with w and h, width is the image's
SIZE = ("image_width", "image_height")


def find(path: Path) -> dict[str, Split]:
    """The parts of a data set in CSV: the file at ``path`` and, where its name or folder is that of a part, those of the
    others; or those in the folder ``path``; or ``_annotations.csv`` in its folders ``train/ valid/ test/``."""
    if path.is_file():
        if path.suffix.lower() != ".csv":
            return {}
        below = path.name == "_annotations.csv" and path.parent.name in SPLIT_NAMES
        if not below and _part(path.stem) is None:
            reader = _Reader({"train": path})
            return {"train": Split(path, reader.images["train"], partial(reader.read, "train"))}
        meant, path = path, path.parent.parent if below else path.parent
    else:
        meant = None
    named = ((_part(file.parent.name if file.name == "_annotations.csv" else file.stem), file)
             for file in sorted([*path.glob("*.csv"), *path.glob("*/_annotations.csv")]))
    files = one_each(path, ((split, file) for split, file in named if split is not None), meant)
    reader = _Reader(files)
    return {split: Split(file, reader.images[split], partial(reader.read, split)) for split, file in files.items()}


def _part(stem: str) -> str | None:
    match = re.fullmatch(r"([a-z]+?)([_-](labels|annotations|boxes))?", stem.lower())
    return SPLIT_NAMES.get(match[1]) if match else None


def _lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The header and the rows that are not empty, with the number of their last line. Raises ValueError."""
    with open(file, encoding="utf-8-sig", newline="") as content:
        reader = None
        try:
            first = content.readline()
            reader = csv.reader(chain([first], content), delimiter=max(",;\t", key=first.count), strict=True)
            for row in reader:
                cells = [cell.strip() for cell in row]
                if any(cells) or reader.line_num == 1:
                    yield reader.line_num, cells
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: {error}; save it as UTF-8") from None
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num if reader else 1}: {error}; a quotation mark is not closed, "
                             f"or stands within a name") from None


@lru_cache(maxsize=2 * len(SPLITS))
def _parsed_once(file: Path, _: tuple[int, int]) -> tuple[frozenset[str], bytes]:
    """A file's classes and its lines, packed, as long as the file is the same."""
    lines = list(_lines(file))
    table = _Table(file, lines)
    names = frozenset(row[table.columns["class"]] for _, row in table.rows if len(row) == table.width)
    return names - {""}, packed(lines)


class _Table:
    """The rows of a file as text, and what its columns are."""

    def __init__(self, file: Path, lines: Iterable[tuple[int, list[str]]]) -> None:
        self.file = file
        self.rows = iter(lines)
        _, header = next(self.rows, (1, []))
        header = [name.lower() for name in header]
        self.width = len(header)
        self.columns = self._columns(header)
        told = ", ".join(f"{what} from {names}" for what, names in self.told.items())
        self.note = f"{file}: columns understood as {told}"
        if ignored := [name for i, name in enumerate(header) if name and i not in self.columns.values()]:
            self.note += f"; not used: {few(ignored, 8)}"

    def _columns(self, header: list[str]) -> dict[str, int]:
        """file, class, a, b, c, d (the box), and maybe width and height (of the image) -> number of the column."""
        def only(what: str, names: tuple[str, ...]) -> str:
            there = [name for name in names if name in header]
            if len(there) != 1 or header.count(there[0]) > 1:
                raise ValueError(f"{self.file}: the header {', '.join(header) or '(empty)'} has "
                                 f"{'no column' if not there else 'several columns'} for the {what}; name one of them "
                                 f"{' or '.join(names[:4])}" + (f" and the others ({', '.join(there)}) differently"
                                                                if there else ""))
            return there[0]

        boxes = [names for names in CORNERS if set(names) <= set(header)]
        self.corners = bool(boxes)
        boxes = boxes or [names for names in LEFT_TOP if set(names) <= set(header)][:1]
        if len(boxes) != 1:
            raise ValueError(f"{self.file}: the header {', '.join(header) or '(empty)'} has "
                             f"{'no columns' if not boxes else 'several sets of columns'} for the box; name them "
                             f"xmin, ymin, xmax, ymax (corners) or x, y, width, height, in pixels"
                             + ("" if header else "; the first row must name the columns"))
        file, kind = only("file", FILE), only("class", CLASS)
        self.told = {"file": file, "class": kind, "corners" if self.corners else "left, top, width, height":
                     ", ".join(boxes[0])}
        columns = {"file": header.index(file), "class": header.index(kind)}
        columns |= {key: header.index(name) for key, name in zip("abcd", boxes[0])}
        size = next((names for names in (SIZE, ("width", "height")) if set(names) <= set(header)
                     and not set(names) & set(boxes[0])), None)
        if size:
            columns |= {"width": header.index(size[0]), "height": header.index(size[1])}
            self.told["the image's size"] = ", ".join(size)
        else:
            self.told["the image's size"] = "the image files"
        return columns


class _Reader:
    """Reads one part; the classes are those of all parts, so that each part numbers them alike."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files
        self.images = {split: self._images(split, file) for split, file in files.items()}

    @staticmethod
    def _images(split: str, file: Path) -> Path:
        """The folder below which most of the first files lie."""
        home = file.parent
        places = [home, *(home / place / name for name in (split, file.stem, "valid" * (split == "val"))
                          for place in ("", "images") if name), home / "images"]
        names: dict[str, None] = {}
        try:
            table = _Table(file, _lines(file))
            for _, row in table.rows:
                if len(row) == table.width:
                    names[row[table.columns["file"]]] = None
                if len(names) == 50:
                    break
        except ValueError:
            return home                                                 # what is wrong is said when it is read
        there = {place: sum((place / name).is_file() for name in names) for place in places if place.is_dir()}
        return max(there, key=lambda place: there[place], default=home)

    def names(self) -> list[str]:
        """The classes of all parts, in order."""
        found: set[str] = set()
        for file in self.files.values():
            try:
                found |= _parsed_once(file, stamp(file))[0]
            except (OSError, ValueError):
                continue                                                # which reading this part says
        return sorted(found)

    def read(self, split: str) -> dict[str, Any]:
        """A part in COCO's form. ValueError names the lines that cannot be read."""
        file, root = self.files[split], self.images[split]
        table = _Table(file, unpacked(_parsed_once(file, stamp(file))[1]))
        ids = {name: i for i, name in enumerate(self.names(), 1)}
        problems: list[str] = []
        rows: list[tuple[str, str, dict[str, Any] | None]] = []
        said: dict[str, tuple[tuple[int, int], int]] = {}
        for line, cells in table.rows:
            where = f"{file.name}, line {line}"
            try:
                name, size, row = _row(table, cells)
                if size and said.setdefault(name, (size, line))[0] != size:
                    before, first = said[name]
                    raise ValueError(f"says {name} is {size[1]} x {size[0]}, but line {first} {before[1]} x {before[0]}")
            except ValueError as error:
                problems.append(f"{where}: {error}")
                continue
            rows.append((where, name, row))
        order = sorted({name for _, name, _ in rows})
        unsized = [name for name in order if name not in said]
        sizes = {name: first for name, (first, _) in said.items()}
        for name, found in zip(unsized, image_sizes([root / name for name in unsized])):
            if isinstance(found, str):
                problems.append(found)
            else:
                sizes[name] = found
        problems_found(file, problems, "correct them, or take them out")
        place = {name: i for i, name in enumerate(order, 1)}
        images = []
        for name in order:
            height, width = sizes[name]
            images.append({"id": place[name], "file_name": name, "width": width, "height": height,
                           "source": f"{file.name}, {name}"})
        annotations: list[dict[str, Any]] = []
        for where, name, row in rows:
            if row is not None:
                annotations.append({"id": len(annotations) + 1, "image_id": place[name],
                                    "category_id": ids[row["class"]], "bbox": row["bbox"],
                                    "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0, "source": where})
        return {"images": images, "annotations": annotations, "notes": [table.note],
                "categories": [{"id": i, "name": name} for name, i in ids.items()]}


def _row(table: _Table, cells: list[str]) -> tuple[str, tuple[int, int] | None, dict[str, Any] | None]:
    """A line's cells -> file, the image's (height, width) and class with box, where it has these."""
    if len(cells) != table.width:
        raise ValueError(f"has {counted(len(cells), 'column')} where the header has {table.width}; a comma within a name "
                         f"needs quotes around it")
    cell = {key: cells[i] for key, i in table.columns.items()}
    if not cell["file"]:
        raise ValueError("names no file")
    size = None
    if cell.get("width") and cell.get("height"):
        try:
            size = round(float(cell["height"])), round(float(cell["width"]))
        except (ValueError, OverflowError):
            raise ValueError(f"has the image size {cell['width']} x {cell['height']}, which are no numbers") from None
    box = [cell[key] for key in "abcd"]
    if not cell["class"] and not any(box):
        return cell["file"], size, None
    if not cell["class"] or not all(box):
        raise ValueError("has a box without a class; add it" if all(box) else
                         "has a class without all four numbers of the box; add them, or leave class and box empty for an "
                         "image without objects")
    try:
        a, b, c, d = map(float, box)
    except ValueError:
        raise ValueError(f"has the box {', '.join(box)}; four numbers of pixels are needed") from None
    bbox = [a, b, c - a, d - b] if table.corners else [a, b, c, d]
    return cell["file"], size, {"class": cell["class"], "bbox": bbox}


# Writing.

HEADER = ("filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax")


def write(folder: Path, parts: dict[str, Part], put: Put) -> list[str]:
    """Write ``train.csv`` and the like with the images in ``train/`` and the like; returns what there is to say."""
    names = {row["id"]: row["name"] for part in parts.values() for row in part.data["categories"]}
    need_plain_names(names.values(), "CSV")
    notes = what_is_lost(parts, "CSV")
    used: set[int] = set()
    for split, part in parts.items():
        (folder / split).mkdir(parents=True)
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(HEADER)
            for image, objects in by_image(part.data):
                name = inner_path(image["file_name"])
                put(part.images / image["file_name"], folder / split / name)
                start = [name.as_posix(), image["width"], image["height"]]
                kept = [row for row in objects if not is_region(row)]
                used.update(row["category_id"] for row in kept)
                for row in kept:
                    x, y, w, h = row["bbox"]
                    table.writerow([*start, names[row["category_id"]], *map(number, (x, y, x + w, y + h))])
                if not kept:
                    table.writerow([*start, *[""] * 5])
    unused = [name for id, name in names.items() if id not in used]
    if unused:
        notes.append(f"lost: {counted(len(unused), 'class', 'classes')} without objects ({few(unused, 8)})")
    notes.append("ids are not kept: classes are numbered in the order of their names, images in that of the files'")
    return notes
