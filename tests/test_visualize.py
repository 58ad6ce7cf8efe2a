"""What the pictures show: colours, boxes and captions at their places; curves from logs as they come."""
import colorsys
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from detr import visualize
from detr.visualize import (
    COCO_NUMBERS,
    class_colour,
    draw_curves,
    draw_detections,
    draw_masks,
    draw_panoptic,
    font,
    overlap,
    place_caption,
    read_log,
    series,
    shorten,
    side_by_side,
    stuff_colour,
    text_colour,
    thing_colour,
    viewable,
)

GREY = (128, 128, 128)
NAMES = {0: "ring", 2: "cross"}


def canvas(width: int = 300, height: int = 260) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def changed(picture: Image.Image) -> np.ndarray:
    """Where a picture is no longer grey ``[H, W]``."""
    return (np.asarray(picture) != GREY).any(-1)


def of_colour(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(picture) == colour).all(-1)


def draw(picture: Image.Image, *boxes, labels=None, names=NAMES, scores=None, min_side=0) -> Image.Image:
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    scores = None if scores is None else torch.tensor(scores)
    return draw_detections(picture, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), labels, names, scores,
                           min_side)


def contrast(a, b) -> float:
    def luminance(colour):
        return sum(weight * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
                   for weight, c in zip((0.2126, 0.7152, 0.0722), (c / 255 for c in colour)))
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# Colours.

def test_colours_are_stable_and_distinct():
    colours = [class_colour(label) for label in range(91)]
    assert colours == [class_colour(label) for label in range(91)] and len(set(colours)) == 91
    first = np.array(colours[:8])
    distances = np.abs(first[:, None] - first).sum(-1)[~np.eye(8, dtype=bool)]
    assert distances.min() > 80


# Machado, Oliveira and Fernandes, 2009: how linear RGB looks to eyes without red or green cones.
PROTANOPIA = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                       [-0.003882, -0.048116, 1.051998]])
DEUTERANOPIA = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                         [-0.011820, 0.042940, 0.968881]])


@pytest.mark.parametrize("eyes", [PROTANOPIA, DEUTERANOPIA])
def test_the_first_colours_differ_for_eyes_that_see_fewer(eyes):
    def least(colours) -> float:
        linear = (np.array(colours) / 255) ** 2.2
        seen = ((linear @ eyes.T).clip(0, 1) ** (1 / 2.2)) * 255
        return np.abs(seen[:, None] - seen).sum(-1)[~np.eye(len(colours), dtype=bool)].min()

    wheel = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb((0.58 + i * 0.618034) % 1, 0.8, 1.0)) for i in range(7)]
    assert least([class_colour(label) for label in range(7)]) > 60 > 30 > least(wheel)


def test_captions_contrast():
    for label in range(250):
        background = class_colour(label)
        assert contrast(background, text_colour(background)) >= 4.5
    assert text_colour((255, 255, 0)) == (0, 0, 0) and text_colour((0, 0, 120)) == (255, 255, 255)


# Boxes and captions.

def test_a_box_is_where_it_should_be():
    image = canvas()
    picture = draw(image, (60, 80, 200, 180), labels=[2])
    assert picture.size == image.size and not changed(image).any()                      # the original is left alone
    outline = of_colour(picture, class_colour(2))
    assert outline[80, 60:200].all() and outline[179, 60:200].all()
    assert outline[80:180, 60].all() and outline[80:180, 199].all()
    assert not changed(picture)[85:175, 65:195].any()                                   # the object itself stays free
    rows, columns = np.nonzero(changed(picture))
    assert rows.max() == 180 and columns.max() == 200                                   # the dark rim, one pixel
    caption = changed(picture)[:79]
    assert caption.any() and np.nonzero(caption)[1].min() == 60                          # above it, on the left


def test_small_objects_get_thin_lines_and_small_letters():
    size = 1600, 1200
    assert visualize.line_width(size) == 8 > visualize.line_width(size, 40.0) > visualize.line_width(size, 12.0) == 1
    assert visualize.caption_font(size).size > visualize.caption_font(size, 45.0).size > 10
    assert visualize.caption_font(size, 12.0).size == 10
    assert visualize.median_side(torch.tensor([[0.0, 0, 30, 10], [0, 0, 50, 90], [5, 5, 25, 35]])) == 20


