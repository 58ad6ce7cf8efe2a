"""Checkpoint files: written whole or not at all, read without running code, loaded strictly under published names."""
from __future__ import annotations

import argparse
import functools
import json
import os
import re
import socket
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from . import distributed

HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[^.]*$")                                    # detr-r50-e632da11.pth
PARTIAL = re.compile(r"\..+\.([A-Za-z0-9-]+)\.(\d+)\.partial")     # machine and process behind the file's name
FORGOTTEN = 3600                                                    # seconds
SCALARS = (type(None), bool, int, float, str)
AVERAGES = ("state_dict_ema", "model_ema")      # names of training programs for the average of the weights over steps,
WEIGHTS = (*AVERAGES, "model", "state_dict")    # and for the weights; the first that a file has is taken


def _check_readable(value: Any, where: str) -> None:
    """Refuse what ``torch.load(weights_only=True)`` would not give back. Types are compared exactly: a numpy.float64
    is a float and a namedtuple is a tuple, but neither can be read again."""
    kind = type(value)
    if kind in SCALARS or kind in (Tensor, nn.Parameter):
        return
    if kind in (dict, OrderedDict, Counter):
        for key, item in value.items():
            if type(key) not in SCALARS:
                raise TypeError(f"{where} has the key {key!r} of type {type(key).__module__}.{type(key).__name__}; the "
                                f"keys of a checkpoint are strings or numbers")
            _check_readable(item, f"{where}[{key!r}]")
    elif kind in (list, tuple):
        for i, item in enumerate(value):
            _check_readable(item, f"{where}[{i}]")
    else:
        raise TypeError(f"{where} is a {kind.__module__}.{kind.__name__}, which could not be read back without running "
                        f"code; convert it to tensors, dicts, lists, tuples, strings, numbers or None")


def _system_error(error: BaseException) -> BaseException:
    """The OSError that PyTorch's archive writer covers with a RuntimeError of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def write_whole(path: str | Path, write: Callable[[IO[bytes]], Any], previous: bool = False) -> None:
    """Make the file ``path`` of what ``write`` puts into the open file that it is given, creating its folders: afterwards
    it is complete and on the disk, or what was there before is still there. In between, the new content stands beside it
    under a hidden name that ends with ``.partial``. ``previous`` keeps what was there as ``NAME_previous.ENDING``.

    Raises OSError when the file cannot be written.
    """
    path = Path(path)
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            partial.unlink()                # of a killed process that had this number
        with open(partial, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())         # the content is on the disk before the name points to it
        if previous and path.is_file():
            _keep_previous(path)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write {path}: {_system_error(error)}. Make room, or choose another output folder"
                      + ("; the file that was there is unchanged" if path.is_file() else "")) from error
    finally:
        with suppress(OSError):
            partial.unlink()
    _sync_folder(path.parent)


def partial_of(path: Path) -> Path:
    """The name of ``path`` while this process writes it."""
    return path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.partial")


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left half-written in ``folder``, and say so: of this machine's processes those that
    are no more, of other machines' what has not changed for an hour."""
    for path in folder.glob(".*.partial"):
        named = PARTIAL.fullmatch(path.name)
        with suppress(OSError):
            found = path.stat()
            left = named and named[1] == _machine() and not _is_running(int(named[2]))
            if named and (left or time.time() - found.st_mtime > FORGOTTEN):
                path.unlink()
                distributed.say(f"removed {path}: {found.st_size:,} bytes of a file that was not written to its end")


def _is_running(process: int) -> bool:
    """Whether another process has that number; this one, where it had it before a restart, is not writing while it
    asks."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:                                             # another user's
        return True
    return True


def previous_of(path: Path) -> Path:
    """Where ``write_whole`` keeps the former ``path``."""
    return path.with_stem(f"{path.stem}_previous")


def _keep_previous(path: Path) -> None:
    """A second name for the file at ``path``, which takes no room until the first name goes to another file."""
    former = previous_of(path)
    second = partial_of(former)
    try:
        with suppress(FileNotFoundError):
            second.unlink()
        os.link(path, second)
        os.replace(second, former)
    except OSError as error:
        _without_previous(path.parent, error.strerror or str(error))
    finally:
        with suppress(OSError):             # it is still there where both were names of one file
            second.unlink()


@functools.lru_cache
def _without_previous(folder: Path, reason: str) -> None:
    distributed.say(f"{folder}: no previous checkpoint is kept beside the newest, since a file there cannot have two "
                    f"names ({reason})")


def _sync_folder(folder: Path) -> None:
    """Put a change of names on the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(path: str | Path, state: dict[str, Any], previous: bool = False) -> None:
    """Write ``state`` to ``path`` as ``write_whole`` does, for ``load`` to read.

    ``state`` holds tensors, dicts, lists, tuples, strings, numbers and None alone. Raises TypeError naming the entry that
    is something else, OSError when the file cannot be written.
    """
    _check_readable(state, "state")
    write_whole(path, lambda file: torch.save(state, file), previous)


