"""Attention maps: what is kept is what the model looked with, and the model does not notice."""
import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import build_small, images
from torch import nn

from detr import deformable_attention
from detr.attention_maps import DeformableAttention, DenseAttention, explain, splat
from detr.boxes import box_cxcywh_to_xyxy
from detr.deformable_attention import MSDeformAttn
from detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

SIZES = (64, 100), (90, 50)             # of a batch with padding, and no multiples of a stride
DENSE = ["detr_resnet50", "detr_resnet50_dc5", "detr_resnet50_panoptic", "detr_pvt_v2_b0", "tiny_detr"]
DEFORMABLE = ["deformable_detr_resnet50", "deformable_detr_resnet50_single_scale", "deformable_detr_resnet50_box_refine",
              "deformable_detr_resnet50_two_stage", "tiny_deformable_detr"]


def small(name: str, **flags) -> nn.Module:
    """A small model whose attention is no longer what it is at first, when all weights and sides are alike."""
    model = build_small(name, **flags)[0].eval()
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            for parameter in (*module.sampling_offsets.parameters(), *module.attention_weights.parameters()):
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def same(a, b) -> bool:
    """The same bits in everything that two forward passes returned."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", DENSE + DEFORMABLE)
@torch.no_grad()
def test_the_model_does_not_notice(name):
    model = small(name)
    for aux_loss in (True, False):
        (model.detr if hasattr(model, "detr") else model).aux_loss = aux_loss
        before = model(images(*SIZES))
        seen = explain(model, images(*SIZES), index=1)
        assert same(seen.outputs, before) and same(model(images(*SIZES)), before)
        assert hooks_of(model) == 0 and ("aux_outputs" in seen.outputs) == aux_loss


@pytest.mark.parametrize("name", ["detr_resnet50", "tiny_detr", "deformable_detr_resnet50_two_stage"])
def test_hooks_are_gone_after_an_error(name):
    model = small(name, aux_loss=False)

    def fail(*_):
        raise RuntimeError("planted")

    last = model.transformer.decoder.layers[-1].linear2.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        explain(model, images(*SIZES)[0])
    last.remove()
    assert hooks_of(model) == 0 and model.aux_loss is False


@pytest.mark.parametrize("name, padding", [("detr_resnet50", "legacy"), ("detr_pvt_v2_b0", "exact"),
                                           ("detr_resnet50_panoptic", "legacy"), ("detr_resnet50_panoptic", "exact"),
                                           ("tiny_detr", "legacy"), ("tiny_detr", "exact")])
@torch.no_grad()
def test_dense_weights_are_those_of_pytorchs_attention(name, padding):
    """In float64, head by head, from what the model's own layers were called with."""
    model = small(name, padding=padding).double()
    detr = getattr(model, "detr", model)
    called = {}
    hooks = [module.register_forward_pre_hook(lambda m, args, kwargs: called.update({m: (args, kwargs)}),
                                              with_kwargs=True)
             for layer in (*detr.transformer.encoder.layers, *detr.transformer.decoder.layers)
             for module in [getattr(layer, "multihead_attn", layer.self_attn)]]
    samples = [image.double() for image in images(*SIZES)]
    model(samples)
    for hook in hooks:
        hook.remove()
    for index in range(2):
        seen = explain(model, samples, index=index)
        assert len(seen.encoder) + len(seen.decoder) == len(called)
        for attention, (module, (args, kwargs)) in zip((*seen.encoder, *seen.decoder), called.items()):
            reference = nn.MultiheadAttention(module.embed_dim, module.num_heads, batch_first=True).double().eval()
            reference.load_state_dict(module.state_dict())
            kwargs = dict(kwargs)
            prior = kwargs.pop("prior", None)
            assert (prior is not None) == (name == "tiny_detr" and any(attention is one for one in seen.decoder))
            if prior is not None:                                       # PyTorch takes it as a mask for each head
                kwargs["attn_mask"] = prior.double().repeat_interleave(module.num_heads, 0)
                kwargs["key_padding_mask"] = torch.zeros(prior.shape[::2]).double().masked_fill(
                    kwargs["key_padding_mask"], float("-inf"))
            expected = reference(*args, **kwargs, average_attn_weights=False)[1][index].unflatten(-1, attention.grid)
            (height, width), weights = attention.shape, attention.weights
            torch.testing.assert_close(weights, expected[..., :height, :width], atol=1e-12, rtol=0)
            torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(weights.shape[:2]).double(), atol=1e-12, rtol=0)
            torch.testing.assert_close(attention.heat(3, 1), weights[1, 3], atol=1e-12, rtol=0)
            torch.testing.assert_close(attention.heat(3), weights[:, 3].mean(0), atol=1e-12, rtol=0)
    assert len({explain(model, samples, index=i).shapes[0] for i in range(2)}) == 2


