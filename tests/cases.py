"""Reference cases: what the published implementations compute, given the same weights and inputs.

A case is a folder with two files:

    spec.json      what was built, which weights it had, what it was fed
    expected.npz   what it answered, float32 unless the name says otherwise

No weights are stored. Every tensor is drawn from its own name, so the same names and shapes give
the same values on every machine and with every version of NumPy and PyTorch (``RandomState``'s
streams are frozen). A case therefore proves two things at once: that a checkpoint with the
published parameter names loads strictly, and that the loaded model computes the same numbers.

    case = load_case("detr_r50")
    model.load_state_dict(case.state_dict())        # published names, published shapes
    outputs = model(case.images())
    case.expected["pred_logits"]                    # compare with these
    check(case, "pred_logits", outputs["pred_logits"])                  # or so, whole or sampled
"""
import functools
import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent / "data" / "parity"

# Parameters that are looked up or added rather than multiplied: drawn with unit scale.
EMBEDDINGS = ("query_embed", "row_embed", "col_embed", "level_embed", "tgt_embed", "refpoint_embed",
              "label_enc", "pos_embed", "cls_token", "patterns")


def draw(name, shape):
    """Standard normal values, float64, shape ``shape``, that depend on ``name`` alone."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))


def weight(name, shape):
    """The value of the parameter or buffer ``name``: float32 (int64 for BatchNorm's counter)."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.zeros(tuple(shape), dtype=torch.int64)
    x = draw(name, shape)
    if leaf == "running_var":
        x = 0.5 + 1.0 / (1.0 + np.exp(-x))                      # 0.5 to 1.5
    elif leaf == "running_mean":
        x = 0.1 * x
    elif any(e in name for e in EMBEDDINGS):
        pass                                                    # unit scale
    elif "sampling_offsets" in name:
        x = 2.0 * x if leaf == "bias" else 0.5 * x / np.sqrt(shape[-1])
    elif len(shape) >= 2:
        x = x / np.sqrt(np.prod(shape[1:]))                     # unit gain over the fan-in
    elif leaf == "weight":
        x = 1.0 + 0.1 * x                                       # a normalisation's scale
    else:
        x = 0.05 * x                                            # a bias
    return torch.from_numpy(np.ascontiguousarray(x)).float()


drawn = functools.lru_cache(maxsize=1000)(weight)               # cases share many


def state_dict(shapes, aliases=None, gains=None):
    """``{name: shape}`` -> ``{name: tensor}``. A module that has several names (a shared head) has one
    value: a name in ``aliases`` is drawn as the canonical name that ``aliases`` gives for it. ``gains``
    maps patterns to factors: a tensor is multiplied by the factor of each pattern found in its name
    (``re.search``). Drawn as they are, deep attention stacks average all tokens until every query
    answers alike, and a case would hardly notice a wrong query; a case's gains keep them apart."""
    out = {name: drawn((aliases or {}).get(name, name), tuple(shape)).clone() for name, shape in shapes.items()}
    for pattern, gain in (gains or {}).items():
        out.update({name: gain * x for name, x in out.items() if re.search(pattern, name)})
    return out


def image(name, height, width):
    """A normalised image, float32 ``[3, height, width]``: smooth blobs plus noise, named ``name``."""
    coarse = torch.from_numpy(draw(name + "/coarse", (1, 3, 8, 8))).float()
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0]
    return smooth + 0.25 * torch.from_numpy(draw(name + "/fine", (3, height, width))).float()


def targets(name, counts, num_classes, mask_size=None):
    """One target dict an image: ``labels`` int64 ``[n]`` in ``[1, num_classes)``, ``boxes`` float32
    ``[n, 4]`` normalised cxcywh inside the image and, where ``mask_size`` gives (height, width) an
    image, ``masks`` bool ``[n, height, width]`` that fill the boxes' ellipses."""
    out = []
    for i, n in enumerate(counts):
        rng = np.random.RandomState(zlib.crc32(f"{name}/targets/{i}".encode()))
        wh = rng.uniform(0.05, 0.5, (n, 2))
        cxcy = rng.uniform(wh / 2, 1 - wh / 2) if n else np.zeros((0, 2))
        target = {"labels": torch.from_numpy(rng.randint(1, num_classes, n)).long(),
                  "boxes": torch.from_numpy(np.concatenate([cxcy, wh], 1)).float()}
        if mask_size is not None:
            h, w = mask_size[i]
            y, x = np.mgrid[0:h, 0:w]
            y, x = (y[None] + 0.5) / h, (x[None] + 0.5) / w
            c, s = cxcy[:, :, None, None], wh[:, :, None, None] / 2
            target["masks"] = torch.from_numpy(((x - c[:, 0]) / s[:, 0]) ** 2 + ((y - c[:, 1]) / s[:, 1]) ** 2 <= 1)
        out.append(target)
    return out


