#!/usr/bin/env python3
"""Which model learns most from the same training: AP over images seen and over seconds, medians over seeds.

    python scripts/compare_models.py                                        # every tiny preset, synthetic data
    python scripts/compare_models.py --models tiny_detr tiny_dino --seeds 0 --epochs 4
    python scripts/compare_models.py --data bccd --models tiny_deformable_detr tiny_dino --epochs 40 \\
        -- --image_size 256x320 --num_queries 60 --batch_size 8 --random_crop
    python scripts/compare_models.py --plot_only outputs/compare            # table and picture of finished trainings

Each model is trained from random weights with each seed, for the same number of epochs, which is also where its learning
rate schedule ends; all else is its own recipe, but for flags of main.py after ``--``, which all get. A training is a
process of main.py in a folder of its own, ``MODEL-seedN``; it is evaluated after every epoch. One that is finished is
taken as it is, a broken one goes on where it was; both only with the same settings on the same machine.

Seconds are those of log.txt: steps with reading and augmenting their images and with checkpoints in between, without
start, evaluation, and the files of an epoch's end. They compare only between trainings that shared the machine alike:
``--jobs`` at a time, ``--threads`` each.

Writes compare.json and compare.png into ``--output_dir`` and prints a table; the exit code is 1 where a training failed.
"""
from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as command_line
from datasets.examination import counted
from datasets.formats import recognise
from datasets.synthetic import synthetic_data
from detr import checkpoint, list_models
from detr.compare_runs import style_of
from detr.config import nearest
from detr.logs import whole_lines
from detr.run_folder import NEWEST, code_revision
from detr.visualize import BLACK, COCO_NUMBERS, heading, read_log
from engine import duration
from scripts.benchmark import machine

MAIN = Path(command_line.__file__)
EPOCHS = 8
SHARE = 0.9                         # of the best AP, by which speed of learning is measured
POLL = 1.0                          # seconds between looks at the logs
SECONDS_TO_SAVE = 60                # that an interrupted training gets
TAIL = 12                           # lines of a failed training's output that are shown
FACTS = "run.json"                  # what a training's folder was made with
OWN = {"model": "--models", "seed": "--seeds", "epochs": "--epochs", "data": "--data", "coco_path": "--data",
       "output_dir": "--output_dir", "num_workers": "--num_workers"}
FIXED = ("eval_every", "resume", "eval", "start_epoch", "finetune", "frozen_weights")
AP, AP50 = COCO_NUMBERS.index("AP"), COCO_NUMBERS.index("AP50")


# What is to be trained.

class Run(NamedTuple):
    """A training: its folder, main.py's flags for it, and ``facts``, all that has to be the same to take or resume it."""
    model: str
    seed: int
    folder: Path
    flags: list[str]
    facts: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.model}, seed {self.seed}"

    @property
    def epochs(self) -> int:
        return self.facts["settings"]["train"]["epochs"]


