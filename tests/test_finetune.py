"""A checkpoint for other classes and queries, and parts that stay as they are. Weights are made here, of small models;
what must be kept is compared bit by bit with the checkpoint, and what is computed with the model that the checkpoint is
of."""
import copy
import dataclasses
import functools
import itertools

import pytest
import torch
from small_models import images, targets
from torch import nn

from datasets.annotations import COCO_CATEGORIES, class_table
from datasets.annotations import num_classes as slots
from detr import checkpoint
from detr.config import TrainConfig
from detr.finetune import (
    Counts,
    Row,
    adapt,
    counts,
    detector,
    freeze,
    layout,
    match_classes,
    query_usage,
    spelled,
    table,
)
from detr.nested_tensor import as_nested_tensor
from detr.optimization import make_optimizer, moving_average
from detr.presets import PRESETS
from detr.structures import Category

SMALL = {"backbone": "resnet_tiny", "hidden_dim": 32, "nheads": 4, "dim_feedforward": 48, "enc_layers": 1,
         "dec_layers": 2, "num_queries": 7}
LEVELS = {**SMALL, "hidden_dim": 64, "num_feature_levels": 2}            # two channels in each group of normalisation
MASKS = {**LEVELS, "hidden_dim": 128, "nheads": 8, "masks": True}
VARIANTS = {
    "detr": ("detr_resnet50", SMALL),
    "detr masks": ("detr_resnet50", MASKS),
    "deformable": ("deformable_detr_resnet50", LEVELS),
    "refine": ("deformable_detr_resnet50_box_refine", LEVELS),
    "two-stage": ("deformable_detr_resnet50", {**LEVELS, "two_stage": True}),
    "two-stage refine": ("deformable_detr_resnet50_two_stage", LEVELS),
    "deformable masks": ("deformable_detr_resnet50_two_stage", MASKS),
    "tiny_detr": ("tiny_detr", SMALL),
    "tiny_deformable_detr": ("tiny_deformable_detr", {**LEVELS, "enc_layers": 0}),
}
LEARNED = ["detr", "detr masks", "deformable", "refine"]            # queries; those of the others begin at proposals

COCO = class_table(COCO_CATEGORIES)
BCCD = class_table({1: "Platelets", 2: "RBC", 3: "WBC"})
SUBSET = class_table({1: "zebra", 2: "person", 3: "drone", 4: "hot_dog"})
TABLES = {"1 class": class_table({7: "cell"}), "BCCD": BCCD, "subset": SUBSET,
          "80 classes": class_table({i + 1: name for i, name in enumerate(COCO_CATEGORIES.values())}),
          "365 classes": class_table({i: f"object {i}" for i in range(364)} | {400: "toothbrush"}), "COCO": COCO}


def hold(modules: list) -> None:
    """As ``train_one_epoch`` does."""
    for module in modules:
        module.eval()


def settings(variant, **flags):
    name, small = VARIANTS[variant]
    config = PRESETS[name].model
    small = {flag: value for flag, value in {**small, **flags}.items() if hasattr(config, flag)}
    return dataclasses.replace(config, **small)


def builder(variant, **flags):
    return lambda classes, queries: settings(variant, **flags, num_queries=queries).build(classes)[0]


@functools.cache
def shape(variant, **flags):
    return layout(builder(variant, **flags))


def weights(variant, classes=91, queries=7, seed=0, **flags):
    """The weights of a model as if it were trained: none is zero or alike."""
    torch.manual_seed(seed)
    model = builder(variant, **flags)(classes, queries)
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if value.is_floating_point() and "running_var" not in name:
                value += 0.02 * torch.randn_like(value)
    return {name: value.clone() for name, value in model.state_dict().items()}


def fitted(variant, state, old, new, queries=7, seed=1, usage=None, **flags):
    """A model for the classes ``new``, and how it came to the weights ``state``."""
    torch.manual_seed(seed)
    model = builder(variant, **flags)(slots(new), queries)
    fresh = copy.deepcopy(model.state_dict())
    adapted = adapt(shape(variant, **flags), model, state, old, new, "old.pth", usage=usage)
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())      # nothing loaded yet
    checkpoint.load_model(model, adapted.state_dict, "old.pth")
    return model, adapted, fresh


def actions(adapted):
    return {row.name: row.action for row in adapted.rows}


def said(adapted, name):
    return next(row.why for row in adapted.rows if row.name == name)


