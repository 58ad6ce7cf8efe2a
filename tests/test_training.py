"""A training that is broken off and goes on is the training that was not: losses, weights and files, bit for bit. And
what signals, full disks, killed processes and other numbers of processes do to it."""
import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from small_data import make_rectangles
from test_train_distributed import torchrun

import main
import training
from datasets.sampler import RandomBatches
from detr import checkpoint, logs, trial
from detr.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from detr.optimization import Sharing
from detr.run_folder import RunFolder
from detr.structures import NonFiniteError
from training import Interrupted, Signals, Training, seed_randomness

ROOT = Path(main.__file__).parent
SMALL = ("--model tiny_detr --hidden_dim 32 --nheads 2 --dim_feedforward 32 --enc_layers 1 --dec_layers 2 "
         "--num_queries 10 --dropout 0.1 --image_size 64 --batch_size 2 --global_batch_size 4 --num_workers 0 "
         "--device cpu --amp off --epochs 2 --eval_every 2 --log_steps --warmup_steps 3 --ema_decay 0.9 "
         "--print_every 1000 ")
DEFORMABLE = SMALL.replace("tiny_detr", "tiny_deformable_detr").replace("--enc_layers 1 ", "")
STEPS = 4                                                               # an epoch's, of 16 images


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_rectangles(tmp_path_factory.mktemp("data") / "rectangles")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take as long as these trainings do, and are seen in other tests."""
    monkeypatch.setattr(training, "picture_of_detections", lambda *_: None)
    monkeypatch.setattr(training.visualize, "draw_curves", lambda *_: None)


def run(line: str) -> tuple[dict, str]:
    """What ``main`` returns, and what it says."""
    said = io.StringIO()
    with redirect_stdout(said):
        results = main.main(main.get_args_parser().parse_args(line.split()))
    return results, said.getvalue()


def steps(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "steps.txt").read_text().splitlines()]


def epochs(folder: Path) -> list[dict]:
    """The rows of a log, without what a clock says."""
    rows = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows


def unequal(a, b, name: str = "") -> list[str]:
    """Names of entries that are not the same, bit for bit; of dates nothing is asked."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [name]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = (a.keys() | b.keys()) - {"date", "seconds", "revision"}
        return [entry for key in keys for entry in unequal(a.get(key), b.get(key), f"{name}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [entry for i, pair in enumerate(zip(a, b)) for entry in unequal(*pair, f"{name}[{i}]")]
    return [] if a == b else [name]


def same_training(one: Path, other: Path) -> None:
    assert steps(one) == steps(other)
    assert epochs(one) == epochs(other)
    for name in ("checkpoint.pth", "best.pth", "final.pth"):
        assert unequal(checkpoint.load(one / name), checkpoint.load(other / name)) == [], name


def interrupt_after(monkeypatch, count: int, number: int = signal.SIGTERM) -> None:
    """The signal comes while step ``count`` of the run is done."""
    write = training.StepLog.write

    def signalled(self, epoch, step, values):
        write(self, epoch, step, values)
        signalled.left -= 1
        if signalled.left == 0:
            signal.raise_signal(number)

    signalled.left = count
    monkeypatch.setattr(training.StepLog, "write", signalled)


# -- going on ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, every", [
    (SMALL, 1), (DEFORMABLE, 3), (SMALL + "--bucket_train --image_size 48 ", 3),
    (SMALL + "--sgd --ema_decay 0 --amp bf16 ", 3),
    (DEFORMABLE + "--mosaic 0.5 --color_jitter 0.4 --repeat_threshold 0.6 --scale_jitter 0.5 2 ", 5),
    (SMALL + "--num_workers 2 --lr_schedule step --lr_drop 1 --amp fp16 ", 3)],
    ids=["detr", "deformable", "buckets", "sgd", "augmented", "workers"])
def test_broken_off_anywhere(line, every, data, tmp_path, monkeypatch):
    """SIGTERM after each or every few steps of two epochs."""
    line, out = line + f"--coco_path {data} ", tmp_path / "broken"
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


