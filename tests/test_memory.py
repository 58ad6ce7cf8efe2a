"""Memory: checkpointed and compiled models against plain ones, the probe against allocations of a known size, advice
under a simulated cap."""
from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from small_models import build_small, images, targets
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detr import memory
from detr.decoder import TransformerDecoderLayer
from detr.encoder import TransformerEncoder, TransformerEncoderLayer
from detr.memory import Measure, advice, auto_batch_size, checkpoint_activations, compile_model, worst_batch

CPU = torch.device("cpu")
MB = 10 ** 6
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
TIMM = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


class Cap(TorchDispatchMode):
    """Counts the bytes of all tensors that come about and are still there; more than ``limit`` do not fit."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self.limit, self.peak = limit, 0
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        given = {storage._cdata for storage in storages((args, kwargs))}            # views of them are nothing new
        for storage in storages(out):
            if storage._cdata not in given:
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        used = sum(size for _, size in self.live.values())
        self.peak = max(self.peak, used)
        if used > self.limit:
            raise torch.OutOfMemoryError(f"{used} bytes")
        return out

    @property
    def used(self) -> int:
        return sum(size for held, size in self.live.values() if not held.expired())


def storages(values) -> list:
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor) and x.layout == torch.strided]


def loss_of(model: nn.Module, criterion: nn.Module, samples: list[Tensor], truth: list, amp: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        outputs = model(samples, truth) if getattr(model, "takes_targets", False) else model(samples)
    return criterion.weighted_sum(criterion(outputs, truth))


def gradients(model: nn.Module, *args, **kwargs) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.train().zero_grad()
    loss_of(model, *args, **kwargs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Activation checkpointing

TINY = {"backbone": "resnet_tiny", "dropout": 0.1}
CASES = [
    ("detr_resnet50", TINY, False),
    ("detr_resnet50", TINY | {"padding": "exact", "pre_norm": True, "backbone_norm": "group"}, True),
    ("detr_resnet50_panoptic", TINY, False),
    ("deformable_detr_resnet50_two_stage", TINY | {"padding": "exact"}, True),
    ("detr_pvt_v2_b2", {"backbone": "pvt_v2_b0", "dropout": 0.1}, False),
    pytest.param("detr_resnet50", {"backbone": "timm/resnet10t", "padding": "exact"}, False, marks=TIMM),
    pytest.param("detr_resnet50", {"backbone": "timm/convnext_atto", "padding": "exact"}, True,
                 marks=[TIMM, pytest.mark.slow]),
    pytest.param("detr_resnet50", {"backbone": "timm/vit_tiny_patch16_224", "feature_strides": (16,)}, False, marks=TIMM),
]


@pytest.mark.parametrize("name, flags, amp", CASES)
def test_gradients_stay_the_same(name, flags, amp):
    model, criterion, _ = build_small(name, **flags)
    samples, truth = images((64, 96), (96, 64)), targets(2, 3, size=(64, 64))
    expected = gradients(model, criterion, samples, truth, amp=amp)
    parts = checkpoint_activations(model)
    assert any(".body." in part for part in parts) and any("encoder.layers.1" in part for part in parts)
    found = gradients(model, criterion, samples, truth, amp=amp)
    assert found.keys() == expected.keys() and any(value.abs().max() > 0 for value in expected.values())
    for parameter, value in expected.items():
        torch.testing.assert_close(found[parameter], value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name, share", [("detr_resnet50", 0.6), ("deformable_detr_resnet50", 0.3),
                                         ("detr_pvt_v2_b2", 0.5)])
def test_less_is_kept(name, share):
    model, criterion, _ = build_small(name, enc_layers=4, backbone="pvt_v2_b0" if "pvt" in name else "resnet18")
    kept = []
    for _ in range(2):
        with Cap() as cap:
            loss = loss_of(model.train(), criterion, images((128, 160)), targets(2))
            kept.append(cap.used)
            del loss
        checkpoint_activations(model)
    assert kept[1] < share * kept[0]


def test_the_model_stays_what_it_was():
    model, _, _ = build_small("detr_resnet50")
    before = copy.deepcopy(model)
    parts = checkpoint_activations(model)
    assert checkpoint_activations(model) == parts                                   # twice is once
    assert list(model.state_dict()) == list(before.state_dict())
    assert [type(x) for x in model.modules()] == [type(x) for x in before.modules()]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.transformer.encoder.layers.parameters():
            parameter.zero_()
    calls = []
    samples = images((64, 96))
    model.transformer.encoder.layers[-1].register_forward_hook(lambda *_: calls.append("layer"))
    for module in (before, model, twin):
        module.train()
    torch.manual_seed(0)
    expected = before(samples)["pred_logits"]
    torch.manual_seed(0)
    torch.testing.assert_close(model(samples)["pred_logits"], expected, atol=0, rtol=0)
    torch.manual_seed(0)
    assert (twin(samples)["pred_logits"] - expected).abs().max() > 1e-3             # a copy computes with its own weights
    assert calls == ["layer"]


def test_the_notebook_sees_each_pass_once():
    model, _, _ = build_small("detr_resnet50")
    checkpoint_activations(model.eval())
    seen = []
    encoder, decoder = model.transformer.encoder, model.transformer.decoder
    hooks = [model.backbone[-2].register_forward_hook(lambda self, x, y: seen.append(y["0"].tensors)),
             encoder.layers[-1].self_attn.register_forward_hook(lambda self, x, y: seen.append(y[1])),
             decoder.layers[-1].multihead_attn.register_forward_hook(lambda self, x, y: seen.append(y[1]))]
    with torch.no_grad():
        model(images((64, 96)))
    for hook in hooks:
        hook.remove()
    assert [tuple(x.shape) for x in seen] == [(1, 512, 2, 3), (1, 6, 6), (1, 7, 6)]


def test_running_statistics_are_updated_once(capsys):
    model, criterion, _ = build_small("detr_resnet50", backbone_norm="batch")
    plain = copy.deepcopy(model)
    parts = checkpoint_activations(model)
    assert not any(".body." in part for part in parts)
    assert "backbone.0.body.layer2.0 and 5 more would be updated twice" in capsys.readouterr().out
    for one in (model, plain):
        gradients(one, criterion, images((64, 96), (64, 64)), targets(2, 3))
    for (name, found), (_, expected) in zip(model.named_buffers(), plain.named_buffers()):
        assert torch.equal(found, expected), name


def test_frozen_stages_keep_nothing_anyway():
    model, _, _ = build_small("detr_resnet50", frozen_stages=2)
    assert [part for part in checkpoint_activations(model) if "body" in part] == [
        f"backbone.0.body.layer{i}.{j}" for i in (3, 4) for j in (0, 1)]


def test_nothing_to_checkpoint():
    with pytest.raises(ValueError, match="--activation_checkpointing: Linear has no encoder.layers"):
        checkpoint_activations(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="body.layer1.0 and 1 more would be updated twice; leave"):
        model, _, _ = build_small("tiny_deformable_detr")
        model.transformer.decoder.layers = nn.ModuleList()
        model.backbone[0].body.layer3 = nn.Sequential()
        checkpoint_activations(model)


def test_freed_memory_is_kept_where_the_library_can(monkeypatch):
    """What glibc is asked for, and that others are left alone."""
    asked = []
    libc = type("C", (), {"mallopt": lambda self, option, value: asked.append((option, value)) or 1})()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: libc)
    assert memory.keep_freed_memory() is True
    assert asked == [(-4, 0), (-1, -1)]                         # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is False


# Compilation

@pytest.fixture
def traced(monkeypatch):
    """``torch.compile`` up to the compiler: what it traces is run as it is, which takes seconds instead of minutes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    memory.compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    memory.compiled.cache_clear()
    torch._dynamo.reset()