# What has rows for classes and queries.

@pytest.mark.parametrize("variant", VARIANTS)
def test_what_grows_with_classes_and_queries(variant):
    config = settings(variant)
    model, criterion, _ = config.build(6)
    names = model.state_dict()
    found = shape(variant)
    assert set(found.classes) == {name for name in names if ".class_embed." in f".{name}"}
    assert {(axis.dim, axis.extra) for axis in found.classes.values()} == {(0, int(variant.startswith("detr")))}
    assert set(found.queries) == {name for name in names if name.endswith("query_embed.weight")}
    assert bool(found.queries) == (variant in LEARNED)
    agnostic = criterion.class_agnostic_proposals and "loss_ce_enc" in criterion.weight_dict
    assert bool(found.agnostic) == agnostic
    assert counts(found, names, "x") == Counts(6, 7 if variant in LEARNED else None)


@pytest.mark.parametrize("variant", ["two-stage", "two-stage refine", "tiny_deformable_detr", "deformable masks"])
def test_the_agnostic_head_is_the_one_that_scores_proposals(variant):
    model = builder(variant)(3, 7).eval()
    inner = getattr(model, "detr", model)
    seen = []
    inner.class_agnostic_head.register_forward_hook(lambda module, args, output: seen.append(output))
    outputs = model(images((64, 64)))
    assert any(torch.equal(one, outputs["enc_outputs"]["pred_logits"]) for one in seen)


class Other(nn.Module):
    """An architecture that nobody has written: classes in another dimension, two rows more, and tables of both."""

    def __init__(self, classes, queries):
        super().__init__()
        self.labels = nn.Embedding(classes + 1, 4)                              # as denoising has, with "unknown"
        self.prototypes = nn.Parameter(torch.randn(4, classes + 2))
        self.anchors = nn.Parameter(torch.randn(2, queries, 4))
        self.pairs = nn.Parameter(torch.randn(queries, classes))
        self.body = nn.Linear(4, 4)


def test_an_architecture_to_come():
    found = layout(Other)
    assert found.classes == {"labels.weight": (0, 1), "prototypes": (1, 2), "pairs": (1, 0)}
    assert found.queries == {"anchors": (1, 0), "pairs": (0, 0)}
    old, new = class_table({1: "a", 2: "b", 3: "c"}), class_table({1: "c", 2: "d"})
    state, model = Other(3, 2).state_dict(), Other(2, 3)
    result = adapt(found, model, state, old, new, "x").state_dict
    assert torch.equal(result["labels.weight"][[0, 2]], state["labels.weight"][[2, 3]])
    assert torch.equal(result["labels.weight"][1], model.labels.weight[1])
    assert torch.equal(result["prototypes"][:, [0, 2, 3]], state["prototypes"][:, [2, 3, 4]])
    assert torch.equal(result["prototypes"][:, 1], model.prototypes[:, 1])
    assert torch.equal(result["anchors"][:, :2], state["anchors"])
    assert torch.equal(result["pairs"][:2, 0], state["pairs"][:, 2])
    assert torch.equal(result["pairs"][:, 1], model.pairs[:, 1])


def test_what_grows_otherwise_is_refused():
    with pytest.raises(ValueError, match=r"weight is \[10, 3\], and \[12, 3\] with one class more: a checkpoint can be"):
        layout(lambda classes, queries: nn.Linear(3, 2 * classes))
    with pytest.raises(ValueError, match=r"weight is \[7, 5\], and \[8, 6\] with one class more"):
        layout(lambda classes, queries: nn.Linear(classes, classes + 2))


# Classes.

