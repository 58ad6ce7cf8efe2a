"""Pascal VOC's XML files <-> COCO's form (Everingham et al., 2010).

``Annotations/*.xml`` say what is on the images of ``JPEGImages/``, and ``ImageSets/Main/train.txt``, ``val.txt`` which
belong to a part; or each part is a folder, ``train/ valid/ test/``, with XML files in it, beside the images.

Pixels: the official files, whose ``<source><database>`` begins with "The VOC", count pixels from 1 and include the last
one, so their box is ``[xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]``. All others, of labelImg and of exporters,
write corners: ``[xmin, ymin, xmax - xmin, ymax - ymin]``. Neither says which it is; the database's name does.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from datasets.examination import counted, few
from datasets.images import image_size
from datasets.split import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    SPLITS,
    Note,
    Part,
    Put,
    Split,
    by_image,
    inner_path,
    is_region,
    need_plain_names,
    need_stems,
    number,
    one_each,
    packed,
    problems_found,
    stamp,
    unpacked,
    what_is_lost,
)

OFFICIAL = "The VOC"                        # the database's name in official files begins so
REMEDY = "rename the one that is not meant"


class _Listing(NamedTuple):
    """A part: which XML files, and where the images are."""
    source: Path
    xmls: Path
    images: Path
    names: Path | None                      # ImageSets/Main/<part>.txt; without it, all XML files are meant


def find(path: Path) -> dict[str, Split]:
    """The parts of the Pascal VOC data set in this folder, or whose folder ``Annotations`` this is; none where there are
    no such files."""
    if not path.is_dir():
        return {}
    root = path.parent if path.name == "Annotations" else path
    inside = set(os.listdir(root))
    listings: dict[str, _Listing] = {}
    if "Annotations" in inside and _has_xml(root / "Annotations"):
        xmls = root / "Annotations"
        beside = any(os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for name in os.listdir(xmls))
        images = next((root / name for name in ("JPEGImages", "images") if name in inside),
                      xmls if beside else root / "JPEGImages")
        sets = root / "ImageSets" / "Main"
        files = one_each(root, ((split, sets / f"{name}.txt") for name, split in SPLIT_NAMES.items()
                                if (sets / f"{name}.txt").is_file()), remedy=REMEDY)
        if not files.keys() & {"train", "val"} and (sets / "trainval.txt").is_file():
            files["train"] = sets / "trainval.txt"
        listings = {split: _Listing(file, xmls, images, file) for split, file in files.items()}
        listings = listings or {"train": _Listing(xmls, xmls, images, None)}
    else:
        folders = {name: root / name / "Annotations" if (root / name / "Annotations").is_dir() else root / name
                   for name in sorted(inside & SPLIT_NAMES.keys())}
        parts = one_each(root, ((SPLIT_NAMES[name], root / name) for name, xmls in folders.items() if _has_xml(xmls)),
                         remedy=REMEDY)
        for split, folder in parts.items():
            images = next((folder / some for some in ("JPEGImages", "images") if (folder / some).is_dir()), folder)
            listings[split] = _Listing(folders[folder.name], folders[folder.name], images, None)
        if not listings and any(name.endswith(".xml") for name in inside):
            listings = {"train": _Listing(root, root, root, None)}
    reader = _Reader(root, listings)
    return {split: Split(listing.source, listing.images, partial(reader.read, split))
            for split, listing in listings.items()}


def _has_xml(folder: Path) -> bool:
    return folder.is_dir() and next(_xmls(folder), None) is not None


def _xmls(folder: Path) -> Iterator[Path]:
    for at, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(at, name) for name in sorted(files) if name.endswith(".xml"))


class _Reader:
    """Reads one part; the classes are those of all parts, so that each part numbers them alike."""

    def __init__(self, root: Path, listings: dict[str, _Listing]) -> None:
        self.root, self.listings = root, listings

    def names(self) -> list[str]:
        """The classes of all parts, in order."""
        return sorted(set().union(*(_parsed(listing)[0] for listing in self.listings.values())))

    def read(self, split: str) -> dict[str, Any]:
        """A part in COCO's form. ValueError names the files and objects that cannot be read."""
        listing = self.listings[split]
        ids = {name: i for i, name in enumerate(self.names(), 1)}
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        problems: list[str] = []
        official = 0
        elsewhere: list[str] = []
        for found in unpacked(_parsed(listing)[1]):
            file = Path(found["file"])
            where = os.path.relpath(file, self.root)
            if "problem" in found:
                problems.append(f"{where}{found['problem']}")
                continue
            try:
                name = _image_file(found, file, listing)
                height, width = found["size"] or image_size(listing.images / name)
            except (OSError, ValueError) as error:
                problems.append(f"{where}: {error}")
                continue
            if os.path.isabs(name) and os.path.isfile(name):
                elsewhere.append(name)
            first = int(found["official"])
            official += first
            image_id = len(images) + 1
            images.append({"id": image_id, "file_name": name, "width": width, "height": height, "source": where})
            problems += [f"{where}, {problem}" for problem in found["problems"]]
            for i, class_name, difficult, xmin, ymin, xmax, ymax in found["objects"]:
                w, h = xmax - xmin + first, ymax - ymin + first
                row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[class_name],
                       "bbox": [xmin - first, ymin - first, w, h], "area": w * h, "iscrowd": 0,
                       "source": f"{where}, object {i}"}
                if difficult:
                    row["difficult"] = 1
                annotations.append(row)
        problems_found(listing.source, problems, "correct them, or take them out")
        notes = [f"{listing.source}: {official} of {counted(len(images), 'file')} of VOC's own database, which counts "
                 f"pixels from 1; boxes became corners"] if official else []
        if elsewhere:
            notes.append(Note(f"{listing.source}: {counted(len(elsewhere), 'image')} not in {listing.images}, taken from "
                              f"where <path> says ({few(elsewhere)})", "images from <path>", elsewhere))
        return {"images": images, "annotations": annotations, "notes": notes,
                "categories": [{"id": i, "name": name} for name, i in ids.items()]}


