"""An evaluation as one page to look at: numbers, classes, curves, kinds of errors, and the images with most of them.

The page is a single file without scripts; pictures are inside. It is light or dark as the reader's system is, and prints.
Colours are Okabe and Ito's (2008), which the colour-blind tell apart, and cividis (Nuñez et al., 2018).
"""
from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.coco_eval import CocoEvaluator
from datasets.errors import (
    CLASS,
    CORRECT,
    ERRORS,
    IGNORED,
    KINDS,
    LOCALISATION,
    SIGNS,
    Best,
    Judged,
    best_f1,
    confusion,
    costs,
    judge,
)
from datasets.examination import counted
from detr.checkpoint import write_whole

MEANINGS = {
    "localisation": "right class, but the IoU with the object is only {least} to {iou}",
    "class": "wrong class, on an object (IoU at least {iou})",
    "both": "wrong class, near an object (IoU {least} to {iou})",
    "duplicate": "right, but a surer detection has found the object",
    "background": "no object is there (IoU below {least})",
    "missed": "an object that nothing has found, and that no L or C is about"}
LEAST = 0.1                                             # IoU below which nothing is there
FEW = 24                                                # classes whose curves need no fold; of more, half are open
PAIRS = 20                                              # most confused ones that are listed
NAMED = 120                                             # most classes whose names fit beside the matrix
SIDE, KEPT = 460, 640                                   # longest side of a picture as drawn, and of the pixels inside it


def write_report(path: str | Path, evaluator: CocoEvaluator, results: Mapping[str, Any], dataset: Any,
                 viewable: Callable[[Any], Image.Image], about: Mapping[str, object] | None = None,
                 threshold: float | None = None, worst: int = 12) -> None:
    """Write the page, whole or not at all; OSError where that is not possible. For the arguments see ``page``."""
    text = page(evaluator, results, dataset, viewable, about, threshold, worst)
    write_whole(path, lambda file: file.write(text.encode()))


def page(evaluator: CocoEvaluator, results: Mapping[str, Any], dataset: Any, viewable: Callable[[Any], Image.Image],
         about: Mapping[str, object] | None = None, threshold: float | None = None, worst: int = 12) -> str:
    """The page's html. Boxes are what it is about; of masks it has the numbers.

    ``evaluator`` has summarized, in the main process, and gave ``results``; ``dataset`` gives ``ids`` and ``image(i)`` of
    the images, which are read for the ``worst`` alone, and ``viewable`` (``detr.visualize``) makes RGB of them. ``about``
    are words about the run for the page's head. Errors are counted at a score of at least ``threshold``, by default that
    of the highest F1 over all classes together.
    """
    if evaluator.eval is None or evaluator.found is None:
        raise RuntimeError("nothing to report yet; summarize() scores the predictions, call it first, and report in the "
                           "main process")
    judged = judge(evaluator.coco, evaluator.found, least=LEAST)
    counts = judged.kind != IGNORED
    overall = best_f1(judged.score[counts], judged.kind[counts] == CORRECT, int(judged.positives.sum()))
    why = "as chosen" if threshold is not None else "where F1 over all classes together is highest" if overall else \
        "there is nothing to choose it by"
    threshold = threshold if threshold is not None else overall.threshold if overall else 0.5
    best = [best_f1(judged.score[mine], judged.kind[mine] == CORRECT, n)
            for k, n in enumerate(judged.positives.tolist()) for mine in [counts & (judged.category == k)]]
    names = list(results["per_class"])
    title = str((about or {}).get("model", "Evaluation"))
    at = f"score ≥ {_floor(threshold)}, IoU ≥ {judged.iou:g}"
    parts = [
        f"<h1>{escape(title)}: {_number(results['coco_eval_bbox'][0])} AP</h1>",
        _about({**(about or {}), "scored": f"{counted(len(judged.image_ids), 'image')}, "
                f"{counted(int(judged.positives.sum()), 'object')}, {counted(len(judged.score), 'detection')}",
                "threshold": f"errors and confusions are counted at a score of at least {_floor(threshold)} ({why})"
                + (f": precision {overall.precision:.3f}, recall {overall.recall:.3f}, F1 {overall.f1:.3f} at IoU "
                   f"{judged.iou:g}" if overall and threshold == overall.threshold else "")}),
        _twelve(results), _errors(judged, threshold, at),
        _classes(results, evaluator.eval, best, names, judged), _curves(results, evaluator.eval, best, names),
        _confusions(judged, threshold, names, at), _sizes(judged, results, evaluator, threshold, at),
        _worst(judged, threshold, names, evaluator, dataset, viewable, worst, at)]
    return (f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
            f"content='width=device-width'><title>{escape(title)}: evaluation</title>\n<style>{STYLE}</style></head>"
            f"<body>\n" + "\n".join(parts) + "\n</body></html>\n")


