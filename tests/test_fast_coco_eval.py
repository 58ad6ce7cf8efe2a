"""datasets/fast_coco_eval.py: precisions, recalls, scores and the twelve numbers are pycocotools', bit for bit."""
import contextlib
import copy
import importlib.util
import io
import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval, Params

from datasets import build_dataset, build_evaluators
from datasets.annotations import index
from datasets.coco_eval import CocoEvaluator
from datasets.fast_coco_eval import FastCOCOeval, Found, why_not_fast
from detr.structures import Category

HEIGHT, WIDTH = 120, 160


def truth(images, categories, rows):
    """Rows of (image, category, [x, y, w, h]) and, if need be, what differs from an object of the box's area."""
    annotations = []
    for image_id, category_id, box, *more in rows:
        annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id, "bbox": box,
                            "iscrowd": 0, "area": box[2] * box[3]} | dict(*more))
    return {"images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in images],
            "categories": [{"id": i, "name": f"class {i}"} for i in categories], "annotations": annotations}


def found(*rows):
    """Rows of (image, category, [x, y, w, h] or run lengths, score), as in a json of results."""
    return [{"image_id": image_id, "category_id": category_id, "score": score,
             "segmentation" if isinstance(where, dict) else "bbox": where}
            for image_id, category_id, where, score in rows]


