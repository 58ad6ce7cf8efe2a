"""Matching: the best of all assignments, whatever else is in the batch; and what it refuses."""
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from definitions import giou
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr import matcher as matching
from detr.boxes import box_cxcywh_to_xyxy, generalized_box_iou
from detr.matcher import (
    HungarianMatcher,
    Problem,
    add_box_cost,
    assign,
    candidates,
    coordinates,
    focal_class_cost,
    softmax_class_cost,
)
from detr.structures import NonFiniteError

Q, C = 6, 4


def outputs(batch: int, queries: int = Q, logits: int = C + 1, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pred_logits": torch.randn(batch, queries, logits, generator=generator),
            "pred_boxes": torch.rand(batch, queries, 4, generator=generator) * 0.4 + 0.1}


def targets(*counts: int, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"labels": torch.randint(C, (n,), generator=generator),
             "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.1} for n in counts]


def pair_cost(logits: list[float], box: list[float], label: int, true: list[float], weights, focal: bool) -> float:
    """The cost of one pair, from the papers."""
    if focal:
        p = 1 / (1 + math.exp(-logits[label]))
        of_class = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p ** 2 * -math.log(1 - p)
    else:
        of_class = -math.exp(logits[label]) / sum(map(math.exp, logits))
    l1 = sum(abs(x - y) for x, y in zip(box, true))
    return weights[0] * of_class + weights[1] * l1 - weights[2] * giou(box, true)


@pytest.mark.parametrize("focal", [False, True])
@pytest.mark.parametrize("weights", [(1, 5, 2), (2, 0, 0), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("objects, queries", [(3, 6), (4, 4), (5, 3)])
@pytest.mark.filterwarnings("ignore:.*no query to match")
def test_no_assignment_is_cheaper(weights, focal, objects, queries):
    predicted, true = outputs(1, queries, C if focal else C + 1), targets(objects)
    matcher = HungarianMatcher(*weights, focal_class_cost if focal else softmax_class_cost)
    (query, obj), = matcher(predicted, true)
    cost = [[pair_cost(logits, box, label, box_t, weights, focal)
             for label, box_t in zip(true[0]["labels"].tolist(), true[0]["boxes"].tolist())]
            for logits, box in zip(predicted["pred_logits"][0].tolist(), predicted["pred_boxes"][0].tolist())]
    n = min(objects, queries)
    best = min(sum(cost[q][o] for q, o in zip(qs, os))
               for qs in itertools.combinations(range(queries), n) for os in itertools.permutations(range(objects), n))
    assert len(query) == len(obj) == n and len(set(query.tolist())) == len(set(obj.tolist())) == n
    assert query.tolist() == sorted(query.tolist()) and query.dtype == obj.dtype == torch.int64
    assert sum(cost[q][o] for q, o in zip(query.tolist(), obj.tolist())) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("focal", [False, True])
def test_class_costs(focal):
    predicted, true = outputs(2, logits=C), targets(3, 3)
    cost = (focal_class_cost if focal else softmax_class_cost)(predicted["pred_logits"],
                                                        torch.stack([target["labels"] for target in true]))
    expected = [[[pair_cost(logits, [0, 0, 1, 1], label, [0, 0, 1, 1], (1, 0, 0), focal)
                  for label in target["labels"].tolist()] for logits in image]
                for image, target in zip(predicted["pred_logits"].tolist(), true)]
    torch.testing.assert_close(cost, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for p, r in zip(a, b) for x, y in zip(p, r))


def test_a_batch_is_its_images():
    predicted, true, matcher = outputs(5), targets(3, 0, 6, 1, 2), HungarianMatcher(1, 5, 2)
    together = matcher(predicted, true)
    alone = [matcher({name: x[i:i + 1] for name, x in predicted.items()}, true[i:i + 1])[0] for i in range(5)]
    assert equal(together, alone)
    assert [len(query) for query, _ in together] == [3, 0, 6, 1, 2]


def test_every_query_matched():
    (query, obj), = HungarianMatcher(1, 5, 2)(outputs(1), targets(Q))
    assert query.tolist() == list(range(Q)) and sorted(obj.tolist()) == list(range(Q))


def test_exact_predictions_find_their_objects():
    true = targets(4)
    where = torch.tensor([5, 0, 3, 2])
    predicted = outputs(1)
    predicted["pred_boxes"][0, where] = true[0]["boxes"]
    predicted["pred_logits"][0, where, true[0]["labels"]] = 20.0
    (query, obj), = HungarianMatcher(1, 5, 2)(predicted, true)
    assert torch.equal(where[obj], query)


def test_the_order_of_objects_does_not_matter():
    predicted, true, matcher = outputs(1), targets(5), HungarianMatcher(1, 5, 2)
    order = torch.tensor([3, 1, 4, 0, 2])
    (query, obj), = matcher(predicted, true)
    (other_query, other), = matcher(predicted, [{name: x[order] for name, x in true[0].items()}])
    assert torch.equal(query, other_query) and torch.equal(order[other], obj)


@pytest.mark.parametrize("batch", [1, 3])
def test_no_objects_at_all(batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match = HungarianMatcher()(outputs(batch), targets(*[0] * batch))
    assert len(match) == batch
    for query, obj in match:
        assert query.shape == obj.shape == (0,) and query.dtype == obj.dtype == torch.int64


def test_more_objects_than_queries():
    with pytest.warns(UserWarning, match="^7 objects of this batch have no query to match: images have up to 11 "
                                         "objects and the model 6 queries; raise --num_queries$"):
        matcher = HungarianMatcher()
        match = matcher(outputs(3), targets(8, 2, 11))
    assert [len(query) for query, _ in match] == [6, 2, 6]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matcher(outputs(3), targets(8, 2, 11))                                                      # said once
    with pytest.warns(UserWarning, match="images have up to 12 objects"):                           # and if it gets worse
        matcher(outputs(3), targets(8, 2, 12))


def test_no_gradient_and_nothing_changed():
    predicted, true = outputs(2), targets(3, 2)
    predicted["pred_boxes"].requires_grad_()
    before = {name: x.detach().clone() for name, x in predicted.items()}, [dict(t) for t in true]
    HungarianMatcher()(predicted, true)
    assert all(torch.equal(predicted[name], x) for name, x in before[0].items())
    assert all(torch.equal(t[name], x) for t, old in zip(true, before[1]) for name, x in old.items())


def test_lower_precision_is_matched_in_float32():
    predicted, true = outputs(2), targets(3, 4)
    lower = {name: x.bfloat16() for name, x in predicted.items()}
    assert equal(HungarianMatcher()(lower, true), HungarianMatcher()({n: x.float() for n, x in lower.items()}, true))


@pytest.mark.parametrize("name, value, image", [("pred_logits", math.nan, 1), ("pred_logits", math.inf, 0),
                                                ("pred_boxes", math.nan, 2), ("pred_boxes", math.inf, 1)])
def test_predictions_that_are_not_numbers(name, value, image):
    predicted = outputs(3)
    predicted[name][image, 2] = value
    with pytest.raises(NonFiniteError, match=f"^not finite: {name} of image {image}$"):
        HungarianMatcher()(predicted, targets(3, 2, 0))         # the last image matches nothing, and is told of too


@pytest.mark.parametrize("name, value", [("pred_logits", math.nan), ("pred_boxes", math.nan), ("pred_boxes", -math.inf)])
def test_predictions_that_are_not_numbers_where_nothing_is_matched(name, value):
    predicted = outputs(2)
    predicted[name][1, 2, 0] = value
    with pytest.raises(NonFiniteError, match=f"^not finite: {name} of image 1$"):
        HungarianMatcher()(predicted, targets(0, 0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("focal", [False, True])
def test_logits_that_are_not_numbers_of_a_class_without_objects(focal, value):
    """The focal cost reads the classes of objects alone, and minus infinity is a probability of 0 to a softmax."""
    predicted, true = outputs(2, logits=C if focal else C + 1), targets(2, 1)
    for target in true:
        target["labels"].zero_()
    predicted["pred_logits"][0, 3, 2] = value
    with pytest.raises(NonFiniteError, match="^not finite: pred_logits of image 0$"):
        HungarianMatcher(class_cost=focal_class_cost if focal else softmax_class_cost)(predicted, true)


def test_a_cost_that_overflows():
    predicted = outputs(1)
    predicted["pred_boxes"][0, 0] = 3e38                                    # a number, and no distance to it is one
    with pytest.raises(NonFiniteError, match="^not finite: the matching cost$"):
        HungarianMatcher()(predicted, targets(2))


def test_ground_truth_that_is_no_number():
    true = targets(3, 2)
    true[1]["boxes"][0, 3] = math.nan
    with pytest.raises(NonFiniteError, match="^not finite: target boxes of image 1$"):
        HungarianMatcher()(outputs(2), true)


COSTS = {"softmax": softmax_class_cost, "focal": focal_class_cost}


@pytest.mark.parametrize("label, class_loss", [(C, "softmax"), (C + 1, "softmax"), (-1, "softmax"), (C + 1, "focal")])
def test_labels_out_of_range(label, class_loss):
    true, matcher = targets(3, 2), HungarianMatcher(class_cost=COSTS[class_loss])
    classes = C if class_loss == "softmax" else C + 1
    true[1]["labels"][0] = label
    rest = (f"has the labels \\[{label}\\], and the model's classes are 0 to {classes - 1}; "
            "build it with num_classes above the largest label")
    with pytest.raises(ValueError, match=f"^image 1 of the batch {rest}"):
        matcher(outputs(2), true)
    with pytest.raises(ValueError, match=f"^image_id 4711 {rest}"):
        matcher(outputs(2), [true[0], true[1] | {"image_id": torch.tensor([4711])}])
    true[1]["labels"][0] = classes - 1
    matcher(outputs(2), true)


def test_costs_that_weigh_nothing():
    with pytest.raises(ValueError, match="all matching costs are 0; give --set_cost_class, --set_cost_bbox or"):
        HungarianMatcher(0, 0, 0)


# -- many layers at once ----------------------------------------------------------------------------------------------

@pytest.fixture(params=["cpu", "device"])
def way(request, monkeypatch) -> str:
    """The way of CPUs, and that of other devices run on the CPU."""
    if request.param == "device":
        monkeypatch.setattr(matching, "on_cpu", lambda x: False)
    return request.param


def one_by_one(predicted: dict[str, Tensor], true: list[dict[str, Tensor]], weights, focal: bool) -> list:
    """Each image by itself: costs in float64, SciPy's assignment of ``[Q, N]``."""
    pairs = []
    for logits, boxes, target in zip(predicted["pred_logits"].double(), predicted["pred_boxes"].double(), true):
        p = logits.sigmoid() if focal else logits.softmax(-1)
        of_class = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p ** 2 * -(1 - p + 1e-8).log() if focal else -p
        l1 = torch.cdist(boxes, target["boxes"].double(), p=1)
        iou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target["boxes"].double()))
        cost = weights[0] * of_class[:, target["labels"]] + weights[1] * l1 - weights[2] * iou
        pairs.append(tuple(torch.as_tensor(x) for x in linear_sum_assignment(cost)))
    return pairs


@pytest.mark.parametrize("focal", [False, True])
@pytest.mark.parametrize("queries, counts", [(40, (12, 0, 40, 1)), (7, (7, 9, 0, 30)), (300, (100, 3))])
@pytest.mark.filterwarnings("ignore:.*no query to match")
def test_layers_are_matched_as_one_by_one(way, focal, queries, counts):
    layers, weights, true = 3, (2, 5, 2), targets(*counts)
    predicted = outputs(layers * len(counts), queries, C if focal else C + 1)
    matcher = HungarianMatcher(*weights, focal_class_cost if focal else softmax_class_cost)
    match = matcher(predicted, true * layers)
    assert equal(match, one_by_one(predicted, true * layers, weights, focal))
    assert all(x.dtype == torch.int64 and x.device.type == "cpu" for pair in match for x in pair)


@pytest.mark.parametrize("size", [1, 50, 10 ** 6])
@pytest.mark.parametrize("threads", [1, 3])
def test_how_much_is_computed_at_once_does_not_matter(way, size, threads, monkeypatch):
    predicted, true, matcher = outputs(6, 33), targets(11, 5), HungarianMatcher(1, 5, 2)
    expected = one_by_one(predicted, true * 3, (1, 5, 2), False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for name in ("IN_CACHE", "ON_DEVICE", "WAITING", "WORTH_THREADS"):
        monkeypatch.setattr(matching, name, size)
    assert equal(matcher(predicted, true * 3), expected)


def test_a_device_is_asked_once(monkeypatch):
    monkeypatch.setattr(matching, "on_cpu", lambda x: False)
    copies, copy = [], matching.on_host
    monkeypatch.setattr(matching, "on_host", lambda problems: copies.append(1) or copy(problems))
    monkeypatch.setattr(matching, "ON_DEVICE", 100)
    HungarianMatcher()(outputs(18), targets(3, 0, 5) * 6)
    assert copies == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("queries", [50, 400])
def test_a_gpu_is_waited_for_once(queries):
    predicted, true = outputs(6, queries), targets(30, 0, 4)
    expected = HungarianMatcher(1, 5, 2)(predicted, true * 2)
    predicted = {name: x.cuda() for name, x in predicted.items()}
    true = [{name: x.cuda() for name, x in target.items()} for target in true]
    HungarianMatcher(1, 5, 2)(predicted, true * 2)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            match = HungarianMatcher(1, 5, 2)(predicted, true * 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in said if "synchroniz" in str(warning.message)]) <= 1
    assert equal(match, expected)


def test_an_object_without_a_query_counts_once():
    with pytest.warns(UserWarning, match="^3 objects of this batch have no query"):
        HungarianMatcher()(outputs(6), targets(Q + 3, 2) * 3)


@pytest.mark.parametrize("wrong, message", [("logits", "pred_logits of image 2"), ("box", "target boxes of image 1"),
                                            ("far", "the matching cost"), ("label", "has the labels")])
def test_what_is_refused_on_a_device(wrong, message, monkeypatch):
    """Labels are looked at after the copy, and what is wrong with them is told first."""
    monkeypatch.setattr(matching, "on_cpu", lambda x: False)
    predicted, true = outputs(3), targets(3, 2, 0)
    if wrong == "logits":
        predicted["pred_logits"][2, 1, 3] = math.inf
    elif wrong == "box":
        true[1]["boxes"][0, 0] = math.nan
    elif wrong == "far":
        predicted["pred_boxes"][1, 5] = 3e38
    else:
        true[1]["labels"][1] = C + 7
        predicted["pred_logits"][0] = math.nan
    with pytest.raises(ValueError if wrong == "label" else NonFiniteError, match=message):
        HungarianMatcher()(predicted, true)


# -- costs of boxes ---------------------------------------------------------------------------------------------------

def cost_of_boxes(boxes: Tensor, true: Tensor, l1: float, giou: float) -> Tensor:
    cost = torch.zeros(len(true), len(boxes), dtype=boxes.dtype)[None]
    add_box_cost(cost, coordinates(boxes[None]), coordinates(true[None]), l1, giou, cost.new_empty(4, cost.numel()))
    return cost[0].mT


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_costs_of_boxes(dtype, tolerance):
    boxes, true = outputs(1, 20)["pred_boxes"][0].to(dtype), targets(9)[0]["boxes"].to(dtype)
    expected = torch.tensor([[5 * sum(abs(x - y) for x, y in zip(a, b)) - 2 * giou(a, b) for b in true.tolist()]
                             for a in boxes.tolist()], dtype=dtype)
    torch.testing.assert_close(cost_of_boxes(boxes, true, 5, 2), expected, atol=tolerance, rtol=0)


def test_costs_of_boxes_without_area():
    boxes = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.2, 0.0], [0.5, 0.5, 0.0, 0.2], [0.7, 0.5, 0.1, 0.0],
                          [0.5, 0.5, 0.2, 0.2], [1.0, 1.0, 1.0, 1.0], [0.3, 0.3, 1e-4, 1e-4]], dtype=torch.float64)
    expected = -generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(boxes))
    torch.testing.assert_close(cost_of_boxes(boxes, boxes, 0, 1), expected, atol=1e-9, rtol=0)


