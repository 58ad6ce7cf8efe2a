#!/usr/bin/env python3
"""Deformable attention's sampling: time and memory of each path, beside the definition and beside the memory's speed.

    python scripts/benchmark_attention.py                               # what this machine has
    python scripts/benchmark_attention.py --device cpu --threads 2 --batch 1 --shape encoder --json attention.json

The sizes are the paper's: an image of 800 x 1333 pixels gives levels of 100 x 167, 50 x 84, 25 x 42 and 13 x 21 pixels,
22223 tokens; 8 heads of 32 channels look at 4 points of each level; an encoder asks for every token, a decoder for 300
queries. Encoder queries look around their own pixel, as trained ones do (offsets of 2.5 pixels, one standard deviation),
decoder queries around random places. ``transformers`` stands for MultiScaleDeformableAttention of the installed package.

    time        median of ``--repeats`` calls after one that does not count; forward without gradients, and forward with
                backward to all three inputs. Every path in every precision gets locations and weights in float32
    peak        memory beyond the inputs. CUDA: max_memory_allocated. CPU: each case runs in a process of its own, and the
                peak is that of its resident memory during one call (VmHWM, reset before it where the kernel allows, else
                ru_maxrss), less what was resident before it; a small call has loaded all libraries by then
    at least    the time to move the inputs and the output (and their gradients) once, at the speed at which this device,
                in this run, copies a large tensor; ``of it`` is the measured time over that
    gathered    bytes of the rows that the corners of all points name, most of which caches should answer
"""
from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detr.deformable_attention import PATHS, deformable_sampling

