"""Learning curves of several trainings in one picture: losses and precision, over epochs and over hours."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from .checkpoint import write_whole
from .visualize import BLACK, COCO_NUMBERS, heading, plot, read_log, series

OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
"""Colours that people with any kind of colour vision tell apart (Okabe and Ito, 2008), without the yellow, which is too
light for lines."""
STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
HIGH = ("test_coco_eval", "test_PQ")                    # more is better

Rows = Sequence[Mapping[str, Any]]


class Panel(NamedTuple):
    """What is drawn: the value at ``position`` of ``key``, if a list or dict is there."""
    title: str
    key: str
    position: int | str | None = None


AP = COCO_NUMBERS.index("AP")
PANELS = (Panel("Total loss, training", "train_loss"), Panel("Total loss, validation", "test_loss"),
          Panel("AP", "test_coco_eval_bbox", AP), Panel("AP50", "test_coco_eval_bbox", COCO_NUMBERS.index("AP50")),
          Panel("AP of masks", "test_coco_eval_masks", AP), Panel("PQ", "test_PQ_all", "pq"),
          Panel("Class loss", "loss_ce"), Panel("Box L1 loss", "loss_bbox"), Panel("Box GIoU loss", "loss_giou"),
          Panel("Mask focal loss", "loss_mask"), Panel("Mask dice loss", "loss_dice"))
OVER_HOURS = ("Total loss, training", "Total loss, validation", "AP", "AP of masks", "PQ")


def short_names(folders: Sequence[Path]) -> list[str]:
    """Of each folder as many of its last parts as no other one ends with."""
    parts = [folder.absolute().parts for folder in folders]
    return ["/".join(next((own[-n:] for n in range(1, len(own)) if sum(other[-n:] == own[-n:] for other in parts) == 1),
                          own)) for own in parts]


def draw_comparison(logs: Mapping[str, str | Path], out: str | Path) -> list[str]:
    """Draw ``log.txt`` of several runs, named by the keys of ``logs``, as a PNG; returns what the runs lack.

    Each value that any run has gets a panel over epochs: the total loss, AP, masks' AP, PQ, and the last layer's losses,
    of validation where a run has them; total loss and precision once more over hours of training, where rows have
    ``seconds``, those of the training until then. A run has one colour and line style in all panels. The file appears
    whole or not at all. Raises ValueError where a log has no epoch or a line that is not right.
    """
    runs: dict[str, Rows] = {name: read_log(file) for name, file in logs.items()}
    for name, rows in runs.items():
        if not rows:
            raise ValueError(f"{logs[name]}: there is no epoch in it to draw")
    every = [row for rows in runs.values() for row in rows]
    chosen = [whole for panel in PANELS if (whole := with_part(panel, every)) is not None]
    if not chosen:
        raise ValueError(f"{', '.join(map(str, logs.values()))}: neither losses nor precision are in there")
    timed = [panel for panel in chosen if panel.title in OVER_HOURS
             and any(points_of(rows, panel, hours=True)[0] for rows in runs.values())]
    across = max(min(4, len(chosen)), len(timed))
    down = -(-len(chosen) // across) + (1 if timed else 0)
    height = 3.5 * down + 0.5 + 0.24 * len(runs)
    figure = Figure(figsize=(4.6 * across, height), dpi=100, facecolor="white")
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, chosen):
        draw_panel(axes, panel, runs, hours=False)
    for axes, panel in zip(grid[-1], timed):
        draw_panel(axes, panel, runs, hours=True)
    figure.legend(handles=[Line2D([], [], **style_of(k), linewidth=2.2, label=f"{name}   {summary(rows)}")
                           for k, (name, rows) in enumerate(runs.items())],
                  loc="upper left", bbox_to_anchor=(0.01, 1 - 0.1 / height), frameon=False, handlelength=4, fontsize=11)
    figure.subplots_adjust(left=0.22 / across, right=0.985, top=1 - (0.85 + 0.24 * len(runs)) / height,
                           bottom=0.5 / height, wspace=0.22, hspace=0.52)

    write_whole(out, lambda file: figure.savefig(file, format="png"))
    notes = []
    for name, rows in runs.items():
        missing = [panel.title for panel in chosen if not points_of(rows, panel, hours=False)[0]]
        missing += ["times"] * (not any(points_of(rows, panel, hours=True)[0] for panel in chosen))
        if missing:
            notes.append(f"{name}: the log has no {'; '.join(missing)}")
    return notes


def style_of(k: int) -> dict[str, Any]:
    """Colour and line style of run ``k``."""
    return {"color": OKABE_ITO[k % len(OKABE_ITO)], "linestyle": STYLES[k % len(STYLES)]}


def with_part(panel: Panel, rows: Rows) -> Panel | None:
    """A panel that any of ``rows`` has values for; of a loss, those of validation, or else of training."""
    if panel.key.startswith(("train_", "test_")):
        return panel if series(rows, panel.key, panel.position)[0] else None
    for part, name in (("test_", "validation"), ("train_", "training")):
        if series(rows, part + panel.key)[0]:
            return Panel(f"{panel.title}, {name}", part + panel.key)
    return None


def points_of(rows: Rows, panel: Panel, hours: bool) -> tuple[list[float], list[float]]:
    """Epochs, or hours of training until then, and values; -1 is COCO's word for no objects."""
    time = {row["epoch"]: row["seconds"] / 3600 for row in rows if isinstance(row.get("seconds"), (int, float))}
    found = [(time[epoch] if hours else epoch, value) for epoch, value in zip(*series(rows, panel.key, panel.position))
             if (not hours or epoch in time) and (value >= 0 or not panel.key.startswith(HIGH))]
    return [x for x, _ in found], [value for _, value in found]


def draw_panel(axes: Axes, panel: Panel, runs: Mapping[str, Rows], hours: bool) -> None:
    """One value of all runs."""
    axes.set_axis_on()
    points = [points_of(rows, panel, hours) for rows in runs.values()]
    for k, (x, y) in reversed(list(enumerate(points))):                                 # the first on top
        plot(axes, (x, y), **style_of(k), linewidth=1.8, alpha=0.95)                    # type: ignore[arg-type]
    values = [value for _, some in points for value in some]
    high = panel.key.startswith(HIGH)
    if values and not high and min(values) > 0 and max(values) > 8 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    elif high:
        axes.set_ylim(0, max(0.05, min(1.0, 1.08 * max(values, default=0))))
    best = (max if high else min)(values, default=math.nan)
    of_best = next((name for name, (_, some) in zip(runs, points) if best in some), "")
    heading(axes, panel.title, f"{'highest' if high else 'lowest'} {best:.3g}: {of_best}"[:58])
    axes.set_xlabel("hours of training" if hours else "epoch", color=BLACK)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=not hours, steps=[1, 2, 5, 10]))
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelcolor="#555555")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")


def summary(rows: Rows) -> str:
    """A run in words: its length, and where precision ended and was best."""
    said = f"{rows[-1]['epoch'] + 1} epochs"
    for panel in PANELS:
        if panel.title in ("PQ", "AP of masks", "AP"):
            epochs, values = points_of(rows, panel, hours=False)
            if values:
                best = max(range(len(values)), key=values.__getitem__)
                said += f";  {panel.title} {values[-1]:.3f}, best {values[best]:.3f} (epoch {epochs[best]:g})"
    return said
