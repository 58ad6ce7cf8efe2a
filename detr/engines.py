"""Exported models: what their files say, and ONNX Runtime, which runs them.

A file takes ``images`` float32 ``[B, C, H, W]``, normalised; ``sizes`` int64 ``[B, 2]``, the height and width of what is
not padding in each, from the top left; and where post-processing is inside, ``original_sizes`` int64 ``[B, 2]``, those of
the pictures that boxes shall refer to. It gives ``scores`` and ``labels [B, n]`` and ``boxes [B, n, 4]`` (corners, in
pixels, not clipped), or without post-processing ``logits [B, Q, C or C + 1]`` and ``boxes [B, Q, 4]`` (cxcywh in 0..1).
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nested_tensor import NestedTensor, as_nested_tensor
from .structures import Detections

ENDING = ".onnx"
INPUTS = ("images", "sizes", "original_sizes")          # the last where post-processing is inside


def is_exported(source: str) -> bool:
    """Whether a file is an exported model, by its name."""
    return source.lower().endswith(ENDING)


def as_texts(about: Mapping[str, Any]) -> dict[str, str]:
    """Entries of metadata as a file keeps them: text as it is, all else as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}


def from_texts(texts: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of ``as_texts``."""
    about: dict[str, Any] = {}
    for name, text in texts.items():
        try:
            about[name] = json.loads(text)
        except ValueError:
            about[name] = text
    return about


def runtime(source: str) -> Any:
    """The package onnxruntime, for ``source``; ImportError where it is missing, which says how to get it."""
    try:
        import onnxruntime  # here alone: few need it
    except ImportError as error:
        raise ImportError(f"{source}: running an exported model needs the package onnxruntime; pip install onnxruntime"
                          ) from error
    return onnxruntime


def refuse_missing(path: str) -> None:
    """FileNotFoundError where there is no such file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; scripts/export.py makes one of a checkpoint")


def session(model: str | bytes, device: torch.device | str = "cpu", optimise: bool = True) -> Any:
    """An ONNX Runtime session of a file or its bytes, with as many threads as PyTorch has here.

    Raises ImportError without onnxruntime, FileNotFoundError, or ValueError for what it cannot run and for a device that
    it does not have.
    """
    source = model if isinstance(model, str) else "the exported model"
    onnxruntime = runtime(source)
    if isinstance(model, str):
        refuse_missing(model)
    device = torch.device(device)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type != "cpu":
        if device.type != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            found = ", ".join(onnxruntime.get_available_providers())
            raise ValueError(f"--device {device}: this onnxruntime has {found} alone; use --device cpu, or for cuda pip "
                             f"install onnxruntime-gpu")
        index = torch.cuda.current_device() if device.index is None else device.index
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": index}))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3                                      # errors
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:              # onnxruntime's own kinds have no common base
        raise ValueError(f"{source} is damaged or not a model that onnxruntime {onnxruntime.__version__} can run: {error}"
                         ) from error


def metadata(path: str) -> dict[str, str]:
    """What stands in an ONNX file beside the model, read by the package onnx; without that, by a session, which takes
    longer and finds the same. Raises as ``session``, whose package will be needed to run the model."""
    runtime(path)
    refuse_missing(path)
    try:
        import onnx
    except ImportError:
        return session(path, optimise=False).get_modelmeta().custom_metadata_map
    content = Path(path).read_bytes()
    try:
        entries = onnx.load_model_from_string(content).metadata_props
    except Exception as error:              # protobuf's own kinds differ from version to version
        raise ValueError(f"{path} is damaged or not an ONNX model: {error}; make it anew with scripts/export.py"
                         ) from error
    return {entry.key: entry.value for entry in entries}


def read(path: str) -> dict[str, Any]:
    """What an exported file says of itself, as a checkpoint would: ``config``, ``categories``, ``num_classes``,
    ``preprocessing`` and more; ``model``, a checkpoint's weights, is empty. Raises as ``session``, and ValueError for a
    file of another program."""
    if not is_exported(path):
        raise ValueError(f"--engine onnxruntime runs files that end with {ENDING}, and --resume is {path}; make one with "
                         f"python scripts/export.py --resume {path} --output model{ENDING}")
    about = from_texts(metadata(path))
    if missing := [entry for entry in ("config", "num_classes", "preprocessing") if entry not in about]:
        raise ValueError(f"{path} was not made by scripts/export.py: its metadata has no {', '.join(missing)}")
    return {**about, "model": {}}


def run(running: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """``inputs`` in the order of ``INPUTS`` through a session; those that its model does not have are left out."""
    wanted = [one.name for one in running.get_inputs()]
    arrays = {name: value.cpu().numpy() for name, value in zip(INPUTS, inputs) if name in wanted}
    return [torch.from_numpy(value) for value in running.run(None, arrays)]


def at_least_as_large(images: Tensor, side: int) -> Tensor:
    """``images [B, C, H, W]`` with zeros at the right and the bottom, up to ``side`` pixels a side."""
    return F.pad(images, (0, max(side - images.shape[-1], 0), 0, max(side - images.shape[-2], 0)))


class ExportedModel(nn.Module):
    """An exported file, called as the model that it was made of.

    With post-processing inside, pictures' sizes are one of its inputs, which ``forward`` does not know: there it only
    hands the images on, and ``detections``, which takes the place of the post-processing, runs the file.
    ``backbone`` is that of the PyTorch model, for those who ask what images it takes; it computes nothing here.
    """

    def __init__(self, path: str, backbone: nn.Module, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.session, self.backbone = session(path, device), backbone
        self.least = int(self.session.get_modelmeta().custom_metadata_map.get("least_side", 1))
        self.postprocesses = len(self.session.get_inputs()) == len(INPUTS)

    def forward(self, samples: NestedTensor | Tensor | list[Tensor]) -> dict[str, Any]:
        images = as_nested_tensor(samples)
        if self.postprocesses:
            return {"samples": images}
        logits, boxes = self.run(images)
        return {"pred_logits": logits, "pred_boxes": boxes}

    def run(self, images: NestedTensor, *original_sizes: Tensor) -> list[Tensor]:
        sizes, device = torch.tensor(images.extents()), images.tensors.device
        outputs = run(self.session, (at_least_as_large(images.tensors, self.least), sizes, *original_sizes))
        return [output.to(device) for output in outputs]

    def detections(self, outputs: Mapping[str, Any], target_sizes: Tensor) -> list[Detections]:
        """What ``postprocessors["bbox"]`` gives."""
        scores, labels, boxes = self.run(outputs["samples"], target_sizes)
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes)]


class NoLosses(nn.Module):
    """The criterion of a model whose logits nobody sees."""
    weight_dict: dict[str, float] = {}

    def forward(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        return {}


def in_place_of(model: nn.Module, criterion: nn.Module, postprocessors: dict[str, Any], path: str,
                device: torch.device | str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """An exported file, and the criterion and post-processing for what it gives, in place of the model it was made of.
    Losses are those of the last layer; where the file post-processes there are none."""
    exported = ExportedModel(path, model.backbone, device)                                      # type: ignore[arg-type]
    if not exported.postprocesses:
        return exported, criterion, postprocessors
    return exported, NoLosses(), {**postprocessors, "bbox": exported.detections}
