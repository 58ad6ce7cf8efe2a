"""DETR against the published model: outputs, everything on the way to them, ten steps of training, sizes."""
import functools

import pytest
import torch
from cases import check, load_case, unchecked
from small_models import NUM_CLASSES, build_small, images, targets
from torch import Tensor, nn

from detr import build_model
from detr.architectures.detr import DETR, DETRConfig, DETRsegm
from detr.backbone import body_of
from detr.nested_tensor import nested_tensor_from_tensor_list
from detr.presets import PRESETS
from engine import Progress, train_one_epoch


def watch(model: DETR, samples: list[Tensor]) -> dict[str, Tensor]:
    """What a model computes on the way, under the cases' names."""
    box_model = getattr(model, "detr", model)
    parts = {"features": box_model.backbone[-2], "pos": box_model.backbone[-1], "src": box_model.input_proj,
             "transformer": box_model.transformer, "enc_attn": box_model.transformer.encoder.layers[-1].self_attn,
             "dec_attn": box_model.transformer.decoder.layers[-1].multihead_attn}
    if box_model is not model:
        parts["bbox_mask"] = model.bbox_attention
    seen = {}
    hooks = [part.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
             for name, part in parts.items()]
    with torch.no_grad():
        outputs = model(samples)
    for hook in hooks:
        hook.remove()
    seen["hs"], seen["memory"] = seen.pop("transformer")
    for name, level in seen.pop("features").items():
        seen |= {f"features.{name}": level.tensors, f"features.{name}.mask": level.mask}
    for name in ("enc_attn", "dec_attn"):
        seen[name] = seen[name][1]
    for i, layer in enumerate(outputs.pop("aux_outputs")):
        seen |= {f"aux_outputs.{i}.{name}": value for name, value in layer.items()}
    return seen | outputs


@pytest.mark.parametrize("name, num_classes", [("detr_r50", 91), ("detr_r50_dc5", 91), ("detr_learned_pos", 91),
                                               ("detr_panoptic_r50", 250)])
def test_published_model(name, num_classes):
    case = load_case(name)
    with torch.device("meta"):                                  # all values come from the case
        model = build_model("detr_resnet50", num_classes=num_classes, **case.spec["args"])[0]
    assert model.state_dict().keys() == case.spec["shapes"].keys()
    model.load_state_dict(case.state_dict(), strict=True, assign=True)
    seen = watch(model.eval(), case.images())
    for array, value in seen.items():
        check(case, array, value)
    assert unchecked(case) == []


def test_published_parameter_counts():
    case = load_case("detr_parameter_counts")
    for name, flags in case.spec["models"].items():
        with torch.device("meta"):
            model = build_model("detr_resnet50", **flags)[0]
        counts = {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
                  "total": sum(p.numel() for p in model.parameters()),
                  "state": sum(x.numel() for x in model.state_dict().values()), "tensors": len(model.state_dict())}
        for what, count in counts.items():
            assert count == case.spec["table"][f"{name}.{what}"], f"{name}.{what}"
            check(case, f"{name}.{what}", count)
    assert unchecked(case) == []


def test_published_training():
    """Ten steps of the published recipe through ``engine.train_one_epoch``."""
    case = load_case("detr_trajectory")
    args, iterations = case.spec["args"], case.spec["iterations"]
    model, criterion, _ = build_model("detr_resnet50", num_classes=91, **args)
    start = case.state_dict()
    model.load_state_dict(start, strict=True)
    groups = DETRConfig(lr_backbone=args["lr_backbone"]).parameter_groups(model, args["lr"])
    optimizer = torch.optim.AdamW(groups, lr=args["lr"], weight_decay=args["weight_decay"])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    batch = nested_tensor_from_tensor_list(case.images()), case.targets()
    steps = [train_one_epoch(model, criterion, [batch], 1, optimizer, schedule, torch.device("cpu"), epoch,
                             max_norm=args["clip_max_norm"], progress=Progress("", every=float("inf")))
             for epoch in range(iterations)]

    expected, tolerance = case.expected, case.spec["tolerance"]
    first, later = tolerance["first iteration"], tolerance["loss"]
    objects = sum(case.spec["targets"]["counts"])
    for key in [key for key in expected if key.startswith("loss.")]:
        name = key.removeprefix("loss.")
        values = torch.tensor([step["loss" if name == "total" else f"{name}_unscaled"] for step in steps])
        torch.testing.assert_close(values[0], expected[key][0], **first, msg=lambda m, k=key: f"{k}: {m}")
        if name == "class_error":
            later_here = {"atol": 100 / objects + 1e-3, "rtol": 0}
        elif name.startswith("cardinality"):
            later_here = {"atol": 1 / len(case.spec["image_sizes"]) + 1e-3, "rtol": 0}
        else:
            later_here = later
        torch.testing.assert_close(values, expected[key], **later_here, msg=lambda m, k=key: f"{k}: {m}")
        case.checked.add(key)
    check(case, "grad_norm", [step["grad_norm"] for step in steps], atol=0, **tolerance["grad_norm"])
    parameters = dict(model.named_parameters())
    for name in case.spec["checked_parameters"]:
        after = parameters[name].detach()
        moved = after - start[name]
        summary = torch.stack([after.mean(), after.std(correction=0), after.norm(), moved.norm(), moved.abs().max()])
        check(case, f"after.{name}", summary, **tolerance["after"])
        for entry in [f"moved.{name}", f"moved.{name}.sample"]:
            if entry in expected:
                stride = case.spec["expected"][entry].get("sample_of", {"stride": 1})["stride"]
                actual = moved.flatten()[::stride].view_as(expected[entry])
                off, size = (actual - expected[entry]).abs().mean(), expected[entry].abs().mean()
                assert off <= 0.05 * size, f"{entry}: {off} of {size}"                     # as the case says
                case.checked |= {entry, f"moved.{name}.mean", f"moved.{name}.std"}
    assert unchecked(case) == []
    frozen = {name for name in start if name in parameters and not parameters[name].requires_grad}
    assert len(frozen) == 5 and all(torch.equal(parameters[name], start[name]) for name in frozen)


