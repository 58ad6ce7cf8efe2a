"""Backbones of timm: what every family has to do, against timm's own classification models; exactness of those that claim
it, with all weights drawn; names, weights and errors without a network."""
import argparse
import random
import subprocess
import sys
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from detr import checkpoint
from detr.backbone import build_body, pvt, resnet, timm_model
from detr.backbone.timm_model import FrozenBatchNorm, TimmBody, timm_names
from detr.exact_mode import Exact, Inexact

warnings.filterwarnings("ignore", category=UserWarning, module="timm")
# One small model of each family; those of ONE_SIZE are made for one size of images.
FAMILIES = [
    "resnet10t", "seresnet33ts", "regnetx_002", "mobilenetv3_small_050",
    "efficientnet_b0", "tf_efficientnetv2_b0", "mnasnet_small", "fbnetc_100", "tinynet_e",
    "ghostnet_050", "convnext_atto", "convnextv2_atto", "vgg11_bn", "densenet121", "res2net50_14w_8s", "repvgg_a0",
    "rexnet_100", "cs3darknet_focus_s", "ese_vovnet19b_slim_dw", "dla46x_c", "hrnet_w18_small", "eca_nfnet_l0",
    "xception41", "inception_next_atto", "fasternet_t0", "starnet_s050", "swin_tiny_patch4_window7_224",
    "pvt_v2_b0", "maxvit_rmlp_pico_rw_256", "edgenext_xx_small", "mobilevit_xxs", "poolformer_s12",
    "focalnet_tiny_srf", "davit_tiny", "efficientvit_b0", "xcit_nano_12_p8_224", "mambaout_femto",
    "vit_tiny_patch16_224",
]
ONE_SIZE = ["levit_128s", "hiera_tiny_224"]
# A model of each of ``timm_model.EXACT``; the larger ones, and other kinds of blocks within these families, are slow.
EXACT = [
    "test_byobnet", "convnext_atto", "cs3darknet_s", "densenet121", "dpn48b", "efficientnet_lite0", "fasternet_t0",
    "ghostnet_050", "hardcorenas_b", "inception_next_atto", "lcnetv2_small", "poolformer_s12", "mobilenetv3_small_050",
    "regnety_002", "repghostnet_050", "repvit_m1", "resnet10t", "rexnet_100", "selecsls42", "legacy_seresnet18",
    "starnet_s050", "vgg11_bn", "ese_vovnet19b_slim_dw",
]
MORE_EXACT = [
    "cspresnet50", "darknet53", "efficientnet_b0", "fbnetc_100", "lcnet_035", "legacy_xception", "mnasnet_small",
    "mobilenetv2_050", "poolformerv2_s12", "regnetx_002", "repvgg_a0", "res2net50_14w_8s", "resnet50d", "resnext26ts",
    "semnasnet_075", "seresnet33ts", "tinynet_e", "wide_resnet50_2", "xception41p",
]


