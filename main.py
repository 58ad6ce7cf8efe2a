"""The command line: flags -> configurations -> build -> train or evaluate. No Namespace leaves this file."""
from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import BatchSampler, DataLoader

from datasets import build_dataset, build_evaluators, collate, published_classes
from datasets.augment import Mosaic, labels_of
from datasets.check import HowFar, check
from datasets.coco import CocoDetection
from datasets.drawn import Drawn
from datasets.examination import counted, few
from datasets.formats import coco_layout, recognise
from datasets.sampler import EvaluationBatches, EvaluationShard, TrainingBatches, TrainingSampler, repeat_factors
from datasets.sheet import sheet
from datasets.synthetic import synthetic_data, synthetic_panoptic
from datasets.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    describe,
    eval_transforms,
    make_transforms,
    normalisation,
    resized,
)
from detr import checkpoint, config, distributed, visualize
from detr.architectures.deformable_detr import DeformableDETRConfig
from detr.architectures.detr import DETRConfig
from detr.backbone import (
    Backbone,
    backbone_of,
    body_of,
    has_pretrained,
    has_statistics,
    pretrained,
    scratch_norm,
    statistics,
)
from detr.config import DataConfig, RunConfig, TrainConfig
from detr.deformable_attention import MSDeformAttn, choose_path
from detr.distributed import say
from detr.finetune import adapt, counts, detector, freeze, layout, query_usage, table
from detr.losses import balanced_weights
from detr.presets import ARCHITECTURES, PRESETS
from detr.settings import Settings, class_table, decide
from detr.structures import Category, NonFiniteError
from engine import Progress, duration, evaluate, post_process, train_one_epoch

# Title of each group of flags in --help, and the dataclass or the fields that it shows. A flag that several architectures
# have shows the default of the first; the others' are in their presets.
GROUPS: list[tuple[str, type, tuple[str, ...] | None]] = [
    ("run", RunConfig, None),
    ("data", DataConfig, None),
    ("training", TrainConfig, None),
    ("backbone", DETRConfig, ("backbone", "dilation", "backbone_norm", "from_scratch", "frozen_stages", "in_channels",
                              "feature_strides", "padding", "lr_backbone", "position_embedding")),
    ("transformer", DETRConfig, ("enc_layers", "dec_layers", "dim_feedforward", "hidden_dim", "dropout", "nheads",
                                 "num_queries", "pre_norm")),
    ("masks", DETRConfig, ("masks", "frozen_weights", "mask_loss_coef", "dice_loss_coef", "panoptic_threshold")),
    ("matching", DETRConfig, ("set_cost_class", "set_cost_bbox", "set_cost_giou")),
    ("losses", DETRConfig, ("aux_loss", "bbox_loss_coef", "giou_loss_coef", "eos_coef")),
    ("Deformable DETR and models with proposals", DeformableDETRConfig,
     ("with_box_refine", "two_stage", "query_content", "num_feature_levels", "enc_n_points", "dec_n_points",
      "position_embedding_scale", "cls_loss_coef", "focal_alpha", "lr_backbone_names", "lr_linear_proj_names",
      "lr_linear_proj_mult")),
]

# What a training leaves in its folder.
OUTPUTS = ("checkpoint*.pth", "log.txt", "curves.png", "detections.png", "batch.png", "results*.json", "panoptic*",
           "eval", "tensorboard")


class Flag(argparse.Action):
    """Stores a value, and that it was typed: presets and checkpoints change defaults, never what was typed."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
        namespace.typed = getattr(namespace, "typed", frozenset()) | {self.dest}


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest flag when it does not know one."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:         # type: ignore[override]
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            named = [word for word in unknown if word.startswith("-")] or unknown
            self.error("unknown: " + "; ".join(f"{word}{config.nearest(word.split('=')[0], flags)}" for word in named))
        return known

    def error(self, message: str) -> NoReturn:
        """Without argparse's list of all flags, which would push the message off the screen."""
        self.exit(2, f"{self.prog}: {message}. See --help\n")


