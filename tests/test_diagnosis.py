"""Faults that were put in by hand are found where they were put; what was looked at is as it was before."""
import copy
import importlib.util
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import NUM_CLASSES, build_small, images, small_flags, targets
from torch import Tensor, nn

from detr import checkpoint, diagnosis
from detr.collapse import CollapseWatch
from detr.config import replace
from detr.diagnosis import (
    NOT_FOUND,
    Skips,
    StepHistory,
    blame,
    images_of,
    random_states,
    save_repro,
    set_random_states,
    tensors_in,
)
from detr.memory import checkpoint_activations
from detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from detr.presets import PRESETS

DENSE, DEFORMABLE = "detr_resnet50", "deformable_detr_resnet50"
MODELS = [DENSE, DEFORMABLE, "tiny_detr", "tiny_deformable_detr"]
HEADS = {DENSE: ("class_embed", "bbox_embed"), DEFORMABLE: ("class_embed.0", "bbox_embed.0"),
         "tiny_detr": ("transformer.decoder.heads.class_embed", "transformer.decoder.heads.bbox_embed"),
         "tiny_deformable_detr": ("class_embed.1", "bbox_embed.1")}
MASKS = {"masks": True, "hidden_dim": 128, "nheads": 8}                         # the least that a mask head can do with


def step(name: str, **flags) -> tuple[nn.Module, nn.Module, NestedTensor, list[dict[str, Tensor]]]:
    """A model in training, its criterion and two images of different sizes with ids 40 and 41."""
    model, criterion, _ = build_small(name, **flags)
    objects = [{**target, "image_id": torch.tensor([40 + i])} for i, target in enumerate(targets(2, 3))]
    return model.train(), criterion.train(), nested_tensor_from_tensor_list(images((64, 64), (48, 64))), objects


def put(module: nn.Module, where: Callable[[Tensor], Tensor] | tuple, value: float = math.nan) -> None:
    """From now on ``value`` stands at an index of the module's output."""
    def change(_: nn.Module, __: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[where] = value
        return output
    module.register_forward_hook(change)


# -- five places for a value that is no number ------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_an_input_image(name):
    model, criterion, samples, objects = step(name)
    samples.tensors[1, 0, 3, :2] = math.nan
    samples.tensors[1, 2, 0, 0] = -math.inf
    said = blame(model, criterion, samples, objects)
    assert said.startswith("the input has values that are no numbers: image 1 of the batch (image_id 41): 3 of 12288 "
                           "values (2 nan, 1 inf)"), said
    assert "image 0" not in said


@pytest.mark.parametrize("name", MODELS)
def test_target_boxes(name):
    model, criterion, samples, objects = step(name)
    objects[1]["boxes"][2, 1] = math.nan
    said = blame(model, criterion, samples, objects)
    assert said.startswith("the ground truth has boxes that are no numbers: targets[1]['boxes'] of image 1 of the batch "
                           "(image_id 41): row 2 ["), said
    assert "row 0" not in said and "image 0" not in said


@pytest.mark.parametrize("name", MODELS)
def test_a_weight(name):
    model, criterion, samples, objects = step(name)
    parameter, tensor = [(n, p) for n, p in model.named_parameters() if n.endswith("linear1.weight")][-1]
    with torch.no_grad():
        tensor[0, 0] = math.inf
    said = blame(model, criterion, samples, objects)
    assert said.startswith("the model had values that are no numbers before this step, in 1 of its tensors: "
                           f"{parameter} {list(tensor.shape)}: 1 of {tensor.numel()} values (1 inf). Go on"), said


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_boxes(name, head):
    """A head's output is no number for one query of image 1; what it is fed is."""
    model, criterion, samples, objects = step(name)
    module = model.get_submodule(HEADS[name][head])
    put(module, (..., 1, 3, 0))                                             # [B, Q, ...], or [K, B, Q, ...] with K = B
    said = blame(model, criterion, samples, objects)
    kind = "Linear" if head == 0 else "MLP"
    assert said.startswith(f"{HEADS[name][head]} ({kind}"), said
    assert ") is the first module whose output is not finite while its inputs are: output [" in said
    assert "1 nan" in said or name == DENSE and "2 nan" in said             # DETR's heads see all layers at once
    assert "image 1 of the batch (image_id 41)" in said and "image 0" not in said


def test_which_call_of_a_shared_head():
    """Without refinement the two layers of the decoder share their heads."""
    model, criterion, samples, objects = step(DEFORMABLE)
    calls = []

    def change(_: nn.Module, __: object, output: Tensor) -> Tensor:
        calls.append(1)
        return output * math.nan if len(calls) == 2 else output
    model.class_embed[0].register_forward_hook(change)
    assert blame(model, criterion, samples, objects).startswith("class_embed.0 (Linear, call 2) is the first module")


# -- overflow ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, layer", [(DENSE, "transformer.decoder.layers.1.linear1"),
                                         (DEFORMABLE, "transformer.encoder.layers.1.linear2"),
                                         ("tiny_deformable_detr", "transformer.decoder.layers.0.linear1")])