def draw(module: nn.Module) -> nn.Module:
    """All parameters and buffers of a module drawn, so that each matters, in float64 and evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for name, x in module.double().eval().state_dict().items():
        if x.is_floating_point():
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            if name.endswith("running_var"):
                x.copy_(noise.abs() + 0.5)
            elif x.numel() > x.shape[0]:
                x.copy_(noise * (1.5 / x[0].numel()) ** 0.5)
            else:
                x.copy_(0.3 * noise + (1.0 if name.endswith(("weight", "gamma", "scale")) else 0.0))
    return module


def taps(model: nn.Module, body: TimmBody, images: torch.Tensor) -> list[torch.Tensor]:
    """A classification model's maps, those that the body has, by timm's other way to them or where the modules end."""
    indices = list(body.plan.options["out_indices"])
    if hasattr(model, "forward_intermediates"):
        return model.forward_intermediates(images, indices=indices, intermediates_only=True)
    seen = {}
    for info in model.feature_info if isinstance(model.feature_info, list) else model.feature_info.info:
        module = model.get_submodule(info["module"])
        module.register_forward_hook(lambda module, args, out, name=info["module"]: seen.update({name: out}))
    model.forward_features(images)
    return [seen[model.feature_info[i]["module"]] for i in indices]


@pytest.mark.parametrize("name", [*FAMILIES, *ONE_SIZE])
def test_every_family(name):
    torch.manual_seed(0)
    body = TimmBody(f"timm/{name}")
    assert body.only is None if name in FAMILIES else body.only == (224, 224)
    size = body.only or (64, 96)
    whole = timm.create_model(name, **{key: value for key, value in body.plan.options.items() if key != "out_indices"})
    for key, x in whole.state_dict().items():
        if "running_" in key:                                   # else frozen norms would be the identity
            x.uniform_(0.5, 1.5)
    state_dict, left_out = body.renamed(whole.state_dict())
    checkpoint.load_model(body, state_dict, name)
    assert left_out and not any(key.endswith("num_batches_tracked") for key in left_out)
    assert len(left_out) + len([key for key in whole.state_dict() if body.name_here(key, body.net.state_dict())]) \
        + sum(key.endswith("num_batches_tracked") for key in whole.state_dict()) == len(whole.state_dict())

    images = torch.randn(1, 3, *size)
    down, right = (-side % max(body.plan.multiple, 1) for side in size)     # else timm's model does not take this size
    maps, expected = body.eval()(images), taps(whole.eval(), body, F.pad(images, (0, right, 0, down)))
    assert len(maps) == len(body.channels) == len(body.strides) == len(body.stages)
    for x, wanted, channels, stride in zip(maps, expected, body.channels, body.strides):
        assert x.shape[:2] == (1, channels) and [*x.shape[2:]] == [-(-side // stride) for side in size]
        wanted = wanted[..., :x.shape[2], :x.shape[3]]
        torch.testing.assert_close(x, wanted, atol=2e-5 * wanted.abs().max().item(), rtol=0)

    for last in (False, True):                                  # all maps, or the last alone
        unused = set(body.unused([len(maps) - 1])) if last else set()
        parameters = {key: p for key, p in body.named_parameters() if p.requires_grad}
        loss = sum(x.square().sum() for x in (maps[-1:] if last else maps))     # not zero through a norm
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        assert unused == {key for key, gradient in zip(parameters, gradients) if gradient is None}
    for key, _ in body.named_parameters():
        assert sum(key.startswith(stage) for stage in body.stages) == 1, key
    assert body.get_parameter(body.first_layer).shape[1] == 3 if body.first_layer else name == "cs3darknet_focus_s"

    if name in FAMILIES and body.plan.multiple < 256:           # odd and rectangular
        with torch.no_grad():
            maps = body(torch.randn(1, 3, 75, 101))
        for x, stride in zip(maps, body.strides):
            assert all(abs(a - b / stride) < 1 for a, b in zip(x.shape[2:], (75, 101))) and x.isfinite().all()
    elif name in ONE_SIZE:
        with pytest.raises(ValueError, match=f"timm/{name} takes images of 224 x 224 only, and the batch is 64 x 96: use "
                                             f"--image_size 224x224"):
            body(torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "hiera_tiny_224", "efficientnet_b0"])
def test_keep(name):
    whole, body = TimmBody(name), TimmBody(name)
    body.load_state_dict(whole.state_dict())
    body.keep(2)
    assert len(body.channels) == len(body.strides) == len(body.stages) == 2
    assert sum(p.numel() for p in body.parameters()) < 0.2 * sum(p.numel() for p in whole.parameters())
    images = torch.randn(1, 3, *(body.only or (64, 96)))
    maps = body.eval()(images)
    assert all(torch.equal(x, wanted) for x, wanted in zip(maps, whole.eval()(images)))
    sum(x.sum() for x in maps).backward()
    assert all((p.grad is not None) == p.requires_grad for p in body.parameters())
    for key, _ in body.named_parameters():
        assert sum(key.startswith(stage) for stage in body.stages) == 1, key


# Exact padding

@pytest.mark.parametrize("name", [*EXACT, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_EXACT)])
@torch.no_grad()
def test_an_image_does_not_see_its_batch(name):
    body, rng = draw(TimmBody(name)), random.Random(name)
    assert body.exact and body.inexact == ""
    for room in range(2):
        sizes = [(rng.randint(32, 70 - 20 * room), rng.randint(32, 70 - 20 * room)) for _ in range(2)]
        height, width = (max(side) + room * rng.randint(1, 17) for side in zip(*sizes))
        images = torch.full((2, 3, height, width), float("nan"), dtype=torch.float64)
        for image, (h, w) in zip(images, sizes):
            image[:, :h, :w] = torch.randn(3, h, w, dtype=torch.float64)
        maps = body(images, sizes)
        assert all(x.isfinite().all() for x in maps)            # outside, too
        for i, (h, w) in enumerate(sizes):
            alone = body(images[i:i + 1, :, :h, :w])
            assert body.extents((h, w)) == [tuple(x.shape[-2:]) for x in alone]
            for x, wanted, (rows, columns) in zip(maps, alone, body.extents((h, w))):
                scale = wanted.abs().max().item()
                assert scale > 0
                torch.testing.assert_close(x[i, :, :rows, :columns], wanted[0], atol=1e-9 * scale, rtol=0)


def test_every_exact_family_is_tested():
    assert {timm.models._registry._model_to_module[name] for name in EXACT + MORE_EXACT} == set(timm_model.EXACT)


@pytest.mark.parametrize("name, reason", [
    ("tf_efficientnet_b0", "uses pad"), ("ecaresnet26t", "uses conv1d"), ("convnextv2_atto", "uses norm"),
    ("swin_tiny_patch4_window7_224", "is not of a family that is tested"), ("dla46x_c", "is not of a family"),
])
def test_what_is_not_exact_says_so(name, reason):
    body = TimmBody(name)
    assert not body.exact and body.inexact.startswith(f"timm/{name} {reason}")
    with pytest.raises(ValueError, match="it cannot use the images' sizes; use --padding legacy"):
        body(torch.zeros(1, 3, 64, 64), [(64, 64)])
    with pytest.raises(ValueError, match="have no extents; use --padding legacy"):
        body.extents((64, 64))


CONV = nn.Conv2d(3, 4, 3, padding=1)
WEIGHT = torch.ones(1, 4, 11, 11)
UNKNOWN = {
    "tokens": lambda x: x.flatten(2), "interpolation": lambda x: F.interpolate(x, scale_factor=2),
    "rows": lambda x: x[:, :, 1:], "images": lambda x: x[1:],
    "a mean of rows": lambda x: x.mean(2), "a sum": lambda x: x.sum(), "matrices": lambda x: x @ x.mT,
    "a padded side": lambda x: F.pad(x, (0, 1)), "rows as channels": lambda x: F.linear(x, WEIGHT[0, 0]),
    "rows joined": lambda x: torch.cat([x, x], 2), "cells": lambda x: F.adaptive_avg_pool2d(x, 2),
    "a maximum": lambda x: x.amax((2, 3)), "same": lambda x: F.conv2d(x, WEIGHT, padding="same"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_unknown_functions_are_refused(what):
    with torch.no_grad(), pytest.raises(Inexact), Exact(torch.zeros(2, 3, 9, 11), [(9, 8), (7, 11)]):
        UNKNOWN[what](CONV(torch.zeros(2, 3, 9, 11)))


def test_two_ways_to_a_resolution_are_refused():
    x, weight = torch.zeros(2, 3, 9, 9), torch.ones(1, 3, 3, 3)
    with Exact(x, [(9, 9), (8, 8)]) as mode:
        F.conv2d(x, weight, stride=2, padding=1)                # 9 -> 5 and 8 -> 4, as below
        F.max_pool2d(x, 2, 2, ceil_mode=True)
        F.avg_pool2d(x, 5, 1)
        assert mode.at[5, 5].sizes == [(5, 5), (4, 4)]
        with pytest.raises(Inexact, match="5 x 5 that came about in two ways"):
            F.max_pool2d(x, 2, 2, padding=1)                    # 9 -> 5, but 8 -> 5


@pytest.mark.parametrize("layer", [
    nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(3, 2, ceil_mode=True),
    nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), nn.AvgPool2d(3, 1, 1, divisor_override=4),
    nn.AvgPool2d((5, 3), (3, 1), (2, 0), count_include_pad=False), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((1, 1)),
    nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2, 2),
    nn.MaxPool2d((3, 5), 1, (1, 2)), nn.MaxPool2d(3, 1, 1, dilation=2), nn.Conv2d(4, 6, 3, 2, 2, dilation=2),
    nn.Conv2d(4, 6, 2, 2), nn.Conv2d(4, 6, (1, 7), padding=(0, 3)), nn.GroupNorm(2, 4), nn.GroupNorm(2, 4, affine=False),
], ids=str)
@torch.no_grad()
def test_layers(layer):
    torch.manual_seed(0)
    layer = layer.double()
    for height in range(5, 13):
        sizes = [(height, 7), (5, 12), (7, 9)]
        images = torch.randn(3, 4, 13, 14, dtype=torch.float64) - 5             # below what pads
        for image, (h, w) in zip(images, sizes):
            image[:, h:], image[:, :, w:] = 1e3, 1e3
        with Exact(images, sizes) as mode:
            out = layer(images)
        assert out.isfinite().all()
        for i, (h, w) in enumerate(sizes):
            alone = layer(images[i:i + 1, :, :h, :w])[0]
            rows, columns = alone.shape[-2:]
            if (rows, columns) != (1, 1):
                assert mode.at[out.shape[-2], out.shape[-1]].sizes[i] == (rows, columns)
            torch.testing.assert_close(out[i, :, :rows, :columns], alone, atol=1e-12, rtol=0)


def test_batch_norm_of_averages():
    """In training, of squeezed maps ``[B, C, 1, 1]``, outside of which nothing lies."""
    torch.manual_seed(0)
    x, sizes, ours, theirs = torch.randn(3, 4, 9, 11), [(9, 8), (7, 11), (2, 3)], nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    with Exact(x, sizes):
        out = ours(x.mean((2, 3), keepdim=True))
    averages = torch.stack([image[:, :h, :w].mean((1, 2)) for image, (h, w) in zip(x, sizes)])[..., None, None]
    torch.testing.assert_close(out, theirs(averages))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("name", ["seresnet33ts", "resnet26"])                  # squeeze-and-excitation; maximum pooling
def test_gradients_do_not_see_the_batch(name):
    body, sizes = draw(TimmBody(name)), [(45, 150), (150, 33)]
    images = torch.randn(2, 3, 151, 156, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(1, channels, 1, 1, dtype=torch.float64) for channels in body.channels]

    def gradients(outputs):
        loss = sum((x.sin() * weight).sum() for maps in outputs for x, weight in zip(maps, weights))
        return torch.autograd.grad(loss, [images, *body.parameters()])

    together = gradients([[x[i:i + 1, :, :h, :w] for x, (h, w) in zip(maps, body.extents(size))]
                          for maps in [body(images, sizes)] for i, size in enumerate(sizes)])
    separate = gradients([body(images[i:i + 1, :, :h, :w]) for i, (h, w) in enumerate(sizes)])
    for gradient, wanted in zip(together, separate):
        torch.testing.assert_close(gradient, wanted, atol=1e-9 * wanted.abs().max().item(), rtol=0)


# Options

@pytest.mark.parametrize("name", ["resnet18", "pvt_tiny", "pvt_v2_b0", "timm/resnet10t", "timm/levit_128s"])
def test_what_every_body_states(name):
    """What callers ask of any body, without knowing its family."""
    body = build_body(name, "frozen", False)
    body.keep(2)
    assert body.exact == (body.inexact == "") and len(body.channels) == len(body.strides) == len(body.stages) == 2
    assert body.only == ((224, 224) if name == "timm/levit_128s" else None)
    assert body.unused([0, 1]) == [] and body.get_parameter(body.first_layer).shape[1] == 3
    file = {key.removeprefix("net."): x for key, x in body.state_dict().items()}
    renamed, left_out = body.renamed(file)
    assert list(renamed) == list(body.state_dict()) and left_out == [] and isinstance(body.classifier, tuple)


def test_frozen_norms():
    """Fixed statistics and parameters under the old names, here in training mode."""
    model = draw(timm.create_model("resnet10t", features_only=True)).float()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
    names = [key for key in model.state_dict() if not key.endswith("num_batches_tracked")]
    body = TimmBody("resnet10t")
    assert body.has_batch_norm and [key.removeprefix("net.") for key in body.state_dict()] == names
    checkpoint.load_model(body, body.renamed(model.state_dict())[0], "")
    for x, wanted in zip(body.train()(images), expected[1:]):
        torch.testing.assert_close(x, wanted, atol=1e-4, rtol=1e-4)
    assert not any("bn" in key for key, _ in body.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert all(x.dtype == torch.bfloat16 for x in body(images))


def test_frozen_norms_of_every_kind():
    for norm, x in ((nn.BatchNorm1d(4), torch.randn(5, 4)), (nn.BatchNorm2d(4, affine=False), torch.randn(2, 4, 3, 3)),
                    (timm.layers.BatchNormAct2d(4), torch.randn(2, 4, 3, 3))):
        for value in (norm.running_mean, norm.running_var):
            value.uniform_(0.5, 2)
        torch.testing.assert_close(FrozenBatchNorm(norm).train()(x), norm.eval()(x), atol=1e-6, rtol=1e-5)


def test_frozen_norms_are_ours():
    """To the last bit, those of our ResNets."""
    norm, ours, x = nn.BatchNorm2d(64), resnet.FrozenBatchNorm2d(64), torch.randn(2, 64, 9, 11)
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 2)
    ours.load_state_dict(norm.state_dict())
    theirs = FrozenBatchNorm(norm)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for images in (x, x.bfloat16(), x.double()):
        assert torch.equal(theirs(images), ours(images))


def test_trainable_norms():
    body = TimmBody("resnet10t", norm="batch")
    assert any("bn" in key for key, _ in body.named_parameters())
    before = body.get_buffer("net.bn1.running_mean").clone()
    body.train()(torch.randn(2, 3, 64, 64))
    assert not torch.equal(before, body.get_buffer("net.bn1.running_mean"))


def test_norms_that_have_no_meaning():
    with pytest.raises(ValueError, match="--backbone_norm group has no meaning for timm/resnet10t, .* batch norms: "
                                         "use frozen or batch"):
        TimmBody("timm/resnet10t", norm="group")
    for norm in ("batch", "group"):
        with pytest.raises(ValueError, match=f"--backbone_norm {norm} has no meaning for timm/convnext_atto, which has "
                                             f"no batch norms: leave it out"):
            TimmBody("timm/convnext_atto", norm=norm)
    assert timm_model.has_batch_norm("timm/resnet10t") and not timm_model.has_batch_norm("timm/convnext_atto")


@pytest.mark.parametrize("name", ["resnet10t", "regnetx_002", "efficientnet_b0", "convnext_atto"])
def test_dilation(name):
    body = TimmBody(name, dilation=True)
    maps = body.eval()(torch.randn(1, 3, 64, 96))
    assert body.strides == [4, 8, 16, 16] and maps[-1].shape[1:] == (body.channels[-1], 4, 6)
    assert body.channels == TimmBody(name).channels


def test_dilation_where_timm_cannot():
    for name in ("swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "hrnet_w18_small", "densenet121"):
        with pytest.raises(ValueError, match=f"--dilation needs .* which timm/{name} is not: leave it out"):
            TimmBody(f"timm/{name}", dilation=True)


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("in_channels", [1, 4])
def test_channels_of_the_images(name, in_channels):
    body = TimmBody(name, in_channels=in_channels)
    assert body.get_parameter(body.first_layer).shape[1] == in_channels
    assert body(torch.randn(2, in_channels, 64, 96))[-1].shape[1] == body.channels[-1]
    weights, _ = body.renamed(timm.create_model(name).state_dict())
    assert weights[body.first_layer].shape[1] == 3              # as in the file
    assert {key for key in weights if not key.endswith("num_batches_tracked")} == set(body.state_dict())


# Names and weights

def test_published_names():
    """The published PVT v2 has other names than timm's; here as there, the same maps."""
    torch.manual_seed(0)
    published, body = pvt.PyramidVisionTransformerV2("pvt_v2_b0").eval(), TimmBody("pvt_v2_b0").eval()
    state_dict, left_out = body.renamed(published.state_dict() | {"head.weight": torch.zeros(1000, 256)})
    checkpoint.load_model(body, state_dict, "pvt_v2_b0.pth")
    assert left_out == ["head.weight"]
    images = torch.randn(1, 3, 64, 96)
    for x, wanted in zip(body(images), published(images)):
        torch.testing.assert_close(x, wanted, atol=1e-5, rtol=1e-5)


