"""What the project's services do with Conditional DETR, DAB-DETR and DAB-Deformable-DETR: the same for the three."""
import dataclasses
import math

import pytest
import torch
from cases import targets as drawn_targets
from small_models import NUM_CLASSES, SIZES, build_small, images, small_flags, targets, unlike_at_first
from test_export import where_pytorch_can
from torch import Tensor, nn

from detr import build_model, checkpoint
from detr import export as exporting
from detr.attention_maps import explain
from detr.finetune import Counts, adapt, counts, detector, freeze, layout, query_usage
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
MASKS = {"masks": True, "hidden_dim": 128, "nheads": 8, "backbone": "resnet18", "dilation": False}


def test_a_single_decoder_layer_trains_all_that_it_has():
    """There is no second layer for the scale that the first does without."""
    for name in MODELS:
        model, criterion, _ = build_small(name, dec_layers=1)
        criterion.weighted_sum(criterion(model(images((64, 64))), targets(3))).backward()
        assert not [n for n, p in model.named_parameters() if (p.grad is not None) != p.requires_grad]


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


@pytest.mark.parametrize("had, has", [(False, True), (True, False)])
def test_usage_of_queries_where_denoising_comes_or_goes(had, has):
    """A checkpoint's queries are looked at with its own weights, with the table of denoising or without."""
    def build(denoising):
        return lambda classes, queries: build_model("dab_detr_resnet50", **small_flags("dab_detr_resnet50") | {
            "num_classes": classes, "num_queries": queries, "denoising": denoising})[0]

    state = {name: value + 0.01 for name, value in build(had)(4, 7).state_dict().items()}
    found = detector(build(has), layout(build(has)), state, "old.pth").state_dict()
    assert ("label_enc.weight" in found) is has
    assert all(torch.equal(value, found[name]) for name, value in state.items() if name != "label_enc.weight")


@pytest.mark.parametrize("name, flags, queries", [("tiny_dab_detr", {}, 100), ("dab_detr_resnet50_dc5_3pat", {}, 900),
                                                  ("dab_deformable_detr_resnet50", {"num_patterns": 2}, 600),
                                                  ("conditional_detr_resnet50", {}, 300)])
def test_how_many_objects_an_image_can_have(name, flags, queries):
    config = dataclasses.replace(PRESETS[name].model, **flags)
    assert config.queries == queries
    model = build_small(name, num_queries=3, **flags)[0].eval()
    assert model(images((64, 64)))["pred_logits"].shape[1] == dataclasses.replace(config, num_queries=3).queries


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_dino", *TINY])
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
    """Thirty steps on two images: the loss falls, and so does that of the boxes of the last layer."""
    torch.manual_seed(0)
    model, criterion, _ = build_model(name, num_classes=NUM_CLASSES)
    preset = PRESETS[name]
    optimizer = torch.optim.AdamW(preset.model.parameter_groups(model, 1e-3), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    batch = nested_tensor_from_tensor_list(images((64, 64), (64, 64))), targets(2, 1)
    steps = [train_one_epoch(model, criterion, [batch], 1, optimizer, schedule, torch.device("cpu"), step, max_norm=0.1,
                             progress=Progress("", every=math.inf)) for step in range(30)]
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert steps[-1]["loss_bbox_unscaled"] < 0.7 * steps[0]["loss_bbox_unscaled"]
