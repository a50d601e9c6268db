"""The cache of decoded images: one decodes, others map it; nothing half-written is ever found."""

import argparse
import errno
import io
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from data_fixtures import picture, pictures, encode, files, load, refusal, decoded, assert_images, entries, table  # noqa: F401, some are fixtures


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

from data import cache
import data
from data.pictures import decode, fit


# ---- the cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    return files(tmp_path / "set", {f"{'ab'[i % 2]}/{i}.png": picture(i, 12, 12) for i in range(6)})


def test_pictures_are_decoded_once(folder, load, decoded, capfd):
    first = load(folder)
    assert len(decoded) == 6 and "Decoded 6 images into " in capfd.readouterr().err
    second = load(folder)
    assert len(decoded) == 6 and capfd.readouterr().err == ""
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.labels, second.labels)
    load(folder, image_size=4, query_block=16, memory_block=16)
    assert len(decoded) == 12


def test_a_changed_source_is_decoded_again(folder, load, decoded):
    before = load(folder)
    files(folder, {"a/0.png": picture(50, 12, 12)})
    after = load(folder)
    assert len(decoded) == 12 and (before.pixels != after.pixels).flatten(1).any(dim=1).sum() == 1
    os.utime(folder / "a/0.png", ns=(1, 1))
    load(folder)
    (folder / "b/1.png").rename(folder / "a/1.png")
    assert load(folder).labels.sum() == 2  # and not 3
    assert len(decoded) == 24


def test_each_choice_of_columns_is_an_entry(load, decoded, tmp_path):
    path = table(tmp_path / "a.parquet", left=[encode(picture(0))], image=[encode(picture(1))], label=[0], fine=[5])
    for options in ((), ("--image-column", "left"), ("--label-column", "fine")) * 2:
        images = load(path, *options)
        assert_images(images, pictures(1, 0 if "left" in options else 1), [5 if "fine" in options else 0])
    assert len(decoded) == 3


def test_a_batch_is_a_copy(folder, load):
    images = load(folder)
    batch = images[torch.tensor([3, 0])]
    assert torch.equal(batch.pixels[1], images.pixels[0]) and batch.labels.tolist() == images.labels[[3, 0]].tolist()
    batch.pixels.zero_()
    assert images.pixels[3].any() and load(folder).pixels[3].any()


def test_the_default_cache_is_that_of_the_user(monkeypatch):
    def default() -> Path:
        parser = argparse.ArgumentParser()
        data.add_options(parser, "train")
        return parser.parse_args(["--data", "x"]).cache

    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert default() == Path("/some/where/imtx")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default() == Path("/home/me/.cache/imtx")


def test_a_run_that_ends_half_way_leaves_no_entry(folder, load, decoded, monkeypatch, tmp_path):
    def interrupted(*_):
        if decoded:
            raise KeyboardInterrupt
        return fit(*_)

    monkeypatch.setattr(cache, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert entries(tmp_path / "cache") == []
    monkeypatch.setattr(cache, "fit", fit)
    images = load(folder)
    (entry,) = entries(tmp_path / "cache")
    part = entry.rename(entry.with_name(f".{entry.name}.part"))  # what a killed process leaves
    (part / "labels.npy").unlink()
    files(part, {"other": b""})
    assert torch.equal(load(folder).pixels, images.pixels)
    assert entries(tmp_path / "cache") == [entry]
    assert sorted(path.name for path in entry.iterdir()) == ["about.json", "labels.npy", "pixels.npy"]


@pytest.mark.parametrize("name", ["pixels.npy", "labels.npy", "about.json"])
def test_a_damaged_entry_is_named(name, folder, load, refusal, tmp_path):
    load(folder)
    (entry,) = entries(tmp_path / "cache")
    (entry / name).write_bytes((entry / name).read_bytes()[:-20])
    refused = refusal(folder)
    assert refused.startswith(f"{entry} cannot be read: ") and refused.endswith("Delete it, and it is made again.")


def test_a_cache_that_cannot_be_written_is_named(folder, load, refusal, monkeypatch, tmp_path):
    files(tmp_path, {"file": b""})
    refused = refusal(folder, "--cache", tmp_path / "file/cache")
    assert refused.startswith(f"The cache folder {tmp_path}/file/cache cannot be written to: Not a directory. --cache or ")
    load(folder)

    def closed(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", closed)
    assert len(load(folder)) == 6  # what is there can be read
    os.utime(folder / "a/0.png", ns=(1, 1))
    assert "cannot be written to: Permission denied. --cache or" in refusal(folder)


@pytest.mark.parametrize("room", [0, 300])
def test_a_full_disk_is_named_and_left_as_it_was(room, folder, refusal, monkeypatch, tmp_path):
    class Full(io.FileIO):
        def write(self, content) -> int:
            if self.tell() + memoryview(content).nbytes > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    monkeypatch.setattr(cache, "open", lambda path, mode: Full(path, "w"), raising=False)
    assert "cannot be written to: No space left on device. --cache or" in refusal(folder)
    assert entries(tmp_path / "cache") == []


def test_of_two_processes_one_decodes_and_the_other_waits(folder, load, monkeypatch, tmp_path):
    log = tmp_path / "log"

    def slowly(file):
        with open(log, "a") as opened:
            opened.write(f"{os.getpid()}\n")
        time.sleep(0.05)
        return decode(file)

    monkeypatch.setattr(cache, "decode", slowly)
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    others = [fork.Process(target=lambda: results.put(load(folder).pixels.numpy().tobytes())) for _ in range(3)]
    for other in others:
        other.start()
    found = [results.get(timeout=60) for _ in others]
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    assert len(log.read_text().split()) == 6 and len(set(log.read_text().split())) == 1
    assert set(found) == {load(folder).pixels.numpy().tobytes()}


def test_a_killed_process_keeps_nobody_waiting(folder, load, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "decode", lambda file: (tmp_path / "begun").touch() or time.sleep(600))
    killed = multiprocessing.get_context("fork").Process(target=load, args=(folder,))
    killed.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(60)
    monkeypatch.setattr(cache, "decode", decode)
    assert len(load(folder)) == 6 and len(entries(tmp_path / "cache")) == 1