def test_a_file_of_another_model():
    body = TimmBody("resnet10t")
    with pytest.raises(ValueError, match="does not fit"):
        checkpoint.load_model(body, body.renamed(timm.create_model("convnext_atto").state_dict())[0], "other.pth")


def test_unknown_names():
    with pytest.raises(ValueError, match="timm/resnet5: timm .* has no model 'resnet5'; nearest are .*timm/resnet50"):
        TimmBody("timm/resnet5")
    with pytest.raises(ValueError, match="resnet50 has no weights 'nowhere'; it has timm/resnet50.a1_in1k, "):
        TimmBody("timm/resnet50.nowhere")
    names = timm_names()
    assert len(names) > 900 and {*FAMILIES, *ONE_SIZE, *EXACT, *MORE_EXACT} <= set(names) <= set(timm.list_models())


def test_a_model_without_maps(monkeypatch):
    """What timm says of it, and the nearest that have some."""
    sketch = timm_model.sketch

    def refusing(name, **options):
        if name.partition(".")[0] in ("resnet34", "resnet34d"):
            raise RuntimeError(f"features_only not implemented for {name}.")
        return sketch(name, **options)

    monkeypatch.setattr(timm_model, "sketch", refusing)
    timm_model.plan_of.cache_clear()
    with pytest.raises(ValueError) as error:
        TimmBody("timm/resnet34.a1_in1k")
    said, _, named = str(error.value).partition("; it has some of ")
    assert said == ("--backbone timm/resnet34.a1_in1k: timm has no feature maps of this model (features_only not "
                    "implemented for resnet34.a1_in1k.)")
    named = named.split(", ")
    assert len(named) > 2 and "timm/resnet50" in named and all("res" in name for name in named)
    assert {name.removeprefix("timm/") for name in named} <= {*timm_names()} - {"resnet34", "resnet34d"}


