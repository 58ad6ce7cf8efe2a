"""Several processes as one: who am I, sums and means over all of them.

Every function also works, and does nothing costly, in a program of one process. Nothing happens on import.
"""
from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MEETING = "detr/port of rank 0"
TIMEOUT = timedelta(minutes=30)      # longer than rank 0 needs to score a whole validation set while the others wait


class Process(NamedTuple):
    """This process among those that ``torchrun`` started; alone, it is rank 0 of 1."""
    rank: int
    world_size: int
    local_rank: int             # rank on this machine
    device: torch.device        # where this process computes


def _from_environment(name: str, default: int | None = None) -> int:
    value = os.environ.get(name, default)
    try:
        return int(value)                                                                  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"several processes: the environment variable {name} is {value!r}, but a whole number is "
                         f"needed; start them with `torchrun --nproc-per-node=N main.py ...`, which sets RANK, "
                         f"WORLD_SIZE and LOCAL_RANK") from None


def _device(name: str, local_rank: int, several: bool) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda":
        if several and device.index is not None:
            raise ValueError(f"device {name} with several processes: each takes the GPU of its LOCAL_RANK; use device "
                             f"cuda, and CUDA_VISIBLE_DEVICES to choose among GPUs")
        wanted = local_rank if device.index is None else device.index
        if wanted >= torch.cuda.device_count():
            raise ValueError(f"device {name} needs GPU number {wanted}, but PyTorch sees {torch.cuda.device_count()}; "
                             f"use device cpu" + (" or fewer processes" if several else ""))
        if several:
            device = torch.device("cuda", local_rank)
        torch.cuda.set_device(wanted)
    elif several and device.type != "cpu":
        raise ValueError(f"device {name} with several processes: they can share work on cuda and cpu only; use one of "
                         f"these, or start one process")
    return device


def init(device: str = "cuda", dist_url: str = "env://") -> Process:
    """Join the processes that ``torchrun`` started, as its environment (RANK, WORLD_SIZE, LOCAL_RANK) says.

    Without that environment, or with a WORLD_SIZE of 1, this process is alone and no group is made. Several
    processes speak NCCL about tensors on GPUs and Gloo about tensors on the CPU. ``dist_url`` is where they meet:
    ``env://`` (MASTER_ADDR and MASTER_PORT), ``tcp://host:port`` or ``file:///a/shared/file``. Raises ValueError when
    the environment is incomplete or the device is not there.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Process(0, 1, 0, _device(device, 0, several=False))
    rank, world_size = _from_environment("RANK"), _from_environment("WORLD_SIZE")
    local_rank = _from_environment("LOCAL_RANK", 0 if world_size == 1 else None)
    process = Process(rank, world_size, local_rank, _device(device, local_rank, several=world_size > 1))
    if world_size > 1:
        on_gpu = process.device.type == "cuda"
        store = _store_of_this_start(rank) if dist_url == "env://" else None
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", init_method=None if store else dist_url,
                                store=store, timeout=TIMEOUT, rank=rank, world_size=world_size,
                                device_id=process.device if on_gpu else None)
    return process


def _store_of_this_start(rank: int) -> dist.Store | None:
    """Where the processes that ``torchrun`` has started meet. Its own store lives on when it starts them again
    (``--max-restarts``), and still has the addresses of those that are gone, which new ones would wait for; so rank 0
    opens another, and that of ``torchrun`` only says where. None without ``torchrun``, whose store nobody shares."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], _from_environment("MASTER_PORT")
    board = dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
        board.set(MEETING, str(store.port))
        return store
    until = time.monotonic() + TIMEOUT.total_seconds()
    while True:
        try:                                            # at first it may still be the former rank 0's, which is gone
            store = dist.TCPStore(host, int(board.get(MEETING)), is_master=False, timeout=timedelta(seconds=2),
                                  wait_for_workers=False)
        except RuntimeError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
            continue
        store.set_timeout(TIMEOUT)
        return store


def is_distributed() -> bool:
    """Whether this process is one of several that have joined."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that prints and writes."""
    return rank() == 0


def say(text: str) -> None:
    """Print once, not once a process."""
    if is_main():
        print(text, flush=True)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of every process's ``tensor`` (same shape and type everywhere), without gradient; ``tensor`` itself is
    not changed. All processes must call it."""
    if not is_distributed():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def any_of(*facts: bool) -> tuple[bool, ...]:
    """Which of ``facts`` hold in one process at least; all must call it, and all get the same answers."""
    if not is_distributed():
        return facts
    # NCCL takes the logarithm of the number of processes, Gloo as many turns as there are.
    device = torch.cuda.current_device() if "nccl" in dist.get_backend_config() else "cpu"
    return tuple((sum_over_processes(torch.tensor(facts, dtype=torch.float32, device=device)) > 0).tolist())


def mean_over_processes(values: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """Named scalars -> their means over processes, float32 without gradient, in one exchange.

    All processes must call it, with the same names.
    """
    if not values:
        return {}
    names = sorted(values)               # a dict filled in another order elsewhere must not mix up the numbers
    device = next((value.device for value in values.values() if isinstance(value, Tensor)), None)
    scalars = [torch.as_tensor(values[name], dtype=torch.float32, device=device).detach() for name in names]
    means = dict(zip(names, sum_over_processes(torch.stack(scalars)) / world_size()))
    return {name: means[name] for name in values}


def gather_objects(item: Any) -> list[Any]:
    """Every process's ``item`` (anything picklable), in order of rank; all processes must call it and all get it."""
    if not is_distributed():
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def barrier() -> None:
    """Wait until every process is here."""
    if is_distributed():
        dist.barrier()


def close() -> None:
    """Leave the group, at the end of the program."""
    if is_distributed():
        time.sleep(0.1)         # Gloo's thread must first free the last exchange, or PyTorch 2.6 and 2.7 can hang here
        dist.destroy_process_group()                                                        # (pytorch/pytorch#154976)
