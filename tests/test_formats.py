"""datasets/formats.py and the readers: what a folder is, what its rows mean, and what is said where they mean nothing."""
import csv
import os
import pickle
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from small_formats import make_awkward

from datasets import build_dataset
from datasets.check import check
from datasets.formats import recognise
from datasets.images import height_width, image_size, image_sizes, read_image
from datasets.split import number


def picture(path: Path, width: int = 40, height: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


# -- sizes from headers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending", ["jpg", "png", "tiff", "webp", "late.png", "xmp.png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_header_is_that_of_the_picture(tmp_path, ending, orientation):
    path = tmp_path / f"a.{ending}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    if ending == "xmp.png":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", f'<x:xmpmeta><rdf tiff:Orientation="{orientation}"/></x:xmpmeta>')
        Image.new("RGB", (30, 20)).save(path, pnginfo=info)
    else:
        Image.new("RGB", (30, 20)).save(path, exif=exif)
    if ending == "late.png":                                        # orientation behind the pixels, as some cameras write
        content = path.read_bytes()
        start = content.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(content[start:start + 4], "big")
        path.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    assert image_size(path) == height_width(read_image(path))


def test_sizes_of_arrays_and_of_what_is_none(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((7, 9, 5), np.uint8))
    text(tmp_path / "b.jpg", "no picture")
    found = image_sizes([tmp_path / "a.npy", tmp_path / "b.jpg", tmp_path / "c.jpg"])
    assert found[0] == (7, 9) and "b.jpg (10 bytes) cannot be read" in found[1] and "c.jpg is not there" in found[2]
    assert image_sizes([tmp_path / "a.npy"] * 100) == [(7, 9)] * 100


def test_numbers_have_no_exponents():
    assert [number(x) for x in (3.0, 0.25, 1e-9, -1e-9, 1 / 3, 123456.5, -2.5, 100)] == [
        "3", "0.25", "0", "0", "0.333333", "123456.5", "-2.5", "100"]


# -- recognising ------------------------------------------------------------------------------------------------------

EMPTY = '{"images": [], "annotations": [], "categories": []}'


@pytest.mark.parametrize("files, name, splits", [
    (["annotations/instances_train2017.json", "annotations/instances_val2017.json", "annotations/captions_val2017.json"],
     "COCO", ["train", "val"]),
    (["annotations/instances_train.json", "annotations/instances_test.json"], "COCO", ["train", "test"]),
    (["annotations/train.json", "annotations/val.json"], "COCO", ["train", "val"]),
    (["train/_annotations.coco.json", "valid/_annotations.coco.json", "test/_annotations.coco.json"],
     "COCO in train/ valid/ test/", ["train", "val", "test"]),
    (["train/a.xml", "valid/b.xml"], "Pascal VOC", ["train", "val"]),
    (["Annotations/a.xml"], "Pascal VOC", ["train"]),
    (["Annotations/a.xml", "ImageSets/Main/train.txt", "ImageSets/Main/val.txt", "ImageSets/Main/trainval.txt"],
     "Pascal VOC", ["train", "val"]),
    (["Annotations/a.xml", "ImageSets/Main/trainval.txt", "ImageSets/Main/test.txt"], "Pascal VOC", ["train", "test"]),
    (["train.csv", "val.csv", "results.csv"], "CSV", ["train", "val"]),
    (["train_labels.csv", "test_labels.csv"], "CSV", ["train", "test"]),
    (["train/_annotations.csv", "valid/_annotations.csv"], "CSV", ["train", "val"]),
])
def test_what_is_recognised(tmp_path, files, name, splits):
    for file in files:
        text(tmp_path / file, EMPTY if file.endswith("json") else "filename,class,xmin,ymin,xmax,ymax\n")
    found = recognise(tmp_path)
    assert found.name == name and list(found.splits) == splits
    assert all(split.source.exists() for split in found.splits.values())


def test_years_and_folders_of_coco(tmp_path):
    for part in ("train2014", "val2014", "train2017", "val2017"):
        text(tmp_path / "annotations" / f"instances_{part}.json", EMPTY)
    (tmp_path / "images" / "train2014").mkdir(parents=True)
    with pytest.raises(ValueError, match="has json of several kinds: .*name the one that is meant"):
        recognise(tmp_path)
    found = recognise(tmp_path / "annotations" / "instances_val2014.json").splits
    assert found["train"].images == tmp_path / "images" / "train2014"
    assert found["val"].source.name == "instances_val2014.json"
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
    assert recognise(tmp_path).splits["train"].images == tmp_path / "train2017"         # the one whose images are there
    assert recognise(tmp_path / "annotations").splits["train"].images == tmp_path / "train2017"
    text(tmp_path / "alone.json", EMPTY)
    with pytest.raises(ValueError, match="alone.json: which images belong to it.*known from its place alone"):
        recognise(tmp_path / "alone.json")


