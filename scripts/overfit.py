#!/usr/bin/env python3
"""Can the model learn at all? A few images by heart, as a check of the whole path from pictures to AP.

    python scripts/overfit.py --coco_path DIR

trains a small model from random weights on the first images of a data set in COCO's layout, without augmentation, until
it finds their objects again. Ends with 1 where it did not reach the target.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import build_evaluators, collate
from datasets.annotations import read_annotations
from datasets.coco import CocoDetection
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, eval_transforms, normalisation
from detr.presets import PRESETS
from engine import Progress, evaluate, train_one_epoch

MODELS = [name for name, preset in PRESETS.items() if preset.model.from_scratch]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Learn a few images by heart.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--coco_path", required=True, help="folder in COCO's layout")
    parser.add_argument("--split", default="train", choices=("train", "val"), help="where the images come from")
    parser.add_argument("--images", type=int, default=8, help="how many images, all of them in each batch")
    parser.add_argument("--model", default="tiny_detr", choices=MODELS, help="preset that trains from random weights")
    parser.add_argument("--image_size", type=int, default=256, help="short side in pixels")
    parser.add_argument("--max_size", type=int, default=384, help="limit of the long side")
    parser.add_argument("--in_channels", type=int, default=3, help="channels of the images")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate, of the backbone too")
    parser.add_argument("--steps", type=int, default=600, help="the most optimizer steps")
    parser.add_argument("--check_every", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--target", type=float, default=0.9, help="AP50 to exceed; training stops there")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--seed", type=int, default=42, help="seed of the weights")
    return parser


def choose(annotations: dict[str, Any], count: int, most_objects: int) -> dict[str, Any]:
    """The part of a COCO json about the first ``count`` images, by id, that have 1 to ``most_objects`` objects."""
    numbers = dict.fromkeys((image["id"] for image in annotations["images"]), 0)
    for row in annotations["annotations"]:
        numbers[row["image_id"]] += not row["iscrowd"]
    fitting = sorted(image_id for image_id, n in numbers.items() if 1 <= n <= most_objects)
    if len(fitting) < count:
        raise ValueError(f"--images {count}: only {len(fitting)} images have 1 to {most_objects} objects, as many as "
                         f"the model has queries; ask for fewer")
    chosen = set(fitting[:count])
    return annotations | {"images": [row for row in annotations["images"] if row["id"] in chosen],
                          "annotations": [row for row in annotations["annotations"] if row["image_id"] in chosen]}


def overfit(data: CocoDetection, args: argparse.Namespace) -> tuple[float, int, float]:
    """Train until AP50 on ``data`` exceeds the target or the steps are over -> AP50, steps, seconds."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    config = dataclasses.replace(PRESETS[args.model].model, lr_backbone=args.lr, in_channels=args.in_channels)
    model, criterion, postprocessors = config.build(data.num_classes)
    model, criterion = model.to(device), criterion.to(device)
    print(f"model: {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, random weights; device: "
          f"{device}", flush=True)
    optimizer = torch.optim.AdamW(config.parameter_groups(model, args.lr), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    batch = collate([data[i] for i in range(len(data))])
    steps, ap50, start = 0, 0.0, time.perf_counter()
    while steps < args.steps and ap50 <= args.target:
        count = min(args.check_every, args.steps - steps)
        averages = train_one_epoch(model, criterion, [batch] * count, count, optimizer, schedule, device, steps,
                                   max_norm=0.1, progress=Progress(f"from step {steps}"))
        with contextlib.redirect_stdout(io.StringIO()):                         # the table of the last one is enough
            results = evaluate(model, criterion, postprocessors, [batch], 1, build_evaluators(data), device)
        steps, ap50 = steps + count, results["coco_eval_bbox"][1]
        print(f"step {steps}: loss {averages['loss']:.3f}, AP50 {ap50:.3f}, {time.perf_counter() - start:.0f} s",
              flush=True)
    return ap50, steps, time.perf_counter() - start


def main(args: argparse.Namespace) -> int:
    """The program's exit code: 0 where the target was reached."""
    root = Path(args.coco_path)
    source = root / "annotations" / f"instances_{args.split}2017.json"
    content = choose(read_annotations(source)[0], args.images, PRESETS[args.model].model.num_queries)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, source.name)
        file.write_text(json.dumps(content))
        mean, std = normalisation(IMAGENET_MEAN, IMAGENET_STD, args.in_channels)
        data = CocoDetection(root / f"{args.split}2017", file, channels=args.in_channels,
                             transforms=eval_transforms(Preprocessing(args.image_size, args.max_size, mean, std)))
        print(f"images: {', '.join(map(str, data.ids))} of {source}: the first by id with 1 to "
              f"{PRESETS[args.model].model.num_queries} objects", flush=True)
        ap50, steps, seconds = overfit(data, args)
    reached = ap50 > args.target
    print(f"{args.model}, {args.images} images: AP50 {ap50:.3f} after {steps} steps, {seconds:.0f} seconds of training "
          f"and checks; {'above' if reached else 'NOT above'} the target {args.target}")
    return 0 if reached else 1


if __name__ == "__main__":
    try:
        sys.exit(main(get_args_parser().parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
