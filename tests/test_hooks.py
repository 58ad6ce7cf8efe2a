"""The notebook's hooks: the recipe word for word, on every DETR preset, and nothing else changes by it."""
import pytest
import torch
from small_models import build_small, images
from torch import nn

from detr.architectures.conditional_detr import ConditionalDETRConfig
from detr.architectures.dab_detr import DABDETRConfig
from detr.architectures.detr import DETRConfig
from detr.presets import PRESETS

NAMES = [name for name, preset in PRESETS.items()
         if isinstance(preset.model, (DETRConfig, ConditionalDETRConfig, DABDETRConfig))]
SIZES = (64, 100), (90, 50)


def small(name: str) -> nn.Module:
    return build_small(name)[0].eval()


def same(a: dict, b: dict) -> bool:
    """The same bits in everything that two forward passes returned."""
    return a.keys() == b.keys() and all(
        all(same(x, y) for x, y in zip(a[key], b[key], strict=True)) if isinstance(a[key], list)
        else torch.equal(a[key], b[key]) for key in a)


def register(model):
    conv_features, enc_attn_weights, dec_attn_weights = [], [], []
    hooks = [
        model.backbone[-2].register_forward_hook(lambda self, input, output: conv_features.append(output)),
        model.transformer.encoder.layers[-1].self_attn.register_forward_hook(
            lambda self, input, output: enc_attn_weights.append(output[1])),
        model.transformer.decoder.layers[-1].multihead_attn.register_forward_hook(
            lambda self, input, output: dec_attn_weights.append(output[1])),
    ]
    return conv_features, enc_attn_weights, dec_attn_weights, hooks


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_recipe(name):
    whole = small(name)
    samples = images(*SIZES)
    before = whole(samples)
    model = whole.detr if PRESETS[name].model.masks else whole
    conv_features, enc_attn_weights, dec_attn_weights, hooks = register(model)
    watched = whole(samples)
    for hook in hooks:
        hook.remove()
    after = whole(samples)
    assert same(watched, before) and same(after, before)

    assert len(conv_features) == len(enc_attn_weights) == len(dec_attn_weights) == 1            # removed is removed
    last = conv_features[0][max(conv_features[0])]
    b, _, h, w = last.tensors.shape
    assert (b, h, w) == tuple(last.mask.shape)
    queries = watched["pred_logits"].shape[1]
    assert enc_attn_weights[0].shape == (b, h * w, h * w) and dec_attn_weights[0].shape == (b, queries, h * w)
    padding = last.mask.flatten(1)
    assert padding.any() and not padding.all()
    for weights in (enc_attn_weights[0], dec_attn_weights[0]):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        assert weights.min() >= 0 and (weights.masked_select(padding[:, None]) == 0).all()
        assert weights.std() > 0


@torch.no_grad()
def test_the_last_feature_map_of_a_box_model():
    model = small("detr_resnet50")
    samples = images(*SIZES)
    conv_features, _, _, hooks = register(model)
    model(samples)
    for hook in hooks:
        hook.remove()
    assert list(conv_features[0]) == ["0"]
    assert conv_features[0]["0"].tensors.shape == (2, 512, 3, 4) and conv_features[0]["0"].mask.shape == (2, 3, 4)


@torch.no_grad()
def test_weights_are_those_of_pytorchs_attention():
    model = small("detr_resnet50")
    layers = {"encoder": model.transformer.encoder.layers[-1].self_attn,
              "decoder": model.transformer.decoder.layers[-1].multihead_attn}
    seen = {}
    hooks = [layer.register_forward_hook(
        lambda module, args, kwargs, output, name=name: seen.update({name: (args, kwargs, output)}), with_kwargs=True)
        for name, layer in layers.items()]
    model(images(*SIZES))
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        args, kwargs, (out, weights) = seen[name]
        reference = nn.MultiheadAttention(layer.embed_dim, layer.num_heads, batch_first=True).eval()
        reference.load_state_dict(layer.state_dict(), strict=True)
        expected, expected_weights = reference(*args, **kwargs)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=1e-5)


def test_training_is_not_changed_by_hooks():
    """Outputs and gradients, dropout included, with the same random numbers."""
    model = build_small("detr_resnet50")[0].train()

    def step():
        torch.manual_seed(0)
        model.zero_grad()
        outputs = model(images(*SIZES))
        (outputs["pred_logits"].sum() + outputs["pred_boxes"].square().sum()).backward()
        return outputs | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = step()
    *_, hooks = register(model)
    watched = step()
    for hook in hooks:
        hook.remove()
    assert same(watched, before) and same(step(), before)


@torch.no_grad()
def test_gradients_of_attention_maps_can_be_asked_for():
    model = small("detr_resnet50")
    with torch.enable_grad():
        _, _, dec_attn_weights, hooks = register(model)
        model(images(*SIZES))
        dec_attn_weights[0][0, 0].max().backward()
    for hook in hooks:
        hook.remove()
    assert model.query_embed.weight.grad.abs().sum() > 0
