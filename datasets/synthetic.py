"""The embedded default data: six kinds of shapes on textured grounds, in COCO's own layout on disk.

    train2017/000000100001.png ...      2,000 images of 128 to 192 pixels a side
    val2017/000000200001.png ...        300 images
    annotations/instances_train2017.json, instances_val2017.json
    synthetic.json                      version, seed, counts and checksum of what was made

and, made when it is asked for, the same images in COCO's panoptic layout:

    panoptic_train2017/000000100001.png ..., panoptic_val2017/          which segment each pixel belongs to
    annotations/panoptic_train2017.json, panoptic_val2017.json
    synthetic_panoptic.json             checksums

The data are fixed: the same seed gives the same pixels and annotations on every machine, and ``CHECKSUM`` is theirs.
Each image has its own random stream, so it does not depend on how many are made. To keep the promise, random numbers
come from ``RandomState.random_sample`` alone, sines and cosines from a table of whole degrees, and floats meet only in
elementwise ``+ - * /`` and square roots, which IEEE 754 rounds alike everywhere (no sums of arrays, no matrix products).

In 50 images, 5 have no objects and one has a crowd; where there are objects, there are 1 to 10 of them, besides the
crowd. Small, medium and large objects have a box side ``sqrt(w * h)`` below a tenth, a quarter, and above it, of the
image's ``sqrt(width * height)``; no box has a side below 11 pixels. Later objects hide earlier ones, of which more than
half stays visible; one in twelve reaches over the border. All annotations speak of the visible pixels: ``area`` is
their number and ``bbox`` their tight box. Whole shapes have their outline as polygon; hidden, cut or pierced ones have
compressed RLE; crowds have uncompressed RLE as in COCO.

Panoptic segments are the visible pixels of each object, and all others as one segment of stuff: the ground, whose class
is its colour. No pixel is void. A segment's id is its colour: that of its class, a sixteenth darker with each object
before it in the image.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

VERSION = 1
CHECKSUM = "dc1b56f79927d997277927cbdffc13c94bf981869ebecf94628e96e1a8abba7c"
FOLDER = Path(__file__).resolve().parent.parent / "data" / "synthetic"
MARKER = "synthetic.json"
PANOPTIC_CHECKSUM = "40820ce2fc8dcbdc05bcc601393c8fa70c7acc25ea252ca7b57284cf52ebcc34"
PANOPTIC_MARKER = "synthetic_panoptic.json"

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
CATEGORY_IDS = (1, 2, 3, 5, 8, 13)              # with gaps, so that whoever takes an id for a label is found out
GROUNDS = ("grass", "sand", "water", "stone")     # green, red to yellow, blue, nearly grey
GROUND_IDS = (21, 34, 55, 89)
COLOURS = ((228, 64, 64), (64, 108, 228), (64, 190, 84), (238, 176, 48), (158, 78, 208), (52, 196, 206),    # of shapes
           (132, 168, 104), (196, 168, 120), (112, 144, 176), (152, 152, 152))                              # of grounds
FIRST_ID = {"train": 100_001, "val": 200_001}   # image ids and file names
SMALLEST = 11                                   # pixels, of a box side

SIN = np.array([round(math.sin(math.radians(d)), 6) for d in range(360)])
COS = np.array([round(math.cos(math.radians(d)), 6) for d in range(360)])

Outlines = list[np.ndarray]                     # closed polygons [n, 2] of (x, y); a hole runs the other way round


class Scene(NamedTuple):
    """An image before it is written."""
    pixels: np.ndarray              # [H, W, 3] uint8
    owner: np.ndarray               # [H, W] int: which object is seen, -1 for the ground
    objects: list[dict[str, Any]]   # category_id, bbox, area, iscrowd, segmentation; objects[k] is seen where owner == k
    ground: int                     # what the ground is, of GROUNDS


class Dice:
    """A random stream in the few forms that are needed here, all made from ``random_sample``."""

    def __init__(self, *seed: int) -> None:
        self.sample = np.random.RandomState(list(seed)).random_sample

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.sample())

    def whole(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return low + int(self.sample() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return bool(self.sample() < probability)


# ---- shapes ----------------------------------------------------------------------------------------------------------

def polar(degrees: list[int], radii: list[float]) -> np.ndarray:
    """Points ``[n, 2]`` (x, y) at these angles and distances from the origin."""
    return np.stack([COS[degrees] * radii, SIN[degrees] * radii], axis=1)


def unit_outlines(shape: str) -> Outlines:
    """The shape around the origin, with radius 1."""
    circle = polar(list(range(0, 360, 9)), [1.0] * 40)
    if shape == "circle":
        return [circle]
    if shape == "ring":
        return [circle, 0.55 * circle[::-1]]
    if shape == "square":
        return [polar([45, 135, 225, 315], [1.0] * 4)]
    if shape == "triangle":
        return [polar([30, 150, 270], [1.0] * 3)]
    if shape == "star":
        return [polar(list(range(18, 360, 36)), [1.0, 0.45] * 5)]
    a = 0.34                                                                # a cross: half the width of its arms
    return [np.array([[a, -1], [a, -a], [1, -a], [1, a], [a, a], [a, 1],
                      [-a, 1], [-a, a], [-1, a], [-1, -a], [-a, -a], [-a, -1]])]


def random_outlines(dice: Dice, shape: str, size: float) -> Outlines:
    """The shape stretched and turned, with ``sqrt(w * h) == size`` for its box (more where a side would be too short),
    in the quadrant x >= 0, y >= 0."""
    stretch = dice.between(0.8, 1.25)
    turn = dice.whole(0, 359) if shape not in ("square", "cross") else dice.whole(-20, 20) % 360
    outlines = [points * [stretch, 1.0] for points in unit_outlines(shape)]
    outlines = [np.stack([x * COS[turn] - y * SIN[turn], x * SIN[turn] + y * COS[turn]], axis=1)
                for x, y in (points.T for points in outlines)]
    low, high = outlines[0].min(0), outlines[0].max(0)
    width, height = high - low
    shortest = SMALLEST + (2.0 if shape in ("triangle", "star") else 0.5)  # thin tips cover no pixel
    scale = max(size / math.sqrt(width * height), shortest / min(width, height))
    return [(points - low) * scale for points in outlines]


def coverage(outlines: Outlines, height: int, width: int) -> np.ndarray:
    """How much of each pixel the shape covers: ``[height, width]``, 0..1.

    Every edge covers all that is to its right, counted up or down by its direction; exact along x, four rows a pixel.
    """
    rows = np.zeros((4 * height, width))
    right = np.arange(1.0, width + 1)
    for points in outlines:
        for (x0, y0), (x1, y1) in zip(points.tolist(), np.roll(points, -1, axis=0).tolist()):
            sign = 1.0
            if y0 > y1:
                x0, y0, x1, y1, sign = x1, y1, x0, y0, -1.0
            first = min(max(math.ceil(4 * y0 - 0.5), 0), 4 * height)
            last = min(max(math.ceil(4 * y1 - 0.5), 0), 4 * height)
            if first < last:
                x = x0 + ((np.arange(first, last) + 0.5) / 4 - y0) * ((x1 - x0) / (y1 - y0))
                rows[first:last] += sign * np.minimum(np.maximum(right - x[:, None], 0.0), 1.0)
    return np.abs(rows[0::4] + rows[1::4] + rows[2::4] + rows[3::4]) / 4


# ---- colours and textures --------------------------------------------------------------------------------------------

def rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Colour of a hue in 0..6 -> red, green, blue in 0..255."""
    k = [(n + hue) % 6 for n in (5, 3, 1)]
    return np.array([255 * value * (1 - saturation * max(0.0, min(i, 4 - i, 1.0))) for i in k])


