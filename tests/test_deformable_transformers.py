"""Deformable DETR against the implementation in the ``transformers`` package, with the same random weights: the variants
that no recorded case covers. Skips where ``transformers`` or ``timm`` (its ResNets) is not installed."""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from small_models import NUM_CLASSES, build_small, images
from torch import Tensor, nn

from detr import deformable_attention
from detr.nested_tensor import nested_tensor_from_tensor_list

transformers = pytest.importorskip("transformers", reason="the other implementation: pip install transformers")
pytest.importorskip("timm", reason="transformers takes its ResNets from timm: pip install timm")

STAGES = {"with_box_refine": True, "two_stage": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "single_scale": {"num_feature_levels": 1},
    "single_scale_dc5": {"num_feature_levels": 1, "dilation": True, "backbone": "resnet50"},
    "dc5": {"dilation": True, "backbone": "resnet50", "with_box_refine": True},
    "refine": {"with_box_refine": True, "dec_layers": 3},
    "learned_position": {"position_embedding": "learned", "num_feature_levels": 3},
    "two_stage_single_scale": STAGES | {"num_feature_levels": 1, "num_queries": 5, "enc_n_points": 3},
    "two_stage_3_levels": STAGES | {"num_feature_levels": 3, "num_queries": 40, "dec_n_points": 3},
    "two_stage_5_levels": STAGES | {"num_feature_levels": 5, "num_queries": 140, "enc_n_points": 2, "nheads": 8},
}
HEIGHT, WIDTH = 118, 101
SIZES = [(70, WIDTH), (HEIGHT, 61)]                        # no multiples of a stride; each is padded along another side

# Ours -> theirs, in the order of application.
NAMES = [(r"^backbone\.0\.body\.", "model.backbone.model."), (r"^transformer\.|^(?=input_proj)", "model."),
         (r"^query_embed\.", "model.query_position_embeddings."),
         (r"(decoder.*)\.norm1\.", r"\1.encoder_attn_layer_norm."),
         (r"(decoder.*)\.norm2\.", r"\1.self_attn_layer_norm."), (r"(encoder.*)\.norm1\.", r"\1.self_attn_layer_norm."),
         (r"\.norm[23]\.", ".final_layer_norm."), (r"\.linear([12])\.", r".mlp.fc\1."), (r"cross_attn", "encoder_attn"),
         (r"out_proj", "o_proj"), (r"^backbone\.1\.row_embed", "model.position_embedding.row_embeddings"),
         (r"^backbone\.1\.col_embed", "model.position_embedding.column_embeddings")]


