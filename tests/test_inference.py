"""Models prepared for prediction: the same outputs, and the model they were made from stays what it was."""
from collections import Counter

import pytest
import torch
from small_models import build_small, images
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from detr import inference, mlp
from detr.backbone import backbone_of
from detr.backbone.resnet import FrozenBatchNorm2d
from detr.inference import FoldedConvolution, FoldedResNet, FusedLinear, for_prediction
from detr.mlp import feed_forward
from detr.precision import autocast

CPU = torch.device("cpu")
SIZES = (64, 100), (90, 50)
RESNETS = ["detr_resnet50", "detr_resnet50_dc5", "detr_resnet50_panoptic", "deformable_detr_resnet50",
           "deformable_detr_resnet50_two_stage", "tiny_detr", "tiny_deformable_detr"]


def trained(name: str, **flags) -> nn.Module:
    """A small model whose normalisations are not what they are at first, when they change nothing."""
    model = build_small(name, **flags)[0].eval()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("name, padding, fused", [
    *((name, "exact", True) for name in RESNETS), ("detr_resnet50", "legacy", True), ("tiny_detr", "legacy", True),
    ("detr_resnet50", "exact", False), ("tiny_deformable_detr", "legacy", False)])
@torch.no_grad()
def test_outputs_are_the_models(name, padding, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(inference, "fused_on_cpu", lambda x, weight: False)
    model = trained(name, padding=padding)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected, aux_loss = model(images(*SIZES)), getattr(model, "detr", model).aux_loss
    fast = for_prediction(model)
    actual = fast(images(*SIZES))
    assert isinstance(backbone_of(fast).body, FoldedResNet)
    assert sum(isinstance(module, FusedLinear) for module in getattr(fast, "detr", fast).transformer.modules()) > 4
    assert not any(isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)) for module in fast.modules())
    assert "aux_outputs" not in actual and not any(p.requires_grad for p in fast.parameters())
    for what in ("pred_logits", "pred_boxes", "pred_masks"):
        assert (what in actual) == (what in expected)
        if what in actual:
            torch.testing.assert_close(actual[what], expected[what], rtol=1e-4, atol=2e-4)
    assert getattr(model, "detr", model).aux_loss is aux_loss                   # and the model itself is as it was
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("name", ["detr_resnet50", "deformable_detr_resnet50", "deformable_detr_resnet50_box_refine",
                                  "conditional_detr_resnet50", "dab_detr_resnet50", "dab_deformable_detr_resnet50"])
@torch.no_grad()
def test_bfloat16_is_near(name):
    model = trained(name)
    for part, parameter in model.named_parameters():
        if "bbox_embed" in part:                                # the last layers of some begin at zero
            parameter += 0.02 * torch.randn_like(parameter)
    fast = for_prediction(model, "bf16")
    assert backbone_of(fast).body.conv1.weight.dtype == torch.bfloat16
    with autocast(CPU, "bf16"):
        actual = fast(images(*SIZES))
    expected = model(images(*SIZES))
    assert actual["pred_boxes"].dtype == torch.float32
    assert (actual["pred_boxes"] - expected["pred_boxes"]).abs().max() < 0.01
    assert 0 < (actual["pred_logits"].float() - expected["pred_logits"]).abs().max() < 0.1