def test_nothing_to_draw():
    assert not changed(draw(canvas())).any()
    assert not changed(draw(canvas(), scores=[])).any()


def test_boxes_over_the_edge():
    outside = draw(canvas(), (-50, -40, -3, -2), (310, 20, 350, 60))
    assert not changed(outside).any()
    partly = draw(canvas(), (-20, 100, 40, 400))
    outline = of_colour(partly, class_colour(0))
    assert outline[100:, 39].all() and not outline[:, 41:].any() | outline[:80].any()


def test_a_box_without_size_is_a_dot():
    assert changed(draw(canvas(), (100, 100, 100, 100))).any()


def test_names_and_scores(monkeypatch):
    written = []
    monkeypatch.setattr(visualize.ImageDraw.ImageDraw, "text", lambda self, xy, text, *_, **__: written.append(text))
    draw(canvas(), (10, 50, 60, 90), (100, 50, 160, 90), (10, 150, 60, 190), labels=[0, 2, 12], scores=[0.5, 0.869, 1])
    assert written == ["label 12 1.00", "cross 0.87", "ring 0.50"]                       # the surest first
    written.clear()
    draw(canvas(), (10, 50, 60, 90), (100, 50, 160, 90), labels=[1, 5], names=["a", "b"])
    assert sorted(written) == ["b", "label 5"]


def test_captions_of_small_pictures_fit():
    """At 128 pixels a long name is cut, not the score, and the caption stays within the picture."""
    letters = font(10)
    text = shorten("a traffic light with a very long name", " 0.87", letters, 100)
    assert letters.getlength(text) <= 100 and text.startswith("a traffic") and text.endswith("… 0.87")
    assert shorten("ring", " 0.87", letters, 100) == "ring 0.87"
    assert shorten("ring", " 0.87", letters, 1) == "… 0.87"
    picture = draw(canvas(128, 128), (90, -4, 140, 30), labels=[0], names={0: "a traffic light with a long name"},
                   scores=[0.87])
    caption = of_colour(picture, class_colour(0))
    assert caption.any(1).sum() > 25 and picture.size == (128, 128)


def test_captions_avoid_each_other():
    boxes = [(50, 50, 190, 190), (52, 51, 192, 191), (48, 49, 188, 192)]
    captions = []
    for box in boxes:
        captions.append(place_caption((60, 14), box, (300, 260), captions, boxes))
    assert all(overlap(a, b) == 0 for i, a in enumerate(captions) for b in captions[:i])
    for x0, y0, x1, y1 in captions:
        assert x0 >= 0 and y0 >= 0 and x1 <= 300 and y1 <= 260
    assert place_caption((60, 14), (250, 5, 299, 200), (300, 260), [], []) == (240, 0, 300, 14)


def test_small_pictures_are_enlarged():
    picture = draw(canvas(128, 150), (32, 40, 96, 120), min_side=256)
    assert picture.size == (256, 300)
    assert of_colour(picture, class_colour(0))[80:240, 64].all()
    assert draw(canvas(128, 150), min_side=257).size == (384, 450)
    assert draw(canvas(128, 150), min_side=128).size == (128, 150)
    assert draw_detections(canvas(160, 128), torch.zeros(0, 4), torch.zeros(0), {}).size == (320, 256)


def test_the_surest_is_on_top():
    box = (50, 60, 200, 200)
    for scores in ([0.9, 0.4], [0.4, 0.9]):
        picture = draw(canvas(), box, box, labels=[0, 2], scores=scores)
        assert of_colour(picture, class_colour(0 if scores[0] > 0.5 else 2))[150, 50]


def test_numbers_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"boxes_xyxy \[2, 4\], labels \[3\], scores None: \[n, 4\], \[n\] and \[n\]"):
        draw_detections(canvas(), torch.zeros(2, 4), torch.zeros(3), NAMES)
    with pytest.raises(ValueError, match=r"scores \[1\]"):
        draw_detections(canvas(), torch.zeros(2, 4), torch.zeros(2), NAMES, torch.zeros(1))


