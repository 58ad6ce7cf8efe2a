"""datasets/check.py, scripts/check_data.py: what is wrong with data is said before anything is trained on them."""
import copy
import json
import random
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from broken_data import BROKEN, HEIGHT, NAMES, WIDTH, Broken, boxes, break_it, json_of, read, sound, write
from PIL import Image

import main
from datasets import check as check_module
from datasets.check import Report, check
from datasets.coco import CocoDetection
from datasets.formats import recognise

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "check_data.py"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def looked(folder: Path, **options) -> Report:
    return check(recognise(folder), 10, **{"cache": False, **options})


def opened(folder: Path, masks: bool = False) -> CocoDetection:
    return CocoDetection(folder / "train2017", json_of(folder, "train"), return_masks=masks)


def is_sound(dataset: CocoDetection, masks: bool = False) -> None:
    """Every item is such that no loss and no index can fail on it."""
    for i in range(len(dataset)):
        image, target = dataset[i]
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        assert ((0 <= target["labels"]) & (target["labels"] < dataset.num_classes)).all()
        assert target["boxes"].isfinite().all() and (x1 > x0).all() and (y1 > y0).all()
        assert (x0 >= 0).all() and (x1 <= image.width).all() and (y1 <= image.height).all()
        assert len(target["boxes"]) == len(target["labels"]) == len(target["area"])
        assert not masks or target["masks"].shape == (len(target["labels"]), image.height, image.width)


def test_sound_data(tmp_path):
    report = looked(sound(tmp_path / "data"), pixels=True, masks=True)
    assert {finding.kind for finding in report.findings} == {"images without objects"}
    assert [*report.splits] == ["train", "val"] and report.splits["train"].images == 8
    assert sum(report.splits["train"].classes.values()) == len(read(tmp_path / "data", "train")["annotations"])
    is_sound(opened(tmp_path / "data", True), True)


def test_names_differ():
    assert len({broken.name for broken in BROKEN}) == len(BROKEN) >= 35


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_broken_data(tmp_path, broken: Broken):
    """The finding has its action and message, and names the part; what does not stop gives a data set without faults."""
    folder = break_it(tmp_path / "data", broken)
    report = looked(folder, pixels=broken.pixels, masks=broken.masks)
    found = [finding for finding in report.findings
             if finding.action == broken.action and re.search(broken.says, "\n".join([finding.message, *finding.rows]))]
    assert found and len({finding.split for finding in found}) == len(found), report.table()
    assert found[0].split in ("train", "val") and found[0].count >= 1 and found[0].kind in report.table()
    if broken.action != "stop":
        assert report.stops == []
        is_sound(opened(folder, broken.masks), broken.masks)
    else:
        assert "Training would stop" in report.table() and re.search(broken.says.split("(.|")[0], report.brief())


@pytest.mark.parametrize("broken", [broken for broken in BROKEN if broken.action == "stop" and not broken.masks
                                    and not broken.name.startswith("class ")], ids=lambda broken: broken.name)
def test_what_stops_does_not_train(tmp_path, broken: Broken):
    """The data set itself refuses, naming a file; nothing is left to an index or an assertion."""
    folder = break_it(tmp_path / "data", broken)
    with pytest.raises((ValueError, OSError), match=r"instances_train2017\.json|\.png|train2017"):
        is_sound(opened(folder))


@pytest.mark.parametrize("name", ["file that is no image", "another size", "turned by EXIF"])
def test_pixels_show_what_headers_show(tmp_path, name):
    folder = break_it(tmp_path / "data", next(broken for broken in BROKEN if broken.name == name))
    header, pixels = (looked(folder, pixels=pixels) for pixels in (False, True))
    finding, = header.stops
    same, = pixels.stops
    assert (finding.kind, finding.count, finding.rows) == (same.kind, same.count, same.rows)
    assert finding.message == same.message or name == "file that is no image"
    assert looked(folder, headers=False).stops == []
    assert header.headers and "Images were not opened" in looked(folder, headers=False).table()
    assert "Of images, the headers alone were read" in looked(sound(tmp_path / "sound")).table()


