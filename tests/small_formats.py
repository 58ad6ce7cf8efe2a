"""A small data set with what is awkward to convert, in COCO's form; what it should be in every format is known."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

CATEGORIES = {3: "two words", 7: "background", 12: "never seen", 90: "naïve Ω & <é>"}
"""Ids with gaps; a class without objects, names with spaces, other alphabets and what XML and yaml write otherwise."""

HALVES = [[10.0, 10.0, 20.0, 10.0, 20.0, 30.0, 10.0, 30.0], [30.25, 12.0, 40.5, 12.0, 40.5, 28.0, 30.25, 28.0]]
TRIANGLE = [[5.5, 5.25, 25.75, 8.0, 12.0, 33.5]]


def square(height: int, width: int, y: slice, x: slice) -> dict:
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[y, x] = 1
    code = rle.encode(mask)
    return {"size": [height, width], "counts": code["counts"].decode()}


def make_awkward(folder: Path) -> Path:
    """COCO's layout. train: an image of two parts, run lengths, a crowd; one in a folder; one without objects; one that
    is stored on its side. val: an image of a name that train has, too."""
    pictures = {"train": {"a.jpg": (64, 48), "sub/b.png": (50, 40), "empty.jpg": (30, 20), "turned.jpg": (40, 60)},
                "val": {"a.jpg": (33, 44), "c d.png": (60, 50)}}
    annotations = {"train": [
        (501, "a.jpg", 7, [10.25, 5.5, 20.125, 30.0], {"area": 603.75}),
        (502, "a.jpg", 3, [10.0, 10.0, 30.5, 20.0], {"area": 364.0, "segmentation": HALVES}),
        (503, "a.jpg", 90, [4.0, 6.0, 12.0, 9.0], {"area": 108, "segmentation": square(
            48, 64, slice(6, 15), slice(4, 16))}),
        (504, "a.jpg", 7, [30.0, 20.0, 30.0, 20.0], {"area": 600, "iscrowd": 1, "segmentation": square(
            48, 64, slice(20, 40), slice(30, 60))}),
        (505, "sub/b.png", 90, [5.5, 5.25, 20.25, 28.25], {"area": 277.09375, "segmentation": TRIANGLE}),
        (506, "sub/b.png", 7, [0.1, 0.2, 49.7, 39.6], {"area": 49.7 * 39.6, "difficult": 1}),
        (507, "turned.jpg", 3, [1 / 3, 2 / 3, 38.0001, 50 + 1 / 7], {"area": 38.0001 * (50 + 1 / 7)})],
        "val": [
        (901, "a.jpg", 7, [1, 2, 30, 40], {"area": 1200}),
        (902, "c d.png", 3, [1.5, 2.5, 3.25, 4.125], {"area": 13})]}
    (folder / "annotations").mkdir(parents=True)
    for split, files in pictures.items():
        random = np.random.RandomState(len(files))
        images = []
        for i, (name, (width, height)) in enumerate(files.items()):
            path = folder / f"{split}2017" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.randint(0, 255, (height, width, 3), np.uint8)
            exif = Image.Exif()
            if name == "turned.jpg":
                pixels = np.rot90(pixels)
                exif[0x0112] = 6
            Image.fromarray(pixels.copy()).save(path, exif=exif)
            images.append({"id": 40 - 7 * i, "file_name": name, "width": width, "height": height})
        ids = {image["file_name"]: image["id"] for image in images}
        rows = [{"id": id, "image_id": ids[name], "category_id": category, "bbox": bbox, "iscrowd": 0, **more}
                for id, name, category, bbox, more in annotations[split]]
        content = {"images": images, "annotations": rows,
                   "categories": [{"id": id, "name": name} for id, name in CATEGORIES.items()]}
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
