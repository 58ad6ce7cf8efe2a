"""When training goes wrong: where the first value that is no number came from, and a file that shows it again.

``blame`` computes a failed step again and watches every module; ``save_repro`` keeps all that it needs, for
``scripts/replay.py``. Neither changes the model.
"""
from __future__ import annotations

import random
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from . import checkpoint, distributed
from .nested_tensor import NestedTensor, as_nested_tensor
from .precision import autocast
from .structures import NonFiniteError, Outputs, Target

NOT_FOUND = "not found again in a second computation"
SHOWN = 5                       # names in a message before it counts the others


# -- who is to blame --------------------------------------------------------------------------------------------------

def blame(model: nn.Module, criterion: Any, samples: NestedTensor | Tensor | Sequence[Tensor], targets: Sequence[Target],
          *, amp: str = "off", takes_targets: bool = False, random_state: Mapping[str, Any] | None = None,
          backward: bool = True, scale: float = 1.0) -> str:
    """The first cause of a loss or gradient that is no number, in words: images, target boxes, parameters and buffers are
    looked at in this order, and then the step is computed again, forward and, with ``backward``, backward.

    ``model`` is the module itself, not what DistributedDataParallel made of it, in the mode that it trains in;
    ``random_state`` is what ``random_states()`` gave before the step's forward pass, ``amp`` its precision ("off", "bf16"
    or "fp16") and ``scale`` what its loss was multiplied with before the backward pass. Nothing is waited for from other
    processes, so one alone may call it. Weights, their ``.grad``, buffers and random states are afterwards as before.

    Where everything is finite this time, the text begins with ``NOT_FOUND``.
    """
    images = as_nested_tensor(samples if isinstance(samples, (NestedTensor, Tensor)) else list(samples))
    said = _bad_images(images, targets) or _bad_boxes(targets) or _bad_weights(model)
    if said is None:
        with _left_alone(model, criterion, random_state), torch.set_grad_enabled(backward):
            try:
                said = _computed_again(model, criterion, images, targets, amp, takes_targets, backward, scale)
            except torch.cuda.OutOfMemoryError:
                said = f"{NOT_FOUND}: there was not enough memory for it; scripts/replay.py has it to itself"
    return said + _poisoned_statistics(model)


def _name(targets: Sequence[Target], i: int) -> str:
    """Image ``i`` of a batch."""
    known = i < len(targets) and "image_id" in targets[i]
    return f"image {i} of the batch" + (f" (image_id {int(targets[i]['image_id'])})" if known else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _finite(x: Tensor) -> bool:
    x = x.detach()                          # so that nothing is kept for a backward pass, which recomputing would miss
    return not x.is_floating_point() or bool(x.isfinite().all())


def _count(x: Tensor) -> str:
    """``3 of 12 values (1 nan, 2 inf)``."""
    x = x.detach()
    nans, infinite = int(x.isnan().sum()), int(x.isinf().sum())
    kinds = [f"{number} {kind}" for number, kind in ((nans, "nan"), (infinite, "inf")) if number]
    return f"{nans + infinite} of {x.numel()} values ({', '.join(kinds)})"


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest finite magnitude."""
    return max((float(torch.where(x.isfinite(), x, 0).abs().max()) for x in (t.detach() for t in tensors)
                if x.is_floating_point() and x.numel()), default=0.0)


def _bad_images(images: NestedTensor, targets: Sequence[Target]) -> str | None:
    found = [f"{_name(targets, i)}: {_count(image)}" for i, image in enumerate(images.tensors) if not _finite(image)]
    return found and (f"the input has values that are no numbers: {_some(found)}. Look at these images' files and at how "
                      f"they are prepared") or None


def _bad_boxes(targets: Sequence[Target]) -> str | None:
    found = []
    for i, target in enumerate(targets):
        for field in ("boxes", "ignore"):
            if field in target and not _finite(target[field]):
                boxes = target[field]
                rows = (~boxes.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
                values = ", ".join(f"row {row} {boxes[row].tolist()}" for row in rows[:SHOWN])
                more = f" and {len(rows) - SHOWN} more rows" if len(rows) > SHOWN else ""
                found.append(f"targets[{i}][{field!r}] of {_name(targets, i)}: {values}{more}")
    return found and (f"the ground truth has boxes that are no numbers: {_some(found)}. Correct these annotations, or "
                      f"what turns them into targets") or None


def _averaged(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm that computes by the batch and keeps averages for later alone."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training


def _bad_weights(model: nn.Module) -> str | None:
    """Parameters, and buffers that take part: averages that a failed step has spoilt come after the cause, and minus
    infinity is what masks are made of."""
    found = [f"{name} {list(p.shape)}: {_count(p)}" for name, p in model.named_parameters() if not _finite(p)]
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            masked = buffer == -torch.inf if buffer.is_floating_point() else None
            if masked is not None and not _averaged(module) and not _finite(buffer.masked_fill(masked, 0)):
                found.append(f"buffer {name} {list(buffer.shape)}: {_count(buffer)}")
    return found and (f"the model had values that are no numbers before this step, in {len(found)} of its tensors: "
                      f"{_some(found)}. Go on from an earlier checkpoint") or None


def _poisoned_statistics(model: nn.Module) -> str:
    found = [f"{prefix}.{name}" for prefix, module in model.named_modules() if _averaged(module)
             for name, buffer in module.named_buffers(recurse=False) if not _finite(buffer)]
    return found and (f"\nIn consequence {len(found)} averages of batch norms are no numbers any more ({_some(found)}), "
                      f"and evaluation would use them: go on from the last checkpoint") or ""


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers of ``model``. A step that is left out has changed them: averages of batch norms hold what was
    no number from then on, unless they are put back."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@torch.no_grad()
def put_back_buffers(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Undo what happened to the buffers since ``kept_buffers`` copied them."""
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])


