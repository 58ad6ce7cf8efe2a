"""The names that PyTorch Hub users know."""
import pytest
import torch
from conftest import ROOT

NAMES = ["detr_resnet50", "detr_resnet50_dc5", "detr_resnet101", "detr_resnet101_dc5", "detr_resnet50_panoptic",
         "detr_resnet50_dc5_panoptic", "detr_resnet101_panoptic"]


@pytest.mark.parametrize("name", NAMES)
def test_entry(name):
    with torch.device("meta"):
        model = torch.hub.load(str(ROOT), name, source="local")
    head = getattr(model, "detr", model).class_embed
    assert head.out_features == (251 if "panoptic" in name else 92)


def test_panoptic_postprocessing():
    """Of COCO's labels, things end at 90."""
    with torch.device("meta"):
        _, postprocessor = torch.hub.load(str(ROOT), "detr_resnet50_panoptic", source="local", return_postprocessor=True)
    logits = torch.full((1, 2, 251), -20.0)
    logits[0, 0, 17], logits[0, 1, 190] = 20.0, 20.0
    masks = torch.full((1, 2, 8, 8), -10.0)
    masks[0, 0, :4], masks[0, 1, 4:] = 10.0, 10.0
    outputs = {"pred_logits": logits, "pred_masks": masks, "pred_boxes": torch.rand(1, 2, 4)}
    found, = postprocessor(outputs, torch.tensor([[32, 32]]))
    assert [(row["category_id"], row["isthing"]) for row in found["segments_info"]] == [(17, True), (190, False)]


def test_postprocessor_and_classes():
    with torch.device("meta"):
        model, postprocessor = torch.hub.load(str(ROOT), "detr_resnet50", source="local", num_classes=3,
                                              return_postprocessor=True)
    assert model.class_embed.out_features == 4
    outputs = {"pred_logits": torch.zeros(1, 2, 4), "pred_boxes": torch.full((1, 2, 4), 0.5)}
    assert postprocessor(outputs, torch.tensor([[10, 20]]))[0]["boxes"].tolist()[0] == [5.0, 2.5, 15.0, 7.5]
