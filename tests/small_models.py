"""Every preset at a size that a test can run: its own architecture and options, small widths, few layers."""
import dataclasses

import torch
from torch import Tensor, nn

from detr import build_model
from detr.presets import PRESETS

NUM_CLASSES = 5
SMALL = {"hidden_dim": 32, "nheads": 4, "dim_feedforward": 48, "enc_layers": 2, "dec_layers": 2, "num_queries": 7}


def small_flags(name: str) -> dict:
    """Flags that make the preset ``name`` small; presets for CPUs are small as they are."""
    if name.startswith("tiny_"):
        return {}
    config = PRESETS[name].model
    flags = {flag: value for flag, value in SMALL.items() if hasattr(config, flag)}
    flags["backbone"] = "resnet50" if config.dilation else "resnet18"           # basic blocks cannot be dilated
    if getattr(config, "masks", False):                         # the least that the mask head's normalisation divides
        flags |= {"hidden_dim": 128, "nheads": 8}
    if hasattr(config, "num_feature_levels"):                   # two channels in each of the levels' normalisation groups
        flags["hidden_dim"] = 64
    return flags


def build_small(name: str, seed: int = 0, **flags) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(seed)
    return build_model(name, num_classes=NUM_CLASSES, **small_flags(name) | flags)


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def targets(*counts: int, size: tuple[int, int] = (64, 64)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"labels": torch.randint(NUM_CLASSES, (n,), generator=generator),
             "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.3,
             "masks": torch.rand(n, *size, generator=generator) > 0.5} for n in counts]


def published(name: str) -> bool:
    """Whether the preset has its paper's sizes, and its authors' weights somewhere that a program can fetch."""
    return PRESETS[name].url is not None


def changed(name: str) -> dict:
    """What the preset's configuration says otherwise than its architecture's default."""
    config = PRESETS[name].model
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
            if getattr(config, field.name) != field.default}
