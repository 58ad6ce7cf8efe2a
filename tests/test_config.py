"""Configuration: the original flags as fields, fields as flags, and what is refused."""
import argparse
import dataclasses
import typing

import pytest

from detr.architectures.detr import DETRConfig
from detr.config import (
    DataConfig,
    RunConfig,
    TrainConfig,
    add_flags,
    divide,
    flag,
    kind_of,
    nearest,
    replace,
    shown,
    typed_flags,
    validate,
)
from detr.presets import PRESETS

CONFIGS = [*{type(preset.model): None for preset in PRESETS.values()}, TrainConfig, DataConfig, RunConfig]
ORIGINAL = dict(
    aux_loss=True, backbone="resnet50", batch_size=2, bbox_loss_coef=5, clip_max_norm=0.1, coco_panoptic_path=None,
    coco_path=None, dataset_file="coco", dec_layers=6, device="cuda", dice_loss_coef=1, dilation=False,
    dim_feedforward=2048, dist_url="env://", dropout=0.1, enc_layers=6, eos_coef=0.1, epochs=300, eval=False,
    frozen_weights=None, giou_loss_coef=2, hidden_dim=256, lr=0.0001, lr_backbone=1e-05, lr_drop=200,
    mask_loss_coef=1, masks=False, nheads=8, num_queries=100, num_workers=2, output_dir="",
    position_embedding="sine", pre_norm=False, remove_difficult=False, resume="", seed=42, set_cost_bbox=5,
    set_cost_class=1, set_cost_giou=2, start_epoch=0, weight_decay=0.0001, world_size=1)


@dataclasses.dataclass(frozen=True)
class Example:
    size: int = flag(3, "pixels")
    rate: float = flag(0.5, "share")
    fast: bool = flag(False, "hurry")
    tidy: bool = flag(True, "clean up")
    path: str | None = flag(None, "folder")
    mode: str = flag("a", "way", ("a", "b"))
    name: str = flag("", "what to call it")


@dataclasses.dataclass(frozen=True)
class Several:
    names: tuple[str, ...] = flag(("a.0", "b"), "parts of names")
    steps: tuple[int, ...] | None = flag(None, "when", least=1)
    shares: tuple[float, ...] = flag((), "how much", least=0)
    modes: tuple[str, ...] = flag(("x",), "ways", ("x", "y"))


class Store(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)


def parser(names=None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(made, Example, Store, names)
    return made


def test_original_flags():
    fields = {field.name: field for part in (DETRConfig, TrainConfig, DataConfig, RunConfig)
              for field in dataclasses.fields(part)}
    assert {name: fields[name].default for name in ORIGINAL} == ORIGINAL
    types = {name: kind for part in (DETRConfig, TrainConfig, DataConfig, RunConfig)
             for name, kind in typing.get_type_hints(part).items()}
    for name, value in ORIGINAL.items():
        assert types[name] is (float if "coef" in name or "cost" in name else type(value)) or value is None, name


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_a_flag_with_help(config):
    for field in dataclasses.fields(config):
        text = field.metadata["help"]
        assert text and "\n" not in text and not text.endswith("."), field.name
        assert field.metadata["choices"] is None or field.default in field.metadata["choices"]
    made = argparse.ArgumentParser()
    add_flags(made, config, Store)
    assert vars(made.parse_args([])) == {field.name: field.default for field in dataclasses.fields(config)}
    assert len(made.format_help()) > 100                        # no stray % in a help text


@pytest.mark.parametrize("config", CONFIGS)
def test_frozen(config):
    made = config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(config)[0].name, 1)
    validate(made)


def test_no_name_stands_for_two_things():
    for config in CONFIGS[:-3]:
        names = [field.name for part in (config, TrainConfig, DataConfig, RunConfig)
                 for field in dataclasses.fields(part)]
        assert len(names) == len(set(names))


def test_flags_of_a_dataclass():
    given = parser().parse_args("--size 7 --rate 1e-3 --fast --no_tidy --path x --mode b --name y".split())
    assert vars(given) == {"size": 7, "rate": 1e-3, "fast": True, "tidy": False, "path": "x", "mode": "b", "name": "y"}
    assert type(given.size) is int and type(given.rate) is float
    assert vars(parser().parse_args(["--fast", "--no_fast", "--no_tidy", "--tidy"]))["fast"] is False      # last wins
    assert parser(["size", "fast"]).parse_args([]) == argparse.Namespace(size=3, fast=False)


