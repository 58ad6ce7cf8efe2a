"""One training step through every family of timm's, as DETR and as Deformable DETR."""
import pytest
import torch
from small_models import NUM_CLASSES, images, targets
from test_timm import FAMILIES, ONE_SIZE

from detr import build_model
from detr.backbone import backbone_of

SMALL = {"nheads": 4, "dim_feedforward": 48, "enc_layers": 1, "dec_layers": 1, "num_queries": 7, "dropout": 0.0,
         "frozen_stages": 0, "lr_backbone": 1e-3}


def test_forty_families():
    assert len({*FAMILIES, *ONE_SIZE}) >= 40


@pytest.mark.parametrize("architecture, width", [("detr_resnet50", 32), ("deformable_detr_resnet50", 64)],
                         ids=["detr", "deformable"])
@pytest.mark.parametrize("family", [*FAMILIES, *ONE_SIZE])
@pytest.mark.filterwarnings("ignore:padding='exact' is not possible")
def test_one_training_step(family, architecture, width):
    """Finite losses, finite gradients of all parameters that train, and parameters that change: stem, backbone, heads.
    The images are of two sizes where the family takes any."""
    torch.manual_seed(0)
    model, criterion, _ = build_model(architecture, num_classes=NUM_CLASSES, backbone=f"timm/{family}",
                                      padding="exact", hidden_dim=width, **SMALL)
    model.train()
    body = backbone_of(model).body
    sizes = [body.only] * 2 if body.only else [(64, 96), (40, 33)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    outputs = model(images(*sizes))
    losses = criterion(outputs, targets(2, 3))
    loss = criterion.weighted_sum(losses)
    loss.backward()
    assert loss.isfinite() and {"loss_ce", "loss_bbox", "loss_giou"} <= losses.keys()
    without = [name for name, p in model.named_parameters()
               if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert not without, without
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    for part in ("backbone.0.body", "class_embed", "bbox_embed"):
        assert any(name.startswith(part) for name in changed), part
    assert len([name for name in changed if "body" in name]) > 0.5 * len([name for name in before if "body" in name])