def get_args_parser() -> argparse.ArgumentParser:
    """All flags, without ``--help``, so that it can be a parent."""
    parser = Parser("DETR", add_help=False, allow_abbrev=False)
    parser.add_argument("--model", action=Flag, metavar="NAME",
                        help="preset: its settings hold where nothing else is typed. One of " + ", ".join(PRESETS))
    for title, dataclass, names in GROUPS:
        config.add_flags(parser.add_argument_group(title), dataclass, Flag, names)
    return parser


def settle(args: argparse.Namespace, given: tuple[Any, Any] | None = None) -> Settings:
    """Flags -> settings; says what it chose. ``given``: data sets from Python, see ``main``. Raises ValueError for what
    the chosen model does not have."""
    typed = config.typed_flags(args, [TrainConfig, DataConfig, RunConfig, *ARCHITECTURES])
    settings = decide(typed, args.model, given is not None)
    return settings if given is None else fitting(settings, typed, *given)


def choose_device(wanted: str, typed: bool) -> str:
    """``wanted``; or, where the default cuda is not there, mps or the cpu. A device that was chosen is never replaced."""
    try:
        kind = torch.device(wanted).type
    except RuntimeError:
        raise ValueError(f"--device {wanted}: PyTorch knows no such device; use cuda, cpu or mps") from None
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if there.get(kind, True):
        return wanted
    if typed or wanted != RunConfig.device:
        raise ValueError(f"--device {wanted}: PyTorch finds none on this machine; use --device cpu")
    return "mps" if there["mps"] else "cpu"


def without_workers(settings: Settings) -> Settings:
    """Where few cores do everything, processes that read images take from training more than they give (measured on two:
    73 images a second without, 53 with two of them). Said; a typed ``--num_workers`` is never replaced."""
    cores, workers = os.cpu_count() or 1, settings.run.num_workers
    if cores > 2 or torch.get_num_threads() < cores:
        return settings
    note = f"images are read between steps, since {cores} cores compute; --num_workers {workers} would start processes"
    return dataclasses.replace(settings, run=dataclasses.replace(settings.run, num_workers=0), note=note)


def choose_precision(amp: str, device: torch.device) -> str:
    """``auto`` -> ``bf16`` where the device computes in it fast, else ``off``; said."""
    if amp != "auto":
        return amp
    if device.type == "cpu":
        fast = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    say(f"training in {'bfloat16' if fast else 'float32, since this processor has no fast bfloat16'} (--amp auto)")
    return "bf16" if fast else "off"


def build(settings: Settings, validation: Any, training: Any, preprocessing: Preprocessing,
          device: torch.device) -> tuple[nn.Module, nn.Module, dict]:
    """Model, criterion and post-processing, the model with its first weights: those of ``--resume``, what fits of
    ``--finetune``, ImageNet's in the backbone, or random ones where the user or the preset says so. They are on the CPU;
    ``device`` is for what has to be computed first."""
    num_classes = validation.num_classes
    model, criterion, postprocessors = settings.model.build(num_classes)
    if training is not None and settings.train.class_weights == "auto":
        objects = torch.cat(list(training.labels_of_images())).bincount(minlength=num_classes)
        weights = balanced_weights(objects)
        criterion.weigh_classes(weights)
        say("class weights: " + ", ".join(f"{category.name} {weights[category.label]:.2f}"
                                          for category in training.categories if objects[category.label]))
    resumed, run, backbone = settings.resumed, settings.run, settings.model.backbone
    if resumed is not None:
        checkpoint.load_model(model, resumed["model"], run.resume)
        say(f"weights: {run.resume}")
    elif settings.begun is not None:
        begin(settings, model, training, preprocessing, device)
    elif settings.frozen is not None:
        source = settings.model.frozen_weights                                                  # type: ignore[attr-defined]
        checkpoint.load_model(model.detr, settings.frozen["model"], source)
        say(f"weights: {source}, frozen; the mask head's are random, and train")
    elif run.eval:
        say("weights: random, since --eval came without --resume")
    elif settings.model.from_scratch:
        norm = f"{settings.model.backbone_norm} norm and " if has_statistics(backbone) else ""
        say(f"weights: random; the whole backbone trains, with {norm}learning rate {settings.model.lr_backbone:g}")
    else:
        norm = scratch_norm(backbone)
        flags = " ".join(filter(None, ("--from_scratch", norm, "--lr_backbone LR")))
        scratch = f"to train the backbone from random weights, add {flags}"
        if not (run.backbone_weights or run.pretrained_backbone or has_pretrained(backbone)):
            fetch = ", or fetch timm's with --pretrained_backbone" if backbone.startswith("timm/") else ""
            raise ValueError(f"--backbone {backbone} has no weights that are fetched unasked: name a file with "
                             f"--backbone_weights FILE{fetch}; {scratch}")
        try:
            weights, source = pretrained(backbone) if run.backbone_weights is None else \
                (checkpoint.load(run.backbone_weights)["model"], run.backbone_weights)
        except OSError as error:
            raise type(error)(f"{error}. Training {settings.name} starts from ImageNet weights of {backbone}: name a "
                              f"file with --backbone_weights FILE; or, {scratch}") from None
        say(f"backbone weights: {source}; {fixed(backbone_of(model), settings.model.lr_backbone)}")
        checkpoint.load_backbone(body_of(model), weights, source)
    return model, criterion, postprocessors


