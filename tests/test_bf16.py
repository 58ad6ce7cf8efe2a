"""Mixed precision: what must be float32 is, and boxes and logits at the edge of what there is give finite losses and
gradients."""
import contextlib
from collections.abc import Callable

import pytest
import torch
from small_models import NUM_CLASSES, build_small, images, targets
from torch import Tensor, nn

from detr import deformable_attention, losses, matcher
from detr.boxes import refine_relative
from detr.deformable_attention import MSDeformAttn
from detr.nested_tensor import nested_tensor_from_tensor_list
from detr.reference_points import refine

MODELS = ["detr_resnet50", "deformable_detr_resnet50", "deformable_detr_resnet50_two_stage", "tiny_detr",
          "tiny_deformable_detr"]
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
B, Q = 2, 8

# Boxes (cxcywh) that data or a young model can have: tiny, the whole image, a corner, a line, beyond the image.
EXTREME = torch.tensor([[0.5, 0.5, 1e-6, 1e-6], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 1e-6, 1e-6], [1.0, 1.0, 1e-6, 1e-6],
                        [0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 1.0, 0.0], [1.01, -0.02, 0.1, 0.1], [0.5, 0.5, 1.1, 1.1]])


def extreme_targets(generator: torch.Generator, batch: int = B) -> list[dict[str, Tensor]]:
    """Up to ``Q`` extreme boxes an image, sometimes none."""
    chosen = [torch.randperm(len(EXTREME), generator=generator)[:n]
              for n in torch.randint(Q + 1, (batch,), generator=generator).tolist()]
    return [{"boxes": EXTREME[rows], "labels": torch.randint(NUM_CLASSES, (len(rows),), generator=generator)}
            for rows in chosen]


def assert_finite(values: dict[str, Tensor], gradients: list[Tensor], what: str) -> None:
    wrong = [name for name, value in values.items() if not value.isfinite().all()]
    assert not wrong and all(gradient.isfinite().all() for gradient in gradients), f"{what}: {wrong or 'gradient'}"


# -- criterion and box refinement -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, steps", [
    ("detr_resnet50", 500), ("deformable_detr_resnet50_two_stage", 250), ("tiny_detr", 250),
    *(pytest.param(name, 5000, marks=pytest.mark.slow) for name in ("detr_resnet50", "tiny_detr"))])
def test_a_thousand_steps_with_extreme_boxes(name, steps):
    """Logits of up to 80 and boxes that three layers refine, in bfloat16, by changes of up to 80."""
    _, criterion, _ = build_small(name)
    relative = name == "tiny_detr"                                          # its boxes are not held in 0..1
    classes = NUM_CLASSES + (name == "detr_resnet50")
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1e-3, 1.0, 10.0, 80.0])

    def numbers(last: int) -> Tensor:
        scale = spread[torch.randint(4, (B, Q, 1), generator=generator)]
        x = (torch.randn(B, Q, last, generator=generator) * scale).clamp(-80, 80)
        edge = torch.rand(B, Q, last, generator=generator) < 0.1
        return torch.where(edge, x.sign() * 80, x).bfloat16().requires_grad_()

    for step in range(steps):
        true = extreme_targets(generator)
        reference = EXTREME[torch.randint(len(EXTREME), (B, Q), generator=generator)]
        leaves, layers = [], []
        for _ in range(2):
            logits, delta = numbers(classes), numbers(4)
            leaves += [logits, delta]
            boxes = refine_relative(reference, delta.float().clamp(-10, 10)) if relative else refine(reference, delta)
            layers.append({"pred_logits": logits, "pred_boxes": boxes})
            reference = boxes.detach()
        outputs = {**layers[-1], "aux_outputs": layers[:1]}
        values = criterion(outputs, true)
        assert all(value.dtype == torch.float32 for value in values.values())
        assert_finite(values, torch.autograd.grad(criterion.weighted_sum(values), leaves), f"step {step}")


def test_coordinates_at_zero_and_one_in_low_precision():
    """The inverse of the sigmoid at its ends: bfloat16 knows no number between 0.996 and 1."""
    for dtype in (*LOW.values(), torch.float32):
        reference = torch.tensor([[0.0, 1.0, 1e-6, 1 - 1e-6], [0.5, 0.999, 1.0, 0.0]]).to(dtype)
        delta = torch.tensor([[80.0, -80.0, 0.0, 0.0], [-80.0, 80.0, 80.0, -80.0]]).to(dtype).requires_grad_()
        boxes = refine(reference, delta)
        boxes.float().sum().backward()
        assert boxes.isfinite().all() and delta.grad.isfinite().all() and ((boxes >= 0) & (boxes <= 1)).all()


