"""How a picture becomes a model's input when nothing is left to chance: in evaluation and in prediction."""
from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Picture = Image.Image | Tensor
"""PIL, RGB or grey; for another number of channels a uint8 tensor ``[C, H, W]``."""
Size = int | tuple[int, int]                # short side, its proportions kept; or exactly (height, width)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, EOFError, MemoryError, OverflowError, struct.error, TokenError,
           Image.DecompressionBombError)
"""What Pillow and NumPy raise of files that are damaged."""


def resized(height: int, width: int, size: Size, max_size: int | None = None) -> tuple[int, int]:
    """(height, width) of an image after resizing. The short side gets ``size`` pixels, or less where the long side
    would exceed ``max_size``; as published, that length is rounded and the long side's floored. An image so long that
    nothing would be left of its short side keeps one pixel of it, and its long side gets ``max_size``."""
    if not isinstance(size, int):
        return size
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
        if size < 1:
            return (max_size, 1) if width < height else (1, max_size)
    return (int(size * height / width), size) if width < height else (size, int(size * width / height))


def normalisation(mean: Sequence[float], std: Sequence[float],
                  channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB -> those for images with ``channels`` channels.

    One channel has the average of the three; other numbers take turns: R, G, B, R, ... Numbers that are already one a
    channel stay.
    """
    def spread(values: Sequence[float]) -> tuple[float, ...]:
        if len(values) == channels:
            return tuple(values)
        return (sum(values) / 3,) if channels == 1 else tuple(values[c % 3] for c in range(channels))

    if len(mean) != len(std) or len(mean) not in (3, channels):
        raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} for --in_channels {channels}: three numbers each are "
                         f"needed, for red, green and blue, or {channels} each")
    return spread(mean), spread(std)


@dataclass(frozen=True)
class Preprocessing:
    """What a checkpoint must remember of it.

    ``size`` is the short side in pixels, with ``max_size`` the limit of the long one (None: no limit), or exactly
    (height, width). ``mean`` and ``std`` have a number for each channel, in 0..1; see ``normalisation``.
    """
    size: Size = 800
    max_size: int | None = 1333
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        sides = (self.size, self.size) if isinstance(self.size, int) else self.size
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"preprocessing size {self.size!r}: the short side in pixels or (height, width) is needed")
        if self.max_size is not None and self.max_size < 1:
            raise ValueError(f"preprocessing max_size {self.max_size!r}: pixels, at least 1, or None are needed")
        if not len(self.mean) == len(self.std) >= 1 or min(self.std) <= 0:
            raise ValueError(f"preprocessing mean {self.mean!r}, std {self.std!r}: a number for each channel of the "
                             f"images is needed in both, three for RGB, and std above 0")

    def as_dict(self) -> dict[str, Any]:
        """Numbers, tuples and None, under the names of the fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of ``as_dict``; lists do for tuples. All fields must be there and no others."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"preprocessing needs exactly {sorted(names)}, but has {sorted(values)}")
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**plain)

    def __call__(self, picture: Picture) -> Tensor:
        """A picture -> float32 ``[C, H, W]``: resized (bilinear, with antialiasing), in 0..1, minus mean, by std."""
        from torchvision.transforms.v2 import InterpolationMode  # here alone: slow to import
        from torchvision.transforms.v2 import functional as F
        size = resized(*height_width(picture), self.size, self.max_size)
        planes = as_planes(F.resize(picture, list(size), InterpolationMode.BILINEAR))
        if len(planes) != len(self.mean):
            raise ValueError(f"a picture with {len(planes)} channels, and the model takes {len(self.mean)}; open it with "
                             f"as_picture(picture, channels={len(self.mean)})")
        return normalised(planes, self.mean, self.std)


def as_planes(picture: Picture) -> Tensor:
    """A picture -> uint8 ``[C, H, W]``; of PIL's in PIL's order in memory, pixel by pixel."""
    if isinstance(picture, Tensor):
        return picture
    pixels = np.array(picture)                                          # a copy: what PyTorch shares must be writable
    return torch.from_numpy(pixels.reshape(picture.height, picture.width, -1)).permute(2, 0, 1)


def normalised(planes: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor | None = None) -> Tensor:
    """uint8 ``[C, H, W]``, in any order in memory -> float32 ``[C, H, W]``: in 0..1, minus mean, by std, channel by
    channel; in ``out`` where it is given.

    Computed as ``(value - 255 mean) * (1 / (255 std))`` in the memory of the result, which differs from the three steps
    one after the other by less than 1e-6. Every product and difference is rounded by itself, so that the numbers do not
    depend on the number of threads.
    """
    shift = torch.tensor(mean, dtype=torch.float64).mul(255).float()[:, None, None]
    scale = torch.tensor(std, dtype=torch.float64).mul(255).reciprocal().float()[:, None, None]
    out = torch.empty(planes.shape, dtype=torch.float32) if out is None else out
    return out.copy_(planes).sub_(shift).mul_(scale)


