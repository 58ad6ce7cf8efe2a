#!/usr/bin/env python3
"""How much of what a model computes is padding, and how much less it is in batches of images alike in shape.

    python scripts/padded_share.py --coco_path DIR
    python scripts/padded_share.py --coco_path DIR --split val --image_size 480 --max_size 800 --batch_size 2
    python scripts/padded_share.py --coco_path DIR --split train --no_random_crop

A batch is as high and as wide as its highest and its widest image need; the padded share is the padded pixels over all
pixels of the batches, on one process. Batches are formed

    file        in the order of the file, as evaluation does by itself
    random      in random order, as training does by itself; in evaluation the mean of 20 orders
    bucketed    of images alike in shape (datasets/sampler.py)
    equal       of images of one size alone

Only annotations are needed. Training, printed with the split ``train``, runs the training transforms on the images'
sizes, the same draws for each way to form batches, as many times as ``--epochs`` says, and leaves out the last incomplete
batch. Larger data are represented by ``--images`` images drawn at random.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as command_line
from datasets.annotations import read_annotations
from datasets.drawn import Size, drawn_sizes
from datasets.sampler import EvaluationBatches, RandomBatches, TrainingBatches, padded_share
from datasets.transforms import Preprocessing, make_transforms, resized
from detr import config
from detr.config import DataConfig

ORDERS = 20                                 # random orders of an evaluation


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The share of padding in batches.")
    parser.add_argument("--coco_path", required=True, help="folder in COCO's layout")
    parser.add_argument("--split", nargs="+", default=["train", "val"], choices=("train", "val"), help="default: both")
    parser.add_argument("--batch_size", type=int, default=8, help="images in a batch (default: %(default)s)")
    config.add_flags(parser, DataConfig, command_line.Flag,
                     ("image_size", "max_size", "multi_scale", "least_scale", "random_crop"))
    parser.add_argument("--epochs", type=int, default=10, help="passes through the training transforms (default: "
                        "%(default)s); 0 leaves training out")
    parser.add_argument("--images", type=int, default=1000, help="the most training images to draw for (default: "
                        "%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seed of all that is random (default: %(default)s)")
    return parser


def cut(order: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    return [order[k:k + batch_size] for k in range(0, len(order), batch_size)]


def evaluation_shares(sizes: Sequence[Size], batch_size: int, seed: int) -> dict[str, float]:
    """How batches are formed -> the padded share of images of these ``sizes``, as the model gets them."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(sizes), generator=generator).tolist() for _ in range(ORDERS)]
    return {"file": padded_share(cut(range(len(sizes)), batch_size), sizes),
            "random": statistics.mean(padded_share(cut(order, batch_size), sizes) for order in orders),
            "bucketed": padded_share(EvaluationBatches(sizes, batch_size), sizes),
            "equal": padded_share(EvaluationBatches(sizes, batch_size, equal=True), sizes)}


def training_shares(sizes: Sequence[Size], transforms: v2.Compose, batch_size: int, epochs: int, seed: int
                    ) -> tuple[dict[str, float], float]:
    """How batches are formed -> the mean padded share over epochs of images of these ``sizes``, for which ``transforms``
    draw anew in each; and the seconds of processor time that an image takes until it is in a bucketed batch."""
    randomly = RandomBatches(len(sizes), 1, seed=seed)
    bucketed = TrainingBatches(sizes, transforms, batch_size, seed=seed)
    shares: dict[str, list[float]] = {"file": [], "random": [], "bucketed": []}
    images, seconds = 0, 0.0
    for epoch in range(epochs):
        randomly.set_epoch(epoch)
        bucketed.set_epoch(epoch)
        start = time.process_time()
        batches = list(bucketed)
        seconds += time.process_time() - start
        draws = sorted(draw for batch in batches for draw in batch)
        images += len(draws)
        drawn = dict(zip((draw.image for draw in draws),
                         drawn_sizes(transforms, [sizes[draw.image] for draw in draws], [draw.seed for draw in draws])))
        shares["file"].append(padded_share(cut(list(drawn), batch_size), drawn))
        order = [draw.image for draw, in randomly if draw.image in drawn]
        shares["random"].append(padded_share(cut(order, batch_size), drawn))
        shares["bucketed"].append(padded_share([[draw.image for draw in batch] for batch in batches], drawn))
    return {name: statistics.mean(values) for name, values in shares.items()}, seconds / images


def table(shares: dict[str, float]) -> str:
    return "\n".join(f"    {name:<10}{share:6.1%}" + (f"   {share / shares['random']:.2f} of random"
                     if name not in ("file", "random") and shares["random"] else "") for name, share in shares.items())


def main(args: argparse.Namespace) -> None:
    size = config.parse_size(args.image_size)
    if not isinstance(size, int):
        raise ValueError(f"--image_size {args.image_size} brings all images to one size, so that nothing is padded; give "
                         f"the short side")
    for flag, least in (("batch_size", 1), ("epochs", 0), ("images", 1)):
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag} {getattr(args, flag)}: at least {least} is needed")
    if "least_scale" in getattr(args, "typed", ()) and not args.multi_scale:
        raise ValueError("--least_scale has no effect with --no_multi_scale; leave one of them out")
    for split in dict.fromkeys(args.split):
        file = Path(args.coco_path, "annotations", f"instances_{split}2017.json")
        images = sorted(read_annotations(file)[0]["images"], key=lambda image: image["id"])
        stored = [(image["height"], image["width"]) for image in images]
        sizes = [resized(height, width, size, args.max_size) for height, width in stored]
        print(f"{file}, evaluation: {len(sizes)} images of {len(set(sizes))} sizes, short side {size}, long side at most "
              f"{args.max_size}, batches of {args.batch_size}; padded share\n"
              f"{table(evaluation_shares(sizes, args.batch_size, args.seed))}\n"
              f"    {len(EvaluationBatches(sizes, args.batch_size))} batches; of equal sizes "
              f"{len(EvaluationBatches(sizes, args.batch_size, equal=True))}", flush=True)
        if split == "train" and args.epochs:
            transforms = make_transforms("train", Preprocessing(size, args.max_size), crop=args.random_crop,
                                         scales=None if args.multi_scale else (size,), least_scale=args.least_scale)
            generator = torch.Generator().manual_seed(args.seed)
            chosen = sorted(torch.randperm(len(stored), generator=generator)[:args.images].tolist())
            shares, seconds = training_shares([stored[i] for i in chosen], transforms, args.batch_size, args.epochs,
                                              args.seed)
            scales = f"{round(args.least_scale * size)} to {size}" if args.multi_scale else str(size)
            print(f"training: {len(chosen)} of {len(stored)} images, {args.epochs} times, short side {scales}, "
                  f"{'half of them cropped' if args.random_crop else 'none cropped'}; padded share\n{table(shares)}\n"
                  f"    {1000 * seconds:.2f} ms to draw an image's size and find its batch: "
                  f"{len(stored) * seconds:.1f} s in an epoch", flush=True)


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
