"""``scripts/predict.py`` with a small random model: what it writes, under which names, and what it refuses."""
import csv
import dataclasses
import importlib.util
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import weakref
import zipfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageFile
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from test_loading import SIGMOID, exported

from datasets.annotations import COCO_CATEGORIES
from datasets.coco_panoptic import COCO_PANOPTIC, PanopticAnnotations
from datasets.images import read_image
from datasets.transforms import Preprocessing, eval_transforms
from detr import checkpoint, sources, writers
from detr.architectures.detr import DETRConfig
from detr.presets import PRESETS, Preset
from detr.sources import Clip, Item, Video, is_text, pictures, read_picture
from detr.structures import Category
from detr.writers import VideoFile, Yolo

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "predict.py"
SMALL = DETRConfig(backbone="resnet18", backbone_norm="group", from_scratch=True, enc_layers=1, dec_layers=1,
                   hidden_dim=32, nheads=2, dim_feedforward=32, num_queries=5)
TABLE = [{"label": 0, "id": 3, "name": "red"}, {"label": 1, "id": 7, "name": "blue"},
         {"label": 2, "id": 40, "name": "5 µm"}]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("predict", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["predict"] = module                                             # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint as main.py writes it, with preset, changed options, class table and preprocessing."""
    torch.manual_seed(0)
    model = SMALL.build(3)[0]
    config = {"name": "detr_resnet50", "model": dataclasses.asdict(SMALL), "train": {}, "data": {}}
    path = tmp_path_factory.mktemp("trained") / "checkpoint.pth"
    checkpoint.save(path, {"model": model.state_dict(), "config": config, "categories": TABLE, "num_classes": 3,
                           "preprocessing": Preprocessing(64, 100).as_dict()})
    return path


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """Pictures of several sizes in folders, two of the same name; the working directory is beside them."""
    monkeypatch.chdir(tmp_path)
    random = np.random.RandomState(0)
    for name, width, height in (("photos/a.jpg", 90, 70), ("photos/b.png", 61, 130), ("photos/more/a.jpg", 50, 40)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 255, (height, width, 3)).astype(np.uint8)).save(name)
    Path("photos/notes.txt").write_text("no picture")
    return tmp_path / "photos"


def call(script, *words) -> int:
    return script.main(script.get_args_parser().parse_args([str(word) for word in words]))


def predictions(folder="out") -> dict:
    return json.loads(Path(folder, "predictions.json").read_text())


# What it writes.

def test_folder_glob_and_file(script, trained, photos, capsys):
    shutil.copy("photos/a.jpg", "single.JPG")
    sources = ["photos", "photos/**/*.jpg", "single.JPG", "photos/../photos/b.png"]
    assert call(script, *sources, "--resume", trained, "--threshold", "0", "--output_dir", "out") == 0
    found = predictions()
    assert found["info"] == {"model": "detr_resnet50", "checkpoint": str(trained), "threshold": 0.0,
                             "preprocessing": json.loads(json.dumps(Preprocessing(64, 100).as_dict()))}
    assert [(image["id"], Path(image["file_name"]).resolve().relative_to(photos.parent).as_posix(), image["width"],
             image["height"], image["picture"]) for image in found["images"]] == [
        (1, "photos/a.jpg", 90, 70, "a.jpg"), (2, "photos/b.png", 61, 130, "b.png"),
        (3, "photos/more/a.jpg", 50, 40, "a-2.jpg"), (4, "single.JPG", 90, 70, "single.jpg")]
    for image in found["images"]:
        assert Image.open(Path("out", image["picture"])).size == (image["width"], image["height"])
    assert sorted(path.name for path in Path("out").iterdir()) \
        == ["a-2.jpg", "a.jpg", "b.png", "predictions.json", "single.jpg"]
    shown = capsys.readouterr().out
    assert "model: detr_resnet50; images: 4; threshold: 0.0; device: " in shown and "images 4/4" in shown
    assert "20 detections with a score of at least 0.0 on 4 images" in shown


def test_detections_are_the_evaluations(script, trained, photos):
    """The same numbers as model and post-processing give when called one after the other, under the data's ids."""
    call(script, "photos/*", "--resume", trained, "--threshold", "0", "--output_dir", "out")
    found = predictions()
    assert found["categories"] == [{"id": row["id"], "name": row["name"]} for row in TABLE]
    model, _, postprocessors = SMALL.build(3)
    model.load_state_dict(torch.load(trained, weights_only=True)["model"])
    for image in found["images"]:
        picture = read_image(image["file_name"])
        with torch.no_grad():
            outputs = model.eval()([eval_transforms(Preprocessing(64, 100))(picture, {})[0]])
        direct = postprocessors["bbox"](outputs, torch.tensor([[picture.height, picture.width]]))[0]
        rows = [row for row in found["annotations"] if row["image_id"] == image["id"]]
        left, top, right, bottom = direct["boxes"].unbind(1)
        assert len(rows) == 5
        assert torch.allclose(torch.tensor([row["bbox"] for row in rows]),
                              torch.stack([left, top, right - left, bottom - top], dim=1), atol=1e-4)
        assert torch.allclose(torch.tensor([row["score"] for row in rows]), direct["scores"], atol=1e-6)
        assert [row["category_id"] for row in rows] == [TABLE[label]["id"] for label in direct["labels"].tolist()]
        assert [row["category_name"] for row in rows] == [TABLE[label]["name"] for label in direct["labels"].tolist()]


def test_the_json_is_cocos(script, trained, photos, capsys):
    call(script, "photos", "--resume", trained, "--threshold", "0", "--output_dir", "out")
    truth = COCO("out/predictions.json")
    assert len(truth.getAnnIds()) == 10 and len(truth.loadRes(predictions()["annotations"]).getAnnIds()) == 10


def test_the_threshold_is_for_pictures_and_json(script, trained, photos):
    call(script, "photos", "--resume", trained, "--threshold", "0", "--output_dir", "all")
    scores = sorted(row["score"] for row in predictions("all")["annotations"])
    call(script, "photos", "--resume", trained, "--threshold", scores[6], "--output_dir", "some")
    call(script, "photos", "--resume", trained, "--threshold", "1", "--output_dir", "none")
    assert sorted(row["score"] for row in predictions("some")["annotations"]) == scores[6:]
    assert predictions("none")["annotations"] == [] and predictions("none")["info"]["threshold"] == 1
    untouched = np.asarray(Image.open("photos/b.png"))
    assert (np.asarray(Image.open("none/b.png")) == untouched).all()
    assert (np.asarray(Image.open("all/b.png")) != untouched).any()


def test_pictures_are_upright(script, trained, photos):
    exif = Image.Exif()
    exif[0x0112] = 6                                                            # to be turned by a quarter
    image = Image.new("RGB", (80, 40))
    image.putpixel((0, 0), (255, 255, 255))
    image.save("turned.png", exif=exif)
    call(script, "turned.png", "--resume", trained, "--threshold", "1", "--output_dir", "out")
    assert (predictions()["images"][0]["width"], predictions()["images"][0]["height"]) == (40, 80)
    picture = Image.open("out/turned.png")
    assert picture.size == (40, 80) and picture.getpixel((39, 0)) == (255, 255, 255)
    assert picture.getexif().get(0x0112, 1) == 1


def test_batches(script, trained, photos):
    """A batch of images of one size gives what each gives alone; a last batch may be smaller."""
    for name in "cd":
        Image.open("photos/a.jpg").rotate(180).save(f"photos/more/{name}.png")
    Path("photos/more/a.jpg").write_bytes(Path("photos/a.jpg").read_bytes())
    for size in (1, 2):
        assert call(script, "photos/more", "--resume", trained, "--threshold", "0", "--batch_size", size,
                    "--output_dir", f"by {size}") == 0
    one, two = ([row["bbox"] for row in predictions(folder)["annotations"]] for folder in ("by 1", "by 2"))
    assert len(one) == 15 and torch.allclose(torch.tensor(one), torch.tensor(two), atol=1e-3)


