"""Ignore regions: a query that finds something in one learns nothing from it, with either class loss, in every layer and
as a proposal; without regions the losses are the published ones, to the last digit."""
import pytest
import torch
from test_set_criterion import criterion
from torch import Tensor

from datasets.transforms import Preprocessing, make_transforms
from detr import build_model
from detr.losses import FocalLabelLoss, SoftmaxLabelLoss, balanced_weights, ignored_queries
from detr.set_criterion import SetCriterion
from detr.structures import Divisors

C, EOS = 4, 0.1
TWO = Divisors(torch.tensor(2.0))
SOFTMAX, FOCAL = SoftmaxLabelLoss(C, EOS), FocalLabelLoss()
REGION = (0.5, 0.5, 0.4, 0.4)                                           # corners 0.3 to 0.7
BOXES = torch.tensor([
    [0.5, 0.5, 0.2, 0.2],               # 0: inside
    [0.3, 0.5, 0.2, 0.2],               # 1: half of it inside
    [0.29, 0.5, 0.2, 0.2],              # 2: a little less
    [0.9, 0.9, 0.1, 0.1],               # 3: elsewhere
    [0.5, 0.5, 0.9, 0.9],               # 4: around it: it has all of the region, but the region little of it
    [0.5, 0.5, 0.1, 0.1],               # 5: inside, but matched
    [0.5, 0.5, 0.0, 0.2],               # 6: without area
])
INSIDE = [True, True, False, False, False, False, False]
MATCH = [(torch.tensor([5]), torch.tensor([0])), (torch.tensor([3]), torch.tensor([0]))]

NOTHING = [(torch.tensor([], dtype=torch.int64),) * 2]


def outputs(classes: int, boxes: Tensor = BOXES) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"pred_logits": torch.randn(2, len(boxes), classes).requires_grad_(),
            "pred_boxes": boxes.repeat(2, 1, 1).requires_grad_()}


def targets(*regions: list) -> list[dict[str, Tensor]]:
    """Two images with an object each; the first one has these regions, the second one none."""
    image = {"labels": torch.tensor([2]), "boxes": torch.tensor([[0.51, 0.5, 0.22, 0.2]])}
    return [image | {"ignore": torch.tensor(regions).reshape(-1, 4)}, image | {"ignore": torch.zeros(0, 4)}]


def without(true: list[dict]) -> list[dict]:
    return [{name: x for name, x in target.items() if name != "ignore"} for target in true]


def test_who_is_ignored():
    found = ignored_queries(outputs(C), targets(REGION), MATCH)
    assert found.tolist() == [INSIDE, [False] * 7] and not found.requires_grad
    one_by_one = [(0.5, 0.4, 0.4, 0.19), (0.5, 0.6, 0.4, 0.19)]            # hold 45% each of boxes that one would hold
    assert not ignored_queries(outputs(C), targets(*one_by_one), MATCH)[0, 0]
    assert ignored_queries(outputs(C), targets((0.1, 0.1, 0.1, 0.1), REGION), MATCH)[0].tolist() == INSIDE
    mixed = [targets(REGION)[0], *without(targets())[1:]]                                  # one image has the field alone
    assert ignored_queries(outputs(C), mixed, MATCH).tolist() == [INSIDE, [False] * 7]


def test_pycocotools_excuses_the_same_boxes():
    """Its overlap with a crowd is the part of the detection that lies in it."""
    from pycocotools import mask
    torch.manual_seed(1)
    corners = torch.randint(0, 1000, (300, 2, 2)).sort(1).values.flatten(1).double()                    # x0, y0, x1, y1
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    crowds = torch.tensor([[100.0, 200, 500, 300], [700, 600, 250, 390]], dtype=torch.float64)
    expected = (mask.iou(boxes.numpy(), crowds.numpy(), [1, 1]) >= 0.5).any(1)
    as_model = [torch.cat([b[:, :2] + b[:, 2:] / 2, b[:, 2:]], 1) / 1000 for b in (boxes, crowds)]
    found = ignored_queries({"pred_boxes": as_model[0][None]}, [{"ignore": as_model[1]}], NOTHING)
    assert found[0].tolist() == expected.tolist() and 20 < expected.sum() < 280


@pytest.mark.parametrize("loss, classes", [(SOFTMAX, C + 1), (FOCAL, C)], ids=["softmax", "focal"])
def test_exactly_zero_gradient(loss, classes):
    predicted = outputs(classes)
    loss(predicted, targets(REGION), MATCH, TWO)["loss_ce"].backward()
    learns = (predicted["pred_logits"].grad != 0).any(-1)
    assert learns.tolist() == [[not inside for inside in INSIDE], [True] * 7]
    assert (predicted["pred_logits"].grad[0, :2] == 0).all() and predicted["pred_boxes"].grad is None


