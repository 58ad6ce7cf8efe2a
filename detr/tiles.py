"""Large images in tiles: the detections of overlapping squares -> those of the image, each object once.

    found = in_tiles(picture, detect, tile=800, overlap=0.2)        # detect: pictures -> Detections of each

A model resizes what it is shown, so that an object of 12 pixels in an image of 4,000 is less than one pixel to it. In
tiles it is as large as the objects that the model was trained on, if the tile is chosen so: objects should be to a tile
as those of the training data were to their images, and no wider than the overlap, so that each is whole in some tile.

**What is one object.** Tiles A and B see an object, each what lies inside of it, and both the same of what they share.
So a detection of A and one of B, of one class, are one object where

- their boxes, after the sides at which a tile's border cuts one of them were taken from the other, if that reaches
  further, have an IoU of at least ``SAME``: whole boxes are compared as they are, a part with what it is a part of by
  its other sides, and two parts that continue each other by the sides along which they do; and
- of what each has in the region that both tiles see, the smaller lies at least to ``SHARED`` in the other: of two
  neighbours, the ends of both are seen by both tiles, and differ.

A tile names no object twice, as a set prediction does not, so of each tile one detection at most joins an object:
neighbours that overlap a lot stay two, and the best pairs, by IoU times the lower score, are joined first. Detections of
different classes are joined last: of what is left, where each tile says something else, one is wrong.

**What becomes of them.** The most confident detection that no border cuts gives class, box and mask. Where all are cut,
the object is wider than the overlap: each side comes from the most confident that has it uncut, and masks are united. The
score is the highest of that class. A part that could not be joined (a sliver at a border has a poor box) is left out
where another tile, which sees beyond the border, has a detection there that goes on beyond it, of any class and at least
``LESS`` of its score; without one it is all the evidence there is, and stays.

With ``overlap=0`` tiles share nothing to compare, and objects that a border cuts stay in pieces.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .preprocessing import Picture, height_width
from .structures import Detections, Rle, selected

OVERLAP = 0.2           # of a tile's side that neighbours share, unless somebody says otherwise
SAME = 0.5              # IoU of boxes of one object, seen by two tiles
SHARED = 0.5            # part of what both tiles see of it
EXPLAINED = 0.7         # part of a cut box that lies in a detection which sees more, or so near to it
LESS = 0.5              # part of its score that this detection has, at least
NEAR = 1 / 32           # of a tile: a side so near to a border is cut by it; at most a quarter of the overlap


class Tile(NamedTuple):
    """A rectangle of an image, in pixels; right and bottom are outside."""
    left: int
    top: int
    right: int
    bottom: int


def places(height: int, width: int, tile: int, overlap: float = OVERLAP) -> list[Tile]:
    """Tiles of ``tile`` pixels a side that cover an image, row by row. Neighbours share at least ``overlap`` of a side,
    all about the same, and the last are flush with the image; where it is smaller than a tile, so are they."""
    if not 1 <= tile:
        raise ValueError(f"tile {tile}: a side in pixels is needed")
    if not 0 <= overlap <= 0.9:
        raise ValueError(f"overlap {overlap}: the part of a tile's side that neighbours share, 0 to 0.9, is needed")
    if min(height, width) < 1:
        raise ValueError(f"an image of {width} x {height} pixels has no tiles")
    step = max(1, math.floor(tile * (1 - overlap) + 1e-9))

    def spans(length: int) -> list[tuple[int, int]]:
        side = min(tile, length)
        gaps = -(-(length - side) // step)
        return [(start, start + side) for start in ((length - side) * i // max(gaps, 1) for i in range(gaps + 1))]

    return [Tile(left, top, right, bottom) for top, bottom in spans(height) for left, right in spans(width)]


def in_tiles(picture: Picture, detect: Callable[[list[Picture]], Sequence[Detections]], tile: int,
             overlap: float = OVERLAP, batch_size: int = 1, whole: bool = False) -> Detections:
    """What ``detect`` finds in the tiles of a picture, ``batch_size`` of them at a time: ``scores``, ``labels``,
    ``boxes`` and, where it gives run-length codes, ``masks``, of the whole picture, the highest score first. ``whole``:
    the whole picture is one more tile. Nothing of a tile is kept but its detections."""
    size = height_width(picture)
    where = places(*size, tile, overlap)
    batches = [where[start:start + batch_size] for start in range(0, len(where), batch_size)]
    everything = Tile(0, 0, size[1], size[0])
    if whole and everything not in where:
        batches.append([everything])                                    # alone: of another size, it would be padded
    found = [moved(one, place, size) for some in batches
             for one, place in zip(detect([cut_out(picture, place) for place in some]), some)]
    return merged(found, [place for some in batches for place in some], size)


def cut_out(picture: Picture, place: Tile) -> Picture:
    """The part of a picture."""
    if isinstance(picture, Tensor):
        return picture[:, place.top:place.bottom, place.left:place.right]
    return picture.crop(place)


def moved(found: Detections, place: Tile, size: tuple[int, int]) -> Detections:
    """Detections of a tile -> of the image of ``size`` (height, width)."""
    corner = found["boxes"].new_tensor([place.left, place.top])
    there: Detections = {"scores": found["scores"], "labels": found["labels"],
                         "boxes": found["boxes"] + torch.cat([corner, corner])}
    if "masks" in found:
        if isinstance(found["masks"], Tensor):
            raise TypeError("masks of tiles are needed as run-length codes; build PostProcessSegm with rle=True")
        there["masks"] = [moved_mask(code, place, size) for code in found["masks"]]
    return there


def moved_mask(code: Rle, place: Tile, size: tuple[int, int]) -> Rle:
    """The run-length code of a tile's mask -> that of the image's. Only pixels of the tile are ever unpacked."""
    from pycocotools import mask as coco_mask
    height, width = size
    inside = coco_mask.decode(code)                                                         # [h, w]
    column = np.zeros((inside.shape[1], inside.shape[0] + 2), np.int8)
    column[:, 1:-1] = inside.T
    x, change = np.nonzero(np.diff(column, axis=1))                 # where runs of a column begin and, in turn, end
    flat = (place.left + x) * height + place.top + change                           # COCO counts down the columns
    begin, end = flat[::2], flat[1::2]
    apart = np.ones(len(begin) + 1, bool)
    apart[1:-1] = begin[1:] > end[:-1]                          # a run may go on from a column's foot to the next's head
    bounds = np.stack([begin[apart[:-1]], end[apart[1:]]], axis=1).ravel()
    counts = np.diff(np.concatenate([[0], bounds, [height * width]])).tolist()
    counts = counts if counts[-1] else counts[:-1]                              # as pycocotools ends a code
    full: Rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": full["counts"].decode("ascii")}


class Pieces(NamedTuple):
    """The n detections of all tiles, tile after tile, and how each lies in its own."""
    scores: np.ndarray          # [n]
    labels: np.ndarray          # [n]
    boxes: np.ndarray           # [n, 4] corners in the image, within the borders that are not the image's
    tile: np.ndarray            # [n] number of the tile
    borders: np.ndarray         # [n, 4] left, top, right, bottom of the tile
    near: np.ndarray            # [4] how near a side is to a border that cuts it, in pixels
    cut: np.ndarray             # [n, 4] bool: a border that is not the image's cuts this side


OUT = np.array([-1.0, -1.0, 1.0, 1.0])                      # which way left, top, right and bottom look


def merged(found: Sequence[Detections], where: Sequence[Tile], size: tuple[int, int]) -> Detections:
    """The detections of each tile, ``boxes`` as corners in the image of ``size`` (height, width), -> those of the image,
    each object once; see the top of this file. The highest score comes first. What lies wholly outside its tile is no
    evidence of anything, and left out."""
    if len(found) != len(where):
        raise ValueError(f"detections of {len(found)} tiles and places of {len(where)}; give both of the same")
    keys = [name for name in ("scores", "labels", "boxes", "masks") if any(name in one for one in found)]
    everything: Any = {name: [value for one in found for value in one[name]] if name == "masks" else
                       torch.cat([one[name] for one in found]) for name in keys}
    borders = np.array(where, np.float64).reshape(-1, 4)
    tile = np.repeat(np.arange(len(where)), [len(one["scores"]) for one in found])
    near = nearness(where, size)
    cut, boxes = at_borders(everything["boxes"].double().numpy(), borders[tile], size, near)
    inside = np.flatnonzero((boxes[:, :2] <= boxes[:, 2:]).all(1))
    everything = selected(everything, inside.tolist())
    seen = Pieces(everything["scores"].double().numpy(), everything["labels"].numpy(), boxes[inside], tile[inside],
                borders[tile[inside]], near, cut[inside])
    same, explains = evidence(seen, borders)
    objects = sorted(named(seen, joined(seen, same), explains), key=lambda one: (-one.score, one.best))
    result = selected(everything, [one.best for one in objects])
    for name, values in (("scores", [one.score for one in objects]), ("boxes", [box_of(seen, one) for one in objects])):
        result[name] = torch.tensor(np.array(values)).to(result[name]).reshape(result[name].shape)
    if "masks" in everything:
        result["masks"] = [united([everything["masks"][i] for i in one.witnesses]) for one in objects]
    return result


def nearness(where: Sequence[Tile], size: tuple[int, int]) -> np.ndarray:
    """How near to a border a side is cut by it, in pixels ``[4]`` of left, top, right, bottom."""
    parts = [place for place in where if place != (0, 0, size[1], size[0])]         # the whole image cuts nothing
    near = []
    for axis in (0, 1):
        spans = sorted({(place[axis], place[axis + 2]) for place in parts})
        shared = [end - start for (_, end), (start, _) in zip(spans, spans[1:])]
        near.append(min([(end - start) * NEAR for start, end in spans] + [width / 4 for width in shared], default=0.0))
    return np.array([*near, *near])


def at_borders(boxes: np.ndarray, borders: np.ndarray, size: tuple[int, int],
               near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which sides ``[n, 4]`` of boxes are cut by a border of their tile, and boxes that end at those borders. Borders of
    the image cut nothing: beyond them nobody sees more."""
    inner = borders != [0, 0, size[1], size[0]]
    outward, border = boxes * OUT, borders * OUT
    return inner & (outward >= border - near), np.where(inner, np.minimum(outward, border), outward) * OUT


