"""Data in COCO's layout that a small model learns within seconds: one or two coloured rectangles, always around the
same places, so that even the mean box finds some."""
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = {3: ("red", (220, 40, 40)), 7: ("blue", (40, 60, 220))}            # ids with gaps, as COCO's


def make_rectangles(folder: Path, train: int = 16, val: int = 7, seed: int = 0, channels: int = 3) -> Path:
    """Images of 72 x 64 pixels; every fifth has no objects, every second of the others has two. One channel is the red
    one; other numbers than 1 and 3 are arrays whose channels are R, G, B, R, ..."""
    random = np.random.RandomState(seed)
    (folder / "annotations").mkdir(parents=True)
    for split, count, first in (("train", train, 100), ("val", val, 200)):
        (folder / f"{split}2017").mkdir()
        images, annotations = [], []
        for i in range(count):
            pixels = random.randint(90, 150, (64, 72, 3)).astype(np.uint8)
            image_id = first + i
            for k in range(0 if i % 5 == 4 else 1 + i % 2):
                category = list(CATEGORIES)[random.randint(2)]
                x, y, w, h = (int(n) for n in random.randint((3 + 34 * k, 12, 24, 30), (8 + 34 * k, 18, 30, 38)))
                pixels[y:y + h, x:x + w] = CATEGORIES[category][1]
                annotations.append({"id": 10 * image_id + k, "image_id": image_id, "category_id": category,
                                    "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
            name = f"{image_id}.{'png' if channels in (1, 3) else 'npy'}"
            if channels == 3:
                Image.fromarray(pixels).save(folder / f"{split}2017" / name)
            elif channels == 1:
                Image.fromarray(pixels[..., 0]).save(folder / f"{split}2017" / name)
            else:
                np.save(folder / f"{split}2017" / name, pixels[..., np.arange(channels) % 3])
            images.append({"id": image_id, "file_name": name, "width": 72, "height": 64})
        write_annotations(folder, split, {"images": images, "annotations": annotations, "categories": [
            {"id": i, "name": name} for i, (name, _) in CATEGORIES.items()]})
    return folder


def annotation_file(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}2017.json"


def read_annotations(folder: Path, split: str) -> dict:
    return json.loads(annotation_file(folder, split).read_text())


def write_annotations(folder: Path, split: str, content: dict) -> None:
    annotation_file(folder, split).write_text(json.dumps(content))


def damaged(data: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """A copy of ``data`` that ``change`` was called with."""
    data = copy.deepcopy(data)
    change(data)
    return data
