"""Deformable DETR against the published model: outputs, proposals, losses, ten steps of training, sizes; and what the
published code cannot do: few tokens, odd sizes, two stages without refinement."""
import copy
import math
import warnings
from collections.abc import Sequence

import pytest
import torch
from cases import check, load_case, unchecked
from published import check_counts, check_layers, check_output
from small_models import NUM_CLASSES, build_small, images, targets
from torch import Tensor, nn

from detr import build_model
from detr.architectures import deformable_detr
from detr.architectures.deformable_detr import DeformableDETRConfig
from detr.deformable_attention import MSDeformAttn
from detr.feature_levels import build_input_proj, flatten_levels, project
from detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from detr.presets import PRESETS
from detr.reference_points import decoder_reference_points, encoder_reference_points, refine
from detr.structures import FeatureLevels
from detr.two_stage import anchors, best, proposing_tokens
from engine import Progress, train_one_epoch

DEFORMABLE = [name for name, preset in PRESETS.items() if isinstance(preset.model, DeformableDETRConfig)]
PUBLISHED = {"r50": "deformable_detr_resnet50", "r50_single_scale": "deformable_detr_resnet50_single_scale",
             "r50_single_scale_dc5": "deformable_detr_resnet50_single_scale_dc5",
             "r50_refine": "deformable_detr_resnet50_box_refine",
             "r50_refine_two_stage": "deformable_detr_resnet50_two_stage"}


# -- the published model ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["deformable_detr_r50", "deformable_detr_r50_refine_two_stage"])
def test_published_model(name, monkeypatch):
    case = load_case(name)
    with torch.device("meta"):                                  # all values come from the case
        model = build_model("deformable_detr_resnet50", num_classes=91, **case.spec["args"])[0]
    assert model.state_dict().keys() == case.spec["shapes"].keys()
    model.load_state_dict(case.state_dict(), strict=True, assign=True)
    chosen = []
    monkeypatch.setattr(deformable_detr, "best", lambda *args: chosen.append(best(*args)) or chosen[-1])
    with torch.no_grad():
        outputs = model.eval()(case.images())
    check_layers(case, outputs)
    if chosen:
        for key in ("pred_logits", "pred_boxes"):
            check_output(case, f"enc_outputs.{key}", outputs["enc_outputs"][key])
        check(case, "proposals.index", chosen[0].masked_fill(outputs["invalid_queries"], -1))
        proposals = outputs["enc_outputs"]
        check_output(case, "proposals.score", proposals["pred_logits"][..., 0].gather(1, chosen[0]))
        check_output(case, "proposals.box", proposals["pred_boxes"].gather(1, chosen[0][..., None].expand(-1, -1, 4)))
    assert unchecked(case) == []


def test_published_losses():
    case = load_case("deformable_criterion")
    given = {key.removeprefix("in."): x.clone().requires_grad_() for key, x in case.expected.items()
             if key.startswith("in.")}
    layers = {prefix: {key: given[f"{prefix}.{key}"] for key in ("pred_logits", "pred_boxes")}
              for prefix in ("last", "aux0", "aux1", "enc")}
    true = case.targets()
    for i, target in enumerate(true):
        for key, value in target.items():
            check(case, f"targets.{i}.{key}", value)
    with torch.device("meta"):
        _, loss, postprocessors = build_model("deformable_detr_resnet50", num_classes=91, two_stage=True, dec_layers=3,
                                              **case.spec["args"])
    assert loss.weight_dict == case.spec["weight_dict"]
    for prefix, layer in layers.items():
        objects = [{**t, "labels": 0 * t["labels"]} for t in true] if prefix == "enc" else true
        for i, pair in enumerate(loss.matcher(layer, objects)):
            check(case, f"indices.{prefix}.{i}", torch.stack(pair))
    values = loss(layers["last"] | {"aux_outputs": [layers["aux0"], layers["aux1"]], "enc_outputs": layers["enc"]}, true)
    assert {f"losses.{key}" for key in values} == {key for key in case.expected if key.startswith("losses.")}
    tolerances = {key: entry.get("tolerance") or {} for key, entry in case.spec["expected"].items()}
    for key, value in values.items():
        check(case, f"losses.{key}", value, **tolerances[f"losses.{key}"])
    total = loss.weighted_sum(values)
    check(case, "total", total, **tolerances["total"])
    total.backward()
    for key, x in given.items():
        check(case, f"grad.{key}", x.grad, **tolerances[f"grad.{key}"])
    for i, found in enumerate(postprocessors["bbox"](layers["last"], torch.tensor(case.spec["target_sizes"]))):
        for key in ("scores", "labels", "boxes"):
            check(case, f"postprocess.{i}.{key}", found[key], **tolerances[f"postprocess.{i}.{key}"])
    assert unchecked(case) == []


