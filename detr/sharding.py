"""One model shared out over all processes (FSDP2, ``torch.distributed.fsdp.fully_shard``), and whole again for files,
evaluation and diagnosis.

Each process holds a part of every parameter, of its gradient and of its optimizer state. A layer's parameters are put
together when the layer is computed, and let go after it; those of the rest, the root's, stay from the beginning of the
forward pass to the end of the backward pass, since parts of the models read each other's parameters (queries, level
embeddings, shared heads) without calling the module that has them. All functions take a model that is not shared out,
too, and then do what one does without them.
"""
from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from . import distributed

SKELETON = "_skeleton"          # the attribute of a shared out model that keeps what ``whole`` makes copies of


def shard(model: nn.Module, parts: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Share ``model`` out over all processes, in place; the names of the ``parts`` that are put together one at a time.

    ``parts`` are modules of the model with their names, each called once in a forward pass and by nothing but that: the
    layers of encoder and decoder, the blocks of the backbone. To be called before the optimizer is made, by all
    processes, after the weights are loaded; all begin with those of rank 0. Names of parameters and what trains stay as
    they are; buffers stay whole. A model cannot be copied afterwards: an average of its weights is made before, and
    shared out likewise. One process alone keeps the whole model, and this is said.

    Raises RuntimeError where PyTorch cannot do it on this device, ValueError for a parameter that is a single number.
    """
    if not distributed.is_distributed():
        distributed.say("--fsdp: there is one process, which keeps the whole model")
        return []
    device = next(model.parameters()).device
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise RuntimeError(f"--fsdp: PyTorch {torch.__version__} shares models out over GPUs alone; use --device cuda, a "
                           f"newer PyTorch, or leave --fsdp out")
    if single := [name for name, parameter in model.named_parameters() if parameter.dim() == 0]:
        raise ValueError(f"--fsdp: the parameter {single[0]} is a single number, which cannot be shared out; use another "
                         f"--backbone, or leave --fsdp out")
    from torch.distributed.fsdp import fully_shard  # here alone: it takes a second
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, src=0)
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    skeleton = copy.deepcopy(model, cast(dict[int, Any], empty))
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    # Outputs are views of one tensor for all layers, which nothing here changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    names = []
    for name, part in parts:
        if any(True for _ in part.parameters()):
            before = {*part._forward_pre_hooks, *part._forward_hooks}
            fully_shard(part, mesh=mesh)
            _out_of_modes(part, before)
            names.append(name)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    vars(model)[SKELETON] = skeleton                                            # no child: it has no names of its own
    return names


def _out_of_modes(module: nn.Module, before: set[int]) -> None:
    """Let the hooks that are not of ``before`` run outside of function modes such as ``Exact``: putting parameters
    together is no part of the network."""
    def outside(hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                return hook(*args, **kwargs)
        return call

    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in hooks.keys() - before:
            hooks[number] = outside(hooks[number])


def is_sharded(model: nn.Module) -> bool:
    """Whether ``shard`` has shared it out."""
    return SKELETON in vars(model)


def _full(value: Any) -> Any:
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


def _share(value: Tensor, like: Any, what: str) -> Tensor:
    """This process's part of ``value``, if ``like`` is shared out."""
    if not isinstance(like, DTensor):
        return value
    if value.shape != like.shape:
        raise ValueError(f"{what} is {list(value.shape)}, and {list(like.shape)} is needed")
    return distribute_tensor(value.detach().to(like.device), like.device_mesh, like.placements)


def full_state(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()``, of a shared out model with whole tensors on the CPU, which the main process gets, and the
    others nothing. All processes must call it."""
    if not is_sharded(model):
        return model.state_dict()
    state: dict[str, Any] = {}
    copies: dict[int, Any] = {}                                                 # parameters under several names stay one
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in copies:
            tensor = _full(value)
            copies[id(value)] = tensor.detach().cpu() if distributed.is_main() and isinstance(tensor, Tensor) else None
        if distributed.is_main():
            state[name] = copies[id(value)]
    return state


def load_full_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """``model.load_state_dict(state)``, strictly, of whole tensors, which every process has. What does not fit is told
    by PyTorch, and then the model is as it was."""
    if is_sharded(model):
        own = model.state_dict()
        fits = own.keys() == state.keys() and all(own[name].shape == value.shape for name, value in state.items())
        if fits:                                                                # else all processes raise, below
            state = {name: _share(value, own[name], name) for name, value in state.items()}
    model.load_state_dict(state, strict=True)


def any_shared(parameters: Iterable[Tensor]) -> bool:
    """Whether one of them is shared out over processes."""
    return any(isinstance(p, DTensor) for p in parameters)


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()``, with whole tensors on the CPU where parameters are shared out, so that it loads
    anywhere. All processes must call it; then all but the main one get the groups alone."""
    state = optimizer.state_dict()
    if not any_shared(p for group in optimizer.param_groups for p in group["params"]):
        return state
    whole: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        full = {name: _full(value) for name, value in values.items()}
        if distributed.is_main():
            whole[number] = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in full.items()}
    return {**state, "state": whole}


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict(state)`` of whole tensors, which every process has; whether it is fused stays as
    ``optimizer`` has it for its device. ValueError where they misfit."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    shared: dict[int, dict[str, Any]] = {}
    if len(own) == len(numbers):                                                # else PyTorch says what is wrong
        for number, p in zip(numbers, own):
            shared[number] = {name: _share(value, p, f"{name} of parameter {number}")
                              if isinstance(value, Tensor) and value.dim() else value
                              for name, value in state["state"].get(number, {}).items()}
    fused = optimizer.defaults.get("fused")
    groups = [{**group, "fused": fused} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups,
                               "state": {n: values for n, values in shared.items() if values}})


def whole(model: nn.Module) -> nn.Module:
    """The model, or of one that is shared out a plain copy with the same weights, buffers and modes, which one process
    can use without the others: to evaluate it, processes having different numbers of batches, to draw what it finds, to
    look for the cause of values that are no numbers. All processes must call it. The copy takes the memory of the whole
    model's weights for as long as it is kept."""
    if not is_sharded(model):
        return model
    skeleton = vars(model)[SKELETON]
    for module in model.modules():                                              # after a forward pass without a backward
        if hasattr(module, "reshard"):                                          # pass, the root's parameters are together
            module.reshard()
    sharded = dict(model.named_parameters())
    weights = {id(p): nn.Parameter(_full(sharded[name]), sharded[name].requires_grad)
               for name, p in skeleton.named_parameters()}
    copied: nn.Module = copy.deepcopy(skeleton, cast(dict[int, Any], weights))
    with torch.no_grad():
        for buffer, now in zip(copied.buffers(), model.buffers()):
            buffer.copy_(now)
    for module, like in zip(copied.modules(), model.modules()):
        module.training = like.training
    return copied


def clip(model: nn.Module, max_norm: float) -> float:
    """Shorten the gradient of all parameters together to ``max_norm``; its length before. All processes must call it."""
    return float(_full(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