def by_pycocotools(data, results, kind="bbox", image_ids=None):
    """From nothing but pycocotools and two jsons."""
    data, results = copy.deepcopy((data, results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = index(data)
        judge = COCOeval(coco, coco.loadRes(results) if results else index({**data, "annotations": []}), kind)
        if image_ids is not None:
            judge.params.imgIds = image_ids
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def by_the_fast_one(data, results, kind="bbox", image_ids=None):
    coco = index(copy.deepcopy(data))
    seen = {}
    for image_id in image_ids if image_ids is not None else list(coco.imgs):
        rows = [row for row in results if row["image_id"] == image_id]
        masks = [row["segmentation"] for row in rows] if kind == "segm" else None
        seen[image_id] = Found(np.array([row["category_id"] for row in rows], dtype=np.int64),
                               np.array([row.get("bbox", [0] * 4) for row in rows], dtype=float).reshape(-1, 4),
                               np.array([row["score"] for row in rows], dtype=float),
                               masks and [mask["counts"] for mask in masks], masks[0]["size"] if masks else None)
    assert why_not_fast(coco, list(seen)) is None
    with contextlib.redirect_stdout(io.StringIO()):
        judge = FastCOCOeval(coco, seen, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def assert_identical(ours, reference):
    for name in ("precision", "recall", "scores"):
        assert ours.eval[name].dtype == reference.eval[name].dtype == np.float64
        np.testing.assert_array_equal(ours.eval[name], reference.eval[name], err_msg=name)
    np.testing.assert_array_equal(ours.stats, reference.stats)


A, B = [10., 10., 40., 40.], [60., 20., 30., 50.]
CASES = {
    "two objects": ([(1, 1, A), (1, 1, B)], [(1, 1, A, 0.9), (1, 1, [60, 20, 30, 40], 0.8), (1, 1, [0, 0, 9, 9], 0.7)]),
    "a crowd takes all that lies in it": (
        [(1, 1, [0, 0, 100, 100], {"iscrowd": 1}), (1, 1, A)],
        [(1, 1, [5, 5, 30, 30], 0.9), (1, 1, [50, 50, 40, 40], 0.8), (1, 1, A, 0.7), (1, 1, [80, 80, 60, 30], 0.6)]),
    "an object before a crowd of larger IoU": (
        [(1, 1, A, {"iscrowd": 1}), (1, 1, [10, 10, 40, 60])], [(1, 1, A, 0.9), (1, 1, A, 0.8)]),
    "equal scores": ([(1, 1, A), (3, 1, A)], [(1, 1, B, 0.5), (1, 1, A, 0.5), (3, 1, A, 0.5), (3, 1, B, 0.5)]),
    "equal scores in many images": ([(i, 1, A) for i in (1, 3, 7)], [
        (i, 1, [10, 10, 40, 40 - d], s) for i in (1, 3, 7) for d, s in ((9, 0.5), (0, 0.5), (25, 0.25), (3, 0.25))]),
    "equal IoU with two objects": ([(1, 1, A), (1, 1, A), (1, 1, [10, 14, 40, 40])],
                                   [(1, 1, [10, 12, 40, 40], 0.9), (1, 1, A, 0.9), (1, 1, A, 0.9), (1, 1, A, 0.9)]),
    "IoU exactly at thresholds": ([(1, 1, [0, 0, 100, 100])] * 6, [
        (1, 1, [0, 0, 100, part], 0.5 + part / 1000) for part in (50, 55, 60, 65, 70, 75, 80, 85, 90, 95)]),
    "areas exactly at 32 and 96 squared": (
        [(1, 1, [0, 0, 32, 32]), (1, 1, [50, 0, 96, 96]), (3, 1, [0, 0, 40, 40], {"area": 1024}),
         (3, 1, [50, 0, 90, 90], {"area": 9216}), (7, 1, A, {"area": np.nextafter(1024, 0)}),
         (7, 1, B, {"area": np.nextafter(1024, 2000)})],
        [(1, 1, [0, 0, 32, 32], 0.9), (1, 1, [50, 0, 96, 96], 0.8), (1, 1, [0, 60, 64, 16], 0.7), (7, 1, B, 0.3),
         (3, 1, [0, 0, 40, 40], 0.6), (3, 1, [9, 9, 96, 96], 0.5), (7, 1, A, 0.4), (7, 1, [0, 0, 32, 32], 0.2)]),
    "ignored, says the file, which COCO does not ask": (
        [(1, 1, A, {"ignore": 1}), (1, 1, B, {"ignore": 0, "iscrowd": 1})], [(1, 1, A, 0.9), (1, 1, B, 0.8)]),
    "areas of 0": ([(1, 1, [5, 5, 0, 0]), (1, 1, A, {"area": 0})], [(1, 1, [5, 5, 0, 0], 0.9), (1, 1, A, 0.8)]),
    "sides below 0": ([(1, 1, A)], [(1, 1, [50, 50, -40, -40], 0.9), (1, 1, A, 0.8)]),
    "more than 100 of a class": ([(1, 1, A), (1, 2, A)], [(1, 1, [k, 0, 9, 9], 1 - k / 512) for k in range(160)]
                                 + [(1, 1, A, 0.5), (1, 2, A, 0.1)] + [(1, 1, A, 0.9)]),
    "an object of a class that is not in the table": ([(1, 9, A), (1, 1, B)], [(1, 1, B, 0.9)]),
    "predictions of classes that are not in the table": (
        [(1, 3, A), (1, 7, B)], [(1, 2, A, 0.9), (1, 3, B, 0.5), (1, 9, A, 0.8), (1, 7, B, 0.7), (3, 0, A, 0.6)]),
    "classes without objects": ([(1, 2, A)], [(1, 1, A, 0.9), (1, 3, A, 0.8), (3, 2, A, 0.7)]),
    "only a crowd": ([(1, 1, A, {"iscrowd": 1})], [(1, 1, A, 0.9), (1, 1, B, 0.8)]),
    "no objects": ([], [(1, 1, A, 0.9)]),
    "no predictions": ([(1, 1, A), (3, 2, B)], []),
    "nothing": ([], []),
    "scores of 0, below and above 1": (
        [(1, 1, A), (1, 1, B)], [(1, 1, A, 0.), (1, 1, B, -0.), (1, 1, B, -1), (1, 1, A, 7)]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_case_of_its_own(case):
    rows, results = CASES[case]
    data, results = truth([3, 1, 7], [1, 2, 3], rows), found(*results)
    reference = by_pycocotools(data, results)
    ours = by_the_fast_one(data, results)
    assert_identical(ours, reference)
    for image_ids in ([1], [3, 7], [7]):                                            # a part of the images
        assert_identical(by_the_fast_one(data, results, image_ids=image_ids),
                         by_pycocotools(data, results, image_ids=image_ids))


def test_masks_of_classes_that_are_not_in_the_table():
    code = [rle.encode(np.asfortranarray(np.pad(np.ones((9, 9), np.uint8), ((k, 111 - k), (0, 151))))) for k in (0, 30)]
    first, second = ({"size": list(c["size"]), "counts": c["counts"].decode()} for c in code)
    data = truth([1], [1, 2], [(1, 2, [0, 30, 9, 9], {"segmentation": second})])
    results = found((1, 9, second, 0.9), (1, 1, second, 0.8), (1, 2, second, 0.7), (1, 0, first, 0.6))
    assert_identical(by_the_fast_one(data, results, "segm"), by_pycocotools(data, results, "segm"))


@pytest.mark.parametrize("images, categories", [
    ([2**53 + 1, 2**53 + 3], [2**60, 2**60 + 1]), ([-5, 0], [-1, 0]), ([9, 4], [500, 3])])
def test_ids_of_any_kind(images, categories):
    """Whole numbers beyond what a float holds, below 0, and not in order."""
    (i, j), (k, m) = images, categories
    data = truth(images, categories, [(i, k, A), (j, m, B), (j, k, A)])
    results = found((i, k, A, 0.9), (j, m, [60, 20, 30, 40], 0.8), (j, k, B, 0.7), (i, m, A, 0.6))
    assert_identical(by_the_fast_one(data, results), by_pycocotools(data, results))


def random_box(random, grid):
    box = np.concatenate([random.uniform(0, 100, 2), np.exp(random.uniform(0, 4.6, 2))])
    if random.random() < 0.2:
        box[2:] = random.choice([(32, 32), (96, 96), (64, 16), (72, 128)])
    return np.round(box / grid) * grid if grid else box


def random_case(seed, masks=False):
    """Few images with many coincidences: boxes on a grid, objects twice, few different scores, IoU at thresholds."""
    random = np.random.default_rng(seed)
    images, categories = ([int(i) for i in random.choice(9999, random.integers(1, n), replace=False)] for n in (8, 6))
    grid, levels = random.choice([0, 0, 1, 4, 8, 16, 32]), int(random.choice([1, 2, 3, 10, 10**9]))
    rows = []
    for image_id in images:
        for _ in range(random.integers(0, 10)):
            box = random_box(random, grid)
            more = {"iscrowd": int(random.random() < 0.2)}
            if random.random() < 0.3:
                more["area"] = float(random.choice([1024, 9216, np.nextafter(1024, 0), 0, box[2] * box[3] / 2]))
            rows += [(image_id, int(random.choice(categories)), box.tolist(), more)] * random.choice([1, 1, 1, 2])
    data, results = truth(images, categories, rows), []
    for row, number in zip(data["annotations"], random.choice(10**6, len(rows), replace=False)):
        row["id"] = int(number) + 1
    many = random.random() < 0.05
    for image_id in images:
        here = [row for row in data["annotations"] if row["image_id"] == image_id]
        for _ in range(random.integers(100, 300) if many else random.integers(0, 25)):
            box, category_id = random_box(random, grid), int(random.choice(categories))
            if here and random.random() < 0.75:
                row = here[random.integers(len(here))]
                box, chance = np.array(row["bbox"], dtype=float), random.random()
                if random.random() < 0.85:
                    category_id = row["category_id"]
                if chance < 0.3:
                    box[3] *= random.choice(np.arange(50, 100, 5) / 100)
                elif chance < 0.7:
                    box += random.normal(0, 0.1, 4) * box[[2, 3, 2, 3]]
            score = np.float32(random.integers(levels) / levels)
            results += found((image_id, category_id, np.abs(box).astype(np.float32).tolist(), float(score)))
    results = [results[i] for i in random.permutation(len(results))]
    if masks:
        for row in data["annotations"]:
            polygon = shape(row["bbox"], random)
            row["segmentation"] = encoded(polygon, random.choice(["text", "list"])) if row["iscrowd"] else polygon
        for row in results:
            row["segmentation"] = encoded(shape(row.pop("bbox"), random))
    return data, results, sorted(images)[:2] if random.random() < 0.15 else None


def shape(box, random):
    """A rectangle or a quadrangle in the box, within the image."""
    x, y = min(box[0], WIDTH - 2), min(box[1], HEIGHT - 2)
    w, h = max(1, min(box[2], WIDTH - x)), max(1, min(box[3], HEIGHT - y))
    return [[x, y, x + w, y, x + w, y + h, x, y + h] if random.random() < 0.7 else
            [x, y, x + w, y + h / 2, x + w / 2, y + h, x, y + 0.7 * h]]


def encoded(polygon, counts="text"):
    code = rle.merge(rle.frPyObjects(polygon, HEIGHT, WIDTH))
    if counts == "text":
        return {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()}
    pixels = rle.decode(code).T.ravel()
    runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(pixels)) + 1, [pixels.size]])).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": [0] * int(pixels[0]) + runs}


@pytest.mark.parametrize("first, kind", [(0, "bbox"), (40, "bbox"), (80, "bbox"), (1000, "segm")])
def test_random_cases(first, kind):
    met = Counter()
    for seed in range(first, first + 40):
        data, results, image_ids = random_case(seed, kind == "segm")
        reference = by_pycocotools(data, results, kind, image_ids)
        try:
            assert_identical(by_the_fast_one(data, results, kind, image_ids), reference)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from None
        found_classes = Counter((row["image_id"], row["category_id"]) for row in results)
        met += Counter({
            "crowds": any(row["iscrowd"] for row in data["annotations"]),
            "edges": any(row["area"] in (1024, 9216) for row in data["annotations"]),
            "equal scores": len({row["score"] for row in results}) < len(results) / 2,
            "not in order": sorted(image["id"] for image in data["images"]) != [image["id"] for image in data["images"]],
            "a part": image_ids is not None, "over 100": bool(results) and max(found_classes.values()) > 100,
            "between": bool(0 < reference.stats[0] < 1)})
    assert min(met[name] for name in ("crowds", "edges", "equal scores", "not in order", "a part", "over 100",
                                      "between")) > 0, met      # the cases are what they are meant to be


def test_masks_of_another_size_and_empty_ones():
    whole = encoded([[0, 0, WIDTH, 0, WIDTH, HEIGHT, 0, HEIGHT]])
    empty = {"size": [HEIGHT, WIDTH], "counts": rle.encode(np.zeros((HEIGHT, WIDTH), np.uint8, "F"))["counts"].decode()}
    small = {"size": [HEIGHT // 2, WIDTH], "counts": rle.encode(np.ones((HEIGHT // 2, WIDTH), np.uint8, "F"))["counts"]
             .decode()}
    data = truth([1, 3], [1], [(1, 1, A, {"segmentation": [[-50, -50, 400, -20, 400, 300, 0, 300]]}),
                               (3, 1, B, {"segmentation": encoded([[9, 9, 50, 50, 9, 50]])}),
                               (3, 1, B, {"segmentation": [[1, 1, 1.2, 1.1, 1.1, 1.3]]})])
    for results in (found((1, 1, whole, 0.9), (3, 1, empty, 0.8), (3, 1, whole, 0.7)), found((1, 1, small, 0.9))):
        assert_identical(by_the_fast_one(data, results, "segm"), by_pycocotools(data, results, "segm"))


def test_photographs_and_what_is_left_behind(real_data):
    """COCO's own polygons and crowds, one judge after the other on the same ground truth, in which pycocotools puts run
    lengths for polygons; ``eval`` is of the same types as pycocotools' and can be pickled."""
    dataset = build_dataset("val", real_data / "coco_mini", return_masks=True)
    random = np.random.default_rng(3)
    label = {category.id: category.label for category in dataset.categories}
    predictions = {}
    crowds = {row["image_id"] for row in dataset.coco.anns.values() if row["iscrowd"]}
    for image_id in [*crowds, *(i for i in dataset.ids if i not in crowds)][:12]:
        rows = [row for row in dataset.coco.imgToAnns[image_id] for _ in range(2)]
        size = np.array([dataset.coco.imgs[image_id][side] for side in ("height", "width")])
        masks = []
        for row in rows:
            pixels = dataset.coco.annToMask(row)
            masks.append(rle.encode(np.asfortranarray(np.roll(pixels, random.integers(-6, 7, 2), (0, 1)))))
        boxes = np.array([row["bbox"] for row in rows]).reshape(-1, 4) * random.normal(1, 0.05, (len(rows), 4))
        predictions[image_id] = {
            "labels": torch.tensor([label[row["category_id"]] for row in rows], dtype=torch.int64),
            "scores": torch.from_numpy(random.integers(0, 16, len(rows)) / 16).float(),
            "boxes": torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)).float(),
            "masks": [{"size": size.tolist(), "counts": mask["counts"].decode()} for mask in masks]}
    scores, evals = [], []
    for judge in ("fast", "pycocotools", "fast"):
        evaluator, = build_evaluators(dataset, masks=True, judge=judge)
        evaluator.update(predictions)
        scores.append(evaluator.summarize())
        evals.append(evaluator.eval)
    assert len(crowds) >= 3 and scores[0] == scores[1] == scores[2] and 0.1 < scores[0]["coco_eval_masks"][0] < 0.9
    ours, theirs, _ = evals
    assert list(ours) == list(theirs) and ours["counts"] == theirs["counts"] and type(ours["params"]) is Params
    for name in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(ours[name], theirs[name])
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(ours))[name], theirs[name])
        assert type(ours[name]) is np.ndarray and ours[name].flags.c_contiguous and ours[name].flags.writeable
    for name, value in vars(theirs["params"]).items():
        mine = getattr(ours["params"], name)
        np.testing.assert_array_equal(mine, value, err_msg=name)
        assert type(mine) is type(value) and (not isinstance(value, list) or [*map(type, mine)] == [*map(type, value)])


