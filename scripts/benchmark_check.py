#!/usr/bin/env python3
"""How long the check of annotations takes, of a made-up json as large as COCO's (118,000 images, 860,000 objects).

    python scripts/benchmark_check.py
    python scripts/benchmark_check.py --images 11800 --objects 86000 --points 0

    load        from the file's bytes to Python objects (the standard library's json)
    examine     looking for faults, without and, where there are polygons, with --masks, which looks at all of their
                coordinates
    check       with --files, all of it as before a training, a validation part of 5,000 images included: without the
                images' headers, with them, and again, from the cache; stand-ins for the images are made in the temporary
                folder, a gigabyte

Seconds of the processor's time and, in brackets, of the clock.
"""
from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.annotations import read_json
from datasets.check import check
from datasets.examination import examine
from datasets.formats import Format, Split

VAL = 5000                                  # images of the validation part
WIDTH, HEIGHT = 640, 480


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000, help="of the json")
    parser.add_argument("--objects", type=int, default=860_000, help="of all images together")
    parser.add_argument("--points", type=int, default=20, help="of each object's polygon; 0 leaves segmentations out")
    parser.add_argument("--files", action="store_true", help="time the whole check, too")
    parser.add_argument("--seed", type=int, default=0, help="of what is made up")
    return parser


def some_annotations(images: int, objects: int, points: int, seed: int) -> dict[str, Any]:
    """Data in COCO's form: boxes inside images of 640 x 480, 80 classes."""
    random = np.random.RandomState(seed)
    low = random.rand(objects, 2) * (500, 350)
    extent = 2 + random.rand(objects, 2) * (130, 120)
    boxes = np.hstack([low, extent]).round(2)
    rows = [{"id": i + 1, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": 0}
            for i, (image, category, box, area) in enumerate(zip(
                random.randint(1, images + 1, objects).tolist(), random.randint(1, 81, objects).tolist(), boxes.tolist(),
                extent.prod(1).round(2).tolist()))]
    if points:
        for row in rows:
            polygon = row["bbox"][:2] * points
            polygon[0] += 1.25
            row["segmentation"] = [polygon]
    return {"images": [{"id": i, "file_name": f"{i:012}.jpg", "width": WIDTH, "height": HEIGHT}
                       for i in range(1, images + 1)],
            "annotations": rows, "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 81)]}


def make_files(folder: Path, images: int, seed: int) -> None:
    """Stand-ins for JPEGs, of their sizes: a grey picture with an EXIF header, then a hole with a few bytes in it."""
    folder.mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1
    content = io.BytesIO()
    Image.new("L", (WIDTH, HEIGHT)).save(content, "JPEG", exif=exif)
    for i, size in enumerate(np.random.RandomState(seed).randint(40_000, 300_000, images).tolist(), 1):
        with open(folder / f"{i:012}.jpg", "wb") as file:
            file.write(content.getvalue())
            file.seek(size // 2)
            file.write(f"{seed} {i}".encode())
            file.truncate(size)


def timed(what: str, work: Callable[[], Any]) -> Any:
    """What ``work`` returns; prints how long it takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    print(f"    {what:<28}{time.process_time() - cpu:7.2f} s  ({time.perf_counter() - wall:.2f})", flush=True)
    return result


def main(args: argparse.Namespace) -> None:
    """Make the data and print the times."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        content = json.dumps(some_annotations(args.images, args.objects, args.points, args.seed)).encode()
        file, images = folder / "instances_train2017.json", folder / "train2017"
        file.write_bytes(content)
        print(f"{args.images} images, {args.objects} objects, polygons of {args.points} points, "
              f"{len(content) / 1e6:.0f} MB of json")
        del content
        data = timed("load", lambda: read_json(file))
        for masks in (False, True) if args.points else (False,):
            examined = timed("examine, with --masks" if masks else "examine", partial(examine, data, masks))
            assert not [finding for finding in examined.findings if finding.action == "stop"], examined.findings
        del data, examined
        if not args.files:
            return
        make_files(images, args.images, args.seed)
        small = folder / "instances_val2017.json"
        small.write_text(json.dumps(some_annotations(VAL, 7 * VAL, args.points, args.seed + 1)))
        make_files(folder / "val2017", VAL, args.seed + 1)
        of = Format("COCO", {"train": Split(file, images, partial(read_json, file)),
                             "val": Split(small, folder / "val2017", partial(read_json, small))})
        timed("check, without headers", lambda: check(of, headers=False))
        report = timed("check", lambda: check(of))
        assert not report.stops and not report.cached, report.stops
        report = timed("check, from the cache", lambda: check(of))
        assert report.cached


if __name__ == "__main__":
    main(get_args_parser().parse_args())
