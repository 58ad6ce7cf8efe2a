"""Every preset at a size that a test can run: its own architecture and options, small widths, few layers."""
import dataclasses

import torch
from torch import Tensor, nn

from detr import build_model
from detr.nested_tensor import nested_tensor_from_tensor_list
from detr.presets import PRESETS

NUM_CLASSES = 5
SMALL = {"hidden_dim": 32, "nheads": 4, "dim_feedforward": 48, "enc_layers": 2, "dec_layers": 2, "num_queries": 7}
SIZES = (64, 100), (90, 50)             # of a batch with padding, and no multiples of a stride


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


def unlike_at_first(model: nn.Module) -> nn.Module:
    """In float64, and no weight at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.is_floating_point() and (value.ndim == 1 or value.std() == 0):
                value += torch.randn(value.shape, generator=generator) * 0.1
    return model.double().eval()


def compare_with(definition, name: str, **flags) -> tuple[dict, nn.Module]:
    """A small model on a padded batch, and ``definition`` on each image's part of the projected map: what all layers say,
    and the gradients of all that comes after the map."""
    model = unlike_at_first(build_small(name, **flags)[0])
    maps: list[Tensor] = []
    model.input_proj.register_forward_hook(lambda module, args, out: maps.append(out.detach()))
    samples = nested_tensor_from_tensor_list([image.double() for image in images(*SIZES)])
    outputs = model(samples)
    mask = next(iter(model.backbone[0](samples).values())).mask
    assert mask.any() and mask.shape[1:] == maps[0].shape[2:]
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for i, src in enumerate(maps[0]):
        height, width = int((~mask[i]).any(1).sum()), int((~mask[i]).any(0).sum())
        defined = definition(model.state_dict(keep_vars=True), src[:, :height, :width], heads=4)
        for (logits, boxes), layer in zip(defined, [*outputs["aux_outputs"], outputs], strict=True):
            found += [layer["pred_logits"][i], layer["pred_boxes"][i]]
            expected += [logits, boxes]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator).double() for x in found]
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith(("backbone.", "input_proj."))}
    of_model, of_definition = (torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, values)),
                                                   [*parameters.values()]) for values in (found, expected))
    for name, a, b in zip(parameters, of_model, of_definition):
        assert (a - b).abs().max() < 1e-3 * max(1, b.abs().max()), name                 # boxes are float32 on the way
    assert min(outputs[key].std(1).mean() for key in ("pred_logits", "pred_boxes")) > 1e-3             # queries differ
    return outputs, model
