#!/usr/bin/env python3
"""Will a training work here? Installation, machine, data, a step of the model, and a few images by heart, with verdicts.

    python scripts/doctor.py                                    the small preset on the synthetic data
    python scripts/doctor.py --data DIR --model detr_resnet50 --batch_size 4
    python scripts/doctor.py --coco_path DIR --resume CKPT --no_overfit

takes the flags of main.py that a training would be started with, and builds what main.py would build of them. Each line
is OK, NOTE (worth knowing) or PROBLEM (training would fail, or learn nothing), with numbers and what to do; exits with 1
where there is a problem. Nothing is downloaded. ``doctor.png``, what the model finds on the images that it learnt by
heart, is written to --output_dir where one is named; else only what main.py keeps before a training: the synthetic data
and the report of the data check.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.metadata
import io
import itertools
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
BROKEN: Exception | None = None
try:                                                # where this fails, that is the verdict
    import torch
    import torch.distributed as dist
    import torchvision
    from scipy.optimize import linear_sum_assignment
    from torch import Tensor, nn
    from torch.nn import functional as F

    import main
    from datasets.augment import Mosaic
    from datasets.sampler import RandomBatches
    from datasets.transforms import Preprocessing, eval_transforms
    from detr import visualize
    from detr.backbone import backbone_of, body_of
    from detr.backbone.resnet import fold_norms
    from detr.config import RunConfig, typed_flags
    from detr.diagnosis import blame, random_states, set_random_states
    from detr.memory import (
        advice,
        checkpoint_activations,
        compile_model,
        gigabytes,
        memory_limit,
        out_of_memory,
        peak_memory,
        untouched,
        used_memory,
    )
    from detr.optimization import make_optimizer
    from detr.precision import autocast, be_deterministic, choose_precision
    from detr.run_folder import code_revision
    from detr.settings import Settings
    from detr.structures import NonFiniteError
    from detr.trial import chosen_batch_size
    from engine import image_ids, post_process, to_device
    from scripts.overfit import Learnt, choose, learn
    from training import training_batches, trial_of
except (ImportError, OSError, RuntimeError, AttributeError) as error:
    BROKEN = error

LEAST_PYTHON = (3, 10)
NEEDED = ("torch", "torchvision", "numpy", "scipy", "pillow", "pycocotools", "matplotlib", "safetensors", "pyyaml")
OPTIONAL = {"triton": "the faster deformable attention on GPUs", "hotcoco": "--coco_eval fast",
            "timm": "--backbone timm/NAME", "tensorboard": "--tensorboard"}
LEAST_FILES = 1024                  # open files that a process with workers should be allowed to have
CHECKPOINTS = 3                     # that there should be room for: the newest, the one before, one being written
PREFETCHED = 2                      # batches that each worker holds ready
SAME, SHARE = 1e-4, 0.05            # change of a prediction that counts, and the share of them that may (ties of scores)
TARGET = 0.9                        # AP50 of the images by heart
GLOO = """
import sys, time, datetime, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method=sys.argv[2], rank=int(sys.argv[1]), world_size=2,
                        timeout=datetime.timedelta(seconds=30))
x = torch.full((int(sys.argv[3]),), 1.0 + dist.get_rank())
dist.all_reduce(x[:1].clone())
start = time.perf_counter()
dist.all_reduce(x)
print(float(x.min()), float(x.max()), time.perf_counter() - start, flush=True)
time.sleep(0.1)
dist.destroy_process_group()
"""


class Stop(Exception):
    """There was a problem, and without what failed nothing else can be looked at."""


class Report:
    """Prints verdicts, and counts them."""

    def __init__(self) -> None:
        self.titles: dict[str, list[str]] = {"OK": [], "NOTE": [], "PROBLEM": []}

    def add(self, verdict: str, title: str, text: str) -> None:
        self.titles[verdict].append(title)
        first, *rest = text.splitlines() or [""]
        print("\n".join([f"{verdict:<8} {title}: {first}", *(f"{'':<9}{line}" for line in rest)]), flush=True)

    def ok(self, title: str, text: str) -> None:
        self.add("OK", title, text)

    def note(self, title: str, text: str) -> None:
        self.add("NOTE", title, text)

    def problem(self, title: str, text: str) -> None:
        self.add("PROBLEM", title, text)

    def detail(self, text: str) -> None:
        """Lines that belong to the verdict before or after them."""
        for line in text.splitlines():
            print(f"{'':<9}{line}", flush=True)

    def last(self) -> int:
        """Print the sum; returns what to exit with."""
        ok, notes, problems = (self.titles[verdict] for verdict in ("OK", "NOTE", "PROBLEM"))
        named = f" ({', '.join(problems)})" if problems else ""
        print(f"doctor: {len(ok)} OK, {len(notes)} to note, {len(problems)} "
              f"{'problem' if len(problems) == 1 else 'problems'}{named}", flush=True)
        return 1 if problems else 0


@contextlib.contextmanager
def needed(report: Report, title: str) -> Iterator[None]:
    """What is raised inside is a problem that ends all."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError, NonFiniteError) as error:
        plain = isinstance(error, (ValueError, NonFiniteError))                 # whose messages say it all
        less = "; a smaller --batch_size or --image_size needs less" if out_of_memory(error) else ""
        report.problem(title, (str(error) if plain else f"{type(error).__name__}: {error}") + less)
        raise Stop from error


