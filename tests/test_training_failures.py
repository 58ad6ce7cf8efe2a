"""What signals, full disks and weights that are no numbers do to a training."""
import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading

import pytest
from small_training import ROOT, SMALL, STEPS, interrupt_after, run, same_training, steps

import main
import training
from detr import checkpoint, logs
from detr.run_folder import RunFolder
from detr.structures import NonFiniteError
from training import Interrupted, Signals

pytestmark = pytest.mark.usefixtures("no_pictures")


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


def test_trainings_in_other_threads_have_no_signals(rectangles, tmp_path):
    said = []
    thread = threading.Thread(target=lambda: said.append(run(SMALL + f"--coco_path {rectangles} --output_dir {tmp_path} "
                                                             "--epochs 1")))
    thread.start()
    thread.join()
    assert said and len(steps(tmp_path)) == STEPS


def test_the_last_line_and_the_exit_code(rectangles, tmp_path):
    """As a scheduler sees it: SIGTERM, a line that says how to go on, 128 + 15."""
    line = SMALL.replace("--epochs 2", "--epochs 500")
    line += f"--coco_path {rectangles} --output_dir {tmp_path} --eval_every 500"
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


def test_a_disk_that_is_full_for_a_while(rectangles, tmp_path, monkeypatch):
    line = SMALL + f"--coco_path {rectangles} --epochs 3 --eval_every 9 --save_every_minutes 0 "
    run(line + f"--output_dir {tmp_path}/whole")
    full(2, monkeypatch)
    _, text = run(line + f"--output_dir {tmp_path}/full")
    assert "No space left on device\ntraining goes on, and checkpoint.pth is written anew next time (1 of 3" in text
    assert "(2 of 3" in text and "(3 of 3" not in text
    same_training(tmp_path / "whole", tmp_path / "full")


def test_a_disk_that_stays_full(rectangles, tmp_path, monkeypatch):
    full(3, monkeypatch)
    with pytest.raises(OSError, match="No space left on device\nstopped after 3 writes in a row that failed"):
        run(SMALL + f"--coco_path {rectangles} --epochs 9 --eval_every 9 --output_dir {tmp_path}")


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


def test_a_signal_on_a_full_disk(rectangles, tmp_path, monkeypatch):
    """What was not saved is not called saved."""
    interrupt_after(monkeypatch, 2)
    failing(monkeypatch, "save", [0])
    with pytest.raises(Interrupted, match="NOT SAVED at epoch 0, step 2 of 4, and this run has saved no checkpoint"):
        run(SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}")


def test_best_weights_that_could_not_be_written(rectangles, tmp_path, monkeypatch):
    """They are the best once more after the next evaluation, where that is no better."""
    failing(monkeypatch, "export", [0])
    monkeypatch.setattr(training, "headline", lambda results: ("AP", 0.5))
    _, text = run(SMALL.replace("--eval_every 2", "--eval_every 1") + f"--coco_path {rectangles} --output_dir {tmp_path}")
    assert "NOT SAVED" in text and checkpoint.load(tmp_path / "best.pth")["epoch"] == 1
    assert checkpoint.load(tmp_path / "checkpoint.pth")["best"] == {"name": "AP", "value": 0.5, "epoch": 1}


def test_final_weights_that_could_not_be_written(rectangles, tmp_path, monkeypatch):
    line = SMALL + f"--coco_path {rectangles} --output_dir {tmp_path} "
    with monkeypatch.context() as patched:
        failing(patched, "export", [1])
        with pytest.raises(OSError, match="training has ended, and final.pth could not be written: make room, and"):
            run(line)
    run(line + "--resume auto")
    assert (tmp_path / "final.pth").exists()


def test_predictions_that_cannot_be_written(rectangles, tmp_path, monkeypatch):
    monkeypatch.setattr(training.Judge, "save", lambda self: (_ for _ in ()).throw(OSError("disk full")))
    _, text = run(SMALL + f"--coco_path {rectangles} --output_dir {tmp_path}")
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


def test_weights_that_are_no_numbers_are_not_saved(rectangles, tmp_path, monkeypatch):
    """What could be used before can be used afterwards."""
    line = SMALL + f"--coco_path {rectangles} --output_dir {tmp_path} --ema_decay 0 "
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
def test_a_real_disk_that_is_full(rectangles, tmp_path):
    """One checkpoint has room there, and not a second one beside it."""
    out = tmp_path / "disk"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        line = SMALL + f"--coco_path {rectangles} --epochs 9 --eval_every 9 --output_dir {out}"
        done = subprocess.run([sys.executable, ROOT / "main.py", *line.split()], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 1 and "stopped after 3 writes in a row that failed" in done.stderr
        assert 2 <= done.stdout.count("NOT SAVED") <= 6 and "No space left on device" in done.stdout
        assert checkpoint.load(out / "checkpoint.pth")["epoch"] == 0
        assert not [name for name in os.listdir(out) if "partial" in name]
    finally:
        subprocess.run(["umount", out], check=True)
