#!/usr/bin/env python3
"""COCO evaluation: time and memory of each judge on the same synthetic predictions, and how far their numbers differ.

    python scripts/benchmark_coco_eval.py                                   # 5,000 images, 100 detections each; minutes
    python scripts/benchmark_coco_eval.py --images 500 --masks --repeats 1

The data is made here and looks like COCO's: 80 classes of unequal frequency, about 7 objects an image, some in heaps of
one class, 1 of 80 a crowd. Of the detections 60 of 100 are moved objects, one in seven of them of another class; scores
are float32. With ``--masks`` objects are polygons, detections ellipses as run lengths, and both kinds are scored.

Each run of a judge is a process of its own, and does what evaluation in training does: ``CocoEvaluator``, one ``update``
an image, then the judge; columns are medians over the runs.

    collect     all ``update``
    load        predictions and ground truth into the form that the judge takes
    evaluate    ``evaluate`` and ``accumulate``, by the clock; cpu: the same in processor seconds of all threads
    peak        memory beyond what the process had before the first ``update`` (VmHWM; Linux alone, else missing)
    difference  the largest, of all precisions, recalls and scores and the twelve numbers, to the first judge's
"""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.annotations import COCO_CATEGORIES, class_table, index
from datasets.coco_eval import CocoEvaluator
from datasets.fast_coco_eval import JUDGES
from detr.structures import Detections