# Words and numbers.

def _number(value: float | None) -> str:
    """Three digits; a dash where nothing could be measured, which COCO writes as -1."""
    return "–" if value is None or not value >= 0 else f"{value:.3f}"


def _floor(score: float) -> str:
    """Three digits that are not above ``score``, so that whoever types them keeps what has it."""
    return f"{floor(score * 1000) / 1000:.3f}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else name[:most - 1] + "…"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Cells are html; the first ``words`` columns are words, the others numbers."""
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}{'' if i < words else ' class=n'}>{cell}</{tag}>"
                                for i, cell in enumerate(cells)) + "</tr>"

    return (f"<div class=wide><table><thead>{row(head, 'th')}</thead><tbody>"
            + "".join(row(cells, "td") for cells in rows) + "</tbody></table></div>")


def _bar(text: str, share: float, colour: str = "var(--curve)") -> str:
    """A number on a bar of that length."""
    return f"<span class=bar style='--part:{100 * min(max(share, 0), 1):.1f}%;--colour:{colour}'>{text}</span>"


def _mark(kind: str) -> str:
    letter, colour, _ = SIGNS[kind]
    return f"<b class=mark style='background:{colour};color:{_ink(colour)}'>{letter or '&nbsp;'}</b>"


def _ink(colour: str) -> str:
    """Letters on a colour: white on the one dark one."""
    return "#fff" if colour == SIGNS["missed"].colour else "#000"


# Sections.

def _about(words: Mapping[str, object]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
                            for name, value in words.items()) + "</dl>"


def _twelve(results: Mapping[str, Any]) -> str:
    head = ["", "AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AR 1", "AR 10", "AR 100", "AR small",
            "AR medium", "AR large"]
    kinds = ("boxes", "coco_eval_bbox"), ("masks", "coco_eval_masks")
    rows = [[name, *map(_number, results[key])] for name, key in kinds if key in results]
    return ("<h2>COCO's numbers</h2><p>Means over classes and over IoU 0.50 to 0.95 (AP50, AP75: that IoU alone), all "
            "scores, at most 100 detections of a class in an image (AR 1, AR 10: so many).</p>" + _table(head, rows))


def _errors(judged: Judged, threshold: float, at: str) -> str:
    kept = judged.score >= threshold
    counts = {kind: int((kept & (judged.kind == i)).sum()) for i, kind in enumerate(KINDS)}
    counts["missed"] = int(judged.missed(threshold).sum())
    gained = costs(judged)
    most = max(1, *(counts[kind] for kind in ERRORS))
    dearest = max(1e-9, *gained.values())
    rows = [[f"{_mark(kind)} {kind}", MEANINGS[kind].format(iou=f"{judged.iou:g}", least=f"{LEAST:g}"),
             _bar(str(counts[kind]), counts[kind] / most, SIGNS[kind].colour),
             _bar(f"{max(gained[kind], 0):.3f}", gained[kind] / dearest, SIGNS[kind].colour)]
            for kind in ERRORS]
    objects = int(judged.positives.sum())
    found = int((judged.found(threshold) & ~judged.crowd).sum())
    ignored = f"; {counted(counts['ignored'], 'detection')} on crowds not counted" if counts["ignored"] else ""
    return (f"<h2>Kinds of errors</h2><p>At {at}: {counted(int(kept.sum()), 'detection')}, of which "
            f"{counts['correct']} right; {found} of {counted(objects, 'object')} found{ignored}. The cost is the AP50 "
            f"that would be gained if errors of this kind alone were mended, of detections of all scores (TIDE, Bolya et "
            f"al., 2020); costs do not add up.</p>" + _table(["kind", "meaning", "count", "costs AP50"], rows, words=2))


