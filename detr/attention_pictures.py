"""Attention as pictures: heat maps and sampling points over an image, a query's heads and layers on one sheet, the path
of its box. What is drawn comes from ``attention_maps``."""
from __future__ import annotations

import math

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .attention_maps import DeformableAttention, DenseAttention, Explanation
from .visualize import caption_font, enlarged, font, line_width, text_colour

Colour = tuple[int, int, int]

LEVELS: tuple[tuple[Colour, int, int], ...] = (     # colour (Okabe and Ito, 2008), corners (0: round), turn in degrees
    ((230, 159, 0), 0, 0), ((86, 180, 233), 4, 45), ((0, 158, 115), 3, -90), ((240, 228, 66), 4, 0),
    ((213, 94, 0), 5, -90), ((204, 121, 167), 6, 0))
BOX: Colour = (255, 255, 255)
SMALLEST = 256                                          # pixels of the short side of a picture of its own


def heat_over(image: Image.Image | Tensor, heat: Tensor, box_xyxy: Tensor | None = None, opacity: float = 0.75,
              most: float | None = None, min_side: int = SMALLEST) -> Image.Image:
    """The image in grey, and over it ``heat [H, W]``, whose cells are that many equal parts of the image.

    Nothing is transparent, ``most``, by default the largest value, bright yellow (matplotlib's inferno, which also grows
    lighter step by step, for eyes that see no colours); values between cell centres are interpolated. ``box_xyxy [4]``
    in pixels of ``image`` is outlined. ``opacity`` of the largest value, 0 to 1; ``min_side``: see ``enlarged``. Raises
    ValueError for heat that is no map of finite numbers, and TypeError for what is no picture.
    """
    if not isinstance(image, (Image.Image, Tensor)):
        raise TypeError(f"heat_over: the picture is a {type(image).__name__}; give a PIL image, such as "
                        f"Image.open(path), or a uint8 tensor [C, H, W]")
    if heat.ndim != 2 or not heat.numel() or not heat.isfinite().all():
        raise ValueError(f"heat {list(heat.shape)}: a map [H, W] of finite numbers is needed")
    picture, factor = enlarged(image, min_side)
    top = float(heat.max()) if most is None else most
    share = (heat / top if top > 0 else torch.zeros_like(heat)).clamp(0, 1).float().cpu().numpy()
    share = np.asarray(Image.fromarray(share).resize(picture.size, Image.Resampling.BILINEAR))[..., None]
    colour = matplotlib.colormaps["inferno"](share[..., 0])[..., :3] * 255
    ground = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float64)
    cover = np.sqrt(share) * opacity                            # faint heat stays visible
    drawn = Image.fromarray((ground * (1 - cover) + colour * cover).round().astype(np.uint8))
    if box_xyxy is not None:
        outline(ImageDraw.Draw(drawn), box_xyxy * factor, BOX, line_width(drawn.size))
    return drawn


def draw_points(image: Image.Image | Tensor, attention: DeformableAttention, query: int, head: int | None = None,
                box_xyxy: Tensor | None = None, min_side: int = SMALLEST) -> Image.Image:
    """Where deformable attention takes its samples for a query: a mark a point, whose area is its weight, and whose
    colour and shape its level, named on a strip below. Of one head, or of all. Points beyond the edges of the image are
    left out and counted on the strip."""
    points, weights = attention.points[query], attention.weights[query]                     # [M, L, P, (2)]
    if head is not None:
        points, weights = points[head][None], weights[head][None]
    picture, factor = enlarged(image, min_side)
    ground = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size), 0.25)
    drawn = ground.copy()
    draw, line = ImageDraw.Draw(drawn, "RGBA"), line_width(picture.size)
    if box_xyxy is not None:
        outline(draw, box_xyxy * factor, BOX, line)
    most, radius, outside = float(weights.max()), min(picture.size) / 36, 0
    order = weights.flatten().argsort(descending=True).tolist()                             # small ones on top
    levels = torch.arange(points.shape[1])[:, None].expand(points.shape[1:3]).expand(points.shape[:3]).flatten().tolist()
    for i in order:
        x, y = (points.flatten(0, 2)[i] * factor).tolist()
        if not (0 <= x <= picture.width and 0 <= y <= picture.height):
            outside += 1
            continue
        mark(draw, x, y, max(1.5, radius * math.sqrt(float(weights.flatten()[i]) / most)), levels[i])
    return with_strip(drawn, [(level, f"{h}x{w}") for level, (h, w) in enumerate(attention.shapes)],
                      f"{outside} outside" if outside else "")