@pytest.mark.parametrize("amp, factor, ends", [("fp16", 1e6, "6.55e+04"), ("bf16", 1e38, "3.39e+38")])
def test_overflow_of_one_layer(name, layer, amp, factor, ends):
    model, criterion, samples, objects = step(name)
    with torch.no_grad():
        linear = model.get_submodule(layer)
        linear.weight.mul_(factor if amp == "bf16" else 1).clamp_(-3e38, 3e38)
        linear.bias.add_(factor if amp == "fp16" else 0)
        if amp == "bf16":
            linear.bias.fill_(3.3e38)
    said = blame(model, criterion, samples, objects, amp=amp)
    assert said.startswith(f"{layer} (Linear) is the first module whose output is not finite while its inputs are"), said
    assert {"fp16": "float16", "bf16": "bfloat16"}[amp] in said and f"ends at {ends}" in said
    if amp == "fp16":
        assert blame(model, criterion, samples, objects, amp="off").startswith(NOT_FOUND)


def test_finite_outputs_and_a_loss_that_is_not():
    model, criterion, samples, objects = step(DENSE)
    objects[0]["boxes"] = objects[0]["boxes"] * 3e38                        # numbers still
    said = blame(model, criterion, samples, objects)
    assert said.startswith("not finite: ") and "boxes of the ground truth 1.76e+38" in said, said

    class Overflow(nn.Module):
        weight_dict = {"loss_a": 1.0, "loss_b": 1.0}

        def forward(self, outputs: dict, targets: list) -> dict[str, Tensor]:
            total = outputs["pred_logits"].float().sum()
            return {"loss_a": total, "loss_b": total * 0 + math.inf, "loss_c": total}

        @staticmethod
        def weighted_sum(losses: dict[str, Tensor]) -> Tensor:
            return losses["loss_a"] + losses["loss_b"]
    said = blame(model, Overflow(), samples, objects)
    assert "of the losses the first that is not is loss_b = inf (1 of 3). Largest magnitudes: pred_logits" in said, said


