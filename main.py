"""The command line: flags -> configurations -> build -> train or evaluate. No Namespace leaves this file."""
from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from datasets import build_dataset, collate, published_classes
from datasets.augment import Mosaic, labels_of
from datasets.check import HowFar, check
from datasets.coco import CocoDetection, OtherClasses
from datasets.examination import counted, few
from datasets.formats import coco_layout, recognise
from datasets.report import write_report
from datasets.sheet import sheet
from datasets.synthetic import synthetic_data, synthetic_panoptic
from datasets.transforms import Preprocessing, describe, eval_transforms, make_transforms
from detr import checkpoint, config, distributed, engines, visualize
from detr.architectures.dab_detr import DABDETRConfig
from detr.architectures.deformable_detr import DeformableDETRConfig
from detr.architectures.detr import DETRConfig
from detr.architectures.dino import DINOConfig
from detr.architectures.proposal_detr import ProposalDETRConfig
from detr.backbone import (
    Backbone,
    backbone_of,
    body_of,
    has_pretrained,
    has_statistics,
    pretrained,
    scratch_norm,
)
from detr.backbone.resnet import fold_norms
from detr.config import DataConfig, DenoisingConfig, RunConfig, TrainConfig
from detr.deformable_attention import MSDeformAttn, choose_path
from detr.distributed import say
from detr.finetune import adapt, counts, detector, freeze, layout, query_usage, table
from detr.loading import preprocessing_of
from detr.losses import balanced_weights
from detr.memory import checkpoint_activations, compile_model, keep_freed_memory
from detr.optimization import Sharing, share_out
from detr.precision import be_deterministic
from detr.presets import ARCHITECTURES, PRESETS
from detr.run_folder import RunFolder
from detr.settings import Settings, class_table, decide
from detr.structures import Category, NonFiniteError
from detr.trial import chosen_batch_size
from training import Interrupted, Judge, fit, trial_of

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
    ("losses of all models but DETR", DeformableDETRConfig, ("cls_loss_coef", "focal_alpha")),
    ("multi-scale models", DeformableDETRConfig, ("num_feature_levels", "enc_n_points", "dec_n_points")),
    ("Deformable DETR", DeformableDETRConfig,
     ("with_box_refine", "two_stage", "query_content", "position_embedding_scale", "lr_backbone_names",
      "lr_linear_proj_names", "lr_linear_proj_mult")),
    ("models with proposals", ProposalDETRConfig, ("box_prior",)),
    ("DAB-DETR, DAB-Deformable-DETR", DABDETRConfig, ("num_patterns",)),
    ("DAB-DETR, DINO", DABDETRConfig, ("pe_temperature", "num_select")),
    ("denoising", DenoisingConfig, ("denoising", "dn_number", "dn_box_noise_scale", "dn_label_noise_ratio")),
    ("DINO", DINOConfig, ("interm_loss_coef",)),
]

# What a training leaves in its folder.
OUTPUTS = ("checkpoint*.pth", "checkpoints.txt", "best.*", "final.*", "non_finite*.pth", "log.txt", "steps.txt",
           "curves.png", "detections.png", "batch.png", "results*.json", "report.html", "panoptic*", "eval",
           "tensorboard")


# Flags that say where the weights of a training come from, which has begun with them once it goes on.
BEGINNINGS = ("finetune", "backbone_weights", "pretrained_backbone", "frozen_weights")


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
            self.error(" ".join(f"unknown: {word}{config.nearest(word.split('=')[0], flags)}" for word in named))
        return known

    def error(self, message: str) -> NoReturn:
        """Without argparse's list of all flags, which would push the message off the screen."""
        self.exit(2, f"{self.prog}: {message}{'' if message.endswith('?') else '.'} See --help\n")


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
    automatic = typed.get("resume") == "auto"
    if automatic:
        typed = resume_newest(typed)
    settings = dataclasses.replace(decide(typed, args.model, given is not None), automatic=automatic,
                                   typed=frozenset(typed))
    return settings if given is None else fitting(settings, typed, *given)


