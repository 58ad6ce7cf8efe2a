#!/usr/bin/env python3
"""Forward pass and training step of any preset: images per second, memory, where the time goes, how near to the limit.

    python scripts/benchmark.py --compare --json speed.json                     # DETR and Deformable DETR beside peers
    python scripts/benchmark.py --model tiny_detr --size 160x160 --mode forward --threads 1
    python scripts/benchmark.py --device cuda --batch 16 --mode train --compile --compare

Images, weights and targets are random; statistics of frozen normalisations are set so that maps have unit variance.
Images fill their batch, so that ours needs no mask in attention; peers get theirs, of ones, as they are documented.
A case is a model, a mode, a batch and a size; on a CPU it has a process of its own, in which all sides take turns: every
precision, ours and the peers. On CUDA all share one process.

    forward      in evaluation, without gradients. ``model``: as it is; ``prepared``: by ``detr.inference.for_prediction``
    train        forward, criterion, backward, gradients clipped to 0.1, AdamW: the steps of ``engine.train_one_epoch``.
                 Collating is not timed here, but has a share below. ``model``: as it is; ``folded``, on a CPU in float32:
                 with main.py's ``--fold_norms``
    bf16         ours: within ``detr.precision.autocast``. Peers: converted to bfloat16 for ``forward``, where they can
                 compute so, else and for ``train`` within autocast
    graphs       with --cuda_graphs, beside the others: ``prepared`` by ``detr.cuda_graphs``, replayed, which is
                 verified; it has no parts, and no peak, since its memory is there before
    compiled     with --compile, beside the others: ours by ``detr.memory.compile_model``, peers by ``torch.compile``
    keep_memory  what a side frees, the process keeps for the next one, as main.py does on CPUs. That helps peers at least
                 as much; without it, both hand their memory back to the system and fetch it anew, as programs do
    time         median of ``--repeats`` rounds after one that does not count; in each round every side has a turn. The
                 spread is from the fastest to the slowest. ``--clock cpu``: the processor's time over the threads, which
                 other programs change less than the time on the wall
    ratio        a peer's median over ours; its spread is that of the ratios of single rounds
    peak         memory beyond what was in use before the call, which follows one on small images. CPU: a process for each
                 side, its resident memory. CUDA: the allocator's
    parts        of one instrumented run more (the one of the median length), whose hooks compute nothing and which waits
                 for the GPU at every border. What is inside another part, such as heads inside a decoder, is taken out of
                 it. ``data`` is collating the batch and moving it to the device; ``other`` of the model: projections,
                 positions, levels
    FLOPs        by ``torch.utils.flop_counter``, attention as matrix products; gathering, as in deformable sampling, has
                 none there. Those of the model as it is, also for ``prepared``
    of peak      FLOPs a second over those of a large matrix product in that precision, which has a turn in every round
                 (on CUDA with TF32 where convolutions may use it)
    limit        for each part: every operator by itself at the machine's peak or at the speed of a large copy, whichever
                 is slower, with its tensors read and written once: the time of an execution operator by operator that is
                 perfect and finds nothing in a cache. Fused operators and caches can beat it; deformable sampling on CUDA
                 is no operator to PyTorch and missing in it
    differ       the predictions of peers with our weights, and of ``prepared``, are compared with the model's before
                 anything is timed: at most 0.001 in float32, of the largest logit and of the image; those of graphs with
                 those of ``prepared``: at most so in any precision
    peers        ``transformers``: DETR and Deformable DETR with the same weights, the same parts frozen, its own loss.
                 With auxiliary losses its DETR normalises what goes from one decoder layer to the next, so its training
                 is not the published one, though as much work. torchvision's detectors are other architectures, for
                 orientation, with their pre- and post-processing
"""
from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import functools
import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as command_line
from datasets import collate
from detr import build_model, config, list_models, memory, sharding
from detr.backbone import backbone_of
from detr.backbone.resnet import fold_norms
from detr.config import TrainConfig
from detr.cuda_graphs import CudaGraphs, use_cuda_graphs
from detr.memory import Forward
from detr.nested_tensor import NestedTensor
from detr.optimization import make_optimizer
from detr.precision import autocast, fast_in_bf16
from detr.presets import PRESETS
from detr.structures import Outputs, Target
from engine import add_up_gradients, readings, to_device
from scripts import peers

MODES = ("forward", "train")
AMP = {"float32": "off", "bf16": "bf16"}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("data", "backbone", "encoder", "decoder", "heads", "other", "matching", "loss", "backward", "clipping",
         "optimizer", "rest")
PEERS = ("transformers", *peers.TORCHVISION)
MAX_NORM, NUM_CLASSES = 0.1, 91
SMALL = (128, 160)      # of the call before the one whose memory is measured: 426 tokens, enough for 300 proposals
AGREES = 1e-3                                   # the most that what has our weights may differ in float32


