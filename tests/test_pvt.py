"""Pyramid vision transformers against the published models; a result that does not depend on the batch."""
import functools
import random

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import check, load_case, state_dict, unchecked
from torch import nn

from detr import build_model, checkpoint
from detr.backbone import has_statistics, pvt
from detr.backbone.pvt import SIZES, SIZES_V2, PyramidVisionTransformer, PyramidVisionTransformerV2, Size

SMALL = dict(channels=(8, 12, 16, 24), heads=(1, 2, 2, 3), ratios=(4, 4, 2, 2))
SMALL_SIZES = {"pvt_small_one": Size((1, 2, 1, 1), **SMALL), "pvt_v2_small_one": Size((1, 2, 1, 1), **SMALL),
               "pvt_v2_small_one_li": Size((1, 2, 1, 1), linear=True, **SMALL)}


def build(name: str, **options) -> nn.Module:
    return (PyramidVisionTransformerV2 if "_v2" in name else PyramidVisionTransformer)(name, **options)


@functools.lru_cache
def shapes(name: str) -> nn.Module:
    """A model without values."""
    with torch.device("meta"):
        return build(name)


def drawn(name: str) -> nn.Module:
    """A model in evaluation mode with weights that make every part of it matter, as the cases draw them."""
    with torch.device("meta"):
        body = build(name)
    body.load_state_dict(state_dict({key: list(x.shape) for key, x in body.state_dict().items()}), assign=True)
    return body.eval()


@pytest.fixture
def small(monkeypatch):
    """Models of all kinds that are small enough for many runs, in float64: how a result depends on the batch is then
    not hidden by rounding."""
    for name, size in SMALL_SIZES.items():
        monkeypatch.setitem(SIZES_V2 if "_v2" in name else SIZES, name, size)
    return lambda name: drawn(name).double()


def batch(sizes, room=(0, 0), content=float("nan"), dtype=torch.float64, seed=0):
    """Images of ``sizes`` in one tensor that is larger by ``room`` and has ``content`` where there is no image."""
    draw = torch.Generator().manual_seed(seed)
    height, width = (max(side) + more for side, more in zip(zip(*sizes), room))
    images = torch.full((len(sizes), 3, height, width), content, dtype=dtype)
    for image, (h, w) in zip(images, sizes):
        image[:, :h, :w] = torch.randn(3, h, w, generator=draw, dtype=dtype)
    return images


def alone(body, images, i, size):
    return body(images[i:i + 1, :, :size[0], :size[1]], [size])


# The published models

@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_small", "pvt_v2_b0", "pvt_v2_b2"])
@torch.no_grad()
def test_published_model(name):
    case = load_case(name)
    with torch.device("meta"):                                  # all values come from the case
        body = build(name)
    body.load_state_dict(case.state_dict(), strict=True, assign=True)
    for i, image in enumerate(case.images()):
        for j, x in enumerate(body.eval()(image[None])):
            check(case, f"{i}.stage{j + 1}", x)
    assert unchecked(case) == []


@torch.no_grad()
def test_published_classifier(capsys):
    """The classification model around the body: its class token goes through the last stage."""
    case = load_case("pvt_tiny_classification")
    weights, body = case.state_dict(), build("pvt_tiny").eval()
    checkpoint.load_backbone(body, weights, "pvt_tiny.pth", leave_out=body.classifier)
    assert capsys.readouterr().out == ("pvt_tiny.pth: loaded 156 tensors into the backbone; left out cls_token, "
                                       "norm.weight, norm.bias, head.weight, head.bias\n")
    for i, image in enumerate(case.images()):
        x, height, width, _ = body.patch_embed4(body(image[None])[2], None)
        grid = pvt.Grid(height, width)
        x = torch.cat([weights["cls_token"] + body.pos_embed4[:, :1], x + body.positions(3, grid, None)], 1)
        for block in body.block4:
            x = block(x, grid)
        x = F.layer_norm(x[:, 0], x.shape[-1:], weights["norm.weight"], weights["norm.bias"], eps=1e-6)
        check(case, f"{i}.logits", F.linear(x, weights["head.weight"], weights["head.bias"]))
    assert unchecked(case) == []


