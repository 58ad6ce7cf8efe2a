"""What all formats of data sets share: their parts, finding images, sizes from headers, and what a writer is given."""
from __future__ import annotations

import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from datasets.annotations import counted, few
from datasets.images import DAMAGED

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What people call the parts -> what they are called here."""

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm",
                            ".jp2", ".avif", ".npy"))


class Split(NamedTuple):
    """One part of a data set."""
    source: Path                            # the file or folder that says what is on the images: for messages
    images: Path                            # the folder that file names are relative to
    read: Callable[[], dict[str, Any]]      # -> COCO's form, unchecked: images, annotations, categories; maybe notes


class Format(NamedTuple):
    """A data set as ``recognise`` found it."""
    name: str
    splits: dict[str, Split]                # those of SPLITS that are there


class Part(NamedTuple):
    """One part of a data set, read and checked: what a writer writes."""
    images: Path
    data: dict[str, Any]


Put = Callable[[Path, Path], None]
"""Brings an image file to a new place: by a copy or a link."""


# Reading.

def problems_found(source: Path, problems: Sequence[str], remedy: str) -> None:
    """ValueError with the first of ``problems``, which name file and row, unless there are none."""
    if problems:
        raise ValueError(f"{source}: {counted(len(problems), 'row')} cannot be read: {few(problems, 5)}; {remedy}")


def find_images(folder: Path) -> list[Path]:
    """All image files in and below ``folder``, links followed, in order of their names."""
    found, seen = [], set()
    for at, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(at)) in seen:
            folders.clear()                                             # a link that leads in a circle
            continue
        seen.add(real)
        found += [Path(at, name) for name in files if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    return sorted(found)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the picture that ``read_image`` gives for ``path``, upright, from the file's header alone.

    Raises FileNotFoundError where there is no file, and OSError where it is no image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image {path} is not there; correct the path or the name (upper and lower case "
                                f"differ), or copy the file there")
    try:
        if path.suffix.lower() == ".npy":
            height, width = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
            return height, width
        with Image.open(path) as image:
            width, height = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):                # some versions of Pillow turn its size
                width, height = (image.tag_v2[tag] for tag in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
            turned = image.format != "PNG" or _png_may_be_turned(path)          # of a PNG, Pillow reads all pixels
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if turned else 1
        return (width, height) if orientation in (5, 6, 7, 8) else (height, width)
    except DAMAGED as error:
        raise OSError(f"image {path} ({path.stat().st_size} bytes) cannot be read: {error}; copy it again, convert it to "
                      f"JPEG or PNG, or take it out") from error


def image_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | str]:
    """For each path its (height, width), or what is wrong with the file."""
    def size(path: Path) -> tuple[int, int] | str:
        try:
            return image_size(path)
        except OSError as error:
            return str(error)

    if len(paths) < 64:
        return [size(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:                                 # which wait for the disk together
        return list(pool.map(size, paths))


def _png_may_be_turned(path: Path) -> bool:
    """Whether a PNG has a chunk that could hold an orientation; pixels are jumped over."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return True
            start = file.read(min(length, 24)) if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
            if start.startswith((b"Raw profile type exif", b"XML:com.adobe.xmp")):
                return True
            file.seek(length - len(start) + 4, 1)
    return False


# Writing.

def by_image(data: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each image's row with the rows of its objects, in the order of ``data``."""
    rows: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in data["images"]}
    for row in data["annotations"]:
        rows[row["image_id"]].append(row)
    return [(image, rows[image["id"]]) for image in data["images"]]


def is_region(row: dict[str, Any]) -> bool:
    """Whether an annotation is no object, but a region to be ignored: a crowd, or a row with ``"ignore": 1``."""
    return bool(row.get("iscrowd") or row.get("ignore"))


def number(value: float) -> str:
    """In decimals, to 1e-6 of a pixel; whole numbers as such."""
    text = f"{value:.6f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def inner_path(file_name: str) -> PurePosixPath:
    """A file name as a path below a folder. Raises ValueError where it leads out of it."""
    path = PurePosixPath(file_name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts or re.match(r"[A-Za-z]:", file_name):
        raise ValueError(f"image {file_name!r} has a name that leads out of its folder, where a copy could not be put; "
                         f"make it relative to the folder of the images, without '..'")
    return path


def need_stems(parts: dict[str, Part], what: str) -> None:
    """ValueError where images of one part differ by their ending alone, so that their ``what`` would be the same file."""
    for split, part in parts.items():
        stems = Counter(str(inner_path(image["file_name"]).with_suffix("")) for image in part.data["images"])
        if twice := [stem for stem, n in stems.items() if n > 1]:
            raise ValueError(f"{split}: {counted(len(twice), 'name')} of images differ by the ending alone "
                             f"({few(twice)}), so that {what} would be the same file; rename one of each")


def need_plain_names(names: Iterable[str], what: str) -> None:
    """ValueError where a class name would not be read as it was written."""
    odd = [name for name in names if name != name.strip() or not name or re.search(r"[\x00-\x1f]", name)]
    if odd:
        raise ValueError(f"{what} cannot hold the class {counted(len(odd), 'name')} {few([repr(name) for name in odd])}: "
                         f"empty, with a space at an end, or with a control character; rename in 'categories'")


KNOWN = {
    "images": {"id", "file_name", "width", "height", "source"},
    "annotations": {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "difficult", "segmentation",
                    "source"},
    "categories": {"id", "name"},
}


def losses(parts: dict[str, Part], what: str, held: Iterable[str] = ()) -> list[str]:
    """What ``what`` cannot hold of these parts, with counts; ``held`` are the fields of annotations that it can:
    "difficult", "segmentation"."""
    held, notes = set(held), []
    rows = [row for part in parts.values() for row in part.data["annotations"]]
    regions = [row["id"] for row in rows if is_region(row)]
    if regions:
        notes.append(f"left out: {counted(len(regions), 'crowd or region to ignore', 'crowds and regions to ignore')} "
                     f"(annotation {few(regions)}), which {what} would make objects of")
    rows = [row for row in rows if not is_region(row)]
    difficult = [row["id"] for row in rows if row.get("difficult")]
    if difficult and "difficult" not in held:
        notes.append(f"lost: the mark 'difficult' of {counted(len(difficult), 'object')} (annotation {few(difficult)})")
    segments = [row["id"] for row in rows if row.get("segmentation")]
    if segments and "segmentation" not in held:
        notes.append(f"lost: the segments of {counted(len(segments), 'object')} (annotation {few(segments)}), the boxes "
                     f"stay")
    areas = [row["id"] for row in rows if "segmentation" not in held and "area" in row
             and abs(row["area"] - row["bbox"][2] * row["bbox"][3]) > 1e-3 * max(1, abs(row["area"]))]
    if areas:
        notes.append(f"lost: the area of {counted(len(areas), 'object')}, which becomes that of the box")
    for kind, known in KNOWN.items():
        rows = [row for part in parts.values() for row in part.data[kind]]
        if kind == "categories":                                                        # which all parts have
            rows = list({row["id"]: row for row in rows}.values())
        more = Counter(key for row in rows for key in row if key not in known)
        if more:
            notes.append(f"lost: of '{kind}' " + ", ".join(f"{key} ({n})" for key, n in sorted(more.items())))
    more = Counter(key for part in parts.values() for key in part.data
                   if key not in ("images", "annotations", "categories", "notes") and part.data[key])
    if more:
        notes.append(f"lost: {', '.join(sorted(more))}")
    return notes
