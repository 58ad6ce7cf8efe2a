"""What a run is to do: configurations out of presets, checkpoints and what the user typed; contradictions refused."""
from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from . import checkpoint, config, engines
from .backbone import fitting_norm, has_statistics, scratch_norm
from .backbone.resnet import SIZES as RESNETS
from .config import DataConfig, ModelConfig, RunConfig, TrainConfig
from .distributed import say
from .presets import PRESETS
from .structures import Category


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a run needs to know, decided."""
    name: str
    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    run: RunConfig
    resumed: dict[str, Any] | None              # the checkpoint of --resume
    frozen: dict[str, Any] | None               # that of --frozen_weights, where nothing is resumed
    begun: dict[str, Any] | None                # that of --finetune
    categories: list[Category] | None           # the class table of the first or the second
    note: str = ""                              # what else to say at start
    automatic: bool = False                     # whether --resume auto chose the checkpoint
    typed: frozenset[str] = frozenset()         # the flags that somebody typed
    changed: tuple[str, ...] = ()               # of the model, since the checkpoint was written

    def as_dict(self) -> dict[str, Any]:
        """What a checkpoint remembers."""
        return {"name": self.name, "model": dataclasses.asdict(self.model), "train": dataclasses.asdict(self.train),
                "data": dataclasses.asdict(self.data)}


def models_with(option: str) -> str:
    """``", which X, Y have"``: a preset of each architecture that has an option, for the message that another has not."""
    names = {type(preset.model): name for name, preset in reversed(PRESETS.items())
             if option in (field.name for field in dataclasses.fields(preset.model))}
    return f", which {', '.join(reversed(names.values()))} {'have' if len(names) > 1 else 'has'}" if names else ""


def decide(typed: dict[str, Any], name: str | None = None, given: bool = False) -> Settings:
    """The flags that were typed, and the preset's name where one was -> settings, in the order: the architecture's
    default, the preset, the checkpoint's configuration, what was typed. ``given``: the data comes from Python, and from
    no place that a flag names. Says what it chose. Raises ValueError for what the chosen model does not have."""
    resume = typed.get("resume", "")
    resumed = contents(resume, typed) if resume else None
    frozen = checkpoint.load(typed["frozen_weights"]) if typed.get("frozen_weights") and resumed is None else None
    refuse_two_beginnings(typed)
    refuse_two_places(typed, given)
    begun = checkpoint.load(typed["finetune"]) if typed.get("finetune") else None
    known, source = next(((content, typed[flag]) for content, flag in ((frozen, "frozen_weights"), (begun, "finetune"))
                          if content is not None), (resumed, resume))
    remembered = (known or {}).get("config", {})
    if not isinstance(remembered, dict) or "name" not in remembered:            # of another program
        remembered = {}
    name = name or remembered.get("name")
    if name is None and known is not None:
        name = name_by_shapes(known["model"], source)
    if name is None:
        name = "detr_resnet50" if given or typed.get("coco_path") or typed.get("data") else "tiny_deformable_detr"
    if name not in PRESETS:
        raise ValueError(f"--model {name} is not known{config.nearest(name, PRESETS)} "
                         f"Known are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if remembered and name != remembered["name"]:
        raise ValueError(f"--model {name}: {source} holds a {remembered['name']}; leave --model out")
    model, recipe = fine_tuning(preset.model, preset.train) if begun is not None else (preset.model, preset.train)
    parts: dict[str, Any] = {"model": model, "train": recipe, "data": preset.data, "run": RunConfig()}
    allowed = {field.name for base in parts.values() for field in dataclasses.fields(base)}
    for flag in typed:
        if flag not in allowed:
            raise ValueError(f"--{flag}: {name} has no such option{models_with(flag)}"
                             f"{config.nearest(flag, allowed, '--')}")
    for part, base in parts.items():
        fields = {field.name for field in dataclasses.fields(base)}
        before = remembered.get(part, {})
        if resumed is None and part == "train":
            before = {}                                                 # a training of its own
        if part == "data":
            before = without_places(before, typed, begun is not None, given, source)
        if begun is not None:
            before = {k: v for k, v in before.items() if k not in ("frozen_weights", "lr_backbone")}    # that training's
        old = config.with_tuples({k: v for k, v in before.items() if k in fields})
        if strange := sorted(set(before) - fields):
            say(f"{source}: its settings {', '.join(strange)} are unknown to this version and have no effect")
        new = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in typed.items() if k in fields}
        if "lr_drop" in new:
            new.setdefault("lr_drop_epochs", None)                      # it takes the place of preset's or checkpoint's
        changed = {k: f"--{k} {config.shown(v)} (was {config.shown(old[k])})" for k, v in new.items()
                   if k in old and old[k] != v}
        elsewhere = [text for k, text in changed.items() if k in PLACES and k != "remove_difficult" and typed.get("eval")]
        if elsewhere:                                                   # nothing of the model has changed by that
            say(f"the evaluation reads other data than {source} names: {', '.join(elsewhere)}")
        if others := [text for text in changed.values() if text not in elsewhere]:
            say(f"changed since {source}: {', '.join(others)}")
        if part == "model":
            of_model = tuple(changed.values())
        if part == "model" and before:
            old = once(base) | old
        parts[part] = config.replace(base, old | new)
    parts["model"] = fitting_norm(parts["model"], typed)
    settings = Settings(name, resumed=resumed, frozen=frozen, begun=begun,
                        categories=class_table(known) if begun is None else None, changed=of_model, **parts)
    refuse_what_is_not_there(settings, typed, given)
    return settings


def contents(resume: str, typed: dict[str, Any]) -> dict[str, Any]:
    """What the file of ``--resume`` holds: a checkpoint, or an exported model, which has all but weights that can be
    loaded."""
    if typed.get("engine", "pytorch") != "pytorch":
        return engines.read(resume)
    if engines.is_exported(resume):
        raise ValueError(f"{resume} is an exported model, which PyTorch does not run: --eval --engine onnxruntime "
                         f"evaluates it; to train or to predict, give the checkpoint that it was made of")
    return checkpoint.load(resume)


def once(model: ModelConfig) -> dict[str, Any]:
    """What models were before these settings were there, for checkpoints that are silent about them."""
    return {name: value for name, value in (("padding", "legacy"), ("box_prior", False)) if hasattr(model, name)}


def as_it_was(name: str, remembered: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a preset's model as a checkpoint remembers it."""
    return config.replace(PRESETS[name].model, once(PRESETS[name].model) | dict(remembered))


