"""Tiles: every pixel is covered, and what several tiles see of one object is one detection, of two objects two."""
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from detr import tiles
from detr.boxes import box_iou
from detr.postprocess import encode
from detr.tiles import Tile, in_tiles, merged, moved_mask, places


def boxes(*corners) -> torch.Tensor:
    return torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)


def seen_by(objects: torch.Tensor, tile: Tile, labels=None, scores=None, least: float = 2.0):
    """What a perfect detector says of a tile: the visible box of each object of which ``least`` pixels are seen."""
    corner = torch.tensor([tile.left, tile.top, tile.left, tile.top])
    limit = torch.tensor([tile.right, tile.bottom, tile.right, tile.bottom]) - corner
    cut = (objects - corner).clamp(min=0).minimum(limit)
    there = ((cut[:, 2:] - cut[:, :2]) >= least).all(1)
    labels = torch.zeros(len(objects), dtype=torch.int64) if labels is None else labels
    scores = torch.full((len(objects),), 0.9) if scores is None else scores
    return {"scores": scores[there], "labels": labels[there], "boxes": cut[there]}


def everywhere(objects: torch.Tensor, size, tile=100, overlap=0.2, labels=None, noise=0.0, seed=0):
    """The merged detections of a perfect detector, whose boxes and scores ``noise`` (pixels) may move."""
    generator, where, found = torch.Generator().manual_seed(seed), places(*size, tile, overlap), []
    for place in where:
        one = seen_by(objects, place, labels)
        corner = torch.tensor([place.left, place.top, place.left, place.top])
        one["boxes"] = one["boxes"] + corner + noise * (2 * torch.rand(one["boxes"].shape, generator=generator) - 1)
        one["scores"] = one["scores"] - 0.4 * noise * torch.rand(len(one["scores"]), generator=generator)
        found.append(one)
    return merged(found, where, size)


def same_boxes(found: torch.Tensor, want: torch.Tensor, atol: float = 0.0) -> bool:
    """Whether the boxes are the same, in any order."""
    left = found.tolist()
    for box in want.tolist():
        near = [one for one in left if max(abs(a - b) for a, b in zip(one, box)) <= atol]
        if not near:
            return False
        left.remove(near[0])
    return not left


# Places.

@pytest.mark.parametrize("height, width", [(100, 100), (1, 1), (37, 1000), (101, 100), (33, 177)])
@pytest.mark.parametrize("tile, overlap", [(100, 0.2), (100, 0.0), (64, 0.5), (7, 0.9), (800, 0.2), (9, 0.0)])
def test_places_cover_the_image(height, width, tile, overlap):
    where = places(height, width, tile, overlap)
    assert len(set(where)) == len(where)
    assert {(one.right - one.left, one.bottom - one.top) for one in where} == {(min(tile, width), min(tile, height))}
    for axis, length in ((0, width), (1, height)):
        spans = sorted({(one[axis], one[axis + 2]) for one in where})
        assert spans[0][0] == 0 and spans[-1][1] == length                                          # flush at both ends
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert end - start >= min(tile * overlap, tile - 1) - 1e-6
        assert len(spans) <= max(length - tile, 0) / max(tile * (1 - overlap) - 1, 1) + 2           # no more than needed
    columns, rows = ({one[axis] for one in where} for axis in (0, 1))
    assert len(where) == len(columns) * len(rows)


def test_places_that_cannot_be():
    for tile, overlap, message in ((0, 0.2, "tile 0: a side in pixels"), (10, -0.1, "overlap -0.1: .* 0 to 0.9"),
                                   (10, 1.0, "overlap 1.0"), (10, float("nan"), "overlap nan")):
        with pytest.raises(ValueError, match=message):
            places(50, 50, tile, overlap)
    with pytest.raises(ValueError, match="of 0 x 50 pixels has no tiles"):
        places(50, 0, 10)


# One object is one detection. Of 180 x 180 pixels, tiles of 100 with an overlap of 20 are at 0 and 80.