def test_any_picture_is_viewable():
    pixels = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (5, 30, 40)).astype(np.uint8))
    for channels in (3, 4, 5):
        picture = viewable(pixels[:channels])
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), pixels[:3].permute(1, 2, 0).numpy())
    for channels in (1, 2):
        assert np.array_equal(np.asarray(viewable(pixels[:channels])), np.repeat(pixels[0].numpy()[..., None], 3, 2))
    grey = Image.fromarray(pixels[0].numpy())
    assert grey.mode == "L" and np.array_equal(np.asarray(viewable(grey)), np.asarray(viewable(pixels[:1])))
    rgb = canvas()
    assert viewable(rgb) is rgb


def test_detections_on_any_picture():
    boxes, labels = torch.tensor([[60.0, 80, 200, 180]]), torch.tensor([2])
    want = draw_detections(canvas(), boxes, labels, NAMES)
    for image in (torch.full((5, 260, 300), 128, dtype=torch.uint8), Image.new("L", (300, 260), 128)):
        assert draw_detections(image, boxes, labels, NAMES).tobytes() == want.tobytes()


# Masks.

def rectangles(*boxes, height=260, width=300) -> torch.Tensor:
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes):
        mask[top:bottom, left:right] = True
    return masks


def mixed(colour, opacity, ground=GREY):
    return np.rint(np.array(ground) * (1 - opacity) + np.array(colour) * opacity)


def test_a_mask_is_where_it_should_be():
    image, masks = canvas(), rectangles((60, 80, 200, 180))
    picture = draw_masks(image, masks, torch.tensor([2]), min_side=0)
    assert not changed(image).any() and np.array_equal(changed(picture), masks[0].numpy())
    outline = of_colour(picture, class_colour(2))
    assert outline[80, 60:200].all() and outline[179, 60:200].all() and outline[80:180, 60].all()
    assert not outline[85:175, 65:195].any()
    assert (np.asarray(picture)[85:175, 65:195] == mixed(class_colour(2), visualize.OPACITY)).all()     # half transparent


def test_masks_of_all_kinds_are_drawn_alike():
    """bool, uint8, with a dimension between, and run-length codes, whose counts are text or bytes."""
    image, labels = canvas(), torch.tensor([0, 2])
    masks = torch.from_numpy(np.random.RandomState(0).rand(2, 260, 300) < 0.7)
    want = draw_masks(image, masks, labels)
    codes = coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
    texts = [{**code, "counts": code["counts"].decode()} for code in codes]
    for same in (masks.byte(), masks[:, None], codes, texts):
        assert draw_masks(image, same, labels).tobytes() == want.tobytes()


def test_masks_are_enlarged_with_the_picture():
    masks = rectangles((20, 30, 50, 60), height=100, width=128)
    picture = draw_masks(canvas(128, 100), masks, torch.tensor([0]), min_side=256)
    assert picture.size == (384, 300)
    assert np.array_equal(changed(picture), masks[0].numpy().repeat(3, 0).repeat(3, 1))


def test_the_surest_mask_is_on_top_and_boxes_on_all():
    box, masks = (50, 60, 200, 200), rectangles((50, 60, 200, 200), (50, 60, 200, 200))
    boxes, labels = torch.tensor([box, box], dtype=torch.float32), torch.tensor([0, 2])
    for scores in ([0.9, 0.4], [0.4, 0.9]):
        picture = draw_detections(canvas(), boxes, labels, NAMES, torch.tensor(scores), 0, masks)
        under, over = class_colour(2), class_colour(0)
        if scores[1] > 0.5:
            under, over = over, under
        want = mixed(over, visualize.OPACITY, mixed(under, visualize.OPACITY))
        assert (np.asarray(picture)[100:150, 100:150] == want).all()
        assert of_colour(picture, over)[150, 50]
    empty = draw_detections(canvas(), boxes, labels, NAMES, None, 0, torch.zeros_like(masks))
    assert empty.tobytes() == draw_detections(canvas(), boxes, labels, NAMES, None, 0).tobytes()