def test_published_training():
    """Ten steps of the published recipe through ``engine.train_one_epoch``."""
    case = load_case("deformable_train")
    args, expected = case.spec["args"], case.expected
    model, criterion, _ = build_model("deformable_detr_resnet50", num_classes=91, **args)
    start = case.state_dict()
    model.load_state_dict(start, strict=True)
    groups = DeformableDETRConfig(lr_backbone=args["lr_backbone"]).parameter_groups(model, args["lr"])
    assert [group["lr"] for group in groups] == [args["lr"], args["lr_backbone"],
                                                 args["lr"] * args["lr_linear_proj_mult"]]
    assert [[len(group["params"]), sum(p.numel() for p in group["params"])] for group in groups] == \
        [case.spec["groups"][name] for name in ("default", "backbone", "projection")]
    optimizer = torch.optim.AdamW(groups, lr=args["lr"], weight_decay=args["weight_decay"])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    batch = nested_tensor_from_tensor_list(case.images()), case.targets()
    matches = []
    criterion.matcher.register_forward_hook(lambda module, args, match: matches.append(match))
    steps = [train_one_epoch(model, criterion, [batch], 1, optimizer, schedule, torch.device("cpu"), step,
                             max_norm=args["clip_max_norm"], progress=Progress("", every=float("inf")))
             for step in range(case.spec["iterations"])]
    last = slice(len(batch[1]))                                         # all layers are matched at once, the last first
    in_order = [torch.cat([query[obj.argsort()] for query, obj in match[last]]) for match in matches]
    check(case, "matched", torch.stack(in_order))
    tolerances = {key: {"atol": 0, "rtol": 0} | (entry.get("tolerance") or {})
                  for key, entry in case.spec["expected"].items()}
    check(case, "loss", [step["loss"] for step in steps], **tolerances["loss"])
    check(case, "grad_norm", [step["grad_norm"] for step in steps], **tolerances["grad_norm"])
    for key in [key for key in expected if key.startswith("losses.")]:
        name = key.removeprefix("losses.")
        check(case, key, [step[f"{name}_unscaled"] for step in steps], **tolerances[key])
    parameters = dict(model.named_parameters())
    for name in case.spec["watched"]:
        after = parameters[name].detach()
        check(case, f"parameter.{name}", torch.stack([after.mean(), after.std(correction=0), after.norm()]),
              **tolerances[f"parameter.{name}"])
        check(case, f"update.{name}", (after - start[name]).norm(), **tolerances[f"update.{name}"])
    assert unchecked(case) == []


def test_published_parameter_counts():
    case = load_case("deformable_parameter_counts")
    for name, flags in case.spec["models"].items():
        with torch.device("meta"):
            models = [build_model("deformable_detr_resnet50", **flags)[0]]
            if name in PUBLISHED:
                models.append(build_model(PUBLISHED[name])[0])
        check_counts(case, name, *models)
    assert unchecked(case) == []