def save_safetensors(path: str | Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write weights to ``path``, which ends with ``.safetensors``, as ``write_whole`` does. Each entry of ``metadata``,
    made of dicts, lists, tuples, strings, numbers and None, becomes a text in JSON in the file's header; ``load`` gives
    the entries back, lists for tuples.

    A tensor that stands under two names is written twice. Raises TypeError naming the entry that is something else,
    ImportError without the package safetensors, OSError when the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path}: give it the ending .safetensors, by which it is known when it is read")
    try:
        from safetensors.torch import save as as_bytes  # here alone: few files need it
    except ImportError as error:
        raise ImportError(f"{path}: writing a .safetensors file needs the package safetensors; pip install "
                          f"safetensors") from error
    for name, value in metadata.items():
        _check_json(value, f"metadata[{name!r}]")
    texts = {"format": "pt", **{name: json.dumps(value) for name, value in metadata.items()}}
    seen: set[int] = set()
    tensors = {}
    for name, tensor in state_dict.items():                     # the format refuses two names of one memory
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    write_whole(path, lambda file: file.write(as_bytes(tensors, texts)))


def _check_json(value: Any, where: str) -> None:
    """Refuse what JSON would not give back, tuples apart."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{where} has the key {key!r}; the keys of a .safetensors file's metadata are strings")
            _check_json(item, f"{where}[{key!r}]")
    elif kind in (list, tuple):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    elif kind not in SCALARS:
        raise TypeError(f"{where} is a {kind.__module__}.{kind.__name__}; the metadata of a .safetensors file holds "
                        f"dicts, lists, tuples, strings, numbers and None")


def fetch(url: str) -> Path:
    """The file behind ``url`` in PyTorch's checkpoint cache, downloaded unless it is there.

    Several processes may call this at once; the cache never holds half a file. Raises OSError when there is no
    network, ValueError when the content does not have the SHA-256 that the name ends with (``detr-r50-e632da11.pth``).
    """
    name = os.path.basename(urlparse(url).path)
    if not name:
        raise ValueError(f"{url} does not end with a file's name; give the address of the checkpoint itself")
    file = Path(torch.hub.get_dir(), "checkpoints", name)
    if file.is_file():
        return file
    named = HASH_IN_NAME.search(name)
    if distributed.is_main():
        print(f"downloading {url} to {file}", flush=True)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), named and named[1], progress=distributed.is_main())
    except OSError as error:                                    # urllib's errors are OSErrors
        raise OSError(f"cannot download {url}: {error}. Without a network, fetch it elsewhere and put it at {file}, or "
                      f"give the path of a copy") from error
    except RuntimeError as error:
        raise ValueError(f"{url}: {error}; the download was damaged, and was not kept. Try again, or give the path of "
                         f"a copy") from error
    return file


def _admitted() -> list[Any]:
    """The types beyond PyTorch's own that published files hold: their flags as a Namespace, NumPy's numbers as
    results. Making one of these runs nothing that the file chose."""
    import numpy as np  # here alone: the rest of this file needs PyTorch only

    scalar = np.float64(0).__reduce__()[0]                      # NumPy 2 moved it; files know it under both names
    dtypes = [type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")]
    return [argparse.Namespace, np.dtype, *dtypes,
            (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]


def _checkpoints_in(folder: Path) -> str:
    names = sorted(file.name for ending in ("*.pth", "*.safetensors") for file in folder.glob(ending))
    if not names:
        return "it has no *.pth or *.safetensors files"
    return "it has " + ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read(file: Path, source: str, map_location: str | torch.device, mmap: bool) -> Any:
    try:
        if file.suffix.lower() == ".safetensors":
            return _read_safetensors(file, source, map_location)
        with torch.serialization.safe_globals(_admitted()):
            return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except (OSError, ImportError):
        raise
    except Exception as error:              # the bytes of a broken file can make the reader stumble in any way
        reason = str(error)
        foreign = re.search(r"GLOBAL ([\w.]+)", reason) or re.search(r"(TorchScript archive)", reason)
        if foreign:
            raise ValueError(f"{source} holds more than weights: reading it would run {foreign[1]}. It was refused and "
                             f"nothing was run; have its author save the tensors alone (state_dict)") from None
        again = f"; to download it anew, delete {file}" if str(file) != source else "; copy or download it anew"
        raise ValueError(f"{source} is damaged, cut short or no checkpoint at all ({file.stat().st_size:,} bytes; "
                         f"{type(error).__name__}){again}") from error


def _read_safetensors(file: Path, source: str, map_location: str | torch.device) -> dict[str, Any]:
    """Its tensors; or where it has more metadata than their format, this, and the tensors as ``"model"``."""
    try:
        from safetensors import safe_open  # here alone: few files need it
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{source}: reading a .safetensors file needs the package safetensors; pip install "
                          f"safetensors") from error
    with safe_open(file, framework="pt") as opened:
        texts = opened.metadata() or {}
    tensors = load_file(file, device=str(map_location))
    entries = {name: _from_json(text) for name, text in texts.items() if name != "format"}
    return {**entries, "model": tensors} if entries and tensors else tensors


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:                                          # of another program, whose metadata is plain text
        return text


def load(path_or_url: str | Path, map_location: str | torch.device = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint from a file or an ``http(s)://`` address; its weights are under ``"model"``.

    Never runs code from the file: besides tensors, plain containers, strings and numbers only argparse.Namespace and
    NumPy's scalars are admitted. A file that is a bare state_dict comes back as ``{"model": state_dict}``, and a
    ``.safetensors`` file with what its metadata holds besides. ``mmap`` leaves tensors on the disk until they are used,
    for files that ``save`` wrote. Of training programs' files the weights may be under ``state_dict``; where a file has
    an average of them, too (``state_dict_ema``, ``model_ema``), the average is taken. The prefix ``module.`` of
    DistributedDataParallel is taken off. Both are said. Raises FileNotFoundError, IsADirectoryError, OSError (no
    network), ImportError (no package safetensors), or ValueError (damaged, holding code, no checkpoint).
    """
    source = str(path_or_url)
    file = fetch(source) if source.startswith(("http://", "https://")) else Path(path_or_url)
    if file.is_dir():
        raise IsADirectoryError(f"{source} is a folder, not a checkpoint; name a file in it: {_checkpoints_in(file)}")
    if not file.is_file():
        near = file.parent
        raise FileNotFoundError(f"there is no checkpoint {source}; "
                                + (f"its folder is there: {_checkpoints_in(near)}" if near.is_dir() else
                                   f"nor a folder {near}; check the path"))
    content = _read(file, source, map_location, mmap)
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds a {type(content).__name__}, not a dict with an entry 'model'; save "
                         f"{{'model': model.state_dict()}}")
    if content and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return {"model": _unwrapped(content, source)}
    there = [entry for entry in WEIGHTS if isinstance(content.get(entry), dict)]
    there = [entry for entry in there if any(isinstance(x, Tensor) for x in content[entry].values())] or there
    if not there:
        has = ", ".join(map(str, content)) or "nothing"
        raise ValueError(f"{source} has no weights under 'model' (it has: {has}), nor under state_dict, state_dict_ema "
                         f"or model_ema; it is not a checkpoint of a model")
    chosen, others = there[0], there[1:]
    if chosen in AVERAGES and others:
        distributed.say(f"{source}: took the average of the weights over training, {chosen}, not {others[0]}")
    weights = _unwrapped(content[chosen], source)
    return {"model": weights, **{entry: value for entry, value in content.items() if entry not in WEIGHTS}}