USAGE = 64                      # training images by which queries are chosen where there are to be fewer


def begin(settings: Settings, model: nn.Module, training: Any, preprocessing: Preprocessing,
          device: torch.device) -> None:
    """The weights of ``--finetune`` that fit ``model``; says of each tensor what became of it."""
    source, content, train = settings.run.finetune, settings.begun, settings.train

    def built(num_classes: int, num_queries: int) -> nn.Module:
        return config.replace(settings.model, {"num_queries": num_queries}).build(num_classes)[0]

    shape = layout(built)
    before = counts(shape, content["model"], source)
    usage = None
    if before.queries is not None and settings.model.num_queries < before.queries:
        seen = copy.copy(training.dataset if isinstance(training, Mosaic) else training)
        seen.transforms = eval_transforms(preprocessing)
        images = range(0, len(seen), max(1, len(seen) // USAGE))[:USAGE]
        usage = query_usage(detector(built, shape, content["model"], source).to(device),
                            (collate([seen[i]]) for i in images), before.classes)
        say(f"usage of {source}'s {before.queries} queries: measured on {len(images)} training images")
    old = class_table(content) or published_classes(before.classes)
    adapted = adapt(shape, model, content["model"], old, training.categories, source, usage=usage, seed=train.seed)
    checkpoint.load_model(model, adapted.state_dict, source)
    say(f"weights: {source}, fine-tuned\n{table(adapted.rows)}")
    for note in adapted.notes:
        say(note)


def fixed(backbone: Backbone, lr_backbone: float) -> str:
    """What of a pretrained backbone does not train, in words."""
    if lr_backbone <= 0:
        return "all of it stays fixed (--lr_backbone 0)"
    stages = backbone.frozen_stages
    first = "first stage" if stages == 1 else f"first {stages} stages"
    return f"its stem and {first} stay fixed (--frozen_stages {stages})" if stages else "all of it trains"


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, which follows faster while it is young."""
    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], steps: int | torch.Tensor) -> None:
        weight = 1 - min(decay, (1 + int(steps)) / (10 + int(steps)))
        for mean, value in zip(averaged, current):
            mean.lerp_(value, weight) if mean.is_floating_point() else mean.copy_(value)
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def make_optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or with ``--sgd`` SGD with momentum, as published for Deformable DETR. Each group has its learning rate."""
    if train.sgd:
        return torch.optim.SGD(groups, lr=train.lr, momentum=0.9, weight_decay=train.weight_decay)
    return torch.optim.AdamW(groups, lr=train.lr, weight_decay=train.weight_decay)


def drops_before(epoch: int, train: TrainConfig) -> int:
    """How often a step schedule has divided the learning rates by ten when ``epoch`` begins."""
    if train.lr_drop_epochs is None:
        return epoch // train.lr_drop
    return sum(drop <= epoch for drop in train.lr_drop_epochs)


def learning_rate_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig, steps_per_epoch: int,
                           first_epoch: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The factor of all learning rates as a function of the optimizer step alone, so that resuming needs no memory."""
    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
        if train.lr_schedule == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / (train.epochs * steps_per_epoch))))
        return warm * 0.1 ** drops_before(step // steps_per_epoch, train)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=first_epoch * steps_per_epoch - 1)


def output_folder(settings: Settings) -> Path | None:
    """``--output_dir``; without it a training gets a new folder below ``outputs/``, a resumed one goes on in its own,
    and an evaluation has none. What an earlier training left there is set aside, never overwritten."""
    if settings.run.eval and not settings.run.output_dir:
        return None
    resume = settings.run.resume
    if resume and not settings.run.output_dir and "config" in settings.resumed and Path(resume).is_file():
        return Path(resume).parent
    folder = Path(settings.run.output_dir or Path("outputs") / settings.name)
    goes_on = resume and Path(resume).resolve().parent == folder.resolve()
    if not settings.run.output_dir:
        number = 2
        while folder.exists():
            folder, number = folder.with_name(f"{settings.name}-{number}"), number + 1
    elif (folder / "log.txt").exists() and not settings.run.eval and not goes_on:
        number = 1
        while (folder / f"earlier-{number}").exists():
            number += 1
        aside = folder / f"earlier-{number}"
        if distributed.is_main():
            aside.mkdir()
            for path in [path for pattern in OUTPUTS for path in folder.glob(pattern)]:
                shutil.move(path, aside / path.name)
        say(f"an earlier training's files were moved to {aside}")
    distributed.barrier()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(args: argparse.Namespace, data: tuple[Any, Any] | None = None) -> dict[str, Any]:
    """Run what the flags say; returns the last evaluation's results. ``data``: training and validation data sets from
    Python (``datasets.from_dataset``), instead of a folder's."""
    device_name = choose_device(args.device, "device" in getattr(args, "typed", ()))
    process = distributed.init(device_name, args.dist_url)                 # first, so that one process alone prints
    try:
        settings = settle(args, data)
        if process.device.type == "cpu" and "num_workers" not in config.typed_flags(args, [RunConfig]):
            settings = without_workers(settings)
        return run(settings, process.device, data)
    finally:
        distributed.close()


def run(settings: Settings, device: torch.device, given: tuple[Any, Any] | None = None) -> dict[str, Any]:
    """Data, model, and then evaluation or training. ``given``: see ``main``."""
    train, data = settings.train, settings.data
    world = distributed.world_size()
    missing = " (no cuda found)" if device.type != "cuda" and settings.run.device == "cuda" else ""
    say(f"model: {settings.name}; padding: {settings.model.padding}; "
        f"data: {'from Python' if given else data.data or data.coco_path or 'synthetic'}; device: {device}{missing}; "
        f"images per process x processes x accumulation = {train.batch_size} x {world} x 1 = "
        f"{train.batch_size * world}")
    if settings.note:
        say(settings.note)
    training, validation, preprocessing = given_data(settings, *given) if given else load_data(settings)
    torch.manual_seed(train.seed)
    model, criterion, postprocessors = build(settings, validation, training, preprocessing, device)
    held = [] if settings.run.eval else freeze_parts(model, train.freeze)
    model, criterion = model.to(device), criterion.to(device)
    masks, panoptic = getattr(settings.model, "masks", False), data.dataset_file == "coco_panoptic"
    if masks:
        postprocessors["segm"].rle = True                           # what is scored and saved; small
    if masks and panoptic:
        things = {category.label for category in validation.categories if category.isthing}
        postprocessors["panoptic"] = settings.model.panoptic(
            {label: label in things for label in range(validation.num_classes)}, crop=backbone_of(model).exact)
    if paths := {choose_path(device, module.path) for module in model.modules() if isinstance(module, MSDeformAttn)}:
        say(f"deformable attention: the {' and the '.join(sorted(paths))} path")
    only = body_of(model).only
    if only is not None and preprocessing.size != only:
        raise ValueError(f"--backbone {settings.model.backbone} takes images of {only[0]} x {only[1]} alone: give "
                         f"--image_size {only[0]}x{only[1]}, or use a backbone for any size")
    inexact = backbone_of(model).inexact
    if inexact:
        order = "" if data.bucket_eval else ", not in the order of the files (--no_bucket_eval)"
        say(f"--padding exact is not possible with {settings.model.backbone}: {inexact}. Evaluation batches images of "
            f"equal size alone{order}; in training, padding takes part")
    folder = output_folder(settings)
    judge = Judge(validation, criterion, postprocessors, settings, preprocessing, bool(inexact), folder, device)
    if training is None:
        results = judge(model, "evaluation")
        judge.save()
        files = ["results.json", *["results_masks.json"] * masks, *["panoptic.json"] * (masks and panoptic),
                 "eval/latest.pth"]
        say("saved: " + ", ".join(str(folder / file) for file in files) if folder else
            "nothing was saved; --output_dir DIR would keep the predictions as json")
        return results
    crowded = [n for n in map(len, training.labels_of_images()) if n > settings.model.num_queries]
    if crowded and (given or panoptic):                             # of other data check_data has said it
        say(f"{counted(len(crowded), 'training image')} with more objects than the {settings.model.num_queries} queries "
            f"can find, up to {max(crowded)}: --num_queries {max(crowded)} would do for all")
    names = {category.label: category.name for category in training.categories}
    say("augmentation: " + "; ".join(describe(training, names)))
    if settings.run.show_batch and distributed.is_main():
        pictures = sheet(training, preprocessing, names, visualize.draw_detections, visualize.side_by_side)
        pictures.save(folder / "batch.png")
        say(f"picture of the training images: {folder / 'batch.png'}")
    return fit(settings, training, model, criterion, judge, preprocessing, folder, device, held)


# Data.

def load_data(settings: Settings) -> tuple[Any, Any, Preprocessing]:
    """Training data (None with ``--eval``), validation data, and how images become the model's input. Where there is a
    training, the data is looked through first."""
    data, evaluated = settings.data, settings.run.eval
    masks, panoptic = getattr(settings.model, "masks", False), data.dataset_file == "coco_panoptic"
    coco_path, panoptic_path = data.coco_path, data.coco_panoptic_path
    if data.data is None and coco_path is None:
        synthetic = synthetic_panoptic if panoptic else synthetic_data
        if distributed.is_main():
            synthetic()                                             # made by one process, for all
        distributed.barrier()
        coco_path = os.fspath(synthetic())
        panoptic_path = panoptic_path or (coco_path if panoptic else None)
    elif not (evaluated or panoptic) and distributed.is_main():
        check_data(settings)
    distributed.barrier()
    preprocessing, ignore = preprocessing_of(settings), data.ignore_regions == "on" and not panoptic

    def dataset(split: str, categories: list[Category] | None) -> Any:
        return build_dataset(split, coco_path, data.dataset_file, data=data.data, coco_panoptic_path=panoptic_path,
                             return_masks=masks, categories=categories, cache_mode=data.cache_mode and not evaluated,
                             channels=settings.model.in_channels, ignore_regions=ignore and split == "train",
                             remove_difficult=data.remove_difficult)

    training = None if evaluated else dataset("train", settings.categories)
    validation = dataset("val", settings.categories if training is None else training.categories)
    return *with_transforms(settings, preprocessing, training, validation), preprocessing


def given_data(settings: Settings, training: Any, validation: Any) -> tuple[Any, Any, Preprocessing]:
    """The same for data sets from Python."""
    preprocessing = preprocessing_of(settings)
    training = None if settings.run.eval else training
    return *with_transforms(settings, preprocessing, training, validation), preprocessing


def fitting(settings: Settings, typed: dict[str, Any], training: Any, validation: Any) -> Settings:
    """``settings`` for data sets from Python, which have been told by themselves what they are to give. Raises ValueError
    where that contradicts what was typed, the model, or the checkpoint's classes."""
    model, table = settings.model, settings.categories
    regions = "off"
    for name, dataset in (("training", training), ("validation", validation)):
        if name == "training" and settings.run.eval:
            continue
        if not isinstance(dataset, CocoDetection):
            raise TypeError(f"the {name} data is a {type(dataset).__name__}; give what datasets.from_dataset makes of it")
        told = f"from_dataset(..., return_masks={getattr(model, 'masks', False)}, channels={model.in_channels})"
        if dataset.channels != model.in_channels:
            raise ValueError(f"the {name} data gives {dataset.channels} channels, and the model takes "
                             f"{model.in_channels}: {told}, or --in_channels {dataset.channels}")
        if getattr(model, "masks", False) and "masks" not in dataset.target(0):
            raise ValueError(f"the {name} data gives no masks, which --masks needs: {told}")
        if table is not None and list(dataset.categories) != list(table):
            other = "; for other classes, --finetune it" if settings.run.resume else ""
            raise ValueError(f"the {name} data has the classes {classes_in_words(dataset.categories)}, and "
                             f"{settings.run.resume or 'the training data'} {classes_in_words(table)}: ids and names "
                             f"have to be the same{other}")
        table = dataset.categories
        if name == "training":
            regions = "on" if dataset.ignore_regions else "off"
    if typed.get("ignore_regions", regions) != regions:
        raise ValueError(f"--ignore_regions {typed['ignore_regions']}: data from Python is told so itself: "
                         f"from_dataset(..., ignore_regions={typed['ignore_regions'] == 'on'})")
    if regions == "off" and settings.data.ignore_regions == "on" and not settings.run.eval:
        say("ignore regions: off; from_dataset(..., ignore_regions=True) gives them")
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, ignore_regions=regions))


