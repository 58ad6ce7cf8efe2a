"""Annotations in COCO's form (Lin et al., 2014): reading, checking and completing the json; its class table."""
from __future__ import annotations

import contextlib
import gc
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor

from datasets.examination import STOP, Examined, examine
from detr.coco_classes import COCO_CATEGORIES
from detr.structures import Category

LAYOUT = """COCO's layout is expected:
    train2017/  val2017/                                    the images
    annotations/instances_train2017.json                    what is on them
    annotations/instances_val2017.json"""


# Categories and labels.

def class_table(names: dict[int, str]) -> list[Category]:
    """Category ids and names -> the class table.

    Exactly COCO's 80 categories keep their ids as labels (91 slots, 11 of them unused), so that heads fit published
    weights. Any others get labels 0, 1, 2, ... in the order of their ids.
    """
    raw = names == COCO_CATEGORIES
    return [Category(id if raw else label, id, names[id]) for label, id in enumerate(sorted(names))]


def num_classes(categories: Iterable[Category]) -> int:
    """How many slots for classes a head needs: the greatest label + 1. 91 for COCO."""
    return max(category.label for category in categories) + 1


# Reading the json.

def read_annotations(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The json at ``path``, checked and completed, and what there is to say about it: ``read_json``, then ``checked``."""
    return checked(read_json(path), path)


def read_json(path: str | Path, layout: str = LAYOUT) -> Any:
    """The content of a json, unchecked. FileNotFoundError where it is not there, with the ``layout`` that is expected;
    ValueError where it is no json."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"annotations {path} are not there. {layout}")
    return parse_json(path.read_bytes(), path)


def parse_json(content: bytes, source: str | Path) -> Any:
    """The bytes of a json -> what they say. Raises ValueError, which begins with ``source``."""
    again = "download or export it again"
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{source}: no valid json, but Git LFS's pointer to it; fetch the file itself (git lfs pull)")
    collects = gc.isenabled()
    gc.disable()                                # nothing here is garbage, and looking for some takes longer than parsing
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: no valid json at line {error.lineno}, column {error.colno} (character {error.pos} "
                         f"of {len(error.doc)}): {error.msg}; if cut short, {again}") from None
    except (ValueError, RecursionError) as error:               # other bytes than text's, endless numbers or nesting
        raise ValueError(f"{source}: no valid json ({error}); {again}") from None
    finally:
        if collects:
            gc.enable()


def checked(data: Any, source: str | Path, masks: bool = False) -> tuple[dict[str, Any], list[str]]:
    """COCO's form, checked and completed in place, and what was completed or will be clipped or left out.

    Everything that ``examine`` finds and that would stop training is in one ValueError, a line for each kind, which
    begins with ``source`` and names the first rows and a remedy. Missing ``iscrowd`` become 0, missing ``area`` that of
    the box, and an annotation id of 0 a new one. No annotation is taken out and no box changed: scores are those of
    COCO's evaluation only against the file's own. ``masks``: whether segmentations are used.
    """
    examined = examine(data, masks)
    stops = [f"{source}: {finding.line()}" for finding in examined.findings if finding.action == STOP]
    if stops:
        raise ValueError("\n".join(stops))
    _complete(data, examined)
    return data, [finding.note for finding in examined.findings if finding.note]


def _complete(data: dict[str, Any], examined: Examined) -> None:
    rows = data["annotations"]
    for i in examined.without_crowd:
        rows[i]["iscrowd"] = 0
    for i in examined.without_area:
        rows[i]["area"] = rows[i]["bbox"][2] * rows[i]["bbox"][3]
    for i in examined.zero:
        rows[i]["id"] = examined.new_id
    if examined.headings:
        data["categories"] = [row for row in data["categories"] if row["id"] not in examined.headings]


# What pycocotools is used for.

def index(data: dict[str, Any]) -> COCO:
    """A COCO json's content -> pycocotools' index of it, without its chatter."""
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def masks(segmentations: Sequence[Any], height: int, width: int) -> Tensor:
    """Polygons, or run lengths compressed or not, of N objects -> bool ``[N, height, width]``."""
    out = np.zeros((len(segmentations), height, width), dtype=bool)
    for mask, segmentation in zip(out, segmentations):
        if isinstance(segmentation, list):                              # polygons, the object's parts
            mask[:] = rle.decode(rle.merge(rle.frPyObjects(segmentation, height, width)))
        elif isinstance(segmentation["counts"], list):
            mask[:] = rle.decode(rle.frPyObjects(segmentation, height, width))
        else:
            mask[:] = rle.decode(segmentation)
    return torch.from_numpy(out)
