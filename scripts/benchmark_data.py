#!/usr/bin/env python3
"""Images per second and core of the training pipeline: read, augment, normalise, pad to batches; against the published.

    python scripts/benchmark_data.py --coco_path DIR
    python scripts/benchmark_data.py --coco_path DIR --workers 2 --json data.json

The published pipeline (Carion et al., 2020, appendix A.4) is written out below: Pillow opens, converts, mirrors, resizes
and crops; torchvision makes tensors and normalises them; a batch of zeros takes them up. It is given the same files,
targets, seeds and order of draws as this project's, with ``--fast_images`` off, on and reduced, so that all do the same
work; that the targets are bit by bit the same, and how far the pixels differ, is computed first and printed.

All take turns, each repeat in another order, after one that does not count. Times are processor times of one thread,
those of worker processes included, so that other programs matter less: images per second and core, medians over
``--repeats``, and of the ratios to the published one within a repeat. With workers the parts are not
timed; their start counts, so that ``--images`` should be many.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import build_coco
from datasets.coco import CocoDetection
from datasets.drawn import Draw, Drawn
from datasets.images import Deferred, SizeOnly, read_deferred, read_image
from datasets.transforms import (
    CROP_RESIZES,
    CROP_SIZES,
    SCALES,
    Normalize,
    ToTensor,
    draw,
    into_batch,
    train_transforms,
)
from detr.nested_tensor import NestedTensor
from detr.preprocessing import IMAGENET_MEAN, IMAGENET_STD, resized
from detr.preprocessing import normalised as normalised_late
from detr.structures import Target

PUBLISHED = "published"
OURS = {"exact": "off", "fast": "on", "reduced": "reduced"}             # name in the table -> --fast_images


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--coco_path", type=Path, required=True, help="folder in COCO's layout")
    parser.add_argument("--split", default="train", choices=["train", "val"], help="where the images come from")
    parser.add_argument("--images", type=int, default=40, help="from the first, and again where there are fewer")
    parser.add_argument("--batch", type=int, default=2, help="images of a batch")
    parser.add_argument("--workers", type=int, default=0, help="processes that read")
    parser.add_argument("--repeats", type=int, default=7, help="that are timed")
    parser.add_argument("--what", nargs="+", default=[PUBLISHED, *OURS], choices=[PUBLISHED, *OURS],
                        help="pipelines that take turns")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    return parser


# The published pipeline. Draws are in the order of datasets.transforms, so that a seed means the same for both.

class Published(Dataset):
    """The images of ``data`` with its targets: by Pillow to a normalised tensor."""

    def __init__(self, data: CocoDetection) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        image = Image.open(self.data.image_folder / self.data.files[i]).convert("RGB")
        image, target = augmented(image, self.data.target(i))
        return normalised(F.to_tensor(image), target)


def augmented(image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
    if torch.rand(()) < 0.5:
        image = F.hflip(image)
        target["boxes"] = target["boxes"][:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor(
            [image.width, 0, image.width, 0])
    if torch.multinomial(torch.tensor([0.5, 0.5]), 1) == 1:
        image, target = to_size(image, target, CROP_RESIZES[draw(0, len(CROP_RESIZES) - 1)])
        width, height = (draw(min(CROP_SIZES[0], side), min(CROP_SIZES[1], side)) for side in image.size)
        top, left = draw(0, image.height - height), draw(0, image.width - width)
        image = F.crop(image, top, left, height, width)
        boxes = (target["boxes"] - torch.tensor([left, top, left, top])).reshape(-1, 2, 2)
        boxes = torch.min(boxes, torch.tensor([width, height])).clamp(min=0)
        sides = boxes[:, 1] - boxes[:, 0]
        kept = (boxes[:, 1] > boxes[:, 0]).all(1)
        target.update(boxes=boxes.reshape(-1, 4), area=sides[:, 0] * sides[:, 1], size=torch.tensor([height, width]))
        for name in ("boxes", "labels", "area", "iscrowd"):
            target[name] = target[name][kept]
    return to_size(image, target, SCALES[draw(0, len(SCALES) - 1)], 1333)


def to_size(image: Image.Image, target: Target, size: int, limit: int | None = None) -> tuple[Image.Image, Target]:
    height, width = resized(image.height, image.width, size, limit)
    x, y = width / image.width, height / image.height
    target.update(boxes=target["boxes"] * torch.tensor([x, y, x, y]), area=target["area"] * (x * y),
                  size=torch.tensor([height, width]))
    return F.resize(image, [height, width]), target


def normalised(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    image = F.normalize(image, IMAGENET_MEAN, IMAGENET_STD)
    (height, width), (x0, y0, x1, y1) = image.shape[1:], target["boxes"].unbind(1)
    boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=1)
    target["boxes"] = boxes / torch.tensor([width, height, width, height])
    return image, target


def padded(batch: list[tuple[Tensor, Target]]) -> tuple[NestedTensor, list[Target]]:
    images, targets = zip(*batch)
    channels, height, width = (max(sides) for sides in zip(*(image.shape for image in images)))
    tensors = torch.zeros(len(images), channels, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for image, tensor, padding in zip(images, tensors, mask):
        tensor[:, :image.shape[1], :image.shape[2]].copy_(image)
        padding[:image.shape[1], :image.shape[2]] = False
    return NestedTensor(tensors, mask), list(targets)


# What is measured.

def collate(batch: list[tuple[Any, Target]]) -> tuple[NestedTensor, list[Target]]:
    images, targets = zip(*batch)
    return into_batch(images), list(targets)


def built(args: argparse.Namespace, fast_images: str = "off", transforms: Any = None) -> CocoDetection:
    with contextlib.redirect_stdout(io.StringIO()):
        data = build_coco(args.split, args.coco_path, transforms)
    data.fast_images = fast_images
    return data


def pipelines(args: argparse.Namespace) -> dict[str, tuple[Any, Callable[..., Any]]]:
    """By name a data set, by ``Draw``, and what makes batches."""
    found: dict[str, tuple[Any, Callable[..., Any]]] = {PUBLISHED: (Drawn(Published(built(args))), padded)}
    for name, fast_images in OURS.items():
        found[name] = (Drawn(built(args, fast_images, train_transforms(in_batch=True))), collate)
    return {name: found[name] for name in args.what}


def an_epoch(dataset: Any, collating: Callable[..., Any], draws: list[list[Draw]], workers: int) -> None:
    for _ in DataLoader(dataset, batch_sampler=draws, collate_fn=collating, num_workers=workers):
        pass


def seconds(call: Callable[[], Any]) -> float:
    """Of the processor, in this process and in those that it started and that ended meanwhile."""
    before = os.times()
    start = time.process_time()
    call()
    after = os.times()
    of_workers = after.children_user + after.children_system - before.children_user - before.children_system
    return time.process_time() - start + of_workers


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for repeat in range(repeats + 1):
        for name in order:
            time_taken = seconds(calls[name])
            if repeat:
                taken[name].append(time_taken)
        order = [*order[1:], order[0]]
    return taken


def differences(found: dict[str, tuple[Any, Any]], draws: list[Draw]) -> list[dict[str, Any]]:
    """How far this project's pipelines are from the published one: in values of 255, and whether the targets are the same
    bits."""
    base, rows = found[PUBLISHED][0], []
    scale = 255 * torch.tensor(IMAGENET_STD)[:, None, None]
    for name in [name for name in found if name != PUBLISHED]:
        dataset = found[name][0]
        same, most, total, changed, count = True, 0.0, 0.0, 0, 0
        for item in draws:
            (want, wanted_target), (image, target) = base[item], dataset[item]
            image = normalised_late(*image)
            same &= want.shape == image.shape and wanted_target.keys() == target.keys()
            same &= all(torch.equal(wanted_target[key], target[key]) for key in target)
            distance = ((want - image) * scale).abs()
            most, total = max(most, float(distance.max())), total + float(distance.sum(dtype=torch.float64))
            changed, count = changed + int((distance > 0.5).sum()), count + distance.numel()
        rows.append({"pipeline": name, "targets": same, "largest": most, "mean": total / count, "share": changed / count})
    return rows


def parts(args: argparse.Namespace, draws: list[Draw]) -> dict[str, dict[str, Callable[[], Any]]]:
    """Calls that do one part of the work alone, on what the part before it gives."""
    data = built(args)
    names = [data.image_folder / data.files[item.image] for item in draws]
    contents = [path.read_bytes() for path in names]
    targets = [data.target(item.image) for item in draws]
    pictures = [read_image(path) for path in names]
    planes = [read_deferred(path).planes() for path in names]
    chance = v2.Compose(train_transforms().transforms[:2])                      # all before ToTensor

    def seeded(geometry: Callable[[Any, Target], Any], images: list[Any]) -> list[Any]:
        found = []
        for item, image, target in zip(draws, images, targets):
            torch.manual_seed(item.seed)
            found.append(geometry(image, target.copy())[0])
        return found

    def deferred() -> list[Tensor]:
        later = [Deferred(*image.shape[1:], lambda times, image=image: image) for image in planes]
        return [image.planes() for image in seeded(chance, later)]

    def batches(tensor: Callable[[Any], Any], collating: Callable[..., Any], images: list[Any]) -> None:
        for first in range(0, len(images), args.batch):
            collating([(tensor(image), {}) for image in images[first:first + args.batch]])

    def ours(image: Any) -> Any:
        return Normalize(in_batch=True)(*ToTensor(scale=False)(image, {}))[0]

    after, after_fast = seeded(chance, pictures), deferred()
    sizes = [SizeOnly(*image.shape[1:]) for image in planes]
    return {
        "decode": {
            PUBLISHED: lambda: [Image.open(io.BytesIO(content)).convert("RGB") for content in contents],
            "exact": lambda: [read_image(path, content) for path, content in zip(names, contents)],
            "fast": lambda: [read_deferred(path, content).planes() for path, content in zip(names, contents)]},
        "geometry": {
            PUBLISHED: lambda: seeded(augmented, pictures), "exact": lambda: seeded(chance, pictures), "fast": deferred},
        "of that, sizes and boxes": {"exact": lambda: seeded(chance, sizes)},
        "normalise, collate": {
            PUBLISHED: lambda: batches(lambda image: F.normalize(F.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD), padded,
                                       after),
            "exact": lambda: batches(ours, collate, after), "fast": lambda: batches(ours, collate, after_fast)},
    }


def table(what: str, taken: dict[str, list[float]], images: int) -> list[dict[str, Any]]:
    """A row a pipeline; ratios are above 1 where it is faster than the published one."""
    rows = []
    for name, times in taken.items():
        row = {"what": what, "pipeline": name, "ms_per_image": statistics.median(times) / images * 1e3,
               "images_per_second_and_core": images / statistics.median(times), "seconds": times}
        ratio = ""
        if PUBLISHED in taken:
            row["ratio"] = statistics.median(base / own for base, own in zip(taken[PUBLISHED], times))
            ratio = f"{row['ratio']:6.2f}x"
        rows.append(row)
        print(f"{what:26} {name:10} {row['ms_per_image']:8.2f} ms {row['images_per_second_and_core']:9.1f} /s {ratio}",
              flush=True)
    return rows


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    found = pipelines(args)
    count, there = args.images, len(next(iter(found.values()))[0])
    generator = torch.Generator().manual_seed(0)
    draws = [Draw(i % there, int(torch.randint(2**32, (), generator=generator))) for i in range(count)]
    batches = [draws[first:first + args.batch] for first in range(0, count, args.batch)]
    print(f"PyTorch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}, "
          f"{torch.backends.cpu.get_cpu_capability()}; {count} images of {args.coco_path}, batches of {args.batch}, "
          f"{args.workers} workers of one thread, {args.repeats} repeats")
    apart = differences(found, draws[:there]) if PUBLISHED in found else []
    for row in apart:
        print(f"{row['pipeline']}: targets {'bit by bit the same' if row['targets'] else 'DIFFER'}; values differ by "
              f"{row['mean']:.2g} of 255 on average, {row['largest']:.2g} at most, and {row['share']:.3%} by 1 or more")
    taken = interleaved({name: partial(an_epoch, *pipeline, batches, args.workers) for name, pipeline in found.items()},
                        args.repeats)
    rows = table("whole pipeline", taken, count)
    for what, calls in (parts(args, draws) if not args.workers else {}).items():
        rows += table(what, interleaved({name: call for name, call in calls.items() if name in args.what}, args.repeats),
                      count)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "pillow": PIL.__version__, "images": count,
                                         "workers": args.workers, "differences": apart, "rows": rows}, indent=1))


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