def classes_in_words(table: Sequence[Category]) -> str:
    """Ids and names of the first classes of a table."""
    return few([f"{category.id} {category.name!r}" for category in table], 8)


def preprocessing_of(settings: Settings) -> Preprocessing:
    """How images become the model's input in evaluation."""
    mean_std = statistics(settings.model.backbone) or (IMAGENET_MEAN, IMAGENET_STD)
    return Preprocessing(config.parse_size(settings.data.image_size), settings.data.max_size,
                         *normalisation(*mean_std, settings.model.in_channels))


def with_transforms(settings: Settings, preprocessing: Preprocessing, training: Any, validation: Any) -> tuple[Any, Any]:
    """The data sets with the transforms that the settings ask for; those that were given stay as they are."""
    data = settings.data
    changed = data.aug != "none"                    # a checkpoint may remember what --aug none now switches off
    validation = copy.copy(validation)
    validation.transforms = make_transforms("val", preprocessing)
    if training is None:
        return None, validation
    transforms = make_transforms(
        "train", preprocessing, scales=None if data.multi_scale else (preprocessing.size,), least_scale=data.least_scale,
        flip=data.flip, crop=data.random_crop, aug=data.aug, color_jitter=data.color_jitter if changed else 0.0,
        scale_jitter=data.scale_jitter if changed else None,
        no_flip=labels_of(data.no_flip_classes or (), training.categories, "--no_flip_classes"))
    training, mosaic = copy.copy(training), data.mosaic if changed else 0.0
    training.transforms = None if mosaic else transforms
    return Mosaic(training, transforms, mosaic) if mosaic else training, validation


