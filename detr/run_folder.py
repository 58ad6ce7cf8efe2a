"""The checkpoints of a training in its folder: which files there are, which is the newest, and a page that says what
each of them is.

    checkpoint.pth              the newest, with everything that training needs to go on
    checkpoint_previous.pth     the one before it
    checkpoint0099.pth          one that is kept: of the epoch in its name
    best.pth, final.pth         what is needed to use the model; each also as .safetensors
    checkpoints.txt             what these files are
"""
from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import checkpoint
from .distributed import say

CODE = Path(__file__).resolve().parent
NEWEST = "checkpoint.pth"
PREVIOUS = checkpoint.previous_of(Path(NEWEST)).name
CARD = "checkpoints.txt"
KEPT = re.compile(r"checkpoint(\d{4,})\.pth")
EXPORTS = {"best": "the best that was evaluated, to use and to evaluate",
           "final": "the end of the training, to use and to evaluate"}
Position = tuple[int, int]


class RunFolder:
    """The folder of one training. One process writes there; any may ask for the newest."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._facts: dict[tuple[int, ...], dict[str, Any]] = {}             # of each file that was written or read

    def save(self, state: dict[str, Any]) -> Path:
        """Write ``checkpoint.pth``; the former becomes ``checkpoint_previous.pth``. Raises what ``checkpoint.save`` does,
        OSError where there is no room; the files are then as they were."""
        path = self.folder / NEWEST
        checkpoint.save(path, state, previous=True)
        return self._remember(path, state)

    def keep(self, state: dict[str, Any], epoch: int) -> Path:
        """Write a checkpoint that no later one takes the place of, named after its epoch."""
        path = self.folder / f"checkpoint{epoch:04}.pth"
        checkpoint.save(path, state)
        return self._remember(path, state)

    def export(self, name: str, state: dict[str, Any]) -> list[Path]:
        """Write ``best`` or ``final``: ``state`` as ``NAME.pth``, and as ``NAME.safetensors`` with all but the weights in
        the metadata. ``state`` has the weights as ``model`` and what a model is used with, but no optimizer."""
        if name not in EXPORTS:
            raise ValueError(f"export {name!r}: it is one of {', '.join(EXPORTS)}")
        paths = [self.folder / f"{name}{ending}" for ending in (".pth", ".safetensors")]
        checkpoint.save(paths[0], state)
        self._remember(paths[0], state)
        checkpoint.save_safetensors(paths[1], state["model"], {k: v for k, v in state.items() if k != "model"})
        self._remember(paths[1], state)
        return paths

    def card(self) -> Path:
        """Write ``checkpoints.txt``: of each checkpoint in the folder what it is, and how it is used.

        What it says of a file is what the file holds: ``config``, ``categories``, ``preprocessing``, ``position``,
        ``epoch``, and under ``card`` a dict with ``metrics`` (names as in ``log.txt``, without ``test_``), and whatever
        else is to be told of it, such as ``revision``, ``data`` and ``date``. Files that cannot be read are called so.
        """
        files = self._files()
        blocks = [self._block(path) for path in files]
        best = next((path.name for path in files if path.stem in EXPORTS), None)
        lines = [f"Checkpoints in {self.folder}, as of {_when(time.time())}"]
        lines += [f"to use the model: {best}"] * bool(best) + [f"to train on: {NEWEST}, by --resume auto"]
        text = "\n".join([*lines, "", *blocks])
        path = self.folder / CARD
        checkpoint.write_whole(path, lambda file: file.write(text.encode()))
        return path

    def newest(self) -> Path | None:
        """The checkpoint from which a training goes on: the first that is whole of ``checkpoint.pth``, the one before
        it, and those that stay, the last written first. Damaged ones are named and counted. Also removes what killed
        processes left half-written."""
        checkpoint.remove_partials(self.folder)
        kept = [path for path in self._files() if KEPT.fullmatch(path.name)]
        candidates = [path for path in (self.folder / NEWEST, self.folder / PREVIOUS) if path.is_file()]
        candidates += sorted(kept, key=lambda path: path.stat().st_mtime, reverse=True)
        for number, path in enumerate(candidates):
            try:
                _check_sums(path)
                position(checkpoint.load(path))
            except (OSError, ValueError, TypeError) as error:
                say(f"passed over {path.name}: {error}")
                continue
            if number:
                say(f"{number} of the {len(candidates)} checkpoints in {self.folder} could not be read")
            return path
        if candidates:
            count = len(candidates)
            say(f"{count} of the {count} checkpoints in {self.folder} could not be read: there is none to go on from")
        return None

    def _files(self) -> list[Path]:
        """The checkpoints there are, the newest first."""
        kept = sorted((path for path in self.folder.glob("checkpoint*.pth") if KEPT.fullmatch(path.name)), reverse=True)
        exports = [self.folder / f"{name}{ending}" for name in EXPORTS for ending in (".pth", ".safetensors")]
        return [path for path in (self.folder / NEWEST, self.folder / PREVIOUS, *exports, *kept) if path.is_file()]

    def _remember(self, path: Path, state: dict[str, Any]) -> Path:
        self._facts[_identity(path)] = facts(state)
        return path

    def _block(self, path: Path) -> str:
        size, changed = path.stat().st_size, path.stat().st_mtime
        if _identity(path) not in self._facts:
            try:
                self._facts[_identity(path)] = facts(checkpoint.load(path, mmap=True))
            except Exception as error:          # whatever stands in a file of that name, a page about it can be written
                self._facts[_identity(path)] = {"not readable": str(error)}
        rows = {"what": _what(path), "size on disk": f"{size:,} bytes", "written": _when(changed),
                **self._facts[_identity(path)]}
        if "not readable" not in rows:
            quoted = shlex.quote(str(path))
            if path.name in (NEWEST, PREVIOUS) or KEPT.fullmatch(path.name):
                start = "auto" if path.name == NEWEST else quoted
                rows["train on"] = f"python main.py --output_dir {shlex.quote(str(self.folder))} --resume {start}"
            rows["evaluate"] = f"python main.py --eval --resume {quoted}"
            rows["use"] = f"detr.load({str(path)!r})"
        width = max(map(len, rows))
        return f"{path.name}\n" + "".join(f"    {name:<{width}}  {value}\n" for name, value in rows.items())


def position(state: Mapping[str, Any]) -> Position:
    """How far the training of a checkpoint has come: epoch and step."""
    place = state.get("position")
    if isinstance(place, dict) and "epoch" in place:
        return int(place["epoch"]), int(place.get("step", 0))
    return int(state.get("epoch", -1)) + 1, 0


def facts(state: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint says of itself, in words."""
    config, card = (state[name] if isinstance(state.get(name), dict) else {} for name in ("config", "card"))
    place, prepared = state.get("position"), state.get("preprocessing")
    rows = {"model": str(config.get("name", "unknown"))}
    if isinstance(place, dict):
        rows["position"] = _in_words(place)
    elif "epoch" in state:
        rows["epoch"] = str(state["epoch"])
    rows["scores"] = scores(card.get("metrics") or {}) or "not evaluated"
    if "num_classes" in state or state.get("categories"):
        names = [str(row["name"]) for row in state.get("categories") or ()]
        rows["classes"] = f"{len(names) or state['num_classes']}" + (
            f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else " without names")
    if isinstance(prepared, dict):
        size, limit = prepared.get("size"), prepared.get("max_size")
        rows["image size"] = f"{size[0]} x {size[1]}" if isinstance(size, (tuple, list)) else \
            f"short side {size}" + (f", long side {limit} at most" if limit else "")
    if "padding" in (config.get("model") or {}):
        rows["padding"] = config["model"]["padding"]
    for name, value in card.items():
        if name not in ("metrics", "epoch") and value is not None:
            rows.setdefault(name.replace("_", " "), _in_words(value))
    return rows