class NoWayBack(torch.autograd.Function):
    """The identity, whose gradient is no number."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * math.nan


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NoWayBack.apply(x)


@pytest.mark.parametrize("name", [DENSE, DEFORMABLE])
def test_a_gradient_inside_the_model(name):
    model, criterion, samples, objects = step(name)
    model.transformer.encoder.layers[1].linear2 = nn.Sequential(model.transformer.encoder.layers[1].linear2, Broken())
    said = blame(model, criterion, samples, objects)
    assert said.startswith("the losses are finite, but not the backward pass: the gradient is not finite from the "
                           "output ["), said
    assert "of transformer.encoder.layers.1.linear2.0 (Linear) on" in said, said
    assert "was finite last at the output" in said and "of transformer.encoder.layers.1.linear2.1 (Broken)" in said
    assert "Parameters whose gradient is not finite: " in said


def test_a_gradient_of_one_loss():
    model, criterion, samples, objects = step(DENSE)
    plain = criterion.losses[1]
    assert plain.__name__ == "box_loss"

    def broken(*args):
        values = plain(*args)
        return {**values, "loss_giou": NoWayBack.apply(values["loss_giou"])}
    criterion.losses[1] = broken
    said = blame(model, criterion, samples, objects, scale=1024.0)
    assert said.startswith("the losses are finite, but not the gradient of loss_giou with respect to pred_boxes "
                           "[2, 7, 4]: "), said
    assert "of a loss times 1024" in said


def test_a_gradient_of_a_weight_alone():
    model, criterion, samples, objects = step(DENSE)
    model.class_embed.weight.register_hook(lambda gradient: gradient * math.inf)
    said = blame(model, criterion, samples, objects)
    assert "Parameters whose gradient is not finite: 1 of" in said and ": class_embed.weight: " in said, said


def test_fp16_gradients_that_a_scale_makes_too_large():
    model, criterion, samples, objects = step(DENSE)
    assert blame(model, criterion, samples, objects, amp="fp16", scale=64.0).startswith(NOT_FOUND)
    said = blame(model, criterion, samples, objects, amp="fp16", scale=1e12)
    assert said.startswith("the losses are finite, but not the ") and "of a loss times 1e+12" in said, said


# -- what it must not do ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_nothing_to_find_and_nothing_changed(name):
    model, criterion, samples, objects = step(name)
    model.backbone.eval()                                                   # modes are kept, part by part
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    modes = [m.training for m in [*model.modules(), *criterion.modules()]]
    state, gradients = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    batch = copy.deepcopy((samples.tensors, objects))
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    for options in ({}, {"amp": "bf16"}, {"backward": False}, {"random_state": random_states()}):
        said = blame(model, criterion, samples, objects, **options)
        assert said.startswith(f"{NOT_FOUND}: images, boxes, weights, outputs, losses") and "In passing" not in said, said
    assert torch.equal(torch.rand(3), drawn)
    assert [m.training for m in [*model.modules(), *criterion.modules()]] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients):
        assert parameter.grad is gradient and (gradient is None or bool((gradient == 1).all()))
    assert torch.equal(samples.tensors, batch[0])
    assert all(torch.equal(a[key], b[key]) for a, b in zip(objects, batch[1]) for key in a)
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert not nn.modules.module._global_forward_hooks


def test_batch_statistics_are_put_back_and_a_step_that_spoilt_them_is_told():
    model, criterion, samples, objects = step("tiny_detr")
    put(model.input_proj, (1, 0), math.inf)
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    assert blame(model, criterion, samples, objects).startswith("input_proj (Conv2d) is the first module")
    assert all(torch.equal(b, statistics[name]) for name, b in model.named_buffers())
    name, norm = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_var.fill_(math.inf)
    said = blame(model, criterion, samples, objects)
    assert said.startswith("input_proj (Conv2d) is the first module"), said
    assert f"\nIn consequence 1 averages of batch norms are no numbers any more ({name}.running_var)" in said
    model.eval()                                                            # where it takes part, it is the cause
    assert f"buffer {name}.running_var" in blame(model, criterion, samples, objects, backward=False)


def test_hooks_go_away_when_the_model_fails():
    model, criterion, samples, objects = step(DENSE)

    def fail(*_: object) -> None:
        raise RuntimeError("something else")
    model.class_embed.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="something else"):
        blame(model, criterion, samples, objects)
    assert not nn.modules.module._global_forward_hooks and criterion.training


def test_the_same_dropout_as_in_the_step():
    """With the random state of the step the same elements are dropped; with another state, others."""
    model, criterion, samples, objects = step(DENSE)
    seen = []
    model.transformer.decoder.layers[0].dropout.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    state = random_states()
    model(samples)
    blame(model, criterion, samples, objects, random_state=state)
    calls = len(seen) // 2
    assert calls >= 3 and all(torch.equal(a, b) for a, b in zip(seen[:calls], seen[calls:]))
    blame(model, criterion, samples, objects)
    assert not all(torch.equal(a, b) for a, b in zip(seen[:calls], seen[2 * calls:]))


def test_attention_weights_are_not_computed_for_it(monkeypatch):
    model, criterion, samples, objects = step(DENSE)
    monkeypatch.setattr("detr.attention._weights", lambda *_: pytest.fail("nobody asked for weights"))
    assert blame(model, criterion, samples, objects).startswith(NOT_FOUND)


def test_models_that_match_by_themselves():
    model, criterion, samples, objects = step(DENSE, **MASKS)
    put(model.detr.bbox_embed, (1, 1, 0, 0))
    said = blame(model, criterion, samples, objects, takes_targets=True)
    assert said.startswith("detr.bbox_embed (MLP) is the first module whose output is not finite"), said
    model, criterion, samples, objects = step(DENSE, **MASKS)
    assert blame(model, criterion, samples, objects, takes_targets=True).startswith(NOT_FOUND)
    model.matcher.cost_bbox = math.inf                                      # finite outputs, and a cost that is not
    assert "not finite: the matching cost, though the output of every module was finite so far" in blame(
        model, criterion, samples, objects, takes_targets=True)


def test_images_of_a_tensor():
    x = torch.zeros(3, 2, 5)
    x[1, 1, 0] = math.nan
    assert images_of(x, 2) == [1] and images_of(x, 3) == [1] and images_of(x[0], 2) == [] and images_of(x[1], 2) == [1]
    assert images_of(x, 4) is None and images_of(x[:2], 2) is None          # two layers of two images: either
    assert images_of(x[1:2], 1) == [0]


def test_tensors_in_nested_values():
    x, y = torch.zeros(2), torch.zeros(1, dtype=torch.int64)
    nested = {"a": [x, {"b": (y, x)}], "c": NestedTensor(x, y), "d": None, "e": 3}
    assert [path for path, _ in tensors_in(nested)] == ["a[0]", "a[1].b[1]", "c.tensors"]


# -- the same step again ----------------------------------------------------------------------------------------------

def test_random_states_go_round(tmp_path):
    random.gauss(0, 1)                                                      # leaves half a pair behind, as NumPy's does
    np.random.randn()
    checkpoint.save(tmp_path / "states.pth", {"model": {}, "states": random_states()})
    first = torch.rand(4), [random.random(), random.gauss(0, 1)], np.random.randn(3)
    torch.rand(7), random.random(), np.random.rand(5)
    set_random_states(checkpoint.load(tmp_path / "states.pth")["states"])
    second = torch.rand(4), [random.random(), random.gauss(0, 1)], np.random.randn(3)
    assert torch.equal(first[0], second[0]) and first[1] == second[1] and first[2].tolist() == second[2].tolist()


def replay_script():
    path = Path(__file__).resolve().parent.parent / "scripts" / "replay.py"
    spec = importlib.util.spec_from_file_location("replay", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_of(name: str, **flags) -> dict:
    import dataclasses
    config = replace(PRESETS[name].model, small_flags(name) | flags)
    return {"name": name, "model": dataclasses.asdict(config), "num_classes": NUM_CLASSES}


@pytest.mark.parametrize("name, fault", [(DENSE, "image"), (DEFORMABLE, "overflow"), (DENSE, "nothing")])
def test_a_file_that_shows_the_fault_again(name, fault, tmp_path, capsys):
    model, criterion, samples, objects = step(name)
    model.backbone.eval()
    state = random_states()
    if fault == "image":
        samples.tensors[0, 0, 0, 0] = math.nan
    if fault == "overflow":
        with torch.no_grad():
            model.transformer.encoder.layers[0].linear1.bias.fill_(1e6)
    said = blame(model, criterion, samples, objects, amp="fp16", random_state=state)
    history = StepHistory()
    history.add(3, 7, 1.5, 2.5, 1e-4)
    file = tmp_path / "repro.pth"
    save_repro(file, model=model, criterion_settings=settings_of(name), samples=samples, targets=objects,
               random_state=state, where={"amp": "fp16", "report": said, "epoch": 3, "history": history.state_dict()})
    script = replay_script()
    assert script.main(["--device", "cpu", str(file)]) == (1 if fault == "nothing" else 0)
    printed = capsys.readouterr().out
    assert f"found again: {said}" in printed if fault != "nothing" else NOT_FOUND in printed
    assert "epoch: 3" in printed and "0.0001" in printed


def test_a_file_has_modes_and_frozen_parts(tmp_path, monkeypatch):
    model, criterion, samples, objects = step(DENSE, **MASKS)
    model.detr.backbone.eval()
    model.detr.class_embed.requires_grad_(False)
    save_repro(tmp_path / "repro.pth", model=model, criterion_settings=settings_of(DENSE, **MASKS), samples=samples,
               targets=objects, random_state=None, where={"scale": 8.0, "amp": "bf16"})
    content = checkpoint.load(tmp_path / "repro.pth")
    other, criterion, _ = build_small(DENSE, seed=1, **MASKS)
    checkpoint.load_model(other, content["model"], "repro.pth")
    given = {}
    monkeypatch.setattr(diagnosis, "blame", lambda *args, **options: given.update(options, args=args) or "")
    diagnosis.replay(content, other, criterion, torch.device("cpu"))
    assert {n: m.training for n, m in other.named_modules()} == {n: m.training for n, m in model.named_modules()}
    assert {n: p.requires_grad for n, p in other.named_parameters()} == \
        {n: p.requires_grad for n, p in model.named_parameters()}
    assert given["takes_targets"] and given["backward"] and given["scale"] == 8 and given["amp"] == "bf16"
    assert torch.equal(given["args"][2].tensors, samples.tensors) and given["args"][2].sizes == samples.sizes


def test_a_file_that_is_something_else(tmp_path, capsys):
    file = tmp_path / "weights.pth"
    checkpoint.save(file, {"model": {"a": torch.zeros(1)}, "config": {}})
    with pytest.raises(SystemExit, match="2"):
        replay_script().main([str(file)])
    assert "weights.pth is no file of a failed step: it has no images, mask, targets" in capsys.readouterr().err


# -- small parts ------------------------------------------------------------------------------------------------------

def test_history():
    history = StepHistory(length=4)
    for i in range(6):
        history.add(1, i, 2.0 * i, math.inf if i == 5 else 0.5, 1e-3)
    lines = history.text(last=2).splitlines()
    assert [line.split() for line in lines] == [["epoch", "step", "loss", "grad_norm", "lr"],
                                                ["1", "4", "8", "0.5", "0.001"], ["1", "5", "10", "inf", "0.001"]]
    assert len({len(line) for line in lines}) == 1
    other = StepHistory(length=4)
    other.load_state_dict(history.state_dict())
    assert other.text() == history.text() and len(other.rows) == 4


def test_skips():
    assert not Skips("stop", 3).allow()
    skips = Skips("skip", 2)
    assert [skips.allow() for _ in range(4)] == [True, True, False, False] and skips.count == 2
    other = Skips("skip", 3)
    other.load_state_dict(skips.state_dict())
    assert other.allow() and not other.allow()
    with pytest.raises(ValueError, match="--non_finite ignore: use stop or skip"):
        Skips("ignore", 1)


@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_layers_that_are_computed_again_or_compiled(how):
    """Hooks that look at values change nothing of what is recomputed, and nothing is traced."""
    model, criterion, samples, objects = step("detr_resnet50")
    if how == "checkpointed":
        assert checkpoint_activations(model)
    else:
        for layer in model.transformer.encoder.layers:
            layer.compile(backend="aot_eager")
    model.transformer.encoder.layers[1].linear1.weight.data[0, 0] = math.inf
    assert "linear1.weight" in blame(model, criterion, samples, objects)
    model.transformer.encoder.layers[1].linear1.weight.data[0, 0] = 1.0
    put(model.transformer.encoder.layers[1].linear2, (0, 3))
    said = blame(model, criterion, samples, objects)
    assert "transformer.encoder.layers.1" in said, said


# -- the same boxes for every image -----------------------------------------------------------------------------------

def seen(images: int, queries: int = 12, spread: float = 0.3, seed: int = 0) -> tuple[dict[str, Tensor], list]:
    """Predictions that differ from image to image, and targets of which some are empty."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(images, queries, 4, generator=generator) * spread + 0.3
    objects = [{"boxes": torch.rand(i % 4, 4, generator=generator), "labels": torch.zeros(i % 4)} for i in range(images)]
    return {"pred_boxes": boxes, "pred_logits": torch.randn(images, queries, 3, generator=generator)}, objects


