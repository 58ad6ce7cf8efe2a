"""The command line: its flags as a list, what wins over what, what is refused, and whole runs on small data."""
import argparse
import dataclasses
import io
import json
import math
import os
import runpy
import shutil
import sys
import urllib.error
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torchvision
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_data import annotation_file, make_rectangles, read_annotations, write_annotations

import main
import training
from datasets.images import read_image
from datasets.synthetic import make_synthetic
from datasets.transforms import Preprocessing
from detr import build_model, checkpoint, settings
from detr.config import DataConfig, ModelConfig, TrainConfig, flag
from detr.presets import PRESETS, Preset
from detr.settings import class_rows, classes_that_fit, name_by_shapes
from detr.structures import NonFiniteError
from engine import image_ids, train_one_epoch

MAIN = Path(main.__file__)

# Published flags: name, type, default. Scripts rely on them; none of this may change.
ORIGINAL = [
    ("lr", float, 1e-4), ("lr_backbone", float, 1e-5), ("batch_size", int, 2), ("weight_decay", float, 1e-4),
    ("epochs", int, 300), ("lr_drop", int, 200), ("clip_max_norm", float, 0.1),
    ("frozen_weights", str, None),
    ("backbone", str, "resnet50"), ("dilation", bool, False), ("position_embedding", str, "sine"),
    ("enc_layers", int, 6), ("dec_layers", int, 6), ("dim_feedforward", int, 2048), ("hidden_dim", int, 256),
    ("dropout", float, 0.1), ("nheads", int, 8), ("num_queries", int, 100), ("pre_norm", bool, False),
    ("masks", bool, False), ("aux_loss", bool, True),
    ("set_cost_class", float, 1), ("set_cost_bbox", float, 5), ("set_cost_giou", float, 2),
    ("mask_loss_coef", float, 1), ("dice_loss_coef", float, 1), ("bbox_loss_coef", float, 5),
    ("giou_loss_coef", float, 2), ("eos_coef", float, 0.1),
    ("dataset_file", str, "coco"), ("coco_path", str, None), ("coco_panoptic_path", str, None),
    ("remove_difficult", bool, False),
    ("output_dir", str, ""), ("device", str, "cuda"), ("seed", int, 42), ("resume", str, ""), ("start_epoch", int, 0),
    ("eval", bool, False), ("num_workers", int, 2), ("world_size", int, 1), ("dist_url", str, "env://"),
]
# Ours: name, type, default.
NEW = [
    ("model", str, None),
    ("backbone_norm", str, "frozen"), ("from_scratch", bool, False), ("backbone_weights", str, None),
    ("frozen_stages", int, None), ("in_channels", int, 3), ("feature_strides", tuple[int, ...], None),
    ("padding", str, "legacy"), ("pretrained_backbone", bool, False), ("panoptic_threshold", float, 0.85),
    ("sgd", bool, False), ("lr_drop_epochs", tuple[int, ...], None),
    ("lr_schedule", str, "step"), ("warmup_steps", int, 0), ("ema_decay", float, 0.0), ("amp", str, "off"),
    ("eval_every", int, 1),
    ("image_size", str, "800"), ("max_size", int, 1333), ("multi_scale", bool, True), ("random_crop", bool, True),
    ("least_scale", float, 0.6), ("bucket_train", bool, False), ("bucket_eval", bool, True), ("cache_mode", bool, False),
    ("fast_images", str, "off"),
    ("cls_loss_coef", float, 2), ("focal_alpha", float, 0.25),
    ("with_box_refine", bool, False), ("two_stage", bool, False), ("query_content", str, "position"),
    ("box_prior", bool, False), ("num_patterns", int, 0), ("pe_temperature", float, 20), ("num_select", int, 300),
    ("denoising", bool, False), ("dn_number", int, 100), ("dn_box_noise_scale", float, 0.4),
    ("dn_label_noise_ratio", float, 0.5), ("interm_loss_coef", float, 1),
    ("num_feature_levels", int, 4),
    ("enc_n_points", int, 4), ("dec_n_points", int, 4), ("position_embedding_scale", float, 2 * math.pi),
    ("lr_backbone_names", tuple[str, ...], ("backbone.0",)),
    ("lr_linear_proj_names", tuple[str, ...], ("reference_points", "sampling_offsets")),
    ("lr_linear_proj_mult", float, 0.1),
    ("tensorboard", bool, False), ("print_every", float, 10.0),
    ("data", str, None), ("finetune", str, ""), ("freeze", str, ""), ("show_batch", bool, False),
    ("ignore_regions", str, "off"), ("class_weights", str, "off"), ("repeat_threshold", float, 0.0),
    ("aug", str, "published"), ("flip", bool, True), ("no_flip_classes", tuple[str, ...], None),
    ("color_jitter", float, 0.0), ("scale_jitter", tuple[float, ...], None), ("mosaic", float, 0.0),
    ("global_batch_size", int, 0), ("lr_rule", str, "none"), ("lr_batch", int, 16), ("loss_normalizer", str, "process"),
    ("non_finite", str, "stop"), ("skip_at_most", int, 10), ("save_every_minutes", float, 15.0),
    ("log_steps", bool, False), ("deterministic", bool, False), ("compile", bool, False),
    ("fold_norms", bool, False), ("activation_checkpointing", bool, False), ("auto_batch_size", bool, False),
    ("fsdp", bool, False),
    ("coco_eval", str, "fast"), ("engine", str, "pytorch"),
]
SMALL = ("--model tiny_detr --hidden_dim 32 --nheads 2 --dim_feedforward 32 --enc_layers 1 --dec_layers 2 "
         "--num_queries 10 --image_size 64 --max_size 224 --batch_size 4 --num_workers 0 --device cpu --amp off "
         "--print_every 1000 ")


def parse(line: str = "") -> argparse.Namespace:
    return main.get_args_parser().parse_args(line.split())


def settle(line: str) -> main.Settings:
    return main.settle(parse(line))


def run(line: str) -> tuple[dict, str]:
    """Results and printed text of ``python main.py <line>``."""
    with redirect_stdout(io.StringIO()) as text:
        results = main.main(parse(line))
    return results, text.getvalue()


def program(monkeypatch, line: str) -> None:
    """``python main.py <line>``, in this process."""
    monkeypatch.setattr(sys, "argv", [str(MAIN), *line.split()])
    runpy.run_path(str(MAIN), run_name="__main__")


def log(folder: Path) -> list[dict]:
    """The rows of a log, without what a clock says."""
    rows = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows


def same(a, b) -> bool:
    """The same structure with the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_rectangles(tmp_path_factory.mktemp("data") / "rectangles")


@pytest.fixture
def copy(data, tmp_path) -> Path:
    """A copy of the data to damage."""
    return Path(shutil.copytree(data, tmp_path / "copy"))


@dataclasses.dataclass
class Run:
    folder: Path
    results: dict
    text: str


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Run:
    """Twelve epochs of four steps: enough for an AP that is not 0."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    results, text = run(SMALL + f"--coco_path {data} --output_dir {folder} --epochs 12 --eval_every 6 --lr 1e-3 "
                        "--lr_backbone 1e-3 --warmup_steps 0 --ema_decay 0.9 --tensorboard")
    return Run(folder, results, text)


# -- flags ------------------------------------------------------------------------------------------------------------

