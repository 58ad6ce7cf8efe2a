"""Whether a model gives the same boxes for every image, as models do that small data or large steps have spoilt."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .structures import Outputs, Target

FAR = 1e4                       # coordinates of what is padding among boxes: nearest to nothing


class CollapseWatch:
    """Notices a model that gives (nearly) the same boxes for every image, or whose class scores tell nothing apart.

    For pairs of images that follow one another: how far each box of the first is from the nearest of the second (L1), for
    predictions and, as the measure of how much these images differ, for the ground truth. From the nearest box and not
    that of the same query, since two-stage models sort their queries by score; and of images of one batch, since boxes
    move from step to step. And the standard deviation of each class's logits over queries and images.

    All sums stay on the device, so that no step waits for them. Each process watches its own images.
    """
    LEAST = 64                      # images before a verdict
    PAIRS = 4                       # pairs of images that are looked at in a step
    SAME = 0.05                     # of the true distance: predictions that are no further apart are the same
    LEVEL = 0.01                    # logits that differ by no more say the same

    def __init__(self) -> None:
        self.verdicts = 0
        self.begin()

    def begin(self) -> None:
        """Forget what was seen."""
        self.images = 0
        self.sums = torch.zeros(3)                              # of distances, true ones, deviations,
        self.counts = [0, 0, 0]                                 # and how many of each
        self.last: tuple[Tensor, Tensor] | None = None          # predicted and true boxes of the last image

    @torch.no_grad()
    def update(self, outputs: Outputs, targets: Sequence[Target]) -> None:
        """Count a training step, one that is not left out."""
        boxes, logits = (outputs[name][:self.PAIRS + 1].detach().float() for name in ("pred_boxes", "pred_logits"))
        true = [target["boxes"].float() for target in targets[:self.PAIRS + 1]]
        self.images += len(targets)
        if self.last is not None and len(boxes) <= self.PAIRS:  # pairs reach over steps where batches are small
            boxes = torch.cat([self.last[0].to(boxes)[None], boxes])
            true = [self.last[1].to(boxes), *true]
        self.last = boxes[-1], true[-1]
        apart = torch.cdist(boxes[:-1], boxes[1:], p=1).amin(-1)                                # [pairs, Q]
        counted = [len(x) if len(y) else 0 for x, y in zip(true, true[1:])]     # an empty image measures nothing
        true_apart = boxes.new_zeros(())
        if any(counted):
            padded = pad_sequence(true, batch_first=True, padding_value=FAR)                    # [pairs + 1, N, 4]
            real = torch.arange(padded.shape[1]) < torch.tensor(counted)[:, None]
            nearest = torch.cdist(padded[:-1], padded[1:], p=1).amin(-1)                        # [pairs, N]
            true_apart = torch.where(real.to(boxes.device), nearest, 0.0).sum()
        deviation = logits.flatten(0, 1).std(0)                                                 # [C]
        self.sums = self.sums.to(boxes.device) + torch.stack([apart.sum(), true_apart, deviation.sum()])
        self.counts = [a + b for a, b in zip(self.counts, (apart.numel(), sum(counted), deviation.numel()))]

    def numbers(self) -> tuple[float, float, float]:
        """Distance of boxes, distance of true boxes and deviation of logits, means over what was seen."""
        apart, true, deviation = (total / max(1, n) for total, n in zip(self.sums.tolist(), self.counts))
        return apart, true, deviation

    def verdict(self) -> str | None:
        """What is wrong, as far as the images since the last verdict tell; None where nothing is. Begins anew, unless too
        few were seen, which wait for those of the next epochs. The first verdict, that of a first epoch, is None: random
        weights, too, give much the same boxes."""
        apart, true, deviation = self.numbers()
        images, first = self.images, self.verdicts == 0
        enough = images >= self.LEAST and not first
        self.verdicts += 1
        if enough or first:
            self.begin()
        advice = ("Lower --lr to a tenth, make --warmup_steps longer and keep --clip_max_norm; with few images, begin "
                  "from trained weights with --finetune, or give more --epochs")
        if enough and apart < self.SAME * true:
            return (f"the model gives the same boxes for every image: over {images} training images a box is {apart:.2g} "
                    f"(L1, fractions of the image) from the nearest box of another image, and true boxes are {true:.2g}: "
                    f"{apart / true:.1%}, and a model that looks at its images has 10% or more. {advice}")
        if enough and deviation < self.LEVEL:
            return (f"the model's scores tell nothing apart: over {images} training images the logits of a class differ "
                    f"by {deviation:.1g} between queries and images (standard deviation). {advice}")
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"verdicts": self.verdicts, "images": self.images, "sums": self.sums, "counts": self.counts,
                "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.verdicts, self.images, self.counts = state["verdicts"], state["images"], list(state["counts"])
        self.sums, self.last = state["sums"], state["last"]
