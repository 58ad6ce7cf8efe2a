"""DINO against the published model: outputs, denoising, losses, gradients, sizes; what its queries may know of the truth;
and what the published code cannot do: masks, exact padding, few tokens, other classes."""
import copy

import pytest
import torch
import torch.distributed as dist
from cases import check, load_case, unchecked
from published import check_counts, check_layers, check_output
from small_models import NUM_CLASSES, build_small, images, targets
from torch.nn.parallel import DistributedDataParallel

from detr import build_model
from detr.architectures import dino
from detr.attention_maps import explain
from detr.coco_classes import COCO_CATEGORIES
from detr.denoising import denoise, number_of_groups
from detr.finetune import Axis, adapt, freeze, layout
from detr.inference import for_prediction
from detr.presets import PRESETS
from detr.structures import Category
from detr.two_stage import best

# One with denoising queries of each kind, and without an encoder, which would be slow.
DENOISING = {"tiny_dino": {}, "tiny_deformable_detr": {"denoising": True}, "tiny_dab_detr": {"denoising": True},
             "tiny_dab_deformable_detr": {"denoising": True, "num_patterns": 2}}
PREDICTED = ("pred_logits", "pred_boxes")
FITTED = ("loss_ce", "loss_bbox", "loss_giou")


# -- the published model ----------------------------------------------------------------------------------------------

def published_model(case, **flags):
    args = {name: case.spec["args"][name] for name in ("num_queries", "enc_layers", "dec_layers")}
    with torch.device("meta"):                                  # all values come from the case
        model, criterion, _ = build_model("dino_resnet50_4scale", num_classes=91, **args, **flags)
    assert model.state_dict().keys() == case.spec["shapes"].keys()
    model.load_state_dict(case.state_dict(), strict=True, assign=True)
    return model, criterion


@pytest.mark.parametrize("name", ["dino_4scale_r50_300", "dino_4scale_r50"])
@torch.no_grad()
def test_published_model(name, monkeypatch):
    """With 900 queries, ranks are closer to each other than rounding: there each query begins at the recorded token."""
    case = load_case(name)
    model, _ = published_model(case)
    index, seen = case.expected["proposals.index"], {}

    def chosen(scores, mask, *rest):
        seen["index"], seen["scores"] = best(scores, mask, *rest), scores
        if name.endswith("300"):
            return seen["index"]
        check(case, "proposals.score", scores.gather(1, seen["index"]), **tolerance("proposals.score"))
        none = seen["invalid"].int().argmax(1, keepdim=True)                        # these are all alike
        return torch.where(index < 0, none, index)

    def tolerance(key):
        return case.spec["expected"][key]["tolerance"]

    def proposing(*args):
        tokens = proposing_tokens(*args)
        seen["anchors"], seen["invalid"] = tokens.anchors, tokens.invalid
        return tokens

    proposing_tokens = dino.proposing_tokens
    monkeypatch.setattr(dino, "best", chosen)
    monkeypatch.setattr(dino, "proposing_tokens", proposing)
    outputs = model.eval()(case.images())
    check_layers(case, outputs)
    check_output(case, "interm_outputs.pred_logits", outputs["interm_outputs"]["pred_logits"])
    check(case, "proposals.box", outputs["interm_outputs"]["pred_boxes"], **tolerance("proposals.box"))
    used = torch.where(index < 0, seen["invalid"].int().argmax(1, keepdim=True), index)
    begun = seen["anchors"].gather(1, used[..., None].expand(-1, -1, 4)).sigmoid()
    check_output(case, "interm_outputs_for_matching_pre.pred_boxes", begun)
    if name.endswith("300"):
        check(case, "proposals.index", seen["index"].masked_fill(outputs["invalid_queries"], -1))
        check(case, "proposals.score", seen["scores"].gather(1, seen["index"]), **tolerance("proposals.score"))
    assert set(unchecked(case)) <= {"proposals.index"}