def _classes(results: Mapping[str, Any], curves: Mapping[str, Any], best: Sequence[Best | None], names: Sequence[str],
             judged: Judged) -> str:
    masks = results.get("per_class_masks")
    rows = []
    for k in _by_ap(results, names):
        row, one = results["per_class"][names[k]], best[k]
        recall = curves["recall"][:, k, 0, -1]
        rows.append([escape(names[k]), str(row["objects"]), _bar(_number(row["AP"]), row["AP"]), _number(row["AP50"]),
                     _number(float(recall[recall > -1].mean()) if (recall > -1).any() else None),
                     *([_number(masks[names[k]]["AP"])] if masks else []),
                     *([_number(one.f1), _floor(one.threshold), _number(one.precision), _number(one.recall)] if one else
                       ["–"] * 4)])
    return (f"<h2>Classes</h2><p>The lowest AP first. AP, AR: over IoU 0.50 to 0.95, as above. The best F1 is at IoU ≥ "
            f"{judged.iou:g}: a threshold at this score gives this precision and this recall.</p>"
            + _table(["class", "objects", "AP", "AP50", "AR", *(["mask AP"] if masks else []), "best F1", "at score",
                      "precision", "recall"], rows))


def _by_ap(results: Mapping[str, Any], names: Sequence[str]) -> list[int]:
    """The places of classes, the lowest AP first; those without objects at the end."""
    ap = [results["per_class"][name]["AP"] for name in names]
    return sorted(range(len(names)), key=lambda k: (ap[k] < 0, ap[k]))


def _curves(results: Mapping[str, Any], curves: Mapping[str, Any], best: Sequence[Best | None],
            names: Sequence[str]) -> str:
    precision = curves["precision"][:, :, :, 0, -1]                                         # [IoU, recall, class]
    there = [k for k in _by_ap(results, names) if (precision[:, :, k] > -1).any()]
    if not there:
        return "<h2>Precision and recall</h2><p>No objects, no curves.</p>"
    mean = precision[:, :, there].mean(2)
    figures = [_figure(escape(_cut(names[k], 40)), f"AP50 {_number(results['per_class'][names[k]]['AP50'])}",
                       precision[(0, 5), :, k], best[k]) for k in there]
    first = figures if len(figures) <= FEW else figures[:FEW // 2 - 1]
    rest = figures[len(first):]
    fold = (f"<details><summary>the other {len(rest)} classes</summary><div class=grid>{''.join(rest)}</div></details>"
            if rest else "")
    return (f"<h2>Precision and recall</h2><p>Precision (up) over recall (across), both 0 to 1; scores fall from left to "
            f"right. Solid: IoU 0.5; dashed: IoU 0.75. The dot is the best F1 at IoU 0.5. Precision is that of at least "
            f"this recall, as in AP{'; classes of the lowest AP first' if len(there) > 1 else ''}.</p><div class=grid>"
            f"{_figure('<b>mean over classes</b>', '', mean[[0, 5]], None)}{''.join(first)}</div>{fold}")


def _figure(name: str, words: str, precision: np.ndarray, best: Best | None) -> str:
    """A small chart of two curves ``[2, recalls]``."""
    def points(values: np.ndarray) -> str:
        there = np.column_stack([np.linspace(4, 104, len(values)), 104 - 100 * values]).round(1)
        turns = np.ones(len(values), bool)                          # what lies between equal neighbours says nothing
        turns[1:-1] = (values[1:-1] != values[:-2]) | (values[1:-1] != values[2:])
        return " ".join(f"{x:g},{y:g}" for x, y in there[turns].tolist())

    lines = "".join(f"<polyline class='c{i}' points='{points(values)}'/>" for i, values in enumerate(precision))
    dot = f"<circle cx='{4 + 100 * best.recall:.1f}' cy='{104 - 100 * best.precision:.1f}' r='3'/>" if best else ""
    more = f"<br>F1 {best.f1:.2f} at {_floor(best.threshold)}" if best else ""
    return (f"<figure><figcaption>{name}<br><small>{words}{more}</small></figcaption><svg viewBox='0 0 108 108' "
            f"role='img' class=pr><path class=grid-line d='M4 29h100M4 54h100M4 79h100M29 4v100M54 4v100M79 4v100'/>"
            f"<path class=axis d='M4 4v100h100'/>{lines}{dot}</svg></figure>")


def _confusions(judged: Judged, threshold: float, names: Sequence[str], at: str) -> str:
    matrix = confusion(judged, threshold)
    n = len(names)
    between = matrix[:n, :n] * ~np.eye(n, dtype=bool)
    order = np.argsort(-between, axis=None, kind="stable")[:PAIRS]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, between.shape)) if between[i, j]]
    objects = matrix[:n].sum(1)
    table = _table(["object is", "found as", "times", "of its class"],
                   ([escape(names[i]), escape(names[j]), str(between[i, j]), _share(between[i, j], objects[i])]
                    for i, j in pairs), words=2) if pairs else "<p>No class was taken for another.</p>"
    confused, shown = int(between.sum()), sum(int(between[pair]) for pair in pairs)
    more = f", {shown} of them in the {len(pairs)} most frequent pairs, which the table lists" if shown < confused else ""
    return (f"<h2>Confusions</h2><p>At {at}. Each object goes with at most one detection: of its class where there is "
            f"one, else of another; the most overlapping first. Found as another class: "
            f"{counted(confused, 'object')}{more}.</p>{table}<figure class=matrix>{_matrix(matrix, names)}<figcaption>"
            f"Rows: what an object is; columns: as what it was found; last column: not found. Last row: detections "
            f"where no object is. Colours are shares of the row: {_legend()}"
            f"{'' if n <= NAMED else '; classes are in the order of their ids'}"
            f"</figcaption></figure>")