def test_each_object_has_its_own_mask():
    """Whatever the order of the scores; run-length codes, too."""
    boxes, labels = torch.tensor([[50.0, 60, 100, 100], [150, 60, 200, 100]]), torch.tensor([0, 2])
    masks = rectangles((60, 120, 80, 140), (160, 120, 180, 140))
    codes = coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
    for scores in ([0.9, 0.4], [0.4, 0.9]):
        for same in (masks, codes):
            picture = draw_detections(canvas(), boxes, labels, NAMES, torch.tensor(scores), 0, same)
            assert of_colour(picture, class_colour(0))[120, 60:80].all()
            assert of_colour(picture, class_colour(2))[120, 160:180].all()


def test_a_mask_whose_box_is_outside_is_drawn_all_the_same():
    picture = draw_detections(canvas(), torch.tensor([[-50.0, -40, -3, -2]]), torch.tensor([0]), NAMES, None, 0,
                              rectangles((100, 100, 120, 120)))
    assert np.array_equal(changed(picture), rectangles((100, 100, 120, 120))[0].numpy())


def test_masks_that_do_not_belong_to_the_picture():
    with pytest.raises(ValueError, match=r"masks\[0\] is \[20, 30\] and the image \[260, 300\]: masks of the image's"):
        draw_masks(canvas(), torch.zeros(1, 20, 30), torch.tensor([0]))
    for draw_them in (lambda masks: draw_masks(canvas(), masks, torch.zeros(1)),
                      lambda masks: draw_detections(canvas(), torch.zeros(1, 4), torch.zeros(1), NAMES, masks=masks)):
        with pytest.raises(ValueError, match="2 masks and 1 labels: one mask for each object"):
            draw_them(torch.zeros(2, 260, 300))


# Panoptic maps.

def panoptic_of(*boxes, stuff=3) -> tuple[np.ndarray, list[dict]]:
    """Things of class 0 in boxes, the rest one stuff; ids are no places in the list."""
    ids = np.full((260, 300), 70_000)
    for k, (left, top, right, bottom) in enumerate(boxes):
        ids[top:bottom, left:right] = 300 + k
    return ids, [{"id": 70_000, "category_id": stuff, "isthing": False},
                 *({"id": 300 + k, "category_id": 0, "isthing": True} for k in range(len(boxes)))]


def test_segments_have_their_colours_and_borders(monkeypatch):
    monkeypatch.setattr(visualize, "name_segments", lambda *_: None)
    ids, segments = panoptic_of((20, 30, 90, 100), (90, 30, 160, 100))
    pixels = np.asarray(draw_panoptic(canvas(), ids, segments, {}, min_side=0))
    assert (pixels[40:95, 30:80] == mixed(thing_colour(0, 0), visualize.THING_OPACITY)).all()
    assert (pixels[40:95, 100:150] == mixed(thing_colour(0, 1), visualize.THING_OPACITY)).all()
    assert (pixels[110:] == mixed(stuff_colour(3), visualize.OPACITY)).all()
    white = (pixels == 255).all(-1)
    assert white[30, 20:160].all() and white[100, 20:160].all() and white[30:100, 90].all() and white[30:100, 160].all()
    assert not white[:29].any() and not white[40:95, 30:80].any()
    assert thing_colour(0, 0) == class_colour(0)


def test_things_of_a_class_are_apart():
    for label in range(20):
        colours = np.array([thing_colour(label, number) for number in range(6)])
        assert (np.abs(colours[:, None] - colours).sum(-1)[~np.eye(6, dtype=bool)] > 20).all()


def test_ids_of_all_kinds_are_drawn_alike():
    ids, segments = panoptic_of((20, 30, 160, 170))
    want = draw_panoptic(canvas(), ids, segments, NAMES).tobytes()
    file = io.BytesIO()
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(file, "PNG")
    for same in (torch.from_numpy(ids), ids.astype(np.uint32), file.getvalue()):
        assert draw_panoptic(canvas(), same, segments, NAMES).tobytes() == want
    assert draw_panoptic(canvas(), ids, segments, NAMES).size == (300, 260)
    assert draw_panoptic(canvas(), ids, segments, NAMES, min_side=500).size == (600, 520)


