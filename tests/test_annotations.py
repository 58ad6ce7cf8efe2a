"""datasets/annotations.py, datasets/examination.py: what is mended, what is said of it, and what run lengths are."""
import copy
import json

import numpy as np
import pytest
import torch
from broken_data import read, sound
from pycocotools import mask as rle

from datasets.annotations import checked, parse_json, read_annotations, read_json
from datasets.examination import EXAMPLES, examine, is_whole, printable
from datasets.examination import _is_run_lengths as is_run_lengths
from datasets.examination import _pixels as pixels


@pytest.fixture
def data(tmp_path):
    return read(sound(tmp_path / "data"), "train")


def test_sound_data_stay_as_they_are(data):
    before = copy.deepcopy(data)
    assert checked(data, "a.json", masks=True) == (before, []) and data == before


def test_what_is_mended(data):
    """Missing values alone; boxes are no one's to change, since scores are against the file's own."""
    rows = data["annotations"]
    for row in rows:
        del row["iscrowd"]
    del rows[3]["area"]
    rows[4].update(area=-1, id=0)
    rows[5]["bbox"] = [50, 5, 20, 9]
    rows[6]["iscrowd"] = 1
    boxes = copy.deepcopy([row["bbox"] for row in rows])
    mended, notes = checked(data, "a.json")
    assert mended is data and [row["bbox"] for row in rows] == boxes
    assert [row["iscrowd"] for row in rows] == [int(i == 6) for i in range(len(rows))]
    assert rows[3]["area"] == boxes[3][2] * boxes[3][3] and rows[4]["area"] == boxes[4][2] * boxes[4][3]
    assert rows[4]["id"] == len(rows) + 1
    assert notes == [
        "left out of the targets: 1 crowd annotation (annotation 7)",
        "1 annotation without 'area', which became the box's (annotation 4)",
        "1 negative area, which became the box's (annotation 0)",
        f"annotation id 0 became {len(rows) + 1}, because pycocotools counts an object with id 0 as never found",
        "1 box reaches beyond the image, by up to 6 pixels, and is clipped (annotation 6)"]


def test_examining_changes_nothing(data):
    del data["annotations"][0]["area"], data["annotations"][1]["bbox"]
    before = copy.deepcopy(data)
    assert {finding.action for finding in examine(data).findings} == {"stop", "fix"} and data == before


def test_rows_are_called_by_where_they_come_from(data):
    data["annotations"][1].update(source="labels/1.txt, line 2", category_id=9)
    with pytest.raises(ValueError, match=r"^data.yaml: labels/1.txt, line 2 has category_id 9, which 'categories'"):
        checked(data, "data.yaml")


def test_many_rows_are_counted_and_a_few_named(data):
    data["annotations"] = [{"id": i, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4]} for i in range(1, 1001)]
    finding, = [finding for finding in examine(data).findings if finding.action == "stop"]
    assert finding.count == 1000 and len(finding.rows) == EXAMPLES
    assert "(1000 in all: annotation id 1 (1.png)" in finding.line()


def test_the_same_boxes_are_objects_as_in_training(data):
    """In float32, with torch's arithmetic: a box that vanishes there is none here either."""
    made = torch.from_numpy(np.random.RandomState(0).uniform(-20, 80, (4000, 4))).round(decimals=1)
    made[::7, 2] = 1e-7
    data["annotations"] = [{"id": i, "image_id": 1, "category_id": 1, "bbox": box}
                           for i, box in enumerate(made.tolist(), 1)]
    corners = made.float()
    corners[:, 2:] += corners[:, :2]
    corners = torch.minimum(corners.clamp(min=0), torch.tensor([64.0, 48.0, 64.0, 48.0]))
    want = (corners[:, 2:] > corners[:, :2]).all(1)
    assert examine(data).objects.kept.tolist() == want.tolist() and 0 < want.sum() < len(want)


def test_ids_at_the_ends_of_64_bits(data):
    data["annotations"][0]["id"], data["annotations"][1]["id"] = 2 ** 63 - 2, 0
    data["images"][0]["id"] = -2 ** 63
    for row in data["annotations"]:
        row["image_id"] = -2 ** 63 if row["image_id"] == 1 else row["image_id"]
    checked(data, "a.json")
    assert data["annotations"][1]["id"] == 2 ** 63 - 1
    assert is_whole(3) and not any(map(is_whole, (True, 2 ** 63, 3.0, "3", None)))


@pytest.mark.parametrize("content, message", [
    (b"", "line 1, column 1"), (b'{"a": [1, 2', r"column 12 \(character 11 of 11\).*cut short"),
    (b"\xff\xfe{}", "no valid json"),
    (b"version https://git-lfs.github.com/spec/v1", "Git LFS"), (b"[" * 200_000, "no valid json"),
    (b"9" * 10_000, "no valid json"),
])
def test_what_is_no_json(content, message):
    with pytest.raises(ValueError, match=rf"^a\.json: .*{message}"):
        parse_json(content, "a.json")


def test_reading(tmp_path, data):
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(data).encode())                    # with a byte order mark
    assert read_json(file) == data and read_annotations(file) == (data, [])
    with pytest.raises(FileNotFoundError, match="b.json are not there"):
        read_json(tmp_path / "b.json")


def test_run_lengths_are_those_of_pycocotools():
    """Of all kinds of masks, compressed by pycocotools and not; any character too many or too few is noticed."""
    random = np.random.RandomState(0)
    for _ in range(300):
        height, width = random.randint(1, 90, 2).tolist()
        mask = np.asfortranarray(random.rand(height, width) < random.choice([0, 0.001, 0.1, 0.5, 1]), dtype=np.uint8)
        code = rle.encode(mask)
        assert pixels(code["counts"]) == height * width
        assert is_run_lengths({"size": [height, width], "counts": code["counts"].decode()}, [height, width], True)
        assert not is_run_lengths({"size": [height, width], "counts": code["counts"] + b"1"}, [height, width], True)
        assert not is_run_lengths({"size": [width, height + 1], "counts": code["counts"]}, [height, width], False)
        runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], np.r_[0, mask.ravel("F")], [2]])))).tolist()
        runs[0] -= 1                                                    # the pixel before, which is off
        assert is_run_lengths({"size": [height, width], "counts": runs}, [height, width], True)
        assert not is_run_lengths({"size": [height, width], "counts": [*runs, 1]}, [height, width], True)
    assert pixels(b"") == pixels(b"zzzz") == pixels(b"\xff") == pixels(b"P" * 12) == -1


def test_text_that_any_terminal_takes():
    assert printable("a\ud800\n\0b é") == "a\\ud800\\n\\0b é"
