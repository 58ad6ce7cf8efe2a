"""A whole data set, looked through before anything is trained on it: annotations, files, and what its parts share."""
from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import ExifTags, Image

from datasets.annotations import counted, few, parse_json
from datasets.examination import EXAMPLES, FIX, NOTE, SKIP, STOP, Examined, Finding, examine, printable
from datasets.images import DAMAGED, height_width, read_image
from datasets.split import IMAGE_SUFFIXES, Format, Split

ACTIONS = {STOP: "training does not begin", SKIP: "left out of training", FIX: "mended in memory, the files stay as "
           "they are", NOTE: "used as it is"}
ORDINARY = ("crowds", "images without objects", "kinds of image files", "how the files were read")
"""Said by others, or nothing to act on."""
THREADS = 16                                # that wait for the disk
SAMPLE = 4096                               # bytes in the middle of a file, which tell most files of one size apart


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
    pixels: bool                            # whether images were opened
    cached: bool = False                    # whether this is of an earlier look at the same files

    @property
    def stops(self) -> list[Finding]:
        """What must be corrected before training."""
        return [finding for finding in self.findings if finding.action == STOP]

    def brief(self) -> str:
        """A few lines: what stops training in full, of the rest how many rows there are."""
        said = [finding for finding in self.findings if finding.kind not in ORDINARY]
        lines = [f"data check: {self.format}, {', '.join(self.splits) or 'nothing that can be read'}; "
                 + (f"{counted(len(self.stops), 'fault')} to correct before training" if self.stops else
                    "nothing stops training") + (" (from the check of the same files before)" if self.cached else "")]
        for finding in said:
            what = f"{finding.kind}: {finding.count} ({few(finding.rows, 2)})"
            lines.append(f"    {finding.action:<4}  {finding.split + ': ' if finding.split else ''}"
                         + (finding.line() if finding.action == STOP else what))
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
                  "Nothing stops training." + ("" if self.pixels else " Images were not opened.")]
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
                "findings": [finding._asdict() for finding in self.findings], "pixels": self.pixels}

    @classmethod
    def from_dict(cls, values: dict[str, Any], cached: bool = False) -> Report:
        """The inverse of ``as_dict``."""
        return cls(values["format"], {split: Summary(**part) for split, part in values["splits"].items()},
                   [Finding(**finding) for finding in values["findings"]], values["pixels"], cached)


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
        n = len(rows) if count is None else count
        return Finding(kind, action, message, n, list(rows[:EXAMPLES]), split=self.split)

    def named(self, i: int) -> str:
        return f"{printable(self.files[i] or '')} (image id {self.examined.images[i]['id']})"

    def there(self) -> list[int]:
        """Places of images whose file is there and not empty; of a file listed twice, the first."""
        first = {name: i for i, name in reversed(list(enumerate(self.files))) if name in self.stats}
        return sorted(i for name, i in first.items() if self.stats[name][0])


def check(format: Format, num_queries: int | None = None, pixels: bool = False, masks: bool = False, channels: int = 3,
          progress: Callable[[int, int], None] | None = None, cache: bool = True) -> Report:
    """All that is the matter with a data set.

    Its annotations (``examine``), whether the files are there, whether parts share an image or differ in classes, and,
    with ``num_queries``, where there are more objects than a model has queries. Images of different parts are the same
    where their files are: of those of one size in bytes, a sample is compared, and where that is the same, the whole.
    ``pixels`` opens every image, as training does, with ``channels``: what cannot be read, other sizes than annotated,
    kinds of files, the same file twice in one part. ``masks``: whether segmentations are to be used. ``progress`` is
    called with how many images of how many were opened.

    A report on the same annotations, the same names, sizes and times of image files and the same program is taken from
    a file below ``$XDG_CACHE_HOME`` (``~/.cache``), unless ``cache`` is False.
    """
    key = hashlib.blake2b(repr((_program(), format.name, num_queries, pixels, masks, channels)).encode(), digest_size=20)
    findings: list[Finding] = []
    contents: dict[str, Any] = {}
    stats: dict[str, Stats] = {}

    def unreadable(split: str, error: Exception) -> None:
        findings.append(Finding("annotations that cannot be read", STOP, printable(str(error)), 1, [], "", split))

    for split, stored in format.splits.items():
        try:
            contents[split] = _content(format, stored)
        except (ValueError, OSError) as error:
            unreadable(split, error)
            continue
        content = contents[split]
        if isinstance(content, dict):
            findings += [Finding("how the files were read", NOTE, printable(note), 1, [], "", split)
                         for note in content.get("notes", ())]
        whole = isinstance(content, bytes)                              # of a json, whose files are not known yet
        stats[split] = _listing(stored.images) if whole else _stats(stored.images, _file_names(content))
        key.update(content if whole else json.dumps(content, sort_keys=True, default=str).encode())
        key.update(repr((split, str(stored.source), str(stored.images), sorted(stats[split].items()))).encode())
    file = _cache_folder() / f"{key.hexdigest()}.json"
    cache = cache and all(finding.action == NOTE for finding in findings)
    if cache and (report := _from_cache(file)):
        return report

    parts = []
    for split, content in contents.items():
        source, folder = format.splits[split].source, format.splits[split].images
        try:
            data = parse_json(content, source) if isinstance(content, bytes) else content
        except ValueError as error:
            unreadable(split, error)
            continue
        examined = examine(data, masks)
        findings += [finding._replace(split=split) for finding in examined.findings]
        if examined.images and examined.categories:
            files = _file_names({"images": examined.images})
            outside = [name for name in files if name is not None and name not in stats[split]]
            if isinstance(content, bytes) and outside:
                more = _stats(folder, outside)
                cache = cache and not more                              # files that the key knows nothing of
                stats[split].update(more)
            parts.append(_Part(split, source, folder, examined, files, stats[split]))
        del data
    for part in parts:
        findings += [*_of_files(part, parts), *_of_objects(part, num_queries)]
    findings += [*_of_classes(parts), *(_of_pixels(parts, channels, progress) if pixels else _of_shared(parts))]
    findings.sort(key=lambda finding: list(ACTIONS).index(finding.action))
    report = Report(format.name, {part.split: _summary(part) for part in parts}, findings, pixels)
    if cache:
        _to_cache(file, report)
    return report