@pytest.mark.parametrize("corners", [
    (85, 30, 97, 42),               # wholly inside the overlap of two
    (85, 85, 97, 97),               # of four
    (70, 30, 90, 45),               # whole in one, cut in the other
    (70, 70, 90, 90),               # at a corner: whole in one, cut in three ways in the others
    (96, 30, 140, 60),              # a sliver in the first
    (81, 2, 99, 20), (80, 30, 100, 50),                             # as wide as the overlap
    (30, 30, 150, 60),              # wider than the overlap, cut in both
    (20, 20, 170, 160),             # cut in all four
    (0, 0, 180, 180),               # the whole image
    (0, 70, 180, 110),              # from side to side, in the overlap of rows
    (50, 0, 60, 180),
    (3, 3, 20, 20),                 # in a single tile
])
def test_one_object_is_one_detection(corners):
    found = everywhere(boxes(corners), (180, 180))
    assert found["boxes"].tolist() == boxes(corners).tolist()
    for seed in range(20):
        noisy = everywhere(boxes(corners), (180, 180), noise=0.8, seed=seed)
        assert len(noisy["boxes"]) == 1 and box_iou(noisy["boxes"], boxes(corners))[0] > 0.7


@pytest.mark.parametrize("objects", [
    [(85, 30, 91, 42), (92, 30, 98, 42)],                           # neighbours, both inside the overlap
    [(60, 30, 89, 60), (90, 30, 120, 60)],                          # that meet in its middle
    [(60, 30, 95, 60), (96, 30, 130, 60)], [(60, 30, 83, 60), (84, 30, 120, 60)],
    [(60, 30, 98, 60), (99, 30, 130, 60)],                          # at the border of one tile
    [(30, 30, 89, 60), (30, 61, 150, 90)],                          # one above the other, one of them joined
    [(20, 20, 160, 60), (20, 70, 160, 110)],                        # two that are joined
    [(20, 20, 95, 60), (97, 20, 170, 60)],
    [(40, 40, 95, 95), (90, 42, 140, 90)],                          # overlapping
    [(70, 30, 95, 60), (76, 30, 101, 60)],                          # that much that suppression would take one: IoU 0.61
    [(40, 40, 140, 140), (84, 84, 96, 96)],                         # a small one before a large one
    [(40, 40, 140, 140), (70, 84, 96, 96)],
])
def test_two_objects_are_two_detections(objects):
    found = everywhere(boxes(*objects), (180, 180))
    assert same_boxes(found["boxes"], boxes(*objects))
    for order in itertools.permutations(objects):
        assert same_boxes(everywhere(boxes(*order), (180, 180))["boxes"], boxes(*objects))


def scattered(random: np.random.RandomState, count: int, size, sides, gap: float) -> torch.Tensor:
    """Boxes at least ``gap`` apart."""
    kept: list[list[float]] = []
    for _ in range(50 * count):
        w, h = random.uniform(*sides, 2)
        x, y = random.uniform(0, size[1] - w), random.uniform(0, size[0] - h)
        if all(x > b[2] + gap or x + w < b[0] - gap or y > b[3] + gap or y + h < b[1] - gap for b in kept):
            kept.append([x, y, x + w, y + h])
        if len(kept) == count:
            break
    return boxes(*kept)


@pytest.mark.parametrize("overlap", [0.15, 0.2, 0.25, 0.5, 0.6])
@pytest.mark.parametrize("sides, count", [((10, 14), 150), ((5, 40), 60), ((30, 160), 12), ((8, 9), 300)])
def test_many_objects_of_one_class(sides, count, overlap):
    """Exactly what is there, of any size and wherever it lies, though neighbours are 3 pixels apart."""
    for seed in range(3):
        size = (333, 471)
        objects = scattered(np.random.RandomState(seed), count, size, sides, gap=3)
        assert len(objects) >= 8
        assert same_boxes(everywhere(objects, size, overlap=overlap)["boxes"], objects, atol=1e-3)


