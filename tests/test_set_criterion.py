"""The set prediction loss: the published values and gradients, and batches at the edge of what there is."""
import functools
import math

import pytest
import torch
from cases import check, load_case, unchecked

from detr import build_model, distributed
from detr.matcher import HungarianMatcher
from detr.set_criterion import SetCriterion
from detr.structures import NonFiniteError

Q, C = 7, 6


@functools.lru_cache
def build_criterion(num_classes: int = C, **flags) -> SetCriterion:
    with torch.device("meta"):                                  # the model is not needed
        return build_model("detr_resnet50", num_classes=num_classes, **flags)[1]


def criterion(num_classes: int = C, **flags) -> SetCriterion:
    return build_criterion(num_classes, **flags).train()


def outputs(batch: int, aux: int = 2, masks: bool = False, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape, uniform=False):
        draw = torch.rand if uniform else torch.randn
        return draw(shape, generator=generator).to(dtype).requires_grad_()

    def layer():
        return {"pred_logits": leaf(batch, Q, C + 1), "pred_boxes": leaf(batch, Q, 4, uniform=True)}

    last = layer() | ({"pred_masks": leaf(batch, Q, 5, 6)} if masks else {})
    return last | {"aux_outputs": [layer() for _ in range(aux)]}


def targets(*counts: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"labels": torch.randint(C, (n,), generator=generator),
             "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.3,
             "masks": torch.rand(n, 16 + 4 * i, 24 - 4 * i, generator=generator) > 0.5} for i, n in enumerate(counts)]


def leaves(predicted: dict) -> dict[str, torch.Tensor]:
    named = {name: x for name, x in predicted.items() if name != "aux_outputs"}
    for i, layer in enumerate(predicted["aux_outputs"]):
        named |= {f"aux{i}.{name}": x for name, x in layer.items()}
    return named


@pytest.mark.parametrize("name", ["detr_criterion", "detr_criterion_boxes"])
def test_published_losses(name):
    case = load_case(name)
    inputs, true = case.spec["inputs"], case.targets()
    given = {key.removeprefix("in."): x.clone().requires_grad_() for key, x in case.expected.items()
             if key.startswith("in.")}
    layers = [{key.rpartition(".")[2]: x for key, x in given.items() if key.startswith(prefix)}
              for prefix in ["pred_"] + [f"aux{i}." for i in range(inputs["aux"])]]
    predicted = layers[0] | {"aux_outputs": layers[1:]}

    loss = criterion(inputs["num_classes"], masks="masks" in case.spec["losses"], dec_layers=inputs["aux"] + 1,
                     **case.spec["args"])
    assert loss.weight_dict == case.spec["weight_dict"]
    matchers = {"match": (loss.matcher, layers[0]), "match_unit_costs": (HungarianMatcher(), layers[0])}
    matchers |= {f"aux{i}.match": (loss.matcher, layer) for i, layer in enumerate(layers[1:])}
    for prefix, (matcher, layer) in matchers.items():
        for i, (query, obj) in enumerate(matcher(layer, true)):
            check(case, f"{prefix}.{i}.src", query)
            check(case, f"{prefix}.{i}.tgt", obj)

    values = loss(predicted, true)
    expected = {key for key in case.expected if key.startswith("loss.")}
    assert {f"loss.{key}" for key in values} | {"loss.total"} == expected
    for key, value in values.items():
        check(case, f"loss.{key}", value)
    total = loss.weighted_sum(values)
    check(case, "loss.total", total)
    total.backward()
    for key, x in given.items():
        check(case, f"grad.{key}", x.grad)
    assert unchecked(case) == []


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_only_images_without_objects(batch, masks):
    loss, predicted = criterion(masks=masks), outputs(batch, masks=masks)
    values = loss(predicted, targets(*[0] * batch))
    assert all(value.isfinite() for value in values.values())
    for name, value in values.items():
        if name.startswith(("loss_bbox", "loss_giou", "loss_mask", "loss_dice")):
            assert value == 0, name
        elif name.startswith("loss_ce"):
            assert value > 0, name
    assert values["class_error"] == 100
    loss.weighted_sum(values).backward()
    for name, x in leaves(predicted).items():
        assert x.grad.isfinite().all() and (x.grad.abs().sum() > 0) == name.endswith("pred_logits"), name


def test_every_query_matched():
    loss, predicted, true = criterion(), outputs(2), targets(Q, Q)
    values = loss(predicted, true)
    assert all(value.isfinite() for value in values.values())
    loss.weighted_sum(values).backward()
    for name, x in leaves(predicted).items():
        assert (x.grad.abs().sum(-1) > 0).all(), name


