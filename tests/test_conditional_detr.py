"""Conditional DETR against the published model and against its definition; and what the project's services do with it,
with DAB-DETR and with DAB-Deformable-DETR."""
import dataclasses
import math

import pytest
import torch
from cases import check, load_case, unchecked
from cases import targets as drawn_targets
from plain_transformers import conditional_detr, conditional_layer
from small_models import NUM_CLASSES, build_small, images, targets
from test_export import where_pytorch_can
from torch import Tensor, nn

from detr import build_model, checkpoint
from detr import export as exporting
from detr.attention_maps import explain
from detr.decoder import ConditionalDecoderLayer, FirstConditionalDecoderLayer
from detr.finetune import Counts, adapt, counts, freeze, layout, query_usage
from detr.inference import for_prediction
from detr.loading import load
from detr.memory import checkpoint_activations
from detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from detr.precision import autocast
from detr.presets import PRESETS
from detr.structures import Category
from engine import Progress, train_one_epoch

MODELS = ["conditional_detr_resnet50", "dab_detr_resnet50_dc5_3pat", "dab_deformable_detr_resnet50"]
TINY = ["tiny_conditional_detr", "tiny_dab_detr", "tiny_dab_deformable_detr"]
PUBLISHED = {"r50": "conditional_detr_resnet50", "r50_dc5": "conditional_detr_resnet50_dc5"}
SIZES = (64, 100), (90, 50)             # of a batch with padding, and no multiples of a stride
MASKS = {"masks": True, "hidden_dim": 128, "nheads": 8, "backbone": "resnet18", "dilation": False}


# -- the published model ----------------------------------------------------------------------------------------------

def check_output(case, name: str, value: Tensor) -> None:
    """One output against what the case stored of it: a slice, and statistics of all."""
    steps = case.spec["expected"][name].get("index", "[:]").strip("[]").split(",")
    slices = tuple(slice(None, None, int(step.strip().removeprefix("::") or 1) if "::" in step else None)
                   for step in steps)
    check(case, name, value[slices], **case.spec["expected"][name]["tolerance"])
    if f"{name}.stats" in case.expected:
        stats = torch.stack([value.mean(), value.std(correction=0), value.min(), value.max()])
        check(case, f"{name}.stats", stats, **case.spec["expected"][f"{name}.stats"]["tolerance"])


def test_published_model():
    case = load_case("conditional_detr_r50")
    with torch.device("meta"):                                  # all values come from the case
        model = build_model("conditional_detr_resnet50", num_classes=91, **case.spec["args"])[0]
    assert model.state_dict().keys() == case.spec["shapes"].keys()
    model.load_state_dict(case.state_dict(), strict=True, assign=True)
    with torch.no_grad():
        outputs = model.eval()(case.images())
    for key in ("pred_logits", "pred_boxes"):
        check_output(case, key, outputs[key])
        for i, layer in enumerate(outputs["aux_outputs"]):
            check_output(case, f"aux_outputs.{i}.{key}", layer[key])
    assert unchecked(case) == []


def test_published_parameter_counts():
    case = load_case("conditional_parameter_counts")
    for name, flags in case.spec["models"].items():
        with torch.device("meta"):
            models = [build_model("conditional_detr_resnet50", **flags)[0]]
            if name in PUBLISHED:
                models.append(build_model(PUBLISHED[name])[0])
        for model in models:
            check(case, f"{name}.trainable", sum(p.numel() for p in model.parameters() if p.requires_grad))
            check(case, f"{name}.total", sum(p.numel() for p in model.parameters()))
            check(case, f"{name}.names", len(model.state_dict()))
    assert unchecked(case) == []


def test_published_recipe_and_losses():
    spec = load_case("conditional_detr_r50").spec["args"]
    for name in PUBLISHED.values():
        preset = PRESETS[name]
        for part in (preset.model, preset.train):
            for field in dataclasses.fields(part):
                if field.name in spec and field.name != "dilation":
                    assert getattr(part, field.name) == spec[field.name], field.name
        assert preset.data == type(preset.data)() and preset.num_classes == 91
    assert PRESETS["conditional_detr_resnet50_dc5"].model.dilation
    model, criterion, postprocessors = build_small("conditional_detr_resnet50")
    layers = {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}
    assert criterion.weight_dict == layers | {f"{name}_0": weight for name, weight in layers.items()}
    assert postprocessors["bbox"].k == 100
    groups = PRESETS["conditional_detr_resnet50"].model.parameter_groups(model, 1e-4)
    assert [group["lr"] for group in groups] == [1e-4, 1e-5]