def test_statistics():
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert timm_model.statistics("timm/resnet50") == imagenet
    assert timm_model.statistics("timm/vit_tiny_patch16_224") == ((0.5,) * 3, (0.5,) * 3)
    assert timm_model.statistics("timm/resnet50.a1_in1k") == imagenet


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the files that a test puts into ``tmp_path``, and the list of what was asked of it."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError
    asked = []

    def download(repo_id, filename, revision=None):
        asked.append((repo_id, filename))
        if not (tmp_path / filename).is_file():
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(checkpoint, "fetch", lambda url: asked.append(url) or tmp_path / url.rpartition("/")[2])
    return asked


def test_weights_of_an_address(hub, tmp_path):
    weights, url = {"weight": torch.arange(3.0)}, timm.models.get_pretrained_cfg("convnext_atto.d2_in1k").url
    for content in (weights, {"model": weights}, {"epoch": 3, "state_dict": {"module.weight": weights["weight"]}}):
        torch.save(content, tmp_path / url.rpartition("/")[2])
        found, source = timm_model.pretrained("timm/convnext_atto.d2_in1k")
        assert source == url and list(found) == ["weight"] and torch.equal(found["weight"], weights["weight"])
    assert hub == [url] * 3
    torch.save({"model": subprocess.Popen}, tmp_path / url.rpartition("/")[2])
    with pytest.raises(ValueError, match=f"{url} holds more than weights: reading it would run .*Popen"):
        timm_model.pretrained("timm/convnext_atto.d2_in1k")