def test_published_recipe():
    for name in PUBLISHED.values():
        preset = PRESETS[name]
        assert (preset.train.lr, preset.train.epochs, preset.train.lr_drop, preset.train.batch_size) == (2e-4, 50, 40, 2)
        assert preset.data == type(preset.data)() and preset.num_classes == 91


# -- the parts --------------------------------------------------------------------------------------------------------

def make_levels(*sizes: tuple[int, int], shapes: Sequence[tuple[int, int]] = ((8, 10), (4, 5)),
                d_model: int = 8) -> FeatureLevels:
    """Levels of a batch whose images fill the first ``sizes`` (height, width) pixels of the finest."""
    maps = []
    for h, w in shapes:
        mask = torch.ones(len(sizes), h, w, dtype=torch.bool)
        for i, (height, width) in enumerate(sizes):
            mask[i, :math.ceil(height * h / shapes[0][0]), :math.ceil(width * w / shapes[0][1])] = False
        maps.append(NestedTensor(torch.randn(len(sizes), d_model, h, w), mask))
    positions = [torch.zeros_like(x.tensors) for x in maps]
    return flatten_levels(maps, positions, torch.zeros(len(shapes), d_model))


def test_levels_are_flattened_row_by_row():
    shapes = [(2, 3), (1, 2)]
    maps = [NestedTensor(torch.arange(h * w, dtype=torch.float32).view(1, 1, h, w) + 100 * i,
                         torch.zeros(1, h, w, dtype=torch.bool)) for i, (h, w) in enumerate(shapes)]
    levels = flatten_levels(maps, [torch.zeros_like(x.tensors) for x in maps], torch.tensor([[7.0], [9.0]]))
    assert levels.tokens[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 100, 101]
    assert levels.position[0, :, 0].tolist() == [7] * 6 + [9] * 2
    assert levels.shapes == shapes and levels.valid_sizes[0].tolist() == [[3, 2], [2, 1]]


def test_further_levels_come_from_the_raw_last_map():
    torch.manual_seed(0)
    layers = build_input_proj([4, 6], 4, 32)
    assert [tuple(layer[0].weight.shape) for layer in layers] == [(32, 4, 1, 1), (32, 6, 1, 1), (32, 6, 3, 3),
                                                                  (32, 32, 3, 3)]
    c4, c5 = torch.randn(1, 4, 8, 10), torch.randn(1, 6, 4, 5)
    batch = nested_tensor_from_tensor_list([torch.zeros(3, 64, 80)])
    features = [NestedTensor(c4, batch.mask[:, ::8, ::8]), NestedTensor(c5, batch.mask[:, ::16, ::16])]
    maps = project(layers, features, batch)
    assert torch.equal(maps[2].tensors, layers[2](c5)) and torch.equal(maps[3].tensors, layers[3](maps[2].tensors))
    assert [tuple(x.mask.shape[1:]) for x in maps] == [(8, 10), (4, 5), (2, 3), (1, 2)]


def test_reference_points_are_the_centres_of_the_valid_part():
    """A token's own level: exactly its pixel; other levels: the same place of the image."""
    levels = make_levels((8, 10), (4, 5))
    reference = encoder_reference_points(levels)                                                # [B, S, L, 2]
    y, x = 3, 4
    for image in (0, 1):
        pixels = reference[image, y * 10 + x, 0] * torch.tensor([10.0, 8.0])
        assert torch.allclose(pixels, torch.tensor([x + 0.5, y + 0.5]))
    queries = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]])
    points = decoder_reference_points(queries, levels)
    assert torch.allclose(points[0, 0], torch.full((2, 2), 0.5))
    assert torch.allclose(points[1, 0], torch.tensor([[0.25, 0.25], [0.5 * 3 / 5, 0.25]]))
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4]], [[0.5, 0.5, 0.2, 0.4]]])
    assert torch.allclose(decoder_reference_points(boxes, levels)[1, 0, 0], torch.tensor([0.25, 0.25, 0.1, 0.2]))


