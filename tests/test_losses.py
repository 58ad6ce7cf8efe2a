"""Losses against their definitions, written out pair by pair in float64."""
import math

import pytest
import torch
import torch.nn.functional as F
from definitions import giou
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detr.losses import (
    SoftmaxLabelLoss,
    box_loss,
    cardinality_error,
    class_error,
    mask_loss,
    matched_queries,
    matched_targets,
    pad_masks,
    sigmoid_focal_loss,
)
from detr.structures import Divisors

B, Q, C, EOS = 3, 5, 4, 0.1
MATCH = [(torch.tensor([0, 3]), torch.tensor([1, 0])), (torch.tensor([], dtype=torch.int64),) * 2,
         (torch.tensor([1, 2, 4]), torch.tensor([2, 0, 1]))]
PAIRS = [(b, q, o) for b, (qs, os) in enumerate(MATCH) for q, o in zip(qs.tolist(), os.tolist())]
NUM_BOXES = Divisors(torch.tensor(5.0))
NOTHING = [(torch.tensor([], dtype=torch.int64),) * 2] * B


def outputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"pred_logits": (2 * torch.randn(B, Q, C + 1)).to(dtype).requires_grad_(),
            "pred_boxes": (torch.rand(B, Q, 4) * 0.5 + 0.1).to(dtype).requires_grad_(),
            "pred_masks": (3 * torch.randn(B, Q, 4, 6)).to(dtype).requires_grad_()}


def targets(counts=(2, 0, 3)) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"labels": torch.randint(C, (n,)), "boxes": torch.rand(n, 4) * 0.5 + 0.1,
             "masks": torch.rand(n, h, w) > 0.6}
            for n, (h, w) in zip(counts, ((9, 12), (11, 5), (8, 14)))]


def test_labels():
    predicted, true = outputs(), targets()
    with torch.no_grad():
        predicted["pred_logits"][0, 0, true[0]["labels"][1]] = 5.0              # one that is right
    actual = SoftmaxLabelLoss(C, EOS)(predicted, true, MATCH, NUM_BOXES)
    loss = weights = 0.0
    wrong = 0
    of_query = {(b, q): int(true[b]["labels"][o]) for b, q, o in PAIRS}
    for b in range(B):
        for q in range(Q):
            logits = predicted["pred_logits"][b, q].tolist()
            label = of_query.get((b, q), C)
            weight = EOS if label == C else 1.0
            loss += weight * (math.log(sum(map(math.exp, logits))) - logits[label])
            weights += weight
            wrong += (b, q) in of_query and logits.index(max(logits)) != label
    assert actual["loss_ce"].item() == pytest.approx(loss / weights, rel=1e-6)
    assert 0 < wrong < len(PAIRS)
    assert actual["class_error"].item() == pytest.approx(100 * wrong / len(PAIRS), rel=1e-6)


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_boxes(dtype, rel):
    predicted, true = outputs(dtype), targets()
    actual = box_loss(predicted, true, MATCH, NUM_BOXES)
    pairs = [(predicted["pred_boxes"][b, q].tolist(), true[b]["boxes"][o].tolist()) for b, q, o in PAIRS]
    l1 = sum(abs(x - y) for p, t in pairs for x, y in zip(p, t)) / 5
    assert actual["loss_bbox"].item() == pytest.approx(l1, rel=rel)
    assert actual["loss_giou"].item() == pytest.approx(sum(1 - giou(p, t) for p, t in pairs) / 5, rel=rel)
    (actual["loss_bbox"] + actual["loss_giou"]).backward()
    touched = predicted["pred_boxes"].grad.abs().sum(-1) > 0
    assert {(b, q) for b, q in touched.nonzero().tolist()} == {(b, q) for b, q, _ in PAIRS}     # matched ones alone


def test_boxes_without_area():
    boxes = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.3, 0.0], [0.2, 0.2, 0.0, 0.4], [0.0, 0.0, 0.0, 0.0]])
    predicted = {"pred_boxes": boxes[None].clone().requires_grad_()}
    for true in (boxes, boxes.flip(0)):
        match = [(torch.arange(4), torch.arange(4))]
        losses = box_loss(predicted, [{"boxes": true}], match, Divisors(torch.tensor(4.0)))
        predicted["pred_boxes"].grad = None
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values()) and 0 <= losses["loss_giou"] <= 2
        assert predicted["pred_boxes"].grad.isfinite().all()


def test_masks():
    predicted, true = outputs(torch.float64), targets()
    actual = mask_loss(predicted, true, MATCH, NUM_BOXES)
    focal = dice = 0.0
    for b, q, o in PAIRS:
        full = F.interpolate(predicted["pred_masks"][b, q][None, None], size=(11, 14), mode="bilinear")[0, 0]
        t = torch.zeros(11, 14, dtype=torch.float64)            # the largest height and width, of different images
        t[:true[b]["masks"].shape[1], :true[b]["masks"].shape[2]] = true[b]["masks"][o].double()
        p = 1 / (1 + (-full).exp())
        one, zero = -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p ** 2 * (1 - p).log()
        focal += (t * one + (1 - t) * zero).mean()
        dice += 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    torch.testing.assert_close(actual["loss_mask"], focal / 5)
    torch.testing.assert_close(actual["loss_dice"], dice / 5)


