#!/usr/bin/env python3
"""Memory and speed of ``scripts/predict.py``: whether what it needs grows with the number of images or frames.

    python scripts/benchmark_predict.py --resume outputs/tiny_deformable_detr/checkpoint.pth

A folder of synthetic images and the clips, of which the shapes move, are made in a temporary folder. Each line is a
process of its own, with all formats that its source has: the most memory that it had at once (``ru_maxrss``, the
system's own count), the milliseconds of all cores for an image, without those of a process for one image, which is the
start, and how many images or frames are in the files afterwards, counted there. Clips are also read again: their frames,
rate and size against the source's.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.synthetic import make_scene
from detr.sources import pyav

PREDICT = Path(__file__).resolve().parent / "predict.py"
OF_IMAGES, OF_CLIPS = ["pictures", "json", "yolo", "csv"], ["video", "json", "csv"]
RATE, SIZE = 25, (320, 240)                             # of the clip: frames a second, width and height


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--resume", required=True, metavar="CKPT", help="checkpoint that main.py wrote")
    parser.add_argument("--images", nargs="+", type=int, default=[100, 1000], help="numbers of images, one after another")
    parser.add_argument("--seconds", nargs="+", type=int, default=[6, 60], help="lengths of clips, one after another")
    parser.add_argument("--batch_size", type=int, default=4, help="images or frames at a time")
    parser.add_argument("--device", default="cpu", help="where to compute")
    return parser


def make_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for k in range(count):
        Image.fromarray(make_scene(0, "train", k % 200).pixels).save(folder / f"{k:05}.jpg", quality=90)


def make_clip(path: Path, seconds: int) -> None:
    """Scenes that slide by, a new one every second."""
    scenes = [np.asarray(Image.fromarray(make_scene(0, "val", k).pixels).resize(SIZE)) for k in range(10)]
    av = pyav()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE, bit_rate=2_000_000)
        (stream.width, stream.height), stream.pix_fmt = SIZE, "yuv420p"
        for k in range(seconds * RATE):
            pixels = np.roll(scenes[k // RATE % 10], 4 * (k % RATE), axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def run(source: Path, out: Path, args: argparse.Namespace, formats: list[str]) -> tuple[float, float]:
    """MiB at the most, and seconds of all cores."""
    words = [sys.executable, str(PREDICT), str(source), "--resume", args.resume, "--device", args.device, "--batch_size",
             str(args.batch_size), "--output_dir", str(out), "--format", *formats]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"predict.py ended with {process.returncode}")
    return used.ru_maxrss / (1024 if sys.platform == "linux" else 1024 ** 2), used.ru_utime + used.ru_stime


def frames(path: Path) -> tuple[int, float, int, int]:
    """Frames that can be decoded, frames a second, width and height."""
    with pyav().open(str(path)) as container:
        stream = container.streams.video[0]
        return (sum(1 for _ in container.decode(stream)), float(stream.average_rate), stream.width, stream.height)


def main(args: argparse.Namespace) -> None:
    print("source               peak MiB    ms each   rows of json    files", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        one = folder / "one"
        make_images(one, 1)
        peak, start = run(one, folder / "start", args, OF_IMAGES)
        print(f"{'1 image':20} {peak:8.1f}")
        for count in args.images:
            make_images(folder / f"{count}", count)
            peak, seconds = run(folder / f"{count}", out := folder / f"of {count}", args, OF_IMAGES)
            rows = len(json.loads((out / "predictions.json").read_text())["images"])
            print(f"{f'{count} images':20} {peak:8.1f} {1000 * (seconds - start) / count:10.1f} {rows:14}    "
                  f"{len(list(out.glob('*.jpg')))} pictures, {len(list(out.glob('labels/*.txt')))} labels", flush=True)
        for length in args.seconds:
            make_clip(clip := folder / f"clip{length}.mp4", length)
            peak, seconds = run(clip, out := folder / f"of {length} s", args, OF_CLIPS)
            rows = len(json.loads((out / "predictions.json").read_text())["images"])
            before, after = frames(clip), frames(out / clip.name)
            print(f"{f'{length} s of video':20} {peak:8.1f} {1000 * (seconds - start) / before[0]:10.1f} {rows:14}    "
                  f"frames, rate, size before {before}, after {after}", flush=True)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