def area(boxes: np.ndarray) -> np.ndarray:
    """Areas ``[...]`` of corner boxes ``[..., 4]``, 0 where they are turned inside out."""
    return (boxes[..., 2:] - boxes[..., :2]).clip(0).prod(-1)


def common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What two boxes share, a box again."""
    return np.minimum(a * OUT, b * OUT) * OUT


def evidence(seen: Pieces, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of detections of different tiles, whose ``borders [T, 4]`` say which of them meet: ``same [m, 3]``, two that
    may be one object and how well that fits; ``explains [k, 2]``, one that is cut and one that sees more of what is
    there, and explains it."""
    same, explains = [np.zeros((0, 3))], [np.zeros((0, 2), np.int64)]
    starts = np.searchsorted(seen.tile, np.arange(len(borders) + 1))
    for k, (start, end) in enumerate(zip(starts[:-1], starts[1:])):
        if start == end:
            continue
        reach = k + 1 + np.flatnonzero(area(common(borders[k], borders[k + 1:])) > 0)
        others = np.concatenate([np.arange(starts[r], starts[r + 1]) for r in reach] or [np.zeros(0, np.int64)])
        others = others[area(common(borders[k], seen.boxes[others])) > 0]
        meet = area(common(seen.boxes[start:end, None], seen.boxes[None, others])) > 0
        p, q = np.nonzero(meet)
        p, q = p + start, others[q]
        a, b = seen.boxes[p], seen.boxes[q]
        further = np.maximum(a * OUT, b * OUT) * OUT
        completed = [np.where(seen.cut[one], further, seen.boxes[one]) for one in (p, q)]
        overlap = area(common(*completed))
        iou = overlap / (area(completed[0]) + area(completed[1]) - overlap)
        region = common(seen.borders[p], seen.borders[q])
        smaller = np.minimum(area(common(a, region)), area(common(b, region)))
        fits = (iou >= SAME) & (area(common(common(a, b), region)) >= SHARED * smaller)
        same.append(np.stack([p, q, iou * np.minimum(seen.scores[p], seen.scores[q])], axis=1)[fits])
        for part, more in ((p, q), (q, p)):
            beyond = seen.boxes[more] * OUT > seen.borders[part] * OUT
            sees_more = (seen.cut[part] & beyond).any(1) & (~seen.cut[part] | seen.cut[more] | beyond).all(1)
            inside = area(common(seen.boxes[part], seen.boxes[more] + OUT * seen.near))
            sees_more &= inside >= EXPLAINED * area(seen.boxes[part])
            explains.append(np.stack([part, more], axis=1)[sees_more])
    return np.concatenate(same), np.concatenate(explains)


