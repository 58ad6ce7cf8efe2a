"""Pictures for people: detections, masks and panoptic maps drawn on images, sheets that compare them with the ground
truth, learning curves."""
from __future__ import annotations

import colorsys
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

from .checkpoint import write_whole
from .structures import Rle

COCO_NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""The twelve numbers of COCO's evaluation in pycocotools' order: precision, then recall with 1, 10 and 100 detections
an image; s, m, l are small, medium and large objects."""

OPACITY = 0.45                                      # of masks; things of panoptic maps have more of it
THING_OPACITY = 0.65
SMALLEST_NAMED = 2                                  # times the pixels of its name has a segment that is named

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]               # left, top, right, bottom in pixels, right and bottom left out
Masks = Tensor | Sequence[Rle]
"""bool or uint8 ``[n, H, W]`` or ``[n, 1, H, W]``, or n run-length codes, which are decoded one by one."""


# Colours, letters, pictures.

SAFE: tuple[Colour, ...] = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (86, 180, 233), (240, 228, 66),
                            (204, 121, 167))
"""Seven colours that people who see fewer colours tell apart, too (Okabe and Ito, 2008)."""


def class_colour(label: int) -> Colour:
    """RGB of a class, the same in every picture. Seven are safe for all eyes. Of the others, steps of the golden ratio
    around the colour wheel keep near labels far apart, and every eight labels the shade changes too."""
    if label < len(SAFE):
        return SAFE[label]
    saturation, value = ((0.8, 1.0), (0.5, 0.95), (0.95, 0.75))[label // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + label * 0.6180340) % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever contrasts more (WCAG 2: at least 4.5 to 1 on any colour)."""
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along, ``size`` pixels high."""
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(str(file), size)


def class_name(label: int, names: Mapping[int, str] | Sequence[str]) -> str:
    """The name of ``label``, or "label 12" where there is none."""
    known = label in names if isinstance(names, Mapping) else 0 <= label < len(names)
    return names[label] if known else f"label {label}"


def viewable(image: Image.Image | Tensor) -> Image.Image:
    """RGB for any picture: PIL, or uint8 ``[C, H, W]``, of which the first three channels are red, green and blue, or
    the first alone is grey where there are fewer."""
    if isinstance(image, Tensor):
        shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        return Image.fromarray(shown.permute(1, 2, 0).contiguous().cpu().numpy())
    return image if image.mode == "RGB" else image.convert("RGB")


def enlarged(image: Image.Image | Tensor, min_side: int) -> tuple[Image.Image, int]:
    """A ``viewable`` copy, and how many times as large it is: by the least whole number with which its short side has at
    least ``min_side`` pixels, so that captions can be read; 0 keeps the size."""
    picture = viewable(image)
    factor = max(1, math.ceil(min_side / min(picture.size)))
    width, height = (side * factor for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC) if factor > 1 else picture.copy(), factor


def median_side(boxes_xyxy: Tensor) -> float:
    """The middle one of the shorter sides of boxes ``[n, 4]``; infinite where there is none."""
    return float((boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).amin(1).median()) if len(boxes_xyxy) else math.inf


def line_width(size: tuple[int, int], typical: float = math.inf) -> int:
    """Of boxes on a picture of ``size`` whose objects have ``typical`` sides, in pixels."""
    return round(min(max(1.0, min(size) / 160), 8.0, max(1.0, typical / 16)))


def caption_font(size: tuple[int, int], typical: float = math.inf) -> ImageFont.FreeTypeFont:
    """For captions on a picture of ``size`` whose objects have ``typical`` sides, in pixels."""
    return font(round(min(max(10.0, min(size) / 32), 40.0, max(10.0, typical / 3))))


# Detections on an image.

def draw_detections(image: Image.Image | Tensor, boxes_xyxy: Tensor, labels: Tensor,
                    names: Mapping[int, str] | Sequence[str], scores: Tensor | None = None,
                    min_side: int = 256, masks: Masks | None = None) -> Image.Image:
    """A ``viewable`` copy of ``image`` with a box in its class's colour and a caption for each object: "ring 0.87".

    ``boxes_xyxy [n, 4]`` are corners in pixels of ``image``, may reach over its edges, and are left out where nothing of
    them is within it; ``labels [n]``; ``names`` gives names for labels; ``scores [n]`` where there are some. ``masks``
    of the objects, in pixels of ``image``, lie under all boxes, see ``draw_masks``. ``min_side``: see ``enlarged``.
    """
    if boxes_xyxy.shape != (len(labels), 4) or (scores is not None and len(scores) != len(labels)):
        raise ValueError(f"boxes_xyxy {list(boxes_xyxy.shape)}, labels {list(labels.shape)}, scores "
                         f"{scores if scores is None else list(scores.shape)}: [n, 4], [n] and [n] are needed")
    scored = scores.tolist() if scores is not None else [None] * len(labels)
    order = list(range(len(labels))) if scores is None else scores.argsort(stable=True).tolist()    # the surest on top
    if masks is None:
        picture, factor = enlarged(image, min_side)
    else:
        if len(masks) != len(labels):
            raise ValueError(f"{len(masks)} masks and {len(labels)} labels: one mask for each object is needed")
        some = masks[order] if isinstance(masks, Tensor) else [masks[k] for k in order]
        picture = draw_masks(image, some, labels[order], min_side)
        factor = picture.width // viewable(image).width
    width, height = picture.size
    typical = median_side(boxes_xyxy * factor)                  # small objects get thin lines and small letters
    draw = ImageDraw.Draw(picture)
    line, letters = line_width(picture.size, typical), caption_font(picture.size, typical)

    corners, classes = (boxes_xyxy * factor).round().int().tolist(), labels.tolist()
    objects = [(corners[k], classes[k], scored[k]) for k in order
               if overlap(_at_least_a_pixel(corners[k]), (0, 0, width, height))]
    boxes = [_at_least_a_pixel(box) for box, _, _ in objects]
    for (left, top, right, bottom), (_, label, _) in zip(boxes, objects):
        if line > 1:                                                                    # visible on any ground
            draw.rectangle((left - 1, top - 1, right, bottom), outline=(0, 0, 0))
        draw.rectangle((left, top, right - 1, bottom - 1), outline=class_colour(label), width=line)

    captions: list[Rectangle] = []
    for box, (_, label, score) in reversed(list(zip(boxes, objects))):                  # the surest choose their place
        ending = "" if score is None else f" {score:.2f}"
        text = shorten(class_name(label, names), ending, letters, width - 2 * line - 2)
        size = math.ceil(letters.getlength(text)) + 2 * line + 2, sum(letters.getmetrics()) + 1
        place = place_caption(size, box, (width, height), captions, boxes)
        captions.append(place)
        background = class_colour(label)
        draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=background)
        draw.text((place[0] + line + 1, place[1]), text, text_colour(background), letters)
    return picture


def _at_least_a_pixel(box: Sequence[int]) -> Rectangle:
    left, top, right, bottom = box
    return left, top, max(right, left + 1), max(bottom, top + 1)


def shorten(name: str, ending: str, letters: ImageFont.FreeTypeFont, width: int) -> str:
    """``name`` and ``ending``, the name cut with an ellipsis where both together are longer than ``width`` pixels."""
    text = name + ending
    while letters.getlength(text) > width and name:
        name = name[:-1]
        text = f"{name.rstrip()}…{ending}"
    return text


def overlap(a: Rectangle, b: Rectangle) -> int:
    """Pixels that two rectangles share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def place_caption(size: tuple[int, int], box: Rectangle, image_size: tuple[int, int], captions: Iterable[Rectangle],
                  boxes: Iterable[Rectangle]) -> Rectangle:
    """Where a caption of ``size`` (width, height) stands: within the image, at that corner of its ``box`` where little
    of the other captions and of the objects is hidden; if possible above it on the left, where people look first."""
    width, height = size
    left, top, right, bottom = box
    best, least = box, math.inf
    for y, unusual in ((top - height, 0.0), (top, 0.1), (bottom, 0.15), (bottom - height, 0.25)):
        for x, as_unusual in ((left, 0.0), (right - width, 0.05)):
            x0, y0 = max(0, min(x, image_size[0] - width)), max(0, min(y, image_size[1] - height))
            place = (x0, y0, x0 + width, y0 + height)
            cost = unusual + as_unusual + 5 * sum(hidden(caption, place) for caption in captions) \
                + sum(hidden(other, place) for other in boxes)
            if cost < least:
                best, least = place, cost
    return best