def test_nothing_or_several(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such file or folder"):
        recognise(tmp_path / "nowhere")
    text(tmp_path / "notes.txt", "")
    with pytest.raises(ValueError, match=r"is no data set.*there are notes.txt\. Any.*looked for(.*\n)*.*data.yaml(.*\n)*"
                                         r".*Annotations/\*\.xml(.*\n)*.*train\.csv"):
        recognise(tmp_path)
    with pytest.raises(ValueError, match="is no data set"):
        recognise(tmp_path / "notes.txt")
    text(tmp_path / "train.csv", "filename,class,xmin,ymin,xmax,ymax\n")
    picture(tmp_path / "images" / "a.png")
    text(tmp_path / "data.yaml", "train: images\nnames: [a]\n")
    with pytest.raises(ValueError, match=r"be 2 data sets: YOLO \(.*data.yaml\); CSV \(.*train.csv\); name the file"):
        recognise(tmp_path)
    assert recognise(tmp_path / "data.yaml").name == "YOLO" and recognise(tmp_path / "train.csv").name == "CSV"


def test_a_part_that_is_not_there(tmp_path):
    text(tmp_path / "train.csv", "filename,class,xmin,ymin,xmax,ymax\n")
    with pytest.raises(ValueError, match=r"--data .* \(CSV\) has no part 'val' for validation, but 'train' "
                                         r"\(.*train.csv\); add it: val.csv"):
        build_dataset("val", data=tmp_path)
    with pytest.raises(ValueError, match="split 'all': there are 'train' and 'val', and 'test'"):
        build_dataset("all", data=tmp_path)
    with pytest.raises(ValueError, match="leave --coco_path, --dataset_file and --coco_panoptic_path out, or --data"):
        build_dataset("val", tmp_path, data=tmp_path)
    with pytest.raises(ValueError, match="no data: give --data PATH"):
        build_dataset("val")
    with pytest.raises(ValueError, match="--ignore_regions is about boxes; in panoptic data"):
        build_dataset("val", tmp_path, "coco_panoptic", coco_panoptic_path=tmp_path, ignore_regions=True)


@pytest.mark.parametrize("one, other, named", [
    ("annotations/instances_val.json", "annotations/instances_valid.json", True),
    ("val/_annotations.coco.json", "valid/_annotations.coco.json", True),
    ("val/a.xml", "valid/b.xml", False), ("val.csv", "valid.csv", True), ("val.csv", "valid/_annotations.csv", True)])
def test_two_files_for_one_part(tmp_path, one, other, named):
    for file in (one, other, one.replace("val", "train")):
        text(tmp_path / file, EMPTY if file.endswith("json") else "filename,class,xmin,ymin,xmax,ymax\n")
    with pytest.raises(ValueError, match=rf"has several files or folders for the part 'val': .*val.*, .*valid.*; "
                                         rf"{'name' if named else 'rename'} the one that is"):
        recognise(tmp_path)
    for file in (one, other) if named else ():
        found = recognise(tmp_path / file).splits
        assert list(found) == ["train", "val"] and found["val"].source == tmp_path / file


def test_val_valid_and_validation_are_the_same(tmp_path):
    for k, name in enumerate(("val", "valid", "validation")):
        text(tmp_path / f"{k}" / "annotations" / f"instances_{name}2017.json", EMPTY)
        assert recognise(tmp_path / f"{k}").splits["val"].images == tmp_path / f"{k}" / f"{name}2017"
        voc = tmp_path / f"voc{k}"
        text(voc / "Annotations" / "a.xml", voc_xml())
        text(voc / "ImageSets" / "Main" / "train.txt", "")
        text(voc / "ImageSets" / "Main" / f"{name}.txt", "a\n")
        assert recognise(voc).splits["val"].source.name == f"{name}.txt"
        yolo = tmp_path / f"yolo{k}"
        picture(yolo / "images" / "a.png")
        text(yolo / "labels" / "a.txt", "")
        text(yolo / "data.yaml", f"train: images\n{name}: images\nnames: [a]")
        assert list(recognise(yolo).splits) == ["train", "val"]
    text(voc / "ImageSets" / "Main" / "val.txt", "a\n")
    with pytest.raises(ValueError, match="part 'val': .*val.txt, .*validation.txt; rename the one that is not meant"):
        recognise(voc)
    text(yolo / "data.yaml", "train: images\nval: images\nvalid: other\nnames: [a]")
    with pytest.raises(ValueError, match="data.yaml: has val and valid, which are the same part; keep one"):
        recognise(yolo)


@pytest.mark.parametrize("content", ["train: true\nlr: 0.1", "train: [1, 2]\nnames: run", "a: [", "val: images/nowhere",
                                     "- a\n- b", "path: [a]\ntrain: x"])
def test_a_yaml_about_something_else_is_no_data(tmp_path, content):
    for part in ("train", "val"):
        text(tmp_path / "annotations" / f"instances_{part}.json", EMPTY)
    text(tmp_path / "config.yaml", content)
    assert recognise(tmp_path).name == "COCO"
    text(tmp_path / "config.yaml", "train: annotations")                       # a place that is there
    with pytest.raises(ValueError, match="config.yaml: has no 'names'; add the list"):
        recognise(tmp_path)
    text(tmp_path / "config.yaml", content)
    if "train" in content:
        with pytest.raises(ValueError, match="config.yaml: "):                  # named: it is meant
            recognise(tmp_path / "config.yaml")


# -- YOLO -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def yolo(tmp_path):
    """``yolo(rows, yaml)`` writes one image of 40 x 20 with these rows beside one without, and reads them."""
    def write_and_read(rows: str, yaml: str = "names: [cat, dog]", split: str = "train"):
        picture(tmp_path / "images" / "train" / "a.png")
        picture(tmp_path / "images" / "train" / "b.png")
        text(tmp_path / "labels" / "train" / "a.txt", rows)
        text(tmp_path / "data.yaml", f"train: images/train\n{yaml}\n")
        return recognise(tmp_path).splits[split].read()

    return write_and_read


def test_yolo_boxes_and_polygons(yolo, tmp_path):
    data = yolo("0 0.5 0.5 0.25 0.5\n\n1 0.1 0.1 0.5 0.2 0.3 0.9\n1.0 1.01 0.5 0.1 1.02\n")
    assert [(row["id"], row["file_name"], row["width"], row["height"]) for row in data["images"]] == [
        (1, "a.png", 40, 20), (2, "b.png", 40, 20)]
    assert data["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    box, polygon, outside = data["annotations"]
    assert box["bbox"] == [15, 5, 10, 10] and box["category_id"] == 0 and box["image_id"] == 1
    assert box["source"] == "labels/train/a.txt, line 1" and polygon["source"] == "labels/train/a.txt, line 3"
    assert polygon["segmentation"] == [[4, 2, 20, 4, 12, 18]] and polygon["bbox"] == [4, 2, 16, 16]
    assert polygon["area"] == pytest.approx(0.5 * abs(16 * 16 - 8 * 2))         # two sides of the triangle, crossed
    assert outside["bbox"] == pytest.approx([38.4, -0.2, 4, 20.4])              # kept: clipped and counted later
    opened = build_dataset("train", data=tmp_path)
    assert opened.target(0)["labels"].tolist() == [0, 1, 1] and len(opened.target(1)["labels"]) == 0
    assert opened.target(0)["boxes"][2].tolist() == pytest.approx([38.4, 0, 40, 20])


def test_yolo_class_index_outside_is_left_to_the_check(yolo, tmp_path):
    yolo("2 0.5 0.5 0.25 0.5")
    with pytest.raises(ValueError, match=r"a.txt, line 1.*category_id 2"):
        build_dataset("train", data=tmp_path)


@pytest.mark.parametrize("rows, message", [
    ("0 0.5 0.5 0.2", r"labels/train/a.txt, line 1: 4 columns where a box has 5"),
    ("0 0.5 0.5 0.2 0.3 0.9", "6 columns .*a score behind the box is what predictions have"),
    ("0 0.5 0.5 0.2 0.3\n0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "line 2: 8 columns"),
    ("0 0.5 0.5 x 0.3", "'x' is no number"),
    ("0 0.5 0.5 nan 0.3", "'nan' is no number"),
    ("cat 0.5 0.5 0.1 0.3", "'cat' is no number"),
    ("0.5 0.5 0.5 0.1 0.3", "the class is 0.5, a whole number is needed"),
    ("0 15 0.5 0.1 0.3", "15 is no fraction of the image's width or height; divide pixels by 40 and 20"),
    ("0 -0.6 0.5 0.1 0.3", "-0.6 is no fraction"),
])
def test_yolo_rows_that_mean_nothing(yolo, rows, message):
    with pytest.raises(ValueError, match=rf"data.yaml: 1 row cannot be read: .*{message}.*correct them, or take"):
        yolo(rows)


def test_all_bad_rows_are_counted(yolo):
    with pytest.raises(ValueError, match=r"6 rows cannot be read: .*line 1.*line 5.*, \.\.\.; correct"):
        yolo("0 1\n" * 6)


@pytest.mark.parametrize("yaml, message", [
    ("nc: 3\nnames: [a, b]", "'nc' is 3, but 'names' has 2 classes"),
    ("names: []", r"'names' is \[\]; a list of class names is needed"),
    ("names: {a: b}", "'names' has the keys a; whole numbers are needed"),
    ("nc: 3", "data.yaml: has no 'names'; add the list"),
    ("names: [a", "data.yaml: no valid yaml"),
    ("names: [a]\npath: [b]", r"data.yaml: 'path' is \['b'\]; one folder is needed"),
    ("names: [a]\nval: {a: b}", "data.yaml: 'val' is {'a': 'b'}; a folder of images"),
    ("names: [a]\nval: [images/train, {a: b}]", r"data.yaml: 'val' is \['images/train', {'a': 'b'}\]; a folder"),
])
def test_yolo_yaml_that_is_not_right(yolo, yaml, message):
    with pytest.raises(ValueError, match=message):
        yolo("", yaml)


def test_yolo_names_stay_text(yolo):
    assert [row["name"] for row in yolo("0 0.5 0.5 0.1 0.1", "names: [no, 1, 007, null, ~]\nnc: 5")["categories"]] == [
        "no", "1", "007", "null", "~"]
    assert yolo("", "names: {5: five, 0: zero}")["categories"] == [{"id": 0, "name": "zero"}, {"id": 5, "name": "five"}]


def test_yolo_without_any_labels_is_an_error(yolo, tmp_path):
    yolo("")
    (tmp_path / "labels" / "train" / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"has 2 images and not one text file.*looked for .*labels/train/a.txt"):
        recognise(tmp_path).splits["train"].read()
    text(tmp_path / "images" / "train" / "a.txt", "0 0.5 0.5 0.5 0.5")          # beside the image
    assert len(recognise(tmp_path).splits["train"].read()["annotations"]) == 1
    text(tmp_path / "data.yaml", "train: images/training\nnames: [cat]")
    with pytest.raises(FileNotFoundError, match="'train' names images/training, which is not there"):
        recognise(tmp_path).splits["train"].read()


def test_yolo_says_what_has_no_other_half(yolo, tmp_path, capsys):
    for name in ("c", "sub/d"):
        picture(tmp_path / "images" / "train" / f"{name}.png")
        text(tmp_path / "labels" / "train" / f"{name}.txt", "")
    for name in ("e", "sub/f", "classes"):
        text(tmp_path / "labels" / "train" / f"{name}.txt", "0 0.5 0.5 0.1 0.1")
    without, unused = yolo("0 0.5 0.5 0.25 0.5")["notes"]
    assert "'train': 1 of 4 images have no text file, taken as without objects (b.png)" in without
    assert without.kind == "images without a text file" and without.rows == ["b.png"]
    assert "'train': 2 text files have no image, not used (labels/train/e.txt, labels/train/sub/f.txt)" in unused
    assert unused.kind == "text files without an image" and len(unused.rows) == 2
    build_dataset("train", data=tmp_path)
    said = capsys.readouterr().out
    assert "1 of 4 images have no text file" in said and "2 text files have no image" in said
    text(tmp_path / "train.txt", "images/train/a.png\nimages/train/c.png\n")   # of b.png, another part may speak
    text(tmp_path / "labels" / "train" / "b.txt", "")
    (tmp_path / "labels" / "train" / "e.txt").unlink()
    text(tmp_path / "data.yaml", "train: train.txt\nnames: [cat]")
    assert recognise(tmp_path).splits["train"].read()["notes"] == []


def test_yolo_single_images_and_lists_that_are_none(yolo, tmp_path):
    yolo("0 0.5 0.5 0.25 0.5")
    text(tmp_path / "data.yaml", "train: images/train/a.png\nval: [images/train/b.png, images/train/a.png]\nnames: [cat]")
    assert [row["file_name"] for row in recognise(tmp_path).splits["train"].read()["images"]] == ["a.png"]
    assert [row["file_name"] for row in recognise(tmp_path).splits["val"].read()["images"]] == ["a.png", "b.png"]
    (tmp_path / "train.lst").write_bytes(b"\x89PNG\xff")
    text(tmp_path / "data.yaml", "train: train.lst\nnames: [cat]")
    with pytest.raises(ValueError, match="train.lst: is no list of images .*save it as UTF-8, one path a line"):
        recognise(tmp_path)


def test_yolo_keypoints_are_not_taken_for_polygons(yolo):
    data = yolo("0 0.5 0.5 0.25 0.5 0.1 0.1 0.2 0.2 0.3 0.3", "names: [cat]\nkpt_shape: [3, 2]")
    assert data["annotations"][0]["bbox"] == [15, 5, 10, 10] and "segmentation" not in data["annotations"][0]
    assert "keypoints" in data["notes"][-1]


def test_yolo_places(tmp_path):
    """Folders in several places, lists of images, and the folder that exporters name from outside."""
    home = tmp_path / "data"
    for name in ("one/images/sub/a.png", "two/images/b.png", "valid/images/c.png"):
        picture(home / name)
        text(home / name.replace("images", "labels").replace("png", "txt"), "0 0.5 0.5 0.5 0.5")
    text(home / "test.txt", "./one/images/sub/a.png\n\ntwo/images/b.png\n")
    text(home / "data.yaml", "path: ../elsewhere\ntrain: [one/images, two/images]\nval: ../valid/images\ntest: test.txt\n"
                             "names:\n  0: x\n")
    found = recognise(home).splits
    assert {name: [row["file_name"] for row in split.read()["images"]] for name, split in found.items()} == {
        "train": ["one/images/sub/a.png", "two/images/b.png"], "val": ["c.png"],
        "test": ["one/images/sub/a.png", "two/images/b.png"]}
    assert found["train"].images == home and found["val"].images == home / "valid" / "images"
    assert any("is not at" in note and "valid/images" in note for note in found["val"].read()["notes"])
    for split in found:
        assert [len(build_dataset(split, data=home).target(0)["boxes"])] == [1]
    text(home / "other.yaml", "train: one\nnames: [y]")
    with pytest.raises(ValueError, match="several yaml files with classes and parts: data.yaml, other.yaml; name the"):
        recognise(home)
    for content in ("lr0: 0.01", "names: [", "train: nowhere"):
        text(home / "other.yaml", content)
        assert recognise(home).name == "YOLO"
    (home / "data.yaml").unlink()
    text(home / "other.yaml", "names: [")
    with pytest.raises(ValueError, match="is no data set"):
        recognise(home)
    (home / "labels").mkdir()
    with pytest.raises(ValueError, match="other.yaml: no valid yaml"):
        recognise(home)


# -- Pascal VOC -------------------------------------------------------------------------------------------------------

def voc_xml(name="a.jpg", database="Unknown", objects="", size=(40, 20)):
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return (f"<annotation><filename>{name}</filename><source><database>{database}</database></source>{size}{objects}"
            f"</annotation>")


def voc_object(name="cat", box=(5, 6, 15, 18), more=""):
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


@pytest.fixture
def voc(tmp_path):
    """``voc({name: xml})`` writes train with these and images of 40 x 20, and val with one of a class "zebra"."""
    def write(xmls):
        for name, content in xmls.items():
            picture(tmp_path / "JPEGImages" / f"{name}.jpg")
            text(tmp_path / "Annotations" / f"{name}.xml", content)
        picture(tmp_path / "JPEGImages" / "last.jpg")
        text(tmp_path / "Annotations" / "last.xml", voc_xml("last.jpg", objects=voc_object("zebra")))
        text(tmp_path / "ImageSets" / "Main" / "train.txt", "".join(f"{name}\n" for name in xmls))
        text(tmp_path / "ImageSets" / "Main" / "val.txt", "last\n")
        return recognise(tmp_path).splits["train"].read()

    return write


def test_voc_pixels(voc):
    """Official files count pixels from 1 and include the last: a box of the first pixel alone is 1, 1, 1, 1."""
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    data = voc({"a": voc_xml(objects=voc_object() + voc_object("dog", (1.5, 2, 3.25, 4))),
                "b": voc_xml("b.jpg", "The VOC2007 Database", voc_object(more=part) + voc_object("dog", (1, 1, 1, 1)))})
    assert [row["bbox"] for row in data["annotations"]] == [
        [5, 6, 10, 12], [1.5, 2, 1.75, 2], [4, 5, 11, 13], [0, 0, 1, 1]]
    assert data["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "zebra"}]
    assert data["annotations"][3]["source"] == "Annotations/b.xml, object 2"
    assert "1 of 2 files of VOC's own database" in data["notes"][0]


def test_formats_that_cannot_mark_difficult_objects(tmp_path):
    """There the flag would have no effect."""
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "train.csv").write_text("filename,xmin,ymin,xmax,ymax,class\na.png,1,1,9,9,cat\n")
    assert len(build_dataset("train", data=tmp_path / "train.csv")) == 1
    with pytest.raises(ValueError, match="--remove_difficult: CSV, .* cannot mark an object as difficult; leave it out"):
        build_dataset("train", data=tmp_path / "train.csv", remove_difficult=True)


def test_voc_difficult(voc, tmp_path, capsys):
    voc({"a": voc_xml(objects=voc_object() + voc_object("dog", more="<difficult>1</difficult>"))})
    assert build_dataset("train", data=tmp_path).target(0)["labels"].tolist() == [0, 1]
    assert "marked as" not in capsys.readouterr().out
    opened = build_dataset("train", data=tmp_path, remove_difficult=True)
    assert opened.target(0)["labels"].tolist() == [0] and "ignore" not in opened.target(0)
    assert "left out of the targets: 1 object marked as difficult" in capsys.readouterr().out
    assert [row["iscrowd"] for row in opened.coco.anns.values()] == [0, 1]              # neither found nor missed
    regions = build_dataset("train", data=tmp_path, remove_difficult=True, ignore_regions=True).target(0)["ignore"]
    assert regions.tolist() == [[5, 6, 15, 18]]


def test_voc_sizes_and_names_of_images(voc, tmp_path):
    """Without a size the image's own; with a name that says nothing the XML's."""
    data = voc({"a": voc_xml("C:\\\\pictures\\\\cat.bmp", size=None), "b": voc_xml("", size=(0, 0)),
                "sub/c d": voc_xml("c d.jpg")})
    assert [(row["file_name"], row["width"], row["height"]) for row in data["images"]] == [
        ("a.jpg", 40, 20), ("b.jpg", 40, 20), ("sub/c d.jpg", 40, 20)]
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"train.txt: 1 row cannot be read: Annotations/a.xml: image .* is not there"):
        recognise(tmp_path).splits["train"].read()
    (tmp_path / "Annotations" / "a.xml").unlink()
    with pytest.raises(ValueError, match="Annotations/a.xml is not there"):
        recognise(tmp_path).splits["train"].read()


def test_voc_sizes_that_are_none_and_images_from_elsewhere(voc, tmp_path):
    elsewhere = picture(tmp_path / "other" / "z.jpg", 30, 10)
    moved = voc_xml("none.jpg", size=("inf", 10)).replace("<size>", f"<path>{elsewhere}</path><size>")
    voc({"a": voc_xml(size=("inf", "inf")), "b": moved})
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    data = recognise(tmp_path).splits["train"].read()
    assert [(row["width"], row["height"]) for row in data["images"]] == [(40, 20), (30, 10)]
    note, = data["notes"]
    assert f"1 image not in {tmp_path / 'JPEGImages'}, taken from where <path> says ({elsewhere})" in note


def test_files_are_parsed_twice_at_most(voc, tmp_path, monkeypatch):
    """By a check of all parts, which is followed by opening each and by scoring; and again once they change."""
    seen, parse = [], ElementTree.parse
    monkeypatch.setattr("xml.etree.ElementTree.parse", lambda file: seen.append(Path(file).name) or parse(file))
    voc({"a": voc_xml(objects=voc_object()), "b": voc_xml("b.jpg")})
    text(tmp_path / "Annotations" / "b.xml", voc_xml("b.jpg", objects=voc_object("dog and more")))
    assert check(recognise(tmp_path), cache=False).stops == []
    opened = [build_dataset(split, data=tmp_path) for split in ("train", "val")]
    assert [len(part.coco.anns) for part in opened] == [2, 1]
    assert max(map(seen.count, seen)) <= 2 and set(seen) == {"a.xml", "b.xml", "last.xml"}
    assert {category.name for category in opened[1].categories} == {"cat", "dog and more", "zebra"}


@pytest.mark.parametrize("xml, message", [
    ("<annotation>", "Annotations/a.xml: no element found"),
    (voc_xml(objects="<object><name>cat</name></object>"), r"object 1: \(cat\) has no <bndbox>"),
    (voc_xml(objects=voc_object() + voc_object("")), "object 2: has no <name>"),
    (voc_xml(objects=voc_object(box=(1, 2, "x", 4))), r"\(cat\) has the box .*'x'.*needed as numbers"),
])
def test_voc_files_that_mean_nothing(voc, xml, message):
    with pytest.raises(ValueError, match=rf"train.txt: 1 row cannot be read: .*{message}"):
        voc({"a": xml})


def test_voc_without_its_folder_of_images(voc, tmp_path):
    voc({"a": voc_xml(objects=voc_object())})
    (tmp_path / "JPEGImages").rename(tmp_path / "Pictures")
    with pytest.raises(FileNotFoundError, match="JPEGImages is not there; .*train.txt is about its images"):
        build_dataset("train", data=tmp_path)


def test_voc_beside_the_images(tmp_path):
    for part, name in (("train", "a"), ("valid", "b")):
        picture(tmp_path / part / f"{name}.jpg")
        text(tmp_path / part / f"{name}.xml", voc_xml(f"{name}.jpg", objects=voc_object(name)))
    assert build_dataset("val", data=tmp_path).categories == build_dataset("train", data=tmp_path).categories
    assert build_dataset("val", data=tmp_path).target(0)["labels"].tolist() == [1]


def test_bccd_json_and_xml_agree_box_by_box(real_data, tmp_path):
    cells = real_data / "bccd"
    if not (cells / "voc" / "Annotations").is_dir():
        pytest.skip(f"no {cells / 'voc' / 'Annotations'}")
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "Annotations").symlink_to(cells / "voc" / "Annotations")
    for split in ("train", "val"):
        files = sorted((cells / f"{split}2017").iterdir())
        text(tmp_path / "ImageSets" / "Main" / f"{split}.txt", "\n".join(file.stem for file in files))
        for file in files:
            (tmp_path / "JPEGImages" / file.name).symlink_to(file)
    count = 0
    for split in ("train", "val"):
        json, xml = build_dataset(split, data=cells), build_dataset(split, data=tmp_path)
        assert json.categories == xml.categories and json.files == xml.files
        for i in range(len(json)):
            a, b = json.target(i), xml.target(i)
            assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["labels"], b["labels"])
            count += len(a["boxes"])
    assert count > 3000


