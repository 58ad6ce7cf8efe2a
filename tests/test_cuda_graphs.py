"""Prediction as CUDA graphs. Without a GPU, PyTorch's tracer stands in for one: like a graph it records the operations of
one call, with all that Python decided and all tensors that were there, and repeats them on what is in these by then."""
import contextlib
import copy

import pytest
import torch
from small_models import build_small
from torch.fx.experimental.proxy_tensor import make_fx

from detr import list_models, transfer
from detr.attention_maps import explain
from detr.cuda_graphs import CudaGraphs, copied, use_cuda_graphs
from detr.deformable_attention import ENVIRONMENT
from detr.inference import for_prediction
from detr.memory import Forward
from detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

MASKS = {"masks": True, "hidden_dim": 128}
SMALL = [(name, {}) for name in list_models() if name.startswith("tiny_")] + [
    ("detr_resnet50", {}), ("detr_resnet50", MASKS), ("dino_resnet50_4scale", MASKS),
    ("detr_resnet50", {"backbone": "pvt_tiny"})]
SIZES = {"alike": [(64, 96), (64, 96)], "unlike": [(64, 96), (50, 64)]}


class Traced(CudaGraphs):
    """Graphs of a CPU's operations."""

    def check(self, model, device):
        pass

    def record(self, run):
        run()
        traced = make_fx(run)()
        outputs = traced()
        flat, spec = torch.utils._pytree.tree_flatten(outputs)

        def replay():
            for place, value in zip(flat, torch.utils._pytree.tree_leaves(traced()), strict=True):
                if isinstance(place, torch.Tensor):
                    place.copy_(value)

        return replay, outputs


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """What CPUs do in their own way, since there it costs no waiting."""
    if not torch.cuda.is_available():
        on_cpu = NestedTensor.padded.fget
        monkeypatch.setattr(NestedTensor, "padded", property(lambda samples: on_cpu(samples.to("meta"))))
        monkeypatch.setenv(ENVIRONMENT, "definition")


def with_graphs(model, most=16):
    Forward.of(model).call = Traced(most)
    return model, model.forward.call


def images(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def test_needs_a_gpu():
    model = build_small("tiny_detr")[0].eval()
    use_cuda_graphs(model)
    with pytest.raises(ValueError, match="CUDA graphs need a GPU of NVIDIA, and the images are on cpu: leave CUDA gr"):
        model(images(SIZES["alike"], 0))
    with pytest.raises(ValueError, match="most is 0"):
        use_cuda_graphs(model, 0)


def test_not_in_training():
    model = build_small("tiny_detr")[0]
    with pytest.raises(ValueError, match="DETR is in training: call eval"):
        CudaGraphs().check(model.train(), torch.device("cuda"))
    CudaGraphs().check(model.eval(), torch.device("cuda"))


@pytest.mark.parametrize("sizes, padding", [("unlike", "exact"), *(
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("alike", "exact"), ("unlike", "legacy"), ("alike", "legacy")))])
@pytest.mark.parametrize("name, flags", [
    pytest.param(name, flags, marks=() if name.startswith("tiny") else pytest.mark.slow) for name, flags in SMALL])
def test_nothing_of_the_images_is_recorded(name, flags, padding, sizes):
    plain = for_prediction(build_small(name, padding=padding, **flags)[0])
    model, graphs = with_graphs(copy.deepcopy(plain))
    for seed in range(4):
        batch = images(SIZES[sizes], seed)
        with torch.no_grad():
            expected, found = plain(batch), model(batch)
        assert found.keys() == expected.keys()
        for key in ("pred_logits", "pred_boxes", *({"pred_masks"} & expected.keys())):
            torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-5)
        assert found.get("mask_sizes") == expected.get("mask_sizes")
    assert (graphs.plain, graphs.recorded, graphs.replayed) == (1, 1, 2)
    assert str(graphs) == "CUDA graphs: 2 of 4 batches replayed, 1 recorded, 1 run as without (a shape's first, or hooks)"


@pytest.fixture
def model():
    return with_graphs(for_prediction(build_small("tiny_detr")[0]))


def test_results_stay(model):
    """What one call gave is not overwritten by the next."""
    detector, _ = model
    found = [detector(images(SIZES["alike"], seed))["pred_logits"] for seed in (1, 1, 2, 1)]
    assert torch.equal(found[1], found[3]) and not torch.equal(found[1], found[2])


def test_a_graph_for_each_shape(model):
    detector, graphs = model
    for sizes in (SIZES["alike"], SIZES["unlike"], [(64, 96), (64, 64)], [(64, 96)], [(64, 64)]):
        detector(images(sizes, 0))
        detector(images(sizes, 1))
    assert (graphs.plain, graphs.recorded, graphs.replayed) == (5, 5, 0)        # as padded, images 1 and 2 are alike
    with torch.autocast("cpu", torch.bfloat16):
        detector(images([(64, 64)], 0))
    assert graphs.plain == 6                                                    # what is computed in counts, too


