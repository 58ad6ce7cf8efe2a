"""A whole data set, looked through before anything is trained on it: annotations, files, and what its parts share."""
from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import ExifTags, Image

from datasets import MISSING_PART
from datasets.annotations import parse_json
from datasets.examination import EXAMPLES, FIX, NOTE, SKIP, STOP, Examined, Finding, counted, examine, few, printable
from datasets.images import DAMAGED, height_width, image_size, read_image
from datasets.split import IMAGE_SUFFIXES, SPLITS, Format, Note, Split

ACTIONS = {STOP: "training does not begin", SKIP: "left out of training", FIX: "mended in memory, the files stay as "
           "they are", NOTE: "used as it is"}
CROWDED = "images with more objects than queries"
"""Nothing stops a training that cannot find them, but what there is to do is said at once."""
ORDINARY = ("crowds", "images without objects", "kinds of image files", "how the files were read")
"""Said by others, or nothing to act on."""
TRAINED = {"train": "training", "val": "validation"}
"""The parts that a training reads; what is wrong with another one does not stop it."""
THREADS, STEP = 16, 16                      # reading waits for the disk; images that a thread looks into at a time
SAMPLE = 4096                               # bytes in the middle of a file, which tell most files of one size apart
SIZED_BY_HEADERS = "YOLO"                   # the format whose sizes are those of the headers, which reading it reads
PATIENCE = 3.0                              # seconds before it is said how far opening images has got


class Summary(NamedTuple):
    """What a part of the data holds."""
    images: int
    empty: int                              # images without objects, which are used
    classes: dict[str, int]                 # name -> objects to learn


class Report(NamedTuple):
    """What ``check`` found."""
    format: str
    splits: dict[str, Summary]
    findings: list[Finding]                 # those that stop training first
    pixels: bool                            # whether images were opened and decoded
    headers: bool = False                   # whether of images the headers were read
    cached: bool = False                    # whether this is of an earlier look at the same files

    @property
    def stops(self) -> list[Finding]:
        """What must be corrected before training."""
        return [finding for finding in self.findings if finding.action == STOP]

    def brief(self) -> str:
        """A few lines: what stops training and too few queries in full, of the rest how many rows there are."""
        said = [finding for finding in self.findings if finding.kind not in ORDINARY]
        lines = [f"data check: {self.format}, {', '.join(self.splits) or 'nothing that can be read'}; "
                 + (f"{counted(len(self.stops), 'fault')} to correct before training" if self.stops else
                    "nothing stops training") + (" (from the check of the same files before)" if self.cached else "")]
        for finding in said:
            in_full = finding.action == STOP or finding.kind == CROWDED
            what = f"{finding.kind}: {finding.count} ({few(finding.rows, 2)})"
            lines.append(f"    {finding.action:<4}  {finding.split + ': ' if finding.split else ''}"
                         + (finding.line() if in_full else what))
        return "\n".join(lines)

    def table(self, most: int = 3) -> str:
        """Everything, for a person to read: parts, objects of each class, findings with at most ``most`` rows each."""
        lines = [f"{self.format}"]
        lines += [f"    {split:<6}{part.images} images, {part.empty} without objects (used), "
                  f"{sum(part.classes.values())} objects of {counted(len(part.classes), 'class', 'classes')}"
                  for split, part in self.splits.items()]
        lines += ["", *self._classes()] if self.splits else []
        lines += ["", f"{'action':<8}{'part':<7}{'count':>7}  finding"] if self.findings else []
        for finding in self.findings:
            lines.append(f"{finding.action:<8}{finding.split or 'all':<7}{finding.count:>7}  {finding.kind}")
            lines += [f"{'':<24}{line}" for line in _wrapped(finding.message)]
            rows = finding.rows[:most]
            if rows and (finding.count > 1 or rows[0] not in finding.message):
                lines += [f"{'':<24}- {row}" for row in rows]
                if finding.count > len(rows):
                    lines.append(f"{'':<24}- and {finding.count - len(rows)} more")
        used = [action for action in ACTIONS if any(finding.action == action for finding in self.findings)]
        lines += ["", *(f"{action}: {ACTIONS[action]}" for action in used)] if used else []
        lines += ["", f"Training would stop: {counted(len(self.stops), 'fault')} to correct first." if self.stops else
                  "Nothing stops training." + ("" if self.pixels else " Of images, the headers alone were read." if
                                               self.headers else " Images were not opened.")]
        return "\n".join(lines)

    def _classes(self) -> list[str]:
        names = list(dict.fromkeys(name for part in self.splits.values() for name in part.classes))
        total = {name: sum(part.classes.get(name, 0) for part in self.splits.values()) for name in names}
        gap = []
        if len(names) > 100:                                            # the commonest and the rarest
            names = sorted(names, key=lambda name: -total[name])
            names, gap = names[:20] + names[-20:], [f"    ... {len(names) - 40} classes between these ..."]
        width = max([len("objects"), *(len(printable(name)) for name in names)]) + 2
        rows = [f"    {'objects':<{width}}" + "".join(f"{split:>9}" for split in self.splits)]
        rows += [f"    {printable(name):<{width}}" + "".join(f"{part.classes.get(name, '-'):>9}"
                                                             for part in self.splits.values()) for name in names]
        return rows[:21] + gap + rows[21:]

    def as_dict(self) -> dict[str, Any]:
        """For json."""
        return {"format": self.format, "splits": {split: part._asdict() for split, part in self.splits.items()},
                "findings": [finding._asdict() for finding in self.findings], "pixels": self.pixels,
                "headers": self.headers}

    @classmethod
    def from_dict(cls, values: dict[str, Any], cached: bool = False) -> Report:
        """The inverse of ``as_dict``."""
        return cls(values["format"], {split: Summary(**part) for split, part in values["splits"].items()},
                   [Finding(**finding) for finding in values["findings"]], values["pixels"],
                   values["headers"], cached)


