#!/usr/bin/env python3
"""Pictures and videos -> the same with boxes, names and scores, masks or panoptic maps, and files of what was found.

    python scripts/predict.py photos 'more/**/*.jpg' one.png --resume outputs/tiny_deformable_detr/checkpoint.pth
    python scripts/predict.py clip.mp4 --resume CKPT --format video csv --classes car truck --threshold 0.5,truck=0.3

SOURCE is an image; a folder, of which the images directly in it are taken; a zip, of which all are; a video; a glob in
quotes for any of them (``**`` goes into folders); ``camera:0``; the address of a stream (``rtsp://...``); or ``-``,
standard input: one image's bytes, or a path a line. Images of files, folders and globs come first, sorted by path, the
others in the order given, and all go through one by one (or batch by batch): memory does not grow with their number.

The output folder gets, of ``--format``, by default ``pictures json``, and of videos ``video json``:

    pictures    each image with what was found, of its own size and upright as its EXIF orientation says; of a video's
                frames, in a folder of its name
    video       of each video an mp4 of the same size, with the same frames at the same times, without sound
    json        ``predictions.json``, see below
    yolo        ``labels/NAME.txt`` of each image, a row a detection: class cx cy w h score, the box in fractions of the
                image and cut at its borders; ``classes.txt`` and ``data.yaml`` have the names
    csv         ``predictions.csv``, a row a detection: file_name, frame, seconds, image_width, image_height, category_id,
                class, score, xmin, ymin, xmax, ymax, in pixels

``predictions.json`` is a data set in COCO's format, whose annotations are also what pycocotools' ``loadRes`` takes:

    info            model, checkpoint, threshold, preprocessing, and whatever was chosen besides
    images          id (place in the source, from 1), file_name (as found; photos.zip/a.jpg; clip.mp4#12, frames counted
                    from 0), width, height; picture and labels, the files written for it; of videos frame and seconds
    categories      id, name: the data's own, from the checkpoint's class table
    annotations     id, image_id, category_id, category_name, bbox (left, top, width, height in pixels of the image, not
                    clipped, as in evaluation), area, score, iscrowd; of mask models also segmentation (compressed
                    run-length code), whose pixels area then counts

Panoptic models, which are mask models trained on panoptic data, write maps instead: pictures and videos with their
segments, and ``panoptic.json`` with ``panoptic/*.png`` in COCO's panoptic format: info, images and categories (with
isthing) as above, and

    annotations     image_id, file_name (in panoptic/), segments_info: id, category_id, category_name, isthing, iscrowd,
                    bbox, area. The PNG's colours are ids, R + 256 G + 256^2 B; 0 is void

All of them hold the detections whose score is at least ``--threshold``; 0 keeps all. Of a panoptic map it is the score
that queries must exceed to take part in it. Images are prepared as in evaluation, by the preprocessing inside the
checkpoint. Batches of more than one image are padded to one size, which changes the boxes of a model of ``--padding
legacy`` a little, and not those of ``exact``. Images and frames that cannot be read are named and left out, and the exit
code is then 1. Ctrl-C ends after the batch at hand, with whole files of what was seen; it is how a camera is ended.

A model of ``--in_channels`` other than 3 reads images with as many channels; where that is neither 3 nor 1, ``.npy``
arrays ``[height, width, channels]`` are found in folders, too, and pictures show the first three channels.
"""
from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as command_line
from datasets.coco_panoptic import encode_ids, read_ids
from datasets.images import Picture, height_width, read_image
from detr.boxes import box_xyxy_to_xywh
from detr.checkpoint import remove_partials
from detr.config import nearest
from detr.cuda_graphs import NotRecorded
from detr.loading import Detector, NamedDetections
from detr.loading import load as load_detector
from detr.panoptic import PanopticPrediction
from detr.presets import PRESETS
from detr.sources import FORMATS, Item, Source, Video, sources
from detr.structures import Category, Detections, selected
from detr.tiles import OVERLAP
from detr.visualize import draw_detections, draw_panoptic
from detr.writers import CocoJson, Csv, Names, VideoFile, Yolo, stem_of
from engine import duration

WRITTEN = ("pictures", "video", "json", "yolo", "csv")
DEFAULT_FOLDER = Path("outputs", "predictions")
THRESHOLD = 0.5
MOST_PIXELS = 1_000_000_000                                                 # of an image that is seen in tiles
MOST_NAMED = 20                                                             # of what cannot be read, at the end


