"""What a training writes down: ``log.txt``, a line an epoch, and ``steps.txt``, a line a step; whole lines alone, on a
disk that is full and after a kill, too."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import checkpoint, distributed, visualize
from .distributed import say


def append(file: Path, text: str) -> None:
    """Add ``text`` to a file; where that fails, the file is as it was, and the OSError is raised."""
    before = file.stat().st_size if file.exists() else 0
    try:
        with open(file, "a", encoding="utf-8") as opened:
            opened.write(text)
    except OSError:
        if file.exists():
            os.truncate(file, before)
        raise


def whole_lines(file: Path) -> list[str]:
    """The lines of a file, without the last where it was cut short."""
    *lines, last = file.read_text(encoding="utf-8").split("\n")
    try:
        return [*lines, last] if last and isinstance(json.loads(last), dict) else lines
    except ValueError:
        return lines


class StepLog:
    """``steps.txt`` with one JSON object a line an optimizer step. What is there of steps that are done again goes."""

    def __init__(self, folder: Path, epoch: int, step: int) -> None:
        self.file, self.missing = folder / "steps.txt", 0
        if self.file.exists():
            rows = [line for line in whole_lines(self.file)
                    if (row := json.loads(line))["epoch"] < epoch or row["epoch"] == epoch and row["step"] < step]
            checkpoint.write_whole(self.file, lambda file: file.write("".join(f"{row}\n" for row in rows).encode()))

    def write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """A step whose ``values`` are empty was left out; one without ``grad_norm`` overflowed. A full disk takes the
        line away, and is said."""
        shown = {name: values[name] for name in ("loss", "grad_norm", "lr") if name in values}
        row = {"epoch": epoch, "step": step, **(shown or {"left_out": True})}
        try:
            append(self.file, json.dumps(row) + "\n")
        except OSError as error:
            if not self.missing:
                say(f"cannot write {self.file}: {error}; steps from step {step} of epoch {epoch} on are missing there")
            self.missing += 1
            return
        if self.missing:
            say(f"{self.file}: {self.missing} steps are missing")
            self.missing = 0


class Log:
    """``log.txt`` with one JSON object a line an epoch, the curve drawn from it, and TensorBoard where asked for."""

    def __init__(self, folder: Path, tensorboard: bool, epoch: int = 0, row: dict[str, Any] | None = None) -> None:
        """``epoch`` is next: rows of it and later ones, which are trained again, are taken out. ``row`` is the one before
        it, which is added where the program was killed before it could be written."""
        self.file, self.curves, self.writer = folder / "log.txt", folder / "curves.png", None
        self.unwritten: list[dict[str, Any]] = []
        if distributed.is_main() and (self.file.exists() or epoch == 1):
            if self.file.exists():
                text = "".join(f"{line}\n" for line in whole_lines(self.file))
                if text != self.file.read_text():
                    say(f"{self.file}: the last line was cut short, and is taken out")
                    checkpoint.write_whole(self.file, lambda file: file.write(text.encode()))
            rows = visualize.read_log(self.file) if self.file.exists() else []      # no json is an error now, not later
            kept = [old for old in rows if old.get("epoch", -1) < epoch]
            if row is not None and row["epoch"] == epoch - 1 and all(old.get("epoch") != epoch - 1 for old in kept):
                kept.append(row)
            if len(kept) < len(rows):
                say(f"{self.file}: taken out: {len(rows) - len(kept)} rows of epochs that are trained again")
            if kept != rows:
                new = "".join(json.dumps(old) + "\n" for old in kept)
                checkpoint.write_whole(self.file, lambda file: file.write(new.encode()))
        if tensorboard and distributed.is_main():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch)

    def write(self, row: dict[str, Any]) -> None:
        """A finished epoch. What a full disk does not take is said, and written with the next epoch."""
        self.unwritten.append(row)
        try:
            append(self.file, "".join(json.dumps(row) + "\n" for row in self.unwritten))
            self.unwritten = []
            visualize.draw_curves(self.file, self.curves)
        except OSError as error:
            say(f"NOT SAVED: cannot write {self.file.parent}: {error}; {len(self.unwritten)} rows of log.txt are written "
                f"with the next epoch's. Make room")
        if self.writer is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, row["epoch"])
            for title, key in (("coco", "test_coco_eval_bbox"), ("coco_masks", "test_coco_eval_masks")):
                for name, value in zip(visualize.COCO_NUMBERS, row.get(key, ())):
                    self.writer.add_scalar(f"{title}/{name}", value, row["epoch"])
            for key in ("PQ_all", "PQ_th", "PQ_st"):
                for name, value in row.get(f"test_{key}", {}).items():
                    self.writer.add_scalar(f"panoptic/{key}/{name}", value, row["epoch"])
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
