"""``detr.load``: a file -> a detector that answers as model, transforms and post-processing do one after the other."""
import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from cases import load_case
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

import detr
import engine
from datasets import build_dataset, build_evaluators, collate
from datasets import published_classes as published_by_datasets
from datasets.annotations import class_table
from datasets.images import read_image
from datasets.transforms import eval_transforms
from detr import checkpoint
from detr.architectures.deformable_detr import DeformableDETRConfig
from detr.architectures.detr import DETRConfig
from detr.boxes import box_cxcywh_to_xyxy
from detr.coco_classes import COCO_CATEGORIES, COCO_PANOPTIC, published_classes
from detr.loading import Detector, to_supervision
from detr.preprocessing import Preprocessing, as_picture
from detr.presets import PRESETS, Preset
from detr.run_folder import RunFolder
from detr.settings import decide
from detr.tiles import merged, moved, places

SMALL = DETRConfig(backbone="resnet18", backbone_norm="group", from_scratch=True, enc_layers=1, dec_layers=1,
                   hidden_dim=32, nheads=2, dim_feedforward=32, num_queries=5)
MASKS = dataclasses.replace(SMALL, masks=True, hidden_dim=128, nheads=8)
SIGMOID = DeformableDETRConfig(backbone="resnet18", backbone_norm="group", from_scratch=True, enc_layers=1, dec_layers=2,
                               hidden_dim=64, nheads=2, dim_feedforward=32, num_queries=9, num_feature_levels=2)