def draw_path(image: Image.Image | Tensor, path_xyxy: Tensor, start: bool = True,
              min_side: int = SMALLEST) -> Image.Image:
    """How a query's box moved, ``path_xyxy [K, 4]`` in pixels of ``image``: one outline a layer, from dark to bright
    (viridis) and numbered by decoder layer from 1. Of more than one box, the first is dashed and 0 where it is the one
    that the query ``start``\\ ed from, as ``Explanation.path`` has it for models whose queries start from boxes."""
    picture, factor = enlarged(image, min_side)
    ground = picture.convert("L").convert("RGB")
    draw, line = ImageDraw.Draw(ground), line_width(picture.size)
    letters, count = caption_font(ground.size), len(path_xyxy)
    first = 0 if start and count > 1 else 1
    colours = [as_colour(matplotlib.colormaps["viridis"](0.25 + 0.75 * k / max(1, count - 1))[:3]) for k in range(count)]
    boxes = path_xyxy * factor
    for k, (box, colour) in enumerate(zip(boxes, colours)):
        outline(draw, box, colour, line, dashed=k == 0 and first == 0)
    taken: list[tuple[int, int, int, int]] = []
    for k, (box, colour) in enumerate(zip(boxes, colours)):
        text = str(k + first)
        width, height = math.ceil(letters.getlength(text)) + 4, sum(letters.getmetrics()) + 1
        x = int(min(max(float(box[0]), 0), ground.width - width))
        y = int(min(max(float(box[1]) - height, 0), ground.height - height))
        while any(abs(x - other[0]) < width and abs(y - other[1]) < height for other in taken) \
                and x + 2 * width <= ground.width:
            x += width + 1
        taken.append((x, y, width, height))
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        draw.text((x + 2, y), text, text_colour(colour), letters)
    return ground


def attention_sheet(image: Image.Image | Tensor, seen: Explanation, query: int, min_side: int = 160) -> Image.Image:
    """All that one query looked at: a row for each decoder layer; the average of its heads, then each of them, named as
    ``heat`` takes them; under each map its largest weight, which is what its brightest cell stands for."""
    path = seen.path(query)
    before = len(path) - len(seen.decoder)
    rows = []
    for layer in range(len(seen.decoder)):
        attention: DenseAttention | DeformableAttention = seen.decoder[layer]
        heads = attention.weights.shape[1] if isinstance(attention, DeformableAttention) else len(attention.query)
        tiles = []
        for head in (None, *range(heads)):
            heat = attention.heat(query, head)
            tiles.append((heat_over(image, heat, path[layer + before], min_side=min_side),
                          "average" if head is None else f"head={head}", float(heat.max())))
        rows.append(tiles)
    tile_width, tile_height = rows[0][0][0].size
    size = max(13, tile_width // 14)
    letters, small, margin, line = font(size, bold=True), font(size), size // 2 + 2, round(size * 1.5)
    columns = len(rows[0])
    sheet = Image.new("RGB", (margin + columns * (tile_width + margin), len(rows) * (2 * line + tile_height + margin)),
                      (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, tiles in enumerate(rows):
        top = i * (2 * line + tile_height + margin)
        draw.text((margin, top + 2), f"query={query}, layer={i}", (0, 0, 0), letters)
        for j, (tile, name, most) in enumerate(tiles):
            left = margin + j * (tile_width + margin)
            sheet.paste(tile, (left, top + line))
            draw.text((left, top + line + tile_height + 2), f"{name}, up to {most:.2g}", (60, 60, 60), small)
    return sheet


def as_colour(rgb: tuple[float, ...] | np.ndarray) -> Colour:
    """0..1 -> 0..255."""
    red, green, blue = (round(float(c) * 255) for c in rgb)
    return red, green, blue


def outline(draw: ImageDraw.ImageDraw, box_xyxy: Tensor, colour: Colour, line: int, dashed: bool = False) -> None:
    """A box with a dark seam, which shows on any ground."""
    left, top, right, bottom = box_xyxy.round().int().tolist()
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    if not dashed:
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0), width=line + 2)
        draw.rectangle((left, top, right, bottom), outline=colour, width=line)
        return
    for a, b in (((left, top), (right, top)), ((right, top), (right, bottom)), ((right, bottom), (left, bottom)),
                 ((left, bottom), (left, top))):
        steps = max(1, round(math.dist(a, b) / (6 * line)))
        for k in range(steps):
            x0, y0, x1, y1 = (a[i] + (b[i] - a[i]) * (k + part) / steps for part in (0, 0.5) for i in (0, 1))
            draw.line((x0, y0, x1, y1), fill=(0, 0, 0), width=line + 2)
            draw.line((x0, y0, x1, y1), fill=colour, width=line)


def mark(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, level: int) -> None:
    """A point of a level."""
    colour, corners, turn = LEVELS[level % len(LEVELS)]
    if corners:
        draw.regular_polygon((x, y, radius * 1.2), corners, rotation=turn, fill=(*colour, 170), outline=(0, 0, 0))
    else:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*colour, 170), outline=(0, 0, 0))


def with_strip(picture: Image.Image, levels: list[tuple[int, str]], note: str) -> Image.Image:
    """A picture with a legend of levels below it, in as many rows as it needs."""
    letters = font(min(max(12, round(min(picture.size) / 26)), 32))
    height = sum(letters.getmetrics()) + 6
    entries = [(level, text, math.ceil(letters.getlength(text)) + 2 * height) for level, text in levels]
    rows: list[list[tuple[int, str, int]]] = [[]]
    for entry in [*entries, *([(-1, note, math.ceil(letters.getlength(note)))] if note else [])]:
        if rows[-1] and sum(e[2] for e in rows[-1]) + entry[2] > picture.width:
            rows.append([])
        rows[-1].append(entry)
    out = Image.new("RGB", (picture.width, picture.height + height * len(rows)), (255, 255, 255))
    out.paste(picture)
    draw = ImageDraw.Draw(out, "RGBA")
    for i, row in enumerate(rows):
        x, y = 4, picture.height + i * height
        for level, text, width in row:
            if level >= 0:
                mark(draw, x + height / 2, y + height / 2, height / 3.2, level)
            draw.text((x + (height if level >= 0 else 0), y + 2), text, (0, 0, 0), letters)
            x += width
    return out
