"""Panoptic maps: the published ones, the published procedure in float64, and cases one can count."""
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import load_case, unchecked
from PIL import Image

from detr.panoptic import PostProcessPanoptic

THINGS = {label: label < 4 for label in range(8)}


def read(prediction) -> torch.Tensor:
    """The ids of a map."""
    picture = Image.open(io.BytesIO(prediction["png_string"]))
    assert picture.mode == "RGB" and picture.format == "PNG"
    return torch.from_numpy(np.asarray(picture).astype(np.int64) @ [1, 256, 256 ** 2])


def class_logits(labels: list[int], classes: int = 8, sure: float = 20.0) -> torch.Tensor:
    """Softmax logits ``[1, Q, C + 1]`` that are sure of ``labels``; -1 stands for "no object"."""
    logits = torch.zeros(1, len(labels), classes + 1)
    logits[0, range(len(labels)), labels] = sure
    return logits


def one_image(labels: list[int], masks: torch.Tensor, **options) -> tuple[torch.Tensor, list[dict]]:
    """Map and segments of an image as large as its ``masks [Q, H, W]``."""
    outputs = {"pred_logits": class_logits(labels), "pred_masks": masks[None]}
    prediction, = PostProcessPanoptic(THINGS, **options)(outputs, [tuple(masks.shape[1:])])
    return read(prediction), prediction["segments_info"]


def by_definition(logits, masks, size, target, threshold=0.85) -> tuple[torch.Tensor, list[tuple]]:
    """The published procedure for one image, with probabilities in float64: ids, and (label, area) of each segment."""
    scores, labels = logits.softmax(-1).max(-1)
    keep = [q for q in range(len(labels)) if labels[q] < logits.shape[-1] - 1 and scores[q] > threshold]
    labels = labels[keep].tolist()
    planes = F.interpolate(masks[None, keep], size, mode="bilinear", align_corners=False)[0] if keep else masks[:0]
    merge = True
    while True:
        ids = planes.double().softmax(0).argmax(0) if labels else torch.zeros(size, dtype=torch.int64)
        for i, label in enumerate(labels):
            if merge and not THINGS[label]:
                ids[ids == i] = labels.index(label)
        picture = Image.fromarray(ids.numpy().astype(np.int32)).resize(target[::-1], Image.Resampling.NEAREST)
        ids = torch.from_numpy(np.array(picture)).long()
        areas = [int((ids == i).sum()) for i in range(len(labels))]
        left = [i for i, area in enumerate(areas) if area > 4]
        if len(left) == len(labels):
            return ids, list(zip(labels, areas))
        labels, planes, merge = [labels[i] for i in left], planes[left], False


def test_published_maps():
    case = load_case("detr_postprocess_panoptic")
    outputs = {name: case.expected[f"in.{name}"] for name in ("pred_logits", "pred_masks", "pred_boxes")}
    postprocess = PostProcessPanoptic({i: i <= 90 for i in range(250)}, case.spec["inputs"]["threshold"])
    sizes, originals = case.expected["in.size"], case.expected["in.orig_size"]
    for prefix, predictions in (("", postprocess(outputs, sizes, originals)), ("default.", postprocess(outputs, sizes))):
        for i, prediction in enumerate(predictions):
            expected, ids, segments = case.expected[f"{prefix}{i}.ids"], read(prediction), prediction["segments_info"]
            assert ids.shape == expected.shape
            assert (ids != expected).float().mean() <= 0.002                    # the case's tolerance
            for name in ("id", "category_id", "isthing"):
                assert [row[name] for row in segments] == case.expected[f"{prefix}{i}.segments.{name}"].tolist()
            areas = case.expected[f"{prefix}{i}.segments.area"]
            assert [row["area"] for row in segments] == pytest.approx(areas.tolist(), abs=0.002 * ids.numel())
            assert [row["area"] for row in segments] == [int((ids == row["id"]).sum()) for row in segments]
            case.checked |= {f"{prefix}{i}.ids", *(f"{prefix}{i}.segments.{name}"
                                                   for name in ("id", "category_id", "isthing", "area"))}
    assert unchecked(case) == []