def get_args_parser() -> argparse.ArgumentParser:
    tiny = [name for name in list_models() if name.startswith("tiny_")]
    parser = command_line.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False, epilog="Flags of main.py "
                                 "for all trainings come last, after --. The head of this file says what is measured.")
    def add(name: str, help: str, **more: Any) -> None:
        parser.add_argument(f"--{name}", action=command_line.Flag, help=help, **more)

    add("models", f"(default: {' '.join(tiny)}; with --plot_only those that are there)", nargs="+", metavar="PRESET")
    add("seeds", "(default: 0 1 2)", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    add("epochs", "of each training (default: %(default)s)", type=int, default=EPOCHS, metavar="N")
    add("data", "as main.py's --data; without it, the synthetic data", metavar="DIR")
    add("jobs", "trainings at a time (default: %(default)s)", type=int, default=2, metavar="N")
    add("threads", "of each training (default: %(default)s)", type=int, default=1, metavar="N")
    add("num_workers", "processes of each training that read images; 0: it reads them itself, between steps (default: "
        "%(default)s)", type=int, default=0, metavar="N")
    add("output_dir", "(default: %(default)s)", default="outputs/compare", metavar="DIR")
    add("plot_only", "train nothing: table and picture of the trainings in there", metavar="DIR")
    parser.set_defaults(tiny=tiny, typed=frozenset())
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """``more`` are the flags of main.py after ``--``."""
    place = list(words).index("--") if "--" in words else len(words)
    args = get_args_parser().parse_args(list(words[:place]))
    args.more = list(words[place + 1:])
    for name in ("epochs", "jobs", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give at least 1")
    idle = [f"--{name}" for name in sorted(args.typed - {"plot_only", "models"})] + ["--"] * ("--" in words)
    if args.plot_only and idle:
        raise ValueError(f"{idle[0]} has no effect with --plot_only, which trains nothing; leave it out")
    for name in () if args.plot_only else args.models or ():
        if name not in list_models():
            raise ValueError(f"--models {name} is not known{nearest(name, list_models())} Small ones are "
                             f"{', '.join(args.tiny)}")
    for name in ("models", "seeds"):
        if len(set(getattr(args, name) or ())) < len(getattr(args, name) or ()):
            raise ValueError(f"--{name} {' '.join(map(str, getattr(args, name)))}: name each once")
    return args


def plan(args: argparse.Namespace) -> list[Run]:
    """All trainings, those of the first seed first. Raises ValueError where main.py would refuse one, and where a model
    would not begin with random weights."""
    more = command_line.get_args_parser().parse_args(args.more)
    typed: frozenset[str] = getattr(more, "typed", frozenset())
    for name in sorted(typed & {*OWN, *FIXED}):
        where = f"{OWN[name]}, before the --, says it" if name in OWN else "these trainings decide it themselves"
        raise ValueError(f"--{name} after --: {where}; leave it out there")
    workers = ["--num_workers", str(args.num_workers)]
    data = ["--data", str(Path(args.data).resolve())] if args.data else []
    runs, facts_of_machine = [], None
    for seed in args.seeds:
        for model in args.models or args.tiny:
            flags = ["--model", model, "--seed", str(seed), "--epochs", str(args.epochs), "--eval_every", "1", *workers,
                     *data, *args.more]
            settings = command_line.settle(command_line.get_args_parser().parse_args(flags))
            if not settings.model.from_scratch or settings.run.backbone_weights:
                raise ValueError(f"{model} would begin with a pretrained backbone, others with random weights: add -- "
                                 f"--from_scratch --backbone_norm batch --lr_backbone LR, or choose among "
                                 f"{', '.join(args.tiny)}")
            if settings.train.lr_schedule == "step" and seed == args.seeds[0]:
                first = (settings.train.lr_drop_epochs or (settings.train.lr_drop,))[0]
                if first >= args.epochs:
                    print(f"{model}: its learning rate would drop after {first} epochs, and there are {args.epochs}; "
                          f"-- --lr_schedule cosine ends where the training does")
            device = command_line.choose_device(settings.run.device, "device" in typed)
            if facts_of_machine is None:
                found = machine(torch.device(device), args.threads)
                facts_of_machine = {"jobs": args.jobs, "threads": args.threads, "num_workers": args.num_workers,
                                    **{name: found[name] for name in ("device", "cpu", "torch")}}
            facts = {"model": model, "seed": seed, "settings": settings.as_dict(), "machine": facts_of_machine,
                     "more": {name: getattr(more, name) for name in sorted(typed)}}
            runs.append(Run(model, seed, Path(args.output_dir) / f"{model}-seed{seed}", flags,
                            json.loads(json.dumps(facts, default=str))))
    return runs


# What is there already.

def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a training's log."""
    log = folder / "log.txt"
    return [json.loads(line) for line in whole_lines(log) if line.strip()] if log.is_file() else []


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Entries of nested dicts that are not the same: "train.epochs 8, not 4"."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [entry for key in {**old, **new}
                for entry in differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))]
    return [] if old == new else [f"{name} {old}, not {new}"]


def done_before(run: Run) -> tuple[int, str]:
    """How many epochs of a training are there, and what becomes of it, in words. Raises ValueError where its folder is
    another training's."""
    rows, facts = rows_of(run.folder), run.folder / FACTS
    begun = any(run.folder.glob("checkpoint*.pth"))
    if not facts.is_file():
        if rows or begun:
            raise ValueError(f"{run.folder} has a training that this script has not made: give another --output_dir")
        return 0, "begins"
    old = json.loads(facts.read_text())
    then, now = ({name: facts.get(name) for name in run.facts} | {"more": more_of(facts)} for facts in (old, run.facts))
    if changed := differences(then, now):
        more = "; ..." if len(changed) > 4 else ""
        raise ValueError(f"{run.folder} was made with {'; '.join(changed[:4])}{more}: give the same flags, another "
                         f"--output_dir, or delete it")
    if not begun and not is_finished(rows, run.epochs):
        return 0, "begins" + " anew, since its checkpoints are gone" * bool(rows)
    other = "" if old.get("revision") == code_revision() else f"; its code is {old.get('revision')}, not this"
    if is_finished(rows, run.epochs):
        return run.epochs, f"finished before, taken as it is{other}"
    return len(rows), f"goes on, {len(rows)} of {run.epochs} epochs are there{other}"