TABLE = [Category(0, 1, "class 1")]


def scored(data, judge, box=A):
    evaluator = CocoEvaluator(index(copy.deepcopy(data)), TABLE, 1, judge=judge)
    x, y, w, h = box
    evaluator.update({1: {"labels": torch.tensor([0]), "scores": torch.tensor([0.5]),
                          "boxes": torch.tensor([[x, y, x + w, y + h]])}})
    return evaluator.summarize()


@pytest.mark.parametrize("ids, reason", [((0, 5), "1 of 2 annotations has id 0, which pycocotools takes for no object"),
                                         ((5, 5), "1 of 2 annotations have the id of another one")])
def test_where_they_would_differ_pycocotools_scores_and_it_is_said(capsys, ids, reason):
    data = truth([1], [1], [(1, 1, A, {"id": ids[0]}), (1, 1, B, {"id": ids[1]})])
    expected = scored(data, "pycocotools")
    assert "instead" not in capsys.readouterr().out
    assert scored(data, "fast") == expected
    assert f"--coco_eval fast: pycocotools scores instead: {reason}" in capsys.readouterr().out
    sound = truth([1], [1], [(1, 1, A), (1, 1, B)])
    assert scored(sound, "fast")["coco_eval_bbox"] != expected["coco_eval_bbox"]                # it does matter
    assert "instead" not in capsys.readouterr().out