def test_broken_off_while_it_evaluates(data, tmp_path, monkeypatch):
    """The epoch is saved already: it leaves at once, and nothing is trained again."""
    line = SMALL + f"--coco_path {data} "
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
def test_killed_between_the_checkpoint_and_the_log(before, data, tmp_path, monkeypatch):
    line = SMALL + f"--coco_path {data} --epochs 3 "
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


def test_an_earlier_checkpoint_takes_later_rows_out_of_the_log(data, tmp_path):
    line = SMALL + f"--coco_path {data} --lr_schedule step --lr_drop 1 --output_dir {tmp_path}/out "
    run(line)
    before = epochs(tmp_path / "out")
    _, text = run(line + f"--resume {tmp_path}/out/checkpoint0000.pth")
    assert "taken out: 1 rows of epochs that are trained again" in text
    assert epochs(tmp_path / "out") == before


def test_what_is_finished(data, tmp_path):
    """``--resume auto`` may be called once too often, and then leaves what it would have left; a typed file may not."""
    line = SMALL + f"--coco_path {data} --epochs 1 --output_dir {tmp_path} "
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


def test_resume_auto(data, tmp_path):
    line = SMALL + f"--coco_path {data} --epochs 1 "
    with pytest.raises(ValueError, match="--resume auto looks for a checkpoint in --output_dir: name the folder"):
        run(line + "--resume auto")
    _, text = run(line + f"--resume auto --output_dir {tmp_path}/out")
    assert f"--resume auto: {tmp_path}/out has no checkpoint to go on from; training begins" in text
    newest = tmp_path / "out" / "checkpoint.pth"
    newest.write_bytes(newest.read_bytes()[:5000])
    _, text = run(line + f"--resume auto --output_dir {tmp_path}/out")
    assert "passed over checkpoint.pth" in text and "checkpoint_previous.pth" in text
    assert f"step {STEPS} of {STEPS}, is next" in text                  # before the evaluation


def test_a_fine_tuning_is_restarted_by_the_same_command(data, tmp_path, monkeypatch):
    run(SMALL + f"--coco_path {data} --epochs 1 --output_dir {tmp_path}/first")
    line = (f"--finetune {tmp_path}/first/best.pth --coco_path {data} --output_dir {tmp_path}/tuned --resume auto "
            "--epochs 1 --log_steps --num_workers 0 --device cpu --batch_size 4")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_after(patched, 2)
        run(line)
    _, text = run(line)
    assert f"--finetune {tmp_path}/first/best.pth has begun this training, which goes on from" in text
    assert "resumed from" in text and len(steps(tmp_path / "tuned")) == 4


def test_weights_alone_begin_a_training_of_their_own(data, tmp_path):
    """``best.pth`` has no optimizer: its training's files are set aside, or left alone."""
    line = SMALL + f"--coco_path {data} --epochs 1 "
    run(line + f"--output_dir {tmp_path}/out")
    before = (tmp_path / "out" / "log.txt").read_text()
    _, text = run(line + f"--resume {tmp_path}/out/best.pth --output_dir {tmp_path}/out")
    assert "has weights only: training starts at epoch 0" in text and "were moved to" in text
    assert (tmp_path / "out" / "earlier-1" / "log.txt").read_text() == before


def test_a_training_that_was_broken_off_early_is_not_mixed_with_another(data, tmp_path, monkeypatch):
    line = SMALL + f"--coco_path {data} --output_dir {tmp_path}/out "
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_after(patched, 3)
        run(line)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_after(patched, 1)
        run(line + "--lr 5e-4")
    assert checkpoint.load(tmp_path / "out" / "earlier-1" / "checkpoint.pth")["position"]["step"] == 3
    _, text = run(line + "--lr 5e-4 --resume auto")
    assert "step 1 of 4, is next" in text


