"""Two processes over Gloo, and the same calls in one."""
import os
import subprocess
import sys

import pytest
import torch

from detr import distributed


def test_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.init("cpu") == (0, 1, 0, torch.device("cpu"))
    assert not distributed.is_distributed() and distributed.is_main()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    total = distributed.sum_over_processes(x)
    assert total.tolist() == [1.0, 2.0] and not total.requires_grad
    assert distributed.mean_over_processes({}) == {}
    means = distributed.mean_over_processes({"b": x.sum(), "a": 4})
    assert list(means) == ["b", "a"] and means["b"].item() == 3.0 and means["a"].item() == 4.0
    assert not means["b"].requires_grad
    assert distributed.gather_objects({"x": 1}) == [{"x": 1}]
    distributed.barrier()
    distributed.close()


def test_one_process_under_torchrun_makes_no_group(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.init("cpu").world_size == 1
    assert not distributed.is_distributed()


def one_of_two(rank: int, meeting_point: str, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    process = distributed.init("cpu", meeting_point)
    assert process == (rank, 2, rank, torch.device("cpu"))
    assert distributed.is_distributed() and distributed.is_main() == (rank == 0)

    mine = torch.full((2, 3), rank + 1.0, requires_grad=True)
    total = distributed.sum_over_processes(mine)
    assert total.tolist() == [[3.0] * 3] * 2 and not total.requires_grad
    assert mine.tolist() == [[rank + 1.0] * 3] * 2                                # given, not changed
    assert distributed.sum_over_processes(torch.tensor(5 + rank)).item() == 11    # integers stay integers

    values = {"loss": torch.tensor(2.0 * rank), "error": 10.0}                    # filled in another order elsewhere
    means = distributed.mean_over_processes(values if rank else dict(reversed(values.items())))
    assert {name: value.item() for name, value in means.items()} == {"loss": 1.0, "error": 10.0}

    assert distributed.gather_objects(["x"] * (rank + 1)) == [["x"], ["x", "x"]]
    if rank == 0:
        open(os.path.join(folder, "written"), "w").close()
    distributed.barrier()
    assert os.path.exists(os.path.join(folder, "written"))
    distributed.close()
    assert not distributed.is_distributed()
    open(os.path.join(folder, f"done_{rank}"), "w").close()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (f"file://{tmp_path}/meet", str(tmp_path)), nprocs=2)
    assert (tmp_path / "done_0").exists() and (tmp_path / "done_1").exists()


@pytest.mark.parametrize("environment, missing", [
    ({"WORLD_SIZE": "2"}, "RANK"), ({"RANK": "0"}, "WORLD_SIZE"), ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
    ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK is 'zero'")])
def test_incomplete_environment(monkeypatch, environment, missing):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{missing}.*torchrun"):
        distributed.init("cpu")


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="needs GPU number 3, but PyTorch sees 1; use device cpu"):
        distributed.init("cuda:3")
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="needs GPU number 1, but PyTorch sees 1.*fewer processes"):
        distributed.init("cuda")
    with pytest.raises(ValueError, match="LOCAL_RANK; use device cuda"):
        distributed.init("cuda:0")
    with pytest.raises(ValueError, match="cuda and cpu only"):
        distributed.init("mps")


def test_import_does_nothing():
    """No group, no device, no replaced print."""
    check = ("import builtins, torch; before = builtins.print; import detr.distributed as d; "
             "print(builtins.print is before, d.is_distributed(), torch.cuda.is_initialized())")
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]