# What of a data configuration says where data is and what it is, and not how images become a model's input.
PLACES = ("data", "dataset_file", "coco_path", "coco_panoptic_path", "remove_difficult", "no_flip_classes", "cache_mode")


def without_places(before: dict[str, Any], typed: dict[str, Any], begun: bool, given: bool,
                   source: str) -> dict[str, Any]:
    """What a checkpoint remembers of its data, without what does not hold any more: nothing of its place where other
    data is fine-tuned on (``begun``) or ``given``, and not ``--data`` where ``--coco_path`` is typed, or the other way
    round."""
    if begun:
        return {k: v for k, v in before.items() if k not in PLACES}
    if given:
        return {k: v for k, v in before.items() if k not in PLACES or k == "no_flip_classes"}
    for flag, others in (("data", ("coco_path", "coco_panoptic_path")), ("coco_path", ("data", "remove_difficult"))):
        if typed.get(flag) is not None and before.get(others[0]) is not None:
            since = f"the evaluation reads other data than {source} names" if typed.get("eval") else \
                f"changed since {source}"
            say(f"{since}: --{flag} {typed[flag]} takes the place of --{others[0]} {before[others[0]]}")
            before = {k: v for k, v in before.items() if k not in (flag, *others)}
    return before


def fine_tuning(model: ModelConfig, recipe: TrainConfig) -> tuple[ModelConfig, TrainConfig]:
    """A preset's recipe for weights that have learnt before: half the learning rates, that of the backbone, too, which
    rise over fifty steps and fall to zero in a cosine; 50 epochs, or as many as the preset has where these are fewer."""
    return (dataclasses.replace(model, lr_backbone=model.lr_backbone / 2),
            dataclasses.replace(recipe, lr=recipe.lr / 2, lr_schedule="cosine", warmup_steps=50,
                                epochs=min(recipe.epochs, 50)))


def refuse_two_beginnings(typed: dict[str, Any]) -> None:
    """ValueError where weights would have to come from two places."""
    for flag in ("resume", "frozen_weights", "backbone_weights", "pretrained_backbone", "from_scratch"):
        if typed.get("finetune") and typed.get(flag):
            raise ValueError(f"--finetune and --{flag} are two places for weights to come from; choose one"
                             + (": a fine-tuning goes on with --resume alone" if flag == "resume" else ""))
    if typed.get("finetune") and typed.get("eval"):
        raise ValueError("--finetune begins a training; to evaluate a checkpoint, --eval --resume it")


