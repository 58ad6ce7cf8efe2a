"""The script that learns a few images by heart, on images that are learnt within seconds."""
import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from small_data import make_rectangles
from small_models import build_small, images

from datasets.coco import CocoDetection
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, eval_transforms
from detr.presets import PRESETS

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


@pytest.mark.parametrize("name", ["tiny_detr", "tiny_conditional_detr", "tiny_dab_detr", "tiny_dino"])
def test_modules_that_drop_are_known(name, overfit):
    """Whatever drops in training is known by its class."""
    model = build_small(name, dropout=0.5)[0].train()
    batch = torch.stack(images((64, 64), (64, 64)))
    assert not torch.equal(model(batch)["pred_logits"], model(batch)["pred_logits"])
    for module in model.modules():
        if type(module).__name__ in overfit.NOISY:
            module.eval()
    assert torch.equal(model(batch)["pred_logits"], model(batch)["pred_logits"])


def test_which_images(overfit, data):
    assert overfit.choose([0, 3, 1, 2, 1], 2, most_objects=2) == [2, 3]
    assert overfit.choose([0, 3, 1, 2, 1], 1, most_objects=3) == [1]
    with pytest.raises(ValueError, match="4 images to learn by heart: only 3 have 1 to 2 objects"):
        overfit.choose([0, 3, 1, 2, 1], 4, most_objects=2)
    with pytest.raises(ValueError, match="only 13 have 1 to 30 objects"):
        call(overfit, data, "--images 14")


def test_nothing_is_dropped_at_random(overfit, data):
    """With dropout, DETR's queries differ by what was dropped, and a few images are never learnt."""
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny_detr"].model, dropout=0.5, hidden_dim=32, dim_feedforward=32, nheads=2)
    images = CocoDetection(data / "train2017", data / "annotations" / "instances_train2017.json",
                           transforms=eval_transforms(Preprocessing(64, 72, IMAGENET_MEAN, IMAGENET_STD)))
    model, criterion, postprocessors = config.build(images.num_classes)
    seen = []

    def see(module, *_):
        if torch.is_grad_enabled():                                             # in training
            with torch.no_grad():
                seen.append((outputs(module), outputs(module)))

    def outputs(module):
        return module.forward(batch)["pred_logits"]

    batch = [images[0][0]]
    handle = model.register_forward_pre_hook(see)
    overfit.learn(model, criterion, postprocessors, images, [0, 1], torch.optim.SGD(model.parameters(), lr=0.0),
                  torch.device("cpu"), steps=2, check_every=1, target=2.0)
    handle.remove()
    assert len(seen) == 2 and all(torch.equal(*pair) for pair in seen)
    model.train()
    assert not torch.equal(outputs(model), outputs(model))                      # as in a training, where there is dropout
