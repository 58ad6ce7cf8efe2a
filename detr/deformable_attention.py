"""Multi-scale deformable attention (Zhu et al., 2021, section 4.1).

Every head of a query looks at a few points of each level instead of at all of it. Equation 3 samples the projected maps
bilinearly at these points and sums with attention weights; this file is that sampling (``deformable_sampling``) and the
module around it (``MSDeformAttn``).

The sampling has several paths that compute the same: ``definition`` (plain PyTorch, on every device and in every
precision, differentiable twice, exportable), ``cpu`` (faster on CPUs) and ``triton`` (CUDA). The path is chosen by
device, or by the argument ``path``, or by the environment variable ``DETR_DEFORMABLE_PATH``; ``served`` counts the calls
of each.
"""
from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deformable_cpu import sample as sample_on_cpu
from .structures import FeatureLevels

Shapes = Sequence[tuple[int, int]]
Sampler = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]

ENVIRONMENT = "DETR_DEFORMABLE_PATH"
TRITON = importlib.util.find_spec("triton") is not None
served: Counter[str] = Counter()            # calls of each path in this process


def definition(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Equation 3 without its projections, as published: sample each level, stack, weigh, sum."""
    batch, _, heads, width = value.shape
    _, queries, _, num_levels, points_each, _ = locations.shape
    exact = torch.promote_types(value.dtype, locations.dtype)
    levels = value.to(exact).split([h * w for h, w in shapes], dim=1)
    sampled = []
    for (h, w), level, points in zip(shapes, levels, locations.unbind(3)):
        image = level.permute(0, 2, 3, 1).reshape(batch * heads, width, h, w)
        grid = 2 * points.transpose(1, 2).reshape(batch * heads, queries, points_each, 2) - 1
        sampled.append(F.grid_sample(image, grid.to(exact), mode="bilinear", padding_mode="zeros", align_corners=False))
    stacked = torch.stack(sampled, dim=3)                                                   # [B * M, D / M, Q, L, P]
    weights = weights.to(exact).transpose(1, 2).reshape(batch * heads, 1, queries, num_levels, points_each)
    summed = (stacked * weights).sum((-2, -1))                                              # [B * M, D / M, Q]
    return summed.reshape(batch, heads * width, queries).transpose(1, 2).to(value.dtype)


def sample_with_triton(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The Triton kernels; imported at the first use, since not every PyTorch brings Triton."""
    from .deformable_triton import sample
    return sample(value, shapes, locations, weights)


PATHS: dict[str, Sampler] = {"definition": definition, "cpu": sample_on_cpu, "triton": sample_with_triton}


def check_path(path: str, by: str) -> None:
    """Refuse a name that is no path; ``by`` says who gave it."""
    if path not in PATHS:
        raise ValueError(f"{by} {path!r} is no path of deformable attention; use one of {', '.join(PATHS)}")


def choose_path(device: torch.device, path: str | None = None) -> str:
    """The path for a device: what the argument says, else what the environment says, else the fastest there is."""
    wanted, by = (path, "path") if path else (os.environ.get(ENVIRONMENT), ENVIRONMENT)
    if wanted:
        check_path(wanted, by)
        if wanted == "cpu" and device.type != "cpu":
            raise ValueError(f"{by} cpu is for tensors on a CPU, and these are on {device}; use triton or definition")
        if wanted == "triton" and not TRITON:
            raise ValueError(f"{by} triton: this PyTorch has no Triton; pip install triton, or use definition")
        if wanted == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"{by} triton is for tensors on a GPU, and these are on the CPU; use cpu or definition")
        return wanted
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "definition"                                                             # what compilers can look into
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda":
        if TRITON:
            return "triton"
        warnings.warn("deformable attention runs in plain PyTorch, slowly: this PyTorch has no Triton (pip install "
                      "triton)", stacklevel=2)
    return "definition"


