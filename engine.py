"""Two loops, written out: ``train_one_epoch`` and ``evaluate``."""
from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detr import diagnosis, distributed, sharding
from detr.collapse import CollapseWatch
from detr.diagnosis import Skips, StepHistory
from detr.distributed import say
from detr.nested_tensor import NestedTensor
from detr.precision import autocast
from detr.structures import NonFiniteError, Outputs, Target

Item = TypeVar("Item")
Batch = tuple[NestedTensor, list[Target]]
PREDICTIONS = ("pred_logits", "pred_boxes")
FILES = 3                                   # steps that failed that a run keeps, each as large as the model
OVERFLOWS = 4                               # steps in a row that fp16 may leave out, once one went through


class Evaluator(Protocol):
    """What scores predictions of a ``kind``, boxes (and masks) or panoptic maps; ``evaluate`` knows no more of it."""
    kind: str

    def update(self, predictions: dict[int, Any]) -> None: ...

    def summarize(self) -> dict[str, Any]: ...


class Progress:
    """Tells how a pass over batches goes: a line every ``every`` seconds, and averages at its end.

    ``title`` begins each line; ``remaining_passes`` more passes of this length are counted into the time left. ``done``
    steps were done before, by a run that was broken off; ``state_dict`` has the averages of those.
    """

    def __init__(self, title: str, every: float = 10.0, remaining_passes: int = 0, done: int = 0) -> None:
        self.title, self.every, self.remaining_passes, self.done = title, every, remaining_passes, done
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.images, self.waited = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums.update(state["sums"])
        self.counts.update(state["counts"])

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
        for step in range(self.done + 1, length + 1):
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
        left = seconds / (step - self.done) * (length - step + self.remaining_passes * length)
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
    if not losses:                                                      # an exported model that gives detections alone
        return {}
    plain = dict(zip(losses, torch.stack([value.detach().float() for value in losses.values()]).tolist()))
    weighted = {name: value * weights[name] for name, value in plain.items() if name in weights}
    return {"loss": sum(weighted.values()), **plain, **weighted,
            **{f"{name}_unscaled": value for name, value in plain.items()}}


def not_finite(values: Mapping[str, float]) -> list[str]:
    """``name = value`` of what is no number."""
    return [f"{name} = {value}" for name, value in values.items()
            if not math.isfinite(value) and not name.endswith("_unscaled")]