SIZES = [[(64, 96), (96, 64)], [(64, 64), (32, 64)], [(96, 128), (96, 128)],
         [(100, 131), (128, 90)], [(160, 32), (32, 160)], [(64, 160), (64, 160)]]


def compare(model: nn.Module, eager: nn.Module, criterion: nn.Module, sizes: list[list[tuple[int, int]]]) -> None:
    for batch in sizes:
        samples, truth = images(*batch), targets(2, 3)
        with torch.no_grad():
            found, expected = model.eval()(samples), eager.eval()(samples)
        for part in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(found[part], expected[part], atol=1e-4, rtol=0)
        expected = gradients(eager, criterion, samples, truth)
        for name, value in gradients(model, criterion, samples, truth).items():
            scale = max(1.0, float(expected[name].abs().max()))
            torch.testing.assert_close(value, expected[name], atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_layers_are_traced_whole(traced, training):
    """Dense layers, with dropout and padding, leave nothing to Python. (Deformable attention has kernels of its own.)"""
    encoder, decoder = TransformerEncoderLayer(32, 4, 64, 0.1), TransformerDecoderLayer(32, 4, 64, 0.1)
    tokens, queries = torch.randn(2, 10, 32, requires_grad=training), torch.randn(2, 5, 32)
    mask = torch.arange(10) >= torch.tensor([[10], [7]])
    for layer, given in ((encoder, (tokens, mask, tokens)), (decoder, (queries, queries, tokens, tokens, mask))):
        found = torch.compile(layer.train(training), fullgraph=True)(*given)        # raises where a graph would break
        if not training:
            torch.testing.assert_close(found, layer(*given))


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", [
    ("detr_resnet50", {}), ("detr_resnet50", {"padding": "exact", "checkpointing": True}),
    ("deformable_detr_resnet50_two_stage", {}), ("deformable_detr_resnet50", {"padding": "exact"})])
