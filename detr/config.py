"""Configuration: frozen dataclasses, and flags made from their fields.

One word everywhere: a field's name is the flag's name is the attribute's name. An architecture's own fields are the
dataclass in its file; here are those that all share.
"""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")


def flag(default: Any, help: str, choices: Iterable[Any] | None = None, least: float | None = None) -> Any:
    """A dataclass field that is also a flag of the command line. A field of type ``tuple[X, ...]`` takes several values;
    ``choices`` and ``least``, the smallest value, then hold for each."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices and tuple(choices),
                                                        "least": least})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What all architectures have; each adds its own and ``build(num_classes) -> model, criterion, postprocessors``."""
    backbone: str = flag("resnet50", "backbone by name: of the ResNets and PVTs here, or timm/NAME")
    dilation: bool = flag(False, "DC5: the backbone's last stage keeps the resolution of the one before")
    backbone_norm: str = flag("frozen", "normalisation of a ResNet: 'frozen' statistics of a pretrained one, or "
                              "trainable 'batch' or 'group' norm", ("frozen", "batch", "group"))
    from_scratch: bool = flag(False, "train the backbone from random weights, all of it")
    frozen_stages: int | None = flag(None, "stages of a pretrained backbone that stay fixed, the first with the stem; "
                                     "without it one, as published, where more are used", least=0)
    in_channels: int = flag(3, "channels of the images: 3 is RGB, 1 grey; others are read from .npy and TIFF files",
                            least=1)
    feature_strides: tuple[int, ...] | None = flag(None, "strides of the backbone's maps that the transformer sees, "
                                                   "fine to coarse; several only where it has levels", least=1)
    padding: str = flag("legacy", "'exact': what an image gets does not depend on the batch it is in; 'legacy': padding "
                        "takes part, as published", ("exact", "legacy"))
    lr_backbone: float = flag(1e-5, "learning rate of the backbone; 0 freezes it", least=0)
    position_embedding: str = flag("sine", "positions of the feature map", ("sine", "learned"))
    enc_layers: int = flag(6, "encoder layers", least=0)
    dec_layers: int = flag(6, "decoder layers", least=1)
    dim_feedforward: int = flag(2048, "width of the feed-forward blocks", least=1)
    hidden_dim: int = flag(256, "width of the transformer", least=4)
    dropout: float = flag(0.1, "dropout in the transformer, a probability", least=0)
    nheads: int = flag(8, "attention heads", least=1)
    num_queries: int = flag(100, "object queries: the most objects an image can have", least=1)
    aux_loss: bool = flag(True, "train every decoder layer's predictions, not only the last one's")
    set_cost_class: float = flag(1, "class weight in the matching cost")
    set_cost_bbox: float = flag(5, "L1 box weight in the matching cost")
    set_cost_giou: float = flag(2, "generalized IoU weight in the matching cost")
    bbox_loss_coef: float = flag(5, "weight of the L1 box loss")
    giou_loss_coef: float = flag(2, "weight of the generalized IoU loss")

    @property
    def queries(self) -> int:
        """How many objects an image can have."""
        return self.num_queries

    @property
    def heads_of_layers(self) -> bool:
        """Whether each decoder layer refines boxes with heads of its own."""
        return False

    def check_training(self) -> None:
        """ValueError for what can be evaluated, but not trained."""

    def build(self, num_classes: int) -> tuple[Any, Any, dict[str, Any]]:
        """Model with random weights, criterion and post-processing, for labels ``0..num_classes-1``."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")

    def parameter_groups(self, model: Any, lr: float) -> list[dict[str, Any]]:
        """A model's trainable parameters with their learning rates. As published, everything with "backbone" in its
        name, learned positions included, has the backbone's."""
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [{"params": [p for name, p in trained if "backbone" not in name], "lr": lr},
                {"params": [p for name, p in trained if "backbone" in name], "lr": self.lr_backbone}]


@dataclasses.dataclass(frozen=True)
class MaskConfig(ModelConfig):
    """What architectures with a mask head have besides."""
    masks: bool = flag(False, "train the mask head for segmentation")
    frozen_weights: str | None = flag(None, "checkpoint of a box model to freeze while its mask head is trained")
    mask_loss_coef: float = flag(1, "weight of the masks' focal loss")
    dice_loss_coef: float = flag(1, "weight of the masks' dice loss")
    panoptic_threshold: float = flag(0.85, "least score of a query that becomes a segment of a panoptic map", least=0)

    def panoptic(self, is_thing_map: dict[int, bool], crop: bool) -> Any:
        """Post-processing to panoptic maps; ``is_thing_map``: which labels are things; ``crop``: padding is exact."""
        raise NotImplementedError(f"{type(self).__name__} does not say how panoptic maps are made")

    def check_masks(self) -> None:
        """ValueError for options that contradict each other."""
        if self.frozen_weights and not self.masks:
            raise ValueError("--frozen_weights is for training a mask head on a fixed detector: add --masks")
        if self.masks and self.feature_strides is not None:
            raise ValueError("--feature_strides: a mask head takes all maps of the backbone; leave it out")


