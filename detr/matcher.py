"""Bipartite matching of queries to ground truth (Carion et al., 2020, section 3.1)."""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .boxes import NO_AREA, box_cxcywh_to_xyxy
from .structures import Match, NonFiniteError, Outputs, Target

IN_CACHE, ON_DEVICE = 2 ** 16, 2 ** 24       # costs that are computed together: of a core's cache, and to fill a GPU
WAITING = 2 ** 22                           # costs that may wait to be assigned together
WORTH_THREADS = 2 ** 16                     # costs below which threads take longer to start than to work
MANY = {True: 128, False: 8}                # queries for each object from which on most are left out: on a CPU, on others


def softmax_class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """``1 - p(class)`` without the constant: logits ``[B, Q, C + 1]``, labels ``[B, N]`` -> ``[B, Q, N]``."""
    prob = logits.softmax(-1)
    return -prob.gather(2, labels[:, None].expand(-1, prob.shape[1], -1))


def focal_class_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """What the focal loss of an object's class would change if a query took it (Zhu et al., 2021, section A.3):
    logits ``[B, Q, C]``, labels ``[B, N]`` -> ``[B, Q, N]``."""
    prob = logits.gather(2, labels[:, None].expand(-1, logits.shape[1], -1)).sigmoid()      # before logarithms are taken
    rest = 1 - prob
    return (rest + 1e-8).log() * ((1 - alpha) * prob ** gamma) - (prob + 1e-8).log() * (alpha * rest ** gamma)


def coordinates(boxes: Tensor) -> Tensor:
    """``[R, Q, 4]`` cxcywh -> ``[10, R, Q]``: centre, width and height; left, top, right and bottom; and width and height
    as these have them."""
    boxes_xyxy = box_cxcywh_to_xyxy(boxes)
    return torch.cat([boxes, boxes_xyxy, boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]], dim=-1).movedim(-1, 0).contiguous()


def add_box_cost(cost: Tensor, boxes: Tensor, true_boxes: Tensor, cost_bbox: float, cost_giou: float,
                 room: Tensor) -> None:
    """Adds ``cost_bbox * L1 - cost_giou * generalized IoU`` to ``cost [R, N, Q]`` of every object and query, whose
    ``coordinates`` are ``boxes [10, R, Q]`` and ``true_boxes [10, R, N]`` (or ``[10, 1, N]``).

    Coordinate by coordinate and in place, in the ``room [4, R * N * Q or more]``, so that nothing is larger than the
    result and what is worked on stays in the cache: fresh memory takes a CPU longer than the arithmetic. The generalized
    IoU is taken as ``inter / union + union / hull - 1``, which is the same.
    """
    cx, cy, w, h, left, top, right, bottom, width, height = boxes[:, :, None].unbind()                      # [R, 1, Q]
    tcx, tcy, tw, th, tleft, ttop, tright, tbottom, twidth, theight = true_boxes[..., None].unbind()        # [R, N, 1]
    a, b, c, d = room[:, :cost.numel()].view(4, *cost.shape)
    for x, true in ((cx, tcx), (cy, tcy), (w, tw), (h, th)):
        cost.add_(torch.sub(x, true, out=a).abs_(), alpha=cost_bbox)
    # Two sides share what lies between the later start and the earlier end, less than nothing where there is a gap; and
    # their hull is both together less what they share.
    shared_x = torch.minimum(right, tright, out=a).sub_(torch.maximum(left, tleft, out=c))
    shared_y = torch.minimum(bottom, tbottom, out=b).sub_(torch.maximum(top, ttop, out=c))
    hull = torch.sub(width, shared_x, out=c).add_(twidth).mul_(torch.sub(height, shared_y, out=d).add_(theight))
    inter = shared_x.clamp_(min=0).mul_(shared_y.clamp_(min=0))
    union = torch.sub(width * height, inter, out=d).add_(twidth * theight).clamp_(min=NO_AREA)
    cost.addcdiv_(inter, union, value=-cost_giou).addcdiv_(union, hull.clamp_(min=NO_AREA), value=-cost_giou)
    cost.add_(cost_giou)


