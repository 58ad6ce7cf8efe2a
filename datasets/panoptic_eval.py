"""Predictions -> panoptic quality (Kirillov et al., 2019, section 4), as COCO's panoptic challenge counts it."""
from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets.coco_eval import gather_seen
from datasets.coco_panoptic import IDS, PanopticAnnotations, encode_ids, number_segments, read_ids
from datasets.examination import counted, few, is_whole
from detr.distributed import is_main
from detr.structures import Category


class _Scored(NamedTuple):
    """What is kept of an image's predictions."""
    classes: np.ndarray                 # [c] rows of the class table that the image has something of
    counts: np.ndarray                  # [c, 4] see ``count_matches``
    segments_info: list[dict[str, Any]]


class PanopticEvaluator:
    """Scores panoptic predictions of every process against ``annotations``.

    ``update`` after each batch, then ``summarize`` once, by all processes. What is scored are the images that ``update``
    has seen, over all processes; where these are not all of the ground truth, a printed line says so. An image is
    scored when it comes, and a few numbers and its list of segments are all that is kept of it.

    With a ``folder``, predictions are written there in COCO's layout, under the data's own ids of classes: each process
    writes its PNGs into ``folder/panoptic`` as they come, and ``save_results`` the json.

    A label that the data does not use (COCO has 117 in its 250 slots) belongs to no class: segments of it count as void
    in the prediction, and are counted in a printed line. They could be neither right nor wrong, and COCO's own program
    stops there. ``num_classes`` is the number of the model's labels, by default the data's.
    """

    kind = "panoptic"                                           # of the predictions that ``update`` takes

    def __init__(self, annotations: PanopticAnnotations, folder: str | Path | None = None,
                 num_classes: int | None = None) -> None:
        self.annotations = annotations
        self.folder = None if folder is None else Path(folder)
        self.num_classes = annotations.num_classes if num_classes is None else num_classes
        self.categories = annotations.categories
        for category in self.categories:
            if not 0 <= category.label < self.num_classes:
                raise ValueError(f"category {category.name!r} has label {category.label}, but the model has labels 0 to "
                                 f"{self.num_classes - 1}; build it with num_classes of this data")
        self._row = {category.label: row for row, category in enumerate(self.categories)}
        self._place = {image_id: i for i, image_id in enumerate(annotations.ids)}
        self._seen: dict[int, _Scored] = {}                                         # image id -> what is kept of it
        self._without_class: Counter[int] = Counter()                               # label -> left out
        self._results: list[dict[str, Any]] | None = None                           # 'annotations' of the json
        if self.folder is not None:
            (self.folder / "panoptic").mkdir(parents=True, exist_ok=True)           # fails now, not after an epoch

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Add ``{image id: {"png_string": a PNG file's content, "segments_info": [{"id", "category_id"}, ...]}}``.

        A pixel's colour is the id of its segment, as in the data, and ``category_id`` is the model's label. Id 0 is void
        unless ``segments_info`` lists it, which the published post-processing does. Raises ValueError for an image that
        is not in the ground truth or comes twice, a PNG of another size, a segment that the PNG or ``segments_info``
        lacks, and a label that the model cannot have.
        """
        for image_id, prediction in predictions.items():
            if image_id not in self._place:
                raise ValueError(f"predictions for image id {image_id}, which the ground truth does not have; evaluate "
                                 f"the images of the file that the evaluator was made from")
            if image_id in self._seen:
                raise ValueError(f"predictions for image id {image_id} a second time; each image counts once")
            if absent := {"png_string", "segments_info"} - prediction.keys():
                raise ValueError(f"predictions for image id {image_id} have no {' and no '.join(sorted(absent))}; give "
                                 f"what the panoptic post-processing returns")
            self._seen[image_id] = self._scored(image_id, prediction["png_string"], prediction["segments_info"])

    def _scored(self, image_id: int, png: bytes, segments_info: list[Mapping[str, Any]]) -> _Scored:
        i = self._place[image_id]
        where = f"predicted PNG for image id {image_id}"
        segment_ids, labels = self._listed(image_id, segments_info)
        ids = read_ids("", where, png)
        if list(ids.shape) != self.annotations.sizes[i].tolist():
            height, width = self.annotations.sizes[i].tolist()
            raise ValueError(f"{where} has {ids.shape[1]} x {ids.shape[0]} pixels, but the image has {width} x {height}; "
                             f"give the post-processing the original sizes")
        numbers = number_segments(ids, segment_ids, where)

        found_class = np.array([self._row.get(label, -1) for label in labels], dtype=np.int64)
        without = found_class < 0
        self._without_class.update(np.array(labels, dtype=np.int64)[without].tolist())
        if without.any():
            renumbered = np.where(without, 0, np.cumsum(~without))
            numbers = np.concatenate([[0], renumbered]).astype(numbers.dtype)[numbers]
            found_class = found_class[~without]

        truth = self.annotations.segments(i)
        truth_class = np.array([self._row[label] for label in truth.labels.tolist()], dtype=np.int64)
        counts = count_matches(self.annotations.numbers(i), truth_class, truth.iscrowd.numpy() == 1, numbers, found_class,
                               len(self.categories))
        classes = np.flatnonzero(counts.any(1))

        # Files are as COCO wants them: 0 is void there, and what is in the PNG is in the json.
        changed = bool(without.any()) or 0 in segment_ids
        kept_ids = np.arange(1, len(found_class) + 1) if changed else np.array(segment_ids, dtype=np.int64)
        pixels = np.bincount(numbers.ravel(), minlength=len(found_class) + 1)[1:]
        if self.folder is not None:
            _write(self.folder / "panoptic" / _png_name(image_id), encode_ids(numbers) if changed else png)
        rows = [self.categories[k] for k in found_class.tolist()]
        return _Scored(classes, counts[classes], [
            {"id": id, "category_id": row.id, "isthing": int(row.isthing), "area": area}
            for id, row, area in zip(kept_ids.tolist(), rows, pixels.tolist())])

    def _listed(self, image_id: int, segments_info: list[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
        """Ids and labels of the segments."""
        where = f"predictions for image id {image_id}: segments_info"
        ids: list[Any] = [segment.get("id") for segment in segments_info]
        labels: list[Any] = [segment.get("category_id") for segment in segments_info]
        for id in ids:
            if not is_whole(id) or not 0 <= id < IDS:
                raise ValueError(f"{where} has a segment with id {id!r}; a whole number from 0 to {IDS - 1} is needed, R "
                                 f"+ 256 G + 256² B of its pixels")
        if twice := [id for id, n in Counter(ids).items() if n > 1]:
            raise ValueError(f"{where} has several segments with the same id: {few(twice)}; give each its own")
        for label in labels:
            if not is_whole(label) or not 0 <= label < self.num_classes:
                raise ValueError(f"{where} has category_id {label!r}, but the data has labels 0 to "
                                 f"{self.num_classes - 1}; the model was built for other classes")
        return ids, labels

    def summarize(self) -> dict[str, Any]:
        """Score, and print a table of all, things, stuff and each class. All processes call it and get the same:

        ``PQ_all``, ``PQ_th``, ``PQ_st`` over all classes, things and stuff: ``{"pq": ..., "sq": ..., "rq": ..., "n":
        ...}``, means, 0 to 1, over the n classes that the images have in truth or prediction; ``PQ_per_class``:
        ``{name: {"pq": ..., "sq": ..., "rq": ..., "segments": number in the ground truth, without crowds}}``. -1 where
        there is nothing to measure. Where two classes share a name, their ids follow it.
        """
        seen = self._gather()
        counts = np.zeros((len(self.categories), 4))
        for image_id in self.image_ids:                     # in one order, so that sums do not depend on the processes
            np.add.at(counts, seen[image_id].classes, seen[image_id].counts)
        results = summary(counts, self.categories)
        if is_main():
            print(_table(results), flush=True)
        return results

    def save_results(self) -> None:
        """Write ``folder/panoptic.json``, in the main process. With ``folder/panoptic`` it is what COCO's own program
        takes as predictions, and what ``PanopticAnnotations`` reads. The file appears whole or not at all."""
        if self._results is None:
            raise RuntimeError("no results to save yet; summarize() collects them from all processes, call it first")
        if self.folder is None:
            raise RuntimeError("no results were kept, since their PNGs need a place; give the evaluator a folder")
        if is_main():
            images = [{"id": id, "file_name": self.annotations.files[i], "height": height, "width": width}
                      for id in self.image_ids for i in [self._place[id]]
                      for height, width in [self.annotations.sizes[i].tolist()]]
            categories = [{"id": row.id, "name": row.name, "isthing": int(row.isthing)} for row in self.categories]
            content = {"images": images, "annotations": self._results, "categories": categories}
            _write(self.folder / "panoptic.json", json.dumps(content).encode())

    def _gather(self) -> dict[int, _Scored]:
        seen, without_class = gather_seen(self._seen, self._without_class)
        self.image_ids = sorted(seen)
        self._results = [{"image_id": image_id, "file_name": _png_name(image_id),
                          "segments_info": seen[image_id].segments_info} for image_id in self.image_ids]
        if is_main():
            if without_class:
                print(f"left out of the results: {counted(without_class.total(), 'segment')} of labels that the data "
                      f"does not use ({', '.join(map(str, sorted(without_class)))})")
            if len(seen) < len(self.annotations):
                print(f"scored: {len(seen)} of the {len(self.annotations)} images of the ground truth")
        return seen


def count_matches(truth: np.ndarray, truth_class: np.ndarray, crowd: np.ndarray, found: np.ndarray,
                  found_class: np.ndarray, classes: int) -> np.ndarray:
    """One image -> for each class the sum of IoUs of matches, and the numbers of true positives, false positives and
    false negatives: float64 ``[classes, 4]``.

    ``truth`` and ``found`` ``[H, W]`` number the segments of each pixel from 1; 0 is void. ``truth_class [N]`` and
    ``found_class [M]`` are their classes, and ``crowd [N]`` is True for groups that are not told apart.

    A segment and a prediction of its class match where their IoU exceeds 1/2, which no other pair of either can (section
    4.1). Pixels that are void in truth do not belong to the prediction in this; crowds match nothing. A prediction
    without a match is wrong unless more than half of it is void in truth or in crowds of its class (section 4.2). All
    crowds of a class count there, of which COCO's own program sees the last alone.
    """
    n, m = len(truth_class), len(found_class)
    pair = truth.astype(np.int64) * (m + 1) + found
    pixels = np.bincount(pair.ravel(), minlength=(n + 1) * (m + 1)).reshape(n + 1, m + 1)
    void, overlap = pixels[0, 1:], pixels[1:, 1:]                                       # [M], [N, M]
    found_area = pixels[:, 1:].sum(0)                                                   # [M]
    union = pixels[1:].sum(1)[:, None] + (found_area - void) - overlap
    same = truth_class[:, None] == found_class
    match = same & ~crowd[:, None] & (2 * overlap > union)
    excused = void + (overlap * (same & crowd[:, None])).sum(0)
    wrong = ~match.any(0) & (2 * excused <= found_area)
    missed = ~match.any(1) & ~crowd
    rows, columns = np.nonzero(match)
    iou = overlap[rows, columns] / union[rows, columns]
    return np.stack([np.bincount(truth_class[rows], iou, classes),
                     np.bincount(truth_class[rows], minlength=classes),
                     np.bincount(found_class[wrong], minlength=classes),
                     np.bincount(truth_class[missed], minlength=classes)], axis=1)


def summary(counts: np.ndarray, categories: list[Category]) -> dict[str, Any]:
    """Counts ``[classes, 4]`` of all images, see ``count_matches`` -> what ``summarize`` returns: of each class SQ, the
    mean IoU of its matches, RQ, their F1 score, and PQ, the product (section 4.1), and means over classes."""
    iou, right, wrong, missed = counts.T
    there = right + wrong + missed > 0
    segments = np.where(there, right + wrong / 2 + missed / 2, 1)            # of truth and prediction, halved
    pq, sq, rq = iou / segments, iou / np.maximum(right, 1), right / segments

    def mean(some: np.ndarray) -> dict[str, float]:
        n = int(some.sum())
        values = [float(x[some].mean()) if n else -1.0 for x in (pq, sq, rq)]
        return {**dict(zip(("pq", "sq", "rq"), values)), "n": n}

    things = np.array([category.isthing for category in categories], dtype=bool)
    shared = {name for name, n in Counter(category.name for category in categories).items() if n > 1}
    per_class = {}
    for k, category in enumerate(categories):
        values = [float(x[k]) if there[k] else -1.0 for x in (pq, sq, rq)]
        name = f"{category.name} ({category.id})" if category.name in shared else category.name
        per_class[name] = {**dict(zip(("pq", "sq", "rq"), values)), "segments": int(right[k] + missed[k])}
    return {"PQ_all": mean(there), "PQ_th": mean(there & things), "PQ_st": mean(there & ~things),
            "PQ_per_class": per_class}


def _table(results: dict[str, Any], columns: int = 2) -> str:
    """PQ, SQ and RQ, in percent, of all, things and stuff with the number of classes, then of each class with the number
    of segments, down the columns; "-" where there is nothing to measure."""
    def numbers(row: dict[str, float]) -> str:
        return " ".join("    -" if row[key] < 0 else f"{100 * row[key]:5.1f}" for key in ("pq", "sq", "rq"))

    per_class = results["PQ_per_class"]
    width = max(8, *map(len, per_class))
    title = f"{'PQ':>5} {'SQ':>5} {'RQ':>5}"
    lines = [f"{'panoptic':<{width}} {title} {'classes':>8}"]
    for name, key in (("all", "PQ_all"), ("things", "PQ_th"), ("stuff", "PQ_st")):
        lines.append(f"{name:<{width}} {numbers(results[key])} {results[key]['n']:>8}")
    cells = [f"{name:<{width}} {numbers(row)} {row['segments']:>8}" for name, row in per_class.items()]
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    lines.append("   ".join([f"{'class':<{width}} {title} {'segments':>8}"] * columns))
    return "\n".join([*lines, *("   ".join(cells[row::rows]) for row in range(rows))])


def _png_name(image_id: int) -> str:
    return f"{image_id:012d}.png"


def _write(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
