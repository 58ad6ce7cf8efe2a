#!/usr/bin/env python3
"""Pictures -> the same with boxes, names and scores, and a json of what was found.

    python scripts/predict.py photos 'more/**/*.jpg' one.png --resume outputs/tiny_deformable_detr/checkpoint.pth

SOURCE is an image, a glob in quotes (``**`` goes into folders), or a folder, of which the images directly in it are
taken. The output folder gets a picture for each image, of its own size and upright as its EXIF orientation says, and
``predictions.json``: a data set in COCO's format, whose annotations are also what pycocotools' ``loadRes`` takes:

    info            model, checkpoint, threshold, preprocessing
    images          id (place of the file in the sorted list), file_name (as found), width, height, picture
    categories      id, name: the data's own, from the checkpoint's class table
    annotations     id, image_id, category_id, category_name, bbox (left, top, width, height in pixels of the image, not
                    clipped, as in evaluation), area, score, iscrowd

Pictures and json hold the detections whose score is at least ``--threshold``; 0 keeps all. Images are prepared as in
evaluation, by the preprocessing inside the checkpoint. Batches of more than one image are padded to one size, which
changes the boxes of a model of ``--padding legacy`` a little, and not those of ``exact``. Images that cannot be read are
named and left out, and the exit code is then 1.

A model of ``--in_channels`` other than 3 reads images with as many channels; where that is neither 3 nor 1, ``.npy``
arrays ``[height, width, channels]`` are found in folders, too, and pictures show the first three channels.
"""
from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as command_line
from datasets.coco import COCO_CATEGORIES, class_table
from datasets.images import Picture, height_width, read_image
from datasets.transforms import Preprocessing, eval_transforms
from detr import checkpoint, config
from detr.backbone import backbone_of
from detr.presets import PRESETS
from detr.structures import Category, Detections
from detr.visualize import draw_detections
from engine import Progress

FORMATS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DEFAULT_FOLDER = Path("outputs", "predictions")


@dataclass(frozen=True)
class Detector:
    """A trained model with all that belongs to it."""
    model: nn.Module
    postprocessor: nn.Module
    categories: list[Category]
    preprocessing: Preprocessing
    name: str
    channels: int = 3               # of the images
    exact: bool = False             # whether padding of a batch leaves the boxes as they are

    @torch.no_grad()
    def __call__(self, images: Sequence[Picture]) -> list[Detections]:
        """Images as ``read_image`` gives them, padded to one batch -> the detections of each, boxes as corners in its
        pixels, on the CPU."""
        device = next(self.model.parameters()).device
        transforms = eval_transforms(self.preprocessing)
        outputs = self.model([transforms(image, {})[0].to(device) for image in images])
        sizes = torch.tensor([height_width(image) for image in images], device=device)
        return [{name: value.cpu() for name, value in found.items()} for found in self.postprocessor(outputs, sizes)]


def load_detector(path: str, model_name: str | None = None) -> Detector:
    """The model in a checkpoint, path or URL, ready to predict on the CPU.

    A checkpoint of this project has everything inside. One that holds weights alone, as published, is built as the
    preset ``model_name``, by default ``detr_resnet50`` where its shapes fit; its classes are COCO's where it has 91
    labels and otherwise have no names, and its preprocessing is the published one. Raises ValueError where file and
    model do not fit, and what ``checkpoint.load`` raises.
    """
    content = checkpoint.load(path)
    remembered = content.get("config", {})
    if not isinstance(remembered, dict) or "name" not in remembered:                    # of another program, or none
        remembered = {}
    name = model_name or remembered.get("name") or command_line.name_by_shapes(content["model"], path)
    if name not in PRESETS:
        raise ValueError(f"--model {name} is not known{config.nearest(name, PRESETS)}; known are {', '.join(PRESETS)}")
    if remembered and name != remembered["name"]:
        raise ValueError(f"--model {name}: {path} holds a {remembered['name']}; leave --model out")
    settings = config.replace(PRESETS[name].model, {**remembered.get("model", {}), "aux_loss": False})
    num_classes = content.get("num_classes") or command_line.classes_that_fit(settings, content["model"])
    if num_classes is None:
        raise ValueError(f"{path} says nothing of its number of classes, and with none would it fit {name}; give the "
                         f"--model that it was trained as, or use a checkpoint that main.py wrote")
    model, _, postprocessors = settings.build(num_classes)
    checkpoint.load_model(model, content["model"], path)
    categories = command_line.class_table(content) or (
        class_table(COCO_CATEGORIES) if num_classes == 91 else
        [Category(label, label, f"label {label}") for label in range(num_classes)])
    preprocessing = Preprocessing.from_dict(content["preprocessing"]) if "preprocessing" in content else Preprocessing()
    if not remembered:
        classes = "COCO's" if num_classes == 91 else f"{num_classes} without names"
        print(f"{path} holds weights alone: taken as {name}, classes {classes}, short side {preprocessing.size}",
              flush=True)
    return Detector(model.eval(), postprocessors["bbox"], categories, preprocessing, name, settings.in_channels,
                    backbone_of(model).exact)


