"""Every preset, the same tests: build, names, forward, backward, save and load; and ``build_model`` itself."""
import argparse
import dataclasses
import functools

import pytest
import torch
import torchvision
from cases import load_case
from small_models import NUM_CLASSES, build_small, changed, images, published, small_flags, targets

import detr
from detr import build_model, checkpoint, list_models
from detr.architectures.detr import DETRConfig
from detr.backbone import IMAGENET_URLS
from detr.config import DataConfig, TrainConfig, validate
from detr.presets import PRESETS

HUB_NAMES = {
    "detr_resnet50": {}, "detr_resnet50_dc5": {"dilation": True}, "detr_resnet101": {"backbone": "resnet101"},
    "detr_resnet101_dc5": {"backbone": "resnet101", "dilation": True}, "detr_resnet50_panoptic": {"masks": True},
    "detr_resnet50_dc5_panoptic": {"dilation": True, "masks": True},
    "detr_resnet101_panoptic": {"backbone": "resnet101", "masks": True}}
FILES = {
    "detr_resnet50": "detr-r50-e632da11.pth", "detr_resnet50_dc5": "detr-r50-dc5-f0fb7ef5.pth",
    "detr_resnet101": "detr-r101-2c7b67e5.pth", "detr_resnet101_dc5": "detr-r101-dc5-a2e86def.pth",
    "detr_resnet50_panoptic": "detr-r50-panoptic-00ce5173.pth",
    "detr_resnet50_dc5_panoptic": "detr-r50-dc5-panoptic-da08f1b1.pth",
    "detr_resnet101_panoptic": "detr-r101-panoptic-40021d53.pth"}
DETR_PRESETS = [name for name, preset in PRESETS.items() if isinstance(preset.model, DETRConfig)]


@functools.lru_cache
def shapes(name: str) -> dict[str, list[int]]:
    """Names and shapes of the published file of a hub model: recorded ones; for ResNet-101, those of ResNet-50 with
    torchvision's backbone in them."""
    case = "detr_panoptic_r50" if name.endswith("panoptic") else "detr_r50_dc5" if name.endswith("dc5") else "detr_r50"
    recorded = load_case(case).spec["shapes"]
    if "resnet101" not in name:
        return recorded
    with torch.device("meta"):
        body = torchvision.models.resnet101(weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    prefix = "detr.backbone.0.body." if name.endswith("panoptic") else "backbone.0.body."
    return ({key: shape for key, shape in recorded.items() if not key.startswith(prefix)}
            | {prefix + key: list(x.shape) for key, x in body.state_dict().items() if not key.startswith("fc.")})


def test_hub_names_are_known():
    assert set(HUB_NAMES) <= set(list_models()) and list_models() == list(PRESETS)
    assert all(name.startswith("tiny_") or "pvt" in name or published(name) for name in DETR_PRESETS)


@pytest.mark.parametrize("name", HUB_NAMES)
def test_published_settings(name):
    preset = PRESETS[name]
    assert changed(name) == HUB_NAMES[name]
    assert preset.train == TrainConfig() and preset.data == DataConfig()        # the paper's
    assert preset.url == "https://dl.fbaipublicfiles.com/detr/" + FILES[name]
    assert preset.num_classes == (250 if name.endswith("panoptic") else 91)


@pytest.mark.parametrize("name", HUB_NAMES)
def test_published_names_and_shapes(name):
    with torch.device("meta"):
        model = build_model(name)[0]
    assert {key: list(x.shape) for key, x in model.state_dict().items()} == shapes(name)


@pytest.mark.parametrize("name", PRESETS)
def test_full_size(name):
    """As it is configured: flags within their choices, a model, losses with weights, learning rates for all."""
    preset = PRESETS[name]
    for part in (preset.model, preset.train, preset.data):
        validate(part)
    with torch.device("meta"):
        model, criterion, postprocessors = build_model(name)
    assert "bbox" in postprocessors and {"loss_ce", "loss_bbox", "loss_giou"} <= set(criterion.weight_dict)
    groups = preset.model.parameter_groups(model, preset.train.lr)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)     # each of them once


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
def test_forward_and_backward(name, counts):
    """Every parameter that is trained gets a gradient, also from images without objects; no other does."""
    model, criterion, _ = build_small(name)
    outputs = model(images((64, 64), (60, 50)))
    losses = criterion(outputs, targets(*counts))
    assert set(criterion.weight_dict) <= set(losses) | {f"{kind}_{i}" for kind in ("loss_mask", "loss_dice")
                                                        for i in range(99)}     # the last layer alone predicts masks
    assert all(loss.isfinite() for loss in losses.values())
    criterion.weighted_sum(losses).backward()
    for parameter_name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, parameter_name
        assert p.grad is None or p.grad.isfinite().all(), parameter_name
    trained = [p for p in model.parameters() if p.requires_grad]
    if any(counts):     # key biases, the first self-attention's queries and keys, and what lies before a box head's first
        assert sum(p.grad.abs().sum() > 0 for p in trained) > 0.85 * len(trained)           # zeros have zeros, rightly


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_save_and_load(name, tmp_path):
    samples = images((64, 64), (60, 50))
    model, _, postprocessors = build_small(name)
    for module in model.modules():
        if hasattr(module, "running_mean"):                     # statistics travel too
            module.running_mean.normal_(std=0.1)
    checkpoint.save(tmp_path / "checkpoint.pth", {"model": model.state_dict()})
    other = build_small(name, seed=1)[0]
    outputs = model.eval()(samples)
    assert not torch.equal(other.eval()(samples)["pred_logits"], outputs["pred_logits"])
    checkpoint.load_model(other, checkpoint.load(tmp_path / "checkpoint.pth")["model"], "checkpoint.pth")
    again = other.eval()(samples)
    assert all(torch.equal(again[key], value) for key, value in outputs.items() if key.startswith("pred"))
    detections = postprocessors["bbox"](outputs, torch.tensor([[64, 64], [60, 50]]))
    assert len(detections) == 2 and all(d["boxes"].isfinite().all() and d["labels"].max() < NUM_CLASSES
                                        for d in detections)