# -- whole models -----------------------------------------------------------------------------------------------------

def train(name: str, steps: int, amp: torch.dtype, lr: float = 1e-3) -> None:
    """Steps under autocast with extreme targets; every loss and gradient is finite."""
    model, criterion, _ = build_small(name)
    model.train()
    criterion.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        shapes = [(64, 64), (int(torch.randint(32, 65, (), generator=generator)), 64)]
        contrast = 10.0 ** float(torch.randint(-3, 3, (), generator=generator))
        samples = nested_tensor_from_tensor_list([x * contrast for x in images(*shapes)])
        with torch.autocast("cpu", amp):
            outputs = model(samples)
        values = criterion(outputs, extreme_targets(generator))
        optimizer.zero_grad()
        criterion.weighted_sum(values).backward()
        assert_finite(values, [p.grad for p in model.parameters() if p.grad is not None], f"step {step}")
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*no query to match")
@pytest.mark.parametrize("name", MODELS)
def test_models_with_extreme_targets(name):
    train(name, 4, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no query to match")
@pytest.mark.parametrize("name", MODELS)
def test_models_with_extreme_targets_for_long(name):
    train(name, 1000, torch.bfloat16)


# -- what is float32 --------------------------------------------------------------------------------------------------

def watched(monkeypatch, seen: dict[str, set[torch.dtype]], module: object, name: str, which: Callable) -> None:
    """Notes the types of those arguments of ``module.name`` that ``which`` picks."""
    function = getattr(module, name)

    def wrapper(*args, **options):
        seen.setdefault(name, set()).update(x.dtype for x in which(*args, **options) if x.is_floating_point())
        return function(*args, **options)
    monkeypatch.setattr(module, name, wrapper)


@pytest.mark.parametrize("amp", LOW)
@pytest.mark.parametrize("name", MODELS)
def test_float32_where_it_matters(name, amp, monkeypatch):
    """The model computes in the lower precision; where it looks, what it is matched and judged by is in float32, even if
    somebody computes the losses under autocast, too."""
    model, criterion, _ = build_small(name)
    model.train()
    seen: dict[str, set[torch.dtype]] = {}
    watched(monkeypatch, seen, deformable_attention, "deformable_sampling", lambda _, __, at, weights, ___: (at, weights))
    watched(monkeypatch, seen, matcher, "add_box_cost", lambda *args: args[:3])
    watched(monkeypatch, seen, losses, "paired_giou", lambda a, b: (a, b))
    watched(monkeypatch, seen, losses, "sigmoid_focal_loss", lambda x, true, *_: (x, true))
    watched(monkeypatch, seen, losses.F, "cross_entropy", lambda x, *_, **__: (x,))
    watched(monkeypatch, seen, losses.F, "l1_loss", lambda a, b, **_: (a, b))
    watched(monkeypatch, seen, matcher, "linear_sum_assignment", lambda cost: (torch.from_numpy(cost),))
    low = set()
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.register_forward_pre_hook(lambda _, args: seen.setdefault("reference", set()).add(args[1].dtype))
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: low.add(output.dtype))
    samples = nested_tensor_from_tensor_list(images((64, 64), (48, 64)))
    for under in (contextlib.nullcontext(), torch.autocast("cpu", LOW[amp])):
        with torch.autocast("cpu", LOW[amp]):
            outputs = model(samples)
        with under:
            values = criterion(outputs, targets(2, 3))
        assert {value.dtype for value in values.values()} == {torch.float32}
        assert_finite(values, [], amp)
    assert low == {LOW[amp]}                                                # or nothing was shown
    expected = {"add_box_cost", "paired_giou", "l1_loss", "linear_sum_assignment",
                "cross_entropy" if name == "detr_resnet50" else "sigmoid_focal_loss"}
    if "deformable" in name:
        expected |= {"deformable_sampling", "reference"}
    assert seen == {function: {torch.float32} for function in expected}
    boxes = [outputs, *outputs["aux_outputs"], *([outputs["enc_outputs"]] if "enc_outputs" in outputs else [])]
    assert {layer["pred_boxes"].dtype for layer in boxes} == {torch.float32}
