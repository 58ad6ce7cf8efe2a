"""Prediction as CUDA graphs: where images' sizes come again, all kernels of a forward pass are launched at once.

A detector's forward pass is a thousand small kernels or more, and with one image a GPU is done with most of them before
the program has launched the next. A graph is recorded once for each batch shape and then does the same with other
images. What Python decided while it was recorded stays decided, so that a graph belongs to the images' sizes, padding
included, to the type in which is computed and to where the weights lie.
"""
from __future__ import annotations

import gc
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .memory import Forward
from .nested_tensor import NestedTensor, as_nested_tensor
from .transfer import Kept, keeping

MOST = 16                       # graphs kept of a model; each holds its inputs and outputs, and all share the rest
SEEN = 4096                     # shapes remembered that came once
STALE = 10                      # graphs make room once, in so many batches for each place, the shape of one did not come
RECORDING = threading.Lock()    # one at a time in this process

Shape = tuple[Any, ...]         # see ``shape_of``
FIRST, HOOKS, OTHERS, SIZES, GRADIENTS, FULL = "the first of their shape", "with hooks", "with further arguments", \
    "without sizes", "with gradients", "without a free place"


class NotRecorded(RuntimeError):
    """A forward pass does what no graph can."""


@dataclass
class Recorded:
    """A forward pass: each ``replay`` reads ``samples`` and what was ``kept``, and writes ``outputs``; ``used`` last for
    that batch."""
    samples: NestedTensor
    replay: Callable[[], object]
    outputs: Any
    kept: Kept
    used: int = 0


def use_cuda_graphs(model: nn.Module, most: int = MOST) -> CudaGraphs:
    """From now on ``model``, a detector in evaluation on a GPU, records its forward pass for batches whose shape comes a
    second time, and replays it from then on, without gradients; what is returned counts how often. At most ``most``
    graphs are kept: with no place free, batches of further shapes are computed as without graphs, until a shape has not
    come for long: then all graphs are given up, since they share memory, and recorded anew as their shapes come.

    As without graphs are computed, too, batches without ``sizes``, images that ask for gradients, calls with targets, and
    all calls while modules have hooks, as reading a model's attention sets, which a graph would not call. Weights may
    change; other things that Python looks up while it computes, as attributes of layers, flags of PyTorch, its modes and
    environment variables, stay as they were when a graph was recorded: call this function again after such a change.
    While one is recorded, other threads may use the GPU, but not wait for all of it, as ``torch.cuda.synchronize`` does.

    For other calls, a model in training or on a CPU, or that gives back what cannot be copied, raises ValueError, and one
    that does what no graph can ``NotRecorded``.
    """
    without_cuda_graphs(model)
    graphs = CudaGraphs(most)
    Forward.of(model).call = graphs
    return graphs


def without_cuda_graphs(model: nn.Module) -> None:
    """Undo ``use_cuda_graphs``."""
    forward = vars(model).get("forward")
    if isinstance(forward, Forward) and isinstance(forward.call, CudaGraphs):
        graphs, forward.call = forward.call, type(model).forward
        with graphs._lock:
            graphs.forget()


