#!/usr/bin/env python3
"""Memory of the workers of a DataLoader over epochs, with annotations of the size of COCO's.

    python scripts/benchmark_memory.py
    python scripts/benchmark_memory.py --images 20000 --workers 8 --epochs 4

A json of synthetic annotations with polygons is written, 860 objects on 118 images as COCO has; no image exists, a grey
one stands in for each. Printed is, after each epoch, the memory of all processes together, each page that several of them
share counted once (the sum of their proportional set sizes, PSS, of /proc/<pid>/smaps_rollup, which Linux has), for

    flat            datasets.coco.CocoDetection
    list            the plain way: the json's rows in a list for each image

Targets are read with their masks' polygons; masks are not drawn. Workers live as long as the DataLoader, over all epochs.
"""
from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.coco import CocoDetection

OBJECTS = 860 / 118                         # on an image
SIZE = (64, 48)                             # width, height
GREY = Image.new("RGB", SIZE, (127, 127, 127))


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Memory of DataLoader workers over epochs.")
    parser.add_argument("--images", type=int, default=118_000, help="images of the json (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="processes (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over all images (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=("flat", "list"), default=["flat", "list"], help="default: both")
    parser.add_argument("--start", choices=("fork", "spawn", "forkserver"), default="fork",
                        help="how workers are started (default: %(default)s)")
    return parser


def write_json(path: Path, count: int) -> int:
    """A json of ``count`` images; the number of its objects. Polygons of 8 to 30 points, as COCO's."""
    draw = random.Random(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(1, count + 1):
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "width": SIZE[0], "height": SIZE[1]})
        for _ in range(int(OBJECTS) + (draw.random() < OBJECTS % 1)):
            x, y = draw.randrange(40), draw.randrange(30)
            polygon = [round(draw.uniform(0, 16), 2) + (x, y)[k % 2] for k in range(2 * draw.randint(8, 30))]
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": draw.randint(1, 80),
                                "bbox": [x, y, 16, 16], "area": 200.5, "iscrowd": 0, "segmentation": [polygon]})
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return len(annotations)


class Flat(CocoDetection):
    """``CocoDetection`` without image files, and with polygons in place of masks."""

    def _check_files(self) -> None:
        pass

    def image(self, i: int) -> Any:
        return GREY

    def __getitem__(self, i: int) -> Any:
        objects = slice(int(self._starts[i]), int(self._starts[i + 1]))
        segmentations = self._segmentations[objects] if self._segmentations is not None else []
        return i, self.files[i], len(self.target_of_boxes(i)["labels"]), sum(map(len, segmentations))

    def target_of_boxes(self, i: int) -> Any:
        """The target without drawing masks."""
        kept, self._segmentations = self._segmentations, None
        try:
            return self.target(i)
        finally:
            self._segmentations = kept


class Plain(Dataset):
    """Rows of the json, in a list for each image."""

    def __init__(self, path: Path) -> None:
        data = json.loads(path.read_text())
        rows: dict[int, list[dict]] = {image["id"]: [] for image in data["images"]}
        for row in data["annotations"]:
            rows[row["image_id"]].append(row)
        self.items = [{**image, "annotations": rows[image["id"]]} for image in data["images"]]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        item = self.items[i]
        polygons = sum(len(row["segmentation"]) for row in item["annotations"])
        for row in item["annotations"]:
            sum(row["bbox"]) + row["category_id"] + sum(map(sum, row["segmentation"]))     # looked at, as training does
        return i, item["file_name"], len(item["annotations"]), polygons


def family() -> list[int]:
    """This process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path("/proc", entry, "stat").read_text()
        except OSError:
            continue                                                    # ended meanwhile
        parents.setdefault(int(stat.rsplit(")", 1)[1].split()[1]), []).append(int(entry))
    found = [os.getpid()]
    for pid in found:
        found += parents.get(pid, [])
    return found


def proportional_memory() -> float:
    """GB of all processes of this program, shared pages counted once."""
    total = 0
    for pid in family():
        try:
            lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024 / 1e9


def keep(batch: list[Any]) -> list[Any]:
    return batch


def measure(dataset: Any, args: argparse.Namespace) -> list[float]:
    loader = DataLoader(dataset, args.batch_size, shuffle=True, num_workers=args.workers, persistent_workers=True,
                        collate_fn=keep, multiprocessing_context=args.start)
    found = []
    for _ in range(args.epochs):
        objects = sum(item[2] for batch in loader for item in batch)
        found.append(proportional_memory())
    assert objects > 0
    return found


def report(name: str, path: Path, args: argparse.Namespace) -> None:
    """Open the data one way, and print its memory."""
    before, start = proportional_memory(), time.process_time()
    dataset = Flat(path.parent, path, return_masks=True) if name == "flat" else Plain(path)
    opened, seconds = proportional_memory(), time.process_time() - start
    try:
        later = ", ".join(f"{value:.2f}" for value in measure(dataset, args))
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
    print(f"{name}: before {before:.2f}, opened {opened:.2f} ({seconds:.1f} s of one core), then {later}", flush=True)


def main(args: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", "This DataLoader will create")        # more workers than cores is what is asked for
    if not Path("/proc/self/smaps_rollup").is_file():
        sys.exit("error: /proc/self/smaps_rollup is not there; proportional memory is known on Linux alone")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        objects = write_json(path, args.images)
        gc.collect()
        print(f"{args.images} images, {objects} objects, json of {path.stat().st_size / 1e6:.0f} MB; {args.workers} "
              f"workers ({args.start}); GB of all processes after each epoch", flush=True)
        for name in args.ways:
            process = os.fork()                                         # each way starts with a memory of its own
            if process == 0:
                try:
                    report(name, path, args)
                    os._exit(0)
                finally:
                    os._exit(1)
            if os.waitpid(process, 0)[1]:
                sys.exit(f"error: {name} did not end well; what it said stands above")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
