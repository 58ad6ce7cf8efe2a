#!/usr/bin/env python3
"""Can the model learn at all? A few images by heart, as a check of the whole path from pictures to AP.

    python scripts/overfit.py --coco_path DIR

trains a small model from random weights on the first images of a data set in COCO's layout, without augmentation, until
it finds their objects again. Ends with 1 where it did not reach the target. ``scripts/doctor.py`` does the same with
the model, the start and the learning rate of a training that is planned.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import build_evaluators, collate
from datasets.coco import CocoDetection
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, eval_transforms, normalisation
from detr.collapse import CollapseWatch
from detr.precision import make_scaler
from detr.presets import PRESETS
from engine import Progress, evaluate, train_one_epoch

# Classes of modules that drop at random in training alone.
NOISY = ("Dropout", "DropPath", "MultiheadAttention", "ProjectedAttention")
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


class Learnt(NamedTuple):
    """How far ``learn`` came."""
    ap50: float
    steps: int
    seconds: float
    first_loss: float                       # average of the steps before the first evaluation,
    averages: dict[str, float]              # and of those before the last, of all losses
    collapsed: str | None                   # the last verdict of the watch for equal boxes


def choose(objects: Sequence[int], count: int, most_objects: int) -> list[int]:
    """The places of the first ``count`` images that have 1 to ``most_objects`` of ``objects``, the numbers of each."""
    fitting = [i for i, number in enumerate(objects) if 1 <= number <= most_objects]
    if len(fitting) < count:
        raise ValueError(f"{count} images to learn by heart: only {len(fitting)} have 1 to {most_objects} objects, as "
                         f"many as the model has queries; ask for fewer")
    return fitting[:count]


def learn(model: nn.Module, criterion: nn.Module, postprocessors: dict[str, Any], data: Any, places: Sequence[int],
          optimizer: torch.optim.Optimizer, device: torch.device, *, steps: int, check_every: int, target: float,
          batch_size: int | None = None, max_norm: float = 0.1, amp: str = "off", held: Sequence[nn.Module] = (),
          say: Callable[[str], Any] = print) -> Learnt:
    """Train on the images at ``places`` of ``data`` until AP50 on them exceeds ``target`` or the steps are over.

    ``data`` has the transforms of evaluation; the images are read once. A step has all of them, in batches of
    ``batch_size`` (None: in one) whose gradients are added up. The learning rates rise over a tenth of the steps to those
    that ``optimizer`` has, and fall. ``say`` is told of each evaluation. Raises ``NonFiniteError`` as training does.

    Nothing is dropped at random, and ``held`` modules work as in evaluation: with dropout, queries of a DETR that has
    seen eight images differ by what was dropped, and without it they are all the same.
    """
    held = [*held, *(module for module in model.modules() if type(module).__name__ in NOISY)]
    size = batch_size or len(places)
    batches = [collate([data[i] for i in places[first:first + size]]) for first in range(0, len(places), size)]
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, max(2, steps), pct_start=0.1)
    watch, scaler, collapsed = CollapseWatch(), make_scaler(device, amp), None
    done, ap50, first_loss, start = 0, 0.0, 0.0, time.perf_counter()
    averages: dict[str, float] = {}
    while done < steps and ap50 <= target:
        count = min(check_every, steps - done)
        with contextlib.redirect_stdout(io.StringIO()):             # the tables of evaluation say more than is needed
            averages = train_one_epoch(model, criterion, batches * count, count, optimizer, schedule, device, done,
                                       accumulate=len(batches), max_norm=max_norm, amp=amp, scaler=scaler, held=held,
                                       collapse=watch, progress=Progress(f"from step {done}"))
            results = evaluate(model, criterion, {"bbox": postprocessors["bbox"]}, batches, len(batches),
                               build_evaluators(data)[:1], device)
        collapsed = watch.verdict()
        first_loss = first_loss or averages["loss"]
        done, ap50 = done + count, results["coco_eval_bbox"][1]
        say(f"step {done}: loss {averages['loss']:.3f}, AP50 {ap50:.3f}, {time.perf_counter() - start:.0f} s")
    return Learnt(ap50, done, time.perf_counter() - start, first_loss, averages, collapsed)


def overfit(data: CocoDetection, places: Sequence[int], args: argparse.Namespace) -> Learnt:
    """A new model, and ``learn``."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    config = dataclasses.replace(PRESETS[args.model].model, lr_backbone=args.lr, in_channels=args.in_channels)
    model, criterion, postprocessors = config.build(data.num_classes)
    model, criterion = model.to(device), criterion.to(device)
    print(f"model: {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, random weights; device: "
          f"{device}", flush=True)
    optimizer = torch.optim.AdamW(config.parameter_groups(model, args.lr), lr=args.lr)
    return learn(model, criterion, postprocessors, data, places, optimizer, device, steps=args.steps,
                 check_every=args.check_every, target=args.target, say=lambda text: print(text, flush=True))


def main(args: argparse.Namespace) -> int:
    """The program's exit code: 0 where the target was reached."""
    root = Path(args.coco_path)
    source = root / "annotations" / f"instances_{args.split}2017.json"
    mean, std = normalisation(IMAGENET_MEAN, IMAGENET_STD, args.in_channels)
    data = CocoDetection(root / f"{args.split}2017", source, channels=args.in_channels,
                         transforms=eval_transforms(Preprocessing(args.image_size, args.max_size, mean, std)))
    most = PRESETS[args.model].model.queries
    places = choose([len(labels) for labels in data.labels_of_images()], args.images, most)
    print(f"images: {', '.join(str(data.ids[i]) for i in places)} of {source}: the first by id with 1 to {most} objects",
          flush=True)
    learnt = overfit(data, places, args)
    reached = learnt.ap50 > args.target
    print(f"{args.model}, {args.images} images: AP50 {learnt.ap50:.3f} after {learnt.steps} steps, {learnt.seconds:.0f} "
          f"seconds of training and checks; {'above' if reached else 'NOT above'} the target {args.target}")
    return 0 if reached else 1


if __name__ == "__main__":
    try:
        sys.exit(main(get_args_parser().parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
