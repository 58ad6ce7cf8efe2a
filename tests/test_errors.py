"""datasets/errors.py against its definition, against pycocotools, against tidecv's numbers and supervision's matrix."""
import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.cocoeval import COCOeval
from small_detections import small_detections

from datasets import errors
from datasets.annotations import index
from datasets.errors import CORRECT, ERRORS, IGNORED, KINDS, best_f1, confusion, costs, errors_of, judge, judge_image
from datasets.fast_coco_eval import Found


def iou(a, b, crowd=False):
    """Of two boxes (x, y, width, height), in Python's floats; with a crowd ``b`` the share of ``a`` inside it."""
    w = max(0.0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
    union = a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - w * h
    return w * h / union if union else 0.0


def by_definition(rows, objects, threshold=0.5, least=0.1):
    """Kinds and partners of ``rows`` (class, box, score), given ``objects`` (class, box, crowd): loops over words."""
    out, taken = {}, set()
    for i in sorted(range(len(rows)), key=lambda i: -rows[i][2]):
        id, box, _ = rows[i]
        near = [(iou(box, b), j) for j, (c, b, crowd) in enumerate(objects) if c == id and not crowd and j not in taken]
        on = [(iou(box, b, True), j) for j, (c, b, crowd) in enumerate(objects) if c == id and crowd]
        if near and max(near)[0] >= threshold:
            out[i] = "correct", max(near)[1]
            taken.add(max(near)[1])
        elif on and max(on)[0] >= threshold:
            out[i] = "ignored", max(on)[1]
    for i, (id, box, _) in enumerate(rows):
        if i not in out:
            alike = max(((iou(box, b), j) for j, (c, b, crowd) in enumerate(objects) if c == id and not crowd),
                        default=(0, -1))
            other = max(((iou(box, b), j) for j, (c, b, crowd) in enumerate(objects) if c != id and not crowd),
                        default=(0, -1))
            out[i] = ("localisation", alike[1]) if least <= alike[0] < threshold else \
                ("class", other[1]) if other[0] >= threshold else \
                ("duplicate", alike[1]) if alike[0] >= threshold else \
                ("both", other[1]) if other[0] >= least else ("background", -1)
    return [out[i] for i in range(len(rows))]


@pytest.mark.parametrize("seed, crowds", [(0, 0), (1, 0), (2, 0.3), (3, 0.3)])
def test_kinds_are_those_of_the_definition(seed, crowds):
    coco, found = small_detections(seed, crowds=crowds)
    judged = judge(coco, found)
    seen = set()
    for i, image_id in enumerate(found):
        one, objects = found[image_id], coco.imgToAnns[image_id]
        expected = by_definition(list(zip(one.category_ids.tolist(), one.boxes_xywh.tolist(), one.scores.tolist())),
                                 [(gt["category_id"], gt["bbox"], gt["iscrowd"]) for gt in objects])
        mine = slice(judged.starts[i], judged.starts[i + 1])
        partners = judged.partner[mine] - np.where(judged.partner[mine] < 0, 0, judged.object_starts[i])
        assert list(zip([KINDS[kind] for kind in judged.kind[mine]], partners.tolist())) == expected
        seen |= {kind for kind, _ in expected}
    assert seen >= set(KINDS) - ({"ignored"} if not crowds else set())


def pycocotools(coco, found):
    with contextlib.redirect_stdout(io.StringIO()):
        rows = [row for image_id, one in found.items() for row in one.rows(image_id, ("bbox",))]
        judge = COCOeval(coco, coco.loadRes(rows), "bbox")
        judge.params.imgIds = sorted(found)
        judge.evaluate()
        judge.accumulate()
    return judge


@pytest.mark.parametrize("seed, options", [(0, {}), (1, {"crowds": 0.3}), (2, {"crowds": 0.2, "scores": 4}),
                                           (3, {"classes": 1, "detections": 160})])
def test_who_finds_whom_is_pycocotools_affair(seed, options):
    """Its ``dtMatches`` and ``dtIgnore`` at IoU 0.5, crowds, equal scores and more than 100 of a class included."""
    coco, found = small_detections(seed, **options)
    judged, reference = judge(coco, found), pycocotools(coco, found)
    theirs = {}
    for result in filter(None, reference.evalImgs[:len(reference.evalImgs) // 4 * 4]):
        if result["aRng"] == reference.params.areaRng[0]:
            for score, match, ignored in zip(result["dtScores"], result["dtMatches"][0], result["dtIgnore"][0]):
                place = result["image_id"], result["category_id"]
                theirs.setdefault(place, []).append((score, int(match), bool(ignored)))
    annotations = [row["id"] for image_id in sorted(found) for row in coco.imgToAnns[image_id]]
    ours = {}
    for k in np.lexsort((-judged.score, judged.category, judged.image)):
        place = int(judged.image_ids[judged.image[k]]), int(judged.category_ids[judged.category[k]])
        matched = judged.kind[k] in (CORRECT, IGNORED)
        ours.setdefault(place, []).append((float(judged.score[k]), annotations[judged.partner[k]] if matched else 0,
                                           bool(judged.kind[k] == IGNORED)))
    assert ours == theirs and sum(map(len, ours.values())) > 80
    if "classes" in options:
        assert len(judged.score) < sum(len(one.scores) for one in found.values())
    counted = judged.kind != IGNORED
    ap = errors.average_precisions(judged.category[counted], judged.score[counted], judged.kind[counted] == CORRECT,
                                   judged.positives)
    precision = reference.eval["precision"][0, :, :, 0, -1].mean(0)
    np.testing.assert_allclose(np.nan_to_num(ap, nan=-1.0), precision, atol=1e-12)


def test_of_objects_that_overlap_alike_pycocotools_takes_the_last():
    coco, found = small_detections(0, images=1)
    rows = [{"id": k + 1, "image_id": 10, "category_id": 2, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
            for k in range(3)]
    coco = index({**coco.dataset, "annotations": rows})
    found = {10: Found(np.array([2, 2]), np.array([[10, 10, 20, 18.0]] * 2), np.array([0.9, 0.8]), None, None)}
    matches = [result["dtMatches"][0].tolist() for result in pycocotools(coco, found).evalImgs if result][0]
    assert [rows[partner]["id"] for partner in judge(coco, found).partner] == matches == [3, 2]


# tidecv 1.0.1 on small_detections(0), (1), (2): counts of errors, and how much AP50 is gained without them.
TIDE = [({"localisation": (16, 0.082701702), "class": (17, 0.009632808), "both": (16, 0.019074426),
          "duplicate": (16, 0.014541332), "background": (45, 0.07610643), "missed": (9, 0.131562048)}),
        ({"localisation": (25, 0.017181693), "class": (13, 0.041918605), "both": (5, 0.018406121),
          "duplicate": (24, 0.010767505), "background": (76, 0.121736031), "missed": (3, 0.043514549)}),
        ({"localisation": (10, 0.000707214), "class": (5, 0.091074107), "both": (7, 0.025851603),
          "duplicate": (13, 0.015469047), "background": (71, 0.110607936), "missed": (10, 0.111121737)})]


@pytest.mark.parametrize("seed", range(3))
def test_counts_and_costs_are_tides(seed, monkeypatch):
    judged = judge(*small_detections(seed))
    monkeypatch.setattr(errors, "RECALLS", np.arange(101) / 100)        # tidecv's, some an ulp from pycocotools'
    gained = costs(judged)
    for kind, (count, cost) in TIDE[seed].items():
        mine = judged.missed(-1).sum() if kind == "missed" else (judged.kind == KINDS.index(kind)).sum()
        assert (kind, mine) == (kind, count)
        assert max(gained[kind], 0) == pytest.approx(cost, abs=1e-8), kind
    assert set(gained) == set(ERRORS)


@pytest.mark.parametrize("scores", [0, 5])
@pytest.mark.parametrize("seed", range(6))
def test_best_f1_by_trying_every_threshold(seed, scores):
    judged = judge(*small_detections(seed, images=4, scores=scores))
    right, positives = judged.kind == CORRECT, int(judged.positives.sum())
    tried = []
    for threshold in sorted(set(judged.score.tolist()), reverse=True):
        kept = judged.score >= threshold
        precision, recall = float(right[kept].sum() / kept.sum()), float(right[kept].sum() / positives)
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        tried.append((round(f1, 12), threshold, precision, recall))
    f1, threshold, precision, recall = max(tried)
    found = best_f1(judged.score, right, positives)
    assert found.threshold == threshold
    assert tuple(found[1:]) == pytest.approx((precision, recall, f1), abs=1e-12)


def test_best_f1_of_nothing():
    assert best_f1(np.zeros(0), np.zeros(0, bool), 3) is None
    assert best_f1(np.array([0.5]), np.array([False]), 0) is None
    assert best_f1(np.array([0.5]), np.array([False]), 2).f1 == 0


@pytest.mark.parametrize("seed", range(4))
def test_confusion_matrix_is_supervisions(seed):
    supervision = pytest.importorskip("supervision", reason="compares with supervision: pip install supervision")
    coco, found = small_detections(seed)
    place = {id: k for k, id in enumerate(coco.getCatIds())}

    def detections(ids, boxes_xywh, scores=None):
        boxes = np.array(boxes_xywh, dtype=np.float64).reshape(-1, 4)
        return supervision.Detections(xyxy=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
                                      class_id=np.array([place[id] for id in ids], dtype=int), confidence=scores)

    truth = [detections([gt["category_id"] for gt in coco.imgToAnns[id]], [gt["bbox"] for gt in coco.imgToAnns[id]])
             for id in found]
    seen = [detections(one.category_ids.tolist(), one.boxes_xywh, one.scores) for one in found.values()]
    for threshold in (0.0, 0.4):
        expected = supervision.ConfusionMatrix.from_detections(seen, truth, [str(id) for id in place], threshold, 0.5)
        np.testing.assert_array_equal(confusion(judge(coco, found), threshold), expected.matrix)


def test_confusion_matrix_of_a_few_boxes():
    """A cat found as a dog though a surer box is a cat's; a dog nobody found; a box on nothing; one on a crowd."""
    rows = [(1, [0, 0, 10, 10], 0), (2, [40, 0, 10, 10], 0), (1, [80, 0, 10, 10], 0), (2, [0, 50, 50, 50], 1)]
    coco = index({"images": [{"id": 1}], "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
                  "annotations": [{"id": k + 1, "image_id": 1, "category_id": id, "bbox": box, "area": 100,
                                   "iscrowd": crowd} for k, (id, box, crowd) in enumerate(rows)]})
    boxes = np.array([[0, 0, 10, 10], [0, 0, 9, 10], [80, 0, 10, 9], [120, 0, 9, 9], [10, 60, 5, 5], [40, 0, 10, 10]])
    found = Found(np.array([2, 1, 2, 1, 2, 2]), boxes, np.array([0.9, 0.8, 0.7, 0.6, 0.95, 0.2]), None, None)
    judged = judge(coco, {1: found})
    np.testing.assert_array_equal(confusion(judged, 0.5), [[1, 1, 0], [0, 0, 1], [1, 1, 0]])
    np.testing.assert_array_equal(confusion(judged, 0.1), [[1, 1, 0], [0, 1, 0], [1, 1, 0]])


# One image.

def detections(*rows):
    """Rows of (label, score, left, top, right, bottom)."""
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"labels": rows[:, 0].long(), "scores": rows[:, 1], "boxes": rows[:, 2:]}


def test_errors_of_an_image():
    """One error of each kind, in the order of the detections, below the threshold none."""
    found = detections((0, 0.3, 0, 0, 10, 10), (0, 0.6, 0, 0, 9, 10), (0, 0.9, 0, 0, 10, 10), (1, 0.8, 20, 0, 26, 5),
                       (0, 0.8, 40, 0, 50, 10), (0, 0.7, 63, 0, 73, 10), (1, 0.7, 80, 80, 90, 90),
                       (1, 0.5, 60, 60, 65, 65))
    boxes_xyxy = torch.tensor([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [67, 0, 77, 10], [5, 90, 10, 99],
                               [50, 50, 70, 70.]])
    labels, crowd = torch.tensor([0, 1, 1, 1, 0, 1]), torch.tensor([0, 0, 0, 0, 0, 1])
    seen = errors_of(found, boxes_xyxy, labels, crowd)
    assert seen.kinds == ["duplicate", "correct", "localisation", "class", "both", "background", "ignored"]
    assert seen.places == [1, 2, 3, 4, 5, 6, 7]
    assert seen.partners == [0, 0, 1, 2, 3, -1, 5]
    assert seen.missed == [3, 4]                                    # 1 and 2 are explained; "both" explains nothing
    assert seen.total == 7
    surest = errors_of(found, boxes_xyxy, labels, crowd, threshold=0.85)
    assert (surest.kinds, surest.missed, surest.total) == (["correct"], [1, 2, 3, 4], 4)
    no_crowd = errors_of(found, boxes_xyxy, labels)
    assert (no_crowd.kinds[-1], no_crowd.missed) == ("background", [3, 4, 5])


def test_errors_of_an_image_without():
    empty = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert errors_of(detections(), *empty) == ([], [], [], []) and errors_of(detections(), *empty).total == 0
    assert errors_of(detections((0, 0.9, 0, 0, 5, 5)), *empty).kinds == ["background"]
    assert errors_of(detections(), torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)).missed == [0, 1]


def test_errors_of_an_image_are_those_of_the_data_set():
    coco, found = small_detections(5, crowds=0.2)
    judged = judge(coco, found)
    label = {id: k for k, id in enumerate(coco.getCatIds())}
    totals = []
    for image_id, one in found.items():
        objects = coco.imgToAnns[image_id]
        boxes, theirs = torch.tensor(one.boxes_xywh), torch.tensor([gt["bbox"] for gt in objects]).reshape(-1, 4)
        for corners in (boxes, theirs):
            corners[:, 2:] += corners[:, :2]
        seen = errors_of({"scores": torch.tensor(one.scores), "boxes": boxes,
                          "labels": torch.tensor([label[id] for id in one.category_ids.tolist()], dtype=torch.int64)},
                         theirs, torch.tensor([label[gt["category_id"]] for gt in objects], dtype=torch.int64),
                         torch.tensor([gt["iscrowd"] for gt in objects], dtype=torch.int64), threshold=0.4)
        totals.append(seen.total)
    assert judged.errors_of_images(0.4).tolist() == totals and sum(totals) > 50
    assert (judged.found(0.4) <= judged.found(-1)).all() and (judged.missed(0.4) >= judged.missed(-1)).all()


def test_order_of_detections_does_not_matter():
    coco, found = small_detections(6)
    one, objects = found[10], coco.imgToAnns[10]
    truth = (np.array([gt["category_id"] for gt in objects]), np.array([gt["bbox"] for gt in objects]),
             np.zeros(len(objects), bool))
    kinds, partners = judge_image(one.category_ids, one.boxes_xywh, one.scores, *truth)
    other = np.random.default_rng(0).permutation(len(kinds))
    again = judge_image(one.category_ids[other], one.boxes_xywh[other], one.scores[other], *truth)
    assert len(objects) and len(set(kinds.tolist())) > 2
    np.testing.assert_array_equal(again, (kinds[other], partners[other]))


def test_classes_that_the_data_lacks_are_left_out():
    coco, found = small_detections(0, images=2)
    strange = {id: one._replace(category_ids=np.where(np.arange(len(one.scores)) % 2, one.category_ids, 9999))
               for id, one in found.items()}
    judged = judge(coco, strange)
    assert len(judged.score) == sum(len(one.scores) // 2 for one in found.values()) > 0
    assert set(judged.category_ids[judged.category]) <= set(coco.getCatIds())


def test_what_cannot_be():
    boxes, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"boxes_xyxy \[2, 4\], labels \[1\]"):
        errors_of(detections(), boxes, labels[:1])
    with pytest.raises(ValueError, match=r"iscrowd \[1\]"):
        errors_of(detections(), boxes, labels, labels[:1])
    with pytest.raises(ValueError, match="least 0.6, iou 0.5"):
        errors_of(detections(), boxes, labels, least=0.6)
    with pytest.raises(ValueError, match="no image"):
        judge(small_detections(0)[0], {})
