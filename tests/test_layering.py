"""Who may import whom. A file of ``detr/`` imports from lower levels alone, and files of one level do not import each
other; what a part needs from a neighbour it is handed. ``datasets/`` and ``engine.py`` know the vocabulary alone."""
import ast
from pathlib import Path

import pytest

LEVELS = [
    {"boxes", "nested_tensor", "structures", "config", "checkpoint", "distributed", "padding",         # 0: the vocabulary
     "preprocessing", "sources", "writers", "tiles", "coco_classes", "precision", "diagnosis", "collapse", "run_folder",
     "sharding", "exact_mode", "dropout", "transfer",
     "deformable_cpu", "deformable_triton", "engines"},
    {"optimization", "memory", "finetune", "mlp", "residual", "attention", "deformable_attention",
     "position_encoding", "reference_points"},
    {"backbone", "feature_levels", "encoder", "decoder", "object_queries", "two_stage", "denoising", "prediction_heads",
     "mask_head", "matcher", "losses", "set_criterion", "postprocess", "panoptic", "cuda_graphs"},
    {"focal_detectors"},
    {"architectures"},
    {"presets", "attention_maps", "visualize", "tensor_view", "inference"},
    {"settings", "logs", "attention_pictures", "compare_runs"},
    {"loading", "trial"},
    {"__init__", "export"},                                                               # see everything below
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
PROGRAM = {"datasets", "engine", "training", "main"}


def imports(path: Path, root: Path) -> set[str]:
    """The dotted names that a file imports, relative ones made absolute: ``detr.boxes.box_iou``."""
    package = path.relative_to(root).parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[:len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def part_of(name: str) -> str:
    """The part of ``detr`` behind a dotted name; what is not a file comes from ``detr/__init__.py``."""
    part = (name.split(".") + ["__init__"])[1]
    return part if part in LEVEL else "__init__"


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted([*root.glob("*.py"), *root.glob("detr/**/*.py"), *root.glob("datasets/**/*.py")]):
        file, home = path.relative_to(root), path.relative_to(root).parts[0].removesuffix(".py")
        own = Path(*file.parts[1:2]).stem if home == "detr" else ""
        if home == "detr" and own not in LEVEL:
            found.append(f"{file}: give it a level in {Path(__file__).name}")
            continue
        for name in sorted(imports(path, root)):
            top, part = name.split(".")[0], part_of(name)
            within = home == "detr" and path.name == "__init__.py" and part == own            # a package and its files
            if top == "main" and home != "main":
                found.append(f"{file} imports main; only scripts and tests may")
            elif home == "detr" and top in PROGRAM:
                found.append(f"{file} imports {name}; detr does not know the program around it")
            elif home == "detr" and top == "detr" and LEVEL[part] >= max(LEVEL[own], 1) and not within:
                found.append(f"{file} (level {LEVEL[own]}) imports {name} (level {LEVEL[part]})")
            elif home in ("datasets", "engine") and top == "detr" and LEVEL[part] > 0:
                found.append(f"{file} imports {name}; it is handed everything above the vocabulary")
    return found


def test_this_project():
    assert violations(Path(__file__).resolve().parent.parent) == []


@pytest.mark.parametrize("file, line, complaint", [
    ("detr/misc.py", "", "give it a level"),
    ("detr/boxes.py", "from .distributed import rank", None),
    ("detr/boxes.py", "from .mlp import MLP", "level 0"),
    ("detr/mlp.py", "from . import boxes", None),
    ("detr/mlp.py", "from . import attention", "level 1"),
    ("detr/matcher.py", "def f():\n    import detr.losses", "level 2"),
    ("detr/matcher.py", "from detr import build_model", "level 8"),
    ("detr/matcher.py", "from datasets.coco import CocoDetection", "does not know the program"),
    ("detr/presets.py", "import engine", "does not know the program"),
    ("detr/backbone/__init__.py", "from . import resnet", None),
    ("detr/backbone/__init__.py", "from .. import encoder", "level 2"),
    ("detr/backbone/pvt.py", "from .resnet import ResNet", "level 2"),
    ("detr/backbone/pvt.py", "from ..position_encoding import build", None),
    ("detr/architectures/dino.py", "from .deformable_detr import DeformableDETR", "level 4"),
    ("detr/architectures/dino.py", "from ..presets import PRESETS", "level 5"),
    ("detr/__init__.py", "from .presets import PRESETS", None),
    ("engine.py", "from detr import distributed", None),
    ("engine.py", "from detr.matcher import HungarianMatcher", "handed"),
    ("datasets/coco.py", "from detr import build_model", "handed"),
    ("datasets/coco.py", "import main", "only scripts"),
    ("hubconf.py", "from main import main", "only scripts"),
    ("hubconf.py", "from detr import build_model", None),
    ("main.py", "from datasets import build_dataset", None),
])
def test_what_it_finds(tmp_path, file, line, complaint):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(line)
    found = violations(tmp_path)
    assert len(found) == (complaint is not None)
    assert complaint is None or complaint in found[0]