class Problem(NamedTuple):
    """What is to be assigned in one image."""
    cost: Tensor                    # [N, Q], or [N, k] of the k cheapest queries of each object
    query: Tensor | None = None     # [N, k] which these are


class HungarianMatcher(nn.Module):
    """The one-to-one assignment of queries to objects with the least total cost, image by image.

    The cost of a pair weighs the class (``cost_class``), the L1 distance of the boxes (``cost_bbox``) and their
    generalized IoU (``cost_giou``). No gradient flows through it. The result does not depend on the other images of the
    batch.

    Of assignments that are equally cheap it is the one that SciPy takes. Where an image has very many queries for each
    object, such as the proposals of two-stage models, it may be another one of them (``candidates``).
    """

    def __init__(self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1,
                 class_cost: Callable[[Tensor, Tensor], Tensor] = softmax_class_cost) -> None:
        super().__init__()
        if cost_class == 0 and cost_bbox == 0 and cost_giou == 0:
            raise ValueError("all matching costs are 0; give --set_cost_class, --set_cost_bbox or --set_cost_giou a "
                             "weight")
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.class_cost = class_cost
        self.most = 0                                       # objects of an image of which a warning has told

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: Sequence[Target]) -> Match:
        """``pred_logits [B, Q, C(+1)]``, ``pred_boxes [B, Q, 4]``, B targets -> for each image the matched queries
        (ascending) and their objects, two int64 tensors of ``min(Q, N)``, on the CPU.

        Several decoder layers are matched at once as so many more images with the same targets: ``[K * B, Q, ...]`` and
        ``[*targets] * K``. A GPU is waited for once, however many there are.

        An image without objects matches nothing. Where an image has more objects than queries, the cheapest are matched;
        a warning counts the rest, and comes again only where an image has still more. Raises ``NonFiniteError`` where
        predictions or boxes are not numbers, those of images without objects and of classes that no object has, too.
        """
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        counts = [len(target["labels"]) for target in targets]
        finite = all_finite(logits) & all_finite(boxes)                     # a cost sees the classes of objects alone
        match: Match = [(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)) for _ in targets]
        if max(counts, default=0) == 0:
            if not finite:
                blame_non_finite(outputs, targets)
            return match
        num_classes = logits.shape[-1] - (self.class_cost is softmax_class_cost)
        if on_cpu(logits):
            check_labels(targets, num_classes)
            problems = self.problems(logits, boxes, targets, finite)
        else:                                                               # a look at labels would be a wait
            labels = torch.cat([target["labels"] for target in targets])
            finite &= ((labels >= 0) & (labels < num_classes)).all()
            problems = iter(on_host(self.problems(logits, boxes, targets, finite)))
        waiting: dict[int, Problem] = {}
        costs = 0
        for row, problem in problems:
            if problem.cost[0, 0].isnan():
                check_labels(targets, num_classes)
                blame_non_finite(outputs, targets)
            waiting[row] = problem
            costs += problem.cost.numel()
            if costs > WAITING:
                assign_all(waiting, match)
                costs = 0
        assign_all(waiting, match)
        surplus = sum(max(0, len(target["labels"]) - boxes.shape[1]) for target in {id(t): t for t in targets}.values())
        if surplus and max(counts) > self.most:
            self.most = max(counts)
            warnings.warn(f"{surplus} objects of this batch have no query to match: images have up to {max(counts)} "
                          f"objects and the model {boxes.shape[1]} queries; raise --num_queries", stacklevel=5)
        return match

    def problems(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target],
                 finite: Tensor) -> Iterator[tuple[int, Problem]]:
        """Each image that has objects, and what is to be assigned in it, on the device of ``logits``. The first cost of
        each object is NaN where not all costs are finite, or the bool tensor ``finite`` is False."""
        blocks = self.blocks_in_cache if on_cpu(logits) else self.blocks_on_device
        for rows, cost in blocks(logits, coordinates(boxes), targets):
            finite = finite & all_finite(cost)
            many = cost.shape[2] >= MANY[on_cpu(cost)] * cost.shape[1]
            values, query = candidates(cost) if many else (cost, None)
            values[..., :1].masked_fill_(~finite, torch.nan)
            for i, row in enumerate(rows):
                if n := len(targets[row]["labels"]):
                    yield row, Problem(values[i, :n], None if query is None else query[i, :n])

    def blocks_in_cache(self, logits: Tensor, boxes: Tensor,
                        targets: Sequence[Target]) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Costs ``[R, N, Q]`` of R layers of one image at a time: without padding, and each class once."""
        layers: dict[int, list[int]] = {}
        for row, target in enumerate(targets):
            layers.setdefault(id(target), []).append(row)
        size = IN_CACHE * torch.get_num_threads()
        room = boxes.new_empty(4, max(size, sum(len(target["labels"]) for target in targets)))
        for of_image in layers.values():
            target = targets[of_image[0]]
            labels, kind = target["labels"].unique(return_inverse=True)
            true_boxes = coordinates(target["boxes"][None])
            if len(kind) == 0:
                continue
            step = max(1, size // (len(kind) * logits.shape[1]))
            for i in range(0, len(of_image), step):
                rows = of_image[i:i + step]
                part = slice(rows[0], rows[0] + 1) if len(rows) == 1 else rows                  # of one row, no copy
                of_class = self.class_cost(logits[part], labels.expand(len(rows), -1)).mT * self.cost_class
                yield rows, self.with_boxes(of_class.index_select(1, kind), boxes[:, part], true_boxes, room)

    def blocks_on_device(self, logits: Tensor, boxes: Tensor,
                         targets: Sequence[Target]) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Costs ``[R, N, Q]`` of R images at a time, padded to the largest number of objects among them."""
        most = max(len(target["labels"]) for target in targets)
        step = min(len(targets), max(1, ON_DEVICE // (most * logits.shape[1])))
        room = boxes.new_empty(4, max(most, min(ON_DEVICE, step * most * logits.shape[1])))
        for i in range(0, len(targets), step):
            rows = range(i, min(i + step, len(targets)))
            labels = pad_sequence([targets[row]["labels"] for row in rows], batch_first=True)
            if labels.shape[1] == 0:
                continue
            true_boxes = pad_sequence([targets[row]["boxes"] for row in rows], batch_first=True)
            labels = labels.clamp(0, logits.shape[-1] - 1)                  # those out of range are told of later
            of_class = self.class_cost(logits[i:i + step], labels).mT.contiguous() * self.cost_class
            yield rows, self.with_boxes(of_class, boxes[:, i:i + step], coordinates(true_boxes), room)

    def with_boxes(self, cost: Tensor, boxes: Tensor, true_boxes: Tensor, room: Tensor) -> Tensor:
        """Adds the cost of boxes to ``cost [R, N, Q]``, of as many queries at a time as fit."""
        step = max(1, room.shape[1] // (cost.shape[0] * cost.shape[1]))
        for i in range(0, cost.shape[2], step):
            part = slice(i, i + step)
            add_box_cost(cost[..., part], boxes[..., part], true_boxes, self.cost_bbox, self.cost_giou, room)
        return cost


def on_cpu(x: Tensor) -> bool:
    """Whether costs are worked out in the processor's cache; tests have a GPU's way taken here, too."""
    return x.device.type == "cpu"


def all_finite(x: Tensor) -> Tensor:
    """Whether all of ``x`` are numbers: bool ``[]`` on its device."""
    if x.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=x.device)
    low, high = x.aminmax()                                     # one pass, and NaN is both
    return low.isfinite() & high.isfinite()


def candidates(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The N cheapest queries of each of N objects: ``[R, N, Q]`` -> their costs and which they are, ``[R, N, N]``.

    An assignment of least cost needs no others. If an object has one that is not among its N cheapest, the other N - 1
    objects leave one of these free, and to take that instead costs no more.
    """
    return cost.topk(cost.shape[1], dim=2, largest=False, sorted=False)


def on_host(problems: Iterable[tuple[int, Problem]]) -> list[tuple[int, Problem]]:
    """The same on the CPU, by one copy: nothing before it waits for the device."""
    rows, given = zip(*problems)
    tensors = [x if x.is_floating_point() else x.int() for problem in given for x in problem if x is not None]
    words = torch.cat([x.flatten().view(torch.int32) for x in tensors])
    words = torch.empty(words.shape, dtype=torch.int32, pin_memory=words.is_cuda).copy_(words)
    sizes = [x.numel() for x in tensors]
    parts = iter([part.view(x.dtype).view(x.shape) for part, x in zip(words.split(sizes), tensors)])
    return [(row, Problem(next(parts), None if problem.query is None else next(parts)))
            for row, problem in zip(rows, given)]


def assign_all(waiting: dict[int, Problem], match: Match) -> None:
    """Moves what is ``waiting`` to ``match``, in as many threads as PyTorch may use: SciPy lets others run beside it."""
    threads = min(torch.get_num_threads(), len(waiting))
    if threads > 1 and sum(problem.cost.numel() for problem in waiting.values()) > WORTH_THREADS:
        with ThreadPoolExecutor(threads) as pool:
            pairs = list(pool.map(assign, waiting.values()))
    else:
        pairs = [assign(problem) for problem in waiting.values()]
    for row, (query, obj) in zip(waiting, pairs):
        match[row] = torch.as_tensor(query), torch.as_tensor(obj)
    waiting.clear()


def assign(problem: Problem) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Queries (ascending) and their objects."""
    cost = problem.cost.numpy()
    if problem.query is None:
        return assign_dense(cost)
    queries, column = np.unique(problem.query.numpy(), return_inverse=True)
    dense = np.full((len(cost), len(queries)), np.inf, dtype=cost.dtype)            # not a candidate: not to be taken
    np.put_along_axis(dense, column.reshape(cost.shape), cost, axis=1)
    query, obj = assign_dense(dense)
    return queries[query].astype(np.int64), obj


def assign_dense(cost: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``[N, Q]`` -> queries (ascending) and their objects. SciPy gets the side with fewer in rows, as it would turn them
    itself, and queries where there are as many: so ties end as with ``[Q, N]``."""
    if cost.shape[0] >= cost.shape[1]:
        return linear_sum_assignment(cost.T)
    obj, query = linear_sum_assignment(cost)
    order = query.argsort()
    return query[order], obj[order]


def check_labels(targets: Sequence[Target], num_classes: int) -> None:
    """Labels index logits: one out of range is "no object", or an unreadable fault on a GPU, so it is named here."""
    low, high = torch.cat([target["labels"] for target in targets]).aminmax()
    if low >= 0 and high < num_classes:
        return
    for i, target in enumerate(targets):
        wrong = [label for label in target["labels"].unique().tolist() if not 0 <= label < num_classes]
        if wrong:
            where = f"image_id {int(target['image_id'])}" if "image_id" in target else f"image {i} of the batch"
            raise ValueError(f"{where} has the labels {wrong}, and the model's classes are 0 to {num_classes - 1}; "
                             f"build it with num_classes above the largest label, and count labels from 0")


def blame_non_finite(outputs: Outputs, targets: Sequence[Target]) -> None:
    """Raise a ``NonFiniteError`` that names the tensors and images whose values are not numbers."""
    tensors: dict[str, Any] = {"pred_logits": outputs["pred_logits"], "pred_boxes": outputs["pred_boxes"],
                               "target boxes": [target["boxes"] for target in targets]}
    found = []
    for name, of_images in tensors.items():
        bad = [i for i, x in enumerate(of_images) if not x.isfinite().all()]
        if bad:
            alone = f"image {bad[0]}" if len(bad) == 1 else f"images {', '.join(map(str, bad))}"
            found.append(f"{name} of {alone if len(bad) < len(of_images) or len(bad) < 3 else f'all {len(bad)} images'}")
    raise NonFiniteError("not finite: " + (", ".join(found) or "the matching cost"))