def resume_newest(typed: dict[str, Any]) -> dict[str, Any]:
    """``--resume auto``: with the newest whole checkpoint of the output folder, or without ``--resume``; said."""
    if not typed.get("output_dir"):
        raise ValueError("--resume auto looks for a checkpoint in --output_dir: name the folder of the training")
    folder = Path(typed["output_dir"])
    found = RunFolder(folder).newest() if distributed.is_main() else None
    found = distributed.gather_objects(found)[0]                        # another process might see other files
    if found is None and any(folder.glob("checkpoint*.pth")):
        raise ValueError(f"--resume auto: no checkpoint in {folder} can be read; move them away to begin anew, or "
                         f"--resume a copy")
    if found is None:
        if typed.get("eval"):
            raise ValueError(f"--eval --resume auto: {folder} has no checkpoint to evaluate")
        say(f"--resume auto: {folder} has no checkpoint to go on from; training begins")
        return {name: value for name, value in typed.items() if name != "resume"}
    begun = [name for name in BEGINNINGS if typed.get(name)]
    for name in begun:
        say(f"--{name} {typed[name]} has begun this training, which goes on from {found}")
    return {name: value for name, value in typed.items() if name not in begun} | {"resume": str(found)}


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
    if run.engine != "pytorch":
        say(f"model and weights: {run.resume}, run by {run.engine}")
        return engines.in_place_of(model, criterion, postprocessors, run.resume, device)
    if resumed is not None:
        try:
            checkpoint.load_model(model, resumed["model"], run.resume)
        except ValueError as error:
            if settings.changed:
                raise ValueError(f"{error}; changed since it was written, and perhaps why: "
                                 f"{', '.join(settings.changed)}") from None
            raise
        say(f"weights: {run.resume}")
    elif settings.begun is not None:
        begin(settings, model, training, preprocessing, device)
    elif settings.frozen is not None:
        source = frozen_file(settings)
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


def output_folder(settings: Settings) -> Path | None:
    """``--output_dir``; without it a training gets a new folder below ``outputs/``, a resumed one goes on in its own,
    and an evaluation has none. What an earlier training left there is set aside, never overwritten."""
    if settings.run.eval and not settings.run.output_dir:
        return None
    resume = settings.run.resume
    whole = settings.resumed is not None and {"config", "optimizer", "epoch"} <= settings.resumed.keys()
    if whole and not settings.run.output_dir and Path(resume).is_file():
        return Path(resume).parent
    folder = Path(settings.run.output_dir or Path("outputs") / settings.name)
    goes_on = whole and Path(resume).resolve().parent == folder.resolve()
    if not settings.run.output_dir:
        number = 2
        while folder.exists():
            folder, number = folder.with_name(f"{settings.name}-{number}"), number + 1
    elif any(any(folder.glob(pattern)) for pattern in OUTPUTS) and not settings.run.eval and not goes_on:
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
    if settings.run.deterministic:
        be_deterministic(device)
    missing = " (no cuda found)" if device.type != "cuda" and settings.run.device == "cuda" else ""
    sharing = None if settings.run.auto_batch_size else shared_out(settings)
    say(f"model: {settings.name}; padding: {settings.model.padding}; "
        f"data: {'from Python' if given else data.data or data.coco_path or 'synthetic'}; device: {device}{missing}; "
        + (sharing_in_words(sharing) if sharing else "images per process: the most that fit (--auto_batch_size)"))
    if settings.note:
        say(settings.note)
    if getattr(settings.model, "denoising", False) and not settings.run.eval and frozen_file(settings) is None:
        say("denoising: on; " + ", ".join(f"--{name} {getattr(settings.model, name):g}" for name in
                                          ("dn_number", "dn_box_noise_scale", "dn_label_noise_ratio")))
    training, validation, preprocessing = given_data(settings, *given) if given else load_data(settings)
    torch.manual_seed(train.seed)
    model, criterion, postprocessors = build(settings, validation, training, preprocessing, device)
    held = [] if settings.run.eval else freeze_parts(model, train.freeze)
    model, criterion = model.to(device), criterion.to(device)
    criterion.normalizer = train.loss_normalizer
    if settings.run.fold_norms:
        say(f"folded into convolutions: {fold_norms(model)} normalisations")
    if settings.run.activation_checkpointing:
        say(f"computed again in the backward pass: {few(checkpoint_activations(model), 4)}")
    if settings.run.compile:
        say(f"compiled at their first call: {few(compiled(model, device), 4)}")
    if sharing is None:
        settings = with_batch_size_that_fits(settings, training, model, criterion, device)
        sharing = shared_out(settings)
        say(sharing_in_words(sharing))
    train = dataclasses.replace(settings.train, batch_size=sharing.batch_size)
    settings = dataclasses.replace(settings, train=train)
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
                 "eval/latest.pth", *["report.html"] * report(settings, judge, results, device)]
        say("saved: " + ", ".join(str(folder / file) for file in files) if folder else
            "nothing was saved; --output_dir DIR would keep the predictions as json, and a report")
        return results
    queries = settings.model.queries
    crowded = [n for n in map(len, training.labels_of_images()) if n > queries]
    if crowded and (given or panoptic):                             # of other data check_data has said it
        say(f"{counted(len(crowded), 'training image')} with more objects than the {queries} queries can find, up to "
            f"{max(crowded)}: --num_queries {-(-max(crowded) * settings.model.num_queries // queries)} would do for all")
    names = {category.label: category.name for category in training.categories}
    say("augmentation: " + "; ".join(describe(training, names)))
    if settings.run.show_batch and distributed.is_main():
        pictures = sheet(training, preprocessing, names, visualize.draw_detections, visualize.side_by_side)
        pictures.save(folder / "batch.png")
        say(f"picture of the training images: {folder / 'batch.png'}")
    return fit(settings, training, model, criterion, judge, preprocessing, folder, device, sharing, held)