@dataclass(frozen=True)
class Choice:
    """What is looked for, and what is written of it; see the flags of these names."""
    threshold: float = THRESHOLD
    thresholds: Mapping[str, float] = field(default_factory=dict)       # of single classes, by name
    batch_size: int = 1
    format: Sequence[str] | None = None
    classes: Sequence[str] | None = None
    nms: float | None = None
    one_label_per_query: bool = False
    tile: int | None = None
    overlap: float | None = None
    whole: bool = False

    def words(self) -> dict[str, Any]:
        """Of ``Detector.predict``."""
        return {"threshold": min([self.threshold, *self.thresholds.values()]), "batch_size": self.batch_size,
                **{name: getattr(self, name) for name in ("classes", "nms", "one_label_per_query", "tile", "overlap",
                                                          "whole")}}

    def formats(self, source: Source) -> Sequence[str]:
        """Those that this source has."""
        if self.format is None:
            return ("video" if source.is_video else "pictures"), "json"
        return [name for name in self.format if name != "video" or source.is_video]


def parse_threshold(text: str) -> tuple[float | None, dict[str, float]]:
    """``0.5``, ``cat=0.3`` or ``0.5,cat=0.3,dog=0.7`` -> that of all, and those of single classes."""
    entry = r"(?:([^=]+)=)??((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-?[0-9]+)?)"                # a name may have commas
    if not re.fullmatch(f"{entry}(?:,{entry})*", text):
        raise ValueError(f"--threshold {text}: a number is needed, 0.5, or with classes of their own 0.5,cat=0.3")
    general, single = None, {}
    for name, value in re.findall(f"(?:^|,){entry}(?=,|$)", text):
        if not 0 <= float(value) <= 1:
            raise ValueError(f"--threshold {text}: scores are between 0 and 1")
        name = name.strip()
        if name in single or not name and general is not None:
            raise ValueError(f"--threshold {text}: {name or 'that of all classes'} is there twice; give each "
                             f"once, as in 0.5,cat=0.3")
        if name:
            single[name] = float(value)
        else:
            general = float(value)
    return general, single


def output_folder(wanted: str | None) -> Path:
    """``--output_dir``, which must be new or empty, or a new folder ``outputs/predictions``, ``-2``, ``-3``, ..."""
    folder, number = Path(wanted or DEFAULT_FOLDER), 2
    if wanted is not None:
        remove_partials(folder)
    if wanted is None:
        while folder.exists():
            folder, number = DEFAULT_FOLDER.with_name(f"{DEFAULT_FOLDER.name}-{number}"), number + 1
    elif folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"--output_dir {folder} already has files in it, and none are overwritten; name a new "
                              f"folder, or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find(wanted: Sequence[str | Path], channels: int = 3) -> list[Source]:
    """The sources of pictures for a model with so many input channels; see ``detr.sources``."""
    return sources([str(source) for source in wanted], read_image, FORMATS if channels in (1, 3) else (*FORMATS, ".npy"))


# What was found in one image.

def rows_of(found: Detections, categories: Mapping[int, Category]) -> list[dict[str, Any]]:
    """Detections as they are written."""
    rows = [{"category_id": categories[label].id, "category_name": categories[label].name, "bbox": box,
             "area": box[2] * box[3], "score": score, "iscrowd": 0}
            for label, box, score in zip(found["labels"].tolist(), box_xyxy_to_xywh(found["boxes"]).tolist(),
                                         found["scores"].tolist())]
    for row, mask in zip(rows, found.get("masks", ())):
        row |= {"segmentation": mask, "area": int(coco_mask.area(mask))}
    return rows


def segments_of(image: Picture, found: PanopticPrediction, categories: Mapping[int, Category],
                without_class: Counter[int]) -> tuple[np.ndarray, list[dict[str, Any]], list[dict[str, Any]]]:
    """A panoptic map's ids ``[H, W]``, its segments as they are written, counted from 1, and as they are drawn. Labels
    that are not in ``categories`` are left out and counted, and become void."""
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
    return ids, rows, shown


