"""Image files -> RGB, upright, 8 bits: the one way pictures are read, in training, evaluation and prediction."""
from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)    # Pillow's


def read_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """The image at ``path`` as PIL RGB, 8 bits, as a viewer shows it: EXIF orientation is applied.

    Grey, black and white, palette, CMYK and YCbCr files become RGB. Transparency is ignored: a transparent pixel keeps
    the colour that is stored for it, as in the published reader. Grey of 16 bits is scaled from its full range,
    0..65535, to 0..255. An animation gives its first picture. Where the file's ``content`` is given, the file itself
    is not opened.

    Raises FileNotFoundError where there is no file, and OSError where it is no image, is damaged or is cut short.
    """
    path = Path(path)
    if content is None and not path.is_file():
        raise FileNotFoundError(f"image {path} is not there; correct the path or the name (upper and lower case "
                                f"differ), or copy the file there")
    size = path.stat().st_size if content is None else len(content)
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            ImageOps.exif_transpose(image, in_place=True)                       # reads the pixels, too
            return _to_rgb(image)
    except Image.UnidentifiedImageError:
        raise OSError(f"image {path} ({size} bytes) is not in a format that Pillow reads; copy it "
                      f"again, convert it to JPEG or PNG, or take it out") from None
    except _DAMAGED as error:
        raise OSError(f"image {path} ({size} bytes) cannot be read: {error}; if it is damaged or cut "
                      f"short, copy it again or take it out") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):                              # I;16, I;16B, ...; I (32 bits): 16 bits in older Pillow
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"its grey values, {grey.min()} to {grey.max()}, are not of 8 or 16 bits; convert it")
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its grey values are floating-point numbers of unknown range; convert it to 8 bits")
    return image.convert("RGB")