def test_void_stays_as_it_is():
    ids, segments = panoptic_of((20, 30, 160, 170))
    assert not changed(draw_panoptic(canvas(), np.zeros_like(ids), [], NAMES)).any()
    picture = draw_panoptic(canvas(), ids, segments[1:], NAMES, min_side=0)
    assert not changed(picture)[:29].any() and changed(picture)[31:170, 21:160].all()


def test_names_stand_in_their_segments_and_not_on_small_ones(monkeypatch):
    written = []
    text = visualize.ImageDraw.ImageDraw.text
    monkeypatch.setattr(visualize.ImageDraw.ImageDraw, "text",
                        lambda self, xy, words, *more: written.append((words, *xy)) or text(self, xy, words, *more))
    ids, segments = panoptic_of((20, 30, 160, 170), (200, 200, 212, 212))
    draw_panoptic(canvas(), ids, segments, {0: "ring", 3: "sky"}, min_side=0)
    assert [words for words, _, _ in written] == ["sky", "ring"]                        # the larger first; one is tiny
    (_, x, y), (_, ring_x, ring_y) = written
    assert ids[y + 5, x + 5] == 70_000 and abs(ring_x + 15 - 90) < 15 and abs(ring_y + 6 - 100) < 15
    written.clear()
    draw_panoptic(canvas(), ids, segments, {0: "ring"})
    assert [words for words, _, _ in written] == ["label 3", "ring"]


def test_names_do_not_hide_each_other(monkeypatch):
    places = []
    rectangle = visualize.ImageDraw.ImageDraw.rectangle
    monkeypatch.setattr(visualize.ImageDraw.ImageDraw, "rectangle",
                        lambda self, box, **more: places.append(box) or rectangle(self, box, **more))
    ids, segments = panoptic_of(*((14 * k, 40, 14 * k + 14, 220) for k in range(18)))
    picture = draw_panoptic(canvas(), ids, segments, {0: "a long name", 3: "sky"}, min_side=0)
    assert len(places) >= 5 and picture.size == (300, 260)
    assert all(overlap(a, b) == 0 for i, a in enumerate(places) for b in places[:i])
    assert all(left >= 0 and top >= 0 and right < 300 and bottom < 260 for left, top, right, bottom in places)


def test_maps_that_do_not_belong_to_the_picture():
    with pytest.raises(ValueError, match=r"ids are \[20, 30\] and the image \[260, 300\]: a map of the image's height"):
        draw_panoptic(canvas(), np.zeros((20, 30), int), [], NAMES)


# Sheets.

@pytest.mark.parametrize("captions", [(), ("a.jpg", "b.jpg", "c.jpg")])
def test_a_sheet_has_every_picture_whole(captions):
    colours = [(200, 30 * i, 10) for i in range(6)]
    sizes = [(200, 150), (200, 150), (120, 180), (120, 180), (250, 90), (250, 90)]
    pictures = [Image.new("RGB", size, colour) for size, colour in zip(sizes, colours)]
    rows = [(pictures[0], pictures[1]), (pictures[2], pictures[3]), (pictures[4], pictures[5])]
    sheet = side_by_side(rows, ("ground truth", "detections"), captions)
    corners = []
    for (width, height), colour in zip(sizes, colours):
        rows_of, columns = np.nonzero(of_colour(sheet, colour))
        assert len(rows_of) == width * height                                           # nothing lies over it
        corners.append((columns.min(), rows_of.min()))
    (left, top), (right, _), (next_left, _), _, (third_left, third_top), _ = corners
    assert left < right < next_left and third_top > top + 150 and third_left < right    # two pairs in a line
    assert (np.asarray(sheet)[:top] < 100).any()                                        # the titles
    assert (np.asarray(sheet)[third_top + 90:] < 200).any() == bool(captions)


def test_sheets_that_cannot_be():
    with pytest.raises(ValueError, match="0 pairs of pictures and 0 captions: at least one pair"):
        side_by_side([], ("a", "b"))
    with pytest.raises(ValueError, match="1 pairs of pictures and 2 captions"):
        side_by_side([(canvas(), canvas())], ("a", "b"), ["x", "y"])


# Curves.

