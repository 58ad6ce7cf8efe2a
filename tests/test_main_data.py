"""Your own data from the command line: names and ids in and out in every format, ``--finetune``, and each option of data
and of fine-tuning."""
from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_main import log, parse, run, same, settle

import main
import training
from datasets import from_dataset
from datasets.annotations import COCO_CATEGORIES
from datasets.formats import recognise
from datasets.transforms import Unscaled
from detr import build_model, checkpoint
from detr.presets import PRESETS
from detr.settings import fine_tuning

ROOT = Path(main.__file__).parent
FEW = "--num_workers 0 --device cpu --amp off --print_every 1000 "
STEP = FEW + "--epochs 1 --batch_size 4 "
SIZE = "--image_size 64 --max_size 100 "
DETR = (SIZE + "--model detr_resnet50 --backbone resnet_tiny --backbone_norm batch --from_scratch --lr_backbone 1e-3 "
        "--hidden_dim 32 --nheads 2 --dim_feedforward 32 --enc_layers 1 --dec_layers 2 --num_queries 8 --padding exact "
        "--dropout 0 ")
DEFORMABLE = SIZE + "--model tiny_deformable_detr --num_queries 8 --dim_feedforward 32 --ema_decay 0 "
MODELS = pytest.mark.parametrize("model", ["detr", "deformable"])

TABLES = {
    "0-based": {0: "cat", 1: "dog", 2: "owl"},
    "1-based": {1: "cat", 2: "dog", 3: "owl"},
    "gapped": {3: "red", 17: "two words", 90: "cat"},
    "single": {5: "only"},
    "background": {0: "background", 1: "cat"},
    "nasty": {0: "background", 7: "two words", 90: "naïve Ω & <é>"},
}
FORMATS = ("coco_splits", "yolo", "voc", "csv")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def no_pictures(monkeypatch):
    """Those at the end of a training, which take as long as these trainings do, are seen in other tests."""
    monkeypatch.setattr(training, "picture_of_detections", lambda *_: None)
    monkeypatch.setattr(main.visualize, "draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def convert():
    return script("convert_dataset")["convert"]


def script(name: str) -> dict[str, Any]:
    path = sys.path.copy()
    try:
        return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))
    finally:
        sys.path[:] = path


def make(folder: Path, names: dict[int, str], train: int = 4, val: int = 2, crowd: bool = False,
         rare: bool = False) -> Path:
    """COCO's layout: noise of 64 x 48 pixels with coloured boxes of the classes in turn. ``crowd``: with a crowd over
    half of each image; ``rare``: the last class is on the first image alone."""
    random, ids = np.random.RandomState(0), list(names)
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        (folder / f"{split}2017").mkdir()
        content: dict[str, Any] = {"images": [], "annotations": [],
                                   "categories": [{"id": id, "name": name} for id, name in names.items()]}
        for i in range(count):
            pixels, image_id = random.randint(0, 90, (48, 64, 3)).astype(np.uint8), 100 * len(split) + 7 * i
            content["images"].append({"id": image_id, "file_name": f"{split}_{i}.png", "width": 64, "height": 48})
            for k in range(2):
                turn = 2 * i + k
                place = (0 if turn else -1) if rare and len(ids) > 1 else turn % len(ids)
                x, y, w, h = (int(n) for n in random.randint((30 * k, 4, 16, 20), (30 * k + 6, 10, 24, 34)))
                pixels[y:y + h, x:x + w] = (255, 60 * place % 256, 120)
                content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": image_id, "area": w * h,
                                               "category_id": ids[place], "bbox": [x, y, w, h], "iscrowd": 0})
            if crowd:
                content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": image_id, "area": 1536,
                                               "category_id": ids[0], "bbox": [0, 0, 32, 48], "iscrowd": 1})
            Image.fromarray(pixels).save(folder / f"{split}2017" / f"{split}_{i}.png")
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# -- names and ids ----------------------------------------------------------------------------------------------------

def ids_in(form: str, names: dict[int, str]) -> dict[int, str]:
    """What a format makes of a class table: COCO's keeps ids, YOLO's counts from 0 in their order, Pascal VOC and CSV
    have none, and are numbered from 1 in the order of names."""
    if form.startswith("coco"):
        return names
    if form == "yolo":
        return dict(enumerate(names[id] for id in sorted(names)))
    return dict(enumerate(sorted(names.values()), 1))


