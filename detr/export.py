"""A detector -> a file that needs none of this code: ONNX, or PyTorch's own ``.pt2``, for any batch, height and width.

What the file takes and gives is in ``detr.engines``. It is traced by ``torch.export`` with the sizes of batch and images
as unknowns, and compared with the model in PyTorch on pictures before it is written. Mask models and panoptic maps have
no exported form: the masks that are made depend on the detections that are kept.
"""
from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import itertools
import logging
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint, engines
from .backbone import backbone_of
from .backbone.resnet import ResNet
from .deformable_attention import MSDeformAttn
from .loading import Detector
from .nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from .padding import valid_mask
from .preprocessing import Picture, Preprocessing, height_width
from .run_folder import code_revision

FORMATS = ("onnx", "pt2")
PRECISIONS = ("float32", "float16", "int8")
OPSETS = range(17, 23)                      # 16 is the first with GridSample; from 23 on, attention is one node
BATCHES, SCALES = (1, 2, 5), (1.0, 0.5)     # of the comparison
BOX, SCORE = 0.5, 1e-3                      # pixels of the picture; what float32 may differ by
SURE = 0.5                                  # least score of the detections by which lower precisions are described
LICENSE = "unknown: that of the weights, which the checkpoint does not say"
# What is left in float32 where the rest is not: where to look, boxes and scores.
EXACT_PARTS = ("sampling_offsets", "attention_weights", "reference_points", "bbox_embed", "class_embed", "heads",
               "position", "pos_trans", "ref_point_head", "ref_anchor_head")
POINT_BY_POINT = {"Relu", "MaxPool", "Add", "Mul"}
WITH_WEIGHTS = {"Conv", "MatMul", "Gemm"}

Run = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]
Tell = Callable[[str], Any]                 # what is done now, in words
LONG = "half a minute or more for a tiny model, many for a large one"


def silent(line: str) -> None:
    """Tells nobody."""


@contextmanager
def timed(doing: str, tell: Tell) -> Iterator[None]:
    """Says that something begins and, unless it fails, how long it took."""
    tell(f"{doing} ...")
    start = time.perf_counter()
    yield
    tell(f"  done in {time.perf_counter() - start:.1f} s")


class Exported(nn.Module):
    """What is traced: ``model`` with the padding mask made inside, and ``post``-processing or None."""

    def __init__(self, model: nn.Module, post: Any) -> None:
        super().__init__()
        self.model, self.post = model, post

    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        mask = ~valid_mask(sizes, images.shape[-2], images.shape[-1], images.device)
        outputs = self.model(NestedTensor(images.masked_fill(mask[:, None], 0.0), mask, sizes))
        if self.post is None:
            return outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        return self.post.of_batch(outputs, original_sizes)[:3]


def refuse(detector: Detector) -> None:
    """ValueError for what has no exported form."""
    backbone = backbone_of(detector.model)
    if set(detector.postprocessors) != {"bbox"}:
        raise ValueError(f"{detector.source} is a mask model ({', '.join(detector.postprocessors)}): masks and panoptic "
                         f"maps have no exported form. Boxes have: train or fetch its detector, a model without --masks")
    if backbone.exact and not isinstance(backbone.body, ResNet):
        raise ValueError(f"{detector.source}: --padding exact with --backbone {detector.config['model']['backbone']} has "
                         f"no exported form; ResNets have")


def coarsest_stride(model: Any) -> int:
    """Of the maps that the transformer sees."""
    backbone = backbone_of(model)
    projections = len(model.input_proj) if isinstance(model.input_proj, nn.ModuleList) else 1
    used = len(backbone.strides) - getattr(model, "finer", 0)
    return backbone.strides[-1] * 2 ** max(0, projections - used)