@functools.lru_cache
def small() -> nn.Module:
    return build_small("detr_resnet50")[0].eval()


@torch.no_grad()
def test_what_it_may_be_called_with():
    model, samples = small(), images((64, 96), (80, 40))
    nested = nested_tensor_from_tensor_list(samples)
    for name, value in model(samples).items():
        if name != "aux_outputs":
            assert torch.equal(model(nested)[name], value)
    same = images((64, 64), (64, 64))
    assert torch.equal(model(torch.stack(same))["pred_boxes"], model(same)["pred_boxes"])


@torch.no_grad()
def test_outputs():
    outputs = small()(images((64, 96), (80, 40)))
    assert set(outputs) == {"pred_logits", "pred_boxes", "aux_outputs"} and len(outputs["aux_outputs"]) == 1
    for layer in (outputs, *outputs["aux_outputs"]):
        assert layer["pred_logits"].shape == (2, 7, NUM_CLASSES + 1) and layer["pred_boxes"].shape == (2, 7, 4)
        assert layer["pred_logits"].isfinite().all() and 0 < layer["pred_boxes"].min() <= layer["pred_boxes"].max() < 1
    without = build_small("detr_resnet50", aux_loss=False)[0].eval()
    without.load_state_dict(small().state_dict())
    alone = without(images((64, 96), (80, 40)))
    assert set(alone) == {"pred_logits", "pred_boxes"} and torch.equal(alone["pred_boxes"], outputs["pred_boxes"])


@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet50_panoptic"])
@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(name):
    model = build_small(name)[0].eval()
    pair = images((64, 80), (64, 80))
    together = model(pair)
    for i, image in enumerate(pair):
        for key, value in model([image]).items():
            if key != "aux_outputs":
                torch.testing.assert_close(value[0], together[key][i], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [[(1, 1)], [(1, 200), (200, 1)], [(33, 65), (1, 1)], [(31, 31)]])
@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet50_panoptic"])
def test_odd_sizes(name, sizes):
    model, criterion, _ = build_small(name)
    batch = nested_tensor_from_tensor_list(images(*sizes))
    outputs = model(batch)
    for value in [value for key, value in outputs.items() if key != "aux_outputs"]:
        assert value.isfinite().all()
    if name.endswith("panoptic"):
        height, width = batch.tensors.shape[-2:]
        assert outputs["pred_masks"].shape == (len(sizes), 7, -(-height // 4), -(-width // 4))
    criterion.weighted_sum(criterion(outputs, targets(*[2] * len(sizes)))).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_learned_positions_end():
    model = build_small("detr_resnet50", position_embedding="learned")[0].eval()
    with torch.no_grad():
        assert model(images((8, 50 * 32)))["pred_boxes"].isfinite().all()
        with pytest.raises(ValueError, match="1x51: feed smaller images, or use --position_embedding sine"):
            model(images((8, 50 * 32 + 1)))
        assert small()(images((8, 60 * 32)))["pred_boxes"].isfinite().all()


def test_bfloat16_training():
    model, criterion, _ = build_small("detr_resnet50")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images((64, 96), (80, 40)))
    assert outputs["pred_logits"].dtype == torch.bfloat16
    criterion.weighted_sum(criterion(outputs, targets(3, 0))).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name


def names_with_lr(config: DETRConfig, model: nn.Module) -> dict[str, float]:
    named = {id(p): name for name, p in model.named_parameters()}
    return {named[id(p)]: group["lr"] for group in config.parameter_groups(model, 1e-3) for p in group["params"]}


def test_learning_rate_groups():
    config = DETRConfig(backbone="resnet18", position_embedding="learned", lr_backbone=1e-5, hidden_dim=32)
    model = config.build(NUM_CLASSES)[0]
    rates = names_with_lr(config, model)
    assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, lr in rates.items():
        assert lr == (1e-5 if name.startswith("backbone.") else 1e-3), name
    for name in ("query_embed.weight", "input_proj.weight", "backbone.0.body.layer2.0.conv1.weight",
                 "backbone.1.row_embed.weight"):
        assert name in rates
    assert "backbone.0.body.layer1.0.conv1.weight" not in rates


@pytest.mark.parametrize("flags, frozen", [
    ({}, ("conv1", "layer1")), ({"lr_backbone": 0.0}, ("conv1", "layer1", "layer2", "layer3", "layer4")),
    ({"from_scratch": True, "backbone_norm": "group"}, ()),
    ({"from_scratch": True, "lr_backbone": 0.0}, ("conv1", "layer1", "layer2", "layer3", "layer4"))])
def test_what_of_the_backbone_is_trained(flags, frozen):
    model = build_small("detr_resnet50", **flags)[0]
    still = {name.split(".")[3] for name, p in model.named_parameters() if not p.requires_grad}
    assert still == set(frozen)


def test_frozen_weights_leave_the_mask_head():
    config = DETRConfig(backbone="resnet18", masks=True, frozen_weights="detr.pth")
    with torch.device("meta"):
        model = config.build(NUM_CLASSES)[0]
    assert isinstance(model, DETRsegm)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"bbox_attention", "mask_head"}
    assert body_of(model) is model.detr.backbone[0].body


