"""datasets/file_cache.py: the bytes of files, shared by all workers; what does not fit is refused before it is read."""
import os
import re

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from datasets import file_cache
from datasets.file_cache import FileCache, does_not_fit, free_memory
from detr import distributed


def unreadable(i):
    raise RuntimeError(f"asked about file {i}")


@pytest.fixture
def paths(tmp_path):
    """Files of many lengths, one of them empty; more than a thread reads at a time."""
    paths = [tmp_path / f"{i}.bin" for i in range(150)]
    for i, path in enumerate(paths):
        path.write_bytes(os.urandom(i * i % 997))
    return paths


def test_it_holds_the_bytes_of_the_files(paths, capsys):
    cache = FileCache(paths, "here", unreadable)
    contents = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    assert len(cache) == 150 and [cache[i] for i in range(150)] == contents and cache[0] == b""
    total = sum(map(len, contents))
    assert cache.content.shape == (total,) and cache.content.dtype == torch.uint8
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"here: reading 150 files, {total / 1e9:.3g} GB, into memory (--cache_mode)"
    assert re.fullmatch(re.escape(f"here: 150/150 files, {total / 1e9:.3g} GB, ") + r"\d+ s", last)


def test_empty_files_alone(tmp_path):
    (tmp_path / "a").touch()
    assert [FileCache([tmp_path / "a"] * 2, "here", unreadable)[i] for i in range(2)] == [b"", b""]


def test_progress_every_ten_seconds(paths, capsys, monkeypatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(file_cache.time, "perf_counter", lambda: next(clock))
    FileCache(paths, "here", unreadable)
    assert [line.split(" files")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["here: 128/150",
                                                                                             "here: 150/150"]


class Writes(Dataset):
    """Each item writes into the cache, which shows whether it is the same memory."""

    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(self.cache)

    def __getitem__(self, i):
        content = self.cache[i]
        self.cache.content[self.cache.starts[i]] = 7
        return list(content)


@pytest.mark.parametrize("context, workers", [("fork", 2), ("spawn", 1)])
def test_workers_share_it_instead_of_copying(tmp_path, context, workers):
    for i in range(4):
        (tmp_path / str(i)).write_bytes(bytes([i, 50]))
    cache = FileCache([tmp_path / str(i) for i in range(4)], "here", unreadable)
    loader = DataLoader(Writes(cache), None, num_workers=workers, multiprocessing_context=context)
    assert [list(item) for item in loader] == [[i, 50] for i in range(4)]
    assert [cache[i] for i in range(4)] == [bytes([7, 50])] * 4


def test_a_file_that_cannot_be_read(paths):
    paths[70].unlink()
    with pytest.raises(RuntimeError, match="asked about file 70"):
        FileCache(paths, "here", unreadable)
    with pytest.raises(FileNotFoundError, match="70.bin"):                      # where nothing else is said
        FileCache(paths, "here", unreadable=lambda i: None)
    paths[70].mkdir()
    with pytest.raises(RuntimeError, match="asked about file 70"):              # has a size, and cannot be opened
        FileCache(paths, "here", unreadable)


@pytest.mark.parametrize("change", [1, -1])
def test_a_file_that_changes_while_it_is_read(paths, monkeypatch, change):
    sizes = FileCache._sizes
    monkeypatch.setattr(FileCache, "_sizes", lambda self, step: [size + change * (size == 3 ** 2)
                                                                 for size in sizes(self, step)])
    with pytest.raises(OSError, match=r"3\.bin changed while it was read; start again once it is complete"):
        FileCache(paths, "here", unreadable)


# -- memory -----------------------------------------------------------------------------------------------------------

def test_too_little_memory_is_said_before_anything_is_read(paths, monkeypatch):
    total = sum(path.stat().st_size for path in paths)
    monkeypatch.setattr(file_cache, "free_memory", lambda: total * 1.05)
    monkeypatch.setattr(FileCache, "_read", lambda *args: pytest.fail("read"))
    with pytest.raises(ValueError) as error:
        FileCache(paths, "folder", unreadable)
    assert str(error.value).startswith("--cache_mode: the 150 files of folder have ")
    assert "leave --cache_mode out" in str(error.value)


def test_numbers_and_remedies(monkeypatch):
    monkeypatch.setattr(file_cache, "SHARED_MEMORY", file_cache.Path("nowhere"))
    monkeypatch.setattr(file_cache, "free_memory", lambda: 20e9)
    assert does_not_fit(int(18e9), 1, "3 files of x") is None
    assert does_not_fit(int(18.5e9), 1, "3 files of x") == (
        "--cache_mode: the 3 files of x have 18.5 GB, too much for the 20 GB of memory that are free, of which a tenth "
        "is left to the program; free some, or leave --cache_mode out")
    message = does_not_fit(int(5e9), 4, "3 files of x")
    assert "have 5 GB in each of 4 processes, too much for the 20 GB" in message
    assert "start fewer processes, or leave --cache_mode out" in message
    assert does_not_fit(int(4.5e9), 4, "3 files of x") is None


def test_too_little_shared_memory(monkeypatch, tmp_path):
    """What containers have of it is often 64 MB; to write more would end the process without a word."""
    monkeypatch.setattr(file_cache, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(file_cache, "free_memory", lambda: 200e9)
    usage = type("usage", (), {"free": 64_000_000})
    monkeypatch.setattr(file_cache.shutil, "disk_usage", lambda path: usage)
    assert does_not_fit(64_000_000, 1, "files") is None
    assert does_not_fit(int(19.3e9), 2, "files") == (
        f"--cache_mode: the files have 19.3 GB in each of 2 processes, but only 0.064 GB of shared memory are free in "
        f"{tmp_path}; give it more (docker run --shm-size=40g, or mount -o remount,size=...), start fewer processes, or "
        f"leave --cache_mode out")


def test_processes_of_this_machine_are_counted(paths, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(file_cache, "does_not_fit", lambda *args: seen.append(args))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    FileCache(paths, "here", unreadable)
    assert seen == [(sum(path.stat().st_size for path in paths), 3, "150 files of here")]
    assert "into memory (--cache_mode), in each of 3 processes\n" in capsys.readouterr().out


def test_where_another_process_refuses_all_do(paths, monkeypatch):
    monkeypatch.setattr(distributed, "gather_objects", lambda item: [item, "no room over there"])
    with pytest.raises(ValueError, match="no room over there"):
        FileCache(paths, "here", unreadable)


def test_free_memory(monkeypatch, tmp_path):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory() <= total
    texts = {"/proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   500 kB\n"}

    class Files(type(tmp_path)):
        def read_text(self):
            if str(self) not in texts:
                raise FileNotFoundError(str(self))
            return texts[str(self)]

    monkeypatch.setattr(file_cache, "Path", Files)
    assert free_memory() == 500 * 1024
    texts["/sys/fs/cgroup/memory.max"] = "max\n"                                # a container without a limit,
    assert free_memory() == 500 * 1024
    texts["/sys/fs/cgroup/memory.max"] = "4096\n"                               # and with one
    assert free_memory() == 4096
    texts.clear()
    assert free_memory() == total
