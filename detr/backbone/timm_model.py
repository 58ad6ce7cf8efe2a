"""Backbones of timm (Wightman, 2019: "PyTorch Image Models"), by name: ``timm/convnext_tiny``, ``timm/resnet50.a1_in1k``.

timm says which maps a model has (``feature_info``); what it does not say is found out once for each name on a sketch, the
model on the meta device, where nothing is computed: which sizes it takes, which parameters a map depends on, and whether
each of its functions is one that ``Exact`` knows. Of several maps with one stride the last is used, and none finer than
stride 4, so that strides are 4, 8, 16, 32 for most. timm is imported where it is used, since that takes seconds.
"""
from __future__ import annotations

import difflib
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checkpoint
from ..exact_mode import Exact, Inexact
from ..padding import Size, Window, check_sizes, zeroed

PREFIX = "timm/"
NO_MAPS = ("gemma4_vit",)       # modules of timm whose models' maps cannot be found out on a sketch
FINEST = 4                      # stride; no detector uses a finer map
ANY_SIZE: tuple[dict[str, Any], ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})     # as timm has it
SKETCHED = 149                  # pixels a side of a sketch's images, at least; twice as wide as high, so none is 7 x 7
WINDOWS = (1, 2, 3, 4, 6, 7, 8, 12, 16, 24)        # positions a side that attention in windows wants whole, coarsest map
# timm's modules whose models are tested to be exact in padded batches. Those of them with a function that is not known
# (SAME padding, blurred pooling, attention) are not exact, and say so.
EXACT = ("byobnet", "convnext", "cspnet", "densenet", "dpn", "efficientnet", "fasternet", "ghostnet", "hardcorenas",
         "inception_next", "lcnetv2", "metaformer", "mobilenetv3", "regnet", "repghost", "repvit", "res2net", "resnet",
         "rexnet", "selecsls", "senet", "starnet", "vgg", "vovnet", "xception", "xception_aligned")


def library() -> Any:
    """timm itself. ImportError where it is not installed."""
    try:
        import timm  # here alone: it takes seconds, and only these backbones need it
    except ImportError as error:
        raise ImportError("--backbone timm/... needs the package timm: pip install timm, or use one of the backbones "
                          "without timm/") from error
    return timm


def configuration(name: str) -> Any:
    """timm's record of a model's weights: where they are, how its images are normalised, which size it was made for.
    ``name`` is with or without ``timm/``, with or without a tag (``.a1_in1k``). ValueError for an unknown one."""
    timm, bare = library(), name.removeprefix(PREFIX)
    architecture, _, tag = bare.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm_names(), 5, 0.5)
        raise ValueError(f"--backbone {PREFIX}{bare}: timm {timm.__version__} has no model {architecture!r}; "
                         + (f"nearest are {', '.join(PREFIX + one for one in near)}" if near else
                            "timm.list_models() lists all"))
    tags = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and bare not in tags:
        raise ValueError(f"--backbone {PREFIX}{bare}: {architecture} has no weights {tag!r}; it has "
                         f"{', '.join(PREFIX + one for one in tags) or 'none'}")
    return timm.models.get_pretrained_cfg(bare, allow_unregistered=False)


def timm_names() -> list[str]:
    """All models that can be a backbone, without ``timm/``: those of timm but for ``NO_MAPS``."""
    timm = library()
    without = set().union(*(timm.list_models(module=module) for module in NO_MAPS))
    return [name for name in timm.list_models() if name not in without]


def statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the images (RGB in 0..1) that a model's weights were trained with."""
    found = configuration(name)
    return tuple(found.mean), tuple(found.std)


def pretrained(name: str) -> tuple[dict[str, Any], str]:
    """A model's published weights, fetched where they are not in the cache, and where they come from.

    From the address that timm has, or else from the Hugging Face hub, read by ``checkpoint.load``. ValueError where there
    are none (it names the tags that have some) or the file is not what it should be, OSError without a network.
    """
    found, timm = configuration(name), library()
    if found.url and not found.url.endswith(".npz"):            # what is in JAX's format, the hub has in PyTorch's
        return checkpoint.load(found.url)["model"], found.url
    if found.hf_hub_id and found.custom_load != "hf":
        return _from_hub(found.hf_hub_id, found.hf_hub_filename)
    bare = name.removeprefix(PREFIX)
    tags = timm.list_models(f"{bare.partition('.')[0]}.*", pretrained=True)
    raise ValueError(f"timm has no weights for {PREFIX}{bare} that can be read here; "
                     + (f"it has some for {', '.join(PREFIX + tag for tag in tags)}" if tags else
                        "train it --from_scratch, or give a file"))


