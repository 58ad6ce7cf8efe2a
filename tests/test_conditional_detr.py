"""Conditional DETR against the published model and against its definition."""
import dataclasses

import pytest
import torch
from cases import load_case, unchecked
from plain_transformers import conditional_detr, conditional_layer
from published import check_counts, check_layers
from small_models import NUM_CLASSES, build_small, compare_with, images, unlike_at_first
from torch import nn

from detr import build_model
from detr.decoder import ConditionalDecoderLayer, FirstConditionalDecoderLayer
from detr.presets import PRESETS

PUBLISHED = {"r50": "conditional_detr_resnet50", "r50_dc5": "conditional_detr_resnet50_dc5"}


# -- the published model ----------------------------------------------------------------------------------------------

def test_published_model():
    case = load_case("conditional_detr_r50")
    with torch.device("meta"):                                  # all values come from the case
        model = build_model("conditional_detr_resnet50", num_classes=91, **case.spec["args"])[0]
    assert model.state_dict().keys() == case.spec["shapes"].keys()
    model.load_state_dict(case.state_dict(), strict=True, assign=True)
    with torch.no_grad():
        outputs = model.eval()(case.images())
    check_layers(case, outputs)
    assert unchecked(case) == []


def test_published_parameter_counts():
    case = load_case("conditional_parameter_counts")
    for name, flags in case.spec["models"].items():
        with torch.device("meta"):
            models = [build_model("conditional_detr_resnet50", **flags)[0]]
            if name in PUBLISHED:
                models.append(build_model(PUBLISHED[name])[0])
        check_counts(case, name, *models)
    assert unchecked(case) == []


def test_published_recipe_and_losses():
    spec = load_case("conditional_detr_r50").spec["args"]
    for name in PUBLISHED.values():
        preset = PRESETS[name]
        for part in (preset.model, preset.train):
            for field in dataclasses.fields(part):
                if field.name in spec and field.name != "dilation":
                    assert getattr(part, field.name) == spec[field.name], field.name
        assert preset.data == type(preset.data)() and preset.num_classes == 91
    assert PRESETS["conditional_detr_resnet50_dc5"].model.dilation
    model, criterion, postprocessors = build_small("conditional_detr_resnet50")
    layers = {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}
    assert criterion.weight_dict == layers | {f"{name}_0": weight for name, weight in layers.items()}
    assert postprocessors["bbox"].k == 100
    groups = PRESETS["conditional_detr_resnet50"].model.parameter_groups(model, 1e-4)
    assert [group["lr"] for group in groups] == [1e-4, 1e-5]


def test_first_predictions():
    """Every class is as good as absent, and boxes lie around their reference points, with half the image's sides."""
    model = build_small("conditional_detr_resnet50")[0].eval()
    with torch.no_grad():
        model.class_embed.weight.zero_()
        outputs = model(images((64, 64)))
        points = model.transformer.decoder.ref_point_head(model.query_embed.weight).sigmoid()
    for layer in (outputs, *outputs["aux_outputs"]):
        torch.testing.assert_close(layer["pred_logits"].sigmoid(), torch.full((1, 7, NUM_CLASSES), 0.01))
        torch.testing.assert_close(layer["pred_boxes"][0], torch.cat([points, torch.full((7, 2), 0.5)], dim=-1))


# -- the definition ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PUBLISHED.values())
def test_definition(name):
    _, model = compare_with(conditional_detr, name)
    assert model.backbone[0].strides == [16 if "dc5" in name else 32]


@pytest.mark.parametrize("kind", [FirstConditionalDecoderLayer, ConditionalDecoderLayer])
@torch.no_grad()
def test_a_layer_with_queries_that_may_not_see_each_other(kind):
    torch.manual_seed(0)
    layer = unlike_at_first(kind(16, 2, 24, 0.1, nn.PReLU))
    content, position, place = torch.randn(3, 1, 6, 16).double()
    memory, where = torch.randn(2, 1, 20, 16).double()
    mask, forbidden = torch.arange(20)[None] >= 15, torch.rand(6, 6) < 0.5
    forbidden.fill_diagonal_(False)
    found = layer(content, position, place, memory, where, mask, forbidden)
    expected = conditional_layer(layer.state_dict(), content[0], position[0], place[0], memory[0, :15], where[0, :15], 2,
                                 forbidden)
    torch.testing.assert_close(found[0], expected, atol=1e-12, rtol=0)
    content[0, 3] += 1                                          # is seen by who may look at it
    changed = (layer(content, position, place, memory, where, mask, forbidden) != found).any(-1)[0]
    assert changed.tolist() == [i == 3 or not forbidden[i, 3] for i in range(6)]