class Output:
    """The files in the output folder; each detection goes to all of them at once."""

    def __init__(self, folder: Path, detector: Detector, choice: Choice, wanted: Sequence[Source]) -> None:
        self.folder, self.panoptic = folder, "panoptic" in detector.postprocessors
        self.categories = {category.label: category for category in detector.categories}
        self.names = {label: category.name for label, category in self.categories.items()}
        self.taken, self.maps = Names("predictions.json", "panoptic.json", "panoptic", "labels"), Names()
        self.images, self.found, self.without_class = 0, 0, Counter[int]()
        self.video: VideoFile | None = None
        self.videos: list[str] = []
        formats = {name for source in wanted for name in choice.formats(source)}
        info = {"model": detector.name, "checkpoint": detector.source, "threshold": choice.threshold,
                "preprocessing": detector.preprocessing.as_dict()}
        plain = asdict(Choice())
        info |= {name: value for name, value in asdict(choice).items()
                 if name not in ("threshold", "batch_size", "format") and value != plain[name]}
        kinds = [{"id": category.id, "name": category.name,
                  **({"isthing": int(category.isthing)} if self.panoptic else {})} for category in detector.categories]
        name = "panoptic.json" if self.panoptic else "predictions.json"
        self.json = CocoJson(folder / name, info, kinds) if "json" in formats else None
        self.csv = Csv(folder / "predictions.csv") if "csv" in formats else None
        self.yolo = Yolo(folder, detector.categories) if "yolo" in formats else None
        if self.panoptic and self.json:
            (folder / "panoptic").mkdir()
        self.written = [what for what, there in (
            ("pictures", "pictures" in formats), ("panoptic/*.png", self.panoptic and self.json),
            ("labels/*.txt", self.yolo), ("predictions.csv", self.csv), (name, self.json)) if there]

    def add(self, item: Item, place: int, found: Any, formats: Sequence[str]) -> None:
        """What was found in the picture of ``item``, the ``place``-th of all."""
        image = item.picture
        assert image is not None
        height, width = height_width(image)
        row: dict[str, Any] = {"id": place, "file_name": item.name, "width": width, "height": height}
        rows: list[dict[str, Any]]
        if self.panoptic:
            ids, segments, shown = segments_of(image, found, self.categories, self.without_class)
            self.found += len(segments)
            rows = [{"image_id": place, "file_name": "", "segments_info": segments}]
        else:
            rows = [{"id": k, "image_id": place, **one}
                    for k, one in enumerate(rows_of(found, self.categories), start=self.found + 1)]
            self.found += len(rows)
        if item.clip is not None:
            row |= {"frame": item.frame, "seconds": round(float(item.pts * item.clip.time_base), 6)}
        if "pictures" in formats or "video" in formats:
            drawn = draw_panoptic(image, ids, shown, self.names, min_side=0) if self.panoptic else draw_detections(
                image, found["boxes"], found["labels"], self.names, found["scores"], min_side=0, masks=found.get("masks"))
            if "pictures" in formats:
                row["picture"] = self.taken.of(item)
                save(drawn, self.folder / row["picture"])
            if "video" in formats:
                self.frame(drawn, item)
        if self.yolo is not None:
            file = self.taken.of(item, ".txt")
            row["labels"] = f"labels/{file}"
            self.yolo.add(file, row, rows)
        if self.json is not None:
            if self.panoptic:
                rows[0]["file_name"] = self.maps.of(item, ".png")
                file = self.folder / "panoptic" / rows[0]["file_name"]
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(encode_ids(ids))
            self.json.add(row, rows)
        if self.csv is not None:
            self.csv.add(row, rows)
        self.images += 1

    def frame(self, drawn: Image.Image, item: Item) -> None:
        """Write a frame to the video of its clip, which it begins where it is the first."""
        assert item.clip is not None
        if self.video is None:
            name = self.taken.unique(stem_of(item.clip.name), ".mp4")
            self.video = VideoFile(self.folder / name, item.clip, drawn.size)
            self.videos.append(name)
        self.video.add(drawn, item.pts)

    def end_of_source(self) -> None:
        """Its video is whole."""
        if self.video is not None:
            self.video.close()
            print(f"{self.videos[-1]}: {self.video.described()}", flush=True)
            self.video = None

    def close(self) -> None:
        self.end_of_source()
        for writer in (self.json, self.csv):
            if writer is not None:
                writer.close()

    def discard(self) -> None:
        """Leave nothing that is not whole."""
        for writer in (self.json, self.csv, self.video):
            if writer is not None:
                writer.discard()


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    picture.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