@pytest.mark.parametrize("variant", VARIANTS)
def test_from_a_coco_head_to_other_classes(variant):
    """One step of training with each class table, all finite; and the sums of the table."""
    state = weights(variant)
    for name, new in TABLES.items():
        model, adapted, _ = fitted(variant, state, COCO, new)
        did = [row.action for row in adapted.rows]
        assert len(did) == len(model.state_dict()) == len(state) and set(did) <= {"loaded", "resized"}
        resized = [row.name for row in adapted.rows if row.action == "resized"]
        assert set(resized) == ({n for n in state if "class_embed" in n} if name != "COCO" else set())
        assert f"tensors: {len(did) - len(resized)} loaded, {len(resized)} resized, 0 new, 0 left out" in \
            table(adapted.rows)
        if name not in ("1 class", "BCCD", "365 classes"):
            continue
        criterion = settings(variant).build(slots(new))[1]
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        truth = targets(1, 2)
        for target in truth:
            target["labels"] %= slots(new)
        arguments = (truth,) if getattr(model, "takes_targets", False) else ()
        losses = criterion(model.train()(images((64, 64), (64, 64)), *arguments), truth)
        loss = criterion.weighted_sum(losses)
        loss.backward()
        optimizer.step()
        assert loss.isfinite() and all(p.isfinite().all() for p in model.parameters())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_kept_new_and_no_object(variant):
    """``SUBSET`` has zebra (24), person (1), something new, and hot dog (58), written otherwise, as labels 0 to 3."""
    state = weights(variant)
    model, adapted, fresh = fitted(variant, state, COCO, SUBSET)
    one_head, agnostic_ones = variant == "two-stage", shape(variant).agnostic
    for name, value in model.state_dict().items():
        if "class_embed" not in name:
            assert torch.equal(value, state[name]), name
            continue
        agnostic = one_head or name in agnostic_ones
        of = [0 if agnostic else 24, 1, None, 58, *[91] * variant.startswith("detr")]
        assert len(value) == len(of)
        for label, row in enumerate(of):
            assert torch.equal(value[label], fresh[name][label] if row is None else state[name][row]), (name, label)
    assert "classes: 3 of 4 keep their weights; 3 kept: zebra, person, hot_dog; 1 new: drone; 77 left out: " \
        in adapted.notes[0]
    assert "class 'hot_dog' (id 4) takes the weights of 'hot dog' (id 58), which is written otherwise" in adapted.notes[1]
    row_0 = "class 'zebra', label 0, begins with the row that scores proposals"
    assert any(row_0 in note for note in adapted.notes) == one_head


@pytest.mark.parametrize("variant", sorted({*VARIANTS} - {"tiny_detr"}))      # whose proposals compete by classes
def test_kept_classes_are_scored_as_before(variant):
    state = weights(variant)
    before = builder(variant)(91, 7).double().eval()
    before.load_state_dict(state)
    after = fitted(variant, state, COCO, SUBSET)[0].double().eval()
    picture = [image.double() for image in images((64, 96))]
    old, new = before(picture), after(picture)
    torch.testing.assert_close(new["pred_boxes"], old["pred_boxes"], atol=0, rtol=0)
    of = {0: 24, 1: 1, 3: 58}
    if variant.startswith("detr"):
        of[4] = 91                                                              # "no object"
    if variant == "two-stage":
        del of[0]                                                               # one head: row 0 scores proposals
    same = [(new["pred_logits"][..., [*of]], old["pred_logits"][..., [*of.values()]])]
    if "enc_outputs" in new:
        same.append((new["enc_outputs"]["pred_logits"][..., 0], old["enc_outputs"]["pred_logits"][..., 0]))
    for actual, expected in same:
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("classes", [COCO, SUBSET], ids=["COCO", "subset"])
def test_the_same_classes_are_the_same_weights(variant, classes):
    state = weights(variant, slots(classes))
    model, adapted, _ = fitted(variant, state, classes, classes)
    assert set(actions(adapted).values()) == {"loaded"}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_there_and_back():
    """Order and labels of classes mean nothing, their names everything."""
    state = weights("refine", 4)
    mixed = class_table({1: "hot_dog", 2: "drone", 3: "zebra", 4: "person"})
    there = fitted("refine", state, SUBSET, mixed)[1]
    assert {row.action for row in there.rows if "class_embed" in row.name} == {"resized"}
    back = fitted("refine", there.state_dict, mixed, SUBSET)[1]
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict.items())


def test_a_checkpoint_without_a_class_table():
    state = weights("detr", 3)
    model, adapted, fresh = fitted("detr", state, [], BCCD)
    assert "old.pth has no class table, so nobody knows what its rows are: all classes begin anew" in adapted.notes
    assert torch.equal(model.class_embed.weight[:3], fresh["class_embed.weight"][:3])
    assert torch.equal(model.class_embed.weight[3], state["class_embed.weight"][3])             # "no object"


def named(*names):
    return [Category(label, label + 10, name) for label, name in enumerate(names)]