def test_names_types_and_defaults():
    expected = {name: (kind, default) for name, kind, default in ORIGINAL + NEW}
    parser = main.get_args_parser()
    assert vars(parser.parse_args([])) == {name: default for name, (_, default) in expected.items()}
    found = {}
    for action in parser._actions:
        spelling, = action.option_strings
        assert "-" not in spelling[2:], spelling                                            # underscores
        kind = bool if action.nargs == 0 else action.type or str
        kind = tuple[kind, ...] if action.nargs == "+" else kind
        assert kind is not bool or action.const == (not spelling.startswith("--no_")), spelling
        assert spelling in (f"--{action.dest}", f"--no_{action.dest}")
        found.setdefault(action.dest, []).append((spelling, kind, action.default))
    assert found == {name: [(f"--{name}", kind, default)] + [(f"--no_{name}", kind, default)] * (kind is bool)
                     for name, (kind, default) in expected.items()}


def test_the_published_lines_are_understood():
    args = parse("--batch_size 2 --no_aux_loss --eval --resume checkpoints/detr-r50-e632da11.pth --num_workers 4 "
                 "--coco_path /dataset/coco --output_dir result")
    assert (args.batch_size, args.aux_loss, args.eval, args.num_workers) == (2, False, True, 4)
    assert (args.resume, args.coco_path, args.output_dir) == ("checkpoints/detr-r50-e632da11.pth", "/dataset/coco",
                                                              "result")
    args = parse("--lr 1e-4 --lr_backbone=1e-5 --dilation --clip_max_norm 0 --set_cost_class 2")
    assert (args.lr_backbone, args.dilation, args.clip_max_norm, args.set_cost_class) == (1e-5, True, 0.0, 2.0)


def test_help_groups_flags_and_explains_each(monkeypatch, capsys):
    parser = main.get_args_parser()
    groups = [group for group in parser._action_groups if group._group_actions]
    grouped = [action.option_strings[0] for group in groups for action in group._group_actions]
    assert len(grouped) == len(set(grouped)) == len(parser._actions)
    assert {"run", "data", "training", "backbone", "transformer", "matching", "losses"} <= {g.title for g in groups}
    for name, _, _ in ORIGINAL + NEW:
        texts = [action.help for action in parser._actions if action.dest == name
                 and action.help is not argparse.SUPPRESS]
        assert len(texts) == 1 and len(texts[0]) > 10 and "\n" not in texts[0], name

    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--help")
    shown = capsys.readouterr().out
    assert stop.value.code in (0, None)
    for words in ("training:\n", "losses:\n", "--no_aux_loss", "learning rate of everything but the backbone",
                  "(default: 0.0001)", "show this help", *PRESETS):
        assert words in shown, words
    assert "--aux_loss" not in shown.replace("--no_aux_loss", "")               # only what changes the default


def test_flags_with_several_values(tmp_path, capsys):
    args = parse("--model detr_resnet50 --lr_drop_epochs 30 40")
    assert args.lr_drop_epochs == [30, 40]                                                      # as published
    assert main.settle(args).train.lr_drop_epochs == (30, 40)
    args.lr_drop_epochs = [30]                                                                  # by a program
    del args.typed
    assert main.settle(args).train.lr_drop_epochs == (30,)
    for drops in ((30, 40), [30, 40]):                              # as this and as another program may have saved them
        file = saved(tmp_path / "a.pth", "detr_resnet50", train={"lr_drop_epochs": drops})
        capsys.readouterr()
        settings = settle(f"--resume {file} --lr_drop_epochs 30 40")
        assert capsys.readouterr().out == ""                                                    # nothing has changed
        assert settings.train.lr_drop_epochs == settle(f"--resume {file}").train.lr_drop_epochs == (30, 40)
        assert settle(f"--resume {file} --lr_drop_epochs 50").train.lr_drop_epochs == (50,)
        assert capsys.readouterr().out == f"changed since {file}: --lr_drop_epochs 50 (was 30 40)\n"


@dataclasses.dataclass(frozen=True)
class Grouped(ModelConfig):
    """An architecture whose flags have several values."""
    names: tuple[str, ...] = flag(("backbone.0",), "parts of names")
    shares: tuple[float, ...] | None = flag(None, "how much")

    def build(self, num_classes: int):
        return Heads(num_classes), None, {}


class Heads(torch.nn.Module):
    """Class heads in a list, as published for Deformable DETR, without "no object"."""

    def __init__(self, num_classes: int, layers: int = 2) -> None:
        super().__init__()
        self.class_embed = torch.nn.ModuleList(torch.nn.Linear(4, num_classes) for _ in range(layers))


def test_groups_of_architectures_with_several_values(monkeypatch):
    monkeypatch.setattr(main, "GROUPS", [*main.GROUPS, ("grouped", Grouped, ("names", "shares"))])
    monkeypatch.setattr(main, "ARCHITECTURES", (*main.ARCHITECTURES, Grouped))
    monkeypatch.setattr(settings, "PRESETS", {**PRESETS, "grouped": Preset(Grouped())})
    assert parse().names == ("backbone.0",) and settle("--model grouped").model == Grouped()
    assert settle("--model grouped --names a b --shares 1 0.5 --lr 1").model == Grouped(names=("a", "b"), shares=(1, 0.5))
    with pytest.raises(ValueError, match="--names: tiny_detr has no such option"):
        settle("--model tiny_detr --names backbone.0")
    assert "--names STR [STR ...]" in main.get_args_parser().format_help()


def test_as_a_parent():
    parser = argparse.ArgumentParser(parents=[main.get_args_parser()])
    parser.add_argument("--threshold", type=float, default=0.5)
    args = parser.parse_args("--model tiny_detr --lr 1e-4 --threshold 0.7".split())
    assert args.threshold == 0.7 and args.typed == {"model", "lr"}
    assert main.settle(args).train.lr == 1e-4 != PRESETS["tiny_detr"].train.lr
    parser.set_defaults(num_queries=11)
    assert main.settle(parser.parse_args(["--model", "tiny_detr"])).model.num_queries == 11


@pytest.mark.parametrize("line, message", [
    ("--num_querys 5", "unknown: --num_querys; did you mean --num_queries?"),
    ("--no_aux_los", "unknown: --no_aux_los; did you mean --no_aux_loss?"),
    ("--learning-rate=1", "unknown: --learning-rate=1"),
    ("--epoch 5 --batchsize 3", "unknown: --epoch; did you mean --epochs? "
     "unknown: --batchsize; did you mean --batch_size? See --help"),
    ("--epochs five", "argument --epochs: invalid int value: 'five'"),
    ("--lr_schedule linear", "argument --lr_schedule: invalid choice: 'linear'"),
    ("--resume", "argument --resume: expected one argument")])
def test_flags_that_are_not_there(line, message, capsys, monkeypatch):
    for call in (parse, lambda line: program(monkeypatch, line)):
        with pytest.raises(SystemExit) as stop:
            call(line)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and len(error) < 500       # not argparse's list of all flags
        assert not {"?.", "?;"} & {error[i:i + 2] for i in range(len(error))}


def test_mistakes_end_the_program_with_a_line(monkeypatch):
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--device cpu --coco_path nowhere --model tiny_detr")
    assert str(stop.value.code).startswith("FileNotFoundError: --coco_path nowhere: there is no such folder")


# -- what wins --------------------------------------------------------------------------------------------------------