def test_first_predictions():
    """Every class is as good as absent, and boxes lie around their reference points, with half the image's sides."""
    model = build_small("conditional_detr_resnet50")[0].eval()
    with torch.no_grad():
        model.class_embed.weight.zero_()
        outputs = model(images((64, 64)))
        points = model.transformer.decoder.ref_point_head(model.query_embed.weight).sigmoid()
    for layer in (outputs, *outputs["aux_outputs"]):
        torch.testing.assert_close(layer["pred_logits"].sigmoid(), torch.full((1, 7, NUM_CLASSES), 0.01))
        torch.testing.assert_close(layer["pred_boxes"][0], torch.cat([points, torch.full((7, 2), 0.5)], dim=-1))


# -- the definition ---------------------------------------------------------------------------------------------------

def unlike_at_first(model: nn.Module) -> nn.Module:
    """In float64, and no weight at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.is_floating_point() and (value.ndim == 1 or value.std() == 0):
                value += torch.randn(value.shape, generator=generator) * 0.1
    return model.double().eval()


def compare_with(definition, name: str, **flags) -> tuple[dict, nn.Module]:
    """A small model on a padded batch, and ``definition`` on each image's part of the projected map: what all layers say,
    and the gradients of all that comes after the map."""
    model = unlike_at_first(build_small(name, **flags)[0])
    maps: list[Tensor] = []
    model.input_proj.register_forward_hook(lambda module, args, out: maps.append(out.detach()))
    samples = nested_tensor_from_tensor_list([image.double() for image in images(*SIZES)])
    outputs = model(samples)
    mask = next(iter(model.backbone[0](samples).values())).mask
    assert mask.any() and mask.shape[1:] == maps[0].shape[2:]
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for i, src in enumerate(maps[0]):
        height, width = int((~mask[i]).any(1).sum()), int((~mask[i]).any(0).sum())
        defined = definition(model.state_dict(keep_vars=True), src[:, :height, :width], heads=4)
        for (logits, boxes), layer in zip(defined, [*outputs["aux_outputs"], outputs], strict=True):
            found += [layer["pred_logits"][i], layer["pred_boxes"][i]]
            expected += [logits, boxes]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator).double() for x in found]
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith(("backbone.", "input_proj."))}
    of_model, of_definition = (torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, values)),
                                                   [*parameters.values()]) for values in (found, expected))
    for name, a, b in zip(parameters, of_model, of_definition):
        assert (a - b).abs().max() < 1e-3 * max(1, b.abs().max()), name                 # boxes are float32 on the way
    assert min(outputs[key].std(1).mean() for key in ("pred_logits", "pred_boxes")) > 1e-3             # queries differ
    return outputs, model


@pytest.mark.parametrize("name", PUBLISHED.values())
def test_definition(name):
    _, model = compare_with(conditional_detr, name)
    assert model.backbone[0].strides == [16 if "dc5" in name else 32]


@pytest.mark.parametrize("kind", [FirstConditionalDecoderLayer, ConditionalDecoderLayer])
@torch.no_grad()
def test_a_layer_with_queries_that_may_not_see_each_other(kind):
    torch.manual_seed(0)
    layer = unlike_at_first(kind(16, 2, 24, 0.1, nn.PReLU))
    content, position, place = torch.randn(3, 1, 6, 16).double()
    memory, where = torch.randn(2, 1, 20, 16).double()
    mask, forbidden = torch.arange(20)[None] >= 15, torch.rand(6, 6) < 0.5
    forbidden.fill_diagonal_(False)
    found = layer(content, position, place, memory, where, mask, forbidden)
    expected = conditional_layer(layer.state_dict(), content[0], position[0], place[0], memory[0, :15], where[0, :15], 2,
                                 forbidden)
    torch.testing.assert_close(found[0], expected, atol=1e-12, rtol=0)
    content[0, 3] += 1                                          # is seen by who may look at it
    changed = (layer(content, position, place, memory, where, mask, forbidden) != found).any(-1)[0]
    assert changed.tolist() == [i == 3 or not forbidden[i, 3] for i in range(6)]


def test_a_single_decoder_layer_trains_all_that_it_has():
    """There is no second layer for the scale that the first does without."""
    for name in MODELS:
        model, criterion, _ = build_small(name, dec_layers=1)
        criterion.weighted_sum(criterion(model(images((64, 64))), targets(3))).backward()
        assert not [n for n, p in model.named_parameters() if (p.grad is not None) != p.requires_grad]


# -- services: the same for the three architectures -------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_explained_attention_is_what_the_model_looked_with(name):
    model = build_small(name, padding="exact")[0].eval()
    before = model(images(*SIZES))
    seen = explain(model, images(*SIZES), index=1)
    assert all(torch.equal(seen.outputs[key], before[key]) for key in ("pred_logits", "pred_boxes"))
    if hasattr(model.transformer.decoder.layers[-1], "multihead_attn"):
        kept = []
        for layer in model.transformer.decoder.layers:                  # as the notebook does
            layer.multihead_attn.register_forward_hook(lambda module, args, out: kept.append(out[1]))
        model(images(*SIZES))
        for attention, weights in zip(seen.decoder, kept, strict=True):
            height, width = attention.shape
            expected = weights[1].unflatten(-1, attention.grid)[:, :height, :width]
            torch.testing.assert_close(attention.weights.mean(0), expected, atol=1e-6, rtol=1e-5)
    alone = explain(model, images(*SIZES)[1])
    torch.testing.assert_close(alone.heat(3), seen.heat(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.boxes, seen.boxes, atol=1e-5, rtol=0)


@torch.no_grad()
def test_explained_references():
    model = build_small("conditional_detr_resnet50")[0].eval()
    points = model.transformer.decoder.ref_point_head(model.query_embed.weight).sigmoid()
    assert all(torch.equal(reference, points) for reference in explain(model, images(*SIZES)).references)
    for name in MODELS[1:]:
        model = unlike_at_first(build_small(name)[0]).float()
        seen = explain(model, images(*SIZES))
        anchors = model.refpoint_embed.weight.sigmoid().repeat(3 if "3pat" in name else 1, 1)
        torch.testing.assert_close(seen.references[0], anchors)
        assert len(seen.references) == 2 and seen.path(2).shape == (3, 4)
        moved = seen.references[1] - anchors
        assert moved.abs().mean() > 1e-3 and (seen.references[1] - seen.boxes[0]).abs().mean() < moved.abs().mean()


@pytest.mark.parametrize("name", MODELS)
def test_masks_do_not_depend_on_the_batch(name):
    model = build_small(name, padding="exact", **MASKS)[0].eval()
    samples = images(*SIZES)
    with torch.no_grad():
        together = model(samples)
        for i, sample in enumerate(samples):
            alone = model([sample])
            height, width = alone["pred_masks"].shape[-2:]
            for key in ("pred_logits", "pred_boxes"):
                torch.testing.assert_close(together[key][i], alone[key][0], atol=1e-4, rtol=0)
            torch.testing.assert_close(together["pred_masks"][i, :, :height, :width], alone["pred_masks"][0], atol=1e-4,
                                       rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_masks_learn(name):
    """Alone, on top of a frozen detector too, whose checkpoint has the box model's names after ``detr.``"""
    model, criterion, _ = build_small(name, **MASKS)
    box = build_small(name, **MASKS | {"masks": False})[0]
    model.detr.load_state_dict(box.state_dict(), strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    samples, objects = images((64, 64), (64, 64)), drawn_targets("ellipses", [2, 1], NUM_CLASSES, [(64, 64), (64, 64)])
    first = None
    for _ in range(6):
        losses = criterion(model(samples, objects), objects)
        total = losses["loss_mask"] + losses["loss_dice"]
        first = total.item() if first is None else first
        optimizer.zero_grad()
        criterion.weighted_sum(losses).backward()
        optimizer.step()
    assert total.item() < 0.95 * first
    frozen = build_small(name, frozen_weights="x.pth", **MASKS)[0]
    assert all(p.requires_grad == (not key.startswith("detr.")) for key, p in frozen.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_other_classes_and_queries(name):
    """Classes keep their rows by name; anchors, their contents or queries are the tensors with one row a query."""
    def build(classes: int, queries: int, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return build_model(name, num_classes=classes, num_queries=queries, hidden_dim=64, nheads=4, dim_feedforward=48,
                           enc_layers=1, dec_layers=2, backbone="resnet18", dilation=False)[0]

    shape = layout(build)
    rows = {name for name in build(2, 7).state_dict() if name in ("query_embed.weight", "refpoint_embed.weight",
                                                                   "tgt_embed.weight")}
    assert set(shape.queries) == rows and {key.split(".")[0] for key in shape.classes} == {"class_embed"}
    old, state = build(2, 7), build(2, 7, seed=1).state_dict()
    assert counts(shape, state, "x") == Counts(2, 7)
    before = [Category(0, 1, "cat"), Category(1, 2, "dog")]
    after = [Category(0, 5, "cow"), Category(1, 6, "dog"), Category(2, 7, "cat")]
    old.load_state_dict(state)
    usage = query_usage(old, [(nested_tensor_from_tensor_list(images((64, 64))), None)], 2)
    model = build(3, 4, seed=2)
    adapted = adapt(shape, model, state, before, after, "old.pth", usage=usage)
    checkpoint.load_model(model, adapted.state_dict, "old.pth")
    of_anchor = usage.view(-1, 7).sum(0) if "3pat" in name else usage
    kept = of_anchor.argsort(descending=True, stable=True)[:4].sort().values
    for key in shape.queries:
        assert torch.equal(model.state_dict()[key], state[key][kept])
    for key in shape.classes:
        assert torch.equal(model.state_dict()[key][[1, 2]], state[key][[1, 0]])
    frozen = freeze(model, ["queries"])
    assert {key.split(".weight")[0] for key in frozen.names} >= {key.split(".weight")[0] for key in rows}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_prepared_for_prediction(name):
    model = unlike_at_first(build_small(name)[0]).float()
    expected = model(images(*SIZES))
    actual = for_prediction(model)(images(*SIZES))
    torch.testing.assert_close(actual["pred_boxes"], expected["pred_boxes"], atol=1e-4, rtol=0)
    assert "aux_outputs" not in actual
    with autocast(torch.device("cpu"), "bf16"):
        near = for_prediction(model, "bf16")(images(*SIZES))
    assert near["pred_boxes"].dtype == torch.float32
    assert (near["pred_boxes"] - expected["pred_boxes"]).abs().max() < 0.02
    assert 0 < (near["pred_logits"].float() - expected["pred_logits"]).abs().max() < 0.2


@pytest.mark.parametrize("name", MODELS)
def test_activations_computed_again_give_the_same_gradients(name):
    model, criterion, _ = build_small(name, dropout=0.1)

    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        criterion.weighted_sum(criterion(model(images((64, 96), (96, 64))), targets(2, 3))).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    assert any("decoder.layers.1" in part for part in checkpoint_activations(model.train()))
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["tiny_dino", *(pytest.param(name, marks=pytest.mark.slow) for name in TINY)])
def test_exported(name, tmp_path):
    """Traced with batch and sides left open, and as sizes in a tensor."""
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS[name].model, num_queries=9)
    model = unlike_at_first(config.build(NUM_CLASSES)[0]).float()
    checkpoint.save(tmp_path / "model.pth", {
        "model": model.state_dict(), "num_classes": NUM_CLASSES,
        "config": {"name": name, "model": dataclasses.asdict(config), "train": {}, "data": {}}})
    samples = nested_tensor_from_tensor_list(images((64, 90), (80, 41), (33, 70)))
    with torch.no_grad():
        expected = model(samples)
        found = model(NestedTensor(samples.tensors, samples.mask, torch.tensor(samples.sizes)))
    torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"], atol=1e-5, rtol=0)
    with where_pytorch_can():
        traced = exporting.trace(load(tmp_path / "model.pth"), postprocess=False).module()
    logits, boxes = traced(samples.tensors, torch.tensor(samples.sizes))
    torch.testing.assert_close(logits, expected["pred_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(boxes, expected["pred_boxes"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("flags", [{"feature_strides": (16,)}, {"backbone": "pvt_v2_b0"}, {"in_channels": 1},
                                   {"position_embedding": "learned"}], ids=lambda flags: [*flags][0])
def test_other_backbones_and_maps(name, flags):
    model = build_small(name, **{"dilation": False, "backbone": "resnet18"} | flags)[0].eval()
    pictures = [picture[:flags.get("in_channels", 3)] for picture in images((64, 64), (60, 50))]
    with torch.no_grad():
        outputs = model(pictures)
    assert outputs["pred_boxes"].isfinite().all() and outputs["pred_logits"].isfinite().all()
    if "feature_strides" in flags:
        assert model.backbone[0].strides == [16]


@pytest.mark.parametrize("name", TINY)
def test_learns_from_random_weights(name):
    """Twenty steps on two images: the loss falls, and so does that of the boxes of the last layer."""
    torch.manual_seed(0)
    model, criterion, _ = build_model(name, num_classes=NUM_CLASSES)
    preset = PRESETS[name]
    optimizer = torch.optim.AdamW(preset.model.parameter_groups(model, 1e-3), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    batch = nested_tensor_from_tensor_list(images((64, 64), (64, 64))), targets(2, 1)
    steps = [train_one_epoch(model, criterion, [batch], 1, optimizer, schedule, torch.device("cpu"), step, max_norm=0.1,
                             progress=Progress("", every=math.inf)) for step in range(20)]
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert steps[-1]["loss_bbox_unscaled"] < 0.7 * steps[0]["loss_bbox_unscaled"]