def _files(listing: _Listing) -> list[Path]:
    """The XML files of a part; some may not be there."""
    if listing.names is None:
        return list(_xmls(listing.xmls))
    files = set()
    for line in filter(None, map(str.strip, listing.names.read_text(encoding="utf-8-sig").splitlines())):
        whole = listing.xmls / f"{line}.xml"                            # official lists of a class have a second column
        files.add(whole if whole.is_file() or len(line.split()) == 1 else listing.xmls / f"{line.split()[0]}.xml")
    return sorted(files)


def _parsed(listing: _Listing) -> tuple[frozenset[str], bytes]:
    """What the XML files of a part say, parsed once as long as they are the same: the names of classes, and packed, for
    each file, what ``_content`` gives."""
    stamps = [(os.fspath(file), *stamp(file)) for file in _files(listing)]
    return _parsed_once(listing, hashlib.blake2b(repr(stamps).encode(), digest_size=16).digest())


@lru_cache(maxsize=2 * len(SPLITS))
def _parsed_once(listing: _Listing, _: bytes) -> tuple[frozenset[str], bytes]:
    contents: list[dict[str, Any]] = []
    names: set[str] = set()
    for file in _files(listing):
        try:
            content = _content(ElementTree.parse(file).getroot())
            names.update(name for _, name, *_ in content["objects"])
        except FileNotFoundError:
            content = {"problem": " is not there"}
        except (OSError, ValueError, ElementTree.ParseError) as error:
            content = {"problem": f": {error}"}
        contents.append({"file": os.fspath(file), **content})
    return frozenset(names), packed(contents)