# -- build_model ------------------------------------------------------------------------------------------------------

def test_number_of_classes():
    for name, flags, expected in (("detr_resnet50", {}, 91), ("detr_resnet50", {"num_classes": 3}, 3),
                                  ("detr_resnet50_panoptic", {}, 250),
                                  ("detr_resnet50", {"masks": True, "dataset_file": "coco_panoptic"}, 250)):
        with torch.device("meta"):
            model, criterion, _ = build_model(name, **flags)
        assert getattr(model, "detr", model).class_embed.out_features == expected + 1, (name, flags)
        assert criterion.losses[0].num_classes == expected


def test_what_another_architecture_has_may_be_left_out_in_words():
    """``masks=False`` asks a model without masks for nothing; ``masks=True`` asks it for what it has not."""
    build_small("tiny_detr", masks=False, mask_loss_coef=1, frozen_weights=None)
    with pytest.raises(ValueError, match="no option 'masks'"):
        build_small("tiny_detr", masks=True)
    for flags in ({"two_stage": True}, {"num_feature_levels": 4}):
        with pytest.raises(ValueError, match=f"no option '{next(iter(flags))}'"):
            build_small("detr_resnet50", **flags)


def test_flags_of_training_change_nothing():
    plain = build_small("detr_resnet50")[0].state_dict()
    flags = {"lr": 1e-3, "epochs": 50, "batch_size": 4, "clip_max_norm": 0.0, "coco_path": "nowhere", "device": "cpu"}
    trained = build_small("detr_resnet50", **flags)[0].state_dict()
    assert all(torch.equal(plain[name], trained[name]) for name in plain)


@pytest.mark.parametrize("flags, message", [
    ({"num_querys": 10}, "no option 'num_querys'; did you mean num_queries?"),
    ({"epoch": 10}, "no option 'epoch'; did you mean epochs?"),
    ({"zzz": 1}, "no option 'zzz'"),
    ({"position_embedding": "spiral"}, "--position_embedding 'spiral' is not one of sine, learned"),
    ({"backbone_norm": "layer"}, "--backbone_norm 'layer' is not one of frozen, batch, group"),
    ({"backbone": "resnet19"}, "--backbone resnet19 is not known; there are resnet18"),
    ({"backbone": "resnet18", "dilation": True}, "--dilation needs bottleneck blocks"),
    ({"nheads": 7}, "hidden_dim 256 does not divide into nheads 7"),
    ({"masks": True, "hidden_dim": 64}, r"masks need hidden_dim \(64\) to divide by 128"),
    ({"set_cost_class": 0, "set_cost_bbox": 0, "set_cost_giou": 0}, "all matching costs are 0")])