def ramp(degrees: int, height: int, width: int) -> np.ndarray:
    """Pixels along a direction: ``[height, width]``."""
    return np.arange(width) * COS[degrees] + (np.arange(height) * SIN[degrees])[:, None]


def wave(x: np.ndarray, period: float) -> np.ndarray:
    """A smooth wave of height 0..1."""
    t = np.abs(x / period - np.floor(x / period) - 0.5) * 2
    return t * t * (3 - 2 * t)


def value_noise(dice: Dice, cell: float, height: int, width: int) -> np.ndarray:
    """Random values on a lattice, smoothly joined: ``[height, width]``, 0..1."""
    lattice = dice.sample((int(height / cell) + 2, int(width / cell) + 2))
    y, x = np.arange(height) / cell, np.arange(width) / cell
    iy, ix = y.astype(int), x.astype(int)
    fy, fx = y - iy, x - ix
    fy, fx = (fy * fy * (3 - 2 * fy))[:, None], fx * fx * (3 - 2 * fx)
    rows = lattice[iy] + (lattice[iy + 1] - lattice[iy]) * fy
    return rows[:, ix] + (rows[:, ix + 1] - rows[:, ix]) * fx


def ground(dice: Dice, height: int, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A textured background of low contrast ``[height, width, 3]``, the two colours ``[2, 3]`` it lies between, and which
    of ``GROUNDS`` it is."""
    hue, saturation, value = dice.between(0, 6), dice.between(0.05, 0.45), dice.between(0.2, 0.9)
    step, turned = dice.between(0.08, 0.16) * (1 if value < 0.55 else -1), dice.between(-0.7, 0.7)
    colours = np.stack([rgb(hue, saturation, value), rgb(hue + turned, saturation, value + step)])
    kind = 3 if saturation < 0.15 else (1, 0, 2)[int((hue + turned / 2 + 1) % 6 // 2)]      # by the hue in the middle
    slope = ramp(dice.whole(0, 359), height, width)
    slope = (slope - slope.min()) / (slope.max() - slope.min())
    clouds = value_noise(dice, dice.between(24, 64), height, width)
    turn, period = dice.whole(0, 359), dice.between(9, 36)
    pattern = dice.whole(0, 3)
    if pattern == 0:                                                        # clouds, fine on coarse
        texture = 0.6 * clouds + 0.4 * value_noise(dice, dice.between(6, 14), height, width)
    elif pattern == 1:                                                      # stripes, a little bent
        texture = wave(ramp(turn, height, width) + 10 * clouds, period)
    elif pattern == 2:                                                      # soft checks
        texture = np.abs(wave(ramp(turn, height, width), 2 * period)
                         - wave(ramp((turn + 90) % 360, height, width), 2 * period))
    else:                                                                   # contour lines of the clouds
        texture = wave(clouds, dice.between(0.15, 0.4))
    mix = 0.4 * slope + 0.2 * clouds + 0.4 * texture
    return colours[0] + (colours[1] - colours[0]) * mix[..., None], colours, kind


def contrasting(dice: Dice, others: list[np.ndarray]) -> np.ndarray:
    """A colour at least 100 levels (Euclidean, of RGB) from all others, or the farthest of twenty."""
    best, farthest = np.zeros(3), -1.0
    for _ in range(20):
        colour = rgb(dice.between(0, 6), dice.between(0.35, 1.0), dice.between(0.35, 1.0))
        distance = min(math.sqrt(sum(d * d for d in (colour - other).tolist())) for other in others)
        if distance > farthest:
            best, farthest = colour, distance
        if distance >= 100:
            break
    return best


def paint(dice: Dice, canvas: np.ndarray, cover: np.ndarray, core: np.ndarray | None, colour: np.ndarray) -> None:
    """Blend a shape into its window of the canvas, in place; where ``core`` is given, the rest of ``cover`` is a rim."""
    height, width = cover.shape
    kind, turn, strength = dice.whole(0, 3), dice.whole(0, 359), dice.between(0.06, 0.14)
    if kind == 0:
        tone = np.zeros((height, width))
    elif kind == 1:
        tone = ramp(turn, height, width)
        tone = (tone - tone.min()) / (tone.max() - tone.min()) * 2 - 1
    elif kind == 2:
        tone = wave(ramp(turn, height, width), dice.between(5, 10)) * 2 - 1
    else:
        tone = dice.sample((height, width)) * 2 - 1
    fill = colour * (1 + strength * tone)[..., None]
    if core is not None:
        rim = colour * 0.5 if dice.chance(0.6) else 255 - (255 - colour) * 0.4
        fill = rim + (fill - rim) * core[..., None]
    canvas += (fill - canvas) * cover[..., None]


# ---- scenes ----------------------------------------------------------------------------------------------------------

def block_roles(seed: int, split: int, index: int) -> tuple[bool, bool]:
    """Whether the image is without objects, and whether it has a crowd: 5 and 1 of every 50 images."""
    order = np.argsort(Dice(seed, split, 1, index // 50).sample(50), kind="stable")
    return index % 50 in order[:5], index % 50 == order[5]


def tight_box(mask: np.ndarray) -> list[int]:
    """x, y, width, height of the pixels in the mask; zeros where it is empty."""
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)] if len(x) else [0, 0, 0, 0]


def box_iou(a: list[int], b: list[int]) -> float:
    """IoU of two boxes x, y, width, height."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / (a[2] * a[3] + b[2] * b[3] - inter)


def run_lengths(mask: np.ndarray) -> list[int]:
    """Uncompressed RLE counts of a mask: column by column, zeros first."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    return counts if counts[-1] else counts[:-1]


def window(outlines: Outlines, height: int, width: int) -> tuple[slice, slice, Outlines]:
    """Rows and columns of an image that the shape touches, and the shape relative to them."""
    (x0, y0), (x1, y1) = outlines[0].min(0).tolist(), outlines[0].max(0).tolist()
    left, top = max(math.floor(x0), 0), max(math.floor(y0), 0)
    right, bottom = min(math.ceil(x1), width), min(math.ceil(y1), height)
    return slice(top, bottom), slice(left, right), [points - [left, top] for points in outlines]


class Painter:
    """A canvas that takes one shape after the other and knows what is seen of each."""

    def __init__(self, dice: Dice, height: int, width: int) -> None:
        self.dice, self.height, self.width = dice, height, width
        self.canvas, self.ground_colours, self.ground = ground(dice, height, width)
        self.owner = np.full((height, width), -1)
        self.drawn: list[int] = []                  # pixels of each object when it was drawn
        self.boxes: list[list[int]] = []            # of what is seen of them
        self.colours: list[np.ndarray] = []

    def fits(self, mask: np.ndarray, rows: slice, columns: slice, alone: bool) -> bool:
        """Whether a new object leaves enough of all others to be seen. ``alone``: it must not touch any."""
        box = tight_box(mask)
        if min(box[2:]) < SMALLEST:
            return False
        box = [box[0] + columns.start, box[1] + rows.start, *box[2:]]
        hidden = self.owner[rows, columns][mask]
        if (hidden < 0).all():
            return True
        if alone or max(box_iou(box, other) for other in self.boxes) > 0.4:
            return False
        for k in np.unique(hidden[hidden >= 0]).tolist():
            seen = self.owner == k
            seen[rows, columns] &= ~mask
            if seen.sum() < 0.6 * self.drawn[k] or min(tight_box(seen)[2:]) < SMALLEST:
                return False
        return True

    def draw(self, outlines: Outlines, cover: np.ndarray, colour: np.ndarray | None, k: int) -> None:
        """Paint a shape, which covers so much of the pixels of its window, as part of object ``k``."""
        rows, columns, local = window(outlines, self.height, self.width)
        mask = cover >= 0.5
        if colour is None:
            near = set(self.owner[rows, columns].ravel().tolist()) - {-1, k}
            colour = contrasting(self.dice, [*self.ground_colours, *(self.colours[j] for j in sorted(near))])
        core = None
        size = min(cover.shape)
        if size >= 18 and self.dice.chance(0.5):
            low, high = local[0].min(0), local[0].max(0)
            centre, shrink = (low + high) / 2, 2 * self.dice.between(1.2, 2.2) / size
            core = coverage([centre + (points - centre) * (1 - shrink if i == 0 else 1 + shrink)
                             for i, points in enumerate(local)], *cover.shape)
        paint(self.dice, self.canvas[rows, columns], cover, core, colour)
        if k == len(self.drawn):
            self.drawn.append(0)
            self.boxes.append([])
            self.colours.append(colour)
        changed = {k, *self.owner[rows, columns][mask].tolist()} - {-1}
        self.owner[rows, columns][mask] = k
        for j in changed:
            self.boxes[j] = tight_box(self.owner == j)
        self.drawn[k] = int((self.owner == k).sum())

    def place(self, shape: str, size: float) -> Outlines | None:
        """Draw an object of this shape somewhere; None where no place was found for it."""
        dice, k = self.dice, len(self.drawn)
        alone, over_border = dice.chance(0.65), dice.chance(1 / 12)
        for attempt in range(40):
            outlines = random_outlines(dice, shape, size)
            width, height = outlines[0].max(0).tolist()
            x = dice.between(1, self.width - width - 1)
            y = dice.between(1, self.height - height - 1)
            if over_border:
                side, cut = dice.whole(0, 3), dice.between(0.1, 0.35)
                x = (-cut * width, x, self.width - (1 - cut) * width, x)[side]
                y = (y, -cut * height, y, self.height - (1 - cut) * height)[side]
            outlines = [np.round(points + [x, y], 2) for points in outlines]
            rows, columns, local = window(outlines, self.height, self.width)
            cover = coverage(local, rows.stop - rows.start, columns.stop - columns.start)
            if self.fits(cover >= 0.5, rows, columns, alone and attempt < 20):
                self.draw(outlines, cover, None, k)
                return outlines
        return None

    def crowd(self, shape: str) -> None:
        """Draw a heap of tiny shapes of one kind that belong to one object."""
        dice = self.dice
        k, size = len(self.drawn), dice.between(0.3, 0.45) * min(self.height, self.width)
        x0, y0 = dice.between(2, self.width - size - 14), dice.between(2, self.height - size - 14)
        for _ in range(dice.whole(18, 28)):
            outlines = random_outlines(dice, shape, dice.between(9, 12))
            offset = [x0 + dice.between(0, size), y0 + dice.between(0, size)]
            colour = contrasting(dice, list(self.ground_colours))
            outlines = [np.round(points + offset, 2) for points in outlines]
            rows, columns, local = window(outlines, self.height, self.width)
            self.draw(outlines, coverage(local, rows.stop - rows.start, columns.stop - columns.start), colour, k)


def bare_ground(seed: int, split: str, index: int) -> Painter:
    """Image ``index`` of a split before its objects."""
    dice = Dice(seed, list(FIRST_ID).index(split), 0, index)
    height, width = dice.whole(128, 192), dice.whole(128, 192)
    return Painter(dice, height, width)


def make_scene(seed: int, split: str, index: int) -> Scene:
    """Image ``index`` of a split and its objects."""
    painter = bare_ground(seed, split, index)
    dice, height, width = painter.dice, painter.height, painter.width
    empty, crowded = block_roles(seed, list(FIRST_ID).index(split), index)
    side = math.sqrt(height * width)
    kinds: list[int] = []
    outlines: list[Outlines] = []
    if crowded:
        kinds.append(dice.whole(0, 5))
        outlines.append([])
        painter.crowd(SHAPES[kinds[0]])
    sizes = []
    for _ in range(0 if empty else dice.whole(1, 10)):
        group = float(dice.sample())
        low, high = (((SMALLEST + 0.5) / side, 0.098) if group < 0.38 else (0.104, 0.25) if group < 0.78
                     else (0.255, 0.55))
        sizes.append(dice.between(low, high) * side)
    for size in sorted(sizes, reverse=True):                                # large ones lie behind
        kind = dice.whole(0, 5)
        outline = painter.place(SHAPES[kind], size)
        if outline is not None:
            kinds.append(kind)
            outlines.append(outline)
    grain = (dice.sample((height, width)) - 0.5) * dice.between(2, 6)
    pixels = np.rint(np.clip(painter.canvas + grain[..., None], 0, 255)).astype(np.uint8)
    objects = []
    for k, (kind, outline) in enumerate(zip(kinds, outlines)):
        mask = painter.owner == k
        area = int(mask.sum())
        inside = len(outline) and outline[0].min() >= 0 and (outline[0].max(0) <= [width, height]).all()
        segmentation: Any
        if not outline:
            segmentation = {"size": [height, width], "counts": run_lengths(mask)}
        elif len(outline) == 1 and inside and area == painter.drawn[k]:
            segmentation = [outline[0].ravel().tolist()]
        else:
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            segmentation = {"size": [height, width], "counts": rle["counts"].decode("ascii")}
        objects.append({"category_id": CATEGORY_IDS[kind], "bbox": painter.boxes[k], "area": area,
                        "iscrowd": int(not outline), "segmentation": segmentation})
    return Scene(pixels, painter.owner, objects, painter.ground)


# ---- panoptic --------------------------------------------------------------------------------------------------------

PANOPTIC_CATEGORIES = [
    {"id": i, "name": name, "isthing": isthing, "supercategory": "shape" if isthing else "ground", "color": list(colour)}
    for i, name, isthing, colour in zip((*CATEGORY_IDS, *GROUND_IDS), (*SHAPES, *GROUNDS), [1] * 6 + [0] * 4, COLOURS)]


def owner_of(objects: list[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """The ``owner [height, width]`` of a scene again, from its objects: no pixel differs."""
    owner = np.full((height, width), -1)
    for k, entry in enumerate(objects):
        segmentation = entry["segmentation"]
        if isinstance(segmentation, list):                                      # an outline, drawn as it was
            rows, columns, local = window([np.reshape(segmentation[0], (-1, 2))], height, width)
            owner[rows, columns][coverage(local, rows.stop - rows.start, columns.stop - columns.start) >= 0.5] = k
        else:
            rle = (coco_mask.frPyObjects(segmentation, height, width) if isinstance(segmentation["counts"], list)
                   else segmentation)
            owner[coco_mask.decode(rle).astype(bool)] = k
    return owner


def panoptic_map(owner: np.ndarray, objects: list[dict[str, Any]],
                 kind: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Of a scene with this kind of ground: colours ``[H, W, 3]`` uint8 and the segments that they name, objects that are
    seen in their order, then the ground."""
    rows = [(k, entry["category_id"], entry["iscrowd"]) for k, entry in enumerate(objects)]
    colour_of = {category["id"]: category["color"] for category in PANOPTIC_CATEGORIES}
    colours, segments = np.zeros((*owner.shape, 3), np.uint8), []
    for k, category, crowd in [*rows, (-1, GROUND_IDS[kind], 0)]:
        seen = owner == k
        if seen.any():
            red, green, blue = (c * (16 - max(k, 0)) // 16 for c in colour_of[category])
            colours[seen] = red, green, blue
            segments.append({"id": red + 256 * green + 65536 * blue, "category_id": category, "iscrowd": crowd,
                             "bbox": tight_box(seen), "area": int(seen.sum())})
    return colours, segments


# ---- on disk ---------------------------------------------------------------------------------------------------------

def canonical(data: Any) -> bytes:
    """The one way to write ``data`` as json, for checksums."""
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def info(description: str) -> dict[str, Any]:
    """What a json says of itself."""
    return {"info": {"description": description, "version": str(VERSION), "year": 2025},
            "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}]}


def say_percent(done: int, total: int) -> None:
    """Print the part that is done, at each tenth."""
    if done * 10 // total > (done - 1) * 10 // total:
        print(f" {done * 100 // total}%", end="", flush=True)


def make_synthetic(folder: str | Path, seed: int = 0, train: int = 2000, val: int = 300) -> None:
    """Write the data set to ``folder``, whole or not at all: it is made beside it and moved there at the end.

    Raises ``FileExistsError`` where something is there already. Where another process brings its own in the meantime,
    that one stays.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; move it away, or name another folder for the synthetic data")
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:12]}"
    making.mkdir()
    start = time.monotonic()
    try:
        digest = hashlib.sha256()
        total, done = train + val, 0
        print(f"making the synthetic data set in {folder}, once: {total} images", end="", flush=True)
        (making / "annotations").mkdir()
        for split, count in (("train", train), ("val", val)):
            (making / f"{split}2017").mkdir()
            images, annotations = [], []
            for index in range(count):
                scene = make_scene(seed, split, index)
                image_id = FIRST_ID[split] + index
                name = f"{image_id:012d}.png"
                height, width = scene.owner.shape
                Image.fromarray(scene.pixels).save(making / f"{split}2017" / name, compress_level=4)
                digest.update(scene.pixels.tobytes())
                images.append({"id": image_id, "file_name": name, "width": width, "height": height, "license": 1})
                annotations += [{"id": 100 * image_id + k, "image_id": image_id, **entry}
                                for k, entry in enumerate(scene.objects)]
                done += 1
                say_percent(done, total)
            content = canonical({
                **info("shapes on textured grounds"), "images": images, "annotations": annotations,
                "categories": [{"id": i, "name": s, "supercategory": "shape"} for i, s in zip(CATEGORY_IDS, SHAPES)]})
            digest.update(content)
            (making / "annotations" / f"instances_{split}2017.json").write_bytes(content)
        marker = {"version": VERSION, "seed": seed, "train": train, "val": val, "checksum": digest.hexdigest(),
                  "expected": CHECKSUM}
        (making / MARKER).write_text(json.dumps(marker, indent=1) + "\n")
        try:
            os.rename(making, folder)
        except OSError:                                                         # another process was faster
            if not (folder / MARKER).is_file():
                raise
        print(f", {time.monotonic() - start:.0f} s", flush=True)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def synthetic_data(folder: str | Path | None = None) -> Path:
    """The folder of the data set, made first where it is absent.

    What is there is taken only if it is whole and of this version: anything else is set aside, said, and made anew.
    Several processes may call this at once; the first to finish provides the folder for all.
    """
    folder = FOLDER if folder is None else Path(folder)
    wrong = defect(folder) if folder.exists() else "absent"
    if wrong is not None and folder.exists():
        aside = folder.with_name(f"{folder.name}-set-aside-{uuid.uuid4().hex[:6]}")
        with contextlib.suppress(FileNotFoundError):                            # another process was faster
            folder.rename(aside)
            print(f"synthetic data in {folder}: {wrong}; moved to {aside.name}, to be made anew", flush=True)
    if wrong is not None:
        try:
            make_synthetic(folder)
        except FileExistsError:                                                 # another process was faster
            if defect(folder) is not None:
                raise
    found = json.loads((folder / MARKER).read_text())["checksum"]
    if found != CHECKSUM:
        print(f"synthetic data in {folder}: checksum {found[:12]}, not {CHECKSUM[:12]}: made with another seed or "
              "number of images, or this machine computes differently; results on them do not compare", flush=True)
    return folder


def defect(folder: Path) -> str | None:
    """What keeps ``folder`` from being the data set, or None. Files are counted, not read.

    Another checksum is no defect where this very version came to it: making the data again would not change it.
    """
    try:
        marker = json.loads((folder / MARKER).read_text())
        version, checksum, counts = marker["version"], marker["checksum"], {s: marker[s] for s in FIRST_ID}
    except (OSError, ValueError, KeyError, TypeError):
        return f"no readable {MARKER}"
    if version != VERSION or CHECKSUM not in (checksum, marker.get("expected")):
        return "of another version"
    for split, count in counts.items():
        found = sum(1 for _ in (folder / f"{split}2017").glob("*.png"))
        if found != count:
            return f"{found} of {count} images in {split}2017"
        if not (folder / "annotations" / f"instances_{split}2017.json").is_file():
            return f"annotations/instances_{split}2017.json is missing"
    return None


# ---- the panoptic part on disk ---------------------------------------------------------------------------------------

PANOPTIC_PARTS = (PANOPTIC_MARKER, *(f"panoptic_{split}2017" for split in FIRST_ID),
                  *(f"annotations/panoptic_{split}2017.json" for split in FIRST_ID))


def make_panoptic(folder: str | Path) -> None:
    """Add the panoptic part to the data set in ``folder``, whole or not at all: it is made beside it and moved there at
    the end, the marker last. Images are not drawn again: what is seen of objects is in the json of instances, the
    kind of ground in the first numbers of each image's random stream.

    Raises ``FileExistsError`` where some of it is there already. Where another process brings its own in the meantime,
    its files, which have the same content, are replaced.
    """
    folder = Path(folder)
    if there := [name for name in PANOPTIC_PARTS if (folder / name).exists()]:
        raise FileExistsError(f"{folder} already has {', '.join(there)}; move that away, to have the panoptic part made")
    pictures = json.loads((folder / MARKER).read_text())
    making = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:12]}"
    making.mkdir()
    start = time.monotonic()
    try:
        digest = hashlib.sha256()
        total, done = sum(pictures[split] for split in FIRST_ID), 0
        print(f"making panoptic annotations of the synthetic data in {folder}, once: {total} images", end="", flush=True)
        (making / "annotations").mkdir()
        for split, first in FIRST_ID.items():
            (making / f"panoptic_{split}2017").mkdir()
            data = json.loads((folder / "annotations" / f"instances_{split}2017.json").read_bytes())
            objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in data["images"]}
            for entry in data["annotations"]:
                objects[entry["image_id"]].append(entry)
            annotations = []
            for image in data["images"]:
                image_id, seen = image["id"], objects[image["id"]]
                kind = bare_ground(pictures["seed"], split, image_id - first).ground
                colours, segments = panoptic_map(owner_of(seen, image["height"], image["width"]), seen, kind)
                name = f"{image_id:012d}.png"
                Image.fromarray(colours).save(making / f"panoptic_{split}2017" / name)
                digest.update(colours.tobytes())
                annotations.append({"image_id": image_id, "file_name": name, "segments_info": segments})
                done += 1
                say_percent(done, total)
            content = canonical({**info("shapes and grounds, panoptic"), "images": data["images"],
                                 "annotations": annotations, "categories": PANOPTIC_CATEGORIES})
            digest.update(content)
            (making / "annotations" / f"panoptic_{split}2017.json").write_bytes(content)
        marker = {"pictures": pictures["checksum"], "checksum": digest.hexdigest(), "expected": PANOPTIC_CHECKSUM}
        (making / PANOPTIC_MARKER).write_text(json.dumps(marker, indent=1) + "\n")
        for part in ("annotations", *(f"panoptic_{split}2017" for split in FIRST_ID)):
            (folder / part).mkdir(exist_ok=True)
            for file in (making / part).iterdir():
                os.replace(file, folder / part / file.name)
        os.replace(making / PANOPTIC_MARKER, folder / PANOPTIC_MARKER)
        print(f", {time.monotonic() - start:.0f} s", flush=True)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def synthetic_panoptic(folder: str | Path | None = None) -> Path:
    """``synthetic_data`` with its panoptic part, both made first where they are absent: the folder is ``--coco_path`` and
    ``--coco_panoptic_path`` at once. A panoptic part that is not whole or of another version is set aside, said, and made
    anew."""
    folder = synthetic_data(folder)
    wrong = panoptic_defect(folder)
    if wrong is not None:
        if any((folder / name).exists() for name in PANOPTIC_PARTS):
            aside = folder.with_name(f"{folder.name}-panoptic-set-aside-{uuid.uuid4().hex[:6]}")
            aside.mkdir()
            for name in PANOPTIC_PARTS:
                with contextlib.suppress(FileNotFoundError):                    # absent
                    (folder / name).rename(aside / Path(name).name)
            print(f"synthetic data in {folder}: {wrong}; its panoptic part moved to {aside.name}, to be made anew",
                  flush=True)
        try:
            make_panoptic(folder)
        except FileExistsError:                                                 # another process was faster
            if panoptic_defect(folder) is not None:
                raise
    found = json.loads((folder / PANOPTIC_MARKER).read_text())
    if found["checksum"] != PANOPTIC_CHECKSUM and found["pictures"] == CHECKSUM:        # otherwise it was said of those
        print(f"panoptic part of the synthetic data in {folder}: checksum {found['checksum'][:12]}, not "
              f"{PANOPTIC_CHECKSUM[:12]}: this machine computes differently; results on it do not compare", flush=True)
    return folder


def panoptic_defect(folder: Path) -> str | None:
    """As ``defect``, of the panoptic part."""
    pictures = json.loads((folder / MARKER).read_text())
    try:
        marker = json.loads((folder / PANOPTIC_MARKER).read_text())
        checksum, of = marker["checksum"], marker["pictures"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"no readable {PANOPTIC_MARKER}"
    if PANOPTIC_CHECKSUM not in (checksum, marker.get("expected")):
        return "the panoptic part is of another version"
    if of != pictures["checksum"]:
        return "the panoptic part is of other pictures"
    for split in FIRST_ID:
        found = sum(1 for _ in (folder / f"panoptic_{split}2017").glob("*.png"))
        if found != pictures[split]:
            return f"{found} of {pictures[split]} maps in panoptic_{split}2017"
        if not (folder / "annotations" / f"panoptic_{split}2017.json").is_file():
            return f"annotations/panoptic_{split}2017.json is missing"
    return None
