"""Any tensor as a picture to look at: maps with a scale, numbers, what is not finite, and what it is made of."""
from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

NUMBERED = 12                       # rows and columns of a map whose numbers are written into its cells
NOT_FINITE = "#D55E00"              # vermilion (Okabe and Ito, 2008), in neither colour map
INCHES, DPI = 1.9, 100              # of a map's longer side


def view(array: Tensor | np.ndarray, title: str = "", rows: tuple[int, int] | None = None, most: int = 64,
         shared: bool = True) -> Image.Image:
    """A picture of an array ``[H, W]``, ``[C, H, W]`` (C maps) or ``[B, C, H, W]`` (B rows of C maps), numbers or bool.

    Every map has its index and its axes; the headline says shape, type, least, mean and largest value, and how many are
    not finite, which are vermilion. Values from below to above zero are shown from blue over white to red with white at
    zero, others from dark to bright (viridis): both can be told apart without seeing all colours. All maps share one
    scale, or, with ``shared=False``, each has its own, written below it. Small maps have their numbers in their cells.
    Of more than ``most`` maps the first are shown, and the headline says so. ``rows``: the same data in another layout,
    ``view(x, rows=(2, 3))`` shows ``[6, H, W]`` as two rows of three.

    Raises ValueError for other numbers of dimensions, complex numbers and what holds nothing, saying how to slice, and
    for ``rows`` and ``most`` that cannot be.
    """
    values = as_numpy(array)
    shape = "x".join(map(str, np.shape(array))) or "scalar"
    if not 2 <= values.ndim <= 4 or not values.size or values.dtype.kind not in "fiub":
        raise ValueError(f"view: an array {shape} of {values.dtype}; real numbers [H, W], [C, H, W] or [B, C, H, W] with "
                         f"something in them are needed: index or reshape it, such as x[0], x[None] or x.abs()")
    if most < 1:
        raise ValueError(f"view: most={most} maps; at least 1 is needed")
    maps = values.reshape(-1, *values.shape[-2:])
    places = arranged(values.shape, rows)
    shown = places[:max(1, most // places.shape[1]), :most]
    finite = values[np.isfinite(values)]
    kind = str(array.dtype).removeprefix("torch.")
    headline = f"{title + ':  ' if title else ''}{shape} {kind}\n{statistics(values, finite)}"
    if (shown >= 0).sum() < len(maps):
        headline += f"\n{(shown >= 0).sum()} of {len(maps)} maps are shown"

    lines, columns = shown.shape
    height, width = maps.shape[1:]
    scale = INCHES * (2.2 if shown.size == 1 else 1) / max(height, width)
    tall, wide = max(0.5, height * scale), max(0.5, width * scale)
    figure = Figure(figsize=(max(4.0, columns * (wide + 0.45) + 1.1), lines * (tall + 0.5) + 0.9), dpi=DPI,
                    layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    everything, image = limits(finite), None
    for plot, place in zip(axes.flat, shown.flat):
        if place < 0:
            plot.set_axis_off()
            continue
        bounds, colours = everything if shared else limits(maps[place][np.isfinite(maps[place])])
        image = draw_map(plot, maps[place], bounds, colours, sparse=shown.size > 1)
        if values.ndim > 2:
            plot.set_title(list(map(int, np.unravel_index(place, values.shape[:-2]))), fontsize=8, pad=2)
        if not shared:
            plot.set_xlabel(f"{short(bounds[0])} to {short(bounds[1])}", fontsize=7, labelpad=1)
    if shared:
        bar = figure.colorbar(ScalarMappable(image.norm, image.cmap), ax=axes, shrink=0.8, aspect=25, pad=0.02)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle(headline, fontsize=9, x=0.01, ha="left")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")


def arranged(shape: tuple[int, ...], rows: tuple[int, int] | None) -> np.ndarray:
    """Which map goes where, ``[rows, columns]``, -1 for none: as the array has them, those of ``[C, H, W]`` in a shape
    about as wide as high."""
    count = int(np.prod(shape[:-2]))
    if rows is not None:
        if len(rows) != 2 or rows[0] * rows[1] != count:
            raise ValueError(f"view: rows={rows} for {count} maps; give (rows, columns) whose product is that")
        return np.arange(count).reshape(rows)
    if len(shape) == 4:
        return np.arange(count).reshape(shape[:2])
    columns = count if count <= 8 else min(count, max(1, round((count * shape[-2] / shape[-1] * 1.4) ** 0.5)))
    places = np.full(-(-count // columns) * columns, -1)
    places[:count] = range(count)
    return places.reshape(-1, columns)


def as_numpy(array: Tensor | np.ndarray) -> np.ndarray:
    """Numbers as NumPy has them: float64 where they are of a type it does not have, or whose sums overflow."""
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = (array.double() if array.is_floating_point() else array).numpy()
    values = np.asarray(array)
    return values.astype(np.float64) if values.dtype.kind in "fiub" else values


def limits(finite: np.ndarray) -> tuple[tuple[float, float], str]:
    """The ends of a colour map, and its name."""
    if not finite.size:
        return (0.0, 1.0), "viridis"
    least, most = float(finite.min()), float(finite.max())
    if least < 0 < most:
        return (-max(-least, most), max(-least, most)), "RdBu_r"
    return (least, most if most > least else least + 1), "viridis"


def draw_map(axes: Axes, values: np.ndarray, bounds: tuple[float, float], colours: str, sparse: bool) -> Any:
    """One map, with the numbers in its cells where they have room."""
    axes.set_facecolor(NOT_FINITE)
    shown = np.ma.masked_invalid(values)
    image = axes.imshow(shown, cmap=colours, norm=Normalize(*bounds), interpolation="nearest")
    height, width = values.shape
    for axis, count in ((axes.xaxis, width), (axes.yaxis, height)):
        axis.set_ticks(sorted({0, count - 1}) if sparse or count > NUMBERED else range(count))
        axis.set_tick_params(labelsize=6, length=2, pad=1)
    if max(height, width) <= (NUMBERED if not sparse else NUMBERED // 2):
        for y in range(height):
            for x in range(width):
                value = values[y, x]
                red, green, blue, _ = image.cmap(image.norm(value)) if np.isfinite(value) else (0.84, 0.37, 0.0, 1.0)
                dark = 0.2126 * red ** 2.2 + 0.7152 * green ** 2.2 + 0.0722 * blue ** 2.2 < 0.18
                axes.text(x, y, short(value), ha="center", va="center", fontsize=6 if sparse else 8,
                          color="white" if dark else "black")
    return image


def statistics(values: np.ndarray, finite: np.ndarray) -> str:
    """Least, mean and largest of the finite values, and how many others there are."""
    wrong = values.size - finite.size
    note = f"; {wrong} of {values.size} not finite" if wrong else ""
    if not finite.size:
        return f"nothing finite{note}"
    return f"least {short(finite.min())}, mean {short(finite.mean())}, most {short(finite.max())}{note}"


def short(value: float) -> str:
    """A number in three digits."""
    return f"{value:.3g}"