def refuse_two_places(typed: dict[str, Any], given: bool) -> None:
    """ValueError where data would have to come from two places."""
    if typed.get("data") is not None and typed.get("coco_path") is not None:
        raise ValueError("--data and --coco_path are two places of data; choose one (--data knows COCO's layout too)")
    for flag in ("data", "dataset_file", "coco_path", "coco_panoptic_path", "remove_difficult", "cache_mode"):
        if given and flag in typed:
            raise ValueError(f"--{flag} is about files, and the data comes from Python: leave --{flag} out, or the data "
                             f"sets that main was given")


def class_table(resumed: dict[str, Any] | None) -> list[Category] | None:
    """The class table in a checkpoint; None where there is no checkpoint, or it has none."""
    rows = (resumed or {}).get("categories")
    return rows and [Category(**row) for row in rows]


def name_by_shapes(state_dict: dict[str, Any], source: str) -> str:
    """The preset of a checkpoint that says nothing of its configuration: ``detr_resnet50`` where its shapes fit."""
    if class_rows(state_dict) is None:
        raise ValueError(f"{source} has no class_embed.weight: it is not a DETR checkpoint")
    if classes_that_fit(PRESETS["detr_resnet50"].model, state_dict) is not None:        # first: all others take seconds
        return "detr_resnet50"
    fitting = [name for name, preset in PRESETS.items() if classes_that_fit(preset.model, state_dict) is not None]
    raise ValueError(f"{source} has no configuration inside, and does not fit detr_resnet50. "
                     + (f"It fits --model {' or --model '.join(fitting)}" if fitting else
                        f"It fits none of {', '.join(PRESETS)} either; give --model and the flags it was trained with"))


def class_rows(state_dict: dict[str, Any]) -> int | None:
    """Rows of a checkpoint's class head: ``class_embed.weight``, or ``class_embed.0.weight`` where each decoder layer
    has its own."""
    return next((len(weight) for name, weight in state_dict.items()
                 if re.search(r"(^|\.)class_embed(\.\d+)?\.weight$", name)), None)


def without_weights(model_config: ModelConfig, num_classes: int) -> torch.nn.Module:
    """The model, for the names and shapes of its tensors alone."""
    with torch.device("meta"):
        return model_config.build(num_classes)[0]


def classes_that_fit(model_config: ModelConfig, state_dict: dict[str, Any]) -> int | None:
    """With how many classes a model has exactly the names and shapes of a checkpoint; None: with no number."""
    rows = class_rows(state_dict) or 0
    for num_classes in (rows, rows - 1):                            # one row more where "no object" has one
        if num_classes < 1:
            break
        found = checkpoint.differences(without_weights(model_config, num_classes), state_dict)
        if found.missing or found.unexpected:
            break
        if not found.wrong_shape:
            return num_classes
    return None