def check_data(settings: Settings) -> None:
    """Look through the data and say in brief what is wrong with it. Raises ValueError where training must not begin."""
    model, data, masks = settings.model, settings.data, getattr(settings.model, "masks", False)
    found = recognise(data.data) if data.data else coco_layout(data.coco_path)
    report = check(found, model.num_queries, masks=masks, channels=model.in_channels, parts=("train", "val"),
                   progress=HowFar("data check: image headers read"))
    if report.stops:
        place = data.data or f"--coco_path {data.coco_path}"
        raise ValueError(f"{report.brief()}\npython scripts/check_data.py {place}{' --masks' * masks} shows all of it")
    say(report.brief())


def freeze_parts(model: nn.Module, parts: str) -> list[nn.Module]:
    """``--freeze``: returns the modules that are to work as in evaluation."""
    if not parts:
        return []
    frozen = freeze(model, [parts])
    say(f"frozen: {parts}: {len(frozen.names)} parameter tensors stay as they are, and the statistics with them")
    return frozen.modules


class Judge:
    """Evaluates a model on the validation data, each image once over all processes."""

    def __init__(self, validation: Any, criterion: nn.Module, postprocessors: dict, settings: Settings,
                 preprocessing: Preprocessing, equal: bool, folder: Path | None, device: torch.device) -> None:
        """``equal``: no batch may have padding in it. Panoptic maps are written to ``folder``."""
        self.validation, self.criterion, self.postprocessors = validation, criterion, postprocessors
        self.folder = folder
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
        self.evaluators = build_evaluators(self.validation, "segm" in self.postprocessors, self.folder)
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
        curves.parent.mkdir(exist_ok=True)
        torch.save(box.eval, curves.with_suffix(".unfinished"))
        os.replace(curves.with_suffix(".unfinished"), curves)