def _colours(shares: np.ndarray) -> np.ndarray:
    """Shares -> uint8 RGB, white for none; the square root, since most confusions are rare."""
    import matplotlib
    colours = (matplotlib.colormaps["cividis_r"](np.sqrt(shares))[..., :3] * 255).round().astype(np.uint8)
    colours[shares == 0] = 255
    return colours


def _legend() -> str:
    shares = (0, 0.01, 0.05, 0.25, 1)
    return " ".join(f"<span class=mark style='background:#{bytes(colour).hex()};color:{'#fff' if share > 0.2 else '#000'}"
                    f"'>{share:.0%}</span>" for share, colour in zip(shares, _colours(np.array(shares))))


def _matrix(matrix: np.ndarray, names: Sequence[str]) -> str:
    """The matrix as a picture, with names at its sides where they fit and numbers in it where these do."""
    n = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    cell = min(max(720 / n, 1), 48)
    named, size = n - 1 <= NAMED, min(12.0, max(cell * 0.95, 6))
    labels = [[*map(lambda name: _cut(name, 18), names), last] for last in ("no object", "not found")]
    margin = 8 + 0.6 * size * max(map(len, labels[0] + labels[1])) if named else 8
    side, end = cell * n, margin + cell * n
    picture = _uri(Image.fromarray(_colours(shares)), "PNG")
    out = [f"<svg viewBox='0 0 {end + 4:.0f} {end + 4:.0f}' style='max-width:{end + 4:.0f}px' role='img' "
           f"font-size='{size:.1f}'><image href='{picture}' x='{margin:.1f}' y='{margin:.1f}' width='{side:.1f}' "
           f"height='{side:.1f}' preserveAspectRatio='none' style='image-rendering:pixelated'/>"
           f"<rect x='{margin:.1f}' y='{margin:.1f}' width='{side:.1f}' height='{side:.1f}' class=frame />"
           f"<path class=frame d='M{margin:.1f} {end - cell:.1f}h{side:.1f}M{end - cell:.1f} {margin:.1f}v{side:.1f}'/>"]
    for k in range(n if named else 0):
        middle = margin + cell * (k + 0.5)
        out.append(f"<text x='{margin - 4:.1f}' y='{middle + 0.35 * size:.1f}' text-anchor='end'>"
                   f"{escape(labels[0][k])}</text><text transform='translate({middle + 0.35 * size:.1f} "
                   f"{margin - 4:.1f}) rotate(-90)'>{escape(labels[1][k])}</text>")
    longest = len(str(matrix.max()))
    if (letters := min(12.0, 1.5 * cell / longest)) >= 7:
        for (i, j), count in np.ndenumerate(matrix):
            if count:
                out.append(f"<text x='{margin + cell * (j + 0.5):.1f}' y='{margin + cell * (i + 0.5) + 4:.1f}' "
                           f"text-anchor='middle' font-size='{letters:.1f}' "
                           f"style='fill:{'#fff' if shares[i, j] > 0.2 else '#000'}'>{count}</text>")
    return "".join(out) + "</svg>"


