"""A model shared out over two processes (Gloo, on the CPU) does what the same model does whole, in one process that takes
both processes' batches and averages their gradients."""
import copy
import math
import os
from pathlib import Path

import pytest
import torch
from small_models import build_small, images, targets
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detr import checkpoint, diagnosis, distributed, sharding
from detr.memory import blocks_of_body, checkpoint_activations, layers_of
from detr.nested_tensor import as_nested_tensor
from detr.optimization import moving_average

able = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"),
                          reason=f"PyTorch {torch.__version__} shares models out over GPUs alone")
TINY = {"hidden_dim": 32, "nheads": 2, "dim_feedforward": 32, "num_queries": 9, "backbone": "resnet_tiny",
        "backbone_norm": "group"}
# What can go wrong: parts that are frozen, heads that layers share, parameters read from outside of their module, values
# that are no plain tensors between modules, targets in the forward pass, another family of backbones.
FAMILIES = {
    "DETR, the stem frozen": ("detr_resnet50", TINY | {"enc_layers": 1, "dec_layers": 2, "frozen_stages": 1}),
    "shared heads": ("deformable_detr_resnet50", TINY | {"enc_layers": 1, "dec_layers": 2, "num_feature_levels": 2,
                                                         "hidden_dim": 64}),
    "refinement in two stages": ("tiny_deformable_detr", TINY | {"hidden_dim": 64}),
    "masks, PVT": ("detr_resnet50_panoptic", TINY | {"hidden_dim": 128, "nheads": 8, "backbone": "pvt_v2_b0",
                                                     "backbone_norm": "frozen", "enc_layers": 1, "dec_layers": 1}),
}
RESUMED = "refinement in two stages"


def parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [*layers_of(model), *blocks_of_body(model)]


def loss_of(model: nn.Module, criterion: nn.Module, rank: int, step: int) -> Tensor:
    """Of the batch of a process in a step, with its own dropout. Both have three objects, since losses are divided by the
    mean of their numbers."""
    torch.manual_seed(10 * step + rank)
    pictures = as_nested_tensor([x * (1 + 0.1 * rank + 0.01 * step) for x in images((64, 48), (48, 64))])
    truth = targets(3 - rank, rank, size=(64, 64))
    outputs = model(pictures, truth) if getattr(model, "takes_targets", False) else model(pictures)
    return criterion.weighted_sum(criterion(outputs, truth))


def train(model, criterion, optimizer, ranks, steps, after=lambda: None) -> list[list[float]]:
    """Each step's loss of each of ``ranks``, and the gradient's norm, in processes that have one rank or alone with
    both."""
    rows = []
    for step in steps:
        optimizer.zero_grad()
        row = []
        for rank in ranks:
            loss = loss_of(model, criterion, rank, step)
            (loss / len(ranks)).backward()
            row.append(loss.item())
        rows.append(row + [sharding.clip(model, 0.1)])
        optimizer.step()
        after()
    return rows


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def adam(model):
    """In two groups. The large ``eps`` keeps it from making much of how a small gradient was rounded."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": trained[::2], "lr": 1e-4}, {"params": trained[1::2], "lr": 1e-5}],
                             eps=1e-3)


def build(family):
    name, flags = FAMILIES[family]
    model, criterion, _ = build_small(name, **flags)
    return model.train(), criterion.train()


class LinearAlone(TorchFunctionMode):
    """As ``Exact``: what it does not know is an error."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function is nn.functional.linear, function
        return function(*args, **(kwargs or {}))


class Strict(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x):
        with LinearAlone():
            for block in self.blocks:
                x = block(x)
        return x


