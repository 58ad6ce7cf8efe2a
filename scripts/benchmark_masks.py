#!/usr/bin/env python3
"""Masks and panoptic maps from a model's outputs: time and memory, against the published way at full size.

    python scripts/benchmark_masks.py --threads 1
    python scripts/benchmark_masks.py --device cuda --batch 1 4 16 --json masks.json

A batch of images of 800 x 1333 pixels, whose originals have 480 x 800, with 100 queries; mask logits have a quarter of
the resolution and are smooth, as a mask head's are, so that about half of all pixels are inside.

    instances   ``naive`` resizes the masks of all queries and images at once, as published: logits, probabilities, then
                masks; ``chunked`` is ``PostProcessSegm``. ``+ rle``: as run-length codes, naive from the masks of the
                whole batch. ``best 20``: of 20 detections an image alone
    panoptic    20 queries an image are kept, some stuff classes twice; ``naive`` takes the softmax of all masks of an
                image at full size, as published, ``chunked`` is ``PostProcessPanoptic``
    ms          median of ``--repeats`` calls after one that does not count: on CPUs of the processor's time, divided by
                the threads, so that other programs matter less
    peak        memory beyond the inputs, the result included, as in benchmark_attention.py: CUDA's allocator; on CPUs
                the resident memory of a process of its own
    same        whether the result is that of ``naive``, bit for bit
"""
from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark_attention import PeakMemory, machine, median_time

from detr.panoptic import PostProcessPanoptic
from detr.postprocess import PostProcess, PostProcessSegm, encode
from detr.structures import Outputs

