"""Whether data is the same as it was."""
from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor


def fingerprint(dataset: Any) -> dict[str, Any]:
    """What a checkpoint remembers of the data it was trained on: numbers of images and objects, and a SHA-256 of the
    images' names and sizes, classes, labels and, but of panoptic data, boxes. Pixels, which take long to read, have no
    part in it, nor has the folder that the data is in."""
    digest = hashlib.sha256()
    labels = dataset.labels_of_images()
    digest.update(repr([tuple(category) for category in dataset.categories]).encode())
    for name, row in zip(dataset.files, labels):
        digest.update(f"{name}\n{row.tolist()}\n".encode())
    for tensor in (dataset.sizes, getattr(dataset, "_boxes_xyxy", None)):
        if isinstance(tensor, Tensor):
            digest.update(tensor.contiguous().numpy().tobytes())
    return {"images": len(labels), "objects": sum(map(len, labels)), "sha256": digest.hexdigest()[:16]}
