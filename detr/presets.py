"""Models by name: configuration, recipe, and where published weights are. Data, no code."""
from __future__ import annotations

from dataclasses import dataclass, replace

from .architectures.conditional_detr import ConditionalDETRConfig
from .architectures.dab_deformable_detr import DABDeformableDETRConfig
from .architectures.dab_detr import DABDETRConfig
from .architectures.deformable_detr import DeformableDETRConfig
from .architectures.detr import DETRConfig
from .architectures.dino import DINOConfig
from .architectures.proposal_detr import ProposalDETRConfig
from .config import DataConfig, ModelConfig, TrainConfig

# The first that has a flag says its default in --help: Deformable DETR, that --denoising is off.
ARCHITECTURES: tuple[type[ModelConfig], ...] = (DETRConfig, DeformableDETRConfig, ConditionalDETRConfig, DABDETRConfig,
                                                DABDeformableDETRConfig, DINOConfig, ProposalDETRConfig)
DETR_URL = "https://dl.fbaipublicfiles.com/detr/"
DEFORMABLE_PAGE = "https://drive.google.com/file/d/"
DEFORMABLE_RECIPE = TrainConfig(lr=2e-4, lr_batch=32, epochs=50, lr_drop=40)           # Zhu et al., 2021, section 5
SHORT_RECIPE = TrainConfig(epochs=50, lr_drop=40)       # Meng et al., 2021, section 4.1; Liu et al., 2022, section 5.1
# Zhang et al., 2023, section 4 and its published configuration; longer trainings drop the learning rate later.
DINO_RECIPES = {"": TrainConfig(epochs=12, lr_drop=11), "_24ep": TrainConfig(epochs=24, lr_drop=20),
                "_36ep": TrainConfig(epochs=36, lr_drop=30)}
# Wang et al., 2021, section 5.3 and its published configuration: nothing frozen, random flip and scale, no crop. Batches
# need no sides that divide by 32, since padding is exact.
PVT_RECIPE = TrainConfig(epochs=50, lr_drop=33)
PVT_DATA = DataConfig(random_crop=False, least_scale=0.8)
PVTS = ("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large", "pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2", "pvt_v2_b2_li",
        "pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5")
# Ours, for a CPU: learns from random weights.
TINY_RECIPE = TrainConfig(lr=2e-3, batch_size=16, epochs=13, lr_schedule="cosine", warmup_steps=100, ema_decay=0.998,
                          amp="auto", eval_every=4, loss_normalizer="global")
# For queries that have to find their places in one map, which takes many steps.
DENSE_RECIPE = replace(TINY_RECIPE, lr=5e-4, batch_size=4, lr_batch=4, epochs=50)
TINY_DATA = DataConfig(image_size="160x160", multi_scale=False, random_crop=False, ignore_regions="on")


@dataclass(frozen=True)
class Preset:
    """Architecture, recipe and data pipeline; ``num_classes`` is what it has without data, which is that of the
    published weights where there are some: at ``url``, or behind a ``page`` that serves them to browsers alone."""
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    num_classes: int = 91
    url: str | None = None
    page: str | None = None


