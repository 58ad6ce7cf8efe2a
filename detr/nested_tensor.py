"""Images of different sizes as one padded batch."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class NestedTensor:
    """A padded batch and where its padding is.

    ``tensors`` is ``[B, C, H, W]``; ``mask`` is bool ``[B, H, W]``, True on padding. ``sizes`` says the same in numbers,
    for code that must not wait for a GPU: (height, width) of what is not padding in each image, from the top left
    corner; None where nobody knows. In a model that is exported, where they are inputs, they are a tensor ``[B, 2]``.
    ``whole``: the caller knows that nothing is padding, though not the sizes.
    """

    def __init__(self, tensors: Tensor, mask: Tensor, sizes: Sequence[tuple[int, int]] | Tensor | None = None,
                 whole: bool = False) -> None:
        self.tensors = tensors
        self.mask = mask
        self.sizes: Any = sizes if sizes is None or isinstance(sizes, Tensor) else list(sizes)
        self.whole = whole

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NestedTensor:
        return NestedTensor(self.tensors.to(device, non_blocking=non_blocking),
                            self.mask.to(device, non_blocking=non_blocking), self.sizes, self.whole)

    def pin_memory(self) -> NestedTensor:
        return NestedTensor(self.tensors.pin_memory(), self.mask.pin_memory(), self.sizes, self.whole)

    @property
    def padded(self) -> bool:
        """Whether anything is padding: on a CPU what the mask says; elsewhere, since asking it would wait for the device,
        what ``whole`` and ``sizes`` say, and without them True. True, too, while a model is compiled or exported, for any
        batch. Who changes a mask on a GPU makes a new batch of it, without the old sizes."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return True
        if self.mask.device.type == "cpu":
            return bool(self.mask.any())
        if isinstance(self.sizes, list):
            return not self.whole and any(tuple(size) != self.mask.shape[-2:] for size in self.sizes)
        return not self.whole

    def key_padding_mask(self) -> Tensor | None:
        """The mask as attention takes it, ``[B, H * W]``, or None where nothing is padding: without one it is faster."""
        return self.mask.flatten(1) if self.padded else None

    def extents(self) -> list[tuple[int, int]]:
        """``sizes``, or what the mask says; ValueError where an image is no rectangle at the top left."""
        if self.sizes is not None:
            return self.sizes
        valid = ~self.mask
        sizes = [(h, w) for h, w in zip(valid[:, :, 0].sum(1).tolist(), valid[:, 0].sum(1).tolist())]
        for i, (h, w) in enumerate(sizes):
            if h * w != int(valid[i].sum()) or not valid[i, :h, :w].all() or h * w == 0:
                raise ValueError(f"the mask of image {i} of the batch {list(self.tensors.shape)} is not False on one "
                                 f"rectangle at the top left and True outside of it, as exact padding needs; correct "
                                 f"it, or use padding='legacy'")
        return sizes

    @property
    def padded_share(self) -> float:
        """The part of all pixels that is padding."""
        if self.sizes is None:
            return self.mask.float().mean().item()
        return 1 - sum(h * w for h, w in self.sizes) / self.mask.numel()

    def decompose(self) -> tuple[Tensor, Tensor]:
        return self.tensors, self.mask

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"NestedTensor(tensors={list(self.tensors.shape)}, padded={self.mask.float().mean().item():.1%})"


def nested_tensor_from_tensor_list(images: Sequence[Tensor]) -> NestedTensor:
    """Pad images ``[C, H, W]`` of any sizes with zeros, at the right and the bottom, to the largest height and
    width among them."""
    if len(images) == 0:
        raise ValueError("a batch needs at least one image; the list is empty")
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != images[0].shape[0]:
            raise ValueError(f"image {i} of the batch has shape {tuple(image.shape)}; images are [C, H, W] with the "
                             f"same C (the first is {tuple(images[0].shape)})")
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    tensors = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.ones((len(images), height, width), dtype=torch.bool, device=images[0].device)
    for i, image in enumerate(images):                  # by number: slices got by iterating take no gradients
        tensors[i, :, :image.shape[1], :image.shape[2]].copy_(image)
        mask[i, :image.shape[1], :image.shape[2]] = False
    return NestedTensor(tensors, mask, [(image.shape[1], image.shape[2]) for image in images])


def as_nested_tensor(samples: NestedTensor | Tensor | Sequence[Tensor]) -> NestedTensor:
    """What a model may be called with -> a padded batch: a ``NestedTensor``, images ``[C, H, W]`` in a list, or one
    tensor ``[B, C, H, W]`` without padding."""
    if isinstance(samples, NestedTensor):
        return samples
    return nested_tensor_from_tensor_list(list(samples))


def resize_mask(images: NestedTensor, size: torch.Size) -> Tensor:
    """The padding mask at the size of a feature map, by nearest neighbour (rounded down), as published."""
    return F.interpolate(images.mask[:, None].float(), size=size)[:, 0].bool()
