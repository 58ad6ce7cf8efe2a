"""Backbones, padding and batches from the command line."""
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from small_data import make_rectangles
from small_models import NUM_CLASSES, build_small, small_flags
from test_main import SMALL, log, parse, run, settle

import detr
import main
from detr import checkpoint, config
from detr.backbone import backbone_of, resnet
from detr.boxes import box_prior
from detr.presets import PRESETS
from scripts import batch_invariance, benchmark_padding

MIXED = SMALL.replace("--image_size 64", "--image_size 48 --multi_scale --least_scale 0.5")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rectangles on images of different shapes, which a batch has to pad."""
    from PIL import Image
    folder = make_rectangles(tmp_path_factory.mktemp("data") / "rectangles")
    for split in ("train", "val"):
        file = folder / "annotations" / f"instances_{split}2017.json"
        content = json.loads(file.read_text())
        for n, image in enumerate(content["images"]):
            wider = image["width"] * (1 + n % 3)
            path = folder / f"{split}2017" / image["file_name"]
            Image.open(path).resize((wider, image["height"])).save(path)
            for row in content["annotations"]:
                if row["image_id"] == image["id"]:
                    row["bbox"][0] *= 1 + n % 3
                    row["bbox"][2] *= 1 + n % 3
                    row["area"] *= 1 + n % 3
            image["width"] = wider
        file.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A checkpoint of a few steps, with batches that were bucketed."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run(MIXED + f"--coco_path {data} --output_dir {folder} --epochs 2 --eval_every 1 --bucket_train")
    return folder


@pytest.mark.parametrize("line, message", [
    ("--model tiny_detr --frozen_stages 2", "--frozen_stages has no effect with --from_scratch"),
    ("--model detr_resnet50 --eval --bucket_train", "--bucket_train has no effect with --eval"),
    ("--model tiny_detr --bucket_train", "--bucket_train has no effect where --image_size is exact: nothing is padded"),
    ("--model detr_resnet50 --least_scale 0.9 --no_multi_scale", "--least_scale has no effect with --no_multi_scale"),
    ("--model tiny_detr --pretrained_backbone", "--from_scratch and --pretrained_backbone contradict each other"),
    ("--model detr_resnet50 --pretrained_backbone --eval", "--pretrained_backbone begins a training"),
    ("--model detr_resnet50 --pretrained_backbone --backbone_weights a.pth", "contradict each other; choose one"),
    ("--model detr_resnet50 --in_channels 0", "--in_channels 0: it must be at least 1"),
])
def test_refused_flags(line, message):
    with pytest.raises(ValueError) as error:
        settle(line)
    assert message in str(error.value)


@pytest.mark.parametrize("flags, message", [
    ({"feature_strides": (7,)}, "--feature_strides 7: resnet50 has no map of stride 7; it has 4 8 16 32"),
    ({"feature_strides": (16, 8)}, "--feature_strides 16 8: from fine to coarse, each once: 8 16"),
    ({"feature_strides": (8, 16)}, "2 strides, and this model has room for 1; for several, use a Deformable DETR"),
    ({"feature_strides": (8,), "masks": True}, "a mask head takes all maps"),
    ({"frozen_stages": 4}, "--frozen_stages 4 would freeze all of the backbone, of which 4 stages are used"),
    ({"frozen_stages": 1, "feature_strides": (4,)}, "--frozen_stages 1 would freeze all of the backbone, of which 1 "),
    ({"frozen_stages": 2, "from_scratch": True, "backbone_norm": "batch"}, "frozen_stages=2 and from_scratch=True"),
    ({"feature_strides": ()}, "--feature_strides: at least one stride is needed"),
    ({"backbone": "convnext_tiny"}, "--backbone convnext_tiny is not known; did you mean timm/convnext_tiny? There are"),
])
def test_refused_models(flags, message):
    from detr import build_model
    with pytest.raises(ValueError) as error:
        build_model("detr_resnet50", **flags)
    assert message in str(error.value)


def test_strides_that_are_not_used_leave_no_parameters():
    from detr import build_model
    model = build_model("detr_resnet50", feature_strides=(16,), hidden_dim=32, num_queries=3)[0]
    assert backbone_of(model).strides == [16] and not hasattr(backbone_of(model).body, "layer4")
    out = model([torch.randn(3, 64, 64)])
    (out["pred_logits"].sum() + out["pred_boxes"].sum() +
     sum(aux["pred_boxes"].sum() for aux in out["aux_outputs"])).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    dilated = build_model("detr_resnet50", feature_strides=(16,), dilation=True)[0]         # of two, the deeper
    assert hasattr(backbone_of(dilated).body, "layer4")


@pytest.mark.parametrize("stages, fixed", [(0, set()), (1, {"conv1", "bn1", "layer1"}),
                                           (2, {"conv1", "bn1", "layer1", "layer2"})])
def test_frozen_stages(stages, fixed):
    from detr import build_model
    model = build_model("detr_resnet50", backbone="resnet18", backbone_norm="batch", frozen_stages=stages)[0]
    body = backbone_of(model).body
    assert {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad} == fixed
    words = ("all of it trains", "its stem and first stage stay fixed (--frozen_stages 1)",
             "its stem and first 2 stages stay fixed (--frozen_stages 2)")
    assert main.fixed(backbone_of(model), 1e-5) == words[stages]
    assert main.fixed(backbone_of(model), 0) == "all of it stays fixed (--lr_backbone 0)"


def test_a_stage_that_is_all_there_is_trains():
    """The published frozen first stage is a part of a backbone, never all of it."""
    from detr import build_model
    for flags in ({"backbone": "timm/vit_tiny_patch16_224"}, {"backbone": "resnet18", "feature_strides": (4,)}):
        body = backbone_of(build_model("detr_resnet50", **flags)[0]).body
        assert any(p.requires_grad for p in body.parameters()), flags


@pytest.mark.parametrize("backbone", ["pvt_v2_b0", "timm/convnext_atto"])
def test_a_presets_batch_norm_is_left_out_where_there_is_none(backbone, capsys):
    settings = settle(f"--model tiny_deformable_detr --backbone {backbone}")
    assert settings.model.backbone_norm == "frozen"
    assert f"{backbone} has no batch norms: the preset's --backbone_norm batch is left out" in capsys.readouterr().out
    settings.model.build(3)
    asked = settle(f"--model tiny_deformable_detr --backbone {backbone} --backbone_norm batch")
    with pytest.raises(ValueError, match="--backbone_norm batch has no meaning"):
        asked.model.build(3)


@pytest.mark.parametrize("backbone, norm", [("resnet18", "group, or batch where"), ("timm/resnet10t", "batch")])
def test_the_norm_that_is_advised_can_be_had(backbone, norm):
    with pytest.raises(ValueError, match=f"add --backbone_norm {norm}"):
        settle(f"--model detr_resnet50 --backbone {backbone} --from_scratch --lr_backbone 1e-3")


def test_from_python_an_inexact_backbone_is_said():
    from detr import build_model
    with pytest.warns(UserWarning, match="padding='exact' is not possible with timm/vit_tiny_patch16_224"):
        build_model("detr_resnet50", backbone="timm/vit_tiny_patch16_224", padding="exact")


def test_a_checkpoint_of_before_is_legacy(trained, tmp_path):
    state = checkpoint.load(trained / "checkpoint.pth")
    for name in ("padding", "in_channels", "frozen_stages", "feature_strides"):
        del state["config"]["model"][name]
    checkpoint.save(tmp_path / "old.pth", state)
    assert settle(f"--resume {tmp_path}/old.pth --eval").model.padding == "legacy"


@torch.no_grad()
def test_a_checkpoint_of_before_looks_where_it_likes(tmp_path):
    """tiny_detr without box prior does so still with weights of that time."""
    model, _, _ = build_small("tiny_detr", box_prior=False)
    remembered = dataclasses.asdict(config.replace(PRESETS["tiny_detr"].model, small_flags("tiny_detr")))
    checkpoint.save(tmp_path / "old.pth", {"model": model.state_dict(), "num_classes": NUM_CLASSES, "config": {
        "name": "tiny_detr", "model": {k: v for k, v in remembered.items() if k != "box_prior"}}})
    assert PRESETS["tiny_detr"].model.box_prior
    assert not settle(f"--resume {tmp_path}/old.pth --eval").model.box_prior
    loaded, image = detr.load(tmp_path / "old.pth").model, torch.rand(3, 64, 96)
    before = model.eval()([image])["pred_logits"]
    assert torch.equal(loaded([image])["pred_logits"], before)
    loaded.transformer.decoder.prior = box_prior                           # which would not be the same
    assert (loaded([image])["pred_logits"] - before).abs().max() > 1e-4


def test_a_checkpoint_remembers_its_padding(trained, capsys):
    file = trained / "checkpoint.pth"
    assert checkpoint.load(file)["config"]["model"]["padding"] == "exact"
    assert settle(f"--resume {file} --eval").model.padding == "exact"
    assert settle(f"--resume {file} --eval --padding legacy").model.padding == "legacy"
    assert f"changed since {file}: --padding legacy (was exact)" in capsys.readouterr().out


def test_the_share_of_padding_is_logged(trained):
    rows = log(trained)
    assert all(0 < row["train_padded"] < 0.5 and 0 <= row["test_padded"] < 0.5 for row in rows)


def test_evaluation_in_buckets_and_in_order(trained, data, tmp_path):
    """The same twelve numbers and the same detections; less padding."""
    line = f"--coco_path {data} --eval --resume {trained}/checkpoint.pth --device cpu --print_every 1000 --batch_size 4"
    found = {}
    for flag in ("", " --no_bucket_eval"):
        results, _ = run(f"{line}{flag} --output_dir {tmp_path / ('order' if flag else 'buckets')}")
        found[flag] = results
    assert found[""]["coco_eval_bbox"] == found[" --no_bucket_eval"]["coco_eval_bbox"]
    assert found[""]["padded"] < found[" --no_bucket_eval"]["padded"]


def test_any_batch_size_gives_the_same(trained, data, tmp_path, capsys):
    line = f"--resume {trained}/checkpoint.pth --coco_path {data} --short_side 33 70 --batch_sizes 1 3 "
    assert batch_invariance.main(batch_invariance.get_args_parser().parse_args(
        (line + f"--figure {tmp_path}/figure.png").split())) == 0
    text = capsys.readouterr().out
    assert "legacy       3" in text and "exact: the twelve numbers differ by" in text
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_comparison_notices_padding(trained, data, monkeypatch):
    """With exact padding switched off behind its back, the script says that it is not."""
    monkeypatch.setattr(batch_invariance, "backbone_of", lambda model: type("Backbone", (), {"inexact": ""})())
    detector = batch_invariance.load_detector
    def legacy(path):
        found = detector(path)
        backbone_of(found.model).exact = False
        return found
    monkeypatch.setattr(batch_invariance, "load_detector", legacy)
    line = f"--resume {trained}/checkpoint.pth --coco_path {data} --short_side 33 70 --batch_sizes 1 3"
    assert batch_invariance.main(batch_invariance.get_args_parser().parse_args(line.split())) == 1


def test_a_backbone_that_cannot_be_exact(data, tmp_path, monkeypatch):
    """It is named, and evaluation has no padding."""
    monkeypatch.setattr(resnet.ResNet, "exact", False)
    monkeypatch.setattr(resnet.ResNet, "inexact", "for this test", raising=False)
    results, text = run(MIXED + f"--coco_path {data} --output_dir {tmp_path}/out --epochs 1")
    assert ("--padding exact is not possible with resnet_tiny: for this test. Evaluation batches images of equal size "
            "alone; in training, padding takes part") in text
    assert results["padded"] == 0 and log(tmp_path / "out")[0]["train_padded"] > 0


def test_grey_images(data, tmp_path):
    results, text = run(MIXED + f"--coco_path {data} --output_dir {tmp_path}/out --epochs 1 --in_channels 1")
    state = checkpoint.load(tmp_path / "out" / "checkpoint.pth")
    assert state["model"]["backbone.0.body.conv1.weight"].shape[1] == 1
    assert len(state["preprocessing"]["mean"]) == 1 and state["preprocessing"]["mean"][0] == pytest.approx(0.449)
    again, _ = run(f"--coco_path {data} --eval --resume {tmp_path}/out/checkpoint.pth --device cpu --print_every 1000")
    assert again["coco_eval_bbox"] == results["coco_eval_bbox"]


def test_weights_that_are_not_named(data, tmp_path):
    line = f"--model detr_resnet50 --backbone resnet_tiny --coco_path {data} --output_dir {tmp_path}/out --device cpu"
    with pytest.raises(ValueError, match="--backbone resnet_tiny has no weights that are fetched unasked: name a file"):
        run(line)


def test_benchmark_of_padding(monkeypatch, tmp_path, capsys):
    benchmark_padding.main(benchmark_padding.get_args_parser().parse_args(
        f"--model tiny_detr --short_side 48 --repeats 2 --json {tmp_path}/padding.json".split()))
    rows = json.loads((tmp_path / "padding.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["forward", "training step"]
    assert all(row["exact"] > 0 and row["legacy"] > 0 and 0 < row["padded"] < 1 for row in rows)


def test_presets_of_pvt():
    settings = settle("--model detr_pvt_small")
    assert (settings.model.backbone, settings.model.padding, settings.model.frozen_stages) == ("pvt_small", "exact", 0)
    assert (settings.train.epochs, settings.train.lr_drop, settings.train.lr, settings.model.lr_backbone) == \
        (50, 33, 1e-4, 1e-5)
    assert not settings.data.random_crop and settings.data.least_scale == 0.8
    assert parse("--model detr_pvt_small").model == "detr_pvt_small"