@pytest.mark.parametrize("padding, path", [("legacy", "cpu"), ("exact", "definition")])
@pytest.mark.parametrize("name", DEFORMABLE)
@torch.no_grad()
def test_points_and_weights_are_those_that_were_sampled_with(name, padding, path, monkeypatch):
    model = small(name, padding=padding)
    monkeypatch.setenv(deformable_attention.ENVIRONMENT, path)
    calls = []
    original = deformable_attention.deformable_sampling

    def sampling(value, shapes, locations, weights, wanted):
        out = original(value, shapes, locations, weights, wanted)
        calls.append((value, shapes, locations, weights, out))
        return out

    monkeypatch.setattr(deformable_attention, "deformable_sampling", sampling)
    for index, (height, width) in enumerate(SIZES):
        calls.clear()
        seen = explain(model, images(*SIZES), index=index)
        assert len(calls) == len(seen.encoder) + len(seen.decoder) > 0
        for attention, (value, shapes, locations, weights, out) in zip((*seen.encoder, *seen.decoder), calls):
            assert seen.grids == list(shapes) and attention.points.shape == locations[index].shape
            torch.testing.assert_close(attention.weights, weights[index])
            torch.testing.assert_close(attention.weights.sum((-1, -2)), torch.ones(weights.shape[1:3]))
            filled = torch.tensor([[w / W, h / H] for (h, w), (H, W) in zip(attention.shapes, shapes)])
            expected = locations[index] / filled[:, None] * torch.tensor([width, height])
            torch.testing.assert_close(attention.points, expected, atol=1e-3, rtol=1e-4)

            # A level's map says how much of each cell's value is in the output: summed with it, values are the output.
            query, total = 5, torch.zeros(value.shape[2:])
            values = value[index].split([h * w for h, w in shapes])
            for level, ((h, w), cells) in enumerate(zip(attention.shapes, values)):
                cells = cells.unflatten(0, shapes[level])[:h, :w]
                maps = torch.stack([attention.heat(query, head, level) for head in range(len(total))])
                total += torch.einsum("mhw,hwmd->md", maps, cells)
            torch.testing.assert_close(total.flatten(), out[index, query], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["detr_resnet50", "tiny_detr", "deformable_detr_resnet50_two_stage"])