def joined(seen: Pieces, same: np.ndarray) -> np.ndarray:
    """The object ``[n]`` of each detection, named after one of its detections: pairs are joined, the best first, unless
    a tile would then name an object twice."""
    owner = list(range(len(seen.scores)))
    members = [[i] for i in owner]
    tiles = [{int(number)} for number in seen.tile]
    pairs = same[:, :2].astype(np.int64)
    other_class = seen.labels[pairs[:, 0]] != seen.labels[pairs[:, 1]]
    for p, q in pairs[np.lexsort([-same[:, 2], other_class])].tolist():
        one, other = owner[p], owner[q]
        if one != other and tiles[one].isdisjoint(tiles[other]):
            tiles[one] |= tiles[other]
            members[one] += members[other]
            for i in members[other]:
                owner[i] = one
    return np.array(owner, np.int64)


class Object(NamedTuple):
    """What the detections of an object come to."""
    score: float
    best: int               # detection that gives the class
    witnesses: list[int]    # detections that give box and mask, the most confident first


def named(seen: Pieces, owner: np.ndarray, explains: np.ndarray) -> list[Object]:
    """The objects, without those that nobody saw whole and all of whose detections are explained by another object."""
    groups: dict[int, list[int]] = {}
    for i in np.argsort(-seen.scores, kind="stable").tolist():
        groups.setdefault(owner[i], []).append(i)
    objects = {}
    for name, members in groups.items():
        witnesses = next(([i] for i in members if not seen.cut[i].any()), members)
        score = next(seen.scores[i] for i in members if seen.labels[i] == seen.labels[witnesses[0]])
        objects[name] = Object(float(score), witnesses[0], witnesses)
    known = {part for part, more in explains.tolist()
             if owner[part] != owner[more] and objects[owner[more]].score >= objects[owner[part]].score * LESS}
    return [one for name, one in objects.items()
            if not (seen.cut[one.witnesses].all(0).any() and known.issuperset(groups[name]))]


def box_of(seen: Pieces, one: Object) -> np.ndarray:
    """The box ``[4]`` of an object: each side from the first witness that has it uncut, or else from that which reaches
    furthest."""
    boxes, cut = seen.boxes[one.witnesses], seen.cut[one.witnesses]
    furthest = (boxes * OUT).max(0) * OUT
    box = np.where(cut.all(0), furthest, boxes[cut.argmin(0), np.arange(4)])        # argmin: the first that is False
    return box if (box[:2] <= box[2:]).all() else furthest


def united(codes: Sequence[Rle]) -> Rle:
    """One mask of several."""
    from pycocotools import mask as coco_mask
    if len(codes) == 1:
        return codes[0]
    one: Rle = coco_mask.merge([{**code, "counts": code["counts"].encode("ascii")} for code in codes])
    return {"size": list(one["size"]), "counts": one["counts"].decode("ascii")}
