"""datasets/panoptic_eval.py against panoptic quality by its definition: every pair of segments, as sets of pixels."""
import io
import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from datasets import coco_eval, panoptic_eval
from datasets.coco_panoptic import PanopticAnnotations
from datasets.panoptic_eval import PanopticEvaluator
from datasets.sampler import EvaluationShard

CATEGORIES = [{"id": 3, "name": "cat", "isthing": 1}, {"id": 8, "name": "dog", "isthing": 1},
              {"id": 20, "name": "grass", "isthing": 0}, {"id": 21, "name": "sky", "isthing": 0}]
LABEL = {3: 0, 8: 1, 20: 2, 21: 3}


# -- the definition (Kirillov et al., 2019, section 4) ----------------------------------------------------------------

def pixels_of(ids, segment_id):
    return frozenset(np.flatnonzero(ids == segment_id).tolist())


def by_definition(images, categories):
    """``images``: (ids, {id: (category id, crowd)}, predicted ids, {id: category id}) of each -> pq, sq, rq, n in percent
    of all, things and stuff, and of each class that there is, by id."""
    iou_sum, right, wrong, missed = ({row["id"]: 0.0 for row in categories} for _ in range(4))
    for truth, truth_segments, found, found_segments in images:
        true_sets = {id: pixels_of(truth, id) for id in truth_segments}
        found_sets = {id: pixels_of(found, id) for id in found_segments}
        void = pixels_of(truth, 0)
        partner_of_true, partner_of_found = {}, {}
        for p, (category, crowd) in truth_segments.items():
            for g, found_category in found_segments.items():
                if category != found_category or crowd:
                    continue
                prediction = found_sets[g] - void
                iou = len(true_sets[p] & prediction) / len(true_sets[p] | prediction)
                if iou > 0.5:
                    assert p not in partner_of_true and g not in partner_of_found                   # theorem 1
                    partner_of_true[p], partner_of_found[g] = g, p
                    iou_sum[category] += iou
                    right[category] += 1
        for p, (category, crowd) in truth_segments.items():
            missed[category] += p not in partner_of_true and not crowd
        for g, category in found_segments.items():
            excuse = set(void)
            for p, (true_category, crowd) in truth_segments.items():
                if crowd and true_category == category:
                    excuse |= true_sets[p]
            wrong[category] += g not in partner_of_found and len(found_sets[g] & excuse) / len(found_sets[g]) <= 0.5
    each = {}
    for row in categories:
        k = row["id"]
        if right[k] + wrong[k] + missed[k]:
            sq = iou_sum[k] / right[k] if right[k] else 0.0
            rq = right[k] / (right[k] + 0.5 * wrong[k] + 0.5 * missed[k])
            each[k] = {"pq": sq * rq, "sq": sq, "rq": rq}
    means = {}
    for key, kinds in (("PQ_all", (0, 1)), ("PQ_th", (1,)), ("PQ_st", (0,))):
        rows = [each[row["id"]] for row in categories if row["id"] in each and row["isthing"] in kinds]
        means[key] = {name: sum(row[name] for row in rows) / len(rows) if rows else -1 for name in ("pq", "sq", "rq")}
        means[key]["n"] = len(rows)
    return means, each, {"right": sum(right.values()), "wrong": sum(wrong.values()), "missed": sum(missed.values())}


def agrees(results, images, categories):
    """Asserts that it does, and says how often what happened."""
    means, each, events = by_definition(images, categories)
    for key, want in means.items():
        assert results[key] == pytest.approx(want, abs=1e-6), key
    for row in categories:
        want = each.get(row["id"], {"pq": -1, "sq": -1, "rq": -1})
        found = results["PQ_per_class"][row["name"]]
        assert {key: found[key] for key in want} == pytest.approx(want, abs=1e-6), row["name"]
    return events


# -- data -------------------------------------------------------------------------------------------------------------

def as_png(ids):
    file = io.BytesIO()
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()