@pytest.mark.parametrize("table, form", [*((table, "coco") for table in TABLES), *(("nasty", form) for form in FORMATS)])
def test_names_and_ids_there_and_back(table, form, tmp_path, monkeypatch, convert):
    """Trained, scored, predicted and loaded again: everywhere the data's own ids and names."""
    monkeypatch.chdir(tmp_path)
    data = make(tmp_path / "coco", TABLES[table])
    if form != "coco":
        convert(tmp_path / "coco", tmp_path / form, form)
        data = tmp_path / form
    names = ids_in(form, TABLES[table])
    results, text = run(DEFORMABLE + STEP + f"--data {data} --output_dir out")
    assert f"data: {data};" in text and "data check: " in text and "nothing stops training" in text
    content = checkpoint.load("out/checkpoint.pth")
    assert [(row["label"], row["id"], row["name"]) for row in content["categories"]] == \
        [(label, id, names[id]) for label, id in enumerate(sorted(names))]
    assert content["num_classes"] == len(names)

    split = recognise(data).splits["val"]
    truth, rows = split.read(), json.loads(Path("out/results.json").read_text())
    assert {row["category_id"] for row in rows} == set(names) == {row["id"] for row in truth["categories"]}
    assert {row["image_id"] for row in rows} == {image["id"] for image in truth["images"]}
    assert scores(truth, rows) == results["coco_eval_bbox"] and len(results["coco_eval_bbox"]) == 12

    predict = script("predict")                             # label k of the model is the k-th of the ids
    detector = predict["load_detector"]("out/checkpoint.pth")
    for image in truth["images"]:
        path = split.images / image["file_name"]
        found, = detector([predict["read_image"](path)])
        scored = sorted((row for row in rows if row["image_id"] == image["id"]), key=lambda row: -row["score"])
        best = found["scores"].argsort(descending=True, stable=True)
        assert [row["category_id"] for row in scored] == [sorted(names)[k] for k in found["labels"][best].tolist()]

    sources = [str(split.images / image["file_name"]) for image in truth["images"]]
    assert predict["main"](predict["get_args_parser"]().parse_args(
        [*sources, "--resume", "out/checkpoint.pth", "--threshold", "0", "--output_dir", "seen", "--device", "cpu"])) == 0
    seen = json.loads(Path("seen/predictions.json").read_text())
    assert {row["id"]: row["name"] for row in seen["categories"]} == names
    assert all(names[row["category_id"]] == row["category_name"] for row in seen["annotations"])
    ids = {image["file_name"]: image["id"] for image in truth["images"]}
    files = {row["id"]: ids[Path(row["file_name"]).relative_to(split.images.as_posix()).as_posix()]
             for row in seen["images"]}
    for row in seen["annotations"]:
        row["image_id"] = files[row["image_id"]]
    assert close(seen["annotations"], rows)

    again, text = run(FEW + "--eval --resume out/checkpoint.pth --output_dir again --batch_size 4")
    assert again["coco_eval_bbox"] == results["coco_eval_bbox"] and again["loss"] == pytest.approx(results["loss"])
    assert json.loads(Path("again/results.json").read_text()) == rows and "changed since" not in text


def close(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    """The same detections, to rounding: batches may be others."""
    def rank(row: dict[str, Any]) -> tuple[int, int, float]:
        return row["image_id"], row["category_id"], round(row["score"], 4)

    found, wanted = sorted(found, key=rank), sorted(wanted, key=rank)
    return len(found) == len(wanted) and all(
        rank(a) == rank(b) and a["bbox"] == pytest.approx(b["bbox"], abs=0.05) for a, b in zip(found, wanted))


def scores(truth: dict[str, Any], rows: list[dict[str, Any]]) -> list[float]:
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    judge = COCOeval(coco, coco.loadRes(copy.deepcopy(rows)), "bbox")           # which adds to them
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge.stats.tolist()


class Pictures(torch.utils.data.Dataset):
    """Two boxes an image, in torchvision's convention."""

    def __init__(self, count: int, classes: int, first: int = 0, channels: int = 3) -> None:
        self.count, self.classes, self.first, self.channels = count, classes, first, channels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image = torch.full((self.channels, 48, 64), 40 + 10 * i, dtype=torch.uint8)
        return image, {"boxes": torch.tensor([[4.0, 5, 24, 40], [30, 8, 50, 30]]),
                       "labels": torch.tensor([2 * i % self.classes, (2 * i + 1) % self.classes]),
                       "image_id": torch.tensor(self.first + 3 * i)}


def called(line: str, training: Any, validation: Any) -> dict[str, Any]:
    return main.main(parse(line), (training, validation))


def test_data_from_python_with_more_objects_than_queries(tmp_path, capsys):
    called(DEFORMABLE + STEP + f"--num_queries 1 --output_dir {tmp_path}/out",
           from_dataset(Pictures(4, 2), ["a", "b"]), from_dataset(Pictures(2, 2, 50), ["a", "b"]))
    assert "4 training images with more objects than the 1 queries can find, up to 2: --num_queries 2" in \
        capsys.readouterr().out


def test_data_from_python(tmp_path, capsys):
    names = ["background", "two words", "naïve Ω & <é>"]
    training, validation = from_dataset(Pictures(4, 3), names), from_dataset(Pictures(2, 3, 50), names)
    results = called(DEFORMABLE + STEP + f"--output_dir {tmp_path}/out", training, validation)
    text = capsys.readouterr().out
    assert "data: from Python;" in text and "ignore regions: off; from_dataset(..., ignore_regions=True)" in text
    assert training.transforms is None and validation.transforms is None                    # as they were given
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["category_id"] for row in rows} == {0, 1, 2} and {row["image_id"] for row in rows} == {50, 53}
    content = checkpoint.load(tmp_path / "out" / "checkpoint.pth")
    assert [(row["id"], row["name"]) for row in content["categories"]] == list(enumerate(names))
    again = called(FEW + f"--eval --batch_size 4 --resume {tmp_path}/out/checkpoint.pth", None, validation)
    assert again["coco_eval_bbox"] == results["coco_eval_bbox"] and again["loss"] == pytest.approx(results["loss"])
    other = from_dataset(Pictures(2, 3, 50), [*names[:2], "owl"])
    with pytest.raises(ValueError, match=r"the validation data has the classes 0 'background', 1 'two words', 2 'owl', "
                                         r"and .*checkpoint.pth 0 'background', .*; for other classes, --finetune it"):
        called(FEW + f"--eval --resume {tmp_path}/out/checkpoint.pth", None, other)
    called(STEP + f"--finetune {tmp_path}/out/checkpoint.pth --output_dir {tmp_path}/owl",
           from_dataset(Pictures(4, 3), [*names[:2], "owl"]), other)
    assert "classes: 2 of 3 keep their weights" in capsys.readouterr().out