@contextmanager
def _left_alone(model: nn.Module, criterion: Any, random_state: Mapping[str, Any] | None) -> Iterator[None]:
    """Whatever is computed inside leaves no trace in buffers and random states, and waits for no other process."""
    before, buffers = random_states(), kept_buffers(model)
    modes = [(module, module.training) for module in criterion.modules()]
    if random_state is not None:
        set_random_states(random_state)
    criterion.eval()                        # in training it counts the objects of all processes
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        put_back_buffers(model, buffers)
        set_random_states(before)


def _computed_again(model: nn.Module, criterion: Any, images: NestedTensor, targets: Sequence[Target], amp: str,
                    takes_targets: bool, backward: bool, scale: float) -> str:
    """What a second computation of the step shows."""
    watch = Watch(model, targets, len(images), gradients=backward)
    try:
        with torch.compiler.set_stance("force_eager"), watch, autocast(images.tensors.device, amp):
            outputs = model(images, targets) if takes_targets else model(images)
    except NonFiniteError as error:                                             # of a model that matches by itself
        return watch.first() or f"{error}, though the output of every module was finite so far"
    bad = [(path, x) for path, x in tensors_in(outputs) if not _finite(x)]
    affected = sorted({i for _, x in bad for i in images_of(x, len(images)) or ()})
    try:
        losses = criterion(outputs, targets)
    except NonFiniteError as error:
        return watch.first(affected) or f"{error}. {_magnitudes(outputs, targets)}"
    wrong = [f"{name} = {value.item()}" for name, value in losses.items() if not _finite(value)]
    if bad or wrong:
        if (said := watch.first(affected)) is not None:
            return said
        if bad:
            path, x = bad[0]
            return f"the model's output {path} is not finite, and none of its modules made it so: {_count(x)}"
        return (f"the model's output is finite, and of the losses the first that is not is {wrong[0]} ({len(wrong)} of "
                f"{len(losses)}). {_magnitudes(outputs, targets)}")
    said = _backward(model, criterion, watch, outputs, losses, targets, len(images), scale) if backward else None
    passed = watch.first(affected)
    hint = f". In passing, without effect on the outputs: {passed}" if passed else ""
    return (said or f"{NOT_FOUND}: images, boxes, weights, outputs, losses{' and gradients' * backward} are all finite. "
            f"What does not repeat depends on the order of parallel sums, or on the machine") + hint