# All of them.

class Progress:
    """A line every ten seconds, and one at the end, also where the number of images is not known before."""

    def __init__(self, title: str, length: int | None, every: float = 10.0) -> None:
        self.title, self.length, self.every, self.done = title, length, every, 0
        self.start = self.last = time.perf_counter()

    def update(self, done: int = 0, end: bool = False) -> None:
        self.done += done
        now = time.perf_counter()
        if end or now - self.last >= self.every:
            self.last, seconds = now, max(now - self.start, 1e-9)
            of = f"/{self.length}" if self.length else ""
            left = f", {duration(seconds / self.done * max(0, self.length - self.done))} left" \
                if self.length and self.done else ""
            print(f"{self.title} {self.done}{of}  {self.done / seconds:.1f} a second  {duration(seconds)}{left}",
                  flush=True)


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@contextmanager
def large_images(wanted: bool) -> Iterator[None]:
    """Where ``wanted``, Pillow reads images of up to ``MOST_PIXELS``, without a word; otherwise it refuses those of more
    than 0.18e9, which may be small files made to fill the memory."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        if wanted:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2                                   # it refuses twice that
            print(f"--tile: images of up to {MOST_PIXELS:,} pixels are read, of 3 bytes each", flush=True)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


@contextmanager
def until_interrupted() -> Iterator[list[int]]:
    """A list that Ctrl-C puts something into; pressed again, it is KeyboardInterrupt as always."""
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        signal.signal(signal.SIGINT, before)
        print("stopping after this batch; press Ctrl-C again to stop at once and keep nothing of json, csv and video",
              flush=True)
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def predict(detector: Detector, wanted: Sequence[Source], folder: Path, choice: Choice) -> tuple[list[str], int, bool]:
    """Write what ``choice`` wants of all ``wanted`` to ``folder``. Returns the names of what could not be read, how many
    pictures there were with them, and whether Ctrl-C ended it before the end."""
    if detector.channels not in (1, 3):
        print(f"pictures show the first {'three ' if detector.channels > 3 else ''}of {detector.channels} channels",
              flush=True)
    lengths = [source.length for source in wanted]
    total = None if None in lengths else sum(filter(None, lengths))
    progress = Progress("frames" if all(source.is_video for source in wanted) else "images", total)
    output, unreadable, place = Output(folder, detector, choice, wanted), list[str](), 0
    together = choice.batch_size if choice.tile is None else 1              # of a large image, the tiles are batches
    look = looker(detector, choice, output.without_class)
    try:
        with until_interrupted() as stopped:
            for source in wanted:
                formats = choice.formats(source)
                for batch in batches(source.items(detector.channels), together):
                    good = [(k, item) for k, item in enumerate(batch, start=place + 1) if item.picture is not None]
                    place += len(batch)
                    for item in batch:
                        if item.picture is None:
                            unreadable.append(item.name)
                            print(f"left out: {item.problem}", flush=True)
                    if good:
                        for (k, item), found in zip(good, look([item for _, item in good])):
                            output.add(item, k, found, formats)
                    progress.update(len(batch))
                    if stopped:
                        break
                output.end_of_source()
                if stopped:
                    break
        progress.update(end=True)
        output.close()
    except BaseException:
        output.discard()
        raise
    least = choice.words()["threshold"]
    if unused := output.without_class:
        print(f"left out: {unused.total()} {'segments' if output.panoptic else 'detections'} of labels that the data "
              f"does not use ({', '.join(map(str, sorted(unused)))})"
              + (f" and scores of at least {least}" if not output.panoptic and least < choice.threshold else "")
              + (", counted in each tile" if choice.tile is not None else ""))
    if output.yolo is not None and output.yolo.outside:
        print(f"left out of labels/*.txt: {output.yolo.outside} boxes that have nothing within their image")
    what = f"segments with a score above {choice.threshold}" if output.panoptic else \
        f"detections with a score of at least {choice.threshold}" + "".join(
            f", {name} {value}" for name, value in choice.thresholds.items())
    files = [*output.videos, *output.written] or ["nothing"]
    print(f"{output.found} {what} on {output.images} {progress.title}: "
          f"{' and '.join(filter(None, [', '.join(files[:-1]), files[-1]]))} in {folder}", flush=True)
    return unreadable, place, bool(stopped)


def looker(detector: Detector, choice: Choice, without_class: Counter[int]) -> Callable[[list[Item]], Sequence[Any]]:
    """Pictures -> what is found in each: detections, or a panoptic map. Detections of labels that the data does not use
    are counted."""
    def maps(items: list[Item]) -> Sequence[PanopticPrediction]:
        seen = detector.look([item.picture for item in items])
        detector.check_finite(seen, [item.name for item in items])
        return detector.maps(seen, choice.threshold)

    def detections(items: list[Item]) -> Sequence[Detections]:
        found = detector.predict([item.picture for item in items], names=[item.name for item in items],
                                 without_class=without_class, **choice.words())
        return [sure(one) for one in found]

    def sure(found: NamedDetections) -> Detections:
        least = [choice.thresholds.get(name, choice.threshold) for name in found["names"]]
        return selected(found, [k for k, score in enumerate(found["scores"].double().tolist()) if score >= least[k]])

    return maps if "panoptic" in detector.postprocessors else detections


def check(choice: Choice, detector: Detector, wanted: Sequence[Source]) -> None:
    """Raises ValueError for what does not fit together, before anything is written."""
    names = list(detector.names.values())
    for name in choice.thresholds:
        if name not in names:
            raise ValueError(f"--threshold {name}={choice.thresholds[name]}: the model has no class {name!r}"
                             f"{nearest(name, names)}")
    if "panoptic" not in detector.postprocessors:
        detector.predict([], **choice.words())                          # checks them
    else:
        for flag, value in (("--classes", choice.classes), ("--threshold of single classes", choice.thresholds),
                            ("--nms", choice.nms), ("--one_label_per_query", choice.one_label_per_query),
                            ("--tile", choice.tile), ("--whole", choice.whole),
                            ("--overlap", choice.overlap is not None)):
            if value:
                raise ValueError(f"{flag} is about boxes, and {detector.name} of this checkpoint is panoptic: each pixel "
                                 f"has one segment; leave it out")
        for name in {"yolo", "csv"} & set(choice.format or ()):
            raise ValueError(f"--format {name} has rows of boxes, and {detector.name} of this checkpoint gives panoptic "
                             f"maps; use pictures, video and json")
    clips = [source.name for source in wanted if source.is_video]
    if "video" in (choice.format or ()) and not clips:
        raise ValueError("--format video is of videos and cameras, and there is none among the sources; use pictures")
    if clips and detector.channels not in (1, 3):
        raise ValueError(f"{clips[0]}: frames of videos are RGB, and this model's images have {detector.channels} "
                         f"channels")


def get_args_parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(description="Detect objects on pictures and videos.", allow_abbrev=False)
    parser.add_argument("sources", nargs="+", metavar="SOURCE",
                        help="image, folder (the images directly in it), zip, video, glob in quotes, camera:0, stream "
                        "(rtsp://...), or - (standard input: an image, or a path a line)")
    parser.add_argument("--resume", required=True, metavar="CKPT", help="checkpoint, path or URL")
    parser.add_argument("--model", metavar="NAME", help="preset of a checkpoint that holds weights alone; default: "
                        f"detr_resnet50 where its shapes fit. One of {', '.join(PRESETS)}")
    parser.add_argument("--threshold", metavar="SCORE", help="least score of what is drawn and written; 0 keeps all; "
                        "0.5,cat=0.3 has one of its own for a class (default: "
                        f"{THRESHOLD}; of panoptic models the one of their --panoptic_threshold)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="classes to keep (default: all)")
    parser.add_argument("--nms", type=float, metavar="IOU", help="of boxes of one class that overlap more than this, the "
                        "best is kept (default: all are, as a DETR does not need it)")
    parser.add_argument("--one_label_per_query", action="store_true", help="of each query the best class alone; models "
                        "with a sigmoid may otherwise name one object twice")
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="look at large images in squares of this side, and "
                        "join what they show; objects should be to a tile as those of training were to their images")
    parser.add_argument("--overlap", type=float, metavar="PART", help="of a tile's side that neighbours share, at "
                        f"least the size of the objects (default: {OVERLAP})")
    parser.add_argument("--whole", action="store_true", help="the whole image as one more tile, for large objects")
    parser.add_argument("--format", nargs="+", choices=WRITTEN, metavar="FORMAT", help=f"what is written, of "
                        f"{', '.join(WRITTEN)}; several at once (default: pictures json; of videos: video json)")
    parser.add_argument("--output_dir", metavar="DIR", help="new or empty folder to write to (default: a new one, "
                        f"{DEFAULT_FOLDER} or, where that is taken, {DEFAULT_FOLDER}-2, ...)")
    parser.add_argument("--device", help="'cuda', 'mps', 'cpu' (default: the first of them that is there)")
    parser.add_argument("--fast", choices=("float32", "bf16", "fp16"), help="prepare the model for prediction: in "
                        "float32 boxes differ by rounding alone; bf16 and fp16, where the device has them, are faster "
                        "still and differ in the third digit or so (default: as in evaluation)")
    parser.add_argument("--cuda_graphs", action="store_true", help="on a GPU, record the model's work for images of a "
                        "size that comes again, as frames and tiles do, and launch it at once")
    parser.add_argument("--batch_size", type=int, default=1, help="images or tiles at a time; more than one changes the "
                        "boxes of a model of --padding legacy a little (default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> int:
    """The program's exit code: 1 where something could not be read, 130 where Ctrl-C ended it early."""
    threshold, thresholds = parse_threshold(args.threshold) if args.threshold is not None else (None, {})
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: at least 1 is needed")
    device = command_line.choose_device(args.device or "cuda", args.device is not None)
    if args.cuda_graphs and not device.startswith("cuda"):
        raise ValueError(f"--cuda_graphs needs a GPU of NVIDIA, and the device is {device}: leave it out")
    detector = load_detector(args.resume, model=args.model)
    wanted = find(args.sources, detector.channels)
    if threshold is None:
        panoptic = detector.postprocessors.get("panoptic")
        threshold = THRESHOLD if panoptic is None else panoptic.threshold
    choice = Choice(threshold, thresholds, **{name: getattr(args, name) for name in (
        "batch_size", "format", "classes", "nms", "one_label_per_query", "tile", "overlap", "whole")})
    check(choice, detector, wanted)
    shown = [threshold, *(f"{name} {value}" for name, value in thresholds.items())]
    if args.fast == "fp16" and device.startswith("cpu"):
        print("--fast fp16: processors compute slowly in it; --fast bf16 is what they may be fast in", flush=True)
    if args.fast:
        detector = detector.fast({"float32": "off"}.get(args.fast, args.fast))
    if args.cuda_graphs:
        detector.with_graphs()
    detector.to(device)
    prepared = f", prepared in {args.fast}" if args.fast else ""
    print(f"model: {detector.name}{prepared}; {'; '.join(map(described, wanted))}; threshold: "
          f"{', '.join(map(str, shown))}; device: {device}", flush=True)
    if args.batch_size > 1 and not detector.exact:
        print("images of a batch are padded to one size, which changes this model's boxes a little; --batch_size 1 does "
              "not", flush=True)
    if "segm" in detector.postprocessors and {"yolo", "csv"} & set(args.format or ()):
        print("yolo and csv have boxes alone; masks are in json", flush=True)
    with large_images(choice.tile is not None):
        unreadable, total, stopped = predict(detector, wanted, output_folder(args.output_dir), choice)
    if detector.graphs is not None:
        print(detector.graphs)
    live = any(isinstance(source, Video) and source.live for source in wanted)
    if stopped and not live:
        print(f"stopped before the end, after {total}")
    if unreadable:
        more = f", and {len(unreadable) - MOST_NAMED} more" if len(unreadable) > MOST_NAMED else ""
        print(f"{len(unreadable)} of {total} {'frames' if all(source.is_video for source in wanted) else 'images'} could "
              f"not be read: {', '.join(unreadable[:MOST_NAMED])}{more}")
    return 130 if stopped and not live else 1 if unreadable else 0


def described(source: Source) -> str:
    """A source in words."""
    if source.is_video:
        return f"{source.name}: {source.length or 'unknown number of'} frames"
    return f"{source.name}: {source.length}" if source.length else source.name


if __name__ == "__main__":
    try:
        sys.exit(main(get_args_parser().parse_args()))
    except (ValueError, OSError, ImportError, NotRecorded) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