# -- CSV --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def table(tmp_path):
    """``table(text)`` writes train.csv beside images a.png and b.png of 40 x 20, and reads it."""
    def write_and_read(content: str):
        picture(tmp_path / "a.png")
        picture(tmp_path / "b.png")
        (tmp_path / "train.csv").write_bytes(content.encode("utf-8"))
        return recognise(tmp_path).splits["train"].read()

    return write_and_read


BOXES = [("a.png", "cat", [5, 6, 10, 12]), ("a.png", "dog", [0, 0, 4, 4.5])]


@pytest.mark.parametrize("content", [
    "filename,width,height,class,xmin,ymin,xmax,ymax\na.png,40,20,cat,5,6,15,18\na.png,40,20,dog,0,0,4,4.5\n"
    "b.png,40,20,,,,,\n",
    "\ufeffImage;Label;X1;Y1;X2;Y2\r\na.png;cat;5;6;15;18\r\na.png;dog;0;0;4;4.5\r\nb.png;;;;;\r\n",
    "x\ty\twidth\theight\tname\timage_path\n5\t6\t10\t12\tcat\ta.png\n0\t0\t4\t4.5\tdog\ta.png\n\t\t\t\t\tb.png\n",
    "file,category,x,y,w,h,width,height,split\na.png,cat,5,6,10,12,40,20,z\n\na.png,dog,0,0,4,4.5,40,20,z\n"
    "b.png,,,,,,40,20,z\n",
    'path,class,xmin,ymin,xmax,ymax,image_width,image_height\n"a.png",cat,5,6,15,18,40,20\na.png,dog,0,0,4,4.5,,\n'
    "b.png,,,,,,,\n",
])
def test_csv_columns(table, content):
    data = table(content)
    names = {row["id"]: row["name"] for row in data["categories"]}
    files = {row["id"]: row["file_name"] for row in data["images"]}
    assert files == {1: "a.png", 2: "b.png"} and names == {1: "cat", 2: "dog"}
    assert [(files[row["image_id"]], names[row["category_id"]], row["bbox"]) for row in data["annotations"]] == BOXES
    assert all((row["width"], row["height"]) == (40, 20) for row in data["images"])
    assert "columns understood as file from " in data["notes"][0]
    assert ("not used: split" in data["notes"][0]) == ("split" in content)
    assert data["annotations"][0]["source"] == "train.csv, line 2"