@contextlib.contextmanager
def heard(report: Report, title: str) -> Iterator[io.StringIO]:
    """``needed``; what is printed inside is kept, to be told with a verdict, and nothing is downloaded."""
    with needed(report, title), contextlib.redirect_stdout(io.StringIO()) as said, nothing_fetched():
        yield said


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """PyTorch's downloads are refused inside; ``detr.checkpoint`` then says where a copy belongs."""
    fetch = torch.hub.download_url_to_file

    def refuse(url: str, *args: Any, **kwargs: Any) -> None:
        raise OSError("this program fetches nothing")

    torch.hub.download_url_to_file = refuse
    try:
        yield
    finally:
        torch.hub.download_url_to_file = fetch


class Prepared(NamedTuple):
    """What ``main.run`` has when a training begins."""
    settings: Settings
    training: Any
    preprocessing: Preprocessing
    model: nn.Module
    criterion: nn.Module
    postprocessors: dict[str, Any]
    held: Sequence[nn.Module]
    amp: str
    device: torch.device
    complete: bool                          # whether the weights that the training would begin from are here


# The machine.

def installation(report: Report) -> None:
    """Python, and whether everything that is needed can be imported."""
    version = platform.python_version()
    if sys.version_info[:2] < LEAST_PYTHON:
        report.problem("python", f"{version}; at least {'.'.join(map(str, LEAST_PYTHON))} is needed")
    else:
        report.ok("python", f"{version} at {sys.executable}")
    versions = {name: installed(name) for name in NEEDED}
    listed = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    missing = [name for name, found in versions.items() if not found]
    if missing:
        report.problem("packages", f"{', '.join(missing)}: not installed; pip install {' '.join(missing)}")
    if BROKEN is not None:
        hint = "torch and torchvision of versions that belong together are installed by: pip install -U torch torchvision"
        report.problem("packages", f"{type(BROKEN).__name__}: {BROKEN}\n{listed}\n{hint}")
        raise Stop
    report.ok("packages", listed)
    try:
        kept = torchvision.ops.nms(torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [4, 4, 6, 6]]), torch.ones(3), 0.5)
        report.ok("torchvision", f"its operations run with this torch ({len(kept)} of 3 boxes kept)")
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        report.problem("torchvision", f"{error}; torchvision {torchvision.__version__} was not built for torch "
                                      f"{torch.__version__}: pip install -U torch torchvision")


def installed(name: str) -> str:
    """A package's version; empty where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment(report: Report, settings: Settings, device: torch.device) -> None:
    """What does not depend on the model."""
    with needed(report, "device"):
        devices(report, settings, device)
        precision(report, settings, device)
    cores_and_workers(report, settings, device)
    with contextlib.suppress(ValueError):               # not measurable on Windows and mps
        report.ok("memory", f"{gigabytes(memory_limit(device))} can be used on {device}")
    optional_packages(report, settings, device)
    report.ok("code", f"revision {code_revision()}")
    open_files(report, settings)
    processes(report)


def devices(report: Report, settings: Settings, device: torch.device) -> None:
    if device.type != "cuda":
        driver = shutil.which("nvidia-smi")
        text = f"{device}, {platform.machine()}; no GPU that torch {torch.__version__} can use"
        if driver and settings.run.device == "cuda":
            report.note("device", f"{text}, though {driver} is here: is this torch built for CUDA "
                                  f"({torch.version.cuda or 'it is not'}), and does nvidia-smi see a GPU?")
        else:
            report.ok("device", text)
        return
    driver = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], timeout=20,
                                capture_output=True, text=True, check=True).stdout.split("\n")[0]
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    listed = ", ".join(f"{gpu.name} {gigabytes(gpu.total_memory)} (compute capability {gpu.major}.{gpu.minor})"
                       for gpu in gpus)
    report.ok("device", f"{device}: {listed}; CUDA {torch.version.cuda}, driver {driver or 'unknown'}")
    free, total = torch.cuda.mem_get_info(device)
    if free < 0.8 * total:
        report.note("GPU memory", f"{gigabytes(free)} of {gigabytes(total)} is free: somebody else uses this GPU; "
                                  f"nvidia-smi says who, CUDA_VISIBLE_DEVICES chooses another")


def product_speed(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Billion operations a second in products of two matrices; 0 where the device has none in this type."""
    side = 4096 if device.type == "cuda" else 384
    try:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best, end = float("inf"), time.perf_counter() + seconds
        for k in itertools.count():
            start = time.perf_counter()
            (a @ b).sum().item()                                                # waits for a GPU
            best = min(best, time.perf_counter() - start) if k else best        # the first loads libraries
            if k > 2 and time.perf_counter() > end:
                return 2e-9 * side ** 3 / best
    except (RuntimeError, NotImplementedError):
        pass
    return 0.0