def test_initialisation():
    torch.manual_seed(0)
    model = build_model("detr_resnet50", num_classes=NUM_CLASSES, backbone="resnet18")[0]
    assert abs(model.query_embed.weight.std() - 1) < 0.02                       # normal, PyTorch's default
    for linear in (model.class_embed, model.bbox_embed.layers[0], model.bbox_embed.layers[2]):
        bound = linear.in_features ** -0.5
        assert 0.95 * bound < linear.weight.abs().max() <= bound and 0 < linear.bias.abs().max() <= bound
    for layer in (*model.transformer.encoder.layers, *model.transformer.decoder.layers):
        assert (layer.self_attn.in_proj_bias == 0).all() and (layer.self_attn.out_proj.bias == 0).all()
        assert (layer.norm1.weight == 1).all()


def test_a_seed_makes_the_same_model():
    a, b, c = (build_small("detr_resnet50", seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["class_embed.weight"], c["class_embed.weight"])


def test_dropout_in_training_alone():
    model = small()
    with torch.no_grad():
        a, b = (model(images((64, 64)))["pred_logits"] for _ in range(2))
        model.train()
        c, d = (model(images((64, 64)))["pred_logits"] for _ in range(2))
    model.eval()
    assert torch.equal(a, b) and not torch.equal(c, d)


def test_weights_of_the_losses():
    assert DETRConfig(dec_layers=2, aux_loss=True, bbox_loss_coef=7, masks=True, dice_loss_coef=3).weights() == {
        "loss_ce": 1, "loss_bbox": 7, "loss_giou": 2, "loss_mask": 1, "loss_dice": 3,
        "loss_ce_0": 1, "loss_bbox_0": 7, "loss_giou_0": 2, "loss_mask_0": 1, "loss_dice_0": 3}
    assert DETRConfig(aux_loss=False).weights() == {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}


def test_flags_reach_the_parts():
    config = PRESETS["detr_resnet50"].model
    for flags, find in (({"set_cost_class": 3}, lambda m, c: c.matcher.cost_class == 3),
                        ({"set_cost_bbox": 3}, lambda m, c: c.matcher.cost_bbox == 3),
                        ({"set_cost_giou": 3}, lambda m, c: c.matcher.cost_giou == 3),
                        ({"eos_coef": 0.3}, lambda m, c: c.losses[0].eos_coef == 0.3),
                        ({"giou_loss_coef": 3}, lambda m, c: c.weight_dict["loss_giou_4"] == 3),
                        ({"dropout": 0.3}, lambda m, c: m.transformer.decoder.layers[0].self_attn.dropout == 0.3),
                        ({"nheads": 4}, lambda m, c: m.transformer.encoder.layers[0].self_attn.num_heads == 4),
                        ({"num_queries": 9}, lambda m, c: m.query_embed.weight.shape == (9, 256)),
                        ({"dim_feedforward": 64}, lambda m, c: len(m.transformer.decoder.layers[5].linear1.bias) == 64),
                        ({"pre_norm": True}, lambda m, c: "transformer.encoder.norm.weight" in m.state_dict()),
                        ({"enc_layers": 1}, lambda m, c: len(m.transformer.encoder.layers) == 1)):
        with torch.device("meta"):
            changed = build_model("detr_resnet50", backbone="resnet18", **flags)
            default = config.build(91)
        assert find(*changed[:2]) and not find(*default[:2]), flags
