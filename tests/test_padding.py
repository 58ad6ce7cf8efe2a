"""Layers of a padded batch against PyTorch's own layers on each image alone."""
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detr import padding

CHANNELS = 8


def batch(seed: int, smallest: int = 5, dtype: torch.dtype = torch.float64):
    """Images of random sizes in one tensor that may be larger than all of them, with NaN where there is no image."""
    rng, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    sizes = [(rng.randint(smallest, 20), rng.randint(smallest, 20)) for _ in range(rng.randint(1, 4))]
    height, width = (max(side) + rng.randint(0, 3) for side in zip(*sizes))
    x = torch.full((len(sizes), CHANNELS, height, width), float("nan"), dtype=dtype)
    for image, (h, w) in zip(x, sizes):
        image[:, :h, :w] = torch.randn(CHANNELS, h, w, generator=draw, dtype=dtype)
    return x, sizes


def alone(x, sizes):
    return [image[None, :, :h, :w] for image, (h, w) in zip(x, sizes)]


def check(out, out_sizes, expected):
    assert out_sizes == [tuple(y.shape[-2:]) for y in expected]
    for y, (h, w), wanted in zip(out, out_sizes, expected):
        torch.testing.assert_close(y[None, :, :h, :w], wanted, atol=1e-12, rtol=0)