def ids_of(png):
    return np.asarray(Image.open(io.BytesIO(png))).astype(np.int64) @ [1, 256, 65536]


def write_truth(folder, images, categories=CATEGORIES):
    """``images``: {image id: (ids, {id: (category id, crowd)})} -> annotations of them."""
    (folder / "pngs").mkdir(parents=True)
    rows = []
    for image_id, (ids, segments) in images.items():
        (folder / "pngs" / f"{image_id}.png").write_bytes(as_png(ids))
        rows.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": [
            {"id": id, "category_id": category, "iscrowd": int(crowd), "area": int((ids == id).sum())}
            for id, (category, crowd) in segments.items()]})
    (folder / "truth.json").write_text(json.dumps({"annotations": rows, "categories": categories, "images": [
        {"id": i, "file_name": f"{i}.jpg", "height": len(ids), "width": len(ids[0])}
        for i, (ids, _) in images.items()]}))
    return PanopticAnnotations(folder / "pngs", folder / "truth.json")


def prediction(ids, segments, label=LABEL):
    return {"png_string": as_png(ids), "segments_info": [{"id": id, "category_id": label[category], "area": 0}
                                                         for id, category in segments.items()]}


def with_crowds(images):
    """What is there; crowds are predicted like anything else."""
    return {i: (ids, {id: category for id, (category, _) in segments.items()}) for i, (ids, segments) in images.items()}


def perfect(images):
    """What is there; crowds are left out."""
    return {i: (np.where(np.isin(ids, [id for id, (_, crowd) in segments.items() if crowd]), 0, ids),
                {id: category for id, (category, crowd) in segments.items() if not crowd})
            for i, (ids, segments) in images.items()}


def score(annotations, found, label=LABEL, **options):
    evaluator = PanopticEvaluator(annotations, **options)
    for image_id, (ids, segments) in found.items():
        evaluator.update({image_id: prediction(ids, segments, label)})
    return evaluator.summarize()


def together(truth, found):
    return [(*truth[i], *found[i]) for i in found]


def random_map(random, size=(18, 23), segments=9):
    """Rectangles over one another with random ids, some of which are void -> ids, and those that are left of them."""
    ids = np.zeros(size, dtype=np.int64)
    for _ in range(segments):
        top, left = random.randint(0, size[0] - 4), random.randint(0, size[1] - 4)
        height, width = random.randint(3, 14, 2)
        ids[top:top + height, left:left + width] = random.randint(1, 1 << 24) * (random.rand() > 0.15)
    return ids, [id for id in np.unique(ids).tolist() if id]


def random_truth(seed, images=4):
    random = np.random.RandomState(seed)
    truth = {}
    for k in range(images):
        ids, there = random_map(random)
        truth[10 + 3 * k] = ids, {id: (CATEGORIES[random.randint(4)]["id"], bool(random.rand() < 0.25)) for id in there}
    return truth


def random_found(truth, seed):
    """Truth, moved by up to two pixels, with some segments lost or named otherwise; and some made up."""
    random = np.random.RandomState(seed)
    found = {}
    for i, (ids, segments) in truth.items():
        ids = np.roll(ids, tuple(random.randint(-1, 3, 2)), (0, 1))
        other, _ = random_map(random, ids.shape, segments=2)
        ids = np.where(random.rand() < 0.5, ids, np.where(other, other, ids))
        ids[np.isin(ids, [id for id in segments if random.rand() < 0.1])] = 0
        there = [id for id in np.unique(ids).tolist() if id]
        found[i] = ids, {id: segments[id][0] if id in segments and random.rand() < 0.9 else
                         CATEGORIES[random.randint(4)]["id"] for id in there}
    return found


# -- scores -----------------------------------------------------------------------------------------------------------

