#!/usr/bin/env python3
"""Pictures -> the same with boxes, names and scores, masks or panoptic maps, and a json of what was found.

    python scripts/predict.py photos 'more/**/*.jpg' one.png --resume outputs/tiny_deformable_detr/checkpoint.pth

SOURCE is an image, a glob in quotes (``**`` goes into folders), or a folder, of which the images directly in it are
taken. The output folder gets a picture for each image, of its own size and upright as its EXIF orientation says, and
``predictions.json``: a data set in COCO's format, whose annotations are also what pycocotools' ``loadRes`` takes:

    info            model, checkpoint, threshold, preprocessing
    images          id (place of the file in the sorted list), file_name (as found), width, height, picture
    categories      id, name: the data's own, from the checkpoint's class table
    annotations     id, image_id, category_id, category_name, bbox (left, top, width, height in pixels of the image, not
                    clipped, as in evaluation), area, score, iscrowd; of mask models also segmentation (compressed
                    run-length code), whose pixels area then counts

Panoptic models, which are mask models trained on panoptic data, write maps instead: pictures with their segments, and
``panoptic.json`` with ``panoptic/*.png`` in COCO's panoptic format: info, images and categories (with isthing) as above,
and

    annotations     image_id, file_name (in panoptic/), segments_info: id, category_id, category_name, isthing, iscrowd,
                    bbox, area. The PNG's colours are ids, R + 256 G + 256^2 B; 0 is void

Pictures and json hold the detections whose score is at least ``--threshold``; 0 keeps all. Of a panoptic map it is the
score that queries must exceed to take part in it. Images are prepared as in evaluation, by the preprocessing inside the
checkpoint. Batches of more than one image are padded to one size, which changes the boxes of a model of ``--padding
legacy`` a little, and not those of ``exact``. Images that cannot be read are named and left out, and the exit code is
then 1.

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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as command_line
from datasets.coco_panoptic import encode_ids, read_ids
from datasets.images import Picture, height_width, read_image
from detr.loading import Detector
from detr.loading import load as load_detector
from detr.panoptic import PanopticPrediction
from detr.presets import PRESETS
from detr.structures import Category, Detections
from detr.visualize import draw_detections, draw_panoptic
from engine import Progress

FORMATS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DEFAULT_FOLDER = Path("outputs", "predictions")
THRESHOLD = 0.5


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


def draw_found(image: Picture, found: Detections, threshold: float, categories: dict[int, Category],
               without_class: Counter[int]) -> tuple[Image.Image, list[dict[str, Any]]]:
    """A picture of the detections of at least ``threshold``, and their rows for the json. Labels that are not in
    ``categories`` are left out and counted."""
    keep = found["scores"] >= threshold
    used = torch.tensor([label in categories for label in found["labels"].tolist()], dtype=torch.bool)
    without_class.update(found["labels"][keep & ~used].tolist())
    scores, labels, boxes_xyxy = (found[name][keep & used] for name in ("scores", "labels", "boxes"))
    masks = None
    if "masks" in found:
        masks = [mask for mask, wanted in zip(found["masks"], (keep & used).tolist()) if wanted]
    names = {label: category.name for label, category in categories.items()}
    picture = draw_detections(image, boxes_xyxy, labels, names, scores, min_side=0, masks=masks)
    boxes_xywh = torch.cat([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], dim=1)
    rows = [{"category_id": categories[label].id, "category_name": names[label], "bbox": box, "area": box[2] * box[3],
             "score": score, "iscrowd": 0}
            for label, box, score in zip(labels.tolist(), boxes_xywh.tolist(), scores.tolist())]
    for row, mask in zip(rows, masks or ()):
        row |= {"segmentation": mask, "area": int(coco_mask.area(mask))}
    return picture, rows


def draw_map(image: Picture, found: PanopticPrediction, categories: dict[int, Category],
             without_class: Counter[int]) -> tuple[Image.Image, np.ndarray, list[dict[str, Any]]]:
    """A picture of a panoptic map, its ids ``[H, W]``, and their segments for the json, counted from 1. Labels that are
    not in ``categories`` are left out and counted, and become void."""
    without_class.update(segment["category_id"] for segment in found["segments_info"]
                         if segment["category_id"] not in categories)
    known = [segment for segment in found["segments_info"] if segment["category_id"] in categories]
    before, ids = read_ids("", "the predicted map", found["png_string"]), np.zeros(height_width(image), np.int64)
    rows, shown = [], []
    for number, segment in enumerate(known, start=1):
        inside = before == segment["id"]
        ids[inside] = number
        x, y = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
        category = categories[segment["category_id"]]
        rows.append({"id": number, "category_id": category.id, "category_name": category.name,
                     "isthing": int(category.isthing), "iscrowd": 0, "area": int(inside.sum()),
                     "bbox": [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)]})
        shown.append({"id": number, "category_id": category.label, "isthing": category.isthing})
    names = {label: category.name for label, category in categories.items()}
    return draw_panoptic(image, ids, shown, names, min_side=0), ids, rows


def predict(detector: Detector, paths: Sequence[Path], folder: Path, threshold: float = THRESHOLD,
            batch_size: int = 1) -> list[Path]:
    """Write pictures and json (and of panoptic models PNGs) for ``paths`` to ``folder``; returns the files that could not
    be read."""
    categories = {category.label: category for category in detector.categories}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    unreadable: list[Path] = []
    without_class: Counter[int] = Counter()
    pictures, panoptic = picture_names(paths), "panoptic" in detector.postprocessors
    maps = picture_names([path.with_suffix(".png") for path in paths])                  # a.jpg and a.png have two
    if panoptic:
        (folder / "panoptic").mkdir()
    progress = Progress("images")
    if detector.channels not in (1, 3):
        print(f"pictures show the first {'three ' if detector.channels > 3 else ''}of {detector.channels} channels",
              flush=True)
    batches = read_batches(paths, batch_size, detector.channels, unreadable)
    for batch in progress.over(batches, -(-len(paths) // batch_size), ()):
        progress.update({}, len(batch))
        if not batch:
            continue
        seen = detector.look([image for _, image in batch])
        detector.check_finite(seen, [str(paths[place]) for place, _ in batch])
        results = detector.maps(seen, threshold) if panoptic else detector.detections(seen, threshold)
        for (place, image), found in zip(batch, results):
            if panoptic:
                drawn, ids, segments = draw_map(image, found, categories, without_class)
                (folder / "panoptic" / maps[place]).write_bytes(encode_ids(ids))
                annotations.append({"image_id": place + 1, "file_name": maps[place], "segments_info": segments})
            else:
                drawn, rows = draw_found(image, found, threshold, categories, without_class)
                annotations += [{"id": k, "image_id": place + 1, **row}
                                for k, row in enumerate(rows, start=len(annotations) + 1)]
            drawn.save(folder / pictures[place], **({"quality": 95} if pictures[place].endswith(".jpg") else {}))
            height, width = height_width(image)
            images.append({"id": place + 1, "file_name": paths[place].as_posix(), "width": width, "height": height,
                           "picture": pictures[place]})
    if without_class:
        print(f"left out: {without_class.total()} {'segments' if panoptic else 'detections'} of labels that the data "
              f"does not use ({', '.join(map(str, sorted(without_class)))})")
    info = {"model": detector.name, "checkpoint": detector.source, "threshold": threshold,
            "preprocessing": detector.preprocessing.as_dict()}
    kinds = [{"id": category.id, "name": category.name, **({"isthing": int(category.isthing)} if panoptic else {})}
             for category in detector.categories]
    name = "panoptic.json" if panoptic else "predictions.json"
    partial = folder / f".{name}.partial"
    partial.write_text(json.dumps({"info": info, "images": images, "categories": kinds, "annotations": annotations},
                                  indent=1))
    os.replace(partial, folder / name)
    what = f"{len(annotations)} detections with a score of at least {threshold} on {len(images)} images: pictures and"
    if panoptic:
        what = (f"{sum(len(row['segments_info']) for row in annotations)} segments with a score above {threshold} on "
                f"{len(images)} images: pictures, panoptic/*.png and")
    print(f"{what} {name} in {folder}", flush=True)
    return unreadable


def get_args_parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(description="Detect objects on pictures.", allow_abbrev=False)
    parser.add_argument("sources", nargs="+", metavar="SOURCE",
                        help="image, glob in quotes, or folder (the images directly in it)")
    parser.add_argument("--resume", required=True, metavar="CKPT", help="checkpoint, path or URL")
    parser.add_argument("--model", metavar="NAME", help="preset of a checkpoint that holds weights alone; default: "
                        f"detr_resnet50 where its shapes fit. One of {', '.join(PRESETS)}")
    parser.add_argument("--threshold", type=float, help="least score of what is drawn and written; 0 keeps all (default: "
                        f"{THRESHOLD}; of panoptic models the one of their --panoptic_threshold)")
    parser.add_argument("--output_dir", metavar="DIR", help="new or empty folder to write to (default: a new one, "
                        f"{DEFAULT_FOLDER} or, where that is taken, {DEFAULT_FOLDER}-2, ...)")
    parser.add_argument("--device", help="'cuda', 'mps', 'cpu' (default: the first of them that is there)")
    parser.add_argument("--batch_size", type=int, default=1, help="images at a time; more than one changes the boxes "
                        "of a model of --padding legacy a little (default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> int:
    """The program's exit code: 1 where images could not be read."""
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold}: scores are between 0 and 1")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: at least 1 is needed")
    device = command_line.choose_device(args.device or "cuda", args.device is not None)
    detector = load_detector(args.resume, model=args.model)
    paths = find_images(args.sources, FORMATS if detector.channels in (1, 3) else (*FORMATS, ".npy"))
    detector.to(device)
    threshold = args.threshold
    if threshold is None:
        panoptic = detector.postprocessors.get("panoptic")
        threshold = THRESHOLD if panoptic is None else panoptic.threshold
    print(f"model: {detector.name}; images: {len(paths)}; threshold: {threshold}; device: {device}", flush=True)
    if args.batch_size > 1 and not detector.exact:
        print("images of a batch are padded to one size, which changes this model's boxes a little; --batch_size 1 does "
              "not", flush=True)
    unreadable = predict(detector, paths, output_folder(args.output_dir), threshold, args.batch_size)
    if unreadable:
        print(f"{len(unreadable)} of {len(paths)} images could not be read: {', '.join(map(str, unreadable))}")
    return 1 if unreadable else 0


if __name__ == "__main__":
    try:
        sys.exit(main(get_args_parser().parse_args()))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