def more_of(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The flags of main.py that all trainings got besides, and their values."""
    return facts.get("more") or None


def is_finished(rows: Sequence[Mapping[str, Any]], epochs: int) -> bool:
    return [row["epoch"] for row in rows] == list(range(epochs)) and "test_coco_eval_bbox" in rows[-1]


# Training.

def start(run: Run, threads: int) -> subprocess.Popen:
    """The process of a training, which holds a lock on its output as long as it lives. Raises OSError where another
    process holds it, which may have been left by a killed comparison."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "output.txt", "ab") as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{run.folder}: another process trains there; wait until it has ended, or end it") from None
        facts = json.loads((run.folder / FACTS).read_text()) if (run.folder / FACTS).is_file() else run.facts
        before = [revision for revision in str(facts.get("revision") or "").split(", ") if revision]
        if (now := str(code_revision())) not in before:
            write_facts(run.folder, facts | {"revision": ", ".join([*before, now])})
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [sys.executable, str(MAIN), *run.flags, "--output_dir", str(run.folder), "--resume", "auto"]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                env=environment, start_new_session=True)      # Ctrl-C is for this process, which tells it


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    checkpoint.write_whole(folder / FACTS, lambda file: file.write(json.dumps(facts, indent=1).encode()))


def train(runs: Sequence[Run], jobs: int, threads: int) -> dict[str, str]:
    """Bring all trainings to their end, ``jobs`` at a time; what became of those that failed, by their titles. Where this
    process is asked to leave, so are they, and they save first."""
    there: dict[str, int] = {}
    waiting: deque[Run] = deque()
    for run in runs:                                                # all are looked at before any begins
        there[run.title], said = done_before(run)
        print(f"{run.title}: {said}", flush=True)
        if there[run.title] < run.epochs:
            waiting.append(run)
    clock = Clock(sum(run.epochs - there[run.title] for run in waiting))
    failures: dict[str, str] = {}
    processes: dict[str, tuple[Run, subprocess.Popen]] = {}
    try:
        while waiting or processes:
            while waiting and len(processes) < jobs:
                run = waiting.popleft()
                try:
                    processes[run.title] = run, start(run, threads)
                except OSError as error:
                    failures[run.title] = failed(run, str(error))
                    clock.left -= run.epochs - there[run.title]
            time.sleep(POLL if processes else 0)
            for title, (run, process) in list(processes.items()):
                code = process.poll()                               # before the log, which is then complete
                rows = rows_of(run.folder)
                for row in rows[there[title]:]:
                    clock.tick()
                    print(f"{title}: {row['epoch'] + 1} of {run.epochs} epochs, AP {row['test_coco_eval_bbox'][AP]:.3f}, "
                          f"{row['seconds']:.0f} s of training; {clock}", flush=True)
                there[title] = max(there[title], len(rows))
                if code is None:
                    continue
                del processes[title]
                if code or not is_finished(rows, run.epochs):
                    output = run.folder / "output.txt"
                    what = f"exit code {code}, {len(rows)} of {run.epochs} epochs; the end of {output}:"
                    failures[title] = failed(run, "\n    ".join([what, *last_lines(output)]))
                    clock.left -= run.epochs - there[title]
    finally:
        stop([process for _, process in processes.values()])
    return failures


class Clock:
    """How long the epochs that are left will take, if they take as long as those that were trained."""

    def __init__(self, left: int) -> None:
        self.left, self.done, self.begun = left, 0, time.monotonic()

    def tick(self) -> None:
        self.left, self.done = self.left - 1, self.done + 1

    def __str__(self) -> str:
        seconds = (time.monotonic() - self.begun) / max(self.done, 1) * self.left
        return f"in all {self.done} of {self.done + self.left}, about {duration(seconds)} left"


def failed(run: Run, why: str) -> str:
    print(f"FAILED: {run.title}: {why}", flush=True)
    return why