def _from_hub(repository: str, file: str | None) -> tuple[dict[str, Any], str]:
    try:
        import huggingface_hub  # here alone: a dependency of timm's
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise ImportError(f"the weights {repository} are on the Hugging Face hub: pip install huggingface_hub") from error
    repository, _, revision = repository.partition("@")
    wanted = file or "pytorch_model.bin"
    safe = "model.safetensors" if file is None else file.rpartition(".")[0] + ".safetensors"
    for candidate in dict.fromkeys((safe, wanted)):
        source = f"https://huggingface.co/{repository}/{candidate}"
        try:
            path = huggingface_hub.hf_hub_download(repository, candidate, revision=revision or None)
        except EntryNotFoundError:
            continue
        except OSError as error:                                # its errors of the network are OSErrors
            raise OSError(f"cannot download {source}: {error}. Without a network, fetch it elsewhere and give the path "
                          f"of the file") from error
        return checkpoint.load(path)["model"], source
    raise ValueError(f"{repository} on the Hugging Face hub has neither {safe} nor {wanted}; fetch a file of its weights "
                     f"and give its path")


# Normalisation

class FrozenBatchNorm(nn.Module):
    """A batch normalisation of timm's, and the activation it may end with, with fixed statistics and fixed affine
    parameters, all of them buffers under the names they had. In lower precision it stays in the precision of its input,
    where timm's own would go back to float32.

    A class beside ``resnet.FrozenBatchNorm2d``, since timm's may have no affine parameters, read vectors ``[B, C]``, and
    carry dropout and activation under the one name."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.num_features, self.eps = norm.num_features, norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(norm, name)
            self.register_buffer(name, None if value is None else value.detach().clone())
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.running_var + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -self.running_mean * scale
        shift = shift if self.bias is None else shift + self.bias
        scale, shift = scale.to(x.dtype), shift.to(x.dtype)
        if x.ndim == 4:
            scale, shift = scale[:, None, None], shift[:, None, None]
        return self.act(self.drop(x * scale + shift))


def freeze_batch_norms(module: nn.Module) -> None:
    """Put a ``FrozenBatchNorm`` in the place of every batch normalisation inside ``module``."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, FrozenBatchNorm(child))
        else:
            freeze_batch_norms(child)


# The backbone

class Plan(NamedTuple):
    """What there is to know of a model before it is built."""
    options: dict[str, Any]                 # of timm.create_model
    channels: list[int]
    strides: list[int]
    reads: list[frozenset[str]]             # of each map: the parameters it depends on
    multiple: int                           # of pixels a side that the model takes; 0 where it takes one size only
    only: Size                              # which that is
    windows: list[list[Window]]             # of each map; none where the model is not exact
    inexact: str                            # why it is not


def sketch(name: str, **options: Any) -> nn.Module:
    """A model without values, on the meta device, in training mode."""
    create = functools.partial(library().create_model, name.removeprefix(PREFIX), features_only=True, pretrained=False)
    try:
        with torch.device("meta"):
            return create(**options)
    except (RuntimeError, NotImplementedError):                 # timm's that compute with tensors to be built
        return create(**options)


def maps_of(net: nn.Module, images: Tensor) -> list[Tensor]:
    """timm's maps as ``[B, C, H, W]``."""
    maps = net(images)
    last = str(getattr(net, "output_fmt", "")).upper().endswith("NHWC")     # an enumeration, or its value
    return [x.permute(0, 3, 1, 2) if last else x for x in maps]


def run(net: nn.Module, size: Size, plan: Plan) -> list[Tensor] | None:
    """The maps of two images of ``size``, or None where the model does not take it."""
    device = next(net.parameters()).device
    try:
        maps = maps_of(net, torch.zeros(2, plan.options["in_chans"], *size, device=device))
    except (AssertionError, RuntimeError, ValueError, IndexError, ZeroDivisionError):   # timm's ways to refuse a size
        return None
    fit = len(maps) == len(plan.strides) and all(
        x.ndim == 4 and x.shape[1] == channels and max(abs(a - b / stride) for a, b in zip(x.shape[-2:], size)) < 5
        for x, channels, stride in zip(maps, plan.channels, plan.strides))
    return maps if fit else None