def deformable_sampling(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor,
                        path: str | None = None) -> Tensor:
    """The weighted sum of bilinear samples, for every query and head.

    ``value [B, S, M, D / M]``: the tokens of all levels one after the other, each row by row; ``shapes``: height and
    width of each level; ``locations [B, Q, M, L, P, 2]``: (x, y) as fractions of the level, where 0 and 1 are the outer
    edges of its border pixels, and what lies outside counts as zero; ``weights [B, Q, M, L, P]``. Returns ``[B, Q, D]``
    in the type of ``value``; bfloat16 and float16 values are summed in float32, and locations should be float32 even
    then.
    """
    if sum(h * w for h, w in shapes) != value.shape[1]:
        raise ValueError(f"value has {value.shape[1]} tokens, and levels of {list(shapes)} have "
                         f"{sum(h * w for h, w in shapes)}")
    expected = (value.shape[0], value.shape[2], len(shapes), 2)
    if (locations.shape[:1] + locations.shape[2:4] + locations.shape[5:] != expected
            or weights.shape != locations.shape[:-1]):
        raise ValueError(f"value {list(value.shape)}, locations {list(locations.shape)} and weights "
                         f"{list(weights.shape)} of {len(shapes)} levels: they should be [B, S, M, D / M], "
                         f"[B, Q, M, L, P, 2] and [B, Q, M, L, P]")
    name = choose_path(value.device, path)
    if not torch.compiler.is_compiling():
        served[name] += 1
    return PATHS[name](value, shapes, locations, weights)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections, under the published parameter names.

    ``d_model`` channels, ``n_levels`` levels, ``n_heads`` heads, ``n_points`` points a head and level.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4,
                 path: str | None = None) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"hidden_dim {d_model} does not divide into nheads {n_heads}; "
                             f"choose --nheads among the divisors of --hidden_dim")
        if path is not None:
            check_path(path, "path")
        self.n_levels, self.n_heads, self.n_points, self.path = n_levels, n_heads, n_points, path
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in section A.4: at first the heads look in as many directions of a ring, the k-th point k pixels away, and
        all points weigh the same."""
        angle = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)                      # onto a square: [M, 2]
        distance = torch.arange(1, self.n_points + 1)[:, None]                              # [P, 1]
        ring = (direction[:, None, None] * distance).expand(-1, self.n_levels, -1, -1)      # [M, L, P, 2]
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(ring.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def for_each_point(self, x: Tensor) -> Tensor:
        """``[..., L, 2]`` -> ``[..., 1, L * P * 2]``: in this order processors add fastest to all heads' points."""
        return x[..., None, :].expand(*x.shape[:-1], self.n_points, 2).flatten(-3)[..., None, :]

    def forward(self, query: Tensor, reference: Tensor, tokens: Tensor, levels: FeatureLevels) -> Tensor:
        """``query [B, Q, D]``; ``reference [B, Q, L, 2]`` (x, y), or ``[B, Q, L, 4]`` boxes (cxcywh), as fractions of
        each level; ``tokens [B, S, D]``: what has become of the tokens of ``levels``. Returns ``[B, Q, D]``.

        Offsets are in pixels of a level around points, and in eighths (of 4 points) of the box around boxes.
        """
        value = self.value_proj(tokens)
        if levels.padded:
            value = value.masked_fill(levels.mask[..., None], 0.0)
        value = value.unflatten(-1, (self.n_heads, -1))
        points = (self.n_heads, self.n_levels, self.n_points)
        with torch.autocast(query.device.type, enabled=False):      # where to look is worth float32
            query = query.to(self.sampling_offsets.weight.dtype)
            offsets = self.sampling_offsets(query).unflatten(-1, (self.n_heads, -1))        # [B, Q, M, L * P * 2]
            weights = self.attention_weights(query).unflatten(-1, (self.n_heads, -1)).softmax(-1)
            weights = weights.unflatten(-1, points[1:])                                     # [B, Q, M, L, P]
            centre = self.for_each_point(reference[..., :2])
            if reference.shape[-1] == 2:
                locations = centre + offsets / self.for_each_point(levels.sizes)
            else:
                locations = centre + offsets / self.n_points * self.for_each_point(reference[..., 2:]) * 0.5
            locations = locations.unflatten(-1, (*points[1:], 2))                           # [B, Q, M, L, P, 2]
        return self.output_proj(deformable_sampling(value, levels.shapes, locations, weights, self.path))