def _content(tree: ElementTree.Element) -> dict[str, Any]:
    """What an XML file says: the image's name, path and size, where it has one, and rows of its objects."""
    objects, problems = [], []
    for i, object in enumerate(tree.findall("object"), 1):
        try:
            objects.append((i, *_object(object)))
        except ValueError as error:
            problems.append(f"object {i}: {error}")
    database = (tree.findtext("source/database") or "").strip()
    return {"filename": _text(tree, "filename").replace("\\", "/"), "path": _text(tree, "path"), "size": _size(tree),
            "official": database.startswith(OFFICIAL), "objects": objects, "problems": problems}


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _image_file(found: dict[str, Any], file: Path, listing: _Listing) -> str:
    """The image that an XML file is about, from the folder of images. As in the official readers it has the XML's own
    name; where there is no such image, the one it says."""
    said, path = found["filename"], found["path"]
    inner = file.relative_to(listing.xmls).with_suffix("").as_posix()
    suffixes = dict.fromkeys([os.path.splitext(said)[1], ".jpg", ".jpeg", ".png", *sorted(IMAGE_SUFFIXES)])
    names = [inner + suffix for suffix in suffixes if suffix.lower() in IMAGE_SUFFIXES]
    names += [said, (Path(inner).parent / said).as_posix()] if said else []
    if path and Path(path).is_absolute():
        names.append(path)
    return next((name for name in names if (listing.images / name).is_file()), said or names[0])


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """(height, width) as the file says; None where it does not, so that the image's own is taken."""
    try:
        size = round(float(_text(tree, "size/height"))), round(float(_text(tree, "size/width")))
    except (ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def _object(object: ElementTree.Element) -> tuple[str, bool, float, float, float, float]:
    """Class, whether it is difficult, and corners."""
    name = _text(object, "name")
    if not name:
        raise ValueError("has no <name>; add the class")
    if object.find("bndbox") is None:
        raise ValueError(f"({name}) has no <bndbox>; add the box")
    corners = [_text(object, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        xmin, ymin, xmax, ymax = map(float, corners)
    except ValueError:
        raise ValueError(f"({name}) has the box {corners}; xmin, ymin, xmax and ymax are needed as numbers") from None
    return name, _text(object, "difficult") == "1", xmin, ymin, xmax, ymax


# Writing.

def write(folder: Path, parts: dict[str, Part], put: Put) -> list[str]:
    """Write ``Annotations/``, ``ImageSets/Main/`` and ``JPEGImages/`` below ``folder``; returns what there is to say.

    Boxes are written as corners, with decimals where they have some. Where several parts have images of one name, each
    part gets a folder of its own within.
    """
    need_stems(parts, "their XML files")
    names = {row["id"]: row["name"] for part in parts.values() for row in part.data["categories"]}
    need_plain_names(names.values(), "Pascal VOC")
    notes = what_is_lost(parts, "Pascal VOC", ["difficult"])
    stems = [inner_path(image["file_name"]).with_suffix("") for part in parts.values() for image in part.data["images"]]
    apart = len(set(stems)) < len(stems)
    if apart:
        notes.append(f"several parts have images of the same name; each part has a folder of its own within JPEGImages/ "
                     f"and Annotations/ ({', '.join(parts)})")
    used: set[int] = set()
    for split, part in parts.items():
        listed = []
        for image, objects in by_image(part.data):
            inner = (split if apart else "") / inner_path(image["file_name"])
            put(part.images / image["file_name"], folder / "JPEGImages" / inner)
            kept = [row for row in objects if not is_region(row)]
            used.update(row["category_id"] for row in kept)
            file = folder / "Annotations" / inner.with_suffix(".xml")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_xml(inner.as_posix(), image, kept, names), encoding="utf-8")
            listed.append(inner.with_suffix("").as_posix())
        listing = folder / "ImageSets" / "Main" / f"{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("".join(f"{stem}\n" for stem in listed), encoding="utf-8")
    unused = [name for id, name in names.items() if id not in used]
    if unused:
        notes.append(f"lost: {counted(len(unused), 'class', 'classes')} without objects ({few(unused, 8)})")
    notes.append("ids are not kept: classes are numbered in the order of their names, images in that of the files'")
    return notes


def _xml(name: str, image: dict[str, Any], objects: list[dict[str, Any]], names: dict[int, str]) -> str:
    lines = ["<annotation>", f"\t<filename>{escape(name)}</filename>",
             f"\t<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"]
    for row in objects:
        x, y, w, h = row["bbox"]
        box = "".join(f"<{side}>{number(value)}</{side}>"
                      for side, value in (("xmin", x), ("ymin", y), ("xmax", x + w), ("ymax", y + h)))
        lines += ["\t<object>", f"\t\t<name>{escape(names[row['category_id']])}</name>",
                  f"\t\t<difficult>{int(bool(row.get('difficult')))}</difficult>", f"\t\t<bndbox>{box}</bndbox>",
                  "\t</object>"]
    return "\n".join([*lines, "</annotation>", ""])