def test_names():
    assert spelled(" Traffic_Light-  2\t") == "traffic light 2" and spelled("STRASSE") == spelled("straße")
    assert match_classes(named("b", "a"), named("a", "b", "c")).kept == {0: 1, 1: 0}
    assert match_classes(named("a"), named("A ")).kept == {0: 0}
    assert match_classes(named("a"), named("ab")).kept == {}
    found = match_classes(named("Cat", "cat"), named("cat"))                    # the exact one, and nothing to say
    assert found.kept == {0: 1} and len(found.notes) == 1
    assert match_classes(named("cat"), named("Cat", "cat")).kept == {1: 0}      # and it is taken once
    assert match_classes(named("cat", "CAT"), named("Cat", "cat")).kept == {1: 0, 0: 1}


@pytest.mark.parametrize("old, new", [(("CAT", "cat"), ("Cat",)), (("cat",), ("Cat", "CAT")), (("a", "a"), ("a",)),
                                      (("a",), ("a", "a"))])
def test_names_that_could_be_several(old, new):
    with pytest.raises(ValueError, match=r"which class is which\? The data has '\w+' \(id \d+\).*, the checkpoint"):
        match_classes(named(*old), named(*new))


def test_a_class_table_of_something_else():
    state = weights("detr", 3)
    with pytest.raises(ValueError, match=r"old.pth has a class of label 90, and its model rows for 0 to 2"):
        fitted("detr", state, COCO, BCCD)


# Queries.

@pytest.mark.parametrize("variant", LEARNED)
def test_more_queries(variant):
    state = weights(variant, 3, queries=20)
    model, adapted, _ = fitted(variant, state, BCCD, BCCD, queries=70)
    name = next(name for name in state if name.endswith("query_embed.weight"))
    old, new = state[name], model.state_dict()[name]
    assert [row.name for row in adapted.rows if row.action == "resized"] == [name] and len(new) == 70
    assert torch.equal(new[:20], old)
    noise = (new[20:] - old[torch.arange(20, 70) % 20]) / old.std(0)
    assert abs(noise.std() - 0.1) < 0.01 and abs(noise.mean()) < 0.01
    assert torch.equal(fitted(variant, state, BCCD, BCCD, queries=70)[0].state_dict()[name], new)
    assert said(adapted, name) == "20 -> 70 queries: the old ones, then copies with noise"


@pytest.mark.parametrize("variant", LEARNED)
def test_fewer_queries(variant):
    state = weights(variant, 3, queries=30)
    usage = torch.rand(30, generator=torch.Generator().manual_seed(0))
    name = next(name for name in state if name.endswith("query_embed.weight"))
    most = sorted(sorted(range(30), key=lambda q: -usage[q])[:5])
    model, adapted, _ = fitted(variant, state, BCCD, BCCD, queries=5, usage=usage)
    assert torch.equal(model.state_dict()[name], state[name][most])
    assert said(adapted, name) == "30 -> 5 queries: the most used"
    model, adapted, _ = fitted(variant, state, BCCD, BCCD, queries=5)
    assert torch.equal(model.state_dict()[name], state[name][:5])
    assert said(adapted, name) == "30 -> 5 queries: the first, as nobody knows their usage"
    with pytest.raises(ValueError, match=r"usage is \[4\], and the checkpoint has 30 queries"):
        fitted(variant, state, BCCD, BCCD, queries=5, usage=usage[:4])


def test_one_query_becomes_several_that_differ():
    new = fitted("detr", weights("detr", 3, queries=1), BCCD, BCCD, queries=4)[0].query_embed.weight
    assert new.isfinite().all() and all((a - b).abs().min() > 0 for a, b in itertools.combinations(new, 2))


@pytest.mark.parametrize("variant", sorted({*VARIANTS} - {*LEARNED}))
def test_proposals_have_no_weights_of_queries(variant):
    adapted = fitted(variant, weights(variant, 3, queries=7), BCCD, BCCD, queries=9)[1]
    assert set(actions(adapted).values()) == {"loaded"}