def test_refine():
    point, box = torch.tensor([[0.3, 0.6]]), torch.tensor([[0.3, 0.6, 0.2, 0.1]])
    zero = torch.zeros(1, 4)
    assert torch.allclose(refine(box, zero), box, atol=1e-6)
    assert torch.allclose(refine(point, zero), torch.tensor([[0.3, 0.6, 0.5, 0.5]]), atol=1e-6)
    assert torch.allclose(refine(box, torch.tensor([[0.0, 0.0, 1.0, 0.0]]))[0, 2],
                          torch.sigmoid(torch.tensor(0.2).logit() + 1))
    assert refine(torch.tensor([[0.0, 1.0, 0.0, 1.0]]), zero).isfinite().all()


def test_anchors():
    logits, invalid = anchors(make_levels((8, 10), (4, 5)))
    boxes = logits.sigmoid()
    assert not invalid[0].any() and torch.allclose(boxes[0, 34], torch.tensor([4.5 / 10, 3.5 / 8, 0.05, 0.05]))
    assert torch.allclose(boxes[0, 80], torch.tensor([0.1, 0.125, 0.1, 0.1]))                  # the coarser level: twice
    assert torch.allclose(boxes[1, 34], torch.tensor([4.5 / 5, 3.5 / 4, 0.05, 0.05]))          # of its own image
    assert invalid[1].sum() == 80 - 20 + 20 - 6 and (boxes[1, invalid[1]] == 1).all()
    wide = anchors(make_levels((1, 100), shapes=[(1, 100)]))[1]
    assert wide[0].nonzero().flatten().tolist() == [0, 99]                          # centres outside 0.01 to 0.99


def test_the_best_tokens():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.1, 0.9, 0.5, 0.7]])
    mask = torch.tensor([[False, False, False, False], [False, True, False, True]])
    assert best(scores, mask, 2).tolist() == [[1, 3], [1, 3]]           # as published, padding competes
    assert best(scores, mask, 3)[1].tolist()[:2] == [2, 0]              # but not with an image that has few tokens


def test_too_few_tokens_are_filled():
    levels = make_levels((1, 2), shapes=[(2, 3)])
    tokens = proposing_tokens(torch.ones(1, 6, 8), levels, 9)
    assert tokens.memory.shape == (1, 9, 8) and tokens.anchors.shape == (1, 9, 4)
    assert tokens.mask[0].tolist() == [False, False] + [True] * 7 and torch.equal(tokens.invalid, tokens.mask)
    assert (tokens.memory[0, 2:] == 0).all() and (tokens.anchors[0, 2:] == math.inf).all()


# -- the whole --------------------------------------------------------------------------------------------------------

def test_initialisation():
    torch.manual_seed(0)
    for name, first_size in (("deformable_detr_resnet50", -2.0), ("deformable_detr_resnet50_box_refine", -2.0),
                             ("deformable_detr_resnet50_two_stage", 0.0)):
        model = build_model(name, num_classes=NUM_CLASSES, backbone="resnet18")[0]
        assert all(torch.allclose(head.bias, torch.tensor(-math.log(99))) for head in model.class_embed)
        assert all((head.layers[-1].weight == 0).all() and (head.layers[-1].bias[:2] == 0).all()
                   for head in model.bbox_embed)
        assert (model.bbox_embed[0].layers[-1].bias[2:] == first_size).all()
        assert abs(model.transformer.level_embed.std() - 1) < 0.1
        for module in model.modules():
            if isinstance(module, MSDeformAttn):
                assert (module.sampling_offsets.weight == 0).all() and module.sampling_offsets.bias.abs().max() == 4
        heads = len({id(head) for head in model.class_embed})
        assert heads == (1 if name == "deformable_detr_resnet50" else 6 + name.endswith("two_stage"))
    refined = build_model("deformable_detr_resnet50_box_refine", backbone="resnet18")[0]
    assert (refined.bbox_embed[1].layers[-1].bias == 0).all()


