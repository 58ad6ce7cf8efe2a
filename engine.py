"""Two loops, written out: ``train_one_epoch`` and ``evaluate``."""
from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from detr import distributed
from detr.nested_tensor import NestedTensor
from detr.structures import NonFiniteError, Outputs, Target

Item = TypeVar("Item")
Batch = tuple[NestedTensor, list[Target]]


class Evaluator(Protocol):
    """What scores predictions of a ``kind``, boxes (and masks) or panoptic maps; ``evaluate`` knows no more of it."""
    kind: str

    def update(self, predictions: dict[int, Any]) -> None: ...

    def summarize(self) -> dict[str, Any]: ...


class Progress:
    """Tells how a pass over batches goes: a line every ``every`` seconds, and averages at its end.

    ``title`` begins each line; ``remaining_passes`` more passes of this length are counted into the time left.
    """

    def __init__(self, title: str, every: float = 10.0, remaining_passes: int = 0) -> None:
        self.title, self.every, self.remaining_passes = title, every, remaining_passes
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.images, self.waited = 0, 0.0

    def update(self, values: Mapping[str, float], images: int) -> None:
        """Count a finished batch of ``images`` images and its ``values``."""
        self.images += images
        for name, value in values.items():
            self.sums[name] += value
            self.counts[name] += 1

    def averages(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def averages_over_processes(self) -> dict[str, float]:
        """The averages over the batches of all processes, which may have different numbers of them."""
        merged = Progress(self.title)
        for sums, counts in distributed.gather_objects((dict(self.sums), dict(self.counts))):
            for name, total in sums.items():
                merged.sums[name] += total
                merged.counts[name] += counts[name]
        return merged.averages()

    def over(self, batches: Iterable[Item], length: int, shown: Sequence[str]) -> Iterator[Item]:
        """The batches, with a line about the averages named in ``shown`` from time to time. The time that the loop
        waits for data is measured."""
        start = last = time.perf_counter()
        iterator = iter(batches)
        for step in range(1, length + 1):
            before = time.perf_counter()
            batch = next(iterator)
            self.waited += time.perf_counter() - before
            yield batch
            now = time.perf_counter()
            if now - last >= self.every or step == length:
                last = now
                self.line(step, length, now - start, shown)

    def line(self, step: int, length: int, seconds: float, shown: Sequence[str]) -> None:
        if not distributed.is_main():
            return
        left = seconds / step * (length - step + self.remaining_passes * length)
        averages = self.averages()
        values = "  ".join(f"{name} {averages[name]:.4g}" for name in shown if name in averages)
        print(f"{self.title} {step:>{len(str(length))}}/{length}  {values}  "
              f"{self.images * distributed.world_size() / seconds:.1f} images/s  data {self.waited / seconds:.0%}  "
              f"{duration(seconds)}, {duration(left)} left", flush=True)


def duration(seconds: float) -> str:
    """``h:mm:ss``, without the hours where there are none."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def image_ids(targets: Sequence[Target]) -> list[int]:
    """The data's ids of the images of a batch; their places in it where targets have none."""
    return [int(target.get("image_id", place)) for place, target in enumerate(targets)]


def to_device(samples: NestedTensor, targets: Sequence[Target], device: torch.device) -> Batch:
    """A batch, and all tensors of its targets, on ``device``."""
    return (samples.to(device, non_blocking=True),
            [{name: value.to(device, non_blocking=True) for name, value in target.items()} for target in targets])


def readings(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, float]:
    """Losses as numbers under the names of the published logs: ``loss``, their weighted sum; weighted under their own
    names; as they are with ``_unscaled`` after the name, and those without a weight under their own name too."""
    plain = dict(zip(losses, torch.stack([value.detach().float() for value in losses.values()]).tolist()))
    weighted = {name: value * weights[name] for name, value in plain.items() if name in weights}
    return {"loss": sum(weighted.values()), **plain, **weighted,
            **{f"{name}_unscaled": value for name, value in plain.items()}}


def check_finite(losses: Mapping[str, float], ids: Sequence[int], where: str) -> None:
    """Raise a ``NonFiniteError`` that names the losses that are no numbers, the images and the step."""
    bad = [f"{name} = {value}" for name, value in losses.items()
           if not math.isfinite(value) and not name.endswith("_unscaled")]
    if bad:
        others = " (of this process; the losses are means over all)" if distributed.is_distributed() else ""
        raise NonFiniteError(f"{', '.join(bad)} at {where}, images {list(ids)}{others}: stopped, and the last checkpoint "
                             f"is unharmed. Try a lower --lr, or look at these images' annotations")


def post_process(postprocessors: Mapping[str, nn.Module], outputs: Outputs,
                 targets: Sequence[Target]) -> dict[str, list[Any]]:
    """What a model says of the images of ``targets``, in their own pixels, on the CPU: ``bbox``, detections, with masks
    where there is a postprocessor ``segm``; and ``panoptic``, maps, where there is one of that name."""
    sizes, fed = (torch.stack([target[name] for target in targets]) for name in ("orig_size", "size"))
    detections = postprocessors["bbox"](outputs, sizes)
    if "segm" in postprocessors:
        detections = postprocessors["segm"](detections, outputs, sizes, fed)
    found: dict[str, list[Any]] = {"bbox": [
        {name: value.cpu() if isinstance(value, Tensor) else value for name, value in detection.items()}
        for detection in detections]}
    if "panoptic" in postprocessors:
        found["panoptic"] = postprocessors["panoptic"](outputs, fed, sizes)
    return found


def train_one_epoch(model: nn.Module, criterion: nn.Module, loader: Iterable[Batch], length: int,
                    optimizer: torch.optim.Optimizer, schedule: Any, device: torch.device, epoch: int, *,
                    max_norm: float = 0.0, amp: str = "off", held: Sequence[nn.Module] = (),
                    after_step: Callable[[], None] | None = None, progress: Progress | None = None) -> dict[str, float]:
    """One pass over the ``length`` batches of ``loader``; returns the averages of the losses over it and all processes.

    ``schedule`` is a learning rate scheduler that steps with the optimizer. Gradients longer than ``max_norm`` are
    shortened to it (0: left). With ``amp="bf16"`` the model runs in bfloat16 where autocast finds that safe; the
    criterion always runs in float32. ``held`` modules, frozen parts, work as in evaluation. ``after_step`` is called
    after each step (a weight average, say).
    Raises ``NonFiniteError`` naming loss, images and step when something is no number.
    """
    model.train()
    criterion.train()
    for module in held:
        module.eval()
    progress = progress or Progress(f"epoch {epoch}")
    takes_targets = getattr(getattr(model, "module", model), "takes_targets", False)    # DistributedDataParallel's, too
    batches = progress.over(loader, length, ("loss", "class_error", "grad_norm", "lr", "padded"))
    for step, (samples, targets) in enumerate(batches):
        ids, where = image_ids(targets), f"epoch {epoch}, step {step}"
        padded = samples.padded_share
        samples, targets = to_device(samples, targets, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
            outputs = model(samples, targets) if takes_targets else model(samples)
        try:
            losses = criterion(outputs, targets)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; at {where}, images {ids}") from None
        loss = criterion.weighted_sum(losses)

        values = readings(distributed.mean_over_processes(losses), criterion.weight_dict)
        check_finite(values, ids, where)

        optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), max_norm if max_norm > 0 else math.inf))
        check_finite({"grad_norm": norm}, ids, where)
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        if after_step is not None:
            after_step()
        progress.update({**values, "grad_norm": norm, "lr": lr, "padded": padded}, len(targets))
    return progress.averages()


