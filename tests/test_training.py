"""A training that is broken off and goes on is the training that was not: losses, weights and files, bit for bit."""
import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from small_data import make_rectangles
from small_training import DEFORMABLE, ROOT, SMALL, STEPS, epochs, interrupt_after, run, same_training, steps, unequal

import main
import training
from datasets.sampler import RandomBatches
from detr import checkpoint
from detr.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from detr.optimization import Sharing
from training import Interrupted, Training, seed_randomness

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize("line, every", [
    (SMALL, 1), (DEFORMABLE, 3), (SMALL + "--bucket_train --image_size 48 ", 3),
    (SMALL + "--sgd --ema_decay 0 --amp bf16 ", 3),
    (DEFORMABLE + "--mosaic 0.5 --color_jitter 0.4 --repeat_threshold 0.6 --scale_jitter 0.5 2 ", 5),
    (SMALL + "--num_workers 2 --lr_schedule step --lr_drop 1 --amp fp16 ", 3),
    (DEFORMABLE.replace("deformable_detr", "dino"), 5)],
    ids=["detr", "deformable", "buckets", "sgd", "augmented", "workers", "dino"])
def test_broken_off_anywhere(line, every, rectangles, tmp_path, monkeypatch):
    """SIGTERM after each or every few steps of two epochs."""
    line, out = line + f"--coco_path {rectangles} ", tmp_path / "broken"
    run(line + f"--output_dir {tmp_path}/whole")
    broken = 0
    while True:
        with monkeypatch.context() as patched:
            interrupt_after(patched, every)
            try:
                run(line + f"--output_dir {out} --resume auto")
                break
            except Interrupted as interrupted:
                broken += 1
                place = checkpoint.load(out / "checkpoint.pth")["position"]
                assert f"saved at epoch {place['epoch']}, step {place['step']} of" in str(interrupted)
                assert f"--resume auto --output_dir {out}" in str(interrupted)
    assert broken == len(steps(out)) // every
    same_training(tmp_path / "whole", out)


def test_broken_off_while_it_evaluates(rectangles, tmp_path, monkeypatch):
    """The epoch is saved already: it leaves at once, and nothing is trained again."""
    line = SMALL + f"--coco_path {rectangles} "
    run(line + f"--output_dir {tmp_path}/whole")
    with monkeypatch.context() as patched:
        patched.setattr(training, "evaluate", lambda *args: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted, match=f"saved at epoch 1, step {STEPS} of {STEPS}") as left:
            run(line + f"--output_dir {tmp_path}/broken")
    assert left.value.signal == signal.SIGINT
    with monkeypatch.context() as patched:
        patched.setattr(training, "train_one_epoch", None)
        run(line + f"--output_dir {tmp_path}/broken --resume auto")
    same_training(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("before", [0, 1])
def test_killed_between_the_checkpoint_and_the_log(before, rectangles, tmp_path, monkeypatch):
    line = SMALL + f"--coco_path {rectangles} --epochs 3 "
    run(line + f"--output_dir {tmp_path}/whole")

    def killed(self, row):
        raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        write, rows = training.Log.write, []
        patched.setattr(training.Log, "write", lambda self, row: killed(self, row) if len(rows) == before else
                        (rows.append(row), write(self, row)))
        run(line + f"--output_dir {tmp_path}/broken")
    file = tmp_path / "broken" / "log.txt"
    assert (len(file.read_text().splitlines()) if file.exists() else 0) == before
    run(line + f"--output_dir {tmp_path}/broken --resume auto")
    same_training(tmp_path / "whole", tmp_path / "broken")


def test_an_earlier_checkpoint_takes_later_rows_out_of_the_log(rectangles, tmp_path):
    line = SMALL + f"--coco_path {rectangles} --lr_schedule step --lr_drop 1 --output_dir {tmp_path}/out "
    run(line)
    before = epochs(tmp_path / "out")
    _, text = run(line + f"--resume {tmp_path}/out/checkpoint0000.pth")
    assert "taken out: 1 rows of epochs that are trained again" in text
    assert epochs(tmp_path / "out") == before


def test_what_is_finished(rectangles, tmp_path):
    """``--resume auto`` may be called once too often, and then leaves what it would have left; a typed file may not."""
    line = SMALL + f"--coco_path {rectangles} --epochs 1 --output_dir {tmp_path} "
    results, _ = run(line)
    (tmp_path / "final.pth").unlink()                                   # as if it was killed before it was written
    again, text = run(line + "--resume auto")
    assert "all 1 epochs were trained; --epochs N trains on" in text and again == results
    final, newest = (checkpoint.load(tmp_path / name)["model"] for name in ("final.pth", "checkpoint.pth"))
    assert unequal(final, newest) == []
    with pytest.raises(ValueError, match="nothing is left to train; give more --epochs"):
        run(line + f"--resume {tmp_path}/checkpoint.pth")
    _, text = run(line.replace("--epochs 1", "--epochs 2") + "--resume auto")
    assert "epoch 1 is next" in text and "--epochs 2 (was 1)" in text


def test_resume_auto(rectangles, tmp_path):
    line = SMALL + f"--coco_path {rectangles} --epochs 1 "
    with pytest.raises(ValueError, match="--resume auto looks for a checkpoint in --output_dir: name the folder"):
        run(line + "--resume auto")
    _, text = run(line + f"--resume auto --output_dir {tmp_path}/out")
    assert f"--resume auto: {tmp_path}/out has no checkpoint to go on from; training begins" in text
    newest = tmp_path / "out" / "checkpoint.pth"
    newest.write_bytes(newest.read_bytes()[:5000])
    _, text = run(line + f"--resume auto --output_dir {tmp_path}/out")
    assert "passed over checkpoint.pth" in text and "checkpoint_previous.pth" in text
    assert f"step {STEPS} of {STEPS}, is next" in text                  # before the evaluation


def test_a_fine_tuning_is_restarted_by_the_same_command(rectangles, tmp_path, monkeypatch):
    run(SMALL + f"--coco_path {rectangles} --epochs 1 --output_dir {tmp_path}/first")
    line = (f"--finetune {tmp_path}/first/best.pth --coco_path {rectangles} --output_dir {tmp_path}/tuned --resume auto "
            "--epochs 1 --log_steps --num_workers 0 --device cpu --batch_size 4")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_after(patched, 2)
        run(line)
    _, text = run(line)
    assert f"--finetune {tmp_path}/first/best.pth has begun this training, which goes on from" in text
    assert "resumed from" in text and len(steps(tmp_path / "tuned")) == 4


def test_weights_alone_begin_a_training_of_their_own(rectangles, tmp_path):
    """``best.pth`` has no optimizer: its training's files are set aside, or left alone."""
    line = SMALL + f"--coco_path {rectangles} --epochs 1 "
    run(line + f"--output_dir {tmp_path}/out")
    before = (tmp_path / "out" / "log.txt").read_text()
    _, text = run(line + f"--resume {tmp_path}/out/best.pth --output_dir {tmp_path}/out")
    assert "has weights only: training starts at epoch 0" in text and "were moved to" in text
    assert (tmp_path / "out" / "earlier-1" / "log.txt").read_text() == before


def test_a_training_that_was_broken_off_early_is_not_mixed_with_another(rectangles, tmp_path, monkeypatch):
    line = SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}/out "
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_after(patched, 3)
        run(line)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_after(patched, 1)
        run(line + "--lr 5e-4")
    assert checkpoint.load(tmp_path / "out" / "earlier-1" / "checkpoint.pth")["position"]["step"] == 3
    _, text = run(line + "--lr 5e-4 --resume auto")
    assert "step 1 of 4, is next" in text