class HowFar:
    """Says on stderr how far a long look has got, once it takes more than some seconds: a line that is rewritten on a
    terminal, else a new one every ten seconds. ``what`` begins it: "images opened"."""

    def __init__(self, what: str) -> None:
        self.what, self.rewrites, self.said = what, sys.stderr.isatty(), False
        self.start = self.last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self.start = self.start or now
        due = now - self.start >= PATIENCE and now - self.last >= (0.2 if self.rewrites else 10)
        if due or self.rewrites and self.said and done == total:
            self.last, self.said = now, True
            left = (now - self.start) / done * (total - done)
            text = f"{self.what}: {done} of {total}, {left:.0f} s to go"
            print(f"\r{text:<60}" if self.rewrites else text, end="" if self.rewrites and done < total else "\n",
                  file=sys.stderr, flush=True)


Stats = dict[str, tuple[int, int]]
"""File name -> bytes and time of change, of files that are there."""


class _Part(NamedTuple):
    """A part of the data, read and looked through."""
    split: str
    source: Path
    folder: Path
    examined: Examined
    files: list[str | None]                 # of each image its file name, None where it has none
    stats: Stats

    def finding(self, kind: str, action: str, message: str, rows: Sequence[str], count: int | None = None) -> Finding:
        """A finding of this part, of ``count`` rows; by default those that are named."""
        n = len(rows) if count is None else count
        return Finding(kind, action, message, n, list(rows[:EXAMPLES]), split=self.split)

    def named(self, i: int) -> str:
        """What messages call image ``i``."""
        return f"{printable(self.files[i] or '')} (image id {self.examined.images[i]['id']})"

    def there(self) -> list[int]:
        """Places of images whose file is there and not empty; of a file listed twice, the first."""
        first = {name: i for i, name in reversed(list(enumerate(self.files))) if name in self.stats}
        return sorted(i for name, i in first.items() if self.stats[name][0])


