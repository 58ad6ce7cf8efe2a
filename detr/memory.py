"""Memory and time of training: layers computed again instead of kept, layers compiled, the batch size that fits, and what
to say when memory runs out.

Nothing here knows models or data: parts of a model are found by their names (``encoder.layers``, ``decoder.layers``, the
blocks of ``backbone.0.body``), and batches are made by who calls.
"""
from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils.checkpoint import checkpoint

from . import distributed

Settings = Mapping[str, Any]                # flags by name
LAYERS = ("encoder.layers", "decoder.layers")
BODY = "backbone.0.body"
KERNELS = ("MSDeformAttn",)                 # classes with kernels of their own, which a compiler would do without
VARIANTS = 64                               # of a compiled layer, before PyTorch would give up compiling it
GPU_SHARE = 0.9                             # of the memory that is free: fragments take some
FURTHER = 8                                 # images of a third measurement, where at least twice as many seem to fit
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4       # of glibc's malloc.h
CPU_SHARE = 0.8                             # other programs, and workers that read images, need some, too


def keep_freed_memory() -> bool:
    """Let this process keep the memory that large tensors free, for the next ones; whether that is possible (with glibc).
    A step on a CPU otherwise hands gigabytes back to the system and gets them anew, page by page, each set to zero, which
    can be a tenth of its time. The process then stays as large as it ever was."""
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, -1))
    except (OSError, AttributeError, TypeError):
        return False


# Layers computed again, and layers compiled

class Forward:
    """What a module's ``forward`` is replaced by, on this one instance; its class, its parameters' names and its hooks
    stay as they are. A deep copy of the module has one of its own.

    ``recompute``: in training, keep what goes in instead of what is computed on the way, and compute it again in the
    backward pass (Chen et al., 2016, "Training deep nets with sublinear memory cost"), with the same random numbers,
    autocast and function modes (``Exact`` is one). ``call`` is what computes: the class's forward, or what that was
    compiled to.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.recompute, self.call = module, False, type(module).forward

    @classmethod
    def of(cls, module: nn.Module) -> Forward:
        """That of ``module``, which gets one if it has none."""
        if not isinstance(vars(module).get("forward"), cls):
            module.forward = cls(module)                                                    # type: ignore[method-assign]
        return module.forward                                                               # type: ignore[return-value]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.recompute and self.module.training and torch.is_grad_enabled()):
            return self.call(self.module, *args, **kwargs)
        modes = _get_current_function_mode_stack()

        def again(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as inside:
                for mode in modes:
                    inside.enter_context(mode)
                return self.call(self.module, *args, **kwargs)

        with ExitStack() as outside:                # what checkpoint does around the call is no part of the network
            for _ in modes:
                outside.enter_context(_pop_mode_temporarily())
            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)


def checkpoint_activations(model: nn.Module) -> list[str]:
    """Make the layers of encoder and decoder, and the blocks of the backbone that are trained, compute again in the
    backward pass what they would have kept; the names of these parts.

    Gradients stay the same. Hooks inside such a part are called a second time in the backward pass, and have to stay on
    until then. Parts whose normalisation keeps running statistics are left as they are, since these would be updated
    twice; that is said. ValueError where nothing is left.
    """
    found, skipped = [], []
    blocks = [(name, block) for name, block in blocks_of_body(model)
              if any(parameter.requires_grad for parameter in block.parameters())]
    for name, module in [*blocks, *layers_of(model)]:
        if any(isinstance(part, _NormBase) and part.track_running_stats for part in module.modules()):
            skipped.append(name)
        else:
            Forward.of(module).recompute = True
            found.append(name)
    why = f"the running statistics (--backbone_norm batch) of {listed(skipped)} would be updated twice"
    if not found:
        nothing = f"{type(model).__name__} has no encoder.layers, no decoder.layers and no trained blocks in {BODY}"
        raise ValueError(f"--activation_checkpointing: {why if skipped else nothing}; leave the flag out, or use another "
                         f"--backbone_norm or --model")
    if skipped:
        distributed.say(f"--activation_checkpointing leaves out what keeps running statistics: {why}")
    return found


def keep_activations(model: nn.Module) -> None:
    """Undo ``checkpoint_activations``."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Forward):
            Forward.of(module).recompute = False


