#!/usr/bin/env python3
"""Kill a training again and again, resume it each time, and compare it with one that nobody disturbed.

    python scripts/kill_and_resume.py                       DETR and Deformable DETR, 0 and 2 workers, 1 and 2 processes
    python scripts/kill_and_resume.py --kills 5 --models tiny_detr --workers 0 --processes 1

Each training is small, on the CPU, with dropout, random crops, a weight average and gradients of several batches added
up. It gets SIGKILL, all its processes at once, ``--kills`` times at random moments after its first step: every second
time as soon as it is seen writing a checkpoint, and of the others some while it evaluates. It goes on with
``--resume auto``. In the end every line of ``steps.txt`` (loss, gradient norm, learning rate), every row of ``log.txt``
and every tensor of ``checkpoint.pth`` (weights, average, optimizer) must be those of the undisturbed training, bit for
bit.

Prints a row for each training; the exit code is 1 where something differs.
"""
from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main
from datasets.synthetic import make_synthetic
from detr import checkpoint

FLAGS = ("--device cpu --image_size 64 --max_size 96 --batch_size 2 --global_batch_size 8 --hidden_dim 32 --nheads 2 "
         "--dim_feedforward 32 --dec_layers 2 --num_queries 10 --dropout 0.1 --amp off --ema_decay 0.9 --multi_scale "
         "--random_crop --log_steps --eval_every 1 --warmup_steps 5 --print_every 1000").split()
SLOWEST = 300.0                     # seconds after which a process that does not leave is called stuck


def start(flags: Sequence[str], processes: int, output: Path) -> list[int]:
    """``main.py`` with these flags in forked processes, which need not import anything again: their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            os.setsid()                                             # its workers are killed with it
            with open(output, "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            main.main(main.get_args_parser().parse_args(list(flags)))
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return children


def ended(children: Sequence[int]) -> bool:
    """Whether all have left. Raises RuntimeError where one has failed."""
    there = False
    for child in children:
        try:
            pid, status = os.waitpid(child, os.WNOHANG)
        except ChildProcessError:                                   # it was waited for before
            continue
        there |= pid == 0
        if pid and status:
            kill(children)
            raise RuntimeError(f"a training process failed (status {status})")
    return not there


def kill(children: Sequence[int]) -> None:
    for child in children:
        try:
            os.killpg(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    for child in children:
        try:
            os.waitpid(child, 0)
        except ChildProcessError:
            pass


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def disturbed(flags: Sequence[str], processes: int, folder: Path, output: Path, kills: int,
              chance: random.Random) -> Counter[str]:
    """Run the training to its end through ``kills`` SIGKILLs; how many met it while it did what."""
    met: Counter[str] = Counter()
    steps = folder / "steps.txt"
    for number in itertools.count():
        before, began = steps.read_bytes() if steps.exists() else b"", time.monotonic()
        children = start([*flags, "--output_dir", str(folder), "--resume", "auto"], processes, output)
        last = number >= kills
        while not ended(children) and (last or steps.exists() is False or steps.read_bytes() == before):
            if time.monotonic() - began > SLOWEST:
                kill(children)
                raise RuntimeError(f"no step in {SLOWEST:.0f} seconds")
            time.sleep(0.002)
        if ended(children):
            met["ended before its kill"] += kills - number
            return met
        if number % 2:                                              # as soon as a checkpoint is being written
            until = time.monotonic() + 10
            while time.monotonic() < until and not ended(children) and not list(folder.glob(".*.partial")):
                pass
        else:
            time.sleep(chance.uniform(0, 0.8))
        partial = bool(list(folder.glob(".*.partial")))
        if ended(children):
            met["ended before its kill"] += kills - number
            return met
        kill(children)
        left = bool(list(folder.glob(".*.partial")))
        met["while a checkpoint was written" if partial and left else "between"] += 1


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished trainings; empty where nothing does."""
    found = []
    for name in ("steps.txt", "log.txt"):
        rows = [[json.loads(line) for line in (folder / name).read_text().splitlines()] for folder in (one, other)]
        for row in (*rows[0], *rows[1]):
            row.pop("seconds", None)                            # which a clock says
        if rows[0] != rows[1]:
            place = next((i for i, pair in enumerate(zip(*rows)) if pair[0] != pair[1]), min(map(len, rows)))
            found.append(f"{name}: from line {place + 1} ({len(rows[0])} and {len(rows[1])} lines)")
    for name in ("checkpoint.pth", "final.pth", "best.pth"):
        states = [checkpoint.load(folder / name) for folder in (one, other)]
        for state in states:
            for volatile in ("date", "seconds", "revision"):
                state["card"].pop(volatile)
            (state.get("row") or {}).pop("seconds", None)
        found += [f"{name}: {entry}" for entry in unequal(*states)]
    return found


def unequal(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of entries that are not the same, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{name}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [entry for key in a for entry in unequal(a[key], b[key], f"{name}.{key}" if name else str(key))]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [entry for i, pair in enumerate(zip(a, b)) for entry in unequal(*pair, f"{name}[{i}]")]
    return [] if a == b else [name]


def compare(model: str, workers: int, processes: int, kills: int, data: Path, work: Path, seed: int,
            more: Sequence[str] = ()) -> tuple[Counter[str], list[str]]:
    """One training undisturbed and one disturbed: where it was killed, and what differs."""
    torch.set_num_threads(1)
    flags = ["--model", model, "--coco_path", str(data), *FLAGS, "--num_workers", str(workers), "--save_every_minutes",
             "0.005", *more]
    name = f"{model}-{workers}-{processes}"
    calm, hurt = work / f"{name}-calm", work / f"{name}-killed"
    children = start([*flags, "--output_dir", str(calm)], processes, work / f"{name}-calm.log")
    while not ended(children):
        time.sleep(0.05)
    met = disturbed(flags, processes, hurt, work / f"{name}-killed.log", kills, random.Random(seed))
    return met, differences(calm, hurt)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="times that each training is killed")
    parser.add_argument("--models", nargs="+", default=["tiny_detr", "tiny_deformable_detr"])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--images", type=int, default=160, help="training images")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", type=Path, help="folder for the trainings; without it they are deleted")
    args = parser.parse_args()
    work = args.keep or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    failed = total = 0
    try:
        make_synthetic(work / "data", train=args.images, val=8)
        print(f"{'training':<40} {'SIGKILLs':>8}  where; result", flush=True)
        for model, workers, processes in itertools.product(args.models, args.workers, args.processes):
            begun = time.monotonic()
            met, found = compare(model, workers, processes, args.kills, work / "data", work, args.seed,
                                 ("--epochs", str(args.epochs)))
            kills = met.total() - met["ended before its kill"]
            total, failed = total + kills, failed + bool(found)
            print(f"{f'{model}, {workers} workers, {processes} processes':<40} {kills:>8}  "
                  + ", ".join(f"{count} {where}" for where, count in met.items() if count)
                  + f"; {'DIFFERENT: ' + '; '.join(found[:5]) if found else 'bit-identical'} "
                  f"({time.monotonic() - begun:.0f} s)", flush=True)
        print(f"{total} kills, {failed} trainings differ")
    finally:
        if args.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(run())
