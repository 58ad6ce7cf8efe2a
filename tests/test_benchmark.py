"""scripts/benchmark.py: peers have the same weights, ratios are those of the medians, parts add up, and the fields of
table and json are there. No figure is judged here."""
from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import NUM_CLASSES, build_small, images, small_flags, targets
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detr.nested_tensor import nested_tensor_from_tensor_list
from detr.presets import PRESETS
from scripts import benchmark, peers

SIZE = (64, 96)
needs_transformers = pytest.mark.skipif(peers.missing("transformers") is not None, reason=str(
    peers.missing("transformers")))
PREPARES = importlib.util.find_spec("detr.inference") is not None


def case_of(*words: str, **changes):
    """The first case that a command line asks for, small and short."""
    args = benchmark.get_args_parser().parse_args(["--size", "64x96", "--threads", "1", "--repeats", "1", "--no_memory",
                                                   "--device", "cpu", *words])
    return benchmark.cases_of(args, torch.device("cpu"))[0] | {"matrix": 64} | changes


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(benchmark, "TURN", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def small_pair(name: str, **flags):
    """Our small model with weights that are nowhere at their start, its configuration and the peer."""
    flags = small_flags(name) | {"dropout": 0.0} | flags
    ours = build_small(name, **flags)[0]
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        if getattr(ours, "two_stage", False):       # by its bias alone, padding would be the best proposal
            ours.class_embed[-1].weight[0] = 4 * ours.transformer.enc_output_norm.weight * torch.randn(
                ours.transformer.d_model)
            ours.class_embed[-1].bias[0] = -3
    benchmark.settle(ours)
    config = benchmark.settings_of({"model": name, "flags": flags, "dropout": None})
    return ours.eval(), config, peers.transformers_peer(ours, config, NUM_CLASSES, 0.0)


VARIANTS = [("detr_resnet50", {}), ("detr_resnet50", {"position_embedding": "learned"}),
            ("detr_resnet50_dc5", {"enc_layers": 1}), ("deformable_detr_resnet50", {}),
            ("deformable_detr_resnet50_two_stage", {}), ("deformable_detr_resnet50_box_refine", {})]


@needs_transformers
@pytest.mark.parametrize("name, flags", VARIANTS)
def test_peer_predicts_the_same(name, flags):
    """Padded images of two sizes, and weights moved by a little are noticed."""
    ours, _, peer = small_pair(name, **flags)
    peer.model.eval()
    batch = nested_tensor_from_tensor_list(images((96, 128), (128, 70)))
    with torch.no_grad():
        found, theirs = ours(batch), peer.predict(batch)
        assert max(benchmark.agreeing(name, found, theirs).values()) < 1e-4
        assert found["pred_logits"].std(1).mean() > 1e-3                        # queries differ
        for part in ("backbone.model.layer3", "encoder.layers.0.", "decoder.layers.1.", "bbox_", "class_"):
            kept = {p: p.clone() for n, p in peer.model.named_parameters() if part in n and p.ndim > 1}
            for parameter in kept:
                parameter += 0.1 * torch.randn_like(parameter)
            with pytest.raises(RuntimeError, match="predicts something else"):
                benchmark.agreeing(name, found, peer.predict(batch))
            for parameter, before in kept.items():
                parameter.copy_(before)
    assert {p.data_ptr() for p in ours.parameters()}.isdisjoint(p.data_ptr() for p in peer.model.parameters())


@needs_transformers
def test_peer_trains_the_same_parameters():
    """As many numbers, and none of the stem; its loss has a gradient for each. (Its stem would train if left alone.)"""
    for name in ("detr_resnet50", "deformable_detr_resnet50"):
        ours, _, peer = small_pair(name)
        trained = [(n, p) for n, p in peer.model.named_parameters() if p.requires_grad]
        assert sum(p.numel() for _, p in trained) == sum(p.numel() for p in ours.parameters() if p.requires_grad)
        assert not [n for n, _ in trained if "backbone.model.conv1" in n or "layer1" in n]
        peer.model.train()
        peer.loss(nested_tensor_from_tensor_list(images(SIZE, SIZE)), targets(2, 3)).backward()
        assert [n for n, p in trained if p.grad is None] == []


@needs_transformers
@pytest.mark.parametrize("name, why", [("tiny_detr", "ProposalDETR"), ("tiny_deformable_detr", "backbone resnet_tiny"),
                                       ("detr_pvt_tiny", "backbone pvt_tiny"), ("detr_resnet50_panoptic", "--masks")])
def test_models_without_a_peer_are_named(name, why):
    with pytest.raises(ValueError, match=why):
        peers.transformers_peer(nn.Identity(), PRESETS[name].model, NUM_CLASSES)


def test_what_predicts_no_numbers_does_not_agree():
    fine = {"pred_logits": torch.zeros(1, 2, 3), "pred_boxes": torch.zeros(1, 2, 4)}
    broken = fine | {"pred_boxes": torch.full((1, 2, 4), torch.nan)}
    assert benchmark.agreeing("the same", fine, fine) == {"logits": 0.0, "boxes": 0.0}
    for pair in ((fine, broken), (broken, fine), (broken, broken)):
        with pytest.raises(RuntimeError, match="nothing was timed"):
            benchmark.agreeing("another", *pair)


def test_only_two_stage_queries_may_change_places():
    generator = torch.Generator().manual_seed(0)
    ours = {"pred_logits": torch.rand(2, 5, 3, generator=generator),
            "pred_boxes": torch.rand(2, 5, 4, generator=generator)}
    turned = {name: x.flip(1) for name, x in ours.items()}
    two_stage = ours | {"enc_outputs": {}}
    assert benchmark.agreeing("turned", two_stage, turned) == {"logits": 0.0, "boxes": 0.0}
    with pytest.raises(RuntimeError, match="predicts something else"):
        benchmark.agreeing("turned", ours, turned)
    doubled = turned | {"pred_boxes": turned["pred_boxes"][:, [0, 0, 1, 2, 3]]}         # one query twice, one not at all
    with pytest.raises(RuntimeError, match="predicts something else"):
        benchmark.agreeing("doubled", two_stage, doubled)


def test_ratios_and_spread():
    rounds = np.array([[1.0, 2.0, 4.0], [3.0, 8.0, 6.0], [9.0, 9.0, 9.0]])
    rows = [{"who": who, "form": "model", "precision": "float32", **benchmark.summary(seconds, 2)}
            for who, seconds in zip(("ours", "transformers", "retinanet"), rounds)]
    assert rows[0]["seconds"] == 2.0 and rows[0]["images_per_second"] == 1.0 and rows[1]["high"] == 8.0
    found = benchmark.ratios(rows, rounds)
    assert [(r["theirs"][0], r["ratio"], r["low"], r["high"]) for r in found] == [
        ("transformers", 3.0, 1.5, 4.0), ("retinanet", 4.5, 2.25, 9.0)]
    case = {"ratios": found}
    assert benchmark.ratio_text(case, rows[0], "float32") == "3.00x (1.50-4.00)"
    assert benchmark.ratio_text(case, rows[1], "float32") == benchmark.ratio_text(case, rows[0], "bf16") == ""


def test_parts_are_told_apart():
    """By a clock that each part moves on by a known amount: what is inside another part is not counted twice."""
    now = [0.0]
    parts = benchmark.Parts(lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    spend(1)
    with parts("decoder"):
        spend(10)
        with parts("heads"):
            spend(100)
        spend(20)
    with pytest.raises(KeyError), parts("loss"):
        spend(1000)
        raise KeyError
    parts.turn()
    assert parts.sums == {"rest": 1, "decoder": 30, "heads": 100, "loss": 1000}


@pytest.mark.parametrize("model", ["tiny_detr", "tiny_deformable_detr"])
def test_parts_of_a_step_add_up_and_change_nothing(model):
    """Every part of a training step is there, all together are the step, and losses and weights are those of a step that
    nobody watched; afterwards no hook is left."""
    case = case_of("--model", model, "--mode", "train", "--precision", "float32")
    device, results = torch.device("cpu"), []
    for watched in (False, True):
        ours = benchmark.OurModel(case, *benchmark.build(case, device), device)
        torch.manual_seed(3)
        begin = time.perf_counter()
        parts = benchmark.Parts(time.perf_counter) if watched else None
        losses = ours.run(ours.model, "float32", ours.size, parts)
        if parts:
            parts.turn()
            whole = time.perf_counter() - begin
            assert sum(parts.sums.values()) == pytest.approx(whole, rel=0.02, abs=2e-3)
            missing = {"encoder"} if model == "tiny_deformable_detr" else set()         # which has no layers
            assert set(parts.sums) | missing == set(benchmark.PARTS) and all(x > 0 for x in parts.sums.values())
            assert parts.inside == ["rest"]
        results.append((losses, [p.detach().clone() for p in ours.model.parameters()]))
        modules = (*ours.model.modules(), *ours.criterion.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def test_flops_are_those_of_pytorchs_counter():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 5))
    x = torch.randn(2, 3, 8, 8)
    counter, work = FlopCounterMode(display=False), benchmark.Work(peak=1e9, bandwidth=1e8)
    with counter:
        model(x).sum().backward()
    with work:
        model(x).sum().backward()
    assert work.sums[0] == counter.get_total_flops() > 0
    a, b = torch.ones(4, 6), torch.ones(6, 5)
    for peak, seconds in ((1e9, 296 / 1e8), (1e6, 240 / 1e6)):              # by what it moves, by what it computes
        with benchmark.Work(peak, bandwidth=1e8) as product:
            torch.relu_((a @ b).view(20)[:0])                               # views move nothing, and this one is empty
        assert product.sums.tolist() == pytest.approx([240, 296, seconds])  # 2 * 4 * 5 * 6; 4 * (24 + 30 + 20)


@pytest.mark.parametrize("fast", [False, True])
def test_bf16_where_it_is_fast(fast, monkeypatch):
    monkeypatch.setattr(benchmark, "fast_in_bf16", lambda device: fast)
    parser = benchmark.get_args_parser()
    for flags, wanted in (("", ["float32", "bf16"][:1 + fast]), ("--precision bf16", ["bf16"])):
        case = benchmark.cases_of(parser.parse_args(flags.split()), torch.device("cpu"))[0]
        assert case["precision"] == wanted


def test_fields(tmp_path, capsys, monkeypatch):
    """A whole run, forward and training, in this process; and its table and json."""
    monkeypatch.setattr(benchmark, "apart", lambda case, *side: benchmark.measure_memory(case, *side) if side
                        else benchmark.measure({**case, "matrix": 64}))
    file = tmp_path / "speed.json"
    args = benchmark.get_args_parser().parse_args(
        ["--model", "tiny_detr", "--size", "64x96", "--threads", "1", "--repeats", "2", "--device", "cpu",
         "--precision", "float32", "bf16", "--json", str(file)])
    benchmark.main(args)
    text, found = capsys.readouterr().out, json.loads(file.read_text())
    assert found["machine"]["threads"] == 1 and [case["mode"] for case in found["cases"]] == ["forward", "train"]
    forward, train = found["cases"]
    forms = ["model"] + ["prepared"] * PREPARES
    assert [(r["form"], r["precision"]) for r in forward["rows"]] == [(f, p) for p in ("float32", "bf16") for f in forms]
    assert [(r["form"], r["precision"]) for r in train["rows"]] == [("model", "float32"), ("model", "bf16")]
    for case in found["cases"]:
        assert set(case["rates"]) == {"float32", "bf16", "copy"} and set(case["limits"]) == {"float32", "bf16"}
        for row in case["rows"]:
            assert row["images_per_second"] == pytest.approx(case["batch"] / row["seconds"])
            assert row["low"] <= row["seconds"] <= row["high"] and len(row["wall_seconds"]) == 2
            assert row["share_of_peak"] == pytest.approx(
                row["flops"] / row["seconds"] / case["rates"][row["precision"]])
            assert sum(part["share"] for part in row["parts"].values()) == pytest.approx(1)
            assert row["peak_bytes"] >= 0 and f"ours ({row['form']})" in text
    assert "backward" in train["rows"][0]["parts"] and "backward" not in forward["rows"][0]["parts"]
    assert train["limits"]["float32"]["backward"]["flops"] > train["limits"]["float32"]["backbone"]["flops"]
    for word in ("images/s", "of peak", "peak MB", "matching", "FLOP/byte", "limit ms"):
        assert word in text


@needs_transformers
def test_comparison_has_ratios():
    compared = ["transformers", "retinanet"]
    case = case_of("--model", "detr_resnet50", "--mode", "train", "--compare", *compared, "--precision", "float32",
                   "--no_parts", "--flags", *(f"{name}={value}" for name, value in small_flags("detr_resnet50").items()))
    found = benchmark.measure(case)
    rows = {(row["who"], row["form"]): row["seconds"] for row in found["rows"]}
    assert set(rows) == {("ours", "model"), ("ours", "folded"), *((who, "model") for who in compared)}
    assert max(found["differences"]["transformers"].values()) < 1e-4
    assert {(r["ours"][0], r["theirs"][0]): r["ratio"] for r in found["ratios"]} == {
        (form, who): pytest.approx(rows[who, "model"] / rows["ours", form])
        for form in ("model", "folded") for who in compared}


def test_absent_peers_are_named(monkeypatch):
    monkeypatch.setattr(peers, "missing", lambda package: f"{package} is not installed")
    found = benchmark.measure(case_of("--model", "tiny_detr", "--mode", "forward", "--compare", "--precision", "float32"))
    assert {row["who"] for row in found["rows"]} == {"ours"}
    assert found["left_out"].items() >= {"transformers": "transformers is not installed",
                                         "retinanet": "torchvision is not installed"}.items()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("words, why", [(["--device", "cuda"], "sees no GPU here"), (["--repeats", "0"], "--repeats 0"),
                                        (["--cuda_graphs", "--device", "cpu"], "--cuda_graphs: graphs are of forward")])
def test_refusals(words, why):
    with pytest.raises(SystemExit, match=why):
        benchmark.main(benchmark.get_args_parser().parse_args(words))


def test_graphs_that_were_not_replayed():
    graphs = benchmark.CudaGraphs()
    graphs.plain["the first of their shape"], graphs.recorded, graphs.replayed = 2, 2, 9
    assert benchmark.only_replayed({"prepared, graphs float32": graphs})["prepared, graphs float32"] == str(graphs)
    graphs.plain["with hooks"] += 1
    with pytest.raises(RuntimeError, match="graphs float32: what was timed is no replay. CUDA graphs: 9 of 14"):
        benchmark.only_replayed({"prepared, graphs float32": graphs})


def test_flags_and_sizes():
    assert benchmark.flags_of(["a=3", "b=resnet18", "c=(8, 16)"]) == {"a": 3, "b": "resnet18", "c": (8, 16)}
    with pytest.raises(ValueError, match="NAME=VALUE"):
        benchmark.flags_of(["a"])
    with pytest.raises(SystemExit):
        benchmark.get_args_parser().parse_args(["--size", "800"])
    with pytest.raises(TypeError, match="nonsense"):
        benchmark.settings_of(case_of("--flags", "nonsense=1"))


@pytest.mark.parametrize("name", sorted(file.stem for file in Path(benchmark.__file__).parent.glob("benchmark*.py")))
def test_every_flag_of_a_benchmark_says_what_it_is(name, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(benchmark.__file__).parent))           # as for a program that is run
    module = importlib.import_module(f"scripts.{name}")
    parser = (getattr(module, "get_args_parser", None) or module.build_parser)()
    assert [action.dest for action in parser._actions if not action.help] == []