def test_random_maps_score_as_by_definition(tmp_path):
    events = {"right": 0, "wrong": 0, "missed": 0}
    for seed in range(40):
        truth = random_truth(seed)
        found = random_found(truth, seed + 1000)
        results = score(write_truth(tmp_path / str(seed), truth), found)
        for name, n in agrees(results, together(truth, found), CATEGORIES).items():
            events[name] += n
    assert min(events.values()) > 100, events


@pytest.fixture(scope="module")
def sample(real_data):
    """Annotations, {image id: (ids, segments)}, json categories and {category id: label} of COCO's two examples."""
    folder = real_data / "coco_panoptic_sample"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    data = json.loads((folder / "panoptic_examples.json").read_text())
    truth = {row["image_id"]: (ids_of((folder / "panoptic_examples" / row["file_name"]).read_bytes()),
                               {s["id"]: (s["category_id"], bool(s["iscrowd"])) for s in row["segments_info"]})
             for row in data["annotations"]}
    return (PanopticAnnotations(folder / "panoptic_examples", folder / "panoptic_examples.json"), truth,
            data["categories"], {row["id"]: row["id"] for row in data["categories"]})


def test_the_sample_against_itself_is_100(sample, capsys):
    annotations, truth, categories, label = sample
    for found in (with_crowds(truth), perfect(truth)):
        results = score(annotations, found, label)
        for key, n in (("PQ_all", 8), ("PQ_th", 4), ("PQ_st", 4)):
            assert results[key] == pytest.approx({"pq": 1, "sq": 1, "rq": 1, "n": n}, abs=1e-9)
        agrees(results, together(truth, found), categories)
    assert results["PQ_per_class"]["person"]["segments"] == sum(
        category == 1 and not crowd for _, segments in truth.values() for category, crowd in segments.values())
    assert results["PQ_per_class"]["bicycle"] == {"pq": -1, "sq": -1, "rq": -1, "segments": 0}
    said = capsys.readouterr().out
    assert "all                   100.0 100.0 100.0        8" in said and "bicycle                   -" in said


def shifted(ids, segments):
    return np.roll(ids, (3, 5), (0, 1)), segments


def merged(ids, segments):
    """Each second segment of a class is taken for its neighbour in the list."""
    ids, kept, last = ids.copy(), {}, {}
    for id, category in segments.items():
        if category in last:
            ids[ids == id] = last.pop(category)
        else:
            kept[id] = last[category] = category
            last[category] = id
    return ids, {id: segments[id] for id in kept}


def relabelled(ids, segments):
    return ids, {id: 2 if k % 3 == 0 else category for k, (id, category) in enumerate(segments.items())}


def dropped(ids, segments):
    gone = list(segments)[::3]
    return np.where(np.isin(ids, gone), 0, ids), {id: category for id, category in segments.items() if id not in gone}


def emptied(ids, segments):
    return np.zeros_like(ids), {}


def halved(ids, segments):
    """Every other column is void: half of every segment is left, more or less."""
    ids = ids.copy()
    ids[:, 1::2] = 0
    return ids, {id: category for id, category in segments.items() if (ids == id).any()}


def flooded(ids, segments):
    """Void becomes a segment of its own, and all is one row lower."""
    ids = np.roll(np.where(ids == 0, 77, ids), 1, 0)
    return ids, {**segments, 77: 1}


@pytest.mark.parametrize("change", [shifted, merged, relabelled, dropped, emptied, halved, flooded])
def test_perturbed_samples_score_as_by_definition(sample, change):
    annotations, truth, categories, label = sample
    found = {i: change(*as_it_is) for i, as_it_is in with_crowds(truth).items()}
    results = score(annotations, found, label)
    agrees(results, together(truth, found), categories)
    assert results["PQ_all"]["pq"] < 99


def columns(*widths):
    """One row whose pixels have the ids 0, 1, 2, ... so many times each."""
    return np.repeat(np.arange(len(widths)), widths)[None]


