"""A training from its first step, or from where it was broken off, to its end: epochs, evaluation, files."""
from __future__ import annotations

import dataclasses
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import BatchSampler, DataLoader

from datasets import build_evaluators, collate
from datasets.drawn import Drawn, drawn_sizes
from datasets.fingerprint import fingerprint
from datasets.sampler import EvaluationBatches, EvaluationShard, RandomBatches, TrainingBatches, repeat_factors
from datasets.transforms import Preprocessing, eval_transforms, resized
from detr import checkpoint, distributed, sharding, visualize
from detr.config import TrainConfig
from detr.diagnosis import CollapseWatch, Skips, random_states, set_random_states
from detr.distributed import say
from detr.memory import (
    advice,
    auto_batch_size,
    blocks_of_body,
    checkpoint_activations,
    fits,
    keep_activations,
    layers_of,
    memory_limit,
    out_of_memory,
    used_memory,
    worst_batch,
)
from detr.nested_tensor import nested_tensor_from_tensor_list
from detr.optimization import (
    Sharing,
    adjusted,
    learning_rate_schedule,
    make_optimizer,
    moving_average,
    stays,
)
from detr.precision import autocast, choose_precision, make_scaler
from detr.run_folder import RunFolder, code_revision
from detr.settings import Settings
from detr.structures import Divisors
from engine import Guard, Progress, duration, evaluate, post_process, train_one_epoch

DRAWS = 4096                        # images whose sizes in training are looked at for the largest
WRITE_FAILURES = 3                  # checkpoints in a row that could not be written, after which training stops


class Interrupted(Exception):
    """Somebody asked the program to leave, and what was done is saved; ``signal`` is the number of the signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class Signals:
    """While it is entered, SIGTERM and SIGINT are noted in ``received`` in place of ending the program; a second one ends
    it as ever. In ``leave_at_once`` the first raises ``Interrupted``: where what was done is saved already."""
    NAMES = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self.leave_at_once: str | None = None           # the message to leave with

    def __enter__(self) -> Signals:
        self.before = {}
        try:
            for name in self.NAMES:
                self.before[name] = signal.signal(name, self._note)
        except ValueError:                              # not in the main thread, which alone is told of signals
            pass
        return self

    def __exit__(self, *_: Any) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.leave_at_once is not None:
            raise Interrupted(self.leave_at_once, number)
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        print(f"{signal.Signals(number).name}: saving after this step; once more leaves at once", flush=True)


class Judge:
    """Evaluates a model on the validation data, each image once over all processes."""

    def __init__(self, validation: Any, criterion: nn.Module, postprocessors: dict, settings: Settings,
                 preprocessing: Preprocessing, equal: bool, folder: Path | None, device: torch.device) -> None:
        """``equal``: no batch may have padding in it. Panoptic maps are written to ``folder``."""
        self.validation, self.criterion, self.postprocessors = validation, criterion, postprocessors
        self.folder, self.judge = folder, settings.run.coco_eval
        self.device, self.print_every = device, settings.run.print_every
        process = distributed.rank(), distributed.world_size()
        if settings.data.bucket_eval or equal:
            sizes = [resized(h, w, preprocessing.size, preprocessing.max_size) for h, w in validation.sizes.tolist()]
            batches: Any = EvaluationBatches(sizes, settings.train.batch_size, *process, equal=equal)
        else:
            shard = EvaluationShard(len(validation), *process)
            batches = BatchSampler(shard, settings.train.batch_size, drop_last=False)
        self.loader = data_loader(validation, batches, settings, device)

    def __call__(self, model: nn.Module, title: str) -> dict[str, Any]:
        self.evaluators = build_evaluators(self.validation, "segm" in self.postprocessors, self.folder, self.judge)
        return evaluate(model, self.criterion, self.postprocessors, self.loader, len(self.loader), self.evaluators,
                        self.device, Progress(title, self.print_every))

    def save(self) -> None:
        """The last evaluation's predictions as COCO json, and pycocotools' ``eval`` dict."""
        if self.folder is None or not distributed.is_main():
            return
        box, *panoptic = self.evaluators
        box.save_results(self.folder / "results.json")
        for evaluator in panoptic:
            evaluator.save_results()
        curves = self.folder / "eval" / "latest.pth"
        checkpoint.write_whole(curves, lambda file: torch.save(box.eval, file))


def data_loader(dataset: Any, batches: Any, settings: Settings, device: torch.device,
                training: bool = False) -> DataLoader:
    """Batches. What they hold follows from ``batches`` alone, and reading them takes nothing from the randomness of the
    program. Workers of a training are started anew each epoch."""
    workers = settings.run.num_workers
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                      persistent_workers=workers > 0 and not training, pin_memory=device.type == "cuda",
                      generator=torch.Generator(), worker_init_fn=leave_signals_to_the_main_process)


def leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C and preemption reach all processes; a worker that left would break the step that is to be finished."""
    for name in Signals.NAMES:
        signal.signal(name, signal.SIG_IGN)


