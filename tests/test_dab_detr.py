"""DAB-DETR and DAB-Deformable-DETR against the published model and against their definitions. What the project's services
do with them is in test_descendants.py."""
import dataclasses
import math

import pytest
import torch
from cases import load_case, unchecked
from plain_transformers import dab_detr, encoded, feed_forward, linear, logit, mlp, norm, part, self_attention
from published import check_counts, check_layers
from small_models import NUM_CLASSES, SIZES, build_small, compare_with, images, targets, unlike_at_first
from torch import Tensor

from detr import build_model
from detr.nested_tensor import nested_tensor_from_tensor_list
from detr.presets import PRESETS

PUBLISHED = {"dab_detr_r50": "dab_detr_resnet50", "dab_deformable_detr_r50": "dab_deformable_detr_resnet50"}
ELSEWHERE = {"modelname", "transformer_activation"}         # flags that are another preset here, and no choice
DEFORMABLE = "dab_deformable_detr_resnet50"


# -- the published models ---------------------------------------------------------------------------------------------

def test_published_model():
    case = load_case("dab_detr_r50")
    with torch.device("meta"):                                  # all values come from the case
        model = build_model("dab_detr_resnet50", num_classes=91)[0]
    assert model.state_dict().keys() == case.spec["shapes"].keys()
    weights = case.state_dict()
    model.load_state_dict(weights, strict=True, assign=True)
    for alias, name in case.spec["aliases"].items():
        assert torch.equal(model.state_dict()[alias], model.state_dict()[name])
    with torch.no_grad():
        outputs = model.eval()(case.images())
    check_layers(case, outputs)
    assert unchecked(case) == []


def test_published_parameter_counts():
    case = load_case("dab_parameter_counts")
    for name, flags in case.spec["models"].items():
        own = {flag: value for flag, value in flags.items() if flag not in ELSEWHERE}
        with torch.device("meta"):
            models = [build_model(DEFORMABLE if "deformable" in name else "dab_detr_resnet50", **own)[0]]
            if name in PUBLISHED:
                models.append(build_model(PUBLISHED[name])[0])
        check_counts(case, name, *models)
    assert unchecked(case) == []


def test_published_recipe_and_losses():
    """The published defaults are those of the case; the paper's models train for 50 epochs, with a drop after 40."""
    spec = load_case("dab_detr_r50").spec["args"]
    for name in ("dab_detr_resnet50", "dab_detr_resnet50_dc5_3pat", DEFORMABLE):
        preset = PRESETS[name]
        changed = {"epochs": 50, "lr_drop": 40, "dilation": "dc5" in name, "num_patterns": 3 if "3pat" in name else 0}
        for section in (preset.model, preset.train):
            for field in dataclasses.fields(section):
                if field.name in spec and field.name != "amp":                 # whose type is another
                    assert getattr(section, field.name) == changed.get(field.name, spec[field.name]), field.name
        assert preset.data == type(preset.data)() and preset.num_classes == 91
    assert PRESETS["dab_detr_resnet50"].model.pe_temperature == spec["pe_temperatureH"] == spec["pe_temperatureW"]
    for name, most in (("dab_detr_resnet50", spec["num_select"]), (DEFORMABLE, 100)):
        _, criterion, postprocessors = build_small(name)
        layers = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
        assert criterion.weight_dict == layers | {f"{loss}_0": weight for loss, weight in layers.items()}
        assert postprocessors["bbox"].k == most


def test_losses_to_read():
    model, criterion, _ = build_small("dab_detr_resnet50")
    losses = criterion(model(images((64, 64))), targets(3))
    for suffix in ("", "_0"):
        torch.testing.assert_close(losses[f"loss_xy{suffix}"] + losses[f"loss_hw{suffix}"], losses[f"loss_bbox{suffix}"])
        assert not losses[f"loss_xy{suffix}"].requires_grad and f"loss_xy{suffix}" not in criterion.weight_dict


# -- DAB-DETR ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, flags", [("dab_detr_resnet50", {}), ("dab_detr_resnet50", {"dilation": True,
                                                                                         "backbone": "resnet50"}),
                                         ("dab_detr_resnet50_dc5_3pat", {}), ("dab_detr_resnet50", {"num_patterns": 1})])
def test_definition(name, flags):
    outputs, model = compare_with(dab_detr, name, **flags)
    patterns = flags.get("num_patterns", 3 if "3pat" in name else 1)
    assert outputs["pred_logits"].shape[1] == 7 * patterns
    assert model.backbone[0].strides == [16 if "dc5" in name or "dilation" in flags else 32]


def test_patterns_come_in_blocks():
    """All anchors with the first pattern, then all with the second."""
    transformer = build_small("dab_detr_resnet50", num_patterns=3)[0].transformer
    content, anchors = transformer.queries(torch.arange(28.0).view(7, 4))
    for i in range(3):
        assert torch.equal(content[7 * i:7 * i + 7], transformer.patterns.weight[i].expand(7, -1))
        assert torch.equal(anchors[7 * i:7 * i + 7], torch.arange(28.0).view(7, 4))