@pytest.mark.parametrize("content, message", [
    ("", r"the header \(empty\) has no columns for the box.*the first row must name the columns"),
    ("a.png,1,2,3,4,cat\n", "the header a.png, 1, 2, 3, 4, cat has no columns for the box"),
    ("filename,xmin,ymin,xmax,ymax\n", "has no column for the class; name one of them class or label"),
    ("class,xmin,ymin,xmax,ymax\n", "has no column for the file"),
    ("filename,path,class,xmin,ymin,xmax,ymax\n", "has several columns for the file"),
    ("filename,class,xmin,ymin,xmax,ymax\na.png,cat,1,2,3\n", "line 2: has 5 columns where the header has 6"),
    ("filename,class,xmin,ymin,xmax,ymax\na.png,cat,1,2,3,x\n", "line 2: has the box 1, 2, 3, x; four numbers"),
    ("filename,class,xmin,ymin,xmax,ymax\na.png,cat,1,2,3,\n", "line 2: has a class without all four numbers"),
    ("filename,class,xmin,ymin,xmax,ymax\na.png,,1,2,3,4\n", "line 2: has a box without a class"),
    ("filename,class,xmin,ymin,xmax,ymax\n,cat,1,2,3,4\n", "line 2: names no file"),
    ("filename,class,xmin,ymin,xmax,ymax\nz.png,cat,1,2,3,4\n", "image .*z.png is not there"),
    ("filename,width,height,class,xmin,ymin,xmax,ymax\na.png,40,20,cat,1,2,3,4\na.png,40,30,cat,1,2,3,4\n",
     "line 3: says a.png is 40 x 30, but line 2 40 x 20"),
])
def test_csv_that_means_nothing(table, content, message):
    with pytest.raises(ValueError, match=rf"train.csv.*{message}"):
        table(content)


