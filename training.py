"""A training from its first step, or from where it was broken off, to its end: epochs, evaluation, files."""
from __future__ import annotations

import random
import signal
import time
import warnings
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
from detr.collapse import CollapseWatch
from detr.config import TrainConfig
from detr.diagnosis import Skips, random_states, set_random_states
from detr.distributed import say
from detr.logs import Log, StepLog
from detr.memory import blocks_of_body, layers_of, out_of_memory
from detr.optimization import (
    Sharing,
    adjusted,
    learning_rate_schedule,
    make_optimizer,
    moving_average,
    stays,
)
from detr.precision import choose_precision, make_scaler
from detr.run_folder import RunFolder, code_revision
from detr.settings import Settings
from detr.structures import NonFiniteError
from detr.trial import Trial, out_of_memory_message
from engine import Guard, Progress, duration, evaluate, post_process, train_one_epoch

DRAWS = 4096                        # images whose sizes in training are looked at for the largest
SECONDS_TO_LEAVE = 10
WRITE_FAILURES = 3                  # checkpoints in a row that could not be written, after which training stops


class Interrupted(Exception):
    """Somebody asked the program to leave, by the signal of number ``signal``; the message, which was said, names what is
    saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class Signals:
    """While it is entered, SIGTERM and SIGINT are noted in ``received`` in place of ending the program. Another Ctrl-C
    ends it as ever; another SIGTERM changes nothing, since launchers pass on what their processes were sent already. With
    ``leave_at_once`` the first raises ``Interrupted``: where what was done is saved."""
    NAMES = (signal.SIGTERM, signal.SIGINT)
    AGAIN = 1.0                                         # seconds after which a signal is another one

    def __init__(self) -> None:
        self.received: int | None = None
        self.when = 0.0
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
            message, self.leave_at_once, self.received = self.leave_at_once, None, number
            say(f"{signal.Signals(number).name}: {message}")
            raise Interrupted(message, number)
        if self.received is None:
            self.received, self.when = number, time.monotonic()
            say(f"{signal.Signals(number).name}: saving after this step; Ctrl-C once more leaves at once")
        elif number == signal.SIGINT and time.monotonic() - self.when > self.AGAIN:
            raise KeyboardInterrupt


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
    """Ctrl-C and preemption reach all processes; a worker that left would break the step that is to be finished. One that
    is told to leave by its own program, which waits for it, is told by SIGTERM, too: it leaves at the second one, or some
    seconds after the first."""
    def leave_soon(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(SECONDS_TO_LEAVE)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, leave_soon)


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
        if settings.run.fsdp and not distributed.is_distributed():
            say("--fsdp: there is one process, which keeps the whole model")
        elif settings.run.fsdp:                         # the average first: what is shared out cannot be copied
            for one in (model, self.ema.module) if self.ema else (model,):
                parts = sharding.shard(one, [*layers_of(one), *blocks_of_body(one)])
            say(f"weights: shared out over {sharing.world_size} processes, {len(parts)} layers and blocks one at a time "
                f"(--fsdp)")
        groups = [group | {"lr": group["lr"] * factor} for group in settings.model.parameter_groups(model, train.lr)]
        self.optimizer = make_optimizer(groups, train)
        rates = ", ".join(f"{rate:.4g}" for rate in sorted({group["lr"] for group in groups}, reverse=True))
        say(f"learning rates: {rates}; {train.lr_schedule} schedule, {train.warmup_steps} steps of warm-up")
        if 0 < steps_per_epoch * train.epochs <= train.warmup_steps:
            say(f"--warmup_steps {train.warmup_steps}: the training has no more than {steps_per_epoch * train.epochs} "
                f"steps, so that learning rates hardly get to what was asked for; give fewer")
        if factor != 1:
            say(f"learning rates: times {factor:.4g}, since a step has {sharing.images} images and the recipe's "
                f"{train.lr_batch} (--lr_rule {train.lr_rule}); warm-up {train.warmup_steps} steps, --ema_decay "
                f"{train.ema_decay:.6g}")
        elif sharing.images != train.lr_batch:
            say(f"learning rates: as typed or in the recipe, which is for {train.lr_batch} images a step (--lr_batch), "
                f"where here are {sharing.images}; --lr_rule sqrt or linear would scale them")
        self.amp = choose_precision(train.amp, device)
        self.scaler = make_scaler(device, self.amp)
        self.guard = Guard(Skips(train.non_finite, train.skip_at_most), folder,
                           {**settings.as_dict(), **{name: about.get(name) for name in ("num_classes", "class_weights")}})
        self.collapse, self.signals = CollapseWatch(), Signals()
        self.steps: StepLog | None = None                           # in the main process, with --log_steps
        self.epoch, self.step = 0, 0                    # the next step
        self.random: list[dict[str, Any]] | None = None             # of each process, before that step
        self.progress: dict[str, Any] | None = None                 # of the epoch, where it has begun
        self.best: dict[str, Any] | None = None
        self.row: dict[str, Any] | None = None                      # of log.txt, of the last epoch
        self.metrics: dict[str, Any] = {}                           # of the last evaluation, and where it was made
        self.evaluated = (0, 0)
        self.failures: Counter[str] = Counter()                     # in a row, of each file
        self.trained, self.saved = 0.0, time.monotonic()
        self.rate_before: float | None = None                       # of the checkpoint's next step
        self.written: tuple[int, int] | None = None                 # epoch and step of the last checkpoint of this run

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
        if run.log_steps and distributed.is_main():
            self.steps = StepLog(self.files.folder, self.epoch, self.step)
        was, now = self.rate_before, self.optimizer.param_groups[0]["lr"]
        if was is not None and self.epoch < self.train.epochs and now != was:
            say(f"learning rate of the next step: {now:.4g}; the checkpoint's schedule had {was:.4g}")

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
        begins = start or "start_epoch" in self.settings.typed
        self.epoch, self.step = (start, 0) if begins else (place["epoch"], place["step"])
        if self.step:
            self._restore_within_epoch(resumed, place, source)
        if self.epoch >= self.train.epochs and not self.settings.automatic:
            raise ValueError(f"{source} has finished epoch {resumed['epoch']} of {self.train.epochs}: nothing is left to "
                             f"train; give more --epochs, or --eval")
        within = f", step {self.step} of {self.steps_per_epoch}," if self.step else ""
        say(f"resumed from {source}: " + (f"epoch {self.epoch}{within} is next" if self.epoch < self.train.epochs else
                                          f"all {self.train.epochs} epochs were trained; --epochs N trains on"))

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
            again = ", with bucketed batches of which some were seen before" if self.settings.data.bucket_train else ""
            self.step = min(self.step * before // self.sharing.images, self.steps_per_epoch)
            say(f"{source} was saved after {place['step']} steps of {before} images of an epoch of "
                f"{place['steps_per_epoch']}; now a step has {self.sharing.images} images and an epoch "
                f"{self.steps_per_epoch} steps: it goes on with step {self.step}{again}")
        self.progress = resumed.get("progress")
        states = resumed.get("random_states") or ()
        if len(states) == distributed.world_size() and same_steps:
            self.random = list(states)
        else:
            why = "steps are other ones" if not same_steps else \
                f"{len(states)} processes saved theirs, and {distributed.world_size()} go on"
            say(f"random states: {why}; dropout is seeded anew from --seed, epoch and step")

    def _restore_optimizer(self, resumed: dict[str, Any], source: str) -> None:
        wanted = [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.rate_before = next((group["lr"] for group in resumed["optimizer"]["param_groups"]), None)
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
        (``WRITE_FAILURES``). All processes must call it. Raises ``NonFiniteError`` where a weight is no number: what can
        be used is left as it is."""
        self.write(self.state())

    def write(self, state: dict[str, Any]) -> None:
        bad = [name for name, value in state["model"].items() if not value.isfinite().all()]
        bad = next((names for names in distributed.gather_objects(bad) if names), [])
        if bad:
            raise NonFiniteError(f"weights that are no numbers after epoch {self.epoch}, step {self.step}: {bad[0]}"
                                 f"{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}; nothing is saved, and the last "
                                 f"checkpoint is from before. Try a lower --lr")
        if self.try_to_write(lambda: self.files.save(state), "checkpoint.pth"):
            self.written = self.epoch, self.step
        self.saved = time.monotonic()

    def try_to_write(self, write: Callable[[], Any], what: str, needed: bool = True) -> bool:
        """``write`` in the main process, and whether it went well; a failure is said, and counted in all processes. What
        is not ``needed`` may fail as often as it likes."""
        failure = None
        if distributed.is_main():
            try:
                write()
            except OSError as error:
                failure = str(error)
        failure = distributed.gather_objects(failure)[0]
        if not failure:
            self.failures[what] = 0
            return True
        if not needed:
            say(f"NOT SAVED: {failure}")
            return False
        self.failures[what] += 1
        if self.failures[what] >= WRITE_FAILURES:
            raise OSError(f"{failure}\nstopped after {WRITE_FAILURES} writes in a row that failed; --resume auto goes on "
                          f"from the last checkpoint in {self.files.folder}")
        say(f"NOT SAVED: {failure}\ntraining goes on, and {what} is written anew next time ({self.failures[what]} of "
            f"{WRITE_FAILURES} failures in a row before it stops)")
        return False

    def finish_epoch(self, averages: Mapping[str, float], results: Mapping[str, Any], parameters: int) -> None:
        """Count the epoch, and write what is left of it: the best weights so far, checkpoints, the card. The best are
        written first: where the program is killed in between, the epoch is evaluated again, and they too."""
        epoch = self.epoch
        self.row = {**{f"train_{name}": value for name, value in averages.items()},
                    **{f"test_{name}": value for name, value in results.items()}, "epoch": epoch,
                    "seconds": round(self.trained, 1), "n_parameters": parameters}
        self.epoch, self.step, self.progress = epoch + 1, 0, None
        self.begin_randomness()
        if results:
            self.metrics, self.evaluated = dict(results), (self.epoch, 0)
            name, value = headline(results)
            if self.best is None or self.best["name"] != name or value > self.best["value"]:
                usable = self.usable()
                if self.try_to_write(lambda: self.files.export("best", usable), "best.pth"):
                    self.best = {"name": name, "value": value, "epoch": epoch}
        state = self.state()
        self.write(state)
        if stays(epoch, self.train):
            self.try_to_write(lambda: self.files.keep(state, epoch), f"checkpoint{epoch:04}.pth", needed=False)
        self.try_to_write(self.files.card, "checkpoints.txt", needed=False)


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
    batches, loader = training_batches(settings, training, sharing, device)
    about = {"config": settings.as_dict(), "categories": [category._asdict() for category in training.categories],
             "num_classes": training.num_classes, "preprocessing": preprocessing.as_dict(),
             "class_weights": next((loss.class_weights.tolist() for loss in criterion.losses
                                    if getattr(loss, "class_weights", None) is not None), None),
             "card": {"revision": code_revision(), "data": fingerprint(training), "torch": str(torch.__version__)}}
    going = Training(settings, model, held, sharing, batches.steps, device, folder, about)
    going.restore()
    if settings.resumed is not None:
        settings.resumed.clear()                        # four times the model, for days
    train, first = going.train, going.epoch
    wrapped = in_parallel(model, sharing, device)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if first < train.epochs:
        say(f"parameters that train: {parameters}; epochs {first} to {train.epochs - 1} of {batches.steps} steps; "
            f"output: {folder}")
    log = Log(folder, settings.run.tensorboard, going.epoch, going.row)
    results: dict[str, Any] = dict(going.metrics) if first >= train.epochs else {}
    with going.signals:
        for epoch in range(first, train.epochs):
            averages = train_epoch(going, wrapped, criterion, batches, loader, training)
            share_statistics(going.scored)
            evaluated = epoch + 1 == train.epochs or (epoch + 1) % train.eval_every == 0
            results = evaluate_epoch(going, judge) if evaluated else {}
            if collapsed := next(filter(None, distributed.gather_objects(going.collapse.verdict())), None):
                say(collapsed)
            going.finish_epoch(averages, results, parameters)
            if distributed.is_main():
                log.write(going.row)
            if evaluated:
                going.try_to_write(judge.save, "results.json", needed=False)
            if distributed.any_of(going.signals.received is not None)[0]:
                leave(going)
    say(f"trained for {duration(going.trained)}, all runs together, without evaluation")
    usable, scored = going.usable(), sharding.whole(going.scored)
    if not going.try_to_write(lambda: going.files.export("final", usable), "final.pth", needed=False):
        raise OSError(f"training has ended, and final.pth could not be written: make room, and --resume auto "
                      f"--output_dir {folder} writes it")
    going.try_to_write(going.files.card, "checkpoints.txt", needed=False)
    if distributed.is_main() and train.epochs > first:
        picture_of_detections(scored, judge, preprocessing, folder, device)
    log.close()
    return results