def test_names_that_are_taken(script):
    paths, given = ("x/a.jpg", "y/A.JPG", "y/a.png", "z/a.bmp", "z/a-2.jpg", "z/a.jpeg"), script.Names()
    names = [given.of(Item(path, None)) for path in paths]
    assert names == ["a.jpg", "A-2.jpg", "a.png", "a-2.png", "a-2-2.jpg", "a-3.jpg"]
    assert len({name.lower() for name in names}) == len(paths)


# Masks.

MASKS = dataclasses.replace(SMALL, masks=True, hidden_dim=128, nheads=8)
PANOPTIC_TABLE = [{**TABLE[0], "isthing": True}, {**TABLE[1], "isthing": False}, {**TABLE[2], "isthing": True}]


@pytest.fixture(scope="module")
def trained_masks(tmp_path_factory):
    """A checkpoint of a mask model with random weights, whose queries are of different classes and masks, and none of no
    object: (kind of data, class table) -> path."""
    def make(dataset_file: str, table: list[dict] = PANOPTIC_TABLE, **options) -> Path:
        torch.manual_seed(1)
        settings = dataclasses.replace(MASKS, **options)
        model = settings.build(3)[0]
        with torch.no_grad():
            classes = model.detr.class_embed
            model.detr.query_embed.weight *= 30                                 # each looks elsewhere
            model.bbox_attention.q_linear.weight *= 30
            model.mask_head.lay1.weight[:, MASKS.hidden_dim:] *= 1000           # and its mask shows it
            classes.weight *= 20
            classes.bias[:3] -= model.eval()([4.4 * torch.rand(3, 100, 64) - 2])["pred_logits"][0, :, :3].mean(0)
            classes.bias[3] = -1000
        path = tmp_path_factory.mktemp("masks") / "checkpoint.pth"
        checkpoint.save(path, {"model": model.state_dict(), "categories": table, "num_classes": 3,
                               "config": {"name": "detr_resnet50", "model": dataclasses.asdict(settings), "train": {},
                                          "data": {"dataset_file": dataset_file}},
                               "preprocessing": Preprocessing(64, 100).as_dict()})
        return path
    return make


def outputs_of(path: Path, image: dict, settings: DETRConfig = MASKS):
    """Outputs of the model in a checkpoint, the image's size and the size fed, and the post-processing."""
    model, _, postprocessors = settings.build(3)
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    tensor, _ = eval_transforms(Preprocessing(64, 100))(read_image(image["file_name"]), {})
    with torch.no_grad():
        outputs = model.eval()([tensor])
    return outputs, torch.tensor([[image["height"], image["width"]]]), torch.tensor([tensor.shape[-2:]]), postprocessors


@pytest.mark.parametrize("precision, said", [("fp16", 1), ("bf16", 0), ("float32", 0)])
def test_a_precision_that_processors_are_slow_in(script, trained, photos, capsys, precision, said):
    call(script, "photos/*", "--resume", trained, "--fast", precision, "--device", "cpu", "--output_dir", "out")
    text = capsys.readouterr().out
    assert text.count("--fast fp16: processors compute slowly in it; --fast bf16 is what they may be fast in") == said
    assert f"prepared in {precision}" in text


def test_graphs_are_for_gpus(script, trained, photos):
    with pytest.raises(ValueError, match="--cuda_graphs needs a GPU of NVIDIA, and the device is cpu: leave it out"):
        call(script, "photos/*", "--resume", trained, "--cuda_graphs", "--device", "cpu", "--output_dir", "out")


def test_masks_are_the_evaluations(script, trained_masks, photos):
    trained = trained_masks("coco")
    call(script, "photos/*", "--resume", trained, "--threshold", "0", "--output_dir", "out")
    found = predictions()
    covered = 0
    for image in found["images"]:
        outputs, size, fed, postprocessors = outputs_of(trained, image)
        direct = postprocessors["segm"](postprocessors["bbox"](outputs, size), outputs, size, fed)[0]
        rows = [row for row in found["annotations"] if row["image_id"] == image["id"]]
        assert len(rows) == 5
        for row, mask in zip(rows, direct["masks"]):
            assert isinstance(row["segmentation"]["counts"], str)
            assert row["segmentation"]["size"] == [image["height"], image["width"]]
            assert np.array_equal(coco_mask.decode(row["segmentation"]), mask[0].numpy())
            assert row["area"] == mask.sum() and isinstance(row["area"], int)
            covered += row["area"]
    assert len({row["segmentation"]["counts"] for row in found["annotations"]}) > 5
    assert 0 < covered < sum(5 * image["height"] * image["width"] for image in found["images"])
    truth = COCO("out/predictions.json")
    assert np.array_equal(truth.annToMask(truth.anns[1]), coco_mask.decode(found["annotations"][0]["segmentation"]))
    assert len(truth.loadRes([{**row} for row in found["annotations"]]).getAnnIds()) == len(found["annotations"]) == 10


def test_masks_are_drawn(script, trained_masks, photos, monkeypatch):
    trained, shown = trained_masks("coco"), []
    draw = script.draw_detections
    monkeypatch.setattr(script, "draw_detections", lambda *words, masks, **more: (
        shown.append((words[2].tolist(), masks)), draw(*words, masks=masks, **more))[1])
    call(script, "photos", "--resume", trained, "--threshold", "0", "--output_dir", "all")
    rows = predictions("all")["annotations"]
    assert [mask for _, masks in shown for mask in masks] == [row["segmentation"] for row in rows]
    threshold = next(later["score"] for row, later in zip(rows, rows[1:])               # not the first few alone
                     if row["score"] < later["score"] and row["image_id"] == later["image_id"])
    call(script, "photos", "--resume", trained, "--threshold", threshold, "--output_dir", "some")
    some = [{**row, "id": 0} for row in predictions("some")["annotations"]]
    assert some == [{**row, "id": 0} for row in rows if row["score"] >= threshold] and len(some) < 10
    assert [len(masks) for labels, masks in shown[2:]] == [len(labels) for labels, _ in shown[2:]]


def test_masks_of_labels_that_the_data_does_not_use(script, trained_masks, photos, capsys):
    """Boxes and masks that stay belong together."""
    call(script, "photos/b.png", "--resume", trained_masks("coco"), "--threshold", "0", "--output_dir", "every")
    every = predictions("every")["annotations"]
    table = [row for row in PANOPTIC_TABLE if row["id"] != every[0]["category_id"]]
    call(script, "photos/b.png", "--resume", trained_masks("coco", table), "--threshold", "0", "--output_dir", "some")
    rows = [{**row, "id": 0} for row in every if row["category_id"] != every[0]["category_id"]]
    assert 0 < len(rows) < 5 and [{**row, "id": 0} for row in predictions("some")["annotations"]] == rows
    assert f"left out: {5 - len(rows)} detections of labels that the data does not use" in capsys.readouterr().out


def test_masks_that_are_no_numbers(script, trained_masks, photos):
    for data in ("coco", "coco_panoptic"):
        detector = script.load_detector(str(trained_masks(data)))
        with torch.no_grad():
            detector.model.mask_head.out_lay.bias.fill_(float("nan"))
        Path(data).mkdir()
        with pytest.raises(ValueError, match="photos/a.jpg: the model's scores or boxes or masks are not finite"):
            script.predict(detector, script.find(["photos/a.jpg"]), Path(data), script.Choice())


# Panoptic maps.

def panoptic(folder="out") -> dict:
    return json.loads(Path(folder, "panoptic.json").read_text())