def test_start_epoch_is_never_ignored(data, tmp_path, monkeypatch):
    line = SMALL + f"--coco_path {data} --output_dir {tmp_path}/out "
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_after(patched, 2)
        run(line)
    _, text = run(line + "--resume auto --start_epoch 0 --epochs 1")
    assert "epoch 0 is next" in text and [row["step"] for row in steps(tmp_path / "out")] == [0, 1, 2, 3]


def test_other_data_is_said(data, tmp_path):
    other = make_rectangles(tmp_path / "other", train=20)
    line = SMALL + f"--output_dir {tmp_path}/out "
    run(line + f"--coco_path {data} --epochs 1")
    _, text = run(line + f"--coco_path {other} --resume auto")
    assert "the training data is not that of" in text and "'images': 16" in text and "'images': 20" in text


def test_changed_options_are_said_or_refused(data, tmp_path):
    line = SMALL + f"--coco_path {data} --output_dir {tmp_path}/out "
    run(line.replace("--epochs 2", "--epochs 1"))
    with pytest.raises(ValueError, match=r"does not fit the model.*changed since.*--hidden_dim 48 \(was 32\)"):
        run(line + "--resume auto --hidden_dim 48")
    _, text = run(line + "--resume auto --lr 5e-5 --batch_size 1 --flip")
    assert "--lr 5e-05 (was 0.002)" in text and "--batch_size 1 (was 2)" in text


def test_another_number_of_images_a_step_within_an_epoch(data, tmp_path, monkeypatch):
    """The place in an epoch is one of images, of which none is left out."""
    line = SMALL + f"--coco_path {data} --output_dir {tmp_path}/out "
    interrupt_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        run(line)
    _, text = run(line.replace("--global_batch_size 4", "--global_batch_size 8") + "--resume auto")
    assert ("after 3 steps of 4 images of an epoch of 4; now a step has 8 images and an epoch 2 steps: it goes on with "
            "step 1") in text
    assert [(row["epoch"], row["step"]) for row in steps(tmp_path / "out")] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_learning_rates_are_scaled_once(data, tmp_path, monkeypatch):
    line = SMALL + f"--coco_path {data} --output_dir {tmp_path}/out --lr_rule linear --lr_batch 2 --warmup_steps 0 "
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


def test_workers_do_not_matter(data, tmp_path):
    lines = [SMALL + f"--coco_path {data} --epochs 1 --num_workers {workers} --color_jitter 0.4 --deterministic "
             f"--output_dir {tmp_path}/{workers}" for workers in (0, 1, 3)]
    try:
        for line in lines:
            run(line)
    finally:
        torch.use_deterministic_algorithms(False)
    assert steps(tmp_path / "0") == steps(tmp_path / "1") == steps(tmp_path / "3")


def test_fresh_processes_give_the_same_losses(data, tmp_path):
    """--deterministic, with other hash seeds."""
    for number in (1, 2):
        line = DEFORMABLE + f"--coco_path {data} --epochs 1 --deterministic --output_dir {tmp_path}/{number}"
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


# -- signals ----------------------------------------------------------------------------------------------------------

