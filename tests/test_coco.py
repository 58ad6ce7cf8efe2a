"""datasets/coco.py: annotations become the right targets, and what is wrong with them is said by name."""
import copy
import gc
import importlib.util
import json
import pickle
import sys
import types
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from small_data import damaged
from torch.utils.data import DataLoader

from datasets import build_dataset, collate
from datasets.annotations import COCO_CATEGORIES, class_table, num_classes
from datasets.coco import CocoDetection
from datasets.flat import Numbers, Segmentations, Strings
from datasets.transforms import Preprocessing, make_transforms
from detr.structures import Category

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def annotation(id, image_id=3, category_id=1, bbox=(10, 5, 20, 30), **more):
    return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), "area": 500.5,
            "iscrowd": 0, **more}


@pytest.fixture
def data():
    """Two images, of which the one listed first has the greater id; three classes with gaps in their ids."""
    return {"images": [{"id": 7, "file_name": "b.png", "width": 50, "height": 40},
                       {"id": 3, "file_name": "a.png", "width": 64, "height": 48}],
            "categories": [{"id": 56, "name": "cow"}, {"id": 1, "name": "cat"}, {"id": 23, "name": "dog"}],
            "annotations": [annotation(101), annotation(102, category_id=56), annotation(103, category_id=23)]}


@pytest.fixture
def dataset(tmp_path):
    """``dataset(json or text)`` writes it with the two images in COCO's layout, and opens it."""
    for name, size in (("a.png", (64, 48)), ("b.png", (50, 40))):
        (tmp_path / "val2017").mkdir(exist_ok=True)
        Image.effect_noise(size, 50).convert("RGB").save(tmp_path / "val2017" / name)
    (tmp_path / "annotations").mkdir()

    def write_and_open(content, **options):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "annotations" / "instances_val2017.json").write_text(text)
        return build_dataset("val", tmp_path, **options)

    return write_and_open


def test_what_a_dataset_is(dataset, data):
    opened = dataset(data)
    assert opened.ids == [3, 7] and len(opened) == 2
    assert opened.categories == [Category(0, 1, "cat"), Category(1, 23, "dog"), Category(2, 56, "cow")]
    assert opened.num_classes == 3
    image, target = opened[0]
    assert image.size == (64, 48) and image.mode == "RGB"
    assert target["labels"].tolist() == [0, 2, 1] and target["boxes"].tolist() == [[10, 5, 30, 35]] * 3
    assert target["area"].tolist() == [500.5] * 3 and target["iscrowd"].tolist() == [0, 0, 0]
    assert target["orig_size"].tolist() == target["size"].tolist() == [48, 64] and target["image_id"].tolist() == [3]
    assert {key: value.dtype for key, value in target.items()} == {
        "boxes": torch.float32, "area": torch.float32, "labels": torch.int64, "iscrowd": torch.int64,
        "image_id": torch.int64, "orig_size": torch.int64, "size": torch.int64}


def test_images_without_objects_are_kept(dataset, data, capsys):
    opened = dataset(data, return_masks=False)
    assert "2 images (1 without objects, kept), 3 objects of 3 classes\n" in capsys.readouterr().out
    _, target = opened[1]
    assert target["image_id"].tolist() == [7] and target["boxes"].shape == (0, 4)
    assert all(target[key].shape == (0,) for key in ("labels", "area", "iscrowd"))
    data["annotations"] = []
    opened = dataset(data, return_masks=True, transforms=make_transforms("train", Preprocessing(32, 64)))
    images, targets = next(iter(DataLoader(opened, batch_size=2, collate_fn=collate)))
    assert images.tensors.shape[:2] == (2, 3) and not images.mask.all()
    assert [target["boxes"].shape for target in targets] == [(0, 4)] * 2 and targets[0]["masks"].shape[0] == 0
    assert len(opened.coco.anns) == 0


