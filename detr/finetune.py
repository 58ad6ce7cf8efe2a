"""Fine-tuning: a checkpoint's weights in a model for other classes or another number of queries, and parts of a model
that stay as they are.

Which tensors have a row for each class, and which for each query, is seen from the architecture: it is built with one
class more, and with one query more, and what grows has them. Nothing here knows a tensor's name in advance. What an
architecture has to tell is in its attribute ``class_agnostic_head``: the class head whose row 0 stands for any object,
whatever the classes are.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint, config, distributed
from .nested_tensor import NestedTensor
from .structures import Category

Build = Callable[[int, int], nn.Module]
"""Number of classes, number of queries -> a model of the architecture at hand."""

NOISE = 0.1                     # of queries that are copies of others, as a part of the queries' standard deviation
DETECTOR = "detr."              # before all names of the detector inside a mask model
MORE_ROWS = {"label_enc": '"unknown"'}      # what the rows after those of classes are, if not "no object"


# What belongs to classes and to queries.

class Axis(NamedTuple):
    """Where a tensor has its rows, one for each class (query), and how many more come after them: "no object" of
    softmax models."""
    dim: int
    extra: int

    def count(self, tensor: Any) -> int:
        """For how many classes (queries) ``tensor`` has rows."""
        return tensor.shape[self.dim] - self.extra


class Layout(NamedTuple):
    """By their names, the tensors of an architecture that have rows for classes and for queries, and the names of those
    whose row 0 stands for any object."""
    classes: dict[str, Axis]
    queries: dict[str, Axis]
    agnostic: set[str]


def layout(build: Build) -> Layout:
    """The layout of what ``build`` makes, found without computing anything. Raises ValueError naming a tensor that grows
    otherwise than by one row."""
    classes, queries = 5, 7
    with torch.device("meta"):
        model, more_classes, more_queries = (build(*n) for n in ((classes, queries), (classes + 1, queries),
                                                                 (classes, queries + 1)))
    heads = [getattr(module, "class_agnostic_head", None) for module in model.modules()]
    agnostic = {id(parameter) for head in heads if head is not None for parameter in head.parameters()}
    return Layout(growing(model, more_classes, classes, "class"), growing(model, more_queries, queries, "query"),
                  {name for name, value in model.state_dict(keep_vars=True).items() if id(value) in agnostic})


def growing(model: nn.Module, larger: nn.Module, count: int, what: str) -> dict[str, Axis]:
    """The tensors of ``model``, built for ``count``, that have a row more in ``larger``, built for one more."""
    axes, after = {}, larger.state_dict()
    for name, value in model.state_dict().items():
        dims = [dim for dim, (a, b) in enumerate(zip(value.shape, after[name].shape)) if a != b]
        if dims:
            axes[name] = Axis(dims[0], value.shape[dims[0]] - count)
            if len(dims) > 1 or after[name].shape[dims[0]] != value.shape[dims[0]] + 1 or axes[name].extra < 0:
                raise ValueError(f"{name} is {list(value.shape)}, and {list(after[name].shape)} with one {what} more: a "
                                 f"checkpoint can be fitted where a {what} is one row; --resume takes it as it is")
    return axes


class Counts(NamedTuple):
    """For how many classes and queries a checkpoint was made; ``queries`` is None where these are not learned, but begin
    at proposals, so that any number fits."""
    classes: int
    queries: int | None


def counts(shape: Layout, state_dict: Mapping[str, Any], source: str) -> Counts:
    """The numbers that the tensors of ``state_dict``, a detector's or a mask model's, tell of. ``source`` names it in
    messages. Raises ValueError where they disagree, or are of another architecture than ``shape``."""
    given = _named_like([*shape.classes], state_dict)

    def count(axes: dict[str, Axis], what: str) -> int | None:
        there = {name: axis.count(given[name]) for name, axis in axes.items()
                 if getattr(given.get(name), "ndim", -1) > axis.dim}
        if len(set(there.values())) > 1:
            raise ValueError(f"{source} is not whole: its tensors are for different numbers of {what}: "
                             + ", ".join(f"{name} for {n}" for name, n in there.items()))
        if axes and (not there or min(there.values()) < 1):
            raise ValueError(f"{source} has no {next(iter(axes))} of a size that tells of {what}: it is not a checkpoint "
                             f"of this architecture; name the right one with --model")
        return next(iter(there.values()), None)

    return Counts(count(shape.classes, "classes") or 0, count(shape.queries, "queries"))


def _named_like(names: Sequence[str], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` with names like ``names``: of a box model's checkpoint for a mask model, which has the detector
    under ``detr.``, and the other way round."""
    if not any(name.startswith(DETECTOR) for name in state_dict):
        return {DETECTOR * any(n.startswith(DETECTOR) for n in names) + name: value for name, value in state_dict.items()}
    if not any(name.startswith(DETECTOR) for name in names):
        return {name.removeprefix(DETECTOR): value for name, value in state_dict.items()}
    return dict(state_dict)