@pytest.mark.parametrize("flags, options, message", [
    ("--coco_path {0}", {}, "--coco_path is about files, and the data comes from Python"),
    ("--data {0}", {}, "--data is about files"),
    ("--cache_mode", {}, "--cache_mode is about files"),
    ("--ignore_regions on", {}, r"--ignore_regions on: .* from_dataset\(..., ignore_regions=True\)"),
    ("--ignore_regions off", {"ignore_regions": True}, r"--ignore_regions off: .*ignore_regions=False"),
    ("--in_channels 5", {}, "the training data gives 3 channels, and the model takes 5: .*channels=5"),
    ("--masks", {}, "the training data gives no masks, which --masks needs: .*return_masks=True"),
])
def test_data_from_python_that_contradicts(flags, options, message, tmp_path):
    training, validation = (from_dataset(Pictures(2, 2), ["a", "b"], **options) for _ in range(2))
    with pytest.raises(ValueError, match=message):
        called(DEFORMABLE + STEP + flags.format(tmp_path), training, validation)


def test_data_from_python_of_five_channels(tmp_path):
    training, validation = (from_dataset(Pictures(4, 2, channels=5), ["a", "b"], channels=5) for _ in range(2))
    results = called(DEFORMABLE + STEP + f"--in_channels 5 --output_dir {tmp_path}/out", training, validation)
    assert len(results["coco_eval_bbox"]) == 12
    with pytest.raises(TypeError, match="the validation data is a Pictures; give what datasets.from_dataset makes of it"):
        called(DEFORMABLE + STEP + "--in_channels 5", training, Pictures(2, 2))


@pytest.mark.usefixtures("no_pictures")
def test_one_place_of_data_takes_that_of_the_other(tmp_path, capsys):
    """A checkpoint remembers where its data was, and says when it is told of another place."""
    data = make(tmp_path / "data", TABLES["gapped"])
    moved = shutil.copytree(data, tmp_path / "moved")
    file = tmp_path / "out" / "checkpoint.pth"
    results, _ = run(DEFORMABLE + STEP + f"--data {data} --output_dir {file.parent}")
    for flag, other in (("coco_path", "data"), ("data", None)):
        again, text = run(FEW + f"--eval --resume {file} --{flag} {moved} --batch_size 4")
        assert again["coco_eval_bbox"] == results["coco_eval_bbox"]
        assert (f"--coco_path {moved} takes the place of --data {data}" if other else
                f"--data {moved} (was {data})") in text
        assert f"the evaluation reads other data than {file} names: --{flag} {moved}" in text
        assert f"changed since {file}: --{flag}" not in text
    assert settle(f"--resume {file} --coco_path {moved}").data.data is None
    with pytest.raises(ValueError, match="--data and --coco_path are two places of data"):
        settle(f"--resume {file} --coco_path {moved} --data {moved}")


def test_what_coco_path_means_is_not_found_out(tmp_path):
    """A folder that could be two data sets is one to --coco_path, as it always was."""
    data = make(tmp_path / "data", TABLES["gapped"])
    (data / "data.yaml").write_text("names: [a]\ntrain: train2017\nval: val2017\n")
    _, text = run(DEFORMABLE + STEP + f"--coco_path {data} --output_dir {tmp_path}/out")
    assert "data check: COCO" in text
    with pytest.raises(ValueError, match="could be 2 data sets"):
        run(DEFORMABLE + STEP + f"--data {data}")


