"""datasets/from_python.py: any torch Dataset does what a data set from files does, and what is wrong is said by item."""
import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from small_formats import make_awkward
from torch.utils.data import DataLoader, TensorDataset

from datasets import build_dataset, build_evaluators, collate, from_dataset
from datasets.drawn import Drawn
from datasets.images import read_image
from datasets.sampler import TrainingBatches
from datasets.transforms import Preprocessing, make_transforms
from detr.structures import Category

NAMES = ["cat", "background", "two words"]


class Made(torch.utils.data.Dataset):
    """Items by hand; ``change(item)`` may spoil the second."""

    def __init__(self, change=None):
        pixels = torch.arange(3 * 48 * 64, dtype=torch.uint8).reshape(3, 48, 64)
        first = pixels, {"boxes": torch.tensor([[10., 5, 30, 35], [0, 0, 5.5, 6]]), "labels": torch.tensor([2, 0]),
                         "masks": torch.zeros(2, 48, 64, dtype=torch.bool)}
        first[1]["masks"][0, 5:35, 10:30] = True
        first[1]["masks"][1, 0:6, 0:5] = True
        second = [Image.new("L", (50, 40), 7), {"boxes": [[1, 2, 11, 22], [0, 0, 50, 40]], "labels": [1, 1],
                                                "iscrowd": torch.tensor([0, 1]), "area": torch.tensor([150.5, 2000])}]
        if change:
            change(second)
        third = torch.full((3, 20, 30), 0.5), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        self.items = [first, tuple(second), third]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_what_a_dataset_from_python_is(capsys):
    opened = from_dataset(Made(), NAMES)
    assert "3 images (1 without objects, kept), 3 objects of 3 classes" in capsys.readouterr().out
    assert opened.categories == [Category(i, i, name) for i, name in enumerate(NAMES)] and opened.num_classes == 3
    assert list(opened.ids) == [1, 2, 3] and opened.sizes.tolist() == [[48, 64], [40, 50], [20, 30]]
    image, target = opened[0]
    assert image.mode == "RGB" and image.size == (64, 48) and image.getpixel((1, 0))[0] == 1
    assert target["boxes"].tolist() == [[10, 5, 30, 35], [0, 0, 5.5, 6]] and target["labels"].tolist() == [2, 0]
    assert target["area"].tolist() == [600, 33] and target["orig_size"].tolist() == [48, 64]
    image, target = opened[1]
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (7, 7, 7)
    assert target["boxes"].tolist() == [[1, 2, 11, 22]] and target["area"].tolist() == [150.5]      # without the crowd
    assert from_dataset(Made(), NAMES, ignore_regions=True).target(1)["ignore"].tolist() == [[0, 0, 50, 40]]
    assert opened[2][0].getpixel((0, 0)) == (128, 128, 128) and len(opened[2][1]["boxes"]) == 0
    assert [row["iscrowd"] for row in opened.coco.anns.values()] == [0, 0, 0, 1]
    assert opened.coco.anns[1]["bbox"] == [10, 5, 20, 30]


def test_masks_and_other_channels():
    made = Made(lambda item: item[1].update(masks=torch.ones(2, 40, 50)))
    made.items[2][1]["masks"] = torch.zeros(0, 20, 30)
    opened = from_dataset(made, NAMES, return_masks=True)
    assert torch.equal(opened.target(0)["masks"], made.items[0][1]["masks"]) and opened.target(1)["masks"].all()
    made.items[1][1]["masks"] = None
    with pytest.raises(TypeError, match="item 1: masks is a NoneType, of which no tensor can be made"):
        from_dataset(made, NAMES, return_masks=True)
    with pytest.raises(ValueError, match=r"item 1: the target has no 'masks', which --masks needs"):
        from_dataset(Made(), NAMES, return_masks=True)
    five = [(torch.rand(5, 8, 9), {"boxes": [], "labels": []})]
    image, _ = from_dataset(five, NAMES, channels=5)[0]
    assert image.dtype == torch.uint8 and torch.equal(image, (five[0][0] * 255).round().to(torch.uint8))
    grey, _ = from_dataset([(Image.new("RGB", (4, 4)), {"boxes": [], "labels": []})], NAMES, channels=1)[0]
    assert grey.mode == "L"
    with pytest.raises(ValueError, match=r"item 0: image is \[5, 8, 9\]; \[3, height, width\] is needed"):
        from_dataset(five, NAMES)