def _sizes(judged: Judged, results: Mapping[str, Any], evaluator: CocoEvaluator, threshold: float, at: str) -> str:
    found, solid = judged.found(threshold), ~judged.crowd
    numbers = results["coco_eval_bbox"]

    def row(name: str, mine: np.ndarray, *more: str) -> list[str]:
        n = int(mine.sum())
        return [name, str(n), _bar(_share(int(found[mine].sum()), n), found[mine].mean() if n else 0), *more]

    buckets = [("small: area below 32² pixels", 0, 32 ** 2), ("medium: 32² to 96² pixels", 32 ** 2, 96 ** 2),
               ("large: at least 96² pixels", 96 ** 2, np.inf)]
    rows = [row(name, solid & (judged.area >= low) & (judged.area < high), _number(precision), _number(recall))
            for (name, low, high), precision, recall in zip(buckets, numbers[3:6], numbers[9:12])]
    images = [evaluator.coco.imgs[id] for id in judged.image_ids.tolist()]
    if solid.any() and all("width" in image and "height" in image for image in images):
        areas = np.array([image["width"] * image["height"] for image in images])[judged.object_image]
        sides = np.sqrt(judged.objects_xywh[:, 2].clip(0) * judged.objects_xywh[:, 3].clip(0) / areas)
        first, second = np.quantile(sides[solid], (1 / 3, 2 / 3))
        rows += [row(f"{name}: {words}", solid & (sides >= low) & (sides < high), "", "") for name, words, low, high in (
            ("smallest third", f"side below {first:.1%} of the image's", 0, first),
            ("middle third", f"{first:.1%} to {second:.1%}", first, second),
            ("largest third", f"at least {second:.1%}", second, np.inf))]
    return (f"<h2>Sizes</h2><p>Found: at {at}. AP and AR: COCO's, over IoU 0.50 to 0.95 and all scores. A side is the "
            f"root of an area, the box's by the image's.</p>"
            + _table(["objects", "number", "found", "AP", "AR"], rows))


# The worst images.

