"""Prediction as CUDA graphs. Without a GPU, PyTorch's tracer stands in for one: like a graph it records the operations of
one call, with all that Python decided and all tensors that were there, and repeats them on what is in these by then."""
import contextlib
import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from small_models import build_small
from torch.fx.experimental.proxy_tensor import make_fx

from detr import cuda_graphs, list_models, transfer
from detr.attention_maps import explain
from detr.cuda_graphs import CudaGraphs, NotRecorded, copied, uncollected, use_cuda_graphs, without_cuda_graphs
from detr.deformable_attention import ENVIRONMENT
from detr.inference import for_prediction
from detr.memory import Forward
from detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from detr.precision import autocast

MASKS = {"masks": True, "hidden_dim": 128}
SMALL = [(name, {}) for name in list_models() if name.startswith("tiny_")] + [
    ("detr_resnet50", {}), ("detr_resnet50", MASKS), ("dino_resnet50_4scale", MASKS),
    ("detr_resnet50", {"backbone": "pvt_tiny"})]
SIZES = {"alike": [(64, 96), (64, 96)], "unlike": [(64, 96), (50, 64)]}


class Again(CudaGraphs):
    """On a CPU: what is recorded is computed again."""

    def check(self, model, device):
        pass

    def in_turn(self, device):
        return contextlib.nullcontext()

    def prepare(self, run):
        run()

    def record(self, run):
        outputs = run()
        places = torch.utils._pytree.tree_leaves(outputs)

        def replay():
            with torch.no_grad():
                for place, value in zip(places, torch.utils._pytree.tree_leaves(run()), strict=True):
                    if isinstance(place, torch.Tensor):
                        place.copy_(value)

        return replay, outputs


class Traced(Again):
    """Graphs of a CPU's operations."""

    def record(self, run):
        return super().record(make_fx(run)())


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch, request):
    """What CPUs do in their own way, since there it costs no waiting."""
    if not request.node.get_closest_marker("on_a_gpu"):
        on_cpu = NestedTensor.padded.fget
        monkeypatch.setattr(NestedTensor, "padded", property(lambda samples: on_cpu(samples.to("meta"))))
        monkeypatch.setenv(ENVIRONMENT, "definition")


def with_graphs(model, most=16, kind=Again):
    Forward.of(model).call = kind(most)
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
    model, graphs = with_graphs(copy.deepcopy(plain), kind=Traced)
    for seed in range(4):
        batch = images(SIZES[sizes], seed)
        with torch.no_grad():
            expected, found = plain(batch), model(batch)
        assert found.keys() == expected.keys()
        for key in ("pred_logits", "pred_boxes", *({"pred_masks"} & expected.keys())):
            torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-5)
        assert found.get("mask_sizes") == expected.get("mask_sizes")
    assert counts(graphs) == (1, 1, 2)
    assert str(graphs) == ("CUDA graphs: 2 of 4 batches replayed, 1 recorded, 1 run as without (1 the first of their "
                           "shape)")


def counts(graphs):
    return graphs.plain.total(), graphs.recorded, graphs.replayed


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
    assert counts(graphs) == (5, 5, 0)                                          # as padded, images 1 and 2 are alike
    with torch.autocast("cpu", torch.bfloat16):
        detector(images([(64, 64)], 0))
    assert counts(graphs) == (6, 5, 0)                                          # what is computed in counts, too


def test_moved_weights_are_recorded_anew():
    detector, graphs = with_graphs(for_prediction(build_small("tiny_conditional_detr")[0]))
    batch = images(SIZES["alike"], 0)
    before = [detector(batch) for _ in range(3)][-1]
    with torch.no_grad():
        detector.class_embed.bias += 1                                          # in place: a graph reads what is there
    torch.testing.assert_close(detector(batch)["pred_logits"], before["pred_logits"] + 1)
    detector.class_embed.bias = torch.nn.Parameter(detector.class_embed.bias.detach() + 1, requires_grad=False)
    torch.testing.assert_close(detector(batch)["pred_logits"], before["pred_logits"] + 2)
    assert counts(graphs) == (2, 1, 2)
    assert len(graphs._graphs) == 0                                             # the old ones are given up at once


def test_graphs_that_are_used_keep_their_places(monkeypatch):
    """More shapes than places, in turn: otherwise each would be recorded for the next to take its place."""
    monkeypatch.setattr(cuda_graphs, "STALE", 4)
    detector, graphs = with_graphs(for_prediction(build_small("tiny_detr")[0]), most=2)
    for _ in range(6):
        for side in (32, 64, 96):
            detector(images([(side, side)], 0))
    assert counts(graphs) == (3 + 5, 2, 2 * 4) and graphs.plain["without a free place"] == 5
    for _ in range(2 * 4):
        detector(images([(96, 96)], 0))
    assert str(graphs).endswith("; times all graphs were given up: 1")
    assert graphs.recorded == 3 and [shape[2][-1] for shape in graphs._graphs] == [96]
    for side in (64, 96):
        detector(images([(side, side)], 0))
    assert graphs.recorded == 4 and [shape[2][-1] for shape in graphs._graphs] == [64, 96]