def data_loader(dataset: Any, batches: Any, settings: Settings, device: torch.device,
                training: bool = False) -> DataLoader:
    """Batches. Workers of a training are started anew each epoch, with randomness of that epoch."""
    workers = settings.run.num_workers
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                      persistent_workers=workers > 0 and not training, pin_memory=device.type == "cuda")


def seed_epoch(seed: int, epoch: int) -> None:
    """Randomness that depends on seed, epoch and process alone, so that a resumed training goes on as an unbroken one."""
    torch.manual_seed(((seed * 1_000_003 + epoch) * 1_009 + distributed.rank()) % 2**63)


def fit(settings: Settings, training: Any, model: nn.Module, criterion: nn.Module, judge: Judge,
        preprocessing: Preprocessing, folder: Path, device: torch.device,
        held: Sequence[nn.Module] = ()) -> dict[str, Any]:
    """Train epoch by epoch; after each, evaluate, log and save. ``held`` are frozen parts."""
    train = settings.train
    process = distributed.rank(), distributed.world_size()
    repeats = None
    if settings.data.repeat_threshold:
        repeats = repeat_factors(training.labels_of_images(), settings.data.repeat_threshold)
        say(f"repeated images: {int((repeats > 1).sum())} of {len(repeats)} have a rare class; an epoch has "
            f"{int(repeats.sum())} images")
    if settings.data.bucket_train:
        sampler: Any = TrainingBatches(training.sizes, training.transforms, train.batch_size, *process, train.seed,
                                       repeats)
        loader = data_loader(Drawn(training), sampler, settings, device, training=True)
    else:
        sampler = TrainingSampler(len(training), *process, train.seed, repeats)
        loader = data_loader(training, BatchSampler(sampler, train.batch_size, drop_last=True), settings, device,
                             training=True)
    if len(loader) == 0:
        raise ValueError(f"--batch_size {train.batch_size} on {process[1]} processes needs "
                         f"{process[1] * train.batch_size} training images, and there are {len(training)}; lower it")
    optimizer = make_optimizer(settings.model.parameter_groups(model, train.lr), train)
    ema = moving_average(model, train.ema_decay) if train.ema_decay else None
    first_epoch = restore(settings, model, optimizer, ema)
    schedule = learning_rate_schedule(optimizer, train, len(loader), first_epoch)
    wrapped = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None) \
        if distributed.is_distributed() else model
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"parameters that train: {parameters}; epochs {first_epoch} to {train.epochs - 1} of {len(loader)} steps; "
        f"output: {folder}")
    log, amp = Log(folder, settings.run.tensorboard), choose_precision(train.amp, device)
    results: dict[str, Any] = {}
    start = time.perf_counter()
    for epoch in range(first_epoch, train.epochs):
        sampler.set_epoch(epoch)
        seed_epoch(train.seed, epoch)
        progress = Progress(f"epoch {epoch}", settings.run.print_every, train.epochs - 1 - epoch)
        averages = train_one_epoch(wrapped, criterion, loader, len(loader), optimizer, schedule, device, epoch,
                                   max_norm=train.clip_max_norm, amp=amp, held=held,
                                   after_step=ema and (lambda: ema.update_parameters(model)), progress=progress)
        last = epoch + 1 == train.epochs
        scored = ema.module if ema else model
        share_statistics(scored)
        evaluated = last or (epoch + 1) % train.eval_every == 0
        results = judge(scored, f"evaluation {epoch}") if evaluated else {}
        if distributed.is_main():
            state = {"model": scored.state_dict(), "optimizer": optimizer.state_dict(),
                     "lr_scheduler": schedule.state_dict(), "epoch": epoch, "config": settings.as_dict(),
                     "categories": [category._asdict() for category in training.categories],
                     "num_classes": training.num_classes,
                     "preprocessing": preprocessing.as_dict()}
            if ema:
                state |= {"training_model": model.state_dict(), "ema_steps": int(ema.n_averaged)}
            save_checkpoints(folder, state, train, epoch)
            log.write(epoch, averages, results, parameters)
        if evaluated:
            judge.save()
    say(f"trained for {duration(time.perf_counter() - start)}, evaluation and saving included")
    if distributed.is_main() and train.epochs > first_epoch:
        picture_of_detections(scored, judge, preprocessing, folder, device)
    log.close()
    return results