def one_of_two(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    distributed.init("cpu", f"file://{folder}/meet")
    found: dict = {"parts": {}, "rows": {}, "states": {}, "frozen": {}}
    for family in FAMILIES:
        model, criterion = build(family)
        if rank:                                                    # all begin with the weights of rank 0
            model.apply(lambda m: [nn.init.constant_(p, 0.5) for p in m.parameters(recurse=False)])
        found["parts"][family] = sharding.shard(model, parts(model))
        found["frozen"][family] = [name for name, p in model.named_parameters() if not p.requires_grad]
        found["rows"][family] = train(model, criterion, sgd(model), [rank], range(1))
        found["states"][family] = sharding.full_state(model)

    # A file from here is read by one process, and one of that process here.
    for name in ("stays", "comes"):
        model, criterion = build(RESUMED)
        average = moving_average(model, 0.9)
        for one in (model, average.module):
            sharding.shard(one, parts(one))
        optimizer, after = adam(model), lambda average=average, model=model: average.update_parameters(model)
        if name == "stays":
            train(model, criterion, optimizer, [rank], range(2), after)
            state = {"model": sharding.full_state(model), "average": sharding.full_state(average.module),
                     "optimizer": sharding.full_optimizer_state(optimizer)}
            assert rank == 0 or not (state["model"] or state["optimizer"]["state"])
            if rank == 0:
                checkpoint.save(folder / "two.pth", state)
        else:
            content = checkpoint.load(folder / "one.pth")
            sharding.load_full_state(model, content["model"])
            sharding.load_full_state(average.module, content["average"])
            sharding.load_full_optimizer_state(optimizer, content["optimizer"])
            average.n_averaged.fill_(2)
            for wrong in ({"model": {}}, {"model": {**content["model"], "query_embed.weight": torch.ones(1)}}):
                with pytest.raises(RuntimeError, match="query_embed|Missing"):
                    sharding.load_full_state(model, wrong["model"])
        found[name] = train(model, criterion, optimizer, [rank], range(2, 4), after)
        found[f"{name} average"] = sharding.full_state(average.module)

    # Both batches in both processes: gradients are added up. What is thrown away before does not matter, and parts may
    # compute again.
    model, criterion = build(RESUMED)
    sharding.shard(model, parts(model))
    checkpoint_activations(model)
    optimizer = sgd(model)
    loss_of(model, criterion, rank, 7).backward()
    loss_of(model, criterion, rank, 8)
    found["accumulated"] = train(model, criterion, optimizer, [0, 1], range(1))
    loss_of(model, criterion, rank, 8)

    # One process has something to evaluate, and the other nothing; then one looks for a NaN.
    model = sharding.whole(model).eval() if rank == 0 else sharding.whole(model)
    if rank == 0:
        with torch.no_grad():
            found["seen"] = model(images((64, 48)))["pred_logits"]
    model, criterion = build(RESUMED)
    with torch.no_grad():
        model.transformer.decoder.layers[1].linear1.weight[3, 2] = math.nan
    sharding.shard(model, parts(model))
    plain = sharding.whole(model)
    if rank == 0:
        found["blame"] = diagnosis.blame(plain, criterion, as_nested_tensor(images((64, 48))), targets(1))
    found["class"] = type(plain).__name__, plain.training

    # An overflow in one process is one in both.
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1, bias=False))
    sharding.shard(model, [("0", model[0])])
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=16.0)
    before = sharding.full_state(model)
    scaler.scale(model(torch.ones(2, 3)).sum() * (math.inf if rank else 1.0)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    after_it = sharding.full_state(model)
    found["overflow"] = scaler.get_scale(), all(torch.equal(value, after_it[name]) for name, value in before.items())

    model = Strict()
    sharding.shard(model, [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)])
    model(torch.ones(2, 3)).sum().backward()
    found["strict"] = model.blocks[1].bias.grad.full_tensor()
    torch.save(found, folder / f"found{rank}.pth")
    distributed.close()