# Classes by name.

class Classes(NamedTuple):
    """Which classes keep their weights."""
    kept: dict[int, int]            # new label -> old label
    notes: list[str]                # what there is to say of it


def match_classes(old: Sequence[Category], new: Sequence[Category]) -> Classes:
    """Classes of the same name. Those that are written alike but for case, ``_``, ``-`` and spaces match where no other
    comes into question, and are said. Raises ValueError naming those of which it cannot be told."""
    kept: dict[int, int] = {}
    notes = []
    for exact in (True, False):
        left, right = ([c for c in table if c.label not in done]
                       for table, done in ((old, set(kept.values())), (new, set(kept))))
        for key in dict.fromkeys(c.name if exact else spelled(c.name) for c in right):
            before, after = ([c for c in some if (c.name if exact else spelled(c.name)) == key]
                             for some in (left, right))
            if len(before) > 1 or before and len(after) > 1:
                raise ValueError(f"which class is which? The data has {_quoted(after)}, the checkpoint "
                                 f"{_quoted(before)}: give one class of the data exactly the checkpoint's name, and "
                                 f"others names unlike it")
            if before:
                kept[after[0].label] = before[0].label
                if not exact:
                    notes.append(f"class {_quoted(after)} takes the weights of {_quoted(before)}, which is written "
                                 f"otherwise; give it another name if it is another class")
    fresh = [c.name for c in new if c.label not in kept]
    gone = [c.name for c in old if c.label not in kept.values()]
    notes.insert(0, f"classes: {len(kept)} of {len(new)} keep their weights"
                 + "".join(f"; {len(names)} {what}: {_listed(names)}" for names, what in
                           (([c.name for c in new if c.label in kept], "kept"), (fresh, "new"), (gone, "left out"))
                           if names))
    return Classes(kept, notes)


def spelled(name: str) -> str:
    """A name as it is compared where it is not exactly another's: ``Traffic_Light`` -> ``traffic light``."""
    return " ".join(re.sub(r"[\s_-]+", " ", name.casefold()).split())


def _quoted(categories: Iterable[Category]) -> str:
    return " and ".join(f"{c.name!r} (id {c.id})" for c in categories)


def _listed(names: Sequence[str]) -> str:
    """The first eight names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# A checkpoint for another model.

ACTIONS = ("loaded", "resized", "new", "left out")


class Row(NamedTuple):
    """What became of a tensor."""
    name: str
    action: str                     # one of ACTIONS
    why: str = ""


class Adapted(NamedTuple):
    """A checkpoint's weights, as another model takes them."""
    state_dict: dict[str, Tensor]       # all that the model has, and no more
    rows: list[Row]                     # one for each tensor of the model, and for each that is left out
    notes: list[str]                    # what there is to say of classes


