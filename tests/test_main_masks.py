"""Masks and panoptic maps from the command line: training, scoring, files, and a mask head on a frozen detector."""
import contextlib
import io
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_main import log, run, settle

from datasets import build_dataset, build_evaluators
from datasets.coco_panoptic import PanopticAnnotations
from datasets.panoptic_eval import PanopticEvaluator
from datasets.synthetic import make_panoptic, make_synthetic
from detr import build_model, checkpoint
from detr.postprocess import encode

FEW = "--image_size 64 --max_size 100 --batch_size 4 --num_workers 0 --device cpu --amp off --print_every 1000 "
SMALL = FEW + ("--model tiny_deformable_detr --num_queries 12 --dec_layers 1 --dim_feedforward 32 ")
DENSE = FEW + ("--model detr_resnet50 --backbone resnet_tiny --backbone_norm batch --from_scratch --lr_backbone 1e-3 "
               "--hidden_dim 128 --nheads 8 --dim_feedforward 32 --enc_layers 1 --dec_layers 1 --num_queries 12 "
               "--padding exact ")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    make_synthetic(folder, train=16, val=6)
    make_panoptic(folder)
    return folder


@pytest.fixture(scope="module")
def boxes(data, tmp_path_factory) -> Path:
    """The checkpoint of a box model."""
    folder = tmp_path_factory.mktemp("runs") / "boxes"
    run(SMALL + f"--coco_path {data} --output_dir {folder} --epochs 1")
    return folder / "checkpoint.pth"


def panoptic(data: Path) -> str:
    return f"--coco_path {data} --coco_panoptic_path {data} --dataset_file coco_panoptic --masks "