def compile_model(model: nn.Module, device: torch.device | str = "cpu") -> list[str]:
    """Compile the layers of encoder and decoder for images of all sizes; the names of these parts. All layers of a class
    share what is compiled, at their first call. The rest stays as it is: a backbone's convolutions are a library's
    calls either way, and what exact padding does there depends on each image's size.

    RuntimeError where the machine cannot compile for ``device``, ValueError where there is nothing to compile.
    """
    layers = list(layers_of(model))
    if not layers:
        raise ValueError(f"--compile: {type(model).__name__} has no encoder.layers and no decoder.layers; leave it out")
    import torch._dynamo  # here alone: it takes seconds
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    # A missing compiler shows in as many ways as there are compilers.
    except Exception as error:
        raise RuntimeError(cannot_compile(error)) from error
    torch._dynamo.config.skip_nnmodule_hook_guards = False      # hooks are noticed, whenever they come
    # Variants multiply: training or not, one image or several, padding or none, contents with a gradient or without.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(VARIANTS, getattr(torch._dynamo.config, limit)))
    for _, layer in layers:
        Forward.of(layer).call = compiled(type(layer).forward)
        for part in layer.modules():
            if type(part).__name__ in KERNELS:
                Forward.of(part).call = uncompiled(type(part).forward)
    return [name for name, _ in layers]