def scores(metrics: Mapping[str, Any]) -> str:
    """AP and AP50 of boxes and masks, and PQ, as far as ``metrics`` has them."""
    found = []
    for title, key in (("box", "coco_eval_bbox"), ("mask", "coco_eval_masks")):
        if numbers := metrics.get(key):
            found.append(f"{title} AP {numbers[0]:.4f}, AP50 {numbers[1]:.4f}")                # -1: no object to find
    quality = metrics.get("PQ_all")
    if isinstance(quality, dict):
        found += [f"{name.upper()} {quality[name]:.4f}" for name in quality if name.lower() == "pq"]
    return "; ".join(found)


@functools.lru_cache
def code_revision(folder: Path = CODE) -> str:
    """The git commit of this code, with ``+changes`` where files differ from it; ``unknown`` where git does not know it.
    The first answer stays, since what is imported does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=5,
                              env=environment, stdin=subprocess.DEVNULL).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")           # an installed copy may lie in another repository
        revision = git("rev-parse", "HEAD")
        return revision + "+changes" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, ValueError, subprocess.SubprocessError):
        return "unknown"


def _what(path: Path) -> str:
    if path.name == NEWEST:
        return "the newest, with everything that training needs to go on"
    if path.name == PREVIOUS:
        return "the one before the newest, should that be damaged"
    if path.stem in EXPORTS:
        return EXPORTS[path.stem] + (", readable without pickle" if path.suffix == ".safetensors" else "")
    return "kept, with everything that training needs to go on"


def _check_sums(path: Path) -> None:
    """ValueError where the content is not what was written, which reading tensors would not notice. PyTorch's format of
    before 2020 has no sums."""
    with path.open("rb") as file:
        if file.read(2) == b"\x80\x02":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged or cut short ({path.stat().st_size:,} bytes; {error})") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the sum of {damaged} is not the one that was written")


def _identity(path: Path) -> tuple[int, ...]:
    """Of a file's content, whatever its name."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_in_words(item)}" for name, item in value.items())
    return " ".join(map(_in_words, value)) if isinstance(value, (list, tuple)) else str(value)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
