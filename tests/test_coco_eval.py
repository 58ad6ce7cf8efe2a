"""datasets/coco_eval.py: the numbers are pycocotools', the ids the data's own, and nothing is counted twice."""
import contextlib
import io
import json
import os
import pickle

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets import build_dataset, build_evaluators
from datasets.annotations import index
from datasets.coco_eval import CocoEvaluator
from datasets.sampler import EvaluationShard
from detr import distributed
from detr.postprocess import encode
from detr.structures import Category

TABLE = [Category(0, 1, "cat"), Category(1, 23, "dog"), Category(2, 56, "cow")]


def ground_truth(**change):
    """Four images with objects of three classes whose ids have gaps; image 8 has a crowd, image 9 nothing."""
    def row(id, image_id, category_id, bbox, iscrowd=0):
        return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": iscrowd,
                "area": bbox[2] * bbox[3]}

    return index({"images": [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 200} for i in (5, 7, 8, 9)],
                  "categories": [{"id": row.id, "name": row.name} for row in TABLE],
                  "annotations": [row(1, 5, 1, [10, 10, 20, 20]), row(2, 5, 23, [50, 50, 50, 50]),
                                  row(3, 7, 56, [0, 0, 150, 150]), row(4, 7, 1, [30.5, 30.25, 60, 40]),
                                  row(5, 8, 23, [20, 20, 40, 40]), row(6, 8, 1, [100, 100, 100, 100], iscrowd=1)],
                  **change})


def detections(*rows):
    """Rows of (label, score, left, top, right, bottom)."""
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"labels": rows[:, 0].long(), "scores": rows[:, 1], "boxes": rows[:, 2:]}


def perfect(coco, table=TABLE):
    """What is there, crowds left out, each with a score of its own."""
    label = {category.id: category.label for category in table}
    return {image_id: detections(*(
        (label[gt["category_id"]], 0.9 - gt["id"] % 97 / 200, gt["bbox"][0], gt["bbox"][1],
         gt["bbox"][0] + gt["bbox"][2], gt["bbox"][1] + gt["bbox"][3])
        for gt in coco.imgToAnns[image_id] if not gt["iscrowd"])) for image_id in coco.imgs}


def noisy(coco, table, seed, n=60):
    """``n`` predictions an image: its objects, moved, some renamed, some twice, and boxes from nowhere."""
    random = torch.Generator().manual_seed(seed)
    out = {}
    for image_id, found in perfect(coco, table).items():
        pick = torch.randint(0, max(1, len(found["labels"])), (n,), generator=random)
        boxes = found["boxes"][pick] if len(found["labels"]) else torch.rand(n, 4, generator=random) * 100
        labels = found["labels"][pick] if len(found["labels"]) else torch.full((n,), table[0].label)
        size = (boxes[:, 2:] - boxes[:, :2]).abs()
        boxes = boxes + torch.randn(n, 4, generator=random) * 0.1 * size.repeat(1, 2)
        other = torch.rand(n, generator=random) < 0.2
        labels = torch.where(other, table[-1].label, labels)
        low, high = boxes[:, :2].minimum(boxes[:, 2:]), boxes[:, :2].maximum(boxes[:, 2:])
        scores = torch.rand(n, generator=random)
        out[image_id] = {"labels": labels, "scores": scores, "boxes": torch.cat([low, high], 1)}
    return out