def with_batch_size_that_fits(settings: Settings, training: Any, model: torch.nn.Module, criterion: torch.nn.Module,
                              device: torch.device) -> Settings:
    """``--auto_batch_size``: the settings with the largest batch that fits, and as many images a step as the learning
    rates are for, unless the user said how many."""
    train = settings.train
    if not train.global_batch_size:
        images = max(min(train.lr_batch, len(training)) // distributed.world_size(), 1) * distributed.world_size()
        say(f"--auto_batch_size: a step has {images} images, as many as the learning rates are for (--lr_batch); "
            f"--global_batch_size N takes another number")
        train = dataclasses.replace(train, global_batch_size=images)
        settings = dataclasses.replace(settings, train=train)
    chosen = chosen_batch_size(trial_of(settings, training, model, criterion, train.amp, device))
    return dataclasses.replace(settings, train=dataclasses.replace(train, batch_size=chosen))


def report(settings: Settings, judge: Judge, results: dict[str, Any], device: torch.device) -> bool:
    """Write an evaluation's ``report.html`` into its folder, in the main process. Where that cannot be done it is said;
    the numbers have been printed before. Returns whether the report is there."""
    if judge.folder is None or not distributed.is_main():
        return False
    run, data = settings.run, settings.data
    about = {"model": settings.name, "weights": run.resume or "random",
             "data": data.data or data.coco_path or judge.validation.image_folder,
             "settings": f"--batch_size {settings.train.batch_size}, --padding {settings.model.padding}, --coco_eval "
                         f"{run.coco_eval}; float32 on {device}; torch {torch.__version__}"}
    try:
        write_report(judge.folder / "report.html", judge.evaluators[0], results, judge.validation, visualize.viewable,
                     about)
    except OSError as error:
        say(f"NOT SAVED: {error}")
        return False
    return True


def compiled(model: nn.Module, device: torch.device) -> list[str]:
    """``--compile``: the names of the parts. Raises ValueError where the machine cannot."""
    try:
        return compile_model(model, device)
    except RuntimeError as error:
        raise ValueError(error) from error


def shared_out(settings: Settings) -> Sharing:
    """How the images of a step come together; in an evaluation there are no steps to share out."""
    train, run = settings.train, settings.run
    chosen = run.eval or run.auto_batch_size or "batch_size" in settings.typed
    images = 0 if run.eval else train.global_batch_size
    return share_out(train.batch_size, images, distributed.world_size(), fixed=chosen)


def sharing_in_words(sharing: Sharing) -> str:
    """What the first line says of the images of a step."""
    return (f"images per process x processes x accumulation = {sharing.batch_size} x {sharing.world_size} x "
            f"{sharing.accumulate} = {sharing.images}")


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

    try:
        training = None if evaluated else dataset("train", settings.categories)
        validation = dataset("val", settings.categories if training is None else training.categories)
    except OtherClasses as error:
        raise ValueError(f"{error}{remedy_for_classes(settings)}") from None
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
            raise ValueError(f"the {name} data has the classes {classes_in_words(dataset.categories)}, and "
                             f"{settings.run.resume or frozen_file(settings) or 'the training data'} "
                             f"{classes_in_words(table)}: ids and names have to be the same"
                             f"{remedy_for_classes(settings)}")
        table = dataset.categories
        if name == "training":
            regions = "on" if dataset.ignore_regions else "off"
    if typed.get("ignore_regions", regions) != regions:
        raise ValueError(f"--ignore_regions {typed['ignore_regions']}: data from Python is told so itself: "
                         f"from_dataset(..., ignore_regions={typed['ignore_regions'] == 'on'})")
    if regions == "off" and settings.data.ignore_regions == "on" and not settings.run.eval:
        say("ignore regions: off; from_dataset(..., ignore_regions=True) gives them")
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, ignore_regions=regions))