@torch.no_grad()
def evaluate(model: nn.Module, criterion: nn.Module, postprocessors: Mapping[str, nn.Module], loader: Iterable[Batch],
             length: int, evaluators: Sequence[Evaluator], device: torch.device,
             progress: Progress | None = None) -> dict[str, Any]:
    """One pass over this process's ``length`` batches without training, in float32; returns the averages of the losses
    and what the evaluators say of all processes' predictions.

    Processes may have different numbers of batches, so nothing inside the loop waits for another.
    """
    model.eval()
    criterion.eval()
    progress = progress or Progress("evaluation")
    for step, (samples, targets) in enumerate(progress.over(loader, length, ("loss", "class_error", "padded"))):
        ids, where = image_ids(targets), f"{progress.title}, step {step}"
        padded = samples.padded_share
        samples, targets = to_device(samples, targets, device)
        outputs = model(samples)
        try:
            losses = criterion(outputs, targets)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; at {where}, images {ids}") from None
        values = readings(losses, criterion.weight_dict)
        check_finite(values, ids, where)
        predictions = {kind: dict(zip(ids, of_images))
                       for kind, of_images in post_process(postprocessors, outputs, targets).items()}
        for evaluator in evaluators:
            evaluator.update(predictions[evaluator.kind])
        progress.update({**values, "padded": padded}, len(targets))
    results: dict[str, Any] = progress.averages_over_processes()
    for evaluator in evaluators:
        results |= evaluator.summarize()
    return results