def test_hooks_are_called(model):
    detector, graphs = model
    batch, seen = images(SIZES["alike"], 0), []
    for _ in range(3):
        detector(batch)
    hook = detector.transformer.decoder.layers[0].register_forward_hook(lambda *args: seen.append(1))
    detector(batch)
    hook.remove()
    assert seen == [1] and counts(graphs) == (2, 1, 1) and graphs.plain["with hooks"] == 1
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *args: seen.append(2))
    try:
        detector(batch)
    finally:
        hook.remove()
    assert 2 in seen and counts(graphs) == (3, 1, 1) and graphs.plain["with hooks"] == 2
    explanation = explain(detector, batch[0])
    assert len(explanation.decoder) == len(detector.transformer.decoder.layers)


def test_sizes_that_nobody_knows(model):
    detector, graphs = model
    batch = nested_tensor_from_tensor_list(images(SIZES["alike"], 0))
    for _ in range(3):
        detector(NestedTensor(*batch.decompose()))
    assert counts(graphs) == (3, 0, 0) and graphs.plain["without sizes"] == 3


def test_gradients_of_images(model):
    """They are asked of the batch, and a graph has none."""
    detector, graphs = model
    for _ in range(4):
        given = [image.requires_grad_() for image in images(SIZES["alike"], 0)]
        detector(given)["pred_logits"].sum().backward()
        assert given[0].grad.abs().max() > 0
    assert counts(graphs) == (4, 0, 0) and graphs.plain["with gradients"] == 4
    with torch.no_grad():
        for _ in range(3):
            assert not detector(given)["pred_logits"].requires_grad
    assert counts(graphs) == (5, 1, 1)


def test_a_batch_known_to_be_whole(model):
    """It is computed without masks, and an equal one with them."""
    detector, graphs = model
    batch = nested_tensor_from_tensor_list(images(SIZES["alike"], 0))
    for whole in (False, True, True, False):
        detector(NestedTensor(*batch.decompose(), batch.sizes, whole))
    assert counts(graphs) == (2, 2, 0)
    assert [graph.samples.whole for graph in graphs._graphs.values()] == [True, False]


def test_inference_mode(model):
    """What is recorded within can be used outside, and the other way round."""
    detector, graphs = model
    batch = images(SIZES["alike"], 0)
    expected = detector(batch)["pred_boxes"]
    for inside in (True, True, False, True):
        with torch.inference_mode(inside):
            torch.testing.assert_close(detector(batch)["pred_boxes"], expected)
    assert counts(graphs) == (1, 1, 3)


def test_a_copy_records_for_itself(model):
    detector, graphs = model
    for _ in range(3):
        detector(images(SIZES["alike"], 0))
    for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert isinstance(other.forward.call, Again) and other.forward.call.recorded == 0 and graphs.recorded == 1


def test_without(model):
    detector, graphs = model
    for _ in range(3):
        detector(images(SIZES["alike"], 0))
    without_cuda_graphs(detector)
    without_cuda_graphs(detector.transformer)                                   # which has none
    detector(images(SIZES["alike"], 0))
    assert counts(graphs) == (1, 1, 1) and not graphs._graphs


def test_anew(model):
    """With what Python looks up by now."""
    detector, graphs = model
    for _ in range(3):
        detector(images(SIZES["alike"], 0))
    again = use_cuda_graphs(detector, most=3)
    assert detector.forward.call is again and again.most == 3 and not graphs._graphs


def test_what_cannot_be_recorded(monkeypatch, model):
    detector, graphs = model

    def fail(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "record", fail)
    detector(images(SIZES["alike"], 0))
    with pytest.raises(NotRecorded, match="ProposalDETR could not be recorded: operation not permitted .*Start the pro"):
        detector(images(SIZES["alike"], 0))

    def fail_twice(run):
        """As on a GPU, where the end of a recording fails after what was to be recorded."""
        with pytest.raises(ValueError):
            run()
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(graphs, "prepare", lambda run: None)
    monkeypatch.setattr(graphs, "record", fail_twice)
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="not be recorded: queries are missing. Star"):
        broken.setattr(type(detector), "forward", broken_forward)
        detector(images(SIZES["alike"], 0))
    monkeypatch.setattr(graphs, "prepare", fail)                                # which is the model's own error
    with pytest.raises(RuntimeError, match="^operation not permitted"):
        detector(images(SIZES["alike"], 0))
    assert counts(graphs) == (1, 0, 0)


def broken_forward(model, samples):
    raise ValueError("queries are missing")


def test_garbage_waits():
    """A graph that went with its model, found while another is recorded, would end the recording."""
    for was in (True, False):
        (gc.enable if was else gc.disable)()
        try:
            with pytest.raises(RuntimeError), uncollected():
                assert not gc.isenabled()
                raise RuntimeError
            assert gc.isenabled() == was
        finally:
            gc.enable()


