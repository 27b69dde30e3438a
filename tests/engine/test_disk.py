import fcntl
import os
import sys

import pytest

from mlx_blockskip.engine import disk


@pytest.mark.parametrize("nbytes", [1000, disk.PIECE + 1])
def test_all_of_a_sample_is_read_and_nothing_is_left(tmp_path, monkeypatch, nbytes):
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *more: (found := pread(*more), read.append(found))[0])
    assert disk.read_speed(tmp_path, nbytes) > 0
    assert sum(len(found) for found in read) == nbytes
    assert len(set(b"".join(read)[:1000])) > 100, "holes and repeated bytes are read faster than data"
    assert not list(tmp_path.iterdir())


def test_the_sample_is_removed_where_it_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        disk.read_speed(tmp_path, 10)
    assert not list(tmp_path.iterdir())


def test_on_a_mac_the_system_keeps_neither_what_is_written_nor_what_is_read(tmp_path, monkeypatch):
    told = []

    def tell(descriptor, what, value):
        mode = fcntl_of(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        told.append((mode, what, value, os.fstat(descriptor).st_size))

    fcntl_of = fcntl.fcntl
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_NOCACHE", 48, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", tell)
    disk.read_speed(tmp_path, 1000)
    assert told == [(os.O_WRONLY, 48, 1, 0), (os.O_RDONLY, 48, 1, 1000)], "before a byte is written or read"
