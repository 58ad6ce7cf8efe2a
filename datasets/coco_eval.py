"""Predictions -> average precision, as pycocotools computes it (COCO's detection challenge)."""
from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.annotations import index
from datasets.fast_coco_eval import JUDGES, FastCOCOeval, Found, why_not_fast
from detr.boxes import box_xyxy_to_xywh
from detr.checkpoint import write_whole
from detr.distributed import gather_objects, is_main
from detr.structures import Category, Detections


class CocoEvaluator:
    """Collects the predictions of every process, and scores them against the ground truth ``coco``.

    ``update`` after each batch, then ``summarize`` once, by all processes. What is scored are the images that
    ``update`` has seen, over all processes; where these are not all of the ground truth, a printed line says so.

    Predictions are written under the data's own ids, which ``categories`` gives for labels. A label that the data does
    not use (COCO has 11 in its 91 slots) belongs to no class: such a prediction is left out and counted in a printed
    line. It could neither be right nor wrong for pycocotools, so the score is the same.

    Stuff of panoptic data has no boxes to find: predictions of it are left out, too, without a word.

    With ``masks`` predictions have run lengths, and masks are scored besides boxes; results of each kind are written
    apart, since pycocotools takes an object's area from the box where it finds one.

    ``judge`` is who computes the numbers: "fast", hotcoco, or "pycocotools". They are the same, bit for bit; where the
    fast one would differ (``why_not_fast``), pycocotools scores instead and a printed line says so.

    After ``summarize``: ``results``, the predictions in COCO's result format; ``eval``, pycocotools' dict of precisions
    and recalls of the boxes, in the main process (None in others).
    """
    kind = "bbox"                                               # of the predictions that ``update`` takes

    def __init__(self, coco: COCO, categories: Sequence[Category], num_classes: int, masks: bool = False,
                 judge: str = "fast") -> None:
        if judge not in JUDGES:
            raise ValueError(f"--coco_eval {judge}: there is no such judge; there are {' and '.join(JUDGES)}")
        self.coco = coco
        self.judge = judge
        self.masks = masks
        self.num_classes = num_classes
        self.categories = list(categories)
        self.eval: dict[str, Any] | None = None
        self._ids = torch.full((num_classes,), -1, dtype=torch.int64)                # label -> the data's id
        for category in categories:
            if not 0 <= category.label < num_classes:
                raise ValueError(f"category {category.name!r} has label {category.label}, but the model has labels 0 "
                                 f"to {num_classes - 1}; build it with num_classes of this data")
            if category.isthing:
                self._ids[category.label] = category.id
        self._stuff = {category.label for category in categories if not category.isthing}
        self._seen: dict[int, Found] = {}                                            # image id -> its predictions
        self._everything: dict[int, Found] | None = None                             # the same of all processes, in order
        self._without_class: Counter[int] = Counter()                                # label -> left out

    def update(self, predictions: Mapping[int, Detections]) -> None:
        """Add ``{image id: Detections}``; boxes are corners in pixels of the original image. Raises ValueError for an
        image that is not in the ground truth or comes twice, and for labels and numbers that cannot be."""
        for image_id, detections in predictions.items():
            if image_id not in self.coco.imgs:
                raise ValueError(f"predictions for image id {image_id}, which the ground truth does not have; evaluate "
                                 f"the images of the file that the evaluator was made from")
            if image_id in self._seen:
                raise ValueError(f"predictions for image id {image_id} a second time; each image counts once")
            self._seen[image_id] = self._found(image_id, detections)

    def _found(self, image_id: int, detections: Detections) -> Found:
        scores, labels, boxes_xyxy = (detections[k].detach().cpu() for k in ("scores", "labels", "boxes"))
        if not (boxes_xyxy.isfinite().all() and scores.isfinite().all()):
            raise ValueError(f"predictions for image id {image_id} have scores or boxes that are not finite; look for "
                             f"the same in the model's weights and its input")
        if ((labels < 0) | (labels >= self.num_classes)).any():
            raise ValueError(f"predictions for image id {image_id} have labels {int(labels.min())} to "
                             f"{int(labels.max())}, but the data has 0 to {self.num_classes - 1}; the model was built "
                             f"for other classes")
        ids = self._ids[labels]
        self._without_class.update(label for label in labels[ids < 0].tolist() if label not in self._stuff)
        boxes_xywh = box_xyxy_to_xywh(boxes_xyxy)
        counts, size = self._run_lengths(image_id, detections, len(labels)) if self.masks else (None, None)
        if (without := ids < 0).any():
            boxes_xywh, scores, ids = boxes_xywh[~without], scores[~without], ids[~without]
            counts = [code for code, out in zip(counts, without.tolist()) if not out] if counts is not None else None
        return Found(ids.numpy(), _array(boxes_xywh), _array(scores), counts, size)

    @staticmethod
    def _run_lengths(image_id: int, detections: Detections, n: int) -> tuple[list[str], list[int] | None]:
        """The run lengths of the masks, and the size that they share."""
        masks: Any = detections.get("masks", ())
        if len(masks) != n or n and not isinstance(masks[0], dict):
            raise ValueError(f"predictions for image id {image_id} have no run length for each of {n} masks; "
                             f"post-process them with PostProcessSegm(rle=True)")
        sizes = {tuple(mask["size"]) for mask in masks}
        if len(sizes) > 1:
            raise ValueError(f"predictions for image id {image_id} have masks of different sizes, "
                             f"{' and '.join(f'{h} x {w}' for h, w in sorted(sizes))} (height x width); give the "
                             f"post-processing the size of the original image")
        return [mask["counts"] for mask in masks], list(masks[0]["size"]) if n else None

    @property
    def results(self) -> list[dict[str, Any]] | None:
        """All processes' predictions in COCO's result format, a new list each time; None before ``summarize``."""
        return None if self._everything is None else [row for rows in self._rows(self._kinds()) for row in rows]

    def summarize(self) -> dict[str, Any]:
        """Score, and print COCO's twelve lines and a table of the classes. All processes call it and get the same:

        ``coco_eval_bbox``: COCO's twelve numbers, -1 where the ground truth has no object to find (of that size);
        ``per_class``: ``{name: {"AP": ..., "AP50": ..., "objects": ...}}``, -1 likewise. Where two classes share a
        name, their ids follow it. With masks: ``coco_eval_masks`` and ``per_class_masks``, likewise.
        """
        self._gather()
        scored = self._score() if is_main() else None
        return gather_objects(scored)[0]

    @property
    def found(self) -> Mapping[int, Found] | None:
        """All processes' predictions by image id, in the order of ids; None before ``summarize``."""
        return self._everything

    def save_results(self, path: str | Path) -> None:
        """Write the results as json that pycocotools' ``loadRes`` reads, in the main process: the boxes to ``path``, and
        masks beside it, to ``..._masks.json``. A file appears whole or not at all."""
        if self._everything is None:
            raise RuntimeError("no results to save yet; summarize() collects them from all processes, call it first")
        if is_main():
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            for kind in self._kinds():
                name = path if kind == "bbox" else path.with_name(f"{path.stem}_masks{path.suffix}")
                write_whole(name, lambda file, kind=kind: self._write(file, kind))

    def _write(self, file: IO[bytes], kind: str) -> None:
        """An image at a time, in the words of one json.dumps."""
        between = "["
        for rows in self._rows((kind,)):
            if rows:
                file.write((between + json.dumps(rows)[1:-1]).encode())
                between = ", "
        file.write(b"]" if between == ", " else b"[]")

    def _kinds(self) -> tuple[str, ...]:
        return ("bbox", "segm") if self.masks else ("bbox",)

    def _rows(self, kinds: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """The results of one image after the other, with boxes alone, masks alone, or both."""
        return (found.rows(image_id, kinds) for image_id, found in (self._everything or {}).items())

    def _gather(self) -> None:
        seen, without_class = gather_seen(self._seen, self._without_class)
        self.image_ids = sorted(seen)
        self._everything = {image_id: seen[image_id] for image_id in self.image_ids}
        if is_main():
            if without_class:
                print(f"left out of the results: {without_class.total()} predictions of labels that the data does not "
                      f"use ({', '.join(map(str, sorted(without_class)))})")
            if len(seen) < len(self.coco.imgs):
                print(f"scored: {len(seen)} of the {len(self.coco.imgs)} images of the ground truth")

    def _score(self) -> dict[str, Any]:
        scored: dict[str, Any] = {}
        reason = why_not_fast(self.coco, self.image_ids) if self.judge == "fast" else None
        if reason:
            print(f"--coco_eval fast: pycocotools scores instead: {reason}")
        for kind in self._kinds():
            chatter, lines = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(chatter):
                judge = self._loaded(kind, fast=self.judge == "fast" and not reason)
                judge.evaluate()
                judge.accumulate()
            with contextlib.redirect_stdout(lines):
                judge.summarize()
            per_class = self._per_class(judge)
            what = ("boxes\n" if kind == "bbox" else "masks\n") if self.masks else ""
            print(what + lines.getvalue() + _table(per_class), flush=True)
            if kind == "bbox":
                self.eval = judge.eval
                scored |= {"coco_eval_bbox": judge.stats.tolist(), "per_class": per_class}
            else:
                scored |= {"coco_eval_masks": judge.stats.tolist(), "per_class_masks": per_class}
        return scored

    def _loaded(self, kind: str, fast: bool) -> COCOeval:
        """The judge with ground truth and results. pycocotools' ``loadRes`` wants a dict for each, adds keys of its own,
        and cannot do with none."""
        if fast:
            return FastCOCOeval(self.coco, self._everything or {}, kind)
        rows = [row for of_image in self._rows((kind,)) for row in of_image]
        found = self.coco.loadRes(rows) if rows else index({**self.coco.dataset, "annotations": []})
        judge = COCOeval(self.coco, found, kind)
        judge.params.imgIds = self.image_ids
        return judge

    def _per_class(self, judge: COCOeval) -> dict[str, dict[str, float]]:
        precision = judge.eval["precision"][:, :, :, 0, -1]     # [IoU, recall, class]: all sizes, 100 detections
        ids = judge.params.catIds
        names = [self.coco.cats[i]["name"] for i in ids]
        shared = {name for name, n in Counter(names).items() if n > 1}
        objects = Counter(gt["category_id"] for i in self.image_ids for gt in self.coco.imgToAnns[i]
                          if not gt["iscrowd"])
        return {f"{name} ({i})" if name in shared else name:
                {"AP": _mean(precision[:, :, k]), "AP50": _mean(precision[0, :, k]), "objects": objects[i]}
                for k, (i, name) in enumerate(zip(ids, names))}


def gather_seen(seen: dict[int, Any], without_class: Counter[int]) -> tuple[dict[int, Any], Counter[int]]:
    """What all processes have seen, by image id, and the labels that they left out. ValueError for an image that two of
    them have seen."""
    everything: dict[int, Any] = {}
    left_out: Counter[int] = Counter()
    for process, (theirs, labels) in enumerate(gather_objects((seen, without_class))):
        if twice := sorted(everything.keys() & theirs.keys()):
            raise ValueError(f"predictions for image id {twice[0]} come from process {process} and from an earlier one "
                             f"({len(twice)} images in all); share the images out with EvaluationShard")
        everything.update(theirs)
        left_out += labels
    return everything, left_out


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's numbers in memory of their own, and none else's; bfloat16, which NumPy lacks, as float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()


def _mean(precision: np.ndarray) -> float:
    """Mean of what could be measured; pycocotools marks the rest with -1, and so does this."""
    measured = precision[precision > -1]
    return float(measured.mean()) if measured.size else -1.0


def _table(per_class: dict[str, dict[str, float]], columns: int = 3) -> str:
    """Name, AP, AP50 and number of objects of each class, down the columns; "-" where there is nothing to find."""
    def number(x: float) -> str:
        return "    -" if x < 0 else f"{x:.3f}"

    width = max(5, *map(len, per_class)) if per_class else 5
    cells = [f"{name:<{width}} {number(row['AP'])} {number(row['AP50'])} {row['objects']:>7}"
             for name, row in per_class.items()]
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    head = "   ".join([f"{'class':<{width}} {'AP':>5} {'AP50':>5} {'objects':>7}"] * columns)
    return "\n".join([head, *("   ".join(cells[row::rows]) for row in range(rows))])