def show(watch: CollapseWatch, outputs: dict[str, Tensor], objects: list, sizes: list[int]) -> None:
    """All images, in batches of these sizes over and over."""
    start, i = 0, 0
    while start < len(objects):
        stop = start + sizes[i % len(sizes)]
        watch.update({name: x[start:stop] for name, x in outputs.items()}, objects[start:stop])
        start, i = stop, i + 1


def after_an_epoch() -> CollapseWatch:
    """A watch that has given its first verdict."""
    watch = CollapseWatch()
    assert watch.verdict() is None
    return watch


@pytest.mark.parametrize("sizes", [[1], [2], [4], [3, 1, 4]])
def test_distances_by_their_definition(sizes):
    """Pairs reach over batches, whatever their sizes up to four."""
    outputs, objects = seen(12)
    watch = CollapseWatch()
    show(watch, outputs, objects, sizes)

    def nearest(a: list, b: list) -> list[float]:
        return [min(sum(abs(p - q) for p, q in zip(x, y)) for y in b) for x in a] if b else []
    boxes = outputs["pred_boxes"].double().tolist()
    true = [target["boxes"].double().tolist() for target in objects]
    apart = [d for a, b in zip(boxes, boxes[1:]) for d in nearest(a, b)]
    true_apart = [d for a, b in zip(true, true[1:]) for d in nearest(a, b)]
    assert watch.numbers()[:2] == pytest.approx((sum(apart) / len(apart), sum(true_apart) / len(true_apart)), rel=1e-5)


