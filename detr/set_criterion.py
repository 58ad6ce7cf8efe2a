"""The set prediction loss (Carion et al., 2020, section 3.1, equation 2; auxiliary losses: section 3.2)."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from . import distributed
from .structures import Divisors, Match, NonFiniteError, Outputs, Target, in_float32
from .transfer import on_device

Loss = Callable[[Outputs, Sequence[Target], Match, Divisors], dict[str, Tensor]]
Row = tuple[str, Outputs, Sequence[Target]]     # a set of predictions that is trained, after the suffix of its losses
MASK_LOSSES = ("loss_mask", "loss_dice")


class SetCriterion(nn.Module):
    """Matches each supervised set of predictions to the ground truth and computes the ``losses`` of the matched pairs.

    The values are unweighted; ``weight_dict`` holds the weights and ``weighted_sum`` applies them. Names without a
    weight are for reading only. ``class_agnostic_proposals``: the proposals of a two-stage model only tell objects from
    background, so all their targets have label 0 (Zhu et al., 2021, section A.4); ``classes`` keeps the objects' own.

    Targets may have ``ignore [M, 4]`` (cxcywh in 0..1), regions in which not all objects are marked: queries that find
    something there are not told that they see no object, in no layer and in no proposal.

    Denoising queries (``denoising.py``) know their objects. There is a copy of each object in each group, so their losses
    are divided by the number of groups, too. In training a batch without them has losses of 0 in their place, as
    published.

    ``normalizer`` says what the losses of training are divided by. ``"process"``, as published: box losses by the objects
    of a batch, as a mean over processes; the softmax class loss by the weights of the process's own batch. So the
    gradient depends on which images share a process, and with accumulation on which share a batch. ``"global"``: both by
    what all images of the optimizer step have, so that the gradient is the same however these are shared out (but for
    denoising queries, whose number is the batch's).
    """

    def __init__(self, matcher: nn.Module, losses: Sequence[Loss], weight_dict: dict[str, float],
                 class_agnostic_proposals: bool = False) -> None:
        super().__init__()
        self.matcher, self.losses, self.weight_dict = matcher, list(losses), weight_dict
        self.class_agnostic_proposals = class_agnostic_proposals
        self.normalizer = "process"

    def forward(self, outputs: Outputs, targets: Sequence[Target], divisors: Divisors | None = None) -> dict[str, Tensor]:
        """Losses by name: ``loss_ce``, ``loss_bbox``, ``loss_giou``, ``loss_mask``, ``loss_dice``, ``class_error``,
        ``cardinality_error``; those of earlier decoder layers end in ``_0``, ``_1``, …, those of proposals in ``_enc``,
        or in ``_interm`` where only the chosen ones are trained, those of denoising queries in ``_dn``, ``_dn_0``, …. All
        in float32, whatever the model ran in. ``divisors`` are those of this batch; without them it is a step of its
        own."""
        if divisors is None:
            divisors = self.divisors([targets], outputs["pred_logits"].device)[0]
        rows = [(suffix, in_float32(predictions), objects)
                for suffix, predictions, objects in self.supervised(outputs, targets)]
        values: dict[str, Tensor] = {}
        for (suffix, predictions, objects), match in zip(rows, self.matches(rows)):
            shared = divisors.of_copies(predictions.get("copies", 1))
            for loss in self.losses:
                values |= {name + suffix: value for name, value in loss(predictions, objects, match, shared).items()}
            if not suffix and self.training:
                values |= self.nothing_denoised(values)
        return {name: value for name, value in values.items() if not name.startswith("class_error_")}   # one is enough

    def nothing_denoised(self, last: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of denoising queries where there are none, by the names of the ``last`` layer's: 0, so that all
        processes have the same, whatever their batches."""
        suffixes = [name.removeprefix("loss_ce") for name in self.weight_dict if name.startswith("loss_ce_dn")]
        return {name + suffix: torch.zeros_like(value) for suffix in suffixes for name, value in last.items()
                if name not in MASK_LOSSES}

    def matches(self, rows: Sequence[Row]) -> list[Match]:
        """The match of each row: its own, or the matcher's. Rows of one shape, such as those of all decoder layers, are
        matched in one call, as so many more images."""
        found = [predictions.get("match") for _, predictions, _ in rows]
        alike: dict[tuple[torch.Size, ...], list[int]] = {}
        for i, (_, predictions, _) in enumerate(rows):
            if found[i] is None:
                alike.setdefault((predictions["pred_logits"].shape, predictions["pred_boxes"].shape), []).append(i)
        for members in alike.values():
            given = [rows[i] for i in members]
            stacked = stack([predictions for _, predictions, _ in given])
            try:
                match = self.matcher(stacked, [target for _, _, objects in given for target in objects])
            except NonFiniteError:
                self.blame_row(given)
                raise
            batch = len(match) // len(members)
            for k, i in enumerate(members):
                found[i] = match[batch * k:batch * (k + 1)]
        return [match for match in found if match is not None]

    def blame_row(self, rows: Sequence[Row]) -> None:
        """Raise the matcher's ``NonFiniteError`` about the first row that it fails on by itself, with that row's name."""
        for suffix, predictions, objects in rows:
            try:
                self.matcher(predictions, objects)
            except NonFiniteError as error:
                where = f", in the predictions whose losses end in {suffix}" if suffix else ""
                raise NonFiniteError(f"{error}{where}") from None

    def weigh_classes(self, class_weights: Sequence[float] | Tensor | None) -> None:
        """From now on an object counts in the class loss as much as the weight of its label says; None: all alike, as
        published. ValueError where no loss has weights of classes."""
        weighing = [loss for loss in self.losses if hasattr(loss, "weigh_classes")]
        if not weighing:
            raise ValueError("class_weights: this criterion has no loss of classes that could take them; leave them out")
        for loss in weighing:
            loss.weigh_classes(class_weights)

    def weighted_sum(self, losses: dict[str, Tensor]) -> Tensor:
        """What is back-propagated: the sum of the losses that have a weight, times it."""
        return torch.stack([losses[name] * w for name, w in self.weight_dict.items() if name in losses]).sum()

    def supervised(self, outputs: Outputs, targets: Sequence[Target]) -> Iterator[Row]:
        """One row for each set of predictions that is trained: the suffix of its losses, the predictions, and their
        targets."""
        yield "", outputs, targets
        for i, auxiliary in enumerate(outputs.get("aux_outputs", ())):
            yield f"_{i}", auxiliary, targets
        if "enc_outputs" in outputs:
            yield "_enc", outputs["enc_outputs"], class_agnostic(targets) if self.class_agnostic_proposals else targets
        if "interm_outputs" in outputs:
            yield "_interm", outputs["interm_outputs"], targets
        if "dn_outputs" in outputs:
            yield "_dn", outputs["dn_outputs"], targets
            for i, auxiliary in enumerate(outputs["dn_outputs"].get("aux_outputs", ())):
                yield f"_dn_{i}", auxiliary, targets

    def divisors(self, batches: Sequence[Sequence[Target]], device: torch.device) -> list[Divisors]:
        """What the losses of each batch of an optimizer step are divided by (``normalizer``), from the targets of all its
        batches on this process. In training all processes must call it; in evaluation they may have different numbers
        of batches, so none may wait for another."""
        counts = on_device([[len(targets), sum(len(target["labels"]) for target in targets)] for targets in batches],
                           device, torch.float32)                                               # [batches, 2]
        if not self.training:
            return [Divisors(boxes.clamp(min=1)) for _, boxes in counts]
        world_size = distributed.world_size()
        if self.normalizer == "process":
            boxes = distributed.sum_over_processes(counts[:, 1]) / world_size
            return [Divisors(number.clamp(min=1)) for number in boxes]
        labels = [target["labels"] for targets in batches for target in targets]
        weighing = [loss for loss in self.losses if hasattr(loss, "weight_of_objects")]
        weight = on_device(weighing[0].weight_of_objects(torch.cat(labels)), device) if weighing else counts.new_zeros(())
        images, boxes, weight = distributed.sum_over_processes(torch.cat([counts.sum(0), weight[None]]))
        share = world_size * len(batches)
        return [Divisors(boxes.clamp(min=1) / share, images / share, boxes / share, weight / share)] * len(batches)


def stack(layers: Sequence[Outputs]) -> Outputs:
    """Logits and boxes of layers of one shape as those of more images, layer after layer: ``[K * B, Q, ...]``. Without
    gradient."""
    if len(layers) == 1:
        return layers[0]
    with torch.no_grad():
        return {"pred_logits": torch.cat([layer["pred_logits"] for layer in layers]),
                "pred_boxes": torch.cat([layer["pred_boxes"] for layer in layers])}


def class_agnostic(targets: Sequence[Target]) -> list[Target]:
    """Targets that only say where objects are: label 0 for all, and their labels under ``classes``."""
    return [{**target, "labels": torch.zeros_like(target["labels"]), "classes": target["labels"]} for target in targets]


def every_row(weights: dict[str, float], dec_layers: int, aux_loss: bool, proposals: bool = False,
              denoising: bool = False) -> dict[str, float]:
    """The weights of one layer's losses, for all that ``SetCriterion`` supervises: with ``aux_loss`` the earlier decoder
    layers too, with ``proposals`` those of a two-stage model, and with ``denoising`` each layer's denoising queries,
    which predict no masks."""
    layers = [""] + [f"_{i}" for i in range(dec_layers - 1)] * aux_loss
    rows = {name + suffix: weight for suffix in layers + ["_enc"] * proposals for name, weight in weights.items()}
    return rows | {f"{name}_dn{suffix}": weight for suffix in layers * denoising for name, weight in weights.items()
                   if name not in MASK_LOSSES}
