"""Detections from predictions: the published ones, and by definition."""
import pytest
import torch
from cases import check, load_case

from detr.postprocess import PostProcess


def test_published_detections():
    case = load_case("detr_postprocess")
    outputs = {name: case.expected[f"in.{name}"] for name in ("pred_logits", "pred_boxes")}
    detections = PostProcess()(outputs, case.expected["in.orig_size"])
    assert len(detections) == 2
    for i, detection in enumerate(detections):
        assert set(detection) == {"scores", "labels", "boxes"}
        for name, value in detection.items():
            check(case, f"{i}.{name}", value)


def outputs() -> dict[str, torch.Tensor]:
    return {"pred_logits": torch.tensor([[[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]]]),
            "pred_boxes": torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.0, 0.1, 0.5, 1.0]]])}


def test_by_definition():
    detection, = PostProcess()(outputs(), torch.tensor([[100, 200]]))           # height, width
    e = torch.tensor([1.0, 3, 2]).exp(), torch.tensor([0.0, -1, 5]).exp()
    torch.testing.assert_close(detection["scores"], torch.stack([e[0][1] / e[0].sum(), e[1][0] / e[1].sum()]))
    assert detection["labels"].tolist() == [1, 0]               # the best class, even where "no object" is better
    not_clipped = torch.tensor([[80.0, 30, 120, 70], [-50, -40, 50, 60]])
    torch.testing.assert_close(detection["boxes"], not_clipped)


def test_lower_precision_and_gradients():
    predicted = {name: x.bfloat16().requires_grad_() for name, x in outputs().items()}
    detection, = PostProcess()(predicted, torch.tensor([[480, 640]]))
    assert detection["boxes"].dtype == detection["scores"].dtype == torch.float32
    assert not detection["boxes"].requires_grad


@pytest.mark.parametrize("sizes", [torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2, 3]]), torch.tensor([100]),
                                   torch.tensor([480, 640]), torch.zeros(0, 2), torch.tensor(3)])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match=r"target_sizes is \[.*\]; it needs one \(height, width\) for each of the 1"):
        PostProcess()(outputs(), sizes)
