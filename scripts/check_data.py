#!/usr/bin/env python3
"""Look through a data set before training: what is wrong with it, in which file and row, and what is done about it.

    python scripts/check_data.py PATH
    python scripts/check_data.py PATH --quick --num_queries 300
    python scripts/check_data.py --coco_path DIR --masks --json report.json

PATH is a data set in any format that --data takes. All images are opened and decoded, unless --quick is given. Exits
with 1 where training would stop, else with 0.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.check import check


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     epilog="Exits with 1 where training would stop, else with 0.")
    parser.add_argument("path", nargs="?", metavar="PATH", help="folder of the data set, or the file that describes it")
    parser.add_argument("--coco_path", metavar="DIR", help="the same, for a folder in COCO's layout")
    parser.add_argument("--num_queries", type=int, metavar="N", default=100,
                        help="of the model: an image with more objects is found (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="do not open the images")
    parser.add_argument("--masks", action="store_true", help="faults in segmentations stop, as with --masks in training")
    parser.add_argument("--in_channels", type=int, default=3, help="of the images (default: %(default)s)")
    parser.add_argument("--show", type=int, default=3, metavar="N",
                        help="rows named of each finding, at most 100 (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here, too")
    parser.add_argument("--no_cache", action="store_true", help="look again, even where the files are as before")
    return parser


class Progress:
    """A line that says how many images were opened: rewritten on a terminal, else a new one every ten seconds."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.rewrites = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= (0.2 if self.rewrites else 10) or done == total and self.rewrites:
            self.last = now
            left = (now - self.start) / done * (total - done)
            text = f"opened {done} of {total} images, {left:.0f} s to go"
            print(f"\r{text:<60}" if self.rewrites else text, end="" if self.rewrites and done < total else "\n",
                  file=sys.stderr, flush=True)


def main(args: argparse.Namespace) -> int:
    from datasets.formats import coco_layout, recognise

    if (args.path is None) == (args.coco_path is None):
        raise ValueError("one data set is needed: PATH or --coco_path DIR")
    for flag, least in (("num_queries", 1), ("in_channels", 1), ("show", 0)):
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag} {getattr(args, flag)}: at least {least} is needed")
    path = args.path or args.coco_path
    found = recognise(args.path) if args.path else coco_layout(path)
    report = check(found, args.num_queries, not args.quick, args.masks, args.in_channels, Progress(),
                   cache=not args.no_cache)
    if args.json:
        args.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    print(f"{path}: {report.table(args.show)}" + ("\nThis is the report on the same files from before (--no_cache looks "
                                                  "again)." if report.cached else ""))
    return 1 if report.stops else 0


if __name__ == "__main__":
    try:
        sys.exit(main(get_args_parser().parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