def test_doubled_names_are_one_tensor():
    model = build_small("deformable_detr_resnet50_two_stage")[0]
    state = model.state_dict()
    doubled = [name for name in state
               if name.startswith(("transformer.decoder.bbox_embed", "transformer.decoder.class_embed"))]
    assert len(doubled) == 3 * (6 + 2)
    for name in doubled:
        assert state[name].data_ptr() == state[name.removeprefix("transformer.decoder.")].data_ptr()
    del state[doubled[0]]
    with pytest.raises(RuntimeError, match=doubled[0]):
        model.load_state_dict(state, strict=True)


def test_copies_keep_the_doubled_heads():
    """As the moving average of the weights makes them."""
    model = copy.deepcopy(build_small("deformable_detr_resnet50_two_stage")[0])
    assert model.transformer.decoder.bbox_embed is model.bbox_embed
    assert model.transformer.decoder.class_embed is model.class_embed


@pytest.mark.parametrize("name", ["deformable_detr_resnet50", "deformable_detr_resnet50_two_stage"])
def test_export(name):
    model = build_small(name)[0].eval()
    batch = torch.stack(images((64, 96), (64, 96)))
    exported = torch.export.export(model, (batch,), strict=False).module()
    with torch.no_grad():
        expected, found = model(batch), exported(batch)
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(found[key], expected[key], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DEFORMABLE)
@torch.no_grad()
def test_outputs(name):
    model = build_small(name)[0].eval()
    outputs = model(images((64, 96), (80, 40)))
    two_stage = PRESETS[name].model.two_stage
    assert set(outputs) == {"pred_logits", "pred_boxes", "aux_outputs"} | ({"enc_outputs", "invalid_queries"} if two_stage
                                                                           else set())
    for layer in (outputs, *outputs["aux_outputs"]):
        assert layer["pred_logits"].shape == (2, model.num_queries, NUM_CLASSES)
        assert layer["pred_boxes"].shape == (2, model.num_queries, 4)
        assert 0 <= layer["pred_boxes"].min() <= layer["pred_boxes"].max() <= 1


@pytest.mark.parametrize("sizes", [[(1, 1)], [(1, 200), (200, 1)], [(33, 65), (1, 1)], [(31, 31)]])
@pytest.mark.parametrize("name", DEFORMABLE)
@pytest.mark.filterwarnings("ignore:images of:UserWarning")
def test_odd_sizes(name, sizes):
    """Also smaller than the coarsest stride, and with fewer tokens than queries."""
    model, criterion, _ = build_small(name)
    model.train(PRESETS[name].model.backbone_norm != "batch")           # one pixel has no statistics to learn from
    outputs = model(nested_tensor_from_tensor_list(images(*sizes)))
    assert outputs["pred_boxes"].shape == (len(sizes), model.num_queries, 4)
    assert all(outputs[key].isfinite().all() for key in ("pred_logits", "pred_boxes"))
    losses = criterion(outputs, targets(*[2] * len(sizes)))
    criterion.weighted_sum(losses).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", DEFORMABLE)
@torch.no_grad()
def test_all_padding(name):
    model = build_small(name)[0].eval()
    batch = nested_tensor_from_tensor_list(images((96, 96), (96, 96)))
    batch.mask[1] = True
    outputs = model(batch)
    assert all(outputs[key].isfinite().all() for key in ("pred_logits", "pred_boxes"))


