"""Checkpoint files: what is refused, what stays unharmed, what the messages say."""
import argparse
import errno
import hashlib
import http.server
import io
import json
import os
import re
import stat
import sys
import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from detr import checkpoint
from detr.structures import Category


def small_model(classes: int = 4) -> nn.Module:
    return nn.Sequential(OrderedDict(body=nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
                                     head=nn.Linear(8, classes)))


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_round_trip_of_everything_admitted(tmp_path):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model.body(torch.rand(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(),
             "epoch": 3, "config": {"lr": 1e-4, "masks": False, "resume": None}, "rng": torch.get_rng_state(),
             "classes": [(1, 1, "person")], "parameter": nn.Parameter(torch.ones(2)), 7: "number as key"}
    path = tmp_path / "new" / "folders" / "checkpoint.pth"
    checkpoint.save(path, state)
    read = checkpoint.load(path)
    assert equal(read["model"], model.state_dict())
    assert read["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
    assert torch.equal(read["rng"], state["rng"])
    for name in ("lr_scheduler", "epoch", "config", "classes", 7):
        assert read[name] == state[name], name
    assert os.listdir(path.parent) == ["checkpoint.pth"]


@pytest.mark.parametrize("value, where", [
    ({"a": [1, np.float64(2)]}, r"state\['x'\]\['a'\]\[1\] is a numpy.float64"),
    (argparse.Namespace(lr=1), r"state\['x'\] is a argparse.Namespace"),
    ([Category(1, 1, "person")], r"state\['x'\]\[0\] is a detr.structures.Category"),
    ({(1, 2): 3}, r"state\['x'\] has the key \(1, 2\) of type builtins.tuple"),
    (np.zeros(2), r"state\['x'\] is a numpy.ndarray")])
def test_save_refuses_what_could_not_be_read(tmp_path, value, where):
    with pytest.raises(TypeError, match=where):
        checkpoint.save(tmp_path / "a.pth", {"model": {}, "x": value})
    assert not list(tmp_path.iterdir())


def full_disk_on_write(monkeypatch):
    def half_written(state, file):                              # as PyTorch's archive writer reports it
        try:
            file.write(b"PK half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail] unexpected pos 768 vs 662")                              # noqa: B904
    monkeypatch.setattr(torch, "save", half_written)


def full_disk_on_sync(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("fail", [full_disk_on_write, full_disk_on_sync])
def test_failure_in_the_middle_keeps_the_old_file(tmp_path, monkeypatch, fail):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(path, {"model": {"w": torch.ones(3)}, "epoch": 1})
    fail(monkeypatch)
    with pytest.raises(OSError, match="cannot write .*checkpoint.pth: .*No space left.*Make room.*there is unchanged"):
        checkpoint.save(path, {"model": {"w": torch.zeros(3)}, "epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_interruption_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(path, {"model": {}, "epoch": 1})

    def interrupted(state, file):
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"model": {}, "epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_the_folder_is_a_file(tmp_path):
    (tmp_path / "output").write_text("not a folder")
    with pytest.raises(OSError, match="cannot write .*choose another output folder"):
        checkpoint.save(tmp_path / "output" / "checkpoint.pth", {"model": {}})


def test_the_former_file_stays_where_asked_for(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for epoch in range(3):
        checkpoint.save(path, {"model": {}, "epoch": epoch}, previous=True)
    checkpoint.save(path, {"model": {}, "epoch": 3})
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pth", "checkpoint_previous.pth"]
    assert [checkpoint.load(path)["epoch"], checkpoint.load(checkpoint.previous_of(path))["epoch"]] == [3, 1]


def test_what_is_written_goes_to_the_disk(tmp_path, monkeypatch):
    """The content before the name points to it, and then the name."""
    steps, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(*names):
        steps.append("name")
        replace(*names)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    checkpoint.save(tmp_path / "a.pth", {"model": {}})
    checkpoint.save_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(1)}, {})
    assert steps == ["file", "name", "folder"] * 2


def test_a_leftover_of_a_killed_process_is_not_written_through(tmp_path):
    """One that has the number of this process, and whose file has a second name."""
    checkpoint.save(tmp_path / "a.pth", {"model": {}, "epoch": 1})
    os.link(tmp_path / "a.pth", checkpoint.partial_of(tmp_path / "a.pth"))
    os.link(tmp_path / "a.pth", tmp_path / "mine.pth")
    checkpoint.save(tmp_path / "a.pth", {"model": {}, "epoch": 2})
    assert [checkpoint.load(tmp_path / name)["epoch"] for name in ("a.pth", "mine.pth")] == [2, 1]
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "mine.pth"]


def test_published_layouts(tmp_path):
    """A Namespace of flags, NumPy numbers under both module names, a bare state_dict, the format before 2020."""
    weights = small_model().state_dict()
    flags = argparse.Namespace(lr=1e-4, backbone="resnet50", masks=False)
    torch.save({"model": weights, "args": flags, "best": np.float64(0.42), "epoch": np.int64(3)}, tmp_path / "a.pth")
    read = checkpoint.load(tmp_path / "a.pth")
    assert read["args"] == flags and read["best"] == 0.42 and read["epoch"] == 3 and equal(read["model"], weights)

    torch.save(weights, tmp_path / "bare.pth")
    assert equal(checkpoint.load(str(tmp_path / "bare.pth"))["model"], weights)
    torch.save({"model": weights, "args": flags}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert equal(checkpoint.load(tmp_path / "old.pth")["model"], weights)


@pytest.mark.parametrize("entries, taken, said", [
    ({"state_dict": 1}, 1, ""), ({"state_dict": 1, "state_dict_ema": 2}, 2, "state_dict_ema, not state_dict\n"),
    ({"model": 1, "model_ema": 2}, 2, "model_ema, not model\n"), ({"model_ema": 2}, 2, ""),
    ({"state_dict": 1, "state_dict_ema": None}, 1, ""), ({"model": 1, "model_ema": {}}, 1, ""),
    ({"model": {"depth": 50}, "state_dict": 1}, 1, ""), ({"model": 1, "state_dict": 2}, 1, "")])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_files_of_training_programs(tmp_path, capsys, entries, taken, said, prefix):
    """A number stands for weights that are all of this value. Everything else that the file has comes along."""
    weights = {number: {name: torch.full_like(x, number) for name, x in small_model().state_dict().items()}
               for number in (1, 2)}
    content = {entry: {prefix + name: x for name, x in weights[n].items()} if isinstance(n, int) else n
               for entry, n in entries.items()}
    torch.save({"epoch": 3, "args": argparse.Namespace(model="resnet50"), **content}, tmp_path / "last.pth")
    read = checkpoint.load(tmp_path / "last.pth")
    assert equal(read.pop("model"), weights[taken])
    assert read == {"epoch": 3, "args": argparse.Namespace(model="resnet50")}
    out = capsys.readouterr().out
    assert (f"last.pth: took the average of the weights over training, {said}" in out) == bool(said)
    assert ("last.pth: took the prefix 'module.' off its 9 names\n" in out) == bool(prefix)
    assert len(out.splitlines()) == bool(said) + bool(prefix)


def test_a_bare_state_dict_of_several_processes(tmp_path, capsys):
    model = small_model()
    torch.save({f"module.{name}": x for name, x in model.state_dict().items()}, tmp_path / "ddp.pth")
    assert equal(checkpoint.load(tmp_path / "ddp.pth")["model"], model.state_dict())
    assert "ddp.pth: took the prefix 'module.' off its 9 names" in capsys.readouterr().out
    torch.save(nn.ModuleDict({"module": nn.Linear(1, 1), "other": nn.Linear(1, 1)}).state_dict(), tmp_path / "a.pth")
    assert "module.weight" in checkpoint.load(tmp_path / "a.pth")["model"] and capsys.readouterr().out == ""


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_scalars_of_either_major_version(tmp_path, module):
    written = io.BytesIO()
    torch.save({"model": {}, "best": np.float32(0.5)}, written, _use_new_zipfile_serialization=False)
    other = re.sub(rb"numpy\._?core\.multiarray\n", module.encode() + b"\n", written.getvalue())
    (tmp_path / "a.pth").write_bytes(other)
    assert module.encode() + b"\nscalar" in other
    assert checkpoint.load(tmp_path / "a.pth")["best"] == 0.5


class Harmful:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(tmp_path, zipped):
    mark = tmp_path / "it_ran"
    path = tmp_path / "a.pth"
    torch.save({"model": {}, "x": Harmful(f"touch {mark}")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a.pth holds more than weights: reading it would run \w+\.system"):
        checkpoint.load(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)                        # the file was harmful indeed
    assert mark.exists()


@pytest.mark.filterwarnings("ignore")                          # TorchScript is on its way out, its files are not
def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save({"model": small_model()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="would run torch.nn.modules.container.Sequential.*state_dict"):
        checkpoint.load(tmp_path / "a.pth")
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "script.pth")
    with pytest.raises(ValueError, match="would run TorchScript archive"):
        checkpoint.load(tmp_path / "script.pth")


def test_cut_short_in_the_directory_of_the_archive(tmp_path):
    """Which stands at its end; not a byte may be missing."""
    path = tmp_path / "a.pth"
    torch.save({"model": small_model().state_dict()}, path)
    whole = path.read_bytes()
    directory = whole.index(b"PK\1\2")
    for kept in [*range(directory - 3, len(whole), 37), *range(len(whole) - 25, len(whole))]:
        path.write_bytes(whole[:kept])
        for mmap in (False, True):
            with pytest.raises(ValueError, match="a.pth is damaged, cut short or no checkpoint"):
                checkpoint.load(path, mmap=mmap)


def test_tensors_left_on_the_disk(tmp_path):
    state = {"model": small_model().state_dict(), "epoch": 3}
    checkpoint.save(tmp_path / "a.pth", state)
    read = checkpoint.load(tmp_path / "a.pth", mmap=True)
    assert equal(read["model"], state["model"]) and read["epoch"] == 3


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_cut_short(tmp_path, kept, zipped):
    path = tmp_path / "a.pth"
    torch.save({"model": small_model().state_dict()}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(kept * len(whole))])
    size = f"{int(kept * len(whole)):,} bytes"
    with pytest.raises(ValueError, match=f"a.pth is damaged, cut short or no checkpoint.*{size}.*download it anew"):
        checkpoint.load(path)


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(ValueError, match="page.pth is damaged"):
        checkpoint.load(tmp_path / "page.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth holds a list, not a dict"):
        checkpoint.load(tmp_path / "list.pth")
    for i, content in enumerate(({"epoch": 3, "args": 1}, {"model": 3}, {"state_dict": None}, {})):
        torch.save(content, tmp_path / f"{i}.pth")
        with pytest.raises(ValueError, match=rf"{i}.pth has no weights under 'model' \(it has: "):
            checkpoint.load(tmp_path / f"{i}.pth")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*x.pth.*no \*.pth or \*.safetensors files"):
        checkpoint.load(tmp_path / "x.pth")
    (tmp_path / "only.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="x.pth.*it has only.safetensors"):
        checkpoint.load(tmp_path / "x.pth")
    (tmp_path / "only.safetensors").unlink()
    for i in range(10):
        (tmp_path / f"checkpoint{i}.pth").touch()
    with pytest.raises(FileNotFoundError, match="x.pth.*it has checkpoint0.pth, .*checkpoint7.pth and 2 more"):
        checkpoint.load(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match="nor a folder .*nowhere"):
        checkpoint.load(tmp_path / "nowhere" / "x.pth")
    with pytest.raises(IsADirectoryError, match="is a folder.*checkpoint0.pth"):
        checkpoint.load(tmp_path)


# Safetensors.

def as_safetensors(weights) -> bytes:
    return pytest.importorskip("safetensors.torch").save(weights)


def test_safetensors_are_bare_weights(tmp_path):
    weights = small_model().state_dict() | {"model": torch.arange(3), "half": torch.ones(2, dtype=torch.bfloat16)}
    (tmp_path / "a.safetensors").write_bytes(as_safetensors(weights))
    for path in (tmp_path / "a.safetensors", str(tmp_path / "a.safetensors")):
        read = checkpoint.load(path, torch.device("cpu"))
        assert list(read) == ["model"] and equal(read["model"], weights)
        assert {name: x.dtype for name, x in read["model"].items()} == {name: x.dtype for name, x in weights.items()}


def test_safetensors_with_metadata(tmp_path):
    """Read by the package itself: tensors whole, alone or in pieces, metadata as texts in JSON."""
    safetensors = pytest.importorskip("safetensors")
    shared = torch.rand(4, 6)
    weights = {"head.0": shared, "head.1": shared, "part": shared[1:3], "turned": shared.t(), "scalar": torch.tensor(3),
               "none": torch.empty(0, 4), "half": torch.ones(2, dtype=torch.bfloat16),
               "mask": torch.tensor([True, False]), "parameter": nn.Parameter(torch.rand(2))}
    metadata = {"config": {"name": "tiny", "sizes": (4, 5), "none": None}, "epoch": 3, "note": "5 µm", "loss": 1e-300,
                "model": "a name that is taken"}
    path = tmp_path / "new" / "a.safetensors"
    checkpoint.save_safetensors(path, weights, metadata)
    with safetensors.safe_open(path, "pt") as file:
        texts = file.metadata()
        assert all(torch.equal(file.get_tensor(name), weights[name]) for name in weights)
    assert texts.pop("format") == "pt"
    assert {name: json.loads(text) for name, text in texts.items()} == json.loads(json.dumps(metadata))
    read = checkpoint.load(path)
    assert equal(read.pop("model"), weights) and os.listdir(path.parent) == ["a.safetensors"]
    assert read == {"config": {"name": "tiny", "sizes": [4, 5], "none": None}, "epoch": 3, "note": "5 µm", "loss": 1e-300}


def test_safetensors_of_others_with_metadata(tmp_path):
    """Plain texts stay texts."""
    content = pytest.importorskip("safetensors.torch").save({"w": torch.ones(2)}, {"format": "pt", "by": "{someone"})
    (tmp_path / "a.safetensors").write_bytes(content)
    assert checkpoint.load(tmp_path / "a.safetensors").pop("by") == "{someone"


@pytest.mark.parametrize("value, message", [
    ({"a": [1, torch.ones(1)]}, r"metadata\['x'\]\['a'\]\[1\] is a torch.Tensor; .* numbers and None"),
    ({1: 2}, r"metadata\['x'\] has the key 1; .* are strings"), (np.float64(1), r"metadata\['x'\] is a numpy.float64")])
def test_metadata_that_could_not_be_read_again(tmp_path, value, message):
    with pytest.raises(TypeError, match=message):
        checkpoint.save_safetensors(tmp_path / "a.safetensors", {}, {"x": value})
    with pytest.raises(ValueError, match="a.pth: give it the ending .safetensors"):
        checkpoint.save_safetensors(tmp_path / "a.pth", {}, {})
    assert not os.listdir(tmp_path)


def test_failure_in_the_middle_keeps_the_old_safetensors(tmp_path, monkeypatch):
    path = tmp_path / "best.safetensors"
    checkpoint.save_safetensors(path, {"w": torch.ones(3)}, {"epoch": 1})
    full_disk_on_sync(monkeypatch)
    with pytest.raises(OSError, match="cannot write .*best.safetensors: .*No space left.*Make room.*there is unchanged"):
        checkpoint.save_safetensors(path, {"w": torch.zeros(3)}, {"epoch": 2})
    assert checkpoint.load(path)["epoch"] == 1 and os.listdir(tmp_path) == ["best.safetensors"]


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.9, 0.999])
def test_safetensors_cut_short(tmp_path, kept):
    whole = as_safetensors(small_model().state_dict())
    (tmp_path / "a.safetensors").write_bytes(whole[:int(kept * len(whole))])
    with pytest.raises(ValueError, match="a.safetensors is damaged, cut short or no checkpoint.*download it anew"):
        checkpoint.load(tmp_path / "a.safetensors")


def test_safetensors_that_are_something_else(tmp_path):
    torch.save({"model": {}}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors is damaged"):
        checkpoint.load(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(as_safetensors({}))
    with pytest.raises(ValueError, match="b.safetensors has no weights"):
        checkpoint.load(tmp_path / "b.safetensors")


def test_without_the_package_for_safetensors(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(as_safetensors(small_model().state_dict()))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (checkpoint.load, lambda path: checkpoint.save_safetensors(path, {}, {})):
        with pytest.raises(ImportError, match="a.safetensors: .*needs the package safetensors; pip install safetensors"):
            use(tmp_path / "a.safetensors")


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An empty cache and a folder behind ``http://127.0.0.1:port``."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Quiet(*a, directory=str(folder)))
    Quiet.asked.clear()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_once(served, tmp_path, capsys):
    folder, address = served
    weights = small_model().state_dict()
    content = io.BytesIO()
    torch.save({"model": weights}, content)
    name = f"detr-{hashlib.sha256(content.getvalue()).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content.getvalue())
    for _ in range(2):
        assert equal(checkpoint.load(f"{address}/{name}?download=1")["model"], weights)
    assert len(Quiet.asked) == 1
    assert os.listdir(tmp_path / "hub" / "checkpoints") == [name]
    assert capsys.readouterr().out.count(f"downloading {address}/{name}") == 1


def test_download_of_safetensors(served, tmp_path):
    folder, address = served
    weights = small_model().state_dict()
    content = as_safetensors(weights)
    name = f"resnet-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"
    (folder / name).write_bytes(content)
    assert equal(checkpoint.load(f"{address}/{name}?download=true")["model"], weights)
    (folder / "no-hash.safetensors").write_bytes(content[:-5])
    with pytest.raises(ValueError, match="no-hash.safetensors is damaged.*to download it anew, delete .*no-hash"):
        checkpoint.load(f"{address}/no-hash.safetensors")


def test_download_damaged(served, tmp_path):
    folder, address = served
    (folder / "detr-0123abcd.pth").write_bytes(b"other content")
    with pytest.raises(ValueError, match='detr-0123abcd.pth: invalid hash value.*"0123abcd".*Try again, or'):
        checkpoint.load(f"{address}/detr-0123abcd.pth")
    assert not os.listdir(tmp_path / "hub" / "checkpoints")
    (folder / "no-hash.pth").write_bytes(b"other content")
    with pytest.raises(ValueError, match="no-hash.pth is damaged.*to download it anew, delete .*no-hash.pth"):
        checkpoint.load(f"{address}/no-hash.pth")


def test_download_fails(served):
    _, address = served
    with pytest.raises(OSError, match=f"cannot download {address}/x.pth: .*404.*put it at .*checkpoints.x.pth"):
        checkpoint.load(f"{address}/x.pth")
    with pytest.raises(OSError, match="cannot download http://127.0.0.1:1/x.pth: .*Without a network.*give the path"):
        checkpoint.load("http://127.0.0.1:1/x.pth")
    with pytest.raises(ValueError, match="does not end with a file's name"):
        checkpoint.load(f"{address}/")


def test_load_model(capsys):
    model, other = small_model(), small_model()
    checkpoint.load_model(model, other.state_dict(), "a.pth")
    assert equal(model.state_dict(), other.state_dict())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("theirs, message", [
    (nn.Sequential(OrderedDict(stem=nn.Linear(3, 3), head=nn.Linear(8, 5))).state_dict(),
     "looks like a checkpoint of another model. 0 tensors fit; 6 .body.0.weight, body.0.bias, .*, ....*missing; "
     r"2 .stem.weight, stem.bias. unexpected; 2 .head.weight \[5, 8\] for \[4, 8\], .*of another shape"),
    (small_model(classes=7).state_dict(),
     r"the same model with other sizes.* 6 tensors fit; 2 .head.weight \[7, 8\] for \[4, 8\], .* \[7\] for \[4\]"),
    ({**small_model().state_dict(), "extra.weight": torch.ones(1)},
     r"another variant of this model.* 8 tensors fit; 1 .extra.weight. unexpected$"),
    ({name: value for name, value in small_model().state_dict().items() if name != "head.bias"},
     r"another variant.* 7 tensors fit; 1 .head.bias. missing$"),
    ({**small_model().state_dict(), "head.weight": "text"}, r"1 .head.weight \[\] for \[4, 8\]. of another shape$"),
    ({}, "another model. 0 tensors fit; 8 .*missing"),
])
def test_load_model_all_or_nothing(theirs, message):
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="^a.pth does not fit the model: .*" + message):
        checkpoint.load_model(model, theirs, "a.pth")
    assert equal(model.state_dict(), before)


def test_load_model_changes_values_not_parameters():
    """Optimizers keep pointing at the parameters, whether loading succeeds or not."""
    model = small_model()
    parameters = list(model.parameters())
    checkpoint.load_model(model, small_model().state_dict(), "a.pth")
    with pytest.raises(ValueError):
        checkpoint.load_model(model, {}, "b.pth")
    assert all(a is b for a, b in zip(parameters, model.parameters()))


class Frozen(nn.Module):
    """Batch norm as a backbone freezes it: no ``num_batches_tracked``."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(8))


class Body(nn.Sequential):
    """What ``load_backbone`` asks of a backbone's body."""
    classifier: tuple[str, ...] = ("fc.weight", "fc.bias")
    first_layer = "conv1.weight"

    def renamed(self, state_dict):
        return state_dict, []


def classifier() -> nn.Module:
    return nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 8, 1), bn1=nn.BatchNorm2d(8), fc=nn.Linear(8, 1000)))


@pytest.mark.parametrize("norm, ignored", [(Frozen(), " and 1 num_batches_tracked"), (nn.BatchNorm2d(8), "")])
def test_load_backbone(capsys, norm, ignored):
    body = Body(OrderedDict(conv1=nn.Conv2d(3, 8, 1), bn1=norm))
    published = classifier().state_dict()
    published["bn1.running_mean"] = torch.arange(8.0)
    checkpoint.load_backbone(body, published, "resnet50.pth")
    assert torch.equal(body.conv1.weight, published["conv1.weight"])
    assert torch.equal(body.bn1.running_mean, torch.arange(8.0))
    assert f"left out fc.weight, fc.bias{ignored}\n" in capsys.readouterr().out


def test_load_backbone_is_strict(capsys):
    body = Body(OrderedDict(conv1=nn.Conv2d(3, 8, 1), bn1=Frozen()))
    before = body.conv1.weight.clone()
    with pytest.raises(ValueError, match="2 .fc.weight, fc.bias. unexpected"):
        checkpoint.load_backbone(body, classifier().state_dict(), "resnet50.pth", leave_out=())
    published = classifier().state_dict()
    del published["bn1.weight"]
    with pytest.raises(ValueError, match="resnet50.pth does not fit .*1 .bn1.weight. missing"):
        checkpoint.load_backbone(body, published, "resnet50.pth")
    assert torch.equal(body.conv1.weight, before)
    assert capsys.readouterr().out == ""                        # nothing is called loaded


# Bodies that see other channels, or have other names, than their files.

CHANNELS = [1, 2, 3, 4, 5, 6, 7, 13]


def stem(in_channels: int) -> Body:
    return Body(OrderedDict(conv1=nn.Conv2d(in_channels, 8, 3, bias=False), bn1=Frozen()))


@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_that_are_the_same_are_answered_like_grey(channels):
    weight = torch.randn(8, 3, 3, 5, dtype=torch.float64)
    adapted = checkpoint.adapt_first_layer(weight, channels)
    assert adapted.shape == (8, channels, 3, 5) and adapted.dtype == weight.dtype
    image = torch.rand(2, 1, 9, 11, dtype=torch.float64)
    want = nn.functional.conv2d(image.expand(-1, 3, -1, -1), weight)
    torch.testing.assert_close(nn.functional.conv2d(image.expand(-1, channels, -1, -1), adapted), want)


@pytest.mark.parametrize("channels", [4, 5, 6, 7, 13])
def test_so_are_normalised_ones(channels):
    """Where each channel has the mean and deviation of the colour that it repeats."""
    weight, image = torch.randn(8, 3, 3, 5, dtype=torch.float64), torch.rand(2, 1, 9, 11, dtype=torch.float64)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)[..., None, None]
    repeat = torch.arange(channels) % 3
    want = nn.functional.conv2d((image - mean) / std, weight)
    adapted = checkpoint.adapt_first_layer(weight, channels)
    torch.testing.assert_close(nn.functional.conv2d((image - mean[repeat]) / std[repeat], adapted), want)


def test_which_filters_a_channel_has():
    red, green, blue = (torch.tensor([[[[float(n)]]]]) for n in (2, 4, 8))
    weight = torch.cat([red, green, blue], dim=1)

    def adapted(channels):
        return checkpoint.adapt_first_layer(weight, channels).flatten().tolist()

    assert adapted(1) == [14] and adapted(2) == [2 + 4, 4 + 4] and adapted(3) == [2, 4, 8]
    assert adapted(4) == [1, 4, 8, 1] and adapted(5) == [1, 2, 8, 1, 2] and adapted(6) == [1, 2, 4, 1, 2, 4]
    for wrong, channels in ((weight[:, :2], 5), (weight[0], 5), (weight, 0)):
        with pytest.raises(ValueError, match=r"a first layer \[.*\] for . channels: \[D, 3, kh, kw\] and at least"):
            checkpoint.adapt_first_layer(wrong, channels)


@pytest.mark.parametrize("channels", CHANNELS)
def test_load_backbone_for_other_channels(capsys, channels):
    body, published = stem(channels), stem(3).state_dict() | {"fc.weight": torch.ones(2)}
    checkpoint.load_backbone(body, published, "resnet50.pth")
    assert torch.equal(body.conv1.weight, checkpoint.adapt_first_layer(published["conv1.weight"], channels))
    said = capsys.readouterr().out
    assert (f"resnet50.pth: conv1.weight sees 3 channels, and was adapted to {channels}, so that" in said) \
        == (channels != 3)
    assert "loaded 5 tensors into the backbone; left out fc.weight\n" in said


def test_load_backbone_adapts_what_the_body_names():
    body = Body(OrderedDict(patch_embed=nn.Conv2d(5, 8, 4), conv1=nn.Conv2d(5, 8, 1)))
    body.first_layer = "patch_embed.weight"
    published = body.state_dict() | {"patch_embed.weight": torch.randn(8, 3, 4, 4)}
    checkpoint.load_backbone(body, published, "pvt.pth")
    assert torch.equal(body.patch_embed.weight, checkpoint.adapt_first_layer(published["patch_embed.weight"], 5))
    with pytest.raises(ValueError, match=r"1 .conv1.weight \[8, 3, 1, 1\] for \[8, 5, 1, 1\]. of another shape"):
        checkpoint.load_backbone(body, published | {"conv1.weight": torch.randn(8, 3, 1, 1)}, "pvt.pth")


@pytest.mark.parametrize("given", [(8, 4, 3, 3), (9, 3, 3, 3), (8, 3, 5, 5), (8, 3)])
def test_other_mismatches_of_the_first_layer_are_errors(given, capsys):
    body = stem(5)
    before = body.conv1.weight.clone()
    with pytest.raises(ValueError, match=r"1 .conv1.weight \[.*for \[8, 5, 3, 3\]. of another shape"):
        checkpoint.load_backbone(body, stem(5).state_dict() | {"conv1.weight": torch.zeros(given)}, "resnet50.pth")
    assert torch.equal(body.conv1.weight, before) and capsys.readouterr().out == ""


def test_load_backbone_with_names_of_its_own(capsys):
    """``renamed`` comes first, so ``first_layer`` and ``classifier`` are the body's names."""
    class Renaming(Body):
        def renamed(self, state_dict):
            kept = {name.replace("stem.", "conv1."): x for name, x in state_dict.items() if not name.startswith("head")}
            return kept, [name for name in state_dict if name.startswith("head")]

    body = Renaming(OrderedDict(conv1=nn.Conv2d(4, 8, 3, bias=False)))
    file = {"stem.weight": torch.randn(8, 3, 3, 3), "fc.bias": torch.ones(1),
            **{f"head.{i}.weight": torch.ones(1) for i in range(9)}}
    checkpoint.load_backbone(body, file, "timm/a")
    assert torch.equal(body.conv1.weight, checkpoint.adapt_first_layer(file["stem.weight"], 4))
    said = capsys.readouterr().out
    assert "left out head.0.weight, head.1.weight, " in said and "head.7.weight and 2 more\n" in said
    assert len(file) == 11                                                              # the caller's is as it was


def test_load_backbone_leaves_out_what_begins_so(capsys):
    body = stem(3)
    body.classifier = ("fc.weight", "layer4.")
    checkpoint.load_backbone(body, stem(3).state_dict() | {"layer4.0.weight": torch.ones(1), "fc.weight": torch.ones(1)},
                             "resnet50.pth")
    assert "left out layer4.0.weight, fc.weight\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 .layer40.weight. unexpected"):
        checkpoint.load_backbone(body, stem(3).state_dict() | {"layer40.weight": torch.ones(1)}, "resnet50.pth")
