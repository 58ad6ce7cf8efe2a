#!/usr/bin/env python3
"""Learning curves of several trainings, compared in one picture.

    python scripts/plot_logs.py outputs/first outputs/second --output compared.png

RUN is the folder of a training, or its ``log.txt``; a glob that no shell opened works too. Losses and precision are drawn
over epochs, and over hours of training where the logs have times; a run has the same colour and line style everywhere,
and is called by its folder.
"""
from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as command_line
from detr.compare_runs import draw_comparison, short_names


def find_logs(wanted: Sequence[str]) -> dict[str, Path]:
    """Names of the runs and their logs, each once, in the order given. Raises FileNotFoundError where there is none."""
    logs: dict[Path, Path] = {}
    for run in wanted:
        for place in map(Path, sorted(glob.glob(run)) or [run]):
            log = place / "log.txt" if place.is_dir() else place
            if not log.is_file():
                inner = sorted(log.parent.glob("*/log.txt")) if place.is_dir() else []
                raise FileNotFoundError(f"{run}: there is no {log}" + (f"; {inner[0].parent} has one" if inner else
                                                                      "; give folders of trainings, or their log.txt"))
            logs[log.resolve()] = log
    return dict(zip(short_names([log.parent for log in logs.values()]), logs.values()))


def get_args_parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(description="Compare the learning curves of trainings.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training, or its log.txt")
    parser.add_argument("--output", default="runs.png", metavar="FILE",
                        help="PNG to write, over what is there (default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> None:
    if Path(args.output).suffix.lower() != ".png":
        raise ValueError(f"--output {args.output}: a PNG is written; name it so")
    logs = find_logs(args.runs)
    for note in draw_comparison(logs, args.output):
        print(note)
    print(f"{len(logs)} {'run' if len(logs) == 1 else 'runs'} in {args.output}")


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
