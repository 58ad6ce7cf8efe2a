#!/usr/bin/env python3
"""A checkpoint -> a file that runs without this code: ONNX, or PyTorch's own ``.pt2``.

    python scripts/export.py --resume outputs/tiny_detr/best.pth --output model.onnx
    python scripts/export.py --resume CKPT --output model.onnx --images 'photos/*.jpg' --half
    python main.py --eval --engine onnxruntime --resume model.onnx --coco_path DIR

The file takes images of any number, height and width, and their sizes without padding; it gives boxes in pixels of the
originals, scores and labels, or with ``--no_postprocess`` the model's own outputs. ``docs/export.md`` has the names, and
how it is used. Before it is written it is compared with the model in PyTorch, on ``--images`` or on drawn ones, in
batches of 1, 2 and 5 images and at two sizes: where boxes differ by half a pixel of the original, or scores by 1e-3,
nothing is written, and the exit code is 1. ``--half`` and ``--int8`` are made of a file that passed, and the difference
is told.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as command_line
from datasets.images import Picture
from datasets.synthetic import make_scene
from detr import sources
from detr.export import BOX, FORMATS, OPSETS, SCORE, SURE, Report, check, export
from detr.loading import load

DRAWN = 5


def drawn(channels: int) -> list[Picture]:
    """Pictures of the synthetic data, of different sizes."""
    if channels not in (1, 3):
        raise ValueError(f"the model sees {channels} channels, which drawn pictures do not have: name some with --images")
    pictures = [Image.fromarray(make_scene(0, "val", i).pixels) for i in range(DRAWN)]
    return [picture.convert("L") for picture in pictures] if channels == 1 else list(pictures)


def get_args_parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--resume", required=True, metavar="CKPT", help="checkpoint, path or URL")
    parser.add_argument("--model", metavar="NAME", help="preset of a checkpoint that holds weights alone")
    parser.add_argument("--output", required=True, metavar="FILE", help="where to write; .onnx or .pt2 says the format")
    parser.add_argument("--format", choices=FORMATS, help="default: what the ending of --output says")
    parser.add_argument("--no_postprocess", action="store_true", help="logits and boxes of all queries instead of "
                        "scores, labels and boxes in pixels")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--half", action="store_true", help="weights in float16; inputs, outputs and what decides "
                           "where things are stay in float32")
    precision.add_argument("--int8", action="store_true", help="linear layers of the transformer in int8, quantised as "
                           "they run; smaller, and less exact")
    parser.add_argument("--opset", type=int, default=18, help=f"of ONNX, {OPSETS[0]} to {OPSETS[-1]} (default: "
                        f"%(default)s)")
    parser.add_argument("--images", nargs="+", metavar="SOURCE", help="images, globs in quotes or folders to compare on; "
                        f"the first {DRAWN} are taken (default: drawn ones)")
    return parser


def pictures(wanted: Sequence[str] | None, channels: int) -> list[Picture]:
    """The first of ``wanted``, or drawn ones. ValueError for one that cannot be read."""
    if wanted is None:
        return drawn(channels)
    found = []
    for item in islice(sources.pictures(wanted, channels), DRAWN):
        if item.picture is None:
            raise ValueError(f"--images: {item.name} cannot be read: {item.problem}; leave it out, or repair it")
        found.append(item.picture)
    return found


def main(args: argparse.Namespace) -> None:
    ending = Path(args.output).suffix.lower().removeprefix(".")
    form = args.format or ending
    if form not in FORMATS or ending != form:
        raise ValueError(f"--output {args.output}: it should end with .{args.format or ' or .'.join(FORMATS)}, by which "
                         f"the format is known when it is read")
    if form != "onnx" and args.opset != 18:
        raise ValueError(f"--opset {args.opset} is about ONNX; leave it out with --format {form}")
    precision = "float16" if args.half else "int8" if args.int8 else "float32"
    check(form, precision, args.opset, args.output)
    detector = load(args.resume, model=args.model)
    shown = pictures(args.images, detector.channels)
    print(f"model: {detector.name}; weights: {args.resume}; {form}, {precision}; compared with PyTorch on {len(shown)} "
          f"{'drawn ' if args.images is None else ''}images", flush=True)
    report = export(detector, args.output, shown, form=form, postprocess=not args.no_postprocess, precision=precision,
                    opset=args.opset, tell=partial(print, flush=True))
    for line in in_words(report):
        print(line)


def in_words(report: Report) -> list[str]:
    """What was compared, each table below the file it is of, and what was written."""
    written = report.precision == "float32"
    lines = [f"{report.file} against PyTorch, by batch:" if written else
             f"float32, not written, of which {report.file} is made, against PyTorch, by batch:"]
    lines += [f"  {shape:>18}: {gap}  (allowed: {BOX} px, {SCORE:g})" for shape, gap in report.gaps.items()]
    if report.variant is not None:
        lines += [f"{report.file}, {report.precision}, against PyTorch, of detections that PyTorch is sure of ({SURE} or "
                  f"more), in all batches:", f"  {'at most':>18}: {report.variant}",
                  f"{len(report.float32)} layers stay in float32; for AP: main.py --eval --engine onnxruntime --resume "
                  f"{report.file}"]
    return [*lines, f"written: {report.file}, {report.precision}, {report.size / 1e6:.1f} MB"]


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