def test_start_epoch_is_never_ignored(rectangles, tmp_path, monkeypatch):
    line = SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}/out "
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_after(patched, 2)
        run(line)
    _, text = run(line + "--resume auto --start_epoch 0 --epochs 1")
    assert "epoch 0 is next" in text and [row["step"] for row in steps(tmp_path / "out")] == [0, 1, 2, 3]


def test_other_data_is_said(rectangles, tmp_path):
    other = make_rectangles(tmp_path / "other", train=20)
    line = SMALL + f"--output_dir {tmp_path}/out "
    run(line + f"--coco_path {rectangles} --epochs 1")
    _, text = run(line + f"--coco_path {other} --resume auto")
    assert "the training data is not that of" in text and "'images': 16" in text and "'images': 20" in text


def test_changed_options_are_said_or_refused(rectangles, tmp_path):
    line = SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}/out "
    run(line.replace("--epochs 2", "--epochs 1"))
    with pytest.raises(ValueError, match=r"does not fit the model.*changed since.*--hidden_dim 48 \(was 32\)"):
        run(line + "--resume auto --hidden_dim 48")
    _, text = run(line + "--resume auto --lr 5e-5 --batch_size 1 --flip")
    assert "--lr 5e-05 (was 0.002)" in text and "--batch_size 1 (was 2)" in text


def test_another_number_of_images_a_step_within_an_epoch(rectangles, tmp_path, monkeypatch):
    """The place in an epoch is one of images, of which none is left out."""
    line = SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}/out "
    interrupt_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        run(line)
    _, text = run(line.replace("--global_batch_size 4", "--global_batch_size 8") + "--resume auto")
    assert ("after 3 steps of 4 images of an epoch of 4; now a step has 8 images and an epoch 2 steps: it goes on with "
            "step 1") in text
    assert [(row["epoch"], row["step"]) for row in steps(tmp_path / "out")] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_learning_rates_are_scaled_once(rectangles, tmp_path, monkeypatch):
    line = SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}/out --lr_rule linear --lr_batch 2 --warmup_steps 0 "
    line += "--lr 1e-3 --lr_schedule step --lr_drop 9 "
    interrupt_after(monkeypatch, 5)
    with pytest.raises(Interrupted):
        run(line)
    _, text = run(line + "--resume auto")
    assert "learning rates: times 2, since a step has 4 images and the recipe's 2 (--lr_rule linear)" in text
    assert {row["lr"] for row in steps(tmp_path / "out")} == {2e-3}
    groups = checkpoint.load(tmp_path / "out" / "checkpoint.pth")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([2e-3, 4e-3])