def test_boxes_are_clipped_and_what_is_no_object_is_left_out_and_counted(dataset, data, capsys):
    data["annotations"] = [annotation(1, bbox=(-5, -6, 20, 30)), annotation(2, bbox=(50, 40, 100, 100)),
                           annotation(3, bbox=(5, 5, 0, 10)), annotation(4, bbox=(5, 5, 10, -3)),
                           annotation(5, bbox=(70, 5, 10, 10)), annotation(6, bbox=(1, 1, 0, 0)),
                           annotation(7, iscrowd=1), annotation(8)]
    opened = dataset(data)
    assert opened.target(0)["boxes"].tolist() == [[0, 0, 15, 24], [50, 40, 64, 48], [10, 5, 30, 35]]
    said = capsys.readouterr().out
    assert "left out of the targets: 1 crowd annotation (annotation 7)" in said
    assert "4 boxes without width or height inside the image (annotation 3, annotation 4, annotation 5, ...)" in said
    assert len(said.splitlines()) == 1
    assert len(opened.coco.anns) == 8 and capsys.readouterr().out == ""             # all are scored, nothing chatters


def test_iscrowd_and_area_may_be_missing(dataset, data, capsys):
    for row in data["annotations"]:
        del row["iscrowd"]
    del data["annotations"][1]["area"]
    opened = dataset(data)
    assert opened.target(0)["area"].tolist() == [500.5, 600, 500.5]
    assert "1 annotation without 'area', which became the box's (annotation 102)" in capsys.readouterr().out
    assert opened.coco.anns[102]["area"] == 600 and opened.coco.anns[102]["iscrowd"] == 0


def test_an_annotation_id_of_0_would_never_be_found(dataset, data, capsys):
    data["annotations"][0]["id"] = 0
    opened = dataset(data)
    assert "annotation id 0 became 104" in capsys.readouterr().out
    assert sorted(opened.coco.anns) == [102, 103, 104]


def test_labels_of_coco_are_its_ids_and_others_have_no_gaps():
    coco = class_table(COCO_CATEGORIES)
    assert num_classes(coco) == 91 and len(coco) == 80 and all(row.label == row.id for row in coco)
    renamed = class_table({**COCO_CATEGORIES, 90: "broom"})
    assert num_classes(renamed) == 80 and renamed[-1] == Category(79, 90, "broom")
    assert class_table({5: "b", 0: "a"}) == [Category(0, 0, "a"), Category(1, 5, "b")]


def test_a_given_class_table_is_used_or_the_difference_named(dataset, data):
    table = [Category(0, 1, "cat"), Category(1, 2, "hen"), Category(2, 23, "dog"), Category(3, 56, "cow")]
    opened = dataset(data, categories=table)
    assert opened.categories == table and opened.num_classes == 4
    assert opened.target(0)["labels"].tolist() == [0, 3, 2]
    with pytest.raises(ValueError, match=r"instances_val2017.json: categories 23 'dog' are not in the class table.*"
                                         r"1 'cat', 56 'cow'.*same ids and names"):
        dataset(data, categories=[Category(0, 1, "cat"), Category(1, 56, "cow")])


def test_the_same_names_with_other_ids_are_taken_by_name(dataset, data, capsys):
    """A checkpoint of another format's numbering: labels are the checkpoint's, ids in outputs the data's."""
    own = dataset(data)
    turned = [Category(label, 100 + label, category.name) for label, category in enumerate(reversed(own.categories))]
    taken = dataset(data, categories=turned)
    said = capsys.readouterr().out
    assert "the same names, by which they are taken" in said
    assert [(c.label, c.name) for c in taken.categories] == [(c.label, c.name) for c in turned]
    assert {c.name: c.id for c in taken.categories} == {c.name: c.id for c in own.categories}
    name = {c.label: c.name for c in own.categories}, {c.label: c.name for c in taken.categories}
    for i in range(len(own)):
        assert [name[0][label] for label in own.target(i)["labels"].tolist()] == \
            [name[1][label] for label in taken.target(i)["labels"].tolist()]
    assert set(own.coco.getCatIds()) == {c.id for c in taken.categories}