CONVOLUTIONS = [dict(kernel_size=7, stride=2, padding=3), dict(kernel_size=3, padding=1, groups=CHANNELS),
                dict(kernel_size=3, padding=2, dilation=2), dict(kernel_size=3, stride=2, padding=1),
                dict(kernel_size=1, stride=2), dict(kernel_size=4, stride=4), dict(kernel_size=3, stride=2),
                dict(kernel_size=(1, 5), stride=(2, 1), padding=(0, 2)), dict(kernel_size=2, padding=1)]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_convolution(layer, seed):
    conv = nn.Conv2d(CHANNELS, CHANNELS, **layer).double()
    x, sizes = batch(seed)
    before = x.clone()
    check(*padding.exact_conv(conv, x, sizes), [conv(y) for y in alone(x, sizes)])
    assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("layer", [nn.MaxPool2d(3, 2, padding=1), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2),
                                   nn.Conv2d(CHANNELS, 4, (1, 5), (2, 1), (0, 2), dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_through(layer, seed):
    x, sizes = batch(seed)
    at = padding.through(layer, padding.where(x, sizes))
    assert at.shape == layer(x).shape[-2:] and at.sizes == [layer(y).shape[-2:] for y in alone(x, sizes)]
    inside = torch.zeros(len(x), 1, *at.shape, dtype=torch.bool)
    for mask, (h, w) in zip(inside, at.sizes):
        mask[:, :h, :w] = True
    assert at.outside is None and inside.all() or torch.equal(at.outside, ~inside)
    assert padding.through(layer, None) is None
    same = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    assert padding.through(same, at) is at                      # worked out once


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_group_norm(affine, seed):
    x, sizes = batch(seed, smallest=2)
    norm = nn.GroupNorm(2, CHANNELS, affine=affine).double()
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    inputs = x.clone().requires_grad_()
    out = padding.normalised(norm, inputs, padding.where(inputs, sizes))
    expected = [norm(y) for y in alone(x.requires_grad_(), sizes)]
    check(out, sizes, expected)
    assert out.isfinite().all()
    padding.zeroed(out, padding.where(out, sizes)).square().sum().backward()
    sum(y.square().sum() for y in expected).backward()
    torch.testing.assert_close(inputs.grad, x.grad, atol=1e-10, rtol=0)


def test_group_norm_in_lower_precision():
    x, sizes = batch(1, dtype=torch.float32)
    norm = nn.GroupNorm(2, CHANNELS)
    out = padding.normalised(norm.bfloat16(), 100 + x.bfloat16(), padding.where(x, sizes))      # bfloat16 drowns its mean
    assert out.dtype == torch.bfloat16
    for y, image, (h, w) in zip(out, x, sizes):
        exact = F.group_norm((100 + image[None, :, :h, :w].bfloat16()).float(), 2)
        torch.testing.assert_close(y[None, :, :h, :w].float(), exact, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("bins", [(7, 7), (1, 1), (3, 5), (30, 2)])
@pytest.mark.parametrize("seed", range(5))
def test_adaptive_average(bins, seed):
    x, sizes = batch(seed, smallest=1)
    rows, columns = (padding.adaptive_average(lengths, side, n, x)
                     for lengths, side, n in zip(zip(*sizes), x.shape[-2:], bins))
    out = rows[:, None] @ x.nan_to_num(1e6) @ columns[:, None].mT
    for y, image in zip(out, alone(x, sizes)):
        torch.testing.assert_close(y[None], F.adaptive_avg_pool2d(image, bins), atol=1e-12, rtol=0)


def test_lengths():
    rng = random.Random(0)
    for _ in range(300):
        kernel, stride, dilation, length = rng.randint(1, 5), rng.randint(1, 4), rng.randint(1, 3), rng.randint(13, 40)
        pad = rng.randint(0, kernel // 2)
        window = padding.Window((kernel, 1), (stride, 1), (pad, 0), (dilation, 1))
        x = torch.zeros(1, 1, length)
        convolved = F.conv1d(x, torch.zeros(1, 1, kernel), None, stride, pad, dilation).shape[-1]
        assert window.sizes([(length, 7)]) == [(convolved, 7)]
        pooled = F.max_pool1d(x, kernel, stride, pad, dilation, ceil_mode=True).shape[-1]
        assert window._replace(ceil=True).sizes([(length, 7)]) == [(pooled, 7)]
    assert padding.Window((8, 8), (8, 8)).sizes([(3, 9)]) == [(1, 1)]       # too small for the kernel: keeps a position


def test_masks():
    assert padding.valid_mask([(1, 2), (2, 3)], 2, 3).tolist() == [[[True, True, False], [False] * 3], [[True] * 3] * 2]
    x = torch.full((2, 1, 2, 3), float("inf"))
    x[0, 0, 0, :2] = x[1] = 1
    zeroed = padding.zeroed(x, padding.where(x, [(1, 2), (2, 3)]))
    assert zeroed.tolist() == [[[[1, 1, 0], [0, 0, 0]]], [[[1, 1, 1], [1, 1, 1]]]] and x[0, 0, 1, 0] == float("inf")
    full = [(2, 3), (2, 3)]
    assert padding.unpadded(full, 2, 3) and not padding.unpadded([(2, 2)], 2, 3)
    assert padding.zeroed(x, padding.where(x, full)) is x and padding.zeroed(x, padding.where(x, None)) is x


def test_errors():
    x = torch.zeros(2, 3, 8, 9)
    with pytest.raises(ValueError, match=r"1 sizes for a batch of 2 images \[2, 3, 8, 9\]; give one \(height, width\)"):
        padding.check_sizes(x, [(8, 9)])
    for size in [(9, 9), (8, 10), (0, 4)]:
        with pytest.raises(ValueError, match=rf"size 1 is \({size[0]}, {size[1]}\), outside 1..8, 1..9 of the batch"):
            padding.check_sizes(x, [(8, 9), size])
    assert padding.check_sizes(x, torch.tensor([[8, 9], [3, 4]]).tolist()) == [(8, 9), (3, 4)]
    with pytest.raises(ValueError, match="cannot be padded exactly: use padding_mode='zeros', or --padding legacy"):
        padding.exact_conv(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), x, [(8, 9), (3, 4)])
    with pytest.raises(ValueError, match="has padding 'same'; exact padding needs it in numbers"):
        padding.exact_conv(nn.Conv2d(3, 3, 3, padding="same"), x, [(8, 9), (3, 4)])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_in_training_leaves_padding_out(momentum):
    """PyTorch's own over the pixels that are not padding, its running statistics and gradients too."""
    torch.manual_seed(0)
    sizes, x = [(3, 5), (6, 2)], torch.randn(2, 4, 6, 5, dtype=torch.float64)
    x[0, :, 3:], x[1, :, :, 2:] = 1e6, -1e6
    ours, theirs = (nn.BatchNorm2d(4, momentum=momentum, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.arange(4) + 1.0)
            norm.bias.copy_(torch.arange(4) - 1.0)
    at = padding.where(x, sizes)

    def inside(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[i, :, :h, :w].flatten(1) for i, (h, w) in enumerate(sizes)], dim=1)

    for _ in range(3):
        x = x.detach().requires_grad_()
        pixels = inside(x).detach().requires_grad_()
        expected = theirs(pixels.T[:, :, None, None])[:, :, 0, 0].T
        got = inside(padding.normalised(ours, x, at))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        weights = torch.randn_like(got)
        (got * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(inside(x.grad), pixels.grad, rtol=1e-10, atol=1e-10)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-10, atol=1e-10)
    assert torch.equal(padding.normalised(ours.eval(), x, at), ours(x))             # fixed statistics need nothing
