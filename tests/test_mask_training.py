"""Training masks against a plainly written definition, in float64; the panoptic models' sizes and their computation."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from cases import load_case
from cases import state_dict as drawn_weights
from scipy.optimize import linear_sum_assignment
from small_models import images
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss
from torchvision.ops.misc import FrozenBatchNorm2d

from detr import build_model, losses, mask_head, set_criterion
from detr.nested_tensor import nested_tensor_from_tensor_list

NUM_CLASSES, STEPS, CLIP = 5, 10, 0.1
SIZES = [(64, 96), (80, 56), (48, 70)]                              # height, width: every image has padding
COUNTS = [2, 3, 0]
SMALL = {"backbone": "resnet_tiny", "backbone_norm": "batch", "from_scratch": True, "hidden_dim": 128, "nheads": 8,
         "dim_feedforward": 32, "enc_layers": 1, "dec_layers": 3, "num_queries": 8, "dropout": 0.0, "masks": True}


# A trajectory.

@pytest.fixture
def in_float64(monkeypatch):
    """Our criterion computes in float32 whatever it is given; here it keeps what it is given. The assignment itself is
    made in float32 still."""
    monkeypatch.setattr(set_criterion, "in_float32", lambda outputs: outputs)
    monkeypatch.setattr(mask_head, "in_float32", lambda outputs: outputs)
    padded = losses.pad_masks
    monkeypatch.setattr(losses, "pad_masks", lambda *given: padded(*given).double())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def polygon(corners: np.ndarray, height: int, width: int) -> Tensor:
    """Pixels whose middle is inside a convex polygon, whose ``corners [n, 2]`` (x, y) run clockwise in the picture."""
    y, x = np.mgrid[:height, :width] + 0.5
    inside = np.ones((height, width), bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0)):
        inside &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
    return torch.from_numpy(inside)


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images with one triangle, or rectangle, of a colour of its own for each object, and targets as data give them."""
    random = np.random.RandomState(3)
    pictures, targets = [], []
    for (height, width), count in zip(SIZES, COUNTS):
        picture = torch.from_numpy(random.standard_normal((3, height, width))) * 0.3
        masks, labels = torch.zeros(count, height, width, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
        for k in range(count):
            x, y = random.uniform(2, width * 0.4), random.uniform(2, height * 0.4)
            w, h = random.uniform(width * 0.3, width * 0.5), random.uniform(height * 0.3, height * 0.5)
            right = [(x + w, y), (x + w, y + h)] if k % 2 else [(x + w, y + h / 2)]
            masks[k] = polygon(np.array([(x, y), *right, (x, y + h)]), height, width)
            labels[k] = int(random.randint(NUM_CLASSES))
            picture[:, masks[k]] += torch.from_numpy(random.standard_normal((3, 1)))
        where = [mask.nonzero() for mask in masks]
        corners = torch.tensor([[*yx.amin(0).flip(0).tolist(), *(yx.amax(0) + 1).flip(0).tolist()] for yx in where],
                               dtype=torch.float64).reshape(-1, 4)
        pictures.append(picture)
        targets.append({"labels": labels, "masks": masks, "boxes": box_convert(
            corners / torch.tensor([width, height, width, height], dtype=torch.float64), "xyxy", "cxcywh")})
    return pictures, targets


def defined_loss(outputs: dict, targets: list[dict[str, Tensor]]) -> Tensor:
    """The published loss of DETR with masks, image by image and object by object: each decoder layer is matched and has
    a class and a box loss, the last one the masks' besides."""
    layers = [*outputs["aux_outputs"], outputs]
    boxes = max(1, sum(len(target["labels"]) for target in targets))
    total = outputs["pred_logits"].new_zeros(())
    for layer in layers:
        class_sum, class_weights = 0.0, 0.0
        for i, target in enumerate(targets):
            logits, predicted = layer["pred_logits"][i], layer["pred_boxes"][i]
            labels, true = target["labels"], target["boxes"]
            giou = generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (predicted, true)))
            distance = (predicted[:, None] - true[None]).abs().sum(-1)
            cost = -logits.softmax(-1)[:, labels] + 5 * distance - 2 * giou
            queries, objects = (torch.as_tensor(x) for x in linear_sum_assignment(cost.detach().numpy()))
            wanted = torch.full((len(logits),), NUM_CLASSES)
            wanted[queries] = labels[objects]
            weight = torch.where(wanted == NUM_CLASSES, 0.1, 1.0)
            class_sum = class_sum - (weight * logits.log_softmax(-1)[torch.arange(len(logits)), wanted]).sum()
            class_weights = class_weights + weight.sum()
            total = total + (5 * distance[queries, objects].sum() + 2 * (1 - giou[queries, objects]).sum()) / boxes
            if layer is outputs:
                total = total + defined_mask_loss(outputs["pred_masks"][i], target["masks"], queries, objects) / boxes
        total = total + class_sum / class_weights
    return total