def _magnitudes(outputs: Outputs, targets: Sequence[Target]) -> str:
    predicted = ", ".join(f"{name} {_largest([outputs[name]]):.3g}" for name in ("pred_logits", "pred_boxes")
                          if name in outputs)
    true = _largest([target["boxes"] for target in targets if "boxes" in target])
    return f"Largest magnitudes: {predicted}, boxes of the ground truth {true:.3g}"


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in nested dicts, tuples, lists and padded batches, and where they are:
    ``aux_outputs[0].pred_boxes``."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value
    elif isinstance(value, NestedTensor):
        yield from tensors_in(value.tensors, f"{path}.tensors".lstrip("."))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None)
        for i, item in enumerate(value):
            yield from tensors_in(item, f"{path}.{names[i]}".lstrip(".") if names else f"{path}[{i}]")


def images_of(x: Tensor, batch: int) -> list[int] | None:
    """The images of a batch whose part of ``x`` is not finite, where ``x`` is ``[B, ...]`` or, with the decoder's layers
    before it, ``[K, B, ...]``; None where its shape does not tell."""
    dims = [d for d in range(2) if x.ndim > d + 1 and x.shape[d] == batch]
    if batch > 1 and len(dims) != 1:
        return None
    return [0] if batch == 1 else (~x.isfinite()).movedim(dims[0], 0).flatten(1).any(1).nonzero().flatten().tolist()


