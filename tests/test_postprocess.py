"""Detections and masks from predictions: the published ones, and by definition."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import check, load_case, unchecked
from pycocotools import mask as mask_api

from detr.postprocess import PostProcess, PostProcessSegm, PostProcessTopK


def test_published_detections_and_masks():
    case = load_case("detr_postprocess")
    outputs = {name: case.expected[f"in.{name}"] for name in ("pred_logits", "pred_boxes", "pred_masks")}
    sizes = case.expected["in.orig_size"]
    detections = PostProcess()(outputs, sizes)
    assert len(detections) == 2
    results = PostProcessSegm()(detections, outputs, sizes, case.expected["in.size"])
    for i, (detection, result, (height, width)) in enumerate(zip(detections, results, sizes.tolist())):
        assert set(detection) == {"scores", "labels", "boxes"} and set(result) == {*detection, "masks"}
        for name in detection:
            check(case, f"{i}.{name}", result[name])
        masks, allowed = result["masks"], height * width // 1000            # the case's tolerance: 0.1 % of the pixels
        assert masks.shape == (20, 1, height, width) and masks.dtype == torch.uint8
        assert ((masks.sum((1, 2, 3)) - case.expected[f"{i}.mask_area"]).abs() <= allowed).all()
        for query in (0, 4, 8, 12, 16):
            packed = case.expected[f"{i}.masks.{query}.packed"].numpy()
            expected = np.unpackbits(packed)[:height * width].reshape(height, width)
            assert (masks[query, 0].numpy() != expected).sum() <= allowed
            case.checked.add(f"{i}.masks.{query}.packed")
        case.checked.add(f"{i}.mask_area")
    assert unchecked(case) == []


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


# Masks.

SIZES, ORIGINALS = torch.tensor([[90, 77], [61, 100]]), torch.tensor([[45, 31], [133, 160]])


def mask_outputs(queries: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pred_logits": torch.randn(2, queries, 5, generator=generator),
            "pred_boxes": torch.rand(2, queries, 4, generator=generator),
            "pred_masks": 3 * torch.randn(2, queries, 23, 25, generator=generator)}


def at_once(masks: torch.Tensor, sizes: torch.Tensor, originals: torch.Tensor, threshold=0.5) -> list[torch.Tensor]:
    """The published way: all queries of all images at full size."""
    large = F.interpolate(masks, sizes.amax(0).tolist(), mode="bilinear", align_corners=False).sigmoid() > threshold
    return [F.interpolate(x[:, None, :h, :w].float(), original.tolist(), mode="nearest").byte()
            for x, (h, w), original in zip(large, sizes.tolist(), originals)]


def with_masks(outputs, sizes=SIZES, originals=ORIGINALS, **options) -> list:
    return PostProcessSegm(**options)(PostProcess()(outputs, originals), outputs, originals, sizes)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 50])
def test_masks_do_not_depend_on_the_chunk(chunk):
    """The same bits as all masks at once: each is interpolated with the same arithmetic."""
    outputs = mask_outputs()
    results = PostProcess()(outputs, ORIGINALS)
    found = PostProcessSegm(chunk=chunk)(results, outputs, ORIGINALS, SIZES)
    for result, one, expected in zip(results, found, at_once(outputs["pred_masks"], SIZES, ORIGINALS)):
        assert torch.equal(one["masks"], expected) and 0.3 < expected.float().mean() < 0.7
        assert "masks" not in result and all(one[name] is value for name, value in result.items())


@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.9, 0.0])
def test_masks_at_the_threshold(threshold):
    """Where a probability in float32 rounds to the threshold, the pixel is outside, as if probabilities were compared."""
    centre = torch.tensor([threshold]).logit().clamp(-100)
    near = torch.cat([centre + torch.linspace(-3e-7, 3e-7, 3000), centre * (1 + torch.linspace(-1e-6, 1e-6, 3000)),
                      torch.linspace(-3e-7, 3e-7, 600), torch.linspace(-120, 20, 600)])
    outputs = {**mask_outputs(1), "pred_masks": near.view(1, 1, 80, 90)}        # of the image's size: nothing is resized
    outputs = {name: x[:1] for name, x in outputs.items()}
    size = torch.tensor([[80, 90]])
    found = with_masks(outputs, size, size, threshold=threshold)[0]["masks"]
    expected = (near.sigmoid() > threshold).view(1, 1, 80, 90)
    assert torch.equal(found.bool(), expected) and expected.any() and not expected.all()
    if threshold == 0.5:
        assert (near.view(80, 90) > 0)[~expected[0, 0]].any()                   # a positive logit is not enough


def test_top_k_knows_its_queries():
    outputs = mask_outputs()
    for i, found in enumerate(PostProcessTopK(12)(outputs, ORIGINALS)):
        height, width = ORIGINALS[i].tolist()
        assert len(found["queries"].unique()) < 12                                                  # some more than once
        scores = outputs["pred_logits"][i].sigmoid()
        assert torch.equal(found["scores"], scores[found["queries"], found["labels"]])
        assert scores.flatten().sort(descending=True)[0][:12].tolist() == found["scores"].tolist()
        cx, cy, w, h = (outputs["pred_boxes"][i][found["queries"]] * torch.tensor([width, height] * 2)).unbind(1)
        torch.testing.assert_close(found["boxes"],
                                   torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=1))


@pytest.mark.parametrize("rle", [False, True])
def test_masks_of_some_queries(rle):
    outputs = mask_outputs()
    results = PostProcessTopK(12)(outputs, ORIGINALS)
    results[1] = {name: value[:0] for name, value in results[1].items()}                                # none are left
    first, second = PostProcessSegm(rle=rle)(results, outputs, ORIGINALS, SIZES)
    expected = at_once(outputs["pred_masks"], SIZES, ORIGINALS)[0][results[0]["queries"]]
    if rle:
        assert second["masks"] == [] and json.loads(json.dumps(first["masks"])) == first["masks"]
        decoded = mask_api.decode(first["masks"])                                                       # [H, W, n]
        assert np.array_equal(decoded.transpose(2, 0, 1), expected[:, 0].numpy())
    else:
        assert torch.equal(first["masks"], expected) and second["masks"].shape == (0, 1, 133, 160)


def test_images_of_one_pixel():
    masks = torch.tensor([[-1.0, 2.0, 0.5]]).view(1, 3, 1, 1)
    outputs = {"pred_logits": torch.zeros(1, 3, 2), "pred_boxes": torch.zeros(1, 3, 4), "pred_masks": masks}
    one = torch.ones(1, 2, dtype=torch.int64)
    assert with_masks(outputs, one, one)[0]["masks"].flatten().tolist() == [0, 1, 1]
    assert with_masks(outputs, one, 3 * one)[0]["masks"].flatten(1).sum(1).tolist() == [0, 9, 9]
    assert with_masks(outputs, 40 * one, one, rle=True)[0]["masks"][1]["size"] == [1, 1]


def test_no_images():
    outputs = {name: x[:0] for name, x in mask_outputs().items()}
    assert with_masks(outputs, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)) == []


def test_masks_of_lower_precision():
    outputs = mask_outputs()
    rounded = {**outputs, "pred_masks": outputs["pred_masks"].bfloat16().requires_grad_()}
    expected = at_once(outputs["pred_masks"].bfloat16().float(), SIZES, ORIGINALS)
    assert all(torch.equal(a["masks"], b) for a, b in zip(with_masks(rounded), expected))


def test_masks_without_padding():
    """With ``crop``, an image in a batch gets what it gets alone, whatever lies in the padding."""
    outputs, extents = mask_outputs(), [(23, 20), (16, 25)]
    in_batch = with_masks({**outputs, "mask_sizes": extents}, crop=True)
    uncropped = with_masks(outputs)
    for i, (height, width) in enumerate(extents):
        alone = {name: x[i:i + 1] for name, x in outputs.items()}
        alone["pred_masks"] = alone["pred_masks"][..., :height, :width]
        expected = at_once(alone["pred_masks"], SIZES[i:i + 1], ORIGINALS[i:i + 1])[0]
        assert torch.equal(in_batch[i]["masks"], expected)
        assert not torch.equal(uncropped[i]["masks"], expected)


@pytest.mark.parametrize("change, options, message", [
    ({"pred_masks": None}, {}, "outputs have no pred_masks; build the model with --masks"),
    ({}, {"crop": True}, "outputs have no mask_sizes, which crop=True needs"),
    ({}, {"threshold": 1.0}, "threshold is 1.0; a mask's threshold is a probability"),
    ({}, {"chunk": 0}, "chunk is 0; at least one"),
    ({"sizes": SIZES[:1]}, {}, r"max_target_sizes is \[1, 2\]; it needs one \(height, width\) for each of the 2 images"),
    ({"originals": ORIGINALS[0]}, {}, r"orig_target_sizes is \[2\]; it needs one"),
    ({"results": slice(1)}, {}, "results are of 1 images, pred_masks of 2"),
    ({"detections": slice(3)}, {}, r"results\[0\] has 3 detections and pred_masks 7 queries; say in results\[0\]"),
])
def test_masks_that_cannot_be_made(change, options, message):
    outputs = mask_outputs()
    results = [{name: value[change.get("detections", slice(None))] for name, value in one.items()}
               for one in PostProcess()(outputs, ORIGINALS)[change.get("results", slice(None))]]
    outputs = {name: x for name, x in outputs.items() if name not in change}
    with pytest.raises(ValueError, match=message):
        PostProcessSegm(**options)(results, outputs, change.get("originals", ORIGINALS), change.get("sizes", SIZES))