@pytest.mark.parametrize("name", ["dab_detr_resnet50", DEFORMABLE])
def test_first_predictions(name):
    """Every class is as good as absent; DAB-DETR's boxes are its anchors."""
    model = build_small(name)[0].eval()
    anchors = model.refpoint_embed.weight.detach()
    assert anchors.mean().abs() < 0.7 and 0.6 < anchors.std() < 1.5             # a normal distribution
    for head in (model.class_embed if name == DEFORMABLE else [model.class_embed]):
        torch.testing.assert_close(head.bias.detach().sigmoid(), torch.full((NUM_CLASSES,), 0.01))
    with torch.no_grad():
        outputs = model(images((64, 64)))
    if name != DEFORMABLE:
        for layer in (outputs, *outputs["aux_outputs"]):
            torch.testing.assert_close(layer["pred_boxes"][0], anchors.sigmoid())
        slopes = [value for key, value in model.state_dict().items() if "activation" in key]
        assert len(slopes) == 4 and all(slope == 0.25 for slope in slopes)
    else:                       # as published: the first layer makes boxes smaller, which anchors do not ask for
        shift = torch.tensor([0.0, 0.0, -2.0, -2.0])
        torch.testing.assert_close(outputs["aux_outputs"][0]["pred_boxes"][0], (anchors + shift).sigmoid())
        torch.testing.assert_close(outputs["pred_boxes"][0], (anchors + shift).sigmoid())


# -- DAB-Deformable-DETR ----------------------------------------------------------------------------------------------

def defined_decoder(model, memory: Tensor, levels, ratios: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Logits and boxes of each layer for a batch of one, from the tensors of the state dict; only deformable attention is
    the model's own. ``ratios``: what boxes are scaled with before they are encoded, where not as published."""
    weights = dict(model.state_dict())
    content, anchors = weights["tgt_embed.weight"], weights["refpoint_embed.weight"]
    if "patterns_embed.weight" in weights:
        pairs = [(c + p, a) for p in weights["patterns_embed.weight"] for c, a in zip(content, anchors)]
        content, anchors = (torch.stack(x) for x in zip(*pairs))
    decoder, reference, layers = part(weights, "transformer.decoder."), anchors.sigmoid(), []
    valid = levels.valid_ratios[0]                                                              # [L, 2]
    for i, module in enumerate(model.transformer.decoder.layers):
        layer = part(decoder, f"layers.{i}.")
        of_levels = reference[:, None] * torch.cat([valid, valid], dim=-1)
        seen = of_levels[:, 0] if ratios is None else reference * ratios
        position = mlp(decoder, "ref_point_head", encoded(seen, content.shape[-1] // 2))
        if i:
            position = position * mlp(decoder, "query_scale", content)
        content = norm(layer, "norm2", content + self_attention(layer, "self_attn", content, position, 4))
        looked = module.cross_attn((content + position)[None], of_levels[None], memory, levels)[0]
        content = norm(layer, "norm1", content + looked)
        content = norm(layer, "norm3", content + feed_forward(layer, content))
        reference = (mlp(weights, f"bbox_embed.{i}", content) + logit(reference, 1e-3)).sigmoid()
        layers.append((linear(weights, f"class_embed.{i}", content), reference))
    return layers


@pytest.mark.parametrize("patterns", [0, 2])
@pytest.mark.parametrize("padding", ["legacy", "exact"])
@torch.no_grad()
def test_deformable_definition(patterns, padding):
    """On an image that is padded: as published, boxes are encoded as fractions of the padded map; with exact padding, of
    the image."""
    model = unlike_at_first(build_small(DEFORMABLE, padding=padding, num_patterns=patterns)[0])
    kept = []
    model.transformer.decoder.register_forward_hook(lambda module, args, out: kept.append(args))
    outputs = model(nested_tensor_from_tensor_list([image.double() for image in images(*SIZES)]))
    _, _, memory, levels, *_ = kept[0]
    assert (levels.valid_ratios < 1).any()
    for i in range(2):
        one = levels._replace(tokens=levels.tokens[i:i + 1], mask=levels.mask[i:i + 1], position=levels.position[i:i + 1],
                              valid_sizes=levels.valid_sizes[i:i + 1])
        defined = defined_decoder(model, memory[i:i + 1], one, torch.ones(4) if padding == "exact" else None)
        for (logits, boxes), layer in zip(defined, [*outputs["aux_outputs"], outputs], strict=True):
            torch.testing.assert_close(layer["pred_logits"][i], logits, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(layer["pred_boxes"][i], boxes, atol=5e-6, rtol=0)
    assert outputs["pred_logits"].shape[1] == 7 * max(patterns, 1) and outputs["pred_logits"].std(1).mean() > 1e-3


@torch.no_grad()
def test_positions_of_the_map_are_deformable_detrs():
    """DAB-Deformable counts from the centres of pixels with temperature 10000, DAB-DETR from their far edges with 20."""
    samples = nested_tensor_from_tensor_list(images((64, 128)))
    for name, offset, temperature in (("dab_detr_resnet50", 0.0, 20), (DEFORMABLE, -0.5, 10000)):
        model = build_small(name)[0]
        last = list(model.backbone[0](samples).values())[-1]
        position = model.backbone[1](last)
        half = position.shape[1] // 2
        for axis, length in ((0, 2), (1, 4)):
            place = 2 * math.pi * (length + offset) / length                                # of the last row or column
            channel = half * axis + 2
            expected = math.sin(place / temperature ** (2 / half))
            assert position[0, channel, -1, -1].item() == pytest.approx(expected, abs=1e-5)


def test_options_without_effect_are_refused():
    with pytest.raises(ValueError, match="the encoder alone uses positions"):
        build_small(DEFORMABLE, enc_layers=0, position_embedding="learned")
    for name, flag in (("conditional_detr_resnet50", "num_patterns"), (DEFORMABLE, "pe_temperature"),
                       ("dab_detr_resnet50", "two_stage")):
        with pytest.raises(ValueError, match=f"no option '{flag}'"):
            build_small(name, **{flag: 1})
