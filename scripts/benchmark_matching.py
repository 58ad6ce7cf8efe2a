#!/usr/bin/env python3
"""Matching: all layers at once beside one layer and image after the other, in one process and in turns.

    python scripts/benchmark_matching.py                                # what this machine has
    python scripts/benchmark_matching.py --device cpu --threads 1 --repeats 9 --json matching.json

``layers`` are 6 decoder layers of 16 images with 100 objects, 300 queries and 91 classes; ``proposals`` are those of a
two-stage model, 20,000 tokens of 2 images (16 on CUDA) with 100 objects, which have one class. Predictions are random:
a hard case for an assignment, since many queries suit many objects. Boxes of ``--trained`` ones lie around objects.

    plain       each layer and image by itself, as it is written down: class cost of all classes, ``cdist``, generalized
                IoU, the copy to the CPU, SciPy
    ours        ``HungarianMatcher`` called as the criterion calls it, the stacking of layers included

    time        median of ``--repeats`` calls after one that does not count, from the call to the match on the CPU. All of
                it is on the critical path of a training step: the loss cannot start before
    processor   median processor time of all threads, on a machine that others use the steadier one
    costs       the part of our time until costs are on the CPU; ``assignment``: the rest, SciPy. On CUDA the device is
                idle for this
    waits       how often the CPU waited for the device (CUDA alone)
    same        whether both gave the same pairs; else by how much the costs of the whole assignments differ
"""
from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detr import matcher as matching
from detr.boxes import box_cxcywh_to_xyxy, generalized_box_iou
from detr.matcher import HungarianMatcher, focal_class_cost, softmax_class_cost
from detr.set_criterion import stack
from detr.structures import Match, Outputs, Target

