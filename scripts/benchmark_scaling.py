#!/usr/bin/env python3
"""What decides how training scales, as far as one machine can measure it.

    python scripts/benchmark_scaling.py                                     # all of it
    python scripts/benchmark_scaling.py --what sizes --model detr_resnet50 detr_pvt_large
    python scripts/benchmark_scaling.py --what data --coco_path /dataset/coco

``sizes``: of each model the parameters that train, the bytes of their gradients, which all processes exchange in each
step, the bytes of a checkpoint with AdamW, and the operations (twice the multiply-adds of convolutions, matrix products
and attention) for one image of ``--size``: a forward pass, and a forward and a backward pass of the boxes. They are
counted and not run. Sampling in deformable attention is not counted; mask heads are, forward and for all queries.
``collectives``: what two processes exchange in one step of the training loop of a small model, over Gloo on the CPU, with
DistributedDataParallel and with ``--fsdp``, and how long a small exchange takes between them.
``data``: time of one core to read and augment a training image of ``--coco_path``.
``checkpoint``: time to write the checkpoint of the first ``--model`` to ``--folder``.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import build_dataset, collate
from datasets.transforms import Preprocessing, make_transforms
from detr import build_model, checkpoint, distributed, list_models, sharding
from detr.deformable_attention import MSDeformAttn
from detr.memory import blocks_of_body, layers_of
from detr.nested_tensor import NestedTensor, as_nested_tensor
from engine import train_one_epoch

# Shapes without values; one mode for all models, since some tensors are made once for all of them.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
WHAT = ("sizes", "collectives", "data", "checkpoint")
SMALL = {"backbone": "resnet_tiny", "backbone_norm": "group", "hidden_dim": 64, "nheads": 4, "dim_feedforward": 64}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=WHAT, help="parts to measure")
    parser.add_argument("--model", nargs="+", default=list_models(), choices=list_models(), metavar="PRESET",
                        help=f"for 'sizes', and the first one for 'checkpoint'; of {', '.join(list_models())}")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], metavar=("HEIGHT", "WIDTH"),
                        help="for 'sizes': of the image, in pixels")
    parser.add_argument("--coco_path", type=Path, help="for 'data': folder with train2017/ and annotations/")
    parser.add_argument("--images", type=int, default=64, help="for 'data': how many at most")
    parser.add_argument("--folder", type=Path, help="for 'checkpoint' (None: a temporary one)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    return parser


def convolution_backward(grad: list[int], x: list[int], weight: list[int], bias: Any, stride: Any, padding: Any,
                         dilation: Any, transposed: bool, output_padding: Any, groups: int, wanted: list[bool],
                         **_: Any) -> int:
    """Operations for the gradients of input and weight, as many each as forward. PyTorch's own count takes a convolution
    in groups for one that is not."""
    return sum(wanted[:2]) * conv_flop_count(x, weight, grad, transposed)


COUNTS = {torch.ops.aten.convolution_backward: convolution_backward}


def operations(name: str, height: int, width: int) -> tuple[float, float]:
    """Operations of an image: forward, and forward with the backward pass of the boxes."""
    with torch.device("meta"):
        model = build_model(name)[0].train()
    with FAKE:
        model.to_empty(device="cpu")
        for module in model.modules():
            if isinstance(module, MSDeformAttn):
                module.path = "definition"                          # the kernels need values
        images = NestedTensor(torch.empty(1, 3, height, width), torch.zeros(1, height, width, dtype=torch.bool),
                              [(height, width)])
        with FlopCounterMode(display=False) as forward:
            model(images)
        with FlopCounterMode(display=False, custom_mapping=COUNTS) as both:
            outputs = model(images)
            rows = [outputs, *outputs.get("aux_outputs", ())]
            rows += [outputs["enc_outputs"]] if "enc_outputs" in outputs else []
            torch.stack([row["pred_logits"].sum() + row["pred_boxes"].sum() for row in rows]).sum().backward()
    return float(forward.get_total_flops()), float(both.get_total_flops())


def sizes(names: list[str], height: int, width: int) -> list[dict[str, Any]]:
    print(f"{'model':44}{'trained':>9}{'gradient':>10}{'checkpoint':>12}{'forward':>10}{'and back':>10}")
    print(f"{'':44}{'1e6':>9}{'MB':>10}{'MB':>12}{'GFLOP':>10}{'GFLOP':>10}")
    rows = []
    for name in names:
        with torch.device("meta"):
            model = build_model(name)[0]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        kept = sum(p.numel() for p in (*model.parameters(), *model.buffers()))
        forward, both = operations(name, height, width)
        row = {"model": name, "trained": trained, "gradient_bytes": 4 * trained, "kept": kept,
               "checkpoint_bytes": 4 * kept + 8 * trained, "forward": forward, "forward_backward": both}
        rows.append(row)
        print(f"{name:44}{trained / 1e6:>9.1f}{4 * trained / 1e6:>10.1f}{row['checkpoint_bytes'] / 1e6:>12.1f}"
              f"{forward / 1e9:>10.1f}{both / 1e9:>10.1f}", flush=True)
    return rows


class Counted(TorchDispatchMode):
    """Exchanges between processes, by kind and by bytes of the larger of what goes in and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function.__name__:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            kind = function.__name__.split(".")[0].strip("_")
            self.seen[kind, max((x.numel() * x.element_size() for x in tensors), default=0)] += 1
        return function(*args, **(kwargs or {}))


