"""Residual networks against torchvision's; maps, masks, and what is frozen."""
import copy

import pytest
import torch
import torchvision
from torch import nn

from detr.backbone import IMAGENET_URLS, Backbone, build_body, freeze
from detr.backbone.resnet import SIZES, FrozenBatchNorm2d, ResNet, fold_norms, group_norm
from detr.nested_tensor import nested_tensor_from_tensor_list, resize_mask

FROZEN = torchvision.ops.FrozenBatchNorm2d
PUBLISHED = ["resnet18", "resnet34", "resnet50", "resnet101"]


def theirs(name: str, norm: type[nn.Module], dilation: bool = False) -> nn.Module:
    """torchvision's network without its classifier, with statistics that are not 0 and 1."""
    model = getattr(torchvision.models, name)(weights=None, norm_layer=norm,
                                              replace_stride_with_dilation=[False, False, dilation])
    del model.fc
    torch.manual_seed(1)
    for key, value in model.state_dict().items():
        if key.endswith("running_mean") or ".bn" in key and key.endswith("bias"):
            value.normal_(std=0.1)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return model


def maps_of(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    maps = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        maps.append(x)
    return maps


def close(ours: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    """``tolerance`` is of the largest value: ours computes channels last, which rounds in another order."""
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, atol=tolerance * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name, dilation", [(name, False) for name in PUBLISHED] + [("resnet50", True)])
@torch.no_grad()
def test_torchvision(name, dilation):
    reference = theirs(name, FROZEN, dilation).eval().double()
    ours = ResNet(name, dilation=dilation).eval().double()
    ours.load_state_dict(reference.state_dict(), strict=True)
    images = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    close(ours(images), maps_of(reference, images), tolerance=1e-9)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_trainable_batch_norm(name):
    reference = theirs(name, nn.BatchNorm2d).train().double()   # few values a channel enlarge float32's rounding
    ours = ResNet(name, norm="batch").train().double()
    ours.load_state_dict(reference.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    close(ours(images), maps_of(reference, images), tolerance=1e-9)
    for key, value in reference.state_dict().items():           # the running statistics moved alike
        torch.testing.assert_close(ours.state_dict()[key], value, atol=1e-9, rtol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


def test_frozen_batch_norm():
    reference, ours = FROZEN(6), FrozenBatchNorm2d(6)
    for i, value in enumerate(reference.state_dict().values()):
        value.copy_(torch.rand(6, generator=torch.Generator().manual_seed(i)) + 0.1)
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(ours.train()(x), reference(x))
    trained = nn.BatchNorm2d(6).eval()
    trained.load_state_dict(reference.state_dict() | {"num_batches_tracked": torch.tensor(7)})
    torch.testing.assert_close(ours(x), trained(x))
    assert not list(ours.parameters())
    assert ours(x.bfloat16()).dtype == torch.bfloat16


def test_files_of_trainable_batch_norm_fit_the_frozen_one():
    state_dict = ResNet("resnet18", norm="batch").state_dict()
    before = list(state_dict)
    ours = ResNet("resnet18")
    ours.load_state_dict(state_dict, strict=True)
    assert list(state_dict) == before                           # the caller's own dict keeps its counters
    assert sum(name.endswith("num_batches_tracked") for name in before) == 20
    assert not any(name.endswith("num_batches_tracked") for name in ours.state_dict())


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", [(1, 1), (33, 70), (64, 32)])
@torch.no_grad()
def test_maps(name, size):
    with torch.device("meta" if name == "resnet101" else "cpu"):
        body = ResNet(name)
        images = torch.randn(1, 3, *size)
    maps = body(images)
    assert body.strides == [4, 8, 16, 32][:len(maps)] and len(body.channels) == len(maps)
    for x, channels, stride in zip(maps, body.channels, body.strides):
        assert x.shape == (1, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert x.is_meta or x.isfinite().all()


@torch.no_grad()
def test_dilation():
    body = ResNet("resnet50", dilation=True)
    assert body.strides == [4, 8, 16, 16] and body.channels == [256, 512, 1024, 2048]
    assert body(torch.randn(1, 3, 50, 70))[-1].shape == (1, 2048, 4, 5)
    assert body.state_dict().keys() == ResNet("resnet50").state_dict().keys()
    with pytest.raises(ValueError, match="--dilation needs bottleneck blocks, which resnet18 does not have: "
                                         "use --backbone resnet50 or resnet101"):
        ResNet("resnet18", dilation=True)


def test_initialisation():
    torch.manual_seed(0)
    for name, module in ResNet("resnet18", norm="batch").named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[:, 0].numel()
            assert abs(module.weight.std() * (fan_out / 2) ** 0.5 - 1) < 0.05, name


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_trainable_norms_train_everything(norm):
    body = ResNet("resnet18", norm=norm)
    sum(x.square().mean() for x in body(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in body.parameters())
    assert len(list(body.parameters())) == 60                   # 20 convolutions, as many scales and shifts


def test_groups():
    assert [group_norm(n).num_groups for n in (8, 32, 64, 256, 2048)] == [1, 4, 8, 32, 32]


@pytest.mark.parametrize("levels", [(-1,), (0, 1, 2, 3), (-1, -2)])
@torch.no_grad()
def test_levels(levels):
    backbone = Backbone(build_body("resnet18", "frozen", dilation=False), levels)
    batch = nested_tensor_from_tensor_list([torch.randn(3, 50, 96), torch.randn(3, 80, 40)])
    maps = backbone(batch)
    strides = [(4, 8, 16, 32)[i] for i in levels]
    assert list(maps) == [str(i) for i in range(len(strides))] and backbone.strides == strides
    every = backbone.body(batch.tensors)
    everything = [every[i] for i in levels]
    for level, stride, channels, expected in zip(maps.values(), strides, backbone.channels, everything):
        assert torch.equal(level.tensors, expected)
        assert level.tensors.shape == (2, channels, -(-80 // stride), -(-96 // stride))
        assert level.mask.shape == (2, *level.tensors.shape[2:]) and level.mask.dtype == torch.bool
    assert maps["0"].mask[0, -1].all() and maps["0"].mask[1, :, -1].all() and not maps["0"].mask[:, 0, 0].any()


@pytest.mark.parametrize("small", [(3, 4), (7, 10), (1, 1)])
def test_mask_is_resized_by_nearest_rounded_down(small):
    batch = nested_tensor_from_tensor_list([torch.ones(3, 57, 80), torch.ones(3, 71, 33)])
    mask = resize_mask(batch, small)
    for y in range(small[0]):
        for x in range(small[1]):
            assert torch.equal(mask[:, y, x], batch.mask[:, y * 71 // small[0], x * 80 // small[1]])


def test_what_is_frozen_of_a_published_backbone():
    backbone = Backbone(build_body("resnet18", "batch", dilation=False), [-1])
    freeze(backbone, stages=1, lr_backbone=1e-5)
    frozen = {name.split(".")[0] for name, p in backbone.body.named_parameters() if not p.requires_grad}
    trained = {name.split(".")[0] for name, p in backbone.body.named_parameters() if p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"} and trained == {"layer2", "layer3", "layer4"}
    freeze(backbone, stages=0, lr_backbone=0)
    assert not any(p.requires_grad for p in backbone.parameters())


def test_unknown_names():
    with pytest.raises(ValueError, match="--backbone resnet19 is not known; there are resnet18, resnet34, resnet50"):
        build_body("resnet19", "frozen", False)
    with pytest.raises(ValueError, match="backbone_norm 'layer' is not known; use one of frozen, batch, group"):
        build_body("resnet18", "layer", False)


def test_imagenet_weights_are_torchvisions():
    for name in PUBLISHED:
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        assert IMAGENET_URLS[name] == weights.url


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_folded_normalisations(name):
    """Maps and gradients in float64 are those of convolution and normalisation one after the other."""
    torch.manual_seed(0)
    plain = ResNet(name).double().train()
    for module in plain.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for value, low, high in ((module.weight, 0.3, 0.6), (module.bias, -0.2, 0.2), (module.running_mean, -1, 1),
                                     (module.running_var, 0.5, 2)):
                value.uniform_(low, high)
    folded = copy.deepcopy(plain)
    count = fold_norms(folded)
    assert count == sum(isinstance(module, FrozenBatchNorm2d) for module in plain.modules()) > 10
    called = []
    for model in (plain, folded):
        model.layer1[0].bn2.register_forward_hook(lambda *_, model=model: called.append(model))
    images = torch.randn(2, 3, 65, 90, dtype=torch.float64)
    sizes = [(65, 64), (50, 90)]
    maps = [model(images, sizes) for model in (plain, folded)]
    assert called == [plain]                                    # in training on a CPU folded only where asked for
    for a, b, extents in zip(*maps, zip(*(plain.extents(size) for size in sizes))):
        for i, (h, w) in enumerate(extents):
            torch.testing.assert_close(a[i, :, :h, :w], b[i, :, :h, :w], atol=1e-10, rtol=1e-10)
    inside = [plain.extents(size)[-1] for size in sizes]
    for *_, last in maps:
        sum(last[i, :, :h, :w].square().sum() for i, (h, w) in enumerate(inside)).backward()
    for (key, p), q in zip(plain.named_parameters(), folded.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-8, rtol=1e-8, msg=lambda m, key=key: f"{key}: {m}")
    with torch.no_grad():
        plain(images)
    assert called == [plain]                                    # without gradients always folded