def _worst(judged: Judged, threshold: float, names: Sequence[str], evaluator: CocoEvaluator, dataset: Any,
           viewable: Callable[[Any], Image.Image], count: int, at: str) -> str:
    errors = judged.errors_of_images(threshold)
    worst = [i for i in np.argsort(-errors, kind="stable")[:count].tolist() if errors[i]]
    place = {id: i for i, id in enumerate(dataset.ids)}
    kept, missed, found = judged.score >= threshold, judged.missed(threshold), judged.found(threshold)
    figures = []
    for i in worst:
        id = int(judged.image_ids[i])
        file = evaluator.coco.imgs[id].get("file_name", "")
        mine = slice(judged.starts[i], judged.starts[i + 1])
        theirs = range(judged.object_starts[i], judged.object_starts[i + 1])
        rows = np.flatnonzero(kept[mine]) + mine.start
        rows = rows[np.argsort(judged.score[rows], kind="stable")]                                  # the surest on top
        kinds = judged.kind[rows]
        about = {int(judged.partner[row]): KINDS[judged.kind[row]] for row in rows
                 if judged.kind[row] in (LOCALISATION, CLASS)}
        states = ["ignored" if judged.crowd[k] else "correct" if found[k] else "missed" if missed[k] else about[k]
                  for k in theirs]
        truth = [(judged.objects_xywh[k], state, names[judged.object_category[k]]) for k, state in zip(theirs, states)]
        seen = [(judged.boxes_xywh[row], KINDS[kind], f"{_cut(names[judged.category[row]], 18)} {judged.score[row]:.2f}")
                for row, kind in zip(rows, kinds)]
        sums = [f"{_mark(kind)}&thinsp;{n}" for kind in ERRORS
                if (n := int((kinds == KINDS.index(kind)).sum()) if kind in KINDS else states.count("missed"))]
        caption = (f"image {id} <small>{escape(str(file))}</small>: {counted(int(errors[i]), 'error')} &nbsp; "
                   f"{' &nbsp; '.join(sums)}")
        try:
            image = viewable(dataset.image(place[id]))
        except OSError as error:
            figures.append(f"<figure><figcaption>{caption}</figcaption><p>cannot be shown: {escape(str(error))}</p>"
                           f"</figure>")
            continue
        figures.append(f"<figure><figcaption>{caption}</figcaption><div class=pair>"
                       f"{_picture(image, truth, f'image{id}', True)}{_picture(image, seen, f'image{id}', False)}"
                       f"</div></figure>")
    marks = " &nbsp; ".join(f"{_mark(kind)} {SIGNS[kind].words}" for kind in ("correct", *ERRORS))
    return (f"<h2>Images with most errors</h2><p>At {at}. Left: the objects; right: what was found. {marks}. An object "
            f"marked {_mark('localisation')} or {_mark('class')} was not found, and such an error is about it."
            f"</p>" + ("".join(figures) or "<p>There are no errors.</p>"))


def _picture(image: Image.Image, boxes: Sequence[tuple[np.ndarray, str, str]], name: str, first: bool) -> str:
    """A picture with boxes (x, y, width, height in the image's pixels; kind; words). The ``first`` of a ``name`` holds
    the pixels, others refer to it. Where boxes are many, only errors have words; all have them under the pointer."""
    scale = SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    if first:
        small = image.copy()
        small.thumbnail((KEPT, KEPT))
        inside = (f"<image id='{name}' href='{_uri(small, 'JPEG', quality=85)}' width='{width}' height='{height}' "
                  f"preserveAspectRatio='none'/>")
    else:
        inside = f"<use href='#{name}'/>"
    out, captions = [inside], []
    drawn: list[list[float]] = []
    placed: list[tuple[float, float, float, float]] = []
    for (x, y, w, h), kind, words in boxes:
        letter, colour, sign = SIGNS[kind]
        left, top, right, bottom = corners = [float(v) * scale for v in (x, y, x + w, y + h)]
        under = 4 * sum(max(abs(a - b) for a, b in zip(corners, other)) < 3 for other in drawn)    # one query's classes
        drawn.append(corners)
        left, top, right, bottom = left + under, top + under, right - under, bottom - under
        outline = (f"x='{left:.1f}' y='{top:.1f}' width='{max(right - left, 1):.1f}' "
                   f"height='{max(bottom - top, 1):.1f}' fill='none'")
        thick = 2 if kind in ("correct", "ignored") else 3
        dashes = " stroke-dasharray='6 4'" if kind == "ignored" else ""
        out.append(f"<g><title>{escape(f'{sign}: {words}')}</title><rect {outline} stroke='#000' "
                   f"stroke-opacity='0.55' stroke-width='{thick + 2}'/><rect {outline} stroke='{colour}' "
                   f"stroke-width='{thick}'{dashes}/></g>")
        if letter or len(boxes) <= 8:
            text = _cut(f"{letter} {words}".strip(), 26)
            captions.append(((left, top, right, bottom), text, colour))
    for box, text, colour in reversed(captions):                                            # the surest choose first
        wide = min(_length(text) + 6, width)
        x, y = _free_place(box, wide, 15, (width, height), placed)
        placed.append((x, y, x + wide, y + 15))
        out.append(f"<rect x='{x:.1f}' y='{y:.1f}' width='{wide:.1f}' height='15' fill='{colour}'/><text x='"
                   f"{x + 3:.1f}' y='{y + 11.5:.1f}' textLength='{wide - 6:.1f}' lengthAdjust='spacingAndGlyphs' "
                   f"style='fill:{_ink(colour)}'>{escape(text)}</text>")
    return (f"<svg viewBox='0 0 {width} {height}' style='max-width:{width}px' role='img' font-size='11.5'>"
            + "".join(out) + "</svg>")