def adapt(shape: Layout, model: nn.Module, state_dict: Mapping[str, Any], old: Sequence[Category],
          new: Sequence[Category], source: str, *, usage: Tensor | None = None, seed: int = 0) -> Adapted:
    """The weights of a checkpoint for ``model``, which has other classes, or another number of queries.

    ``model``, of layout ``shape``, is built for the new data and has its first weights; ``old`` and ``new`` are the class
    tables of checkpoint and data, ``old`` empty where nobody knows it; ``source`` names the checkpoint in messages.
    ``model`` itself is not changed: ``checkpoint.load_model(model, adapted.state_dict, source)`` does that.

    - Classes of the same name (``match_classes``) keep their rows, in all tensors that have rows for classes; others
      begin as ``model`` has them. "No object" stays, and so does "unknown", the last row of the table that denoising
      queries begin with. A label that neither table uses keeps its row, too, so that the same classes give the same
      weights.
    - Row 0 of a ``class_agnostic_head`` stays row 0. Where decoder layers share that head, it is what the class of label
      0 begins with, whatever its name: good proposals matter to all classes.
    - More queries: the old ones, then copies of them in turn, with noise of a tenth of their standard deviation, drawn
      with ``seed``. Fewer: the most used by ``usage [Q]`` (``query_usage``) in their old order; without it the first.
    - A box model's checkpoint in a mask model leaves the mask head as it begins; a mask model's in a box model leaves
      its mask head out. So it is with the table that denoising queries begin with.

    All other tensors have to be there, in the model's shape; what does not fit is a ValueError that names them.
    """
    fresh = model.state_dict()
    given = _named_like([*fresh], state_dict)
    refuse_misfits(model, given, state_dict, shape, source)
    before, after = counts(shape, given, source), counts(shape, fresh, "the model")
    kept, classes, notes = rows_of_classes(old, new, before.classes, after.classes, source)
    chosen, queries = rows_of_queries(before.queries, after.queries, usage)
    if shape.agnostic >= shape.classes.keys() and kept.get(0) != 0:             # no class head that is not the proposals'
        notes += [f"class {c.name!r}, label 0, begins with the row that scores proposals, since one head does both here"
                  for c in new if c.label == 0]

    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, Row] = {}
    adapted: dict[str, Tensor] = {}
    for names in twins(model):
        there = [name for name in names if name in given]
        name, begun = names[0], fresh[names[0]]
        if there:
            value, action, why = given[there[0]], "loaded", ""
        else:
            value, action = begun, "new"
            why = ("counts batches" if _counts_batches(name) else "the checkpoint's model did not denoise"
                   if _of_denoising(name) else "the checkpoint has no mask head")
        if name in shape.queries and queries:
            value = resize_queries(value.to(begun), shape.queries[name], chosen, before.queries or 0, generator)
            action, why = "resized", queries
        if name in shape.classes and there:
            axis, any_object = shape.classes[name], name in shape.agnostic
            stays = MORE_ROWS.get(name.removesuffix(".weight").removeprefix(DETECTOR), '"no object"')
            taken = kept | {after.classes + i: before.classes + i for i in range(axis.extra)}
            if any_object:
                taken[0] = 0
            if before.classes != after.classes or any(taken.get(i) != i for i in range(begun.shape[axis.dim])):
                value = resize_classes(value.to(begun), begun, axis.dim, taken)
                action, why = "resized", classes + (", row 0 stays any object" if any_object else
                                                    f", {stays} stays" if axis.extra else "")
        for name in names:                                      # a file may have a shared tensor once
            adapted[name] = value
            rows[name] = Row(name, action, why or (f"one with {there[0]}" if name not in there else ""))
    left_out = [Row(name, "left out", "counts batches, which frozen norms do not" if _counts_batches(name) else
                    "the model does not denoise" if _of_denoising(name) else "the model has no mask head")
                for name in given if name not in fresh]
    return Adapted({name: adapted[name] for name in fresh}, [*(rows[name] for name in fresh), *left_out], notes)


def twins(model: nn.Module) -> list[list[str]]:
    """The tensors of ``model``, each by all names that it has in the state dict."""
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    return list(names.values())