def test_it_trains_and_is_scored_as_others_are():
    opened = from_dataset(Made(), NAMES, make_transforms("train", Preprocessing(32, 64)))
    batches = TrainingBatches(opened.sizes, opened.transforms, 1, 0, 1, 0)
    images, targets = next(iter(DataLoader(Drawn(opened), batch_sampler=batches, collate_fn=collate)))
    assert images.tensors.shape[:2] == (1, 3) and targets[0]["boxes"].max() <= 1
    judge, = build_evaluators(opened)
    judge.update({i: {"scores": torch.ones(len(row["boxes"])), **row} for i, row in (
        (i, {key: opened.target(i - 1)[key] for key in ("boxes", "labels")}) for i in (1, 2, 3))})
    assert judge.summarize()["coco_eval_bbox"][0] == pytest.approx(1)


def test_each_image_has_its_own_boxes_whatever_the_ids():
    ids = {1: 9, 2: 8, 3: 12, 4: 7}                                         # by grey value
    made = [(Image.new("RGB", (30, 20), (value,) * 3),
             {"boxes": [[value, 0, value + 1, 2]], "labels": [0], "image_id": id}) for value, id in ids.items()]
    opened = from_dataset(made, NAMES)
    assert list(opened.ids) == [7, 8, 9, 12]
    for i in range(4):
        image, target = opened[i]
        value = image.getpixel((0, 0))[0]
        assert target["boxes"].tolist() == [[value, 0, value + 1, 2]]
        assert target["image_id"].tolist() == [ids[value]] == [opened.ids[i]]
    made[3] = (Image.new("RGB", (31, 20)), made[3][1])
    with pytest.raises(ValueError, match=r"item 3: its image is now \[20, 31\]"):
        opened[0]
    made[3] = ("x", made[3][1])
    with pytest.raises(TypeError, match="item 3: image is a str"):
        opened[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_16_bits_is_as_from_a_file(tmp_path, channels):
    ramp = Image.fromarray(np.array([[0, 800, 1500, 65535]], np.uint16))
    ramp.save(tmp_path / "ramp.png")
    image, _ = from_dataset([(ramp, {"boxes": [], "labels": []})], NAMES, channels=channels)[0]
    assert np.asarray(image).reshape(4, channels)[:, 0].tolist() == [0, 3, 6, 255]
    assert image.tobytes() == read_image(tmp_path / "ramp.png", channels=channels).tobytes()


def test_images_that_lie_on_their_side_are_refused(tmp_path):
    exif = Image.Exif()
    for orientation in (6, 1):
        exif[0x0112] = orientation
        Image.new("RGB", (30, 20)).save(tmp_path / f"{orientation}.jpg", exif=exif)
    side, upright = ([(Image.open(tmp_path / f"{name}.jpg"), {"boxes": [], "labels": []})] for name in (6, 1))
    with pytest.raises(ValueError, match=r"item 0: image has EXIF orientation 6, .*ImageOps.exif_transpose\(image\) in "
                                         r"the data set, boxes must be of the upright picture"):
        from_dataset(side, NAMES)
    assert from_dataset(upright, NAMES).sizes.tolist() == [[20, 30]]
    stored = [(Image.fromarray(np.array(image)), target) for image, target in side]         # the other remedy
    assert from_dataset(stored, NAMES).sizes.tolist() == [[20, 30]]


def test_it_equals_the_same_data_from_files(tmp_path):
    plain = build_dataset("train", data=make_awkward(tmp_path / "data"))
    names = [category.name for category in plain.categories]
    opened = from_dataset(plain, names)                                     # whose items are of that convention
    for i in range(len(plain)):
        a, b = plain.target(i), opened.target(i)
        assert (a["boxes"] - b["boxes"]).abs().max() < 1e-3 if len(a["boxes"]) else len(b["boxes"]) == 0
        assert all(torch.equal(a[key], b[key]) for key in ("labels", "image_id", "area", "size"))
        assert plain[i][0].tobytes() == opened[i][0].tobytes()


def test_in_workers():
    opened = from_dataset(Made(), NAMES)
    assert pickle.loads(pickle.dumps(opened)).target(0)["boxes"].tolist() == [[10, 5, 30, 35], [0, 0, 5.5, 6]]
    found = list(DataLoader(opened, None, num_workers=1))
    assert [len(target["labels"]) for _, target in found] == [2, 1, 0]


def put(key, value):
    return lambda item: item[1].update({key: value})


@pytest.mark.parametrize("change, message", [
    (lambda item: item.__setitem__(0, "x.png"), "item 1: image is a str; give a PIL image or a tensor"),
    (lambda item: item.__setitem__(0, torch.rand(40, 50, 3)), r"item 1: image is \[40, 50, 3\].*permute\(2, 0, 1\)"),
    (lambda item: item.__setitem__(0, torch.randn(3, 40, 50)), "item 1: image has values from -.*0..1 is needed"),
    (lambda item: item.__setitem__(0, torch.zeros(3, 40, 50, dtype=torch.int64)), "item 1: image is torch.int64; uint8"),
    (lambda item: item.__setitem__(0, Image.fromarray(np.full((40, 50), 0.5, np.float32))),
     "item 1: image is of Pillow's mode F; .*floating-point numbers of unknown range; convert it"),
    (lambda item: item.__setitem__(0, Image.fromarray(np.full((40, 50), 70000, np.int32))),
     "item 1: image is of Pillow's mode I; its grey values, 70000 to 70000, are not of 8 or 16 bits"),
    (lambda item: item.__setitem__(1, []), r"item 1 is a tuple; a pair \(image, target\)"),
    (lambda item: item[1].pop("labels"), "item 1: the target has no 'labels', but boxes, iscrowd, area; add it"),
    (put("boxes", torch.zeros(2, 5)), r"item 1: boxes is \[2, 5\]; \[N, 4\] is needed"),
    (put("boxes", "abc"), "item 1: boxes is a str, of which no tensor"),
    (put("boxes", [[1, 2, 3, float("nan")], [0, 0, 1, 1]]), "item 1: boxes has values that are no finite numbers"),
    (put("boxes", [[10, 2, 3, 4], [0, 0, 1, 1]]), "item 1: boxes row 0 is .*corners x1, y1, x2, y2 are needed"),
    (put("labels", [1, 3]), r"item 1: labels has 3, but there are 3 names: 0..2 is needed; .*count from 1: subtract 1"),
    (put("labels", [1, -1]), "item 1: labels has -1"),
    (put("labels", [1.0, 0.0]), "item 1: labels is torch.float32; whole numbers are needed"),
    (put("labels", [1]), r"item 1: labels is \[1\], but boxes has 2 rows"),
    (put("area", [1]), r"item 1: area is \[1\], but boxes has 2 rows"),
    (put("iscrowd", [0, 2]), "item 1: iscrowd has 2; it is 0 or 1"),
    (put("image_id", 1), "item 1: image_id 1 is that of item 0, too"),
    (put("image_id", [1, 2]), r"item 1: image_id is \[1, 2\]; one whole number"),
])
def test_what_is_wrong_is_said_by_item(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        from_dataset(Made(change), NAMES)


def test_other_mistakes():
    with pytest.raises(TypeError, match="names is .*; give the name of each class"):
        from_dataset(Made(), [1, 2])
    with pytest.raises(ValueError, match="the data set has no items"):
        from_dataset(TensorDataset(torch.zeros(0, 3)), NAMES)
    made = Made()
    opened = from_dataset(made, NAMES)
    made.items[2] = (torch.zeros(3, 9, 9), copy.copy(made.items[2][1]))
    with pytest.raises(ValueError, match=r"item 2: its image is now \[9, 9\].* was \[20, 30\] before.*transforms"):
        opened[2]