def epoch(number: int, **more) -> dict:
    row = {f"{split}_{name}": scale / (number + 1) for split in ("train", "test")
           for name, scale in (("loss", 20.0), ("loss_ce", 1.0), ("loss_bbox", 0.1), ("loss_giou", 0.8))}
    ap = 1 - 1 / (number + 1.5)
    return {**row, "test_coco_eval_bbox": [ap, ap, ap / 2, -1, ap / 2, ap] + [ap] * 6, "epoch": number, **more}


def with_masks(number: int, **more) -> dict:
    """An epoch of a model with masks on panoptic data."""
    pq = 0.6 - 0.5 / (number + 1)
    return epoch(number) | {
        f"{split}_loss_{name}": scale / (number + 1) for split in ("train", "test")
        for name, scale in (("mask", 0.05), ("dice", 0.9))} | {
        "test_coco_eval_masks": [pq / 2, *[0.99] * 11]} | {
        f"test_PQ_{of}": {"pq": part * pq, "sq": 0.98, "rq": 0.97, "n": 3}
        for of, part in (("all", 1.0), ("th", 1.1), ("st", 0.9))} | more


def write(path, rows, ending="\n"):
    path.write_text("\n".join(json.dumps(row) for row in rows) + ending)
    return path


def lines_drawn(monkeypatch) -> list[tuple[str, list[int], list[float]]]:
    """Label, epochs and values of each line that ``draw_curves`` draws, in their order."""
    drawn: list = []
    monkeypatch.setattr(visualize, "plot", lambda axes, points, **style: drawn.append((style.get("label"), *points)))
    return drawn


@pytest.mark.parametrize("rows", [
    [epoch(i) for i in range(40)],
    [epoch(0)],
    [epoch(i, **({} if i % 5 == 4 else {"test_coco_eval_bbox": None, "test_loss": math.nan})) for i in range(12)],
    [{"epoch": 7}],
    [{"epoch": 0, "train_loss": 3.0}, {"epoch": 1, "train_loss": math.inf, "test_coco_eval_bbox": [-1.0] * 12}],
    [epoch(0, train_loss_bbox=0.0, test_coco_eval_bbox=[0.0] * 12)],
    [with_masks(i) for i in range(9)],
    [with_masks(0, test_PQ_all={"pq": -1.0, "sq": -1.0, "rq": -1.0, "n": 0}), with_masks(1, test_PQ_th=None)],
    [with_masks(0, test_coco_eval_bbox=[1.0] * 12)],
], ids=["long", "one", "gaps", "nothing", "infinite", "zeros", "masks", "masks with gaps", "masks high up"])
@pytest.mark.filterwarnings("error")
def test_curves_of_logs_as_they_come(tmp_path, rows):
    out = tmp_path / "curves.png"
    out.write_bytes(b"old")
    draw_curves(write(tmp_path / "log.txt", rows), out)
    picture = Image.open(out)
    assert picture.format == "PNG" and picture.width > 1000 and (np.asarray(picture.convert("L")) < 100).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "log.txt"]


def test_what_is_drawn(tmp_path, monkeypatch):
    drawn = lines_drawn(monkeypatch)
    rows = [epoch(0), epoch(1, test_coco_eval_bbox=None, train_loss=math.nan), epoch(2)]
    draw_curves(write(tmp_path / "log.txt", rows), tmp_path / "curves.png")
    assert drawn[0] == ("training", [0, 2], [20.0, 20 / 3]) and drawn[1] == ("validation", [0, 1, 2], [20, 10, 20 / 3])
    assert [values[0] for _, _, values in drawn[2:8]] == [1, 1, 0.8, 0.8, 0.1, 0.1]
    assert [(label, epochs) for label, epochs, _ in drawn[8:]] == [                     # -1 says nothing of small ones
        ("AP", [0, 2]), ("AP50", [0, 2]), ("AP75", [0, 2]), ("AP medium", [0, 2]), ("AP large", [0, 2])]
    assert drawn[10][2] == pytest.approx([1 / 6, 5 / 14])