@pytest.mark.parametrize("seed", range(12))
def test_random_maps_by_definition(seed):
    """Bit-equal: logits order pixels as their softmax does where it has the digits to tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(2, 30, 9, generator=generator)                     # some below the threshold, some no object
    coarse = torch.randn(2, 30, 4, 5, generator=generator)
    masks = F.interpolate(coarse, (21, 28), mode="bicubic") + torch.linspace(-1, 1, 30)[:, None, None]    # some nowhere
    sizes, targets = [(84, 112), (96, 70)], [(120, 143), (40, 55)]
    predictions = PostProcessPanoptic(THINGS)({"pred_logits": logits, "pred_masks": masks}, sizes,
                                              torch.tensor(targets))
    for i, prediction in enumerate(predictions):
        ids, segments = by_definition(logits[i], masks[i], sizes[i], targets[i])
        assert torch.equal(read(prediction), ids)
        assert [(row["category_id"], row["area"]) for row in prediction["segments_info"]] == segments
        assert [row["id"] for row in prediction["segments_info"]] == list(range(len(segments)))
        assert all(row["isthing"] is THINGS[row["category_id"]] for row in prediction["segments_info"])
        assert len(segments) > 2


def test_random_maps_are_not_simple():
    """The procedure above meets what it is for: queries that vanish, and pixels that are given anew."""
    generator = torch.Generator().manual_seed(0)
    masks = F.interpolate(torch.randn(1, 30, 4, 5, generator=generator), (21, 28), mode="bicubic")[0]
    masks = masks + torch.linspace(-1, 1, 30)[:, None, None]
    labels = [q % 8 for q in range(30)]
    ids, segments = one_image(labels, masks)
    kept = [row["category_id"] for row in segments]
    assert len(kept) < 20 and len({label for label in kept if label >= 4}) == len([x for x in kept if x >= 4])
    assert len([label for label in kept if label < 4]) > 4                      # things of one class stay apart


def test_stuff_of_one_class():
    """The first takes all pixels of its class, the others are dropped, and their pixels are given anew."""
    columns = torch.full((4, 6, 12), -5.0)
    for q in range(4):
        columns[q, :, 3 * q:3 * q + 3] = 5                                      # query q has columns 3q to 3q + 2
    columns[3, :, 3:9] = 0                                                      # after 1 and 2, query 3 is next there
    ids, segments = one_image([5, 5, 5, 0], columns)
    assert [(row["id"], row["category_id"], row["isthing"], row["area"]) for row in segments] == [
        (0, 5, False, 18), (1, 0, True, 54)]
    assert (ids[:, :3] == 0).all() and (ids[:, 3:] == 1).all()
    ids, segments = one_image([1, 1, 1, 0], columns)                            # things stay apart
    assert [row["area"] for row in segments] == [18] * 4
    ids, segments = one_image([5, 5, 5, 5], columns)                            # nothing but duplicates
    assert [row["area"] for row in segments] == [72] and (ids == 0).all()


def test_small_segments():
    masks = torch.zeros(3, 6, 6)
    masks[1, 0, :4] = 1                                                         # 4 pixels: too few
    masks[2, 2, :5] = 1                                                         # 5: enough
    ids, segments = one_image([0, 1, 2], masks)
    assert [(row["category_id"], row["area"]) for row in segments] == [(0, 31), (2, 5)]
    assert ids.unique().tolist() == [0, 1] and (ids[2, :5] == 1).all()


@pytest.mark.parametrize("labels, shape", [([-1, -1], (6, 6)), ([], (6, 6)), ([0, 1], (1, 1)), ([5], (2, 2))])
def test_maps_without_segments(labels, shape):
    """No query is sure of a class, there is none, or the image has no room for five pixels."""
    ids, segments = one_image(labels, torch.zeros(len(labels), *shape))
    assert segments == [] and ids.shape == shape and (ids == 0).all()


def test_an_image_of_one_pixel_drawn_large():
    prediction, = PostProcessPanoptic(THINGS)({"pred_logits": class_logits([3, 6]),
                                               "pred_masks": torch.tensor([[[[1.0]], [[2.0]]]])}, [(1, 1)], [(3, 2)])
    assert prediction["segments_info"] == [{"id": 0, "isthing": False, "category_id": 6, "area": 6}]
    assert read(prediction).shape == (3, 2)


def test_unsure_queries_are_left_out():
    masks = torch.zeros(2, 4, 4)
    masks[0] = 1
    outputs = {"pred_logits": class_logits([0, 1]), "pred_masks": masks[None]}
    outputs["pred_logits"][0, 0, 0] = 3                                         # e^3 / (e^3 + 8) = 0.715
    for threshold, label in ((0.85, 1), (0.72, 1), (0.71, 0)):
        prediction, = PostProcessPanoptic(THINGS, threshold)(outputs, [(4, 4)])
        assert [row["category_id"] for row in prediction["segments_info"]] == [label]


def test_more_segments_than_a_byte_counts():
    masks = torch.eye(300)[:, None].expand(-1, 5, -1)                           # one column a query, of five pixels
    ids, segments = one_image([q % 4 for q in range(300)], masks)
    assert torch.equal(ids, torch.arange(300).expand(5, -1)) and [row["area"] for row in segments] == [5] * 300


def test_classes_scored_by_themselves():
    masks = torch.zeros(3, 4, 6)
    for q in range(3):
        masks[q, :, 2 * q:2 * q + 2] = 1
    logits = torch.full((1, 3, 8), -3.0)
    logits[0, 0, 2], logits[0, 1, 7], logits[0, 2, 5] = 0.5, 0.6, -0.5          # sigmoids 0.62, 0.65, 0.38
    outputs = {"pred_logits": logits, "pred_masks": masks[None]}
    prediction, = PostProcessPanoptic(THINGS, 0.4, sigmoid=True)(outputs, [(4, 6)])
    assert [(row["id"], row["category_id"], row["area"]) for row in prediction["segments_info"]] == [(1, 2, 8), (2, 7, 8)]
    assert (read(prediction) == torch.tensor([1, 1, 2, 2, 0, 0])).all()         # the last class is a class, the rest void


def test_pixels_that_no_mask_claims_are_void_where_classes_are_scored_by_themselves():
    generator = torch.Generator().manual_seed(3)
    masks = torch.randn(4, 12, 14, generator=generator)
    logits = torch.full((1, 4, 8), -6.0)
    logits[0, range(4), [0, 1, 2, 3]] = 2.0                                     # things, each its own segment
    prediction, = PostProcessPanoptic(THINGS, 0.4, sigmoid=True)({"pred_logits": logits, "pred_masks": masks[None]},
                                                                 [(12, 14)])
    expected = torch.where(masks.double().amax(0) > 0, masks.double().argmax(0) + 1, 0)
    assert ((read(prediction) == 0) == (expected == 0)).all() and (expected == 0).any()
    nothing, = PostProcessPanoptic(THINGS, 0.4, sigmoid=True)({"pred_logits": logits, "pred_masks": -masks.abs()[None]},
                                                              [(12, 14)])
    assert nothing["segments_info"] == [] and not read(nothing).any()


def test_maps_without_padding():
    """With ``crop``, an image in a batch gets what it gets alone, whatever lies in the padding."""
    generator = torch.Generator().manual_seed(0)
    outputs = {"pred_logits": class_logits([0, 1, 5, 6]).expand(2, -1, -1),
               "pred_masks": torch.randn(2, 4, 20, 24, generator=generator)}
    sizes, targets, extents = [(80, 70), (61, 96)], [(50, 50), (61, 96)], [(20, 18), (16, 24)]
    in_batch = PostProcessPanoptic(THINGS, crop=True)({**outputs, "mask_sizes": extents}, sizes, targets)
    uncropped = PostProcessPanoptic(THINGS)(outputs, sizes, targets)
    for i, (height, width) in enumerate(extents):
        ids, segments = by_definition(outputs["pred_logits"][i], outputs["pred_masks"][i, :, :height, :width], sizes[i],
                                      targets[i])
        assert torch.equal(read(in_batch[i]), ids) and not torch.equal(read(uncropped[i]), ids)
        assert [(row["category_id"], row["area"]) for row in in_batch[i]["segments_info"]] == segments


def test_the_batch_and_the_order_of_queries_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    labels = [0, 1, 2, 4, 5, 3]
    outputs = {"pred_logits": class_logits(labels).expand(3, -1, -1),
               "pred_masks": torch.randn(3, 6, 9, 9, generator=generator)}
    sizes = [(36, 36), (30, 33), (20, 36)]
    postprocess, order = PostProcessPanoptic(THINGS), [3, 5, 0, 4, 2, 1]
    together = postprocess(outputs, sizes)
    shuffled = postprocess({name: x[:, order] for name, x in outputs.items()}, sizes)
    for i in range(3):
        assert postprocess({name: x[i:i + 1] for name, x in outputs.items()}, sizes[i:i + 1]) == [together[i]]
        assert torch.equal(torch.tensor(order)[read(shuffled[i])], read(together[i]))


def test_lower_precision():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(1, 3, 9, 9, generator=generator).bfloat16().requires_grad_()
    logits = class_logits([0, 1, 5])
    postprocess = PostProcessPanoptic(THINGS)
    assert postprocess({"pred_logits": logits.bfloat16(), "pred_masks": masks}, [(36, 36)]) == \
        postprocess({"pred_logits": logits, "pred_masks": masks.detach().float()}, [(36, 36)])


@pytest.mark.parametrize("options, change, sizes, message", [
    ({}, {"pred_masks": None}, [(4, 4)], "outputs have no pred_masks; build the model with --masks"),
    ({"crop": True}, {}, [(4, 4)], "outputs have no mask_sizes, which crop=True needs"),
    ({}, {}, [(4, 4), (4, 4)], r"processed_sizes has the entries \[\(4, 4\), \(4, 4\)\]; it needs one"),
    ({}, {}, torch.tensor([[1, 2, 3]]), r"processed_sizes has the entries \[\(1, 2, 3\)\]"),
    ({}, {"pred_logits": class_logits([9], 10)}, [(4, 4)], "label 9 was predicted and is not among the 8 labels"),
])
def test_maps_that_cannot_be_made(options, change, sizes, message):
    outputs = {"pred_logits": class_logits([0]), "pred_masks": torch.zeros(1, 1, 4, 4), **change}
    outputs = {name: x for name, x in outputs.items() if x is not None}
    with pytest.raises(ValueError, match=message):
        PostProcessPanoptic(THINGS, **options)(outputs, sizes)