@contextmanager
def quiet() -> Any:
    """Without the remarks of tracers and translators on their own inner life."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export", "root")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def trace(detector: Detector, postprocess: bool = True) -> Any:
    """The detector as a ``torch.export.ExportedProgram`` whose batch, height and width are unknown; sides of images are
    at least one pixel more than the coarsest stride. ValueError where it cannot be traced so."""
    refuse(detector)
    model = copy.deepcopy(detector.model).cpu().eval()
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.path = "definition"                      # the one that exports
    stride = coarsest_stride(model)
    height, width = 3 * stride, 4 * stride
    sizes = torch.tensor([[height, width], [height - 5, width // 2]])
    inputs = (torch.zeros(2, detector.channels, height, width), sizes, 2 * sizes)[:3 if postprocess else 2]
    batch, *sides = (torch.export.Dim("batch", min=1), *(torch.export.Dim(name, min=stride + 1)
                                                         for name in ("height", "width")))
    dynamic = [{0: batch, 2: sides[0], 3: sides[1]}, {0: batch}, {0: batch}][:len(inputs)]
    exported = Exported(model, detector.postprocessors["bbox"] if postprocess else None).eval()
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(exported, inputs, dynamic_shapes=tuple(dynamic), strict=False)
    except Exception as error:                              # torch's own kinds differ from version to version
        reason = str(error).strip().splitlines()
        raise ValueError(f"{detector.source}: PyTorch {torch.__version__} cannot export {detector.name} with batch, "
                         f"height and width left open ({' '.join(reason[:2])}); use a newer PyTorch, 2.15 is known to "
                         f"do it") from error


def about(detector: Detector, form: str, postprocess: bool, precision: str, **more: Any) -> dict[str, Any]:
    """What a file says of itself."""
    source = detector.source
    file = checkpoint.fetch(source) if source.startswith(("http://", "https://")) else Path(source)
    with open(file, "rb") as opened:
        digest = hashlib.sha256()
        for part in iter(lambda: opened.read(2**20), b""):
            digest.update(part)
    return {"preset": detector.name, "config": detector.config, "num_classes": detector.num_classes,
            "categories": [category._asdict() for category in detector.categories],
            "preprocessing": detector.preprocessing.as_dict(),
            "source": {"file": file.name, "sha256": digest.hexdigest()},
            "form": form, "precision": precision, "least_side": coarsest_stride(detector.model) + 1,
            "outputs": "scores, labels, boxes: left, top, right, bottom in pixels of original_sizes" if postprocess else
            "logits, boxes: centre x and y, width, height in 0..1",
            "versions": {"torch": str(torch.__version__), "python": platform.python_version(), "code": code_revision(),
                         **more.pop("versions", {})},
            "license": LICENSE, **more}


# Comparison.

class Gap(NamedTuple):
    """The largest differences between two sets of detections."""
    box: float                  # pixels of the picture
    score: float

    def __str__(self) -> str:
        return f"boxes {self.box:.2g} px, scores {self.score:.2g}"

    @property
    def small(self) -> bool:
        return self.box < BOX and self.score < SCORE


def gap(expected: Sequence[Tensor], found: Sequence[Tensor], sure: float = 0.0) -> Gap:
    """Of one image's scores ``[n]``, labels and boxes ``[n, 4]``, each detection beside the one of its label that it is
    most like: the order is free, since rounding swaps neighbours. The last of the n may be another where its score is
    as good as equal to theirs. ``sure``: least expected score of those that count."""
    from scipy.optimize import linear_sum_assignment
    if any(a.shape != b.shape for a, b in zip(expected, found)) or not all(x.isfinite().all() for x in found):
        return Gap(float("inf"), float("inf"))
    scores, labels, boxes = (x.numpy() for x in expected)
    other_scores, other_labels, other_boxes = (x.numpy() for x in found)
    by_score = np.abs(scores[:, None] - other_scores)
    by_box = np.abs(boxes[:, None] - other_boxes).max(-1)
    cost = np.maximum(by_score / SCORE, by_box / BOX) + 1e6 * (labels[:, None] != other_labels)
    rows, columns = linear_sum_assignment(cost)
    bad = cost[rows, columns] > 1
    last = (scores[rows] < scores.min() + SCORE) & (other_scores[columns] < scores.min() + SCORE)
    counts = (scores[rows] >= sure) & ~(bad & last)
    rows, columns = rows[counts], columns[counts]
    if not len(rows):
        return Gap(0.0, 0.0)
    if (labels[rows] != other_labels[columns]).any() and not sure:
        return Gap(float("inf"), float("inf"))
    return Gap(float(by_box[rows, columns].max()), float(by_score[rows, columns].max()))


def batches(preprocessing: Preprocessing, pictures: Sequence[Picture]) -> list[tuple[list[Tensor], Tensor]]:
    """Images of both scales in batches of 1, 2 and 5, with the sizes of their pictures. Neighbours have different sizes,
    so that there is padding."""
    def prepared(picture: Picture, scale: float) -> Tensor:
        size, longest = preprocessing.size, preprocessing.max_size
        smaller = dataclasses.replace(preprocessing, size=round(size * scale) if isinstance(size, int) else
                                      (round(size[0] * scale), round(size[1] * scale)),
                                      max_size=longest and round(longest * scale))
        return smaller(picture)

    made = []
    for scale in SCALES:
        order = itertools.cycle(pictures)
        for count in BATCHES:
            chosen = [next(order) for _ in range(count)]
            images = [prepared(picture, scale * (1 - 0.1 * (i % 3))) for i, picture in enumerate(chosen)]
            made.append((images, torch.tensor([height_width(picture) for picture in chosen])))
    return made


@torch.no_grad()
def compare(detector: Detector, run: Run, pictures: Sequence[Picture], postprocess: bool,
            sure: float = 0.0) -> dict[str, Gap]:
    """How far ``run``, an exported form, is from the detector in PyTorch: the largest gap of each batch."""
    post, least = detector.postprocessors["bbox"], coarsest_stride(detector.model) + 1
    gaps: dict[str, Gap] = {}
    for images, originals in batches(detector.preprocessing, pictures):
        samples = nested_tensor_from_tensor_list(images)
        expected = post.of_batch(detector.model(samples), originals)[:3]
        sizes = torch.tensor(samples.sizes)
        found = run(engines.at_least_as_large(samples.tensors, least), sizes, originals)
        if not postprocess:
            found = post.of_batch({"pred_logits": found[0], "pred_boxes": found[1]}, originals)[:3]
        of_images = [gap(a, b, sure) for a, b in zip(zip(*expected), zip(*found))]
        shape = "x".join(map(str, samples.tensors.shape))
        gaps[shape] = Gap(max(one.box for one in of_images), max(one.score for one in of_images))
    return gaps


def worst(gaps: dict[str, Gap]) -> Gap:
    """The largest difference of boxes and the largest of scores, of any batch."""
    return Gap(max(one.box for one in gaps.values()), max(one.score for one in gaps.values()))


def accept(gaps: dict[str, Gap], form: str) -> None:
    """ValueError, which names the batches that differ, unless all gaps are small."""
    if different := [f"{shape}: {one}" for shape, one in gaps.items() if not one.small]:
        raise ValueError(f"the {form} file was not kept, since it differs from PyTorch by more than {BOX} px or {SCORE}: "
                         f"{'; '.join(different)}; try another --opset, or other versions of torch and onnxscript")


# ONNX.

def to_onnx(program: Any, opset: int, postprocess: bool) -> Any:
    """A traced program as an ``onnx.ModelProto`` of that opset. Raises ImportError without onnx and onnxscript."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--format onnx needs the packages onnx, onnxscript and onnxruntime ({error.name} is missing); "
                          f"pip install onnx onnxscript onnxruntime") from error
    names = list(engines.INPUTS[:3 if postprocess else 2])
    outputs = ["scores", "labels", "boxes"] if postprocess else ["logits", "boxes"]
    with quiet():
        translated = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False, input_names=names,
                                       output_names=outputs)
    model = translated.model_proto                                                              # type: ignore[union-attr]
    given = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if given != opset:
        raise ValueError(f"--opset {opset}: the translator gives {given} for this model, since it cannot step down; use "
                         f"--opset {given}")
    fold_weights(model)
    name_axes(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def fold_weights(model: Any) -> None:
    """Split and transpose weights now instead of whenever the file is opened: quantisation knows weights alone."""
    from onnx import numpy_helper
    weights = {one.name: one for one in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type not in ("Split", "Transpose") or any(name not in weights for name in node.input if name):
            continue
        options = {attribute.name: attribute for attribute in node.attribute}
        array, *parts = (numpy_helper.to_array(weights[name]) for name in node.input if name)
        if node.op_type == "Transpose":
            arrays = [array.transpose(list(options["perm"].ints) if "perm" in options else None)]
        else:
            axis = options["axis"].i if "axis" in options else 0
            ends = np.cumsum(parts[0])[:-1] if parts else len(node.output)
            arrays = np.split(array, ends, axis)
        for name, part in zip(node.output, arrays):
            weights[name] = numpy_helper.from_array(np.ascontiguousarray(part), name)
        model.graph.node.remove(node)
    used = {name for node in model.graph.node for name in node.input} | {out.name for out in model.graph.output}
    del model.graph.initializer[:]
    model.graph.initializer.extend(one for name, one in weights.items() if name in used)


def name_axes(model: Any) -> None:
    """Call the open axes batch, height and width, which tracing numbers."""
    images = model.graph.input[0].type.tensor_type.shape.dim
    new = {images[axis].dim_param: name for axis, name in ((0, "batch"), (2, "height"), (3, "width"))
           if images[axis].dim_param}
    if set(new) == set(new.values()):
        return
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda found: new.get(found[0], found[0]), dim.dim_param)


def scope(node: Any) -> str:
    """The module that a node came from, as the exporter noted it."""
    return next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")


def is_exact(node: Any) -> bool:
    """Whether a node decides where to look, or boxes and scores."""
    return any(part in scope(node) for part in EXACT_PARTS)


def to_half(model: Any) -> tuple[Any, list[str]]:
    """The same with weights in float16, and layers with weights, attention's products and what follows them point by
    point computed in it; and the layers that stay in float32, as do positions, softmax, normalisation, coordinates,
    sampling and post-processing."""
    from onnx import TensorProto, helper, numpy_helper
    halved, exact = copy.deepcopy(model), [node.name for node in model.graph.node
                                           if node.op_type in WITH_WEIGHTS and is_exact(node)]
    weights = {one.name: one for one in halved.graph.initializer if one.data_type == TensorProto.FLOAT}
    half: dict[str, str] = {}                               # a tensor's name -> that of the same in float16
    computed: set[str] = set()                              # those that are float16 first
    nodes: list[Any] = []

    def in_half(name: str) -> str:
        if name and name not in half:
            half[name] = f"{name}_half"
            if name in weights:
                array = numpy_helper.to_array(weights[name]).astype(np.float16)
                halved.graph.initializer.append(numpy_helper.from_array(array, half[name]))
            else:
                nodes.append(helper.make_node("Cast", [name], [half[name]], to=TensorProto.FLOAT16))
        return half.get(name, "")

    for node in halved.graph.node:
        follows = node.op_type in POINT_BY_POINT and not is_exact(node) and any(x in computed for x in node.input) and \
            all(x in computed or x in weights for x in node.input)
        if not follows and (node.op_type not in WITH_WEIGHTS or node.name in exact):
            nodes.append(node)
            continue
        inputs = [in_half(name) for name in node.input]
        node.input[:] = inputs
        nodes.append(node)
        for i, name in enumerate(node.output):
            node.output[i] = half[name] = f"{name}_half"
            computed.add(name)
            nodes.append(helper.make_node("Cast", [half[name]], [name], to=TensorProto.FLOAT))
    needed = {out.name for out in halved.graph.output}
    kept = []
    for node in reversed(nodes):
        if any(name in needed for name in node.output):
            needed |= set(node.input)
            kept.append(node)
    initializers = [one for one in halved.graph.initializer if one.name in needed]
    for field, values in ((halved.graph.node, kept[::-1]), (halved.graph.initializer, initializers)):
        values = [copy.deepcopy(value) for value in values]             # what is deleted from a graph is gone
        del field[:]
        field.extend(values)
    return halved, exact


def to_int8(model: Any) -> tuple[Any, list[str]]:
    """The same with the matrices of the transformer's linear layers in int8, multiplied in int8 with what ONNX Runtime
    quantises as it comes; and the layers that stay in float32. Convolutions do: quantised by tensor they cost accuracy,
    and on CPUs time."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    weights = {one.name for one in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in WITH_WEIGHTS]
    exact = [node.name for node in layers if node.op_type == "Conv" or is_exact(node) or node.input[1] not in weights]
    with tempfile.TemporaryDirectory() as folder, quiet():
        file = Path(folder) / "int8.onnx"
        quantize_dynamic(copy.deepcopy(model), file, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
                         weight_type=QuantType.QInt8, nodes_to_exclude=exact)
        return onnx.load(file), exact


def serialise(model: Any, entries: dict[str, Any]) -> bytes:
    """A model with its metadata, and without what it says of the machine it was made on."""
    model = copy.deepcopy(model)
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.ClearField("metadata_props")
    model.producer_name = "detr"
    del model.metadata_props[:]
    for name, text in engines.as_texts(entries).items():
        model.metadata_props.add(key=name, value=text)
    return model.SerializeToString()


# Files.

class Report(NamedTuple):
    """What was written, and how far it is from PyTorch."""
    file: Path
    size: int                   # bytes
    gaps: dict[str, Gap]        # of each batch, in float32
    precision: str
    variant: Gap | None         # of float16 and int8: of detections that PyTorch gives a score of SURE or more
    float32: list[str]          # their layers in float32


def export(detector: Detector, output: str | Path, pictures: Sequence[Picture], *, form: str = "onnx",
           postprocess: bool = True, precision: str = "float32", opset: int = 18, tell: Tell = silent) -> Report:
    """Write ``detector`` to ``output``. ``pictures`` are what it is compared on; where boxes differ by half a pixel, or
    scores by 1e-3, ValueError is raised and nothing is written. Files of lower precision are made of one that was
    accepted, and differ by more, which the report says. ``tell`` is given a line before what takes long, and one after.

    Raises ValueError also for models without an exported form, and ImportError without the packages.
    """
    check(form, precision, opset, output)
    if not pictures:
        raise ValueError("the file is compared with PyTorch on pictures: give at least one")
    if form == "pt2":
        with timed(f"tracing the model, and comparing what is read back with PyTorch: {LONG}", tell):
            content, gaps = pt2(detector, pictures, postprocess)
        checkpoint.write_whole(output, lambda opened: opened.write(content))
        return Report(Path(output), len(content), gaps, precision, None, [])
    model, gaps = accepted(detector, pictures, postprocess, opset, tell)
    with timed(f"writing it in {precision}" + ", and comparing that" * (precision != "float32"), tell):
        return write_onnx(detector, model, gaps, output, pictures, postprocess, precision)


def check(form: str, precision: str, opset: int, output: str | Path) -> None:
    """ValueError for what cannot be asked for, before anything is computed."""
    if form not in FORMATS or precision not in PRECISIONS:
        raise ValueError(f"form {form!r}, precision {precision!r}: use one of {', '.join(FORMATS)} and of "
                         f"{', '.join(PRECISIONS)}")
    if opset not in OPSETS:
        raise ValueError(f"--opset {opset}: from {OPSETS[0]} to {OPSETS[-1]} are known to work")
    if form == "pt2" and precision != "float32":
        raise ValueError(f"--format pt2 is float32; for {precision} use --format onnx")
    if Path(output).is_dir():
        raise ValueError(f"--output {output} is a folder; name a file in it")


def accepted(detector: Detector, pictures: Sequence[Picture], postprocess: bool = True, opset: int = 18,
             tell: Tell = silent) -> tuple[Any, dict[str, Gap]]:
    """``detector`` as an ``onnx.ModelProto`` in float32 that was compared with it, and the gaps. Raises as ``export``."""
    with timed(f"tracing the model, translating it to ONNX and comparing it with PyTorch: {LONG}", tell):
        model = to_onnx(trace(detector, postprocess), opset, postprocess)
        gaps = compare(detector, runner(model), pictures, postprocess)
        accept(gaps, "onnx")
    return model, gaps


def write_onnx(detector: Detector, model: Any, gaps: dict[str, Gap], output: str | Path, pictures: Sequence[Picture],
               postprocess: bool = True, precision: str = "float32") -> Report:
    """What ``accepted`` gave -> a file of any precision."""
    import onnx
    variant: Gap | None = None
    float32: list[str] = []
    versions = {"onnx": onnx.__version__, "opset": model.opset_import[0].version}
    if precision != "float32":
        model, float32 = (to_half if precision == "float16" else to_int8)(model)
        onnx.checker.check_model(model)
        variant = worst(compare(detector, runner(model), pictures, postprocess, sure=SURE))
        if variant.box == float("inf"):
            raise ValueError(f"the {precision} file was not kept: its outputs are not finite; use float32")
    content = serialise(model, about(detector, "onnx", postprocess, precision, versions=versions,
                                     differs=worst(gaps)._asdict(), float32_layers=float32))
    checkpoint.write_whole(output, lambda opened: opened.write(content))
    return Report(Path(output), len(content), gaps, precision, variant, float32)


def runner(model: Any) -> Run:
    """A ``ModelProto`` in ONNX Runtime."""
    running = engines.session(model.SerializeToString())
    return lambda *inputs: engines.run(running, inputs)


def pt2(detector: Detector, pictures: Sequence[Picture], postprocess: bool) -> tuple[bytes, dict[str, Gap]]:
    """The bytes of a ``.pt2`` file, read again and compared."""
    program = trace(detector, postprocess)
    entries = about(detector, "pt2", postprocess, "float32")
    with io.BytesIO() as written, quiet():
        torch.export.save(program, written, extra_files={f"{name}.json": text
                                                         for name, text in engines.as_texts(entries).items()})
        content = written.getvalue()
    with quiet():
        module = torch.export.load(io.BytesIO(content)).module()
    gaps = compare(detector, lambda *inputs: module(*inputs[:3 if postprocess else 2]), pictures, postprocess)
    accept(gaps, "pt2")
    return content, gaps