def test_deviation_of_logits():
    outputs, objects = seen(4)
    watch = CollapseWatch()
    watch.update(outputs, objects)
    expected = [np.std(outputs["pred_logits"][:, :, c].double().numpy(), ddof=1) for c in range(3)]
    assert watch.numbers()[2] == pytest.approx(sum(expected) / 3, rel=1e-5)


@pytest.mark.parametrize("sizes", [[1], [2], [16]])
def test_the_same_boxes_for_every_image(sizes):
    outputs, objects = seen(128)
    watch = after_an_epoch()
    show(watch, outputs, objects, sizes)
    assert watch.verdict() is None                                          # different ones
    generator = torch.Generator().manual_seed(1)
    same = outputs["pred_boxes"][:1] + torch.randn(128, 12, 4, generator=generator) * 1e-3
    same = torch.stack([boxes[torch.randperm(12, generator=generator)] for boxes in same])          # queries by score
    show(watch, {**outputs, "pred_boxes": same}, objects, sizes)
    said = watch.verdict()
    assert said is not None and said.startswith("the model gives the same boxes for every image: over"), said
    assert "--lr" in said and "--warmup_steps" in said and "--finetune" in said and "--epochs" in said
    assert watch.images == 0 and watch.verdict() is None                    # it begins anew


