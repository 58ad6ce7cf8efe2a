"""The script that learns a few images by heart, on images that are learnt within seconds."""
import importlib.util
from pathlib import Path

import pytest
from small_data import make_rectangles

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "overfit.py"


@pytest.fixture(scope="module")
def overfit():
    spec = importlib.util.spec_from_file_location("overfit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_rectangles(tmp_path_factory.mktemp("data") / "rectangles")


def call(overfit, data: Path, line: str) -> int:
    return overfit.main(overfit.get_args_parser().parse_args(["--coco_path", str(data), *line.split()]))


def test_images_by_heart(overfit, data, capsys):
    assert call(overfit, data, "--images 3 --image_size 64 --max_size 72 --lr 1e-3 --steps 300 --check_every 25") == 0
    shown = capsys.readouterr().out
    assert "model: tiny_detr, " in shown and "random weights; device: cpu" in shown
    assert f"images: 100, 101, 102 of {data}/annotations/instances_train2017.json" in shown
    last = shown.splitlines()[-1]
    assert last.startswith("tiny_detr, 3 images: AP50 ") and "seconds" in last and " above the target 0.9" in last
    ap50, steps = float(last.split("AP50 ")[1].split()[0]), int(last.split("after ")[1].split()[0])
    assert ap50 > 0.9 and steps % 25 == 0 and f"step {steps}: loss" in shown and f"step {steps + 25}" not in shown


def test_a_target_that_is_missed(overfit, data, capsys):
    assert call(overfit, data, "--split val --images 2 --image_size 64 --steps 3 --check_every 2") == 1
    shown = capsys.readouterr().out
    assert "images: 200, 201 of" in shown and "step 2: loss" in shown and "step 3: loss" in shown
    assert "after 3 steps" in shown.splitlines()[-1] and "NOT above the target 0.9" in shown.splitlines()[-1]


def test_images_with_five_channels(overfit, tmp_path, capsys):
    data = make_rectangles(tmp_path / "five", channels=5)
    assert call(overfit, data, "--images 2 --image_size 64 --steps 2 --check_every 2 --in_channels 5") == 1
    assert "step 2: loss" in capsys.readouterr().out
    with pytest.raises(OSError, match=r"100.npy has 5 channels, not the 3 of --in_channels; give --in_channels 5"):
        call(overfit, data, "--images 2 --image_size 64")


def test_which_images(overfit):
    rows = [{"image_id": i, "iscrowd": crowd} for i, crowd in ((4, 0), (4, 0), (4, 0), (2, 1), (9, 0), (3, 0), (3, 1))]
    content = {"images": [{"id": i} for i in (9, 4, 2, 3, 1)], "annotations": rows, "categories": []}
    chosen = overfit.choose(content, 2, most_objects=2)             # 1: none, 2: a crowd alone, 4: three
    assert [image["id"] for image in chosen["images"]] == [9, 3]
    assert [row["image_id"] for row in chosen["annotations"]] == [9, 3, 3]
    assert [image["id"] for image in overfit.choose(content, 1, most_objects=3)["images"]] == [3]
    with pytest.raises(ValueError, match="--images 4: only 3 images have 1 to 3 objects"):
        overfit.choose(content, 4, most_objects=3)