def hidden(rectangle: Rectangle, by: Rectangle) -> float:
    """How much of ``rectangle`` lies under ``by``: 0..1."""
    left, top, right, bottom = rectangle
    return overlap(rectangle, by) / ((right - left) * (bottom - top))


# Masks and panoptic maps on an image.

def draw_masks(image: Image.Image | Tensor, masks: Masks, labels: Tensor, min_side: int = 256) -> Image.Image:
    """A ``viewable`` copy of ``image`` with each object's mask in its class's colour, half transparent with an opaque
    outline; later ones lie over earlier ones. ``labels [n]``; ``min_side``: see ``enlarged``."""
    picture, factor = enlarged(image, min_side)
    if len(masks) != len(labels):
        raise ValueError(f"{len(masks)} masks and {len(labels)} labels: one mask for each object is needed")
    size = picture.height // factor, picture.width // factor
    pixels, line = np.array(picture), (line_width(picture.size) + 1) // 2
    for k, (mask, label) in enumerate(zip(masks, labels.tolist())):
        inside = as_array(mask)
        if inside.shape != size:
            raise ValueError(f"masks[{k}] is {list(inside.shape)} and the image {list(size)}: masks of the image's "
                             f"height and width are needed")
        window = ndimage.find_objects(inside.view(np.uint8))
        if window:                                                                      # else the mask is empty
            inside = inside[window[0]].repeat(factor, 0).repeat(factor, 1)
            place = pixels[tuple(slice(side.start * factor, side.stop * factor) for side in window[0])]
            colour = np.array(class_colour(label))
            place[inside] = np.rint(place[inside] * (1 - OPACITY) + colour * OPACITY)
            place[inside & ~ndimage.binary_erosion(inside, iterations=line)] = colour
    return Image.fromarray(pixels)