def share_statistics(model: nn.Module) -> None:
    """Rank 0's buffers for all processes: each gathered batch norm's statistics from its own images, but one model is
    evaluated and saved."""
    if distributed.is_distributed():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def restore(settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer, ema: AveragedModel | None) -> int:
    """Continue the checkpoint of ``--resume``: optimizer, averages; returns the first epoch to train. Learning rate and
    weight decay are those of the settings, since a typed ``--lr`` is meant."""
    resumed, run = settings.resumed, settings.run
    if resumed is None:
        return 0
    if "optimizer" not in resumed or "epoch" not in resumed:
        say(f"{run.resume} has weights only: training starts at epoch {run.start_epoch} with a new optimizer")
        return run.start_epoch
    wanted = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(resumed["optimizer"])
    except ValueError as error:
        flags = [f"--{name}" for name in ("lr_backbone", "from_scratch", "lr_backbone_names", "lr_linear_proj_names")
                 if hasattr(settings.model, name)] + ["--freeze"]
        raise ValueError(f"{run.resume}: its optimizer does not fit the parameters that train now ({error}); resume "
                         f"with the same {', '.join(flags)} as before") from None
    for group, (lr, weight_decay) in zip(optimizer.param_groups, wanted):
        group["lr"], group["weight_decay"] = lr, weight_decay
    if ema is not None:
        ema.module.load_state_dict(resumed["model"])
        ema.n_averaged.fill_(resumed.get("ema_steps", 0))
    if "training_model" in resumed:
        checkpoint.load_model(model, resumed["training_model"], run.resume)
    first = run.start_epoch or resumed["epoch"] + 1
    if first >= settings.train.epochs:
        raise ValueError(f"{run.resume} has finished epoch {resumed['epoch']} of {settings.train.epochs}: nothing is "
                         f"left to train; give more --epochs, or --eval")
    say(f"resumed from {run.resume}: epoch {first} is next")
    return first


