"""Exact padding: what a model says of an image does not depend on the batch the image is in."""
import math
import random
import sys
from types import ModuleType

import pytest
import torch
from small_models import build_small, images
from torch import Tensor, nn

from detr import list_models
from detr.backbone import Backbone, build_body
from detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from detr.padding import exact_upsample
from detr.presets import PRESETS
from detr.two_stage import best

TOLERANCE = 1e-4
# Every published architecture, every variant of Deformable DETR, PVT v1, v2 and its linear attention, ours.
MODELS: dict[str, dict] = {
    **{name: {} for name in ("detr_resnet50", "detr_resnet50_dc5", "detr_resnet50_panoptic", "tiny_detr",
                             "tiny_deformable_detr")},
    **{name: {} for name in list_models()
       if name.startswith(("deformable_detr_resnet50", "conditional", "dab", "tiny_conditional", "tiny_dab",
                           "tiny_dino"))},
    **{f"dino_resnet50_{levels}scale": {} for levels in (4, 5)},
    "detr_pvt_tiny": {"backbone": "pvt_tiny"},
    "detr_pvt_v2_b0": {"backbone": "pvt_v2_b0"},
    "detr_pvt_v2_b2_li": {"backbone": "pvt_v2_b2_li"},
    "deformable_detr_pvt_v2_b2": {"backbone": "pvt_v2_b0"},
}


def randomise(model: nn.Module) -> None:
    """No weight at a value that hides a mistake: shifts, scales and statistics of normalisations, and the last layers
    that begin at zero."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        with torch.no_grad():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and (value.ndim == 1 or value.std() == 0):
                value.add_(torch.randn_like(value) * 0.1)


def build(name: str, padding: str = "exact", **flags) -> nn.Module:
    model = build_small(name, padding=padding, **MODELS[name] | flags)[0].eval()
    randomise(model)
    return model


def some_sizes(seed: int, most: tuple[int, int]) -> list[tuple[int, int]]:
    """Up to five images, their sides from 1 pixel to ``most``, each power of two as likely."""
    draw = random.Random(seed)
    return [tuple(int(math.exp(draw.uniform(0, math.log(side + 0.99)))) for side in most)
            for _ in range(draw.randint(2, 5))]


class Chosen:
    """In place of ``best``: remembers which tokens were chosen for each image alone, and then chooses the same in a
    batch, where rounding may turn two that are as good as equal. That they are equal is checked. Tokens that are no
    padding come in the same order alone and in a batch."""

    def __init__(self, architecture: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranks: list[Tensor] = []
        self.architecture, self.monkeypatch = architecture, monkeypatch
        monkeypatch.setattr(architecture, "best", self.alone)

    def alone(self, scores: Tensor, mask: Tensor, num_queries: int, exact: bool) -> Tensor:
        assert exact and len(scores) == 1
        chosen = best(scores, mask, num_queries, exact)
        rank = (~mask).cumsum(1)[0] - 1
        self.ranks.append(torch.where(mask[0, chosen[0]], -1, rank[chosen[0]]))
        return chosen

    def together(self, scores: Tensor, mask: Tensor, num_queries: int, exact: bool) -> Tensor:
        own, rows = best(scores, mask, num_queries, exact), []
        for i, rank in enumerate(self.ranks):
            inside, outside = (~mask[i]).nonzero()[:, 0], mask[i].nonzero()[:, 0]
            row = torch.where(rank >= 0, inside[rank.clamp(min=0)], 0)
            row[rank < 0] = outside[:int((rank < 0).sum())]
            assert len(row.unique()) == num_queries
            valid = rank >= 0
            assert (scores[i, row[valid]] - scores[i, own[i]][valid]).abs().max() < TOLERANCE
            rows.append(row)
        return torch.stack(rows)

    def in_batches(self) -> None:
        self.monkeypatch.setattr(self.architecture, "best", self.together)


def differences(name: str, model: nn.Module, pictures: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The largest difference of each output between the images alone and in one batch."""
    architecture = sys.modules[type(model).__module__]
    chosen = Chosen(architecture, monkeypatch) if hasattr(architecture, "best") else None
    with torch.no_grad():
        alone = [model([picture]) for picture in pictures]
        if chosen:
            chosen.in_batches()
        batch = nested_tensor_from_tensor_list(pictures)
        together = model(batch)
    found: dict[str, float] = {}

    def compare(what: str, a: Tensor, b: Tensor) -> None:
        assert a.isfinite().all() and b.isfinite().all(), (name, what)
        found[what] = max(found.get(what, 0.0), (a - b).abs().max().item())

    for i, one in enumerate(alone):
        for what in ("pred_logits", "pred_boxes"):
            compare(what, one[what][0], together[what][i])
            for layer, same in zip(one.get("aux_outputs", ()), together.get("aux_outputs", ())):
                compare("aux", layer[what][0], same[what][i])
        if "pred_masks" in one:
            masks = one["pred_masks"][0]
            compare("pred_masks", masks, together["pred_masks"][i, :, :masks.shape[1], :masks.shape[2]])
    return found