class Watch:
    """Watches the modules of ``model`` compute, while it is entered: which was the first whose output is not finite while
    its inputs are. With ``gradients``, also how the gradient comes back to their outputs.

    The hooks are of all modules together, and not of each, since attention computes its weights where it has hooks of its
    own. A module that has some gets one more, since they may change its output after the common ones have run.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target], batch: int, gradients: bool = False) -> None:
        self.targets, self.batch, self.gradients = targets, batch, gradients
        self.names: dict[nn.Module, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if module not in self.names or name.count(".") < self.names[module].count("."):     # the shortest of several
                self.names[module] = name
        self.calls: Counter[nn.Module] = Counter()
        self.found: tuple[str, list[int] | None, str] | None = None             # what, which images, the rest
        self.followed: dict[int, weakref.ref[Tensor]] = {}                      # tensors whose gradient is noted
        self.reached: list[str] = []                                            # with finite gradients, newest last
        self.gradient: str | None = None                                        # the first that was not

    def __enter__(self) -> Watch:
        self.handles = [register_module_forward_hook(self.see, with_kwargs=True)]
        self.handles += [module.register_forward_hook(self.see_again, with_kwargs=True)
                         for module in self.names if module._forward_hooks]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module in self.names:
            self.calls[module] += 1
            self.see_again(module, args, kwargs, output)

    def see_again(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for path, x in tensors_in(output):
            if self.gradients and x.requires_grad:
                self.follow(x, f"the output{path and f' {path}'} {list(x.shape)} of {self.title(module)}")
            if self.found is None and not _finite(x):
                inputs = [given for _, given in tensors_in((args, kwargs))]
                if all(map(_finite, inputs)):
                    self.found = self.describe(module, path, x, inputs)

    def title(self, module: nn.Module) -> str:
        """Name, class and, of a module that is called more than once, which call."""
        calls = f", call {self.calls[module]}" if self.calls[module] > 1 else ""
        return f"{self.names[module] or 'the model itself'} ({type(module).__name__}{calls})"

    def describe(self, module: nn.Module, path: str, x: Tensor,
                 inputs: Sequence[Tensor]) -> tuple[str, list[int] | None, str]:
        """The module and its output, the images in it, and magnitudes."""
        kind = str(x.dtype).removeprefix("torch.")
        weights = list(module.parameters(recurse=False))
        largest = f", of its weights {_largest(weights):.3g}" if weights else ""
        limit = f"; {kind} ends at {torch.finfo(x.dtype).max:.3g}" if bool(x.isinf().any()) else ""
        return (f"{self.title(module)} is the first module whose output is not finite while its inputs are: "
                f"output{path and f' {path}'} {list(x.shape)} {kind}, {_count(x)}", images_of(x, self.batch),
                f". Largest finite magnitude of its inputs {_largest(inputs):.3g}{largest}{limit}")

    def first(self, affected: Sequence[int] = ()) -> str | None:
        """What was seen, of the images that the tensor tells or else ``affected``; None where all was finite."""
        if self.found is None:
            return None
        what, images, rest = self.found
        names = [_name(self.targets, i) for i in (affected if images is None else images)]
        whose = "of" if images is not None else "reaching the predictions of"
        return what + (f", {whose} {_some(names)}" if names else "") + rest

    def follow(self, x: Tensor, what: str) -> None:
        """Note, in the backward pass, whether the gradient of ``x`` is finite."""
        known = self.followed.get(id(x))
        if known is not None and known() is x:                  # the output of a part, too, which says more
            return

        def see(gradient: Tensor) -> None:
            if self.gradient is None:
                if _finite(gradient):
                    self.reached.append(what)
                else:
                    before = f", and was finite last at {self.reached[-1]}" if self.reached else ""
                    self.gradient = f"the gradient is not finite from {what} on: {_count(gradient)}{before}"
        self.followed[id(x)] = weakref.ref(x)
        x.register_hook(see)


def _backward(model: nn.Module, criterion: Any, watch: Watch, outputs: Outputs, losses: Mapping[str, Tensor],
              targets: Sequence[Target], batch: int, scale: float) -> str | None:
    """The first gradient that is not finite, from the losses back: that of a single loss by the outputs, or one inside
    the model. ``.grad`` is not touched, and no hook of DistributedDataParallel runs."""
    scaled = f", of a loss times {scale:g}" if scale != 1 else ""
    predictions = [(path, x) for path, x in tensors_in(outputs) if x.requires_grad]
    for name, weight in criterion.weight_dict.items():
        if name in losses and losses[name].requires_grad and predictions:
            gradients = torch.autograd.grad(losses[name] * (weight * scale), [x for _, x in predictions],
                                            retain_graph=True, allow_unused=True)
            for (path, _), gradient in zip(predictions, gradients):
                if gradient is not None and not _finite(gradient):
                    images = _some([_name(targets, i) for i in images_of(gradient, batch) or ()])
                    return (f"the losses are finite, but not the gradient of {name} with respect to {path} "
                            f"{list(gradient.shape)}: {_count(gradient)}{', of ' * bool(images)}{images}{scaled}. "
                            f"{_magnitudes(outputs, targets)}")
    watch.gradient, watch.reached = None, []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = criterion.weighted_sum(losses) * scale
    if not trained or not total.requires_grad:
        return None
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    wrong = [f"{name}: {_count(gradient)}" for name, gradient in zip(trained, gradients)
             if gradient is not None and not _finite(gradient)]
    if not wrong and watch.gradient is None:
        norm = torch.stack([g.detach().float().norm() for g in gradients if g is not None]).norm()
        return None if _finite(norm) else (f"every gradient is finite, but not their norm: the largest magnitude is "
                                           f"{_largest([g for g in gradients if g is not None]):.3g}{scaled}")
    where = watch.gradient or "the outputs of all modules have finite gradients, but not all parameters"
    return (f"the losses are finite, but not the backward pass{scaled}: {where}. Parameters whose gradient is not "
            f"finite: {len(wrong)} of {len(trained)}{': ' * bool(wrong)}{_some(wrong)}")


# -- the same step again ----------------------------------------------------------------------------------------------

def random_states() -> dict[str, Any]:
    """The states of this process's random generators: PyTorch's on the CPU and on the current GPU, Python's and NumPy's;
    tensors, numbers and None alone, as ``checkpoint.save`` takes them."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": torch.tensor(words, dtype=torch.int64),
                              "python_version": version, "python_gauss": gauss}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    try:
        import numpy as np  # here alone: the rest of this file needs PyTorch only
    except ImportError:
        return states
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states["numpy"] = torch.tensor(keys.tolist(), dtype=torch.int64)
    return states | {"numpy_position": int(position), "numpy_has_gauss": int(has_gauss), "numpy_gauss": float(cached)}