def test_layers_without_masks_have_no_mask_loss():
    assert mask_loss({"pred_boxes": torch.zeros(B, Q, 4)}, targets(), MATCH, NUM_BOXES) == {}


def test_focal_loss():
    logits = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64).requires_grad_()
    p = logits.sigmoid()
    for target, expected in ((1.0, -0.3 * (1 - p) ** 3 * p.log()), (0.0, -0.7 * p ** 3 * (1 - p).log())):
        torch.testing.assert_close(sigmoid_focal_loss(logits, torch.full_like(logits, target), 0.3, 3.0), expected)
    extreme = torch.tensor([-100.0, 100.0], requires_grad=True)
    for target in (0.0, 1.0):
        loss = sigmoid_focal_loss(extreme, torch.full((2,), target))
        assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), extreme)[0].isfinite().all()


def test_cardinality():
    predicted, true = outputs(), targets()
    actual = cardinality_error(predicted, true, MATCH, NUM_BOXES)["cardinality_error"]
    seen = [sum(logits.index(max(logits)) != C for logits in image) for image in predicted["pred_logits"].tolist()]
    assert actual.item() == pytest.approx(sum(abs(s - n) for s, n in zip(seen, (2, 0, 3))) / 3)
    assert actual > 0 and not actual.requires_grad


def test_nothing_matched():
    predicted, true = outputs(), targets((0, 0, 0))
    one = Divisors(torch.tensor(1.0))
    labels = SoftmaxLabelLoss(C, EOS)(predicted, true, NOTHING, one)
    rest = box_loss(predicted, true, NOTHING, one) | mask_loss(predicted, true, NOTHING, one)
    torch.testing.assert_close(labels["loss_ce"], -predicted["pred_logits"].log_softmax(-1)[..., C].mean())
    assert labels["class_error"] == 100
    assert {name: loss.item() for name, loss in rest.items()} == dict.fromkeys(
        ("loss_bbox", "loss_giou", "loss_mask", "loss_dice"), 0)
    (labels["loss_ce"] + sum(rest.values())).backward()
    assert predicted["pred_logits"].grad.abs().sum() > 0
    assert (predicted["pred_boxes"].grad == 0).all() and (predicted["pred_masks"].grad == 0).all()


def test_class_error():
    logits = torch.eye(4)
    assert class_error(logits, torch.arange(4)) == 0
    assert class_error(logits, torch.tensor([0, 1, 2, 0])) == 25
    assert class_error(logits[:0], torch.tensor([], dtype=torch.int64)) == 100


def test_matched_pairs_stand_in_one_order():
    image, query = matched_queries(MATCH, torch.device("cpu"))
    assert list(zip(image.tolist(), query.tolist())) == [(b, q) for b, q, _ in PAIRS]
    true = targets()
    assert matched_targets("labels", true, MATCH).tolist() == [int(true[b]["labels"][o]) for b, _, o in PAIRS]


def test_padded_masks():
    true = targets()
    masks = pad_masks(true, MATCH)
    assert masks.shape == (5, 11, 14) and masks.is_floating_point()
    for mask, (b, _, o) in zip(masks, PAIRS):
        h, w = true[b]["masks"].shape[1:]
        assert torch.equal(mask[:h, :w], true[b]["masks"][o].float())
        assert mask.sum() == true[b]["masks"][o].sum()


class Sizes(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""
    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(x.numel() for x in tree_leaves(made)
                                      if isinstance(x, Tensor) and not x._is_view())])
        return made


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize("match", [MATCH, NOTHING], ids=["some", "none"])
def test_masks_are_chosen_before_they_are_padded(match, dtype):
    """Bit by bit what padding all and choosing then gives, and nothing larger than the result is made on the way."""
    true = [{**target, "masks": (target["masks"].float() * 3).to(dtype)} for target in targets((40, 0, 50))]
    every = torch.cat([F.pad(target["masks"].float(), (0, 14 - target["masks"].shape[2], 0,
                                                       11 - target["masks"].shape[1])) for target in true])
    start = torch.tensor([0, 40, 40])
    wanted = every[torch.cat([obj + first for first, (_, obj) in zip(start, match)])]
    with Sizes() as made:
        found = pad_masks(true, match)
    assert found.dtype == torch.float32 and torch.equal(found, wanted) and found.shape == (sum(
        len(obj) for _, obj in match), 11, 14)
    assert made.most == max(found.numel(), len(torch.cat([obj for _, obj in match])))