def test_maps_are_the_evaluations(script, trained_masks, photos, capsys):
    """The json is read as panoptic data, checks included, and has what the post-processing gives."""
    shutil.copy("photos/b.png", "photos/a.png")
    trained = trained_masks("coco_panoptic")
    assert call(script, "photos", "--resume", trained, "--threshold", "0", "--output_dir", "out") == 0
    found = panoptic()
    assert sorted(path.relative_to("out").as_posix() for path in Path("out").rglob("*.*")) == [
        "a.jpg", "a.png", "b.png", "panoptic.json", "panoptic/a-2.png", "panoptic/a.png", "panoptic/b.png"]
    assert [(row["file_name"], row["picture"]) for row in found["images"]] \
        == [("photos/a.jpg", "a.jpg"), ("photos/a.png", "a.png"), ("photos/b.png", "b.png")]
    assert found["categories"] == [{"id": row["id"], "name": row["name"], "isthing": int(row["isthing"])}
                                   for row in PANOPTIC_TABLE]
    data = PanopticAnnotations("out/panoptic", "out/panoptic.json")
    kinds = set()
    for i, (image, row) in enumerate(zip(found["images"], found["annotations"])):
        outputs, size, fed, _ = outputs_of(trained, image)
        things = {row["label"]: row["isthing"] for row in PANOPTIC_TABLE}
        direct = dataclasses.replace(MASKS, panoptic_threshold=0.0).panoptic(things, crop=False)(outputs, fed, size)[0]
        assert [(s["category_id"], s["isthing"], s["area"]) for s in row["segments_info"]] \
            == [(TABLE[s["category_id"]]["id"], s["isthing"], s["area"]) for s in direct["segments_info"]]
        want = np.asarray(Image.open(io.BytesIO(direct["png_string"])))[..., 0]
        assert np.array_equal(data.numbers(i), want + 1)
        for segment in row["segments_info"]:
            y, x = np.nonzero(data.numbers(i) == segment["id"])
            assert segment["area"] == len(x) and segment["iscrowd"] == 0
            assert segment["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            kinds.add(segment["category_name"])
        assert (np.asarray(Image.open(Path("out", image["picture"]))) != read_image(image["file_name"])).any()
    assert len(kinds) >= 2
    count = sum(len(row["segments_info"]) for row in found["annotations"])
    assert f"{count} segments with a score above 0.0 on 3 images" in capsys.readouterr().out


def test_maps_without_segments(script, trained_masks, photos):
    call(script, "photos", "--resume", trained_masks("coco_panoptic"), "--threshold", "1", "--output_dir", "out")
    assert [row["segments_info"] for row in panoptic()["annotations"]] == [[], []]
    assert not np.asarray(Image.open("out/panoptic/b.png")).any()
    assert np.array_equal(np.asarray(Image.open("out/b.png")), np.asarray(Image.open("photos/b.png")))


def test_the_threshold_of_maps_is_the_models(script, trained_masks, photos):
    for words, want in (((), 0.25), (("--threshold", 0.75), 0.75)):
        call(script, "photos/b.png", "--resume", trained_masks("coco_panoptic", panoptic_threshold=0.25), *words,
             "--output_dir", f"by {want}")
        assert panoptic(f"by {want}")["info"]["threshold"] == want
    call(script, "photos/b.png", "--resume", trained_masks("coco"), "--output_dir", "boxes")
    assert predictions("boxes")["info"]["threshold"] == 0.5


def test_segments_of_labels_that_the_data_does_not_use(script, trained_masks, photos, capsys):
    """They are void, and the others as they were."""
    every = trained_masks("coco_panoptic")
    call(script, "photos/b.png", "--resume", every, "--threshold", "0", "--output_dir", "every")
    rows = panoptic("every")["annotations"][0]["segments_info"]
    unused = rows[0]["category_id"]
    some = trained_masks("coco_panoptic", [row for row in PANOPTIC_TABLE if row["id"] != unused])
    call(script, "photos/b.png", "--resume", some, "--threshold", "0", "--output_dir", "some")
    kept = panoptic("some")["annotations"][0]["segments_info"]
    assert [row["id"] for row in kept] == list(range(1, len(kept) + 1))
    assert [(row["category_id"], row["area"]) for row in kept if row["isthing"]] \
        == [(row["category_id"], row["area"]) for row in rows if row["isthing"] and row["category_id"] != unused]
    data = PanopticAnnotations("some/panoptic", "some/panoptic.json")
    assert (data.numbers(0) == 0).any() and "segments of labels that the data does not use" in capsys.readouterr().out


def test_published_panoptic_weights(script, published, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "small", Preset(MASKS))
    torch.save(MASKS.build(250)[0].state_dict(), published(250))
    with pytest.raises(ValueError):
        script.load_detector(published(250), model="small")                     # no masks in it
    torch.save({"model": MASKS.build(250)[0].state_dict()}, tmp_path / "small.pth")
    detector = script.load_detector(str(tmp_path / "small.pth"), model="small")
    assert detector.categories == COCO_PANOPTIC and detector.postprocessors["panoptic"].threshold == 0.85
    is_thing = detector.postprocessors["panoptic"].is_thing
    assert [is_thing(label) for label in (1, 90, 92, 200)] == [True, True, False, False]


# Images that are not RGB.

@pytest.fixture
def trained_for(tmp_path_factory):
    """A checkpoint of a model for images with so many channels."""
    def make(channels: int, **options) -> Path:
        torch.manual_seed(0)
        settings = dataclasses.replace(SMALL, in_channels=channels, **options)
        path = tmp_path_factory.mktemp("trained") / "checkpoint.pth"
        preprocessing = Preprocessing(64, 100, (0.5,) * channels, (0.25,) * channels)
        checkpoint.save(path, {"model": settings.build(3)[0].state_dict(), "categories": TABLE, "num_classes": 3,
                               "config": {"name": "detr_resnet50", "model": dataclasses.asdict(settings)},
                               "preprocessing": preprocessing.as_dict()})
        return path
    return make


def test_arrays_of_five_channels(script, trained_for, photos, capsys):
    pixels = np.random.RandomState(0).randint(0, 256, (70, 90, 5)).astype(np.uint8)
    np.save(photos / "field.npy", pixels)
    assert call(script, "photos", "--resume", trained_for(5), "--threshold", "0", "--output_dir", "out") == 1
    shown = capsys.readouterr().out
    assert "left out: image photos/a.jpg has 3 channels, not the 5 of --in_channels" in shown
    assert "2 of 3 images could not be read: photos/a.jpg, photos/b.png" in shown
    assert shown.count("pictures show the first three of 5 channels") == 1
    image, = predictions()["images"]
    assert (image["file_name"], image["width"], image["height"], image["picture"]) == ("photos/field.npy", 90, 70,
                                                                                       "field.png")
    assert len(predictions()["annotations"]) == 5
    call(script, "photos/field.npy", "--resume", trained_for(5), "--threshold", "1", "--output_dir", "none")
    assert np.array_equal(np.asarray(Image.open("none/field.png")), pixels[..., :3])


def test_grey_images(script, trained_for, photos, capsys):
    """Colour becomes grey; arrays are not looked for where pictures do."""
    np.save(photos / "labels.npy", np.zeros((5, 5), np.uint8))
    assert call(script, "photos", "--resume", trained_for(1), "--threshold", "1", "--output_dir", "out") == 0
    assert "pictures show" not in capsys.readouterr().out
    assert [image["picture"] for image in predictions()["images"]] == ["a.jpg", "b.png"]
    want = np.asarray(Image.open("photos/b.png").convert("L"))
    assert np.array_equal(np.asarray(Image.open("out/b.png")), np.repeat(want[..., None], 3, 2))


def test_five_channels_in_folders_without_them(script, trained_for, photos):
    Path("empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty is a folder without images .* named .*\*.webp, \*.npy"):
        call(script, "empty", "--resume", trained_for(5))


@pytest.mark.parametrize("padding", ["legacy", "exact"])
def test_what_batches_change(script, trained_for, photos, capsys, padding):
    """With exact padding nothing: images of different sizes in one batch have the boxes that they have alone."""
    trained = trained_for(3, padding=padding)
    assert script.load_detector(str(trained)).exact == (padding == "exact")
    boxes = []
    for size in (1, 2):
        call(script, "photos", "--resume", trained, "--threshold", 0, "--batch_size", size, "--output_dir", f"by {size}")
        boxes.append(torch.tensor([row["bbox"] for row in predictions(f"by {size}")["annotations"]]))
        said = "images of a batch are padded to one size, which changes this model's boxes a little; --batch_size 1 does"
        assert (said in capsys.readouterr().out) == (size == 2 and padding == "legacy")
    assert torch.allclose(*boxes, atol=1e-3) == (padding == "exact")


# Images that cannot be read, and sources without images.

@pytest.mark.parametrize("size", [1, 2])
def test_broken_images_are_named_and_counted(script, trained, photos, capsys, size):
    Path("photos/aa.jpg").write_bytes(Path("photos/a.jpg").read_bytes()[:300])
    Path("photos/c.png").write_text("no image at all")
    assert call(script, "photos", "--resume", trained, "--threshold", "0", "--batch_size", size, "--output_dir",
                "out") == 1
    shown = capsys.readouterr().out
    assert "left out: image photos/aa.jpg (300 bytes) cannot be read" in shown
    assert "left out: image photos/c.png (15 bytes) is not in a format" in shown
    assert shown.splitlines()[-1] == "2 of 4 images could not be read: photos/aa.jpg, photos/c.png"
    assert [(image["id"], image["picture"]) for image in predictions()["images"]] == [(1, "a.jpg"), (3, "b.png")]
    assert len(predictions()["annotations"]) == 10
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.jpg", "b.png", "predictions.json"]


@pytest.mark.parametrize("source, message", [
    ("photos/*.tif", r"photos/\*.tif matches no images; give .* named \*.bmp, \*.gif, \*.jpeg, \*.jpg, \*.png"),
    ("empty", "empty is a folder without images directly in it"),
    ("photos/c.jpg", "photos/c.jpg is not there"),
])
def test_sources_without_images(script, trained, photos, source, message):
    Path("empty/inner").mkdir(parents=True)
    Path("empty/.hidden.jpg").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=message):
        call(script, "photos", source, "--resume", trained, "--output_dir", "out")
    assert not Path("out").exists()


