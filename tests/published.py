"""Models against what is recorded of the published ones."""
from typing import Any

import torch
from cases import Case, check
from torch import Tensor, nn


def check_output(case: Case, name: str, value: Tensor) -> None:
    """One output against what the case stored of it: a slice, and statistics of all."""
    steps = case.spec["expected"][name].get("index", "[:]").strip("[]").split(",")
    slices = tuple(slice(None, None, int(step.strip().removeprefix("::") or 1) if "::" in step else None)
                   for step in steps)
    check(case, name, value[slices], **case.spec["expected"][name]["tolerance"])
    if f"{name}.stats" in case.expected:
        stats = torch.stack([value.mean(), value.std(correction=0), value.min(), value.max()])
        check(case, f"{name}.stats", stats, **case.spec["expected"][f"{name}.stats"]["tolerance"])


def check_layers(case: Case, outputs: dict[str, Any]) -> None:
    """What all decoder layers say."""
    for key in ("pred_logits", "pred_boxes"):
        check_output(case, key, outputs[key])
        for i, layer in enumerate(outputs["aux_outputs"]):
            check_output(case, f"aux_outputs.{i}.{key}", layer[key])


def check_counts(case: Case, name: str, *models: nn.Module) -> None:
    """Numbers of parameters, and of names in a checkpoint."""
    for model in models:
        check(case, f"{name}.trainable", sum(p.numel() for p in model.parameters() if p.requires_grad))
        check(case, f"{name}.total", sum(p.numel() for p in model.parameters()))
        check(case, f"{name}.names", len(model.state_dict()))