def refuse_what_is_not_there(settings: Settings, typed: dict[str, Any], given: bool = False) -> None:
    """Nothing that was asked for is ignored: what this version cannot do, or what has no effect, is an error."""
    model, data, run = settings.model, settings.data, settings.run
    if data.data is not None and data.dataset_file != "coco":
        raise ValueError(f"--data is for boxes and masks of objects; --dataset_file {data.dataset_file} has its data "
                         f"below --coco_path")
    if data.remove_difficult and data.data is None:
        raise ValueError("--remove_difficult is about Pascal VOC, which --data names; COCO's annotations mark nothing as "
                         "difficult")
    if not given and data.coco_path is None and data.data is None and model.in_channels not in (1, 3):
        raise ValueError(f"--in_channels {model.in_channels}: the synthetic data are pictures; name data with so many "
                         f"channels with --coco_path or --data")
    refuse_drops(settings.train, typed)
    refuse_other_optimizer(settings)
    for flag, useless, why in without_effect(settings):
        if flag in typed and useless:
            raise ValueError(f"--{flag} has no effect {why}; leave it out")
    if run.engine != "pytorch":
        if not (run.eval and run.resume):
            missing = " ".join(["--eval"] * (not run.eval) + ["--resume model.onnx"] * (not run.resume))
            raise ValueError(f"--engine {run.engine} evaluates an exported model: add {missing}")
        fixed = [change for change in settings.changed if not change.startswith("--aux_loss ")]
        if fixed or run.compile:
            raise ValueError(f"--engine {run.engine}: the model is as it was exported, so that "
                             f"{(fixed or ['--compile'])[0].split()[0]} would have no effect; leave it out")
    if run.auto_batch_size and "batch_size" in typed:
        raise ValueError("--auto_batch_size chooses --batch_size: leave one of them out")
    if run.fsdp and run.compile:
        raise ValueError("--fsdp and --compile have not been made to work together: leave one of them out")
    if run.start_epoch and settings.resumed is None:
        raise ValueError("--start_epoch needs --resume: there is nothing to go on from")
    if "world_size" in typed and run.world_size != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(f"--world_size {run.world_size}: processes are started with "
                         f"torchrun --nproc-per-node={run.world_size} main.py ...")
    if model.from_scratch and model.backbone_norm == "frozen" and has_statistics(model.backbone):
        batch = "" if scratch_norm(model.backbone).endswith("batch") else ", or batch where --batch_size is 8 or more"
        raise ValueError(f"--from_scratch with --backbone_norm frozen would fix random statistics; add "
                         f"{scratch_norm(model.backbone)}{batch}")
    if model.from_scratch and model.lr_backbone <= 0 and settings.begun is None and settings.resumed is None:
        raise ValueError("--from_scratch with --lr_backbone 0 would freeze a random backbone; "
                         "give it a learning rate, such as that of --lr")
    for flag in ("backbone_weights", "pretrained_backbone"):
        if getattr(run, flag) and model.from_scratch:
            raise ValueError(f"--from_scratch and --{flag} contradict each other; choose one")
        if getattr(run, flag) and (run.eval or run.resume):
            raise ValueError(f"--{flag} begins a training; --eval and --resume take all weights from the checkpoint, so "
                             f"leave it out")
    if run.backbone_weights and run.pretrained_backbone:
        raise ValueError("--backbone_weights and --pretrained_backbone contradict each other; choose one")
    if not run.eval:
        model.check_training()
    if model.heads_of_layers and not model.aux_loss and not run.eval:
        raise ValueError("--no_aux_loss with box refinement would leave the heads of all layers but the last untrained, "
                         "though each layer refines the boxes of the one before: leave --no_aux_loss out")


def refuse_drops(train: TrainConfig, typed: dict[str, Any]) -> None:
    """Drops of the learning rate that contradict each other or never come."""
    if "lr_drop" in typed and "lr_drop_epochs" in typed:
        raise ValueError("--lr_drop and --lr_drop_epochs are two ways to say when the learning rates drop; choose one")
    drops = train.lr_drop_epochs or ()
    if any(later <= earlier for earlier, later in zip(drops, drops[1:])):
        raise ValueError(f"--lr_drop_epochs {config.shown(drops)}: each must be greater than the one before; "
                         f"give --lr_drop_epochs {config.shown(tuple(sorted(set(drops))))}")
    if "lr_drop_epochs" in typed and train.lr_schedule == "step" and drops and drops[-1] >= train.epochs:
        raise ValueError(f"--lr_drop_epochs {config.shown(drops)}: a drop after {drops[-1]} epochs has no effect, since "
                         f"training ends after --epochs {train.epochs}; leave it out, or give more --epochs")


def refuse_other_optimizer(settings: Settings) -> None:
    """A training that goes on with the state of another optimizer than it had."""
    resumed, source, sgd = settings.resumed or {}, settings.run.resume, settings.train.sgd
    if settings.run.eval or not {"optimizer", "epoch"} <= resumed.keys():
        return
    was_sgd = any("nesterov" in group for group in resumed["optimizer"]["param_groups"])        # an option SGD alone has
    if was_sgd != sgd:
        was, now, remedy = ("SGD", "AdamW", "add --sgd") if was_sgd else ("AdamW", "SGD", "leave --sgd out")
        raise ValueError(f"{source} was trained with {was}, whose state means nothing to {now}: {remedy}; or begin anew "
                         f"with weights alone: --resume the best.pth or final.pth beside it, with another --output_dir")


