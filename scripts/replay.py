#!/usr/bin/env python3
"""A step that failed, computed again from the file that training left when a value was no number.

    python scripts/replay.py outputs/tiny_detr/non_finite_epoch0_step57.pth --device cpu

The file holds the model before the step, its configuration, the batch and the random state, so that neither data nor
checkpoints are needed. Prints what is known of the step, what training said, and what is found now. The exit code is 0
where the fault shows again, 1 where it does not, 2 where the file cannot be used.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detr import checkpoint
from detr.diagnosis import NOT_FOUND, StepHistory, replay
from detr.presets import PRESETS
from detr.settings import as_it_was

PARTS = ("model", "config", "images", "mask", "targets", "random_state", "where")


def read(file: str) -> dict[str, Any]:
    """What ``save_repro`` wrote; ValueError where it is another kind of file."""
    content = checkpoint.load(file)
    missing = [part for part in PARTS if part not in content]
    if missing:
        raise ValueError(f"{file} is no file of a failed step: it has no {', '.join(missing)}. Name one that training "
                         f"wrote when a value was no number")
    return content


def build(settings: dict[str, Any], file: str) -> tuple[Any, Any]:
    """Model and criterion of a configuration in the form of ``Settings.as_dict()``."""
    if settings["name"] not in PRESETS:
        raise ValueError(f"{file} has a model of the preset {settings['name']}, which this version does not know; use "
                         f"the version that wrote it")
    model_config = as_it_was(settings["name"], settings["model"])
    model, criterion, _ = model_config.build(settings["num_classes"])
    if settings.get("class_weights") is not None:
        criterion.weigh_classes(settings["class_weights"])
    return model, criterion


def describe(where: dict[str, Any]) -> str:
    """What training knew of the step, a line each; its last steps as a table."""
    lines = [f"{name}: {value}" for name, value in where.items() if name not in ("report", "history")]
    history = StepHistory()
    if where.get("history"):
        history.load_state_dict(where["history"])
        lines.append(f"the steps before:\n{history.text()}")
    return "\n".join([*lines, f"training said: {where['report']}" if "report" in where else ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """The program's exit code."""
    parser = argparse.ArgumentParser(description="Compute a failed training step again.", allow_abbrev=False)
    parser.add_argument("file", help="what training left when a value was no number")
    parser.add_argument("--device", default="cpu", help="where to compute; the fault may need the device it came from")
    args = parser.parse_args(arguments)
    try:
        device = torch.device(args.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no GPU here; use --device cpu")
        content = read(args.file)
        model, criterion = build(content["config"], args.file)
        checkpoint.load_model(model, content["model"], args.file)
        print(describe(content["where"]), flush=True)
        said = replay(content, model, criterion, device)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if said.startswith(NOT_FOUND):
        print(said)
        return 1
    print(f"found again: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