@dataclasses.dataclass(frozen=True)
class DenoisingConfig:
    """What configurations of architectures that can learn by denoising have besides; a base beside another."""
    denoising: bool = flag(False, "in training, let further queries find objects again of which they are told the class "
                           "and the box with noise; DINO does by itself, unless --no_denoising says otherwise")
    dn_number: int = flag(100, "denoising queries of an image, without DINO's negatives, which are as many again: groups "
                          "of one for each object, as many as fit, at least one; below 50 it is half of the number of "
                          "groups", least=1)
    dn_box_noise_scale: float = flag(0.4, "noise of their boxes: how far a side of DINO's may move, as a part of half "
                                     "the box (negatives twice that); how far others' centres may, and what part their "
                                     "sizes change by. 0.4 is that of the published configurations, DINO's training "
                                     "scripts give 1.0", least=0)
    dn_label_noise_ratio: float = flag(0.5, "noise of their classes: half of this is the share that are drawn anew",
                                       least=0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a model is trained."""
    lr: float = flag(1e-4, "learning rate of everything but the backbone", least=0)
    batch_size: int = flag(2, "images per process", least=1)
    global_batch_size: int = flag(0, "images per optimizer step over all processes: where --batch_size times their "
                                  "number is less, gradients of several batches are added; 0: one batch", least=0)
    lr_rule: str = flag("none", "what another number of images per step than --lr_batch does to the learning rates: "
                        "nothing, times the 'sqrt' of the ratio, or 'linear': times the ratio",
                        ("none", "sqrt", "linear"))
    lr_batch: int = flag(16, "images per optimizer step that the learning rates, warm-up and --ema_decay are meant for",
                         least=1)
    loss_normalizer: str = flag("process", "by what losses are divided: 'process', as published, or 'global', the same "
                                "for all images of an optimizer step, however they are shared out (but for denoising "
                                "queries, whose number is the batch's)", ("process", "global"))
    weight_decay: float = flag(1e-4, "weight decay of the optimizer")
    sgd: bool = flag(False, "SGD with momentum 0.9 instead of AdamW")
    epochs: int = flag(300, "passes over the training data", least=1)
    lr_drop: int = flag(200, "epochs after which a step schedule divides the learning rates by ten, each time", least=1)
    lr_drop_epochs: tuple[int, ...] | None = flag(None, "epochs after which a step schedule divides the learning rates "
                                                  "by ten; instead of --lr_drop", least=1)
    lr_schedule: str = flag("step", "'step' drops every --lr_drop epochs, or after --lr_drop_epochs; 'cosine' falls "
                            "smoothly to zero at --epochs", ("step", "cosine"))
    warmup_steps: int = flag(0, "optimizer steps over which the learning rates rise from zero", least=0)
    clip_max_norm: float = flag(0.1, "largest gradient norm; larger gradients are scaled down, 0 leaves them")
    ema_decay: float = flag(0.0, "evaluate and save an exponential moving average of the weights too; 0 keeps none")
    class_weights: str = flag("off", "'auto': classes with few objects count more in the class loss, by the inverse "
                              "square root of their numbers", ("off", "auto"))
    freeze: str = flag("", "parts of the model that stay as they are, with commas between: backbone, encoder, decoder, "
                       "input_proj, queries, class_heads, box_heads, or the beginning of parameters' names")
    amp: str = flag("off", "mixed precision of the model's forward pass in training; losses stay float32. 'auto' is "
                    "'bf16' where the processor has it, said at start", ("off", "bf16", "fp16", "auto"))
    non_finite: str = flag("stop", "what to do where a loss or a gradient is no number: 'stop', or 'skip' that step, up "
                           "to --skip_at_most times", ("stop", "skip"))
    skip_at_most: int = flag(10, "steps that --non_finite skip leaves out before it stops", least=1)
    seed: int = flag(42, "seed of weights, augmentation and order")
    eval_every: int = flag(1, "epochs between evaluations; the last epoch is always evaluated", least=1)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a model is trained and evaluated on, and how images become its input."""
    data: str | None = flag(None, "your data: a folder or file in COCO's, YOLO's or Pascal VOC's format or a CSV of "
                            "boxes; which is recognised")
    dataset_file: str = flag("coco", "kind of data: 'coco' is COCO 2017 or anything in its layout")
    coco_path: str | None = flag(None, "folder with train2017/, val2017/ and annotations/; without it, synthetic data")
    coco_panoptic_path: str | None = flag(None, "folder of the panoptic annotations")
    remove_difficult: bool = flag(False, "leave out objects marked as difficult (VOC)")
    ignore_regions: str = flag("off", "'on': a query that lies in a crowd or an ignore region and has no object is not "
                               "told that there is none", ("on", "off"))
    image_size: str = flag("800", "short side of images, or HEIGHTxWIDTH to bring all to one size")
    max_size: int = flag(1333, "limit of the long side")
    multi_scale: bool = flag(True, "training draws the short side from --least_scale to 1 times --image_size")
    least_scale: float = flag(0.6, "least short side that training draws, as a part of --image_size", least=0.01)
    random_crop: bool = flag(True, "crop half of the training images at random")
    aug: str = flag("published", "augmentation of the training: 'published', as --multi_scale, --random_crop, --flip and "
                    "so on say; 'none' is exactly what evaluation does", ("published", "none"))
    flip: bool = flag(True, "mirror half of the training images")
    no_flip_classes: tuple[str, ...] | None = flag(None, "classes whose left and right differ: images with one of them "
                                                   "are never mirrored")
    color_jitter: float = flag(0.0, "strength of random brightness, contrast, saturation and hue, such as 0.4", least=0)
    scale_jitter: tuple[float, ...] | None = flag(None, "least and greatest factor that training images are resized by, "
                                                  "such as 0.5 2, instead of --multi_scale and --random_crop", least=0.01)
    mosaic: float = flag(0.0, "share of training images that are put together from four, 0 to 1", least=0)
    repeat_threshold: float = flag(0.0, "classes on a smaller share of the images than this, such as 0.05, have their "
                                "images repeated in an epoch; 0: none", least=0)
    bucket_train: bool = flag(False, "batches of images alike in shape in training, which need less padding")
    bucket_eval: bool = flag(True, "the same in evaluation; without it, batches are in the order of the files")
    cache_mode: bool = flag(False, "keep all image files in memory, each process its own copy; they are still decoded "
                            "each time")
    fast_images: str = flag("off", "training images: 'on' resizes them by PyTorch, values differ by 1 or 2 of 255 at few "
                            "places, and AP was lower in three trainings (docs/performance.md); 'reduced' also decodes "
                            "large JPEGs at a part of their size",
                            ("off", "on", "reduced"))


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where and how a run takes place; nothing of it belongs to the model."""
    device: str = flag("cuda", "'cuda', 'cpu', 'mps'; where there is no cuda, the cpu, said in the first lines")
    output_dir: str = flag("", "folder for checkpoints, log.txt and pictures; empty: a new one below outputs/")
    resume: str = flag("", "checkpoint, path or URL, to go on from, or to evaluate; 'auto': the newest whole one in "
                       "--output_dir, if there is one")
    save_every_minutes: float = flag(15.0, "minutes between checkpoints within an epoch; 0: none", least=0)
    log_steps: bool = flag(False, "write loss, gradient norm and learning rate of every step to steps.txt")
    finetune: str = flag("", "checkpoint, path or URL, to begin from with your own classes: all but what has a row for "
                         "each class is kept, and of that classes of the same name")
    show_batch: bool = flag(False, "draw the first training images before and after augmentation, as batch.png in the "
                            "output folder")
    start_epoch: int = flag(0, "epoch to begin with; --resume sets it")
    eval: bool = flag(False, "evaluate and stop")
    backbone_weights: str | None = flag(None, "file with ImageNet weights of the backbone")
    pretrained_backbone: bool = flag(False, "fetch the weights that timm has for a timm backbone; others fetch theirs "
                                     "unasked")
    num_workers: int = flag(2, "processes that read images", least=0)
    world_size: int = flag(1, "number of processes; torchrun sets it")
    dist_url: str = flag("env://", "where processes meet; torchrun sets it")
    tensorboard: bool = flag(False, "write TensorBoard events to the output folder")
    print_every: float = flag(10.0, "seconds between progress lines")
    deterministic: bool = flag(False, "the same numbers in every run on the same machine, bit by bit; slower on a GPU")
    compile: bool = flag(False, "compile the model with torch.compile")
    fold_norms: bool = flag(False, "fold a ResNet's frozen normalisations into its convolutions in float32 training on "
                            "CPUs, too: faster, but rounded otherwise than the published runs")
    activation_checkpointing: bool = flag(False, "compute layers again in the backward pass instead of keeping what they "
                                          "computed: less memory, more time")
    auto_batch_size: bool = flag(False, "choose --batch_size by trying the worst batch of this data")
    fsdp: bool = flag(False, "share the model's weights out over the processes (FSDP2), for models too large for one GPU")
    engine: str = flag("pytorch", "what computes an evaluation: 'pytorch', or 'onnxruntime' for a file that "
                       "scripts/export.py made", ("pytorch", "onnxruntime"))
    coco_eval: str = flag("fast", "who computes COCO's numbers: 'fast' is hotcoco, whose numbers are pycocotools' to the "
                          "last bit", ("fast", "pycocotools"))


def validate(config: Any) -> None:
    """Refuse values outside a field's choices or below its least, and one value where a field has several, naming the
    flag."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        choices, least = field.metadata["choices"], field.metadata["least"]
        value, (kind, several) = getattr(config, field.name), kind_of(hints[field.name])
        if value is None and field.default is None:
            continue
        if several and not isinstance(value, tuple):
            raise ValueError(f"--{field.name} {value!r}: a list of {kind.__name__} is needed, even for one value")
        for one in value if several else [value]:
            if least is not None and not one >= least:
                raise ValueError(f"--{field.name} {shown(value)}: {'each' if several else 'it'} must be at least {least}")
            if choices and one not in choices:
                raise ValueError(f"--{field.name} {one!r} is not one of {', '.join(map(str, choices))}")


def kind_of(hint: Any) -> tuple[type, bool]:
    """A field's type -> that of one value, and whether the field has several: ``str | None`` -> str, False;
    ``tuple[int, ...] | None`` -> int, True."""
    if typing.get_origin(hint) is not tuple:
        hint = next((kind for kind in typing.get_args(hint) if kind is not type(None)), hint)
    return (typing.get_args(hint)[0], True) if typing.get_origin(hint) is tuple else (hint, False)


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with tuples for lists, which argparse, programs and checkpoints may have where a field is a tuple."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def shown(value: Any) -> str:
    """A field's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """``config`` with some fields changed, lists as tuples; an unknown name is an error that names the nearest field."""
    names = [field.name for field in dataclasses.fields(config)]                                # type: ignore[arg-type]
    for name in changes:
        if name not in names:
            raise ValueError(f"{type(config).__name__} has no option {name!r}{nearest(name, names)}")
    changed = dataclasses.replace(config, **with_tuples(changes))                               # type: ignore[type-var]
    validate(changed)
    return changed


def divide(flags: Mapping[str, Any], config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flags -> those of ``config``, and those of training, data and run; an unknown one is an error that names the
    nearest."""
    own = {field.name for field in dataclasses.fields(config)}
    shared = {field.name for part in (TrainConfig, DataConfig, RunConfig) for field in dataclasses.fields(part)}
    for name in flags:
        if name not in own | shared:
            raise ValueError(f"{type(config).__name__} has no option {name!r}{nearest(name, own | shared)}")
    return ({name: value for name, value in flags.items() if name in own},
            {name: value for name, value in flags.items() if name in shared})


def typed_flags(args: argparse.Namespace, configs: Iterable[type]) -> dict[str, Any]:
    """What the user decided among the fields of ``configs``: flags that were typed (``args.typed``, which ``main``'s
    parser leaves), and attributes that a program set to something else than the default (the first config's that has
    it, as in the parser). Lists come back as tuples."""
    typed: frozenset[str] = getattr(args, "typed", frozenset())
    defaults: dict[str, Any] = {}
    for config in configs:
        for field in dataclasses.fields(config):
            defaults.setdefault(field.name, field.default)
    given = with_tuples({name: getattr(args, name, default) for name, default in defaults.items()})
    return {name: value for name, value in given.items() if name in typed or value != defaults[name]}


def parse_size(text: str) -> int | tuple[int, int]:
    """``--image_size``: "800" -> 800, the short side; "256x320" -> (256, 320), height and width."""
    try:
        sides = tuple(int(side) for side in text.split("x"))
    except ValueError:
        sides = ()
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"--image_size {text}: the short side in pixels, such as 800, or HEIGHTxWIDTH, such as 256x320")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean X?"`` for the name most like ``name``, or nothing where there are none."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def add_flags(parser: argparse._ActionsContainer, config: type, action: type[argparse.Action],
              names: Iterable[str] | None = None) -> None:
    """A flag for each field of a dataclass, or for those in ``names``. A boolean becomes a switch with a ``--no_``
    form; help shows the one that changes its default. A tuple becomes a flag with one value or more."""
    types = typing.get_type_hints(config)
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name in names or fields:
        kind, default = types[name], fields[name].default
        help, choices = fields[name].metadata["help"], fields[name].metadata["choices"]
        if kind is bool:
            for spelling, value in ((f"--{name}", True), (f"--no_{name}", False)):
                text = argparse.SUPPRESS if value == default else help if value else f"not: {help}"
                parser.add_argument(spelling, dest=name, action=action, nargs=0, const=value, default=default,
                                    help=text)
            continue
        plain, several = kind_of(kind)
        parser.add_argument(f"--{name}", action=action, type=plain, default=default, choices=choices,
                            nargs="+" if several else None, metavar=None if choices else plain.__name__.upper(),
                            help=help if default in (None, "", ()) else f"{help} (default: {shown(default)})")