@pytest.mark.parametrize("few", [True, False])
@torch.no_grad()
def test_proposals_of_a_small_image_alone_and_in_a_batch(few):
    """Proposals of one image do not depend on how much padding it has in its batch; where it has too few tokens, the
    queries that start from nothing are told."""
    torch.manual_seed(0)
    transformer = build_small("deformable_detr_resnet50_two_stage", num_queries=12 if few else 5)[0].transformer
    heads, queries = (nn.Linear(64, 3), nn.Linear(64, 4)), 12 if few else 5
    d = transformer.d_model
    tokens = torch.randn(2, d)
    alone = make_levels((1, 2), shapes=[(1, 2)], d_model=d)
    batched = make_levels((1, 2), (4, 9), shapes=[(4, 9)], d_model=d)
    memory = torch.randn(2, 36, d)
    memory[0, :2] = tokens
    first, _, invalid = transformer.propose(tokens[None], alone, *heads, queries)
    second, _, invalid_in_batch = transformer.propose(memory, batched, *heads, queries)
    assert torch.equal(invalid[0], invalid_in_batch[0]) and invalid[0].sum() == queries - 2
    for a, b in zip(first, second):
        torch.testing.assert_close(a[0], b[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_too_few_tokens_are_said():
    model = build_small("deformable_detr_resnet50_two_stage", num_queries=400)[0].eval()
    with pytest.warns(UserWarning, match=r"images of 64x64 have 85 tokens for 400 queries.*lower --num_queries"):
        outputs = model(images((64, 64)))
    assert outputs["pred_boxes"].shape == (1, 400, 4) and outputs["invalid_queries"].sum() >= 315
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_small("deformable_detr_resnet50_two_stage", num_queries=80)[0].eval()(images((64, 64)))


def test_two_stages_without_refinement():
    """The published code crashes; here the proposals stay the references of all layers."""
    model, criterion, _ = build_small("deformable_detr_resnet50", two_stage=True)
    assert len({id(head) for head in model.bbox_embed}) == 1 and len(model.bbox_embed) == 3
    outputs = model(images((64, 96), (80, 40)))
    losses = criterion(outputs, targets(3, 1))
    assert {"loss_ce_enc", "loss_giou_0"} <= set(losses)
    criterion.weighted_sum(losses).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("content", ["position", "token"])
def test_what_queries_start_with(content):
    """The encoded positions of their proposals, whatever the tokens were; or the tokens that proposed."""
    torch.manual_seed(0)
    transformer = build_small("deformable_detr_resnet50_two_stage", query_content=content)[0].transformer
    d_model, levels = transformer.d_model, make_levels((1, 4), shapes=[(1, 4)], d_model=64)
    class_head, box_head = nn.Linear(d_model, 3), nn.Linear(d_model, 4)
    nn.init.zeros_(box_head.weight)                                                 # all boxes as wide as the anchors

    def start(memory: Tensor) -> Tensor:
        queries = transformer.propose(memory, levels, class_head, box_head, 4)[0]
        return queries.content[0, queries.reference[0, :, 0].argsort()]             # from left to right

    one, other = torch.randn(2, 1, 4, d_model)
    assert torch.allclose(start(one), start(other), atol=1e-6) == (content == "position")
    if content == "token":
        assert torch.allclose(start(one), transformer.enc_output_norm(transformer.enc_output(one))[0], atol=1e-5)


def test_query_content_needs_two_stages():
    with torch.device("meta"), pytest.raises(ValueError, match="--query_content token is about proposals: add --two"):
        build_model("deformable_detr_resnet50", query_content="token")


@pytest.mark.parametrize("refine_boxes", [False, True])
def test_references_of_the_layers(refine_boxes, monkeypatch):
    """Refinement: the boxes of a layer, without gradient, are where the next one looks; else all look from one place."""
    seen = []
    model = build_small("deformable_detr_resnet50", with_box_refine=refine_boxes)[0]
    for layer in model.transformer.decoder.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(args[2]))
    outputs = model(images((64, 64)))
    first, second = (reference[:, :, 0] for reference in seen)
    assert first.shape[-1] == 2 and first.requires_grad
    if refine_boxes:
        torch.testing.assert_close(second, outputs["aux_outputs"][0]["pred_boxes"].detach())
        assert not second.requires_grad
    else:
        assert torch.equal(first, second)


def test_bfloat16_training():
    for name in DEFORMABLE:
        model, criterion, _ = build_small(name)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(images((64, 96), (80, 40)))
        assert outputs["pred_logits"].dtype == torch.bfloat16 and outputs["pred_boxes"].dtype == torch.float32
        criterion.weighted_sum(criterion(outputs, targets(3, 0))).backward()
        for parameter_name, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), (name, parameter_name)