def test_flags_that_do_not_exist_or_fit(flags, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_model("detr_resnet50", **flags)


def test_unknown_model():
    with pytest.raises(ValueError, match="model 'detr_resnet_50' is not known; did you mean detr_resnet50\\? Known are "
                                         "detr_resnet50, detr_resnet50_dc5"):
        build_model("detr_resnet_50")


@pytest.mark.parametrize("args, expected", [
    ({}, {}), ({"model": "detr_resnet50_dc5"}, {"dilation": True}),
    ({"num_queries": 10, "enc_layers": 2}, {"num_queries": 10, "enc_layers": 2}),
    ({"masks": True, "dataset_file": "coco_panoptic"}, {"masks": True, "dataset_file": "coco_panoptic"})])
def test_from_parsed_flags(args, expected):
    defaults = {field.name: field.default for part in (DETRConfig, TrainConfig, DataConfig)
                for field in dataclasses.fields(part)}
    with torch.device("meta"):
        from_args = build_model(argparse.Namespace(**{"model": None} | defaults | args))[0].state_dict()
        model = build_model("detr_resnet50", **expected)[0].state_dict()
    assert {name: x.shape for name, x in from_args.items()} == {name: x.shape for name, x in model.items()}


def no_download(url):
    raise AssertionError(f"{url} was asked for")


def test_nothing_is_downloaded_unless_asked_for(monkeypatch):
    monkeypatch.setattr(checkpoint, "fetch", no_download)
    build_small("detr_resnet50")
    with pytest.raises(AssertionError, match="detr-r50-e632da11.pth was asked for"):
        build_small("detr_resnet50", pretrained=True)
    with pytest.raises(AssertionError, match="resnet18-f37072fd.pth was asked for"):
        build_small("detr_resnet50", pretrained_backbone=True)


def test_pretrained(monkeypatch, tmp_path):
    source = build_small("detr_resnet50", seed=7)[0].state_dict()
    checkpoint.save(tmp_path / "published.pth", {"model": source})
    monkeypatch.setitem(PRESETS, "detr_resnet50",
                        dataclasses.replace(PRESETS["detr_resnet50"], url=str(tmp_path / "published.pth")))
    model = build_small("detr_resnet50", pretrained=True)[0].state_dict()
    assert all(torch.equal(model[name], source[name]) for name in source)
    with pytest.raises(ValueError, match="published.pth does not fit the model"):
        build_small("detr_resnet50", pretrained=True, num_queries=8)


def test_pretrained_backbone(monkeypatch, tmp_path, capsys):
    source = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(source, tmp_path / "imagenet.pth")
    monkeypatch.setitem(IMAGENET_URLS, "resnet18", str(tmp_path / "imagenet.pth"))
    for name, prefix in (("detr_resnet50", ""), ("detr_resnet50_panoptic", "detr.")):
        model = build_small(name, pretrained_backbone=True)[0].state_dict()
        assert torch.equal(model[f"{prefix}backbone.0.body.layer4.1.conv2.weight"], source["layer4.1.conv2.weight"])
        assert not torch.equal(model[f"{prefix}class_embed.weight"], torch.zeros(1))
    assert "left out fc.weight, fc.bias and 20 num_batches_tracked" in capsys.readouterr().out


def test_weights_that_do_not_exist():
    with pytest.raises(ValueError, match="tiny_detr has no published weights"):
        build_model("tiny_detr", pretrained=True)
    message = "deformable_detr_resnet50 are served to browsers alone: save https://drive.*, or name it with --resume FILE"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_model("deformable_detr_resnet50", pretrained=True)
    with pytest.raises(ValueError, match="no ImageNet weights are known for backbone resnet_tiny; there are some"):
        build_model("detr_resnet50", backbone="resnet_tiny", pretrained_backbone=True)


def test_package_names_what_it_offers():
    assert set(detr.__all__) == {"build_model", "list_models", "load"}
    assert small_flags("tiny_detr") == {}
