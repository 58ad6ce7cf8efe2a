#!/usr/bin/env python3
"""What tiles find of small objects in a large image, and whether anything is found twice where they meet.

    python scripts/benchmark_tiles.py --resume outputs/tiny_deformable_detr/checkpoint.pth

The image, the same for each ``--seed``, has the shapes of the synthetic data, about 12 pixels large, on one of its
grounds; every third stands a few pixels beside another of its kind, which is what merging at seams may take for one.
Printed, in tiles and of the image as a whole: recall and precision of detections with a score of at least
``--threshold``, an IoU of at least 0.5 and the right class, each object counted once; doubles, which are detections of an
object beyond its first, of whatever class; and seconds. Doubles are at seams where an object has more detections than any
single tile gives it: the others are the model's own, and go where ``nms`` is asked for. Before merging, detections of
all tiles are compared likewise.

The tiles must suit the model: the small ones of this project see 160 x 160 pixels and learned from objects of 11 pixels
and more in images of 128 to 192.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.synthetic import SHAPES, Dice, contrasting, coverage, ground, paint, random_outlines, tight_box, window
from detr import load, tiles
from detr.boxes import box_iou
from detr.loading import suppressed
from detr.preprocessing import Picture
from detr.structures import Detections
from detr.visualize import class_colour

IOU, NMS = 0.5, 0.7
GAP = 2                     # pixels at least between two objects
CORNER, ZOOM = 400, 3


class Large(NamedTuple):
    """A picture and its objects."""
    pixels: np.ndarray      # [H, W, 3] uint8
    boxes: Tensor           # [N, 4] corners
    labels: Tensor          # [N] places in SHAPES


class Score(NamedTuple):
    """Of detections against objects."""
    recall: float
    precision: float
    times: Tensor           # [N] how many detections name each object


def make_large(side: int, count: int, size: float, seed: int) -> Large:
    """``side`` x ``side`` pixels with ``count`` objects, or as many as find a place, none hidden or cut."""
    dice = Dice(seed, 4000)
    canvas, colours, _ = ground(dice, side, side)
    taken = np.zeros((side, side), bool)
    boxes: list[list[int]] = []
    labels: list[int] = []
    for _ in range(20 * count):
        if len(boxes) == count:
            break
        beside = dice.whole(0, len(boxes) - 1) if boxes and dice.chance(1 / 3) else None
        kind = dice.whole(0, len(SHAPES) - 1) if beside is None else labels[beside]
        outlines = random_outlines(dice, SHAPES[kind], size)
        width, height = outlines[0].max(0).tolist()
        x, y = dice.between(1, side - width - 1), dice.between(1, side - height - 1)
        if beside is not None:
            left, top, right, bottom = boxes[beside]
            gap = dice.between(GAP, 3 * GAP)
            x, y = ((right + gap, top), (left - width - gap, top), (left, bottom + gap),
                    (left, top - height - gap))[dice.whole(0, 3)]
        if not (1 <= x < side - width - 1 and 1 <= y < side - height - 1):
            continue
        rows, columns, local = window([points + [x, y] for points in outlines], side, side)
        cover = coverage(local, rows.stop - rows.start, columns.stop - columns.start)
        if taken[rows, columns].any():
            continue
        paint(dice, canvas[rows, columns], cover, None, contrasting(dice, list(colours)))
        taken[rows.start - GAP + 1:rows.stop + GAP - 1, columns.start - GAP + 1:columns.stop + GAP - 1] = True
        left, top, width, height = tight_box(cover >= 0.5)
        left, top = left + columns.start, top + rows.start
        boxes.append([left, top, left + width, top + height])
        labels.append(kind)
    grain = (dice.sample((side, side)) - 0.5) * 4
    pixels = np.rint(np.clip(canvas + grain[..., None], 0, 255)).astype(np.uint8)
    return Large(pixels, torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels))


def score(found: Detections, large: Large) -> Score:
    """Detections, the best first, each take the object of their class that they overlap most and nobody has. A detection
    names the object in which most of its box lies, and at least half, whatever its class."""
    order = found["scores"].argsort(descending=True, stable=True)
    right, times = torch.zeros(len(large.labels), dtype=torch.bool), torch.zeros(len(large.labels), dtype=torch.int64)
    for box, label in zip(found["boxes"][order], found["labels"][order]):
        iou = box_iou(box[None], large.boxes)[0][0]
        value, best = iou.masked_fill(right | (large.labels != label), 0.0).max(0)
        right[best] |= value >= IOU
        corner, end = torch.maximum(box[:2], large.boxes[:, :2]), torch.minimum(box[2:], large.boxes[:, 2:])
        inside, named = (end - corner).clamp(min=0).prod(1).max(0)
        times[named] += inside >= 0.5 * (box[2:] - box[:2]).prod()
    hits = int(right.sum())
    return Score(hits / max(len(right), 1), hits / max(len(order), 1), times)


def report(what: str, result: Score, detections: int, once: Tensor, seconds: float | None = None) -> None:
    """``once [N]``: how often an object may be named."""
    print(f"{what:<16} recall {result.recall:.4f}  precision {result.precision:.4f}  detections {detections:>5}  "
          f"doubles {int((result.times - 1).clamp(min=0).sum()):>5}, "
          f"at seams {int((result.times - once).clamp(min=0).sum()):>5}"
          + (f"  {seconds:.1f} s" if seconds is not None else ""), flush=True)


def draw_corner(picture: Image.Image, found: Detections) -> Image.Image:
    """The upper left of the picture, enlarged, with boxes in the colours of classes: tags would hide the objects."""
    corner = picture.crop((0, 0, CORNER, CORNER)).resize((CORNER * ZOOM, CORNER * ZOOM), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(corner)
    for box, label in zip((found["boxes"] * ZOOM).tolist(), found["labels"].tolist()):
        draw.rectangle(box, outline=class_colour(label), width=2)
    return corner


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--resume", required=True, metavar="CKPT", help="trained on the synthetic data")
    parser.add_argument("--side", type=int, default=4000, help="of the image, in pixels")
    parser.add_argument("--objects", type=int, default=2000, help="on the image")
    parser.add_argument("--size", type=float, default=12.0, help="of an object in pixels, the root of its box's area")
    parser.add_argument("--tile", type=int, default=96, help="side of a tile, in pixels")
    parser.add_argument("--overlap", type=float, default=0.25, help="of a tile's side that neighbours share")
    parser.add_argument("--threshold", type=float, default=0.4, help="least score of a detection that counts")
    parser.add_argument("--batch_size", type=int, default=16, help="tiles at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the image")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the image here, as PNG")
    parser.add_argument("--drawn", type=Path, metavar="FILE", help="write its upper left, and what tiles found, here")
    return parser


def main(args: argparse.Namespace) -> None:
    large = make_large(args.side, args.objects, args.size, args.seed)
    picture = Image.fromarray(large.pixels)
    detector = load(args.resume, args.device)
    if list(detector.names.values()) != list(SHAPES):
        raise ValueError(f"{args.resume} knows {', '.join(detector.names.values())}; give a checkpoint of a model that "
                         f"was trained on the synthetic data")
    sides = (large.boxes[:, 2:] - large.boxes[:, :2]).prod(1).sqrt()
    where = tiles.places(args.side, args.side, args.tile, args.overlap)
    print(f"{args.side} x {args.side} pixels, {len(large.boxes)} objects of {sides.min():.1f} to {sides.max():.1f}; "
          f"{len(where)} tiles of {args.tile}, overlap {args.overlap:g}; {detector.name}, threshold {args.threshold:g}",
          flush=True)
    seen: list[Detections] = []

    def detect(pictures: Sequence[Picture]) -> Sequence[Detections]:
        found = detector.predict(pictures, args.threshold, args.batch_size)
        seen.extend(found)
        return found

    start = time.perf_counter()
    in_tiles = tiles.in_tiles(picture, detect, args.tile, args.overlap, args.batch_size)
    seconds = time.perf_counter() - start
    before = [tiles.moved(one, place, (args.side, args.side)) for one, place in zip(seen, where, strict=True)]
    every: Detections = {name: torch.cat([one[name] for one in before]) for name in ("scores", "labels", "boxes")}
    once = torch.ones(len(large.labels), dtype=torch.int64)
    tiles_of = torch.stack([score(one, large).times for one in before if len(one["scores"])])
    per_tile = torch.maximum(once, tiles_of.max(0).values)
    report("before merging", score(every, large), len(every["scores"]), per_tile)
    report("in tiles", score(in_tiles, large), len(in_tiles["scores"]), per_tile, seconds)
    fewer = suppressed(in_tiles, NMS)
    report(f"with nms {NMS:g}", score(fewer, large), len(fewer["scores"]), per_tile)
    start = time.perf_counter()
    untiled, = detector.predict(picture, args.threshold)
    report("as a whole", score(untiled, large), len(untiled["scores"]), once, time.perf_counter() - start)
    if args.picture:
        picture.save(args.picture)
    if args.drawn:
        draw_corner(picture, in_tiles).save(args.drawn)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