def check(name: str, sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, **flags) -> None:
    found = differences(name, build(name, **flags), images(*sizes), monkeypatch)
    assert max(found.values()) < TOLERANCE, (name, sizes, found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:images of .* have .* tokens")
def test_alone_and_in_a_batch(name, monkeypatch):
    check(name, [(70, 150), (1, 1), (200, 64), (33, 257), (20, 90)], monkeypatch)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:images of .* have .* tokens")
def test_random_sizes(name, monkeypatch):
    check(name, some_sizes(len(name), most=(150, 1333)), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:images of .* have .* tokens")
def test_many_random_sizes(name, monkeypatch):
    for seed in range(12):
        with monkeypatch.context() as patch:
            check(name, some_sizes(seed, most=(400, 1333)), patch)


@pytest.mark.parametrize("flags", [{"backbone_norm": "group"}, {"backbone_norm": "batch"}, {"feature_strides": (16,)},
                                   {"position_embedding": "learned"}, {"in_channels": 1}], ids=lambda flags: [*flags][0])
def test_options(flags, monkeypatch):
    sizes = [(70, 150), (130, 64), (1, 40)]
    model = build("detr_resnet50", **flags)
    pictures = [picture[:flags.get("in_channels", 3)] for picture in images(*sizes)]
    found = differences("detr_resnet50", model, pictures, monkeypatch)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("strides", [(4,), (8, 32), (4, 8, 16, 32)])
def test_any_strides_as_levels(strides, monkeypatch):
    check("deformable_detr_resnet50", [(70, 150), (130, 64), (1, 40)], monkeypatch, feature_strides=strides)
    model = build("deformable_detr_resnet50", feature_strides=strides)
    assert model.backbone[0].strides == list(strides)


@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet50_dc5", "deformable_detr_resnet50", "detr_pvt_tiny",
                                  "detr_pvt_v2_b0"])
def test_legacy_depends_on_the_batch(name, monkeypatch):
    """The demonstration that the tests above can fail: the same models and images, padding as published."""
    found = differences(name, build(name, padding="legacy"), images((70, 150), (200, 64), (33, 257)), monkeypatch)
    assert found["pred_logits"] > 10 * TOLERANCE, found


@pytest.mark.parametrize("name", ["detr_resnet50", "deformable_detr_resnet50", "detr_pvt_v2_b0"])
def test_alone_exact_is_what_was_published(name):
    """An image without padding gets the published result, whatever its sides, from 32 pixels on."""
    legacy, exact = (build(name, padding=padding) for padding in ("legacy", "exact"))
    with torch.no_grad():
        for image in images((64, 96), (47, 131), (32, 33)):
            for what in ("pred_logits", "pred_boxes"):
                torch.testing.assert_close(exact([image])[what], legacy([image])[what], rtol=0, atol=1e-6)


def test_gradients_alone_and_in_a_batch():
    """What a batch teaches is the sum of what its images teach."""
    for name in ("detr_resnet50", "deformable_detr_resnet50_box_refine", "detr_pvt_v2_b0"):
        model, pictures = build(name), images((70, 110), (40, 150))

        def gradients(batches: list[list[Tensor]], model: nn.Module = model) -> dict[str, Tensor]:
            model.zero_grad()
            for batch in batches:
                out = model(batch)
                (out["pred_logits"].square().sum() + out["pred_boxes"].square().sum()).backward()
            return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

        alone, together = gradients([[picture] for picture in pictures]), gradients([pictures])
        assert alone.keys() == together.keys() and len(alone) > 50
        for key, value in alone.items():
            difference = (value - together[key]).abs().max() / max(value.abs().max().item(), 1e-3)
            assert difference < 1e-3, (name, key, difference)