KEPT = 20
THINGS = {label: label < 80 for label in range(133)}
TASKS = {"instances": ["naive", "chunked", "naive + rle", "chunked + rle", "chunked, best 20"],
         "panoptic": ["naive", "chunked"]}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=TASKS, help="what is made of the outputs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="images of a batch")
    parser.add_argument("--queries", type=int, default=100, help="masks of each image")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], metavar=("HEIGHT", "WIDTH"),
                        help="of images as the model gets them, in pixels")
    parser.add_argument("--original", type=int, nargs=2, default=[480, 800], metavar=("HEIGHT", "WIDTH"),
                        help="of the originals, which masks are made for, in pixels")
    parser.add_argument("--chunk", type=int, default=4, help="masks at full size at a time")
    parser.add_argument("--threads", type=int, help="on CPU (None: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=3, help="calls that are timed")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    parser.add_argument("--case", help=argparse.SUPPRESS)                       # one case of a run on CPU, in json
    return parser


def some_outputs(case: dict[str, Any]) -> Outputs:
    generator = torch.Generator().manual_seed(0)
    batch, queries, (height, width) = case["batch"], case["queries"], (-(-side // 4) for side in case["size"])
    logits = torch.randn(batch, queries, len(THINGS) + 1, generator=generator)
    logits[..., -1] += 10                                                           # "no object"
    for i in range(min(KEPT, queries)):
        logits[:, i, (7 * i if i < 12 else 90 + i // 2) % len(THINGS)] += 25
    coarse = torch.randn(batch, queries, 12, 20, generator=generator)
    masks = 5 * F.interpolate(coarse, (height, width), mode="bicubic")
    return {"pred_logits": logits.to(case["device"]), "pred_masks": masks.to(case["device"]),
            "pred_boxes": torch.rand(batch, queries, 4, generator=generator).to(case["device"])}


def naive_instances(outputs: Outputs, originals: list[tuple[int, int]], sizes: list[tuple[int, int]]) -> list[Tensor]:
    largest = tuple(max(side) for side in zip(*sizes))
    masks = F.interpolate(outputs["pred_masks"], largest, mode="bilinear", align_corners=False).sigmoid() > 0.5
    return [F.interpolate(mask[:, None, :h, :w].float(), original, mode="nearest").byte()
            for mask, (h, w), original in zip(masks, sizes, originals)]


def naive_panoptic(outputs: Outputs, sizes: list[tuple[int, int]], targets: list[tuple[int, int]]) -> list[dict]:
    found = []
    for logits, masks, size, target in zip(outputs["pred_logits"], outputs["pred_masks"], sizes, targets):
        scores, labels = logits.softmax(-1).max(-1)
        keep = (scores > 0.85) & (labels < len(THINGS))
        labels = labels[keep]
        masks = F.interpolate(masks[None, keep], size, mode="bilinear", align_corners=False)[0].flatten(1).mT   # [HW, n]
        first = True
        while True:
            ids = masks.softmax(-1).argmax(-1).view(size)
            if first:
                for i, label in enumerate(labels.tolist()):
                    if not THINGS[label]:
                        ids[ids == i] = labels.tolist().index(label)
            colours = np.stack([ids.cpu().numpy() >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
            picture = Image.fromarray(colours).resize(target[::-1], Image.Resampling.NEAREST)
            final = np.asarray(picture).astype(np.int64) @ [1, 256, 65536]
            areas = [int((final == i).sum()) for i in range(len(labels))]
            small = torch.tensor([area <= 4 for area in areas], dtype=torch.bool, device=labels.device)
            if not small.any():
                break
            masks, labels, first = masks[:, ~small], labels[~small], False
        file = io.BytesIO()
        picture.save(file, format="PNG")
        found.append({"png_string": file.getvalue(), "segments_info": [
            {"id": i, "isthing": THINGS[label], "category_id": label, "area": area}
            for i, (label, area) in enumerate(zip(labels.tolist(), areas))]})
    return found


def call(case: dict[str, Any], outputs: Outputs) -> Callable[[], Any]:
    """What is measured."""
    sizes, originals = [tuple(case["size"])] * case["batch"], [tuple(case["original"])] * case["batch"]
    if case["task"] == "panoptic":
        panoptic = PostProcessPanoptic(THINGS)
        return ((lambda: naive_panoptic(outputs, sizes, originals)) if case["path"] == "naive" else
                (lambda: panoptic(outputs, sizes, originals)))
    if case["path"] == "naive":
        return lambda: naive_instances(outputs, originals, sizes)
    if case["path"] == "naive + rle":
        return lambda: [encode(masks) for masks in naive_instances(outputs, originals, sizes)]
    results = PostProcess()(outputs, torch.tensor(originals))
    if "best" in case["path"]:
        results = [{**result, "queries": result["scores"].topk(KEPT)[1]} for result in results]
        for result in results:
            result |= {name: result[name][result["queries"]] for name in ("scores", "labels", "boxes")}
    segm = PostProcessSegm(rle="rle" in case["path"], chunk=case["chunk"])
    return lambda: [result["masks"] for result in segm(results, outputs, torch.tensor(originals), torch.tensor(sizes))]


def digest(result: list[Any]) -> int:
    """A number that tells results apart."""
    return zlib.crc32(b"".join(x.cpu().numpy().tobytes() if isinstance(x, Tensor) else repr(x).encode() for x in result))


@torch.no_grad()
def measure(case: dict[str, Any]) -> dict[str, Any]:
    device = torch.device(case["device"])
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    small = {**case, "size": [64, 64], "original": [48, 48], "batch": 1}
    call(small, some_outputs(small))()                                              # libraries are loaded
    once = call(case, some_outputs(case))
    with PeakMemory(device) as peak:
        result = once()
    found = digest(result)
    del result
    return {**case, "seconds": seconds(once, device, case["repeats"]), "peak_bytes": peak.bytes, "digest": found}


def seconds(once: Callable[[], Any], device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        return median_time(once, device, repeats)
    times = []
    for _ in range(repeats):                                    # a call before them was for memory
        begin = time.process_time()
        once()
        times.append(time.process_time() - begin)
    return statistics.median(times) / torch.get_num_threads()


def measure_apart(case: dict[str, Any]) -> dict[str, Any]:
    """The same in a process of its own, whose memory nothing else has touched."""
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    facts = machine(device, args.threads)
    print(", ".join(f"{key} {fact}" for key, fact in facts.items()))
    print(f"{'task':<11}{'images':>6}  {'path':<18}{'ms':>9}{'peak MB':>10}  same", flush=True)
    rows = []
    for task in args.task:
        for batch in args.batch:
            naive: dict[str, int] = {}
            for path in TASKS[task]:
                case = {"task": task, "batch": batch, "path": path, "device": str(device), "queries": args.queries,
                        "size": args.size, "original": args.original, "chunk": args.chunk, "threads": args.threads,
                        "repeats": args.repeats}
                row = measure_apart(case) if device.type == "cpu" else measure(case)
                other = naive.setdefault(path.replace("chunked", "naive"), row["digest"])
                row["same"] = None if path.startswith("naive") or "best" in path else other == row["digest"]
                rows.append(row)
                print(f"{task:<11}{batch:>6}  {path:<18}{1e3 * row['seconds']:>9.0f}{row['peak_bytes'] / 1e6:>10.0f}  "
                      f"{'' if row['same'] is None else 'yes' if row['same'] else 'no'}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    arguments = get_args_parser().parse_args()
    if arguments.case:
        print(json.dumps(measure(json.loads(arguments.case))))
    else:
        main(arguments)
