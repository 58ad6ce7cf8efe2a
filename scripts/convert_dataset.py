#!/usr/bin/env python3
"""A data set in one format -> the same in another, all parts of it; what the other cannot hold is said, with counts.

    python scripts/convert_dataset.py SOURCE TARGET --to yolo
    python scripts/convert_dataset.py my_data/data.yaml my_coco --to coco --link

SOURCE is anything that --data takes (datasets/formats.py). TARGET is a new folder; it appears once all is written, and
nothing is left of it if that fails. Formats to write:

    coco            annotations/instances_train2017.json, train2017/, ...: the layout of COCO 2017
    coco_splits     train/_annotations.coco.json beside the images, valid/, test/
    yolo            data.yaml, images/train/, labels/train/, ...
    voc             Annotations/*.xml, ImageSets/Main/train.txt, JPEGImages/, ...
    csv             train.csv and train/, ...

Boxes stay within 1e-3 pixel, through any number of conversions. Names of classes stay; ids do where both sides are COCO,
else they are numbered as the format numbers them, which is said. Images are copied, or with --link linked to where they
are now.
"""
from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import csv_boxes, voc, yolo
from datasets.annotations import checked
from datasets.examination import counted, examine, few
from datasets.formats import recognise, write_coco
from datasets.images import image_sizes
from datasets.split import Part, Put, Split

TO = ("coco", "coco_splits", "yolo", "voc", "csv")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Convert a data set of boxes to another format.")
    parser.add_argument("source", metavar="SOURCE", help="folder of the data set, or the file in it that says what it is")
    parser.add_argument("target", metavar="TARGET", help="folder to write, which must not exist")
    parser.add_argument("--to", required=True, choices=TO, help="format to write")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--copy", dest="link", action="store_false", help="copy the images (default)")
    how.add_argument("--link", action="store_true", help="link to the images where they are now (symbolic links)")
    parser.set_defaults(link=False)
    return parser


def convert(source: str | Path, target: str | Path, to: str, link: bool = False) -> list[str]:
    """Write the data set ``source`` to the new folder ``target`` in the format ``to``; returns what there is to say.

    Raises FileExistsError where ``target`` is there already, and FileNotFoundError, OSError, ValueError where the source
    is not right or the format cannot hold it; nothing is written then. A part "test" that is not there is left out, which
    is said: a YOLO's yaml often names one.
    """
    target = Path(target)
    if to not in TO:
        raise ValueError(f"--to {to}: there is no such format; there are {', '.join(TO)}")
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already; name a folder that is not, or remove it")
    found = recognise(source)
    notes: list[str] = []
    parts = {}
    for split, part in found.splits.items():
        try:
            parts[split] = _read(part, notes)
        except FileNotFoundError as error:
            if split != "test" or len(found.splits) == 1:
                raise
            notes.append(f"left out: the part 'test', of which nothing is there: {error}")
    _check_classes(parts)
    notes.insert(0, f"{source}: {found.name}, " + "; ".join(
        f"{split}: {counted(len(part.data['images']), 'image')}, {counted(len(part.data['annotations']), 'annotation')}"
        for split, part in parts.items()))
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        put = _put(link)
        if to == "yolo":
            notes += yolo.write(partial, parts, put)
        elif to == "voc":
            notes += voc.write(partial, parts, put)
        elif to == "csv":
            notes += csv_boxes.write(partial, parts, put)
        else:
            notes += write_coco(partial, parts, put, not found.name.startswith("COCO"), beside=to == "coco_splits")
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [*notes, f"written: {target} ({to})"]


def _read(split: Split, notes: list[str]) -> Part:
    """One part, checked, its images too: they have to have the size that is said, which YOLO's fractions are of."""
    data = split.read()
    said = data.pop("notes", []) if isinstance(data, dict) else []
    notes += [*said, *(f"{split.source}: {finding.note}" for finding in examine(data).findings
                       if finding.note and finding.kind != "crowds")]          # what becomes of these, the writers say
    data, _ = checked(data, split.source)
    problems = []
    sizes = image_sizes([split.images / image["file_name"] for image in data["images"]])
    for image, size in zip(data["images"], sizes):
        if isinstance(size, str):
            problems.append(size)
        elif size != (image["height"], image["width"]):
            problems.append(f"{image['file_name']} has {size[1]} x {size[0]} pixels (its EXIF orientation applied), but "
                            f"is said to have {image['width']} x {image['height']}")
    if problems:
        raise ValueError(f"{split.source}: {counted(len(problems), 'image')} not as said: {few(problems, 5)}; correct "
                         f"the sizes and boxes, or take these images out")
    return Part(split.images, data)


def _check_classes(parts: dict[str, Part]) -> None:
    names: dict[int, str] = {}
    ids: dict[str, int] = {}
    for split, part in parts.items():
        for row in part.data["categories"]:
            id, name = row["id"], row["name"]
            if names.setdefault(id, name) != name or ids.setdefault(name, id) != id:
                other = f"{id} is {names[id]!r}" if names[id] != name else f"{name!r} is {ids[name]}"
                raise ValueError(f"{split}: category {id} is {name!r}, but in another part {other}; give classes the "
                                 f"same ids and names in all parts")


def _put(link: bool) -> Put:
    def put(source: Path, target: Path) -> None:
        if os.path.lexists(target):
            raise ValueError(f"two images would be the same file {target.name}; rename one of them")
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            target.symlink_to(source.resolve())
        else:
            shutil.copyfile(source, target)
    return put


def main(args: argparse.Namespace) -> None:
    for note in convert(args.source, args.target, args.to, args.link):
        print(note)


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