def test_published_denoising():
    case = load_case("dino_denoising")
    model, criterion = published_model(case)
    for name, parameter in model.named_parameters():                                # loaded by assignment
        parameter.requires_grad_(name.split("body.")[-1][:6] not in ("conv1.", "layer1"))
    tolerances = {key: entry.get("tolerance") or {} for key, entry in case.spec["expected"].items()}
    true = case.targets()
    for i, target in enumerate(true):
        for key, value in target.items():
            check(case, f"targets.{i}.{key}", value)
    assert criterion.weight_dict == case.spec["weight_dict"]
    torch.manual_seed(case.spec["torch_seed"])
    outputs = model.train()(case.images(), true)
    for key in PREDICTED:
        check_output(case, key, outputs[key])
        check_output(case, f"dn_outputs.{key}", outputs["dn_outputs"][key])
    check_output(case, "dn_outputs.aux_outputs.0.pred_boxes", outputs["dn_outputs"]["aux_outputs"][0]["pred_boxes"])
    losses = criterion(outputs, true)
    assert {f"losses.{key}" for key in losses} == {key for key in case.expected if key.startswith("losses.")}
    for key, value in losses.items():
        check(case, f"losses.{key}", value, **tolerances[f"losses.{key}"])
    total = criterion.weighted_sum(losses)
    check(case, "total", total, **tolerances["total"])
    total.backward()
    parameters = dict(model.named_parameters())
    for name in case.spec["watched"]:
        gradient = parameters[name].grad
        check(case, f"grad.{name}", torch.stack([gradient.norm(), gradient.abs().max()]), **tolerances[f"grad.{name}"])
    rows = parameters["label_enc.weight"].grad.norm(dim=1)
    check(case, "grad.label_enc.weight.rows", rows, **tolerances["grad.label_enc.weight.rows"])
    assert all(name.startswith(("noise.", "dn.")) for name in unchecked(case))      # which test_denoising.py looks at


def test_published_parameter_counts():
    case = load_case("dino_parameter_counts")
    flags = {"4scale_r50": ("dino_resnet50_4scale", {}), "5scale_r50": ("dino_resnet50_5scale", {}),
             "4scale_r101": ("dino_resnet50_4scale", {"backbone": "resnet101"})}
    for name in case.spec["models"]:
        preset, more = flags[name]
        with torch.device("meta"):
            model = build_model(preset, **more)[0]
        check_counts(case, name, model)
    assert unchecked(case) == []


def test_published_recipe():
    for levels in (4, 5):
        for ending, epochs, drop in (("", 12, 11), ("_24ep", 24, 20), ("_36ep", 36, 30)):
            preset = PRESETS[f"dino_resnet50_{levels}scale{ending}"]
            assert preset.model.num_feature_levels == levels and preset.model.padding == "legacy"
            train = preset.train
            assert (train.epochs, train.lr_drop, train.lr, train.lr_batch, train.weight_decay, train.clip_max_norm) == \
                (epochs, drop, 1e-4, 16, 1e-4, 0.1)
            assert preset.data == type(preset.data)() and preset.num_classes == 91
    model, _, postprocessors = build_small("dino_resnet50_4scale")
    groups = PRESETS["dino_resnet50_4scale"].model.parameter_groups(model, 1e-4)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [group["lr"] for group in groups] == [1e-4, 1e-5]
    for i, group in enumerate(groups):
        assert all(names[id(p)].startswith("backbone.0.") == bool(i) for p in group["params"])
    assert postprocessors["bbox"].k == 300


def test_levels_of_five_scales():
    model = build_small("dino_resnet50_5scale")[0]
    assert model.backbone[0].strides == [4, 8, 16, 32] and len(model.input_proj) == 5
    outputs = model.eval()(images((64, 96)))
    assert outputs["pred_boxes"].shape == (1, model.num_queries, 4)


# -- what denoising queries know, and must not ------------------------------------------------------------------------

def one_step(name, true, seed=0, **flags):
    model, criterion, _ = build_small(name, **DENOISING[name], **flags)
    return step_of(model, criterion, true, seed)


def step_of(model, criterion, true, seed=0):
    torch.manual_seed(seed)
    outputs = model.train()(images((64, 64), (60, 50))[:len(true)], true)
    return model, outputs, criterion(outputs, true), criterion


