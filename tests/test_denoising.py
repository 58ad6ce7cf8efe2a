"""Denoising queries: noise, boxes, labels and mask of the published code; who may look at whom, which objects they know,
and how much noise there is, against definitions written out."""
import pytest
import torch
from cases import check, load_case
from torch import Tensor, nn

from detr.boxes import box_cxcywh_to_xyxy, inverse_sigmoid
from detr.denoising import Denoising, Noise, Noising, denoise, draw_noise, join, number_of_groups, separate

CLASSES, QUERIES = 11, 6
DINO, DN = (Noising(100, 0.4, 0.5, contrastive) for contrastive in (True, False))
COUNTS = [(3, 5), (1,), (0, 2, 1), (0, 7), (120, 3), (60, 60)]


def make_targets(*counts: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"labels": torch.randint(CLASSES, (n,), generator=generator),
             "boxes": torch.rand(n, 4, generator=generator) * 0.3 + 0.35} for n in counts]


def made(counts: tuple[int, ...], noising: Noising = DINO, seed: int = 0) -> tuple[list[dict[str, Tensor]], Denoising]:
    targets = make_targets(*counts)
    found = denoise(targets, noising, CLASSES, QUERIES, generator=torch.Generator().manual_seed(seed))
    assert found is not None
    return targets, found


# -- the published code -----------------------------------------------------------------------------------------------

def test_published_noise_and_queries():
    """The same random numbers from the same seed; and the same queries from the recorded numbers."""
    case = load_case("dino_denoising")
    noising = Noising(case.spec["args"]["dn_number"], case.spec["args"]["dn_box_noise_scale"],
                      case.spec["args"]["dn_label_noise_ratio"], contrastive=True)
    torch.manual_seed(case.spec["torch_seed"])
    noise = Noise(*(case.expected[f"noise.{name}"] for name in ("label", "new_label", "sign", "box")))
    for name, value in draw_noise(noising, len(noise.chance), 91)._asdict().items():
        assert torch.equal(value, getattr(noise, name).to(value.dtype)), name
    found = denoise(case.targets(), noising, 91, case.spec["args"]["num_queries"], noise)
    assert found.groups == case.spec["dn_meta"]["num_dn_group"]
    assert found.labels.shape[1] == case.spec["dn_meta"]["pad_size"]
    check(case, "dn.label", found.labels.masked_fill(found.mask, -1))
    check(case, "dn.box", inverse_sigmoid(found.boxes), **case.spec["expected"]["dn.box"]["tolerance"])
    check(case, "dn.attn_mask", found.attn_mask)


@pytest.mark.parametrize("number", [1, 2, 7, 49, 50, 51, 75, 99, 100, 101, 300])
@pytest.mark.parametrize("most", [1, 2, 3, 7, 50, 51, 99, 101, 400])
def test_number_of_groups(number, most):
    """As published: of twice the number, if that is 100 or more, a group takes two for each object of an image."""
    doubled = 2 * number
    published = doubled // (2 * most) if doubled >= 100 else doubled
    assert number_of_groups(number, most) == max(1, published)


# -- who sees whom, and what is known ---------------------------------------------------------------------------------