@pytest.fixture(scope="module")
def one() -> dict:
    """The same in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                        # another number of them adds in another order
    found: dict = {"rows": {}, "states": {}}
    for family in FAMILIES:
        model, criterion = build(family)
        found["rows"][family] = train(model, criterion, sgd(model), [0, 1], range(1))
        found["states"][family] = model.state_dict()
    model, criterion = build(RESUMED)
    average, optimizer = moving_average(model, 0.9), adam(model)

    def after() -> None:
        average.update_parameters(model)
    train(model, criterion, optimizer, [0, 1], range(2), after)
    found["file"] = copy.deepcopy({"model": model.state_dict(), "average": average.module.state_dict(),
                                   "optimizer": optimizer.state_dict()})
    found["later"] = train(model, criterion, optimizer, [0, 1], range(2, 4), after)
    found["average"] = average.module.state_dict()
    model, criterion = build(RESUMED)
    train(model, criterion, sgd(model), [0, 1], range(1))
    with torch.no_grad():
        found["seen"] = model.eval()(images((64, 48)))["pred_logits"]
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def two(one, tmp_path_factory) -> list[dict]:
    """What each of two processes found; and, in the first, the folder."""
    folder = tmp_path_factory.mktemp("two")
    checkpoint.save(folder / "one.pth", one["file"])
    torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
    found = [torch.load(folder / f"found{rank}.pth", weights_only=True) for rank in (0, 1)]
    found[0]["folder"] = folder
    return found


def both(two: list[dict], pick) -> list[list[float]]:
    """The rows of both processes as those of one that has both batches."""
    (first, second) = (pick(found) for found in two)
    assert [row[-1] for row in first] == [row[-1] for row in second]                        # the norm of all
    return [[a[0], *b] for a, b in zip(first, second)]


def close(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    worst = max((float((value - b[name]).abs().max()), name) for name, value in a.items() if value.numel())
    assert worst[0] <= tolerance, worst


@able
@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_that_of_one_process(family, one, two):
    assert len(two[0]["parts"][family]) >= 4 and all("." in name for name in two[0]["parts"][family])
    for row, expected in zip(both(two, lambda found: found["rows"][family]), one["rows"][family]):
        assert row == pytest.approx(expected, rel=1e-6)
    close(two[0]["states"][family], one["states"][family])
    assert list(two[0]["states"][family]) == list(one["states"][family]) and not two[1]["states"][family]
    model, _ = build(family)
    assert two[0]["frozen"][family] == [name for name, p in model.named_parameters() if not p.requires_grad]
    assert (family == "DETR, the stem frozen") <= bool(two[0]["frozen"][family])


@able
def test_one_process_goes_on_from_the_file_of_two(one, two):
    content = checkpoint.load(two[0]["folder"] / "two.pth")
    close(content["model"], one["file"]["model"])
    close(content["average"], one["file"]["average"])
    theirs, ours = content["optimizer"], one["file"]["optimizer"]
    assert theirs["param_groups"] == ours["param_groups"] and list(theirs["state"]) == list(ours["state"])
    assert all(values.keys() == ours["state"][i].keys() for i, values in theirs["state"].items())
    model, criterion = build(RESUMED)
    model.load_state_dict(content["model"])
    optimizer = adam(model)
    optimizer.load_state_dict(theirs)
    for row, expected in zip(train(model, criterion, optimizer, [0, 1], range(2, 4)), one["later"]):
        assert row == pytest.approx(expected, rel=1e-6)


@able
@pytest.mark.parametrize("name", ["stays", "comes"])
def test_two_processes_go_on(name, one, two):
    """From their own weights, and from the file of one."""
    for row, expected in zip(both(two, lambda found: found[name]), one["later"]):
        assert row == pytest.approx(expected, rel=1e-6)
    close(two[0][f"{name} average"], one["average"])


@able
def test_gradients_add_up(one, two):
    for found in two:
        for row, expected in zip(found["accumulated"], one["rows"][RESUMED]):
            assert row == pytest.approx(expected, rel=1e-6)


@able
def test_a_whole_copy_works_without_the_other_process(one, two):
    torch.testing.assert_close(two[0]["seen"], one["seen"], rtol=0, atol=1e-5)
    assert "transformer.decoder.layers.1" in two[0]["blame"]
    assert two[0]["class"] == ("DeformableDETR", True)


@able
def test_an_overflow_is_one_everywhere(two):
    assert [found["overflow"] for found in two] == [(8.0, True)] * 2


@able
def test_function_modes_see_the_network_alone(two):
    for found in two:
        assert found["strict"].tolist() == [2.0] * 3


def test_a_model_that_is_not_shared_out(capsys):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    assert sharding.shard(model, []) == [] and "there is one process" in capsys.readouterr().out
    assert sharding.whole(model) is model and not sharding.is_sharded(model)
    model(torch.ones(1, 4)).sum().backward()
    assert sharding.clip(model, 1.0) == pytest.approx(math.sqrt(15))
    assert float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()) == pytest.approx(1.0, rel=1e-5)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    other = nn.Linear(4, 3)
    sharding.load_full_state(other, sharding.full_state(model))
    close(other.state_dict(), model.state_dict(), 0.0)
    fresh = torch.optim.AdamW(other.parameters())
    sharding.load_full_optimizer_state(fresh, sharding.full_optimizer_state(optimizer))
    assert torch.equal(fresh.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    with pytest.raises(ValueError, match="group"):
        sharding.load_full_optimizer_state(torch.optim.AdamW([other.weight]), optimizer.state_dict())


def test_what_cannot_be_shared_out(monkeypatch):
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.tensor(1.0))
    monkeypatch.setattr(torch.cpu.Stream, "record_event", lambda self: None, raising=False)
    with pytest.raises(ValueError, match="--fsdp: the parameter scale is a single number"):
        sharding.shard(model, [])
    monkeypatch.delattr(torch.cpu.Stream, "record_event")
    with pytest.raises(RuntimeError, match=f"--fsdp: PyTorch {torch.__version__.split('+')[0]}.*--device cuda"):
        sharding.shard(model, [])