@pytest.mark.parametrize("sides, count", [((10, 14), 120), ((12, 40), 50), ((30, 90), 15)])
def test_many_objects_and_boxes_that_are_not_exact(sides, count):
    for seed in range(5):
        size = (333, 471)
        objects = scattered(np.random.RandomState(seed), count, size, sides, gap=4)
        found = everywhere(objects, size, noise=0.7, seed=seed)
        iou = box_iou(found["boxes"], objects)[0]
        assert len(found["boxes"]) == len(objects) and (iou.max(0).values > 0.6).all()


def test_it_does_not_matter_how_the_image_lies():
    """Turned over or mirrored, an image has the same objects."""
    size, random = (260, 260), np.random.RandomState(4)
    objects = scattered(random, 25, size, (10, 70), gap=2)
    straight = everywhere(objects, size)["boxes"]
    mirrored = torch.stack([260 - objects[:, 2], objects[:, 1], 260 - objects[:, 0], objects[:, 3]], 1)
    back = everywhere(mirrored, size)["boxes"]
    assert same_boxes(torch.stack([260 - back[:, 2], back[:, 1], 260 - back[:, 0], back[:, 3]], 1), straight, 1e-3)
    turned = everywhere(objects[:, [1, 0, 3, 2]], size)["boxes"]
    assert same_boxes(turned[:, [1, 0, 3, 2]], straight, 1e-3)


# Whom to believe.

def two(left: list, right: list, size=(100, 180)):
    """Merged detections (score, label, corners in the image) of the tiles at 0 and at 80."""
    where = places(*size, 100, 0.2)
    return merged([{"scores": torch.tensor([row[0] for row in rows]), "boxes": boxes(*(row[2] for row in rows)),
                    "labels": torch.tensor([row[1] for row in rows], dtype=torch.int64)} for rows in (left, right)],
                  where, size)


def listed(found) -> list:
    return [(round(score, 3), label, [round(x, 3) for x in box]) for score, label, box in
            zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist())]


def test_the_whole_gives_the_box_and_the_best_the_score():
    assert listed(two([(0.6, 1, (70, 30, 95, 50))], [(0.9, 1, (80, 31, 96, 50))])) == [(0.9, 1, [70, 30, 95, 50])]
    assert listed(two([(0.8, 1, (85, 30, 95, 50))], [(0.7, 1, (86, 30, 95, 51))])) == [(0.8, 1, [85, 30, 95, 50])]


def test_what_a_part_was_taken_for():
    """Another class, seen of a part, gives way to that of the whole; a part without a whole is all there is."""
    whole, part = (0.6, 1, (60, 30, 92, 50)), (0.8, 2, (80, 31, 93, 50))
    assert listed(two([whole], [part])) == [(0.6, 1, [60, 30, 92, 50])]
    sliver = (0.8, 2, (80, 38, 84, 44))                             # of what is seen, too small a box
    assert listed(two([whole], [sliver])) == [(0.6, 1, [60, 30, 92, 50])]
    assert listed(two([], [part])) == [(0.8, 2, [80, 31, 93, 50])]
    faint = (0.1, 1, (60, 20, 99, 70))
    assert len(listed(two([faint], [sliver]))) == 2


def test_tiles_that_differ_about_the_class():
    assert listed(two([(0.6, 1, (85, 30, 95, 50))], [(0.7, 2, (85, 30, 95, 51))])) == [(0.7, 2, [85, 30, 95, 51])]
    both = [(0.6, 1, (85, 30, 95, 50)), (0.5, 2, (85, 30, 95, 50))]                 # each says both: so do they together
    assert listed(two(both, both)) == listed(two(both, []))
    box = (85, 30, 95, 50)                                                  # though others are surer of the other class
    found = two([(0.6, 1, box), (0.9, 2, box)], [(0.9, 1, box), (0.6, 2, box)])
    assert sorted(row[:2] for row in listed(found)) == [(0.9, 1), (0.9, 2)]


def test_a_tile_names_no_object_twice():
    """Two that it tells apart, however near, stay two; tiles add no doubles and take away none."""
    near = [(0.9, 1, (85, 30, 95, 50)), (0.5, 1, (85.5, 30, 95, 50))]
    assert len(listed(two(near, near))) == 2 and len(listed(two(near, near[:1]))) == 2
    nearer = [(0.88, 1, (85.4, 30, 95, 50)), (0.4, 1, (85, 30, 95, 50))]                # the best join the best
    assert [row[0] for row in listed(two(near, nearer))] == [0.9, 0.5]