def refuse_misfits(model: nn.Module, given: Mapping[str, Any], state_dict: Mapping[str, Any], shape: Layout,
                   source: str) -> None:
    """ValueError for what neither loads nor may be resized, new or left out: everything is named."""
    fresh, found = model.state_dict(), []
    masks, had_masks = (any(name.startswith(DETECTOR) for name in names) for names in (fresh, state_dict))
    kin = {name: names for names in twins(model) for name in names}
    missing = [name for name in fresh if not any(twin in given for twin in kin[name])
               and not (_counts_batches(name) or _of_denoising(name))
               and (name.startswith(DETECTOR) or not masks or had_masks)]
    unexpected = [name for name in given if name not in fresh and not (_counts_batches(name) or _of_denoising(name))
                  and (masks or not had_masks or DETECTOR + name in state_dict)]
    wrong = []
    for name in fresh.keys() & given.keys():
        theirs, ours = (list(getattr(value, "shape", [])) for value in (given[name], fresh[name]))
        resizable = {axes[name].dim for axes in (shape.classes, shape.queries) if name in axes}
        if len(theirs) != len(ours) or any(a != b for i, (a, b) in enumerate(zip(theirs, ours)) if i not in resizable):
            wrong.append(f"{name} {theirs} for {ours}")
    other = [f"{twin} and {name}" for name in given if name in kin for twin in kin[name][:1]
             if twin != name and twin in given and not torch.equal(given[twin], given[name])]
    for names, what in ((missing, "missing"), (unexpected, "unexpected"), (sorted(wrong), "of another shape"),
                        (other, "different, though one in the model")):
        if names:
            found.append(f"{len(names)} {what} ({_listed(names)})")
    if found:
        raise ValueError(f"{source} does not fit the model: {'; '.join(found)}. Classes, --num_queries, --masks and "
                         f"--denoising may be others than the checkpoint's; the rest has to be as it was trained: leave "
                         f"out the flags that change it, or name the right --model")


def _of_denoising(name: str) -> bool:
    """Whether a tensor is what denoising queries start with, of which detection needs nothing."""
    return name.removeprefix(DETECTOR) == "label_enc.weight"


