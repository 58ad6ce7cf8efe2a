"""Checkpoint files: written whole or not at all, read without running code, loaded strictly under published names."""
from __future__ import annotations

import argparse
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from . import distributed

HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[^.]*$")                                    # detr-r50-e632da11.pth
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


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path``, creating its folders: afterwards the file is complete, or what was there before is
    still there. In between, the new content stands beside it under a temporary name.

    ``state`` holds tensors, dicts, lists, tuples, strings, numbers and None alone, so that ``load`` can read it.
    Raises TypeError naming the entry that is something else, OSError when the file cannot be written.
    """
    _check_readable(state, "state")
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())         # the content is on the disk before the name points to it
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write {path}: {_system_error(error)}. Make room, or choose another output folder"
                      + ("; the file that was there is unchanged" if path.is_file() else "")) from error
    finally:
        with suppress(OSError):
            partial.unlink()


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


def _read(file: Path, source: str, map_location: str | torch.device) -> Any:
    try:
        if file.suffix.lower() == ".safetensors":
            return _read_safetensors(file, source, map_location)
        with torch.serialization.safe_globals(_admitted()):
            return torch.load(file, map_location=map_location, weights_only=True)
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


def _read_safetensors(file: Path, source: str, map_location: str | torch.device) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file  # here alone: few files need it
    except ImportError as error:
        raise ImportError(f"{source}: reading a .safetensors file needs the package safetensors; pip install "
                          f"safetensors") from error
    return load_file(file, device=str(map_location))


def load(path_or_url: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint from a file or an ``http(s)://`` address; its weights are under ``"model"``.

    Never runs code from the file: besides tensors, plain containers, strings and numbers only argparse.Namespace and
    NumPy's scalars are admitted. A file that is a bare state_dict, as one named ``.safetensors`` always is, comes back
    as ``{"model": state_dict}``. Of training programs' files the weights may be under ``state_dict``; where a file has an
    average of them, too (``state_dict_ema``, ``model_ema``), the average is taken. The prefix ``module.`` of
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
    content = _read(file, source, map_location)
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
