"""Where pictures come from: files, folders, globs, zips, videos, cameras, network streams, standard input. One after the
other, so that no more of them is in memory than is looked at.

    for item in pictures(["photos", "clip.mp4"]):
        if item.picture is not None:                    # else item.problem says why
            found = detector.predict(item.picture)

Videos need PyAV (``pip install av``), which is imported where one is opened.
"""
from __future__ import annotations

import codecs
import glob
import io
import lzma
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image, ImageOps

from .distributed import say
from .preprocessing import DAMAGED, Picture, as_picture, too_large

FORMATS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_FORMATS = (".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
                 ".webm", ".wmv")
MOST_BYTES = 1 << 30                    # of one image in a zip or on standard input
SILENCE = 30.0                          # seconds after which a stream from the network has ended
NO_PYAV = "videos and cameras are read and written with PyAV, which is not installed; pip install av"
PPM = re.compile(rb"P[1-6]\s+(#|[0-9]+\s+[0-9]+\s)")     # the header of PBM, PGM and PPM: text, unlike all others
TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}

Read = Callable[[Path, "bytes | None", int], Picture]
"""A path, the file's content where it is known, and the number of channels -> the picture, upright; OSError where it
cannot be read."""


class Clip(NamedTuple):
    """What the frames of a video have in common."""
    name: str                           # as it was given
    live: bool                          # a camera or a stream from the network, without an end
    rate: Fraction                      # frames a second, on average
    time_base: Fraction                 # seconds; the unit of ``Item.pts``
    pixel_aspect: Fraction              # width of a pixel by its height, 1 nearly always


class Item(NamedTuple):
    """A picture, or the reason why there is none."""
    name: str                           # as found: photos/a.jpg, photos.zip/inner/a.jpg, clip.mp4#12 (from 0)
    picture: Picture | None
    problem: str = ""
    clip: Clip | None = None
    frame: int = 0                      # of a clip, counted from 0
    pts: int = 0                        # of a clip: when it is shown


class Source(Protocol):
    """Pictures in order. ``length`` is None where it is not known; of a video it is what the file says of itself."""
    name: str
    length: int | None
    is_video: bool

    def items(self, channels: int) -> Iterator[Item]: ...


def sources(wanted: Sequence[str], read: Read | None = None, formats: Sequence[str] = FORMATS) -> list[Source]:
    """What ``wanted`` names, each once: image files, globs and folders, all of whose images come first, sorted by path;
    then, in the order given, zips, videos, ``camera:0``, streams (``rtsp://...``), and standard input, ``-``.

    In folders (and zips), files whose names have no ending of ``formats`` are passed over, and hidden ones; how many, but
    for these, is said. Globs may also name zips and videos. Raises FileNotFoundError for what is not there or has no
    images.
    """
    read = read or read_picture
    files: dict[str, Path] = {}
    others: dict[str, Source] = {}
    for source in dict.fromkeys(wanted):
        if source == "-":
            others[source] = Piped(sys.stdin.buffer, read)                                      # type: ignore[arg-type]
        elif source.startswith("camera:"):
            others[source] = Video(source, *camera(source))
        elif re.match(r"[a-z][a-z0-9+.-]+://", source):
            others[source] = Video(re.sub(r"(?<=://)[^/@]*@", "", source), source)              # without a password
        else:
            for path in _files_of(source, formats):
                place, ending = os.path.abspath(path), path.suffix.lower()
                if ending == ".zip" and place not in others:
                    others[place] = Zipped(path, read, formats)
                elif ending in VIDEO_FORMATS and place not in others:
                    others[place] = Video(path.as_posix(), str(path))
                elif ending not in (".zip", *VIDEO_FORMATS):
                    files[place] = path
    images: list[Source] = [Files([files[place] for place in sorted(files)], read)] if files else []
    return [*images, *others.values()]


def pictures(wanted: Sequence[str], channels: int = 3, read: Read | None = None) -> Iterator[Item]:
    """All pictures of ``sources``, one after the other, for a model with so many input channels."""
    for source in sources(wanted, read):
        yield from source.items(channels)


def _files_of(source: str, formats: Sequence[str]) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    there, endings = ((path.iterdir(), formats) if path.is_dir() else
                      (map(Path, glob.glob(source, recursive=True)), (*formats, ".zip", *VIDEO_FORMATS)))
    inside = sorted(file for file in there if not file.name.startswith("."))
    files = [file for file in inside if file.suffix.lower() in endings and file.is_file()]
    if path.is_dir() and files:
        passed = Counter("folder" if file.is_dir() else kind_of(file.name) for file in set(inside) - set(files))
        _passed_over(source, passed, "name them or use a glob")
    if not files:
        what = ("is a folder without images directly in it" if path.is_dir() else
                "matches no images" if glob.has_magic(source) else "is not there")
        raise FileNotFoundError(f"{source} {what}; give image files, folders or globs in quotes, with files named "
                                f"*{', *'.join(formats)}; or zips, videos, camera:0, - (standard input)")
    return files


