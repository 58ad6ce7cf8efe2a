"""Numbers of the host on another device; ``meta`` stands for one."""
import pytest
import torch

from detr.transfer import keeping, on_device


@pytest.mark.parametrize("values", [[(1, 2), (3, 4)], torch.tensor([[1, 2], [3, 4]]), ()])
def test_numbers_arrive(values):
    found = on_device(values, "cpu", torch.float32)
    assert found.dtype == torch.float32 and found.tolist() == [list(row) for row in values]
    assert on_device(values, "meta").shape == found.shape


def test_whatever_the_default_device():
    with torch.device("meta"):
        assert on_device([1, 2], "cpu").tolist() == [1, 2]


def test_what_is_kept():
    kept = {}
    with keeping(kept):
        first = on_device([1, 2], "meta")
        assert on_device(torch.tensor([1, 2]), "meta") is first
        assert on_device([1, 2], "meta", torch.float32) is not first and on_device([2, 1], "meta") is not first
        assert on_device([1, 2], "cpu").tolist() == [1, 2]
    assert len(kept) == 3 and on_device([1, 2], "meta") is not first


@pytest.mark.parametrize("source, target, ahead", [("cpu", "cuda", True), ("cpu", "mps", False), ("meta", "cpu", False)])
def test_what_nothing_waits_for(monkeypatch, source, target, ahead):
    """Copies to the CPU, and to other devices than CUDA's, would be read before they are there."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, non_blocking: seen.append((args, non_blocking)))
    on_device(torch.ones(2, device=source), target)
    assert seen == [((target, None), ahead)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu():
    """What is copied may change at once."""
    values = torch.arange(1 << 20)
    torch.cuda._sleep(1 << 28)
    found = on_device(values, "cuda")
    values.zero_()
    assert torch.equal(found.cpu(), torch.arange(1 << 20))
