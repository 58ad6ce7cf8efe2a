"""What all formats of data sets share: their parts, finding images, and what a writer is given."""
from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from datasets.examination import counted, few

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

class Note(str):
    """What a reader says in "notes" about files that a user may have meant otherwise: a text, the few words that are the
    same for every note of the ``kind``, and the files by name."""

    def __new__(cls, text: str, kind: str, rows: Sequence[str]) -> Note:
        note = super().__new__(cls, text)
        note.kind, note.rows = kind, list(rows)
        return note

    kind: str
    rows: list[str]


def one_each(root: Path, found: Iterable[tuple[str, Path]], meant: Path | None = None,
             remedy: str = "name the one that is meant") -> dict[str, Path]:
    """Pairs of a part and its file or folder -> the only one of each part, or the one that is ``meant``. Raises
    ValueError where there are several."""
    parts: dict[str, Path] = {}
    for split, path in found:
        if split not in parts or path == meant:
            parts[split] = path
        elif parts[split] != meant:
            several = ", ".join(os.path.relpath(one, root) for one in (parts[split], path))
            raise ValueError(f"{root} has several files or folders for the part '{split}': {several}; {remedy}")
    return parts


def packed(content: Any) -> bytes:
    """Lists, dicts, texts and numbers in little memory, which workers share. For what is read again soon: checking a
    data set, opening its parts and scoring each read it."""
    return zlib.compress(json.dumps(content).encode(), 1)


def unpacked(content: bytes) -> Any:
    """The inverse of ``packed``; tuples come back as lists."""
    return json.loads(zlib.decompress(content))


def stamp(file: Path) -> tuple[int, int]:
    """Time of change and bytes, zeros where there is no such file: as long as they are the same, so is its content."""
    try:
        status = file.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


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


def what_is_lost(parts: dict[str, Part], what: str, held: Iterable[str] = ()) -> list[str]:
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