def height_width(picture: Picture) -> tuple[int, int]:
    """Height and width in pixels."""
    return (picture.shape[-2], picture.shape[-1]) if isinstance(picture, Tensor) else (picture.height, picture.width)


def as_picture(image: str | Path | Image.Image | np.ndarray | Tensor, channels: int = 3) -> Picture:
    """What a model with so many input channels is shown: a file, which is turned upright as its EXIF orientation says; a
    PIL image, as it is; a uint8 array ``[H, W]`` or ``[H, W, C]``, RGB; or a uint8 tensor ``[C, H, W]``, RGB.

    Where the model sees 3 channels or 1, colour and grey become what it sees. Raises FileNotFoundError and OSError for
    files that are missing or no pictures, TypeError and ValueError for what is no picture of 8 bits and ``channels``
    channels.
    """
    if isinstance(image, (str, Path)):
        return _from_file(Path(image), channels)
    if isinstance(image, Image.Image):
        if channels not in (1, 3):
            raise ValueError(f"a PIL image for a model of {channels} channels: give a uint8 array [height, width, "
                             f"{channels}] or tensor [{channels}, height, width]")
        return in_colours(image, channels)
    if not isinstance(image, (np.ndarray, Tensor)):
        raise TypeError(f"a picture is a path, a PIL image, a uint8 array or a uint8 tensor, not a "
                        f"{type(image).__name__}")
    planes, wanted = image, f"[{channels}, height, width]"
    if isinstance(image, np.ndarray):
        planes, wanted = (image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)), f"[height, width, {channels}]"
    fitting = (1, 3) if channels in (1, 3) else (channels,)
    if image.dtype not in (np.uint8, torch.uint8) or planes.ndim != 3 or 0 in image.shape or len(planes) not in fitting:
        raise ValueError(f"a picture is {image.dtype} {list(image.shape)}, but uint8 {wanted}, 0 to 255, is needed: "
                         f"numbers from 0 to 1 times 255, arrays with channels last, tensors with channels first, no "
                         f"alpha; several as a list")
    planes = torch.as_tensor(np.ascontiguousarray(planes) if isinstance(planes, np.ndarray) else planes.cpu())
    if channels not in (1, 3):
        return planes
    pixels = planes.permute(1, 2, 0).contiguous().numpy()               # PIL, so that it is resized as a file of it is
    return in_colours(Image.fromarray(pixels[..., 0] if len(planes) == 1 else pixels), channels)


def in_colours(image: Image.Image, channels: int) -> Image.Image:
    """RGB for 3 channels, grey for 1, in 8 bits. Transparency is ignored."""
    return to_8_bits(image).convert("L" if channels == 1 else "RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8; others as they are. Raises ValueError where the range of the numbers is not known."""
    if image.mode.startswith("I"):                              # I;16, I;16B, ...; I (32 bits): 16 bits in older Pillow
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"its grey values, {grey.min()} to {grey.max()}, are not of 8 or 16 bits; convert it")
        return Image.fromarray(scaled(grey))
    if image.mode == "F":
        raise ValueError("its grey values are floating-point numbers of unknown range; convert it to 8 bits")
    return image


def scaled(values: np.ndarray) -> np.ndarray:
    """0..65535 -> 0..255, rounded."""
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def too_large(path: str | Path, error: Exception) -> OSError:
    """What to say of an image that has more pixels than Pillow reads unasked."""
    return OSError(f"image {path} cannot be read: {error} If it is none, cut it or make it smaller, or "
                   f"look at it with scripts/predict.py --tile, which reads larger ones")


def _from_file(path: Path, channels: int) -> Picture:
    if not path.is_file():
        raise FileNotFoundError(f"image {path} is not there; correct the path or the name")
    if channels not in (1, 3):
        raise ValueError(f"{path}: for a model of {channels} channels, read the file as a uint8 array [height, width, "
                         f"{channels}] or tensor [{channels}, height, width]")
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)                       # reads the pixels, too
            return in_colours(image, channels)
    except Image.DecompressionBombError as error:
        raise too_large(path, error) from error
    except DAMAGED as error:
        raise OSError(f"image {path} ({path.stat().st_size} bytes) cannot be read: {error}; copy it again, convert it to "
                      f"JPEG or PNG, or leave it out") from error
