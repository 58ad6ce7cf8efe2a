#!/usr/bin/env python3
"""Peak memory and time of a training step: plain, with layers computed again, in bfloat16, with both, and compiled.

    python scripts/benchmark_training_memory.py                             # two models at 800 x 1333, one image
    python scripts/benchmark_training_memory.py --model tiny_deformable_detr --size 320 320 --batch 4 --ways plain compile

Each row is a process of its own; images, weights and targets are random, the arithmetic is that of a training: forward,
loss, backward, clipped gradients, AdamW.

    plain            as it is
    checkpointing    --activation_checkpointing
    bf16             --amp bf16
    both             these two
    compile          --compile: encoder and decoder layers; ``first`` is the time of the step before, which compiles
    peak             beyond what was in use before the step (weights and the optimizer's state): CUDA's allocator; on CPUs
                     the resident memory, which other programs do not change
    s                median of ``--repeats`` steps after a small one that does not count; on CPUs of the processor's time,
                     divided by the threads, so that other programs matter less
"""
from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detr import build_model, list_models, memory

SMALL = (160, 224)              # the first step, by which libraries are loaded and the optimizer has its state
WAYS = ("plain", "checkpointing", "bf16", "both", "compile")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["detr_resnet50", "deformable_detr_resnet50"],
                        choices=list_models(), metavar="PRESET",
                        help=f"models to measure, one after another, of {', '.join(list_models())}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH"),
                        help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images of a batch")
    parser.add_argument("--objects", type=int, default=7, help="of each image")
    parser.add_argument("--ways", nargs="+", default=list(WAYS[:4]), choices=WAYS, help="of computing the step")
    parser.add_argument("--threads", type=int, default=1, help="on CPU")
    parser.add_argument("--repeats", type=int, default=1, help="steps that are measured")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    parser.add_argument("--case", help=argparse.SUPPRESS)                       # one row, in json
    return parser


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Figures of one row: model, way, size, batch, objects, device, threads, repeats."""
    device = torch.device(case["device"])
    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    model, criterion, _ = build_model(case["model"], num_classes=91)
    model.to(device).train()
    criterion.to(device).train()
    way = case["way"]
    if way in ("checkpointing", "both"):
        memory.checkpoint_activations(model)
    if way == "compile":
        memory.compile_model(model, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    small, large = (torch.randn(case["batch"], 3, *size, device=device) for size in (SMALL, case["size"]))
    targets = [{"labels": torch.randint(91, (case["objects"],), device=device),
                "boxes": torch.rand(case["objects"], 4, device=device) * 0.4 + 0.3} for _ in range(case["batch"])]

    def step(images: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=way in ("bf16", "both")):
            outputs = model(images)
        loss = criterion.weighted_sum(criterion(outputs, targets))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    def timed() -> None:
        begin, processor = time.perf_counter(), time.process_time()
        step(large)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
        else:
            seconds.append((time.process_time() - processor) / case["threads"])

    seconds: list[float] = []

    begin = time.perf_counter()
    step(small)
    first = time.perf_counter() - begin
    peaks = []
    for _ in range(case["repeats"]):
        optimizer.zero_grad()
        before = memory.used_memory(device)
        peaks.append(memory.peak_memory(timed, device) - before)
    return {**case, "peak_bytes": statistics.median(peaks), "seconds": statistics.median(seconds), "first_seconds": first}


def measure_apart(case: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | | peak MB | of plain | s a step | of plain | first s |", "|---|---|---|---|---|---|---|"]
    plain = {row["model"]: row for row in rows if row["way"] == "plain"}
    for row in rows:
        base = plain.get(row["model"])
        shares = [f"{row[name] / base[name]:.2f}" if base else "" for name in ("peak_bytes", "seconds")]
        lines.append(f"| {row['model']} | {row['way']} | {row['peak_bytes'] / 1e6:.0f} | {shares[0]} | "
                     f"{row['seconds']:.2f} | {shares[1]} | {row['first_seconds']:.1f} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else platform.processor() or "CPU"
    print(f"{where}, {args.threads} threads, PyTorch {torch.__version__}, batch [{args.batch}, 3, {args.size[0]}, "
          f"{args.size[1]}], {args.objects} objects an image", flush=True)
    rows = []
    for model in args.model:
        for way in args.ways:
            rows.append(measure_apart({"model": model, "way": way, "size": list(args.size), "batch": args.batch,
                                       "objects": args.objects, "device": args.device, "threads": args.threads,
                                       "repeats": args.repeats}))
            row = rows[-1]
            print(f"{model}, {way}: {row['peak_bytes'] / 1e6:.0f} MB, {row['seconds']:.2f} s", flush=True)
    print("\n" + table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    arguments = get_args_parser().parse_args()
    if arguments.case:
        print(json.dumps(measure(json.loads(arguments.case))))
    else:
        main(arguments)