def saved(path: Path, name: str = "tiny_detr", **parts: dict) -> Path:
    """A checkpoint without weights worth mentioning, of a run whose flags differed from the preset by ``parts``."""
    config = {part: dataclasses.asdict(dataclasses.replace(getattr(PRESETS[name], part), **parts.get(part, {})))
              for part in ("model", "train", "data")}
    checkpoint.save(path, {"model": {"w": torch.zeros(1)}, "config": {"name": name, **config},
                           "categories": [{"label": 0, "id": 3, "name": "red"}]})
    return path


def test_architecture_then_preset_then_checkpoint_then_typed(tmp_path):
    tiny, default = PRESETS["tiny_detr"], PRESETS["detr_resnet50"]
    assert (tiny.train.lr, tiny.model.num_queries, tiny.model.set_cost_bbox) == (2e-3, 30, 5)
    assert settle("--coco_path x").model == default.model                                   # the architecture's
    assert settle("--model tiny_detr").train == tiny.train                                  # the preset's
    assert settle("--model tiny_detr").data == tiny.data
    file = saved(tmp_path / "a.pth", train={"lr": 7e-4, "epochs": 9}, model={"num_queries": 12, "aux_loss": False})
    resumed = settle(f"--resume {file}")                                                    # the checkpoint's
    assert (resumed.name, resumed.train.lr, resumed.train.epochs) == ("tiny_detr", 7e-4, 9)
    assert resumed.model == dataclasses.replace(tiny.model, num_queries=12, aux_loss=False)
    assert resumed.categories == [(0, 3, "red", True)]
    typed = settle(f"--resume {file} --lr 2e-4 --num_queries 13 --model tiny_detr")         # what was typed
    assert (typed.train.lr, typed.model.num_queries, typed.train.epochs) == (2e-4, 13, 9)


def test_what_is_typed_wins_even_when_it_is_the_default(tmp_path):
    settings = settle("--model tiny_detr --lr 0.0001 --num_queries 100 --no_from_scratch --image_size 800 "
                      "--set_cost_class 1")
    assert settings.train == dataclasses.replace(PRESETS["tiny_detr"].train, lr=1e-4)
    assert settings.model == dataclasses.replace(PRESETS["tiny_detr"].model, num_queries=100, from_scratch=False,
                                                 set_cost_class=1)
    assert settings.data.image_size == "800"
    file = saved(tmp_path / "a.pth", model={"aux_loss": False})
    assert settle(f"--resume {file} --aux_loss").model.aux_loss
    assert not settle(f"--resume {file} --aux_loss --no_aux_loss").model.aux_loss           # the last one


def test_what_a_program_sets_counts_as_typed():
    args = parse("--model tiny_detr")
    args.epochs, args.num_queries = 2, 11
    assert (main.settle(args).train.epochs, main.settle(args).model.num_queries) == (2, 11)
    assert main.settle(argparse.Namespace(**vars(args))).train.lr == 2e-3


def test_one_way_to_drop_takes_the_place_of_the_other(tmp_path, capsys):
    file = saved(tmp_path / "a.pth", "detr_resnet50", train={"lr_drop_epochs": (30, 40)})
    assert settle(f"--resume {file} --lr_drop 50").train == TrainConfig(lr_drop=50)
    assert capsys.readouterr().out == (f"changed since {file}: --lr_drop 50 (was 200), "
                                       f"--lr_drop_epochs None (was 30 40)\n")
    assert settle(f"--resume {file} --lr_schedule cosine").train.lr_drop_epochs == (30, 40)     # was not typed
    assert settle(f"--resume {file} --epochs 35").train.epochs == 35


def test_changes_since_the_checkpoint_are_said(tmp_path, capsys):
    file = saved(tmp_path / "a.pth", train={"lr": 7e-4})
    settle(f"--resume {file} --lr 2e-4 --batch_size 16 --output_dir {tmp_path}")
    assert capsys.readouterr().out == f"changed since {file}: --lr 0.0002 (was 0.0007)\n"   # not what stays the same


@pytest.mark.parametrize("line, name", [
    ("--coco_path x", "detr_resnet50"), ("", "tiny_deformable_detr"), ("--model detr_resnet101", "detr_resnet101")])
def test_which_model_when_none_is_named(line, name):
    assert settle(line).name == name


def test_every_preset_can_be_chosen():
    for name, preset in PRESETS.items():
        assert settle(f"--model {name}").model == preset.model


def test_build_model_takes_the_parsers_flags():
    model, criterion, _ = build_model(parse("--num_queries 5 --eos_coef 0.2 --backbone resnet18"), num_classes=3)
    assert model.query_embed.weight.shape == (5, 256)
    assert criterion.losses[0].eos_coef == 0.2 and model.class_embed.out_features == 4
    model, criterion, _ = build_model(parse("--model tiny_detr --num_queries 5 --focal_alpha 0.2"), num_classes=3)
    assert model.transformer.proposals.num_queries == 5 and criterion.losses[0].alpha == 0.2
    with pytest.raises(ValueError, match="tiny_detr has no option 'eos_coef', which detr_resnet50 has; did you mean"):
        build_model(parse("--model tiny_detr --eos_coef 0.2"))


# -- checkpoints without a configuration ------------------------------------------------------------------------------

def shapes_only(name: str, **flags) -> dict[str, torch.Tensor]:
    """The names and shapes of a model's weights, without their size in memory or in a file."""
    with torch.device("meta"):
        state = build_model(name, **flags)[0].state_dict()
    return {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}


def test_without_configuration_shapes_decide(tmp_path):
    file = tmp_path / "published.pth"
    checkpoint.save(file, {"model": shapes_only("detr_resnet50"), "config": {"by": "another program"}})
    assert settle(f"--resume {file} --eval").name == "detr_resnet50"
    checkpoint.save(file, {"model": shapes_only("detr_resnet50", num_classes=7), "config": "of another program"})
    assert settle(f"--resume {file} --eval").name == "detr_resnet50"                        # classes are the data's
    assert settle(f"--resume {file} --eval --model detr_resnet101").name == "detr_resnet101"


def test_without_configuration_presets_that_fit_are_named(tmp_path):
    for name, fitting in (("detr_resnet101", "--model detr_resnet101 or --model detr_resnet101_dc5"),
                          ("tiny_detr", "--model tiny_detr"),
                          ("deformable_detr_resnet50_single_scale", "--model deformable_detr_resnet50_single_scale or "
                           "--model deformable_detr_resnet50_single_scale_dc5"),
                          ("detr_resnet50_panoptic", "--model detr_resnet50_panoptic")):
        with pytest.raises(ValueError) as error:
            name_by_shapes(shapes_only(name), "a.pth")
        assert "a.pth has no configuration inside, and does not fit detr_resnet50" in str(error.value)
        assert f"It fits {fitting}" in str(error.value) and "resnet18" not in str(error.value)
    with pytest.raises(ValueError, match="fits none of detr_resnet50, .*tiny_detr.* either; give --model and the flags"):
        name_by_shapes(shapes_only("tiny_detr", hidden_dim=64), "a.pth")
    with pytest.raises(ValueError, match="a.pth has no class_embed.weight: it is not a DETR checkpoint"):
        name_by_shapes({"fc.weight": torch.zeros(10, 3)}, "a.pth")


