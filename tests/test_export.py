"""Exported models: numbers are PyTorch's at any batch and size, padding changes nothing, what differs is refused.

Small models with random weights: every stage of the presets, with one decoder layer, since tracing takes seconds a layer.
"""
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import main
from detr import build_model, checkpoint, engines
from detr import export as exporting
from detr.loading import load
from detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from detr.padding import Window, exact_upsample, valid_mask
from detr.presets import PRESETS
from detr.settings import decide

CLASSES = [{"label": i, "id": 10 * i + 3, "name": f"kind {i}", "isthing": True} for i in range(5)]


def checkpoint_file(folder: Path, name: str, **flags) -> Path:
    """A checkpoint as main.py writes it, of a model whose random heads tell queries apart."""
    torch.manual_seed(0)
    model, *_ = build_model(name, num_classes=len(CLASSES), **flags)
    for part, parameter in model.named_parameters():
        if "bbox_embed" in part or "heads" in part:
            torch.nn.init.normal_(parameter, std=0.05)
    for module in model.modules():                                              # statistics as of a training
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    preset = PRESETS[name]
    config = {"name": name, "model": dataclasses.asdict(preset.model) | flags, "train": {},
              "data": {"image_size": "160x160"}}
    file = folder / f"{name}.pth"
    checkpoint.save(file, {"model": model.state_dict(), "config": config, "categories": CLASSES,
                           "num_classes": len(CLASSES), "card": {},
                           "preprocessing": {"size": (160, 160), "max_size": 1333, "mean": (0.5, 0.4, 0.3),
                                             "std": (0.2, 0.2, 0.3)}})
    return file


def pictures(count: int = 3) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (90 + 20 * i, 130 - 15 * i, 3), dtype=np.uint8))
            for i in range(count)]


def without_packages() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}: pip install onnx onnxscript onnxruntime")


@contextlib.contextmanager
def where_pytorch_can():
    """Skip on versions of PyTorch that cannot leave the sizes of images open, which the error says."""
    try:
        yield
    except ValueError as error:
        if "use a newer PyTorch" not in str(error) or tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15):
            raise
        pytest.skip(f"PyTorch {torch.__version__} cannot export with open sizes")