# Zips, standard input.

def without_ids(rows: list[dict]) -> list[dict]:
    return [{**row, "id": 0, "image_id": 0} for row in rows]


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_zip_is_its_folder(script, trained, photos):
    """The same detections, in the order of names, and nothing anywhere but in the output folder."""
    with zipfile.ZipFile("some.zip", "w") as archive:
        archive.write("photos/more/a.jpg", "z/a.jpg")
        archive.write("photos/a.jpg", "../../a.JPG")
        archive.writestr(zipfile.ZipInfo("/b.png"), Path("photos/b.png").read_bytes(), zipfile.ZIP_DEFLATED)
        for name in ("notes.txt", ".hidden.jpg", "__MACOSX/._a.jpg", "in/"):
            archive.writestr(name, "nothing")
    before = tree(photos.parent.parent)
    call(script, "some.zip", "--resume", trained, "--threshold", "0", "--output_dir", "zipped")
    assert tree(photos.parent.parent) - before == {f"{photos.parent.name}/{path}" for path in (
        "zipped", "zipped/a.jpg", "zipped/a-2.jpg", "zipped/b.png", "zipped/predictions.json")}
    assert [image["file_name"] for image in predictions("zipped")["images"]] \
        == ["some.zip/../../a.JPG", "some.zip//b.png", "some.zip/z/a.jpg"]
    call(script, "photos", "photos/more", "--resume", trained, "--threshold", "0", "--output_dir", "plain")
    assert without_ids(predictions("zipped")["annotations"]) == without_ids(predictions("plain")["annotations"])


def test_zips_that_cannot_be_read(script, trained, photos, capsys):
    with zipfile.ZipFile("some.zip", "w") as archive:
        archive.write("photos/a.jpg")
        archive.write("photos/b.png")
    content = bytearray(Path("some.zip").read_bytes())
    content[content.index(b"photos/b.png") + 500] ^= 255                        # the checksum notices
    Path("some.zip").write_bytes(content)
    Path("none.zip").write_text("no zip")
    assert call(script, "some.zip", "none.zip", "--resume", trained, "--output_dir", "out") == 1
    shown = capsys.readouterr().out
    assert "left out: image some.zip/photos/b.png cannot be read: Bad CRC-32" in shown
    assert "left out: none.zip (6 bytes) cannot be read as a zip" in shown
    assert shown.splitlines()[-1] == "2 of 3 images could not be read: some.zip/photos/b.png, none.zip"
    assert [image["picture"] for image in predictions()["images"]] == ["a.jpg"]
    with zipfile.ZipFile("empty.zip", "w") as archive:
        archive.writestr("notes.txt", "none")
    with pytest.raises(FileNotFoundError, match="empty.zip is a zip without images, files named"):
        call(script, "empty.zip", "--resume", trained)