@pytest.mark.parametrize("line", ["--size x", "--mode c", "--siz 3", "--fast 1", "--path"])
def test_flags_refused(line, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(line.split())
    assert "error" in capsys.readouterr().err


def test_help_of_flags():
    text = " ".join(parser().format_help().split())
    assert "--size INT pixels (default: 3)" in text and "--rate FLOAT share (default: 0.5)" in text
    assert "--path STR folder" in text and "folder (default" not in text
    assert "--name STR what to call it" in text and "call it (default" not in text
    assert "--mode {a,b} way (default: a)" in text
    options = text[text.index("options:"):]
    assert "--fast hurry" in options and "--no_fast" not in options             # only what changes the default
    assert "--no_tidy not: clean up" in options and "--tidy clean" not in options


def test_replace():
    assert replace(Example(), {"size": 4, "mode": "b"}) == Example(size=4, mode="b")
    original = Example()
    assert replace(original, {}) == original
    with pytest.raises(ValueError, match="Example has no option 'sizes'; did you mean size?"):
        replace(original, {"sizes": 4})
    with pytest.raises(ValueError, match="--mode 'c' is not one of a, b"):
        replace(original, {"mode": "c"})
    with pytest.raises(ValueError, match="--mode 'c'"):
        validate(Example(mode="c"))


def test_divide():
    own, shared = divide({"size": 1, "lr": 2, "coco_path": "x", "device": "cpu"}, Example())
    assert own == {"size": 1} and shared == {"lr": 2, "coco_path": "x", "device": "cpu"}
    for name, near in (("sice", "size"), ("lr_dropp", "lr_drop"), ("coco_pth", "coco_path"), ("devise", "device")):
        with pytest.raises(ValueError, match=f"Example has no option '{name}'; did you mean {near}?"):
            divide({name: 1}, Example())


def test_typed_flags():
    args = argparse.Namespace(size=3, rate=0.7, fast=False, other=5, typed=frozenset({"size", "other"}))
    assert typed_flags(args, [Example]) == {"size": 3, "rate": 0.7}             # typed as its default; set by a program
    assert typed_flags(argparse.Namespace(size=3), [Example]) == {}


# -- flags with several values ----------------------------------------------------------------------------------------

def several(line: str = "") -> argparse.Namespace:
    made = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(made, Several, Store)
    return made.parse_args(line.split())


def test_several_values():
    assert vars(several()) == {"names": ("a.0", "b"), "steps": None, "shares": (), "modes": ("x",)}
    given = several("--steps 30 40 --names c --shares 1 0.5 --modes y x")
    assert replace(Several(), vars(given)) == Several(("c",), (30, 40), (1.0, 0.5), ("y", "x"))
    assert [type(step) for step in given.steps] == [int, int] and [type(s) for s in given.shares] == [float, float]
    assert several("--steps 1 2 --steps 3").steps == [3]                        # the last one, as other flags


@pytest.mark.parametrize("line, message", [
    ("--steps", "argument --steps: expected at least one argument"),
    ("--steps 3 x", "argument --steps: invalid int value: 'x'"),
    ("--modes x z", "argument --modes: invalid choice: 'z'")])
def test_several_values_refused_by_the_parser(line, message, capsys):
    with pytest.raises(SystemExit):
        several(line)
    assert message in capsys.readouterr().err


def test_help_of_several_values():
    made = argparse.ArgumentParser(prog="p")
    add_flags(made, Several, Store)
    text = " ".join(made.format_help().split())
    assert "--names STR [STR ...] parts of names (default: a.0 b)" in text
    assert "--steps INT [INT ...] when --shares FLOAT [FLOAT ...] how much --modes" in text         # no default is shown


def test_lists_become_tuples():
    for values in (["c", "d"], ("c", "d")):                     # argparse's and a program's lists; a dataclass' tuples
        assert replace(Several(), {"names": values}) == Several(names=("c", "d"))
    assert replace(Several(), {"steps": [7]}) == Several(steps=(7,)) and replace(Several(steps=(7,)), {"steps": None})


@pytest.mark.parametrize("changes, message", [
    ({"steps": [3, 0]}, "--steps 3 0: each must be at least 1"),
    ({"shares": [-1]}, "--shares -1: each must be at least 0"),
    ({"shares": [float("nan")]}, "--shares nan: each must be at least 0"),
    ({"names": "a.0"}, "--names 'a.0': a list of str is needed, even for one value"),               # not its letters
    ({"steps": 3}, "--steps 3: a list of int is needed, even for one value"),
    ({"names": None}, "--names None: a list of str is needed"),
    ({"modes": ["x", "z"]}, "--modes 'z' is not one of x, y")])
def test_several_values_refused(changes, message):
    with pytest.raises(ValueError) as error:
        replace(Several(), changes)
    assert str(error.value).startswith(message)


def test_typed_lists():
    args = argparse.Namespace(names=["a.0", "b"], steps=[3], shares=(), modes=["x"], typed=frozenset({"modes"}))
    assert typed_flags(args, [Several]) == {"steps": (3,), "modes": ("x",)}     # a list equal to the default is no change


def test_kinds():
    hints = typing.get_type_hints(Several) | typing.get_type_hints(Example)
    assert {name: kind_of(hint) for name, hint in hints.items()} == {
        "names": (str, True), "steps": (int, True), "shares": (float, True), "modes": (str, True),
        "size": (int, False), "rate": (float, False), "fast": (bool, False), "tidy": (bool, False),
        "path": (str, False), "mode": (str, False), "name": (str, False)}
    assert shown((30, 40)) == "30 40" and shown("30 40") == "30 40" and shown(None) == "None"


def test_nearest():
    assert nearest("num_querys", ["num_queries", "nheads"]) == "; did you mean num_queries?"
    assert nearest("num_querys", ["num_queries"], prefix="--") == "; did you mean --num_queries?"
    assert nearest("zzz", ["num_queries", "nheads"]) in ("; did you mean num_queries?", "; did you mean nheads?")
    assert nearest("zzz", []) == ""