def test_half_is_not_a_match(tmp_path):
    """The IoU must exceed 1/2: 10 of 20 pixels are not enough, 11 of 21 are."""
    truth = {1: (columns(40, 20), {1: (3, False)})}
    annotations = write_truth(tmp_path, truth)
    for width, right in ((10, 0), (11, 1)):
        results = score(annotations, {1: (columns(40, width, 20 - width), {1: 3, 2: 20})})
        cat = results["PQ_per_class"]["cat"]
        assert cat == pytest.approx({"pq": right * width / 20, "sq": right * width / 20, "rq": right,
                                     "segments": 1})


def test_void_pixels_are_no_part_of_a_prediction(tmp_path):
    """20 pixels of a cat and 30 of void around it, all called cat: the IoU is 1. But void in a prediction is a miss."""
    annotations = write_truth(tmp_path, {1: (columns(30, 20), {1: (3, False)})})
    results = score(annotations, {1: (np.ones((1, 50), dtype=np.int64), {1: 3})})
    assert results["PQ_all"] == pytest.approx({"pq": 1, "sq": 1, "rq": 1, "n": 1})
    results = score(annotations, {1: (columns(36, 14), {1: 3})})
    assert results["PQ_all"] == pytest.approx({"pq": 0.7, "sq": 0.7, "rq": 1, "n": 1})


def test_what_lies_in_void_or_in_a_crowd_of_its_class_is_not_wrong(tmp_path):
    """1: a cat; 2, 3: crowds of cats; 4: a crowd of dogs."""
    annotations = write_truth(tmp_path, {1: (columns(10, 10, 10, 10, 10), {1: (3, False), 2: (3, True), 3: (3, True),
                                                                          4: (8, True)})})

    def cats(first, last):
        """The cat, and another one over some of what comes after or before it."""
        ids = columns(10, 10, 30)
        ids[ids == 2] = 0
        ids[:, first:last] = 9
        return score(annotations, {1: (ids, {1: 3, 9: 3})})["PQ_per_class"]["cat"]["rq"]

    right, wrong = 1, pytest.approx(1 / 1.5)
    assert cats(0, 10) == right                                         # all void
    assert cats(20, 25) == cats(30, 40) == cats(22, 38) == right        # the crowds
    assert cats(34, 45) == right                                        # 6 of 11 in one
    assert cats(35, 45) == wrong                                        # half of it is not enough
    assert cats(27, 43) == right                                        # 13 of 16 in both
    assert cats(42, 50) == wrong                                        # a crowd of dogs is none of cats
    results = score(annotations, {1: (columns(10, 10, 10, 20), {1: 3, 2: 8, 3: 3})})
    assert results["PQ_per_class"]["dog"] == {"pq": 0, "sq": 0, "rq": 0, "segments": 0}      # dogs in a crowd of cats


def test_classes_that_only_predictions_have_count(tmp_path):
    annotations = write_truth(tmp_path, {1: (columns(10, 20, 20), {1: (3, False), 2: (20, False)})})
    results = score(annotations, {1: (columns(10, 20, 20), {1: 3, 2: 21})})
    assert results["PQ_all"] == pytest.approx({"pq": 1 / 3, "sq": 1 / 3, "rq": 1 / 3, "n": 3})
    assert results["PQ_th"]["pq"] == 1 and results["PQ_th"]["n"] == 1
    assert results["PQ_st"] == {"pq": 0, "sq": 0, "rq": 0, "n": 2}
    assert results["PQ_per_class"]["sky"]["segments"] == 0 and results["PQ_per_class"]["dog"]["pq"] == -1


def test_the_number_of_an_id_and_the_order_of_segments_do_not_matter(tmp_path):
    truth = random_truth(3)
    found = random_found(truth, 4)
    annotations = write_truth(tmp_path, truth)
    want = score(annotations, found)
    other = {i: (np.where(ids, (1 << 24) - 1 - ids, 0), {(1 << 24) - 1 - id: segments[id] for id in reversed(segments)})
             for i, (ids, segments) in found.items()}
    assert score(annotations, other) == want and score(annotations, dict(reversed(found.items()))) == want