def _length(text: str) -> float:
    """Of letters 11.5 pixels high, about: to which they are then drawn."""
    return sum(3.6 if c in " .,:;'|!iljtfr1I()" else 9.5 if c in "mwMW@%" or ord(c) > 0x2e80 else 6.5 for c in text)


def _free_place(box: tuple[float, float, float, float], wide: float, high: float, size: tuple[int, int],
                placed: Sequence[tuple[float, float, float, float]]) -> tuple[float, float]:
    """Where a caption hides least of the others, at a corner of its ``box``, first above it on the left."""
    left, top, right, bottom = box
    corners = [(x, y) for y in (top - high, bottom, top, bottom - high) for x in (left, right - wide)]
    inside = [(max(0.0, min(x, size[0] - wide)), max(0.0, min(y, size[1] - high))) for x, y in corners]

    def hidden(place: tuple[float, float]) -> float:
        x, y = place
        return sum(max(0.0, min(x + wide, c) - max(x, a)) * max(0.0, min(y + high, d) - max(y, b))
                   for a, b, c, d in placed)

    return min(inside, key=hidden)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


STYLE = """
:root { color-scheme: light; --paper: #fff; --ink: #1b1d20; --faint: #5d636b; --line: #d9dce0; --curve: #0072b2;
  --second: #d55e00; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --paper: #15171a; --ink: #e7e9ec;
  --faint: #a0a7b0; --line: #3a3f46; --curve: #56b4e9; --second: #e69f00; } }
body { max-width: 1000px; margin: 2rem auto 4rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .6rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .3rem; }
p, figcaption, dl { color: var(--faint); } p { margin: .2rem 0 .8rem; max-width: 75ch; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; } dd { margin: 0;
  color: var(--ink); overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 600; text-align: left; } th, td { padding: .15rem .75rem .15rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; max-width: 32rem; overflow-wrap: anywhere; min-width: 3rem; }
th.n, td.n { text-align: right; white-space: nowrap; }
.bar { display: block; min-width: 6rem; padding-right: .2rem; background: linear-gradient(90deg,
  color-mix(in srgb, var(--colour) 38%, transparent) var(--part), transparent var(--part)); }
.mark { display: inline-block; min-width: 1.3em; padding: 0 .25em; text-align: center; border-radius: 3px;
  font-size: .85em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(145px, 1fr)); gap: 1rem;
  align-items: end; }
figure { margin: 0; break-inside: avoid; } figcaption { font-size: .85rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; } svg text { fill: var(--ink); font-family: system-ui, "DejaVu Sans", sans-serif; }
.pr polyline { fill: none; stroke-width: 2; stroke: var(--curve); } .pr .c1 { stroke: var(--second);
  stroke-dasharray: 4 2; stroke-width: 1.5; } .pr circle { fill: var(--curve); stroke: var(--paper); }
.grid-line { stroke: var(--line); stroke-width: .6; fill: none; } .axis, .frame { stroke: var(--faint); fill: none; }
.matrix { margin-top: 1.4rem; } .pair { display: flex; gap: .8rem; flex-wrap: wrap; margin: .3rem 0 1.6rem; }
.pair svg { flex: 1 1 300px; } summary { cursor: pointer; margin: 1rem 0; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } h2, h2 + p { break-after: avoid; }
  .wide { overflow: visible; } table { font-size: 9.5px; } th, td { padding-right: .4rem; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""