def test_published_parameter_counts():
    """Detection models have the parameters of the published ones, and classification models ``classifier`` besides."""
    case = load_case("pvt_parameter_counts")
    for file, names in case.spec["models"].items():
        for name in names:
            body = shapes(name)
            dim = body.channels[-1]
            more = {"cls_token": dim, "norm.weight": dim, "norm.bias": dim, "head.weight": 1000 * dim, "head.bias": 1000}
            left_out = body.classifier if file.startswith("classification") else ()
            check(case, f"{file[:-3]}.{name}.total",
                  sum(p.numel() for p in body.parameters()) + sum(more[key] for key in left_out))
            check(case, f"{file[:-3]}.{name}.tensors", len(body.state_dict()) + len(left_out))
    assert unchecked(case) == []


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
@torch.no_grad()
def test_timm(name):
    """The published cases have no linear attention; timm's model does, and reads published names."""
    body, reference = drawn(name), timm.create_model(name, num_classes=0).eval()
    reference.load_state_dict(timm.models.pvt_v2.checkpoint_filter_fn(body.state_dict(), reference), strict=True)
    images = batch([(75, 101)])
    expected = reference.double().forward_intermediates(images, intermediates_only=True)
    for x, wanted in zip(body.double()(images), expected):
        torch.testing.assert_close(x, wanted, atol=1e-12, rtol=0)


def test_classification_files_of_v2(capsys):
    body, other = build("pvt_v2_b0"), build("pvt_v2_b0")
    file = body.state_dict() | {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
    checkpoint.load_backbone(other, file, "pvt_v2_b0.pth", leave_out=other.classifier)
    assert "loaded 176 tensors into the backbone; left out head.weight, head.bias\n" in capsys.readouterr().out
    assert all(torch.equal(x, other.state_dict()[key]) for key, x in body.state_dict().items())
    with pytest.raises(ValueError, match="pvt_v2_b0.pth does not fit the model"):
        checkpoint.load_backbone(other, file | {"extra": torch.zeros(1)}, "pvt_v2_b0.pth", leave_out=other.classifier)


# Position embeddings of v1

@torch.no_grad()
def test_positions(small):
    body = small("pvt_small_one")
    for stage, side in enumerate((56, 28, 14, 7)):
        embedding = getattr(body, f"pos_embed{stage + 1}")[0, (1 if stage == 3 else 0):]
        plane = embedding.unflatten(0, (side, side)).permute(2, 0, 1)[None]
        for height, width in [(side, side), (3, 5), (56, 56), (28, 112), (60, 41)]:
            resized = F.interpolate(plane, (height, width), mode="bilinear", align_corners=False)[0].flatten(1).T
            as_it_is = stage == 0 and height * width == 56 * 56                             # as published
            grid = pvt.Grid(height, width)
            torch.testing.assert_close(body.positions(stage, grid, None)[0], embedding if as_it_is else resized)
            torch.testing.assert_close(body.positions(stage, grid, [(height, width)])[0], resized)
    assert all(x.isfinite().all() for x in body(batch([(448, 448)])))                       # fails as published


# Exact padding

@pytest.mark.parametrize("name", SMALL_SIZES)
@torch.no_grad()
def test_an_image_does_not_see_its_batch(small, name):
    body, rng = small(name), random.Random(name)
    for trial in range(12):
        sizes = [(rng.randint(32, 200), rng.randint(32, 200)) for _ in range(rng.randint(1, 4))]
        images = batch(sizes, room=(rng.choice([0, 1, 37]), rng.choice([0, 1, 37])), seed=trial)
        before = images.clone()
        maps = body(images, sizes)
        assert torch.equal(images.nan_to_num(7), before.nan_to_num(7))
        for i, size in enumerate(sizes):
            expected = alone(body, images, i, size)
            assert body.extents(size) == [tuple(x.shape[-2:]) for x in expected]
            for x, wanted, (h, w) in zip(maps, expected, body.extents(size)):
                torch.testing.assert_close(x[i, :, :h, :w], wanted[0], atol=1e-11, rtol=0,
                                           msg=lambda m, s=sizes: f"{s}: {m}")
                assert (x[i, :, h:] == 0).all() and (x[i, :, :, w:] == 0).all()


@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b0", "pvt_v2_b2_li"])
@torch.no_grad()
def test_exact_in_single_precision(name):
    """To rounding, 3e-6 of the largest value. And the published computation is not: that is what ``sizes`` are for."""
    body, sizes = drawn(name), [(45, 150), (131, 64), (160, 160)]
    images = batch(sizes, content=0.0, dtype=torch.float32)
    maps, legacy = body(images, sizes), body(images)
    for i, size in enumerate(sizes):
        for x, published, wanted, (h, w) in zip(maps, legacy, alone(body, images, i, size), body.extents(size)):
            rounding = 3e-6 * wanted.abs().max().item()
            torch.testing.assert_close(x[i, :, :h, :w], wanted[0], atol=rounding, rtol=0)
            if size != (160, 160):
                assert (published[i, :, :h, :w] - wanted[0]).abs().max() > 0.5
            else:
                torch.testing.assert_close(published[i], wanted[0], atol=rounding, rtol=0)


@pytest.mark.parametrize("name", SMALL_SIZES)
@torch.no_grad()
def test_a_batch_without_padding_is_as_published(small, name):
    body = small(name)
    for size in [(64, 96), (77, 131), (224, 224)]:
        images = batch([size, size])
        for exact, published in zip(body(images, [size, size]), body(images)):
            assert torch.equal(exact, published)
    if "v2" not in name:                                        # 28 x 112 tokens: what is published here is a mistake
        images = batch([(112, 448)])
        assert not torch.allclose(body(images, [(112, 448)])[0], body(images)[0])


@pytest.mark.parametrize("name", SMALL_SIZES)
def test_gradients_do_not_see_the_batch(small, name):
    body, sizes = small(name), [(45, 90), (101, 64), (128, 33)]
    images = batch(sizes, room=(5, 0)).requires_grad_()
    weights = [torch.randn(1, channels, 1, 1, dtype=torch.float64) for channels in body.channels]

    def gradients(outputs):
        loss = sum((x.sin() * weight).sum() for maps in outputs for x, weight in zip(maps, weights))
        inputs = {"images": images, **dict(body.named_parameters())}
        return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()))))

    together = gradients([body(images, sizes)])
    separate = gradients([alone(body, images, i, size) for i, size in enumerate(sizes)])
    for key, wanted in separate.items():
        assert wanted.abs().max() > 0, key
        torch.testing.assert_close(together[key], wanted, atol=1e-11 * wanted.abs().max().item(), rtol=0,
                                   msg=lambda m, k=key: f"{k}: {m}")
    for gradient, (h, w) in zip(together["images"], sizes):
        assert (gradient[:, h:] == 0).all() and (gradient[:, :, w:] == 0).all()
    if "v2" not in name:                                        # the class token's position is there, and unused
        assert (together["pos_embed4"][0, 0] == 0).all()


