"""The embedded data: fixed for good, in COCO's layout, with everything in it that COCO's reader must know."""
import hashlib
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datasets import synthetic

PREFIX = 60
# sha256 over the pixels and annotations of the first PREFIX images of each split.
PREFIX_CHECKSUM = "28a1c43f4e718885bcb208856a72289a89fba536ca367014eaf34b3d5f36d86a"


@pytest.fixture(scope="module")
def scenes():
    return {split: [synthetic.make_scene(0, split, i) for i in range(PREFIX)] for split in ("train", "val")}


def test_checksum_of_a_prefix(scenes):
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for scene in scenes[split]:
            digest.update(scene.pixels.tobytes())
            digest.update(synthetic.canonical(scene.objects))
    assert digest.hexdigest() == PREFIX_CHECKSUM


@pytest.mark.slow
def test_checksum_of_everything(tmp_path):
    synthetic.make_synthetic(tmp_path / "data")
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for file in sorted((tmp_path / "data" / f"{split}2017").glob("*.png")):
            digest.update(np.asarray(Image.open(file)).tobytes())
        digest.update((tmp_path / "data" / "annotations" / f"instances_{split}2017.json").read_bytes())
    assert digest.hexdigest() == synthetic.CHECKSUM


@pytest.mark.slow
def test_statistics_of_everything(tmp_path):
    synthetic.make_synthetic(tmp_path / "data")
    for split, count in (("train", 2000), ("val", 300)):
        data = json.loads((tmp_path / "data" / "annotations" / f"instances_{split}2017.json").read_text())
        assert len(data["images"]) == count
        check_statistics(data)
        per_class = Counter(row["category_id"] for row in data["annotations"])
        assert max(per_class.values()) < 1.3 * min(per_class.values())


def check_statistics(data: dict) -> None:
    sizes = {row["id"]: (row["width"], row["height"]) for row in data["images"]}
    objects = [row for row in data["annotations"] if not row["iscrowd"]]
    assert all(128 <= side <= 192 for size in sizes.values() for side in size)
    counts = Counter(row["image_id"] for row in objects)
    assert set(counts.values()) <= set(range(1, 11))
    assert sum(i not in counts for i in sizes) == len(sizes) // 10
    side = [np.sqrt(np.prod(row["bbox"][2:]) / np.prod(sizes[row["image_id"]])) for row in objects]
    assert np.mean(np.array(side) < 0.1) >= 1 / 3                       # small for their image
    assert np.mean(np.array(side) > 0.25) >= 0.15
    assert {row["category_id"] for row in objects} == set(synthetic.CATEGORY_IDS)
    for row in data["annotations"]:
        x, y, w, h = row["bbox"]
        width, height = sizes[row["image_id"]]
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        assert row["iscrowd"] or min(w, h) >= synthetic.SMALLEST


def test_statistics(tmp_path):
    folder = tmp_path / "data"
    synthetic.make_synthetic(folder, train=200, val=10)
    data = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    check_statistics(data)
    segmentations = {type(row["segmentation"]) for row in data["annotations"] if not row["iscrowd"]}
    assert segmentations == {list, dict}                                # polygons and RLE
    assert sum(row["iscrowd"] for row in data["annotations"]) == 4      # one image in fifty has a crowd
    boxes: dict[int, list] = {}
    for row in data["annotations"]:
        boxes.setdefault(row["image_id"], []).append(row["bbox"])
    overlapping = sum(coco_mask.iou(b[i:i + 1], b[:i], [0] * i).max() > 0.05 for b in map(np.array, boxes.values())
                      for i in range(1, len(b)))
    assert overlapping > 20