@pytest.mark.parametrize("noising", [DINO, DN, DINO._replace(number=3), DN._replace(number=51)])
@pytest.mark.parametrize("counts", COUNTS)
def test_who_may_look_at_whom(counts, noising):
    _, found = made(counts, noising)
    most, parts = max(counts), 1 + noising.contrastive
    size = most * parts
    assert found.labels.shape == (len(counts), found.groups * size)
    assert found.attn_mask.shape == 2 * (found.groups * size + QUERIES,)
    group = [i // size for i in range(found.groups * size)] + [None] * QUERIES
    step = max(1, len(group) // 60)                                         # a part of the larger ones
    for row in [*range(0, len(group), step), *range(len(group) - QUERIES, len(group))]:
        sees = (~found.attn_mask[row]).nonzero().flatten().tolist()
        assert sees == [i for i, other in enumerate(group) if other is None or other == group[row]]


@pytest.mark.parametrize("noising", [DINO, DN, DINO._replace(number=3)])
@pytest.mark.parametrize("counts", COUNTS)
def test_which_objects_are_known(counts, noising):
    """Each object once in each group, at a positive; all other places are negatives or padding."""
    targets, found = made(counts, noising._replace(box_scale=0.0, label_ratio=0.0))
    parts, most = 1 + noising.contrastive, max(counts)
    for i, (target, (query, obj)) in enumerate(zip(targets, found.match)):
        assert query.tolist() == [g * parts * most + k for g in range(found.groups) for k in range(counts[i])]
        assert obj.tolist() == list(range(counts[i])) * found.groups
        assert torch.equal(found.labels[i, query], target["labels"][obj])
        torch.testing.assert_close(found.boxes[i, query], target["boxes"][obj])
        there = (~found.mask[i]).unflatten(0, (found.groups * parts, most))
        assert (there == (torch.arange(most) < counts[i])).all()
    assert (found.boxes[found.mask] == 0.5).all()


def test_no_objects_no_queries():
    assert denoise(make_targets(0), DINO, CLASSES, QUERIES) is None
    assert denoise(make_targets(0, 0, 0), DN, CLASSES, QUERIES) is None


def test_one_group_where_objects_are_more_than_the_number():
    _, found = made((101, 0, 20))
    assert found.groups == 1 and found.labels.shape == (3, 202)
    assert [len(query) for query, _ in found.match] == [101, 0, 20]


# -- how much noise ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [0.1, 0.4, 1.0])
def test_contrastive_noise_of_boxes(scale):
    """Sides of positives move by less than ``scale`` times half the box, those of negatives by that to twice as much."""
    targets, found = made((4, 2), DINO._replace(box_scale=scale))
    true = targets[0]["boxes"].double()
    corners = box_cxcywh_to_xyxy(found.boxes[0].double()).unflatten(0, (found.groups, 2, 4))    # [G, 2, N, 4]
    moved = (corners - box_cxcywh_to_xyxy(true)).abs() / (true[:, 2:] / 2).repeat(1, 2) / scale
    inside = (corners > 1e-4) & (corners < 1 - 1e-4)                        # at the border of the image they are stopped
    wide = ((corners[..., 2:] - corners[..., :2]) > 1e-4).all(-1, keepdim=True)         # and sides do not change places
    assert moved[:, 0].max() < 1 + 1e-4 and moved[:, 0].max() > 0.95
    negatives = moved[:, 1][(inside & wide)[:, 1]]
    assert negatives.min() > 1 - 1e-4 and negatives.max() < 2 + 1e-4 and negatives.max() > 1.9
    signs = (corners - box_cxcywh_to_xyxy(true))[:, 0] > 0
    assert 0.35 < signs.float().mean() < 0.65


def test_noise_of_centres():
    """Li et al., section 4.3, with numbers."""
    noise = Noise(torch.ones(8), torch.zeros(0, dtype=torch.int64), torch.tensor([[1.0, 0, 1, 0]]).expand(8, 4),
                  torch.tensor([[0.5, 0.25, 1.0, 0.5]]).expand(8, 4))
    target = {"labels": torch.tensor([3]), "boxes": torch.tensor([[0.5, 0.6, 0.2, 0.1]])}
    found = denoise([target], Noising(4, 0.4, 0.0, False), CLASSES, QUERIES, noise)
    expected = torch.tensor([0.5 + 0.5 * 0.4 * 0.1, 0.6 - 0.25 * 0.4 * 0.05, 0.2 * 1.4, 0.1 * 0.8])
    torch.testing.assert_close(found.boxes, expected.expand(1, 8, 4))


@pytest.mark.parametrize("noising", [DINO, DN])
def test_boxes_stay_in_the_image(noising):
    target = {"labels": torch.zeros(2, dtype=torch.int64), "boxes": torch.tensor([[0.02, 0.5, 0.04, 0.9],
                                                                                  [0.9, 0.9, 0.2, 0.2]])}
    found = denoise([target], noising._replace(box_scale=3.0), CLASSES, QUERIES)
    assert (found.boxes >= 0).all() and (found.boxes <= 1).all()


def test_share_of_labels_that_change():
    targets = make_targets(20, 20)
    found = denoise(targets, Noising(2000, 0.4, 0.5, True), CLASSES, QUERIES, generator=torch.Generator().manual_seed(3))
    changed = (found.labels.unflatten(1, (-1, 20)) != torch.stack([t["labels"] for t in targets])[:, None]).float().mean()
    assert abs(changed - 0.25 * (CLASSES - 1) / CLASSES) < 0.02
    assert 0 <= found.labels.min() and found.labels.max() == CLASSES - 1


def test_noise_comes_from_the_generator():
    state = torch.get_rng_state()
    first, same, other = (made((3, 5), seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.boxes, same.boxes) and torch.equal(first.labels, same.labels)
    assert not torch.equal(first.boxes, other.boxes)


def test_noise_for_another_number_of_queries_is_refused():
    with pytest.raises(ValueError, match="noise is for 8 queries, and 20 groups of 8 objects have 320"):
        denoise(make_targets(3, 5), DINO, CLASSES, QUERIES, draw_noise(DINO, 8, CLASSES))


# -- with a decoder ---------------------------------------------------------------------------------------------------

def test_join_and_separate():
    table, content, reference = nn.Embedding(CLASSES + 1, 8), torch.randn(2, QUERIES, 8), torch.rand(2, QUERIES, 4)
    _, found = made((3, 5))
    size = found.labels.shape[1]
    both, boxes, attn_mask = join(found, table, content, reference)
    assert torch.equal(both[:, size:], content) and torch.equal(boxes[:, size:], reference)
    assert attn_mask is found.attn_mask
    assert torch.equal(both[:, :size][~found.mask], table(found.labels)[~found.mask])
    assert (both[:, :size][found.mask] == 0).all()
    torch.testing.assert_close(boxes[:, :size], found.boxes)
    layers = [{"pred_logits": torch.randn(2, size + QUERIES, CLASSES), "pred_boxes": torch.rand(2, size + QUERIES, 4)}
              for _ in range(3)]
    others, known = separate(layers, found, aux_loss=True)
    assert len(others) == 3 and len(known["aux_outputs"]) == 2 and "aux_outputs" not in separate(layers, found, False)[1]
    for layer, other, one in zip(layers, others, [*known["aux_outputs"], known]):
        for key, value in layer.items():
            assert torch.equal(torch.cat([one[key], other[key]], dim=1), value)
        assert one["match"] is found.match and one["copies"] == found.groups


def test_without_queries_the_table_takes_part_with_nothing():
    table, content, reference = nn.Embedding(CLASSES + 1, 8), torch.randn(2, QUERIES, 8), torch.rand(2, QUERIES, 4)
    same, boxes, attn_mask = join(None, table, content, reference)
    assert torch.equal(same, content) and boxes is reference and attn_mask is None
    same.sum().backward()
    assert table.weight.grad is not None and (table.weight.grad == 0).all()
