"""Pascal VOC's XML files <-> COCO's form (Everingham et al., 2010).

``Annotations/*.xml`` say what is on the images of ``JPEGImages/``, and ``ImageSets/Main/train.txt``, ``val.txt`` which
belong to a part; or each part is a folder, ``train/ valid/ test/``, with XML files in it, beside the images.

Pixels: the official files, whose ``<source><database>`` begins with "The VOC", count pixels from 1 and include the last
one, so their box is ``[xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]``. All others, of labelImg and of exporters,
write corners: ``[xmin, ymin, xmax - xmin, ymax - ymin]``. Neither says which it is; the database's name does.
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from datasets.annotations import counted, few
from datasets.split import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    SPLITS,
    Part,
    Put,
    Split,
    by_image,
    image_size,
    inner_path,
    is_region,
    losses,
    need_plain_names,
    need_stems,
    number,
    problems_found,
)

OFFICIAL = "The VOC"                        # the database's name in official files begins so


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
        files = {split: sets / f"{split}.txt" for split in SPLITS}
        if not files["train"].is_file() and not files["val"].is_file():
            files["train"] = sets / "trainval.txt"
        listings = {split: _Listing(file, xmls, images, file) for split, file in files.items() if file.is_file()}
        listings = listings or {"train": _Listing(xmls, xmls, images, None)}
    else:
        for name in sorted(inside & SPLIT_NAMES.keys(), reverse=True):
            folder = root / name
            xmls = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
            if _has_xml(xmls):
                images = next((folder / some for some in ("JPEGImages", "images") if (folder / some).is_dir()), folder)
                listings[SPLIT_NAMES[name]] = _Listing(xmls, xmls, images, None)
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

    def files(self, split: str) -> list[Path]:
        """The XML files of a part; some may not be there."""
        listing = self.listings[split]
        if listing.names is None:
            return list(_xmls(listing.xmls))
        files = []
        for line in filter(None, map(str.strip, listing.names.read_text(encoding="utf-8-sig").splitlines())):
            whole = listing.xmls / f"{line}.xml"                        # official lists of a class have a second column
            files.append(whole if whole.is_file() or len(line.split()) == 1 else listing.xmls / f"{line.split()[0]}.xml")
        return files

    @cached_property
    def names(self) -> list[str]:
        found: set[str] = set()
        for split in self.listings:
            for file in self.files(split):
                try:
                    found.update(_text(object, "name") for object in ElementTree.parse(file).getroot().iter("object"))
                except (OSError, ElementTree.ParseError):
                    continue                                            # which reading this part says
        return sorted(found - {""})

    def read(self, split: str) -> dict[str, Any]:
        listing = self.listings[split]
        ids = {name: i for i, name in enumerate(self.names, 1)}
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        problems: list[str] = []
        official = 0
        files = sorted(set(self.files(split)))
        for file in files:
            where = os.path.relpath(file, self.root)
            if not file.is_file():
                problems.append(f"{where} is not there")
                continue
            try:
                tree = ElementTree.parse(file).getroot()
                name = _image_file(tree, file, listing)
                height, width = _size(tree, listing.images / name)
            except (OSError, ValueError, ElementTree.ParseError) as error:
                problems.append(f"{where}: {error}")
                continue
            first = int((tree.findtext("source/database") or "").strip().startswith(OFFICIAL))
            official += first
            image_id = len(images) + 1
            images.append({"id": image_id, "file_name": name, "width": width, "height": height, "source": where})
            for i, object in enumerate(tree.findall("object"), 1):
                try:
                    class_name, xmin, ymin, xmax, ymax = _object(object)
                except ValueError as error:
                    problems.append(f"{where}, object {i}: {error}")
                    continue
                w, h = xmax - xmin + first, ymax - ymin + first
                row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[class_name],
                       "bbox": [xmin - first, ymin - first, w, h], "area": w * h, "iscrowd": 0,
                       "source": f"{where}, object {i}"}
                if _text(object, "difficult") == "1":
                    row["difficult"] = 1
                annotations.append(row)
        problems_found(listing.source, problems, "correct them, or take them out")
        notes = [f"{listing.source}: {official} of {counted(len(images), 'file')} of VOC's own database, which counts "
                 f"pixels from 1; boxes became corners"] if official else []
        return {"images": images, "annotations": annotations, "notes": notes,
                "categories": [{"id": i, "name": name} for name, i in ids.items()]}


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _image_file(tree: ElementTree.Element, file: Path, listing: _Listing) -> str:
    """The image that an XML file is about, from the folder of images. As in the official readers it has the XML's own
    name; where there is no such image, the one it says."""
    said = _text(tree, "filename").replace("\\", "/")
    inner = file.relative_to(listing.xmls).with_suffix("").as_posix()
    suffixes = dict.fromkeys([os.path.splitext(said)[1], ".jpg", ".jpeg", ".png", *sorted(IMAGE_SUFFIXES)])
    names = [inner + suffix for suffix in suffixes if suffix.lower() in IMAGE_SUFFIXES]
    names += [said, (Path(inner).parent / said).as_posix()] if said else []
    path = _text(tree, "path")
    if path and Path(path).is_absolute():
        names.append(path)
    return next((name for name in names if (listing.images / name).is_file()), said or names[0])


def _size(tree: ElementTree.Element, image: Path) -> tuple[int, int]:
    """(height, width) as the file says, or where it does not, as the image has."""
    width, height = _text(tree, "size/width"), _text(tree, "size/height")
    try:
        size = round(float(height)), round(float(width))
    except ValueError:
        size = 0, 0
    return size if min(size) > 0 else image_size(image)


def _object(object: ElementTree.Element) -> tuple[str, float, float, float, float]:
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
    return name, xmin, ymin, xmax, ymax


# Writing.

def write(folder: Path, parts: dict[str, Part], put: Put) -> list[str]:
    """Write ``Annotations/``, ``ImageSets/Main/`` and ``JPEGImages/`` below ``folder``; returns what there is to say.

    Boxes are written as corners, with decimals where they have some. Where several parts have images of one name, each
    part gets a folder of its own within.
    """
    need_stems(parts, "their XML files")
    names = {row["id"]: row["name"] for part in parts.values() for row in part.data["categories"]}
    need_plain_names(names.values(), "Pascal VOC")
    notes = losses(parts, "Pascal VOC", ["difficult"])
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
