#!/usr/bin/env python3
"""What exact padding costs: forward pass and training step of DETRs, with ``--padding exact`` against ``legacy``.

    python scripts/benchmark_padding.py                                     # ResNet-50, PVT-Small, PVT v2-B2
    python scripts/benchmark_padding.py --model deformable_detr_resnet50 --short_side 800 --batch 4

Images of one batch have the sides of COCO's, 4:3, 3:2 and 3:4 in turn, each with its own short side from 0.8 to 1 times
``--short_side``, so that a part of the batch is padding; weights and targets are random, the arithmetic is that of a
training. The two kinds of padding take turns on the same weights and images. Times are medians over ``--repeats`` calls
after one that does not count; on CPUs of the processor's time, divided by the threads, so that other programs matter
less. Memory is the peak of CUDA's allocator; on CPUs it is not measured.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detr import build_model, list_models
from detr.backbone import backbone_of
from detr.nested_tensor import nested_tensor_from_tensor_list
from detr.structures import Target

MODELS = ("detr_resnet50", "detr_pvt_small", "detr_pvt_v2_b2")
RATIOS = (3 / 4, 2 / 3, 4 / 3)                          # height / width
PADDINGS = ("legacy", "exact")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list_models(), metavar="PRESET",
                        help=f"models to measure, one after another, of {', '.join(list_models())}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--batch", type=int, default=2, help="images of a batch")
    parser.add_argument("--short_side", type=int, default=800, help="pixels of the largest image")
    parser.add_argument("--threads", type=int, help="on CPU (None: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=5, help="calls that are timed, of each kind")
    parser.add_argument("--what", nargs="+", default=["forward", "training step"], choices=["forward", "training step"],
                        help="what is timed")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    return parser


def some_images(batch: int, short: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = []
    for i in range(batch):
        side, ratio = round(short * (1 - 0.2 * i / max(batch - 1, 1))), RATIOS[i % len(RATIOS)]
        size = (side, round(side / ratio)) if ratio < 1 else (round(side * ratio), side)
        images.append(torch.randn(3, *size, generator=generator))
    return images


def some_targets(batch: int, device: torch.device) -> list[Target]:
    generator = torch.Generator().manual_seed(1)
    return [{"labels": torch.randint(91, (7,), generator=generator).to(device),
             "boxes": (torch.rand(7, 4, generator=generator) * 0.4 + 0.3).to(device)} for _ in range(batch)]


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start
    start = time.process_time()
    call()
    return (time.process_time() - start) / torch.get_num_threads()


def measure(name: str, what: str, args: argparse.Namespace) -> dict[str, Any]:
    """The median seconds and the peak memory of each kind of padding."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    model, criterion, _ = build_model(name, padding="exact")
    model, criterion = model.to(device), criterion.to(device)
    samples = nested_tensor_from_tensor_list(some_images(args.batch, args.short_side)).to(device)
    targets = some_targets(args.batch, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)                      # steps, and leaves the weights as they are

    @torch.no_grad()
    def forward() -> None:
        model(samples)

    def training_step() -> None:
        loss = criterion.weighted_sum(criterion(model(samples), targets))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()

    call = forward if what == "forward" else training_step
    model.train(what != "forward")
    times: dict[str, list[float]] = {padding: [] for padding in PADDINGS}
    peaks: dict[str, float] = {}
    for repeat in range(args.repeats + 1):
        for padding in PADDINGS if repeat % 2 else PADDINGS[::-1]:
            backbone_of(model).exact = padding == "exact"
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            taken = seconds(call, device)
            if device.type == "cuda":
                peaks[padding] = torch.cuda.max_memory_allocated(device) / 2**20
            if repeat:
                times[padding].append(taken)
    height, width = samples.tensors.shape[-2:]
    return {"model": name, "what": what, "batch": [args.batch, height, width], "padded": samples.padded_share,
            **{padding: statistics.median(values) for padding, values in times.items()},
            "cost": statistics.median(exact / legacy - 1 for exact, legacy in zip(times["exact"], times["legacy"])),
            "peak_mib": peaks}


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    print(f"PyTorch {torch.__version__}, {args.device} ({where}), float32, {args.repeats} repeats")
    print(f"{'':28} {'':13} {'batch':>15}  padded   legacy    exact     cost")
    rows = []
    for name in args.model:
        for what in args.what:
            row = measure(name, what, args)
            rows.append(row)
            shape = "x".join(map(str, row["batch"]))
            print(f"{name:28} {what:13} {shape:>15}  {row['padded']:6.1%}  {row['legacy']:6.3f} s {row['exact']:6.3f} s  "
                  f"{row['cost']:+6.1%}", *(f"{padding} {peak:.0f} MiB" for padding, peak in row["peak_mib"].items()),
                  flush=True)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "device": where, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
