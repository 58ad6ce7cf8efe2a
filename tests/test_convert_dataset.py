"""scripts/convert_dataset.py: the same objects through every pair of formats, and what a format cannot hold is said."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_formats import CATEGORIES, HALVES, TRIANGLE, make_awkward

from datasets import build_dataset
from datasets.annotations import masks
from datasets.formats import recognise
from scripts import convert_dataset

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "convert_dataset.py"
TO = ("coco", "coco_splits", "yolo", "voc", "csv")
NAMES = dict(zip(TO, ("COCO", "COCO in train/ valid/ test/", "YOLO", "Pascal VOC", "CSV")))


@pytest.fixture(scope="module")
def script():
    return convert_dataset


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_awkward(tmp_path_factory.mktemp("awkward") / "data")


@pytest.fixture(scope="module")
def once(script, source, tmp_path_factory) -> dict:
    """The source in each format: folder and what was said."""
    folder = tmp_path_factory.mktemp("once")
    return {to: (folder / to, script.convert(source, folder / to, to)) for to in TO}


@pytest.fixture(scope="module")
def truth(source) -> dict:
    """What was written by hand: per part and file the objects that are no crowds, as (name, corners, row)."""
    found: dict = {}
    for split in ("train", "val"):
        data = json.loads((source / "annotations" / f"instances_{split}2017.json").read_text(encoding="utf-8"))
        files = {image["id"]: image["file_name"] for image in data["images"]}
        found[split] = {name: [] for name in files.values()}
        for row in data["annotations"]:
            if not row["iscrowd"]:
                x, y, w, h = row["bbox"]
                found[split][files[row["image_id"]]].append((CATEGORIES[row["category_id"]], [x, y, x + w, y + h], row))
    return found


def is_truth(path, truth, chain):
    """The data set at ``path`` has the objects of ``truth``, and what all formats of ``chain`` can hold."""
    for split, files in truth.items():
        opened = build_dataset(split, data=path)
        name_of = {category.label: category.name for category in opened.categories}
        places = {name.removeprefix(f"{split}/"): i for i, name in enumerate(opened.files)}      # VOC has one folder
        assert places.keys() == files.keys()
        for file, want in files.items():
            image, target = opened[places[file]]                            # which checks the size, too
            assert [name_of[int(label)] for label in target["labels"]] == [name for name, _, _ in want]
            boxes = torch.tensor([box for _, box, _ in want], dtype=torch.float64).reshape(-1, 4)
            assert (target["boxes"] - boxes).abs().max() < 1e-3 if want else len(target["boxes"]) == 0
            areas = [row["area"] if holds_area(row, chain) else (box[2] - box[0]) * (box[3] - box[1])
                     for _, box, row in want]
            np.testing.assert_allclose(target["area"], areas, rtol=1e-5)
    data = recognise(path).splits["train"].read()
    difficult = [row for row in data["annotations"] if row.get("difficult")]
    assert len(difficult) == (set(chain) <= {"coco", "coco_splits", "voc"})
    assert len([row for row in data["annotations"] if row["iscrowd"]]) == (set(chain) <= {"coco", "coco_splits"})
    segments = [row["segmentation"] for row in data["annotations"] if row.get("segmentation")]
    if set(chain) <= {"coco", "coco_splits"}:
        assert segments[0] == HALVES and len(segments) == 4
    elif set(chain) <= {"coco", "coco_splits", "yolo"}:
        assert len(segments) == 2 and segments[1] == TRIANGLE
        assert torch.equal(masks(segments[:1], 48, 64), masks([HALVES], 48, 64))        # parts joined by seams
    else:
        assert segments == []


def holds_area(row, chain):
    if set(chain) <= {"coco", "coco_splits"}:
        return True
    return set(chain) <= {"coco", "coco_splits", "yolo"} and isinstance(row.get("segmentation"), list)


@pytest.mark.parametrize("second", TO)
@pytest.mark.parametrize("first", TO)
def test_every_pair_keeps_what_both_can_hold(script, once, truth, tmp_path, first, second):
    assert recognise(once[first][0]).name == NAMES[first]
    script.convert(once[first][0], tmp_path / second, second)
    is_truth(tmp_path / second, truth, (first, second))


@pytest.mark.parametrize("to", TO)
def test_directly(once, truth, to):
    is_truth(once[to][0], truth, (to,))


def test_a_long_chain(script, once, truth, tmp_path):
    path = once["coco"][0]
    for i, to in enumerate(("yolo", "csv", "voc", "coco_splits", "yolo", "voc", "csv", "coco", "yolo", "coco")):
        path, before = tmp_path / f"{i}", path
        script.convert(before, path, to, link=True)
    is_truth(path, truth, TO)


def test_ids_and_names_of_classes(once, script, tmp_path):
    def classes(path):
        return {row["id"]: row["name"] for row in recognise(path).splits["val"].read()["categories"]}

    assert classes(once["coco"][0]) == classes(once["coco_splits"][0]) == CATEGORIES
    assert classes(once["yolo"][0]) == dict(enumerate(CATEGORIES.values()))
    seen = sorted(set(CATEGORIES.values()) - {"never seen"})
    assert classes(once["voc"][0]) == classes(once["csv"][0]) == dict(enumerate(seen, 1))
    notes = script.convert(once["yolo"][0], tmp_path / "again", "coco")
    assert classes(tmp_path / "again") == dict(enumerate(CATEGORIES.values(), 1))
    assert any("4 class ids became 1, 2, 3" in note for note in notes)
    data = json.loads((tmp_path / "again" / "annotations" / "instances_train2017.json").read_text(encoding="utf-8"))
    assert not any("source" in row for part in ("images", "annotations") for row in data[part])


@pytest.mark.parametrize("to, said", [
    ("coco", []), ("coco_splits", []),
    ("yolo", ["left out: 1 crowd or region to ignore (annotation 504)", "'difficult' of 1 object (annotation 506)",
              "the segments of 1 object (annotation 503)", "1 object of several polygons became one",
              "the area of 1 object,", "class ids became 0, 1, 2"]),
    ("voc", ["left out: 1 crowd", "the segments of 3 objects (annotation 502, 503, 505)", "the area of 3 objects",
             "1 class without objects (never seen)", "parts have images of the same name", "ids are not kept"]),
    ("csv", ["left out: 1 crowd", "'difficult' of 1 object", "the segments of 3 objects", "the area of 3 objects",
             "1 class without objects (never seen)"]),
])
def test_what_is_lost_is_said(once, to, said):
    notes = once[to][1]
    assert "train: 4 images, 7 annotations; val: 2 images, 2 annotations" in notes[0]
    assert notes[-1].startswith("written: ")
    for text in said:
        assert sum(text in note for note in notes) == 1, (text, notes)
    if to.startswith("coco"):
        assert len(notes) == 2
    if to == "voc":
        assert not any("'difficult'" in note for note in notes)


def test_other_fields_are_counted_or_kept(script, source, tmp_path):
    file = source / "annotations" / "instances_val2017.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    data["info"] = {"year": 2017}
    data["annotations"][0]["score"] = 1
    data["categories"][0]["supercategory"] = "text"
    copy = tmp_path / "copy"
    (copy / "annotations").mkdir(parents=True)
    (copy / "val2017").symlink_to(source / "val2017")
    (copy / "annotations" / file.name).write_text(json.dumps(data), encoding="utf-8")
    notes = script.convert(copy, tmp_path / "csv", "csv")
    for text in ("lost: of 'annotations' score (1)", "lost: of 'categories' supercategory (1)", "lost: info"):
        assert text in notes
    script.convert(copy, tmp_path / "coco", "coco")
    assert json.loads((tmp_path / "coco" / "annotations" / file.name).read_text(encoding="utf-8")) == data


def test_links_and_copies(script, source, tmp_path):
    script.convert(source, tmp_path / "copied", "yolo")
    script.convert(source, tmp_path / "linked", "yolo", link=True)
    copied, linked = (tmp_path / name / "images" / "train" / "sub" / "b.png" for name in ("copied", "linked"))
    assert not copied.is_symlink() and linked.is_symlink() and copied.read_bytes() == linked.read_bytes()
    assert linked.resolve() == (source / "train2017" / "sub" / "b.png").resolve()


def test_nothing_is_overwritten_or_half_written(script, source, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there is there already; name a folder"):
        script.convert(source, tmp_path / "there", "voc")
    monkeypatch.setattr(script.shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        script.convert(source, tmp_path / "new", "yolo")
    assert os.listdir(tmp_path) == ["there"]


def test_a_test_part_that_is_not_there_is_left_out(script, once, tmp_path):
    """As many a yaml names one. Where it is the only part, or is there and not right, nothing is converted."""
    copy = tmp_path / "copy"
    shutil.copytree(once["yolo"][0], copy)
    yaml = (copy / "data.yaml").read_text(encoding="utf-8")
    (copy / "data.yaml").write_text(yaml + "test: images/test\n", encoding="utf-8")
    notes = script.convert(copy, tmp_path / "voc", "voc")
    assert sum("left out: the part 'test', of which nothing is there" in note and "names images/test" in note
               for note in notes) == 1
    assert sorted(os.listdir(tmp_path / "voc" / "ImageSets" / "Main")) == ["train.txt", "val.txt"]
    (copy / "data.yaml").write_text(yaml.replace("images/val", "images/nowhere"), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="'val' names images/nowhere, which is not there"):
        script.convert(copy, tmp_path / "again", "voc")
    (copy / "images" / "test").mkdir()
    (copy / "data.yaml").write_text(yaml + "test: images/test\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'test' has no images"):
        script.convert(copy, tmp_path / "again", "voc")


def test_what_is_mended_is_said_and_crowds_once(script, source, tmp_path):
    """Whatever the words: a box that is clipped in training is said, a crowd by what is lost alone."""
    notes = script.convert(source, tmp_path / "csv", "csv")
    assert sum("crowd" in note for note in notes) == 1
    clipped = change(source, tmp_path, lambda data: data["annotations"][0].update(bbox=[1, 2, 30, 43], area=1290))
    assert any("reaches beyond the image" in note for note in script.convert(clipped, tmp_path / "coco", "coco"))


def change(source, tmp_path, what):
    """A copy of the val part with one thing changed."""
    copy = tmp_path / "changed"
    (copy / "annotations").mkdir(parents=True)
    (copy / "val2017").symlink_to(source / "val2017")
    data = json.loads((source / "annotations" / "instances_val2017.json").read_text(encoding="utf-8"))
    what(data)
    (copy / "annotations" / "instances_val2017.json").write_text(json.dumps(data))
    return copy


@pytest.mark.parametrize("to, what, message", [
    ("yolo", lambda d: d["images"][0].update(width=34), r"a.jpg has 33 x 44 pixels .*is said to have 34 x 44"),
    ("coco", lambda d: d["images"][0].update(file_name="b.jpg"), r"image .*b.jpg is not there"),
    ("csv", lambda d: d["images"][0].update(file_name="../val2017/a.jpg"), "leads out of its folder"),
    ("voc", lambda d: d["categories"][0].update(name=" x"), "Pascal VOC cannot hold the class 1 name ' x'"),
])
def test_what_cannot_be_converted(script, source, tmp_path, to, what, message):
    with pytest.raises((ValueError, OSError), match=message):
        script.convert(change(source, tmp_path, what), tmp_path / "new", to)
    assert not (tmp_path / "new").exists()


def test_names_that_differ_by_the_ending_alone(script, source, tmp_path):
    copy = tmp_path / "source"
    script.convert(source, copy, "coco")
    (copy / "val2017" / "a.png").write_bytes((copy / "val2017" / "c d.png").read_bytes())
    file = copy / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text(encoding="utf-8").replace("c d.png", "a.png"), encoding="utf-8")
    for to in ("yolo", "voc"):
        with pytest.raises(ValueError, match=r"val: 1 name of images differ by the ending alone \(a\)"):
            script.convert(copy, tmp_path / to, to)
    script.convert(copy, tmp_path / "csv", "csv")


def test_the_command(script, source, tmp_path, capsys):
    words = [str(source), str(tmp_path / "out"), "--to", "voc"]
    script.main(script.get_args_parser().parse_args(words))
    assert "written: " in capsys.readouterr().out and (tmp_path / "out" / "Annotations").is_dir()
    again = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert again.returncode == 1 and "error: " in again.stderr and "Traceback" not in again.stderr