# Reading and listing.

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


def _stats(folder: Path, names: Iterable[str | None]) -> Stats:
    """Of these files: one call a folder, where asking file by file takes long."""
    wanted = {name for name in names if name is not None}
    listed: Stats = {}
    for inner in {os.path.dirname(name) for name in wanted}:
        listed.update(_in_folder(os.path.join(folder, inner), inner))
    found = {name: listed[name] for name in wanted if name in listed}
    for name in wanted - found.keys():                                  # such as "./a.png"
        try:
            status = os.stat(folder / name)
        except (OSError, ValueError):
            continue
        if not (folder / name).is_dir():
            found[name] = (status.st_size, status.st_mtime_ns)
    return found


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
        yield part.finding("images with more objects than queries", NOTE,
                           f"{counted(len(full), 'image')} with more than {num_queries} objects, up to {most}; a model "
                           f"of {num_queries} queries finds no more than these: give --num_queries {most} or more",
                           [f"{part.named(i)}: {counts[i]} objects" for i in full[:EXAMPLES]], len(full))


def _of_files(part: _Part, parts: list[_Part]) -> Iterator[Finding]:
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
    used = {os.path.normpath(other.folder / name) for other in parts for name in other.files if name is not None}
    unused = sorted(name for name in part.stats if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
                    and os.path.normpath(part.folder / name) not in used)
    if unused and not missing:
        yield part.finding("image files that are not listed", NOTE,
                           f"{counted(len(unused), 'image file')} in {part.folder} that no part lists, not used; if "
                           f"there is nothing on them, list them, too: background is worth learning",
                           [printable(name) for name in unused[:EXAMPLES]], len(unused))


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
        if foreign:
            known = [f"{row['id']} {row.get('name')!r}" for row in train.examined.categories] if train else []
            rows = [f"{row['id']} {row.get('name')!r}" for row in foreign]
            yield part.finding("classes that training does not have", STOP,
                               f"categories {few(rows)} are not among those of the training data, {few(known, 8)}; give "
                               f"both the same ids and names", rows)
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


def _opened(path: Path, channels: int) -> _Seen:
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


def _of_pixels(parts: list[_Part], channels: int, progress: Callable[[int, int], None] | None) -> Iterator[Finding]:
    tasks = [(k, i) for k, part in enumerate(parts) for i in part.there()]
    seen: dict[tuple[int, int], _Seen] = {}
    with ThreadPoolExecutor(max(4, os.cpu_count() or 1)) as pool:
        paths = [parts[k].folder / str(parts[k].files[i]) for k, i in tasks]
        for n, (task, found) in enumerate(zip(tasks, pool.map(lambda path: _opened(path, channels), paths)), 1):
            seen[task] = found
            if progress is not None:
                progress(n, len(tasks))
    for k, part in enumerate(parts):
        mine = {i: found for (of, i), found in seen.items() if of == k}
        bad = [i for i, found in mine.items() if found.error]
        if bad:
            yield part.finding("images that cannot be read", STOP, printable(mine[bad[0]].error),
                               [part.named(i) for i in bad[:EXAMPLES]], len(bad))
        yield from _other_sizes(part, mine)
        kinds = Counter(kind for found in mine.values() for kind in found.kinds)
        if kinds:
            unusual = [i for i, found in mine.items() if found.kinds]
            yield part.finding("kinds of image files", NOTE,
                               "; ".join(f"{counted(n, 'image')}: {kind}" for kind, n in kinds.items()),
                               [f"{part.named(i)}: {', '.join(mine[i].kinds)}" for i in unusual[:EXAMPLES]], len(unusual))
    groups: dict[str, list[tuple[int, int]]] = {}
    for task, found in seen.items():
        if found.digest:
            groups.setdefault(found.digest, []).append(task)
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
                           f"the upright picture, exchange width and height in {part.source.name}",
                           [named(*one) for one in turned[:EXAMPLES]], len(turned))
    if other:
        yield part.finding("sizes other than the files'", STOP,
                           f"{counted(len(other), 'image')} with another width and height than annotated, so that boxes "
                           f"would be misplaced; correct width, height and boxes in {part.source.name}, or copy the "
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