def test_all_faults_are_said_at_once(tmp_path):
    folder = sound(tmp_path / "data")
    train = read(folder, "train")
    train["annotations"][0]["category_id"] = 5
    del train["annotations"][1]["bbox"], train["annotations"][2]["bbox"], train["images"][3]["width"]
    train["annotations"][4]["area"] = None
    write(folder, "train", train)
    with pytest.raises(ValueError) as error:
        opened(folder)
    lines = str(error.value).splitlines()
    assert len(lines) == 4 and all(line.startswith(str(json_of(folder, "train"))) for line in lines)
    assert "(2 in all: annotation id 2 (1.png), annotation id 3 (1.png))" in str(error.value)
    assert {finding.count for finding in looked(folder).stops} == {1, 2}


# -- what must not be taken for a fault -------------------------------------------------------------------------------

def with_boxes(folder: Path, made: list[list[float]], size: tuple[int, int] = (WIDTH, HEIGHT)) -> Report:
    sound(folder)
    train = read(folder, "train")
    for image in train["images"]:
        image.update(width=size[0], height=size[1])
    train["annotations"] = [{"id": i, "image_id": 1 + i % 8, "category_id": 1, "bbox": box}
                            for i, box in enumerate(made, 1)]
    write(folder, "train", train)
    return looked(folder, headers=False)


def uniform(n: int, low, high) -> np.ndarray:
    return np.random.RandomState(1).uniform(low, high, (n, 4))


@pytest.mark.parametrize("made, size", [
    ([[2, 2, 60, 44]] * 40, (WIDTH, HEIGHT)),                               # as large as the image
    ([[1, 1, 64, 48]] * 40, (WIDTH, HEIGHT)),                               # and counted from 1
    ([[30, 20, 50, 40]] * 4, (WIDTH, HEIGHT)),                              # carelessly large, too few to judge
    ([*[[30, 20, 50, 40]] * 30, *[[50, 9, 5, 5]] * 10], (WIDTH, HEIGHT)),   # many, but one that corners cannot be
    (uniform(200, (-5, -5, 1, 1), (60, 44, 25, 25)).tolist(), (WIDTH, HEIGHT)),         # cropped: many reach beyond
    ([[0, 0, 1, 1]] * 40, (4, 4)),                                          # tiny images
    (uniform(40, (0, 0, 0.2, 0.2), (1, 1, 1, 1)).tolist(), (2, 2)),
    ([*[[5, 5, 9, 9]] * 40, [0.25, 0.25, 0.5, 0.5]], (WIDTH, HEIGHT)),      # a speck
    ([[5, 5, 9, 9]], (WIDTH, HEIGHT)),
    ([], (WIDTH, HEIGHT)),
])
def test_honest_boxes(tmp_path, made, size):
    assert [finding.message for finding in with_boxes(tmp_path / "data", made, size).stops] == []


@pytest.mark.parametrize("change", ["corners", "fractions"])
@pytest.mark.parametrize("faults", [0, 1])
def test_other_units_are_found_among_faults(tmp_path, change, faults):
    """In 300 boxes of all sizes, one of which may be without width."""
    made = uniform(300, (0, 0, 2, 2), (40, 30, 24, 18)).tolist()
    unit = {"corners": lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]],
            "fractions": lambda b: [b[0] / WIDTH, b[1] / HEIGHT, b[2] / WIDTH, b[3] / HEIGHT]}[change]
    made = [unit(box) for box in made]
    made[:faults] = [[5, 5, 0, 9]] * faults
    assert [finding.kind for finding in with_boxes(tmp_path / "data", made).stops] == [f"boxes as {change}"]


