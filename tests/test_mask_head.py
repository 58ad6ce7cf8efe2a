"""The mask head: attention maps by their definition, convolutions query by query."""
import pytest
import torch
import torch.nn.functional as F
from small_models import build_small, images, targets

from detr.boxes import box_prior
from detr.mask_head import MaskHeadSmallConv, MHAttentionMap

B, Q, D, M, H, W = 2, 3, 16, 4, 2, 5


def test_attention_map_by_its_definition():
    torch.manual_seed(0)
    attention = MHAttentionMap(D, M).double()
    torch.nn.init.normal_(attention.q_linear.bias)
    queries, memory = torch.randn(B, Q, D).double(), torch.randn(B, D, H, W).double()
    mask = torch.zeros(B, H, W, dtype=torch.bool)
    mask[1, :, 3:] = True
    actual = attention(queries, memory, mask)
    assert actual.shape == (B, Q, M, H, W)
    q = attention.q_linear(queries).view(B, Q, M, D // M)
    k = attention.k_linear(memory.permute(0, 2, 3, 1)).view(B, H, W, M, D // M)
    for b in range(B):
        for i in range(Q):
            e = torch.stack([(k[b, ..., m, :] * q[b, i, m]).sum(-1) / (D // M) ** 0.5 for m in range(M)]).exp()
            e = torch.where(mask[b], 0.0, e)                                                    # [M, H, W]
            torch.testing.assert_close(actual[b, i], e / e.sum())       # over heads and positions together
    assert (actual[1, ..., 3:] == 0).all()


def test_attention_where_boxes_are():
    """With a prior, the weights are those without times a Gaussian of each box, and sum to 1 again."""
    torch.manual_seed(0)
    attention = MHAttentionMap(D, M).double()
    queries, memory = torch.randn(B, Q, D).double(), torch.randn(B, D, H, W).double()
    boxes = torch.rand(B, Q, 4).clamp(min=0.05).double().requires_grad_()
    x, y = (torch.arange(W) + 0.5) / W, (torch.arange(H) + 0.5) / H
    places = torch.stack([x.expand(H, W).flatten(), y[:, None].expand(H, W).flatten()]).expand(B, 2, H * W).double()
    prior = box_prior(boxes, places)
    assert not prior.requires_grad
    mask = torch.zeros(B, H, W, dtype=torch.bool)
    mask[1, :, 3:] = True
    without, actual = attention(queries, memory, mask), attention(queries, memory, mask, prior.unflatten(-1, (H, W)))
    for b in range(B):
        for i in range(Q):
            cx, cy, w, h = boxes[b, i].tolist()
            normal = [torch.distributions.Normal(c, side / 2) for c, side in ((cx, w), (cy, h))]
            gauss = (normal[0].log_prob(x)[None] + normal[1].log_prob(y)[:, None]).exp()                    # [H, W]
            expected = without[b, i] * gauss
            torch.testing.assert_close(actual[b, i], expected / expected.sum(), rtol=1e-5, atol=1e-7)


def test_attention_map_gradient():
    torch.manual_seed(0)
    attention = MHAttentionMap(8, 2).double()
    mask = torch.tensor([[[False, False, True]]])
    given = torch.randn(1, 2, 8).double().requires_grad_(), torch.randn(1, 8, 1, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda queries, memory: attention(queries, memory, mask), given)


def parts(queries: int = Q) -> tuple[MaskHeadSmallConv, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    head = MaskHeadSmallConv(128 + 8, 128, [24, 12, 6])
    src, attention = torch.randn(B, 128, 2, 3), torch.rand(B * queries, 8, 2, 3)
    return head, src, attention, [torch.randn(B, 24, 4, 5), torch.randn(B, 12, 7, 9), torch.randn(B, 6, 13, 18)]


def test_masks_of_each_query():
    head, src, attention, fpns = parts()
    masks = head(src, attention, fpns, [Q, Q])
    assert masks.shape == (B * Q, 13, 18)
    for i in range(B * Q):
        b = i // Q
        alone = head(src[b:b + 1], attention[i:i + 1], [fpn[b:b + 1] for fpn in fpns], [1])
        torch.testing.assert_close(alone[0], masks[i], atol=1e-5, rtol=0)
    assert not torch.allclose(masks[0], masks[1], atol=1e-3)
    few = head(src, attention[[1, 4, 5]], fpns, [1, 2])                         # images may have different numbers
    torch.testing.assert_close(few, masks[[1, 4, 5]], atol=1e-5, rtol=0)


def test_masks_step_by_step():
    head, src, attention, fpns = parts(queries=1)

    def block(i, x):
        return F.group_norm(F.conv2d(x, state[f"lay{i}.weight"], state[f"lay{i}.bias"], padding=1), 8,
                            state[f"gn{i}.weight"], state[f"gn{i}.bias"]).relu()

    state = head.state_dict()
    x = block(2, block(1, torch.cat([src, attention], 1)))
    for i, fpn in enumerate(fpns, start=1):
        lateral = F.conv2d(fpn, state[f"adapter{i}.weight"], state[f"adapter{i}.bias"])
        rows = torch.arange(fpn.shape[2]) * x.shape[2] // fpn.shape[2]          # nearest, rounded down
        columns = torch.arange(fpn.shape[3]) * x.shape[3] // fpn.shape[3]
        x = block(i + 2, lateral + x[:, :, rows][..., columns])
    expected = F.conv2d(x, state["out_lay.weight"], state["out_lay.bias"], padding=1)
    torch.testing.assert_close(head(src, attention, fpns, [1, 1]), expected[:, 0], atol=1e-5, rtol=1e-4)


def test_initialisation():
    head, *_ = parts()
    for name, module in head.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            bound = (3 / module.weight[0].numel()) ** 0.5
            assert module.weight.abs().max() <= bound and (module.bias == 0).all(), name
    assert head.lay1.weight.abs().max() > 0.99 * (3 / head.lay1.weight[0].numel()) ** 0.5


def test_every_parameter_is_used():
    head, src, attention, fpns = parts()
    head(src, attention, fpns, [Q, Q]).square().sum().backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("hidden_dim, nheads", [(256, 4), (64, 8)])
def test_widths_that_group_normalisation_cannot_divide(hidden_dim, nheads):
    with pytest.raises(ValueError, match="masks need .*hidden_dim"):
        MaskHeadSmallConv(hidden_dim + nheads, hidden_dim, [1024, 512, 256])


@pytest.mark.parametrize("name", ["detr_resnet50_panoptic", "deformable_detr_resnet50_two_stage"])
@pytest.mark.parametrize("counts", [(2, 3), (0, 4), (0, 0)])
@pytest.mark.parametrize("padding", ["legacy", "exact"])
def test_training_with_targets_computes_matched_masks_alone(name, counts, padding):
    """The same losses and gradients as with the masks of all queries."""
    model, criterion, _ = build_small(name, masks=True, hidden_dim=128, nheads=8, padding=padding, dropout=0.0)
    given, objects = images((64, 64), (50, 40)), targets(*counts)
    gradients = []
    for arguments in ((given,), (given, objects)):
        model.zero_grad()
        outputs = model(*arguments)
        losses = criterion(outputs, objects)
        criterion.weighted_sum(losses).backward()
        gradients.append((losses, {key: p.grad for key, p in model.named_parameters() if p.requires_grad}))
    assert outputs["pred_masks"].shape == (sum(counts), 16, 16)
    (losses, every), (same, matched) = gradients
    for key, value in losses.items():
        torch.testing.assert_close(same[key], value, rtol=1e-4, atol=1e-6, msg=key)
    for key, value in every.items():
        assert matched[key] is not None, key
        scale = max(value.abs().max().item(), 1e-2)
        assert (matched[key] - value).abs().max() < 1e-3 * scale, key