def check(format: Format, num_queries: int | None = None, pixels: bool = False, masks: bool = False, channels: int = 3,
          progress: Callable[[int, int], None] | None = None, cache: bool = True, headers: bool = True,
          parts: Sequence[str] = SPLITS) -> Report:
    """All that is the matter with a data set.

    Its annotations (``examine``), whether the files are there, whether parts share an image or differ in classes, and,
    with ``num_queries``, where there are more objects than a model has queries. Images of different parts are the same
    where their files are: of those of one size in bytes, a sample is compared, and where that is the same, the whole.
    ``headers`` reads the beginning of every image: what is no image, and other sizes than annotated. ``pixels`` opens
    every image in its place, as training does, with ``channels``: what cannot be read, other sizes, kinds of files, the
    same file twice in one part. ``masks``: whether segmentations are to be used. ``progress`` is called with how many
    images of how many were looked into.

    ``parts`` are looked through; of others it matters alone which files they list. A fault stops where training and
    validation need what it is in, and so does one of them that is not there; in the test part it is a note.

    A report on the same annotations, the same names, sizes and times of image files and the same program is taken from
    a file below ``$XDG_CACHE_HOME`` (``~/.cache``), unless ``cache`` is False.
    """
    key = hashlib.blake2b(repr((_program(), format.name, num_queries, pixels, masks, channels, headers, tuple(parts))
                               ).encode(), digest_size=20)
    findings = [Finding("parts that are missing", STOP,
                        f"there is no part '{split}' for {what}; add it: "
                        + MISSING_PART[format.name].format(split=split, valid="valid" if split == "val" else split),
                        1, [], split=split) for split, what in TRAINED.items() if split not in format.splits]
    contents: dict[str, Any] = {}
    stats: dict[str, Stats] = {}
    for split, stored in format.splits.items():
        if split not in parts:
            key.update(repr((split, str(stored.source), _stats(stored.source.parent, [stored.source.name]))).encode())
            continue
        try:
            contents[split] = _content(format, stored)
        except (ValueError, OSError) as error:
            findings.append(_unreadable(split, error))
            key.update(repr((split, str(error))).encode())              # read each time, so that this is all to know
            continue
        content = contents[split]
        if isinstance(content, dict):
            findings += [of_note(note, split) for note in content.get("notes", ())]
        whole = isinstance(content, bytes)                              # of a json, whose files are not known yet
        stats[split] = _listing(stored.images) if whole else _stats(stored.images, _file_names(content), beside=True)
        key.update(content if whole else json.dumps(content, sort_keys=True, default=str).encode())
        key.update(repr((split, str(stored.source), str(stored.images), sorted(stats[split].items()))).encode())
    file = _cache_folder() / f"{key.hexdigest()}.json"
    if cache and (report := _from_cache(file)):
        return report

    read, found, known = _read_parts(format, contents, stats, masks)
    findings, cache = [*findings, *found], cache and known
    for part in read:
        findings += [*_of_files(part), *_of_objects(part, num_queries)]
    others = [stored for split, stored in format.splits.items() if split not in {part.split for part in read}]
    findings += [*_of_unlisted(read, others), *_of_classes(read), *_alike(read)]
    if pixels:
        seen = _look(read, partial(_opened, channels=channels), max(4, os.cpu_count() or 1), progress)
        findings += [*_of_headers(read, seen), *_of_pixels(read, seen)]
    elif headers and format.name != SIZED_BY_HEADERS:
        findings += _of_headers(read, _look(read, _header, THREADS, progress))
    findings += [] if pixels else _of_shared(read)
    findings = [finding._replace(action=NOTE, message=f"{finding.message}. Training does not use this part")
                if finding.action == STOP and finding.split not in ("", *TRAINED) else finding for finding in findings]
    findings.sort(key=lambda finding: list(ACTIONS).index(finding.action))
    report = Report(format.name, {part.split: _summary(part) for part in read}, findings, pixels, headers)
    if cache:
        _to_cache(file, report)
    return report


# Reading and listing.

def _unreadable(split: str, error: Exception) -> Finding:
    return Finding("annotations that cannot be read", STOP, printable(str(error)), 1, [], "", split)


def _read_parts(format: Format, contents: dict[str, Any], stats: dict[str, Stats],
                masks: bool) -> tuple[list[_Part], list[Finding], bool]:
    """The parts whose annotations could be examined, what was found in them, and whether a kept report's key knows of all
    their files: not of those outside the folder that was listed, which are added to ``stats``."""
    read, findings, known = [], [], True
    for split, content in contents.items():
        source, folder = format.splits[split].source, format.splits[split].images
        try:
            data = parse_json(content, source) if isinstance(content, bytes) else content
        except ValueError as error:
            findings.append(_unreadable(split, error))
            continue
        examined = examine(data, masks)
        findings += [finding._replace(split=split) for finding in examined.findings]
        if examined.images and examined.categories:
            files = _file_names({"images": examined.images})
            outside = [name for name in files if name is not None and name not in stats[split]]
            if isinstance(content, bytes) and outside:
                known = False
                stats[split].update(_stats(folder, outside))
            read.append(_Part(split, source, folder, examined, files, stats[split]))
        del data
    return read, findings, known


