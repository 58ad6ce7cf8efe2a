"""Image files -> upright pictures of 8 bits: how they are read in training, evaluation and ``scripts/predict.py``; and
pictures whose pixels come later: ``SizeOnly``, ``Deferred``."""
from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL import TiffImagePlugin as tiff
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn.functional import interpolate

from detr.preprocessing import DAMAGED, Picture, as_planes, in_colours, scaled, to_8_bits, too_large
from detr.preprocessing import height_width as height_width

_ORIENTATION = ExifTags.Base.Orientation
_PREDICTS = (5, 8, 32946, 34925, 50000)                            # LZW, deflate, deflate, LZMA, ZSTD
_LOSSLESS = (1, 32773, *_PREDICTS)                                 # nothing, PackBits
_PLACES = (tiff.STRIPOFFSETS, tiff.STRIPBYTECOUNTS, tiff.TILEOFFSETS, tiff.TILEBYTECOUNTS)
_LAYOUT = (tiff.IMAGEWIDTH, tiff.IMAGELENGTH, tiff.COMPRESSION, tiff.FILLORDER, tiff.ROWSPERSTRIP, tiff.TILEWIDTH,
           tiff.TILELENGTH, *_PLACES)


def read_image(path: str | Path, content: bytes | None = None, channels: int = 3, reduced: int = 1) -> Picture:
    """The image at ``path`` in 8 bits, as a viewer shows it: EXIF orientation is applied.

    3 channels give PIL RGB, and 1 gives PIL grey (L). Colour, grey, black and white, palette, CMYK and YCbCr files
    become what is asked for. Transparency is ignored: a transparent pixel keeps the colour that is stored for it, as in
    the published reader. An animation gives its first picture.

    Any other number gives a uint8 tensor ``[C, H, W]`` of the channels that the file has, as stored: the bands of a
    TIFF, or its pages where each has one; red, green, blue and alpha of an RGBA file; or an array ``[H, W, C]`` of
    numbers (``.npy``, which may also have 1 or 3 channels, but is never converted).

    Numbers of 16 bits are scaled from their full range, 0..65535, to 0..255. Where the file's ``content`` is given, the
    file itself is not opened. ``reduced`` (2, 4 or 8) decodes a JPEG of 1 or 3 channels at that part of its size, rounded
    up, which takes less time.

    Raises FileNotFoundError where there is no file, and OSError where it is no image, is damaged, is cut short or has
    another number of channels.
    """
    path = Path(path)
    if content is None and not path.is_file():
        raise FileNotFoundError(f"image {path} is not there; correct the path or the name (upper and lower case "
                                f"differ), or copy the file there")
    size = path.stat().st_size if content is None else len(content)
    is_array = path.suffix.lower() == ".npy"
    try:
        if channels in (1, 3) and not is_array:
            with Image.open(path if content is None else io.BytesIO(content)) as image:
                if reduced > 1:
                    image.draft(None, (max(1, image.width // reduced), max(1, image.height // reduced)))
                ImageOps.exif_transpose(image, in_place=True)                   # reads the pixels, too
                return in_colours(image, channels)
        whole = path.read_bytes() if content is None else content
        pixels = _of_array(whole) if is_array else _of_bands(whole)             # [H, W, C]
    except Image.UnidentifiedImageError:
        kind = "JPEG or PNG" if channels in (1, 3) else ".npy, an array [height, width, channels]"
        raise OSError(f"image {path} ({size} bytes) is not in a format that Pillow reads; copy it "
                      f"again, convert it to {kind}, or take it out") from None
    except Image.DecompressionBombError as error:
        raise too_large(path, error) from error
    except DAMAGED as error:
        raise OSError(f"image {path} ({size} bytes) cannot be read: {error}; if it is damaged or cut "
                      f"short, copy it again or take it out") from error
    if pixels.shape[2] != channels:
        raise OSError(f"image {path} has {pixels.shape[2]} channel{'s' * (pixels.shape[2] != 1)}, not the {channels} of "
                      f"--in_channels; give --in_channels {pixels.shape[2]}, or a file that has {channels}: a .npy array "
                      f"[height, width, channels], a TIFF with a band or a page for each"
                      + (", an RGBA file" if channels == 4 else ""))
    if channels in (1, 3):
        return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class SizeOnly(Image.Image):
    """A picture without pixels: to flip, crop or resize it costs next to nothing, and gives the size that it gives of
    any picture."""
    remedy = ("a step of the training transforms reads pixels before ToTensor, where --bucket_train runs them on sizes "
              "alone; put it behind ToTensor, or leave --bucket_train out")

    def __init__(self, height: int, width: int) -> None:                # without Pillow's, which is about pixels
        self._height_width = height, width

    @property
    def height(self) -> int:
        return self._height_width[0]

    @property
    def width(self) -> int:
        return self._height_width[1]

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    @property
    def mode(self) -> str:
        return "RGB"

    def load(self) -> Any:
        """What Pillow calls before it reads pixels."""
        raise TypeError(self.remedy)

    def transpose(self, method: Image.Transpose) -> SizeOnly:
        upright = method in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180)
        return self if upright else SizeOnly(self.width, self.height)

    def resize(self, size: Any, *args: Any, **kwargs: Any) -> SizeOnly:
        width, height = size
        return SizeOnly(height, width)

    def crop(self, box: Any = None) -> SizeOnly:
        left, top, right, bottom = box
        return SizeOnly(bottom - top, right - left)


class Deferred(SizeOnly):
    """A picture that is read when ``planes`` asks for it: until then, mirroring, cropping and resizing it note what is to
    be done, so that all sizes are known before a file is decoded.

    ``read(times)`` gives the whole picture, uint8 ``[C, H, W]``; where ``times`` is 2, 4 or 8 or above, it may be reduced
    by that. Resizing is bilinear with antialiasing, by PyTorch in whole numbers: what Pillow does in 32 bits is done in
    16, so that a value differs by 1 of 255 at a few of a thousand places, in some pictures of a hundred; rarely by 2.
    """
    remedy = ("a step of the training transforms reads pixels before ToTensor, or does more than mirror, crop and resize "
              "bilinearly, but --fast_images reads them in ToTensor; put it behind ToTensor, or leave --fast_images out")

    def __init__(self, height: int, width: int, read: Callable[[float], Tensor],
                 steps: tuple[Callable[[Tensor], Tensor], ...] = (), times: float | None = None) -> None:
        super().__init__(height, width)
        self._read, self._steps = read, steps
        self._times = times                                 # what the first resize divides sides by; 1 behind a crop

    def planes(self) -> Tensor:
        """uint8 ``[C, H, W]``. Raises OSError where the file is damaged."""
        planes = self._read(self._times or 1)
        for step in self._steps:
            planes = step(planes)
        return planes

    def _then(self, height: int, width: int, step: Callable[[Tensor], Tensor], times: float | None) -> Deferred:
        return Deferred(height, width, self._read, (*self._steps, step), self._times or times)

    def transpose(self, method: Image.Transpose) -> Deferred:
        if method != Image.Transpose.FLIP_LEFT_RIGHT:
            raise TypeError(self.remedy)
        return self._then(self.height, self.width, lambda planes: planes.flip(-1), None)

    def resize(self, size: Any, resample: int | None = None, *args: Any, **kwargs: Any) -> Deferred:
        if resample != Image.Resampling.BILINEAR or args or kwargs:
            raise TypeError(self.remedy)
        width, height = size
        return self._then(height, width, lambda planes: _resized(planes, height, width),
                          min(self.height / height, self.width / width))

    def crop(self, box: Any = None) -> Deferred:
        left, top, right, bottom = box

        def cut(planes: Tensor) -> Tensor:
            beyond = (max(0, -left), max(0, right - planes.shape[2]), max(0, -top), max(0, bottom - planes.shape[1]))
            inside = planes[:, max(0, top):max(0, bottom), max(0, left):max(0, right)]
            return torch.nn.functional.pad(inside, beyond) if any(beyond) else inside

        return self._then(bottom - top, right - left, cut, 1.0)


GAP = 1.5                   # a reduced JPEG has at least so many times the pixels a side that the resize leaves


def _resized(planes: Tensor, height: int, width: int) -> Tensor:
    """uint8 ``[C, H, W]`` -> uint8 ``[C, height, width]``, as antialiased bilinear weights say, rounded after each
    direction as Pillow does."""
    if planes.shape[1:] == (height, width):
        return planes
    batch = planes[None].contiguous(memory_format=torch.channels_last)          # in this order PyTorch is fastest
    batch = batch.as_strided(batch.shape, (batch.numel(), *batch.stride()[1:]))     # and sees the order of a batch of 1
    return interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]


def read_deferred(path: str | Path, content: bytes | None = None, channels: int = 3, reduced: bool = False) -> Picture:
    """The image at ``path`` as ``read_image`` gives it, but of a JPEG no more than the header is read now; where the
    number of channels is neither 1 nor 3, just as ``read_image`` gives it.

    The pixels are the same where ``reduced`` is False. Else a JPEG that the first resize makes smaller by 3 or more is
    decoded at half, a quarter or an eighth of its size (so that at least 1.5 times the pixels a side are left to resize
    from), which leaves out its finest details before the resize does. Errors are those of ``read_image``, what is wrong
    with a JPEG's pixels only when they are asked for.
    """
    path = Path(path)
    if channels not in (1, 3) or path.suffix.lower() == ".npy":
        return read_image(path, content, channels)
    if content is None and path.is_file():
        content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content or b"")) as image:
            stored = image.size
            orientation = image.getexif().get(_ORIENTATION, 1) if isinstance(image, JpegImageFile) else None
    except DAMAGED:
        orientation = None
    if content is None or orientation is None:                                  # no JPEG, or none that can be read
        picture = read_image(path, content, channels)
        return Deferred(*height_width(picture), lambda times: as_planes(picture))
    whole: bytes = content

    def read(times: float) -> Tensor:
        factor = next((factor for factor in (8, 4, 2) if reduced and times >= GAP * factor), 1)
        return as_planes(read_image(path, whole, channels, factor))

    width, height = stored if orientation not in (5, 6, 7, 8) else stored[::-1]
    return Deferred(height, width, read)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the picture that ``read_image`` gives for ``path``, upright, from the file's header alone.

    Raises FileNotFoundError where there is no file, and OSError where it is no image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image {path} is not there; correct the path or the name (upper and lower case "
                                f"differ), or copy the file there")
    try:
        if path.suffix.lower() == ".npy":
            height, width = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
            return height, width
        with Image.open(path) as image:
            width, height = image.size
            if isinstance(image, tiff.TiffImageFile):                           # some versions of Pillow turn its size
                width, height = (image.tag_v2[tag] for tag in (tiff.IMAGEWIDTH, tiff.IMAGELENGTH))
            turned = image.format != "PNG" or _png_may_be_turned(path)          # of a PNG, Pillow reads all pixels
            orientation = image.getexif().get(_ORIENTATION, 1) if turned else 1
        return (width, height) if orientation in (5, 6, 7, 8) else (height, width)
    except DAMAGED as error:
        raise OSError(f"image {path} ({path.stat().st_size} bytes) cannot be read: {error}; copy it again, convert it to "
                      f"JPEG or PNG, or take it out") from error