def test_moved_weights_are_recorded_anew():
    detector, graphs = with_graphs(for_prediction(build_small("tiny_conditional_detr")[0]))
    batch = images(SIZES["alike"], 0)
    before = [detector(batch) for _ in range(3)][-1]
    with torch.no_grad():
        detector.class_embed.bias += 1                                          # in place: a graph reads what is there
    torch.testing.assert_close(detector(batch)["pred_logits"], before["pred_logits"] + 1)
    detector.class_embed.bias = torch.nn.Parameter(detector.class_embed.bias.detach() + 1, requires_grad=False)
    torch.testing.assert_close(detector(batch)["pred_logits"], before["pred_logits"] + 2)
    assert (graphs.plain, graphs.recorded, graphs.replayed) == (2, 1, 2)


def test_the_graphs_used_last_are_kept():
    detector, graphs = with_graphs(for_prediction(build_small("tiny_detr")[0]), most=2)
    for side in (32, 64, 96):
        detector(images([(side, side)], 0))
    for side in (32, 64, 32, 96, 32, 64):
        detector(images([(side, side)], 0))
    assert (graphs.plain, graphs.recorded, graphs.replayed) == (3, 4, 2)        # 64 went for 96, and came again


def test_hooks_are_called(model):
    detector, graphs = model
    batch, seen = images(SIZES["alike"], 0), []
    for _ in range(3):
        detector(batch)
    hook = detector.transformer.decoder.layers[0].register_forward_hook(lambda *args: seen.append(1))
    detector(batch)
    hook.remove()
    assert seen == [1] and (graphs.plain, graphs.replayed) == (2, 1)
    explanation = explain(detector, batch[0])
    assert len(explanation.decoder) == len(detector.transformer.decoder.layers)


def test_sizes_that_nobody_knows(model):
    detector, graphs = model
    batch = nested_tensor_from_tensor_list(images(SIZES["alike"], 0))
    for _ in range(3):
        detector(NestedTensor(*batch.decompose()))
    assert (graphs.plain, graphs.recorded) == (3, 0)


def test_a_copy_records_for_itself(model):
    detector, graphs = model
    for _ in range(3):
        detector(images(SIZES["alike"], 0))
    other = copy.deepcopy(detector).forward.call
    assert isinstance(other, Traced) and other.recorded == 0 and graphs.recorded == 1


def test_what_cannot_be_recorded(monkeypatch, model):
    detector, graphs = model

    def fail(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "record", fail)
    detector(images(SIZES["alike"], 0))
    with pytest.raises(RuntimeError, match="ProposalDETR could not be recorded: operation not permitted .*Leave CUDA g"):
        detector(images(SIZES["alike"], 0))


def test_copies_of_outputs():
    x = torch.zeros(2)
    found = copied({"a": [x, (1, None)], "b": x})
    assert found["b"] is not x and found["a"][1] == (1, None) and torch.equal(found["a"][0], x)
    with pytest.raises(TypeError, match="outputs hold a object"):
        copied([object()])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("padding", ["legacy", "exact"])
@pytest.mark.parametrize("name, flags", SMALL)
def test_no_copy_from_the_host(name, flags, padding, sizes, monkeypatch):
    """A graph cannot have one. Numbers reach the device through ``on_device`` alone, and once."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    model = for_prediction(build_small(name, padding=padding, **flags)[0]).to("meta")
    batch, kept = nested_tensor_from_tensor_list(images(SIZES[sizes], 0)).to("meta"), {}
    with torch.no_grad(), transfer.keeping(kept):
        model(batch)
        before = len(kept)
        with Watch():
            model(batch)
    assert len(kept) == before


class Watch(torch.overrides.TorchFunctionMode):
    """Fails where a tensor goes from the CPU to another device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.device.type == "meta":
            given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            copying = func in (torch.tensor, torch.as_tensor) and not given
            assert not copying and all(x.device.type == "meta" or x.dim() == 0 for x in given), (func, args)
        return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("name, flags", SMALL)
def test_on_a_gpu(name, flags, precision):
    from detr.precision import autocast
    plain = for_prediction(build_small(name, padding="exact", **flags)[0], precision).cuda()
    model = copy.deepcopy(plain)
    graphs = use_cuda_graphs(model)
    for sizes in SIZES.values():
        for seed in range(4):
            batch = [image.cuda() for image in images(sizes, seed)]
            with torch.no_grad(), autocast(torch.device("cuda"), precision):
                expected, found = plain(batch), model(batch)
            for key in ("pred_logits", "pred_boxes"):
                torch.testing.assert_close(found[key], expected[key], atol=1e-4, rtol=1e-4)
    assert (graphs.plain, graphs.recorded, graphs.replayed) == (2, 2, 4)