def test_files_of_timms_own_training(tmp_path, capsys):
    """As its training script writes them, with and without an average of the weights, which is what it reads, too."""
    torch.manual_seed(0)
    model, average = timm.create_model("resnet10t"), timm.utils.ModelEmaV2(timm.create_model("resnet10t"))
    flags = argparse.Namespace(model="resnet10t", lr=0.1, input_size=(3, 176, 176))
    for ema, entry in ((None, "state_dict"), (average, "state_dict_ema")):
        saver = timm.utils.CheckpointSaver(model, torch.optim.SGD(model.parameters(), lr=0.1), flags, ema,
                                           checkpoint_dir=tmp_path, recovery_dir=tmp_path)
        saver.save_checkpoint(3, 71.5)
        body, file = TimmBody("timm/resnet10t"), str(tmp_path / "last.pth.tar")
        checkpoint.load_backbone(body, checkpoint.load(file)["model"], file)
        wanted = timm.models.load_state_dict(file)
        assert torch.equal(wanted["conv1.0.weight"], torch.load(file, weights_only=False)[entry]["conv1.0.weight"])
        assert all(torch.equal(x, wanted[name.removeprefix("net.")]) for name, x in body.state_dict().items())
        out = capsys.readouterr().out
        assert "left out fc.weight, fc.bias" in out
        assert (f"{file}: took the average of the weights over training, state_dict_ema, not state_dict" in out) \
            == (ema is not None)