def test_what_is_traced_computes_the_same(traced, name, flags):
    flags = dict(flags)
    checkpointing = flags.pop("checkpointing", False)
    model, criterion, _ = build_small(name, dropout=0.0, backbone="resnet_tiny", **flags)
    eager = copy.deepcopy(model)
    parts = compile_model(model)
    assert parts == [f"transformer.{stack}.layers.{i}" for stack in ("encoder", "decoder") for i in (0, 1)]
    assert list(model.state_dict()) == list(eager.state_dict())
    if checkpointing:
        checkpoint_activations(model)
    compare(model, eager, criterion, SIZES[:3])                                     # with padding, and without
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compare(model, eager, criterion, SIZES[3:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs         # new sizes are not compiled anew


def test_no_variant_is_left_to_python(traced):
    """All that a training and its evaluations meet, which is more than the eight variants that PyTorch compiles by
    default: the ninth would run uncompiled, and say so in PyTorch's log alone."""
    model = nn.ModuleDict({"encoder": TransformerEncoder(1, 16, 2, 32, dropout=0.0)})
    compile_model(model)
    x, mask = torch.randn(2, 12, 16), torch.zeros(2, 12, dtype=torch.bool)
    for training, batch, padded, gradient in itertools.product((True, False), (1, 2), (True, False), (True, False)):
        with torch.set_grad_enabled(gradient):
            model.train(training)["encoder"](x[:batch], mask[:batch] if padded else None, x[:batch])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 8
    assert not any("recompile_limit" in reason for reason in torch._dynamo.utils.counters["unimplemented"])
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"]


def test_layers_are_traced_once_and_hooks_noticed(traced):
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": TransformerEncoder(3, 16, 2, 32, dropout=0.0)})
    eager = copy.deepcopy(model)
    assert compile_model(model) == [f"encoder.layers.{i}" for i in range(3)]
    for b, rows, columns in ((2, 3, 4), (3, 5, 2), (2, 4, 4)):
        x = torch.randn(b, 16, rows, columns).flatten(2).mT                         # a view, as feature maps' tokens are
        mask = torch.zeros(b, rows, columns, dtype=torch.bool).flatten(1)
        found, expected = (one["encoder"](x, mask, x) for one in (model, eager))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        for one, y in ((model, found), (eager, expected)):
            one.zero_grad()
            y.square().sum().backward()
        for p, q in zip(model.parameters(), eager.parameters()):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3      # tokens with a gradient, and without; a trial
    weights = []
    hook = model["encoder"].layers[1].self_attn.register_forward_hook(lambda self, x, y: weights.append(y[1]))
    model["encoder"](x, mask, x)
    hook.remove()
    model["encoder"](x, mask, x)
    assert [tuple(one.shape) for one in weights] == [(2, 16, 16)]


def test_a_compiler_that_fails_is_one_message(monkeypatch):
    def no_compiler(*args, **kwargs):
        raise OSError("g++: command not found\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    model, _, _ = build_small("detr_resnet50")
    with pytest.raises(RuntimeError, match="^--compile: .*OSError: g\\+\\+: command not found. Leave --compile out"):
        compile_model(model)
    with pytest.raises(ValueError, match="--compile: Linear has no encoder.layers"):
        compile_model(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", [("detr_resnet50", {}), ("detr_resnet50", {"padding": "exact"}),
                                         ("deformable_detr_resnet50", {"padding": "exact"})])
def test_what_is_compiled_computes_the_same(name, flags):
    torch._dynamo.reset()
    memory.compiled.cache_clear()
    model, criterion, _ = build_small(name, dropout=0.0, backbone="resnet_tiny", **flags)
    eager = copy.deepcopy(model)
    try:
        compile_model(model)
    except RuntimeError as error:
        pytest.skip(str(error))
    compare(model, eager, criterion, SIZES)


# The batch that fits

def test_worst_batch():
    sizes = [(480, 640), (800, 1333), (1333, 800), (1000, 1000), (600, 600)]
    objects = [3, 40, 1, 7, 0]
    assert worst_batch(sizes, objects, 1) == (1333, 800, (40,))
    assert worst_batch(sizes, objects, 3) == (1333, 1333, (40, 7, 3))               # a wide and a tall one share a batch
    assert worst_batch(sizes, objects, 2, alike=True) == (1333, 1000, (40, 7))
    assert worst_batch(sizes[:1], objects[:1], 3) == (480, 640, (3, 3, 3))
    with pytest.raises(ValueError, match="among 0 sizes"):
        worst_batch([], [], 2)


@LINUX
def test_probe_measures_what_is_allocated():
    kept = []

    def step(b: int) -> None:
        if not kept:
            kept.append(torch.ones(10 * MB))                                        # 40 MB that stay, as optimizers have
        torch.ones(b * 16 * MB)                                                     # 64 MB an image

    before = memory.used_memory(CPU)
    measure = memory.probe(step, CPU, limit=before + 500 * MB)
    assert measure.per_image == pytest.approx(64 * MB, rel=0.1)
    assert measure.base - before == pytest.approx(40 * MB, abs=16 * MB)
    assert measure.largest == 7                                                     # (500 - 40) / 64
    assert memory.memory_limit(CPU) > before


@LINUX
def test_two_images_that_do_not_fit():
    def step(b: int) -> None:
        if b > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert memory.probe(step, CPU, limit=10 ** 12).largest == 1


def training(step_size: int = 0):
    """A model with all kinds of state, in the middle of training, and a step that changes all of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(b: int) -> None:
        torch.ones(b * step_size * MB // 4)
        optimizer.zero_grad()
        model.train()(torch.randn(b + 1, 4)).sum().backward()
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()

    return model, optimizer, step


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list:
    return copy.deepcopy([model.state_dict(), optimizer.state_dict(), torch.get_rng_state(),
                          [p.grad for p in model.parameters()], [m.training for m in model.modules()]])


@pytest.mark.parametrize("begun", [False, True])
def test_everything_is_as_before(begun):
    model, optimizer, step = training()
    if begun:
        step(1)
    model.eval()
    before = everything(model, optimizer)
    with pytest.raises(KeyError), memory.untouched(model, optimizer, CPU):
        step(2)
        step(3)
        changed = everything(model, optimizer)
        raise KeyError
    assert len(changed[1]["state"]) == 6 and changed[0]["0.weight"].ne(before[0]["0.weight"]).any()
    torch.testing.assert_close(everything(model, optimizer), before, atol=0, rtol=0)
    step(1)


@LINUX
def test_auto_batch_size():
    model, optimizer, step = training(64)
    before = everything(model, optimizer)

    def choose(**options):
        given = {"images": 100, "limit": memory.used_memory(CPU) + 500 * MB} | options
        return auto_batch_size(step, model, optimizer, CPU, **given)

    found, report = choose()
    assert found in (6, 7) and "the most that fits" in report and "estimated" in report
    assert choose(images=3)[0] == 3
    found, report = choose(global_batch_size=16)
    assert found == 4 and "largest divisor of 16" in report                         # 8 would not fit, 7 does not divide
    assert choose(images=1)[0] == 1
    torch.testing.assert_close(everything(model, optimizer), before, atol=0, rtol=0)
    with pytest.raises(RuntimeError, match="--auto_batch_size: not even one image fits.* use --activation_checkpointing"):
        choose(limit=memory.used_memory(CPU) + MB)


def test_where_memory_cannot_be_measured(monkeypatch):
    with pytest.raises(ValueError, match="memory of meta cannot be measured: give --batch_size"):
        memory.memory_limit("meta")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ValueError, match="on Windows cannot be measured"):
        memory.peak_memory(lambda: None, CPU)


@pytest.mark.parametrize("version", [1, 2])
def test_containers_limit_memory(tmp_path: Path, version):
    own, top = tmp_path / "cgroup", tmp_path / ("memory" if version == 1 else "")
    own.write_text("4:memory:/a/b\n1:cpu:/\n" if version == 1 else "0::/a/b\n")
    limit, used, inactive = (("memory.max", "memory.current", "inactive_file") if version == 2 else
                             ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    for folder, most in ((top / "a" / "b", "max" if version == 2 else str(2 ** 62)), (top / "a", "1000")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text("700\n")
        (folder / "memory.stat").write_text(f"anon 500\n{inactive} 200\n")
    assert min(memory.cgroup_room(own, tmp_path)) == 500
    assert memory.cgroup_room(tmp_path / "none", tmp_path) == []


# Out of memory

def test_errors_that_mean_out_of_memory():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2 ** 58)
    assert memory.out_of_memory(error.value)
    caused = ValueError("a step failed")
    caused.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    for one in (torch.OutOfMemoryError(), MemoryError(), caused, RuntimeError("CUDA error: out of memory")):
        assert memory.out_of_memory(one)
    for other in (RuntimeError("shapes cannot be multiplied"), KeyError("out of memory"), None):
        assert not memory.out_of_memory(other)


SETTINGS = {"batch_size": 4, "global_batch_size": 0, "activation_checkpointing": False, "amp": "off",
            "bucket_train": False, "image_size": "800", "max_size": 1333, "backbone_norm": "batch"}


def test_advice_without_measurements():
    text = advice([4, 3, 800, 1333], 45, SETTINGS, where="epoch 3, step 17", used=9 * 10 ** 9, limit=11 * 10 ** 9)
    lines = text.splitlines()
    assert lines[0].startswith("out of memory at epoch 3, step 17: a batch [4, 3, 800, 1333] with 45 objects, 9.00 GB in "
                               "use of 11.00 GB.")
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "--batch_size 2 --global_batch_size 4", "--activation_checkpointing", "--amp bf16", "--bucket_train",
        "--image_size 600 --max_size 999", "--image_size 400 --max_size 666"]
    assert "batch norms see 2 images" in lines[1]


def test_advice_uses_what_was_measured_and_repeats_nothing():
    settings = SETTINGS | {"batch_size": 6, "global_batch_size": 24, "activation_checkpointing": True, "amp": "bf16",
                           "bucket_train": True, "image_size": "160x320"}
    text = advice([6, 3, 160, 320], 9, settings, measure=Measure(10 ** 9, 2 * 10 ** 9, 8 * 10 ** 9), world_size=2)
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == [
        "--batch_size 3 --global_batch_size 24", "--image_size 120x240", "--image_size 80x160"]
    assert "about 7.00 GB" in text


def step_with(settings: dict, limit: float) -> int:
    """A training step of a small DETR under a cap, with what the settings say; its peak. One image after the other where
    batches are smaller."""
    model, criterion, _ = build_small("detr_resnet50", backbone="resnet_tiny", enc_layers=5, dim_feedforward=768)
    if settings["activation_checkpointing"]:
        checkpoint_activations(model)
    side, batch = int(settings["image_size"]) * 160 // 800, settings["batch_size"]
    with Cap(limit) as cap:
        gradients(model, criterion, images(*[(side, side)] * batch), targets(*[2] * batch), amp=settings["amp"] == "bf16")
    return cap.peak


def test_advice_under_a_simulated_cap():
    limit = 0.6 * step_with(SETTINGS, float("inf"))

    def fits(flags: dict) -> bool:
        try:
            return step_with(SETTINGS | flags, limit) <= limit
        except torch.OutOfMemoryError as error:
            assert memory.out_of_memory(error)
            return False

    with pytest.raises(torch.OutOfMemoryError) as error:
        step_with(SETTINGS, limit)
    assert memory.out_of_memory(error.value)
    text = advice([4, 3, 160, 160], 8, SETTINGS, fits=fits)
    assert "With each of these the largest batch of this data fits, tried" in text
    # Bfloat16 alone would take 0.7 of the memory, and is not named; nor is what changes nothing for images of one size.
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == [
        "--batch_size 2 --global_batch_size 4", "--activation_checkpointing", "--image_size 600 --max_size 999"]


def test_advice_where_one_flag_is_not_enough():
    enough = {"activation_checkpointing", "batch_size"}
    text = advice([4, 3, 160, 160], 8, SETTINGS, fits=lambda flags: flags.keys() >= enough)
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == [
        "--batch_size 1 --global_batch_size 4 --activation_checkpointing"]


def test_advice_where_nothing_fits():
    text = advice([4, 3, 160, 160], 8, SETTINGS, fits=lambda flags: False)
    assert len(text.splitlines()) == 1 and "use a smaller --model or --backbone" in text