@pytest.mark.parametrize("name", SMALL_SIZES)
@torch.no_grad()
def test_lower_precision(small, name):
    body, sizes = small(name).float(), [(64, 90), (101, 64)]
    images = batch(sizes, content=0.0, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        maps = body(images, sizes)
    for x, wanted in zip(maps, body(images, sizes)):
        torch.testing.assert_close(x.float(), wanted, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", SMALL_SIZES)
@torch.no_grad()
def test_smallest_image(small, name):
    body = small(name)
    n = body.smallest
    maps = body(batch([(n, 70)]))
    assert all(x.isfinite().all() for x in maps) and [x.shape[2] for x in maps] == [h for h, _ in body.extents((n, 70))]
    if n == 1:
        return
    with pytest.raises(ValueError, match=f"image 0 is {n - 1} x 70, and a spatial reduction of this backbone would have "
                                         f"no token of it: pad images to at least 32 pixels a side first"):
        body(batch([(n - 1, 70)]))
    with pytest.raises(ValueError, match=f"image 1 is 64 x {n - 1}"):
        body(batch([(64, 64), (64, n - 1)]), [(64, 64), (64, n - 1)])
    body.smallest = 1
    with pytest.raises(RuntimeError, match="[Kk]ernel size"):   # it would indeed
        body(batch([(n - 1, 70)]))


def test_sizes_are_checked(small):
    body = small("pvt_v2_small_one")
    with pytest.raises(ValueError, match="1 sizes for a batch of 2 images"):
        body(batch([(64, 64)] * 2), [(64, 64)])
    with pytest.raises(ValueError, match=r"size 0 is \(65, 64\), outside 1..64, 1..64"):
        body(batch([(64, 64)]), [(65, 64)])


# Construction

@pytest.mark.parametrize("name", [*SIZES, *SIZES_V2])
def test_maps(name):
    body = shapes(name)
    maps = body(torch.randn(2, 3, 96, 130, device="meta"))
    assert body.strides == [4, 8, 16, 32] and [x.shape[1] for x in maps] == body.channels
    assert [tuple(x.shape[2:]) for x in maps] == body.extents((96, 130))
    width = [32, 16, 8, 4] if name in SIZES else [33, 17, 9, 5]
    assert body.extents((96, 130)) == list(zip([24, 12, 6, 3], width))


@pytest.mark.parametrize("name, rate", [("pvt_tiny", 0.1), ("pvt_small", 0.1), ("pvt_medium", 0.0), ("pvt_large", 0.0),
                                        ("pvt_v2_b2_li", 0.1)])
def test_stochastic_depth_grows_with_depth(name, rate):
    with torch.device("meta"):
        other = build(name, drop_path_rate=0.3)
    for model, last in ((shapes(name), rate), (other, 0.3)):
        rates = [block.drop_path.rate for i in range(4) for block in getattr(model, f"block{i + 1}")]
        torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, last, len(rates)))