@pytest.mark.parametrize("model", [SMALL, DENSE], ids=["deformable", "dense"])
def test_instances(model, data, tmp_path):
    """24 numbers; pycocotools gives the same for the saved json; so does an evaluation of the checkpoint."""
    results, text = run(model + f"--coco_path {data} --masks --epochs 1 --output_dir {tmp_path}/out")
    row, = log(tmp_path / "out")
    assert len(row["test_coco_eval_bbox"]) == len(row["test_coco_eval_masks"]) == 12
    assert {"train_loss_mask", "train_loss_dice", "test_loss_mask"} <= row.keys() and "\nmasks\n" in text
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "annotations" / "instances_val2017.json"))
        for kind, name in (("bbox", "results.json"), ("segm", "results_masks.json")):
            rows = json.loads((tmp_path / "out" / name).read_text())
            assert ("segmentation" in rows[0], "bbox" in rows[0]) == (kind == "segm", kind == "bbox")
            judge = COCOeval(truth, truth.loadRes(rows), kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            assert judge.stats.tolist() == results["coco_eval_bbox" if kind == "bbox" else "coco_eval_masks"]
    again, said = run(f"--coco_path {data} --eval --resume {tmp_path}/out/checkpoint.pth --device cpu --num_workers 0 "
                      f"--output_dir {tmp_path}/again")
    assert again["coco_eval_masks"] == results["coco_eval_masks"] and "results_masks.json" in said


@pytest.mark.parametrize("model", [SMALL, DENSE], ids=["deformable", "dense"])
def test_panoptic_maps(model, data, tmp_path):
    """PQ in the log; the files that are left give the same PQ again; class table and threshold are in the checkpoint."""
    results, text = run(model + panoptic(data) + f"--epochs 1 --panoptic_threshold 0.02 --output_dir {tmp_path}/out")
    assert "left out of the results" not in text                                # stuff has no boxes to find
    row, = log(tmp_path / "out")
    assert row["test_PQ_all"]["n"] >= 6 and len(row["test_coco_eval_masks"]) == 12
    categories = checkpoint.load(tmp_path / "out" / "checkpoint.pth")["categories"]
    assert [row["isthing"] for row in categories] == [True] * 6 + [False] * 4
    truth = PanopticAnnotations(data / "panoptic_val2017", data / "annotations" / "panoptic_val2017.json")
    found = PanopticAnnotations(tmp_path / "out" / "panoptic", tmp_path / "out" / "panoptic.json")
    assert found.ids == truth.ids and sum(len(found.segments(i).ids) for i in range(len(found))) > 0
    evaluator = PanopticEvaluator(truth)
    for i, image_id in enumerate(found.ids):
        segments, label = found.segments(i), {c.label: c.id for c in found.categories}
        ours = {c.id: c.label for c in truth.categories}
        evaluator.update({image_id: {
            "png_string": (tmp_path / "out" / "panoptic" / f"{image_id:012d}.png").read_bytes(),
            "segments_info": [{"id": int(id), "category_id": ours[label[int(k)]]}
                              for id, k in zip(segments.ids, segments.labels)]}})
    with contextlib.redirect_stdout(io.StringIO()):
        assert evaluator.summarize()["PQ_all"] == results["PQ_all"]
    again, _ = run(f"--coco_path {data} --coco_panoptic_path {data} --eval --resume {tmp_path}/out/checkpoint.pth "
                   f"--device cpu --num_workers 0")
    assert again["PQ_all"] == results["PQ_all"]


def test_boxes_alone_on_panoptic_data(data, tmp_path):
    """The published first step: segments as boxes, without a mask head."""
    results, _ = run(SMALL + panoptic(data).replace("--masks", "") + f"--epochs 1 --output_dir {tmp_path}/out")
    assert "PQ_all" not in results and "coco_eval_masks" not in results and len(results["coco_eval_bbox"]) == 12


def test_a_mask_head_on_a_frozen_detector(boxes, data, tmp_path):
    """Not a bit of the detector changes, running statistics included; its configuration comes from its checkpoint."""
    _, text = run(FEW + f"--coco_path {data} --masks --frozen_weights {boxes} --lr 1e-2 --epochs 2 "
                  f"--output_dir {tmp_path}/out")
    assert f"weights: {boxes}, frozen; the mask head's are random, and train" in text
    before = checkpoint.load(boxes)
    after = checkpoint.load(tmp_path / "out" / "checkpoint.pth")
    assert after["config"]["model"]["num_queries"] == 12 and after["categories"] == before["categories"]
    trained = 0
    for state in (after["model"], after["training_model"]):
        for name, value in state.items():
            if name.startswith("detr."):
                assert torch.equal(value, before["model"][name.removeprefix("detr.")]), name
            else:
                trained += 1
    assert trained > 20
    model = build_model("tiny_deformable_detr", masks=True, frozen_weights="x")[0]
    trained_parts = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained_parts == {"bbox_attention", "mask_head"}


def test_a_mask_head_on_a_frozen_detector_learns(boxes, data, tmp_path):
    run(FEW + f"--coco_path {data} --masks --frozen_weights {boxes} --lr 3e-3 --epochs 6 --eval_every 6 --ema_decay 0 "
        f"--output_dir {tmp_path}/out")
    rows = log(tmp_path / "out")
    assert rows[-1]["train_loss_dice"] < rows[0]["train_loss_dice"] - 0.005
    assert abs(rows[-1]["train_loss_bbox"] - rows[0]["train_loss_bbox"]) < 0.3 * rows[0]["train_loss_bbox"]


@pytest.mark.parametrize("line, message", [
    ("--model detr_resnet50 --mask_loss_coef 2", "--mask_loss_coef has no effect without --masks"),
    ("--model detr_resnet50 --masks --panoptic_threshold 0.5", "has no effect without --masks and --dataset_file coco_"),
    ("--model detr_resnet50 --coco_panoptic_path x", "add --dataset_file coco_panoptic"),
    ("--model tiny_detr --masks", "--masks: tiny_detr has no such option"),
    ("--model detr_resnet50 --frozen_weights nowhere.pth", "there is no checkpoint nowhere.pth"),
])
def test_refused_flags(line, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        settle(line)
    assert message in str(error.value)


def test_a_frozen_detector_denoises_nothing(boxes):
    with pytest.raises(ValueError, match="--denoising has no effect with --frozen_weights, whose detector does not"):
        settle(f"--masks --frozen_weights {boxes} --denoising")


def test_panoptic_data_without_its_folder(data):
    with pytest.raises(ValueError, match="--dataset_file coco_panoptic needs --coco_panoptic_path"):
        run(SMALL + f"--coco_path {data} --dataset_file coco_panoptic --masks")


def test_objects_without_masks(data, tmp_path):
    """Data for boxes alone cannot train masks, and the first object without one is named."""
    import shutil
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    file = copy / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    del content["annotations"][3]["segmentation"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1 of .* objects have no segmentation, which masks need .annotation"):
        run(SMALL + f"--coco_path {copy} --masks --output_dir {tmp_path}/out")


def test_masks_do_not_depend_on_the_batch(monkeypatch):
    """Deformable DETR's masks, as test_exact.py has it for DETR's."""
    import test_exact
    model = test_exact.build("deformable_detr_resnet50", masks=True, hidden_dim=128, nheads=8)
    found = test_exact.differences("deformable_detr_resnet50", model, test_exact.images((70, 150), (200, 64), (1, 40)),
                                   monkeypatch)
    assert found["pred_masks"] < 1e-4 and max(found.values()) < 1e-4, found
    legacy = test_exact.build("deformable_detr_resnet50", masks=True, hidden_dim=128, nheads=8, padding="legacy")
    two = test_exact.images((70, 150), (200, 64))
    found = test_exact.differences("deformable_detr_resnet50", legacy, two, monkeypatch)
    assert found["pred_masks"] > 1e-3


def test_the_mask_head_sees_the_map_of_the_backbones_stride():
    """Deformable DETR's memory of the last backbone map, not of the further levels."""
    model = build_model("deformable_detr_resnet50", num_classes=3, backbone="resnet18", masks=True, hidden_dim=128,
                        enc_layers=1, dec_layers=1, dim_feedforward=32, num_queries=4)[0].eval()
    with torch.no_grad():
        seen = model.detr.detect([torch.randn(3, 96, 160)])[1]
    assert [tuple(f.tensors.shape[-2:]) for f in seen.features] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert seen.src.shape == seen.memory.shape == (1, 128, 3, 5) and seen.hs.shape == (1, 4, 128)
    assert model([torch.randn(3, 96, 160)])["pred_masks"].shape == (1, 4, 24, 40)
    assert seen.memory.isfinite().all()


@pytest.mark.parametrize("crowds", [False, True], ids=["objects", "crowds too"])
def test_the_masks_of_photographs_against_themselves(real_data, tmp_path, crowds):
    """COCO's objects as our reader gives them, each a prediction with score 1, and with a part of its crowds, which
    count neither as right nor as wrong: what pycocotools makes of its own masks of the same objects, all found."""
    folder = real_data / "coco_mini"
    data = build_dataset("val", folder, return_masks=True)
    evaluator = build_evaluators(data, masks=True)[0]
    label = {category.id: category.label for category in data.categories}
    plain = []
    for i, image_id in enumerate(data.ids):
        target = data.target(i)
        found = {"labels": target["labels"], "boxes": target["boxes"], "masks": encode(target["masks"].byte()[:, None])}
        rows = data.coco.imgToAnns[image_id]
        plain += [{"image_id": image_id, "category_id": row["category_id"], "score": 1.0,
                   "segmentation": data.coco.annToRLE(row)} for row in rows if not row["iscrowd"]]
        for row in (row for row in rows if row["iscrowd"] and crowds):
            part = torch.from_numpy(data.coco.annToMask(row))
            part[:, ::2] = 0                                                        # half of it: IoU by its own area is 1
            code, = encode(part[None, None])
            found = {"labels": torch.cat([found["labels"], torch.tensor([label[row["category_id"]]])]),
                     "boxes": torch.cat([found["boxes"], torch.tensor([row["bbox"]])]), "masks": [*found["masks"], code]}
            plain.append({"image_id": image_id, "category_id": row["category_id"], "score": 1.0, "segmentation": code})
        evaluator.update({image_id: {**found, "scores": torch.ones(len(found["labels"]))}})
    assert sum(row["iscrowd"] for row in data.coco.anns.values()) == 5
    results = evaluator.summarize()["coco_eval_masks"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "annotations" / "instances_val2017.json"))
        judge = COCOeval(truth, truth.loadRes(plain), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert results == judge.stats.tolist() and results[0] > 0.99 and results[8] == 1
    evaluator.save_results(tmp_path / "results.json")
    saved = json.loads((tmp_path / "results_masks.json").read_text())
    areas = [Counter((row["image_id"], row["category_id"], int(coco_mask.area(row["segmentation"]))) for row in rows)
             for rows in (saved, plain)]
    assert areas[0] == areas[1] and areas[0].total() == len(plain) == 619 + 5 * crowds