def test_what_is_drawn_of_masks(tmp_path, monkeypatch):
    """The masks' losses among the parts; mask AP and PQ after the precision of boxes, which say then what they are of."""
    drawn = lines_drawn(monkeypatch)
    nothing = {"pq": -1.0, "sq": -1.0, "rq": -1.0, "n": 0}
    draw_curves(write(tmp_path / "log.txt", [with_masks(0, test_PQ_st=nothing), epoch(1), with_masks(2)]),
                tmp_path / "curves.png")
    assert [(epochs, values[0]) for _, epochs, values in drawn[8:12]] == [
        ([0, 2], 0.05), ([0, 2], 0.05), ([0, 2], 0.9), ([0, 2], 0.9)]
    assert [(label, epochs) for label, epochs, _ in drawn[12:]] == [
        *[(f"box AP{of}", [0, 1, 2]) for of in ("", "50", "75", " medium", " large")],
        ("mask AP", [0, 2]), ("PQ", [0, 2]), ("PQ things", [0, 2]), ("PQ stuff", [2])]
    last = 0.6 - 0.5 / 3
    assert [values[-1] for *_, values in drawn[17:]] == pytest.approx([last / 2, last, 1.1 * last, 0.9 * last])


def test_masks_change_no_picture_of_boxes(tmp_path):
    """Without masks in the log the colours of masks are nowhere; with them each is in its panels."""
    pixels = {}
    for name, make in (("boxes", epoch), ("masks", with_masks)):
        draw_curves(write(tmp_path / f"{name}.txt", [make(i) for i in range(5)]), tmp_path / f"{name}.png")
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        pixels[name] = [[of_colour(third, tuple(bytes.fromhex(colour[1:]))).sum() > 50
                         for colour in (visualize.PURPLE, visualize.RED)] for third in np.split(picture, 3, 1)]
    assert pixels == {"boxes": [[False, False]] * 3, "masks": [[False, False], [True, True], [True, True]]}


def test_series():
    rows = [{"epoch": 3, "a": 1}, {"epoch": 4}, {"epoch": 5, "a": [7, 8]}, {"epoch": 6, "a": "x"}, {"epoch": 7, "a": [1]}]
    assert series(rows, "a") == ([3], [1])
    assert series(rows, "a", 1) == ([5], [8])
    assert series([*rows, {"epoch": 8, "a": {"pq": 0.5}}, {"epoch": 9, "a": {"sq": 1}}], "a", "pq") == ([8], [0.5])
    assert len(COCO_NUMBERS) == 12 and COCO_NUMBERS[8] == "AR100"


def test_going_back_replaces_later_epochs(tmp_path):
    log = write(tmp_path / "log.txt", [epoch(i, turn=1) for i in range(5)] + [epoch(i, turn=2) for i in (2, 3)])
    assert [(row["epoch"], row["turn"]) for row in read_log(log)] == [(0, 1), (1, 1), (2, 2), (3, 2)]


@pytest.mark.parametrize("ending, message", [
    ('\n{"epoch": 2, "train_lo', r"log.txt, line 3: no complete JSON object .*; if the program was stopped.*delete"),
    ('\n[1, 2]\n', r'log.txt, line 3: it is no JSON object with an "epoch"'),
    ('\n\n{"train_loss": 1}\n', r'log.txt, line 4: it is no JSON object with an "epoch"'),
])
def test_logs_that_are_not_right(tmp_path, ending, message):
    log, out = write(tmp_path / "log.txt", [epoch(0), epoch(1)], ending), tmp_path / "curves.png"
    with pytest.raises(ValueError, match=message):
        draw_curves(log, out)
    assert not out.exists()


def test_an_empty_log(tmp_path):
    with pytest.raises(ValueError, match="log.txt: there is no epoch in it"):
        draw_curves(write(tmp_path / "log.txt", [], ""), tmp_path / "curves.png")


def test_curves_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "curves.png"
    out.write_bytes(b"old")

    def savefig(self, file, **_):
        file.write(b"half")
        raise OSError("no space left")
    monkeypatch.setattr(visualize.Figure, "savefig", savefig)
    with pytest.raises(OSError, match="no space left"):
        draw_curves(write(tmp_path / "log.txt", [epoch(0)]), out)
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "log.txt"]
