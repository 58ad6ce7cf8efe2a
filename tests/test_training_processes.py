"""What killed processes, other numbers of processes and too little memory do to a training."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_training import DEFORMABLE, ROOT, SMALL, STEPS, keep_first_gradient, run, same_training, steps
from test_train_distributed import torchrun
from torch import nn

import training
from detr import checkpoint, trial

pytestmark = pytest.mark.usefixtures("no_pictures")


# main.py, whose process 1 is killed at a step of its first start.
FRAGILE = """
import os
import signal
import sys
from pathlib import Path

import main
import training
from detr import distributed

train = training.train_one_epoch
mark = Path(sys.argv.pop(1))

def fragile(*args, after_step, **kwargs):
    def then(step, values):
        after_step(step, values)
        if distributed.rank() == 1 and kwargs["guard"].history.rows[-1][:2] == (1, 1) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return train(*args, after_step=then, **kwargs)

training.train_one_epoch = fragile
training.picture_of_detections = lambda *_: None
main.main(main.get_args_parser().parse_args())
"""

# main.py, which writes down its first gradient.
GRADIENTS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import main
from small_training import keep_first_gradient

keep_first_gradient(sys.argv.pop(1))
main.main(main.get_args_parser().parse_args())
"""


def test_a_killed_process_comes_back(rectangles, tmp_path):
    """``torchrun --max-restarts`` starts all processes again, which go on from the last checkpoint."""
    (tmp_path / "fragile.py").write_text(FRAGILE)
    line = (SMALL + f"--coco_path {rectangles} --eval_every 1 --resume auto --save_every_minutes 0.0001").split()
    (tmp_path / "never").touch()
    for name, mark in (("calm", "never"), ("hurt", "mark")):
        done = torchrun(tmp_path / "fragile.py", tmp_path / mark, *line, "--output_dir", tmp_path / name, restarts=1)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "mark").exists() and "epoch 1, step 2 of 4, is next" in done.stdout
    same_training(tmp_path / "calm", tmp_path / "hurt")


@pytest.mark.parametrize("model", [SMALL, DEFORMABLE], ids=["detr", "deformable"])
def test_gradients_do_not_depend_on_how_a_step_is_shared_out(model, rectangles, tmp_path, monkeypatch):
    """One process with eight images, two with four, one with two four times: the same gradient and the same schedule.
    Also with classes that weigh differently, and with images that are empty."""
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    line = (model + f"--coco_path {rectangles} --dropout 0 --backbone_norm group --epochs 1 --class_weights auto "
            "--lr 1e-4 --global_batch_size 8 ").split()
    found = {}
    for batch_size, processes in ((8, 1), (4, 2), (2, 1)):
        name = f"{batch_size}x{processes}"
        flags = [*line, "--batch_size", str(batch_size), "--output_dir", str(tmp_path / name)]
        if processes == 1:
            with monkeypatch.context() as patched:
                patched.setattr(nn.utils, "clip_grad_norm_", nn.utils.clip_grad_norm_)      # put back afterwards
                keep_first_gradient(tmp_path / f"{name}.pt")
                text = run(" ".join(flags))[1]
        else:
            done = torchrun(tmp_path / "gradients.py", tmp_path / f"{name}.pt", *flags, processes=processes)
            assert done.returncode == 0, done.stdout + done.stderr
            text = done.stdout
        assert f"accumulation = {batch_size} x {processes} x {8 // batch_size // processes} = 8" in text
        found[name] = torch.load(tmp_path / f"{name}.pt"), steps(tmp_path / name)
    (whole, rows), *others = found.values()
    size = torch.cat([g.flatten() for g in whole]).norm()
    for gradients, other_rows in others:
        difference = torch.cat([(a - b).flatten() for a, b in zip(whole, gradients)])
        assert difference.norm() < 1e-5 * size and difference.abs().max() < 1e-5 * size
        assert [row["lr"] for row in other_rows] == [row["lr"] for row in rows]
        assert [row["loss"] for row in other_rows] == pytest.approx([row["loss"] for row in rows], rel=1e-4)


EMPTY = """
import os
import training
import main

collate = training.collate

def emptied(items):
    samples, targets = collate(items)
    if os.environ["RANK"] == "1":
        targets = [{name: value[:0] if name in ("boxes", "labels", "area", "iscrowd", "ignore") else value
                    for name, value in target.items()} for target in targets]
    return samples, targets

training.collate = emptied
training.picture_of_detections = lambda *_: None
main.main(main.get_args_parser().parse_args())
"""


