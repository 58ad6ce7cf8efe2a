"""Where detections go: COCO's json, YOLO's text files, CSV, video. Each writes what it is given at once, to a file that
takes its name when it is whole."""
from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import yaml
from PIL import Image

from .checkpoint import partial_of
from .sources import Clip, Item, pyav
from .structures import Category

Row = Mapping[str, Any]
"""Of an image ``id``, ``file_name``, ``width``, ``height``; of a detection ``category_id``, ``category_name``, ``bbox``
(left, top, width, height in pixels) and ``score``."""

COLUMNS = ("file_name", "frame", "seconds", "image_width", "image_height", "category_id", "class", "score",
           "xmin", "ymin", "xmax", "ymax")
FINE = Fraction(1, 60000)             # seconds; the ticks of MPEG-4 part 2 are no finer than 1/65535
FULL_COLOURS, BT601, BT709 = "yuv444p", 5, 1                    # the numbers are those of ITU-T H.273


class Names:
    """Names for what is written: one's own, numbered where it is taken. Upper and lower case are the same to some
    systems. Frames of a clip are numbered in a folder of its name."""

    def __init__(self, *taken: str) -> None:
        self.taken, self.clips = {name.lower() for name in taken}, dict[str, str]()
        self.next: dict[str, int] = {}

    def unique(self, stem: str, ending: str) -> str:
        name, number = stem + ending, self.next.get((stem + ending).lower(), 2)
        while name.lower() in self.taken:
            name, number = f"{stem}-{number}{ending}", number + 1
        self.next[(stem + ending).lower()] = number
        self.taken.add(name.lower())
        return name

    def of(self, item: Item, ending: str = "") -> str:
        """Of a picture: ``.jpg`` where the image is one, otherwise ``.png``, or ``ending``; of a frame ``.jpg``."""
        if item.clip is not None:
            if item.clip.name not in self.clips:
                self.clips[item.clip.name] = self.unique(stem_of(item.clip.name), "")
            return f"{self.clips[item.clip.name]}/{item.frame:06}{ending or '.jpg'}"
        own = ".jpg" if item.name.lower().endswith((".jpg", ".jpeg")) else ".png"
        return self.unique(stem_of(item.name), ending or own)


def stem_of(name: str) -> str:
    """The file's name alone, without ending; of addresses and devices what file names allow."""
    stem = Path(name.replace("\\", "/")).stem if "://" not in name else name
    kept = "".join(letter if letter.isprintable() and letter not in '<>:"/\\|?*' else "_" for letter in stem)
    return kept.encode()[:160].decode(errors="ignore") or "image"            # a partial file's has more


class Partial:
    """A file under another name until it is whole; what a killed process leaves of it, ``checkpoint.remove_partials``
    finds."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, partial_of(path)
        path.parent.mkdir(parents=True, exist_ok=True)

    def open(self, **words: Any) -> TextIO:
        return open(self.partial, "w+", encoding="utf-8", **words)

    def finish(self) -> None:
        os.replace(self.partial, self.path)

    def discard(self) -> None:
        self.partial.unlink(missing_ok=True)


class CocoJson:
    """``predictions.json`` or ``panoptic.json``: info, images, categories, annotations, a row a line."""

    def __init__(self, path: Path, info: Row, categories: Sequence[Row]) -> None:
        self.whole, self.info, self.categories = Partial(path), info, categories
        self.parts = {name: Partial(path.with_name(f"{path.stem}.{name}")) for name in ("images", "annotations")}
        self.files = {name: part.open() for name, part in self.parts.items()}
        self.counts = dict.fromkeys(self.parts, 0)

    def add(self, image: Row, annotations: Sequence[Row]) -> None:
        for name, rows in (("images", [image]), ("annotations", annotations)):
            for row in rows:
                self.files[name].write(",\n" * (self.counts[name] > 0) + "  " + json.dumps(row))
                self.counts[name] += 1

    def close(self) -> None:
        with self.whole.open() as out:
            out.write(f'{{\n "info": {json.dumps(self.info)}')
            for name in ("images", "categories", "annotations"):
                out.write(f',\n "{name}": [\n')
                if name == "categories":
                    out.write(",\n".join("  " + json.dumps(row) for row in self.categories))
                else:
                    self.files[name].seek(0)
                    shutil.copyfileobj(self.files[name], out)
                out.write("\n ]")
            out.write("\n}\n")
        self.whole.finish()
        self.discard()

    def discard(self) -> None:
        for name, part in self.parts.items():
            with suppress(OSError):                                     # what is left to write, to a full disk
                self.files[name].close()
            part.discard()
        self.whole.discard()


class Csv:
    """``predictions.csv``: a header, and a row a detection, with corners in pixels. ``frame`` and ``seconds`` are empty
    where the image is not of a video."""

    def __init__(self, path: Path) -> None:
        self.whole = Partial(path)
        self.file = self.whole.open(newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerow(COLUMNS)

    def add(self, image: Row, annotations: Sequence[Row]) -> None:
        for row in annotations:
            left, top, width, height = row["bbox"]
            self.writer.writerow([image["file_name"], image.get("frame", ""), image.get("seconds", ""), image["width"],
                                  image["height"], row["category_id"], row["category_name"], f"{row['score']:.6f}",
                                  *(f"{value:.3f}" for value in (left, top, left + width, top + height))])

    def close(self) -> None:
        self.file.close()
        self.whole.finish()

    def discard(self) -> None:
        with suppress(OSError):
            self.file.close()
        self.whole.discard()


class Yolo:
    """``labels/NAME.txt`` for each image, also where nothing was found: ``class cx cy w h score`` a row, fractions of the
    image's sides; ``classes.txt`` and ``data.yaml`` name the classes, numbered from 0 in the order of the table. Boxes
    are cut at the image's borders; those that have nothing within them are left out, and counted in ``outside``."""

    def __init__(self, folder: Path, categories: Sequence[Category]) -> None:
        self.folder, self.number = folder, {category.id: k for k, category in enumerate(categories)}
        self.outside = 0
        names = [category.name for category in categories]
        (folder / "labels").mkdir(parents=True, exist_ok=True)
        (folder / "classes.txt").write_text("".join(f"{' '.join(name.split())}\n" for name in names), encoding="utf-8")
        (folder / "data.yaml").write_text(yaml.safe_dump({"names": dict(enumerate(names))}, allow_unicode=True,
                                                         sort_keys=False, width=10 ** 6), encoding="utf-8")

    def add(self, file: str, image: Row, annotations: Sequence[Row]) -> None:
        width, height = image["width"], image["height"]
        lines = []
        for row in annotations:
            x, y, w, h = row["bbox"]
            left, right = (min(max(value / width, 0.0), 1.0) for value in (x, x + w))
            top, bottom = (min(max(value / height, 0.0), 1.0) for value in (y, y + h))
            if left < right and top < bottom:
                numbers = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top, row["score"]
                lines.append(f"{self.number[row['category_id']]} {' '.join(f'{value:.6f}' for value in numbers)}\n")
        self.outside += len(annotations) - len(lines)
        path = self.folder / "labels" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")