@cache
def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A class's ``forward``, compiled for all its modules: layers share code."""
    from torch._dynamo.exc import TorchDynamoException  # here alone: it takes seconds
    fast = torch.compile(forward, dynamic=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return fast(*map(plain, args), **{name: plain(x) for name, x in kwargs.items()})
        except TorchDynamoException as error:
            raise RuntimeError(cannot_compile(error)) from error
    return call


@cache
def uncompiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A class's ``forward``, left as it is within what is compiled."""
    return torch.compiler.disable(forward)


def cannot_compile(error: BaseException) -> str:
    """What to say of the compiler's ``error``."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (f"--compile: PyTorch's compiler failed with {type(error).__name__}: {reason[:300]}. Leave --compile out; or "
            f"install what it needs: a C++ compiler for a CPU, Triton for a GPU")


def plain(x: Any) -> Any:
    """A tensor as its own memory, row by row: views, strides and where they come from would each be compiled anew."""
    if not isinstance(x, Tensor) or x.is_contiguous() and x._base is None:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of encoder and decoder, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith(LAYERS) and BODY not in name:
            for i, layer in enumerate(module):
                yield f"{name}.{i}", layer


def blocks_of_body(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of the backbone, by name."""
    for name, module in model.named_modules():
        if name.endswith(BODY):
            yield from blocks_of(module, name)


def blocks_of(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that stand one after the other in a sequence and are more than a single layer, nor sequences
    themselves: the residual blocks of convolutional networks, the blocks of transformers."""
    in_sequence = isinstance(module, (nn.Sequential, nn.ModuleList))
    for name, child in module.named_children():
        path = f"{prefix}.{name}"
        if in_sequence and not isinstance(child, (nn.Sequential, nn.ModuleList)) and any(True for _ in child.children()):
            yield path, child
        else:
            yield from blocks_of(child, path)


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else ""


# How much memory a step takes, and how much there is

class WorstBatch(NamedTuple):
    """The size of the images of a batch, padding included, and the objects of each."""
    height: int
    width: int
    objects: tuple[int, ...]


def worst_batch(sizes: Sequence[tuple[int, int]], objects: Sequence[int], batch_size: int,
                alike: bool = False) -> WorstBatch:
    """The batch of ``batch_size`` images that needs most memory.

    ``sizes`` are (height, width) as training feeds images to the model, of as many images and draws as there may be;
    ``objects`` the number of objects of each image. A wide and a tall image in one batch are padded to the width of the
    one and the height of the other, so that it may be larger than any image; with ``alike`` (``--bucket_train``) images
    of a like shape come together.
    """
    if not sizes or not objects or batch_size < 1:
        raise ValueError(f"the worst batch of {batch_size} images among {len(sizes)} sizes and {len(objects)} numbers of "
                         f"objects: at least one of each is needed; does --data have images?")
    if batch_size == 1:
        height, width = max(sizes, key=lambda size: (size[0] * size[1], size))
    elif alike:
        order = sorted(sizes, key=lambda size: (size[0] / size[1], size))
        windows = (order[i:i + batch_size] for i in range(max(len(order) - batch_size, 0) + 1))
        height, width = max(((max(h for h, _ in some), max(w for _, w in some)) for some in windows),
                            key=lambda size: size[0] * size[1])
    else:
        height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    most = sorted(objects, reverse=True)[:batch_size]
    return WorstBatch(height, width, tuple(most + most[-1:] * (batch_size - len(most))))


class Measure(NamedTuple):
    """What a step takes, in bytes: ``base`` whatever the batch, ``per_image`` for each image; and how much there is."""
    base: int
    per_image: int
    limit: int

    def of(self, images: int) -> int:
        """The peak of a step of so many images."""
        return self.base + images * self.per_image

    @property
    def largest(self) -> int:
        """Images that fit; 0 where not even one does."""
        return max(int((self.limit - self.base) // max(self.per_image, 1)), 0)


def probe(step: Callable[[int], Any], device: torch.device | str, limit: int | None = None, most: int = 2) -> Measure:
    """What ``step(b)``, a whole training step of the worst batch of ``b`` images, takes on ``device``; with no ``limit``
    in bytes given, what there is. ``most`` images at a time: 1 where there are no more."""
    device = torch.device(device)
    if limit is None:
        limit = memory_limit(device)
    step(1)                                             # libraries, kernels and the optimizer's state come with the first
    before = used_memory(device)
    first = second = peak_memory(lambda: step(1), device)
    if most > 1:
        try:
            second = peak_memory(lambda: step(2), device)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            second = max(limit, first) + 1              # two do not fit
    # Where the two differ by nothing, what can be measured is coarser than an image, which then is at most the whole.
    per_image = second - first if second > first else max(first - before, 1)
    measure = Measure(first - per_image, per_image, limit)
    if min(measure.largest, most) >= 2 * FURTHER:       # small images need more of them for a good estimate
        per_image = max((peak_memory(lambda: step(FURTHER), device) - first) // (FURTHER - 1), 1)
        measure = Measure(first - per_image, per_image, limit)
    return measure


def auto_batch_size(step: Callable[[int], Any], model: nn.Module, optimizer: torch.optim.Optimizer,
                    device: torch.device | str, images: int, global_batch_size: int = 0,
                    limit: int | None = None) -> tuple[int, str]:
    """The largest number of images per process whose worst batch fits, and a line that says how that was found.

    ``step(b)`` runs forward, backward and the optimizer's step on a batch of ``b`` such images, without waiting for other
    processes; model, optimizer and random numbers are afterwards as they were. At most ``images``, the training images
    of this process; with ``global_batch_size``, a divisor of this process's share of it. On a GPU the batch is tried
    before it is taken. All processes get the smallest number among them. RuntimeError where not even one image fits.
    """
    device, world = torch.device(device), distributed.world_size()
    share = max(global_batch_size // world, 1) if global_batch_size else 0
    allowed = [b for b in range(1, max(min(images, share or images), 1) + 1) if not share or share % b == 0]
    tried = device.type == "cuda"
    with untouched(model, optimizer, device):
        measure = probe(step, device, limit, most=allowed[-1])
        fitting = [b for b in allowed if b <= measure.largest]
        while tried and fitting and fitting[-1] > 2 and not fits(lambda: step(fitting[-1]), device, measure.limit):
            del fitting[len(fitting) * 9 // 10:]
    found = min(distributed.gather_objects(fitting[-1] if fitting else 0))
    found = max((b for b in allowed if b <= found), default=0)
    facts = (f"{gigabytes(measure.of(max(found, 1)))} of {gigabytes(measure.limit)} ({gigabytes(measure.per_image)} an "
             f"image)")
    if not found:
        raise RuntimeError(f"--auto_batch_size: not even one image fits: a step of this data's worst one takes {facts}; "
                           f"use --activation_checkpointing, --amp bf16 or smaller images (--image_size, --max_size)")
    why = "all images of a process" if found == images else \
        f"the largest divisor of {share} that fits" if share and found < share else \
        f"this process's share of --global_batch_size {global_batch_size}" if share else "the most that fits"
    return found, (f"--auto_batch_size: {found} images per process, {why}; the worst batch of this data takes {facts}, "
                   f"{'tried' if tried else 'estimated from small batches'}")


def fits(call: Callable[[], Any], device: torch.device, limit: int) -> bool:
    """Whether ``call`` stays below ``limit`` bytes."""
    try:
        return peak_memory(call, device) <= limit
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    return False


@contextmanager
def untouched(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[None]:
    """Whatever happens inside, parameters, buffers, gradients, the optimizer and random numbers are as before after it.
    Copies are kept in the memory of the CPU."""
    parameters = list(model.parameters())
    states = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    tensors = [*parameters, *model.buffers(),
               *(x for state in states.values() for x in state.values() if isinstance(x, Tensor))]
    saved = [(x, x.detach().to("cpu", copy=True)) for x in tensors]
    gradients = [parameter.grad for parameter in parameters]
    modes = [(module, module.training) for module in model.modules()]
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for x, before in saved:
                x.copy_(before)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        optimizer.state.clear()
        optimizer.state.update(states)
        for group, options in zip(optimizer.param_groups, groups):
            group.update(options)
        for module, training in modes:
            module.training = training
        if device.type == "cuda":
            torch.cuda.empty_cache()


def peak_memory(call: Callable[[], Any], device: torch.device | str) -> int:
    """The most bytes that are in use during ``call``: of CUDA's allocator, or of this process's resident memory."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    used_memory(device)                                 # what was freed before belongs to no call
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:                                     # no Linux: the most since the process began
        call()
        return used_memory(device)
    call()
    return status("VmHWM")


def used_memory(device: torch.device | str) -> int:
    """Bytes in use now. Where a CPU's are not known, the most that were since the process began."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    measurable(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)                # what was freed is not in use (glibc)
    except (OSError, AttributeError, TypeError):
        pass
    try:
        return status("VmRSS")
    except OSError:
        import resource  # here alone: Windows, which ``measurable`` refuses, has none
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_limit(device: torch.device | str) -> int:
    """Bytes that this process may use on ``device``, with some left for others."""
    device = torch.device(device)
    if device.type == "cuda":
        return int((torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) * GPU_SHARE)
    measurable(device)
    try:
        free = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()
                    if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * CPU_SHARE)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))                   # processes that share this machine
    return used_memory(device) + int(min([free, *cgroup_room()]) * CPU_SHARE / here)


def measurable(device: torch.device) -> None:
    """ValueError where memory cannot be measured."""
    if device.type != "cpu" or sys.platform == "win32":
        where = "on Windows" if device.type == "cpu" else f"of {device}"
        raise ValueError(f"memory {where} cannot be measured: give --batch_size in place of --auto_batch_size")


def cgroup_room(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that the containers around this process (control groups, version 1 or 2) leave it; none where none says."""
    room = []
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, path in groups:
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file ")
        elif controllers == "memory":
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
        else:
            continue
        here = top / path.lstrip("/")
        for folder in {top, *(one for one in (here, *here.parents) if one.is_relative_to(top))}:
            try:
                limit, used = ((folder / name).read_text().strip() for name in names[:2])
                files = [int(line.split()[1]) for line in (folder / "memory.stat").read_text().splitlines()
                         if line.startswith(names[2])]          # copies of files, which make way
            except OSError:
                continue
            if limit != "max":
                room.append(max(int(limit) - int(used) + sum(files), 0))
    return room


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(field + ":"))


def gigabytes(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB"


# When it did not fit

SAID = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory",
        "cublas_status_alloc_failed")


def out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error``, or what caused it, is memory that ran out, of a GPU or of the machine."""
    if error is None:
        return False
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or \
        isinstance(error, RuntimeError) and any(said in str(error).lower() for said in SAID) or \
        out_of_memory(error.__cause__)


class Remedy(NamedTuple):
    """Flags that need less memory, and what they cost."""
    flags: dict[str, Any]
    cost: str


def remedies(settings: Settings, world_size: int = 1) -> list[Remedy]:
    """What would need less memory than ``settings`` (flags by name), the least harmful first."""
    found = []
    batch = settings["batch_size"]
    total = settings.get("global_batch_size") or batch * world_size
    share = max(total // world_size, 1)
    smaller = [b for b in range(batch - 1, 0, -1) if share % b == 0]
    for b in smaller:
        cost = f"the same {total} images per optimizer step, in {share // b} parts"
        if settings.get("backbone_norm") == "batch":
            cost += f"; batch norms see {b} images at a time"
        found.append(Remedy({"batch_size": b, "global_batch_size": total}, cost))
    if not settings.get("activation_checkpointing"):
        found.append(Remedy({"activation_checkpointing": True}, "the same gradients, a quarter more time"))
    if settings.get("amp") == "off":
        found.append(Remedy({"amp": "bf16"}, "the model's forward pass in bfloat16, losses in float32"))
    if settings.get("bucket_train") is False and batch > 1:
        found.append(Remedy({"bucket_train": True}, "images alike in shape share batches, which leaves less padding"))
    for flags in smaller_images(settings):
        found.append(Remedy(flags, "smaller images; small objects are found less well"))
    return found


def smaller_images(settings: Settings) -> Iterator[dict[str, Any]]:
    """Flags for images of three quarters and of half the side."""
    sides = [int(side) for side in str(settings.get("image_size", "")).split("x") if side]
    for part in (0.75, 0.5):
        flags: dict[str, Any] = {}
        if sides:
            flags["image_size"] = "x".join(str(max(int(side * part), 32)) for side in sides)
        if len(sides) < 2 and settings.get("max_size"):
            flags["max_size"] = max(int(settings["max_size"] * part), 32)
        if flags:
            yield flags


def advice(shape: Sequence[int], objects: int, settings: Settings, *, where: str = "", used: int | None = None,
           limit: int | None = None, measure: Measure | None = None, world_size: int = 1,
           fits: Callable[[dict[str, Any]], bool] | None = None) -> str:
    """What to say when memory ran out: what was being done, and the flags that need less, the least harmful first.

    ``shape`` of the batch ``[B, C, H, W]`` and its number of ``objects``; ``settings``, flags by name; ``where``: epoch
    and step; bytes ``used`` and the ``limit``; ``measure``: what a step takes, where that was measured. ``fits(flags)``
    tries whether a step with these flags instead of the settings' goes through: only such flags are then named, several
    together where none is enough.
    """
    memory = "".join([f", {gigabytes(used)} in use" if used is not None else "",
                      f" of {gigabytes(limit)}" if limit is not None else ""])
    lines = [f"out of memory{f' at {where}' if where else ''}: a batch {list(shape)} with {objects} objects{memory}."]
    options = remedies(settings, world_size)
    if fits is None:
        # Of several batch sizes, the largest that is known to fit, or half.
        batches = [r for r in options if "batch_size" in r.flags]
        known = [r for r in batches if measure is not None and r.flags["batch_size"] <= measure.largest]
        half = [r for r in batches if r.flags["batch_size"] <= settings["batch_size"] / 2]
        chosen, options = (known or half or batches)[:1], [r for r in options if "batch_size" not in r.flags]
        options = chosen + options
        lines[0] += " Each of these needs less, the least harmful first:"
    else:
        options = tried(options, fits)
        lines[0] += " With each of these the largest batch of this data fits, tried, the least harmful first:" \
            if options else \
            " None of the flags that need less is enough, nor all of them together: use a smaller --model or --backbone."
    for flags, cost in options:
        typed = " ".join(f"--{name}" + ("" if value is True else f" {value}") for name, value in flags.items())
        estimate = ""
        if measure is not None and set(flags) <= {"batch_size", "global_batch_size"}:
            estimate = f"; about {gigabytes(measure.of(flags['batch_size']))}"
        lines.append(f"  {typed}: {cost}{estimate}")
    return "\n".join(lines)


def tried(options: Sequence[Remedy], fits: Callable[[dict[str, Any]], bool]) -> list[Remedy]:
    """The ``options`` that fit, of batch sizes and of image sizes the largest alone; where none does, the fewest of
    them, from the first on, that fit together."""
    found: list[Remedy] = []
    for remedy in options:
        if not any(set(remedy.flags) == set(other.flags) for other in found) and fits(remedy.flags):
            found.append(remedy)
    if found:
        return found
    flags: dict[str, Any] = {}
    costs: dict[frozenset[str], str] = {}
    for remedy in options:
        flags |= remedy.flags
        costs[frozenset(remedy.flags)] = remedy.cost
        if len(costs) > 1 and fits(dict(flags)):
            return [Remedy(flags, "; ".join(costs.values()))]
    return []
