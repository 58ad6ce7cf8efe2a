"""Small data sets with detections of all kinds: for the tests of what judges them."""
from __future__ import annotations

import math
import random

import numpy as np
from pycocotools.coco import COCO

from datasets.annotations import index
from datasets.fast_coco_eval import Found


def small_detections(seed: int, images: int = 12, classes: int = 4, objects: int = 5, detections: int = 24,
                     crowds: float = 0.0, scores: int = 0) -> tuple[COCO, dict[int, Found]]:
    """Ground truth whose image and class ids have gaps, and predictions: objects moved, renamed, twice; boxes from
    nowhere. ``crowds`` is the share of objects that are crowds; ``scores`` the number of different scores, 0 for any. The
    same for a seed with any library, since Python's own ``random()`` makes all of it."""
    draw = random.Random(seed).random
    ids = [3 * k + 2 for k in range(classes)]

    def box() -> list[float]:
        return [150 * draw(), 150 * draw(), 8 + 70 * draw(), 8 + 70 * draw()]

    annotations: list[dict] = []
    found: dict[int, Found] = {}
    for image_id in range(10, 10 + 7 * images, 7):
        there = [(ids[int(classes * draw())], box()) for _ in range(int((objects + 1) * draw()))]
        annotations += [{"id": len(annotations) + k + 1, "image_id": image_id, "category_id": id, "bbox": bbox,
                         "area": bbox[2] * bbox[3], "iscrowd": int(draw() < crowds)}
                        for k, (id, bbox) in enumerate(there)]
        rows = []
        for _ in range(int((detections + 1) * draw())):
            id, bbox = ids[int(classes * draw())], box()
            if there and draw() < 0.75:
                right, (x, y, w, h) = there[int(len(there) * draw())]
                far = (0.05, 0.2, 0.5)[int(3 * draw())]
                bbox = [x + w * far * (2 * draw() - 1), y + h * far * (2 * draw() - 1),
                        w * math.exp(far * (2 * draw() - 1)), h * math.exp(far * (2 * draw() - 1))]
                id = right if draw() < 0.7 else id
            rows.append([id, *bbox, math.ceil(draw() * scores) / scores if scores else draw()])
        table = np.array(rows, dtype=np.float64).reshape(-1, 6)
        found[image_id] = Found(table[:, 0].astype(np.int64), table[:, 1:5].astype(np.float32),
                                table[:, 5].astype(np.float32), None, None)
    coco = index({"images": [{"id": id, "width": 220, "height": 220, "file_name": f"{id}.png"} for id in found],
                  "categories": [{"id": id, "name": f"class {id}"} for id in ids], "annotations": annotations})
    return coco, found
