"""Any data set on disk -> its parts in COCO's form: what it is, is found out from its files."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from datasets import csv_boxes, voc, yolo
from datasets.annotations import LAYOUT, read_json
from datasets.examination import counted, few
from datasets.split import SPLIT_NAMES, SPLITS, Format, Part, Put, Split, inner_path, one_each

__all__ = ["FORMATS", "Format", "Split", "coco_layout", "recognise", "write_coco"]

ROBOFLOW = "_annotations.coco.json"         # the name that exporters give it, beside the images

LOOKED_FOR = f"""looked for:
    COCO                            annotations/instances_train2017.json, instances_val2017.json; train2017/, val2017/
    COCO in train/ valid/ test/     train/{ROBOFLOW}, valid/{ROBOFLOW}, beside the images
    YOLO                            data.yaml (any *.yaml with names and train or val)
    Pascal VOC                      Annotations/*.xml with ImageSets/Main/train.txt, val.txt; or train/*.xml, valid/*.xml
    CSV                             train.csv, val.csv, a row for each box"""


def recognise(path: str | Path) -> Format:
    """What data set ``path`` is: a folder, or where that could be several, the file in it that says what is on the
    images (``data.yaml``, ``train.csv``, ``instances_train2017.json``) or the folder ``Annotations``.

    COCO json in the layout of 2017 (``annotations/instances_train2017.json`` with ``train2017/``; other years, none,
    and ``images/train2017/`` too) or as ``_annotations.coco.json`` in ``train/ valid/ test/``; YOLO, see
    ``datasets.yolo``; Pascal VOC, see ``datasets.voc``; boxes in CSV, see ``datasets.csv_boxes``. Nothing but names of
    files, a YOLO's yaml with its lists and the first rows of a CSV is read here. Parts that are not there are left out.

    Raises FileNotFoundError where there is no such path, and ValueError, with what was looked for and what is there,
    where it is none of these, could be several or has two files for one part.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder; give the folder of the data set")
    found = {name: splits for name, find in FORMATS.items() if (splits := find(path))}
    if not found:
        there = sorted(os.listdir(path)) if path.is_dir() else []
        listing = (f"; there are {few(there, 12)}" if there else "; it is empty") if path.is_dir() else ""
        raise ValueError(f"{path} is no data set in a format that is known here{listing}. Any of these was {LOOKED_FOR}")
    if len(found) > 1:
        options = "; ".join(f"{name} ({next(iter(splits.values())).source})" for name, splits in found.items())
        raise ValueError(f"{path} could be {len(found)} data sets: {options}; name the file or folder that is meant "
                         f"instead of {path}")
    name, splits = next(iter(found.items()))
    return Format(name, {split: splits[split] for split in SPLITS if split in splits})


def coco_layout(path: str | Path) -> Format:
    """What ``--coco_path`` means: the layout of 2017 whatever else is there. FileNotFoundError where that is not."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"--coco_path {path}: there is no such folder. {LAYOUT}")
    files = {split: path / "annotations" / f"instances_{split}2017.json" for split in ("train", "val")}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"annotations {file} are not there. {LAYOUT}")
    return Format("COCO", {split: Split(file, path / f"{split}2017", partial(read_json, file))
                           for split, file in files.items()})


def find_coco(path: Path) -> dict[str, Split]:
    """The parts of a data set in COCO's layout."""
    meant = None
    if path.is_file():
        if path.suffix.lower() != ".json" or path.name == ROBOFLOW:
            return {}
        meant, root = path, path.parent.parent
        if path.parent.name != "annotations":
            raise ValueError(f"{path}: which images belong to it, and whether it is for training or validation, is known "
                             f"from its place alone; {LOOKED_FOR}")
    else:
        root = path.parent if path.name == "annotations" else path
    folder = root / "annotations"
    if not folder.is_dir():
        return {}
    pairs: dict[tuple[str, str], list[tuple[str, Path]]] = {}
    for file in sorted(folder.glob("*.json")):
        match = re.fullmatch(rf"(instances_)?({'|'.join(SPLIT_NAMES)})(\d{{4}}|)", file.stem)
        if match:
            pairs.setdefault((match[1] or "", match[3]), []).append((SPLIT_NAMES[match[2]], file))
    if any(prefix for prefix, _ in pairs):                              # beside them train.json is something else
        pairs = {key: found for key, found in pairs.items() if key[0]}
    if meant is not None:
        pairs = {key: found for key, found in pairs.items() if meant in (file for _, file in found)}
    families = {key: one_each(folder, found, meant) for key, found in pairs.items()}
    if meant is not None and not families:
        raise ValueError(f"{meant}: the name says nothing of training or validation; {LOOKED_FOR}")
    if len(families) > 1:
        complete = {key: files for key, files in families.items()
                    if {"train", "val"} <= files.keys()
                    and all((place := _images_of(root, file)).is_dir() and place != root / "images"
                            for file in files.values())}
        if len(complete) != 1:
            files = [str(file) for one in families.values() for file in one.values()]
            raise ValueError(f"{folder} has json of several kinds: {few(files, 6)}; name the one that is meant")
        families = complete
    return {split: Split(file, _images_of(root, file), partial(read_json, file))
            for files in families.values() for split, file in files.items()}


def _images_of(root: Path, file: Path) -> Path:
    """The folder of the images that ``annotations/instances_train2017.json`` is about."""
    part = file.stem.removeprefix("instances_")
    places = [root / part, root / "images" / part, root / part.rstrip("0123456789"), root / "images"]
    return next((place for place in places if place.is_dir()), places[0])


def find_coco_splits(path: Path) -> dict[str, Split]:
    """The parts of a data set that has its json beside the images of each part."""
    root = path.parent.parent if path.is_file() and path.name == ROBOFLOW else path
    if not root.is_dir() or path.is_file() and path.name != ROBOFLOW:
        return {}
    files = one_each(root, ((SPLIT_NAMES[name], root / name / ROBOFLOW) for name in sorted(os.listdir(root))
                            if name in SPLIT_NAMES and (root / name / ROBOFLOW).is_file()), path)
    return {split: Split(file, file.parent, partial(read_json, file)) for split, file in files.items()}


FORMATS: dict[str, Callable[[Path], dict[str, Split]]] = {
    "COCO": find_coco, "COCO in train/ valid/ test/": find_coco_splits, "YOLO": yolo.find, "Pascal VOC": voc.find,
    "CSV": csv_boxes.find}


def write_coco(folder: Path, parts: dict[str, Part], put: Put, renumber: bool, beside: bool = False) -> list[str]:
    """Write COCO json and images below ``folder``: in the layout of 2017, or with ``beside`` in ``train/ valid/ test/``.

    ``renumber`` gives categories the ids 1, 2, 3, ... in the order of theirs, for data whose ids are not COCO's own;
    without it every row stays as it is. Returns what there is to say.
    """
    notes: list[str] = []
    for split, part in parts.items():
        place = folder / (("valid" if split == "val" else split) if beside else f"{split}2017")
        file = place / ROBOFLOW if beside else folder / "annotations" / f"instances_{split}2017.json"
        place.mkdir(parents=True)
        file.parent.mkdir(exist_ok=True)
        content = {key: value for key, value in part.data.items() if key != "notes"}
        if renumber:
            new = {old: i for i, old in enumerate(sorted(row["id"] for row in content["categories"]), 1)}
            content["categories"] = [{**row, "id": new[row["id"]]}
                                     for row in sorted(content["categories"], key=lambda row: row["id"])]
            content["annotations"] = [{key: new[value] if key == "category_id" else value for key, value in row.items()
                                       if key != "source"} for row in content["annotations"]]
            content["images"] = [{key: value for key, value in row.items() if key != "source"}
                                 for row in content["images"]]
            changed = sum(old != i for old, i in new.items())
            if changed and not notes:
                notes.append(f"{counted(changed, 'class id')} became 1, 2, 3, ... in the same order")
        for image in content["images"]:
            put(part.images / image["file_name"], place / inner_path(image["file_name"]))
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return notes