class Guard:
    """What is done about values that are no numbers: the cause is looked for and said, everything that is needed to see
    it again is saved to ``folder``, and then training stops, or, as long as ``skips`` allow it, leaves the step out.

    ``about`` is what a file needs to know to build model and criterion again: the configuration, and ``num_classes``.
    """

    def __init__(self, skips: Skips | None = None, folder: Path | None = None,
                 about: Mapping[str, Any] | None = None) -> None:
        self.skips, self.folder, self.about = skips or Skips("stop", 0), folder, dict(about or {})
        self.history, self.kept = StepHistory(), 0
        self.doing: dict[str, Any] = {}                 # what is being computed, should memory run out

    def may_overflow(self) -> bool:
        """Whether another step in fp16 may be left out for a smaller loss scale: as many as it takes to find the first
        that fits, later ``OVERFLOWS`` in a row. More are no matter of scale."""
        norms = [math.isfinite(norm) for *_, norm, _ in self.history.rows]
        return not any(norms) or any(norms[-OVERFLOWS:])

    def report(self, found: Sequence[str], model: nn.Module, criterion: nn.Module, batches: Sequence[Batch],
               states: Sequence[dict[str, Any]], amp: str, device: torch.device, epoch: int, step: int, lr: float,
               scaler: torch.amp.GradScaler | None) -> None:
        """To be called by all processes when one of them has ``found`` something in a step. Returns where the step is
        only to be left out; else raises a ``NonFiniteError`` that says why."""
        report = self._blame(found, model, criterion, batches, states, amp, device, epoch, step, lr, scaler)
        reports = [text for text in distributed.gather_objects(report) if text]
        certain = [text for text in reports if diagnosis.NOT_FOUND not in text]         # a gradient is everybody's
        told = "\n".join(certain or reports)
        if self.skips.allow():
            say(f"{told}\nthis step is left out ({self.skips.count} of at most {self.skips.at_most}, --skip_at_most)")
            return
        before = f"the last steps:\n{self.history.text()}\n" if self.history.rows else ""
        if self.skips.policy == "stop":
            advice = ("Try a lower --lr, or look at these images' annotations; --non_finite skip would leave such steps "
                      "out")
        else:
            advice = (f"{self.skips.at_most} steps were left out before (--skip_at_most): try a lower --lr, from an "
                      f"earlier checkpoint, since these weights may be beyond repair")
        raise NonFiniteError(f"{told}\n{before}stopped; what was saved before is unharmed. {advice}")

    def _blame(self, found: Sequence[str], model: nn.Module, criterion: nn.Module, batches: Sequence[Batch],
               states: Sequence[dict[str, Any]], amp: str, device: torch.device, epoch: int, step: int, lr: float,
               scaler: torch.amp.GradScaler | None) -> str | None:
        """What this process knows; None where all it has are numbers."""
        takes_targets, scale = getattr(model, "takes_targets", False), 1.0 if scaler is None else scaler.get_scale()
        for (samples, targets), state in zip(batches, states):
            there = to_device(samples, targets, device)
            cause = diagnosis.blame(model, criterion, *there, amp=amp, takes_targets=takes_targets, random_state=state,
                                    scale=scale)
            if not cause.startswith(diagnosis.NOT_FOUND):
                break
        else:
            if not found:
                return None
        ids = image_ids(targets)
        who = f"process {distributed.rank()}: " if distributed.is_distributed() else ""
        scale_of = "" if scaler is None else f", loss scale {scale:g}"
        lines = [f"{who}{', '.join(found)} at epoch {epoch}, step {step}, images {ids}, learning rate {lr:g}{scale_of}",
                 cause]
        if self.folder is not None and self.kept < FILES:
            self.kept += 1
            suffix = f"_process{distributed.rank()}" if distributed.is_distributed() else ""
            path = self.folder / f"non_finite_epoch{epoch}_step{step}{suffix}.pth"
            try:
                diagnosis.save_repro(path, model=model, criterion_settings=self.about, samples=there[0],
                                     targets=there[1], random_state=state, where={
                                         "epoch": epoch, "step": step, "lr": lr, "images": ids, "report": cause,
                                         "amp": amp, "scale": scale, "history": self.history.state_dict(),
                                         "scaler": None if scaler is None else scaler.state_dict()})
                lines.append(f"to see it again: python scripts/replay.py {path}")
            except (OSError, TypeError) as error:
                lines.append(f"it could not be saved: {error}")
        return "\n".join(lines)


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
                    first_step: int = 0, accumulate: int = 1, max_norm: float = 0.0, amp: str = "off",
                    scaler: torch.amp.GradScaler | None = None, held: Sequence[nn.Module] = (),
                    guard: Guard | None = None, collapse: CollapseWatch | None = None,
                    after_step: Callable[[int, Mapping[str, float]], None] | None = None,
                    progress: Progress | None = None) -> dict[str, float]:
    """One pass: the optimizer steps ``first_step`` to ``length - 1`` of an epoch, whose batches ``loader`` gives,
    ``accumulate`` for each step. Returns the averages over it: of losses over all processes, of ``padded``, the share of
    padding, over this one's batches.

    The gradient of a step is the mean over its batches and the processes; what losses are divided by is the criterion's
    affair (``divisors``). ``schedule`` is a learning rate scheduler that steps with the optimizer. Gradients longer than
    ``max_norm`` are shortened to it (0: left). With ``amp="bf16"`` or ``"fp16"`` the model runs in that where autocast
    finds it safe, the latter with a ``scaler``; the criterion always runs in float32. ``held`` modules, frozen parts,
    work as in evaluation. ``after_step(step, values)`` is called after each step (a weight average, a checkpoint, say).
    What is no number is the ``guard``'s affair, by default a ``NonFiniteError``. ``collapse`` is shown all outputs.
    """
    model.train()
    criterion.train()
    for module in held:
        module.eval()
    progress, guard = progress or Progress(f"epoch {epoch}", done=first_step), guard or Guard()
    plain = getattr(model, "module", model)                                     # DistributedDataParallel's
    steps = progress.over(in_groups(loader, accumulate), length, ("loss", "class_error", "grad_norm", "lr", "padded"))
    for step, batches in enumerate(steps, first_step):
        lr, values = optimizer.param_groups[0]["lr"], {}
        kept = diagnosis.kept_buffers(plain) if guard.skips.policy == "skip" else None
        guard.doing = doing(batches, f"epoch {epoch}, step {step}")
        optimizer.zero_grad()
        given = add_up_gradients(model, criterion, batches, device, amp, scaler)
        if not given.broken:
            if scaler is not None:
                scaler.unscale_(optimizer)
            norm = sharding.clip(model, max_norm if max_norm > 0 else math.inf)
            overflow = scaler is not None and not math.isfinite(norm) and scaler.get_scale() > 1 and guard.may_overflow()
            if not (math.isfinite(norm) or overflow):
                given = given._replace(broken=True, found=[f"grad_norm = {norm}"])
        if given.broken:
            optimizer.zero_grad()
            alone = sharding.whole(plain)
            guard.report(given.found, alone, criterion, batches, given.states, amp, device, epoch, step, lr, scaler)
            if scaler is not None and given.predictions:                        # gradients were scaled back
                scaler.update()
            if kept is not None:
                diagnosis.put_back_buffers(plain, kept)                         # statistics that the step has spoilt
        else:
            if scaler is None:
                optimizer.step()
            else:                                                               # leaves the step out after an overflow
                scaler.step(optimizer)
                scaler.update()
            values = {**readings(distributed.mean_over_processes(given.losses), criterion.weight_dict), "lr": lr,
                      "padded": sum(samples.padded_share for samples, _ in batches) / len(batches),
                      **({} if overflow else {"grad_norm": norm}),
                      **({} if scaler is None else {"overflows": float(overflow), "loss_scale": scaler.get_scale()})}
            progress.update(values, sum(len(targets) for _, targets in batches))
            guard.history.add(epoch, step, values["loss"], norm, lr)
            for predictions, targets in given.predictions if collapse is not None else ():
                collapse.update(predictions, targets)
        forward_in_time(schedule)                                               # the step is over, even if left out
        if after_step is not None:
            after_step(step, values)
    return progress.averages()