def test_images_without_segments_and_images_without_a_row(tmp_path, capsys):
    """All is void there: nothing that is predicted is right or wrong."""
    truth = {1: (columns(0, 30), {1: (3, False)}), 2: (columns(30), {})}
    write_truth(tmp_path, truth)
    data = json.loads((tmp_path / "truth.json").read_text())
    data["images"].append({"id": 4, "file_name": "4.jpg", "height": 1, "width": 30})
    (tmp_path / "truth.json").write_text(json.dumps(data))
    annotations = PanopticAnnotations(tmp_path / "pngs", tmp_path / "truth.json")
    cat = columns(0, 30), {1: 3}
    assert score(annotations, {1: cat, 2: cat, 4: cat})["PQ_all"] == {"pq": 1, "sq": 1, "rq": 1, "n": 1}
    assert score(annotations, {2: (columns(30), {}), 4: cat})["PQ_all"] == {"pq": -1, "sq": -1, "rq": -1, "n": 0}
    said = capsys.readouterr().out
    assert "scored: 2 of the 3 images of the ground truth" in said and "all          -     -     -        0" in said
    assert PanopticEvaluator(annotations).summarize()["PQ_all"]["n"] == 0


def test_classes_of_one_name_are_told_apart(tmp_path):
    categories = [{**row, "name": "cat"} if row["id"] == 8 else row for row in CATEGORIES]
    annotations = write_truth(tmp_path, {1: (columns(0, 30), {1: (3, False)})}, categories)
    per_class = score(annotations, {1: (columns(0, 30), {1: 3})})["PQ_per_class"]
    assert list(per_class) == ["cat (3)", "cat (8)", "grass", "sky"] and per_class["cat (3)"]["pq"] == 1


def test_the_table_has_every_class(tmp_path, capsys):
    score(write_truth(tmp_path, {1: (columns(10, 20), {1: (8, False)})}), {1: (columns(16, 14), {1: 8})})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["panoptic", "PQ", "SQ", "RQ", "classes"], ["all", "70.0", "70.0", "100.0", "1"],
                     ["things", "70.0", "70.0", "100.0", "1"], ["stuff", "-", "-", "-", "0"],
                     ["class", "PQ", "SQ", "RQ", "segments"] * 2,
                     ["cat", "-", "-", "-", "0", "grass", "-", "-", "-", "0"],
                     ["dog", "70.0", "70.0", "100.0", "1", "sky", "-", "-", "-", "0"]]


# -- what models give -------------------------------------------------------------------------------------------------

def test_ids_from_0_as_the_published_post_processing_gives_them(tmp_path):
    """An id of 0 is void only where no segment has it; in files it is always void."""
    truth = {1: (columns(0, 10, 20), {1: (3, False), 2: (20, False)})}
    annotations = write_truth(tmp_path, truth)
    evaluator = PanopticEvaluator(annotations, tmp_path / "out")
    evaluator.update({1: prediction(columns(10, 20), {0: 3, 1: 20})})
    assert evaluator.summarize()["PQ_all"] == {"pq": 1, "sq": 1, "rq": 1, "n": 2}
    evaluator.save_results()
    saved = PanopticAnnotations(tmp_path / "out" / "panoptic", tmp_path / "out" / "panoptic.json")
    assert saved.numbers(0).tolist() == columns(0, 10, 20).tolist() and saved.segments(0).labels.tolist() == [0, 2]
    found = {1: prediction(columns(10, 20), {1: 20})}
    evaluator = PanopticEvaluator(annotations)
    evaluator.update(found)
    assert evaluator.summarize()["PQ_all"] == {"pq": 0.5, "sq": 0.5, "rq": 0.5, "n": 2}


