"""COCO's precisions and recalls as pycocotools computes them, by hotcoco, bit for bit and many times faster.

hotcoco matches and accumulates; parameters, the twelve lines and their numbers stay pycocotools' own. The two agree in
every case that ``tests/test_fast_coco_eval.py`` and docs/evaluation.md list but one, which ``why_not_fast`` names.
"""
from __future__ import annotations

import datetime
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr.structures import Rle

JUDGES = ("pycocotools", "fast")


class Found(NamedTuple):
    """The predictions of one image, in columns: a few arrays instead of a dict for each of them."""
    category_ids: np.ndarray            # [n] int64, the data's own
    boxes_xywh: np.ndarray              # [n, 4] in pixels of the original image
    scores: np.ndarray                  # [n]
    counts: list[str] | None            # [n] run lengths of the masks, where there are masks
    size: list[int] | None              # [height, width] of all of them

    def masks(self) -> Iterator[Rle]:
        """The masks as run-length codes."""
        return ({"size": self.size, "counts": counts} for counts in self.counts or ())

    def of_classes(self, category_ids: Sequence[int]) -> Found:
        """Those of these classes alone."""
        kept = np.isin(self.category_ids, category_ids)
        if kept.all():
            return self
        return Found(self.category_ids[kept], self.boxes_xywh[kept], self.scores[kept],
                     self.counts and [code for code, keep in zip(self.counts, kept.tolist()) if keep], self.size)

    def rows(self, image_id: int, kinds: Sequence[str]) -> list[dict[str, Any]]:
        """COCO's result format, with boxes for the kind "bbox" and masks for "segm"."""
        rows: list[dict[str, Any]] = [{"image_id": image_id, "category_id": id} for id in self.category_ids.tolist()]
        if "bbox" in kinds:
            for row, box in zip(rows, self.boxes_xywh.tolist()):
                row["bbox"] = box
        for row, score in zip(rows, self.scores.tolist()):
            row["score"] = score
        if "segm" in kinds:
            for row, mask in zip(rows, self.masks()):
                row["segmentation"] = mask
        return rows


def why_not_fast(coco: COCO, image_ids: Sequence[int]) -> str | None:
    """Why pycocotools itself has to score these images, None where the fast judge gives the same.

    pycocotools remembers whom a prediction has found by the annotation's id, and takes 0 for nobody: what finds that
    object counts as wrong. Where two annotations share an id, it sees one of them twice. hotcoco has neither quirk.
    """
    try:
        importlib.import_module("hotcoco")
    except ImportError as error:
        return (f"the package hotcoco cannot be used ({error}); pip install 'hotcoco>=1.3,<2', or --coco_eval "
                f"pycocotools; the numbers are the same, later")
    ids = [row["id"] for image_id in image_ids for row in coco.imgToAnns.get(image_id, ())]
    if zeros := ids.count(0):
        return (f"{zeros} of {len(ids)} annotations has id 0, which pycocotools takes for no object at all, so that what "
                f"finds it counts as wrong; number annotations from 1")
    if twice := len(ids) - len(set(ids)):
        return (f"{twice} of {len(ids)} annotations have the id of another one, instead of which pycocotools counts the "
                f"other twice; give each an id of its own")
    return None


class FastCOCOeval(COCOeval):
    """pycocotools' judge, whose ``evaluate`` and ``accumulate`` are hotcoco's. What they leave is the same (``params``,
    ``eval``) but for ``evalImgs`` and ``ious``, which nobody reads here; ``summarize`` is pycocotools' own.

    ``seen``: the predictions of the images to score, by image id, each image's in the order that breaks ties of scores.
    ``kind``: "bbox" or "segm". Works on all cores, or as many as RAYON_NUM_THREADS says when Python starts.
    """

    def __init__(self, coco: COCO, seen: Mapping[int, Found], kind: str) -> None:
        import hotcoco
        super().__init__(iouType=kind)
        self.params.imgIds = list(np.unique(np.array(list(seen), dtype=np.int64)))
        self.params.catIds = list(np.unique(np.array(coco.getCatIds(), dtype=np.int64)))
        # Images and classes go by their places in these lists: ids may be of any size there, and the order is the same.
        truth = _ground_truth(hotcoco, coco, self.params, kind)
        self._fast: Any = hotcoco.COCOeval(truth, _results(truth, seen, self.params, kind), kind)
        for name in ("iouThrs", "recThrs", "areaRng", "areaRngLbl", "maxDets"):
            setattr(self._fast.params, name, getattr(self.params, name))

    def evaluate(self) -> None:
        self._fast.evaluate()

    def accumulate(self, p: Any = None) -> None:
        """Fills ``eval`` and lets hotcoco's copies of everything go. ValueError for parameters ``p``, which it lacks."""
        if p is not None:
            raise ValueError("accumulate(p): the fast judge accumulates what it evaluated; take pycocotools' COCOeval")
        self._fast.accumulate()
        curves = self._fast.eval
        arrays = {name: np.array(curves[name]) for name in ("precision", "recall", "scores")}
        self.eval = {"params": self.params, "counts": list(arrays["precision"].shape),
                     "date": datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S"), **arrays}
        self._fast = None


def _ground_truth(hotcoco: Any, coco: COCO, params: Any, kind: str) -> Any:
    """The objects of the images and classes that ``params`` names, in the order of the file within an image."""
    category_place = {id: place for place, id in enumerate(params.catIds)}
    images, rows, image_places = [], [], []
    for place, image_id in enumerate(params.imgIds):
        image = coco.imgs[image_id]
        images.append({"id": place, **{side: image[side] for side in ("height", "width") if side in image}})
        of_image = [row for row in coco.imgToAnns.get(image_id, ()) if row["category_id"] in category_place]
        rows += of_image
        image_places += [place] * len(of_image)
    return hotcoco.COCO.from_arrays(
        images, [{"id": place, "name": str(id)} for place, id in enumerate(params.catIds)],
        np.array(image_places, dtype=np.int64),
        np.array([category_place[row["category_id"]] for row in rows], dtype=np.int64),
        np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4),
        area=np.array([row["area"] for row in rows], dtype=np.float64),
        iscrowd=np.array([bool(row["iscrowd"]) for row in rows], dtype=bool),
        segmentation=[row["segmentation"] for row in rows] if kind == "segm" else None)


def _results(truth: Any, seen: Mapping[int, Found], params: Any, kind: str) -> Any:
    """The predictions as rows of image, box, score and class; masks beside them. A class that the ground truth's file
    does not list is not judged."""
    found = [seen[image_id].of_classes(params.catIds) for image_id in params.imgIds]
    ends = np.cumsum([0, *(len(one.scores) for one in found)])
    rows = np.empty((ends[-1], 7))
    codes: list[Rle] = []
    for place, (one, start, end) in enumerate(zip(found, ends, ends[1:])):
        rows[start:end, 0] = place
        rows[start:end, 1:5] = one.boxes_xywh
        rows[start:end, 5] = one.scores
        rows[start:end, 6] = np.searchsorted(params.catIds, one.category_ids)
        if kind == "segm" and end > start:
            masks = list(one.masks())
            rows[start:end, 1:5] = rle.toBbox(masks)
            codes += masks
    if kind == "bbox":
        return truth.load_res(rows)
    results = truth.load_res(rows, segmentation=codes)
    if codes:                                                       # an area is the mask's, as in results without boxes
        areas = np.array([rle.area(code) for code in codes], dtype=np.float64)      # of a list, it fails beyond 255
        results.update_anns(ids=np.arange(1, len(codes) + 1), area=areas)
    return results