def test_recording_waits_with_garbage(monkeypatch):
    """And takes PyTorch's arguments: the graphs' memory and stream, whatever other threads do."""
    asked = []

    @contextlib.contextmanager
    def graph(*args, **kwargs):
        asked.append(kwargs)
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Pair(torch.zeros(1), 1))
    monkeypatch.setattr(Pair, "replay", "replay", raising=False)
    graphs = CudaGraphs()
    graphs._stream = "stream"
    assert gc.isenabled() and graphs.record(gc.isenabled) == ("replay", False) and gc.isenabled()
    assert asked == [{"pool": "pool", "stream": "stream", "capture_error_mode": "thread_local"}]


def test_one_call_at_a_time(model):
    detector, graphs = model
    batches = [images(SIZES["alike"], seed) for seed in range(12)]
    expected = [detector(batch)["pred_boxes"] for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda batch: detector(batch)["pred_boxes"], batches))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)
    assert counts(graphs) == (1, 1, 22)


class Pair(NamedTuple):
    a: torch.Tensor
    b: int


def test_copies_of_outputs():
    x = torch.zeros(2)
    found = copied({"a": [x, (1, None)], "b": x, "d": Pair(x, 1)})
    assert found["b"] is not x and found["a"][1] == (1, None) and torch.equal(found["a"][0], x)
    assert type(found["d"]) is Pair and found["d"].a is not x and found["d"].b == 1
    with pytest.raises(ValueError, match="outputs hold a object, and only .*: leave CUDA graphs out"):
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


def holds_list(index):
    return isinstance(index, list) or isinstance(index, tuple) and any(isinstance(one, list) for one in index)


class Watch(torch.overrides.TorchFunctionMode):
    """Fails where a tensor goes from the CPU to another device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(isinstance(x, torch.Tensor) and x.device.type == "meta" for x in (found, *given)):
            given = given[1:] if func is torch.Tensor.new_tensor else given
            copying = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and not given
            listed = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and holds_list(args[1])
            moved = any(x.device.type != "meta" and x.dim() > 0 for x in given)
            assert not copying and not listed and not moved, (func, args)
        return found


def on_a_gpu(test):
    return pytest.mark.on_a_gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")(test))


@on_a_gpu
@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("name, flags", SMALL)
def test_on_a_gpu(name, flags, precision):
    """Shapes in turn, more than there is room for; results are compared at the very end."""
    plain = for_prediction(build_small(name, padding="exact", **flags)[0], precision).cuda()
    model = copy.deepcopy(plain)
    graphs = use_cuda_graphs(model, most=2)
    results = []
    for seed in range(6):
        for sizes in (*SIZES.values(), [(32, 64)]):
            batch = [image.cuda() for image in images(sizes, seed)]
            with torch.no_grad(), autocast(torch.device("cuda"), precision):
                results.append((plain(batch), model(batch)))
    for expected, found in results:
        for key in ("pred_logits", "pred_boxes", *({"pred_masks"} & expected.keys())):
            torch.testing.assert_close(found[key], expected[key], atol=1e-4, rtol=1e-4)
    assert counts(graphs) == (3 + 5, 2, 2 * 4)


@on_a_gpu
@pytest.mark.parametrize("device", [pytest.param(0), pytest.param(1, marks=pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two GPUs"))])
def test_whatever_the_device_and_the_stream(device):
    """Graphs are of the images' GPU, not the current one, and calls from several threads and streams do not mix."""
    plain = for_prediction(build_small("tiny_detr")[0]).to(f"cuda:{device}")
    model = copy.deepcopy(plain)
    graphs = use_cuda_graphs(model)
    batches = [[image.to(f"cuda:{device}") for image in images(SIZES["alike"], seed)] for seed in range(32)]
    with torch.no_grad():
        for batch in batches[:3]:
            assert torch.cuda.current_device() == 0
            torch.testing.assert_close(model(batch)["pred_boxes"], plain(batch)["pred_boxes"], atol=1e-4, rtol=1e-4)
    torch.cuda.synchronize(device)

    def call(batch):
        with torch.cuda.stream(torch.cuda.Stream(device)), torch.no_grad():
            found = model(batch)["pred_boxes"], plain(batch)["pred_boxes"]
            torch.cuda.current_stream(device).synchronize()
            return found

    with ThreadPoolExecutor(4) as threads:
        for found, expected in threads.map(call, batches):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert counts(graphs) == (1, 1, 33)


@on_a_gpu
def test_places_that_were_taken_over(monkeypatch):
    """Graphs recorded after others were given up read and write memory of their own."""
    monkeypatch.setattr(cuda_graphs, "STALE", 1)
    plain = for_prediction(build_small("tiny_deformable_detr")[0]).cuda()
    model = copy.deepcopy(plain)
    graphs = use_cuda_graphs(model, most=2)
    for sides in ((32, 64), (64, 96), (96, 32), (32, 64)):
        for seed in range(6):
            for side in sides:
                batch = [image.cuda() for image in images([(side, side)], seed)]
                gc.collect()
                torch.cuda.empty_cache()
                with torch.no_grad():
                    torch.testing.assert_close(model(batch)["pred_boxes"], plain(batch)["pred_boxes"],
                                               atol=1e-4, rtol=1e-4)
    assert graphs.recorded > 4 and graphs.replayed > 8
