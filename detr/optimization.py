"""Optimizer, learning rates and the average of the weights, and how the images of a step are shared out."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from .config import TrainConfig
from .sharding import any_shared

FUSED = {"cpu", "cuda"}                         # devices for which PyTorch has fused optimizers


class Sharing(NamedTuple):
    """How the images of an optimizer step come together."""
    batch_size: int             # images of a process at once
    world_size: int             # processes
    accumulate: int             # batches of a process whose gradients are added up

    @property
    def images(self) -> int:
        """Images of an optimizer step."""
        return self.batch_size * self.world_size * self.accumulate


def share_out(batch_size: int, global_batch_size: int, world_size: int, fixed: bool = True) -> Sharing:
    """``global_batch_size`` images a step (0: as many as one batch of each process has) in batches of ``batch_size`` a
    process, filled by accumulation. A batch size that is not ``fixed`` is an upper limit: the largest that divides a
    process's images is taken. Raises ValueError where the images cannot be shared out equally."""
    if global_batch_size == 0:
        return Sharing(batch_size, world_size, 1)
    if global_batch_size % world_size:
        near = -(-global_batch_size // world_size) * world_size
        raise ValueError(f"--global_batch_size {global_batch_size} cannot be shared out equally to {world_size} "
                         f"processes: give a multiple of their number, such as {near}")
    own = global_batch_size // world_size
    fitting = [size for size in range(1, own + 1) if own % size == 0 and size <= batch_size]
    if not fixed:
        batch_size = fitting[-1]
    if own % batch_size:
        raise ValueError(f"--global_batch_size {global_batch_size} is {own} images for each of {world_size} processes, "
                         f"which --batch_size {batch_size} does not divide: give --batch_size {fitting[-1]}, or leave "
                         f"it out")
    return Sharing(batch_size, world_size, own // batch_size)


def adjusted(train: TrainConfig, images: int) -> tuple[TrainConfig, float]:
    """The recipe for ``images`` an optimizer step, by ``--lr_rule``, and the factor of all learning rates.

    With ``k`` times the images that the recipe is meant for (``lr_batch``), learning rates are multiplied by sqrt(k) or
    k, and what is counted in steps follows: ``warmup_steps`` are divided by k, and ``ema_decay`` is taken to the power of
    k, so that both last for as many images. ``none`` changes nothing. The factor is not yet in ``train.lr``.
    """
    ratio = images / train.lr_batch
    if train.lr_rule == "none" or ratio == 1:
        return train, 1.0
    factor = ratio if train.lr_rule == "linear" else math.sqrt(ratio)
    return dataclasses.replace(train, warmup_steps=round(train.warmup_steps / ratio),
                               ema_decay=train.ema_decay ** ratio), factor


def make_optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or with ``--sgd`` SGD with momentum, as published for Deformable DETR. Each group has its learning rate. The
    weights are gone over once, where PyTorch has fused optimizers for their device."""
    parameters = [p for group in groups for p in group["params"]]
    fused = {p.device.type for p in parameters} <= FUSED or None
    if train.sgd:
        if any_shared(parameters):                                      # PyTorch has no fused SGD for these
            fused = None
        return torch.optim.SGD(groups, lr=train.lr, momentum=0.9, weight_decay=train.weight_decay, fused=fused)
    return torch.optim.AdamW(groups, lr=train.lr, weight_decay=train.weight_decay, fused=fused)


def drops_before(epoch: int, train: TrainConfig) -> int:
    """How often a step schedule has divided the learning rates by ten when ``epoch`` begins."""
    if train.lr_drop_epochs is None:
        return epoch // train.lr_drop
    return sum(drop <= epoch for drop in train.lr_drop_epochs)


def stays(epoch: int, train: TrainConfig) -> bool:
    """Whether the checkpoint after ``epoch`` is kept for good: one from before each drop of a step schedule, and every
    hundredth, as published."""
    drops = train.lr_schedule == "step" and drops_before(epoch + 1, train) > drops_before(epoch, train)
    return drops or (epoch + 1) % 100 == 0


def learning_rate_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig, steps_per_epoch: int,
                           first_step: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The factor of all learning rates as a function of the optimizer step alone, counted from the beginning of the
    training, so that resuming needs no memory."""
    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
        if train.lr_schedule == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / (train.epochs * steps_per_epoch))))
        return warm * 0.1 ** drops_before(step // steps_per_epoch, train)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=first_step - 1)
    schedule.load_state_dict({**schedule.state_dict(), "_step_count": first_step + 1})      # as of an unbroken training
    return schedule


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, which follows faster while it is young."""
    def average(averaged: Sequence[torch.Tensor], current: Sequence[torch.Tensor], steps: int | torch.Tensor) -> None:
        weight = 1 - min(decay, (1 + int(steps)) / (10 + int(steps)))
        for mean, value in zip(averaged, current):
            mean.lerp_(value, weight) if mean.is_floating_point() else mean.copy_(value)
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