class CudaGraphs:
    """The forward pass of a model, see ``use_cuda_graphs``: how many batches were ``recorded``, how many ``replayed``,
    how many ``plain``, as without graphs, why, and how often all graphs were ``given_up``."""

    def __init__(self, most: int = MOST) -> None:
        if most < 1:
            raise ValueError(f"most is {most}: at least one graph is needed")
        self.most = most
        self.recorded = self.replayed = self.given_up = 0
        self.plain: Counter[str] = Counter()
        self._graphs: OrderedDict[Shape, Recorded] = OrderedDict()          # the one used last is the last
        self._seen: OrderedDict[Shape, None] = OrderedDict()
        self._weights: tuple[int, ...] = ()
        self._lock = threading.Lock()
        self._pool: Any = None                      # memory for what is between inputs and outputs
        self._stream: torch.cuda.Stream | None = None           # on which graphs are recorded
        self._done: torch.cuda.Event | None = None  # of the call before

    def __reduce__(self) -> tuple[Any, ...]:
        """For a copy of the model, which has other weights: nothing is recorded yet."""
        return type(self), (self.most,)

    def __str__(self) -> str:
        plain = self.plain.total()
        why = f" ({', '.join(f'{n} {why}' for why, n in self.plain.most_common())})" if plain else ""
        return (f"CUDA graphs: {self.replayed} of {self.recorded + self.replayed + plain} batches replayed, "
                f"{self.recorded} recorded, {plain} run as without{why}"
                + (f"; times all graphs were given up: {self.given_up}" if self.given_up else ""))

    def __call__(self, model: nn.Module, samples: NestedTensor | Tensor | list[Tensor], *args: Any,
                 **kwargs: Any) -> Any:
        samples, forward = as_nested_tensor(samples), type(model).forward
        hooked, weights = hooks_and_weights(model)
        why = (HOOKS if hooked else OTHERS if args or kwargs else SIZES if not isinstance(samples.sizes, list) else
               GRADIENTS if torch.is_grad_enabled() and samples.tensors.requires_grad else "")
        if not why:
            self.check(model, samples.tensors.device)
            with self._lock, self.in_turn(samples.tensors.device), torch.no_grad():
                graph = self.found(model, samples, weights)
                if isinstance(graph, Recorded):
                    graph.samples.tensors.copy_(samples.tensors)
                    graph.samples.mask.copy_(samples.mask)
                    graph.replay()
                    return copied(graph.outputs)    # the next replay writes to the same place
                why = graph
        with self._lock:
            self.plain[why] += 1
        return forward(model, samples, *args, **kwargs)

    def found(self, model: nn.Module, samples: NestedTensor, weights: tuple[int, ...]) -> Recorded | str:
        """The graph for such a batch, recorded now if need be; or why there is none."""
        if weights != self._weights:
            self.forget()
            self._seen.clear()
            self._weights = weights
        shape, batches = shape_of(samples), self.recorded + self.replayed + self.plain.total()
        if shape in self._graphs:
            self.replayed += 1
        elif shape not in self._seen:
            self._seen[shape] = None
            if len(self._seen) > SEEN:
                self._seen.popitem(last=False)
            return FIRST
        else:
            if len(self._graphs) == self.most:
                oldest = next(iter(self._graphs.values()))
                if batches - oldest.used <= STALE * self.most:
                    return FULL
                self.forget()                       # of graphs that share memory, one alone cannot safely go
                self.given_up += 1
            self._graphs[shape] = self.recording(model, samples)
            self.recorded += 1
        self._graphs.move_to_end(shape)
        self._graphs[shape].used = batches
        return self._graphs[shape]

    def forget(self) -> None:
        """Give up all graphs, once the GPU is done with them."""
        if self._graphs and self._done is not None:
            self._done.synchronize()
        self._graphs.clear()

    def recording(self, model: nn.Module, samples: NestedTensor) -> Recorded:
        """The forward pass of such a batch."""
        kept: Kept = {}
        failed: list[Exception] = []

        def run() -> Any:
            try:
                with keeping(kept):
                    return type(model).forward(model, own)
            except Exception as error:
                failed.append(error)
                raise

        # What is made in inference mode could not be written to outside of it.
        with RECORDING, torch.inference_mode(False), torch.no_grad():
            own = NestedTensor(samples.tensors.clone(), samples.mask.clone(), samples.sizes, samples.whole)
            self.prepare(run)
            try:
                return Recorded(own, *self.record(run), kept)
            except RuntimeError as error:           # at its end a recording that failed does so with another one
                raise NotRecorded(f"CUDA graphs: the forward pass of {type(model).__name__} could not be recorded: "
                                   f"{failed[0] if failed else error}. Start the program again without CUDA graphs"
                                   ) from error

    # What needs a GPU.

    def check(self, model: nn.Module, device: torch.device) -> None:
        """ValueError for what cannot be recorded."""
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a GPU of NVIDIA, and the images are on {device}: leave CUDA graphs out, "
                             f"or use the device 'cuda'")
        if model.training:
            raise ValueError(f"CUDA graphs are for prediction, and {type(model).__name__} is in training: call eval()")

    @contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        """One call after the other, in this program and on the GPU, whatever stream each uses: a graph has one place for
        its inputs."""
        with torch.cuda.device(device):
            if self._done is not None:
                torch.cuda.current_stream().wait_event(self._done)
            try:
                yield
            finally:
                self._done = torch.cuda.current_stream().record_event()

    def prepare(self, run: Callable[[], Any]) -> None:
        """A first call: libraries allocate and choose at theirs, and numbers are copied."""
        now = torch.cuda.current_stream()
        if self._stream is None or self._stream.device != now.device:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(now)
        torch.clear_autocast_cache()                # what is in it would not be computed by the graph
        try:
            with torch.cuda.stream(self._stream):
                run()
        finally:
            now.wait_stream(self._stream)           # also where it failed, others have to wait for what was begun

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """What does the same as ``run`` with what then is in its inputs, and the outputs it writes to."""
        torch.clear_autocast_cache()
        if not self._graphs:                        # memory that no graph uses any more cannot be shared
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with uncollected(), torch.cuda.stream(torch.cuda.current_stream()):     # to be left again, even if this fails
            try:                                    # what other threads do on the GPU meanwhile is no part of it
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream,
                                      capture_error_mode="thread_local"):
                    outputs = run()
            finally:
                torch.clear_autocast_cache()        # nor may others use what only the graph computes
        return graph.replay, outputs


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection, which would end a recording if it found an older model's graphs."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def hooks_and_weights(model: nn.Module) -> tuple[bool, tuple[int, ...]]:
    """Whether modules, or a part of ``model``, have hooks (its own are called either way), and where all weights lie."""
    hooked, places, parts = bool(_global_forward_hooks or _global_forward_pre_hooks), [], [model]
    for part in parts:                              # it grows on the way; ``modules()`` takes three times as long
        hooked = hooked or part is not model and bool(part._forward_hooks or part._forward_pre_hooks)
        places += [x.data_ptr() for x in part._parameters.values() if x is not None]
        places += [x.data_ptr() for x in part._buffers.values() if x is not None]
        parts += [child for child in part._modules.values() if child is not None]
    return hooked, tuple(places)


def shape_of(samples: NestedTensor) -> Shape:
    """All of a batch that Python decides by, and the type in which is computed."""
    images = samples.tensors
    computed_in = torch.get_autocast_dtype(images.device.type) if torch.is_autocast_enabled(images.device.type) else None
    return images.device, images.dtype, images.shape, tuple(map(tuple, samples.sizes)), samples.whole, computed_in


def copied(outputs: Any) -> Any:
    """``outputs`` with tensors of their own. ValueError for what may hold tensors that are not seen here."""
    if isinstance(outputs, Tensor):
        return outputs.clone()
    if isinstance(outputs, Mapping):
        return {name: copied(value) for name, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        made = getattr(type(outputs), "_make", type(outputs))                   # of named tuples
        return made(map(copied, outputs))
    if outputs is None or isinstance(outputs, (bool, int, float, str)):
        return outputs
    raise ValueError(f"CUDA graphs: outputs hold a {type(outputs).__name__}, and only tensors, lists, tuples, dicts and "
                     f"numbers can be given back: leave CUDA graphs out")
