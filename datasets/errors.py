"""What kind of error each detection is, and what errors cost (TIDE: Bolya et al., 2020, section 2).

Detections find objects as pycocotools has it: the surest first, each takes the object of its class, free as yet, that it
overlaps most. What found nothing is named after the object that it overlaps; with ``iou`` 0.5 and ``least`` 0.1:

- localisation: an object of its class is there, with an IoU of ``least`` to ``iou``;
- class: an object of another class is there, with at least ``iou``;
- duplicate: an object of its class is there, with at least ``iou``, and has been found already;
- both: an object of another class is there, with ``least`` to ``iou``;
- background: no object is there, or with less than ``least``.

The first that holds, in this order. A detection on a crowd of its class is ignored. An object is missed where no
detection has found it and none of the first two errors is about it.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor

from datasets.fast_coco_eval import Found
from detr.boxes import box_xyxy_to_xywh
from detr.structures import Detections

KINDS = ("correct", "localisation", "class", "both", "duplicate", "background", "ignored")
CORRECT, LOCALISATION, CLASS, BOTH, DUPLICATE, BACKGROUND, IGNORED = range(len(KINDS))
ERRORS = (*KINDS[LOCALISATION:IGNORED], "missed")


class Sign(NamedTuple):
    """How a kind is shown, wherever it is: colours are Okabe and Ito's (2008), and never alone."""
    letter: str                         # of the errors
    colour: str
    words: str


SIGNS = {
    "correct": Sign("", "#009e73", "correct"), "ignored": Sign("", "#999999", "ignored region"),
    "localisation": Sign("L", "#e69f00", "badly placed"), "class": Sign("C", "#56b4e9", "wrong class"),
    "both": Sign("B", "#cc79a7", "wrong class, badly placed"), "duplicate": Sign("D", "#f0e442", "duplicate"),
    "background": Sign("N", "#d55e00", "nothing there"), "missed": Sign("M", "#0072b2", "missed")}
RECALLS = np.linspace(0, 1, 101)                    # of pycocotools' average precision
MOST = 100                                          # detections of a class in an image that count, as pycocotools has it


class ImageErrors(NamedTuple):
    """What is right and wrong in an image; a row for each detection that is sure enough, in their order."""
    kinds: list[str]                    # one of ``KINDS``
    places: list[int]                   # its index in the detections
    partners: list[int]                 # index of the object, or crowd, that it is about; -1 for background
    missed: list[int]                   # indices of the objects that are missed

    @property
    def total(self) -> int:
        """The number of errors."""
        return len(self.missed) + sum(kind not in ("correct", "ignored") for kind in self.kinds)


def errors_of(found: Detections, boxes_xyxy: Tensor, labels: Tensor, iscrowd: Tensor | None = None,
              threshold: float = 0.5, iou: float = 0.5, least: float = 0.1) -> ImageErrors:
    """The errors of the detections of an image whose score is at least ``threshold``.

    ``boxes_xyxy [N, 4]``, ``labels [N]`` are the objects, in the pixels of ``found["boxes"]``; ``iscrowd [N]`` is 1 for
    crowds, 0 by default. Raises ValueError for other shapes.
    """
    if boxes_xyxy.shape != (len(labels), 4) or (iscrowd is not None and iscrowd.shape != labels.shape):
        raise ValueError(f"boxes_xyxy {list(boxes_xyxy.shape)}, labels {list(labels.shape)}, iscrowd "
                         f"{None if iscrowd is None else list(iscrowd.shape)}: [N, 4], [N] and [N] are needed")
    scores = found["scores"].detach().cpu().double()
    kept = (scores >= threshold).nonzero()[:, 0]
    crowd = np.zeros(len(labels), bool) if iscrowd is None else iscrowd.cpu().numpy() > 0
    kinds, partners = judge_image(found["labels"].detach().cpu()[kept].numpy(),
                                  _xywh(found["boxes"].detach().cpu()[kept]), scores[kept].numpy(),
                                  labels.cpu().numpy(), _xywh(boxes_xyxy.cpu()), crowd, iou, least)
    return ImageErrors([KINDS[kind] for kind in kinds], kept.tolist(), partners.tolist(),
                       (~crowd & ~explained(kinds, partners, len(labels))).nonzero()[0].tolist())


def _xywh(boxes_xyxy: Tensor) -> np.ndarray:
    """Subtracted in their own precision, as the predictions that are scored are."""
    return box_xyxy_to_xywh(boxes_xyxy).double().numpy()


