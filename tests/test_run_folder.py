"""The checkpoints of a run folder: which one is the newest, what survives a full disk and a kill, what the page says."""
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from detr import checkpoint
from detr.run_folder import RunFolder, code_revision, facts, position

TABLE = [{"label": 0, "id": 3, "name": "red", "isthing": True}, {"label": 1, "id": 7, "name": "blue", "isthing": True}]
METRICS = {"coco_eval_bbox": [0.25, 0.5] + [0.0] * 10, "coco_eval_masks": [0.125, 0.375] + [0.0] * 10,
           "PQ_all": {"pq": 0.0625, "sq": 0.7, "rq": 0.1}}


def state(epoch: int, step: int = 0, **entries) -> dict:
    return {"model": {"w": torch.full((50, 40), float(epoch))}, "optimizer": {"state": {}}, "epoch": epoch - 1,
            "position": {"epoch": epoch, "step": step}, "num_classes": 2, "categories": TABLE,
            "config": {"name": "tiny_detr", "model": {"padding": "exact"}},
            "preprocessing": {"size": 64, "max_size": 100, "mean": (0.0,) * 3, "std": (1.0,) * 3},
            "card": {"metrics": METRICS, "revision": "abc123", "data": {"images": 5, "sha256": "f00"},
                     "date": "2026-11-22"}, **entries}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_former_checkpoint_stays(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert run.newest() is None
    for epoch in range(3):
        assert run.save(state(epoch)) == run.newest() == tmp_path / "run" / "checkpoint.pth"
    assert names(run.folder) == ["checkpoint.pth", "checkpoint_previous.pth"]
    assert [checkpoint.load(run.folder / name)["position"]["epoch"] for name in names(run.folder)] == [2, 1]
    assert checkpoint.load(run.folder / "checkpoint_previous.pth")["model"]["w"][0, 0] == 1


def test_the_newest_is_the_last_written(tmp_path):
    """Not the furthest: a training may have gone on from an earlier checkpoint."""
    run = RunFolder(tmp_path)
    for file, at in (("checkpoint.pth", (2, 5)), ("checkpoint_previous.pth", (2, 40)), ("checkpoint0001.pth", (1, 90)),
                     ("checkpoint12345.pth", (2, 7)), ("best.pth", (9, 0)), ("checkpoint_old.pth", (9, 0)),
                     ("checkpoint1.pth", (9, 0)), (".checkpoint.pth.here.1.partial.pth", (9, 0))):
        checkpoint.save(tmp_path / file, state(*at))
    assert run.newest() == tmp_path / "checkpoint.pth"
    (tmp_path / "checkpoint.pth").unlink()
    assert run.newest() == tmp_path / "checkpoint_previous.pth"
    (tmp_path / "checkpoint_previous.pth").unlink()
    os.utime(tmp_path / "checkpoint12345.pth", (1e9, 1e9))
    assert run.newest() == tmp_path / "checkpoint0001.pth"


def test_positions_of_files_without_one():
    """Those of before there were any, whose epoch is the last that is finished."""
    assert position({"epoch": 3}) == (4, 0) == position({"epoch": 0, "position": {"epoch": 4, "step": 0}})
    assert position({"model": {}}) == (0, 0) and position({"position": {"epoch": 1}}) == (1, 0)


def flipped(path: Path) -> None:
    """One bit of a weight, which no reader of tensors notices."""
    with zipfile.ZipFile(path) as archive:
        tensor = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    content = bytearray(path.read_bytes())
    content[tensor.header_offset + 200 + tensor.file_size // 2] ^= 1
    path.write_bytes(content)
    checkpoint.load(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def other(path: Path) -> None:
    torch.save({"model": {}, "epoch": None}, path)


def harmful(path: Path) -> None:
    torch.save({"model": {}, "x": subprocess.Popen}, path)


@pytest.mark.parametrize("damage", [flipped, cut, emptied, other, harmful])
def test_damaged_ones_are_passed_over(tmp_path, capsys, damage):
    run = RunFolder(tmp_path)
    run.save(state(1))
    run.save(state(2))
    damage(tmp_path / "checkpoint.pth")
    assert run.newest() == tmp_path / "checkpoint_previous.pth"
    said = capsys.readouterr().out
    assert re.search("^passed over checkpoint.pth: ", said) and said.count("\n") == 2
    assert f"1 of the 2 checkpoints in {tmp_path} could not be read\n" in said
    damage(tmp_path / "checkpoint_previous.pth")
    assert run.newest() is None
    assert "2 of the 2 checkpoints in " in (said := capsys.readouterr().out) and "there is none to go on from" in said


def test_what_killed_processes_left(tmp_path, capsys):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here, alive = re.sub("[^A-Za-z0-9-]", "-", socket.gethostname()), os.getppid()
    files = {f".checkpoint.pth.{here}.{gone.pid}.partial": False,
             f".best.safetensors.{here}.{os.getpid()}.partial": False,
             f".checkpoint.pth.{here}.{alive}.partial": True, f".checkpoint.pth.another.{gone.pid}.partial": True,
             ".checkpoint.pth.another.7.partial": False, "..partial": True, ".mine.partial": True}
    for name in files:
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / ".checkpoint.pth.another.7.partial", (0, time.time() - 4000))
    assert RunFolder(tmp_path).newest() is None
    assert names(tmp_path) == sorted(name for name, stays in files.items() if stays)
    assert capsys.readouterr().out.count("4 bytes of a file that was not written to its end") == 3


def test_a_leftover_name_does_not_stop_the_next_save(tmp_path):
    """A process that is killed between the two names of the former checkpoint, and has the same number again."""
    run = RunFolder(tmp_path)
    run.save(state(1))
    for name in ("checkpoint.pth", "checkpoint_previous.pth"):
        os.link(tmp_path / "checkpoint.pth", checkpoint.partial_of(tmp_path / name))
    os.link(tmp_path / "checkpoint.pth", tmp_path / "checkpoint_previous.pth")
    run.save(state(2))
    assert names(tmp_path) == ["checkpoint.pth", "checkpoint_previous.pth"]
    assert [checkpoint.load(tmp_path / name)["position"]["epoch"] for name in names(tmp_path)] == [2, 1]


def test_without_hard_links(tmp_path, monkeypatch, capsys):
    def link(*names):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", link)
    run = RunFolder(tmp_path)
    for epoch in range(4):
        run.save(state(epoch))
    assert names(tmp_path) == ["checkpoint.pth"] and checkpoint.load(tmp_path / "checkpoint.pth")["epoch"] == 2
    assert capsys.readouterr().out == (f"{tmp_path}: no previous checkpoint is kept beside the newest, since a file "
                                       f"there cannot have two names (Operation not permitted)\n")


# Disks that are full.

LARGE = {"model": {f"w{i}": torch.ones(200_000) for i in range(6)}, "epoch": 2, "position": {"epoch": 2}}


def refused(folder: Path, limits: list[int]) -> list[str]:
    """What is said where checkpoints of 4.8 MB meet the end of the disk, or a limit for each file; the folder is then
    as it was."""
    run = RunFolder(folder)
    small = {"model": {"w": torch.ones(1000)}, "epoch": 1, "position": {"epoch": 1}}
    run.save({**small, "position": {"epoch": 0}})
    run.save(small)
    run.export("best", small)
    run.card()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said, ordinary = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in limits:
        for write in (run.save, lambda state: run.keep(state, 2), lambda state: run.export("best", state)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, ordinary[1]))
            try:
                with pytest.raises(OSError) as error:
                    write(LARGE)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, ordinary)
            said.append(str(error.value))
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert run.newest() == folder / "checkpoint.pth" and checkpoint.load(run.newest())["epoch"] == 1
    return said