def test_softmax_by_its_definition():
    """Ignored queries are neither in the sum nor in the weights that it is divided by."""
    predicted, weights = outputs(C + 1), (0.5, 1.0, 3.0, 2.0)
    for loss, of_class in ((SOFTMAX, (1.0,) * C), (SoftmaxLabelLoss(C, EOS, weights), weights)):
        actual = loss(predicted, targets(REGION), MATCH, TWO)["loss_ce"]
        logs, total, divisor = predicted["pred_logits"].double().log_softmax(-1), 0.0, 0.0
        for b in range(2):
            for q in range(7):
                label = 2 if q == int(MATCH[b][0]) else C
                weight = 0.0 if b == 0 and INSIDE[q] else EOS if label == C else of_class[label]
                total, divisor = total - weight * logs[b, q, label], divisor + weight
        assert actual.item() == pytest.approx((total / divisor).item(), rel=1e-6)


def test_focal_by_its_definition():
    predicted = outputs(C)
    actual = FOCAL(predicted, targets(REGION), MATCH, TWO)["loss_ce"]
    p, total = predicted["pred_logits"].double().sigmoid(), 0.0
    for b in range(2):
        for q in range(7):
            for c in range(C):
                one = q == int(MATCH[b][0]) and c == 2
                value = -0.25 * (1 - p[b, q, c]) ** 2 * p[b, q, c].log() if one else \
                    -0.75 * p[b, q, c] ** 2 * (1 - p[b, q, c]).log()
                total = total + (0.0 if b == 0 and INSIDE[q] else value)
    assert actual.item() == pytest.approx((total / 2).item(), rel=1e-6)


@pytest.mark.parametrize("loss, classes", [(SOFTMAX, C + 1), (FOCAL, C)], ids=["softmax", "focal"])
def test_nothing_left_to_learn(loss, classes):
    """A crowd that fills every image, and no object."""
    predicted = outputs(classes, BOXES[:2])
    nothing = [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4),
                "ignore": torch.tensor([[0.5, 0.5, 1.0, 1.0]])}] * 2
    value = loss(predicted, nothing, NOTHING * 2, Divisors(torch.tensor(1.0)))["loss_ce"]
    value.backward()
    assert value == 0 and (predicted["pred_logits"].grad == 0).all()


@pytest.mark.parametrize("loss, classes", [(SOFTMAX, C + 1), (FOCAL, C)], ids=["softmax", "focal"])
def test_without_regions_the_published_loss_bit_for_bit(loss, classes):
    for true in (without(targets()), targets(), [targets()[0], *without(targets())[1:]]):
        first, second = outputs(classes), outputs(classes)
        assert ignored_queries(first, true, MATCH) is None
        a = loss(first, true, MATCH, TWO)["loss_ce"]
        b = loss(second, without(true), MATCH, TWO)["loss_ce"]
        assert torch.equal(a, b)
        assert torch.equal(*(torch.autograd.grad(x, y["pred_logits"])[0] for x, y in ((a, first), (b, second))))


def proposing(**flags) -> SetCriterion:
    with torch.device("meta"):
        return build_model("deformable_detr_resnet50_two_stage", num_classes=6, **flags)[1].train()


@pytest.mark.parametrize("two_stage", [False, True])
def test_every_layer_and_the_proposals(two_stage):
    """Of all that a criterion supervises; the matcher decides who is matched."""
    loss, classes = (proposing(), 6) if two_stage else (criterion(), 7)
    layers = [outputs(classes) for _ in range(3)]
    predicted = layers[0] | ({"aux_outputs": layers[1:2], "enc_outputs": layers[2]} if two_stage else
                             {"aux_outputs": layers[1:]})
    true = targets(REGION)
    values = loss(predicted, true)
    loss.weighted_sum(values).backward()
    for layer in layers:
        with_boxes = (layer["pred_boxes"].grad != 0).any(-1)                                    # the matched ones
        silent = (layer["pred_logits"].grad == 0).all(-1)
        inside = torch.tensor([INSIDE[:5] + [True, False], [False] * 7])
        assert with_boxes.sum() == 2 and torch.equal(silent, inside & ~with_boxes) and silent.sum() >= 2
    off = loss(predicted, without(true))
    assert (values.keys() == off.keys()) and all(torch.equal(values[n], off[n]) for n in off if "loss_ce" not in n)
    assert all(values[n] != off[n] for n in off if "loss_ce" in n)