def of_note(note: str, split: str) -> Finding:
    """What a reader says of a part; only a ``Note`` is about files that may have been meant otherwise."""
    if isinstance(note, Note):
        return Finding(note.kind, NOTE, printable(note), len(note.rows), [printable(row) for row in note.rows[:EXAMPLES]],
                       "", split)
    return Finding("how the files were read", NOTE, printable(note), 1, [], "", split)


def _content(format: Format, part: Split) -> Any:
    """The bytes of a json in COCO's form, which are parsed only where there is no earlier report; else what is read."""
    if format.name.startswith("COCO") and part.source.suffix == ".json" and part.source.is_file():
        return part.source.read_bytes()
    return part.read()


def _file_names(data: Any) -> list[str | None]:
    rows = data.get("images") if isinstance(data, dict) else None
    names = [row.get("file_name") if isinstance(row, dict) else None for row in rows or ()]
    return [name if isinstance(name, str) and name else None for name in names]


def _listing(folder: Path) -> Stats:
    """Of all files in and below a folder."""
    found: Stats = {}
    seen: set[str] = set()
    below = [""]
    while below:
        inner = below.pop()
        real = os.path.realpath(os.path.join(folder, inner))
        if real in seen:
            continue                                                    # a link that leads in a circle
        seen.add(real)
        found.update(_in_folder(real, inner, below))
    return found


def _in_folder(folder: str, inner: str, below: list[str] | None = None) -> Stats:
    """Of the files in one folder, under ``inner/name``; folders are added to ``below``."""
    found: Stats = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = os.path.join(inner, entry.name)
                try:
                    if not entry.is_dir():
                        status = entry.stat()
                        found[name] = (status.st_size, status.st_mtime_ns)
                    elif below is not None:
                        below.append(name)
                except OSError:
                    continue                                            # a link to nowhere
    except (OSError, ValueError):
        pass
    return found


def _stats(folder: Path, names: Iterable[str | None], beside: bool = False) -> Stats:
    """Of these files: one call a folder, where asking file by file takes long. ``beside``: and of other image files in
    their folders."""
    wanted = {name for name in names if name is not None}
    listed: Stats = {}
    for inner in {os.path.dirname(name) for name in wanted}:
        listed.update(_in_folder(os.path.join(folder, inner), inner))
    found = {name: status for name, status in listed.items() if name in wanted or beside and _is_image(name)}
    for name in wanted - found.keys():                                  # such as "./a.png"
        try:
            status = os.stat(folder / name)
        except (OSError, ValueError):
            continue
        if not (folder / name).is_dir():
            found[name] = (status.st_size, status.st_mtime_ns)
    return found


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


# One part.

def _summary(part: _Part) -> Summary:
    objects, headings = part.examined.objects, part.examined.headings
    counts = np.bincount(objects.category[objects.kept], minlength=len(part.examined.categories)).tolist()
    classes = {str(row.get("name")): n for row, n in zip(part.examined.categories, counts) if row["id"] not in headings}
    filled = len(np.unique(objects.image[objects.kept]))
    return Summary(len(part.files), len(part.files) - filled, classes)


def _of_objects(part: _Part, num_queries: int | None) -> Iterator[Finding]:
    objects = part.examined.objects
    counts = np.bincount(objects.image[objects.kept], minlength=len(part.files))
    empty = np.flatnonzero(counts == 0).tolist()
    if empty:
        yield part.finding("images without objects", NOTE,
                           f"{len(empty)} of {len(part.files)} images have no objects; they are used, as examples of "
                           f"background", [part.named(i) for i in empty[:EXAMPLES]], len(empty))
    if num_queries is not None and (full := np.flatnonzero(counts > num_queries).tolist()):
        full.sort(key=lambda i: -counts[i])
        most = int(counts.max())
        yield part.finding(CROWDED, NOTE,
                           f"{counted(len(full), 'image')} with more than {num_queries} objects, up to {most}; a model "
                           f"of {num_queries} queries finds no more than these: give --num_queries {most} or more (of "
                           f"models with --num_patterns, each query counts as many times)",
                           [f"{part.named(i)}: {counts[i]} objects" for i in full[:EXAMPLES]], len(full))