def test_a_quota(tmp_path):
    """Files that may not become larger, wherever in the file that is."""
    checkpoint.save(tmp_path / "large.pth", LARGE)
    size = (tmp_path / "large.pth").stat().st_size
    for line in refused(tmp_path / "run", [0, 1, 3000, 100_000, 800_100, 2_000_000, size - 1000, size - 60, size - 1]):
        assert re.fullmatch(r"cannot write .*(checkpoint|checkpoint0002|best).pth: .*File too large. Make room, or "
                            r"choose another output folder(; the file that was there is unchanged)?", line), line
        assert ("unchanged" in line) == ("0002" not in line)


def test_a_full_disk(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True,
                             text=True) if sys.platform == "linux" and shutil.which("mount") else None
    if mounted is None or mounted.returncode:
        pytest.skip(f"a small disk cannot be made here: {mounted.stderr.strip() if mounted else 'no mount'}")
    try:
        said = refused(tmp_path / "run", [resource.RLIM_INFINITY])
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    assert all("No space left on device. Make room" in line for line in said)


# Kills.

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from detr.checkpoint import load
from detr.run_folder import RunFolder, position

folder, tries = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)

def train():
    run = RunFolder(folder)
    newest = run.newest()
    step = position(load(newest))[1] if newest else 0
    while True:
        step += 1
        run.save({"model": {"w": torch.full((150_000,), float(step))}, "position": {"epoch": 0, "step": step}})

def partials():
    return [path for path in folder.glob(".*") if path.name.endswith(".partial")]