HEIGHT, WIDTH = 480, 640
COLUMNS = ("collect", "load", "evaluate", "cpu", "peak")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="See the head of this file for what is "
                                     "measured and how.")
    parser.add_argument("--images", type=int, default=5000, help="that are scored (default: %(default)s)")
    parser.add_argument("--detections", type=int, default=100, help="of an image (default: %(default)s)")
    parser.add_argument("--masks", action="store_true", help="score masks besides boxes")
    parser.add_argument("--judges", nargs="+", default=list(JUDGES), choices=JUDGES, help="who computes the "
                        "numbers; others are compared with the first (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each judge (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    parser.add_argument("--run", help=argparse.SUPPRESS)                        # one run: judge, and where its arrays go
    return parser


class Synthetic:
    """Ground truth, and the detections of one image after the other."""

    def __init__(self, images: int, detections: int, masks: bool) -> None:
        self.random, self.detections, self.masks = np.random.default_rng(0), detections, masks
        self.ids = np.array(sorted(COCO_CATEGORIES))
        self.frequency = 1 / np.arange(1, len(self.ids) + 1) ** 0.8
        self.frequency /= self.frequency.sum()
        self.truth = {139 + 37 * i: self.objects() for i in range(images)}

    def boxes(self, n: int) -> np.ndarray:
        """``[n, 4]`` xywh within the image."""
        size = np.exp(self.random.normal(4.2, 1, (n, 2))).clip(2, (WIDTH - 1, HEIGHT - 1))
        return np.concatenate([self.random.random((n, 2)) * ((WIDTH, HEIGHT) - size), size], 1)

    def objects(self) -> tuple[np.ndarray, np.ndarray]:
        n = min(int(self.random.geometric(1 / 8.2)) - 1, 90)
        classes = self.random.choice(len(self.ids), n, p=self.frequency)
        classes[1:n // 2] = classes[:1]
        return self.boxes(n).round(2), classes

    def dataset(self) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for image_id, (boxes, classes) in self.truth.items():
            for (x, y, w, h), k in zip(boxes.tolist(), classes):
                rows.append({"id": len(rows) + 1, "image_id": image_id, "category_id": int(self.ids[k]),
                             "bbox": [x, y, w, h], "area": w * h * float(self.random.uniform(0.4, 0.9)),
                             "iscrowd": int(self.random.random() < 1 / 80),
                             "segmentation": [[x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]]})
        return {"images": [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in self.truth],
                "categories": [{"id": i, "name": name} for i, name in COCO_CATEGORIES.items()], "annotations": rows}

    def predictions(self) -> Iterator[dict[int, Detections]]:
        n, random = self.detections, self.random
        for image_id, (objects, kinds) in self.truth.items():
            boxes, classes = self.boxes(n), random.choice(len(self.ids), n, p=self.frequency)
            near = (random.random(n) < 0.6) & (len(objects) > 0)
            if len(objects):
                which = random.integers(0, len(objects), n)
                moved = objects[which] + random.normal(0, 0.08, (n, 4)) * np.tile(objects[which, 2:], 2)
                moved[:, 2:] = np.abs(moved[:, 2:])
                boxes = np.where(near[:, None], moved, boxes)
                classes = np.where(near & (random.random(n) < 6 / 7), kinds[which], classes)
            boxes[:, 2:] += boxes[:, :2]
            found: Detections = {
                "scores": torch.from_numpy(np.where(near, random.beta(2, 3, n), random.beta(1, 6, n))).float(),
                "labels": torch.from_numpy(self.ids[classes]), "boxes": torch.from_numpy(boxes).float()}
            if self.masks:
                found["masks"] = ellipses(boxes)
            yield {image_id: found}


def ellipses(boxes_xyxy: np.ndarray) -> list[dict[str, Any]]:
    """The run lengths of an ellipse in each box, as polygons of 24 corners."""
    from pycocotools import mask
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    low, high = boxes_xyxy[:, :2].clip(0, (WIDTH - 2, HEIGHT - 2)), boxes_xyxy[:, 2:].clip(2, (WIDTH, HEIGHT))
    around = np.stack([np.cos(angle), np.sin(angle)], 1) / 2                                    # [24, 2]
    corners = ((low + high) / 2)[:, None] + around * np.maximum(high - low, 1)[:, None]
    codes = mask.frPyObjects(corners.reshape(len(corners), 48).tolist(), HEIGHT, WIDTH)
    return [{"size": list(code["size"]), "counts": code["counts"].decode()} for code in codes]


def status(field: str) -> float:
    """A line of /proc/self/status, in MiB."""
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(field + ":"))


def run(judge: str, arrays: str, args: argparse.Namespace) -> dict[str, float]:
    """One run of a judge; its arrays go into the file ``arrays``."""
    torch.set_num_threads(args.threads)
    data = Synthetic(args.images, args.detections, args.masks)
    evaluator = CocoEvaluator(index(data.dataset()), class_table(COCO_CATEGORIES), 91, args.masks, judge)
    figures = dict.fromkeys(COLUMNS, 0.0)
    try:
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = float("nan")
    for predictions in data.predictions():
        start = time.perf_counter()
        evaluator.update(predictions)
        figures["collect"] += time.perf_counter() - start
    results = {}
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator._gather()
        for kind in evaluator._kinds():
            start = time.perf_counter()
            of_kind = evaluator._loaded(kind, judge == "fast")
            loaded, cpu = time.perf_counter(), time.process_time()
            of_kind.evaluate()
            of_kind.accumulate()
            figures["evaluate"] += time.perf_counter() - loaded
            figures["cpu"] += time.process_time() - cpu
            figures["load"] += loaded - start
            of_kind.summarize()
            results |= {f"{kind}_{name}": of_kind.eval[name] for name in ("precision", "recall", "scores")}
            results[f"{kind}_stats"] = of_kind.stats
            del of_kind
    figures["peak"] = status("VmHWM") - before if before == before else before
    np.savez(arrays, **results)
    return figures


def main() -> None:
    args = build_parser().parse_args()
    if args.run:
        judge, arrays = args.run.split(":", 1)
        print(json.dumps(run(judge, arrays, args)))
        return
    threads = str(args.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
    kinds = "boxes and masks" if args.masks else "boxes"
    print(f"{args.images} images, {args.detections} detections each, {kinds}; medians of {args.repeats}; {args.threads} "
          f"threads; {platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}")
    print(f"{'judge':<12} {'collect s':>9} {'load s':>9} {'evaluate s':>10} {'cpu s':>9} {'peak MiB':>9}  difference")
    figures: dict[str, Any] = {}
    reference: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for judge in args.judges:
            arrays = f"{folder}/{judge}.npz"
            runs = [json.loads(subprocess.run([sys.executable, __file__, *sys.argv[1:], "--run", f"{judge}:{arrays}"],
                                              env=environment, check=True, stdout=subprocess.PIPE).stdout)
                    for _ in range(args.repeats)]
            row = {name: statistics.median(one[name] for one in runs) for name in COLUMNS}
            with np.load(arrays) as saved:
                mine = dict(saved)
            reference = reference or mine
            difference = max(float(np.abs(mine[name] - reference[name]).max()) for name in mine)
            figures[judge] = {**row, "difference": difference, "runs": runs}
            print(f"{judge:<12} {row['collect']:9.2f} {row['load']:9.2f} {row['evaluate']:10.2f} {row['cpu']:9.2f} "
                  f"{row['peak']:9.0f}  {difference:g}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