def _of_files(part: _Part) -> Iterator[Finding]:
    if not part.folder.is_dir():
        yield part.finding("missing image folder", STOP, f"the image folder {part.folder} is not there; copy or link "
                           f"the images there", [], 1)
        return
    missing = [i for i, name in enumerate(part.files) if name is not None and name not in part.stats]
    if missing:
        there = _what_is_there(part, missing)
        remedy = f"{there}; correct the names in" if there else "; copy them there, or take them out of"
        yield part.finding("missing image files", STOP,
                           f"{len(missing)} of the {len(part.files)} images that {part.source} lists are not in "
                           f"{part.folder}{remedy} {part.source.name}",
                           [part.named(i) for i in missing[:EXAMPLES]], len(missing))
    empty = [i for i, name in enumerate(part.files) if name in part.stats and part.stats[name][0] == 0]
    if empty:
        yield part.finding("empty image files", STOP,
                           f"{counted(len(empty), 'image file')} of 0 bytes in {part.folder}; copy them again, or take "
                           f"them out of {part.source.name}", [part.named(i) for i in empty[:EXAMPLES]], len(empty))


def _of_unlisted(parts: list[_Part], others: list[Split]) -> Iterator[Finding]:
    """Image files that no part lists, each once; ``others`` are the parts that were not looked through. Where one of them
    cannot be read, any image in its folder may be its own."""
    folders: list[str] = []
    used = {os.path.normpath(part.folder / name) for part in parts for name in part.files if name is not None}
    for part in parts:
        if any(name is not None and name not in part.stats for name in part.files):
            continue                                                    # which may be called otherwise
        unused = {os.path.normpath(part.folder / name): name for name in part.stats if _is_image(name)}
        if others and not unused.keys() <= used:
            for other in others:
                try:
                    used.update(os.path.normpath(other.images / name) for name in _file_names(other.read()) if name)
                except (ValueError, OSError):
                    folders.append(os.path.join(os.path.normpath(other.images), ""))
            others = []
        unused = {path: name for path, name in unused.items()
                  if path not in used and not path.startswith(tuple(folders))}
        used |= unused.keys()
        if unused:
            names = sorted(unused.values())
            yield part.finding("image files that are not listed", NOTE,
                               f"{counted(len(names), 'image file')} in {part.folder} that no part lists, not used; if "
                               f"there is nothing on them, list them, too: background is worth learning",
                               [printable(name) for name in names[:EXAMPLES]], len(names))


def _what_is_there(part: _Part, missing: list[int]) -> str:
    """What might be meant by a missing file, of what is there."""
    name = str(part.files[missing[0]])
    if "\\" in name and name.replace("\\", "/") in part.stats:
        return ", because of backslashes: write / instead"
    there = {other.lower(): other for other in part.stats}
    if (meant := there.get(name.lower())) is not None:
        return f", but {printable(meant)} is: upper and lower case differ"
    by_stem = {os.path.splitext(other)[0]: other for other in part.stats}
    if (meant := by_stem.get(os.path.splitext(name)[0])) is not None:
        return f", but {printable(meant)} is: the ending differs"
    by_name = {os.path.basename(other): other for other in part.stats}
    if (meant := by_name.get(os.path.basename(name))) is not None:
        return f", but {printable(meant)} is: the folder differs"
    return ""


# What parts have in common, and what not.