class Gradients(NamedTuple):
    """What the batches of an optimizer step have given besides gradients."""
    losses: dict[str, Tensor]                           # means over the batches of this process
    predictions: list[tuple[Outputs, list[Target]]]     # logits and boxes of each batch, and its targets
    states: list[dict[str, Any]]                        # of the random generators, before each batch
    broken: bool                                        # whether a process met what is no number,
    found: list[str]                                    # and what, where it was this one


def add_up_gradients(model: nn.Module, criterion: nn.Module, batches: Sequence[Batch], device: torch.device, amp: str,
                     scaler: torch.amp.GradScaler | None) -> Gradients:
    """Forward and backward of each batch of a step, whose gradients are exchanged between processes once, with the last.
    Ends where a process meets a loss that is no number: in all of them before the backward pass, which would wait."""
    takes_targets = getattr(getattr(model, "module", model), "takes_targets", False)
    divisors = criterion.divisors([targets for _, targets in batches], device)
    sums: dict[str, Tensor] = {}
    predictions, states = [], []
    for k, batch in enumerate(batches):
        states.append(diagnosis.random_states())
        samples, targets = to_device(*batch, device)
        found: list[str] = []
        waits = k + 1 < len(batches) and isinstance(model, DistributedDataParallel)
        with model.no_sync() if waits else nullcontext():
            with autocast(device, amp):
                outputs = model(samples, targets) if takes_targets else model(samples)
            try:
                losses = criterion(outputs, targets, divisors[k])
                loss = criterion.weighted_sum(losses)
                if not torch.stack([loss, *losses.values()]).isfinite().all():
                    found = not_finite(readings(losses, criterion.weight_dict)) or [f"loss = {float(loss)}"]
            except NonFiniteError as error:
                found = [str(error)]
            if distributed.any_of(bool(found))[0]:
                return Gradients({}, [], states, True, found)
            loss = loss / len(batches)
            (loss if scaler is None else scaler.scale(loss)).backward()
        predictions.append(({name: outputs[name].detach() for name in PREDICTIONS if name in outputs}, targets))
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach() / len(batches)
    return Gradients(sums, predictions, states, False, [])


def doing(batches: Sequence[Batch], where: str) -> dict[str, Any]:
    """The largest batch of a step, for a message about memory."""
    samples, targets = max(batches, key=lambda batch: batch[0].tensors.numel())
    return {"shape": list(samples.tensors.shape), "where": where,
            "objects": sum(len(target.get("labels", ())) for target in targets)}


def forward_in_time(schedule: Any) -> None:
    """``schedule.step()`` without PyTorch's warning where the first steps of an optimizer were left out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        schedule.step()


def in_groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """``size`` batches at a time."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


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
            values = readings(criterion(outputs, targets), criterion.weight_dict)
            if bad := not_finite(values):
                raise NonFiniteError(", ".join(bad))
        except NonFiniteError as error:
            cause = diagnosis.blame(model, criterion, samples, targets, backward=False)
            raise NonFiniteError(f"{error}; at {where}, images {ids}\n{cause}") from None
        predictions = {kind: dict(zip(ids, of_images))
                       for kind, of_images in post_process(postprocessors, outputs, targets).items()}
        for evaluator in evaluators:
            evaluator.update(predictions[evaluator.kind])
        progress.update({**values, "padded": padded}, len(targets))
    results: dict[str, Any] = progress.averages_over_processes()
    for evaluator in evaluators:
        results |= evaluator.summarize()
    return results
