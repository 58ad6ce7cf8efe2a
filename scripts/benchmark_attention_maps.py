#!/usr/bin/env python3
"""Whether a trained model looks at what it finds: how much of its attention lies inside its objects' boxes.

    python scripts/benchmark_attention_maps.py --resume outputs/tiny_detr/checkpoint.pth \\
        outputs/tiny_deformable_detr/checkpoint.pth

For every confident and right detection of the validation images, a score above 0.5 and an IoU above 0.5 with an object
of its class, the decoder's map of its query, averaged over heads: the share of its mass that lies inside the object's
true box, widened by one cell of the map on each side. A cell counts where its centre is inside. Deformable attention is
summed on the cells of its finest level, the smallest widening there is, and points outside the image count as outside
the box. Printed are the share of detections with more than half of the mass inside, and the mean mass, layer by layer.

Beside it the same model with random weights, which detects nothing: there, for each object, the query whose box overlaps
it most, which is kind to it; and what the box takes of the image, which is the mass that a map without any preference has
inside.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import build_dataset
from datasets.coco import CocoDetection
from detr.attention_maps import Explanation, explain
from detr.boxes import box_cxcywh_to_xyxy, box_iou
from detr.loading import Detector, at_least, load
from detr.preprocessing import height_width
from detr.settings import as_it_was

SCORE, IOU = 0.5, 0.5
SYNTHETIC = Path(__file__).resolve().parent.parent / "data" / "synthetic"


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--resume", nargs="+", required=True, metavar="CKPT", help="checkpoints that main.py wrote")
    parser.add_argument("--coco_path", type=Path, default=SYNTHETIC, metavar="DIR", help="data in COCO's layout; main.py "
                        "makes the synthetic one when it first trains on it")
    parser.add_argument("--images", type=int, default=300, help="at most so many of the validation images")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    return parser


def untrained(detector: Detector) -> nn.Module:
    """The detector's model as it was built, with random weights and statistics."""
    torch.manual_seed(0)
    return as_it_was(detector.name, detector.config["model"]).build(detector.num_classes)[0].eval()


def mass_inside(heat: Tensor, box_xyxy: Tensor) -> float:
    """How much of ``heat [H, W]`` lies inside a box, fractions of the image, widened by one cell."""
    height, width = heat.shape
    left, top, right, bottom = (box_xyxy * box_xyxy.new_tensor([width, height, width, height])).tolist()
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    inside = ((y >= top - 1) & (y <= bottom + 1))[:, None] & ((x >= left - 1) & (x <= right + 1))
    return float(heat[inside].sum())


def confident(detector: Detector, seen: Explanation, truth_xyxy: Tensor, labels: Tensor) -> list[tuple[int, int]]:
    """(query, object) of the detections that are confident and right; boxes in pixels."""
    sizes = torch.tensor([seen.size], device=seen.outputs["pred_boxes"].device)
    found = at_least(SCORE, detector.postprocessors["bbox"](seen.outputs, sizes)[0])
    if not len(labels) or not len(found["labels"]):
        return []
    iou = box_iou(found["boxes"].cpu(), truth_xyxy)[0]
    iou = iou.masked_fill(found["labels"].cpu()[:, None] != labels, 0.0)
    return [(int(query), int(best)) for query, value, best in zip(found["queries"], *iou.max(1)) if value > IOU]


def closest(seen: Explanation, truth: Tensor) -> list[tuple[int, int]]:
    """For each object, (query, object) of the last layer's box that overlaps it most; boxes as fractions."""
    if not len(truth):
        return []
    iou = box_iou(box_cxcywh_to_xyxy(seen.boxes[-1]), truth)[0]
    return [(int(query), i) for i, query in enumerate(iou.argmax(0))]


def measure(detector: Detector, model: nn.Module, data: CocoDetection, images: int, trained: bool) -> dict[str, Any]:
    """Of all chosen queries and layers the mass inside, and of their objects the part of the map that boxes take."""
    masses: list[list[float]] = []
    even: list[float] = []
    for i in range(min(images, len(data))):
        picture, target = data[i]
        height, width = height_width(picture)
        seen = explain(model, detector.preprocessing(picture), (height, width), encoder=False)
        truth = target["boxes"] / torch.tensor([width, height, width, height])
        chosen = confident(detector, seen, target["boxes"], target["labels"]) if trained else closest(seen, truth)
        for query, which in chosen:
            heats = [seen.heat(query, layer) for layer in range(len(seen.decoder))]
            masses.append([mass_inside(heat, truth[which]) for heat in heats])
            even.append(mass_inside(torch.full_like(heats[0], 1 / heats[0].numel()), truth[which]))
    if not masses:
        raise ValueError(f"{detector.source}: on {min(images, len(data))} images no detection has a score above {SCORE} "
                         f"and an IoU above {IOU} with an object of its class; give a trained checkpoint, and as "
                         f"--coco_path the data that it was trained for")
    of_layers = torch.tensor(masses)
    return {"queries": len(masses), "map": list(heats[0].shape), "box": sum(even) / len(even),
            "most_inside": (of_layers > 0.5).double().mean(0).tolist(), "mass": of_layers.double().mean(0).tolist()}


def main(args: argparse.Namespace) -> None:
    detectors = [load(checkpoint, args.device) for checkpoint in args.resume]
    sets = [build_dataset("val", args.coco_path, categories=detector.categories) for detector in detectors]
    print(f"{'':36} {'detections':>10}  {'map':>7}  {'box':>6}  more than half inside (mean mass), layer by layer")
    rows = []
    for detector, data in zip(detectors, sets):
        for kind, model in (("trained", detector.model), ("random weights", untrained(detector).to(args.device))):
            row = measure(detector, model, data, args.images, kind == "trained")
            rows.append({"checkpoint": detector.source, "model": detector.name, "weights": kind, **row})
            layers = "   ".join(f"{share:6.1%} ({mass:.2f})" for share, mass in zip(row["most_inside"], row["mass"]))
            print(f"{detector.name + ', ' + kind:36} {row['queries']:10}  {'x'.join(map(str, row['map'])):>7}  "
                  f"{row['box']:6.1%}  {layers}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
