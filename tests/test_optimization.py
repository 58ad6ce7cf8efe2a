"""Optimizers, schedules and averages against PyTorch's and against their definitions, and how steps are shared out."""
import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from detr.config import TrainConfig
from detr.optimization import (
    Sharing,
    adjusted,
    learning_rate_schedule,
    make_optimizer,
    moving_average,
    share_out,
    stays,
)
from detr.sharding import load_full_optimizer_state


def rates(train: TrainConfig, steps_per_epoch: int, first_epoch: int = 0) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = learning_rate_schedule(optimizer, train, steps_per_epoch, first_epoch * steps_per_epoch)
    found = []
    for _ in range((train.epochs - first_epoch) * steps_per_epoch):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_learning_rates():
    step = TrainConfig(epochs=5, lr_drop=2)
    assert rates(step, 3) == pytest.approx([1] * 6 + [0.1] * 6 + [0.01] * 3)
    warm = TrainConfig(epochs=2, lr_drop=9, warmup_steps=4)
    assert rates(warm, 3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    cosine = TrainConfig(epochs=2, lr_schedule="cosine")
    assert rates(cosine, 2) == pytest.approx([1, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2])
    listed = TrainConfig(epochs=5, lr_drop=2, lr_drop_epochs=(1, 4))
    assert rates(listed, 2) == pytest.approx([1] * 2 + [0.1] * 6 + [0.01] * 2)
    parameter = torch.nn.Parameter(torch.zeros(1))                              # PyTorch's own, which steps with epochs
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    published = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 4])
    for rate in rates(listed, 1):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        published.step()
    assert rates(TrainConfig(epochs=3, lr_drop=1, lr_drop_epochs=()), 1) == [1, 1, 1]
    for train in (step, warm, cosine, listed):
        assert rates(train, 3, first_epoch=1) == pytest.approx(rates(train, 3)[3:])