def plain_pycocotools(truth, results):
    """The twelve numbers, from nothing but pycocotools and two files."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth)
        judge = COCOeval(coco, coco.loadRes(str(results)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats.tolist()


def test_perfect_predictions(capsys):
    coco = ground_truth()
    evaluator = CocoEvaluator(coco, TABLE, 3)
    evaluator.update(perfect(coco))
    scores = evaluator.summarize()
    assert [round(x, 6) for x in scores["coco_eval_bbox"]] == [1] * 12
    for name, objects in (("cat", 2), ("dog", 2), ("cow", 1)):
        assert scores["per_class"][name] == pytest.approx({"AP": 1, "AP50": 1, "objects": objects})
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(" Average ") for line in said) == 12
    assert said[0].endswith("Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 1.000".lstrip())
    assert "class    AP  AP50 objects" in said[12] and len(said) == 14 and "cow   1.000 1.000       1" in said[13]


@pytest.mark.parametrize("name", ["coco_mini", "bccd"])
def test_saved_results_score_the_same_in_plain_pycocotools(real_data, tmp_path, name):
    dataset = build_dataset("val", real_data / name)
    evaluator, = build_evaluators(dataset)
    predictions = noisy(dataset.coco, dataset.categories, seed=1)
    for start in range(0, len(dataset), 10):
        evaluator.update({i: predictions[i] for i in dataset.ids[start:start + 10]})
    scores = evaluator.summarize()
    evaluator.save_results(tmp_path / "made" / "results.json")
    assert os.listdir(tmp_path / "made") == ["results.json"]
    saved = json.loads((tmp_path / "made" / "results.json").read_text())
    assert saved == evaluator.results and set(saved[0]) == {"image_id", "category_id", "bbox", "score"}
    assert scores["coco_eval_bbox"] == plain_pycocotools(dataset.annotation_file, tmp_path / "made" / "results.json")
    assert 0.05 < scores["coco_eval_bbox"][0] < 0.95
    known = [row["AP"] for row in scores["per_class"].values() if row["AP"] >= 0]
    assert sum(known) / len(known) == pytest.approx(scores["coco_eval_bbox"][0], abs=1e-9)
    assert evaluator.eval["precision"].shape == (10, 101, len(dataset.coco.cats), 4, 3)


def test_predictions_keep_the_ids_of_the_data():
    evaluator = CocoEvaluator(ground_truth(), TABLE, 3)
    evaluator.update({7: detections((2, 0.5, 1, 2, 11, 22), (1, 0.25, 0, 0, 4, 8), (0, 0.75, 3.5, 0, 4.5, 1))})
    evaluator.summarize()
    assert evaluator.results == [
        {"image_id": 7, "category_id": 56, "bbox": [1, 2, 10, 20], "score": 0.5},
        {"image_id": 7, "category_id": 23, "bbox": [0, 0, 4, 8], "score": 0.25},
        {"image_id": 7, "category_id": 1, "bbox": [3.5, 0, 1, 1], "score": 0.75}]


def test_labels_that_the_data_does_not_use_are_left_out_and_change_no_score(capsys):
    coco, gapped = ground_truth(), [Category(row.id, row.id, row.name) for row in TABLE]            # as COCO's 91 slots
    found = perfect(coco, gapped)
    scores = []
    for extra in ((), ((0, 0.99, 0, 0, 9, 9), (2, 0.98, 10, 10, 30, 30), (2, 0.97, 0, 0, 5, 5))):
        evaluator = CocoEvaluator(coco, gapped, 57)
        more = detections(*extra)
        evaluator.update({i: {k: torch.cat([more[k], v]) for k, v in f.items()} for i, f in found.items()})
        scores.append(evaluator.summarize())
        assert {result["category_id"] for result in evaluator.results} == {1, 23, 56}
    assert scores[0] == scores[1] and scores[0]["coco_eval_bbox"][0] == pytest.approx(1)
    assert "left out of the results: 12 predictions of labels that the data does not use (0, 2)" in \
        capsys.readouterr().out


def test_finds_inside_a_crowd_are_neither_right_nor_wrong():
    coco = ground_truth()
    found = perfect(coco)
    inside = detections((0, 0.99, 110, 110, 140, 140), (0, 0.98, 150, 150, 190, 190))
    outside = detections((0, 0.99, 0, 150, 40, 190))
    for extra, ap in ((inside, 1), (outside, 2 / 3)):           # two cats; precision 1/2, then 2/3: the better counts
        evaluator = CocoEvaluator(coco, TABLE, 3)
        evaluator.update({**found, 8: {k: torch.cat([v, extra[k]]) for k, v in found[8].items()}})
        assert evaluator.summarize()["per_class"]["cat"]["AP"] == pytest.approx(ap)


def test_wrong_finds_in_an_image_without_objects_count():
    coco = ground_truth()
    evaluator = CocoEvaluator(coco, TABLE, 3)
    evaluator.update({**perfect(coco), 9: detections((2, 0.99, 0, 0, 50, 50))})
    scores = evaluator.summarize()
    assert scores["per_class"]["cow"]["AP"] == pytest.approx(0.5)
    assert scores["per_class"]["dog"]["AP"] == pytest.approx(1)


def test_no_predictions_at_all(capsys, tmp_path):
    evaluator = CocoEvaluator(ground_truth(), TABLE, 3)
    evaluator.update({image_id: detections() for image_id in (5, 7, 8, 9)})
    scores = evaluator.summarize()
    assert scores["coco_eval_bbox"] == [0] * 12
    assert {row["AP"] for row in scores["per_class"].values()} == {0}
    evaluator.save_results(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == []
    nothing = CocoEvaluator(ground_truth(), TABLE, 3)                                           # not one image seen
    capsys.readouterr()
    assert nothing.summarize()["coco_eval_bbox"] == [-1] * 12
    assert "scored: 0 of the 4 images of the ground truth" in capsys.readouterr().out


def test_only_the_images_that_were_seen_are_scored(capsys):
    coco = ground_truth()
    evaluator = CocoEvaluator(coco, TABLE, 3)
    evaluator.update({7: perfect(coco)[7]})
    scores = evaluator.summarize()
    assert scores["coco_eval_bbox"][0] == pytest.approx(1)
    assert scores["per_class"]["dog"] == {"AP": -1, "AP50": -1, "objects": 0}
    said = capsys.readouterr().out
    assert "scored: 1 of the 4 images of the ground truth" in said and "dog       -     -       0" in said


def test_classes_of_one_name_are_told_apart():
    coco = ground_truth(categories=[{"id": 1, "name": "cat"}, {"id": 23, "name": "cat"}, {"id": 56, "name": "cow"}])
    evaluator = CocoEvaluator(coco, TABLE, 3)
    evaluator.update({**perfect(coco), 5: detections((0, 0.9, 10, 10, 30, 30))})
    scores = evaluator.summarize()["per_class"]
    assert list(scores) == ["cat (1)", "cat (23)", "cow"] and scores["cat (1)"]["AP"] > scores["cat (23)"]["AP"]


def test_what_cannot_be_scored_is_named():
    evaluator = CocoEvaluator(ground_truth(), TABLE, 3)
    with pytest.raises(RuntimeError, match=r"summarize\(\).*call it first"):
        evaluator.save_results("results.json")
    evaluator.update({5: detections()})
    with pytest.raises(ValueError, match="image id 5 a second time"):
        evaluator.update({5: detections()})
    with pytest.raises(ValueError, match="image id 6, which the ground truth does not have"):
        evaluator.update({6: detections()})
    with pytest.raises(ValueError, match="image id 7 have labels 0 to 3, but the data has 0 to 2"):
        evaluator.update({7: detections((0, 0.5, 0, 0, 1, 1), (3, 0.5, 0, 0, 1, 1))})
    for broken in ((0, float("nan"), 0, 0, 1, 1), (0, 0.5, 0, 0, float("inf"), 1)):
        with pytest.raises(ValueError, match="image id 7 have scores or boxes that are not finite"):
            evaluator.update({7: detections(broken)})
    with pytest.raises(ValueError, match="'cow' has label 2, but the model has labels 0 to 1"):
        CocoEvaluator(ground_truth(), TABLE, 2)


def squares(*sides, size=(200, 200)):
    """The run lengths of squares in the upper left."""
    out = torch.zeros(len(sides), 1, *size, dtype=torch.uint8)
    for mask, side in zip(out, sides):
        mask[:, :side, :side] = 1
    return encode(out)


def test_saved_results_are_the_text_of_one_json_dump(tmp_path):
    """Box and score in the precision in which they came, an image without any, a label that belongs to no class."""
    coco = ground_truth()
    for row in coco.anns.values():
        x, y, w, h = row["bbox"]
        row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    evaluator = CocoEvaluator(coco, [TABLE[0], Category(2, 23, "dog")], 3, masks=True)
    evaluator.update({9: detections() | {"masks": []}})
    evaluator.update({8: {
        "labels": torch.tensor([2]), "scores": torch.tensor([0.7], dtype=torch.bfloat16), "masks": squares(3),
        "boxes": torch.tensor([[1 / 3, 0, 1, 1]], dtype=torch.float64)}})
    evaluator.update({5: detections((0, 0.1, 1, 2, 11.1, 22), (1, 0.9, 0, 0, 1, 1), (2, 0.25, 0, 0, 4, 8))
                      | {"masks": squares(20, 7, 0)}})
    assert evaluator.results is None
    evaluator.summarize()
    evaluator.save_results(tmp_path / "results.json")
    score, width = torch.tensor(0.1).item(), (torch.tensor(11.1) - 1).item()
    first = {"image_id": 5, "category_id": 1}, {"image_id": 5, "category_id": 23}, {"image_id": 8, "category_id": 23}
    boxes = ({"bbox": [1.0, 2.0, width, 20.0], "score": score}, {"bbox": [0.0, 0.0, 4.0, 8.0], "score": 0.25},
             {"bbox": [1 / 3, 0.0, 1 - 1 / 3, 1.0], "score": 0.69921875})
    codes = [{"segmentation": code} for code in squares(20, 0, 3)]
    assert (tmp_path / "results.json").read_text() == json.dumps([a | b for a, b in zip(first, boxes)])
    assert (tmp_path / "results_masks.json").read_text() == json.dumps(
        [a | {"score": b["score"]} | c for a, b, c in zip(first, boxes, codes)])
    assert evaluator.results == [a | b | c for a, b, c in zip(first, boxes, codes)]
    assert sorted(os.listdir(tmp_path)) == ["results.json", "results_masks.json"]


def test_predictions_are_kept_small_and_apart():
    """Their own numbers and no more: not the batch that they are a part of, not a dict for each."""
    evaluator = CocoEvaluator(ground_truth(), TABLE, 3)
    batch = torch.rand(3, 500, 4).sort().values
    found = {"labels": torch.zeros(500, dtype=torch.int64), "scores": torch.rand(3, 500)[1], "boxes": batch[1]}
    evaluator.update({5: found})
    size = len(pickle.dumps(evaluator._seen))
    assert size < 500 * (4 * 4 + 4 + 8) + 1000                  # box, score, class
    before, scores = evaluator._seen[5].boxes_xywh.copy(), evaluator._seen[5].scores.copy()
    batch.zero_()
    found["scores"].zero_()
    assert (evaluator._seen[5].boxes_xywh == before).all() and (evaluator._seen[5].scores == scores).all() > 0


@pytest.mark.parametrize("codes, message", [
    (squares(5), "no run length for each of 2 masks"),
    (squares(5) + squares(5, size=(200, 100)), "masks of different sizes, 200 x 100 and 200 x 200")])
def test_masks_that_cannot_be_scored_are_named(codes, message):
    evaluator = CocoEvaluator(ground_truth(), TABLE, 3, masks=True)
    with pytest.raises(ValueError, match=f"image id 5 have {message}"):
        evaluator.update({5: detections((0, 0.5, 0, 0, 1, 1), (1, 0.5, 0, 0, 1, 1)) | {"masks": codes}})


def one_of_two(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    distributed.init("cpu", f"file://{folder}/meet")
    coco = ground_truth()
    found, ids = noisy(coco, TABLE, seed=2), sorted(coco.imgs)
    evaluator = CocoEvaluator(coco, TABLE, 3)
    evaluator.update({ids[i]: found[ids[i]] for i in EvaluationShard(3, rank, 2)})              # shards of 1 and 2
    with contextlib.redirect_stdout(io.StringIO()) as said:
        scores = evaluator.summarize()
    evaluator.save_results(f"{folder}/results.json")
    everywhere = CocoEvaluator(coco, TABLE, 3)
    everywhere.update({5: found[5]})
    refusal = ""
    try:
        everywhere.summarize()
    except ValueError as error:
        refusal = str(error)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump({"scores": scores, "said": said.getvalue(), "refusal": refusal, "results": evaluator.results}, file)
    distributed.close()


def test_two_processes_score_as_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    coco = ground_truth()
    found = noisy(coco, TABLE, seed=2)
    alone = CocoEvaluator(coco, TABLE, 3)
    alone.update({i: found[i] for i in (5, 7, 8)})
    assert first["scores"] == second["scores"] == alone.summarize()
    assert first["results"] == second["results"] == alone.results == json.loads((tmp_path / "results.json").read_text())
    assert "Average Precision" in first["said"] and second["said"] == ""
    assert "image id 5 come from process 1 and from an earlier one" in first["refusal"] == second["refusal"]