def judge_image(classes: np.ndarray, boxes_xywh: np.ndarray, scores: np.ndarray, object_classes: np.ndarray,
                objects_xywh: np.ndarray, crowd: np.ndarray, iou: float = 0.5,
                least: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Kind (an index of ``KINDS``) and partner (an object's index or -1) of each of an image's detections: two ``[n]``.

    ``classes [n]``, ``boxes_xywh [n, 4]``, ``scores [n]`` are the detections, ``object_classes [N]``, ``objects_xywh
    [N, 4]`` the objects, with ``crowd [N]`` bool. The overlap with a crowd is the share of the detection within it.
    """
    if not 0 <= least < iou <= 1:
        raise ValueError(f"least {least}, iou {iou}: an overlap between them makes an error of localisation, so "
                         f"0 <= least < iou <= 1 is needed")
    kinds, partners = np.full(len(classes), BACKGROUND), np.full(len(classes), -1)
    if not (len(classes) and len(crowd)):
        return kinds, partners
    overlap = rle.iou(boxes_xywh, objects_xywh, crowd.tolist())                                     # [n, N]
    same, iou = classes[:, None] == object_classes, min(iou, 1 - 1e-10)
    near = same & (overlap >= iou)
    free, there = ~crowd, near.any(1)
    for i in np.argsort(-scores, kind="stable"):
        if there[i]:
            for kind, mine in ((CORRECT, near[i] & free), (IGNORED, near[i] & crowd)):
                if mine.any():
                    kinds[i], partners[i] = kind, _last_largest(np.where(mine, overlap[i], -1))
                    free[partners[i]] = False
                    break
    wrong = (kinds == BACKGROUND).nonzero()[0]
    overlap, same = overlap[wrong], same[wrong]
    alike, other = np.where(same & ~crowd, overlap, -1.0), np.where(~same & ~crowd, overlap, -1.0)
    of_class, of_other = alike.max(1), other.max(1)
    close = (of_class >= least) & (of_class < iou)
    conditions = [close, of_other >= iou, of_class >= iou, of_other >= least]
    kinds[wrong] = np.select(conditions, [LOCALISATION, CLASS, DUPLICATE, BOTH], BACKGROUND)
    about = alike.argmax(1), other.argmax(1)
    partners[wrong] = np.select(conditions, [about[0], about[1], about[0], about[1]], -1)
    return kinds, partners


def _last_largest(values: np.ndarray) -> int:
    """Where the largest is; the last of equals, as pycocotools takes it."""
    return len(values) - 1 - int(values[::-1].argmax())


def explained(kinds: np.ndarray, partners: np.ndarray, n: int) -> np.ndarray:
    """``[n]`` bool: which objects a detection has found, or would with a better box or the right class."""
    there = np.zeros(n, bool)
    there[partners[(kinds == CORRECT) | (kinds == LOCALISATION) | (kinds == CLASS)]] = True
    return there


# Over a data set.

class Judged(NamedTuple):
    """The detections of a data set and its objects. Images and classes are places in ``image_ids``, ``category_ids``."""
    image_ids: np.ndarray
    category_ids: np.ndarray
    starts: np.ndarray                  # [images + 1] where the detections of each image begin
    category: np.ndarray                # [n]
    boxes_xywh: np.ndarray              # [n, 4] in pixels
    score: np.ndarray                   # [n]
    kind: np.ndarray                    # [n] int8, index of ``KINDS``
    partner: np.ndarray                 # [n] the object, of all, that it is about; -1
    object_starts: np.ndarray           # [images + 1]
    object_category: np.ndarray         # [N]
    objects_xywh: np.ndarray            # [N, 4]
    area: np.ndarray                    # [N] pixels, as the annotations say
    crowd: np.ndarray                   # [N] bool
    iou: float                          # that finds an object

    @property
    def image(self) -> np.ndarray:
        """``[n]`` the image of each detection."""
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.starts))

    @property
    def object_image(self) -> np.ndarray:
        """``[N]`` the image of each object."""
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.object_starts))

    @property
    def positives(self) -> np.ndarray:
        """``[classes]`` the number of objects, without crowds."""
        return np.bincount(self.object_category[~self.crowd], minlength=len(self.category_ids))

    def found(self, threshold: float) -> np.ndarray:
        """``[N]`` bool: the objects that a detection of at least ``threshold`` has found."""
        there = np.zeros(len(self.crowd), bool)
        there[self.partner[(self.kind == CORRECT) & (self.score >= threshold)]] = True
        return there

    def missed(self, threshold: float) -> np.ndarray:
        """``[N]`` bool: the objects that are missed when detections below ``threshold`` are left out."""
        kept = self.score >= threshold
        return ~self.crowd & ~explained(self.kind[kept], self.partner[kept], len(self.crowd))

    def errors_of_images(self, threshold: float) -> np.ndarray:
        """``[images]`` the number of errors, ``ImageErrors.total``, when detections below ``threshold`` are left out."""
        wrong = (self.score >= threshold) & (self.kind != CORRECT) & (self.kind != IGNORED)
        images = np.concatenate([self.image[wrong], self.object_image[self.missed(threshold)]])
        return np.bincount(images, minlength=len(self.image_ids))


def judge(coco: COCO, found: Mapping[int, Found], iou: float = 0.5, least: float = 0.1) -> Judged:
    """Judge the predictions ``found`` of images, by their ids, against the objects of ``coco``. As in pycocotools,
    classes that ``coco`` does not have are left out, and so is what is beyond the ``MOST`` surest of a class in an image.
    What is kept of a detection has 33 bytes. Raises ValueError where there are no images."""
    if not found:
        raise ValueError("predictions of no image: nothing to judge; give those of at least one, which may be empty")
    category_ids = np.unique(np.array(coco.getCatIds(), dtype=np.int64))
    image_ids = np.unique(np.array(list(found), dtype=np.int64))
    detections: list[tuple[np.ndarray, ...]] = []
    objects: list[tuple[np.ndarray, ...]] = []
    before = 0
    for image_id in image_ids.tolist():
        one, rows = found[image_id], coco.imgToAnns.get(image_id, ())
        theirs = np.searchsorted(category_ids, [row["category_id"] for row in rows])
        objects_xywh = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        crowd = np.array([bool(row["iscrowd"]) for row in rows], dtype=bool)
        objects.append((theirs, objects_xywh, np.array([row["area"] for row in rows], dtype=np.float64), crowd))
        kept = np.flatnonzero(_kept(one, category_ids))
        category = np.searchsorted(category_ids, one.category_ids[kept])
        boxes_xywh, score = one.boxes_xywh[kept], one.scores[kept]
        kind, partner = judge_image(category, boxes_xywh, score, theirs, objects_xywh, crowd, iou, least)
        detections.append((category.astype(np.int32), boxes_xywh, score, kind.astype(np.int8),
                           np.where(partner < 0, -1, partner + before).astype(np.int64)))
        before += len(rows)
    return Judged(image_ids, category_ids, _starts(detections), *_columns(detections), _starts(objects),
                  *_columns(objects), iou)


def _kept(found: Found, category_ids: np.ndarray) -> np.ndarray:
    """``[n]`` bool."""
    kept = np.isin(found.category_ids, category_ids)
    if len(kept) > MOST:
        for id in np.unique(found.category_ids[kept]):
            of_class = np.flatnonzero(found.category_ids == id)
            kept[of_class[np.argsort(-found.scores[of_class], kind="stable")[MOST:]]] = False
    return kept


def _starts(images: list[tuple[np.ndarray, ...]]) -> np.ndarray:
    return np.cumsum([0, *(len(columns[0]) for columns in images)])


def _columns(images: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """The rows of all images, column by column."""
    return [np.concatenate(column) for column in zip(*images)]


def average_precisions(category: np.ndarray, score: np.ndarray, right: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """pycocotools' average precision of each class ``[classes]``, NaN where it has no objects (``positives``)."""
    out = np.full(len(positives), np.nan)
    order = np.lexsort((-score, category))
    ends = np.searchsorted(category[order], np.arange(len(positives) + 1))
    for k, (start, end) in enumerate(zip(ends, ends[1:])):
        if positives[k]:
            of_class = right[order[start:end]]
            hits = of_class.cumsum()
            precision = hits / (np.arange(len(hits)) + 1 + np.spacing(1))
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            reached = np.searchsorted(hits / positives[k], RECALLS, side="left")
            out[k] = precision[reached[reached < len(hits)]].sum() / len(RECALLS)
    return out


def costs(judged: Judged) -> dict[str, float]:
    """For each kind of error the mean average precision that is gained, at the IoU that was judged with, where these
    errors alone are mended, over all detections (TIDE, section 2.3). Each kind for itself, so they do not add up.

    Localisation and class: the surest detection about an object that nobody has found becomes right, others go.
    Both, duplicate, background: they go. Missed: their objects go; a class that has none left keeps an AP of 0.
    """
    counted = judged.kind != IGNORED
    category, score, kind, partner = (column[counted] for column in (judged.category, judged.score, judged.kind,
                                                                     judged.partner))
    positives, right = judged.positives, kind == CORRECT
    now = _mean(average_precisions(category, score, right, positives))
    mendable = np.flatnonzero((kind == LOCALISATION) | (kind == CLASS))
    mendable = mendable[~judged.found(-np.inf)[partner[mendable]]]
    surest = np.lexsort((-score[mendable], partner[mendable]))
    mended = mendable[surest[np.unique(partner[mendable][surest], return_index=True)[1]]]
    gained = {}
    for error in range(LOCALISATION, IGNORED):
        keep, better, fixed = kind != error, right.copy(), category.copy()
        if error in (LOCALISATION, CLASS):
            these = mended[kind[mended] == error]
            keep[these], better[these], fixed[these] = True, True, judged.object_category[partner[these]]
        gained[KINDS[error]] = _mean(average_precisions(fixed[keep], score[keep], better[keep], positives)) - now
    missed = np.bincount(judged.object_category[judged.missed(-np.inf)], minlength=len(positives))
    left = average_precisions(category, score, right, positives - missed)
    gained["missed"] = _mean(np.where((positives > 0) & np.isnan(left), 0, left)) - now
    return gained


def _mean(values: np.ndarray) -> float:
    measured = values[~np.isnan(values)]
    return float(measured.mean()) if len(measured) else 0.0


class Best(NamedTuple):
    """The score threshold at which F1, the harmonic mean of precision and recall, is highest."""
    threshold: float
    precision: float
    recall: float
    f1: float


def best_f1(score: np.ndarray, right: np.ndarray, positives: int) -> Best | None:
    """Over all thresholds that tell detections apart, the highest of equals; None where there are no objects to find or
    no detections. ``score [n]``, ``right [n]`` bool; ``positives`` objects."""
    if not (positives and len(score)):
        return None
    order = np.argsort(-score, kind="stable")
    ordered, hits = score[order], right[order].cumsum()
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))          # of equal scores, which come together
    f1 = 2 * hits[last] / (last + 1 + positives)
    k = int(f1.argmax())
    n = int(last[k]) + 1
    return Best(float(ordered[last[k]]), float(hits[last[k]] / n), float(hits[last[k]] / positives), float(f1[k]))