def read_picture(path: Path, content: bytes | None = None, channels: int = 3) -> Picture:
    """A file as ``preprocessing.as_picture`` gives it. Where a model's images are not RGB or grey, contents of files need
    another reader."""
    if content is None:
        return as_picture(path, channels)
    try:
        with Image.open(io.BytesIO(content)) as image:
            return as_picture(ImageOps.exif_transpose(image), channels)
    except Image.DecompressionBombError as error:
        raise too_large(path, error) from error
    except DAMAGED as error:
        raise OSError(f"image {path} ({len(content)} bytes) cannot be read: {error}") from error


def kind_of(name: str) -> str:
    """Of a file that is no image."""
    ending = Path(name).suffix.lower()
    return "video" if ending in VIDEO_FORMATS else "zip" if ending == ".zip" else "other file"


def _passed_over(source: str, passed: Counter[str], remedy: str) -> None:
    """A line about what a source has besides images."""
    counts = [f"{passed[kind]} {kind}{'s' * (passed[kind] != 1)}" for kind in ("video", "zip", "folder", "other file")
              if passed[kind]]
    if counts:
        say(f"{source}: {' and '.join(filter(None, [', '.join(counts[:-1]), counts[-1]]))} passed over; {remedy}")


class Files:
    """Image files."""
    is_video = False

    def __init__(self, paths: Sequence[Path], read: Read) -> None:
        self.paths, self.read = paths, read
        self.name = "images"
        self.length: int | None = len(paths)

    def items(self, channels: int) -> Iterator[Item]:
        for path in self.paths:
            yield _item(path.as_posix(), partial(self.read, path, None, channels))


class Zipped:
    """The images in a zip, at any depth, sorted by name; nothing is unpacked to the disk, and what a path in it says of
    places outside it is a name like others."""
    is_video = False

    def __init__(self, path: Path, read: Read, formats: Sequence[str]) -> None:
        self.path, self.name, self.read = path, path.as_posix(), read
        self.inside: list[str] = []
        self.problem = ""
        try:
            with zipfile.ZipFile(path) as archive:
                entries = [entry for entry in archive.infolist() if not _hidden(entry)]
            self.inside = sorted({entry.filename for entry in entries if _wanted(entry, formats)})
        except (zipfile.BadZipFile, NotImplementedError) as error:
            self.problem = f"{path} ({path.stat().st_size} bytes) cannot be read as a zip: {error}; copy or pack it again"
        if not self.inside and not self.problem:
            raise FileNotFoundError(f"{path} is a zip without images, files named *{', *'.join(formats)}")
        if self.inside:
            _passed_over(self.name, Counter(kind_of(entry.filename) for entry in entries if not _wanted(entry, formats)),
                         "unpack what is wanted of them")
        self.length: int | None = len(self.inside) or 1

    def items(self, channels: int) -> Iterator[Item]:
        if self.problem:
            yield Item(self.name, None, self.problem)
            return
        with zipfile.ZipFile(self.path) as archive:
            for name in self.inside:
                yield _item(f"{self.name}/{name}", partial(self.picture, archive, name, channels))

    def picture(self, archive: zipfile.ZipFile, name: str, channels: int) -> Picture:
        return self.read(Path(f"{self.name}/{name}"), self.content(archive, name), channels)

    def content(self, archive: zipfile.ZipFile, name: str) -> bytes:
        size = archive.getinfo(name).file_size
        if size > MOST_BYTES:
            raise OSError(f"image {self.name}/{name} has {size} bytes, more than the {MOST_BYTES} that are read of one; "
                          f"unpack the zip and give its folder")
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError,
                RuntimeError, NotImplementedError) as error:                            # with a password; unknown methods
            raise OSError(f"image {self.name}/{name} cannot be read: {error}") from error


def _hidden(entry: zipfile.ZipInfo) -> bool:
    """Whether an entry is a folder, or what systems keep to themselves."""
    name = entry.filename.replace("\\", "/").rsplit("/", 1)[-1]
    return entry.is_dir() or name.startswith(".") or entry.filename.startswith("__MACOSX/")


def _wanted(entry: zipfile.ZipInfo, formats: Sequence[str]) -> bool:
    return entry.filename.lower().endswith(tuple(formats))


class Piped:
    """Standard input: one image's bytes, or a path a line. Of these, the beginning is UTF-8 without a byte 0, which that
    of no image is but PPM's, whose header is text."""
    is_video = False

    def __init__(self, stream: io.BufferedReader, read: Read) -> None:
        self.stream, self.read, self.name = stream, read, "standard input"
        self.length: int | None = None

    def items(self, channels: int) -> Iterator[Item]:
        first = self.stream.peek(64)[:64]
        if not first:
            raise ValueError("nothing came on standard input; pipe an image into it, or a path a line")
        if is_text(first):
            for line in self.stream:
                if path := os.fsdecode(line).rstrip("\r\n"):
                    yield _item(Path(path).as_posix(), partial(self.read, Path(path), None, channels))
        else:
            content = self.stream.read(MOST_BYTES + 1)
            yield _item("stdin", partial(self.picture, content, channels))

    def picture(self, content: bytes, channels: int) -> Picture:
        if len(content) > MOST_BYTES:
            raise OSError(f"what came on standard input has more than the {MOST_BYTES} bytes that are read of an image; "
                          f"give it as a file")
        return self.read(Path("stdin"), content, channels)