def test_what_stops_a_training(tmp_path):
    data = make(tmp_path / "data", TABLES["gapped"])
    file = data / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 4
    file.write_text(json.dumps(content))
    for flag in ("data", "coco_path"):
        with pytest.raises(ValueError, match=r"(?s)1 fault to correct before training.*category_id 4.*"
                                             rf"scripts/check_data.py {'' if flag == 'data' else '--coco_path '}{data} "
                                             "shows all of it"):
            run(DEFORMABLE + STEP + f"--{flag} {data} --output_dir {tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_checks_say_how_files_were_read(tmp_path, convert, capsys):
    """Notes of a format are in the report, now and from the cache; training says them where it reads."""
    make(tmp_path / "coco", TABLES["1-based"])
    convert(tmp_path / "coco", tmp_path / "csv", "csv")
    program = script("check_data")
    for again in (False, True):
        assert program["main"](program["get_args_parser"]().parse_args([str(tmp_path / "csv"), "--quick"])) == 0
        text = " ".join(capsys.readouterr().out.split())                   # in lines of a width
        assert text.count("train.csv: columns understood as") == 1 and "how the files were read" in text
        assert ("from before" in text) == again
    _, text = run(DEFORMABLE + STEP + f"--data {tmp_path}/csv --output_dir {tmp_path}/out")
    assert text.count("train.csv: columns understood as") == 1 and "how the files were read" not in text


def test_checks_of_a_folder_in_cocos_layout(tmp_path):
    """--coco_path means the layout; what is missing of it is said."""
    program, data = script("check_data"), make(tmp_path / "data", TABLES["1-based"])

    def checked(*words: Any) -> int:
        return program["main"](program["get_args_parser"]().parse_args([*map(str, words), "--quick"]))

    assert checked("--coco_path", data) == 0
    (data / "data.yaml").write_text("names: [a]\ntrain: train2017\nval: val2017\n")
    assert checked("--coco_path", data) == 0
    (data / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(FileNotFoundError, match="annotations .*instances_val2017.json are not there. COCO's layout is"):
        checked("--coco_path", data)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        checked("--coco_path", tmp_path / "none")


# -- --finetune -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("coco") / "data", COCO_CATEGORIES)


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of COCO's 91 slots, of one step."""
    files = {}
    for name, flags in (("detr", DETR), ("deformable", DEFORMABLE)):
        folder = tmp_path_factory.mktemp("coco") / name
        run(flags + STEP + f"--coco_path {coco} --output_dir {folder}")
        files[name] = folder / "checkpoint.pth"
        assert checkpoint.load(files[name])["num_classes"] == 91
    return files


NEW = {
    "bccd": {0: "Platelets", 1: "RBC", 2: "WBC"},
    "one": {5: "only"},
    "subset": {1: "zebra", 2: "something new", 3: "Traffic_Light", 4: "person"},
    "80": {id: f"thing {id}" for id in range(1, 81)},
    "365": {id: f"thing {id}" for id in range(1, 366)},
    "coco": COCO_CATEGORIES,
}
STILL = "--lr 0 --lr_backbone 0 --weight_decay 0 "                      # one step leaves all weights as they began


def class_heads(state: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in state if "class_embed" in name]


@MODELS
@pytest.mark.parametrize("table", NEW)
@pytest.mark.usefixtures("no_pictures")
def test_fine_tuning_to_other_classes(model, table, trained, tmp_path):
    """One command. Classes of the same name keep their rows, all else is loaded, nothing of the old data is left."""
    data, out = make(tmp_path / "data", NEW[table]), tmp_path / "out" / "checkpoint.pth"
    results, text = run(STEP + STILL + f"--finetune {trained[model]} --data {data} --output_dir {out.parent}")
    assert f"weights: {trained[model]}, fine-tuned" in text and "\ntensors: " in text
    assert len(results["coco_eval_bbox"]) == 12
    before, after = checkpoint.load(trained[model]), checkpoint.load(out)
    old, new = before["model"], after["model"]
    slots = 91 if table == "coco" else len(NEW[table])
    assert after["num_classes"] == slots
    assert {row["id"]: row["name"] for row in after["categories"]} == NEW[table]
    assert old.keys() == new.keys()
    label = {row["name"]: row["label"] for row in before["categories"]}
    kept = {row["label"]: label[name] for row in after["categories"]
            if (name := row["name"].lower().replace("_", " ")) in label}
    if table == "subset":                       # as published: zebra 24, traffic light 10, person 1
        assert kept == {0: 24, 2: 10, 3: 1}
        assert "class 'Traffic_Light' (id 3) takes the weights of 'traffic light'" in text
    assert f"classes: {len(kept)} of {len(NEW[table])} keep their weights" in text
    numbers = {name: int(found[1]) for name in new if (found := re.search(r"class_embed\.(\d+)", name))}
    for name, value in new.items():
        if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked"):
            continue                            # which move in each step
        if name not in class_heads(new):
            assert torch.equal(value, old[name]), name
            continue
        extra = 1 if model == "detr" else 0
        assert len(value) == slots + extra and len(old[name]) == 91 + extra
        rows = kept | ({slots: 91} if extra else {})
        if numbers and numbers[name] == max(numbers.values()):              # scores proposals: row 0 stays "any object"
            rows |= {0: 0}
        for to, of in rows.items():
            assert torch.equal(value[to], old[name][of]), (name, to)
        if table == "coco":
            assert torch.equal(value, old[name])
    config, was = after["config"], before["config"]
    assert config["model"] == was["model"] | {"lr_backbone": 0.0} and config["name"] == was["name"]
    assert after["preprocessing"] == before["preprocessing"]
    assert config["data"] == was["data"] | {"data": str(data), "coco_path": None}

    again, text = run(FEW + f"--eval --batch_size 4 --resume {out}")
    assert again["coco_eval_bbox"] == results["coco_eval_bbox"] and again["loss"] == pytest.approx(results["loss"])
    assert "changed since" not in text


@MODELS
@pytest.mark.usefixtures("no_pictures")
def test_a_fine_tuning_goes_on(model, trained, tmp_path):
    """With --resume alone, in its own folder, by its own recipe."""
    data, out = make(tmp_path / "data", NEW["bccd"]), tmp_path / "out"
    run(STEP.replace("--epochs 1", "--epochs 2") + f"--finetune {trained[model]} --data {data} --output_dir {out} "
        "--freeze backbone")
    was = checkpoint.load(out / "checkpoint.pth")["config"]
    begun, recipe = fine_tuning(PRESETS[was["name"]].model, PRESETS[was["name"]].train)
    assert was["model"]["lr_backbone"] == begun.lr_backbone             # and not that of the other training
    assert was["train"] == dataclasses.asdict(recipe) | {"epochs": 2, "batch_size": 4, "amp": "off", "freeze": "backbone"}
    _, text = run(FEW + f"--resume {out}/checkpoint.pth --epochs 3")
    assert "resumed from" in text and "fine-tuned" not in text and "changed since" in text
    assert [line for line in text.splitlines() if line.startswith("changed since")] == \
        [f"changed since {out}/checkpoint.pth: --epochs 3 (was 2)"]
    assert [row["epoch"] for row in log(out)] == [0, 1, 2]
    now = checkpoint.load(out / "checkpoint.pth")["config"]
    assert now == was | {"train": was["train"] | {"epochs": 3}}


@pytest.mark.parametrize("queries", [5, 8, 13])
@pytest.mark.usefixtures("no_pictures")
def test_other_numbers_of_queries(queries, trained, tmp_path):
    data = make(tmp_path / "data", NEW["bccd"])
    _, text = run(STEP + STILL + f"--finetune {trained['detr']} --data {data} --output_dir {tmp_path}/out "
                  f"--num_queries {queries} --mosaic 1")
    old, new = (checkpoint.load(file)["model"]["query_embed.weight"]
                for file in (trained["detr"], tmp_path / "out" / "checkpoint.pth"))
    assert len(new) == queries and ("usage of" in text and "measured on 4 training images" in text) == (queries < 8)
    if queries >= 8:
        assert torch.equal(new[:8], old) and not any(torch.equal(row, other) for row in new[8:] for other in old)
    else:                                                                   # those kept are old ones, in their order
        places = [next(i for i, row in enumerate(old) if torch.equal(row, one)) for one in new]
        assert places == sorted(set(places))


def test_queries_are_chosen_on_plain_images(trained, tmp_path, monkeypatch):
    """What the training does to images must not choose the queries."""
    data, chosen = make(tmp_path / "data", NEW["bccd"]), []
    usage = main.query_usage

    def watched(model, batches, num_classes):
        chosen.append(usage(model, batches, num_classes))
        return chosen[-1]

    monkeypatch.setattr(main, "query_usage", watched)
    monkeypatch.setattr(main, "fit", lambda *_: {})
    for flags in ("--aug none", "--mosaic 1 --color_jitter 0.8"):
        run(STEP + f"--finetune {trained['detr']} --data {data} --num_queries 3 --output_dir {tmp_path}/out " + flags)
    assert torch.equal(*chosen)


def test_weights_alone(trained, tmp_path):
    """Published layout: nothing but weights; COCO's classes are known by their number."""
    file = tmp_path / "weights.pth"
    torch.save({"model": checkpoint.load(trained["detr"])["model"]}, file)
    data = make(tmp_path / "data", NEW["subset"])
    flags = DETR.replace("--from_scratch ", "")                             # weights come from the file
    _, text = run(flags + STEP + f"--lr 0 --finetune {file} --data {data} --output_dir {tmp_path}/out")
    assert "3 of 4 keep their weights" in text
    old, new = (checkpoint.load(f)["model"]["class_embed.weight"] for f in (file, tmp_path / "out" / "checkpoint.pth"))
    assert torch.equal(new[[0, 2, 3]], old[[24, 10, 1]]) and torch.equal(new[4], old[91])


def test_the_detector_that_a_mask_head_was_trained_on_is_not_frozen_for_ever(trained, tmp_path):
    data = make(tmp_path / "data", NEW["bccd"])
    content = checkpoint.load(trained["detr"])
    content["config"]["model"] |= {"masks": True, "frozen_weights": "box.pth"}
    checkpoint.save(tmp_path / "masks.pth", content)
    settings = settle(f"--finetune {tmp_path}/masks.pth --data {data}")
    assert settings.model.masks and settings.model.frozen_weights is None
    assert settle(f"--resume {tmp_path}/masks.pth --data {data}").model.frozen_weights == "box.pth"


def test_a_backbone_that_has_learnt_may_be_fixed(trained, tmp_path):
    """--lr_backbone 0 is refused from random weights alone."""
    data = make(tmp_path / "data", NEW["bccd"])
    assert settle(f"--finetune {trained['detr']} --data {data} --lr_backbone 0").model.from_scratch
    with pytest.raises(ValueError, match="would freeze a random backbone"):
        settle(DETR.replace("1e-3", "0") + f"--data {data}")


@pytest.mark.parametrize("flags, message", [
    ("--eval", "--finetune begins a training; to evaluate a checkpoint, --eval --resume it"),
    ("--resume {file}", "--finetune and --resume are two places.*goes on with --resume alone"),
    ("--from_scratch", "--finetune and --from_scratch are two places for weights"),
    ("--backbone_weights {file}", "--finetune and --backbone_weights are two places for weights"),
    ("--pretrained_backbone", "--finetune and --pretrained_backbone are two places for weights"),
    ("--masks --frozen_weights {file}", "--finetune and --frozen_weights are two places for weights"),
    ("--model tiny_deformable_detr", "--model tiny_deformable_detr: .* holds a detr_resnet50; leave --model out"),
    ("--hidden_dim 64", r"does not fit the model: \d+ of another shape .*leave out the flags that change it, or name"),
    ("--start_epoch 3", "--start_epoch needs --resume"),
    ("--lr_drop 3", r"--lr_drop has no effect with --lr_schedule cosine \(step has drops\)"),
    ("--freeze backbone --lr_backbone 1e-3", "--lr_backbone has no effect with --freeze backbone"),
    ("--freeze bakbone", "--freeze bakbone: this model has nothing of that name; did you mean backbone"),
    ("--freeze transformer,backbone,query_embed,class_embed,bbox_embed,input_proj", "nothing is left to train"),
    ("--freeze queris", "--freeze queris: this model has nothing of that name; did you mean queries"),
    ("--no_flip_classes rbc", "--no_flip_classes rbc: the data has no class of that name; did you mean 'RBC'"),
    ("--mosaic 1.5", "--mosaic 1.5: a probability above 0 and at most 1"),
    ("--scale_jitter 2", "--scale_jitter 2.0: the least and the greatest factor are needed"),
    ("--color_jitter 2", "--color_jitter 2.0: a strength from 0"),
    ("--repeat_threshold 7", "--repeat_threshold 7.0: the part of the images below which a class is rare"),
    ("--aug none --mosaic 1", "--mosaic has no effect with --aug none"),
    ("--aug none --color_jitter 0.5", "--color_jitter has no effect with --aug none"),
    ("--no_flip --no_flip_classes RBC", "--no_flip_classes has no effect with --no_flip"),
    ("--scale_jitter 0.5 2 --no_random_crop", "--random_crop has no effect with --scale_jitter"),
])
def test_what_contradicts_is_refused(flags, message, trained, tmp_path):
    data = make(tmp_path / "data", NEW["bccd"])
    with pytest.raises(ValueError, match=message):
        run(STEP + f"--finetune {trained['detr']} --data {data} --output_dir {tmp_path}/out "
            + flags.format(file=trained["detr"]))


@pytest.mark.parametrize("flag", [
    "--aug none", "--no_flip", "--no_flip_classes RBC", "--color_jitter 0.2", "--mosaic 0.5", "--scale_jitter 0.5 2",
    "--repeat_threshold 0.5", "--show_batch", "--class_weights auto", "--freeze backbone", "--ignore_regions on"])
def test_options_of_training_are_refused_in_evaluation(flag, trained):
    name = {"--no_flip": "--flip"}.get(flag, flag.split()[0])
    with pytest.raises(ValueError, match=f"{name} has no effect with --eval"):
        settle(f"--eval --resume {trained['detr']} {flag}")


def test_a_file_as_published(tmp_path):
    """detr_resnet50's names and shapes, weights alone, under its name: recognised, fitted to three classes, trained."""
    model, _, _ = build_model("detr_resnet50")
    file = tmp_path / "detr-r50-e632da11.pth"
    torch.save({"model": model.state_dict()}, file)
    data = make(tmp_path / "data", {1: "zebra", 2: "RBC", 3: "person"}, train=2, val=1)
    _, text = run(FEW + f"--finetune {file} --data {data} --epochs 1 --batch_size 2 {SIZE} --lr 0 --num_queries 60 "
                  f"--output_dir {tmp_path}/out")
    assert "model: detr_resnet50;" in text and "2 of 3 keep their weights" in text and "the most used" in text
    new = checkpoint.load(tmp_path / "out" / "checkpoint.pth")
    assert torch.equal(new["model"]["class_embed.weight"][[0, 2, 3]], model.class_embed.weight[[24, 1, 91]])
    recipe = dataclasses.asdict(fine_tuning(PRESETS["detr_resnet50"].model, PRESETS["detr_resnet50"].train)[1])
    assert new["config"]["train"] == recipe | {"epochs": 1, "lr": 0.0}


# -- the training's options of data ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def crowded(tmp_path_factory) -> Path:
    """Crowds, and a class that is rare."""
    return make(tmp_path_factory.mktemp("crowded") / "data", {1: "left", 4: "right"}, train=8, crowd=True, rare=True)


def losses(line: str, folder: Path) -> tuple[list[float], str]:
    _, text = run(line + f"--output_dir {folder}")
    return [row["train_loss"] for row in log(folder)], text


@pytest.fixture(scope="module")
def plain(crowded, trained, tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("plain")
    return losses(STEP + f"--finetune {trained['deformable']} --data {crowded} --ignore_regions off ", folder)[0]


@pytest.mark.parametrize("flags, said", [
    ("--ignore_regions on", "8 regions to be ignored"),
    ("--aug none", "augmentation: "),
    ("--no_flip", "augmentation: "),
    ("--no_flip_classes left", "never with left"),
    ("--color_jitter 0.9", "augmentation: "),
    ("--scale_jitter 0.3 2", "augmentation: "),
    ("--mosaic 1", "augmentation: mosaic of an image and three others, for 100% of the images"),
    ("--repeat_threshold 0.5", "repeated images: 1 of 8 have a rare class; an epoch has"),
    ("--class_weights auto", "class weights: left 0."),
    ("--freeze backbone,class_heads", "frozen: backbone,class_heads: "),
])
@pytest.mark.usefixtures("no_pictures")
def test_each_option_changes_the_training(flags, said, plain, crowded, trained, tmp_path):
    flags += "" if "ignore_regions" in flags else " --ignore_regions off"
    found, text = losses(STEP + f"--finetune {trained['deformable']} --data {crowded} {flags} ", tmp_path / "out")
    assert said in text
    assert found != plain and np.isfinite(found).all()


def test_training_is_repeated_bit_by_bit(plain, crowded, trained, tmp_path):
    """So that the test above can see differences."""
    line = STEP + f"--finetune {trained['deformable']} --data {crowded} --ignore_regions off "
    assert losses(line, tmp_path / "out")[0] == plain


@pytest.mark.parametrize("flags", ["", "--mosaic 0.5 "])
@pytest.mark.usefixtures("no_pictures")
def test_normalising_in_the_batch_changes_no_bit(flags, crowded, trained, tmp_path, monkeypatch):
    """The training reads images of 8 bits, and learns what it learns from those that are normalised one by one."""
    line = STEP + f"--finetune {trained['deformable']} --data {crowded} {flags}"
    image, _ = seen_by_training(f"{line}--output_dir {tmp_path}/seen", monkeypatch)[0]
    assert isinstance(image, Unscaled) and image.planes.dtype == torch.uint8
    found = losses(line, tmp_path / "in_batch")[0]
    made = main.make_transforms
    monkeypatch.setattr(main, "make_transforms", lambda *args, **kwargs: made(*args, **{**kwargs, "in_batch": False}))
    assert losses(line, tmp_path / "alone")[0] == found


@pytest.mark.usefixtures("no_pictures")
def test_ignore_regions_need_regions(trained, tmp_path):
    data = make(tmp_path / "data", {1: "left", 4: "right"})
    line = STEP + f"--finetune {trained['deformable']} --data {data} --ignore_regions "
    on, off = (losses(f"{line} {way} ", tmp_path / way)[0] for way in ("on", "off"))
    assert on == off


def seen_by_training(line: str, monkeypatch) -> Any:
    """The training data, as ``main`` hands it to ``fit``."""
    caught = []
    with monkeypatch.context() as patch:
        patch.setattr(main, "fit", lambda settings, training, *_: caught.append(training) or {})
        run(line)
    return caught[0]


@pytest.mark.usefixtures("no_pictures")
def test_no_augmentation_is_what_evaluation_gets(crowded, trained, tmp_path, monkeypatch):
    """Also where the checkpoint remembers stronger ones."""
    line = STEP + f"--finetune {trained['detr']} --data {crowded} --output_dir {tmp_path}"
    run(f"{line}/one --mosaic 1 --color_jitter 0.5 --scale_jitter 0.5 1.5")
    for flags in (f"{line}/two --aug none", FEW + f"--resume {tmp_path}/one/checkpoint.pth --epochs 2 --aug none"):
        training = seen_by_training(flags, monkeypatch)
        image, target = training[3]
        wanted = main.make_transforms("val", main.Preprocessing(64, 100))(training.image(3), training.target(3))
        fed, _ = main.collate([(image, target)])
        assert torch.equal(fed.tensors[0], wanted[0]) and same(target, wanted[1])


def test_classes_that_are_not_mirrored(crowded, trained, monkeypatch, tmp_path):
    training = seen_by_training(STEP + f"--finetune {trained['detr']} --data {crowded} --no_flip_classes right "
                                f"--no_multi_scale --no_random_crop --output_dir {tmp_path}/out", monkeypatch)
    plain = seen_by_training(STEP + f"--finetune {trained['detr']} --data {crowded} --aug none "
                             f"--output_dir {tmp_path}/out", monkeypatch)
    mirrored = []
    for i in range(8):
        once = plain[i][1]["boxes"]
        mirrored.append(any(not torch.allclose(training[i][1]["boxes"], once) for _ in range(12)))
    assert mirrored == [False] + [True] * 7                                 # "right" is on the first image alone


@pytest.mark.usefixtures("no_pictures")
def test_show_batch(crowded, trained, tmp_path):
    _, text = run(STEP + f"--finetune {trained['detr']} --data {crowded} --show_batch --mosaic 0.5 "
                  f"--output_dir {tmp_path}/out")
    assert f"picture of the training images: {tmp_path}/out/batch.png" in text
    with Image.open(tmp_path / "out" / "batch.png") as picture:
        assert min(picture.size) > 400 and len(set(picture.convert("L").tobytes())) > 50


@MODELS
@pytest.mark.usefixtures("no_pictures")
def test_frozen_parts_stay_bit_by_bit(model, crowded, trained, tmp_path):
    """Buffers and moving average included, and after --resume."""
    parts, out = {"detr": ("backbone", "encoder"), "deformable": ("backbone", "class_heads")}[model], tmp_path / "out"
    prefixes = {"backbone": "backbone.", "encoder": "transformer.encoder.", "class_heads": "class_embed."}
    old = checkpoint.load(trained[model])["model"]
    run(STEP.replace("--epochs 1", "--epochs 2") + f"--finetune {trained[model]} --data {crowded} --ema_decay 0.9 "
        f"--weight_decay 0.1 --output_dir {out} --freeze {','.join(parts)}")
    heads = None
    for epochs in (2, 3):
        content = checkpoint.load(out / "checkpoint.pth")
        assert content["epoch"] == epochs - 1
        heads = heads or {name: content["model"][name] for name in class_heads(content["model"])}
        for state in (content["model"], content["training_model"]):
            moved = [name for name, value in state.items() if name not in heads and not torch.equal(value, old[name])]
            frozen = [name for name in state if any(name.startswith(prefixes[part]) for part in parts)]
            assert len(frozen) > 10 and not set(moved) & set(frozen) and moved
            if "class_heads" in parts:
                assert all(torch.equal(state[name], value) for name, value in heads.items())
        if epochs == 2:
            _, text = run(FEW + f"--resume {out}/checkpoint.pth --epochs 3")
            assert f"frozen: {','.join(parts)}: " in text
    with pytest.raises(ValueError, match="its optimizer does not fit.*resume with the same .*--freeze as before"):
        run(FEW + f"--resume {out}/checkpoint.pth --epochs 4 --freeze transformer")


@pytest.mark.usefixtures("no_pictures")
def test_all_options_are_remembered(crowded, trained, tmp_path):
    """Tuples as tuples; nothing has changed where nothing was typed."""
    out = tmp_path / "out"
    run(STEP.replace("--epochs 1", "--epochs 2") + f"--finetune {trained['deformable']} --data {crowded} "
        f"--output_dir {out} --ignore_regions on --no_flip_classes left right --color_jitter 0.2 --scale_jitter 0.5 1.5 "
        "--mosaic 0.5 --repeat_threshold 0.5 --class_weights auto --freeze backbone,class_heads --ema_decay 0.5 "
        "--bucket_train --remove_difficult --cache_mode")
    was = checkpoint.load(out / "checkpoint.pth")["config"]
    assert was["data"]["scale_jitter"] == (0.5, 1.5) and was["data"]["no_flip_classes"] == ("left", "right")
    _, text = run(FEW + f"--resume {out}/checkpoint.pth --epochs 3")
    assert [line for line in text.splitlines() if "changed since" in line or "unknown" in line] == \
        [f"changed since {out}/checkpoint.pth: --epochs 3 (was 2)"]
    assert checkpoint.load(out / "checkpoint.pth")["config"] == was | {"train": was["train"] | {"epochs": 3}}
    again = settle(f"--resume {out}/checkpoint.pth --scale_jitter 0.5 1.5 --no_flip_classes left right --mosaic 0.5")
    assert again.as_dict() == was | {"train": was["train"] | {"epochs": 3}}


@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_training_ends_as_the_unbroken_one(crowded, trained, tmp_path, monkeypatch):
    """Repeated images, mosaics, jitter, weights of classes: all follows from seed and epoch."""
    line = (STEP.replace("--epochs 1", "--epochs 3") + f"--finetune {trained['detr']} --data {crowded} --mosaic 0.5 "
            "--color_jitter 0.4 --repeat_threshold 0.5 --class_weights auto --ema_decay 0.9 --freeze encoder ")
    run(line + f"--output_dir {tmp_path}/whole")
    write = training.Log.write

    def stop(self, row):
        write(self, row)
        if row["epoch"] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Log, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        run(line + f"--output_dir {tmp_path}/broken")
    monkeypatch.undo()
    run(FEW + f"--resume {tmp_path}/broken/checkpoint.pth")
    assert [{k: v for k, v in row.items() if k.startswith("train")} for row in log(tmp_path / "whole")] == \
        [{k: v for k, v in row.items() if k.startswith("train")} for row in log(tmp_path / "broken")]
    assert same(*(checkpoint.load(tmp_path / name / "checkpoint.pth")["model"] for name in ("whole", "broken")))


# -- real data --------------------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("no_pictures")
def test_bccd_in_two_formats(real_data, tmp_path):
    """Microscope images, their XML files and the json: the same losses and the same twelve numbers."""
    source = real_data / "bccd"
    if not (source / "voc").is_dir():
        pytest.skip(f"no BCCD: {source}/voc is not there")
    voc, coco = tmp_path / "voc", tmp_path / "coco"
    (voc / "JPEGImages").mkdir(parents=True)
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    (coco / "annotations").mkdir(parents=True)
    (voc / "Annotations").symlink_to(next(folder for folder in (source / "voc" / "Annotations", source / "voc")
                                          if next(folder.glob("*.xml"), None)))
    for split, count in (("train", 8), ("val", 4)):
        content = json.loads((source / "annotations" / f"instances_{split}2017.json").read_text())
        images = sorted(content["images"], key=lambda image: image["file_name"])[:count]
        ids = {image["id"] for image in images}
        content |= {"images": images, "annotations": [row for row in content["annotations"] if row["image_id"] in ids]}
        (coco / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        (coco / f"{split}2017").symlink_to(source / f"{split}2017")
        for image in images:
            (voc / "JPEGImages" / image["file_name"]).symlink_to(source / f"{split}2017" / image["file_name"])
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text(
            "".join(f"{Path(image['file_name']).stem}\n" for image in images))
    told = [losses_and_scores(DEFORMABLE.replace("--image_size 64 --max_size 100", "--image_size 128") + STEP
                              + f"--data {data} --lr 1e-3 ", tmp_path / f"out-{data.name}") for data in (voc, coco)]
    assert told[0] == told[1] and len(told[0][1]) == 12 and np.isfinite(told[0][0]).all()


def losses_and_scores(line: str, folder: Path) -> tuple[list[float], list[float]]:
    results, _ = run(line + f"--output_dir {folder}")
    return [row["train_loss"] for row in log(folder)], results["coco_eval_bbox"]


# -- two processes ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_fine_tuning_on_two_processes(trained, tmp_path, convert):
    data = make(tmp_path / "coco", NEW["subset"], train=8)
    convert(data, tmp_path / "yolo", "yolo")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "main.py"),
         *STEP.replace("--batch_size 4", "--batch_size 2").split(), "--finetune", str(trained["detr"]), "--data",
         str(tmp_path / "yolo"), "--num_queries", "5", "--freeze", "encoder", "--class_weights", "auto",
         "--repeat_threshold", "0.9", "--output_dir", str(tmp_path / "out"), "--show_batch"],
        env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("data check: YOLO", "weights: ", "tensors: ", "frozen: encoder", "class weights: ", "repeated images: ",
                  "picture of the training images", "usage of "):
        assert done.stdout.count(words) == 1 or words == "weights: ", words
    content = checkpoint.load(tmp_path / "out" / "checkpoint.pth")
    assert {row["id"]: row["name"] for row in content["categories"]} == dict(enumerate(NEW["subset"].values()))
    old = checkpoint.load(trained["detr"])["model"]
    assert all(torch.equal(value, old[name]) for name, value in content["model"].items()
               if name.startswith("transformer.encoder."))
