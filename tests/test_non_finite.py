"""What a training does with values that are no numbers: it says where they come from, keeps the step, and stops or goes
on, with several processes too."""
import json
import math
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from small_training import SMALL, STEPS, run, steps
from test_train_distributed import torchrun

import training
from detr import checkpoint
from detr.set_criterion import SetCriterion
from detr.structures import NonFiniteError

pytestmark = pytest.mark.usefixtures("no_pictures")
POISONED = 105                                                          # the image


def poison(monkeypatch, where: str) -> None:
    """From now on an image or its boxes hold a NaN."""
    collate = training.collate

    def poisoned(items):
        samples, targets = collate(items)
        for i, target in enumerate(targets):
            if int(target["image_id"]) == POISONED:
                if where == "image":
                    samples.tensors[i, 1, 3, 5] = math.nan
                else:
                    target["boxes"][0, 2] = math.nan
        return samples, targets
    monkeypatch.setattr(training, "collate", poisoned)


@pytest.mark.parametrize("where, said", [
    ("image", rf"image \d of the batch \(image_id {POISONED}\): 1 of"), ("boxes", f"image_id {POISONED}")])
def test_stop(where, said, rectangles, tmp_path, monkeypatch, capsys):
    """The message has the cause, the images, the rate and the steps before; a file shows it again."""
    line = SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}/out "
    poison(monkeypatch, where)
    with pytest.raises(NonFiniteError) as error:
        run(line)
    text = str(error.value)
    assert re.search(said, text), text
    assert re.search(rf"at epoch 0, step \d, images \[.*{POISONED}.*\], learning rate", text), text
    assert "stopped; what was saved before is unharmed" in text and "--non_finite skip would" in text
    file, = (tmp_path / "out").glob("non_finite_epoch0_step*.pth")
    assert f"python scripts/replay.py {file}" in text
    monkeypatch.setattr(sys, "argv", ["replay.py", str(file)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(Path(training.__file__).parent / "scripts" / "replay.py"), run_name="__main__")
    assert left.value.code in (0, None) and re.search(said, capsys.readouterr().out)


def test_skip(rectangles, tmp_path, monkeypatch):
    """Such steps are left out, said and counted; weights, averages and statistics never meet them."""
    line = SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}/out --non_finite skip --epochs 3 "
    poison(monkeypatch, "image")
    _, text = run(line)
    for count in (1, 2, 3):                                             # the image comes once an epoch
        assert f"this step is left out ({count} of at most 10, --skip_at_most)" in text
    rows = steps(tmp_path / "out")
    assert len(rows) == 3 * STEPS and sum("left_out" in row for row in rows) == 3
    state = checkpoint.load(tmp_path / "out" / "checkpoint.pth")
    assert all(value.isfinite().all() for part in ("model", "training_model") for value in state[part].values())
    assert state["lr_scheduler"]["last_epoch"] == 3 * STEPS and state["ema_steps"] == 3 * STEPS - 3
    log = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    assert all(math.isfinite(row["train_loss"]) for row in log)


def test_skip_at_most(rectangles, tmp_path, monkeypatch):
    """A limit that holds for the whole training, its resumed parts included."""
    line = SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}/out --non_finite skip --skip_at_most 2 "
    poison(monkeypatch, "image")
    run(line + "--epochs 1")
    with pytest.raises(NonFiniteError, match=r"2 steps were left out before \(--skip_at_most\)"):
        run(line + "--epochs 9 --resume auto")
    assert checkpoint.load(tmp_path / "out" / "checkpoint.pth")["epoch"] == 1


def test_fp16_overflow_is_no_failure(rectangles, tmp_path):
    """The first loss scale is too large by design: such steps are left out, counted apart, and the scale falls."""
    line = SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}/out --amp fp16 --epochs 3"
    run(line)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    state = checkpoint.load(tmp_path / "out" / "checkpoint.pth")
    assert all(math.isfinite(row["train_loss"]) for row in log) and "train_loss_scale" in log[0]
    assert state["scaler"]["scale"] <= 65536 and state["skips"] == {"count": 0}
    overflows = sum(row["train_overflows"] * STEPS for row in log)
    assert state["scaler"]["scale"] == 65536 / 2 ** round(overflows)


@pytest.mark.parametrize("first", [0, 4])
def test_fp16_does_not_hide_gradients_that_are_never_numbers(first, rectangles, tmp_path, monkeypatch):
    """A few steps may be left out for a smaller loss scale; not all of them."""
    weighted, calls = SetCriterion.weighted_sum, []

    def broken(self, losses):
        calls.append(1)                                                 # twice a step: two batches
        nothing = (losses["loss_bbox"] * 0).sqrt() if len(calls) > 2 * first else 0         # its slope is infinite
        return weighted(self, losses) + nothing

    monkeypatch.setattr(SetCriterion, "weighted_sum", broken)
    line = SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}/out --amp fp16 --epochs 9 "
    with pytest.raises(NonFiniteError, match="grad_norm = nan"):
        run(line)
    assert len(calls) <= 2 * (18 if first == 0 else first + 6)


def test_fp16_steps_that_are_left_out(rectangles, tmp_path, monkeypatch):
    """Also where the loss scale cannot fall any more."""
    clip, calls = training.sharding.clip, []

    def broken(model, max_norm):
        calls.append(1)
        return math.nan if 4 < len(calls) < 12 else clip(model, max_norm)

    monkeypatch.setattr("detr.sharding.clip", broken)
    _, text = run(SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}/out --amp fp16 --epochs 4 --non_finite skip")
    assert "this step is left out (1 of at most 10" in text


POISON_ONE = """
import math
import os
import training
import main

collate = training.collate

def poisoned(items):
    samples, targets = collate(items)
    if os.environ["RANK"] == "1":
        samples.tensors[0, 0, 0, 0] = math.nan
    return samples, targets

training.collate = poisoned
main.main(main.get_args_parser().parse_args())
"""


def test_one_process_of_two(rectangles, tmp_path):
    """Both stop, at once, and the message says which process it was."""
    (tmp_path / "poison.py").write_text(POISON_ONE)
    done = torchrun(tmp_path / "poison.py", *SMALL.split(), "--coco_path", rectangles, "--output_dir", tmp_path / "out")
    assert done.returncode and "process 1: " in done.stderr and "process 0: " not in done.stderr
    assert "the input has values that are no numbers: image 0 of the batch" in done.stderr
    assert [name for name in os.listdir(tmp_path / "out") if name.startswith("non_finite")] == \
        ["non_finite_epoch0_step0_process1.pth"]


def test_what_is_seen_of_collapse(rectangles, tmp_path, monkeypatch):
    """A model whose boxes do not depend on the image is said to be so after its second epoch."""
    monkeypatch.setattr(training.CollapseWatch, "LEAST", 8)
    forward = torch.nn.Module.__call__

    def blind(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if type(self).__name__ == "ProposalDETR":
            outputs["pred_boxes"] = outputs["pred_boxes"] * 1e-4 + 0.5
        return outputs
    monkeypatch.setattr(torch.nn.Module, "__call__", blind)
    _, text = run(SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}/out --eval_every 9 --epochs 3")
    assert text.count("the model gives the same boxes for every image") == 2
