#!/usr/bin/env python3
"""Does what a model sees in an image depend on the batch the image is in? The same checkpoint, images and weights, with
padding as published and exact, at several batch sizes.

    python scripts/batch_invariance.py --resume outputs/tiny_deformable_detr/checkpoint.pth

Every validation image gets a size of its own, drawn from its id, and the batches are drawn at random, so that there is
padding in them. For each kind of padding and each batch size, prints COCO's twelve numbers and how far the raw
detections are from those of the images alone; ``--figure FILE`` draws it. Ends with 1 where exact padding changes a
number of the twelve or a detection by more than 1e-4.

Detections of an image alone and in a batch are paired by scipy's assignment, those with one label that are nearest in
score and box, since two that score the same have no order.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import build_dataset, build_evaluators, collate
from datasets.synthetic import synthetic_data
from datasets.transforms import Preprocessing, eval_transforms
from detr import visualize
from detr.backbone import backbone_of
from detr.loading import Detector
from detr.loading import load as load_detector
from detr.nested_tensor import NestedTensor
from detr.structures import Detections
from engine import Progress, to_device

TOLERANCE = 1e-4
NUMBERS = 12


class Outcome(NamedTuple):
    """What a model says of all images at one batch size."""
    detections: dict[int, Detections]               # by image id, boxes in pixels of the file
    numbers: list[float]                            # COCO's twelve
    padded: float                                   # share of all pixels that is padding


class Shift(NamedTuple):
    """How far detections are from those of the images alone."""
    score: float                                    # the most that a score changes
    box: float                                      # the most that a box's corner changes, in parts of the image's side
    changed: float                                  # share of the detections with either above TOLERANCE


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare batch sizes.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--resume", required=True, metavar="CKPT", help="checkpoint that main.py wrote")
    parser.add_argument("--coco_path", help="folder in COCO's layout; without it, the synthetic data")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="each is compared with 1")
    parser.add_argument("--short_side", type=int, nargs=2, default=[96, 224], metavar=("LEAST", "MOST"),
                        help="pixels between which each image's short side is drawn")
    parser.add_argument("--images", type=int, help="only so many of the validation images")
    parser.add_argument("--figure", metavar="FILE", help="picture of the comparison")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--seed", type=int, default=0, help="seed of sizes and batches")
    return parser


class MixedSizes(torch.utils.data.Dataset):
    """A data set's first images, each brought to a short side of its own, which follows from its place and a seed."""

    def __init__(self, data: Any, count: int | None, preprocessing: Preprocessing, sides: tuple[int, int],
                 seed: int) -> None:
        self.data, self.preprocessing = data, preprocessing
        length = min(len(data), count or len(data))
        generator = torch.Generator().manual_seed(seed)
        self.sides = torch.randint(sides[0], sides[1] + 1, (length,), generator=generator).tolist()
        self.order = torch.randperm(length, generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Any:
        i = self.order[place]
        transforms = eval_transforms(Preprocessing(self.sides[i], None, self.preprocessing.mean, self.preprocessing.std))
        return transforms(self.data.image(i), self.data.target(i))


@torch.no_grad()
def outcome(detector: Detector, items: list[Any], data: Any, batch_size: int, device: torch.device,
            title: str) -> Outcome:
    """The detections of all ``items`` in batches of ``batch_size``, in their order."""
    progress = Progress(title, every=30.0)
    batches = [items[i:i + batch_size] for i in range(0, len(items), batch_size)]
    found: dict[int, Detections] = {}
    padding = pixels = 0.0
    for batch in progress.over(batches, len(batches), ()):
        samples: NestedTensor
        samples, targets = to_device(*collate(batch), device)
        sizes = torch.stack([target["orig_size"] for target in targets])
        for target, one in zip(targets, detector.postprocessors["bbox"](detector.model(samples), sizes)):
            found[int(target["image_id"])] = {name: value.cpu() for name, value in one.items()}
        padding += samples.padded_share * samples.mask.numel()
        pixels += samples.mask.numel()
        progress.update({}, len(batch))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = build_evaluators(data)[0]
        evaluator.update(found)
        numbers = evaluator.summarize()["coco_eval_bbox"]
    return Outcome(found, numbers, padding / pixels)


def shift(alone: Outcome, other: Outcome, sides: dict[int, Tensor]) -> Shift:
    """How far ``other`` is from ``alone``; ``sides``: (width, height, width, height) of each image."""
    scores, boxes = [], []
    for image_id, a in alone.detections.items():
        b, side = other.detections[image_id], sides[image_id]
        score = (a["scores"][:, None] - b["scores"]).abs()
        box = ((a["boxes"] / side)[:, None] - b["boxes"] / side).abs().amax(-1)
        cost = torch.maximum(score, box) + 10.0 * (a["labels"][:, None] != b["labels"])
        rows, columns = map(torch.as_tensor, linear_sum_assignment(cost.numpy()))
        other_label = (a["labels"][rows] != b["labels"][columns]).float()
        scores.append(torch.maximum(score[rows, columns], other_label))
        boxes.append(torch.maximum(box[rows, columns], other_label))
    score, box = torch.cat(scores), torch.cat(boxes)
    return Shift(score.max().item(), box.max().item(), (torch.maximum(score, box) > TOLERANCE).float().mean().item())


def compare(detector: Detector, data: Any, items: list[Any], batch_sizes: list[int],
            device: torch.device) -> dict[str, dict[int, tuple[Outcome, Shift]]]:
    """Every kind of padding at every batch size, each compared with the images alone under exact padding."""
    sides = {int(target["image_id"]): target["orig_size"].flip(0).repeat(2).float() for _, target in items}
    backbone = backbone_of(detector.model)
    found: dict[str, dict[int, tuple[Outcome, Shift]]] = {}
    for padding in ("exact", "legacy"):
        backbone.exact = padding == "exact"
        outcomes = {size: outcome(detector, items, data, size, device, f"{padding}, batches of {size}")
                    for size in batch_sizes}
        alone = outcomes[1] if padding == "exact" else found["exact"][1][0]
        found[padding] = {size: (one, shift(alone, one, sides)) for size, one in outcomes.items()}
    return found


def table(found: dict[str, dict[int, tuple[Outcome, Shift]]]) -> str:
    lines = ["padding  batch  padded    AP     AP50   score changes  box changes  detections changed   (the most of all)"]
    for padding, rows in found.items():
        for size, (one, moved) in rows.items():
            lines.append(f"{padding:7}  {size:5}  {one.padded:6.1%}  {one.numbers[0]:.4f} {one.numbers[1]:.4f}  "
                         f"{moved.score:13.1e}  {moved.box:11.1e}  {moved.changed:18.1%}")
    return "\n".join(lines)


def draw(found: dict[str, dict[int, tuple[Outcome, Shift]]], detector: Detector, data: Any, items: list[Any],
         threshold: float = 0.3) -> Image.Image:
    """AP by batch size, and the image whose sure detections changed the most: alone, and in the largest batches."""
    from matplotlib.figure import Figure

    sizes = list(found["exact"])
    alone, legacy, exact = (found[padding][size][0] for padding, size in
                            (("exact", sizes[0]), ("legacy", sizes[-1]), ("exact", sizes[-1])))
    places = {int(target["image_id"]): i for i, target in ((data.ids.index(int(t["image_id"])), t) for _, t in items)}

    def sure(detections: Detections) -> dict[str, Tensor]:
        return {name: value[detections["scores"] > threshold] for name, value in detections.items()}

    def change(image_id: int) -> float:
        a, b = sure(alone.detections[image_id]), sure(legacy.detections[image_id])
        return abs(len(a["scores"]) - len(b["scores"])) + abs(float(a["scores"].sum() - b["scores"].sum()))

    worst = max(alone.detections, key=change)
    names = {category.label: category.name for category in detector.categories}
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1.25, 1, 1, 1])
    for padding, style in (("legacy", "o--"), ("exact", "o-")):
        axes[0].plot(range(len(sizes)), [found[padding][size][0].numbers[0] for size in sizes], style, label=padding,
                     color={"legacy": "tab:red", "exact": "tab:blue"}[padding])
    axes[0].set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes[0].set(xlabel="images in a batch", ylabel="AP", title="the same weights and images")
    axes[0].legend(title="--padding")
    axes[0].grid(alpha=0.3)
    for axis, title, one in zip(axes[1:], ("alone", f"legacy, in a batch of {sizes[-1]}",
                                           f"exact, in a batch of {sizes[-1]}"), (alone, legacy, exact)):
        seen = sure(one.detections[worst])
        axis.imshow(visualize.draw_detections(data.image(places[worst]), seen["boxes"], seen["labels"], names,
                                              seen["scores"]))
        axis.set_title(title, color="tab:red" if title.startswith("legacy") else "black")
        axis.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return Image.open(buffer).convert("RGB")


