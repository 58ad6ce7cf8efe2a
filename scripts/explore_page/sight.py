"""What the model says of an image, as numbers for the page: detections, errors, and where it looked."""
from __future__ import annotations

import base64
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from datasets.errors import SIGNS, errors_of
from detr.attention_maps import DeformableAttention, DenseAttention, Explanation
from detr.boxes import box_cxcywh_to_xyxy
from detr.loading import Detector
from detr.preprocessing import height_width
from detr.structures import Detections
from detr.visualize import class_colour

from .images import Images, Recent, Refused, Truth

FINEST = 64                     # cells of the long side that the heat of sampling points is given on, at most
ASKED_FOR = 10.0                # seconds for which errors are looked for after somebody wanted them


class Turns:
    """One at a time, and those who wait in front of the page before what is done in the background."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._busy, self._waiting = False, 0

    @contextmanager
    def turn(self, urgent: bool = True) -> Iterator[None]:
        """A block that no other thread is in."""
        with self._condition:
            self._waiting += urgent
            try:
                self._condition.wait_for(lambda: not self._busy and (urgent or not self._waiting))
                self._busy = True
            finally:
                self._waiting -= urgent
        try:
            yield
        finally:
            with self._condition:
                self._busy = False
                self._condition.notify_all()


class Sight:
    """A detector that several threads ask. ``threshold`` and ``iou`` say what is an error, in the order of images too."""

    def __init__(self, detector: Detector, images: Images, threshold: float = 0.5, iou: float = 0.5) -> None:
        self.detector, self.images, self.threshold, self.iou = detector, images, threshold, iou
        self._turns = Turns()
        self._found, self._explained, self._explained_all = Recent(64), Recent(6), Recent(2)
        self.errors: dict[str, int | None] = {}         # by id, as far as they are known; None: cannot be read
        self._asked, self._lock = 0.0, threading.Lock()
        self._worker: threading.Thread | None = None

    def about(self) -> dict[str, Any]:
        """What the page has to know of the model, and how labels and kinds of errors are shown everywhere."""
        model: Any = getattr(self.detector.model, "detr", self.detector.model)
        return {"model": self.detector.name, "encoder_layers": len(model.transformer.encoder.layers),
                "decoder_layers": len(model.transformer.decoder.layers),
                "colours": {label: "#{:02x}{:02x}{:02x}".format(*class_colour(label)) for label in self.detector.names},
                "kinds": {kind: sign._asdict() for kind, sign in SIGNS.items()}}

    # Detections and errors.

    def found(self, key: str, urgent: bool = True) -> Detections:
        """All detections of an image, the surest first, with their ``queries``; of labels that the data has."""
        return self._found.get(key, lambda: self._look(key, urgent))

    def _look(self, key: str, urgent: bool) -> Detections:
        picture = self.images.picture(key, keep=urgent)
        with self._turns.turn(urgent):
            try:
                seen = self.detector.look([picture])
                self.detector.check_finite(seen, [f"image {key}"])
            except ValueError as error:
                raise Refused(422, str(error)) from error
            found, = self.detector.postprocessors["bbox"](seen.outputs, seen.sizes)
        scores, labels, boxes = (found[name].cpu() for name in ("scores", "labels", "boxes"))
        queries = found["queries"].cpu() if "queries" in found else torch.arange(len(scores))
        names = self.detector.names
        order = [i for i in scores.argsort(descending=True, stable=True).tolist() if int(labels[i]) in names]
        return {"scores": scores[order], "labels": labels[order], "boxes": boxes[order], "queries": queries[order]}

    def detections(self, key: str) -> dict[str, Any]:
        """Of an image: its size, detections, and objects where they are known."""
        found, truth, names = self.found(key), self.images.truth(key), self.detector.names
        rows = zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), found["queries"].tolist())
        height, width = height_width(self.images.picture(key))
        return {**self.images.row(key), "width": width, "height": height,
                "detections": [{"score": score, "label": label, "name": names[label], "box": box, "query": query}
                               for score, label, box, query in rows],
                "truth": None if truth is None else [
                    {"label": label, "name": names.get(label, f"label {label}"), "box": box, "crowd": crowd}
                    for box, label, crowd in zip(truth.boxes_xyxy.tolist(), truth.labels.tolist(),
                                                 truth.iscrowd.tolist())]}

    def mistakes(self, key: str, threshold: float) -> dict[str, Any]:
        """What is wrong with the detections of at least ``threshold``: their kinds, in the order of ``detections``, the
        objects they are about, and those that were missed."""
        truth = self.images.truth(key)
        if truth is None:
            raise Refused(404, "nobody has said what is on an upload, so there are no errors to show")
        errors = self._errors(self.found(key), truth, threshold)
        return {"kinds": errors.kinds, "places": errors.places, "partners": errors.partners, "missed": errors.missed,
                "total": errors.total, "counts": Counter(errors.kinds) | {"missed": len(errors.missed)}}

    def _errors(self, found: Detections, truth: Truth, threshold: float) -> Any:
        return errors_of(found, truth.boxes_xyxy, truth.labels, truth.iscrowd, threshold=threshold, iou=self.iou)

    # Images by their errors.

    def worst_first(self) -> tuple[list[str], dict[str, int | None]]:
        """Ids with most errors first, those not looked at yet behind them, and the errors as they were known for this
        order; looks at more in the background as long as somebody asks."""
        self._asked = time.monotonic()
        with self._lock:
            if len(self.errors) < len(self.images.by_name) and self._worker is None:
                self._worker = threading.Thread(target=self._look_for_errors, daemon=True)
                self._worker.start()
            known = dict(self.errors)

        def rank(key: str) -> float:
            total = known.get(key, 0.5)                         # not looked at: behind all that are; unreadable: last
            return -total if isinstance(total, int) else 1.0 if total is None else total

        return sorted(self.images.by_name, key=rank), known

    def _look_for_errors(self) -> None:
        try:
            for key in self.images.by_name:
                if time.monotonic() - self._asked > ASKED_FOR:
                    return
                if key in self.errors:
                    continue
                try:
                    truth = self.images.truth(key)
                    assert truth is not None
                    total = self._errors(self.found(key, urgent=False), truth, self.threshold).total
                except Refused:
                    total = None
                except Exception as error:                      # or the next poll would try this image again, for ever
                    total = None
                    print(f"image {key}: {type(error).__name__}: {error}; it goes to the end of the order", flush=True)
                with self._lock:
                    self.errors[key] = total
        finally:
            with self._lock:
                self._worker = None

    def stop(self) -> None:
        """End what is done in the background, after the image that it is at."""
        self._asked, worker = float("-inf"), self._worker
        if worker is not None:
            worker.join(timeout=30)

    # Where it looked.

    def explained(self, key: str, encoder: bool) -> Explanation:
        """An image with the model's attention, that of the encoder's tokens too where it is wanted: it takes memory."""
        def make() -> Explanation:
            picture = self.images.picture(key)
            with self._turns.turn():
                try:
                    return self.detector.explain(picture, encoder=encoder)
                except (TypeError, ValueError) as error:
                    raise Refused(422, str(error)) from error

        complete = self._explained_all.peek(key)
        return complete or (self._explained_all if encoder else self._explained).get(key, make)

    def of_query(self, key: str, query: int) -> dict[str, Any]:
        """Where a query looked in each decoder layer, and how its box moved."""
        seen = self.explained(key, encoder=False)
        count = seen.boxes.shape[1]
        if not 0 <= query < count:
            raise Refused(404, f"there is no query {query}; the model has {count}, from 0")
        path, steps = seen.path(query), len(seen.boxes)
        start = None
        if seen.references and seen.references[0].shape[-1] == 2:
            height, width = seen.size
            start = (seen.references[0][query] * torch.tensor([width, height])).tolist()
        return {"query": query, "path": rounded(path), "from_box": len(path) > steps, "from_point": start,
                "references": [rounded(_in_pixels(of_layer[query], seen.size)) for of_layer in seen.references],
                "layers": layers(seen.decoder, query)}

    def of_point(self, key: str, x: float, y: float) -> dict[str, Any]:
        """Where each encoder layer looked from the pixel (x, y)."""
        if not self.about()["encoder_layers"]:
            raise Refused(422, f"{self.detector.name} has no encoder layers: its feature maps go to the decoder as they "
                               f"are, and no point looks at others; choose a box instead")
        height, width = height_width(self.images.picture(key))
        if not (0 <= x < width and 0 <= y < height):
            raise Refused(422, f"the point ({x:g}, {y:g}) is not in the image, which is {width} wide and {height} high")
        seen = self.explained(key, encoder=True)
        return {"x": x, "y": y, "layers": layers(seen.encoder, seen.token(*seen.cell(x, y)))}


def layers(attention: Sequence[DenseAttention] | Sequence[DeformableAttention], query: int) -> list[dict[str, Any]]:
    """What one query or token looked at, of each layer: ``shape`` [h, w]; ``heat``, uint8 ``[M + 1, h, w]`` in base64,
    the average of the heads and each of them, scaled so that ``most [M + 1]``, the largest weight of each, is 255; of
    deformable attention ``points``, of each head (x, y, weight, level)."""
    rows = []
    for layer in attention:
        if isinstance(layer, DeformableAttention):
            heads = layer.points.shape[1]
            height, width = layer.shapes[0]
            shrink = min(1.0, FINEST / max(height, width))
            grid = max(1, round(height * shrink)), max(1, round(width * shrink))
            maps = torch.stack([layer.heat(query, head, grid=grid) for head in (None, *range(heads))])
        else:
            heads = len(layer.query)
            maps = torch.stack([layer.heat(query, head) for head in (None, *range(heads))])
        most = maps.flatten(1).amax(1)
        bytes_ = (maps / most.clamp(min=1e-12)[:, None, None] * 255).round().to(torch.uint8)
        row: dict[str, Any] = {"shape": list(maps.shape[1:]), "most": [float(f"{value:.4g}") for value in most.tolist()],
                               "heat": base64.b64encode(bytes_.numpy().tobytes()).decode()}
        if isinstance(layer, DeformableAttention):
            row["points"] = [[[round(x, 1), round(y, 1), round(weight, 4), level]
                              for level, (of_level, weights) in enumerate(zip(points, of_weights))
                              for (x, y), weight in zip(of_level, weights)]
                             for points, of_weights in zip(layer.points[query].tolist(), layer.weights[query].tolist())]
        rows.append(row)
    return rows


def _in_pixels(reference: Tensor, size: tuple[int, int]) -> Tensor:
    """A point ``[2]`` or box ``[4]`` as fractions of an image -> (x, y) or corners in its pixels."""
    height, width = size
    corners = box_cxcywh_to_xyxy(reference) if len(reference) == 4 else reference
    return corners * corners.new_tensor([width, height]).repeat(len(corners) // 2)


def rounded(x: Tensor) -> Any:
    """Lists of pixels, to a hundredth."""
    return [rounded(row) for row in x] if x.ndim > 1 else [round(value, 2) for value in x.tolist()]