@pytest.mark.parametrize("variant", ["detr", "detr masks", "deformable"])
def test_how_much_queries_are_used(variant):
    state, loaded = weights(variant, 4), builder(variant)(4, 7).eval()
    loaded.load_state_dict(state)
    batches = [(as_nested_tensor(images(*sizes)), None) for sizes in (((64, 64), (64, 64)), ((64, 96),))]
    expected = torch.zeros(7)
    for samples, _ in batches:
        for logits in loaded(samples)["pred_logits"].detach():
            expected += (logits.exp() / logits.exp().sum(-1, keepdim=True))[:, :4].amax(-1) \
                if variant.startswith("detr") else (1 / (1 + (-logits).exp())).amax(-1)
    torch.manual_seed(5)
    rng = torch.random.get_rng_state()
    model = detector(builder(variant), shape(variant), state, "old.pth")
    assert torch.equal(torch.random.get_rng_state(), rng)
    model.train()
    model.transformer.eval()
    modes = [module.training for module in model.modules()]
    torch.testing.assert_close(query_usage(model, batches, 4), expected, atol=1e-5, rtol=0)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="no images to see which queries are used"):
        query_usage(model, [], 4)


# Everything else.

def test_masks_begin_anew_on_a_box_model():
    flags = {"hidden_dim": 128, "nheads": 8}
    state = weights("detr", masks=False, **flags)
    model, adapted, fresh = fitted("detr masks", state, COCO, BCCD)
    did = actions(adapted)
    for name, value in model.state_dict().items():
        if not name.startswith("detr."):
            assert did[name] == "new" and torch.equal(value, fresh[name])
        elif "class_embed" not in name:
            assert did[name] == "loaded" and torch.equal(value, state[name.removeprefix("detr.")])
    assert list(did.values()).count("new") == len(fresh) - len(state) > 10
    assert "mask_head.*" in table(adapted.rows)
    assert counts(shape("detr masks"), state, "x") == Counts(91, 7)
    back = fitted("detr", model.state_dict(), BCCD, BCCD, **flags)[1]
    assert list(actions(back).values()).count("left out") == len(fresh) - len(state)
    assert len(back.rows) == len(fresh)


@pytest.mark.parametrize("masks", [False, True])
def test_the_table_of_denoising_comes_and_goes(masks):
    """A detector that does not denoise learns to, and the other way round; also under a mask head."""
    flags = {"masks": True, "hidden_dim": 128, "nheads": 8} if masks else {}
    name = "detr.label_enc.weight" if masks else "label_enc.weight"
    state = weights("two-stage refine", **flags)
    model, adapted, fresh = fitted("two-stage refine", state, COCO, BCCD, **flags, denoising=True)
    assert actions(adapted)[name] == "new" and torch.equal(model.state_dict()[name], fresh[name])
    assert "did not denoise" in said(adapted, name) and list(actions(adapted).values()).count("new") == 1
    back = fitted("two-stage refine", weights("two-stage refine", 91, **flags, denoising=True), COCO, BCCD, **flags)[1]
    assert actions(back)[name] == "left out" and said(back, name) == "the model does not denoise"
    with pytest.raises(ValueError, match="1 unexpected"):
        fitted("two-stage refine", state | {"label_end.weight": torch.zeros(3, 3)}, COCO, BCCD, **flags)


def test_shared_heads_that_a_file_has_once():
    state = weights("two-stage", 3)
    once = {name: value for name, value in state.items()
            if "class_embed" not in name or name.startswith("class_embed.0.")}
    model, adapted, _ = fitted("two-stage", once, BCCD, BCCD)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert set(actions(adapted).values()) == {"loaded"}
    assert any(row.why == "one with class_embed.0.weight" for row in adapted.rows)
    torn = state | {"class_embed.1.bias": state["class_embed.1.bias"] + 1}
    with pytest.raises(ValueError, match=r"1 different, though one in the model \(\S+embed.0.bias and class_embed.1"):
        fitted("two-stage", torn, BCCD, BCCD)


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize("change, message", [
    (lambda s: without(s, "input_proj.bias"), r"1 missing \(input_proj.bias\)"),
    (lambda s: without(s, "class_embed.bias"), r"1 missing \(class_embed.bias\)"),
    (lambda s: s | {"extra.weight": torch.zeros(2)}, r"1 unexpected \(extra.weight\)"),
    (lambda s: s | {"mask_head.out_lay.bias": torch.zeros(1)}, r"1 unexpected \(mask_head.out_lay.bias\)"),
    (lambda s: s | {"input_proj.bias": torch.zeros(5)}, r"1 of another shape \(input_proj.bias \[5\] for \[32\]\)"),
    (lambda s: s | {"class_embed.weight": torch.zeros(4, 5)}, r"class_embed.weight \[4, 5\] for \[4, 32\]"),
    (lambda s: s | {"query_embed.weight": torch.zeros(7)}, r"query_embed.weight \[7\] for \[7, 32\]"),
    (lambda s: s | {"class_embed.bias": torch.zeros(9)}, r"different numbers of classes: class_embed.weight for 3, "
                                                         r"class_embed.bias for 8"),
])
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match="old.pth .*" + message) as error:
        fitted("detr", change(weights("detr", 3)), BCCD, BCCD)
    assert any(remedy in str(error.value) for remedy in ("is not whole", "leave out the flags that change it, or name"))


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match=r"has no class_embed.0.weight of a size that tells of classes"):
        counts(shape("refine"), weights("detr"), "old.pth")
    with pytest.raises(ValueError, match=r"old.pth does not fit the model: \d+ missing .*; \d+ unexpected"):
        fitted("refine", weights("detr"), COCO, BCCD)
    with pytest.raises(ValueError, match=r"does not fit the model: \d+ unexpected \(transformer.decoder.bbox_embed"):
        fitted("deformable", weights("refine"), COCO, BCCD)