def image_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | str]:
    """For each path its (height, width), or what is wrong with the file."""
    def size(path: Path) -> tuple[int, int] | str:
        try:
            return image_size(path)
        except OSError as error:
            return str(error)

    if len(paths) < 64:
        return [size(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:                                 # which wait for the disk together
        return list(pool.map(size, paths))


def _png_may_be_turned(path: Path) -> bool:
    """Whether a PNG has a chunk that could hold an orientation; pixels are jumped over."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return True
            start = file.read(min(length, 24)) if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
            if start.startswith((b"Raw profile type exif", b"XML:com.adobe.xmp")):
                return True
            file.seek(length - len(start) + 4, 1)
    return False


def _of_array(content: bytes) -> np.ndarray:
    """A ``.npy`` file -> uint8 ``[H, W, C]``; ``[H, W]`` is one channel."""
    array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise ValueError(f"its numbers are {array.dtype}; convert them to uint8, or to uint16 of the range 0..65535")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"its array is {list(array.shape)}; [height, width, channels] is needed")
    array = array if array.ndim == 3 else array[..., None]
    return array if array.dtype.itemsize == 1 else scaled(array)


def _of_bands(content: bytes) -> np.ndarray:
    """Any other file -> uint8 ``[H, W, C]`` of its bands, or of a TIFF's pages where each has one."""
    is_tiff = content[:4] in (b"II*\0", b"MM\0*")
    if is_tiff and (planes := _bands_of_tiff(content)):
        return np.stack([np.asarray(plane) for plane in planes], axis=-1)
    with Image.open(io.BytesIO(content)) as image:
        pages = []
        for number in range(getattr(image, "n_frames", 1) if is_tiff else 1):
            image.seek(number)
            pages.append(to_8_bits(ImageOps.exif_transpose(image)))
    first = pages[0]
    if first.mode in ("P", "PA"):
        first = first.convert("RGBA" if first.has_transparency_data else "RGB")
    if len(first.getbands()) > 1:
        return np.asarray(first)
    return np.stack([np.asarray(page.convert("L")) for page in pages                # smaller pages are previews
                     if page.size == first.size and len(page.getbands()) == 1], axis=-1)


def _bands_of_tiff(content: bytes) -> list[Image.Image]:
    """The bands of a TIFF's first page, upright, as stored; none where it has one alone or is compressed with loss.

    Pillow itself reads at most four, but undoes every compression. So it is given the same bytes under another
    directory: rows of W pixels with C bands are rows of W * C pixels with one, and bands that are stored one after the
    other are files of their own.
    """
    file = io.BytesIO(content)
    tags = tiff.ImageFileDirectory_v2(file.read(8))
    file.seek(tags.next)
    tags.load(file)
    count, width, height = (tags.get(tag, 1) for tag in (tiff.SAMPLESPERPIXEL, tiff.IMAGEWIDTH, tiff.IMAGELENGTH))
    compression = tags.get(tiff.COMPRESSION, 1)
    if count == 1 or compression not in _LOSSLESS or tags.get(tiff.PHOTOMETRIC_INTERPRETATION) == 6:
        return []                                                       # 6: YCbCr, whose bands may differ in size
    bits, predictor = tags.get(tiff.BITSPERSAMPLE, (1,)), tags.get(tiff.PREDICTOR, 1) if compression in _PREDICTS else 1
    if set(bits) not in ({8}, {16}) or set(tags.get(tiff.SAMPLEFORMAT, (1,))) != {1} or predictor not in (1, 2):
        raise ValueError("its bands are not whole numbers of 8 or 16 bits without a sign; convert them")
    together = tags.get(tiff.PLANAR_CONFIGURATION, 1) == 1
    kept = {tag: tags[tag] if isinstance(tags[tag], tuple) else (tags[tag],) for tag in _LAYOUT if tag in tags}
    kept |= {tiff.BITSPERSAMPLE: bits[:1], tiff.PHOTOMETRIC_INTERPRETATION: (1,), tiff.SAMPLESPERPIXEL: (1,)}
    step = kept.get(tiff.TILEWIDTH, (width,))[0]                        # differences begin anew with each tile

    planes: list[Image.Image] = []
    for number in range(1 if together else count):
        if together:
            own = {tag: (values[0] * count,) if tag in (tiff.IMAGEWIDTH, tiff.TILEWIDTH) else values
                   for tag, values in kept.items()}
        else:
            own = {tag: values[len(values) // count * number:][:len(values) // count] if tag in _PLACES else values
                   for tag, values in kept.items()}
        with Image.open(io.BytesIO(_with_directory(content, own))) as image:
            values = np.array(image).reshape(height, width, -1)
        values = values.astype(values.dtype.newbyteorder("="))
        if predictor == 2:                                              # stored are differences to the pixel on the left
            for left in range(0, width, step):
                part = values[:, left:left + step]
                part[:] = part.cumsum(axis=1, dtype=values.dtype)
        for band in values.transpose(2, 0, 1):
            plane = Image.fromarray(scaled(band) if values.dtype.itemsize == 2 else np.ascontiguousarray(band))
            plane.getexif()[_ORIENTATION] = tags.get(_ORIENTATION, 1)
            planes.append(ImageOps.exif_transpose(plane))
    return planes


def _with_directory(content: bytes, tags: dict[int, tuple[int, ...]]) -> bytes:
    """A TIFF with another directory of whole numbers, written behind it."""
    order = "<" if content[:2] == b"II" else ">"
    start = len(content) + len(content) % 2
    lists = start + 2 + 12 * len(tags) + 4                              # behind the entries; one value stands within
    entries, behind = b"", b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            packed, behind = struct.pack(f"{order}I", lists + len(behind)), behind + packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    return (content[:4] + struct.pack(f"{order}I", start) + content[8:] + bytes(len(content) % 2)
            + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + behind)
