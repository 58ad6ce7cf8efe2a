"""Prediction as CUDA graphs: where images' sizes come again, all kernels of a forward pass are launched at once.

A detector's forward pass is a thousand small kernels or more, and with one image a GPU is done with most of them before
the program has launched the next. A graph is recorded once for each batch shape and then does the same with other
images. What Python decided while it was recorded stays decided, so that a graph belongs to the images' sizes, padding
included, to the type in which is computed and to where the weights lie.
"""
from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .memory import Forward
from .nested_tensor import NestedTensor, as_nested_tensor
from .transfer import Kept, keeping

MOST = 16                       # graphs kept of a model; each holds its inputs and outputs, and all share the rest
SEEN = 4096                     # shapes remembered that came once


class Recorded(NamedTuple):
    """A forward pass: each ``replay`` reads ``samples`` and what was ``kept``, and writes ``outputs``."""
    samples: NestedTensor
    replay: Callable[[], object]
    outputs: Any
    kept: Kept


def use_cuda_graphs(model: nn.Module, most: int = MOST) -> CudaGraphs:
    """From now on ``model``, a detector in evaluation on a GPU, records its forward pass for batches whose shape comes a
    second time, and replays it from then on; what is returned counts how often. No gradients are computed. The ``most``
    graphs used last are kept.

    Calls run as without graphs while a part of the model has hooks, as reading its attention sets, which a graph would
    not call, and for batches without ``sizes``. When called, a model in training or on a CPU raises ValueError.
    """
    graphs = CudaGraphs(most)
    Forward.of(model).call = graphs
    return graphs


class CudaGraphs:
    """The forward pass of a model, see ``use_cuda_graphs``: how many batches were ``recorded``, how many ``replayed``,
    and how many ``plain``, as without graphs."""

    def __init__(self, most: int = MOST) -> None:
        if most < 1:
            raise ValueError(f"most is {most}: at least one graph is needed")
        self.most = most
        self.recorded = self.replayed = self.plain = 0
        self._graphs: OrderedDict[tuple[Any, ...], Recorded] = OrderedDict()
        self._seen: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._lock = threading.Lock()               # a graph has one place for its inputs
        self._pool: Any = None                      # memory for what is between inputs and outputs

    def __deepcopy__(self, memo: Mapping[int, Any]) -> CudaGraphs:
        """For a copy of the model, which has other weights: nothing is recorded yet."""
        return type(self)(self.most)

    def __str__(self) -> str:
        return (f"CUDA graphs: {self.replayed} of {self.recorded + self.replayed + self.plain} batches replayed, "
                f"{self.recorded} recorded, {self.plain} run as without (a shape's first, or hooks)")

    def __call__(self, model: nn.Module, samples: NestedTensor | Tensor | list[Tensor], *args: Any,
                 **kwargs: Any) -> Any:
        samples, forward = as_nested_tensor(samples), type(model).forward
        if args or kwargs or not isinstance(samples.sizes, list) or hooked(model):
            self.plain += 1
            return forward(model, samples, *args, **kwargs)
        self.check(model, samples.tensors.device)
        shape = shape_of(model, samples)
        with self._lock, torch.no_grad():
            if shape not in self._graphs and shape not in self._seen:
                self._seen[shape] = None
                if len(self._seen) > SEEN:
                    self._seen.popitem(last=False)
                self.plain += 1
                return forward(model, samples)
            if shape in self._graphs:
                self.replayed += 1
            else:
                self._graphs[shape] = self._recorded(model, samples)
                self.recorded += 1
                if len(self._graphs) > self.most:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(shape)
            graph = self._graphs[shape]
            graph.samples.tensors.copy_(samples.tensors)
            graph.samples.mask.copy_(samples.mask)
            graph.replay()
            return copied(graph.outputs)            # the next replay writes to the same place

    def _recorded(self, model: nn.Module, samples: NestedTensor) -> Recorded:
        """The forward pass of such a batch."""
        own = NestedTensor(samples.tensors.clone(), samples.mask.clone(), samples.sizes)
        kept: Kept = {}

        def run() -> Any:
            with keeping(kept):
                return type(model).forward(model, own)

        try:
            return Recorded(own, *self.record(run), kept)
        except RuntimeError as error:
            raise RuntimeError(f"CUDA graphs: the forward pass of {type(model).__name__} could not be recorded: {error}. "
                               f"Leave CUDA graphs out") from error

    def check(self, model: nn.Module, device: torch.device) -> None:
        """ValueError for what cannot be recorded."""
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a GPU of NVIDIA, and the images are on {device}: leave CUDA graphs out, "
                             f"or use the device 'cuda'")
        if model.training:
            raise ValueError(f"CUDA graphs are for prediction, and {type(model).__name__} is in training: call eval()")

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """What does the same as ``run`` with what then is in its inputs, and the outputs it writes to."""
        beside, now = torch.cuda.Stream(), torch.cuda.current_stream()
        beside.wait_stream(now)
        torch.clear_autocast_cache()                # what is in it would not be computed by the graph
        with torch.cuda.stream(beside):             # libraries allocate and choose at their first calls
            run()
        now.wait_stream(beside)
        torch.clear_autocast_cache()
        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run()
        torch.clear_autocast_cache()                # nor may others use what only the graph computes
        return graph.replay, outputs


def hooked(model: nn.Module) -> bool:
    """Whether a part of ``model`` has hooks; those of the model itself are called either way."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in model.modules() if part is not model)


def shape_of(model: nn.Module, samples: NestedTensor) -> tuple[Any, ...]:
    """All that a recorded forward pass depends on besides pixels."""
    images = samples.tensors
    computed_in = torch.get_autocast_dtype(images.device.type) if torch.is_autocast_enabled(images.device.type) else None
    weights = tuple(weight.data_ptr() for weight in (*model.parameters(), *model.buffers()))
    return images.device, images.dtype, images.shape, tuple(map(tuple, samples.sizes)), computed_in, weights


def copied(outputs: Any) -> Any:
    """``outputs`` with tensors of their own. TypeError for what may hold tensors that are not seen here."""
    if isinstance(outputs, Tensor):
        return outputs.clone()
    if isinstance(outputs, Mapping):
        return {name: copied(value) for name, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(map(copied, outputs))
    if outputs is None or isinstance(outputs, (bool, int, float, str)):
        return outputs
    raise TypeError(f"CUDA graphs: outputs hold a {type(outputs).__name__}; tensors, lists, tuples, dicts and numbers "
                    f"can be given back")