def test_signals(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert signals.received is None
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM and "SIGTERM: saving after this step" in capsys.readouterr().out
        signal.raise_signal(signal.SIGTERM)             # launchers pass on what their processes were sent already
        signal.raise_signal(signal.SIGINT)
        signals.when -= 2 * signals.AGAIN
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
    with Signals() as signals:
        signals.leave_at_once = "all is saved"
        with pytest.raises(Interrupted, match="all is saved") as left:
            signal.raise_signal(signal.SIGINT)
        assert left.value.signal == signal.SIGINT


def test_trainings_in_other_threads_have_no_signals(data, tmp_path):
    said = []
    thread = threading.Thread(target=lambda: said.append(run(SMALL + f"--coco_path {data} --output_dir {tmp_path} "
                                                             "--epochs 1")))
    thread.start()
    thread.join()
    assert said and len(steps(tmp_path)) == STEPS


def test_the_last_line_and_the_exit_code(data, tmp_path):
    """As a scheduler sees it: SIGTERM, a line that says how to go on, 128 + 15."""
    line = SMALL.replace("--epochs 2", "--epochs 500") + f"--coco_path {data} --output_dir {tmp_path} --eval_every 500"
    process = subprocess.Popen([sys.executable, ROOT / "main.py", *line.split()], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    for said in process.stdout:
        if said.startswith("epoch 0 "):
            break
    process.send_signal(signal.SIGTERM)
    *_, last = process.communicate(timeout=120)[0].strip().splitlines()
    assert process.returncode == 128 + signal.SIGTERM
    assert last.startswith("SIGTERM: saved at epoch ") and last.endswith(f"--resume auto --output_dir {tmp_path}")
    place = checkpoint.load(tmp_path / "checkpoint.pth")["position"]
    assert f"epoch {place['epoch']}, step {place['step']} of {STEPS}" in last


# -- disks ------------------------------------------------------------------------------------------------------------

def full(times: int, monkeypatch) -> None:
    """The next ``times`` checkpoints meet a full disk."""
    save = RunFolder.save

    def failing(self, state):
        if failing.left:
            failing.left -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, state)

    failing.left = times
    monkeypatch.setattr(RunFolder, "save", failing)


def test_a_disk_that_is_full_for_a_while(data, tmp_path, monkeypatch):
    line = SMALL + f"--coco_path {data} --epochs 3 --eval_every 9 --save_every_minutes 0 "
    run(line + f"--output_dir {tmp_path}/whole")
    full(2, monkeypatch)
    _, text = run(line + f"--output_dir {tmp_path}/full")
    assert "No space left on device\ntraining goes on, and checkpoint.pth is written anew next time (1 of 3" in text
    assert "(2 of 3" in text and "(3 of 3" not in text
    same_training(tmp_path / "whole", tmp_path / "full")


def test_a_disk_that_stays_full(data, tmp_path, monkeypatch):
    full(3, monkeypatch)
    with pytest.raises(OSError, match="No space left on device\nstopped after 3 writes in a row that failed"):
        run(SMALL + f"--coco_path {data} --epochs 9 --eval_every 9 --output_dir {tmp_path}")


def test_a_log_that_cannot_be_written(tmp_path, capsys):
    log = training.Log(tmp_path / "gone", False)
    log.write({"epoch": 0})
    (tmp_path / "gone").mkdir()
    assert "NOT SAVED: cannot write" in capsys.readouterr().out
    log.write({"epoch": 1})
    assert [json.loads(line)["epoch"] for line in (tmp_path / "gone" / "log.txt").read_text().splitlines()] == [0, 1]


def failing(monkeypatch, method: str, times: list[int]) -> None:
    """The calls of a method of RunFolder with these numbers, from 0, meet a full disk."""
    original = getattr(RunFolder, method)

    def call(self, *args):
        call.count += 1
        if call.count - 1 in times:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *args)

    call.count = 0
    monkeypatch.setattr(RunFolder, method, call)


def test_a_signal_on_a_full_disk(data, tmp_path, monkeypatch):
    """What was not saved is not called saved."""
    interrupt_after(monkeypatch, 2)
    failing(monkeypatch, "save", [0])
    with pytest.raises(Interrupted, match="NOT SAVED at epoch 0, step 2 of 4, and this run has saved no checkpoint"):
        run(SMALL + f"--coco_path {data} --output_dir {tmp_path}")


def test_best_weights_that_could_not_be_written(data, tmp_path, monkeypatch):
    """They are the best once more after the next evaluation, where that is no better."""
    failing(monkeypatch, "export", [0])
    monkeypatch.setattr(training, "headline", lambda results: ("AP", 0.5))
    _, text = run(SMALL.replace("--eval_every 2", "--eval_every 1") + f"--coco_path {data} --output_dir {tmp_path}")
    assert "NOT SAVED" in text and checkpoint.load(tmp_path / "best.pth")["epoch"] == 1
    assert checkpoint.load(tmp_path / "checkpoint.pth")["best"] == {"name": "AP", "value": 0.5, "epoch": 1}