PRESETS: dict[str, Preset] = {
    "detr_resnet50": Preset(DETRConfig(), url=DETR_URL + "detr-r50-e632da11.pth"),
    "detr_resnet50_dc5": Preset(DETRConfig(dilation=True), url=DETR_URL + "detr-r50-dc5-f0fb7ef5.pth"),
    "detr_resnet101": Preset(DETRConfig(backbone="resnet101"), url=DETR_URL + "detr-r101-2c7b67e5.pth"),
    "detr_resnet101_dc5": Preset(DETRConfig(backbone="resnet101", dilation=True),
                                 url=DETR_URL + "detr-r101-dc5-a2e86def.pth"),
    "detr_resnet50_panoptic": Preset(DETRConfig(masks=True), num_classes=250,
                                     url=DETR_URL + "detr-r50-panoptic-00ce5173.pth"),
    "detr_resnet50_dc5_panoptic": Preset(DETRConfig(dilation=True, masks=True), num_classes=250,
                                         url=DETR_URL + "detr-r50-dc5-panoptic-da08f1b1.pth"),
    "detr_resnet101_panoptic": Preset(DETRConfig(backbone="resnet101", masks=True), num_classes=250,
                                      url=DETR_URL + "detr-r101-panoptic-40021d53.pth"),
    "deformable_detr_resnet50": Preset(DeformableDETRConfig(), DEFORMABLE_RECIPE,
                                       page=DEFORMABLE_PAGE + "1nDWZWHuRwtwGden77NLM9JoWe-YisJnA/view"),
    "deformable_detr_resnet50_single_scale": Preset(DeformableDETRConfig(num_feature_levels=1), DEFORMABLE_RECIPE,
                                                    page=DEFORMABLE_PAGE + "1WEjQ9_FgfI5sw5OZZ4ix-OKk-IJ_-SDU/view"),
    "deformable_detr_resnet50_single_scale_dc5": Preset(DeformableDETRConfig(num_feature_levels=1, dilation=True),
                                                        DEFORMABLE_RECIPE,
                                                        page=DEFORMABLE_PAGE + "1m_TgMjzH7D44fbA-c_jiBZ-xf-odxGdk/view"),
    "deformable_detr_resnet50_box_refine": Preset(DeformableDETRConfig(with_box_refine=True), DEFORMABLE_RECIPE,
                                                  page=DEFORMABLE_PAGE + "1JYKyRYzUH7uo9eVfDaVCiaIGZb5YTCuI/view"),
    "deformable_detr_resnet50_two_stage": Preset(DeformableDETRConfig(with_box_refine=True, two_stage=True),
                                                 DEFORMABLE_RECIPE,
                                                 page=DEFORMABLE_PAGE + "15I03A7hNTpwuLNdfuEmW9_taZMNVssEp/view"),
    "conditional_detr_resnet50": Preset(ConditionalDETRConfig(), SHORT_RECIPE),
    "conditional_detr_resnet50_dc5": Preset(ConditionalDETRConfig(dilation=True), SHORT_RECIPE),
    "dab_detr_resnet50": Preset(DABDETRConfig(), SHORT_RECIPE),
    "dab_detr_resnet50_dc5_3pat": Preset(DABDETRConfig(dilation=True, num_patterns=3), SHORT_RECIPE),
    "dab_deformable_detr_resnet50": Preset(DABDeformableDETRConfig(), SHORT_RECIPE),
    **{f"dino_resnet50_{levels}scale{length}": Preset(DINOConfig(num_feature_levels=levels), recipe)
       for levels in (4, 5) for length, recipe in DINO_RECIPES.items()},
    **{f"detr_{pvt}": Preset(DETRConfig(backbone=pvt, frozen_stages=0, padding="exact"), PVT_RECIPE, PVT_DATA)
       for pvt in PVTS},
    # PVT's authors publish no Deformable DETR: its own recipe, with their data.
    "deformable_detr_pvt_v2_b2": Preset(DeformableDETRConfig(backbone="pvt_v2_b2", frozen_stages=0, padding="exact"),
                                        DEFORMABLE_RECIPE, PVT_DATA),
    "tiny_detr": Preset(
        ProposalDETRConfig(backbone="resnet_tiny", backbone_norm="batch", from_scratch=True, lr_backbone=2e-3,
                           padding="exact", box_prior=True, enc_layers=1, dec_layers=2, dim_feedforward=256,
                           hidden_dim=128, nheads=4, dropout=0.0, num_queries=30),
        replace(TINY_RECIPE, epochs=11), TINY_DATA),
    "tiny_deformable_detr": Preset(
        DeformableDETRConfig(backbone="resnet_tiny", backbone_norm="batch", from_scratch=True, lr_backbone=2e-3,
                             padding="exact", with_box_refine=True, two_stage=True, query_content="token",
                             num_feature_levels=3, enc_layers=0, dec_layers=2, dim_feedforward=256, hidden_dim=128,
                             nheads=4, dropout=0.0, num_queries=30, lr_linear_proj_mult=1.0),
        TINY_RECIPE, TINY_DATA),
    "tiny_conditional_detr": Preset(
        ConditionalDETRConfig(backbone="resnet_tiny", backbone_norm="batch", from_scratch=True, lr_backbone=5e-4,
                              padding="exact", enc_layers=1, dec_layers=2, dim_feedforward=256, hidden_dim=128, nheads=4,
                              dropout=0.0, num_queries=100),
        DENSE_RECIPE, TINY_DATA),
    "tiny_dab_detr": Preset(
        DABDETRConfig(backbone="resnet_tiny", backbone_norm="batch", from_scratch=True, lr_backbone=5e-4, padding="exact",
                      enc_layers=1, dec_layers=2, dim_feedforward=256, hidden_dim=128, nheads=4, num_queries=10,
                      num_patterns=10),
        DENSE_RECIPE, TINY_DATA),
    "tiny_dab_deformable_detr": Preset(
        DABDeformableDETRConfig(backbone="resnet_tiny", backbone_norm="batch", from_scratch=True, lr_backbone=2e-3,
                                padding="exact", num_feature_levels=3, enc_layers=1, dec_layers=2, dim_feedforward=256,
                                hidden_dim=128, nheads=4, num_queries=100),
        TINY_RECIPE, TINY_DATA),
    "tiny_dino": Preset(
        DINOConfig(backbone="resnet_tiny", backbone_norm="batch", from_scratch=True, lr_backbone=2e-3, padding="exact",
                   num_feature_levels=3, enc_layers=0, dec_layers=2, dim_feedforward=256, hidden_dim=128, nheads=4,
                   num_queries=100, dn_number=50),
        TINY_RECIPE, TINY_DATA),
}