def test_labels_that_the_data_does_not_use_are_void_and_counted(tmp_path, capsys):
    annotations = write_truth(tmp_path, {1: (columns(0, 10, 20, 5), {1: (3, False), 2: (20, False), 3: (8, False)})})
    label = {**LABEL, 900: 4, 901: 6}
    found = columns(0, 4, 10, 16, 5), {9: 901, 1: 3, 2: 20, 3: 900}
    ids = np.array([0, 9, 1, 2, 3])[found[0]]
    evaluator = PanopticEvaluator(annotations, tmp_path / "out", num_classes=7)
    evaluator.update({1: prediction(ids, found[1], label)})
    results = evaluator.summarize()
    assert "left out of the results: 2 segments of labels that the data does not use (4, 6)" in capsys.readouterr().out
    void = score(annotations, {1: (np.where(np.isin(ids, (9, 3)), 0, ids), {1: 3, 2: 20})})
    assert results == void and results["PQ_per_class"]["dog"]["pq"] == 0
    evaluator.save_results()
    row, = json.loads((tmp_path / "out" / "panoptic.json").read_text())["annotations"]
    assert [(s["category_id"], s["area"]) for s in row["segments_info"]] == [(3, 10), (20, 16)]
    saved = PanopticAnnotations(tmp_path / "out" / "panoptic", tmp_path / "out" / "panoptic.json")
    assert np.bincount(saved.numbers(0).ravel()).tolist() == [9, 10, 16]


def test_saved_results_are_cocos_and_score_the_same(tmp_path):
    truth = random_truth(5)
    found = random_found(truth, 6)
    annotations = write_truth(tmp_path / "truth", truth)
    evaluator = PanopticEvaluator(annotations, tmp_path / "made" / "here")
    evaluator.update({i: prediction(*f) for i, f in found.items()})
    results = evaluator.summarize()
    evaluator.save_results()
    names = [f"{i:012d}.png" for i in sorted(truth)]
    assert sorted(os.listdir(tmp_path / "made" / "here")) == ["panoptic", "panoptic.json"]
    assert sorted(os.listdir(tmp_path / "made" / "here" / "panoptic")) == names
    saved = json.loads((tmp_path / "made" / "here" / "panoptic.json").read_text())
    assert saved["categories"] == CATEGORIES and [row["id"] for row in saved["images"]] == sorted(truth)
    for row, i in zip(saved["annotations"], sorted(truth), strict=True):
        ids, segments = found[i]
        assert row["image_id"] == i and row["file_name"] == f"{i:012d}.png"
        assert (ids_of((tmp_path / "made" / "here" / "panoptic" / row["file_name"]).read_bytes()) == ids).all()
        assert row["segments_info"] == [{"id": id, "category_id": category, "isthing": int(category < 20),
                                         "area": int((ids == id).sum())} for id, category in segments.items()]
    read = PanopticAnnotations(tmp_path / "made" / "here" / "panoptic", tmp_path / "made" / "here" / "panoptic.json")
    again = {i: (np.concatenate([[0], read.segments(k).ids])[read.numbers(k)],
                 dict(zip(read.segments(k).ids.tolist(), (CATEGORIES[n]["id"] for n in read.segments(k).labels))))
             for k, i in enumerate(read.ids)}
    assert score(annotations, again) == results