def training_batches(settings: Settings, training: Any, sharing: Sharing,
                     device: torch.device) -> tuple[RandomBatches, DataLoader]:
    """What is read for a training, and in which order."""
    train, data = settings.train, settings.data
    repeats = None
    if data.repeat_threshold:
        repeats = repeat_factors(training.labels_of_images(), data.repeat_threshold)
        say(f"repeated images: {int((repeats > 1).sum())} of {len(repeats)} have a rare class; an epoch has "
            f"{int(repeats.sum())} images")
    shared = (sharing.batch_size, distributed.rank(), sharing.world_size, train.seed, repeats, sharing.accumulate)
    batches = TrainingBatches(training.sizes, training.transforms, *shared) if data.bucket_train else \
        RandomBatches(len(training), *shared)
    return batches, data_loader(Drawn(training), batches, settings, device, training=True)


def seed_randomness(seed: int, epoch: int, step: int = 0) -> None:
    """Randomness that depends on seed, place in the training and process alone: PyTorch's, Python's and NumPy's."""
    number = (((seed * 1_000_003 + epoch) * 1_009 + distributed.rank()) * 1_000_003 + step) % 2**63
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


class Training:
    """All that changes while a model is trained: what a checkpoint has to hold so that it goes on exactly."""

    def __init__(self, settings: Settings, model: nn.Module, held: Sequence[nn.Module], sharing: Sharing,
                 steps_per_epoch: int, device: torch.device, folder: Path, about: Mapping[str, Any]) -> None:
        """``about`` is what every checkpoint says besides: configuration, classes, preprocessing, data."""
        self.settings, self.model, self.held, self.device = settings, model, held, device
        self.sharing, self.steps_per_epoch = sharing, steps_per_epoch
        self.files, self.about = RunFolder(folder), dict(about)
        train, factor = adjusted(settings.train, sharing.images)
        self.train: TrainConfig = train
        self.ema: AveragedModel | None = moving_average(model, train.ema_decay) if train.ema_decay else None
        if settings.run.fsdp:                           # the average first: what is shared out cannot be copied
            for one in (model, self.ema.module) if self.ema else (model,):
                parts = sharding.shard(one, [*layers_of(one), *blocks_of_body(one)])
            if parts:
                say(f"weights: shared out over {sharing.world_size} processes, {len(parts)} layers and blocks one at a "
                    f"time (--fsdp)")
        groups = [group | {"lr": group["lr"] * factor} for group in settings.model.parameter_groups(model, train.lr)]
        self.optimizer = make_optimizer(groups, train)
        if factor != 1:
            say(f"learning rates: times {factor:.4g}, since a step has {sharing.images} images and the recipe's "
                f"{train.lr_batch} (--lr_rule {train.lr_rule}); warm-up {train.warmup_steps} steps, --ema_decay "
                f"{train.ema_decay:.6g}")
        self.amp = choose_precision(train.amp, device)
        self.scaler = make_scaler(device, self.amp)
        self.guard = Guard(Skips(train.non_finite, train.skip_at_most), folder,
                           {**settings.as_dict(), **{name: about.get(name) for name in ("num_classes", "class_weights")}})
        self.collapse = CollapseWatch()
        self.epoch, self.step = 0, 0                    # the next step
        self.random: list[dict[str, Any]] | None = None             # of each process, before that step
        self.progress: dict[str, Any] | None = None                 # of the epoch, where it has begun
        self.best: dict[str, Any] | None = None
        self.row: dict[str, Any] | None = None                      # of log.txt, of the last epoch
        self.metrics: dict[str, Any] = {}                           # of the last evaluation, and where it was made
        self.evaluated = (0, 0)
        self.failures: Counter[str] = Counter()                     # in a row, of each file
        self.trained, self.saved = 0.0, time.monotonic()

    @property
    def scored(self) -> nn.Module:
        """The model that is evaluated and used: the average of the weights, where there is one."""
        return self.ema.module if self.ema else self.model

    def state(self) -> dict[str, Any]:
        """Everything, for ``checkpoint.save``. All processes must call it."""
        states = distributed.gather_objects(random_states())
        state = {**self.usable(), "optimizer": sharding.full_optimizer_state(self.optimizer),
                 "lr_scheduler": self.schedule.state_dict(), "random_states": states, "progress": self.progress,
                 "best": self.best, "row": self.row, "history": self.guard.history.state_dict(),
                 "skips": self.guard.skips.state_dict(), "collapse": self.collapse.state_dict()}
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        if self.ema:
            state |= {"training_model": sharding.full_state(self.model), "ema_steps": int(self.ema.n_averaged)}
        return state

    def usable(self) -> dict[str, Any]:
        """What is needed to use the model, and to know what it is; scores only where these weights were evaluated. All
        processes must call it."""
        current = self.metrics if self.evaluated == (self.epoch, self.step) else {}
        return {"model": sharding.full_state(self.scored), "epoch": self.epoch - 1,
                "position": {"epoch": self.epoch, "step": self.step, "steps_per_epoch": self.steps_per_epoch,
                             "images_per_step": self.sharing.images, "processes": self.sharing.world_size},
                **{name: value for name, value in self.about.items() if name not in ("card", "class_weights")},
                "card": {**self.about["card"], "metrics": current, "seconds": round(self.trained, 1),
                         "date": time.strftime("%Y-%m-%d %H:%M:%S")}}

    def restore(self) -> None:
        """Go on from the checkpoint of ``--resume``, or begin."""
        resumed, run = self.settings.resumed, self.settings.run
        if resumed is not None and not {"optimizer", "epoch"} <= resumed.keys():
            say(f"{run.resume} has weights only: training starts at epoch {run.start_epoch} with a new optimizer")
            self.epoch = run.start_epoch
        elif resumed is not None:
            self._restore(resumed, run.resume)
        self.schedule = learning_rate_schedule(self.optimizer, self.train, self.steps_per_epoch,
                                               self.epoch * self.steps_per_epoch + self.step)

    def _restore(self, resumed: dict[str, Any], source: str) -> None:
        """Learning rate and weight decay are those of the settings, since a typed ``--lr`` is meant."""
        self._restore_optimizer(resumed, source)
        if self.ema is not None:
            self._load(self.ema.module, resumed["model"], source)
            self.ema.n_averaged.fill_(resumed.get("ema_steps", 0))
        if "training_model" in resumed:
            self._load(self.model, resumed["training_model"], source)
        if self.scaler is not None and "scaler" in resumed:
            self.scaler.load_state_dict(resumed["scaler"])
        for part, name in ((self.guard.history, "history"), (self.guard.skips, "skips"), (self.collapse, "collapse")):
            if name in resumed:
                part.load_state_dict(resumed[name])
        self.best, self.row = resumed.get("best"), resumed.get("row")
        card = resumed.get("card") or {}
        self.metrics, self.trained = card.get("metrics", {}), card.get("seconds", 0.0)
        self.evaluated = (resumed["epoch"] + 1, 0)
        before = card.get("data")
        if before is not None and before != self.about["card"]["data"]:
            say(f"the training data is not that of {source}: {before} then, {self.about['card']['data']} now")
        place = resumed.get("position") or {"epoch": resumed["epoch"] + 1, "step": 0}
        start = self.settings.run.start_epoch
        self.epoch, self.step = (start, 0) if start else (place["epoch"], place["step"])
        if self.step:
            self._restore_within_epoch(resumed, place, source)
        if self.epoch >= self.train.epochs and not self.settings.automatic:
            raise ValueError(f"{source} has finished epoch {resumed['epoch']} of {self.train.epochs}: nothing is left to "
                             f"train; give more --epochs, or --eval")
        within = f", step {self.step} of {self.steps_per_epoch}," if self.step else ""
        say(f"resumed from {source}: " + (f"epoch {self.epoch}{within} is next" if self.epoch < self.train.epochs else
                                          "all epochs were trained"))

    @staticmethod
    def _load(model: nn.Module, state: dict[str, Any], source: str) -> None:
        if sharding.is_sharded(model):
            sharding.load_full_state(model, state)
        else:
            checkpoint.load_model(model, state, source)

    def _restore_within_epoch(self, resumed: dict[str, Any], place: dict[str, Any], source: str) -> None:
        """``step`` of an epoch that has begun, its averages, and the randomness of each process."""
        before = place["images_per_step"]
        same_steps = before == self.sharing.images and place["steps_per_epoch"] == self.steps_per_epoch
        if not same_steps:
            self.step = min(self.step * before // self.sharing.images, self.steps_per_epoch)
            say(f"{source} was saved after {place['step']} steps of {before} images of an epoch of "
                f"{place['steps_per_epoch']}; now a step has {self.sharing.images} images and an epoch "
                f"{self.steps_per_epoch} steps: it goes on with step {self.step}")
        self.progress = resumed.get("progress")
        states = resumed.get("random_states") or ()
        if len(states) == distributed.world_size() and same_steps:
            self.random = list(states)
        else:
            say(f"random states: {len(states)} processes saved theirs, {distributed.world_size()} go on; dropout is "
                f"seeded anew from --seed, epoch and step")

    def _restore_optimizer(self, resumed: dict[str, Any], source: str) -> None:
        wanted = [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        try:
            sharding.load_full_optimizer_state(self.optimizer, resumed["optimizer"])
        except ValueError as error:
            flags = [f"--{name}" for name in ("lr_backbone", "from_scratch", "lr_backbone_names",
                                              "lr_linear_proj_names") if hasattr(self.settings.model, name)]
            raise ValueError(f"{source}: its optimizer does not fit the parameters that train now ({error}); resume with "
                             f"the same {', '.join(flags)}, --freeze as before") from None
        for group, (lr, weight_decay) in zip(self.optimizer.param_groups, wanted):
            group["lr"], group["weight_decay"] = lr, weight_decay

    def begin_randomness(self) -> None:
        """The random numbers of the next step: those that were saved, or new ones of this place."""
        if self.random is not None:
            set_random_states(self.random[distributed.rank()])
            self.random = None
        else:
            seed_randomness(self.train.seed, self.epoch, self.step)

    def save(self) -> None:
        """Write ``checkpoint.pth``. Where that fails, it is said and training goes on, unless it fails again and again
        (``WRITE_FAILURES``). All processes must call it."""
        state = self.state()
        self.try_to_write(lambda: self.files.save(state), "checkpoint.pth")
        self.saved = time.monotonic()

    def try_to_write(self, write: Callable[[], Any], what: str) -> None:
        """``write`` in the main process; a failure is said, and counted in all processes."""
        failure = None
        if distributed.is_main():
            try:
                write()
            except OSError as error:
                failure = str(error)
        failure = distributed.gather_objects(failure)[0]
        if not failure:
            self.failures[what] = 0
            return
        self.failures[what] += 1
        if self.failures[what] >= WRITE_FAILURES:
            raise OSError(f"{failure}\nstopped after {WRITE_FAILURES} writes in a row that failed; --resume auto goes on "
                          f"from the last checkpoint in {self.files.folder}")
        say(f"NOT SAVED: {failure}\ntraining goes on, and {what} is written anew next time ({self.failures[what]} of "
            f"{WRITE_FAILURES} failures in a row before it stops)")

    def finish_epoch(self, averages: Mapping[str, float], results: Mapping[str, Any], parameters: int) -> None:
        """Count the epoch, and write what is left of it: the best weights so far, checkpoints, the card. The best are
        written first: where the program is killed in between, the epoch is evaluated again, and they too."""
        epoch = self.epoch
        self.row = {**{f"train_{name}": value for name, value in averages.items()},
                    **{f"test_{name}": value for name, value in results.items()}, "epoch": epoch,
                    "n_parameters": parameters}
        self.epoch, self.step, self.progress = epoch + 1, 0, None
        self.begin_randomness()
        if results:
            self.metrics, self.evaluated = dict(results), (self.epoch, 0)
            name, value = headline(results)
            if self.best is None or self.best["name"] != name or value > self.best["value"]:
                self.best = {"name": name, "value": value, "epoch": epoch}
                usable = self.usable()
                self.try_to_write(lambda: self.files.export("best", usable), "best.pth")
        state = self.state()
        self.try_to_write(lambda: self.files.save(state), "checkpoint.pth")
        if stays(epoch, self.train):
            self.try_to_write(lambda: self.files.keep(state, epoch), f"checkpoint{epoch:04}.pth")
        self.try_to_write(self.files.card, "checkpoints.txt")
        self.saved = time.monotonic()


def headline(results: Mapping[str, Any]) -> tuple[str, float]:
    """The number by which the best weights are chosen: PQ of panoptic models, AP of masks or of boxes."""
    if "PQ_all" in results:
        return "PQ", float(results["PQ_all"]["pq"])
    name = "coco_eval_masks" if "coco_eval_masks" in results else "coco_eval_bbox"
    return ("mask AP" if name == "coco_eval_masks" else "AP"), float(results[name][0])


def fit(settings: Settings, training: Any, model: nn.Module, criterion: nn.Module, judge: Judge,
        preprocessing: Preprocessing, folder: Path, device: torch.device, sharing: Sharing,
        held: Sequence[nn.Module] = ()) -> dict[str, Any]:
    """Train epoch by epoch; after each, evaluate, log and save. ``held`` are frozen parts."""
    run = settings.run
    batches, loader = training_batches(settings, training, sharing, device)
    about = {"config": settings.as_dict(), "categories": [category._asdict() for category in training.categories],
             "num_classes": training.num_classes, "preprocessing": preprocessing.as_dict(),
             "class_weights": next((loss.class_weights.tolist() for loss in criterion.losses
                                    if getattr(loss, "class_weights", None) is not None), None),
             "card": {"revision": code_revision(), "data": fingerprint(training), "torch": str(torch.__version__)}}
    going = Training(settings, model, held, sharing, batches.steps, device, folder, about)
    going.restore()
    train, first = going.train, going.epoch
    wrapped = model
    if distributed.is_distributed() and not sharding.is_sharded(model):
        statistics = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        wrapped = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                          broadcast_buffers=statistics)         # the others' never change
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if first < train.epochs:
        say(f"parameters that train: {parameters}; epochs {first} to {train.epochs - 1} of {batches.steps} steps; "
            f"output: {folder}")
    log = Log(folder, run.tensorboard, going.epoch, going.row)
    steps = StepLog(folder, going.epoch, going.step) if run.log_steps and distributed.is_main() else None
    results: dict[str, Any] = dict(going.metrics) if first >= train.epochs else {}
    with Signals() as signals:
        for epoch in range(first, train.epochs):
            start, before = time.perf_counter(), going.trained
            progress = Progress(f"epoch {epoch}", run.print_every, train.epochs - 1 - epoch, done=going.step)
            if going.progress is not None:
                progress.load_state_dict(going.progress)

            def after_step(step: int, values: Mapping[str, float], progress: Progress = progress,
                           start: float = start, before: float = before) -> None:
                if going.ema is not None and values:
                    going.ema.update_parameters(model)
                if steps is not None:
                    steps.write(going.epoch, step, values)
                going.step, going.progress = step + 1, progress.state_dict()
                going.trained = before + time.perf_counter() - start
                due = run.save_every_minutes > 0 and time.monotonic() - going.saved >= 60 * run.save_every_minutes
                stop, save = distributed.any_of(signals.received is not None, due and distributed.is_main())
                if stop or save and going.step < batches.steps:
                    going.save()
                if stop:
                    leave(signals, going, folder)

            going.begin_randomness()
            if going.step < batches.steps:
                batches.set_epoch(epoch, going.step)
                ran_out = False
                try:
                    train_one_epoch(wrapped, criterion, loader, batches.steps, going.optimizer, going.schedule, device,
                                    epoch, first_step=going.step, accumulate=sharing.accumulate,
                                    max_norm=train.clip_max_norm, amp=going.amp, scaler=going.scaler, held=held,
                                    guard=going.guard, collapse=going.collapse, after_step=after_step,
                                    progress=progress)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    ran_out = True                      # the error holds on to what was computed, until here
                if ran_out:
                    trial = Trial(settings, training, model, criterion, device)
                    raise MemoryError(out_of_memory_message(settings, going.guard.doing, trial))
            averages = progress.averages()
            last = epoch + 1 == train.epochs
            share_statistics(going.scored)
            evaluated = last or (epoch + 1) % train.eval_every == 0
            if evaluated:
                going.save()                            # now nothing is lost if evaluation is broken off
                signals.leave_at_once = goodbye(going, folder)
            results = judge(sharding.whole(going.scored), f"evaluation {epoch}") if evaluated else {}
            signals.leave_at_once = None
            if collapsed := going.collapse.verdict():
                say(collapsed)
            going.finish_epoch(averages, results, parameters)
            if distributed.is_main():
                log.write(going.row)
            if evaluated:
                judge.save()
            if distributed.any_of(signals.received is not None)[0]:
                leave(signals, going, folder)
    say(f"trained for {duration(going.trained)}, all runs together, without evaluation")
    usable, scored = going.usable(), sharding.whole(going.scored)
    going.try_to_write(lambda: going.files.export("final", usable), "final.pth")
    going.try_to_write(going.files.card, "checkpoints.txt")
    if distributed.is_main() and train.epochs > first:
        picture_of_detections(scored, judge, preprocessing, folder, device)
    log.close()
    return results


class Trial:
    """One training step of the worst batch that the data has, to see what it takes: random pixels of the largest size, as
    many objects as there may be. It waits for no other process."""

    def __init__(self, settings: Settings, training: Any, model: nn.Module, criterion: nn.Module,
                 device: torch.device) -> None:
        self.settings, self.model, self.criterion, self.device = settings, model, criterion, device
        self.num_classes, self.amp = training.num_classes, settings.train.amp
        self.amp = choose_precision(self.amp, device)
        self.optimizer = make_optimizer(settings.model.parameter_groups(model, 0.0), settings.train)
        self.objects = [len(labels) for labels in training.labels_of_images()]
        self.sizes = self.fed(training)

    def fed(self, training: Any) -> list[tuple[int, int]]:
        """(height, width) of images as training feeds them: of each image once, of few images several times."""
        sizes = [(int(h), int(w)) for h, w in training.sizes.tolist()]
        chosen = [sizes[i] for i in np.linspace(0, len(sizes) - 1, DRAWS).round().astype(int)]
        return drawn_sizes(training.transforms, chosen, range(DRAWS))

    def __call__(self, batch_size: int, amp: str | None = None, scale: float = 1.0, alike: bool = False) -> None:
        """A step with ``batch_size`` images, of ``scale`` times the sides, and ``alike`` in shape."""
        alike = alike or self.settings.data.bucket_train
        height, width, objects = worst_batch(self.sizes, self.objects, batch_size, alike)
        height, width = max(32, round(height * scale)), max(32, round(width * scale))
        images = [torch.rand(self.settings.model.in_channels, height, width, device=self.device) for _ in objects]
        targets: list[Any] = [{"boxes": torch.rand(n, 4, device=self.device) * 0.5 + 0.1,
                               "labels": torch.arange(n, device=self.device) % self.num_classes} for n in objects]
        if getattr(self.settings.model, "masks", False):
            for target, n in zip(targets, objects):
                target["masks"] = torch.zeros(n, height, width, dtype=torch.bool, device=self.device)
        self.model.train()
        self.criterion.train()
        samples = nested_tensor_from_tensor_list(images)
        with autocast(self.device, amp or self.amp):
            takes = getattr(self.model, "takes_targets", False)
            outputs = self.model(samples, targets) if takes else self.model(samples)
        divisors = Divisors(torch.tensor(float(max(1, sum(objects))), device=self.device))
        self.criterion.weighted_sum(self.criterion(outputs, targets, divisors)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def chosen_batch_size(settings: Settings, training: Any, model: nn.Module, criterion: nn.Module,
                      device: torch.device) -> int:
    """``--auto_batch_size``: said."""
    trial = Trial(settings, training, model, criterion, device)
    try:
        found, report = auto_batch_size(trial, model, trial.optimizer, device,
                                        len(training) // distributed.world_size(), settings.train.global_batch_size)
    except RuntimeError as error:
        raise MemoryError(error) from error
    say(report)
    return found


def out_of_memory_message(settings: Settings, doing: Mapping[str, Any], trial: Trial) -> str:
    """What to say of a batch that memory did not suffice for: the flags with which a step goes through, tried."""
    known = {**dataclasses.asdict(settings.model), **dataclasses.asdict(settings.train),
             **dataclasses.asdict(settings.data), **dataclasses.asdict(settings.run)}
    limit = memory_limit(trial.device)

    def goes_through(flags: dict[str, Any]) -> bool:
        batch_size, amp = flags.get("batch_size", known["batch_size"]), flags.get("amp")
        sides = [int(str(of.get("image_size", known["image_size"])).split("x")[0]) for of in (flags, known)]
        if flags.get("activation_checkpointing"):
            checkpoint_activations(trial.model)
        try:
            return fits(lambda: trial(batch_size, amp, sides[0] / sides[1], flags.get("bucket_train", False)),
                        trial.device, limit)
        finally:
            if flags.get("activation_checkpointing"):
                keep_activations(trial.model)

    text = advice(doing["shape"], doing["objects"], known, where=doing["where"], used=used_memory(trial.device),
                  limit=limit, world_size=distributed.world_size(),
                  fits=None if sharding.is_sharded(trial.model) else goes_through)
    return f"{text}\nthe last checkpoint is unharmed: go on with --resume auto, --output_dir and one of these"


def goodbye(going: Training, folder: Path) -> str:
    """The last line of a training that leaves before its end."""
    return (f"saved at epoch {going.epoch}, step {going.step} of {going.steps_per_epoch}: go on with --resume auto "
            f"--output_dir {folder}")


def leave(signals: Signals, going: Training, folder: Path) -> None:
    """Raise ``Interrupted``, of a checkpoint that was just saved."""
    going.try_to_write(going.files.card, "checkpoints.txt")
    number = signals.received or signal.SIGTERM
    raise Interrupted(f"{signal.Signals(number).name}: {goodbye(going, folder)}", number)


def share_statistics(model: nn.Module) -> None:
    """Rank 0's buffers for all processes: each gathered batch norm's statistics from its own images, but one model is
    evaluated and saved."""
    if distributed.is_distributed():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


class StepLog:
    """``steps.txt`` with one JSON object a line an optimizer step. What is there of steps that are done again goes."""

    def __init__(self, folder: Path, epoch: int, step: int) -> None:
        self.file = folder / "steps.txt"
        rows = []
        if self.file.exists():
            for line in self.file.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:                      # cut short, by a kill
                    continue
                if (row["epoch"], row["step"]) < (epoch, step):
                    rows.append(line)
            checkpoint.write_whole(self.file, lambda file: file.write("".join(f"{row}\n" for row in rows).encode()))

    def write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """A step whose ``values`` are empty was left out; one without ``grad_norm`` overflowed. A full disk takes the
        line away, and is said."""
        shown = {name: values[name] for name in ("loss", "grad_norm", "lr") if name in values}
        row = {"epoch": epoch, "step": step, **(shown or {"left_out": True})}
        try:
            with open(self.file, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            say(f"cannot write {self.file}: {error}; step {step} of epoch {epoch} is missing there")


class Log:
    """``log.txt`` with one JSON object a line an epoch, the curve drawn from it, and TensorBoard where asked for."""

    def __init__(self, folder: Path, tensorboard: bool, epoch: int = 0, row: dict[str, Any] | None = None) -> None:
        """``epoch`` is next: rows of it and later ones, which are trained again, are taken out. ``row`` is the one before
        it, which is added where the program was killed before it could be written."""
        self.file, self.curves, self.writer = folder / "log.txt", folder / "curves.png", None
        self.unwritten: list[dict[str, Any]] = []
        if self.file.exists() and distributed.is_main():
            rows = visualize.read_log(self.file)        # a line that is no json is an error now, not after an epoch
            kept = [old for old in rows if old.get("epoch", -1) < epoch]
            if row is not None and row["epoch"] == epoch - 1 and all(old.get("epoch") != epoch - 1 for old in kept):
                kept.append(row)
            if len(kept) < len(rows):
                say(f"{self.file}: taken out: {len(rows) - len(kept)} rows of epochs that are trained again")
            if kept != rows:
                text = "".join(json.dumps(old) + "\n" for old in kept)
                checkpoint.write_whole(self.file, lambda file: file.write(text.encode()))
        if tensorboard and distributed.is_main():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch)

    def write(self, row: dict[str, Any]) -> None:
        """A finished epoch. What a full disk does not take is said, and written with the next epoch."""
        self.unwritten.append(row)
        try:
            with open(self.file, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in self.unwritten))
            self.unwritten = []
            visualize.draw_curves(self.file, self.curves)
        except OSError as error:
            say(f"NOT SAVED: cannot write {self.file.parent}: {error}; {len(self.unwritten)} rows of log.txt are written "
                f"with the next epoch's. Make room")
        if self.writer is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, row["epoch"])
            for title, key in (("coco", "test_coco_eval_bbox"), ("coco_masks", "test_coco_eval_masks")):
                for name, value in zip(visualize.COCO_NUMBERS, row.get(key, ())):
                    self.writer.add_scalar(f"{title}/{name}", value, row["epoch"])
            for key in ("PQ_all", "PQ_th", "PQ_st"):
                for name, value in row.get(f"test_{key}", {}).items():
                    self.writer.add_scalar(f"panoptic/{key}/{name}", value, row["epoch"])
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


@torch.no_grad()
def picture_of_detections(model: nn.Module, judge: Judge, preprocessing: Preprocessing, folder: Path,
                          device: torch.device, count: int = 6, threshold: float = 0.4) -> None:
    """``detections.png``: what the model sees on a few validation images, with masks where it has some, next to the
    ground truth; and ``panoptic.png`` likewise for panoptic maps."""
    data = judge.validation
    names = {category.label: category.name for category in data.categories}
    things = {category.label for category in data.categories if category.isthing}
    with_objects = [i for i in range(len(data)) if len(data.target(i)["labels"])] or list(range(len(data)))
    rows, maps = [], []
    for i in with_objects[::max(1, len(with_objects) // count)][:count]:
        image, target = data.image(i), data.target(i)
        tensor, fed = eval_transforms(preprocessing)(image, {"orig_size": target["orig_size"]})
        target_on_device = {name: fed[name].to(device) for name in ("orig_size", "size")}
        seen = post_process(judge.postprocessors, model([tensor.to(device)]), [target_on_device])
        found = seen["bbox"][0]
        keep = found["scores"] > threshold
        masks = [mask for mask, kept in zip(found["masks"], keep.tolist()) if kept] if "masks" in found else None
        truth = visualize.draw_detections(image, target["boxes"], target["labels"], names, masks=target.get("masks"))
        rows.append((truth,
                     visualize.draw_detections(image, found["boxes"][keep], found["labels"][keep], names,
                                               found["scores"][keep], masks=masks)))
        if "panoptic" in seen:
            segments = [{"id": number, "category_id": label, "isthing": label in things}
                        for number, label in enumerate(target["labels"].tolist(), 1)]
            maps.append((visualize.draw_panoptic(image, data.annotations.numbers(i), segments, names),
                         visualize.draw_panoptic(image, seen["panoptic"][0]["png_string"],
                                                 seen["panoptic"][0]["segments_info"], names)))
    files = [folder / "detections.png", folder / "curves.png"]
    visualize.side_by_side(rows, ("ground truth", f"detections over {threshold}")).save(files[0])
    if maps:
        files.append(folder / "panoptic.png")
        visualize.side_by_side(maps, ("ground truth", "panoptic map")).save(files[-1])
    say(f"pictures: {', '.join(map(str, files))}")