def _unwrapped(weights: dict[str, Any], source: str) -> dict[str, Any]:
    """``weights`` without the prefix that DistributedDataParallel puts before every name."""
    if not weights or not all(str(name).startswith("module.") for name in weights):
        return weights
    distributed.say(f"{source}: took the prefix 'module.' off its {len(weights)} names")
    return {name.removeprefix("module."): value for name, value in weights.items()}


class Differences(NamedTuple):
    """How a file's tensors differ from a model's."""
    missing: list[str]          # in the model alone
    unexpected: list[str]       # in the file alone
    wrong_shape: list[str]      # in both, as "name [file's shape] for [model's shape]"
    fitting: int                # how many tensors have the same name and shape


def differences(model: nn.Module, state_dict: Mapping[str, Any]) -> Differences:
    """Compare names and shapes; BatchNorm's ``num_batches_tracked``, which not every file has, is left aside."""
    ours = {name: list(value.shape) for name, value in model.state_dict().items() if not _is_counter(name)}
    theirs = {name: list(getattr(value, "shape", [])) for name, value in state_dict.items() if not _is_counter(name)}
    both = [name for name in ours if name in theirs]
    wrong = [f"{name} {theirs[name]} for {ours[name]}" for name in both if theirs[name] != ours[name]]
    return Differences([name for name in ours if name not in theirs], [name for name in theirs if name not in ours],
                       wrong, len(both) - len(wrong))


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _verdict(found: Differences) -> str:
    ours = found.missing + found.wrong_shape
    if not ours and not found.unexpected:
        return "names and shapes fit, but PyTorch refused the values"
    if found.fitting < 0.5 * (found.fitting + len(ours)):
        return "this looks like a checkpoint of another model"
    if not found.missing and not found.unexpected:
        return "this looks like the same model with other sizes (classes, queries, widths): build it with the file's"
    return "this looks like another variant of this model: build it with the options that the file was trained with"