@pytest.mark.parametrize("name", ["bccd", "coco_mini"])
def test_real_data(real_data, name):
    report = check(recognise(real_data / name), 100, pixels=True, masks=name == "coco_mini", cache=False)
    assert report.stops == []
    skipped = {(finding.split, finding.kind, finding.count) for finding in report.findings if finding.action == "skip"}
    assert skipped == ({("train", "boxes without width or height", 1), ("val", "boxes without width or height", 1)}
                       if name == "bccd" else set())
    assert re.search(r"RBC +2381 +967" if name == "bccd" else r"person +167 +117", report.table())


def test_the_same_numbers_as_training(tmp_path, capsys):
    """What is left out and kept is what the data set does."""
    broken = next(broken for broken in BROKEN if broken.name == "zero width")
    folder = break_it(tmp_path / "data", broken)
    report, dataset = looked(folder), opened(folder)
    summary = report.splits["train"]
    assert f"8 images ({summary.empty} without objects, kept), {sum(summary.classes.values())} objects" in \
        capsys.readouterr().out
    found = np.bincount(np.concatenate([dataset.target(i)["labels"].numpy() for i in range(8)]), minlength=3)
    assert found.tolist() == list(summary.classes.values()) and list(summary.classes) == list(NAMES.values())


# -- any damage -------------------------------------------------------------------------------------------------------

JUNK = [None, "x", "", -1, 0, 1.5, 1e300, float("nan"), float("inf"), 10 ** 30, True, [], {}, [[]], [1], "\ud800", "a\0b",
        {"id": 1}, [None], 2 ** 63, -2 ** 63]


def damage(content, dice: random.Random):
    """Somewhere within, a value replaced, taken out or put in twice."""
    at, key = None, None
    while isinstance(content, (dict, list)) and content and (at is None or dice.random() < 0.9):
        at, key = content, dice.choice(list(content) if isinstance(content, dict) else range(len(content)))
        content = content[key]
    how = dice.randrange(4)
    if how == 0:
        del at[key]
    elif how == 1 and isinstance(at, list):
        at.append(copy.deepcopy(at[key]))
    else:
        at[key] = copy.deepcopy(dice.choice(JUNK))


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_gets_through(tmp_path, seed, capsys):
    """Whatever a value becomes, the data are refused by a message that names the file, or are in order."""
    folder = sound(tmp_path / "data")
    base = read(folder, "train")
    dice = random.Random(seed)
    refused = 0
    for _ in range(60):
        content = copy.deepcopy(base)
        for _ in range(dice.choice((1, 1, 2, 5))):
            damage(content, dice)
        write(folder, "train", content)
        masks = dice.random() < 0.5
        report = looked(folder, masks=masks)                                    # never fails
        try:
            dataset = opened(folder, masks)
        except (ValueError, OSError) as error:
            assert "train2017" in str(error), error
            assert report.stops, error
            refused += 1
        else:
            is_sound(dataset, masks)
    assert 15 < refused < 60


# -- other formats ----------------------------------------------------------------------------------------------------

