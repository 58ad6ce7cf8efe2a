"""The two loops on small fakes whose numbers can be worked out by hand, and on a real model where that matters."""
import math

import pytest
import torch
from small_models import build_small, images, targets
from torch import Tensor, nn

import engine
from detr import distributed
from detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from detr.structures import NonFiniteError
from engine import Progress, duration, evaluate, train_one_epoch

CPU = torch.device("cpu")


class Model(nn.Module):
    """Two weights times an image's mean. Records the mode it ran in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.modes: list[tuple[bool, bool, bool]] = []

    def forward(self, samples: NestedTensor) -> dict[str, Tensor]:
        self.modes.append((self.training, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return {"y": samples.tensors.mean((1, 2, 3))[:, None] @ self.weight[None]}                  # [B, 2]


class Criterion(nn.Module):
    """The mean of ``y`` times the targets' factors; back-propagated twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_dict = {"loss_y": 2}
        self.modes: list[tuple[bool, bool]] = []

    def divisors(self, batches: list, device: torch.device) -> list[None]:
        return [None] * len(batches)

    def forward(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]], divisors=None) -> dict[str, Tensor]:
        self.modes.append((self.training, torch.is_autocast_enabled("cpu")))
        factors = torch.stack([target["factor"] for target in targets])
        return {"loss_y": (outputs["y"].float() * factors).mean(), "images": torch.tensor(float(len(targets)))}

    @staticmethod
    def weighted_sum(losses: dict[str, Tensor]) -> Tensor:
        return 2 * losses["loss_y"]


class PostProcess(nn.Module):
    def forward(self, outputs: dict[str, Tensor], sizes: Tensor) -> list[dict[str, Tensor]]:
        return [{"scores": y, "size": size} for y, size in zip(outputs["y"], sizes)]


def batch(*ids: int, value: float = 1.0, factor: float = 1.0) -> engine.Batch:
    """Images of ``value`` with these ids."""
    samples = nested_tensor_from_tensor_list([torch.full((3, 4, 5), value) for _ in ids])
    return samples, [{"image_id": torch.tensor([i]), "factor": torch.tensor(factor),
                      "orig_size": torch.tensor([10 * i, 20 * i]), "size": torch.tensor([4, 5])} for i in ids]


def train(batches: list, model: nn.Module | None = None, criterion: nn.Module | None = None, lr: float = 0.1,
          **options) -> tuple[dict[str, float], nn.Module]:
    model, criterion = model or Model(), criterion or Criterion()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    averages = train_one_epoch(model, criterion, batches, len(batches), optimizer, schedule, CPU, 3, **options)
    return averages, model


# -- training ---------------------------------------------------------------------------------------------------------

def test_steps_and_averages():
    """y = v * (w1, w2), so the loss's gradient is 2 * v * factor / 2 for each weight."""
    seen = []
    model = Model()
    averages, _ = train([batch(1, 2), batch(3, value=3.0)], model,
                        after_step=lambda step, values: seen.append(model.weight.detach().clone()))
    assert [w.tolist() for w in seen] == [pytest.approx([0.9, 1.9]), pytest.approx([0.75, 1.75])]   # lr 0.1, then 0.05
    first, second = (1 + 2) / 2, 3 * (0.9 + 1.9) / 2
    assert averages == pytest.approx({"loss_y": first + second, "images": 1.5, "loss": first + second,
                                      "loss_y_unscaled": (first + second) / 2, "images_unscaled": 1.5,
                                      "grad_norm": (math.sqrt(2) + math.sqrt(18)) / 2, "lr": 0.075, "padded": 0.0})
    assert all(type(value) is float for value in averages.values())


def test_gradients_do_not_pile_up():
    batches = [batch(1), batch(2), batch(3)]
    assert train(batches, lr=0.0)[0]["grad_norm"] == pytest.approx(math.sqrt(2))


def test_modes():
    model, criterion = Model().eval(), Criterion().eval()
    train([batch(1)], model, criterion)
    assert model.modes == [(True, False, True)] and criterion.modes == [(True, False)]