def defined_mask_loss(logits: Tensor, masks: Tensor, queries: Tensor, objects: Tensor) -> Tensor:
    """Focal and dice losses of an image's masks, summed over objects. Predictions cover the whole padded batch."""
    height, width = (max(size[d] for size in SIZES) for d in (0, 1))
    total = logits.new_zeros(())
    for query, k in zip(queries, objects):
        true = torch.zeros(height, width)
        true[:masks.shape[1], :masks.shape[2]] = masks[k]
        full = F.interpolate(logits[query][None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
        probability = full.sigmoid()
        focal = sigmoid_focal_loss(full, true, alpha=0.25, gamma=2).mean()
        dice = 1 - (2 * (probability * true).sum() + 1) / (probability.sum() + true.sum() + 1)
        total = total + focal + dice
    return total


def model_and_criterion(frozen: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model, criterion, _ = build_model("detr_resnet50", num_classes=NUM_CLASSES, **SMALL,
                                      frozen_weights="boxes.pth" if frozen else None)
    return model.double().train(), criterion.train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """As published: a tenth of the learning rate for the backbone."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": [p for name, p in named if "backbone" not in name]},
                              {"params": [p for name, p in named if "backbone" in name], "lr": 1e-4}],
                             lr=1e-3, weight_decay=1e-4)


def trained(model: nn.Module, loss_of) -> tuple[list[float], dict[str, Tensor]]:
    """Ten steps: the loss of each, and the weights and buffers afterwards."""
    optimizer, values = optimizer_of(model), []
    for _ in range(STEPS):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        values.append(loss.item())
    return values, model.state_dict()


@pytest.mark.parametrize("frozen", [False, True], ids=["joint", "frozen"])
def test_trajectory(in_float64, frozen):
    pictures, targets = batch()
    samples = nested_tensor_from_tensor_list(pictures)
    (model, criterion), (other, _) = model_and_criterion(frozen), model_and_criterion(frozen)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.equal(value, start[name]) for name, value in other.state_dict().items())
    actual, after = trained(model, lambda: criterion.weighted_sum(criterion(model(samples, targets), targets)))
    expected, weights = trained(other, lambda: defined_loss(other(samples), targets))
    assert actual == pytest.approx(expected, rel=1e-9, abs=0)
    assert expected[-1] < expected[0] - (0.02 if frozen else 0.5)
    moved = {name for name, value in after.items() if not torch.equal(value, start[name])}
    for name, value in after.items():
        torch.testing.assert_close(value, weights[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    if frozen:
        assert {name.split(".")[0] for name in moved} == {"bbox_attention", "mask_head"}
    else:
        assert moved >= {name for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}


# The published models with masks.

@pytest.mark.parametrize("frozen", [False, True], ids=["joint", "frozen"])
@pytest.mark.parametrize("name", ["detr_resnet50_panoptic", "detr_resnet50_dc5_panoptic", "detr_resnet101_panoptic"])
def test_parameter_counts(name, frozen):
    """Recorded ones. ResNet-101's differ from ResNet-50's as those of the box models do, and DC5 has the same, since no
    layer of the mask head knows how deep the backbone is; frozen, the head trains alone."""
    table = load_case("detr_parameter_counts").spec["table"]
    with torch.device("meta"):
        model = build_model(name, frozen_weights="any" if frozen else None)[0]
    counts = {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
              "total": sum(p.numel() for p in model.parameters()),
              "state": sum(x.numel() for x in model.state_dict().values()), "tensors": len(model.state_dict())}
    for what, count in counts.items():
        deeper = table[f"r101.{what}"] - table[f"r50.{what}"] if "101" in name else 0
        expected = table[f"panoptic_r50_frozen.{what}"] if frozen else table[f"panoptic_r50.{what}"]
        assert count == expected + (0 if frozen and what == "trainable" else deeper), what


def defined_masks(weights: dict[str, Tensor], hs: Tensor, memory: Tensor, src: Tensor, outside: Tensor,
                  finer: list[Tensor]) -> Tensor:
    """Masks ``[B, Q, H, W]`` in plain operations, query by query, from published names: attention of 8 heads over all
    positions that are not ``outside``, then convolutions that add ``finer`` maps, coarsest first."""
    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"bbox_attention.{name}.weight"], weights[f"bbox_attention.{name}.bias"])

    def convolution(name: str, x: Tensor) -> Tensor:
        weight = weights[f"mask_head.{name}.weight"]
        return F.conv2d(x, weight, weights[f"mask_head.{name}.bias"], padding=weight.shape[-1] // 2)

    def block(i: int, x: Tensor) -> Tensor:
        norm = f"mask_head.gn{i}"
        return F.group_norm(convolution(f"lay{i}", x), 8, weights[f"{norm}.weight"], weights[f"{norm}.bias"]).relu()

    masks = []
    for b in range(len(hs)):
        keys = linear("k_linear", memory[b].permute(1, 2, 0))                                   # [H, W, D]
        for query in linear("q_linear", hs[b]):
            heads = [(keys[..., part] * query[part]).sum(-1) / math.sqrt(32) for part in
                     (slice(32 * m, 32 * m + 32) for m in range(8))]
            scores = torch.stack(heads).masked_fill(outside[b], float("-inf"))
            x = torch.cat([src[b], scores.flatten().softmax(0).view_as(scores)])[None]
            x = block(2, block(1, x))
            for i, fpn in enumerate(finer, start=1):
                lateral = convolution(f"adapter{i}", fpn[b:b + 1])
                x = block(i + 2, lateral + F.interpolate(x, lateral.shape[-2:], mode="nearest"))
            masks.append(convolution("out_lay", x)[0, 0])
    return torch.stack(masks).unflatten(0, hs.shape[:2])


@pytest.mark.parametrize("name, backbone, dilated", [("detr_resnet50_dc5_panoptic", "resnet50", True),
                                                     ("detr_resnet101_panoptic", "resnet101", False)])
@torch.no_grad()
def test_masks_of_the_other_published_models(name, backbone, dilated):
    """Torchvision's backbone makes the maps; DC5 takes the weights of a model without, and its last map keeps stride
    16; the mask head follows by its definition."""
    case = load_case("detr_panoptic_r50")
    with torch.device("meta"):
        model = build_model(name)[0]
        body = getattr(torchvision.models, backbone)(weights=None, norm_layer=FrozenBatchNorm2d,
                                                     replace_stride_with_dilation=[False, False, dilated])
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert (shapes == case.spec["shapes"]) == dilated
    weights = drawn_weights(shapes, gains=case.spec["gains"] | {"bbox_attention.*weight": 3.0})
    weights["mask_head.lay1.weight"][:, 256:] *= 50                                 # or attention would hardly be heard
    model.load_state_dict(weights, strict=True, assign=True)
    prefix = "detr.backbone.0.body."
    body.load_state_dict({**{key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)},
                          "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, assign=True)
    maps_of = IntermediateLayerGetter(body.eval(), {f"layer{i}": f"{i}" for i in range(1, 5)})
    model.eval()
    samples = nested_tensor_from_tensor_list(images((64, 64), (32, 48)))
    seen = model.detr.detect(samples)[1]

    maps = list(maps_of(samples.tensors).values())
    height, width = samples.tensors.shape[-2:]
    strides = [4, 8, 16, 16 if dilated else 32]
    for feature, expected, stride in zip(seen.features, maps, strides, strict=True):
        assert feature.tensors.shape[-2:] == (-(-height // stride), -(-width // stride))
        torch.testing.assert_close(feature.tensors, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    outside = F.interpolate(samples.mask[None].float(), maps[-1].shape[-2:])[0].bool()
    assert torch.equal(seen.features[-1].mask, outside) and outside.any()
    projected = F.conv2d(maps[-1], weights["detr.input_proj.weight"], weights["detr.input_proj.bias"])
    torch.testing.assert_close(seen.src, projected, rtol=1e-4, atol=1e-4 * projected.abs().max().item())
    expected = defined_masks(weights, seen.hs, seen.memory, projected, outside, maps[-2::-1])
    masks = model(samples)["pred_masks"]
    assert masks.shape == (2, 100, -(-height // 4), -(-width // 4))
    torch.testing.assert_close(masks, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert masks.std(1).mean() > 0.02 * masks.std()                                         # queries differ
