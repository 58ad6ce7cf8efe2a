"""In which numbers a model computes, and whether it computes the same ones again."""
from __future__ import annotations

import os

import torch

from .distributed import say

TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(amp: str, device: torch.device) -> str:
    """``auto`` -> ``bf16`` where the device computes in it fast, else ``off``; said."""
    if amp == "fp16" and device.type == "cpu":
        say("--amp fp16: processors compute slowly in it; bf16 is what they may be fast in")
    if amp != "auto":
        return amp
    fast = fast_in_bf16(device)
    say(f"training in {'bfloat16' if fast else 'float32, since this processor has no fast bfloat16'} (--amp auto)")
    return "bf16" if fast else "off"


def fast_in_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16."""
    if device.type == "cpu":
        return getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """What a forward pass of ``amp`` runs in; ``off`` changes nothing."""
    return torch.autocast(device.type, TYPES[amp] if amp != "off" else torch.bfloat16, enabled=amp != "off")


def make_scaler(device: torch.device, amp: str) -> torch.amp.GradScaler | None:
    """What keeps small gradients of ``fp16`` above zero; other precisions have the range of float32 and need none."""
    return torch.amp.GradScaler(device.type) if amp == "fp16" else None


def be_deterministic(device: torch.device) -> None:
    """From now on PyTorch takes the implementations that give the same numbers each time, or raises RuntimeError naming
    the operation that has none."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    say("deterministic: the same numbers in every run on this machine with as many processes and threads")