@dataclass
class Case:
    """One folder, read. ``spec`` and ``expected`` are its two files; the rest is drawn from them."""
    name: str
    spec: dict
    expected: dict
    checked: set = field(default_factory=set)

    def state_dict(self):
        """The weights the reference model had, under its own names."""
        return state_dict(self.spec["shapes"], self.spec.get("aliases"), self.spec.get("gains"))

    def images(self):
        """List of float32 ``[3, H, W]``; sizes may differ, so a batch of them is padded."""
        return [image(f"{self.spec['seed']}/{i}", h, w) for i, (h, w) in enumerate(self.spec["image_sizes"])]

    def targets(self):
        """List of target dicts, or None where the case has none."""
        t = self.spec.get("targets")
        return t and targets(self.spec["seed"], t["counts"], t["num_classes"],
                             self.spec["image_sizes"] if t.get("masks") else None)


def load_case(name, folder=HERE):
    """Read the case ``name`` below ``folder``."""
    path = Path(folder) / name
    spec = json.loads((path / "spec.json").read_text())
    with np.load(path / "expected.npz") as f:
        return Case(name, spec, {k: torch.from_numpy(f[k]) for k in f.files})


def check(case, name, actual, atol=None, rtol=None):
    """Compare ``actual`` with all that ``case`` expects under ``name``: the array itself, or its ``.sample``, ``.mean``
    and ``.std``. The tolerance is the case's own where none is given, and without one 1e-4 of the largest magnitude;
    whole numbers and booleans are equal or wrong."""
    entries = {name + part: part for part in ("", ".sample", ".mean", ".std") if name + part in case.expected}
    if not entries:
        raise KeyError(f"{case.name} expects nothing under {name}")
    actual = torch.as_tensor(actual).detach().cpu()
    if atol is None and rtol is None:
        largest = max(case.expected[entry].double().abs().max().item() if case.expected[entry].numel() else 0.0
                      for entry in entries)
        atol, rtol = tolerance(case.spec.get("tolerance", {}), name, largest)
    for entry, part in entries.items():
        expected, value = case.expected[entry], actual
        if part == ".sample":
            of = case.spec["expected"][entry]["sample_of"]
            assert list(actual.shape) == of["shape"], f"{case.name}: {name} has the shape {list(actual.shape)}"
            value = actual.flatten()[::of["stride"]]
        elif part:
            value = actual.double().mean() if part == ".mean" else actual.double().std(correction=0)
        exact = not expected.is_floating_point()
        torch.testing.assert_close(value.to(expected.dtype), expected, atol=0 if exact else atol or 0,
                                   rtol=0 if exact else rtol or 0, msg=lambda m, e=entry: f"{case.name}: {e}: {m}")
        case.checked.add(entry)


def tolerance(spec, name, largest):
    """``(atol, rtol)`` of the array ``name`` by a case's ``tolerance``; its ``atol`` is one number, or one for each
    kind of array. ``largest`` is the array's largest magnitude."""
    if spec.get("exact"):
        return 0, 0
    atol = spec.get("atol")
    if isinstance(atol, dict):
        atol = atol.get(name, atol.get(name.rsplit(".", 1)[-1], atol["other arrays"]))
    if atol is None:
        return 1e-4 * largest, 0
    return atol, spec.get("rtol", 0)


def unchecked(case):
    """Names of expected arrays that no ``check`` has looked at; inputs are left out."""
    return [name for name in case.expected if name not in case.checked and not name.startswith("in.")]


def save_case(name, spec, expected, folder=HERE):
    """Write a case: ``expected`` maps names to tensors or arrays."""
    path = Path(folder) / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "spec.json").write_text(json.dumps(spec, indent=1) + "\n")
    arrays = {k: np.asarray(torch.as_tensor(v).detach().cpu()) for k, v in expected.items()}
    np.savez_compressed(path / "expected.npz", **arrays)