def _of_classes(parts: list[_Part]) -> Iterator[Finding]:
    summaries = {part.split: _summary(part) for part in parts}
    train = next((part for part in parts if part.split == "train"), None)
    table = {(row["id"], str(row.get("name"))) for row in train.examined.categories} if train else set()
    for part in parts:
        foreign = [row for row in part.examined.categories if train and (row["id"], str(row.get("name"))) not in table
                   and row["id"] not in part.examined.headings]
        if foreign and train:
            own, known = ([f"{row['id']} {row.get('name')!r}" for row in rows]
                          for rows in (foreign, train.examined.categories))
            if _names(part) == _names(train):
                yield part.finding("classes with other ids", NOTE,
                                   f"categories {few(own)} have other ids in the training data, {few(known, 8)}; their "
                                   f"names are the same, by which they are taken", own)
                continue
            yield part.finding("classes that training does not have", STOP,
                               f"categories {few(own)} are not among those of the training data, {few(known, 8)}; give "
                               f"both the same ids and names", own)
    learnt = summaries["train"].classes if train else {}
    for split, classes in ((split, summary.classes) for split, summary in summaries.items() if train):
        def found(kind: str, names: list[str], where: str, consequence: str, split: str = split) -> Iterator[Finding]:
            if names:
                yield Finding(kind, NOTE, f"{counted(len(names), 'class', 'classes')} {where}: {printable(few(names))}; "
                              f"{consequence}", len(names), [printable(name) for name in names[:EXAMPLES]], split=split)

        if split == "train":
            yield from found("classes without objects", [name for name, n in classes.items() if not n],
                             "without objects", "a model learns to give them low scores")
            continue
        alone = [name for name, n in classes.items() if n and not learnt.get(name)]
        yield from found("classes that are not learnt", alone,
                         f"with objects in {split}, but none in train", "they lower the score")
        unseen = [name for name, n in learnt.items() if n and not classes.get(name)]
        yield from found("classes that are not scored", unseen,
                         f"with objects in train, but none in {split}", f"{split} does not measure them")


def _alike(parts: list[_Part]) -> Iterator[Finding]:
    """Classes whose names differ by case, ``_``, ``-`` and spaces alone, in whichever parts."""
    spelled: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for part in parts for name in _names(part)):
        spelled.setdefault(" ".join(re.sub(r"[_-]", " ", name.casefold()).split()), []).append(name)
    for names in spelled.values():
        if len(names) > 1:
            yield Finding("classes with nearly the same name", NOTE,
                          f"{printable(' and '.join(map(repr, names)))} are different classes as they are written; where "
                          f"one is meant, write it alike everywhere", len(names), [printable(name) for name in names])


def _names(part: _Part) -> list[str]:
    """The names of the classes, in order."""
    return sorted(str(row.get("name")) for row in part.examined.categories if row["id"] not in part.examined.headings)