def test_masks_from_polygons_and_run_lengths(dataset, data):
    square = np.zeros((48, 64), dtype=np.uint8, order="F")
    square[5:35, 10:30] = 1
    compressed = rle.encode(square)
    compressed["counts"] = compressed["counts"].decode()
    counts = [10 * 48 + 5] + [30, 18] * 19 + [30, 13 + 34 * 48]                 # down the columns, off and on in turn
    halves = [[10, 5, 20, 5, 20, 35, 10, 35], [20, 5, 30, 5, 30, 35, 20, 35]]
    for row, segmentation in zip(data["annotations"], (halves, compressed, {"size": [48, 64], "counts": counts})):
        row["segmentation"] = segmentation
    _, target = dataset(data, return_masks=True)[0]
    assert target["masks"].dtype == torch.bool
    assert torch.equal(target["masks"], torch.from_numpy(square).bool().expand(3, -1, -1))
    data["annotations"][1]["segmentation"] = []
    with pytest.raises(ValueError, match="1 of 3 objects have no segmentation.*annotation 102.*without --masks"):
        dataset(data, return_masks=True)


def test_targets_are_the_callers_own(dataset, data):
    opened = dataset(data)
    opened.target(0)["boxes"].zero_()
    opened.target(0)["orig_size"].zero_()
    assert opened.target(0)["boxes"].tolist() == [[10, 5, 30, 35]] * 3
    assert opened.target(0)["orig_size"].tolist() == [48, 64]
    assert len(pickle.dumps(opened)) < 10_000                                   # what each spawned worker receives


@pytest.mark.parametrize("change, message", [
    (lambda d: d.pop("annotations"), "has no list 'annotations'.*'images', 'annotations' and 'categories'"),
    (lambda d: d.pop("images"), "has no list 'images'"),
    (lambda d: d.update(categories={}), "has no list 'categories'"),
    (lambda d: d.update(categories=[]), "'categories' is empty"),
    (lambda d: d.update(images=[], annotations=[]), "'images' is empty"),
    (lambda d: d["annotations"][1].pop("bbox"), "annotation id 102 has no 'bbox'; add it"),
    (lambda d: d["annotations"][1].pop("category_id"), "annotation id 102 has no 'category_id'"),
    (lambda d: d["annotations"][1].pop("image_id"), "annotation id 102 has no 'image_id'"),
    (lambda d: d["annotations"][1].pop("id"), r"row 1 \(counted from 0\) of 'annotations' has no 'id'"),
    (lambda d: d["images"].append("a.png"), r"row 2 \(counted from 0\) of 'images' has no 'id'"),
    (lambda d: d["annotations"][1].update(category_id=4),
     "annotation id 102 has category_id 4, which 'categories' does not list; its ids are 1, 23, 56; correct it"),
    (lambda d: d["annotations"][1].update(category_id=[1]), r"annotation id 102 has category_id \[1\]"),
    (lambda d: d["annotations"][1].update(image_id=99), "annotation id 102 is of image id 99, which 'images' does not"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 3]), r"annotation id 102 has bbox \[1, 2, 3\]; four finite"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), "annotation id 102 has bbox.*nan"),
    (lambda d: d["annotations"][1].update(area=None), "annotation id 102 has area None"),
    (lambda d: d["annotations"][1].update(iscrowd=2), "annotation id 102 has iscrowd 2; it is 0 or 1"),
    (lambda d: d["annotations"][1].update(id=101), "'annotations' has several rows with the same id: 101"),
    (lambda d: d["images"][1].update(id=7), "'images' has several rows with the same id: 7"),
    (lambda d: d["images"][1].pop("file_name"), "image id 3 has no 'file_name'"),
    (lambda d: d["images"][1].pop("width"), r"image id 3 \(a.png\) has width None; a whole number of pixels"),
    (lambda d: d["categories"][1].pop("name"), "category id 1 has no 'name'"),
])
def test_bad_annotations_are_named(dataset, data, change, message):
    with pytest.raises(ValueError, match=rf"instances_val2017\.json: .*{message}"):
        dataset(damaged(data, change))