def test_more_objects_than_queries():
    loss, predicted, true = criterion(), outputs(2), targets(Q + 3, 2)
    with pytest.warns(UserWarning, match="3 objects of this batch have no query"):
        values = loss(predicted, true)
    assert all(value.isfinite() for value in values.values())
    loss.weighted_sum(values).backward()
    assert (predicted["pred_boxes"].grad.abs().sum(-1) > 0).sum(1).tolist() == [Q, 2]


def test_an_image_without_objects_among_others():
    """It changes what queries of that image learn, and no box."""
    loss, predicted = criterion(), outputs(2)
    values = loss(predicted, targets(3, 0))
    loss.weighted_sum(values).backward()
    for name, x in leaves(predicted).items():
        assert (x.grad[1].abs().sum() > 0) == name.endswith("pred_logits")
        assert x.grad[0].abs().sum() > 0


def test_the_order_of_objects_does_not_matter():
    loss, predicted, true = criterion(masks=True), outputs(2, masks=True), targets(4, 3)
    order = [torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])]
    moved = [{name: x[o] for name, x in target.items()} for target, o in zip(true, order)]
    values, other = loss(predicted, true), loss(predicted, moved)
    for name in values:
        torch.testing.assert_close(other[name], values[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("masks", [False, True])
def test_bfloat16_is_supervised_in_float32(masks):
    loss, predicted, true = criterion(masks=masks), outputs(2, masks=masks, dtype=torch.bfloat16), targets(3, 2)
    exact = outputs(2, masks=masks, dtype=torch.bfloat16)
    exact = {name: [{n: x.detach().float() for n, x in layer.items()} for layer in value] if name == "aux_outputs"
             else value.detach().float() for name, value in exact.items()}
    values, expected = loss(predicted, true), loss(exact, true)
    for name, value in values.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name]), name
    loss.weighted_sum(values).backward()
    for name, x in leaves(predicted).items():
        assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all() and x.grad.abs().sum() > 0, name


def test_names_and_weights():
    loss = criterion(dec_layers=3)
    values = loss(outputs(2), targets(3, 2))
    names = ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")
    assert set(values) == {name + suffix for name in names for suffix in ("", "_0", "_1")} | {"class_error"}
    expected = sum(weight * values[name + suffix] for suffix in ("", "_0", "_1")
                   for name, weight in (("loss_ce", 1), ("loss_bbox", 5), ("loss_giou", 2)))
    torch.testing.assert_close(loss.weighted_sum(values), expected)
    assert not values["cardinality_error_0"].requires_grad and not values["class_error"].requires_grad


def test_without_auxiliary_losses():
    loss, predicted = criterion(aux_loss=False), outputs(2)
    assert set(loss.weight_dict) == {"loss_ce", "loss_bbox", "loss_giou"}
    last = {name: x for name, x in predicted.items() if name != "aux_outputs"}
    values = loss(last, targets(3, 2))
    assert set(values) == {"loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error"}
    with_all = criterion()(predicted, targets(3, 2))
    assert all(torch.equal(value, with_all[name]) for name, value in values.items())


def test_boxes_are_counted_over_all_processes_in_training(monkeypatch):
    loss, predicted, true = criterion(), outputs(2), targets(3, 1)
    alone = loss(predicted, true)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_processes", lambda number: number + 12)          # another one has 12
    together = loss(predicted, true)
    for name in ("loss_bbox", "loss_giou", "loss_bbox_0"):
        torch.testing.assert_close(together[name], alone[name] * 4 / 8)
    assert torch.equal(together["loss_ce"], alone["loss_ce"])
    monkeypatch.setattr(distributed, "sum_over_processes", lambda number: number + 1)           # half a box: at least 1
    assert loss.divisors([targets(0, 0)], torch.device("cpu"))[0].boxes == 1


def test_evaluation_does_not_wait_for_other_processes(monkeypatch):
    loss, predicted, true = criterion(), outputs(2), targets(3, 1)
    trained = loss(predicted, true)

    def fail(*args):
        raise AssertionError("a process of its own spoke to others")

    for name in ("sum_over_processes", "world_size"):
        monkeypatch.setattr(distributed, name, fail)
    loss.eval()
    values = loss(predicted, true)
    assert all(torch.equal(value, trained[name]) for name, value in values.items())
    loss.train()
    with pytest.raises(AssertionError):
        loss(predicted, true)