def yolo(folder: Path, text: str) -> Path:
    for split in ("train", "val"):
        (folder / split / "images").mkdir(parents=True)
        (folder / split / "labels").mkdir()
        for i, name in enumerate("abc"):
            pixels = np.random.RandomState(10 * i + len(split)).randint(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / "images" / f"{name}.png")
            (folder / split / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n1 0.3 0.3 0.2 0.2\n")
    (folder / "train" / "labels" / "a.txt").write_text(text)
    (folder / "data.yaml").write_text("train: train/images\nval: val/images\nnames: [cat, dog]\n")
    return folder


@pytest.mark.parametrize("text, action, says", [
    ("0 0.5 0.5 0.2 0.2\n7 0.5 0.5 0.2 0.2\n", "stop", "a.txt.*line 2.*7"),
    ("0 0.5 0.5 0.2\n", "stop", "a.txt.*line 1"),
    ("0 32 24 10 10\n", "stop", "a.txt.*line 1"),
    ("0 0.5 0.5 0 0.2\n", "skip", "a.txt.*line 1"),
    ("0 0.99 0.5 0.2 0.2\n", "fix", "a.txt.*line 1"),
])
def test_yolo(tmp_path, text, action, says):
    report = looked(yolo(tmp_path / "data", text))
    found = [finding for finding in report.findings if finding.action == action
             and re.search(says, "\n".join([finding.message, *finding.rows]))]
    assert len(found) == 1 and found[0].split == "train", report.table()


def test_classes_with_nearly_the_same_name(tmp_path):
    folder = yolo(tmp_path / "data", "0 0.5 0.5 0.2 0.2\n")
    for names, alike in (("[red cell, Red_Cell, dog]", True), ("[red cell, redcell, dog]", False)):
        (folder / "data.yaml").write_text(f"train: train/images\nval: val/images\nnames: {names}\n")
        found = [finding for finding in looked(folder).findings if finding.kind == "classes with nearly the same name"]
        assert len(found) == alike
        assert not alike or (found[0].action == "note" and "'Red_Cell' and 'red cell'" in found[0].message)


def test_csv(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(f"filename,xmin,ymin,xmax,ymax,class\n{split}.png,5,5,5,20,cat\n"
                                               f"{split}.png,5,5,20,20,cat\n")
        Image.effect_noise((WIDTH, HEIGHT), 50 if split == "val" else 60).convert("RGB").save(tmp_path / f"{split}.png")
    found = [finding for finding in looked(tmp_path).findings if finding.action == "skip"]
    assert [finding.split for finding in found] == ["train", "val"] and "train.csv, line 2" in found[0].message


def one_folder(folder: Path) -> Path:
    """The images of all parts in ``images/``, one that none lists, and one that is of the test part."""
    sound(folder)
    (folder / "images").mkdir()
    for split in ("train", "val"):
        for path in (folder / f"{split}2017").iterdir():
            path.rename(folder / "images" / path.name)
        (folder / f"{split}2017").rmdir()
    for name in ("test", "new"):
        shutil.copyfile(folder / "images" / "1.png", folder / "images" / f"{name}.png")
    val = read(folder, "val")
    write(folder, "test", val | {"images": [{**val["images"][0], "id": 900, "file_name": "test.png"}], "annotations": []})
    return folder


def unlisted(report: Report) -> list[tuple[str, list[str]]]:
    return [(finding.split, finding.rows) for finding in report.findings
            if finding.kind == "image files that are not listed"]


@pytest.mark.parametrize("parts", [("train", "val", "test"), ("train", "val")])
def test_a_folder_of_all_parts(tmp_path, parts):
    """What the test part lists is listed, whether that is looked through or not; a file is said once."""
    folder = one_folder(tmp_path / "data")
    assert unlisted(looked(folder, parts=parts)) == [("train", ["new.png"])]
    json_of(folder, "test").write_text("{")                                 # then nobody knows whose it is
    assert unlisted(looked(folder, parts=("train", "val"))) == []


def test_files_that_no_part_lists_in_other_formats(tmp_path):
    folder = yolo(tmp_path / "yolo", "0 0.5 0.5 0.2 0.2\n")
    (folder / "train.txt").write_text("train/images/a.png\ntrain/images/b.png\n")
    (folder / "data.yaml").write_text("train: train.txt\nval: val/images\nnames: [cat, dog]\n")
    assert unlisted(looked(folder)) == [("train", ["c.png"])]
    assert unlisted(looked(folder, cache=True)) and looked(folder, cache=True).cached
    (folder / "train" / "images" / "c.png").rename(folder / "train" / "images" / "d.png")
    assert unlisted(looked(folder, cache=True)) == [("train", ["d.png"])]   # a report is kept for these files alone

    folder = tmp_path / "voc"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for i, split in enumerate(("train", "val", "test", "")):
        Image.effect_noise((WIDTH, HEIGHT), 40 + i).save(folder / "JPEGImages" / f"{i}.jpg")
        if split:
            (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{i}\n")
            (folder / "Annotations" / f"{i}.xml").write_text(
                f"<annotation><filename>{i}.jpg</filename><object><name>cat</name><bndbox><xmin>5</xmin><ymin>5</ymin>"
                f"<xmax>20</xmax><ymax>20</ymax></bndbox></object></annotation>")
    assert unlisted(looked(folder)) == unlisted(looked(folder, parts=("train", "val"))) == [("train", ["3.jpg"])]


# -- parts ------------------------------------------------------------------------------------------------------------

def test_the_test_part_does_not_stop_a_training(tmp_path, capsys):
    """Its faults are notes: the yaml of many an export names one that is not there."""
    folder = yolo(tmp_path / "data", "0 0.5 0.5 0.2 0.2\n")
    with open(folder / "data.yaml", "a") as file:
        file.write("test: test/images\n")
    assert run(folder) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Nothing stops training." in said and "Training does not use this part" in said and "test/images" in said
    assert looked(folder, cache=True).findings == looked(folder, cache=True).findings
    assert looked(folder, cache=True).cached                                # and this is known of it
    broken = sound(tmp_path / "coco")
    write(broken, "test", read(broken, "val") | {"images": [{"id": 1}]})
    (broken / "test2017").mkdir()
    assert {finding.action for finding in looked(broken).findings if finding.split == "test"} == {"note"}


@pytest.mark.parametrize("split, what", [("train", "training"), ("val", "validation")])
def test_a_part_that_is_missing(tmp_path, split, what):
    folder = sound(tmp_path / "data")
    json_of(folder, split).unlink()
    finding, = looked(folder).stops
    assert finding.split == split
    assert finding.message == (f"there is no part '{split}' for {what}; add it: annotations/instances_{split}2017.json "
                               f"with the images in {split}2017/")
    assert run(folder, "--quick") == 1


# -- before a training ------------------------------------------------------------------------------------------------

def test_a_training_reads_headers(tmp_path, capsys):
    """And of the test part nothing but which files it lists."""
    folder = one_folder(tmp_path / "data")
    settings = SimpleNamespace(model=SimpleNamespace(queries=100, in_channels=3, masks=False),
                               data=SimpleNamespace(data=str(folder), coco_path=None))
    main.check_data(settings)
    said = capsys.readouterr().out
    assert "COCO, train, val; nothing stops training" in said and "1 (new.png)" in said
    Image.new("RGB", (20, 30)).save(folder / "images" / "100.png")
    with pytest.raises(ValueError, match=r"(?s)1 fault to correct.*100.png \(image id 100\): 20 x 30 upright"):
        main.check_data(settings)


def test_how_far_a_look_has_got(monkeypatch, capsys):
    """Nothing in the first seconds; then a line every ten."""
    times = iter([100.0, 102.0, 103.5, 110.0, 114.0])
    monkeypatch.setattr(check_module.time, "monotonic", lambda: next(times))
    tell = check_module.HowFar("image headers read")
    for done in (16, 32, 48, 64, 80):
        tell(done, 160)
    assert capsys.readouterr().err.splitlines() == ["image headers read: 48 of 160, 8 s to go",
                                                    "image headers read: 80 of 160, 14 s to go"]


# -- reports that are kept --------------------------------------------------------------------------------------------

def test_a_report_is_kept_for_the_same_files_alone(tmp_path):
    folder = sound(tmp_path / "data")

    def again(**options) -> bool:
        return looked(folder, cache=True, **options).cached

    first = looked(folder, cache=True)
    kept = looked(folder, cache=True)
    assert not first.cached and kept.cached and kept._replace(cached=False) == first
    assert "from the check of the same files before" in kept.brief()
    assert not again(pixels=True) and again(pixels=True) and not again(masks=True)
    assert not check(recognise(folder), 11).cached
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "train2017" / "1.png")
    assert not again() and again()
    (folder / "val2017" / "100.png").rename(folder / "val2017" / "other.png")
    assert not again() and "missing image files" in {finding.kind for finding in looked(folder, cache=True).stops}
    (folder / "val2017" / "other.png").rename(folder / "val2017" / "100.png")
    assert again()
    write(folder, "val", read(folder, "val") | {"info": {}})
    assert not again() and again()


def test_what_headers_show_is_kept_until_the_file_changes(tmp_path):
    folder = sound(tmp_path / "data")
    file = folder / "train2017" / "1.png"
    content = file.read_bytes()
    file.write_bytes(b"<html>")
    first, kept = looked(folder, cache=True), looked(folder, cache=True)
    assert [finding.kind for finding in kept.stops] == ["images that cannot be read"] and kept.cached
    assert kept._replace(cached=False) == first
    assert looked(folder, cache=True, headers=False).stops == []            # another look, with a report of its own
    file.write_bytes(content)
    assert looked(folder, cache=True).stops == []


def test_a_cache_that_cannot_be_used_is_no_fault(tmp_path, monkeypatch):
    folder = sound(tmp_path / "data")
    want = looked(folder, cache=True)
    file, = check_module._cache_folder().glob("*.json")
    for content in ("", "{}", "[1]", '{"format": 1, "splits": {"a": 2}, "findings": [], "pixels": 1}'):
        file.write_text(content)
        assert looked(folder, cache=True) == want
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert looked(folder, cache=True) == looked(folder, cache=True) == want


def test_files_outside_the_folder_are_never_kept(tmp_path):
    folder = sound(tmp_path / "data")
    train = read(folder, "train")
    (folder / "train2017" / "1.png").rename(tmp_path / "1.png")
    train["images"][0]["file_name"] = "../../1.png"
    write(folder, "train", train)
    assert looked(folder, cache=True).stops == [] and not looked(folder, cache=True).cached
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").unlink()
    assert [finding.kind for finding in looked(folder, cache=True).stops] == ["missing image files"]
    (tmp_path / "1.png").write_bytes(content)
    assert looked(folder, cache=True).stops == []                   # which copying the file mends


# -- the script -------------------------------------------------------------------------------------------------------

def run(*arguments) -> int:
    script = runpy.run_path(str(SCRIPT))
    return script["main"](script["get_args_parser"]().parse_args([*map(str, arguments)]))


def test_the_script(tmp_path, capsys):
    folder = sound(tmp_path / "data")
    assert run(folder, "--json", tmp_path / "report.json") == 0
    said = capsys.readouterr().out
    assert "Nothing stops training.\n" in said
    assert "train 8 images, 1 without objects (used), 21 objects of 3 classes" in said
    assert json.loads((tmp_path / "report.json").read_text())["splits"]["val"]["images"] == 4
    assert run(folder) == 0 and "report on the same files from before" in capsys.readouterr().out
    assert run(folder, "--no_cache") == 0 and "from before" not in capsys.readouterr().out
    train = read(folder, "train")
    boxes(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])(folder, train)
    write(folder, "train", train)
    assert run("--coco_path", folder, "--quick", "--show", 1) == 1
    said = capsys.readouterr().out
    assert "boxes as corners" in said and "Training would stop: 1 fault" in said and "- and " in said
    for arguments in ([], [folder, "--coco_path", folder], [folder, "--num_queries", 0]):
        with pytest.raises(ValueError, match="one data set is needed|--num_queries 0: at least 1"):
            run(*arguments)


def test_the_script_as_a_command(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "nowhere")]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 1 and "error: " in said.stderr and "nowhere: there is no such file or folder" in said.stderr