def last_lines(output: Path) -> list[str]:
    return output.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Let trainings save and leave."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + SECONDS_TO_SAVE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if processes:
        print(f"{counted(len(processes), 'training')} told to save and leave; the same command goes on", flush=True)


# What they learned.

class Curve(NamedTuple):
    """A training, epoch by epoch."""
    model: str
    seed: int
    parameters: int
    images: list[int]               # seen
    seconds: list[float]            # of training
    ap: list[float]
    ap50: list[float]
    facts: dict[str, Any]


class Learning(NamedTuple):
    """A model over its seeds, epoch by epoch: medians, and the lowest and the highest AP."""
    model: str
    parameters: int
    seeds: list[int]
    images: list[int]
    seconds: list[float]
    ap: list[float]
    low: list[float]
    high: list[float]
    ap50: list[float]


def read_run(folder: Path) -> Curve | None:
    """A finished training; None of one that is not. Raises ValueError where its files do not say what is needed."""
    facts = json.loads((folder / FACTS).read_text())
    if not is_finished(rows_of(folder), facts["settings"]["train"]["epochs"]):
        return None
    rows = read_log(folder / "log.txt")
    if "images_per_epoch" not in facts:                             # kept there, since checkpoints are often deleted
        place = checkpoint.load(folder / NEWEST, mmap=True).get("position") or {}
        if "steps_per_epoch" not in place:
            raise ValueError(f"{folder / NEWEST} does not say how many images an epoch has; delete the folder, and train "
                             f"anew")
        facts["images_per_epoch"] = place["steps_per_epoch"] * place["images_per_step"]
        write_facts(folder, facts)
    numbers = [row["test_coco_eval_bbox"] for row in rows]
    return Curve(facts["model"], facts["seed"], rows[-1]["n_parameters"],
                 [facts["images_per_epoch"] * (row["epoch"] + 1) for row in rows], [row["seconds"] for row in rows],
                 [row[AP] for row in numbers], [row[AP50] for row in numbers], facts)


def same_budget(curves: Sequence[Curve]) -> None:
    """ValueError where trainings do not compare: other epochs, data or flags, or another share of the machine. That their
    code differs is said."""
    def budget(curve: Curve) -> dict[str, Any]:
        settings = curve.facts["settings"]
        return {"epochs": settings["train"]["epochs"], "data": settings["data"]["data"],
                "flags after --": more_of(curve.facts), **curve.facts["machine"]}

    for curve in curves[1:]:
        if other := differences(budget(curve), budget(curves[0])):
            raise ValueError(f"{curve.model}, seed {curve.seed}, does not compare with {curves[0].model}, seed "
                             f"{curves[0].seed}: {'; '.join(other)}; choose by --models, or use two folders")
    if len(revisions := {revision for curve in curves for revision in str(curve.facts.get("revision")).split(", ")}) > 1:
        print(f"trained with different code, revisions {', '.join(sorted(revisions))}: they compare only where nothing "
              f"between these changes a training")


def learnings(curves: Sequence[Curve]) -> list[Learning]:
    """Models in the order in which they come first."""
    found = []
    for model in dict.fromkeys(curve.model for curve in curves):
        own = [curve for curve in curves if curve.model == model]

        def over(values: str, what: Any, own: list[Curve] = own) -> list[float]:
            return [what(epoch) for epoch in zip(*(getattr(curve, values) for curve in own))]

        median = statistics.median
        found.append(Learning(model, own[0].parameters, sorted(curve.seed for curve in own), own[0].images,
                              over("seconds", median), over("ap", median), over("ap", min), over("ap", max),
                              over("ap50", median)))
    return found


def target_of(models: Sequence[Learning]) -> float:
    """The AP by which speed is measured: ``SHARE`` of the best model's median at the end."""
    return SHARE * max(model.ap[-1] for model in models)


def reaching(model: Learning, target: float) -> int | None:
    """The first epoch after which the median AP is at least ``target``."""
    return next((epoch for epoch, ap in enumerate(model.ap) if ap >= target), None)