def save_checkpoints(folder: Path, state: dict[str, Any], train: TrainConfig, epoch: int) -> None:
    """``checkpoint.pth`` is always the newest; one more stays from before each drop of the learning rate, and from
    every hundredth epoch, as published."""
    checkpoint.save(folder / "checkpoint.pth", state)
    drops = train.lr_schedule == "step" and drops_before(epoch + 1, train) > drops_before(epoch, train)
    if drops or (epoch + 1) % 100 == 0:
        checkpoint.save(folder / f"checkpoint{epoch:04}.pth", state)


class Log:
    """``log.txt`` with one JSON object a line an epoch, the curve drawn from it, and TensorBoard where asked for."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.file, self.curves, self.writer = folder / "log.txt", folder / "curves.png", None
        if self.file.exists():
            visualize.read_log(self.file)               # a line that was cut short is an error now, not after an epoch
        if tensorboard and distributed.is_main():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
            self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, epoch: int, training: dict[str, float], test: dict[str, Any], parameters: int) -> None:
        row = {**{f"train_{name}": value for name, value in training.items()},
               **{f"test_{name}": value for name, value in test.items()}, "epoch": epoch, "n_parameters": parameters}
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
        visualize.draw_curves(self.file, self.curves)
        if self.writer is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, epoch)
            for title, key in (("coco", "coco_eval_bbox"), ("coco_masks", "coco_eval_masks")):
                for name, value in zip(visualize.COCO_NUMBERS, test.get(key, ())):
                    self.writer.add_scalar(f"{title}/{name}", value, epoch)
            for key in ("PQ_all", "PQ_th", "PQ_st"):
                for name, value in test.get(key, {}).items():
                    self.writer.add_scalar(f"panoptic/{key}/{name}", value, epoch)
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


if __name__ == "__main__":
    parser = Parser("DETR", description="Train and evaluate detection transformers.", parents=[get_args_parser()],
                    allow_abbrev=False)
    try:
        main(parser.parse_args())
    except (ValueError, OSError, ImportError, NonFiniteError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