def test_stochastic_depth():
    torch.manual_seed(0)
    drop, x = pvt.DropPath(0.2), torch.ones(4000, 3, 2)
    out = drop.train()(x)
    assert (out == out[:, :1, :1]).all() and set(out.unique().tolist()) == {0.0, 1.25}      # whole images
    assert abs((out[:, 0, 0] == 0).float().mean() - 0.2) < 0.03
    assert torch.equal(drop.eval()(x), x)


def test_initialisation():
    torch.manual_seed(0)
    for name in ("pvt_tiny", "pvt_v2_b0"):
        for key, module in build(name).named_modules():
            if isinstance(module, nn.Linear):
                assert abs(module.weight.std() / 0.02 - 1) < 0.06 and (module.bias == 0).all(), key
            elif isinstance(module, nn.Conv2d) and name == "pvt_v2_b0":
                fan_out = module.weight[0, 0].numel() * module.out_channels / module.groups
                assert abs(module.weight.std() * (fan_out / 2) ** 0.5 - 1) < 0.08 and (module.bias == 0).all(), key
            elif isinstance(module, nn.Conv2d):                 # uniform within 1 / sqrt(fan in)
                bound = module.weight[0].numel() ** -0.5
                assert abs(module.weight.abs().max() / bound - 1) < 0.02, key
    assert abs(build("pvt_tiny").pos_embed4.std() / 0.02 - 1) < 0.06


@pytest.mark.parametrize("name, tensors", [("pvt_tiny", 41), ("pvt_v2_b0", 46)])
def test_stem_and_first_stage(name, tensors):
    body = shapes(name)
    first = {key for key in body.state_dict() if key.split(".")[0].endswith("1")}
    assert first == {key for key in body.state_dict() if key.startswith(body.stages[0])} and len(first) == tensors


@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b0"])
def test_what_every_family_is_asked_for(name):
    with pytest.raises(ValueError, match=f"--backbone_norm group has no meaning for {name}, which has layer norms alone"):
        build(name, norm="group")
    with pytest.raises(ValueError, match=f"--dilation needs convolutional stages, which {name} does not have: leave it"):
        build(name, dilation=True)


@pytest.mark.parametrize("model", ["detr_resnet50", "deformable_detr_resnet50_two_stage"])
@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b0", "pvt_v2_b2_li"])
def test_under_detectors(model, name):
    """One step of training, by name."""
    flags = {"hidden_dim": 64, "nheads": 4, "enc_layers": 1, "dec_layers": 1, "num_queries": 9}
    detector, criterion, _ = build_model(model, num_classes=5, backbone=name, **flags)
    images = [torch.randn(3, 64, 96), torch.randn(3, 50, 70)]
    target = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    criterion.weighted_sum(criterion(detector(images), [target, target])).backward()
    for parameter_name, p in detector.named_parameters():
        assert (p.grad is not None) == p.requires_grad, parameter_name
        assert p.grad is None or p.grad.isfinite().all(), parameter_name


def test_normalisation_is_its_own():
    with pytest.raises(ValueError, match="--backbone_norm"):
        build_model("detr_resnet50", backbone="pvt_tiny", backbone_norm="group")
    assert not has_statistics("pvt_v2_b2") and has_statistics("resnet18")