def test_final_weights_that_could_not_be_written(data, tmp_path, monkeypatch):
    line = SMALL + f"--coco_path {data} --output_dir {tmp_path} "
    with monkeypatch.context() as patched:
        failing(patched, "export", [1])
        with pytest.raises(OSError, match="training has ended, and final.pth could not be written: make room, and"):
            run(line)
    run(line + "--resume auto")
    assert (tmp_path / "final.pth").exists()


def test_predictions_that_cannot_be_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training.Judge, "save", lambda self: (_ for _ in ()).throw(OSError("disk full")))
    _, text = run(SMALL + f"--coco_path {data} --output_dir {tmp_path}")
    assert "NOT SAVED: disk full" in text and (tmp_path / "final.pth").exists()


def test_half_a_line(tmp_path, monkeypatch, capsys):
    """A kill may leave one, which is taken out; a full disk leaves none."""
    log = logs.Log(tmp_path, False)
    log.write({"epoch": 0})
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"epoch": 1, "train_lo')
    logs.Log(tmp_path, False, 2, {"epoch": 1, "train_loss": 3.0})
    assert "the last line was cut short, and is taken out" in capsys.readouterr().out
    assert [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()] == \
        [{"epoch": 0}, {"epoch": 1, "train_loss": 3.0}]

    def half(self, text):
        self.original.write(text[:5])
        self.original.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full:
        def __init__(self, *args, **kwargs):
            self.original = open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.original.close()

        write = half

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(logs, "open", Full, raising=False)
        logs.append(tmp_path / "log.txt", '{"epoch": 2}\n')
    logs.append(tmp_path / "log.txt", '{"epoch": 2}\n')
    assert (tmp_path / "log.txt").read_text().count("\n") == 3
    assert logs.whole_lines(tmp_path / "log.txt")[-1] == '{"epoch": 2}'