@pytest.mark.parametrize("packed", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_entries_of_any_packing(photos, packed):
    with zipfile.ZipFile("some.zip", "w", packed) as archive:
        archive.write("photos/b.png", "b.png")
    content = bytearray(Path("some.zip").read_bytes())
    start = content.index(b"b.png") + 40
    content[start:start + 200] = bytes(byte ^ 255 for byte in content[start:start + 200])
    Path("some.zip").write_bytes(content)
    item, = pictures(["some.zip"])
    assert item.picture is None and item.problem.startswith("image some.zip/b.png cannot be read: ")


@pytest.mark.parametrize("error", [struct.error("unpack"), OverflowError("too large"), MemoryError("none left"),
                                   TypeError("no number"), SyntaxError("broken")])
def test_whatever_damage_raises(photos, monkeypatch, error):
    def fail(*_):
        raise error
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    content = Path("photos/a.jpg").read_bytes()
    for read in (lambda: read_picture(Path("a.jpg"), content), lambda: read_picture(Path("photos/a.jpg")),
                 lambda: read_image("photos/a.jpg"), lambda: read_image("a.jpg", content)):
        with pytest.raises(OSError, match=rf"a.jpg \([0-9]+ bytes\) cannot be read: {error}"):
            read()


def test_images_of_more_pixels_than_pillow_reads(script, trained, photos, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert call(script, "photos/a.jpg", "--resume", trained, "--output_dir", "out") == 1
    remedy = "cut it or make it smaller, or look at it with scripts/predict.py --tile"
    assert remedy in capsys.readouterr().out
    for item in pictures(["photos/a.jpg"]):
        assert remedy in item.problem
    with pytest.raises(OSError, match=remedy):
        read_picture(Path("a.jpg"), Path("photos/a.jpg").read_bytes())
    assert call(script, "photos/a.jpg", "--resume", trained, "--output_dir", "tiled", "--tile", "60") == 0
    assert "--tile: images of up to 1,000,000,000 pixels are read" in capsys.readouterr().out
    assert len(predictions("tiled")["images"]) == 1 and Image.MAX_IMAGE_PIXELS == 3000
    monkeypatch.setattr(script, "MOST_PIXELS", 5000)
    assert call(script, "photos/a.jpg", "--resume", trained, "--output_dir", "none", "--tile", "60") == 1
    assert "exceeds limit of 5000 pixels" in capsys.readouterr().out


def test_what_is_passed_over_is_said(script, photos, capfd):
    Path("photos/.hidden").write_text("")
    for name in ("clip.mp4", "more.MOV", "some.zip", "list.csv"):
        Path("photos", name).write_text("")
    with zipfile.ZipFile("some.zip", "w") as archive:
        for name in ("in/a.jpg", "in/", "in/clip.mp4", "in/.hidden", "__MACOSX/in/a.txt"):
            archive.writestr(name, "")
    with zipfile.ZipFile("plain.zip", "w") as archive:
        archive.writestr("a.jpg", "")
    script.find(["photos", "photos/more", "photos/*", "some.zip", "plain.zip"])
    assert capfd.readouterr().out.splitlines() == [
        "photos: 2 videos, 1 zip, 1 folder and 2 other files passed over; name them or use a glob",
        "some.zip: 1 video passed over; unpack what is wanted of them"]


def pipe(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))


@pytest.mark.parametrize("ending", [".bmp", ".gif", ".jpg", ".png", ".tif", ".webp"])
def test_images_are_told_from_paths(photos, ending):
    Image.open("photos/b.png").save(f"b{ending}")
    assert not is_text(Path(f"b{ending}").read_bytes()[:64])
    assert is_text(f"photos/ä{ending}\n".encode()) and is_text("ä".encode()[:1]) and not is_text("ä\n".encode("latin-1"))


@pytest.mark.parametrize("mode, kind", [("1", "P4"), ("L", "P5"), ("RGB", "P6")])
def test_ppm_is_told_from_paths(script, trained, photos, monkeypatch, mode, kind):
    """Its header is text."""
    Image.open("photos/b.png").convert(mode).point(lambda _: 65).save("b.ppm")          # and so are these pixels
    content = Path("b.ppm").read_bytes()
    assert content.startswith(kind.encode()) and not is_text(content[:64])
    assert not is_text(b"P3\n# a comment\n2 2\n") and is_text(b"P6 photos/a.jpg\n") and is_text(b"P1 2.jpg\nP2.jpg")
    pipe(monkeypatch, content)
    assert call(script, "-", "--resume", trained, "--output_dir", "out") == 0
    assert (predictions()["images"][0]["width"], predictions()["images"][0]["height"]) == (61, 130)


def test_more_on_standard_input_than_is_read(script, trained, photos, monkeypatch, capsys):
    content = Path("photos/a.jpg").read_bytes()
    for most, code in ((len(content), 0), (len(content) - 1, 1)):
        monkeypatch.setattr(sources, "MOST_BYTES", most)
        pipe(monkeypatch, content)
        assert call(script, "-", "--resume", trained, "--output_dir", f"out {code}") == code
    assert f"left out: what came on standard input has more than the {most} bytes" in capsys.readouterr().out


def test_an_image_on_standard_input(script, trained, photos, monkeypatch):
    call(script, "photos/a.jpg", "--resume", trained, "--threshold", "0", "--output_dir", "file")
    pipe(monkeypatch, Path("photos/a.jpg").read_bytes())
    call(script, "-", "--resume", trained, "--threshold", "0", "--output_dir", "piped", "--format", "json")
    assert predictions("piped")["annotations"] == predictions("file")["annotations"]
    assert [image["file_name"] for image in predictions("piped")["images"]] == ["stdin"]


def test_paths_on_standard_input(script, trained, photos, monkeypatch, capsys):
    """In their order, whatever it is."""
    pipe(monkeypatch, "photos/b.png\r\n\nphotos/ä.jpg\nphotos/a.jpg".encode())
    assert call(script, "-", "--resume", trained, "--threshold", "0", "--output_dir", "out") == 1
    assert [(image["id"], image["file_name"]) for image in predictions()["images"]] \
        == [(1, "photos/b.png"), (3, "photos/a.jpg")]
    shown = capsys.readouterr().out
    assert "images 3  " in shown and "1 of 3 images could not be read: photos/ä.jpg" in shown
    pipe(monkeypatch, b"")
    with pytest.raises(ValueError, match="nothing came on standard input"):
        call(script, "-", "--resume", trained, "--output_dir", "none")


# Videos.

def make_video(path: str, count: int = 7, size: tuple[int, int] = (64, 48), rate: int = 12, skip: tuple[int, ...] = (),
               codec: str = "mpeg4", **options: str) -> None:
    """``count`` frames, each of its own grey, without the times ``skip``."""
    av = pytest.importorskip("av")
    with av.open(path, "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        times = [time for time in range(count + len(skip)) if time not in skip]
        for k, time in enumerate(times):
            frame = av.VideoFrame.from_image(Image.new("RGB", size, (20 + 20 * (k % 10),) * 3))
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_video(path: str) -> tuple[list[np.ndarray], list[float], float]:
    """Frames, when they are shown, and their rate."""
    import av
    with av.open(path) as container:
        frames = list(container.decode(video=0))
        return ([frame.to_ndarray(format="rgb24") for frame in frames], [frame.time for frame in frames],
                float(container.streams.video[0].average_rate))


@pytest.mark.parametrize("size, skip", [((64, 48), ()), ((71, 49), (3, 4))])
def test_a_video_keeps_size_rate_frames_and_times(script, trained, photos, capsys, size, skip):
    make_video("clip.mp4", size=size, skip=skip)
    want, times, rate = read_video("clip.mp4")
    assert call(script, "clip.mp4", "--resume", trained, "--threshold", "1", "--output_dir", "out", "--batch_size",
                "3") == 0
    assert tree(Path("out")) == {"clip.mp4", "predictions.json"}
    frames, when, again = read_video("out/clip.mp4")
    assert len(frames) == len(want) == 7 and (again == rate == 12 or skip)
    assert when == pytest.approx(times, abs=1e-3) and when[3] - when[2] == pytest.approx((1 + len(skip)) / 12, abs=1e-3)
    assert all(abs(a.astype(int) - b).max() <= 6 for a, b in zip(frames, want))
    images = predictions()["images"]
    assert [(image["file_name"], image["frame"]) for image in images] == [(f"clip.mp4#{k}", k) for k in range(7)]
    assert [image["seconds"] for image in images] == pytest.approx(times, abs=1e-5)
    assert {(image["width"], image["height"]) for image in images} == {size}
    shown = capsys.readouterr().out
    assert "clip.mp4: 7 frames; threshold" in shown and "frames 7/7" in shown and "clip.mp4: 7 frames, " in shown


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("size", [(64, 48), (71, 49), (960, 720)])
def test_colours_and_frames_survive_any_encoder(tmp_path, codec, size):
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    clip, path = Clip("clip", False, Fraction(30000, 1001), Fraction(1, 90000), Fraction(1)), tmp_path / "clip.mp4"
    writer = VideoFile(path, clip, size, codec)
    for k in range(5):
        writer.add(Image.new("RGB", size, (200, 40 + 10 * k, 30)), 3003 * k)
    assert not path.exists()
    writer.close()
    items = list(Video("clip", str(path)).items(3))
    times = [float(item.pts * item.clip.time_base) for item in items]
    assert times == pytest.approx([k * 1001 / 30000 for k in range(5)])
    for k, item in enumerate(items):
        assert item.picture.size == size and item.clip.rate == clip.rate
        assert item.picture.getpixel((30, 20)) == pytest.approx((200, 40 + 10 * k, 30), abs=8)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("base, rate, times", [
    (Fraction(1, 1000), Fraction(25), (0, 40, 1000, 1040, 5000)),
    (Fraction(1, 90000), Fraction(24000, 1001), (0, 3754, 7508, 300001)),
    (Fraction(1, 1_000_000), Fraction(30), (0, 33333, 66667, 12345678)),
])
def test_uneven_times_survive_any_encoder(tmp_path, codec, base, rate, times):
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    writer = VideoFile(tmp_path / "clip.mp4", Clip("clip", False, rate, base, Fraction(1)), (64, 48), codec)
    for pts in times:
        writer.add(Image.new("RGB", (64, 48)), pts)
    writer.close()
    assert read_video(str(tmp_path / "clip.mp4"))[1] == pytest.approx([float(pts * base) for pts in times], abs=1e-5)
    assert writer.described() == f"{len(times)} frames, {codec}"


def test_what_became_of_frames_is_said(tmp_path):
    pytest.importorskip("av")
    writer = VideoFile(tmp_path / "clip.mp4", Clip("clip", False, Fraction(25), Fraction(1, 25), Fraction(1)), (64, 48),
                       "mpeg4")
    for pts, size in ((0, (64, 48)), (1, (20, 90)), (1, (64, 48))):
        writer.add(Image.new("RGB", size), pts)
    writer.close()
    assert writer.described() == ("3 frames, mpeg4, 1 of another size resized to 64 x 48, 1 shown a tick later than they "
                                  "were")
    assert [frame.shape for frame in read_video(str(tmp_path / "clip.mp4"))[0]] == [(48, 64, 3)] * 3


def test_frames_are_detected_as_images_are(script, trained, photos):
    make_video("clip.mp4", count=3)
    call(script, "clip.mp4", "photos/a.jpg", "--resume", trained, "--threshold", "0", "--output_dir", "out", "--format",
         "pictures", "video", "json", "yolo", "csv")
    assert tree(Path("out")) == {"a.jpg", "clip", *(f"clip/00000{k}.jpg" for k in range(3)), "clip.mp4", "classes.txt",
                                 "data.yaml", "labels", "labels/a.txt", "labels/clip", "predictions.csv",
                                 *(f"labels/clip/00000{k}.txt" for k in range(3)), "predictions.json"}
    found, detector = predictions(), script.load_detector(str(trained))
    assert [(image["id"], image["file_name"]) for image in found["images"]] \
        == [(1, "photos/a.jpg"), *((k + 2, f"clip.mp4#{k}") for k in range(3))]             # images come first
    assert (found["images"][2]["picture"], found["images"][2]["labels"]) == ("clip/000001.jpg",
                                                                            "labels/clip/000001.txt")
    for k, frame in enumerate(read_video("clip.mp4")[0]):
        direct, = detector.predict(frame)
        rows = [row for row in found["annotations"] if row["image_id"] == k + 2]
        assert [row["score"] for row in rows] == pytest.approx(direct["scores"].tolist(), abs=1e-6)
    drawn = read_video("out/clip.mp4")[0]
    assert all((frame != frame[0, 0]).any() for frame in drawn)                             # the boxes


def test_videos_are_upright(script, trained, photos):
    """A quarter's turn in the file's track header, as telephones write it."""
    make_video("clip.mp4", count=2)
    content = bytearray(Path("clip.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix:matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    Path("clip.mp4").write_bytes(content)
    call(script, "clip.mp4", "--resume", trained, "--threshold", "1", "--output_dir", "out")
    assert [(image["width"], image["height"]) for image in predictions()["images"]] == [(48, 64)] * 2
    assert [frame.shape for frame in read_video("out/clip.mp4")[0]] == [(64, 48, 3)] * 2


def test_a_video_that_is_cut_short(script, trained, photos, capsys):
    make_video("clip.mp4", count=40, movflags="faststart", codec="mpeg4")
    whole = Path("clip.mp4").read_bytes()
    Path("clip.mp4").write_bytes(whole[:len(whole) * 3 // 4])
    Path("none.mp4").write_text("no video")
    assert call(script, "*.mp4", "--resume", trained, "--output_dir", "out") == 1
    shown = capsys.readouterr().out
    count = len(read_video("out/clip.mp4")[0])
    assert 5 < count < 40 and count == len(predictions()["images"])
    assert f"left out: the last {40 - count} of the 40 frames that clip.mp4 counts are not in it" in shown
    assert "left out: video none.mp4 cannot be opened" in shown and "none.mp4" in shown.splitlines()[-1]


def test_without_pyav(script, trained, photos, monkeypatch):
    Path("clip.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    for source in ("clip.mp4", "camera:0", "rtsp://camera/1"):
        with pytest.raises(ImportError, match="PyAV, which is not installed; pip install av"):
            call(script, source, "--resume", trained, "--output_dir", "out")
    assert not Path("out").exists()


def test_cameras_that_are_not_there(script, trained, photos):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match="camera:front: the number of a camera is needed, as in camera:0"):
        call(script, "camera:front", "--resume", trained)
    if sys.platform == "linux":
        with pytest.raises(OSError, match="camera:77: (there is no camera /dev/video77|this build of PyAV reads no)"):
            call(script, "camera:77", "--resume", trained)


def test_pictures_from_python(script, photos):
    """Without the script's reader of files."""
    make_video("clip.mp4", count=2)
    with zipfile.ZipFile("some.zip", "w") as archive:
        archive.write("photos/b.png", "b.png")
        archive.writestr("c.png", "none")
    items = list(pictures(["clip.mp4", "some.zip", "photos", "clip.mp4", "./*.zip", "photos/../clip.mp4"]))
    assert [(item.name, item.picture and item.picture.size) for item in items] == [
        ("photos/a.jpg", (90, 70)), ("photos/b.png", (61, 130)), ("clip.mp4#0", (64, 48)), ("clip.mp4#1", (64, 48)),
        ("some.zip/b.png", (61, 130)), ("some.zip/c.png", None)]
    assert items[-1].problem.startswith("image some.zip/c.png (4 bytes) cannot be read") and not items[0].problem
    assert {item.picture.mode for item in pictures(["clip.mp4", "photos"], channels=1)} == {"L"}


def test_names_of_streams(script):
    assert script.stem_of("rtsp://10.0.0.7:554/a?b") == "rtsp___10.0.0.7_554_a_b"
    assert script.stem_of("camera:0") == "camera_0" and len(script.stem_of("ä" * 300).encode()) == 160


def test_long_names_have_room_while_they_are_written(script, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_machine", lambda: "m" * 64)
    names = script.Names()
    for _ in "ab":
        whole = writers.Partial(tmp_path / names.unique(script.stem_of("n" * 300), ".mp4"))
        whole.open().close()
        whole.finish()
    assert tree(tmp_path) == {f"{'n' * 160}.mp4", f"{'n' * 160}-2.mp4"}


def test_panoptic_videos(script, trained_masks, photos):
    make_video("clip.mp4", count=3)
    call(script, "clip.mp4", "--resume", trained_masks("coco_panoptic"), "--threshold", "0", "--output_dir", "out")
    assert tree(Path("out")) == {"clip.mp4", "panoptic", "panoptic.json", "panoptic/clip",
                                 *(f"panoptic/clip/00000{k}.png" for k in range(3))}
    assert [row["file_name"] for row in panoptic()["annotations"]] == [f"clip/00000{k}.png" for k in range(3)]
    assert len(read_video("out/clip.mp4")[0]) == 3


# Other formats.

def test_yolo_and_csv_have_what_json_has(script, trained, photos, capsys):
    Image.new("RGB", (50, 40)).save("photos/b.gif")
    call(script, "photos", "--resume", trained, "--threshold", "0", "--output_dir", "out", "--format", "json", "yolo",
         "csv")
    assert tree(Path("out")) == {"predictions.json", "predictions.csv", "classes.txt", "data.yaml", "labels",
                                 "labels/a.txt", "labels/b.txt", "labels/b-2.txt"}
    assert "detections with a score of at least 0.0 on 3 images: labels/*.txt, predictions.csv and predictions.json in " \
        in capsys.readouterr().out
    names = [row["name"] for row in TABLE]
    assert yaml.safe_load(Path("out/data.yaml").read_text(encoding="utf-8"))["names"] == dict(enumerate(names))
    assert Path("out/classes.txt").read_text(encoding="utf-8").splitlines() == names
    with open("out/predictions.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    found = predictions()
    images = {image["id"]: image for image in found["images"]}
    lines = {image["id"]: iter(Path("out", image["labels"]).read_text().splitlines()) for image in found["images"]}
    assert len(table) == len(found["annotations"]) == 15
    for row, line in zip(found["annotations"], table):
        image, (x, y, w, h) = images[row["image_id"]], row["bbox"]
        assert (line["file_name"], line["class"], int(line["category_id"])) \
            == (image["file_name"], row["category_name"], row["category_id"])
        assert [float(line[name]) for name in ("xmin", "ymin", "xmax", "ymax")] \
            == pytest.approx([x, y, x + w, y + h], abs=1e-3)
        assert float(line["score"]) == pytest.approx(row["score"], abs=1e-6) and line["frame"] == line["seconds"] == ""
        label, *box, score = map(float, next(lines[image["id"]]).split())
        sides = image["width"], image["height"]
        edges = np.clip([x / sides[0], y / sides[1], (x + w) / sides[0], (y + h) / sides[1]], 0, 1)
        corners = [box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2]
        assert corners == pytest.approx(edges, abs=2e-6) and names[int(label)] == row["category_name"]
        assert score == pytest.approx(row["score"], abs=1e-6)
    assert not any(list(rest) for rest in lines.values())


def test_images_without_detections_have_files(script, trained, photos):
    call(script, "photos", "--resume", trained, "--threshold", "1", "--output_dir", "out", "--format", "yolo", "csv")
    assert Path("out/labels/a.txt").read_text() == Path("out/labels/b.txt").read_text() == ""
    assert len(Path("out/predictions.csv").read_text().splitlines()) == 1


def test_boxes_outside_the_image_are_no_rows_of_yolo(tmp_path):
    yolo = Yolo(tmp_path, [Category(0, 3, "red"), Category(1, 7, "blue")])
    row = {"category_id": 7, "score": 0.5}
    rows = [{**row, "bbox": [-10, 10, 30, 20]}, {**row, "bbox": [100, 0, 9, 9]}]
    yolo.add("x/a.txt", {"width": 100, "height": 50}, rows)
    assert (tmp_path / "labels" / "x" / "a.txt").read_text() == "1 0.100000 0.400000 0.200000 0.400000 0.500000\n"
    assert yolo.outside == 1


# What is looked for.

@pytest.mark.parametrize("words, same", [
    (["--classes", "blue", "5 µm"], {"classes": ["blue", "5 µm"]}),
    (["--nms", "0.1"], {"nms": 0.1}),
    (["--one_label_per_query"], {"one_label_per_query": True}),
    (["--tile", "40", "--overlap", "0.3", "--batch_size", "2"], {"tile": 40, "overlap": 0.3, "batch_size": 2}),
    (["--tile", "40", "--whole"], {"tile": 40, "whole": True}),
])
def test_flags_are_the_detectors(script, trained, photos, words, same):
    call(script, "photos/a.jpg", "--resume", trained, "--threshold", "0", *words, "--output_dir", "out")
    direct, = script.load_detector(str(trained)).predict("photos/a.jpg", **same)
    rows = predictions()["annotations"]
    assert [row["category_name"] for row in rows] == direct["names"]
    assert [row["score"] for row in rows] == pytest.approx(direct["scores"].tolist(), abs=1e-6)
    info = {name: value for name, value in predictions()["info"].items() if name in same}
    assert info == {name: value for name, value in same.items() if name != "batch_size"}


@pytest.mark.parametrize("options", [{"one_label_per_query": True}, {"one_label_per_query": True, "tile": 80},
                                     {"tile": 80}, {"tile": 80, "nms": 0.5}])
def test_labels_that_the_data_does_not_use_win_nothing(script, tmp_path, options):
    """No query, no tile and no neighbour: all is as the detector says."""
    exported(tmp_path, SIGMOID)
    detector, left_out = script.load_detector(str(tmp_path / "best.pth")), Counter()
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (160, 160, 3)).astype(np.uint8))
    direct, = detector.predict(image, **options)
    found, = script.looker(detector, script.Choice(0.0, **options), left_out)([Item("a.png", image)])
    assert set(left_out) == {1} and len(direct["names"]) > 3
    assert all(torch.equal(found[name], direct[name]) for name in ("scores", "labels", "boxes"))


def test_thresholds_of_classes(script, trained, photos, capsys):
    call(script, "photos", "--resume", trained, "--threshold", "0", "--output_dir", "all")
    rows = predictions("all")["annotations"]
    name = rows[0]["category_name"]
    middle = sorted(row["score"] for row in rows if row["category_name"] == name)[1]
    call(script, "photos", "--resume", trained, "--threshold", f"1,{name}={middle:.12f}", "--output_dir", "some")
    want = [row for row in rows if row["category_name"] == name and row["score"] >= float(f"{middle:.12f}")]
    assert without_ids(predictions("some")["annotations"]) == without_ids(want) and 0 < len(want) < len(rows)
    assert f"detections with a score of at least 1.0, {name} " in capsys.readouterr().out


@pytest.mark.parametrize("text, want", [
    ("0.5", (0.5, {})), ("cat=.3", (None, {"cat": 0.3})), ("1,traffic light=0.25,cat=0", (1, {"traffic light": 0.25,
                                                                                             "cat": 0})),
    ("a, b=0.3,0.4", (0.4, {"a, b": 0.3})), ("1e-3", (0.001, {})),
])
def test_thresholds_as_typed(script, text, want):
    assert script.parse_threshold(text) == want


@pytest.mark.parametrize("text", ["", "cat", "0.5,cat", "cat=", "0.5 0.3", "-0.1", "nan", "cat=1.5", "1.2.3", ".",
                                  "cat=1.2.3"])
def test_thresholds_that_are_none(script, text):
    with pytest.raises(ValueError, match="--threshold .*(a number is needed|scores are between)"):
        script.parse_threshold(text)


@pytest.mark.parametrize("text, what", [("0.5,0.3", "that of all classes"), ("cat=0.3,cat=0.5", "cat"),
                                        ("0.5,cat=0.3,dog=0.1, cat=0.3", "cat")])
def test_thresholds_that_are_there_twice(script, text, what):
    with pytest.raises(ValueError, match=f"--threshold {text}: {what} is there twice; give each once"):
        script.parse_threshold(text)


@pytest.mark.parametrize("words, message", [
    (["--tile", "0"], "tile 0: a side in pixels"),
    (["--tile", "40", "--overlap", "0.95"], "overlap 0.95: the part"),
    (["--format", "video"], "--format video is of videos and cameras, and there is none among the sources"),
    (["--threshold", "0.5,bleu=0.2"], "--threshold bleu=0.2: the model has no class 'bleu'; did you mean blue"),
    (["--classes", "bleu"], "class 'bleu' is not among the model's 3; the nearest are 'blue'"),
    (["--overlap", "0.3"], "overlap 0.3 is about tiles"),
    (["--overlap", "0.2"], "overlap 0.2 is about tiles"),
    (["--nms", "2"], "nms 2.0: an IoU"),
])
def test_what_does_not_fit_together(script, trained, photos, words, message):
    with pytest.raises(ValueError, match=message):
        call(script, "photos", "--resume", trained, *words, "--output_dir", "out")
    assert not Path("out").exists()


@pytest.mark.parametrize("words, message", [
    (["--format", "json", "csv"], "--format csv has rows of boxes, and .* panoptic maps; use pictures, video and json"),
    (["--format", "yolo"], "--format yolo has rows of boxes"),
    (["--tile", "100"], "--tile is about boxes, and .* panoptic"),
    (["--overlap", "0.3"], "--overlap is about boxes"),
    (["--classes", "red"], "--classes is about boxes"),
    (["--threshold", "red=0.3"], "--threshold of single classes is about boxes"),
])
def test_what_does_not_fit_panoptic_models(script, trained_masks, photos, words, message):
    with pytest.raises(ValueError, match=message):
        call(script, "photos", "--resume", trained_masks("coco_panoptic"), *words)


def test_videos_do_not_fit_five_channels(script, trained_for, photos):
    make_video("clip.mp4", count=1)
    with pytest.raises(ValueError, match="clip.mp4: frames of videos are RGB, and this model's images have 5 channels"):
        call(script, "clip.mp4", "--resume", trained_for(5), "--output_dir", "out")


# All in a stream.

@pytest.mark.parametrize("size", [1, 4])
def test_pictures_do_not_gather(script, trained, photos, monkeypatch, size):
    """When one is read, no more are alive than belong to its batch and the one before it."""
    for k in range(20):
        Image.new("RGB", (20 + k, 20)).save(f"photos/more/{k}.png")
    alive, most, read = [], [], script.read_image

    def watched(*words, **more):
        picture = read(*words, **more)
        alive.append(weakref.ref(picture))
        most.append(sum(one() is not None for one in alive))
        return picture
    monkeypatch.setattr(script, "read_image", watched)
    call(script, "photos/more", "--resume", trained, "--batch_size", size, "--output_dir", "out")
    assert len(most) == 21 and max(most) <= 2 * size


def test_with_tiles_one_picture_is_read_at_a_time(script, trained, photos, monkeypatch):
    together, look = [], script.looker
    monkeypatch.setattr(script, "looker", lambda *words: lambda items: (together.append(len(items)),
                                                                        look(*words)(items))[1])
    for words in ([], ["--tile", "60"]):
        call(script, "photos", "--resume", trained, "--batch_size", "2", *words, "--output_dir", f"out{len(words)}")
    assert together == [2, 1, 1]


def test_rows_are_written_as_they_come(script, tmp_path):
    """The file is there when it is whole, and has then what json makes of all at once."""
    path, rows = tmp_path / "predictions.json", [{"id": k, "name": "µ\n" * k} for k in range(3)]
    writer = script.CocoJson(path, {"a": 1}, [{"id": 3}])
    for row in rows:
        writer.add(row, [row, row])
    assert not path.exists()
    writer.close()
    assert json.loads(path.read_text(encoding="utf-8")) == {"info": {"a": 1}, "images": rows, "categories": [{"id": 3}],
                                                            "annotations": [row for row in rows for _ in "ab"]}
    assert tree(tmp_path) == {"predictions.json"}


def test_nothing_unfinished_stays_after_an_error(script, trained, photos, monkeypatch):
    make_video("clip.mp4", count=4)
    draw, drawn = script.draw_detections, []
    monkeypatch.setattr(script, "draw_detections", lambda *words, **more: (
        drawn.append(1), draw(*words, **more) if len(drawn) < 3 else 1 / 0)[1])
    with pytest.raises(ZeroDivisionError):
        call(script, "clip.mp4", "--resume", trained, "--output_dir", "out", "--format", "video", "json", "csv")
    assert tree(Path("out")) == set()


@pytest.mark.parametrize("step", ["json", "csv"])
def test_nothing_unfinished_stays_of_a_full_disk(script, trained, photos, monkeypatch, step):
    """Also where it is full only at the end, and what was not yet written cannot be."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    opened = writers.Partial.open
    name = ".predictions.json." if step == "json" else ".predictions.csv."

    def full(self, **words):
        file = opened(self, **words)
        return open("/dev/full", "w", encoding="utf-8", **words) if self.partial.name.startswith(name) else file
    monkeypatch.setattr(writers.Partial, "open", full)
    with pytest.raises(OSError, match="No space left"):
        call(script, "photos", "--resume", trained, "--threshold", "0", "--output_dir", "out", "--format", "json", "csv")
    assert tree(Path("out")) == ({"predictions.json"} if step == "csv" else set())


def test_ctrl_c_keeps_what_was_seen(script, trained, photos, monkeypatch, capsys):
    make_video("clip.mp4", count=6)
    draw, drawn = script.draw_detections, []
    monkeypatch.setattr(script, "draw_detections", lambda *words, **more: (
        drawn.append(1), len(drawn) == 3 and os.kill(os.getpid(), signal.SIGINT), draw(*words, **more))[2])
    before = signal.getsignal(signal.SIGINT)
    assert call(script, "clip.mp4", "--resume", trained, "--threshold", "0", "--output_dir", "out") == 130
    assert len(predictions()["images"]) == len(read_video("out/clip.mp4")[0]) == 3
    assert "stopped before the end, after 3" in capsys.readouterr().out and signal.getsignal(signal.SIGINT) is before


# Nothing is overwritten.

def test_output_folders(script, photos):
    assert [script.output_folder(None).as_posix() for _ in range(3)] \
        == ["outputs/predictions", "outputs/predictions-2", "outputs/predictions-3"]
    assert script.output_folder("new/folder") == script.output_folder("new/folder") == Path("new/folder")    # empty
    Path("new/folder/mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--output_dir new/folder already has files in it, and none are overwrit"):
        script.output_folder("new/folder")


def test_leftovers_of_killed_processes_are_removed(script, photos, capfd):
    Path("new").mkdir()
    left = writers.Partial(Path("new/predictions.csv")).partial
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = left.with_name(left.name.replace(str(os.getpid()), str(gone.pid)))
    left.write_text("half")
    assert script.output_folder("new") == Path("new") and tree(Path("new")) == set()
    assert "removed new/.predictions.csv." in capfd.readouterr().out


# Checkpoints.

@pytest.fixture
def published(tmp_path, monkeypatch):
    """Weights alone, as published, of a preset that the test adds: (number of labels) -> path."""
    def save(num_classes: int, **content) -> str:
        torch.manual_seed(0)
        path = tmp_path / "published.pth"
        torch.save({"model": SMALL.build(num_classes)[0].state_dict(), **content}, path)
        return str(path)
    monkeypatch.setitem(PRESETS, "small", Preset(SMALL))
    return save


def test_weights_alone_with_cocos_classes(script, published, capsys):
    detector = script.load_detector(published(91), model="small")
    assert {row.label: row.name for row in detector.categories} == COCO_CATEGORIES
    assert all(row.label == row.id for row in detector.categories)
    assert detector.preprocessing == Preprocessing() and detector.name == "small" and not detector.model.training
    assert "holds weights alone: taken as small, classes COCO's, short side 800" in capsys.readouterr().out


def test_weights_alone_with_other_classes(script, published):
    detector = script.load_detector(published(4, config="of another program"), model="small")
    assert detector.categories == [(label, label, f"label {label}", True) for label in range(4)]


def test_weights_alone_without_a_name(script, published):
    with pytest.raises(ValueError, match="does not fit detr_resnet50. It fits --model small"):
        script.load_detector(published(91))


def test_weights_alone_are_taken_as_detr_resnet50(script, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "detr_resnet50", Preset(SMALL))
    torch.save(SMALL.build(91)[0].state_dict(), tmp_path / "bare.pth")                  # not even under "model"
    assert script.load_detector(str(tmp_path / "bare.pth")).name == "detr_resnet50"


def test_labels_that_the_data_does_not_use(script, published, photos, capsys):
    """COCO has 11 in its 91 slots: left out and counted, as in evaluation."""
    detector = script.load_detector(published(91), model="small")
    with torch.no_grad():
        detector.model.class_embed.bias[12] = 50
    Path("out").mkdir()
    assert script.predict(detector, script.find(["photos/a.jpg"]), Path("out"), script.Choice(0.0)) == ([], 1, False)
    assert predictions()["annotations"] == []
    assert "left out: 5 detections of labels that the data does not use (12)" in capsys.readouterr().out


def test_all_sides_of_the_checkpoint_are_used(script, trained):
    detector = script.load_detector(str(trained))
    assert detector.preprocessing == Preprocessing(64, 100) and detector.categories[2] == (2, 40, "5 µm", True)
    expected = torch.load(trained, weights_only=True)["model"]
    assert all(torch.equal(value, expected[name]) for name, value in detector.model.state_dict().items())
    found = detector([Image.new("RGB", (60, 50)), Image.new("RGB", (80, 90))])
    assert [set(one) for one in found] == [{"scores", "labels", "boxes", "queries", "names", "ids"}] * 2
    assert detector.model([torch.zeros(3, 64, 64)])["pred_boxes"].shape == (1, 5, 4)


@pytest.mark.parametrize("name, message", [
    ("tiny_detr", "--model tiny_detr: .*checkpoint.pth holds a detr_resnet50; leave --model out"),
    ("detr_resnet5", "--model detr_resnet5 is not known; did you mean detr_resnet50"),
])
def test_models_that_contradict(script, trained, name, message):
    with pytest.raises(ValueError, match=message):
        script.load_detector(str(trained), model=name)


def test_checkpoints_of_something_else(script, trained, tmp_path):
    torch.save({"model": {"fc.weight": torch.zeros(3, 2)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth has no class_embed.weight: it is not a DETR checkpoint"):
        script.load_detector(str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="other.pth says nothing of its number of classes"):
        script.load_detector(str(tmp_path / "other.pth"), model="tiny_detr")
    content = torch.load(trained, weights_only=True)
    torch.save({**content, "num_classes": 4}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth does not fit the model: .*class_embed.weight \[4, 32\] for \[5"):
        script.load_detector(str(tmp_path / "other.pth"))


def test_weights_that_are_no_numbers(script, trained, photos):
    detector = script.load_detector(str(trained))
    with torch.no_grad():
        detector.model.bbox_embed.layers[0].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="photos/a.jpg: the model's scores or boxes are not finite"):
        script.predict(detector, script.find(["photos/a.jpg"]), photos, script.Choice())


# The command.

@pytest.mark.parametrize("words, message", [
    (["--threshold", "1.5"], "--threshold 1.5: scores are between 0 and 1"),
    (["--batch_size", "0"], "--batch_size 0: at least 1 is needed"),
])
def test_flags_out_of_range(script, trained, photos, words, message):
    with pytest.raises(ValueError, match=message):
        call(script, "photos", "--resume", trained, *words)


def test_unknown_flags(script, capsys):
    with pytest.raises(SystemExit) as stop:
        call(script, "photos", "--resume", "a.pth", "--treshold", "0.3")
    assert stop.value.code == 2 and "unknown: --treshold; did you mean --threshold?" in capsys.readouterr().err


def test_errors_are_one_line(photos, monkeypatch):
    """Run as a program, from another folder than the project's."""
    done = subprocess.run([sys.executable, str(SCRIPT), "photos", "--resume", "nowhere.pth"], capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("FileNotFoundError: there is no checkpoint nowhere.pth")
    assert len(done.stderr.strip().splitlines()) == 1