def test_neighbours_that_one_tile_each_reports():
    """What both tiles see of them is not the same, though one would continue the other."""
    assert len(listed(two([(0.9, 1, (72, 30, 84, 50))], [(0.9, 1, (83, 30, 90, 50))]))) == 2
    assert len(listed(two([(0.9, 1, (30, 30, 98, 50))], [(0.9, 1, (96, 30, 150, 50))]))) == 2


def test_boxes_beyond_borders():
    """At a tile's border they end there; at the image's they stay as they are; what is not in its tile is nothing."""
    assert listed(two([(0.9, 1, (60, -3, 110, 50))], [])) == [(0.9, 1, [60, -3, 100, 50])]
    assert listed(two([], [(0.9, 1, (150, 30, 190, 104))])) == [(0.9, 1, [150, 30, 190, 104])]
    assert listed(two([(0.9, 1, (101, 30, 140, 50))], [])) == []


def test_nothing():
    found = two([], [])
    assert {name: list(value.shape) for name, value in found.items()} == {"scores": [0], "labels": [0], "boxes": [0, 4]}
    with pytest.raises(ValueError, match="of 1 tiles and places of 2"):
        merged([found], places(100, 180, 100), (100, 180))


# Masks.

@pytest.mark.parametrize("place", [Tile(0, 0, 30, 20), Tile(50, 40, 80, 60), Tile(20, 0, 50, 60), Tile(0, 0, 80, 60)])
def test_masks_are_moved(place):
    """Bit for bit, with runs that go on from column to column."""
    random, (height, width) = np.random.RandomState(0), (60, 80)
    shape = place.bottom - place.top, place.right - place.left
    for mask in (random.rand(*shape) > 0.5, np.ones(shape, bool), np.zeros(shape, bool), random.rand(*shape) > 0.95):
        code, = encode(torch.from_numpy(mask[None, None].astype(np.uint8)))
        full = np.zeros((height, width), np.uint8)
        full[place.top:place.bottom, place.left:place.right] = mask
        got = moved_mask(code, place, (height, width))
        want, = encode(torch.from_numpy(full[None, None]))
        assert got == want and np.array_equal(coco_mask.decode(got), full)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_only_tiles_that_meet_are_compared(monkeypatch, overlap):
    """With the same result, to the last bit, as if all were."""
    size, random, compared, results = (400, 500), np.random.RandomState(0), [], []
    where = places(*size, 100, overlap)
    found = []
    for place in where:
        corner = torch.tensor(random.uniform(-5, 80, (30, 2)), dtype=torch.float32)
        sides = torch.tensor(random.uniform(4, 60, (30, 2)), dtype=torch.float32)
        found.append({"scores": torch.tensor(random.rand(30)), "labels": torch.tensor(random.randint(0, 3, 30)),
                      "boxes": torch.cat([corner, corner + sides], 1) + torch.tensor([place.left, place.top] * 2)})
    evidence, area = tiles.evidence, tiles.area

    def every_pair(seen, borders):
        results.append(evidence(seen, np.tile([0.0, 0, size[1], size[0]], (len(borders), 1))))
        compared.clear()
        results.append(evidence(seen, borders))
        return results[-1]

    monkeypatch.setattr(tiles, "area", lambda boxes: (boxes.ndim == 2 and compared.append(len(boxes)), area(boxes))[1])
    monkeypatch.setattr(tiles, "evidence", every_pair)
    merged(found, where, size)
    assert all(np.array_equal(one, other) for one, other in zip(*results)) and (overlap == 0 or len(results[0][0]) > 10)
    assert overlap > 0.5 or compared[1] < len(where) * 30 / 2                   # of the first tile, its neighbours' alone


# Tiles of pictures, with a detector that finds bright squares.