def test_masks_and_boxes_agree_with_what_was_drawn(scenes, tmp_path):
    for scene in scenes["train"]:
        height, width = scene.owner.shape
        for k, row in enumerate(scene.objects):
            drawn = scene.owner == k
            ys, xs = drawn.nonzero()
            assert row["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert row["area"] == drawn.sum()
            segmentation = row["segmentation"]
            if isinstance(segmentation, list):
                rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
            elif isinstance(segmentation["counts"], list):
                rle = coco_mask.frPyObjects(segmentation, height, width)
            else:
                rle = segmentation
            mask = coco_mask.decode(rle).astype(bool)
            overlap = (mask & drawn).sum() / (mask | drawn).sum()
            assert overlap == 1 or isinstance(segmentation, list) and overlap > 0.85, (row, overlap)


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path, scenes):
    synthetic.make_synthetic(tmp_path / "a", train=3, val=2)
    coco = COCO(tmp_path / "a" / "annotations" / "instances_train2017.json")
    assert len(coco.imgs) == 3 and [c["name"] for c in coco.cats.values()] == list(synthetic.SHAPES)
    for i, image in enumerate(coco.imgs.values()):
        pixels = np.asarray(Image.open(tmp_path / "a" / "train2017" / image["file_name"]))
        assert (pixels == scenes["train"][i].pixels).all()
    assert (synthetic.make_scene(1, "train", 0).pixels[:100, :100] != scenes["train"][0].pixels[:100, :100]).any()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """``make_synthetic`` shortened to a few images, and the checksum that these have."""
    make = synthetic.make_synthetic
    make(tmp_path / "known", train=3, val=2)
    known = json.loads((tmp_path / "known" / synthetic.MARKER).read_text())["checksum"]
    monkeypatch.setattr(synthetic, "CHECKSUM", known)
    monkeypatch.setattr(synthetic, "make_synthetic", lambda folder: make(folder, train=3, val=2))
    return tmp_path / "data"


def test_made_once(small, capsys):
    assert synthetic.synthetic_data(small) == small
    file = small / synthetic.MARKER
    before = file.stat().st_mtime_ns
    capsys.readouterr()
    synthetic.synthetic_data(small)
    assert file.stat().st_mtime_ns == before and capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["image", "annotations", "marker", "version"])
def test_a_damaged_cache_is_set_aside_and_made_anew(small, capsys, damage):
    synthetic.synthetic_data(small)
    if damage == "image":
        next((small / "train2017").glob("*.png")).unlink()
    elif damage == "annotations":
        (small / "annotations" / "instances_val2017.json").unlink()
    elif damage == "marker":
        (small / synthetic.MARKER).write_text("{")
    else:
        (small / synthetic.MARKER).write_text(json.dumps({"version": 0, "checksum": "", "train": 3, "val": 2}))
    capsys.readouterr()
    synthetic.synthetic_data(small)
    assert "to be made anew" in capsys.readouterr().out
    assert synthetic.defect(small) is None
    assert len(list(small.parent.glob("data-set-aside-*"))) == 1


def test_an_interrupted_making_leaves_nothing(monkeypatch, tmp_path):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(synthetic.Image, "fromarray", stop)
    with pytest.raises(KeyboardInterrupt):
        synthetic.make_synthetic(tmp_path / "data", train=3, val=2)
    assert list(tmp_path.iterdir()) == []


def test_another_checksum_of_this_very_version_is_said_and_not_made_again(small, monkeypatch, capsys):
    """A machine that computes differently must not make the data anew at every start."""
    monkeypatch.setattr(synthetic, "CHECKSUM", "0" * 64)
    for _ in range(2):
        synthetic.synthetic_data(small)
        assert "not 000000000000" in capsys.readouterr().out
    assert not list(small.parent.glob("data-set-aside-*"))
    monkeypatch.setattr(synthetic, "CHECKSUM", "1" * 64)                # a newer version
    synthetic.synthetic_data(small)
    assert "of another version; moved to" in capsys.readouterr().out


def test_a_faster_process_keeps_its_data(small, monkeypatch, tmp_path):
    known, draw = tmp_path / "known", synthetic.make_scene

    def meanwhile(seed, split, index):
        if (split, index) == ("val", 1):
            shutil.copytree(known, small)
            (small / "theirs").touch()
        return draw(seed, split, index)
    monkeypatch.setattr(synthetic, "make_scene", meanwhile)
    assert synthetic.synthetic_data(small) == small
    assert (small / "theirs").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "known"]


def test_what_is_there_is_not_written_over(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="data is not empty; move it away"):
        synthetic.make_synthetic(tmp_path / "data", train=3, val=2)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