def in_parallel(model: nn.Module, sharing: Sharing, device: torch.device) -> nn.Module:
    """``model`` as several processes train it; one that is alone, or whose weights are shared out, as it is."""
    if sharing.images > sharing.batch_size and any(isinstance(module, nn.modules.batchnorm._BatchNorm)
                                                   for module in model.modules()):
        say(f"batch norm: takes the statistics of each batch of {sharing.batch_size} images, so gradients depend on how "
            f"the {sharing.images} of a step are shared out; --backbone_norm group does not")
    if not distributed.is_distributed() or sharding.is_sharded(model):
        return model
    # Filters of one pixel have strides of several kinds, which costs a copy of a few of them.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def train_epoch(going: Training, wrapped: nn.Module, criterion: nn.Module, batches: RandomBatches, loader: DataLoader,
                training: Any) -> dict[str, float]:
    """The steps of the epoch that are left, with checkpoints in between, and the averages of all of them."""
    run, train, epoch = going.settings.run, going.train, going.epoch
    start, before = time.perf_counter(), going.trained
    progress = Progress(f"epoch {epoch}", run.print_every, train.epochs - 1 - epoch, done=going.step)
    if going.progress is not None:
        progress.load_state_dict(going.progress)

    def after_step(step: int, values: Mapping[str, float]) -> None:
        if going.ema is not None and values:
            going.ema.update_parameters(going.model)
        if going.steps is not None:
            going.steps.write(epoch, step, values)
        going.step, going.progress = step + 1, progress.state_dict()
        going.trained = before + time.perf_counter() - start
        due = run.save_every_minutes > 0 and time.monotonic() - going.saved >= 60 * run.save_every_minutes
        stop, save = distributed.any_of(going.signals.received is not None, due and distributed.is_main())
        if stop or save and going.step < batches.steps:
            going.save()
        if stop:
            leave(going)

    going.begin_randomness()
    if going.step == batches.steps:                     # its evaluation was broken off
        return progress.averages()
    batches.set_epoch(epoch, going.step)
    try:
        return train_one_epoch(wrapped, criterion, loader, batches.steps, going.optimizer, going.schedule, going.device,
                               epoch, first_step=going.step, accumulate=going.sharing.accumulate,
                               max_norm=train.clip_max_norm, amp=going.amp, scaler=going.scaler, held=going.held,
                               guard=going.guard, collapse=going.collapse, after_step=after_step, progress=progress)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    # Out here, where nothing holds on to what was computed any more.
    trial = trial_of(going.settings, training, going.model, criterion, going.amp, going.device, going.optimizer)
    raise MemoryError(out_of_memory_message(going.guard.doing, trial))


