"""``scripts/predict.py`` with a small random model: what it writes, under which names, and what it refuses."""
import dataclasses
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datasets.annotations import COCO_CATEGORIES
from datasets.coco_panoptic import COCO_PANOPTIC, PanopticAnnotations
from datasets.images import read_image
from datasets.transforms import Preprocessing, eval_transforms
from detr import checkpoint
from detr.architectures.detr import DETRConfig
from detr.presets import PRESETS, Preset

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
    paths = [Path(name) for name in ("x/a.jpg", "y/A.JPG", "y/a.png", "z/a.bmp", "z/a-2.jpg", "z/a.jpeg")]
    names = script.picture_names(paths)
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
            script.predict(detector, [Path("photos/a.jpg")], Path(data), 0.5)


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


# Nothing is overwritten.

def test_output_folders(script, photos):
    assert [script.output_folder(None).as_posix() for _ in range(3)] \
        == ["outputs/predictions", "outputs/predictions-2", "outputs/predictions-3"]
    assert script.output_folder("new/folder") == script.output_folder("new/folder") == Path("new/folder")    # empty
    Path("new/folder/mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--output_dir new/folder already has files in it, and none are overwrit"):
        script.output_folder("new/folder")


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
    assert script.predict(detector, [Path("photos/a.jpg")], Path("out"), threshold=0.0) == []
    assert predictions()["annotations"] == []
    assert "left out: 5 detections of labels that the data does not use (12)" in capsys.readouterr().out


def test_all_sides_of_the_checkpoint_are_used(script, trained):
    detector = script.load_detector(str(trained))
    assert detector.preprocessing == Preprocessing(64, 100) and detector.categories[2] == (2, 40, "5 µm", True)
    expected = torch.load(trained, weights_only=True)["model"]
    assert all(torch.equal(value, expected[name]) for name, value in detector.model.state_dict().items())
    found = detector([Image.new("RGB", (60, 50)), Image.new("RGB", (80, 90))])
    assert [set(one) for one in found] == [{"scores", "labels", "boxes", "names"}] * 2
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
        script.predict(detector, [Path("photos/a.jpg")], photos, 0.5)


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