def get_args_parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                 epilog="The head of this file says what is measured and how.")
    parser.add_argument("--model", nargs="+", default=["detr_resnet50", "deformable_detr_resnet50"],
                        choices=list_models(), metavar="PRESET", help="models to measure, one after another, of "
                        f"{', '.join(list_models())} (default: detr_resnet50 deformable_detr_resnet50)")
    parser.add_argument("--flags", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the models, as "
                        "main.py's flags without their dashes: num_queries=100")
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES, help="what is timed: a forward pass "
                        "in evaluation, or a whole training step (default: both)")
    parser.add_argument("--batch", nargs="+", type=int, metavar="N",
                        help="images of a batch (default: forward 1, train 2; on CUDA forward 1 16, train 16)")
    parser.add_argument("--size", nargs="+", type=height_and_width, metavar="HxW",
                        help="of the images in pixels (default: forward 800x1066, train 480x640; on CUDA both 800x1066)")
    parser.add_argument("--objects", type=int, default=7, help="of each image, in training (default: %(default)s)")
    parser.add_argument("--precision", nargs="+", choices=AMP, help="what all sides compute in (default: both, or "
                        "float32 alone on a processor without instructions for bfloat16)")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ... "
                        "(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="on CPU (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are timed, at least 5 for figures to show "
                        "(default: %(default)s)")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="what times are read from, on CPU "
                        "(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="measure compiled models, too, ours and the peers'")
    parser.add_argument("--cuda_graphs", action="store_true", help="measure prepared models as CUDA graphs, too")
    parser.add_argument("--compare", nargs="*", choices=PEERS, metavar="PEER", help="the same work through installed "
                        f"peers, and ratios: {', '.join(PEERS)} (default: all)")
    parser.add_argument("--keep_memory", action="store_true", help="on a CPU, keep freed memory, as main.py does")
    parser.add_argument("--dropout", type=float, help="everywhere in the transformers of both sides (default: as each "
                        "one's configuration has it)")
    parser.add_argument("--no_memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--no_parts", action="store_true", help="leave out shares of time, FLOPs and limits")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    parser.add_argument("--case", help=argparse.SUPPRESS)                       # one case of a run on CPU, in json
    return parser


def height_and_width(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text}: give HEIGHTxWIDTH, such as 800x1066")
    return int(sides[0]), int(sides[1])


