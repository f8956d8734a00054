"""A file written past the page cache: the bytes and the sha256 whatever the order of pieces, more pieces than there is memory for, and disks that say no."""

import errno
import hashlib
import os
import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_ray.checkpoints import direct
from fusion_ray.checkpoints.direct import DirectFile
from fusion_ray.checkpoints.plan import PlannedTensor, plan_units
from fusion_ray.checkpoints.writer import ShardWriter
from fusion_ray.store import StoreError

SIZE = 40 * 4096 + 123


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(direct, "CHUNK", 4096)
    monkeypatch.setattr(direct, "CHUNKS", 5)


def some_bytes(size=SIZE):
    return np.random.default_rng(3).integers(0, 256, size, np.uint8).tobytes()


def write_pieces(path, data, pieces):
    file = DirectFile(path, len(data))
    try:
        for start, stop in pieces:
            file.write(start, memoryview(data)[start:stop])
        return file.finish()
    finally:
        file.close()


def check(path, data, sha256):
    assert path.read_bytes() == data
    assert sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("order", ["forwards", "backwards", "the ends first", "evens, then odds"])
def test_any_order_with_more_chunks_than_memory(tmp_path, order):
    data = some_bytes()
    pieces = [(start, min(start + 1000, SIZE)) for start in range(0, SIZE, 1000)]
    if order == "backwards":
        pieces.reverse()
    elif order == "the ends first":
        pieces = pieces[-20:] + pieces[:-20]
    elif order == "evens, then odds":
        pieces = pieces[::2] + pieces[1::2]  # every chunk stays open until the end
    check(tmp_path / "file", data, write_pieces(tmp_path / "file", data, pieces))


@settings(deadline=None)  # a disk takes its time
@given(st.integers(1, 30_000), st.lists(st.integers(0, 30_000), max_size=30), st.randoms())
def test_any_pieces(tmp_path_factory, size, cuts, random):
    data, path = some_bytes(size), tmp_path_factory.mktemp("direct") / "file"
    ends = sorted({0, size, *(cut for cut in cuts if cut < size)})
    pieces = list(pairwise(ends))
    random.shuffle(pieces)
    check(path, data, write_pieces(path, data, pieces))


def test_several_threads(tmp_path):
    data = some_bytes()
    file = DirectFile(tmp_path / "file", SIZE)
    quarter = SIZE // 4 + 1

    def write(first):
        for start in range(first, min(first + quarter, SIZE), 700):
            file.write(start, memoryview(data)[start : min(start + 700, first + quarter)])

    threads = [threading.Thread(target=write, args=(first,)) for first in range(0, SIZE, quarter)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        check(tmp_path / "file", data, file.finish())
    finally:
        file.close()


@pytest.mark.parametrize("when", ["opening", "writing"])
def test_file_systems_that_want_the_cache(tmp_path, monkeypatch, when):
    """They say so with EINVAL, some only at the first write."""
    flags_of, real_open, real_write = {}, os.open, os.pwrite
    refused = []

    def refuse(flags):
        if flags & direct._DIRECT:
            refused.append(flags)
            raise OSError(errno.EINVAL, "Invalid argument")

    def opened(path, flags, *rest):
        if when == "opening":
            refuse(flags)
        number = real_open(path, flags, *rest)
        flags_of[number] = flags
        return number

    def written(number, *rest):
        if when == "writing":
            refuse(direct.fcntl.fcntl(number, direct.fcntl.F_GETFL))
        return real_write(number, *rest)

    monkeypatch.setattr(direct.os, "open", opened)
    monkeypatch.setattr(direct.os, "pwrite", written)
    monkeypatch.setattr(direct, "_FLUSHED_AT_A_TIME", 3 * 4096)
    data = some_bytes()
    check(tmp_path / "file", data, write_pieces(tmp_path / "file", data, [(0, 9999), (9999, SIZE)]))
    assert len(refused) == 1


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    real = os.pwrite

    def full(number, data, offset):
        if offset >= 8 * 4096:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(number, data, offset)

    monkeypatch.setattr(direct.os, "pwrite", full)
    (unit,) = plan_units([PlannedTensor("a", "F32", (100_000,), 100_000)], max_shard_bytes=1 << 20)

    def write():
        with ShardWriter(tmp_path / unit.file, unit) as writer:
            for start in range(0, 100_000, 1000):
                writer.write("a", start, np.ones(1000, np.float32))

    with pytest.raises(StoreError, match=r"cannot write model.safetensors in .*: No space left on device"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_short_meanwhile_is_an_error(tmp_path):
    """What had to leave the memory is read again for the sum."""
    data = some_bytes()
    file = DirectFile(tmp_path / "file", SIZE)
    file.write(4096, memoryview(data)[4096:])
    with file._changed:
        assert file._changed.wait_for(lambda: not file._storing, timeout=60)
    os.truncate(tmp_path / "file", 5000)
    file.write(0, memoryview(data)[:4096])
    with pytest.raises(OSError, match="shorter"):
        file.finish()
    file.close()


def test_missing_bytes_are_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(AssertionError, match="missing"):
        write_pieces(tmp_path / "file", some_bytes(), [(0, SIZE - 1)])