def table(models: Sequence[Learning], wanted: int, target: float) -> str:
    """In Markdown, the best first; ``wanted`` seeds each, fewer are said."""
    lines: list[tuple[str, ...]] = [("model", "parameters", "images seen", "seconds", "AP (lowest to highest)", "AP50",
                                     f"images to AP {target:.3f}", "seconds to it")]
    for model in sorted(models, key=lambda model: -model.ap[-1]):
        epoch = reaching(model, target)
        few = f" ({len(model.seeds)} of {wanted} seeds)" if len(model.seeds) < wanted else ""
        lines.append((f"{model.model}{few}", f"{model.parameters:,}", f"{model.images[-1]:,}", f"{model.seconds[-1]:.0f}",
                      f"{model.ap[-1]:.3f} ({model.low[-1]:.3f} to {model.high[-1]:.3f})", f"{model.ap50[-1]:.3f}",
                      "not reached" if epoch is None else f"{model.images[epoch]:,}",
                      "" if epoch is None else f"{model.seconds[epoch]:.0f}"))
    lines.insert(1, ("---",) + ("---:",) * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sharing(facts: Mapping[str, Any]) -> str:
    """How the machine was shared, without which seconds mean nothing."""
    some = facts["machine"]
    where = some["cpu"] if some["device"] == "CPU" else some["device"]
    return f"{counted(some['jobs'], 'training')} at a time, {counted(some['threads'], 'thread')} each, on {where}"


def report(curves: Sequence[Curve], wanted: int, failures: Mapping[str, str], folder: Path) -> None:
    """The table, compare.json, compare.png."""
    same_budget(curves)
    models, facts = learnings(curves), curves[0].facts
    target, data = target_of(models), facts["settings"]["data"]["data"]
    print(f"\n{table(models, wanted, target)}\n")
    epochs = facts["settings"]["train"]["epochs"]
    print(f"Medians over seeds, after {counted(epochs, 'epoch')} from random weights. AP {target:.3f} is {SHARE:.0%} of "
          f"the best. Seconds of training, without evaluation; {sharing(facts)}: they compare only where that is the "
          f"same.")
    rows = [model._asdict() | {"runs": [{"seed": curve.seed, "seconds": curve.seconds, "ap": curve.ap, "ap50": curve.ap50,
                                         "revision": curve.facts.get("revision")}
                                        for curve in curves if curve.model == model.model]} for model in models]
    found = {"data": data or "synthetic", "epochs": epochs, "machine": facts["machine"], "target": target,
             "models": rows, "failed": dict(failures)}
    checkpoint.write_whole(folder / "compare.json", lambda file: file.write(json.dumps(found, indent=1).encode()))
    draw(models, Path(data).name if data else "synthetic data", facts, folder / "compare.png")
    print(f"saved: {folder / 'compare.json'}, {folder / 'compare.png'}")


# The picture.

def draw(models: Sequence[Learning], data: str, facts: Mapping[str, Any], out: Path) -> None:
    """Median AP of each model over images and over seconds, with a band from the lowest to the highest seed; models have
    their colour and line style in both panels, and their names and medians beside the ends of the lines."""
    prefix = "tiny_" if all(model.model.startswith("tiny_") for model in models) else ""
    names = [model.model.removeprefix(prefix) for model in models]
    panel, high, below, left = 3.6, max(3.3, 0.26 * len(models)), 1.05, 0.6                        # in inches
    beside = 0.8 + 0.086 * max(map(len, names))
    width, height = 2 * (left + panel + beside), below + high + 0.65
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    seeds = [len(model.seeds) for model in models]
    top = max(0.05, *(1.08 * max(model.high) for model in models))
    ends = apart([model.ap[-1] for model in models], 0.2 / high * top, 0.02 * top, 0.98 * top)
    epochs = counted(facts["settings"]["train"]["epochs"], "epoch")
    details = (f"{f'{prefix} presets on ' if prefix else ''}{data}, {epochs} from random weights",
               "training alone, without evaluation")
    for number, (over, detail) in enumerate(zip(("images", "seconds"), details)):
        start = left + number * (left + panel + beside)
        axes = figure.add_axes((start / width, below / height, panel / width, high / height))
        axes.set_xlim(0, 1.02 * max(getattr(model, over)[-1] for model in models))
        axes.set_ylim(0, top)
        for k, (model, name, end) in enumerate(zip(models, names, ends)):
            x, style = getattr(model, over), style_of(k)
            if len(model.seeds) > 1:
                axes.fill_between(x, model.low, model.high, color=style["color"], alpha=0.18, linewidth=0)
            axes.plot(x, model.ap, **style, linewidth=2, solid_capstyle="round", zorder=3)
            axes.plot(x[-1], model.ap[-1], "o", color=style["color"], markersize=5, zorder=4)
            value = f"{model.ap[-1]:.3f}" if over == "images" else f"{x[-1]:.0f} s"
            axes.annotate(f"{value}  {name}", (x[-1], model.ap[-1]), (1.035, end), textcoords=axes.get_yaxis_transform(),
                          va="center", fontsize=10.5, color=BLACK, annotation_clip=False,
                          arrowprops=dict(arrowstyle="-", color=style["color"], linewidth=0.9, linestyle=(0, (1, 2)),
                                          shrinkA=1, shrinkB=3, relpos=(0, 0.5)))
        unit = "images seen" if over == "images" else "seconds of training"
        axes.set_ylabel("AP", color=BLACK)
        heading(axes, f"AP over {unit}", detail)
        tidy(axes, unit)
    note = f"Lines: medians over {'to'.join(f' {n} ' for n in sorted({min(seeds), max(seeds)}))[1:]}"
    note += "seed; " if max(seeds) == 1 else "seeds; bands: lowest to highest; "
    figure.text(left / width, 0.1 / height, f"{note}beside the ends: medians after the last epoch.\nSeconds compare only "
                f"where the machine is shared alike; here: {sharing(facts)}.", fontsize=9.5, color="#666666",
                linespacing=1.4)
    checkpoint.write_whole(out, lambda file: figure.savefig(file, format="png"))


def tidy(axes: Axes, label: str) -> None:
    """As the other pictures of curves."""
    axes.set_xlabel(label, color=BLACK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 4, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelcolor="#555555", labelleft=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")


def apart(places: Sequence[float], gap: float, lowest: float, highest: float) -> list[float]:
    """Places for labels: in the same order, at least ``gap`` apart, from ``lowest`` to ``highest``, with the least sum of
    squared distances to ``places``: isotonic regression of what is left when the gaps are taken out, by pooling adjacent
    violators."""
    order = sorted(range(len(places)), key=places.__getitem__)
    pools: list[tuple[float, int]] = []                             # mean and number of labels that touch each other
    for rank, k in enumerate(order):
        pools.append((places[k] - rank * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    means = [mean for mean, count in pools for _ in range(count)]
    room = highest - gap * (len(places) - 1)
    found = {k: min(max(mean, lowest), room) + rank * gap for rank, (k, mean) in enumerate(zip(order, means))}
    return [found[k] for k in range(len(places))]


def main(words: Sequence[str]) -> int:
    args = parse(words)
    if args.plot_only:
        return plot_only(Path(args.plot_only), args.models)
    runs = plan(args)
    cores = os.cpu_count() or 1
    if args.jobs * args.threads > cores:
        print(f"--jobs {args.jobs} x --threads {args.threads} are more than {cores} cores: trainings wait for each "
              f"other, which their seconds count")
    if args.data:
        recognise(args.data)                                        # what is none is said now, and once
    else:
        synthetic_data()                                            # made once, not in the time of the first
    failures = train(runs, args.jobs, args.threads)
    curves = [curve for run in runs if run.title not in failures and (curve := read_run(run.folder)) is not None]
    if curves:
        report(curves, len(args.seeds), failures, Path(args.output_dir))
    if failures:
        print(f"{len(failures)} of {len(runs)} trainings failed: {'; '.join(failures)}. The same command tries them "
              f"again")
    return bool(failures)


def plot_only(folder: Path, models: Sequence[str] | None) -> int:
    """Table and picture of what is finished in ``folder``; what is not is named."""
    curves = []
    for place in sorted(path.parent for path in folder.glob(f"*/{FACTS}")):
        facts = json.loads((place / FACTS).read_text())
        if models and facts["model"] not in models:
            continue
        curve = read_run(place)
        if curve is None:
            print(f"left out: {place} is not finished")
        else:
            curves.append(curve)
    missing = set(models or ()) - {curve.model for curve in curves}
    if missing or not curves:
        raise ValueError(f"--plot_only {folder}: there is no finished training{' of ' * bool(missing)}"
                         f"{', '.join(sorted(missing))}; name the --output_dir of a comparison")
    known = {name: k for k, name in enumerate(list_models())}
    curves.sort(key=lambda curve: (known.get(curve.model, len(known)), curve.model, curve.seed))
    report(curves, len({curve.seed for curve in curves}), {}, folder)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
