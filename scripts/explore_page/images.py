"""The images of the page: those of a data set, and the last few that were uploaded. Each has an id, none a path."""
from __future__ import annotations

import io
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from datasets.coco import CocoDetection
from datasets.images import DAMAGED
from detr.preprocessing import Picture, height_width, in_colours

MOST_BYTES = 20_000_000             # of an upload
MOST_PIXELS = 50_000_000
UPLOADS = 6                         # kept, as the bytes that came
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")


class Refused(Exception):
    """What is not done, in a line that the page shows, with the HTTP status that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Truth(NamedTuple):
    """The objects of an image as evaluation knows them."""
    boxes_xyxy: Tensor              # [N, 4] in pixels
    labels: Tensor                  # [N]
    iscrowd: Tensor                 # [N] bool: crowds and regions to be ignored


class Recent:
    """The last ``size`` values that were asked for, each made once, by one thread, while others wait for it alone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[Any, Any] = OrderedDict()
        self._making: dict[Any, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of ``key``; ``make()`` where it is not there. What ``make`` raises is not kept."""
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            try:
                with self._lock:
                    if key in self._values:
                        self._values.move_to_end(key)
                        return self._values[key]
                value = make()
                with self._lock:
                    self._values[key] = value
                    while len(self._values) > self.size:
                        self._values.popitem(last=False)
                return value
            finally:
                with self._lock:
                    self._making.pop(key, None)

    def peek(self, key: Any) -> Any:
        """The value of ``key``, or None."""
        with self._lock:
            return self._values.get(key)


class Images:
    """Images by id: of the data set "139", its own number; of an upload "u" and 16 letters that nobody guesses.

    ``roots`` are the folders that the data set's files may lie in, once links are followed. ``channels`` is what the
    model takes.
    """

    def __init__(self, dataset: CocoDetection | None, roots: Sequence[Path], channels: int) -> None:
        self.dataset, self.channels = dataset, channels
        self.roots = [root.resolve() for root in roots]
        self.by_name: list[str] = []
        self._places: dict[str, int] = {}
        if dataset is not None:
            files, ids = list(dataset.files), [str(image_id) for image_id in dataset.ids]
            self._places = {key: place for place, key in enumerate(ids)}
            self.by_name = [ids[place] for place in sorted(range(len(ids)), key=files.__getitem__)]
        self._uploads: OrderedDict[str, tuple[str, bytes, tuple[int, int]]] = OrderedDict()
        self._uploaded = 0
        self._pictures = Recent(3)
        self._lock, self._reading, self._decoders = threading.Lock(), threading.Lock(), threading.Semaphore(2)

    def row(self, key: str) -> dict[str, Any]:
        """What a list of images says of one."""
        place = self._places.get(key)
        if place is not None:
            assert self.dataset is not None
            height, width = self.dataset.sizes[place].tolist()
            return {"id": key, "name": self.dataset.files[place], "width": width, "height": height}
        name, _, (height, width) = self._upload(key)
        return {"id": key, "name": name, "width": width, "height": height}

    @property
    def uploads(self) -> list[str]:
        """Ids of what is kept, the newest first."""
        with self._lock:
            return list(self._uploads)[::-1]

    def picture(self, key: str, keep: bool = True) -> Picture:
        """An image, upright. ``keep``: the next to ask for it are likely to ask soon."""
        return self._pictures.get(key, lambda: self._read(key)) if keep else self._pictures.peek(key) or self._read(key)

    def upload(self, content: bytes) -> str:
        """Keep an image, and say its id. What is no image, or too large, is refused by its content and its header."""
        with self._decoders:
            picture = self._decode(content)
        key = "u" + secrets.token_hex(8)
        with self._lock:
            self._uploaded += 1
            self._uploads[key] = f"upload {self._uploaded}", content, height_width(picture)
            while len(self._uploads) > UPLOADS:
                self._uploads.popitem(last=False)
        self._pictures.get(key, lambda: picture)
        return key

    def truth(self, key: str) -> Truth | None:
        """The objects of an image, crowds included; None of an upload."""
        place = self._places.get(key)
        if place is None:
            self._upload(key)
            return None
        assert self.dataset is not None
        with self._reading:                                     # made on first use
            rows = self.dataset.coco.imgToAnns.get(self.dataset.ids[place], [])
        label = {category.id: category.label for category in self.dataset.categories}
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return Truth(boxes, torch.tensor([label[row["category_id"]] for row in rows], dtype=torch.int64),
                     torch.tensor([bool(row["iscrowd"]) for row in rows], dtype=torch.bool))

    def _upload(self, key: str) -> tuple[str, bytes, tuple[int, int]]:
        with self._lock:
            if key in self._uploads:
                return self._uploads[key]
        gone = f"this upload is no longer kept (the last {UPLOADS} are); upload it again"
        raise Refused(404, gone if key.startswith("u") else f"there is no image {key}")

    def _read(self, key: str) -> Picture:
        place = self._places.get(key)
        with self._decoders:
            if place is None:
                return self._decode(self._upload(key)[1])
            assert self.dataset is not None
            path = (self.dataset.image_folder / self.dataset.files[place]).resolve()
            if not any(path.is_relative_to(root) for root in self.roots):
                raise Refused(403, f"image {key} lies outside of the folder of the data set, behind a link or '..'; it "
                                   f"is not read, unless --images_in names its folder")
            try:
                picture = self.dataset.image(place)
            except OSError as error:
                raise Refused(422, str(error)) from error
        there, said = height_width(picture), tuple(self.dataset.sizes[place].tolist())
        if there != said:
            raise Refused(422, f"{self.dataset.files[place]} has {there[1]} x {there[0]} pixels, but the annotations say "
                               f"{said[1]} x {said[0]}, so its boxes would be misplaced; correct width, height and "
                               f"boxes, or copy the file there that was annotated")
        return picture

    def _decode(self, content: bytes) -> Picture:
        if self.channels not in (1, 3):
            raise Refused(415, f"the model takes images of {self.channels} channels, which uploads do not have; choose "
                               f"one of the data set")
        most = f"{MOST_PIXELS // 1_000_000} megapixels are the limit; make it smaller first"
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:             # reads the header alone
                width, height = image.size
                if width * height > MOST_PIXELS:
                    raise Refused(413, f"the image has {width} x {height} pixels, and {most}")
                ImageOps.exif_transpose(image, in_place=True)
                return in_colours(image, self.channels)
        except Image.DecompressionBombError:
            raise Refused(413, f"the image has far more pixels than it may have: {most}") from None
        except Image.UnidentifiedImageError:
            raise Refused(415, f"this is no image: its content is none of {', '.join(FORMATS)}, whatever its name says") \
                from None
        except DAMAGED as error:
            raise Refused(422, f"the image cannot be read, it may be damaged or cut short: {error}") from error
