"""What a training step takes, by trying: ``--auto_batch_size``, and the flags that are named when memory runs out."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import distributed
from .distributed import say
from .memory import (
    advice,
    auto_batch_size,
    checkpoint_activations,
    fits,
    keep_activations,
    memory_limit,
    used_memory,
    worst_batch,
)
from .nested_tensor import nested_tensor_from_tensor_list
from .optimization import make_optimizer
from .precision import autocast
from .settings import Settings
from .structures import Divisors


class Trial:
    """One training step of the worst batch that the data may have, to see what it takes: random pixels of the largest
    size, as many objects as there are in the fullest images. ``model`` is not wrapped, so that it waits for no other
    process."""

    def __init__(self, settings: Settings, sizes: Sequence[tuple[int, int]], objects: Sequence[int], num_classes: int,
                 model: nn.Module, criterion: nn.Module, amp: str, device: torch.device,
                 optimizer: torch.optim.Optimizer | None = None) -> None:
        """``sizes``: (height, width) of images as training feeds them; ``objects``: how many each image has. Without an
        ``optimizer`` one is made, whose learning rate is 0."""
        self.settings, self.sizes, self.objects, self.num_classes = settings, sizes, objects, num_classes
        self.model, self.criterion, self.amp, self.device = model, criterion, amp, device
        self.optimizer = optimizer or make_optimizer(settings.model.parameter_groups(model, 0.0), settings.train)

    def __call__(self, batch_size: int, amp: str | None = None, scale: float = 1.0, alike: bool = False) -> None:
        """A step with ``batch_size`` images, of ``scale`` times the sides, and ``alike`` in shape."""
        alike = alike or self.settings.data.bucket_train
        height, width, objects = worst_batch(self.sizes, self.objects, batch_size, alike)
        height, width = max(32, round(height * scale)), max(32, round(width * scale))
        images = [torch.rand(self.settings.model.in_channels, height, width, device=self.device) for _ in objects]
        targets: list[Any] = [{"boxes": torch.rand(n, 4, device=self.device) * 0.5 + 0.1,
                               "labels": torch.arange(n, device=self.device) % self.num_classes} for n in objects]
        if getattr(self.settings.model, "masks", False):
            for target, n in zip(targets, objects):
                target["masks"] = torch.zeros(n, height, width, dtype=torch.bool, device=self.device)
        self.model.train()
        self.criterion.train()
        samples = nested_tensor_from_tensor_list(images)
        with autocast(self.device, amp or self.amp):
            takes = getattr(self.model, "takes_targets", False)
            outputs = self.model(samples, targets) if takes else self.model(samples)
        divisors = Divisors(torch.tensor(float(max(1, sum(objects))), device=self.device))
        self.criterion.weighted_sum(self.criterion(outputs, targets, divisors)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def chosen_batch_size(trial: Trial) -> int:
    """``--auto_batch_size``: the most images that fit, said. Room is left for what a training has besides: the average of
    the weights, and the gradients that are sent. Raises MemoryError where not one image fits."""
    train, world_size = trial.settings.train, distributed.world_size()
    weights = sum(p.numel() * p.element_size() for p in trial.model.parameters())
    besides = weights * (bool(train.ema_decay) + (world_size > 1))
    try:
        found, report = auto_batch_size(trial, trial.model, trial.optimizer, trial.device,
                                        len(trial.objects) // world_size, train.global_batch_size,
                                        memory_limit(trial.device) - besides)
    except RuntimeError as error:
        raise MemoryError(error) from error
    say(report)
    return found


def out_of_memory_message(doing: Mapping[str, Any], trial: Trial) -> str:
    """What to say of a batch that memory did not suffice for, ``doing``: shape, objects and where; the flags with which a
    step goes through, tried where this process is alone."""
    settings = trial.settings
    known = {**dataclasses.asdict(settings.model), **dataclasses.asdict(settings.train),
             **dataclasses.asdict(settings.data), **dataclasses.asdict(settings.run)}
    limit = memory_limit(trial.device)

    def goes_through(flags: dict[str, Any]) -> bool:
        batch_size, amp = flags.get("batch_size", known["batch_size"]), flags.get("amp")
        sides = [int(str(of.get("image_size", known["image_size"])).split("x")[0]) for of in (flags, known)]
        if flags.get("activation_checkpointing"):
            checkpoint_activations(trial.model)
        try:
            return fits(lambda: trial(batch_size, amp, sides[0] / sides[1], flags.get("bucket_train", False)),
                        trial.device, limit)
        finally:
            if flags.get("activation_checkpointing"):
                keep_activations(trial.model)

    text = advice(doing["shape"], doing["objects"], known, where=doing["where"], used=used_memory(trial.device),
                  limit=limit, world_size=distributed.world_size(),
                  fits=None if distributed.is_distributed() else goes_through)      # its hooks wait for all processes
    return f"{text}\nwhat was saved before is unharmed: go on with --resume auto, --output_dir and one of these"