def test_what_cannot_be_scored_is_named(tmp_path):
    annotations = write_truth(tmp_path, {5: (columns(10, 20), {1: (3, False)}), 7: (columns(10, 20), {1: (3, False)})})
    evaluator = PanopticEvaluator(annotations)
    good, cat = prediction(columns(10, 20), {1: 3}), {"id": 1, "category_id": 0}

    def refused(message, *segments, error=ValueError, **change):
        with pytest.raises(error, match=message):
            evaluator.update({7: {**good, "segments_info": segments or [cat], **change}})

    with pytest.raises(RuntimeError, match=r"summarize\(\).*call it first"):
        evaluator.save_results()
    evaluator.update({5: good})
    with pytest.raises(ValueError, match="image id 5 a second time"):
        evaluator.update({5: good})
    with pytest.raises(ValueError, match="image id 6, which the ground truth does not have"):
        evaluator.update({6: good})
    with pytest.raises(ValueError, match="image id 7 have no png_string and no segments_info; give what the panoptic"):
        evaluator.update({7: {"boxes": 1}})
    refused(r"predicted PNG for image id 7 has 29 x 1 pixels, but the image has 30 x 1",
            png_string=as_png(columns(10, 19)))
    refused(r"predicted PNG for image id 7 has 1 segment id that 'segments_info' does not list: 2 \(5 pixels\)",
            png_string=as_png(columns(5, 20, 5)))
    refused("predicted PNG for image id 7 has no pixel of 1 segment that 'segments_info' lists: id 4", cat,
            {**cat, "id": 4})
    refused("image id 7: segments_info has several segments with the same id: 1", cat, cat)
    for label in (4, -1, None, 1.0):
        refused(f"image id 7: segments_info has category_id {label}, but the data has labels 0 to 3; the model was",
                {**cat, "category_id": label})
    for id in (-1, 1 << 24, None):
        refused(f"image id 7: segments_info has a segment with id {id}; a whole number", {**cat, "id": id})
    refused(r"predicted PNG for image id 7 \(4 bytes\) is no PNG", png_string=b"1234", error=OSError)
    refused("predicted PNG for image id 7 .* cannot be read", png_string=good["png_string"][:-30], error=OSError)
    assert evaluator.summarize()["PQ_all"]["pq"] == 1
    with pytest.raises(RuntimeError, match="give the evaluator a folder"):
        evaluator.save_results()
    with pytest.raises(ValueError, match="'sky' has label 3, but the model has labels 0 to 2"):
        PanopticEvaluator(annotations, num_classes=3)


# -- several processes ------------------------------------------------------------------------------------------------

@pytest.fixture
def two_processes(monkeypatch):
    """``two_processes(work)`` runs ``work(rank)`` in two threads that exchange objects as two processes do, and returns
    what they return."""
    rank, items, meet = threading.local(), [b"", b""], threading.Barrier(2, timeout=60)

    def gather_objects(item):
        items[rank.number] = pickle.dumps(item)
        meet.wait()
        all_items = [pickle.loads(each) for each in items]
        meet.wait()
        return all_items

    def one(number, work):
        rank.number = number
        return work(number)

    monkeypatch.setattr(coco_eval, "gather_objects", gather_objects)
    monkeypatch.setattr(panoptic_eval, "is_main", lambda: rank.number == 0)

    def two(work):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2), [work, work]))

    return two


def test_two_processes_score_as_one(two_processes, tmp_path, capsys, monkeypatch):
    truth = random_truth(7, images=5)
    found, ids = random_found(truth, 8), sorted(truth)
    annotations = write_truth(tmp_path / "truth", truth)

    def work(rank):
        evaluator = PanopticEvaluator(annotations, tmp_path / "two")
        evaluator.update({ids[i]: prediction(*found[ids[i]]) for i in EvaluationShard(5, rank, 2)})     # 3 and 2
        results = evaluator.summarize()
        evaluator.save_results()
        return results

    first, second = two_processes(work)
    assert capsys.readouterr().out.count("panoptic ") == 1                          # the main process's table
    monkeypatch.undo()
    alone = PanopticEvaluator(annotations, tmp_path / "alone")
    alone.update({i: prediction(*f) for i, f in reversed(found.items())})
    assert first == second == alone.summarize()
    alone.save_results()
    files = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.*")]
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_an_image_that_two_processes_score_is_refused_by_both(two_processes, tmp_path):
    annotations = write_truth(tmp_path, {5: (columns(10, 20), {1: (3, False)})})

    def work(rank):
        evaluator = PanopticEvaluator(annotations)
        evaluator.update({5: prediction(columns(10, 20), {1: 3})})
        with pytest.raises(ValueError, match="image id 5 come from process 1 and from an earlier one"):
            evaluator.summarize()
        return rank

    assert two_processes(work) == [0, 1]
