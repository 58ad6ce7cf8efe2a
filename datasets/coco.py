"""Annotations in COCO's form -> image and target (Lin et al., 2014)."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from datasets.annotations import LAYOUT, checked, class_table, index, masks, num_classes, read_json
from datasets.examination import counted, few
from datasets.file_cache import FileCache
from datasets.flat import Numbers, Segmentations, Strings
from datasets.images import Deferred, Picture, height_width, read_deferred, read_image
from datasets.split import is_region
from detr.distributed import is_main
from detr.structures import Category, Target

Transforms = Callable[[Any, Target], tuple[Any, Target]]


class OtherClasses(ValueError):
    """Data with classes that are not in the table it is to have."""


class CocoDetection(Dataset):
    """The images that ``annotation_file`` lists, with their objects: ``(image, target)``.

    Without ``transforms`` the image is what ``read_image`` gives for ``channels``, and the target's boxes are corners in
    its pixels; the lists of ``datasets.transforms`` turn them into what models take. Boxes are clipped to the image.
    Crowd annotations, regions to be ignored (rows with ``"ignore": 1``) and boxes that have no width or height are no
    objects, and are counted in a printed line; images without objects stay. ``return_masks`` adds ``masks``.
    ``cache_mode`` keeps the image files in memory, see ``FileCache``. With ``ignore_regions`` a target has ``ignore
    [M, 4]``, the boxes of crowds and of regions to be ignored, clipped as ``boxes`` are. ``remove_difficult`` takes what
    Pascal VOC marks as difficult for such a region, too; by default it is an object like others. ``fast_images``, "on" or
    "reduced", hands ``transforms`` images that are read by ``read_deferred``, and where there are none, uint8 ``[C, H,
    W]``; targets are the same. It may be changed at any time before workers are started.

    ``read`` gives COCO's form of annotations in another format, in place of reading ``annotation_file``, which messages
    still name. ``categories`` is the class table to use; the file's categories must be among it. Without it the table is
    the file's own, see ``class_table``. Raises FileNotFoundError where a folder, file or image is missing and ValueError
    where the annotations are not right.

    All that is kept of the annotations lies in tensors, once for all workers, see ``datasets.flat``.
    """

    def __init__(self, image_folder: str | Path, annotation_file: str | Path, transforms: Transforms | None = None,
                 return_masks: bool = False, categories: Sequence[Category] | None = None,
                 cache_mode: bool = False, channels: int = 3, read: Callable[[], dict[str, Any]] | None = None,
                 ignore_regions: bool = False, remove_difficult: bool = False, fast_images: str = "off") -> None:
        self.image_folder = Path(image_folder)
        self.annotation_file = Path(annotation_file)
        self.transforms = transforms
        self.channels = channels
        self.fast_images = fast_images
        self.ignore_regions, self.remove_difficult = ignore_regions, remove_difficult
        self._read_form = read or partial(read_json, self.annotation_file)
        if not self.image_folder.is_dir():
            raise FileNotFoundError(f"image folder {self.image_folder} is not there" +
                                    (f". {LAYOUT}" if read is None else f"; {self.annotation_file} is about its images"))
        data, notes = self._read(return_masks)
        images = sorted(data["images"], key=lambda image: image["id"])
        self.ids = Numbers(image["id"] for image in images)
        self.files = Strings(image["file_name"] for image in images)
        self.sizes = torch.tensor([[image["height"], image["width"]] for image in images])          # [images, 2]
        self._check_files()
        self.categories = self._class_table(data["categories"], categories)
        self.num_classes = num_classes(self.categories)
        notes += self._pack_objects(data["annotations"], return_masks)
        del data, images
        if is_main():
            empty = int((self._starts.diff() == 0).sum())
            print(f"{self.annotation_file}: {len(self)} images ({empty} without objects, kept), {len(self._labels)} "
                  f"objects of {len(self.categories)} classes" + "".join(f"; {note}" for note in notes), flush=True)
        self._cache: FileCache | None = None
        if cache_mode:
            paths = [self.image_folder / name for name in self.files]
            self._cache = FileCache(paths, str(self.image_folder), unreadable=self.image)

    def _read(self, masks: bool = False) -> tuple[dict[str, Any], list[str]]:
        """The annotations in COCO's form, checked, their segmentations too where these are used as ``masks``; and what
        there is to say about them."""
        data = self._read_form()
        notes = data.pop("notes", []) if isinstance(data, dict) else []
        data, more = checked(data, self.annotation_file, masks)
        return data, [*notes, *more]

    def _is_no_object(self, row: dict[str, Any]) -> bool:
        return is_region(row) or self.remove_difficult and bool(row.get("difficult"))

    @cached_property
    def coco(self) -> COCO:
        """The ground truth for pycocotools, every annotation of the file included. What is to be ignored is given as a
        crowd, the only kind of region that pycocotools counts neither as found nor as missed. Made on first use, by
        reading again: training never needs it, and each worker would copy its many Python objects."""
        data, _ = self._read()
        for row in data["annotations"]:
            row["iscrowd"] = int(self._is_no_object(row))
        return index(data)

    def __getstate__(self) -> dict[str, Any]:
        """What a worker that is started anew is sent: all but ``coco``."""
        return {name: value for name, value in self.__dict__.items() if name != "coco"}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Any, Target]:
        image, target = self.image(i) if self.fast_images == "off" else self._deferred(i), self.target(i)
        height, width = target["size"].tolist()
        there = height_width(image)
        if there != (height, width):
            raise ValueError(f"image {self.image_folder / self.files[i]} has {there[1]} x {there[0]} pixels "
                             f"once its EXIF orientation is applied, but {self.annotation_file} says {width} x "
                             f"{height} for image id {self.ids[i]}, so its boxes would be misplaced; correct width, "
                             f"height and boxes, or copy the file that was annotated here")
        with self._named(i) if isinstance(image, Deferred) else nullcontext():          # which is read now
            if self.transforms:
                return self.transforms(image, target)
            return image.planes() if isinstance(image, Deferred) else image, target

    def image(self, i: int) -> Picture:
        """Image ``i`` before ``transforms``, upright: PIL, RGB or grey, or uint8 ``[C, H, W]`` for another number of
        ``channels``. Raises OSError with its name and id."""
        with self._named(i):
            return read_image(*self._file(i), self.channels)

    def _deferred(self, i: int) -> Picture:
        with self._named(i):
            return read_deferred(*self._file(i), self.channels, reduced=self.fast_images == "reduced")

    def _file(self, i: int) -> tuple[Path, bytes | None]:
        return self.image_folder / self.files[i], None if self._cache is None else self._cache[i]

    @contextmanager
    def _named(self, i: int) -> Iterator[None]:
        """What is wrong with the file of image ``i`` is said with its id."""
        try:
            yield
        except OSError as error:
            raise type(error)(f"{error} (image id {self.ids[i]} of {self.annotation_file})") from error

    def target(self, i: int) -> Target:
        """The target of image ``i`` before ``transforms``; boxes are corners in pixels."""
        objects = slice(int(self._starts[i]), int(self._starts[i + 1]))
        target: Target = {                              # clones: a view would send the whole tensor to another process
            "image_id": torch.tensor([self.ids[i]]),
            "boxes": self._boxes_xyxy[objects].clone(),
            "labels": self._labels[objects].clone(),
            "area": self._area[objects].clone(),
            "iscrowd": torch.zeros(objects.stop - objects.start, dtype=torch.int64),
            "orig_size": self.sizes[i].clone(),
            "size": self.sizes[i].clone(),
        }
        if self._segmentations is not None:
            height, width = self.sizes[i].tolist()
            target["masks"] = masks(self._segmentations[objects], height, width)
        if self._regions_xyxy is not None:
            regions = slice(int(self._region_starts[i]), int(self._region_starts[i + 1]))
            target["ignore"] = self._regions_xyxy[regions].clone()
        return target

    def labels_of_images(self) -> tuple[Tensor, ...]:
        """The labels of each image's objects, without reading anything."""
        return self._labels.split(self._starts.diff().tolist())

    def _check_files(self) -> None:
        there: dict[str, set[str]] = {}         # by folder: one call each, where asking file by file takes long
        missing = []
        for name, i in zip(self.files, self.ids):
            folder, last = os.path.split(name)
            if folder not in there:
                try:
                    there[folder] = set(os.listdir(self.image_folder / folder))
                except OSError:
                    there[folder] = set()
            if last not in there[folder] and not (self.image_folder / name).is_file():
                missing.append(f"{name} (image id {i})")
        if missing:
            raise FileNotFoundError(f"{len(missing)} of the {len(self)} images that {self.annotation_file} lists are "
                                    f"not in {self.image_folder}: {few(missing)}; copy them there (upper and lower case "
                                    f"differ), or take them out of {self.annotation_file.name}")

    def _class_table(self, rows: list[dict], categories: Sequence[Category] | None) -> list[Category]:
        table = class_table({row["id"]: row["name"] for row in rows})
        if categories is None:
            return table
        known = {(category.id, category.name) for category in categories}
        foreign = [f"{row.id} {row.name!r}" for row in table if (row.id, row.name) not in known]
        if foreign and sorted(row.name for row in table) == sorted(row.name for row in categories):
            own = {row.name: row.id for row in table}
            if is_main():
                print(f"{self.annotation_file}: the classes have other ids than in the class table to be used, and the "
                      f"same names, by which they are taken; outputs have this data's ids", flush=True)
            return [category._replace(id=own[category.name]) for category in categories]
        if foreign:
            raise OtherClasses(f"{self.annotation_file}: categories {few(foreign)} are not in the class table to be "
                               f"used, which has {few([f'{row.id} {row.name!r}' for row in categories], 8)}; training "
                               f"data, validation data and checkpoint must have the same ids and names")
        return list(categories)

    def _pack_objects(self, rows: list[dict], return_masks: bool) -> list[str]:
        """Annotations -> tensors over all images, in order of images; what there is to say."""
        place = {id: i for i, id in enumerate(self.ids)}
        difficult = sum(bool(row.get("difficult")) and not is_region(row) for row in rows)
        regions = [row for row in rows if self._is_no_object(row)]
        objects = [row for row in rows if not self._is_no_object(row)]
        notes = []
        if self.remove_difficult:
            notes.append(f"left out of the targets: {counted(difficult, 'object')} marked as difficult")
        ignored = sum(bool(row.get("ignore")) and not row["iscrowd"] for row in regions)
        if ignored:
            notes.append(f"left out of the targets: {counted(ignored, 'annotation')} with \"ignore\": 1")
        self._regions_xyxy: Tensor | None = None
        if self.ignore_regions:
            _, self._regions_xyxy, self._region_starts, _ = self._clipped(regions, place)
            if len(self._regions_xyxy):
                notes.append(f"{counted(len(self._regions_xyxy), 'region')} to be ignored")
        objects, self._boxes_xyxy, self._starts, dropped = self._clipped(objects, place)
        if dropped:
            notes.append(f"left out of the targets: {counted(len(dropped), 'box', 'boxes')} without width or height "
                         f"inside the image ({few(dropped)})")
        label = {category.id: category.label for category in self.categories}
        self._labels = torch.tensor([label[row["category_id"]] for row in objects], dtype=torch.int64)
        self._area = torch.tensor([row["area"] for row in objects], dtype=torch.float32)
        self._segmentations = Segmentations(row["segmentation"] for row in objects) if return_masks else None
        return notes

    def _clipped(self, rows: list[dict], place: dict[int, int]) -> tuple[list[dict], Tensor, Tensor, list[str]]:
        """Rows in order of images, corners inside the image, where each image's begin ``[images + 1]``, and by name
        those left out, which have no width or height there."""
        image = torch.tensor([place[row["image_id"]] for row in rows], dtype=torch.int64)
        image, order = image.sort(stable=True)
        rows = [rows[i] for i in order.tolist()]
        boxes_xyxy = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
        boxes_xyxy[:, 2:] += boxes_xyxy[:, :2]
        width_height = self.sizes.flip(1)[image]
        boxes_xyxy = torch.minimum(boxes_xyxy.clamp(min=0), width_height.repeat(1, 2))
        keep = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(1)
        kept: list[dict] = []
        dropped: list[dict] = []
        for row, inside in zip(rows, keep.tolist()):
            (kept if inside else dropped).append(row)
        counts = torch.bincount(image[keep], minlength=len(self))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return kept, boxes_xyxy[keep], starts, [row.get("source", f"annotation {row['id']}") for row in dropped]