LEVELS = [(100, 167), (50, 84), (25, 42), (13, 21)]
HEADS, WIDTH, POINTS = 8, 32, 4
QUERIES = {"encoder": sum(h * w for h, w in LEVELS), "decoder": 300}
MODES = ("forward", "forward+backward")
OTHER = "transformers"
Sampler = Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="See the head of this file for what is "
                                     "measured and how.")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ... "
                        "(default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", help="images (default: 1 2 on CPU, 1 2 4 8 16 on CUDA)")
    parser.add_argument("--shape", nargs="+", default=list(QUERIES), choices=QUERIES, help="whose queries: one for "
                        "each token, or 300 (default: both)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"],
                        help="of the value (default: %(default)s)")
    parser.add_argument("--paths", nargs="+", choices=[*PATHS, OTHER], help="implementations to time (default: all "
                        "that run on the device)")
    parser.add_argument("--threads", type=int, help="on CPU (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, help="calls that are timed (default: 5 on CPU, 50 on CUDA)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    parser.add_argument("--case", help=argparse.SUPPRESS)                       # one case of a run on CPU, in json
    return parser


def inputs(shape: str, batch: int, dtype: torch.dtype, device: torch.device,
           levels: list[tuple[int, int]] = LEVELS) -> list[Tensor]:
    """value, locations, weights."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in levels)
    size = torch.tensor([(w, h) for h, w in levels])
    centres = torch.cat([torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
                         for h, w in levels])
    if shape == "decoder":
        centres = torch.rand(QUERIES[shape], 2, generator=generator)
    offsets = torch.randn(batch, len(centres), HEADS, len(levels), POINTS, 2, generator=generator).mul_(2.5)
    locations = offsets.div_(size[:, None]).add_(centres[:, None, None, None])
    weights = torch.rand(locations.shape[:-1], generator=generator).flatten(3).softmax(-1).view(locations.shape[:-1])
    value = torch.randn(batch, tokens, HEADS, WIDTH, generator=generator).to(dtype)
    return [x.to(device).requires_grad_() for x in (value, locations, weights)]


def sampler(path: str) -> Sampler:
    """One signature for all: value, levels, locations, weights."""
    if path != OTHER:
        return lambda value, levels, locations, weights: deformable_sampling(value, levels, locations, weights, path)
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
    module = MultiScaleDeformableAttention()

    def sample(value: Tensor, levels: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        shapes = torch.tensor(levels, device=value.device)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        return module(value, shapes, levels, starts, locations, weights, 64)
    return sample


def missing(path: str, device: torch.device, dtype: str) -> str | None:
    """Why a path is left out, if it is."""
    if path == OTHER and importlib.util.find_spec("transformers") is None:
        return "the package transformers is not installed (pip install transformers)"
    if path == OTHER and dtype != "float32":
        return "its grid_sample takes locations in the type of the value alone, which float32 locations are not"
    if path == "cpu" and device.type != "cpu":
        return "it is for CPUs"
    if path == "triton" and device.type != "cuda":
        return "it is for CUDA"
    if path == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    return None


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(field + ":"))


class PeakMemory:
    """``with PeakMemory(device) as peak: ...; peak.bytes``: memory beyond what was in use before."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        try:
            ctypes.CDLL(None).malloc_trim(0)                # what was freed belongs to no call (glibc)
            Path("/proc/self/clear_refs").write_text("5")
            self.before, self.peak = status("VmRSS"), lambda: status("VmHWM")
        except (OSError, AttributeError, TypeError):
            unit = 1 if sys.platform == "darwin" else 1024
            self.peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            self.before = self.peak()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        else:
            self.bytes = self.peak() - self.before


def median_time(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds."""
    call()
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            seconds.append(start.elapsed_time(end) / 1000)
        else:
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a copy of a large tensor, read and written."""
    source = torch.ones(2 ** 28 if device.type == "cuda" else 2 ** 26, device=device)       # 1 GiB, 256 MiB
    target = torch.zeros_like(source)
    return 2 * source.nbytes / median_time(lambda: target.copy_(source), device, 7)


def measure(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Both modes of a case: shape, batch, dtype, path, device, threads, repeats."""
    device, dtype = torch.device(case["device"]), getattr(torch, case["dtype"])
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    sample = sampler(case["path"])

    def forward(given: list[Tensor], levels: list[tuple[int, int]]) -> Tensor:
        with torch.no_grad():
            return sample(given[0], levels, given[1], given[2])

    def both(given: list[Tensor], levels: list[tuple[int, int]], direction: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sample(given[0], levels, given[1], given[2]), given, direction)

    small = [(3, 4)]
    given = inputs("encoder", 1, dtype, device, small)
    both(given, small, torch.ones(1, 12, HEADS * WIDTH, dtype=dtype, device=device))
    forward(given, small)
    given = inputs(case["shape"], case["batch"], dtype, device)
    direction = torch.randn(case["batch"], QUERIES[case["shape"]], HEADS * WIDTH, device=device).to(dtype)
    moved = sum(x.nbytes for x in given) + direction.nbytes                     # the output is as large as its gradient
    gathered = given[2].numel() * 4 * WIDTH * given[0].element_size()
    rows = []
    for mode, call in zip(MODES, (lambda: forward(given, LEVELS), lambda: both(given, LEVELS, direction))):
        if device.type == "cuda":
            call()                                                              # compiled, tuned
        with PeakMemory(device) as peak:
            call()
        seconds = median_time(call, device, case["repeats"])
        rows.append({**case, "mode": mode, "seconds": seconds, "peak_bytes": peak.bytes,
                     "moved_bytes": moved * (1 if mode == "forward" else 2), "gathered_bytes": gathered})
    return rows


def measure_apart(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The same in a process of its own, whose memory nothing else has touched."""
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def machine(device: torch.device, threads: int | None) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    facts = {"cpu": cpu, "threads": threads or torch.get_num_threads(), "torch": torch.__version__,
             "python": platform.python_version(), "device": "CPU"}
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    if importlib.util.find_spec("transformers"):
        import transformers
        facts[OTHER] = transformers.__version__
    return facts


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns; speed and memory against the definition of the same case."""
    same = ("shape", "batch", "dtype", "mode")
    base = {tuple(row[key] for key in same): row for row in rows if row["path"] == "definition"}
    lines = [("queries", "batch", "value", "mode", "path", "time ms", "speed", "peak MB", "of def.", "at least ms",
              "of it", "gathered MB")]
    for row in sorted(rows, key=lambda r: (list(QUERIES).index(r["shape"]), r["batch"], r["dtype"] != "float32",
                                           r["dtype"], MODES.index(r["mode"]))):
        against = base.get(tuple(row[key] for key in same))
        lines.append((row["shape"], str(row["batch"]), row["dtype"], row["mode"], row["path"],
                      f"{1e3 * row['seconds']:.2f}", f"{against['seconds'] / row['seconds']:.2f}x" if against else "",
                      f"{row['peak_bytes'] / 1e6:.1f}",
                      f"{row['peak_bytes'] / against['peak_bytes']:.2f}" if against and against["peak_bytes"] else "",
                      f"{1e3 * row['bound_seconds']:.2f}", f"{row['seconds'] / row['bound_seconds']:.1f}x",
                      f"{row['gathered_bytes'] / 1e6:.0f}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(n) if i < 5 else cell.rjust(n) for i, (cell, n) in enumerate(zip(line, widths)))
                     for line in lines)


def main(args: argparse.Namespace) -> None:
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    on_cpu = device.type == "cpu"
    facts = machine(device, args.threads)
    speed = bandwidth(device)
    print(", ".join(f"{key} {fact}" for key, fact in facts.items()) + f"; copies at {speed / 1e9:.1f} GB/s", flush=True)
    rows: list[dict[str, Any]] = []
    said = set()
    for shape in args.shape:
        for batch in args.batch or ([1, 2] if on_cpu else [1, 2, 4, 8, 16]):
            for dtype in args.dtype:
                for path in args.paths or [*PATHS, OTHER]:
                    why = missing(path, device, dtype)
                    if why:
                        if (path, why) not in said:
                            print(f"{path} left out{'' if dtype == 'float32' else f' in {dtype}'}: {why}", flush=True)
                        said.add((path, why))
                        continue
                    case = {"shape": shape, "batch": batch, "dtype": dtype, "path": path, "device": str(device),
                            "threads": args.threads, "repeats": args.repeats or (5 if on_cpu else 50)}
                    done = measure_apart(case) if on_cpu else measure(case)
                    for row in done:
                        row["bound_seconds"] = row["moved_bytes"] / speed
                    rows += done
                    print(f"{shape}, batch {batch}, {dtype}, {path}: " + ", ".join(
                        f"{row['mode']} {1e3 * row['seconds']:.1f} ms, {row['peak_bytes'] / 1e6:.0f} MB" for row in done),
                        flush=True)
    print("\n" + table(rows))
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "bytes_per_second": speed, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    arguments = build_parser().parse_args()
    if arguments.case:
        print(json.dumps(measure(json.loads(arguments.case))))
    else:
        main(arguments)