# -- ties, and the cheapest queries alone -----------------------------------------------------------------------------

def steps(logits: Tensor, labels: Tensor) -> Tensor:
    """A class cost of three values, so that most assignments have equals."""
    return logits.gather(2, labels[:, None].expand(-1, logits.shape[1], -1)).round().clamp(-1, 1)


@pytest.mark.parametrize("queries, objects", [(20, 7), (8, 8), (5, 9)])
@pytest.mark.filterwarnings("ignore:.*no query to match")
def test_of_equals_scipy_takes_one(way, queries, objects):
    for seed in range(10):
        predicted, true = outputs(1, queries, seed=seed), targets(objects, seed=seed)
        cost = steps(predicted["pred_logits"], true[0]["labels"][None])[0]
        expected = [tuple(torch.as_tensor(x) for x in linear_sum_assignment(cost))]
        assert equal(HungarianMatcher(1, 0, 0, steps)(predicted, true), expected)


@pytest.mark.parametrize("values", [3, 30, 10 ** 9])
@pytest.mark.parametrize("objects, queries", [(1, 9), (4, 4), (6, 60), (12, 200)])
def test_the_cheapest_queries_are_enough(objects, queries, values):
    """Whatever the costs, crowds that all want the same few queries among them."""
    generator = np.random.default_rng(objects * values)
    for crowd in (0, 0.5, 3):
        wanted = generator.integers(0, 10, queries) * crowd
        cost = torch.as_tensor(generator.integers(0, values, (objects, queries)) / values + wanted, dtype=torch.float32)
        kept, which = candidates(cost[None])
        query, obj = assign(Problem(kept[0], which[0]))
        best = cost.mT.numpy()[linear_sum_assignment(cost.mT.numpy())].astype(float).sum()
        assert sorted(obj.tolist()) == list(range(objects)) and query.tolist() == sorted(set(query.tolist()))
        assert cost.numpy()[obj, query].astype(float).sum() == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("objects", [(3, 0, 20), (1, 1, 2)])
def test_proposals(way, objects, monkeypatch):
    """Of so many queries that only the cheapest are looked at."""
    looked, cheapest = [], matching.candidates
    monkeypatch.setattr(matching, "candidates", lambda cost: looked.append(1) or cheapest(cost))
    predicted, true = outputs(3, 3000, C), [target | {"labels": 0 * target["labels"]} for target in targets(*objects)]
    match = HungarianMatcher(2, 5, 2, focal_class_cost)(predicted, true)
    assert looked and equal(match, one_by_one(predicted, true, (2, 5, 2), True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_proposals_that_are_not_numbers(way, value):
    """A cost that is none is not among the cheapest, and is seen all the same."""
    predicted, true = outputs(2, 3000, C), targets(2, 3)
    predicted["pred_boxes"][1, 2999, 0] = value
    with pytest.raises(NonFiniteError, match="^not finite: pred_boxes of image 1$"):
        HungarianMatcher(class_cost=focal_class_cost)(predicted, true)
    predicted["pred_boxes"][1, 2999] = 3e38
    with pytest.raises(NonFiniteError, match="^not finite: the matching cost$"):
        HungarianMatcher(class_cost=focal_class_cost)(predicted, true)