def test_what_lies_in_the_padding_does_not_matter():
    """Not zeros, not even numbers: a batch that somebody padded with anything."""
    batch = nested_tensor_from_tensor_list(images((70, 110), (40, 150)))
    junk = NestedTensor(batch.tensors.masked_fill(batch.mask[:, None], float("nan")), batch.mask)      # without sizes
    for name in ("detr_resnet50", "deformable_detr_resnet50", "detr_pvt_tiny", "detr_pvt_v2_b0"):
        model = build(name)
        with torch.no_grad():
            a, b = model(batch), model(junk)
        assert torch.equal(a["pred_logits"], b["pred_logits"]), name


def test_masks_are_at_the_true_extent():
    body = build_body("resnet18", "frozen", False)
    batch = nested_tensor_from_tensor_list(images((65, 200), (97, 31), (1, 5)))
    features = Backbone(body, [0, 1, 2, 3], exact=True)(batch)
    for map, stride in zip(features.values(), (4, 8, 16, 32)):
        for mask, (h, w), size in zip(map.mask, batch.sizes, map.sizes):
            inside = torch.zeros_like(mask)
            inside[:-(-h // stride), :-(-w // stride)] = True                  # ceil, what the convolutions come to
            assert torch.equal(mask, ~inside) and size == (-(-h // stride), -(-w // stride))
        assert (map.tensors.abs().sum(1)[map.mask] == 0).all()


def test_extents_are_what_the_body_gives_alone():
    for name in ("resnet18", "resnet_tiny", "pvt_tiny", "pvt_v2_b0"):
        body = build_body(name, "frozen", False).eval()
        for image in images((32, 33), (47, 63), (65, 100)):
            with torch.no_grad():
                maps = body(image[None])
            assert body.extents(tuple(image.shape[1:])) == [tuple(map.shape[2:]) for map in maps], name


def test_sizes_from_a_mask():
    batch = nested_tensor_from_tensor_list(images((7, 9), (12, 4)))
    assert batch.sizes == [(7, 9), (12, 4)] and NestedTensor(batch.tensors, batch.mask).extents() == batch.sizes
    assert batch.to("cpu").sizes == batch.sizes
    assert batch.padded_share == pytest.approx(1 - (63 + 48) / (2 * 12 * 9))
    hole = batch.mask.clone()
    hole[1, 2, 2] = True
    with pytest.raises(ValueError, match="mask of image 1 of the batch .* rectangle at the top left"):
        NestedTensor(batch.tensors, hole).extents()
    with pytest.raises(ValueError, match="mask of image 0"):
        NestedTensor(batch.tensors, torch.ones_like(batch.mask)).extents()


def test_upsampling_follows_each_images_own_ratio():
    coarse, fine = [(2, 3), (4, 1)], [(5, 8), (9, 3)]
    x = torch.randn(2 * 3, 6, 4, 3)                                            # three maps of each of two images
    up = exact_upsample(x, [s for s in coarse for _ in range(3)], [s for s in fine for _ in range(3)], (9, 8))
    for i in range(6):
        (h, w), (hf, wf) = coarse[i // 3], fine[i // 3]
        alone = nn.functional.interpolate(x[i:i + 1, :, :h, :w], (hf, wf), mode="nearest")
        assert torch.equal(up[i:i + 1, :, :hf, :wf], alone)
        assert up[i, :, hf:].abs().sum() == 0 and up[i, :, :, wf:].abs().sum() == 0


def test_presets_and_their_padding():
    for name, preset in PRESETS.items():
        ours = name.startswith("tiny_") or "pvt" in name
        assert preset.model.padding == ("exact" if ours else "legacy"), name


def test_padding_never_proposes():
    """Padding takes no query from a token, where its constant score is above the tokens' too."""
    scores = torch.tensor([[0.1, 0.9, 0.9, 0.3, 0.2]])
    mask = torch.tensor([[False, True, True, False, False]])
    assert best(scores, mask, 2).tolist() == [[1, 2]]                           # as published
    assert best(scores, mask, 2, exact=True).tolist() == [[3, 4]]
    assert best(scores, mask, 4, exact=True)[0, :3].tolist() == [3, 4, 0]