def precision(report: Report, settings: Settings, device: torch.device) -> None:
    """Which precisions there are, and which are fast."""
    speeds = {name: product_speed(device, dtype) for name, dtype in
              (("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16))}
    with contextlib.redirect_stdout(io.StringIO()):
        amp = choose_precision(settings.train.amp, device)
    shown = ", ".join(f"{title} {speeds[name]:.0f}" if speeds[name] else f"{title} none" for name, title in
                      (("off", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")))
    text = f"--amp {amp}; billion operations a second in a product of matrices: {shown}"
    if amp != "off" and not speeds[amp]:
        report.problem("precision", f"{text}; {device} does not have {amp}: --amp off")
    elif amp != "off" and speeds[amp] < speeds["off"]:
        report.note("precision", f"{text}; float32 is faster here: --amp off")
    elif amp == "off" and speeds["bf16"] > 1.5 * speeds["off"]:
        report.note("precision", f"{text}; --amp bf16 might be faster")
    else:
        report.ok("precision", text)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_and_workers(report: Report, settings: Settings, device: torch.device) -> None:
    threads, workers = torch.get_num_threads(), settings.run.num_workers
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    busy = here * (workers + (threads if device.type == "cpu" else 1))
    text = f"{cores()} cores for {here} x ({threads} threads of PyTorch and {workers} workers that read images)"
    if busy > cores() and busy > 1:
        fewer = "fewer --num_workers" if workers else f"OMP_NUM_THREADS={max(1, cores() // here)}"
        report.note("cores", f"{text}: they take turns; {fewer} may be faster")
    else:
        report.ok("cores", text)


def optional_packages(report: Report, settings: Settings, device: torch.device) -> None:
    run = settings.run
    wanted = {"tensorboard": run.tensorboard, "hotcoco": run.coco_eval == "fast",
              "timm": settings.model.backbone.startswith("timm/")}
    versions = {name: installed(name) for name in OPTIONAL}
    text = ", ".join(f"{name} {found or 'is not here'}" for name, found in versions.items())
    missing = [name for name, asked in wanted.items() if asked and not versions[name]]
    if missing:
        report.problem("optional packages", "; ".join(f"{OPTIONAL[name]} needs {name}: pip install {name}"
                                                      for name in missing) + f" ({text})")
    elif device.type == "cuda" and not versions["triton"] and hasattr(settings.model, "enc_n_points"):
        report.note("optional packages", f"{text}; triton has {OPTIONAL['triton']}: pip install triton")
    else:
        report.ok("optional packages", text)


def open_files(report: Report, settings: Settings) -> None:
    try:
        import resource  # here alone: Windows has none
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < LEAST_FILES and soft != resource.RLIM_INFINITY and settings.run.num_workers:
        report.note("open files", f"{soft} at a time, which workers can use up: ulimit -n {min(4096, max(soft, hard))}")
    else:
        report.ok("open files", f"{'any number' if soft == resource.RLIM_INFINITY else soft} at a time (ulimit -n)")


def processes(report: Report) -> None:
    """What can connect processes, and what ``torchrun`` has set."""
    if not dist.is_available():
        report.note("processes", "this torch was built without torch.distributed: one process, one GPU")
        return
    there = [name for name, found in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if found]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if name in os.environ}
    text = f"{' and '.join(there) or 'neither gloo nor nccl'}"
    listed = ", ".join(f"{name}={value}" for name, value in given.items())
    lacking = [name for name in names[:3] if name not in given] if {"RANK", "WORLD_SIZE"} & set(given) else []
    if lacking and given.get("WORLD_SIZE") != "1":
        report.problem("processes", f"{text}; {listed}, but not {', '.join(lacking)}: start with torchrun "
                                    f"--nproc-per-node=N, or unset them")
    elif torch.cuda.is_available() and torch.cuda.device_count() > 1 and "nccl" not in there:
        report.note("processes", f"{text}; {torch.cuda.device_count()} GPUs need nccl to share a training")
    elif int(given.get("WORLD_SIZE", 1)) > 1:
        report.note("processes", f"{text}; {listed}: this program looks at one of them, with its part of the images")
    else:
        report.ok("processes", f"{text}{'; ' * bool(listed)}{listed}; torchrun starts several")


def two_processes(report: Report, numbers: int) -> None:
    """Two processes of this machine add up as many numbers as the model's gradient has."""
    with tempfile.TemporaryDirectory() as folder:
        children = [subprocess.Popen([sys.executable, "-c", GLOO, str(rank), f"file://{folder}/meet", str(numbers)],
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                     env=os.environ | {"OMP_NUM_THREADS": "1"}) for rank in range(2)]
        try:
            told = [child.communicate(timeout=90) for child in children]
        except subprocess.TimeoutExpired:
            report.note("gloo", "two processes of this machine did not meet within 90 s; look at the firewall and at "
                                "GLOO_SOCKET_IFNAME")
            return
        finally:
            for child in children:
                child.kill()
                child.wait()
    answers = [out.split() for out, _ in told]
    if any(child.returncode for child in children) or any(answer[:2] != ["3.0", "3.0"] for answer in answers):
        why = next((err.strip().splitlines()[-1] for _, err in told if err.strip()), f"they say {answers}")
        report.note("gloo", f"two processes of this machine cannot add up a tensor: {why}; several processes on CPUs "
                            f"will not work, and on GPUs may not (GLOO_SOCKET_IFNAME chooses the network interface)")
    else:
        report.ok("gloo", f"two processes add up a gradient of {gigabytes(4 * numbers)} in "
                          f"{max(float(answer[2]) for answer in answers):.2f} s")


# Settings, data and model, as main.run makes them.

def decided(report: Report, args: argparse.Namespace) -> tuple[Settings, torch.device]:
    """The settings of the training that ``args`` would start."""
    with heard(report, "settings") as said:
        if args.eval:
            raise ValueError("--eval: this program is about a training; leave it out")
        for name, least in (("overfit", 1), ("overfit_steps", 1), ("seconds", 0.0)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name} {getattr(args, name)}: at least {least} is needed")
        device = torch.device(main.choose_device(args.device, "device" in getattr(args, "typed", ())))
        settings = main.settle(args)
        if device.type == "cpu" and "num_workers" not in typed_flags(args, [RunConfig]):
            settings = main.without_workers(settings)
        if settings.run.deterministic:
            be_deterministic(device)
    train, data = settings.train, settings.data
    report.ok("settings", f"{settings.name}, padding {settings.model.padding}, device {device}, data "
                          f"{data.data or data.coco_path or 'synthetic'}, {train.batch_size} images per process, "
                          f"learning rate {train.lr:g}, of the backbone {settings.model.lr_backbone:g}")
    report.detail(said.getvalue() + settings.note)
    return settings, device


def read_data(report: Report, settings: Settings) -> tuple[Any, Any, Preprocessing]:
    """The data of the training, looked through as main.py does."""
    with heard(report, "data") as said:
        training, validation, preprocessing = main.load_data(settings)
    text = said.getvalue()
    findings = [line for line in text.splitlines() if line.startswith("    ")]
    labels = training.labels_of_images()
    objects, empty = sum(map(len, labels)), sum(not len(one) for one in labels)
    summary = (f"{len(training)} training images ({empty} without objects), {objects} objects of "
               f"{len(training.categories)} classes; {len(validation)} validation images")
    if objects == 0:
        report.problem("data", f"{summary}: there is nothing to learn")
    elif findings:
        report.note("data", f"{summary}; the check has {len(findings)} remarks (scripts/check_data.py has all of it)")
    else:
        report.ok("data", summary)
    report.detail(text)
    return training, validation, preprocessing


def prepare(report: Report, settings: Settings, training: Any, validation: Any, preprocessing: Preprocessing,
            device: torch.device) -> Prepared:
    """The model with the weights that the training would begin from; random ones where main.py would fetch them."""
    run, complete, why = settings.run, True, ""
    own = run.resume or run.finetune or run.backbone_weights or getattr(settings.model, "frozen_weights", None)
    with heard(report, "model") as said:
        torch.manual_seed(settings.train.seed)
        try:
            model, criterion, postprocessors = main.build(settings, validation, training, preprocessing, device)
        except OSError as error:
            if own or settings.model.from_scratch:
                raise
            complete, why = False, str(error)
            model, criterion, postprocessors = settings.model.build(validation.num_classes)
        held = main.freeze_parts(model, settings.train.freeze)
        model, criterion = model.to(device), criterion.to(device)
        criterion.normalizer = settings.train.loss_normalizer
        if run.fold_norms:
            fold_norms(model)
        if run.activation_checkpointing:
            checkpoint_activations(model)
        if run.compile:
            compile_model(model, device)
        if run.auto_batch_size:
            size = chosen_batch_size(trial_of(settings, training, model, criterion, settings.train.amp, device))
            settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, batch_size=size))
        amp = choose_precision(settings.train.amp, device)
    every, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or all_of_them)
                      for all_of_them in (True, False))
    text = f"{settings.name}: {every:,} parameters, {trained:,} of them train; {validation.num_classes} labels"
    if complete:
        report.ok("model", text)
        report.detail(said.getvalue())
    else:
        report.note("model", f"{text}; the backbone is random here; main.py begins with weights that it fetches first, "
                             f"and stops where there is no network. This program fetches nothing:\n{why}")
    if run.fsdp:
        report.note("fsdp", "not looked at: --fsdp shares weights out over processes, and here is one, with all of them")
    room(report, settings, model)
    return Prepared(settings, training, preprocessing, model, criterion, postprocessors, held, amp, device, complete)


def room(report: Report, settings: Settings, model: nn.Module) -> None:
    """Whether checkpoints fit on the disk of the output folder."""
    weights = sum(x.nbytes for x in model.state_dict().values())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    size = weights * (2 if settings.train.ema_decay else 1) + trained * (1 if settings.train.sgd else 2)
    folder = Path(settings.run.output_dir or "outputs").resolve()
    there = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(there).free
    text = f"{gigabytes(free)} free at {there}, and a checkpoint takes about {gigabytes(size)}"
    if not there.is_dir() or not os.access(there, os.W_OK):
        report.problem("disk", f"{text}, but {there} is no folder that can be written to; choose another --output_dir")
    elif free < CHECKPOINTS * size:
        report.problem("disk", f"{text}: no room for {CHECKPOINTS}; make some, or choose another --output_dir")
    else:
        report.ok("disk", text)


def first_batch(report: Report, made: Prepared) -> Any:
    """The first batch of the training."""
    with heard(report, "batch"):
        _, loader = batches_of(made, 0)
        batch = next(iter(loader))
    samples, targets = batch
    ids, objects = image_ids(targets), sum(len(target["labels"]) for target in targets)
    report.ok("batch", f"images {main.few(ids, 4)} as {list(samples.tensors.shape)}, {samples.padded_share:.0%} of it "
                       f"padding, {objects} objects")
    shared_memory(report, made.settings, samples.tensors.nbytes + samples.mask.nbytes)
    return batch


def shared_memory(report: Report, settings: Settings, batch: int, folder: Path = Path("/dev/shm")) -> None:
    """Workers hand batches over in shared memory, of which containers often have 64 MB."""
    workers = settings.run.num_workers
    if not workers or not folder.is_dir():
        return
    free, need = shutil.disk_usage(folder).free, workers * PREFETCHED * batch
    text = f"{gigabytes(free)} free in {folder}, and {workers} workers hold about {gigabytes(need)} there"
    if free < need:
        report.problem("shared memory", f"{text}; give the container more (docker run --shm-size or --ipc=host), or "
                                        f"--num_workers 0")
    else:
        report.ok("shared memory", text)


def batches_of(made: Prepared, workers: int) -> tuple[RandomBatches, Any]:
    """What training reads, by so many workers."""
    settings = dataclasses.replace(made.settings, run=dataclasses.replace(made.settings.run, num_workers=workers))
    return training_batches(settings, made.training, main.shared_out(settings), made.device)


# A step.

def forward(made: Prepared, batch: Any) -> tuple[Any, dict[str, Tensor], Tensor]:
    """Outputs, losses and their sum, as in training."""
    model, criterion = made.model, made.criterion
    samples, targets = to_device(*batch, made.device)
    with autocast(made.device, made.amp):
        outputs = model(samples, targets) if getattr(model, "takes_targets", False) else model(samples)
    losses = criterion(outputs, targets, criterion.divisors([targets], made.device)[0])
    return outputs, losses, criterion.weighted_sum(losses)


def to_training(made: Prepared) -> None:
    made.model.train()
    made.criterion.train()
    for module in made.held:
        module.eval()


def one_step(report: Report, made: Prepared, batch: Any, seconds: float) -> float:
    """Forward, backward and the optimizer on a batch, all of it undone; returns how long a step takes."""
    model, device = made.model, made.device
    optimizer = make_optimizer(made.settings.model.parameter_groups(model, made.settings.train.lr), made.settings.train)
    shape, objects = list(batch[0].tensors.shape), sum(len(target["labels"]) for target in batch[1])

    def step() -> None:
        optimizer.zero_grad()
        forward(made, batch)[2].backward()
        nn.utils.clip_grad_norm_(model.parameters(), made.settings.train.clip_max_norm or float("inf"))
        optimizer.step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    with needed(report, "step"), untouched(model, optimizer, device):
        to_training(made)
        try:
            values = gradients(report, made, batch)
            peak = 0
            with contextlib.suppress(ValueError):                               # where it cannot be measured
                peak = peak_memory(step, device)
            times: list[float] = []
            while not times or len(times) < 10 and sum(times) < seconds:
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            of = made.settings
            known = {k: v for part in (of.model, of.train, of.data, of.run) for k, v in dataclasses.asdict(part).items()}
            report.problem("memory of a step", advice(shape, objects, known, where="one training step",
                                                      used=used_memory(device), limit=memory_limit(device)))
            raise Stop from error
        took = statistics.median(times)
        report.ok("step", f"loss {values['loss']:.4g}; {took:.3f} s, {len(batch[1]) / took:.1f} images a second"
                          + f", at most {gigabytes(peak)} of memory in use" * bool(peak))
        again(report, made, batch)
    return took


def gradients(report: Report, made: Prepared, batch: Any) -> dict[str, float]:
    """Losses and gradients of the first step: all there, and all numbers. Returns the losses."""
    model, states = made.model, random_states()
    model.zero_grad()
    said = ""
    values: dict[str, float] = {}
    try:
        _, losses, total = forward(made, batch)
        values = {"loss": float(total.detach()), **{name: float(value.detach()) for name, value in losses.items()}}
        said = ", ".join(f"{name} = {value}" for name, value in values.items() if value - value != 0)
        if not said:
            total.backward()
    except NonFiniteError as error:
        said = str(error)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    wrong = [name for name, p in trained if p.grad is not None and not p.grad.isfinite().all()]
    if said or wrong:
        takes_targets = getattr(model, "takes_targets", False)
        cause = blame(model, made.criterion, *to_device(*batch, made.device), amp=made.amp, takes_targets=takes_targets,
                      random_state=states)
        what = said or f"gradients that are no numbers: {main.few(wrong)}"
        report.problem("losses", f"{what}\n{cause}")
        raise Stop
    without = [name for name, p in trained if p.grad is None]
    if without:
        report.problem("gradients", f"{len(without)} of {len(trained)} parameters that train get none: "
                                    f"{main.few(without, 8)}; no loss depends on them: leave them out of the model, or "
                                    f"--freeze them. Several processes would wait for them for ever")
    else:
        report.ok("gradients", f"each of {len(trained)} parameters that train gets one, and all are finite; "
                               f"{len(values) - 1} losses are finite")
    model.zero_grad()
    return values


def again(report: Report, made: Prepared, batch: Any) -> None:
    """The same step twice."""
    states, seen = random_states(), []
    with torch.no_grad():
        for _ in range(2):
            set_random_states(states)
            seen.append(torch.stack([value.float() for value in forward(made, batch)[1].values()]))
    if torch.equal(*seen):
        report.ok("repeated", "the same losses, bit by bit, in two forward passes")
        return
    text = f"two forward passes differ by up to {float((seen[0] - seen[1]).abs().max()):.2g}"
    if made.settings.run.deterministic:
        report.problem("repeated", f"{text}, though --deterministic")
    else:
        report.note("repeated", f"{text}; --deterministic makes them the same, where PyTorch can")


def alone_and_in_a_batch(report: Report, made: Prepared) -> None:
    """What the model sees in an image when it is alone, and next to a larger one. Predictions are paired by scipy's
    assignment, since those with the same score have no order."""
    model, padding = made.model, made.settings.model.padding
    if body_of(model).only is not None:
        report.ok("padding", "all images have the one size that this backbone takes: there is none")
        return
    data = as_in_evaluation(made)
    image, other = (data[i % len(data)][0].to(made.device) for i in range(2))
    larger = F.interpolate(other[None], size=[side + side // 4 for side in image.shape[1:]])[0]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        rows = [torch.cat([outputs["pred_logits"][0].sigmoid(), outputs["pred_boxes"][0]], -1).float().cpu()
                for outputs in (model([image]), model([image, larger]))]                        # [Q, C + 4]
    for module, mode in modes:
        module.training = mode
    cost = torch.cdist(rows[0], rows[1], p=float("inf")).nan_to_num(float("inf"), float("inf"))
    if not cost.isfinite().all():
        report.problem("padding", "predictions in evaluation that are no numbers, of images "
                                  f"{[data.ids[i % len(data)] for i in range(2)]}")
        return
    changes = cost[linear_sum_assignment(cost.numpy())]
    worst, share = float(changes.max()), float((changes > SAME).float().mean())
    text = (f"{padding}; next to a larger image the predictions for an image change by up to {worst:.1g}, {share:.0%} "
            f"of them by more than {SAME:g}")
    inexact = backbone_of(model).inexact
    if padding == "exact" and not inexact and share > SHARE:
        report.problem("padding", f"{text}, though they must not: this is a fault of this program or of PyTorch here")
    elif share > SHARE:
        why = f"--padding exact is not possible here: {inexact}" if inexact else \
            "as published; with --padding exact they would not"
        report.note("padding", f"{text}; {why}")
    else:
        report.ok("padding", text)


def as_in_evaluation(made: Prepared) -> Any:
    """The training images without augmentation."""
    data = copy.copy(made.training.dataset if isinstance(made.training, Mosaic) else made.training)
    data.transforms = eval_transforms(made.preprocessing)
    return data


# Reading against computing.

def images_a_second(made: Prepared, workers: int, seconds: float) -> float:
    """How fast training images are read and augmented. Batches that workers had ready at the start do not count, unless
    the epoch is over before."""
    with contextlib.redirect_stdout(io.StringIO()):
        batches, loader = batches_of(made, workers)
    begin, first, counted, seen = time.perf_counter(), 0.0, 0, 0
    for k, (_, targets) in enumerate(loader):
        seen += len(targets)
        now = time.perf_counter()
        if k < PREFETCHED * workers + 1:
            first = now
            continue
        counted += len(targets)
        if now - first > seconds:
            break
    now = time.perf_counter()
    return counted / (now - first) if counted else seen / (now - begin)


def reading(report: Report, made: Prepared, step: float, seconds: float) -> None:
    """Whether data or computing is the limit."""
    wanted, computed = made.settings.run.num_workers, made.settings.train.batch_size / step
    with heard(report, "reading"):
        rates = {workers: images_a_second(made, workers, seconds) for workers in sorted({0, wanted})}
    listed = ", ".join(f"{rate:.1f} with {workers} workers" for workers, rate in rates.items())
    enough = max(1, -(-int(1.1 * computed * 100) // max(1, int(rates[0] * 100))))
    would = f"about {main.counted(enough, 'worker')} would do"
    if enough > cores():
        would += f", more than the {cores()} cores here: smaller images, or --cache_mode if the disk is slow"
    text = f"images a second are read: {listed}; the model computes {computed:.1f}"
    waited = computed / (computed + rates[0]) if wanted == 0 else max(0.0, 1 - rates[wanted] / computed)
    if waited < 0.1:
        report.ok("reading", f"{text}: computing is the limit")
    elif wanted == 0 and made.device.type == "cpu" and torch.get_num_threads() >= cores():
        report.ok("reading", f"{text}: {waited:.0%} of a step is reading, and no core is free for workers")
    else:
        report.note("reading", f"{text}: {waited:.0%} of the time goes into waiting for data; --num_workers: {would}")


# A few images by heart.

def by_heart(report: Report, made: Prepared, images: int, steps: int, step: float) -> None:
    """Train on a few images until they are found again."""
    settings, model = made.settings, made.model
    if not made.complete:
        report.note("overfit", "left out, since it would begin with a random backbone: name the weights with "
                               "--backbone_weights FILE, or see above how to train without")
        return
    with heard(report, "overfit"):
        data = as_in_evaluation(made)
        places = choose([len(labels) for labels in data.labels_of_images()], images, settings.model.queries)
    train = settings.train
    optimizer = make_optimizer(settings.model.parameter_groups(model, train.lr), train)
    each = step * images / train.batch_size
    often = max(5, min(25, int(30 / each)))
    report.detail(f"overfit: images {main.few([data.ids[i] for i in places], 8)}, all in each step, without augmentation "
                  f"and dropout; at most {steps} steps of {each:.2g} s: {steps * each:.0f} s, and "
                  f"{main.counted(-(-steps // often), 'evaluation')} (--overfit_steps N makes it shorter)")
    with needed(report, "overfit"):
        learnt = learn(model, made.criterion, made.postprocessors, data, places, optimizer, made.device, steps=steps,
                       check_every=often, target=TARGET, batch_size=min(images, train.batch_size),
                       max_norm=train.clip_max_norm, amp=made.amp, held=made.held, say=report.detail)
    text = f"AP50 {learnt.ap50:.3f} on {images} images after {learnt.steps} steps, {learnt.seconds:.0f} s"
    if learnt.ap50 > TARGET:
        report.ok("overfit", text)
    else:
        report.problem("overfit", "\n".join([f"{text}; above {TARGET} is expected. What it may be:",
                                             *causes(made, learnt, data.num_classes)]))
    if settings.run.output_dir:
        with heard(report, "picture"):
            file = picture(made, data, places)
        report.ok("picture", f"{file}: truth and detections on these images")


def causes(made: Prepared, learnt: Learnt, num_classes: int) -> list[str]:
    """Why a few images are not learnt, the likeliest first."""
    train, config, last = made.settings.train, made.settings.model, learnt.averages
    found = []
    if learnt.collapsed:
        found.append(learnt.collapsed)
    frozen = {name: p.numel() for name, p in made.model.named_parameters() if not p.requires_grad}
    share = sum(frozen.values()) / sum(p.numel() for p in made.model.parameters())
    if share > 0.01:                                                            # and not an embedding without a use
        found.append(f"{share:.0%} of the weights do not train ({main.few(list(frozen), 4)}): --freeze, --frozen_stages "
                     f"and --lr_backbone 0 leave them as they begin, which is of use only where they were trained before")
    few_steps = f"{learnt.steps} steps may be too few at --lr {train.lr:g}: --overfit_steps {4 * learnt.steps}"
    fell = last["loss"] < 0.8 * learnt.first_loss
    if fell:
        found.insert(0, f"the loss has fallen from {learnt.first_loss:.3g} to {last['loss']:.3g}, and {few_steps}")
    elif last["loss"] != learnt.first_loss:                                     # the same where there was one evaluation
        found.append(f"the loss has hardly fallen, from {learnt.first_loss:.3g} to {last['loss']:.3g}: try a tenth and "
                     f"ten times --lr {train.lr:g} and --lr_backbone {config.lr_backbone:g}")
    if last.get("class_error", 0.0) > 20:
        found.append(f"{last['class_error']:.0f}% of the objects have another class than their query says: are the "
                     f"labels right, and {num_classes} classes all of them? scripts/check_data.py counts them")
    if last.get("loss_giou_unscaled", 0.0) > 0.4:
        found.append(f"boxes are far off (1 - GIoU is {last['loss_giou_unscaled']:.2f}): are they x, y, width, height "
                     f"of these images? Look at a picture: --show_batch of main.py, or doctor.png (--output_dir)")
    if not fell:
        found.append(few_steps)
    return [f"- {cause}" for cause in found]


def picture(made: Prepared, data: Any, places: Sequence[int], threshold: float = 0.4) -> Path:
    """``doctor.png`` in the output folder."""
    names = {category.label: category.name for category in data.categories}
    rows = []
    made.model.eval()
    for i in places:
        image, target = data.image(i), data.target(i)
        tensor, fed = data.transforms(image, {"orig_size": target["orig_size"]})
        sizes: Any = {name: fed[name].to(made.device) for name in ("orig_size", "size")}
        with torch.no_grad():
            outputs = made.model([tensor.to(made.device)])
        found = post_process({"bbox": made.postprocessors["bbox"]}, outputs, [sizes])["bbox"][0]
        keep = found["scores"] > threshold
        rows.append((visualize.draw_detections(image, target["boxes"], target["labels"], names),
                     visualize.draw_detections(image, found["boxes"][keep], found["labels"][keep], names,
                                               found["scores"][keep])))
    file = Path(made.settings.run.output_dir, "doctor.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    visualize.side_by_side(rows, ("ground truth", f"detections over {threshold}")).save(file)
    return file


# All of it.

def get_args_parser() -> argparse.ArgumentParser:
    """main.py's flags, and how much to do."""
    parser = main.Parser("doctor", description=__doc__.split("\n\n")[0], parents=[main.get_args_parser()],
                         allow_abbrev=False)
    group = parser.add_argument_group("doctor")
    group.add_argument("--overfit", type=int, default=8, metavar="N", help="images to learn by heart (default: 8)")
    group.add_argument("--no_overfit", action="store_true", help="learn none")
    group.add_argument("--overfit_steps", type=int, default=600, metavar="N", help="the most steps (default: 600)")
    group.add_argument("--seconds", type=float, default=3.0, help="how long each speed is measured (default: 3)")
    return parser


def examine(report: Report, args: argparse.Namespace) -> None:
    """All sections, until one finds what the next cannot do without."""
    settings, device = decided(report, args)
    environment(report, settings, device)
    training, validation, preprocessing = read_data(report, settings)
    made = prepare(report, settings, training, validation, preprocessing, device)
    batch = first_batch(report, made)
    step = one_step(report, made, batch, args.seconds)
    with needed(report, "padding"):
        alone_and_in_a_batch(report, made)
    reading(report, made, step, args.seconds)
    if dist.is_available() and dist.is_gloo_available():
        two_processes(report, sum(p.numel() for p in made.model.parameters() if p.requires_grad))
    if not args.no_overfit:
        by_heart(report, made, args.overfit, args.overfit_steps, step)


def run(words: Sequence[str] | None = None) -> int:
    """The program; returns what to exit with."""
    if int(os.environ.get("RANK", 0)) > 0:              # torchrun started several: one looks
        return 0
    report = Report()
    with contextlib.suppress(Stop):
        installation(report)
        examine(report, get_args_parser().parse_args(words))
    return report.last()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"              # read when timm is imported, later: that fetches nothing either
    sys.exit(run())
