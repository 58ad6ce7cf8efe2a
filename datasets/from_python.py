"""Any ``torch.utils.data.Dataset`` from Python -> what training, evaluation and checks take."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from pycocotools import mask as rle
from torch import Tensor

from datasets.coco import CocoDetection, Transforms
from datasets.examination import counted, few
from datasets.flat import Numbers
from datasets.images import Picture, height_width, to_8_bits
from detr.distributed import say
from detr.structures import Category


def from_dataset(dataset: Any, names: Sequence[str], transforms: Transforms | None = None, *,
                 return_masks: bool = False, categories: Sequence[Category] | None = None, channels: int = 3,
                 ignore_regions: bool = False) -> PythonDetection:
    """``dataset`` as training and evaluation take it; ``names[label]`` is the name of a label.

    It needs ``len()``, and its items are ``(image, target)`` in torchvision's convention: a PIL image, or a tensor ``[C,
    H, W]``, uint8 or floating-point in 0..1, upright; and a dict with ``boxes [N, 4]``, corners in pixels, ``labels
    [N]`` in 0..K-1, and maybe ``masks [N, H, W]``, ``area [N]``, ``iscrowd [N]`` (1: a crowd, which is no object) and
    ``image_id`` (its own for each image; else images are numbered from 1). Images come in the order of these ids.

    Every item is read once here, for its size and objects, and again when it is wanted; so it has to be the same each
    time: what draws at random belongs into ``transforms`` (``datasets.transforms``). The other arguments are as for
    ``CocoDetection``. Raises ValueError, TypeError naming item and field.
    """
    return PythonDetection(dataset, names, transforms, return_masks, categories, channels, ignore_regions)


class PythonDetection(CocoDetection):
    """A data set made by ``from_dataset``. The classes have their labels as ids."""

    def __init__(self, dataset: Any, names: Sequence[str], transforms: Transforms | None = None,
                 return_masks: bool = False, categories: Sequence[Category] | None = None, channels: int = 3,
                 ignore_regions: bool = False) -> None:
        self.dataset = dataset
        names = list(names)
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError(f"from_dataset: names is {names!r}; give the name of each class, in the order of the labels")
        if len(dataset) == 0:
            raise ValueError("from_dataset: the data set has no items")
        say(f"{type(dataset).__name__}: reading {counted(len(dataset), 'item')} once, for sizes and objects")
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(len(dataset)):
            image, target = _item(dataset, i)
            height, width = height_width(as_picture(image, i, channels))
            rows = _rows(target, i, height, width, names, return_masks)
            image_id = _image_id(target, i)
            images.append({"id": image_id, "file_name": f"item {i}", "width": width, "height": height,
                           "source": f"item {i}"})
            for row in rows:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **row})
        self._check_ids(images)
        self._items = Numbers(sorted(range(len(images)), key=lambda i: images[i]["id"]))
        form = {"images": images, "annotations": annotations,
                "categories": [{"id": label, "name": name} for label, name in enumerate(names)]}
        # As text in a tensor: evaluation alone needs it, and objects of Python would be copied into each worker.
        self._form = torch.frombuffer(bytearray(json.dumps(form).encode()), dtype=torch.uint8)
        super().__init__(Path("."), Path(type(dataset).__name__), transforms, return_masks, categories, channels=channels,
                         read=self._stored, ignore_regions=ignore_regions)

    def image(self, i: int) -> Picture:
        """The picture of image ``i`` before ``transforms``."""
        item = self._items[i]
        return as_picture(_item(self.dataset, item)[0], item, self.channels)

    def __getitem__(self, i: int) -> Any:
        image, target = self.image(i), self.target(i)
        size = target["size"].tolist()
        if list(height_width(image)) != size:
            raise ValueError(f"item {self._items[i]}: its image is now {list(height_width(image))} (height, width) and "
                             f"was {size} before; an item must be the same each time: move what draws at random into "
                             f"transforms")
        return self.transforms(image, target) if self.transforms else (image, target)

    def _stored(self) -> dict[str, Any]:
        return json.loads(self._form.numpy().tobytes())

    def _check_files(self) -> None:
        """There are none."""

    @staticmethod
    def _check_ids(images: list[dict[str, Any]]) -> None:
        first: dict[int, int] = {}
        for i, row in enumerate(images):
            if first.setdefault(row["id"], i) != i:
                raise ValueError(f"item {i}: image_id {row['id']} is that of item {first[row['id']]}, too; give each "
                                 f"image its own, or none")


def as_picture(image: Any, i: int, channels: int) -> Picture:
    """The image of item ``i`` as ``read_image`` would give it. Raises TypeError and ValueError, naming the item."""
    if isinstance(image, Image.Image):
        if channels not in (1, 3):
            raise TypeError(f"item {i}: image is a PIL image; {channels} channels (--in_channels) need a tensor "
                            f"[{channels}, H, W]")
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation in range(2, 9):
            raise ValueError(f"item {i}: image has EXIF orientation {orientation}, so that boxes may be of the picture "
                             f"as stored or upright; call ImageOps.exif_transpose(image) in the data set, boxes must be "
                             f"of the upright picture (or, to keep it as stored, give Image.fromarray(np.array(image)))")
        try:
            return to_8_bits(image).convert("L" if channels == 1 else "RGB")
        except ValueError as error:
            raise ValueError(f"item {i}: image is of Pillow's mode {image.mode}; {error}") from None
    if not isinstance(image, Tensor):
        raise TypeError(f"item {i}: image is {_kind(image)}; give a PIL image or a tensor [C, H, W]")
    if image.dim() != 3 or image.shape[0] != channels or 0 in image.shape:
        raise ValueError(f"item {i}: image is {list(image.shape)}; [{channels}, height, width] is needed"
                         + ("; move the channels to the front: image.permute(2, 0, 1)"
                            if image.dim() == 3 and image.shape[-1] == channels else ""))
    if image.is_floating_point():
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"item {i}: image has values from {image.min():.4g} to {image.max():.4g}; 0..1 is needed "
                             f"for floating-point numbers: leave normalising to transforms, or give uint8")
        image = (image * 255).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise TypeError(f"item {i}: image is {image.dtype}; uint8, or floating-point in 0..1, is needed")
    image = image.cpu()
    if channels == 1:
        return Image.fromarray(image[0].numpy())
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) if channels == 3 else image


def _item(dataset: Any, i: int) -> tuple[Any, dict[str, Any]]:
    item = dataset[i]
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[1], dict):
        raise TypeError(f"item {i} is {_kind(item)}; a pair (image, target) is needed, the target a dict with boxes and "
                        f"labels")
    return item[0], item[1]


def _image_id(target: dict[str, Any], i: int) -> int:
    if "image_id" not in target:
        return i + 1
    value = _tensor(target, "image_id", i, torch.int64)
    if value.numel() != 1:
        raise ValueError(f"item {i}: image_id is {value.tolist()}; one whole number is needed")
    return int(value)


def _rows(target: dict[str, Any], i: int, height: int, width: int, names: list[str],
          return_masks: bool) -> list[dict[str, Any]]:
    """The objects of a target as annotations of COCO's form."""
    for key in ("boxes", "labels"):
        if key not in target:
            raise ValueError(f"item {i}: the target has no '{key}', but {few(list(target), 8) or 'nothing'}; add it, "
                             f"empty where the image has no objects")
    boxes = _tensor(target, "boxes", i, torch.float64)
    if boxes.numel() == 0:
        boxes = boxes.reshape(0, 4)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"item {i}: boxes is {list(boxes.shape)}; [N, 4] is needed, corners x1, y1, x2, y2 in pixels")
    n = len(boxes)
    columns = {}
    for key in ("labels", "area", "iscrowd"):
        if key in target:
            columns[key] = _tensor(target, key, i, torch.float64 if key == "area" else torch.int64)
            if columns[key].shape != (n,):
                raise ValueError(f"item {i}: {key} is {list(columns[key].shape)}, but boxes has {counted(n, 'row')}; one "
                                 f"value for each box is needed")
    labels = columns["labels"].tolist()
    if odd := [label for label in labels if not 0 <= label < len(names)]:
        raise ValueError(f"item {i}: labels has {few(odd)}, but there are {counted(len(names), 'name')}: "
                         f"0..{len(names) - 1} is needed"
                         + ("; torchvision's models count from 1: subtract 1" if len(names) in odd else ""))
    inverted = (boxes[:, 2:] < boxes[:, :2]).any(1).nonzero()
    if len(inverted):
        k = int(inverted[0])
        raise ValueError(f"item {i}: boxes row {k} is {boxes[k].tolist()}, whose right or bottom lies before its left or "
                         f"top; corners x1, y1, x2, y2 are needed, not a width and height")
    if odd := [value for value in columns.get("iscrowd", torch.zeros(0)).tolist() if value not in (0, 1)]:
        raise ValueError(f"item {i}: iscrowd has {few(odd)}; it is 0 or 1")
    masks = None
    if return_masks:
        if "masks" not in target:
            raise ValueError(f"item {i}: the target has no 'masks', which --masks needs; add them, bool [N, H, W]")
        masks = _tensor(target, "masks", i, torch.bool)
        if masks.shape != (n, height, width):
            raise ValueError(f"item {i}: masks is {list(masks.shape)}; {[n, height, width]} is needed, a mask of the "
                             f"image's size for each box")
    rows = []
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        row: dict[str, Any] = {"category_id": labels[k], "bbox": [x1, y1, x2 - x1, y2 - y1],
                               "area": float(columns["area"][k]) if "area" in columns else (x2 - x1) * (y2 - y1),
                               "iscrowd": int(columns["iscrowd"][k]) if "iscrowd" in columns else 0,
                               "source": f"item {i}, boxes row {k}"}
        if masks is not None:
            code = rle.encode(np.asfortranarray(masks[k].numpy(), dtype=np.uint8))
            row["segmentation"] = {"size": [height, width], "counts": code["counts"].decode()}
        rows.append(row)
    return rows


def _tensor(target: dict[str, Any], key: str, i: int, dtype: torch.dtype) -> Tensor:
    try:
        values = torch.as_tensor(target[key]).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"item {i}: {key} is {_kind(target[key])}, of which no tensor can be made ({error})") from None
    if values.is_floating_point() and not values.isfinite().all():
        raise ValueError(f"item {i}: {key} has values that are no finite numbers: {few(values.tolist())}")
    if dtype == torch.int64 and values.numel() and (values.is_floating_point() or values.is_complex()):
        raise TypeError(f"item {i}: {key} is {values.dtype}; whole numbers are needed")
    return values.to(dtype)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