def frozen_file(settings: Settings) -> str | None:
    """The box model that a mask head is trained on."""
    return getattr(settings.model, "frozen_weights", None)


def remedy_for_classes(settings: Settings) -> str:
    """What there is to do about data that has other classes than the checkpoint, for the end of a message."""
    if settings.run.engine != "pytorch":
        return "; an exported model keeps its classes: export a checkpoint that has those of the data (scripts/export.py)"
    if settings.frozen is not None:
        return "; for other classes, --finetune the box model first, and freeze what comes of it"
    return "; for other classes, --finetune it" if settings.run.resume else ""


def classes_in_words(table: Sequence[Category]) -> str:
    """Ids and names of the first classes of a table."""
    return few([f"{category.id} {category.name!r}" for category in table], 8)


def with_transforms(settings: Settings, preprocessing: Preprocessing, training: Any, validation: Any) -> tuple[Any, Any]:
    """The data sets with the transforms that the settings ask for; those that were given stay as they are. Training
    images are normalised by ``collate``: a single one is ``Unscaled``, or float32 with ``--color_jitter``."""
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
        no_flip=labels_of(data.no_flip_classes or (), training.categories, "--no_flip_classes"), in_batch=True)
    training, mosaic = copy.copy(training), data.mosaic if changed else 0.0
    training.transforms = None if mosaic else transforms
    if data.fast_images != "off":
        if settings.model.in_channels not in (1, 3):
            raise ValueError(f"--fast_images {data.fast_images}: not with --in_channels {settings.model.in_channels}, "
                             f"whose images Pillow never resizes; leave it out")
        if mosaic or type(training) is not CocoDetection:
            raise ValueError(f"--fast_images {data.fast_images}: not with " + (
                "--mosaic, which joins images of several sizes" if mosaic else "panoptic data or data sets from Python") +
                "; leave it out")
        training.fast_images = data.fast_images
        say(f"training images: resized by PyTorch instead of Pillow (--fast_images {data.fast_images}); pixels differ by "
            f"1 or 2 of 255 at few places" + ", and large JPEGs are decoded smaller" * (data.fast_images == "reduced"))
    return Mosaic(training, transforms, mosaic) if mosaic else training, validation


def check_data(settings: Settings) -> None:
    """Look through the data and say in brief what is wrong with it. Raises ValueError where training must not begin."""
    model, data, masks = settings.model, settings.data, getattr(settings.model, "masks", False)
    found = recognise(data.data) if data.data else coco_layout(data.coco_path)
    report = check(found, model.queries, masks=masks, channels=model.in_channels, parts=("train", "val"),
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


if __name__ == "__main__":
    parser = Parser("DETR", description="Train and evaluate detection transformers.", parents=[get_args_parser()],
                    allow_abbrev=False)
    try:
        arguments = parser.parse_args()
        if not torch.cuda.is_available():                              # this process is ours alone
            keep_freed_memory()
        main(arguments)
    except Interrupted as interrupted:                                 # which was said
        sys.exit(128 + interrupted.signal)
    except (ValueError, OSError, ImportError, MemoryError, NonFiniteError) as error:
        text = str(error)
        if "DataLoader worker process" in text:                         # the worker's own words are the last line
            text = text.strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
        sys.exit(f"{type(error).__name__}: {text}")