def as_array(mask: Tensor | Rle) -> np.ndarray:
    """A mask of ``Masks`` as bool ``[H, W]``."""
    if isinstance(mask, Tensor):
        return (mask[0] if mask.dim() == 3 else mask).bool().cpu().numpy()
    from pycocotools import mask as coco_mask
    return coco_mask.decode(mask).astype(bool)


def thing_colour(label: int, number: int) -> Colour:
    """RGB of thing ``number`` of its class, counted from 0: the class's, then others of nearly its hue."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in class_colour(label)))
    hue += 0.16 * ((0.5 + number * 0.6180340) % 1 - 0.5)
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value * (1, 0.62, 0.85, 0.72)[number % 4])
    return round(red * 255), round(green * 255), round(blue * 255)


def stuff_colour(label: int) -> Colour:
    """RGB of a class of stuff: its colour, greyed, so that things stand out."""
    red, green, blue = ((c + 150) // 2 for c in class_colour(label))
    return red, green, blue


def draw_panoptic(image: Image.Image | Tensor, ids: np.ndarray | Tensor | bytes,
                  segments_info: Sequence[Mapping[str, Any]], names: Mapping[int, str] | Sequence[str],
                  min_side: int = 256) -> Image.Image:
    """A ``viewable`` copy of ``image`` with the segments of a panoptic map in colours, things apart from each other and
    stuff by class, their borders, and the names of those that are large enough.

    ``ids [H, W]`` of the image's size, or a PNG whose colours are R + 256 G + 256^2 B; ``segments_info`` has the ``id``,
    ``category_id`` and ``isthing`` of each segment, and ``names`` the name of each ``category_id``. Pixels of other ids
    are void and stay as they are. ``min_side``: see ``enlarged``.
    """
    picture, factor = enlarged(image, min_side)
    of_pixels, size = as_ids(ids), (picture.height // factor, picture.width // factor)
    if of_pixels.shape != size:
        raise ValueError(f"ids are {list(of_pixels.shape)} and the image {list(size)}: a map of the image's height and "
                         f"width is needed")
    values, places = np.unique(of_pixels, return_inverse=True)
    number = {segment["id"]: n for n, segment in enumerate(segments_info, start=1)}
    numbers = np.array([number.get(value, 0) for value in values.tolist()])[places].reshape(of_pixels.shape)

    colours: list[Colour] = [(0, 0, 0)]
    before: dict[int, int] = {}                                                         # things of each class
    for segment in segments_info:
        label = segment["category_id"]
        colours.append(thing_colour(label, before.get(label, 0)) if segment["isthing"] else stuff_colour(label))
        before[label] = before.get(label, 0) + 1
    opacity = np.array([0.0] + [THING_OPACITY if segment["isthing"] else OPACITY for segment in segments_info])
    large = numbers.repeat(factor, 0).repeat(factor, 1)
    weight = opacity[large][..., None]
    pixels = np.rint(np.array(picture) * (1 - weight) + np.array(colours)[large] * weight).astype(np.uint8)
    pixels[borders(large, (line_width(picture.size) + 1) // 2)] = 255
    picture = Image.fromarray(pixels)
    name_segments(picture, large, [class_name(segment["category_id"], names) for segment in segments_info], colours[1:])
    return picture


def as_ids(ids: np.ndarray | Tensor | bytes) -> np.ndarray:
    """Ids of pixels ``[H, W]``."""
    if isinstance(ids, bytes):
        with Image.open(io.BytesIO(ids)) as png:
            return np.asarray(png.convert("RGB")).astype(np.int64) @ (1, 256, 65536)
    return ids.cpu().numpy() if isinstance(ids, Tensor) else ids


def borders(numbers: np.ndarray, line: int) -> np.ndarray:
    """Pixels of the lines between different numbers ``[H, W]``, about ``line`` wide: bool ``[H, W]``."""
    found = np.zeros(numbers.shape, bool)
    for shift in range(1, line + 1):
        found[:, shift:] |= numbers[:, shift:] != numbers[:, :-shift]
        found[shift:] |= numbers[shift:] != numbers[:-shift]
    return found


def name_segments(picture: Image.Image, numbers: np.ndarray, names: Sequence[str], colours: Sequence[Colour]) -> None:
    """Write on ``picture``, in place, the names of the segments, where each is widest and the names of larger ones leave
    room: ``numbers [H, W]`` from 1, 0 has no name. Segments that a name would hide stay without."""
    draw, letters = ImageDraw.Draw(picture), caption_font(picture.size)
    step = max(1, min(picture.size) // 200)                         # where a name stands need not be known to the pixel
    coarse = numbers[::step, ::step]
    free = np.ones(coarse.shape, bool)
    areas = np.bincount(numbers.ravel(), minlength=len(names) + 1)[1:]
    windows = ndimage.find_objects(coarse, max_label=len(names))
    captions: list[Rectangle] = []
    for k in np.argsort(-areas, kind="stable").tolist():
        width, height = math.ceil(letters.getlength(names[k])) + 6, sum(letters.getmetrics()) + 1
        if windows[k] is None or areas[k] < SMALLEST_NAMED * width * height or width > picture.width:
            continue
        inside = np.pad((coarse[windows[k]] == k + 1) & free[windows[k]], 1)
        depth = ndimage.distance_transform_edt(inside)
        y, x = (int(place) - 1 + side.start for place, side in zip(np.unravel_index(depth.argmax(), depth.shape),
                                                                   windows[k]))
        left = min(max(0, x * step - width // 2), picture.width - width)
        top = min(max(0, y * step - height // 2), picture.height - height)
        place = left, top, left + width, top + height
        if depth.max() > 0 and not any(overlap(place, other) for other in captions):
            captions.append(place)
            free[top // step:place[3] // step + 1, left // step:place[2] // step + 1] = False
            draw.rectangle((left, top, place[2] - 1, place[3] - 1), fill=colours[k])
            draw.text((left + 3, top), names[k], text_colour(colours[k]), letters)


# Sheets.

def side_by_side(rows: Sequence[tuple[Image.Image, Image.Image]], titles: tuple[str, str],
                 captions: Sequence[str] = (), pairs_across: int = 2) -> Image.Image:
    """A sheet of pairs of pictures, ``pairs_across`` of them in a line, below their two ``titles``; ``captions``, one a
    pair, stand under the pictures. Pictures keep their size and may have different ones."""
    if not rows or len(captions) not in (0, len(rows)):
        raise ValueError(f"{len(rows)} pairs of pictures and {len(captions)} captions: at least one pair is needed, "
                         f"and a caption for each or for none")
    across = min(pairs_across, len(rows))
    cell = max(picture.width for pair in rows for picture in pair)
    bold, small = font(min(max(13, cell // 20), 30), bold=True), font(min(max(11, cell // 30), 22))
    inner, outer = max(8, cell // 40), max(24, cell // 12)              # gaps within a pair and around pairs
    below = sum(small.getmetrics()) + inner // 2 if captions else 0
    lines = [rows[i:i + across] for i in range(0, len(rows), across)]
    heights = [max(picture.height for pair in line for picture in pair) for line in lines]
    top = outer // 2 + sum(bold.getmetrics()) + inner
    sheet = Image.new("RGB", (outer + across * (2 * cell + inner + outer),
                              top + sum(heights) + len(lines) * below + (len(lines) - 1) * (outer // 2) + outer // 2),
                      (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i in range(across):
        for j, title in enumerate(titles):
            middle = outer + i * (2 * cell + inner + outer) + j * (cell + inner) + cell / 2
            draw.text((middle, outer // 2), title, (40, 40, 40), bold, anchor="ma")
    for number, (line, height) in enumerate(zip(lines, heights)):
        for i, pair in enumerate(line):
            left = outer + i * (2 * cell + inner + outer)
            for j, picture in enumerate(pair):
                sheet.paste(picture, (left + j * (cell + inner) + (cell - picture.width) // 2,
                                      top + (height - picture.height) // 2))
            if captions:
                draw.text((left + cell + inner / 2, top + height + inner // 2), captions[number * across + i],
                          (110, 110, 110), small, anchor="ma")
        top += height + below + outer // 2
    return sheet


# Learning curves.

BLUE, ORANGE, GREEN, GREY, BLACK = "#2f6db5", "#dd7a2c", "#3a9a63", "#9a9a9a", "#222222"
PURPLE, RED = "#7d4bb8", "#c43a5e"                  # of masks and of panoptic maps


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The epochs in ``log.txt``, one JSON object a line. Where training went back to an earlier epoch, what came after
    that before is left out. Raises ValueError naming the file and the line that is not right."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no complete JSON object ({error.msg} at character {error.pos} of "
                             f"{len(line)}); if the program was stopped while it wrote, delete this line") from None
        if not isinstance(row, dict) or not isinstance(row.get("epoch"), int):
            raise ValueError(f"{path}, line {number}: it is no JSON object with an \"epoch\"; each line is one epoch's")
        rows = [earlier for earlier in rows if earlier["epoch"] < row["epoch"]] + [row]
    return rows


def draw_curves(log_file: str | Path, out: str | Path) -> None:
    """Draw ``log.txt`` as a PNG: the total loss, its parts, and the average precision, over epochs; of models with masks
    also the masks' losses, their average precision, and the panoptic quality.

    Values that an epoch does not have are gaps that lines bridge. The file appears whole or not at all. Raises
    ValueError where the log has no epoch or a line that is not right.
    """
    rows, out = read_log(log_file), Path(out)
    if not rows:
        raise ValueError(f"{log_file}: there is no epoch in it to draw")
    figure = Figure(figsize=(15, 4.4), dpi=100, facecolor="white")
    losses, parts, precision = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.045, right=0.988, top=0.86, bottom=0.125, wspace=0.16)
    draw_losses(losses, rows)
    draw_parts(parts, rows)
    draw_precision(precision, rows)
    first, last = rows[0]["epoch"], rows[-1]["epoch"]
    for axes in (losses, parts, precision):
        axes.set_xlabel("epoch", color=BLACK)
        room = 0.02 * (last - first) or 1
        axes.set_xlim(first - room, last + room)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0, labelcolor="#555555")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#bbbbbb")
        if not axes.lines:
            axes.set_yticks([])
            axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", va="center", color=GREY,
                      fontsize=13)

    write_whole(out, lambda file: figure.savefig(file, format="png"))


def series(rows: Sequence[Mapping[str, Any]], key: str,
           position: int | str | None = None) -> tuple[list[int], list[float]]:
    """Epochs and values of ``key``, or of the number at ``position`` of the list or dict there, where there is a finite
    one."""
    found = []
    for row in rows:
        value = row.get(key)
        if isinstance(position, str):
            value = value.get(position) if isinstance(value, dict) else None
        elif position is not None:
            value = value[position] if isinstance(value, list) and len(value) > position else None
        if isinstance(value, (int, float)) and math.isfinite(value):
            found.append((row["epoch"], value))
    return [epoch for epoch, _ in found], [value for _, value in found]


def plot(axes: Axes, points: tuple[list[int], list[float]], **style: Any) -> None:
    """A line, with its points marked where they are few."""
    if points[0]:
        marker = "o" if len(points[0]) <= 25 else None
        axes.plot(*points, marker=marker, markersize=3.5, solid_capstyle="round", **style)


def heading(axes: Axes, title: str, detail: str) -> None:
    """A panel's title, and below it a line of detail."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=BLACK, pad=22)
    axes.text(0, 1.025, detail, transform=axes.transAxes, fontsize=9.5, color="#666666")