CASES = ("layers", "proposals")
WEIGHTS = {"softmax": (1, 5, 2), "focal": (2, 5, 2)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="See the head of this file for what is "
                                     "measured and how.")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ... "
                        "(default: %(default)s)")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES, help="what is matched (default: both)")
    parser.add_argument("--class_loss", nargs="+", default=list(WEIGHTS), choices=list(WEIGHTS), help="costs of "
                        "layers (default: both)")
    parser.add_argument("--objects", type=int, nargs="+", default=[100], help="of an image (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="images (default: layers 16; proposals 2, on CUDA 16)")
    parser.add_argument("--trained", action="store_true", help="boxes around the objects")
    parser.add_argument("--threads", type=int, help="on CPU (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=7, help="calls that are timed (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    return parser


def data(case: str, batch: int, objects: int, class_loss: str, trained: bool,
         device: torch.device) -> tuple[list[Outputs], list[Target]]:
    """Layers and targets."""
    generator = torch.Generator().manual_seed(0)
    layers, queries, classes = (6, 300, 91) if case == "layers" else (1, 20000, 91)

    def boxes(*shape: int) -> Tensor:
        drawn = torch.rand(*shape, 4, generator=generator)
        return drawn * torch.tensor([0.6, 0.6, 0.3, 0.3]) + torch.tensor([0.2, 0.2, 0.02, 0.02])

    kinds = classes if case == "layers" else 1
    targets: list[Target] = [{"labels": torch.randint(kinds, (objects,), generator=generator), "boxes": boxes(objects)}
                             for _ in range(batch)]
    outputs: list[Outputs] = []
    for _ in range(layers):
        predicted = boxes(batch, queries)
        if trained:
            near = torch.stack([target["boxes"][torch.randint(objects, (queries,), generator=generator)]
                                for target in targets])
            predicted = (near + 0.02 * torch.randn(near.shape, generator=generator)).clamp(0.01, 0.99)
        logits = torch.randn(batch, queries, classes + (class_loss == "softmax"), generator=generator)
        outputs.append({"pred_logits": logits.to(device), "pred_boxes": predicted.to(device)})
    return outputs, [{"labels": t["labels"].to(device), "boxes": t["boxes"].to(device)} for t in targets]


def plain_cost(logits: Tensor, boxes: Tensor, target: Target, class_loss: str) -> Tensor:
    """Costs ``[Q, N]`` of one image of one layer."""
    if class_loss == "softmax":
        of_class = -logits.softmax(-1)
    else:
        prob = logits.sigmoid()
        negative = 0.75 * prob ** 2 * -(1 - prob + 1e-8).log()
        of_class = 0.25 * (1 - prob) ** 2 * -(prob + 1e-8).log() - negative
    giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target["boxes"]))
    a, b, c = WEIGHTS[class_loss]
    return a * of_class[:, target["labels"]] + b * torch.cdist(boxes, target["boxes"], p=1) - c * giou


def plain(layers: list[Outputs], targets: list[Target], class_loss: str) -> Match:
    match = []
    for layer in layers:
        for logits, boxes, target in zip(layer["pred_logits"], layer["pred_boxes"], targets):
            query, obj = linear_sum_assignment(plain_cost(logits, boxes, target, class_loss).cpu())
            match.append((torch.as_tensor(query), torch.as_tensor(obj)))
    return match


def same(one: Match, other: Match, layers: list[Outputs], targets: list[Target], class_loss: str) -> str:
    if all(torch.equal(a, b) for pairs in zip(one, other) for a, b in zip(*pairs)):
        return "yes"
    rows = [(logits, boxes, target) for layer in layers
            for logits, boxes, target in zip(layer["pred_logits"], layer["pred_boxes"], targets)]
    costs = [plain_cost(*row, class_loss).double().cpu() for row in rows]
    totals = [sum(cost[query, obj].sum().item() for cost, (query, obj) in zip(costs, match)) for match in (one, other)]
    return f"{totals[1] - totals[0]:+.1e}"


def waits(call: Callable[[], Any]) -> int:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


def measure(calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each call, in turns: ``time``, ``processor``, and of ``ours`` ``assignment``."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"time": [], "processor": [], "assignment": []} for name in calls}
    assign_all = matching.assign_all
    spent = [0.0]

    def timed(*args: Any) -> None:
        begin = time.perf_counter()
        assign_all(*args)
        spent[0] += time.perf_counter() - begin

    matching.assign_all = timed
    try:
        for repeat in range(repeats + 1):
            for name, call in calls.items():
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                spent[0] = 0.0
                begin, processor = time.perf_counter(), time.process_time()
                call()
                found = {"time": time.perf_counter() - begin, "processor": time.process_time() - processor,
                         "assignment": spent[0]}
                for part, value in found.items():
                    seconds[name][part] += [value] * (repeat > 0)
    finally:
        matching.assign_all = assign_all
    return {name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in seconds.items()}


def compare(case: str, objects: int, class_loss: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    batch = args.batch or (16 if case == "layers" or device.type == "cuda" else 2)
    layers, targets = data(case, batch, objects, class_loss, args.trained, device)
    class_cost = softmax_class_cost if class_loss == "softmax" else partial(focal_class_cost, alpha=0.25)
    matcher = HungarianMatcher(*WEIGHTS[class_loss], class_cost)
    calls: dict[str, Callable[[], Match]] = {"plain": lambda: plain(layers, targets, class_loss),
                                             "ours": lambda: matcher(stack(layers), targets * len(layers))}
    row: dict[str, Any] = {"case": case, "class_loss": class_loss, "layers": len(layers), "batch": batch,
                           "objects": objects, "queries": layers[0]["pred_boxes"].shape[1],
                           **measure(calls, device, args.repeats),
                           "same": same(calls["plain"](), calls["ours"](), layers, targets, class_loss)}
    for name, call in calls.items():
        row[name]["waits"] = waits(call) if device.type == "cuda" else None
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [("case", "class", "layers", "batch", "objects", "queries", "plain ms", "ours ms", "time", "processor",
              "costs ms", "assignment ms", "waits", "same")]
    for row in rows:
        one, other = row["plain"], row["ours"]
        lines.append((row["case"], row["class_loss"], *(str(row[x]) for x in ("layers", "batch", "objects", "queries")),
                      f"{1e3 * one['time']:.1f}", f"{1e3 * other['time']:.1f}", f"{one['time'] / other['time']:.2f}x",
                      f"{one['processor'] / other['processor']:.2f}x",
                      f"{1e3 * (other['time'] - other['assignment']):.1f}", f"{1e3 * other['assignment']:.1f}",
                      "" if other["waits"] is None else f"{one['waits']} : {other['waits']}", row["same"]))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(n) if i < 2 else cell.rjust(n) for i, (cell, n) in enumerate(zip(line, widths)))
                     for line in lines)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    if args.repeats < 1:
        raise SystemExit(f"--repeats {args.repeats}: at least 1 call is needed for a median")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
             "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
    print(", ".join(f"{key} {fact}" for key, fact in facts.items()), flush=True)
    rows = [compare(case, objects, class_loss, device, args) for case in args.case for objects in args.objects
            for class_loss in (args.class_loss if case == "layers" else ["focal"])]
    print(table(rows))
    print("time, processor: how many times faster ours is. Nothing of a match is hidden: all of ``ours ms`` is on the "
          "critical path" + (", and the device idles for ``assignment ms`` of it" if device.type == "cuda" else ""))
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(build_parser().parse_args())