def find_images(sources: Sequence[str], formats: Sequence[str] = FORMATS) -> list[Path]:
    """The image files that ``sources`` name, each once, sorted by path. In folders and globs, files whose names have no
    ending of ``formats`` are passed over, and hidden ones. Raises FileNotFoundError for a source without images."""
    found: dict[str, Path] = {}
    for source in sources:
        path = Path(source)
        if path.is_file():
            files = [path]
        else:
            inside = path.iterdir() if path.is_dir() else map(Path, glob.glob(source, recursive=True))
            files = [file for file in inside
                     if file.suffix.lower() in formats and not file.name.startswith(".") and file.is_file()]
        if not files:
            what = ("is a folder without images directly in it" if path.is_dir() else
                    "matches no images" if glob.has_magic(source) else "is not there")
            raise FileNotFoundError(f"{source} {what}; give image files, folders or globs in quotes, with files named "
                                    f"*{', *'.join(formats)}")
        found |= {os.path.abspath(file): file for file in files}
    return [found[place] for place in sorted(found)]


def output_folder(wanted: str | None) -> Path:
    """``--output_dir``, which must be new or empty, or a new folder ``outputs/predictions``, ``-2``, ``-3``, ..."""
    folder, number = Path(wanted or DEFAULT_FOLDER), 2
    if wanted is None:
        while folder.exists():
            folder, number = DEFAULT_FOLDER.with_name(f"{DEFAULT_FOLDER.name}-{number}"), number + 1
    elif folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"--output_dir {folder} already has files in it, and none are overwritten; name a new "
                              f"folder, or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A file name for the picture of each image: its own, as ``.jpg`` or ``.png``, numbered where it is taken; upper and
    lower case are the same to some systems."""
    taken, names = {"predictions.json"}, []
    for path in paths:
        ending = ".jpg" if path.suffix.lower() in (".jpg", ".jpeg") else ".png"
        name, number = path.stem + ending, 2
        while name.lower() in taken:
            name, number = f"{path.stem}-{number}{ending}", number + 1
        taken.add(name.lower())
        names.append(name)
    return names


def read_batches(paths: Sequence[Path], size: int, channels: int,
                 unreadable: list[Path]) -> Iterator[list[tuple[int, Picture]]]:
    """Batches of places in ``paths`` and images; those that cannot be read are reported and go to ``unreadable``."""
    for start in range(0, len(paths), size):
        batch = []
        for place in range(start, min(start + size, len(paths))):
            try:
                batch.append((place, read_image(paths[place], channels=channels)))
            except OSError as error:
                unreadable.append(paths[place])
                print(f"left out: {error}", flush=True)
        yield batch


def predict(detector: Detector, paths: Sequence[Path], folder: Path, threshold: float = 0.5, batch_size: int = 1,
            source: str = "") -> list[Path]:
    """Write pictures and ``predictions.json`` for ``paths`` to ``folder``; returns the files that could not be read.
    ``source`` is what the json says of the checkpoint."""
    names = {category.label: category.name for category in detector.categories}
    ids = {category.label: category.id for category in detector.categories}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    unreadable: list[Path] = []
    without_class: Counter[int] = Counter()
    pictures = picture_names(paths)
    progress = Progress("images")
    if detector.channels not in (1, 3):
        print(f"pictures show the first {'three ' if detector.channels > 3 else ''}of {detector.channels} channels",
              flush=True)
    batches = read_batches(paths, batch_size, detector.channels, unreadable)
    for batch in progress.over(batches, -(-len(paths) // batch_size), ()):
        progress.update({}, len(batch))
        for (place, image), found in zip(batch, detector([image for _, image in batch]) if batch else ()):
            if not all(found[name].isfinite().all() for name in ("scores", "boxes")):
                raise ValueError(f"{paths[place]}: the model's scores or boxes are not finite; look for the same in "
                                 f"the weights of {source or detector.name}")
            keep = found["scores"] >= threshold
            used = torch.tensor([label in names for label in found["labels"].tolist()], dtype=torch.bool)
            without_class.update(found["labels"][keep & ~used].tolist())
            scores, labels, boxes_xyxy = (found[name][keep & used] for name in ("scores", "labels", "boxes"))
            drawn = draw_detections(image, boxes_xyxy, labels, names, scores, min_side=0)
            drawn.save(folder / pictures[place], **({"quality": 95} if pictures[place].endswith(".jpg") else {}))
            height, width = height_width(image)
            images.append({"id": place + 1, "file_name": paths[place].as_posix(), "width": width, "height": height,
                           "picture": pictures[place]})
            boxes_xywh = torch.cat([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], dim=1)
            annotations += [{"id": len(annotations) + k, "image_id": place + 1, "category_id": ids[label],
                             "category_name": names[label], "bbox": box, "area": box[2] * box[3], "score": score,
                             "iscrowd": 0}
                            for k, (label, box, score) in enumerate(
                                zip(labels.tolist(), boxes_xywh.tolist(), scores.tolist()), start=1)]
    if without_class:
        print(f"left out: {without_class.total()} detections of labels that the data does not use "
              f"({', '.join(map(str, sorted(without_class)))})")
    info = {"model": detector.name, "checkpoint": source, "threshold": threshold,
            "preprocessing": detector.preprocessing.as_dict()}
    categories = [{"id": category.id, "name": category.name} for category in detector.categories]
    partial = folder / ".predictions.json.partial"
    partial.write_text(json.dumps({"info": info, "images": images, "categories": categories,
                                   "annotations": annotations}, indent=1))
    os.replace(partial, folder / "predictions.json")
    print(f"{len(annotations)} detections with a score of at least {threshold} on {len(images)} images: pictures and "
          f"predictions.json in {folder}", flush=True)
    return unreadable


def get_args_parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(description="Detect objects on pictures.", allow_abbrev=False)
    parser.add_argument("sources", nargs="+", metavar="SOURCE",
                        help="image, glob in quotes, or folder (the images directly in it)")
    parser.add_argument("--resume", required=True, metavar="CKPT", help="checkpoint, path or URL")
    parser.add_argument("--model", metavar="NAME", help="preset of a checkpoint that holds weights alone; default: "
                        f"detr_resnet50 where its shapes fit. One of {', '.join(PRESETS)}")
    parser.add_argument("--threshold", type=float, default=0.5,
                        help="least score of what is drawn and written; 0 keeps all (default: %(default)s)")
    parser.add_argument("--output_dir", metavar="DIR", help="new or empty folder to write to (default: a new one, "
                        f"{DEFAULT_FOLDER} or, where that is taken, {DEFAULT_FOLDER}-2, ...)")
    parser.add_argument("--device", help="'cuda', 'mps', 'cpu' (default: the first of them that is there)")
    parser.add_argument("--batch_size", type=int, default=1, help="images at a time; more than one changes the boxes "
                        "of a model of --padding legacy a little (default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> int:
    """The program's exit code: 1 where images could not be read."""
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold}: scores are between 0 and 1")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: at least 1 is needed")
    device = command_line.choose_device(args.device or "cuda", args.device is not None)
    detector = load_detector(args.resume, args.model)
    paths = find_images(args.sources, FORMATS if detector.channels in (1, 3) else (*FORMATS, ".npy"))
    detector.model.to(device)
    print(f"model: {detector.name}; images: {len(paths)}; threshold: {args.threshold}; device: {device}", flush=True)
    if args.batch_size > 1 and not detector.exact:
        print("images of a batch are padded to one size, which changes this model's boxes a little; --batch_size 1 does "
              "not", flush=True)
    unreadable = predict(detector, paths, output_folder(args.output_dir), args.threshold, args.batch_size, args.resume)
    if unreadable:
        print(f"{len(unreadable)} of {len(paths)} images could not be read: {', '.join(map(str, unreadable))}")
    return 1 if unreadable else 0


if __name__ == "__main__":
    try:
        sys.exit(main(get_args_parser().parse_args()))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