random.seed(0)
before, interrupted = 0, 0
while interrupted < tries:
    child = os.fork()
    if not child:
        train()
    time.sleep(0.02 + 0.03 * random.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    interrupted += bool(partials())
    newest = RunFolder(folder).newest()
    state = load(newest) if newest else {"position": {"epoch": 0, "step": 0}}
    step = position(state)[1]
    assert newest is None or newest.name == "checkpoint.pth" and (state["model"]["w"] == step).all()
    assert step >= before and not partials()
    before = step
print("kills while a file was written:", interrupted)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork here")
def test_kills_leave_a_whole_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "10"], capture_output=True, text=True, cwd=ROOT,
                          timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "kills while a file was written: 10" and "passed over" not in done.stdout


# What is exported, and the page.

def test_exports(tmp_path):
    run = RunFolder(tmp_path)
    assert [path.name for path in run.export("best", state(3))] == ["best.pth", "best.safetensors"]
    one, two = (checkpoint.load(tmp_path / f"best{ending}") for ending in (".pth", ".safetensors"))
    assert torch.equal(one["model"]["w"], two["model"]["w"]) and one.keys() == two.keys()
    assert facts(one) == facts(two)
    with pytest.raises(ValueError, match="export 'last': it is one of best, final"):
        run.export("last", state(3))


def test_the_page(tmp_path):
    run = RunFolder(tmp_path / "my run")
    run.save(state(3, 0))
    run.save(state(3, 20, card={"revision": "abc123"}))
    run.export("best", state(3))
    (tmp_path / "my run" / "final.pth").write_text("no checkpoint")
    page = run.card().read_text()
    again = RunFolder(tmp_path / "my run").card().read_text()                   # what it reads is what it remembers
    assert page.splitlines()[1:] == again.splitlines()[1:] and "as of" in page.splitlines()[0]
    assert page.splitlines()[1:3] == ["to use the model: best.pth", "to train on: checkpoint.pth, by --resume auto"]
    blocks = {block.splitlines()[0]: block for block in page.split("\n\n")[1:]}
    assert list(blocks) == ["checkpoint.pth", "checkpoint_previous.pth", "best.pth", "best.safetensors", "final.pth"]
    newest, best = blocks["checkpoint.pth"], blocks["best.pth"]
    for line in ("what .* the newest", "model .* tiny_detr", "position .* epoch 3, step 20", "scores .* not evaluated",
                 "classes .* 2: red, blue", "image size .* short side 64, long side 100 at most", "padding .* exact",
                 "revision .* abc123", f"size on disk .* {(run.folder / 'checkpoint.pth').stat().st_size:,} bytes",
                 "train on .* python main.py --output_dir '.*my run' --resume auto",
                 "evaluate .* python main.py --eval --resume '.*my run/checkpoint.pth'", "written .* 20..-..-.. .*UTC"):
        assert re.search(f"^    {line}", newest, re.M), line
    assert "box AP 0.2500, AP50 0.5000; mask AP 0.1250, AP50 0.3750; PQ 0.0625\n" in best
    assert re.search("^    data .* images 5, sha256 f00\n    date .* 2026-11-22$", best, re.M) and "train on" not in best
    assert f"detr.load({str(run.folder / 'best.safetensors')!r})" in blocks["best.safetensors"]
    assert re.search("not readable .*final.pth is damaged", blocks["final.pth"])
    assert "detr.load" not in blocks["final.pth"]


def test_the_page_after_a_resume(tmp_path):
    """What is read again from the files is what was known when they were written."""
    run = RunFolder(tmp_path)
    for epoch in range(3):
        run.save(state(epoch))
    run.keep(state(1), 1)
    run.export("final", state(2))
    pages = [folder.card().read_text().split("\n", 1)[1] for folder in (run, RunFolder(tmp_path))]
    assert pages[0] == pages[1] and "epoch 1, step 0" in pages[0]


def test_pages_of_files_with_less():
    assert facts({"model": {}}) == {"model": "unknown", "scores": "not evaluated"}
    many = facts({"categories": [{"name": str(i)} for i in range(90)], "preprocessing": {"size": [4, 5]}, "config": 3})
    assert many["classes"] == "90: 0, 1, 2, 3, 4, ..." and many["image size"] == "4 x 5"
    assert facts({"num_classes": 7})["classes"] == "7 without names"


# The revision of the code.

def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words],
                          capture_output=True, text=True, check=True).stdout.strip()


def test_revision(tmp_path, monkeypatch):
    code = tmp_path / "detr"
    code.mkdir()
    (code / "__init__.py").write_text("1")
    assert code_revision(code) == "unknown"                                     # no repository
    code_revision.cache_clear()
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-m", "a")
    assert code_revision(code) == "unknown"                                     # an installed copy in another's
    code_revision.cache_clear()
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "b")
    head = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")                                   # as within a git hook
    assert code_revision(code) == head
    (code / "__init__.py").write_text("2")
    assert code_revision(code) == head                                          # what is imported stays what it is
    code_revision.cache_clear()
    assert code_revision(code) == f"{head}+changes"
    code_revision.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert code_revision(code) == "unknown"                                     # no git