@pytest.fixture(scope="module")
def deformable(tmp_path_factory):
    """A detector, its accepted model and the gaps, with post-processing."""
    without_packages()
    file = checkpoint_file(tmp_path_factory.mktemp("deformable"), "tiny_deformable_detr", dec_layers=1, num_queries=12)
    detector = load(file)
    with where_pytorch_can():
        return detector, *exporting.accepted(detector, pictures())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A file without post-processing, and its detector."""
    without_packages()
    folder = tmp_path_factory.mktemp("dense")
    source = checkpoint_file(folder, "tiny_detr", dec_layers=1, num_queries=12)
    detector = load(source)
    with where_pytorch_can():
        return detector, exporting.export(detector, folder / "model.onnx", pictures(), postprocess=False)


def outputs(detector, images, originals):
    """What PyTorch gives: the reference."""
    with torch.no_grad():
        found = detector.postprocessors["bbox"](detector.model(nested_tensor_from_tensor_list(images)), originals)
    return [torch.stack([one[name] for one in found]) for name in ("scores", "labels", "boxes")]


def test_deformable_at_sizes_it_never_saw(deformable):
    detector, model, _ = deformable
    run = exporting.runner(model)
    generator = torch.Generator().manual_seed(3)
    for sizes in ([(161, 97)], [(64, 200), (90, 41), (33, 33)], [(96, 128)] * 2):
        images = [torch.randn(3, *size, generator=generator) for size in sizes]
        originals = torch.tensor([[300 + 10 * i, 200] for i in range(len(sizes))])
        samples = nested_tensor_from_tensor_list(images)
        found = run(samples.tensors, torch.tensor(sizes), originals)
        for expected, given in zip(zip(*outputs(detector, images, originals)), zip(*found)):
            assert exporting.gap(expected, given).small


def test_what_is_in_the_padding_changes_nothing(deformable):
    detector, model, _ = deformable
    run = exporting.runner(model)
    images = torch.full((2, 3, 128, 160), 7.5)                                  # padding is whatever a caller left there
    image = torch.randn(3, 96, 100, generator=torch.Generator().manual_seed(4))
    images[0, :, :96, :100] = image
    sizes, originals = torch.tensor([[96, 100], [128, 160]]), torch.tensor([[480, 500], [100, 100]])
    alone = run(image[None], sizes[:1], originals[:1])
    in_batch = run(images, sizes, originals)
    assert exporting.gap([x[0] for x in alone], [x[0] for x in in_batch]).small
    all_of_it = run(images, torch.tensor([[128, 160], [128, 160]]), originals)          # sizes do matter
    assert not exporting.gap([x[0] for x in alone], [x[0] for x in all_of_it]).small


def test_lower_precisions(deformable, tmp_path):
    detector, model, gaps = deformable
    reports = {precision: exporting.write_onnx(detector, model, gaps, tmp_path / f"{precision}.onnx", pictures(),
                                               precision=precision) for precision in exporting.PRECISIONS}
    assert reports["float32"].size > reports["int8"].size and reports["float32"].size > 1.6 * reports["float16"].size
    for precision in ("float16", "int8"):
        assert any("MatMul" in name or "Gemm" in name or "Conv" in name for name in reports[precision].float32)
        about = engines.read(str(reports[precision].file))
        assert about["precision"] == precision and about["float32_layers"] == reports[precision].float32
    image = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(5))
    size = torch.tensor([[160, 160]])
    exact = outputs(detector, [image[0]], size)
    for precision, allowed in (("float16", 0.01), ("int8", 0.2)):
        scores, _, boxes = engines.run(engines.session(str(reports[precision].file)), (image, size, size))
        assert boxes.isfinite().all() and (scores[0] - exact[0][0]).abs().max() < allowed
        assert not torch.equal(scores, exact[0])                                        # it is another precision
    with contextlib.redirect_stdout(io.StringIO()) as said:
        results = main.main(main.get_args_parser().parse_args(
            ["--eval", "--engine", "onnxruntime", "--resume", str(reports["float16"].file), "--num_workers", "0",
             "--device", "cpu", "--data", str(small_data(tmp_path))]))
    assert "run by onnxruntime" in said.getvalue()
    assert len(results["coco_eval_bbox"]) == 12 and "loss" not in results


def small_data(folder: Path) -> Path:
    """Two images in COCO's layout, of the classes above."""
    for split in ("train2017", "val2017"):
        (folder / "data" / split).mkdir(parents=True)
        for i, picture in enumerate(pictures(2), 1):
            picture.save(folder / "data" / split / f"{i}.png")
        rows = {"images": [{"id": i, "file_name": f"{i}.png", "width": picture.width, "height": picture.height}
                           for i, picture in enumerate(pictures(2), 1)],
                "annotations": [{"id": i, "image_id": i, "category_id": 3, "bbox": [10, 10, 30, 20], "area": 600,
                                 "iscrowd": 0} for i in (1, 2)],
                "categories": [{"id": row["id"], "name": row["name"]} for row in CLASSES]}
        (folder / "data" / "annotations").mkdir(exist_ok=True)
        (folder / "data" / "annotations" / f"instances_{split}.json").write_text(json.dumps(rows))
    return folder / "data"


def test_the_engine_scores_as_pytorch_does(dense, tmp_path):
    detector, report = dense
    data = small_data(tmp_path)
    results = []
    for words in (["--resume", detector.source], ["--engine", "onnxruntime", "--resume", str(report.file)]):
        with contextlib.redirect_stdout(io.StringIO()):
            results.append(main.main(main.get_args_parser().parse_args(
                ["--eval", "--num_workers", "0", "--device", "cpu", "--data", str(data), "--batch_size", "2", *words])))
    assert results[1]["coco_eval_bbox"] == pytest.approx(results[0]["coco_eval_bbox"], abs=1e-6)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):          # of the last layer
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-4)