def is_text(beginning: bytes) -> bool:
    """Whether these bytes, which may end within a letter, could be paths."""
    if PPM.match(beginning):
        return False
    try:
        return b"\0" not in beginning and codecs.getincrementaldecoder("utf-8")().decode(beginning) is not None
    except UnicodeDecodeError:
        return False


def _item(name: str, read: Callable[[], Picture]) -> Item:
    try:
        return Item(name, read())
    except OSError as error:
        return Item(name, None, str(error))


def pyav() -> Any:
    """The module ``av``; ImportError with what to do where it is not there."""
    try:
        import av
    except ImportError as error:
        raise ImportError(NO_PYAV) from error
    return av


def camera(source: str) -> tuple[str, str]:
    """``camera:0`` -> the device and PyAV's format for it."""
    number = source.removeprefix("camera:")
    if not number.isdecimal():
        raise ValueError(f"{source}: the number of a camera is needed, as in camera:0")
    formats = pyav().formats_available
    for platform, kind, device in (("linux", "v4l2", f"/dev/video{number}"), ("darwin", "avfoundation", number),
                                   ("win32", "vfwcap", number)):
        if sys.platform.startswith(platform) and kind in {name for many in formats for name in many.split(",")}:
            if platform == "linux" and not os.path.exists(device):
                there = sorted(glob.glob("/dev/video*"))
                raise FileNotFoundError(f"{source}: there is no camera {device}; "
                                        + (f"there are {', '.join(there)}" if there else "this machine has none"))
            return device, kind
    raise OSError(f"{source}: this build of PyAV reads no cameras on {sys.platform}; give the address of a stream "
                  f"(rtsp://...) or a video file instead")


class Video:
    """The frames of a video file, camera or stream, upright as its rotation says, in the order they are shown. A frame
    that cannot be decoded is an item without a picture."""
    is_video = True

    def __init__(self, name: str, address: str, kind: str | None = None) -> None:
        self.name, self.address, self.kind = name, address, kind
        self.live = kind is not None or "://" in address
        self.length: int | None = None
        self.problem, self.opened = "", None
        try:
            self.opened = self.open()
            self.length = None if self.live else self.opened.streams.video[0].frames or None
        except OSError as error:
            if self.live:
                raise
            self.problem = str(error)
        if self.opened is not None and not self.live:           # a camera is opened once, of many files none stays open
            self.opened = self.opened.close()

    def open(self) -> Any:
        av = pyav()
        try:
            container = av.open(self.address, format=self.kind, timeout=SILENCE if "://" in self.address else None)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise OSError(f"video {self.name} cannot be opened: {why}; copy it again, or convert it to mp4") from error
        if not container.streams.video:
            container.close()
            raise OSError(f"video {self.name} has no pictures in it")
        return container

    def items(self, channels: int) -> Iterator[Item]:
        if channels not in (1, 3):
            raise ValueError(f"{self.name}: a video's frames are RGB, and this model's images have {channels} channels")
        if self.problem:
            yield Item(self.name, None, self.problem)
            return
        av = pyav()
        container, number, last, came = self.opened or self.open(), 0, -1, 0
        with container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            base = Fraction(stream.time_base or Fraction(1, 90000))
            rate = Fraction(stream.average_rate or stream.guessed_rate or 30)
            clip = Clip(self.name, self.live, rate, base, Fraction(stream.sample_aspect_ratio or 1))
            start: int | None = None
            for packet in self.packets(container, stream):
                frames: list[Any] = []
                problem = packet if isinstance(packet, str) else ""
                if not problem:
                    came += packet.size > 0
                    try:
                        frames = packet.decode()
                    except av.error.FFmpegError as error:
                        problem = error.strerror or str(error)
                if problem:
                    name = f"{self.name}#{number}"
                    yield Item(name, None, f"frame {name} cannot be read: {problem}", clip, number)
                    number += 1
                for frame in frames:
                    if frame.pts is not None:
                        start = frame.pts if start is None else start
                        last = max(last + 1, frame.pts - start)
                    else:
                        last = max(last + 1, round(number / rate / base))
                    yield Item(f"{self.name}#{number}", as_picture(upright(frame), channels), "", clip, number, last)
                    number += 1
            if self.length is not None and came < self.length and number < self.length:
                yield Item(f"{self.name}#{number}-{self.length - 1}", None, f"the last {self.length - number} of the "
                           f"{self.length} frames that {self.name} counts are not in it: it is cut short", clip, number)

    def packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """Packets; as the last a sentence where the file breaks off."""
        av = pyav()
        try:
            yield from container.demux(stream)
        except av.error.FFmpegError as error:
            yield f"the video breaks off here ({error.strerror or error})"


def upright(frame: Any) -> Image.Image:
    """A frame of PyAV as RGB, turned as its display matrix says."""
    image: Image.Image = frame.to_image()
    turn = TURNS.get(round(getattr(frame, "rotation", 0)) % 360)
    return image if turn is None else image.transpose(turn)