def test_a_json_cut_short_is_located(dataset, data):
    text = json.dumps(data)
    with pytest.raises(ValueError, match=rf"instances_val2017\.json: no valid json at line 1, column \d+ \(character "
                                         rf"\d+ of {len(text) // 2}\).*cut short, download or export it again"):
        dataset(text[:len(text) // 2])
    with pytest.raises(ValueError, match="no valid json"):
        dataset("")
    with pytest.raises(ValueError, match="has no list 'images'"):
        dataset("[1, 2]")


def test_missing_folders_and_files_are_named_with_the_layout(dataset, data, tmp_path):
    dataset(data)
    with pytest.raises(FileNotFoundError, match=r"--coco_path .*nowhere: there is no such folder.*\n.*train2017/"):
        build_dataset("val", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"image folder .*train2017 is not there.*\n.*train2017/  val2017/"):
        build_dataset("train", tmp_path)
    (tmp_path / "train2017").mkdir()
    with pytest.raises(FileNotFoundError, match=r"instances_train2017\.json are not there.*\n.*\n.*annotations/"):
        build_dataset("train", tmp_path)
    with pytest.raises(ValueError, match="--dataset_file voc: .*there are coco"):
        build_dataset("val", tmp_path, "voc")
    with pytest.raises(ValueError, match="split 'test': there are 'train' and 'val'"):
        build_dataset("test", tmp_path)


def test_missing_images_are_named_at_once(dataset, data, tmp_path):
    dataset(data)
    (tmp_path / "val2017" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 images that .*instances_val2017\.json lists are not in "
                                                r".*val2017: a.png \(image id 3\); copy them there"):
        dataset(data)


def test_images_may_lie_in_folders_of_their_own(dataset, data, tmp_path):
    (tmp_path / "val2017" / "more").mkdir()
    (tmp_path / "val2017" / "a.png").rename(tmp_path / "val2017" / "more" / "a.png")
    data["images"][1]["file_name"] = "more/a.png"
    assert dataset(data)[0][0].size == (64, 48)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_with_its_id(dataset, data, tmp_path, workers):
    path = tmp_path / "val2017" / "a.png"
    loader = DataLoader(dataset(data, transforms=make_transforms("val")), collate_fn=collate, num_workers=workers,
                        sampler=[0])
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(OSError, match=r"a\.png .*cannot be read.*\(image id 3 of .*instances_val2017\.json\)"):
        next(iter(loader))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png is not there.*\(image id 3 of"):
        next(iter(loader))


# -- regions to be ignored --------------------------------------------------------------------------------------------

def test_regions_to_be_ignored(dataset, data, capsys):
    data["annotations"] = [annotation(1), annotation(2, bbox=(50, 40, 100, 100), iscrowd=1),
                           annotation(3, bbox=(-5, 1, 10, 10), ignore=1), annotation(4, bbox=(70, 5, 10, 10), iscrowd=1),
                           annotation(5, image_id=7, bbox=(1, 2, 3, 4), iscrowd=1), annotation(6, ignore=0)]
    opened = dataset(data)
    assert "ignore" not in opened.target(0) and len(opened.target(0)["labels"]) == 2
    assert "left out of the targets: 1 annotation with \"ignore\": 1" in capsys.readouterr().out
    opened = dataset(data, ignore_regions=True)
    assert opened.target(0)["boxes"].tolist() == [[10, 5, 30, 35]] * 2
    assert opened.target(0)["ignore"].tolist() == [[50, 40, 64, 48], [0, 1, 5, 11]]             # clipped as boxes are
    assert opened.target(1)["ignore"].tolist() == [[1, 2, 4, 6]] and len(opened.target(1)["boxes"]) == 0
    assert "3 regions to be ignored" in capsys.readouterr().out
    opened.target(0)["ignore"].zero_()
    assert opened.target(0)["ignore"].tolist()[0] == [50, 40, 64, 48]
    assert [row["iscrowd"] for row in opened.coco.anns.values()] == [0, 1, 1, 1, 1, 0]
    data["annotations"] = []
    assert dataset(data, ignore_regions=True).target(0)["ignore"].shape == (0, 4)


def test_what_is_marked_as_difficult(dataset, data, capsys):
    data["annotations"][1]["difficult"] = 1
    assert dataset(data).target(0)["labels"].tolist() == [0, 2, 1]
    assert "marked as difficult" not in capsys.readouterr().out
    opened = dataset(data, remove_difficult=True, ignore_regions=True)
    assert opened.target(0)["labels"].tolist() == [0, 1] and opened.target(0)["ignore"].tolist() == [[10, 5, 30, 35]]
    assert "1 object marked as difficult" in capsys.readouterr().out
    assert [row["iscrowd"] for row in opened.coco.anns.values()] == [0, 1, 0]
    del data["annotations"][1]["difficult"]
    dataset(data, remove_difficult=True)
    assert "0 objects marked as difficult" in capsys.readouterr().out


# -- memory -----------------------------------------------------------------------------------------------------------

def python_objects(opened) -> int:
    """How many objects of Python hang on a data set, each of which a worker would copy in time; tensors count as one."""
    seen, waiting = set(), [vars(opened)]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (type, types.FunctionType, types.ModuleType)):
            continue
        seen.add(id(thing))
        waiting += gc.get_referents(thing) if not isinstance(thing, torch.Tensor) else []
    return len(seen)


def test_memory_of_python_does_not_grow_with_the_data(dataset, data, tmp_path):
    segmentations = [[[1.5, 2, 3, 4, 5, 6.25]], {"size": [48, 64], "counts": [48 * 64]},
                     rle.encode(np.ones((48, 64), np.uint8, order="F"))]
    segmentations[2]["counts"] = segmentations[2]["counts"].decode()
    counts, sent = [], []
    for n in (1, 50):
        grown = copy.deepcopy(data)
        for i in range(n):
            (tmp_path / "val2017" / f"{i}.png").write_bytes(b"")
            grown["images"].append({"id": 100 + i, "file_name": f"{i}.png", "width": 64, "height": 48})
            grown["annotations"] += [annotation(1000 + 10 * i + k, 100 + i, iscrowd=k // 3, segmentation=segmentation)
                                     for k, segmentation in enumerate([*segmentations, segmentations[0]])]
        grown["annotations"] = grown["annotations"][3:]
        opened = dataset(grown, return_masks=True, ignore_regions=True)
        counts.append(python_objects(opened))
        sent.append(len(ForkingPickler.dumps(opened)))                  # what a worker is sent that is started anew
    assert counts[0] == counts[1] and sent[1] - sent[0] < 200 < sent[0]


def test_flat_lists_are_lists():
    numbers, names = Numbers([5, -3, 2**60]), Strings(["a", "", "ünï/x.png", "\ud800"])
    assert numbers == [5, -3, 2**60] and numbers[2] == 2**60 and numbers.index(-3) == 1 and numbers[:2] == [5, -3]
    assert names == ["a", "", "ünï/x.png", "\ud800"] and names[-2] == "ünï/x.png" and names[1:3] == ["", "ünï/x.png"]
    assert names.index("") == 1 and "b" not in names and len(Strings([])) == 0 and list(Numbers([])) == []
    with pytest.raises(IndexError):
        names[4]
    polygons = [[0.1, 1 / 3, 5, 6, 1e-9, 7], [1, 2, 3, 4, 5, 6, 7, 8]]
    code = rle.encode(np.eye(5, dtype=np.uint8, order="F"))
    flat = Segmentations([polygons, code, polygons[:1], {"size": [2, 3], "counts": [1, 4, 1]}])
    assert flat[0] == polygons and flat[2] == polygons[:1] and flat[1] == code and len(flat) == 4
    assert rle.decode(flat[3]).tolist() == [[0, 1, 1], [1, 1, 0]]
    assert flat[1:3] == [code, polygons[:1]]


def test_the_benchmark_of_memory_reads_the_same_both_ways(tmp_path):
    spec = importlib.util.spec_from_file_location("benchmark_memory", SCRIPTS / "benchmark_memory.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    objects = script.write_json(tmp_path / "a.json", 12)
    flat, plain = script.Flat(tmp_path, tmp_path / "a.json", return_masks=True), script.Plain(tmp_path / "a.json")
    items = [flat[i] for i in range(12)]
    assert items == [plain[i] for i in range(12)] and sum(item[2] for item in items) == objects > 70
    if sys.platform == "linux":
        assert 0.01 < script.proportional_memory() < 100


# -- images kept in memory --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers, context", [(0, None), (2, "fork"), (1, "spawn")])
def test_cached_images_are_the_same_bits(dataset, data, tmp_path, capsys, workers, context):
    """In every kind of worker, and with no file left to read."""
    transforms = make_transforms("val", Preprocessing(48, 64))
    plain = dataset(data, transforms=transforms)
    want = [collate([plain[i]]) for i in range(2)]
    assert "--cache_mode" not in capsys.readouterr().out
    cached = dataset(data, transforms=transforms, cache_mode=True)
    sizes = [(tmp_path / "val2017" / name).stat().st_size for name in plain.files]
    said = capsys.readouterr().out
    assert f"val2017: reading 2 files, {sum(sizes) / 1e9:.3g} GB, into memory (--cache_mode)" in said
    assert f"val2017: 2/2 files, {sum(sizes) / 1e9:.3g} GB" in said
    for name in plain.files:
        (tmp_path / "val2017" / name).unlink()
    found = list(DataLoader(cached, 1, collate_fn=collate, num_workers=workers, multiprocessing_context=context))
    assert len(found) == 2
    for (a, a_targets), (b, b_targets) in zip(want, found):
        assert torch.equal(a.tensors, b.tensors) and torch.equal(a.mask, b.mask)
        assert all(torch.equal(value, b_targets[0][key]) for key, value in a_targets[0].items())
    with pytest.raises(FileNotFoundError, match=r"a\.png is not there"):
        plain[0]


def test_what_cannot_be_cached_is_the_error_of_reading_it(dataset, data, tmp_path, monkeypatch):
    path = tmp_path / "val2017" / "a.png"
    whole, plain = path.read_bytes(), dataset(data)

    def messages(damage):
        damage()
        with pytest.raises(OSError) as read:
            plain[0]
        with pytest.raises(OSError) as cached:
            dataset(data, cache_mode=True)[0]
        assert type(cached.value) is type(read.value) and str(cached.value) == str(read.value)
        return str(read.value)

    assert "cannot be read" in messages(lambda: path.write_bytes(whole[:len(whole) // 2]))
    assert "(0 bytes) is not in a format" in messages(lambda: path.write_bytes(b""))
    monkeypatch.setattr(CocoDetection, "_check_files", lambda self: None)       # a file that goes once that was checked
    message = messages(path.unlink)
    assert "a.png is not there; correct the path" in message and "(image id 3 of " in message


def test_a_picture_of_another_size_is_refused_and_a_turned_one_is_not(dataset, data, tmp_path):
    opened, path = dataset(data), tmp_path / "val2017" / "a.png"
    Image.new("RGB", (48, 64)).save(path)
    with pytest.raises(ValueError, match=r"a\.png has 48 x 64 pixels once its EXIF orientation is applied, but .*json "
                                         r"says 64 x 48 for image id 3.*correct width"):
        opened[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64)).save(path, exif=exif)
    assert opened[0][0].size == (64, 48)


# -- other numbers of channels ----------------------------------------------------------------------------------------

@pytest.fixture
def five(dataset, data, tmp_path):
    """The same with arrays of five channels; ``five(**options)`` opens it."""
    pixels = {name: np.random.RandomState(1).randint(0, 256, (height, width, 5)).astype(np.uint8)
              for name, width, height in (("a.npy", 64, 48), ("b.npy", 50, 40))}
    for image in data["images"]:
        image["file_name"] = image["file_name"].replace(".png", ".npy")
        np.save(tmp_path / "val2017" / image["file_name"], pixels[image["file_name"]])
    return lambda **options: (dataset(data, channels=5, **options), pixels)


@pytest.mark.parametrize("cache_mode", [False, True])
def test_images_with_other_channels(five, tmp_path, cache_mode):
    preprocessing = Preprocessing(48, 64, (0.5,) * 5, (0.25,) * 5)
    opened, pixels = five(cache_mode=cache_mode)
    transformed, _ = five(cache_mode=cache_mode, transforms=make_transforms("val", preprocessing))
    if cache_mode:
        (tmp_path / "val2017" / "a.npy").unlink()
    image, target = opened[0]
    assert image.dtype == torch.uint8 and torch.equal(image, torch.from_numpy(pixels["a.npy"]).permute(2, 0, 1))
    assert target["boxes"].tolist() == [[10, 5, 30, 35]] * 3
    images, targets = collate([transformed[0], transformed[1]])
    assert images.tensors.shape == (2, 5, 48, 64) and targets[0]["size"].tolist() == [48, 64]
    want = (torch.from_numpy(pixels["a.npy"]).permute(2, 0, 1) / 255 - 0.5) / 0.25              # of its size already
    assert torch.allclose(images.tensors[0], want, atol=1e-6)


def test_grey_images(dataset, data):
    image, _ = dataset(data, channels=1)[0]
    assert image.mode == "L" and image.size == (64, 48)


def test_files_with_other_channels_than_asked_for(five, dataset, data, tmp_path):
    with pytest.raises(OSError, match=r"a.npy has 5 channels, not the 3 of --in_channels.*\(image id 3 of .*json\)"):
        dataset(data)[0]
    opened, pixels = five()
    np.save(tmp_path / "val2017" / "a.npy", pixels["a.npy"].transpose(1, 0, 2))
    with pytest.raises(ValueError, match=r"a.npy has 48 x 64 pixels .* says 64 x 48 for image id 3"):
        opened[0]


def test_real_data(real_data):
    """COCO's own annotations keep their ids in 91 slots; the cell data has boxes without width and height."""
    mini, cells = real_data / "coco_mini", real_data / "bccd"
    coco = build_dataset("val", mini)
    assert coco.num_classes == 91 and len(coco) == 79 and coco.ids == sorted(coco.coco.imgs)
    assert {category.id: category.name for category in coco.categories} == COCO_CATEGORIES
    want = sum(not row["iscrowd"] for row in coco.coco.anns.values())
    assert sum(len(coco.target(i)["labels"]) for i in range(len(coco))) == want == 619
    opened = CocoDetection(cells / "val2017", cells / "annotations" / "instances_val2017.json")
    assert opened.num_classes == 3 and [category.label for category in opened.categories] == [0, 1, 2]
    assert len(opened.coco.anns) - sum(len(opened.target(i)["labels"]) for i in range(len(opened))) == 1
    with pytest.raises(ValueError, match="1137 of 1137 objects have no segmentation"):
        build_dataset("val", cells, return_masks=True)