def flags_of(words: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` -> names and values; what is no Python literal is text."""
    flags = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--flags {word}: give NAME=VALUE, such as num_queries=50")
        try:
            flags[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            flags[name] = value
    return flags


# Where the time goes

class Parts:
    """What a clock gains in each named part of a computation; what runs inside an inner part counts for that alone.

    ``with parts("loss"): ...`` for code, ``parts.of(model, criterion)`` for modules, by hooks that change nothing.
    """

    def __init__(self, clock: Callable[[], Any]) -> None:
        self.clock, self.inside = clock, ["rest"]
        self.sums: dict[str, Any] = {}
        self.since = clock()

    def turn(self) -> None:
        """What was gained since the last turn belongs to the part that is running."""
        now = self.clock()
        self.sums[self.inside[-1]] = self.sums.get(self.inside[-1], 0) + (now - self.since)
        self.since = now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        self.turn()
        self.inside.append(name)

    def leave(self) -> None:
        self.turn()
        self.inside.pop()

    @contextmanager
    def of(self, model: nn.Module, criterion: nn.Module | None = None) -> Iterator[None]:
        """While it is entered, calls of the model's parts, and of criterion and matcher, are told apart; and backward
        passes. Attention itself gets no hooks: with one it would compute its weights."""
        detr: Any = getattr(model, "detr", model)
        named = [("other", model), ("backbone", backbone_of(model)), ("encoder", detr.transformer.encoder),
                 ("decoder", detr.transformer.decoder), *(("heads", head) for head in heads_of(model))]
        if criterion is not None:
            named += [("loss", criterion), ("matching", criterion.matcher)]
        backward = Tensor.backward

        def timed(*args: Any, **kwargs: Any) -> None:
            with self("backward"):
                backward(*args, **kwargs)

        hooks = []
        try:
            for name, module in named:
                hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.enter(name)))
                hooks.append(module.register_forward_hook(lambda *_: self.leave()))
            Tensor.backward = timed                                                         # type: ignore[method-assign]
            yield
        finally:
            Tensor.backward = backward                                                      # type: ignore[method-assign]
            for hook in hooks:
                hook.remove()


def heads_of(model: nn.Module) -> list[nn.Module]:
    """Class and box heads, each once."""
    heads = [m for name, m in model.named_modules() if name.rpartition(".")[2] in ("class_embed", "bbox_embed")]
    return list({id(m): m for head in heads for m in (head if isinstance(head, nn.ModuleList) else [head])}.values())


@contextmanager
def no_parts(name: str) -> Iterator[None]:
    yield


class Work(TorchDispatchMode):
    """Counts FLOPs, bytes that operators read and write, and the seconds that each operator by itself takes at least on a
    machine of ``peak`` FLOPs and ``bandwidth`` bytes a second. ``now()`` is all three, summed."""

    def __init__(self, peak: float, bandwidth: float) -> None:
        super().__init__()
        self.peak, self.bandwidth, self.sums = peak, bandwidth, np.zeros(3)

    def now(self) -> np.ndarray:
        return self.sums.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        flops = 0 if formula is None else formula(*args, **(kwargs or {}), out_val=out)
        results = func._schema.returns
        if results and all(r.alias_info is not None and not r.alias_info.is_write for r in results):
            return out                                          # a view moves nothing
        moved = sum(x.numel() * x.element_size() for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        self.sums += (flops, moved, max(flops / self.peak, moved / self.bandwidth))
        return out


# The two sides

class Side(NamedTuple):
    """Something that is timed."""
    who: str                                            # ours, or a peer's name
    form: str                                           # model, prepared; with ", compiled"
    precision: str
    call: Callable[[], Any]
    small: Callable[[], Any]                            # the same on small images
    instrumented: Callable[[Parts], Any] | None = None
    note: str = ""


def settings_of(case: dict[str, Any]) -> config.ModelConfig:
    """The configuration of a case's model."""
    given = {**case["flags"], **({} if case["dropout"] is None else {"dropout": case["dropout"]})}
    return dataclasses.replace(PRESETS[case["model"]].model, **given)


def build(case: dict[str, Any], device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Model and criterion with weights that are nowhere at their start, where some parts do nothing."""
    torch.manual_seed(0)
    given = {**case["flags"], **({} if case["dropout"] is None else {"dropout": case["dropout"]})}
    model, criterion, _ = build_model(case["model"], num_classes=NUM_CLASSES, **given)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" not in name:
                parameter += 0.05 * torch.randn_like(parameter)
    settle(model)
    return model.to(device), criterion.to(device)


def settle(model: nn.Module) -> None:
    """Set the fixed statistics of normalisations to those of random images, so that maps are neither vast nor tiny."""
    @torch.no_grad()
    def take(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        norm.running_mean.copy_(args[0].mean((0, 2, 3)))
        norm.running_var.copy_(args[0].var((0, 2, 3)) + 1e-3)

    hooks = [m.register_forward_pre_hook(take) for m in model.modules() if type(m).__name__ == "FrozenBatchNorm2d"]
    was = model.training
    try:
        if hooks:
            with torch.enable_grad():                           # without, normalisations are not called by themselves
                model.eval()(torch.randn(1, 3, 128, 128))
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()


def items_of(batch: int, size: Sequence[int], objects: int) -> list[tuple[Tensor, Target]]:
    """What a data set would give: images and their targets."""
    generator = torch.Generator().manual_seed(1)
    items: list[tuple[Tensor, Target]] = []
    for i in range(batch):
        boxes = torch.rand(objects, 4, generator=generator) * 0.4
        boxes[:, :2] += 0.3
        boxes[:, 2:] += 0.05
        items.append((torch.randn(3, *size, generator=generator), {
            "labels": torch.randint(1, NUM_CLASSES, (objects,), generator=generator), "boxes": boxes,
            "image_id": torch.tensor([i])}))
    return items


class OurModel:
    """Our side of a case: calls, plain and instrumented."""

    def __init__(self, case: dict[str, Any], model: nn.Module, criterion: nn.Module, device: torch.device) -> None:
        self.case, self.model, self.criterion, self.device = case, model, criterion, device
        self.size = tuple(case["size"])
        self.items = {size: items_of(case["batch"], size, case["objects"]) for size in (SMALL, self.size)}
        self.batches = {size: to_device(*collate(items), device) for size, items in self.items.items()}
        self.optimizer: torch.optim.Optimizer | None = None
        self.differences: dict[str, dict[str, float]] = {}              # of predictions, from those of the model as it is
        self.graphs: dict[str, CudaGraphs] = {}
        if case["mode"] == "train":
            model.train(), criterion.train()
            groups = settings_of(case).parameter_groups(model, 1e-4)
            self.optimizer = make_optimizer(groups, TrainConfig())
        else:
            model.eval()

    def batch(self, size: tuple[int, int], parts: Parts | None) -> tuple[NestedTensor, list[Target]]:
        """A batch that is there; or, where parts are timed, made anew."""
        if parts is None:
            return self.batches[size]
        with parts("data"):
            return to_device(*collate(self.items[size]), self.device)

    def forward(self, model: nn.Module, precision: str, size: tuple[int, int], parts: Parts | None = None) -> Any:
        samples, _ = self.batch(size, parts)
        with parts.of(model) if parts else nullcontext(), torch.no_grad(), autocast(self.device, AMP[precision]):
            return model(samples)

    def step(self, model: nn.Module, precision: str, size: tuple[int, int],
             parts: Parts | None = None) -> dict[str, float]:
        """As in ``engine.train_one_epoch``."""
        batch = self.batch(size, parts)
        part: Any = parts or no_parts
        assert self.optimizer is not None
        with parts.of(model, self.criterion) if parts else nullcontext():
            with part("optimizer"):
                self.optimizer.zero_grad()
            given = add_up_gradients(model, self.criterion, [batch], self.device, AMP[precision], None)
            if given.broken:
                raise RuntimeError(f"{self.case['model']} in {precision}: {', '.join(given.found)}")
            with part("clipping"):
                sharding.clip(model, MAX_NORM)
            with part("optimizer"):
                self.optimizer.step()
        return readings(given.losses, self.criterion.weight_dict)

    def expected(self) -> Outputs:
        """What the model as it is predicts of the small images, in evaluation and float32."""
        was = self.model.training
        self.model.eval()
        with torch.no_grad():
            found = self.model(self.batches[SMALL][0])
        self.model.train(was)
        return found

    def run(self, model: nn.Module, precision: str, size: tuple[int, int], parts: Parts | None = None) -> Any:
        return (self.step if self.case["mode"] == "train" else self.forward)(model, precision, size, parts)

    def side(self, form: str, model: nn.Module, precision: str) -> Side:
        def instrumented(parts: Parts) -> Any:
            return self.run(model, precision, self.size, parts)

        return Side("ours", form, precision, lambda: self.run(model, precision, self.size),
                    lambda: self.run(model, precision, SMALL), None if "graphs" in form else instrumented)

    def work(self, precision: str, peak: float, bandwidth: float) -> dict[str, np.ndarray]:
        """FLOPs, bytes and seconds at the limit of each part of the model as it is."""
        counted = Work(peak, bandwidth)
        parts = Parts(counted.now)
        with counted, sdpa_kernel(SDPBackend.MATH):
            self.run(self.model, precision, self.size, parts)
        parts.turn()
        return parts.sums


    def sides(self) -> tuple[list[Side], dict[str, str]]:
        """All forms of the model, and why some are left out."""
        left_out: dict[str, str] = {}
        sides = []
        for precision in self.case["precision"]:
            forms = {"model": self.model}
            if self.case["mode"] == "train" and precision == "float32" and self.device.type == "cpu":
                folded = sharing_weights(self.model)
                if fold_norms(folded):
                    forms["folded"] = folded
            if self.case["mode"] == "forward" and importlib.util.find_spec("detr.inference") is None:
                left_out["prepared"] = "there is no detr.inference"
            elif self.case["mode"] == "forward":
                from detr.inference import for_prediction
                forms["prepared"] = fast = for_prediction(self.model, AMP[precision])
                self.differences[f"prepared {precision}"] = agreeing(
                    f"for_prediction({self.case['model']}, {AMP[precision]!r})", self.expected(),
                    self.forward(fast, precision, SMALL), AGREES if precision == "float32" else math.inf)
            if self.case["cuda_graphs"] and "prepared" in forms:
                forms["prepared, graphs"] = graphed = with_graphs(fast)
                for _ in range(3):                              # as it is, recorded, replayed
                    self.differences[f"graphs {precision}"] = agreeing(
                        f"{self.case['model']} as a CUDA graph", self.forward(fast, precision, SMALL),
                        self.forward(graphed, precision, SMALL), AGREES)
            if self.case["compile"]:
                forms |= {f"{form}, compiled": compiled(model, self.device) for form, model in forms.items()}
            for form, model in forms.items():
                sides.append(self.side(form, model, precision))
                if "graphs" in form:
                    self.graphs[f"{form} {precision}"] = Forward.of(model).call                 # type: ignore[assignment]
        return sides, left_out


def only_replayed(graphs: Mapping[str, CudaGraphs]) -> dict[str, str]:
    """What graphs did, in words. RuntimeError where one was not replayed but for the two calls that do not count."""
    for form, counted in graphs.items():
        if counted.plain.total() != counted.recorded:           # each shape once as without, once recorded
            raise RuntimeError(f"{form}: what was timed is no replay. {counted}")
    return {form: str(counted) for form, counted in graphs.items()}


def with_graphs(model: nn.Module) -> nn.Module:
    """A copy of the modules that replays CUDA graphs; see ``sharing_weights``."""
    fast = sharing_weights(model)
    use_cuda_graphs(fast)
    return fast


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """A compiled copy of the modules; see ``sharing_weights``."""
    fast = sharing_weights(model)
    memory.compile_model(fast, device)
    return fast


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules with the parameters and buffers of ``model`` itself, which an optimizer has."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


def agreeing(who: str, ours: Outputs, theirs: Outputs, allowed: float = AGREES) -> dict[str, float]:
    """How far the predictions are from those of our model as it is. RuntimeError where that is more than ``allowed``, or
    no number: what predicts something else is not the same work."""
    found = peers.differences(ours, theirs)
    if not all(value <= allowed for value in found.values()):                       # NaN is not
        raise RuntimeError(f"{who} predicts something else: {found}, where {allowed} is allowed; nothing was timed")
    return found


class Peers:
    """The other side of a case: peers whose outputs agree, as far as their weights are ours."""

    def __init__(self, case: dict[str, Any], ours: OurModel) -> None:
        self.case, self.ours, self.device = case, ours, ours.device
        self.left_out: dict[str, str] = {}
        self.differences: dict[str, dict[str, float]] = {}

    def sides(self, names: Sequence[str]) -> list[Side]:
        """Those of the peers named, of which the ones that cannot be compared with are noted in ``left_out``."""
        sides: list[Side] = []
        for name in names:
            try:
                if why := peers.missing(peers.package_of(name)):
                    raise ValueError(why)
                sides += self.of(functools.partial(self.make, name))
            except ValueError as error:
                self.left_out[name] = str(error)
        return sides

    def make(self, name: str) -> peers.Peer:
        torch.manual_seed(0)
        if name == "transformers":
            peer = peers.transformers_peer(self.ours.model, settings_of(self.case), NUM_CLASSES, self.case["dropout"])
            peer.model.to(self.device)
            peer.model.eval()
            with torch.no_grad():
                theirs = peer.predict(self.ours.batches[SMALL][0])
            self.differences[name] = agreeing(f"{name} with the weights of {self.case['model']}",
                                              self.ours.expected(), theirs)
        else:
            peer = peers.torchvision_peer(name, self.ours.size, NUM_CLASSES)
            settle(peer.model.backbone)                                                     # type: ignore[arg-type]
            peer.model.to(self.device)
        return peer

    def of(self, make: Callable[[], peers.Peer]) -> list[Side]:
        """One peer in all precisions, compiled, too, if asked for."""
        ways = [("model", False)] + [("model, compiled", True)] * self.case["compile"]
        if self.case["mode"] == "forward":
            return [self.forward(make(), form, fast, precision) for precision in self.case["precision"]
                    for form, fast in ways]
        sides = []
        for form, fast in ways:
            peer = make()
            optimizer = make_optimizer([{"params": [p for p in peer.model.parameters() if p.requires_grad], "lr": 1e-4}],
                                       TrainConfig())
            peer.model.train()
            if fast:
                peer.model.compile()
            sides += [self.train(peer, form, precision, optimizer) for precision in self.case["precision"]]
        return sides

    def forward(self, peer: peers.Peer, form: str, fast: bool, precision: str) -> Side:
        peer.model.eval()
        dtype, note = DTYPES[precision], peer.note if peer.name != "transformers" else ""
        batches = {size: samples for size, (samples, _) in self.ours.batches.items()}
        converted = {size: NestedTensor(x.tensors.to(dtype), x.mask, x.sizes) for size, x in batches.items()}

        def run(size: tuple[int, int]) -> Any:
            with torch.no_grad(), autocast(self.device, "off" if whole else AMP[precision]):
                return peer.predict((converted if whole else batches)[size])

        whole = precision != "float32"
        if whole:
            peer.model.to(dtype)
            try:
                run(SMALL)
            except RuntimeError:                                # some operator wants one type
                whole = False
                peer.model.float()
            note = "; ".join(filter(None, (note, "converted to bfloat16" if whole else "within autocast")))
        if fast:
            peer.model.compile()
        return Side(peer.name, form, precision, lambda: run(self.ours.size), lambda: run(SMALL), note=note)

    def train(self, peer: peers.Peer, form: str, precision: str, optimizer: torch.optim.Optimizer) -> Side:
        def run(size: tuple[int, int]) -> float:
            samples, targets = self.ours.batches[size]
            optimizer.zero_grad()
            with autocast(self.device, AMP[precision]):
                loss = peer.loss(samples, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(peer.model.parameters(), MAX_NORM)
            optimizer.step()
            return float(loss.detach())

        return Side(peer.name, form, precision, lambda: run(self.ours.size), lambda: run(SMALL), note=peer.note)


# Measuring

class Clock:
    """Seconds on the wall and of the processor (over ``threads``) that calls take; on CUDA the GPU is waited for."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device, self.threads = device, threads

    def wall(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def time(self, call: Callable[[], Any], calls: int = 1) -> tuple[float, float]:
        """Of one call, as the mean over ``calls``."""
        wall, cpu = self.wall(), time.process_time()
        for _ in range(calls):
            call()
        return (self.wall() - wall) / calls, (time.process_time() - cpu) / self.threads / calls


TURN = 0.2                                          # seconds that a side's turn takes at least


def take_turns(calls: Sequence[Callable[[], Any]], clock: Clock, repeats: int) -> np.ndarray:
    """Seconds of each call in each round, wall and processor: ``[calls, repeats, 2]``. Short calls are made several times
    a turn. Two rounds before, the second with everything compiled, do not count."""
    for call in calls:
        call()
    number = [max(1, round(TURN / max(clock.time(call)[0], 1e-6))) for call in calls]
    rounds = [[clock.time(call, n) for call, n in zip(calls, number)] for _ in range(repeats)]
    return np.array(rounds).transpose(1, 0, 2)


def limits(device: torch.device, precisions: Sequence[str], size: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """What the machine's peaks are measured by: a call, and its FLOPs or bytes. ``size`` is that of the matrices."""
    calls: dict[str, tuple[Callable[[], Any], float]] = {}
    for precision in precisions:
        a, b = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
        out = torch.empty_like(a)
        calls[precision] = functools.partial(multiply, a, b, out), 2.0 * size ** 3
    numbers = 2 ** 28 if device.type == "cuda" else 2 ** 14 * size                      # 1 GiB; 128 MiB of 2048 x 2048
    source = torch.ones(numbers, device=device)
    target = torch.zeros_like(source)
    calls["copy"] = lambda: target.copy_(source), 2.0 * source.nbytes
    return calls


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """A matrix product; on CUDA with TF32 where PyTorch lets convolutions use it."""
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = was or torch.backends.cudnn.allow_tf32
    torch.mm(a, b, out=out)
    torch.backends.cuda.matmul.allow_tf32 = was


def measure_memory(case: dict[str, Any], who: str, form: str, precision: str) -> dict[str, Any]:
    """The peak memory of one side of a case, with nothing else there but, beside a peer, our model."""
    device = torch.device(case["device"])
    torch.set_num_threads(case["threads"])
    case = {**case, "precision": [precision], "compile": "compiled" in form}
    ours = OurModel(case, *build(case, device), device)
    sides = ours.sides()[0] if who == "ours" else Peers(case, ours).sides([who])
    return {"peak_bytes": peak_of(next(side for side in sides if side.form == form), ours)}


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """All figures of a case but, on a CPU, memory: see ``figures``."""
    device = torch.device(case["device"])
    if device.type == "cpu" and case["keep_memory"]:
        memory.keep_freed_memory()
    torch.set_num_threads(case["threads"])
    ours = OurModel(case, *build(case, device), device)
    others = Peers(case, ours)
    sides, left_out = ours.sides()
    sides += others.sides(case["compare"])
    clock = Clock(device, case["threads"])
    peaks = limits(device, case["precision"], case["matrix"])
    spent = take_turns([*(side.call for side in sides), *(call for call, _ in peaks.values())], clock, case["repeats"])
    shown = spent[..., ("wall", "cpu").index(case["clock"])]                            # [sides and peaks, rounds]
    rates = {name: amount / statistics.median(shown[len(sides) + i])
             for i, (name, (_, amount)) in enumerate(peaks.items())}
    replays = only_replayed(ours.graphs)
    work = {} if case["no_parts"] else {p: ours.work(p, rates[p], rates["copy"]) for p in case["precision"]}
    rows = []
    for i, side in enumerate(sides):
        row = {"who": side.who, "form": side.form, "precision": side.precision, "note": side.note,
               **summary(shown[i], case["batch"]), "wall_seconds": spent[i, :, 0].tolist(),
               "cpu_seconds": spent[i, :, 1].tolist()}
        if side.instrumented is not None and work:
            flops = float(sum(work[side.precision].values())[0])
            row |= {"flops": flops, "flops_per_second": flops / row["seconds"],
                    "share_of_peak": flops / row["seconds"] / rates[side.precision],
                    "parts": shares(side.instrumented, clock, min(case["repeats"], 3))}
        if device.type == "cuda" and not case["no_memory"] and "graphs" not in side.form:   # these have memory already
            row["peak_bytes"] = peak_of(side, ours)
        rows.append(row)
    return {**case, "rows": rows, "ratios": ratios(rows, shown), "rates": rates, "graphs": replays,
            "differences": ours.differences | others.differences, "left_out": left_out | others.left_out,
            "limits": {precision: {part: dict(zip(("flops", "bytes", "seconds"), map(float, figures)))
                                   for part, figures in parts.items() if np.any(figures)}
                       for precision, parts in work.items()}}


def summary(seconds: np.ndarray, batch: int) -> dict[str, Any]:
    """Of the rounds: the median, the spread, and images a second at the median."""
    median = statistics.median(seconds)
    return {"seconds": median, "low": float(seconds.min()), "high": float(seconds.max()),
            "images_per_second": batch / median}


def ratios(rows: Sequence[dict[str, Any]], seconds: np.ndarray) -> list[dict[str, Any]]:
    """Each peer's time over each of ours: of the medians; and the smallest and largest of single rounds."""
    found = []
    for i, mine in enumerate(rows):
        for k, theirs in enumerate(rows):
            if mine["who"] == "ours" and theirs["who"] != "ours":
                of_rounds = seconds[k] / seconds[i]
                found.append({"ours": [mine["form"], mine["precision"]],
                              "theirs": [theirs["who"], theirs["form"], theirs["precision"]],
                              "ratio": theirs["seconds"] / mine["seconds"], "low": float(of_rounds.min()),
                              "high": float(of_rounds.max())})
    return found


def shares(instrumented: Callable[[Parts], Any], clock: Clock, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds and share of each part, of the run of the median length."""
    runs = []
    for _ in range(repeats):
        parts = Parts(clock.wall)
        instrumented(parts)
        parts.turn()
        runs.append(parts.sums)
    middle = sorted(runs, key=lambda sums: sum(sums.values()))[len(runs) // 2]
    whole = sum(middle.values())
    return {name: {"seconds": middle[name], "share": middle[name] / whole} for name in PARTS if name in middle}


def peak_of(side: Side, ours: OurModel) -> int:
    """Bytes beyond what was in use before a call, after one on small images."""
    side.small()
    if ours.device.type == "cuda":
        side.call()
    before = memory.used_memory(ours.device)
    return memory.peak_memory(side.call, ours.device) - before


def title_of(case: dict[str, Any]) -> str:
    return f"{case['model']}, {case['mode']}, batch {case['batch']}, {case['size'][0]}x{case['size'][1]}"


def apart(case: dict[str, Any], *side: str) -> dict[str, Any]:
    """``measure``, or ``measure_memory`` of a side, in a process of its own, whose memory nothing else has touched."""
    print(f"{title_of(case)}: measuring {'memory of ' + ' '.join(side) if side else 'time'} ...", file=sys.stderr,
          flush=True)
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps([case, *side])], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def figures(case: dict[str, Any]) -> dict[str, Any]:
    """All figures of a case: those of ``measure``; on a CPU each side's memory from a process of its own."""
    if torch.device(case["device"]).type == "cuda":
        return measure(case)
    found = apart(case)
    for row in found["rows"] if not case["no_memory"] else ():
        row |= apart(case, row["who"], row["form"], row["precision"])
    return found


# Tables

def speed_table(cases: Sequence[dict[str, Any]]) -> str:
    """A line for each side; ratios against ``transformers``: as it is in float32, and in the same precision, compiled
    beside what is compiled here."""
    lines = [("model", "mode", "batch", "size", "side", "precision", "images/s", "s", "spread", "GFLOP/s", "of peak",
              "peak MB", "x float32 peer", "x same peer")]
    for case in cases:
        for row in case["rows"]:
            alike = "model, compiled" if "compiled" in row["form"] else "model"
            against = [ratio_text(case, row, "float32"), ratio_text(case, row, row["precision"], alike)]
            lines.append((case["model"], case["mode"], str(case["batch"]), "x".join(map(str, case["size"])),
                          f"{row['who']} ({row['form']})", row["precision"], f"{row['images_per_second']:.3g}",
                          f"{row['seconds']:.3g}", f"{row['low']:.3g}-{row['high']:.3g}",
                          f"{row['flops_per_second'] / 1e9:.0f}" if "flops" in row else "",
                          f"{row['share_of_peak']:.0%}" if "flops" in row else "",
                          f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "", *against))
    return aligned(lines)


def ratio_text(case: dict[str, Any], row: dict[str, Any], precision: str, form: str = "model") -> str:
    """``1.70x (1.65-1.74)``: how much longer ``transformers`` took, if it ran."""
    for ratio in case["ratios"]:
        if [row["form"], row["precision"]] == ratio["ours"] and row["who"] == "ours" and \
                ratio["theirs"] == ["transformers", form, precision]:
            return f"{ratio['ratio']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"
    return ""


def parts_table(cases: Sequence[dict[str, Any]]) -> str:
    """Shares of time."""
    names = [name for name in PARTS if any(name in row.get("parts", {}) for case in cases for row in case["rows"])]
    lines = [("model", "mode", "batch", "form", "precision", *names)]
    for case in cases:
        for row in case["rows"]:
            if "parts" in row:
                lines.append((case["model"], case["mode"], str(case["batch"]), row["form"], row["precision"],
                              *(f"{row['parts'].get(name, {'share': 0})['share']:.1%}" for name in names)))
    return aligned(lines)


def limits_table(cases: Sequence[dict[str, Any]]) -> str:
    """Each part beside the machine's limits."""
    lines = [("model", "mode", "batch", "precision", "part", "GFLOP", "MB", "FLOP/byte", "limit ms", "model ms",
              "of limit")]
    for case in cases:
        for precision, parts in case["limits"].items():
            took = next(row["parts"] for row in case["rows"] if (row["who"], row["form"], row["precision"]) ==
                        ("ours", "model", precision))
            for part in (name for name in PARTS if name in parts and name in took):
                flops, moved, seconds = (parts[part][name] for name in ("flops", "bytes", "seconds"))
                lines.append((case["model"], case["mode"], str(case["batch"]), precision, part, f"{flops / 1e9:.2f}",
                              f"{moved / 1e6:.0f}", f"{flops / max(moved, 1):.1f}", f"{1e3 * seconds:.1f}",
                              f"{1e3 * took[part]['seconds']:.1f}", f"{seconds / max(took[part]['seconds'], 1e-9):.0%}"))
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns; those that begin with a digit in most lines to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    right = [sum(line[i][:1].isdigit() for line in lines) * 2 >= len(lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(n) if r else cell.ljust(n) for cell, n, r in zip(line, widths, right)).rstrip()
                     for line in lines)


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    facts = {"cpu": cpu, "threads": threads, "torch": torch.__version__, "python": platform.python_version(),
             "device": "CPU"}
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    for package in ("transformers", "torchvision", "timm"):
        if importlib.util.find_spec(package):
            facts[package] = importlib.import_module(package).__version__
    return facts


def cases_of(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """What the flags ask for."""
    cuda = device.type == "cuda"
    batches = {"forward": [1, 16] if cuda else [1], "train": [16] if cuda else [2]}
    sizes = {"forward": [(800, 1066)], "train": [(800, 1066) if cuda else (480, 640)]}
    common = {"flags": flags_of(args.flags), "objects": args.objects, "precision": precisions(args, device),
              "device": str(device), "threads": args.threads or torch.get_num_threads(),
              "repeats": args.repeats, "clock": args.clock, "compile": args.compile, "cuda_graphs": args.cuda_graphs,
              "compare": list(PEERS) if args.compare == [] else args.compare or [],
              "keep_memory": args.keep_memory, "dropout": args.dropout, "no_memory": args.no_memory,
              "no_parts": args.no_parts, "matrix": 8192 if cuda else 2048}
    return [{"model": model, "mode": mode, "batch": batch, "size": list(size), **common}
            for model in args.model for mode in args.mode for batch in args.batch or batches[mode]
            for size in args.size or sizes[mode]]


def precisions(args: argparse.Namespace, device: torch.device) -> list[str]:
    """Those asked for; by default those that the device is made for."""
    return args.precision or [name for name in AMP if name == "float32" or fast_in_bf16(device)]


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    there = torch.cuda.is_available()
    device = torch.device(("cuda" if there else "cpu") if args.device == "auto" else args.device)
    if device.type == "cuda" and not there:
        raise SystemExit(f"--device {args.device}: PyTorch {torch.__version__} sees no GPU here; use --device cpu, or "
                         f"run this where there is one")
    if args.clock == "cpu" and device.type == "cuda":
        raise SystemExit("--clock cpu: a GPU's time is none of the processor's; leave it out, or use --device cpu")
    if args.cuda_graphs and (device.type != "cuda" or args.mode == ["train"]):
        raise SystemExit("--cuda_graphs: graphs are of forward passes on a GPU; leave it out, or use --device cuda and "
                         "--mode forward")
    if args.repeats < 1:
        raise SystemExit(f"--repeats {args.repeats}: give 1 or more, at least 5 for figures to show")
    cases = cases_of(args, device)
    for case in cases:
        settings_of(case)                                       # misspelt flags fail before anything is measured
    facts = machine(device, cases[0]["threads"])
    print(", ".join(f"{name} {fact}" for name, fact in facts.items()) + ("" if there else "; no GPU here"), flush=True)
    if not args.precision and "bf16" not in cases[0]["precision"]:
        print("bf16 left out: this processor has no instructions for it; --precision float32 bf16 measures it all the "
              "same, slowly", flush=True)
    for name in cases[0]["compare"]:
        if why := peers.missing(peers.package_of(name)):
            print(f"{name} left out: {why}", flush=True)
    found = []
    said: set[str] = set()
    for case in cases:
        title = title_of(case)
        found.append(done := figures(case))
        for name, why in done["left_out"].items():
            if (text := f"{name} left out of {case['model']}: {why}") not in said:
                print(text, flush=True)
                said.add(text)
        for name, differences in done["differences"].items():
            print(f"{title}: {name}, with the same weights, differs by " +
                  ", ".join(f"{value:.1e} ({what})" for what, value in differences.items()), flush=True)
        for form, counted in done["graphs"].items():
            print(f"{title}: {form}: {counted}", flush=True)
        for row in done["rows"]:
            if row["note"] and (text := f"{row['who']}, {row['precision']}, {case['mode']}: {row['note']}") not in said:
                print(text, flush=True)
                said.add(text)
        print(f"{title}: " + ", ".join(f"{row['who']} {row['form']} {row['precision']} {row['seconds']:.3g} s"
                                       for row in done["rows"]) +
              "; matrix products: " + ", ".join(f"{done['rates'][p] / 1e9:.0f} GFLOP/s in {p}" for p in case["precision"])
              + f"; copies: {done['rates']['copy'] / 1e9:.1f} GB/s", flush=True)
    print("\n" + speed_table(found))
    if not args.no_parts:
        print("\n" + parts_table(found) + "\n\n" + limits_table(found))
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "cases": found}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    arguments = get_args_parser().parse_args()
    if arguments.case:
        given, *side = json.loads(arguments.case)
        print(json.dumps(measure_memory(given, *side) if side else measure(given)))
    else:
        main(arguments)