def confusion(judged: Judged, threshold: float) -> np.ndarray:
    """``[classes + 1, classes + 1]`` objects of a class (row) that were found as a class (column), at an IoU of at least
    ``judged.iou``. The last row are detections of what is no object, the last column objects that nothing has found.

    Each object goes with at most one detection of at least ``threshold``, and each of these with at most one object:
    pairs of a class first, of these the most overlapping. Detections that are ignored are left out.
    """
    n = len(judged.category_ids)
    matrix = np.zeros((n + 1, n + 1), int)
    kept = (judged.score >= threshold) & (judged.kind != IGNORED)
    for start, end, first, last in zip(judged.starts, judged.starts[1:], judged.object_starts, judged.object_starts[1:]):
        mine, theirs = start + np.flatnonzero(kept[start:end]), first + np.flatnonzero(~judged.crowd[first:last])
        found, there = judged.category[mine], judged.object_category[theirs]
        if len(mine) and len(theirs):
            overlap = rle.iou(judged.boxes_xywh[mine], judged.objects_xywh[theirs], [0] * len(theirs))
            rows, columns = np.nonzero(overlap >= judged.iou)
            order = np.lexsort((-overlap[rows, columns], found[rows] != there[columns]))
            mine_free, theirs_free = np.ones(len(mine), bool), np.ones(len(theirs), bool)
            for i, j in zip(rows[order], columns[order]):
                if mine_free[i] and theirs_free[j]:
                    matrix[there[j], found[i]] += 1
                    mine_free[i] = theirs_free[j] = False
            found, there = found[mine_free], there[theirs_free]
        np.add.at(matrix, (n, found), 1)
        np.add.at(matrix, (there, n), 1)
    return matrix
