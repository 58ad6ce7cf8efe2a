#!/usr/bin/env python3
"""Look through a data set before training: what is wrong with it, in which file and row, and what is done about it.

    python scripts/check_data.py PATH
    python scripts/check_data.py PATH --quick --num_queries 300
    python scripts/check_data.py --coco_path DIR --masks --json report.json

PATH is a data set in any format that --data takes. All images are opened and decoded; with --quick their headers
alone are read, as before each training. Exits with 1 where training would stop, else with 0: what is wrong with a test
part is said, and does not count.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.check import HowFar, check


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     epilog="Exits with 1 where training would stop, else with 0.")
    parser.add_argument("path", nargs="?", metavar="PATH", help="folder of the data set, or the file that describes it")
    parser.add_argument("--coco_path", metavar="DIR", help="the same, for a folder in COCO's layout")
    parser.add_argument("--num_queries", type=int, metavar="N", default=100,
                        help="of the model: an image with more objects is found (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="read no more of the images than their headers")
    parser.add_argument("--masks", action="store_true", help="faults in segmentations stop, as with --masks in training")
    parser.add_argument("--in_channels", type=int, default=3, help="of the images (default: %(default)s)")
    parser.add_argument("--show", type=int, default=3, metavar="N",
                        help="rows named of each finding, at most 100 (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here, too")
    parser.add_argument("--no_cache", action="store_true", help="look again, even where the files are as before")
    return parser


def main(args: argparse.Namespace) -> int:
    """Look and print; returns what to exit with. Raises ValueError and OSError where there is no data set to look at."""
    from datasets.formats import coco_layout, recognise

    if (args.path is None) == (args.coco_path is None):
        raise ValueError("one data set is needed: PATH or --coco_path DIR")
    for flag, least in (("num_queries", 1), ("in_channels", 1), ("show", 0)):
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag} {getattr(args, flag)}: at least {least} is needed")
    path = args.path or args.coco_path
    found = recognise(args.path) if args.path else coco_layout(path)
    report = check(found, args.num_queries, not args.quick, args.masks, args.in_channels,
                   HowFar("image headers read" if args.quick else "images opened"), cache=not args.no_cache)
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
