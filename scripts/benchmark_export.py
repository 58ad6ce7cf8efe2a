#!/usr/bin/env python3
"""What an exported model costs and gives: AP, file size and latency of PyTorch and of each ONNX variant.

    python scripts/benchmark_export.py --resume outputs/tiny_detr/best.pth              # on the synthetic validation data
    python scripts/benchmark_export.py --resume CKPT --coco_path DIR --threads 2 --repeats 9
    python scripts/benchmark_export.py --model detr_resnet50 --image_size 480 640       # random weights: no AP

AP is what ``main.py --eval`` prints: of the checkpoint, and with ``--engine onnxruntime`` of each file, post-processing
inside. Latency is of one image at the checkpoint's preprocessing, from its tensor to boxes in pixels; the variants take
turns, and what is told is the median: on one thread of the processor's time, so that other programs matter less, on
several of the clock. Both engines have the same threads.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as command_line
from detr import build_model, checkpoint, engines, list_models
from detr.export import PRECISIONS, accepted, write_onnx
from detr.loading import Detector, load
from detr.nested_tensor import nested_tensor_from_tensor_list
from scripts.export import drawn


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--resume", metavar="CKPT", help="checkpoint of main.py")
    source.add_argument("--model", choices=list_models(), metavar="PRESET", help="with random weights, and so "
                        f"without AP; of {', '.join(list_models())}")
    parser.add_argument("--coco_path", metavar="DIR", help="data to evaluate on (None: the synthetic)")
    parser.add_argument("--no_ap", action="store_true", help="latency and size alone")
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, help="files to make")
    parser.add_argument("--image_size", nargs=2, type=int, metavar=("H", "W"), help="pixels of the image that is timed, "
                        "and of those that the file is compared on (None: as the checkpoint's preprocessing makes them)")
    parser.add_argument("--threads", type=int, default=1, help="of both engines, on CPU")
    parser.add_argument("--repeats", type=int, default=9, help="calls that are timed, of each kind")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    return parser


def random_detector(name: str, folder: Path) -> Detector:
    """A preset with random weights, by way of a file, since an exported model says what it was made of."""
    torch.manual_seed(0)
    file = folder / f"{name}.pth"
    checkpoint.save(file, {"model": build_model(name)[0].state_dict()})
    return load(file, model=name)


def average_precision(file: str, exported: bool, coco_path: str | None) -> float:
    words = ["--eval", "--resume", file, "--num_workers", "0", "--device", "cpu"]
    words += ["--engine", "onnxruntime"] * exported + (["--coco_path", coco_path] if coco_path else [])
    with contextlib.redirect_stdout(io.StringIO()):
        results = command_line.main(command_line.get_args_parser().parse_args(words))
    return results["coco_eval_bbox"][0]


def latencies(calls: dict[str, Callable[[], Any]], repeats: int, threads: int) -> dict[str, float]:
    """The median seconds of each call; they take turns, after two rounds that do not count."""
    clock = time.process_time if threads == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            start = clock()
            call()
            if repeat > 1:
                taken[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        detector = random_detector(args.model, folder) if args.model else load(args.resume)
        if args.image_size:
            detector.preprocessing = dataclasses.replace(detector.preprocessing, size=tuple(args.image_size))
        pictures = drawn(detector.channels)
        model, gaps = accepted(detector, pictures)
        files = {precision: write_onnx(detector, model, gaps, folder / f"{precision}.onnx", pictures, precision=precision)
                 for precision in args.precision}
        image = torch.randn(3, *args.image_size) if args.image_size else detector.preprocessing(pictures[0])
        samples, originals = nested_tensor_from_tensor_list([image]), torch.tensor([image.shape[-2:]])

        @torch.inference_mode()
        def in_pytorch() -> None:
            detector.postprocessors["bbox"](detector.model(samples), originals)

        def in_onnx(file: Path) -> Callable[[], Any]:
            running = engines.session(str(file))
            return lambda: engines.run(running, (samples.tensors, originals, originals))

        calls = {"PyTorch": in_pytorch, **{name: in_onnx(report.file) for name, report in files.items()}}
        seconds = latencies(calls, args.repeats, args.threads)
        weights = sum(p.numel() * p.element_size() for p in detector.model.state_dict().values())
        rows: list[dict[str, Any]] = [{"what": "PyTorch", "bytes": weights, "seconds": seconds["PyTorch"]}]
        rows += [{"what": name, "bytes": report.size, "seconds": seconds[name],
                  "float32_layers": len(report.float32)} for name, report in files.items()]
        if args.resume and not args.no_ap:
            for row in rows:
                exported = row["what"] != "PyTorch"
                row["AP"] = average_precision(str(folder / f"{row['what']}.onnx") if exported else args.resume, exported,
                                              args.coco_path)
    print(f"{detector.name}, one image {list(image.shape[-2:])}, {args.threads} threads, PyTorch {torch.__version__}")
    print(f"{'':10} {'AP':>7} {'change':>8} {'MB':>7} {'ms':>8} {'speed':>7}")
    for row in rows:
        ap = f"{row['AP']:7.4f} {row['AP'] - rows[0]['AP']:+8.4f}" if "AP" in row else f"{'':16}"
        print(f"{row['what']:10} {ap} {row['bytes'] / 1e6:7.1f} {row['seconds'] * 1e3:8.1f} "
              f"{rows[0]['seconds'] / row['seconds']:6.2f}x")
    if args.json:
        args.json.write_text(json.dumps({"model": detector.name, "torch": torch.__version__, "threads": args.threads,
                                         "image": list(image.shape), "rows": rows}, indent=1))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
