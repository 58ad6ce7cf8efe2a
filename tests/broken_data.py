"""Data sets that are broken in one way each, with what must be said of them and done about them.

``sound(folder)`` writes a small data set in COCO's layout with which nothing is wrong; each of ``BROKEN`` changes it.
"""
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle

WIDTH, HEIGHT = 64, 48
NAMES = {1: "cat", 23: "dog", 56: "cow"}


class Broken(NamedTuple):
    """One way to break the training data."""
    name: str
    change: Callable[[Path, dict[str, Any]], Any]   # of folder and training json; a json or text to write instead
    action: str                                     # of the finding
    says: str                                       # regular expression, in the finding's message or rows
    masks: bool = False                             # whether segmentations are used
    pixels: bool = False                            # whether it is found only where images are opened


def sound(folder: Path, train: int = 8, val: int = 4) -> Path:
    """Images of 64 x 48 pixels, two to four objects in each but the last."""
    random = np.random.RandomState(0)
    (folder / "annotations").mkdir(parents=True)
    number = 0
    for split, count, first in (("train", train, 1), ("val", val, 100)):
        (folder / f"{split}2017").mkdir()
        images, rows = [], []
        for i in range(first, first + count):
            Image.fromarray(random.randint(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)).save(
                folder / f"{split}2017" / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT})
            for k in range(0 if i == first + count - 1 else 2 + i % 3):
                number += 1
                x, y, w, h = random.randint((0, 0, 5, 5), (40, 30, 20, 15)).tolist()
                rows.append({"id": number, "image_id": i, "category_id": list(NAMES)[(i + k) % 3], "bbox": [x, y, w, h],
                             "area": w * h, "iscrowd": 0,
                             "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
        write(folder, split, {"images": images, "annotations": rows,
                              "categories": [{"id": id, "name": name} for id, name in NAMES.items()]})
    return folder


def json_of(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}2017.json"


def read(folder: Path, split: str) -> dict[str, Any]:
    return json.loads(json_of(folder, split).read_text())


def write(folder: Path, split: str, content: Any) -> None:
    json_of(folder, split).write_text(content if isinstance(content, str) else json.dumps(content))


def break_it(folder: Path, broken: Broken) -> Path:
    """``sound`` data, broken."""
    sound(folder)
    train = read(folder, "train")
    instead = broken.change(folder, train)
    write(folder, "train", instead if isinstance(instead, (dict, list, str)) else train)
    return folder


def row(part: str, i: int, **new: Any) -> Callable[[Path, dict[str, Any]], None]:
    """Sets values of row ``i``; ``...`` takes a key out."""
    def change(folder: Path, data: dict[str, Any]) -> None:
        for key, value in new.items():
            data[part][i].pop(key, None)
            if value is not ...:
                data[part][i][key] = value
    return change


def boxes(new: Callable[[list[float]], list[float]]) -> Callable[[Path, dict[str, Any]], None]:
    def change(folder: Path, data: dict[str, Any]) -> None:
        for annotation in data["annotations"]:
            annotation["bbox"] = new(annotation["bbox"])
    return change


def twin(**new: Any) -> Callable[[Path, dict[str, Any]], None]:
    """A second row for the file of the first image, with its objects where ``objects`` says so."""
    def change(folder: Path, data: dict[str, Any]) -> None:
        first = data["images"][0]
        data["images"].append({**first, "id": 77})
        if new["objects"]:
            data["annotations"] += [{**a, "id": 1000 + a["id"], "image_id": 77} for a in data["annotations"]
                                    if a["image_id"] == first["id"]]
    return change


def image(i: int, save: Callable[[Image.Image, Path], None]) -> Callable[[Path, dict[str, Any]], None]:
    """Another picture in the file of training image ``i`` (from 0)."""
    def change(folder: Path, data: dict[str, Any]) -> None:
        path = folder / "train2017" / data["images"][i]["file_name"]
        with Image.open(path) as picture:
            picture.load()
        save(picture, path)
    return change


def turned(picture: Image.Image, path: Path) -> None:
    """The file lies on its side, and EXIF says so; annotations are of the file as it lies."""
    exif = Image.Exif()
    exif[274] = 6
    picture.save(path, exif=exif)


def cut_short(picture: Image.Image, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


def run_lengths(size: list[int], filled: int) -> dict[str, Any]:
    return {"size": size, "counts": [5, 7, filled - 12]}


def compressed(height: int, width: int) -> dict[str, Any]:
    code = rle.encode(np.asfortranarray(np.eye(height, width, dtype=np.uint8)))
    return {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()}


def into_val(folder: Path, data: dict[str, Any]) -> None:
    shutil.copyfile(folder / "train2017" / "1.png", folder / "val2017" / "100.png")


def backslashes(folder: Path, data: dict[str, Any]) -> None:
    (folder / "train2017" / "a").mkdir()
    (folder / "train2017" / "1.png").rename(folder / "train2017" / "a" / "1.png")
    data["images"][0]["file_name"] = "a\\1.png"


def crowded(folder: Path, data: dict[str, Any]) -> None:
    data["annotations"] += [{"id": 900 + i, "image_id": 1, "category_id": 1, "bbox": [10 + i, 10, 5, 5]}
                            for i in range(10)]


def new_class(folder: Path, data: dict[str, Any]) -> None:
    data["categories"].append({"id": 60, "name": "hen"})


def change_val(**new: Any) -> Callable[[Path, dict[str, Any]], None]:
    def change(folder: Path, data: dict[str, Any]) -> None:
        val = read(folder, "val")
        val["categories"][1].update(new)
        write(folder, "val", val)
    return change


def other_ids(folder: Path, data: dict[str, Any]) -> None:
    """The names of training under other ids, in the validation data."""
    val = read(folder, "val")
    for row, key in [*((c, "id") for c in val["categories"]), *((a, "category_id") for a in val["annotations"])]:
        row[key] += row[key] == 23
    write(folder, "val", val)


def without(category: int, split: str) -> Callable[[Path, dict[str, Any]], None]:
    def change(folder: Path, data: dict[str, Any]) -> None:
        content = data if split == "train" else read(folder, "val")
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != category]
        if split == "val":
            write(folder, "val", content)
    return change


def heading(folder: Path, data: dict[str, Any]) -> None:
    """Both parts as Roboflow exports them, where the group has a class's name."""
    val = read(folder, "val")
    for content in (data, val):
        for category in content["categories"]:
            category["supercategory"] = "cat"
        content["categories"].insert(0, {"id": 0, "name": "cat", "supercategory": "none"})
    write(folder, "val", val)


BROKEN = [
    # What is no json of COCO's form.
    Broken("cut short", lambda f, d: json.dumps(d)[:500], "stop", "no valid json at line 1, column .*download or export"),
    Broken("empty file", lambda f, d: "", "stop", "no valid json"),
    Broken("pointer of Git LFS", lambda f, d: "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "stop",
           "Git LFS.*git lfs pull"),
    Broken("endless number", lambda f, d: '{"images": ' + "9" * 5000 + "}", "stop", "no valid json.*digits|has no list"),
    Broken("nested without end", lambda f, d: "[" * 100_000, "stop", "no valid json"),
    Broken("detections", lambda f, d: [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], "stop",
           "has no list 'images'.*COCO's results"),
    Broken("panoptic", lambda f, d: {**d, "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": []}]},
           "stop", "panoptic.*--dataset_file coco_panoptic"),
    Broken("captions", lambda f, d: {**d, "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}, "stop",
           "captions, without boxes"),
    Broken("LabelMe", lambda f, d: {"version": "5.0", "shapes": [], "imagePath": "1.png"}, "stop", "LabelMe.*convert"),
    Broken("VIA", lambda f, d: {"1.png123": {"filename": "1.png", "regions": []}}, "stop", "VIA project.*as COCO"),
    Broken("Label Studio", lambda f, d: [{"id": 1, "data": {}, "annotations": []}], "stop", "Label Studio"),
    Broken("images alone", lambda f, d: {"info": {}, "images": d["images"], "categories": d["categories"]}, "stop",
           "has no list 'annotations'.*images to predict on"),
    Broken("no images", lambda f, d: {**d, "images": [], "annotations": []}, "stop", "'images' is empty"),
    Broken("no categories", lambda f, d: {**d, "categories": []}, "stop", "'categories' is empty"),

    # Ids and what they refer to.
    Broken("annotation without id", row("annotations", 1, id=...), "stop", r"row 1 \(counted from 0\) of 'annotations'"),
    Broken("annotation ids twice", row("annotations", 1, id=1), "stop", "several rows with the same id: 1; give each"),
    Broken("image ids twice", row("images", 1, id=1), "stop", "'images' has several rows with the same id: 1"),
    Broken("image ids in words", row("images", 1, id="2"), "stop", "row 1 .* of 'images' has no 'id' that is a whole"),
    Broken("row that is none", lambda f, d: d["annotations"].append(None), "stop", "of 'annotations' has no 'id'"),
    Broken("category not listed", row("annotations", 0, category_id=2), "stop",
           "annotation id 1 has category_id 2, which 'categories' does not list; its ids are 1, 23, 56"),
    Broken("category in words", row("annotations", 0, category_id="cat"), "stop", "has category_id 'cat'"),
    Broken("image not listed", row("annotations", 0, image_id=900), "stop", "of image id 900, which 'images' does not"),
    Broken("annotation without image", row("annotations", 0, image_id=...), "stop", "has no 'image_id'; add it"),
    Broken("annotation id 0", row("annotations", 0, id=0), "fix", "id 0 becomes 22: pycocotools"),
    Broken("id beyond 64 bits", row("annotations", 0, id=10 ** 30), "stop", "has no 'id' that is a whole number"),

    # Images and categories.
    Broken("no file name", row("images", 0, file_name=...), "stop", "image id 1 has no 'file_name'"),
    Broken("file name that no file can have", row("images", 0, file_name="\ud800.png"), "stop", "that a file can have"),
    Broken("no width", row("images", 0, width=...), "stop", r"image id 1 \(1.png\) has width None"),
    Broken("height 0", row("images", 0, height=0), "stop", "has height 0; a whole number of pixels, at least 1"),
    Broken("no class name", row("categories", 0, name=None), "stop", "category id 1 has no 'name'"),
    Broken("two classes of one name", row("categories", 1, name="cat "), "stop", "categories 1, 23 are all called 'cat'"),
    Broken("heading among the classes", heading, "fix", "category 0 'cat' heads a group"),
    Broken("file twice, other objects", twin(objects=False), "stop", "1.png is listed as image ids 1, 77.*make them one"),
    Broken("file twice, same objects", twin(objects=True), "note", "listed as image ids 1, 77.*take all but one"),

    # Boxes.
    Broken("no box", row("annotations", 0, bbox=...), "stop", "annotation id 1 has no 'bbox'"),
    Broken("three numbers", row("annotations", 0, bbox=[1, 2, 3]), "stop", r"has bbox \[1, 2, 3\]; four finite"),
    Broken("NaN", row("annotations", 0, bbox=[1, 2, 3, float("nan")]), "stop", "nan.*four finite numbers"),
    Broken("infinite", row("annotations", 0, bbox=[1, 2, float("inf"), 4]), "stop", "inf.*four finite numbers"),
    Broken("numbers in words", row("annotations", 0, bbox=["1", "2", "3", "4"]), "stop", "four finite numbers"),
    Broken("zero width", row("annotations", 0, bbox=[5, 5, 0, 9]), "skip", "annotation id 1 has bbox .* is left out"),
    Broken("negative height", row("annotations", 0, bbox=[5, 5, 9, -3]), "skip", "annotation id 1 has bbox"),
    Broken("outside the image", row("annotations", 0, bbox=[70, 5, 9, 9]), "skip", "annotation id 1 has bbox .*64 x 48"),
    Broken("partly outside", row("annotations", 0, bbox=[50, 5, 20, 9]), "fix", "by up to 6 pixels, are clipped"),
    Broken("corners", boxes(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]), "stop",
           "look like corners.*Subtract left and top"),
    Broken("fractions", boxes(lambda b: [b[0] / WIDTH, b[1] / HEIGHT, b[2] / WIDTH, b[3] / HEIGHT]), "stop",
           "look like fractions.*multiply by the image's width and height"),
    Broken("of larger images", boxes(lambda b: [5 * b[0] + 60, 5 * b[1], 5 * b[2], 5 * b[3]]), "stop",
           "lie outside their images.*were resized"),
    Broken("object twice", lambda f, d: d["annotations"].append({**d["annotations"][0], "id": 500}), "note",
           "annotation id 500 has image, category and box of an earlier one"),
    Broken("iscrowd 2", row("annotations", 0, iscrowd=2), "stop", "has iscrowd 2; it is 0 or 1"),
    Broken("area in words", row("annotations", 0, area="9"), "stop", "has area '9'; a finite number"),
    Broken("no area", row("annotations", 0, area=...), "fix", "1 annotation without 'area', which becomes the box's"),
    Broken("negative area", row("annotations", 0, area=-5), "fix", "has area -5, for which evaluation would ignore it"),

    # Segmentations.
    Broken("two points", row("annotations", 0, segmentation=[[1, 1, 5, 5]]), "stop", "at least 3 points", masks=True),
    Broken("two points, unused", row("annotations", 0, segmentation=[[1, 1, 5, 5]]), "note", "not used without --masks"),
    Broken("half a point", row("annotations", 0, segmentation=[[1, 1, 5, 5, 9, 1, 2]]), "stop", "of at least 3", True),
    Broken("flat polygon", row("annotations", 0, segmentation=[1, 1, 5, 5, 9, 1]), "stop", "a list of polygons", True),
    Broken("polygon with NaN", row("annotations", 0, segmentation=[[1, 1, 5, 5, 9, float("nan")]]), "stop",
           "a list of polygons is needed", True),
    Broken("mask of another size", row("annotations", 0, segmentation=run_lengths([WIDTH, HEIGHT], WIDTH * HEIGHT)),
           "stop", r"run lengths of size \[64, 48\], in an image of height 48 and width 64", True),
    Broken("mask too long", row("annotations", 0, segmentation=run_lengths([HEIGHT, WIDTH], 2 * WIDTH * HEIGHT)),
           "stop", "'counts' fill it", True),
    Broken("compressed mask of another size", row("annotations", 0, segmentation=compressed(WIDTH, WIDTH)), "stop",
           "'counts' fill it", True),
    Broken("no mask", row("annotations", 0, segmentation=...), "stop", "1 of 21 objects have no segmentation", True),

    # Files.
    Broken("missing file", lambda f, d: (f / "train2017/1.png").unlink(), "stop", "1 of the 8 images .*are not in"),
    Broken("upper case", row("images", 0, file_name="1.PNG"), "stop", "but 1.png is: upper and lower case differ"),
    Broken("another ending", row("images", 0, file_name="1.jpg"), "stop", "but 1.png is: the ending differs"),
    Broken("another folder", row("images", 0, file_name="images/1.png"), "stop", "but 1.png is: the folder differs"),
    Broken("backslashes", backslashes, "stop", "write / instead"),
    Broken("no image folder", lambda f, d: shutil.rmtree(f / "train2017"), "stop", "image folder .* is not there"),
    Broken("file of 0 bytes", lambda f, d: (f / "train2017/1.png").write_bytes(b""), "stop", "1 image file of 0 bytes"),
    Broken("file that is not listed", lambda f, d: shutil.copyfile(f / "train2017/1.png", f / "train2017/new.png"),
           "note", "1 image file in .* that no part lists(.|\n)*new.png"),
    Broken("file cut short", image(0, cut_short), "stop", "1.png .*cannot be read.*cut short", pixels=True),
    Broken("file that is no image", lambda f, d: (f / "train2017/1.png").write_text("<html>"), "stop",
           "1.png .*cannot be read: cannot identify"),
    Broken("another size", image(0, lambda p, f: p.resize((32, 24)).save(f)), "stop",
           r"another width and height(.|\n)*1.png \(image id 1\): 32 x 24 upright, annotated 64 x 48"),
    Broken("turned by EXIF", image(0, turned), "stop", r"before the rotation(.|\n)*EXIF orientation 6"),
    Broken("16 bits", image(0, lambda p, f: Image.fromarray(np.asarray(p.convert("L")).astype(np.uint16) * 256).save(f)),
           "note", "1 image: 16 bits a channel", pixels=True),
    Broken("palette", image(0, lambda p, f: p.convert("P").save(f)), "note", "1 image: palette", pixels=True),
    Broken("transparency", image(0, lambda p, f: p.convert("RGBA").save(f)), "note", "1 image: with transp", pixels=True),
    Broken("CMYK", image(0, lambda p, f: p.convert("CMYK").save(f, "JPEG")), "note", "1 image: CMYK", pixels=True),
    Broken("same image under two names", lambda f, d: shutil.copyfile(f / "train2017/1.png", f / "train2017/2.png"),
           "note", r"has under another name(.|\n)*2.png \(image id 2\) is 1.png", pixels=True),

    # What the parts have in common.
    Broken("training image in val", into_val, "note", r"1 image of val is in train(.|\n)*100.png .*is train: 1.png"),
    Broken("class unknown to training", change_val(id=24, name="wolf"), "stop", "categories 24 'wolf' are not among"),
    Broken("class of another id", other_ids, "note", "categories 24 'dog' have other ids in the training .*names are"),
    Broken("class of another name", change_val(name="wolf"), "stop", "categories 23 'wolf' are not among"),
    Broken("class that is not learnt", without(23, "train"), "note", "1 class with objects in val.*train: dog"),
    Broken("class that is not scored", without(23, "val"), "note", "1 class with objects in train, but none in val: dog"),
    Broken("class without objects", new_class, "note", "1 class without objects: hen"),
    Broken("more objects than queries", crowded, "note", "1 image with more than 10 objects, up to 13.*--num_queries 13"),
]