def test_images_that_are_the_same():
    """A fixed camera on one machine part: boxes ought to be the same. And no objects at all say nothing."""
    outputs, objects = seen(128)
    same = {**outputs, "pred_boxes": outputs["pred_boxes"][:1].expand(128, -1, -1)}
    for truth in ([{"boxes": torch.full((1, 4), 0.4), "labels": torch.zeros(1)}] * 128,
                  [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}] * 128):
        watch = after_an_epoch()
        show(watch, same, truth, [4])
        assert watch.verdict() is None
    watch = after_an_epoch()
    show(watch, same, objects[:60], [4])
    assert watch.verdict() is None                                          # too few, which wait for those to come
    show(watch, same, objects[60:64], [4])
    assert "over 64 training images" in watch.verdict()
    show(watch, same, objects[:60], [4])
    assert watch.verdict() is None                                          # counted from that verdict on


def test_the_first_epoch_is_let_pass():
    outputs, objects = seen(128)
    watch, same = CollapseWatch(), {**outputs, "pred_boxes": outputs["pred_boxes"][:1].expand(128, -1, -1)}
    show(watch, same, objects, [4])
    assert watch.verdict() is None
    show(watch, same, objects, [4])
    assert watch.verdict() is not None


def test_scores_that_tell_nothing_apart():
    outputs, objects = seen(128)
    watch = after_an_epoch()
    show(watch, {**outputs, "pred_logits": outputs["pred_logits"] * 1e-3 - 2}, objects, [4])
    said = watch.verdict()
    assert said is not None and said.startswith("the model's scores tell nothing apart: over 128 training images"), said


def test_a_watch_that_is_saved_goes_on_exactly(tmp_path):
    outputs, objects = seen(12)
    whole, first, second = CollapseWatch(), CollapseWatch(), CollapseWatch()
    show(whole, outputs, objects, [2])
    show(first, {name: x[:6] for name, x in outputs.items()}, objects[:6], [2])
    checkpoint.save(tmp_path / "watch.pth", {"model": {}, "watch": first.state_dict()})
    second.load_state_dict(checkpoint.load(tmp_path / "watch.pth")["watch"])
    show(second, {name: x[6:] for name, x in outputs.items()}, objects[6:], [2])
    assert second.numbers() == whole.numbers() and second.images == whole.images == 12


def test_a_watch_keeps_no_graph():
    outputs, objects = seen(4)
    outputs["pred_boxes"].requires_grad_()
    watch = CollapseWatch()
    watch.update(outputs, objects)
    assert not watch.sums.requires_grad and not watch.last[0].requires_grad


def test_kept_buffers():
    norm = nn.Sequential(nn.BatchNorm1d(3))
    kept = diagnosis.kept_buffers(norm)
    norm(torch.full((4, 3), math.inf))
    assert not norm[0].running_mean.isfinite().any()
    diagnosis.put_back_buffers(norm, kept)
    assert norm[0].running_mean.tolist() == [0, 0, 0] and int(norm[0].num_batches_tracked) == 0