def test_counters_of_batches_are_free():
    """Frozen norms have none, and some files leave them out."""
    counted = weights("tiny_detr", 3)
    counters = [name for name in counted if name.endswith("num_batches_tracked")]
    assert counters
    adapted = fitted("tiny_detr", without(counted, *counters), BCCD, BCCD)[1]
    assert [row.name for row in adapted.rows if row.action == "new"] == counters
    adapted = fitted("tiny_detr", counted, BCCD, BCCD, backbone_norm="frozen")[1]
    assert [row.name for row in adapted.rows if row.action == "left out"] == counters


def test_the_table():
    state = weights("two-stage refine")
    text = table(fitted("two-stage refine", state, COCO, BCCD)[1].rows)
    lines = [line.split(maxsplit=3) for line in text.splitlines()]
    backbone = sum(name.startswith("backbone.") for name in state)
    assert ["backbone.*", str(backbone), "loaded"] in lines
    assert ["class_embed.0..1.*", "4", "resized", "91 -> 3 classes, 0 of them by name"] in lines
    assert ["class_embed.2.*", "2", "resized", "91 -> 3 classes, 0 of them by name, row 0 stays any object"] in lines
    assert sum(int(line[1]) for line in lines[:-1]) == len(state) and len(lines) < 25
    rows = [Row("a.1.w", "loaded"), Row("a.2.w", "loaded"), Row("a.10.w", "resized", "why"), Row("b", "left out", "so")]
    assert table(rows).splitlines() == ["a.1..2.*  2  loaded", "a.10.w    1  resized   why", "b         1  left out  so",
                                        "tensors: 2 loaded, 1 resized, 0 new, 1 left out"]


# Freezing.

BATCH_NORM = {"backbone_norm": "batch", "from_scratch": True}
PARTS = {"detr": "backbone,encoder", "detr masks": "backbone, decoder", "deformable": "backbone,encoder,queries",
         "refine": "decoder,input_proj", "two-stage": "backbone,class_heads", "two-stage refine": "encoder,box_heads",
         "deformable masks": "detr", "tiny_detr": "backbone,transformer.proposals",
         "tiny_deformable_detr": "backbone,input_proj"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_parts_stay_bit_by_bit(variant):
    """Three steps with batch norms, dropout, weight decay, and a moving average of the weights."""
    config = settings(variant, **BATCH_NORM, dropout=0.1, lr_backbone=1e-3)
    torch.manual_seed(0)
    model, criterion, _ = config.build(5)
    frozen = freeze(model, [PARTS[variant]])
    start = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(config.parameter_groups(model, 1e-3), TrainConfig(weight_decay=0.1))
    ema = moving_average(model, 0.5)
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for step in range(3):
        model.train()
        hold(frozen.modules)
        truth = targets(1, 2)
        arguments = (truth,) if getattr(model, "takes_targets", False) else ()
        torch.manual_seed(step)
        losses = criterion(model([x + step for x in images((64, 64), (48, 64))], *arguments), truth)
        optimizer.zero_grad()
        criterion.weighted_sum(losses).backward()
        optimizer.step()
        ema.update_parameters(model)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)           # none is unused
    fixed = {id(model.get_parameter(name)) for name in frozen.names}
    assert not fixed & ours and fixed
    aliases = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in fixed]
    prefixes = {"detr." * ("masks" in variant) + "backbone."} if "backbone" in PARTS[variant] else set()
    buffers = [name for name in start if name.startswith(tuple(prefixes))] if prefixes else []
    if variant == "deformable masks":
        buffers = [name for name in start if name.startswith("detr.")]
    assert variant in ("refine", "two-stage refine") or any("running_mean" in name for name in buffers)
    for state in (model.state_dict(), ema.module.state_dict()):
        for name in {*aliases, *buffers}:
            assert torch.equal(state[name], start[name]), name
    changed = [name for name, p in model.named_parameters() if id(p) not in fixed and p.requires_grad
               and not torch.equal(p, start[name])]
    assert len(changed) > 0.9 * sum(p.requires_grad for p in model.parameters())
    assert {id(p) for p in model.parameters() if p.requires_grad} == ours
    if not prefixes and variant != "deformable masks":                          # and what is not frozen, learns
        assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items() if "running" in name)