@functools.lru_cache(128)
@torch.inference_mode(False)
@torch.enable_grad()            # whoever builds a model for inference first does not decide what depends on what
def plan_of(name: str, dilation: bool, in_channels: int) -> Plan:
    """What there is to know of a model, found out on sketches of it. ValueError where it cannot be a backbone."""
    found = configuration(name)
    for any_size in ANY_SIZE if found.fixed_input_size else ({},):
        options = {"in_chans": in_channels, **any_size}
        try:
            net, options = chosen_maps(name, dilation, options)
        except TypeError:                                       # it has no such option
            if any_size:
                continue
            raise
        said = net.feature_info
        plan = Plan(options, said.channels(), said.reduction(), [], 0, found.input_size[1:], [], "")
        whole = math.lcm(*plan.strides)
        for multiple in dict.fromkeys((1, *plan.strides, *(whole * n for n in WINDOWS))):
            odd = -(-SKETCHED // multiple) | 1
            if maps := run(net, (odd * multiple, (2 * odd + 1) * multiple), plan):
                plan = plan._replace(multiple=multiple)
                break
        else:
            maps = run(net, plan.only, plan)
        if plan.multiple:
            break
    if not maps:
        raise ValueError(f"--backbone {PREFIX}{name}: for no size that was tried does this model give the maps that timm "
                         f"says it has (channels {plan.channels}, strides {plan.strides}); use another one, for instance "
                         f"{PREFIX}resnet50 or {PREFIX}convnext_tiny")
    windows, inexact = known_windows(name, net, plan)
    return plan._replace(reads=parameters_read(net, maps), windows=windows, inexact=inexact)


def chosen_maps(name: str, dilation: bool, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A sketch with the maps that are used, the last of each stride from ``FINEST`` on, and the options it has."""
    try:
        strides = [one["reduction"] for one in sketch(name, **options).feature_info.info]
    except RuntimeError as error:                               # timm's way to say so
        near = ", ".join(PREFIX + other for other in nearest_with_maps(name))
        raise ValueError(f"--backbone {PREFIX}{name}: timm has no feature maps of this model ({error}); it has some of "
                         f"{near}") from error
    last = [i for i, stride in enumerate(strides) if stride >= FINEST and stride not in strides[i + 1:]]
    options = {**options, "out_indices": tuple(last)}
    if not dilation:
        return sketch(name, **options), options
    options["output_stride"] = strides[-1] // 2
    try:
        net = sketch(name, **options)
        if net.feature_info.reduction()[-1] == strides[-1] // 2:
            return net, options
    except (TypeError, AssertionError, NotImplementedError, ValueError, RuntimeError):      # timm's ways to refuse it
        pass
    raise ValueError(f"--dilation needs a network whose last stage timm can dilate (output_stride), which "
                     f"{PREFIX}{name} is not: leave it out, or use --backbone {PREFIX}resnet50")


def nearest_with_maps(name: str) -> list[str]:
    """Up to four models that have feature maps, of names near to that of one that has none, and ``resnet50``."""
    def has_maps(other: str) -> bool:
        try:
            return bool(sketch(other).feature_info.info)
        except (RuntimeError, AttributeError):
            return False

    bare = name.partition(".")[0]
    near = difflib.get_close_matches(bare, [other for other in timm_names() if other != bare], 8, 0.5)
    return list(dict.fromkeys([*list(filter(has_maps, near))[:4], "resnet50"]))


def parameters_read(net: nn.Module, maps: Sequence[Tensor]) -> list[frozenset[str]]:
    """Of each map, the names of the parameters that it depends on: the leaves of its graph."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = []
    for x in maps:
        seen: set[Any] = set()
        rest: list[Any] = [x.grad_fn]
        while rest:
            node = rest.pop()
            if node is not None and node not in seen:
                seen.add(node)
                rest += [before for before, _ in node.next_functions]
        found.append(frozenset(names[id(node.variable)] for node in seen if hasattr(node, "variable")))
    return found


def cut(module: nn.Module, read: frozenset[str], prefix: str = "") -> None:
    """Delete the last parts of sequences whose parameters are not ``read``: timm leaves some behind the last map."""
    while isinstance(module, nn.Sequential) and len(module) > 1:
        last, child = list(module.named_children())[-1]
        names = [f"{prefix}{last}.{name}" for name, _ in child.named_parameters()]
        if not names or not read.isdisjoint(names):
            break
        delattr(module, last)
    for name, child in module.named_children():
        cut(child, read, f"{prefix}{name}.")


def known_windows(name: str, net: nn.Module, plan: Plan) -> tuple[list[list[Window]], str]:
    """The windows that each map came about by, or none, and why the model is not exact."""
    timm, bare = library(), name.partition(".")[0]
    if not any(timm.models.is_model_in_modules(bare, [module]) for module in EXACT):
        return [], f"{PREFIX}{name} is not of a family that is tested to be exact"
    images = torch.zeros(2, plan.options["in_chans"], 160, 224, device=next(net.parameters()).device)
    mode = Exact(images, [(160, 131), (97, 224)])
    try:
        with torch.no_grad(), mode:
            maps = maps_of(net, images)
    except Inexact as reason:
        return [], f"{PREFIX}{name} uses {reason}, which is not known to be exact"
    return [mode.windows[x.shape[-2], x.shape[-1]] for x in maps], ""


def prefixes(names: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """How ``names`` begin, in as few and short beginnings as none of the ``others`` has."""
    taken = {other[:i + 1] for other in others for i, letter in enumerate(other) if letter == "."}
    short = []
    for name in names:
        ends = [i + 1 for i, letter in enumerate(name) if letter == "."]
        short.append(next((name[:end] for end in ends if name[:end] not in taken), name))
    return tuple(dict.fromkeys(short))


def has_batch_norm(name: str) -> bool:
    """Whether a model's normalisation keeps statistics of batches."""
    configuration(name)
    return any(isinstance(module, _BatchNorm) for module in sketch(name).modules())


class TimmBody(nn.Module):
    """A model of timm's without its classifier, with random weights; returns its maps: a list of ``[B, channels[i],
    H / strides[i], W / strides[i]]``, finest first.

    ``norm`` is ``frozen`` or, where the model has batch norms, ``batch``. ``dilation`` halves the last stride, where
    timm can. ``exact`` says whether the ``sizes`` of the images in a batch can be used, ``inexact`` why not. A model that
    takes only multiples of some number as sides is given images padded to the next, and its maps are cut to the images;
    one that takes a single size states it as ``only``.

    Parameters that no map depends on are deleted, or do not require a gradient where timm's model cannot do without
    them. ``unused`` names those that some of the maps depend on, but not the ones that are asked for.
    """
    def __init__(self, name: str, norm: str = "frozen", dilation: bool = False, in_channels: int = 3) -> None:
        super().__init__()
        self.name, self.norm = name.removeprefix(PREFIX), norm
        self.plan = plan = plan_of(self.name, dilation, in_channels)
        self.only = None if plan.multiple else plan.only
        self.exact, self.inexact = not plan.inexact, plan.inexact
        self.build(len(plan.strides))

    def build(self, maps: int) -> None:
        """Make the model with the first ``maps`` of its maps."""
        plan, name = self.plan, PREFIX + self.name
        options = {**plan.options, "out_indices": plan.options["out_indices"][:maps]}
        net = library().create_model(self.name, features_only=True, pretrained=False, **options)
        self.has_batch_norm = any(isinstance(module, _BatchNorm) for module in net.modules())
        if self.norm == "group" or self.norm != "frozen" and not self.has_batch_norm:
            has = "batch norms: use frozen or batch" if self.has_batch_norm else "no batch norms: leave it out"
            raise ValueError(f"--backbone_norm {self.norm} has no meaning for {name}, which has {has}")
        if self.norm == "frozen":
            freeze_batch_norms(net)
        self.net = net
        self.channels, self.strides = plan.channels[:maps], plan.strides[:maps]
        read: set[str] = set()
        cut(net, frozenset().union(*plan.reads[:maps]))
        parameters = dict(net.named_parameters())
        stages = []
        for of_map in plan.reads[:maps]:
            stages.append([name for name in parameters if name in of_map - read])
            read |= of_map
        rest = [name for name in parameters if name not in read]
        for name in rest:
            parameters[name].requires_grad_(False)
        stages[0] += rest
        self.stages = [tuple("net." + prefix for prefix in
                             prefixes(stage, [name for name in parameters if name not in stage])) for stage in stages]
        self.classifier: tuple[str, ...] = ()                               # ``renamed`` leaves it out
        self.first_layer = self.find_first_layer(parameters)

    def find_first_layer(self, parameters: dict[str, nn.Parameter]) -> str:
        """The convolution that sees the images' channels; empty where they are rearranged before one does."""
        said = configuration(self.name).first_conv or ()
        said = (said,) if isinstance(said, str) else said
        first = next((name for name, parameter in parameters.items() if parameter.ndim == 4), "")
        for name in [*(self.name_here(f"{one}.weight", parameters) for one in said), first]:
            if name and parameters[name].ndim == 4 and parameters[name].shape[1] == self.plan.options["in_chans"]:
                return "net." + name
        return ""

    def keep(self, maps: int) -> None:
        """Drop everything after the first ``maps`` maps."""
        if maps < len(self.strides):
            before = self.net.state_dict()
            self.build(maps)
            self.net.load_state_dict({name: before[name] for name in self.net.state_dict()})

    def unused(self, maps: Sequence[int]) -> list[str]:
        """Parameters that require a gradient and that none of these maps depends on."""
        read = set().union(*(self.plan.reads[i] for i in maps))
        return [name for name, p in self.named_parameters() if p.requires_grad and name.removeprefix("net.") not in read]

    def extents(self, size: Size) -> list[Size]:
        """(height, width) of each map of an image of ``size``, for an exact model."""
        if not self.exact:
            raise ValueError(f"{self.inexact}: its maps have no extents; use --padding legacy")
        sizes = []
        for windows in self.plan.windows[:len(self.strides)]:
            sizes.append(functools.reduce(lambda at, window: window.sizes([at])[0], windows, size))
        return sizes

    def forward(self, images: Tensor, sizes: Sequence[Size] | None = None) -> list[Tensor]:
        """``images [B, C, H, W]`` -> the maps. Without ``sizes`` timm's computation, which takes padding for a part of
        the image.

        ``sizes`` are (height, width) of the images in the batch, whatever lies outside: each image's maps are then those
        of the image alone inside ``extents(size)``, and arbitrary, but finite, outside. ValueError for a model that is
        not ``exact``, and for images of another size than ``only``.
        """
        height, width = images.shape[-2:]
        if images.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            images = images.contiguous(memory_format=torch.channels_last)
        if sizes is not None:
            if not self.exact:
                raise ValueError(f"{self.inexact}: it cannot use the images' sizes; use --padding legacy")
            mode = Exact(images, check_sizes(images, sizes))
            images = zeroed(images, mode.at[height, width])
            with mode:
                return maps_of(self.net, images)
        if self.only is not None and (height, width) != self.only:
            h, w = self.only
            raise ValueError(f"{PREFIX}{self.name} takes images of {h} x {w} only, and the batch is {height} x {width}: "
                             f"use --image_size {h}x{w}, or a backbone for any size")
        down, right = (-side % max(self.plan.multiple, 1) for side in (height, width))
        maps = maps_of(self.net, F.pad(images, (0, right, 0, down)) if down or right else images)
        if self.plan.multiple <= 1:
            return maps
        return [x[..., :-(-height // stride), :-(-width // stride)] for x, stride in zip(maps, self.strides)]

    def name_here(self, name: str, ours: Any) -> str:
        """A name of the classification model's as timm's wrapper of it has it, or an empty one."""
        candidates = (name, f"model.{name}", f"body.{name}", name.replace(".", "_", 1))
        return next((candidate for candidate in candidates if candidate in ours), "")

    def renamed(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A classification file's tensors under the names here, and the names left out: what lies behind the maps.

        Files of timm's, and those that timm converts (its ``checkpoint_filter_fn``). The first layer keeps its number of
        channels. ``num_batches_tracked`` is dropped where frozen norms have no place for it.
        """
        direct = self.under_names_here(state_dict)
        convert = getattr(sys.modules[library().models.model_entrypoint(self.name.partition(".")[0]).__module__],
                          "checkpoint_filter_fn", None)
        if not self.lacks(direct[0]) or convert is None:
            return direct
        options = {key: value for key, value in self.plan.options.items() if key not in ("out_indices", "in_chans")}
        try:
            with torch.device("meta"):
                whole = library().create_model(self.name, pretrained=False, **options)
            converted = self.under_names_here(convert(dict(state_dict), whole))
        # Each of timm's converters takes the names and shapes that it knows for given, and stumbles over another model's
        # file in its own way. Loading then names what does not fit.
        except (RuntimeError, KeyError, AttributeError, TypeError, AssertionError, ValueError):
            return direct
        return converted if len(self.lacks(converted[0])) < len(self.lacks(direct[0])) else direct

    def under_names_here(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        ours = self.net.state_dict()
        names = {name: self.name_here(name, ours) for name in state_dict}
        left_out = [name for name, ours in names.items() if not ours and not name.endswith("num_batches_tracked")]
        return {"net." + here: state_dict[name] for name, here in names.items() if here}, left_out

    def lacks(self, state_dict: dict[str, Any]) -> list[str]:
        """Tensors of ours that are not there, or of another shape; the first layer's channels may be others."""
        return [name for name, ours in self.state_dict().items() if not name.endswith("num_batches_tracked")
                and (name not in state_dict
                     or name != self.first_layer and state_dict[name].shape != ours.shape)]