def without_effect(settings: Settings) -> list[tuple[str, bool, str]]:
    """Flags, whether they are useless with these settings, and why."""
    train, data, run = settings.train, settings.data, settings.run
    masks, panoptic = getattr(settings.model, "masks", False), data.dataset_file == "coco_panoptic"
    exact = "x" in data.image_size
    without_encoder = hasattr(settings.model, "num_feature_levels") and not settings.model.enc_layers
    return [("max_size", exact, "where --image_size is exact"), ("multi_scale", exact, "where --image_size is exact"),
            *[(flag, train.lr_schedule != "step", f"with --lr_schedule {train.lr_schedule} (step has drops)")
              for flag in ("lr_drop", "lr_drop_epochs")],
            ("least_scale", exact, "where --image_size is exact"),
            ("least_scale", not data.multi_scale, "with --no_multi_scale"),
            *[(flag, exact, "where --image_size is exact: nothing is padded")
              for flag in ("bucket_train", "bucket_eval")],
            *[(flag, data.aug == "none", "with --aug none")
              for flag in ("flip", "no_flip_classes", "color_jitter", "scale_jitter", "mosaic", "multi_scale",
                           "least_scale", "random_crop")],
            *[(flag, run.eval, "with --eval")
              for flag in ("aug", "flip", "no_flip_classes", "color_jitter", "scale_jitter", "mosaic",
                           "repeat_threshold", "show_batch", "class_weights", "freeze", "ignore_regions",
                           "fast_images")],
            *[(flag, data.scale_jitter is not None, "with --scale_jitter, which takes its place")
              for flag in ("multi_scale", "least_scale", "random_crop")],
            ("no_flip_classes", not data.flip, "with --no_flip"),
            ("ignore_regions", panoptic, "with --dataset_file coco_panoptic, in which every segment is an object"),
            ("frozen_stages", settings.model.from_scratch, "with --from_scratch, which trains the whole backbone"),
            ("lr_backbone", "backbone" in train.freeze.replace(" ", "").split(","), "with --freeze backbone"),
            ("frozen_stages", run.eval, "with --eval"), ("bucket_train", run.eval, "with --eval"),
            *[(flag, not masks, "without --masks") for flag in ("mask_loss_coef", "dice_loss_coef")],
            ("panoptic_threshold", not (masks and panoptic), "without --masks and --dataset_file coco_panoptic"),
            ("coco_panoptic_path", not panoptic, f"with --dataset_file {data.dataset_file}: add --dataset_file "
             f"coco_panoptic, or"),
            ("fold_norms", settings.model.backbone_norm != "frozen" or settings.model.backbone not in RESNETS,
             "without a ResNet whose normalisations are frozen"),
            ("fold_norms", run.eval, "with --eval, which always folds"),
            ("frozen_weights", run.eval, "with --eval: all weights are those of --resume"),
            ("cache_mode", data.cache_mode and run.eval, "with --eval, which reads each image once"),
            *[(flag, without_encoder, "without encoder layers, which alone use positions")
              for flag in ("position_embedding", "position_embedding_scale", "pe_temperature")],
            *[(flag, settings.model.position_embedding == "learned", "with --position_embedding learned, which has none")
              for flag in ("pe_temperature", "position_embedding_scale")],
            *[(flag, not getattr(settings.model, "denoising", False), "without --denoising")
              for flag in ("dn_number", "dn_box_noise_scale", "dn_label_noise_ratio")],
            *[(flag, run.eval, "with --eval, which denoises nothing")
              for flag in ("dn_number", "dn_box_noise_scale", "dn_label_noise_ratio")],
            *[(flag, bool(getattr(settings.model, "frozen_weights", None)),
               "with --frozen_weights, whose detector does not learn")
              for flag in ("denoising", "dn_number", "dn_box_noise_scale", "dn_label_noise_ratio")],
            ("lr_batch", train.lr_rule == "none", "with --lr_rule none"),
            ("skip_at_most", train.non_finite == "stop", "with --non_finite stop"),
            ("amp", run.eval and train.amp != "off", "with --eval, which computes in float32"),
            *[(flag, run.eval, "with --eval")
              for flag in ("lr", "weight_decay", "sgd", "lr_schedule", "warmup_steps", "clip_max_norm", "ema_decay",
                           "global_batch_size", "lr_rule", "lr_batch", "loss_normalizer", "non_finite", "skip_at_most",
                           "save_every_minutes", "log_steps", "activation_checkpointing", "auto_batch_size", "fsdp")],
            ("epochs", run.eval, "with --eval"), ("tensorboard", run.eval, "with --eval"),
            ("start_epoch", run.eval, "with --eval"), ("eval_every", run.eval, "with --eval")]