@pytest.mark.parametrize("model", [SMALL, DEFORMABLE], ids=["detr", "deformable"])
def test_a_process_that_has_only_empty_images(model, rectangles, tmp_path):
    """Nobody waits for it, and losses are finite."""
    (tmp_path / "empty.py").write_text(EMPTY)
    done = torchrun(tmp_path / "empty.py", *model.split(), "--coco_path", rectangles, "--output_dir", tmp_path / "out",
                    "--epochs", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = steps(tmp_path / "out")
    assert len(rows) == STEPS and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


def test_memory_that_runs_out(rectangles, tmp_path, monkeypatch):
    """One message: what was computed, what there is, and flags with which the worst batch of this data went through."""
    def too_much(*args, guard, **kwargs):
        guard.doing = {"shape": [4, 3, 64, 72], "objects": 5, "where": "epoch 0, step 3"}
        raise torch.OutOfMemoryError("CUDA out of memory")

    tried = []

    def fits(call, device, limit):
        call()
        tried.append(limit)
        return len(tried) > 1                                           # the first does not

    monkeypatch.setattr(training, "train_one_epoch", too_much)
    monkeypatch.setattr(trial, "fits", fits)
    with pytest.raises(MemoryError) as error:
        run(SMALL.replace("--batch_size 2", "--batch_size 4") + f"--coco_path {rectangles} --output_dir {tmp_path} "
            "--backbone_norm group --bucket_train")
    text = str(error.value)
    assert text.startswith("out of memory at epoch 0, step 3: a batch [4, 3, 64, 72] with 5 objects")
    assert "--batch_size 1 --global_batch_size 4" in text and "--batch_size 2 " not in text
    assert "--activation_checkpointing" in text and "--amp bf16" in text and "--resume auto" in text
    assert len(set(tried)) == 1 and tried[0] > 1e8


def test_the_batch_size_that_fits(rectangles, tmp_path, monkeypatch):
    """Found by trying, divides what is asked for, and leaves no trace in the training."""
    line = (SMALL.replace("--batch_size 2 --global_batch_size 4", "--global_batch_size 8")
            + f"--coco_path {rectangles} --backbone_norm group --epochs 1 ")
    _, text = run(line.replace("--global_batch_size 8", "--lr_batch 8 --lr_rule sqrt")
                  + f"--auto_batch_size --output_dir {tmp_path}/rule")
    assert "a step has 8 images, as many as the learning rates are for (--lr_batch)" in text
    _, text = run(line + f"--auto_batch_size --output_dir {tmp_path}/auto")
    assert "--auto_batch_size: 8 images per process" in text and "accumulation = 8 x 1 x 1 = 8" in text
    run(line + f"--batch_size 8 --output_dir {tmp_path}/typed")
    assert steps(tmp_path / "auto") == steps(tmp_path / "typed")
    monkeypatch.setattr(trial, "auto_batch_size", lambda *args: (_ for _ in ()).throw(RuntimeError("nothing fits")))
    with pytest.raises(MemoryError, match="nothing fits"):
        run(line + f"--auto_batch_size --output_dir {tmp_path}/none")
    with pytest.raises(ValueError, match="--auto_batch_size chooses --batch_size: leave one of them out"):
        run(line + "--auto_batch_size --batch_size 2")


def test_fewer_processes_go_on(rectangles, tmp_path):
    """Two processes are stopped within an epoch; one goes on, with the images that they would have had."""
    line = (SMALL + f"--coco_path {rectangles} --dropout 0 --backbone_norm group --ema_decay 0 "
            f"--output_dir {tmp_path}/out --resume auto").split()
    (tmp_path / "stopped.py").write_text(FRAGILE.replace("os.kill(os.getpid(), signal.SIGKILL)",
                                                         "signal.raise_signal(signal.SIGTERM)"))
    done = torchrun(tmp_path / "stopped.py", tmp_path / "mark", *line)
    assert done.returncode and done.stdout.count("SIGTERM: saved at epoch 1, step 3 of 4: go on with the same") == 1
    _, said = run(" ".join(line))
    assert "random states: 2 processes saved theirs, and 1 go on" in said
    (tmp_path / "never").touch()
    done = torchrun(tmp_path / "stopped.py", tmp_path / "never", *line, "--output_dir", tmp_path / "calm")
    assert done.returncode == 0, done.stdout + done.stderr
    mine, theirs = steps(tmp_path / "out"), steps(tmp_path / "calm")
    assert [[row[name] for name in ("epoch", "step", "lr")] for row in mine] == \
        [[row[name] for name in ("epoch", "step", "lr")] for row in theirs]
    assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in theirs], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch has FSDP2 for GPUs alone")
@pytest.mark.parametrize("first, then", [("--fsdp", ""), ("", "--fsdp")])
def test_shared_out_weights(first, then, rectangles, tmp_path):
    """FSDP2 on two processes and plain training on two: the same losses, and each goes on from the other's checkpoint."""
    (tmp_path / "program.py").write_text(FRAGILE)
    (tmp_path / "never").touch()
    line = (SMALL + f"--coco_path {rectangles} --dropout 0 --backbone_norm group --sgd --lr 1e-3 --lr_backbone 1e-3 "
            "--eval_every 1 --resume auto").split()
    for name, flags in (("plain", ("", "")), ("changed", (first, then))):
        for epochs, flag in zip(("1", "2"), flags):
            done = torchrun(tmp_path / "program.py", tmp_path / "never", *line, *flag.split(), "--epochs", epochs,
                            "--lr_schedule", "step", "--output_dir", tmp_path / name)
            assert done.returncode == 0, done.stdout + done.stderr
            assert ("(--fsdp)" in done.stdout) == bool(flag)
    plain, changed = steps(tmp_path / "plain"), steps(tmp_path / "changed")
    assert [row["loss"] for row in changed] == pytest.approx([row["loss"] for row in plain], rel=1e-5)
    one, other = (checkpoint.load(tmp_path / name / "final.pth")["model"] for name in ("plain", "changed"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def test_trainings_that_are_killed():
    """The short form of scripts/kill_and_resume.py: SIGKILL, also while a checkpoint is written."""
    done = subprocess.run([sys.executable, ROOT / "scripts" / "kill_and_resume.py", "--kills", "2", "--models",
                           "tiny_detr", "--workers", "0", "--processes", "1", "--images", "24", "--epochs", "2"],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills, 0 trainings differ" in done.stdout and "bit-identical" in done.stdout


@pytest.mark.slow
def test_trainings_that_are_killed_more_often():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "kill_and_resume.py", "--kills", "4"], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bit-identical") == 8