def test_weights_of_the_hub(hub, tmp_path, monkeypatch):
    name = next(name for name in timm.list_pretrained("convnext*") if not timm.models.get_pretrained_cfg(name).url)
    weights = {"weight": torch.arange(3.0)}
    torch.save({"state_dict": weights}, tmp_path / "pytorch_model.bin")
    found, source = timm_model.pretrained(f"timm/{name}")
    assert source == f"https://huggingface.co/timm/{name}/pytorch_model.bin"
    assert torch.equal(found["weight"], weights["weight"])
    save_file({"weight": 2 * weights["weight"]}, tmp_path / "model.safetensors")            # preferred
    found, source = timm_model.pretrained(f"timm/{name}")
    assert source.endswith("/model.safetensors") and torch.equal(found["weight"], 2 * weights["weight"])
    assert hub == [(f"timm/{name}", file) for file in ("model.safetensors", "pytorch_model.bin", "model.safetensors")]
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="has neither model.safetensors nor pytorch_model.bin"):
        timm_model.pretrained(f"timm/{name}")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kwargs: open("/nowhere"))
    with pytest.raises(OSError, match="cannot download https://huggingface.co/.* give the path of the file"):
        timm_model.pretrained(f"timm/{name}")


def test_no_weights(hub):
    configurations = timm.models._registry._model_pretrained_cfgs
    bare = {name for name, one in configurations.items() if not one.has_weights}
    with_others = next(name for name in sorted(bare) if timm.list_pretrained(f"{name.partition('.')[0]}.*"))
    other = timm.list_pretrained(f"{with_others.partition('.')[0]}.*")[0]
    without = next(name for name in sorted(bare) if not timm.list_pretrained(f"{name.partition('.')[0]}*"))
    with pytest.raises(ValueError, match=f"no weights for timm/{with_others} .*; it has some for timm/{other}"):
        timm_model.pretrained(f"timm/{with_others}")
    with pytest.raises(ValueError, match=f"no weights for timm/{without} .*; train it --from_scratch, or give a file"):
        timm_model.pretrained(f"timm/{without}")
    assert hub == []


def test_timm_is_imported_where_it_is_used():
    code = "import sys, detr.backbone; assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        TimmBody("timm/resnet10t")


def test_batch_norm_in_training_leaves_padding_out():
    """What the running statistics learn of a padded batch is what they learn of its pixels without padding."""
    torch.manual_seed(0)
    bodies = [TimmBody("timm/resnet10t", norm="batch").train() for _ in range(2)]
    bodies[1].load_state_dict(bodies[0].state_dict())
    images = torch.randn(2, 3, 64, 96)
    padded = F.pad(images, (0, 32, 0, 64), value=7.0)
    alone, together = bodies[0](images, [(64, 96)] * 2), bodies[1](padded, [(64, 96)] * 2)
    for a, b in zip(alone, together):
        torch.testing.assert_close(b[..., :a.shape[-2], :a.shape[-1]], a, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(bodies[0].state_dict().items(), bodies[1].state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)