def test_without_the_library_pycocotools_scores_and_it_is_said(capsys, monkeypatch):
    data = truth([1], [1], [(1, 1, A), (1, 1, B)])
    expected = scored(data, "fast")
    monkeypatch.setitem(sys.modules, "hotcoco", None)                               # importing it fails
    assert scored(data, "fast") == expected
    assert "pycocotools scores instead: the package hotcoco cannot be used (" in capsys.readouterr().out


def test_who_cannot_be_asked():
    with pytest.raises(ValueError, match="--coco_eval slow: there is no such judge; there are pycocotools and fast"):
        CocoEvaluator(index(truth([1], [1], [])), TABLE, 1, judge="slow")
    with pytest.raises(ValueError, match="take pycocotools' COCOeval"):
        FastCOCOeval(index(truth([1], [1], [])), {}, "bbox").accumulate(Params("bbox"))


def test_the_benchmark_finds_no_difference(tmp_path):
    spec = importlib.util.spec_from_file_location("benchmark", Path(__file__).parent.parent / "scripts" /
                                                  "benchmark_coco_eval.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    arguments = benchmark.build_parser().parse_args(["--images", "6", "--detections", "20", "--masks"])
    arrays = {}
    for judge in ("pycocotools", "fast"):
        figures = benchmark.run(judge, tmp_path / f"{judge}.npz", arguments)
        assert list(figures) == list(benchmark.COLUMNS) and figures["evaluate"] > 0
        arrays[judge] = dict(np.load(tmp_path / f"{judge}.npz"))
    assert len(arrays["fast"]) == 8 and 0 < arrays["fast"]["segm_stats"][0] < 1
    for name, array in arrays["pycocotools"].items():
        np.testing.assert_array_equal(arrays["fast"][name], array)
