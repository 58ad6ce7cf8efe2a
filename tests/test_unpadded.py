"""Batches in which nothing is padding: attention has no mask then, on any device, and nothing waits to find out."""
from contextlib import nullcontext

import pytest
import torch
from small_models import build_small

from detr import list_models
from detr.attention import ProjectedAttention
from detr.attention_maps import explain
from detr.deformable_attention import MSDeformAttn
from detr.nested_tensor import NestedTensor, as_nested_tensor, nested_tensor_from_tensor_list

MASKS = {"masks": True, "hidden_dim": 128}
SMALL = [(name, {}) for name in list_models() if name.startswith("tiny_")] + [
    ("detr_resnet50", {}), ("detr_resnet50", MASKS), ("dino_resnet50_4scale", MASKS)]
ALIKE = torch.zeros(2, 3, 64, 96)
UNLIKE = [torch.zeros(3, 64, 96), torch.zeros(3, 64, 64)]


def test_whether_anything_is_padding():
    alike, unlike = as_nested_tensor(ALIKE), nested_tensor_from_tensor_list(UNLIKE)
    for batch, padded in ((alike, False), (unlike, True)):
        bare = NestedTensor(*batch.decompose())
        assert batch.padded == batch.to("meta").padded == bare.padded == padded
        assert bare.to("meta").padded                               # where its mask alone knows, nobody waits for it
    assert not NestedTensor(*alike.decompose(), whole=True).to("meta").padded
    changed = as_nested_tensor(ALIKE)
    changed.mask[1, :, 32:] = True                                  # by hand: where asking is free, the mask decides
    assert changed.padded
    assert NestedTensor(*alike.decompose(), torch.tensor(alike.sizes)).to("meta").padded    # as in an export
    assert alike.key_padding_mask() is None and torch.equal(unlike.key_padding_mask(), unlike.mask.flatten(1))


def test_what_is_compiled_is_for_any_batch():
    alike, seen = as_nested_tensor(ALIKE), []

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        seen.append(alike.padded)
        return x + 1

    compiled(torch.zeros(1))
    assert seen == [True]


@pytest.mark.parametrize("padding", ["legacy", "exact"])
@pytest.mark.parametrize("name, flags", SMALL)
def test_no_mask_where_nothing_is_padded(name, flags, padding, monkeypatch):
    """On a device that cannot be asked for values: reading a mask there would fail."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())       # which does not know the device
    model = build_small(name, padding=padding, **flags)[0].to("meta").eval()
    masked: dict[str, bool] = {}
    for module_name, module in model.named_modules():
        among_queries = ".decoder." in module_name and module_name.endswith("self_attn")
        if isinstance(module, MSDeformAttn):
            module.register_forward_pre_hook(lambda module, args, of=module_name: masked.update({of: args[3].padded}))
        elif isinstance(module, ProjectedAttention) and not among_queries:
            module.register_forward_pre_hook(
                lambda module, args, kwargs, of=module_name: masked.update({of: kwargs["key_padding_mask"] is not None}),
                with_kwargs=True)
    model(as_nested_tensor(ALIKE).to("meta"))
    assert len(masked) >= 2 and not any(masked.values())
    model(nested_tensor_from_tensor_list(UNLIKE).to("meta"))
    assert all(masked.values())


@pytest.mark.parametrize("padding", ["legacy", "exact"])
@pytest.mark.parametrize("name, flags", SMALL)
def test_the_same_as_with_a_mask(name, flags, padding, monkeypatch):
    model = build_small(name, padding=padding, **flags)[0].double().eval()
    samples = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        found = model(samples)
        monkeypatch.setattr(NestedTensor, "padded", True)
        expected = model(samples)
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(found[key], expected[key], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["tiny_detr", "tiny_conditional_detr"])
def test_attention_maps_do_without(name, monkeypatch):
    model = build_small(name)[0].eval()
    image = torch.randn(3, 64, 96)
    found = explain(model, image)
    monkeypatch.setattr(NestedTensor, "padded", True)
    expected = explain(model, image)
    for of_layers, expected_of_layers in ((found.encoder, expected.encoder), (found.decoder, expected.decoder)):
        for layer, other in zip(of_layers, expected_of_layers, strict=True):
            torch.testing.assert_close(layer.weights, other.weights)
