"""The script that prints shares of padding, on images whose shares can be told by heart."""
import json
import re
from pathlib import Path

import pytest

from datasets.transforms import Preprocessing, train_transforms
from scripts import padded_share

WIDE, TALL = (20, 40), (40, 20)                                     # height, width; half of a batch of both is padding


@pytest.fixture(scope="module")
def script():
    return padded_share


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Wide and tall images in turn: eight of each to train with, two of each to validate."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "annotations").mkdir()
    for split, count in (("train", 16), ("val", 4)):
        rows = []
        for i, (height, width) in enumerate([WIDE, TALL] * (count // 2)):
            rows.append({"id": i + 1, "file_name": f"{i}.png", "height": height, "width": width})
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(
            {"images": rows[::-1], "annotations": [], "categories": [{"id": 1, "name": "nothing"}]}))
    return folder


def shares(script, data: Path, capsys, line: str) -> list[dict[str, float]]:
    """What the script prints: for each table, way to form batches -> share."""
    script.main(script.get_args_parser().parse_args(["--coco_path", str(data), *line.split()]))
    tables: list[dict[str, float]] = []
    for row in capsys.readouterr().out.splitlines():
        if row.endswith("; padded share"):
            tables.append({})
        elif found := re.fullmatch(r"    (\w+) +([\d.]+)%(?:   [\d.]+ of random)?", row):
            tables[-1][found[1]] = float(found[2]) / 100
    return tables


def test_wide_and_tall_images(script, data, capsys):
    line = "--batch_size 2 --image_size 10 --max_size 20 --no_multi_scale --no_random_crop"
    train, training, val = shares(script, data, capsys, line)
    for table in (train, val, training):
        assert table["file"] == 0.5 and table["bucketed"] == 0
        assert 0.1 < table["random"] < 0.5                          # of two images, about half are of two kinds
    assert train["equal"] == val["equal"] == 0 and "equal" not in training
    assert list(train) == ["file", "random", "bucketed", "equal"]


def test_training_counts_what_the_transforms_draw(script, data, capsys):
    line = "--split train --batch_size 2 --image_size 16 --max_size 30 --epochs 2"
    _, training = shares(script, data, capsys, line)
    assert 0 < training["bucketed"] < training["random"] / 2
    assert shares(script, data, capsys, line)[1] == training
    assert shares(script, data, capsys, line + " --seed 7")[1] != training
    assert all(share != training[name] for name, share in shares(script, data, capsys, line + " --epochs 1")[1].items())
    assert shares(script, data, capsys, line + " --least_scale 1 --no_random_crop")[1]["bucketed"] == 0
    _, few = shares(script, data, capsys, line + " --images 5 --no_multi_scale --no_random_crop")
    assert few["bucketed"] in (0, 0.125, 0.25)                      # of the 2 batches, at most one is of both kinds


def test_training_shares_of_two_scales_by_hand(script):
    """Squares of 10 or 20 pixels, two in a batch: of one of each, 2 * 400 pixels have 500 of images."""
    transforms = train_transforms(Preprocessing(20, 60), scales=(10, 20), crop=False)

    def possible(mixed_batches):
        return [300 * mixed / (800 * (mixed + large) + 200 * (3 - mixed - large))
                for mixed in mixed_batches for large in range(4 - mixed)]

    found = []
    for seed in range(20):
        shares, seconds = script.training_shares([(30, 30)] * 6, transforms, 2, 1, seed)
        assert shares["random"] in possible(range(4)) and shares["bucketed"] in possible(range(2)) and seconds > 0
        found.append((shares["random"], shares["bucketed"]))
    random, bucketed = map(sum, zip(*found))
    assert 0 < bucketed < 0.6 * random


def test_a_limit_of_the_long_side_changes_sizes(script, data, capsys):
    script.main(script.get_args_parser().parse_args(["--coco_path", str(data), "--image_size", "10", "--max_size", "15",
                                                     "--split", "val"]))
    shown = capsys.readouterr().out
    assert "evaluation: 4 images of 2 sizes, short side 10, long side at most 15, batches of 8" in shown
    assert "    1 batches; of equal sizes 2\n" in shown
    with_training = shares(script, data, capsys, "--split train --image_size 10 --epochs 1")
    without = shares(script, data, capsys, "--split train --image_size 10 --epochs 0")
    assert len(with_training) == 2 and without == with_training[:1]


@pytest.mark.parametrize("line, message", [
    ("--image_size 10x20", "--image_size 10x20 brings all images to one size, so that nothing is padded"),
    ("--batch_size 0", "--batch_size 0: at least 1 is needed"),
    ("--epochs -1", "--epochs -1: at least 0 is needed"),
    ("--least_scale 0.5 --no_multi_scale", "--least_scale has no effect with --no_multi_scale"),
    ("--images 0", "--images 0: at least 1 is needed"),
    ("--split train --images 2", "--batch_size 8 on 1 processes needs 8 training images, and there are 2; lower it"),
])
def test_what_cannot_be_measured_is_refused(script, data, capsys, line, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shares(script, data, capsys, line)


def test_without_annotations(script, tmp_path):
    with pytest.raises(FileNotFoundError, match="instances_val2017.json are not there"):
        script.main(script.get_args_parser().parse_args(["--coco_path", str(tmp_path), "--split", "val"]))