def test_metadata_is_read_without_a_session(dense, tmp_path, monkeypatch):
    """And by one where the package onnx is missing; what is no model is an error either way."""
    _, report = dense
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(report.file.read_bytes()[:-1000])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnx", None)
        by_session = engines.read(str(report.file))
        with pytest.raises(ValueError, match="broken.onnx is damaged"):
            engines.read(str(broken))
    monkeypatch.setattr(engines, "session", lambda *_, **__: pytest.fail("a session was built"))
    assert engines.read(str(report.file)) == by_session and by_session["num_classes"] == 5
    with pytest.raises(ValueError, match="broken.onnx is damaged or not an ONNX model"):
        engines.read(str(broken))
    with pytest.raises(FileNotFoundError, match="there is no file .*none.onnx"):
        engines.read(str(tmp_path / "none.onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        engines.read(str(report.file))


def test_other_data_is_no_change_of_an_exported_model(dense, tmp_path, monkeypatch, capsys):
    _, report = dense
    about = engines.read(str(report.file))
    about["config"]["data"] |= {"coco_path": "there"}
    typed = {"eval": True, "engine": "onnxruntime", "resume": "m.onnx"}
    with monkeypatch.context() as patch:
        patch.setattr(engines, "read", lambda _: about)
        decide(typed | {"coco_path": "here"})
        decide(typed | {"data": "here"})
    lines = [line for line in capsys.readouterr().out.splitlines() if "m.onnx" in line]
    assert lines == ["the evaluation reads other data than m.onnx names: --coco_path here (was there)",
                     "the evaluation reads other data than m.onnx names: --data here takes the place of --coco_path "
                     "there"]
    data = small_data(tmp_path)
    file = data / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace("kind 0", "crimson"))
    with pytest.raises(ValueError, match="'crimson' are not in .*an exported model keeps its classes") as stop:
        main.main(main.get_args_parser().parse_args(["--eval", "--engine", "onnxruntime", "--resume", str(report.file),
                                                     "--num_workers", "0", "--device", "cpu", "--data", str(data)]))
    assert "--finetune" not in str(stop.value)


def test_metadata(dense):
    detector, report = dense
    import onnx
    model = onnx.load(report.file)
    onnx.checker.check_model(model, full_check=True)
    about = engines.from_texts({entry.key: entry.value for entry in model.metadata_props})
    assert about["preset"] == "tiny_detr" and about["categories"] == CLASSES and about["num_classes"] == 5
    assert about["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    assert about["source"]["sha256"] == hashlib.sha256(Path(detector.source).read_bytes()).hexdigest()
    assert about["config"]["model"]["padding"] == "exact" and "unknown" in about["license"]
    assert about["versions"]["opset"] == 18 and about["versions"]["torch"] == torch.__version__
    shapes = {one.name: [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim]
              for one in (*model.graph.input, *model.graph.output)}
    assert shapes == {"images": ["batch", 3, "height", "width"], "sizes": ["batch", 2], "logits": ["batch", 12, 5],
                      "boxes": ["batch", 12, 4]}
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)     # paths of this machine
    assert str(Path(__file__).parent.parent).encode() not in report.file.read_bytes()


def test_a_file_that_differs_is_not_left_there(deformable, tmp_path, monkeypatch):
    detector, *_ = deformable
    from onnx import numpy_helper
    wrong = copy.deepcopy(deformable[1])
    for weight in wrong.graph.initializer:
        if (array := numpy_helper.to_array(weight)).ndim == 2 and array.dtype == np.float32:
            weight.CopyFrom(numpy_helper.from_array(array * 1.5, weight.name))
    monkeypatch.setattr(exporting, "trace", lambda *_: None)
    monkeypatch.setattr(exporting, "to_onnx", lambda *_: wrong)
    with pytest.raises(ValueError, match=r"not kept.*1x3x160x160: boxes .* px, scores"):
        exporting.export(detector, tmp_path / "model.onnx", pictures())
    assert list(tmp_path.iterdir()) == []


def test_gap():
    scores, labels = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([1, 2, 1])
    boxes = torch.arange(12.0).view(3, 4) * 10
    order = torch.tensor([1, 0, 2])
    same = exporting.gap((scores, labels, boxes), (scores[order], labels[order], boxes[order]))
    assert same == (0, 0)
    moved = boxes.clone()
    moved[0, 2] += 0.25
    assert exporting.gap((scores, labels, boxes), (scores, labels, moved)).box == pytest.approx(0.25)
    assert exporting.gap((scores, labels, boxes), (scores - 0.01, labels, boxes)).score == pytest.approx(0.01)
    assert not exporting.gap((scores, labels, boxes), (scores, torch.tensor([1, 1, 1]), boxes)).small
    assert not exporting.gap((scores, labels, boxes), (scores, labels, boxes * float("nan"))).small
    other = torch.tensor([1, 2, 0])                                     # the last one, of an equal score, is another
    assert exporting.gap((scores, labels, boxes), (scores, other, boxes + (labels != other)[:, None] * 50)).small


def test_sizes_as_a_tensor_follow_the_same_formulas():
    sizes = [(7, 12), (32, 33), (1, 5)]
    tensor = torch.tensor(sizes)
    for window in (Window((3, 3), (2, 2), (1, 1)), Window((7, 7), (4, 4), (3, 3)), Window((2, 2), (2, 2), ceil=True)):
        assert [tuple(row) for row in window.sizes(tensor).tolist()] == window.sizes(sizes)
    assert torch.equal(valid_mask(tensor, 32, 33), valid_mask(sizes, 32, 33))
    x, finer = torch.randn(3, 4, 16, 17), [(14, 23), (31, 34), (2, 9)]
    small = [(7, 12), (16, 17), (1, 5)]
    expected = exact_upsample(x, small, finer, (31, 34))
    assert torch.equal(exact_upsample(x, torch.tensor(small), torch.tensor(finer), (31, 34)), expected)
    one = F.interpolate(x[:1, :, :7, :12], (14, 23), mode="nearest")
    assert torch.equal(expected[:1, :, :14, :23], one)


@pytest.mark.parametrize("name", ["tiny_detr", "tiny_deformable_detr"])
def test_the_model_takes_sizes_as_a_tensor(name):
    torch.manual_seed(0)
    model, *_ = build_model(name, num_classes=5, aux_loss=False)
    model.eval()
    images = [torch.randn(3, *size) for size in ((64, 90), (80, 41))]
    samples = nested_tensor_from_tensor_list(images)
    with torch.no_grad():
        expected = model(samples)
        found = model(NestedTensor(samples.tensors, samples.mask, torch.tensor(samples.sizes)))
    torch.testing.assert_close(found["pred_logits"], expected["pred_logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"], atol=1e-5, rtol=0)


def test_what_is_refused(tmp_path, monkeypatch):
    file = checkpoint_file(tmp_path, "tiny_deformable_detr", dec_layers=1)
    detector = load(file)
    for options, message in (({"opset": 12}, "--opset 12"), ({"form": "tf"}, "use one of onnx, pt2"),
                             ({"form": "pt2", "precision": "int8"}, "--format onnx")):
        with pytest.raises(ValueError, match=message):
            exporting.export(detector, tmp_path / "model.onnx", pictures(), **options)
    with pytest.raises(ValueError, match="at least one"):
        exporting.export(detector, tmp_path / "model.onnx", [])
    detector.postprocessors["segm"] = torch.nn.Identity()
    with pytest.raises(ValueError, match="mask model.*no exported form"):
        exporting.trace(detector)
    with pytest.raises(ValueError, match="--eval --engine onnxruntime"):
        decide({"resume": "model.onnx", "eval": True})
    with pytest.raises(ValueError, match="ends? with .onnx"):
        decide({"resume": str(file), "eval": True, "engine": "onnxruntime"})
    with pytest.raises(ValueError, match="add --eval --resume model.onnx"):
        main.settle(main.get_args_parser().parse_args(["--engine", "onnxruntime"]))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        engines.session("model.onnx")


def test_pvt_with_exact_padding_is_refused(tmp_path):
    torch.manual_seed(0)
    model, *_ = build_model("detr_pvt_v2_b0", num_classes=5, enc_layers=1, dec_layers=1, num_queries=5)
    config = dataclasses.asdict(PRESETS["detr_pvt_v2_b0"].model) | {"enc_layers": 1, "dec_layers": 1, "num_queries": 5}
    file = tmp_path / "pvt.pth"
    checkpoint.save(file, {"model": model.state_dict(), "num_classes": 5,
                           "config": {"name": "detr_pvt_v2_b0", "model": config, "train": {}, "data": {}}})
    with pytest.raises(ValueError, match="pvt_v2_b0 has no exported form"):
        exporting.trace(load(file))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr_resnet50", "deformable_detr_resnet50", "deformable_detr_resnet50_two_stage"])
@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_published_models(name, form, tmp_path, real_data):
    without_packages()
    torch.manual_seed(0)
    source = tmp_path / f"{name}.pth"
    checkpoint.save(source, {"model": build_model(name)[0].state_dict()})
    detector = load(source, model=name)
    detector.preprocessing = dataclasses.replace(detector.preprocessing, size=256, max_size=400)
    files = sorted((real_data / "coco_mini" / "val2017").glob("*.jpg"))[:3]
    shown = [Image.open(file).convert("RGB") for file in files]
    with where_pytorch_can():
        report = exporting.export(detector, tmp_path / f"model.{form}", shown, form=form)
    assert report.file.is_file() and len(report.gaps) == 6


def test_the_script(tmp_path, capsys):
    """The pictures it compares on; and what cannot be asked for is refused before the checkpoint is read."""
    from scripts import export as script

    def run(*words: str) -> None:
        script.main(script.get_args_parser().parse_args(["--resume", str(tmp_path / "none.pth"), *words]))

    Image.new("RGB", (90, 70), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    assert [picture.size for picture in script.pictures([str(tmp_path / "a.png")], 3)] == [(90, 70)]
    assert len(script.pictures(None, 3)) == script.DRAWN
    with pytest.raises(ValueError, match="--images: .*broken.jpg cannot be read: .*leave it out"):
        script.pictures([str(tmp_path)], 3)
    (tmp_path / "folder.onnx").mkdir()
    for words, why in ((["--output", str(tmp_path / "folder.onnx")], "is a folder; name a file in it"),
                       (["--output", "m.pt2", "--half"], "pt2 is float32; for float16 use --format onnx"),
                       (["--output", "m.onnx", "--opset", "23"], "from 17 to 22 are known to work"),
                       (["--output", "m.pth"], "should end with .onnx or .pt2")):
        with pytest.raises(ValueError, match=why):
            run(*words)
    with pytest.raises(FileNotFoundError, match="none.pth"):
        run("--output", "m.onnx")


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_tables_say_which_file_they_are_of(precision):
    from scripts import export as script
    variant = None if precision == "float32" else exporting.Gap(1.5, 0.25)
    report = exporting.Report(Path("m.onnx"), 2_500_000, {"1x3x64x64": exporting.Gap(0.125, 0.0005)}, precision, variant,
                              ["a", "b"])
    lines = script.in_words(report)
    assert lines[-1] == f"written: m.onnx, {precision}, 2.5 MB"
    above = [lines[i - 1] for i, line in enumerate(lines) if line.startswith("  ")]
    if precision == "float32":
        assert above == ["m.onnx against PyTorch, by batch:"] and len(lines) == 3
    else:
        assert above[0] == "float32, not written, of which m.onnx is made, against PyTorch, by batch:"
        assert above[1].startswith("m.onnx, float16, against PyTorch") and "boxes 1.5 px, scores 0.25" in lines[3]
    assert "boxes 0.12 px, scores 0.0005  (allowed: 0.5 px, 0.001)" in lines[1]


def test_what_takes_long_is_said_before_and_after():
    told = []
    with exporting.timed("tracing the model", told.append):
        assert told == ["tracing the model ..."]
    assert len(told) == 2 and told[1].startswith("  done in ")
    with pytest.raises(OSError), exporting.timed("comparing", told.append):
        raise OSError
    assert len(told) == 3                                               # nothing of a time that tells nothing