def load_model(model: nn.Module, state_dict: Mapping[str, Any], source: str) -> None:
    """Load weights strictly, every tensor or none: on ValueError the model is as it was. ``source`` names the file in
    messages."""
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    try:
        model.load_state_dict(state_dict, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:      # by now some tensors are the file's: put ours back
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name in before:
                    value.copy_(before[name])
        found = differences(model, state_dict)
        parts = [f"{_some(names)} {what}" for names, what in ((found.missing, "missing"),
                                                              (found.unexpected, "unexpected"),
                                                              (found.wrong_shape, "of another shape")) if names]
        detail = "; ".join(parts) or str(error)
        raise ValueError(f"{source} does not fit the model: {_verdict(found)}. {found.fitting} tensors fit; {detail}"
                         ) from error


def adapt_first_layer(weight: Tensor, in_channels: int) -> Tensor:
    """The filters ``[D, 3, kh, kw]`` of a first layer that sees RGB -> ``[D, in_channels, kh, kw]``.

    Channel c has the filters of colour c mod 3 (R, G, B, R, ...), divided by the number of channels that share this
    colour. Filters of a colour that no channel has are added to the others, to each an equal part: one channel has the
    sum of the three, and of two each its own and half of blue's. So the filters of an output sum up to what they did,
    and an image whose channels are all the same is answered like the grey RGB image.
    """
    if weight.ndim != 4 or weight.shape[1] != 3 or in_channels < 1:
        raise ValueError(f"a first layer {list(weight.shape)} for {in_channels} channels: [D, 3, kh, kw] and at least "
                         f"one channel are needed")
    colours = torch.arange(in_channels, device=weight.device) % 3                           # [in_channels]
    shares = colours.bincount(minlength=3).clamp(min=1)[colours]
    absent = weight[:, min(in_channels, 3):].sum(1, keepdim=True) / in_channels             # [D, 1, kh, kw]
    return weight[:, colours] / shares[:, None, None] + absent


def load_backbone(body: Any, state_dict: Mapping[str, Any], source: str,
                  leave_out: Sequence[str] | None = None) -> None:
    """Load an ImageNet classification file strictly into a backbone's body (the contract is in ``detr.backbone``), all
    but the classifier ``leave_out``, by default what the body names so; an entry that ends with a dot, such as
    ``layer4.``, stands for all names that begin with it.

    The file's names become the body's by its ``renamed``, which leaves out what the body has no place for. Where its
    ``first_layer`` sees another number of channels than the file's three, ``adapt_first_layer`` makes the weight.
    BatchNorm's ``num_batches_tracked`` is ignored where the body (frozen batch norm) has no place for it. What was
    adapted and left out is printed. Raises ValueError as ``load_model`` does.
    """
    ours = body.state_dict()
    state_dict, left_out = body.renamed(state_dict)
    classifier = body.classifier if leave_out is None else leave_out
    alone, prefixes = ({entry for entry in classifier if entry.endswith(".") is dot} for dot in (False, True))
    kept = {name: value for name, value in state_dict.items()
            if name not in alone and not name.startswith(tuple(prefixes))}
    left_out = [*left_out, *(name for name in state_dict if name not in kept)]
    counters = [name for name in kept if _is_counter(name) and name not in ours]
    kept = {name: value for name, value in kept.items() if name not in counters}
    first = body.first_layer
    wanted, given = (list(getattr(tensors.get(first), "shape", [])) for tensors in (ours, kept))
    adapted = len(wanted) == len(given) == 4 and given[1] == 3 != wanted[1]
    if adapted:
        kept[first] = adapt_first_layer(kept[first], wanted[1])
    load_model(body, kept, source)
    if adapted:
        distributed.say(f"{source}: {first} sees 3 channels, and was adapted to {wanted[1]}, so that an image whose "
                        f"channels are all the same is answered like a grey one")
    distributed.say(f"{source}: loaded {len(kept)} tensors into the backbone; left out "
                    + (", ".join(left_out[:8]) or "none")
                    + (f" and {len(left_out) - 8} more" if len(left_out) > 8 else "")
                    + (f" and {len(counters)} num_batches_tracked" if counters else ""))