def draw_losses(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The total loss of training and validation over epochs."""
    training, test = series(rows, "train_loss"), series(rows, "test_loss")
    plot(axes, training, color=BLUE, linewidth=2, label="training")
    plot(axes, test, color=ORANGE, linewidth=2, linestyle="--", label="validation")
    both = (("training", training), ("validation", test))
    now = [f"{name} {values[-1]:.4g}" for name, (_, values) in both if values]
    heading(axes, "Total loss", "last: " + ", ".join(now) if now else "no losses in the log")
    axes.set_ylabel("weighted sum over all layers", color=BLACK)
    if axes.lines:
        axes.legend(loc="upper right", frameon=False)


def draw_parts(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The last layer's losses, those of masks where there are some, in logarithmic scale."""
    handles = []
    for key, name, colour in (("ce", "class", BLUE), ("giou", "box GIoU", GREEN), ("bbox", "box L1", ORANGE),
                              ("mask", "mask focal", PURPLE), ("dice", "mask dice", RED)):
        training, test = series(rows, f"train_loss_{key}"), series(rows, f"test_loss_{key}")
        if training[0] or test[0]:
            plot(axes, training, color=colour, linewidth=1.8)
            plot(axes, test, color=colour, linewidth=1.8, linestyle="--")
            handles.append(Line2D([], [], color=colour, linewidth=3, label=name))
    heading(axes, "Parts of the loss", "last layer, weighted; solid: training, dashed: validation")
    axes.set_ylabel("loss", color=BLACK)
    values = [value for line in axes.lines for value in line.get_ydata()]
    if values and min(values) > 0:                          # the parts differ by an order of magnitude
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        room = 1.6 if len(handles) <= 3 else max(2.0, (max(values) / min(values)) ** 0.2)         # for the legend
        axes.set_ylim(min(values) / 1.2, max(values) * room)
    if handles:
        axes.legend(handles=handles, loc="upper right", frameon=False, ncols=3, columnspacing=1.2, handlelength=1.2)


def draw_precision(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """AP of boxes, and where there are masks and panoptic maps their AP and PQ, over epochs."""
    with_masks = any("test_coco_eval_masks" in row or "test_PQ_all" in row for row in rows)
    boxes, of_boxes = "test_coco_eval_bbox", "box " * with_masks
    curves: tuple[tuple[str, str, int | str, dict[str, Any]], ...] = (
        (f"{of_boxes}AP", boxes, COCO_NUMBERS.index("AP"), dict(color=BLACK, linewidth=2.4, zorder=3)),
        (f"{of_boxes}AP50", boxes, COCO_NUMBERS.index("AP50"), dict(color=BLUE, linewidth=1.8)),
        (f"{of_boxes}AP75", boxes, COCO_NUMBERS.index("AP75"), dict(color=ORANGE, linewidth=1.8)),
        (f"{of_boxes}AP small", boxes, COCO_NUMBERS.index("APs"), dict(color=GREY, linewidth=1, linestyle=":")),
        (f"{of_boxes}AP medium", boxes, COCO_NUMBERS.index("APm"), dict(color=GREY, linewidth=1, linestyle="--")),
        (f"{of_boxes}AP large", boxes, COCO_NUMBERS.index("APl"), dict(color=GREY, linewidth=1)),
        ("mask AP", "test_coco_eval_masks", COCO_NUMBERS.index("AP"), dict(color=PURPLE, linewidth=2.4, zorder=3)),
        ("PQ", "test_PQ_all", "pq", dict(color=RED, linewidth=2.4, zorder=3)),
        ("PQ things", "test_PQ_th", "pq", dict(color=RED, linewidth=1, linestyle="--")),
        ("PQ stuff", "test_PQ_st", "pq", dict(color=RED, linewidth=1, linestyle=":")))
    now, detail = [], "no evaluation yet"
    for name, key, position, style in curves:
        epochs, values = series(rows, key, position)
        measured = [(epoch, value) for epoch, value in zip(epochs, values) if value >= 0]       # -1: no such objects
        if not measured:
            continue
        epochs, values = map(list, zip(*measured))
        plot(axes, (epochs, values), label=name, **style)
        if name == "AP":
            best = max(values)
            detail = f"last {values[-1]:.3f} (epoch {epochs[-1]}), best {best:.3f} (epoch {epochs[values.index(best)]})"
        elif "zorder" in style:
            now.append(f"{name} {values[-1]:.3f}")
            detail = f"last: {', '.join(now)} (epoch {epochs[-1]})"
    title = "AP and PQ" if any("test_PQ_all" in row for row in rows) else "Average precision"
    heading(axes, f"{title} on the validation images", detail)
    axes.set_ylabel("AP, PQ" if title == "AP and PQ" else "AP", color=BLACK)
    if axes.lines:
        top = max(value for line in axes.lines for value in line.get_ydata())
        low = top < 0.7 or with_masks
        axes.set_ylim(0, max(0.05, top * 1.5) if with_masks else min(1.0, max(0.05, top * 1.3)))
        if axes.get_ylim()[1] > 1:
            axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1])              # above is the legend alone
        axes.legend(loc="upper left" if low else "lower right", frameon=False, columnspacing=1.2,
                    **dict(ncols=3, handlelength=1.5) if with_masks else dict(ncols=2))