def set_random_states(states: Mapping[str, Any]) -> None:
    """Go on from what ``random_states`` gave. A GPU's state where there is no GPU is left out, and said."""
    torch.set_rng_state(states["torch"].cpu())
    random.setstate((states["python_version"], tuple(states["python"].tolist()), states["python_gauss"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    elif "cuda" in states:
        distributed.say("random states: the GPU's is left out, since there is no GPU here")
    if "numpy" in states:
        import numpy as np
        np.random.set_state(("MT19937", np.array(states["numpy"].tolist(), dtype=np.uint32), states["numpy_position"],
                             states["numpy_has_gauss"], states["numpy_gauss"]))


def save_repro(path: Any, *, model: nn.Module, criterion_settings: Mapping[str, Any],
               samples: NestedTensor | Tensor | Sequence[Tensor], targets: Sequence[Target],
               random_state: Mapping[str, Any] | None, where: Mapping[str, Any]) -> None:
    """Write what ``scripts/replay.py`` needs to compute a failed step again, before the optimizer has changed a weight:
    the model's weights and modes, the batch, the random state.

    ``criterion_settings`` build model and criterion: what ``Settings.as_dict()`` gives, ``num_classes``, and
    ``class_weights``, a list, where there are some. ``where`` is what else is known: ``amp`` and ``scale`` are used
    again; ``report``, what ``blame`` said, ``history``, that of ``StepHistory``, and the rest are printed. Raises what
    ``checkpoint.save`` does.
    """
    images = as_nested_tensor(samples if isinstance(samples, (NestedTensor, Tensor)) else list(samples))
    checkpoint.save(path, {
        "model": model.state_dict(), "config": dict(criterion_settings), "images": images.tensors, "mask": images.mask,
        "sizes": images.sizes, "targets": [dict(target) for target in targets],
        "random_state": None if random_state is None else dict(random_state),
        "training": model.training, "takes_targets": model.training and bool(getattr(model, "takes_targets", False)),
        "evaluating": [name for name, module in model.named_modules() if not module.training],
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "where": dict(where)})


def replay(content: Mapping[str, Any], model: nn.Module, criterion: Any, device: torch.device) -> str:
    """What ``blame`` says of the step in a file that ``save_repro`` wrote: ``content`` is what was read, with its weights
    in ``model`` already."""
    for name, module in model.named_modules():
        module.training = name not in content["evaluating"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in content["frozen"])
    samples = NestedTensor(content["images"], content["mask"], content["sizes"]).to(device)
    targets: Any = [{name: value.to(device) for name, value in target.items()} for target in content["targets"]]
    where = content["where"]
    return blame(model.to(device), criterion.to(device), samples, targets, amp=where.get("amp", "off"),
                 takes_targets=content["takes_targets"], random_state=content["random_state"],
                 backward=content["training"], scale=where.get("scale", 1.0))


class StepHistory:
    """The last steps of a training, for the message when it stops."""

    def __init__(self, length: int = 50) -> None:
        self.rows: deque[tuple[int, int, float, float, float]] = deque(maxlen=length)

    def add(self, epoch: int, step: int, loss: float, grad_norm: float, lr: float) -> None:
        self.rows.append((int(epoch), int(step), float(loss), float(grad_norm), float(lr)))

    def text(self, last: int = 10) -> str:
        """A table of the ``last`` steps, newest at the bottom."""
        lines = [f"{'epoch':>6}{'step':>7}{'loss':>12}{'grad_norm':>12}{'lr':>11}"]
        return "\n".join(lines + [f"{epoch:>6}{step:>7}{loss:>12.4g}{norm:>12.4g}{lr:>11.3g}"
                                  for epoch, step, loss, norm, lr in list(self.rows)[-last:]])

    def state_dict(self) -> dict[str, Any]:
        return {"rows": list(self.rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = deque((tuple(row) for row in state["rows"]), maxlen=self.rows.maxlen)


class Skips:
    """Whether a step with a value that is no number may be left out: with the policy "skip", ``at_most`` so often."""

    def __init__(self, policy: str, at_most: int) -> None:
        if policy not in ("stop", "skip"):
            raise ValueError(f"--non_finite {policy}: use stop or skip")
        self.policy, self.at_most, self.count = policy, at_most, 0

    def allow(self) -> bool:
        """Whether this step may be left out; where it may, it is counted."""
        if self.policy == "stop" or self.count >= self.at_most:
            return False
        self.count += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]