@pytest.mark.parametrize("rows, message", [
    ('"a.png,cat,1,2,3,4\n' + "b.png,cat,1,2,3,4\n" * 9000, "line [0-9]+: field larger than field limit"),
    ('a.png,cat,1,2,3,4\n"b.png,cat,1,2,3,4\n', "line 3: unexpected end of data"),
    ('a.png,"big "cat" here",1,2,3,4\n', "line 2: ',' expected after"),
])
def test_csv_with_quotation_marks_that_are_wrong(table, rows, message):
    with pytest.raises(ValueError, match=rf"train.csv, {message}.*; a quotation mark is not closed, or stands within a"):
        table(f"filename,class,xmin,ymin,xmax,ymax\n{rows}")


def test_csv_is_parsed_twice_at_most(tmp_path, monkeypatch):
    n = 400
    for part in ("train", "val"):
        rows = "".join(f"{i}.png,40,20,cat,1,2,3,4\n" for i in range(n))
        text(tmp_path / f"{part}.csv", "filename,width,height,class,xmin,ymin,xmax,ymax\n" + rows)
    lines, reader = [], csv.reader

    class Counting:
        def __init__(self, content, **options):
            self.rows = reader(content, **options)

        line_num = property(lambda self: self.rows.line_num)

        def __iter__(self):
            return self

        def __next__(self):
            lines.append(next(self.rows))
            return lines[-1]

    monkeypatch.setattr(csv, "reader", Counting)
    for split in ("train", "val", "train", "val", "val"):                       # the check, both parts, and scoring
        assert len(recognise(tmp_path).splits[split].read()["annotations"]) == n
    assert 2 * n < len(lines) <= 4 * n
    text(tmp_path / "val.csv", "filename,width,height,class,xmin,ymin,xmax,ymax\nz.png,40,20,cat,1,2,3,4\n")
    assert len(recognise(tmp_path).splits["val"].read()["annotations"]) == 1