def bright(pictures):
    """The boxes and masks of what is lighter than its surroundings, each its own level of grey."""
    found = []
    for picture in pictures:
        pixels = np.asarray(picture.convert("L")) if isinstance(picture, Image.Image) else picture[0].numpy()
        levels = [level for level in np.unique(pixels).tolist() if level > 20]
        corners, masks = [], []
        for level in levels:
            y, x = np.nonzero(pixels == level)
            corners.append((x.min(), y.min(), x.max() + 1, y.max() + 1))
            masks.append(pixels == level)
        codes = encode(torch.from_numpy(np.array(masks, np.uint8).reshape(-1, 1, *pixels.shape)))
        found.append({"scores": torch.full((len(levels),), 0.9), "labels": torch.zeros(len(levels), dtype=torch.int64),
                      "boxes": boxes(*corners), "masks": codes})
    return found


@pytest.mark.parametrize("tensor", [False, True])
def test_pictures_in_tiles(tensor):
    size, random = (210, 333), np.random.RandomState(1)
    objects = scattered(random, 30, size, (9, 60), gap=2).round()
    pixels = np.zeros(size, np.uint8)
    for level, (x0, y0, x1, y1) in enumerate(objects.int().tolist(), 30):
        pixels[y0:y1, x0:x1] = level
    sizes = []

    def detect(pictures):
        sizes.append(len(pictures))
        return bright(pictures)

    picture = torch.from_numpy(pixels)[None] if tensor else Image.fromarray(pixels)
    found = in_tiles(picture, detect, 100, 0.2, batch_size=4)
    assert sizes == [4, 4, 4] and same_boxes(found["boxes"], objects)
    for box, code in zip(found["boxes"].int().tolist(), found["masks"]):
        want = np.zeros(size, np.uint8)
        want[box[1]:box[3], box[0]:box[2]] = 1
        assert np.array_equal(coco_mask.decode(code), want)


def test_a_picture_smaller_than_a_tile():
    pixels = np.zeros((40, 50), np.uint8)
    pixels[10:20, 30:50] = 200
    shown = []

    def detect(pictures):
        shown.extend(pictures)
        return bright(pictures)

    found = in_tiles(Image.fromarray(pixels), detect, 100, whole=True)
    assert [one.size for one in shown] == [(50, 40)] and found["boxes"].tolist() == [[30, 10, 50, 20]]


def test_the_whole_as_one_more_tile():
    """For what is larger than tiles, which find it only where they see its corners here."""
    pixels = np.zeros((300, 300), np.uint8)
    pixels[20:270, 30:270] = 99
    pixels[5:15, 90:105] = 200

    def detect(pictures):
        found = bright(pictures)
        for picture, one in zip(pictures, found):
            sides = (one["boxes"][:, 2:] - one["boxes"][:, :2]).max(1).values
            keep = sides < 0.85 * picture.width
            one["scores"], one["labels"], one["boxes"] = (one[name][keep] for name in ("scores", "labels", "boxes"))
            del one["masks"]
        return found

    picture = Image.fromarray(pixels)
    alone = in_tiles(picture, detect, 100, 0.2, 3)["boxes"].tolist()
    assert [90, 5, 105, 15] in alone and len(alone) == 5                    # and parts that nobody saw continue
    assert same_boxes(in_tiles(picture, detect, 100, 0.2, 3, whole=True)["boxes"],
                      boxes((90, 5, 105, 15), (30, 20, 270, 270)))


def test_4000_pixels_and_objects_of_12():
    """With tiles of 400, all, each once, in the boxes' own order of scores."""
    side, random = 4000, np.random.RandomState(0)
    corners = random.permutation(200 * 200)[:3000]
    objects = boxes(*([20 * (c % 200) + dx, 20 * (c // 200) + dy, 20 * (c % 200) + dx + 12, 20 * (c // 200) + dy + 12]
                      for c, (dx, dy) in zip(corners, random.randint(0, 9, (3000, 2)).tolist())))
    found = everywhere(objects, (side, side), tile=400, noise=0.9)
    iou = box_iou(found["boxes"], objects)[0]
    assert len(found["boxes"]) == 3000 and (iou.max(0).values > 0.6).all()
    assert (found["scores"].diff() <= 0).all()