def _of_shared(parts: list[_Part]) -> Iterator[Finding]:
    """Files of the same content in two parts. Most files differ in size from all of the other parts, and are not read."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for k, part in enumerate(parts):
        for i in part.there():
            groups.setdefault(part.stats[str(part.files[i])][0], []).append((k, i))
    alike = [places for places in groups.values() if len({k for k, _ in places}) > 1]
    with ThreadPoolExecutor(THREADS) as pool:
        for whole in (False, True):
            some = [place for places in alike for place in places]
            found = pool.map(lambda place, whole=whole: _digest(parts[place[0]], place[1], whole), some)
            digests = dict(zip(some, found))
            finer: dict[tuple[int, str], list[tuple[int, int]]] = {}
            for number, places in enumerate(alike):
                for place in places:
                    if digests[place]:
                        finer.setdefault((number, digests[place]), []).append(place)
            alike = [places for places in finer.values() if len({k for k, _ in places}) > 1]
    yield from _same_files(parts, alike)


def _digest(part: _Part, i: int, whole: bool) -> str:
    """Of a file's content, or of a sample of it; empty where it cannot be read."""
    name = str(part.files[i])
    try:
        with open(part.folder / name, "rb") as file:
            if not whole:
                file.seek(max(0, part.stats[name][0] // 2 - SAMPLE // 2))
            return hashlib.blake2b(file.read() if whole else file.read(SAMPLE), digest_size=16).hexdigest()
    except (OSError, ValueError):
        return ""


def _same_files(parts: list[_Part], groups: list[list[tuple[int, int]]]) -> Iterator[Finding]:
    """Findings of images, (part, place), that are the same within each group."""
    shared: dict[tuple[int, int], list[str]] = {}
    within: dict[int, list[str]] = {}
    for places in groups:
        first: dict[int, int] = {}
        for k, i in places:
            if k in first:
                within.setdefault(k, []).append(f"{parts[k].named(i)} is {parts[k].named(first[k])}")
            first.setdefault(k, i)
        for k in first:
            for other in first:
                if k < other:
                    shared.setdefault((k, other), []).append(
                        f"{parts[other].split}: {parts[other].named(first[other])} is {parts[k].split}: "
                        f"{parts[k].named(first[k])}")
    for (k, other), rows in sorted(shared.items()):
        one = len(rows) == 1
        yield parts[other].finding("images in two parts", NOTE,
                                   f"{counted(len(rows), 'image')} of {parts[other].split} {'is' if one else 'are'} in "
                                   f"{parts[k].split}, too, byte by byte, so that scores are better than on new images; "
                                   f"take {'it' if one else 'them'} out of one", rows)
    for k, rows in sorted(within.items()):
        yield parts[k].finding("images under two names", NOTE,
                               f"{counted(len(rows), 'image')} that {parts[k].source.name} has under another name, too, "
                               f"byte by byte; objects marked in one alone are background in the other: keep one", rows)


# Images.

class _Seen(NamedTuple):
    """What opening an image showed."""
    error: str = ""
    size: tuple[int, int] = (0, 0)          # height, width, upright
    orientation: int = 1                    # EXIF's
    kinds: tuple[str, ...] = ()
    digest: str = ""


def _look(parts: list[_Part], look: Callable[[Path, tuple[Any, Any]], _Seen], threads: int,
          progress: Callable[[int, int], None] | None) -> list[dict[int, _Seen]]:
    """What ``look`` says of each file, given its path and the size that is annotated: for each part, by place."""
    tasks = [(k, i) for k, part in enumerate(parts) for i in part.there()]
    steps = [tasks[first:first + STEP] for first in range(0, len(tasks), STEP)]
    seen: list[dict[int, _Seen]] = [{} for _ in parts]

    def of_step(step: list[tuple[int, int]]) -> list[_Seen]:
        rows = [(parts[k], parts[k].examined.images[i], i) for k, i in step]
        return [look(part.folder / str(part.files[i]), (row.get("height"), row.get("width"))) for part, row, i in rows]

    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for step, found in zip(steps, pool.map(of_step, steps)):
            for (k, i), one in zip(step, found):
                seen[k][i] = one
            done += len(step)
            if progress is not None:
                progress(done, len(tasks))
    return seen


def _header(path: Path, said: tuple[Any, Any]) -> _Seen:
    """Reads an image's header, and where it disagrees with the size that is ``said``, EXIF's orientation."""
    try:
        size = image_size(path)
        if size == said or path.suffix.lower() == ".npy":
            return _Seen("", size)
        with Image.open(path) as image:
            return _Seen("", size, image.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGED as error:
        return _Seen(str(error))


def _opened(path: Path, said: tuple[Any, Any], channels: int) -> _Seen:
    """Reads an image as training does; of a JPEG, the pixels are decoded at an eighth of the size."""
    try:
        content = path.read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        kinds, orientation = [], 1
        if path.suffix.lower() != ".npy":
            with Image.open(io.BytesIO(content)) as image:
                kinds = _kinds(image, content, channels)
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
                if image.format == "JPEG" and orientation == 1 and channels in (1, 3):
                    width, height = image.size
                    image.draft(None, (max(1, width // 8), max(1, height // 8)))
                    image.load()
                    return _Seen("", (height, width), 1, tuple(kinds), digest)
        size = height_width(read_image(path, content, channels))
        return _Seen("", size, orientation, tuple(kinds), digest)
    except DAMAGED as error:
        try:
            read_image(path, None, channels)                            # whose message names file and remedy
        except OSError as named:
            return _Seen(str(named))
        return _Seen(f"image {path} cannot be read: {error}")


def _kinds(image: Image.Image, content: bytes, channels: int) -> list[str]:
    """What is unusual about a file, and what becomes of it."""
    kinds = []
    if image.mode.startswith("I") or image.format == "PNG" and content[24:25] == b"\x10":
        kinds.append("16 bits a channel, scaled to 8")
    if image.mode in ("P", "PA"):
        kinds.append("palette, turned into its colours")
    if image.mode in ("L", "LA", "1") and channels == 3:
        kinds.append("grey, the same in all three channels")
    if image.mode in ("CMYK", "YCCK"):
        kinds.append("CMYK, converted to RGB")
    if channels in (1, 3) and (image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info):
        kinds.append("with transparency, which is ignored")
    if getattr(image, "n_frames", 1) > 1 and channels in (1, 3) and image.format != "MPO":
        kinds.append("several pictures, of which the first is used")
    return kinds


def _of_headers(parts: list[_Part], seen: list[dict[int, _Seen]]) -> Iterator[Finding]:
    for part, mine in zip(parts, seen):
        bad = [i for i, found in mine.items() if found.error]
        if bad:
            yield part.finding("images that cannot be read", STOP, printable(mine[bad[0]].error),
                               [part.named(i) for i in bad[:EXAMPLES]], len(bad))
        yield from _other_sizes(part, mine)


def _of_pixels(parts: list[_Part], seen: list[dict[int, _Seen]]) -> Iterator[Finding]:
    groups: dict[str, list[tuple[int, int]]] = {}
    for k, (part, mine) in enumerate(zip(parts, seen)):
        kinds = Counter(kind for found in mine.values() for kind in found.kinds)
        if kinds:
            unusual = [i for i, found in mine.items() if found.kinds]
            yield part.finding("kinds of image files", NOTE,
                               "; ".join(f"{counted(n, 'image')}: {kind}" for kind, n in kinds.items()),
                               [f"{part.named(i)}: {', '.join(mine[i].kinds)}" for i in unusual[:EXAMPLES]], len(unusual))
        for i, found in mine.items():
            if found.digest:
                groups.setdefault(found.digest, []).append((k, i))
    yield from _same_files(parts, [places for places in groups.values() if len(places) > 1])


def _other_sizes(part: _Part, seen: dict[int, _Seen]) -> Iterator[Finding]:
    """Images that are not as high and wide as the annotations say, upright; turned ones apart."""
    first = {name: i for i, name in enumerate(part.files)}
    turned: list[tuple[int, _Seen]] = []
    other: list[tuple[int, _Seen]] = []
    for i, row in enumerate(part.examined.images):
        found = seen.get(i) or seen.get(first.get(part.files[i], -1))
        said = (row.get("height"), row.get("width"))
        if found is None or found.error or found.size == said or None in said:
            continue
        (turned if found.orientation in (5, 6, 7, 8) and found.size == said[::-1] else other).append((i, found))

    def named(i: int, found: _Seen) -> str:
        row = part.examined.images[i]
        return (f"{part.named(i)}: {found.size[1]} x {found.size[0]} upright, annotated {row['width']} x {row['height']}"
                + (f", EXIF orientation {found.orientation}" if found.orientation != 1 else ""))

    if turned:
        yield part.finding("sizes before EXIF rotation", STOP,
                           f"{counted(len(turned), 'image')} annotated with width and height as before the rotation that "
                           f"their EXIF orientation asks for, while training sees them upright. If the boxes were drawn "
                           f"on the picture as it lies in the file, take the EXIF orientation out of the files; if on "
                           f"the upright picture, exchange width and height",
                           [named(*one) for one in turned[:EXAMPLES]], len(turned))
    if other:
        yield part.finding("sizes other than the files'", STOP,
                           f"{counted(len(other), 'image')} with another width and height than annotated, so that boxes "
                           f"would be misplaced; correct width, height and boxes, or copy the "
                           f"files that were annotated here", [named(*one) for one in other[:EXAMPLES]], len(other))


# Reports that are kept.

def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detr-family" / "checks"


def _program() -> str:
    """What a report depends on besides the data."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return f"{digest.hexdigest()} {sys.version} {np.__version__} {PIL.__version__}"


def _from_cache(file: Path) -> Report | None:
    """A report, or None where there is none that can be read."""
    try:
        return Report.from_dict(json.loads(file.read_text(encoding="utf-8")), cached=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _to_cache(file: Path, report: Report) -> None:
    """Keeps a report, where that can be done: written aside and renamed, so that none is ever read half."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as aside:
            json.dump(report.as_dict(), aside)
        os.replace(aside.name, file)
    except (OSError, ValueError):
        pass


def _wrapped(text: str, width: int = 96) -> list[str]:
    """Text in lines, words whole."""
    return [line for part in text.splitlines() for line in textwrap.wrap(part, width, break_long_words=False,
                                                                         break_on_hyphens=False)]