def main(args: argparse.Namespace) -> int:
    """The program's exit code: 1 where exact padding is not."""
    device = torch.device(args.device)
    detector = load_detector(args.resume)
    detector.model.to(device).eval()
    if reason := backbone_of(detector.model).inexact:
        raise ValueError(f"{detector.name} cannot be exact: {reason}")
    data = build_dataset("val", args.coco_path or synthetic_data(), categories=detector.categories,
                         channels=len(detector.preprocessing.mean))
    mixed = MixedSizes(data, args.images, detector.preprocessing, tuple(args.short_side), args.seed)
    items = [mixed[i] for i in range(len(mixed))]
    found = compare(detector, data, items, sorted({1, *args.batch_sizes}), device)
    print(table(found))
    exact = found["exact"]
    alone = exact[1][0].numbers
    numbers = max(abs(a - b) for one, _ in exact.values() for a, b in zip(alone, one.numbers))
    moved = max(max(moved.score, moved.box) for _, moved in exact.values())
    print(f"exact: the twelve numbers differ by {numbers:.1e} at most, detections by {moved:.1e}")
    if args.figure:
        draw(found, detector, data, items).save(args.figure)
        print(f"figure: {args.figure}")
    return int(numbers > TOLERANCE or moved > TOLERANCE)


if __name__ == "__main__":
    try:
        sys.exit(main(get_args_parser().parse_args()))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