TABLE = [{"label": 0, "id": 3, "name": "red", "isthing": True}, {"label": 2, "id": 40, "name": "5 µm", "isthing": False}]
PREPROCESSING = Preprocessing(64, 100, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
CARD = {"epoch": 3, "metrics": {"coco_eval_bbox": [0.25] * 12}, "revision": "abc", "data": "5 images"}


def exported(folder, model=SMALL, dataset_file="coco", preprocessing=PREPROCESSING, **entries) -> dict:
    """What a training exports, with random weights whose queries differ."""
    torch.manual_seed(0)
    built = model.build(3)[0]
    with torch.no_grad():
        inner = getattr(built, "detr", built)
        inner.query_embed.weight *= 1 if model is SIGMOID else 30
        for head in inner.class_embed if isinstance(inner.class_embed, nn.ModuleList) else [inner.class_embed]:
            head.weight *= 5 if model is SIGMOID else 20
        if model.masks:
            built.bbox_attention.q_linear.weight *= 30
            inner.class_embed.bias[:3] += 5
    state = {"model": built.state_dict(), "categories": TABLE, "num_classes": 3, "epoch": 3, "card": CARD,
             "config": {"name": "deformable_detr_resnet50" if model is SIGMOID else "detr_resnet50", "train": {},
                        "model": dataclasses.asdict(model),
                        "data": {"dataset_file": dataset_file, "image_size": "64", "max_size": 100}},
             "preprocessing": preprocessing.as_dict(), **entries}
    RunFolder(folder).export("best", state)
    return state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    exported(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    random = np.random.RandomState(0)
    for name, width, height in (("a.jpg", 90, 70), ("b.png", 61, 130)):
        Image.fromarray(random.randint(0, 255, (height, width, 3)).astype(np.uint8)).save(tmp_path / name)
    return [tmp_path / "a.jpg", tmp_path / "b.png"]


# What a detector is and says.

@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_everything_is_in_the_file(run, ending):
    detector = detr.load(run / f"best{ending}")
    assert isinstance(detector, Detector) and isinstance(detector, nn.Module) and not detector.training
    assert detector.categories == [(0, 3, "red", True), (2, 40, "5 µm", False)]
    assert detector.names == {0: "red", 2: "5 µm"} and detector.num_classes == 3 and detector.channels == 3
    assert detector.preprocessing == PREPROCESSING and detector.card == CARD and detector.name == "detr_resnet50"
    assert detector.config["data"]["image_size"] == "64" and detector.config["model"]["num_queries"] == 5
    assert list(detector.postprocessors) == ["bbox"] and not detector.exact
    assert "aux_outputs" not in detector.model([torch.zeros(3, 64, 64)])
    want = torch.load(run / "best.pth", weights_only=True)["model"]
    assert all(torch.equal(value, want[name]) for name, value in detector.model.state_dict().items())


def by_hand(file, path, model=SMALL):
    content = torch.load(file, weights_only=True)
    built, _, postprocessors = model.build(3)
    built.load_state_dict(content["model"])
    picture = read_image(path)
    fed = eval_transforms(PREPROCESSING)(picture, {})[0]
    with torch.no_grad():
        outputs = built.eval()([fed])
    size = torch.tensor([[picture.height, picture.width]])
    return outputs, size, torch.tensor([fed.shape[-2:]]), postprocessors


def test_detections_are_the_evaluations(run, photos):
    """Without those of labels that the class table does not have."""
    for ending in (".pth", ".safetensors"):
        several = detr.load(run / f"best{ending}")(photos)
        left_out = kept = 0
        for path, found in zip(photos, several, strict=True):
            outputs, size, _, postprocessors = by_hand(run / "best.pth", path)
            want, = postprocessors["bbox"](outputs, size)
            used = want["labels"] != 1
            left_out, kept = left_out + int((~used).sum()), kept + int(used.sum())
            assert set(found) == {"scores", "labels", "boxes", "queries", "names", "ids"}
            assert all(torch.equal(found[name], want[name][used]) for name in ("scores", "labels", "boxes"))
            assert found["names"] == [{0: "red", 2: "5 µm"}[label] for label in want["labels"][used].tolist()]
            ids = {row["label"]: row["id"] for row in checkpoint.load(run / "best.pth")["categories"]}
            assert found["ids"] == [ids[label] for label in want["labels"][used].tolist()] and ids[0] != 0
            boxes = box_cxcywh_to_xyxy(outputs["pred_boxes"][0]) * size.flip(1).repeat(1, 2)
            assert torch.equal(boxes[found["queries"]], found["boxes"])
        assert left_out and kept                                                # or the test would show nothing


def test_one_or_several_of_any_kind(run, photos, tmp_path):
    detector = detr.load(run / "best.pth")
    array = np.asarray(Image.open(photos[1]))
    kinds = [photos[1], str(photos[1]), Image.open(photos[1]), array, torch.from_numpy(array.copy()).permute(2, 0, 1)]
    want, = detector(photos[1])
    for kind in kinds:
        for found in (*detector(kind), *detector([kind])):
            assert found["names"] == want["names"] and torch.equal(found["boxes"], want["boxes"])
    threshold = float(want["scores"].sort().values[1])
    some, = detector(photos[1], threshold=threshold)
    assert torch.equal(some["scores"], want["scores"][want["scores"] >= threshold])
    assert len(some["names"]) == len(some["boxes"]) == len(want["names"]) - 1 and detector([]) == []


def test_a_fast_detector_finds_the_same(run, photos):
    detector = detr.load(run / "best.pth")
    fast, bf16 = detector.fast(), detector.fast("bf16")
    for path in photos:
        want, found, near = (one.predict(path)[0] for one in (detector, fast, bf16))
        assert found["names"] == want["names"]
        torch.testing.assert_close(found["boxes"], want["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found["scores"], want["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(near["scores"].sort().values, want["scores"].sort().values, rtol=0.05, atol=0.02)
        assert near["scores"].dtype == torch.float32
    assert fast.names == detector.names and (fast.amp, bf16.amp) == ("off", "bf16")


def test_graphs_of_a_fast_detector(run, photos):
    detector = detr.load(run / "best.pth")
    fast = detector.fast(graphs=True)
    assert detector.graphs is None and fast.graphs.recorded == 0
    with pytest.raises(ValueError, match="CUDA graphs need a GPU of NVIDIA, and the images are on cpu"):
        fast.predict(photos[0])
    assert fast.fast().graphs is None and len(fast.fast().predict(photos[0])) == 1
    assert len(fast.explain(photos[0], encoder=False).decoder) == len(detector.explain(photos[0], encoder=False).decoder)


def test_batches(tmp_path, photos):
    exported(tmp_path, dataclasses.replace(SMALL, padding="exact"))
    detector = detr.load(tmp_path / "best.safetensors")
    assert detector.exact
    for alone, together in zip(detector(photos), detector(photos, batch_size=2), strict=True):
        assert torch.allclose(alone["boxes"], together["boxes"], atol=1e-3)
    with pytest.raises(ValueError, match="batch_size 0: at least 1 is needed"):
        detector(photos, batch_size=0)


def test_masks(tmp_path, photos):
    exported(tmp_path, MASKS)
    found, = detr.load(tmp_path / "best.pth")(photos[1])
    outputs, size, fed, postprocessors = by_hand(tmp_path / "best.pth", photos[1], MASKS)
    want, = postprocessors["segm"](postprocessors["bbox"](outputs, size), outputs, size, fed)
    used = (want["labels"] != 1).nonzero()[:, 0].tolist()
    assert len(found["masks"]) == len(used) > 0
    for code, i in zip(found["masks"], used):
        assert np.array_equal(coco_mask.decode(code), want["masks"][i, 0].numpy())


def test_panoptic_models(tmp_path, photos):
    exported(tmp_path, MASKS, "coco_panoptic")
    for ending in (".pth", ".safetensors"):
        detector = detr.load(tmp_path / f"best{ending}")
        is_thing = detector.postprocessors["panoptic"].is_thing
        assert [is_thing(label) for label in range(3)] == [True, False, False]
        made, = detector.maps(detector.look([as_picture(photos[1])]), 0.0)
        assert Image.open(io.BytesIO(made["png_string"])).size == (61, 130)


# What may be asked of predict.

@pytest.fixture(scope="module")
def sigmoid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sigmoid")
    exported(folder, SIGMOID)
    return detr.load(folder / "best.pth")


def rows(found) -> list:
    return [tuple(row) for row in zip(found["names"], found["scores"].tolist(), *found["boxes"].T.tolist())]


def test_classes(sigmoid, photos):
    detector = sigmoid
    every, = detector.predict(photos[1])
    assert rows(detector(photos[1])[0]) == rows(every) and set(every["names"]) == {"red", "5 µm"}
    for wanted, names in (("red", ["red"]), (["red"], ["red"]), ([0], ["red"]), (2, ["5 µm"]),
                          (["5 µm", 0], ["red", "5 µm"])):
        assert rows(detector.predict(photos[1], classes=wanted)[0]) == [row for row in rows(every) if row[0] in names]
    for wanted, message in (("read", "class 'read' is not among the model's 2; the nearest are 'red'"),
                            ([], "classes is empty"),
                            (1, r"class 1 is no label that the data uses; these are 0 \(red\), 2 \(5 µm\)"),
                            (["red", "5 um"], "class '5 um' .* '5 µm'")):
        with pytest.raises(ValueError, match=message):
            detector.predict(photos[1], classes=wanted)


def greedy(found, iou: float) -> list[int]:
    """Non-maximum suppression by its definition, in float64."""
    kept: list[int] = []
    boxes = found["boxes"].double().tolist()
    for i in found["scores"].argsort(descending=True).tolist():
        for k in kept:
            (a, b, c, d), (e, f, g, h) = boxes[i], boxes[k]
            shared = max(min(c, g) - max(a, e), 0) * max(min(d, h) - max(b, f), 0)
            if found["names"][i] == found["names"][k] and shared / ((c - a) * (d - b) + (g - e) * (h - f) - shared) > iou:
                break
        else:
            kept.append(i)
    return sorted(kept)


@pytest.mark.parametrize("iou", [0.0, 0.5, 1.0])
def test_nms(sigmoid, tmp_path, photos, iou):
    exported(tmp_path, MASKS)
    left_out = 0
    for detector in (sigmoid, detr.load(tmp_path / "best.pth")):
        for photo in photos:
            every, = detector.predict(photo)
            some, = detector.predict(photo, nms=iou)
            kept = greedy(every, iou)
            assert rows(some) == [rows(every)[i] for i in kept]
            assert some.get("masks") == ([every["masks"][i] for i in kept] if "masks" in every else None)
            left_out += len(every["names"]) - len(kept)
    assert (left_out > 0) == (iou < 1)


def test_one_label_per_query(sigmoid, photos):
    """Its best class, of those that the data uses."""
    outputs = sigmoid.look([as_picture(photos[0])]).outputs
    prob = outputs["pred_logits"][0].sigmoid()
    prob[:, 1] = 0
    best, labels = prob.max(1)
    every, = sigmoid.predict(photos[0])
    some, = sigmoid.predict(photos[0], one_label_per_query=True)
    assert sorted(zip(some["scores"].tolist(), some["labels"].tolist())) == sorted(zip(best.tolist(), labels.tolist()))
    assert len(every["names"]) == 2 * len(best) and set(rows(some)) < set(rows(every)) and len(set(some["names"])) == 2
    named, = sigmoid.predict(photos[0], one_label_per_query=True, classes="red")
    assert rows(named) == [row for row in rows(some) if row[0] == "red"]


@pytest.mark.parametrize("options", [{}, {"one_label_per_query": True}, {"tile": 40}])
def test_what_is_left_out_is_counted(sigmoid, photos, options):
    """Labels that the data does not use; nothing else changes."""
    left_out = Counter[int]()
    found = sigmoid.predict(photos, **options)
    assert list(map(rows, sigmoid.predict(photos, without_class=left_out, **options))) == list(map(rows, found))
    every = len(places(70, 90, 40)) + len(places(130, 61, 40)) if "tile" in options else 2
    assert left_out == {1: 9 * every}                                           # all queries name all labels


def test_what_images_are_called(run, photos):
    detector = detr.load(run / "best.pth")
    with torch.no_grad():
        detector.model.bbox_embed.layers[0].bias.fill_(float("nan"))
    for options in ({}, {"batch_size": 2}, {"tile": 60}):
        with pytest.raises(ValueError, match="^image 7 of a.zip: the model's scores"):
            detector.predict([Image.open(photo) for photo in photos], names=["image 7 of a.zip", "b"], **options)
    with pytest.raises(ValueError, match="1 names for 2 images"):
        detector.predict(photos, names=["a"])


def test_what_predict_refuses(run, tmp_path):
    detector, image = detr.load(run / "best.pth"), Image.new("RGB", (50, 40))
    exported(tmp_path, MASKS, "coco_panoptic")
    panoptic = detr.load(tmp_path / "best.pth")
    for of, options, message in (
            (detector, {"threshold": 50}, "threshold 50: scores are between 0 and 1"),
            (detector, {"nms": 1.5}, "nms 1.5: an IoU, 0 to 1"),
            (detector, {"overlap": 0.3}, "overlap 0.3 is about tiles, and there are none; give tile=PIXELS"),
            (detector, {"whole": True}, "whole is about tiles"),
            (detector, {"tile": 0}, "tile 0: a side in pixels"), (detector, {"tile": 20, "overlap": 1}, "overlap 1: "),
            (panoptic, {"nms": 0.5}, "nms is for models of things .* panoptic"),
            (panoptic, {"tile": 50}, "tile is for models of things .* panoptic")):
        for images in (image, []):
            with pytest.raises(ValueError, match=message):
                of.predict(images, **options)


@pytest.mark.parametrize("model", [SMALL, MASKS, SIGMOID], ids=["DETR", "masks", "Deformable DETR"])
def test_tiles(tmp_path, model):
    """What merging makes of the tiles as images of their own; a single tile is the image."""
    exported(tmp_path, model)
    detector = detr.load(tmp_path / "best.pth")
    pixels = np.random.RandomState(0).randint(0, 255, (70, 130, 3)).astype(np.uint8)
    where, size = places(70, 130, 60, 0.25), (70, 130)
    parts = detector.predict([pixels[one.top:one.bottom, one.left:one.right] for one in where])
    want = merged([moved(one, place, size) for one, place in zip(parts, where)], where, size)
    for channels_first in (False, True):
        image = torch.from_numpy(pixels).permute(2, 0, 1) if channels_first else pixels
        found, other = detector.predict([image, image], batch_size=3, tile=60, overlap=0.25)
        assert rows(found) == rows(other) and len(found["names"]) > 3
        assert torch.allclose(found["boxes"], want["boxes"], atol=1e-3) and torch.equal(found["labels"], want["labels"])
        assert {tuple(code["size"]) for code in found.get("masks", ())} <= {size}
        assert found.get("masks") == want.get("masks")
    one, = detector.predict(pixels, tile=130)
    plain, = detector.predict(pixels)
    assert sorted(rows(one)) == sorted(rows(plain)) and (one["scores"].diff() <= 0).all()
    name = found["names"][0]
    few, = detector.predict(pixels, batch_size=3, tile=60, overlap=0.25, classes=name, nms=0.3)
    assert set(rows(few)) < set(rows(found)) and set(few["names"]) == {name}


def test_tiles_whose_outputs_are_no_numbers(run, photos):
    detector = detr.load(run / "best.pth")
    with torch.no_grad():
        detector.model.bbox_embed.layers[0].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=f"^{photos[0]}: the model's scores or boxes"):
        detector.predict(photos[0], tile=40, batch_size=4)


def judged(file, kind: str, ids: list[int], several, categories) -> list[float]:
    """The twelve numbers that pycocotools gives detections."""
    id_of = {category.label: category.id for category in categories}
    results = [{"image_id": image, "category_id": id_of[label], "score": score,
                **({"segmentation": found["masks"][i]} if kind == "segm" else {"bbox": [x0, y0, x1 - x0, y1 - y0]})}
               for image, found in zip(ids, several)
               for i, (label, score, (x0, y0, x1, y1)) in enumerate(zip(
                   found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist()))]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
        judge = COCOeval(truth, truth.loadRes(results), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats.tolist()


@pytest.mark.parametrize("model", [SMALL, SIGMOID, MASKS], ids=["DETR", "Deformable DETR", "masks"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_scored_as_evaluation_scores(tmp_path, capsys, model, batch_size):
    """Predictions at a threshold of 0, judged by pycocotools, get evaluation's numbers. The objects are what the model
    itself says, moved a little, so that it finds some of them."""
    exported(tmp_path, model, categories=[{**row, "isthing": True} for row in TABLE])       # of stuff, none are scored
    detector, random = detr.load(tmp_path / "best.pth"), np.random.RandomState(0)
    (tmp_path / "val2017").mkdir()
    images, annotations = [], []
    for number in range(6):
        height, width = random.randint(50, 120, 2).tolist()
        pixels = random.randint(0, 200, 3) + random.randint(0, 55, (height, width, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "val2017" / f"{number}.png")
        images.append({"id": 7 * number, "file_name": f"{number}.png", "width": width, "height": height})
        found, = detector.predict(tmp_path / "val2017" / f"{number}.png")
        for i in found["scores"].argsort(descending=True)[:4].tolist():
            (x0, y0, x1, y1), moved_by = found["boxes"][i].tolist(), random.uniform(-0.1, 0.1, 4)
            corners = np.array([x0, y0, x1, y1]) + moved_by * ([x1 - x0, y1 - y0] * 2)
            x0, y0, x1, y1 = corners.clip(0, [width, height] * 2).tolist()
            if min(x1 - x0, y1 - y0) > 0.1:
                annotations.append({"id": len(annotations) + 1, "image_id": 7 * number, "iscrowd": 0,
                                    "category_id": {0: 3, 2: 40}[int(found["labels"][i])], "area": (x1 - x0) * (y1 - y0),
                                    "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": found["masks"][i]
                                    if model.masks else [[x0, y0, x1, y0, x1, y1, x0, y1]]})
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [
        {"id": 3, "name": "red"}, {"id": 40, "name": "5 µm"}]}))

    data = build_dataset("val", tmp_path, transforms=eval_transforms(detector.preprocessing), return_masks=model.masks,
                         categories=detector.categories)
    loader = torch.utils.data.DataLoader(data, batch_size, collate_fn=collate)
    built, criterion, postprocessors = model.build(3)
    built.load_state_dict(detector.model.state_dict())
    if model.masks:
        postprocessors["segm"].rle = True
    evaluated = engine.evaluate(built, criterion, postprocessors, loader, len(loader),
                                build_evaluators(data, model.masks), torch.device("cpu"))
    predicted = detector.predict([tmp_path / "val2017" / image["file_name"] for image in images], 0.0, batch_size)
    capsys.readouterr()
    for kind, name in (("bbox", "bbox"), ("segm", "masks"))[:1 + model.masks]:
        numbers = judged(file, kind, [image["id"] for image in images], predicted, detector.categories)
        assert np.abs(np.array(numbers) - evaluated[f"coco_eval_{name}"]).max() <= 1e-6
        assert 0.02 < numbers[0] < 1                                            # or the test would show little


# Where it looks.

@pytest.mark.parametrize("model", [SMALL, MASKS, SIGMOID], ids=["DETR", "masks", "Deformable DETR"])
def test_explanations(tmp_path, model):
    exported(tmp_path, model)
    detector = detr.load(tmp_path / "best.pth")
    picture, exif = Image.fromarray(np.random.RandomState(0).randint(0, 255, (70, 90, 3)).astype(np.uint8)), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    before, = detector.predict(tmp_path / "turned.png")
    seen = detector.explain(tmp_path / "turned.png")
    assert seen.size == (90, 70) and len(seen.encoder) == 1 and len(seen.decoder) == model.dec_layers
    assert len(detector.explain(picture, encoder=False).encoder) == 0
    found, = detector.postprocessors["bbox"](seen.outputs, torch.tensor([seen.size]))
    used = found["labels"] != 1
    assert torch.equal(found["boxes"][used], before["boxes"]) and torch.equal(found["scores"][used], before["scores"])
    query = int(found.get("queries", torch.arange(9))[0])
    assert torch.allclose(seen.path(query)[-1], found["boxes"][0], atol=1e-3)
    assert seen.heat(query).sum() <= 1 + 1e-5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in detector.modules())
    with pytest.raises(TypeError, match="a picture is a path.*, not a list"):
        detector.explain([picture])


# For others.

@pytest.mark.skipif(importlib.util.find_spec("supervision") is None, reason="supervision is not installed")
@pytest.mark.filterwarnings("ignore:OpenCV")                                    # which it can do without
def test_to_supervision(tmp_path, run, photos):
    exported(tmp_path, MASKS)
    for detector, masks in ((detr.load(run / "best.pth"), False), (detr.load(tmp_path / "best.pth"), True)):
        found, = detector.predict(photos[1])
        given = to_supervision(found)
        assert np.array_equal(given.xyxy, found["boxes"].numpy())
        assert np.array_equal(given.confidence, found["scores"].numpy())
        assert given.class_id.tolist() == found["labels"].tolist() and given.data["class_name"].tolist() == found["names"]
        assert (given.mask is not None) == masks and len(given) == len(found["names"]) > 0
        if masks:
            assert given.mask.dtype == bool and given.mask.shape[1:] == (130, 61)
            assert given.mask.sum((1, 2)).tolist() == coco_mask.area(found["masks"]).tolist()
        some = given[given.confidence > float(found["scores"].median())]
        assert 0 < len(some) < len(given)
        assert len(to_supervision(detector.predict(photos[1], 1.0)[0])) == 0


def test_without_supervision(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="to_supervision needs .*: pip install supervision"):
        to_supervision(detr.load(run / "best.pth").predict(Image.new("RGB", (50, 40)))[0])


def test_outputs_that_are_no_numbers(run, photos):
    detector = detr.load(run / "best.pth")
    with torch.no_grad():
        detector.model.bbox_embed.layers[0].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=f"{photos[0]}: the model's scores or boxes are not finite; .*best.pth"):
        detector(photos)
    with pytest.raises(ValueError, match="^image 0: the model's scores"):
        detector([Image.new("RGB", (50, 40))])


def test_devices(run):
    with pytest.raises(ValueError, match="device cudo: .*; use device='cpu'"):
        detr.load(run / "best.pth", "cudo")
    assert next(detr.load(run / "best.pth", torch.device("cpu")).parameters()).device.type == "cpu"


# What --eval --resume is told by a file.

def test_the_same_run_from_either_file(run):
    """Model, data and classes are decided alike, so that a score is the same with both."""
    one, two = (decide({"resume": str(run / f"best{ending}"), "eval": True}) for ending in (".pth", ".safetensors"))
    assert (one.name, one.model, one.train, one.data, one.categories) \
        == (two.name, two.model, two.train, two.data, two.categories)
    assert one.model == SMALL and one.data.image_size == "64" and one.categories[1].name == "5 µm"
    assert one.resumed["num_classes"] == two.resumed["num_classes"] == 3
    assert all(torch.equal(x, two.resumed["model"][name]) for name, x in one.resumed["model"].items())


# Pictures.

@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size, limit", [(64, 100), (70, None), ((50, 40), 100), (800, 90)])
def test_prepared_as_in_evaluation(channels, size, limit):
    """Bit for bit."""
    preprocessing = Preprocessing(size, limit, *(tuple(np.linspace(a, 0.6, channels)) for a in (0.4, 0.2)))
    random = np.random.RandomState(0)
    for height, width in ((70, 90), (131, 60), (3, 400)):
        array = random.randint(0, 256, (height, width, channels)).astype(np.uint8)
        picture = as_picture(array, channels)
        prepared = preprocessing(picture)
        want = eval_transforms(preprocessing)(picture, {})[0]
        assert prepared.dtype == torch.float32 and prepared.is_contiguous() and torch.equal(prepared, want)


def test_files_are_read_as_in_evaluation(tmp_path):
    random = np.random.RandomState(0)
    colour, exif = Image.fromarray(random.randint(0, 256, (40, 60, 3)).astype(np.uint8)), Image.Exif()
    exif[0x0112] = 6                                                            # to be turned by a quarter
    colour.save(tmp_path / "turned.jpg", exif=exif)
    colour.save(tmp_path / "turned.png", exif=exif)
    for mode in ("L", "P", "CMYK", "1", "LA", "RGBA"):
        colour.convert(mode).save(tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    Image.fromarray(random.randint(0, 65536, (40, 60)).astype(np.uint16)).save(tmp_path / "16.png")
    for path in sorted(tmp_path.iterdir()):
        for channels in (1, 3):
            got, want = as_picture(path, channels), read_image(path, channels=channels)
            assert got.mode == want.mode and np.array_equal(np.asarray(got), np.asarray(want)), path
    assert as_picture(tmp_path / "turned.jpg").size == (40, 60)
    assert as_picture(Image.open(tmp_path / "turned.jpg")).size == (60, 40)                 # in memory it is as it is


def test_what_is_no_picture(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    Image.new("F", (5, 5)).save(tmp_path / "float.tif")
    for image, channels, kind, message in (
            (tmp_path / "none.jpg", 3, FileNotFoundError, "none.jpg is not there; correct the path"),
            (tmp_path / "cut.jpg", 3, OSError, r"cut.jpg \(\d+ bytes\) cannot be read: .*; copy it again, convert"),
            (tmp_path / "float.tif", 3, OSError, "float.tif .* of unknown range; convert it to 8 bits"),
            (tmp_path / "cut.jpg", 5, ValueError, r"cut.jpg: for a model of 5 channels, .* array \[height, width, 5\]"),
            (Image.new("RGB", (4, 4)), 5, ValueError, r"a PIL image for a model of 5 channels: .*\[height, width, 5\]"),
            (np.zeros((4, 4, 3)), 3, ValueError, r"is float64 \[4, 4, 3\], but uint8 \[height, width, 3\], 0 to 255"),
            (torch.rand(3, 4, 4), 3, ValueError, r"is torch.float32 \[3, 4, 4\], but uint8 \[3, height, width\]"),
            (np.zeros((3, 40, 40), np.uint8), 3, ValueError, r"uint8 \[3, 40, 40\], but uint8 \[height, width, 3\]"),
            (np.zeros((0, 40, 3), np.uint8), 3, ValueError, r"uint8 \[0, 40, 3\]"),
            (np.zeros((4, 4, 4), np.uint8), 3, ValueError, r"uint8 \[4, 4, 4\]"),
            (np.zeros((4, 4, 3), np.uint8), 4, ValueError, r"uint8 \[4, 4, 3\], but uint8 \[height, width, 4\]"),
            ({"a": 1}, 3, TypeError, "a picture is a path, .*, not a dict")):
        with pytest.raises(kind, match=message):
            as_picture(image, channels)
    with pytest.raises(ValueError, match=r"a picture with 1 channels, and the model takes 3; .*channels=3"):
        PREPROCESSING(Image.new("L", (4, 4)))


def test_images_of_five_channels(tmp_path):
    model = dataclasses.replace(SMALL, in_channels=5)
    exported(tmp_path, model, preprocessing=Preprocessing(64, 100, (0.5,) * 5, (0.25,) * 5))
    detector = detr.load(tmp_path / "best.safetensors")
    pixels = np.random.RandomState(0).randint(0, 256, (70, 90, 5)).astype(np.uint8)
    one, two = detector([pixels, torch.from_numpy(pixels.transpose(2, 0, 1).copy())])
    assert detector.channels == 5 and torch.equal(one["boxes"], two["boxes"])


# Files of others, and files that are refused.

def published(name: str) -> dict[str, torch.Tensor]:
    """Weights under the names and of the shapes of a published file, each tensor of one value; heads that are stored
    twice have the same."""
    shapes = load_case(name).spec["shapes"]
    return {key: torch.full(shape, len(key.removeprefix("transformer.decoder.")) + sum(shape)) for key, shape in
            shapes.items()}


FLAGS = argparse.Namespace(lr=1e-4, backbone="resnet50", lr_backbone_names=["backbone.0"])


@pytest.mark.parametrize("model, case, layout, said", [
    ("detr_resnet50", "detr_r50", lambda weights: {
        "model": weights, "optimizer": {}, "lr_scheduler": {}, "epoch": 299, "args": FLAGS},
     "taken as detr_resnet50, classes COCO's, short side 800"),
    ("deformable_detr_resnet50_two_stage", "deformable_detr_r50_refine_two_stage", lambda weights: {
        "model": weights, "args": FLAGS, "epoch": 49}, "taken as deformable_detr_resnet50_two_stage, classes COCO's"),
    ("small", None, lambda weights: weights, "taken as small, classes COCO's"),
    ("small", None, lambda weights: {"state_dict": {f"module.{name}": value for name, value in weights.items()},
                                     "arch": "detr", "epoch": 3}, "took the prefix 'module.' off its"),
])
def test_published_layouts(tmp_path, capsys, monkeypatch, model, case, layout, said):
    """facebookresearch/detr, fundamentalvision/Deformable-DETR, weights alone, and those of image-classification
    trainers, read by ``detr.load`` and by ``--resume``."""
    monkeypatch.setitem(PRESETS, "small", Preset(SMALL))
    weights, path = published(case) if case else SMALL.build(91)[0].state_dict(), tmp_path / "published.pth"
    torch.save(layout(weights), path)
    detector = detr.load(path, model=model)
    assert said in capsys.readouterr().out
    own = detector.model.state_dict()
    assert own.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(own[name], weights[name].to(own[name]))] == []
    assert detector.names == COCO_CATEGORIES and detector.num_classes == 91 and detector.card == {}
    assert detector.preprocessing == Preprocessing() and detector.name == model
    assert decide({"resume": str(path), "eval": True}, model).model.num_queries == detector.config["model"]["num_queries"]


def test_classes_of_published_files():
    assert published_classes(91) == published_by_datasets(91) == class_table(COCO_CATEGORIES)
    assert published_classes(250) == published_by_datasets(250) == COCO_PANOPTIC and published_classes(92) == []


def test_weights_alone_as_safetensors(tmp_path, monkeypatch):
    """As others write them, with metadata of their own."""
    monkeypatch.setitem(PRESETS, "small", Preset(SMALL))
    weights = SMALL.build(3)[0].state_dict()
    checkpoint.save_safetensors(tmp_path / "a.safetensors", weights, {"config": "text", "model": {"depth": 5}, "card": 3})
    detector = detr.load(tmp_path / "a.safetensors", model="small")
    assert detector.names == {0: "label 0", 1: "label 1", 2: "label 2"} and detector.preprocessing == Preprocessing()
    assert torch.equal(detector.model.class_embed.bias, weights["class_embed.bias"]) and detector.card == {}


class Harmful:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def both_refuse(path, message):
    """``detr.load`` and ``--eval --resume`` alike."""
    for read in (lambda: detr.load(path), lambda: decide({"resume": str(path), "eval": True})):
        with pytest.raises(ValueError, match=message):
            read()


def test_files_that_are_refused(run, tmp_path):
    mark, path = tmp_path / "it_ran", tmp_path / "a.pth"
    content = torch.load(run / "best.pth", weights_only=True)
    torch.save({**content, "card": Harmful(f"touch {mark}")}, path)
    both_refuse(path, r"a.pth holds more than weights: reading it would run \w+.system. It was refused and nothing was")
    assert not mark.exists()
    for file in ("best.pth", "best.safetensors"):
        whole, cut = (run / file).read_bytes(), tmp_path / file
        for kept in (0, 1, 7, len(whole) // 2, len(whole) - 500, len(whole) - 50, len(whole) - 1):
            cut.write_bytes(whole[:kept])
            both_refuse(cut, f"{file} is damaged, cut short or no checkpoint at all .{kept:,} bytes")
    torch.save({"model": {"fc.weight": torch.zeros(3, 2)}}, path)
    both_refuse(path, "a.pth has no class_embed.weight: it is not a DETR checkpoint")


def test_weights_that_do_not_fit(run, tmp_path):
    content = torch.load(run / "best.pth", weights_only=True)
    other = {name: value for name, value in content["model"].items() if not name.startswith("transformer")}
    checkpoint.save(tmp_path / "a.pth", {**content, "model": other})
    with pytest.raises(ValueError, match="a.pth does not fit the model: .*transformer.*missing"):
        detr.load(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="--model tiny_detr: .*best.pth holds a detr_resnet50; leave --model out"):
        detr.load(run / "best.pth", model="tiny_detr")
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*first.pth; .* best.pth, best.safetensors"):
        detr.load(run / "first.pth")