class Fused(TorchDispatchMode):
    """How often each of PyTorch's fused operations was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mkldnn":
            self.calls[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def fused_calls(call):
    with Fused() as fused:
        call()
    return fused.calls


@torch.no_grad()
def test_what_is_fused(monkeypatch):
    """Everything that can be, and only there: by the type of the weights and what PyTorch has switched on."""
    fast, batch = for_prediction(trained("detr_resnet50")), images(*SIZES)
    calls = fused_calls(lambda: fast(batch))
    convolutions, linear = (sum(type(m) is kind for m in fast.modules()) for kind in (FoldedConvolution, FusedLinear))
    assert calls == {"_convolution_pointwise": convolutions, "_linear_pointwise": linear}
    assert convolutions > 16 and linear > 10
    with monkeypatch.context() as off:
        off.setattr(torch.backends.mkldnn, "enabled", False)
        assert not fused_calls(lambda: fast(batch))
    layer, x = FusedLinear(16, 24), torch.randn(5, 16)
    assert fused_calls(lambda: layer(x)) == {"_linear_pointwise": 1}
    with autocast(CPU, "bf16"):
        assert not fused_calls(lambda: layer(x))
    with torch.enable_grad():
        assert not fused_calls(lambda: layer(x)) and layer(x).requires_grad
        assert fused_calls(lambda: layer.requires_grad_(False)(x))
    half = FusedLinear(16, 24, dtype=torch.bfloat16)
    with autocast(CPU, "bf16"):
        assert bool(fused_calls(lambda: half(x))) == inference.fused_in(torch.bfloat16)
    assert half.to("meta")(x.bfloat16().to("meta")).shape == (5, 24)


@pytest.mark.parametrize("shape", [(2, 300, 16), (0, 16), (16,)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_linear_layers(shape, bias):
    plain, tokens = nn.Linear(16, 24, bias=bias), torch.randn(shape)
    fast, half = FusedLinear(16, 24, bias=bias), FusedLinear(16, 24, bias=bias, dtype=torch.bfloat16)
    fast.load_state_dict(plain.state_dict())
    half.load_state_dict(plain.state_dict())
    for x in (tokens, tokens.expand(3, *shape).transpose(0, -2)):               # which does not lie row by row
        torch.testing.assert_close(fast(x), plain(x))
        with autocast(CPU, "bf16"):
            assert torch.equal(fast(x), plain(x))                               # weights in float32 are cast
            assert half(x).dtype == torch.bfloat16
            torch.testing.assert_close(half(x), plain(x))


@torch.no_grad()
def test_what_is_traced_or_exported_takes_other_sizes():
    """No fused operation in it, and no number of parts."""
    linear1, linear2 = FusedLinear(16, 24).eval(), FusedLinear(24, 16).eval()

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear1, self.linear2, self.dropout = linear1, linear2, nn.Dropout().eval()

        def forward(self, x):
            return feed_forward(x, self.linear1, self.linear2, self.dropout)

    layer, tokens = Layer().eval(), torch.randn(2, 30, 16)
    batch, count = torch.export.Dim("batch"), torch.export.Dim("count")
    exported = torch.export.export(layer, (tokens,), dynamic_shapes=({0: batch, 1: count},))
    with pytest.MonkeyPatch.context() as small:
        small.setattr(mlp, "AT_ONCE", 24 * 4 * 16)
        assert len(tokens.flatten(0, 1)) > 16
        traced = torch.jit.trace(layer, (tokens,))
    other = torch.randn(3, 50, 16)
    for graph, how in ((traced.inlined_graph, traced), (exported.graph_module.code, exported.module())):
        assert "mkldnn" not in str(graph) and "split" not in str(graph)
        torch.testing.assert_close(how(other), layer(other))


@pytest.mark.parametrize("name", ["tiny_detr", "tiny_deformable_detr"])
def test_gradients_of_images(name):
    """Parameters have none; what of an image matters can still be asked."""
    model = trained(name)
    grads = []
    for side in (model, for_prediction(model)):
        given = [image.requires_grad_() for image in images(*SIZES)]
        side(given)["pred_logits"].square().sum().backward()
        grads.append(given[0].grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3 * float(grads[0].abs().max()))


@pytest.mark.parametrize("flags", [{"backbone_norm": "group", "from_scratch": True, "lr_backbone": 1e-3},
                                   {"backbone": "pvt_v2_b0"}])
@torch.no_grad()
def test_what_cannot_be_folded_stays(flags):
    model = trained("detr_resnet50", **flags)
    fast = for_prediction(model)
    assert type(backbone_of(fast).body) is type(backbone_of(model).body)
    torch.testing.assert_close(fast(images(*SIZES))["pred_boxes"], model(images(*SIZES))["pred_boxes"])


@torch.no_grad()
def test_of_a_prepared_model():
    once = for_prediction(trained("tiny_detr"))
    torch.testing.assert_close(for_prediction(once)(images(*SIZES)), once(images(*SIZES)))
    for before, then in (("off", "bf16"), ("bf16", "off")):
        prepared = for_prediction(trained("tiny_detr", backbone="pvt_v2_b0"), before)
        with pytest.raises(ValueError, match=f"'{then}': this model is a copy prepared for '{before}'; prepare the one"):
            for_prediction(prepared, then)


@torch.no_grad()
def test_in_float64():
    model = trained("detr_resnet50").double()
    batch = [image.double() for image in images(*SIZES)]
    torch.testing.assert_close(for_prediction(model)(batch)["pred_boxes"], model(batch)["pred_boxes"], rtol=0, atol=1e-10)


def test_an_unknown_precision():
    with pytest.raises(ValueError, match="precision 'int8' is not known; use one of off, bf16, fp16"):
        for_prediction(build_small("tiny_detr")[0], "int8")