@pytest.mark.parametrize("max_norm, factor", [(0.5, 0.5 / math.sqrt(2)), (0.0, 1.0), (5.0, 1.0)])
def test_clipping(max_norm, factor):
    """Longer gradients are shortened to max_norm; shorter ones, and with 0 all, stay. Logged is the length before."""
    averages, model = train([batch(1)], max_norm=max_norm)
    assert model.weight.tolist() == pytest.approx([1 - 0.1 * factor, 2 - 0.1 * factor], rel=1e-5)
    assert averages["grad_norm"] == pytest.approx(math.sqrt(2))
    assert max_norm != 0 or model.weight.tolist() == torch.tensor([1.0, 2.0]).sub(0.1).tolist()     # exactly


def test_bf16():
    class Mixed(Model):
        def forward(self, samples: NestedTensor) -> dict[str, Tensor]:
            outputs = super().forward(samples)
            assert outputs["y"].dtype == torch.bfloat16
            return outputs

    model, criterion = Mixed(), Criterion()
    averages, _ = train([batch(1, value=1.001)], model, criterion, amp="bf16")
    assert model.modes == [(True, True, True)] and criterion.modes == [(True, False)]               # losses: float32
    assert model.weight.dtype == model.weight.grad.dtype == torch.float32
    assert averages["loss_y"] == pytest.approx(3, rel=1e-2) and averages["loss_y"] != 3 * 1.001