def _counts_batches(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


def rows_of_classes(old: Sequence[Category], new: Sequence[Category], before: int, after: int,
                    source: str) -> tuple[dict[int, int], str, list[str]]:
    """Rows of class heads for ``after`` classes, and those for ``before`` that they come from; what is done, in few words
    and in more."""
    for table, count, of in ((old, before, source), (new, after, "the data")):
        if table and max(c.label for c in table) >= count:
            raise ValueError(f"{of} has a class of label {max(c.label for c in table)}, and its model rows for 0 to "
                             f"{count - 1}: give the class table that belongs to it")
    if not old:
        return {}, f"{before} -> {after} classes, all new", [
            f"{source} has no class table, so nobody knows what its rows are: all classes begin anew"]
    kept, notes = match_classes(old, new)
    unused = set(range(min(before, after))) - {c.label for c in [*old, *new]}
    return (kept | {label: label for label in unused}, f"{before} -> {after} classes, {len(kept)} of them by name", notes)


def rows_of_queries(before: int | None, after: int | None, usage: Tensor | None) -> tuple[Tensor, str]:
    """The old query that each of ``after`` new ones comes from, and what is done, in words; none where their number
    stays."""
    if before is None or after is None or before == after:
        return torch.arange(after or 0), ""
    if after > before:
        return torch.arange(after) % before, f"{before} -> {after} queries: the old ones, then copies with noise"
    if usage is None:
        return torch.arange(after), f"{before} -> {after} queries: the first, as nobody knows their usage"
    if usage.numel() and usage.numel() % before == 0:                   # with patterns, several queries share an anchor
        usage = usage.view(-1, before).sum(0)
    if usage.shape != (before,):
        raise ValueError(f"usage is {list(usage.shape)}, and the checkpoint has {before} queries: one number for each is "
                         f"needed")
    most = usage.argsort(descending=True, stable=True)[:after].cpu()
    return most.sort().values, f"{before} -> {after} queries: the most used"


def resize_queries(value: Tensor, axis: Axis, chosen: Tensor, before: int, generator: torch.Generator) -> Tensor:
    """``value``, of ``before`` queries, for the ``chosen`` ones; those after the first ``before`` are copies, and get
    noise. A single query has the deviation of its numbers from each other."""
    queries = value.narrow(axis.dim, 0, before)
    result = queries.index_select(axis.dim, chosen.to(value.device))
    more = len(chosen) - before
    if more > 0:
        spread = queries.std(axis.dim, correction=0, keepdim=True) if before > 1 else queries.std(correction=0)
        copies = result.narrow(axis.dim, before, more)
        copies += NOISE * spread * torch.randn(copies.shape, generator=generator).to(copies)
    return torch.cat([result, value.narrow(axis.dim, before, axis.extra)], axis.dim)


def resize_classes(value: Tensor, fresh: Tensor, dim: int, taken: Mapping[int, int]) -> Tensor:
    """``fresh`` with the rows of ``value`` that are ``taken``: new row -> old row."""
    to, of = (torch.tensor([*rows], dtype=torch.int64, device=fresh.device) for rows in (taken, taken.values()))
    return fresh.index_copy(dim, to, value.index_select(dim, of))


def table(rows: Sequence[Row]) -> str:
    """What became of each tensor, a line for all below one prefix of which the same is to be said, and the sums."""
    lines = [(name, str(len(some)), some[0].action, some[0].why) for name, some in grouped(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    text = [f"{name:{widths[0]}}  {count:>{widths[1]}}  {action:{widths[2]}}  {why}".rstrip()
            for name, count, action, why in lines]
    sums = (f"{sum(row.action == action for row in rows)} {action}" for action in ACTIONS)
    return "\n".join([*text, f"tensors: {', '.join(sums)}"])


def grouped(rows: Sequence[Row], prefix: str = "") -> list[tuple[str, list[Row]]]:
    """Rows of which the same is to be said, under the shortest prefix that they have for themselves; numbered neighbours
    (layers) together."""
    def same(some: Sequence[Row]) -> bool:
        return len({(row.action, row.why) for row in some}) == 1

    if same(rows):
        return [(rows[0].name if len(rows) == 1 else f"{prefix}*", list(rows))]
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.name.removeprefix(prefix).partition(".")[0], []).append(row)
    runs: list[list[str]] = []
    for part, some in parts.items():
        last = parts[runs[-1][-1]] if runs else []
        if last and part.isdigit() and runs[-1][-1].isdigit() and same([*last, *some]):
            runs[-1].append(part)
        else:
            runs.append([part])
    found = []
    for run in runs:
        if len(run) == 1:
            found += grouped(parts[run[0]], f"{prefix}{run[0]}.")
        else:
            found.append((f"{prefix}{run[0]}..{run[-1]}.*", [row for part in run for row in parts[part]]))
    return found


# How much queries are used.

def detector(build: Build, shape: Layout, state_dict: Mapping[str, Any], source: str) -> nn.Module:
    """The detector of a checkpoint as it was trained, without its mask head: for ``query_usage``. No randomness is used
    up. Raises ValueError where it does not fit what ``build``, of that ``shape``, makes."""
    before = counts(shape, state_dict, source)
    with torch.random.fork_rng(devices=[]):
        model = build(before.classes, before.queries or 1)
    model = getattr(model, "detr", model)
    weights = {name.removeprefix(DETECTOR): value for name, value in state_dict.items() if name.startswith(DETECTOR)}
    fresh = model.state_dict()
    given = {name: value for name, value in (weights or state_dict).items() if name in fresh or not _of_denoising(name)}
    begun = {name: value for name, value in fresh.items() if _of_denoising(name) and name not in given}
    checkpoint.load_model(model, given | begun, source)
    return model


@torch.no_grad()
def query_usage(model: nn.Module, batches: Iterable[tuple[NestedTensor, Any]], num_classes: int) -> Tensor:
    """How much ``model`` uses each of its queries: the probability of a query's best class, summed over the images of
    ``batches`` (images, targets) of all processes: ``[Q]``, on the CPU. "No object", which softmax models score after
    ``num_classes`` classes, is none of them. The model works as in evaluation, and is afterwards as it was."""
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    usage: Tensor | None = None
    try:
        model.eval()
        for samples, _ in batches:
            logits = model(samples.to(device))["pred_logits"].float()
            prob = logits.softmax(-1)[..., :num_classes] if logits.shape[-1] > num_classes else logits.sigmoid()
            used = prob.amax(-1).sum(0)                                                         # [Q]
            usage = used if usage is None else usage + used
    finally:
        for module in training:
            module.training = True
    if usage is None:
        raise ValueError("there are no images to see which queries are used; give at least one batch")
    return distributed.sum_over_processes(usage).cpu()


# Parts that stay as they are.

PARTS = ("backbone", "encoder", "decoder", "input_proj", "queries", "class_heads", "box_heads")
# What the parts of a model are called, beside the beginnings of their names. A decoder's heads are not part of it.
WORDS = {
    "encoder": r"transformer\.encoder\.",
    "decoder": r"transformer\.decoder\.(?!class_embed|bbox_embed|heads).",
    "queries": r"(query_embed|refpoint_embed|patterns_embed|(transformer\.)?tgt_embed|transformer\.patterns)\.",
    "class_heads": r"(.+\.)?(enc_out_)?class_embed\.",
    "box_heads": r"(.+\.)?(enc_out_)?bbox_embed\.",
}


class Frozen(NamedTuple):
    """What stays as it is."""
    names: list[str]                # of the parameters
    modules: list[nn.Module]        # that are to work as in evaluation


def freeze(model: nn.Module, parts: Sequence[str]) -> Frozen:
    """Fix the ``parts``: their parameters get no gradient, so that neither an optimizer nor weight decay touches them.
    Their modules are returned, to be set to ``eval()`` after each ``model.train()``: batch norms keep their statistics,
    and nothing is dropped, so that the parts that train see what they will see then.

    A part is a word, ``backbone``, ``encoder``, ``decoder``, ``input_proj``, ``queries``, ``class_heads``,
    ``box_heads``, or the beginning of parameters' names up to a dot, ``backbone.0.body.layer1``; one string may have
    several, with commas. As with the learning rate, learned positions are the backbone's; heads are not the decoder's.
    Raises ValueError for a part that the model does not have, and where nothing would train; the model is then as it
    was.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))

    def meant(part: str, name: str) -> bool:
        pattern = WORDS.get(part, re.escape(part) + r"\.")
        return any(re.match(pattern, f"{one}.") for one in (name, name.removeprefix(DETECTOR)))

    chosen: set[int] = set()
    held: dict[int, nn.Module] = {}
    for part in (part.strip().rstrip(".") for several in parts for part in several.split(",")):
        found = {id(value) for name, value in tensors.items() if meant(part, name)}
        if not found:
            words = [word for word in PARTS if any(meant(word, name) for name in tensors)]
            names = dict.fromkeys([*words, *(name.removeprefix(DETECTOR) for name in [*modules, *tensors] if name)])
            raise ValueError(f"--freeze {part}: this model has no {part}; it has {', '.join(words)}" if part in PARTS else
                             f"--freeze {part}: this model has nothing of that name{config.nearest(part, names)}")
        chosen |= found
        held |= {id(module): module for name, module in modules.items() if name and meant(part, name)}
    if all(id(parameter) in chosen or not parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--freeze {','.join(parts)}: nothing is left to train; leave a part out")
    frozen = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    return Frozen([*frozen], [*held.values()])