def test_groups_are_restored():
    """Learning rates and weight decay are those of now, what the optimizer remembers those of before."""
    class Grouped(ModelConfig):
        rates = (1.0, 0.1, 0.01)

        def parameter_groups(self, model, lr):
            return [{"params": [*head.parameters()], "lr": lr * rate} for head, rate in zip(model, self.rates)]

    class Two(Grouped):
        rates = (1.0, 0.1)

    model = torch.nn.ModuleList(torch.nn.Linear(4, 2) for _ in range(3))

    def going(config: ModelConfig, train: TrainConfig, resumed: dict | None = None) -> Training:
        settings = main.Settings("x", config, train, DataConfig(), RunConfig(resume="a.pth"), resumed=resumed,
                                 frozen=None, begun=None, categories=None)
        made = Training(settings, model, (), Sharing(1, 1, 1), 10, torch.device("cpu"), Path(), {"card": {"data": None}})
        with redirect_stdout(io.StringIO()):
            made.restore()
        return made

    for sgd in (False, True):
        train = TrainConfig(epochs=9, sgd=sgd, lr=1.0)
        optimizer = going(Grouped(), train).optimizer
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        resumed = {"model": {}, "optimizer": optimizer.state_dict(), "epoch": 4}
        fresh = going(Grouped(), TrainConfig(epochs=9, sgd=sgd, lr=2.0, weight_decay=0.5, lr_drop=9), resumed)
        groups = fresh.optimizer.param_groups
        assert [(g["lr"], g["weight_decay"]) for g in groups] == [(2.0, 0.5), (0.2, 0.5), (0.02, 0.5)]
        assert unequal(fresh.optimizer.state_dict()["state"], optimizer.state_dict()["state"]) == []
        assert (fresh.epoch, fresh.step, fresh.schedule.last_epoch) == (5, 0, 50)
        with pytest.raises(ValueError, match="does not fit the parameters that train now.*resume with the same "
                                             "--lr_backbone, --from_scratch, --freeze as before"):
            going(Two(), train, resumed)


# -- randomness -------------------------------------------------------------------------------------------------------

def test_steps_have_the_same_images_however_they_are_shared_out():
    def images_of_steps(batch_size, world_size, accumulate, first_step=0):
        parts = []
        for rank in range(world_size):
            batches = RandomBatches(50, batch_size, rank, world_size, 3, None, accumulate)
            batches.set_epoch(2, first_step)
            parts.append(list(batches))
            assert len(parts[-1]) == len(batches) - first_step * accumulate
        return [sorted(draw for part in parts for batch in part[step * accumulate:(step + 1) * accumulate]
                       for draw in batch) for step in range(len(parts[0]) // accumulate)]

    whole = images_of_steps(8, 1, 1)
    assert len(whole) == 6
    for shape in ((4, 2, 1), (2, 1, 4), (1, 8, 1), (1, 2, 4), (2, 2, 2)):
        assert images_of_steps(*shape) == whole                         # and the same draws for each image
        assert images_of_steps(*shape, first_step=4) == whole[4:]


def test_workers_do_not_matter(rectangles, tmp_path):
    lines = [SMALL + f"--coco_path {rectangles} --epochs 1 --num_workers {workers} --color_jitter 0.4 --deterministic "
             f"--output_dir {tmp_path}/{workers}" for workers in (0, 1, 3)]
    try:
        for line in lines:
            run(line)
    finally:
        torch.use_deterministic_algorithms(False)
    assert steps(tmp_path / "0") == steps(tmp_path / "1") == steps(tmp_path / "3")


def test_fresh_processes_give_the_same_losses(rectangles, tmp_path):
    """--deterministic, with other hash seeds."""
    for number in (1, 2):
        line = DEFORMABLE + f"--coco_path {rectangles} --epochs 1 --deterministic --output_dir {tmp_path}/{number}"
        done = subprocess.run([sys.executable, ROOT / "main.py", *line.split()], capture_output=True, text=True,
                              env=os.environ | {"PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0 and "deterministic: the same numbers" in done.stdout, done.stderr
    assert steps(tmp_path / "1") == steps(tmp_path / "2")


def test_seeds_of_places():
    seen = set()
    for place in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
        seed_randomness(*place)
        seen.add((float(torch.rand(())), float(training.np.random.rand()), training.random.random()))
    assert len(seen) == 4