def test_inputs_stay_as_they_are():
    predicted, true = outputs(2, masks=True), targets(3, 1)
    before = {name: x.detach().clone() for name, x in leaves(predicted).items()}, [dict(t) for t in true]
    copies = [{name: x.clone() for name, x in t.items()} for t in true]
    criterion(masks=True)(predicted, true)
    assert all(torch.equal(x, before[0][name]) for name, x in leaves(predicted).items())
    for target, same, copy in zip(true, before[1], copies):
        assert all(target[name] is same[name] and torch.equal(same[name], copy[name]) for name in copy)
        assert target.keys() == copy.keys()


def test_not_a_number_in_an_earlier_layer():
    predicted = outputs(2)
    with torch.no_grad():
        predicted["aux_outputs"][1]["pred_boxes"][1, 3] = math.nan
    with pytest.raises(NonFiniteError, match="pred_boxes of image 1"):
        criterion()(predicted, targets(3, 1))


def test_labels_out_of_range():
    true = targets(3, 1)
    true[1]["labels"][0] = C
    with pytest.raises(ValueError, match=rf"image 1 of the batch has the labels \[{C}\].*0 to {C - 1}"):
        criterion()(outputs(2), true)


def test_all_layers_are_matched_in_one_call():
    """As one by one; a set of another number of queries by itself, and one that has its match not at all."""
    loss, predicted, true = criterion(), outputs(2, aux=3), targets(3, 2)
    alone = [HungarianMatcher(1, 5, 2)(layer, true) for layer in (predicted, *predicted["aux_outputs"])]
    calls: list[tuple[int, ...]] = []
    handle = loss.matcher.register_forward_hook(lambda _, args, match: calls.append(tuple(args[0]["pred_logits"].shape)))
    rows = [("", predicted, true)] + [(f"_{i}", layer, true) for i, layer in enumerate(predicted["aux_outputs"])]
    few = {name: x[:, :5] for name, x in predicted.items() if name != "aux_outputs"}
    known = predicted | {"match": alone[1]}
    found = loss.matches([*rows, ("_few", few, true), ("_known", known, true)])
    handle.remove()
    assert calls == [(8, Q, C + 1), (2, 5, C + 1)] and found[-1] is alone[1]
    expected = [*alone, HungarianMatcher(1, 5, 2)(few, true)]
    assert all(torch.equal(a, b) for one, other in zip(found, expected) for p, q in zip(one, other) for a, b in zip(p, q))


def test_layers_do_not_mix():
    """Losses of a layer are what they are without the other layers."""
    loss, predicted, true = criterion(), outputs(2, aux=2), targets(3, 2)
    together = loss(predicted, true)
    for i, layer in enumerate(predicted["aux_outputs"]):
        alone = loss(layer, true)
        assert all(torch.equal(together[f"{name}_{i}"], alone[name]) for name in alone if name != "class_error")


def test_a_matcher_of_ones_own():
    """Any module that takes outputs and targets is called with them, and may be a forward of its own."""
    class InOrder(HungarianMatcher):
        def forward(self, outputs, targets):
            assert len(targets) == len(outputs["pred_logits"])
            return [(torch.arange(len(target["labels"])),) * 2 for target in targets]

    predicted, true = outputs(2), targets(3, 2)
    loss = SetCriterion(InOrder(), criterion().losses, {})
    true_boxes = torch.cat([target["boxes"] for target in true])
    for suffix, layer in (("", predicted), ("_1", predicted["aux_outputs"][1])):
        boxes = torch.cat([layer["pred_boxes"][0, :3], layer["pred_boxes"][1, :2]])
        expected = (boxes - true_boxes).abs().sum() / 5
        torch.testing.assert_close(loss(predicted, true)[f"loss_bbox{suffix}"], expected)


def test_which_layer_is_not_a_number():
    predicted = outputs(2, aux=3)
    with torch.no_grad():
        predicted["aux_outputs"][2]["pred_logits"][0, 3] = math.nan
    with pytest.raises(NonFiniteError, match="^not finite: pred_logits of image 0, in the predictions whose losses end "
                                             "in _2$"):
        criterion()(predicted, targets(3, 1))
    with torch.no_grad():
        predicted["pred_boxes"][1, 3] = math.nan
    with pytest.raises(NonFiniteError, match="^not finite: pred_boxes of image 1$"):
        criterion()(predicted, targets(3, 1))