def moving_heads(model):
    """Box heads begin with zeros, which would hide what they are told."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bbox_embed" in name:
                parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("name", DENOISING)
def test_matching_queries_learn_nothing_of_the_truth(name):
    """Other objects, and other noise, change no bit of what matching queries say; and no gradient of theirs reaches the
    table of labels."""
    model, criterion, _ = build_small(name, **DENOISING[name])
    moving_heads(model)
    _, outputs, _, _ = step_of(model, criterion, targets(3, 2))
    other = [{**t, "labels": (t["labels"] + 1) % NUM_CLASSES, "boxes": t["boxes"] * 0.7} for t in targets(3, 2)]
    _, changed, _, _ = step_of(model, criterion, other, seed=1)
    known = [out["dn_outputs"]["pred_boxes"] for out in (outputs, changed)]
    assert known[0].shape == known[1].shape and not torch.equal(*known)
    for layer, again in zip([outputs, *outputs["aux_outputs"]], [changed, *changed["aux_outputs"]]):
        assert all(torch.equal(layer[key], again[key]) for key in PREDICTED)
    sum(layer[key].square().sum() for layer in [outputs, *outputs["aux_outputs"]] for key in PREDICTED).backward(
        retain_graph=True)
    gradient = model.label_enc.weight.grad
    assert gradient is None or (gradient == 0).all()
    outputs["dn_outputs"]["pred_logits"].square().sum().backward()
    assert (model.label_enc.weight.grad != 0).any()


@pytest.mark.parametrize("name", DENOISING)
def test_matching_queries_say_the_same_without_denoising(name):
    model, criterion, _ = build_small(name, **DENOISING[name])
    moving_heads(model)
    with_some, without = (model.train()(images((64, 64), (60, 50)), *given) for given in ((targets(3, 2),), ()))
    assert "dn_outputs" in with_some and "dn_outputs" not in without
    for key in PREDICTED:
        torch.testing.assert_close(with_some[key], without[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DENOISING)
def test_no_group_sees_another(name, monkeypatch):
    model, criterion, _ = build_small(name, **DENOISING[name])
    moving_heads(model)
    groups = []

    def denoised(*args):
        """With other boxes and labels in group 1, the second time."""
        found = denoise(*args)
        size = found.labels.shape[1] // found.groups
        if groups:
            found.boxes[:, size:2 * size] = 0.3
            found.labels[:, size:2 * size] = 1
        groups.append((found.groups, size))
        return found

    monkeypatch.setattr("detr.denoising.denoise", denoised)
    outputs, changed = (step_of(model, criterion, targets(3, 2))[1]["dn_outputs"] for _ in range(2))
    count, size = groups[0]
    assert count > 2
    for layer, again in zip([outputs, *outputs["aux_outputs"]], [changed, *changed["aux_outputs"]]):
        for key in PREDICTED:
            before, after = (x[key].unflatten(1, (count, size)) for x in (layer, again))
            assert all(torch.equal(before[:, g], after[:, g]) == (g != 1) for g in range(count))


@pytest.mark.parametrize("name", DENOISING)
@pytest.mark.parametrize("counts", [(3, 0), (0, 0), (60, 2)])
@pytest.mark.filterwarnings("ignore:images of:UserWarning")
def test_batches_of_all_kinds(name, counts):
    """An empty image, an empty batch, more objects than denoising queries are meant for: the same losses and all
    gradients, whatever the batch."""
    model, outputs, losses, criterion = one_step(name, targets(*counts), num_queries=100)
    names = {name for name in criterion.weight_dict if "_dn" in name}
    assert len(names) == 3 * 2 and set(criterion.weight_dict) <= set(losses)
    assert {"cardinality_error_dn", "cardinality_error_dn_0"} <= set(losses)
    assert ("dn_outputs" in outputs) == any(counts)
    assert all((losses[name] == 0) == (not any(counts)) for name in names)
    if any(counts):
        assert outputs["dn_outputs"]["copies"] == number_of_groups(model.denoising.noising.number, max(counts))
    assert set(losses) == set(one_step(name, targets(1, 1))[2])
    criterion.weighted_sum(losses).backward()
    for parameter_name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, parameter_name
        assert p.grad is None or p.grad.isfinite().all(), parameter_name
    assert not any(counts) or (model.label_enc.weight.grad != 0).any()


@pytest.mark.parametrize("name", DENOISING)
def test_losses_of_denoising_are_means_over_groups(name):
    """By the definition, object by object."""
    true = targets(3, 2)
    _, outputs, losses, _ = one_step(name, true)
    known = outputs["dn_outputs"]
    distance, classes = 0.0, torch.zeros_like(known["pred_logits"])
    size = known["pred_logits"].shape[1] // known["copies"]
    for i, target in enumerate(true):
        for group in range(known["copies"]):
            for k, (box, label) in enumerate(zip(target["boxes"], target["labels"])):
                distance += (known["pred_boxes"][i, group * size + k] - box).abs().sum()
                classes[i, group * size + k, label] = 1
    torch.testing.assert_close(losses["loss_bbox_dn"], distance / (5 * known["copies"]))
    p = known["pred_logits"].sigmoid()
    focal = torch.where(classes > 0, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p ** 2 * (1 - p).log()).sum()
    torch.testing.assert_close(losses["loss_ce_dn"], focal / (5 * known["copies"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DENOISING)
def test_losses_fall(name):
    """On one image with the same noise, by heart: of matching and of denoising queries."""
    true = targets(3)
    model, criterion, _ = build_small(name, **DENOISING[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(16):
        losses = step_of(model, criterion, true)[2]
        history.append(torch.stack([sum(criterion.weight_dict[loss] * losses[f"{loss}{row}"] for loss in FITTED)
                                    for row in ("", "_dn")]).detach())
        optimizer.zero_grad()
        criterion.weighted_sum(losses).backward()
        optimizer.step()
    assert (history[-1] < 0.8 * history[0]).all(), history


@torch.no_grad()
def test_nothing_is_denoised_in_evaluation():
    model, criterion, _ = build_small("tiny_dino")
    state = torch.get_rng_state()
    with_targets, without = model.eval()(images((64, 64)), targets(3)), model(images((64, 64)))
    assert set(with_targets) == set(without) == {*PREDICTED, "aux_outputs", "interm_outputs", "invalid_queries"}
    assert torch.equal(with_targets["pred_boxes"], without["pred_boxes"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("_dn" in name for name in criterion.eval()(without, targets(3)))
    assert any("_dn" in name for name in criterion.train()(without, targets(3)))


def test_denoising_without_noise_is_refused():
    with pytest.raises(ValueError, match="--dn_box_noise_scale 0: the same box would have to be found and to be refused"):
        dino.DINOConfig(dn_box_noise_scale=0).check_training()
    dino.DINOConfig(dn_box_noise_scale=0, denoising=False).check_training()
    build_small("tiny_dino", dn_box_noise_scale=0)                              # to evaluate what was trained so
    build_small("tiny_dab_detr", denoising=True, dn_box_noise_scale=0)[0](images((64, 64)), targets(1))


def test_targets_for_other_images_are_refused():
    model = build_small("tiny_dino")[0]
    with pytest.raises(ValueError, match="2 targets for 1 images: give one for each"):
        model(images((64, 64)), targets(1, 2))


def test_denoising_can_be_left_out():
    model, criterion, _ = build_small("tiny_dino", denoising=False)
    assert not model.takes_targets and not model.label_enc.weight.requires_grad
    assert not any("_dn" in name for name in criterion.weight_dict)
    assert model.state_dict().keys() == build_small("tiny_dino")[0].state_dict().keys()
    outputs = model.train()(images((64, 64)), targets(3))
    assert "dn_outputs" not in outputs and not any("_dn" in name for name in criterion(outputs, targets(3)))
    with pytest.raises(ValueError, match="--denoising gives queries boxes to begin at.* add --two_stage"):
        build_small("deformable_detr_resnet50", denoising=True)
    plain, noised = (build_small("tiny_deformable_detr", denoising=on)[0].state_dict() for on in (False, True))
    assert noised.keys() - plain.keys() == {"label_enc.weight"}


def one_of_two(rank, meeting):
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name in ("tiny_dino", "tiny_dab_detr"):                     # many levels, and one
        model, criterion, _ = build_small(name, **DENOISING[name])
        model = DistributedDataParallel(model.train())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for counts in ((3, 0), (0, 0), (2, 0)):
            true = targets(counts[rank])                                            # one process has objects, or none
            losses = criterion(model(images((64, 64)), true), true)
            names = [[], []]
            dist.all_gather_object(names, sorted(losses))
            assert names[0] == names[1]
            optimizer.zero_grad()
            criterion.weighted_sum(losses).backward()
            optimizer.step()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        both = [torch.empty_like(weights) for _ in range(2)]
        dist.all_gather(both, weights)
        assert weights.isfinite().all() and torch.equal(*both)
    dist.destroy_process_group()


def test_processes_do_not_wait_for_each_other(tmp_path):
    """Also where one of them has a batch without objects, so that nothing is denoised there."""
    torch.multiprocessing.spawn(one_of_two, (f"file://{tmp_path}/meeting",), nprocs=2)


# -- the whole --------------------------------------------------------------------------------------------------------

def test_initialisation():
    model = build_small("dino_resnet50_4scale")[0]
    transformer = model.transformer
    assert len({id(head) for head in model.class_embed}) == len({id(head) for head in model.bbox_embed}) == 1
    assert transformer.enc_out_class_embed is not model.class_embed[0]
    for head in (model.class_embed[0], transformer.enc_out_class_embed):
        assert torch.allclose(head.bias.sigmoid(), torch.tensor(0.01))
    for head in (model.bbox_embed[0], transformer.enc_out_bbox_embed):
        assert (head.layers[-1].weight == 0).all() and (head.layers[-1].bias == 0).all()
    for table in (transformer.tgt_embed.weight, model.label_enc.weight, transformer.level_embed):
        assert 0.8 < table.std() < 1.2
    outputs = model.eval()(images((64, 64)))
    assert torch.allclose(outputs["pred_boxes"], outputs["interm_outputs"]["pred_boxes"].clamp(1e-3, 1 - 1e-3), atol=2e-3)


def test_doubled_names_are_one_tensor():
    model = copy.deepcopy(build_small("dino_resnet50_4scale")[0])
    assert model.transformer.decoder.bbox_embed is model.bbox_embed
    assert model.transformer.decoder.class_embed is model.class_embed


def test_look_forward_twice():
    """Boxes of a layer learn from the next layer's loss, and from none after it."""
    model = build_small("dino_resnet50_4scale", dec_layers=3)[0].train()
    moving_heads(model)
    seen = []
    for layer in model.transformer.decoder.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output) or output.retain_grad())
    references = []
    original = dino.refine

    def watched(*args):
        references.append(original(*args))
        references[-1].retain_grad()
        return references[-1]

    dino.refine = watched
    try:
        outputs = model(images((64, 64)))
    finally:
        dino.refine = original
    outputs["pred_boxes"].sum().backward()
    undetached = references[1::2]                                   # what the boxes of layers 1 and 2 refer to
    assert len(references) == 5 and undetached[0].grad is None and (undetached[1].grad != 0).any()