@pytest.mark.parametrize("sgd", [False, True])
def test_optimizers_and_any_number_of_groups(sgd):
    """As published: each group has its own learning rate, which falls by the same factor; the rest is the same."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in (1e-2, 1e-3, 1e-4)]
    parameters = [p for group in groups for p in group["params"]]
    train = TrainConfig(lr=1e-2, weight_decay=0.1, epochs=3, lr_drop_epochs=(1, 2), sgd=sgd)
    optimizer = make_optimizer(groups, train)
    assert type(optimizer) is (torch.optim.SGD if sgd else torch.optim.AdamW)
    schedule = learning_rate_schedule(optimizer, train, 2, 0)
    values, buffers = [1.0] * 3, [0.0] * 3
    for step in range(6):
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert lrs == pytest.approx([lr * 0.1 ** (step // 2) for lr in (1e-2, 1e-3, 1e-4)])
        for parameter in parameters:
            parameter.grad = torch.full((2,), 0.5)
        optimizer.step()
        schedule.step()
        if sgd:                                                                 # momentum and L2, written out
            buffers = [0.9 * buffer + 0.5 + 0.1 * value for buffer, value in zip(buffers, values)]
            values = [value - lr * buffer for value, lr, buffer in zip(values, lrs, buffers)]
            assert [parameter[0].item() for parameter in parameters] == pytest.approx(values, rel=1e-6)
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)


def test_moving_average():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    ema = moving_average(model, decay=0.5)
    for value in (1.0, 3.0, 7.0):
        torch.nn.init.constant_(model[0].weight, value)
        model[1].running_mean.fill_(value)
        model[1].num_batches_tracked += 1
        ema.update_parameters(model)
    expected = 1.0
    for steps, value in ((1, 3.0), (2, 7.0)):
        share = min(0.5, (1 + steps) / (10 + steps))
        expected = share * expected + (1 - share) * value
    assert ema.module[0].weight.item() == pytest.approx(expected)
    assert ema.module[1].running_mean.item() == pytest.approx(expected)         # buffers are averaged,
    assert ema.module[1].num_batches_tracked.item() == 3                        # and counters are counted


def test_checkpoints_that_stay():
    assert [epoch for epoch in range(200) if stays(epoch, TrainConfig(lr_drop=60))] == [59, 99, 119, 179, 199]
    train = TrainConfig(lr_drop=1, lr_drop_epochs=(3, 4, 9))
    assert [epoch for epoch in range(12) if stays(epoch, train)] == [2, 3, 8]
    assert [epoch for epoch in range(200) if stays(epoch, TrainConfig(lr_schedule="cosine"))] == [99, 199]


# -- how the images of a step are shared out --------------------------------------------------------------------------

def test_sharing():
    assert share_out(2, 0, 8) == Sharing(2, 8, 1) and share_out(2, 0, 8).images == 16
    for batch_size, world_size, accumulate in ((8, 1, 1), (4, 2, 1), (2, 1, 4), (1, 8, 1), (1, 2, 4)):
        assert share_out(batch_size, 8, world_size) == Sharing(batch_size, world_size, accumulate)
    for size in range(1, 30):                                           # not fixed: as many at once as divide the share
        for world_size in (1, 2, 3):
            found = share_out(size, 12, world_size, fixed=False)
            assert found.images == 12 and found.batch_size <= max(size, 1)
            assert all(12 // world_size % more for more in range(found.batch_size + 1, min(size, 12 // world_size) + 1))


@pytest.mark.parametrize("batch_size, images, world_size, message", [
    (2, 9, 2, "--global_batch_size 9 cannot be shared out equally to 2 processes: give a multiple.*such as 10"),
    (3, 8, 1, "is 8 images for each of 1 processes, which --batch_size 3 does not divide: give --batch_size 2"),
    (16, 8, 2, "--batch_size 16 does not divide: give --batch_size 4")])
def test_what_cannot_be_shared(batch_size, images, world_size, message):
    with pytest.raises(ValueError, match=message):
        share_out(batch_size, images, world_size)


@pytest.mark.parametrize("rule, factor", [("none", 1), ("sqrt", 2), ("linear", 4)])
def test_learning_rate_rules(rule, factor):
    """Four times the images: the rule's factor; and a warm-up and an average that last for as many images."""
    train = TrainConfig(lr=1e-3, lr_rule=rule, lr_batch=16, warmup_steps=100, ema_decay=0.99)
    found, times = adjusted(train, 64)
    assert times == factor and found.lr == 1e-3                         # applied once, by whoever builds the optimizer
    assert (found.warmup_steps, found.ema_decay) == ((100, 0.99) if rule == "none" else (25, pytest.approx(0.99 ** 4)))
    assert adjusted(train, 16) == (train, 1.0)
    assert adjusted(dataclasses.replace(train, lr_batch=64), 16)[1] == pytest.approx(1 / factor)


@pytest.mark.parametrize("sgd", [False, True])
def test_a_state_from_before_fused_optimizers(sgd):
    """The next step in fp16 is the fused one's, with the moments of the file."""
    torch.manual_seed(0)
    start = torch.randn(5)

    def optimizer_of(fused: bool) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(start.clone())
        optimizer = make_optimizer([{"params": [parameter], "lr": 0.1}], TrainConfig(sgd=sgd))
        if not fused:
            kind = type(optimizer)
            optimizer = kind([{"params": [parameter], "lr": 0.1}], lr=0.1, weight_decay=TrainConfig.weight_decay,
                             **({"momentum": 0.9} if sgd else {}))
        parameter.grad = torch.arange(5.0)
        optimizer.step()
        return parameter, optimizer

    old, before = optimizer_of(fused=False)
    new, optimizer = optimizer_of(fused=True)
    load_full_optimizer_state(optimizer, copy.deepcopy(before.state_dict()))
    assert [group["fused"] for group in optimizer.param_groups] == [True]
    old.grad, new.grad = torch.ones(5), torch.ones(5)
    before.step()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)           # as a GradScaler does
    optimizer.step()
    torch.testing.assert_close(new, old, atol=1e-6, rtol=0)