def test_without_hold_batch_norms_would_move():
    """The test above can fail."""
    model = settings("tiny_detr").build(5)[0]
    frozen = freeze(model, ["backbone"])
    before = copy.deepcopy(model.state_dict())
    model.train()(images((64, 64)))
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.load_state_dict(before)
    model.train()
    hold(frozen.modules)
    model(images((64, 64)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_is_dropped_in_frozen_parts():
    model = settings("detr", dropout=0.5).build(5)[0].train()
    picture = images((64, 64))

    def twice():
        with torch.no_grad():
            return torch.equal(model(picture)["pred_logits"], model(picture)["pred_logits"])

    hold(freeze(model, ["encoder"]).modules)
    assert not twice()
    hold(freeze(model, ["decoder"]).modules)
    assert twice()


@pytest.mark.parametrize("variant, part, expected", [
    ("detr", "backbone", "backbone."), ("detr", "encoder", "transformer.encoder."), ("detr", "queries", "query_embed."),
    ("detr", "decoder", "transformer.decoder."), ("detr", "input_proj", "input_proj."),
    ("detr", "class_embed", "class_embed"), ("detr masks", "backbone", "detr.backbone."),
    ("detr masks", "mask_head", "mask_head."), ("detr masks", "detr", "detr."),
    ("detr masks", "detr.class_embed.bias", "detr.class_embed.bias"),
    ("deformable", "transformer.encoder.layers.0.linear1", "transformer.encoder.layers.0.linear1."),
    ("refine", "decoder", "transformer.decoder.layers."), ("two-stage", "decoder", "transformer.decoder.layers."),
    ("two-stage refine", "class_heads", "class_embed."),
    ("deformable", "transformer.level_embed", "transformer.level_embed"),
])
def test_words_and_beginnings_of_names(variant, part, expected):
    """By any of a tensor's names: published models have the heads a second time, under the decoder."""
    model = settings(variant).build(5)[0]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name.startswith(expected)}
    names = freeze(model, [part]).names
    assert {id(model.get_parameter(name)) for name in names} == expected and expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained - set(names)


def test_layer_1_is_not_layer_10():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(11))})
    assert freeze(model, ["layers.1"]).names == ["layers.1.weight", "layers.1.bias"]


@pytest.mark.parametrize("variant, parts, message", [
    ("detr", ["encodr"], r"--freeze encodr: this model has nothing of that name; did you mean encoder\?"),
    ("detr", ["backbone", "backbone.0.body.layer9"], r"layer9: .*did you mean backbone.0.body.layer\d\?"),
    ("detr masks", ["backbon"], r"did you mean backbone\?"),
    ("tiny_deformable_detr", ["encoder"], "this model has no encoder; it has backbone, decoder, input_proj"),
    ("two-stage", ["queries"], "this model has no queries; it has backbone, encoder, decoder"),
    ("detr", ["transformer.encoder.layers.0.dropout"], "this model has nothing of that name"),
    ("detr", [""], "this model has nothing of that name"),
    ("detr", ["backbone", "transformer", "class_embed,bbox_embed,query_embed,input_proj"],
     "nothing is left to train; leave a part out"),
])
def test_parts_that_cannot_be_frozen(variant, parts, message):
    model = settings(variant).build(5)[0]
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        freeze(model, parts)
    assert [p.requires_grad for p in model.parameters()] == before