def test_weights_that_are_no_numbers_are_not_saved(data, tmp_path, monkeypatch):
    """What could be used before can be used afterwards."""
    line = SMALL + f"--coco_path {data} --output_dir {tmp_path} --ema_decay 0 "
    write = training.StepLog.write

    def poisoned(self, epoch, step, values):
        write(self, epoch, step, values)
        if (epoch, step) == (1, STEPS - 1):
            model.transformer.decoder.heads.class_embed.weight.data[0, 0] = math.nan

    build = main.build
    monkeypatch.setattr(training.StepLog, "write", poisoned)

    def built(*args):
        nonlocal model
        model, *rest = build(*args)
        return model, *rest

    model = None
    monkeypatch.setattr(main, "build", built)
    with pytest.raises(NonFiniteError, match="weights that are no numbers after epoch 1, step 4: .*class_embed.weight"):
        run(line)
    state = checkpoint.load(tmp_path / "checkpoint.pth")
    assert state["epoch"] == 0 and all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.skipif(os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
def test_a_real_disk_that_is_full(data, tmp_path):
    """One checkpoint has room there, and not a second one beside it."""
    out = tmp_path / "disk"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        line = SMALL + f"--coco_path {data} --epochs 9 --eval_every 9 --output_dir {out}"
        done = subprocess.run([sys.executable, ROOT / "main.py", *line.split()], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 1 and "stopped after 3 writes in a row that failed" in done.stderr
        assert 2 <= done.stdout.count("NOT SAVED") <= 6 and "No space left on device" in done.stdout
        assert checkpoint.load(out / "checkpoint.pth")["epoch"] == 0
        assert not [name for name in os.listdir(out) if "partial" in name]
    finally:
        subprocess.run(["umount", out], check=True)


# -- several processes ------------------------------------------------------------------------------------------------

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
GRADIENTS = """
import sys
import torch
import main
import training
from detr import distributed
from torch import nn

clip = nn.utils.clip_grad_norm_
out = sys.argv.pop(1)

def noting(parameters, norm):
    parameters = list(parameters)
    if not noting.seen:
        noting.seen = True
        gradients = [p.grad for p in parameters if p.requires_grad]
        assert all(g is not None for g in gradients)
        if distributed.is_main():
            torch.save(gradients, out)
    return clip(parameters, norm)

noting.seen = False
nn.utils.clip_grad_norm_ = noting
training.picture_of_detections = lambda *_: None
main.main(main.get_args_parser().parse_args())
"""


def test_a_killed_process_comes_back(data, tmp_path):
    """``torchrun --max-restarts`` starts all processes again, which go on from the last checkpoint."""
    (tmp_path / "fragile.py").write_text(FRAGILE)
    line = (SMALL + f"--coco_path {data} --eval_every 1 --resume auto --save_every_minutes 0.0001").split()
    (tmp_path / "never").touch()
    for name, mark in (("calm", "never"), ("hurt", "mark")):
        done = torchrun(tmp_path / "fragile.py", tmp_path / mark, *line, "--output_dir", tmp_path / name, restarts=1)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "mark").exists() and "epoch 1, step 2 of 4, is next" in done.stdout
    same_training(tmp_path / "calm", tmp_path / "hurt")


@pytest.mark.parametrize("model", [SMALL, DEFORMABLE], ids=["detr", "deformable"])
def test_gradients_do_not_depend_on_how_a_step_is_shared_out(model, data, tmp_path):
    """One process with eight images, two with four, one with two four times: the same gradient and the same schedule.
    Also with classes that weigh differently, and with images that are empty."""
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    line = (model + f"--coco_path {data} --dropout 0 --backbone_norm group --epochs 1 --class_weights auto --lr 1e-4 "
            "--global_batch_size 8 ").split()
    found = {}
    for batch_size, processes in ((8, 1), (4, 2), (2, 1)):
        name = f"{batch_size}x{processes}"
        done = torchrun(tmp_path / "gradients.py", tmp_path / f"{name}.pt", *line, "--batch_size", batch_size,
                        "--output_dir", tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"accumulation = {batch_size} x {processes} x {8 // batch_size // processes} = 8" in done.stdout
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
def test_a_process_that_has_only_empty_images(model, data, tmp_path):
    """Nobody waits for it, and losses are finite."""
    (tmp_path / "empty.py").write_text(EMPTY)
    done = torchrun(tmp_path / "empty.py", *model.split(), "--coco_path", data, "--output_dir", tmp_path / "out",
                    "--epochs", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = steps(tmp_path / "out")
    assert len(rows) == STEPS and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


def test_memory_that_runs_out(data, tmp_path, monkeypatch):
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
        run(SMALL.replace("--batch_size 2", "--batch_size 4") + f"--coco_path {data} --output_dir {tmp_path} "
            "--backbone_norm group --bucket_train")
    text = str(error.value)
    assert text.startswith("out of memory at epoch 0, step 3: a batch [4, 3, 64, 72] with 5 objects")
    assert "--batch_size 1 --global_batch_size 4" in text and "--batch_size 2 " not in text
    assert "--activation_checkpointing" in text and "--amp bf16" in text and "--resume auto" in text
    assert len(set(tried)) == 1 and tried[0] > 1e8


def test_the_batch_size_that_fits(data, tmp_path, monkeypatch):
    """Found by trying, divides what is asked for, and leaves no trace in the training."""
    line = (SMALL.replace("--batch_size 2 --global_batch_size 4", "--global_batch_size 8")
            + f"--coco_path {data} --backbone_norm group --epochs 1 ")
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


def test_fewer_processes_go_on(data, tmp_path):
    """Two processes are stopped within an epoch; one goes on, with the images that they would have had."""
    line = (SMALL + f"--coco_path {data} --dropout 0 --backbone_norm group --ema_decay 0 "
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
def test_shared_out_weights(first, then, data, tmp_path):
    """FSDP2 on two processes and plain training on two: the same losses, and each goes on from the other's checkpoint."""
    (tmp_path / "program.py").write_text(FRAGILE)
    (tmp_path / "never").touch()
    line = (SMALL + f"--coco_path {data} --dropout 0 --backbone_norm group --sgd --lr 1e-3 --lr_backbone 1e-3 "
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