def evaluate_epoch(going: Training, judge: Judge) -> dict[str, Any]:
    """What the judge says after an epoch. All is saved before, so that a signal in between may leave at once."""
    going.save()
    if distributed.any_of(going.signals.received is not None)[0]:
        leave(going)
    if going.written == (going.epoch, going.step):
        going.signals.leave_at_once = goodbye(going)
    title = f"evaluation {going.epoch}"
    try:
        return judge(sharding.whole(going.scored), title)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(f"out of memory in {title}, which computes as many images at once as --batch_size says: give "
                          f"less, with --global_batch_size for the same steps, or smaller images (--image_size); what "
                          f"was saved before is unharmed") from None
    finally:
        going.signals.leave_at_once = None


def fed_sizes(training: Any) -> list[tuple[int, int]]:
    """(height, width) of ``DRAWS`` images as training feeds them: of few images, several times each."""
    sizes = [(int(h), int(w)) for h, w in training.sizes.tolist()]
    chosen = [sizes[i] for i in np.linspace(0, len(sizes) - 1, DRAWS).round().astype(int)]
    return drawn_sizes(training.transforms, chosen, range(DRAWS))


def trial_of(settings: Settings, training: Any, model: nn.Module, criterion: nn.Module, amp: str, device: torch.device,
             optimizer: torch.optim.Optimizer | None = None) -> Trial:
    """A step of this data's worst batch; ``auto`` precision is tried as the one that takes most."""
    objects = [len(labels) for labels in training.labels_of_images()]
    return Trial(settings, fed_sizes(training), objects, training.num_classes, model, criterion,
                 "off" if amp == "auto" else amp, device, optimizer)


def goodbye(going: Training) -> str:
    """The last line of a training that leaves before its end."""
    again = f"the same command with --resume auto --output_dir {going.files.folder}"
    place = f"epoch {going.epoch}, step {going.step} of {going.steps_per_epoch}"
    if going.written == (going.epoch, going.step):
        return f"saved at {place}: go on with {again}"
    there = "the last checkpoint of this run is of epoch {}, step {}".format(*going.written) if going.written else \
        "this run has saved no checkpoint"
    return f"NOT SAVED at {place}, and {there}: make room, and go on with {again}"


def leave(going: Training) -> None:
    """Raise ``Interrupted``, after a checkpoint was saved, or could not be."""
    going.try_to_write(going.files.card, "checkpoints.txt", needed=False)
    number, message = going.signals.received or signal.SIGTERM, goodbye(going)
    say(f"{signal.Signals(number).name}: {message}")
    raise Interrupted(message, number)


def share_statistics(model: nn.Module) -> None:
    """Rank 0's buffers for all processes: each gathered batch norm's statistics from its own images, but one model is
    evaluated and saved."""
    if distributed.is_distributed():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


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