def test_csv_alone_and_classes_of_all_parts(table, tmp_path):
    table("filename,class,xmin,ymin,xmax,ymax\na.png,m,1,2,3,4\n")
    text(tmp_path / "val.csv", "filename,class,xmin,ymin,xmax,ymax\nb.png,b,1,2,3,4\n")
    assert build_dataset("train", data=tmp_path).categories == build_dataset("val", data=tmp_path).categories
    assert list(recognise(tmp_path / "val.csv").splits) == ["train", "val"]
    text(tmp_path / "boxes.csv", (tmp_path / "val.csv").read_text())
    assert list(recognise(tmp_path / "boxes.csv").splits) == ["train"]


# -- what readers give, can be sent to workers ------------------------------------------------------------------------

def test_readers_can_be_pickled(tmp_path, yolo, voc, table):
    yolo("0 0.5 0.5 0.25 0.5")
    make_awkward(tmp_path / "coco")
    for path in (tmp_path / "data.yaml", tmp_path / "coco"):
        split = recognise(path).splits["train"]
        assert pickle.loads(pickle.dumps(split)).read() == split.read()
    os.remove(tmp_path / "data.yaml")
    voc({"a": voc_xml(objects=voc_object())})
    opened = build_dataset("train", data=tmp_path)
    assert pickle.loads(pickle.dumps(opened)).target(0)["boxes"].tolist() == opened.target(0)["boxes"].tolist()
    assert ElementTree.parse(tmp_path / "Annotations" / "a.xml").getroot().findtext("object/name") == "cat"