@pytest.mark.parametrize("name", ["tiny_dino", "dino_resnet50_5scale"])
@torch.no_grad()
def test_exact_padding(name):
    model = build_small(name, padding="exact")[0].eval()
    moving_heads(model)
    both = images((70, 90), (64, 128))
    together = model(both)
    for i, image in enumerate(both):
        alone = model([image])
        for key in PREDICTED:
            torch.testing.assert_close(together[key][i], alone[key][0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [[(1, 1)], [(1, 200), (200, 1)], [(33, 65), (1, 1)], [(31, 31)]])
@pytest.mark.parametrize("name", ["dino_resnet50_4scale", "dino_resnet50_5scale"])
@pytest.mark.filterwarnings("ignore:images of:UserWarning")
def test_odd_sizes(name, sizes):
    """Also smaller than the coarsest stride, and with fewer tokens than queries."""
    model, criterion, _ = build_small(name)
    true = targets(3, 0)[:len(sizes)]
    outputs = model.train()(images(*sizes), true)
    losses = criterion(outputs, true)
    assert all(loss.isfinite() for loss in losses.values())
    criterion.weighted_sum(losses).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_prepared_for_prediction():
    model = build_small("dino_resnet50_4scale")[0].eval()
    moving_heads(model)
    batch = images((64, 96), (80, 40))
    expected, found = model(batch), for_prediction(model)(batch)
    assert "aux_outputs" not in found
    for key in PREDICTED:
        torch.testing.assert_close(found[key], expected[key], atol=1e-4, rtol=1e-4)


def test_explained():
    model = build_small("dino_resnet50_4scale")[0].eval()
    moving_heads(model)
    seen = explain(model, images((64, 96))[0])
    assert len(seen.decoder) == len(seen.encoder) == 2 and seen.boxes.shape == (2, model.num_queries, 4)
    assert torch.allclose(seen.references[0], seen.outputs["interm_outputs"]["pred_boxes"][0], atol=1e-6)
    assert seen.heat(3).isfinite().all() and seen.path(3).shape == (3, 4)


# -- masks, and other classes -----------------------------------------------------------------------------------------

MASKS = {"masks": True, "dec_layers": 2, "num_queries": 12}


@pytest.mark.parametrize("name", DENOISING)
def test_masks(name):
    true = targets(3, 2)
    model, outputs, losses, criterion = one_step(name, true, **MASKS)
    assert outputs["pred_masks"].shape[0] == 5 and {"loss_mask", "loss_dice", "loss_ce_dn"} <= set(losses)
    assert not any(f"loss_{kind}{suffix}" in criterion.weight_dict for kind in ("mask", "dice")
                   for suffix in ("_dn", "_dn_0", "_interm"))
    criterion.weighted_sum(losses).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    with torch.no_grad():
        outputs = model.eval()(images((64, 64), (60, 50)))
    assert outputs["pred_masks"].shape[:2] == outputs["pred_logits"].shape[:2] and "dn_outputs" not in outputs


def test_masks_of_a_fixed_detector():
    """Nothing is denoised for it, and only the mask head learns."""
    model, outputs, losses, criterion = one_step("tiny_dino", targets(3, 2), frozen_weights="x", **MASKS)
    assert "dn_outputs" not in outputs and losses["loss_ce_dn"] == 0
    criterion.weighted_sum(losses).backward()
    assert all((p.grad is not None) == (not name.startswith("detr.")) for name, p in model.named_parameters())


def fitted(old, new, queries=(30, 30)):
    def build(classes, count):
        return build_model("tiny_dino", num_classes=classes, num_queries=count)[0]

    torch.manual_seed(0)
    before = build(1 + max(c.label for c in old), queries[0]).state_dict()
    model = build(1 + max(c.label for c in new), queries[1])
    adapted = adapt(layout(build), model, before, old, new, "old.pth")
    return before, model.state_dict(), adapted


def test_other_classes():
    """Classes of one name keep their row in the table of labels too, and so does "unknown"."""
    with torch.device("meta"):
        shape = layout(lambda classes, count: build_model("tiny_dino", num_classes=classes, num_queries=count)[0])
    assert shape.classes["label_enc.weight"] == Axis(0, 1)
    assert shape.queries == {"transformer.tgt_embed.weight": Axis(0, 0)} and shape.agnostic == set()
    assert {name for name in shape.classes if "label_enc" not in name} == {
        f"{prefix}{kind}" for kind in ("weight", "bias") for prefix in (
            "transformer.enc_out_class_embed.", *(f"{of}class_embed.{i}." for of in ("", "transformer.decoder.")
                                                  for i in (0, 1)))}
    old = [Category(i, i, name) for i, name in COCO_CATEGORIES.items()]
    new = [Category(0, 1, "zebra"), Category(1, 2, "drone"), Category(2, 3, "person")]
    before, fresh, adapted = fitted(old, new)
    ids = {name: i for i, name in COCO_CATEGORIES.items()}
    table, was = adapted.state_dict["label_enc.weight"], before["label_enc.weight"]
    assert torch.equal(table[[0, 2, 3]], was[[ids["zebra"], ids["person"], len(was) - 1]])
    assert torch.equal(table[1], fresh["label_enc.weight"][1])
    head = adapted.state_dict["transformer.enc_out_class_embed.weight"]
    assert torch.equal(head[0], before["transformer.enc_out_class_embed.weight"][ids["zebra"]])
    why = next(row.why for row in adapted.rows if row.name == "label_enc.weight")
    assert why.endswith('2 of them by name, "unknown" stays')


def test_another_number_of_queries():
    table = [Category(0, 1, "cell")]
    before, _, adapted = fitted(table, table, queries=(30, 40))
    queries = adapted.state_dict["transformer.tgt_embed.weight"]
    assert torch.equal(queries[:30], before["transformer.tgt_embed.weight"]) and len(queries) == 40


def test_parts_to_freeze():
    model = build_small("dino_resnet50_4scale")[0]
    frozen = freeze(model, ["queries,class_heads,box_heads"]).names
    assert {name for name in frozen} == {
        name for name, _ in model.named_parameters() if any(part in name for part in ("tgt_embed", "class_embed",
                                                                                      "bbox_embed"))}