def test_class_heads_in_a_list(monkeypatch):
    """As published for Deformable DETR; the number of classes is the number of rows."""
    presets = {name: Preset(dataclasses.replace(Grouped(), **flags)) for name, flags in (
        ("a", {}), ("b", {"names": ("x",)}))}
    published = {name: PRESETS[name] for name in ("detr_resnet50", "tiny_detr")}
    monkeypatch.setattr(settings, "PRESETS", {**published, **presets})
    with pytest.raises(ValueError) as error:
        name_by_shapes(Heads(91).state_dict(), "a.pth")
    assert str(error.value) == ("a.pth has no configuration inside, and does not fit detr_resnet50. "
                                "It fits --model a or --model b")
    with pytest.raises(ValueError, match="fits none of detr_resnet50, tiny_detr, a, b either"):
        name_by_shapes(Heads(91, layers=3).state_dict(), "a.pth")
    assert class_rows(Heads(7).state_dict()) == 7
    assert class_rows({"transformer.decoder.class_embed.11.weight": torch.zeros(5, 2)}) == 5
    for name in ("class_embed_x.weight", "my_class_embed.weight", "class_embed.x.weight", "class_embed.0.bias"):
        assert class_rows({name: torch.zeros(5, 2)}) is None


def test_classes_that_fit():
    """One row of a softmax head is "no object"; a sigmoid head has none."""
    for name, preset in PRESETS.items():
        if preset.model.backbone in ("resnet50", "resnet_tiny") and not preset.model.dilation:
            for num_classes in (91, 1):
                assert classes_that_fit(preset.model, shapes_only(name, num_classes=num_classes)) == num_classes
    assert classes_that_fit(PRESETS["detr_resnet101"].model, shapes_only("detr_resnet50")) is None
    assert classes_that_fit(PRESETS["tiny_detr"].model, shapes_only("tiny_detr", hidden_dim=64)) is None


# -- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, message", [
    ("--model tiny_detrr", "--model tiny_detrr is not known; did you mean tiny_detr? Known are detr_resnet50, "),
    ("--model tiny_detr --max_size 300", "--max_size has no effect where --image_size is exact"),
    ("--model tiny_deformable_detr --position_embedding_scale 1",
     "--position_embedding_scale has no effect without encoder layers, which alone use positions"),
    ("--model deformable_detr_resnet50_two_stage --coco_path x --no_aux_loss",
     "--no_aux_loss with box refinement would leave the heads of all layers but the last untrained"),
    ("--model tiny_dab_deformable_detr --no_aux_loss", "--no_aux_loss with box refinement would leave"),
    ("--model tiny_dino --pe_temperature 3", "--pe_temperature has no effect without encoder layers"),
    ("--model dab_detr_resnet50 --coco_path x --position_embedding learned --pe_temperature 3",
     "--pe_temperature has no effect with --position_embedding learned, which has none"),
    ("--model deformable_detr_resnet50 --coco_path x --position_embedding learned --position_embedding_scale 3",
     "--position_embedding_scale has no effect with --position_embedding learned"),
    ("--model tiny_dino --dn_box_noise_scale 0", "--dn_box_noise_scale 0: the same box would have to be found and to be "
     "refused; give more than 0, or --no_denoising"),
    ("--model tiny_dab_detr --dn_number 5", "--dn_number has no effect without --denoising"),
    ("--model tiny_dino --eval --dn_number 5", "--dn_number has no effect with --eval, which denoises nothing"),
    ("--coco_path x --two_stage", "--two_stage: detr_resnet50 has no such option"),
    ("--model tiny_detr --lr_drop 3", "--lr_drop has no effect with --lr_schedule cosine"),
    ("--eval --epochs 3", "--epochs has no effect with --eval"),
    ("--eval --cache_mode", "--cache_mode has no effect with --eval, which reads each image once; leave it out"),
    ("--model tiny_detr --lr_drop_epochs 3", "--lr_drop_epochs has no effect with --lr_schedule cosine"),
    ("--lr_schedule cosine --model detr_resnet50 --lr_drop_epochs 3",
     "has no effect with --lr_schedule cosine (step has drops); leave"),
    ("--model detr_resnet50 --lr_drop 40 --lr_drop_epochs 30 40", "--lr_drop and --lr_drop_epochs are two ways to say "
     "when the learning rates drop; choose one"),
    ("--model detr_resnet50 --lr_drop_epochs 40 30 40", "--lr_drop_epochs 40 30 40: each must be greater than the one "
     "before; give --lr_drop_epochs 30 40"),
    ("--model detr_resnet50 --lr_drop_epochs 30 30", "30 30: each must be greater than the one before"),
    ("--model detr_resnet50 --lr_drop_epochs 0 30", "--lr_drop_epochs 0 30: each must be at least 1"),
    ("--model detr_resnet50 --epochs 50 --lr_drop_epochs 30 50", "--lr_drop_epochs 30 50: a drop after 50 epochs has no "
     "effect, since training ends after --epochs 50; leave it out, or give more --epochs"),
    ("--epochs 0", "--epochs 0: it must be at least 1"),
    ("--dec_layers 0", "--dec_layers 0: it must be at least 1"),
    ("--lr nan", "--lr nan: it must be at least 0"),
    ("--remove_difficult", "--remove_difficult is about Pascal VOC"),
    ("--start_epoch 3", "--start_epoch needs --resume"),
    ("--world_size 2", "--world_size 2: processes are started with torchrun --nproc-per-node=2 main.py"),
    ("--from_scratch --model detr_resnet50", "--from_scratch with --backbone_norm frozen would fix random statistics; "
     "add --backbone_norm group"),
    ("--from_scratch --backbone_norm group --lr_backbone 0 --model detr_resnet50", "would freeze a random backbone"),
    ("--backbone_weights a.pth", "--from_scratch and --backbone_weights contradict each other"),
    ("--model detr_resnet50 --eval --backbone_weights a.pth", "--backbone_weights begins a training"),
    ("--position_embedding spiral", None)])