def test_from_data_to_gradient():
    """A crowd in pixels, through the evaluation list, over a query's box."""
    from PIL import Image
    crowd = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "area": torch.zeros(0),
             "ignore": torch.tensor([[20.0, 10.0, 60.0, 40.0]])}
    _, target = make_transforms("val", Preprocessing(32, None))(Image.new("RGB", (100, 50)), crowd)
    torch.testing.assert_close(target["ignore"], torch.tensor([[0.4, 0.5, 0.4, 0.6]]))
    predicted = outputs(C + 1, torch.tensor([[0.4, 0.5, 0.1, 0.1], [0.8, 0.5, 0.1, 0.1]]))
    SOFTMAX(predicted, [target] * 2, NOTHING * 2, TWO)["loss_ce"].backward()
    assert (predicted["pred_logits"].grad != 0).any(-1).tolist() == [[False, True]] * 2


# Weights of classes.

def test_balanced_weights():
    counts = [1000, 10, 0, 90]
    weights = balanced_weights(counts)
    assert weights[1] / weights[0] == pytest.approx(10) and weights[1] / weights[3] == pytest.approx(3)
    assert sum(n * w for n, w in zip(counts, weights)) == pytest.approx(sum(counts)) and weights[2] == 1
    assert balanced_weights(torch.tensor([7, 7])) == pytest.approx([1, 1]) and balanced_weights([0, 0]) == [1, 1]
    with pytest.raises(ValueError, match="none below 0"):
        balanced_weights([3, -1])


def test_focal_loss_with_weights_of_classes():
    weights = (0.5, 1.0, 3.0, 2.0)
    plain, weighed = (loss(outputs(C), targets(REGION), MATCH, TWO)["loss_ce"]
                      for loss in (FOCAL, FocalLabelLoss(class_weights=weights)))
    alone = []
    for b in range(2):                                                  # the matched query of each image, by itself
        predicted, q = outputs(C), int(MATCH[b][0])
        one = {name: x[b:b + 1, q:q + 1] for name, x in predicted.items()}
        alone.append(FOCAL(one, targets()[b:b + 1], [(torch.tensor([0]),) * 2], TWO)["loss_ce"])
    assert (weighed - plain).item() == pytest.approx(2 * sum(alone).item(), rel=1e-5)               # 3 - 1


def test_weights_of_one_change_nothing():
    for plain, ones, classes in ((SOFTMAX, SoftmaxLabelLoss(C, EOS, [1.0] * C), C + 1),
                                 (FOCAL, FocalLabelLoss(class_weights=torch.ones(C)), C)):
        a, b = (loss(outputs(classes), without(targets()), MATCH, TWO) for loss in (plain, ones))
        assert torch.equal(a["loss_ce"], b["loss_ce"])


def test_a_criterion_passes_weights_on():
    """To the class loss of every layer; None takes them away again."""
    loss, weights = proposing(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    predicted = outputs(6) | {"aux_outputs": [outputs(6)], "enc_outputs": outputs(6)}
    plain = loss(predicted, targets())
    loss.weigh_classes(weights)
    weighed = loss(predicted, targets())
    loss.weigh_classes(None)
    assert {n for n in plain if not torch.equal(plain[n], weighed[n])} == {"loss_ce", "loss_ce_0", "loss_ce_enc"}
    assert all(torch.equal(plain[n], value) for n, value in loss(predicted, targets()).items())
    softmax = SetCriterion(loss.matcher, [SoftmaxLabelLoss(C, EOS)], {})
    with pytest.raises(ValueError, match="class_weights has 6 numbers for 4 classes"):
        softmax.weigh_classes(weights)
    with pytest.raises(ValueError, match="no loss of classes"):
        SetCriterion(loss.matcher, [], {}).weigh_classes(weights)


def test_proposals_without_classes_weigh_by_the_class_of_their_object():
    from detr.matcher import HungarianMatcher, focal_class_cost
    matcher = HungarianMatcher(2, 5, 2, focal_class_cost)
    values = []
    for weights in ((1.0, 1.0, 1.0, 1.0), (9.0, 1.0, 1.0, 1.0), (1.0, 1.0, 9.0, 1.0)):              # the objects are of 2
        loss = SetCriterion(matcher, [FocalLabelLoss(class_weights=weights)], {}, class_agnostic_proposals=True)
        values.append(loss(outputs(C) | {"enc_outputs": outputs(C)}, without(targets()))["loss_ce_enc"])
    assert values[0] == values[1] < values[2]


@pytest.mark.parametrize("weights, message", [
    ([1.0, 2.0], "class_weights has 2 numbers for 4 classes; give one for each label from 0 to 3"),
    ([1.0, 0.0, 1.0, 1.0], "a finite number above 0"), ([1.0, float("nan"), 1.0, 1.0], "a finite number above 0")])
def test_wrong_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxLabelLoss(C, EOS, weights)
    with pytest.raises(ValueError, match=message):
        FocalLabelLoss(class_weights=weights)(outputs(C), targets(), MATCH, TWO)