class VideoFile:
    """Frames -> an mp4 with H.264, or MPEG-4 part 2 where PyAV has no encoder for it; each is shown when it was. Sound is
    not kept. Sizes that are odd keep their colours whole, as H.264 halves those of even sizes alone.

    ``resized`` counts frames that had another size than the first, and ``moved`` those that are shown a tick later
    than they were, since no two may have the same time."""

    def __init__(self, path: Path, clip: Clip, size: tuple[int, int], codec: str | None = None) -> None:
        av = pyav()
        self.whole, self.size, self.frames, self.last = Partial(path), size, 0, -1
        self.resized = self.moved = 0
        self.codec = codec or ("libx264" if "libx264" in av.codecs_available else "mpeg4")
        self.container = av.open(str(self.whole.partial), "w", format="mp4")
        rate = clip.rate.limit_denominator(1001)
        self.stream = self.container.add_stream(self.codec, rate=rate)
        self.stream.width, self.stream.height = size
        self.format = self.stream.pix_fmt = FULL_COLOURS if self.codec == "libx264" and any(side % 2 for side in size) \
            else "yuv420p"
        context = self.stream.codec_context
        if self.codec == "libx264":
            self.stream.options = {"crf": "20", "preset": "veryfast"}
            self.time_base = clip.time_base
        else:
            self.stream.bit_rate = max(500_000, round(size[0] * size[1] * float(rate) / 5))
            self.time_base = clip.time_base if clip.time_base.denominator <= FINE.denominator else FINE
        self.ticks = clip.time_base / self.time_base                    # of this file in one of the clip's
        self.stream.time_base = context.time_base = self.time_base
        if clip.pixel_aspect != 1:
            context.sample_aspect_ratio = clip.pixel_aspect
        self.matrix = "ITU709" if min(size) >= 720 and self.codec == "libx264" else "ITU601"     # what players expect
        context.colorspace = BT709 if self.matrix == "ITU709" else BT601
        context.color_range = 1

    def add(self, picture: Image.Image, pts: int) -> None:
        """``pts`` in the clip's units, growing."""
        av = pyav()
        if picture.size != self.size:                                   # a few streams change their size
            picture = picture.resize(self.size)
            self.resized += 1
        frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
        frame = frame.reformat(format=self.format, dst_colorspace=self.matrix)
        when = round(pts * self.ticks)
        self.moved += when <= self.last
        self.last = max(self.last + 1, when)
        frame.pts, frame.time_base = self.last, self.time_base
        self.container.mux(self.stream.encode(frame))
        self.frames += 1

    def close(self) -> None:
        self.container.mux(self.stream.encode())
        self.container.close()
        self.whole.finish()

    def described(self) -> str:
        """What became of the frames, in words."""
        width, height = self.size
        return ", ".join([f"{self.frames} frames", self.codec,
                          *([f"{self.resized} of another size resized to {width} x {height}"] if self.resized else ()),
                          *([f"{self.moved} shown a tick later than they were"] if self.moved else ())])

    def discard(self) -> None:
        with suppress(OSError, pyav().error.FFmpegError):
            self.container.close()
        self.whole.discard()
