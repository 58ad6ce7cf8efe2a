"""Small trainings through ``main``, and what makes two of them the same."""
import io
import json
import signal
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import nn

import main
import training
from detr import checkpoint, distributed

ROOT = Path(main.__file__).parent
SMALL = ("--model tiny_detr --hidden_dim 32 --nheads 2 --dim_feedforward 32 --enc_layers 1 --dec_layers 2 "
         "--num_queries 10 --dropout 0.1 --image_size 64 --batch_size 2 --global_batch_size 4 --num_workers 0 "
         "--device cpu --amp off --epochs 2 --eval_every 2 --log_steps --warmup_steps 3 --ema_decay 0.9 "
         "--print_every 1000 ")
DEFORMABLE = SMALL.replace("tiny_detr", "tiny_deformable_detr").replace("--enc_layers 1 ", "")
STEPS = 4                                                               # an epoch's, of 16 images


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


def keep_first_gradient(out: str | Path) -> None:
    """The first gradient that is clipped is written to a file, by the main process."""
    clip = nn.utils.clip_grad_norm_

    def keeping(parameters, norm):
        parameters = list(parameters)
        if not keeping.seen:
            keeping.seen = True
            gradients = [p.grad.clone() for p in parameters if p.requires_grad]
            if distributed.is_main():
                torch.save(gradients, out)
        return clip(parameters, norm)

    keeping.seen = False
    nn.utils.clip_grad_norm_ = keeping
    training.picture_of_detections = lambda *_: None