def exchange(rank: int, folder: Path, fsdp: bool) -> None:
    """One of two processes: the second step of a training loop."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    distributed.init("cpu", f"file://{folder}/meet_{fsdp}")
    torch.manual_seed(0)
    model, criterion, _ = build_model("detr_resnet50", num_classes=5, **SMALL)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = sharding.shard(model, [*layers_of(model), *blocks_of_body(model)]) if fsdp else []
    wrapped = model if fsdp else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    truth = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    batch = (as_nested_tensor([torch.rand(3, 96, 96)] * 2), [truth] * 2)

    def step() -> None:
        train_one_epoch(wrapped, criterion, [batch], 1, optimizer, schedule, torch.device("cpu"), 0, max_norm=0.1)

    step()
    with Counted() as counted:
        step()
    if rank == 0:
        kind = f"--fsdp, {len(parts)} parts and the rest" if fsdp else "DistributedDataParallel"
        print(f"\n{kind}; {trained} parameters train ({4 * trained} bytes). One step exchanges:")
        for (name, size), number in sorted(counted.seen.items(), key=lambda item: (item[0][0], -item[0][1])):
            print(f"  {number:>3} x {name:24}{size:>9} bytes")
    if not fsdp:
        for size in (4, 400, 40_000):
            tensor, times = torch.zeros(size // 4), []
            for _ in range(200):
                dist.barrier()
                start = time.perf_counter()
                dist.all_reduce(tensor)
                times.append(time.perf_counter() - start)
            if rank == 0:
                print(f"  all_reduce of {size:>6} bytes over Gloo, 2 processes: median "
                      f"{statistics.median(times) * 1e6:.0f} microseconds")
    distributed.close()


def collectives() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for fsdp in (False, True):
            if fsdp and not hasattr(torch.cpu.Stream, "record_event"):
                print(f"--fsdp: PyTorch {torch.__version__} has it on GPUs alone")
                continue
            torch.multiprocessing.spawn(exchange, (Path(folder), fsdp), nprocs=2)


def data(coco_path: Path, most: int) -> dict[str, float]:
    training = build_dataset("train", coco_path)
    count = min(most, len(training))
    start = time.process_time()
    for i in range(count):
        training.image(i)
    decode = (time.process_time() - start) / count
    training.transforms = make_transforms("train", Preprocessing(), in_batch=True)
    start = time.process_time()
    for i in range(count):
        collate([training[i]])
    all_of_it = (time.process_time() - start) / count
    print(f"\n{count} training images of {coco_path}: {1e3 * decode:.1f} ms of a core to decode one, "
          f"{1e3 * all_of_it:.1f} ms with augmentation as published: {1 / all_of_it:.0f} images a second from a core")
    return {"images": count, "decode_seconds": decode, "seconds": all_of_it}


def written(name: str, folder: Path) -> dict[str, Any]:
    model = build_model(name)[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        checkpoint.save(folder / "scaling.pth", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        times.append(time.perf_counter() - start)
    size = (folder / "scaling.pth").stat().st_size
    (folder / "scaling.pth").unlink()
    print(f"\ncheckpoint of {name}: {size / 1e6:.0f} MB in {statistics.median(times):.2f} s to {folder} (median of 3)")
    return {"model": name, "bytes": size, "seconds": times}


def main(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"torch": torch.__version__}
    if "sizes" in args.what:
        found["sizes"] = sizes(args.model, *args.size)
    if "collectives" in args.what:
        collectives()
    if "data" in args.what:
        if args.coco_path is None:
            print("\ndata: not measured; --coco_path names a folder of images")
        else:
            found["data"] = data(args.coco_path, args.images)
    if "checkpoint" in args.what:
        with tempfile.TemporaryDirectory() as folder:
            found["checkpoint"] = written(args.model[0], args.folder or Path(folder))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main(get_args_parser().parse_args())