def test_learning_rate_groups():
    config = DeformableDETRConfig(backbone="resnet18", position_embedding="learned", hidden_dim=32)
    model = config.build(NUM_CLASSES)[0]
    named = {id(p): name for name, p in model.named_parameters()}
    rates = {named[id(p)]: group["lr"] for group in config.parameter_groups(model, 1e-3) for p in group["params"]}
    assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, lr in rates.items():
        slow = "sampling_offsets" in name or "reference_points" in name
        assert lr == pytest.approx(2e-5 if name.startswith("backbone.0") else 1e-4 if slow else 1e-3), name
    twice = DeformableDETRConfig(backbone="resnet18", lr_backbone_names=("backbone", "sampling"))
    with torch.device("meta"):
        model = twice.build(NUM_CLASSES)[0]
    with pytest.raises(ValueError, match="sampling_offsets.weight is meant by --lr_backbone_names and by"):
        twice.parameter_groups(model, 1e-3)
    for flag in ("lr_backbone_names", "lr_linear_proj_names"):
        with pytest.raises(ValueError, match=f"--{flag} sampling_ofsets: no parameter's name has it in it; names are"):
            DeformableDETRConfig(backbone="resnet18", **{flag: ("sampling_ofsets",)}).parameter_groups(model, 1e-3)


def test_flags_reach_the_parts():
    for flags, find in (({"num_feature_levels": 2}, lambda m, c: m.transformer.level_embed.shape == (2, 256)),
                        ({"num_feature_levels": 5}, lambda m, c: len(m.input_proj) == 5),
                        ({"enc_n_points": 2}, lambda m, c: m.transformer.encoder.layers[0].self_attn.n_points == 2),
                        ({"dec_n_points": 2}, lambda m, c: m.transformer.decoder.layers[0].cross_attn.n_points == 2),
                        ({"position_embedding_scale": 1.0}, lambda m, c: m.backbone[-1].scale == 1.0),
                        ({"focal_alpha": 0.5}, lambda m, c: c.losses[0].alpha == 0.5
                         and c.matcher.class_cost.keywords == {"alpha": 0.5}),
                        ({"cls_loss_coef": 3}, lambda m, c: c.weight_dict["loss_ce_4"] == 3),
                        ({"with_box_refine": True}, lambda m, c: hasattr(m.transformer.decoder, "bbox_embed")),
                        ({"two_stage": True}, lambda m, c: "loss_ce_enc" in c.weight_dict)):
        with torch.device("meta"):
            changed, default = (build_model("deformable_detr_resnet50", backbone="resnet18", **extra)
                                for extra in (flags, {}))
        assert find(*changed[:2]) and not find(*default[:2]), flags


@pytest.mark.parametrize("flags, message", [
    ({"hidden_dim": 40}, "--hidden_dim 40: the levels' group normalisation has 32 groups"),
    ({"num_feature_levels": 0}, "--num_feature_levels 0: it must be at least 1"),
    ({"masks": True, "hidden_dim": 64}, "masks need hidden_dim"),
    ({"enc_layers": 0, "position_embedding": "learned"}, "the encoder alone uses positions; give --enc_layers 1 or more"),
    ({"eos_coef": 0.2}, "has no option 'eos_coef'")])
def test_flags_that_do_not_fit(flags, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_model("deformable_detr_resnet50", **flags)