def test_bf16_of_a_real_model():
    model, criterion, _ = build_small("tiny_detr")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    samples, truth = nested_tensor_from_tensor_list(images((64, 64), (60, 50))), targets(3, 0)
    truth = [target | {"image_id": torch.tensor([i])} for i, target in enumerate(truth)]
    averages, _ = train([(samples, truth)], model, criterion, amp="bf16", max_norm=0.1)
    assert all(map(math.isfinite, averages.values()))
    moved = [not torch.equal(p, before[name]) for name, p in model.named_parameters()]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize("value, shown", [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_no_number(value, shown):
    model = Model()
    batches = [batch(1, 2), batch(7, 8, factor=value), batch(9)]
    with pytest.raises(NonFiniteError) as error:
        train(batches, model)
    assert str(error.value).startswith(f"loss = {shown}, loss_y = {shown} at epoch 3, step 1, images [7, 8], ")
    assert "--lr" in str(error.value)
    assert model.weight.tolist() == pytest.approx([0.9, 1.9])                   # as the step before left them


def test_a_gradient_that_is_no_number():
    class Root(Criterion):
        def forward(self, outputs, targets, divisors=None):
            return {"loss_y": (outputs["y"] * 0).sum().sqrt()}                  # 0, whose slope is infinite

    model = Model()
    with pytest.raises(NonFiniteError, match=r"grad_norm = nan at epoch 3, step 0, images \[4\]"):
        train([batch(4)], model, Root())
    assert model.weight.tolist() == [1.0, 2.0]


def test_predictions_that_are_no_numbers():
    """What the matcher finds is told with step and images."""
    model, criterion, _ = build_small("detr_resnet50")
    nn.init.constant_(model.class_embed.weight, math.nan)
    truth = [target | {"image_id": torch.tensor([70 + i])} for i, target in enumerate(targets(2, 1))]
    with pytest.raises(NonFiniteError, match=r"not finite: pred_logits of images 0, 1 at epoch 3, "
                                             r"step 0, images \[70, 71\]"):
        train([(nested_tensor_from_tensor_list(images((64, 64), (60, 50))), truth)], model, criterion)
    assert all(p.isfinite().all() for name, p in model.named_parameters() if "class_embed" not in name)


# -- evaluation -------------------------------------------------------------------------------------------------------

class Evaluator:
    kind = "bbox"

    def __init__(self, **answer) -> None:
        self.seen: list[dict] = []
        self.answer = answer

    def update(self, predictions: dict) -> None:
        self.seen.append(predictions)

    def summarize(self) -> dict:
        return self.answer


def test_evaluation():
    model, criterion = Model().train(), Criterion().train()
    evaluators = [Evaluator(ap=0.5), Evaluator(pq=[1, 2])]
    batches = [batch(1, 2), batch(5, value=3.0)]
    results = evaluate(model, criterion, {"bbox": PostProcess()}, batches, 2, evaluators, CPU)
    assert results == {"loss_y": 6.0, "images": 1.5, "loss": 6.0, "loss_y_unscaled": 3.0, "images_unscaled": 1.5,
                       "padded": 0.0, "ap": 0.5, "pq": [1, 2]}
    for evaluator in evaluators:                                                # each image once, under its own id
        assert [list(predictions) for predictions in evaluator.seen] == [[1, 2], [5]]
        assert all(type(i) is int for predictions in evaluator.seen for i in predictions)
        assert evaluator.seen[0][2]["size"].tolist() == [20, 40]                # of the file, not as fed
        assert evaluator.seen[1][5]["scores"].tolist() == [3.0, 6.0]
    assert model.modes == [(False, False, False)] * 2 and criterion.modes == [(False, False)] * 2
    assert model.weight.grad is None


def test_evaluation_waits_for_others_at_its_end_alone(monkeypatch):
    """Processes have different numbers of batches. Here, any exchange but the ones at the end would fail, because the
    other process is not there."""
    model, criterion, postprocessors = build_small("tiny_detr")
    truth = [target | {"image_id": torch.tensor([i]), "orig_size": torch.tensor([64, 64]), "size": torch.tensor([64, 64])}
             for i, target in enumerate(targets(2, 0))]
    batches = [(nested_tensor_from_tensor_list(images((64, 64), (60, 50))), truth)]
    exchanges = []
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    with pytest.raises(ValueError, match="process group"):                      # so it is: training does wait
        criterion(model(batches[0][0]), truth)
    monkeypatch.setattr(distributed, "gather_objects", lambda item: exchanges.append(item) or [item, ({}, {})])
    evaluator = Evaluator()
    results = evaluate(model, criterion, postprocessors, batches * 3, 3, [evaluator], CPU)
    assert len(exchanges) == 1 and len(evaluator.seen) == 3 and math.isfinite(results["loss"])


def test_evaluation_of_no_batches():
    """The share of a process, where there are fewer images than processes."""
    assert evaluate(Model(), Criterion(), {}, [], 0, [Evaluator(ap=1)], CPU) == {"ap": 1}


# -- progress ---------------------------------------------------------------------------------------------------------

class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(engine.time, "perf_counter", lambda: self.now)

    def batches(self, count: int, seconds: float):
        for i in range(count):
            self.now += seconds
            yield i


def test_progress_counts_time(monkeypatch, capsys):
    """Batches of 2 images take 1 s to come and 3 s to work on: a quarter of the time is waiting."""
    clock = Clock(monkeypatch)
    progress = Progress("epoch 0", every=7.0, remaining_passes=2)
    for i in progress.over(clock.batches(4, seconds=1.0), 4, ("loss", "absent")):
        clock.now += 3.0
        progress.update({"loss": float(i), "hidden": 1.0}, images=2)
    assert capsys.readouterr().out.splitlines() == [
        "epoch 0 2/4  loss 0.5  0.5 images/s  data 25%  0:08, 0:40 left",       # 10 batches of 4 s are left
        "epoch 0 4/4  loss 1.5  0.5 images/s  data 25%  0:16, 0:32 left"]
    assert progress.averages() == {"loss": 1.5, "hidden": 1.0}


def test_progress_of_several_processes(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for main, lines in ((True, 1), (False, 0)):
        monkeypatch.setattr(distributed, "is_main", lambda main=main: main)
        progress = Progress("evaluation")
        for _ in progress.over(clock.batches(10, seconds=0.5), 10, ()):
            progress.update({}, images=1)
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == lines and all("10/10" in line and "6.0 images/s  data 100%" in line for line in shown)


def test_averages_over_processes(monkeypatch):
    """Of all batches, not of the processes' averages."""
    progress = Progress("evaluation")
    for loss in (1.0, 2.0, 3.0):
        progress.update({"loss": loss}, images=4)
    monkeypatch.setattr(distributed, "gather_objects",
                        lambda item: [item, ({"loss": 14.0, "other": 4.0}, {"loss": 1, "other": 2}), ({}, {})])
    assert progress.averages_over_processes() == {"loss": 5.0, "other": 2.0}
    assert progress.averages() == {"loss": 2.0}


def test_duration():
    assert [duration(s) for s in (0, 59.6, 61, 3599, 3600, 86399.9)] == ["0:00", "1:00", "1:01", "59:59", "1:00:00",
                                                                        "24:00:00"]