def their_names(values: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Our parameters, or their gradients, by the names of ``transformers``, which has three projections apart."""
    renamed = {}
    for name, value in values.items():
        for ours, theirs in NAMES:
            name = re.sub(ours, theirs, name)
        if "in_proj_" in name:
            for part, third in zip("qkv", value.chunk(3)):
                renamed[name.replace("in_proj_", f"{part}_proj.")] = third
        else:
            renamed[name] = value
    return renamed


def pair(flags: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Our model and theirs with the same weights, none at its start: heads, offsets and normalisations begin at zero or
    one."""
    ours = build_small("deformable_detr_resnet50", dropout=0.0, **flags)[0]
    with torch.no_grad():
        for name, x in [*ours.named_parameters(), *ours.named_buffers()]:
            x += torch.rand_like(x) if name.startswith("backbone") and x.ndim == 1 else 0.05 * torch.randn_like(x)
    transformer, cross = ours.transformer, ours.transformer.decoder.layers[0].cross_attn
    config = transformers.DeformableDetrConfig(
        backbone=flags.get("backbone", "resnet18"), dilation=flags.get("dilation", False), num_labels=NUM_CLASSES,
        position_embedding_type=flags.get("position_embedding", "sine"), d_model=transformer.d_model, dropout=0.0,
        num_feature_levels=len(transformer.level_embed), num_queries=ours.num_queries,
        two_stage_num_proposals=ours.num_queries, two_stage=ours.two_stage,
        with_box_refine=flags.get("with_box_refine", False), encoder_attention_heads=cross.n_heads,
        decoder_attention_heads=cross.n_heads, encoder_layers=len(transformer.encoder.layers),
        decoder_layers=len(transformer.decoder.layers), encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_n_points=transformer.encoder.layers[0].self_attn.n_points, decoder_n_points=cross.n_points)
    theirs = transformers.DeformableDetrForObjectDetection(config)
    if config.with_box_refine and not config.two_stage:     # they tie the class heads, which as published are one a layer
        theirs.class_embed = nn.ModuleList(nn.Linear(transformer.d_model, NUM_CLASSES) for _ in ours.class_embed)
    theirs.load_state_dict(their_names(ours.state_dict()), strict=True)
    # Their outputs of earlier layers are for their loss alone; this takes them past it.
    theirs.loss_function = lambda logits, labels, device, boxes, config, classes, coords: (None, None, (classes, coords))
    return ours, theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients(variant, monkeypatch):
    """In float64: float32 rounds some samples across pixel borders, which alone changes gradients by up to a percent."""
    monkeypatch.setenv(deformable_attention.ENVIRONMENT, "definition")
    monkeypatch.setattr(Tensor, "float", Tensor.double)                     # boxes and masks, which are float32 otherwise
    flags = VARIANTS[variant]
    ours, theirs = (model.double().train() for model in pair(flags))
    # They train the stem too; a ResNet-50's gradients take long.
    for name, parameter in [*ours.named_parameters(), *theirs.named_parameters()]:
        if re.search(r"backbone\.(0|model)\.", name):
            parameter.requires_grad_("layer4" in name and "backbone" not in flags)
    batch = nested_tensor_from_tensor_list([image.double() for image in images(*SIZES)])
    seen: dict[str, Any] = {}
    ours.transformer.encoder.register_forward_hook(lambda m, args, memory: seen.update(levels=args[0], memory=memory))
    theirs.model.encoder.register_forward_hook(
        lambda m, args, given, output: seen.update(given=given, output=output.last_hidden_state), with_kwargs=True)
    found = ours(batch)
    expected = theirs(batch.tensors, pixel_mask=(~batch.mask).long(), labels=[])

    def check(a: Tensor, b: Tensor, what: str, atol: float = 1e-6) -> None:
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda difference: f"{what}: {difference}")

    levels, given = seen["levels"], seen["given"]
    stride = 16 if "dilation" in flags else 32
    assert levels.shapes == given["spatial_shapes_list"] and (-(-HEIGHT // stride), -(-WIDTH // stride)) in levels.shapes
    assert torch.equal(levels.mask, ~given["attention_mask"]) and levels.mask.any(1).all()
    check(levels.tokens, given["inputs_embeds"], "tokens")
    check(levels.position[~levels.mask], given["spatial_position_embeddings"][~levels.mask], "position")
    check(levels.valid_ratios, given["valid_ratios"], "valid_ratios")
    check(seen["memory"][~levels.mask], seen["output"][~levels.mask], "memory")

    layers, (classes, boxes) = [*found["aux_outputs"], found], expected.auxiliary_outputs
    assert len(layers) == len(classes) == len(boxes) == flags.get("dec_layers", 2)
    pairs = [(layer[key], value, f"{key} of layer {i}") for i, layer in enumerate(layers)
             for key, value in (("pred_logits", classes[i]), ("pred_boxes", boxes[i]))]
    if ours.two_stage:
        proposals, invalid = found["enc_outputs"], found["invalid_queries"]
        pairs += [(proposals["pred_logits"], expected.enc_outputs_class, "pred_logits of the proposals"),
                  (proposals["pred_boxes"], expected.enc_outputs_coord_logits.sigmoid(), "pred_boxes of the proposals")]
        assert not invalid.all(1).any() and (invalid.any() or variant != "two_stage_5_levels")
    for a, b, what in pairs:
        check(a, b, what)

    sum(a.square().sum() for a, _, _ in pairs).backward()
    sum(b.square().sum() for _, b, _ in pairs).backward()
    gradients = their_names({name: p.grad for name, p in ours.named_parameters(remove_duplicate=False)})
    trained = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(trained) > 80 and trained.keys() <= {name for name, gradient in gradients.items() if gradient is not None}
    for name, gradient in trained.items():
        if not name.endswith("k_proj.bias"):                # zero but for rounding: the softmax does not see it
            check(gradients[name], gradient, f"gradient of {name}", atol=1e-5 * gradient.abs().max().item())