def test_an_image_looks_the_same_alone_and_in_a_batch(name):
    model = small(name, padding="exact")
    batch = images(*SIZES)
    alone, together = explain(model, batch[1]), explain(model, batch, index=1)
    assert alone.shapes == together.shapes and alone.size == together.size == SIZES[1]
    assert alone.grids != together.grids
    torch.testing.assert_close(alone.boxes, together.boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(alone.heat(2), together.heat(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(alone.encoder_heat(20, 70), together.encoder_heat(20, 70), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", DENSE + DEFORMABLE)
@torch.no_grad()
def test_the_path_of_a_box(name):
    model = small(name, aux_loss=True)
    sample = images((64, 100))[0]
    seen = explain(model, sample, size=(640, 1000))
    outputs = model([sample])
    layers = torch.stack([o["pred_boxes"][0] for o in (*outputs["aux_outputs"], outputs)])
    assert torch.equal(seen.boxes, layers)
    path = seen.path(4)
    expected = box_cxcywh_to_xyxy(layers[:, 4]) * torch.tensor([1000, 640, 1000, 640])
    torch.testing.assert_close(path[-len(layers):], expected)
    from_boxes = name in ("tiny_detr", "tiny_deformable_detr", "deformable_detr_resnet50_two_stage")
    assert len(path) == len(layers) + from_boxes
    if name in DEFORMABLE or name == "tiny_detr":
        assert [r.shape[-1] for r in seen.references] == {
            "deformable_detr_resnet50": [2, 2], "deformable_detr_resnet50_single_scale": [2, 2],
            "deformable_detr_resnet50_box_refine": [2, 4]}.get(name, [4, 4])
        refined = name not in ("deformable_detr_resnet50", "deformable_detr_resnet50_single_scale")
        torch.testing.assert_close(seen.references[1], layers[0] if refined else seen.references[0], atol=1e-6, rtol=1e-6)
    else:
        assert seen.references == []


def test_points_of_learned_references():
    """Without refinement and with offsets of zero, all points of a query are where it looks from."""
    model = build_small("deformable_detr_resnet50")[0].eval()
    for layer in model.transformer.decoder.layers:
        nn.init.zeros_(layer.cross_attn.sampling_offsets.bias)
    seen = explain(model, images(*SIZES), index=1)
    expected = model.transformer.reference_points(model.query_embed.weight.chunk(2, -1)[0]).sigmoid().detach()
    torch.testing.assert_close(seen.references[0], expected)
    points = seen.decoder[0].points
    expected = (expected * torch.tensor([50, 90]))[:, None, None, None].expand_as(points)
    torch.testing.assert_close(points, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["detr_resnet50", "deformable_detr_resnet50"])
def test_from_a_pixel_to_its_token(name):
    model = small(name)
    seen = explain(model, images(*SIZES), size=(900, 500), index=1)
    for level, (rows, columns) in enumerate(seen.shapes):
        for row in range(rows):
            for column in range(columns):
                x, y = (column + 0.5) * 500 / columns, (row + 0.5) * 900 / rows
                assert seen.cell(x, y, level) == (row, column)
                token = seen.token(row, column, level)
                assert torch.equal(seen.encoder_heat(x, y, 0, 1, from_level=level), seen.encoder[0].heat(token, 1))
        start = sum(h * w for h, w in seen.grids[:level])
        assert seen.token(0, 0, level) == start
        assert seen.token(rows - 1, columns - 1, level) == start + (rows - 1) * seen.grids[level][1] + columns - 1
    assert seen.cell(0, 0) == (0, 0)
    assert seen.cell(499.99, 899.99) == (seen.shapes[0][0] - 1, seen.shapes[0][1] - 1)
    if name.startswith("deformable"):               # at first, a token's points surround its own place
        seen = explain(build_small(name)[0].eval(), images((128, 192))[0])
        middle = seen.encoder[0].points[seen.token(4, 10)].mean((0, 2))                                 # [L, 2]
        torch.testing.assert_close(middle, torch.tensor([84.0, 36.0]).expand_as(middle), atol=1e-3, rtol=0)


def test_splat_is_bilinear_sampling_the_other_way_round():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3, 50, 2, generator=generator).double() * 1.4 - 0.2                 # some outside
    weights = torch.rand(3, 50, generator=generator).double()
    image = torch.randn(3, 1, 5, 7, generator=generator).double()
    sampled = F.grid_sample(image, 2 * points[:, None] - 1, padding_mode="zeros", align_corners=False)[:, 0, 0]
    expected = (sampled * weights).sum(-1)
    torch.testing.assert_close((splat(points, weights, (5, 7)) * image[:, 0]).sum((-1, -2)), expected)


def test_heat_of_a_query_that_is_like_one_cell():
    keys = torch.eye(12).expand(2, -1, -1)                                                  # a cell of 3 x 4 each
    query = torch.stack([keys[0, 7], keys[0, 9]])[:, None] * 40                             # of two heads
    padding = torch.tensor([[False, False, False, True]] * 3).flatten()
    attention = DenseAttention(query, keys, padding, None, (3, 4), (3, 3))
    assert attention.heat(0, 1).shape == (3, 3) and attention.heat(0, 1)[2, 1] > 0.99
    torch.testing.assert_close(attention.heat(0, 0), torch.full((3, 3), 1 / 9))             # its cell is padding
    torch.testing.assert_close(attention.heat(0).sum(), torch.tensor(1.0))


def test_heat_of_points():
    points = torch.tensor([[10.0, 10.0], [30.0, 10.0], [30.0, 30.0], [-90.0, 10.0]])        # of an image of 40 x 40
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1])
    attention = DeformableAttention(points.view(1, 1, 2, 2, 2), weights.view(1, 1, 2, 2), [(4, 4), (2, 2)], (40, 40))
    expected = torch.tensor([[0.4, 0.3], [0.0, 0.2]])                                       # a tenth lies outside
    torch.testing.assert_close(attention.heat(0, grid=(2, 2)), expected)
    torch.testing.assert_close(attention.heat(0, level=1), torch.tensor([[0.0, 0.0], [0.0, 0.2]]))
    assert attention.heat(0).shape == attention.heat(0, level=0).shape == (4, 4)
    torch.testing.assert_close(attention.heat(0)[:2, :2], torch.full((2, 2), 0.1))          # between four cells
    torch.testing.assert_close(attention.heat(0).sum(), torch.tensor(0.9))


@pytest.mark.parametrize("name", ["tiny_detr", "deformable_detr_resnet50_two_stage"])
@torch.no_grad()
def test_under_autocast(name):
    model = small(name)
    with torch.autocast("cpu", torch.bfloat16):
        before, seen = model(images(*SIZES)), explain(model, images(*SIZES))
    assert same(seen.outputs, before)
    exact = explain(model, images(*SIZES))
    for layer in (0, -1):
        weights, dims = seen.decoder[layer].weights, (-1, -2)
        assert weights.dtype == torch.float32 and seen.boxes.dtype == torch.float32
        torch.testing.assert_close(weights.sum(dims), torch.ones_like(weights.sum(dims)), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen.encoder_heat(9, 9, 0), exact.encoder_heat(9, 9, 0), atol=0.02, rtol=0)


def test_an_encoder_may_be_left_out_or_missing():
    seen = explain(small("detr_resnet50"), images((64, 100))[0], encoder=False)
    assert seen.encoder == [] and len(seen.decoder) == 2
    seen = explain(small("tiny_deformable_detr"), images((64, 100))[0])                     # has no encoder layers
    with pytest.raises(IndexError, match="this model has no encoder layers"):
        seen.encoder_heat(5, 5)


def test_what_may_be_given():
    model, (a, b) = small("detr_resnet50"), images(*SIZES)
    expected = explain(model, [a, b]).heat(0)
    batch = nested_tensor_from_tensor_list([a, b])
    for given in (batch, NestedTensor(*batch.decompose())):
        assert torch.equal(explain(model, given).heat(0), expected)
    assert torch.equal(explain(model, a).heat(0), explain(model, a[None]).heat(0))
    before = copy.deepcopy(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_explanations_outlive_changes_of_the_model():
    for name in ("detr_resnet50", "deformable_detr_resnet50"):
        model = small(name)
        seen = explain(model, images(*SIZES)[0])
        before = seen.heat(1), seen.encoder_heat(3, 3)
        for parameter in model.parameters():
            parameter.data.mul_(0)
        assert torch.equal(seen.heat(1), before[0]) and torch.equal(seen.encoder_heat(3, 3), before[1])


def test_errors():
    model, image = small("detr_resnet50"), images(SIZES[0])[0]
    with pytest.raises(TypeError, match="attention of a Linear is not known"):
        explain(nn.Linear(2, 2), image)
    with pytest.raises(ValueError, match="call model.eval"):
        explain(model.train(), image)
    model.eval()
    with pytest.raises(IndexError, match="index 1 of the batch: 0 to 0 are there"):
        explain(model, image, index=1)
    with pytest.raises(ValueError, match="image 0 of the batch is all padding"):
        explain(model, NestedTensor(image[None], torch.ones(1, *SIZES[0], dtype=torch.bool)))
    seen = explain(model, image)
    for wrong, message in [(lambda: seen.heat(7), "query 7: 0 to 6"), (lambda: seen.heat(0, 2), "layer 2 of the decoder"),
                           (lambda: seen.heat(0, head=4), "head 4: 0 to 3"), (lambda: seen.heat(0, level=1), "level 1"),
                           (lambda: seen.path(9), "query 9"), (lambda: seen.token(9, 0), "row 9")]:
        with pytest.raises(IndexError, match=message):
            wrong()
    with pytest.raises(ValueError, match=r"pixel \(100, 5\) is not in the image, which is 100 wide and 64 high"):
        seen.encoder_heat(100, 5)