def test_refused_flags(line, message, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if message is None:                                                         # by the parser already
        with pytest.raises(SystemExit):
            settle(line)
        assert "invalid choice: 'spiral'" in capsys.readouterr().err
        return
    with pytest.raises(ValueError) as error:
        settle(line)
    assert message in str(error.value)


def test_the_last_drop_that_has_an_effect():
    assert settle("--model detr_resnet50 --epochs 50 --lr_drop_epochs 30 49").train.lr_drop_epochs == (30, 49)
    assert settle("--model tiny_detr --eval --no_cache_mode").data.cache_mode is False


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("was, flag, message", [
    (torch.optim.AdamW, "--sgd", "was trained with AdamW, whose state means nothing to SGD: leave --sgd out; or begin "
     "anew with weights alone: --resume the best.pth or final.pth beside it, with another --output_dir"),
    (torch.optim.SGD, "--no_sgd", "was trained with SGD, whose state means nothing to AdamW: add --sgd; or begin anew")])
def test_the_state_of_another_optimizer(tmp_path, known, was, flag, message):
    """Whether or not the file says how it was trained."""
    file = tmp_path / "a.pth"
    state = checkpoint.load(saved(file, train={"sgd": was is torch.optim.SGD}))
    if not known:
        del state["config"]
    optimizer = was([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    checkpoint.save(file, {**state, "optimizer": optimizer.state_dict(), "epoch": 0})
    with pytest.raises(ValueError) as error:
        settle(f"--model tiny_detr --resume {file} {flag}")
    assert str(error.value).startswith(f"{file} {message}")
    other = {"--sgd": "--no_sgd", "--no_sgd": "--sgd"}[flag]
    assert settle(f"--model tiny_detr --resume {file} {other}").train.sgd == (other == "--sgd")
    assert settle(f"--model tiny_detr --resume {file} --eval").run.eval                         # takes the weights alone
    with pytest.raises(ValueError, match="--sgd has no effect with --eval"):
        settle(f"--model tiny_detr --resume {file} {flag} --eval")
    checkpoint.save(file, {**state, "epoch": 0})
    assert settle(f"--model tiny_detr --resume {file} {flag}").train.sgd == (flag == "--sgd")   # a new optimizer


def test_resume_and_backbone_weights(tmp_path):
    file = saved(tmp_path / "a.pth", "detr_resnet50")
    with pytest.raises(ValueError, match="take all weights from the checkpoint"):
        settle(f"--resume {file} --backbone_weights b.pth")


def test_world_size_that_torchrun_gave(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settle("--world_size 2").run.world_size == 2


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main.choose_device("cuda", typed=False) == main.choose_device("cpu", typed=True) == "cpu"
    with pytest.raises(ValueError, match="--device cuda:1: PyTorch finds none on this machine; use --device cpu"):
        main.choose_device("cuda:1", typed=True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert main.choose_device("cuda", typed=False) == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main.choose_device("cuda", typed=False) == "cuda"


# -- bad data ---------------------------------------------------------------------------------------------------------

def refused(line: str, kind: type[Exception]) -> str:
    with pytest.raises(kind) as error, redirect_stdout(io.StringIO()):
        main.main(parse(SMALL + line))
    return str(error.value)


def test_missing_folder(copy):
    message = refused(f"--coco_path {copy}/none", FileNotFoundError)
    assert f"--coco_path {copy}/none: there is no such folder" in message and "annotations/instances_train" in message
    shutil.rmtree(copy / "val2017")
    assert f"image folder {copy}/val2017 is not there" in refused(f"--eval --coco_path {copy}", FileNotFoundError)


def test_missing_json(copy):
    annotation_file(copy, "train").unlink()
    message = refused(f"--coco_path {copy}", FileNotFoundError)
    assert f"annotations {annotation_file(copy, 'train')} are not there. COCO's layout is expected" in message
    run(SMALL + f"--eval --coco_path {copy}")                                   # evaluation does not need it


def test_json_cut_short(copy):
    file = annotation_file(copy, "val")
    file.write_bytes(file.read_bytes()[:-200])
    message = refused(f"--eval --coco_path {copy}", ValueError)
    assert f"{file}: no valid json at line 1, column" in message and "if cut short, download or export it" in message


def test_image_missing(copy):
    (copy / "val2017" / "203.png").unlink()
    message = refused(f"--eval --coco_path {copy}", FileNotFoundError)
    assert "1 of the 7 images" in message and "203.png (image id 203)" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_image_cut_short(copy, workers):
    file = copy / "val2017" / "203.png"
    file.write_bytes(file.read_bytes()[:2000])
    message = refused(f"--eval --coco_path {copy} --num_workers {workers}", OSError)
    assert f"image {file} (2000 bytes) cannot be read" in message and "copy it again" in message
    assert "image id 203 of" in message


def test_class_id_outside_the_range(copy):
    content = read_annotations(copy, "train")
    content["annotations"][2]["category_id"] = 8
    write_annotations(copy, "train", content)
    message = refused(f"--coco_path {copy}", ValueError)
    assert f"annotation id {content['annotations'][2]['id']} has category_id 8" in message and "ids are 3, 7" in message


def test_validation_data_of_other_classes(copy):
    content = read_annotations(copy, "val")
    content["categories"][1]["name"] = "green"
    write_annotations(copy, "val", content)
    message = refused(f"--coco_path {copy}", ValueError)
    assert "val: categories 7 'green' are not among" in message and "3 'red', 7 'blue'" in message


def test_boxes_without_size_are_counted_and_left_out(copy):
    content = read_annotations(copy, "val")
    objects = len(content["annotations"])
    content["annotations"][0]["bbox"][2] = 0
    content["annotations"][1]["bbox"][3] = -5
    write_annotations(copy, "val", content)
    results, text = run(SMALL + f"--eval --coco_path {copy}")
    ids = ", ".join(f"annotation {row['id']}" for row in content["annotations"][:2])
    assert f"{objects - 2} objects of 2 classes" in text and math.isfinite(results["loss"])
    assert f"left out of the targets: 2 boxes without width or height inside the image ({ids})" in text


def test_images_without_objects_are_kept(copy, tmp_path):
    """Even where there are no others."""
    for split in ("train", "val"):
        write_annotations(copy, split, read_annotations(copy, split) | {"annotations": []})
    results, text = run(SMALL + f"--coco_path {copy} --epochs 1 --output_dir {tmp_path}/out")
    assert "16 images (16 without objects, kept), 0 objects" in text
    assert "7 images (7 without objects, kept), 0 objects" in text
    assert math.isfinite(log(tmp_path / "out")[0]["train_loss"]) and results["coco_eval_bbox"] == [-1.0] * 12


def test_more_objects_than_queries(data, tmp_path):
    with pytest.warns(UserWarning, match=r"\d objects? of this batch have no query to match: images have up to 2 "
                                         r"objects and the model 1 queries; raise --num_queries"):
        run(SMALL + f"--coco_path {data} --epochs 1 --output_dir {tmp_path}/out --num_queries 1")
    assert math.isfinite(log(tmp_path / "out")[0]["train_loss"])


def test_batches_larger_than_the_data(data, tmp_path):
    message = refused(f"--coco_path {data} --batch_size 17 --output_dir {tmp_path}/out", ValueError)
    assert "--batch_size 17 on 1 processes needs 17 training images, and there are 16; lower it" in message


def test_a_loss_that_is_no_number_stops_training(data, tmp_path):
    message = refused(f"--coco_path {data} --epochs 5 --lr 1e30 --clip_max_norm 0 --warmup_steps 0 "
                      f"--output_dir {tmp_path}/out", NonFiniteError)
    assert "epoch 0, step 1, images [1" in message
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


# -- bad checkpoints --------------------------------------------------------------------------------------------------

def test_checkpoint_that_is_not_there(data, trained):
    message = refused(f"--eval --coco_path {data} --resume {trained.folder}/checkpoint7.pth", FileNotFoundError)
    assert "there is no checkpoint" in message and "it has best.pth, best.safetensors, checkpoint.pth" in message


def test_checkpoint_cut_short(data, trained, tmp_path):
    content = (trained.folder / "checkpoint.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[:len(content) // 2])
    message = refused(f"--eval --coco_path {data} --resume {tmp_path}/a.pth", ValueError)
    assert f"{tmp_path}/a.pth is damaged, cut short or no checkpoint at all" in message


def test_checkpoint_of_another_model(data, trained, tmp_path):
    file = trained.folder / "checkpoint.pth"
    with pytest.raises(ValueError, match=f"--model detr_resnet50: {file} holds a tiny_detr; leave --model out"):
        settle(f"--model detr_resnet50 --resume {file}")
    checkpoint.save(tmp_path / "a.pth", {"model": shapes_only("detr_resnet50")})
    message = refused(f"--eval --coco_path {data} --resume {tmp_path}/a.pth", ValueError)
    assert f"{tmp_path}/a.pth does not fit the model: this looks like a checkpoint of another model" in message
    message = refused(f"--eval --coco_path {data} --resume {file} --dec_layers 3", ValueError)
    assert "another variant of this model" in message and "transformer.decoder.layers.2" in message


def test_checkpoint_of_other_classes(copy, trained):
    for split in ("train", "val"):
        content = read_annotations(copy, split)
        content["categories"][0]["name"] = "crimson"
        write_annotations(copy, split, content)
    message = refused(f"--eval --coco_path {copy} --resume {trained.folder}/checkpoint.pth", ValueError)
    assert "categories 3 'crimson' are not in the class table to be used, which has 3 'red', 7 'blue'" in message
    assert message.endswith("must have the same ids and names; for other classes, --finetune it")


# -- the backbone's first weights -------------------------------------------------------------------------------------

PUBLISHED = ("--model detr_resnet50 --backbone resnet18 --hidden_dim 32 --nheads 2 --dim_feedforward 32 --enc_layers 1 "
             "--dec_layers 1 --num_queries 10 --image_size 64 --batch_size 4 --num_workers 0 --device cpu --epochs 1 ")


def test_published_preset_without_network(data, tmp_path, monkeypatch, capsys):
    def no_network(url, *args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for name, backbone in (("resnet18", "resnet18"), ("resnet34", "resnet34")):
        with pytest.raises(OSError) as error:
            main.main(parse(PUBLISHED + f"--coco_path {data} --output_dir {tmp_path}/out --backbone {name}"))
        for words in (f"cannot download https://download.pytorch.org/models/{backbone}", "no network",
                      "Training detr_resnet50 starts from ImageNet weights", "--backbone_weights FILE",
                      "--from_scratch --backbone_norm group --lr_backbone LR"):
            assert words in str(error.value)
    assert f"downloading https://download.pytorch.org/models/{backbone}" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="--backbone resnet_tiny has no weights that are fetched unasked: name a file "
                                         "with --backbone_weights FILE; to train the backbone from random weights, add"):
        main.main(parse(PUBLISHED + f"--coco_path {data} --output_dir {tmp_path}/out --backbone resnet_tiny"))
    results, text = run(PUBLISHED + f"--coco_path {data} --output_dir {tmp_path}/out --backbone resnet_tiny "
                        "--from_scratch --backbone_norm group --lr_backbone 1e-4")
    assert "weights: random; the whole backbone trains, with group norm and learning rate 0.0001" in text
    first = checkpoint.load(tmp_path / "out" / "checkpoint.pth")["optimizer"]["param_groups"][1]
    body = build_model("tiny_detr", backbone_norm="group")[0].backbone[0].body
    assert len(first["params"]) == len(list(body.parameters()))                             # the stem, too


def test_backbone_weights(data, tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(source, tmp_path / "imagenet.pth")
    _, text = run(PUBLISHED + f"--coco_path {data} --output_dir {tmp_path}/out --backbone_weights "
                  f"{tmp_path}/imagenet.pth --lr_backbone 1e-3 --batch_size 8")
    assert f"backbone weights: {tmp_path}/imagenet.pth" in text
    assert "loaded 100 tensors into the backbone; left out fc.weight, fc.bias and 20 num_batches_tracked" in text
    state = checkpoint.load(tmp_path / "out" / "checkpoint.pth")
    body = {name.removeprefix("backbone.0.body."): value for name, value in state["model"].items()
            if name.startswith("backbone.0.body.")}
    changed = {name for name, value in body.items() if not torch.equal(value, source[name])}
    convolutions = {name for name in body if "bn" not in name and "downsample.1" not in name}
    assert len(body) == 100
    assert changed == {name for name in convolutions if not name.startswith(("conv1.", "layer1."))}
    with pytest.raises(ValueError, match="imagenet.pth does not fit the model"):
        run(PUBLISHED + f"--coco_path {data} --backbone resnet34 --backbone_weights {tmp_path}/imagenet.pth")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint none.pth.*--backbone_weights FILE"):
        run(PUBLISHED + f"--coco_path {data} --backbone_weights none.pth")


# -- whole runs -------------------------------------------------------------------------------------------------------

def test_training_says_what_it_does(trained, data):
    first = trained.text.splitlines()[0]
    assert first == (f"model: tiny_detr; padding: exact; data: {data}; device: cpu; images per process x processes x "
                     f"accumulation = 4 x 1 x 1 = 4")
    for words in ("16 images (3 without objects, kept), 20 objects of 2 classes", "7 images (1 without objects, kept)",
                  "weights: random; the whole backbone trains", "epochs 0 to 11 of 4 steps", "epoch 11 4/4  loss ",
                  "images/s", "left", "Average Precision  (AP) @[ IoU=0.50:0.95", "red", "blue", "trained for",
                  "detections.png"):
        assert words in trained.text, words


def test_training_leaves_files(trained):
    assert {path.name for path in trained.folder.iterdir()} == {
        "checkpoint.pth", "checkpoint_previous.pth", "best.pth", "best.safetensors", "final.pth", "final.safetensors",
        "checkpoints.txt", "log.txt", "curves.png", "detections.png", "results.json", "eval", "tensorboard"}
    rows = log(trained.folder)
    assert [row["epoch"] for row in rows] == list(range(12))
    assert ["test_coco_eval_bbox" in row for row in rows] == [epoch in (5, 11) for epoch in range(12)]
    for name in ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "class_error", "lr"):
        assert all(math.isfinite(row[f"train_{name}"]) for row in rows), name
        assert name == "lr" or math.isfinite(rows[-1][f"test_{name}"])
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert rows[-1]["n_parameters"] == sum(p.numel() for p in rebuilt(trained).parameters() if p.requires_grad)
    numbers = rows[-1]["test_coco_eval_bbox"]
    assert len(numbers) == 12 and numbers == trained.results["coco_eval_bbox"]
    assert numbers[1] > 0.05                                                    # otherwise all comparisons are empty
    for name in ("curves.png", "detections.png"):
        assert len(read_image(trained.folder / name).getcolors(1 << 20)) > 50


def test_tensorboard_events(trained):
    events, = (trained.folder / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in (b"train_loss", b"test_loss", b"coco/AP50"):
        assert name in content


def test_tensorboard_that_is_not_installed(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = refused(f"--coco_path {data} --tensorboard --output_dir {tmp_path}/out", ImportError)
    assert message == "--tensorboard needs the package tensorboard: pip install tensorboard"


def test_results_score_the_same_with_pycocotools_alone(trained, data):
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file(data, "val")))
        judge = COCOeval(truth, truth.loadRes(str(trained.folder / "results.json")), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert judge.stats.tolist() == log(trained.folder)[-1]["test_coco_eval_bbox"]
    assert {row["category_id"] for row in json.loads((trained.folder / "results.json").read_text())} == {3, 7}


def test_evaluation_file_has_what_published_plots_read(trained):
    curves = torch.load(trained.folder / "eval" / "latest.pth", weights_only=False)
    precision, recalls = curves["precision"], curves["params"].recThrs
    assert precision.shape == (10, len(recalls), 2, 4, 3) and curves["scores"].shape == precision.shape
    assert precision[:, :, :, 0, -1].mean() == pytest.approx(trained.results["coco_eval_bbox"][0])
    assert curves["recall"].shape == (10, 2, 4, 3)


def rebuilt(trained: Run) -> torch.nn.Module:
    """The trained model, by what its checkpoint says."""
    state = torch.load(trained.folder / "checkpoint.pth", weights_only=True)
    model, _, _ = build_model(state["config"]["name"], num_classes=state["num_classes"], **state["config"]["model"])
    model.load_state_dict(state["model"], strict=True)
    return model


def test_checkpoint_is_complete(trained):
    state = torch.load(trained.folder / "checkpoint.pth", weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "epoch", "config", "categories", "num_classes",
            "preprocessing"} <= set(state)
    assert state["epoch"] == 11 and state["num_classes"] == 2
    assert state["categories"] == [{"label": 0, "id": 3, "name": "red", "isthing": True},
                                   {"label": 1, "id": 7, "name": "blue", "isthing": True}]
    assert Preprocessing.from_dict(state["preprocessing"]) == Preprocessing(64, 224)
    assert state["config"]["train"]["lr"] == 1e-3 and state["config"]["data"]["image_size"] == "64"
    assert rebuilt(trained).transformer.proposals.num_queries == 10


def test_evaluation_of_the_checkpoint_gives_the_same_numbers(trained, data, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}
    results, text = run(f"--eval --resume {trained.folder}/checkpoint.pth --num_workers 0 --device cpu "
                        f"--output_dir {tmp_path}/eval")
    assert results == trained.results                                           # losses and classes, too
    assert "model: tiny_detr" in text and "changed since" not in text
    assert (tmp_path / "eval" / "results.json").read_bytes() == (trained.folder / "results.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["eval", "report.html", "results.json"]
    assert {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")} == before


def test_evaluation_with_larger_batches(trained):
    """Padding and batch size change rounding alone; the numbers of detections near a threshold stay here."""
    results, text = run(f"--eval --resume {trained.folder}/checkpoint.pth --num_workers 0 --device cpu --batch_size 7")
    assert results["coco_eval_bbox"] == pytest.approx(trained.results["coco_eval_bbox"], abs=1e-6)
    assert f"changed since {trained.folder}/checkpoint.pth: --batch_size 7 (was 4)" in text


def test_evaluation_without_weights_says_so(data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    results, text = run(SMALL + f"--eval --coco_path {data}")
    assert "weights: random, since --eval came without --resume" in text and len(results["coco_eval_bbox"]) == 12
    assert not list(tmp_path.iterdir())                                         # no folder unless one is named


def test_default_data_and_model(monkeypatch, tmp_path):
    """Without data and model: the synthetic data, their preset, and a new folder each time."""
    make_synthetic(tmp_path / "synthetic", train=16, val=6)
    monkeypatch.setattr(main, "synthetic_data", lambda: tmp_path / "synthetic")
    monkeypatch.chdir(tmp_path)
    few = SMALL.replace("--model tiny_detr ", "") + "--epochs 1 --amp bf16"
    for folder in ("outputs/tiny_deformable_detr", "outputs/tiny_deformable_detr-2"):
        _, text = run(few)
        assert text.startswith("model: tiny_deformable_detr; padding: exact; data: synthetic")
        assert "deformable attention: the cpu path\n" in text
        assert len(log(tmp_path / folder)) == 1
    state = checkpoint.load("outputs/tiny_deformable_detr/checkpoint.pth")
    assert [row["name"] for row in state["categories"]] == ["circle", "square", "triangle", "star", "ring", "cross"]
    assert log(tmp_path / "outputs/tiny_deformable_detr") == log(tmp_path / "outputs/tiny_deformable_detr-2")


@pytest.mark.parametrize("cores, threads, typed, workers", [
    (2, 2, "", 0), (2, 2, "--num_workers 2", 2), (2, 2, "--num_workers 1", 1), (2, 1, "", 2), (8, 8, "", 2)])
def test_few_cores_read_images_between_steps(cores, threads, typed, workers, monkeypatch):
    seen = []
    monkeypatch.setattr(main, "run", lambda settings, device, data: seen.append(settings))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    main.main(parse(f"--model tiny_detr --device cpu {typed}"))
    assert seen[0].run.num_workers == workers
    assert seen[0].note == ("images are read between steps, since 2 cores compute; --num_workers 2 would start processes"
                            if workers == 0 else "")


def test_a_backbone_without_statistics_trains_from_random_weights(data, tmp_path):
    _, text = run(SMALL + f"--coco_path {data} --backbone pvt_v2_b0 --backbone_norm frozen --epochs 1 "
                          f"--output_dir {tmp_path}")
    assert "weights: random; the whole backbone trains, with learning rate 0.002" in text
    assert math.isfinite(log(tmp_path)[0]["train_loss"])


def test_images_in_memory_train_the_same(data, tmp_path):
    line = SMALL + f"--coco_path {data} --epochs 2 --random_crop --multi_scale --output_dir {tmp_path}/"
    _, plain = run(line + "plain")
    _, cached = run(line + "cached --cache_mode --num_workers 2")
    for split, count in (("train", 16), ("val", 7)):
        assert cached.count(f"{data}/{split}2017: reading {count} files, ") == 1
        assert f"{data}/{split}2017: {count}/{count} files, " in cached
    assert "--cache_mode" not in plain
    weights = [checkpoint.load(tmp_path / name / "checkpoint.pth") for name in ("plain", "cached")]
    assert weights[1]["config"]["data"]["cache_mode"] and not weights[0]["config"]["data"]["cache_mode"]
    assert (tmp_path / "plain" / "detections.png").read_bytes() == (tmp_path / "cached" / "detections.png").read_bytes()
    _, again = run(f"--resume {tmp_path}/cached/checkpoint.pth --eval --num_workers 0 --device cpu")
    assert "--cache_mode" not in again                                          # each image is read once
    _, alone = run(line + "alone --cache_mode")
    assert same(checkpoint.load(tmp_path / "alone" / "checkpoint.pth")["model"], weights[0]["model"])
    assert log(tmp_path / "alone") == log(tmp_path / "plain")


def test_images_that_do_not_fit_into_memory(data, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.file_cache.free_memory", lambda: 100_000.0)
    message = refused(f"--coco_path {data} --cache_mode --output_dir {tmp_path}/out", ValueError)
    assert message.startswith(f"--cache_mode: the 16 files of {data}/train2017 have 0.0001")
    assert "too much for the 0.0001 GB of memory that are free" in message and "or leave --cache_mode out" in message
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(data, tmp_path):
    line = SMALL + f"--coco_path {data} --epochs 1 --output_dir {tmp_path}/out "
    run(line)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}
    for number in (1, 2):
        _, text = run(line + "--seed 7")
        assert f"an earlier training's files were moved to {tmp_path}/out/earlier-{number}" in text
        assert len(log(tmp_path / "out")) == 1 and (tmp_path / "out" / "notes.txt").read_text() == "mine"
    aside = {path.name: path.read_bytes() for path in (tmp_path / "out" / "earlier-1").glob("*.*")}
    assert aside | {"notes.txt": b"mine"} == first
    shutil.copytree(tmp_path / "out" / "earlier-1", tmp_path / "other")
    _, text = run(line + f"--resume {tmp_path}/other/checkpoint.pth --epochs 2")            # another training's folder
    assert f"moved to {tmp_path}/out/earlier-3" in text and [row["epoch"] for row in log(tmp_path / "out")] == [0, 1]


# -- going on ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", ["--ema_decay 0.9 --lr_schedule cosine --warmup_steps 6",
                                   "--ema_decay 0 --lr_schedule step --lr_drop 2 --warmup_steps 0",
                                   "--ema_decay 0 --lr_schedule step --lr_drop_epochs 1 3 --warmup_steps 0 --sgd"])
def test_interrupted_training_ends_as_the_unbroken_one(data, tmp_path, monkeypatch, flags):
    line = SMALL + f"--coco_path {data} --epochs 4 --eval_every 4 --lr 1e-3 --random_crop --multi_scale {flags} "
    run(line + f"--output_dir {tmp_path}/whole")

    def interrupted(*args, **kwargs):
        if args[7] == 2:                                                        # the epoch
            raise KeyboardInterrupt
        return train_one_epoch(*args, **kwargs)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "train_one_epoch", interrupted)
        run(line + f"--output_dir {tmp_path}/broken")
    assert [row["epoch"] for row in log(tmp_path / "broken")] == [0, 1]
    _, text = run(f"--resume {tmp_path}/broken/checkpoint.pth --num_workers 0 --device cpu")
    assert f"resumed from {tmp_path}/broken/checkpoint.pth: epoch 2 is next" in text
    whole, broken = (checkpoint.load(tmp_path / name / "checkpoint.pth") for name in ("whole", "broken"))
    assert set(whole) == set(broken)
    for part in ("model", "optimizer", "training_model", "ema_steps", "epoch", "config"):
        assert same(whole.get(part), broken.get(part)), part
    assert all(whole["lr_scheduler"][key] == broken["lr_scheduler"][key] for key in ("last_epoch", "_last_lr"))
    assert log(tmp_path / "whole") == log(tmp_path / "broken")
    drops = {path.name for path in (tmp_path / "whole").glob("checkpoint0*.pth")}
    assert drops == ({"checkpoint0000.pth", "checkpoint0002.pth"} if "lr_drop_epochs" in flags else
                     {"checkpoint0001.pth", "checkpoint0003.pth"} if "lr_drop" in flags else set())
    options = whole["optimizer"]["param_groups"][0]
    assert options.get("momentum") == (0.9 if "--sgd" in flags else None)
    assert all(("momentum_buffer" in kept) == ("--sgd" in flags) for kept in whole["optimizer"]["state"].values())


def test_each_epoch_has_its_own_order(data, tmp_path, monkeypatch):
    orders = []

    def watched(model, criterion, loader, length, *args, **kwargs):
        orders.append([i for _, targets in loader for i in image_ids(targets)])
        return {"loss": 1.0}
    monkeypatch.setattr(training, "train_one_epoch", watched)
    run(SMALL + f"--coco_path {data} --epochs 2 --output_dir {tmp_path}/out")
    run(f"--resume {tmp_path}/out/checkpoint.pth --num_workers 0 --device cpu --epochs 3")
    first, second, third = orders
    assert sorted(first) == sorted(second) == sorted(third) == list(range(100, 116))
    assert first != second != third != first


def test_resuming_with_another_learning_rate(trained, data, tmp_path):
    before = checkpoint.load(trained.folder / "checkpoint.pth")
    _, text = run(f"--resume {trained.folder}/checkpoint.pth --num_workers 0 --device cpu --epochs 13 --lr 3e-5 "
                  f"--lr_schedule step --output_dir {tmp_path}/out --weight_decay 0.5")
    assert "--lr 3e-05 (was 0.001)" in text and "--epochs 13 (was 12)" in text and "epoch 12 is next" in text
    row, = log(tmp_path / "out")
    assert row["epoch"] == 12 and row["train_lr"] == pytest.approx(3e-5)
    after = checkpoint.load(tmp_path / "out" / "checkpoint.pth")
    assert [(g["lr"], g["weight_decay"]) for g in after["optimizer"]["param_groups"]] == [(3e-5, 0.5), (1e-3, 0.5)]
    steps = [state["optimizer"]["state"][0]["step"].item() for state in (before, after)]
    assert steps == [48, 52] and after["ema_steps"] == 52


def test_nothing_is_left_to_train(trained):
    message = refused(f"--resume {trained.folder}/checkpoint.pth".replace("--model tiny_detr", ""), ValueError)
    assert "has finished epoch 11 of 12: nothing is left to train; give more --epochs, or --eval" in message


def test_weights_alone_begin_a_new_training(trained, data, tmp_path):
    state = checkpoint.load(trained.folder / "checkpoint.pth")
    checkpoint.save(tmp_path / "weights.pth", {"model": state["model"]})
    _, text = run(SMALL + f"--coco_path {data} --resume {tmp_path}/weights.pth --epochs 1 --lr 1e-5 --lr_backbone 1e-5 "
                  f"--output_dir {tmp_path}/out")
    assert "weights.pth has weights only: training starts at epoch 0 with a new optimizer" in text
    assert log(tmp_path / "out")[0]["train_loss"] < 0.9 * log(trained.folder)[0]["train_loss"]


def test_an_optimizer_that_does_not_fit(trained):
    with pytest.raises(ValueError, match="its optimizer does not fit the parameters that train now.*resume with the "
                                         "same --lr_backbone"):
        run(f"--resume {trained.folder}/checkpoint.pth --num_workers 0 --device cpu --epochs 13 --lr_backbone 0 "
            "--no_from_scratch")


def test_the_seed_decides(data, tmp_path):
    lines = [SMALL + f"--coco_path {data} --epochs 1 --seed {seed} --output_dir {tmp_path}/{n}"
             for n, seed in enumerate((1, 1, 2))]
    losses = [run(line) and log(tmp_path / str(n))[0]["train_loss"] for n, line in enumerate(lines)]
    assert losses[0] == losses[1] != losses[2]


# -- parts ------------------------------------------------------------------------------------------------------------

def test_a_model_that_learns_at_three_rates(data, tmp_path, monkeypatch):
    def three(self, model, lr):
        heads = {id(p) for name, p in model.named_parameters() if "class_embed" in name}
        return [{"params": [p for p in model.parameters() if id(p) not in heads], "lr": lr},
                {"params": [], "lr": self.lr_backbone},
                {"params": [p for p in model.parameters() if id(p) in heads], "lr": 0.1 * lr}]
    monkeypatch.setattr(ModelConfig, "parameter_groups", three)
    line = SMALL + (f"--coco_path {data} --output_dir {tmp_path}/out --lr 1e-3 --lr_backbone 5e-4 --warmup_steps 0 "
                    "--lr_schedule step --lr_drop_epochs 1 --eval_every 9 ")
    run(line + "--epochs 2")
    _, text = run(f"--resume {tmp_path}/out/checkpoint.pth --num_workers 0 --device cpu --epochs 3 --lr_drop_epochs 1 2")
    assert "epoch 2 is next" in text and "--epochs 3 (was 2), --lr_drop_epochs 1 2 (was 1)" in text
    assert [row["train_lr"] for row in log(tmp_path / "out")] == pytest.approx([1e-3, 1e-4, 1e-5])
    groups = checkpoint.load(tmp_path / "out" / "checkpoint.pth")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-5, 5e-6, 1e-6])
    assert len(groups[0]["params"]) > len(groups[2]["params"]) > 0 == len(groups[1]["params"])


def test_parts_of_the_command_line_are_those_of_the_configurations():
    """Each field of each configuration is in one group."""
    shown = [name for _, dataclass, names in main.GROUPS for name in names or
             [field.name for field in dataclasses.fields(dataclass)]]
    configs = {type(preset.model) for preset in PRESETS.values()} | {TrainConfig, DataConfig, main.RunConfig}
    assert sorted(shown) == sorted({field.name for config in configs for field in dataclasses.fields(config)})
